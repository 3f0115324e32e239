"""Wrong and right answers for lab 08: n-grams counted twice, controls with luck, words within words, masks in the wrong place."""

from . import Mutant


def _distinct(lines: str) -> str:
    head = "def distinct_n(texts, n):\n    grams = lambda t: [tuple(t.split()[i:i + n]) for i in range(len(t.split()) - n + 1)]\n"
    return head + "    every = [g for t in texts for g in grams(t)]\n" + "".join(f"    {line}\n" for line in lines.strip().split("\n"))


def _swap(lines: str) -> str:
    return "import random\ndef swapped(sources):\n    n = len(sources)\n" + "".join(f"    {line}\n" for line in lines.strip().split("\n"))


def _invented(lines: str) -> str:
    head = "import re\ndef invented(summary, body):\n    words, known = re.findall(r'\\w+', summary.lower()), re.findall(r'\\w+', body.lower())\n"
    return head + "".join(f"    {line}\n" for line in lines.strip().split("\n"))


def _labels(lines: str) -> str:
    return "def keeper_labels(turns):\n    ids, labels = [], []\n" + "".join(f"    {line}\n" for line in lines.strip("\n").split("\n"))


_LOOP = "for role, tokens in turns:\n    ids += tokens\n    labels += tokens if role == 'keeper' else [-100] * len(tokens)\n"

MUTANTS = {
    "8.1": [
        Mutant("joins the texts", "def distinct_n(texts, n):\n    w = ' '.join(texts).split()\n    g = [tuple(w[i:i + n]) for i in range(len(w) - n + 1)]\n"
               "    return len(set(g)) / len(g)\n", "across_texts"),
        Mutant("means of texts", _distinct("return sum(len(set(grams(t))) / max(len(grams(t)), 1) for t in texts) / len(texts)"), "mean_of_texts"),
        Mutant("sum of sets", _distinct("return sum(len(set(grams(t))) for t in texts) / max(len(every), 1)"), "sum_of_sets"),
        Mutant("those that stand once", _distinct("return sum(every.count(g) == 1 for g in every) / max(len(every), 1)"), "once_only"),
        Mutant("over words", _distinct("return len(set(every)) / sum(len(t.split()) for t in texts)"), "by_words"),
        Mutant("over texts", _distinct("return len(set(every)) / len(texts)"), "by_texts"),
        Mutant("a count", _distinct("return len(set(every))"), "count"),
        Mutant("repeated", _distinct("return 1 - len(set(every)) / max(len(every), 1)"), "repeated"),
        Mutant("n forgotten", "def distinct_n(texts, n):\n    w = ' '.join(texts).split()\n    return len(set(w)) / len(w)\n", "words_only"),
        Mutant("letters", "def distinct_n(texts, n):\n    g = [t[i:i + n] for t in texts for i in range(len(t) - n + 1)]\n    return len(set(g)) / len(g)\n",
               "letters"),
        Mutant("one short", "def distinct_n(texts, n):\n    g = [tuple(t.split()[i:i + n]) for t in texts for i in range(len(t.split()) - n)]\n"
               "    return len(set(g)) / max(len(g), 1)\n", "last_gram_lost"),
        Mutant("blocks", "def distinct_n(texts, n):\n    g = [tuple(t.split()[i:i + n]) for t in texts for i in range(0, len(t.split()) - n + 1, n)]\n"
               "    return len(set(g)) / max(len(g), 1)\n", "blocks"),
        Mutant("per cent", _distinct("return 100 * len(set(every)) / max(len(every), 1)"), "percent"),
        Mutant("sorted n-grams", _distinct("every = [tuple(sorted(g)) for g in every]\nreturn len(set(every)) / max(len(every), 1)"), "unordered"),
        Mutant("lower case", _distinct("every = [tuple(w.lower() for w in g) for g in every]\nreturn len(set(every)) / max(len(every), 1)"), "lowered"),
        Mutant("pieces at the end", "def distinct_n(texts, n):\n    g = [tuple(t.split()[i:i + n]) for t in texts for i in range(len(t.split()))]\n"
               "    return len(set(g)) / len(g)\n", "ragged"),
        Mutant("overwrites in the loop", _distinct("for t in texts:\n    g = grams(t)\nreturn len(set(g)) / max(len(g), 1)"), "last_text"),
        Mutant("the first text", _distinct("g = grams(texts[0])\nreturn len(set(g)) / max(len(g), 1)"), "first_text"),
        Mutant("upside down", _distinct("return len(every) / max(len(set(every)), 1)"), "upside_down"),
        Mutant("whole texts", _distinct("return len(set(texts)) / len(texts)"), "whole_texts"),
        Mutant("any n words", "from itertools import combinations\ndef distinct_n(texts, n):\n    g = [c for t in texts for c in combinations(t.split(), n)]\n"
               "    return len(set(g)) / max(len(g), 1)\n", "not_neighbours"),
        Mutant("divides by nothing", _distinct("return len(set(every)) / len(every)"), "too_short"),
    ],
    "8.2": [
        Mutant("as it was", _swap("return list(sources)"), "unchanged"),
        Mutant("turned round", _swap("return sources[::-1]"), "reversed"),
        Mutant("moved by one", _swap("return sources[1:] + sources[:1]"), "moved_by_one"),
        Mutant("moved by one, the other way", _swap("return [sources[i - 1] for i in range(n)]"), "moved_by_one"),
        Mutant("shuffled once", _swap("random.seed(0)\nreturn random.sample(sources, n)"), "some_stay"),
        Mutant("torch's permutation", _swap("return [sources[i] for i in torch.randperm(n).tolist()]"), "some_stay"),
        Mutant("halves exchanged after sorting", _swap("s = sorted(sources)\nreturn s[n // 2:] + s[:n // 2]"), "not_put_back"),
        Mutant("Sattolo's cycle: no place stays, a text does", _swap("out = list(sources)\nrandom.seed(1)\nfor i in range(n - 1, 0, -1):\n"
               "    j = random.randrange(i)\n    out[i], out[j] = out[j], out[i]\nreturn out"), "some_stay"),
        Mutant("sorted", _swap("return sorted(sources)"), "sorted"),
        Mutant("a set", _swap("return list(set(sources))"), "once_each"),
        Mutant("the first is lost", _swap("return sources[1:]"), "lost"),
        Mutant("draws for each place", _swap("random.seed(0)\nreturn [random.choice([t for t in sources if t != s]) for s in sources]"), "drawn"),
        Mutant("places", _swap("return [(i + 1) % n for i in range(n)]"), "indices"),
        Mutant("shuffle returns None", _swap("return random.shuffle(list(sources))"), "no_return"),
    ],
    "8.3": [
        Mutant("copied", _invented("return sum(w in known for w in words) / max(len(words), 1)"), "copied"),
        Mutant("sets", _invented("return len(set(words) - set(known)) / max(len(set(words)), 1)"), "sets"),
        Mutant("a set over all", _invented("return len(set(words) - set(known)) / max(len(words), 1)"), "set_over_all"),
        Mutant("in a string", _invented("return sum(w not in body.lower() for w in words) / max(len(words), 1)"), "substring"),
        Mutant("in a string, with capitals", _invented("words = re.findall(r'\\w+', summary)\nreturn sum(w not in body for w in words) / max(len(words), 1)"),
               "substring_capitals"),
        Mutant("split", "def invented(summary, body):\n    w, b = summary.lower().split(), body.lower().split()\n"
               "    return sum(x not in b for x in w) / max(len(w), 1)\n", "punctuation"),
        Mutant("split with capitals", "def invented(summary, body):\n    w, b = summary.split(), body.split()\n"
               "    return sum(x not in b for x in w) / max(len(w), 1)\n", "punctuation_capitals"),
        Mutant("capitals", "import re\ndef invented(summary, body):\n    w, b = re.findall(r'\\w+', summary), re.findall(r'\\w+', body)\n"
               "    return sum(x not in b for x in w) / max(len(w), 1)\n", "capitals"),
        Mutant("lowers the summary alone", _invented("known = re.findall(r'\\w+', body)\nreturn sum(w not in known for w in words) / max(len(words), 1)"),
               "half_lowered"),
        Mutant("lowers the body alone", _invented("words = re.findall(r'\\w+', summary)\nreturn sum(w not in known for w in words) / max(len(words), 1)"),
               "other_half_lowered"),
        Mutant("takes known words away once", _invented("return 1 - len(set(words) & set(known)) / max(len(words), 1)"), "known_once"),
        Mutant("exchanged", _invented("return sum(w not in words for w in known) / max(len(known), 1)"), "exchanged"),
        Mutant("over the body", _invented("return sum(w not in known for w in words) / max(len(known), 1)"), "by_body"),
        Mutant("a count", _invented("return sum(w not in known for w in words)"), "count"),
        Mutant("per cent", _invented("return 100 * sum(w not in known for w in words) / max(len(words), 1)"), "percent"),
        Mutant("letters", "def invented(summary, body):\n    return sum(c not in body for c in summary) / max(len(summary), 1)\n", "letters"),
        Mutant("divides by nothing", _invented("return sum(w not in known for w in words) / len(words)"), "empty"),
        Mutant("nothing is everything", _invented("if not words:\n    return 1.0\nreturn sum(w not in known for w in words) / len(words)"), "empty_is_one"),
    ],
    "8.4": [
        Mutant("everything", _labels(_LOOP + "return ids, list(ids)"), "everything"),
        Mutant("inverted", _labels(_LOOP.replace("==", "!=") + "return ids, labels"), "inverted"),
        Mutant("the last turn", _labels("for k, (role, tokens) in enumerate(turns):\n    ids += tokens\n"
               "    labels += tokens if k == len(turns) - 1 else [-100] * len(tokens)\nreturn ids, labels"), "last_turn"),
        Mutant("the first turn", _labels("done = False\nfor role, tokens in turns:\n    ids += tokens\n"
               "    labels += tokens if role == 'keeper' and not done else [-100] * len(tokens)\n    done = done or role == 'keeper'\nreturn ids, labels"),
               "first_turn"),
        Mutant("from the first answer on", _labels("seen = False\nfor role, tokens in turns:\n    ids += tokens\n    seen = seen or role == 'keeper'\n"
               "    labels += tokens if seen else [-100] * len(tokens)\nreturn ids, labels"), "from_first"),
        Mutant("facts masked alone", _labels(_LOOP.replace("role == 'keeper'", "role != 'facts'") + "return ids, labels"), "facts_only"),
        Mutant("visitor masked alone", _labels(_LOOP.replace("role == 'keeper'", "role != 'visitor'") + "return ids, labels"), "visitor_only"),
        Mutant("shifted", _labels(_LOOP + "return ids, labels[1:] + [-100]"), "shifted"),
        Mutant("shifted back", _labels(_LOOP + "return ids, [-100] + labels[:-1]"), "shifted_back"),
        Mutant("zeros", _labels(_LOOP.replace("-100", "0") + "return ids, labels"), "zero"),
        Mutant("minus one", _labels(_LOOP.replace("-100", "-1") + "return ids, labels"), "minus_one"),
        Mutant("no end", _labels(_LOOP.replace("labels += tokens if", "labels += tokens[:-1] + [-100] if") + "return ids, labels"), "end_missing"),
        Mutant("no beginning", _labels(_LOOP.replace("labels += tokens if", "labels += [-100] + tokens[1:] if") + "return ids, labels"), "first_missing"),
        Mutant("squeezed", _labels(_LOOP + "return ids, [k for k in labels if k != -100]"), "squeezed"),
        Mutant("inputs and targets cut apart", _labels(_LOOP + "return ids, labels[1:]"), "shortened"),
        Mutant("yes and no", _labels(_LOOP + "return ids, [int(k != -100) for k in labels]"), "truth"),
        Mutant("a role that does not exist", _labels(_LOOP.replace("'keeper'", "'Keeper'") + "return ids, labels"), "nothing"),
        Mutant("shifted within a turn", _labels(_LOOP.replace("labels += tokens if", "labels += tokens[1:] + [-100] if") + "return ids, labels"),
               "shifted_inside"),
        Mutant("one mask for a turn", _labels(_LOOP.replace(" * len(tokens)", "") + "return ids, labels"), "one_for_a_turn"),
        Mutant("the keeper's tokens alone", _labels("for role, tokens in turns:\n    if role == 'keeper':\n        ids += tokens\n        labels += tokens\n"
               "return ids, labels"), "ids_of_keeper"),
        Mutant("labels alone", _labels(_LOOP + "return labels"), "labels_alone"),
        Mutant("exchanged", _labels(_LOOP + "return labels, ids"), "exchanged"),
        Mutant("one list under two names", "def keeper_labels(turns):\n    ids = [t for _, tokens in turns for t in tokens]\n    labels, at = ids, 0\n"
               "    for role, tokens in turns:\n        if role != 'keeper':\n            labels[at:at + len(tokens)] = [-100] * len(tokens)\n"
               "        at += len(tokens)\n    return ids, labels\n", "ids_masked"),
    ],
}  # fmt: skip

ALTERNATIVES = {
    "8.1": [
        "from collections import Counter\ndef distinct_n(texts, n):\n    c = Counter()\n    for t in texts:\n        w = t.split()\n"
        "        c.update(zip(*(w[k:] for k in range(n))))\n    return len(c) / sum(c.values()) if c else 0\n",
        "def distinct_n(texts, n):\n    seen, total = set(), 0\n    for t in texts:\n        w = t.split()\n        for i in range(len(w) - n + 1):\n"
        "            seen.add(' '.join(w[i:i + n]))\n            total += 1\n    return torch.tensor(len(seen) / total) if total else 0.0\n",
    ],
    "8.2": [
        "import random\ndef swapped(sources):\n    rng = random.Random(3)\n    out = list(sources)\n    while any(a == b for a, b in zip(out, sources)):\n"
        "        bad = [i for i, (a, b) in enumerate(zip(out, sources)) if a == b]\n        i, j = rng.choice(bad), rng.randrange(len(out))\n"
        "        if out[i] != sources[j] and out[j] != sources[i]:\n            out[i], out[j] = out[j], out[i]\n    return out\n",
        "def swapped(sources):\n    for k in range(1, len(sources)):\n        out = sources[k:] + sources[:k]\n"
        "        if all(a != b for a, b in zip(out, sources)):\n            return tuple(out)\n"
        "    order = sorted(range(len(sources)), key=sources.__getitem__)\n"
        "    half = len(sources) // 2\n    out = [None] * len(sources)\n    for a, b in zip(order, order[half:] + order[:half]):\n        out[a] = sources[b]\n"
        "    return out\n",
    ],
    "8.3": [
        "import re\ndef invented(summary, body):\n    words = re.findall(r'[a-z0-9]+', summary.lower())\n"
        "    known = set(re.findall(r'[a-z0-9]+', body.lower()))\n"
        "    return len([w for w in words if w not in known]) / len(words) if words else 0\n",
        "import string\ndef invented(summary, body):\n    clean = lambda t: [w.strip(string.punctuation) for w in t.lower().split()]\n"
        "    words = [w for w in clean(summary) if w]\n    known = clean(body)\n"
        "    return torch.tensor([float(w not in known) for w in words]).mean() if words else 0.0\n",
    ],
    "8.4": [
        "def keeper_labels(turns):\n    pairs = [(t, t if role == 'keeper' else -100) for role, tokens in turns for t in tokens]\n"
        "    return [a for a, _ in pairs], [b for _, b in pairs]\n",
        "def keeper_labels(turns):\n    ids = torch.tensor([t for _, tokens in turns for t in tokens])\n"
        "    mine = torch.tensor([role == 'keeper' for role, tokens in turns for _ in tokens])\n    return ids, ids.masked_fill(~mine, -100)\n",
    ],
}
