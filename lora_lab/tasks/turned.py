"""A quarter turn of digits for the small vision transformer of images.py, as a `Task` for many ways at once: adapters, prompts, compression ...

It differs from lab 08c's in three points: the head of ten digits fits and is kept frozen, LoRA sits on every linear layer of the blocks, and what the
adapted model still makes of upright digits is scored as well. One split and one base for all seeds; seeds decide first values and batches.
"""

from __future__ import annotations

from functools import cache

from ..comparing import Task
from ..data import Batches, digits
from ..train import evaluate
from .images import images_base

WIDTH, LINEAR = 32, ("q", "k", "v", "out", "up", "down")
# The best of two or three, a factor of 2 to 3 apart, on validation images.
LR = {
    "full fine-tuning": 6e-3, "last layers": 1e-2, "linear probe": 5e-2, "BitFit": 3e-2, "adapters": 3e-2, "prompt tuning": 1e-2, "prefix tuning": 1e-2,
    "LoRA": 2e-2, "distilled, 1 block": 6e-3,
}  # fmt: skip


def turned(degrees: float = 90, steps: int = 200, quick: bool = False) -> Task:
    """Read turned digits. Scores: accuracy on turned test images, and on upright ones. quick: a base that was pretrained for a shorter time."""
    part = cache(lambda angle: digits(rotation=angle))

    def metric(model):
        return {name: evaluate(model, [part(angle).test], "cpu") for name, angle in (("accuracy", degrees), ("upright", 0))}

    return Task(
        name=f"digits turned by {degrees:g}°, small vision transformer",
        base=lambda seed: images_base("transformer", "quarter turn", quick=quick),
        train=lambda seed: Batches(*part(degrees).train, seed=seed),
        metric=metric, targets=LINEAR, probe=("head",), lr=LR, steps=steps, r=4, alpha=8,
    )  # fmt: skip
