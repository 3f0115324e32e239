"""What a lab consists of: exercises made of cases, predictions, questions. Plain frozen records; this file runs nothing.

A worked example, complete: an exercise that asks for the mean of the rows of a matrix.

    import numpy as np
    from lora_lab.course.exercise import Case, Diagnosis, Exercise, Lab, Prediction, compare
    from lora_lab.course.script import Script

    def probe(rng):                                     # what is asked of the student's object, as plain operations
        s = Script()
        x = s.input("x", rng.normal(size=(7, 11)))      # a named tensor; `inputs["x"]` in the judge is its numpy copy
        s.send("mean", s.call(x))                       # call the student's object, send what it returned under a name
        return s

    def judge(inputs, answers):                         # None if right, else one sentence that names the property
        return compare(answers["mean"], inputs["x"].mean(0), what="row_mean(x)")

    def diagnose(evidence):                             # which mistake is it? None when unsure
        x, found = evidence[0].inputs["x"], evidence[0].answers.get("mean")
        if compare(found, x.sum(0)) is None:
            return Diagnosis("no_division", "you add the rows and do not divide by how many there are")
        if compare(found, x.mean(1)) is None:
            return Diagnosis("wrong_axis", "you average along each row; dim=0 runs over the rows")

    LAB = Lab(number="0", name="00_start_here", title="Start here", minutes=15, core=True,
              objectives=("say what dim=0 means",), needs=("tensors",),
              exercises=(Exercise(
                  id="0.1", title="The mean row", difficulty=1, minutes=4, points=2, name="row_mean",
                  cases=(Case("the mean runs over the rows", probe, judge),), diagnose=diagnose,
                  hints=("What shape should come out?", "x.mean takes a dim.", "return x.mean(0)"),
                  read="Section 1 of this notebook", fallback=lambda: lambda x: x.mean(0)),),
              predictions=(Prediction("0.A", "Which is larger?", {"a": "the mean", "b": "the sum"}),
                           Prediction("0.B", "How many numbers has the mean row?", unit="numbers")))

`examine(exercise, student)` in `runner` runs it, `check("0.1", row_mean)` in `checks` shows what came out.
A judge and a diagnosis see only `inputs` (numpy arrays) and `answers` (numpy arrays, numbers, texts, lists, dicts):
they work just as well when the student's code ran in another process. Let the expectation come from numpy or from
`torch.func.functional_call`, never from the answer itself. A judge is not asked when the run ended in an error;
a diagnosis is (`evidence[0].error`), and reads answers with `.get`, for the run may have ended before they were sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LAB_NUMBER = r"\d+[a-z]?"
UNANSWERED = "*Your answer: double-click here, and write it in place of this line.*"


@dataclass(frozen=True)
class Diagnosis:
    """Which mistake it is. `key` names it for tests and for the instructor's counts, `text` tells the student."""

    key: str
    text: str

    def __post_init__(self):
        _demand(bool(re.fullmatch(r"\w+", self.key)), f"a diagnosis key is one word, found {self.key!r}")
        _demand(bool(self.text.strip()), f"diagnosis {self.key!r} has no text")


@dataclass(frozen=True)
class Evidence:
    """What one case brought to light. `error` (see runner.Error) is None when the run came to its end;
    `failure` is the sentence of the judge or of the error, None when the case passed."""

    title: str
    inputs: Mapping[str, np.ndarray]
    answers: Mapping[str, Any]
    failure: str | None = None

    @property
    def error(self):
        return self.answers.error


@dataclass(frozen=True)
class Case:
    """One property. probe(rng: numpy Generator) -> Script; judge(inputs, answers) -> None or one sentence."""

    title: str
    probe: Callable[[np.random.Generator], Any]
    judge: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], str | None]

    def __post_init__(self):
        _demand(bool(self.title.strip()), "a case needs a title: the property as the student reads it")
        for name in ("probe", "judge"):
            _demand(callable(getattr(self, name)), f"case {self.title!r}: {name} must be a function")


@dataclass(frozen=True)
class Exercise:
    """One graded exercise; see the top of this file. `name`: the student's object; `fallback()`: the lab's own."""

    id: str
    title: str
    difficulty: int
    minutes: int
    points: int
    name: str
    cases: tuple[Case, ...]
    diagnose: Callable[[list[Evidence]], Diagnosis | None]
    hints: tuple[str, str, str]
    read: str
    fallback: Callable[[], Any]

    def __post_init__(self):
        where = f"exercise {self.id!r}"
        _as_tuples(self, "cases", "hints")
        _demand(bool(re.fullmatch(LAB_NUMBER + r"\.\d+", str(self.id))), f"{where}: an id looks like '2.1' or '2b.1'")
        _demand(bool(self.title.strip()), f"{where} needs a title")
        _demand(self.difficulty in (1, 2, 3), f"{where}: difficulty is 1, 2 or 3, found {self.difficulty!r}")
        for name in ("minutes", "points"):
            _demand(_positive(getattr(self, name)), f"{where}: {name} must be 1 or more, found {getattr(self, name)!r}")
        _demand(self.name.isidentifier(), f"{where}: name must be a Python name, found {self.name!r}")
        _demand(len(self.cases) > 0 and all(isinstance(c, Case) for c in self.cases), f"{where} needs cases")
        titles = [case.title for case in self.cases]
        _demand(len(set(titles)) == len(titles), f"{where}: two cases have the same title: {titles}")
        _demand(len(self.hints) == 3 and all(str(h).strip() for h in self.hints),
                f"{where} needs 3 hints, from a nudge to nearly the answer, found {len(self.hints)}")
        for name in ("diagnose", "fallback"):
            _demand(callable(getattr(self, name)), f"{where}: {name} must be a function")

    @property
    def lab(self) -> str:
        return self.id.split(".")[0]


@dataclass(frozen=True)
class Prediction:
    """A question before a run. `options`: letter -> text; None asks for a number, in `unit`,
    and then a guess counts as right within `tolerance` (relative)."""

    id: str
    question: str
    options: Mapping[str, str] | None = None
    unit: str = ""
    tolerance: float = 0.05

    def __post_init__(self):
        where = f"prediction {self.id!r}"
        _demand(bool(re.fullmatch(LAB_NUMBER + r"\.[A-Z]", str(self.id))), f"{where}: an id looks like '2.A' or '2b.A'")
        _demand(bool(self.question.strip()), f"{where} needs a question")
        if self.options is not None:
            good = len(self.options) >= 2 and all(re.fullmatch("[a-z]", str(letter)) for letter in self.options)
            _demand(good, f"{where}: options are two or more single letters with a text, found {self.options!r}")
        _demand(0 <= self.tolerance < 1, f"{where}: tolerance is a fraction from 0 to 1, found {self.tolerance!r}")

    @property
    def lab(self) -> str:
        return self.id.split(".")[0]


@dataclass(frozen=True)
class Question:
    """A question that is answered in words and marked by a person, in minutes on top of the lab's.

    `ask`: what to write about, markdown; `rubric`: (points, what an answer shows) pairs, which the student reads, too."""

    id: str
    title: str
    minutes: int
    ask: str
    rubric: tuple[tuple[int, str], ...]

    def __post_init__(self):
        where = f"question {self.id!r}"
        _as_tuples(self, "rubric")
        _demand(bool(re.fullmatch(LAB_NUMBER + r"\.F\d+", str(self.id))), f"{where}: an id looks like '2.F1' or '2b.F1'")
        for name in ("title", "ask"):
            _demand(bool(getattr(self, name).strip()), f"{where} needs {'a title' if name == 'title' else 'its question'}")
        _demand(_positive(self.minutes), f"{where}: minutes must be 1 or more, found {self.minutes!r}")
        good = all(isinstance(row, tuple) and len(row) == 2 and _positive(row[0]) and str(row[1]).strip() for row in self.rubric)
        _demand(bool(self.rubric) and good, f"{where}: a rubric is made of (points, what an answer shows), found {self.rubric!r}")

    @property
    def lab(self) -> str:
        return self.id.split(".")[0]

    @property
    def points(self) -> int:
        return sum(points for points, _ in self.rubric)


@dataclass(frozen=True)
class Lab:
    """One notebook. `number`: "2" or "2b", the part of an id before the dot; `name`: the notebook's file name without
    .ipynb; `minutes` for the whole lab; `core`: False for an elective; `needs`: what one should know before.
    `points` are those of the exercises: what is answered in words has points of its own, given by a person."""

    number: str
    name: str
    title: str
    minutes: int
    core: bool
    objectives: tuple[str, ...]
    needs: tuple[str, ...]
    exercises: tuple[Exercise, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    questions: tuple[Question, ...] = ()

    def __post_init__(self):
        where = f"lab {self.number!r}"
        _as_tuples(self, "objectives", "needs", "exercises", "predictions", "questions")
        _demand(isinstance(self.number, str) and bool(re.fullmatch(LAB_NUMBER, self.number)),
                f"{where}: the number is a text such as '2' or '2b'")
        _demand(bool(re.fullmatch(r"\w+", self.name)), f"{where}: name is a file name without .ipynb: {self.name!r}")
        _demand(bool(self.title.strip()), f"{where} needs a title")
        _demand(_positive(self.minutes), f"{where}: minutes must be 1 or more, found {self.minutes!r}")
        _demand(len(self.objectives) > 0, f"{where} needs objectives: what the student can do afterwards")
        items = (*self.exercises, *self.predictions, *self.questions)
        ids = [item.id for item in items]
        _demand(len(set(ids)) == len(ids), f"{where}: an id stands twice: {sorted(ids)}")
        for item in items:
            _demand(item.lab == self.number, f"{where}: {item.id!r} belongs to lab {item.lab!r}")

    @property
    def points(self) -> int:
        return sum(exercise.points for exercise in self.exercises)

    @property
    def label(self) -> str:
        """The number as titles and file names have it: "02", "02b"."""
        return self.number.rjust(2 + (not self.number[-1].isdigit()), "0")


def compare(found, expected, what: str = "the result", rtol: float = 1e-9, atol: float = 0.0) -> str | None:
    """None if `found` equals `expected`, else one sentence with shapes and first numbers.

    Equal means: same shape, all finite, and max|found - expected| <= atol + rtol * max|expected|.
    The default rtol suits float64 sums of a few hundred products (rounding about 1e-15, a mistake at least 1e-3);
    use 1e-5 for float32. NaN never passes. Numbers count as arrays of shape ().
    """
    expected = np.asarray(expected)
    _demand(expected.dtype.kind in "biuf" and bool(np.isfinite(expected).all()),
            f"compare needs a finite expectation, found {expected!r}")
    if found is None:
        return f"{what} is None, expected {_kind(expected)}: is a `return` missing?"
    if isinstance(found, (str, dict)) or not isinstance(found, (np.ndarray, int, float, bool, list)):
        return f"{what} is a {type(found).__name__}, expected {_kind(expected)}"
    try:
        array = np.asarray(found)
        if array.dtype.kind not in "biuf":
            raise ValueError
    except ValueError:
        return f"{what} is a list of {len(found)} things, expected {_kind(expected)}"
    if array.shape != expected.shape:
        return f"{what} has shape {_shape(array.shape)}, expected {_shape(expected.shape)}"
    bad = int((~np.isfinite(array)).sum())
    if bad:
        return f"{what} holds {bad} of {array.size} numbers that are NaN or infinite, expected {first_numbers(expected)}"
    if array.size == 0:
        return None
    difference = np.abs(array.astype(np.float64) - expected.astype(np.float64)).max()
    if difference <= atol + rtol * np.abs(expected).max():
        return None
    if array.size == 1:
        return f"{what} is {first_numbers(array)}, expected {first_numbers(expected)}"
    return (f"{what} has the right shape {_shape(array.shape)} but other numbers: it begins {first_numbers(array)}, "
            f"expected {first_numbers(expected)} (largest difference {difference:.3g})")


def first_numbers(array, count: int = 3) -> str:
    """The first numbers of an array, short: [0.12, -1.3, 0.7, …]; a single number without brackets."""
    array = np.asarray(array)
    numbers = [f"{value:.4g}" if array.dtype.kind == "f" else str(value) for value in array.ravel()[:count]]
    if array.ndim == 0:
        return numbers[0]
    return "[" + ", ".join(numbers) + (", …]" if array.size > count else "]")


def _kind(expected: np.ndarray) -> str:
    return "a number" if expected.ndim == 0 else f"a tensor of shape {_shape(expected.shape)}"


def _shape(shape) -> str:
    return "() (a single number)" if len(shape) == 0 else str(tuple(shape))


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _as_tuples(record, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        _demand(not isinstance(value, str), f"{name} must be a list or tuple, found the text {value!r}")
        object.__setattr__(record, name, tuple(value))
