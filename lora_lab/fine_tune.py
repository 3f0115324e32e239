"""Fine-tuning GPT-2 on data to text: one recipe, one call, for the pocket model on a laptop and for the real ones on a GPU.

    model, tokenizer = load_gpt2("pocket")
    task = load_task()
    for step in fine_tune(model, tokenizer, task, POCKET, steps=1000):
        ...
    texts = write(model, tokenizer, meanings, POCKET)
    task.score(meanings, texts)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .adapt import apply_lora, lora_layers
from .data_to_text import Task, TextBatches, encode, prompt
from .gpt2 import generate
from .train import Step, linear_schedule, token_loss, train


@dataclass(frozen=True)
class Recipe:
    """Everything that is chosen in a fine-tuning run and in writing afterwards.

    epochs          how long to train if no number of steps is given
    warmup          steps in which lr rises; lr falls in a line from then on. Never more than a tenth of the run
    num_beams       1: the likeliest token each time
    length_penalty  beams are ranked by log p / length ** length_penalty
    """

    r: int = 4
    alpha: float = 32
    dropout: float = 0.1
    target_modules: tuple[str, ...] | str = ("c_attn:q,v",)
    lr: float = 2e-4
    warmup: int = 500
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    batch_size: int = 8
    epochs: int = 5
    num_beams: int = 10
    length_penalty: float = 0.9
    no_repeat_ngram: int = 4
    max_new_tokens: int = 64

    def steps(self, task: Task) -> int:
        """Updates in `epochs` epochs of the task's training part."""
        return self.epochs * -(-len(task.train) // self.batch_size)


# Hu et al. 2021, table 11, GPT-2 medium and large on E2E: BLEU 70.4 and 70.4 there. Length penalty 0.9 is the paper's, 0.8 that of the
# command in its repository; the 64 tokens of a text are the command's (--eval_len).
PAPER = Recipe()
# For a model of a few million parameters on two cores: a larger change, faster, in fewer steps, written greedily.
POCKET = Recipe(
    r=16, alpha=32, dropout=0.0, target_modules="all-linear", lr=3e-3, warmup=50, weight_decay=0.0, label_smoothing=0.0, batch_size=16, epochs=1,
    num_beams=1, no_repeat_ngram=0,
)


def fine_tune(model: nn.Module, tokenizer, task: Task, recipe: Recipe = PAPER, steps: int | None = None, seed: int = 0, **settings) -> Iterator[Step]:
    """Put LoRA into the model, if there is none yet, and train it on the task; a generator of `Step`s, as `train` is.

    steps      None: the recipe's epochs
    seed       of A's first values, of the order of the examples and of dropout
    settings   more for `train`: device, precision, checkpoint, compile, progress ...

    Raises ValueError, at the call, for an example that is longer than the model's context.
    """
    steps = recipe.steps(task) if steps is None else steps
    context = model.config.n_positions
    examples = encode(task.train, tokenizer, context)
    if not lora_layers(model):
        targets = recipe.target_modules if isinstance(recipe.target_modules, str) else list(recipe.target_modules)
        torch.manual_seed(seed)  # `train` does the same at its start
        apply_lora(model, r=recipe.r, alpha=recipe.alpha, dropout=recipe.dropout, target_modules=targets)
    batches = TextBatches(examples, recipe.batch_size, seed=seed, pad=tokenizer.eos_token_id)
    rate = linear_schedule(recipe.lr, steps, min(recipe.warmup, steps // 10))
    return train(
        model, batches, steps, rate, weight_decay=recipe.weight_decay, loss=token_loss(recipe.label_smoothing), seed=seed, **settings
    )


def write(model: nn.Module, tokenizer, meanings: Sequence[str], recipe: Recipe = PAPER, batch_size: int = 32) -> list[str]:
    """One text for each meaning, by the recipe's beams."""
    return [
        text.strip()
        for text in generate(
            model, tokenizer, [prompt(meaning, tokenizer) for meaning in meanings], max_new_tokens=recipe.max_new_tokens,
            strategy="beam" if recipe.num_beams > 1 else "greedy", num_beams=max(recipe.num_beams, 2), length_penalty=recipe.length_penalty,
            no_repeat_ngram=recipe.no_repeat_ngram, batch_size=batch_size,
        )
    ]


def score(model: nn.Module, tokenizer, task: Task, recipe: Recipe = PAPER, meanings: Iterable[str] | None = None) -> dict[str, float]:
    """BLEU, ROUGE-L and slot error rate of what the model writes for the test meanings, or for some of them."""
    meanings = list(dict.fromkeys(example.meaning for example in task.test) if meanings is None else meanings)
    return task.score(meanings, write(model, tokenizer, meanings, recipe))
