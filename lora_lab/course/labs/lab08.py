"""Lab 08, One method, many tasks: writing: its exercises.

Expectations come from plain counting, written another way than the exercise asks for.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import combinations

import numpy as np

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
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


def _share(a: float, b: float) -> float:
    return a / b if b else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# 8.1  distinct_n(texts, n)

# Texts of unequal length that repeat themselves and one another, so that every kind of miscounting gives another number.
WRITTEN = (
    (("the old dog sees the old dog", "the old dog waits", "a bird sings again and again and again"), (1, 2)),
    (("The king and the queen and the dog", "the dog and the king", "a king", "the king and the queen"), (2, 3)),
    (("a bird", "two birds", "a bird"), (3, 2)),
)


def _distinct_probe(which):
    texts, sizes = WRITTEN[which]

    def probe(rng):
        s = Script()
        for n in sizes:
            s.send(f"n = {n}", s.call(list(texts), n))
        return s

    return probe


def _grams(text: str, n: int) -> list[tuple]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _all_grams(texts, n: int) -> list[tuple]:
    return [gram for text in texts for gram in _grams(text, n)]


def distinct_by_crossing_out(texts, n: int) -> float:
    """The oracle: walk through all n-grams and cross out each that stood there before."""
    seen, kept = [], 0
    for gram in _all_grams(texts, n):
        kept += gram not in seen
        seen.append(gram)
    return kept / len(seen) if seen else 0.0


def _distinct_judge(which):
    texts, sizes = WRITTEN[which]

    def judge(inputs, answers):
        for n in sizes:
            problem = compare(answers[f"n = {n}"], distinct_by_crossing_out(texts, n), what=f"distinct_n({list(texts)}, {n})", rtol=RTOL, atol=1e-9)
            if problem:
                return problem
        return None

    return judge


def distinct_of(grams) -> float:
    return _share(len(set(grams)), len(grams))


def _joined(texts, n):
    return distinct_of(_grams(" ".join(texts), n))


_DISTINCT = {
    "across_texts": ("your n-grams run from the end of one text into the next; make those of each text alone", _joined),
    "mean_of_texts": (
        "you take each text's own share and average: what two texts have in common is then counted as different twice. Put all n-grams together",
        lambda ts, n: sum(_share(len(set(_grams(t, n))), len(_grams(t, n))) for t in ts) / len(ts),
    ),
    "sum_of_sets": (
        "you count the different n-grams of each text and add up; one that two texts share is then counted twice",
        lambda ts, n: _share(sum(len(set(_grams(t, n))) for t in ts), len(_all_grams(ts, n))),
    ),
    "once_only": (
        "you count the n-grams that stand there exactly once; one that comes back still counts, once",
        lambda ts, n: _share(sum(c == 1 for c in Counter(_all_grams(ts, n)).values()), len(_all_grams(ts, n))),
    ),
    "by_words": (
        "you divide by the number of words; a text of m words has m - n + 1 n-grams",
        lambda ts, n: _share(len(set(_all_grams(ts, n))), sum(len(t.split()) for t in ts)),
    ),
    "by_texts": ("you divide by the number of texts; divide by the number of all n-grams", lambda ts, n: len(set(_all_grams(ts, n))) / len(ts)),
    "count": ("this is the number of different n-grams; divide by the number of all", lambda ts, n: float(len(set(_all_grams(ts, n))))),
    "repeated": (
        "this is the share that is a repetition, 1 minus what is asked",
        lambda ts, n: 1 - distinct_by_crossing_out(ts, n),
    ),
    "words_only": ("n is not used: these are single words; for n = 2 take pairs of neighbours", lambda ts, n: distinct_by_crossing_out(ts, 1)),
    "letters": (
        "these are n letters, not n words: split() the text first",
        lambda ts, n: _share(len({t[i : i + n] for t in ts for i in range(len(t) - n + 1)}), sum(len(t) - n + 1 for t in ts)),
    ),
    "last_gram_lost": (
        "the last n-gram of each text is lost: a text of m words has m - n + 1 of them",
        lambda ts, n: _share(len({g for t in ts for g in _grams(t, n)[:-1]}), sum(len(_grams(t, n)[:-1]) for t in ts)),
    ),
    "blocks": (
        "your n-grams don't overlap: the next one begins one word later, not n words later",
        lambda ts, n: _share(len({g for t in ts for g in _grams(t, n)[::n]}), sum(len(_grams(t, n)[::n]) for t in ts)),
    ),
    "ragged": (
        "at the end of each text pieces shorter than n words are counted, too: stop at m - n + 1",
        lambda ts, n: _share(len({tuple(t.split()[i : i + n]) for t in ts for i in range(len(t.split()))}), sum(len(t.split()) for t in ts)),
    ),
    "last_text": ("only the last text is counted: is the list made anew for each text?", lambda ts, n: distinct_by_crossing_out(ts[-1:], n)),
    "first_text": ("only the first text is counted", lambda ts, n: distinct_by_crossing_out(ts[:1], n)),
    "upside_down": ("upside down: the different ones over all of them", lambda ts, n: _share(1, distinct_by_crossing_out(ts, n))),
    "whole_texts": ("you compare whole texts; take their n-grams", lambda ts, n: len(set(ts)) / len(ts)),
    "not_neighbours": (
        "you take any n words of a text; an n-gram is n neighbours",
        lambda ts, n: distinct_of([c for t in ts for c in combinations(t.split(), n)]),
    ),
    "percent": ("those are per cent; asked is a share from 0 to 1", lambda ts, n: 100 * distinct_by_crossing_out(ts, n)),
    "unordered": (
        "you forget the order within an n-gram: “dog sees” and “sees dog” are two",
        lambda ts, n: _share(len({frozenset(Counter(g).items()) for g in _all_grams(ts, n)}), len(_all_grams(ts, n))),
    ),
    "lowered": ("you change capitals first; here “The” and “the” are two words", lambda ts, n: distinct_by_crossing_out([t.lower() for t in ts], n)),
}


def _diagnose_distinct(evidence: list[Evidence]) -> Diagnosis | None:
    found, at = [], []
    for e, (texts, sizes) in zip(evidence[:2], WRITTEN, strict=False):
        for n in sizes:
            found.append(_number(e.answers.get(f"n = {n}")))
            at.append((texts, n))
    if any(value is None for value in found):
        return None
    key = first_match(found, {key: [formula(*a) for a in at] for key, (_, formula) in _DISTINCT.items()}, rtol=RTOL, atol=1e-9)
    if key:
        return Diagnosis(key, _DISTINCT[key][0])
    if all(compare(f, distinct_by_crossing_out(*a), rtol=RTOL, atol=1e-9) is None for f, a in zip(found, at, strict=True)) and evidence[2].error is not None:
        return Diagnosis("too_short", "right, but texts of fewer than n words have no n-gram at all: return 0.0 then")
    return None


def _distinct_n(texts, n):
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


DISTINCT = Exercise(
    id="8.1",
    title="How varied?",
    difficulty=1,
    minutes=5,
    points=2,
    name="distinct_n",
    cases=(
        Case("texts that repeat themselves and one another", _distinct_probe(0), _distinct_judge(0)),
        Case("longer n-grams", _distinct_probe(1), _distinct_judge(1)),
        Case("no n-gram at all", _distinct_probe(2), _distinct_judge(2)),
    ),
    diagnose=_diagnose_distinct,
    hints=(
        "Two texts say “the old dog”. How many different words are that, and out of how many?",
        "Collect the n-grams of every text in one list: tuple(words[i : i + n]) for i in range(len(words) - n + 1). Then a set.",
        "return len(set(grams)) / max(len(grams), 1)",
    ),
    read="the lines above the exercise; Li et al. 2016 (arXiv 1510.03055) on distinct-1 and distinct-2",
    fallback=lambda: _distinct_n,
)


# ---------------------------------------------------------------------------------------------------------------------
# 8.2  swapped(sources)

# Many equal texts: whoever shuffles once, turns the list round or moves it on by one leaves some text where it was.
LISTS = (
    tuple("abcabcaabbcca"),
    tuple(f"May {1 + k // 5}" for k in range(40)),
    tuple(f"May {1 + (7 * k) % 8}" for k in range(40)),
)


def _swap_probe(which):
    def probe(rng):
        s = Script()
        s.send("swapped", s.call(list(LISTS[which])))
        return s

    return probe


def _listed(value) -> list | None:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, (list, tuple)) else None


def _swap_judge(which):
    texts = list(LISTS[which])

    def judge(inputs, answers):
        found = _listed(answers["swapped"])
        if found is None:
            return f"swapped(...) should be a list of {len(texts)} texts; found {answers['swapped']!r}"
        if len(found) != len(texts):
            return f"swapped(...) should have {len(texts)} texts, as many as went in; found {len(found)}"
        if any(sum(f == t for f in found) != texts.count(t) for t in set(texts)):
            return "swapped(...) should hold the same texts, each as often as before"
        same = [i for i, (a, b) in enumerate(zip(found, texts, strict=True)) if a == b]
        if same:
            return f"{len(same)} of {len(texts)} places still have the text that belongs there, the first: place {same[0]}, {found[same[0]]!r}"
        return None

    return judge


def _diagnose_swap(evidence: list[Evidence]) -> Diagnosis | None:
    found = [_listed(e.answers.get("swapped")) for e in evidence]
    if any(f is None for f in found):
        return None
    lists = [list(texts) for texts in LISTS]
    if found == lists:
        return Diagnosis("unchanged", "the list comes back as it was")
    if all(all(isinstance(v, (int, float)) for v in f) and len(f) == len(t) for f, t in zip(found, lists, strict=True)):
        return Diagnosis("indices", "those are places; return the texts that stand there")
    if all(f == t[::-1] for f, t in zip(found, lists, strict=True)):
        return Diagnosis("reversed", "turned round, a text in the middle stays, and so does one whose mirror place holds the same text")
    if all(f == sorted(t) for f, t in zip(found, lists, strict=True)):
        return Diagnosis("sorted", "sorted is no swap: where the list was in order already, everything stays")
    if any(sorted(map(str, f)) != sorted(t) for f, t in zip(found, lists, strict=True)):
        if all(set(map(str, f)) == set(t) and len(f) == len(set(t)) for f, t in zip(found, lists, strict=True)):
            return Diagnosis("once_each", "each text comes back once; one that stood there five times must come back five times")
        if all(len(f) < len(t) for f, t in zip(found, lists, strict=True)):
            return Diagnosis("lost", "texts are lost on the way: as many must come out as went in")
        if all(len(f) == len(t) and set(f) <= set(t) for f, t in zip(found, lists, strict=True)):
            return Diagnosis("drawn", "each place draws a text of its own, so some come often and others never; use every text as often as before")
        return None
    if all(any(f == [*sorted(t)[k:], *sorted(t)[:k]] for k in range(len(t))) for f, t in zip(found, lists, strict=True)):
        return Diagnosis("not_put_back", "you sort and move on, but each text must then go to the place in the *original* list that its neighbour came from")
    if any(f in ([*t[k:], *t[:k]] for k in (1, len(t) - 1)) for f, t in zip(found, lists, strict=True)) and all(
        any(f == [*t[k:], *t[:k]] for k in range(len(t))) for f, t in zip(found, lists, strict=True)
    ):
        return Diagnosis("moved_by_one", "moved on by one, a text whose neighbour is equal gets its own text again: bring equal texts together first")
    if any(a == b for f, t in zip(found, lists, strict=True) for a, b in zip(f, t, strict=True)):
        return Diagnosis("some_stay", "the texts are mixed, but here and there one stands where it stood, or an equal one does. A control may not have luck")
    return None


def _swapped(sources):
    order = sorted(range(len(sources)), key=lambda i: sources[i])
    most = max(sources.count(text) for text in sources)
    out = list(sources)
    for place, taken in zip(order, order[most:] + order[:most], strict=True):
        out[place] = sources[taken]
    return out


SWAPPED = Exercise(
    id="8.2",
    title="A control without luck",
    difficulty=3,
    minutes=8,
    points=4,
    name="swapped",
    cases=(
        Case("a dozen texts, some of them equal", _swap_probe(0), _swap_judge(0)),
        Case("forty texts, equal ones together", _swap_probe(1), _swap_judge(1)),
        Case("forty texts, equal ones apart", _swap_probe(2), _swap_judge(2)),
    ),
    diagnose=_diagnose_swap,
    hints=(
        "random.sample(sources, len(sources)): how many places keep their text by luck? And what if a text stands there five times?",
        "Put equal texts side by side: order = sorted(range(len(sources)), key=lambda i: sources[i]). How far must that line move on?",
        "By the count of the most frequent text: out[place] = sources[taken] for place, taken in zip(order, order[most:] + order[:most]).",
    ),
    read="the lines above the exercise",
    fallback=lambda: _swapped,
)


# ---------------------------------------------------------------------------------------------------------------------
# 8.3  invented(summary, body)

SUMMARIES = (
    (
        ("Return the art of the start.", "The start returns, and a party begins: Return to it."),
        ("Sort the array, then sort it, then sort.", "An array is sorted in place; the sort is stable. It takes an axis."),
        ("Plot a line, a curve, a plot.", "The line is drawn from x to y. A curve goes through both."),
    ),
    (("Compute the mean. The MEAN!", "mean of the values, in float64"), ("Nothing here was said before", "Elsewhere others spoke"), ("the axis", "the axis")),
    (("", "An empty line says nothing."), ("...", "No word in that.")),
)


def _invented_probe(which):
    def probe(rng):
        s = Script()
        for k, (summary, body) in enumerate(SUMMARIES[which]):
            s.send(f"text {k}", s.call(summary, body))
        return s

    return probe


def _letters(text: str) -> list[str]:
    """Words, by walking through the letters: another way than a regular expression."""
    words, word = [], ""
    for c in text.lower() + " ":
        if c.isalnum():
            word += c
        elif word:
            words.append(word)
            word = ""
    return words


def invented_by_hand(summary: str, body: str) -> float:
    known, said = _letters(body), _letters(summary)
    return _share(sum(known.count(word) == 0 for word in said), len(said))


def _invented_judge(which):
    def judge(inputs, answers):
        for k, (summary, body) in enumerate(SUMMARIES[which]):
            problem = compare(answers[f"text {k}"], invented_by_hand(summary, body), what=f"invented({summary!r}, {body!r})", rtol=RTOL, atol=1e-9)
            if problem:
                return problem
        return None

    return judge


def _plain(text):
    return re.findall(r"\w+", text.lower())


_INVENTED = {
    "copied": ("this is the share that the body has; asked is what it has not", lambda s, b: 1 - invented_by_hand(s, b)),
    "sets": (
        "you count each kind of word once; a word that the summary says three times counts three times",
        lambda s, b: _share(len(set(_plain(s)) - set(_plain(b))), len(set(_plain(s)))),
    ),
    "set_over_all": (
        "new words are counted once each, but divided by all words: count them as often as they stand there",
        lambda s, b: _share(len(set(_plain(s)) - set(_plain(b))), len(_plain(s))),
    ),
    "substring": (
        "`word in body` also finds “art” in “start”: compare with the body's words",
        lambda s, b: _share(sum(w not in b.lower() for w in _plain(s)), len(_plain(s))),
    ),
    "substring_capitals": (
        "`word in body` also finds “art” in “start”, and capitals count: compare lower-case words with words",
        lambda s, b: _share(sum(w not in b for w in re.findall(r"\w+", s)), len(_plain(s))),
    ),
    "punctuation": (
        "“start.” with its full stop is no other word than “start”: split() leaves signs on the words; re.findall(r\"\\w+\", text) does not",
        lambda s, b: _share(sum(w not in b.lower().split() for w in s.lower().split()), len(s.split())),
    ),
    "punctuation_capitals": (
        "split() leaves signs on the words, and “The” is not “the”: re.findall(r\"\\w+\", text.lower())",
        lambda s, b: _share(sum(w not in b.split() for w in s.split()), len(s.split())),
    ),
    "capitals": (
        "“The” and “the” are one word here: lower() both",
        lambda s, b: _share(sum(w not in re.findall(r"\w+", b) for w in re.findall(r"\w+", s)), len(_plain(s))),
    ),
    "half_lowered": (
        "only the summary is in lower case; “The” in the body must be found, too: lower() both",
        lambda s, b: _share(sum(w not in re.findall(r"\w+", b) for w in _plain(s)), len(_plain(s))),
    ),
    "other_half_lowered": (
        "only the body is in lower case; “Return” in the summary must be found in it, too: lower() both",
        lambda s, b: _share(sum(w not in _plain(b) for w in re.findall(r"\w+", s)), len(_plain(s))),
    ),
    "known_once": (
        "you take away each known word once; one that the summary says three times is known three times",
        lambda s, b: _share(len(_plain(s)) - len(set(_plain(s)) & set(_plain(b))), len(_plain(s))),
    ),
    "exchanged": (
        "this is the share of the body's words that the summary leaves out; asked is the other way round",
        lambda s, b: invented_by_hand(b, s),
    ),
    "by_body": ("you divide by the number of words in the body; divide by those of the summary",
                lambda s, b: _share(sum(w not in _plain(b) for w in _plain(s)), len(_plain(b)))),
    "count": ("this is how many; divide by the number of words in the summary", lambda s, b: float(sum(w not in _plain(b) for w in _plain(s)))),
    "percent": ("those are per cent; asked is a share from 0 to 1", lambda s, b: 100 * invented_by_hand(s, b)),
    "letters": ("you go through letters; go through words", lambda s, b: _share(sum(c not in b for c in s), len(s))),
}  # fmt: skip


def _diagnose_invented(evidence: list[Evidence]) -> Diagnosis | None:
    found, at = [], []
    for e, texts in zip(evidence[:2], SUMMARIES, strict=False):
        for k, pair in enumerate(texts):
            found.append(_number(e.answers.get(f"text {k}")))
            at.append(pair)
    if any(value is None for value in found):
        return None
    key = first_match(found, {key: [formula(*a) for a in at] for key, (_, formula) in _INVENTED.items()}, rtol=RTOL, atol=1e-9)
    if key:
        return Diagnosis(key, _INVENTED[key][0])
    if all(compare(f, invented_by_hand(*a), rtol=RTOL, atol=1e-9) is None for f, a in zip(found, at, strict=True)):
        if evidence[2].error is not None:
            return Diagnosis("empty", "right, but a summary without a word has nothing to divide by: return 0.0 then")
        if _number(evidence[2].answers.get("text 0")) == 1.0:
            return Diagnosis("empty_is_one", "right, but a summary without a word has invented nothing: return 0.0 then")
    return None


def _invented(summary, body):
    known = set(re.findall(r"\w+", body.lower()))
    words = re.findall(r"\w+", summary.lower())
    return sum(word not in known for word in words) / max(len(words), 1)


INVENTED = Exercise(
    id="8.3",
    title="Words from nowhere",
    difficulty=1,
    minutes=5,
    points=2,
    name="invented",
    cases=(
        Case("signs, repetitions, words within words", _invented_probe(0), _invented_judge(0)),
        Case("capitals; all new; nothing new", _invented_probe(1), _invented_judge(1)),
        Case("a summary without a word", _invented_probe(2), _invented_judge(2)),
    ),
    diagnose=_diagnose_invented,
    hints=(
        "Is “art” a word of “We start.”? Is “start.”?",
        'words = re.findall(r"\\w+", text.lower()) gives the words of a text, without signs.',
        "known = set of the body's words; then sum(word not in known for word in words) / max(len(words), 1).",
    ),
    read="the lines above the exercise",
    fallback=lambda: _invented,
)


# ---------------------------------------------------------------------------------------------------------------------
# 8.4  keeper_labels(turns)

# No token comes twice, so that every label says where it comes from. 0 is among the keeper's tokens: it is a token like any other.
DIALOGUES = (
    (("facts", (11, 12, 13)), ("visitor", (21, 22)), ("keeper", (31, 32, 33, 9)), ("visitor", (41, 42, 43)), ("keeper", (51, 52, 8))),
    (("keeper", (5, 0, 7)), ("visitor", (61, 62)), ("keeper", (71, 6))),
    (("facts", (81, 82)), ("visitor", (91, 92, 93, 94)), ("visitor", (95,)), ("keeper", (96,))),
)


def _labels_probe(which):
    def probe(rng):
        s = Script()
        s.send("result", s.call([[role, list(tokens)] for role, tokens in DIALOGUES[which]]))
        return s

    return probe


def labels_by_place(turns) -> tuple[list[int], list[int]]:
    """The oracle: all tokens in a row, then every place that is not the keeper's is crossed out."""
    ids, labels, at = sum((list(tokens) for _, tokens in turns), []), [], 0
    labels = list(ids)
    for role, tokens in turns:
        if role != "keeper":
            labels[at : at + len(tokens)] = [-100] * len(tokens)
        at += len(tokens)
    return ids, labels


def _two_lists(value) -> tuple[list, list] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    pair = [_listed(v) for v in value]
    return None if None in pair else (pair[0], pair[1])


def _labels_judge(which):
    wanted = labels_by_place(DIALOGUES[which])

    def judge(inputs, answers):
        found = _two_lists(answers["result"])
        if found is None:
            return f"keeper_labels(...) should be two lists, ids and labels; found {answers['result']!r}"
        for name, f, w in zip(("ids", "labels"), found, wanted, strict=True):
            if len(f) != len(w):
                return f"{name} should have {len(w)} entries, one for each token; found {len(f)}"
            for k, (a, b) in enumerate(zip(f, w, strict=True)):
                if a != b:
                    return f"{name}[{k}] should be {b}; found {a}"
        return None

    return judge


def _variants(turns) -> dict[str, list[int]]:
    """mistake -> the labels that it gives."""
    ids, right = labels_by_place(turns)
    keeper = [k for k, (role, _) in enumerate(turns) if role == "keeper"]

    def of(rule):
        out = []
        for k, (role, tokens) in enumerate(turns):
            out += rule(k, role, list(tokens))
        return out

    masked = lambda tokens: [-100] * len(tokens)  # noqa: E731
    return {
        "everything": ids,
        "inverted": of(lambda k, role, t: masked(t) if role == "keeper" else t),
        "last_turn": of(lambda k, role, t: t if k == keeper[-1] else masked(t)),
        "first_turn": of(lambda k, role, t: t if k == keeper[0] else masked(t)),
        "from_first": of(lambda k, role, t: t if k >= keeper[0] else masked(t)),
        "facts_only": of(lambda k, role, t: masked(t) if role == "facts" else t),
        "visitor_only": of(lambda k, role, t: masked(t) if role == "visitor" else t),
        "shifted": [*right[1:], -100],
        "shifted_back": [-100, *right[:-1]],
        "zero": [0 if k == -100 else k for k in right],
        "minus_one": [-1 if k == -100 else k for k in right],
        "end_missing": of(lambda k, role, t: [*t[:-1], -100] if role == "keeper" else masked(t)),
        "first_missing": of(lambda k, role, t: [-100, *t[1:]] if role == "keeper" else masked(t)),
        "squeezed": [k for k in right if k != -100],
        "shortened": right[1:],
        "truth": [int(k != -100) for k in right],
        "nothing": [-100] * len(ids),
        "shifted_inside": of(lambda k, role, t: [*t[1:], -100] if role == "keeper" else masked(t)),
        "one_for_a_turn": of(lambda k, role, t: t if role == "keeper" else [-100]),
    }


_LABEL_TEXTS = {
    "everything": "every token is a label: the model learns to ask like a visitor, too",
    "inverted": "the wrong way round: the keeper's tokens are crossed out, and the others are to be learned",
    "last_turn": "only the keeper's last turn is learned; in training all turns of the keeper count",
    "first_turn": "only the keeper's first turn is learned; all of them count",
    "from_first": "from the keeper's first word on everything is a label, later questions among it; go turn by turn",
    "facts_only": "the facts are left out, the visitor's questions are not",
    "visitor_only": "the visitor is left out, the facts are not",
    "shifted": "the labels are moved by one; the loss does that itself (position t predicts token t + 1), so it would happen twice",
    "shifted_back": "the labels are moved by one place to the right; each label stands where its token stands",
    "zero": "0 is a token like any other; what the loss leaves out is −100",
    "minus_one": "cross_entropy leaves −100 out; −1 raises an error there",
    "end_missing": "the last token of each turn is missing; without it the keeper never learns to stop",
    "first_missing": "the first token of each turn is missing: the visitor's turn ends with “Keeper:”, so this is where the answer begins",
    "squeezed": "the crossed-out places are gone; labels must be as long as ids, so that each stands at its token",
    "shortened": "one label too few: as many as ids",
    "nothing": "no token is a label; the role that learns is written “keeper”",
    "shifted_inside": "within each turn the labels are moved by one; the loss does that itself, so it would happen twice",
    "one_for_a_turn": "a turn that is not the keeper's gets a single −100; it needs one for each of its tokens",
    "truth": "those are marks of yes and no; a label is the token itself",
}


def _diagnose_labels(evidence: list[Evidence]) -> Diagnosis | None:
    found = [_two_lists(e.answers.get("result")) for e in evidence]
    flat = [_listed(e.answers.get("result")) for e in evidence]
    rights = [labels_by_place(turns) for turns in DIALOGUES]
    if all(f == r[1] for f, r in zip(flat, rights, strict=True)):
        return Diagnosis("labels_alone", "those are the labels; return both, `return ids, labels`")
    if any(f is None for f in found):
        return None
    if all(f == (r[1], r[0]) for f, r in zip(found, rights, strict=True)):
        return Diagnosis("exchanged", "the two lists are the wrong way round: ids first")
    if any(f[0] != r[0] for f, r in zip(found, rights, strict=True)):
        if all(f[0] == r[1] for f, r in zip(found, rights, strict=True)):
            return Diagnosis("ids_masked", "−100 is in ids, too: one list under two names? The model must still read the questions")
        if all(f[0] == [t for t in r[1] if t != -100] for f, r in zip(found, rights, strict=True)):
            return Diagnosis("ids_of_keeper", "ids has the keeper's tokens alone; the model must still read the questions")
        return None
    for key, text in _LABEL_TEXTS.items():
        if all(f[1] == _variants(turns)[key] for f, turns in zip(found, DIALOGUES, strict=True)):
            return Diagnosis(key, text)
    return None


def _keeper_labels(turns):
    ids, labels = [], []
    for role, tokens in turns:
        ids += tokens
        labels += tokens if role == "keeper" else [-100] * len(tokens)
    return ids, labels


LABELS = Exercise(
    id="8.4",
    title="Whose words?",
    difficulty=2,
    minutes=6,
    points=3,
    name="keeper_labels",
    cases=(
        Case("two questions, two answers", _labels_probe(0), _labels_judge(0)),
        Case("the keeper speaks first", _labels_probe(1), _labels_judge(1)),
        Case("two questions in a row", _labels_probe(2), _labels_judge(2)),
    ),
    diagnose=_diagnose_labels,
    hints=(
        "At which places shall the model be asked for the next token? It reads all of them.",
        "ids has every token of every turn. labels is as long: the token itself where the keeper speaks, −100 elsewhere.",
        'for role, tokens in turns: ids += tokens; labels += tokens if role == "keeper" else [-100] * len(tokens)',
    ),
    read="lab 07, exercise 7.1",
    fallback=lambda: _keeper_labels,
)


LAB = Lab(
    number="8",
    name="08_writing",
    title="One method, many tasks: writing",
    minutes=55,
    core=False,
    objectives=(
        "adapt one small model to four kinds of writing by changing a few lines",
        "put LoRA beside a frozen base, a linear probe and full fine-tuning, with a spread",
        "choose a measure that means something, and build the control that must fail",
        "name an error that LoRA still makes",
    ),
    needs=("lab 02", "lab 07 for the loss on the answer alone"),
    exercises=(DISTINCT, SWAPPED, INVENTED, LABELS),
    predictions=(
        Prediction(
            "8.A",
            "A control learns the same words in any order. Beside the LoRA that learned whole sentences, how varied is what it writes (distinct-2)?",
            {"a": "less varied", "b": "about as varied, to 0.05", "c": "more varied"},
        ),
        Prediction(
            "8.B",
            "The adapted model translates the *wrong* source. Exact matches fall to about nothing. And chrF, which counts letters in common?",
            {"a": "below 20", "b": "20 to 60", "c": "above 60"},
        ),
        Prediction(
            "8.C",
            "ROUGE-L of first lines by LoRA, beside lead-1, the first sentence of the body as it stands:",
            {"a": "LoRA is lower", "b": "equal, to 2 points", "c": "LoRA is higher"},
        ),
        Prediction(
            "8.D",
            "A visitor asks for something that is not among the facts. A quarter of the training questions were such. How often does LoRA invent an hour?",
            {"a": "in under 10 % of them", "b": "in 10 to 50 %", "c": "in more than half"},
        ),
    ),
)
