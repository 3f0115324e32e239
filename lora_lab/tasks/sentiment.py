"""Is it praise or complaint? 286 sentences written for this lab, of four kinds, and a small grammar that drills the words they are made of.

Data card: data/sentiment/README.md. The grammar below makes only training sentences; every score is of sentences that a person wrote.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from ..comparing import Task
from ..data import Batches
from ..encoder import encode, load_encoder
from ..files import shipped
from .texts import Texts, text_task

KINDS = ("plain", "negation", "turn", "irony")
GOOD = (
    "good great lovely wonderful delightful excellent brilliant splendid charming beautiful pleasant kind friendly polite patient honest clever warm "
    "clean bright fresh sweet comfortable fair safe happy calm generous gentle perfect fine superb marvellous thrilling quick cheerful magnificent "
    "tender reliable wise"
).split()
BAD = (
    "bad terrible ugly awful dreadful poor stupid miserable tedious shabby unpleasant rude unfriendly insolent impatient false silly cold dirty "
    "gloomy stale bitter painful unfair dangerous sad angry selfish cruel useless dull horrible filthy boring slow tired wretched hateful broken foolish"
).split()
THINGS = (
    "soup hotel film guide room play doctor lecture book train waiter garden concert meal teacher story coat phone trip shop host bed view driver "
    "letter song evening service park house"
).split()
LIKED = ("I loved", "we enjoyed", "I admire", "we praise", "I recommend", "we were glad of")
HATED = ("I hated", "we regret", "I despise", "we blame", "I warn you against", "we were ashamed of")


@cache
def sentences() -> tuple[Texts, tuple[str, ...]]:
    """(texts, kinds). Plain sentences say it in so many words; a negation turns one word over; a turn says two things of which the last one
    counts; irony says the opposite of what it means. Most come in pairs, one of each label ("the soup was warm", "the soup was cold"), which a
    split keeps together: else a counter of words would find a test sentence's nearest relative in training, with the other label.
    """
    with open(shipped("sentiment") / "sentences.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    data = Texts(tuple(r["text"] for r in rows), tuple(r["label"] for r in rows), tuple(r["pair"] for r in rows))
    return data, tuple(r["kind"] for r in rows)


def drill(n: int = 600, seed: int = 0) -> Texts:
    """n sentences from a grammar: a thing and what it was like; not what; one thing but then another; who liked it. Half of each label."""
    rng = random.Random(seed)
    texts, labels = [], []
    for k in range(n):
        good = k % 2 == 0
        mine, other = (GOOD, BAD) if good else (BAD, GOOD)
        a, b, c = rng.choice(mine), rng.choice(mine), rng.choice(other)
        x, y = rng.sample(THINGS, 2)
        said = rng.choice(LIKED if good else HATED)
        frames = (
            f"The {x} was {a}.", f"The {x} was {a} and {b}.", f"What a {a} {x}!", f"A {a} {x} and a {b} {y}.", f"{said.capitalize()} the {x}.",
            f"{said.capitalize()} the {a} {x}.", f"My {x} is {a}, my {y} {b}.", f"The {x} was not {c}.", f"It was not a {c} {x} at all.",
            f"The {x} was never {c}.", f"The {x} was {c}, but the {y} was {a}.", f"At first the {x} seemed {c}, then it was {a}.",
        )  # fmt: skip
        texts.append(rng.choice(frames))
        labels.append("positive" if good else "negative")
    return Texts(tuple(texts), tuple(labels))


def sentiment_task(drilled: int = 600, **settings) -> Task:
    """Sentiment on an encoder: trained on the grammar's sentences and on 60 % of the written ones. settings as for `texts.text_task`."""
    settings = {"length": 32, "steps": 150} | settings
    data, more = sentences()[0], drill(drilled)
    task = text_task("sentiment: praise or complaint", data, **settings)
    _, tokenizer = load_encoder(settings.get("encoder"))

    def batches(seed: int) -> Batches:
        rows = data.split(seed)[0]
        texts = [*(data.texts[i] for i in rows), *more.texts]
        y = [*data.numbers[rows].tolist(), *more.numbers.tolist()]
        return _batches(tokenizer, texts, y, settings, seed)

    return replace(task, train=batches)


def _batches(tokenizer, texts: Sequence[str], y: Sequence[int], settings: dict, seed: int) -> Batches:
    return Batches(encode(tokenizer, texts, settings["length"]), torch.tensor(y), settings.get("batch", 16), seed)
