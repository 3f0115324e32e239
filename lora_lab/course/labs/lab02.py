"""Lab 02, A LoRA layer from scratch: its exercises. Sources: Hu et al. 2021 (arXiv 2106.09685), section 4.1; oracles are numpy's."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from lora_lab.layers import LoRALinear

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script
from .formulas import SCALINGS, explain_forward, first_match, scaling_name

# r, alpha, 1, sqrt(r), in and out are pairwise different, and differ between the two sets: no two mistakes give the same numbers.
SIZES = {"small": dict(n=6, d_in=7, d_out=11, r=3, alpha=5.0), "other": dict(n=4, d_in=9, d_out=5, r=2, alpha=7.0)}


# ---------------------------------------------------------------- 2.1 the forward pass


def _draw(rng, sizes: dict, *, zero_B=False, tokens: int | None = None, bias=True, dtype=np.float64) -> dict:
    n, d_in, d_out, r = (sizes[k] for k in ("n", "d_in", "d_out", "r"))
    shape = (n, d_in) if tokens is None else (n, tokens, d_in)
    arrays = {"x": rng.normal(size=shape), "W": rng.normal(size=(d_out, d_in)), "A": rng.normal(size=(r, d_in))}
    arrays["B"] = np.zeros((d_out, r)) if zero_B else rng.normal(size=(d_out, r))
    if bias:
        arrays["b"] = rng.normal(size=d_out)
    return {name: array.astype(dtype) for name, array in arrays.items()}


def _forward_probe(sizes: dict, **options):
    def probe(rng):
        s = Script()
        refs = {name: s.input(name, array) for name, array in _draw(rng, sizes, **options).items()}
        s.send("y", s.call(refs["x"], refs["W"], refs.get("b"), refs["A"], refs["B"], sizes["alpha"], sizes["r"]))
        return s

    return probe


def lora_output(inputs, alpha: float, r: int) -> np.ndarray:
    """The oracle: build W + (alpha / r) B A in full, which the student never does, and apply it once."""
    W = inputs["W"].astype(np.float64) + (alpha / r) * np.einsum("or,ri->oi", inputs["B"], inputs["A"], dtype=np.float64)
    return np.einsum("...i,oi->...o", inputs["x"].astype(np.float64), W) + inputs.get("b", 0.0)


def _forward_judge(sizes: dict):
    return lambda inputs, answers: compare(answers["y"], lora_output(inputs, sizes["alpha"], sizes["r"]), what="lora_forward(…)")


def _gradient_probe(rng):
    sizes, s = SIZES["small"], Script()
    arrays = _draw(rng, sizes)
    refs = {name: s.input(name, array, requires_grad=name in "AB") for name, array in arrays.items()}
    y = s.call(refs["x"], refs["W"], refs["b"], refs["A"], refs["B"], sizes["alpha"], sizes["r"])
    g = s.input("g", rng.normal(size=(sizes["n"], sizes["d_out"])))
    s.backward(y, g)
    s.send("grad_A", s.grad(refs["A"]))
    s.send("grad_B", s.grad(refs["B"]))
    return s


def factor_gradients(inputs, alpha: float, r: int) -> tuple[np.ndarray, np.ndarray]:
    """The oracle of 2.1 and 2.3: the chain rule through y = x W^T + s (x A^T) B^T, by einsum."""
    scale, g, x, A, B = alpha / r, inputs["g"], inputs["x"], inputs["A"], inputs["B"]
    return scale * np.einsum("or,no,ni->ri", B, g, x), scale * np.einsum("no,ni,ri->or", g, x, A)


def _gradient_judge(inputs, answers):
    grad_A, grad_B = factor_gradients(inputs, SIZES["small"]["alpha"], SIZES["small"]["r"])
    for name, expected in (("A", grad_A), ("B", grad_B)):
        if answers["grad_" + name] is None:
            return f"no gradient reaches {name}: `.detach()`, `.data`, `.item()` or `torch.no_grad()` cuts the graph"
        problem = compare(answers["grad_" + name], expected, what=f"the gradient of {name}")
        if problem:
            return problem
    return None


def _diagnose_forward(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(e, SIZES[size]) for e, size in zip(evidence[:2], ("small", "other"), strict=True)]
    if any(isinstance(e.answers.get("y"), np.ndarray) and e.answers["y"].shape != lora_output(e.inputs, 1.0, 1).shape for e, _ in runs):
        return None  # the judge already says which shape came and which was expected
    found = explain_forward([(e.answers.get("y"), e.inputs, sizes) for e, sizes in runs])
    if found is not None:
        return found
    if all(e.failure is None for e in evidence[:2]):
        by_title = {e.title: e for e in evidence}
        if by_title["works without a bias"].failure:
            return Diagnosis("bias_none", "with a bias all is right; but b may be None, and then nothing is to be added")
        if by_title["gradients reach A and B"].failure:
            return Diagnosis("detached", "the numbers are right, but the graph is cut on the way, so A and B would never train")
        if by_title["works on (batch, tokens, d_in)"].failure:
            error = by_title["works on (batch, tokens, d_in)"].error
            turned = error is not None and error.where is not None and (".T" in error.where.text or ".t()" in error.where.text)
            return Diagnosis(
                "two_dims_only",
                "right for a matrix x, wrong for (batch, tokens, d_in): nothing may depend on how many dimensions x has"
                + (". `.T` turns all dimensions of a tensor; with x on the left, x @ A.T, only A is turned" if turned else ""),
            )
    return None


EXERCISE_1 = Exercise(
    id="2.1",
    title="The forward pass",
    difficulty=1,
    minutes=5,
    points=2,
    name="lora_forward",
    cases=(
        Case("equals W0 x + b + (alpha/r) B A x", _forward_probe(SIZES["small"]), _forward_judge(SIZES["small"])),
        Case("also for another r, alpha and shape", _forward_probe(SIZES["other"]), _forward_judge(SIZES["other"])),
        Case("with B = 0 it is the base layer", _forward_probe(SIZES["small"], zero_B=True), _forward_judge(SIZES["small"])),
        Case("works without a bias", _forward_probe(SIZES["small"], bias=False), _forward_judge(SIZES["small"])),
        Case("works on (batch, tokens, d_in)", _forward_probe(SIZES["small"], tokens=2), _forward_judge(SIZES["small"])),
        Case("gradients reach A and B", _gradient_probe, _gradient_judge),
    ),
    diagnose=_diagnose_forward,
    hints=(
        "Two paths start at x and meet at the end: the frozen layer, and a detour through r numbers. Which shapes does the detour pass?",
        "x is (n, d_in) with samples in rows, so a matrix (out, in) is applied as x @ M.T. The detour is x @ A.T, of shape (n, r), then @ B.T.",
        "base = x @ W.T (plus b unless it is None); return base + (alpha / r) * (x @ A.T) @ B.T",
    ),
    read="the picture above, and the paper's equation 3 (section 4.1)",
    fallback=lambda: _lab_forward,
)


def _lab_forward(x, W, b, A, B, alpha, r):
    """The lab's own version, through lora_lab's layer."""
    base = nn.Linear(W.shape[1], W.shape[0], bias=b is not None, device=W.device, dtype=W.dtype)
    layer = LoRALinear(base, r, alpha)
    given = {"base_layer.weight": W, "lora_A": A, "lora_B": B} | ({} if b is None else {"base_layer.bias": b})
    return torch.func.functional_call(layer, given, (x,))


# ---------------------------------------------------------------- 2.2 the start


def _init_probe(rng):
    s = Script(seed=int(rng.integers(2**31)))
    for name in ("first", "second"):
        factors = s.call(512, 96, 8)
        s.send(f"A {name}", s.get(factors, "0"))
        s.send(f"B {name}", s.get(factors, "1"))
    s.send("A narrow", s.get(s.call(32, 96, 8), "0"))
    return s


def _init_shapes(inputs, answers):
    for name, shape in (("A", (8, 512)), ("B", (96, 8))):
        found = answers[f"{name} first"]
        if not isinstance(found, np.ndarray) or found.shape != shape:
            got = found.shape if isinstance(found, np.ndarray) else type(found).__name__
            return f"{name} of init_factors(512, 96, r=8) should have shape {shape}, found {got}"
    return None


def _after_shapes(judge):
    """A judge that is asked only once the shapes are right; before that, the shapes are what is wrong."""
    return lambda inputs, answers: _init_shapes(inputs, answers) or judge(inputs, answers)


@_after_shapes
def _init_zero(inputs, answers):
    product = answers["B first"].astype(np.float64) @ answers["A first"].astype(np.float64)
    return None if not product.any() else f"B @ A is not zero at the start: its largest entry is {np.abs(product).max():.3g}"


@_after_shapes
def _init_size(inputs, answers):
    for name in ("A first", "A narrow"):
        size, d_in = _size(answers[name]), answers[name].shape[1]
        # A uniform draw in ±1/sqrt(d_in) has 0.58, a Gaussian with that deviation 1.0; 1/sqrt(2 d_in) and similar lie between.
        if not 0.3 <= size <= 1.6:
            return (
                f"for d_in={d_in} the entries of A should be about 1/sqrt({d_in}) = {d_in**-0.5:.3f} in size; "
                f"their root mean square is {size:.3g} times that"
            )
    return None


def _off_centre(A) -> bool:
    # The mean of N independent draws has a deviation of rms / sqrt(N); six of these happen by chance once in 10^9.
    return bool(abs(A.mean()) > 6 * np.sqrt(np.mean(np.square(A))) / math.sqrt(A.size))


@_after_shapes
def _init_random(inputs, answers):
    A = answers["A first"]
    if np.linalg.matrix_rank(A) < 8:
        return "the 8 rows of A should point in 8 directions; here they span fewer, and so would every update"
    if _off_centre(A):
        return f"A's entries should scatter around zero; their mean is {A.mean():.3g}"
    if np.array_equal(A, answers["A second"]):
        return "two calls gave the same A; two adapters would start as twins"
    return None


def _size(A) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(A, dtype=np.float64)))) * math.sqrt(A.shape[1]))


def _diagnose_init(evidence: list[Evidence]) -> Diagnosis | None:
    answers = evidence[0].answers
    A, B = answers.get("A first"), answers.get("B first")
    if not isinstance(A, np.ndarray) or not isinstance(B, np.ndarray):
        return None
    if A.shape == (512, 8) or B.shape == (8, 96):
        return Diagnosis("transposed", "a factor is transposed: A takes the input in, so it is (r, d_in); B gives the output, (d_out, r)")
    if A.shape == (8, 96) and B.shape == (512, 8):
        return Diagnosis("swapped_sizes", "d_in and d_out are swapped: A meets the input, B the output")
    if A.shape == (96, 8) and B.shape == (8, 512):
        return Diagnosis("wrong_order", "the factors come back in the wrong order: return A, B")
    if A.shape != (8, 512) or B.shape != (96, 8):
        return None
    if not A.any() and not B.any():
        return Diagnosis("both_zero", "both factors are zero. The gradient of A is proportional to B and that of B to A: nothing ever moves")
    if A.any() and B.any():
        return Diagnosis("both_random", "B is not zero (and A is not, either), so the pretrained function is changed before training begins")
    if B.any():
        return Diagnosis(
            "zero_A",
            "A is zero and B random. The update is zero and it would train (embeddings are started this way), but the paper's linear layers "
            "start with B = 0 and A random: do it so here, because the next exercises build on it",
        )
    if np.linalg.matrix_rank(A) < 8:
        return Diagnosis("constant_A", "the rows of A point the same way, so B @ A has a smaller rank than r: r = 8 would work like r = 1")
    narrow = answers.get("A narrow")
    if not isinstance(narrow, np.ndarray):
        return None
    if 0.3 <= _size(A) <= 1.6 and not 0.3 <= _size(narrow) <= 1.6:
        return Diagnosis("fixed_size", "A has the same size for every d_in; it should shrink with the width, like 1/sqrt(d_in)")
    if _size(A) > 1.6:
        return Diagnosis(
            "too_large",
            f"A's entries are {_size(A):.3g} times as large as 1/sqrt(d_in): A x grows with the layer's width, and the steps of B with it",
        )
    if _size(A) < 0.3:
        return Diagnosis("too_small", f"A's entries are only {_size(A):.3g} times 1/sqrt(d_in): B's gradient starts just as small")
    if np.array_equal(A, answers.get("A second")):
        return Diagnosis("seed_inside", "A is the same at each call, so every layer of a model would get it: a seed inside, or nothing random")
    if _off_centre(A):
        return Diagnosis("off_centre", f"A's entries scatter around {A.mean():.3g} instead of 0: torch.rand lies between 0 and 1")
    return None


EXERCISE_2 = Exercise(
    id="2.2",
    title="Where A and B start",
    difficulty=1,
    minutes=3,
    points=2,
    name="init_factors",
    cases=(
        Case("A is (r, d_in), B is (d_out, r)", _init_probe, _init_shapes),
        Case("B A = 0 at the start", _init_probe, _init_zero),
        Case("A's entries are about 1/sqrt(d_in) in size", _init_probe, _init_size),
        Case("A is random around zero: full rank, and new at each call", _init_probe, _init_random),
    ),
    diagnose=_diagnose_init,
    hints=(
        "At step 0 the model must still be the pretrained one. Which values of B guarantee that, whatever A is?",
        "B is torch.zeros. A is random; with entries of size 1/sqrt(d_in) the numbers A x are about as large as those in x.",
        "A = (torch.rand(r, d_in) * 2 - 1) / math.sqrt(d_in); B = torch.zeros(d_out, r); return A, B",
    ),
    read="the paper, section 4.1, last paragraph before 'A generalization of full fine-tuning'",
    fallback=lambda: _lab_init,
)


def _lab_init(d_in, d_out, r):
    layer = LoRALinear(nn.Linear(d_in, d_out), r, alpha=r)
    return layer.lora_A.detach(), layer.lora_B.detach()


# ---------------------------------------------------------------- 2.3 gradients


def _factor_probe(sizes: dict, zero_B=False):
    def probe(rng):
        s = Script()
        arrays = _draw(rng, sizes, zero_B=zero_B, bias=False)
        x, A, B = (s.input(name, arrays[name]) for name in ("x", "A", "B"))
        g = s.input("g", rng.normal(size=(sizes["n"], sizes["d_out"])))
        result = s.call(x, g, A, B, sizes["alpha"], sizes["r"])
        s.send("grad_A", s.get(result, "0"))
        s.send("grad_B", s.get(result, "1"))
        return s

    return probe


def _factor_judge(sizes: dict, *names: str):
    def judge(inputs, answers):
        expected = dict(zip(("grad_A", "grad_B"), factor_gradients(inputs, sizes["alpha"], sizes["r"]), strict=True))
        problems = (compare(answers[name], expected[name], what=name) for name in names)
        return next((problem for problem in problems if problem), None)

    return judge


def _diagnose_gradients(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(e, SIZES[size]) for e, size in ((evidence[0], "small"), (evidence[2], "other"))]
    found = {name: [e.answers.get(name) for e, _ in runs] for name in ("grad_A", "grad_B")}
    if any(not isinstance(value, np.ndarray) for values in found.values() for value in values):
        return None
    first_A, first_B = factor_gradients(runs[0][0].inputs, SIZES["small"]["alpha"], SIZES["small"]["r"])
    if found["grad_A"][0].shape == first_B.shape and found["grad_B"][0].shape == first_A.shape:
        if compare(found["grad_A"][0], first_B) is None:
            return Diagnosis("swapped", "both gradients are right, but in the wrong order: return grad_A, grad_B")
    if found["grad_A"][0].shape == first_A.T.shape or found["grad_B"][0].shape == first_B.T.shape:
        return Diagnosis("transposed", "a gradient has the shape of its tensor: grad_A is (r, d_in) like A, grad_B is (d_out, r) like B")
    e = runs[0][0].inputs
    n, scale = SIZES["small"]["n"], SIZES["small"]["alpha"] / SIZES["small"]["r"]
    for k, which in ((0, "first"), (n - 1, "last")):
        one = factor_gradients({**e, "g": e["g"][k : k + 1], "x": e["x"][k : k + 1]}, SIZES["small"]["alpha"], SIZES["small"]["r"])
        if compare(found["grad_A"][0], one[0]) is None and compare(found["grad_B"][0], one[1]) is None:
            return Diagnosis("one_sample", f"these are the gradients of the {which} sample alone; over samples they add up")
    for name, first, key in (("grad_A", first_A, "A"), ("grad_B", first_B, "B")):
        if found[name][0].shape == (n, *first.shape):
            return Diagnosis("not_summed", f"{name} has one gradient for each sample; add them up")
        if found[name][0].shape == first.shape and found[name][0].shape == e[key].shape:
            step = found[name][0] - e[key]
            factor = float((step * first).sum() / (first * first).sum())
            if abs(factor) > 1e-9 and compare(step, factor * first, rtol=1e-6) is None:
                return Diagnosis("updated_factor", f"{name} is {key} after a step; asked is the gradient itself")
    factors = {}
    for index, name in enumerate(("grad_A", "grad_B")):
        # The same wrong factor in front of a right gradient must explain both runs, with r, alpha and n different in each.
        def candidate(scale, index=index, name=name):
            return [
                scale(sizes) / (sizes["alpha"] / sizes["r"]) * factor_gradients(e.inputs, sizes["alpha"], sizes["r"])[index]
                for e, sizes in runs
            ]

        scales = SCALINGS | {
            "alpha / r / n": lambda z: z["alpha"] / z["r"] / z["n"],
            "-alpha / r": lambda z: -z["alpha"] / z["r"],
            "(alpha / r)²": lambda z: (z["alpha"] / z["r"]) ** 2,
        }
        factors[name] = first_match(found[name], {key: candidate(scale) for key, scale in scales.items()})
    wrong = {name: key for name, key in factors.items() if key not in (None, "alpha / r")}
    if wrong:
        name, key = next(iter(wrong.items()))
        if key == "alpha / r / n":
            return Diagnosis("averaged", f"{name} is averaged over the samples; g already is the gradient of the loss, so its rows add up")
        if key == "-alpha / r":
            return Diagnosis("sign", f"{name} has the wrong sign: the gradient points uphill, the optimizer does the minus")
        if key == "(alpha / r)²":
            return Diagnosis("scaling_twice", f"{name} carries alpha / r twice")
        return Diagnosis(
            "scaling_missing" if key == "1" else "scaling_wrong",
            f"the directions are right, but {name} is multiplied by {key}; y depends on it through (alpha / r) B A x, so the factor is alpha / r",
        )
    if compare(found["grad_B"][0], scale * e["g"].sum(0)[:, None] * (e["x"] @ e["A"].T).sum(0)) is None:
        return Diagnosis("sums_first", "g and A x are summed over the samples before they meet; multiply sample by sample, then sum: g.T @ (x @ A.T)")
    return None


EXERCISE_3 = Exercise(
    id="2.3",
    title="The two gradients",
    difficulty=3,
    minutes=6,
    points=3,
    name="factor_gradients",
    cases=(
        Case("grad_B is what autograd finds", _factor_probe(SIZES["small"]), _factor_judge(SIZES["small"], "grad_B")),
        Case("grad_A is what autograd finds", _factor_probe(SIZES["small"]), _factor_judge(SIZES["small"], "grad_A")),
        Case(
            "both, for another r, alpha and shape", _factor_probe(SIZES["other"]), _factor_judge(SIZES["other"], "grad_A", "grad_B")
        ),
        Case("at step 0, with B = 0", _factor_probe(SIZES["small"], zero_B=True), _factor_judge(SIZES["small"], "grad_A", "grad_B")),
    ),
    diagnose=_diagnose_gradients,
    hints=(
        "Take one sample first. Write z = A x and h = s B z, and remember that a gradient has the shape of its tensor.",
        "For one sample grad_B is the outer product s g (A x)ᵀ and grad_A is s (Bᵀ g) xᵀ. Over samples they add up, which a matrix product does.",
        "s = alpha / r; return s * B.T @ g.T @ x, s * g.T @ (x @ A.T)",
    ),
    read="the chain rule for y = s B A x, and the figure that follows this exercise",
    fallback=lambda: _lab_gradients,
)


def _lab_gradients(x, g, A, B, alpha, r):
    """By autograd, through the lab's own forward pass."""
    A, B = A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()
    y = _lab_forward(x, torch.zeros(B.shape[0], A.shape[1], dtype=A.dtype), None, A, B, alpha, r)
    return torch.autograd.grad((y * g).sum(), (A, B))


# ---------------------------------------------------------------- 2.4 the layer


def _layer(rng, sizes: dict, bias=True):
    """Script, the refs of base and layer, drawn arrays. float32, as nn.Linear makes its layers."""
    arrays = _draw(rng, sizes, bias=bias, dtype=np.float32)
    s = Script()
    refs = {name: s.input(name, array, may_change=name in ("W", "b")) for name, array in arrays.items()}
    base = s.linear(refs["W"], refs.get("b"))
    layer = s.call(base, r=sizes["r"], alpha=sizes["alpha"])
    return s, refs, base, layer


def _fill(s, layer, refs):
    s.set(layer, "lora_A", refs["A"])
    s.set(layer, "lora_B", refs["B"])


def _layer_start_probe(rng):
    s, refs, _, layer = _layer(rng, SIZES["small"])
    s.send("W at start", s.get(layer, "base_layer.weight"))
    s.send("parameters", s.parameters(layer))
    s.send("A", s.get(layer, "lora_A"))
    s.send("B", s.get(layer, "lora_B"))
    s.send("y", s.call(refs["x"], target=layer))
    target = rng.normal(size=(SIZES["small"]["n"], SIZES["small"]["d_out"])).astype(np.float32)
    with s.attempt("training"):
        s.train(layer, refs["x"], target, steps=2, lr=0.005)
    s.send("B trained", s.get(layer, "lora_B"))
    return s


def _layer_start_judge(inputs, answers):
    sizes = SIZES["small"]
    for name, shape in (("A", (sizes["r"], sizes["d_in"])), ("B", (sizes["d_out"], sizes["r"]))):
        found = answers[name]
        if not isinstance(found, np.ndarray) or found.shape != shape:
            return f"lora_{name} should have shape {shape}, found {getattr(found, 'shape', type(found).__name__)}"
    if answers["B"].any() or not answers["A"].any():
        return "lora_B should start at zero and lora_A should not; found " + ", ".join(
            f"lora_{name} {'not zero' if answers[name].any() else 'zero'}" for name in "AB"
        )
    base = np.einsum("...i,oi->...o", inputs["x"], inputs["W"]) + inputs["b"]
    # float32: a sum of 7 products of numbers near 1 is off by about 1e-6; a wrong start by 1e-1 and more.
    return compare(answers["y"], base, what="the new layer's output", rtol=1e-5)


def _layer_learns_judge(inputs, answers):
    if answers["training"] is not None:
        return f"two training steps of a new layer end in {answers['training']}: {answers['training.message']}"
    return "after two training steps lora_B is still zero" if not answers["B trained"].any() else None


def _layer_forward_probe(rng):
    s, refs, _, layer = _layer(rng, SIZES["small"])
    _fill(s, layer, refs)
    x = s.input("x again", s.inputs["x"], requires_grad=True)
    y = s.call(x, target=layer)
    s.send("y", y)
    s.send("W after forward", s.get(layer, "base_layer.weight"))
    s.backward(y, s.input("g", rng.normal(size=(SIZES["small"]["n"], SIZES["small"]["d_out"])).astype(np.float32)))
    s.send("grad_x", s.grad(x))
    s.method(layer, "eval")
    s.send("y in eval mode", s.call(refs["x"], target=layer))
    return s


def _layer_modes_judge(inputs, answers):
    """What a model needs of a layer: the same function in both modes, gradients for the layers before it, a weight left alone."""
    problem = compare(answers["y in eval mode"], answers["y"], what="the output in eval mode", rtol=1e-5)  # float32 rounding
    if problem:
        return problem
    if not np.array_equal(answers["W after forward"], inputs["W"]):
        return "forward changes base_layer.weight"
    if answers["grad_x"] is None:
        return "no gradient reaches x, so layers before this one would never train"
    W = inputs["W"] + (SIZES["small"]["alpha"] / SIZES["small"]["r"]) * inputs["B"].astype(np.float64) @ inputs["A"]
    return compare(answers["grad_x"], inputs["g"] @ W, what="the gradient of x", rtol=1e-5)  # float32 rounding


def _layer_other_probe(bias: bool):
    def probe(rng):
        s, refs, _, layer = _layer(rng, SIZES["other"], bias=bias)
        _fill(s, layer, refs)
        s.send("y", s.call(refs["x"], target=layer))
        return s

    return probe


def _layer_forward_judge(sizes):
    # float32 against a float64 oracle: rounding 1e-6, a mistake in the scaling changes the output by a third and more.
    return lambda inputs, answers: compare(
        answers["y"], lora_output(inputs, sizes["alpha"], sizes["r"]), what="the layer's output", rtol=1e-5
    )


def _layer_train_probe(rng):
    """Train 5 steps and read the function before and after: what moved shows in the numbers, whatever the layer says of itself."""
    s, refs, _, layer = _layer(rng, SIZES["small"])
    _fill(s, layer, refs)
    target = rng.normal(size=(SIZES["small"]["n"], SIZES["small"]["d_out"])).astype(np.float32)
    s.train(layer, refs["x"], target, steps=5, lr=0.005)
    s.send("parameters", s.parameters(layer))
    s.send("A after", s.get(layer, "lora_A"))
    s.send("B after", s.get(layer, "lora_B"))
    s.send("W after", s.get(layer, "base_layer.weight"))
    s.send("b after", s.get(layer, "base_layer.bias"))
    s.send("y after", s.call(refs["x"], target=layer))
    return s


def _layer_train_judge(inputs, answers):
    for name in ("A", "B"):
        if not np.isfinite(answers[f"{name} after"]).all():
            return f"lora_{name} is no longer finite after 5 small training steps: the update is far too large"
        if np.array_equal(answers[f"{name} after"], inputs[name]):
            return f"lora_{name} did not move in 5 training steps"
    for name, what in (("W", "base_layer.weight"), ("b", "base_layer.bias")):
        if not np.array_equal(answers[f"{name} after"], inputs[name]):
            return f"{what} moved in 5 training steps; the base is to stay frozen"
    after = {**inputs, "A": answers["A after"], "B": answers["B after"]}
    # The same bound as for the forward pass: float32 rounding.
    return compare(
        answers["y after"], lora_output(after, SIZES["small"]["alpha"], SIZES["small"]["r"]), what="the output after training", rtol=1e-5
    )


def _layer_count_judge(inputs, answers):
    sizes = SIZES["small"]
    trainable = sum(math.prod(p["shape"]) for p in answers["parameters"] if p["requires_grad"])
    expected = sizes["r"] * (sizes["d_in"] + sizes["d_out"])
    if trainable == expected:
        return None
    return f"{trainable} parameters require a gradient; r (d_in + d_out) = {expected} should"


def _diagnose_layer(evidence: list[Evidence]) -> Diagnosis | None:
    by_title = {e.title: e for e in evidence}
    start, forward = evidence[0], evidence[1]
    other, trained = by_title["also for another r, alpha and shape"], by_title["training moves A and B and nothing else"]
    parameters = start.answers.get("parameters")
    A, B, y = (start.answers.get(name) for name in ("A", "B", "y"))
    if isinstance(parameters, list):
        names = [p["name"] for p in parameters]
        modules = [name for name in ("lora_A", "lora_B") if f"{name}.weight" in names]
        if modules:
            return Diagnosis(
                "factors_are_modules",
                f"{' and '.join(modules)} {'are modules' if len(modules) > 1 else 'is a module'} (nn.Linear, as in peft); here each is an "
                "nn.Parameter, lora_A of shape (r, d_in), lora_B of shape (d_out, r)",
            )
        if not any("lora" in name for name in names) and A is not None:
            return Diagnosis(
                "not_registered",
                "lora_A and lora_B are plain tensors: the module does not list them among its parameters, so no optimizer will find them. "
                "Wrap them in nn.Parameter",
            )
        shapes = (A.shape, B.shape) if isinstance(A, np.ndarray) and isinstance(B, np.ndarray) else None
        sizes = SIZES["small"]
        if shapes is not None and shapes != ((sizes["r"], sizes["d_in"]), (sizes["d_out"], sizes["r"])):
            if A.shape == (sizes["d_in"], sizes["r"]) or B.shape == (sizes["r"], sizes["d_out"]):
                return Diagnosis("transposed", "a factor is transposed: lora_A is (r, d_in), lora_B is (d_out, r)")
            return None  # with wrong shapes everything else follows from them
        extra = [p["name"] for p in parameters if p["requires_grad"] and not p["name"].startswith("base_layer.")]
        extra = [name for name in extra if name not in ("lora_A", "lora_B")]
        if extra:
            return Diagnosis("extra_parameters", f"besides lora_A and lora_B these train: {', '.join(extra)}. The adapter is A and B alone")
        by_role = {p["name"]: p["requires_grad"] for p in parameters if p["name"].startswith("base_layer.") or "lora_" in p["name"]}
        weight = any(grad for name, grad in by_role.items() if name.endswith("weight"))
        bias = any(grad for name, grad in by_role.items() if name.endswith("bias"))
        factors = [grad for name, grad in by_role.items() if "lora_" in name]
        if not all(factors):
            return Diagnosis("factors_frozen", "lora_A or lora_B is frozen, too: freeze the base before you make them, or only base.parameters()")
        if weight and bias:
            return Diagnosis("base_trainable", "the whole base is still trainable: this is full fine-tuning with an adapter on top")
        if bias:
            return Diagnosis("bias_trainable", "the base weight is frozen but its bias is not: freeze every parameter of the base")
        if weight:
            return Diagnosis("weight_trainable", "the bias is frozen, but the weight, the large part, is not")
    if isinstance(A, np.ndarray) and isinstance(B, np.ndarray):
        if B.any() and not A.any():
            return Diagnosis("zero_A", "lora_A starts at zero and lora_B does not: start them as in exercise 2.2, the other way round")
        if A.any() and B.any():
            return Diagnosis("both_random", "both factors start random: B must start at zero, so that the new layer begins as the old one")
        if not A.any() and not B.any():
            return Diagnosis("both_zero", "both factors start at zero: neither will ever get a gradient")
    found = explain_forward(
        [(forward.answers.get("y"), forward.inputs, SIZES["small"]), (other.answers.get("y"), other.inputs, SIZES["other"])],
        rtol=1e-5,  # float32 rounding is 1e-6
    )
    if isinstance(start.answers.get("W at start"), np.ndarray) and not np.array_equal(start.answers["W at start"], start.inputs["W"]):
        return Diagnosis("new_base", "base_layer is not the layer that was given: a new nn.Linear has its own random weight. Keep `base` itself")
    written = forward.answers.get("W after forward")
    if isinstance(written, np.ndarray) and not np.array_equal(written, forward.inputs["W"]):
        return Diagnosis("forward_writes", "forward changes base_layer.weight: each call would add the update once more. Compute, don't store")
    if found is not None:
        if found.key == "update_missing":
            return Diagnosis(found.key, found.text + ". If you multiply B and A in __init__, later changes of B have no effect: do it in forward")
        return found
    by_mode = by_title["same in eval mode, and gradients go through"]
    if by_mode.failure and forward.failure is None:
        if "eval mode" in by_mode.failure:
            return Diagnosis("training_only", "in eval mode the layer computes something else: the update belongs to both modes")
        if "gradient" in by_mode.failure:
            return Diagnosis("x_cut_off", "the output is right, but the gradient of x is not: the base path is computed under no_grad or detached. "
                             "Freezing the base's parameters is enough; gradients must still pass through it")
    if trained.failure and "did not move" in trained.failure:
        return Diagnosis("detached", "the numbers are right but no gradient reaches the factors: `.detach()`, `.data` or `no_grad` cuts the graph")
    return None


EXERCISE_4 = Exercise(
    id="2.4",
    title="The module",
    difficulty=2,
    minutes=7,
    points=4,
    name="MyLoRALinear",
    cases=(
        Case("a new layer computes what its base computes", _layer_start_probe, _layer_start_judge),
        Case("with B filled in: W0 x + b + (alpha/r) B A x", _layer_forward_probe, _layer_forward_judge(SIZES["small"])),
        Case("same in eval mode, and gradients go through", _layer_forward_probe, _layer_modes_judge),
        Case("also for another r, alpha and shape", _layer_other_probe(True), _layer_forward_judge(SIZES["other"])),
        Case("also without a bias", _layer_other_probe(False), _layer_forward_judge(SIZES["other"])),
        Case("a new layer can learn", _layer_start_probe, _layer_learns_judge),
        Case("r (d_in + d_out) parameters are trainable", _layer_start_probe, _layer_count_judge),
        Case("training moves A and B and nothing else", _layer_train_probe, _layer_train_judge),
    ),
    diagnose=_diagnose_layer,
    hints=(
        "Keep the layer you are given as self.base_layer, freeze it, and add two parameters. Which method freezes a whole module?",
        "self.base_layer = base.requires_grad_(False); self.lora_A = nn.Parameter(...) and self.lora_B = nn.Parameter(...), started as in 2.2.",
        "forward: return self.base_layer(x) + (self.alpha / self.r) * (x @ self.lora_A.T) @ self.lora_B.T",
    ),
    read="lora_lab/layers.py, class LoRALinear: 30 lines, after you have your own",
    fallback=lambda: PlainLoRALinear,
)


class PlainLoRALinear(nn.Module):
    """What exercise 2.4 asks for and no more: exercise 2.5 adds merging to it, so it must not have any."""

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.r, self.alpha = r, alpha
        A, B = _lab_init(base.in_features, base.out_features, r)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x):
        return _lab_forward(x, self.base_layer.weight, self.base_layer.bias, self.lora_A, self.lora_B, self.alpha, self.r)


# ---------------------------------------------------------------- 2.5 merging


def _merge_probe(rng):
    s, refs, _, layer = _layer(rng, SIZES["small"])
    _fill(s, layer, refs)
    s.method(layer, "eval")  # merged layers are for serving; lora_lab's refuses to be trained while merged
    s.send("y before", s.call(refs["x"], target=layer))
    s.send("W before", s.get(layer, "base_layer.weight"))
    s.method(layer, "merge")
    s.send("W merged", s.get(layer, "base_layer.weight"))
    s.send("y merged", s.call(refs["x"], target=layer))
    s.method(layer, "merge")
    s.send("W merged twice", s.get(layer, "base_layer.weight"))
    s.method(layer, "unmerge")
    s.send("W back", s.get(layer, "base_layer.weight"))
    s.send("y back", s.call(refs["x"], target=layer))
    s.send("A back", s.get(layer, "lora_A"))
    s.send("B back", s.get(layer, "lora_B"))
    s.method(layer, "unmerge")
    s.send("W back twice", s.get(layer, "base_layer.weight"))
    return s


def _merge_model_probe(rng):
    """Two layers of one model, merged and unmerged in turn; and what trains afterwards."""
    s, refs, _, first = _layer(rng, SIZES["small"])
    _fill(s, first, refs)
    other = s.input("W other", rng.normal(size=(SIZES["small"]["d_out"], SIZES["small"]["d_in"])).astype(np.float32))
    second = s.call(s.linear(other), r=SIZES["small"]["r"], alpha=SIZES["small"]["alpha"])
    _fill(s, second, refs)
    for layer in (first, second):
        s.method(layer, "eval")
        s.method(layer, "merge")
    s.send("W second merged", s.get(second, "base_layer.weight"))
    s.send("parameters merged", s.parameters(first))
    for layer in (first, second):
        s.method(layer, "unmerge")
    s.send("W first", s.get(first, "base_layer.weight"))
    s.send("W second", s.get(second, "base_layer.weight"))
    s.send("parameters", s.parameters(first))
    s.backward(s.call(refs["x"], target=first), rng.normal(size=(SIZES["small"]["n"], SIZES["small"]["d_out"])).astype(np.float32))
    s.send("grad_A", s.grad(first, "lora_A"))
    return s


def _merge_model_judge(inputs, answers):
    problem = compare(
        answers["W second merged"],
        _merged_weight({**inputs, "W": inputs["W other"]}),
        what="with two layers merged, the weight of the second",
        rtol=1e-6,  # one float32 rounding
    )
    if problem:
        return problem
    for name, given in (("W first", "W"), ("W second", "W other")):
        problem = compare(answers[name], inputs[given], what=f"with two layers merged and unmerged, the weight of the {name[2:]}", rtol=0)
        if problem:
            return problem
    expected = SIZES["small"]["r"] * (SIZES["small"]["d_in"] + SIZES["small"]["d_out"])
    for name, when in (("parameters merged", "merge()"), ("parameters", "unmerge()")):
        trainable = sum(math.prod(p["shape"]) for p in answers[name] if p["requires_grad"])
        # A merged layer may switch its factors off; nothing else may start to train.
        if trainable != expected and not (name == "parameters merged" and trainable == 0):
            return f"after {when} {trainable} parameters are trainable; r (d_in + d_out) = {expected} should be"
    return "after unmerge() no gradient reaches lora_A" if answers["grad_A"] is None else None


def _merged_weight(inputs) -> np.ndarray:
    sizes = SIZES["small"]
    return inputs["W"] + (sizes["alpha"] / sizes["r"]) * np.einsum("or,ri->oi", inputs["B"], inputs["A"], dtype=np.float64)


def _merge_weight_judge(inputs, answers):
    return compare(answers["W merged"], _merged_weight(inputs), what="base_layer.weight after merge()", rtol=1e-6)  # one float32 rounding


def _merge_function_judge(inputs, answers):
    # Merged and unmerged add the same products in another order: float32 rounding, 1e-6.
    return compare(answers["y merged"], answers["y before"], what="the output after merge()", rtol=1e-5)


def _merge_twice_judge(inputs, answers):
    return compare(answers["W merged twice"], answers["W merged"], what="base_layer.weight after a second merge()", rtol=0)


def _unmerge_judge(inputs, answers):
    for name, what in (("W back", "unmerge()"), ("W back twice", "a second unmerge()")):
        problem = compare(answers[name], inputs["W"], what=f"base_layer.weight after {what}", rtol=1e-5)
        if problem:
            return problem
        if not np.array_equal(answers[name], inputs["W"]):
            differing = int((answers[name] != inputs["W"]).sum())
            return f"after {what}, {differing} of {inputs['W'].size} entries of base_layer.weight are not the ones before, bit for bit"
    for name in "AB":
        if compare(answers[f"{name} back"], inputs[name], rtol=0):
            return f"lora_{name} is not what it was before merge()"
    return compare(answers["y back"], answers["y before"], what="the output after unmerge()", rtol=0)


def _diagnose_merge(evidence: list[Evidence]) -> Diagnosis | None:
    inputs, answers = evidence[0].inputs, evidence[0].answers
    weights = {name: answers.get(name) for name in ("W merged", "W merged twice", "W back", "W back twice")}
    if any(not isinstance(w, np.ndarray) or w.shape != inputs["W"].shape for w in weights.values()):
        if answers.error is not None and "merge" in answers.error.message and "attribute" in answers.error.message:
            return Diagnosis("no_method", "the class has no such method: write both merge(self) and unmerge(self)")
        if answers.error is not None and answers.error.type == "KeyError" and "already exists" in answers.error.message:
            return Diagnosis("registered_twice", "an attribute of this name is there already; assign to it, self.original = ..., a plain tensor")
        return None
    sizes = SIZES["small"]
    product = np.einsum("or,ri->oi", inputs["B"], inputs["A"], dtype=np.float64)
    start, end = inputs["W"], _merged_weight(inputs)

    def close(a, b):
        return compare(a, b, rtol=1e-5) is None  # float32 rounding, as above

    if isinstance(answers.get("y before"), np.ndarray):
        if close(answers["y before"], np.einsum("ni,oi->no", inputs["x"], start) + inputs["b"]):
            return Diagnosis("update_missing", "before merge() the output is the base's alone: forward skips the update although nothing is merged")
        if isinstance(answers.get("W before"), np.ndarray) and not np.array_equal(answers["W before"], start):
            return Diagnosis("forward_merges", "calling forward has changed the weight already: merging happens in merge() alone")
    if not close(weights["W merged"], end):
        if close(weights["W merged"], start):
            return Diagnosis("no_merge", "merge() leaves the weight as it was")
        if close(weights["W merged"], end - start):
            return Diagnosis("replaced", "merge() replaces the weight by the update: the pretrained W0 is gone. Add to it")
        if close(weights["W merged"], 2 * start - end):
            return Diagnosis("subtracted", "merge() subtracts the update")
        for key, scale in SCALINGS.items():
            if key != "alpha / r" and close(weights["W merged"], start + scale(sizes) * product):
                return Diagnosis("scaling", f"merge() adds {scaling_name(key)}B A; forward adds (alpha / r) B A, so the function changes")
        return None
    if close(weights["W merged twice"], start):
        return Diagnosis("toggles", "a second merge() undoes the first; it should do nothing")
    if not close(weights["W merged twice"], end):
        return Diagnosis("twice", "a second merge() adds the update again: remember in an attribute that the layer is merged")
    if close(answers["y merged"] - answers["y before"], np.einsum("ni,oi->no", inputs["x"], end - start)):
        return Diagnosis("counted_twice", "after merge() the output holds the update twice: once in the weight, once from forward")
    back = weights["W back"]
    if not np.array_equal(back, inputs["W"]):
        if close(back, start):
            return Diagnosis(
                "subtraction",
                "unmerge() subtracts the update: close, but (W0 + ΔW) - ΔW rounds twice, and after a thousand merges the base has drifted. "
                "Keep a copy of W0 in merge() and put it back",
            )
        if close(back, end):
            return Diagnosis(
                "no_unmerge", "unmerge() leaves the merged weight in place. If you kept W0: is it a copy, or the same memory? `.clone()` copies"
            )
        return None
    for name in "AB":
        if isinstance(answers.get(f"{name} back"), np.ndarray) and compare(answers[f"{name} back"], inputs[name], rtol=0):
            return Diagnosis("factor_lost", f"lora_{name} has other values after merge() and unmerge(): leave the factors alone, only the weight changes")
    if not np.array_equal(weights["W back twice"], inputs["W"]):
        return Diagnosis("unmerge_twice", "a second unmerge() takes the update off again: do nothing when the layer is not merged")
    if answers.get("y back") is not None and not close(answers["y back"], answers["y before"]):
        return Diagnosis("stays_off", "after unmerge() the update is missing from the output: forward still believes that the layer is merged")
    model = evidence[-1]
    if model.failure and "two layers" in model.failure:
        return Diagnosis("shared_state", "one layer is right, two disturb each other: what merge() keeps belongs to self, not to the class")
    if model.failure and "trainable" in model.failure:
        return Diagnosis("thawed", "merging changes what trains: a new nn.Parameter requires a gradient. Change the numbers of the old one, in place")
    return None


EXERCISE_5 = Exercise(
    id="2.5",
    title="Merge and unmerge",
    difficulty=3,
    minutes=6,
    points=4,
    name="MergeableLoRA",
    cases=(
        Case("merge() writes W0 + (alpha/r) B A into the weight", _merge_probe, _merge_weight_judge),
        Case("merge() does not change the function", _merge_probe, _merge_function_judge),
        Case("merging twice changes nothing more", _merge_probe, _merge_twice_judge),
        Case("unmerge() brings W0 back, bit for bit", _merge_probe, _unmerge_judge),
        Case("layers don't disturb each other, and only A and B train", _merge_model_probe, _merge_model_judge),
    ),
    diagnose=_diagnose_merge,
    hints=(
        "What must forward know that it did not need to know before? And what must merge() keep, so that unmerge() need not calculate?",
        "merge: if already merged, return; keep self.original = self.base_layer.weight.clone(); then add the update in place, "
        "self.base_layer.weight += ... forward: super().forward(x) while not merged, self.base_layer(x) while merged.",
        "unmerge: if self.original is not None: self.base_layer.weight.copy_(self.original); self.original = None",
    ),
    read="lora_lab/layers.py, methods merge and unmerge",
    fallback=lambda: LoRALinear,
)


# ---------------------------------------------------------------- 2.6 what rounding swallows


_SWALLOWED_DTYPES = (torch.bfloat16, torch.float16, torch.bfloat16)


def _swallowed_probe(rng):
    s = Script()
    for k, (dtype, relative) in enumerate(zip(_SWALLOWED_DTYPES, (0.005, 0.02, 1.0), strict=True)):
        W = torch.from_numpy(rng.normal(size=(40, 30)).astype(np.float32)).to(dtype).float()  # already representable in dtype
        delta = torch.from_numpy(rng.normal(size=(40, 30)).astype(np.float32))
        delta *= relative * W.norm() / delta.norm()
        s.send(f"share {k}", s.call(s.input(f"W {k}", W), s.input(f"delta {k}", delta), dtype))
    return s


def _round(array: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(dtype).double().numpy()




def swallowed_share(W: np.ndarray, delta: np.ndarray, dtype: torch.dtype) -> float:
    arrived = _round(W + delta, dtype) - W
    return float(np.linalg.norm(arrived - delta) / np.linalg.norm(delta))


def _swallowed_judge(*cases: int):
    def judge(inputs, answers):
        for k in cases:
            expected = swallowed_share(inputs[f"W {k}"], inputs[f"delta {k}"], _SWALLOWED_DTYPES[k])
            # float32 norms of 1,200 numbers agree to 1e-6, but rounding errors near a tie may fall either way for a few of them: 0.5 %.
            problem = compare(answers[f"share {k}"], expected, what="the share", rtol=0.005)
            if problem:
                return problem
        return None

    return judge


def _diagnose_swallowed(evidence: list[Evidence]) -> Diagnosis | None:
    inputs, answers = evidence[0].inputs, evidence[0].answers
    found, candidates = [answers.get(f"share {k}") for k in range(3)], {}

    def all_cases(function):
        return [function(inputs[f"W {k}"], inputs[f"delta {k}"], dtype) for k, dtype in enumerate(_SWALLOWED_DTYPES)]

    norm = np.linalg.norm
    candidates = {
        "kept": lambda W, d, t: 1 - swallowed_share(W, d, t),
        "arrived": lambda W, d, t: norm(_round(W + d, t) - W) / norm(d),
        "percent": lambda W, d, t: 100 * swallowed_share(W, d, t),
        "squared": lambda W, d, t: swallowed_share(W, d, t) ** 2,
        "not_divided": lambda W, d, t: norm(_round(W + d, t) - W - d),
        "relative_to_W": lambda W, d, t: norm(_round(W + d, t) - W - d) / norm(W),
        "rounded_delta": lambda W, d, t: norm(_round(d, t) - d) / norm(d),
        "norm_ratio": lambda W, d, t: 1 - norm(_round(W + d, t) - W) / norm(d),
        "norm_difference": lambda W, d, t: abs(norm(_round(W + d, t) - W) - norm(d)) / norm(d),
        "upside_down": lambda W, d, t: norm(d) / norm(_round(W + d, t) - W - d),
        "sum_of_absolutes": lambda W, d, t: np.abs(_round(W + d, t) - W - d).sum() / np.abs(d).sum(),
        "rounded_first": lambda W, d, t: norm(_round(W + _round(d, t), t) - W - d) / norm(d),
        "subtracted_rounded": lambda W, d, t: norm(_round(_round(W + d, t) - W, t) - d) / norm(d),
        "always_bfloat16": lambda W, d, t: swallowed_share(W, d, torch.bfloat16),
        "base_left_in": lambda W, d, t: norm(_round(W + d, t) - d) / norm(d),
    }
    texts = {
        "kept": "this is the share that was kept; asked is the share that was lost",
        "arrived": "this is the size of what arrived, not of what is missing: subtract ΔW before you take the norm",
        "percent": "this is in percent; asked is a share, between 0 and 1 when little is lost",
        "squared": "this is the square of the share: take the square root, or use torch.linalg.vector_norm",
        "not_divided": "this is the absolute loss; divide by the norm of ΔW",
        "relative_to_W": "this is relative to ‖W‖; asked is how much of ΔW is lost",
        "rounded_delta": "you round ΔW by itself. In merging, the sum W + ΔW is rounded, on the coarser grid of W's numbers",
        "norm_ratio": "this compares two lengths; a wrong direction does not show in them. Take the norm of the difference",
        "norm_difference": "this compares two lengths; a wrong direction does not show in them. Take the norm of the difference",
        "upside_down": "the fraction is upside down",
        "sum_of_absolutes": "this adds up absolute values; ‖·‖ is the root of the sum of squares, torch.linalg.vector_norm",
        "rounded_first": "ΔW is rounded before it is added and the sum once more; add in float32 and round once",
        "subtracted_rounded": "W is subtracted in the coarse dtype, which rounds again; go back to float32 with .float() first",
        "always_bfloat16": "the dtype that was asked for is ignored: you always round to bfloat16",
        "base_left_in": "W is still in the difference: what arrived is (W + ΔW rounded) - W",
        "nothing_lost": "no loss at all: the sum was never rounded to the dtype, or both sides were rounded alike",
    }
    if any(not isinstance(value, (int, float, np.ndarray)) for value in found):
        return None
    # The tolerance of the judge; candidates lie further apart in at least one of the three cases.
    key = first_match(found, {key: all_cases(function) for key, function in candidates.items()}, rtol=0.005, atol=1e-5)
    if key is None and all(0 <= value < 1e-4 for value in found):
        key = "nothing_lost"
    return Diagnosis(key, texts[key]) if key else None


EXERCISE_6 = Exercise(
    id="2.6",
    title="How much is lost?",
    difficulty=2,
    minutes=3,
    points=2,
    name="swallowed",
    cases=(
        Case("a small update in bfloat16", _swallowed_probe, _swallowed_judge(0)),
        Case("float16, and a larger update", _swallowed_probe, _swallowed_judge(1, 2)),
    ),
    diagnose=_diagnose_swallowed,
    hints=(
        "Three matrices: the update you wanted, the weight before, the weight after rounding. What arrived is after minus before.",
        "merged = (W + delta).to(dtype); go back with .float() before you subtract, or you round again.",
        "arrived = (W + delta).to(dtype).float() - W; return ((arrived - delta).norm() / delta.norm()).item()",
    ),
    read="the figure below this exercise",
    fallback=lambda: _lab_swallowed,
)


def _lab_swallowed(W, delta, dtype):
    merged = (W.float() + delta.float()).to(dtype)
    return (torch.linalg.vector_norm(merged.float() - W.float() - delta) / torch.linalg.vector_norm(delta)).item()


LAB = Lab(
    number="2",
    name="02_lora_layer",
    title="A LoRA layer from scratch",
    minutes=50,
    core=True,
    objectives=(
        "write the forward pass of a LoRA layer, with its shapes and its scaling",
        "say why one factor starts at zero, and which of the two learns first",
        "freeze what must be frozen and count what trains",
        "merge an update into the weight, take it out again, and say what rounding costs",
    ),
    needs=("matrix products and PyTorch modules", "lab 00"),
    exercises=(EXERCISE_1, EXERCISE_2, EXERCISE_3, EXERCISE_4, EXERCISE_5, EXERCISE_6),
    predictions=(
        Prediction(
            "2.A",
            "A and B both start at zero. What does the loss do in 400 steps?",
            {"a": "it falls, only more slowly", "b": "it stays where it is", "c": "it becomes NaN"},
        ),
        Prediction(
            "2.B",
            "nn.Linear(64, 10) with a LoRA adapter of rank 4, only the base weight frozen. How many parameters train?",
            unit="parameters",
            tolerance=0.0,
        ),
        Prediction(
            "2.C",
            "An update of 0.5 % of the weight's norm is merged in bfloat16. How much of it is lost?",
            {"a": "less than 1 %", "b": "about 5 %", "c": "about a third", "d": "all of it"},
        ),
    ),
)
