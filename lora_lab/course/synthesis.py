"""Explain numbers: which combination of named arrays, with named coefficients, gives exactly these numbers?

    values = sum_i c_i * bases[name_i],   c_i = +- coefficients[name]   (or a bare number if no name fits)

The sparsest combination is searched by least squares over small subsets of the bases. One probe alone can fool it
(with r=2 and alpha=4 the coefficient 2 may be alpha/r, r, or 2), so give several: the same bases with the same named
coefficients must reproduce the numbers of all of them. When two explanations of the same size fit equally, there is
none: unknown is better than wrong.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> def probe(r, alpha):
    ...     W0x, BAx = rng.normal(size=(5, 11)), rng.normal(size=(5, 11))
    ...     return Probe(2 * W0x + alpha * BAx, {"W0x": W0x, "BAx": BAx}, {"alpha": alpha, "alpha/r": alpha / r})
    >>> found = explain([probe(3, 5.0), probe(2, 7.0)])
    >>> found.text, found.coefficients
    ('2·W0x + alpha·BAx', {'W0x': '2', 'BAx': 'alpha'})
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

ALWAYS = {"1": 1.0, "2": 2.0, "1/2": 0.5}


@dataclass(frozen=True)
class Probe:
    """The student's numbers for one choice of inputs, with what they may be made of.

    values: an array; bases: name -> array, those of another shape than `values` are left out;
    coefficients: name -> number *for this probe*. 1, 2, 1/2 are always known, and each name also with a minus.
    """

    values: np.ndarray
    bases: Mapping[str, np.ndarray]
    coefficients: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """coefficient * base. `coefficient` is a name such as "alpha/r" or "-1", None where no name fits all probes;
    `value` is the number in the first probe."""

    base: str
    coefficient: str | None
    value: float

    def signed(self) -> tuple[bool, str]:
        """(is it subtracted?, the term without its sign)"""
        name = self.coefficient if self.coefficient is not None else f"{self.value:.4g}"
        amount = name.removeprefix("-")
        if amount == "1":
            return name != amount, self.base
        if not re.fullmatch(r"[\w.√]+", amount):
            amount = f"({amount})"
        return name != amount and name.startswith("-"), f"{amount}·{self.base}"


@dataclass(frozen=True)
class Explanation:
    terms: tuple[Term, ...]

    @property
    def text(self) -> str:
        text = ""
        for term in self.terms:
            minus, amount = term.signed()
            text += (" − " if minus else " + ") * bool(text) + "−" * (minus and not text) + amount
        return text or "0"

    @property
    def coefficients(self) -> dict[str, str | None]:
        """base -> name of its coefficient (None: a number without a name); absent bases are absent."""
        return {term.base: term.coefficient for term in self.terms}

    @property
    def named(self) -> bool:
        return all(term.coefficient is not None for term in self.terms)


def explain(probes: Probe | Sequence[Probe], max_terms: int = 3, rtol: float | None = None) -> Explanation | None:
    """The sparsest combination of at most `max_terms` bases that reproduces the values of all probes, or None.

    rtol: largest residual allowed, relative to the largest value. Default 1e-9 for float64 (rounding stays near 1e-14,
    and a mistake of any size lies far above) and 1e-4 for shorter types (a float32 sum keeps 1e-6).
    """
    probes = [probes] if isinstance(probes, Probe) else list(probes)
    values = [np.asarray(probe.values) for probe in probes]
    if not probes or any(v.dtype.kind not in "biuf" or v.size == 0 or not np.isfinite(v).all() for v in values):
        return None
    if rtol is None:
        rtol = max(1e-4 if v.dtype.kind == "f" and v.dtype.itemsize < 8 else 1e-9 for v in values)
    values = [v.astype(np.float64).ravel() for v in values]
    if all(not v.any() for v in values):
        return Explanation(())
    names = _usable_bases(probes)
    columns = [{name: np.asarray(probe.bases[name], dtype=np.float64).ravel() for name in names} for probe in probes]

    for size in range(1, max_terms + 1):
        found = []
        for subset in combinations(names, size):
            solutions = _solve(values, columns, subset, rtol)
            if solutions is not None:
                found.append(_name(probes, subset, solutions, rtol))
        if found:
            named = [explanation for explanation in found if explanation.named]
            best = named or found
            return best[0] if len(best) == 1 else None
    return None


def _usable_bases(probes) -> list[str]:
    """Names whose arrays are, in every probe, finite, not all zero, and of the shape of the values."""
    def usable(name):
        for probe in probes:
            base = np.asarray(probe.bases.get(name))
            if base.dtype.kind not in "biuf" or base.shape != np.asarray(probe.values).shape:
                return False
            if not (np.isfinite(base).all() and base.any()):
                return False
        return True

    return [name for name in probes[0].bases if usable(name)]


def _solve(values, columns, subset, rtol):
    """The coefficients in each probe, or None if the subset does not reproduce one of them or cannot be told apart."""
    solutions = []
    for v, named in zip(values, columns, strict=True):
        matrix = np.stack([named[name] for name in subset], axis=1)
        if len(v) < len(subset) + 2:                 # so few numbers that almost anything fits
            return None
        scale = np.linalg.norm(matrix, axis=0)
        solution, _, rank, singular = np.linalg.lstsq(matrix / scale, v, rcond=None)
        # Nearly parallel bases: the split between them is arbitrary, whatever the residual says.
        if rank < len(subset) or singular[-1] < 1e-6 * singular[0]:
            return None
        size = np.abs(v).max()
        if np.abs(matrix / scale @ solution - v).max() > rtol * size:
            return None
        contributions = np.abs(matrix / scale * solution).max(axis=0)
        if (contributions <= 10 * rtol * size).any():      # a term that adds nothing: a smaller subset says the same
            return None
        solutions.append(solution / scale)
    return solutions


def _name(probes, subset, solutions, rtol) -> Explanation:
    terms = []
    for position, base in enumerate(subset):
        numbers = [float(solution[position]) for solution in solutions]
        fitting = None
        for probe, number in zip(probes, numbers, strict=True):
            known = {**ALWAYS, **probe.coefficients}
            known |= {"-" + name: -value for name, value in known.items() if not name.startswith("-")}
            # The coefficients inherit the residual's error, enlarged by how well the bases can be told apart.
            here = {name for name, value in known.items() if abs(value - number) <= 1e3 * rtol * abs(number)}
            fitting = here if fitting is None else fitting & here
        terms.append(Term(base, fitting.pop() if len(fitting) == 1 else None, numbers[0]))
    return Explanation(tuple(terms))
