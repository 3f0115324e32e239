"""Lab 08d, One method, many tasks: between tasks. Its exercises; the oracles are numpy's.

Sources: Radford et al. 2021 (arXiv 2103.00020), figure 3, for captions; Nichol, Achiam and Schulman 2018 (arXiv 1803.02999), algorithm 2, for
Reptile in batches; Hu et al. 2021 (arXiv 2106.09685), section 4.2, for switching.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script
from .formulas import first_match

# ---------------------------------------------------------------- 8d.1 which caption fits?

TEMPERATURES = (0.25, 0.5)


def _caption_probe(n: int, m: int, temperature: float):
    def probe(rng):
        s = Script()
        # Lengths from 0.3 to 3: without them a forgotten normalisation would hardly show.
        u = s.input("u", rng.normal(size=(n, 6)) * np.exp(rng.uniform(-1.2, 1.2, size=(n, 1))))
        v = s.input("v", rng.normal(size=(m, 6)) * np.exp(rng.uniform(-1.2, 1.2, size=(m, 1))))
        s.send("p", s.call(u, v, temperature))
        return s

    return probe


def _unit(x: np.ndarray, axis: int = 1) -> np.ndarray:
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def _softmax(x: np.ndarray, axis: int = 1) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _caption_judge(temperature: float):
    return lambda inputs, answers: compare(answers["p"], _softmax(_unit(inputs["u"]) @ _unit(inputs["v"]).T / temperature), what="caption_probabilities(…)")


def _diagnose_captions(evidence: list[Evidence]) -> Diagnosis | None:
    found = [e.answers.get("p") for e in evidence]
    if any(not isinstance(p, np.ndarray) for p in found):
        return None
    runs = [(e.inputs["u"], e.inputs["v"], t) for e, t in zip(evidence, TEMPERATURES, strict=True)]

    def cosines(u, v):
        return _unit(u) @ _unit(v).T

    formulas = {
        "not_normalised": lambda u, v, t: _softmax(u @ v.T / t),
        "captions_not_normalised": lambda u, v, t: _softmax(_unit(u) @ v.T / t),
        "pictures_not_normalised": lambda u, v, t: _softmax(u @ _unit(v).T / t),
        "normalised_columns": lambda u, v, t: _softmax(_unit(u, 0) @ _unit(v, 0).T / t),
        "softmax_over_pictures": lambda u, v, t: _softmax(cosines(u, v) / t, 0),
        "softmax_over_all": lambda u, v, t: _softmax((cosines(u, v) / t).reshape(1, -1)).reshape(len(u), len(v)),
        "times_temperature": lambda u, v, t: _softmax(cosines(u, v) * t),
        "no_temperature": lambda u, v, t: _softmax(cosines(u, v)),
        "cosines": lambda u, v, t: cosines(u, v),
        "logits": lambda u, v, t: cosines(u, v) / t,
        "log_probabilities": lambda u, v, t: np.log(_softmax(cosines(u, v) / t)),
        "softmax_first": lambda u, v, t: _softmax(cosines(u, v)) / t,
        "sigmoid": lambda u, v, t: 1 / (1 + np.exp(-cosines(u, v) / t)),
        "distances": lambda u, v, t: _softmax(-np.linalg.norm(u[:, None] - v[None], axis=2) / t),
        "transposed": lambda u, v, t: _softmax(cosines(u, v) / t).T,
        "transposed_softmax": lambda u, v, t: _softmax(cosines(u, v).T / t),
        "exponentials": lambda u, v, t: np.exp(cosines(u, v) / t),
        "share_of_sum": lambda u, v, t: (cosines(u, v) / t) / (cosines(u, v) / t).sum(1, keepdims=True),
    }
    texts = {
        "not_normalised": "you compare with a dot product, so a long vector wins whatever its direction: divide each vector by its length first",
        "captions_not_normalised": "the captions keep their lengths, so a long caption fits everything: divide them by their lengths, too",
        "pictures_not_normalised": "the pictures keep their lengths; divide them by their lengths as you do with the captions",
        "normalised_columns": "you normalise down the columns; one vector is one row: dim=1",
        "softmax_over_pictures": "the columns add up to 1: for each caption you ask which picture fits. Asked is, for each picture, which caption: dim=1",
        "softmax_over_all": "all numbers together add up to 1; each row should",
        "times_temperature": "you multiply by the temperature; dividing by a small one makes the model surer",
        "no_temperature": "the temperature is ignored",
        "cosines": "these are the cosines; divide by the temperature, then softmax over the captions",
        "logits": "these are the logits; a softmax over the captions makes probabilities of them",
        "log_probabilities": "these are logarithms of the probabilities: softmax, not log_softmax",
        "softmax_first": "the division by the temperature belongs inside the softmax; outside the rows no longer add up to 1",
        "sigmoid": "a sigmoid judges each caption alone; here they compete, and the probabilities of a row add up to 1",
        "distances": "this is a softmax of distances; asked are cosines",
        "transposed": "right, but transposed: a row for each picture, a column for each caption",
        "transposed_softmax": "there is a row for each caption; asked is a row for each picture, a column for each caption",
        "exponentials": "these are the exponentials; divide each row by its sum, so that it adds up to 1",
        "share_of_sum": "you divide by the sum of the logits, which may be negative; softmax takes the exponential first",
    }
    key = first_match(found, {name: [f(*run) for run in runs] for name, f in formulas.items()}, rtol=1e-6)
    return Diagnosis(key, texts[key]) if key else None


def _lab_captions(pictures, captions, temperature):
    cosines = F.normalize(pictures, dim=1) @ F.normalize(captions, dim=1).T
    return (cosines / temperature).softmax(dim=1)


CAPTIONS = Exercise(
    id="8d.1",
    title="Which caption fits?",
    difficulty=1,
    minutes=5,
    points=2,
    name="caption_probabilities",
    cases=(
        Case("softmax of cosine / temperature over the captions", _caption_probe(4, 9, TEMPERATURES[0]), _caption_judge(TEMPERATURES[0])),
        Case("also with more pictures than captions, and another temperature", _caption_probe(8, 3, TEMPERATURES[1]), _caption_judge(TEMPERATURES[1])),
    ),
    diagnose=_diagnose_captions,
    hints=(
        "A cosine is the dot product of two vectors of length 1. What must add up to 1 in the end: a row, a column, or everything?",
        "F.normalize(x, dim=1) brings each row to length 1. Then (n, d) @ (d, m), / temperature, softmax over the captions.",
        "return (F.normalize(pictures, dim=1) @ F.normalize(captions, dim=1).T / temperature).softmax(dim=1)",
    ),
    read="lora_lab/tasks/pairs.py, the picture at its top",
    fallback=lambda: _lab_captions,
)


# ---------------------------------------------------------------- 8d.2 does the base help?

# Student's t for 95 %: three seeds, five seeds
GAINS = ((3, 4.303), (5, 2.776))


def _gain_probe(n: int, t: float):
    def probe(rng):
        s = Script()
        level = rng.uniform(0.3, 0.9, size=n)  # seeds differ more than ways do, as splits do
        # both signs occur, so that an absolute value shows
        s.input("with", level + np.array([0.04, -0.13, -0.06, 0.02, -0.09])[:n] + rng.uniform(-0.01, 0.01, size=n))
        s.input("without", level)
        s.send("gain", s.call(s.inputs["with"].tolist(), s.inputs["without"].tolist(), t))
        return s

    return probe


def paired(a: np.ndarray, b: np.ndarray, t: float) -> tuple[float, float]:
    """The oracle: mean and half-width of the 95 % interval of a - b."""
    d = a - b
    return float(d.mean()), float(t * d.std(ddof=1) / math.sqrt(len(d)))


def _pair_of_numbers(value) -> list[float] | None:
    if isinstance(value, np.ndarray) and value.shape == (2,):
        value = value.tolist()
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    numbers = [v.item() if isinstance(v, np.ndarray) and v.size == 1 else v for v in value]
    return [float(v) for v in numbers] if all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers) else None


def _gain_judge(t: float, part: int):
    what = ("the mean gain", "the half-width of the interval")[part]

    def judge(inputs, answers):
        found = _pair_of_numbers(answers["gain"])
        if found is None:
            return "gain(…) should return two numbers, the mean and the half-width"
        # float32 tensors are a fair way to calculate this: 1e-5
        return compare(found[part], paired(inputs["with"], inputs["without"], t)[part], what=what, rtol=1e-5)

    return judge


def _diagnose_gain(evidence: list[Evidence]) -> Diagnosis | None:
    first, *_, second = evidence
    runs, found = [], []
    for e, (_, t) in zip((first, second), GAINS, strict=True):
        pair = _pair_of_numbers(e.answers.get("gain"))
        if pair is None:
            value = e.answers.get("gain")
            if isinstance(value, float | int) or (isinstance(value, np.ndarray) and value.size == 1):
                return Diagnosis("one_number", "you return one number; asked are two, the mean gain and its half-width")
            return None
        runs.append((e.inputs["with"], e.inputs["without"], t))
        found.append(pair)
    means = [pair[0] for pair in found]
    halves = [pair[1] for pair in found]

    def which(values, formulas):
        return first_match(values, {k: [f(*run) for run in runs] for k, f in formulas.items()}, rtol=1e-5)

    mean = {
        "right": lambda a, b, t: (a - b).mean(),
        "reversed": lambda a, b, t: (b - a).mean(),
        "absolute": lambda a, b, t: np.abs(a - b).mean(),
        "relative": lambda a, b, t: (a - b).mean() / b.mean(),
        "ratio": lambda a, b, t: a.mean() / b.mean(),
        "sum": lambda a, b, t: (a - b).sum(),
        "percent": lambda a, b, t: 100 * (a - b).mean(),
        "half_first": lambda a, b, t: paired(a, b, t)[1],
        "best": lambda a, b, t: a.max() - b.max(),
        "median": lambda a, b, t: np.median(a - b),
    }
    key = which(means, mean)
    if key == "reversed":
        return Diagnosis("reversed", "the sign is the other way round: a base that helps has a positive gain, with minus without")
    if key == "absolute":
        return Diagnosis("absolute", "an absolute value hides the bases that hurt: the gain may be negative")
    if key in ("relative", "ratio"):
        return Diagnosis("relative", "you divide by the accuracy without the base; asked is the difference")
    if key == "sum":
        return Diagnosis("sum", "these are the differences added up; divide by how many seeds there are")
    if key == "percent":
        return Diagnosis("percent", "this is in per cent; asked are differences of the accuracies as they are given, shares of 1")
    if key == "half_first":
        return Diagnosis("wrong_order", "the two are the wrong way round: first the mean, then the half-width")
    if key == "best":
        return Diagnosis("best_seed", "you compare the best seed of each: luck picks a winner that way. Take the difference within each seed, then the mean")
    if key != "right":
        return None
    n = len
    root = math.sqrt
    spread = {
        "unpaired": lambda a, b, t: t * root(a.var(ddof=1) / n(a) + b.var(ddof=1) / n(b)),
        "difference_of_sd": lambda a, b, t: t * (a.std(ddof=1) - b.std(ddof=1)) / root(n(a)),
        "sd_of_one": lambda a, b, t: t * a.std(ddof=1) / root(n(a)),
        "population": lambda a, b, t: t * (a - b).std() / root(n(a)),
        "no_root_n": lambda a, b, t: t * (a - b).std(ddof=1),
        "by_n": lambda a, b, t: t * (a - b).std(ddof=1) / n(a),
        "no_t": lambda a, b, t: (a - b).std(ddof=1) / root(n(a)),
        "plain_sd": lambda a, b, t: (a - b).std(ddof=1),
        "variance": lambda a, b, t: t * (a - b).var(ddof=1) / root(n(a)),
        "two_instead_of_t": lambda a, b, t: 2 * (a - b).std(ddof=1) / root(n(a)),
        "normal_instead_of_t": lambda a, b, t: 1.96 * (a - b).std(ddof=1) / root(n(a)),
        "full_width": lambda a, b, t: 2 * t * (a - b).std(ddof=1) / root(n(a)),
        "root_n_minus_1": lambda a, b, t: t * (a - b).std(ddof=1) / root(n(a) - 1),
    }
    texts = {
        "unpaired": "the mean is right; your half-width forgets that the runs come in pairs. Seeds differ in their split, and both ways meet the same "
        "one: take the differences first, then their standard deviation",
        "difference_of_sd": "the standard deviation of the differences is asked, not the difference of the standard deviations",
        "sd_of_one": "this is the spread of one of the two; asked is that of the differences",
        "population": "the mean is right; the standard deviation divides by n. From a few seeds it is estimated with n - 1",
        "no_root_n": "this is the spread of single runs; the mean of n of them is surer, by √n",
        "by_n": "you divide by n; the mean of n runs is surer by √n",
        "no_t": "t is missing: with so few seeds the interval is much wider than one standard error",
        "plain_sd": "this is the standard deviation alone; times t, divided by √n",
        "variance": "that is the variance; take its square root",
        "two_instead_of_t": "2 is the rule of thumb for many runs; with so few it is the t that you are given",
        "normal_instead_of_t": "the 1.96 of a normal curve is right for many runs; with so few it is the t that you are given",
        "full_width": "this is the whole width; asked is half of it, as in 0.1 ± 0.02",
        "root_n_minus_1": "n - 1 belongs into the standard deviation; the mean of n runs is surer by √n",
    }
    key = which(halves, spread)
    return Diagnosis(key, texts[key]) if key else None


def _lab_gain(with_base, without, t):
    from statistics import mean, stdev

    differences = [a - b for a, b in zip(with_base, without, strict=True)]
    return mean(differences), t * stdev(differences) / math.sqrt(len(differences))


GAIN = Exercise(
    id="8d.2",
    title="Does the base help?",
    difficulty=2,
    minutes=6,
    points=3,
    name="gain",
    cases=(
        Case("three seeds: the mean gain", _gain_probe(*GAINS[0]), _gain_judge(GAINS[0][1], 0)),
        Case("three seeds: the half-width", _gain_probe(*GAINS[0]), _gain_judge(GAINS[0][1], 1)),
        Case("five seeds: the mean gain", _gain_probe(*GAINS[1]), _gain_judge(GAINS[1][1], 0)),
        Case("five seeds: the half-width", _gain_probe(*GAINS[1]), _gain_judge(GAINS[1][1], 1)),
    ),
    diagnose=_diagnose_gain,
    hints=(
        "The same seed has the same split in both lists. What would you do before any averaging?",
        "d = with - without, seed by seed; then its mean, and t times its standard deviation (with n - 1), divided by √n.",
        "d = torch.tensor(with_base) - torch.tensor(without); return d.mean().item(), (t * d.std() / len(d) ** 0.5).item()",
    ),
    read="lora_lab/comparing.py, method gap",
    fallback=lambda: _lab_gain,
)


# ---------------------------------------------------------------- 8d.3 one step of Reptile

STEPS = ((4, 0.3), (3, 0.6))
SHAPES = {"lora_A": (3, 7), "lora_B": (5, 3)}


def _reptile_probe(n: int, epsilon: float):
    def probe(rng):
        s = Script()
        start = {name: s.input(f"start {name}", rng.normal(size=shape)) for name, shape in SHAPES.items()}
        ends = [{name: s.input(f"end {k} {name}", rng.normal(size=shape)) for name, shape in SHAPES.items()} for k in range(n)]
        new = s.call(start, ends, epsilon)
        for name in SHAPES:
            s.send(name, s.get(new, name))
        return s

    return probe


def _reptile_judge(n: int, epsilon: float):
    def judge(inputs, answers):
        for name in SHAPES:
            end = np.mean([inputs[f"end {k} {name}"] for k in range(n)], axis=0)
            problem = compare(answers[name], (1 - epsilon) * inputs[f"start {name}"] + epsilon * end, what=f"the new {name}")
            if problem:
                return problem
        return None

    return judge


def _diagnose_reptile(evidence: list[Evidence]) -> Diagnosis | None:
    # What comes back is a combination of start and ends; with 21 numbers for 5 unknowns the coefficients can be read off.
    readings = []
    for e, (n, epsilon) in zip(evidence, STEPS, strict=True):
        for name, shape in SHAPES.items():
            found = e.answers.get(name)
            if not isinstance(found, np.ndarray) or found.shape != shape:
                return None
            columns = np.stack([e.inputs[f"start {name}"].ravel(), *(e.inputs[f"end {k} {name}"].ravel() for k in range(n))], axis=1)
            c, *_ = np.linalg.lstsq(columns, found.ravel(), rcond=None)
            if np.abs(columns @ c - found.ravel()).max() > 1e-6:
                return None
            readings.append((name, n, epsilon, np.round(c, 9)))

    def all_are(function, names=tuple(SHAPES)):
        return all(np.allclose(c, function(n, e), atol=1e-6) for name, n, e, c in readings if name in names)

    def ends(n, each):
        return np.full(n, each)

    formulas = {
        "plain_mean": lambda n, e: np.r_[0, ends(n, 1 / n)],
        "not_averaged": lambda n, e: np.r_[1 - n * e, ends(n, e)],
        "sum_of_ends": lambda n, e: np.r_[0, ends(n, 1)],
        "summed_ends": lambda n, e: np.r_[1 - e, ends(n, e)],
        "away": lambda n, e: np.r_[1 + e, ends(n, -e / n)],
        "start_not_subtracted": lambda n, e: np.r_[1, ends(n, e / n)],
        "no_start": lambda n, e: np.r_[0, ends(n, e / n)],
        "direction_only": lambda n, e: np.r_[-e, ends(n, e / n)],
        "epsilon_swapped": lambda n, e: np.r_[e, ends(n, (1 - e) / n)],
        "last_task": lambda n, e: np.r_[1 - e, ends(n - 1, 0), e],
        "first_task": lambda n, e: np.r_[1 - e, e, ends(n - 1, 0)],
        "one_after_another": lambda n, e: np.r_[(1 - e) ** n, [e * (1 - e) ** (n - 1 - k) for k in range(n)]],
        "no_epsilon": lambda n, e: np.r_[1, ends(n, 1 / n)],
        "mean_with_start": lambda n, e: np.full(n + 1, 1 / (n + 1)),
        "unchanged": lambda n, e: np.r_[1, ends(n, 0)],
        "averaged_twice": lambda n, e: np.r_[1 - e / n, ends(n, e / n**2)],
    }
    texts = {
        "plain_mean": "this is the plain mean of the ends: the start and epsilon are not in it. Go a part of the way from the start",
        "not_averaged": "the differences are added up over the tasks; take their mean, or the step grows with the number of tasks",
        "sum_of_ends": "this is the sum of the ends: take their mean, and go only a part of the way to it from the start",
        "summed_ends": "the ends are added up; take their mean",
        "away": "the start moves away from the ends: the direction is end minus start",
        "start_not_subtracted": "you add the ends themselves; what is added is the way to them, end minus start",
        "no_start": "the start is missing: you return epsilon times the mean of the ends",
        "direction_only": "this is the step alone; add it to the start",
        "epsilon_swapped": "the weights are swapped: epsilon belongs to the ends, 1 - epsilon to the start",
        "last_task": "only the last task moves the start: each turn of the loop overwrites the one before",
        "first_task": "only the first task moves the start",
        "one_after_another": "the start moves after each end, so the last one weighs most. All ends were reached from the same start: take their mean first",
        "no_epsilon": "you add the mean of the ends to the start; go epsilon times the way from one to the other",
        "mean_with_start": "the start counts as one more end, and epsilon is not used",
        "unchanged": "the start comes back as it was",
        "averaged_twice": "you divide by the number of tasks twice",
    }
    for key, formula in formulas.items():
        if all_are(formula):
            return Diagnosis(key, texts[key])
    right = lambda n, e: np.r_[1 - e, ends(n, e / n)]  # noqa: E731  (beside its siblings above)
    for moved, left in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        if all_are(right, (moved,)) and all_are(formulas["unchanged"], (left,)):
            return Diagnosis("one_factor", f"only {moved} moves; {left} is a part of the start, too")
    return None


def _lab_reptile(start, ends, epsilon):
    return {name: (1 - epsilon) * theta + epsilon * sum(end[name] for end in ends) / len(ends) for name, theta in start.items()}


REPTILE = Exercise(
    id="8d.3",
    title="A step of Reptile",
    difficulty=2,
    minutes=5,
    points=3,
    name="reptile_step",
    cases=tuple(Case(f"{n} tasks, epsilon = {epsilon}", _reptile_probe(n, epsilon), _reptile_judge(n, epsilon)) for n, epsilon in STEPS),
    diagnose=_diagnose_reptile,
    hints=(
        "Every task pulls the start towards its own end. Where does the mean of these pulls lead, and how far do you go?",
        "For each name: the mean of end[name] over the ends; then start + epsilon * (mean - start). Build a new dict.",
        "return {name: theta + epsilon * (sum(e[name] for e in ends) / len(ends) - theta) for name, theta in start.items()}",
    ),
    read="lora_lab/tasks/meta.py, the formula at its top",
    fallback=lambda: _lab_reptile,
)


# ---------------------------------------------------------------- 8d.4 switching merged weights

ADAPTERS = (("first", 3, 5 / 3), ("second", 2, 3.5))  # name, r, scaling
SWITCHES = 60


def _adapters(s: Script, rng):
    refs = {"W0": s.input("W0", rng.normal(size=(11, 7)).astype(np.float32), may_change=True)}
    for name, r, _ in ADAPTERS:
        refs[f"A {name}"] = s.input(f"A {name}", rng.normal(size=(r, 7)).astype(np.float32))
        refs[f"B {name}"] = s.input(f"B {name}", rng.normal(size=(11, r)).astype(np.float32))
    return refs


def _switch_probe(rng):
    s = Script()
    refs = _adapters(s, rng)
    board = s.call(refs["W0"])
    s.send("W at first", s.get(board, "weight"))
    for name, _, scaling in ADAPTERS:
        s.method(board, "switch", refs[f"A {name}"], refs[f"B {name}"], scaling)
        s.send(f"W {name}", s.get(board, "weight"))
    name, _, scaling = ADAPTERS[0]
    s.method(board, "switch", refs[f"A {name}"], refs[f"B {name}"], scaling)
    s.send("W again", s.get(board, "weight"))
    s.method(board, "off")
    s.send("W off", s.get(board, "weight"))
    s.method(board, "off")
    s.send("W off twice", s.get(board, "weight"))
    s.send("W0 given", refs["W0"])
    return s


def _many_probe(rng):
    s = Script()
    refs = _adapters(s, rng)
    board = s.call(refs["W0"])
    for k in range(SWITCHES):
        name, _, scaling = ADAPTERS[k % 2]
        s.method(board, "switch", refs[f"A {name}"], refs[f"B {name}"], scaling)
    s.send("W last", s.get(board, "weight"))
    s.method(board, "off")
    s.send("W off", s.get(board, "weight"))
    return s


def _switched(inputs, name: str, scaling: float) -> np.ndarray:
    return inputs["W0"].astype(np.float64) + scaling * np.einsum("or,ri->oi", inputs[f"B {name}"], inputs[f"A {name}"], dtype=np.float64)


def _switch_judge(*names: str):
    def judge(inputs, answers):
        if "first" in names and compare(answers["W at first"], inputs["W0"], rtol=0):
            return "before the first switch the weight should be W0"
        for name, _, scaling in ADAPTERS:
            if name in names:
                # float32 products of three numbers and one sum: 1e-6
                problem = compare(answers[f"W {name}"], _switched(inputs, name, scaling), what=f"the weight after switching to the {name} adapter", rtol=1e-5)
                if problem:
                    return problem
        return None

    return judge


def _off_judge(key: str, words: str):
    def judge(inputs, answers):
        problem = compare(answers[key], inputs["W0"], what=f"the weight after {words}", rtol=1e-4)
        if problem:
            return problem
        found = np.asarray(answers[key])
        if not np.array_equal(found, inputs["W0"]):
            return f"after {words}, {int((found != inputs['W0']).sum())} of {found.size} entries are not those of W0, bit for bit"
        return None

    return judge


def _given_judge(inputs, answers):
    return None if np.array_equal(answers["W0 given"], inputs["W0"]) else "the tensor W0 that was handed in has changed: it belongs to the caller"


def _diagnose_switch(evidence: list[Evidence]) -> Diagnosis | None:
    e, answers = evidence[0], evidence[0].answers
    if answers.error is not None:
        if answers.error.kind == "answer" and any(f"has no {name!r}" in answers.error.message for name in ("switch", "off")):
            return Diagnosis("no_method", "the class needs both methods: switch(A, B, scaling) and off()")
        return None
    inputs, W0 = e.inputs, e.inputs["W0"].astype(np.float64)
    first, second = (answers.get(f"W {name}") for name, *_ in ADAPTERS)
    if not all(isinstance(w, np.ndarray) and w.shape == W0.shape for w in (first, second, answers.get("W off"), answers.get("W0 given"))):
        return None
    updates = [_switched(inputs, name, scaling) - W0 for name, _, scaling in ADAPTERS]
    plain = [update / scaling for update, (_, _, scaling) in zip(updates, ADAPTERS, strict=True)]

    def close(a, b):
        return compare(a, b, rtol=1e-5) is None  # float32, as above

    if close(first, W0 + updates[0]) and not np.array_equal(answers["W0 given"], inputs["W0"]):
        return Diagnosis("alias", "what you kept is the same memory as the tensor that you write to, so W0 itself changes: `.clone()` copies")
    if close(first, W0 + updates[0]):
        if close(second, W0 + updates[0] + updates[1]):
            return Diagnosis(
                "accumulates",
                "the second adapter comes on top of the first: begin from W0 each time. If you do: is what you kept a copy, or the same memory "
                "as the weight? `.clone()` copies",
            )
        if close(second, first):
            return Diagnosis("stuck", "the second switch does nothing: the first adapter stays on")
    if close(first, updates[0]):
        return Diagnosis("replaced", "the weight is the update alone: W0 is missing. Adapters are added to it")
    if close(first, W0 + plain[0]):
        return Diagnosis("no_scaling", "the scaling is missing: W0 + scaling · B A")
    if close(first, W0 + updates[0] / ADAPTERS[0][1]):
        return Diagnosis("divided_by_r", "you divide by r, but the scaling given is alpha / r already")
    if close(first, ADAPTERS[0][2] * (W0 + plain[0])):
        return Diagnosis("base_scaled", "the scaling multiplies W0, too; it belongs to B A alone")
    if close(first, W0 - updates[0]):
        return Diagnosis("subtracted", "the update is subtracted; add it")
    if not (close(first, W0 + updates[0]) and close(second, W0 + updates[1])):
        return None
    off = answers["W off"]
    if close(off, W0 + updates[0]):
        return Diagnosis("off_does_nothing", "off() leaves the adapter on")
    if compare(off, W0, rtol=1e-4) is None and not np.array_equal(off, inputs["W0"]):
        return Diagnosis(
            "drift",
            "you subtract what was added: nearly right, but every switch rounds, and the base that all adapters share drifts away. Keep W0 and begin from it",
        )
    if np.array_equal(off, inputs["W0"]) and not close(answers.get("W off twice"), W0):
        return Diagnosis("off_twice", "a second off() changes the weight once more; it should do nothing")
    last = evidence[-1].answers
    if isinstance(last.get("W off"), np.ndarray) and not np.array_equal(last["W off"], evidence[-1].inputs["W0"]):
        return Diagnosis("drift", "right after a few switches, not after many: each one rounds. Keep W0 and begin from it")
    return None


class _LabSwitchboard:
    def __init__(self, W0):
        self.W0, self.weight = W0.clone(), W0.clone()

    def switch(self, A, B, scaling):
        self.weight = torch.addmm(self.W0, B, A, alpha=scaling)

    def off(self):
        self.weight = self.W0.clone()


SWITCH = Exercise(
    id="8d.4",
    title="Switching merged weights",
    difficulty=2,
    minutes=6,
    points=3,
    name="Switchboard",
    cases=(
        Case("W0 + scaling · B A", _switch_probe, _switch_judge("first")),
        Case("then the second adapter, without the first", _switch_probe, _switch_judge("second")),
        Case("off() brings W0 back, bit for bit", _switch_probe, _off_judge("W off", "off()")),
        Case("a second off() changes nothing", _switch_probe, _off_judge("W off twice", "a second off()")),
        Case("the caller's W0 is left alone", _switch_probe, _given_judge),
        Case(f"W0 is the same after {SWITCHES} switches", _many_probe, _off_judge("W off", f"{SWITCHES} switches and off()")),
    ),
    diagnose=_diagnose_switch,
    hints=(
        "The paper subtracts B A and adds the next. In float32 (a + b) - b is not always a. What would you have to keep to need no subtraction?",
        "Keep a copy of W0 in __init__. switch: the weight is that copy plus scaling * B @ A. off: the weight is the copy.",
        "self.W0 = W0.clone(); switch: self.weight = self.W0 + scaling * B @ A; off: self.weight = self.W0.clone()",
    ),
    read="Hu et al. 2021, section 4.2; lora_lab/merging.py",
    fallback=lambda: _LabSwitchboard,
)


# ---------------------------------------------------------------- 8d.5 to Keras

LAYERS = (dict(d_in=7, d_out=11, r=3, scaling=5 / 3), dict(d_in=6, d_out=6, r=2, scaling=3.5))  # a square one shows nothing by its shapes


def _keras_probe(size: dict):
    def probe(rng):
        s = Script()
        W, b = s.input("W", rng.normal(size=(size["d_out"], size["d_in"]))), s.input("b", rng.normal(size=size["d_out"]))
        A, B = s.input("A", rng.normal(size=(size["r"], size["d_in"]))), s.input("B", rng.normal(size=(size["d_out"], size["r"])))
        found = s.call(W, b, A, B, size["scaling"])
        for name in KERAS_NAMES:
            s.send(name, s.get(found, name))
        return s

    return probe


KERAS_NAMES = ("kernel", "bias", "lora_kernel_a", "lora_kernel_b")


def _keras_judge(size: dict, part: str):
    d_in, d_out, r, scaling = (size[k] for k in ("d_in", "d_out", "r", "scaling"))
    shapes = dict(zip(KERAS_NAMES, ((d_in, d_out), (d_out,), (d_in, r), (r, d_out)), strict=True))

    def judge(inputs, answers):
        for name, shape in shapes.items():
            found = answers[name]
            if not isinstance(found, np.ndarray) or found.shape != shape:
                return f"{name} should have shape {shape}, found {found.shape if isinstance(found, np.ndarray) else type(found).__name__}"
        if part == "base":
            return compare(answers["kernel"], inputs["W"].T, what="kernel") or compare(answers["bias"], inputs["b"], what="bias")
        product = scaling * np.einsum("or,ri->io", inputs["B"], inputs["A"])
        return compare(answers["lora_kernel_a"].astype(np.float64) @ answers["lora_kernel_b"], product, what="lora_kernel_a @ lora_kernel_b", rtol=1e-8)

    return judge


def _diagnose_keras(evidence: list[Evidence]) -> Diagnosis | None:
    # evidence: oblong base, oblong factors, square base, square factors
    runs = [(evidence[1], LAYERS[0]), (evidence[3], LAYERS[1])]
    if any(not isinstance(e.answers.get(name), np.ndarray) for e, _ in runs for name in KERAS_NAMES):
        return None
    a = evidence[1].answers
    inputs, size = evidence[1].inputs, LAYERS[0]
    d_in, d_out, r = size["d_in"], size["d_out"], size["r"]
    if a["kernel"].shape == (d_out, d_in):
        return Diagnosis("kernel_not_transposed", "torch's weight is (out, in), Keras's kernel is (in, out): transpose it")
    if a["lora_kernel_a"].shape == (r, d_out) and a["lora_kernel_b"].shape == (d_in, r):
        return Diagnosis("factors_swapped", "a and b are swapped: Keras's a meets the input, (in, r), b makes the output, (r, out)")
    if a["lora_kernel_a"].shape == (r, d_in) or a["lora_kernel_b"].shape == (d_out, r):
        return Diagnosis("factors_not_transposed", "the factors have torch's shapes; Keras's are (in, r) and (r, out): transpose each")
    if a["lora_kernel_a"].shape == (d_out, r) and a["lora_kernel_b"].shape == (r, d_in):
        return Diagnosis("wrong_factor", "a is made from B and b from A; samples stand in rows, so A comes first: x @ a @ b")

    def fits(function):
        return all(function(e.answers, e.inputs, size) for e, size in runs)

    def product(answers):
        return answers["lora_kernel_a"].astype(np.float64) @ answers["lora_kernel_b"]

    def plain(given):
        return (given["B"] @ given["A"]).T

    def close(x, y):
        return compare(x, y, rtol=1e-8) is None

    if a["kernel"].shape == inputs["W"].T.shape and fits(lambda x, i, z: close(x["kernel"], i["W"].reshape(i["W"].T.shape))):
        return Diagnosis("reshaped", "reshape keeps the order of the numbers in memory and gives another matrix of that shape; a transpose is .T")
    if any(close(x["kernel"], i["W"].T + z["scaling"] * plain(i)) for x, i, z in [(evidence[1].answers, inputs, size)]):
        if fits(lambda x, i, z: not product(x).any()):
            return Diagnosis("merged", "you merged the update into the kernel, and nothing is left to train: the factors are asked for themselves")
        return Diagnosis("counted_twice", "the kernel holds the update already, and the factors hold it once more")
    if fits(lambda x, i, z: close(x["kernel"], z["scaling"] * i["W"].T)):
        return Diagnosis("base_scaled", "the kernel is scaled, too; the scaling belongs to the update alone")
    if fits(lambda x, i, z: close(product(x), plain(i))):
        return Diagnosis("scaling_lost", "the scaling is lost: enable_lora(rank) computes x a b with a factor of 1, so the factors must carry it")
    if fits(lambda x, i, z: close(product(x), z["scaling"] ** 2 * plain(i))):
        return Diagnosis("scaling_twice", "both factors carry the scaling, so their product has its square: put it into one of them")
    if fits(lambda x, i, z: close(product(x), plain(i) / z["scaling"])):
        return Diagnosis("scaling_inverted", "the scaling divides; it should multiply")
    if fits(lambda x, i, z: close(product(x), -z["scaling"] * plain(i))):
        return Diagnosis("subtracted", "the update has the wrong sign: it is added to the kernel")
    if fits(lambda x, i, z: close(product(x), z["scaling"] / z["r"] * plain(i))):
        return Diagnosis("divided_by_r", "you divide by r, but the scaling given is alpha / r already")
    reshaped = [lambda x, i, z: close(x["lora_kernel_a"], i["A"].reshape(i["A"].T.shape)),
                lambda x, i, z: close(x["lora_kernel_b"], z["scaling"] * i["B"].reshape(i["B"].T.shape))]  # fmt: skip
    if any(map(fits, reshaped)):
        return Diagnosis("reshaped", "reshape keeps the order of the numbers in memory and gives another matrix of that shape; a transpose is .T")
    if fits(lambda x, i, z: close(x["bias"], z["scaling"] * i["b"])):
        return Diagnosis("bias_scaled", "the bias is scaled; it is no part of the update")
    if fits(lambda x, i, z: not x["bias"].any()):
        return Diagnosis("bias_lost", "the bias is zero; Keras's Dense has one, too: hand b on")
    square = runs[1][0]
    if evidence[0].failure is None and evidence[1].failure is None and close(square.answers["kernel"], square.inputs["W"]):
        return Diagnosis("by_shape", "the square layer is not transposed: its shape can't tell you, but its numbers need it all the same")
    return None


def _lab_to_keras(W, b, A, B, scaling):
    return {"kernel": W.T, "bias": b, "lora_kernel_a": A.T, "lora_kernel_b": scaling * B.T}


KERAS = Exercise(
    id="8d.5",
    title="From torch to Keras",
    difficulty=2,
    minutes=6,
    points=3,
    name="to_keras",
    cases=tuple(
        Case(f"{words}: {what}", _keras_probe(size), _keras_judge(size, part))
        for words, size in zip(("7 inputs, 11 outputs", "a square layer"), LAYERS, strict=True)
        for part, what in (("base", "kernel and bias"), ("factors", "a b is scaling · (B A)ᵀ"))
    ),
    diagnose=_diagnose_keras,
    hints=(
        "Write both layers for one sample in a row: torch x Wᵀ + b + s (x Aᵀ) Bᵀ, Keras x kernel + bias + (x a) b. Match term by term.",
        'kernel is W.T, bias is b, a is A.T, b is B.T; there is no factor in Keras\'s formula, so one of the two factors must carry the scaling.',
        'return {"kernel": W.T, "bias": b, "lora_kernel_a": A.T, "lora_kernel_b": scaling * B.T}',
    ),
    read="lora_lab/zoo/keras_lora.py, the table at its top",
    fallback=lambda: _lab_to_keras,
)


LAB = Lab(
    number="8d",
    name="08d_between_tasks",
    title="One method, many tasks: between tasks",
    minutes=60,
    core=False,
    objectives=(
        "put an adapter into each tower of a model of pictures and captions, and see which tower must move",
        "measure when a pretrained base helps and when it hurts, against a fair rival",
        "tell what a learned start knows from how well it learns",
        "switch tasks by exchanging adapters, and say what that costs and what it can damage",
        "carry a LoRA layer to Keras and get the same numbers",
    ),
    needs=("lab 02", "lab 03 for learning rates; each section stands alone"),
    exercises=(CAPTIONS, GAIN, REPTILE, SWITCH, KERAS),
    predictions=(
        Prediction(
            "8d.A",
            "Pictures are turned and captions are worded anew. Which adapter reads most of the test pictures rightly?",
            {"a": "one in the image tower", "b": "one in the text tower", "c": "one in each, by more than 3 points", "d": "all about the same"},
        ),
        Prediction(
            "8d.B",
            "30 labelled upright digits. Rivals: LoRA on a base that knows the same digits turned by 90 degrees, and the same network trained from nothing.",
            {"a": "LoRA reads more, by over 2 points", "b": "about the same", "c": "LoRA reads fewer, by over 2 points"},
        ),
        Prediction(
            "8d.C",
            "The learned start meets an angle that was not in its family. How many of the digits does it read before its first step?",
            {"a": "about 10 %, as by chance", "b": "20 to 60 %", "c": "more than 60 %"},
        ),
        Prediction(
            "8d.D",
            "A language model of 5.9 million parameters. How much faster is switching to an adapter in memory than loading the model anew?",
            {"a": "less than 10 times", "b": "10 to 100 times", "c": "more than 100 times"},
        ),
        Prediction(
            "8d.E", "A Keras Dense layer, 64 inputs, 10 outputs. After enable_lora(rank=4), how many numbers train?", unit="parameters", tolerance=0.0
        ),
    ),
)
