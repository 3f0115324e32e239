"""Lab 01, Rank: its exercises. Sources: Eckart and Young 1936; Hu et al. 2021 (arXiv 2106.09685), section 4.1. Oracles are numpy's SVD."""

from __future__ import annotations

import math
import re

import numpy as np
import torch

from lora_lab.counting import breakeven_rank
from lora_lab.spectra import best_rank_r, energy

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script
from .formulas import first_match

# A wide matrix and a tall one; with k = min(m, n), the numbers r - 1, r, r + 1, k - r, k, m and n are kept apart (r + 1 = k - r would make
# S[r + 1 :] and S[-r:] the same), so that no two mistakes give the same numbers.
WIDE, TALL = dict(m=7, n=11, r=2), dict(m=12, n=8, r=3)


# A right answer may compute in float32, whose sums of a few products are off by 1e-6; a mistake changes the first digits.
F32 = 1e-5


def best_of_rank(W, r: int) -> np.ndarray:
    """The oracle: the sum of the first r terms S_i u_i v_i^T of numpy's SVD, term by term."""
    U, S, Vh = np.linalg.svd(np.asarray(W, dtype=np.float64), full_matrices=False)
    return np.sum([S[i] * np.multiply.outer(U[:, i], Vh[i]) for i in range(r)], axis=0)


def explain_product(found, W, r: int, what: str = "what you return") -> Diagnosis | None:
    """Which terms of W's SVD, with which weights, make up `found`? None if it is the best matrix of rank r, or no such sum at all.

    Any sum of terms w_i u_i v_i^T is diagonal between U and Vh; its diagonal holds the weights.
    """
    W, found = np.asarray(W, dtype=np.float64), np.asarray(found)
    if found.shape != W.shape or found.dtype.kind not in "iuf" or not np.isfinite(found).all():
        return None
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    weights = np.diag(U.T @ found @ Vh.T)
    limit = 1e-5 * max(np.abs(found).max(), 1e-300)  # float32 inside leaves 1e-7, a term that is there at least 1e-3
    if np.abs(found - (U * weights) @ Vh).max() > limit:
        return None
    used = [i for i, w in enumerate(weights) if abs(w) > limit]
    if not used:
        return Diagnosis("returns_zero", f"{what} is zero everywhere")
    # 1e-4: the powers of singular values of a random matrix differ in their first digits.
    power = next((p for p in (1, 0, 2, 0.5, -1, 3) if np.allclose(weights[used], S[used] ** p, rtol=1e-4)), None)
    first = used == list(range(len(used)))
    if power is None:
        ratio = weights[used] / S[used]
        if first and len(used) == r and np.allclose(ratio, ratio[0], rtol=1e-4):
            return Diagnosis("scaled", f"{what} is {ratio[0]:.4g} times the best matrix of rank {r}: that factor is too many")
        return None
    if power != 1:
        key, text = {
            0: ("S_missing", "the singular values are left out: all directions weigh the same"),
            2: ("S_twice", "the singular values enter twice: the weights are S²"),
            0.5: ("S_root", "the weights are sqrt(S): the other square root is missing"),
            -1: ("S_inverse", "you divide by the singular values instead of multiplying"),
            3: ("S_thrice", "the weights are S³: the singular values enter three times"),
        }[power]
        return Diagnosis(key, text)
    k = len(S)
    if first and len(used) == r:
        return None
    if first and len(used) == k:
        return Diagnosis("not_truncated", f"nothing was cut: all {k} terms are there, for r = {r}")
    if first and abs(len(used) - r) == 1:
        return Diagnosis("off_by_one", f"for r = {r} you keep {len(used)} terms; the slice [:r] has exactly r")
    if used == list(range(r, k)):
        return Diagnosis("remainder", "this is what the best matrix of rank r leaves out: the other terms, from r on")
    if used == list(range(k - r, k)):
        return Diagnosis("smallest", f"you keep the last {r} singular values, the smallest: torch sorts them with the largest first")
    if len(used) == 1:
        return Diagnosis("one_term", f"this is term {used[0] + 1} alone; asked is the sum of the first {r}")
    return Diagnosis("other_terms", f"you keep the terms {', '.join(str(i + 1) for i in used)}; asked are the first {r}")


def _multiplied(error) -> tuple[int, ...]:
    """The four sizes in torch's "shapes cannot be multiplied (7x3 and 11x3)"; empty for another error."""
    match = re.search(r"\((\d+)x(\d+) and (\d+)x(\d+)\)", "" if error is None else error.message)
    return tuple(map(int, match.groups())) if match else ()


# ---------------------------------------------------------------- 1.1 truncate


def _truncate_probe(size: dict):
    def probe(rng):
        s = Script()
        W = rng.normal(size=(size["m"], size["n"]))
        U, S, Vh = (s.input(name, part) for name, part in zip("USV", np.linalg.svd(W, full_matrices=False), strict=True))
        s.send("X", s.call(U, S, Vh, size["r"]))
        return s

    return probe


def _given_matrix(inputs) -> np.ndarray:
    return np.einsum("mk,k,kn->mn", inputs["U"], inputs["S"], inputs["V"])


def _truncate_judge(size: dict):
    what = f"truncate(U, S, Vh, {size['r']})"
    return lambda inputs, answers: compare(answers["X"], best_of_rank(_given_matrix(inputs), size["r"]), what=what, rtol=F32)


def _diagnose_truncate(evidence: list[Evidence]) -> Diagnosis | None:
    by_columns = Diagnosis(
        "columns_of_Vh", "you cut columns of Vh. The right singular vectors are its rows: torch returns V transposed, so Vh[:r], as it is"
    )
    for e, size in zip(evidence[:2], (WIDE, TALL), strict=True):
        m, n, r = size["m"], size["n"], size["r"]
        error, line = e.error, getattr(getattr(e.error, "where", None), "text", "")
        sizes = _multiplied(error)
        if sizes:
            if sizes[0] == 1 and sizes[1] == m:
                return Diagnosis(
                    "S_as_vector", "U[:, :r] @ S[:r] sums over the directions. S scales the columns: U[:, :r] * S[:r], or @ torch.diag(S[:r])"
                )
            if sizes[2:] == (n, r) and sizes[1] == r:
                return Diagnosis("Vh_transposed", "Vh is the transposed V already: no .T is needed, Vh[:r] is (r, n)")
            if size is WIDE and sizes == (m, r, m, m):
                return Diagnosis("S_whole", "U is cut to r columns, but S is not: S[:r]")
            if sizes[2:] == (min(m, n), n) and sizes[1] == r:
                return Diagnosis("Vh_whole", "U is cut to r columns, but Vh still has all its rows: Vh[:r]")
            if sizes[2:] == (min(m, n), r) and sizes[1] == r:
                return by_columns
        if error is not None and re.search(rf"tensor a \(({r}|{min(m, n)})\) must match .* tensor b \({n}\)", error.message):
            return Diagnosis("elementwise", "`*` multiplies entry by entry; the product of two matrices is `@`")
        if error is not None and re.search(r"\bU\s*\[\s*:\s*r\s*(,\s*:\s*)?\]", line):
            return Diagnosis("rows_of_U", "U[:r] cuts rows. The left singular vectors are the columns of U: U[:, :r]")
        X = e.answers.get("X")
        if isinstance(X, list) and len(X) > 1:
            return Diagnosis("parts", "you return the cut parts; asked is one matrix, their product")
        if not isinstance(X, np.ndarray):
            continue
        if X.shape == (n, m) and compare(X.T, best_of_rank(_given_matrix(e.inputs), r), rtol=F32) is None:
            return Diagnosis("transposed", "this is the right matrix, transposed")
        if X.shape == (r, r):
            return Diagnosis("corner", "you cut rows and columns of the matrix, its corner; cut the sum, and the shape stays (m, n)")
        if compare(X, e.inputs["U"][:, :r] * e.inputs["S"][:r], rtol=F32) is None:
            return Diagnosis("half", f"({m}, {r}): this is U, cut and weighted; multiply it by the first r rows of Vh")
        left = e.inputs["U"][:, :r] * e.inputs["S"][:r]
        columns = e.inputs["V"][:, :r].T
        if left.shape[1] == columns.shape[0] and X.shape == (m, columns.shape[1]) and compare(X, left @ columns, rtol=F32) is None:
            return by_columns
        found = explain_product(X, _given_matrix(e.inputs), r)
        if found is not None:
            return found
    return None


EXERCISE_1 = Exercise(
    id="1.1",
    title="Cut the sum",
    difficulty=1,
    minutes=4,
    points=2,
    name="truncate",
    cases=(
        Case("the sum of the first r terms S_i u_i v_iᵀ", _truncate_probe(WIDE), _truncate_judge(WIDE)),
        Case("also for a tall matrix and another r", _truncate_probe(TALL), _truncate_judge(TALL)),
        Case("r = 1: one column times one row", _truncate_probe({**WIDE, "r": 1}), _truncate_judge({**WIDE, "r": 1})),
        Case("with all terms it is the matrix itself", _truncate_probe({**TALL, "r": 8}), _truncate_judge({**TALL, "r": 8})),
    ),
    diagnose=_diagnose_truncate,
    hints=(
        "Each term is a column of U times a row of Vh. Which slices give the first r of each?",
        "U[:, :r] is (m, r), Vh[:r] is (r, n). Multiplying the columns of U by S needs no loop: U[:, :r] * S[:r].",
        "return (U[:, :r] * S[:r]) @ Vh[:r]",
    ),
    read="the formula above, and torch.linalg.svd's documentation on Vh",
    fallback=lambda: _lab_truncate,
)


def _lab_truncate(U, S, Vh, r):
    """The lab's own version, through lora_lab.spectra."""
    return best_rank_r((U * S) @ Vh, r)[0]


# ---------------------------------------------------------------- 1.2 the error, from the spectrum alone


def _error_probe(size: dict):
    def probe(rng):
        s = Script()
        W = rng.normal(size=(size["m"], size["n"]))
        s.input("W", W)  # for the judge, who measures what the student computes without it
        S = s.input("S", np.linalg.svd(W, compute_uv=False))
        s.send("error", s.call(S, size["r"]))
        return s

    return probe


def measured_error(W, r: int) -> float:
    """The oracle: build the matrix of rank r and measure its distance."""
    return float(np.sqrt(np.square(W - best_of_rank(W, r)).sum() / np.square(W).sum()))


def _error_judge(size: dict):
    def judge(inputs, answers):
        what = f"relative_error(S, {size['r']})"
        # atol: at full rank, 1 minus the energy is rounding, 1e-16, and its root 1e-8
        return compare(answers["error"], measured_error(inputs["W"], size["r"]), what=what, rtol=F32, atol=1e-6)

    return judge


def _diagnose_error(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(e.answers.get("error"), e.inputs["S"], size["r"]) for e, size in zip(evidence[:2], (WIDE, TALL), strict=True)]
    if any(isinstance(found, np.ndarray) and found.ndim == 1 and found.size > 1 for found, _, _ in runs):
        return Diagnosis("not_summed", "this is a row of numbers; sum what is left out, then divide and take the root: one number")
    if any(not isinstance(found, (int, float, np.ndarray)) for found, _, _ in runs):
        return None
    power = lambda x: np.square(x).sum()  # noqa: E731
    formulas = {
        "energy": lambda S, r: power(S[:r]) / power(S),
        "kept": lambda S, r: math.sqrt(power(S[:r]) / power(S)),
        "no_root": lambda S, r: power(S[r:]) / power(S),
        "not_squared": lambda S, r: S[r:].sum() / S.sum(),
        "root_of_sums": lambda S, r: math.sqrt(S[r:].sum() / S.sum()),
        "absolute": lambda S, r: math.sqrt(power(S[r:])),
        "absolute_square": lambda S, r: power(S[r:]),
        "spectral": lambda S, r: S[r] / S[0],
        "next_value": lambda S, r: S[r],
        "by_first": lambda S, r: math.sqrt(power(S[r:])) / S[0],
        "by_sum": lambda S, r: math.sqrt(power(S[r:])) / S.sum(),
        "by_kept": lambda S, r: math.sqrt(power(S[r:]) / power(S[:r])),
        "per_cent": lambda S, r: 100 * math.sqrt(power(S[r:]) / power(S)),
        "one_minus_kept": lambda S, r: 1 - math.sqrt(power(S[:r]) / power(S)),
        "root_missing_below": lambda S, r: math.sqrt(power(S[r:])) / power(S),
        "upside_down": lambda S, r: math.sqrt(power(S) / power(S[r:])),
        "not_squared_by_kept": lambda S, r: S[r:].sum() / S[:r].sum(),
        "root_mean": lambda S, r: math.sqrt(np.square(S[r:]).mean()),
        "smallest": lambda S, r: math.sqrt(power(S[-r:]) / power(S)),
        "mean": lambda S, r: math.sqrt(np.square(S[r:]).mean() / np.square(S).mean()),
        "off_by_one_early": lambda S, r: math.sqrt(power(S[r - 1 :]) / power(S)),
        "off_by_one_late": lambda S, r: math.sqrt(power(S[r + 1 :]) / power(S)),
    }
    texts = {
        "energy": "this is the share of energy that is kept; the error is about the rest, S[r:]",
        "kept": "this is about the part that is kept, S[:r]; the error is what is left out, S[r:]",
        "no_root": "this is the square of the error, the share of energy that is lost: take the square root",
        "not_squared": "S enters squared: the Frobenius norm is sqrt(S_1² + S_2² + …)",
        "root_of_sums": "the root is there, but the squares under it are missing",
        "absolute": "this is the absolute error; divide by the norm of the whole matrix, sqrt(sum of all S²)",
        "absolute_square": "this is the absolute error, squared: divide by the sum of all S², then take the root",
        "spectral": "this is the largest term left out over the largest of all (the spectral norm); the Frobenius norm "
        "sums all",
        "next_value": "this is the first singular value left out; the Frobenius norm sums the squares of all that are",
        "by_first": "you divide by S_1 alone; the norm of the matrix is sqrt(sum of all S²)",
        "by_sum": "you divide by the sum of S; the norm of the matrix is sqrt(sum of all S²)",
        "by_kept": "you divide by the norm of the part that is kept; relative means: to the whole matrix",
        "per_cent": "this is in per cent; asked is a share, between 0 and 1",
        "one_minus_kept": "norms don't add up to 1, squares do: sqrt(1 - energy), or sum S[r:]² directly",
        "root_missing_below": "the root is taken of the upper sum alone: both sums stand under it",
        "upside_down": "the fraction is upside down",
        "not_squared_by_kept": "S enters squared, and relative means: to the whole matrix, all of S",
        "root_mean": "this is the size of one term left out; sum the squares, and divide by the sum of all S²",
        "smallest": "S[-r:] are the last r values; left out are all from r on, S[r:]",
        "mean": "you take means over different numbers of terms; take sums",
        "off_by_one_early": "you leave out one term too many: with r kept, the rest begins at S[r]",
        "off_by_one_late": "you leave out one term too few: with r kept, the rest begins at S[r]",
    }
    candidates = {key: [f(S, r) for _, S, r in runs] for key, f in formulas.items()}
    key = first_match([found for found, _, _ in runs], candidates, rtol=F32)
    return Diagnosis(key, texts[key]) if key else None


EXERCISE_2 = Exercise(
    id="1.2",
    title="The error without the picture",
    difficulty=1,
    minutes=4,
    points=2,
    name="relative_error",
    cases=(
        Case("equals the distance that is measured on the matrices", _error_probe(WIDE), _error_judge(WIDE)),
        Case("also for a tall matrix and another r", _error_probe(TALL), _error_judge(TALL)),
        Case("nothing is missing at full rank", _error_probe({**TALL, "r": 8}), _error_judge({**TALL, "r": 8})),
    ),
    diagnose=_diagnose_error,
    hints=(
        "The terms that are left out are S[r:]. What is the norm of their sum, when all of them are orthogonal?",
        "Orthogonal terms add up by Pythagoras: ‖sum‖² = sum of S_i². Divide by the same sum over all of S.",
        "return ((S[r:] ** 2).sum() / (S ** 2).sum()) ** 0.5",
    ),
    read="the two formulas above this exercise",
    fallback=lambda: lambda S, r: 0.0 if r >= len(S) else math.sqrt(max(0.0, 1 - float(energy(S)[r - 1]))),
)


# ---------------------------------------------------------------- 1.3 two factors


def _factors(answers, m: int, n: int, r: int):
    """(B, A), or a sentence that says what came instead."""
    parts = answers.get("factors")
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, np.ndarray) for part in parts):
        names = {np.ndarray: "one tensor", type(None): "None"}
        found = f"{len(parts)} things" if isinstance(parts, list) else names.get(type(parts), type(parts).__name__)
        return f"return two tensors, B and A; found {found}"
    B, A = parts
    if B.shape != (m, r) or A.shape != (r, n):
        return f"for a matrix ({m}, {n}) and r = {r}, B is ({m}, {r}) and A is ({r}, {n}); found {B.shape} and {A.shape}"
    if any(part.dtype.kind not in "iuf" or not np.isfinite(part).all() for part in parts):
        return "B and A should hold finite real numbers"
    return B, A


def _explain_shapes(parts, m: int, n: int, r: int) -> Diagnosis | None:
    """What is wrong when (B, A) have not the shapes (m, r) and (r, n)."""
    k = min(m, n)
    if isinstance(parts, np.ndarray) and parts.shape == (m, n):
        return Diagnosis("one_matrix", "you return the product; asked are its two factors, B and A")
    if isinstance(parts, list) and len(parts) == 3:
        return Diagnosis("three_factors", "these are three parts, U, S and Vh; put S into B or A, or its root into each, and return two")
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, np.ndarray) for part in parts):
        return None
    shapes = tuple(part.shape for part in parts)
    if shapes == ((r, n), (m, r)):
        return Diagnosis("swapped", "the factors come back in the other order: return B, A")
    if shapes in {((r, m), (n, r)), ((r, m), (r, n)), ((m, r), (n, r))}:
        return Diagnosis("transposed", "a factor is transposed: B is (m, r), a column for each direction; A is (r, n), a row for each")
    if shapes == ((n, r), (r, m)):
        return Diagnosis("of_the_transpose", "these are factors of the transposed matrix: swap rows and columns")
    if shapes in {((m, k), (k, n)), ((m, m), (m, n)), ((m, m), (n, n)), ((m, n), (n, n))}:
        return Diagnosis("not_truncated", f"nothing was cut: B should have {r} columns and A {r} rows")
    if shapes in {((m, r), (k, n)), ((m, r), (n, n)), ((m, k), (r, n)), ((m, m), (r, n))}:
        which, rows = ("A", "Vh[:r]") if shapes[0] == (m, r) else ("B", "U[:, :r]")
        return Diagnosis("one_not_cut", f"{which} is not cut: it takes the first r directions as well, {rows}")
    if shapes[0] == (m, r) and shapes[1] in {(r, k), (r, r)}:
        return Diagnosis(
            "columns_of_Vh", "A is cut the wrong way: Vh[:r], the first r rows of Vh, is (r, n). (torch.svd returns V, torch.linalg.svd Vh)"
        )
    if shapes[0] in {(r, k), (r, r), (r, m)}:
        return Diagnosis("rows_of_U", "U[:r] cuts rows; the left singular vectors are the columns of U: U[:, :r]")
    if shapes[0][:1] == (m,) and shapes[1][1:] == (n,) and shapes[0][1:] == shapes[1][:1]:
        return Diagnosis("other_rank", f"these are factors of rank {shapes[1][0]}, asked is r = {r}: B has r columns, A has r rows")
    return None


def _explain_failed_product(e: Evidence, m: int, n: int, r: int) -> Diagnosis | None:
    """A wrong slice often ends in an error of torch's; which one, the line tells."""
    line = getattr(getattr(e.error, "where", None), "text", "")
    clash = re.search(r"tensor a \((\d+)\) must match the size of tensor b \((\d+)\)", e.error.message)
    if clash and {int(clash[1]), int(clash[2])} == {max(m, n), min(m, n)}:
        return Diagnosis(
            "full_matrices", "U is (m, m) or Vh is (n, n) here: ask torch.linalg.svd for full_matrices=False, then U is (m, k) and Vh (k, n)"
        )
    if re.search(r"\bU\s*\[\s*:\s*r\s*\]", line):
        return Diagnosis("rows_of_U", "U[:r] cuts rows; the left singular vectors are the columns of U: U[:, :r]")
    S_r, V_r = r"\bS\w*\s*\[\s*:\s*r\s*\](\s*\.\s*sqrt\(\)|\s*\*\*\s*0?\.5)?", r"\bV\w*\s*\[\s*:\s*r\s*\]"
    if re.search(rf"{S_r}\s*\*\s*{V_r}|{V_r}\s*\*\s*{S_r}", line):
        return Diagnosis("rows_not_scaled", "S[:r] * Vh[:r] lines S up with the columns; for its rows write S[:r, None] * Vh[:r]")
    return None


def _best_probe(size: dict, exact: bool = False):
    def probe(rng):
        m, n, r = size["m"], size["n"], size["r"]
        s = Script()
        W = rng.normal(size=(m, r)) @ rng.normal(size=(r, n)) if exact else rng.normal(size=(m, n))
        s.send("factors", s.call(s.input("W", W), r))
        return s

    return probe


def _best_shapes(size: dict):
    def judge(inputs, answers):
        found = _factors(answers, **size)
        return found if isinstance(found, str) else None

    return judge


def _best_judge(size: dict):
    def judge(inputs, answers):
        found = _factors(answers, **size)
        if isinstance(found, str):
            return found
        product = found[0].astype(np.float64) @ found[1]
        # rtol: an iterative solver or float32 inside is a right answer too; the second-best choices are off by a tenth and more
        return compare(product, best_of_rank(inputs["W"], size["r"]), what="B @ A", rtol=1e-4)

    return judge


def _diagnose_best(evidence: list[Evidence]) -> Diagnosis | None:
    for e, size in zip(evidence[1:3], (WIDE, TALL), strict=True):
        m, n, r = size["m"], size["n"], size["r"]
        if e.error is not None:
            found = _explain_failed_product(e, m, n, r)
            if found is not None:
                return found
            continue
        parts = _factors(e.answers, m, n, r)
        if isinstance(parts, str):
            found = _explain_shapes(e.answers.get("factors"), m, n, r)
            if found is not None:
                return found
            continue
        product = parts[0].astype(np.float64) @ parts[1]
        found = explain_product(product, e.inputs["W"], r, what="B @ A")
        if found is not None:
            return found
        if e.failure:
            U, S, Vh = np.linalg.svd(e.inputs["W"], full_matrices=False)
            if compare(product, (U[:, :r] * S[:r]) @ Vh[:, :r].T if n == len(S) else product + 1, rtol=1e-6) is None:
                return Diagnosis("columns_of_Vh", "A is made of columns of Vh; the right singular vectors are its rows, Vh[:r]")
            W = e.inputs["W"]
            error, best = (np.linalg.norm(W - X) / np.linalg.norm(W) for X in (product, best_of_rank(W, r)))
            return Diagnosis(
                "not_the_best",
                f"B @ A has rank {r}, but it is not the nearest such matrix: its relative error is {error:.3f}, the best one's {best:.3f}",
            )
    return None


EXERCISE_3 = Exercise(
    id="1.3",
    title="Two thin factors",
    difficulty=2,
    minutes=5,
    points=3,
    name="best_factors",
    cases=(
        Case("B is (m, r), A is (r, n)", _best_probe(WIDE), _best_shapes(WIDE)),
        Case("B A is the nearest matrix of rank r", _best_probe(WIDE), _best_judge(WIDE)),
        Case("also for a tall matrix and another r", _best_probe(TALL), _best_judge(TALL)),
        Case("a matrix of rank r comes back whole", _best_probe(TALL, exact=True), _best_judge(TALL)),
    ),
    diagnose=_diagnose_best,
    hints=(
        "truncate multiplies three things. Where do you have to open a bracket to get two?",
        "U, S, Vh = torch.linalg.svd(W, full_matrices=False). S may go into B, into A, or its square root into both.",
        "B = U[:, :r] * S[:r]; A = Vh[:r]; return B, A",
    ),
    read="exercise 1.1, and torch.linalg.svd's documentation",
    fallback=lambda: _lab_factors,
)


def _lab_factors(W, r):
    """Balanced: each factor carries the square root of S."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:r].sqrt()
    return U[:, :r] * root, root[:, None] * Vh[:r]


# ---------------------------------------------------------------- 1.4 rank under noise

# The spectra are chosen so that every threshold one may think of counts another number, in one of the two at least. All are noise times
# something, but for the last three; 3.6 also lies above noise · 2 √m = 3.46, the edge of someone who takes min(m, n) for n:
#                 1    √m    √n  √(m + n)  √m + √n  √(m n)  m + n   S_1   noise √m + √n  √m + noise √n  √m + √n
# 12 x 16, 0.5  0.5  1.73  2.00    2.65      3.73     6.93   14.0  20.0       5.73           5.46         7.46
# 25 x 9, 0.2   0.2  1.00  0.60    1.17      1.60     3.00    6.8  10.0       4.00           5.60         8.00
NOISY = (
    dict(m=12, n=16, noise=0.5, S=(40, 16, 9, 6.2, 5.6, 4.5, 3.6, 2.3, 1.93, 1.8, 1.2, 0.2)),
    dict(m=25, n=9, noise=0.2, S=(50, 9, 4.6, 2.2, 1.9, 1.45, 1.21, 1.08, 0.8)),
)


def _designed_probe(design: dict):
    def probe(rng):
        s, k = Script(), len(design["S"])
        U, _ = np.linalg.qr(rng.normal(size=(design["m"], k)))
        V, _ = np.linalg.qr(rng.normal(size=(design["n"], k)))
        S = np.asarray(design["S"]) * rng.uniform(0.98, 1.02, size=k)  # no two of the thresholds and values come that close
        s.send("rank", s.call(s.input("W", (U * S) @ V.T), design["noise"]))
        return s

    return probe


def _edge(W, noise: float) -> float:
    return noise * (math.sqrt(W.shape[0]) + math.sqrt(W.shape[1]))


def _designed_judge(design: dict):
    def judge(inputs, answers):
        expected = int((np.linalg.svd(inputs["W"], compute_uv=False) > _edge(inputs["W"], design["noise"])).sum())
        return compare(answers["rank"], expected, what=f"numerical_rank of a {design['m']} x {design['n']} matrix")

    return judge


def _noise_probe(true_rank: int):
    def probe(rng):
        # 0.8: at 1.0 the largest singular value of pure noise exceeds the edge in one draw of ten; at 0.8 practically never
        # (12 deviations of the Tracy-Widom law), and a right answer must pass on any draw.
        s, noise = Script(), 0.8 * rng.normal(size=(40, 60))
        W = rng.normal(size=(40, max(true_rank, 1))) @ rng.normal(size=(max(true_rank, 1), 60)) * bool(true_rank)
        s.send("rank", s.call(s.input("W", W + 0.5 * noise), 0.5))
        return s

    return probe


def _noise_judge(true_rank: int, what: str):
    return lambda inputs, answers: compare(answers["rank"], true_rank, what=what)


def _diagnose_rank(evidence: list[Evidence]) -> Diagnosis | None:
    found = [e.answers.get("rank") for e in evidence[:2]]
    if any(isinstance(value, np.ndarray) and value.ndim >= 1 for value in found):
        if all(isinstance(value, np.ndarray) and value.ndim == 1 for value in found):
            return Diagnosis("values_not_count", "this is a row of numbers, one per singular value; count those above: (S > edge).sum()")
        return None
    if any(not isinstance(value, (int, float, np.ndarray)) for value in found):
        return None
    thresholds = {
        "no_threshold": lambda m, n, q, S: 0.0,
        "noise_alone": lambda m, n, q, S: q,
        "rows_alone": lambda m, n, q, S: q * math.sqrt(m),
        "columns_alone": lambda m, n, q, S: q * math.sqrt(n),
        "root_of_sum": lambda m, n, q, S: q * math.sqrt(m + n),
        "root_of_product": lambda m, n, q, S: q * math.sqrt(m * n),
        "no_roots": lambda m, n, q, S: q * (m + n),
        "relative": lambda m, n, q, S: q * S[0],
        "longer_side": lambda m, n, q, S: q * math.sqrt(max(m, n)),
        "shorter_side": lambda m, n, q, S: q * math.sqrt(min(m, n)),
        "min_for_n": lambda m, n, q, S: q * (math.sqrt(m) + math.sqrt(min(m, n))),
        "relative_edge": lambda m, n, q, S: q * (math.sqrt(m) + math.sqrt(n)) * S[0],
        "noise_missing": lambda m, n, q, S: math.sqrt(m) + math.sqrt(n),
        "noise_on_rows": lambda m, n, q, S: q * math.sqrt(m) + math.sqrt(n),
        "noise_on_columns": lambda m, n, q, S: math.sqrt(m) + q * math.sqrt(n),
        "noise_squared": lambda m, n, q, S: q**2 * (math.sqrt(m) + math.sqrt(n)),
        "S_squared": lambda m, n, q, S: math.sqrt(q * (math.sqrt(m) + math.sqrt(n))),
        "mean": lambda m, n, q, S: S.mean(),
    }
    texts = {
        "no_threshold": "every singular value counts: noise makes all of them larger than rounding, so this is min(m, "
        "n)",
        "noise_alone": "you compare with the noise of one entry; a matrix of m × n such entries has singular values up to "
        "noise · (√m + √n)",
        "rows_alone": "the edge has two parts, √m for the rows and √n for the columns; √n is missing",
        "columns_alone": "the edge has two parts, √m for the rows and √n for the columns; √m is missing",
        "root_of_sum": "√(m + n) is smaller than √m + √n: take the two roots first, then add",
        "root_of_product": "noise · √(m n) is the norm of the whole noise; spread over all directions, none has more than noise "
        "· (√m + √n)",
        "no_roots": "the square roots are missing: √m + √n, not m + n",
        "relative": "you compare with noise times the largest singular value; the noise does not grow with the signal",
        "longer_side": "you take the longer side alone; the edge adds both: √m + √n",
        "shorter_side": "you take the shorter side alone; the edge adds both: √m + √n",
        "min_for_n": "n is the number of columns of W, not how many singular values there are",
        "relative_edge": "you divide S by the largest first; the edge is for S as it is",
        "noise_missing": "√m + √n belongs to noise of size 1; multiply it by the noise",
        "noise_on_rows": "the noise multiplies √m alone: put brackets around √m + √n",
        "noise_on_columns": "the noise multiplies √n alone: put brackets around √m + √n",
        "noise_squared": "the noise enters once, not squared",
        "S_squared": "you compare S² with the edge; compare S itself",
        "mean": "you compare with the mean of S, which the signal moves; the edge depends on the noise and the shape alone",
    }
    counts = {key: [] for key in (*thresholds, "one_more", "one_less", "below")}
    for e, design in zip(evidence[:2], NOISY, strict=True):
        W = e.inputs["W"]
        S, (m, n), q = np.linalg.svd(W, compute_uv=False), W.shape, design["noise"]
        right = int((S > _edge(W, q)).sum())
        counts["one_more"].append(right + 1)
        counts["one_less"].append(right - 1)
        counts["below"].append(len(S) - right)
        for key, threshold in thresholds.items():
            counts[key].append(int((S > threshold(m, n, q, S)).sum()))
    texts["one_more"] = "one too many: the index of the first value below the edge is already the count, since indices begin at 0"
    texts["one_less"] = "one too few: an index begins at 0, a count at 1"
    texts["below"] = "you count the values below the edge, those of the noise"
    key = first_match(found, counts)
    return Diagnosis(key, texts[key]) if key else None


EXERCISE_4 = Exercise(
    id="1.4",
    title="Rank under noise",
    difficulty=2,
    minutes=5,
    points=3,
    name="numerical_rank",
    cases=(
        Case("counts the singular values above the edge", _designed_probe(NOISY[0]), _designed_judge(NOISY[0])),
        Case("also for a tall matrix with less noise", _designed_probe(NOISY[1]), _designed_judge(NOISY[1])),
        Case("finds the rank of a rank-5 matrix in noise", _noise_probe(5), _noise_judge(5, "numerical_rank of rank 5 plus noise")),
        Case("pure noise has rank 0", _noise_probe(0), _noise_judge(0, "numerical_rank of pure noise")),
    ),
    diagnose=_diagnose_rank,
    hints=(
        "Which singular values can noise alone explain? Count the others.",
        "S = torch.linalg.svdvals(W); m, n = W.shape; the edge is noise * (m ** 0.5 + n ** 0.5).",
        "return int((torch.linalg.svdvals(W) > noise * (m ** 0.5 + n ** 0.5)).sum())",
    ),
    read="the figure above this exercise: where the three curves bend",
    fallback=lambda: lambda W, noise: int(torch.linalg.matrix_rank(W, atol=_edge(W, noise), rtol=0.0)),
)


# ---------------------------------------------------------------- 1.5 where factors stop paying

SHAPES = ((7, 12), (7, 13), (427, 640), (8, 8), (30, 20), (1, 9))


def _saving_probe(*shapes):
    def probe(rng):
        s = Script()
        for m, n in shapes:
            s.send(f"{m} x {n}", s.call(m, n))
        return s

    return probe


def largest_paying(m: int, n: int) -> int:
    """The oracle: try every rank."""
    return max(r for r in range(min(m, n) + 1) if r * m + r * n < m * n)


def _saving_judge(*shapes):
    def judge(inputs, answers):
        for m, n in shapes:
            found, expected = answers[f"{m} x {n}"], largest_paying(m, n)
            if isinstance(found, np.ndarray) and found.shape == () and found.dtype.kind in "iu":
                found = int(found)
            if isinstance(found, bool) or not isinstance(found, int):
                shown = f"{found:.4g}" if isinstance(found, float) else type(found).__name__
                return f"largest_saving_rank({m}, {n}) is {shown}; a rank is a whole number (int)"
            if found != expected:
                return f"largest_saving_rank({m}, {n}) is {found}, expected {expected}"
        return None

    return judge


def _diagnose_saving(evidence: list[Evidence]) -> Diagnosis | None:
    answers = {}
    for e in evidence:
        answers |= {name: value for name, value in e.answers.items() if isinstance(value, (int, float, np.ndarray))}
    if any(f"{m} x {n}" not in answers for m, n in SHAPES):
        return None
    half = lambda m, n: m * n / (m + n)  # noqa: E731
    formulas = {
        "not_strict": lambda m, n: m * n // (m + n),
        "fraction": half,
        "rounded": lambda m, n: round(half(m, n)),
        "rounded_up": lambda m, n: math.ceil(half(m, n)),
        "one_below": lambda m, n: m * n // (m + n) - 1,
        "full_rank": lambda m, n: min(m, n),
        "counts_S": lambda m, n: max(0, (m * n - 1) // (m + n + 1)),
        "one_factor": lambda m, n: (m * n - 1) // n,
        "other_factor": lambda m, n: (m * n - 1) // m,
        "difference": lambda m, n: m * n - (m + n),
        "harmonic": lambda m, n: 2 * m * n // (m + n),
        "harmonic_fraction": lambda m, n: 2 * m * n / (m + n),
        "half_of_it": lambda m, n: m * n // (2 * (m + n)),
        "half_of_it_fraction": lambda m, n: m * n / (2 * (m + n)),
        "half_rank": lambda m, n: min(m, n) // 2,
        "upside_down": lambda m, n: (m + n) / (m * n),
        "brackets": lambda m, n: m * n / m + n,
        "full_less_one": lambda m, n: min(m, n) - 1,
        "no_n": lambda m, n: m * n,
        "cost_of_one": lambda m, n: m + n,
    }
    texts = {
        "not_strict": "right, except where m n / (m + n) is a whole number: there the factors cost exactly as much, and "
        "save nothing",
        "fraction": "this is the break-even itself, a fraction; asked is the largest whole rank below it",
        "rounded": "rounding may go up, to a rank that costs more than the matrix: go down",
        "rounded_up": "rounding up gives the first rank that saves nothing: go down",
        "one_below": "one too few, except where the division comes out even: find the largest r with r (m + n) < m n",
        "full_rank": "this is the largest rank at all; the factors cost more than the matrix long before",
        "counts_S": "you store r singular values as well; with S inside B or A there are r (m + n) numbers",
        "one_factor": "only one factor is counted; B has m r numbers and A has r n",
        "other_factor": "only one factor is counted; B has m r numbers and A has r n",
        "difference": "this is how many numbers rank 1 saves; asked is the largest rank that saves any",
        "harmonic": "a factor of 2 too many: r (m + n) < m n",
        "harmonic_fraction": "a factor of 2 too many: r (m + n) < m n",
        "half_of_it": "a factor of 2 too few: r (m + n) < m n",
        "half_of_it_fraction": "a factor of 2 too few: r (m + n) < m n",
        "half_rank": "half the full rank is the break-even of square matrices only: solve r (m + n) < m n",
        "upside_down": "the fraction is upside down: r (m + n) < m n, so r < m n / (m + n)",
        "brackets": "m * n / m + n divides by m alone: put brackets around m + n",
        "full_less_one": "a rank below the full one does not save by itself: r (m + n) < m n",
        "no_n": "this is how many numbers the matrix has; divide by what one rank costs, m + n",
        "cost_of_one": "this is what one rank costs; how many of them fit below m n?",
    }
    found = [answers[f"{m} x {n}"] for m, n in SHAPES]
    # (1, 9) is left out of the match where a formula breaks down there: no slip should hide behind it
    key = first_match(found[:5], {key: [f(m, n) for m, n in SHAPES[:5]] for key, f in formulas.items()}, rtol=1e-9)
    if key is None and all(np.ndim(value) == 0 and not isinstance(value, bool) for value in found):
        if found[:5] == [largest_paying(*shape) for shape in SHAPES[:5]] and any(not isinstance(value, int) for value in found):
            return Diagnosis("float", "the numbers are right, but they are floats; a rank is used in slices, so make it an int")
        if found[:5] == [largest_paying(*shape) for shape in SHAPES[:5]] and found[5] != 0:
            return Diagnosis("at_least_one", "right for large matrices; but for a single row no rank saves anything, and the answer is 0")
    return Diagnosis(key, texts[key]) if key else None


EXERCISE_5 = Exercise(
    id="1.5",
    title="Where factors stop paying",
    difficulty=1,
    minutes=3,
    points=2,
    name="largest_saving_rank",
    cases=(
        Case("two small ones, and the photograph", _saving_probe(*SHAPES[:3]), _saving_judge(*SHAPES[:3])),
        Case("where B and A have exactly as many numbers as W", _saving_probe(*SHAPES[3:5]), _saving_judge(*SHAPES[3:5])),
        Case("a single row: nothing to save", _saving_probe(*SHAPES[5:]), _saving_judge(*SHAPES[5:])),
    ),
    diagnose=_diagnose_saving,
    hints=(
        "How many numbers does the matrix have, and how many do B and A have together?",
        "r (m + n) < m n. Solve for r; what if m n / (m + n) is a whole number?",
        "return (m * n - 1) // (m + n)",
    ),
    read="the line `break-even` in the explorer's chart",
    fallback=lambda: lambda m, n: math.ceil(breakeven_rank(n, m)) - 1,
)


# ---------------------------------------------------------------- 1.6 the update


def _update_probe(size: dict, exact: bool):
    def probe(rng):
        m, n, r = size["m"], size["n"], size["r"]
        s = Script()
        original = rng.normal(size=(m, n))
        change = rng.normal(size=(m, r)) @ rng.normal(size=(r, n)) if exact else rng.normal(size=(m, n))
        s.send("factors", s.call(s.input("original", original), s.input("tuned", original + change), r))
        return s

    return probe


def _update_shapes(size: dict):
    return _best_shapes(size)


def _update_judge(size: dict, exact: bool):
    def judge(inputs, answers):
        found = _factors(answers, **size)
        if isinstance(found, str):
            return found
        rebuilt = inputs["original"] + found[0].astype(np.float64) @ found[1]
        change = inputs["tuned"] - inputs["original"]
        expected = inputs["tuned"] if exact else inputs["original"] + best_of_rank(change, size["r"])
        return compare(rebuilt, expected, what="original + B @ A", rtol=1e-4)  # as for best_factors: float32 inside is right too

    return judge


def _diagnose_update(evidence: list[Evidence]) -> Diagnosis | None:
    e, (m, n, r) = evidence[1], (WIDE["m"], WIDE["n"], WIDE["r"])
    if e.error is not None:
        return _explain_failed_product(e, m, n, r)
    parts = _factors(e.answers, m, n, r)
    if isinstance(parts, str):
        return _explain_shapes(e.answers.get("factors"), m, n, r)
    product, original, tuned = parts[0].astype(np.float64) @ parts[1], e.inputs["original"], e.inputs["tuned"]
    meanings = {
        "factorises_tuned": tuned,
        "factorises_original": original,
        "sign": original - tuned,
        "sum": original + tuned,
        "half": (tuned - original) / 2,
    }
    texts = {
        "factorises_tuned": "B A is the best rank-r picture of `tuned` itself. The original is still there, whole: only the "
        "change is to be factorised",
        "factorises_original": "B A is the best rank-r picture of `original`; asked are factors of the change, tuned - "
        "original",
        "sign": "this is the way back, original - tuned: original + B A moves away from tuned",
        "sum": "you factorise the sum of both; what changed is their difference",
        "half": "B A is half of the change",
    }
    for key, target in meanings.items():
        if compare(product, best_of_rank(target, r), rtol=1e-6) is None:
            return Diagnosis(key, texts[key])
    found = explain_product(product, tuned - original, r, what="B @ A")
    if found is not None:
        return found
    if e.failure:
        change = tuned - original
        error = np.linalg.norm(change - product) / np.linalg.norm(change)
        return Diagnosis(
            "not_the_best", f"B @ A has rank {r}, but it misses {error:.0%} of the change; the nearest such matrix misses nothing here"
        )
    return None


EXERCISE_6 = Exercise(
    id="1.6",
    title="The update",
    difficulty=2,
    minutes=4,
    points=3,
    name="update_factors",
    cases=(
        Case("B is (m, r), A is (r, n)", _update_probe(WIDE, True), _update_shapes(WIDE)),
        Case("original + B A is tuned, when the change has rank r", _update_probe(WIDE, True), _update_judge(WIDE, True)),
        Case("else it is as near as rank r allows", _update_probe(TALL, False), _update_judge(TALL, False)),
    ),
    diagnose=_diagnose_update,
    hints=(
        "Which matrix has rank 2 here: the tuned picture, or what was done to it?",
        "original + B A should be tuned. So what should B A be?",
        "return best_factors(tuned - original, r)",
    ),
    read="the figure above this exercise; the paper's equation 3 (section 4.1)",
    fallback=lambda: lambda original, tuned, r: _lab_factors(tuned - original, r),
)


LAB = Lab(
    number="1",
    name="01_rank",
    title="Rank",
    minutes=45,
    core=True,
    objectives=(
        "cut an SVD at rank r and say what the cut costs, from the spectrum alone",
        "say why nothing of rank r comes nearer than the SVD, gradient descent included",
        "tell signal from noise in a spectrum, and when two factors cost more than the matrix",
        "say what LoRA factorises, and what it does not",
    ),
    needs=("matrix products, norms, and what an SVD is", "lab 00"),
    exercises=(EXERCISE_1, EXERCISE_2, EXERCISE_3, EXERCISE_4, EXERCISE_5, EXERCISE_6),
    predictions=(
        Prediction(
            "1.A",
            "The photograph is a sum of 427 terms. How many of them hold 90 % of its energy (the sum of squared grey values)?",
            {"a": "1", "b": "about 10", "c": "about 50", "d": "more than 100"},
        ),
        Prediction(
            "1.B",
            "Gradient descent trains B and A freely, at rank 10. Where does its error end, beside that of the SVD?",
            {"a": "below it: 10,670 free numbers find something better", "b": "just above it", "c": "more than twice as high"},
        ),
        Prediction(
            "1.C",
            "A 200 x 300 matrix of rank 5, plus noise of 1 %. What does torch.linalg.matrix_rank say?",
            {"a": "5", "b": "somewhere between 6 and 199", "c": "200"},
        ),
    ),
)
