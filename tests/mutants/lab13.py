"""Wrong and right answers for lab 13."""

from . import Mutant


def _seen(
    make: str = "{tuple(w[i:i + n]) for t in texts for w in [t.lower().split()] for i in range(len(w) - n + 1)}",
    back: str = "len(mine & other) / max(len(mine), 1)", before: str = "pass",
) -> str:  # fmt: skip
    return (
        f"def share_seen(held, train, n):\n    {before}\n    def runs(texts):\n        return {make}\n"
        f"    mine, other = runs(held), runs(train)\n    return {back}\n"
    )


_LIST = "[tuple(w[i:i + n]) for t in texts for w in [t.lower().split()] for i in range(len(w) - n + 1)]"


def _rate(
    value: str = "x if x == x else float('inf')", column: str = "validation", pick: str = "min", score: str = "sum(s[lr][k] for k in common)",
    inside: str = "min(s) < best < max(s)", back: str = "best, inside",
) -> str:  # fmt: skip
    return (
        "def best_rate(runs):\n    s = {}\n    for run in runs:\n"
        f"        x = run[{column!r}]\n        s.setdefault(run['lr'], {{}})[run['seed']] = {value}\n"
        "    common = set.intersection(*map(set, s.values()))\n"
        f"    best = {pick}(s, key=lambda lr: {score})\n    inside = {inside}\n    return {back}\n"
    )


_MEAN = "sum(s[lr].values()) / len(s[lr])"

MUTANTS = {
    "13.1": [
        Mutant("share of the training part", _seen(back="len(mine & other) / max(len(other), 1)"), "of_the_training"),
        Mutant("Jaccard", _seen(back="len(mine & other) / max(len(mine | other), 1)"), "of_both"),
        Mutant("lists", _seen(_LIST, "sum(g in other for g in mine) / max(len(mine), 1)"), "repeats_counted"),
        Mutant("joins the documents", _seen(before="held, train = [' '.join(held)], [' '.join(train)]"), "over_borders"),
        Mutant("joins the training documents", _seen(before="train = [' '.join(train)]"), "over_borders_in_training"),
        Mutant("keeps capitals", _seen("{tuple(w[i:i + n]) for t in texts for w in [t.split()] for i in range(len(w) - n + 1)}"), "capitals"),
        Mutant("single words", _seen("{w for t in texts for w in t.lower().split()}"), "single_words"),
        Mutant("letters", _seen("{t.lower()[i:i + n] for t in texts for i in range(len(t) - n + 1)}"), "letters"),
        Mutant("one place too few", _seen("{tuple(w[i:i + n]) for t in texts for w in [t.lower().split()] for i in range(len(w) - n)}"), "last_run_missing"),
        Mutant("looks for letters", _seen("{' '.join(w[i:i + n]) for t in texts for w in [t.lower().split()] for i in range(len(w) - n + 1)}",
               "sum(any(g in t.lower() for t in train) for g in mine) / max(len(mine), 1)"), "parts_of_words"),
        Mutant("side by side", _seen("{tuple(w[i:i + n]) for t in texts for w in [t.lower().split()] for i in range(0, len(w) - n + 1, n)}"), "side_by_side"),
        Mutant("n + 1 words", _seen("{tuple(w[i:i + n + 1]) for t in texts for w in [t.lower().split()] for i in range(len(w) - n)}"), "too_long"),
        Mutant("short ones whole",
               _seen("{tuple(w[i:i + n]) for t in texts for w in [t.lower().split()] for i in range(max(len(w) - n + 1, 1))}"), "short_documents"),
        Mutant("what is new", _seen(back="1 - len(mine & other) / max(len(mine), 1)"), "unseen"),
        Mutant("a count", _seen(back="float(len(mine & other))"), "count"),
        Mutant("per cent", _seen(back="100 * len(mine & other) / max(len(mine), 1)"), "percent"),
        Mutant("no runs at all", _seen(back="len(mine & other) / len(mine)"), "no_runs"),
        Mutant("mean over documents", _seen(back="sum(len(runs([t]) & other) / max(len(runs([t])), 1) for t in held) / len(held)"), "mean_of_documents"),
    ],
    "13.2": [
        Mutant("looks at the test", _rate(column="test"), "on_the_test"),
        Mutant("takes the highest", _rate(pick="max"), "the_worst"),
        Mutant("the best single run", _rate(score="min(s[lr].values())", value="x if x == x else 9.0"), "the_luckiest"),
        Mutant("means over all runs", _rate(score=_MEAN), "unequal_seeds"),
        Mutant("nanmean", _rate(value="x", score="np.nanmean([s[lr][k] for k in common])"), "nan_left_out"),
        Mutant("nanmean over all runs", _rate(value="x", score="np.nanmean(list(s[lr].values()))"), "unequal_and_nan"),
        Mutant("seed 0", _rate(score="s[lr][0]"), "one_seed"),
        Mutant("the median", _rate(score="sorted(s[lr].values())[len(s[lr]) // 2] if len(s[lr]) % 2 else sum(s[lr].values()) / 2"), "median"),
        Mutant("the worst seed", _rate(score="max(s[lr].values())"), "the_worst_seed"),
        Mutant("nan in min()", _rate(value="x"), "nan_wins"),
        Mutant("forgets what diverged", _rate(inside="min(s) < best < max(k for k in s if max(s[k].values()) < 9)"), "wall_forgotten"),
        Mutant("edges by order", _rate(inside="0 < list(s).index(best) < len(s) - 1"), "edge_by_order"),
        Mutant("forgets the edge", _rate(inside="True"), "edge_ignored"),
        Mutant("edge upside down", _rate(inside="best in (min(s), max(s))"), "edge_swapped"),
        Mutant("only the upper edge", _rate(inside="best < max(s)"), "one_edge"),
        Mutant("only the lower edge", _rate(inside="best > min(s)"), "one_edge"),
        Mutant("the rate alone", _rate(back="best"), "no_pair"),
    ],
}

ALTERNATIVES = {
    "13.1": [
        "def share_seen(held, train, n):\n    mine = []\n    for t in held:\n        w = t.lower().split()\n"
        "        for i in range(len(w) - n + 1):\n            g = ' '.join(w[i:i + n])\n            if g not in mine:\n                mine.append(g)\n"
        "    seen = [g for g in mine if any(f' {g} ' in ' ' + ' '.join(t.lower().split()) + ' ' for t in train)]\n"
        "    return len(seen) / len(mine) if mine else 0\n",
        "def share_seen(held, train, n):\n    grams = lambda ts: {g for t in ts for w in [t.casefold().split()] for g in zip(*(w[k:] for k in range(n)))}\n"
        "    a = grams(held)\n    return torch.tensor([g in grams(train) for g in a], dtype=torch.float64).mean().item() if a else 0.0\n",
    ],
    "13.2": [
        "def best_rate(runs):\n    rates = sorted({r['lr'] for r in runs})\n"
        "    common = [s for s in {r['seed'] for r in runs} if all(any(q['lr'] == l and q['seed'] == s for q in runs) for l in rates)]\n"
        "    mean = [np.mean([r['validation'] for r in runs if r['lr'] == l and r['seed'] in common]) for l in rates]\n"
        "    k = int(np.nanargmin(mean))\n    return [rates[k], 0 < k < len(rates) - 1]\n",
        "def best_rate(runs):\n    import pandas\n    t = pandas.DataFrame(runs).pivot(index='seed', columns='lr', values='validation')\n"
        "    lucky = [s for s in t.index if sum(r['seed'] == s for r in runs) == t.shape[1]]\n"
        "    m = t.loc[lucky].mean(skipna=False)\n    best = m.idxmin()\n    return float(best), bool(t.columns.min() < best < t.columns.max())\n",
    ],
}
