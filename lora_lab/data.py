"""The lab's data sets, one function each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .files import shipped


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of a data set, each a pair (x, y) of tensors with the samples along dimension 0."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(classes: Iterable[int] = range(10), rotation: float = 0.0, seed: int = 0) -> Split:
    """Real handwritten digits: 8 x 8 grey images, from the copy of the UCI set (1,797 images) that comes with scikit-learn.

    classes   the digits to keep; labels stay the digits themselves
    rotation  degrees counter-clockwise; exact for multiples of 90, linear interpolation otherwise
    seed      decides the split: 60 % train, 15 % validation, 25 % test, the same share of every digit. For one seed an image is in the same
              part whatever `classes` and `rotation` are, so no part of one task leaks into another part of a second one

    x: float32 (n, 64) between 0 (paper) and 1 (ink), row by row; y: int64 (n,). Raises ValueError for a class that is no digit.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    classes = list(classes)
    if not classes or not set(classes) <= set(range(10)):
        raise ValueError(f"classes are digits 0 to 9, at least one; found {classes}")
    if not math.isfinite(rotation):
        raise ValueError(f"rotation is a number of degrees; found {rotation}")
    bunch = load_digits()
    images, labels = bunch.images / 16.0, bunch.target
    rest, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
    train, validation = train_test_split(rest, test_size=0.2, stratify=labels[rest], random_state=seed)
    images = torch.from_numpy(_rotated(images, rotation)).float().flatten(1)
    labels = torch.from_numpy(labels).long()
    wanted = torch.isin(labels, torch.tensor(classes))

    def part(indices: list[int]) -> tuple[Tensor, Tensor]:
        indices = torch.tensor(sorted(indices))
        indices = indices[wanted[indices]]
        return images[indices], labels[indices]

    return Split(part(train), part(validation), part(test))


def _rotated(images, degrees: float):
    import numpy as np

    quarter, rest = divmod(degrees, 90)
    if rest == 0:
        return np.ascontiguousarray(np.rot90(images, int(quarter) % 4, axes=(1, 2)))
    from scipy.ndimage import rotate  # comes with scikit-learn

    return rotate(images, degrees, axes=(2, 1), reshape=False, order=1, mode="grid-constant")


@dataclass(frozen=True)
class Stories:
    """Texts to adapt a language model to, to test it on, and others to see what it forgets; one paragraph a line."""

    train: str
    test: str
    ordinary: str


def sherlock_holmes() -> Stories:
    """Three stories of Arthur Conan Doyle to learn from, the beginning of a fourth to test on, 26 kB of another author as `ordinary`.

    The pocket model has read neither Doyle nor that other book (data/sherlock-holmes/README.md). `<|endoftext|>` stands between stories.
    """
    folder = shipped("sherlock-holmes")
    return Stories(*((folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "test", "ordinary")))


class Batches:
    """Endless shuffled mini-batches (x, y): every sample once an epoch, in an order that `seed` and the epoch decide.

    Iterating twice gives the same batches; `from_step(k)` begins at batch k at once, which is how a resumed run finds its place.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int = 64, seed: int = 0):
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x and y hold the same number of samples, at least one; found {len(x)} and {len(y)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; found {batch_size}")
        self.x, self.y, self.batch_size = x, y, min(batch_size, len(x))
        self.seed = int(seed)  # a table's seed is an int64 of numpy, which overflows below

    @property
    def per_epoch(self) -> int:
        """Batches an epoch; the last one may be smaller."""
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.from_step(0)

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, skip = divmod(step, self.per_epoch)
        while True:
            # Its own generator: drawing batches must not move the random numbers of dropout or init.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(len(self.x), generator=generator)
            for chunk in order.split(self.batch_size)[skip:]:
                yield self.x[chunk], self.y[chunk]
            epoch, skip = epoch + 1, 0
