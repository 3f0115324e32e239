"""Lab 00, Start here: its exercise. The oracle counts the entries of two matrices; it knows no formula."""

from __future__ import annotations

import numpy as np

from lora_lab.counting import lora_parameters

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, compare
from ..script import Script
from .formulas import first_match


def _sizes_probe(*sizes: tuple[int, int, int]):
    """Fixed sizes first, then two drawn ones, so that an answer for one layer does not pass."""

    def probe(rng):
        s = Script()
        drawn = [tuple(int(v) for v in (rng.integers(20, 900), rng.integers(20, 900), rng.integers(2, 19))) for _ in range(2)]
        for k, (d_in, d_out, r) in enumerate([*sizes, *drawn]):
            s.input(f"sizes {k}", np.array([d_in, d_out, r]))
            s.send(f"count {k}", s.call(d_in, d_out, r))
        return s

    return probe


def _cases(inputs) -> list[tuple[int, int, int]]:
    return [tuple(int(v) for v in inputs[f"sizes {k}"]) for k in range(len(inputs))]


def _judge(inputs, answers):
    for k, (d_in, d_out, r) in enumerate(_cases(inputs)):
        expected = np.zeros((r, d_in)).size + np.zeros((d_out, r)).size
        problem = compare(answers[f"count {k}"], expected, what=f"adapter_size({d_in}, {d_out}, r={r})", rtol=0)
        if problem:
            return problem
    return None


_MISTAKES = {
    "product": ("r * (d_in * d_out)", lambda i, o, r: r * i * o, "the sizes of A and B are added: A has r rows of d_in, B has d_out rows of r"),
    "full_matrix": ("d_in * d_out", lambda i, o, r: i * o, "that is the whole weight matrix; the adapter holds A and B instead"),
    "only_A": ("r * d_in", lambda i, o, r: r * i, "that is A alone; B, with its d_out rows of r, is missing"),
    "only_B": ("r * d_out", lambda i, o, r: r * o, "that is B alone; A, with its r rows of d_in, is missing"),
    "square": ("2 * r * d_in", lambda i, o, r: 2 * r * i, "right for a square layer (the paper's 2 d r), but here d_in and d_out differ"),
    "square_out": ("2 * r * d_out", lambda i, o, r: 2 * r * o, "right for a square layer (the paper's 2 d r), but here d_in and d_out differ"),
    "with_bias": ("r * (d_in + d_out) + d_out", lambda i, o, r: r * (i + o) + o, "the bias belongs to the frozen layer; the adapter has none"),
    "with_base": ("d_in * d_out + r * (d_in + d_out)", lambda i, o, r: i * o + r * (i + o), "the pretrained matrix is counted too; asked is what is trained"),
    "with_core": ("r * (d_in + d_out) + r * r", lambda i, o, r: r * (i + o) + r * r, "there is no r x r matrix between A and B"),
    "no_rank": ("d_in + d_out", lambda i, o, r: i + o, "that is the size for r = 1; both factors grow with r"),
    "twice": ("2 * r * (d_in + d_out)", lambda i, o, r: 2 * r * (i + o), "each factor is counted twice"),
    "B_without_r": ("r * d_in + d_out", lambda i, o, r: r * i + o, "A is right; B has d_out rows of r numbers each"),
    "A_without_r": ("d_in + r * d_out", lambda i, o, r: i + r * o, "B is right; A has r rows of d_in numbers each"),
    "sum_of_all": ("d_in + d_out + r", lambda i, o, r: i + o + r, "a matrix has rows times columns entries, not rows plus columns"),
}


def _diagnose(evidence: list[Evidence]) -> Diagnosis | None:
    e = evidence[0]
    cases = _cases(e.inputs)
    found = [e.answers.get(f"count {k}") for k in range(len(cases))]
    if any(not isinstance(value, (int, float, np.ndarray)) for value in found):
        return None
    key = first_match(found, {key: [count(*sizes) for sizes in cases] for key, (_, count, _) in _MISTAKES.items()})
    if key is None:
        return None
    formula, _, text = _MISTAKES[key]
    return Diagnosis(key, f"what you compute is {formula}: {text}")


LAB = Lab(
    number="0",
    name="00_start_here",
    title="Start here",
    minutes=15,
    core=True,
    objectives=(
        "say what an adapter adds to a model, and turn its volume up and down",
        "know that this machine is ready",
        "train a LoRA adapter on real data and read its loss curve",
        "use the lab's checks, hints and predictions",
    ),
    needs=("a little Python",),
    exercises=(
        Exercise(
            id="0.1",
            title="How large is an adapter?",
            difficulty=1,
            minutes=3,
            points=1,
            name="adapter_size",
            cases=(Case("as many numbers as A and B have entries", _sizes_probe((64, 10, 4), (7, 11, 3)), _judge),),
            diagnose=_diagnose,
            hints=(
                "Draw the two matrices. A takes d_in numbers in and gives r numbers out.",
                "A is r by d_in, B is d_out by r. How many entries has each?",
                "r * d_in for A, d_out * r for B, and the adapter is both.",
            ),
            read="the sketch of A and B above the exercise",
            fallback=lambda: lora_parameters,
        ),
    ),
    predictions=(
        Prediction(
            "0.A",
            "The model reads upright digits. Turn every image by 90 degrees. What happens to its accuracy, before any training?",
            {"a": "it hardly changes", "b": "it falls to about half", "c": "it falls to about chance, one in ten"},
        ),
    ),
)
