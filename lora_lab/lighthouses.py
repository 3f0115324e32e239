"""Lighthouses: a data-to-text task of the lab's own, for rooms without a network.

    name : Gull Rock | tower : white | height : 40 m | light : three flashes | keeper : old sailor | access : boat
    -> Gull Rock is a tall white lighthouse. It gives three flashes, and an old sailor looks after it. You need a boat to get there.

Everything is invented: a small grammar plans a text (which facts go together, in which order, what is left out) and words it. It draws
its chances from one seed, so the data set is code and not a file. See data/data_to_text/README.md.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from .text_scores import Slot

NAMES = (
    "Gull Rock", "Candle Point", "Old Meg", "The Sentinel", "Finger Stone", "Cape Sorrow", "Merry Head", "The Widow", "Salt Ness", "Heron Skerry",
    "Lantern Hill", "The Pilgrim", "Wreckers Bay", "Puffin Holm", "Long Tom", "Silver Spit", "Thunder Head", "The Nightingale", "Bell Reef", "Cold Harbour",
)
PLACES = (
    "Port Ellery", "Sandwick", "Marrow Bay", "Little Haven", "Saint Brannock", "Tidewell", "Fisher Row", "Kittiwake", "Pennyquay", "Oldmouth",
    "Anchor Green", "Mussel Creek",
)
NEW_NAMES = ("Storm Petrel", "The Grey Lady", "Cradle Rock", "Cormorant Point", "Hope Head", "The Drummer")  # in the validation and test parts only
NEW_PLACES = ("Herring Cove", "Saint Orla", "Whalebone", "Amber Sound")
VALUES = {
    "tower": ("white", "red", "striped", "stone"),
    "height": ("12 m", "25 m", "40 m"),
    "light": ("steady", "one flash", "three flashes"),
    "range": ("8 miles", "15 miles", "24 miles"),
    "keeper": ("family", "old sailor", "nobody"),
    "access": ("footpath", "boat", "causeway"),
    "visitors": ("yes", "no"),
}
ORDER = ("name", "tower", "height", "light", "range", "keeper", "access", "visitors", "near")

# How a fact may be put: before the noun; after "it"; as a sentence of its own.
ADJECTIVES = {
    "tower": {"white": ("white", "whitewashed"), "red": ("red", "bright red"), "striped": ("striped", "banded"), "stone": ("stone", "granite")},
    "height": {"12 m": ("small", "little", "12 metre"), "25 m": ("25 metre", "middling"), "40 m": ("tall", "towering", "40 metre")},
}
AFTER_IT = {
    "tower": {
        "white": ("is painted white", "wears a coat of white paint"), "red": ("is painted red", "is red from top to bottom"),
        "striped": ("wears stripes", "is painted in stripes"), "stone": ("is built of bare stone", "is made of grey granite"),
    },
    "height": {
        "12 m": ("rises only 12 metres", "is 12 metres high"), "25 m": ("rises 25 metres", "is 25 metres high"),
        "40 m": ("rises 40 metres", "is 40 metres high"),
    },
    "light": {
        "steady": ("has a steady light", "shows a steady beam", "never blinks"),
        "one flash": ("gives one flash", "flashes once", "shows a single flash"),
        "three flashes": ("gives three flashes", "flashes three times", "blinks three times"),
    },
    "range": {
        v: (f"can be seen for {v}", f"is visible {v} out to sea", f"shines {v} across the water", f"reaches ships {v} away")
        for v in VALUES["range"]
    },
    "keeper": {
        "family": ("is kept by a family", "is home to a family who tend the lamp"),
        "old sailor": ("is kept by an old sailor", "has an old sailor for a keeper"),
        "nobody": ("is kept by nobody", "has no keeper", "has looked after itself for years"),
    },
    "access": {
        "footpath": ("can be reached by a footpath", "lies at the end of a footpath", "can be reached on foot"),
        "boat": ("can be reached only by boat", "can not be reached without a boat"),
        "causeway": ("can be reached over a causeway", "is joined to the shore by a causeway"),
    },
    "visitors": {
        "yes": ("is open to visitors", "welcomes visitors", "may be climbed by anyone"),
        "no": ("is closed to visitors", "does not admit visitors", "may not be climbed"),
    },
}
SENTENCES = {
    "light": {
        "steady": ("its light is steady",), "one flash": ("its sign is one flash",), "three flashes": ("its sign is three flashes",),
    },
    "range": {v: (f"sailors can see it from {v} away", f"its light carries {v}") for v in VALUES["range"]},
    "keeper": {
        "family": ("a family looks after it", "a family lives there and keeps the lamp"),
        "old sailor": ("an old sailor looks after it", "the keeper is an old sailor"),
        "nobody": ("nobody looks after it", "there is no keeper any more"),
    },
    "access": {
        "footpath": ("a footpath leads to it", "you can walk there on a footpath"),
        "boat": ("you need a boat to get there", "a boat will take you there"),
        "causeway": ("you can cross to it by the causeway at low tide", "a causeway leads to it at low tide"),
    },
    "visitors": {
        "yes": ("visitors are welcome", "you may go inside"), "no": ("visitors are not allowed", "you may not go inside"),
    },
}
LEFT_OUT = 0.04  # people forget things, and so do these references

LIGHTHOUSE_RULES: dict[str, Slot] = {
    "name": Slot(names=frozenset(NAMES + NEW_NAMES)),
    "near": Slot(names=frozenset(PLACES + NEW_PLACES)),
    "tower": Slot({
        "white": r"\bwhite\w*", "red": r"\bred\b", "striped": r"\bstrip\w+|\bband\w+", "stone": r"\bstone\b|\bgranite\b",
    }),
    "height": Slot({
        "12 m": r"\b12[ -]?m\w*|\bsmall\b|\blittle\b|\bshort\b", "25 m": r"\b25[ -]?m\w*|\bmiddling\b|\bmedium\w*",
        "40 m": r"\b40[ -]?m\w*|\btall\b|\btower(?:s|ing)\b",
    }),
    "light": Slot({
        "three flashes": r"\b(?:three|3) (?:flash\w*|blinks)|\b(?:flash\w*|blink\w*) (?:three|3) times",
        "one flash": r"\b(?:one|a|single|1) flash|\b(?:flash\w*|blink\w*) once",
        "steady": r"\bstead\w+|\bnever (?:blinks|flashes)|\bdoes not (?:blink|flash)",
    }),
    "range": Slot({v: rf"\b{v.split()[0]}[ -]?miles?" for v in VALUES["range"]}),
    "keeper": Slot({
        "old sailor": r"\b(?:old|retired) sailor", "family": r"\bfamily\b",
        "nobody": r"\b(?:nobody|no one|no keeper)\b|\blook\w* after itself|\bkeeps itself\b",
    }),
    "access": Slot({"footpath": r"\b(?:foot)?path\b|\bon foot\b", "boat": r"\bboats?\b", "causeway": r"\bcauseway\b"}),
    # a denial may stand before or after what it denies
    "visitors": Slot({
        "no": r"\bclosed to\b(?: visitors)?|\b(?:not|no|n't)\b(?: \w+){0,2}? (?:visitors?|climb\w*|inside|go in\b)|\bvisitors are (?:not|never)(?: \w+)?",
        "yes": r"\bvisitors?\b|\bclimb\w*|\bgo inside\b|\bopen to\b",
    }),
}


class _Chance:
    """Draws that are the same on every version of Python, which promises that for random() alone."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def one(self, values: Sequence):
        return values[self.below(len(values))]

    def yes(self, probability: float) -> bool:
        return self._random() < probability

    def shuffled(self, values: Sequence) -> list:
        left, order = list(values), []
        while left:
            order.append(left.pop(self.below(len(left))))
        return order


def lighthouses(train: int = 500, validation: int = 60, test: int = 120, references: int = 7, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """{"train": [(meaning, text), ...], "validation": ..., "test": ...}: so many meanings in each part, `references` texts for each.

    A meaning has 4 to 8 slots, `name` always, and is in one part only. A third of the names and places outside of the training part are never
    seen in training. Same arguments, same bytes, on every machine.
    """
    chance, seen, parts = _Chance(seed), set(), {}
    for part, wanted in (("train", train), ("validation", validation), ("test", test)):
        rows = []
        while len(rows) < wanted * references:
            slots = _meaning(chance, new=part != "train")
            key = tuple(sorted(slots.items()))
            if key not in seen:
                seen.add(key)
                meaning = " | ".join(f"{slot} : {value}" for slot, value in slots.items())
                rows += [(meaning, tell(slots, chance)[0]) for _ in range(references)]
        parts[part] = rows
    return parts


def _meaning(chance: _Chance, new: bool) -> dict[str, str]:
    facts = set(chance.shuffled([slot for slot in ORDER if slot != "name"])[: 3 + chance.below(5)])
    slots = {}
    for slot in ORDER:
        if slot == "name":
            slots[slot] = chance.one(NEW_NAMES if new and chance.yes(1 / 3) else NAMES)
        elif slot == "near" and slot in facts:
            slots[slot] = chance.one(NEW_PLACES if new and chance.yes(1 / 3) else PLACES)
        elif slot in facts:
            slots[slot] = chance.one(VALUES[slot])
    return slots


def tell(slots: Mapping[str, str], chance: _Chance) -> tuple[str, frozenset[str]]:
    """One text for a meaning, and the slots that it leaves out."""
    out = frozenset(slot for slot in slots if slot != "name" and chance.yes(LEFT_OUT))
    facts = [slot for slot in slots if slot != "name" and slot not in out]
    in_front = {slot for slot in ("height", "tower") if slot in facts and chance.yes(0.7)}
    near = "near" in facts
    # the order of English: a tall white lighthouse
    adjectives = " ".join(chance.one(ADJECTIVES[slot][slots[slot]]) for slot in ("height", "tower") if slot in in_front)
    noun = f"{adjectives} lighthouse".strip()
    rest = chance.shuffled([slot for slot in facts if slot not in in_front and slot != "near"])
    name, place = slots["name"], slots.get("near")
    where = chance.one((f"near {place}", f"close to {place}", f"not far from {place}")) if near else ""
    opening = chance.below(5)
    if opening == 0 and rest:  # one more fact in the first sentence
        first = f"{name}, {_article(noun)} {noun}{' ' + where if near else ''}, {chance.one(AFTER_IT[rest[0]][slots[rest[0]]])}."
        rest = rest[1:]
    elif opening == 1 and near:
        first = f"{_capital(where)} stands {name}, {_article(noun)} {noun}."
    elif opening == 2:
        first = f"There is {_article(noun)} {noun}{' ' + where if near else ''} called {name}."
    elif opening == 3:
        first = f"{_capital(_article(noun))} {noun} called {name} stands {where if near else 'on this coast'}."
    else:
        first = f"{name} is {_article(noun)} {noun}{' ' + where if near else ''}."
    sentences = [first]
    while rest:
        take = min(len(rest), chance.one((1, 2, 2, 2, 3)))
        sentences.append(_sentence([(slot, slots[slot]) for slot in rest[:take]], chance))
        rest = rest[take:]
    return " ".join(sentences), out


def _sentence(facts: list[tuple[str, str]], chance: _Chance) -> str:
    """One sentence about one to three facts: joined behind one subject, or two main clauses."""
    subject = chance.one(("it", "it", "the lighthouse"))
    if len(facts) == 2 and all(slot in SENTENCES for slot, _ in facts) and chance.yes(0.4):
        one, two = (chance.one(SENTENCES[slot][value]) for slot, value in facts)
        return _capital(f"{one}{chance.one((', and ', '; '))}{two}.")
    if len(facts) == 1 and facts[0][0] in SENTENCES and chance.yes(0.5):
        return _capital(chance.one(SENTENCES[facts[0][0]][facts[0][1]])) + "."
    phrases = [chance.one(AFTER_IT[slot][value]) for slot, value in facts]
    return _capital(f"{subject} {', '.join(phrases[:-1])}{' and ' if len(phrases) > 1 else ''}{phrases[-1]}.")


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def lighthouse_template(slots: Mapping[str, str]) -> str:
    """A form filled in: one plain sentence per fact, always in the same order. slots: slot -> value, `name` among them.

    >>> lighthouse_template({"name": "Old Meg", "tower": "red", "light": "steady", "visitors": "no"})
    'Old Meg is a lighthouse. The tower is red. The light is steady. It is closed to visitors.'
    """
    text = [f"{slots['name']} is a lighthouse."]
    text += [_FORM[slot][slots[slot]] for slot in ORDER if slot in slots and slot in _FORM]
    return " ".join(text + ([f"{slots['near']} is near."] if "near" in slots else []))


_FORM = {
    "tower": {"white": "The tower is white.", "red": "The tower is red.", "striped": "The tower is striped.", "stone": "The tower is of stone."},
    "height": {value: f"The height is {value.split()[0]} metres." for value in VALUES["height"]},
    "light": {"steady": "The light is steady.", "one flash": "The light gives one flash.", "three flashes": "The light gives three flashes."},
    "range": {value: f"The range is {value}." for value in VALUES["range"]},
    "keeper": {"family": "The keeper is a family.", "old sailor": "The keeper is an old sailor.", "nobody": "There is no keeper."},
    "access": {"footpath": "You get there by a footpath.", "boat": "You get there by boat.", "causeway": "You get there by a causeway."},
    "visitors": {"yes": "It is open to visitors.", "no": "It is closed to visitors."},
}
