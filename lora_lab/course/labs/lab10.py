"""Lab 10, The broken-adapter clinic: write the probes, tell look-alikes apart, repair a run with four faults.

Expectations come from numpy: a forward pass written with @, the gradients of two layers written out, a least-squares fit by numpy's solver. What the
triage is asked about are readings of models that were really broken (lora_lab.clinic).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ...clinic import TRIAGE, triage_case
from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script, layer, linear
from .formulas import first_match

RTOL = 1e-6  # a student may pass through float32; a mistake changes the first digits


def _number(value) -> float | None:
    """A number, also as a tensor of one; None for anything else."""
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iuf":
        value = value.item()
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# ---------------------------------------------------------------------------------------------------------------------
# 10.1  apart(model, base, x)
#
# Both networks hold a dropout, before the ReLU and behind it, so that each needs eval mode. The largest difference is negative and stands where the output
# is not largest, so that |.|, max and the division are all needed.

APART = {"the adapted one drops": (0.5, 0.0), "both drop": (0.4, 0.3)}


def _mlp(s: Script, inputs: str, rng, drop: float):
    W1, b1 = s_input(s, f"{inputs} W1", rng.normal(size=(9, 7)) / 2), s_input(s, f"{inputs} b1", rng.normal(size=9))
    W2 = s_input(s, f"{inputs} W2", rng.normal(size=(5, 9)) / 3)
    parts = {"fc": linear(W1, b1), "act": layer("ReLU"), "drop": layer("Dropout", p=drop), "out": linear(W2)}
    return s.module(parts)


def s_input(s: Script, name: str, value):
    """The value noted for the judge, and the value itself for a description."""
    s.input(name, value)
    return value


def _apart_probe(drops, mode: bool | None = None):
    def probe(rng):
        s = Script(seed=int(rng.integers(1_000)))
        while True:
            trial = Script(seed=s.seed)
            model, base = _mlp(trial, "model", rng, drops[0]), _mlp(trial, "base", rng, drops[1])
            x = trial.input("x", rng.normal(size=(6, 7)))
            d = _outputs(trial.inputs, "model") - _outputs(trial.inputs, "base")
            y, z = _outputs(trial.inputs, "model"), _outputs(trial.inputs, "base")
            at = np.unravel_index(np.abs(d).argmax(), d.shape)
            apart_enough = abs(np.abs(y).max() / np.abs(z).max() - 1) > 0.05
            if d[at] < 0 and abs(d.max() + d.min()) > 0.05 * abs(d.min()) and np.abs(z).argmax() != np.abs(d).argmax() and apart_enough:
                s = trial
                break
        if mode is False:
            s.method(model, "eval")
        s.send("apart", s.call(model, base, x))
        s.send("again", s.call(model, base, x))
        s.send("modes", [s.get(model, "training"), s.get(model, "drop.training"), s.get(base, "training"), s.get(base, "drop.training")])
        return s

    return probe


def _outputs(inputs, which):
    h = np.maximum(inputs["x"] @ inputs[f"{which} W1"].T + inputs[f"{which} b1"], 0)
    return h @ inputs[f"{which} W2"].T


def _apart(inputs):
    y, z = _outputs(inputs, "model"), _outputs(inputs, "base")
    return np.abs(y - z).max() / np.abs(z).max()


def _apart_judge(inputs, answers):
    if isinstance(answers["apart"], bool):
        return "apart(...) is True or False; how far apart is asked: a number"
    return compare(answers["apart"], _apart(inputs), "apart(model, base, x)", rtol=RTOL)


def _apart_same(inputs, answers):
    if _number(answers["apart"]) is None or _number(answers["again"]) is None:
        return _apart_judge(inputs, answers) or "two calls did not give two numbers"
    if answers["apart"] != answers["again"]:
        return "two calls with the same models and the same x give two numbers"
    return None


def _apart_modes(inputs, answers, training=True):
    if answers["modes"] != [training, training, True, True]:
        wanted = "training" if training else "eval"
        found = ["training" if m else "eval" for m in answers["modes"]]
        after = f"model {found[0]} (its dropout {found[1]}), base {found[2]} (its dropout {found[3]})"
        return f"before: model in {wanted} mode, base in training mode; afterwards {after}"
    return None


def _diagnose_apart(evidence: list[Evidence]) -> Diagnosis | None:
    first = evidence[0]
    found = first.answers.get("apart")
    if any(e.error is not None for e in evidence) or found is None:
        return None
    if isinstance(found, bool):
        return Diagnosis("a_bool", "equal or not is too little to go on: return how far apart they are, one number")
    if isinstance(found, np.ndarray) and found.size > 1:
        return Diagnosis("not_reduced", "one number for each output; return the largest")
    if _number(found) is None:
        return None
    random_run = any(e.answers.get("apart") != e.answers.get("again") for e in evidence)
    if random_run:
        both = evidence[1]
        if evidence[0].answers["apart"] == evidence[0].answers["again"] and both.answers["apart"] != both.answers["again"]:
            return Diagnosis("base_not_in_eval", "the base has dropout, too: put both models in eval mode")
        return Diagnosis("dropout_active", "dropout is at work: without eval() the same model gives other outputs at each call")
    runs = [e for e in evidence if e.failure is not None and e.title.startswith("the largest")] or [evidence[0]]
    keys = ("", "mean", "signed", "absolute", "by_own", "elementwise", "norms", "by_mean", "mean_over_mean", "squared")
    values: dict[str, list] = {key: [] for key in keys}
    for e in runs:
        y, z = _outputs(e.inputs, "model"), _outputs(e.inputs, "base")
        d = y - z
        values[""].append(np.abs(d).max() / np.abs(z).max())
        values["mean"].append(np.abs(d).mean() / np.abs(z).max())
        values["signed"].append(d.max() / np.abs(z).max())
        values["absolute"].append(np.abs(d).max())
        values["by_own"].append(np.abs(d).max() / np.abs(y).max())
        values["elementwise"].append(np.abs(d / z).max())
        values["norms"].append(np.linalg.norm(d) / np.linalg.norm(z))
        values["by_mean"].append(np.abs(d).max() / np.abs(z).mean())
        values["mean_over_mean"].append(np.abs(d).mean() / np.abs(z).mean())
        values["squared"].append((d**2).mean())
    texts = {
        "mean": "you average the differences; asked is the largest: one wrong output in a thousand must show",
        "signed": "the largest difference is negative here, and max() without abs() does not see it",
        "absolute": "this is the difference itself; divide by the largest |output of the base|, or it depends on the outputs' units",
        "by_own": "you divide by the model's own outputs; the base is what it is compared with",
        "elementwise": "you divide each difference by its own output, and an output near 0 makes that huge: divide the largest by the largest",
        "norms": "these are the norms of all differences together; asked are the largest ones",
        "by_mean": "you divide by the mean |output|; asked is the largest",
        "mean_over_mean": "these are means, of the differences and of the outputs; asked is the largest of both",
        "squared": "this is the mean squared difference; asked is the largest |difference| over the largest |output|",
    }
    key = first_match([e.answers["apart"] for e in runs], values, rtol=1e-5)
    if key:
        return Diagnosis(key, texts[key])
    wrong = [e.answers.get("modes") for e in evidence]
    if key == "" or all(_apart_judge(e.inputs, e.answers) is None for e in evidence[:2]):
        if wrong[0] == [False] * 4:
            return Diagnosis("left_in_eval", "both models are still in eval mode afterwards: who trains on has no dropout. Put back what you found")
        if wrong[0] == [True] * 4 and wrong[-1] == [True] * 4:
            return Diagnosis("always_train", "train() at the end switches a model to training that came in eval mode: note model.training first")
        return Diagnosis("modes_changed", "a model comes back in another mode than it came in: note model.training of each, and put it back")
    return None


def _lab_apart(model, base, x):
    import torch

    before = [(m, m.training) for m in (model, base)]
    with torch.no_grad():
        y, z = model.eval()(x), base.eval()(x)
    for m, training in before:
        m.train(training)
    return float((y - z).abs().max() / z.abs().max())


APART_EXERCISE = Exercise(
    id="10.1",
    title="How far apart?",
    difficulty=1,
    minutes=3,
    points=2,
    name="apart",
    cases=(
        Case("the largest difference over the largest output", _apart_probe((0.5, 0.0)), _apart_judge),
        Case("the same number at each call, also when the base drops", _apart_probe((0.4, 0.3)), _apart_same),
        Case("the largest difference again, on other models", _apart_probe((0.4, 0.3)), _apart_judge),
        Case("a model in training mode comes back so", _apart_probe((0.4, 0.3)), _apart_modes),
        Case("a model in eval mode comes back so", _apart_probe((0.4, 0.3), mode=False), lambda i, a: _apart_modes(i, a, training=False)),
    ),
    diagnose=_diagnose_apart,
    hints=(
        "What would make two calls of one model differ? And who notices afterwards that you switched it off?",
        "was = model.training; model.eval(); ...; model.train(was), and the same for the base. Then (y - z).abs().max() / z.abs().max().",
        "before = [(m, m.training) for m in (model, base)]; with torch.no_grad(): y, z = model.eval()(x), base.eval()(x); then m.train(t) for m, t in before",
    ),
    read="lora_lab/diagnosis/probes.py, step0_identity and modes",
    fallback=lambda: _lab_apart,
)


# ---------------------------------------------------------------------------------------------------------------------
# 10.2  who_learns(model, x, y)
#
# A chain lora_A (3, 7), lora_B (5, 3), out (4, 5), tanh-free so that numpy's gradients are two products. `spare` hangs on the model and is never called.
# Every parameter may hold an old gradient, which must survive and must not count.

CHAINS = {
    "a fresh pair, B = 0": dict(B=0.0, A=1.0, frozen=("out.weight",), old=False),
    "both zero": dict(B=0.0, A=0.0, frozen=("out.weight",), old=False),
    "in the middle of a training, with old gradients": dict(B=1.0, A=1.0, frozen=("out.weight", "lora_A.weight"), old=True),
    "both zero, with old gradients": dict(B=0.0, A=0.0, frozen=(), old=True),
}
SHAPES = {"lora_A.weight": (3, 7), "lora_B.weight": (5, 3), "out.weight": (4, 5), "out.spare.weight": (2, 2)}


def _chain_probe(z: Mapping):
    def probe(rng):
        s = Script()
        weights = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        weights["lora_A.weight"] *= z["A"]
        weights["lora_B.weight"] *= z["B"]
        for name, value in weights.items():
            s.input(name, value)
        model = s.module({n: linear(weights[f"{n}.weight"]) for n in ("lora_A", "lora_B", "out")})
        s.set(model, "out.spare", s.linear(weights["out.spare.weight"]))
        x, y = s.input("x", rng.normal(size=(8, 7))), s.input("y", rng.normal(size=(8, 4)))
        if z["old"]:
            # Old gradients that are not zero anywhere: those of the same chain with other numbers.
            for name in ("lora_A", "lora_B"):
                s.set(model, f"{name}.weight", rng.normal(size=SHAPES[f"{name}.weight"]))
            s.backward(s.call(x, target=model), rng.normal(size=(8, 4)))
            for name in ("lora_A", "lora_B"):
                s.set(model, f"{name}.weight", weights[f"{name}.weight"])
        for name in z["frozen"]:
            s.set(model, f"{name}.requires_grad", False)
        for name in SHAPES:
            s.send(f"before {name}", s.grad(model, name))
        s.send("who", s.call(model, x, y))
        for name in SHAPES:
            s.send(f"after {name}", s.grad(model, name))
            s.send(f"weight {name}", s.get(model, name))
        return s

    return probe


def _who(inputs, z) -> dict[str, str]:
    A, B, C = (inputs[name] for name in ("lora_A.weight", "lora_B.weight", "out.weight"))
    x = inputs["x"]
    h = x @ A.T
    g = 2 * (h @ B.T @ C.T - inputs["y"]) / inputs["y"].size @ C  # d loss / d (B A x)
    grads = {"lora_A.weight": (g @ B).T @ x, "lora_B.weight": g.T @ h, "out.weight": (2 * (h @ B.T @ C.T - inputs["y"])).T @ (h @ B.T)}
    states = {name: "moves" if np.any(grad) else "zero" for name, grad in grads.items()}
    states["out.spare.weight"] = "none"
    return {name: "frozen" if name in z["frozen"] else states[name] for name in SHAPES}


def _who_judge(z):
    def judge(inputs, answers):
        found, expected = answers["who"], _who(inputs, z)
        if not isinstance(found, dict):
            return f"who_learns gave a {type(found).__name__}; a dict is asked, name -> one of four words"
        if set(found) != set(expected):
            return f"the dict has the names {', '.join(found) or '(none)'}; expected is every parameter: {', '.join(expected)}"
        wrong = [name for name in expected if found[name] != expected[name]]
        if wrong:
            return f"{wrong[0]} is {expected[wrong[0]]!r} here; you say {found[wrong[0]]!r}"
        return None

    return judge


def _untouched_judge(inputs, answers):
    for name in SHAPES:
        before, after = answers[f"before {name}"], answers[f"after {name}"]
        if (before is None) != (after is None) or (before is not None and not np.array_equal(before, after)):
            was = "no gradient" if before is None else "a gradient"
            return f"{name} held {was} before the call, and {'none' if after is None else 'another one'} afterwards"
        if not np.array_equal(answers[f"weight {name}"], inputs[name]):
            return f"{name} has changed: a probe takes no step"
    return None


def _diagnose_who(evidence: list[Evidence]) -> Diagnosis | None:
    found = [e.answers.get("who") for e in evidence]
    if any(e.error is not None and "differentiated Tensors does not require grad" in e.error.message for e in evidence):
        return Diagnosis("asks_frozen", "autograd is asked for the gradient of a frozen parameter: take only those with requires_grad")
    if any(e.error is not None and "not have been used" in e.error.message for e in evidence):
        return Diagnosis("allow_unused", "a parameter that the loss does not use makes autograd.grad raise; allow_unused=True gives None for it")
    if any(e.error is not None for e in evidence) or not all(isinstance(f, dict) for f in found):
        return None
    if any(set(f) != set(SHAPES) for f in found):
        if all(set(f) <= set(SHAPES) for f in found):
            return Diagnosis("names_missing", "some parameters are missing from the dict: frozen ones and unused ones belong into it, too")
        return None
    weights = [(e.answers.get(f"weight {n}"), e.inputs[n]) for e in evidence for n in SHAPES]
    if any(isinstance(w, np.ndarray) and not np.array_equal(w, before) for w, before in weights):
        return Diagnosis("takes_a_step", "the parameters have changed: no optimizer step, a probe only looks")
    expected = [_who(e.inputs, z) for e, z in zip(evidence, CHAINS.values(), strict=False)]
    words = {(e[n], f[n]) for e, f in zip(expected, found, strict=False) for n in e if e[n] != f[n]}
    old = [n for f, e, z in zip(found, expected, CHAINS.values(), strict=False) if z["old"] for n in e if f[n] != e[n]]
    fresh_right = all(f == e for f, e, z in zip(found, expected, CHAINS.values(), strict=False) if not z["old"])
    if words and fresh_right and old and words <= {("zero", "moves"), ("none", "moves"), ("frozen", "moves"), ("none", "zero")}:
        return Diagnosis("old_gradients", "gradients add up: what was there before your backward() is still in p.grad. Set it aside, or use autograd.grad")
    if words == {("none", "zero")}:
        return Diagnosis("none_is_zero", "None and 0 are two findings: None, nothing reached the parameter; 0, the gradient arrived and is zero")
    if words == {("zero", "none")}:
        return Diagnosis("zero_is_none", "a gradient of exactly 0 did arrive: only None means that nothing did")
    if words and words <= {("zero", "moves"), ("none", "moves")}:
        return Diagnosis("only_requires_grad", "requires_grad says that a parameter may move; whether it does, only its gradient can say")
    if words and words <= {("frozen", "none"), ("frozen", "zero")}:
        return Diagnosis("frozen_missed", "a frozen parameter has no gradient because nobody asked for one: look at requires_grad first")
    if words and words <= {("moves", "zero")}:
        return Diagnosis("sum", "a gradient whose sum or mean is near 0 is not 0: look at its norm, or at any()")
    if not words:
        lost = [(e.answers.get(f"before {n}"), e.answers.get(f"after {n}")) for e in evidence for n in SHAPES]
        if any(b is not None and a is None for b, a in lost):
            return Diagnosis("gradients_lost", "old gradients are gone: somebody was adding them up. Put them back, or use torch.autograd.grad")
        if any(b is None and a is not None for b, a in lost):
            return Diagnosis("gradients_left", "your gradients stay behind in p.grad, and the next backward() adds to them; torch.autograd.grad leaves none")
        return Diagnosis("gradients_changed", "the gradients that were there are others now: put them back as they were")
    return None


def _lab_who(model, x, y):
    import torch

    named = dict(model.named_parameters())
    trained = {n: p for n, p in named.items() if p.requires_grad}
    grads = dict(zip(trained, torch.autograd.grad(((model(x) - y) ** 2).mean(), list(trained.values()), allow_unused=True), strict=True))
    return {n: "frozen" if n not in trained else "none" if grads[n] is None else "moves" if grads[n].any() else "zero" for n in named}


WHO = Exercise(
    id="10.2",
    title="Who learns?",
    difficulty=2,
    minutes=6,
    points=4,
    name="who_learns",
    cases=(
        *(Case(title, _chain_probe(z), _who_judge(z)) for title, z in CHAINS.items()),
        Case("gradients and weights are left as they were", _chain_probe(CHAINS["in the middle of a training, with old gradients"]), _untouched_judge),
        Case("where there was no gradient there is none afterwards", _chain_probe(CHAINS["a fresh pair, B = 0"]), _untouched_judge),
    ),
    diagnose=_diagnose_who,
    hints=(
        "Four words, three questions, in this order: does it require a gradient? Did one arrive? Is it zero everywhere?",
        "torch.autograd.grad(loss, parameters, allow_unused=True) returns the gradients and writes none into p.grad; unused parameters get None.",
        "trained = {n: p for n, p in model.named_parameters() if p.requires_grad}; "
        "grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True); then for each name: frozen, none, moves if grad.any() else zero",
    ),
    read="lora_lab/diagnosis/probes.py, gradient_report",
    fallback=lambda: _lab_who,
)


# ---------------------------------------------------------------------------------------------------------------------
# 10.4  times_counted(W, W0, A, B, scaling)

TIMES = {"merged once": 1.0, "not merged": 0.0, "merged twice": 2.0, "subtracted": -1.0}


def _times_probe(k: float, noise: float):
    def probe(rng):
        s = Script()
        W0, A, B = rng.normal(size=(11, 7)), rng.normal(size=(3, 7)), rng.normal(size=(11, 3))
        B[4] = 0.0  # a row of ΔW that is zero: a quotient of entries has no answer there
        delta = 5 / 3 * B @ A
        W = W0 + k * delta + noise * rng.normal(size=(11, 7)) * np.abs(delta).mean()
        values = {"W": W, "W0": W0, "A": A, "B": B}
        s.send("k", s.call(*(s.input(name, value) for name, value in values.items()), 5 / 3))
        return s

    return probe


def _times(inputs, scaling=5 / 3) -> float:
    """numpy's least squares: the k that brings k ΔW closest to W - W0."""
    delta = scaling * inputs["B"] @ inputs["A"]
    return float(np.linalg.lstsq(delta.reshape(-1, 1), (inputs["W"] - inputs["W0"]).ravel(), rcond=None)[0][0])


def _times_judge(inputs, answers):
    return compare(answers["k"], _times(inputs), "times_counted(W, W0, A, B, scaling)", rtol=RTOL, atol=1e-9)


def _diagnose_times(evidence: list[Evidence]) -> Diagnosis | None:
    found = [_number(e.answers.get("k")) for e in evidence]
    if any(f is None for f in found):
        many = [e.answers.get("k") for e in evidence]
        if all(isinstance(f, np.ndarray) and f.size > 1 for f in many):
            return Diagnosis("not_reduced", "one number for each entry; asked is one number for the whole matrix")
        return None
    if not math.isfinite(found[0]):
        return Diagnosis("elementwise", "you divide entry by entry, and ΔW has entries that are 0: fit one number to all entries instead")
    inputs = [e.inputs for e, f in zip(evidence, found, strict=True) if math.isfinite(f)]  # a cosine with W = W0 is 0 / 0
    found = [f for f in found if math.isfinite(f)]

    def each(function):
        with np.errstate(divide="ignore", invalid="ignore"):  # where W is W0, some of these are 0 / 0, and are left out below
            return [function(z["W"], z["W0"], z["B"] @ z["A"]) for z in inputs]

    s = 5 / 3
    values = {
        "right": each(lambda W, W0, D: ((W - W0) * D).sum() / (D * D).sum() / s),
        "norms": each(lambda W, W0, D: np.linalg.norm(W - W0) / np.linalg.norm(s * D)),
        "scaling_missing": each(lambda W, W0, D: ((W - W0) * D).sum() / (D * D).sum()),
        "scaling_twice": each(lambda W, W0, D: ((W - W0) * D).sum() / (D * D).sum() / s / s),
        "scaling_inverted": each(lambda W, W0, D: ((W - W0) * D).sum() / (D * D).sum() * s),
        "scaling_on_top_alone": each(lambda W, W0, D: ((W - W0) * D).sum() / (D * D).sum() * s * s),
        "base_not_subtracted": each(lambda W, W0, D: (W * D).sum() / (D * D).sum() / s),
        "cosine": each(lambda W, W0, D: ((W - W0) * D).sum() / (np.linalg.norm(W - W0) * np.linalg.norm(D))),
        "sums": each(lambda W, W0, D: (W - W0).sum() / (s * D).sum()),
        "largest": each(lambda W, W0, D: np.abs(W - W0).max() / np.abs(s * D).max()),
        "not_divided": each(lambda W, W0, D: ((W - W0) * s * D).sum()),
        "by_norm": each(lambda W, W0, D: ((W - W0) * s * D).sum() / np.linalg.norm(s * D)),
        "upside_down": each(lambda W, W0, D: (s * D * s * D).sum() / ((W - W0) * s * D).sum()),
        "sign": each(lambda W, W0, D: -((W - W0) * D).sum() / (D * D).sum() / s),
        "by_base": each(lambda W, W0, D: np.linalg.norm(W - W0) / np.linalg.norm(W0)),
        "other_divisor": each(lambda W, W0, D: ((W - W0) ** 2).sum() / ((W - W0) * s * D).sum()),
    }
    values["rounded"] = [float(round(v)) for v in values["right"]]
    values["magnitude"] = [abs(v) for v in values["right"]]
    texts = {
        "norms": "a quotient of norms has no sign, and counts rounding as if it were ΔW: project W - W0 on ΔW",
        "scaling_missing": "ΔW is scaling · B A: the scaling is missing",
        "scaling_twice": "the scaling is in ΔW twice",
        "scaling_inverted": "the scaling stands on the wrong side of the division",
        "scaling_on_top_alone": "the scaling stands above the line, and squared below it where it is missing: use ΔW = scaling · B A in both places",
        "base_not_subtracted": "W holds W0 as well: project W - W0",
        "cosine": "this is the cosine of the angle between the two: direction without length. Divide by ‖ΔW‖² instead",
        "sums": "a quotient of sums lets entries cancel: multiply entry by entry with ΔW first, then add up",
        "largest": "one entry decides here, and its sign is lost: use all of them",
        "not_divided": "this is the inner product alone; divide by ‖ΔW‖²",
        "by_norm": "you divide by ‖ΔW‖; its square is needed, or k has the size of a weight",
        "upside_down": "the division is upside down",
        "sign": "the sign is turned: W - W0, not W0 - W",
        "by_base": "this compares the change with W0; asked is how often ΔW is in it",
        "rounded": "rounded to a whole number; the rest is what tells you whether the count can be believed",
        "magnitude": "the sign is lost: an update that was subtracted counts -1",
        "other_divisor": "you divide by the projection; ‖ΔW‖² belongs below the line",
    }
    key = first_match(found, {k: v for k, v in values.items() if k != "right" and all(map(math.isfinite, v))}, rtol=1e-5, atol=1e-7)
    return Diagnosis(key, texts[key]) if key else None


def _lab_times(W, W0, A, B, scaling):
    delta = scaling * B @ A
    return float(((W - W0) * delta).sum() / (delta * delta).sum())


TIMES_EXERCISE = Exercise(
    id="10.4",
    title="How often is ΔW in there?",
    difficulty=2,
    minutes=4,
    points=3,
    name="times_counted",
    cases=(
        *(Case(title, _times_probe(k, 0.0), _times_judge) for title, k in TIMES.items()),
        Case("merged once, then rounded", _times_probe(1.0, 0.4), _times_judge),
        Case("merged twice, then rounded", _times_probe(2.0, 0.3), _times_judge),
    ),
    diagnose=_diagnose_times,
    hints=(
        "W - W0 should be k ΔW, but rounding has touched every entry. Which k is closest over all entries?",
        "Least squares with one unknown: k = (sum of (W - W0) · ΔW) / (sum of ΔW · ΔW), entry by entry.",
        "delta = scaling * B @ A; return float(((W - W0) * delta).sum() / (delta * delta).sum())",
    ),
    read="lora_lab/diagnosis/examination.py, weights",
    fallback=lambda: _lab_times,
)


# ---------------------------------------------------------------------------------------------------------------------
# 10.3  why_flat(chart)

WORDS = ("targets", "both zero", "no gradient", "optimizer", "healthy")


def _triage_probe(kind: str):
    def probe(rng):
        s = Script()
        chart = triage_case(kind, int(rng.integers(1, 10_000)))
        for name, value in chart.items():
            if value is not None:
                s.input(name, np.float64(value))
        s.send("word", s.call({name: value for name, value in chart.items()}))
        return s

    return probe


def _triage_judge(kind: str):
    def judge(inputs, answers):
        found, expected = answers["word"], TRIAGE[kind]
        if found == expected:
            return None
        if not isinstance(found, str) or found not in WORDS:
            return f"why_flat gave {found!r}; the answer is one of {', '.join(map(repr, WORDS))}"
        chart = ", ".join(f"{name} {float(inputs[name]):.3g}" if name in inputs else f"{name} None"
                          for name in ("wanted", "adapted", "A", "B", "grad_A", "grad_B", "B_moved"))  # fmt: skip
        return f"you say {found!r}; this one is {expected!r} ({chart})"

    return judge


def _diagnose_triage(evidence: list[Evidence]) -> Diagnosis | None:
    errors = [e for e in evidence if e.error is not None]
    if errors and any(e.error.type == "TypeError" and "NoneType" in e.error.message for e in errors):
        return Diagnosis("compares_none", "grad_A or grad_B may be None, which cannot be compared with a number: ask `is None` first")
    if errors:
        return None
    said = {kind: e.answers.get("word") for kind, e in zip(TRIAGE, evidence, strict=True)}
    wrong = {kind: word for kind, word in said.items() if word != TRIAGE[kind]}
    if any(word not in WORDS for word in said.values()):
        others = ", ".join(repr(w) for w in dict.fromkeys(map(str, said.values())) if w not in WORDS)
        return Diagnosis("unknown_word", f"an answer is none of the five words: {others}")
    if len(set(said.values())) == 1:
        return Diagnosis("always_the_same", "every patient gets the same answer")
    if wrong == {"fresh": "both zero"} or wrong == {"fresh": "both zero", "optimizer": "both zero"}:
        return Diagnosis("b_zero", "B = 0 is how every adapter begins: ill is one whose A is zero as well")
    if set(wrong) <= {"fresh", "half_way", "optimizer", "targets"} and "fresh" in wrong and set(wrong.values()) == {"no gradient"}:
        return Diagnosis("grad_a_zero", "at step 0 the gradient of A is exactly 0, because B is: healthy. No gradient means None, for both")
    if wrong == {"both_zero": "no gradient", "no_gradient": "both zero"}:
        return Diagnosis("swapped", "the two are exchanged: A = B = 0 is 'both zero', two gradients that are None 'no gradient'")
    if wrong.get("both_zero") == "no gradient":
        return Diagnosis("zero_is_none", "a gradient of 0 has arrived; None has not. `if not grad` takes the one for the other: ask `is None`")
    if wrong.get("both_zero") == "optimizer" or wrong.get("no_gradient") == "optimizer":
        which = "A = B = 0" if wrong.get("both_zero") == "optimizer" else "no gradient at all"
        return Diagnosis("order", f"with {which} B does not move either, whoever holds it: accuse the optimizer only after the gradient is seen to be there")
    if wrong.get("no_gradient") == "both zero":
        return Diagnosis("none_is_zero", "without a gradient there is no telling what A and B would get: look whether A is 0, not whether nothing moves")
    if wrong == {"targets": "healthy"}:
        return Diagnosis("coverage_missed", "a partial match trains, only too little of it: compare `adapted` with `wanted`")
    if set(wrong) == {"half_way"}:
        return Diagnosis("half_way", "a healthy adapter in the middle of its training: A, B and both gradients are not 0, and that is well")
    if wrong and set(wrong.values()) == {"targets"}:
        return Diagnosis("targets_too_often", "all wanted layers are adapted here: `adapted < wanted`, and not <= or a share")
    if wrong == {"optimizer": "healthy"}:
        return Diagnosis("optimizer_missed", "gradients arrive and B stays where it is: whoever takes the steps does not hold B. Look at B_moved")
    if wrong == {"both_zero": "healthy"}:
        return Diagnosis("both_zero_missed", "A and B are both 0: each gradient is proportional to the other factor, so both are 0 for good")
    if wrong == {"no_gradient": "healthy"}:
        return Diagnosis("none_missed", "grad_A and grad_B are None: nothing reached the factors")
    return None


def _lab_why(chart):
    if chart["adapted"] < chart["wanted"]:
        return "targets"
    if chart["grad_A"] is None and chart["grad_B"] is None:
        return "no gradient"
    if chart["A"] == 0 and chart["B"] == 0:
        return "both zero"
    return "optimizer" if chart["B_moved"] == 0 else "healthy"


TRIAGE_EXERCISE = Exercise(
    id="10.3",
    title="The loss stays flat: why?",
    difficulty=2,
    minutes=6,
    points=4,
    name="why_flat",
    cases=tuple(
        Case(title, _triage_probe(kind), _triage_judge(kind))
        for kind, title in zip(TRIAGE, ("a healthy one at step 0", "a healthy one half-way", "a typo in the targets", "A = B = 0",
                                        "a gradient that never arrives", "an optimizer that holds something else"), strict=True)
    ),
    diagnose=_diagnose_triage,
    hints=(
        "Which reading belongs to one cause alone? Which one do several causes share? Ask in the order in which a cause hides the later ones.",
        "adapted < wanted; then gradients that are None; then A = B = 0; then a B that has not moved. B = 0 and grad_A = 0 are healthy at step 0.",
        'if chart["adapted"] < chart["wanted"]: "targets"; if grad_A and grad_B are None: "no gradient"; if A == 0 and B == 0: "both zero"; '
        'if B_moved == 0: "optimizer"; else "healthy"',
    ),
    read="the two tables above",
    fallback=lambda: _lab_why,
)


# ---------------------------------------------------------------------------------------------------------------------
# 10.5  fine_tune(model, targets, x, y, steps, lr)
#
# A network with a dropout and a fresh head. What comes back is judged by what it can do: numpy runs the network from the saved tensors.

NET = {"fc1": (9, 7), "fc2": (8, 9), "head": (4, 8)}
HIT = ["fc1", "fc2"]


def _tune_probe(keep: str):
    def probe(rng):
        s = Script(seed=int(rng.integers(1_000)))
        weights = {}
        for name, shape in NET.items():
            weights[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32) / math.sqrt(shape[1])
            weights[f"{name}.bias"] = rng.normal(size=shape[0]).astype(np.float32) / 4
            s.input(f"{name}.weight", weights[f"{name}.weight"]), s.input(f"{name}.bias", weights[f"{name}.bias"])
        parts = {n: linear(weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in NET}
        body = {"fc1": parts["fc1"], "act1": layer("ReLU"), "drop": layer("Dropout", p=0.3), "fc2": parts["fc2"], "act2": layer("ReLU")}
        model = s.module(body | {"head": parts["head"]})
        x = s.input("x", rng.normal(size=(24, 7)).astype(np.float32))
        y = s.input("y", rng.integers(0, 4, size=24))
        result = s.call(model, HIT, x, y, 12, 0.05)
        s.send("saved", s.get(result, "0"))
        s.send("predictions", s.get(result, "1"))
        s.send("parameters", s.parameters(model))
        for name in ("fc1", "fc2"):
            with s.attempt(f"base {name}"):
                s.send(f"base {name}.weight", s.get(model, f"{name}.base_layer.weight"))
        # Training on must not change what was saved.
        with s.attempt("train on"):
            for name in ("fc1", "fc2"):
                s.set(model, f"{name}.lora_B", np.zeros((NET[name][0], 3), dtype=np.float32))
        s.send("saved later", s.get(result, "0"))
        return s

    return probe


def _forward(inputs, saved, scaling=2.0):
    """The network in numpy, from the base's tensors and what was saved."""
    h = inputs["x"].astype(np.float64)
    for name in ("fc1", "fc2"):
        A, B = saved[f"{name}.lora_A"].astype(np.float64), saved[f"{name}.lora_B"].astype(np.float64)
        h = np.maximum(h @ inputs[f"{name}.weight"].T + inputs[f"{name}.bias"] + scaling * h @ A.T @ B.T, 0)
    head = {k: saved.get(f"head.{k}", inputs[f"head.{k}"]) for k in ("weight", "bias")}
    return h @ head["weight"].T + head["bias"]


def _saved(answers, when="saved"):
    found = answers.get(when)
    if not isinstance(found, dict) or any(not isinstance(v, np.ndarray) for v in found.values()):
        return None
    return {_head_name(name): value for name, value in found.items()}


def _head_name(name: str) -> str:
    """With modules_to_save the head that trains is a copy beside the old one."""
    return name.replace("head.trained.", "head.")


FACTORS = {f"{n}.{f}" for n in HIT for f in ("lora_A", "lora_B")}
HEAD = {"head.weight", "head.bias"}


def _judge_learns(inputs, answers):
    saved = _saved(answers)
    if saved is None:
        return "the first thing to come back is a dict, name -> tensor, of everything that trained"
    missing = FACTORS - set(saved)
    if not missing and saved["fc1.lora_A"].shape != (3, 7):
        return f"lora_A of fc1 has shape {saved['fc1.lora_A'].shape}, expected (3, 7): r is 3"
    if missing:
        return f"not among what was saved: {', '.join(sorted(missing))}"
    still = [n for n in HIT if not np.any(saved[f"{n}.lora_B"])]
    if still:
        return f"after 12 steps lora_B of {', '.join(still)} is still 0"
    return None


def _judge_head(inputs, answers):
    saved = _saved(answers) or {}
    missing = HEAD - set(saved)
    if missing:
        return f"the fresh head is not among what was saved: {', '.join(sorted(missing))}"
    if np.array_equal(saved["head.weight"], inputs["head.weight"]):
        return "the head has not moved: it is fresh, so it has to train"
    return None


def _judge_base(inputs, answers):
    for name in ("fc1", "fc2"):
        base = answers.get(f"base {name}.weight")
        if base is None or not np.array_equal(base, inputs[f"{name}.weight"]):
            return f"the base weight of {name} is not what it was: it should be frozen"
    extra = set(_saved(answers) or {}) - FACTORS - HEAD
    if extra:
        return f"what was saved holds more than what trained: {', '.join(sorted(extra))}"
    extra = {_head_name(p["name"]) for p in answers["parameters"] if p["requires_grad"]} - FACTORS - HEAD
    if extra:
        return f"besides the adapters and the head these train: {', '.join(sorted(extra))}"
    return None


def _judge_predictions(inputs, answers):
    saved = _saved(answers)
    if saved is None or FACTORS - set(saved):
        return "without the saved factors nothing can be predicted again"
    return compare(answers["predictions"], _forward(inputs, saved), "what the saved tensors predict on another machine, beside your predictions,", rtol=1e-4)


def _judge_copies(inputs, answers):
    first, later = _saved(answers), _saved(answers, "saved later")
    if first is None or later is None:
        return "the first thing to come back is a dict, name -> tensor"
    changed = [n for n in first if n in later and not np.array_equal(first[n], later[n])]
    return f"{', '.join(changed)}: what was saved changes when the model trains on; save copies" if changed else None


def _diagnose_tune(evidence: list[Evidence]) -> Diagnosis | None:
    first = evidence[0]
    if first.error is not None:
        return None
    saved = _saved(first.answers)
    if saved is None or not isinstance(first.answers.get("parameters"), list):
        return None
    trains = {_head_name(p["name"]) for p in first.answers["parameters"] if p["requires_grad"]}
    faults = []
    if trains - FACTORS - HEAD:
        faults.append(("base_trains", "the base trains, too: freeze it (apply_lora does, if nothing thaws it afterwards)"))
    elif set(saved) - FACTORS - HEAD:
        faults.append(("saved_everything", "the frozen base is in what was saved; only what trained belongs there, or the file is as large as the model"))
    if FACTORS <= set(saved) and not any(np.any(saved[f"{n}.lora_B"]) for n in HIT):
        faults.append(("optimizer", "B never moves: the optimizer does not hold it. Made before the adapters are in, it holds other tensors"))
    elif HEAD <= set(saved) and np.array_equal(saved["head.weight"], first.inputs["head.weight"]):
        if "head.weight" in trains:
            faults.append(("head_not_held", "the head requires a gradient and does not move: the optimizer does not hold it"))
        else:
            faults.append(("head_frozen", "the head is fresh and frozen: apply_lora froze it. Let it train again, or name it in modules_to_save"))
    if not HEAD <= set(saved):
        faults.append(("head_not_saved", "the fresh head is not in what was saved; after loading there will be another. Save all that requires a gradient"))
    if evidence[4].failure and not evidence[0].failure:
        faults.append(("not_copied", "what was saved are the parameters themselves, and they train on: detach().clone()"))
    # With the head's own tensors missing the predictions can't be compared.
    if HEAD <= set(saved) and evidence[3].failure and not faults:
        found = first.answers.get("predictions")
        if isinstance(found, np.ndarray) and found.shape == (24, 4):
            faults.append(("dropout_active", "the predictions are not those of the saved tensors: dropout was at work. eval() before you predict"))
    if not faults:
        return None
    return Diagnosis("_and_".join(key for key, _ in faults), "; ".join(text for _, text in faults))


def _lab_tune(model, targets, x, y, steps, lr):
    import torch
    from torch import nn

    from lora_lab import apply_lora

    apply_lora(model, r=3, alpha=6, target_modules=targets)
    model.head.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    saved = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        return saved, model.eval()(x)


TUNE = Exercise(
    id="10.5",
    title="Four faults in ten lines",
    difficulty=3,
    minutes=6,
    points=4,
    name="fine_tune",
    cases=(
        Case("the adapters learn", _tune_probe(""), _judge_learns),
        Case("the fresh head learns, and is saved", _tune_probe(""), _judge_head),
        Case("the base stays as it was", _tune_probe(""), _judge_base),
        Case("the saved tensors give the same predictions elsewhere", _tune_probe(""), _judge_predictions),
        Case("what was saved stays as it is", _tune_probe(""), _judge_copies),
    ),
    diagnose=_diagnose_tune,
    hints=(
        "Go through the four probes: what does the optimizer hold? Who trains? What is in the file? Does the same input give the same answer twice?",
        "Adapters first, then model.head.requires_grad_(True), then the optimizer from what requires a gradient; save by requires_grad, as copies; "
        "predict in eval().",
        "saved = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}; with torch.no_grad(): return saved, model.eval()(x)",
    ),
    read="lab 02b, exercise 2b.3, and lora_lab.train",
    fallback=lambda: _lab_tune,
)


# ---------------------------------------------------------------------------------------------------------------------
# 10.6  discharge(W, W0, A, B, scaling)
#
# Exported weights, each with one cause that no title tells. Square, so that a transpose raises nothing; rounding leaves 5 % of ΔW unexplained.

SEALED = ("merged twice", "healthy", "transposed", "scaling", "other base", "no effect")


def _sealed_probe(cause: str):
    def probe(rng):
        s = Script()
        while True:
            W0, A, B = rng.normal(size=(9, 9)), rng.normal(size=(3, 9)), rng.normal(size=(9, 3))
            delta = 5 / 3 * B @ A
            if abs((delta * delta.T).sum()) < 0.3 * (delta**2).sum():  # a transpose that is far from the update itself
                break
        noise, other = (v * np.linalg.norm(delta) / np.linalg.norm(v) for v in rng.normal(size=(2, 9, 9)))
        parts = {"merged twice": 2 * delta, "healthy": delta, "transposed": delta.T, "scaling": B @ A, "other base": delta + other, "no effect": 0 * delta}
        W = W0 + parts[cause] + 0.05 * noise
        values = {"W": W, "W0": W0, "A": A, "B": B}
        result = s.call(*(s.input(name, value) for name, value in values.items()), 5 / 3)
        s.send("result", result)
        return s

    return probe


def _sealed_parts(answers):
    """(cause, repaired weight) of an answer, None for what is not there."""
    found = answers["result"]
    if not isinstance(found, (list, tuple)) or len(found) != 2:
        return None, None
    return (found[0] if isinstance(found[0], str) else None), (found[1] if isinstance(found[1], np.ndarray) else None)


def _sealed_right(inputs):
    return inputs["W0"] + 5 / 3 * inputs["B"] @ inputs["A"]


def _sealed_judge(cause: str):
    def judge(inputs, answers):
        said, repaired = _sealed_parts(answers)
        if said is None:
            return "discharge gives two things: one of six words, and a weight (out, in)"
        if said not in SEALED:
            return f"the cause is {said!r}; it is one of {', '.join(map(repr, SEALED))}"
        if said != cause:
            return f"{said!r} is not what ails this one"
        return compare(repaired, _sealed_right(inputs), "the cause is right. The weight as it should have been exported", rtol=RTOL)

    return judge


def _diagnose_sealed(evidence: list[Evidence]) -> Diagnosis | None:
    if any(e.error is not None for e in evidence):
        return None
    found = [_sealed_parts(e.answers) for e in evidence]
    if all(isinstance(e.answers["result"], str) for e in evidence):
        return Diagnosis("no_repair", "a cause is half of the work: return the weight as it should be, too")
    if all(isinstance(e.answers["result"], (list, tuple)) and len(e.answers["result"]) == 2 and isinstance(e.answers["result"][1], str) for e in evidence):
        return Diagnosis("swapped", "the cause comes first, the weight second")
    if any(said is None for said, _ in found):
        return None
    wrong = {cause: said for cause, (said, _) in zip(SEALED, found, strict=True) if said != cause}
    if any(said not in SEALED for said, _ in found):
        return Diagnosis("unknown_word", f"an answer is none of the six words: {', '.join(sorted({s for s, _ in found if s not in SEALED}))}")
    if len({said for said, _ in found}) == 1:
        only = found[0][0]
        if only == "other base":
            return Diagnosis("exact", "rounding has touched every entry: nothing is equal to the last bit, so ask what is near")
        return Diagnosis("always_the_same", "every patient gets the same answer")
    if set(wrong) == {"transposed", "other base"} or wrong in ({"other base": "healthy"}, {"transposed": "no effect"}):
        return Diagnosis("rest_not_looked_at", "k alone can't tell: what is left of W - W0 - k · ΔW? Rounding leaves a few per cent of ΔW, another base or a "
                         "transpose leaves as much as ΔW itself")  # fmt: skip
    if wrong == {"scaling": "healthy"}:
        return Diagnosis("scaling_missed", "k = 0.6 is no rounding error of 1: it is 1 / scaling, so B A went in without its scaling")
    if wrong == {"scaling": "other base"}:
        return Diagnosis("scaling_is_a_multiple", "B A without its scaling is a multiple of ΔW, too: k is 1 / scaling, and nothing is left")
    if wrong == {"transposed": "other base"}:
        return Diagnosis("transpose_missed", "before you accuse the base, try (B A) the other way round: nothing is left then")
    if wrong == {"merged twice": "healthy"}:
        return Diagnosis("twice_missed", "a sum of base and update to which the update was added again: k is 2")
    if wrong:
        return None
    repaired = [r for _, r in found]
    if any(r is None or r.shape != (9, 9) for r in repaired):
        return None
    inputs = [e.inputs for e in evidence]
    candidates = {
        "not_repaired": [z["W"] for z in inputs],
        "base_alone": [z["W0"] for z in inputs],
        "repair_unscaled": [z["W0"] + z["B"] @ z["A"] for z in inputs],
        "on_top": [z["W"] + 5 / 3 * z["B"] @ z["A"] for z in inputs],
    }
    texts = {
        "not_repaired": "the weight comes back as it was: named is not repaired",
        "base_alone": "this is W0: the update has to be in it, once",
        "repair_unscaled": "the repaired weight holds B A without its scaling",
        "on_top": "one more update on top of what was found: start from W0",
    }
    for key, values in candidates.items():
        if all(np.allclose(r, v, rtol=1e-5, atol=1e-7) for r, v in zip(repaired, values, strict=True)):
            return Diagnosis(key, texts[key])
    near = [np.linalg.norm(r - _sealed_right(z)) < 0.1 * np.linalg.norm(_sealed_right(z) - z["W0"]) for r, z in zip(repaired, inputs, strict=True)]
    if sum(near) >= 4:
        return Diagnosis("repaired_from_W", "nearly: the weight as it was found still holds its rounding, or another base. Start from W0, which is here")
    return None


def _lab_discharge(W, W0, A, B, scaling):
    delta = scaling * B @ A
    k = float(((W - W0) * delta).sum() / (delta * delta).sum())
    right = W0 + delta
    if (W - W0 - k * delta).norm() < 0.3 * delta.norm():
        words = {"no effect": 0.0, "healthy": 1.0, "merged twice": 2.0, "scaling": 1 / scaling}
        return min(words, key=lambda word: abs(words[word] - k)), right
    return ("transposed" if (W - W0 - delta.T).norm() < 0.3 * delta.norm() else "other base"), right


SEALED_EXERCISE = Exercise(
    id="10.6",
    title="The sealed ward",
    difficulty=3,
    minutes=5,
    points=4,
    name="discharge",
    cases=tuple(Case(f"bed {number}: its cause, and its weight repaired", _sealed_probe(cause), _sealed_judge(cause))
                for number, cause in enumerate(SEALED, start=1)),
    diagnose=_diagnose_sealed,
    hints=(
        "What was added is W - W0. Four of the six added a multiple of ΔW: which one? And what is left when the best multiple is taken away?",
        "k = times_counted(...); rest = (W - W0 - k * delta).norm() / delta.norm(). A small rest: k is 0, 1, 2 or 1 / scaling. A large one: try delta.T.",
        "if rest < 0.3: the word whose k is nearest; elif (W - W0 - delta.T).norm() < 0.3 * delta.norm(): 'transposed'; else: 'other base'. "
        "The repair is W0 + delta, whatever the cause",
    ),
    read="lora_lab/diagnosis/examination.py, weights",
    fallback=lambda: _lab_discharge,
)


LAB = Lab(
    number="10",
    name="10_clinic",
    title="The broken-adapter clinic",
    minutes=50,
    core=True,
    objectives=(
        "find out with four probes why an adapter does not work, and say what each of them cannot see",
        "tell None from 0 in a gradient, and B = 0 from both zero",
        "count how often an update is in the weights, name from them alone what went wrong, and repair it",
        "know why a good loss curve proves little about what was saved, merged and loaded",
        "examine a model of your own, with lora_lab.diagnose",
    ),
    needs=("lab 02", "lab 02b for saving", "lab 05 for Conv1D and tied weights"),
    exercises=(APART_EXERCISE, WHO, TRIAGE_EXERCISE, TIMES_EXERCISE, TUNE, SEALED_EXERCISE),
    predictions=(
        Prediction(
            "10.A",
            "Thirteen broken adapters. You see only each one's loss curve, beside that of a healthy twin. In how many does it end clearly above the "
            "twin's (more than 1.5 times as high)?",
            {"a": "in nearly all: 11 to 13", "b": "in about half: 5 to 10", "c": "in few: 0 to 4"},
        ),
        Prediction(
            "10.B",
            "A healthy adapter at step 0. The gradient of A is ...",
            {"a": "None", "b": "exactly 0", "c": "small, and not 0"},
        ),
        Prediction(
            "10.C",
            "Bed G has the best curve of all, and its A and B on the original base give rubbish. Why?",
            {"a": "alpha / r is missing", "b": "the base was trained, too", "c": "dropout was active", "d": "A and B were exchanged"},
        ),
        Prediction(
            "10.D",
            "Bed C trained a new head. The file holds A and B, loaded without an error. On the next day its accuracy is ...",
            {"a": "that of yesterday", "b": "that of the frozen base", "c": "about chance"},
        ),
        Prediction(
            "10.E",
            "Bed J: alpha = 2 r and lr 0.05; r = 8 learns, r = 64 dies. You keep the lr and set alpha = 16 at r = 64. Its last loss is ...",
            {"a": "as bad as before", "b": "clearly lower"},
        ),
    ),
)
