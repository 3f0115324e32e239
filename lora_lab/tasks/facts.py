"""Facts into sentences, lab 07's task in a small dose, as a `Task`: what many ways of adapting the pocket GPT-2 are compared on.

Data: the lab's own lighthouses (lora_lab/lighthouses.py: a seeded grammar, everything invented; data/data_to_text/README.md). Ordinary prose, to see
what was forgotten, is the part of data/sherlock-holmes that is by another author, which the pocket model has never read.
"""

from __future__ import annotations

from torch import nn

from ..comparing import Task
from ..data import sherlock_holmes
from ..data_to_text import IGNORED, TextBatches, encode, load_task, tensors
from ..data_to_text import prompt as as_prompt
from ..gpt2 import generate, load_gpt2, token_blocks
from ..train import token_loss

# Found by 20 steps each on validation examples, a factor of 3 apart.
LR = {
    "full fine-tuning": 3e-3, "last layers": 1e-2, "BitFit": 3e-2, "adapters": 1e-2, "prompt tuning": 3e-1, "prefix tuning": 3e-1, "LoRA": 1e-2,
    "distilled, 3 blocks": 3e-3,
}  # fmt: skip


def facts(steps: int = 30, meanings: int = 24, held_out: int = 48, prose: int = 4, batch_size: int = 8) -> Task:
    """The task. Scores: held-out loss (nats a token), BLEU and slot errors (per cent) of texts, loss on ordinary prose (nats a token).

    meanings  how many test meanings are put into words; 0 leaves BLEU and slot errors out, which take most of the time
    held_out  test examples for the loss;  prose  blocks of 128 tokens of ordinary text
    """
    base, tokenizer = load_gpt2("pocket")
    task = load_task("lighthouses")
    context = base.config.n_positions // 2  # room for a trained context
    examples = [e for e in encode(task.train, tokenizer, base.config.n_positions) if len(e.ids) <= context]
    asked = [e for e in encode(task.test, tokenizer, base.config.n_positions) if len(e.ids) <= context]
    held = asked[:: max(1, len(asked) // held_out)][:held_out]
    held = [tensors(held[k : k + 8], tokenizer.eos_token_id) for k in range(0, len(held), 8)]  # logits of all at once would be hundreds of MB
    tokens = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in held]
    blocks = token_blocks(tokenizer, sherlock_holmes().ordinary[: 128 * 8 * prose])[:prose]  # a token seldom has more than eight characters
    ordinary = {"input_ids": blocks, "labels": blocks}
    chosen = list(dict.fromkeys(e.meaning for e in task.test))
    chosen = chosen[:: max(1, len(chosen) // max(meanings, 1))][:meanings]
    loss = token_loss()

    def metric(model: nn.Module) -> dict[str, float]:
        found = {"loss": sum(n * float(loss(model, batch)) for n, batch in zip(tokens, held, strict=True)) / sum(tokens)}
        if chosen:
            texts = generate(model, tokenizer, [as_prompt(m, tokenizer) for m in chosen], max_new_tokens=64, batch_size=len(chosen))
            scores = task.score(chosen, [text.strip() for text in texts])
            found |= {"BLEU": scores["bleu"], "slot errors": scores["slot_error_rate"]}
        return found | {"prose": float(loss(model, ordinary))}

    return Task(
        name="facts into sentences, pocket GPT-2", base=lambda seed: base,
        train=lambda seed: TextBatches(examples, batch_size, seed=seed, pad=tokenizer.eos_token_id), metric=metric, targets="all-linear",
        probe=("lm_head",), lower=("loss", "slot errors", "prose"), loss=loss, lr=LR, steps=steps, warmup=max(1, steps // 10), r=8, alpha=16,
    )  # fmt: skip
