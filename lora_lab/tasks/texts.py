"""Texts with labels as a `Task`: what topics, sentiment, records and a CSV file of the user's own have in common."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..comparing import Task
from ..data import Batches
from ..encoder import Reader, encode, load_encoder

TARGETS = ("query", "value")
# Probe and LoRA bear many rates; full fine-tuning is touchy, and chooses between two on the validation part of the first seed.
RATES = {"linear probe": 3e-2, "LoRA": 6e-3, "full fine-tuning": (3e-4, 1e-3)}


@dataclass(frozen=True)
class Texts:
    """Labelled texts. labels[i] names the class of texts[i]; texts of one group stay on one side of a split (None: each for itself)."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...] | None = None

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.labels))

    @property
    def numbers(self) -> Tensor:
        """(n,) int64: the place of each label in `classes`."""
        place = {name: k for k, name in enumerate(self.classes)}
        return torch.tensor([place[label] for label in self.labels])

    def split(self, seed: int) -> tuple[list[int], list[int], list[int]]:
        """Rows to train on, to choose settings with, and to test on: about 60, 15 and 25 % of the groups of each class."""
        generator = torch.Generator().manual_seed(seed)
        groups = self.groups or tuple(map(str, range(len(self.texts))))
        parts: tuple[list[int], list[int], list[int]] = ([], [], [])
        side: dict[str, int] = {}
        for name in self.classes:
            mine = sorted({g for g, label in zip(groups, self.labels, strict=True) if label == name} - set(side))
            order = [mine[i] for i in torch.randperm(len(mine), generator=generator).tolist()]
            first, second = max(1, round(0.25 * len(order))), max(1, round(0.4 * len(order)))
            side |= {g: 2 if k < first else 1 if k < second else 0 for k, g in enumerate(order)}
        for i, g in enumerate(groups):
            parts[side[g]].append(i)
        return parts


def read_csv(path: str | os.PathLike, most: int = 20_000) -> Texts:
    """Texts from a CSV file in UTF-8 with the columns `text` and `label` in its first line; other columns are left alone.

    Raises FileNotFoundError, and ValueError with what to change: a missing column, no rows, an empty text or label, fewer than two labels, a
    label with fewer than 8 texts (each of three parts needs some), more than `most` rows, another encoding.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.resolve()}")
    try:
        # utf-8-sig: Excel writes a mark in front of the first column's name.
        lines = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 (byte {error.start}): save it as 'CSV UTF-8', or convert it, for example from latin-1") from None
    rows = csv.DictReader(lines.splitlines(keepends=True))
    names = [name.strip() for name in rows.fieldnames or []]
    if lacking := {"text", "label"} - set(names):
        hint = "; its columns seem to be separated by ';', use ','" if len(names) == 1 and ";" in names[0] else ""
        raise ValueError(f"{path} has no column {' and no column '.join(sorted(lacking))}; found {', '.join(names) or 'nothing'}{hint}")
    rows.fieldnames = names
    texts, labels = [], []
    for number, row in enumerate(rows, 1):
        text, label = (row["text"] or "").strip(), (row["label"] or "").strip()
        if not text or not label:
            raise ValueError(f"{path}, row {number}: the {'label' if text else 'text'} is empty. Fill it in or take the row out")
        texts.append(text)
        labels.append(label)
        if number > most:
            raise ValueError(f"{path} has more than {most:,} rows, which this notebook can't train on: give a sample of them")
    counts = Counter(labels)
    if len(counts) < 2:
        raise ValueError(f"{path} has {'one label only, ' + repr(labels[0]) if labels else 'no rows'}: to tell classes apart takes two")
    few = [name for name, n in counts.items() if n < 8]
    if few:
        more = f"; and {len(counts)} labels in {len(labels)} rows: is `label` really the column of the classes?" if len(few) > 10 else ""
        raise ValueError(f"{path}: {', '.join(map(repr, few[:5]))} stands beside fewer than 8 texts; give more, or take it out{more}")
    return Texts(tuple(texts), tuple(labels))


def scores(truth: Sequence[int], guess: Sequence[int]) -> dict[str, float]:
    """Accuracy; recall and F1 of each class, averaged with equal weight ("macro"). A class that is never guessed has F1 = 0."""
    from sklearn.metrics import f1_score, recall_score

    truth, guess = [int(v) for v in truth], [int(v) for v in guess]
    return {
        "accuracy": sum(t == g for t, g in zip(truth, guess, strict=True)) / len(truth),
        "recall": float(recall_score(truth, guess, average="macro", zero_division=0)),
        "F1": float(f1_score(truth, guess, average="macro", zero_division=0)),
    }


@torch.no_grad()
def guesses(model: nn.Module, ids: Tensor, batch: int = 64) -> Tensor:
    """(n,) the class with the highest score. Raises nothing: of equal scores the first wins."""
    model.eval()
    return torch.cat([model(part).argmax(-1) for part in ids.split(batch)])


def text_task(
    name: str, data: Texts, *, encoder: str | os.PathLike | None = None, length: int = 64, steps: int = 120, batch: int = 16,
    targets: Sequence[str] = TARGETS, r: int = 4, alpha: float = 8, lr=None,
) -> Task:  # fmt: skip
    """A `Task` of classes on top of the pocket encoder, or of a BERT in the folder `encoder`. The seed decides the split.

    length  tokens at most; longer texts lose their end. r, alpha, targets: LoRA's. Raises as `load_encoder` does.
    """
    body, tokenizer = load_encoder(encoder)
    length = min(length, body.config.max_position_embeddings)
    ids, y = encode(tokenizer, data.texts, length), data.numbers

    def on(part: int):
        def judge(model: nn.Module, seed: int) -> dict[str, float]:
            rows = data.split(seed)[part]
            return scores(y[rows], guesses(model, ids[rows]))

        return judge

    def batches(seed: int) -> Batches:
        rows = data.split(seed)[0]
        return Batches(ids[rows], y[rows], batch, seed)

    return Task(
        name, base=lambda seed: Reader(body, len(data.classes)), train=batches, metric=on(2), targets=list(targets), head=("head",),
        validate=lambda model, seed: on(1)(model, seed)["accuracy"], lr=dict(lr or RATES), steps=steps, warmup=steps // 10, r=r, alpha=alpha,
    )  # fmt: skip


def reread(model: nn.Module, data: Texts, seed: int, change, *, encoder: str | os.PathLike | None = None, length: int = 64) -> dict[str, float]:
    """Scores of a model on the test texts of its seed after change(text) -> text: the way to write a control."""
    _, tokenizer = load_encoder(encoder)
    rows = data.split(seed)[2]
    return scores(data.numbers[rows], guesses(model, encode(tokenizer, [change(data.texts[i]) for i in rows], length)))


def bag_of_words(data: Texts, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, list[float]]:
    """{score: one number a seed} of TF-IDF of single words + logistic regression, on the same splits. Knows no order of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    found: dict[str, list[float]] = {}
    y = data.numbers.numpy()
    for seed in seeds:
        train, _, test = data.split(seed)
        model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
        model.fit([data.texts[i] for i in train], y[train])
        for key, value in scores(y[test], model.predict([data.texts[i] for i in test])).items():
            found.setdefault(key, []).append(value)
    return found
