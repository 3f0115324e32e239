"""Lab 12, Variants: its exercises.

Sources: Liu et al. 2024 (DoRA, arXiv 2402.09353), Meng et al. 2024 (PiSSA, arXiv 2404.02948), Zhang et al. 2023 (LoRA-FA, arXiv 2308.03303, and AdaLoRA,
arXiv 2303.10512), Kopiczko et al. 2024 (VeRA, arXiv 2310.11454), Bałazy et al. 2024 (LoRA-XS, arXiv 2405.17604), Holm 1979 (a simple sequentially rejective
multiple test procedure). Oracles are numpy's; counts are counted on arrays that are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import torch

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script
from .formulas import agrees, slips

# ---------------------------------------------------------------- 12.1 DoRA's weight

# W' = m V / ||V||: sizes with out, in, r and the scaling all different, and a square one, on which a wrong broadcast raises nothing
DORA = {"wide": (7, 11, 3, 5 / 3), "tall": (9, 4, 2, 0.35), "square": (6, 6, 2, 2.5)}


def _dora_inputs(size: str, rng, start=False) -> dict[str, np.ndarray]:
    out, inputs, r, _ = DORA[size]
    W0 = rng.normal(size=(out, inputs)) * rng.uniform(0.5, 2.0, size=(out, 1))
    A, B = rng.normal(size=(r, inputs)), np.zeros((out, r)) if start else rng.normal(size=(out, r))
    return {"W0": W0, "A": A, "B": B, "m": np.sqrt((W0**2).sum(1)) if start else rng.uniform(0.5, 3.0, size=out)}


def _dora_probe(size: str, start=False, gradients=False):
    def probe(rng):
        s = Script()
        arrays = _dora_inputs(size, rng, start)
        refs = {name: s.input(name, array, requires_grad=gradients and name != "W0") for name, array in arrays.items()}
        weight = s.call(*refs.values(), DORA[size][3])
        s.input("scaling", np.array(DORA[size][3]))
        s.send("weight", weight)
        if gradients:
            s.backward(weight, s.input("g", rng.normal(size=arrays["W0"].shape)))
            for name in "ABm":
                s.send(f"gradient of {name}", s.grad(refs[name]))
        return s

    return probe


def _dora(inputs, chosen=("rows", "rows", "all", "quotient")):
    """The oracle, and with other choices what mistakes give; nan where a shape would not fit."""
    norm, magnitude, direction, form = chosen
    W0, m, s = inputs["W0"], inputs["m"], float(inputs["scaling"])
    product_, nothing = inputs["B"] @ inputs["A"], np.full_like(inputs["W0"], np.nan)
    update = s * product_
    V = {"all": W0 + update, "no scaling": W0 + product_, "all scaled": s * (W0 + product_), "W0 scaled": s * W0 + product_,
         "W0": W0, "update": update, "subtracted": W0 - update, "divided again": W0 + update / len(inputs["A"])}[direction]  # fmt: skip
    square = len(W0) == W0.shape[1]
    measured = {"W0's rows": W0, "W0's columns": W0, "W0, whole": W0, "update's rows": update}.get(norm, V)
    rows = np.sqrt((measured**2).sum(1, keepdims=True))
    n = {
        "rows": lambda: rows, "W0's rows": lambda: rows, "update's rows": lambda: rows, "columns": lambda: np.sqrt((V**2).sum(0)),
        "W0's columns": lambda: np.sqrt((W0**2).sum(0)), "whole": lambda: np.sqrt((V**2).sum()), "W0, whole": lambda: np.sqrt((W0**2).sum()),
        "squares": lambda: rows**2, "absolute": lambda: np.abs(V).sum(1, keepdims=True), "largest": lambda: np.abs(V).max(1, keepdims=True),
        "mean square": lambda: rows / math.sqrt(V.shape[1]), "none": lambda: np.ones(1), "across": lambda: rows.T if square else nothing,
    }[norm]()  # fmt: skip
    m = {"rows": lambda: m[:, None], "none": lambda: np.ones(1), "across": lambda: m[None] if square else nothing,
         "one more": lambda: 1 + m[:, None]}[magnitude]()  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"quotient": lambda: m * V / n, "m times the update": lambda: W0 + m / n * (V - W0), "m times the base": lambda: m / n * W0 + (V - W0),
                "added": lambda: m + V / n, "added to W0": lambda: W0 + m * V / n, "norm on top": lambda: m * V * n,
                "direction of update": lambda: W0 + m * (V - W0) / np.sqrt(((V - W0) ** 2).sum(1, keepdims=True)),
                "divided by m": lambda: V / n / m, "minus W0": lambda: m * V / n - W0, "scaled": lambda: s * m * V / n}[form]()  # fmt: skip


def _dora_judge(inputs, answers):
    return compare(answers["weight"], _dora(inputs), what="dora_weight(…)")


def _dora_start_judge(inputs, answers):
    return compare(answers["weight"], inputs["W0"], what="dora_weight(…) at B = 0")


def _dora_gradients(inputs, through_norm=False):
    """d(W' · g).sum()/d(A, B, m), by hand; with the norm as a constant, or not."""
    s, g, m = float(inputs["scaling"]), inputs["g"], inputs["m"][:, None]
    V = inputs["W0"] + s * inputs["B"] @ inputs["A"]
    n = np.sqrt((V**2).sum(1, keepdims=True))
    dV = m / n * g
    if through_norm:
        dV = dV - m / n * V / n * (g * V / n).sum(1, keepdims=True)
    return {"A": s * inputs["B"].T @ dV, "B": s * dV @ inputs["A"].T, "m": (g * V / n).sum(1)}


def _dora_gradient_judge(inputs, answers):
    for name, expected in _dora_gradients(inputs).items():
        if answers[f"gradient of {name}"] is None:
            return f"no gradient reaches {name}"
        problem = compare(answers[f"gradient of {name}"], expected, what=f"the gradient of {name}")
        if problem:
            return problem
    return None


_DORA_SLIPS = [
    {"": ("", "rows"),
     "columns": ("you take the norm of each column (dim=0), one for each input; m has one number for each output, so the norms are the rows'", "columns"),
     "whole_matrix": ("you divide by one norm, that of the whole matrix; each row has its own", "whole"),
     "norm_of_W0": ("you divide by the norms of W0. That is right at the start only; later the direction V / ‖V‖ would no longer have length 1", "W0's rows"),
     "norm_of_W0_columns": ("you divide by the norms of W0's columns; asked are those of V's rows", "W0's columns"),
     "norm_of_W0_whole": ("you divide by one norm, that of W0; asked is that of each row of V", "W0, whole"),
     "norm_of_update": ("you divide by the norms of the update alone; the direction is that of V, W0 included", "update's rows"),
     "norm_squared": ("the squares are added up, but the root is missing", "squares"),
     "norm_absolute": ("that is the sum of absolute values; the norm is the root of the sum of squares", "absolute"),
     "norm_largest": ("that is the largest absolute value of each row; the norm is the root of the sum of squares", "largest"),
     "norm_mean": ("that is the root of the mean square; the norm is the root of the sum", "mean square"),
     "norm_missing": ("V is not divided by its norms, so m would not be the length of the rows", "none"),
     "norm_across": ("the norms are laid along the columns: give them the shape (out, 1), with keepdim=True", "across")},
    {"": ("", "rows"), "m_missing": ("the magnitude m is missing", "none"),
     "m_across": ("m is laid along the columns, and has one number for each row: m[:, None]", "across"),
     "m_from_one": ("m is the length itself, not what is added to 1", "one more")},
    {"": ("", "all"), "scaling_missing": ("the scaling is missing in V", "no scaling"),
     "base_missing": ("W0 is missing in V", "update"), "update_missing": ("the update is missing in V", "W0"),
     "divided_by_r": ("you divide by r once more; the scaling is alpha / r already", "divided again"),
     "W0_scaled": ("the scaling stands at W0; it belongs to B A", "W0 scaled"), "subtracted": ("the update is added, not subtracted", "subtracted")},
    {"": ("", "quotient"),
     "update_only": ("only the update is rescaled by m / ‖V‖; the whole V is, W0 too", "m times the update"),
     "base_only": ("only W0 is rescaled by m / ‖V‖; the whole V is, the update too", "m times the base"),
     "m_added": ("m is added; it is a factor", "added"),
     "added_to_W0": ("W0 enters twice: m V / ‖V‖ is the weight, nothing is added to it", "added to W0"),
     "direction_of_the_update": ("W0 plus m times the direction of the update: the rows of V, W0 included, get the length m", "direction of update"),
     "multiplied_by_norm": ("V is multiplied by its norm; divide", "norm on top"),
     "minus_W0": ("that is the change, W' − W0; asked is W' itself", "minus W0"),
     "scaled_whole": ("the scaling multiplies the whole weight; it belongs to B A alone", "scaled"),
     "divided_by_m": ("m is divided by; it is the length that each row gets", "divided by m")},
]  # fmt: skip


def _diagnose_dora(evidence: list[Evidence]) -> Diagnosis | None:
    values, gradient = evidence[:4], evidence[4]
    if all(e.failure is None for e in values):
        names = [f"gradient of {name}" for name in "ABm"]
        found = [gradient.answers.get(name) for name in names]
        if all(f is not None for f in found) and agrees(found, list(_dora_gradients(gradient.inputs, through_norm=True).values()), 1e-6):
            text = "the weight is right, but the norm passes a gradient; the paper's section 4.3 takes it as a constant: .detach()"
            return Diagnosis("norm_not_detached", text)
        if gradient.error is not None and "cut off" in gradient.error.message or all(f is None for f in found):
            return Diagnosis("all_detached", "the weight is right, but nothing would train: only the norm is a constant, not the whole computation")
        if found[0] is None and found[1] is None and found[2] is not None:
            return Diagnosis("direction_detached", "all of V is detached, so A and B would never train: detach the norm alone")
        if found[2] is None and found[0] is not None:
            return Diagnosis("m_detached", "m is detached and would never train: detach the norm alone")
        return None
    # Numbers that do not fit the wide weight may fit the square one, silently: then that one tells.
    runs = [(e.inputs, [e.answers.get("weight")]) for e in (values[0], values[1], values[3]) if "weight" in e.answers]
    named = slips(runs, lambda i, c: [_dora(i, c)], _DORA_SLIPS) if runs else None
    if named is None and evidence[0].error is not None and "cannot be multiplied" in evidence[0].error.message:
        return Diagnosis("order", "A (r, in) and B (out, r) meet as B @ A, which is (out, in)")
    return named


def _lab_dora(W0, A, B, m, scaling):
    V = W0 + scaling * B @ A
    norms = torch.linalg.vector_norm(V, dim=1).detach()
    return (m / norms)[:, None] * V


DORA_WEIGHT = Exercise(
    id="12.1",
    title="DoRA's weight",
    difficulty=1,
    minutes=5,
    points=2,
    name="dora_weight",
    cases=(
        Case("each row is m times the direction of V's row", _dora_probe("wide"), _dora_judge),
        Case("the same for a tall weight and another scaling", _dora_probe("tall"), _dora_judge),
        Case("at the start, with m = ‖W0‖ and B = 0, it is W0", _dora_probe("tall", start=True), _dora_start_judge),
        Case("also where out = in, and a wrong shape raises no error", _dora_probe("square"), _dora_judge),
        Case("the norm passes no gradient", _dora_probe("wide", gradients=True), _dora_gradient_judge),
    ),
    diagnose=_diagnose_dora,
    hints=(
        "m has one number for each output. Which direction of the weight, rows or columns, belongs to one output?",
        "V = W0 + scaling * B @ A; its norms: V.norm(dim=1, keepdim=True), (out, 1), and a constant for autograd: .detach(). m needs the shape (out, 1), too.",
        "V = W0 + scaling * B @ A; return m[:, None] * V / V.norm(dim=1, keepdim=True).detach()",
    ),
    read="Liu et al. 2024, equation 5 and section 4.3",
    fallback=lambda: _lab_dora,
)


# ---------------------------------------------------------------- 12.2 PiSSA's start

PISSA = {"wide": (6, 9, 2, 2.5), "tall": (8, 5, 3, 0.4)}  # out, in, r, scaling


def _pissa_probe(size: str):
    def probe(rng):
        out, inputs, r, scaling = PISSA[size]
        s = Script()
        # Singular values well apart: their order, and the directions, are then the same for everybody.
        U, _ = np.linalg.qr(rng.normal(size=(out, out)))
        V, _ = np.linalg.qr(rng.normal(size=(inputs, inputs)))
        k = min(out, inputs)
        S = 4.0 * 0.6 ** np.arange(k) * rng.uniform(0.95, 1.05, size=k)
        result = s.call(s.input("W0", (U[:, :k] * S) @ V[:, :k].T), r, scaling)
        s.input("r", np.array(r))
        s.input("scaling", np.array(scaling))
        for k, name in enumerate(("A", "B", "residual")):
            s.send(name, s.get(result, str(k)))
        return s

    return probe


def _pissa(inputs, chosen=("root of S / scaling", "first", "less scaled")):
    """Three arrays that do not depend on the signs of singular vectors, for the oracle or for a mistake: B A, [Bᵀ B, A Aᵀ] and the residual."""
    share, which, residual = chosen
    W0, r, s = inputs["W0"], int(inputs["r"]), float(inputs["scaling"])
    # torch's svd: with mistakes that mix directions, the signs that it chose show in the numbers
    U, S, Vh = (t.numpy() for t in torch.linalg.svd(torch.from_numpy(W0), full_matrices=False))
    pick = slice(len(S) - r, len(S)) if which == "last" else slice(0, r)
    u, v, S = U[:, pick], Vh[pick], S[pick]
    if which == "columns of Vh":  # of the full one: else they fit no wide W0
        v = torch.linalg.svd(torch.from_numpy(W0))[2].numpy()[:, :r].T
    root = np.sqrt(S)
    b, a = {
        "root of S / scaling": (np.sqrt(S / s),) * 2, "root of S": (root,) * 2, "root of S, then / scaling": (root / s,) * 2,
        "root of S, then * scaling": (root * s,) * 2, "root of S * scaling": (np.sqrt(S * s),) * 2,
        "S / scaling": (S / s,) * 2, "S": (S,) * 2, "none": (np.ones(r),) * 2, "root of 1 / scaling": (np.full(r, s**-0.5),) * 2,
        "all in B": (S / s, np.ones(r)), "all in A": (np.ones(r), S / s), "all in B, unscaled": (S, np.ones(r)), "all in A, unscaled": (np.ones(r), S),
        "scaling in B": (root / s, root), "scaling in A": (root, root / s),
        "S in A, scaling in B": (np.full(r, 1 / s), S), "S in B, scaling in A": (S, np.full(r, 1 / s)),
    }[share]  # fmt: skip
    B, A = u * b, a[:, None] * v
    left = {"less scaled": W0 - s * B @ A, "less unscaled": W0 - B @ A, "W0": W0, "plus": W0 + s * B @ A, "part": s * B @ A,
            "over scaling": W0 - B @ A / s, "scaled whole": s * (W0 - B @ A)}[residual]  # fmt: skip
    return [B @ A, B.T @ B, A @ A.T, left]


def _pissa_found(e: Evidence):
    """[B A, Bᵀ B, A Aᵀ, residual] of the student's answer, or a sentence about its shapes."""
    out, inputs = e.inputs["W0"].shape
    r = int(e.inputs["r"])
    for name, shape in (("A", (r, inputs)), ("B", (out, r)), ("residual", (out, inputs))):
        found = e.answers.get(name)
        if not isinstance(found, np.ndarray) or found.shape != shape:
            there = found.shape if isinstance(found, np.ndarray) else "no tensor" if name in e.answers else "nothing"
            return f"{name} should have shape {shape}, found {there}"
    A, B, residual = (e.answers[name].astype(np.float64) for name in ("A", "B", "residual"))
    with np.errstate(all="ignore"):  # NaN in an answer is the comparison's business
        return [B @ A, B.T @ B, A @ A.T, residual]


def _pissa_judge(what: str):
    def judge(inputs, answers):
        found = _pissa_found(Evidence("", inputs, answers))
        if isinstance(found, str):
            return found
        U, S, Vh = np.linalg.svd(inputs["W0"], full_matrices=False)
        r, s = int(inputs["r"]), float(inputs["scaling"])
        product_, BtB, AAt, residual = found
        if what == "part":
            return compare(s * product_, (U[:, :r] * S[:r]) @ Vh[:r], what="scaling · B A", rtol=1e-6)
        if what == "identity":
            return compare(residual + s * product_, inputs["W0"], what="residual + scaling · B A", rtol=1e-6)
        even = np.diag(S[:r] / s)
        return compare(BtB, even, what="Bᵀ B", rtol=1e-6) or compare(AAt, even, what="A Aᵀ", rtol=1e-6)

    return judge


_PISSA_SLIPS = [
    {"": ("", "root of S / scaling"),
     "unscaled_factors": (
         "A and B get sqrt(S) each, without the scaling. The layer multiplies B A by it, so what trains is not W0's strongest part but scaling times it",
         "root of S"),
     "scaling_outside_root": ("each factor is divided by the scaling, so the product by its square: put it under the root", "root of S, then / scaling"),
     "scaling_times": ("you multiply by the scaling; the layer does that once more, so divide, under the root", "root of S, then * scaling"),
     "scaling_times_in_root": ("you multiply by the scaling; the layer does that once more, so divide", "root of S * scaling"),
     "no_root": ("each factor gets all of S, so the product has S²; each gets the root", "S / scaling"),
     "no_root_unscaled": ("each factor gets all of S, so the product has S²; each gets sqrt(S / scaling)", "S"),
     "S_missing": ("the singular values are missing: sqrt(S / scaling) in each factor", "none"),
     "S_missing_scaled": ("the singular values are missing: sqrt(S / scaling) in each factor", "root of 1 / scaling"),
     "all_in_B": ("B has all of S and A none: the product is right, but one factor starts much larger than the other; each gets the root", "all in B"),
     "all_in_A": ("A has all of S and B none: the product is right, but one factor starts much larger than the other; each gets the root", "all in A"),
     "all_in_B_unscaled": ("B has all of S and A none, and the scaling is missing: sqrt(S / scaling) in each", "all in B, unscaled"),
     "all_in_A_unscaled": ("A has all of S and B none, and the scaling is missing: sqrt(S / scaling) in each", "all in A, unscaled"),
     "S_in_A": ("A has all of S, and B is divided by the scaling: the product is right, but uneven; sqrt(S / scaling) in each", "S in A, scaling in B"),
     "S_in_B": ("B has all of S, and A is divided by the scaling: the product is right, but uneven; sqrt(S / scaling) in each", "S in B, scaling in A"),
     "scaling_in_B": ("only B is divided by the scaling: the product is right, but uneven; sqrt(S / scaling) in each", "scaling in B"),
     "scaling_in_A": ("only A is divided by the scaling: the product is right, but uneven; sqrt(S / scaling) in each", "scaling in A")},
    {"": ("", "first"),
     "last_directions": ("these are the weakest directions (MiCA trains those); PiSSA trains the strongest, which svd gives first", "last"),
     "columns_of_Vh": ("A is made of columns of Vh; the right singular vectors are its rows: Vh[:r]", "columns of Vh")},
    {"": ("", "less scaled"),
     "residual_unscaled": ("the residual is W0 − B A; the layer adds scaling · B A, so that has to be taken out", "less unscaled"),
     "residual_is_W0": ("the residual is W0 itself: the strongest part is then there twice, and step 0 is another model", "W0"),
     "residual_plus": ("the residual adds the part; it has to be taken out", "plus"),
     "residual_is_part": ("the residual is the part that trains; what stays frozen is the rest", "part"),
     "residual_over_scaling": ("B A is divided by the scaling in the residual; the layer multiplies by it", "over scaling"),
     "residual_scaled_whole": ("the scaling multiplies W0, too; it belongs to B A alone", "scaled whole")},
]  # fmt: skip


def _diagnose_pissa(evidence: list[Evidence]) -> Diagnosis | None:
    e = evidence[0]
    A, B = e.answers.get("A"), e.answers.get("B")
    out, inputs = e.inputs["W0"].shape
    r = int(e.inputs["r"])
    if isinstance(A, np.ndarray) and isinstance(B, np.ndarray):
        if (A.shape, B.shape) == ((out, r), (r, inputs)):
            return Diagnosis("swapped", "the order is A, B, residual: A (r, in) first, then B (out, r)")
        if (A.shape, B.shape) == ((inputs, r), (r, out)):
            return Diagnosis("transposed", "both factors are transposed: A is (r, in), B is (out, r)")
        if A.shape == (inputs, r) and B.shape == (out, r):
            return Diagnosis("A_transposed", "A is transposed, it should be (r, in): svd's third result has the right singular vectors in its rows already")
        if A.shape == (r, inputs) and not (A.any() and B.any()):
            return Diagnosis("lora_start", "one factor is zero, as in LoRA's start. PiSSA starts with W0's strongest directions in both")
        Q, R = np.linalg.qr(e.inputs["W0"])
        if (A.shape, B.shape) == ((r, inputs), (out, r)) and compare(float(e.inputs["scaling"]) * B @ A, Q[:, :r] @ R[:r], rtol=1e-6) is None:
            return Diagnosis("qr", "that is the QR decomposition's first part, OLoRA's start; it is not the strongest part of W0, which the SVD gives")
    if A is not None and "residual" not in e.answers and e.error is not None and "3 or more values" in e.error.message:
        return Diagnosis("two_values", "these are two values; asked are three: A, B and the residual, which takes W0's place")
    # What fits no wide W0 may fit the tall one: then that one tells.
    runs = [(x.inputs, _pissa_found(x)) for x in (evidence[0], evidence[3]) if x.error is None]
    if not runs or any(isinstance(found, str) for _, found in runs):
        return None
    named = slips(runs, _pissa, _PISSA_SLIPS)
    if named is not None and named.key == "unscaled_factors_and_residual_unscaled":
        return Diagnosis(
            "scaling_forgotten",
            "the scaling appears nowhere. The layer adds scaling · B A to the residual, so step 0 would be another model: sqrt(S / scaling) in both factors, "
            "and scaling · B A out of W0",
        )
    return named


def _lab_pissa(W0, r, scaling):
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    A, B = root[:, None] * Vh[:r], U[:, :r] * root
    return A, B, W0 - scaling * B @ A


PISSA_START = Exercise(
    id="12.2",
    title="PiSSA's start",
    difficulty=2,
    minutes=6,
    points=3,
    name="pissa_start",
    cases=(
        Case("scaling · B A is W0's strongest part", _pissa_probe("wide"), _pissa_judge("part")),
        Case("A and B share it evenly", _pissa_probe("wide"), _pissa_judge("even")),
        Case("step 0: residual + scaling · B A is W0", _pissa_probe("wide"), _pissa_judge("identity")),
        Case("the strongest part of a tall W0, scaling below 1", _pissa_probe("tall"), _pissa_judge("part")),
        Case("step 0 of a tall W0, scaling below 1", _pissa_probe("tall"), _pissa_judge("identity")),
    ),
    diagnose=_diagnose_pissa,
    hints=(
        "The layer will compute residual + scaling · B A. Which matrix of rank r should scaling · B A be, and what must the residual be then?",
        "U, S, Vh = torch.linalg.svd(W0, full_matrices=False): the first r of them. A and B get a root of S each, and the scaling is divided out first.",
        "root = (S[:r] / scaling).sqrt(); A = root[:, None] * Vh[:r]; B = U[:, :r] * root; return A, B, W0 - scaling * B @ A",
    ),
    read="Meng et al. 2024, equations 2 to 4",
    fallback=lambda: _lab_pissa,
)


# ---------------------------------------------------------------- 12.3 a rank for a budget

BUDGETED = ("lora", "lora-fa", "dora", "adalora", "vera", "lora-xs")
BUDGETS = 7  # for each method: four roomy ones, exactly enough, one too few, not even r = 1
ROOMY = {"vera": (43, 317, 1041)}  # as in its paper: ranks in the hundreds


def made_arrays(method: str, shapes: Sequence[tuple[int, int]], r: int) -> int:
    """The oracle: makes the arrays that train, and counts their entries."""
    trained = {
        "lora": lambda out, inputs: [(r, inputs), (out, r)],
        "lora-fa": lambda out, inputs: [(out, r)],
        "dora": lambda out, inputs: [(r, inputs), (out, r), (out,)],
        "adalora": lambda out, inputs: [(r, inputs), (out, r), (r,)],
        "vera": lambda out, inputs: [(r,), (out,)],
        "lora-xs": lambda out, inputs: [(r, r)],
    }[method]
    return sum(np.empty(shape, dtype=np.int8).size for out, inputs in shapes for shape in trained(out, inputs))


def largest_rank(count: Callable[[int], int], budget: int) -> int:
    """The largest r with count(r) <= budget, 0 if not even r = 1 fits; by trying, since counts only grow."""
    low, high = 0, 1
    while count(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return low


def _budget_probe(method: str):
    def probe(rng):
        s = Script()
        # As in a transformer with few heads for keys and values: q, k, v, o, and a wide MLP. No rank below exceeds a side, but for VeRA's, whose may.
        d, kv, wide = int(rng.integers(400, 600)), int(rng.integers(180, 220)), int(rng.integers(900, 1300))
        shapes = [(d, d), (kv, d), (kv, d), (d, d), (wide, d), (d, wide)]
        count = lambda r: made_arrays(method, shapes, r)  # noqa: E731
        exact = count(int(rng.integers(6, 9)))
        roomy = [count(r) + int(share * (count(r + 1) - count(r))) for r, share in zip(ROOMY.get(method, (11, 37, 141)), (0.3, 0.7, 0.6), strict=True)]
        roomy.append(made_arrays("lora", shapes, 3 if method == "vera" else 23) + 3)  # a LoRA fits, and not a number more for each layer
        s.input("shapes", np.array(shapes))
        for k, budget in enumerate([*roomy, exact, exact - 1, max(count(1) // 2, 1)]):
            s.input(f"budget {k}", np.array(budget))
            s.send(f"rank {k}", s.call(method, shapes, budget))
        return s

    return probe


def _settings(e: Evidence):
    shapes = [tuple(int(n) for n in row) for row in e.inputs["shapes"]]
    return shapes, [int(e.inputs[f"budget {k}"]) for k in range(BUDGETS)]


def _budget_judge(method: str):
    def judge(inputs, answers):
        shapes, budgets = _settings(Evidence("", inputs, answers))
        for k, budget in enumerate(budgets):
            expected = largest_rank(lambda r: made_arrays(method, shapes, r), budget)
            found = _number(answers[f"rank {k}"])
            if found is None:
                return f'rank_for_budget("{method}", …) gave no number'
            if found != expected:
                if found > expected:
                    why = f"r = {found:g} trains more than that"
                elif found < 0:
                    why = "a rank is never below 0"
                else:
                    why = f"r = {expected} would train no more than that"
                return f'"{method}" with a budget of {budget} numbers: you say r = {found:g}; {why}'
        return None

    return judge


def _number(value) -> float | None:
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iuf":
        value = value.item()
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value) else None


def _all(one: Callable[[int, int, int], int]) -> Callable:
    return lambda shapes, r: sum(one(out, inputs, r) for out, inputs in shapes)


# method -> key -> (what is wrong, numbers that train according to this mistake)
_RIGHT = {method: (lambda shapes, r, method=method: made_arrays(method, shapes, r)) for method in BUDGETED}
_MISCOUNTS: dict[str, dict[str, tuple[str, Callable]]] = {
    "lora": {
        "lora_out_only": ("only B is counted; A trains, too", _all(lambda o, i, r: r * o)),
        "lora_in_only": ("only A is counted; B trains, too", _all(lambda o, i, r: r * i)),
        "lora_square": ("every layer is counted as square, 2 r in; B has out rows", _all(lambda o, i, r: 2 * r * i)),
        "lora_square_out": ("every layer is counted as square, 2 r out; A has in columns", _all(lambda o, i, r: 2 * r * o)),
        "lora_full": ("out · in is the frozen weight", _all(lambda o, i, r: r * o * i)),
    },
    "lora-fa": {
        "fa_as_lora": ("A is counted, and LoRA-FA freezes it", _RIGHT["lora"]),
        "fa_wrong_factor": ("A is counted instead of B; it is A, (r, in), that LoRA-FA freezes", _all(lambda o, i, r: r * i)),
    },
    "dora": {
        "magnitude_missing": ("the magnitudes are missing, one for each output of each layer", _RIGHT["lora"]),
        "magnitude_per_input": ("there is a magnitude for each output, not for each input", _all(lambda o, i, r: r * (o + i) + i)),
        "magnitude_per_rank": ("the magnitudes are there once, not once for each of the r directions", _all(lambda o, i, r: r * (o + i) + r * o)),
        "magnitude_per_layer": ("a layer has one magnitude for each output, not one in all", _all(lambda o, i, r: r * (o + i) + 1)),
        "magnitude_both": ("there is a magnitude for each output, none for the inputs", _all(lambda o, i, r: r * (o + i) + o + i)),
    },
    "adalora": {
        "values_missing": ("E is missing (λ in the paper), r numbers in each layer", _RIGHT["lora"]),
        "values_square": ("Λ is diagonal: r numbers, not r²", _all(lambda o, i, r: r * (o + i) + r * r)),
        "values_once": ("E is there for each layer, not once for all", lambda shapes, r: made_arrays("lora", shapes, r) + r),
    },
    "vera": {
        "vera_shared_counted": (
            "A and B are counted; they are random and frozen, and only the two vectors train", lambda shapes, r:
            r * (max(o for o, _ in shapes) + max(i for _, i in shapes)) + made_arrays("vera", shapes, r)),
        "vera_factors_counted": ("A and B are counted for each layer; they are shared and frozen, and only the two vectors train",
                                 _all(lambda o, i, r: r * (o + i) + o + r)),
        "vera_as_lora": ("that is LoRA's count; VeRA's A and B are frozen, only the two vectors train", _RIGHT["lora"]),
        "vera_in": ("b has one number for each output, not for each input", _all(lambda o, i, r: i + r)),
        "vera_b_missing": ("b is missing, one number for each output", _all(lambda o, i, r: r)),
        "vera_vectors_shared": ("d is there for each layer; only A and B are shared", lambda shapes, r: sum(o for o, _ in shapes) + r),
        "vera_product": ("the two vectors have out and r numbers, together out + r", _all(lambda o, i, r: o * r)),
    },
    "lora-xs": {
        "core_diagonal": ("R is a whole (r, r) matrix, not a diagonal", _all(lambda o, i, r: r)),
        "core_shared": ("every layer has its own R", lambda shapes, r: r * r),
        "xs_as_lora": ("that is LoRA's count; LoRA-XS freezes both outer factors and trains R (r, r) alone", _RIGHT["lora"]),
        "xs_outer_counted": ("the outer factors are counted; they come from W0 and are frozen", _all(lambda o, i, r: r * (o + i) + r * r)),
    },
}  # fmt: skip
# Which layers are looked at.
_LOOKS = {
    "": ("", lambda shapes: shapes),
    "first_layer": ("you count the first layer alone; the budget is for all of them", lambda shapes: shapes[:1]),
    "last_layer": ("you count the last layer alone (a loop that overwrites?); the budget is for all of them", lambda shapes: shapes[-1:]),
    "first_times_layers": ("you take every layer to be as large as the first; they are not", lambda shapes: shapes[:1] * len(shapes)),
    "shapes_swapped": ("a shape is (out, in), as torch's weights have it; you read it as (in, out)", lambda shapes: [(i, o) for o, i in shapes]),
    "largest_times_layers": ("you let the largest layer decide for all (as if each had an equal part of the budget); add up what the layers really need",
                             lambda shapes: [max(shapes, key=lambda z: z[0] * z[1])] * len(shapes)),
}  # fmt: skip
# How a rank is made of a count and a budget.
_ROUNDINGS: dict[str, tuple[str, Callable]] = {
    "": ("", lambda count, b: largest_rank(count, b)),
    "negative": ("where the vectors alone cost more than the budget, your rank falls below 0; say 0", lambda count, b: _linear(count, b, math.floor)),
    "at_least_one": ("you say 1 where not even r = 1 fits; asked is 0 then", lambda count, b: max(1, largest_rank(count, b))),
    "rounded": ("you round to the nearest rank, which may cost more than there is; round down", lambda count, b: _linear(count, b, round)),
    "rounded_up": ("you round up, which costs more than there is; round down", lambda count, b: _linear(count, b, math.ceil)),
    "too_large": ("you return the first rank that is too large, or that reaches the budget; asked is the last one that fits",
                  lambda count, b: largest_rank(count, b) + (count(0) <= b)),
    "first_too_large": ("you return the first rank that is too large; asked is the last one that fits", lambda count, b: largest_rank(count, b) + 1),
    "strict": ("a rank that uses up the budget exactly fits, too: <= and not <", lambda count, b: largest_rank(count, b - 1)),
    "one_less": ("one more fits: your search stops a step too early", lambda count, b: largest_rank(count, b) - 1),
    "powers": ("you try powers of two alone; any whole rank will do", lambda count, b: max([0] + [2**k for k in range(12) if count(2**k) <= b])),
    "not_whole": ("a rank is a whole number: round down", lambda count, b: _linear(count, b, lambda v: v)),
}  # fmt: skip


def _linear(count, budget: int, rounding: Callable) -> float:
    """What solving the count for r gives: a straight line, or a square (LoRA-XS)."""
    fixed = count(0)
    if count(2) - fixed == 4 * (count(1) - fixed):
        return rounding(math.sqrt(max(0.0, (budget - fixed) / (count(1) - fixed))))
    return rounding((budget - fixed) / (count(1) - fixed))


def _diagnose_budget(evidence: list[Evidence]) -> Diagnosis | None:
    raised = [e for e in evidence if e.error is not None]
    if raised and all(e.error.type in ("ValueError", "AssertionError") and f"rank {BUDGETS - 2}" in e.answers for e in raised):
        return Diagnosis("raises", "you raise where not even r = 1 fits; asked is 0 there, so that a comparison can leave the method out")
    if any(e.answers.get(f"rank {BUDGETS - 1}", 0) is None and _number(e.answers.get("rank 0")) is not None for e in evidence):
        return Diagnosis("none_for_zero", "you return None where not even r = 1 fits; asked is 0 there")
    found = {method: [_number(e.answers.get(f"rank {k}")) for k in range(BUDGETS)] for method, e in zip(BUDGETED, evidence, strict=True)}
    if any(None in ranks for ranks in found.values()):
        return None
    settings = {method: _settings(e) for method, e in zip(BUDGETED, evidence, strict=True)}

    def gives(method: str, count: Callable, look: str, rounding: str) -> bool:
        shapes, budgets = settings[method]
        seen, solve = _LOOKS[look][1](shapes), _ROUNDINGS[rounding][1]
        for b, n in zip(budgets, found[method], strict=True):
            rank = solve(lambda r: count(seen, r), b)
            if abs(rank - n) > 1e-6 and (rank > 0 or n != 0 or rounding == "negative"):
                return False
        return True

    # How somebody rounds, and which layers they look at, shows in every method; a wrong count belongs to one method.
    explanations: dict[int, list] = {}
    for look, rounding in product(_LOOKS, _ROUNDINGS):
        wrong = []
        for method in BUDGETED:
            roundings = {rounding, ""} if method == "lora-xs" else {rounding}  # a root, and rounded in another line
            if any(gives(method, _RIGHT[method], look, z) for z in roundings):
                continue
            counts = [c for c, (_, count) in _MISCOUNTS[method].items() if any(gives(method, count, look, z) for z in roundings)]
            wrong.append((method, counts))
            if not counts:
                break
        if all(counts for _, counts in wrong):
            explanations.setdefault(bool(look) + bool(rounding) + len(wrong), []).append((look, rounding, wrong))
    best = explanations[min(explanations)] if explanations else []
    if len(best) != 1:
        return None
    look, rounding, wrong = best[0]
    if any(len(counts) > 1 for _, counts in wrong[:1]):
        return None
    keys, texts = [], []
    for method, (count,) in wrong[:1]:
        keys, texts = [count], [f"{method}: {_MISCOUNTS[method][count][0]}"]
    keys += [key for key in (look, rounding) if key]
    texts += [table[key][0] for table, key in ((_LOOKS, look), (_ROUNDINGS, rounding)) if key]
    return Diagnosis("_and_".join(keys), "; and ".join(texts)) if keys else None


def _lab_rank(method, shapes, budget):
    L, outs, both = len(shapes), sum(o for o, _ in shapes), sum(o + i for o, i in shapes)
    if method == "lora-xs":
        return math.isqrt(budget // L)
    fixed, each = {"lora": (0, both), "lora-fa": (0, outs), "dora": (outs, both), "adalora": (0, both + L), "vera": (outs, L)}[method]
    return max(0, (budget - fixed) // each)


RANK_FOR_BUDGET = Exercise(
    id="12.3",
    title="The same number of trained numbers",
    difficulty=2,
    minutes=7,
    points=3,
    name="rank_for_budget",
    cases=tuple(
        Case(title, _budget_probe(method), _budget_judge(method))
        for method, title in zip(
            BUDGETED, ("LoRA", "LoRA-FA", "DoRA, magnitudes included", "AdaLoRA, E included", "VeRA, two vectors a layer", "LoRA-XS, r² a layer"), strict=True
        )
    ),
    diagnose=_diagnose_budget,
    hints=(
        "For each method: how many numbers train whatever r is, and how many more for each step of r? Add over the layers.",
        "Fixed: DoRA's and VeRA's sum of out. For each r: sum of (in + out) for LoRA, DoRA and, with one more a layer, AdaLoRA; sum of out for LoRA-FA; "
        "the number of layers for VeRA. LoRA-XS: r² a layer. Round down, and never below 0.",
        "r = max(0, (budget - fixed) // each_r); for \"lora-xs\": math.isqrt(budget // len(shapes))",
    ),
    read="the table above this exercise; lora_lab/counting.py, METHODS",
    fallback=lambda: _lab_rank,
)


# ---------------------------------------------------------------- 12.4 the verdict of a race

# |t| that chance exceeds with probability 5 % / k (two-sided Student's t, n - 1 degrees of freedom), k = 0 (never used, out of reach) to 12
LIMITS = {
    5: (1e9, 2.7764, 3.4954, 3.9608, 4.3147, 4.6041, 4.8510, 5.0675, 5.2611, 5.4366, 5.5976, 5.7465, 5.8853),
    8: (1e9, 2.3646, 2.8412, 3.1276, 3.3353, 3.4995, 3.6358, 3.7527, 3.8552, 3.9467, 4.0293, 4.1047, 4.1743),
}
WORDS = ("better", "worse", "open")
ENTRANTS = ("DoRA", "PiSSA", "VeRA", "LoRA+", "rsLoRA")
# Seeds, paired t of the five entrants, a seed's luck (shared by all) in units of an entrant's own spread, that spread
RACES = {
    "strict": (5, (6.0, 5.0, 4.1, 3.0, -1.0), 2.0, 0.4),  # three are better; 3.0 would be, alone
    "near": (5, (4.3, 1.0, -0.5, 0.2, 0.9), 2.0, 0.4),  # by n instead of n - 1 it would pass
    "counted": (5, (4.7, 0.4, -1.2, 0.8, 0.1), 2.0, 0.4),  # passes among 5, not among 6
    "thin": (5, (5.0, 0.9, -0.7, 0.4, 1.1), 2.0, 0.4),  # passes among 6, too, but not with n - 1 under the root
    "first fails": (5, (4.45, 4.40, 0.8, -0.4, 1.5), 2.0, 0.4),  # 4.40 would pass second, if the first had
    "quiet": (5, (9.0, 8.0, 7.0, 6.0, 2.0), 0.01, 3.0),  # no shared luck: unpaired is right here
    "all": (5, (9.0, -8.0, 7.5, 6.5, 2.9), 2.0, 0.4),  # the last one faces the uncorrected limit
    "lucky": (5, (20.0, 14.0, 12.0, 9.3, -9.0), 2.0, 0.4),  # all pass; unpaired each t is a third
    "eight, last": (8, (-6.0, 5.0, 4.5, -4.0, 2.5), 2.0, 0.4),
    "both ways": (5, (-7.0, 4.7, -4.1, 0.3, -3.2), 2.0, 0.4),
    "worse last": (5, (9.0, 8.5, 7.5, 6.5, -8.0), 2.0, 0.4),
    "eight": (8, (5.0, -3.4, 3.3, 2.9, 0.7), 2.0, 0.4),
}


def _race_scores(n: int, ts: Sequence[float], luck: float, spread: float, rng) -> dict[str, np.ndarray]:
    """Scores whose paired t are `ts` exactly, and whose unpaired ones are ts / sqrt(1 + 2 luck²)."""

    def standard(z, *others):
        for other in (np.ones(n), *others):
            z = z - other * (z @ other) / (other @ other)
        return z / z.std(ddof=1)

    shared = standard(rng.normal(size=n))
    scores = {"LoRA": 70 + luck * spread * shared}
    for name, t in zip(rng.permutation(ENTRANTS), ts, strict=True):
        scores[str(name)] = scores["LoRA"] + spread * (standard(rng.normal(size=n), shared) + t / math.sqrt(n))
    return {str(name): scores[str(name)] for name in rng.permutation(list(scores))}


def _verdict_probe(*races: str):
    def probe(rng):
        s = Script()
        for race in races:
            n, *race_is = RACES[race]
            scores = _race_scores(n, *race_is, rng)
            refs = {name: s.input(f"{race}/{name}", values) for name, values in scores.items()}
            s.send(f"verdict {race}", s.call(refs, s.input(f"{race}|limits", np.array(LIMITS[n]))))
        return s

    return probe


def _races(inputs) -> dict[str, tuple[dict[str, np.ndarray], np.ndarray]]:
    found: dict[str, dict] = {}
    for key, values in inputs.items():
        race, slash, name = key.partition("/")
        if slash:
            found.setdefault(race, {})[name] = values
    return {race: (scores, inputs[f"{race}|limits"]) for race, scores in found.items()}


def paired_t(mine, rival):
    """The oracle's t: mean over standard error of the differences within each seed."""
    d = np.asarray(mine) - np.asarray(rival)
    return d.mean() / math.sqrt(((d - d.mean()) ** 2).sum() / (len(d) - 1) / len(d))


def _holm(t: Mapping[str, float], limits, k_of=lambda k, j: k - j, stop=True, order=lambda t: -abs(t), signed=False):
    """Words for each name; other arguments than the defaults are mistakes."""
    words, open_from_here = {}, False
    for j, name in enumerate(sorted(t, key=lambda name: order(t[name]))):
        size = t[name] if signed else abs(t[name])
        if size <= limits[k_of(len(t), j)]:
            open_from_here = stop
            words[name] = "open"
        elif open_from_here:
            words[name] = "open"
        else:
            words[name] = "better" if t[name] > 0 else "worse"
    return words


def _hochberg(t, limits):
    """From the other end: the first that passes takes all larger ones along."""
    names = sorted(t, key=lambda name: -abs(t[name]))
    passed = [j for j, name in enumerate(names) if abs(t[name]) > limits[len(names) - j]]
    last = max(passed, default=-1)
    return {name: "open" if j > last else "better" if t[name] > 0 else "worse" for j, name in enumerate(names)}


_TS: dict[str, tuple[str, Callable]] = {
    "": ("", paired_t),
    "by_n": ("the spread is divided by n; with so few seeds by n − 1, torch's default", lambda a, b: paired_t(a, b) * math.sqrt(len(a) / (len(a) - 1))),
    "root_missing": ("t is the mean over its standard error: the spread of one difference, divided by √n", lambda a, b: paired_t(a, b) / math.sqrt(len(a))),
    "by_n_not_root": ("you divide the spread by n; the standard error divides by √n", lambda a, b: paired_t(a, b) * math.sqrt(len(a))),
    "unpaired": (
        "you add the spreads of both sides, as if the seeds had nothing to do with each other. A lucky seed is lucky for both: take differences first",
        lambda a, b: (a.mean() - b.mean()) / math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)),
    ),
    "root_n_minus_1": ("n − 1 belongs under the sum of squares, where std has it already; the mean of n has √n",
                       lambda a, b: paired_t(a, b) * math.sqrt(1 - 1 / len(a))),
    "errors_added": (
        "you add two standard errors, as if the seeds had nothing to do with each other. A lucky seed is lucky for both: take differences first",
        lambda a, b: (a.mean() - b.mean()) / ((a.std(ddof=1) + b.std(ddof=1)) / math.sqrt(len(a))),
    ),
    "variance": ("you divide by a variance; take its root", lambda a, b: (a - b).mean() / ((a - b).var(ddof=1) / len(a))),
    "reversed": ("better and worse are swapped: asked is the entrant less LoRA, better above 0", lambda a, b: paired_t(b, a)),
    "own_spread": ("you divide by the spread of the entrant's own scores; the seeds' luck is in it. Take the spread of the differences",
                   lambda a, b: (a - b).mean() / (a.std(ddof=1) / math.sqrt(len(a)))),
    "mean_only": ("you compare the mean difference itself with the limits; divide by its standard error first", lambda a, b: (a - b).mean()),
}  # fmt: skip
_RULES: dict[str, tuple[str, Callable]] = {
    "": ("", _holm),
    "uncorrected": ("every entrant faces limits[1], as if it ran alone; with five of them chance has five tries", lambda t, m: _holm(t, m, lambda k, j: 1)),
    "bonferroni": ("every entrant faces limits[k] (Bonferroni). That is safe, but after each one that passes a comparison less is left",
                   lambda t, m: _holm(t, m, lambda k, j: k)),
    "bonferroni_lora_counted": (
        "every entrant faces one limit (Bonferroni), and LoRA is counted among them. After each one that passes a comparison less is left",
        lambda t, m: _holm(t, m, lambda k, j: k + 1)),
    "no_stop": ("whoever fails ends the search: those with a smaller |t| stay open, even if they would pass their own, milder limit",
                lambda t, m: _holm(t, m, stop=False)),
    "hochberg": ("you begin with the smallest |t| (Hochberg's way). Holm begins with the largest, and the first that fails ends the search", _hochberg),
    "smallest_first": ("you begin with the smallest |t|, and give it the strictest limit; begin with the largest", lambda t, m: _holm(t, m, order=abs)),
    "signed_order": ("you sort by t and not by |t|: whoever is much worse comes last", lambda t, m: _holm(t, m, order=lambda v: -v)),
    "one_sided": ("you ask only who is better; a t far below 0 is 'worse'", lambda t, m: _holm(t, m, signed=True, order=lambda v: -v)),
    "one_sided_by_size": ("you compare t and not |t| with the limit; a t far below 0 is 'worse'", lambda t, m: _holm(t, m, signed=True)),
    "lora_counted": ("you count LoRA among those compared; it is what they are compared with", lambda t, m: _holm(t, m, lambda k, j: k + 1 - j)),
    "off_by_one": ("your limits are one place too mild: with k still to compare it is limits[k]", lambda t, m: _holm(t, m, lambda k, j: max(k - 1 - j, 0))),
    "limits_upside_down": ("the limits run the wrong way: the largest |t| faces limits[k], the next limits[k − 1]",
                           lambda t, m: _holm(t, m, lambda k, j: j + 1)),
    "all_or_nothing": ("one entrant that fails makes all of them open; only those after it are",
                       lambda t, m: w if "open" not in (w := _holm(t, m)).values() else dict.fromkeys(t, "open")),
    "in_order_given": ("you take the entrants in the order in which they stand; begin with the largest |t|", lambda t, m: _holm(t, m, order=lambda v: 0)),
    "largest_only": ("you judge the largest |t| alone", lambda t, m: {
        name: w if abs(t[name]) == max(map(abs, t.values())) else "open" for name, w in _holm(t, m).items()}),
    "sign_alone": ("you look at the sign of the mean alone; some of that is luck", lambda t, m: {n: "better" if v > 0 else "worse" for n, v in t.items()}),
}  # fmt: skip


def _rule_on(race, tname: str, rule: str) -> dict[str, str]:
    scores, limits = race
    t = {name: float(_TS[tname][1](np.asarray(v), np.asarray(scores["LoRA"]))) for name, v in scores.items() if name != "LoRA"}
    return _RULES[rule][1](t, limits)


def _verdict_judge(inputs, answers):
    for race, setting in _races(inputs).items():
        found, expected = answers[f"verdict {race}"], _rule_on(setting, "", "")
        if not isinstance(found, dict):
            return "expected a dict: entrant -> 'better', 'worse' or 'open'"
        if set(found) - set(expected):
            return f"there is a verdict on {', '.join(sorted(set(found) - set(expected)))}; asked are the entrants, without LoRA itself"
        if set(expected) - set(found):
            return f"no verdict on {', '.join(sorted(set(expected) - set(found)))}"
        t = {name: paired_t(setting[0][name], setting[0]["LoRA"]) for name in expected}
        for name in sorted(expected, key=lambda name: -abs(t[name])):
            if found[name] != expected[name]:
                word = repr(found[name]) if isinstance(found[name], (str, bool, int, float)) else "no word"
                place = sorted(t.values(), key=lambda v: -abs(v)).index(t[name]) + 1
                return f"{name} has t = {t[name]:.2f}, number {place} of {len(t)} by size: you say {word}, expected {expected[name]!r}"
    return None


def _diagnose_verdict(evidence: list[Evidence]) -> Diagnosis | None:
    found, settings = [], []
    for e in evidence:
        for race, setting in _races(e.inputs).items():
            if f"verdict {race}" in e.answers:
                found.append(e.answers[f"verdict {race}"])
                settings.append(setting)
    if not found:
        return None
    if all(isinstance(f, (list, str)) for f in found):
        return Diagnosis("a_list", "asked is a dict with a word for every entrant, also for those that are open")
    if not all(isinstance(f, dict) for f in found):
        return None
    if all("LoRA" in f for f in found):
        return Diagnosis("lora_judged", "LoRA is in your verdict; it is what the others are compared with")
    if all(set(f) <= set(s[0]) - {"LoRA"} and "open" not in f.values() for f, s in zip(found, settings, strict=True)) and not all(
        set(f) == set(s[0]) - {"LoRA"} for f, s in zip(found, settings, strict=True)
    ):
        return Diagnosis("open_left_out", "who is open gets a word, too: 'open'")
    said = [word for f in found for word in f.values()]
    if all(isinstance(word, bool) for word in said):
        return Diagnosis("a_bool", "you say True or False; asked is one of three words: 'better', 'worse', 'open'")
    if all(isinstance(word, str) for word in said) and set(said) - set(WORDS) and {word.strip().lower() for word in said} <= set(WORDS):
        return Diagnosis("other_letters", "the words are 'better', 'worse' and 'open', in small letters")
    matches: dict[int, list] = {}
    for tname, rule in product(_TS, _RULES):
        slipped = bool(tname) + bool(rule)
        if slipped and all(_rule_on(s, tname, rule) == f for s, f in zip(settings, found, strict=True)):
            matches.setdefault(slipped, []).append((tname, rule))
    best = matches.get(1) or matches.get(2) or []
    if len(best) != 1:
        return None
    tname, rule = best[0]
    return Diagnosis("_and_".join(key for key in best[0] if key), "; and ".join(text for text in (_TS[tname][0], _RULES[rule][0]) if text))


def _lab_verdict(scores, limits):
    t = {}
    for name, values in scores.items():
        if name != "LoRA":
            d = values - scores["LoRA"]
            t[name] = float(d.mean() / (d.std() / len(d) ** 0.5))
    words = dict.fromkeys(t, "open")
    for j, name in enumerate(sorted(t, key=lambda name: -abs(t[name]))):
        if abs(t[name]) <= limits[len(t) - j]:
            break
        words[name] = "better" if t[name] > 0 else "worse"
    return words


VERDICT = Exercise(
    id="12.4",
    title="Who beats LoRA?",
    difficulty=3,
    minutes=7,
    points=4,
    name="who_beats_lora",
    cases=(
        Case("the largest |t| faces the strictest limit, the next a milder one", _verdict_probe("strict", "near", "counted", "thin"), _verdict_judge),
        Case("whoever fails ends the search", _verdict_probe("first fails", "quiet", "all"), _verdict_judge),
        Case("a seed's luck is shared", _verdict_probe("lucky", "eight, last"), _verdict_judge),
        Case("one may be worse", _verdict_probe("both ways", "worse last", "eight"), _verdict_judge),
    ),
    diagnose=_diagnose_verdict,
    hints=(
        "First one number for each entrant: the mean of its differences to LoRA, seed by seed, in units of its own standard error. Then an order.",
        "t = d.mean() / (d.std() / len(d) ** 0.5). Sort by |t|, largest first; the first of k faces limits[k], the next limits[k - 1], until one fails: "
        "it and all after it are 'open'.",
        "for k, name in zip(range(len(t), 0, -1), sorted(t, key=lambda name: -abs(t[name]))):\n    if abs(t[name]) <= limits[k]: break\n"
        "    words[name] = 'better' if t[name] > 0 else 'worse'      # words = dict.fromkeys(t, 'open') before",
    ),
    read="lab 11, exercise 11.3; Holm 1979",
    fallback=lambda: _lab_verdict,
)


# ---------------------------------------------------------------- 12.5 ranks by energy

SPECTRA = {  # singular values of each layer's ΔW, largest first; lengths differ
    "uneven": [[8.0, 3.0, 1.0, 0.5], [2.0, 1.6, 1.2, 0.9, 0.7], [0.3, 0.2, 0.1]],
    "one loud": [[20.0, 1.1, 0.4], [3.0, 2.0, 1.0, 0.6, 0.2], [2.5, 2.2, 1.9, 0.3], [0.05, 0.04]],
    "small": [[0.9, 0.05], [1.3, 1.2, 1.1, 0.2]],
    # squares sum to 8: half of it is the 4 of one direction, three quarters need any two of the four equal ones
    "ties": [[2.0, 1.0, 1.0], [1.0, 1.0], [0.0, 0.0]],
}
SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)


def _spectra_probe(which: str, shares: Sequence[float], factor=True):
    def probe(rng):
        s = Script()
        spectra = [np.array(S) for S in SPECTRA[which]]
        if factor:  # other numbers for everybody, in the same order and without ties
            spectra = [np.sort(S * rng.uniform(0.97, 1.03, size=len(S)))[::-1].copy() * 1.7 for S in spectra]
        refs = [s.input(f"S {k}", S) for k, S in enumerate(spectra)]
        s.input("shares", np.array(shares))
        for k, share in enumerate(shares):
            s.send(f"ranks {k}", s.call(refs, share))
        return s

    return probe


def _spectra(inputs) -> list[np.ndarray]:
    return [np.asarray(inputs[f"S {k}"]) for k in range(sum(key.startswith("S ") for key in inputs))]


def fewest(spectra: Sequence[np.ndarray], share: float) -> int:
    """The oracle: how many directions are needed, whatever their layer."""
    squares = np.sort(np.concatenate(spectra) ** 2)[::-1]
    return next(n for n in range(len(squares) + 1) if squares[:n].sum() >= share * squares.sum() * (1 - 1e-12))


def _ranks(found, layers: int) -> list[int] | None:
    if isinstance(found, np.ndarray):
        found = found.tolist()
    if not isinstance(found, list) or len(found) != layers or any(_number(r) is None for r in found):
        return None
    return [_number(r) for r in found]


def _spectra_judge(inputs, answers):
    spectra = _spectra(inputs)
    total = sum(float((S**2).sum()) for S in spectra)
    for k, share in enumerate(np.atleast_1d(inputs["shares"]).tolist()):
        ranks = _ranks(answers[f"ranks {k}"], len(spectra))
        if ranks is None:
            return f"expected a list of {len(spectra)} ranks, one for each layer"
        for r, S in zip(ranks, spectra, strict=True):
            if r != int(r) or not 0 <= r <= len(S):
                return f"a layer with {len(S)} directions gets rank {r:g}"
        kept = sum(float((S[: int(r)] ** 2).sum()) for r, S in zip(ranks, spectra, strict=True)) / total
        if kept < share * (1 - 1e-9):
            return f"asked to keep {share:.0%} of all energy, ranks {', '.join(f'{r:g}' for r in ranks)} keep {kept:.1%}"
        needed = fewest(spectra, share)
        if sum(ranks) > needed:
            return f"to keep {share:.0%} of all energy {needed} directions are enough, your ranks {', '.join(f'{r:g}' for r in ranks)} are {sum(ranks):g}"
    return None


def _by_threshold(spectra, share, power=2, weigh=lambda S: 1.0, most=math.inf):
    """Ranks of the largest s^power, weighed by layer, until `share` of their sum is there."""
    entries = sorted(((float(s) ** power * weigh(S), k) for k, S in enumerate(spectra) for s in S), reverse=True)
    total, kept, ranks = sum(e for e, _ in entries), 0.0, [0] * len(spectra)
    for value, k in entries:
        if kept >= share * total * (1 - 1e-12) or sum(ranks) >= most:
            break
        kept, ranks[k] = kept + value, ranks[k] + 1
    return ranks


def _each_layer(spectra, share, power=2, least=0):
    ranks = []
    for S in spectra:
        held = np.cumsum(S.astype(float) ** power)
        ranks.append(max(least, int(np.argmax(held >= share * held[-1] * (1 - 1e-12))) + 1) if held[-1] > 0 else least)
    return ranks


def _same_for_all(spectra, share):
    total = sum((S**2).sum() for S in spectra)
    for r in range(max(len(S) for S in spectra) + 1):
        if sum((S[:r] ** 2).sum() for S in spectra) >= share * total * (1 - 1e-12):
            return [min(r, len(S)) for S in spectra]
    return [len(S) for S in spectra]


def _above(spectra, limit):
    return [int((S > limit).sum()) for S in spectra]


_CUTS: dict[str, tuple[str, Callable]] = {
    "per_layer": (
        "every layer keeps this share of its own energy. A layer that hardly changed then gets as many directions as one that changed a lot: one heap for all",
        lambda z, q: _each_layer(z, q),
    ),
    "per_layer_not_squared": ("every layer by itself, and by s: one heap for all, and energies are s²", lambda z, q: _each_layer(z, q, 1)),
    "not_squared": ("you add up s; energy is s²", lambda z, q: _by_threshold(z, q, 1)),
    "to_the_fourth": ("you square twice; energy is s²", lambda z, q: _by_threshold(z, q, 4)),
    "normalised": ("each layer's spectrum is divided by its own sum first, so that all layers count alike; what was changed little counts little",
                   lambda z, q: _by_threshold(z, q, 2, lambda S: 1 / float((S**2).sum()))),
    "relative_to_first": ("each layer's spectrum is divided by its own largest value first; what was changed little counts little",
                          lambda z, q: _by_threshold(z, q, 2, lambda S: 1 / float(S[0] ** 2) if S[0] else 0.0)),
    "one_too_few": ("the direction that passes the share is missing: you stop just below it", lambda z, q: _one_fewer(z, q)),
    "one_too_many": ("one direction fewer is enough", lambda z, q: _by_threshold(z, 1.0, most=fewest(z, q) + 1)),
    "at_least_one": ("every layer gets a rank of at least 1; rank 0 is allowed, and the budget goes where it is needed",
                     lambda z, q: [max(1, r) for r in _by_threshold(z, q)]),
    "same_everywhere": ("all layers get the same rank", _same_for_all),
    "complement": ("you keep what should be dropped: `share` is what stays", lambda z, q: _by_threshold(z, 1 - q)),
    "dropped": ("you return how many directions are dropped", lambda z, q: [len(S) - r for S, r in zip(z, _by_threshold(z, q), strict=True)]),
    "norm_share": ("you keep this share of the norm; energy is the norm's square", lambda z, q: _by_threshold(z, q**2)),
    "share_of_directions": ("you keep this share of the number of directions; asked is a share of the sum of s²",
                            lambda z, q: _by_threshold(z, 1.0, most=math.ceil(q * sum(len(S) for S in z)))),
    "share_of_directions_down": ("you keep this share of the number of directions; asked is a share of the sum of s²",
                                 lambda z, q: _by_threshold(z, 1.0, most=int(q * sum(len(S) for S in z)))),
    "above_share_of_largest": ("you keep what is above this share of the largest singular value; asked is a share of the sum of s²",
                               lambda z, q: _above(z, q * max(S[0] for S in z))),
    "below_rest_of_largest": ("you drop what is below 1 − share of the largest singular value; asked is a share of the sum of s²",
                              lambda z, q: _above(z, (1 - q) * max(S[0] for S in z))),
    "smallest_first": ("you begin with the smallest values; the largest hold the most with the fewest", lambda z, q: _smallest_first(z, q)),
    "everything": ("you keep everything", lambda z, q: [len(S) for S in z]),
}  # fmt: skip


def _one_fewer(spectra, share):
    return _by_threshold(spectra, 1.0, most=fewest(spectra, share) - 1)


def _smallest_first(spectra, share):
    entries = sorted((float(s) ** 2, k) for k, S in enumerate(spectra) for s in S)
    total, kept, ranks = sum(e for e, _ in entries), 0.0, [0] * len(spectra)
    for value, k in entries:
        if kept >= share * total * (1 - 1e-12):
            break
        kept, ranks[k] = kept + value, ranks[k] + 1
    return ranks


def _diagnose_spectra(evidence: list[Evidence]) -> Diagnosis | None:
    runs = []
    for e in evidence[:3]:
        spectra = _spectra(e.inputs)
        for k, share in enumerate(np.atleast_1d(e.inputs["shares"]).tolist()):
            found = e.answers.get(f"ranks {k}")
            if _number(found) is not None:
                return Diagnosis("one_number", "this is one number; asked is a rank for each layer")
            ranks = _ranks(found, len(spectra))
            if ranks is None:
                return None
            runs.append((spectra, share, ranks))
    if all(e.failure is None for e in evidence[:3]):
        return _diagnose_ties(evidence[3])
    keys = [key for key, (_, cut) in _CUTS.items() if all(cut(spectra, share) == ranks for spectra, share, ranks in runs)]
    return Diagnosis(keys[0], _CUTS[keys[0]][0]) if len(keys) == 1 else None


def _diagnose_ties(e: Evidence) -> Diagnosis | None:
    spectra = _spectra(e.inputs)
    for k, share in enumerate(np.atleast_1d(e.inputs["shares"]).tolist()):
        ranks = _ranks(e.answers.get(f"ranks {k}"), len(spectra))
        if ranks is None:
            return None
        values = np.sort(np.concatenate(spectra))[::-1]
        limit = values[fewest(spectra, share) - 1]
        if ranks != [int((S >= limit).sum()) for S in spectra] and ranks != [int((S > limit).sum()) for S in spectra] and sum(ranks) != fewest(spectra, share):
            return None
    return Diagnosis("ties", "of several equal singular values you keep all or none; a threshold can't tell them apart, a count of how many can")


def _lab_ranks(spectra, share):
    values = torch.cat(list(spectra))
    layer = torch.cat([torch.full((len(S),), k) for k, S in enumerate(spectra)])
    order = values.argsort(descending=True, stable=True)
    held = (values[order] ** 2).cumsum(0)
    needed = int((held < share * held[-1]).sum()) + 1
    return torch.bincount(layer[order[:needed]], minlength=len(spectra)).tolist()


RANKS = Exercise(
    id="12.5",
    title="Ranks by energy",
    difficulty=2,
    minutes=5,
    points=3,
    name="ranks_by_energy",
    cases=(
        Case("the fewest directions that hold the share, over all layers together", _spectra_probe("uneven", SHARES), _spectra_judge),
        Case("where one layer changed far more than the others", _spectra_probe("one loud", SHARES), _spectra_judge),
        Case("where a layer needs none at all", _spectra_probe("small", (0.3, 0.6, 0.9)), _spectra_judge),
        Case("of equal ones no more than needed", _spectra_probe("ties", (0.45, 0.7), factor=False), _spectra_judge),
    ),
    diagnose=_diagnose_spectra,
    hints=(
        "Throw all singular values into one heap. Which go first, and when may you stop?",
        "Sort the heap, largest first, and add up squares until share times their sum is reached. How many of the chosen came from each layer?",
        "order = torch.cat(spectra).argsort(descending=True); held = (torch.cat(spectra)[order] ** 2).cumsum(0); keep the first "
        "(held < share * held[-1]).sum() + 1 and count for each layer how many of them are its own.",
    ),
    read="lab 01, Eckart and Young; lab 06",
    fallback=lambda: _lab_ranks,
)


LAB = Lab(
    number="12",
    name="12_variants",
    title="Variants",
    minutes=50,
    core=False,
    objectives=(
        "read a variant as the few lines by which it differs from LoRA",
        "say which start at the base model, which merge, and how many numbers they train",
        "run a race that is fair: equal budgets, tuned rates, seeds, and a control that must not win",
        "say who beats LoRA without being fooled by eleven tries",
        "choose ranks automatically, and count what the choice costs",
    ),
    needs=("lab 02", "lab 03 for learning rates", "lab 11's paired differences help"),
    exercises=(DORA_WEIGHT, PISSA_START, RANK_FOR_BUDGET, VERDICT, RANKS),
    predictions=(
        Prediction(
            "12.A",
            "Eleven variants, before any training, in float32: how many give bit for bit the output of the base?",
            {"a": "all eleven: that is what B = 0 is for", "b": "six to ten", "c": "five or fewer"},
        ),
        Prediction(
            "12.B",
            "LoRA with r = 4 in three layers of 64 x 64 trains 1,536 numbers. Which rank does VeRA get for as many?",
            {"a": "below 16", "b": "16 to 64: more than 64 is no use in such a layer", "c": "above 100"},
        ),
        Prediction(
            "12.C",
            "Everybody runs at the learning rate that is best for LoRA. How many of the eleven variants are worse than LoRA, beyond luck?",
            {"a": "none or one", "b": "two to five", "c": "six or more"},
        ),
        Prediction(
            "12.D",
            "Everybody runs at its own best rate. How many of the eleven variants are better than LoRA, beyond luck?",
            {"a": "none", "b": "one", "c": "two or more"},
        ),
        Prediction(
            "12.E",
            "Races in which nobody is better: eleven entrants against LoRA, as many seeds, each at the usual 5 % limit. In how many does somebody stand out?",
            {"a": "about 5 %", "b": "about 30 %", "c": "more than half"},
        ),
        Prediction(
            "12.F",
            "Cut out of a larger r by energy; trained afresh with the ranks that energy found; AdaLoRA: how many of these three are better than "
            "r = 4 everywhere, beyond luck?",
            {"a": "none", "b": "one", "c": "two or three"},
        ),
    ),
)
