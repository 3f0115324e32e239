"""Images and captions: which of these captions fits? Two towers that meet late, and a world in which both sides change.

Real handwritten digits (`lora_lab.data.digits`) with captions of a small grammar. The base has read upright digits with plain captions, "a
three", "the digit three". The task turns the pictures by 90 degrees and says the number by its neighbours, "one more than two", "one less
than four". The images are of the UCI set that comes with scikit-learn (BSD); the captions are made here.

    picture x (n, 64) ── image tower ── u / |u| (n, d)
                                                       cosines (n, m): where they are largest, the caption fits
    words t (m, T) ── mean of word vectors ── text tower ── v / |v| (m, d)

The caption is a bag of words: the mean of its word vectors forgets their order, and no adapter can bring back what is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..comparing import Task
from ..data import digits
from ..train import train

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLAIN = ("a {}", "the digit {}", "a handwritten {}", "number {}")
WORDS = ("a", "the", "digit", "handwritten", "number", "more", "less", "than", "not", *NUMBERS)
LONGEST = 5
IMAGE_TOWER = ("image.0", "image.2", "image.4")
TEXT_TOWER = ("words", "text.0", "text.2", "text.4")


def encode(captions: Sequence[str]) -> Tensor:
    """Word numbers (captions, LONGEST), from 1; 0 fills up. Raises ValueError for a word that the model has no vector for."""
    rows = []
    for caption in captions:
        words = caption.split()
        unknown = [word for word in words if word not in WORDS]
        if unknown or not 0 < len(words) <= LONGEST:
            what = f"the words {', '.join(unknown)}" if unknown else f"{len(words)} words"
            raise ValueError(f"a caption has 1 to {LONGEST} of these words: {' '.join(WORDS)}; found {what} in {caption!r}")
        rows.append([WORDS.index(word) + 1 for word in words] + [0] * (LONGEST - len(words)))
    return torch.tensor(rows)


class PairModel(nn.Module):
    """Cosines (n, m) between n pictures (n, 64) and m captions (m, T): an image tower, word vectors, a text tower, and nothing between them."""

    def __init__(self, d: int = 32, width: int = 64):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, d))
        self.words = nn.Embedding(len(WORDS) + 1, d, padding_idx=0)
        self.text = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, d))

    def image_vectors(self, x: Tensor) -> Tensor:
        """(n, d), before they are brought to length 1"""
        return self.image(x)

    def caption_vectors(self, t: Tensor) -> Tensor:
        """(m, d), before they are brought to length 1"""
        count = (t != 0).sum(1, keepdim=True)
        return self.text(self.words(t).sum(1) / count)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return F.normalize(self.image_vectors(x), dim=-1) @ F.normalize(self.caption_vectors(t), dim=-1).T


def plain_captions() -> list[tuple[str, int]]:
    """All plain captions with their digit: 40 of them."""
    return [(text.format(NUMBERS[k]), k) for k in range(10) for text in PLAIN]


def neighbour_captions() -> list[tuple[str, int]]:
    """All captions that name a digit by its neighbour, with the digit: 18 of them, two for each of 1 to 8."""
    more = [(f"one more than {NUMBERS[k - 1]}", k) for k in range(1, 10)]
    return sorted(more + [(f"one less than {NUMBERS[k + 1]}", k) for k in range(9)], key=lambda caption: caption[1])


CAPTIONS = {"plain": plain_captions, "neighbours": neighbour_captions}
TEMPERATURE = 0.1  # cosines lie between -1 and 1: divided by this, a softmax can be sure of itself


def pair_loss(model: nn.Module, batch) -> Tensor:
    """-log of the probability (nats) of a right caption for each picture, and of a right picture for each caption; the mean of both.

    batch: pictures (n, 64), captions (n, T), their digits (n,). Several captions of a batch may say the same digit: all of them are right.
    """
    x, t, y = batch
    logits = model(x, t) / TEMPERATURE
    right = logits.masked_fill(y[:, None] != y[None], -torch.inf)
    return sum((logits.logsumexp(dim) - right.logsumexp(dim)).mean() for dim in (0, 1)) / 2


class PairBatches:
    """Endless batches (pictures, captions, digits); each picture meets a caption drawn from those of its digit.

    shuffled: the caption is that of any other picture. There is nothing to be learned then: the control.
    """

    def __init__(self, x: Tensor, y: Tensor, captions: Sequence[tuple[str, int]], batch_size: int = 64, seed: int = 0, shuffled: bool = False):
        self.x, self.y, self.batch_size, self.seed, self.shuffled = x, y, batch_size, seed, shuffled
        self.captions = encode([text for text, _ in captions])
        of = [[n for n, (_, digit) in enumerate(captions) if digit == k] for k in range(10)]
        self.count = torch.tensor([len(numbers) for numbers in of])
        self.of = torch.tensor([numbers + [-1] * (max(map(len, of)) - len(numbers)) for numbers in of])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for chunk in torch.randperm(len(self.x), generator=generator).split(self.batch_size):
                y = self.y[chunk]
                said = y[torch.randperm(len(y), generator=generator)] if self.shuffled else y
                draw = (torch.rand(len(y), generator=generator) * self.count[said]).long()
                yield self.x[chunk], self.captions[self.of[said, draw]], said


def read_captions(model: nn.Module, x: Tensor, captions: Sequence[tuple[str, int]]) -> Tensor:
    """The digit (n,) of the caption that fits each picture best."""
    with torch.no_grad():
        best = model(x, encode([text for text, _ in captions])).argmax(1)
    return torch.tensor([digit for _, digit in captions])[best]


@cache
def pair_base(seed: int) -> PairModel:
    """Both towers, trained together on upright digits with plain captions (400 steps, about two seconds)."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = PairModel()
        for _ in train(model, PairBatches(*digits(seed=seed).train, plain_captions(), seed=seed), 400, 3e-3, loss=pair_loss, device="cpu"):
            pass
    return model


def pair_task(rotation: float = 90, captions: str = "neighbours", *, shuffled: bool = False, steps: int = 300) -> Task:
    """Which caption fits? Accuracy: the share of test pictures whose best caption, of all there are, says their digit.

    rotation  of the pictures, in degrees; 0: as the base knows them
    captions  "neighbours", or "plain" as the base knows them
    shuffled  train on captions that belong to other pictures
    """
    if captions not in CAPTIONS:
        raise ValueError(f"captions are {' or '.join(map(repr, CAPTIONS))}; found {captions!r}")
    said = CAPTIONS[captions]()

    def metric(model, seed):
        x, y = digits(rotation=rotation, seed=seed).test
        return {"accuracy": (read_captions(model, x, said) == y).float().mean().item()}

    return Task(
        name="which caption fits" + (" (captions shuffled)" if shuffled else ""),
        base=pair_base,
        train=lambda seed: PairBatches(*digits(rotation=rotation, seed=seed).train, said, seed=seed, shuffled=shuffled),
        metric=metric,
        targets=IMAGE_TOWER + TEXT_TOWER,
        probe=("image.4", "text.4"),
        loss=pair_loss,
        lr={"linear probe": 1e-2, "LoRA": 1e-2, "full fine-tuning": 3e-3},
        steps=steps,
    )
