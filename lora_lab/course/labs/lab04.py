"""Lab 04, Counting: its exercises.

Sources: Hu et al. 2021 (arXiv 2106.09685), sections 4.2 and 5.1, tables 3, 4 and 15, appendix D.4.
Expectations are counted on things that exist: entries of arrays, bytes of torch's own gradients and optimizer state, tensors that autograd
keeps, decimal fractions; never by the formula that is asked for. Sizes are drawn anew for each seed until the mistakes below give other
numbers than the right answer does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import numpy as np
import torch
from torch.nn import functional as F

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script
from .formulas import Aspect, fewest_slips

# Counts are whole numbers: half a unit is neither rounding nor right.
HALF = 0.49


def _number(value) -> float | None:
    """A finite number, also as a tensor of one; None for anything else."""
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iuf":
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        return None
    return float(value)


def _several(rng, low: int, high: int, count: int) -> list[int]:
    """Whole numbers from low to high, no two alike."""
    return [int(n) for n in rng.choice(np.arange(low, high + 1), count, replace=False)]


def slips(found: Sequence[float], compute: Callable, aspects: Sequence[Aspect], most: int = 2) -> Diagnosis | None:
    """`fewest_slips` that give the numbers found; compute(chosen): the numbers that an answer with these choices gives, one for each of them."""
    return fewest_slips(lambda chosen: all(abs(f - v) < HALF for f, v in zip(found, compute(chosen), strict=True)), aspects, most)


# ---------------------------------------------------------------------------------------------------------------------
# 4.1  added_parameters(d_in, d_out, r, of, chosen)

# A plain layer, a plain wide one, and fused layers of which some or all slices are chosen: (of, chosen)
LAYERS = ((1, 1), (1, 1), (3, 2), (3, 3), (5, 2))


def _layer_probe(of: int, chosen: int, wide: bool):
    def probe(rng):
        s = Script()
        small, large = sorted(_several(rng, 11, 29, 2))
        d_in, width, r = (small, large, 4) if wide else (large, small, 3)
        sizes = [d_in, of * width, r, of, chosen]
        s.input("sizes", np.array(sizes))
        s.send("count", s.call(*sizes))
        return s

    return probe


def entries(d_in: int, d_out: int, r: int, of: int, chosen: int) -> int:
    """The oracle: A and B of each chosen slice as arrays, and how many entries these have."""
    slices = np.split(np.zeros((d_out, d_in)), of)[:chosen]
    return sum(np.zeros((r, piece.shape[1])).size + np.zeros((piece.shape[0], r)).size for piece in slices)


def _layer_judge(inputs, answers):
    d_in, d_out, r, of, chosen = sizes = [int(n) for n in inputs["sizes"]]
    layer = f"{d_in} → {d_out}, r = {r}" + (f", {chosen} of {of} slices" if of > 1 else "")
    return compare(answers["count"], float(entries(*sizes)), what=f"the count for a layer {layer}", atol=HALF, rtol=0.0)


_EACH = {
    "": ("", lambda i, w: i + w),
    "square": ("you take the layer for square: B is (d_out, r), and d_out need not be d_in", lambda i, w: 2 * i),
    "square_out": ("you take the layer for square: A is (r, d_in), and d_in need not be d_out", lambda i, w: 2 * w),
    "full_matrix": ("d_in · d_out is the size of W or ΔW; trained are A and B, (r, d_in) and (d_out, r)", lambda i, w: i * w),
    "only_A": ("this is A alone; B, (d_out, r), trains too", lambda i, w: i),
    "only_B": ("this is B alone; A, (r, d_in), trains too", lambda i, w: w),
}
_SLICES = {
    "": ("", lambda f, i, o, of, n: n * f(i, o // of)),
    "one_adapter": (
        "this is one adapter on the whole fused layer; asked is a pair A, B for each chosen slice, and a slice has d_out / of outputs",
        lambda f, i, o, of, n: f(i, o),
    ),
    "whole_width": ("each B belongs to one slice, so it has d_out / of rows, not d_out", lambda f, i, o, of, n: n * f(i, o)),
    "all_slices": ("you count all slices; only the chosen ones have an adapter", lambda f, i, o, of, n: of * f(i, o // of)),
    "one_slice": ("you count one slice; each chosen one has an A and a B of its own", lambda f, i, o, of, n: f(i, o // of)),
    "shared_A": ("this is one A for all chosen slices together; each has an A of its own", lambda f, i, o, of, n: f(i, n * o // of)),
    "shared_B": ("you count B once; each chosen slice has a B of its own", lambda f, i, o, of, n: n * i + o // of),
    "width_times_chosen": ("d_out is the width of all slices; one slice has d_out / of", lambda f, i, o, of, n: f(i, n * o)),
    "input_cut_too": ("slices cut the outputs; each A still reads all d_in inputs", lambda f, i, o, of, n: n * (i / of + o / of)),
}
_RANK = {
    "": ("", lambda r: r),
    "rank_missing": ("r is missing: A has r rows, B has r columns", lambda r: 1),
    "rank_squared": ("r enters once in A and once in B, and these are added, not multiplied", lambda r: r * r),
    "twice": ("twice too many: d_in + d_out has both factors already", lambda r: 2 * r),
}
_EXTRA = {
    "": ("", lambda i, o, of, n, r: 0),
    "with_base": ("W itself is frozen and no addition of LoRA", lambda i, o, of, n, r: i * o),
    "with_biases": ("A and B are bare matrices: no biases (nn.Linear has one unless bias=False)", lambda i, o, of, n, r: n * (r + o // of)),
    "with_B_bias": ("B is a bare matrix: no bias", lambda i, o, of, n, r: n * (o // of)),
    "with_alpha": ("alpha is a plain number and doesn't train", lambda i, o, of, n, r: n),
}


def _diagnose_layer(evidence: list[Evidence]) -> Diagnosis | None:
    found = [_number(e.answers.get("count")) for e in evidence]
    if None in found:
        pair = evidence[0].answers.get("count")
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            return Diagnosis("two_counts", "two numbers come back; asked is one: of A and B together")
        return None
    sizes = [[int(n) for n in e.inputs["sizes"]] for e in evidence]

    def compute(chosen):
        each, slices, rank, extra = chosen
        return [rank(r) * slices(each, i, o, of, n) + extra(i, o, of, n, r) for i, o, r, of, n in sizes]

    return slips(found, compute, [_EACH, _SLICES, _RANK, _EXTRA])


LAYER = Exercise(
    id="4.1",
    title="What an adapter adds",
    difficulty=1,
    minutes=4,
    points=2,
    name="added_parameters",
    cases=tuple(
        Case(title, _layer_probe(*LAYERS[k], wide=k % 2 == 1), _layer_judge)
        for k, title in enumerate(
            ("a plain layer, fewer outputs than inputs", "a plain layer, more outputs than inputs", "two of three slices", "three of three slices",
             "two of five slices")
        )
    ),
    diagnose=_diagnose_layer,
    hints=(
        "Draw A and B for one slice, with their shapes. How many entries have they together?",
        "A is (r, d_in): every slice reads all inputs. B is (d_out / of, r): it writes one slice. How many such pairs are there?",
        "return chosen * r * (d_in + d_out // of)",
    ),
    read="Hu et al. 2021, sections 4.1 and 5.1",
    fallback=lambda: lambda d_in, d_out, r, of=1, chosen=1: chosen * r * (d_in + d_out // of),
)


# ---------------------------------------------------------------------------------------------------------------------
# 4.2  largest_rank(shapes, budget, head)

ROOMS = ("one matrix, as many numbers as it has itself", "three unlike matrices", "a budget that is met exactly", "with a head",
         "a head whose bias decides", "not even r = 1", "the head alone is too much")  # fmt: skip


def _budget(kind: str, shapes, head) -> int:
    each, of_head = sum(map(sum, shapes)), head[0] * head[1] + head[1]
    if kind == ROOMS[0]:
        return shapes[0][0] * shapes[0][1]
    return {
        ROOMS[1]: 9 * each + each * 3 // 4,
        ROOMS[2]: 6 * each,
        ROOMS[3]: of_head + 7 * each + 2,
        ROOMS[4]: of_head + 6 * each - 3,
        ROOMS[5]: each - 1,
        ROOMS[6]: of_head - 2,
    }[kind]


def _rank_probe(kind: str):
    def probe(rng):
        s = Script()
        while True:
            shapes = [tuple(_several(rng, 11, 29, 2)) for _ in range(1 if kind == ROOMS[0] else 3)]
            d, classes = head = int(rng.integers(30, 50)), int(rng.integers(6, 10))
            has_head, budget = kind in (ROOMS[3], ROOMS[4], ROOMS[6]), _budget(kind, shapes, head)
            each = sum(map(sum, shapes))
            if kind == ROOMS[0] and (budget / each) % 1 < 0.6:  # so that rounding shows
                continue
            if kind in ROOMS[3:5]:  # so that what people take a head for gives another rank each time
                slip = d * classes if kind == ROOMS[4] else d * classes + d
                taken = [(budget - of_head) // each for of_head in (d * classes + classes, slip, d + classes, 0)]
                if len(set(taken)) < 4 or budget // (each + d + classes) == taken[0]:
                    continue
            break
        s.input("shapes", np.array(shapes))
        s.input("rest", np.array([budget, *head, has_head]))
        s.send("r", s.call([list(shape) for shape in shapes], budget, list(head) if has_head else None))
        return s

    return probe


def _room(inputs) -> tuple[list, int, tuple[int, int] | None]:
    budget, d, classes, has_head = (int(n) for n in inputs["rest"])
    return [tuple(map(int, shape)) for shape in inputs["shapes"]], budget, (d, classes) if has_head else None


def by_trial(shapes, budget: int, head) -> int:
    """The oracle: rank after rank, real arrays, until they no longer fit."""
    taken = 0 if head is None else np.zeros(head).size + np.zeros(head[1]).size
    r = 0
    while taken + sum(entries(d_in, d_out, r + 1, 1, 1) for d_in, d_out in shapes) <= budget:
        r += 1
    return r


def _rank_judge(inputs, answers):
    shapes, budget, head = _room(inputs)
    where = f"the largest r for {shapes}, budget {budget}" + (f", head {head}" if head else "")
    wrong = compare(answers["r"], float(by_trial(shapes, budget, head)), what=where, atol=1e-9, rtol=0.0)  # 1e-9: 8.0 for 8, and not 8.4
    if wrong is None and isinstance(answers["r"], bool):
        return f"{where} is a bool; a rank is a number"
    return wrong


_SUM = {
    "": ("", lambda shapes: sum(map(sum, shapes))),
    "first_only": ("you use the first matrix; the budget is for all of them together", lambda shapes: sum(shapes[0])),
    "largest_only": ("you use the largest matrix; the budget is for all of them together", lambda shapes: max(map(sum, shapes))),
    "only_in": ("B counts too: r (d_in + d_out) for each matrix", lambda shapes: sum(i for i, _ in shapes)),
    "only_out": ("A counts too: r (d_in + d_out) for each matrix", lambda shapes: sum(o for _, o in shapes)),
    "full_matrix": ("you divide by the size of the matrices; what r multiplies is d_in + d_out", lambda shapes: sum(i * o for i, o in shapes)),
    "square": ("not every matrix is square: r (d_in + d_out)", lambda shapes: sum(2 * i for i, _ in shapes)),
    "mean": ("you divide by the mean matrix; the budget is for all of them together", lambda shapes: Fraction(sum(map(sum, shapes)), len(shapes))),
}
_ROUND = {
    "": ("", lambda q: q // 1),
    "rounded": ("you round to the nearest: rounded up, it is over the budget", lambda q: float(round(q))),
    "ceil": ("you round up, and that is over the budget", lambda q: -(-q // 1)),
    "one_less": ("a budget that is met exactly is kept: at most, not less than", lambda q: (-(-q // 1)) - 1),
    "always_one_less": ("one rank too few: try whether r + 1 still fits", lambda q: q // 1 - 1),
    "one_more": ("one rank too many: it is over the budget", lambda q: max(q // 1, 0) + 1),
    "capped_at_1": ("where not even r = 1 fits, the answer is 0", lambda q: max(1.0, q // 1)),
}
_HEAD = {
    "": ("", lambda h: h[0] * h[1] + h[1]),
    "head_forgotten": ("the head trains in full and takes its part of the budget first", lambda h: 0),
    "head_bias_forgotten": ("the head has a bias: d · classes + classes", lambda h: h[0] * h[1]),
    "head_bias_of_inputs": ("a bias has one number for each output: classes, not d", lambda h: h[0] * h[1] + h[0]),
    "head_added": ("the head spends a part of the budget; you add to it", lambda h: -h[0] * h[1] - h[1]),
    "head_sum": ("the head trains in full: d · classes numbers and a bias, not d + classes", lambda h: h[0] + h[1]),
}
_BELOW = {
    "": ("", lambda r: max(r, 0.0)),
    "negative": ("where the head alone is more than the budget, nothing fits: r = 0, not a negative number", lambda r: r),
}


def _diagnose_rank(evidence: list[Evidence]) -> Diagnosis | None:
    if evidence[0].error is not None and "NoneType" in (evidence[0].failure or ""):
        return Diagnosis("no_head", "without a head, head is None: nothing is spent then")
    found = [_number(e.answers.get("r")) for e in evidence]
    several = evidence[1].answers.get("r")
    if isinstance(several, (list, tuple)) and len(several) == 3:
        return Diagnosis("one_each", "a number for each matrix comes back; the budget is for all together, and so is the rank")
    if None in found:
        return None
    rooms = [_room(e.inputs) for e in evidence]

    def compute(chosen):
        total, rounding, of_head, below = chosen
        values = []
        for shapes, budget, head in rooms:
            q = Fraction(budget - (of_head(head) if head else 0)) / total(shapes)
            values.append(below(rounding(q)))
        return values

    def with_lora_head():
        return [max(0.0, budget // (sum(map(sum, shapes)) + (sum(head) if head else 0))) for shapes, budget, head in rooms]

    if all(abs(f - v) < HALF for f, v in zip(found, with_lora_head(), strict=True)):
        return Diagnosis("lora_on_head", "you give the head an adapter of rank r; it is new, so it trains in full: d · classes + classes, whatever r is")
    if any(f % 1 for f in found):
        return Diagnosis("not_rounded", "a rank is a whole number: how many whole times does it fit?")
    return slips(found, compute, [_SUM, _ROUND, _HEAD, _BELOW])


def _lab_largest_rank(shapes, budget, head=None):
    if head is not None:
        budget -= head[0] * head[1] + head[1]
    return max(0, budget // sum(d_in + d_out for d_in, d_out in shapes))


RANK = Exercise(
    id="4.2",
    title="The largest r that a budget allows",
    difficulty=2,
    minutes=5,
    points=3,
    name="largest_rank",
    cases=tuple(Case(kind, _rank_probe(kind), _rank_judge) for kind in ROOMS),
    diagnose=_diagnose_rank,
    hints=(
        "How many numbers does one more rank cost, over all matrices? And what is spent before the first one?",
        "A rank costs the sum of d_in + d_out. The head costs d · classes + classes, whatever r is. How many whole ranks fit into what is left?",
        "left = budget - (head[0] * head[1] + head[1] if head else 0)\nreturn max(0, left // sum(i + o for i, o in shapes))",
    ),
    read="the break-even rank of lab 01; exercise 4.1",
    fallback=lambda: _lab_largest_rank,
)


# ---------------------------------------------------------------------------------------------------------------------
# 4.3  training_bytes(frozen, trained, width, optimizer)

# optimizer, bytes a number, whether anything is frozen
RUNS = (("adam", 4, False), ("adam", 2, True), ("momentum", 4, True), ("sgd", 2, True))


def _bytes_probe(optimizer: str, width: int, frozen: bool):
    def probe(rng):
        s = Script()
        base, own = _several(rng, 500, 900, 1)[0] * frozen, _several(rng, 30, 90, 1)[0]
        s.input("sizes", np.array([base, own]))
        s.send("bytes", s.call(base, own, width, optimizer))
        return s

    return probe


def bytes_of_torch(frozen: int, trained: int, width: int, optimizer: str) -> tuple[int, int, int]:
    """The oracle: real tensors, torch's own backward pass and optimizer, and how many bytes lie there afterwards."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[width]
    W0, p = torch.zeros(frozen, dtype=dtype), torch.nn.Parameter(torch.ones(trained, dtype=dtype))
    step = {
        "adam": lambda: torch.optim.Adam([p]), "momentum": lambda: torch.optim.SGD([p], lr=0.1, momentum=0.9), "sgd": lambda: torch.optim.SGD([p], lr=0.1),
    }[optimizer]()  # fmt: skip
    (p * p).sum().backward()
    step.step()
    state = [v for s in step.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.ndim]  # a step count has no dimension
    return W0.nbytes + p.nbytes, p.grad.nbytes, sum(v.nbytes for v in state)


def _bytes_judge(optimizer: str, width: int):
    def judge(inputs, answers):
        frozen, trained = (int(n) for n in inputs["sizes"])
        three = _three(answers["bytes"])
        if isinstance(three, str):
            return three
        for name, f, e in zip(("weights", "gradients", "the optimizer's state"), three, bytes_of_torch(frozen, trained, width, optimizer), strict=True):
            where = f"{optimizer}, {width} bytes a number, {frozen} frozen and {trained} trained numbers: "
            if abs(f - e) > HALF:
                return f"{where}{name} should have {e} bytes; found {f:g}"
        return None

    return judge


def _three(value) -> tuple[float, float, float] | str:
    if isinstance(value, np.ndarray) and value.shape == (3,):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or len(value) != 3 or any(_number(v) is None for v in value):
        found = f"{value:g}" if _number(value) is not None and not isinstance(value, np.ndarray) else "something else"
        if isinstance(value, (list, tuple)):
            found = f"{len(value)} things"
        return f"expected three numbers: bytes of weights, of gradients, of the optimizer's state; found {found}"
    return tuple(_number(v) for v in value)


_WEIGHTS = {
    "": ("", lambda f, t: f + t),
    "base_forgotten": ("the frozen weights lie in memory too: every forward pass multiplies by them", lambda f, t: t),
    "adapter_forgotten": ("what trains is also a weight: it is stored beside the frozen ones", lambda f, t: f),
    "trained_twice": ("you count what trains twice among the weights; a gradient is counted for itself", lambda f, t: f + 2 * t),
}
_GRADIENTS = {
    "": ("", lambda f, t: t),
    "gradients_for_all": ("a frozen weight has no gradient: requires_grad is False, and nothing is stored", lambda f, t: f + t),
    "gradients_of_frozen": ("gradients belong to what trains, not to what is frozen", lambda f, t: f),
    "no_gradients": ("what trains has a gradient, as large as itself", lambda f, t: 0),
}
_STATE = {
    "": ("", lambda o: {"adam": 2, "momentum": 1, "sgd": 0}[o]),
    "one_moment": ("Adam keeps two moments of each number: a running mean, and one of the squares", lambda o: {"adam": 1, "momentum": 1, "sgd": 0}[o]),
    "three_copies": (
        "three copies for Adam: two moments are its state. (A float32 copy of half-precision weights is a third one in some set-ups; here there is none)",
        lambda o: {"adam": 3, "momentum": 1, "sgd": 0}[o],
    ),
    "always_adam": ('you give every optimizer Adam\'s state: momentum keeps one copy, "sgd" none', lambda o: 2),
    "sgd_keeps_one": ('plain "sgd" keeps nothing: its step is lr times the gradient', lambda o: {"adam": 2, "momentum": 1, "sgd": 1}[o]),
    "momentum_keeps_two": ("momentum keeps one running mean; the second, of squares, is Adam's", lambda o: {"adam": 2, "momentum": 2, "sgd": 0}[o]),
    "momentum_forgotten": ("momentum keeps a running mean of the gradient, as large as what trains", lambda o: {"adam": 2, "momentum": 0, "sgd": 0}[o]),
    "adam_forgotten": (
        'with optimizer="adam" (in small letters) your code keeps no state; Adam keeps two moments', lambda o: {"adam": 0, "momentum": 1, "sgd": 0}[o],
    ),
    "gradient_in_state": ("your state has one copy too many: gradients are an account of their own", lambda o: {"adam": 3, "momentum": 2, "sgd": 1}[o]),
    "no_state": ("Adam and momentum keep running means, as large as what trains", lambda o: 0),
}
_STATE_OF = {
    "": ("", lambda f, t: t),
    "state_for_all": ("the optimizer was given what trains; it keeps nothing for frozen weights", lambda f, t: f + t),
    "state_of_frozen": ("the optimizer keeps state for what trains, not for what is frozen", lambda f, t: f),
}
_WIDTH = {
    "": ("", lambda w: (w, w, w)),
    "numbers_not_bytes": ("these are numbers; a number has `width` bytes", lambda w: (1, 1, 1)),
    "bits": ("bits? `width` is in bytes already", lambda w: (8 * w, 8 * w, 8 * w)),
    "always_four": ("you take 4 bytes a number; asked is `width`", lambda w: (4, 4, 4)),
    "state_in_fp32": ("you keep the optimizer's state in 4 bytes; here it is as wide as what trains, `width`, as torch.optim makes it", lambda w: (w, w, 4)),
    "state_width_missing": ("the optimizer's state is in numbers; times `width` for bytes", lambda w: (w, w, 1)),
    "gradients_width_missing": ("the gradients are in numbers; times `width` for bytes", lambda w: (w, 1, w)),
    "weights_width_missing": ("the weights are in numbers; times `width` for bytes", lambda w: (1, w, w)),
    "only_weights_narrow": ("you keep gradients and state in 4 bytes; torch makes them as wide as the weight, `width`", lambda w: (w, 4, 4)),
    "gradients_in_fp32": ("you keep gradients in 4 bytes; torch makes them as wide as the weight, `width`", lambda w: (w, 4, w)),
}


def _diagnose_bytes(evidence: list[Evidence]) -> Diagnosis | None:
    first = evidence[0].answers.get("bytes")
    if isinstance(first, Mapping):
        return Diagnosis("a_dict", "a dict comes back; asked are three numbers, in this order: weights, gradients, state")
    if _number(first) is not None:
        return Diagnosis("one_number", "one number comes back; asked are three: (weights, gradients, state)")
    found = [_three(e.answers.get("bytes")) for e in evidence]
    if any(isinstance(three, str) for three in found):
        return None
    sizes = [[int(n) for n in e.inputs["sizes"]] for e in evidence]

    def compute(chosen):
        weights, gradients, state, state_of, width = chosen
        values = []
        for (optimizer, w, _), (f, t) in zip(RUNS, sizes, strict=True):
            a, b, c = width(w)
            values += [a * weights(f, t), b * gradients(f, t), c * state(optimizer) * state_of(f, t)]
        return values

    for order in itertools.permutations(range(3)):
        if order != (0, 1, 2) and all(
            sorted(three) == sorted(bytes_of_torch(f, t, w, o)) and [three[k] for k in order] == list(bytes_of_torch(f, t, w, o))
            for three, (o, w, _), (f, t) in zip(found, RUNS, sizes, strict=True)
        ):
            return Diagnosis("order", "the numbers are right, the order is not: weights, gradients, state")
    return slips([v for three in found for v in three], compute, [_WEIGHTS, _GRADIENTS, _STATE, _STATE_OF, _WIDTH], most=3)


def _lab_training_bytes(frozen, trained, width, optimizer):
    copies = {"adam": 2, "momentum": 1, "sgd": 0}[optimizer]
    return width * (frozen + trained), width * trained, copies * width * trained


BYTES = Exercise(
    id="4.3",
    title="The bytes that training needs",
    difficulty=1,
    minutes=4,
    points=3,
    name="training_bytes",
    cases=tuple(
        Case(
            f'{"LoRA" if frozen else "full fine-tuning"}, optimizer="{optimizer}", {width} bytes a number: as torch has it',
            _bytes_probe(optimizer, width, frozen), _bytes_judge(optimizer, width),
        )
        for optimizer, width, frozen in RUNS
    ),
    diagnose=_diagnose_bytes,
    hints=(
        "What must be in memory to compute with a weight? What more, to change it?",
        "Every weight is stored. Only what trains has a gradient, as large as itself. Adam keeps two running means of each gradient, momentum one, "
        "plain SGD none.",
        'copies = {"adam": 2, "momentum": 1, "sgd": 0}[optimizer]\nreturn width * (frozen + trained), width * trained, copies * width * trained',
    ),
    read="Hu et al. 2021, section 4.2",
    fallback=lambda: _lab_training_bytes,
)


# ---------------------------------------------------------------------------------------------------------------------
# 4.4  kept_numbers(layers, tokens, r)

CHAINS = (
    ("full fine-tuning, three layers", ("full", "full", "full")),
    ("an adapter on every layer", ("lora", "lora", "lora")),
    ("an adapter on the middle layer", ("frozen", "lora", "frozen")),
    ("only the last layer trains", ("frozen", "frozen", "full")),
    ("all four kinds of neighbours", ("frozen", "lora", "frozen", "full", "lora")),
)


def _kept_probe(kinds: Sequence[str]):
    def probe(rng):
        s = Script()
        widths, tokens, r = _several(rng, 10, 40, len(kinds) + 1), int(rng.integers(5, 9)), int(rng.integers(2, 5))
        s.input("sizes", np.array([tokens, r, *widths]))
        layers = [[widths[k], widths[k + 1], kind] for k, kind in enumerate(kinds)]
        s.send("kept", s.call(layers, tokens, r))
        return s

    return probe


def kept_by_autograd(widths: Sequence[int], kinds: Sequence[str], tokens: int, r: int) -> int:
    """The oracle: the chain runs, and torch's own hooks see what is kept for the backward pass; parameters are not counted."""
    parameters, kept, alive = set(), {}, []

    def parameter(*shape, trains):
        p = torch.nn.Parameter(torch.ones(shape), requires_grad=trains)
        parameters.add(p.untyped_storage()._cdata)
        alive.append(p)
        return p

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = t.numel()
            alive.append(t)  # or its address could be given away again
        return t

    x = torch.ones(tokens, widths[0])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        for k, kind in enumerate(kinds):
            inputs, outputs = widths[k], widths[k + 1]
            y = F.linear(x, parameter(outputs, inputs, trains=kind == "full"))
            if kind == "lora":
                y = y + 0.5 * F.linear(F.linear(x, parameter(r, inputs, trains=True)), parameter(outputs, r, trains=True))
            x = F.gelu(y) if k < len(kinds) - 1 else y
    return sum(kept.values())


def _kept_judge(kinds: Sequence[str]):
    def judge(inputs, answers):
        tokens, r, *widths = (int(n) for n in inputs["sizes"])
        what = f"what {' → '.join(kinds)} keeps (widths {widths}, {tokens} tokens, r = {r})"
        return compare(answers["kept"], float(kept_by_autograd(widths, kinds, tokens, r)), what=what, atol=HALF, rtol=0.0)

    return judge


_FULL = {
    "": ("", lambda i, o, r: i),
    "full_output": ("dW = xᵀ dy needs the layer's input x, d_in numbers a token, not its output", lambda i, o, r: o),
    "full_both": ("dW = xᵀ dy needs the layer's input; its output is not kept for it", lambda i, o, r: i + o),
    "full_nothing": ("a weight that trains needs the layer's input: dW = xᵀ dy", lambda i, o, r: 0),
}
_LORA = {
    "": ("", lambda i, o, r: i + r),
    "only_Ax": ("A trains, and its gradient needs x, all d_in numbers of it: A x alone won't do", lambda i, o, r: r),
    "Ax_forgotten": ("B trains, too: its gradient needs A x, r numbers a token", lambda i, o, r: i),
    "lora_nothing": ("A's gradient needs x, B's needs A x: an adapter keeps both", lambda i, o, r: 0),
    "size_of_A_and_B": ("r (d_in + d_out) is the size of A and B; kept of the activations are x, for A, and A x, for B", lambda i, o, r: r * (i + o)),
    "BAx_kept": ("B A x is added and forgotten; kept are x, for A, and A x, for B", lambda i, o, r: i + r + o),
    "lora_output": ("A's gradient needs the layer's input x, d_in numbers, not its output", lambda i, o, r: o + r),
    "r_twice": ("A x is kept once, for the gradient of B", lambda i, o, r: i + 2 * r),
    "parameters_too": ("A and B are parameters; asked is what is kept of the activations", lambda i, o, r: None),
}
_FROZEN = {  # learns: whether something before it trains
    "": ("", lambda i, o, learns: 0),
    "frozen_input": ("a frozen layer needs no dW, so it does not keep its input; dx asks for W alone", lambda i, o, learns: i),
    "frozen_input_above": ("a frozen layer that a gradient passes through doesn't keep its input either; dx asks for W alone", lambda i, o, learns: i * learns),
    "frozen_output": ("a frozen layer keeps nothing of its own; dx asks for W alone", lambda i, o, learns: o),
}
_GELU = {
    "": ("", lambda k, kinds: k < len(kinds) - 1 and any(kind != "frozen" for kind in kinds[: k + 1])),
    "gelu_forgotten": ("GELU keeps its input wherever a gradient must pass through it", lambda k, kinds: False),
    "gelu_everywhere": (
        "no gradient passes below the first layer that trains: the GELUs there keep nothing", lambda k, kinds: k < len(kinds) - 1,
    ),
    "gelu_own": (
        "a gradient also passes through GELUs that follow a frozen layer, on its way to what trains before it",
        lambda k, kinds: k < len(kinds) - 1 and kinds[k] != "frozen",
    ),
    "gelu_last": ("after the last layer there is no GELU", lambda k, kinds: any(kind != "frozen" for kind in kinds[: k + 1])),
    "gelu_last_and_below": ("GELUs stand between the layers, and below the first layer that trains they keep nothing", lambda k, kinds: True),
    "gelu_after_full": (
        "an adapter trains as well: a gradient passes through the GELUs after it",
        lambda k, kinds: k < len(kinds) - 1 and "full" in kinds[: k + 1],
    ),
    "gelu_after_lora": (
        'a "full" layer trains as well: a gradient passes through the GELUs after it',
        lambda k, kinds: k < len(kinds) - 1 and "lora" in kinds[: k + 1],
    ),
    "gelu_after_first": (
        "the GELU right after the first layer that trains passes a gradient, too: it keeps its input",
        lambda k, kinds: k < len(kinds) - 1 and any(kind != "frozen" for kind in kinds[:k]),
    ),
    "gelu_above": (
        "you have it upside down: a gradient passes where something BEFORE the GELU trains, not after it",
        lambda k, kinds: k < len(kinds) - 1 and any(kind != "frozen" for kind in kinds[k + 1 :]),
    ),
}  # fmt: skip
_TOKENS = {
    "": ("", lambda n, tokens: n * tokens),
    "tokens_missing": ("this is for one token: times `tokens`", lambda n, tokens: n),
    "in_bytes": ("these are bytes; asked are numbers", lambda n, tokens: 4 * n * tokens),
}
_FIRST = {  # own: what a layer keeps, i: its input alone
    "": ("", lambda k, kinds, own, i: own),
    "first_input_left_out": ("the first layer's x counts, too, where it is kept", lambda k, kinds, own, i: own if k else max(0, own - i)),
    "first_trained_left_out": (
        "the first layer that trains keeps what its own gradient needs, although no gradient passes below it",
        lambda k, kinds, own, i: own * any(kind != "frozen" for kind in kinds[:k]),
    ),
}
_GELU_OF = {
    "": ("", lambda i, o: o),
    "gelu_d_in": ("GELU's input is the output of the layer before it: d_out numbers a token", lambda i, o: i),
}


def _diagnose_kept(evidence: list[Evidence]) -> Diagnosis | None:
    found = [_number(e.answers.get("kept")) for e in evidence]
    if None in found:
        return None
    sizes = [[int(n) for n in e.inputs["sizes"]] for e in evidence]

    def compute(chosen):
        full, lora, frozen, gelu, gelu_of, times, first = chosen
        values = []
        for (_, kinds), (tokens, r, *widths) in zip(CHAINS, sizes, strict=True):
            kept = fixed = 0
            for k, kind in enumerate(kinds):
                i, o = widths[k], widths[k + 1]
                if kind == "frozen":
                    kept += frozen(i, o, any(before != "frozen" for before in kinds[:k]))
                else:
                    own = full(i, o, r) if kind == "full" else lora(i, o, r)
                    if own is None:  # A and B counted as well
                        own, fixed = i + r, fixed + r * (i + o)
                    kept += first(k, kinds, own, i)
                kept += gelu_of(i, o) * gelu(k, kinds)
            values.append(times(kept, tokens) + fixed)
        return values

    return slips(found, compute, [_FULL, _LORA, _FROZEN, _GELU, _GELU_OF, _TOKENS, _FIRST], most=3)


def _lab_kept_numbers(layers, tokens, r):
    kept, learns = 0, False
    for place, (d_in, d_out, kind) in enumerate(layers):
        learns = learns or kind != "frozen"
        kept += {"full": d_in, "lora": d_in + r, "frozen": 0}[kind]
        if learns and place < len(layers) - 1:
            kept += d_out
    return kept * tokens


KEPT = Exercise(
    id="4.4",
    title="What the backward pass keeps",
    difficulty=3,
    minutes=7,
    points=4,
    name="kept_numbers",
    cases=tuple(Case(title, _kept_probe(kinds), _kept_judge(kinds)) for title, kinds in CHAINS),
    diagnose=_diagnose_kept,
    hints=(
        "Go from layer to layer and ask of each thing: does its gradient formula hold a number that depends on the input?",
        'A "full" layer keeps x. A "lora" layer keeps x (for A) and A x (for B). A "frozen" one keeps nothing. GELU keeps its input as soon as '
        "some layer before it trains.",
        "learns = False\nfor place, (d_in, d_out, kind) in enumerate(layers):\n    learns = learns or kind != \"frozen\"\n"
        "    kept += {\"full\": d_in, \"lora\": d_in + r, \"frozen\": 0}[kind]\n    if learns and place < len(layers) - 1:\n        kept += d_out",
    ),
    read="lab 02, exercise 2.3: the gradients of A and B",
    fallback=lambda: _lab_kept_numbers,
)


# ---------------------------------------------------------------------------------------------------------------------
# 4.5  misprints(rows, layers, d_model)


# How a row is printed; those that are not in the dictionary of `_table` follow from the formula.
KINDS = ("right", "right", "right", "one digit", "in full", "last digit", "cut", "rank", "half", "matrices", "a third of a per cent", "3 per cent",
         "7 per cent")  # fmt: skip


def _table(rng, layers: int, d: int) -> list[list]:
    """Rows (name, matrices a layer, r, printed millions, decimals): some follow from the formula, some don't, each in its own way."""
    rows = []

    def add(matrices, r, printed, decimals):
        rows.append([f"row {len(rows) + 1}", matrices, r, float(printed), decimals])

    def places(count, decimals):
        return Decimal(count).scaleb(-6).quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_UP)

    for kind in map(str, rng.permutation(KINDS)):
        while True:
            r, matrices = int(rng.integers(1, 65)), int(rng.integers(1, 5))
            decimals = 6 if kind == "in full" else 1 if kind == "one digit" else 2 if kind in ("last digit", "cut") else int(rng.integers(1, 3))
            unit, count = Decimal(1).scaleb(-decimals), layers * matrices * 2 * d * r
            value, exact = places(count, decimals), Decimal(count).scaleb(-6)
            if value < 20 * unit or (kind != "in full" and abs((exact / unit) % 1 - Decimal("0.5")) < Decimal("0.05")):
                continue  # too few digits to tell anything, or too near to a tie
            cut = (exact / unit).to_integral_value(rounding="ROUND_DOWN") * unit
            if (kind == "cut" and cut == value) or (kind == "one digit" and value == places(count, 2)):
                continue
            if kind.endswith("per cent") and value < 300 * unit:
                continue
            printed = {
                "cut": cut, "last digit": value - unit if cut == value else value + unit, "rank": places(2 * count, decimals),
                "half": places(count // 2, decimals), "matrices": places(layers * 2 * d * r * (matrices + 1), decimals),
                "a third of a per cent": value + unit * max(3, int(value / unit / 300)), "3 per cent": places(count * 103 // 100, decimals),
                "7 per cent": places(count * 107 // 100, decimals),
            }.get(kind, value)  # fmt: skip
            add(matrices, r, printed, decimals)
            break
    return rows


def _misprint_probe(layers: int, d: int):
    def probe(rng):
        s = Script()
        rows = _table(rng, layers, d)
        s.input("rows", np.array([row[1:] for row in rows], dtype=float))
        s.send("names", s.call(rows, layers, d))
        return s

    return probe


def wrong_rows(rows, layers: int, d: int) -> list[str]:
    """The oracle: A and B of one matrix as arrays, the count as a decimal fraction, rounded to the digits that are printed."""
    found = []
    for k, (matrices, r, printed, decimals) in enumerate(rows):
        count = int(layers) * int(matrices) * entries(d, d, int(r), 1, 1)
        rounded = f"{Decimal(count).scaleb(-6).quantize(Decimal(1).scaleb(-int(decimals)), rounding=ROUND_HALF_UP)}"
        if Decimal(rounded) != Decimal(repr(float(printed))).quantize(Decimal(rounded)):
            found.append(f"row {k + 1}")
    return found


def _names(value) -> list[str] | None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        return None
    return sorted(value)


def _told(rows, name: str) -> str:
    """A row as the student sees it, for an example."""
    number = name.removeprefix("row ")
    if not number.isdigit() or not 1 <= int(number) <= len(rows):
        return f"{name!r} is no row"
    matrices, r, printed, decimals = rows[int(number) - 1]
    return f"e.g. {name}: {int(matrices)} matrices a layer, r = {int(r)}, printed {printed:.{int(decimals)}f}M"


def _misprint_judge(layers: int, d: int):
    def judge(inputs, answers):
        names = _names(answers["names"])
        if names is None:
            found = answers["names"]
            return f"expected a list of names, such as ['row 2', 'row 5']; found {'None' if found is None else repr(found)[:60]}"
        expected = sorted(wrong_rows(inputs["rows"], layers, d))
        setting = f"{layers} layers, d_model = {d}"
        missing, innocent = [n for n in expected if n not in names], [n for n in names if n not in expected]
        if missing:
            return f"{len(missing)} of {len(expected)} rows that don't follow are not found ({_told(inputs['rows'], missing[0])}; {setting})"
        if innocent:
            return f"{len(innocent)} rows are named that do follow ({_told(inputs['rows'], innocent[0])}; {setting})"
        if len(names) != len(set(names)):
            return "a row is named twice"
        return None

    return judge


_COUNTS = {
    "": ("", lambda L, m, d, r: 2 * L * m * d * r),
    "only_A": ("you count A alone: an adapted matrix has r (d + d)", lambda L, m, d, r: L * m * d * r),
    "one_layer": ("the count is for all layers", lambda L, m, d, r: 2 * m * d * r),
    "one_matrix": ("each layer has `matrices` adapted ones", lambda L, m, d, r: 2 * L * d * r),
    "full_matrix": ("r (d + d), not r · d · d", lambda L, m, d, r: L * m * d * d * r),
    "two_matrices": ("you count two matrices in every row; the row says how many", lambda L, m, d, r: 4 * L * d * r),
}
_RULES = {
    "": ("", lambda c, p, n: round(c, n) == round(p, n)),
    "cut": ("you cut digits off; a printed figure is rounded", lambda c, p, n: int(c * 10**n + 1e-9) == round(p * 10**n)),
    "exactly": ("nothing is printed in full: compare after rounding to the printed digits", lambda c, p, n: abs(c - p) < 1e-9),
    "rounded_up": ("you always round up; a printed figure is rounded to the nearest", lambda c, p, n: -(-c * 10**n // 1) == round(p * 10**n)),
    "per_cent": ("within 1 % is not the printed figure: round to as many digits as are printed", lambda c, p, n: abs(c - p) <= 0.01 * max(c, p)),
    "five_per_cent": ("within 5 % is not the printed figure: round to as many digits as are printed", lambda c, p, n: abs(c - p) <= 0.05 * max(c, p)),
    "ten_per_cent": ("within 10 % is not the printed figure: round to as many digits as are printed", lambda c, p, n: abs(c - p) <= 0.1 * max(c, p)),
    "one_decimal": ("rows are printed with `decimals` digits; you take one for all", lambda c, p, n: round(c, 1) == round(p, 1)),
    "two_decimals": ("rows are printed with `decimals` digits; you take two for all", lambda c, p, n: round(c, 2) == round(p, 2)),
    "whole": ("you compare whole millions; rows are printed with `decimals` digits", lambda c, p, n: round(c) == round(p)),
    "computed_one_decimal": ("you round to one digit; the row says to how many, `decimals`", lambda c, p, n: round(c, 1) == p),
    "computed_two_decimals": ("you round to two digits; the row says to how many, `decimals`", lambda c, p, n: round(c, 2) == p),
    "per_mille": ("within 0.1 % is not the printed figure: round to as many digits as are printed", lambda c, p, n: abs(c - p) <= 0.001 * max(c, p)),
    "a_tenth": ("rows are printed with `decimals` digits; you allow a tenth of a million in all", lambda c, p, n: abs(c - p) <= 0.1),
    "whole_cut": ("you cut all decimals off; rows are printed with `decimals` digits", lambda c, p, n: int(c) == int(p)),
    "unit": ("half a unit of the last digit is allowed, not a whole one", lambda c, p, n: abs(c - p) <= 10.0**-n + 1e-12),
}
_SCALE = {
    "": ("", lambda c: c / 1e6),
    "not_millions": ("the rows are in millions; your count is in ones", lambda c: c),
    "mebi": ("a million is 10⁶, not 2²⁰", lambda c: c / 2**20),
}
_WHICH = {
    "": ("", lambda follows: not follows),
    "inverted": ("these are the rows that DO follow; asked are the others", lambda follows: follows),
}


def _diagnose_misprints(evidence: list[Evidence]) -> Diagnosis | None:
    found = [e.answers.get("names") for e in evidence]
    if all(isinstance(f, (list, tuple)) and f and all(isinstance(v, (bool, np.bool_)) for v in f) for f in found):
        return Diagnosis("flags", "a list of True and False comes back; asked are the names of the rows")
    if all(isinstance(f, (list, tuple)) and f and all(isinstance(v, int) for v in f) for f in found):
        return Diagnosis("numbers_of_rows", "numbers come back; asked are the names of the rows, their first entry")
    if all(isinstance(f, (list, tuple)) and f and all(isinstance(v, (list, tuple)) for v in f) for f in found):
        return Diagnosis("whole_rows", "whole rows come back; asked are their names, the first entry")
    if all(isinstance(f, Mapping) and f for f in found):
        return Diagnosis("a_dict", "a dict comes back; asked is a list of the rows' names")
    names = [_names(f) for f in found]
    if None in names:
        return None
    wrong = [wrong_rows(e.inputs["rows"], L, d) for e, (L, d) in zip(evidence, PAPERS, strict=True)]
    if all(n == w[:1] for n, w in zip(names, wrong, strict=True)):
        return Diagnosis("first_only", "one name comes back, the first that doesn't follow: is the `return` inside the loop?")
    if not any(names):
        return None
    # Python's floats: numpy rounds 12.35 to one digit in another way
    tables = [(e.inputs["rows"].tolist(), L, d) for e, (L, d) in zip(evidence, PAPERS, strict=True)]
    if all(len(n) == len(t[0]) for n, t in zip(names, tables, strict=True)):
        scaled = "every row is named: is your count in the same unit as the table (millions), and rounded to `decimals` digits?"
        return Diagnosis("all_rows", scaled)
    aspects, right = [_COUNTS, _RULES, _SCALE, _WHICH], [""] * 4
    for count in (1, 2):
        matches = []
        for places in itertools.combinations(range(4), count):
            for keys in itertools.product(*[[key for key in aspects[p] if key] for p in places]):
                chosen = list(right)
                for p, key in zip(places, keys, strict=True):
                    chosen[p] = key
                c, rule, scale, which = (aspect[key][1] for aspect, key in zip(aspects, chosen, strict=True))
                answer = [
                    sorted(f"row {k + 1}" for k, (m, r, p, n) in enumerate(rows) if which(rule(scale(c(L, m, d, r)), p, int(n)))) for rows, L, d in tables
                ]
                if answer == names:
                    matches.append([(key, aspects[p][key][0]) for p, key in zip(places, keys, strict=True)])
        if matches:
            if len(matches) > 1:
                return None
            return Diagnosis("_and_".join(key for key, _ in matches[0]), "; and ".join(text for _, text in matches[0]))
    return None


def _lab_misprints(rows, layers, d_model):
    wrong = []
    for name, matrices, r, printed, decimals in rows:
        count = layers * matrices * r * 2 * d_model
        if round(count / 1e6, decimals) != printed:
            wrong.append(name)
    return wrong


PAPERS = ((96, 12288), (24, 1024), (36, 1280))  # layers, d_model: GPT-3 and GPT-2 medium, large

MISPRINTS = Exercise(
    id="4.5",
    title="Referee",
    difficulty=2,
    minutes=5,
    points=3,
    name="misprints",
    cases=tuple(
        Case(f"thirteen rows of a made-up table, {layers} layers, d_model = {d:,}", _misprint_probe(layers, d), _misprint_judge(layers, d))
        for layers, d in PAPERS
    ),
    diagnose=_diagnose_misprints,
    hints=(
        "For each row: what does the formula give? And how would you print that with so many decimals?",
        "All adapted matrices are d_model x d_model, so one has 2 · d_model · r. Times matrices, times layers, in millions, rounded to `decimals`.",
        "count = layers * matrices * r * 2 * d_model\nif round(count / 1e6, decimals) != printed: wrong.append(name)",
    ),
    read="Hu et al. 2021, section 5.1: |Θ| = 2 · L · d_model · r",
    fallback=lambda: _lab_misprints,
)


LAB = Lab(
    number="4",
    name="04_counting",
    title="Counting",
    minutes=45,
    core=True,
    objectives=(
        "count what an adapter adds to any layer, fused and narrow ones too, and the largest r a budget allows",
        "say what LoRA saves in memory and what it does not, account by account",
        "predict the peak of a training run from shapes, measure it, and explain the gap",
        "check a paper's figures against its own formulas",
    ),
    needs=("lab 02, or: a layer W0 x + (alpha / r) B A x, of which only A and B train",),
    exercises=(LAYER, RANK, BYTES, KEPT, MISPRINTS),
    predictions=(
        Prediction(
            "4.A", "LoRA trains nearly 10,000 times fewer numbers of GPT-3 than full fine-tuning does. The memory for weights, gradients and Adam falls",
            {"a": "about 10,000 times", "b": "about 100 times", "c": "about 4 times", "d": "hardly at all"},
        ),
        Prediction(
            "4.B", "GPT-2 medium with an adapter on every linear layer. Beside full fine-tuning, what the backward pass keeps of the activations is",
            {"a": "next to nothing", "b": "about half", "c": "as much, or a little more"},
        ),
        Prediction(
            "4.C", "The pocket GPT-2 trains on 4 x 128 tokens, once in full, once with LoRA on q and v. Beside the full run, LoRA's peak is",
            {"a": "below a tenth", "b": "a tenth to a half", "c": "half to nine tenths", "d": "more than nine tenths"},
        ),
        Prediction(
            "4.D", "GPT-2 medium, LoRA on q and v, r = 4: 0.1 % of the numbers train. Of the arithmetic of a full training step, how much is left?",
            {"a": "0.1 %", "b": "about 10 %", "c": "about two thirds", "d": "all of it, and a little more"},
        ),
    ),
)
