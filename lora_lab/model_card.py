"""A trained model as a folder that others can open: fp16 weights, tokenizer, config and a model card whose figures were measured."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from .corpus import END

PROMPTS = (
    "Once upon a time there was a little",
    "The old man opened the door and",
    '"I do not believe you," said the',
    "It was a cold winter morning, and the boys",
)

def export(model: nn.Module, tokenizer, recipe, figures: dict, out: Path, bits: Callable[[nn.Module], float]) -> None:
    """Write the model folder `out`: fp16 weights, config, tokenizer, card. It is loaded again and measured before it gets its name.

    tokenizer  a tokenizers.Tokenizer
    recipe     a pretrain.Recipe; figures: what `pretrain.measure` found, to which fp16_bits, samples and megabytes are added
    bits       the measure: held-out bits per byte of a model, on any sample

    Raises RuntimeError if rounding to fp16 (relative error up to 2^-11) changes the loss by 0.01 bits per byte or more, or if the tokenizer
    isn't what it was.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        half = deepcopy(model).half()
        half.config.use_cache = True
        with no_bars():
            half.save_pretrained(temporary)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, pad_token=END, padding_side="left",
            model_max_length=model.config.n_positions, clean_up_tokenization_spaces=False,
        ).save_pretrained(temporary)  # fmt: skip
        # Every file anew, as a user would.
        with no_bars():
            rounded = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32).eval()
        again = AutoTokenizer.from_pretrained(temporary)
        text = "“Once upon a time,” 3½ …\n\n"
        if again(text)["input_ids"] != tokenizer.encode(text).ids or again.decode(again(text)["input_ids"]) != text:
            raise RuntimeError("the exported tokenizer gives other tokens than the one that was trained")
        figures["fp16_bits"] = bits(rounded) - bits(model.eval())
        if not abs(figures["fp16_bits"]) < 0.01:
            raise RuntimeError(f"rounding to fp16 changes the loss by {figures['fp16_bits']:.4f} bits per byte: are the weights too large for it?")
        figures["samples"] = samples(rounded, again)
        figures["megabytes"] = sum(p.stat().st_size for p in temporary.iterdir()) / 1e6
        (temporary / "README.md").write_text(card(out.name, recipe, figures), encoding="utf-8")
        put_in_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def no_bars() -> Iterator[None]:
    """transformers draws a progress bar for every file, however small."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def put_in_place(new: Path, out: Path) -> None:
    """A folder can't replace a full one in one step: the old one is moved aside first, and back if the second step fails."""
    # Temporary folders, and safetensors files, can only be opened by their owner; a shared course folder needs the usual modes.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(new, 0o777 & ~umask)
    for path in new.iterdir():
        os.chmod(path, 0o666 & ~umask)
    aside = None
    if out.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent)) / "old"
        os.replace(out, aside)
    try:
        os.replace(new, out)
    except OSError:
        if aside is not None:
            os.replace(aside, out)
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside.parent, ignore_errors=True)


@torch.no_grad()
def samples(model: nn.Module, tokenizer, prompts: Sequence[str] = PROMPTS, length: int = 80) -> list[tuple[str, str]]:
    """(prompt, continuation) of `length` tokens together, at temperature 0.7, the i-th with seed i; not chosen."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=0, max_length=min(length, model.config.n_positions), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    found = []
    for seed, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            text = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, ids.shape[1] :]
        found.append((prompt, tokenizer.decode(text, skip_special_tokens=True)))
    return found


def card(name: str, recipe, figures: dict) -> str:
    """The model card, in Markdown; all its figures come from `pretrain.measure` and from `export`."""
    f, r = figures, recipe
    sentences = [f"    {line}" for prompt, text in f["samples"] for line in [*(prompt + text).split("\n"), ""]]
    books = [f"| {document} | {bits:.2f} |" for document, bits in f["per_document"].items()]
    state = "" if f["finished"] else "\n**Unfinished**: exported in the middle of a run, before the learning rate came down.\n"
    return "\n".join([
        f"# Model card: {name}",
        state,
        f"GPT-2's architecture with {f['parameters']:,} parameters: {r.layers} layers x {r.width}, {r.heads} heads, context {r.context}, "
        f"a byte-level BPE of {r.vocab:,} tokens of its own, head tied to the embedding. Weights in fp16; load them as float32 on a CPU:",
        "",
        "    model, tokenizer = load_gpt2(folder)",
        "    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)",
        "",
        f"- **Trained on** {f['documents']} documents of {f['text_tokens']:,} tokens, gone through {f['passes']:.2f} times in windows drawn in random order; "
        f"{f['held_out']} more documents were held out.",
        f"- **Steps**: {f['steps']:,} of {r.rows + r.drills} x {r.context} tokens, {f['tokens']:,} tokens in all, "
        f"{r.drills / (r.rows + r.drills):.0%} of them drills in copying made from the same text (`lora_lab/drills.py`); {f['hours']:.1f} hours.",
        f"- **Recipe**: seed {r.seed}; Muon lr {r.lr:g}, weight decay {r.weight_decay:g} for the layers' matrices, AdamW lr {r.embedding_lr:g} for the "
        f"rest, {r.position_lr:g} for positions; {r.warmup} steps of warm-up, the last {r.decay:.0%} down to 0; gradients clipped at 1. torch {f['torch']}.",
        f"- **Size**: {f['megabytes']:.1f} MB. Rounding to fp16 changed the held-out loss by {f['fp16_bits']:+.5f} bits per byte.",
        "",
        f"## Held-out text ({f['held_out_bytes'] / 1e6:.2f} MB: the first 20,000 tokens of each held-out document)",
        "",
        "| predictor | bits per byte |",
        "|---|---:|",
        *(f"| {k} | {v:.2f} |" for k, v in f["yardsticks"].items()),
        f"| **this model** | **{f['bits_per_byte']:.2f}** |",
        "",
        f"Unigram and bigram (absolute discounting) are over this tokenizer's tokens, counted on the whole training text; {f['bytes_per_token']:.2f} "
        f"bytes a token. gzip -9 and xz -9e saw the held-out text only. The model reads windows of {r.context} tokens that start cold.",
        "",
        "| held-out document | bits per byte |",
        "|---|---:|",
        *books,
        "",
        "**Copying** (mean loss in nats per token of a span, the first time and again after other text):",
        f"held-out text {f['copy']['text'][0]:.2f} -> {f['copy']['text'][1]:.2f}, random tokens {f['copy']['random'][0]:.2f} -> {f['copy']['random'][1]:.2f}.",
        "",
        "## Samples (temperature 0.7, seeds 0, 1, 2, 3, not chosen)",
        "",
        *sentences,
        "## Limits",
        "",
        "It knows no facts, can't count or reason, loses the thread after a sentence or two, and repeats its books' views of people, which may be "
        "of another century. It is there to be adapted and taken apart, not to be asked.",
        "",
    ])
