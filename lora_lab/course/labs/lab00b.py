"""Lab 00b, A voice in a hundred steps: its exercise. The oracle adds up the bits of each token; it knows no formula."""

from __future__ import annotations

import math

import numpy as np

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script
from .formulas import first_match

# More bytes than characters, as in any text with a dash, a pound sign or an accent: else the two could not be told apart.
TEXTS = (
    "“Elementary,” said he — “£20 a naïve guess.”",
    "The door opened, and a tall man came in out of the rain.",
    "Zürich, 5 °C: ‘très désagréable’, said the café’s owner …",
)


def _bits_probe(rng):
    s = Script()
    for k, text in enumerate(TEXTS):
        tokens, loss = int(rng.integers(5, 19)), float(rng.uniform(2.0, 6.0))
        s.input(f"loss {k}", np.array(loss))
        s.input(f"tokens {k}", np.array(tokens))
        s.send(f"bits {k}", s.call(loss, tokens, text))
    return s


def _cases(inputs) -> list[tuple[float, int, str]]:
    return [(float(inputs[f"loss {k}"]), int(inputs[f"tokens {k}"]), text) for k, text in enumerate(TEXTS)]


def _judge(inputs, answers):
    for k, (loss, tokens, text) in enumerate(_cases(inputs)):
        # A token of probability p costs -log2 p bits; all of them together are spread over the bytes.
        cost = sum(-math.log2(math.exp(-loss)) for _ in range(tokens))
        problem = compare(
            answers[f"bits {k}"], cost / len(text.encode("utf-8")), what=f"bits_per_byte({loss:.3f}, {tokens}, {text!r})", rtol=1e-6
        )  # a float32 answer is a right answer
        if problem:
            return problem
    return None


_LN2 = math.log(2)
_MISTAKES = {
    "nats": ("loss * tokens / bytes", lambda L, n, c, b: L * n / b, "those are nats per byte; a bit is ln 2 nats, so divide by math.log(2)"),
    "times_ln2": (
        "loss * ln 2 * tokens / bytes", lambda L, n, c, b: L * _LN2 * n / b,
        "a nat is larger than a bit, so the number grows when nats become bits: divide by ln 2",
    ),
    "characters": (
        "the bits per character", lambda L, n, c, b: L / _LN2 * n / c,
        "in UTF-8 “, £ and é take more than one byte each: len(text) counts characters, len(text.encode()) bytes",
    ),
    "nats_characters": ("the nats per character", lambda L, n, c, b: L * n / c, "a bit is ln 2 nats, and UTF-8 has more bytes than characters"),
    "per_token": ("the bits per token", lambda L, n, c, b: L / _LN2, "the loss is a mean over tokens; their sum is spread over the bytes"),
    "sum_forgotten": ("loss / ln 2 / bytes", lambda L, n, c, b: L / _LN2 / b, "the loss is a mean over the tokens: multiply by their number first"),
    "upside_down": ("bytes and tokens exchanged", lambda L, n, c, b: L / _LN2 * b / n, "more bytes for the same tokens means fewer bits for each"),
    "log10": ("loss / ln 10 * tokens / bytes", lambda L, n, c, b: L / math.log(10) * n / b, "that counts decimal digits; bits have base 2"),
    "perplexity": ("exp(loss)", lambda L, n, c, b: math.exp(L), "that is the perplexity of a token"),
    "total": ("loss / ln 2 * tokens", lambda L, n, c, b: L / _LN2 * n, "those are the bits of the whole text; divide by its bytes"),
}


def _diagnose(evidence: list[Evidence]) -> Diagnosis | None:
    e = evidence[0]
    cases = _cases(e.inputs)
    found = [e.answers.get(f"bits {k}") for k in range(len(cases))]
    if any(not isinstance(value, (int, float, np.ndarray)) for value in found):
        return None
    wrong = {
        key: [formula(loss, tokens, len(text), len(text.encode("utf-8"))) for loss, tokens, text in cases]
        for key, (_, formula, _) in _MISTAKES.items()
    }
    key = first_match(found, wrong)
    if key is None:
        return None
    name, _, text = _MISTAKES[key]
    return Diagnosis(key, f"what you compute is {name}: {text}")


def _bits_per_byte(loss: float, tokens: int, text: str) -> float:
    return loss * tokens / math.log(2) / len(text.encode("utf-8"))


LAB = Lab(
    number="0b",
    name="00b_a_voice",
    title="A voice in a hundred steps",
    minutes=20,
    core=False,
    objectives=(
        "load a small GPT-2 and let it write",
        "measure how well it predicts a text, in bits per byte",
        "lend it an author's voice with LoRA, and say what that costs elsewhere",
        "turn that voice up, down and around",
    ),
    needs=("lab 00",),
    exercises=(
        Exercise(
            id="0b.1",
            title="Bits per byte",
            difficulty=1,
            minutes=4,
            points=1,
            name="bits_per_byte",
            cases=(Case("the bits of all tokens, spread over the bytes of the text", _bits_probe, _judge),),
            diagnose=_diagnose,
            hints=(
                "How many nats does the whole text cost, if each of its tokens costs `loss` on average?",
                "One bit is math.log(2) nats. And text.encode() is the text as bytes.",
                "loss * tokens nats in all; divide by math.log(2), then by len(text.encode()).",
            ),
            read="the paragraph on bits per byte above the exercise",
            fallback=lambda: _bits_per_byte,
        ),
    ),
    predictions=(
        Prediction(
            "0b.A",
            "After a hundred steps on Doyle, how does the model predict the ordinary book?",
            {"a": "better than before", "b": "the same, to 0.005 bits", "c": "worse than before"},
        ),
        Prediction(
            "0b.B",
            "Of these volumes, at which one is Doyle predicted best?",
            {"a": "below 1", "b": "at 1, as it was trained", "c": "above 1"},
        ),
    ),
)
