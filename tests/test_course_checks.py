"""check, hint, use, predict, progress: the card a student sees, the record that stays, and no traceback of ours."""

import functools
import json
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_lab.course import calibration, cards, check, checks, hint, predict, progress, use
from lora_lab.course import labs as registry
from lora_lab.course.cards import KINDS, Block, Card
from lora_lab.course.exercise import Case, Diagnosis, Exercise, Lab, Prediction, compare
from lora_lab.course.records import MIME
from lora_lab.course.script import Script


def probe(rng):
    s = Script()
    s.send("mean", s.call(s.input("x", rng.normal(size=(7, 11)))))
    return s


def judge(inputs, answers):
    return compare(answers["mean"], inputs["x"].mean(0), what="row_mean(x)")


def diagnose(evidence):
    if compare(evidence[0].answers.get("mean"), evidence[0].inputs["x"].sum(0)) is None:
        return Diagnosis("no_division", "you add the rows and do not divide")


class Box(torch.nn.Module):
    def forward(self, x):
        return x.mean(0)


def make_exercise(id, fallback=lambda: lambda x: x.mean(0), name="row_mean", cases=None):
    return Exercise(id=id, title="The mean row", difficulty=1, minutes=4, points=2, name=name, diagnose=diagnose,
                    cases=cases or (Case("the mean runs over the rows", probe, judge), Case("on other rows too", probe, judge)),
                    hints=("What shape comes out?", "mean takes a dim", "return x.mean(0)"), read="Section 1", fallback=fallback)


def probe_class(rng):
    s = Script()
    s.send("mean", s.call(s.input("x", rng.normal(size=(7, 11))), target=s.call()))
    return s


LABS = {
    "0": Lab(number="0", name="00_start", title="Start", minutes=15, core=True, objectives=("o",), needs=(), exercises=(
        make_exercise("0.1"), make_exercise("0.2", lambda: Box, "Box", (Case("it works", probe_class, judge),))),
        predictions=(Prediction("0.A", "Which is larger?", {"a": "the mean", "b": "the sum"}),
                     Prediction("0.B", "How many numbers?", unit="numbers"))),
    "2b": Lab(number="2b", name="02b_more", title="More", minutes=15, core=True, objectives=("o",), needs=(),
              exercises=(make_exercise("2b.1"),)),
}


def right(x):
    return x.mean(0)


def wrong(x):
    return x.sum(0)


def broken(x):
    return x @ x  # <script>alert(1)</script>


@pytest.fixture(autouse=True)
def course(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "labs", lambda: LABS)
    monkeypatch.setenv("LORA_LAB_RECORDS", str(tmp_path / "records.jsonl"))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    restart(monkeypatch)


def restart(monkeypatch):
    """What a fresh kernel knows: nothing."""
    monkeypatch.setattr(checks, "_store", None)
    monkeypatch.setattr(checks, "_last_lab", None)
    monkeypatch.setattr(checks, "_lab_own", [])


@pytest.fixture
def said(capsys):
    """The cards since the last look, as one line of text."""
    return lambda: re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.fixture
def recorded(tmp_path):
    def read():
        path = tmp_path / "records.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return read


# ------------------------------------------------------------ check


def test_a_right_answer(said, recorded):
    verdict = check("0.1", right)
    assert verdict and verdict.passed and verdict._ipython_display_() is None and repr(verdict) == "Verdict(0.1: passed)"
    text = said()
    assert "✓ Exercise 0.1 passed · 2 of 2 checks here" in text and "inputs you have not seen" in text
    (record,) = recorded()
    assert {k: record[k] for k in ("kind", "exercise", "passed", "checks", "diagnosis")} == {
        "kind": "check", "exercise": "0.1", "passed": True, "checks": [2, 2], "diagnosis": None}


def test_a_wrong_answer_is_named(said, recorded):
    verdict = check("0.1", wrong)
    assert not verdict and verdict.diagnosis.key == "no_division" and repr(verdict) == "Verdict(0.1: failed, no_division)"
    text = said()
    for part in ("✗ Exercise 0.1: not yet · 0 of 2 checks pass", "property: the mean runs over the rows", "expected [",
                 "Which mistake it is: you add the rows and do not divide", 'hint("0.1")'):
        assert part in text
    assert recorded()[0]["diagnosis"] == "no_division" and recorded()[0]["passed"] is False


def test_an_error_shows_the_students_line(said):
    assert not check("0.1", broken)
    line = broken.__code__.co_firstlineno + 1
    assert f"broken, line {line}: return x @ x # <script>" in said()


def test_the_other_states(said):
    def stub(x):
        raise NotImplementedError("exercise 0.1")

    assert check("0.1", stub).status == "not started"
    assert "○ Exercise 0.1: not started Write `row_mean`" in said()
    for value in (lambda x: None, lambda x: x * np.nan, lambda x: x.mean(0) * np.nan):
        assert not check("0.1", value)


def test_an_endless_loop_ends(said, monkeypatch):
    def loop(x):
        while True:
            pass

    monkeypatch.setattr(checks, "examine", functools.partial(checks.examine, seconds=0.2))
    assert check("0.1", loop).status == "time"
    text = said()
    assert "stopped" in text and "still running after 0.2 seconds" in text and "loop, line" in text


def test_forgotten_quotes_do_no_harm(said):
    assert check(0.1, right)


@pytest.mark.parametrize(("arguments", "part"), [
    (("0.1",), "Say what is to be checked: `check(\"0.1\", row_mean)`"), (("0.1", torch.ones(3)), "result of a call (a tensor)"),
    (("0.1", "row_mean"), "without quotes"), (("0.1", None), "That is None"), (("0.1", right, 3), "without its arguments"),
    (("0.1", ...), "in place of the dots"), (("0.2", Box()), "Give the class itself"), (("0.1", 3.5), "a float"),
    (("0.7", right), "no exercise '0.7'; there are: 0.1, 0.2"), (("9.1", right), "there are: 0.1, 0.2, 2b.1"),
    ((right,), "comes first, in quotes"), ((right, "0.1"), "comes first, in quotes"), ((0.7, right), "no exercise '0.7'"),
])
def test_a_wrong_call_is_a_card_and_no_attempt(arguments, part, said, recorded):
    assert not check(*arguments)
    assert part in said() and recorded() == []


def test_a_class_can_be_checked():
    assert check("0.2", Box) and check("0.2", lambda: Box())


def test_it_runs_in_any_thread(said):
    found = []
    thread = threading.Thread(target=lambda: found.append(check("0.1", wrong)))
    thread.start()
    thread.join(20)
    assert found[0].diagnosis.key == "no_division"


def test_a_check_is_quick():
    check("0.1", right)
    start = time.monotonic()
    check("0.1", wrong)
    assert time.monotonic() - start < 0.3       # 5 ms alone; the promise to students is 0.3 s


def test_the_same_inputs_every_time(monkeypatch):
    seen = []
    for _ in range(2):
        check("0.1", lambda x: seen.append(x.sum().item()))
    assert seen[0] == seen[2] and seen[0] != seen[1]


# ------------------------------------------------------------ hint and use


def test_hints_climb_and_stay_across_a_restart(said, recorded, monkeypatch):
    hint("0.1")
    assert "Hint 1 of 3" in said()
    restart(monkeypatch)
    hint("0.1")
    text = said()
    assert "Hint 2 of 3" in text and "What shape comes out?" in text and "mean takes a dim" in text and "return" not in text
    hint("0.2")
    assert "Hint 1 of 3 for exercise 0.2" in said()
    for _ in range(2):
        hint("0.1")
        text = said()
        assert "Hint 3 of 3" in text and "return x.mean(0)" in text and 'row_mean = use("0.1", row_mean)' in text
    assert [r["rung"] for r in recorded() if r["exercise"] == "0.1"] == [1, 2, 3, 3]
    hint("7.1")
    assert "no exercise '7.1'" in said()


def test_use_keeps_what_passes_and_replaces_the_rest(said, recorded):
    assert use("0.1", right) is right
    assert "from here on, your `row_mean`" in said()
    for bad in (wrong, broken, None, "row_mean", torch.ones(2), ...):
        own = use("0.1", bad)
        assert own is not bad and torch.equal(own(torch.eye(2)), torch.full((2,), 0.5))
        assert "the lab's own `row_mean` (yours: not right yet)" in said()
    assert callable(use("0.1")) and [r["own"] for r in recorded()] == [True] + [False] * 7
    assert use("0.9", right) is right


def test_the_labs_own_earns_no_points(said, recorded):
    own = use("0.1", wrong)
    said()
    assert not check("0.1", own)
    assert "the lab's own `row_mean`" in said() and all(r["kind"] == "use" for r in recorded())
    assert use("0.1", own) is not wrong and "(yours" not in said()


# ------------------------------------------------------------ predict


def test_a_question_and_its_answer(said, recorded):
    guess = predict("0.A", ...)
    text = said()
    assert guess.value is None and "Which is larger?" in text and "b: the sum" in text and 'predict("0.A", "a")' in text
    assert recorded() == []
    assert predict("0.A").value is None
    said()
    guess = predict("0.A", " B ")
    assert guess.value == "b" and "You say b: the sum." in said()
    guess.reveal("a", "Because.")
    text = said()
    assert "the run says otherwise" in text and "you said: b: the sum" in text and "the run: a: the mean" in text and "Because." in text
    assert [(r["kind"], r.get("value"), r.get("right")) for r in recorded()] == [("predict", "b", None), ("reveal", "b", False)]


def test_numbers_within_their_tolerance(said):
    for value, word in ((306, "right"), (300, "right"), ("1,000", "says otherwise"), (np.float64(320), "right"),
                        (torch.tensor(200), "says otherwise"), (291, "right"), (290, "says otherwise")):      # 306 * 0.95 = 290.7
        predict("0.B", value).reveal(306)
        assert f"Prediction 0.B: {'the run ' if word != 'right' else ''}{word}" in said()


@pytest.mark.parametrize(("id", "value"), [("0.A", "z"), ("0.A", 1), ("0.A", None), ("0.B", "many"), ("0.B", float("nan")),
                                           ("0.B", True), ("0.B", [1]), ("0.Z", "a"), ("0.1", "a"), (predict, "a")])
def test_what_is_no_answer(id, value, said, recorded):
    guess = predict(id, value)
    assert guess.value is None and recorded() == [] and said().startswith("! ")
    guess.reveal("a" if id == "0.A" else 3)


def test_an_answer_after_the_run_is_told_apart(said, recorded, monkeypatch):
    predict("0.A", "b").reveal("a")
    restart(monkeypatch)
    said()
    guess = predict("0.A", "a")
    assert "noted as a later one" in said() and recorded()[-1]["after_reveal"] is True and recorded()[-1]["changed"] is True
    guess.reveal("a")
    progress()
    assert "the run said otherwise" in said()


def test_running_a_prediction_again_is_no_new_record(recorded):
    for _ in range(3):
        predict("0.A", "b")
    assert len(recorded()) == 1
    predict("0.A", "a")
    assert len(recorded()) == 2 and recorded()[-1]["changed"] is True and recorded()[-1]["after_reveal"] is False


def test_an_impossible_outcome_is_the_labs_mistake():
    with pytest.raises(ValueError, match="none of a, b"):
        predict("0.A", "a").reveal("q")


# ------------------------------------------------------------ calibration


@pytest.mark.parametrize(("given", "kept"), [(0.7, 0.7), (70, 0.7), (1, 1.0), (0, 0.0), ("80 %", 0.8), ("0.55", 0.55), (np.float64(0.9), 0.9)])
def test_how_sure(given, kept, said, recorded):
    assert predict("0.A", "a", sure=given).sure == pytest.approx(kept)
    assert recorded()[-1]["sure"] == pytest.approx(kept) and f"the mean ({kept:.0%} sure)" in said()


@pytest.mark.parametrize("sure", [-0.1, 101, float("nan"), "very", True, [0.5]])
def test_what_is_no_confidence(sure, said, recorded):
    assert predict("0.A", "a", sure=sure).value is None
    text = said()
    assert recorded() == [] and ("how sure you are" in text or "is not a number" in text)


def test_calibration_counts_the_last_answer_before_the_outcome(said, recorded):
    predict("0.A", "a", sure=0.9)
    predict("0.A", "b", sure=0.6).reveal("b")                     # changed in time: counts
    predict("0.A", "a", sure=1.0)                                 # too late
    predict("0.B", 3).reveal(3)                                   # does not say how sure
    said()
    calibration()
    text = said()
    assert "1 prediction" in text and "60% sure; 1 of 1 came true" in text and "decides nothing yet" in text
    assert "1 answer did not say how sure" in text and "1 answer changed" in text
    last = recorded()[-1]
    assert (last["kind"], last["count"], last["right"], last["without"]) == ("calibration", 1, 1, 1)
    assert last["sure"] == 0.6 and last["brier"] == pytest.approx(0.16)          # (0.6 - 1)², by hand


def test_calibration_with_nothing_to_compare(said):
    calibration()
    assert "nothing to compare yet" in said()
    predict("0.A", ...).reveal("a")
    predict("0.A", "a", sure=0.5)
    predict("0.B", ...).reveal(3)                                 # never answered: not late, just open
    said()
    calibration()
    text = said()
    assert "nothing to compare yet" in text and "1 answer came after the outcome" in text


def test_a_change_of_confidence_alone_is_a_new_record(recorded):
    for sure in (0.6, 0.6, 0.8):
        predict("0.A", "a", sure=sure)
    assert [r["sure"] for r in recorded()] == [0.6, 0.8]


def test_the_picture_has_a_dot_for_each_answer_and_words_for_who_cannot_see_it():
    answers = [(0.5, True), (0.5, True), (0.9, False), (1.0, True)]
    svg = cards.strip_of_answers(answers, "80 % & more")
    assert svg.count("<circle") == 4 and svg.count('fill="none" stroke=') == 1 and 'aria-label="80 % &amp; more"' in svg
    places = re.findall(r'<circle cx="([\d.]+)" cy="(-?\d+)"', svg)
    assert len(set(places)) == 4                                   # equal answers stand on each other, not in each other
    card = cards.Card("predict", "t", [cards.Block("picture", svg, label="said in words")])
    assert svg in card.html() and "said in words" in card.text()


# ------------------------------------------------------------ progress


def test_progress_counts(said):
    check("0.1", wrong), check("0.1", right), check("0.1", wrong), hint("0.1"), predict("0.A", "b").reveal("b")
    said()
    progress()
    text = said()
    assert "Lab 00 · Start · 2 of 4 points" in text and "0.1 · The mean row ✓ passed 2 / 2 3 1" in text
    assert "0.2 · The mean row ○ not tried 0 / 2 0 0" in text
    assert "0.A · Which is larger? ✓ right" in text and "How many numbers? ○ open" in text
    progress(all=True)
    text = said()
    assert "2 of 6 points" in text and "0 · Start 2 / 4 1 / 2 1 / 2" in text and "2b · More 0 / 2 0 / 1 0 / 0" in text
    progress("2b")
    assert "Lab 02b" in said()
    progress("5")
    assert "no lab '5'" in said()


def test_progress_comes_from_the_notebook_when_the_container_is_lost(said, recorded, tmp_path, monkeypatch):
    check("0.1", right), predict("0.A", "b")
    cells = [{"outputs": [{"output_type": "display_data", "data": {MIME: record}}]} for record in recorded()]
    notebook = tmp_path / "00_start.ipynb"
    notebook.write_text(json.dumps({"cells": cells}))
    (tmp_path / "records.jsonl").unlink()
    restart(monkeypatch)
    said()
    progress("0")
    assert "0 of 4 points" in said()
    progress("0", notebook=notebook)
    assert "2 of 4 points" in said()
    monkeypatch.setenv("JPY_SESSION_NAME", str(notebook))
    progress()                                 # the open notebook says which lab it is, and what was done
    text = said()
    assert "Lab 0" in text and "2 of 4 points" in text and "noted, not yet revealed" in text
    progress(notebook=tmp_path / "missing.ipynb")
    assert "cannot be read" in said()


def test_damage_is_a_card(said, tmp_path, monkeypatch):
    check("0.1", right)
    with open(tmp_path / "records.jsonl", "a") as file:
        file.write("{oops\n")
    restart(monkeypatch)
    said()
    progress("0")
    text = said()
    assert "! A word about your progress" in text and "1 line could not be read" in text and "2 of 4 points" in text


# ------------------------------------------------------------ cards


def all_blocks():
    return [Block("text", "a `x < y` & <b>"), Block("strong", "s"), Block("quiet", "odd ` <q> tick"), Block("code", "<em>"),
            Block("mark", "m", label="<l>"), Block("rows", [("<i>", "<u>")]), Block("table", [("<h>", "k"), ("<v>", 3)])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_escapes_and_carries_an_icon_and_a_role(kind):
    card = Card(kind, "<script>alert(1)</script>", all_blocks())
    html = card.html()
    for typed in ("<script", "<b>", "<l>", "<i>", "<u>", "<h>", "<v>", "<q>", "<em>"):
        assert typed not in html
    assert 'role="status"' in html and KINDS[kind][0] in html and "<code" in html and "x &lt; y" in html
    assert "<style" not in html and "class=" not in html and "http" not in html
    assert card.text().startswith(KINDS[kind][0] + " <script>") and "m" in card.text()


def test_white_on_each_accent_can_be_read():
    def luminance(colour):
        channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for icon, accent in KINDS.values():
        assert 1.05 / (luminance(accent) + 0.05) >= 4.5, (icon, accent)       # WCAG 2 AA for text


def test_nothing_of_the_notebook_is_imported_outside_of_one():
    assert not cards.in_notebook()
    import subprocess

    code = "import sys, lora_lab.course; assert not {'IPython', 'ipywidgets', 'matplotlib', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.notebook
def test_in_a_real_kernel(tmp_path):
    """The card and the record are in one output; the verdict adds none; an error counts lines within the cell."""
    nbformat, NotebookClient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient").NotebookClient
    setup = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" \
            "import test_course_checks as t, lora_lab.course.labs as r\nr.labs = lambda: t.LABS\nfrom lora_lab.course import *"
    sources = [setup, "def row_mean(x):\n    # a comment\n    return x @ x", 'check("0.1", row_mean)', 'check("0.1", t.wrong)',
               'p = predict("0.A", "b")', "progress()", "import time\ndef slow(x):\n    time.sleep(60)",
               'from lora_lab.course.runner import examine; examine(t.LABS["0"].exercises[0], slow, seconds=0.3).status']
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert [len(o) for o in outputs] == [0, 0, 1, 1, 1, 1, 0, 1]
    error, failed, guess, table = (outputs[n][0]["data"] for n in (2, 3, 4, 5))
    assert "row_mean, line 3" in error["text/html"] and error[MIME]["kind"] == "check" and "return x @ x" in error["text/plain"]
    assert failed[MIME]["diagnosis"] == "no_division" and guess[MIME]["value"] == "b" and "Lab 0" in table["text/html"]
    assert outputs[7][0]["data"]["text/plain"] == "'time'"


def test_with_a_name_the_inputs_are_ones_own_and_a_neighbours_numbers_fail(monkeypatch, tmp_path):
    seen = {}

    def spy(who):
        def row_mean(x):
            seen.setdefault(who, []).append(x.clone())
            return x.mean(0)

        return row_mean

    for who in ("", "ada", "ada ", "grace"):
        monkeypatch.setenv("LORA_LAB_STUDENT", who)
        assert check("0.1", spy(who))
    assert torch.equal(seen["ada"][0], seen["ada "][0])  # a blank behind a name is nobody else
    assert not torch.equal(seen["ada"][0], seen["grace"][0]) and not torch.equal(seen["ada"][0], seen[""][0])
    answers = iter([x.mean(0) for x in seen["ada"]])
    monkeypatch.setenv("LORA_LAB_STUDENT", "grace")
    assert not check("0.1", lambda x: next(answers))
    monkeypatch.delenv("LORA_LAB_STUDENT")
    unnamed = []
    assert check("0.1", lambda x: unnamed.append(x.clone()) or x.mean(0))
    assert torch.equal(unnamed[0], seen[""][0])


def test_a_run_that_is_defended_has_numbers_of_ones_own(monkeypatch):
    """What lab 07's plan runs on: `student_seed() + s`. Two names train to two losses, one name to one, and nobody's stays the class's."""
    from torch import nn

    from lora_lab import Batches, apply_lora, train
    from lora_lab.course import student_seed

    def defended(name):
        monkeypatch.setenv("LORA_LAB_STUDENT", name)
        torch.manual_seed(student_seed() + 1)
        model = apply_lora(nn.Sequential(nn.Linear(6, 4)), r=2, alpha=4, target_modules=["0"])
        x, y = torch.randn(32, 6), torch.randint(4, (32,))
        *_, last = train(model, Batches(x, y, batch_size=8, seed=student_seed() + 1), steps=5, lr=1e-2)
        return last.loss

    losses = {name: defended(name) for name in ("", "ada", "grace", "alan")}
    assert len(set(losses.values())) == 4 and defended("ada") == losses["ada"]
    monkeypatch.delenv("LORA_LAB_STUDENT")
    assert student_seed() == 0
    (root,) = [folder for folder in Path(__file__).resolve().parents if (folder / "notebooks" / "source").is_dir()]
    plan = (root / "notebooks" / "source" / "07_fine_tune_gpt2.py").read_text(encoding="utf-8").partition("go = False")[2]
    assert "torch.manual_seed(yours)" in plan and "student_seed() + s" in plan and "seed=yours" in plan
