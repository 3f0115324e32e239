"""Wrong answers that people really give, and right ones in another style. One file per lab, labNN.py:

    from . import Mutant

    MUTANTS = {"2.1": [Mutant("forgets alpha / r", '''
    def lora_forward(x, W0, A, B, alpha):
        return x @ W0.T + x @ A.T @ B.T
    ''', "scaling_missing"), ...]}
    ALTERNATIVES = {"2.1": ['''
    def lora_forward(x, W0, A, B, alpha):
        ...
    ''', ...]}

An answer is source text that defines the exercise's object (`import torch`, `nn`, `F`, `math`, `np` are there), or the
object itself. `test_mutants.py` runs them all: every mutant must fail and be named by its key, every alternative pass.
"""

from __future__ import annotations

import linecache
import math
import textwrap
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

_number = count(1)


@dataclass(frozen=True)
class Mutant:
    """A wrong answer. `answer`: source text or object; `key`: the key of the Diagnosis that names it."""

    name: str
    answer: Any
    key: str


def load(answer, name: str):
    """The student's object: `answer` itself, or what its source text calls `name`. Each call gives a fresh one."""
    if not isinstance(answer, str):
        return answer
    source, file = textwrap.dedent(answer), f"<answer {next(_number)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)   # errors can show the line
    space = {"__name__": "__main__", "torch": torch, "nn": nn, "F": F, "math": math, "np": np}
    exec(compile(source, file, "exec"), space)
    if name not in space:
        raise NameError(f"this answer defines no {name!r}:\n{source}")
    return space[name]


def stub(name: str):
    """The exercise as handed out: its name, and a NotImplementedError."""
    def unsolved(*args, **kwargs):
        raise NotImplementedError(f"{name} is not written yet")

    return unsolved
