"""What a student calls in a notebook: check, hint, use, predict, calibration, progress. Each shows one card and leaves one record.

None of them raises because of what a student typed: a traceback of ours would teach nothing.
"""

from __future__ import annotations

import inspect
import math
import numbers
import os
import zlib

import torch

from . import labs as registry
from .cards import Block, Card, show, strip_of_answers
from .exercise import Exercise, Lab, Prediction
from .history import is_right, read_sure, standing
from .records import Calibration, Records, default_paths, merge, open_notebook, read_notebook
from .runner import Examination, examine

_MISSING = object()
_SAID = 500     # characters of a diagnosis that a record keeps
_PAGE = Block("quiet", "`export_progress()`, from lora_lab.course, makes a page of it.")


def student_seed() -> int:
    """The seed of this student's numbers: 0, or one made from the name in LORA_LAB_STUDENT, so that neighbours' numbers differ.

    A hub sets that variable for everybody. The same name gives the same seed on every machine.
    """
    name = os.environ.get("LORA_LAB_STUDENT", "").strip()
    return zlib.crc32(name.encode()) if name else 0


class Verdict:
    """What `check` found: true when passed. Its card is already on the page, so a notebook displays nothing more."""

    def __init__(self, id: str, status: str, failure: str | None = None, diagnosis=None):
        self.id, self.status, self.failure, self.diagnosis = id, status, failure, diagnosis

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def __bool__(self):
        return self.passed

    def __repr__(self):
        key = f", {self.diagnosis.key}" if self.diagnosis else ""
        return f"Verdict({self.id}: {self.status}{key})"

    def _ipython_display_(self):
        pass


class Guess:
    """What `predict` returns. `value`: the letter or number that was predicted, None if nothing was; `sure`: 0 to 1, or None."""

    def __init__(self, prediction: Prediction | None, value, sure: float | None = None):
        self.prediction, self.value, self.sure = prediction, value, sure

    def __repr__(self):
        return f"Guess({self.prediction.id if self.prediction else '?'}: {self.value!r})"

    def _ipython_display_(self):
        pass

    def reveal(self, outcome, text: str = "") -> None:
        """Compare with what the run showed: a letter of the question, or a number."""
        if self.prediction is None:
            show(Card("predict", f"The run says {outcome}", [Block("text", text)] if text else []))
            return
        outcome = _outcome(self.prediction, outcome)
        right = None if self.value is None else is_right(self.prediction, self.value, outcome)
        record = _records().add("reveal", prediction=self.prediction.id, value=self.value, outcome=outcome, right=right)
        said, says = (_with_text(self.prediction, v) for v in (self.value, outcome))
        said += _how_sure(self.sure)
        if right is None:
            title, blocks = f"Prediction {self.prediction.id}: the run says {says}", []
        elif right:
            title = f"Prediction {self.prediction.id}: right"
            blocks = [Block("rows", [("you said", said), ("the run", says)])]
        else:
            title = f"Prediction {self.prediction.id}: the run says otherwise"
            blocks = [Block("rows", [("you said", said), ("the run", says)])]
        if text:
            blocks.append(Block("text", text))
        show(Card("predict", title, blocks), record)


def check(id, student=_MISSING, *more) -> Verdict:
    """Run the cases of an exercise on your object and show what came out.

        check("2.1", lora_forward)

    Give the object itself: no quotes, no parentheses after its name. Returns a Verdict, true when all cases pass.
    """
    exercise = _find(id, "exercise")
    if exercise is None:
        return Verdict(str(id), "unknown")
    trouble = _wrong_argument(exercise, "check", student, more)
    if trouble:
        show(Card("notice", f"Exercise {exercise.id}: this call cannot be checked", [Block("text", trouble)]))
        return Verdict(exercise.id, "wrong call", trouble)
    result = examine(exercise, student, student_seed())
    first = result.first_failure
    record = _records().add(
        "check", exercise=exercise.id, passed=result.passed, status=result.status,
        checks=[result.passed_cases, result.total],
        diagnosis=result.diagnosis.key if result.diagnosis else None,
        **({"said": result.diagnosis.text[:_SAID]} if result.diagnosis else {}),  # the mistake in words, for the learner's own history
        seconds=round(sum(e.answers.seconds for e in result.evidence), 3),
    )
    show(_check_card(result), record)
    return Verdict(exercise.id, result.status, first.failure if first else None, result.diagnosis)


def hint(id) -> None:
    """Show the next of three hints for an exercise. Counted, not punished.

        hint("2.1")
    """
    exercise = _find(id, "exercise")
    if exercise is None:
        return
    before = _count(_all_records(), "hint", exercise.id)
    rung = min(before + 1, len(exercise.hints))
    record = _records().add("hint", exercise=exercise.id, rung=rung)
    blocks = [Block("quiet", f"{n}. {text}") for n, text in enumerate(exercise.hints[: rung - 1], start=1)]
    blocks.append(Block("mark", exercise.hints[rung - 1]))
    if rung < len(exercise.hints):
        blocks.append(Block("quiet", f"Still stuck? Run this cell again for hint {rung + 1}. To read: {exercise.read}"))
    else:
        blocks.append(Block("quiet", f"That was the last one. To read: {exercise.read}. To go on without it: "
                                     f'`{exercise.name} = use("{exercise.id}", {exercise.name})`'))
    show(Card("hint", f"Hint {rung} of {len(exercise.hints)} for exercise {exercise.id}", blocks), record)


def use(id, student=_MISSING):
    """Your version if it passes the check, else the lab's own: what follows in the notebook runs either way.

        lora_forward = use("2.1", lora_forward)
    """
    exercise = _find(id, "exercise")
    if exercise is None:
        return None if student is _MISSING else student
    passed, why = False, ""
    if student is not _MISSING and not _is_lab_own(student):
        why = " (yours: not right yet)"
        if not _wrong_argument(exercise, "use", student, ()):
            result = examine(exercise, student, student_seed())
            passed = result.passed
            if result.status == "not started":
                why = " (yours: not written yet)"
    record = _records().add("use", exercise=exercise.id, own=passed)
    if passed:
        show(Card("passed", f"Exercise {exercise.id}: from here on, your `{exercise.name}`"), record)
        return student
    show(Card("info", f"Exercise {exercise.id}: the lab's own `{exercise.name}`{why}"), record)
    own = exercise.fallback()
    _lab_own.append(own)
    return own


def predict(id, value=..., sure=None) -> Guess:
    """Say what a run will show before it does. With `...` it shows the question.

        p = predict("2.A", "b")            # or a number, where the question asks for one
        p = predict("2.A", "b", sure=0.7)  # and how sure you are, 0 to 1 (or 70, in per cent); `calibration()` comes back to it
        p.reveal("c")                      # further down, after the run
    """
    prediction = _find(id, "prediction")
    if prediction is None:
        return Guess(None, None)
    earlier = [r for r in _all_records() if r.get("prediction") == prediction.id]
    blocks, trouble = _question(prediction), None
    if value is not ...:
        value, trouble = _read_guess(prediction, value)
        if not trouble:
            sure, trouble = read_sure(sure)
    if value is ... or trouble:
        blocks.append(Block("mark", f"{trouble + ' ' if trouble else ''}Put your answer in place of the dots: "
                                    f"{_how_to_answer(prediction)}"))
        title = f"Prediction {prediction.id}" + (": this cannot be noted" if trouble else ": what do you expect?")
        show(Card("notice" if trouble else "predict", title, blocks))
        return Guess(prediction, None)

    revealed = any(r["kind"] == "reveal" for r in earlier)
    last = next((r for r in reversed(earlier) if r["kind"] == "predict"), None)
    if last is not None and last.get("value") == value and last.get("sure") == sure:
        record = last                      # the cell ran again: the same record keeps its place in the output
    else:
        record = _records().add("predict", prediction=prediction.id, value=value, after_reveal=revealed,
                                changed=last is not None, **({} if sure is None else {"sure": sure}))
    blocks.insert(0, Block("strong", f"You say {_with_text(prediction, value)}{_how_sure(sure)}."))
    if record.get("after_reveal"):
        blocks.append(Block("quiet", "The outcome was on the page before this answer: it is noted as a later one."))
    else:
        blocks.append(Block("quiet", "Run on and see. You may change it until then."))
    show(Card("predict", f"Prediction {prediction.id} noted", blocks), record)
    return Guess(prediction, value, sure)


def calibration() -> None:
    """How sure you were of your predictions, in all labs, and how often you were right.

    Of each prediction the last answer before its first outcome counts, if it said how sure: `predict("3.A", "b", sure=0.7)`.
    """
    records = _all_records()
    standings = [standing(prediction, records) for lab in registry.labs().values() for prediction in lab.predictions]
    decided = [s for s in standings if s.state in ("right", "wrong")]
    found = Calibration(tuple((s.sure, s.state == "right") for s in decided if s.sure is not None))
    silent = len(decided) - found.count
    late = sum(s.state == "late" and s.changed for s in standings)
    changed = sum(s.changed for s in decided if s.sure is not None)
    record = _records().add("calibration", count=found.count, right=found.right, without=silent, late=late,
                            sure=round(found.mean_sure, 4) if found.count else None,
                            brier=round(found.brier, 4) if found.count else None)
    show(_calibration_card(found, silent, late, changed), record)


def progress(lab=None, all: bool = False, notebook=None) -> None:
    """Where you stand in this lab: exercises, points, attempts, hints, predictions.

        progress()                     this lab           progress("2b")                       another one
        progress(all=True)             the whole course   progress(notebook="old copy.ipynb")  with what that file records

    It reads the local record and the outputs saved in this notebook, so it survives a container that was thrown away.
    """
    records = _all_records()
    if notebook is not None:
        try:
            records = merge(records, read_notebook(notebook))
        except (OSError, ValueError) as error:
            show(Card("notice", "This notebook cannot be read", [Block("text", str(error))]))
            return
    if lab is not None and str(lab) not in registry.labs():
        show(Card("notice", f"There is no lab {lab!r}",
                  [Block("text", f"There are: {', '.join(registry.labs()) or 'none yet'}")]))
        return
    chosen = registry.labs()[str(lab)] if lab is not None else None if all else _this_lab()
    summaries = [_Summary(one, records) for one in ([chosen] if chosen else registry.labs().values())]
    earned, points = sum(s.earned for s in summaries), sum(s.lab.points for s in summaries)
    record = _records().add("progress", lab=chosen.number if chosen else None, points=[earned, points])
    if chosen:
        show(summaries[0].card(), record)
    else:
        rows = [("lab", "points", "exercises passed", "predictions right"), *(s.row() for s in summaries)]
        show(Card("info", f"The course so far · {earned} of {_points(points)}", [Block("table", rows), _PAGE]), record)


# ---------------------------------------------------------------- cards


def _check_card(result: Examination) -> Card:
    exercise, first = result.exercise, result.first_failure
    head = f"Exercise {exercise.id}"
    if result.status == "passed":
        return Card("passed", f"{head} passed · {result.total} of {_checks(result.total)} here · "
                              f"{_points(exercise.points)}",
                    [Block("quiet", "Grading repeats them on inputs you have not seen.")])
    if result.status == "not started":
        return Card("todo", f"{head}: not started",
                    [Block("text", f"Write `{exercise.name}`, run its cell, then run this check again. "
                                   f'A first nudge: `hint("{exercise.id}")`')])
    error = first.error
    if result.status == "time":
        blocks = [Block("text", f"{error.message[:1].upper()}{error.message[1:]} and was stopped.")]
    else:
        if error is not None and error.kind == "exception":
            found = ("error", f"{error.type}: {error.message}" if error.message else error.type)
        else:
            found = ("found", first.failure)
        blocks = [Block("rows", [("property", first.title), found])]
    if error is not None and error.where is not None:
        where = error.where
        blocks.append(Block("code", f"{where.function}, line {where.line}:   {where.text}"))
    if result.diagnosis is not None:
        blocks.append(Block("mark", result.diagnosis.text, label="Which mistake it is"))
    blocks.append(Block("quiet", f'Next: mend it and run its cell, then this one; or `hint("{exercise.id}")`'))
    count = f"{result.passed_cases} of {_checks(result.total)} pass{'es' * (result.total == 1)}"
    return Card("failed", f"{head}: stopped" if result.status == "time" else f"{head}: not yet · {count}", blocks)


def _calibration_card(found: Calibration, silent: int, late: int, changed: int) -> Card:
    notes = [
        f"{_answers(silent)} did not say how sure, and {'does' if silent == 1 else 'do'} not count here." if silent else "",
        f"{_answers(late)} came after the outcome, and {'does' if late == 1 else 'do'} not count." if late else "",
        f"{_answers(changed)} changed before the outcome: the last one counts." if changed else "",
    ]
    quiet = [Block("quiet", " ".join(note for note in notes if note))] if any(notes) else []
    if not found.count:
        how = "None of your predictions so far says how sure you were. Next time: `predict(\"3.A\", \"b\", sure=0.7)`"
        return Card("predict", "How sure, and how often right: nothing to compare yet", [Block("text", how), *quiet])
    mean, share = found.mean_sure, found.right / found.count
    told = f"On average you were {mean:.0%} sure; {found.right} of {found.count} came true ({share:.0%})."
    if found.verdict == "unclear":
        meaning = "Were your confidence exactly right, a result like this would still be ordinary: it decides nothing yet."
        if found.count >= 20:
            meaning = "Your confidence fits what came true, as far as this many predictions can tell."
    else:
        chance = found.chance_of(0, found.right) if found.verdict == "over" else found.chance_of(found.right, found.count)
        less, word = ("no more", "more") if found.verdict == "over" else ("no fewer", "less")
        meaning = (f"If your confidence were right, {less} than {found.right} of {found.count} would come true in {chance:.1%} of all cases: "
                   f"you seem {word} sure than you should be.")  # fmt: skip
    brier = f"Brier score {found.brier:.2f}, the mean of (sure − outcome)²: 0 is perfect, saying 50 % every time gives 0.25."
    alt = "; ".join(f"{name} sure: {right} of {count} right" for name, count, right in found.groups())
    table = [("you said", "predictions", "came true"), *((name, count, right) for name, count, right in found.groups())]
    blocks = [Block("text", told), Block("picture", strip_of_answers(found.answers, f"Each prediction a dot. {alt}."), label=""),
              Block("text", meaning), Block("table", table), Block("quiet", brier), *quiet]
    return Card("predict", f"How sure, and how often right · {found.count} prediction{'s' * (found.count != 1)}", blocks)


def _answers(count: int) -> str:
    return f"{count} answer{'s' * (count != 1)}"


def _points(count: int) -> str:
    return f"{count} point{'s' * (count != 1)}"


def _checks(count: int) -> str:
    return f"{count} check{'s' * (count != 1)}"


def _question(prediction: Prediction) -> list[Block]:
    blocks = [Block("text", prediction.question)]
    if prediction.options is not None:
        blocks.append(Block("rows", [(letter, text) for letter, text in prediction.options.items()]))
    return blocks


def _how_to_answer(prediction: Prediction) -> str:
    if prediction.options is not None:
        return f'`predict("{prediction.id}", "{next(iter(prediction.options))}")`, with the letter you choose'
    unit = f" ({prediction.unit})" if prediction.unit else ""
    return f'`predict("{prediction.id}", 123)`, with your own number{unit}'


def _with_text(prediction: Prediction, value) -> str:
    if value is None:
        return "nothing"
    if prediction.options is not None:
        return f"{value}: {prediction.options[value]}"
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return f"{number} {prediction.unit}".strip()


class _Summary:
    """What the records say about one lab."""

    def __init__(self, lab: Lab, records: list[dict]):
        self.lab, self.records = lab, records
        passed = [r.get("exercise") for r in records if r["kind"] == "check" and r.get("passed") is True]
        self.passed = {e.id for e in lab.exercises if e.id in passed}  # a record that was edited by hand may hold anything
        self.earned = sum(e.points for e in lab.exercises if e.id in self.passed)

    def predicted(self, prediction: Prediction) -> str:
        return standing(prediction, self.records).state

    def row(self) -> tuple:
        right = sum(self.predicted(p) == "right" for p in self.lab.predictions)
        passed = sum(e.id in self.passed for e in self.lab.exercises)
        return (f"{self.lab.label} · {self.lab.title}", f"{self.earned} / {self.lab.points}",
                f"{passed} / {len(self.lab.exercises)}", f"{right} / {len(self.lab.predictions)}")

    def card(self) -> Card:
        rows = [("exercise", "state", "points", "attempts", "hints")]
        for e in self.lab.exercises:
            attempts = sum(r["kind"] == "check" and r.get("exercise") == e.id and r.get("status") != "not started" for r in self.records)
            state = "✓ passed" if e.id in self.passed else "✗ not yet" if attempts else "○ not tried"
            rows.append((f"{e.id} · {e.title}", state, f"{e.points if e.id in self.passed else 0} / {e.points}",
                         attempts, _count(self.records, "hint", e.id)))
        blocks = [Block("table", rows)] if self.lab.exercises else []
        if self.lab.predictions:
            known = {"right": "✓ right", "wrong": "✗ the run said otherwise", "open": "○ open",
                     "waiting": "◆ noted, not yet revealed", "late": "○ the run came first"}
            blocks.append(Block("table", [("prediction", "outcome"), *(
                (f"{p.id} · {_short(p.question)}", known[self.predicted(p)]) for p in self.lab.predictions)]))
        blocks.append(Block("quiet", "Exercises here are for learning; grading repeats the checks on new inputs."))
        blocks.append(_PAGE)
        return Card("info", f"Lab {self.lab.label} · {self.lab.title} · {self.earned} of {_points(self.lab.points)}", blocks)


def _short(text: str, length: int = 48) -> str:
    return text if len(text) <= length else text[: length - 1].rsplit(" ", 1)[0] + " …"


# ---------------------------------------------------------------- what was typed


def _find(id, what: str) -> Exercise | Prediction | None:
    """The exercise or prediction, or None and a card that says what exists."""
    global _last_lab
    if isinstance(id, float):  # check(2.1, ...): the quotes forgotten, the meaning clear
        id = str(id)
    try:
        found = {"exercise": registry.find_exercise, "prediction": registry.find_prediction}[what](id)
    except KeyError as error:
        typed = id if isinstance(id, (str, int, float)) else type(id).__name__
        told = error.args[0] if isinstance(id, (str, int, float)) else "its number comes first, in quotes"
        show(Card("notice", f"No {what} {typed!r}", [Block("text", f"{told[:1].upper()}{told[1:]}.{_example(what)}")]))
        return None
    _last_lab = found.lab
    return found


def _example(what: str) -> str:
    for lab in registry.labs().values():
        for item in lab.exercises if what == "exercise" else lab.predictions:
            return " For example: " + (f'`check("{item.id}", {item.name})`' if what == "exercise" else _how_to_answer(item))
    return ""


def _wrong_argument(exercise: Exercise, call: str, student, more) -> str | None:
    """What is wrong with how the object was handed over, or None."""
    name, how = exercise.name, f'`{call}("{exercise.id}", {exercise.name})`'
    if student is _MISSING:
        return f"Say what is to be checked: {how}."
    if more:
        return f"One object after the number is enough: {how}, without its arguments."
    if student is ...:
        return f"Put your own object in place of the dots: {how}."
    if isinstance(student, str):
        return f"That is a text. Give `{name}` itself, without quotes: {how}."
    expected = exercise.fallback()
    if not callable(expected):
        return None
    if student is None:
        return (f"That is None: a call that returned nothing, or a name that was never given a value. "
                f"Give `{name}` itself, without parentheses: {how}.")
    if not callable(student):
        kind = "tensor" if isinstance(student, torch.Tensor) else type(student).__name__
        return (f"That is the result of a call (a {kind}). Give `{name}` itself, without parentheses and arguments: "
                f"{how}. The check calls it with inputs of its own.")
    if inspect.isclass(expected) and isinstance(student, torch.nn.Module):
        return f"That is one object of the class {type(student).__name__}. Give the class itself: {how}."
    if call == "check" and _is_lab_own(student):
        return f"That is the lab's own `{name}`, from `use`. Run the cell with yours first, then this check."
    return None


def _read_guess(prediction: Prediction, value) -> tuple:
    """(value, None), or (None, what is wrong with it)."""
    if prediction.options is not None:
        letter = value.strip().lower() if isinstance(value, str) else None
        if letter in prediction.options:
            return letter, None
        return None, f"{_repr(value)} is none of {', '.join(prediction.options)}."
    if isinstance(value, str):
        try:
            value = float(value.replace(",", "").replace("_", ""))
        except ValueError:
            return None, f"{_repr(value)} is not a number."
    if isinstance(value, (torch.Tensor,)) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        return None, f"{_repr(value)} is not a number."
    return (int(value) if float(value).is_integer() else float(value)), None


def _how_sure(sure: float | None) -> str:
    return "" if sure is None else f" ({sure:.0%} sure)"


def _repr(value) -> str:
    return repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def _outcome(prediction: Prediction, outcome):
    """The lab's own word on what the run showed: a mistake here is the lab's, so it raises."""
    value, trouble = _read_guess(prediction, outcome)
    if trouble:
        raise ValueError(f"prediction {prediction.id}: reveal was given an outcome that cannot be: {trouble}")
    return value


# ---------------------------------------------------------------- records


_store: Records | None = None
_store_paths: list | None = None
_last_lab: str | None = None
_lab_own: list = []       # what `use` has handed out, so that a check can tell it from the student's


def _records() -> Records:
    global _store, _store_paths
    paths = default_paths()
    if _store is None or paths != _store_paths:
        _store, _store_paths = Records(paths, notice=_notice), paths
    return _store


def _notice(text: str) -> None:
    show(Card("notice", "A word about your progress", [Block("text", text)]))


def _all_records() -> list[dict]:
    """The local record, and what the open notebook's saved outputs hold."""
    records = _records().read()
    notebook = open_notebook()
    if notebook is not None:
        try:
            records = merge(records, read_notebook(notebook))
        except (OSError, ValueError):      # just being written, perhaps
            pass
    return records


def _count(records: list[dict], kind: str, id: str) -> int:
    return sum(r["kind"] == kind and r.get("exercise") == id for r in records)


def _is_lab_own(student) -> bool:
    return any(student is own for own in _lab_own)


def _this_lab() -> Lab | None:
    """The lab of the last call in this session, else the one the notebook is named after, else none."""
    if _last_lab in registry.labs():
        return registry.labs()[_last_lab]
    notebook = open_notebook()
    return next((lab for lab in registry.labs().values() if notebook is not None and notebook.stem == lab.name), None)
