"""English sentences, by a grammar that can also say no: so that "correct" is a number and not a taste.

Data card. 2,000 + 200 sentences drawn from the grammar below (seed 0), no sentence in both parts; village words that the pocket GPT-2 knows
from its books. Every sentence is right by construction: subject and verb agree, also across a noun of the other number that stands between
them ("the keys near the door are ..."), `a` and `an` follow the next word, `every` and `this` go with one, `many` and `these` with several.
Not for: anything about English at large; the grammar has four sentence forms and no meaning. MIT, as the code.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from ..comparing import Task
from ..gpt2 import generate
from ..train import token_loss
from . import writing


def _pairs(words: str) -> dict[str, str]:
    """one -> several"""
    return dict(pair.split("/") for pair in words.split())


NOUNS = _pairs("dog/dogs horse/horses child/children man/men woman/women bird/birds king/kings girl/girls boy/boys")
PLACES = _pairs("house/houses tree/trees river/rivers door/doors island/islands fire/fires")
REST = _pairs("sleeps/sleep waits/wait sings/sing laughs/laugh stands/stand")
ACT = _pairs("sees/see follows/follow loves/love knows/know watches/watch hears/hear")
ADJECTIVES = "old little white black good happy angry".split()
ADVERBS = "quietly alone again".split()
PREPOSITIONS = "near behind under".split()
ONE, MANY = "a the this every".split(), "the these many two".split()

# word -> (kind, number): 1 one, 2 several, 0 either. No word has two kinds, so a sentence has one reading.
WORDS = {w: ("adjective", 0) for w in ADJECTIVES} | {w: ("adverb", 0) for w in ADVERBS} | {w: ("preposition", 0) for w in PREPOSITIONS}
for kind, pairs in (("noun", NOUNS), ("place", PLACES), ("rest", REST), ("act", ACT)):
    WORDS |= {one: (kind, 1) for one in pairs} | {many: (kind, 2) for many in pairs.values()}
WORDS |= {w: ("article", 1) for w in [*ONE, "an"]} | {w: ("article", 2) for w in MANY} | {"the": ("article", 0)}


def _phrase(rng: random.Random, nouns: dict[str, str]) -> tuple[list[str], int]:
    number = rng.choice((1, 2))
    words = [rng.choice(ONE if number == 1 else MANY)]
    if rng.random() < 0.4:
        words.append(rng.choice(ADJECTIVES))
    one, many = rng.choice(list(nouns.items()))
    words.append(one if number == 1 else many)
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    return words, number


def sentence(rng: random.Random) -> str:
    """One sentence of the grammar: a subject, perhaps with a place, and a verb that agrees with it."""
    words, number = _phrase(rng, NOUNS)
    if rng.random() < 0.6:
        words += [rng.choice(PREPOSITIONS), *_phrase(rng, PLACES)[0]]
    if rng.random() < 0.5:
        words.append(rng.choice(list(REST.items()))[number - 1])
        if rng.random() < 0.5:
            words.append(rng.choice(ADVERBS))
    else:
        words += [rng.choice(list(ACT.items()))[number - 1], *_phrase(rng, NOUNS)[0]]
    return " ".join(words).capitalize() + "."


@dataclass(frozen=True)
class Verdict:
    """What the grammar says: `problem` is "" for a sentence of it, else "word", "order", "number" (within a phrase), "a/an" or "agreement".

    between  subject and verb have a noun of the other number between them; None where no verb was reached
    """

    problem: str
    between: bool | None = None


_ORDER = re.compile(r"article (adjective )?noun (preposition article (adjective )?place )?(rest (adverb )?|act article (adjective )?noun )")


def judge(text: str) -> Verdict:
    """Is this one sentence of the grammar?

    >>> judge("The dogs near an old door sleep.").problem, judge("The dogs near an old door sleeps.").problem
    ('', 'agreement')
    """
    if not re.fullmatch(r"[A-Z][a-z ]*\.", text):
        return Verdict("order")
    words = text[:-1].lower().split(" ")
    if not all(word in WORDS for word in words):
        return Verdict("word")
    kinds, numbers = zip(*(WORDS[word] for word in words), strict=True)
    if not _ORDER.fullmatch(" ".join(kinds) + " "):
        return Verdict("order")
    phrases, verb = [], None
    for i, kind in enumerate(kinds):
        if kind == "article":
            start = i
        elif kind in ("noun", "place"):
            phrases.append((start, numbers[i]))
            if 3 - numbers[i] == numbers[start]:
                return Verdict("number")
        elif kind in ("rest", "act"):
            verb, at = numbers[i], len(phrases)
    between = at == 2 and phrases[1][1] != phrases[0][1]
    if any(words[s] in ("a", "an") and (words[s] == "an") != (words[s + 1][0] in "aeiou") for s, _ in phrases):
        return Verdict("a/an", between)
    return Verdict("" if verb == phrases[0][1] else "agreement", between)


def sentences(n: int = 2_000, test: int = 200, seed: int = 0) -> tuple[list[str], list[str]]:
    """(training, test): different sentences, none in both."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < n + test:
        found[sentence(rng)] = None
    found = list(found)
    return found[:n], found[n:]


def shuffled(text: str, rng: random.Random) -> str:
    """The control: the same words in any order."""
    words = text[:-1].lower().split()
    rng.shuffle(words)
    return " ".join(words).capitalize() + "."


def distinct(texts: list[str], n: int = 2) -> float:
    """Different n-grams of words over all n-grams, within texts and over all of them; 0 where there is none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def write(model, n: int = 64, seed: int = 0, temperature: float = 0.7) -> list[str]:
    """n sentences by the model, drawn at a temperature; each ends with the first full stop or end-of-text."""
    tokenizer = writing.pocket()[1]
    texts = generate(model, tokenizer, [tokenizer.eos_token] * n, 24, strategy="sampling", temperature=temperature, seed=seed, batch_size=64)
    return [text.strip().split(".")[0].strip() + "." if "." in text else text.strip() for text in texts]


def sentence_task(steps: int = 100, samples: int = 64, control: bool = False) -> Task:
    """Sentences of the grammar for the pocket GPT-2; control=True trains on the same words in any order and is tested on whole sentences.

    Scores: "accepted", the share of `samples` drawn sentences that the grammar accepts; "distinct-2"; "perplexity" of held-out sentences,
    exp(nats per token), end of text included.
    """
    known, held = sentences()
    if control:
        rng = random.Random(0)
        known = [shuffled(text, rng) for text in known]
    end = writing.pocket()[1].eos_token
    known, held_out = (writing.encoded([end] * len(part), part) for part in (known, held))

    def metric(model, seed):
        texts = write(model, samples, seed=1_000 * seed)
        return {
            "accepted": sum(judge(text).problem == "" for text in texts) / len(texts),
            "distinct-2": distinct(texts),
            "perplexity": math.exp(min(writing.loss_on(model, held_out), 700)),
        }

    return Task(
        "sentences" + (", words shuffled" if control else ""), lambda seed: writing.pocket()[0], lambda seed: writing.batches(known, 16, seed), metric,
        targets="all-linear", probe=("lm_head",), lower=("perplexity",), loss=token_loss(), steps=steps, warmup=steps // 10, r=4, alpha=8,
        lr={"linear probe": 3e-3, "LoRA": 1.5e-2, "full fine-tuning": 2e-3},
    )  # fmt: skip
