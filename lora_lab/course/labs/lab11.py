"""Lab 11, Claims on trial: its exercises, and the votes, which are the claims of data/claims.yaml.

Sources: data/claims.yaml; Hu et al. 2021 (arXiv 2106.09685). Oracles are numpy, never the formula that is asked for.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from lora_lab.claims import load

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script, layer, linear

RTOL = 1e-6  # float64 all the way leaves 1e-13; a student may pass through float32 in places, a mistake changes the first digits


# ---------------------------------------------------------------------------------------------------------------------
# 11.1  verdict(measured, line)
#
# Each case sends several settings, so that a rule of thumb that is right by luck in one is wrong in another.

WORDS = ("true", "false", "depends", "unsettled")


def _high(rng, n):
    return [round(float(v), 3) for v in rng.uniform(1.2, 3.0, n)]


def _low(rng, n):
    return [round(float(v), 3) for v in rng.uniform(-2.0, 0.8, n)]


def _settings(kind: str, rng) -> list[dict]:
    high, low = (lambda n: _high(rng, n)), (lambda n: _low(rng, n))
    if kind == "one answer":
        return [{"merged": high(3), "apart": high(3)}, {"merged": low(3), "apart": low(2)}, {"digits": high(1)}, {"digits": low(4)}]
    if kind == "conditions":
        return [{"merged": high(3), "apart": low(3)}, {"r = 2": low(2), "r = 8": low(3), "r = 64": high(1)}, {"a": low(1), "b": high(4)}]
    if kind == "seeds":
        far = [2.9, 2.8, round(float(rng.uniform(0.2, 0.8)), 3)]  # the mean, the median and most seeds lie above the line
        settings = [{"noise": far}, {"merged": high(3), "apart": [*low(2), *high(1)]}, {"merged": low(2), "apart": [0.5, 1.6]}]
        return [*settings, {"a": high(2), "b": low(2), "c": far}]
    return [{"a": [1.0, 1.0]}, {"a": high(2), "b": [1.0]}, {"a": [1.0, 1.5]}]  # on the line


def _verdict_probe(kind: str):
    def probe(rng):
        s = Script()
        for i, measured in enumerate(_settings(kind, rng)):
            for name, numbers in measured.items():
                s.input(f"{i}/{name}", np.array(numbers))
            s.send(f"verdict {i}", s.call(measured, 1.0))
        return s

    return probe


def _grouped(inputs) -> dict[int, dict[str, list[float]]]:
    """Settings by number, as the probe wrote them down."""
    settings: dict[int, dict[str, list[float]]] = {}
    for key, numbers in inputs.items():
        number, _, name = key.partition("/")
        settings.setdefault(int(number), {})[name] = list(np.atleast_1d(numbers))
    return settings


def right_verdict(measured, line: float = 1.0) -> str:
    """The oracle: count for each condition how many numbers lie above the line."""
    shares = np.array([np.mean(np.asarray(numbers) > line) for numbers in measured.values()])
    if np.any((shares > 0) & (shares < 1)):
        return "unsettled"
    return {0: "false", len(shares): "true"}.get(int(shares.sum()), "depends")


def _verdict_judge(inputs, answers):
    for i, measured in _grouped(inputs).items():
        found, expected = answers[f"verdict {i}"], right_verdict(measured)
        if found != expected:
            told = ", ".join(f"{name}: {' '.join(f'{v:g}' for v in numbers)}" for name, numbers in measured.items())
            shown = repr(found) if isinstance(found, (str, bool, int, float)) or found is None else f"a {type(found).__name__}"
            return f"line 1, {told}: you say {shown}, expected {expected!r}"
    return None


def _mean(numbers):
    return sum(numbers) / len(numbers)


def _by_condition(vote):
    """A rule that makes one vote of each condition first, and so never sees that seeds disagree."""

    def rule(m):
        votes = {vote(v) for v in m.values()}
        return "depends" if len(votes) == 2 else "true" if votes == {True} else "false"

    return rule


_RULES = {
    "mean_of_seeds": ("you take the mean over the seeds first. Then one lucky seed can decide; look at every number", _by_condition(lambda v: _mean(v) > 1)),
    "majority": ("you count the majority of seeds. Two against one settles nothing", _by_condition(lambda v: sum(x > 1 for x in v) > len(v) / 2)),
    "any_seed": ("one seed above the line is enough for you; all must be, or the seeds disagree", _by_condition(lambda v: any(x > 1 for x in v))),
    "all_seeds": (
        "a condition whose seeds disagree counts as false for you; that is what 'unsettled' is for", _by_condition(lambda v: all(x > 1 for x in v)),
    ),
    "one_heap": (
        "you throw all conditions into one heap. Conditions that disagree with each other are 'depends'; seeds of one condition that disagree, 'unsettled'",
        lambda m: {(True, True): "true", (False, False): "false"}.get(
            (all(x > 1 for v in m.values() for x in v), any(x > 1 for v in m.values() for x in v)), "depends"
        ),
    ),
    "heap_unsettled": (
        "whatever is not of one mind is 'unsettled' for you. Conditions that disagree, each of one mind, are 'depends'",
        lambda m: {(True, True): "true", (False, False): "false"}.get(
            (all(x > 1 for v in m.values() for x in v), any(x > 1 for v in m.values() for x in v)), "unsettled"
        ),
    ),
    "words_swapped": (
        "'depends' and 'unsettled' are swapped: conditions that disagree are 'depends', seeds that disagree 'unsettled'",
        lambda m: {"depends": "unsettled", "unsettled": "depends"}.get(right_verdict(m), right_verdict(m)),
    ),
    "upside_down": ("the claim holds above the line", lambda m: right_verdict({k: [2 - x if x != 1 else 1 for x in v] for k, v in m.items()})),
    "truth_swapped": (
        "'true' and 'false' are swapped: the claim holds above the line",
        lambda m: {"true": "false", "false": "true"}.get(right_verdict(m), right_verdict(m)),
    ),
    "on_the_line": ("a number on the line speaks against the claim: > and not >=", lambda m: right_verdict({k: [x + 1e-9 for x in v] for k, v in m.items()})),
    "depends_first": (
        "you ask whether conditions disagree before you ask whether seeds do: where seeds disagree, it is unsettled whatever else there is",
        lambda m: "depends"
        if any(all(x > 1 for x in v) for v in m.values()) and any(not any(x > 1 for x in v) for v in m.values())
        else right_verdict(m),
    ),
    "all_unsettled": (
        "only where every condition's seeds disagree you say 'unsettled'; one such condition is enough",
        lambda m: "unsettled"
        if all(0 < sum(x > 1 for x in v) < len(v) for v in m.values())
        else _by_condition(lambda v: sum(x > 1 for x in v) > len(v) / 2)(m),
    ),
    "any_condition": (
        "one condition for which the claim holds is enough for you; where another speaks against it, it depends",
        lambda m: {"depends": "true"}.get(right_verdict(m), right_verdict(m)),
    ),
    "no_depends": (
        "one condition that speaks against the claim makes it false for you; where another speaks for it, it depends",
        lambda m: {"depends": "false"}.get(right_verdict(m), right_verdict(m)),
    ),
    "first_only": ("you judge the first condition alone", lambda m: right_verdict(dict([next(iter(m.items()))]))),
    "last_only": ("you judge the last condition alone (does your loop return too late, or overwrite?)", lambda m: right_verdict(dict([list(m.items())[-1]]))),
    "mean_of_all": ("you take one mean over everything", lambda m: "true" if _mean([x for v in m.values() for x in v]) > 1 else "false"),
    "two_words": (
        "you know only 'true' and 'false'. Conditions or seeds that disagree have words of their own",
        lambda m: "true" if all(x > 1 for v in m.values() for x in v) else "false",
    ),
}  # fmt: skip


def _diagnose_verdict(evidence: list[Evidence]) -> Diagnosis | None:
    found, settings = [], []
    for e in evidence:
        for i, measured in _grouped(e.inputs).items():
            if f"verdict {i}" in e.answers:
                found.append(e.answers.get(f"verdict {i}"))
                settings.append(measured)
    error = evidence[0].error
    if error is not None and "'>' not supported between instances of 'list'" in str(error.message):
        return Diagnosis("list_compared", "you compare a whole list with the line; compare each of its numbers")
    if not found:
        return None
    if all(isinstance(f, bool) for f in found):
        return Diagnosis("a_bool", "you return True or False; asked is one of four words")
    texts = [f for f in found if isinstance(f, str)]
    if len(texts) == len(found) and any(f not in WORDS for f in texts) and all(f.strip().lower() in WORDS for f in texts):
        return Diagnosis("other_letters", f"the words are {', '.join(WORDS)}, in small letters; found {next(f for f in texts if f not in WORDS)!r}")
    matching = [key for key, (_, rule) in _RULES.items() if [rule(m) for m in settings] == found]
    return Diagnosis(matching[0], _RULES[matching[0]][0]) if len(matching) == 1 else None


def _lab_verdict(measured, line):
    votes = [{number > line for number in numbers} for numbers in measured.values()]
    if any(len(vote) == 2 for vote in votes):
        return "unsettled"
    together = set().union(*votes)
    return "depends" if len(together) == 2 else "true" if together == {True} else "false"


VERDICT = Exercise(
    id="11.1",
    title="The court's rule",
    difficulty=1,
    minutes=5,
    points=3,
    name="verdict",
    cases=(
        Case("numbers of one mind", _verdict_probe("one answer"), _verdict_judge),
        Case("conditions that disagree", _verdict_probe("conditions"), _verdict_judge),
        Case("seeds that disagree", _verdict_probe("seeds"), _verdict_judge),
        Case("a number on the line speaks against the claim", _verdict_probe("line"), _verdict_judge),
    ),
    diagnose=_diagnose_verdict,
    hints=(
        "Ask each condition first: are its numbers of one mind?",
        "A set tells: {number > line for number in numbers} has two members where seeds disagree. After that the same for the conditions.",
        "votes = [{number > line for number in numbers} for numbers in measured.values()]; if any has 2 members: 'unsettled'; else put them "
        "together with set().union(*votes): two members 'depends', {True} 'true', {False} 'false'",
    ),
    read="the four verdicts above this exercise",
    fallback=lambda: _lab_verdict,
)


# ---------------------------------------------------------------------------------------------------------------------
# 11.2  nonlinearity(update, x, y)

WORLDS = ("low rank", "relu", "tanh", "quiet relu", "loud", "loud relu")


SIZES = ("relu", "quiet relu", "loud", "loud relu")  # in one case, on one network: their numbers can be compared


def _module(kind: str, A, B):
    size = {"quiet": 1e-6, "loud": 1e6}.get(kind.split()[0], 1.0)
    between = [layer("ReLU")] if kind.endswith("relu") else [layer("Tanh")] if kind == "tanh" else []
    return [linear(A), *between, linear(size * B)]


def _linear_probe(*kinds: str):
    def probe(rng):
        s = Script()
        A, B = rng.normal(size=(4, 11)), rng.normal(size=(7, 4))
        s.input("A", A)
        s.input("B", B)
        # A x and A y are chosen, so that a ReLU is on for one and off for the other, and on for something in x + y, x - y and -x
        small, large = rng.uniform(0.3, 0.8, 4), rng.uniform(1.0, 2.0, 4)
        back = np.linalg.pinv(A)
        x = s.input("x", back @ (large * [1, 0, 1, 0] - small * [0, 1, 0, 1]))
        y = s.input("y", back @ (large[::-1] * [0, 1, 0, 0] + small[::-1] * [-1, 0, 1, -1]))
        for kind in kinds:
            s.send(kind, s.call(s.module(_module(kind, A, B)), x, y))
        return s

    return probe


def _scalar(value) -> float | None:
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iuf":
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _linear_judge(limits: dict[str, str]):
    def judge(inputs, answers):
        for kind, side in limits.items():
            found = _scalar(answers[kind])
            if found is None:
                return f"the answer for {_WORLD_WORDS[kind]} is not one finite number"
            if side == "zero" and not abs(found) < 1e-6:
                return f"{_WORLD_WORDS[kind]} gets {found:.3g}, expected 0 up to rounding: it is linear"
            if side == "large" and found < 0.01:
                return f"{_WORLD_WORDS[kind]} gets {found:.3g}, expected at least 0.01: it is not linear"
        return None

    return judge


_WORLD_WORDS = {
    "low rank": "B A x", "relu": "B relu(A x)", "tanh": "B tanh(A x)", "quiet relu": "10⁻⁶ · B relu(A x)", "loud": "10⁶ · B A x",
    "loud relu": "10⁶ · B relu(A x)",
}  # fmt: skip


def _diagnose_linear(evidence: list[Evidence]) -> Diagnosis | None:
    answers = {kind: e.answers.get(kind) for e in evidence for kind in WORLDS if kind in e.answers}
    if any(isinstance(value, bool) for value in answers.values()):
        return Diagnosis("yes_or_no", "you return yes or no; asked is how far from linear it is, a number")
    if any(isinstance(value, np.ndarray) and value.size > 1 for value in answers.values()):
        return Diagnosis("not_a_number", "this is a row of numbers, one for each output; asked is one number: take the norm")
    found = {kind: _scalar(value) for kind, value in answers.items()}
    if any(value is None for value in found.values()) or set(found) != set(WORLDS):
        return None
    small = {kind: abs(value) < 1e-6 for kind, value in found.items()}
    every = [_scalar(value) for e in evidence for value in (e.answers.get(kind) for kind in WORLDS if kind in e.answers)]
    if any(value is not None and value < -1e-6 for value in every):
        return Diagnosis("signed", "your number can be below 0: differences of both signs then cancel. Take a norm")
    if all(value == 0 for value in found.values()):
        return Diagnosis("always_zero", "you say 0 in every world: an experiment that can't lose proves nothing")
    if not small["low rank"]:
        value = found["low rank"]
        return Diagnosis("convicts_lora", f"your test gives a plain B A x {value:.3g}: it would convict LoRA itself. What holds for every linear map?")
    if small["relu"] and not small["tanh"]:
        return Diagnosis("scaling_only", "you test factors alone, and a ReLU lets positive factors through: relu(2 x) = 2 relu(x). Test a sum")
    if small["tanh"] and not small["relu"]:
        return Diagnosis("sign_only", "you test f(−x) = −f(x) alone, and tanh is odd, too. Test a sum")
    sized = {kind: _scalar(evidence[2].answers.get(kind)) for kind in SIZES}
    for kind, size in (("quiet relu", 1e-6), ("loud relu", 1e6)):  # a relative number does not notice the size
        ratio = sized[kind] / sized["relu"] if sized["relu"] else math.nan
        if math.isclose(ratio, size, rel_tol=1e-3):
            return Diagnosis("absolute", "your number grows with the outputs: divide by the norm of what you compare with")
        if math.isclose(ratio, size**2, rel_tol=1e-3):
            return Diagnosis("absolute_square", "your number grows with the square of the outputs: divide by the square of their norm, or take norms")
        if math.isclose(ratio, 1 / size, rel_tol=1e-3):
            return Diagnosis("over_divided", "your number shrinks as the outputs grow: you divide by more than one norm")
    return None


def _lab_nonlinearity(update, x, y):
    together, apart = update(x + y), update(x) + update(y)
    return ((together - apart).norm() / apart.norm()).item()


NONLINEARITY = Exercise(
    id="11.2",
    title="Made from the input?",
    difficulty=2,
    minutes=6,
    points=4,
    name="nonlinearity",
    cases=(
        Case("a plain B A x is acquitted", _linear_probe("low rank"), _linear_judge({"low rank": "zero"})),
        Case("a ReLU or a tanh in between is convicted", _linear_probe("relu", "tanh"), _linear_judge({"relu": "large", "tanh": "large"})),
        Case("the size of the outputs plays no part", _linear_probe(*SIZES), _linear_judge({"quiet relu": "large", "loud": "zero", "loud relu": "large"})),
    ),
    diagnose=_diagnose_linear,
    hints=(
        "What holds for every linear map and every x and y, and fails for a ReLU?",
        "f(x + y) = f(x) + f(y). How far apart are the two sides, beside how large they are?",
        "together, apart = update(x + y), update(x) + update(y); return ((together - apart).norm() / apart.norm()).item()",
    ),
    read="lab 02, Merge: why there is no activation between A and B",
    fallback=lambda: _lab_nonlinearity,
)


# ---------------------------------------------------------------------------------------------------------------------
# 11.3  paired_effect(mine, rival)

FIVE, EIGHT = dict(n=5, spread=8.0, noise=0.6, gain=-1.1), dict(n=8, spread=5.0, noise=1.5, gain=2.3)


def _paired_probe(size):
    def probe(rng):
        s = Script()
        luck = 70 + size["spread"] * rng.normal(size=size["n"])  # what a seed does to both
        rival = s.input("rival", luck + 0.4 * rng.normal(size=size["n"]))
        mine = s.input("mine", luck + size["gain"] + size["noise"] * rng.normal(size=size["n"]))
        s.send("effect", s.call(mine, rival))
        return s

    return probe


def _paired_judge(inputs, answers):
    found = answers["effect"]
    if not isinstance(found, (list, np.ndarray)) or len(np.shape(found)) != 1 or len(found) != 2:
        return "expected two numbers, (mean difference, its standard error)"
    d = inputs["mine"] - inputs["rival"]
    error = math.sqrt(sum((v - d.sum() / len(d)) ** 2 for v in d) / (len(d) - 1) / len(d))
    for value, expected, what in ((found[0], d.sum() / len(d), "the mean difference"), (found[1], error, "its standard error")):
        wrong = compare(value, expected, what=what, rtol=RTOL)
        if wrong:
            return wrong
    return None


_MEANS = {
    "": ("", lambda a, b: np.mean(a - b)),
    "reversed": ("the difference is the wrong way round: asked is mine less rival", lambda a, b: np.mean(b - a)),
    "mine_only": ("this is the mean of mine; the control is missing", lambda a, b: np.mean(a)),
    "ratio": ("this is a ratio; asked is a difference", lambda a, b: np.mean(a) / np.mean(b)),
    "relative": ("this is relative to the rival; asked is the difference itself", lambda a, b: np.mean(a - b) / np.mean(b)),
    "median": ("this is the median of the differences", lambda a, b: np.median(a - b)),
    "best": ("you compare the best seed of each", lambda a, b: np.max(a) - np.max(b)),
    "summed": ("you add the differences; divide by how many there are", lambda a, b: np.sum(a - b)),
    "absolute": ("you drop the signs: a loss would count as a gain", lambda a, b: np.mean(np.abs(a - b))),
}
_ERRORS = {
    "": ("", lambda a, b: np.std(a - b, ddof=1) / math.sqrt(len(a))),
    "biased": (
        "np.std and correction=0 divide by n; with so few seeds divide by n − 1 (ddof=1, torch's default)",
        lambda a, b: np.std(a - b) / math.sqrt(len(a)),
    ),
    "one_run": ("this is the spread of one difference; that of the mean of n is √n smaller", lambda a, b: np.std(a - b, ddof=1)),
    "one_run_biased": ("this is the spread of one difference, by n: divide by n − 1 instead, and by √n for the mean", lambda a, b: np.std(a - b)),
    "by_n": ("divide by √n, not by n", lambda a, b: np.std(a - b, ddof=1) / len(a)),
    "variance": ("this is a variance: take the root", lambda a, b: np.var(a - b, ddof=1) / len(a)),
    "variance_whole": ("this is the variance of the differences: take its root, and divide by √n", lambda a, b: np.var(a - b, ddof=1)),
    "unpaired": (
        "you add the spreads of both sides, as if their seeds had nothing to do with each other. The same seed is lucky for both: take differences first",
        lambda a, b: math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b)),
    ),
    "mine_only": ("this is the spread of mine alone", lambda a, b: np.std(a, ddof=1) / math.sqrt(len(a))),
    "difference_of_errors": (
        "you subtract two spreads; take the spread of the differences",
        lambda a, b: (np.std(a, ddof=1) - np.std(b, ddof=1)) / math.sqrt(len(a)),
    ),
    "root_n_minus_1": ("n − 1 belongs under the sum of squares; the mean of n has √n", lambda a, b: np.std(a - b, ddof=1) / math.sqrt(len(a) - 1)),
    "interval": ("this is half of a 95 % interval; asked is the standard error itself", lambda a, b: 1.96 * np.std(a - b, ddof=1) / math.sqrt(len(a))),
    "always_five": ("you divide by √5; there are not always five seeds: √n", lambda a, b: np.std(a - b, ddof=1) / math.sqrt(5)),
    "pooled": (
        "you pool the spreads of both sides, as if their seeds had nothing to do with each other; take the differences first, and divide by √n",
        lambda a, b: math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2),
    ),
    "mean_of_spreads": ("you average two spreads; take the spread of the differences", lambda a, b: (np.std(a, ddof=1) + np.std(b, ddof=1)) / 2),
    "spread_less_spread": ("you subtract two spreads; take the spread of the differences", lambda a, b: np.std(a, ddof=1) - np.std(b, ddof=1)),
    "not_centred": ("take the mean off before you square", lambda a, b: math.sqrt(np.mean((a - b) ** 2) / len(a))),
    "interval_two": ("this is twice the standard error; asked is the standard error itself", lambda a, b: 2 * np.std(a - b, ddof=1) / math.sqrt(len(a))),
}  # fmt: skip


def _diagnose_paired(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(e.answers.get("effect"), e.inputs["mine"], e.inputs["rival"]) for e in evidence]
    if all(_scalar(found) is not None for found, _, _ in runs):
        return Diagnosis("one_number", "this is one number; asked are two: the mean difference, and its standard error")
    if any(not isinstance(found, (list, np.ndarray)) or np.shape(found) != (2,) for found, _, _ in runs):
        return None
    candidates = {}
    for (m, (_, mean)), (e, (_, error)) in product(_MEANS.items(), _ERRORS.items()):
        candidates[(m, e)] = [np.array([mean(a, b), error(a, b)]) for _, a, b in runs]
        candidates[(m, e, "swapped")] = [values[::-1] for values in candidates[(m, e)]]
    # The error is a tenth of the mean or less: each is compared by itself.
    keys = [
        key for key, values in candidates.items()
        if all(compare(np.asarray(f)[i], v[i], rtol=RTOL) is None for (f, _, _), v in zip(runs, values, strict=True) for i in (0, 1))
    ]  # fmt: skip
    if len(keys) != 1 or keys[0] == ("", ""):
        return None
    m, e, *swapped = keys[0]
    parts = [_MEANS[m][0]] * bool(m) + [_ERRORS[e][0]] * bool(e) + ["the order is (mean, standard error)"] * bool(swapped)
    name = "_and_".join([f"mean_{m}"] * bool(m) + [e] * bool(e) + ["swapped"] * bool(swapped))
    return Diagnosis(name, "; and ".join(parts))


def _lab_paired(mine, rival):
    d = mine - rival
    return float(d.mean()), float(d.std() / len(d) ** 0.5)


PAIRED = Exercise(
    id="11.3",
    title="An effect, or luck?",
    difficulty=2,
    minutes=5,
    points=3,
    name="paired_effect",
    cases=(
        Case("five seeds", _paired_probe(FIVE), _paired_judge),
        Case("eight seeds", _paired_probe(EIGHT), _paired_judge),
    ),
    diagnose=_diagnose_paired,
    hints=(
        "A lucky seed is lucky for both sides. What remains of that luck in the difference?",
        "d = mine - rival, then the spread of d (over n − 1, as torch's std does); the mean of n numbers spreads √n times less than one.",
        "d = mine - rival; return float(d.mean()), float(d.std() / len(d) ** 0.5)",
    ),
    read="lab 02b, Better, or luckier?",
    fallback=lambda: _lab_paired,
)


# ---------------------------------------------------------------------------------------------------------------------
# 11.4  worlds(B, A)

LEAST = 0.4  # two independent adapters have 0.7, an adapter of zeros 0.5


def _worlds_probe(out: int, inputs: int, r: int):
    def probe(rng):
        s = Script()
        B, A = s.input("B", rng.normal(size=(out, r))), s.input("A", rng.normal(size=(r, inputs)))
        s.send("worlds", s.call(B, A))
        return s

    return probe


def _pairs(found, inputs):
    """((B, A) where the claim is true, (B, A) where it is false), or a sentence."""
    if not isinstance(found, list) or len(found) != 2 or any(not isinstance(pair, list) or len(pair) != 2 for pair in found):
        return "expected two pairs, ((B, A), (B, A)): first the world in which the claim is true"
    pairs = []
    for where, pair in zip(("true", "false"), found, strict=True):
        for name, matrix in zip("BA", pair, strict=True):
            wanted = np.asarray(inputs[name])
            wrong = compare(matrix, np.zeros_like(wanted), what=f"{name} of the {where} world", rtol=0, atol=math.inf)
            if wrong:
                return wrong
        pairs.append(tuple(np.asarray(matrix, dtype=np.float64) for matrix in pair))
    return pairs


def averaging_error(B, A, B2, A2) -> float:
    """The oracle: product of the averages beside average of the products, relative to the larger of the two updates' norms."""
    wanted = np.einsum("or,ri->oi", B, A) / 2 + np.einsum("or,ri->oi", B2, A2) / 2
    got = np.einsum("or,ri->oi", B + B2, A + A2) / 4
    size = np.linalg.norm(wanted)
    return float(np.linalg.norm(got - wanted) / size) if size > 1e-12 else math.inf if np.linalg.norm(got) > 1e-9 else 0.0


def _worlds_judge(inputs, answers):
    pairs = _pairs(answers["worlds"], inputs)
    if isinstance(pairs, str):
        return pairs
    B, A = inputs["B"], inputs["A"]
    (B1, A1), (B2, A2) = pairs
    moved = np.linalg.norm(B1 @ A1 - B @ A) / np.linalg.norm(B @ A)
    if moved < 0.1:
        return f"the true world's update is the given one ({moved:.0%} away): an adapter averaged with itself is no test"
    error = averaging_error(B, A, B1, A1)
    if error > 1e-5:
        return f"in the true world averaging the factors is {error:.0%} off"
    error = averaging_error(B, A, B2, A2)
    if error < LEAST:
        return f"in the false world averaging the factors is only {error:.0%} off, asked is {LEAST:.0%}"
    return None


def _diagnose_worlds(evidence: list[Evidence]) -> Diagnosis | None:
    e = evidence[0]
    found = e.answers.get("worlds")
    B, A = e.inputs["B"], e.inputs["A"]
    if isinstance(found, dict):
        return Diagnosis("a_dict", "this is a dict; asked are two pairs in order, the true world first")
    if isinstance(found, list) and len(found) == 4 and all(isinstance(m, np.ndarray) for m in found):
        return Diagnosis("flat", "these are four matrices in a row; asked are two pairs: (B, A), (B, A)")
    if isinstance(found, list) and len(found) == 2 and all(isinstance(m, np.ndarray) and m.shape == (len(B), A.shape[1]) for m in found):
        return Diagnosis("products", "these are updates B A; asked are their factors, since factors are what gets averaged")
    if isinstance(found, list) and len(found) == 2 and all(isinstance(m, np.ndarray) for m in found):
        return Diagnosis("one_world", "this is one adapter; asked are two: one for each world")
    if isinstance(found, list) and len(found) == 2 and all(isinstance(p, list) and len(p) == 2 for p in found):
        if all(isinstance(b, np.ndarray) and b.shape == A.shape and isinstance(a, np.ndarray) and a.shape == B.shape for b, a in found):
            return Diagnosis("A_first", "each pair is (B, A), in this order")
        if isinstance(found[0][0], np.ndarray) and found[0][0].shape == A.T.shape and np.shape(found[0][1]) == B.T.shape:
            return Diagnosis("transposed", "your true world's factors have the shapes of Aᵀ and Bᵀ: B is (out, r), A is (r, in)")
    pairs = _pairs(found, e.inputs) if found is not None else ""
    if isinstance(pairs, str):
        return None
    (B1, A1), (B2, A2) = pairs
    true_error, false_error = averaging_error(B, A, B1, A1), averaging_error(B, A, B2, A2)
    moved = np.linalg.norm(B1 @ A1 - B @ A) / np.linalg.norm(B @ A)
    if false_error < 1e-9 and true_error >= LEAST:
        return Diagnosis("worlds_swapped", "the worlds are swapped: first the one in which the claim is true")
    if moved < 0.1:
        same = np.allclose(B1, B) and np.allclose(A1, A)
        other = "the true world's factors are others, their product is not: it is the given update again"
        text = "the true world is the given adapter itself" if same else other
        return Diagnosis("same_update", f"{text}. Averaging a thing with itself shows nothing")
    if true_error > 1e-5:
        factors = [np.allclose(B1, c * B) and np.allclose(A1, c * A) for c in (2.0, 3.0, 0.5, 10.0)]
        if any(factors):
            text = "both factors are scaled, so the update grows with the square of the factor, and the average does not. Scale one of them"
            return Diagnosis("both_scaled", text)
        if np.linalg.norm(B1) + np.linalg.norm(A1) == 0:
            return Diagnosis("zero_as_true", "with an adapter of zeros the wanted update is half, and the product of the halved factors a quarter")
        if np.linalg.norm(B - B1) > 1e-6 and np.linalg.norm(A - A1) > 1e-6:
            return Diagnosis("nothing_shared", "B and A both differ from the given ones, so the cross terms (B − B')(A − A') / 4 stay. When do they vanish?")
        return None
    if false_error < LEAST:
        if false_error < 1e-9:
            return Diagnosis("both_true", "the claim is true in your second world, too: it shares a factor with the given adapter")
        return Diagnosis("too_mild", f"your second world is only {false_error:.0%} off; let B and A differ more")
    return None


def _lab_worlds(B, A):
    import torch

    dice = torch.Generator().manual_seed(0)
    other_B = torch.randn(B.shape, generator=dice, dtype=B.dtype)
    return (other_B, A), (-B, -A)


WORLDS_EXERCISE = Exercise(
    id="11.4",
    title="Two worlds",
    difficulty=3,
    minutes=6,
    points=4,
    name="worlds",
    cases=(
        Case("one world for the claim, one against it", _worlds_probe(9, 7, 3), _worlds_judge),
        Case("the same for wide factors", _worlds_probe(5, 12, 2), _worlds_judge),
    ),
    diagnose=_diagnose_worlds,
    hints=(
        "Multiply out (B + B')(A + A') / 4 and subtract (B A + B' A') / 2.",
        "The difference is −(B − B')(A − A') / 4. What makes it exactly zero although the two updates differ? What makes it large?",
        "True: share A, as in ((torch.randn_like(B), A), ...). False: (-B, -A) has the same update, and the averaged factors are zero.",
    ),
    read="the figure above this exercise",
    fallback=lambda: _lab_worlds,
)


VOTES = {"a": "true", "b": "false", "c": "it depends", "d": "seeds disagree: unsettled"}
LETTER = {"true": "a", "false": "b", "depends": "c", "unsettled": "d"}

LAB = Lab(
    number="11",
    name="11_claims",
    title="Claims on trial",
    minutes=45,
    core=False,
    objectives=(
        "turn a sentence into a number, a line and a rule, before you look",
        "write an experiment that can come out either way, and show that it can",
        "tell false from 'it depends' and from 'the seeds disagree'",
        "say of two dozen claims about LoRA what is true of them, with a number",
    ),
    needs=("labs 01 to 03; 02b helps", "an opinion"),
    exercises=(VERDICT, NONLINEARITY, PAIRED, WORLDS_EXERCISE),
    predictions=tuple(
        Prediction(claim.vote, f"“{claim.says}” ({claim.source})", VOTES) for claim in sorted(load().values(), key=lambda c: c.vote) if claim.vote
    ),
)
