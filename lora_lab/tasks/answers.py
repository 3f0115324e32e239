"""Where in the text is the answer? Extractive question answering: the model marks the first and the last word of a span.

Data card. Passages and questions come from a grammar written for this lab: two people, and of each what they did, with which thing, where and
when. A question asks for one of four: who, what, where, when. Its words alone say what kind of thing is asked for; which of the two people is
meant, only a comparison with the passage does. People and things of a test passage occur in training, no passage does.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ..comparing import Task
from ..data import Batches
from ..encoder import PAD, Reader, encode, load_encoder

PEOPLE = "anna tom mary jack ruth peter alice frank nora george helen robert jane henry lucy arthur".split()
THINGS = "lamp kite clock boat drum horse mirror basket violin ladder saddle carpet bell sword trunk wheel".split()
PLACES = "london paris boston rome york dublin vienna bristol oxford berlin chicago florence".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
DEEDS = {"bought": "buy", "sold": "sell", "found": "find", "lost": "lose", "painted": "paint", "broke": "break"}
KINDS = ("who", "what", "where", "when")


@dataclass(frozen=True)
class Question:
    """A passage, a question about it, the answer as it stands in the passage, the character where it begins, and its kind."""

    passage: str
    question: str
    answer: str
    start: int
    kind: str


@cache
def questions(n: int = 900, seed: int = 0) -> tuple[Question, ...]:
    """n questions, a quarter of each kind, every one about a passage of its own."""
    rng = random.Random(seed)
    found = []
    for k in range(n):
        facts = list(zip(*(rng.sample(words, 2) for words in (PEOPLE, THINGS, PLACES, DAYS, list(DEEDS))), strict=True))
        orders = ("on {d} {w} {v} a {t} in {p}.", "{w} {v} a {t} in {p} on {d}.", "in {p} {w} {v} a {t} on {d}.")
        said = [rng.choice(orders).format(w=who, t=thing, p=place, d=day, v=deed) for who, thing, place, day, deed in facts]
        who, thing, place, day, deed = facts[rng.randint(0, 1)]
        kind = KINDS[k % 4]
        asked, answer = {
            "who": (f"who {deed} the {thing}?", who), "what": (f"what did {who} {DEEDS[deed]}?", thing),
            "where": (f"where did {who} {DEEDS[deed]} the {thing}?", place), "when": (f"when did {who} {DEEDS[deed]} the {thing}?", day),
        }[kind]  # fmt: skip
        passage = " ".join(said)
        found.append(Question(passage, asked, answer, passage.index(answer), kind))
    return tuple(found)


def split(n: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """60, 15 and 25 % of the numbers to n: to train, to choose, to test."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[round(0.4 * n) :], order[round(0.25 * n) : round(0.4 * n)], order[: round(0.25 * n)]


def places(tokenizer, rows: Sequence[Question], length: int) -> tuple[Tensor, Tensor]:
    """(ids (n, T), (n, 2) first and last token of each answer). Raises ValueError where an answer is cut off at `length` tokens."""
    ids = encode(tokenizer, [(q.question, q.passage) for q in rows], length)
    batch = tokenizer([q.question for q in rows], [q.passage for q in rows], truncation="only_second", max_length=length, return_offsets_mapping=True)
    spans = []
    for k, q in enumerate(rows):
        end, kinds = q.start + len(q.answer), batch.sequence_ids(k)
        inside = [t for t, (a, b) in enumerate(batch["offset_mapping"][k]) if kinds[t] == 1 and a >= q.start and b <= end]
        if not inside or batch["offset_mapping"][k][inside[-1]][1] != end:
            raise ValueError(f"the answer {q.answer!r} is cut off at {length} tokens, or no whole tokens: raise length")
        spans.append((inside[0], inside[-1]))
    return ids, torch.tensor(spans)


def best_spans(logits: Tensor, longest: int = 6) -> Tensor:
    """(n, 2) from scores (n, T, 2): the first and last token with the highest sum of scores, last not before first, `longest` tokens at most."""
    first, last = logits[..., 0], logits[..., 1]
    total = first[:, :, None] + last[:, None, :]  # (n, T, T)
    steps = torch.arange(total.shape[1])
    width = steps[None, :] - steps[:, None]
    best = total.masked_fill((width < 0) | (width >= longest), -torch.inf).flatten(1).argmax(1)
    return torch.stack([best // total.shape[1], best % total.shape[1]], dim=1)


def normal(text: str) -> list[str]:
    """SQuAD's comparison: lower case, without punctuation and articles."""
    return [word for word in re.sub(r"[^\w\s]", "", text.lower()).split() if word not in ("a", "an", "the")]


def exact_match(found: str, answer: str) -> float:
    return float(normal(found) == normal(answer))


def overlap_f1(found: str, answer: str) -> float:
    """F1 of the words: 2 P R / (P + R), P the share of found words that are right, R the share of right words that were found."""
    a, b = normal(found), normal(answer)
    both = sum((Counter(a) & Counter(b)).values())
    return 2 * both / (len(a) + len(b)) if both else float(a == b)


@torch.no_grad()
def answer(model: nn.Module, tokenizer, rows: Sequence[Question], length: int = 64, batch: int = 64) -> list[str]:
    """What the model marks in each passage, as text; "" if it marks the question or [CLS]."""
    model.eval()
    ids = encode(tokenizer, [(q.question, q.passage) for q in rows], length)
    found = []
    for part in ids.split(batch):
        for row, (a, b) in zip(part, best_spans(model(part)).tolist(), strict=True):
            marked = row[a : b + 1].tolist()
            found.append("" if a <= row.tolist().index(tokenizer.sep_token_id) else tokenizer.decode([t for t in marked if t != PAD]))
    return found


def answer_scores(found: Sequence[str], rows: Sequence[Question]) -> dict[str, float]:
    return {
        "exact match": sum(exact_match(f, q.answer) for f, q in zip(found, rows, strict=True)) / len(rows),
        "F1": sum(overlap_f1(f, q.answer) for f, q in zip(found, rows, strict=True)) / len(rows),
    }


def swapped(rows: Sequence[Question], seed: int = 0) -> list[Question]:
    """The control: every passage gets the question of another one, the answer stays."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [Question(q.passage, rows[order[k]].question, q.answer, q.start, q.kind) for k, q in enumerate(rows)]


def without_question(rows: Sequence[Question]) -> list[Question]:
    """The other control: nothing is asked."""
    return [Question(q.passage, "?", q.answer, q.start, q.kind) for q in rows]


def answers_task(n: int = 900, steps: int = 200, batch: int = 16, length: int = 64, r: int = 8, alpha: float = 16, lr=None) -> Task:
    """Extractive question answering on the pocket encoder, with LoRA on query, key and value; the seed decides the split."""
    body, tokenizer = load_encoder()
    rows = questions(n)
    ids, spans = places(tokenizer, rows, length)

    def on(part: int):
        def judge(model: nn.Module, seed: int) -> dict[str, float]:
            mine = [rows[i] for i in split(n, seed)[part]]
            return answer_scores(answer(model, tokenizer, mine, length), mine)

        return judge

    def batches(seed: int) -> Batches:
        mine = split(n, seed)[0]
        return Batches(ids[mine], spans[mine], batch, seed)

    return Task(
        "questions: where is the answer?", base=lambda seed: Reader(body), train=batches, metric=on(2), targets=["query", "key", "value"], head=("head",),
        validate=lambda model, seed: on(1)(model, seed)["F1"],
        lr=dict(lr or {"linear probe": 3e-2, "LoRA": 6e-3, "full fine-tuning": 1e-3}), steps=steps, warmup=steps // 10, r=r, alpha=alpha,
    )  # fmt: skip
