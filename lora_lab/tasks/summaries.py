"""From the body of a docstring to its first line: short summaries that people wrote, found in the packages that are installed.

Data card. Functions' docstrings of numpy, scipy, pandas, matplotlib and scikit-learn (all BSD or alike), read from their source files on this
machine, nothing copied into the lab; so other versions give slightly other texts. Kept: a first line of 4 to 14 words, a first paragraph of
15 to 70 words, plain prose. No first line and no body is in two parts (packages repeat themselves). `scitldr` reads abstracts and one-sentence
summaries of papers instead (Cachola et al. 2020, Apache 2.0), where LORA_LAB_DATA has them.
Not for: judging summarisers in general; first lines of docstrings follow a house style.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..comparing import Task
from ..text_scores import rouge_l, rouge_n
from ..train import token_loss
from . import writing

PACKAGES = ("numpy", "scipy", "pandas", "matplotlib", "sklearn")


class Document(NamedTuple):
    """A text and the one line that somebody wrote above it."""

    body: str
    summary: str


_DOCSTRING = re.compile(r'\n[ \t]+def \w+\([^"]{0,1500}?\)[^"\n]{0,80}:\n\s+r?"""(.+?)"""|\ndef \w+\([^"]{0,1500}?\)[^"\n]{0,80}:\n\s+r?"""(.+?)"""', re.DOTALL)
_MARKUP = re.compile(r":\w+:|[`*]+")


def _document(docstring: str) -> Document | None:
    paragraphs = [" ".join(_MARKUP.sub("", part).split()) for part in re.split(r"\n\s*\n", docstring.strip())]
    if len(paragraphs) < 2:
        return None
    summary, body = paragraphs[:2]
    plain = summary.isascii() and body.isascii() and not re.search(r"[<>|=\\{}_~]|--|\.\.|::|%", summary + body)
    if not (plain and summary.endswith(".") and body.endswith(".") and 4 <= len(summary.split()) <= 14 and 15 <= len(body.split()) <= 70):
        return None
    return Document(body, summary)


@functools.cache
def docstrings(packages: tuple[str, ...] = PACKAGES, files: int = 400) -> tuple[Document, ...]:
    """The documents of the packages that are installed, of at most `files` source files each; the same order on every call."""
    found: dict[str, Document] = {}
    bodies = set()
    for package in packages:
        spec = importlib.util.find_spec(package)  # of a top-level package: nothing is imported
        if spec is None or spec.origin is None:
            continue
        home = Path(spec.origin).parent
        paths = sorted(p for p in home.rglob("*.py") if "test" not in str(p.relative_to(home)).lower())
        for path in paths[:: max(1, len(paths) // files)]:
            for inner, outer in _DOCSTRING.findall(path.read_text(encoding="utf-8", errors="ignore")):
                document = _document(inner or outer)
                if document and document.summary not in found and document.body not in bodies:
                    found[document.summary] = document
                    bodies.add(document.body)
    return tuple(found.values())


def scitldr() -> tuple[Document, ...] | None:
    """Abstracts and their summaries, if $LORA_LAB_DATA/scitldr is there; else None."""
    folder = Path(os.environ.get("LORA_LAB_DATA", "")) / "scitldr"
    if not (os.environ.get("LORA_LAB_DATA") and folder.is_dir()):
        return None
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return tuple(Document(" ".join(r["source"]) if isinstance(r["source"], list) else r["source"], r["target"][0]) for r in records if r["target"][0].strip())


def lead_1(body: str) -> str:
    """The first sentence: what a summary has to beat."""
    return re.split(r"(?<=[.!?])\s", body, maxsplit=1)[0]


def split(documents: Sequence[Document], test: int, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """(training, test), shuffled. Raises ValueError where there are not twice as many documents as the test takes."""
    if len(documents) < 2 * test:
        raise ValueError(f"{len(documents)} documents are too few for a test of {test}; is {', '.join(PACKAGES)} installed?")
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    return documents[test:], documents[:test]


def prompt(body: str) -> str:
    return body + "\nIn short:"


def summarise(model, bodies: Sequence[str], max_new_tokens: int = 24) -> list[str]:
    """One line each, greedily; of a body the model reads the first 64 tokens, as in training."""
    tokenizer = writing.pocket()[1]
    cut = [tokenizer.decode(tokenizer(body, add_special_tokens=False)["input_ids"][:64]) for body in bodies]
    return writing.answer(model, [prompt(body) for body in cut], max_new_tokens)


def summary_scores(texts: Sequence[str], summaries: Sequence[str]) -> dict[str, float]:
    """ROUGE-L, ROUGE-1 and ROUGE-2 in percent."""
    references = [[summary] for summary in summaries]
    return {"ROUGE-L": rouge_l(texts, references), "ROUGE-1": rouge_n(texts, references, 1), "ROUGE-2": rouge_n(texts, references, 2)}


def summary_task(steps: int = 50, test: int = 64, documents: Sequence[Document] | None = None) -> Task:
    """First lines for the pocket GPT-2. Scores of `test` held-out documents: ROUGE-L, -1, -2, and the loss of the true first lines."""
    tokenizer = writing.pocket()[1]
    known, held = split(documents or docstrings(), test)

    def examples(part):
        cut = [tokenizer.decode(tokenizer(d.body, add_special_tokens=False)["input_ids"][:64]) for d in part]
        return writing.encoded([prompt(body) for body in cut], [f" {d.summary}" for d in part])

    train, held_out = examples(known), examples(held)

    def metric(model):
        scores = summary_scores(summarise(model, [d.body for d in held]), [d.summary for d in held])
        return scores | {"nats/token": writing.loss_on(model, held_out)}

    return Task(
        "first lines of docstrings", lambda seed: writing.pocket()[0], lambda seed: writing.batches(train, 8, seed), metric, targets="all-linear",
        probe=("lm_head",), lower=("nats/token",), loss=token_loss(), steps=steps, warmup=steps // 10, r=8, alpha=16,
        lr={"linear probe": 3e-3, "LoRA": 5e-3, "full fine-tuning": 1e-3},
    )  # fmt: skip
