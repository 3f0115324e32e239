"""Every exercise of every lab: its mutants fail and are named, right answers pass, the stub does not."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from lora_lab.course.labs import labs, module_name
from lora_lab.course.runner import examine

from . import load, stub

EXERCISES = [exercise for lab in labs().values() for exercise in lab.exercises]
SEEDS = (0, 1)            # the notebook's inputs, and inputs as grading would draw them
MIN_MUTANTS, MIN_ALTERNATIVES = 3, 2


def answers_to(number: str) -> tuple[dict, dict]:
    """(MUTANTS, ALTERNATIVES) of a lab; empty where its file is missing, which test_there_are_enough reports."""
    name = f"{__package__}.{module_name(number)}"
    if importlib.util.find_spec(name) is None:
        return {}, {}
    module = importlib.import_module(name)
    return module.MUTANTS, module.ALTERNATIVES


def mutants_of(exercise) -> list:
    return answers_to(exercise.lab)[0].get(exercise.id, [])


def alternatives_of(exercise) -> list:
    return answers_to(exercise.lab)[1].get(exercise.id, [])


MUTANTS = [(exercise, mutant) for exercise in EXERCISES for mutant in mutants_of(exercise)]
RIGHT = [(exercise, "the lab's own", None) for exercise in EXERCISES] + [
    (exercise, f"alternative {number}", answer)
    for exercise in EXERCISES
    for number, answer in enumerate(alternatives_of(exercise), start=1)
]


@pytest.mark.parametrize(("exercise", "mutant"), [pytest.param(e, m, id=f"{e.id}-{m.name}") for e, m in MUTANTS])
def test_a_mutant_fails_and_is_named(exercise, mutant, record_property):
    results = [examine(exercise, load(mutant.answer, exercise.name), seed, seconds=10, strict=True) for seed in SEEDS]
    found = ["-" if r.diagnosis is None else r.diagnosis.key for r in results]
    record_property("mutant", [exercise.id, mutant.name, "passed!" if any(r.passed for r in results) else found[0]])
    for result in results:
        assert not result.passed, f"this wrong answer passes exercise {exercise.id}"
    assert found == [mutant.key] * len(SEEDS), results[0].first_failure.failure


@pytest.mark.parametrize(("exercise", "name", "answer"), [pytest.param(*r, id=f"{r[0].id}-{r[1]}") for r in RIGHT])
def test_right_answers_pass(exercise, name, answer):
    for seed in (*SEEDS, 2, 3, 4):         # a right answer must pass on any inputs that grading may draw
        student = exercise.fallback() if answer is None else load(answer, exercise.name)
        result = examine(exercise, student, seed, strict=True)
        first = result.first_failure
        assert first is None, f"inputs {seed}, {first.title}: {first.failure}"


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_the_stub_does_not_pass(exercise):
    assert not examine(exercise, stub(exercise.name)).passed


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_answers_that_are_nothing_do_not_pass(exercise):
    for nothing in (lambda *a, **k: None, lambda *a, **k: float("nan"), lambda *a, **k: a[0] if a else 0, None, 7):
        assert not examine(exercise, nothing).passed


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_there_are_enough_of_them(exercise):
    mutants, alternatives = mutants_of(exercise), alternatives_of(exercise)
    keys = {mutant.key for mutant in mutants}
    assert len(keys) >= MIN_MUTANTS, f"exercise {exercise.id} has mutants with {len(keys)} keys: {sorted(keys)}"
    assert len(alternatives) >= MIN_ALTERNATIVES, f"exercise {exercise.id} has {len(alternatives)} alternatives"
    assert len({mutant.name for mutant in mutants}) == len(mutants), "two mutants have the same name"


@pytest.mark.parametrize("number", labs())
def test_no_answers_to_exercises_that_do_not_exist(number):
    known = {exercise.id for exercise in labs()[number].exercises}
    for answers in answers_to(number):
        assert set(answers) <= known
