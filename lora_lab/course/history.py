"""What a learner's records say: what was solved and how, which mistakes were named and when they were overcome, what was predicted and
how surely, how long it took, and what to do next.

    history = read_history(records, labs())     records: dicts as `records` keeps them, in any order, from any number of places
    history.labs["2"].works[0].state            "solved", "tried" or "new"

Plain and frozen, and it runs nothing. Records are a student's own file, edited by hand, perhaps: whatever stands in a field, nothing here
raises; what makes no sense is left out, and `notes` says how much that was.
"""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from .exercise import Exercise, Lab, Prediction
from .records import VERSION, Calibration

PAUSE = timedelta(minutes=15)  # between two records; a longer one is no work. The grader's pages use the same
SITTING = timedelta(hours=1)  # a longer pause begins another sitting
SURE = 0.8  # a wrong prediction with at least this confidence is a surprise
LAST_RUNG = 3  # of the hints


@dataclass(frozen=True)
class Event:
    """A record with its time, in UTC, and the lab it belongs to ("" where it belongs to none)."""

    time: datetime
    lab: str
    kind: str
    record: Mapping


@dataclass(frozen=True)
class Mistake:
    """A mistake that checks of one exercise recognised. `text`: what its card said last; "" in records that kept the key alone.
    `overcome`: when the exercise next passed, None if it did not; `returned`: it had been overcome before."""

    exercise: str
    key: str
    text: str
    count: int
    first: datetime
    last: datetime
    overcome: datetime | None = None
    returned: bool = False


@dataclass(frozen=True)
class Work:
    """One exercise. `tries`: checks up to the first that passed, or all of them; those of an unwritten stub are none.
    `hints`: rungs seen, 0 to 3; `lent`: went on with the lab's own version; `seconds`: up to the first pass, see `Lab work`."""

    exercise: Exercise
    state: str
    tries: int = 0
    hints: int = 0
    lent: bool = False
    seconds: float = 0.0
    solved: datetime | None = None
    repeated: bool = False  # passed once more on a later day
    last: datetime | None = None
    mistakes: tuple[Mistake, ...] = ()

    @property
    def points(self) -> int:
        return self.exercise.points if self.state == "solved" else 0


@dataclass(frozen=True)
class Standing:
    """What became of a prediction. state: "right", "wrong", "late" (the outcome came first), "waiting" (for its run), "open".
    changed: there were answers that do not count."""

    state: str
    sure: float | None = None
    changed: bool = False
    value: object = None
    outcome: object = None


@dataclass(frozen=True)
class Guessed:
    prediction: Prediction
    standing: Standing

    @property
    def surprising(self) -> bool:
        return self.standing.state == "wrong" and self.standing.sure is not None and self.standing.sure >= SURE


@dataclass(frozen=True)
class LabWork:
    """One lab. `seconds`: between records that follow each other within PAUSE, the later of them in this lab: at least so long was worked."""

    lab: Lab
    works: tuple[Work, ...]
    guesses: tuple[Guessed, ...]
    seconds: float = 0.0
    begun: bool = False

    @property
    def points(self) -> int:
        return sum(work.points for work in self.works)

    @property
    def solved(self) -> int:
        return sum(work.state == "solved" for work in self.works)

    @property
    def state(self) -> str:
        """"done" (every exercise solved), "begun" or "new"."""
        return "done" if self.works and self.solved == len(self.works) else "begun" if self.begun else "new"


@dataclass(frozen=True)
class Sitting:
    """Events without a pause of more than SITTING between them. `seconds` counts no pause of more than PAUSE."""

    began: datetime
    seconds: float
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Step:
    """The one thing to do next. `ask`: what; `why`: from the records."""

    ask: str
    why: str
    lab: str = ""


@dataclass(frozen=True)
class History:
    labs: Mapping[str, LabWork]
    sittings: tuple[Sitting, ...]
    elsewhere: tuple[tuple[str, int, bool], ...]  # (exercise that this lab does not have, tries, whether it passed)
    notes: tuple[str, ...]
    count: int  # records that were read

    @property
    def works(self) -> list[Work]:
        return [work for lab in self.labs.values() for work in lab.works]

    @property
    def guesses(self) -> list[Guessed]:
        return [guess for lab in self.labs.values() for guess in lab.guesses]

    @property
    def mistakes(self) -> list[Mistake]:
        return [mistake for work in self.works for mistake in work.mistakes]

    @property
    def seconds(self) -> float:
        return sum(sitting.seconds for sitting in self.sittings)

    @property
    def calibration(self) -> Calibration:
        decided = [guess.standing for guess in self.guesses if guess.standing.state in ("right", "wrong")]
        return Calibration(tuple((s.sure, s.state == "right") for s in decided if s.sure is not None))

    @property
    def next_step(self) -> Step:
        return _next_step(self)


def read_history(records: Iterable[Mapping], labs: Mapping[str, Lab], now: datetime | None = None) -> History:
    """What `records` say about `labs`. Of records with one id the first counts. `now`: what is later is dated in the future."""
    now = now or datetime.now(UTC)
    events, notes, count = _events(records, now)
    by_item: dict[str, list[Event]] = {}
    for event in events:
        item = _text(event.record.get("prediction" if event.kind in ("predict", "reveal") else "exercise"))
        if item:
            by_item.setdefault(item, []).append(event)
    for_lab, for_work = _seconds(events)
    seen = {event.lab for event in events if event.kind in ("check", "hint", "use", "predict", "reveal")}
    found = {}
    for number, lab in labs.items():
        works = tuple(_work(exercise, by_item.get(exercise.id, ()), for_work.get(exercise.id, 0.0)) for exercise in lab.exercises)
        guesses = tuple(Guessed(p, standing(p, [event.record for event in by_item.get(p.id, ())])) for p in lab.predictions)
        found[number] = LabWork(lab, works, guesses, for_lab.get(number, 0.0), number in seen)
    known = {item.id for lab in labs.values() for item in (*lab.exercises, *lab.predictions)}
    gone = [_elsewhere(id, group) for id, group in by_item.items() if id not in known]
    return History(found, _sittings(events), tuple(one for one in gone if one), tuple(notes), count)


# ---------------------------------------------------------------- records and their times


def read_time(text) -> datetime | None:
    """A record's time in UTC; None if it is none, or of no time in which this lab could be used."""
    try:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        return None
    return time if 2020 <= time.year < 2200 else None


def _events(records: Iterable[Mapping], now: datetime) -> tuple[list[Event], list[str], int]:
    """Events, oldest first; of equal times the order of the records decides."""
    by_id: dict[str, Mapping] = {}
    different, newer, timeless, future = 0, 0, 0, 0
    events: list[Event] = []
    for record in records:
        if record["id"] in by_id:
            different += by_id[record["id"]] != record
            continue
        by_id[record["id"]] = record
        version = record.get("version")
        newer += isinstance(version, int) and version > VERSION
        time = read_time(record["time"])
        if time is None:
            timeless += 1
            continue
        future += time > now + timedelta(days=1)
        events.append(Event(time, _lab_of(record), record["kind"], record))
    events.sort(key=lambda event: event.time)
    notes = []
    if different:
        notes.append(f"{_many(different, 'record')} came in two versions that differ; the first counts.")
    if newer:
        notes.append(f"{_many(newer, 'record')} came from a newer version of the lab; what this one does not know of them is left out.")
    if timeless:
        notes.append(f"{_many(timeless, 'record')} had no time that can be read, and {'does' if timeless == 1 else 'do'} not count.")
    if future:
        notes.append(f"{_many(future, 'record')} {'is' if future == 1 else 'are'} dated in the future: a clock was wrong, and times here may be, too.")
    return events, notes, len(by_id)


def _many(count: int, what: str, several: str = "") -> str:
    return f"{count} {what if count == 1 else several or what + 's'}"


def _text(value) -> str:
    return value if isinstance(value, str) else ""


def _lab_of(record: Mapping) -> str:
    item = _text(record.get("exercise")) or _text(record.get("prediction"))
    return item.partition(".")[0] if item else _text(record.get("lab"))


def _seconds(events: Sequence[Event]) -> tuple[Counter, Counter]:
    """(lab -> seconds, exercise -> seconds up to its first pass). The time before a record belongs to what the record is about."""
    for_lab, for_work, passed = Counter(), Counter(), set()
    last_lab = events[0].lab if events else ""
    for before, event in pairwise(events):
        last_lab = event.lab or last_lab or before.lab
        gap = event.time - before.time
        exercise = _text(event.record.get("exercise"))
        if gap <= PAUSE:
            for_lab[last_lab] += gap.total_seconds()
            if exercise and exercise not in passed:
                for_work[exercise] += gap.total_seconds()
        if _passes(event):
            passed.add(exercise)
    return for_lab, for_work


def _sittings(events: Sequence[Event]) -> tuple[Sitting, ...]:
    groups: list[list[Event]] = []
    for event in events:
        if groups and event.time - groups[-1][-1].time <= SITTING:
            groups[-1].append(event)
        else:
            groups.append([event])
    return tuple(
        Sitting(group[0].time, sum(gap.total_seconds() for a, b in pairwise(group) if (gap := b.time - a.time) <= PAUSE), tuple(group)) for group in groups
    )


# ---------------------------------------------------------------- exercises


def _passes(event: Event) -> bool:
    return event.kind == "check" and event.record.get("passed") is True


def _is_try(event: Event) -> bool:
    return event.kind == "check" and event.record.get("status") != "not started"


def _work(exercise: Exercise, events: Sequence[Event], seconds: float) -> Work:
    tries = [event for event in events if _is_try(event)]
    first = next((n for n, event in enumerate(tries) if _passes(event)), None)
    solved = None if first is None else tries[first].time
    rungs = {rung for event in events if event.kind == "hint" and (rung := event.record.get("rung")) in (1, 2, 3) and isinstance(rung, int)}
    return Work(
        exercise=exercise,
        state="solved" if solved else "tried" if tries else "new",
        tries=len(tries) if first is None else first + 1,
        hints=max(rungs, default=0),  # rung 2 shows rung 1 as well
        lent=any(event.kind == "use" and event.record.get("own") is False for event in events),
        seconds=seconds,
        solved=solved,
        repeated=solved is not None and any(_passes(event) and event.time - solved >= timedelta(hours=12) for event in tries),
        last=events[-1].time if events else None,
        mistakes=_mistakes(exercise.id, tries),
    )


def _mistakes(exercise: str, tries: Sequence[Event]) -> tuple[Mistake, ...]:
    """In the order in which they were first named."""
    named: dict[str, list[Event]] = {}
    for event in tries:
        key = _text(event.record.get("diagnosis"))
        if key and not _passes(event):
            named.setdefault(key, []).append(event)
    passes = [event.time for event in tries if _passes(event)]
    found = []
    for key, events in named.items():
        first, last = events[0].time, events[-1].time
        texts = [text for event in events if (text := _text(event.record.get("said")))]
        found.append(Mistake(
            exercise, key, texts[-1] if texts else "", len(events), first, last,
            overcome=next((time for time in passes if time >= last), None),
            returned=any(first <= time < last for time in passes),
        ))  # fmt: skip
    return tuple(found)


def _elsewhere(id: str, events: Sequence[Event]) -> tuple[str, int, bool] | None:
    tries = [event for event in events if _is_try(event)]
    return (id, len(tries), any(map(_passes, tries))) if tries else None


# ---------------------------------------------------------------- predictions


def standing(prediction: Prediction, records: Sequence[Mapping]) -> Standing:
    """Only the answer that stood before the first reveal counts, with the confidence that was stated with it."""
    value, sure, changed = None, None, False
    for record in records:
        if record.get("prediction") != prediction.id:
            continue
        if record["kind"] == "predict":
            changed = changed or value is not None
            value, sure = record.get("value"), read_sure(record.get("sure"))[0]
        elif record["kind"] == "reveal":
            outcome = record.get("outcome")
            if value is None:
                late = any(r["kind"] == "predict" and r.get("prediction") == prediction.id for r in records)
                return Standing("late", changed=late, outcome=outcome)
            return Standing("right" if is_right(prediction, value, outcome) else "wrong", sure, changed, value, outcome)
    return Standing("open") if value is None else Standing("waiting", sure, changed, value)


def is_right(prediction: Prediction, value, outcome) -> bool:
    if prediction.options is not None:
        return value == outcome
    try:
        return abs(value - outcome) <= prediction.tolerance * abs(outcome)
    except (TypeError, OverflowError):  # a record that was edited by hand
        return False


def read_sure(sure) -> tuple:
    """(a share from 0 to 1 or None, None), or (None, what is wrong with it). Numbers above 1 are per cent."""
    if sure is None:
        return None, None
    shown = repr(sure) if isinstance(sure, (str, int, float)) else f"a {type(sure).__name__}"
    if isinstance(sure, str):
        try:
            sure = float(sure.strip().removesuffix("%")) / (100 if sure.strip().endswith("%") else 1)
        except ValueError:
            return None, f"sure={shown} is not a number."
    if isinstance(sure, bool) or not isinstance(sure, numbers.Real) or not 0 <= sure <= 100:
        return None, f"sure={shown}: say how sure you are from 0 to 1, or in per cent."
    return float(sure if sure <= 1 else sure / 100), None


# ---------------------------------------------------------------- what to do next


def _next_step(history: History) -> Step:
    """First what was begun in the core labs, then what was only solved with every hint, then what is new."""
    core = [lab for lab in history.labs.values() if lab.lab.core]
    begun = [lab for lab in core if lab.state == "begun"]
    stuck = [work for lab in begun for work in lab.works if work.state == "tried"]
    if stuck:
        work = max(stuck, key=lambda work: work.last)
        open_mistakes = [m for m in work.mistakes if m.overcome is None]
        why = f"{_many(work.tries, 'try', 'tries')} so far, and not there yet."
        if open_mistakes and (said := open_mistakes[-1].text or spoken(open_mistakes[-1].key)):
            why += f" The last mistake that was named: {said}"
        if work.hints < LAST_RUNG:
            why += f"{'' if why[-1] in '.?!' else '.'} There is another hint: `hint(\"{work.exercise.id}\")`."
        else:
            why += f"{'' if why[-1] in '.?!' else '.'} You have read every hint; what it rests on: {work.exercise.read}."
        return Step(f"Go back to exercise {work.exercise.id}, {work.exercise.title}", why, work.exercise.lab)
    for lab in begun:
        new = [work for work in lab.works if work.state == "new"]
        if new:
            left = "It is" if len(new) == 1 else f"{len(new)} exercises are open; it is"
            return Step(
                f"Try exercise {new[0].exercise.id}, {new[0].exercise.title}",
                f"{left} what is left of lab {lab.lab.label}, about {sum(work.exercise.minutes for work in new)} minutes by the plan.", lab.lab.number,
            )  # fmt: skip
    helped = [work for lab in core for work in lab.works if work.state == "solved" and work.hints == LAST_RUNG and not work.repeated]
    if helped:
        work = helped[0]
        more = f", like {len(helped) - 1} other{'s' * (len(helped) > 2)}" if len(helped) > 1 else ""
        return Step(
            f"Write exercise {work.exercise.id}, {work.exercise.title}, once more on another day, without its hints",
            f"It is solved, with all three hints{more}. What is recalled once without help stays longer.", work.exercise.lab,
        )  # fmt: skip
    fresh = next((lab for lab in core if lab.state == "new"), None)
    if fresh is not None:
        first = "Begin with" if not any(lab.state != "new" for lab in history.labs.values()) else "Go on to"
        why = f"Open `{fresh.lab.name}.ipynb`: {fresh.lab.minutes} minutes. Then you can {fresh.lab.objectives[0]}."
        return Step(f"{first} lab {fresh.lab.label}, {fresh.lab.title}", why, fresh.lab.number)
    elective = next((lab for lab in history.labs.values() if lab.state != "done" and lab.works), None)
    if elective is not None:
        verb = "Finish" if elective.begun else "Choose"
        return Step(
            f"{verb} elective {elective.lab.label}, {elective.lab.title}",
            f"Every core exercise is solved. Then you can {elective.lab.objectives[0]}.", elective.lab.number,
        )  # fmt: skip
    return Step("Adapt a model of your own, and defend r, alpha and the targets with evidence", "Every exercise of the course is solved.")


def spoken(key: str) -> str:
    """A key as words: "division_by_r_missing" -> "division by r missing"."""
    return key.replace("_", " ").strip()
