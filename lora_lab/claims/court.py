"""The court: what a claim is, what a finding is, and the rule that makes a verdict of numbers. It knows no LoRA."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

from ..files import shipped

# name -> title. Each has a file of experiments of that name here.
GROUPS = {
    "what": "What LoRA is",
    "cost": "What it costs",
    "start": "Where it starts",
    "training": "Training",
    "merging": "Merging",
    "code": "Code as printed",
    "comparisons": "Comparisons",
    "paper": "The paper's own figures",
}
# "unsettled": the seeds of one condition disagree.
VERDICTS = ("true", "false", "depends", "unsettled")


def decide(measured: Mapping[str, Sequence[float]], line: float, holds: str) -> str:
    """The verdict on a claim that holds where a number lies above (or below) the line.

    measured   condition -> one number per seed          holds   "above" or "below"; a number on the line speaks against the claim

    "true" if every number speaks for the claim, "false" if none does, "depends" if conditions disagree and each agrees with itself,
    "unsettled" if the seeds of any condition disagree. Raises ValueError where there is nothing to judge: no number, a NaN.

    >>> decide({"merged": [0.0, 0.0], "apart": [2.1, 2.1]}, 1.0, "below")
    'depends'
    """
    if holds not in ("above", "below"):
        raise ValueError(f'a claim holds "above" or "below" its line; found {holds!r}')
    if not measured or any(len(numbers) == 0 for numbers in measured.values()):
        raise ValueError(f"a verdict needs at least one number for each condition; found {dict(measured)}")
    if not all(math.isfinite(number) for numbers in (*measured.values(), [line]) for number in numbers):
        raise ValueError(f"a number that is NaN or infinite decides nothing; found {dict(measured)}, line {line}")
    said = {name: {(number > line) if holds == "above" else (number < line) for number in numbers} for name, numbers in measured.items()}
    if any(len(votes) == 2 for votes in said.values()):
        return "unsettled"
    votes = set().union(*said.values())
    return "depends" if len(votes) == 2 else "true" if votes == {True} else "false"


@dataclass(frozen=True)
class Finding:
    """What an experiment measured.

    measured   condition -> one number per seed (one number where there is nothing random)
    line       where the claim begins to hold; holds: "above" or "below" it
    what       the quantity with its unit, for the axis
    note       what was seen on the way, one sentence: an error message, a text that a model wrote
    curves     name -> numbers, where a picture of the run says more than its end
    """

    measured: Mapping[str, Sequence[float]]
    line: float
    holds: str
    what: str
    note: str = ""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return decide(self.measured, self.line, self.holds)

    @property
    def means(self) -> dict[str, float]:
        return {name: sum(numbers) / len(numbers) for name, numbers in self.measured.items()}


@dataclass(frozen=True)
class Claim:
    """One entry of data/claims.yaml.

    id         also the name of its experiment, with _ for -           numbers   those of the sentences it decides, in docs/claims.md
    says       the claim, as a reader meets it                         source    who says so
    verdict    what our runs say; bands: condition -> (low, found, high) of what they measure
    otherwise  the world in which the same experiment decides the other way
    correct    the sentence that is true; {0}, {1} stand for what was measured, in the order of the conditions
    vote       the number of its prediction in the lab; "" where it is not called there
    """

    id: str
    numbers: tuple[int, ...]
    group: str
    source: str
    says: str
    verdict: str
    bands: Mapping[str, tuple[float, float, float]]
    otherwise: str
    correct: str
    vote: str = ""

    def corrected(self, means: Mapping[str, float] | None = None) -> str:
        """The true sentence, with the numbers of a run, or those on record."""
        means = means or {name: found for name, (_, found, _) in self.bands.items()}
        return self.correct.format(*(means[name] for name in self.bands))

    def experiment(self, otherwise: bool = False) -> Finding:
        """Run it: in our world, or in the one where the claim would hold (or, of a true claim, would not)."""
        module = importlib.import_module(f"{__package__}.{self.group}")
        with _own_dice():
            return getattr(module, self.id.replace("-", "_"))(otherwise)

    def complaints(self, found: Finding) -> list[str]:
        """How a run differs from what is on record; empty if it does not."""
        told = [f"the verdict is {found.verdict!r}, on record is {self.verdict!r}"] if found.verdict != self.verdict else []
        if list(found.measured) != list(self.bands):
            return [*told, f"measured were {', '.join(found.measured)}; on record are {', '.join(self.bands)}"]
        for name, (low, _, high) in self.bands.items():
            told += [f"{name}: {n:.6g} lies outside of {low:g} to {high:g}" for n in found.measured[name] if not low <= n <= high]
        return told


@cache
def _data() -> dict:
    import yaml

    # libyaml where PyYAML was built with it: ten times as fast
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with open(shipped("") / "claims.yaml", encoding="utf-8") as file:
        return yaml.load(file, Loader=loader)


@cache
def load() -> dict[str, Claim]:
    """All claims by id, in the order of the file. Raises ValueError, naming the claim, for an entry that is not whole."""
    claims = {}
    for entry in _data()["claims"]:
        try:
            bands = {str(name): tuple(float(n) for n in band) for name, band in entry["bands"].items()}
            claim = Claim(**{**entry, "numbers": tuple(entry.get("numbers", ())), "verdict": str(entry["verdict"]).lower(), "bands": bands})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"data/claims.yaml, claim {entry.get('id', entry)!r}: {type(error).__name__}: {error}") from None
        wrong = (
            f"a second claim {claim.id!r}" if claim.id in claims
            else f"group {claim.group!r} is not one of {', '.join(GROUPS)}" if claim.group not in GROUPS
            else f"verdict {claim.verdict!r} is not one of {', '.join(VERDICTS)}" if claim.verdict not in VERDICTS
            else "a band is [low, found, high]" if any(len(b) != 3 or not b[0] <= b[1] <= b[2] for b in bands.values()) or not bands
            else ""
        )  # fmt: skip
        if wrong:
            raise ValueError(f"data/claims.yaml, claim {claim.id!r}: {wrong}")
        claims[claim.id] = claim
    return claims


def find(id: str) -> Claim:
    """The claim of this id. Raises KeyError with the ids that there are."""
    if id not in load():
        raise KeyError(f"there is no claim {id!r}; there are {', '.join(load())}")
    return load()[id]


def elsewhere() -> list[dict]:
    """Sentences that are decided in other labs, or nowhere yet: dicts with number, source, says, and lab and section, or open (why)."""
    return list(_data()["elsewhere"])


def trial(id: str) -> tuple[Finding, Finding]:
    """(our world, the other world) of a claim's experiment."""
    claim = find(id)
    return claim.experiment(), claim.experiment(otherwise=True)


def hold(ids: Sequence[str] | None = None) -> Iterator[tuple[Claim, Finding, Finding, float]]:
    """Run claims one after another (None: all): the claim, both findings, the seconds of processor time."""
    import time

    for id in ids or load():
        began = time.process_time()
        ours, otherwise = trial(id)
        yield find(id), ours, otherwise, time.process_time() - began


@contextmanager
def _own_dice():
    """An experiment seeds torch as it likes; the reader's own random numbers go on afterwards as if nothing had been."""
    import torch

    with torch.random.fork_rng(devices=[]):
        yield
