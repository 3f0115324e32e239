"""Wrong and right answers for lab 08b: averages of the wrong thing, torn groups, padding that counts, spans that end before they begin."""

# ruff: noqa: E501
from . import Mutant


def _macro(recall="right / there", f1="2 * right / (there + said)", result="accuracy, sum(R) / classes, sum(F) / classes") -> str:
    return (
        "def macro_scores(truth, guess, classes):\n    accuracy = (truth == guess).float().mean().item()\n    R, P, F, W, S = [], [], [], [], []\n"
        "    for k in range(classes):\n        right = ((truth == k) & (guess == k)).sum().item()\n        there, said = (truth == k).sum().item(), (guess == k).sum().item()\n"
        f"        P.append(right / said if said else 0.0)\n        R.append({recall})\n        F.append({f1})\n        W.append(there / len(truth))\n        S.append(said)\n"
        f"    return {result}\n"
    )


_MEANS = "sum(R) / classes, sum(P) / classes"


def _rows(body: str) -> str:
    return "def test_rows(groups, order, n_test):\n    groups, order = groups.tolist(), order.tolist()\n" + "\n".join(
        "    " + line for line in body.strip("\n").split("\n")
    ) + "\n"


def _until(listed="order", stop="held >= n_test", after="pass", result="[i for i, g in enumerate(groups) if g in chosen]") -> str:
    return _rows(
        f"chosen, held = [], 0\nfor g in {listed}:\n    if {stop}:\n        break\n    chosen.append(g)\n    held += groups.count(g)\n{after}\nreturn {result}"
    )


def _mean(expression: str) -> str:
    return f"def mean_of_tokens(h, mask):\n    m = mask[..., None].to(h.dtype)\n    return {expression}\n"


def _count(expression: str) -> str:
    return f"def trained_numbers(layers, width, r, classes):\n    return {expression}\n"


def _span(condition="0 <= b - a < longest", score="first[a] + last[b]", result="max(pairs)[1:]") -> str:
    return (
        "def best_span(first, last, longest):\n    T = len(first)\n"
        f"    pairs = [(float({score}), a, b) for a in range(T) for b in range(T) if {condition}]\n    return {result}\n"
    )


MUTANTS = {
    "8b.1": [
        Mutant("everything over all texts", _macro(result="accuracy, accuracy, accuracy"), "micro"),
        Mutant("precision for recall", _macro(recall="right / said if said else 0.0"), "precision"),
        Mutant("F1 of the means", _macro(result="accuracy, sum(R) / classes, 2 * (sum(R) / classes) * (sum(P) / classes) / (sum(R) / classes + sum(P) / classes)"),
               "f1_of_means"),
        Mutant("weighted by size", _macro(result="accuracy, sum(w * r for w, r in zip(W, R)), sum(w * f for w, f in zip(W, F))"), "weighted"),
        Mutant("classes that were said", _macro(result="accuracy, sum(R) / classes, sum(F) / sum(s > 0 for s in S)"), "said_only"),
        Mutant("order", _macro(result="accuracy, sum(F) / classes, sum(R) / classes"), "swapped"),
        Mutant("per cent", _macro(result="100 * accuracy, 100 * sum(R) / classes, 100 * sum(F) / classes"), "percent"),
        Mutant("plain mean of P and R", _macro(result="accuracy, sum(R) / classes, (sum(R) + sum(P)) / 2 / classes"), "f1_average"),
        Mutant("0 / 0", _macro(f1="2 * (right / said) * (right / there) / (right / said + right / there)"), "division_by_zero"),
    ],
    "8b.2": [
        Mutant("the first rows", _rows("return list(range(n_test))"), "rows"),
        Mutant("so many groups", _rows("return [i for i, g in enumerate(groups) if g in order[:n_test]]"), "n_groups"),
        Mutant("stops before", _until(stop="held + groups.count(g) > n_test"), "short"),
        Mutant("one more", _until(stop="held > n_test"), "one_more"),
        Mutant("sorted", _until(listed="sorted(order)"), "sorted"),
        Mutant("as they appear", _until(listed="dict.fromkeys(groups)"), "appearance"),
        Mutant("cut to measure", _until(result="[i for g in chosen for i, x in enumerate(groups) if x == g][:n_test]"), "cut"),
        Mutant("the groups", _until(result="chosen"), "groups_returned"),
        Mutant("the rest", _until(result="[i for i, g in enumerate(groups) if g not in chosen]"), "train_rows"),
    ],
    "8b.3": [
        Mutant("padding counts", _mean("h.mean(1)"), "pads_counted"),
        Mutant("zeros are divided by", _mean("(h * m).mean(1)"), "divided_by_length"),
        Mutant("sum", _mean("(h * m).sum(1)"), "sum"),
        Mutant("[CLS]", _mean("h[:, 0]"), "first"),
        Mutant("one number for all", _mean("(h * m).sum(1) / m.sum()"), "one_mean"),
        Mutant("over the batch", _mean("h.mean(0)"), "over_batch"),
        Mutant("a mean of the batch", _mean("h[mask].mean(0)"), "batch_lost"),
        Mutant("upside down", _mean("(h * (1 - m)).sum(1) / (1 - m).sum(1)"), "pads_only"),
        Mutant("maximum", _mean("h.masked_fill(m == 0, -1e9).amax(1)"), "max"),
    ],
    "8b.4": [
        Mutant("no head", _count("layers * 4 * r * width"), "no_head"),
        Mutant("no bias", _count("layers * 4 * r * width + classes * width"), "no_head_bias"),
        Mutant("A alone", _count("layers * 2 * r * width + classes * width + classes"), "one_factor"),
        Mutant("key, too", _count("layers * 6 * r * width + classes * width + classes"), "three"),
        Mutant("one layer", _count("4 * r * width + classes * width + classes"), "one_layer"),
        Mutant("the matrices", _count("layers * 2 * width * width + classes * width + classes"), "full"),
        Mutant("frozen biases", _count("layers * 2 * (2 * r * width + width) + classes * width + classes"), "with_bias"),
        Mutant("a head each", _count("layers * (4 * r * width + classes * width + classes)"), "head_each_layer"),
    ],
    "8b.5": [
        Mutant("each alone", "def best_span(first, last, longest):\n    return int(first.argmax()), int(last.argmax())\n", "each_alone"),
        Mutant("greedy", "def best_span(first, last, longest):\n    a = int(first.argmax())\n    return a, a + int(last[a : a + longest].argmax())\n", "first_then_last"),
        Mutant("any length", _span(condition="a <= b"), "any_length"),
        Mutant("backwards", _span(condition="abs(b - a) < longest"), "backwards_allowed"),
        Mutant("off by one", _span(condition="0 <= b - a <= longest"), "one_too_long"),
        Mutant("off by one, short", _span(condition="0 <= b - a < longest - 1"), "one_too_short"),
        Mutant("product", _span(score="first[a] * last[b]"), "product"),
        Mutant("two at least", _span(condition="0 < b - a < longest"), "no_single"),
        Mutant("begins at 0", "def best_span(first, last, longest):\n    best, pair = 0, (0, 0)\n    for a in range(len(first)):\n"
               "        for b in range(a, min(a + longest, len(first))):\n            if first[a] + last[b] > best:\n"
               "                best, pair = first[a] + last[b], (a, b)\n    return pair\n", "starts_at_zero"),
        Mutant("as a slice", _span(result="(max(pairs)[1], max(pairs)[2] + 1)"), "end_exclusive"),
    ],
}  # fmt: skip

ALTERNATIVES = {
    "8b.1": [
        _macro(result="torch.tensor([accuracy, sum(R) / classes, sum(F) / classes])"),
        "def macro_scores(truth, guess, classes):\n    C = torch.zeros(classes, classes, dtype=torch.float64)\n    for t, g in zip(truth, guess):\n        C[t, g] += 1\n"
        "    d = C.diagonal()\n    return [(d.sum() / C.sum()).item(), (d / C.sum(1)).mean().item(), (2 * d / (C.sum(0) + C.sum(1))).mean().item()]\n",
    ],
    "8b.2": [
        _until(result="torch.tensor([i for i, g in enumerate(groups) if g in chosen])"),
        _rows("rows = []\nfor g in order:\n    if len(rows) < n_test:\n        rows += [i for i, x in enumerate(groups) if x == g]\nreturn rows"),
    ],
    "8b.3": [
        _mean("(h * m).sum(dim=1) / mask.sum(dim=1, keepdim=True)"),
        "def mean_of_tokens(h, mask):\n    return torch.stack([row[keep].mean(0) for row, keep in zip(h, mask)])\n",
        _mean("torch.einsum('btd,bt->bd', h, m[..., 0]) / m.sum(1)"),
    ],
    "8b.4": [
        _count("4 * layers * r * width + (width + 1) * classes"),
        "def trained_numbers(layers, width, r, classes):\n    total = classes * (width + 1)\n    for _ in range(layers):\n        for _ in ('query', 'value'):\n"
        "            total += r * width + width * r\n    return total\n",
    ],
    "8b.5": [
        _span(),
        "def best_span(first, last, longest):\n    T = len(first)\n    total = first[:, None] + last[None, :]\n    allowed = torch.ones(T, T).triu() * torch.ones(T, T).tril(longest - 1)\n"
        "    k = total.masked_fill(allowed == 0, -torch.inf).argmax()\n    return torch.tensor([k // T, k % T])\n",
    ],
}
