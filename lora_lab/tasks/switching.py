"""Many tasks, one base: adapters that are taken off and put on while the model stays where it is.

Eight ways to meet the same handwritten digits (turned, mirrored, pixels shuffled, other labels, negatives), eight adapters of one base that
knows them upright. `Shelf` keeps adapters in memory and switches between them by copying A and B.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from ..adapt import apply_lora, lora_layers
from ..comparing import Task
from ..data import Batches, digits
from ..train import evaluate, train
from .meta import TARGETS, factors, put, upright_base

TASKS = ("turned 90", "turned 180", "mirrored", "shuffled pixels", "even or odd", "the next digit", "nine minus it", "negative")


def task_data(name: str, seed: int):
    """(train, test) of one of TASKS, each a pair x (n, 64), y (n,). Raises ValueError for another name."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    split = digits(rotation=float(name.split()[1]) if name.startswith("turned") else 0.0, seed=seed)
    generator = torch.Generator().manual_seed(2000)
    order = torch.randperm(64, generator=generator)
    pictures = {
        "mirrored": lambda x: x.view(-1, 8, 8).flip(2).flatten(1),
        "negative": lambda x: 1 - x,
        "shuffled pixels": lambda x: x[:, order],
    }
    answers = {
        "even or odd": lambda y: y % 2,
        "the next digit": lambda y: (y + 1) % 10,
        "nine minus it": lambda y: 9 - y,
    }
    see, say = pictures.get(name, lambda x: x), answers.get(name, lambda y: y)
    return tuple((see(x), say(y)) for x, y in (split.train, split.test))


def switch_task(name: str, steps: int = 150) -> Task:
    """One of TASKS for the upright base."""
    return Task(
        name=name,
        base=upright_base,
        train=lambda seed: Batches(*task_data(name, seed)[0], seed=seed),
        metric=lambda model, seed: {"accuracy": evaluate(model, [task_data(name, seed)[1]], "cpu")},
        targets=TARGETS,
        probe=("4",),
        lr={"linear probe": 1e-2, "LoRA": 1e-2, "full fine-tuning": 3e-3},
        steps=steps,
    )


class Shelf:
    """Adapters of one model in memory: `take` copies one of them into the layers, in place, and its alpha with it.

    The model carries LoRA layers; all adapters on the shelf have their shapes. Nothing is read from disk, nothing is allocated, the base
    is not touched.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._kept: dict[str, tuple[dict[str, Tensor], dict[str, float]]] = {}

    def __iter__(self):
        return iter(self._kept)

    def keep(self, name: str) -> None:
        """A copy of what the model carries now, under this name."""
        self._kept[name] = factors(self.model), {n: layer.alpha for n, layer in lora_layers(self.model).items()}

    def take(self, name: str) -> nn.Module:
        """The model, with the adapter of this name. KeyError if it is not on the shelf; RuntimeError while the model is merged."""
        if name not in self._kept:
            raise KeyError(f"no adapter {name!r} on the shelf; there are {', '.join(self._kept) or 'none yet'}")
        values, alphas = self._kept[name]
        for layer in lora_layers(self.model).values():
            layer.refuse_while_merged("switching adapters")
        put(self.model, values)
        for key, layer in lora_layers(self.model).items():
            layer.alpha = alphas[key]
        return self.model

    @property
    def bytes(self) -> int:
        """Of all factors on the shelf."""
        return sum(t.numel() * t.element_size() for values, _ in self._kept.values() for t in values.values())


@cache
def trained_shelf(names: Sequence[str] = TASKS, seed: int = 0, steps: int = 150) -> Shelf:
    """A shelf with an adapter (r = 4) for each of these tasks, trained one after the other on a copy of the upright base."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = apply_lora(copy.deepcopy(upright_base(seed)), r=4, alpha=8, target_modules=TARGETS)
        shelf, fresh = Shelf(model), factors(model)
        for name in names:
            put(model, fresh)
            for _ in train(model, switch_task(name).train(seed), steps, lambda k: 1e-2 * (1 - k / steps), device="cpu"):
                pass
            shelf.keep(name)
    model.eval()
    return shelf


def who_reads_what(shelf: Shelf, names: Sequence[str], seed: int = 0) -> Tensor:
    """Accuracy (adapters, tasks): row i is adapter i on every task."""
    tests = [task_data(name, seed)[1] for name in names]
    return torch.tensor([[evaluate(shelf.take(adapter), [test], "cpu") for test in tests] for adapter in names])


def sums_in_place(W0: Tensor, updates: Sequence[Tensor], switches: int) -> Tensor:
    """How far a merged weight drifts when adapters are exchanged by subtraction: ‖W - W0‖ / ‖W0‖ after each switch, (switches,).

    Every switch puts an update on, W ← W + ΔW, and takes it off again, W ← W - ΔW, in W0's own dtype.
    """
    W, drift = W0.clone(), []
    for k in range(switches):
        W += updates[k % len(updates)]
        W -= updates[k % len(updates)]
        drift.append(float((W.double() - W0.double()).norm() / W0.double().norm()))
    return torch.tensor(drift)
