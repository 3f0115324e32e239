"""Lab 13, Capstone: its two exercises, and the questions whose answers are the capstone's defence.

Expectations come from plain counting: positions are compared with positions, rates with rates; no set, no dictionary of the answer's kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, Question, compare
from ..script import Script
from .formulas import first_match

# ---------------------------------------------------------------------------------------------------------------------
# 13.1  share_seen(held, train, n)
#
# Documents in which every slip shows: one run of words repeated, one that only exists across the border of two documents, capitals, a document that
# is shorter than n, and parts of different length.

TEXTS = {
    "letters": (
        ["The lamp was lit at dusk and the lamp was lit at dawn", "Nobody saw the ship", "yes indeed"],
        ["At dusk the Lamp was lit again by the keeper who saw", "the ship and nobody else saw the ship come in"],
        (1, 2, 3),
    ),
    "a log": (
        ["wind north wind north wind east rain all night", "keeper away", "rain all day wind north"],
        ["wind north rain all", "night keeper away wind", "Rain all day and wind east until the evening of the next day", "fog"],
        (2, 3),
    ),
    "parts of words": (["red sail at noon", "art of war"], ["a bored sailor at noon", "the heart of war"], (1, 2)),
    "nothing in common": (["one two three four"], ["five six seven eight nine"], (2,)),
    "too short": (["one two", "three"], ["one two three four five"], (3,)),
}


def _seen_probe(which):
    held, train, sizes = TEXTS[which]

    def probe(rng):
        s = Script()
        for n in sizes:
            s.send(f"n = {n}", s.call(list(held), list(train), n))
        return s

    return probe


def _runs(text: str, n: int) -> list[list[str]]:
    found = text.lower().split()
    return [found[i : i + n] for i in range(len(found) - n + 1)]


def seen_by_walking(held: Sequence[str], train: Sequence[str], n: int) -> float:
    """The oracle: walk through the held-out runs, skip those met before, and look for each at every position of every training document."""
    met, seen = [], 0
    for document in held:
        for run in _runs(document, n):
            if run in met:
                continue
            met.append(run)
            seen += any(run == other for text in train for other in _runs(text, n))
    return seen / len(met) if met else 0.0


def _seen_judge(which):
    held, train, sizes = TEXTS[which]

    def judge(inputs, answers):
        for n in sizes:
            problem = compare(answers[f"n = {n}"], seen_by_walking(held, train, n), what=f"share_seen(held, train, {n})", rtol=1e-6, atol=1e-9)
            if problem:
                return f"{problem}; held out is {held}"
        return None

    return judge


def _set(texts, n, lower=True) -> set:
    found = set()
    for text in texts:
        words = (text.lower() if lower else text).split()
        found |= {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
    return found


def _ratio(a, b):
    return a / b if b else 0.0


def _repeated(held, train, n):
    every = [tuple(run) for text in held for run in _runs(text, n)]
    return _ratio(sum(run in _set(train, n) for run in every), len(every))


_SHARES = {
    "of_the_training": (
        "you divide by the runs of the training part. A leak is asked of the held-out part: which share of *it* was seen?",
        lambda h, t, n: _ratio(len(_set(h, n) & _set(t, n)), len(_set(t, n))),
    ),
    "of_both": (
        "you divide by the runs of both parts together. A large training part would make every leak look small",
        lambda h, t, n: _ratio(len(_set(h, n) & _set(t, n)), len(_set(h, n) | _set(t, n))),
    ),
    "repeats_counted": ("a run that stands there twice counts twice for you; asked are different runs", _repeated),
    "over_borders": (
        "you join the documents first, so that runs reach over their borders, words that nobody wrote in a row",
        lambda h, t, n: _ratio(len(_set([" ".join(h)], n) & _set([" ".join(t)], n)), len(_set([" ".join(h)], n))),
    ),
    "over_borders_in_training": (
        "you join the training documents, so that runs reach over their borders, words that nobody wrote in a row",
        lambda h, t, n: _ratio(len(_set(h, n) & _set([" ".join(t)], n)), len(_set(h, n))),
    ),
    "capitals": (
        "'Lamp' and 'lamp' are two words for you. A copy is a copy with other capitals, too: text.lower()",
        lambda h, t, n: _ratio(len(_set(h, n, False) & _set(t, n, False)), len(_set(h, n, False))),
    ),
    "single_words": (
        "you compare single words. Two texts of one language share most of these; asked are runs of n",
        lambda h, t, n: _ratio(len(_set(h, 1) & _set(t, 1)), len(_set(h, 1))),
    ),
    "letters": (
        "your runs are made of letters: split the text into words first",
        lambda h, t, n: _ratio(
            len({x.lower()[i : i + n] for x in h for i in range(len(x) - n + 1)} & {x.lower()[i : i + n] for x in t for i in range(len(x) - n + 1)}),
            len({x.lower()[i : i + n] for x in h for i in range(len(x) - n + 1)}),
        ),
    ),
    "parts_of_words": (
        "you look for a run as letters inside a text, and 'red sail' stands in 'bored sailor': compare words with words",
        lambda h, t, n: _ratio(sum(any(" ".join(g) in " ".join(x.lower().split()) for x in t) for g in _set(h, n)), len(_set(h, n))),
    ),
    "side_by_side": (
        "your runs stand side by side: one can begin at every word, not at every n-th",
        lambda h, t, n: _ratio(len(_strided(h, n) & _strided(t, n)), len(_strided(h, n))),
    ),
    "too_long": (
        "your runs have n + 1 words: words[i : i + n] ends before i + n",
        lambda h, t, n: _ratio(len(_set(h, n + 1) & _set(t, n + 1)), len(_set(h, n + 1))),
    ),
    "short_documents": (
        "a document shorter than n counts as a run for you; it has none",
        lambda h, t, n: _ratio(len(_padded(h, n) & _padded(t, n)), len(_padded(h, n))),
    ),
    "last_run_missing": (
        "the last run of every document is missing: there are len(words) - n + 1 places where one can begin",
        lambda h, t, n: _ratio(len(_short(h, n) & _short(t, n)), len(_short(h, n))),
    ),
    "unseen": ("that is the share that was *not* seen", lambda h, t, n: 1 - seen_by_walking(h, t, n)),
    "count": ("that is how many were seen; divide by how many there are", lambda h, t, n: float(len(_set(h, n) & _set(t, n)))),
    "percent": ("those are per cent; asked is a share from 0 to 1", lambda h, t, n: 100 * seen_by_walking(h, t, n)),
    "mean_of_documents": (
        "you average over documents, so that a short one weighs as much as a long one; count the runs of all of them together",
        lambda h, t, n: sum(_ratio(len(_set([x], n) & _set(t, n)), len(_set([x], n))) for x in h) / len(h),
    ),
}


def _strided(texts, n) -> set:
    return {tuple(run) for text in texts for run in _runs(text, n)[::n]}


def _padded(texts, n) -> set:
    return _set(texts, n) | {tuple(text.lower().split()) for text in texts if len(text.split()) < n}


def _short(texts, n) -> set:
    return {tuple(run) for text in texts for run in _runs(text, n)[:-1]}


def _diagnose_seen(evidence: list[Evidence]) -> Diagnosis | None:
    found, asked = [], []
    for e, (held, train, sizes) in zip(evidence, TEXTS.values(), strict=True):
        if e.error is not None:
            if "ZeroDivisionError" in str(getattr(e.error, "kind", "")) + str(e.error):
                return Diagnosis("no_runs", "documents shorter than n have no run of n words: with none at all the share is 0, not 0 / 0")
            return None
        for n in sizes:
            found.append(e.answers.get(f"n = {n}"))
            asked.append((held, train, n))
    if any(not isinstance(value, (int, float, np.ndarray)) for value in found):
        return None
    key = first_match(found, {key: [float(formula(*case)) for case in asked] for key, (_, formula) in _SHARES.items()}, atol=1e-9)
    return Diagnosis(key, _SHARES[key][0]) if key else None


def _share_seen(held, train, n):
    def runs(texts):
        found = set()
        for text in texts:
            words = text.lower().split()
            found |= {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
        return found

    mine = runs(held)
    return len(mine & runs(train)) / max(len(mine), 1)


SEEN = Exercise(
    id="13.1",
    title="What the test part has seen",
    difficulty=1,
    minutes=8,
    points=2,
    name="share_seen",
    cases=tuple(Case(f"runs of words in common: {which}", _seen_probe(which), _seen_judge(which)) for which in TEXTS),
    diagnose=_diagnose_seen,
    hints=(
        "Make the *different* runs of n words of each part first; a set of tuples is made for that.",
        "A run lies inside one document: loop over documents, then over i in range(len(words) - n + 1).",
        "seen = len(held_runs & train_runs); divide by max(len(held_runs), 1).",
    ),
    read="'Own text in', and lora_lab.capstone.overlap, which also names the worst documents",
    fallback=lambda: _share_seen,
)


# ---------------------------------------------------------------------------------------------------------------------
# 13.2  best_rate(runs)
#
# Rows in an order of no meaning; each shortcut (the test, one seed, the luckiest run, unequal seeds, nan left out) leads to another rate somewhere.

NAN = math.nan


def _rows(scores):
    """{lr: {seed: validation}} as rows. On the test part the rates are at their best in another order: each scores as its neighbour did."""
    rates = sorted(scores)
    neighbour = {lr: min((value for value in scores[rates[k - 1]].values() if value == value), default=1.6) for k, lr in enumerate(rates)}
    return [
        {"lr": lr, "seed": seed, "validation": value, "test": neighbour[lr] + 0.01 * seed}
        for lr, seeds in scores.items()
        for seed, value in seeds.items()
    ]


TABLES = {
    # seed 0 alone says 1e-3, the best single run 1e-2
    "a middle rate": _rows({1e-2: {0: 1.52, 1: 1.46}, 1e-3: {0: 1.475, 1: 1.55}, 3e-3: {0: 1.48, 1: 1.47}, 3e-2: {0: 1.80, 1: 1.75}}),
    "the highest rate": _rows({3e-3: {0: 1.51, 1: 1.50}, 1e-2: {0: 1.44, 1: 1.47}, 1e-3: {0: 1.55, 1: 1.56}}),
    # the worst seed alone says 4e-3
    "the lowest rate": _rows({4e-3: {0: 1.46, 1: 1.462}, 1e-3: {0: 1.41, 1: 1.47}, 1.6e-2: {0: 1.61, 1: 1.58}}),
    # the median says 5e-3
    "an unlucky seed": _rows({5e-3: {0: 1.42, 1: 1.40, 2: 1.70}, 2e-3: {0: 1.44, 1: 1.45, 2: 1.46}, 1e-3: {0: 1.49, 1: 1.50, 2: 1.48}}),
    # common seeds: 0 and 1. 2e-3 wins there; 4e-3 has the best single run and, with its lucky seed 2, the best mean of all its runs
    "a lucky seed": _rows({4e-3: {0: 1.47, 1: 1.48, 2: 1.30}, 2e-3: {0: 1.45, 1: 1.46}, 1e-3: {0: 1.50, 1: 1.44}, 8e-3: {0: 1.60, 1: 1.62}}),
    "one diverged": _rows({2e-2: {0: 1.36, 1: NAN}, 1e-2: {0: 1.46, 1: 1.47}, 5e-3: {0: 1.43, 1: 1.44}, 1e-3: {0: 1.52, 1: 1.53}}),
    # the diverged rate was tried, too: the best has neighbours on both sides
    "a wall above": _rows({2e-2: {0: 1.90, 1: NAN}, 1e-2: {0: 1.43, 1: 1.44}, 5e-3: {0: 1.46, 1: 1.47}}),
}


def rate_by_elimination(rows) -> tuple[float, bool]:
    """The oracle: strike out what cannot be compared, then what diverged, then what loses a duel."""
    rates = sorted({row["lr"] for row in rows})
    seeds = [s for s in {row["seed"] for row in rows} if all(any(r["lr"] == lr and r["seed"] == s for r in rows) for lr in rates)]

    def total(lr):
        return math.fsum(row["validation"] for row in rows if row["lr"] == lr and row["seed"] in seeds)

    alive = [lr for lr in rates if math.isfinite(total(lr))]
    winner = alive[0]
    for lr in alive[1:]:
        if total(lr) < total(winner):
            winner = lr
    return winner, 0 < rates.index(winner) < len(rates) - 1


def _rate_probe(which):
    def probe(rng):
        rows = TABLES[which]
        if all(row["validation"] == row["validation"] for row in rows):  # nan stays in front, where min() stumbles over it
            rows = [rows[i] for i in rng.permutation(len(rows))]
        s = Script()
        s.send("chosen", s.call([dict(row) for row in rows]))
        return s

    return probe


def _pair(value):
    """(lr, inside) as plain values, or None if the answer is no such pair."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    lr, inside = (v.item() if isinstance(v, np.ndarray) and v.size == 1 else v for v in value)
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or inside not in (True, False, 0, 1):
        return None
    return float(lr), bool(inside)


def _rate_judge(which):
    def judge(inputs, answers):
        found, expected = _pair(answers["chosen"]), rate_by_elimination(TABLES[which])
        if found is None:
            return "asked is a pair (lr, inside): the rate, and True if rates on both sides of it were tried"
        if compare(found[0], expected[0], rtol=1e-6):
            return f"you choose the rate {found[0]:g}, expected {expected[0]:g}"
        if found[1] != expected[1]:
            place = "has tried rates on both sides" if expected[1] else "is at the edge of what was tried"
            return f"the rate {found[0]:g} is right, and it {place}; you say inside = {found[1]}"
        return None

    return judge


def _means(rows, column="validation", common=True, skip_nan=False):
    rates = sorted({row["lr"] for row in rows})
    seeds = set.intersection(*({r["seed"] for r in rows if r["lr"] == lr} for lr in rates)) if common else {r["seed"] for r in rows}
    found = {}
    for lr in rates:
        values = [r[column] for r in rows if r["lr"] == lr and r["seed"] in seeds]
        values = [v for v in values if v == v] if skip_nan else [v if v == v else math.inf for v in values]
        found[lr] = sum(values) / len(values) if values else math.inf
    return found


def _least(means) -> float:
    return min(means, key=means.get)


def _by_rate(rows) -> dict:
    return {lr: [r["validation"] if r["validation"] == r["validation"] else math.inf for r in rows if r["lr"] == lr] for lr in _tried(rows)}


def _median(rows):
    return _least({lr: float(np.median(values)) for lr, values in _by_rate(rows).items()})


def _single(rows, worst=False):
    finite = [r for r in rows if r["validation"] == r["validation"]]
    if worst:
        return _least({lr: max(values) for lr, values in _by_rate(rows).items()})
    return min(finite, key=lambda r: r["validation"])["lr"]


_RATES = {
    "on_the_test": ("you choose by the test column. Then the test part is a second validation part, and nothing is left to say how good the choice is",
                    lambda rows: _least(_means(rows, "test"))),
    "the_worst": ("you choose the highest score; these are bits per byte, and fewer are better", lambda rows: max(_means(rows), key=_means(rows).get)),
    "the_luckiest": ("you choose the single best run: that is the luckiest seed, not the best rate. Take means over seeds", _single),
    "unequal_seeds": ("your means are over different seeds: a rate with one lucky seed more wins. Compare on the seeds that all rates have run with",
                      lambda rows: _least(_means(rows, common=False))),
    "nan_left_out": ("a run that diverged is left out of your mean, so that the rate is judged by its lucky runs: nan counts as infinitely bad",
                     lambda rows: _least(_means(rows, skip_nan=True))),
    "unequal_and_nan": ("your means leave out what diverged, and are over different seeds: nan is infinitely bad, and rates are compared on common seeds",
                        lambda rows: _least(_means(rows, common=False, skip_nan=True))),
    "nan_wins": ("a run that diverged wins: nothing is smaller than nan, so min() keeps it when it comes first. Count it as infinite",
                 lambda rows: rows[0]["lr"] if rows[0]["validation"] != rows[0]["validation"] or rows[1]["validation"] != rows[1]["validation"]
                 else _least(_means(rows))),
    "the_worst_seed": ("you judge each rate by its worst seed; asked is the mean", lambda rows: _single(rows, worst=True)),
    "median": ("you take the median, to which a seed that went wrong is nothing; asked is the mean", _median),
    "one_seed": ("you look at seed 0 alone: one seed is luck", lambda rows: _least({r["lr"]: r["validation"] for r in rows if r["seed"] == 0})),
}  # fmt: skip


def _diagnose_rate(evidence: list[Evidence]) -> Diagnosis | None:
    if any(e.error is not None for e in evidence):
        return None
    pairs = [_pair(e.answers.get("chosen")) for e in evidence]
    if any(pair is None for pair in pairs):
        values = [e.answers.get("chosen") for e in evidence]
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            return Diagnosis("no_pair", "you return the rate alone; asked is (lr, inside)")
        return None
    right = [rate_by_elimination(table) for table in TABLES.values()]
    rates = [pair[0] for pair in pairs]
    if all(compare(a, b[0], rtol=1e-6) is None for a, b in zip(rates, right, strict=True)):
        said = [pair[1] for pair in pairs]
        if said == [not inside for _, inside in right]:
            return Diagnosis("edge_swapped", "inside is True where rates on *both* sides were tried; you say the opposite")
        if len(set(said)) == 1:
            return Diagnosis("edge_ignored", f"inside is {said[0]} whatever was tried; look whether the rate is the lowest or the highest of them")
        lone = {"lowest": [lr > min(_tried(t)) for (lr, _), t in zip(right, TABLES.values(), strict=True)],
                "highest": [lr < max(_tried(t)) for (lr, _), t in zip(right, TABLES.values(), strict=True)]}  # fmt: skip
        for end, says in lone.items():
            if said == says:
                return Diagnosis("one_edge", f"you look at the {end} rate alone; a grid has two edges")
        wall = [lr < max(_without_nan(t)) and inside for (lr, inside), t in zip(right, TABLES.values(), strict=True)]
        if said == wall:
            return Diagnosis("wall_forgotten", "a rate that diverged was tried, too: the best rate below it has a neighbour on that side")
        return Diagnosis("edge_by_order", "the rows come in any order: sort the rates before you ask which stands at an edge")
    candidates = {key: [choose(table) for table in TABLES.values()] for key, (_, choose) in _RATES.items()}
    key = first_match(rates, candidates)
    return Diagnosis(key, _RATES[key][0]) if key else None


def _without_nan(rows) -> set[float]:
    return {lr for lr in _tried(rows) if all(row["validation"] == row["validation"] for row in rows if row["lr"] == lr)}


def _tried(rows) -> set[float]:
    return {row["lr"] for row in rows}


def _best_rate(runs):
    scores = {}
    for run in runs:
        value = run["validation"]
        scores.setdefault(run["lr"], {})[run["seed"]] = value if value == value else float("inf")
    common = set.intersection(*(set(seeds) for seeds in scores.values()))
    best = min(scores, key=lambda lr: sum(scores[lr][seed] for seed in common))
    return best, min(scores) < best < max(scores)


RATE = Exercise(
    id="13.2",
    title="The best rate, and whether to believe it",
    difficulty=2,
    minutes=10,
    points=3,
    name="best_rate",
    cases=tuple(Case(which, _rate_probe(which), _rate_judge(which)) for which in TABLES),
    diagnose=_diagnose_rate,
    hints=(
        "Which seeds has every rate run with? Only on these can rates be compared.",
        "value != value is True for nan alone. And the rates can be sorted, whatever order the rows are in.",
        "best = min(scores, key=lambda lr: sum(scores[lr][s] for s in common)); inside = min(scores) < best < max(scores)",
    ),
    read="the paragraph above the exercise; lab 03 on rates and r",
    fallback=lambda: _best_rate,
)


LAB = Lab(
    number="13",
    name="13_capstone",
    title="Capstone",
    minutes=90,
    core=True,
    objectives=(
        "bring text of your own into a model, with its licence, its people and its leaks looked at first",
        "know floors, cost and control before LoRA runs",
        "tune each setting at a rate of its own, and turn one knob at a time",
        "claim what the runs carry, and say what they do not",
        "hand in an adapter, a report, and evidence that others can audit",
    ),
    needs=("labs 03 and 07", "text of your own, 50 kB or more; or the stories that ship"),
    exercises=(SEEN, RATE),
    predictions=(
        Prediction(
            "13.A",
            "Each at its own best rate: between which settings will validation differ most?",
            {"a": "r = 1, 4 and 16", "b": "alpha = 8 and 32", "c": "attention, MLP and all linear layers"},
        ),
        Prediction(
            "13.B",
            "A hasty report says 'better' five times. How many of these five do three seeds carry?",
            {"a": "none or one", "b": "two or three", "c": "four or five"},
        ),
    ),
    questions=(
        Question(
            "13.F1",
            "Data, floors and control",
            minutes=40,
            ask="What is your text, may you use it, and what do its parts share? What did base, baseline, full fine-tuning and control score before you "
            "believed LoRA? The levels from 0 to 3 of each row are described in docs/capstone.md.",
            rubric=(
                (3, "**Data**: origin, licence, people and split, with what training shares with validation and with test as numbers, and what follows from it "
                 "(level 0 to 3)"),
                (3, "**Floors and control**: all four beside LoRA, in one unit, with what the control rules out (level 0 to 3)"),
            ),
        ),
        Question(
            "13.F2",
            "Your r, your alpha, your targets",
            minutes=60,
            ask="Defend each of the three against the nearest alternative: rates, seeds, difference, interval, price. Say which of the three your evidence "
            "does *not* support, and whether your margin was set before the runs.",
            rubric=(
                (3, "**Tuning**: each setting at a rate of its own, inside its grid, on the same seeds, one knob at a time (level 0 to 3)"),
                (3, "**Claims**: each says what its interval carries, no more and no less, with a reason that comes from a run or a count (level 0 to 3)"),
            ),
        ),
        Question(
            "13.F3",
            "One look, and its limits",
            minutes=40,
            ask="What did your one look at the test part say, what may be concluded from it, and which result would make you choose otherwise? "
            "Give the gain on the test part beside that on validation.",
            rubric=(
                (3, "**Test and limits**: one look, all seeds, floors beside it; what it does not show, and what would overturn the choice (level 0 to 3)"),
                (3, "**Hand-in**: another person gets the same numbers from it; the adapter's card says what it is for and not for (level 0 to 3)"),
            ),
        ),
    ),
)
