"""Lab 09, LoRA and its rivals: its exercises.

Sources: Houlsby et al. 2019 (arXiv 1902.00751), Hu et al. 2021 (arXiv 2106.09685), section 5.1, Dettmers et al. 2023 (arXiv 2305.14314), section 2, Hinton
et al. 2015 (arXiv 1503.02531). Oracles are numpy's; counts are counted on arrays that are made.
"""

from __future__ import annotations

import numpy as np
import torch

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script
from .formulas import agrees, slips


def _not_transposed(evidence: list[Evidence]) -> Diagnosis | None:
    error = evidence[0].error
    if error is not None and "cannot be multiplied" in error.message and ".T" not in getattr(error.where, "text", ".T"):
        return Diagnosis("not_transposed", "the shapes do not meet: samples stand in rows, so a matrix M of shape (out, in) acts as h @ M.T")
    return None


# ---------------------------------------------------------------- 9.1 a bottleneck adapter

ADAPTER = {"small": (6, 7, 3), "other": (4, 9, 5)}  # samples, d, width


def _adapter_probe(size: str, tokens: int | None = None, start=False):
    def probe(rng):
        n, d, width = ADAPTER[size]
        s = Script()
        arrays = {
            "h": rng.normal(size=(n, d) if tokens is None else (n, tokens, d)), "down": rng.normal(size=(width, d)), "b_down": rng.normal(size=width),
            "up": rng.normal(size=(d, width)), "b_up": rng.normal(size=d),
        }  # fmt: skip
        if start:
            arrays |= {"up": np.zeros((d, width)), "b_up": np.zeros(d)}
        s.send("y", s.call(*(s.input(name, array) for name, array in arrays.items())))
        return s

    return probe


def _adapter_gradient_probe(rng):
    n, d, width = ADAPTER["small"]
    s = Script()
    arrays = {"h": (n, d), "down": (width, d), "b_down": (width,), "up": (d, width), "b_up": (d,)}
    refs = {name: s.input(name, rng.normal(size=shape), requires_grad=True) for name, shape in arrays.items()}
    s.backward(s.call(*refs.values()), s.input("g", rng.normal(size=(n, d))))
    for name, ref in refs.items():
        s.send(f"gradient of {name}", s.grad(ref))
    return s


def _adapter_gradient_judge(inputs, answers):
    h, g = inputs["h"], inputs["g"]
    z = h @ inputs["down"].T + inputs["b_down"]
    behind = (g @ inputs["up"]) * (z > 0)
    expected = {"h": g + behind @ inputs["down"], "down": behind.T @ h, "b_down": behind.sum(0), "up": g.T @ _relu(z), "b_up": g.sum(0)}
    for name, gradient in expected.items():
        if answers[f"gradient of {name}"] is None:
            return f"no gradient reaches {name}: `.detach()`, `.data` or `torch.no_grad()` cuts the graph"
        problem = compare(answers[f"gradient of {name}"], gradient, what=f"the gradient of {name}")
        if problem:
            return problem
    return None


def _relu(z):
    return np.maximum(z, 0)


def _adapter(inputs, chosen=(1.0, "between", 1.0, 1.0)):
    """The oracle, and with other choices what mistakes give."""
    residual, where, b_down, b_up = chosen
    h = inputs["h"]
    z = np.einsum("...i,oi->...o", h, inputs["down"])
    if where == "before the bias":
        z = _relu(z) + b_down * inputs["b_down"]
    else:
        z = z + b_down * inputs["b_down"]
        z = {"between": _relu, "twice": _relu, "tanh": np.tanh, "gelu": _gelu, "sigmoid": lambda v: 1 / (1 + np.exp(-v))}.get(where, lambda v: v)(z)
    update = np.einsum("...i,oi->...o", z, inputs["up"]) + b_up * inputs["b_up"]
    if where in ("last", "twice"):
        update = _relu(update)
    y = residual * h + update
    return _relu(y) if where == "on the sum" else y


def _gelu(z):
    return torch.nn.functional.gelu(torch.from_numpy(z)).numpy()


_ADAPTER_SLIPS = [
    {"": ("", 1.0), "residual_missing": ("h itself is missing: the adapter is a detour beside the identity, h + ...", 0.0),
     "residual_twice": ("h enters twice; once is the identity", 2.0)},
    {"": ("", "between"),
     "linear": ("there is no ReLU between the two matrices, so they are one matrix of low rank: that would be LoRA's form, and could be merged", "none"),
     "activation_last": ("the ReLU stands behind `up`; it belongs between the two matrices, where the bottleneck is", "last"),
     "activation_on_sum": ("the ReLU cuts the whole sum, h too; it belongs between the two matrices", "on the sum"),
     "activation_twice": ("there is a second ReLU, behind `up`; only the one between the matrices is asked for", "twice"),
     "bias_after_activation": ("b_down is added behind the ReLU; it belongs into it: relu(h @ down.T + b_down)", "before the bias"),
     "gelu": ("that is a GELU; asked is a ReLU here", "gelu"), "tanh": ("that is tanh; asked is a ReLU here", "tanh"),
     "sigmoid": ("that is a sigmoid; asked is a ReLU here", "sigmoid")},
    {"": ("", 1.0), "down_bias_missing": ("b_down is missing", 0.0)},
    {"": ("", 1.0), "up_bias_missing": ("b_up is missing", 0.0)},
]  # fmt: skip


def _diagnose_adapter(evidence: list[Evidence]) -> Diagnosis | None:
    if all(e.failure is None for e in evidence[:4]) and evidence[4].failure:
        return Diagnosis("detached", "the numbers are right, but the graph is cut on the way, so the adapter would never train")
    return _not_transposed(evidence) or slips([(e.inputs, [e.answers.get("y")]) for e in evidence[:2]], lambda i, c: [_adapter(i, c)], _ADAPTER_SLIPS)


def _lab_adapter(h, down, b_down, up, b_up):
    return h + torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(h, down, b_down)), up, b_up)


EXERCISE_1 = Exercise(
    id="9.1",
    title="A bottleneck adapter",
    difficulty=1,
    minutes=4,
    points=2,
    name="adapter_forward",
    cases=(
        Case("equals h + up relu(down h + b_down) + b_up", _adapter_probe("small"), lambda i, a: compare(a["y"], _adapter(i), what="adapter_forward(…)")),
        Case("also for another d and width", _adapter_probe("other"), lambda i, a: compare(a["y"], _adapter(i), what="adapter_forward(…)")),
        Case("with up = 0 it is the identity", _adapter_probe("small", start=True), lambda i, a: compare(a["y"], i["h"], what="adapter_forward(…)")),
        Case("works on (batch, tokens, d)", _adapter_probe("small", tokens=2), lambda i, a: compare(a["y"], _adapter(i), what="adapter_forward(…)")),
        Case("gradients reach all that trains, and h", _adapter_gradient_probe, _adapter_gradient_judge),
    ),
    diagnose=_diagnose_adapter,
    hints=(
        "Two paths start at h and meet at the end: h itself, and a detour through `width` numbers.",
        "The detour: h @ down.T + b_down, a ReLU, then @ up.T + b_up. Then add h.",
        "z = torch.relu(h @ down.T + b_down); return h + z @ up.T + b_up",
    ),
    read="Houlsby et al. 2019, figure 2",
    fallback=lambda: _lab_adapter,
)


# ---------------------------------------------------------------- 9.2 how many numbers

METHODS = ("lora", "adapters", "prompt", "prefix", "bitfit")


def _count_probe(method: str):
    def probe(rng):
        s = Script()
        for k in range(2):
            d, blocks, size = (int(n) for n in (rng.integers(40, 60), rng.integers(5, 9), rng.integers(10, 15) + k))
            s.input(f"sizes {k}", np.array([d, blocks, size]))
            s.send(f"count {k}", s.call(method, d, blocks, size))
        return s

    return probe


def numbers(method: str, d: int, blocks: int, size: int) -> int:
    """The oracle: makes the arrays that train, and counts their entries."""
    block = {
        "lora": [np.zeros(shape) for _ in "qv" for shape in ((size, d), (d, size))],
        "adapters": [np.zeros(shape) for _ in range(2) for shape in ((size, d), (size,), (d, size), (d,))],
        "prompt": [],
        "prefix": [np.zeros((size, d))],
        "bitfit": [np.zeros(n) for n in (3 * d, d, 4 * d, d, d, d)],
    }[method]
    once = {"prompt": [np.zeros((size, d))], "bitfit": [np.zeros(d)]}.get(method, [])
    return blocks * sum(a.size for a in block) + sum(a.size for a in once)


def _count_judge(method: str):
    def judge(inputs, answers):
        for k in range(2):
            d, blocks, size = (int(n) for n in inputs[f"sizes {k}"])
            problem = compare(answers[f"count {k}"], float(numbers(method, d, blocks, size)), atol=0.49, rtol=0.0,
                              what=f'trained_numbers("{method}", d={d}, blocks={blocks}, size={size})')  # fmt: skip
            if problem:
                return problem
        return None

    return judge


# method -> key -> (text, formula of d, L blocks, m size)
_MISCOUNTS = {
    "lora": {
        "lora_one_matrix": ("this is one matrix a block; q and v both have an A and a B", lambda d, L, m: L * 2 * m * d),
        "lora_three_matrices": ("this is q, k and v; only q and v are adapted", lambda d, L, m: L * 6 * m * d),
        "lora_full": ("d · d is the size of the frozen matrix; A is (r, d), B is (d, r)", lambda d, L, m: L * 2 * d * d),
        "lora_one_factor": ("A and B both train, for q and for v", lambda d, L, m: L * m * d),
        "lora_one_block": ("this is one block; every block has its own", lambda d, L, m: 4 * m * d),
    },
    "adapters": {
        "adapters_without_biases": ("both layers of an adapter have a bias: width and d more numbers", lambda d, L, m: L * 4 * d * m),
        "adapters_one_a_block": ("this is one adapter a block; there are two, behind attention and behind the MLP", lambda d, L, m: L * (2 * d * m + m + d)),
        "adapters_bias_of_up_missing": ("the second layer has a bias of d numbers", lambda d, L, m: 2 * L * (2 * d * m + m)),
        "adapters_bias_of_down_missing": ("the first layer has a bias of width numbers", lambda d, L, m: 2 * L * (2 * d * m + d)),
        "adapters_one_layer": ("an adapter has two layers, down and up", lambda d, L, m: 2 * L * (d * m + m)),
        "adapters_biases_swapped": ("a bias has one number for each output: width for `down`, d for `up`", lambda d, L, m: 2 * L * (2 * d * m + 2 * d)),
        "adapters_one_block": ("this is one block; every block has two adapters", lambda d, L, m: 2 * (2 * d * m + m + d)),
    },
    "prompt": {
        "prompt_in_every_block": ("a prompt stands once, in front of the embeddings; in front of every block it is a prefix", lambda d, L, m: L * m * d),
        "prompt_without_d": ("each trained token is a vector of d numbers", lambda d, L, m: m),
        "prompt_doubled": ("a trained token is one vector of d numbers; its key and value are computed by the frozen block", lambda d, L, m: 2 * m * d),
    },
    "prefix": {
        "prefix_once": ("a prefix stands in front of every block; once, in front of the embeddings, it is a prompt", lambda d, L, m: m * d),
        "prefix_keys_and_values": (
            "that is a trained key and value for each position (peft's prefix tuning); here a vector of d numbers is put in front of each block's "
            "input, and the frozen block makes its key and value", lambda d, L, m: 2 * L * m * d),
        "prefix_without_d": ("each trained token is a vector of d numbers", lambda d, L, m: L * m),
    },
    "bitfit": {
        "bitfit_last_norm_missing": ("the norm behind the last block has a bias, too", lambda d, L, m: 11 * L * d),
        "bitfit_norms_missing": ("norms have biases, too: two in a block and one behind the last", lambda d, L, m: 9 * L * d),
        "bitfit_block_norms_missing": ("the two norms of every block have biases, too", lambda d, L, m: 9 * L * d + d),
        "bitfit_d_each": ("a bias has one number for each output of its layer: 3 d for c_attn, 4 d for c_fc", lambda d, L, m: 6 * L * d + d),
        "bitfit_one_norm": ("a block has two norms", lambda d, L, m: 10 * L * d + d),
        "bitfit_norm_weights": ("BitFit trains biases; the norms' weights stay", lambda d, L, m: 13 * L * d + 2 * d),
        "bitfit_a_norm_in_every_block": ("the last norm stands once, behind all blocks", lambda d, L, m: 12 * L * d),
    },
}


def _number(value) -> float | None:
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iuf":
        value = value.item()
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value) else None


def _diagnose_count(evidence: list[Evidence]) -> Diagnosis | None:
    wrong = [(method, e) for method, e in zip(METHODS, evidence, strict=True) if e.failure]
    for method, e in wrong:
        found = [_number(e.answers.get(f"count {k}")) for k in range(2)]
        if None in found:
            return None
        sizes = [[int(n) for n in e.inputs[f"sizes {k}"]] for k in range(2)]
        keys = [key for key, (_, f) in _MISCOUNTS[method].items() if all(abs(f(*z) - n) < 0.49 for z, n in zip(sizes, found, strict=True))]
        if len(keys) == 1:
            return Diagnosis(keys[0], f"{method}: {_MISCOUNTS[method][keys[0]][0]}")
        return None
    return None


def _lab_numbers(method, d, blocks, size=0):
    return {
        "lora": blocks * 2 * 2 * size * d,
        "adapters": blocks * 2 * (2 * size * d + size + d),
        "prompt": size * d,
        "prefix": blocks * size * d,
        "bitfit": blocks * 11 * d + d,
    }[method]


EXERCISE_2 = Exercise(
    id="9.2",
    title="What each rival trains",
    difficulty=2,
    minutes=7,
    points=3,
    name="trained_numbers",
    cases=tuple(
        Case(title, _count_probe(method), _count_judge(method))
        for method, title in zip(
            METHODS, ("LoRA on q and v", "two adapters a block", "a prompt", "a prefix", "BitFit, norms included"), strict=True
        )
    ),
    diagnose=_diagnose_count,
    hints=(
        "For each method, write down the arrays that train in one block, with their shapes. Which of them stand only once?",
        "LoRA: A (size, d) and B (d, size), for q and v. Adapter: two layers with biases, twice a block. A prompt is there once, a prefix for each block. "
        "Biases of a block: 3 d + d + 4 d + d and two norms.",
        "lora: blocks * 4 * size * d; adapters: blocks * 2 * (2 * size * d + size + d); prompt: size * d; prefix: blocks * size * d; "
        "bitfit: blocks * 11 * d + d",
    ),
    read="Hu et al. 2021, section 5.1; the picture above",
    fallback=lambda: _lab_numbers,
)


# ---------------------------------------------------------------- 9.3 four bits


def _bits_probe(blocks: int, block: int, zeros=False):
    def probe(rng):
        s = Script()
        # Blocks of very different size, and a largest weight that is negative in one block and positive in the next.
        w = rng.normal(size=(blocks, block)) * np.logspace(-1, 1, blocks)[:, None]
        for k in range(blocks):
            w[k, k % block] = (-1) ** (k + 1) * 1.3 * np.abs(w[k]).max()
        if zeros:
            w[1] = 0
        result = s.call(s.input("w", w.ravel()), block)
        s.input("block", np.array(block))
        for k, name in enumerate(("codes", "scales", "restored")):
            s.send(name, s.get(result, str(k)))
        return s

    return probe


def _round(v):
    return np.rint(v)


def _bits(inputs, chosen=("block", 7.0, _round, "codes times scales")):
    """The oracle, and with other choices what mistakes give: codes, scales, restored."""
    which, levels, rounding, restore = chosen
    w, block = inputs["w"], int(inputs["block"])
    rows = w.reshape(block, -1).T if which == "strided" else w.reshape(-1, block)
    largest = {
        "one": lambda: np.full(len(rows), np.abs(w).max()), "signed": lambda: rows.max(1), "mean": lambda: np.abs(rows).mean(1),
        "range": lambda: rows.max(1) - rows.min(1), "deviation": lambda: rows.std(1, ddof=1),
    }.get(which, lambda: np.abs(rows).max(1))()  # fmt: skip
    clamped, levels = levels == "8 clamped", 8.0 if levels == "8 clamped" else levels
    scales = largest / levels
    safe = np.where(scales == 0, 1, scales)
    codes = rounding(rows / safe[:, None])
    if clamped:
        codes = codes.clip(-8, 7)
    restored = {"codes": codes, "w": rows, "divided": codes / safe[:, None], "largest": codes * largest[:, None]}.get(restore, codes * scales[:, None])
    if which == "strided":
        codes, restored = codes.T, restored.T
    return [codes.ravel(), scales, restored.ravel()]


def _asymmetric(inputs):
    rows = inputs["w"].reshape(-1, int(inputs["block"]))
    low = rows.min(1, keepdims=True)
    scales = (rows.max(1, keepdims=True) - low) / 15
    codes = np.rint((rows - low) / scales)
    return [codes.ravel(), scales.ravel(), (codes * scales + low).ravel()]


def _shaped(inputs, answers):
    """The three answers with codes and restored flattened, or a sentence about what has another size."""
    right = _bits(inputs)
    for name, expected in zip(("codes", "scales", "restored"), right, strict=True):
        found = answers.get(name)
        if not isinstance(found, np.ndarray) or found.size != expected.size:
            got = found.shape if isinstance(found, np.ndarray) else type(found).__name__
            return f"{name} should hold {expected.size} numbers, found {got}"
    return [answers[name].ravel().astype(np.float64) for name in ("codes", "scales", "restored")]


def _bits_judge(*names: str):
    def judge(inputs, answers):
        found = _shaped(inputs, answers)
        if isinstance(found, str):
            return found
        for name, f, expected in zip(("codes", "scales", "restored"), found, _bits(inputs), strict=True):
            if name in names:
                shape = (len(expected),)
                if name != "scales" and answers[name].shape != shape:
                    return f"{name} should have w's shape {shape}, found {answers[name].shape}"
                problem = compare(f, expected, what=name, rtol=1e-6)
                if problem:
                    return problem
        return None

    return judge


_BITS_SLIPS = [
    {"": ("", "block"),
     "one_scale": ("all blocks have one scale, that of the largest weight of all: small blocks become zero. Each block has its own", "one"),
     "signed_max": ("the largest weight may be negative: take the largest absolute value, w.abs()", "signed"),
     "strided_blocks": ("your blocks take every k-th weight; a block is `block` neighbours: w.view(-1, block)", "strided"),
     "range_scale": ("that is the distance from smallest to largest; absmax takes the largest absolute value", "range"),
     "mean_scale": ("the scale comes from the largest absolute value of a block, not from the mean", "mean"),
     "deviation_scale": ("the scale comes from the largest absolute value of a block, not from the standard deviation", "deviation")},
    {"": ("", 7.0),
     "divided_by_8": ("the largest weight gets code 8 so, and codes go from -7 to 7: divide by 7", 8.0),
     "divided_by_8_and_clamped": ("with absmax / 8 the largest positive weight would need code 8, and is cut off at 7: divide by 7", "8 clamped"),
     "divided_by_15": ("15 steps lie between -7.5 and 7.5; the largest code is 7, so the scale is absmax / 7", 15.0),
     "divided_by_16": ("16 is how many codes 4 bits have; the largest is 7, so the scale is absmax / 7", 16.0),
     "eight_bits": ("127 is the largest code of 8 bits; of 4 bits it is 7", 127.0),
     "not_divided": ("the scale is the largest weight itself, so codes are only -1, 0, 1: divide by 7", 1.0)},
    {"": ("", _round),
     "floored": ("the codes are rounded down; take the nearest", np.floor),
     "truncated": ("the codes are cut off towards zero; take the nearest: round()", np.trunc),
     "rounded_up": ("the codes are rounded up; take the nearest", np.ceil), "not_rounded": ("the codes are not whole numbers: round them", lambda v: v)},
    {"": ("", "codes times scales"),
     "restored_codes": ("what is restored are the codes themselves: multiply each by the scale of its block", "codes"),
     "restored_original": ("restored must be made from codes and scales, the only things that are stored; this is w itself", "w"),
     "restored_divided": ("restored is code / scale; the scale was divided by, so multiply", "divided"),
     "restored_largest": ("restored is code * absmax; the scale is absmax / 7", "largest")},
]  # fmt: skip


def _diagnose_bits(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(e.inputs, _shaped(e.inputs, e.answers)) for e in evidence[:2]]
    if any(isinstance(found, str) for _, found in runs):
        return None
    if not any(e.failure for e in evidence[:4]) and evidence[4].failure:
        return Diagnosis("zero_block", "a block of zeros has the scale 0, and 0 / 0 is NaN: divide by something that is never 0 there")
    if all(agrees(f, _asymmetric(i), 1e-6) for i, f in runs):
        return Diagnosis(
            "zero_point", "that is asymmetric quantisation, whose codes count from a block's smallest weight; absmax has no such offset: 0 keeps code 0"
        )
    inverted = [(i, [c, 1 / s, r]) for i, (c, s, r) in runs if np.all(s != 0)]
    if len(inverted) == 2 and all(agrees(f, _bits(i), 1e-6) for i, f in inverted):
        return Diagnosis("scales_inverted", "the scales are upside down: w ≈ code * scale, so the scale is absmax / 7")
    for i, (c, s, r) in runs:
        if agrees([c - 8, s, r], _bits(i), 1e-6) or agrees([c - 7, s, r], _bits(i), 1e-6):
            return Diagnosis("shifted", "your codes begin at 0 or 1, as they are stored; asked are signed ones, -7 to 7")
    return slips(runs, _bits, _BITS_SLIPS)


def _lab_bits(w, block):
    rows = w.view(-1, block)
    scales = rows.abs().amax(1, keepdim=True) / 7
    codes = torch.where(scales > 0, rows / scales, 0).round()
    return codes.flatten(), scales.flatten(), (codes * scales).flatten()


EXERCISE_3 = Exercise(
    id="9.3",
    title="A weight in four bits",
    difficulty=2,
    minutes=7,
    points=3,
    name="to_4_bits",
    cases=(
        Case("a scale for each block", _bits_probe(3, 8), _bits_judge("scales")),
        Case("codes from -7 to 7, the nearest", _bits_probe(5, 4), _bits_judge("scales", "codes")),
        Case("codes and scales, other sizes", _bits_probe(2, 16), _bits_judge("scales", "codes")),
        Case("restored from codes and scales", _bits_probe(3, 8), _bits_judge("codes", "scales", "restored")),
        Case("a block of zeros stays zero", _bits_probe(3, 8, zeros=True), _bits_judge("codes", "scales", "restored")),
    ),
    diagnose=_diagnose_bits,
    hints=(
        "View w as a table with a row for each block. What is the largest code, and which weight of a row should get it?",
        "scales = rows.abs().amax(1) / 7; codes = rows / scales, rounded. Where a scale is 0, the codes should be 0 and not NaN.",
        "rows = w.view(-1, block); scales = rows.abs().amax(1, keepdim=True) / 7\n"
        "codes = (rows / scales.clamp(min=1e-30)).round()\nreturn codes.flatten(), scales.flatten(), (codes * scales).flatten()",
    ),
    read="Dettmers et al. 2023, section 2, equations 1 and 2",
    fallback=lambda: _lab_bits,
)


# ---------------------------------------------------------------- 9.4 distillation

DISTIL = {"rows": ((5, 7), 3.0), "tokens": ((3, 4, 6), 0.5), "hot": ((4, 3), 10.0)}


def _distil_probe(which: str, same=False):
    def probe(rng):
        shape, T = DISTIL[which]
        s = Script()
        student = rng.normal(size=shape) * 2
        teacher = student.copy() if same else rng.normal(size=shape) * 2
        s.send("loss", s.call(s.input("student", student), s.input("teacher", teacher), T))
        s.input("T", np.array(T))
        return s

    return probe


def _log_softmax(z, axis):
    z = z - z.max(axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis, keepdims=True))


def _distil(inputs, chosen=(2.0, "rows", "kl", "both", -1)):
    """The oracle, and with other choices what mistakes give."""
    power, mean, kind, where, axis = chosen
    s, t, T = inputs["student"], inputs["teacher"], float(inputs["T"])
    if where == "multiplied":
        s, t = s * T, t * T
    else:
        s, t = (s if where in ("teacher", "none", "after") else s / T), (t if where in ("student", "none", "after") else t / T)
    q, p = _log_softmax(s, axis), _log_softmax(t, axis)
    each = {
        "kl": lambda: np.exp(p) * (p - q), "reversed": lambda: np.exp(q) * (q - p), "cross": lambda: -np.exp(p) * q,
        "probabilities": lambda: np.exp(p) * (p - np.exp(q)), "logits": lambda: np.exp(p) * (p - s), "squares": lambda: (np.exp(p) - np.exp(q)) ** 2,
    }[kind]()  # fmt: skip
    rows = each[..., 0].size
    by = {"rows": rows, "classes": each.size, "sum": 1, "batch": len(each)}[mean]
    if where == "after":  # (p / T) log((p / T) / (q / T))
        power = power - 1
    return T**power * each.sum() / by


_DISTIL_SLIPS = [
    {"": ("", 2.0), "factor_missing": ("T² is missing: without it a high temperature makes the gradients T² times smaller", 0.0),
     "factor_T": ("the factor is T², and you have T", 1.0), "factor_inverted": ("you divide by T²; multiply", -2.0)},
    {"": ("", "rows"),
     "mean_over_classes": ('you divide by the number of classes, too (reduction="mean" of kl_div does that): add over classes, then the mean over rows',
                           "classes"),
     "summed": ("over rows the mean is asked for, and you add", "sum"),
     "batch_only": ('you divide by the first dimension alone, as reduction="batchmean" does; flatten (batch, tokens, classes) to rows first', "batch")},
    {"": ("", "kl"),
     "reversed": ("the two are swapped: the teacher's probabilities weigh, KL(teacher ‖ student). kl_div takes the student's logs first", "reversed"),
     "cross_entropy": ("that is the cross-entropy: the same gradient, but not 0 where the student agrees. Take off the teacher's own entropy", "cross"),
     "probabilities_not_logs": ("kl_div wants the student's *log*-probabilities first: log_softmax, not softmax", "probabilities"),
     "logits_not_logs": ("kl_div wants log-probabilities, and got the student's logits: log_softmax", "logits"),
     "squares": ("that is the squared distance of probabilities; asked is the Kullback-Leibler divergence", "squares")},
    {"": ("", "both"), "teacher_only": ("only the teacher's logits are divided by T; both are", "teacher"),
     "student_only": ("only the student's logits are divided by T; both are", "student"),
     "temperature_missing": ("the logits are not divided by T before the softmax", "none"), "multiplied": ("logits are multiplied by T; divide", "multiplied"),
     "probabilities_divided": ("the probabilities are divided by T; it is the logits that are, before the softmax", "after")},
    {"": ("", -1), "softmax_over_dim_1": ("the softmax runs over dimension 1, which is the classes only in a matrix: dim=-1", 1),
     "softmax_over_rows": ("the softmax runs over the rows; it belongs over the classes, dim=-1", 0)},
]  # fmt: skip


def _distil_judge(inputs, answers):
    return compare(answers["loss"], _distil(inputs), what="the loss", rtol=1e-5, atol=1e-7)


def _diagnose_distil(evidence: list[Evidence]) -> Diagnosis | None:
    values = [e.answers.get("loss") for e in evidence[:3]]
    if all(isinstance(v, (float, np.ndarray)) and np.size(v) == 1 and np.isnan(np.asarray(v)).all() for v in values):
        return Diagnosis(
            "log_of_negative",
            "NaN is the logarithm of a negative number: kl_div takes log-probabilities first and probabilities second (both logs only with log_target=True)",
        )
    if isinstance(values[0], np.ndarray) and values[0].shape == (5,):
        return Diagnosis("one_each", "one number for each row comes back; the mean of them is asked for")
    return slips([(e.inputs, [v]) for e, v in zip(evidence[:3], values, strict=True)], lambda i, c: [_distil(i, c)], _DISTIL_SLIPS, rtol=1e-5)


def _lab_distil(student, teacher, T):
    p, q = torch.log_softmax(teacher / T, -1), torch.log_softmax(student / T, -1)
    return T**2 * (p.exp() * (p - q)).sum(-1).mean()


EXERCISE_4 = Exercise(
    id="9.4",
    title="What a teacher says",
    difficulty=2,
    minutes=7,
    points=3,
    name="distillation_loss",
    cases=(
        Case("T² KL(teacher ‖ student), the mean over rows", _distil_probe("rows"), _distil_judge),
        Case("also for (batch, tokens, classes) and another T", _distil_probe("tokens"), _distil_judge),
        Case("also for a high temperature", _distil_probe("hot"), _distil_judge),
        Case("0 where the student agrees", _distil_probe("rows", same=True), _distil_judge),
    ),
    diagnose=_diagnose_distil,
    hints=(
        "Make both into log-probabilities at temperature T. Who weighs: the teacher's probabilities or the student's?",
        "p, q = log_softmax(teacher / T, -1), log_softmax(student / T, -1); KL of a row is the sum of exp(p) (p - q) over classes.",
        "return T**2 * (p.exp() * (p - q)).sum(-1).mean()",
    ),
    read="Hinton et al. 2015, section 2",
    fallback=lambda: _lab_distil,
)


# ---------------------------------------------------------------- 9.5 one batch, several adapters

# rows, tokens, d_in, d_out, r, number of tasks, the task of each row, scaling
MIXED = {"small": (5, 2, 7, 11, 3, 4, (2, 0, 3, 2, 1), 1.6), "other": (4, 3, 6, 5, 2, 5, (3, 0, 4, 1), 0.7)}


def _mixed_probe(size: str, alone=False):
    def probe(rng):
        n, tokens, d_in, d_out, r, tasks, which, scaling = MIXED[size]
        s = Script()
        arrays = {"x": (n, tokens, d_in), "W": (d_out, d_in), "A": (tasks, r, d_in), "B": (tasks, d_out, r)}
        refs = [s.input(name, rng.normal(size=shape)) for name, shape in arrays.items()]
        which = (1,) * n if alone else which
        s.send("y", s.call(*refs, s.input("tasks", np.array(which)), scaling))
        s.input("scaling", np.array(scaling))
        return s

    return probe


def _mixed(inputs, chosen=(1.0, "own", 1.0, "rows")):
    """The oracle, row by row with ΔW in full, and with other choices what mistakes give."""
    base, which, power, order = chosen
    x, W, A, B, tasks, scale = (inputs[name] for name in ("x", "W", "A", "B", "tasks", "scaling"))
    deltas = [scale**power * b @ a for a, b in zip(A, B, strict=True)]

    def delta(i):
        return {
            "own": lambda: deltas[tasks[i]], "first": lambda: deltas[0], "last": lambda: deltas[-1], "place": lambda: deltas[i % len(deltas)],
            "sum": lambda: sum(deltas), "mean": lambda: sum(deltas) / len(deltas), "of row 0": lambda: deltas[tasks[0]],
            "last row's": lambda: deltas[tasks[-1]], "factors averaged": lambda: scale**power * B.mean(0) @ A.mean(0), "none": lambda: 0 * deltas[0],
            "batch mean": lambda: sum(deltas[t] for t in tasks) / len(tasks), "batch sum": lambda: sum(deltas[t] for t in tasks),
        }[which]()  # fmt: skip

    base = scale if base == "scaled" else base
    y = np.stack([row @ (base * W + delta(i)).T for i, row in enumerate(x)])
    return y[np.argsort(tasks, kind="stable")] if order == "grouped" else y


_MIXED_SLIPS = [
    {"": ("", 1.0), "base_missing": ("the frozen path x @ W.T is missing", 0.0),
     "base_scaled": ("the scaling belongs to the update alone; here it multiplies the base as well", "scaled")},
    {"": ("", "own"), "first_adapter": ("every row goes through adapter 0; row i needs adapter tasks[i]", "first"),
     "last_adapter": ("every row goes through the last adapter; row i needs adapter tasks[i]", "last"),
     "by_place": ("row i goes through adapter i; it needs adapter tasks[i]: A[tasks]", "place"),
     "all_added": ("all adapters are added for every row: that is one model that has learned everything a bit; row i needs tasks[i] alone", "sum"),
     "averaged": ("the adapters are averaged; row i needs adapter tasks[i] alone", "mean"),
     "task_of_row_0": ("all rows go through the adapter of row 0: tasks has one number for each", "of row 0"),
     "task_of_last_row": ("all rows go through the adapter of the last row: something is overwritten in the loop", "last row's"),
     "factors_averaged": ("A and B are averaged; row i needs A[tasks[i]] and B[tasks[i]]", "factors averaged"),
     "updates_mixed": ("the rows' adapters are averaged over the batch; each row keeps its own", "batch mean"),
     "updates_added": ("the rows' adapters are added up over the batch; each row keeps its own", "batch sum"),
     "update_missing": ("the low-rank path is missing: this is the base alone", "none")},
    {"": ("", 1.0), "scaling_missing": ("the scaling is missing", 0.0), "scaling_twice": ("the scaling enters twice", 2.0),
     "scaling_inverted": ("you divide by the scaling; multiply", -1.0)},
    {"": ("", "rows"), "grouped_order": ("the numbers are right, but the rows come back sorted by task; put them where they came from", "grouped")},
]  # fmt: skip


def _diagnose_mixed(evidence: list[Evidence]) -> Diagnosis | None:
    return slips([(e.inputs, [e.answers.get("y")]) for e in evidence[:2]], lambda i, c: [_mixed(i, c)], _MIXED_SLIPS)


def _lab_mixed(x, W, A, B, tasks, scaling):
    y = x @ W.T
    for t in range(len(A)):
        mine = tasks == t
        y[mine] += scaling * x[mine] @ A[t].T @ B[t].T
    return y


def _mixed_judge(inputs, answers):
    return compare(answers["y"], _mixed(inputs), what="mixed_lora(…)")


EXERCISE_5 = Exercise(
    id="9.5",
    title="Several tasks in one batch",
    difficulty=3,
    minutes=8,
    points=4,
    name="mixed_lora",
    cases=(
        Case("row i goes through adapter tasks[i]", _mixed_probe("small"), _mixed_judge),
        Case("also for another number of tasks", _mixed_probe("other"), _mixed_judge),
        Case("one task in all rows is plain LoRA", _mixed_probe("small", alone=True), _mixed_judge),
    ),
    diagnose=_diagnose_mixed,
    hints=(
        "The base is the same for all rows: x @ W.T once. Only the detour differs. What is A[tasks]?",
        "A[tasks] is (n, r, d_in), an A for each row. `@` multiplies batches: x (n, T, d_in) @ A[tasks].mT is (n, T, r).",
        "return x @ W.T + scaling * (x @ A[tasks].mT) @ B[tasks].mT",
    ),
    read="Hu et al. 2021, section 4.2, the limitation at its end",
    fallback=lambda: _lab_mixed,
)


LAB = Lab(
    number="9",
    name="09_rivals",
    title="LoRA and its rivals",
    minutes=60,
    core=False,
    objectives=(
        "say where each rival sits in a block, what it trains, and compute how many numbers that are",
        "keep three questions apart, adaptation, compression and serving, and say which method answers which",
        "measure quality, memory, file and latency of a method beside its rivals, with a control",
        "combine LoRA with a quantised base, and serve several tasks in one batch",
    ),
    needs=("lab 02 (the layer)", "lab 04 (counting) helps", "lab 07 (facts into sentences) helps"),
    exercises=(EXERCISE_1, EXERCISE_2, EXERCISE_3, EXERCISE_4, EXERCISE_5),
    predictions=(
        Prediction("9.A", "A finished model is made smaller, with no training but the student's. Which loses the most accuracy on the digits?",
                   {"a": "8 bits a weight", "b": "4 bits a weight", "c": "70 % of the weights set to zero", "d": "half of the blocks, distilled"}),
        Prediction("9.B", "One short text, one thread. How much longer does a forward pass take with two bottleneck adapters in every block?",
                   {"a": "less than 5 %", "b": "5 to 40 %", "c": "40 to 100 %", "d": "more than twice as long"}),
        Prediction("9.C", "70 % of the weights are zero. How fast is the forward pass now, with ordinary matrices?",
                   {"a": "about three times as fast", "b": "somewhat faster", "c": "as fast as before", "d": "slower"}),
    ),
)  # fmt: skip
