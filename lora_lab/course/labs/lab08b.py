"""Lab 08b, One method, many tasks: reading: its exercises.

Sources: Rajpurkar et al. 2016 (SQuAD) on spans; Hu et al. 2021 (arXiv 2106.09685), section 4.2, on query and value. Expectations are counted one by
one in plain Python and numpy.
"""

from __future__ import annotations

import math

import numpy as np

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script
from .formulas import first_match

RTOL = 1e-5  # a student may pass through float32; every mistake below changes the first three digits


def _numbers(value, count: int) -> list[float] | None:
    """`count` finite numbers, from a list, tuple or array; None for anything else."""
    values = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return None
    values = [v.item() if isinstance(v, np.ndarray) and v.size == 1 else v for v in values]
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v) for v in values):
        return None
    return [float(v) for v in values]


# ---------------------------------------------------------------- 8b.1 accuracy, recall, F1


def _macro_probe(quiet: bool):
    def probe(rng):
        s = Script()
        # Sizes and rates of the classes are unlike, so that averages over texts and over classes differ.
        truth = np.repeat([0, 1, 2, 3], [19, 11, 7, 5])
        guess = truth.copy()
        for k, wrong in enumerate((4, 5, 3, 2)):
            rows = rng.permutation(np.flatnonzero(truth == k))[:wrong]
            guess[rows] = (k + 1) % 3 if quiet else rng.integers(0, 4, size=wrong)
        if quiet:
            guess[truth == 3] = rng.integers(0, 2, size=5)  # nobody ever says 3
        else:
            guess[np.flatnonzero(truth == 0)[0]] = 3
        order = rng.permutation(len(truth))
        s.send("scores", s.call(s.input("truth", truth[order]), s.input("guess", guess[order]), 4))
        return s

    return probe


def _counted(inputs) -> list[dict]:
    """Of each class: right ones, how many there are, how often it was said."""
    pairs = list(zip(inputs["truth"].tolist(), inputs["guess"].tolist(), strict=True))
    return [{"right": sum(t == g == k for t, g in pairs), "there": sum(t == k for t, _ in pairs), "said": sum(g == k for _, g in pairs)} for k in range(4)]


def macro_scores(inputs) -> list[float]:
    rows, n = _counted(inputs), len(inputs["truth"])
    return [sum(r["right"] for r in rows) / n, sum(r["right"] / r["there"] for r in rows) / 4, sum(2 * r["right"] / (r["there"] + r["said"]) for r in rows) / 4]


def _macro_judge(inputs, answers):
    found = _numbers(answers["scores"], 3)
    if found is None:
        return "asked are three numbers: accuracy, recall, F1"
    for name, f, expected in zip(("accuracy", "recall", "F1"), found, macro_scores(inputs), strict=True):
        if problem := compare(f, expected, what=f"the {name}", rtol=RTOL):
            return problem
    return None


_MACRO_TEXTS = {
    "micro": "you count over all texts at once, and then recall and F1 are the accuracy again. Take each class by itself, then the mean of the classes",
    "precision": "the second number is the precision, right ones of those that were *said*; recall is right ones of those that *are there*",
    "f1_of_means": "F1 is taken of the mean precision and the mean recall; asked is the mean of the classes' own F1",
    "weighted": "the classes are weighted by their size; here each counts the same, or a rare class could fail unseen",
    "said_only": "a class that was never said is left out of the mean; it counts, with F1 = 0",
    "swapped": "recall and F1 stand in the wrong order",
    "percent": "these are percentages; asked are shares from 0 to 1",
    "f1_average": "F1 is the harmonic mean 2 P R / (P + R), not the plain mean of P and R",
}


def _macro_slips(inputs) -> dict[str, list[float]]:
    rows = _counted(inputs)
    accuracy, recall, f1 = macro_scores(inputs)
    n = len(inputs["truth"])
    P = [r["right"] / r["said"] if r["said"] else 0.0 for r in rows]
    R = [r["right"] / r["there"] for r in rows]
    F = [2 * r["right"] / (r["there"] + r["said"]) for r in rows]
    weights = [r["there"] / n for r in rows]
    said = [k for k in range(4) if rows[k]["said"]]
    mP, mR = sum(P) / 4, sum(R) / 4
    return {
        "micro": [accuracy] * 3,
        "precision": [accuracy, mP, f1],
        "f1_of_means": [accuracy, recall, 2 * mP * mR / (mP + mR)],
        "weighted": [accuracy, accuracy, sum(w * f for w, f in zip(weights, F, strict=True))],
        "said_only": [accuracy, recall, sum(F[k] for k in said) / len(said)],
        "swapped": [accuracy, f1, recall],
        "percent": [100 * accuracy, 100 * recall, 100 * f1],
        "f1_average": [accuracy, recall, (mP + mR) / 2],
    }


def _diagnose_macro(evidence: list[Evidence]) -> Diagnosis | None:
    raw = [e.answers.get("scores") for e in evidence]
    error = next((e.error for e in evidence if e.error is not None), None)
    if error is not None and error.type == "ZeroDivisionError" and isinstance(raw[0], (list, tuple, np.ndarray)):
        return Diagnosis("division_by_zero", "a class that nobody said has no precision, 0 / 0. Write F1 as 2 right / (there + said), which is 0 then")
    found = [_numbers(value, 3) for value in raw]
    if found[0] is not None and raw[1] is not None and found[1] is None and isinstance(raw[1], (list, tuple, np.ndarray)) and len(raw[1]) == 3:
        return Diagnosis("division_by_zero", "a class that nobody said has no precision, 0 / 0. Write F1 as 2 right / (there + said), which is 0 then")
    if any(f is None for f in found):
        return None
    slips = [_macro_slips(e.inputs) for e in evidence]
    # "said_only" is only to be seen where a class was never said: the first case is right then.
    key = first_match(found, {k: [s[k] for s in slips] for k in slips[0]}, rtol=RTOL)
    return Diagnosis(key, _MACRO_TEXTS[key]) if key else None


def _macro_scores(truth, guess, classes):
    truth, guess = truth.tolist(), guess.tolist()
    recalls, f1s = [], []
    for k in range(classes):
        right = sum(t == g == k for t, g in zip(truth, guess, strict=True))
        recalls.append(right / truth.count(k))
        f1s.append(2 * right / (truth.count(k) + guess.count(k)))
    return sum(t == g for t, g in zip(truth, guess, strict=True)) / len(truth), sum(recalls) / classes, sum(f1s) / classes


EXERCISE_1 = Exercise(
    id="8b.1", title="Three scores", difficulty=2, minutes=6, points=3, name="macro_scores",
    cases=(
        Case("classes of unlike size", _macro_probe(False), _macro_judge),
        Case("a class that is never guessed", _macro_probe(True), _macro_judge),
    ),
    diagnose=_diagnose_macro,
    hints=(
        "For one class k you need three counts: right (truth and guess are k), there (truth is k), said (guess is k).",
        "Recall of k: right / there. Its F1: 2 right / (there + said), which is 2 P R / (P + R) without its 0 / 0.",
        "for k in range(classes): right = ((truth == k) & (guess == k)).sum(); there = (truth == k).sum(); said = (guess == k).sum(); then the means "
        "of both lists.",
    ),
    read="lora_lab/tasks/texts.py, function scores",
    fallback=lambda: _macro_scores,
)  # fmt: skip


# ---------------------------------------------------------------- 8b.2 what belongs together stays together


def _sizes(inputs) -> dict[int, int]:
    groups = inputs["groups"].tolist()
    return {g: groups.count(g) for g in inputs["order"].tolist()}


def _wanted(inputs, spare: int) -> int:
    """n_test: what the first two groups of `order` hold, less `spare`."""
    first, second = list(_sizes(inputs).values())[:2]
    return first + second - spare


def _rows_probe(spare: int):
    def probe(rng):
        s = Script()
        # Two to four rows in a group, so that the first group alone is never enough; the order is not the sorted one, nor that of appearance.
        sizes = rng.permutation([2, 3, 4, 2, 3, 4])
        groups = rng.permutation(np.repeat(np.arange(6) + 10, sizes))
        seen = list(dict.fromkeys(groups.tolist()))
        order = rng.permutation(6) + 10
        while order[:2].min() == 10 or set(order[:2]) & {seen[0], 10}:
            order = rng.permutation(6) + 10
        inputs = {"groups": groups, "order": order}
        s.send("rows", s.call(s.input("groups", groups), s.input("order", order), _wanted(inputs, spare)))
        return s

    return probe


def rows_held(inputs, spare: int) -> list[int]:
    chosen, held = [], 0
    sizes = _sizes(inputs)
    for g in inputs["order"].tolist():
        if held >= _wanted(inputs, spare):
            break
        chosen.append(g)
        held += sizes[g]
    return [i for i, g in enumerate(inputs["groups"].tolist()) if g in chosen]


def _rows(value) -> list[int] | None:
    """Whole numbers in ascending order, from a list or an array; None for anything else."""
    values = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(values, set):
        values = list(values)
    if not isinstance(values, (list, tuple)):
        return None
    values = [v.item() if isinstance(v, np.ndarray) and v.size == 1 else v for v in values]
    return sorted(values) if all(isinstance(v, int) and not isinstance(v, bool) for v in values) else None


def _rows_judge(spare: int):
    def judge(inputs, answers):
        found, expected = _rows(answers["rows"]), rows_held(inputs, spare)
        if found is None:
            return "asked are the numbers of the test rows, as a list"
        torn = [g for g in _sizes(inputs) if 0 < sum(inputs["groups"][i] == g for i in found if 0 <= i < len(inputs["groups"])) < _sizes(inputs)[g]]
        if torn and found != expected:
            return f"group {torn[0]} stands on both sides of the split"
        return None if found == expected else f"the test rows are {found}, expected {expected}"

    return judge


_ROWS_TEXTS = {
    "rows": "you take the first n_test rows, and groups are torn apart; take whole groups, in the given order",
    "n_groups": "you take n_test groups; n_test counts rows",
    "short": "you stop before n_test rows are reached; take groups until there are at least so many",
    "one_more": "one group too many: stop as soon as n_test rows are reached",
    "sorted": "you go through the groups in the order of their numbers; `order` says which come first, and that is the luck of the split",
    "appearance": "you go through the groups as they appear in the data; `order` says which come first, and that is the luck of the split",
    "cut": "the last group is cut to hit n_test exactly, so that a part of it stays in training: the very thing to avoid",
    "groups_returned": "these are numbers of groups; asked are the numbers of their rows, counted from 0",
    "train_rows": "these are the rows for training, all but the test's",
    "from_end": "you take groups from the end of `order`",
}


def _rows_slips(inputs, spare: int) -> dict[str, list[int]]:
    groups, order, n = inputs["groups"].tolist(), inputs["order"].tolist(), _wanted(inputs, spare)
    sizes = _sizes(inputs)

    def until(listed, more=0, less=0):
        chosen, held = [], 0
        for g in listed:
            if held >= n:
                break
            chosen.append(g)
            held += sizes[g]
        if less and held > n:
            chosen = chosen[:-1]
        return list(listed)[: len(chosen) + more]

    def rows(chosen):
        return [i for i, g in enumerate(groups) if g in chosen]

    chosen = until(order)
    in_order = [i for g in order for i in rows([g])]
    return {
        "rows": list(range(n)), "n_groups": rows(order[:n]), "short": rows(until(order, less=1)) if spare else rows(order[:1]),
        "one_more": rows(until(order, more=1)), "sorted": rows(until(sorted(order))), "appearance": rows(until(list(dict.fromkeys(groups)))),
        "cut": sorted(in_order[:n]), "groups_returned": sorted(chosen), "train_rows": [i for i in range(len(groups)) if groups[i] not in chosen],
        "from_end": rows(until(order[::-1])),
    }  # fmt: skip


def _diagnose_rows(evidence: list[Evidence]) -> Diagnosis | None:
    found = [_rows(e.answers.get("rows")) for e in evidence]
    if any(f is None for f in found):
        return None
    slips = [_rows_slips(e.inputs, spare) for e, spare in zip(evidence, (1, 0), strict=True)]
    # Stopping a group early, or one late, shows where the rows come out exactly; the other case may be right by then.
    right = [rows_held(e.inputs, spare) for e, spare in zip(evidence, (1, 0), strict=True)]
    if found[1] == right[1] and found[0] == slips[0]["short"]:
        return Diagnosis("short", _ROWS_TEXTS["short"])
    if found[0] == right[0] and found[1] == slips[1]["one_more"]:
        return Diagnosis("one_more", _ROWS_TEXTS["one_more"])
    keys = [k for k in _ROWS_TEXTS if all(f == s[k] for f, s in zip(found, slips, strict=True))]
    # With n_test hit exactly nothing is cut: that case is right then.
    if not keys and found[1] == right[1] and found[0] == slips[0]["cut"]:
        keys = ["cut"]
    return Diagnosis(keys[0], _ROWS_TEXTS[keys[0]]) if len(keys) == 1 else None


def _test_rows(groups, order, n_test):
    groups, chosen, held = groups.tolist(), set(), 0
    for g in order.tolist():
        if held >= n_test:
            break
        chosen.add(g)
        held += groups.count(g)
    return [i for i, g in enumerate(groups) if g in chosen]


EXERCISE_2 = Exercise(
    id="8b.2", title="Twins stay together", difficulty=1, minutes=5, points=2, name="test_rows",
    cases=(
        Case("whole groups, a row more than asked for", _rows_probe(1), _rows_judge(1)),
        Case("whole groups, exactly as many rows", _rows_probe(0), _rows_judge(0)),
    ),
    diagnose=_diagnose_rows,
    hints=(
        "Draw groups, not rows: each one that is drawn brings all of its rows along.",
        "Go through `order`; add a group to a set, and its number of rows to a count; stop once the count has reached n_test.",
        "return [i for i, g in enumerate(groups.tolist()) if g in chosen]",
    ),
    read="lora_lab/tasks/texts.py, Texts.split",
    fallback=lambda: _test_rows,
)  # fmt: skip


# ---------------------------------------------------------------- 8b.3 one vector for a text


def _mean_probe(lengths):
    def probe(rng):
        s = Script()
        # Vectors at padding are no zeros: an encoder computes something there, too.
        h = rng.normal(size=(len(lengths), max(lengths) + 2, 5)) + 0.5
        mask = np.arange(h.shape[1])[None, :] < np.array(lengths)[:, None]
        s.send("means", s.call(s.input("h", h), s.input("mask", mask)))
        return s

    return probe


def token_means(inputs) -> np.ndarray:
    return np.stack([row[: int(mask.sum())].mean(axis=0) for row, mask in zip(inputs["h"], inputs["mask"], strict=True)])


def _mean_judge(inputs, answers):
    return compare(answers["means"], token_means(inputs), what="the mean of each text's tokens", rtol=RTOL)


_MEAN_TEXTS = {
    "pads_counted": "padding is averaged in as well: a short text then looks like padding. Use the mask",
    "divided_by_length": "padding is set to 0 but still divided by: divide each sum by the number of the text's own tokens, mask.sum(1)",
    "sum": "this is the sum of the tokens; a long text would get a long vector. Divide by their number",
    "first": "this is the vector of the first token, [CLS]; asked is the mean over all of the text's tokens",
    "one_mean": "one number of tokens for the whole batch: divide each text by its own, mask.sum(1)",
    "over_batch": "you average over the texts, not over the tokens: tokens are dimension 1",
    "max": "this is the maximum over the tokens; asked is the mean",
    "pads_only": "the mask is upside down: it is True where there is a token",
}


def _mean_slips(inputs) -> dict[str, np.ndarray]:
    h, m = inputs["h"], inputs["mask"].astype(float)[..., None]
    return {
        "pads_counted": h.mean(1), "divided_by_length": (h * m).mean(1), "sum": (h * m).sum(1), "first": h[:, 0],
        "one_mean": (h * m).sum(1) / m.sum(), "over_batch": h.mean(0), "max": np.where(m > 0, h, -np.inf).max(1),
        "pads_only": (h * (1 - m)).sum(1) / (1 - m).sum(1),
    }  # fmt: skip


def _diagnose_mean(evidence: list[Evidence]) -> Diagnosis | None:
    found = [e.answers.get("means") for e in evidence]
    if any(not isinstance(f, np.ndarray) for f in found):
        return None
    slips = [_mean_slips(e.inputs) for e in evidence]
    key = first_match(found, {k: [s[k] for s in slips] for k in slips[0]}, rtol=RTOL)
    if key is None:
        mean = [e.inputs["h"][e.inputs["mask"]].mean(axis=0) for e in evidence]
        if all(compare(f, m, rtol=RTOL) is None for f, m in zip(found, mean, strict=True)):
            return Diagnosis("batch_lost", "this is one vector for the whole batch; asked is one for each text")
    return Diagnosis(key, _MEAN_TEXTS[key]) if key else None


def _mean_of_tokens(h, mask):
    weights = mask[..., None].to(h.dtype)
    return (h * weights).sum(1) / weights.sum(1)


EXERCISE_3 = Exercise(
    id="8b.3", title="One vector for a text", difficulty=1, minutes=4, points=2, name="mean_of_tokens",
    cases=(
        Case("texts of unlike length", _mean_probe((3, 7, 5)), _mean_judge),
        Case("a text of one token", _mean_probe((1, 6, 4, 2)), _mean_judge),
    ),
    diagnose=_diagnose_mean,
    hints=(
        "A batch is a block, texts are not: what stands behind a text's end must neither be added nor counted.",
        "Make mask (B, T) a block of ones and zeros (B, T, 1), multiply, sum over dimension 1.",
        "weights = mask.unsqueeze(-1).to(h.dtype); return (h * weights).sum(1) / weights.sum(1)",
    ),
    read="lora_lab/encoder.py, class Reader",
    fallback=lambda: _mean_of_tokens,
)  # fmt: skip


# ---------------------------------------------------------------- 8b.4 what trains


_BERTS = ((4, 128, 4, 3), (12, 768, 8, 2), (6, 96, 5, 7))  # layers, width, r, classes


def _count_probe(rng):
    s = Script()
    for k, sizes in enumerate(_BERTS):
        s.send(f"count {k}", s.call(*sizes))
    return s


def trained_count(layers: int, width: int, r: int, classes: int) -> int:
    """Matrix by matrix: A (r, width) and B (width, r) of query and of value in each layer; the head's weight and bias."""
    shapes = [shape for _ in range(layers) for _ in ("query", "value") for shape in ((r, width), (width, r))] + [(classes, width), (classes,)]
    return sum(math.prod(shape) for shape in shapes)


def _count_judge(inputs, answers):
    for k, sizes in enumerate(_BERTS):
        found = _numbers([answers[f"count {k}"]], 1)
        if found is None or found[0] != trained_count(*sizes):
            shown = "no number" if found is None else f"{found[0]:,.0f}"
            return f"layers, width, r, classes = {sizes}: {shown}, expected {trained_count(*sizes):,}"
    return None


_COUNT_SLIPS = {
    "no_head": (lambda n, d, r, k: 4 * n * r * d, "the head is missing: it is fresh, so it trains, weight and bias"),
    "no_head_bias": (lambda n, d, r, k: 4 * n * r * d + k * d, "the head's bias is missing: one number for each class"),
    "one_factor": (lambda n, d, r, k: 2 * n * r * d + k * d + k, "half of the adapters is missing: either A or B, or one of query and value"),
    "three": (lambda n, d, r, k: 6 * n * r * d + k * d + k, "three matrices in each layer; adapted are two, query and value"),
    "four": (lambda n, d, r, k: 8 * n * r * d + k * d + k, "twice too many: two matrices in each layer, each with one A and one B"),
    "one_layer": (lambda n, d, r, k: 4 * r * d + k * d + k, "this is one layer's; there are more"),
    "full": (lambda n, d, r, k: 2 * n * d * d + k * d + k, "those are the query and value matrices themselves; LoRA trains A and B beside them"),
    "with_bias": (lambda n, d, r, k: 4 * n * r * d + 2 * n * d + k * d + k, "the biases of query and value are counted; they are frozen with their layers"),
    "product": (lambda n, d, r, k: 2 * n * (r * d) * (d * r) + k * d + k, "A and B are two matrices: their sizes add up, they don't multiply"),
    "head_each_layer": (lambda n, d, r, k: n * (4 * r * d + k * d + k), "the head is counted in each layer; there is one, on top"),
}


def _diagnose_count(evidence: list[Evidence]) -> Diagnosis | None:
    found = [_numbers([evidence[0].answers.get(f"count {k}")], 1) for k in range(len(_BERTS))]
    if any(f is None for f in found):
        return None
    keys = [key for key, (slip, _) in _COUNT_SLIPS.items() if all(f[0] == slip(*sizes) for f, sizes in zip(found, _BERTS, strict=True))]
    return Diagnosis(keys[0], _COUNT_SLIPS[keys[0]][1]) if len(keys) == 1 else None


def _trained_numbers(layers, width, r, classes):
    return layers * 2 * (r * width + width * r) + classes * width + classes


EXERCISE_4 = Exercise(
    id="8b.4", title="Query, value and a head", difficulty=2, minutes=4, points=2, name="trained_numbers",
    cases=(Case("the pocket encoder, BERT's base size, and one more", _count_probe, _count_judge),),
    diagnose=_diagnose_count,
    hints=(
        "Three questions: how many matrices are adapted? What do A and B of one of them hold? What trains besides?",
        "A is (r, width), B is (width, r); query and value in every layer; one head, a linear layer with its bias.",
        "layers * 2 * (r * width + width * r) + classes * width + classes",
    ),
    read="`lora-lab count`, and lab 04",
    fallback=lambda: _trained_numbers,
)  # fmt: skip


# ---------------------------------------------------------------- 8b.5 the best span


def best_span_of(first, last, longest: int) -> list[int]:
    """By trying every pair."""
    pairs = [(a, b) for a in range(len(first)) for b in range(a, min(a + longest, len(first)))]
    return list(max(pairs, key=lambda p: first[p[0]] + last[p[1]]))


def _span_slips(inputs, longest: int) -> dict[str, list[int]]:
    first, last = inputs["first"].tolist(), inputs["last"].tolist()
    T = len(first)
    total = {(a, b): first[a] + last[b] for a in range(T) for b in range(T)}

    def best(allowed, score=None):
        pairs = [p for p in total if allowed(*p)]
        return list(max(pairs, key=score or total.get))

    a0, b0 = max(range(T), key=first.__getitem__), max(range(T), key=last.__getitem__)
    return {
        "each_alone": [a0, b0],
        "first_then_last": [a0, max(range(a0, min(a0 + longest, T)), key=last.__getitem__)],
        "any_length": best(lambda a, b: b >= a),
        "backwards_allowed": best(lambda a, b: abs(b - a) < longest),
        "one_too_long": best(lambda a, b: 0 <= b - a <= longest),
        "one_too_short": best(lambda a, b: 0 <= b - a < longest - 1),
        "product": best(lambda a, b: 0 <= b - a < longest, lambda p: first[p[0]] * last[p[1]]),
        "no_single": best(lambda a, b: 0 < b - a < longest),
    }


def _span_probe(apart: tuple[str, ...], longest: int, lower: float = 0.0):
    def probe(rng):
        for _ in range(4000):  # until the slips that this case is about lead elsewhere
            inputs = {"first": rng.normal(size=12) * 2 - lower, "last": rng.normal(size=12) * 2 - lower}
            right, slips = best_span_of(inputs["first"], inputs["last"], longest), _span_slips(inputs, longest)
            if all(slips[key] != right for key in apart) and len({tuple(slips[key]) for key in apart}) == len(apart):
                break
        s = Script()
        s.send("span", s.call(s.input("first", inputs["first"]), s.input("last", inputs["last"]), longest))
        return s

    return probe


_SPAN_CASES = (
    (("each_alone", "first_then_last", "any_length"), 4), (("one_too_long", "backwards_allowed", "product"), 3), (("no_single", "each_alone"), 3),
    (("one_too_short", "any_length"), 4, 20.0),  # all scores are below 0: a search that starts at 0 finds nothing
)  # fmt: skip


def _span_judge(longest: int):
    def judge(inputs, answers):
        found = _rows_in_order(answers["span"])
        if found is None:
            return "asked are two whole numbers: the first and the last token of the span"
        expected = best_span_of(inputs["first"], inputs["last"], longest)
        if found == expected:
            return None
        if found[1] < found[0]:
            return f"the span ends before it begins: {found[0]} to {found[1]}"
        if found[1] - found[0] >= longest:
            return f"the span {found[0]} to {found[1]} has {found[1] - found[0] + 1} tokens; {longest} are allowed"
        return f"the span is {found[0]} to {found[1]}; {expected[0]} to {expected[1]} has a higher sum"

    return judge


def _rows_in_order(value) -> list[int] | None:
    found = _numbers(value, 2)
    return [int(v) for v in found] if found is not None and all(v == int(v) for v in found) else None


_SPAN_TEXTS = {
    "each_alone": "the first and the last token are chosen apart from each other; choose the pair with the highest sum among those that are allowed",
    "first_then_last": "the best first token is fixed before a last one is looked for; a slightly worse first may have a much better last. Try all pairs",
    "any_length": "spans longer than `longest` are allowed here",
    "backwards_allowed": "spans that end before they begin are allowed here",
    "one_too_long": "one token too long: from a to b there are b - a + 1 tokens",
    "one_too_short": "one token too short: a span of `longest` tokens is allowed, and ends at a + longest - 1",
    "product": "the scores are multiplied; they are logarithms up to a constant, and two bad ones would make a good product. Add them",
    "no_single": "an answer of one token is left out: the last token may be the first",
}


def _diagnose_span(evidence: list[Evidence]) -> Diagnosis | None:
    found = [_rows_in_order(e.answers.get("span")) for e in evidence]
    wanted = [best_span_of(e.inputs["first"], e.inputs["last"], case[1]) for e, case in zip(evidence, _SPAN_CASES, strict=True)]
    # Any first value of "best so far" that is not reached leaves the pair as it was before the search: (0, 0), (-1, -1) or None.
    if found[:-1] == wanted[:-1] and (found[-1] is None or found[-1] in ([0, 0], [-1, -1])) and wanted[-1] != [0, 0]:
        return Diagnosis("starts_at_zero", "where all scores are below 0, nothing beats your first 'best so far'. Begin with -inf, or with the first pair")
    if any(f is None for f in found):
        return None
    slips = [_span_slips(e.inputs, case[1]) for e, case in zip(evidence, _SPAN_CASES, strict=True)]
    keys = [key for key in _SPAN_TEXTS if all(f == s[key] for f, s in zip(found, slips, strict=True))]
    if len(keys) == 1:
        return Diagnosis(keys[0], _SPAN_TEXTS[keys[0]])
    if all(f == [a, b + 1] for f, (a, b) in zip(found, wanted, strict=True)):
        return Diagnosis("end_exclusive", "the second number is the token behind the span, as in a slice; asked is the last token itself")
    return None


def _best_span(first, last, longest):
    first, last = first.tolist(), last.tolist()
    best = None
    for a in range(len(first)):
        for b in range(a, min(a + longest, len(first))):
            if best is None or first[a] + last[b] > best[0]:
                best = (first[a] + last[b], a, b)
    return best[1], best[2]


EXERCISE_5 = Exercise(
    id="8b.5", title="From scores to an answer", difficulty=3, minutes=6, points=4, name="best_span",
    cases=tuple(
        Case(title, _span_probe(*case), _span_judge(case[1]))
        for title, case in zip(
            ("the pair counts, not each alone", "in order, and not too long", "an answer of one token", "full length, and all scores below 0"),
            _SPAN_CASES, strict=True,
        )
    ),
    diagnose=_diagnose_span,
    hints=(
        "Not every pair of a first and a last token is a span. Which are? Of these, the one with the highest sum wins.",
        "For each first token a the last one, b, runs from a to a + longest - 1, but not over the end of the text.",
        "Two loops, and remember the best: for a in range(T): for b in range(a, min(a + longest, T)): if first[a] + last[b] > best ...",
    ),
    read="lora_lab/tasks/answers.py, function best_spans",
    fallback=lambda: _best_span,
)  # fmt: skip


LAB = Lab(
    number="8b",
    name="08b_reading",
    title="One method, many tasks: reading",
    minutes=55,
    core=False,
    objectives=(
        "adapt an encoder such as BERT with LoRA on query and value, and say what else trains",
        "score a classifier with accuracy, recall and F1, and beside a counter of words",
        "keep twins on one side of a split, and say what happens otherwise",
        "read an answer off two rows of scores, and show with controls that the model has read the question",
    ),
    needs=("lab 02 or 02b", "lab 07 helps, and is not needed"),
    exercises=(EXERCISE_1, EXERCISE_2, EXERCISE_3, EXERCISE_4, EXERCISE_5),
    predictions=(
        Prediction(
            "8b.A", "Four libraries, some 380 docstrings to learn from. Who guesses more of the others?",
            {"a": "the encoder with LoRA", "b": "counted words and a logistic regression", "c": "they differ by less than 3 points"},
        ),
        Prediction(
            "8b.B", "Twins, 'the soup was warm' and 'the soup was cold', are torn apart by a random split. What becomes of a counter of words?",
            {"a": "it gains: it has seen nearly every test sentence", "b": "nothing much", "c": "it falls below chance"},
        ),
        Prediction(
            "8b.C", "The words of each note are shuffled. How many of the three classes' notes does the adapted model still get right?",
            {"a": "as many as before", "b": "about half of them", "c": "about a third, as by chance"},
        ),
        Prediction(
            "8b.D", "Every passage gets the question of another one. How often is the old answer still found?",
            {"a": "in less than a fifth", "b": "in a fifth to a half", "c": "as often as before"},
        ),
    ),
)  # fmt: skip
