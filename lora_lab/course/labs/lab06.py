"""Lab 06, ΔW under the microscope: its exercises.

Sources: Hu et al. 2021 (arXiv 2106.09685), sections 7.2 and 7.3; Roy and Vetterli 2007 (effective rank); Shuttleworth et al. 2024
(arXiv 2410.21228, intruder dimensions). Oracles are numpy's: dense SVDs, sums over directions one by one, random subspaces drawn and averaged.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch

from lora_lab import spectra

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script
from .formulas import first_match

# A right answer may compute in float32, whose sums of a few products are off by 1e-6; a mistake changes the first digits.
F32 = 1e-5


def _multiplied(error) -> tuple[int, ...]:
    """The four sizes in torch's "shapes cannot be multiplied (7x3 and 11x3)"; empty for another error."""
    match = re.search(r"\((\d+)x(\d+) and (\d+)x(\d+)\)", "" if error is None else error.message)
    return tuple(map(int, match.groups())) if match else ()


def _line(error) -> str:
    return getattr(getattr(error, "where", None), "text", "") or ""


def _number(value) -> bool:
    return isinstance(value, (int, float, np.ndarray)) and not isinstance(value, bool) and np.size(value) == 1


# ---------------------------------------------------------------- 6.1 SVD from the factors

# out, in and r pairwise different in both; the second scaling is negative, as when a volume is turned below 0.
FACTORS = (dict(out=7, inputs=11, r=3, scaling=2.5), dict(out=12, inputs=8, r=4, scaling=-1.5))
# A product of 4.3 million x 4.3 million doubles is 148 TB: more than the 2^47 bytes that a process can name on today's systems, so asking for
# it fails at once everywhere, also where the system promises memory that it does not have. The factors are 34 MB each.
TILES = (614_300, 477_800)


def _factors_probe(size: dict):
    def probe(rng):
        s = Script()
        B, A = (s.input(name, rng.normal(size=shape)) for name, shape in (("B", (size["out"], size["r"])), ("A", (size["r"], size["inputs"]))))
        s.send("result", s.call(B, A, size["scaling"]))
        return s

    return probe


def _parts(answers):
    """(U, S, Vh) as float64 arrays, or a sentence that says what came instead."""
    parts = answers.get("result")
    if not isinstance(parts, list) or len(parts) != 3 or not all(isinstance(part, np.ndarray) for part in parts):
        found = f"{len(parts)} things" if isinstance(parts, list) else "one tensor" if isinstance(parts, np.ndarray) else type(parts).__name__
        return f"return three tensors, U, S and Vh; found {found}"
    if any(part.dtype.kind not in "iuf" or not np.isfinite(part).all() for part in parts):
        return "U, S and Vh should hold finite real numbers"
    return [part.astype(np.float64) for part in parts]


def _svd_shapes(size: dict):
    def judge(inputs, answers):
        parts = _parts(answers)
        if isinstance(parts, str):
            return parts
        wanted = (size["out"], size["r"]), (size["r"],), (size["r"], size["inputs"])
        for name, part, shape in zip(("U", "S", "Vh"), parts, wanted, strict=True):
            if part.shape != shape:
                return f"for B {inputs['B'].shape} and A {inputs['A'].shape}, {name} should have shape {shape}, found {part.shape}"
        return None

    return judge


def dense_svd(inputs, scaling: float, r: int) -> list[np.ndarray]:
    """The oracle: build the product, which the student never does, and cut numpy's SVD of it after r."""
    U, S, Vh = np.linalg.svd(scaling * np.einsum("or,ri->oi", inputs["B"], inputs["A"]), full_matrices=False)
    return [U[:, :r], S[:r], Vh[:r]]


def _svd_judge(size: dict, *, product: bool):
    def judge(inputs, answers):
        problem = _svd_shapes(size)(inputs, answers)
        if problem:
            return problem
        U, S, Vh = _parts(answers)
        if not product:
            if (S < 0).any():
                return f"singular values are never negative, also with scaling = {size['scaling']:g}; found {S.min():.3g}"
            return compare(S, dense_svd(inputs, size["scaling"], size["r"])[1], what="S", rtol=F32)
        for name, gram in (("columns of U", U.T @ U), ("rows of Vh", Vh @ Vh.T)):
            # float32 inside leaves 1e-6; anything that is not orthonormal is off by a tenth and more
            if np.abs(gram - np.eye(len(gram))).max() > 1e-4:
                return f"the {name} should be orthonormal: of length 1 and at right angles"
        update = size["scaling"] * np.einsum("or,ri->oi", inputs["B"], inputs["A"])
        return compare(np.einsum("ok,k,ki->oi", U, S, Vh), update, what="U diag(S) Vh", rtol=F32)

    return judge


# B has condition 1e9: a float64 SVD by way of QR keeps the last value to about 1e-7 of itself; anything that squares it, as B.T @ B does, loses it.
STEEP = np.array([1.0, 1e-4, 1e-9])


def _steep_probe(rng):
    s, size = Script(), FACTORS[0]
    U, V = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (size["out"], size["inputs"]))
    turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(2)]  # so that B shows nothing of the diagonal, and A is one of many
    B, A = s.input("B", U * STEEP @ turns[0]), s.input("A", turns[1] @ V.T)
    s.send("result", s.call(B, A, 1.0))
    return s


def _steep_judge(inputs, answers):
    problem = _svd_shapes(FACTORS[0])(inputs, answers)
    if problem:
        return problem
    S = _parts(answers)[1]
    if S.min() <= 0 or not 0.5 < S[2] / STEEP[2] < 2:  # off by 1e-7 of itself if done from QR, by a factor of ten and more from squares
        return f"the singular values are 1, 1e-4 and 1e-9; the last one came out as {S[2]:.2g}"
    return None


def _huge_probe(rng):
    s = Script()
    b, a = s.input("B", rng.normal(size=(7, 1))), s.input("A", rng.normal(size=(1, 9)))
    # Tiles of a small pair, so that the answer is known: S grows by sqrt(number of tiles), the vectors are tiles, too.
    U_S_Vh = s.call(s.method(b, "repeat", TILES[0], 1), s.method(a, "repeat", 1, TILES[1]), 0.5)
    s.send("S", s.get(U_S_Vh, "1"))
    s.send("first rows of U", s.method(s.get(U_S_Vh, "0"), "narrow", 0, 0, 7))
    s.send("first columns of Vh", s.method(s.get(U_S_Vh, "2"), "narrow", 1, 0, 9))
    return s


def _huge_judge(inputs, answers):
    norms = [np.linalg.norm(inputs[name]) * math.sqrt(n) for name, n in zip("BA", TILES, strict=True)]
    # 1e-4: sums of millions of squares, perhaps in float32
    problem = compare(answers["S"], np.array([0.5 * norms[0] * norms[1]]), what="S", rtol=1e-4)
    if problem:
        return problem
    expected = np.outer(inputs["B"][:, 0] / norms[0], inputs["A"][0] / norms[1])
    found = np.asarray(answers["first rows of U"], dtype=np.float64) @ np.asarray(answers["first columns of Vh"], dtype=np.float64)
    return compare(found, expected, what="the corner of U @ Vh", rtol=1e-3)


_MEMORY = re.compile(r"tried to allocate|not enough memory|can't allocate|cannot allocate|unable to allocate|storage size|out of memory|too big", re.I)


def _diagnose_svd(evidence: list[Evidence]) -> Diagnosis | None:
    first, turned, huge = evidence[0], evidence[2], next(e for e in evidence if "million" in e.title)
    for e, size in ((first, FACTORS[0]), (turned, FACTORS[1])):
        out, inputs, r, scaling = (size[k] for k in ("out", "inputs", "r", "scaling"))
        sizes = _multiplied(e.error)
        if sizes == (r, r, inputs, r) and re.search(r"\bR\w*\s*\.\s*(T|mT|t\(\))", _line(e.error)):
            return Diagnosis("qr_of_A", "QR of A itself, which is wide, gives Q (r, r) and R (r, in). The thin factors come from A.T: torch.linalg.qr(A.T)")
        if sizes == (r, r, inputs, r):
            return Diagnosis("QA_not_transposed", "Vh is (r, in): the small Vh, (r, r), times Q_A transposed. Q_A of A.T is (in, r), so Q_A.T")
        if sizes == (r, r, out, r):
            return Diagnosis("QB_order", "U is Q_B times the small U, in this order: (out, r) @ (r, r)")
        if sizes == (r, inputs, out, r) and out != inputs:
            return Diagnosis("order_of_factors", "this multiplies A @ B; ΔW is B @ A, (out, r) times (r, in)")
        if e.error is not None:
            continue
        parts = _parts(e.answers)
        if isinstance(parts, str):
            if isinstance(e.answers.get("result"), np.ndarray):
                found = e.answers["result"]
                if found.shape == (r,):
                    return Diagnosis("only_S", "these are singular values alone; asked are U, S and Vh")
                if found.shape == (out, inputs):
                    return Diagnosis("one_matrix", "this is a matrix (out, in), the product; asked are its three parts U, S and Vh")
            return None
        U, S, Vh = parts
        k = min(out, inputs)
        if S.ndim == 2 and (U.ndim == 1 or Vh.ndim == 1):
            return Diagnosis("order", "the parts come back in another order: return U, S, Vh")
        if S.shape == (r, r) and U.shape == (out, r):
            return Diagnosis("S_as_matrix", "S is a matrix here; asked is the row of singular values, of shape (r,)")
        if S.shape == (k,):
            return Diagnosis(
                "too_many",
                f"you return {k} singular values; B @ A has at most r = {r} that are not 0. They appear when the (out, in) matrix is built, or with "
                'mode="complete"; QR of the thin factors leaves r x r',
            )
        if S.shape != (r,):
            return None
        if U.shape == (r, r) or Vh.shape == (r, r):
            which = "U and Vh are" if U.shape == Vh.shape == (r, r) else "U is" if U.shape == (r, r) else "Vh is"
            return Diagnosis("not_turned_back", f"{which} still (r, r), directions of the small matrix: multiply by Q_B on the left, Q_A transposed on "
                f"the right")
        if Vh.shape == (inputs, r) and U.shape == (out, r):
            if compare(np.einsum("ok,k,ik->oi", U, S, Vh), scaling * e.inputs["B"] @ e.inputs["A"], rtol=F32) is None:
                return Diagnosis("V_for_Vh", "the third part is V, (in, r); asked is Vh, (r, in), as torch.linalg.svd returns it")
            return Diagnosis("columns_of_Vh", "the third part has the shape of V, (in, r), but is not V: rows of Vh are the vectors, so Vh[:r], not Vh[:, :r]")
        if U.shape == (r, out):
            return Diagnosis("U_transposed", "U is transposed: its columns are the left singular vectors, (out, r)")
        if U.shape != (out, r) or Vh.shape != (r, inputs):
            return None
        wanted = dense_svd(e.inputs, scaling, r)[1]
        B, A = e.inputs["B"], e.inputs["A"]
        update = np.einsum("or,ri->oi", B, A)
        built = np.einsum("ok,k,ki->oi", U, S, Vh)
        close = lambda x, y: compare(x, y, rtol=F32) is None  # noqa: E731
        if size is FACTORS[0]:
            if close(S, wanted / scaling) and close(built, scaling * update):
                return Diagnosis("scaling_in_vectors", "scaling sits in U or Vh, which must keep length 1: it belongs into the small matrix, before its SVD")
            if close(S, wanted / scaling):
                return Diagnosis("scaling_missing", "these are the singular values of B @ A: scaling is left out")
            if close(S, wanted * scaling):
                return Diagnosis("scaling_twice", "scaling enters twice: once is enough, in the small matrix or in S")
            if close(S, wanted**2) or close(S, (wanted / scaling) ** 2) or close(S, wanted**2 / scaling):
                return Diagnosis("squares", "these are squares of singular values: eigenvalues of a Gram matrix are S², so take the root")
            if close(S, wanted[::-1]):
                return Diagnosis("ascending", "the singular values come smallest first (as eigh gives them); asked is largest first, with the vectors "
                    "in that order")
            spectra_of = [np.linalg.svd(M, compute_uv=False) for M in (B, A)]
            if any(close(S, c * spectra_of[0] * spectra_of[1]) for c in (1.0, scaling)):
                return Diagnosis("spectra_multiplied", "the singular values of a product are not products of singular values: the directions of B and "
                    "A must meet first")
            if any(close(S, c * spectra_of[n]) for c in (1.0, scaling) for n in (0, 1)):
                return Diagnosis("one_factor", "these are singular values of one factor alone")
            R_B, R_A = np.linalg.qr(B)[1], np.linalg.qr(A.T)[1]
            for core, key, text in (
                (R_B @ R_A, "core_not_transposed", "the small matrix is R_B @ R_A.T: ΔW = Q_B R_B (Q_A R_A)ᵀ, and the transpose turns R_A, too"),
                (R_B.T @ R_A, "core_wrong_transpose", "R_B is transposed here; ΔW = Q_B R_B (Q_A R_A)ᵀ turns R_A only"),
                (R_B * R_A.T, "elementwise", "`*` multiplies entry by entry; the product of two matrices is `@`"),
                (R_A @ R_B, "core_wrong_order", "the small matrix is R_B @ R_A.T, in this order"),
            ):
                if close(S, scaling * np.linalg.svd(core, compute_uv=False)):
                    return Diagnosis(key, text)
            if close(S, wanted) and not close(built, scaling * update):
                if close(built, -scaling * update):
                    return Diagnosis("sign_lost", "S is right, but U diag(S) Vh is -ΔW: a sign is lost")
                if np.abs(U.T @ U - np.eye(r)).max() < 1e-4 and np.abs(Vh @ Vh.T - np.eye(r)).max() < 1e-4:
                    return Diagnosis("other_directions", "S is right and both sets are orthonormal, but they are not the directions of ΔW: which small "
                                     "matrix goes with Q_B, which with Q_A?")  # fmt: skip
        else:
            if (S < 0).any() and close(np.abs(S), wanted):
                return Diagnosis("negative_S", "with a negative scaling your S is negative. Put scaling into the small matrix before its SVD, and the "
                    "sign goes into the vectors")
            if close(S, wanted) and close(built, -scaling * update):
                return Diagnosis("sign_lost", "with a negative scaling U diag(S) Vh is -ΔW: abs() threw the sign away. Put scaling into the small "
                    "matrix before its SVD")
    if first.failure is None and turned.failure is None:
        if huge.error is not None and (_MEMORY.search(huge.error.message) or "MemoryError" in str(getattr(huge.error, "type", ""))):
            return Diagnosis(
                "dense",
                "right, but the (out, in) matrix is built on the way: for 4.3 million x 4.3 million that is 148 TB. QR of the two thin factors "
                "leaves a matrix of r x r",
            )
        steep = next(e for e in evidence if "1e-9" in e.title)
        if steep.failure is not None:
            return Diagnosis("gram", "right for tame factors, but small singular values are lost: B.T @ B squares them, and 1e-18 is below rounding. "
                "QR does not")
    return None


EXERCISE_1 = Exercise(
    id="6.1",
    title="The SVD that never sees ΔW",
    difficulty=3,
    minutes=8,
    points=4,
    name="factored_svd",
    cases=(
        Case("S is that of a dense SVD of the product", _factors_probe(FACTORS[0]), _svd_judge(FACTORS[0], product=False)),
        Case("U diag(S) Vh is ΔW, U and Vh are orthonormal", _factors_probe(FACTORS[0]), _svd_judge(FACTORS[0], product=True)),
        Case("also with a negative scaling, and S stays positive", _factors_probe(FACTORS[1]), _svd_judge(FACTORS[1], product=False)),
        Case("and then U diag(S) Vh is still ΔW", _factors_probe(FACTORS[1]), _svd_judge(FACTORS[1], product=True)),
        Case("a singular value of 1e-9 beside one of 1 survives", _steep_probe, _steep_judge),
        Case("works where ΔW would be 4.3 million x 4.3 million", _huge_probe, _huge_judge),
    ),
    diagnose=_diagnose_svd,
    hints=(
        "Q_B and Q_A have orthonormal columns, so they change no singular value. What stands between them in B A = Q_B (…) Q_Aᵀ?",
        "Q_B, R_B = torch.linalg.qr(B); Q_A, R_A = torch.linalg.qr(A.T). The matrix in the middle, scaling * R_B @ R_A.T, is only r x r: take its SVD.",
        "U, S, Vh = torch.linalg.svd(scaling * R_B @ R_A.T); return Q_B @ U, S, Vh @ Q_A.T",
    ),
    read="the formula above this exercise, and torch.linalg.qr's documentation",
    fallback=lambda: spectra.factored_svd,
)


# ---------------------------------------------------------------- 6.2 effective rank


def _spectrum_probe(make):
    def probe(rng):
        s = Script()
        s.send("rank", s.call(s.input("S", make(rng))))
        return s

    return probe


def effective_rank(S) -> float:
    """The oracle, term by term; 0 log 0 is 0."""
    p = [float(s) / float(np.sum(S)) for s in S]
    return math.exp(-math.fsum(q * math.log(q) for q in p if q > 0))


def _rank_judge(inputs, answers):
    return compare(answers["rank"], effective_rank(inputs["S"]), what="effective_rank(S)", rtol=F32)


def _slope(rng):
    return np.sort(rng.uniform(0.5, 9.0, size=7))[::-1].copy()


def _diagnose_rank(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(evidence[k].answers.get("rank"), evidence[k].inputs["S"]) for k in (1, 3)]
    if any(isinstance(found, np.ndarray) and found.size > 1 for found, _ in runs):
        return Diagnosis("not_summed", "this is one number per singular value; sum them, then take exp once")
    if any(not _number(found) for found, _ in runs):
        return None
    share = lambda S: S / S.sum()  # noqa: E731
    entropy = lambda p: -(p * np.log(p)).sum()  # noqa: E731
    energy = lambda S: S**2 / (S**2).sum()  # noqa: E731
    formulas = {
        "no_exp": (lambda S: entropy(share(S)), "this is the entropy itself; exp turns it into a number of directions"),
        "squares": (
            lambda S: math.exp(entropy(energy(S))),
            "p is made of S² here, shares of energy; asked are shares of S itself, which count small directions for more",
        ),
        "squares_no_exp": (lambda S: entropy(energy(S)), "p is made of S², and exp is missing: this is the entropy of the energy"),
        "log2": (
            lambda S: math.exp(entropy(share(S)) / math.log(2)),
            "log2 and exp don't belong together: exp undoes the natural logarithm, torch.log",
        ),
        "log10": (
            lambda S: math.exp(entropy(share(S)) / math.log(10)),
            "log10 and exp don't belong together: exp undoes the natural logarithm, torch.log",
        ),
        "two_to_the": (lambda S: 2 ** entropy(share(S)), "2** undoes log2; with the natural logarithm take exp"),
        "sign": (lambda S: math.exp(-entropy(share(S))), "the minus is missing: p log p is negative, so this is one over the effective rank"),
        "sign_no_exp": (lambda S: -entropy(share(S)), "the minus and exp are missing"),
        "minus_outside": (
            lambda S: -math.exp(-entropy(share(S))),
            "the minus stands outside of exp: .exp() is applied before it. Put brackets around -(…).sum()",
        ),
        "energy_count": (
            lambda S: float((np.cumsum(S**2) < 0.9 * (S**2).sum()).sum() + 1),
            "this counts the directions that hold 90 % of the energy; the effective rank needs no threshold",
        ),
        "not_normalised": (lambda S: math.exp(-(S * np.log(S)).sum()), "S is not divided by its sum: p must add up to 1"),
        "by_norm": (lambda S: math.exp(entropy(S / np.linalg.norm(S))), "S is divided by its norm; divide by its sum, so that p adds up to 1"),
        "by_largest": (lambda S: math.exp(entropy(S / S.max())), "S is divided by the largest; divide by the sum, so that p adds up to 1"),
        "softmax": (
            lambda S: math.exp(entropy(np.exp(S - S.max()) / np.exp(S - S.max()).sum())),
            "p is softmax(S), which depends on the unit of S; asked are shares, S / S.sum()",
        ),
        "stable_rank": (lambda S: (S**2).sum() / S.max() ** 2, "this is the stable rank, ‖M‖_F² / ‖M‖₂²; asked is the exponential of an entropy"),
        "participation": (lambda S: 1 / (share(S) ** 2).sum(), "this is the participation ratio, 1 / Σp²; asked is the exponential of an entropy"),
        "participation_energy": (lambda S: 1 / (energy(S) ** 2).sum(), "this is the participation ratio of the energies; asked is exp of an entropy"),
        "nuclear": (lambda S: S.sum() / S.max(), "this is Σ S / S₁; asked is the exponential of an entropy"),
        "counted": (lambda S: float(len(S)), "this counts the singular values, so all weigh the same; p tells how much each of them weighs"),
        "averaged": (lambda S: math.exp(entropy(share(S)) / len(S)), "mean() divides by the number of values; the entropy is a sum"),
        "normalised_entropy": (
            lambda S: entropy(share(S)) / math.log(len(S)),
            "this is the entropy as a share of its maximum; asked is exp of the entropy",
        ),
    }
    candidates = {key: [formula(S) for _, S in runs] for key, (formula, _) in formulas.items()}
    key = first_match([found for found, _ in runs], candidates, rtol=F32)
    if key:
        return Diagnosis(key, formulas[key][1])
    zeros = evidence[2]
    if all(evidence[k].failure is None for k in (0, 1, 3)) and zeros.failure is not None:
        found = zeros.answers.get("rank")
        if _number(found) and not np.isfinite(found):
            return Diagnosis("zero_log_zero", "0 · log 0 is NaN on a computer, and 0 in the formula: leave zeros out, S[S > 0], or use torch.special.entr(p)")
        return Diagnosis("zeros_count", "a singular value of 0 changes your result; it is no direction, so it must add nothing")
    return None


EXERCISE_2 = Exercise(
    id="6.2",
    title="In how many directions?",
    difficulty=1,
    minutes=3,
    points=2,
    name="effective_rank",
    cases=(
        Case("five equal values: 5", _spectrum_probe(lambda rng: np.full(5, rng.uniform(1.5, 3))), _rank_judge),
        Case("exp of the entropy of S / sum(S)", _spectrum_probe(_slope), _rank_judge),
        Case("zeros add nothing", _spectrum_probe(lambda rng: np.append(_slope(rng), [0.0, 0.0, 0.0])), _rank_judge),
        Case("another spectrum, small values", _spectrum_probe(lambda rng: _slope(rng)[:5] * 1e-5), _rank_judge),
    ),
    diagnose=_diagnose_rank,
    hints=(
        "First make shares of the singular values, so that they add up to 1. Then follow the formula from the inside out.",
        "p = S / S.sum(). A share of 0 would give 0 · log 0, which is NaN: keep only p > 0.",
        "p = S[S > 0] / S.sum(); return torch.exp(-(p * torch.log(p)).sum())",
    ),
    read="the formula above this exercise",
    fallback=lambda: lambda S: spectra.effective_rank(torch.as_tensor(S)),
)


# ---------------------------------------------------------------- 6.3 phi

# i, j, i j, the numbers of rows and d are pairwise different; in the second i > j.
PAIRS = (dict(m=5, n=7, d=13, i=2, j=3), dict(m=6, n=5, d=11, i=4, j=3))


def _pair_probe(size: dict, same: bool = False):
    def probe(rng):
        s = Script()
        common = rng.normal(size=(3, size["d"]))
        bases = []
        for rows in (size["m"], size["n"]):
            # Related to each other, so that cosines are neither 0 nor 1.
            M = rng.normal(size=(9, 3)) @ common + rng.normal(size=(9, size["d"]))
            bases.append(np.linalg.svd(M, full_matrices=False)[2][:rows])
        if same:  # the second begins with the first one's directions, in reverse order
            i, m = size["i"], size["m"]
            others = np.linalg.qr(np.concatenate([bases[0], rng.normal(size=(4, size["d"]))]).T)[0].T[m:]
            bases[1] = np.concatenate([bases[0][:i][::-1], others])
        first, second = s.input("first", bases[0]), s.input("second", np.ascontiguousarray(bases[1]))
        s.send("phi", s.call(first, second, size["i"], size["j"]))
        return s

    return probe


def shared(first, second, i: int, j: int) -> float:
    """The oracle: squared cosines between unit vectors, one pair after the other."""
    total = math.fsum(float(np.dot(u, v)) ** 2 for u in first[:i] for v in second[:j])
    return total / min(i, j)


def _pair_judge(size: dict):
    def judge(inputs, answers):
        return compare(answers["phi"], shared(inputs["first"], inputs["second"], size["i"], size["j"]), what=f"phi(…, i={size['i']}, j={size['j']})", rtol=F32)

    return judge


def _diagnose_phi(evidence: list[Evidence]) -> Diagnosis | None:
    for e, size in zip(evidence[:2], PAIRS, strict=True):
        sizes = _multiplied(e.error)
        if sizes and re.search(r"\[\s*:\s*,\s*:\s*[ij]\s*\]", _line(e.error)):
            return Diagnosis("columns_of_Vh", "you cut columns of Vh. Right singular vectors are its rows: Vh[:i]")
        if sizes == (size["i"], size["d"], size["j"], size["d"]):
            return Diagnosis("not_transposed", "both are (…, d) with vectors in rows: the cosines are first[:i] @ second[:j].T")
        if sizes == (size["d"], size["i"], size["d"], size["j"]):
            return Diagnosis("wrong_transpose", "the vectors are rows already: first[:i] @ second[:j].T, (i, d) times (d, j)")
        if sizes and sizes[:2] == (size["d"], size["i"]) and sizes[2:] == (size["j"], size["d"]):
            return Diagnosis("wrong_transpose", "the vectors are rows already: first[:i] @ second[:j].T, (i, d) times (d, j)")
    runs = [(e.answers.get("phi"), e.inputs["first"], e.inputs["second"], s["i"], s["j"], s["d"]) for e, s in zip(evidence[:2], PAIRS, strict=True)]
    if any(isinstance(found, np.ndarray) and found.size > 1 for found, *_ in runs):
        shapes = [np.shape(found) for found, *_ in runs]
        if shapes == [(s["i"], s["j"]) for s in PAIRS]:
            return Diagnosis("table", "this is the table of cosines; asked is one number: the sum of their squares over min(i, j)")
        return None
    if any(not _number(found) for found, *_ in runs):
        return None
    C = lambda a, b, i, j: a[:i] @ b[:j].T  # noqa: E731
    power = lambda M: float((M**2).sum())  # noqa: E731
    one = 1
    formulas = {
        "no_square": (lambda a, b, i, j, d: math.sqrt(power(C(a, b, i, j))) / min(i, j), "the norm is not squared: ‖·‖²_F is the sum of the squares"),
        "root": (lambda a, b, i, j, d: math.sqrt(power(C(a, b, i, j)) / min(i, j)), "this is the square root of phi: leave the root out"),
        "by_max": (
            lambda a, b, i, j, d: power(C(a, b, i, j)) / max(i, j),
            "you divide by the larger of i and j; it is the smaller subspace that can at most lie in the larger",
        ),
        "by_i": (lambda a, b, i, j, d: power(C(a, b, i, j)) / i, "you always divide by i; it is the smaller of i and j"),
        "by_j": (lambda a, b, i, j, d: power(C(a, b, i, j)) / j, "you always divide by j; it is the smaller of i and j"),
        "mean": (
            lambda a, b, i, j, d: power(C(a, b, i, j)) / (i * j),
            "this is the mean of the squared cosines, divided by i j; divide by min(i, j)",
        ),
        "not_divided": (lambda a, b, i, j, d: power(C(a, b, i, j)), "the sum of squares is right; divide by min(i, j), so that 1 means contained"),
        "by_root": (lambda a, b, i, j, d: power(C(a, b, i, j)) / math.sqrt(i * j), "you divide by sqrt(i j); divide by min(i, j)"),
        "by_d": (lambda a, b, i, j, d: power(C(a, b, i, j)) / d, "you divide by d; divide by min(i, j)"),
        "absolute": (
            lambda a, b, i, j, d: float(np.abs(C(a, b, i, j)).sum()) / min(i, j),
            "these are absolute values; the formula squares the cosines",
        ),
        "plain_sum": (
            lambda a, b, i, j, d: float(C(a, b, i, j).sum()) / min(i, j),
            "the cosines are summed as they are, and signs cancel; the formula squares them",
        ),
        "pairwise": (
            lambda a, b, i, j, d: float((np.diagonal(C(a, b, i, j)) ** 2).sum()) / min(i, j),
            "only the first with the first, the second with the second are compared; in a subspace each may meet each: sum the whole table",
        ),
        "nuclear": (lambda a, b, i, j, d: float(np.linalg.svd(C(a, b, i, j), compute_uv=False).sum()) / min(i, j), "this is the nuclear norm, the sum "
            "of singular values; "
                    "the formula sums their squares"),  # fmt: skip
        "spectral": (lambda a, b, i, j, d: float(np.linalg.svd(C(a, b, i, j), compute_uv=False)[0]) ** 2 / min(i, j), "this takes the largest singular "
            "value alone, torch's "
                     "matrix norm of order 2; the Frobenius norm sums all"),  # fmt: skip
        "largest": (
            lambda a, b, i, j, d: float(np.linalg.svd(C(a, b, i, j), compute_uv=False)[0]) ** 2,
            "this is the largest squared cosine alone; phi is about the whole subspaces",
        ),
        "not_cut": (lambda a, b, i, j, d: power(a @ b.T) / min(i, j), "nothing is cut: take the first i rows of one and the first j of the other"),
        "first_not_cut": (lambda a, b, i, j, d: power(a @ b[:j].T) / min(i, j), "the first one is not cut to i rows"),
        "second_not_cut": (lambda a, b, i, j, d: power(a[:i] @ b.T) / min(i, j), "the second one is not cut to j rows"),
        "single": (
            lambda a, b, i, j, d: float(a[i - one] @ b[j - one]) ** 2,
            "this compares vector i with vector j; phi compares the first i with the first j",
        ),
        "both_cut": (
            lambda a, b, i, j, d: power(C(a, b, min(i, j), min(i, j))) / min(i, j),
            "both are cut to the smaller of i and j; the first is cut to i, the second to j",
        ),
        "off_by_one": (lambda a, b, i, j, d: power(C(a, b, i + 1, j + 1)) / min(i, j), "the slices are one too long: [:i] has i rows"),
        "off_by_one_short": (
            lambda a, b, i, j, d: power(C(a, b, i - 1, j - 1)) / min(i, j),
            "the slices are one too short: [:i] has i rows, there is no -1",
        ),
        "swapped_cuts": (lambda a, b, i, j, d: power(C(a, b, j, i)) / min(i, j), "i and j are exchanged: the first is cut to i, the second to j"),
        "distance": (lambda a, b, i, j, d: 1 - power(C(a, b, i, j)) / min(i, j), "this is 1 - phi, a distance; 1 should mean contained"),
        "appendix_G": (
            lambda a, b, i, j, d: (1 - (min(i, j) - power(C(a, b, i, j)))) / min(i, j),
            "this is the formula printed in the paper's appendix G, (1 - d²) / p, which is a misprint: from d² = p - Σσ² follows 1 - d² / p",
        ),
    }
    candidates = {key: [formula(a, b, i, j, d) for _, a, b, i, j, d in runs] for key, (formula, _) in formulas.items()}
    key = first_match([found for found, *_ in runs], candidates, rtol=F32)
    return Diagnosis(key, formulas[key][1]) if key else None


EXERCISE_3 = Exercise(
    id="6.3",
    title="How much do two subspaces share?",
    difficulty=2,
    minutes=4,
    points=3,
    name="phi",
    cases=(
        Case("equals the sum of squared cosines over min(i, j)", _pair_probe(PAIRS[0]), _pair_judge(PAIRS[0])),
        Case("also with i larger than j", _pair_probe(PAIRS[1]), _pair_judge(PAIRS[1])),
        Case("1 where one lies in the other, in whatever order", _pair_probe(PAIRS[0] | {"j": 4}, same=True), _pair_judge(PAIRS[0] | {"j": 4})),
    ),
    diagnose=_diagnose_phi,
    hints=(
        "The rows are unit vectors, so a product of a row of one with a row of the other is a cosine. How do you get all of them at once?",
        "first[:i] @ second[:j].T is an (i, j) table of cosines. Square it, sum it, and divide by what the sum can at most be.",
        "return (first[:i] @ second[:j].T).square().sum() / min(i, j)",
    ),
    read="the formula above; the paper's equation 4 (section 7.2)",
    fallback=lambda: lambda first, second, i, j: spectra.subspace_similarity(_falling(first), _falling(second), i, j)[-1, -1],
)


def _falling(rows):
    """A matrix with these right singular vectors in this order: weights that fall."""
    return torch.linspace(2, 1, len(rows), dtype=rows.dtype)[:, None] * rows


# ---------------------------------------------------------------- 6.4 by chance

SPACES = (dict(i=3, j=5, d=40), dict(i=6, j=2, d=24), dict(i=4, j=4, d=7), dict(i=2, j=9, d=9))
DRAWS = 2000


def _chance_probe(size: dict):
    def probe(rng):
        s = Script(seed=int(rng.integers(2**31)))
        # The judge's random subspaces, drawn here so that a judge has no luck of its own. One of the two may be fixed: only their angle matters.
        Q = np.linalg.qr(rng.normal(size=(DRAWS, size["d"], size["i"])))[0]
        s.input("measured", np.square(Q[:, : size["j"]]).sum((1, 2)) / min(size["i"], size["j"]))
        s.send("chance", s.call(size["i"], size["j"], size["d"]))
        return s

    return probe


def _chance_judge(size: dict):
    def judge(inputs, answers):
        found = answers["chance"]
        if not _number(found):
            return f"phi_by_chance(…) should be one number, found {'a table' if isinstance(found, np.ndarray) else type(found).__name__}"
        mean = float(inputs["measured"].mean())
        # 2000 draws leave an error of about 0.7 %; who simulates with a few hundred is within 8 %, and the nearest wrong formula 12 % off.
        if not np.isfinite(found) or abs(float(found) - mean) > 0.08 * mean:
            return f"for i={size['i']}, j={size['j']}, d={size['d']} you say {float(found):.4g}; {DRAWS} pairs of random subspaces have {mean:.4g} on average"
        return None

    return judge


def _diagnose_chance(evidence: list[Evidence]) -> Diagnosis | None:
    found = [e.answers.get("chance") for e in evidence]
    if not all(_number(value) and np.isfinite(value) for value in found):
        return None
    texts = {
        "zero": (
            lambda i, j, d: 0.0,
            "random subspaces of a finite space are not at right angles: each pair of directions has a squared cosine of 1/d on average",
        ),
        "smaller": (lambda i, j, d: min(i, j) / d, "min and max are exchanged: i j pairs of 1/d each, divided by min(i, j), leave the larger"),
        "one_pair": (lambda i, j, d: 1 / d, "1/d is one pair of directions; there are i j of them, divided by min(i, j)"),
        "not_divided": (lambda i, j, d: i * j / d, "i j pairs of 1/d each is right; phi then divides by min(i, j)"),
        "d_twice": (
            lambda i, j, d: i * j / d**2,
            "this is the share of both in the whole space; phi of a contained subspace is 1, so divide i j / d by min(i, j)",
        ),
        "only_j": (lambda i, j, d: j / d, "right while j is the larger; phi does not care which of the two comes first"),
        "only_i": (lambda i, j, d: i / d, "right while i is the larger; phi does not care which of the two comes first"),
        "added": (lambda i, j, d: (i + j) / d, "pairs multiply: i j of them, each 1/d"),
        "averaged": (lambda i, j, d: (i + j) / 2 / d, "the mean of i and j is near, but pairs multiply: i j / d / min(i, j)"),
        "root": (lambda i, j, d: math.sqrt(max(i, j) / d), "1/sqrt(d) is the size of a cosine; phi is made of squares"),
        "cosine": (lambda i, j, d: 1 / math.sqrt(d), "1/sqrt(d) is the size of one cosine; phi sums i j squares and divides by min(i, j)"),
        "shared_room": (lambda i, j, d: max(0, i + j - d) / min(i, j), "this is how much they must share at least; random ones share more"),
        "ratio": (lambda i, j, d: min(i, j) / max(i, j), "this does not depend on d; in a larger space chance shares less"),
        "geometric": (lambda i, j, d: math.sqrt(i * j) / d, "sqrt(i j) / d is near; i j / d divided by min(i, j) is what phi says"),
        "rounded": (lambda i, j, d: float(max(i, j) // d), "`//` rounds the quotient down; use `/`"),
        "whole": (lambda i, j, d: 1.0, "1 would mean that one lies in the other"),
        "d_root": (lambda i, j, d: max(i, j) / math.sqrt(d), "1/sqrt(d) is the size of a cosine; its square is 1/d"),
    }
    candidates = {key: [formula(**size) for size in SPACES] for key, (formula, _) in texts.items()}
    # atol: a first match of 0 with 0
    matching = [key for key, values in candidates.items() if all(abs(float(f) - v) <= 1e-6 * max(1, abs(v)) for f, v in zip(found, values, strict=True))]
    return Diagnosis(matching[0], texts[matching[0]][1]) if len(matching) == 1 else None


EXERCISE_4 = Exercise(
    id="6.4",
    title="What chance shares",
    difficulty=2,
    minutes=4,
    points=2,
    name="phi_by_chance",
    cases=tuple(
        Case(title, _chance_probe(size), _chance_judge(size))
        for title, size in zip(
            ("the mean over random subspaces", "also with i larger than j", "and with i = j", "a subspace that is all of R^d contains every "
                "other"), SPACES, strict=True
        )
    ),
    diagnose=_diagnose_chance,
    hints=(
        "Take i = j = 1: two random unit vectors. The squares of the d entries of a unit vector add up to 1, and none is preferred. What is one of "
            "them on average?",
        "Each pair of directions has a squared cosine of 1/d on average. How many pairs are there, and by what does phi divide?",
        "i j pairs of 1/d each, over min(i, j): return max(i, j) / d",
    ),
    read="the definition of phi above, with one vector fixed to the first axis",
    fallback=lambda: lambda i, j, d: max(i, j) / d,
)


# ---------------------------------------------------------------- 6.5 amplification and its control

MATRICES = (dict(out=7, inputs=11, k=5, r=2), dict(out=9, inputs=6, k=4, r=3))


def _amplify_probe(size: dict):
    def probe(rng):
        s = Script()
        W = rng.normal(size=(size["out"], size["inputs"])) + 0.3
        U, _, Vh = np.linalg.svd(rng.normal(size=W.shape), full_matrices=False)
        S = np.sort(rng.uniform(0.5, 4, size=size["k"]))[::-1].copy()
        refs = [s.input(name, np.ascontiguousarray(x)) for name, x in (("W", W), ("U", U[:, : size["k"]]), ("S", S), ("Vh", Vh[: size["k"]]))]
        s.send("pair", s.call(*refs, size["r"]))
        return s

    return probe


def amplification_and_chance(inputs, r: int) -> tuple[float, float]:
    """The oracle. Norms from dense matrices; the control's overlap from the mean square entry of W, for random directions prefer no entry."""
    W, U, S, Vh = (inputs[name] for name in ("W", "U", "S", "Vh"))
    norm = np.linalg.norm(np.einsum("ok,k,ki->oi", U, S, Vh))
    overlap = math.sqrt(math.fsum(float(U[:, a] @ W @ Vh[b]) ** 2 for a in range(r) for b in range(r)))
    return norm / overlap, norm / math.sqrt(r * r * np.mean(np.square(W)))


def _pair_of_numbers(answers):
    pair = answers.get("pair")
    if isinstance(pair, np.ndarray) and pair.shape == (2,):
        pair = list(pair)
    if not isinstance(pair, list) or len(pair) != 2 or not all(_number(value) for value in pair):
        return None
    return [float(np.asarray(value).reshape(())) for value in pair]


def _amplify_judge(size: dict, which: int):
    def judge(inputs, answers):
        pair = _pair_of_numbers(answers)
        if pair is None:
            return "return two numbers: the factor of this update, and that of a random one"
        what = ("the factor of this update", "the factor of a random update")[which]
        return compare(pair[which], amplification_and_chance(inputs, size["r"])[which], what=what, rtol=F32)

    return judge


def _diagnose_amplify(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(evidence[k], size) for k, size in ((0, MATRICES[0]), (2, MATRICES[1]))]
    for e, size in runs:
        sizes, line = _multiplied(e.error), _line(e.error)
        if re.search(r"Vh\s*\[\s*:\s*,\s*:\s*r\s*\]", line):
            return Diagnosis("columns_of_Vh", "you cut columns of Vh. The right singular vectors are its rows: Vh[:r]")
        if sizes and re.search(r"U\s*\[\s*:\s*r\s*\]", line):
            return Diagnosis("rows_of_U", "you cut rows of U. The left singular vectors are its columns: U[:, :r]")
        if sizes == (size["r"], size["inputs"], size["r"], size["inputs"]):
            return Diagnosis("Vh_not_transposed", "U.T @ W is (r, in), and Vh[:r] is (r, in), too: it is Vh[:r].T that fits (the paper's V is Vh)")
        if sizes == (size["out"], size["r"], size["out"], size["inputs"]):
            return Diagnosis("U_not_transposed", "U[:, :r] is (out, r); transposed it meets W: U[:, :r].T @ W @ Vh[:r].T")
        if e.error is not None:
            return None
    if all(_number(e.answers.get("pair")) for e, _ in runs):
        return Diagnosis("one_number", "one number came back; asked are two, the factor of this update and that of a random one of the same norm")
    pairs = [_pair_of_numbers(e.answers) for e, _ in runs]
    if any(pair is None for pair in pairs):
        return None
    cases = [(e.inputs["W"], e.inputs["U"], e.inputs["S"], e.inputs["Vh"], size["r"]) for e, size in runs]
    right = [amplification_and_chance(e.inputs, size["r"]) for e, size in runs]
    if all(compare(pair, list(expected[::-1]), rtol=F32) is None for pair, expected in zip(pairs, right, strict=True)):
        return Diagnosis("swapped", "both numbers are right, in the wrong order: first this update's")
    norm = np.linalg.norm
    core = lambda W, U, Vh, r: U[:, :r].T @ W @ Vh[:r].T  # noqa: E731
    first = {
        "upside_down": (
            lambda W, U, S, Vh, r: norm(core(W, U, Vh, r)) / norm(S),
            "the fraction is upside down: how many times ΔW is larger than what W has there",
        ),
        "norm_cut": (
            lambda W, U, S, Vh, r: norm(S[:r]) / norm(core(W, U, Vh, r)),
            "‖ΔW‖ is the norm of the whole update, all of S; only the directions are cut to r",
        ),
        "spectral": (lambda W, U, S, Vh, r: S[0] / norm(core(W, U, Vh, r)), "‖ΔW‖_F is sqrt(Σ S²); S[0] alone is the spectral norm"),
        "nuclear": (lambda W, U, S, Vh, r: S.sum() / norm(core(W, U, Vh, r)), "‖ΔW‖_F is sqrt(Σ S²), not Σ S"),
        "squared": (lambda W, U, S, Vh, r: (norm(S) / norm(core(W, U, Vh, r))) ** 2, "this is the square: take the roots of both sums of squares"),
        "whole_W": (
            lambda W, U, S, Vh, r: norm(S) / norm(W),
            "this divides by the norm of all of W; asked is the part of W in the update's own directions, Uᵀ W V",
        ),
        "not_cut": (lambda W, U, S, Vh, r: norm(S) / norm(core(W, U, Vh, len(S))), "the directions are not cut: U[:, :r] and Vh[:r]"),
        "diagonal": (
            lambda W, U, S, Vh, r: norm(S) / norm(np.diagonal(core(W, U, Vh, r))),
            "only u_iᵀ W v_i is counted; the norm takes all r x r entries of Uᵀ W V",
        ),
        "projected_delta": (
            lambda W, U, S, Vh, r: norm(S[:r]) / norm(core(W, U, Vh, r)) if r == len(S) else np.inf, "‖ΔW‖ is the norm of the whole update",
        ),
        "spectral_overlap": (
            lambda W, U, S, Vh, r: norm(S) / norm(core(W, U, Vh, r), 2),
            "the overlap is the Frobenius norm of Uᵀ W V; order 2 of a matrix is its largest singular value",
        ),
        "one_side": (lambda W, U, S, Vh, r: norm(S) / norm(U[:, :r].T @ W), "W is projected on one side only: also multiply by Vh[:r].T"),
        "one_side_right": (lambda W, U, S, Vh, r: norm(S) / norm(W @ Vh[:r].T), "W is projected on one side only: also multiply by U[:, :r].T"),
        "overlap": (lambda W, U, S, Vh, r: norm(core(W, U, Vh, r)), "this is the overlap ‖Uᵀ W V‖ itself; the factor is ‖ΔW‖ over it"),
        "factor_of_norms": (lambda W, U, S, Vh, r: norm(W) / norm(core(W, U, Vh, r)), "this is ‖W‖ over the overlap; asked is ‖ΔW‖ over it"),
    }
    second = {
        "chance_overlap": (
            lambda W, U, S, Vh, r: r * norm(W) / math.sqrt(W.size),
            "the second number is the overlap of a random update; its factor is ‖ΔW‖ over that",
        ),
        "chance_upside_down": (lambda W, U, S, Vh, r: r * norm(W) / math.sqrt(W.size) / norm(S), "the second fraction is upside down"),
        "chance_root_r": (
            lambda W, U, S, Vh, r: norm(S) * math.sqrt(W.size) / (math.sqrt(r) * norm(W)),
            "Uᵀ W V has r x r entries, so the root of their sum is r times one, not sqrt(r)",
        ),
        "chance_r_squared": (
            lambda W, U, S, Vh, r: norm(S) * math.sqrt(W.size) / (r * r * norm(W)),
            "r² entries add up in squares; the root of that is r",
        ),
        "chance_without_r": (
            lambda W, U, S, Vh, r: norm(S) * math.sqrt(W.size) / norm(W),
            "one entry of Uᵀ W V is ‖W‖ / sqrt(out in) in size; there are r x r of them",
        ),
        "chance_no_root": (
            lambda W, U, S, Vh, r: norm(S) * W.size / (r * norm(W)),
            "the root is missing: the mean square is ‖W‖² / (out in), so the size ‖W‖ / sqrt(out in)",
        ),
        "chance_in": (
            lambda W, U, S, Vh, r: norm(S) * W.shape[1] / (r * norm(W)),
            "r ‖W‖ / d is for a square matrix; for (out, in) d becomes sqrt(out in)",
        ),
        "chance_out": (
            lambda W, U, S, Vh, r: norm(S) * W.shape[0] / (r * norm(W)),
            "r ‖W‖ / d is for a square matrix; for (out, in) d becomes sqrt(out in)",
        ),
        "chance_whole_W": (
            lambda W, U, S, Vh, r: norm(S) / norm(W),
            "this lets the random update meet all of W; its r directions meet r ‖W‖ / sqrt(out in)",
        ),
        "chance_norm_cut": (
            lambda W, U, S, Vh, r: norm(S[:r]) * math.sqrt(W.size) / (r * norm(W)),
            "the random update has the norm of the whole ΔW: all of S",
        ),
        "chance_one": (
            lambda W, U, S, Vh, r: 1.0,
            "1 would mean that a random update meets as much of W as it is large itself; it meets r ‖W‖ / sqrt(out in)",
        ),
        "chance_squared": (lambda W, U, S, Vh, r: norm(S) ** 2 * W.size / (r * norm(W)) ** 2, "this is the square: take the root"),
        "chance_rank": (
            lambda W, U, S, Vh, r: norm(S) * math.sqrt(W.size) / (len(S) * norm(W)),
            "all directions are counted here; the factor looks at r of them",
        ),
        "ratio_of_factors": (lambda W, U, S, Vh, r: norm(core(W, U, Vh, r)) * math.sqrt(W.size) / (r * norm(W)), "this is the overlap over the one by "
            "chance, a good number; asked here is the "
                             "random update's factor, ‖ΔW‖ / (r ‖W‖ / sqrt(out in))"),  # fmt: skip
    }
    for position, formulas in ((0, first), (1, second)):
        found = [pair[position] for pair in pairs]
        if all(compare(value, expected[position], rtol=F32) is None for value, expected in zip(found, right, strict=True)):
            continue
        candidates = {key: [float(formula(*case)) for case in cases] for key, (formula, _) in formulas.items()}
        candidates = {key: values for key, values in candidates.items() if np.isfinite(values).all()}
        key = first_match(found, candidates, rtol=F32)
        return Diagnosis(key, formulas[key][1]) if key else None
    return None


EXERCISE_5 = Exercise(
    id="6.5",
    title="Amplified, compared with what?",
    difficulty=2,
    minutes=5,
    points=3,
    name="amplification",
    cases=(
        Case("‖ΔW‖ over ‖Uᵀ W V‖, r directions each", _amplify_probe(MATRICES[0]), _amplify_judge(MATRICES[0], 0)),
        Case("and the factor of a random update of the same norm", _amplify_probe(MATRICES[0]), _amplify_judge(MATRICES[0], 1)),
        Case("both for a tall matrix and another r", _amplify_probe(MATRICES[1]),
             lambda inputs, answers: _amplify_judge(MATRICES[1], 0)(inputs, answers) or _amplify_judge(MATRICES[1], 1)(inputs, answers)),
    ),  # fmt: skip
    diagnose=_diagnose_amplify,
    hints=(
        "Three norms: of ΔW, which is in S; of what W has in the update's r directions; and of what W has in r random ones, which the text gives.",
        "norm = S.norm(); overlap = (U[:, :r].T @ W @ Vh[:r].T).norm(). The random update has the same norm; only its overlap is r ‖W‖ / sqrt(out · in).",
        "by_chance = r * W.norm() / W.numel() ** 0.5; return norm / overlap, norm / by_chance",
    ),
    read="the two formulas above; the paper's section 7.3 and table 7",
    fallback=lambda: _lab_amplification,
)


def _lab_amplification(W, U, S, Vh, r):
    norm = torch.linalg.vector_norm(S)
    return spectra.amplification(W, (U * S, Vh), r), norm / (r * torch.linalg.matrix_norm(W) / W.numel() ** 0.5)


# ---------------------------------------------------------------- 6.6 intruders

# Wide and tall. A tall W0 has directions on its long side that it does not write to at all; here many more of these than others, so that
# counting them in changes the result.
TUNED = (dict(out=6, inputs=11, k=3, new=1), dict(out=60, inputs=5, k=4, new=3))


def _tuned_probe(size: dict):
    def probe(rng):
        s, out, inputs = Script(), size["out"], size["inputs"]
        W0 = rng.normal(size=(out, inputs))
        # Strong directions that W0 hardly has, and a little noise: some of the top k stay old, others are new. The first of them
        # writes where W0 is weakest: strong now, and old all the same.
        update = 4.0 * np.outer(np.linalg.svd(W0)[0][:, min(out, inputs) - 1], np.linalg.qr(rng.normal(size=(inputs, 1)))[0])
        update += 5.0 * rng.normal(size=(out, size["new"])) @ rng.normal(size=(size["new"], inputs)) / math.sqrt(inputs)
        refs = s.input("W0", W0), s.input("W1", W0 + update + 0.15 * rng.normal(size=W0.shape))
        s.send("similarity", s.call(*refs, size["k"]))
        return s

    return probe


def nearest_old(W0, W1, k: int, side: str = "left") -> np.ndarray:
    """The oracle: for each of the k, the best of all cosines, one after the other. Eigenvectors of the Gram matrix in place of an SVD."""
    def vectors(W):
        square = W @ W.T if side == "left" else W.T @ W
        values, columns = np.linalg.eigh(square)
        return columns.T[np.argsort(values)[::-1]][: min(W.shape)]

    old, new = vectors(W0), vectors(W1)[:k]
    return np.array([max(abs(float(np.dot(y, x))) for x in old) for y in new])


def _tuned_judge(size: dict):
    return lambda inputs, answers: compare(answers["similarity"], nearest_old(inputs["W0"], inputs["W1"], size["k"]), what=f"nearest_old(W0, W1, "
        f"k={size['k']})", rtol=F32)


def _diagnose_tuned(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(e.answers.get("similarity"), e.inputs["W0"], e.inputs["W1"], size["k"]) for e, size in zip(evidence[:2], TUNED, strict=True)]
    if all(isinstance(found, list) and len(found) == 2 and np.shape(found[0]) == np.shape(found[1]) == (k,) for found, _, _, k in runs):
        return Diagnosis("values_and_indices", "max(dim) returns two things, values and indices; .amax(1) returns the values alone")
    # An answer may go wrong in one shape only; what came back is explained, whichever shape it is from.
    there = [run for run in runs if isinstance(run[0], (np.ndarray, int, float))]
    if not there:
        return None
    svd = lambda W, full=False: np.linalg.svd(W, full_matrices=full)  # noqa: E731

    def left(W):
        return svd(W)[0].T

    def right(W):
        return svd(W)[2]

    def table(W0, W1, k, vectors=left):
        return vectors(W1)[:k] @ vectors(W0).T  # (k, all old ones)

    if all(np.shape(found) == (k, len(left(W0))) for found, W0, _, k in there):
        return Diagnosis("table", "this is the table of cosines; asked is the largest of each row, one number for each of the k new directions")
    # Signs of singular vectors are an accident of the solver, so what depends on them is told by its properties, below.
    formulas = {
        "of_the_update": (lambda W0, W1, k: np.abs(left(W1 - W0)[:k] @ left(W0).T).max(1), "these are directions of ΔW; intruders are looked for among "
            "those of W0 + ΔW, "
                          "that is of W1"),  # fmt: skip
        "right": (
            lambda W0, W1, k: np.abs(table(W0, W1, k, right)).max(1),
            "these are right singular vectors, the rows of Vh; asked are left ones, the columns of U",
        ),
        "same_place": (
            lambda W0, W1, k: np.abs(np.diagonal(table(W0, W1, k))),
            "each is compared with the old one in the same place only; after tuning the order changes: compare with all",
        ),
        "few_old": (
            lambda W0, W1, k: np.abs(table(W0, W1, k)[:, :k]).max(1),
            "only W0's first k directions are looked at; a new one may resemble a weaker old one: compare with all",
        ),
        "smallest": (
            lambda W0, W1, k: np.abs(table(W0, W1, k)).min(1),
            "this is the smallest cosine; an intruder is far from every old one, so the largest must be small",
        ),
        "averaged": (lambda W0, W1, k: np.abs(table(W0, W1, k)).mean(1), "this averages the cosines; the nearest one decides: the maximum"),
        "projection": (
            lambda W0, W1, k: np.sqrt((table(W0, W1, k) ** 2).sum(1)),
            "this is how much of the vector lies in the span of all old ones, which is nearly all; asked is the nearest single one",
        ),
        "projection_squared": (
            lambda W0, W1, k: (table(W0, W1, k) ** 2).sum(1),
            "this sums the squares over all old ones, which gives nearly 1; asked is the nearest single one",
        ),
        "squared": (lambda W0, W1, k: (table(W0, W1, k) ** 2).max(1), "this is the squared cosine; the threshold of 0.5 is for |cos|"),
        "old_ones": (
            lambda W0, W1, k: np.abs(left(W0)[:k] @ left(W1).T).max(1),
            "old and new are exchanged: this asks which of W0's first k survive in W1",
        ),
        "wrong_axis": (
            lambda W0, W1, k: np.abs(table(W0, W1, k)).max(0),
            "this takes the maximum over the new ones, one number for each old one; over the old ones is asked, dim=1",
        ),
        "null_space": (lambda W0, W1, k: np.abs(svd(W1, True)[0].T[:k] @ svd(W0, True)[0]).max(1), "with full_matrices=True, U also has directions "
            "that W0 does not write to, and a tall "
                       "matrix has many: full_matrices=False"),  # fmt: skip
        "not_cut": (lambda W0, W1, k: np.abs(left(W1) @ left(W0).T).max(1), "all directions of W1 came back; asked are the first k"),
        "overall": (
            lambda W0, W1, k: np.asarray(np.abs(table(W0, W1, k)).max()),
            "this is the maximum over the whole table; one number for each of the k directions is asked, dim=1",
        ),
        "counted": (
            lambda W0, W1, k: np.asarray((np.abs(table(W0, W1, k)).max(1) < 0.5).sum()),
            "this is the number of intruders already; asked are the largest |cos| themselves, one for each of the k directions",
        ),
        "distance": (lambda W0, W1, k: 1 - np.abs(table(W0, W1, k)).max(1), "this is 1 - |cos|; asked is |cos| itself"),
        "old_again": (lambda W0, W1, k: np.abs(left(W0)[:k] @ left(W0).T).max(1), "W0 is compared with itself: the new directions come from W1"),
        "rows_of_U": (
            lambda W0, W1, k: np.abs(svd(W1)[0][:k] @ svd(W0)[0].T).max(1),
            "the rows of U are compared; the singular vectors are its columns: U.T, or U[:, :k]",
        ),
        "weighted": (
            lambda W0, W1, k: np.abs((svd(W1)[0] * svd(W1)[1]).T[:k] @ left(W0).T).max(1), "the vectors are multiplied by their singular values: "
                "cosines are between unit vectors",
        ),
    }  # fmt: skip
    matching = []
    for key, (formula, text) in formulas.items():
        if key == "null_space":
            # The added directions are arbitrary: what can be told is that the tall case comes out larger, and the wide one right.
            found, W0, W1, k = runs[1]
            right_one = nearest_old(W0, W1, k)
            if evidence[0].failure is None and isinstance(found, np.ndarray) and found.shape == right_one.shape:
                larger = (found >= right_one - 1e-6).all() and (found <= 1 + 1e-6).all()
                if larger and compare(found, right_one, rtol=F32) is not None:
                    matching.append((key, text))
            continue
        values = [formula(W0, W1, k) for _, W0, W1, k in there]
        if all(compare(found, value, rtol=1e-4) is None for (found, *_), value in zip(there, values, strict=True)):
            matching.append((key, text))
    if len(matching) == 1:
        return Diagnosis(*matching[0])
    if matching:
        return None
    # No abs: where the nearest one points the same way the answer is right, elsewhere it is a smaller number of the table.
    for found, W0, W1, k in there:
        expected = nearest_old(W0, W1, k)
        if np.shape(found) != expected.shape or not np.isfinite(found).all():
            return None
        cosines = np.abs(table(W0, W1, k))
        in_table = np.abs(cosines - np.abs(found)[:, None]).min(1) < 1e-4
        if not in_table.all() or (np.abs(found) > expected + 1e-4).any():
            return None
    return Diagnosis("no_abs", "cosines are compared with their signs; a singular vector may as well point the other way, so take abs() before the maximum")


EXERCISE_6 = Exercise(
    id="6.6",
    title="Is it an intruder?",
    difficulty=2,
    minutes=5,
    points=3,
    name="nearest_old",
    cases=(
        Case("the largest |cos| with any of W0's left directions", _tuned_probe(TUNED[0]), _tuned_judge(TUNED[0])),
        Case("also for a tall matrix and another k", _tuned_probe(TUNED[1]), _tuned_judge(TUNED[1])),
    ),
    diagnose=_diagnose_tuned,
    hints=(
        "Two SVDs, of W0 and of W1. Which part of them holds the directions that a weight writes to, and as rows or columns?",
        "U1[:, :k].T @ U0 is a (k, all old ones) table of cosines. The sign of a singular vector means nothing; the nearest one decides.",
        "U0 = torch.linalg.svd(W0, full_matrices=False)[0], the same for U1; return (U1[:, :k].T @ U0).abs().amax(1)",
    ),
    read="the definition above; Shuttleworth et al. 2024, section 3",
    fallback=lambda: lambda W0, W1, k: spectra.intruder_dimensions(W0, W1 - W0, k).similarity,
)


LAB = Lab(
    number="6",
    name="06_delta_w",
    title="ΔW under the microscope",
    minutes=50,
    core=True,
    objectives=(
        "take an adapter apart from its thin factors, without ever building ΔW",
        "say in how many directions an update lies, and how many a random matrix would have",
        "measure what two adapters share, and what they share by chance or by a common seed",
        "put a control beside an amplification factor and beside an intruder dimension",
    ),
    needs=("lab 01 for the SVD", "lab 02 for the layer"),
    exercises=(EXERCISE_1, EXERCISE_2, EXERCISE_3, EXERCISE_4, EXERCISE_5, EXERCISE_6),
    predictions=(
        Prediction(
            "6.A",
            "Full fine-tuning changes all 65,536 numbers of the middle matrix. How many of its 256 directions hold 90 % of the energy ‖ΔW‖²?",
            {"a": "fewer than 20", "b": "20 to 100", "c": "more than 100"},
        ),
        Prediction(
            "6.B",
            "LoRA with r = 64 may use 64 directions. In how many does its update effectively lie, after training on the same digits?",
            {"a": "about 64: it uses what it has", "b": "12 to 48", "c": "a dozen or fewer"},
        ),
        Prediction(
            "6.C",
            "One seed drew A in both runs, and shuffled their texts. What is left of the agreement when r = 8 gets a seed of its own?",
            {
                "a": "nearly all: the direction belongs to the task",
                "b": "less: a good part came from the start of A, and is gone even if the texts come in the same order",
                "c": "less: the start of A hardly matters, but a good part came from the order of the texts",
            },
        ),
        Prediction(
            "6.D",
            "The paper reports 21.5 for r = 4. A random ΔW of the same norm, put beside it, would be credited with a factor ...",
            {"a": "near 1 or below: it amplifies nothing in particular", "b": "of about 20, too", "c": "of several hundred"},
        ),
        Prediction(
            "6.E",
            "LoRA with r = 4 has some intruders among its ten strongest directions. Which random update has about as many?",
            {
                "a": "none: intruders are what training put there",
                "b": "one with the same singular values in random directions, but not dense noise of the same norm",
                "c": "both",
            },
        ),
    ),
)
