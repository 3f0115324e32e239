"""Clips of a moving digit, and two questions about them: which digit, and which way does it move?

    task = videos_task("which way")        for `lora_lab.comparing.finetune_and_compare`

Data card. A digit of `lora_lab.data.digits` moves over a field of 12 x 12 whose edges meet: what leaves on the right comes in on the left. It
starts anywhere and moves 1 or 2 pixels a frame to the right, to the left, down or up, for 5 frames. So no single frame says which way,
and the same clip backwards is a clip of the other way. A seed decides the split of the digits, starts and ways. The base was trained to tell the
digits 0 to 4 apart in such clips; "which digit" asks for 5 to 9, "which way" for the way of any digit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..comparing import Task
from ..data import Batches, digits
from ..train import evaluate, linear_schedule, train

QUESTIONS = ("which way", "which digit")
WAYS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}  # rows, columns
FIELD, FRAMES = 12, 5


@dataclass(frozen=True)
class Clips:
    """frames float32 (n, 5, 12, 12) from 0 to 1; digit (n,) 0 to 9; way (n,), numbers into WAYS."""

    frames: Tensor
    digit: Tensor
    way: Tensor


def clips(part: tuple[Tensor, Tensor], n: int, seed: int, speeds: Sequence[int] = (1, 2)) -> Clips:
    """n clips of digits drawn from `part`, (x, y) as `digits` gives them. speeds: pixels a frame, drawn evenly."""
    x, y = part
    generator = torch.Generator().manual_seed(seed)

    def draw(below, *shape):
        return torch.randint(below, shape, generator=generator)

    which, way, start = draw(len(x), n), draw(len(WAYS), n), draw(FIELD, n, 2)
    speed = torch.tensor(tuple(speeds))[draw(len(speeds), n)]
    field = torch.zeros(n, FIELD, FIELD)
    field[:, :8, :8] = x[which].view(-1, 8, 8)
    step = torch.tensor(list(WAYS.values()))[way] * speed[:, None]
    offset = start[:, None] + torch.arange(FRAMES)[:, None] * step[:, None]  # (n, 5, 2)
    rows, columns = ((torch.arange(FIELD) - offset[..., axis, None]) % FIELD for axis in (0, 1))
    frames = field[torch.arange(n)[:, None, None, None], rows[..., :, None], columns[..., None, :]]
    return Clips(frames, y[which], way)


class ClipNet(nn.Module):
    """Looks at each two neighbouring frames as one image of two channels, then takes the mean over places and pairs.

    Its edges meet, as those of the field do, so it can't tell where a digit is; what changed from one frame to the next it can.
    """

    def __init__(self, classes: int, width: int = 16):
        super().__init__()
        around = {"padding": 1, "padding_mode": "circular"}
        self.conv1 = nn.Conv2d(2, width, 3, **around)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, **around)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, **around)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, frames: Tensor) -> Tensor:
        pairs = frames.unfold(1, 2, 1).movedim(-1, 2)  # (n, 4, 2, 12, 12)
        h = pairs.flatten(0, 1)
        for conv in (self.conv1, self.conv2, self.conv3):
            h = F.relu(conv(h))
        return self.head(h.mean((2, 3)).view(*pairs.shape[:2], -1).mean(1))


def _of(split, low: int, high: int):
    x, y = split
    wanted = (y >= low) & (y < high)
    return x[wanted], y[wanted]


@cache
def _pretrained(seed: int, steps: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ClipNet(5)
        shown = clips(_of(digits(seed=seed).train, 0, 5), 2000, seed)
        batches = Batches(shown.frames, shown.digit, batch_size=32, seed=seed)
        for _ in train(model, batches, steps, linear_schedule(6e-3, steps, warmup=20), device="cpu"):
            pass
    return model


def videos_base(question: str = "which way", seed: int = 0, quick: bool = False) -> nn.Module:
    """A copy of the base, which tells 0 to 4 apart, with a fresh head for the question."""
    if question not in QUESTIONS:
        raise ValueError(f"a question is one of {', '.join(QUESTIONS)}; found {question!r}")
    model = copy.deepcopy(_pretrained(seed, 120 if quick else 400))
    model.head = nn.Linear(model.head.in_features, len(WAYS) if question == "which way" else 5)
    return model


@cache
def videos_data(question: str, seed: int, part: str = "test") -> tuple[Tensor, Tensor]:
    """(frames, answers) of "train", "validation" or "test". Which digits are in a part `digits` decides, by the seed."""
    low = 0 if question == "which way" else 5
    n = {"train": 1500, "validation": 300, "test": 400}[part]
    shown = clips(_of(getattr(digits(seed=seed), part), low, 10), n, seed + 1000)
    return shown.frames, shown.way if question == "which way" else shown.digit - 5


def videos_task(question: str = "which way", quick: bool = False) -> Task:
    """A question about the clips as a task. quick: shorter runs and one learning rate."""
    # At 0.02 LoRA on seed 2 ends with dead ReLUs and guesses; gradients clipped at 0.3 keep 0.01 and 250 steps safe on seeds 0 to 3.
    rates = {"linear probe": (0.03, 0.1), "LoRA": (0.01, 0.005), "full fine-tuning": (0.003, 0.006)}
    return Task(
        name=f"moving digits: {question}",
        base=lambda seed: videos_base(question, seed, quick),
        train=lambda seed: Batches(*videos_data(question, seed, "train"), batch_size=32, seed=seed),
        metric=lambda model, seed: {"accuracy": evaluate(model, [videos_data(question, seed)], "cpu")},
        validate=None if quick else lambda model, seed: evaluate(model, [videos_data(question, seed, "validation")], "cpu"),
        targets=("conv1", "conv2", "conv3"),
        head=("head",),
        lr={way: rate[0] if quick else rate for way, rate in rates.items()},
        steps=80 if quick else 250,
        settings={"clip": 0.3},
    )
