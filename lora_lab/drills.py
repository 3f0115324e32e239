"""Exercises in copying, cut from a text itself: what a small model must practise before it can put given words into a sentence.

A book seldom repeats itself word for word, so a language model of a few million parameters has little reason to look back at its context.
LoRA can teach such a model a style, but not to say "The Eagle" because "name : The Eagle" stands above. Three drills give it the reason:

    repeat   a passage comes again, verbatim, after other text; or a span of tokens drawn at random does
    facts    "action : distressed | person : Dorothy||Dorothy was greatly distressed.": words of a sentence as a shuffled list, then it
    recall   a list of pairs, then the same pairs in another order

The names of the fields are guesses by rule (a capitalised word in mid-sentence is a "name"), often wrong. That does no harm: the exercise
is to find the words and use them. Nothing goes in but the text itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

_SENTENCE = re.compile(r"[^.!?]+[.!?][\"”']*")
_TITLE = r"(?:Mr\. |Mrs\. |Miss |Captain |Lord |Lady |Sir |Uncle |Aunt )?"
_NUMBERS = "one|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|forty|fifty|hundred|thousand|first|second|third"
# What a field may be called, and where in a sentence its value stands.
_FIELDS = (
    (("name", "who", "person"), re.compile(rf"(?<=[a-z,;] )({_TITLE}[A-Z][a-z]+(?: [A-Z][a-z]+)*)")),
    (
        ("place", "where", "near", "area"),
        re.compile(r"\b(?:in|at|to|from|near|of|into|by|on) ((?:the |a |an |his |her |their |our |my )?[A-Za-z]+(?: [A-Z][a-z]+)?)\b"),
    ),
    (("number", "how many", "amount"), re.compile(rf"\b({_NUMBERS}|\d+)\b", re.I)),
    (("thing", "object", "type"), re.compile(r"\b(?:a|an|the|his|her|my|your|this|that) ([a-z]+(?: [a-z]+)?)\b")),
    (("manner", "how"), re.compile(r"\b([a-z]{3,}ly)\b")),
    (("state", "quality", "rating"), re.compile(r"\b(?:was|were|is|are|be|so|very|too|more) ((?:not )?[a-z]+)\b")),
    (("action", "did"), re.compile(r"\b([a-z]{3,}ed)\b")),
)
# Many ways to write a list, so that the model learns what a list is and not one punctuation.
_COLON = (" : ", " : ", ": ", " = ", " - ")
_COMMA = (" | ", " | ", "\n", "; ", ", ")
_CLOSE = ("||", "||", "\n", "\n\n", " -> ")
_EDGES = ".,;!?\""
_TRIES = 200  # a text without sentences (verse, tables) has no facts to give

Row = tuple[list[int], list[int]]


class Drills:
    """Rows of `context` + 1 tokens, made from a stream of tokens on demand. One `rng`, one row.

    stream   (N,) token ids, N > context + 2
    encode   text -> token ids;  decode: token ids -> text
    end      the id of <|endoftext|>

    A row comes as (tokens, counted): counted[i] is 0 where tokens[i] can't be known from what stands before it (the lists themselves, random
    tokens when they come for the first time), so that no training goes into guessing them. No row begins with <|endoftext|> because it is a
    drill: a model that could tell drills by that took every text behind it for one, at 0.5 bits per byte.
    """

    def __init__(
        self, stream: np.ndarray, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str], end: int, context: int
    ) -> None:
        if len(stream) <= context + 2:
            raise ValueError(f"drills of {context} tokens need a longer text than that; found {len(stream)} tokens")
        self.stream, self.encode, self.decode, self.end, self.context = stream, encode, decode, end, context

    def row(self, rng: np.random.Generator) -> Row:
        """45 % repeat, 40 % facts, 15 % recall."""
        chance = rng.random()
        return (self.repeat if chance < 0.45 else self.facts if chance < 0.85 else self.recall)(rng)

    def repeat(self, rng: np.random.Generator) -> Row:
        """A span of 8-80 tokens of a passage comes back again and again while the passage goes on; in 30 % the tokens are random ones."""
        length, needed = int(rng.integers(8, 81)), self.context + 1
        start = int(rng.integers(0, len(self.stream) - self.context - 2))
        if rng.random() < 0.3:
            length = int(rng.integers(6, 49))
            span = self._random_tokens(rng, length)
            tokens, counted, again = [], [], 0
            while len(tokens) < needed:
                between = self._random_tokens(rng, int(rng.integers(0, 20)))
                tokens += between + span
                counted += [0] * len(between) + [again] * length
                again = 1
            return tokens[:needed], counted[:needed]
        passage = self.stream[start : start + needed].tolist()
        begin = int(rng.integers(0, 60))
        span, tokens, position = passage[begin : begin + length], passage[: begin + length], begin + length
        while len(tokens) < needed:
            gap = int(rng.integers(4, 80))
            tokens += passage[position : position + gap] + span
            position += gap
        return tokens[:needed], [1] * needed

    def facts(self, rng: np.random.Generator) -> Row:
        """Two to six fields of a sentence in shuffled order, then the sentence; the next sentence, and so on."""
        tokens, counted = [], []
        for _ in range(_TRIES):
            sentences = self._sentences(rng)
            colon, comma, close = _pick(rng, _COLON), _pick(rng, _COMMA), _pick(rng, _CLOSE)
            for sentence in sentences[:4]:
                fields = _fields(rng, sentence)
                if len(fields) < 2:
                    continue
                rng.shuffle(fields)
                fields = fields[: int(rng.integers(2, 7))]
                text = comma.join(f"{key}{colon}{value}" for key, value in fields)
                # In 40 % the list is closed by <|endoftext|>, as data-to-text experiments with GPT-2 do it: the token that ends
                # every book must not teach the model to forget what stood before.
                if rng.random() < 0.4:
                    head, body = self.encode(text) + [self.end], self.encode(" " + sentence) + [self.end]
                else:
                    head, body = self.encode(text + close), self.encode(sentence + "\n")
                tokens += head + body
                counted += [0] * len(head) + [1] * len(body)
                if len(tokens) > self.context:
                    return tokens[: self.context + 1], counted[: self.context + 1]
        return self.repeat(rng)

    def recall(self, rng: np.random.Generator) -> Row:
        """Three to eight pairs of words, then the same pairs (or the second words alone) in another order."""
        tokens, counted = [], []
        for _ in range(_TRIES):
            words = [w.strip('.,;!?"()').lower() for s in self._sentences(rng) for w in s.split()]
            words = list(dict.fromkeys(w for w in words if len(w) > 3))
            count = int(rng.integers(3, 9))
            if len(words) < 2 * count:
                continue
            rng.shuffle(words)
            pairs = [(words[2 * i], words[2 * i + 1]) for i in range(count)]
            colon, comma, close = _pick(rng, _COLON), _pick(rng, _COMMA), _pick(rng, _CLOSE)
            head = self.encode(comma.join(a + colon + b for a, b in pairs) + close)
            tokens += head
            counted += [0] * len(head)
            rng.shuffle(pairs)
            if rng.random() < 0.5:
                for a, b in pairs:
                    key, value = self.encode(a + colon), self.encode(b + comma)
                    tokens += key + value
                    counted += [0] * len(key) + [1] * len(value)
            else:
                answer = self.encode(", ".join(b for _, b in pairs) + "\n")
                tokens += answer
                counted += [1] * len(answer)
            if len(tokens) > self.context:
                return tokens[: self.context + 1], counted[: self.context + 1]
        return self.repeat(rng)

    def _random_tokens(self, rng: np.random.Generator, count: int) -> list[int]:
        return self.stream[rng.integers(0, len(self.stream), count)].tolist()

    def _sentences(self, rng: np.random.Generator) -> list[str]:
        """The whole sentences of 5 to 32 words in the whole lines of a random window of 400 tokens."""
        window = min(400, len(self.stream) - 1)
        start = int(rng.integers(0, len(self.stream) - window))
        text = self.decode(self.stream[start : start + window].tolist())
        found = (s.strip() for line in text.split("\n")[1:-1] for s in _SENTENCE.findall(line))
        return [s for s in found if 5 <= len(s.split()) <= 32]


def _fields(rng: np.random.Generator, sentence: str) -> list[tuple[str, str]]:
    """(key, value) pairs: one per rule that finds something, and up to two whose key is the word in front of the value."""
    fields, used = [], set()
    for keys, pattern in _FIELDS:
        if hits := pattern.findall(sentence):
            value = _pick(rng, hits)
            if value not in used:
                used.add(value)
                fields.append((_pick(rng, keys), value))
    words = sentence.split()
    for _ in range(int(rng.integers(0, 3))):
        i = int(rng.integers(1, len(words)))
        value = " ".join(words[i : i + int(rng.integers(1, 4))]).strip(_EDGES)
        key = words[i - 1].strip(_EDGES).lower()
        if value and key and value not in used:
            used.add(value)
            fields.append((key, value))
    return fields


def _pick(rng: np.random.Generator, choices: Sequence):
    return choices[int(rng.integers(len(choices)))]
