"""A keeper who answers visitors from a list of facts: turns with roles, the loss on the keeper's words alone.

Data card. Dialogues made by the grammar below, seed 0: three facts out of ten things with an hour each, two questions, the second one short
("And the shop?"). A quarter of the questions ask for something that is not among the facts; the keeper then says that they do not know. No list
of facts is in two parts. Made for this lab, MIT. Not for: anything about conversation at large.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comparing import Task
from ..data import Batches
from ..train import token_loss
from . import writing

THINGS = {thing: verb for verb, things in {"leaves": "boat coach train", "opens": "shop garden tower church", "begins": "dance song race"}.items()
          for thing in things.split()}  # fmt: skip
HOURS = "one two three four five six seven eight nine ten eleven twelve".split()
UNKNOWN = "I do not know."
ASKED, ANSWERED = "Visitor:", "Keeper:"


@dataclass(frozen=True)
class Dialogue:
    """facts: thing -> hour; asked: the things of the questions, in turn."""

    facts: dict[str, str]
    asked: tuple[str, ...]

    @property
    def opening(self) -> str:
        return " ".join(sentence(thing, hour) for thing, hour in self.facts.items()) + "\n"

    def question(self, turn: int) -> str:
        thing = self.asked[turn]
        return f"{ASKED} And the {thing}?\n" if turn else f"{ASKED} When does the {thing} {THINGS[thing].removesuffix('s')}?\n"

    def reply(self, turn: int) -> str:
        thing = self.asked[turn]
        return sentence(thing, self.facts[thing]) if thing in self.facts else UNKNOWN

    def turns(self) -> list[tuple[str, str]]:
        """(role, text) in order; roles are "facts", "visitor", "keeper". The texts together are the dialogue."""
        found = [("facts", self.opening)]
        for turn in range(len(self.asked)):
            found += [("visitor", self.question(turn) + ANSWERED), ("keeper", f" {self.reply(turn)}\n")]
        return found

    def prompt(self, turn: int) -> str:
        """All that stands before the keeper's reply of this turn."""
        return "".join(text for _, text in self.turns()[: 2 * turn + 2])


def sentence(thing: str, hour: str) -> str:
    return f"The {thing} {THINGS[thing]} at {hour}."


def dialogues(n: int = 1_200, test: int = 100, seed: int = 0) -> tuple[list[Dialogue], list[Dialogue]]:
    """(training, test)."""
    rng = random.Random(seed)
    found: dict[tuple, Dialogue] = {}
    while len(found) < n + test:
        things = rng.sample(list(THINGS), 3)
        facts = {thing: rng.choice(HOURS) for thing in things}
        others = [thing for thing in THINGS if thing not in facts]
        asked = rng.sample(things, 2)
        asked = tuple(rng.choice(others) if rng.random() < 0.25 else thing for thing in asked)
        found[tuple(facts.items())] = Dialogue(facts, asked)
    found = list(found.values())
    return found[:n], found[n:]


def labelled(turns: Sequence[tuple[str, Sequence[int]]]) -> tuple[list[int], list[int]]:
    """(ids, labels) of turns (role, tokens): labels are the keeper's own tokens, -100 everywhere else."""
    ids = [token for _, tokens in turns for token in tokens]
    labels = [token if role == "keeper" else -100 for role, tokens in turns for token in tokens]
    return ids, labels


def tensors(found: Sequence[Dialogue]) -> tuple[Tensor, Tensor]:
    """x, y: int64 (n, T), padded on the right with end-of-text; y is -100 on all that is not the keeper's."""
    tokenizer = writing.pocket()[1]
    rows = [labelled([(role, tokenizer(text, add_special_tokens=False)["input_ids"]) for role, text in d.turns()]) for d in found]
    longest = max(len(ids) for ids, _ in rows)
    x = torch.tensor([ids + [tokenizer.eos_token_id] * (longest - len(ids)) for ids, _ in rows])
    y = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
    return x, y


def keeper_loss(model, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Nats per token of the keeper's words, for (x, y) as `tensors` makes them."""
    x, y = batch
    return token_loss()(model, {"input_ids": x, "labels": y})


def replies(model, found: Sequence[Dialogue], turn: int = 1) -> list[str]:
    """The keeper's reply of a turn by the model, after the true turns before it."""
    return writing.answer(model, [d.prompt(turn) for d in found], 12)


def reply_scores(found: Sequence[Dialogue], texts: Sequence[str], turn: int = 1) -> dict[str, float]:
    """{"right": share of replies that are right among those that the facts answer, "honest": share of "I do not know." among the others}."""
    known = [text == d.reply(turn) for d, text in zip(found, texts, strict=True) if d.asked[turn] in d.facts]
    unknown = [text == UNKNOWN for d, text in zip(found, texts, strict=True) if d.asked[turn] not in d.facts]
    return {"right": sum(known) / len(known), "honest": sum(unknown) / len(unknown)}


def dialogue_task(steps: int = 60, test: int = 100) -> Task:
    """The keeper by the pocket GPT-2. Scores of the last reply in `test` dialogues: "right" and "honest"."""
    known, held = dialogues(test=test)
    x, y = tensors(known)
    return Task(
        "a keeper's replies", lambda seed: writing.pocket()[0], lambda seed: Batches(x, y, 10, seed=seed),
        lambda model: reply_scores(held, replies(model, held)), targets="all-linear", probe=("lm_head",), loss=keeper_loss,
        steps=steps, warmup=steps // 10, r=8, alpha=16, lr={"linear probe": 3e-3, "LoRA": 1e-2, "full fine-tuning": 1e-3},
    )  # fmt: skip
