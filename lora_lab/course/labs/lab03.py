"""Lab 03, r, alpha and the learning rate: its exercises.

Sources: Eckart and Young 1936; Hu et al. 2021 (arXiv 2106.09685), section 4.1; Kalajdzievski 2023 (arXiv 2312.03732) on 1 / sqrt(r).
Expectations come from numpy's eigenvalues, from training written out in numpy, and from torch's own optimizers, never from the formula
that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

import numpy as np
import torch
from torch import nn

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, Question, compare
from ..script import Script
from .formulas import first_match

RTOL = 1e-6  # float64 all the way leaves 1e-13; a student may pass through float32 in places, a mistake changes the first digits


def _number(value) -> float | None:
    """A finite number, also as a tensor of one; None for anything else."""
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iuf":
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


# ---------------------------------------------------------------------------------------------------------------------
# 3.1  floor(delta, x, r)
#
# Sizes d_out, d_in, n and r are pairwise different, also by one, so that no two slips give the same number.

WHITE = dict(out=6, inp=9, n=23, r=2, spread=1.0)
SKEWED = dict(out=8, inp=10, n=31, r=3, spread=5.0)  # inputs up to 5 times as long in one direction as in another
TALL = dict(out=9, inp=6, n=23, r=0, spread=3.0)


def _floor_probe(size: Mapping):
    def probe(rng):
        s = Script()
        delta = rng.normal(size=(size["out"], size["inp"]))
        x = np.linalg.qr(rng.normal(size=(size["n"], size["inp"])))[0] * math.sqrt(size["n"])  # white: xᵀ x = n I exactly
        axes = np.linalg.qr(rng.normal(size=(size["inp"], size["inp"])))[0]
        # +0.3: the mean of the inputs is not zero, as for pixels, so that a centred covariance is another matrix
        x = x @ (axes * np.geomspace(size["spread"], 1.0, size["inp"])) @ axes.T + (0.3 if size["spread"] > 1 else 0.0)
        s.send("floor", s.call(s.input("delta", delta), s.input("x", x), size["r"]))
        return s

    return probe


def least_loss(delta, x, r: int) -> float:
    """The oracle: tail of the eigenvalues of ΔW* C ΔW*ᵀ (d_out, d_out), which are the squared singular values of ΔW* C^½."""
    values = np.linalg.eigvalsh(delta @ (x.T @ x / len(x)) @ delta.T)  # from small to large
    return float(np.clip(values[: len(values) - r], 0, None).sum() / len(delta))


def _floor_judge(size: Mapping):
    def judge(inputs, answers):
        expected = least_loss(inputs["delta"], inputs["x"], size["r"])
        # atol: at full rank nothing is left but rounding, 1e-15 of the whole
        return compare(answers["floor"], expected, what=f"floor(delta, x, {size['r']})", rtol=RTOL, atol=1e-9)

    return judge


_TAILS = {
    "": ("", lambda S, r: S[r:]),
    "head": ("you add up the first r values: those are what rank r can learn; the floor is what it can't, from r on", lambda S, r: S[:r]),
    "one_early": ("your sum has one value too many: S[0] to S[r - 1] are learned, so it begins at S[r]", lambda S, r: S[r - 1 :]),
    "one_late": ("your sum lacks its first value: S[0] to S[r - 1] are learned, so it begins at S[r]", lambda S, r: S[r + 1 :]),
    "next_only": ("you take the first value that is left out alone; all that are left out count", lambda S, r: S[r : r + 1]),
    "last_r": ("S[-r:] are the last r values; left out are all from r on, S[r:]", lambda S, r: S[-r:]),
    "ascending": ("eigvalsh sorts from small to large: your sum lacks the r smallest; it should lack the r largest", lambda S, r: S[: len(S) - r]),
    "not_cut": ("nothing is cut: this is the loss at the start, at rank 0", lambda S, r: S),
}
_POWERS = {
    "": ("", lambda S: float(np.square(S).sum())),
    "not_squared": ("the values enter squared: a squared error is a sum of squares", lambda S: float(S.sum())),
    "root": ("the loss is a squared error: no root at the end", lambda S: float(np.sqrt(np.square(S).sum()))),
    "square_of_sum": ("you square the sum; square each value, then add", lambda S: float(S.sum() ** 2)),
    "squared_again": ("eigenvalues of the squared matrix are squares already: add them up as they are", lambda S: float((S**4).sum())),
}
_RAW = {"root": -0.5, "not_squared": -0.5, "squared_again": 1.0}
_SPECTRA = {
    "": ("", lambda d, x: np.linalg.svd(x @ d.T, compute_uv=False) / math.sqrt(len(x))),
    "inputs_forgotten": (
        "that is the spectrum of ΔW* itself. The loss sees ΔW* only through the inputs: directions in which they are long count more. "
        "Look at x @ delta.T",
        lambda d, x: np.linalg.svd(d, compute_uv=False),
    ),
    "covariance_whole": ("C enters as C^½: ΔW* C weighs the inputs twice", lambda d, x: np.linalg.svd(d @ (x.T @ x) / len(x), compute_uv=False)),
    "centred": (
        "you take the inputs less their mean (as torch.cov does); the layer sees them whole, C = xᵀ x / n",
        lambda d, x: np.linalg.svd((x - x.mean(0)) @ d.T, compute_uv=False) / math.sqrt(len(x)),
    ),
}
_NORMS = {
    "": ("", lambda d, x, r: 1 / len(d)),
    "no_outputs": ("the loss is a mean over the d_out outputs, too: divide by d_out", lambda d, x, r: 1.0),
    "by_d_in": ("you divide by d_in; the mean runs over the outputs, d_out", lambda d, x, r: 1 / d.shape[1]),
    "sum_over_inputs": ("the loss is a mean over the n inputs: divide by n", lambda d, x, r: len(x) / len(d)),
    "sum": ("the loss is a mean over the n inputs and the d_out outputs: divide by both", lambda d, x, r: float(len(x))),
    "tail_mean": ("you take the mean of the values that are left out; sum them, and divide by n and d_out", lambda d, x, r: len(x) / (min(d.shape) - r)),
    "by_tail": ("you take the mean of the values that are left out; sum them, and divide by d_out", lambda d, x, r: 1 / (min(d.shape) - r)),
    "by_d_in_d_out": ("you divide by all entries of ΔW*; the mean runs over inputs and outputs", lambda d, x, r: 1 / d.size),
}


def _plain_cut(d, x, r) -> float:
    U, S, Vh = np.linalg.svd(d, full_matrices=False)
    return float(np.square(x @ (d - (U[:, :r] * S[:r]) @ Vh[:r]).T).mean())


def _diagnose_floor(evidence: list[Evidence]) -> Diagnosis | None:
    runs = []
    for e, size in zip(evidence[:2], (WHITE, SKEWED), strict=True):
        found = e.answers.get("floor")
        if isinstance(found, np.ndarray) and found.size > 1:
            return Diagnosis("not_summed", "this is a row of numbers; asked is one: sum what is left out")
        found = _number(found)
        if found is None:
            return None
        runs.append((found, e.inputs["delta"], e.inputs["x"], size["r"]))
    if all(compare(f, _plain_cut(d, x, r), rtol=RTOL) is None for f, d, x, r in runs) and compare(runs[1][0], least_loss(*runs[1][1:]), rtol=RTOL):
        return Diagnosis(
            "plain_cut",
            "you cut ΔW* where its own spectrum says and measure what that costs. Where the inputs are unequal another matrix of rank r is "
            "better: cut x @ delta.T instead",
        )
    if all(compare(f, least_loss(d, x, r) * len(x) / (len(x) - 1), rtol=RTOL) is None for f, d, x, r in runs):
        return Diagnosis("n_minus_1", "you divide by n - 1, as for a variance; the loss is a plain mean: divide by n")
    if all(compare(f, least_loss(d, x, r) / least_loss(d, x, 0), rtol=RTOL) is None for f, d, x, r in runs):
        return Diagnosis("relative", "this is a share of the loss at the start; asked is the loss itself")
    matches = []
    for (s, (_, spectrum)), (t, (_, tail)), (p, (_, power)), (n, (_, norm)) in product(
        _SPECTRA.items(), _TAILS.items(), _POWERS.items(), _NORMS.items()
    ):
        # A norm is part of what is under a root, or outside of it: both are what people write. And a spectrum of x @ delta.T as it stands is
        # √n times the one above, which the norm makes good only where values are squared.
        variants = {(1.0, 0.0)} | ({(0.5, 0.0)} if p == "root" else set()) | ({(1.0, _RAW[p])} if p in _RAW and s == "" else set())
        for outside, inputs in variants:  # powers of the norm and of n
            factor = [norm(d, x, r) ** outside * len(x) ** inputs for _, d, x, r in runs]
            if all(compare(f, k * power(tail(spectrum(d, x), r)), rtol=RTOL) is None for k, (f, d, x, r) in zip(factor, runs, strict=True)):
                matches.append(tuple(key for key in (s, t, p, n) if key))
    matches = sorted(set(matches), key=len)
    if not matches or not matches[0] or (len(matches) > 1 and len(matches[1]) == len(matches[0])):
        return None
    texts = {key: text for group in (_SPECTRA, _TAILS, _POWERS, _NORMS) for key, (text, _) in group.items()}
    return Diagnosis("_and_".join(matches[0]), "; and ".join(texts[key] for key in matches[0]))


def _lab_floor(delta, x, r):
    return float((torch.linalg.svdvals(x @ delta.T)[r:] ** 2).sum() / (len(x) * len(delta)))


FLOOR = Exercise(
    id="3.1",
    title="The floor of a rank",
    difficulty=2,
    minutes=7,
    points=4,
    name="floor",
    cases=(
        Case("inputs of equal length in all directions", _floor_probe(WHITE), _floor_judge(WHITE)),
        Case("inputs that are longer in some directions", _floor_probe(SKEWED), _floor_judge(SKEWED)),
        Case("rank 0 leaves the loss at the start, here of a tall layer", _floor_probe(TALL), _floor_judge(TALL)),
        Case("full rank leaves nothing", _floor_probe({**SKEWED, "r": 8}), _floor_judge({**SKEWED, "r": 8})),
    ),
    diagnose=_diagnose_floor,
    hints=(
        "What must B A reproduce: the numbers in ΔW*, or what ΔW* does to these inputs?",
        "x @ delta.T, of shape (n, d_out), is what is to be learned, and x @ (B A).T is any matrix of rank r there. "
        "What do Eckart and Young leave out of it, and what does a mean divide by?",
        "return float((torch.linalg.svdvals(x @ delta.T)[r:] ** 2).sum() / (len(x) * len(delta)))",
    ),
    read="lab 01, exercise 1.2: what a cut costs",
    fallback=lambda: _lab_floor,
)


# ---------------------------------------------------------------------------------------------------------------------
# 3.2  rescaled_B(B, alpha, new_alpha)

LOUDER, QUIETER = dict(r=3, alpha=5.0, new=14.0), dict(r=2, alpha=11.0, new=3.0)


def _rescale_probe(size: Mapping):
    def probe(rng):
        s = Script()
        s.input("x", rng.normal(size=(7, 8)))
        s.input("A", rng.normal(size=(size["r"], 8)))
        s.send("B", s.call(s.input("B", rng.normal(size=(9, size["r"]))), size["alpha"], size["new"]))
        return s

    return probe


def _rescale_judge(size: Mapping):
    def judge(inputs, answers):
        B = inputs["B"]
        wrong = compare(answers["B"], np.ones_like(B), what="the new B", rtol=math.inf)  # its kind and shape alone
        if wrong:
            return wrong
        output = lambda alpha, B: inputs["x"] @ (alpha / size["r"] * B @ inputs["A"]).T  # noqa: E731
        what = f"the update's output after alpha went from {size['alpha']:g} to {size['new']:g}"
        return compare(output(size["new"], answers["B"]), output(size["alpha"], B), what=what, rtol=RTOL)

    return judge


def _diagnose_rescale(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(e.answers.get("B"), e.inputs["B"], size) for e, size in zip(evidence[:2], (LOUDER, QUIETER), strict=True)]
    if any(not isinstance(found, np.ndarray) for found, _, _ in runs):
        return None
    factors = {
        "unchanged": lambda a, b, r: 1.0,
        "upside_down": lambda a, b, r: b / a,
        "root": lambda a, b, r: math.sqrt(a / b),
        "squared": lambda a, b, r: (a / b) ** 2,
        "old_scaling": lambda a, b, r: a / r,
        "new_scaling": lambda a, b, r: b / r,
        "divided_by_new_scaling": lambda a, b, r: r / b,
        "only_old": lambda a, b, r: a,
        "only_new": lambda a, b, r: 1 / b,
        "difference": lambda a, b, r: a - b,
        "r_too_many": lambda a, b, r: a / b / r,
    }
    texts = {
        "unchanged": "B is as it was: with the new alpha the update is louder, or quieter, at once",
        "upside_down": "upside down: when alpha grows, B must shrink",
        "root": "the root of the factor is right if A takes the other root; here A stays, so B takes it all",
        "squared": "the factor enters once: scaling · B counts, and alpha is in it once",
        "old_scaling": "you multiply by the old scaling; the new one is still applied on top of B: alpha / new_alpha",
        "new_scaling": "you multiply by the new scaling, which is applied on top of B anyway: alpha / new_alpha",
        "divided_by_new_scaling": "the new scaling is taken out, the old one is not put in: alpha / new_alpha",
        "only_old": "divide by new_alpha, too",
        "only_new": "multiply by the old alpha, too",
        "difference": "alpha multiplies, so B changes by a ratio, not by a difference",
        "r_too_many": "r cancels: it is the same before and after",
    }
    candidates = {key: [f(size["alpha"], size["new"], size["r"]) * B for _, B, size in runs] for key, f in factors.items()}
    key = first_match([found for found, _, _ in runs], candidates, rtol=RTOL)
    return Diagnosis(key, texts[key]) if key else None


RESCALE = Exercise(
    id="3.2",
    title="Change alpha, keep the function",
    difficulty=1,
    minutes=3,
    points=2,
    name="rescaled_B",
    cases=(
        Case("alpha goes up, the output stays", _rescale_probe(LOUDER), _rescale_judge(LOUDER)),
        Case("alpha goes down, the output stays", _rescale_probe(QUIETER), _rescale_judge(QUIETER)),
    ),
    diagnose=_diagnose_rescale,
    hints=(
        "The output holds alpha / r · B A. Which product must stay the same, and which of its factors may you change?",
        "alpha · B before must equal new_alpha · (new B).",
        "return B * (alpha / new_alpha)",
    ),
    read="the picture of the two ways to move alpha, after this exercise",
    fallback=lambda: lambda B, alpha, new_alpha: B * (alpha / new_alpha),
)


# ---------------------------------------------------------------------------------------------------------------------
# 3.3  twin_rates(lr_A, lr_B, k, optimizer)

TWINS = (("adam", 4.0), ("sgd", 4.0), ("adam", 0.3), ("sgd", 7.0))
RATES = {"adam": (0.013, 0.007), "sgd": (0.11, 0.05)}  # of A and of B, unlike, so that an answer that confuses them shows


def _twin_probe(optimizer: str, k: float):
    def probe(rng):
        s = Script()
        s.input("x", rng.normal(size=(20, 5)))
        s.input("y", rng.normal(size=(20, 4)))
        s.input("A", rng.normal(size=(3, 5)) / 2)
        s.send("rates", s.call(*RATES[optimizer], k, optimizer))
        return s

    return probe


def losses_of(x, y, A, scaling: float, lr_A: float, lr_B: float, optimizer: str, steps: int = 6) -> np.ndarray:
    """The oracle: LoRA trained in numpy from B = 0 on mean squared error; Adam with Kingma and Ba's constants and eps = 0."""
    A, B = A.copy(), np.zeros((y.shape[1], len(A)))
    state = {"A": [np.zeros_like(A), np.zeros_like(A)], "B": [np.zeros_like(B), np.zeros_like(B)]}
    losses = []
    for t in range(1, steps + 1):
        h = x @ A.T
        error = scaling * h @ B.T - y
        losses.append(np.square(error).mean())
        g = 2 * error / error.size
        gradients = {"A": scaling * B.T @ g.T @ x, "B": scaling * g.T @ h}
        for name, tensor, lr in (("A", A, lr_A), ("B", B, lr_B)):
            gradient = gradients[name]
            if optimizer == "adam":
                m, v = state[name]
                m[...] = 0.9 * m + 0.1 * gradient
                v[...] = 0.999 * v + 0.001 * gradient**2
                root = np.sqrt(v / (1 - 0.999**t))
                # At A's first step both are 0: no gradient, no step.
                gradient = np.divide(m / (1 - 0.9**t), root, out=np.zeros_like(m), where=root > 0)
            tensor -= lr * gradient
    return np.array(losses)


# Who compares with "Adam" or "SGD" has both rules right, and takes one branch for both.
_SAME = 'optimizer="adam" and optimizer="sgd" (in small letters) take the same rule in your code'


def _two_rates(value) -> tuple[float, float] | str:
    """(lr_A, lr_B), or what is wrong with their form."""
    if isinstance(value, np.ndarray) and value.shape == (2,):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return f"expected two numbers, lr_A and lr_B; found {_kind(value)}"
    rates = [_number(v) for v in value]
    if None in rates or min(rates) < 0:
        return f"expected two learning rates, finite and not negative; found {value}"
    return rates[0], rates[1]


def _kind(value) -> str:
    if isinstance(value, (list, tuple)):
        return f"{len(value)} things"
    return f"{value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else f"a {type(value).__name__}"


def _twin_judge(optimizer: str, k: float):
    def judge(inputs, answers):
        rates = _two_rates(answers["rates"])
        if isinstance(rates, str):
            return rates
        x, y, A = inputs["x"], inputs["y"], inputs["A"]
        scaling = 5 / 3
        original = losses_of(x, y, A, scaling, *RATES[optimizer], optimizer)
        with np.errstate(over="ignore", invalid="ignore"):  # a wrong rate may blow the twin up, and that is an answer
            twin = losses_of(x, y, A, k * scaling, *rates, optimizer)
        if not np.isfinite(twin).all():
            return f"with your rates the twin's loss leaves the range of numbers within {len(twin)} steps"
        return compare(twin, original, what=f'the twin\'s loss, step by step (optimizer="{optimizer}", alpha times {k:g}),', rtol=RTOL)

    return judge


_EXPONENTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, -3.0, -1.5)


def _exponents(e: Evidence, optimizer: str, k: float) -> tuple[float, float] | None:
    """(a, b) with the answer lr_A · k^a, lr_B · k^b; None if it is no such thing."""
    rates = _two_rates(e.answers.get("rates"))
    if isinstance(rates, str):
        return None
    found = []
    for rate, given in zip(rates, RATES[optimizer], strict=True):
        power = next((p for p in _EXPONENTS if compare(rate, given * k**p, rtol=RTOL) is None), None)
        if power is None:
            return None
        found.append(power)
    return found[0], found[1]


def _diagnose_twins(evidence: list[Evidence]) -> Diagnosis | None:
    first = evidence[0].answers.get("rates")
    if _number(first) is not None:
        return Diagnosis("one_rate", "one number comes back; A and B need a learning rate each: return two, (for A, for B)")
    form = _two_rates(first)
    if not isinstance(form, str):
        lr_A, lr_B = RATES["adam"]
        if compare(list(form), np.array([1.0, 1 / 4]), rtol=RTOL) is None:
            return Diagnosis("factors", "these are the factors; asked are the rates themselves: lr_A and lr_B times these")
        if compare(list(form), np.array([lr_B / 4, lr_A]), rtol=RTOL) is None:
            return Diagnosis("order", "the numbers are right, the order is not: first the rate of A, then that of B")
    powers = {}
    for e, (optimizer, k) in zip(evidence, TWINS, strict=True):
        found = _exponents(e, optimizer, k)
        if found is None or powers.setdefault(optimizer, found) != found:
            return None
    (adam_A, adam_B), (sgd_A, sgd_B) = powers["adam"], powers["sgd"]
    right = {"adam": (0.0, -1.0), "sgd": (0.0, -2.0)}
    if powers == right:
        return None
    if powers["adam"] == (0.0, 0.0) and sgd_B == -1.0:
        also = "" if sgd_A == 0.0 else ". (A's gradient did not grow: k is in the scaling, 1/k in B; its rate stays)"
        return Diagnosis(
            "gradient_only",
            "the larger gradient is dealt with; but B itself must stay k times as small, and so must its steps: divide by k once more" + also,
        )
    if powers["adam"] == (0.0, 0.0) and powers["sgd"] == right["sgd"]:
        return Diagnosis(
            "adam_unmoved", "right for SGD. Adam's steps of B don't grow with the gradient; but B must stay k times as small, and so must its steps"
        )
    if powers["adam"] == (0.0, 0.0) and powers["sgd"] == (0.0, 0.0):
        return Diagnosis("unchanged", "both rates are as they were: with k times the alpha, B must stay k times as small, and so must its steps")
    if adam_A == adam_B == -1.0 and sgd_A == sgd_B:
        return Diagnosis(
            "global_rate",
            "you divide both rates. A's own values don't change in the twin, and its gradient doesn't either (k in the scaling, 1/k in B): "
            "its rate stays; only B's changes",
        )
    if adam_A < 0 and adam_B == 0.0:
        return Diagnosis("A_for_B", "you change the rate of A and leave that of B; it is B that has to be k times as small")
    if adam_B > 0 or sgd_B > 0:
        return Diagnosis("multiplied", "you make B's steps larger; with k times the alpha, B must stay k times as small: divide")
    if powers["adam"] == (0.0, -2.0) and powers["sgd"] == (0.0, -1.0):
        return Diagnosis("optimizers_swapped", "the two are the wrong way round: SGD's step carries the gradient, which also grew by k; Adam's does not")
    if powers["adam"] == right["adam"] and powers["sgd"] == (0.0, -1.0):
        return Diagnosis(
            "sgd_like_adam",
            f"{_SAME}. It is right for Adam. Under SGD the step is lr times the gradient of B, which the scaling has made k times as large; and it "
            "should be k times as small: k twice",
        )
    if powers["sgd"] == right["sgd"] and powers["adam"] == (0.0, -2.0):
        return Diagnosis(
            "adam_like_sgd",
            f"{_SAME}. It is right for SGD. "
            "Adam divides the gradient by its own size, so a k times larger one makes no larger step: k once",
        )
    if adam_B == -0.5 or sgd_B == -0.5:
        return Diagnosis("root", "the square root of k would share the factor between A and B; here only B changes")
    if powers["adam"] == right["adam"] and sgd_A != 0.0:
        return Diagnosis("sgd_moves_A", "right for Adam. Under SGD, too, the gradient of A is the same in the twin: its rate stays")
    if powers["adam"] == right["adam"]:
        return Diagnosis("sgd_wrong", f"right for Adam; under SGD you multiply the rate of B by k to the power {sgd_B:g}")
    if powers["sgd"] == right["sgd"]:
        return Diagnosis("adam_wrong", f"right for SGD; under Adam you multiply the rate of A by k to the power {adam_A:g}, of B by k to the power {adam_B:g}")
    return None


TWIN = Exercise(
    id="3.3",
    title="Find the twin",
    difficulty=3,
    minutes=6,
    points=4,
    name="twin_rates",
    cases=(
        Case('optimizer="adam", alpha times 4: six losses, equal', _twin_probe(*TWINS[0]), _twin_judge(*TWINS[0])),
        Case('optimizer="sgd", alpha times 4: six losses, equal', _twin_probe(*TWINS[1]), _twin_judge(*TWINS[1])),
        Case('optimizer="adam", alpha times 0.3', _twin_probe(*TWINS[2]), _twin_judge(*TWINS[2])),
        Case('optimizer="sgd", alpha times 7', _twin_probe(*TWINS[3]), _twin_judge(*TWINS[3])),
    ),
    diagnose=_diagnose_twins,
    hints=(
        "In the twin, alpha is k times as large and the function is the same at every step. What does B have to be, then? And A?",
        "B is k times as small, and so must each of its steps be. Its gradient, however, is k times as large (the scaling is in it). "
        "SGD's step is lr · gradient; Adam's is lr times a number near 1, whatever the gradient's size.",
        'return lr_A, lr_B / (k if optimizer == "adam" else k**2)',
    ),
    read="lab 02, exercise 2.3: the gradients of A and B",
    fallback=lambda: lambda lr_A, lr_B, k, optimizer: (lr_A, lr_B / {"adam": k, "sgd": k**2}[optimizer]),
)


# ---------------------------------------------------------------------------------------------------------------------
# 3.4  first_update(G, A, lr, scaling, optimizer)

FIRST = (("sgd", dict(out=7, inp=11, r=3, lr=0.3, scaling=1.7)), ("adam", dict(out=7, inp=11, r=3, lr=0.3, scaling=1.7)),
         ("sgd", dict(out=12, inp=5, r=2, lr=0.07, scaling=0.6)), ("adam", dict(out=12, inp=5, r=2, lr=0.07, scaling=0.6)))  # fmt: skip


def _first_probe(optimizer: str, size: Mapping):
    def probe(rng):
        s = Script()
        G, A = rng.normal(size=(size["out"], size["inp"])), rng.normal(size=(size["r"], size["inp"]))
        s.send("delta", s.call(s.input("G", G), s.input("A", A), size["lr"], size["scaling"], optimizer))
        return s

    return probe


def one_step(G, A, lr: float, scaling: float, optimizer: str) -> np.ndarray:
    """The oracle: torch's own optimizer takes one step from B = 0 on a loss whose gradient by the weight is G. -> ΔW (d_out, d_in)"""
    G = torch.from_numpy(np.array(G, dtype=np.float64))
    A, B = nn.Parameter(torch.from_numpy(np.array(A, dtype=np.float64))), nn.Parameter(torch.zeros(len(G), len(A), dtype=torch.float64))
    # 1e-30: at Adam's usual eps, 1e-8, entries with a tiny gradient would take a shorter step
    step = torch.optim.SGD([A, B], lr=lr) if optimizer == "sgd" else torch.optim.Adam([A, B], lr=lr, eps=1e-30)
    (G * (scaling * B @ A)).sum().backward()
    step.step()
    return (scaling * B @ A).detach().numpy()


def _first_judge(optimizer: str, size: Mapping):
    def judge(inputs, answers):
        expected = one_step(inputs["G"], inputs["A"], size["lr"], size["scaling"], optimizer)
        return compare(answers["delta"], expected, what=f'ΔW after one step, optimizer="{optimizer}",', rtol=RTOL)

    return judge


_MATRICES = {
    "G Aᵀ A": lambda G, A: G @ A.T @ A,
    "sign(G Aᵀ) A": lambda G, A: np.sign(G @ A.T) @ A,
    "sign(G) Aᵀ A": lambda G, A: np.sign(G) @ A.T @ A,
    "sign(G Aᵀ A)": lambda G, A: np.sign(G @ A.T @ A),
    "sign(G Aᵀ) sign(A)": lambda G, A: np.sign(G @ A.T) @ np.sign(A),
    "G": lambda G, A: G,
    "sign(G)": lambda G, A: np.sign(G),
}
_FACTORS = {
    "lr s²": lambda lr, s: lr * s**2,
    "lr s": lambda lr, s: lr * s,
    "lr": lambda lr, s: lr,
    "lr s³": lambda lr, s: lr * s**3,
    "s²": lambda lr, s: s**2,
    "s": lambda lr, s: s,
    "1": lambda lr, s: 1.0,
    "lr / s": lambda lr, s: lr / s,
    "lr² s²": lambda lr, s: (lr * s) ** 2,
}
_ASKED = {"sgd": ("-", "lr s²", "G Aᵀ A"), "adam": ("-", "lr s", "sign(G Aᵀ) A")}


def _read_update(runs) -> tuple[str, str, str] | None:
    """(sign, factor, matrix) that reproduces the answers of both sizes; None if nothing does, or more than one thing."""
    found = []
    for sign, (factor, f), (matrix, m) in product("-+", _FACTORS.items(), _MATRICES.items()):
        values = ((1 if sign == "+" else -1) * f(size["lr"], size["scaling"]) * m(e.inputs["G"], e.inputs["A"]) for e, size in runs)
        if all(compare(e.answers.get("delta"), value, rtol=RTOL) is None for (e, _), value in zip(runs, values, strict=True)):
            found.append((sign, factor, matrix))
    return found[0] if len(found) == 1 else None


def _diagnose_first(evidence: list[Evidence]) -> Diagnosis | None:
    found = evidence[0].answers.get("delta")
    size = FIRST[0][1]
    if isinstance(found, np.ndarray) and found.shape == (size["out"], size["r"]):
        return Diagnosis("B_alone", f"({size['out']}, {size['r']}): this is B after the step; ΔW = scaling · B A")
    if isinstance(found, np.ndarray) and found.shape == (size["inp"], size["out"]):
        return Diagnosis("transposed", "ΔW is (d_out, d_in), like W; this is its transpose")
    if isinstance(found, list) and len(found) == 2:
        return Diagnosis("two_factors", "you return the factors; asked is their product, ΔW = scaling · B A")
    reading = {}
    for optimizer in ("sgd", "adam"):
        runs = [(e, size) for e, (name, size) in zip(evidence, FIRST, strict=True) if name == optimizer]
        reading[optimizer] = _read_update(runs)
    if reading["adam"] == _ASKED["sgd"] and reading["sgd"] == _ASKED["adam"]:
        return Diagnosis("optimizers_swapped", "the two optimizers are the wrong way round: it is Adam that keeps the sign of each entry alone")
    if reading["adam"] == reading["sgd"] == _ASKED["sgd"]:
        return Diagnosis(
            "adam_as_sgd",
            f"{_SAME}. It is right for SGD. "
            "Adam's first step has the same size in every entry of B: lr times the sign of the gradient",
        )
    if reading["adam"] == reading["sgd"] == _ASKED["adam"]:
        return Diagnosis("sgd_as_adam", f"{_SAME}. It is right for Adam. SGD's step is lr times the gradient itself, not its sign")
    for optimizer, name in (("sgd", "SGD"), ("adam", "Adam")):
        read, asked = reading[optimizer], _ASKED[optimizer]
        if read is None or read == asked:
            continue
        (_, factor, matrix), formula = read, f"for {name} you return {read[0].replace('-', '−')}{read[1]} · {read[2]}"
        if matrix == asked[2] and factor == asked[1]:
            return Diagnosis("uphill", f"{formula}: a step goes against the gradient, so the sign is minus")
        if matrix in ("G", "sign(G)"):
            return Diagnosis("full_fine_tuning", f"{formula}: that is the step of a full weight. Only B moves, and ΔW = scaling · B A has A in it")
        if matrix == asked[2]:
            if "lr" not in factor:
                return Diagnosis("lr_missing", f"{formula}: the learning rate is missing")
            if optimizer == "sgd" and factor == "lr s":
                return Diagnosis("scaling_once", f"{formula}: the scaling enters twice, once in ΔW = scaling · B A, once in the gradient of B")
            if optimizer == "adam" and factor == "lr s²":
                return Diagnosis("scaling_twice", f"{formula}: the sign of the gradient does not know the scaling, so it enters once, in ΔW = scaling · B A")
            if factor == "lr":
                return Diagnosis("scaling_missing", f"{formula}: the scaling is missing")
            return Diagnosis("other_factor", f"{formula}; the factor should be {asked[1]}")
        if matrix == "sign(G Aᵀ) sign(A)":
            return Diagnosis("sign_of_A", f"{formula}: A is not trained in this step, so it keeps its values")
        if optimizer == "adam" and matrix in ("sign(G) Aᵀ A", "sign(G Aᵀ A)"):
            return Diagnosis("sign_of_another", f"{formula}: Adam takes the sign of the gradient of what it trains: B, whose gradient is scaling · G Aᵀ")
        return Diagnosis("other_formula", f"{formula}; B after the step is −lr times its gradient (SGD) or the sign of it (Adam)")
    return None


def _lab_first_update(G, A, lr, scaling, optimizer):
    gradient = scaling * G @ A.T
    B = -lr * (gradient if optimizer == "sgd" else gradient.sign())
    return scaling * B @ A


FIRST_UPDATE = Exercise(
    id="3.4",
    title="The first step, by hand",
    difficulty=2,
    minutes=7,
    points=4,
    name="first_update",
    cases=tuple(
        Case(f'optimizer="{optimizer}", {size["out"]} x {size["inp"]}, r = {size["r"]}: as torch\'s own does it',
             _first_probe(optimizer, size), _first_judge(optimizer, size))
        for optimizer, size in FIRST
    ),
    diagnose=_diagnose_first,
    hints=(
        "B is zero, so A has no gradient yet: only B moves. What is its gradient, given that of the whole weight, G?",
        "ΔW = scaling · B A, so dL/dB = scaling · G Aᵀ, (d_out, r). SGD: B = −lr times that. Adam: B = −lr times its sign. "
        "Then ΔW = scaling · B A.",
        'g = scaling * G @ A.T\nB = -lr * (g if optimizer == "sgd" else g.sign())\nreturn scaling * B @ A',
    ),
    read="lab 02, exercise 2.3; Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1, at t = 1",
    fallback=lambda: _lab_first_update,
)


# ---------------------------------------------------------------------------------------------------------------------
# 3.5  fair_alpha(r0, alpha0, r, optimizer)

FAIR = (("adam", dict(r0=3, alpha0=7.0, r=27)), ("sgd", dict(r0=3, alpha0=7.0, r=27)),
        ("adam", dict(r0=20, alpha0=11.0, r=5)), ("sgd", dict(r0=20, alpha0=11.0, r=5)))  # fmt: skip


def _fair_probe(optimizer: str, size: Mapping):
    def probe(rng):
        s = Script()
        s.send("alpha", s.call(size["r0"], size["alpha0"], size["r"], optimizer))
        return s

    return probe


def first_decrease(r: int, alpha: float, optimizer: str) -> float:
    """The oracle: how much the first step lowers the loss, to first order, when every row of A is as useful as every other.

    Rows of A at right angles and G with the same part along each: then random A's average is what happens exactly, and torch's optimizer
    takes the step.
    """
    G, A = np.ones((4, 32)), np.eye(32)[:r]
    return -float((G * one_step(G, A, 1e-3, alpha / r, optimizer)).sum())


def _fair_judge(optimizer: str, size: Mapping):
    def judge(inputs, answers):
        alpha = _number(answers["alpha"])
        if alpha is None:
            return compare(answers["alpha"], 1.0, what="fair_alpha(...)") or "fair_alpha(...) is no number"
        before, after = first_decrease(size["r0"], size["alpha0"], optimizer), first_decrease(size["r"], alpha, optimizer)
        if alpha > 0 and abs(after / before - 1) <= RTOL:
            return None
        where = f'optimizer="{optimizer}", from r={size["r0"]}, alpha={size["alpha0"]:g} to r={size["r"]}: with alpha={alpha:.4g} '
        if alpha < 0 and abs(after / before - 1) <= RTOL:
            return where + "the first step gains what it should (B only turns its sign round), but alpha is a size: asked is the positive one"
        # + 0.0: alpha = 0 would read "-0 times"
        return where + f"the first step lowers the loss {after / before + 0.0:.4g} times as much as before, and should do the same"

    return judge


def _diagnose_fair(evidence: list[Evidence]) -> Diagnosis | None:
    found = {"adam": [], "sgd": []}
    for e, (optimizer, _) in zip(evidence, FAIR, strict=True):
        value = _number(e.answers.get("alpha"))
        if value is None:
            return None
        found[optimizer].append(value)
    if min(found["adam"] + found["sgd"]) < 0:
        return Diagnosis("negative", "an alpha below 0: the update keeps its size, B only turns its sign round; give the positive alpha")
    sizes = [size for optimizer, size in FAIR if optimizer == "adam"]
    formulas = {
        "constant": lambda r0, a, r: a,
        "root": lambda r0, a, r: a * math.sqrt(r / r0),
        "same_scaling": lambda r0, a, r: a * r / r0,
        "inverse": lambda r0, a, r: a * r0 / r,
        "inverse_root": lambda r0, a, r: a * math.sqrt(r0 / r),
        "two_r": lambda r0, a, r: 2.0 * r,
        "scaling": lambda r0, a, r: a / r,
        "rslora_scaling": lambda r0, a, r: a / math.sqrt(r),
        "scaling_root": lambda r0, a, r: a / math.sqrt(r * r0),
        "squared": lambda r0, a, r: a * (r / r0) ** 2,
        "r": lambda r0, a, r: float(r),
    }
    candidates = {key: [f(**{"r0": z["r0"], "a": z["alpha0"], "r": z["r"]}) for z in sizes] for key, f in formulas.items()}
    adam, sgd = (first_match(found[name], candidates, rtol=RTOL) for name in ("adam", "sgd"))
    if adam == sgd == "same_scaling":
        return Diagnosis(
            "same_scaling",
            "this keeps alpha / r, as the recipe alpha = 2r does. But r rows now move where r0 moved before, each with the same scaling: their sum grows",
        )
    if adam == sgd == "constant":
        return Diagnosis(
            "adam_for_both",
            f"{_SAME}. It is right for Adam. "
            "Under SGD a smaller scaling counts twice, in ΔW and in the gradient of B: at the same alpha a higher rank is slower",
        )
    if adam == sgd == "root":
        return Diagnosis("sgd_for_both", f"{_SAME}. It is right for SGD. Under Adam the scaling counts once: r · scaling must stay, and r · alpha / r is alpha")
    if (adam, sgd) == ("root", "constant"):
        return Diagnosis("optimizers_swapped", "the two are the wrong way round: the scaling counts once under Adam, twice under SGD")
    if "two_r" in (adam, sgd):
        return Diagnosis("two_r", "alpha = 2r is a recipe; it does not know where you came from, r0 and alpha0")
    if {adam, sgd} <= {"scaling", "rslora_scaling", "scaling_root"} and adam:
        return Diagnosis("scaling_not_alpha", "this is a scaling; asked is the alpha, which the layer still divides by r")
    if (adam, sgd) == ("inverse", "inverse_root"):
        return Diagnosis(
            "alpha_as_scaling",
            "you keep r · alpha (Adam) and r · alpha² (SGD), as if alpha were the scaling; the layer divides it by r, so alpha = scaling · r",
        )
    if (adam, sgd) == ("inverse_root", "constant"):
        return Diagnosis("rslora_alpha", "that is right where the scaling is alpha / √r (rsLoRA); here it is alpha / r")
    if sgd == "inverse_root" and adam in ("constant", None):
        return Diagnosis("root_upside_down", "under SGD that is the ratio of the scalings; alpha = scaling · r, so alpha goes up with the root of r / r0")
    if "inverse" in (adam, sgd):
        return Diagnosis("divided_twice", "the layer divides alpha by r already; dividing once more makes higher ranks slower")
    if "squared" in (adam, sgd):
        return Diagnosis("squared", "the step of SGD goes with r · scaling²; solve r · (alpha / r)² = r0 · (alpha0 / r0)² for alpha")
    if adam == "constant" and sgd is not None:
        return Diagnosis("sgd_wrong", "right for Adam. For SGD solve r · (alpha / r)² = r0 · (alpha0 / r0)²")
    if sgd == "root" and adam is not None:
        return Diagnosis("adam_wrong", "right for SGD. For Adam solve r · (alpha / r) = r0 · (alpha0 / r0)")
    return None


FAIR_ALPHA = Exercise(
    id="3.5",
    title="A fair alpha",
    difficulty=2,
    minutes=6,
    points=4,
    name="fair_alpha",
    cases=tuple(
        Case(f'optimizer="{optimizer}", from r = {size["r0"]} to r = {size["r"]}', _fair_probe(optimizer, size), _fair_judge(optimizer, size))
        for optimizer, size in FAIR
    ),
    diagnose=_diagnose_fair,
    hints=(
        "Look at the picture of the first step: which scaling gives a level line under which optimizer? Which alpha makes alpha / r that scaling?",
        "Adam's first step goes with r · scaling, SGD's with r · scaling². Keep that equal at r0 and at r, with scaling = alpha / r.",
        'return alpha0 if optimizer == "adam" else alpha0 * (r / r0) ** 0.5',
    ),
    read="exercise 3.4 and the picture below it",
    fallback=lambda: lambda r0, alpha0, r, optimizer: {"adam": alpha0, "sgd": alpha0 * math.sqrt(r / r0)}[optimizer],
)


LAB = Lab(
    number="3",
    name="03_r_alpha_lr",
    title="r, alpha and the learning rate",
    minutes=50,
    core=True,
    objectives=(
        "say how far a rank can get before you train it",
        "tell the two things that alpha does, and trade it for a learning rate, bit for bit",
        "derive, and measure, how r changes the size of a step under Adam and under SGD",
        "compare ranks fairly: rank or step size?",
        "read a map of r, alpha and learning rate, and know how sure you may be",
    ),
    needs=("lab 02", "lab 01 for the spectrum", "what SGD and Adam do"),
    exercises=(FLOOR, RESCALE, TWIN, FIRST_UPDATE, FAIR_ALPHA),
    predictions=(
        Prediction(
            "3.A",
            "Each singular value of the change to be learned is half the one before. How does the best loss of rank 4 compare with that of rank 3?",
            {"a": "half of it", "b": "a quarter", "c": "a sixteenth"},
        ),
        Prediction(
            "3.B",
            "You make alpha 4 times as large and divide the learning rate, all of it, by 4 (Adam). How far apart are the two loss curves at most?",
            {"a": "equal, up to rounding", "b": "up to 10 %", "c": "more than 10 %"},
        ),
        Prediction(
            "3.C",
            "SGD, the usual scaling alpha / r, alpha and learning rate fixed. You go from r = 4 to r = 64. The first step lowers the loss ...",
            {"a": "about 16 times as much", "b": "about as much", "c": "about a 16th as much"},
        ),
        Prediction(
            "3.D",
            "A head with 10 outputs: no update of it can have a rank above 10. Recipe alpha = 2r, Adam, 150 steps. You raise r from 10 to 64. "
            "Test accuracy ...",
            {"a": "stays within 5 points: there is no more rank to use", "b": "rises by more than 5 points", "c": "falls by more than 5 points"},
        ),
        Prediction(
            "3.E",
            "The same ranks, but with a fair alpha, so that the first gain is equal. Of the change from r = 10 to r = 64 ...",
            {"a": "more than half remains: it was rank after all", "b": "less than half remains: it was step size"},
        ),
        Prediction(
            "3.F",
            "r = 2, Adam, nine learning rates, alpha from r / 8 to 32 r. Which alphas reach the floor (within a factor of 2) at some learning rate?",
            {"a": "2r alone", "b": "2r and its neighbours", "c": "all five"},
        ),
    ),
    questions=(
        Question(
            "3.F1",
            "The rank or the step?",
            minutes=10,
            ask="A colleague trained with Adam, r = 8, alpha = 16. With r = 64, alpha = 128 and the same learning rate it got worse: *\"LoRA overfits at "
            "high rank.\"* Write to them: what else did they change, what should they run next, and which outcome would show that they are right?",
            rubric=(
                (1, "says what changed besides the rank, by which factor, and what it does to a step"),
                (1, "proposes runs that separate rank from step size, over seeds"),
                (1, "names a figure of this notebook's runs in support, and one thing that these runs can't show"),
            ),
        ),
    ),
)
