"""A fair race between LoRA and its variants: one task, one budget of trained numbers, as many learning rates tried for each.

    found = race()          tunes everybody on validation images, then runs everybody twice on test images: at LoRA's rate, and at its own
    found.verdict()         who differs from LoRA, after Holm's correction for having asked so often

The task: a network that reads upright digits learns to read them turned by 45 degrees. The images are split once; a seed decides the base's weights and
the seeds that tune are not those that race, so that nothing that is scored has chosen anything. Within a seed all entrants share the base, and each
throws its own dice for what it draws and for the order of its batches. So do three twins, which are LoRA under other names: how far they are from LoRA
is luck, and nothing else.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev

import torch
import torch.nn.functional as F
from torch import nn

from ..adapt import apply_lora
from ..comparing import interval
from ..counting import count_parameters, method_parameters
from ..data import Batches, digits
from ..sweep import sweep
from ..tables import html_table, text_table
from ..train import batch_loss, linear_schedule, train
from ..updates import TrainingDiverged
from . import quantised, variants

WIDTH, TARGETS = 64, ("body.0", "body.2", "body.4")
SHAPES = ((64, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH))  # (in, out) of the targets
RANK, SCALING = 4, 2.0  # alpha = 2 r at every rank
BUDGET = sum(method_parameters("lora", *shape, RANK) for shape in SHAPES)
DEGREES = 45
STEPS, WARMUP, CLIP = 200, 0.1, 1.0  # the share of the steps in which the rate rises; the largest gradient norm
SEEDS, TUNING_SEEDS = tuple(range(10)), (100, 101, 102)
REFERENCE, TWINS = "LoRA", ("twin B", "twin C", "twin D")


@dataclass(frozen=True)
class Entrant:
    """Who runs.

    method   whose formula counts its trained numbers, a key of `lora_lab.counting.METHODS`
    centre   the middle of its learning rates, found beforehand on the tuning seeds over rates from 1 to 128 (factors of 2)
    change   what differs from LoRA
    """

    name: str
    method: str
    centre: float
    change: str

    def rates(self, count: int = 5, factor: float = 2.0) -> tuple[float, ...]:
        """`count` rates around the centre, each `factor` times the one before."""
        return tuple(self.centre * factor ** (k - count // 2) for k in range(count))


ENTRANTS = {
    e.name: e
    for e in (
        Entrant(REFERENCE, "lora", 0.04, "nothing"),
        *(Entrant(name, "lora", 0.04, "nothing: LoRA with other dice") for name in TWINS),
        Entrant("rsLoRA", "lora", 0.02, "scaling alpha / sqrt(r)"),
        Entrant("LoRA+", "lora", 0.01, "B learns 16 times as fast as A"),
        Entrant("DoRA", "dora", 0.02, "magnitude and direction apart"),
        Entrant("PiSSA", "lora", 0.02, "starts at W0's strongest directions"),
        Entrant("OLoRA", "lora", 0.04, "starts at W0's QR factors"),
        Entrant("EVA", "lora", 0.02, "A starts where the inputs vary most"),
        Entrant("VeRA", "vera", 0.2, "A and B random and frozen, two vectors train"),
        Entrant("LoRA-FA", "lora-fa", 0.08, "A is frozen"),
        Entrant("LoRA-XS", "lora-xs", 0.04, "an r x r matrix between W0's directions trains"),
        Entrant("AdaLoRA", "adalora", 0.08, "starts with more directions and prunes"),
        Entrant("QLoRA", "lora", 0.04, "the base in 4 bits"),
    )
}


# What fits into a few seconds: fewer entrants, seeds, rates and steps. Its verdict is not to be believed, and it says so itself: two seeds decide nothing.
QUICK = {"entrants": (REFERENCE, TWINS[0], "DoRA", "PiSSA", "VeRA"), "seeds": (0, 1), "tuning_seeds": (100,), "rates": 3, "steps": 60}


def _entrant(name: str) -> Entrant:
    if name not in ENTRANTS:
        raise ValueError(f"no entrant {name!r}; there are {', '.join(ENTRANTS)}")
    return ENTRANTS[name]


def rank_for(entrant: str, budget: int = BUDGET, shapes: Sequence[tuple[int, int]] = SHAPES) -> int:
    """The largest r, one for all layers, at which the entrant trains no more than `budget` numbers in layers of these shapes (in, out).

    LoRA-XS has no more directions than W0, so there r stops at the smallest side. For AdaLoRA it is the average that may be left at the end.
    Raises ValueError where r = 1 is too much.
    """
    method = _entrant(entrant).method
    most = min(map(min, shapes)) if method == "lora-xs" else budget
    r = 0
    while r < most and sum(method_parameters(method, *shape, r + 1) for shape in shapes) <= budget:
        r += 1
    if not r:
        least = sum(method_parameters(method, *shape, 1) for shape in shapes)
        raise ValueError(f"{entrant} trains {least:,} numbers in {len(shapes)} layers at r = 1; the budget is {budget:,}")
    return r


# ---- one run ----------------------------------------------------------------------------------------------------------------------------


@cache
def images(degrees: int):
    """The digits, turned; one split for all seeds."""
    return digits(rotation=degrees)


def classifier() -> nn.Module:
    """64 pixels -> three hidden layers -> 10 digits."""
    sides = (64, WIDTH, WIDTH, WIDTH)
    body = nn.Sequential(*(layer for pair in zip(sides, sides[1:], strict=False) for layer in (nn.Linear(*pair), nn.ReLU())))
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(WIDTH, 10)))


@cache
def _base(seed: int) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = classifier()
    for _ in train(model, Batches(*images(0).train, seed=seed), 500, linear_schedule(5e-3, 500), device="cpu"):
        pass
    return model.eval()


def base(seed: int) -> nn.Module:
    """A fresh copy of the seed's network, which reads upright digits."""
    return copy.deepcopy(_base(seed))


def dice(entrant: str, seed: int) -> int:
    """The seed of what an entrant draws: its own in every race, the same in every process."""
    return zlib.crc32(f"{entrant} {seed}".encode())


def prepare(model: nn.Module, entrant: str, r: int, seed: int = 0) -> tuple[nn.Module, dict]:
    """The model with the entrant's layers, frozen but for them, and what `train` is to be told beside."""
    layers = {"DoRA": variants.DoRALinear, "PiSSA": variants.PiSSALinear, "OLoRA": variants.OLoRALinear, "LoRA-XS": variants.LoRAXSLinear,
              "AdaLoRA": variants.AdaLoRALinear}  # fmt: skip
    targets, settings = list(TARGETS), {}
    torch.manual_seed(seed)
    if entrant == "VeRA":
        return variants.add_variant(model, variants.VeRALinear, targets, shared=variants.vera_matrices(model, targets, r, seed)), settings
    if entrant == "EVA":
        return variants.eva(model, [images(DEGREES).train[0]], targets, r, SCALING * r), settings
    if entrant == "AdaLoRA":
        r = start_rank(r)
        settings["loss"] = _orthogonal_loss
    if entrant in layers:
        return variants.add_variant(model, layers[entrant], targets, r=r, alpha=SCALING * r), settings
    apply_lora(model, r, SCALING * r, targets, rslora=entrant == "rsLoRA")
    if entrant == "LoRA-FA":
        variants.lora_fa(model)
    elif entrant == "QLoRA":
        quantised.quantise_below_lora(model)
    elif entrant == "LoRA+":
        settings["optimizer"] = variants.lora_plus(model)
    return model, settings


def start_rank(r: int) -> int:
    """AdaLoRA's r at the start, for r directions a layer at the end: half as many more, as in its paper."""
    return r + -(-r // 2)


def _orthogonal_loss(model, batch):
    layers = [m for m in model.modules() if isinstance(m, variants.AdaLoRALinear)]
    return batch_loss(model, batch) + 0.1 * sum(layer.orthogonality() for layer in layers) / len(layers)


def adapt(entrant: str, lr: float, seed: int, budget: int = BUDGET, steps: int = STEPS, clip: float | None = CLIP) -> tuple[nn.Module, dict]:
    """The seed's base after one run with this rate, which rises for a tenth of the steps and then falls in a line to 0; and what `run` tells of it."""
    own = dice(entrant, seed)
    with torch.random.fork_rng([]):
        r = rank_for(entrant, budget)
        model, settings = prepare(base(seed), entrant, r, own)
        prune, trained = None, count_parameters(model).trainable
        if entrant == "AdaLoRA":
            one = method_parameters("adalora", *SHAPES[0], 1)  # of all targets: they are equally wide
            prune = variants.Budget(model, budget // one / len(SHAPES), steps, warm=steps // 5, last=steps // 3, every=5)
        batches, rate = Batches(*images(DEGREES).train, seed=own), linear_schedule(lr, steps, warmup=int(WARMUP * steps))
        seconds, diverged, began = [], False, time.process_time()
        try:
            for step in train(model, batches, steps, rate, clip=clip, device="cpu", **settings):
                if prune:
                    trained = prune.step(step.step) * one
                seconds.append(time.process_time() - began)
                began = time.process_time()
        except TrainingDiverged:
            diverged = True
    return model.eval(), {"r": r, "trained": trained, "step_seconds": median(seconds) if seconds else math.nan, "diverged": diverged}


def run(entrant: str, lr: float, seed: int, budget: int = BUDGET, steps: int = STEPS, clip: float | None = CLIP) -> dict:
    """One run of `adapt` in numbers, for `sweep`: accuracy and loss (nats) on validation and on test images; r and the numbers that train (AdaLoRA:
    r on average and the numbers that are left at the end); the median processor time of a step, in seconds; whether it diverged: then the weights from
    before that step are scored."""
    model, found = adapt(entrant, lr, seed, budget, steps, clip)
    return found | scores_of(model)


@torch.no_grad()
def scores_of(model: nn.Module) -> dict[str, float]:
    """Accuracy and loss (nats) on the validation and the test images of the turned digits; the model is left in eval mode."""
    model.eval()
    found = {}
    for name, (x, y) in (("validation", images(DEGREES).validation), ("test", images(DEGREES).test)):
        logits = model(x)
        found[name] = float((logits.argmax(-1) == y).double().mean())
        found[f"{name}_loss"] = float(F.cross_entropy(logits, y))
    return found


# ---- what follows from several runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One entrant minus the reference, seed by seed: the mean, the half-width of its 95 % interval by Student's t, the two-sided p of "no difference",
    and that p after Holm's correction for all entrants that were asked (None where it was not one of them: a twin is no question)."""

    name: str
    mean: float
    half: float
    p: float
    adjusted: float | None = None

    @property
    def decided(self) -> bool:
        """Whether it stands out of luck at the level of 5 %, for all entrants together."""
        return self.adjusted is not None and self.adjusted < 0.05


def paired(a: Sequence[float], b: Sequence[float], name: str = "") -> Difference:
    """a - b within each seed. d̄ ± t s_d / sqrt(n), t of n - 1 degrees of freedom.

    Raises ValueError for fewer than two seeds or unequal numbers of them. Where all differences are equal, p is 0, or 1 if they are 0.
    """
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a paired difference needs the same two seeds at least on both sides; found {len(a)} and {len(b)} numbers")
    from scipy.special import stdtr  # comes with scikit-learn

    differences = [x - y for x, y in zip(a, b, strict=True)]
    middle, half = interval(differences)
    error = stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return Difference(name, middle, 0.0, float(middle == 0))
    return Difference(name, middle, half, 2 * float(stdtr(len(differences) - 1, -abs(middle) / error)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: of m, sorted upwards, max over j <= k of min(1, (m - j + 1) p_j).

    Whoever calls those below 0.05 different is wrong about any of them in at most 5 % of all races (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, k in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[k]))
        adjusted[k] = largest
    return adjusted


@dataclass(frozen=True, repr=False)
class Race:
    """Tables of a finished race.

    tuning   entrant, lr, seed -> validation accuracy and loss, of the tuning seeds
    unfair   entrant, seed -> test accuracy and loss, everybody at the rate that is best for LoRA
    fair     the same, everybody at its own best rate
    chosen   entrant -> that rate
    edges    entrants whose best rate is the lowest or highest that was tried: it may lie beyond, so their race was not fair
    """

    tuning: object
    unfair: object
    fair: object
    chosen: Mapping[str, float]
    edges: tuple[str, ...]

    @property
    def entrants(self) -> list[str]:
        return list(self.chosen)

    @property
    def twins(self) -> list[str]:
        return [name for name in self.entrants if name in TWINS]

    @property
    def variants(self) -> list[str]:
        """Those that differ from LoRA by more than their name."""
        return [name for name in self.entrants if name not in (REFERENCE, *TWINS)]

    def scores(self, entrant: str, fair: bool = True, score: str = "test") -> list[float]:
        """One number for each seed. score: "test" (accuracy), "test_loss" (nats), "validation", "validation_loss", "step_seconds"."""
        table = self.fair if fair else self.unfair
        return list(table.loc[table["entrant"] == entrant, score])

    def curve(self, entrant: str, score: str = "validation") -> dict[float, float]:
        """lr -> the mean over tuning seeds."""
        rows = self.tuning[self.tuning["entrant"] == entrant]
        return {float(lr): float(values.mean()) for lr, values in rows.groupby("lr")[score]}

    def differences(self, fair: bool = True, against: Sequence[str] = (REFERENCE,), score: str = "test") -> list[Difference]:
        """Every entrant but LoRA minus LoRA, in the order of entrants; Holm's correction over the variants, twins left out.

        against  several names: minus their mean. (REFERENCE, *TWINS) asks four LoRAs instead of one, so that LoRA's own luck counts half as much
        """
        columns = [self.scores(name, fair, score) for name in against]
        reference = [mean(row) for row in zip(*columns, strict=True)]
        found = [paired(self.scores(name, fair, score), reference, name) for name in self.entrants if name not in against]
        asked = [d for d in found if d.name in self.variants]
        adjusted = dict(zip((d.name for d in asked), holm([d.p for d in asked]), strict=True))
        return [Difference(d.name, d.mean, d.half, d.p, adjusted.get(d.name)) for d in found]

    def noise(self, fair: bool = True) -> tuple[float, float]:
        """The lowest and the highest mean of LoRA and its twins: what luck alone does."""
        means = [mean(self.scores(name, fair)) for name in (REFERENCE, *self.twins)]
        return min(means), max(means)

    def luck(self, fair: bool = True) -> tuple[float, float] | None:
        """From the lowest to the highest end of the twins' intervals, as differences to LoRA: whose mean lies in there may be LoRA under another name.
        None without twins."""
        twins = [d for d in self.differences(fair) if d.name in self.twins]
        return (min(d.mean - d.half for d in twins), max(d.mean + d.half for d in twins)) if twins else None

    def verdict(self, fair: bool = True) -> str:
        """In words: who differs from LoRA, by how much, beside what the twins do."""
        found = self.differences(fair)
        asked = [d for d in found if d.name in self.variants]
        decided = sorted((d for d in asked if d.decided), key=lambda d: -d.mean)
        seeds = len(self.scores(REFERENCE, fair))
        how = "each at its own best rate" if fair else f"everybody at LoRA's rate, {self.chosen[REFERENCE]:g}"
        lines = [f"{len(asked)} variants against LoRA, {how}, {seeds} seeds, test accuracy in points:"]
        for word, group in (("better", [d for d in decided if d.mean > 0]), ("worse", [d for d in decided if d.mean < 0])):
            if group:
                lines.append(f"{word} than LoRA: " + ", ".join(f"{d.name} {_points(d)}" for d in group))
        rest = [d for d in asked if not d.decided]
        if rest:
            lines.append(f"not decided: {', '.join(d.name for d in rest)} (from {_signed(min(d.mean for d in rest))} to {_signed(max(d.mean for d in rest))})")
        twins = [d for d in found if d.name in self.twins]
        if twins:
            lines.append("LoRA under other names: " + ", ".join(f"{d.name} {_points(d)}" for d in twins) + "; that is luck")
        if fair and self.edges:
            lines.append(f"edge! the best rate of {', '.join(self.edges)} is the last that was tried: look beyond it before you judge")
        return "\n".join(lines)

    def table(self, fair: bool = True) -> str:
        return text_table([self._head(), *self._cells(fair)])

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table([self._head(), *self._cells(True)])

    def _head(self) -> list[str]:
        return ["", "r", "trained", "ms a step", "lr", "accuracy ± sd", "− LoRA ± 95 %, points", "p", "p, Holm"]

    def _cells(self, fair: bool) -> list[list[str]]:
        found, table = {d.name: d for d in self.differences(fair)}, self.fair if fair else self.unfair
        cells = []
        for name in self.entrants:
            rows = table[table["entrant"] == name]
            scores, d = [100 * v for v in rows["test"]], found.get(name)
            lr = f"{float(rows['lr'].iloc[0]):.2g}" + (" edge!" if fair and name in self.edges else "")
            cells.append([
                name, str(int(rows["r"].iloc[0])), f"{int(rows['trained'].iloc[0]):,}", f"{1000 * rows['step_seconds'].min():.2f}", lr,
                f"{mean(scores):.1f} ± {stdev(scores):.1f}", "" if d is None else _points(d), "" if d is None else _p(d.p),
                "" if d is None or d.adjusted is None else _p(d.adjusted),
            ])  # fmt: skip
        return cells


def _points(d: Difference) -> str:
    return f"{_signed(d.mean)} ± {100 * d.half:.1f}"


def _signed(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


# ---- the race ---------------------------------------------------------------------------------------------------------------------------


def race(
    entrants: Iterable[str] = tuple(ENTRANTS), seeds: Iterable[int] = SEEDS, tuning_seeds: Iterable[int] = TUNING_SEEDS, *, rates: int = 5,
    factor: float = 2.0, budget: int = BUDGET, steps: int = STEPS, clip: float | None = CLIP, n_jobs: int | None = None, folder=None, progress: bool = False,
) -> Race:  # fmt: skip
    """Tune everybody, then race twice: at LoRA's rate, and everybody at its own. Finished runs are kept on disk (`lora_lab.sweep`).

    rates, factor  how many learning rates each may try, around its own centre, each `factor` times the one before. The highest mean accuracy on
                   validation images over the tuning seeds chooses; of equals, the lower loss
    budget         numbers that each may train; `rank_for` spends them

    Raises ValueError: an entrant that is none or can't afford rank 1, no LoRA among them, a seed that tunes and races, fewer than two seeds; RuntimeError: a
    run that failed (one that diverged has not: it is scored).
    """
    names, seeds, tuning_seeds = list(entrants), list(seeds), list(tuning_seeds)
    for name in names:
        rank_for(name, budget)  # who can't afford rank 1 is told before anybody runs
    if REFERENCE not in names:
        raise ValueError(f"a race against {REFERENCE} needs it among the entrants; found {', '.join(names) or 'nobody'}")
    if both := sorted(set(seeds) & set(tuning_seeds)):
        raise ValueError(f"seeds that chose a rate must not race: what luck had chosen would be scored; found {both} in both")
    if len(seeds) < 2 or not tuning_seeds or rates < 1:
        raise ValueError(f"a race needs two seeds, one seed to tune with and one rate at least; found {len(seeds)}, {len(tuning_seeds)} and {rates}")
    fixed = {"budget": budget, "steps": steps, "clip": clip}
    tried = {name: ENTRANTS[name].rates(rates, factor) for name in names}

    def runs(cells: list[tuple[str, float]], with_seeds):
        grid = [{"entrant": name, "lr": lr, **fixed} for name, lr in cells]
        table = sweep(run, grid, with_seeds, n_jobs, folder=folder, version=version(), progress=progress)
        if (failed := table[table["status"] == "failed"]).size:
            first = failed.iloc[0]
            raise RuntimeError(f"{len(failed)} of {len(table)} runs failed, so nobody can be compared; the first was {first['entrant']} at {first['lr']:g}: "
                               f"{first['error'].strip().splitlines()[-1]}")  # fmt: skip
        return table

    tuning = runs([(name, lr) for name in names for lr in tried[name]], tuning_seeds)
    chosen = {}
    for name in names:
        scores = tuning[tuning["entrant"] == name].groupby("lr")[["validation", "validation_loss"]].mean()
        chosen[name] = max(tried[name], key=lambda lr: (scores["validation"][lr], -scores["validation_loss"][lr]))
    edges = tuple(name for name in names if rates > 1 and chosen[name] in (tried[name][0], tried[name][-1]))
    fair = runs(list(chosen.items()), seeds)
    unfair = runs([(name, chosen[REFERENCE]) for name in names], seeds)
    return Race(tuning, unfair, fair, chosen, edges)


def version(*files) -> str:
    """A fingerprint of the files that decide a result; `sweep` notices by itself what stands in the file of the function that it runs, and no other."""
    paths = [Path(__file__), Path(variants.__file__), Path(quantised.__file__), *map(Path, files)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]
