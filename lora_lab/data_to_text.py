"""Data to text: from `name : Blue Spice | Type : coffee shop | area : riverside` to a sentence about it.

    task = load_task()                                      the E2E challenge, or the lab's own lighthouses
    examples = encode(task.train, tokenizer)                tokens, the loss on the reference only
    for step in train(model, TextBatches(examples), ...):   `train` and any GPT-2
    task.score(meanings, texts)                             BLEU, ROUGE-L, slot error rate

A line of data is `meaning||reference`; a meaning is `slot : value | slot : value ...`. The model reads the meaning's tokens and then
end-of-text, and has to write " reference" and end-of-text, as in the LoRA paper's experiments.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .e2e import E2E_RULES, e2e_template
from .files import FetchError, cache_folder, fetch
from .lighthouses import LIGHTHOUSE_RULES, lighthouse_template, lighthouses
from .text_scores import Slot, bleu, rouge_l, slot_error_rate

# The LoRA paper's own copy of the E2E challenge (Novikova, Dušek, Rieser 2017; CC BY-SA 4.0), pinned.
E2E_URL = "https://raw.githubusercontent.com/microsoft/LoRA/c4593f060e6a368d7bb5af5273b8e42810cdef90/examples/NLG/data/e2e/"
E2E_SHA256 = {
    "train.txt": "eae319082237310913d9f37f6a891d48fb3f821f29d86870d2cb4f92ddd72c5a",
    "valid.txt": "ba963113c8401d3d26216c0dc0a6dae1ea6ea927de3bf830e32c41f65401c80d",
    "test.txt": "81b1bcd40c4f12845ec4eb61a77bf43765d112483cd9b2f91ef10bfc1b3d8f13",
}
IGNORED = -100  # torch's cross-entropy leaves these labels out


class DataError(ValueError):
    """A data file that is broken; the message says which line, what is wrong with it and what to do."""


class Example(NamedTuple):
    """One line: what is to be said, and one way in which somebody said it."""

    meaning: str
    reference: str


@dataclass(frozen=True)
class Task:
    """A data-to-text task: its examples, and what is needed to judge a text.

    rules      slot -> how its values are found in a text
    template   slots -> a text by one fixed wording: the score to beat
    """

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    rules: Mapping[str, Slot] = field(repr=False)
    template: Callable[[Mapping[str, str]], str] = field(repr=False)

    def score(self, meanings: Sequence[str], texts: Sequence[str], part: str = "test") -> dict[str, float]:
        """{"bleu", "rouge_l", "slot_error_rate"}, each in percent, of one text per meaning; meanings of `part` have their references there.

        Raises ValueError if the two have different lengths or a meaning is not in that part.
        """
        if len(meanings) != len(texts):
            raise ValueError(f"one text per meaning; found {len(meanings)} meanings and {len(texts)} texts")
        known = grouped(getattr(self, part))
        missing = [m for m in meanings if m not in known]
        if missing:
            raise ValueError(f"{len(missing)} of {len(meanings)} meanings are not in the {part} part, the first: {missing[0]!r}")
        references = [known[m] for m in meanings]
        return {
            "bleu": bleu(texts, references), "rouge_l": rouge_l(texts, references),
            "slot_error_rate": slot_error_rate([slots(m) for m in meanings], texts, self.rules),
        }


def load_task(name: str = "auto", folder: str | os.PathLike | None = None) -> Task:
    """A task by name.

    "e2e"          restaurants, the paper's task: 42,061 + 4,672 + 4,693 lines, 630 test meanings. Taken from `folder` (train.txt, valid.txt,
                   test.txt), else from $LORA_LAB_DATA/e2e, else downloaded once (12 MB). The sha256 of every file is checked
    "lighthouses"  the lab's own: 3,500 + 420 + 840 lines, 120 test meanings; needs no file and no network
    "auto"         "e2e" where it can be had, else "lighthouses", with a warning that says so

    Raises ValueError for another name, DataError for a file that is not the one published, FetchError if "e2e" can not be had.
    """
    if name not in ("auto", "e2e", "lighthouses"):
        raise ValueError(f"no task is called {name!r}; there are 'e2e', 'lighthouses' and 'auto'")
    if name != "lighthouses":
        try:
            parts = {part: read_examples(e2e_file(file, folder)) for part, file in zip(_PARTS, E2E_SHA256, strict=True)}
            return Task("e2e", **parts, rules=_with_names(E2E_RULES, parts.values()), template=e2e_template)
        except FetchError as error:
            if name == "e2e":
                raise
            warnings.warn(f"E2E could not be had, so this is the lab's own task, lighthouses; figures differ. {error}", stacklevel=2)
    parts = {part: [Example(*row) for row in rows] for part, rows in lighthouses().items()}
    return Task("lighthouses", **parts, rules=LIGHTHOUSE_RULES, template=lighthouse_template)


_PARTS = ("train", "validation", "test")


def e2e_file(file: str, folder: str | os.PathLike | None = None) -> Path:
    """The path of one of E2E's files, its checksum compared: in `folder`, else in $LORA_LAB_DATA/e2e, else downloaded once."""
    from hashlib import sha256

    if folder is None and os.environ.get("LORA_LAB_DATA"):
        folder = Path(os.environ["LORA_LAB_DATA"]) / "e2e"
        folder = folder if folder.is_dir() else None
    if folder is None:
        return fetch(E2E_URL + file, E2E_SHA256[file], folder=cache_folder() / "e2e")
    path = Path(folder) / file
    if not path.is_file():
        raise DataError(f"there is no {path}. The folder must hold {', '.join(E2E_SHA256)} from {E2E_URL}")
    found = sha256(path.read_bytes()).hexdigest()
    if found != E2E_SHA256[file]:
        raise DataError(
            f"{path} is not the published file: its sha256 begins with {found[:12]}, that of {E2E_URL}{file} with {E2E_SHA256[file][:12]}. "
            "Copy it again, or read a file of your own with read_examples(path)"
        )
    return path


def _with_names(rules: Mapping[str, Slot], parts: Iterable[list[Example]]) -> dict[str, Slot]:
    """The rules with every name that the data has."""
    names: dict[str, set[str]] = {slot: set() for slot, rule in rules.items() if rule.names}
    for meaning in {example.meaning for part in parts for example in part}:
        for slot, value in slots(meaning).items():
            if slot in names:
                names[slot].add(value)
    return {slot: replace(rule, names=frozenset(names[slot])) if slot in names else rule for slot, rule in rules.items()}


def read_examples(path: str | os.PathLike) -> list[Example]:
    """The lines `meaning||reference` of a UTF-8 file. Raises DataError with the number of the first broken line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return parse_examples(text.split("\n"), str(path))


def parse_examples(lines: Iterable[str], where: str = "line") -> list[Example]:
    """`meaning||reference` lines -> examples; empty lines at the end don't matter. Raises DataError with the number of the first broken one."""
    lines = [line.rstrip("\r\n") for line in lines]
    while lines and not lines[-1].strip():
        lines.pop()
    examples = []
    for number, line in enumerate(lines, 1):
        parts = line.split("||")
        if len(parts) != 2:
            raise DataError(f"{where}:{number}: a line is meaning||reference, with one ||; found {len(parts) - 1} in {_short(line)}")
        meaning, reference = parts[0].strip(), parts[1].strip()
        if not reference:
            raise DataError(f"{where}:{number}: the reference after || is empty. Remove the line or write one: {_short(line)}")
        try:
            slots(meaning)
        except ValueError as error:
            raise DataError(f"{where}:{number}: {error}") from error
        examples.append(Example(meaning, reference))
    if not examples:
        raise DataError(f"{where}: no example in it; lines are meaning||reference")
    return examples


def slots(meaning: str) -> dict[str, str]:
    """The slots of a meaning, in its order. Raises ValueError for a part that is no `slot : value` and for a slot that comes twice.

    >>> slots("name : The Mill | area : riverside")
    {'name': 'The Mill', 'area': 'riverside'}
    """
    found: dict[str, str] = {}
    for part in meaning.split("|"):
        slot, colon, value = (piece.strip() for piece in part.partition(" : "))
        if not (slot and colon and value):
            raise ValueError(f"a meaning is `slot : value | slot : value`; found {_short(part)} in {_short(meaning)}")
        if slot in found:
            raise ValueError(f"the slot {slot!r} stands twice in {_short(meaning)}")
        found[slot] = value
    return found


def grouped(examples: Iterable[Example]) -> dict[str, list[str]]:
    """meaning -> all its references, meanings in the order in which they first come."""
    groups: dict[str, list[str]] = {}
    for meaning, reference in examples:
        groups.setdefault(meaning, []).append(reference)
    return groups


def _short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 80 else text[:77] + "...")


# ---- tokens -------------------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Token ids of a prompt and its continuation, and how many of them are the prompt."""

    ids: list[int]
    prompt: int


def prompt(meaning: str, tokenizer) -> str:
    """What the model reads before it writes: the meaning, then end-of-text."""
    return meaning + tokenizer.eos_token


def encode(examples: Sequence[Example], tokenizer, context: int = 1024) -> list[Encoded]:
    """Tokens of each example: meaning, end-of-text, " reference", end-of-text.

    context   the most tokens the model can take. Raises ValueError for the first example that has more, with its numbers.
    """
    if not examples:
        return []
    meanings = list(dict.fromkeys(e.meaning for e in examples))
    prompts = dict(zip(meanings, tokenizer([prompt(m, tokenizer) for m in meanings], add_special_tokens=False)["input_ids"], strict=True))
    answers = []
    for at in range(0, len(examples), 1000):  # at once, E2E's 42,061 references would take 300 MB for what is thrown away
        answers += tokenizer([" " + e.reference for e in examples[at : at + 1000]], add_special_tokens=False)["input_ids"]
    encoded = []
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True), 1):
        start = list(prompts[example.meaning])
        length = len(start) + len(answer) + 1
        if length > context:
            raise ValueError(
                f"example {number}: {len(start)} tokens of meaning and {len(answer) + 1} of reference are {length}, and the model's context is "
                f"{context}. Leave it out or shorten it: {_short(example.meaning)}"
            )
        encoded.append(Encoded(start + list(answer) + [tokenizer.eos_token_id], len(start)))
    return encoded


def tensors(batch: Sequence[Encoded], pad: int = 0) -> dict[str, Tensor]:
    """{"input_ids", "labels"}, int64 (B, T), padded on the right. Labels are -100 on the meaning and on the padding.

    There is no attention mask: what stands right of a token can't reach it in a causal model, and without a mask attention is faster.
    """
    longest = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), longest), pad)
    labels = torch.full((len(batch), longest), IGNORED)
    for row, (tokens, start) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    return {"input_ids": ids, "labels": labels}


class TextBatches:
    """Endless shuffled batches of examples of similar length: every example once an epoch, in an order that `seed` and the epoch decide.

    An epoch is shuffled, cut into pools of `pool` batches, sorted by length within each pool, cut into batches, and the batches are shuffled:
    little padding, and still another company for each example in each epoch. pool=1 is plain shuffling.
    Iterating twice gives the same batches; `from_step(k)` begins at batch k at once, which is how a resumed run finds its place.
    """

    def __init__(self, examples: Sequence[Encoded], batch_size: int = 8, seed: int = 0, pool: int = 64, pad: int = 0):
        if not examples:
            raise ValueError("no example to make batches of")
        if batch_size < 1 or pool < 1:
            raise ValueError(f"batch_size and pool must be at least 1; found {batch_size} and {pool}")
        self.examples, self.batch_size, self.seed, self.pool, self.pad = list(examples), batch_size, seed, pool, pad
        self._lengths = torch.tensor([len(example.ids) for example in self.examples])

    @property
    def per_epoch(self) -> int:
        """Batches an epoch."""
        return -(-len(self.examples) // self.batch_size)

    def plan(self, epoch: int) -> list[Tensor]:
        """The examples of each batch of an epoch, by their numbers."""
        # Its own generator: drawing batches must not move the random numbers of dropout or init.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        batches = []
        for part in torch.randperm(len(self.examples), generator=generator).split(self.batch_size * self.pool):
            batches += part[self._lengths[part].argsort(stable=True)].split(self.batch_size)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def padding(self, epoch: int = 0) -> float:
        """The share of an epoch's tokens that is padding, between 0 and 1."""
        real = int(self._lengths.sum())
        return 1 - real / sum(len(batch) * int(self._lengths[batch].max()) for batch in self.plan(epoch))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.from_step(0)

    def from_step(self, step: int) -> Iterator[dict[str, Tensor]]:
        epoch, skip = divmod(step, self.per_epoch)
        while True:
            for batch in self.plan(epoch)[skip:]:
                yield tensors([self.examples[i] for i in batch.tolist()], self.pad)
            epoch, skip = epoch + 1, 0


# ---- floors -------------------------------------------------------------------------------------------------------------------


def from_template(task: Task, meanings: Iterable[str]) -> list[str]:
    """The template's text for each meaning: what a form that is filled in scores."""
    return [task.template(slots(meaning)) for meaning in meanings]


def nearest_neighbour(task: Task, meanings: Iterable[str]) -> list[str]:
    """The first reference of the training meaning that differs least, with its names and values swapped for those asked for.

    Meanings differ by the slots that one has and the other has not, or has with another value; which name a name slot has does not matter,
    as names are swapped. Ties go to the earlier meaning. What a lookup without any learning scores.
    """
    named = {slot for slot, rule in task.rules.items() if rule.names}
    references = grouped(task.train)

    def shape(known: Mapping[str, str]) -> frozenset[tuple[str, str]]:
        return frozenset((slot, "" if slot in named else value) for slot, value in known.items())

    first: dict[frozenset, str] = {}
    for meaning in references:
        first.setdefault(shape(slots(meaning)), meaning)
    shapes, candidates = list(first), list(first.values())
    texts = []
    for meaning in meanings:
        asked = slots(meaning)
        mine = shape(asked)
        nearest = candidates[min((len(mine ^ other), i) for i, other in enumerate(shapes))[1]]
        known, text = slots(nearest), references[nearest][0]
        swaps = {known[slot]: asked[slot] for slot in known if slot in asked and known[slot] != asked[slot]}
        # through marks, so that a value put in is not swapped again
        for i, old in enumerate(sorted(swaps, key=len, reverse=True)):
            text = text.replace(old, f"\0{i}\0")
        for i, old in enumerate(sorted(swaps, key=len, reverse=True)):
            text = text.replace(f"\0{i}\0", swaps[old])
        texts.append(text)
    return texts
