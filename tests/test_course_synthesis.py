"""explain: finds the formula that made the numbers, and says nothing rather than something false."""

import doctest
from itertools import product

import numpy as np
import pytest

from lora_lab.course import synthesis
from lora_lab.course.synthesis import Probe, explain

NAMES = ("W0x", "BAx", "ABx", "b")


def probes(formula, dtype=np.float64, settings=((3, 5.0), (2, 7.0)), noise=0.0, extra=None):
    """formula(bases, r, alpha) -> values, in two settings that keep r, alpha and alpha / r apart."""
    rng, made = np.random.default_rng(0), []
    for r, alpha in settings:
        bases = {name: rng.normal(size=(5, 11)).astype(dtype) for name in NAMES}
        if extra:
            bases |= extra(bases)
        values = formula(bases, r, alpha)
        values = (values + noise * rng.normal(size=np.shape(values))).astype(dtype)
        known = {"alpha": alpha, "alpha/r": alpha / r, "r": float(r), "1/r": 1 / r, "r/alpha": r / alpha, "alpha/√r": alpha / r**0.5}
        made.append(Probe(values, bases, known))
    return made


FORMULAS = {
    "W0x + (alpha/r)·BAx": lambda s, r, a: s["W0x"] + a / r * s["BAx"],
    "2·W0x + alpha·BAx": lambda s, r, a: 2 * s["W0x"] + a * s["BAx"],
    "W0x − (alpha/√r)·ABx": lambda s, r, a: s["W0x"] - a / r**0.5 * s["ABx"],
    "−W0x": lambda s, r, a: -s["W0x"],
    "W0x + BAx + 2·b": lambda s, r, a: s["W0x"] + s["BAx"] + 2 * s["b"],
    "(1/2)·W0x + (r/alpha)·BAx − r·b": lambda s, r, a: s["W0x"] / 2 + r / a * s["BAx"] - r * s["b"],
    "0": lambda s, r, a: 0 * s["b"],
    "W0x + 0.7·BAx": lambda s, r, a: s["W0x"] + 0.7 * s["BAx"],
}


@pytest.mark.parametrize(("text", "dtype"), list(product(FORMULAS, (np.float64, np.float32))))
def test_it_finds_the_formula(text, dtype):
    found = explain(probes(FORMULAS[text], dtype))
    assert found.text == text
    assert found.named == ("0.7" not in text)


def test_the_terms_can_be_read_by_a_program():
    found = explain(probes(FORMULAS["W0x + 0.7·BAx"]))
    assert found.coefficients == {"W0x": "1", "BAx": None} and found.terms[1].value == pytest.approx(0.7, rel=1e-9)


@pytest.mark.parametrize("formula", [
    lambda s, r, a: np.tanh(s["W0x"]),
    lambda s, r, a: s["W0x"] * s["BAx"],
    lambda s, r, a: s["W0x"] + np.nan,
    lambda s, r, a: np.where(s["b"] > 2, np.inf, s["W0x"]),
    lambda s, r, a: (s["W0x"] + s["BAx"])[:, :4],
    lambda s, r, a: s["W0x"] + s["BAx"] + s["ABx"] + s["b"],                    # four terms, three allowed
])
def test_what_it_cannot_explain_it_leaves(formula):
    assert explain(probes(formula)) is None


def test_noise_is_no_formula():
    assert explain(probes(FORMULAS["W0x + (alpha/r)·BAx"], noise=1e-6)) is None
    assert explain(probes(FORMULAS["W0x + (alpha/r)·BAx"], noise=1e-12)) is not None


def test_a_coefficient_must_have_the_same_name_in_every_probe():
    """With r=2 and alpha=4, 2 is alpha/r, r and 2: one probe cannot tell, so no name is given."""
    def formula(s, r, a):
        return s["W0x"] + a / r * s["BAx"]

    assert explain(probes(formula, settings=((2, 4.0),))).coefficients == {"W0x": "1", "BAx": None}
    assert explain(probes(formula, settings=((2, 4.0), (3, 5.0)))).coefficients == {"W0x": "1", "BAx": "alpha/r"}
    assert explain(probes(lambda s, r, a: s["W0x"] + 2 * s["BAx"], settings=((2, 4.0), (3, 5.0)))).coefficients["BAx"] == "2"


def test_parallel_bases_give_no_false_name():
    def twin(bases):
        return {"twin": bases["BAx"].copy()}

    def nearly(bases):
        return {"nearly": bases["BAx"] + 1e-12 * bases["b"]}

    def double(bases):
        return {"double": 2 * bases["BAx"]}

    right = FORMULAS["W0x + (alpha/r)·BAx"]
    assert explain(probes(right, extra=twin)) is None                  # BAx or its twin?
    assert explain(probes(right, extra=nearly)) is None
    assert explain(probes(right, extra=double)).text == "W0x + (alpha/r)·BAx"      # half of alpha/r has no name
    assert explain(probes(lambda s, r, a: 3 * s["W0x"], extra=twin)).text == "3·W0x"


def test_the_tiny_difference_of_two_bases_explains_nothing():
    rng = np.random.default_rng(0)
    base, other = rng.normal(size=(5, 11)), rng.normal(size=(5, 11))
    assert explain(Probe(base + 1e-5 * other, {"one": base, "two": base + 1e-9 * other})) is None      # (1 - 1e4)·one + 1e4·two


def test_bases_that_cannot_matter_are_left_out():
    extra = {"zero": lambda s: np.zeros((5, 11)), "small": lambda s: np.ones(3), "nan": lambda s: s["b"] * np.nan}
    found = explain(probes(FORMULAS["W0x + (alpha/r)·BAx"], extra=lambda s: {name: make(s) for name, make in extra.items()}))
    assert found.text == "W0x + (alpha/r)·BAx"


def test_few_numbers_prove_nothing():
    rng = np.random.default_rng(0)
    bases = {name: rng.normal(size=3) for name in NAMES}
    assert explain(Probe(rng.normal(size=3), bases)) is None
    assert explain(Probe(rng.normal(size=1), {"a": np.ones(1)})) is None
    assert explain([]) is None


def test_it_is_fast_with_many_bases():
    import time

    many = probes(FORMULAS["W0x + BAx + 2·b"], extra=lambda s: {f"n{n}": np.random.default_rng(n).normal(size=(5, 11)) for n in range(10)})
    start = time.monotonic()
    assert explain(many).text == "W0x + BAx + 2·b"
    assert time.monotonic() - start < 2.0      # 470 subsets, about 0.05 s; the rest is for a busy machine


def test_the_docstring_example():
    assert doctest.testmod(synthesis).failed == 0
