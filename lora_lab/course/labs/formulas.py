"""What the labs know about wrong LoRA formulas: the bases and scalings that `synthesis.explain` may combine, and what each finding means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..exercise import Diagnosis, compare
from ..synthesis import Probe, explain

# Name of a scaling -> its value for sizes with keys "r" and "alpha". Probes choose r and alpha so that no two agree.
SCALINGS: dict[str, Callable[[Mapping], float]] = {
    "alpha / r": lambda z: z["alpha"] / z["r"],
    "1": lambda z: 1.0,
    "alpha": lambda z: z["alpha"],
    "1 / r": lambda z: 1 / z["r"],
    "r / alpha": lambda z: z["r"] / z["alpha"],
    "alpha / sqrt(r)": lambda z: z["alpha"] / math.sqrt(z["r"]),
    "1 / sqrt(r)": lambda z: 1 / math.sqrt(z["r"]),
    "r": lambda z: float(z["r"]),
    "alpha * r": lambda z: z["alpha"] * z["r"],
    "1 / alpha": lambda z: 1 / z["alpha"],
    "alpha / r²": lambda z: z["alpha"] / z["r"] ** 2,
    "(alpha / r)²": lambda z: (z["alpha"] / z["r"]) ** 2,
    "alpha²": lambda z: z["alpha"] ** 2,
    "alpha // r": lambda z: float(z["alpha"] // z["r"]),
}

# The two most common slips get a key of their own; they are no twins: one makes the update too small, the other r times too large.
_SCALING_KEYS = {"1": "scaling_missing", "alpha": "division_by_r_missing", "r / alpha": "scaling_inverted", "alpha / sqrt(r)": "scaling_sqrt"}
_SCALING_TEXTS = {
    "1": "the scaling alpha / r is missing, so the update comes out r / alpha times as large as it should",
    "alpha": "alpha is there but not divided by r, so the update is r times too large",
    "r / alpha": "alpha / r is upside down",
    "alpha / sqrt(r)": "alpha / sqrt(r) is the rank-stabilised variant (rsLoRA); the paper's layer divides by r",
    "alpha // r": "`//` rounds the quotient down; use `/`",
}


def scaling_name(key: str) -> str:
    """A factor as it stands before B A in a formula: "" for 1, "alpha " for alpha, "(1 / r) " for 1 / r."""
    return "" if key == "1" else f"({key}) " if " " in key else f"{key} "


def explain_forward(runs: Sequence[tuple], rtol: float | None = None) -> Diagnosis | None:
    """Which formula did the student compute? None if it is the right one, or none that we can write down.

    runs: triples (y, inputs, sizes) with inputs x (n, in), W (out, in), A (r, in), B (out, r) and b (out,) or none; two with different r and
    alpha are needed, since with one r many scalings give the same number. The answer is W0 x + b + (alpha / r) B A x.
    """
    if any(not isinstance(y, np.ndarray) for y, _, _ in runs):
        return None
    has_bias = all("b" in inputs for _, inputs, _ in runs)
    probes = []
    for y, inputs, sizes in runs:
        x, W, A, B = (np.asarray(inputs[name], dtype=np.float64) for name in ("x", "W", "A", "B"))
        base, update = x @ W.T, x @ A.T @ B.T
        bases = {"W0 x": base, "B A x": update, "B relu(A x)": np.maximum(x @ A.T, 0) @ B.T}
        bases["1"] = np.ones_like(base)
        if "b" in inputs:
            bases["b"] = np.broadcast_to(np.asarray(inputs["b"], dtype=np.float64), base.shape).copy()
        if W.shape[0] == A.shape[0]:  # only where a wrong product has a shape at all
            bases["A x"] = x @ A.T
        probes.append(Probe(y, bases, {name: scale(sizes) for name, scale in SCALINGS.items() if name != "1"}))
    found = explain(probes, max_terms=3, rtol=rtol)
    if found is None or not found.terms:
        return Diagnosis("returns_zero", "what you return is zero everywhere") if found is not None else None
    c = found.coefficients
    formula = f"What you compute is {found.text}"
    if "B relu(A x)" in c:
        return Diagnosis("nonlinearity", f"{formula}: there is no activation between A and B. LoRA is linear, or it could not be merged")
    if set(c) <= {"W0 x", "b"} and c.get("W0 x") == "1":
        return Diagnosis("update_missing", f"{formula}: the low-rank path is missing")
    if "W0 x" not in c and "B A x" in c:
        return Diagnosis("base_missing", f"{formula}: the frozen path W0 x is missing. LoRA adds to the pretrained weight, it does not replace it")
    if c.get("W0 x") not in (None, "1"):
        if c.get("W0 x") == c.get("B A x") and c["W0 x"] in SCALINGS:
            return Diagnosis("base_scaled", f"{formula}: the scaling belongs to the update alone, here it multiplies the base as well")
        return Diagnosis("base_changed", f"{formula}: W0 x enters once and unscaled")
    right_update = c.get("B A x") == "alpha / r"
    if c.get("W0 x") == "1" and right_update and set(c) <= {"W0 x", "B A x", "b"}:
        if has_bias and "b" not in c:
            return Diagnosis("bias_missing", f"{formula}: the bias b is lost")
        if has_bias and c["b"] != "1":
            return Diagnosis("bias_scaled", f"{formula}: the bias enters once and unscaled")
        return None
    if c.get("W0 x") == "1" and c.get("B A x") is not None and not right_update:
        update = c["B A x"]
        if update.startswith("-"):
            return Diagnosis("subtracted", f"{formula}: the update is added, not subtracted")
        key = _SCALING_KEYS.get(update, "scaling_wrong")
        return Diagnosis(key, f"{formula}: " + _SCALING_TEXTS.get(update, "the factor of the update is alpha / r"))
    if not found.named:
        return Diagnosis("unnamed_factor", f"{formula} (for r={runs[0][2]['r']}, alpha={runs[0][2]['alpha']:g}); asked is W0 x + b + (alpha / r) B A x")
    return Diagnosis("other_formula", f"{formula}; asked is W0 x + b + (alpha / r) B A x")


def first_match(found: Sequence, candidates: Mapping[str, Sequence], rtol: float = 1e-6, atol: float = 0.0) -> str | None:
    """The key of the only candidate that equals `found` in every run; None if there is none, or more than one.

    Unknown is better than wrong: two candidates that give the same numbers explain nothing.
    """
    matching = [
        key
        for key, values in candidates.items()
        if all(compare(f, v, rtol=rtol, atol=atol) is None for f, v in zip(found, values, strict=True))
    ]
    return matching[0] if len(matching) == 1 else None


# An aspect of an answer: name of a choice -> (what is wrong with it, the choice). The first is right and has no text.
Aspect = Mapping[str, tuple[str, object]]


def fewest_slips(explains: Callable[[list], bool], aspects: Sequence[Aspect], most: int = 2) -> Diagnosis | None:
    """The only way to make at most `most` slips that explains what was found; None if there is none, or more than one of the fewest.

    explains(chosen): whether an answer with these choices, one of each aspect, would have given it.
    """
    right = [next(iter(aspect)) for aspect in aspects]
    for count in range(1, most + 1):
        matches = []
        for places in itertools.combinations(range(len(aspects)), count):
            for keys in itertools.product(*([key for key in aspects[place] if key != right[place]] for place in places)):
                names = list(right)
                for place, key in zip(places, keys, strict=True):
                    names[place] = key
                if explains([aspect[key][1] for aspect, key in zip(aspects, names, strict=True)]):
                    matches.append([(key, aspects[place][key][0]) for place, key in zip(places, keys, strict=True)])
        if matches:
            if len(matches) > 1:
                return None
            return Diagnosis("_and_".join(key for key, _ in matches[0]), "; and ".join(text for _, text in matches[0]))
    return None


def slips(runs: Sequence[tuple], compute: Callable, aspects: Sequence[Aspect], most: int = 2, rtol: float = 1e-6) -> Diagnosis | None:
    """`fewest_slips` that explain every run.

    runs: pairs (inputs, found), found a list of arrays; compute(inputs, chosen) -> the arrays that an answer with these choices gives.
    """
    if any(f is None for _, found in runs for f in found):
        return None
    return fewest_slips(lambda chosen: all(agrees(found, compute(inputs, chosen), rtol) for inputs, found in runs), aspects, most)


def agrees(found: Sequence, expected: Sequence, rtol: float) -> bool:
    """Whether all arrays are the same, one by one; an expectation that is not finite agrees with nothing."""
    return all(np.all(np.isfinite(e)) and compare(f, e, rtol=rtol) is None for f, e in zip(found, expected, strict=True))
