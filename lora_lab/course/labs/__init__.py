"""The labs. Each file labNN.py in this folder defines LAB (see lora_lab.course.exercise); adding a file adds a lab."""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache

from ..exercise import Exercise, Lab, Prediction


@cache
def labs() -> dict[str, Lab]:
    """number -> Lab, in the order of the numbers: "0", "2", "2b", "10"."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if re.fullmatch(r"lab\d\d[a-z]?", module.name):
            lab = getattr(importlib.import_module(f"{__name__}.{module.name}"), "LAB", None)
            if lab is None:
                continue
            if module_name(lab.number) != module.name:
                raise ValueError(f"{module.name}.py defines lab {lab.number!r}: that belongs in {module_name(lab.number)}.py")
            found[lab.number] = lab
    return dict(sorted(found.items(), key=lambda item: module_name(item[0])))


def module_name(number: str) -> str:
    """The file of a lab: "2" -> "lab02", "2b" -> "lab02b"."""
    digits, letter = re.fullmatch(r"(\d+)([a-z]?)", number).groups()
    return f"lab{int(digits):02d}{letter}"


def find_lab(number: str) -> Lab:
    if number not in labs():
        raise KeyError(f"there is no lab {number!r}; there are: {', '.join(labs()) or 'none yet'}")
    return labs()[number]


def find_exercise(id: str) -> Exercise:
    """The exercise with this id; a KeyError that lists what exists if there is none."""
    return _find(id, "exercise", "exercises")


def find_prediction(id: str) -> Prediction:
    """The prediction with this id; a KeyError that lists what exists if there is none."""
    return _find(id, "prediction", "predictions")


def _find(id, what: str, group: str):
    lab = labs().get(str(id).split(".")[0])
    for item in getattr(lab, group, ()):
        if item.id == id:
            return item
    near = [lab] if lab is not None else labs().values()
    there = [item.id for lab in near for item in getattr(lab, group)]
    raise KeyError(f"there is no {what} {id!r}; there are: {', '.join(there) or 'none yet'}")
