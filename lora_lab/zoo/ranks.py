"""Choosing the rank automatically: three ways, on the race's task, and "r everywhere" with as many numbers beside them.

    energy     train at a generous r, then cut all layers together: what is kept are the largest singular values of all ΔW, wherever they are
    afresh     the ranks that energy found, trained once more from the start; twice the steps, so it has a rival that gets them, too: "everywhere, longer"
    reversed   the control: the same ranks in the order of layers turned round. If it does as well, it was not the choice that helped
    AdaLoRA    start with more directions than are wanted and prune while training (`variants.Budget`)
    search     one r for all layers, the smallest that is within one standard error of the largest, found by bisection

    found = choose_ranks()      every way, every seed: ranks of the layers, numbers, accuracy, and the steps that were paid for, all runs of a search
    found.verdict()             does any of them beat r everywhere at the same count?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from ..adapt import apply_lora, lora_layers
from ..counting import lora_parameters, method_parameters
from ..data import Batches
from ..spectra import best_rank_r, factored_svdvals
from ..sweep import sweep
from ..tables import text_table
from ..train import linear_schedule, train
from .race import (
    CLIP,
    DEGREES,
    ENTRANTS,
    RANK,
    SCALING,
    SHAPES,
    STEPS,
    TARGETS,
    TUNING_SEEDS,
    WARMUP,
    Difference,
    adapt,
    base,
    dice,
    holm,
    images,
    paired,
    scores_of,
    version,
)  # fmt: skip

WAYS = ("everywhere", "everywhere, longer", "energy", "afresh", "reversed", "AdaLoRA", "search")
GENEROUS = 16
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16)
SEEDS = tuple(range(10))


# ---- by energy --------------------------------------------------------------------------------------------------------------------------


def ranks_by_energy(S: Mapping[str, Tensor], share: float) -> dict[str, int]:
    """How many singular values each layer keeps if all layers are cut at one threshold.

    S (k,) for each layer, of ΔW with its scaling, largest first. Kept are the largest of all, as few as hold `share` of sum_layers ||ΔW||^2; of
    equal ones the first layer's. A layer may keep none: then it is not worth an adapter.
    Raises ValueError unless 0 < share <= 1, and where nothing was learned: all ΔW = 0.

    >>> ranks_by_energy({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.5])}, 0.9)
    {'a': 1, 'b': 1}
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is the part of the sum of all ||ΔW||^2 to keep, 0 < share <= 1; found {share}")
    squares = _sorted_squares(S)
    total, held, ranks = math.fsum(square for square, _ in squares), 0.0, dict.fromkeys(S, 0)
    for square, name in squares:
        if held >= share * total * (1 - 1e-12):  # rounding of the two sums must not ask for one more value than there is
            break
        held += square
        ranks[name] += 1
    return ranks


def ranks_within(S: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int) -> dict[str, int]:
    """The same from the other side: as many of the largest singular values of all layers as `budget` numbers can hold, r (in + out) for each layer.

    shapes  name -> (in, out). The first value that does not fit ends it, so that what is kept is always the largest of all.
    """
    ranks, spent = dict.fromkeys(S, 0), 0
    for square, name in _sorted_squares(S):
        spent += lora_parameters(*shapes[name], 1)
        if spent > budget or square == 0:
            break
        ranks[name] += 1
    if not any(ranks.values()):
        raise ValueError(f"a budget of {budget} numbers has no room for one direction of the layer that has the largest")
    return ranks


def _sorted_squares(S: Mapping[str, Tensor]) -> list[tuple[float, str]]:
    squares = [(float(value) ** 2, name) for name, values in S.items() for value in values]
    if not any(square for square, _ in squares):
        raise ValueError("every ΔW is 0, so there is nothing to cut: train first")
    return sorted(squares, key=lambda pair: -pair[0])  # sorting is stable: equal ones stay in the order of the layers


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """name -> the singular values of scaling B A, largest first, from the factors alone."""
    return {name: factored_svdvals(layer.full_B(), layer.lora_A, layer.scaling) for name, layer in lora_layers(model).items()}


@torch.no_grad()
def cut(model: nn.Module, into: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """`into`, a copy of the frozen base, with the nearest update of these ranks to that of `model` in each layer; no adapter where the rank is 0."""
    _adapted(into, ranks)
    for name, layer in lora_layers(into).items():
        whole = lora_layers(model)[name]
        (B, A), _ = best_rank_r((whole.full_B(), whole.lora_A, whole.scaling / layer.scaling), ranks[name])
        layer.lora_B.copy_(B), layer.lora_A.copy_(A)
    return into


def _adapted(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """LoRA with a rank for each layer and the same scaling in all of them."""
    some = {name: r for name, r in ranks.items() if r}
    return apply_lora(model, r=max(some.values()), alpha=SCALING * max(some.values()), target_modules=list(some), rank_pattern=some,
                      alpha_pattern={name: SCALING * r for name, r in some.items()})  # fmt: skip


# ---- by a search ------------------------------------------------------------------------------------------------------------------------


def search_rank(score, candidates: Sequence[int] = CANDIDATES, samples: int = 1) -> tuple[int, dict[int, float]]:
    """The smallest candidate whose accuracy is within one standard error of the largest candidate's, by bisection: (r, {r that was tried: accuracy}).

        standard error = sqrt(p (1 - p) / samples),   p the accuracy of the largest candidate on so many images

    score  score(r) -> accuracy. It is taken to rise with r; where it does not, a smaller r that would have done may be missed.
    """
    candidates = sorted(candidates)
    if not candidates or samples < 1:
        raise ValueError(f"a search needs candidates and the number of samples that score() counts; found {candidates} and {samples}")
    tried = {candidates[-1]: score(candidates[-1])}
    best = tried[candidates[-1]]
    enough = best - math.sqrt(best * (1 - best) / samples)
    low, high = 0, len(candidates) - 1  # candidates[high] is good enough
    while low < high:
        middle = (low + high) // 2
        r = candidates[middle]
        tried[r] = score(r)
        low, high = (low, middle) if tried[r] >= enough else (middle + 1, high)
    return candidates[high], tried


# ---- all of them, with their price ------------------------------------------------------------------------------------------------------


def choose(way: str, seed: int, rank: int, steps: int = STEPS, generous: int = GENEROUS) -> tuple[nn.Module, dict[str, int], int]:
    """(the adapted model, the rank of each layer, the steps that were paid for) for one way, within the numbers of LoRA with `rank` everywhere.

    A search has no budget: it says how many numbers are enough. Raises ValueError for a way that is none.
    """
    shapes = dict(zip(TARGETS, SHAPES, strict=True))
    budget = sum(lora_parameters(*shape, rank) for shape in SHAPES)
    if way == "everywhere":
        ranks = dict.fromkeys(TARGETS, rank)
        return trained(ranks, seed, steps), ranks, steps
    if way == "everywhere, longer":
        ranks = dict.fromkeys(TARGETS, rank)
        return trained(ranks, seed, 2 * steps), ranks, 2 * steps
    if way == "search":
        models = {}

        def score(r):
            models[r] = trained(dict.fromkeys(TARGETS, r), seed, steps)
            return scores_of(models[r])["validation"]

        r, tried = search_rank(score, [r for r in CANDIDATES if r <= generous], samples=len(images(DEGREES).validation[1]))
        return models[r], dict.fromkeys(TARGETS, r), steps * len(tried)
    if way == "AdaLoRA":
        model, _ = adapt("AdaLoRA", ENTRANTS["AdaLoRA"].centre, seed, budget, steps)
        return model, {name: int((layer.values != 0).sum()) for name, layer in lora_layers(model).items()}, steps
    if way not in ("energy", "afresh", "reversed"):
        raise ValueError(f"way {way!r} is not one of {', '.join(WAYS)}")
    whole = trained(dict.fromkeys(TARGETS, generous), seed, steps)
    ranks = ranks_within(singular_values(whole), shapes, budget)
    if way == "energy":
        return cut(whole, base(seed), ranks).eval(), ranks, steps
    if way == "reversed":
        ranks = dict(zip(ranks, reversed(ranks.values()), strict=True))
    return trained(ranks, seed, steps), ranks, 2 * steps


def trained(ranks: Mapping[str, int], seed: int, steps: int = STEPS) -> nn.Module:
    """The seed's base with LoRA of these ranks, trained as in the race."""
    own = dice("ranks", seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(own)
        model = _adapted(base(seed), ranks)
    rate = linear_schedule(ENTRANTS["LoRA"].centre, steps, warmup=int(WARMUP * steps))
    for _ in train(model, Batches(*images(DEGREES).train, seed=own), steps, rate, clip=CLIP, device="cpu"):
        pass
    return model.eval()


def rank_run(way: str, seed: int, rank: int, steps: int = STEPS, generous: int = GENEROUS) -> dict:
    """`choose` in numbers, for `sweep`: r of each layer under its name, trained (numbers left at the end), paid (steps), accuracy and loss."""
    model, ranks, paid = choose(way, seed, rank, steps, generous)
    method = "adalora" if way == "AdaLoRA" else "lora"
    numbers = sum(method_parameters(method, *shape, ranks[name]) for name, shape in zip(TARGETS, SHAPES, strict=True) if ranks[name])
    return {name: ranks[name] for name in TARGETS} | {"trained": numbers, "paid": paid} | scores_of(model)


@dataclass(frozen=True, repr=False)
class Choices:
    """Every way with every seed. runs: a table with a row for each; rank: of "everywhere", whose numbers are the budget of the others."""

    runs: object
    rank: int

    @property
    def ways(self) -> list[str]:
        return list(dict.fromkeys(self.runs["way"]))

    def of(self, way: str, column: str = "test") -> list[float]:
        """One number for each seed: test, validation, trained, paid, or a layer's rank under its name."""
        return list(self.runs.loc[self.runs["way"] == way, column])

    def ranks(self, way: str) -> dict[str, list[int]]:
        """layer -> its rank with each seed."""
        return {name: [int(r) for r in self.of(way, name)] for name in TARGETS}

    def differences(self) -> list[Difference]:
        """Accuracy of each way with the same budget minus r everywhere, within each seed; Holm's correction over them. A search has no budget."""
        asked = [paired(self.of(way), self.of("everywhere"), way) for way in self.ways if way not in ("everywhere", "search")]
        return [Difference(d.name, d.mean, d.half, d.p, p) for d, p in zip(asked, holm([d.p for d in asked]), strict=True)]

    def verdict(self) -> str:
        n, lines = len(self.of("everywhere")), []
        for d in self.differences():
            word = "not decided" if not d.decided else "better" if d.mean > 0 else "worse"
            lines.append(f"{d.name} minus r = {self.rank} everywhere: {100 * d.mean:+.1f} ± {100 * d.half:.1f} points, p after Holm {d.adjusted:.3f}: {word}")
        if "search" in self.ways:
            found = [int(r) for r in self.of("search", TARGETS[0])]
            lines.append(f"search: r = {', '.join(map(str, found))} with the {n} seeds, for {mean(self.of('search', 'paid')):.0f} steps instead of "
                         f"{self.of('everywhere', 'paid')[0]}")  # fmt: skip
        return "\n".join(lines).replace("-", "−")

    def table(self) -> str:
        head = ["", *TARGETS, "trained", "steps paid", "accuracy"]
        cells = [head]
        for way in self.ways:
            scores = [100 * v for v in self.of(way)]
            spread = f"{mean(scores):.1f}" + (f" ± {stdev(scores):.1f}" if len(scores) > 1 else "")
            cells.append([way, *(f"{mean(r):.1f}" for r in self.ranks(way).values()), f"{mean(self.of(way, 'trained')):,.0f}",
                          f"{mean(self.of(way, 'paid')):,.0f}", spread])  # fmt: skip
        return text_table(cells)

    __str__ = __repr__ = table


def choose_ranks(
    rank: int = RANK, seeds: Iterable[int] = SEEDS, ways: Sequence[str] = WAYS, *, steps: int = STEPS, generous: int = GENEROUS, n_jobs: int | None = None,
    folder=None, progress: bool = False,
) -> Choices:  # fmt: skip
    """Choose ranks in every way, within the numbers of LoRA with `rank` everywhere, and score what comes out. Finished runs are kept on disk.

    generous  the rank that is trained before energy cuts, and the largest that the search tries
    Raises ValueError: a way that is none, "everywhere" not among them, a seed of the race's tuning, fewer than two seeds, a generous rank that is none.
    """
    ways, seeds = list(ways), list(seeds)
    if wrong := [way for way in ways if way not in WAYS]:
        raise ValueError(f"ways are {', '.join(WAYS)}; found {', '.join(wrong)}")
    if "everywhere" not in ways or len(seeds) < 2 or set(seeds) & set(TUNING_SEEDS):
        raise ValueError(f'a comparison needs "everywhere", and two seeds that did not tune the rates ({TUNING_SEEDS}); found {ways} and {seeds}')
    if not 0 < rank < generous:
        raise ValueError(f"a generous rank is larger than the one everywhere, which is 1 at least; found rank={rank}, generous={generous}")
    grid = {"way": ways, "rank": [rank], "steps": [steps], "generous": [generous]}
    return Choices(sweep(rank_run, grid, seeds, n_jobs, folder=folder, version=version(__file__), progress=progress), rank)
