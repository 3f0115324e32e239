"""What was run and what is claimed, in one object; and an audit that lists what a strict examiner would object to.

    evidence = Evidence(data=parts.card(), choice={"r": 4, "alpha": 8, "targets": "all"})
    evidence.add("LoRA", 1.43, part="validation", digest=..., seed=0, lr=4e-3, r=4, alpha=8, targets="all", steps=30)
    evidence.claim("r", r=4, instead_of=16, says="no worse", margin=0.01, because="...")
    audit(evidence)                  a list of `Objection`; empty if there is nothing to object to

The audit reads the runs, never what the report says about them: which rate was best, which seeds there are, what the difference is, all is
found again from single runs. Whether these took place it can't know; `Study.recheck` runs one of them again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from ..comparing import interval
from ..files import atomic_write

LORA, FULL, FROZEN, CONTROL = "LoRA", "full fine-tuning", "frozen base", "control"
KNOBS = ("r", "alpha", "targets")
SAYS = ("better", "no worse", "not shown")
SEEDS = 3  # the fewest with which a spread is more than a difference
RATES, APART, SPAN = 3, 1.4, 4.0  # rates of a grid: how many, by which factor neighbours differ, and the ends
SHARED = 0.02  # of held-out 5-grams: six times what different stories of one author share by nature
SAME = 1e-12  # relative; two trainings with different dice never agree to this, two copies of a number always


@dataclass(frozen=True)
class Run:
    """One model scored once. Lower scores are better (bits per byte).

    way       "LoRA", "full fine-tuning", "frozen base", "control" (LoRA on shuffled text), or the name of a predictor without a model: "unigram"
    part      "validation" or "test"; digest: of the texts that were scored
    settings  r, alpha, targets, steps, ...; without the learning rate, which is `lr` (None where nothing trains)
    look      number of the look at the test part that this run belongs to; 0 on validation
    seconds   of the clock that training and scoring took, where it was measured
    """

    way: str
    part: str
    score: float
    digest: str
    seed: int | None = None
    lr: float | None = None
    settings: Mapping = field(default_factory=dict)
    look: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Claim:
    """A sentence that the runs must carry.

    about   "r", "alpha", "targets" or "way"
    this, that   what is compared: settings without the rate, and "way" where it is not LoRA
    says    "better": this scores lower than that. "no worse": not higher by `margin` or more. "not shown": the runs do not tell them apart
    part    where it was found out; a knob is decided on validation
    because the defence, a sentence or more
    """

    about: str
    this: Mapping
    that: Mapping
    says: str
    because: str = ""
    margin: float | None = None
    part: str = "validation"


@dataclass(frozen=True)
class Objection:
    """What an examiner would say. key: for tests and counts; text: what was found and what to do."""

    key: str
    text: str

    def __str__(self) -> str:
        return f"[{self.key}] {self.text}"


@dataclass
class Evidence:
    """Runs, claims, the choice they defend, and the looks at the test part.

    data     what `Parts.card()` says, and "answers" to the questions of licence and people; "scored": bytes scored of each held-out part;
             "machine": where it ran; "no full fine-tuning": why it was left out, if so, as `study.evidence.data["no full fine-tuning"] = "..."`
    choice   r, alpha and targets of the adapter that is handed in
    looks    one entry for each time that test scores were made: {"time", "settings"}
    """

    data: Mapping = field(default_factory=dict)
    choice: Mapping = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    looks: list[Mapping] = field(default_factory=list)

    def add(
        self, way: str, score: float, *, part: str, digest: str, seed: int | None = None, lr: float | None = None, look: int = 0,
        seconds: float | None = None, **settings,
    ) -> Run:  # fmt: skip
        """Record one run; a run that is there already, in everything, is not recorded again. Raises ValueError for an unknown part."""
        if part not in ("validation", "test"):
            raise ValueError(f"a run is scored on validation or on test; found {part!r}")
        run = Run(way, part, float(score), digest, seed, lr, settings, look, seconds)
        if not any(_same_run(run, other) for other in self.runs):
            self.runs.append(run)
        return run

    def claim(
        self, about: str, this, instead_of, says: str, because: str = "", margin: float | None = None, part: str = "validation"
    ) -> Claim:
        """Claim something of a knob of the choice, all else as in the choice; or, about "way", of one way against another.

            claim("r", 4, instead_of=16, says="no worse", margin=0.01, because="a quarter of the file, ...")
            claim("way", "LoRA", instead_of="frozen base", says="better", part="test", because="...")

        With r, alpha follows so that alpha / r stays the choice's, if runs exist like that. A dict in place of a value gives all settings.
        Raises ValueError for an unknown `about` or `says`, and before a choice is made.
        """
        if about not in (*KNOBS, "way"):
            raise ValueError(f"a claim is about {', '.join(KNOBS)} or way; found {about!r}")
        if says not in SAYS:
            raise ValueError(f"a claim says {', '.join(SAYS)}; found {says!r}")
        if not self.choice:
            raise ValueError("make the choice first: evidence.choice = {'r': ..., 'alpha': ..., 'targets': ...}")
        claim = Claim(about, self._side(about, this), self._side(about, instead_of), says, because, margin, part)
        self.claims = [c for c in self.claims if (c.about, c.this, c.that, c.part) != (claim.about, claim.this, claim.that, claim.part)]
        self.claims.append(claim)
        return claim

    def _side(self, about: str, value) -> dict:
        if isinstance(value, Mapping):
            return dict(value)
        if about == "way":
            return {"way": value} | (dict(self.choice) if value in (LORA, CONTROL) else {})
        found = {**self.choice, about: value}
        if about == "r" and not self.of({**found}):
            found["alpha"] = self.choice["alpha"] / self.choice["r"] * value
        return found

    # ---- what the runs say ----

    def of(self, side: Mapping, part: str = "validation") -> list[Run]:
        """The runs of one side of a claim: LoRA, unless it names another way, with all settings that it names."""
        way = side.get("way", LORA)
        wanted = {key: value for key, value in side.items() if key not in ("way", "lr")}
        fits = (run for run in self.runs if run.part == part and run.way == way)
        return [run for run in fits if all(_equal(run.settings.get(key), value) for key, value in wanted.items())]

    def settings(self) -> list[dict]:
        """The LoRA settings with runs on validation, as sides, in the order in which they ran."""
        found: list[dict] = []
        for run in self.runs:
            if run.way == LORA and run.part == "validation":
                side = {knob: run.settings.get(knob) for knob in KNOBS}
                if not any(_matches(side, other) for other in found):
                    found.append(side)
        return found

    def rates(self, side: Mapping) -> dict[float, dict[int, float]]:
        """rate -> {seed: validation score}, by rate. A score that is nan counts as infinite: the run diverged."""
        found: dict[float, dict[int, float]] = {}
        for run in self.of(side):
            if run.lr is not None:
                found.setdefault(run.lr, {})[run.seed] = _finite(run.score)
        return dict(sorted(found.items()))

    def tuned(self, side: Mapping) -> float | None:
        """The rate that is best on the seeds that all its rates have run with; None where nothing was run, or no seed is common."""
        rates = self.rates(side)
        common = set.intersection(*map(set, rates.values())) if rates else set()
        return min(rates, key=lambda rate: mean(rates[rate][seed] for seed in common)) if common else None

    def values(self, side: Mapping, part: str = "validation") -> dict[int | None, float]:
        """{seed: score} at the tuned rate; {None: score} where nothing trains."""
        runs = self.of(side, part)
        rate = self.tuned(side)
        return {run.seed: _finite(run.score) for run in runs if run.lr is None or rate is None or run.lr == rate}

    def difference(self, this: Mapping, that: Mapping, part: str = "validation") -> tuple[float, float]:
        """(mean of this - that, half-width of its 95 % interval by Student's t), seed by seed; a side without seeds counts for all of them.

        The half-width is nan with fewer than two seeds, both are nan without any.
        """
        a, b = self.values(this, part), self.values(that, part)
        if set(b) == {None}:
            pairs = [value - b[None] for value in a.values()]
        elif set(a) == {None}:
            pairs = [a[None] - value for value in b.values()]
        else:
            pairs = [a[seed] - b[seed] for seed in a if seed in b]
        return interval(pairs)

    # ---- on disk ----

    def save(self, path: str | os.PathLike) -> Path:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, default=list) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Evidence:
        """What `save` wrote. Raises ValueError for a file that is something else."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            runs = [Run(**run) for run in found.pop("runs")]
            claims = [Claim(**claim) for claim in found.pop("claims")]
            return cls(runs=runs, claims=claims, **found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no evidence file ({type(error).__name__}: {error}); Evidence.save writes one") from error


def _same_run(a: Run, b: Run) -> bool:
    return (a.way, a.part, a.digest, a.seed, a.lr, a.look) == (b.way, b.part, b.digest, b.seed, b.lr, b.look) and (
        dict(a.settings) == dict(b.settings) and _finite(a.score) == _finite(b.score)
    )


def _finite(score: float) -> float:
    return score if math.isfinite(score) else math.inf


def _equal(a, b) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9)
    return (list(a) if isinstance(a, (tuple, list)) else a) == (list(b) if isinstance(b, (tuple, list)) else b)


# ---- the audit --------------------------------------------------------------------------------------------------------------------------


def audit(evidence: Evidence) -> list[Objection]:
    """Everything that a strict examiner would object to, in the order of a report: data, runs, tuning, claims, test."""
    found: dict[str, Objection] = {}
    for rule in (_data, _floors, _control, _choice, _sides, _claims, _test):
        for key, text in rule(evidence):
            found.setdefault(text, Objection(key, text))
    return list(found.values())


def _told(side: Mapping) -> str:
    way = side.get("way", LORA)
    settings = ", ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in side.items() if key != "way")
    return f"{way} ({settings})" if settings else way


def _data(e: Evidence) -> Iterator[tuple[str, str]]:
    parts = e.data.get("parts", {})
    missing = [part for part in ("train", "validation", "test") if not parts.get(part, {}).get("digest")]
    if missing:
        yield "no_data_card", f"the evidence says nothing of the {', '.join(missing)} part: give data=parts.card()"
    digests = {part: card.get("digest") for part, card in parts.items()}
    if len(set(digests.values())) < len(digests):
        yield "same_part", f"two parts are one and the same text (digests {digests}): split by document"
    shared = e.data.get("overlap") or {}
    n = shared.get("n")
    measured = {part: shared[part] for part in ("validation", "test") if isinstance(shared.get(part), (int, float)) and math.isfinite(shared[part])}
    if len(measured) < 2 or not isinstance(n, int) or not 3 <= n <= 8:
        yield "overlap_unmeasured", "what train shares with validation and test was not counted by runs of 3 to 8 words: longer ones find nothing but copies"
    for part, share in measured.items():
        if share > SHARED:
            yield "overlap", f"{share:.1%} of the {part} part's {n}-grams stand in the training part, more than {SHARED:.0%}: split by document or group"
    from .texts import open_questions

    if left := open_questions(e.data.get("answers")):
        yield "questions", f"not answered before training: {', '.join(left)}"
    for part in ("validation", "test"):
        used = {run.digest for run in e.runs if run.part == part}
        if used and digests.get(part) and used != {digests[part]}:
            yield "other_data", f"runs on {part} were scored on other texts ({', '.join(sorted(used))}) than the data card names ({digests[part]})"
    scores: dict[str, set[float]] = {}
    for run in e.runs:
        if run.part == "validation":
            scores.setdefault(f"{run.way}, {dict(run.settings)}, rate {run.lr}, seed {run.seed}", set()).add(_finite(run.score))
    for name, different in scores.items():
        if len(different) > 1:
            yield "two_scores", f"{name} has {len(different)} different scores: a run that was repeated until it came out well? Keep the first"
    same = {run.digest for run in e.runs if run.part == "test"} & {run.digest for run in e.runs if run.part == "validation"}
    if same:
        yield "same_part", f"texts {', '.join(sorted(same))} were scored as validation and as test: one of the two is not held back"


def _floors(e: Evidence) -> Iterator[tuple[str, str]]:
    ways = {run.way for run in e.runs if run.part == "validation" and math.isfinite(run.score)}
    if FROZEN not in ways:
        yield "no_floor", "the frozen base was not scored on validation: without it nobody knows what LoRA added"
    if not ways - {LORA, FULL, FROZEN, CONTROL}:
        yield "no_baseline", "no predictor without a model beside it: a unigram or bigram of the training text takes a second"
    reason = str(e.data.get("no full fine-tuning", ""))
    if FULL not in ways and len(reason.split()) < 3:
        yield "no_full", "full fine-tuning is missing, and data['no full fine-tuning'] does not say why: run it, or say what it would have taken"
    if FULL in ways:
        yield from _tuning(e, {"way": FULL})
        mine = [{k: v for k, v in run.settings.items() if k not in KNOBS} for run in e.of(e.choice)[:1]] if e.choice else []
        if mine and any(not _equal(run.settings.get(k), v) for run in e.of({"way": FULL}) for k, v in mine[0].items()):
            yield "floor_differs", f"full fine-tuning had another budget than the choice ({mine[0]}): a rival that trains less is no rival"


def _control(e: Evidence) -> Iterator[tuple[str, str]]:
    runs = e.of({"way": CONTROL})
    frozen = e.values({"way": FROZEN})
    if not runs:
        yield "no_control", "the control is missing: the same adapter trained on shuffled text must not improve on the frozen base"
        return
    rate, mine = e.tuned(e.choice), e.of(e.choice)
    # A control that trained less, or more gently, proves nothing by failing.
    settings = {key: value for run in mine for key, value in run.settings.items() if run.lr == rate}
    like = [run for run in runs if run.lr == rate and all(_equal(run.settings.get(k), v) for k, v in settings.items())]
    if e.choice and not like:
        yield "control_differs", f"the control was not trained like the choice ({_told({**settings, 'lr': rate})}): its failing says nothing"
    elif frozen:
        score = mean(_finite(run.score) for run in like or runs)
        if score < min(frozen.values()):
            yield "control_improves", (
                f"trained on shuffled text the adapter scores {score:.4f}, better than the frozen base's {min(frozen.values()):.4f}: part of the gain is not "
                "what you say it is (word counts, for instance)"
            )


def _choice(e: Evidence) -> Iterator[tuple[str, str]]:
    lacking = [knob for knob in KNOBS if knob not in e.choice]
    if lacking:
        yield "no_choice", f"the choice does not name {', '.join(lacking)}"
        return
    if not e.of(e.choice):
        yield "choice_not_run", f"the choice, {_told(e.choice)}, was never run on validation"
        return
    mine = e.values(e.choice)
    if not mine:
        return
    for side in e.settings():
        scores = e.values(side)
        common = [seed for seed in mine if seed in scores]
        lower = len(common) >= 2 and mean(scores[s] for s in common) < mean(mine[s] for s in common)
        if lower and not any(_matches(c.that, side) and _matches(c.this, e.choice) and c.says in ("no worse", "not shown") for c in e.claims):
            gap = mean(mine[s] - scores[s] for s in common)
            yield "not_the_best", (
                f"on validation {_told(side)} is better than the choice by {gap:.4f}, and no claim says why it was not taken: a claim of 'no worse' "
                "with a margin, or 'not shown', would"
            )


def _matches(side: Mapping, settings: Mapping) -> bool:
    return side.get("way", LORA) == settings.get("way", LORA) and all(_equal(settings.get(knob), side.get(knob)) for knob in KNOBS)


def _sides(e: Evidence) -> Iterator[tuple[str, str]]:
    """Tuning and seeds of the choice and of every LoRA setting that a claim rests on."""
    sides = [dict(e.choice)] if e.choice else []
    for claim in e.claims:
        for side in (claim.this, claim.that):
            if side.get("way", LORA) == LORA and e.of(side):
                sides.append({key: value for key, value in side.items() if key != "way"})
    done: list[dict] = []
    for side in sides:
        if side in done or not e.of(side):
            continue
        done.append(side)
        yield from _tuning(e, side)


def _tuning(e: Evidence, side: Mapping) -> Iterator[tuple[str, str]]:
    told, rates = _told(side), e.rates(side)
    if not rates:
        yield "rate_untuned", f"{told}: no learning rate is recorded"
        return
    common = set.intersection(*map(set, rates.values()))
    apart: list[float] = []
    for rate in rates:
        if not apart or rate >= APART * apart[-1]:
            apart.append(rate)
    if len(apart) < RATES or max(rates) < SPAN * min(rates):
        yield "rate_untuned", (
            f"{told}: tried at {_list(rates)}; asked are {RATES} rates for this very setting, a factor of {APART:g} apart or more, and of {SPAN:g} from end "
            "to end"
        )
        return
    if not common:
        yield "rate_untuned", f"{told}: its rates share no seed, so that luck and rate can't be told apart"
        return
    best = e.tuned(side)
    if best in (min(rates), max(rates)):
        end = "lowest" if best == min(rates) else "highest"
        yield "rate_at_edge", f"{told}: {best:g} is the {end} rate of {_list(rates)}, the best may lie beyond: extend the grid"
    others = {rate: seeds for rate, seeds in rates.items() if len(seeds) > len(rates[best])}
    if others:
        yield "not_the_tuned_rate", f"{told}: more seeds were run at {_list(others)} than at {best:g}, which is the best where they can be compared"
    yield from _seeds(told, rates[best])


def _seeds(told: str, scores: Mapping) -> Iterator[tuple[str, str]]:
    real = [seed for seed in scores if seed is not None]
    if len(real) < SEEDS:
        yield "few_seeds", f"{told}: {len(real)} seed(s) at its rate, asked are {SEEDS}"
    values = sorted(scores.values())
    if any(math.isfinite(b) and abs(a - b) <= SAME * abs(b) for a, b in zip(values, values[1:], strict=False)):
        yield "copied_seeds", f"{told}: two seeds have the same score to the last digit; was the seed used, or one run entered twice?"
    if any(map(math.isinf, values)):
        yield "diverged", f"{told}: {sum(map(math.isinf, values))} of its runs diverged at its rate"


def _list(rates) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _claims(e: Evidence) -> Iterator[tuple[str, str]]:
    for knob in KNOBS:
        if not any(claim.about == knob for claim in e.claims):
            yield "undefended", f"nothing is claimed about {knob}: why this one, and instead of what?"
    for claim in e.claims:
        told = f"claim about {claim.about}, {_told(claim.this)} against {_told(claim.that)}"
        if len(claim.because.split()) < 5:
            yield "no_reason", f"{told}: say why, in a sentence"
        if claim.about in KNOBS and claim.part == "test":
            yield "chosen_on_test", f"{told}: decided on the test part. Knobs are turned on validation"
        there = [bool(e.of(side, claim.part)) for side in (claim.this, claim.that)]
        if not all(there):
            yield "no_runs", f"{told}: no run on {claim.part} of {_told(claim.that if there[0] else claim.this)}"
            continue
        flaws = list(_not_alone(e, claim, told))
        yield from flaws
        yield from _noise(e, claim, told)


def _not_alone(e: Evidence, claim: Claim, told: str) -> Iterator[tuple[str, str]]:
    """Does anything differ but what the claim is about?"""
    a, b = ([run for run in e.of(side, claim.part)] for side in (claim.this, claim.that))
    for side, runs in ((claim.this, a), (claim.that, b)):
        kinds = {json.dumps({k: v for k, v in run.settings.items()}, sort_keys=True, default=list) for run in runs}
        if len(kinds) > 1:
            yield "ambiguous", f"{told}: {_told(side)} stands for runs with {len(kinds)} different settings; name them all, or take the others out"
            return
    first, second = dict(a[0].settings), dict(b[0].settings)
    if claim.about == "way":
        free = {"r", "alpha", "targets", *KNOBS}
    elif claim.about == "r":
        # alpha either stays, or follows r so that alpha / r stays
        scaled = all(key in s for s in (first, second) for key in ("r", "alpha")) and _equal(first["alpha"] / first["r"], second["alpha"] / second["r"])
        free = {"r", "alpha"} if scaled else {"r"}
    else:
        free = {claim.about}
    nothing_trains = not first or not second  # a frozen base has no steps
    differing = sorted(k for k in first.keys() | second.keys() if k not in free and not _equal(first.get(k), second.get(k)))
    if differing and not nothing_trains:
        yield "not_alone", f"{told}: {', '.join(differing)} differ, too; which of them made the difference?"
    if claim.about in KNOBS and not claim.this.get(claim.about) != claim.that.get(claim.about):
        yield "not_alone", f"{told}: both sides have the same {claim.about}"
    if claim.part == "validation":
        rates = [e.rates(side) for side in (claim.this, claim.that)]
        moved = e.tuned(claim.this) != e.tuned(claim.that)
        if all(rates) and claim.about == "alpha" and any(len(r) < RATES for r in rates) and moved:
            yield "alpha_and_rate", f"{told}: alpha and the learning rate changed together ({_list(rates[0])}; {_list(rates[1])}). Tune the rate for each alpha"
        seeds = [set(e.values(side)) for side in (claim.this, claim.that)]
        if {None} not in seeds and seeds[0] != seeds[1]:
            yield "seeds_differ", f"{told}: seeds {_seedlist(seeds[0])} against {_seedlist(seeds[1])}; were runs left out?"


def _seedlist(seeds) -> str:
    return ", ".join(map(str, sorted(seeds, key=str))) or "none"


def _noise(e: Evidence, claim: Claim, told: str) -> Iterator[tuple[str, str]]:
    difference, half = e.difference(claim.this, claim.that, claim.part)
    if not math.isfinite(difference) or not math.isfinite(half):
        yield "no_interval", f"{told}: its difference has no interval (fewer than two common seeds, or runs that diverged)"
        return
    found = f"the difference is {difference:+.4f} ± {half:.4f} on {claim.part}"
    if claim.says == "better" and difference + half >= 0:
        yield "within_noise", f"{told}: said to be better, but {found}. That is noise; say 'not shown', or run more seeds"
    elif claim.says == "not shown" and (difference + half < 0 or difference - half > 0):
        yield "difference_hidden", f"{told}: said not to be shown, but {found}: the runs do tell them apart"
    elif claim.says == "no worse":
        gain = _gain(e, claim.part)
        if claim.margin is None or not claim.margin > 0:
            yield "no_margin", f"{told}: 'no worse' needs a margin, how much worse would not matter, fixed in advance"
        elif math.isfinite(gain) and claim.margin > gain / 4:
            yield "margin_too_wide", f"{told}: a margin of {claim.margin:g} is more than a quarter of all that LoRA gains over the frozen base ({gain:.4f})"
        elif difference + half >= claim.margin:
            yield "margin_not_shown", f"{told}: said to be no worse by {claim.margin:g}, but {found}, which reaches beyond"


def _gain(e: Evidence, part: str) -> float:
    frozen, mine = e.values({"way": FROZEN}, part), e.values(e.choice, part)
    return min(frozen.values()) - mean(mine.values()) if frozen and mine else math.nan


def _test(e: Evidence) -> Iterator[tuple[str, str]]:
    runs = [run for run in e.runs if run.part == "test"]
    if not runs:
        yield "no_test", "the test part was never looked at: the result is not known yet"
        return
    numbers = {run.look for run in runs}
    if len(e.looks) > 1 or len(numbers) > 1:
        yield "test_twice", f"the test part was looked at {max(len(e.looks), len(numbers))} times: after the first look it is a second validation part"
    elif len(e.looks) < len(numbers):
        yield "look_not_recorded", "there are test scores, and the record of looks is empty: where is the rest of it?"
    seen: dict[str, list[float]] = {}
    for run in runs:
        name = json.dumps([run.way, run.seed, run.lr, dict(run.settings)], sort_keys=True, default=list)
        seen.setdefault(name, []).append(run.score)
    if any(len(scores) > 1 for scores in seen.values()):
        yield "test_twice", "one setting with one seed has two test scores: the test part was looked at again"
    kinds = {json.dumps([run.lr, dict(run.settings)], sort_keys=True, default=list) for run in runs if run.way == LORA}
    if len(kinds) > 1:
        yield "chosen_on_test", f"{len(kinds)} settings of LoRA were scored on the test part; it is there for the one that validation chose"
    if e.choice and not e.of(e.choice, "test"):
        yield "other_on_test", f"what was scored on the test part is not the choice, {_told(e.choice)}"
    rate = e.tuned(e.choice) if e.choice else None
    mine = e.of(e.choice, "test") if e.choice else []
    if rate is not None and any(run.lr != rate for run in mine):
        yield "other_on_test", f"the choice was scored on the test part at {_list(sorted({r.lr for r in mine}))}; validation chose {rate:g}"
    asked, used = set(e.values(e.choice)) if e.choice else set(), {run.seed for run in mine}
    if mine and asked != used:
        yield "test_seeds", f"the choice was validated with seeds {_seedlist(asked)} and tested with {_seedlist(used)}: report all of them"
    if FROZEN not in {run.way for run in runs}:
        yield "no_floor", "the frozen base was not scored on the test part beside the choice"
