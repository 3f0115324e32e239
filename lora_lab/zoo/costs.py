"""What a way costs: memory of a training step, and latency, measured so that a loaded machine does little harm."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step with Adam holds where forward ends and backward begins.

    weights (frozen and trained, buffers too), gradients and Adam's two moments of what trains, activations kept for the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def step_memory(model: nn.Module, loss: Callable, batch) -> StepMemory:
    """Count it on a real forward pass: every tensor that autograd saves, once, weights apart. Nothing is changed."""
    state = [*model.parameters(), *model.buffers()]
    known = {t.untyped_storage()._cdata for t in state}
    weights = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in state}.values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # so that its address is not given away again
        return tensor

    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            value = loss(model, batch)
    finally:
        for module, mode in modes:
            module.training = mode
    del value
    return StepMemory(weights, trained, 2 * trained, sum(kept.values()))


@dataclass(frozen=True)
class Latency:
    """Seconds of processor time of one call, and how it compares with the reference in the same round: median and quartiles of the ratio."""

    seconds: float
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{1000 * self.seconds:.1f} ms, {100 * (self.ratio - 1):+.0f} % ({100 * (self.low - 1):+.0f} to {100 * (self.high - 1):+.0f})"


def compare_latency(calls: Mapping[str, Callable[[], object]], reference: str, rounds: int = 15, clock: Callable[[], float] = time.process_time):
    """{name: Latency}. Every round calls each once, in turns that begin elsewhere each time, so that what disturbs the machine disturbs all.

    clock   process_time counts this process alone: with one thread that is the time on an idle machine, whatever else runs. On a GPU, pass a
            clock that waits for the device. The reference should be among the calls twice, under two names: the second is the control.
    """
    if reference not in calls or rounds < 1:
        raise ValueError(f"the reference {reference!r} must be one of {', '.join(calls)}, rounds at least 1; found {rounds}")
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for name in names:  # the first call allocates
            calls[name]()
        for k in range(rounds):
            turn = k % len(names)
            for name in names[turn:] + names[:turn]:
                began = clock()
                calls[name]()
                seconds[name].append(clock() - began)
    found = {}
    for name in names:
        ratios = sorted(mine / its for mine, its in zip(seconds[name], seconds[reference], strict=True))
        quarter = len(ratios) // 4
        found[name] = Latency(median(seconds[name]), median(ratios), ratios[quarter], ratios[-1 - quarter])
    return found
