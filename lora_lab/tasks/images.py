"""Digits for networks that look: a small vision transformer and a small convolutional net, and what they were never shown.

    task = images_task("transformer", "quarter turn")        for `lora_lab.comparing.finetune_and_compare`

Data card. The 1,797 handwritten digits of `lora_lab.data.digits`, 8 x 8, from scikit-learn (UCI, CC BY 4.0). A seed decides the split, and
with it the base: it is trained on the upright, clean train part of that split, so no test image is ever seen by a base. Changes:
"new digits" (the base knows 0 to 4, the task is 5 to 9, with a fresh head), "quarter turn" (90 degrees counter-clockwise, exact), "noise"
(Gaussian, standard deviation 0.4, where ink is 1), "jigsaw" (the 16 patches of 2 x 2 in one other order, the same for every image) and the control
"dealt anew" (each image's patches in an order of its own).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..comparing import Task
from ..data import Batches, Split, digits
from ..train import evaluate, linear_schedule, train

CHANGES = ("new digits", "quarter turn", "noise", "jigsaw", "dealt anew")
PATCH, SIDE = 2, 8
TOKENS = (SIDE // PATCH) ** 2


def cut(images: Tensor) -> Tensor:
    """(n, 64) -> (n, 16, 4): patches of 2 x 2, row by row, the pixels of a patch row by row."""
    k = SIDE // PATCH
    return images.view(-1, k, PATCH, k, PATCH).transpose(2, 3).reshape(-1, TOKENS, PATCH**2)


def paste(patches: Tensor) -> Tensor:
    """The inverse of `cut`: (n, 16, 4) -> (n, 64)."""
    k = SIDE // PATCH
    return patches.view(-1, k, k, PATCH, PATCH).transpose(2, 3).reshape(-1, SIDE**2)


class Attention(nn.Module):
    """A transformer block, norm first: x + out(attention), then x + down(gelu(up)). x (n, tokens, width)"""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def _split(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (n, heads, tokens, width / heads)

    def weights(self, x: Tensor) -> Tensor:
        """Who looks where: (n, heads, tokens, tokens), rows add up to 1."""
        q, k = (self._split(layer(self.norm1(x))) for layer in (self.q, self.k))
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        mixed = F.scaled_dot_product_attention(*(self._split(layer(h)) for layer in (self.q, self.k, self.v)))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """16 patches, two blocks of attention, the mean over patches, a head. Where a patch lay it knows from `position` alone."""

    def __init__(self, classes: int, width: int = 32):
        super().__init__()
        self.embed = nn.Linear(PATCH**2, width)
        self.position = nn.Parameter(0.1 * torch.randn(TOKENS, width))
        self.blocks = nn.ModuleList([Attention(width), Attention(width)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def attention(self, x: Tensor) -> Tensor:
        """The weights of the first block, mean over its heads: (n, 16, 16)."""
        return self.blocks[0].weights(self.embed(cut(x)) + self.position).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(cut(x)) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


class ConvNet(nn.Module):
    """Three convolutions of 3 x 3, two of them with stride 2, and a head that sees all that is left, 2 x 2 places."""

    def __init__(self, classes: int, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(-1, 1, SIDE, SIDE)
        for conv in (self.conv1, self.conv2, self.conv3):
            h = F.relu(conv(h))
        return self.head(h.flatten(1))


# name -> the net, LoRA's targets in it, LoRA's learning rates
NETS: dict[str, tuple[Callable, tuple[str, ...], tuple[float, ...]]] = {
    "transformer": (VisionTransformer, ("q", "v"), (0.03, 0.01)),
    "convolutions": (ConvNet, ("conv1", "conv2", "conv3"), (0.01, 0.003)),
}


def changed(change: str, seed: int) -> Split:
    """The digits after one of CHANGES, split by `seed`. Raises ValueError for another change."""
    if change not in CHANGES:
        raise ValueError(f"a change is one of {', '.join(CHANGES)}; found {change!r}")
    if change == "new digits":
        split = digits(classes=range(5, 10), seed=seed)
        return Split(*((x, y - 5) for x, y in (split.train, split.validation, split.test)))  # a new head counts its classes from 0
    split = digits(rotation=90.0 if change == "quarter turn" else 0.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    one_order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(7))

    def apply(x: Tensor) -> Tensor:
        if change == "noise":
            return x + 0.4 * torch.randn(x.shape, generator=generator)
        if change == "jigsaw":
            return paste(cut(x)[:, one_order])
        if change == "dealt anew":
            order = torch.rand(len(x), TOKENS, generator=generator).argsort(1)
            return paste(cut(x)[torch.arange(len(x))[:, None], order])
        return x

    return Split(*((apply(x), y) for x, y in (split.train, split.validation, split.test)))


@cache
def _pretrained(net: str, classes: int, seed: int, steps: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETS[net][0](classes)
        batches = Batches(*digits(classes=range(classes), seed=seed).train, batch_size=64, seed=seed)
        for _ in train(model, batches, steps, linear_schedule(6e-3, steps, warmup=20), device="cpu"):
            pass
    return model


def images_base(net: str = "transformer", change: str = "quarter turn", seed: int = 0, quick: bool = False) -> nn.Module:
    """A copy of the net as it meets the change: trained on upright clean digits; for "new digits" on 0 to 4, with a fresh head."""
    if net not in NETS:
        raise ValueError(f"a net is one of {', '.join(NETS)}; found {net!r}")
    model = copy.deepcopy(_pretrained(net, 5 if change == "new digits" else 10, seed, 150 if quick else 300))
    if change == "new digits":
        model.head = nn.Linear(model.head.in_features, 5)
    return model


def images_task(net: str = "transformer", change: str = "quarter turn", quick: bool = False) -> Task:
    """A net and a change as a task. quick: shorter runs and one learning rate, for trying things out."""
    rates = {"linear probe": (0.03, 0.1), "LoRA": NETS[net][2], "full fine-tuning": (0.003, 0.01)}
    part = cache(lambda seed: changed(change, seed))
    return Task(
        name=f"{net}: {change}",
        base=lambda seed: images_base(net, change, seed, quick),
        train=lambda seed: Batches(*part(seed).train, batch_size=64, seed=seed),
        metric=lambda model, seed: {"accuracy": evaluate(model, [part(seed).test], "cpu")},
        validate=None if quick else lambda model, seed: evaluate(model, [part(seed).validation], "cpu"),
        targets=NETS[net][1],
        head=("head",),
        lr={way: rate[0] if quick else rate for way, rate in rates.items()},
        steps=80 if quick else 200,
    )
