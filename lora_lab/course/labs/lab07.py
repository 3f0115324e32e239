"""Lab 07, Fine-tune GPT-2: its exercises.

Sources: Papineni et al. 2002 on BLEU's clipped precision; Hu et al. 2021 (arXiv 2106.09685) on alpha / r and on the task. Expectations come from
numpy and plain counting, never from the formula that is asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import product

import numpy as np

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, Question, compare
from ..script import Script
from .formulas import first_match

RTOL = 1e-5  # a student may pass through float32; a mistake changes the first digits


def _number(value) -> float | None:
    """A finite number, also as a tensor of one; None for anything else."""
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iuf":
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


# ---------------------------------------------------------------------------------------------------------------------
# 7.1  reference_loss(logits, ids, prompt, length)
#
# Rows have prompts and lengths of their own, one of them fills the whole row, one has a reference that is the end of text alone: so first, last, padded and
# unpadded all differ. Token 0 is end-of-text and padding, as in GPT-2's batches.

ROWS = {"two": ((3, 7), (4, 10)), "four": ((2, 9), (5, 6), (3, 8), (6, 11))}  # (prompt, length) of each row; the longest is T
VOCABULARY = 13


def _loss_probe(rows):
    def probe(rng):
        s = Script()
        T = max(length for _, length in rows)
        logits = rng.normal(size=(len(rows), T, VOCABULARY)) * 2
        ids = rng.integers(1, VOCABULARY, size=(len(rows), T))
        for row, (prompt, length) in enumerate(rows):
            ids[row, prompt - 1], ids[row, length - 1 :] = 0, 0
        prompt, length = (np.array(column) for column in zip(*rows, strict=True))
        s.send("loss", s.call(*(s.input(name, value) for name, value in
                                (("logits", logits), ("ids", ids), ("prompt", prompt), ("length", length)))))  # fmt: skip
        return s

    return probe


_SHIFTS = {
    "": ("", 1),
    "no_shift": ("logits[:, t] predict token t + 1; you compare them with token t, which the model has just read", 0),
    "wrong_way": ("you shift the wrong way: logits[:, t] predict token t + 1, so logits[:, :-1] go with ids[:, 1:]", -1),
}
_PARTS = {  # name -> (text, (prompt, length, T) -> the positions of the tokens that count)
    "": ("", lambda p, n, T: range(p, n)),
    "prompt_too": ("the meaning's tokens count as well; nobody asks the model to write those", lambda p, n, T: range(0, n)),
    "pad_counted": ("the padding behind the reference counts as well", lambda p, n, T: range(p, T)),
    "everything": ("every position counts, meaning and padding, too; only the reference should", lambda p, n, T: range(0, T)),
    "first_missing": ("the reference's first token is left out: it is at position `prompt`, counted from 0", lambda p, n, T: range(p + 1, n)),
    "last_prompt": ("the last token of the prompt counts as well: the reference begins at position `prompt`, counted from 0", lambda p, n, T: range(p - 1, n)),
    "end_missing": (
        "the end-of-text behind the reference is left out. It is a token to be learned, or the model never stops; only the same number behind it is padding",
        lambda p, n, T: range(p, n - 1),
    ),
    "mask_not_shifted": (
        "the mask is off by one: after the shift column t stands for token t + 1, so the mask, too, begins in column 1, mask[:, 1:]",
        lambda p, n, T: range(p + 1, n + 1),
    ),
    "mask_by_value": (
        "you leave out every token that is 0. End-of-text is that, too, and it has to be learned; and the meaning, which is not 0, counts. Go by position",
        None,
    ),
    "one_pad": ("one token of padding counts as well: the row ends before position `length`", lambda p, n, T: range(p, n + 1)),
    "only_prompt": ("you count the meaning and leave the reference out: it is the other way round", lambda p, n, T: range(0, p)),
}
_MEANS = {
    "": ("", lambda sums, counts, T: sums.sum() / counts.sum()),
    "mean_of_rows": (
        "you average each row, then the rows: a token of a short reference then weighs more. Divide one sum by the number of all reference tokens",
        lambda sums, counts, T: (sums / np.maximum(counts, 1)).mean(),
    ),
    "padded_mean": (
        "you divide by all positions; the zeros of those that don't count make the mean too small",
        lambda sums, counts, T: sums.sum() / (len(sums) * (T - 1)),
    ),
    "padded_mean_T": (
        "you divide by all positions; the zeros of those that don't count make the mean too small",
        lambda sums, counts, T: sums.sum() / (len(sums) * T),
    ),
    "sum": ("this is the sum; asked is the mean over the reference tokens", lambda sums, counts, T: sums.sum()),
    "per_row": ("you divide by the number of rows; asked is the mean over the reference tokens", lambda sums, counts, T: sums.sum() / len(sums)),
}


def loss_by(inputs, shift: int = 1, part=_PARTS[""][1], mean=_MEANS[""][1]) -> float:
    """The loss token by token: a token at position t costs -log softmax(logits at t - shift)."""
    logits, ids = inputs["logits"], inputs["ids"]
    T = ids.shape[1]
    sums, counts = [], []
    for row, (p, n) in enumerate(zip(inputs["prompt"].tolist(), inputs["length"].tolist(), strict=True)):
        costs = []
        for t in part(p, n, T) if part is not None else np.flatnonzero(ids[row]):
            if not max(shift, 0) <= t < min(T, T + shift):
                continue
            z = logits[row, t - shift]
            costs.append(math.log(np.exp(z - z.max()).sum()) + z.max() - z[ids[row, t]])
        sums.append(sum(costs))
        counts.append(len(costs))
    return float(mean(np.array(sums, dtype=float), np.array(counts), T))


def _loss_judge(inputs, answers):
    return compare(answers["loss"], loss_by(inputs), what="reference_loss(logits, ids, prompt, length)", rtol=RTOL)


def _diagnose_loss(evidence: list[Evidence]) -> Diagnosis | None:
    found = []
    for e in evidence:
        value = e.answers.get("loss")
        if isinstance(value, np.ndarray) and value.size > 1:
            return Diagnosis("not_reduced", "this is a row of numbers; asked is one: the mean over all reference tokens of the batch")
        found.append(_number(value))
    if any(value is None for value in found):
        return None
    tables = (_SHIFTS, _PARTS, _MEANS)
    by_count: dict[int, dict] = {1: {}, 2: {}}
    for keys in product(*tables):
        slips = [key for key in keys if key]
        if 1 <= len(slips) <= 2:
            values = [loss_by(e.inputs, *(table[key][1] for table, key in zip(tables, keys, strict=True))) for e in evidence]
            by_count[len(slips)][keys] = values
    right = [loss_by(e.inputs) for e in evidence]
    if all(compare(-f, v, rtol=RTOL) is None for f, v in zip(found, right, strict=True)):
        return Diagnosis("sign", "the sign: log p is below 0, a loss is -log p")
    if all(compare(f, v / math.log(2), rtol=RTOL) is None for f, v in zip(found, right, strict=True)):
        return Diagnosis("bits", "those are bits; the loss is in nats: the natural logarithm")
    if all(compare(f, math.exp(v), rtol=RTOL) is None for f, v in zip(found, right, strict=True)):
        return Diagnosis("perplexity", "that is the perplexity, exp of the loss; asked is the loss")
    for count in (1, 2):
        alike = [keys for keys, values in by_count[count].items() if all(compare(f, v, rtol=RTOL) is None for f, v in zip(found, values, strict=True))]
        if alike:
            if len(alike) > 1:
                return None
            slips = [(key, table[key][0]) for table, key in zip(tables, alike[0], strict=True) if key]
            return Diagnosis("_and_".join(key.removesuffix("_T") for key, _ in slips), "; and ".join(text for _, text in slips))
    return None


def _reference_loss(logits, ids, prompt, length):
    import torch
    import torch.nn.functional as F

    t = torch.arange(ids.shape[1])
    asked = (t >= prompt[:, None]) & (t < length[:, None])
    labels = ids.masked_fill(~asked, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


LOSS = Exercise(
    id="7.1",
    title="Only the reference counts",
    difficulty=2,
    minutes=7,
    points=4,
    name="reference_loss",
    cases=(
        Case("two examples of unlike lengths", _loss_probe(ROWS["two"]), _loss_judge),
        Case("four examples, a reference of one token among them", _loss_probe(ROWS["four"]), _loss_judge),
    ),
    diagnose=_diagnose_loss,
    hints=(
        "Two questions, one after the other. Which tokens are to be predicted? And which column of the logits predicts the token at position t?",
        "Make labels: ids, with -100 wherever a position is below prompt or not below length. Then logits[:, :-1] belong to labels[:, 1:].",
        "asked = (t >= prompt[:, None]) & (t < length[:, None]) with t = torch.arange(T); labels = ids.masked_fill(~asked, -100); "
        "F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) leaves -100 out by itself.",
    ),
    read="the picture of tokens above the exercise",
    fallback=lambda: _reference_loss,
)


# ---------------------------------------------------------------------------------------------------------------------
# 7.2  clipped_precision(text, references, n)

# Every kind of miscounting gives another number on at least one of them.
SAID = (
    (
        "it is a lighthouse it is a lighthouse it is a light",
        ("it is a tall white lighthouse and it is a light", "the lighthouse is tall and a boat goes to it it is", "a boat goes to a lighthouse"),
        (1, 2),
    ),
    (
        "you can walk there on a footpath a footpath leads there",
        ("a footpath leads to it", "you can walk there on a footpath you can walk", "a footpath"),
        (1, 3),
    ),
    ("a light", ("a steady light", "its light is steady"), (2, 3)),
)


def _precision_probe(which):
    text, references, sizes = SAID[which]

    def probe(rng):
        s = Script()
        for n in sizes:
            s.send(f"n = {n}", s.call(text, list(references), n))
        return s

    return probe


def _grams(text: str, n: int) -> list[tuple]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def precision_by_crossing_out(text: str, references, n: int) -> float:
    """The oracle: for each kind of n-gram, cross out as many in the text as the most generous reference has."""
    grams = _grams(text, n)
    if not grams:
        return 0.0
    matched = 0
    for gram in dict.fromkeys(grams):
        said = sum(g == gram for g in grams)
        allowed = 0
        for reference in references:
            allowed = max(allowed, sum(g == gram for g in _grams(reference, n)))
        matched += said if said < allowed else allowed
    return matched / len(grams)


def _precision_judge(which):
    text, references, sizes = SAID[which]

    def judge(inputs, answers):
        for n in sizes:
            problem = compare(
                answers[f"n = {n}"], precision_by_crossing_out(text, references, n), what=f"clipped_precision(text, references, {n})", rtol=RTOL, atol=1e-9
            )
            if problem:
                return f"{problem}; the text is {text!r}"
        return None

    return judge


def _share(a: float, b: float) -> float:
    return a / b if b else 0.0


def _clipped(text, references, n, allowed) -> float:
    said = Counter(_grams(text, n))
    return _share(sum(min(count, allowed(gram, [Counter(_grams(r, n)) for r in references])) for gram, count in said.items()), sum(said.values()))


_PRECISIONS = {
    "not_clipped": (
        "you count an n-gram as often as the text repeats it. Clip: no more often than it stands in one reference, or repetition pays",
        lambda t, rs, n: _share(sum(any(g in _grams(r, n) for r in rs) for g in _grams(t, n)), len(_grams(t, n))),
    ),
    "references_added": (
        "you clip at what all references together have. They are different ways to say one thing: take the largest count in any one",
        lambda t, rs, n: _clipped(t, rs, n, lambda g, cs: sum(c[g] for c in cs)),
    ),
    "first_reference": ("you look at the first reference alone; any of them may be matched", lambda t, rs, n: _clipped(t, rs[:1], n, lambda g, cs: cs[0][g])),
    "last_reference": ("you look at the last reference alone; any of them may be matched", lambda t, rs, n: _clipped(t, rs[-1:], n, lambda g, cs: cs[0][g])),
    "least": (
        "you clip at the smallest count of the references; the largest is right: one reference that says it is enough",
        lambda t, rs, n: _clipped(t, rs, n, lambda g, cs: min(c[g] for c in cs)),
    ),
    "best_reference": (
        "you score against each reference and take the best one; in BLEU each n-gram may find its match in another reference",
        lambda t, rs, n: max(_clipped(t, [r], n, lambda g, cs: cs[0][g]) for r in rs),
    ),
    "mean_reference": (
        "you average over references; in BLEU each n-gram takes the reference that suits it best",
        lambda t, rs, n: sum(_clipped(t, [r], n, lambda g, cs: cs[0][g]) for r in rs) / len(rs),
    ),
    "sets": (
        "you compare sets, so that each n-gram counts once; count how often it stands there",
        lambda t, rs, n: _share(len(set(_grams(t, n)) & {g for r in rs for g in _grams(r, n)}), len(set(_grams(t, n)))),
    ),
    "sets_over_all": (
        "each kind of n-gram is matched once at most; it may be matched as often as one reference has it",
        lambda t, rs, n: _share(len(set(_grams(t, n)) & {g for r in rs for g in _grams(r, n)}), len(_grams(t, n))),
    ),
    "recall": (
        "you divide by the n-grams of the references: that is recall. Precision asks how much of the *text* is matched",
        lambda t, rs, n: _share(_clipped(t, rs, n, lambda g, cs: max(c[g] for c in cs)) * len(_grams(t, n)), sum(len(_grams(r, n)) for r in rs)),
    ),
    "count": (
        "this is the number of matches; divide by the number of n-grams in the text",
        lambda t, rs, n: _clipped(t, rs, n, lambda g, cs: max(c[g] for c in cs)) * len(_grams(t, n)),
    ),
    "percent": ("those are per cent; asked is a share from 0 to 1", lambda t, rs, n: 100 * precision_by_crossing_out(t, rs, n)),
    "words_only": ("n is not used: these are single words; for n = 2 count pairs of neighbours", lambda t, rs, n: precision_by_crossing_out(t, rs, 1)),
    "by_words": (
        "you divide by the number of words; a text of m words has m - n + 1 n-grams",
        lambda t, rs, n: precision_by_crossing_out(t, rs, n) * _share(len(_grams(t, n)), len(t.split())),
    ),
    "last_gram_lost": ("the last n-gram is lost: a text of m words has m - n + 1 of them", lambda t, rs, n: _without_last(t, rs, n)),
}


def _without_last(text, references, n):
    cut = lambda s: _grams(s, n)[:-1]  # noqa: E731
    said, most = Counter(cut(text)), Counter()
    for reference in references:
        most |= Counter(cut(reference))
    return _share(sum((said & most).values()), sum(said.values()))


def _diagnose_precision(evidence: list[Evidence]) -> Diagnosis | None:
    found, at = [], []
    for e, (text, references, sizes) in zip(evidence[:2], SAID, strict=False):
        for n in sizes:
            found.append(_number(e.answers.get(f"n = {n}")))
            at.append((text, references, n))
    if any(value is None for value in found):
        return None
    key = first_match(found, {key: [formula(*a) for a in at] for key, (_, formula) in _PRECISIONS.items()}, rtol=RTOL, atol=1e-9)
    if key:
        return Diagnosis(key, _PRECISIONS[key][0])
    if all(compare(f, precision_by_crossing_out(*a), rtol=RTOL, atol=1e-9) is None for f, a in zip(found, at, strict=True)) and evidence[2].error is not None:
        return Diagnosis("too_short", "right, but a text of fewer than n words has no n-gram at all: return 0.0 there")
    return None


def _clipped_precision(text, references, n):
    def grams(words):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    said, most = grams(text.split()), Counter()
    for reference in references:
        most |= grams(reference.split())
    return sum((said & most).values()) / max(sum(said.values()), 1)


PRECISION = Exercise(
    id="7.2",
    title="What BLEU counts",
    difficulty=2,
    minutes=6,
    points=3,
    name="clipped_precision",
    cases=(
        Case("a text that repeats itself", _precision_probe(0), _precision_judge(0)),
        Case("several references, each right in its own place", _precision_probe(1), _precision_judge(1)),
        Case("a text shorter than n words", _precision_probe(2), _precision_judge(2)),
    ),
    diagnose=_diagnose_precision,
    hints=(
        "How often may “it is” count in a text that says it three times, if one reference has it twice and another once?",
        "collections.Counter counts n-grams: tuple(words[i : i + n]). Of two counters, a & b keeps the smaller and a | b the larger of each count.",
        "most = Counter(); for each reference: most |= grams(reference). Then sum((said & most).values()) / max(sum(said.values()), 1).",
    ),
    read="the paragraph above the exercise; Papineni et al. 2002, section 2.1",
    fallback=lambda: _clipped_precision,
)


# ---------------------------------------------------------------------------------------------------------------------
# 7.3  volume_of(W, W0, A, B, r, alpha)

MERGED = (dict(r=3, alpha=5.0, k=1.0), dict(r=4, alpha=14.0, k=4.0), dict(r=2, alpha=7.0, k=-0.5), dict(r=5, alpha=3.0, k=2.0))
OUT, IN = 12, 7
ELSE = 0.15  # what else has happened to W, rounding or a little training, as a share of the update: only a fit is a fit then


def _volume_probe(size: Mapping):
    def probe(rng):
        s = Script()
        W0, A, B = rng.normal(size=(OUT, IN)), rng.normal(size=(size["r"], IN)), 0.3 * rng.normal(size=(OUT, size["r"]))
        B[OUT // 3 : 2 * OUT // 3] = 0.0  # as in GPT-2's q|k|v, where k is left alone
        update = size["alpha"] / size["r"] * B @ A
        W = W0 + size["k"] * update + ELSE * math.sqrt(np.square(update).mean()) * rng.normal(size=(OUT, IN))
        s.send("volume", s.call(*(s.input(name, value) for name, value in (("W", W), ("W0", W0), ("A", A), ("B", B))), size["r"], size["alpha"]))
        return s

    return probe


def fitted(inputs, size) -> float:
    """The oracle: numpy's least squares."""
    update = (size["alpha"] / size["r"] * inputs["B"] @ inputs["A"]).ravel()
    return float(np.linalg.lstsq(update[:, None], (inputs["W"] - inputs["W0"]).ravel(), rcond=None)[0][0])


def _volume_judge(size: Mapping):
    def judge(inputs, answers):
        return compare(answers["volume"], fitted(inputs, size), what="volume_of(W, W0, A, B, r, alpha)", rtol=RTOL)

    return judge


def _fits(direction, change):
    return float((direction * change).sum() / (direction * direction).sum())


def _mean_ratio(D, C, z) -> float:
    return float((C[D != 0] / D[D != 0]).mean())


def _median_ratio(D, C, z) -> float:
    return float(np.median(C[D != 0] / D[D != 0]))


_VOLUMES = {
    "scaling_missing": ("you measure in units of BA; at volume 1 the update is (alpha / r) BA", lambda D, C, z: _fits(D, C) * z["alpha"] / z["r"]),
    "division_by_r_missing": ("your unit is alpha BA; at volume 1 the update is (alpha / r) BA", lambda D, C, z: _fits(D, C) / z["r"]),
    "scaling_inverted": ("alpha / r is upside down", lambda D, C, z: _fits(D, C) * (z["alpha"] / z["r"]) ** 2),
    "scaling_sqrt": ("that is rsLoRA's unit, alpha / √r; here it is alpha / r", lambda D, C, z: _fits(D, C) / math.sqrt(z["r"])),
    "norms": (
        "a ratio of norms has no sign: an update that was subtracted would seem to be added",
        lambda D, C, z: float(np.linalg.norm(C) / np.linalg.norm(D)),
    ),
    "norms_without_scaling": (
        "a ratio of norms has no sign, and at volume 1 the update is (alpha / r) BA",
        lambda D, C, z: float(np.linalg.norm(C) / np.linalg.norm(D)) * z["alpha"] / z["r"],
    ),
    "inverted": ("upside down: you measure the full update in units of the change. Below the line belongs (ΔW * ΔW).sum()", lambda D, C, z: 1 / _fits(D, C)),
    "fit_inverted": ("you divide by the square of the change; divide by that of the update, (ΔW * ΔW).sum()", lambda D, C, z: _fits(C, D)),
    "sums": (
        "in sums entries of both signs cancel, and what is left depends on chance. Multiply by ΔW before you add up",
        lambda D, C, z: float(C.sum() / D.sum()),
    ),
    "absolute_sums": (
        "a ratio of absolute values has no sign: an update that was subtracted would seem to be added",
        lambda D, C, z: float(np.abs(C).sum() / np.abs(D).sum()),
    ),
    "median": ("a median of ratios is near it; asked is the k for which the matrices are nearest in the Frobenius norm, a projection", _median_ratio),
    "mean_ratio": ("in a mean of ratios the entries where ΔW is nearly 0 decide. Compare the matrices as a whole, by a projection", _mean_ratio),
    "not_normalised": ("a product alone depends on how long ΔW is: divide by (ΔW * ΔW).sum()", lambda D, C, z: float((D * C).sum())),
    "norm_not_squared": ("divide by the square of ΔW's norm: along ΔW itself the answer must be 1", lambda D, C, z: float((D * C).sum() / np.linalg.norm(D))),
    "cosine": (
        "that is a cosine: it says whether the directions agree, not how much there is",
        lambda D, C, z: float((D * C).sum() / np.linalg.norm(D) / np.linalg.norm(C)),
    ),
    "squared_norms": ("a ratio of squared norms is the volume squared", lambda D, C, z: float((C * C).sum() / (D * D).sum())),
    "subtracted": ("the sign: the change is W - W0", lambda D, C, z: -_fits(D, C)),
    "extra": ("you measure what is left when the adapter is taken off: one less than the volume", lambda D, C, z: _fits(D, C) - 1),
}


def _diagnose_volume(evidence: list[Evidence]) -> Diagnosis | None:
    runs = []
    for e, size in zip(evidence, MERGED, strict=True):
        value = e.answers.get("volume")
        if isinstance(value, np.ndarray) and value.size > 1:
            return Diagnosis("elementwise", "this is a number for each entry; asked is one volume for the whole matrix")
        if isinstance(value, (int, float, np.ndarray)) and not isinstance(value, bool) and not np.isfinite(value).all():
            return Diagnosis("elementwise", "you divide entry by entry, and some of ΔW's entries are 0 (the rows of k). Compare the matrices as a whole")
        runs.append((_number(value), size["alpha"] / size["r"] * e.inputs["B"] @ e.inputs["A"], e.inputs["W"] - e.inputs["W0"], e.inputs["W"], size))
    if any(found is None for found, *_ in runs):
        return None
    found = [f for f, *_ in runs]
    candidates = {key: [formula(D, C, z) for _, D, C, _, z in runs] for key, (_, formula) in _VOLUMES.items()}
    candidates["base_not_removed"] = [_fits(D, W) for _, D, _, W, _ in runs]
    key = first_match(found, candidates, rtol=RTOL)
    if key == "base_not_removed":
        return Diagnosis(key, "W0 is still in it: the change is W - W0")
    return Diagnosis(key, _VOLUMES[key][0]) if key else None


def _volume_of(W, W0, A, B, r, alpha):
    update = alpha / r * B @ A
    return float(((W - W0) * update).sum() / (update * update).sum())


VOLUME = Exercise(
    id="7.3",
    title="How loud is it in there?",
    difficulty=2,
    minutes=6,
    points=3,
    name="volume_of",
    cases=tuple(
        Case(title, _volume_probe(size), _volume_judge(size))
        for title, size in zip(
            ("merged as it should be", "merged without dividing by r", "merged with half a volume below zero", "merged twice"), MERGED, strict=True
        )
    ),
    diagnose=_diagnose_volume,
    hints=(
        "W - W0 is a multiple of the update, and something small beside it. Which multiple? The two are vectors, only written as matrices.",
        "The k that makes ‖(W - W0) - k ΔW‖ least is a projection: ⟨W - W0, ΔW⟩ / ⟨ΔW, ΔW⟩, with ΔW = (alpha / r) B A.",
        "update = alpha / r * B @ A; return ((W - W0) * update).sum() / (update * update).sum()",
    ),
    read="lab 02 on merging; the paragraph above the exercise",
    fallback=lambda: _volume_of,
)


# ---------------------------------------------------------------------------------------------------------------------
# 7.4  verdict(volumes, losses)

VERDICTS = ("silent", "harmful", "too loud", "healthy")
NAN, INF = math.nan, math.inf
CURVES = {  # title -> (volumes, losses, the truth by construction)
    "healthy": ((-1.0, 0.0, 0.0625, 0.25, 0.5, 1.0, 2.0), (6.1, 4.0, 3.8, 3.1, 2.3, 1.7, 2.9), "healthy"),
    "healthy, best at half a volume": ((0.0, 0.25, 0.5, 1.0, 2.0), (3.0, 2.6, 2.2, 2.4, 5.0), "healthy"),
    "healthy, best at three quarters": ((0.0, 0.25, 0.5, 0.75, 1.0), (3.0, 2.6, 2.2, 2.1, 2.4), "healthy"),
    "healthy, best beyond 1": ((2.0, 1.0, 0.5, 0.0, -1.0), (1.5, 1.6, 2.0, 2.9, 4.0), "healthy"),  # from loud to quiet
    "too loud": ((-1.0, 0.0, 0.0625, 0.25, 0.5, 1.0, 2.0), (9.0, 4.0, 1.8, 5.5, 7.9, 9.5, 11.0), "too loud"),
    "too loud, and still better than nothing": ((0.0, 0.25, 0.5, 1.0, 2.0), (4.0, 1.9, 2.5, 3.9, 8.0), "too loud"),
    "too loud, best at 0.4": ((0.0, 0.1, 0.4, 0.5, 1.0), (4.0, 3.2, 2.0, 2.1, 3.0), "too loud"),
    "harmful": ((-1.0, 0.0, 0.0625, 0.25, 0.5, 1.0, 2.0), (4.9, 4.0, 4.1, 5.2, 6.0, 7.1, 9.0), "harmful"),
    "harmful, best below zero": ((-1.0, 0.0, 0.5, 1.0, 2.0), (3.7, 4.0, 4.4, 4.9, 6.0), "harmful"),
    "silent": ((-1.0, 0.0, 0.5, 1.0, 2.0), (4.0, 4.0, 4.0, 4.0, 4.0), "silent"),
    "silent, but for rounding": ((-1.0, 0.0, 0.5, 1.0, 2.0), (4.0, 4.0000001, 4.0, 3.9999999, 4.0000001), "silent"),
    "not a number at the loud end": ((-1.0, 0.0, 0.0625, 0.5, 1.0, 2.0), (7.0, 4.0, 2.1, 9.0, NAN, NAN), "too loud"),
    "infinite at the loud end": ((-1.0, 0.0, 0.5, 1.0, 2.0), (6.0, 4.0, 2.7, 2.1, INF), "healthy"),
}
GROUPS = {
    "healthy and too loud": [t for t in CURVES if t.startswith(("healthy", "too loud"))],
    "harmful": [t for t in CURVES if t.startswith("harmful")],
    "silent, also but for rounding": [t for t in CURVES if t.startswith("silent")],
    "a loss that is no number": [t for t in CURVES if "number" in t or "infinite" in t],
}


def _verdict_probe(titles):
    def probe(rng):
        s = Script()
        for title in titles:
            volumes, losses, _ = CURVES[title]
            s.send(title, s.call(list(volumes), list(losses)))
        return s

    return probe


def _verdict_judge(titles):
    def judge(inputs, answers):
        for title in titles:
            volumes, losses, truth = CURVES[title]
            found = answers[title]
            if found != truth:
                return f"volumes {list(volumes)} with losses {list(losses)}: expected {truth!r}, found {found!r}"
        return None

    return judge


def _rule(
    best=min,
    clean=lambda loss: INF if math.isnan(loss) else loss,
    place=lambda v, i: v,
    silent=1e-6,
    edge=0.5,
    harmful=lambda b: b <= 0,
    loud=lambda b, edge: b < edge,
):
    def rule(volumes, losses):
        values = [clean(loss) for loss in losses]
        finite = [v for v in values if math.isfinite(v)]
        if silent is not None and len(finite) == len(values) and max(values) - min(values) <= silent:
            return "silent"
        i = values.index(best(values))
        b = place(volumes[i], i)
        return "harmful" if harmful(b) else "too loud" if loud(b, edge) else "healthy"

    return rule


def _only_one(volumes, losses):
    at = dict(zip(volumes, losses, strict=True))
    if max(losses) - min(losses) <= 1e-6:
        return "silent"
    return "healthy" if at[1.0] < at[0.0] else "harmful"


_RULES = {
    "largest": ("you look for the largest loss; the best volume has the smallest", _rule(best=max)),
    "exact_silence": ("losses that differ in the last digits are silent, too: allow 1e-6", _rule(silent=0.0)),
    "silence_forgotten": ("a curve that is level is silent; ask that first, for argmin finds a best volume on it all the same", _rule(silent=None)),
    "index": ("you compare the place in the list; ask for the volume that stands there", _rule(place=lambda v, i: i)),
    "only_one": ("you compare volume 1 with volume 0 alone: that can't tell an adapter that is too loud from one that learned harm", _only_one),
    "edge_inside": ("a best volume of 0.5 is healthy: too loud is below 0.5", _rule(loud=lambda b, edge: b <= edge)),
    "edge_lower": ("too loud reaches up to 0.5: a best volume of 0.4 is too loud", _rule(edge=0.3)),
    "below_1": ("healthy begins at 0.5, not at 1", _rule(edge=1.0)),
    "only_1": ("healthy is from 0.5 on, beyond 1 as well", _rule(loud=lambda b, edge: b != 1.0)),
    "zero_is_loud": ("a best volume of 0 means: better without the adapter. That is harmful", _rule(harmful=lambda b: b < 0)),
    "negative_only_zero": ("a best volume below 0 is harmful, too", _rule(harmful=lambda b: b == 0)),
    "nan_wins": (
        "a loss that is NaN counts as infinite. NaN compares false with everything, so argmin and min may take it for the best: replace it first",
        _rule(clean=lambda loss: -INF if math.isnan(loss) else loss),
    ),
    "loud_beyond": ("“too loud” is an adapter whose *best* volume is small: it has to be turned down", _rule(loud=lambda b, edge: b > 1)),
}


def _diagnose_verdict(evidence: list[Evidence]) -> Diagnosis | None:
    found, titles = [], []
    for e, group in zip(evidence, GROUPS.values(), strict=True):
        for title in group:
            found.append(e.answers.get(title))
            titles.append(title)
    words = [f for f in found if isinstance(f, str)]
    truths = [CURVES[title][2] for title in titles]
    if len(words) == len(found) and found != truths and [f.strip().lower().replace("_", " ").replace("-", " ") for f in found] == truths:
        return Diagnosis("spelling", f"right but for the spelling: the words are {', '.join(map(repr, VERDICTS))}")
    alike = [key for key, (_, rule) in _RULES.items() if [rule(*CURVES[title][:2]) for title in titles] == found]
    if len(alike) == 1:
        return Diagnosis(alike[0], _RULES[alike[0]][0])
    numbers = [t for t in titles if "number" not in t]
    if len(words) == len(found) and all(f == t for f, t, title in zip(found, truths, titles, strict=True) if title in numbers):
        return Diagnosis("nan_wins", _RULES["nan_wins"][0])
    return None


VERDICT = Exercise(
    id="7.4",
    title="Four verdicts from one sweep",
    difficulty=2,
    minutes=6,
    points=3,
    name="verdict",
    cases=tuple(Case(title, _verdict_probe(titles), _verdict_judge(titles)) for title, titles in GROUPS.items()),
    diagnose=_diagnose_verdict,
    hints=(
        "Look at the four panels: what does each say about the best volume?",
        "First make every NaN infinite. Largest and smallest no more than 1e-6 apart: silent. Else take the volume of the smallest loss.",
        'best = volumes[losses.index(min(losses))]; "harmful" if best <= 0, "too loud" if best < 0.5, else "healthy"',
    ),
    read="the four panels above the exercise",
    fallback=lambda: _rule(),
)


# ---------------------------------------------------------------------------------------------------------------------
# 7.5  plan(seconds, cost)

MACHINES = {
    "this laptop, five minutes": (300, {"W_q and W_v": 0.31, "all linear layers": 0.42}),
    "a slow, shared machine, five minutes": (300, {"W_q and W_v": 1.9, "all linear layers": 2.6}),
    "a fast one, two minutes": (120, {"W_q and W_v": 0.05, "all linear layers": 0.09}),
}
RATES, RANKS = (1e-4, 1e-2), (1, 256)
USED = 0.5  # of the budget at least: time that was given and not used is a worse model


def _plan_probe(machine):
    seconds, cost = MACHINES[machine]

    def probe(rng):
        s = Script()
        s.send("plan", s.call(seconds, dict(cost)))
        return s

    return probe


def _whole(value) -> int | None:
    value = _number(value)
    return int(value) if value is not None and value == int(value) else None


def flaws(plan, machine) -> list[tuple[str, str]]:
    """Everything that keeps a plan from being run, as (key, sentence)."""
    seconds, cost = MACHINES[machine]
    if not isinstance(plan, dict):
        return [("no_dict", f"asked is a dict with targets, r, lr, steps, seeds and why; found {'None' if plan is None else type(plan).__name__}")]
    missing = [name for name in ("targets", "r", "lr", "steps", "seeds", "why") if name not in plan]
    if missing:
        return [("incomplete", f"the plan lacks {', '.join(missing)}")]
    found = []
    targets, r, lr, steps = plan["targets"], _whole(plan["r"]), _number(plan["lr"]), _whole(plan["steps"])
    seeds = plan["seeds"].tolist() if isinstance(plan["seeds"], np.ndarray) else plan["seeds"]
    if not isinstance(targets, str) or targets not in cost:
        found.append(("unknown_targets", f"targets is one of {', '.join(map(repr, cost))}, those that were measured; found {targets!r}"))
    if r is None or not RANKS[0] <= r <= RANKS[1]:
        found.append(("rank", f"r is a whole number from {RANKS[0]} to {RANKS[1]}, the width of this model; found {plan['r']!r}"))
    if lr is None or lr <= 0:
        found.append(("lr", f"lr is a number above 0; found {plan['lr']!r}"))
    elif lr > RATES[1]:
        found.append(
            ("lr_too_high", f"lr = {lr:g} under Adam with alpha = 2r: look at the patient whose rate was ten times too high. Stay at {RATES[1]:g} or below")
        )
    elif lr < RATES[0]:
        found.append(("lr_too_low", f"lr = {lr:g}: in some hundred steps of Adam a B that starts at 0 gets nowhere. Take {RATES[0]:g} or more"))
    if not isinstance(seeds, (list, tuple)) or len(seeds) < 2:
        found.append(("one_seed", f"a choice is defended on two seeds, as a list; found {seeds!r}"))
    elif len({str(s) for s in seeds}) < len(seeds):
        found.append(("same_seed", f"two runs of one seed are one run: {seeds!r}"))
    if steps is None or steps < 1:
        found.append(("steps", f"steps is a whole number, 1 or more; found {plan['steps']!r}"))
    elif isinstance(targets, str) and targets in cost and isinstance(seeds, (list, tuple)) and seeds:
        time = steps * cost[targets]
        if time > seconds:
            found.append(("over_budget", f"{steps} steps of {cost[targets]:g} s are {time:.0f} s; there are {seconds}"))
        elif time * len(seeds) > seconds:
            found.append(("seeds_not_counted", f"{steps} steps fit once, but {len(seeds)} seeds take {time * len(seeds):.0f} s; there are {seconds}"))
        elif time * len(seeds) < USED * seconds:
            found.append(
                ("budget_unused", f"{steps} steps on {len(seeds)} seeds take {time * len(seeds):.0f} s of {seconds}: more steps would make a better model")
            )
    if not isinstance(plan["why"], str) or len(plan["why"].split()) < 12:
        found.append(("no_reason", "say why, in a dozen words or more: what would you answer somebody who took another r?"))
    return found


def _plan_judge(machine):
    def judge(inputs, answers):
        found = flaws(answers["plan"], machine)
        return found[0][1] if found else None

    return judge


def _diagnose_plan(evidence: list[Evidence]) -> Diagnosis | None:
    if any(e.error is not None for e in evidence):
        return None
    plans = [e.answers.get("plan") for e in evidence]
    found = {machine: flaws(plan, machine) for machine, plan in zip(MACHINES, plans, strict=True)}
    keys = [key for flaw in found.values() for key, _ in flaw]
    budget = {"over_budget", "seeds_not_counted", "budget_unused"}
    if keys and set(keys) <= budget:
        steps = [_whole(plan["steps"]) for plan in plans]
        if steps[0] == steps[1]:  # of two machines with as many seconds, one of which needs six times as long for a step
            return Diagnosis(
                "ignores_the_machine", f"{steps[0]} steps on a fast machine and on a slow one: make them from `seconds` and from what a step costs there"
            )
        if set(keys) == {"seeds_not_counted"}:
            return Diagnosis("seeds_not_counted", "the budget is for all seeds together: divide by their number, too")
    if keys and len(set(keys)) == 1:
        return Diagnosis(keys[0], next(text for flaw in found.values() for _, text in flaw))
    return None


def _plan(seconds, cost):
    targets, seeds = "all linear layers", [0, 1]
    return {
        "targets": targets, "r": 16, "lr": 3e-3, "seeds": seeds, "steps": int(0.9 * seconds / cost[targets] / len(seeds)),
        "why": "Every matrix learns a little, r = 16 is far from the edge of what helps, and steps matter more than rank in five minutes.",
    }  # fmt: skip


PLAN = Exercise(
    id="7.5",
    title="Five minutes",
    difficulty=1,
    minutes=5,
    points=3,
    name="plan",
    cases=tuple(Case(machine, _plan_probe(machine), _plan_judge(machine)) for machine in MACHINES),
    diagnose=_diagnose_plan,
    hints=(
        "What does a step cost with the targets you choose, and how many runs have to fit?",
        "steps = share * seconds / cost[targets] / number of seeds, rounded down, with a share below 1 for writing and scoring.",
        'return {"targets": ..., "r": 16, "lr": 3e-3, "seeds": [0, 1], "steps": int(0.9 * seconds / cost[targets] / 2), "why": "..."}',
    ),
    read="your runs above: which learning rate held, which failed",
    fallback=lambda: _plan,
)


LAB = Lab(
    number="7",
    name="07_fine_tune_gpt2",
    title="Fine-tune GPT-2",
    minutes=60,
    core=True,
    objectives=(
        "train GPT-2 to put facts into words, with the loss where it belongs",
        "read what a model writes, and score it beside floors",
        "save, load, merge, swap and switch off adapters, and take one to peft and back",
        "tell a healthy adapter from three sick ones by one sweep of its volume",
        "predict memory before you train, and plan a run for a budget",
    ),
    needs=("lab 02", "lab 05 for GPT-2's layers", "lab 03 for r, alpha and the learning rate"),
    exercises=(LOSS, PRECISION, VOLUME, VERDICT, PLAN),
    predictions=(
        Prediction(
            "7.A",
            "After this short run, where will BLEU of the fine-tuned model be?",
            {"a": "below both floors", "b": "between nearest neighbour and template", "c": "above both"},
        ),
        Prediction(
            "7.B",
            "The adapter's volume is turned to 2. On examples it has not seen, the loss will be ...",
            {"a": "lower than at 1: more of a good thing", "b": "between those at 1 and at 0", "c": "higher than without the adapter"},
        ),
        Prediction(
            "7.C",
            "Which patient was loaded by a program that forgot to divide alpha by r?",
            {"a": "A", "b": "B", "c": "C"},
        ),
    ),
    questions=(
        Question(
            "7.F1",
            "Defend r, the rate and the targets",
            minutes=15,
            ask="Run your plan of 7.5 (`go = True`; with less time, fewer steps) and defend it: r, learning rate and targets, on two seeds, for a reader who "
            "would have chosen otherwise.",
            rubric=(
                (1, "gives the plan and both seeds' BLEU and slot errors, as the run printed them"),
                (1, "has a reason for each of r, rate and targets that comes from a run or a count, not from habit"),
                (1, "says which result would change the choice, and whether two seeds can show it"),
            ),
        ),
    ),
)
