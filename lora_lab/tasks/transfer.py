"""From one domain to another: what a base that was trained elsewhere is worth when the target has only a few labels.

The target: handwritten digits, upright, a few of each. The sources: the same digits turned, mirrored, as negatives, with their pixels
shuffled, and noise, from which nothing can be learned. Every base is the same network, trained equally long on its source, and meets the
target with a fresh head. The images are those of `lora_lab.data.digits`; for one seed no test image was in any source.
"""

from __future__ import annotations

import re
from functools import cache

import torch
from torch import Tensor, nn

from ..comparing import Task
from ..data import Batches, digits
from ..train import evaluate, train

SOURCES = ("turned 15", "turned 30", "turned 90", "turned 180", "mirrored", "negative", "shuffled pixels", "noise", "nothing")
HEAD = "4"


def network(seed: int, width: int = 64) -> nn.Sequential:
    """64 pixels -> width -> width -> 10, fresh."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def source(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Training images (n, 64) and labels (n,) of a source: a name of SOURCES, "turned" with any degrees, "shuffled pixels" with a number.

    "shuffled pixels" moves every image's pixels in the same way, which the number decides; "noise" has random pixels and random labels.
    Raises ValueError for other names.
    """
    number = re.fullmatch(r"(turned|shuffled pixels) (-?[\d.]+)", name)
    if number and number[1] == "turned":
        return digits(rotation=float(number[2]), seed=seed).train
    x, y = digits(seed=seed).train
    generator = torch.Generator().manual_seed(1000 + seed)
    if name == "mirrored":
        return x.view(-1, 8, 8).flip(2).flatten(1), y
    if name == "negative":
        return 1 - x, y
    if number or name == "shuffled pixels":
        generator.manual_seed(1000 + seed if not number else 3000 + int(number[2]))
        return x[:, torch.randperm(64, generator=generator)], y
    if name == "noise":
        return torch.rand(x.shape, generator=generator), torch.randint(10, y.shape, generator=generator)
    raise ValueError(f"a source is one of {', '.join(SOURCES)}, or 'turned' with degrees; found {name!r}")


@cache
def source_base(name: str, seed: int) -> nn.Sequential:
    """The network trained 400 steps on a source, with a fresh head; "nothing": not trained at all."""
    with torch.random.fork_rng([]):
        model = network(seed)
        if name != "nothing":
            for _ in train(model, Batches(*source(name, seed), seed=seed), 400, 3e-3, device="cpu"):
                pass
        torch.manual_seed(seed + 1000)
        model[4] = nn.Linear(model[4].in_features, 10)
    return model


def few(x: Tensor, y: Tensor, shots: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`shots` samples of each class, drawn by the seed; all of them where a class has fewer. A larger draw contains the smaller one."""
    generator = torch.Generator().manual_seed(seed)
    places = []
    for k in y.unique().tolist():
        of = (y == k).nonzero()[:, 0]
        places.append(of[torch.randperm(len(of), generator=generator)[:shots]])
    places = torch.cat(places)
    return x[places], y[places]


def transfer_task(name: str, shots: int = 3, steps: int = 100) -> Task:
    """Read upright digits after `shots` labelled images of each, from a base that knows the source `name`. Accuracy on all test images."""
    return Task(
        name=f"upright digits, {shots} of each, from {name}",
        base=lambda seed: source_base(name, seed),
        train=lambda seed: Batches(*few(*digits(seed=seed).train, shots, seed), batch_size=32, seed=seed),
        metric=lambda model, seed: {"accuracy": evaluate(model, [digits(seed=seed).test], "cpu")},
        targets=["0", "2"],
        head=(HEAD,),
        lr={"linear probe": 1e-2, "LoRA": 1e-2, "full fine-tuning": 3e-3},
        steps=steps,
    )
