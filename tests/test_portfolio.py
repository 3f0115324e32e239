"""The page of a learner's progress: what it counts, where records come from, what it must never hold, and that it can be read by anybody.

Expectations are counted by hand on short lists, or by plain loops over the raw records below; never by the code under test.
"""

import ast
import csv
import io
import itertools
import json
import os
import random
import re
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser_tools import contrasts, find_chromium
from typer.testing import CliRunner

from lora_lab import __main__ as cli
from lora_lab.course import cards, check, checks, export_progress, hint, predict, progress
from lora_lab.course import labs as registry
from lora_lab.course.exercise import Case, Diagnosis, Exercise, Lab, Prediction, compare
from lora_lab.course.history import read_history
from lora_lab.course.portfolio import LONGEST_LINK, MARK, PortfolioError, clean, gather, plain, render, write
from lora_lab.course.records import MIME, VERSION, Calibration, merge
from lora_lab.course.script import Script

NOON = datetime(2026, 11, 3, 12, 0, tzinfo=UTC)
LATER = NOON + timedelta(days=300)  # "now" in these tests


def probe(rng):
    s = Script()
    s.send("mean", s.call(s.input("x", rng.normal(size=(7, 11)))))
    return s


def diagnose(evidence):
    if compare(evidence[0].answers.get("mean"), evidence[0].inputs["x"].sum(0)) is None:
        return Diagnosis("no_division", "you add the rows and do not divide by `n`")


def make_exercise(id, points=2):
    case = Case("the mean", probe, lambda inputs, answers: compare(answers["mean"], inputs["x"].mean(0), what="row_mean(x)"))
    hints = ("What shape?", "mean takes a dim", "return x.mean(0)")
    return Exercise(id=id, title=f"Title of {id}", difficulty=1, minutes=4, points=points, name="row_mean", cases=(case,), diagnose=diagnose, hints=hints,
                    read="Section 1", fallback=lambda: lambda x: x.mean(0))  # fmt: skip


def make_lab(number, exercises, predictions=(), core=True):
    exercises = tuple(make_exercise(f"{number}.{n + 1}", points) for n, points in enumerate(exercises))
    return Lab(number=number, name=f"{number.zfill(2)}_lab", title=f"Lab {number}", minutes=30, core=core, objectives=(f"do {number}",), needs=(),
               exercises=exercises, predictions=tuple(predictions))  # fmt: skip


LABS = {
    "0": make_lab("0", (1,), (Prediction("0.A", "Which is larger?", {"a": "the mean", "b": "the sum"}),)),
    "2": make_lab("2", (2, 3, 4), (Prediction("2.A", "How many numbers?", unit="numbers"), Prediction("2.B", "Which?", {"a": "one", "b": "two"}))),
    "2b": make_lab("2b", (5,), core=False),
    "3": make_lab("3", (6, 7)),
}
_ids = itertools.count()


def at(minutes, kind, **fields):
    """A record so many minutes after noon."""
    stamp = (NOON + timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {"version": 1, "id": f"id{next(_ids)}", "time": stamp, "kind": kind, **fields}


def tried(minutes, exercise, passed=False, key=None, **more):
    return at(minutes, "check", exercise=exercise, passed=passed, status="passed" if passed else "failed", diagnosis=key, **more)


def history_of(records):
    return read_history(records, LABS, now=LATER)


def html_of(records, notes=(), name=None, made=LATER):
    return render(history_of(records), "p.html", records=records, notes=notes, name=name, made=made)


@pytest.fixture
def course(monkeypatch, tmp_path):
    """The four labs above, and an empty record."""
    monkeypatch.setattr(registry, "labs", lambda: LABS)
    monkeypatch.setenv("LORA_LAB_RECORDS", str(tmp_path / "records.jsonl"))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    for name, value in {"_store": None, "_last_lab": None, "_lab_own": []}.items():
        monkeypatch.setattr(checks, name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------ what it counts, by hand

MORNING = [
    at(0, "progress", lab="0", points=[0, 1]),
    tried(2, "0.1", passed=True),  # 2 min
    at(5, "predict", prediction="2.A", value=76, sure=0.9, after_reveal=False, changed=False),  # 3 min, lab 2
    at(6, "reveal", prediction="2.A", value=76, outcome=77),  # within 5 %: right
    at(7, "check", exercise="2.1", passed=False, status="not started", diagnosis=None),  # no try; 1 min
    tried(10, "2.1", key="no_division", said="you add the rows"),  # 3 min
    at(11, "hint", exercise="2.1", rung=1),
    tried(30, "2.1", key="no_division", said="you add all rows"),  # 19 min: a pause, no work
    at(31, "hint", exercise="2.1", rung=2),
    at(31.5, "hint", exercise="2.1", rung=1),  # on another machine, the ladder began anew
    tried(33, "2.1", passed=True),  # third try; 1+3+1+1+.5+1.5 = 8 min
    at(34, "hint", exercise="2.2", rung=1),
    tried(36, "2.2", key="no_return"),
    at(37, "use", exercise="2.2", own=False),
    at(38, "predict", prediction="2.B", value="a", sure=85, after_reveal=False, changed=False),
    at(39, "reveal", prediction="2.B", value="a", outcome="b"),
    tried(39 + 120, "2.1", key="no_division"),  # another sitting: it came back, and is not overcome again
]


def test_a_morning_by_hand():
    history = history_of(MORNING)
    lab = history.labs["2"]
    first, second, third = lab.works
    assert (first.state, first.tries, first.hints, first.lent, first.seconds) == ("solved", 3, 2, False, 8 * 60)
    assert first.solved == NOON + timedelta(minutes=33) and not first.repeated
    assert (second.state, second.tries, second.hints, second.lent, second.seconds) == ("tried", 1, 1, True, 4 * 60)
    assert (third.state, third.tries, third.last) == ("new", 0, None)
    assert (lab.points, lab.solved, lab.state) == (2, 1, "begun") and history.labs["0"].state == "done"
    assert history.labs["2b"].state == history.labs["3"].state == "new"

    (named,) = first.mistakes
    assert (named.key, named.text, named.count, named.returned, named.overcome) == ("no_division", "you add all rows", 3, True, None)
    assert (named.first, named.last) == (NOON + timedelta(minutes=10), NOON + timedelta(minutes=159))
    assert [m.key for m in history.mistakes] == ["no_division", "no_return"]

    assert [(g.prediction.id, g.standing.state, g.standing.sure) for g in history.guesses] == [
        ("0.A", "open", None), ("2.A", "right", 0.9), ("2.B", "wrong", 0.85)]
    assert [g.prediction.id for g in history.guesses if g.surprising] == ["2.B"]
    assert history.calibration.brier == pytest.approx((0.1**2 + 0.85**2) / 2)

    # Gaps of at most 15 minutes: 2+3+1+1+3+1+(19 is none)+1+.5+1.5+1+2+1+1+1.
    assert history.seconds == 60 * 20 and [s.seconds for s in history.sittings] == [60 * 20, 0]
    assert history.labs["0"].seconds == 2 * 60 and lab.seconds == 18 * 60
    assert history.count == len(MORNING) and history.notes == ()


def test_a_mistake_is_overcome_by_the_next_pass():
    one = history_of([tried(0, "2.1", key="a"), tried(1, "2.1", key="b"), tried(4, "2.1", passed=True),
                      tried(9, "2.1", key="b"), tried(11, "2.1", passed=True)])  # fmt: skip
    a, b = one.labs["2"].works[0].mistakes
    assert (a.overcome, a.returned) == (NOON + timedelta(minutes=4), False)
    assert (b.overcome, b.returned, b.count) == (NOON + timedelta(minutes=11), True, 2)
    assert one.labs["2"].works[0].tries == 3  # what comes after the first pass is no try more, and no time of the exercise
    assert one.labs["2"].works[0].seconds == 4 * 60 and one.labs["2"].seconds == 11 * 60
    strips = [a["aria-label"] for _, a in Page(html_of([tried(0, "2.1", passed=True), tried(1, "2.1", passed=True)])).elements if a.get("class") == "strip"]
    assert strips == ["Lab 02: exercises solved: 1"]


def test_a_prediction_after_the_outcome_does_not_count():
    told = {"prediction": "2.B", "outcome": "a"}
    late = history_of([at(0, "reveal", **told), at(1, "predict", prediction="2.B", value="a", sure=1.0)])
    assert late.guesses[2].standing.state == "late" and late.calibration.count == 0
    changed = history_of([at(0, "predict", prediction="2.B", value="b", sure=1.0), at(1, "predict", prediction="2.B", value="a", sure=0.5),
                          at(2, "reveal", **told), at(3, "predict", prediction="2.B", value="b", sure=1.0)])  # fmt: skip
    assert changed.calibration.answers == ((0.5, True),)


@pytest.mark.parametrize(("records", "lab", "ask"), [
    ([], "0", "Begin with lab 00"),
    ([tried(0, "0.1", passed=True)], "2", "Go on to lab 02"),
    ([tried(0, "0.1")], "0", "Go back to exercise 0.1"),
    ([tried(0, "0.1"), tried(1, "2.2")], "2", "Go back to exercise 2.2"),  # the last one that was tried
    ([tried(0, "2.1", passed=True)], "2", "Try exercise 2.2"),
    ([at(0, "hint", exercise="0.1", rung=3), tried(1, "0.1", passed=True)], "0", "Write exercise 0.1, Title of 0.1, once more"),
    ([at(0, "hint", exercise="0.1", rung=3), tried(1, "0.1", passed=True), tried(1500, "0.1", passed=True)], "2", "Go on to lab 02"),
    ([at(0, "hint", exercise="0.1", rung=2), tried(1, "0.1", passed=True)], "2", "Go on to lab 02"),
    ([tried(0, "2b.1")], "0", "lab 00"),  # an elective does not keep anybody
    ([tried(n, e.id, passed=True) for n, lab in enumerate(LABS.values()) for e in lab.exercises if lab.core], "2b", "Choose elective 2b"),
    ([tried(n, e.id, passed=True) for n, lab in enumerate(LABS.values()) for e in lab.exercises], "", "Adapt a model of your own"),
])  # fmt: skip
def test_the_one_thing_to_do_next(records, lab, ask):
    step = history_of(records).next_step
    assert step.lab == lab and ask.replace("2b", LABS["2b"].label) in step.ask, step


def test_the_next_step_says_what_is_known():
    step = history_of([tried(0, "2.1", key="no_division", said="you add the rows"), at(1, "hint", exercise="2.1", rung=1)]).next_step
    assert "1 try so far" in step.why and "you add the rows. There is another hint: `hint(\"2.1\")`" in step.why
    step = history_of([tried(0, "2.1"), tried(1, "2.1"), at(2, "hint", exercise="2.1", rung=3)]).next_step
    assert "2 tries" in step.why and "every hint" in step.why and "Section 1" in step.why


# ------------------------------------------------------------ the same by plain loops, on random histories


def a_random_history(seed, length=200):
    rng, minute, found = random.Random(seed), 0.0, []
    exercises = [e.id for lab in LABS.values() for e in lab.exercises]
    for _ in range(length):
        minute += rng.choice((0.2, 1, 4, 14, 16, 200))
        kind = rng.choice(("check", "check", "hint", "predict", "reveal", "use", "progress"))
        if kind == "check":
            found.append(tried(minute, rng.choice(exercises), passed=rng.random() < 0.1, key=rng.choice((None, "a", "b"))))
        elif kind in ("hint", "use"):
            found.append(at(minute, kind, exercise=rng.choice(exercises), rung=rng.choice((1, 2, 3)), own=rng.random() < 0.5))
        elif kind == "predict":
            found.append(at(minute, kind, prediction=rng.choice(("0.A", "2.B")), value=rng.choice("ab"), sure=rng.choice((None, 0.5, 0.9, 1.0))))
        elif kind == "reveal" and rng.random() < 0.1:
            found.append(at(minute, kind, prediction=rng.choice(("0.A", "2.B")), outcome=rng.choice("ab")))
        else:
            found.append(at(minute, "progress", lab="2"))
    return found


def by_plain_loops(records):
    """What one would count with pencil and paper: records lie in order here."""
    minutes, tries, solved, mistakes, answers = 0.0, Counter(), {}, Counter(), []
    times = [datetime.fromisoformat(r["time"]) for r in records]
    for before, after in zip(times, times[1:], strict=False):
        gap = (after - before).total_seconds() / 60
        minutes += gap if gap <= 15 else 0
    said, decided = {}, set()
    for r in records:
        if r["kind"] == "check":
            if r["exercise"] not in solved:
                tries[r["exercise"]] += 1
            if r["passed"]:
                solved.setdefault(r["exercise"], r["time"])
            elif r["diagnosis"]:
                mistakes[r["exercise"], r["diagnosis"]] += 1
        elif r["kind"] == "predict":
            said[r["prediction"]] = r["value"], r["sure"]
        elif r["kind"] == "reveal" and r["prediction"] not in decided:
            decided.add(r["prediction"])
            value, sure = said.get(r["prediction"], (None, None))
            if value is not None and sure is not None:
                answers.append((sure, value == r["outcome"]))
    brier = sum((sure - right) ** 2 for sure, right in answers) / len(answers) if answers else None
    return minutes, dict(tries), set(solved), dict(mistakes), brier


@pytest.mark.parametrize("seed", range(12))
def test_it_counts_what_plain_loops_count(seed):
    records = a_random_history(seed)
    minutes, tries, solved, mistakes, brier = by_plain_loops(records)
    history = history_of(random.Random(seed).sample(records, len(records)))  # in any order
    assert history.seconds == pytest.approx(60 * minutes)
    assert sum(lab.seconds for lab in history.labs.values()) == pytest.approx(60 * minutes)  # every minute belongs to one lab
    assert {w.exercise.id: w.tries for w in history.works if w.tries} == tries
    assert {w.exercise.id for w in history.works if w.state == "solved"} == solved
    assert {(m.exercise, m.key): m.count for m in history.mistakes} == mistakes
    assert (history.calibration.brier if history.calibration.count else None) == (None if brier is None else pytest.approx(brier))
    assert sum(lab.points for lab in history.labs.values()) == sum(e.points for lab in LABS.values() for e in lab.exercises if e.id in solved)


@pytest.mark.parametrize("sures", [(0.7,), (0.5, 0.9, 0.65, 1.0), (0.9,) * 8, (0.0, 1.0), (0.55, 0.6, 0.7, 0.8, 0.8, 0.95)])
def test_what_would_be_ordinary(sures):
    """All outcomes one by one: outside of the range lie at most 5 % on each side, and one step further in it would be more."""
    chances = Counter()
    for outcome in itertools.product((0, 1), repeat=len(sures)):
        chance = 1.0
        for p, right in zip(sures, outcome, strict=True):
            chance *= p if right else 1 - p
        chances[sum(outcome)] += chance
    fewest, most = Calibration(tuple((p, True) for p in sures)).ordinary()
    below, above = (sum(chances[k] for k in range(len(sures) + 1) if outside(k)) for outside in (lambda k: k < fewest, lambda k: k > most))
    assert below <= 0.05 < below + chances[fewest] and above <= 0.05 < above + chances[most]


def test_it_agrees_with_the_card(course, capsys):
    for answer in (lambda x: x.sum(0), lambda x: x.mean(0)):
        check("2.1", answer)
    hint("2.2")
    predict("0.A", "b", sure=0.7).reveal("b")
    progress(all=True)
    card = capsys.readouterr().out
    history = read_history(checks._all_records(), LABS)
    assert "The course so far · 2 of 28 points" in card and sum(lab.points for lab in history.labs.values()) == 2
    assert "02 · Lab 2" in card and "2 / 9" in card and (history.labs["2"].points, history.labs["2"].lab.points) == (2, 9)
    assert history.labs["2"].works[0].mistakes[0].text == "you add the rows and do not divide by `n`"  # a check records the sentence
    progress("2")
    assert "export_progress()" in card and "export_progress()" in capsys.readouterr().out


# ------------------------------------------------------------ where records come from


def lines(records):
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


def a_notebook(records):
    outputs = [{"output_type": "display_data", "metadata": {}, "data": {MIME: r}} for r in records]
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": "", "execution_count": None, "outputs": outputs}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def test_records_of_several_places_come_together(tmp_path):
    """A notebook from Binder, the record of a laptop, an export from Colab: overlapping, in any order, once each."""
    records = a_random_history(3)
    folder = tmp_path / "course"
    (folder / ".lora-lab").mkdir(parents=True)
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "02_lab.ipynb").write_text(a_notebook(records[60:140]))
    (folder / ".ipynb_checkpoints" / "02_lab-checkpoint.ipynb").write_text("{")  # not looked at
    (folder / ".lora-lab" / "records.jsonl").write_bytes(lines(records[:80]))
    (folder / "other.json").write_text('{"some": "file"}')  # not ours, and left alone
    colab = folder / "from-colab.json"
    colab.write_text(render(history_of(records[120:]), colab, records=records[120:]))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    found = gather([folder])
    assert len(found.read) == 3 and not found.troubles and not found.notes
    merged = read_history(found.records, LABS, now=LATER)
    assert plain(merged, made=NOON) == plain(history_of(records), made=NOON) and merged.count == len(records)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before  # reading changes nothing
    again = gather([colab, folder, folder / "02_lab.ipynb"])  # named twice, found twice
    assert plain(read_history(again.records, LABS, now=LATER), made=NOON) == plain(merged, made=NOON) and len(again.read) == 3


def test_what_is_wrong_with_records_is_said(tmp_path):
    good = a_random_history(1, 6)
    path = tmp_path / "records.jsonl"
    path.write_bytes(lines(good[:3]) + b'{"broken\n[1]\n\n' + lines(good[3:]) + b'{"version": 1, "id": "torn", "ti')
    found = gather([path])
    assert found.records == good and found.notes == ["3 damaged lines of the records could not be read and do not count."]
    assert found.troubles == [f"{path}: 3 damaged lines left out"]

    newer = at(0, "check", exercise="2.1", passed=True) | {"version": VERSION + 1, "dream": [1]}
    timeless = at(0, "check", exercise="2.2", passed=True) | {"time": "yesterday"}
    future = at(60 * 24 * 400, "check", exercise="3.1", passed=True)
    twice = at(0, "check", exercise="3.2", passed=False)
    history = history_of([newer, timeless, future, twice, twice, twice | {"passed": True}, at(0, "dream", exercise="3.2")])
    told = " ".join(history.notes)
    assert history.labs["2"].works[0].state == "solved" and history.labs["2"].works[1].state == "new" and history.labs["3"].works[1].state == "tried"
    for word in ("1 record came from a newer version", "1 record had no time", "1 record is dated in the future", "1 record came in two versions"):
        assert word in told
    assert all(note.replace("’", "'") in html_of([newer, timeless, future, twice, twice | {"passed": True}]).replace("&#x27;", "'") for note in history.notes)


def test_notebooks_of_several_people_are_asked_about(tmp_path):
    for n, student in enumerate(("ada", "bob", "cleo")):
        (tmp_path / student).mkdir()
        (tmp_path / student / "02_lab.ipynb").write_text(a_notebook([tried(n, "2.1")]))
        told = gather([tmp_path]).troubles
        assert told == ([] if n < 2 else ["02_lab.ipynb was found in 3 folders: if they are several people's, this page mixes them"])


def test_a_clock_that_was_set_back(tmp_path):
    back = [tried(0, "2.1"), tried(5, "2.1"), tried(-55, "2.1"), tried(-54, "2.1", passed=True)]
    (tmp_path / "records.jsonl").write_bytes(lines(back))
    assert gather([tmp_path / "records.jsonl"]).notes == ["A clock was set back 1 time between records: order and times may be wrong there."]
    (tmp_path / "n.ipynb").write_text(a_notebook(back))  # outputs stand in the order of cells: that says nothing about a clock
    assert gather([tmp_path / "n.ipynb"]).notes == []


def test_times_of_other_zones_are_the_same_moment():
    here = tried(0, "2.1") | {"time": "2026-11-03T13:00:00+01:00"}
    there = tried(5, "2.1", passed=True) | {"time": "2026-11-03T07:05:00-05:00"}
    history = history_of([there, here])
    assert history.seconds == 300 and history.labs["2"].works[0].tries == 2


def test_exercises_that_are_no_more():
    records = [tried(0, "9.9", passed=True), tried(1, "2.7"), tried(2, "2.7"), at(3, "predict", prediction="9.A", value="a")]
    history = history_of(records)
    assert sorted(history.elsewhere) == [("2.7", 2, False), ("9.9", 1, True)]
    assert sum(lab.points for lab in history.labs.values()) == 0
    assert "9.9 (passed, 1 try)" in html_of(records) and "2.7 (not passed, 2 tries)" in html_of(records)


@pytest.mark.parametrize(("name", "content", "said"), [
    ("notes.txt", "", "none of .ipynb, .jsonl, .json"), ("a.ipynb", "{", "expected a notebook"), ("a.ipynb", "[" * 100_000, "cannot be read"),
    ("a.json", '{"records": []}', "no .json that export_progress wrote"), ("a.json", f'{{"what": "{MARK}", "records": 3}}', "cannot be read"),
    ("missing.ipynb", None, "No such file"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(PortfolioError, match=said) as error:
        gather([tmp_path / name])
    assert name in str(error.value) and "Give a notebook" in str(error.value)
    if content and name.endswith("ipynb"):  # the same file, come upon in a folder, keeps nobody from their page
        found = gather([tmp_path])
        assert found.records == [] and len(found.troubles) == 1 and found.notes == ["1 file could not be read."]


# ------------------------------------------------------------ the file


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)> \ud800\x00 `<b>` | = ' + "x" * 5000


def evil_records():
    good = dict(exercise="2.1", passed=False, status="failed", diagnosis="key", said="said")
    yield tried(0, "2.1", key=EVIL, said=EVIL)
    yield tried(0.5, EVIL, key=EVIL)
    yield at(1, "predict", prediction="2.B", value=EVIL, sure=0.9)
    yield at(2, "reveal", prediction="2.B", outcome=EVIL + "!")
    yield at(1, "predict", prediction="2.A", value=10**4000, sure=0.95)
    yield at(2, "reveal", prediction="2.A", outcome=float("nan"))
    yield at(3, EVIL, exercise=EVIL) | {"version": EVIL}
    yield at(4, "progress", lab=EVIL)
    for n, junk in enumerate(([1], {"a": 1}, None, True, 10**400, -1.5, float("inf"), "", "=1+1", [[[]]])):
        for field in good:
            yield at(5 + n, "check", **good | {field: junk})
        yield at(6 + n, "hint", exercise="2.2", rung=junk)
        yield at(6 + n, "use", exercise="2.2", own=junk)
        yield at(7 + n, "predict", prediction="0.A", value=junk, sure=junk) | {"version": junk}
        yield at(8 + n, "reveal", prediction="0.A", outcome=junk)
        yield at(8 + n, "check", **good) | {"time": str(junk), "id": EVIL + str(n)}
        yield at(9 + n, "check", **good | {"exercise": junk, "passed": True})
    for moment in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2026-11-03", "2026-11-03T12:00:00+23:59"):
        yield at(0, "check", **good) | {"time": moment}


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Pacific/Auckland"])
def test_nothing_in_a_record_becomes_part_of_the_page(zone, monkeypatch):
    if not hasattr(time, "tzset"):
        pytest.skip("this system has no time zone of a process")
    monkeypatch.setenv("TZ", zone)  # the year 1 is no date in New York, and 9999 none in Auckland
    time.tzset()
    try:
        nothing_of_records_in_the_page(list(evil_records()))
    finally:
        monkeypatch.undo()
        time.tzset()


def nothing_of_records_in_the_page(records):
    page = Page(html_of(records, name=EVIL))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "form", "input", "base"} and "alert(1)" in page.text
    assert tags <= {tag for tag, _ in Page(html_of(MORNING)).elements} | {"code"}
    assert not any(name.startswith("on") or name in ("src", "action", "formaction") for _, attributes in page.elements for name in attributes)
    assert all(attributes["href"].startswith("#") for _, attributes in page.elements if "href" in attributes)
    for ending in (".html", ".md", ".csv", ".json"):
        text = render(history_of(records), "p" + ending, records=records, name=EVIL)
        text.encode()  # a lone surrogate could not be written
        if ending == ".json":
            assert json.loads(text, parse_constant=pytest.fail)["what"] == MARK  # JSON knows no NaN
        assert "\x00" not in text
        if ending in (".html", ".md"):
            assert not re.search(r"<script|<img", text)


def test_a_spreadsheet_gets_no_formulas():
    records = [tried(0, "2.1", key="=cmd|' /C calc'!A0", said="@SUM(A1)"), at(1, "predict", prediction="2.B", value="-2+3", sure=0.5)]
    rows = list(csv.reader(io.StringIO(render(history_of(records), "p.csv"))))
    assert any("SUM" in cell for row in rows for cell in row)
    assert not [cell for row in rows for cell in row if cell[:1] in "=+-@" and cell]


def test_the_page_says_what_was_done():
    page = Page(html_of(MORNING, name="Ada")).text
    for words in (
        "Ada’s way through LoRA Lab", "3 of 23", "20 min", "Go back to exercise 2.2", "✓ solved at the third try, with 2 hints; 8 min; 1 mistake named",
        "tried once, with 1 hint, not solved; went on with the lab’s own version; 4 min", "you add all rows", "still open , named 3 times",
        "it had been overcome before",
        "1 of 2 predictions came true", "85\N{NO-BREAK SPACE}% sure of a: one ; the run said b: two", "0.37", "It is no proof", "no code",
        "03 Lab 3",
    ):  # fmt: skip
        assert " ".join(words.split()) in page, words
    assert "2 of" in page and "Not begun" in page and page.count("Title of 2.1") >= 2


def test_no_record_and_one_record():
    nothing = Page(html_of([]))
    assert "Begin with lab 00" in nothing.text and "Nothing is recorded yet" in nothing.text and "0 / 1" in nothing.text
    assert "Brier" not in nothing.text and "nan" not in nothing.text.lower().split()
    for one in (*a_random_history(5, 40), at(0, "reveal", prediction="0.A", value=None, outcome="a")):
        text = Page(html_of([one])).text
        assert "after the outcome" not in text
        assert "Made by LoRA Lab from 1 record." in text and "nan" not in text.lower().split()


@pytest.mark.parametrize("records", [[], MORNING, a_random_history(2), a_random_history(7, 2000)], ids=["none", "morning", "random", "long"])
def test_it_can_be_read_by_anybody(records):
    text = html_of(records)
    page = Page(text)
    assert text.startswith("<!doctype html>") and ("html", {"lang": "en"}) in page.elements and "viewport" in text and "prefers-color-scheme: dark" in text
    assert "@page { size: A4" in text and len(text) < 300_000
    assert not re.search(r"https?://|//\w|url\(|@import|<script", text)  # nothing of a network, no script
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes[name][1:] for _, attributes in page.elements for name in ("href", "aria-labelledby") if attributes.get(name, "").startswith("#")]
    assert set(links) <= set(ids)
    assert {attributes["aria-labelledby"] for tag, attributes in page.elements if tag == "section"} <= set(ids) | {"labs"}
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")
    # Cells and marks lie in a strip that has a label.
    outer = [a for tag, a in page.elements if tag == "svg" and (a.get("class") or "").split(" ")[0] not in ("cell", "mark")]
    assert all(a.get("aria-hidden") == "true" or a.get("role") == "img" and a["aria-label"] for a in outer)
    strips = [a for _, a in page.elements if a.get("class") in ("strip", "cells")]
    assert all(a["role"] == "img" and a["aria-label"] for a in strips)


def test_a_long_sitting_stays_short():
    page = Page(html_of([tried(n, "2.1") for n in range(500)]))
    marks = [a for tag, a in page.elements if tag == "svg" and (a.get("class") or "").startswith("mark") and "aria-hidden" not in a]
    assert len(marks) == 60 and "and 440 more" in page.text
    assert [a["aria-label"] for _, a in page.elements if a.get("class") == "strip"] == ["Lab 02: tries that did not pass: 500"]


def test_it_holds_no_path_and_no_name(course, monkeypatch, capsys):
    folder = course / "ada-lovelace" / "thesis"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    (folder / "ada_copy.ipynb").write_text(a_notebook(MORNING) + " ")
    (folder / "broken.ipynb").write_text("{")
    check("2.1", lambda secret_variable: secret_variable.sum(0))
    for ending in ("html", "json", "md", "csv"):
        export_progress(f"out.{ending}", folder)
        text = (folder / f"out.{ending}").read_text()
        for secret in ("lovelace", "ada", "ada_copy", "thesis", "secret_variable", str(course), os.environ.get("USER") or "\0"):
            assert not re.search(rf"\b{re.escape(secret)}\b", text, re.I), (ending, secret)
    export_progress("out.html", name="Ada <3 L.")
    assert "Ada &lt;3 L.’s way" in (folder / "out.html").read_text()
    assert "broken.ipynb" in capsys.readouterr().out  # whoever exports is told


def test_the_formats_say_the_same(tmp_path):
    records = a_random_history(11)
    history = history_of(records)
    data = json.loads(render(history, "p.json", records=records, made=LATER))
    rows = list(csv.DictReader(io.StringIO(render(history, "p.csv"))))
    document = render(history, "p.md")
    minutes, tries, solved, mistakes, brier = by_plain_loops(records)
    exercises = {e["id"]: e for lab in data["labs"] for e in lab["exercises"]}
    assert {id for id, e in exercises.items() if e["state"] == "solved"} == solved == {r["id"] for r in rows if (r[MARK], r["state"]) == ("exercise", "solved")}
    assert {id: e["tries"] for id, e in exercises.items() if e["tries"]} == tries == {
        r["id"]: int(r["tries"]) for r in rows if r[MARK] == "exercise" and r["tries"] != "0"}
    assert {(e["id"], m["key"]): m["count"] for e in exercises.values() for m in e["mistakes"]} == mistakes
    assert len([r for r in rows if r[MARK] == "mistake"]) == len(mistakes) and len([r for r in rows if r[MARK] == "prediction"]) == 3
    assert data["minutes"] == round(minutes) and data["calibration"]["brier"] == pytest.approx(brier)
    assert data["records"] == records and data["version"] == VERSION
    assert all(f"| {id} Title of {id} | ✓ solved" in document for id in solved)
    assert document.startswith(f"<!-- {MARK} -->\n# LoRA Lab: progress")


def test_twenty_thousand_records_in_two_seconds(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(lines(a_random_history(4, 20_000)))
    began = time.process_time()
    found = gather([path])
    text = render(read_history(found.records, LABS, now=LATER), "p.html", records=found.records, notes=found.notes)
    assert time.process_time() - began < 2 and len(text) < 300_000


def test_only_an_export_is_ever_overwritten(tmp_path):
    target = tmp_path / "README.md"
    target.write_text("mine")
    with pytest.raises(PortfolioError, match="no export of the lab"):
        write(render(history_of([]), target), target)
    assert target.read_text() == "mine"
    for ending in (".html", ".json", ".md", ".csv"):
        for records in (MORNING, a_random_history(1)):
            write(render(history_of(records), "p" + ending, records=records), tmp_path / f"p{ending}")
        assert (tmp_path / f"p{ending}").read_text() == render(history_of(records), "p" + ending, records=records)
    with pytest.raises(PortfolioError, match="the ending says"):
        write("", tmp_path / "p.pdf")


@pytest.mark.parametrize(("text", "expected"), [("a\n b\x00c\ud800", "a b c?"), ("x" * 600, "x" * 499 + "…"), (3, "3"), ("", "")])
def test_clean(text, expected):
    assert clean(text) == expected


# ------------------------------------------------------------ as a student and an instructor call it


def test_in_a_plain_session(course, capsys):
    check("2.1", lambda x: x.mean(0))
    export_progress()
    assert "1 exercise solved" in capsys.readouterr().out and "solved at the first try" in (course / "my-progress.html").read_text()
    kinds = [json.loads(line)["kind"] for line in (course / "records.jsonl").read_text().splitlines()]
    assert kinds == ["check", "export"]
    export_progress()  # the page gives way to a newer one
    (course / "mine.html").write_text("<p>mine</p>")
    for wrong in ("mine.html", "page.pdf", "no/such/\0.html", 3, None):
        capsys.readouterr()
        export_progress(wrong)  # a notice, no traceback
        assert "could not be written" in capsys.readouterr().out, wrong
    export_progress("p.html", "missing.ipynb")
    assert "missing.ipynb" in capsys.readouterr().out and not (course / "p.html").exists()
    assert (course / "mine.html").read_text() == "<p>mine</p>"


def test_in_a_notebook_the_file_is_in_the_link(course, monkeypatch):
    shown = []
    monkeypatch.setattr(cards, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    export_progress("my <page>.html")
    (data,) = shown
    (link,) = [a for tag, a in Page(data["text/html"]).elements if tag == "a"]
    assert link["download"] == "my <page>.html" and link["href"].startswith("data:text/html;charset=utf-8;base64,")
    from base64 import b64decode

    assert b64decode(link["href"].partition(",")[2]).decode() == (course / "my <page>.html").read_text()
    assert data[MIME]["kind"] == "export" and data[MIME]["format"] == "html" and "no proof" in data["text/plain"]
    monkeypatch.setattr("lora_lab.course.portfolio.LONGEST_LINK", 1000)  # too large for a link: it says where the file is
    export_progress()
    assert "<a " not in shown[1]["text/html"] and "choose Download" in shown[1]["text/html"] and LONGEST_LINK > 10**6


def test_the_command(course):
    (course / "laptop").mkdir()
    (course / "laptop" / "02.ipynb").write_text(a_notebook(MORNING))
    (course / "records.jsonl").write_bytes(lines([tried(500, "3.1", passed=True)]))

    def call(*arguments):
        return CliRunner().invoke(cli.app, ["progress", *map(str, arguments)])

    done = call("laptop", "-o", "a.html", "-o", "a.json", "--name", "Ada")
    assert done.exit_code == 0 and f"a.html: {len(MORNING)} records, 2 exercises solved" in done.output
    assert "Ada’s way" in (course / "a.html").read_text() and json.loads((course / "a.json").read_text())["name"] == "Ada"
    done = call()  # this folder and the record that LORA_LAB_RECORDS names; a.json repeats what is there
    assert done.exit_code == 0 and f"my-progress.html: {len(MORNING) + 1} records, 3 exercises solved" in done.output
    wrong = {("nowhere.jsonl",): "nowhere.jsonl", ("laptop", "-o", "a.pdf"): "the ending says", ("laptop", "-o", "records.jsonl"): "ending"}
    for arguments, said in wrong.items():
        failed = call(*arguments)
        assert failed.exit_code == 1 and said in failed.output


def test_students_have_it():
    """The grader is no part of a students' copy; nothing of the page may need it."""
    folder = Path(checks.__file__).parent
    for name in ("history", "portfolio", "portfolio_page", "checks", "records", "cards"):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not any("grading" in module for module in modules), name


def test_hand_edited_records_do_not_break_the_other_cards(course, capsys):
    records = list(evil_records())
    (course / "records.jsonl").write_bytes(lines(records))
    progress("2")
    progress(all=True)
    assert merge(records) and "Lab 02" in capsys.readouterr().out


# ------------------------------------------------------------ in a real browser

needs_chromium = pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine; LORA_LAB_CHROMIUM may name one")


@pytest.mark.browser
@needs_chromium
def test_in_light_in_dark_and_on_a_telephone(browser, tmp_path, shots):
    target = tmp_path / "p.html"
    write(html_of([*MORNING, *a_random_history(8, 150)], notes=["1 file could not be read."]), target)
    for theme, width in (("light", 1100), ("dark", 400)):
        page, asked, said = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme), [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, said=said: said.append(message.text))
        page.goto(target.as_uri())
        page.screenshot(path=shots / f"progress_{theme}_{width}.png", full_page=True)
        assert asked == [target.as_uri()] and said == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        low = [(text, round(ratio, 2)) for text, ratio in contrasts(page.locator("main")) if ratio < 4.5]  # WCAG 2 AA, for text of any size
        assert not low, (theme, low)
        page.close()
