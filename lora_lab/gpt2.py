"""GPT-2 through one door: the pocket model that ships with the lab, or the real one; and text from either.

    model, tokenizer = load_gpt2("pocket")
    print(generate(model, tokenizer, "The old man opened the door and"))

Where the files come from, and how a room shares one copy of them: gpt2_files.py.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gpt2_files import fill_models_folder, gpt2_folder, need

__all__ = [
    "TextLoss",
    "fill_models_folder",
    "generate",
    "gpt2_folder",
    "load_gpt2",
    "next_token_loss",
    "show_stream",
    "stream",
    "text_loss",
    "token_blocks",
    "token_ids",
]

# ---- loading --------------------------------------------------------------------------------------------------------


def load_gpt2(name: str | os.PathLike = "pocket", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, object]:
    """A GPT-2 and its tokenizer: transformers' GPT2LMHeadModel, in eval mode on the CPU, and a fast tokenizer.

    name   "pocket": the small model that ships with the lab, no network needed; "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl": from
           the folder in LORA_LAB_MODELS if that is set, else from the cache or the hub; or a folder in transformers' format
    dtype  of the weights, whatever the file holds

    The weights are trainable, as transformers hands them out; `apply_lora` freezes them. The tokenizer pads on the left, with
    <|endoftext|>: GPT-2 was trained without padding, and the attention mask hides the pads, so no token is added to the embedding.

    Raises ValueError for an unknown name and for files that are no GPT-2, incomplete or damaged, FetchError when a download failed,
    ImportError without transformers. Nothing half-written is left behind.
    """
    need("transformers")
    folder = gpt2_folder(name)
    model = _load_model(folder, dtype)
    return model, _load_tokenizer(folder, model.config)


def _load_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    from safetensors import SafetensorError, safe_open
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    config = _load_config(folder)
    # On the meta device nothing is drawn and nothing allocated: the file's tensors become the parameters.
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    # A tied head is the embedding; and OpenAI's files also hold the causal mask, as attn.bias.
    beside = re.compile(r"\.attn\.(masked_)?bias$" + (r"|^lm_head\.weight$" if config.tie_word_embeddings else ""))
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items() if not beside.search(name)}
    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            keys = {_full_name(key): key for key in file.keys() if not beside.search(key)}
            found = {name: tuple(file.get_slice(key).get_shape()) for name, key in keys.items()}
            _compare_shapes(found, wanted, folder)
            # A copy of its own for each tensor: what safe_open gives may be the file itself, seen through memory.
            tensors = {name: file.get_tensor(key).to(dtype, copy=True) for name, key in keys.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copied in part? Copy or download it again") from error
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _load_config(folder: Path):
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config

    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a model's config ({error}): copied in part? Copy or download it again") from error
    if kind != "gpt2":
        raise ValueError(f"{folder} holds a model of type {kind!r}; load_gpt2 is for 'gpt2', transformers' AutoModel for others")
    try:
        # A model saved in the middle of its training often has the cache of keys and values off; text would cost ten times as much.
        return GPT2Config(**settings | {"use_cache": True})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _full_name(key: str) -> str:
    """OpenAI's files have the names of the body alone, files saved by GPT2LMHeadModel the whole ones."""
    return key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"


def _compare_shapes(found: dict, wanted: dict, folder: Path) -> None:
    wrong = [f"{n} is {found[n]}, not {wanted[n]}" for n in wanted if n in found and found[n] != wanted[n]]
    wrong += [f"{n} is missing" for n in wanted if n not in found] + [f"{n} is too many" for n in found if n not in wanted]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{folder}: the checkpoint is of another size or kind than its config.json says: {'; '.join(wrong[:3])}{more}. "
            "Take config.json and model.safetensors from the same model"
        )


def _load_tokenizer(folder: Path, config):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = folder / "tokenizer.json"
    try:
        plain = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} is not a whole tokenizer ({error}): copied in part? Copy or download it again") from error
    end = plain.id_to_token(config.eos_token_id) if config.eos_token_id is not None else None
    if end is None or plain.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"{path} belongs to another model: it has {plain.get_vocab_size():,} tokens, config.json says vocab_size "
            f"{config.vocab_size:,} and that token {config.eos_token_id} ends a text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token=end, eos_token=end, unk_token=end, pad_token=end, padding_side="left",
        model_max_length=config.n_positions, clean_up_tokenization_spaces=False,
    )  # fmt: skip


# ---- generation -----------------------------------------------------------------------------------------------------

STRATEGIES = ("greedy", "sampling", "beam")


def generate(
    model: nn.Module,
    tokenizer,
    prompts: str | Sequence[str],
    max_new_tokens: int = 40,
    strategy: str = "greedy",
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    batch_size: int = 16,
) -> str | list[str]:
    """Continue each prompt; return what was added, up to <|endoftext|> or `max_new_tokens` tokens: a text for a text, a list for a list.

    strategy  "greedy": the likeliest token each time. "sampling": one drawn from softmax(logits / temperature), among the `top_k`
              likeliest (0: all) and the fewest that hold `top_p` of the probability. "beam": the likeliest of `num_beams` texts kept on
              the way, by log p / length ** length_penalty
    seed      for sampling: a number for each prompt, or one number s, which gives s, s + 1, s + 2, ... So prompts[3] of a list comes out
              as it does alone with seed + 3
    no_repeat_ngram   forbid repeating so many tokens (0: allow)
    batch_size        prompts a batch, which decides speed and memory, never the text: prompts are padded on the left, under a mask

    GPT-2 has no positions beyond its context. Of a prompt that leaves no room for `max_new_tokens` the last tokens are kept, with a warning.
    The model is put into eval mode and back. Raises TypeError for a prompt that is no text, ValueError for an empty one (to let the model
    begin freely, give "<|endoftext|>"), for one with half a character (a lone surrogate), and for settings that make no sense.
    """
    from transformers import GenerationConfig
    from transformers.generation.logits_process import LogitsProcessorList

    single = isinstance(prompts, str)
    texts = [prompts] if single else _listed(prompts)
    seeds = _seeds(seed, len(texts))
    _check_settings(model, strategy, max_new_tokens, temperature, top_k, top_p)
    for what, value in (("num_beams", num_beams), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{what} must be at least 1; found {value}")
    rows = _encode(model, tokenizer, texts, max_new_tokens)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams if strategy == "beam" else 1,
        length_penalty=length_penalty if strategy == "beam" else 1.0, no_repeat_ngram_size=no_repeat_ngram,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    out = [""] * len(rows)
    # Of about one length each, so that little is padded.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = _padded([rows[i] for i in chosen], tokenizer.pad_token_id, model.device)
            draw = _drawing([seeds[i] for i in chosen], temperature, top_k, top_p) if strategy == "sampling" else []
            new = model.generate(ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList(draw))
            for i, row in zip(chosen, new[:, ids.shape[1] :].tolist(), strict=True):
                out[i] = tokenizer.decode(_until(row, tokenizer.eos_token_id))
    return out[0] if single else out


def stream(
    model: nn.Module,
    tokenizer,
    prompt: str,
    max_new_tokens: int = 100,
    strategy: str = "greedy",
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The same text as `generate(...)`, "greedy" or "sampling", piece by piece while it is made; `show_stream` shows it in a cell.

    A character that takes several tokens comes when it is whole. Errors are `generate`'s, raised when stream is called.
    """
    if strategy == "beam":
        raise ValueError("a beam search changes its mind on the way, so it can't be streamed: use generate(..., strategy='beam')")
    _check_settings(model, strategy, max_new_tokens, temperature, top_k, top_p)
    if not isinstance(prompt, str):
        raise TypeError(f"stream continues one text; found {type(prompt).__name__}")
    (row,) = _encode(model, tokenizer, [prompt], max_new_tokens)
    draw = _drawing([seed], temperature, top_k, top_p) if strategy == "sampling" else []
    return _stream(model, tokenizer, row, max_new_tokens, draw)


def _stream(model, tokenizer, row: list[int], max_new_tokens: int, draw: list[Callable]) -> Iterator[str]:
    tokens, text, past = [], "", None
    ids = torch.tensor([row], device=model.device)
    for _ in range(max_new_tokens):
        # Not around the loop: between two pieces the caller's code runs, and gradients and modes are the caller's.
        with _evaluating(model), torch.no_grad():
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
        past, scores = out.past_key_values, out.logits[:, -1].float()
        for step in draw:
            scores = step(ids, scores)
        ids = scores.argmax(-1, keepdim=True)
        if ids.item() == tokenizer.eos_token_id:
            break
        tokens.append(ids.item())
        whole = tokenizer.decode(tokens).rstrip("\ufffd")  # at the end it may stand for a character that is still coming
        if len(whole) > len(text):
            yield whole[len(text) :]
            text = whole
    rest = tokenizer.decode(tokens)[len(text) :]
    if rest:
        yield rest


def show_stream(pieces: Iterable[str], prompt: str = "") -> str:
    """Show the pieces of `stream` in a notebook's cell as they come, behind `prompt`; print them elsewhere. Returns the text, without the prompt.

        text = show_stream(stream(model, tokenizer, prompt), prompt)

    Stopping the cell keeps what has come so far.
    """
    import time

    shell = None
    with suppress(ImportError):
        from IPython import get_ipython

        shell = get_ipython()
    if not hasattr(shell, "kernel"):
        print(prompt, end="", flush=True)
        text = ""
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
        print()
        return text
    from IPython.display import display

    text, shown = "", 0.0
    handle = display(_page(prompt, ""), raw=True, display_id=True)
    try:
        for piece in pieces:
            text += piece
            if time.monotonic() - shown > 0.1:  # ten pictures a second are enough for the eye, and leave the time to the model
                handle.update(_page(prompt, text), raw=True)
                shown = time.monotonic()
    finally:
        handle.update(_page(prompt, text), raw=True)
    return text


def _page(prompt: str, text: str) -> dict[str, str]:
    import html

    # Without a colour of its own it is right in a light and in a dark notebook.
    return {
        "text/html": '<div style="white-space: pre-wrap; overflow-wrap: anywhere; max-width: 46em; line-height: 1.5">'
        f'<span style="opacity: 0.7">{html.escape(prompt)}</span><b style="font-weight: 600">{html.escape(text)}</b></div>',
        "text/plain": prompt + text,
    }


class _Gumbel:
    """Turns "take the largest" into a draw: argmax(log p + g) is a sample of p if each g is an independent Gumbel number.

    Each row has its own generator, so what stands in the other rows of a batch doesn't move its luck.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.stack([
            # float64: in float32 an exponential number of 0 comes up, and with it infinite luck
            -torch.empty(scores.shape[-1], dtype=torch.float64).exponential_(generator=generator).log()
            for generator in self.generators
        ])
        return scores + noise.to(scores)


def _drawing(seeds: Sequence[int], temperature: float, top_k: int, top_p: float) -> list[Callable[[Tensor, Tensor], Tensor]]:
    from transformers.generation.logits_process import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps = [TemperatureLogitsWarper(float(temperature))]
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    # generate() looks for its own base class, which can't be imported before it is needed.
    return [*steps, type("Gumbel", (_Gumbel, LogitsProcessor), {})(seeds)]


def _listed(prompts) -> list:
    if isinstance(prompts, (bytes, dict)) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts is a text or a list of texts; found {type(prompts).__name__}")
    return list(prompts)


def _seeds(seed, count: int) -> list[int]:
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed is one number, or one for each prompt; found {len(seeds)} for {count} prompts")
    return seeds


def _check_settings(model, strategy: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if strategy not in STRATEGIES:
        near = difflib.get_close_matches(str(strategy), STRATEGIES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"strategy {strategy!r} is not one of {', '.join(map(repr, STRATEGIES))}{hint}")
    context = model.config.n_positions
    if not 1 <= max_new_tokens < context:
        raise ValueError(
            f"max_new_tokens must be from 1 to {context - 1}; found {max_new_tokens}. The context of this model is {context} tokens, "
            "and at least one of them is the prompt's"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be above 0; found {temperature}. For the likeliest token each time use strategy='greedy'")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k must be 0 (all tokens) or more, and top_p above 0 and at most 1; found top_k={top_k}, top_p={top_p}")


def _encode(model, tokenizer, texts: list[str], max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, the last ones that leave room for the new tokens."""
    for i, text in enumerate(texts):
        which = f"prompt {i + 1} of {len(texts)}" if len(texts) > 1 else "the prompt"
        if not isinstance(text, str):
            raise TypeError(f"{which} must be a text; found {type(text).__name__}")
        if not text:
            raise ValueError(
                f"{which} is empty, and GPT-2 can only continue something. To let it begin freely, give it the token that stands between "
                f"two texts, {tokenizer.eos_token!r}"
            )
        _check_text(text, which)
    rows = [token_ids(tokenizer, text) for text in texts]
    room = model.config.n_positions - max_new_tokens
    long = [len(row) for row in rows if len(row) > room]
    if long:
        warnings.warn(
            f"{len(long)} of {len(rows)} prompts do not fit: the longest has {max(long)} tokens, and {max_new_tokens} new ones in a context "
            f"of {room + max_new_tokens} leave room for {room}. The last {room} tokens are used, what stands before is cut off",
            stacklevel=3,
        )
    return [row[-room:] for row in rows]


def _check_text(text: str, which: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{which} holds half a character, {text[error.start]!r} at place {error.start}: a lone surrogate, left over when a text was cut "
            "inside an emoji or read with the wrong encoding. Read the text again as UTF-8, or drop it: "
            "text.encode('utf-8', 'ignore').decode()"
        ) from None


def _padded(rows: list[list[int]], pad: int, device) -> tuple[Tensor, Tensor]:
    """Rows of different length -> ids and mask, (B, T), padded on the left: the last column is each prompt's last token."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every module is in the mode it was in, module by module."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ---- text as data ---------------------------------------------------------------------------------------------------


def token_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text of any length, without the warning that it is longer than the context."""
    return tokenizer(text, verbose=False)["input_ids"]


def token_blocks(tokenizer, text: str, length: int = 128) -> Tensor:
    """A text as rows of tokens, int64 (n, length), in order; a rest shorter than a row is left out. `Batches(x, x)` shuffles the rows.

    Raises ValueError for a text that does not fill one row.
    """
    _check_text(text, "the text")
    ids = torch.tensor(token_ids(tokenizer, text), dtype=torch.int64)
    if length < 2 or len(ids) < length:
        raise ValueError(f"a row holds {length} tokens, at least 2, and the text must fill one; found {len(ids)} tokens")
    return ids[: len(ids) // length * length].view(-1, length)


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy (nats a token) of each row's tokens 2, 3, ... given those before: pass it to `train(loss=...)`.

    batch: (x, y), both (B, T) of token ids; y is what x should be continued with, so it is x itself. Entries of y that are -100 don't count.
    """
    x, y = batch
    logits = model(input_ids=x).logits  # (B, T, vocabulary)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicts a text: nats a token, bits a byte of UTF-8 (which compares models with other tokenizers), and of how much."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


def text_loss(model: nn.Module, tokenizer, text: str, context: int | None = None, batch_size: int = 8) -> TextLoss:
    """The loss over a text: every token once, given the tokens before it in its window of `context` tokens (None: all the model has).

    Windows do not overlap, so the first tokens of each have little before them; <|endoftext|> stands before the first one. In eval mode,
    without gradients, modes put back. Raises ValueError for an empty text.
    """
    _check_text(text, "the text")
    ids = token_ids(tokenizer, text)
    if not ids:
        raise ValueError("text_loss needs a text; found an empty one")
    context = min(context or model.config.n_positions, model.config.n_positions)
    given, wanted = [tokenizer.eos_token_id, *ids[:-1]], ids
    rest = -len(ids) % context
    x = torch.tensor(given + [tokenizer.eos_token_id] * rest).view(-1, context)
    y = torch.tensor(wanted + [-100] * rest).view(-1, context)
    nats = 0.0
    with _evaluating(model), torch.no_grad():
        for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = model(input_ids=xs.to(model.device)).logits.float()
            nats += F.cross_entropy(logits.flatten(0, 1), ys.flatten().to(model.device), reduction="sum").item()
    size = len(text.encode("utf-8"))
    return TextLoss(nats / len(ids), nats / math.log(2) / size, len(ids), size)
