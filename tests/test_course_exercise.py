"""Exercise, Case, Prediction, Lab: what they refuse; compare: what it says; the registry of labs; no LoRA in the engine."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import lora_lab.course
from lora_lab.course import labs as registry
from lora_lab.course.exercise import Case, Diagnosis, Exercise, Lab, Prediction, Question, compare, first_numbers

CASE = Case("it works", lambda rng: None, lambda inputs, answers: None)


def exercise(**changes):
    fields = dict(id="0.1", title="t", difficulty=1, minutes=4, points=2, name="f", cases=(CASE,),
                  diagnose=lambda evidence: None, hints=("a", "b", "c"), read="x", fallback=lambda: None)
    return Exercise(**(fields | changes))


def lab(**changes):
    fields = dict(number="0", name="00_start", title="t", minutes=15, core=True, objectives=("o",), needs=(),
                  exercises=(exercise(),), predictions=(Prediction("0.A", "q?", {"a": "1", "b": "2"}),))
    return Lab(**(fields | changes))


@pytest.mark.parametrize(("changes", "said"), [
    ({"id": "1"}, "'2.1'"), ({"id": "a.1"}, "'2.1'"), ({"difficulty": 4}, "1, 2 or 3"), ({"minutes": 0}, "minutes"),
    ({"points": True}, "points"), ({"name": "f(x)"}, "Python name"), ({"cases": ()}, "needs cases"),
    ({"cases": (CASE, CASE)}, "same title"), ({"hints": ("a", "b")}, "3 hints"), ({"hints": ("a", "b", " ")}, "3 hints"),
    ({"hints": "abc"}, "list or tuple"), ({"diagnose": None}, "diagnose"), ({"fallback": 3}, "fallback"), ({"title": " "}, "title"),
])
def test_an_exercise_refuses(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        exercise(**changes)


@pytest.mark.parametrize(("changes", "said"), [
    ({"number": 2}, "text such as"), ({"number": "2", "exercises": ()}, "belongs to lab '0'"), ({"objectives": ()}, "objectives"),
    ({"exercises": (exercise(), exercise())}, "stands twice"), ({"minutes": -1}, "minutes"), ({"name": "a.ipynb"}, "file name"),
])
def test_a_lab_refuses(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        lab(**changes)


@pytest.mark.parametrize(("fields", "said"), [
    (("0.1", "q?", {"a": "1", "b": "2"}), "'2.A'"), (("0.A", "q?", {"a": "1"}), "two or more"),
    (("0.A", "q?", {"first": "1", "b": "2"}), "single letters"), (("0.A", " "), "question"),
])
def test_a_prediction_refuses(fields, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Prediction(*fields)


@pytest.mark.parametrize(("changes", "said"), [
    ({"id": "0.1"}, "'2.F1'"), ({"title": " "}, "title"), ({"ask": ""}, "question"), ({"minutes": 0}, "minutes"), ({"rubric": ()}, "rubric"),
    ({"rubric": ((0, "x"),)}, "rubric"), ({"rubric": ((1, " "),)}, "rubric"), ({"rubric": ("one point",)}, "rubric"), ({"rubric": "text"}, "list or tuple"),
])
def test_a_question_refuses(changes, said):
    good = dict(id="0.F1", title="t", minutes=5, ask="Why?", rubric=((1, "a"), (2, "b")))
    assert Question(**good).points == 3
    with pytest.raises(ValueError, match=re.escape(said)):
        Question(**(good | changes))


def test_a_question_belongs_to_its_lab_and_its_points_are_given_by_a_person():
    question = Question("0.F1", "t", 5, "Why?", ((3, "a"),))
    assert lab(questions=(question,)).points == lab().points
    for questions, said in (((question, question), "stands twice"), ((Question("1.F1", "t", 5, "Why?", ((3, "a"),)),), "belongs to lab '1'")):
        with pytest.raises(ValueError, match=said):
            lab(questions=questions)


def test_the_others_refuse():
    with pytest.raises(ValueError, match="one word"):
        Diagnosis("two words", "text")
    with pytest.raises(ValueError, match="judge must be a function"):
        Case("title", lambda rng: None, None)


def test_lists_become_tuples_and_points_add_up():
    one = lab(exercises=[exercise(cases=[CASE], hints=["a", "b", "c"]), exercise(id="0.2", points=3)])
    assert isinstance(one.exercises, tuple) and isinstance(one.exercises[0].cases, tuple) and one.points == 5
    assert exercise(id="2b.1").lab == "2b"


EXPECTED = np.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize("found", [EXPECTED, EXPECTED.copy(order="F"), EXPECTED * (1 + 1e-12), EXPECTED.tolist()])
def test_compare_accepts(found):
    assert compare(found, EXPECTED) is None


@pytest.mark.parametrize(("found", "said"), [
    (None, "return"), (EXPECTED.T, "shape (3, 2), expected (2, 3)"), (EXPECTED[0, 0], "shape () (a single number), expected (2, 3)"),
    (EXPECTED + np.nan, "6 of 6 numbers that are NaN"), (np.where(EXPECTED == 2, np.inf, EXPECTED), "1 of 6"),
    ("text", "is a str"), ({"a": 1}, "is a dict"), ([1, [2, 3]], "list of 2 things"), (["a"], "list of 1 things"),
    (EXPECTED + 1e-6, "begins [1e-06, 1, 2, …], expected [0, 1, 2, …] (largest difference 1e-06)"),
    (EXPECTED.astype(complex), "is a"), (object(), "is a object"),
])
def test_compare_says_what_is_wrong(found, said):
    if isinstance(found, np.ndarray) and found.dtype.kind == "c":
        assert compare(found, EXPECTED) is not None
    else:
        assert said in compare(found, EXPECTED, what="y")


def test_compare_numbers():
    assert compare(3, 3) is None and compare(np.float64(3), 3.0) is None
    assert compare(4, 3, what="count") == "count is 4, expected 3"
    assert compare(float("nan"), 3) is not None
    assert compare(0.3000001, 0.3, rtol=1e-5) is None
    with pytest.raises(ValueError, match="finite expectation"):
        compare(1.0, float("nan"))


def test_a_liar_does_not_compare_equal():
    class Liar(float):
        def __eq__(self, other):
            return True

    assert compare(Liar(4), 3) is not None


def test_first_numbers():
    assert first_numbers(np.arange(5.0)) == "[0, 1, 2, …]" and first_numbers(np.arange(2)) == "[0, 1]" and first_numbers(3.14159) == "3.142"


def test_the_registry_finds_and_lists(monkeypatch):
    monkeypatch.setattr(registry, "labs", lambda: {"0": lab()})
    assert registry.find_exercise("0.1").id == "0.1" and registry.find_prediction("0.A").id == "0.A"
    with pytest.raises(KeyError, match=re.escape("no exercise '0.7'; there are: 0.1")):
        registry.find_exercise("0.7")
    with pytest.raises(KeyError, match=re.escape("there are: 0.A")):
        registry.find_prediction("9.A")
    with pytest.raises(KeyError, match="no lab '3'; there are: 0"):
        registry.find_lab("3")


def test_file_names_of_labs():
    assert [registry.module_name(n) for n in ("0", "2", "2b", "10")] == ["lab00", "lab02", "lab02b", "lab10"]
    assert list(registry.labs()) == sorted(registry.labs(), key=registry.module_name)


def test_the_engine_knows_no_lora():
    """No import of the module that is taught, and its words nowhere but in docstrings."""
    for file in Path(lora_lab.course.__file__).parent.glob("*.py"):
        if file.stem in ("classroom", "site"):  # they hand out this lab and show its pictures; they check nothing
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module == "files", f"{file.name} imports {node.module}"
            if isinstance(node, ast.ImportFrom) and node.level == 0 or isinstance(node, ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                taught = [name for name in names if re.match(r"lora_lab\.(?!course|files)", name) or name == "lora_lab"]
                assert not taught, f"{file.name} imports {taught}"
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body[0].value = ast.Constant("")
        code = re.sub("lora[-_ ]lab", "", ast.unparse(tree), flags=re.IGNORECASE)
        assert not re.search("lora|adapter|low.rank", code, re.IGNORECASE), file.name
