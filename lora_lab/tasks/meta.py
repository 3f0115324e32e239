"""An adapter that begins where a family of tasks taught it to begin, instead of at zero.

Reptile (Nichol, Achiam and Schulman 2018, arXiv 1803.02999), on the adapter alone: adapt to one task of the family from the start θ, which
ends at φ; move the start a little towards that end; take the next task.

    θ ← θ + ε (φ - θ)          θ, φ: all A and B of the adapter

The family here: digits turned by some angle, read by a base that knows them upright. New tasks of it are angles that were never met.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from ..adapt import apply_lora, lora_layers
from ..comparing import Task, Way, lora
from ..data import Batches, digits
from ..train import evaluate, train
from .transfer import few, network, source

FAMILY = tuple(f"turned {angle}" for angle in (60, 70, 80, 100, 110, 120))
UNRELATED = tuple(f"shuffled pixels {number}" for number in range(1, 7))  # as many tasks, of the same images; the control
TARGETS = ["0", "2", "4"]


@cache
def upright_base(seed: int) -> nn.Sequential:
    """The network of `transfer`, trained 400 steps on upright digits."""
    with torch.random.fork_rng([]):
        model = network(seed)
        for _ in train(model, Batches(*digits(seed=seed).train, seed=seed), 400, 3e-3, device="cpu"):
            pass
    return model


def factors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every factor: "0.lora_A" -> (r, in), "0.lora_B" -> (out, r), ..."""
    return {f"{name}.{which}": getattr(layer, which).detach().clone() for name, layer in lora_layers(model).items() for which in ("lora_A", "lora_B")}


@torch.no_grad()
def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy factors into the adapter that the model carries. Raises ValueError if they are not exactly its own."""
    own = {f"{name}.{which}": getattr(layer, which) for name, layer in lora_layers(model).items() for which in ("lora_A", "lora_B")}
    there, given = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, values))
    if there != given:
        raise ValueError(f"these factors belong to another adapter: the model has {there}, given are {given}")
    for name, parameter in own.items():
        parameter.copy_(values[name])


def towards(start: Mapping[str, Tensor], ends: Sequence[Mapping[str, Tensor]], epsilon: float) -> dict[str, Tensor]:
    """start + epsilon * (mean of the ends - start), tensor by tensor."""
    return {name: theta + epsilon * (sum(end[name] for end in ends) / len(ends) - theta) for name, theta in start.items()}


def reptile(
    base: nn.Module, tasks: Sequence, rounds: int = 60, steps: int = 15, lr: float = 1e-2, epsilon: float = 0.3, r: int = 4, alpha: float = 8,
    seed: int = 0, update: Callable = towards,
) -> dict[str, Tensor]:  # fmt: skip
    """The start that a family of tasks leads to, as `factors`; the base is not changed.

    tasks   batches for `train`, one for each task of the family. Raises ValueError if there is none
    rounds  tasks that are met, one after the other, in an order that the seed decides; `steps` updates are spent on each
    update  update(start, [end], epsilon) -> the new start
    """
    if not tasks:
        raise ValueError("reptile learns a start from a family of tasks; found none")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = apply_lora(copy.deepcopy(base), r=r, alpha=alpha, target_modules=TARGETS)
        start, order = factors(model), random.Random(seed)
        for _ in range(rounds):
            put(model, start)
            for _ in train(model, order.choice(tasks), steps, lr, device="cpu"):
                pass
            start = update(start, [factors(model)], epsilon)
    return start


@cache
def learned_start(family: Sequence[str], seed: int, rounds: int = 60, update: Callable = towards) -> dict[str, Tensor]:
    """Reptile's start for a family of `transfer.source` names, on all their training images."""
    tasks = [Batches(*source(name, seed), batch_size=32, seed=seed) for name in family]
    return reptile(upright_base(seed), tasks, rounds, seed=seed, update=update)


def begins_at(family: Sequence[str], name: str, rounds: int = 60, update: Callable = towards) -> Way:
    """LoRA as ever, but A and B begin where this family leads."""
    plain = lora(4, 8)

    def prepare(model, task, seed):
        model = plain.prepare(model, task, seed)
        put(model, learned_start(tuple(family), seed, rounds, update))
        return model

    return Way(name, prepare, plain.stored, lr="LoRA")


def turned_task(angle: float = 90.0, shots: int = 2, steps: int = 20) -> Task:
    """Read digits turned by `angle` after `shots` labelled images of each, from a base that knows them upright. Accuracy on all test images."""
    return Task(
        name=f"digits turned by {angle:g} degrees, {shots} of each, {steps} steps",
        base=upright_base,
        train=lambda seed: Batches(*few(*digits(rotation=angle, seed=seed).train, shots, seed), batch_size=32, seed=seed),
        metric=lambda model, seed: {"accuracy": evaluate(model, [digits(rotation=angle, seed=seed).test], "cpu")},
        targets=TARGETS,
        probe=("4",),
        # every way may choose: a start of zero needs longer strides to get anywhere in few steps
        validate=lambda model, seed: evaluate(model, [digits(rotation=angle, seed=seed).validation], "cpu"),
        lr=dict.fromkeys(("linear probe", "LoRA", "full fine-tuning"), (3e-3, 1e-2, 3e-2, 1e-1)),
        steps=steps,
    )
