"""What several experiments stand on: digits upright and turned, a pretrained classifier, short trainings on whole data sets."""

from __future__ import annotations

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import apply_lora
from ..data import Split, digits
from ..train import train

SEEDS = (0, 1, 2)


@cache
def upright(seed: int = 0) -> Split:
    return digits(seed=seed)


@cache
def turned(seed: int = 0) -> Split:
    """The same images, a quarter turn round: the task that adapters learn here."""
    return digits(rotation=90, seed=seed)


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    x, y = part
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


def learn(model: nn.Module, part: tuple[Tensor, Tensor], steps: int, lr: float, **more) -> list[float]:
    """Train on a whole part at once, lr falling to 0 in a line; the loss before each step."""
    return [step.loss for step in train(model, [part], steps, lambda k: lr * (1 - k / steps), device="cpu", **more)]


@cache
def _pretrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 10))
    learn(model, upright(seed).train, 100, 0.05)
    return model


def pretrained(seed: int) -> nn.Module:
    """A fresh copy of a classifier that has learned upright digits: one layer, 64 -> 10."""
    return copy.deepcopy(_pretrained(seed))


@cache
def _adapted(seed: int, r: int, task: str) -> nn.Module:
    return tuned(apply(pretrained(seed), r, seed), (upright if task == "upright" else turned)(seed).train)


def apply(model: nn.Module, r: int, seed: int) -> nn.Module:
    """LoRA on every linear layer, alpha = r; the adapter's dice are not those of the base."""
    torch.manual_seed(100 + seed)
    return apply_lora(model, r=r, alpha=r)


def adapted(seed: int, r: int = 4, task: str = "turned") -> nn.Module:
    """A fresh copy of the pretrained classifier with LoRA, trained on turned (or upright) digits."""
    return copy.deepcopy(_adapted(seed, r, task))


def tuned(model: nn.Module, part: tuple[Tensor, Tensor], steps: int = 100, lr: float = 0.15) -> nn.Module:
    """The model, trained on a part: 0.15 is good for LoRA and for full fine-tuning of this layer alike."""
    learn(model, part, steps, lr)
    return model


def mean_squared(model: nn.Module, batch) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)
