"""Lab 02b, Adapt a digit classifier: put LoRA into a model, compare methods over seeds, save what was trained.

The expectations are numpy's: a forward pass written with @, and a paired interval written from its textbook formula.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from ..exercise import Case, Diagnosis, Exercise, Lab, Prediction, compare
from ..script import Script, layer, linear

# ---------------------------------------------------------------------------------------------------------------------
# 2b.1  add_lora(model, names, r, alpha)
#
# r, alpha, 1 and all widths differ. "body.inner.middle" begins like a target and is none; "head" and "norm" stay as
# they are; one target lies at the top, one three levels down.

R, ALPHA = 3, 5
TARGETS = ("body.inner.mid", "stem")  # the nested one first: missing what is nested and stopping after one look different
SIZES = {"stem": (11, 7), "body.inner.mid": (13, 11), "body.inner.middle": (13, 13), "head": (4, 13)}  # (out, in)
RTOL = 1e-9  # float64, a few hundred products in a row: rounding about 1e-14, the smallest mistake about 1e-3


def _network(rng, s: Script):
    """The nested model, and its tensors as inputs for the oracle."""
    described = {}
    for name, shape in SIZES.items():
        weight, bias = rng.normal(size=shape) / math.sqrt(shape[1]), rng.normal(size=shape[0])
        s.input(f"{name}.weight", weight), s.input(f"{name}.bias", bias)
        described[name] = linear(weight, bias)
    gain, shift = rng.uniform(0.5, 1.5, size=13), rng.normal(size=13)
    s.input("norm.weight", gain), s.input("norm.bias", shift)
    inner = {"mid": described["body.inner.mid"], "act": layer("ReLU"), "middle": described["body.inner.middle"]}
    return s.module(
        {
            "stem": described["stem"],
            "act": layer("ReLU"),
            "body": {"inner": inner},
            "norm": layer("LayerNorm", weight=gain, bias=shift),
            "head": described["head"],
        }
    )


def _adapted(s: Script, model):
    return s.call(model, list(TARGETS), R, ALPHA)


def _oracle(inputs, update: float = 0.0):
    """The network in numpy, with `update` * B @ A added to the weights of the targets."""

    def apply(name, x):
        weight = inputs[f"{name}.weight"]
        if update and name in TARGETS:
            weight = weight + update * inputs[f"B {name}"] @ inputs[f"A {name}"]
        return x @ weight.T + inputs[f"{name}.bias"]

    h = np.maximum(apply("stem", inputs["x"]), 0)
    h = apply("body.inner.middle", np.maximum(apply("body.inner.mid", h), 0))
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)  # nn.LayerNorm's default eps
    return apply("head", h * inputs["norm.weight"] + inputs["norm.bias"])


def _probe_places(rng):
    s = Script()
    s.send("parameters", s.parameters(_adapted(s, _network(rng, s))))
    return s


def _judge_places(inputs, answers):
    shapes = {p["name"]: tuple(p["shape"]) for p in answers["parameters"]}
    adapted = _carriers(answers["parameters"])
    if adapted != set(TARGETS):
        return f"asked for adapters on {_listing(TARGETS)}; found lora_A on {_listing(adapted) or 'no layer'}"
    for name in TARGETS:
        out, inp = SIZES[name]
        for factor, expected in (("lora_A", (R, inp)), ("lora_B", (out, R))):
            found = shapes.get(f"{name}.{factor}")
            if found != expected:
                return f"{name}.{factor} has shape {found}, expected {expected} for r={R}"
    return None


def _judge_trainable(inputs, answers):
    found = {p["name"] for p in answers["parameters"] if p["requires_grad"]}
    expected = {f"{name}.{factor}" for name in TARGETS for factor in ("lora_A", "lora_B")}
    if found - expected:
        return f"besides the adapters these would train, too: {_listing(found - expected)}"
    if expected - found:
        return f"these are frozen and should train: {_listing(expected - found)}"
    return None


def _probe_start(rng):
    s = Script()
    x = s.input("x", rng.normal(size=(6, 7)))
    s.send("y", s.call(x, target=_adapted(s, _network(rng, s))))
    return s


def _judge_start(inputs, answers):
    return compare(answers["y"], _oracle(inputs), "the output at step 0, where B is 0,", rtol=RTOL)


def _probe_update(rng):
    s = Script()
    x = s.input("x", rng.normal(size=(6, 7)))
    model = _adapted(s, _network(rng, s))
    for name in TARGETS:
        out, inp = SIZES[name]
        s.set(model, f"{name}.lora_A", s.input(f"A {name}", rng.normal(size=(R, inp)) / math.sqrt(inp)))
        s.set(model, f"{name}.lora_B", s.input(f"B {name}", rng.normal(size=(out, R))))
    s.send("y", s.call(x, target=model))
    return s


def _judge_update(inputs, answers):
    return compare(answers["y"], _oracle(inputs, ALPHA / R), "the output with A and B set", rtol=RTOL)


def _probe_training(rng):
    s = Script()
    x = s.input("x", rng.normal(size=(6, 7)))
    model = _adapted(s, _network(rng, s))
    s.train(model, rng.normal(size=(6, 7)), rng.normal(size=(6, 4)), steps=3, lr=0.1)
    for name in TARGETS:
        s.send(f"B {name}", s.get(model, f"{name}.lora_B"))
        s.set(model, f"{name}.lora_B", np.zeros((SIZES[name][0], R)))
    s.send("y", s.call(x, target=model))
    return s


def _judge_training(inputs, answers):
    still = [name for name in TARGETS if not np.any(answers[f"B {name}"])]
    if still:
        return f"after three steps lora_B of {_listing(still)} is still 0: this adapter does not learn"
    return compare(answers["y"], _oracle(inputs), "after three steps, with B set back to 0, the output", rtol=RTOL)


def _carriers(parameters) -> set[str]:
    return {p["name"].removesuffix(".lora_A") for p in parameters if p["name"].endswith(".lora_A")}


def _listing(names) -> str:
    return ", ".join(sorted(names))


def _diagnose_add_lora(evidence):
    errors = [e.error for e in evidence if e.error is not None]
    if any(e.type == "AttributeError" and "body.inner.mid" in e.message for e in errors):
        return Diagnosis(
            "dotted_getattr",
            "`getattr` takes one name; for a path with dots there is `model.get_submodule(name)`",
        )
    if any(e.type == "RecursionError" for e in errors):
        return Diagnosis(
            "walks_into_the_new",
            "your walk never ends; most often it goes on inside the LoRALinear it has just put there, whose "
            "`base_layer` is a Linear, too. Collect the targets in a list first, then replace",
        )
    found = evidence[0].answers.get("parameters")
    if not isinstance(found, list):
        return None
    names = {p["name"] for p in found}
    adapted = _carriers(found)
    if any(".base_layer.base_layer" in name or name.endswith(".base_layer.lora_A") for name in names):
        return Diagnosis(
            "wrapped_twice",
            "a layer was wrapped twice: your loop walks into the new LoRALinear and finds its `base_layer`. "
            "Collect the targets in a list first, then replace",
        )
    if adapted - set(SIZES):
        return Diagnosis(
            "wrong_parent",
            f"the new layer landed at {_listing(adapted - set(SIZES))}, where there was none, and the old one is still at "
            'its place; set it on its parent, `model.get_submodule("body.inner")`',
        )
    if {"body.inner.mid.weight", "body.inner.mid.lora_A"} <= names:
        return Diagnosis(
            "dotted_setattr",
            '`setattr(model, "body.inner.mid", …)` makes a new part whose name has dots in it and leaves the old layer '
            "at its place; set it on its parent, `model.get_submodule(\"body.inner\")`",
        )
    if not adapted:
        return Diagnosis(
            "not_put_back",
            "the model that comes back has no adapter. `module = LoRALinear(module, …)` only gives a new value to your "
            "variable: the parent must get the new layer (`setattr(parent, child, …)`), in the model, not in a copy",
        )
    if adapted == set(SIZES):
        return Diagnosis("every_linear", "you adapt every Linear layer, the head too; only those in `names` are asked for")
    if "body.inner.middle" in adapted and "head" not in adapted:
        return Diagnosis(
            "substring", '"body.inner.mid" also fits the beginning of "body.inner.middle"; compare whole names'
        )
    if adapted == {"stem"}:
        return Diagnosis(
            "nested_missed",
            "the target inside `body.inner` was missed: `named_children` and `_modules` see one level only, "
            "`named_modules` and `get_submodule` see all",
        )
    if adapted == {TARGETS[0]}:
        return Diagnosis("only_the_first", "only the first of the names was adapted: does the `return` stand in the loop?")
    if adapted != set(TARGETS):
        return None
    shapes = {p["name"]: tuple(p["shape"]) for p in found}
    if shapes.get("stem.lora_A") == (ALPHA, SIZES["stem"][1]):
        return Diagnosis("r_alpha_swapped", f"the adapters have rank {ALPHA}: r and alpha stand in each other's place")
    train = {p["name"] for p in found if p["requires_grad"]}
    factors = {name for name in names if name.endswith((".lora_A", ".lora_B"))}
    if factors and not factors & train:
        return Diagnosis(
            "adapters_frozen", "you freeze the whole model after the adapters are in it, and so them, too; freeze first"
        )
    if factors - train:
        return Diagnosis("half_frozen", "one of the two factors is frozen; both A and B are trained")
    rest = train - factors
    if rest and all(name.endswith(".bias") for name in rest):
        return Diagnosis("biases_trainable", "the biases still train: freeze all parameters, not only the weights")
    if rest and all(name.startswith("norm.") for name in rest):
        return Diagnosis(
            "norm_trainable", "the LayerNorm still trains: it has parameters, too, although it is no Linear layer"
        )
    if rest:
        return Diagnosis(
            "rest_trainable", "LoRALinear freezes the layer that it wraps and no other; freeze the rest of the model as well"
        )
    return _diagnose_scaling(evidence)


def _diagnose_scaling(evidence):
    """Everything is in its place and the output with A and B set is not: which factor explains it?"""
    update = evidence[3]
    for factor, text in ((1, "1"), (ALPHA, "alpha"), (1 / R, "1 / r"), (R / ALPHA, "r / alpha"), (2, "2")):
        if compare(update.answers.get("y"), _oracle(update.inputs, factor), rtol=RTOL) is None:
            return Diagnosis("wrong_scaling", f"the update is multiplied by {text} instead of alpha / r; pass `alpha` on")
    return None


def _reference_add_lora(model, names, r, alpha):
    """The lab's own version: exact names, any depth."""
    from lora_lab.layers import LoRALinear

    targets = [(name, model.get_submodule(name)) for name in names]
    model.requires_grad_(False)
    for name, target in targets:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(target, r, alpha))
    return model


ADD_LORA = Exercise(
    id="2b.1",
    title="Wrap the named layers",
    difficulty=2,
    minutes=7,
    points=4,
    name="add_lora",
    cases=(
        Case("the named layers carry adapters, and no other layer does", _probe_places, _judge_places),
        Case("the adapters train, and nothing else does", _probe_places, _judge_trainable),
        Case("at step 0 the model computes what it did before", _probe_start, _judge_start),
        Case("alpha / r · B A reaches the output", _probe_update, _judge_update),
        Case("training moves the adapters and leaves the base alone", _probe_training, _judge_training),
    ),
    diagnose=_diagnose_add_lora,
    hints=(
        "Two jobs: freeze everything, and put a LoRALinear where each named layer stood. Which has to come first, "
        "if the new adapters are to stay trainable?",
        '`model.get_submodule("body.0")` finds a layer by its name. To put another in its place you need its parent: '
        '`parent, _, child = "body.0".rpartition(".")`, and `get_submodule("")` is the model itself.',
        "model.requires_grad_(False); then for each name: parent, _, child = name.rpartition('.'); "
        "setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), r, alpha)); "
        "at the end return model.",
    ),
    read="lora_lab/adapt.py, apply_lora: the same with all its refusals",
    fallback=lambda: _reference_add_lora,
)


# ---------------------------------------------------------------------------------------------------------------------
# 2b.2  paired_interval(a, b, t)


def _probe_interval(n: int, t: float, lead: float):
    """n seeds that lift both methods together; `lead` of a over b. A small lead changes its sign from seed to seed.

    Not n = 5: there the population's deviation over sqrt(n) is 2 / n times the sample's, and two mistakes look alike.
    """

    def probe(rng):
        s = Script()
        seed_luck = rng.normal(size=n)
        # Drawn until the signs are mixed where they should be: then |a - b| is another answer than a - b.
        while True:
            first, second = 0.004 * rng.normal(size=n), 0.009 * rng.normal(size=n)
            mixed = len(set(np.sign(lead + first - second))) == 2
            if mixed or lead > 0.05:
                break
        a = s.input("a", 0.83 + lead + 0.03 * seed_luck + first)
        b = s.input("b", 0.83 + 0.03 * seed_luck + second)
        s.input("t", np.float64(t))
        s.send("interval", s.call(a, b, t))
        return s

    return probe


def _probe_constant(rng):
    s = Script()
    a = rng.normal(0.8, 0.05, size=6)
    # Sixteenths, so that every difference is exactly the same number.
    a = np.round(a * 1024) / 1024
    s.input("t", np.float64(2.571))
    s.send("interval", s.call(s.input("a", a), s.input("b", a + 1 / 16), 2.571))
    return s


def _interval(a, b, t):
    """Mean and half-width in numpy, from the formula; the judge's and the diagnosis's oracle."""
    d = a - b
    return d.mean(), t * math.sqrt(((d - d.mean()) ** 2).sum() / (len(d) - 1)) / math.sqrt(len(d))


def _judge_mean(inputs, answers):
    return _two(answers["interval"]) or compare(
        answers["interval"][0], _interval(**inputs)[0], "the mean difference", rtol=RTOL
    )


def _judge_half(inputs, answers):
    # The constant lead has half-width 0, of which rounding may leave something like 1e-17.
    return _two(answers["interval"]) or compare(
        answers["interval"][1], _interval(**inputs)[1], "the half-width", rtol=RTOL, atol=1e-12
    )


def _two(found):
    found = found.tolist() if isinstance(found, np.ndarray) and found.ndim else found
    if not isinstance(found, list) or len(found) != 2:
        return "the function returned something other than two numbers: return mean, half_width"
    return None


def _diagnose_interval(evidence):
    first = evidence[0]
    found, inputs = first.answers.get("interval"), first.inputs
    if any(e.error is not None and e.error.type == "TypeError" for e in evidence):
        return None
    if isinstance(found, (int, float)) or (isinstance(found, np.ndarray) and found.ndim == 0):
        return Diagnosis("one_number", "only one number comes back; return both, `return mean, half_width`")
    if _two(found) is not None:
        return None
    mean, half = found
    a, b, t = inputs["a"], inputs["b"], float(inputs["t"])
    d, n = a - b, len(a)
    exact = _interval(a, b, t)
    if compare([mean, half], [exact[0] - exact[1], exact[0] + exact[1]], rtol=RTOL) is None:
        return Diagnosis("ends", "those are the two ends of the interval; return its middle and its half-width")
    if compare(mean, d.mean(), rtol=RTOL) is not None:
        if compare(mean, -d.mean(), rtol=RTOL) is None:
            return Diagnosis("sign", "you subtract a from b; the difference is a - b, positive where a is better")
        if compare(mean, np.median(d), rtol=RTOL) is None:
            return Diagnosis("median", "the middle of the interval is the median here; the mean is asked for")
        if compare(mean, np.abs(d).mean(), rtol=RTOL) is None:
            return Diagnosis("absolute", "you average |a - b|; the sign must stay, or luck in both directions adds up")
        if compare(mean, d.sum(), rtol=RTOL) is None:
            return Diagnosis("sum", "that is the sum of the differences; divide by n")
        if compare(mean, 100 * d.mean(), rtol=RTOL) is None:
            return Diagnosis("percent", "you return percent; the same unit as a and b is asked for, a share from 0 to 1")
        return None
    if compare(half, -_interval(a, b, t)[1], rtol=RTOL) is None:
        return Diagnosis("negative", "the half-width came out negative; the interval is mean ± half_width")
    return _explain_half(half, a, b, d, n, t)


def _explain_half(half, a, b, d, n, t):
    """Which combination of spread, divisor and factor gives the student's number? Named only if one is simpler than all others."""
    spreads = (
        (None, d.std(ddof=1)),
        ("population_std", d.std()),
        ("variance", d.var(ddof=1)),
        ("unpaired", math.sqrt(a.var(ddof=1) + b.var(ddof=1))),
        ("one_method", a.std(ddof=1)),
        ("one_method", b.std(ddof=1)),
        ("range", d.max() - d.min()),
        ("range", (d.max() - d.min()) / 2),
        ("mean_deviation", np.abs(d - d.mean()).mean()),
    )
    divisors = ((None, math.sqrt(n)), ("no_root_n", 1.0), ("divided_by_n", float(n)), ("root_n_minus_1", math.sqrt(n - 1)))
    factors = ((None, t), ("no_t", 1.0), ("twice", 2 * t), ("fixed_t", 1.96))
    texts = {
        "population_std": "the standard deviation is divided by n; of a sample it is divided by n - 1 "
        "(numpy: ddof=1; torch.std does so by itself)",
        "variance": "that is the variance; take its square root",
        "unpaired": "you combine the spreads of a and b, as for unrelated runs. Both ran on the same seeds: take the "
        "difference first, then its spread",
        "one_method": "that is the spread of one method alone; the spread of the differences a - b is asked for",
        "range": "that is the range of the differences; it grows with the number of seeds",
        "mean_deviation": "that is the mean distance from the mean; take the standard deviation",
        "no_root_n": "that is the spread of single seeds; the mean of n of them varies less, by sqrt(n)",
        "divided_by_n": "you divide by n; the spread of a mean shrinks with sqrt(n)",
        "root_n_minus_1": "n - 1 belongs inside the standard deviation; the spread of a mean shrinks with sqrt(n)",
        "fixed_t": "1.96 holds for many seeds; for a few use the t that was given",
        "no_t": "the factor t is missing: mean ± one standard error covers far less than 95 %",
        "twice": "that is the whole width; half of it is asked for",
    }
    matches = []
    for (spread, s), (divisor, q), (factor, f) in product(spreads, divisors, factors):
        if compare(half, f * s / q, rtol=RTOL) is None:
            matches.append([key for key in (spread, divisor, factor) if key])
    fewest = [match for match in matches if len(match) == min(map(len, matches))]
    if len(fewest) != 1 or not fewest[0]:
        return None
    return Diagnosis("_and_".join(fewest[0]), "; and ".join(texts[key] for key in fewest[0]))


def _reference_interval(a, b, t):
    difference = a - b
    return difference.mean().item(), t * difference.std().item() / len(difference) ** 0.5


INTERVAL = Exercise(
    id="2b.2",
    title="An interval for the difference",
    difficulty=2,
    minutes=6,
    points=3,
    name="paired_interval",
    cases=(
        Case("the mean of the differences, seed by seed", _probe_interval(7, 2.447, 0.005), _judge_mean),
        Case("the half-width, seven seeds", _probe_interval(7, 2.447, 0.07), _judge_half),
        Case("the half-width, eleven seeds", _probe_interval(11, 2.228, 0.005), _judge_half),
        Case("a lead that is the same at every seed has half-width 0", _probe_constant, _judge_half),
    ),
    diagnose=_diagnose_interval,
    hints=(
        "A lucky split helps both methods. What could you look at, seed by seed, in which that luck cancels?",
        "With d = a - b: the spread of the mean of n numbers is their standard deviation (divided by n - 1 inside) "
        "over sqrt(n). torch's `std` divides by n - 1 by itself.",
        "d = a - b; return d.mean().item(), t * d.std().item() / len(d) ** 0.5",
    ),
    read="the lines above the exercise",
    fallback=lambda: _reference_interval,
)


# ---------------------------------------------------------------------------------------------------------------------
# 2b.3  tensors_to_save(model)
#
# Adapters as peft names them (lora_A.weight), a frozen layer whose name has "lora" in it, and one trained layer besides:
# the head at the end, or "score" at the front, with a head that is frozen.


def _half_trained(rng, s: Script, trained: str):
    def weight(out, inp):
        return rng.normal(size=(out, inp)) / math.sqrt(inp)

    front = {"score": linear(weight(7, 7), rng.normal(size=7))} if trained == "score" else {}
    model = s.module(
        front
        | {
            "flora": linear(weight(11, 7), rng.normal(size=11)),
            "act": layer("Tanh"),
            "body": {
                "base_layer": linear(weight(13, 11), rng.normal(size=13)),
                "lora_A": linear(weight(R, 13)),
                "lora_B": linear(weight(13, R)),
            },
            "head": linear(weight(4, 13), rng.normal(size=4)),
        }
    )
    for frozen in ("flora", "body.base_layer", *(["head"] if trained == "score" else [])):
        s.method(s.get(model, frozen), "requires_grad_", False)
    return model


def _trained_names(trained: str) -> set[str]:
    return {"body.lora_A.weight", "body.lora_B.weight", f"{trained}.weight", f"{trained}.bias"}


def _probe_saved(trained: str):
    def probe(rng):
        s = Script()
        model = _half_trained(rng, s, trained)
        s.send("parameters", s.parameters(model))
        for name in sorted(_trained_names(trained)):
            s.send(f"is {name}", s.get(model, name))
        s.send("saved", s.call(model))
        return s

    return probe


def _judge_there(trained: str):
    def judge(inputs, answers):
        saved = answers["saved"]
        if not isinstance(saved, dict):
            return f"expected a dict, name -> tensor; found a {type(saved).__name__}"
        missing = _trained_names(trained) - set(saved)
        if missing:
            return f"these are trained and are not saved: {_listing(missing)}"
        for name in sorted(_trained_names(trained)):
            wrong = compare(saved[name], answers[f"is {name}"], name, rtol=0.0)  # a copy: bit for bit
            if wrong:
                return wrong
        return None

    return judge


def _judge_no_more(inputs, answers):
    saved = answers["saved"]
    if not isinstance(saved, dict):
        return f"expected a dict, name -> tensor; found a {type(saved).__name__}"
    more = set(saved) - _trained_names("score")
    return f"these are not trained and are saved all the same: {_listing(more)}" if more else None


def _probe_reload(rng):
    s = Script()
    model = _half_trained(rng, s, "head")
    fresh = s.copy(model)
    s.train(model, rng.normal(size=(6, 7)), rng.normal(size=(6, 4)), steps=3, lr=0.05)
    x = s.input("x", rng.normal(size=(5, 7)))
    s.send("expected", s.call(x, target=model))
    s.method(fresh, "load_state_dict", s.call(model), strict=False)
    s.send("y", s.call(x, target=fresh))
    return s


def _judge_reload(inputs, answers):
    return compare(answers["y"], answers["expected"], "the output of a fresh base that loads them", rtol=RTOL)


def _probe_later(rng):
    s = Script()
    model = _half_trained(rng, s, "head")
    for name in sorted(_trained_names("head")):
        s.send(f"is {name}", s.get(model, name))
    saved = s.call(model)
    s.train(model, rng.normal(size=(6, 7)), rng.normal(size=(6, 4)), steps=3, lr=0.05)
    s.send("saved", saved)
    s.send("afterwards", s.get(model, "head.weight"))
    return s


def _judge_later(inputs, answers):
    if np.array_equal(answers["afterwards"], answers["is head.weight"]):
        return "after saving, the model does not train any more: saving should leave the model alone"
    return _judge_there("head")(inputs, answers)


def _diagnose_save(evidence):
    first = evidence[0].answers
    saved, found = first.get("saved"), first.get("parameters")
    if isinstance(saved, list):
        return Diagnosis("no_dict", "a list comes back; return a dict, so that each tensor keeps its name")
    if not isinstance(saved, dict) or not isinstance(found, list):
        return None
    every, got = {p["name"] for p in found}, set(saved)
    trained = _trained_names("head")
    adapters = {name for name in trained if ".lora_" in name}
    if not got:
        return Diagnosis(
            "nothing_saved",
            "the dict is empty: the tensors of a state_dict are detached, so none of them requires a gradient; "
            "go through named_parameters()",
        )
    if got == every:
        return Diagnosis("whole_model", "that is the whole model, frozen base included; only what was trained belongs in")
    if got == every - trained:
        return Diagnosis("frozen_only", "those are the frozen tensors: the condition is the wrong way round")
    if got and not got & every and got <= {name.rpartition(".")[2] for name in every} | {n.split(".")[0] for n in every}:
        return Diagnosis(
            "short_names", "the names are cut short, so that tensors overwrite each other; keep those of named_parameters()"
        )
    if any("flora" in name for name in got):
        return Diagnosis(
            "name_contains_lora",
            '"lora" also stands in "flora", which is frozen: ask a parameter whether it trains, not what it is called',
        )
    if got == adapters:
        return Diagnosis(
            "head_forgotten",
            "the new head is missing. It was trained, too, and no base has it: after loading, it would be random",
        )
    if got == trained - adapters:
        return Diagnosis("adapters_forgotten", "the adapters are missing; only the head is there")
    if got == {name for name in trained if name.endswith(".weight")}:
        return Diagnosis("bias_forgotten", "the head's bias is missing; it was trained, too")
    if evidence[0].failure is None and evidence[1].failure is not None:
        return Diagnosis(
            "names_guessed",
            "right while the head is what was trained, wrong where it was another layer: names and places tell nothing, "
            "`requires_grad` does",
        )
    later = evidence[-1]
    if got == trained and "does not train any more" in (later.failure or ""):
        return Diagnosis("froze_the_model", "your function freezes the model; it should read and change nothing")
    if got == trained and later.failure is not None and all(e.failure is None for e in evidence[:-1]):
        return Diagnosis(
            "live_tensors",
            "these are the model's own tensors: going on with training changes what you saved. Add `.clone()`",
        )
    return None


def _reference_save(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


SAVE = Exercise(
    id="2b.3",
    title="Save what was trained",
    difficulty=2,
    minutes=5,
    points=3,
    name="tensors_to_save",
    cases=(
        Case("every trained tensor is there, adapters and head", _probe_saved("head"), _judge_there("head")),
        Case("also where another layer was trained than the head", _probe_saved("score"), _judge_there("score")),
        Case("nothing that was frozen is there", _probe_saved("score"), _judge_no_more),
        Case("a fresh base that loads them computes the same", _probe_reload, _judge_reload),
        Case("going on with training does not change what was saved", _probe_later, _judge_later),
    ),
    diagnose=_diagnose_save,
    hints=(
        "Which property of a parameter says whether training could change it? Its name does not.",
        "Go through `model.named_parameters()`, keep those with `requires_grad`. A parameter is live: "
        "the next optimizer step writes into it.",
        "return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}",
    ),
    read="PyTorch's tutorial on saving and loading models: what a state_dict is",
    fallback=lambda: _reference_save,
)


LAB = Lab(
    number="2b",
    name="02b_adapt_digits",
    title="Adapt a digit classifier",
    minutes=30,
    core=True,
    objectives=(
        "put LoRA into any model by the names of its layers, and say what trains",
        "compare adaptation methods fairly: same seeds, tuned learning rates, a paired interval",
        "use a control to find out whether a pretrained base helped at all",
        "say what an adapter forgets, and what its off switch gives back",
        "save an adapter so that it works when it is loaded",
    ),
    needs=("lab 02", "mean and standard deviation"),
    exercises=(ADD_LORA, INTERVAL, SAVE),
    predictions=(
        Prediction(
            "2b.A",
            "A network was trained on the digits 0 to 4. You freeze its body and train a new head for 5 to 9 "
            "(a linear probe). How many of the unseen 5 to 9 does it get right?",
            {
                "a": "under 45 %: the features are useless",
                "b": "45 to 90 %: they help, but lack something",
                "c": "over 90 %: strokes are strokes",
            },
        ),
        Prediction(
            "2b.B",
            "LoRA has adapted the body to 5 to 9; every weight of the base is frozen. You put the old head back and "
            "leave the adapter on. What about the digits 0 to 4?",
            {
                "a": "as good as before: the base is frozen",
                "b": "clearly worse, by 3 points or more",
                "c": "no better than guessing, 20 %",
            },
        ),
        Prediction(
            "2b.C",
            "Now a control: the same LoRA, r=4, on a base with random weights that never saw a digit. "
            "How well does it learn 5 to 9?",
            {
                "a": "hardly above guessing: there is nothing to adapt",
                "b": "clearly worse than with the pretrained base, by 5 points or more",
                "c": "about as well, within 5 points",
            },
        ),
    ),
)
