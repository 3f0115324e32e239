"""What the tasks of lab 08 that the pocket GPT-2 writes have in common: the base, read once, and batches whose loss is on the answer alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from ..data_to_text import Encoded, TextBatches
from ..gpt2 import generate, load_gpt2


@functools.cache
def pocket() -> tuple[nn.Module, object]:
    """The pocket GPT-2 and its tokenizer, one copy a process: never train this one, copy it."""
    return load_gpt2("pocket")


def encoded(prompts: Sequence[str], answers: Sequence[str], longest: int = 256) -> list[Encoded]:
    """Tokens of prompt + answer + end-of-text, the loss on the answer and its end; a prompt keeps its first `longest` tokens."""
    tokenizer = pocket()[1]
    heads = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    tails = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    return [Encoded([*head[:longest], *tail, tokenizer.eos_token_id], len(head[:longest])) for head, tail in zip(heads, tails, strict=True)]


def batches(examples: Sequence[Encoded], batch_size: int, seed: int) -> TextBatches:
    return TextBatches(examples, batch_size, seed=seed, pad=pocket()[1].eos_token_id)


def answer(model: nn.Module, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """What the model adds to each prompt, greedily, to the end of the line."""
    added = generate(model, pocket()[1], list(prompts), max_new_tokens, batch_size=64)
    return [text.strip().split("\n")[0].strip() for text in added]


@torch.no_grad()
def loss_on(model: nn.Module, examples: Sequence[Encoded], batch_size: int = 32) -> float:
    """Nats per token of the answers, every token counted once."""
    from ..data_to_text import tensors
    from ..train import token_loss

    nats = tokens = 0
    ordered = sorted(examples, key=lambda e: len(e.ids))
    for at in range(0, len(ordered), batch_size):
        chosen = ordered[at : at + batch_size]
        count = sum(len(e.ids) - max(e.prompt, 1) for e in chosen)
        nats += float(token_loss()(model, tensors(chosen, pocket()[1].eos_token_id))) * count
        tokens += count
    return nats / tokens
