"""A small BERT from a folder of text, and the one that ships: WordPiece, masked words, a folder that transformers opens.

    model, tokenizer = load_encoder()                    the pocket encoder; load_encoder("my-bert") opens any BERT's folder
    pretrain_encoder("books/", "my-bert", minutes=40)    the same from a shell:  lora-lab pretrain-encoder books/ my-bert --minutes 40

An encoder reads a whole text at once and gives each token a vector. It learns from text with holes: one token in five is hidden, and
guessed from both sides. Recipe, checkpoints and the shape of the learning rate are those of pretrain.py; what differs is here. Time on a
small machine is short, so embeddings don't begin as noise: `meanings` takes them from which words stand near which.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import Corpus, _text_files, load_corpus, need_disk, read_documents
from .files import atomic_write, shipped
from .model_card import no_bars, put_in_place
from .pretrain import (
    Progress,
    Recipe,
    _cut_log,
    _keep_memory,
    _starting_point,
    alone_in,
    decay_steps,
    fast_in_bf16,
    load_checkpoint,
    lr_factor,
    save_checkpoint,
    waves,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
HIDDEN = 0.2  # of the tokens of a window are to be guessed
POCKET = Recipe(vocab=6000, layers=4, width=128, heads=4, context=128, rows=24, drills=0, lr=4e-3, embedding_lr=2e-3, position_lr=3e-4)


# ---- opening one ----------------------------------------------------------------------------------------------------


def load_encoder(folder: str | os.PathLike | None = None, head: bool = False) -> tuple[nn.Module, object]:
    """(model, tokenizer) of the pocket encoder, or of any BERT in `folder` (config.json, model.safetensors, tokenizer.json), in float32.

    The model is transformers' BertModel, a vector for each token; with head=True BertForMaskedLM, which scores the vocabulary at each token.
    Raises FileNotFoundError if there is no model in `folder`, ValueError if it is no BERT or a weight is missing or of another shape. A missing
    weight is an error and no warning: a body at random looks like one that learned nothing.
    """
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

    folder = Path(folder) if folder is not None else shipped("pocket-encoder")
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', no '.join(missing)}: give a folder that save_pretrained wrote, model and tokenizer both")
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if written.get("model_type") != "bert":
        raise ValueError(f"{folder} holds a model of type {written.get('model_type')!r}; this function opens BERT's (model_type 'bert')")
    config = BertConfig.from_dict(written | {"dtype": "float32"})
    with torch.random.fork_rng(devices=[]):
        model = BertForMaskedLM(config) if head else BertModel(config, add_pooling_layer=False)
    stored = {k.removeprefix("bert."): v.float() for k, v in load_file(folder / "model.safetensors").items()}
    # The tied output matrix is in the file under one name.
    stored.setdefault("cls.predictions.decoder.weight", stored.get("embeddings.word_embeddings.weight"))
    stored.setdefault("cls.predictions.decoder.bias", stored.get("cls.predictions.bias"))
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    for name, tensor in wanted.items():
        found = stored.get(name.removeprefix("bert."))
        if found is None:
            what = "it has no head for hidden words" if name.startswith("cls.") else "it is of another model, or cut off"
            raise ValueError(f"{folder}/model.safetensors has no {name}: {what}")
        if found.shape != tensor.shape:
            raise ValueError(f"{folder}: {name} has shape {tuple(found.shape)}, and config.json says {tuple(tensor.shape)}")
    model.load_state_dict({k: stored[k.removeprefix("bert.")] for k in wanted}, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


def encode(tokenizer, texts: Sequence[str] | Sequence[tuple[str, str]], length: int) -> Tensor:
    """(n, <= length) int64: [CLS] text [SEP], or [CLS] first [SEP] second [SEP] of pairs; cut at `length`, filled up with [PAD] = 0."""
    texts = list(texts)
    pairs = bool(texts) and not isinstance(texts[0], str)
    arguments = ([a for a, _ in texts], [b for _, b in texts]) if pairs else (texts,)
    batch = tokenizer(*arguments, truncation="only_second" if pairs else True, max_length=length, padding=True, return_tensors="pt")
    return batch["input_ids"]


class Reader(nn.Module):
    """An encoder with one fresh linear layer on top: the smallest thing that can answer with a class, or with a place in the text.

        classes:  scores = head(mean of h_t over the text's tokens)        (B, T) -> (B, labels)
        span:     scores[:, t] = head(h_t), -inf at padding                (B, T) -> (B, T, 2), first and last token of the answer

    The mean and not the vector of [CLS]: no task has taught the pocket encoder to put anything there. The head's weights start at 0, so each
    class has the same score at first; module names for LoRA: body.encoder.layer.N.attention.self.query, .key, .value.
    """

    def __init__(self, body: nn.Module, labels: int | None = None) -> None:
        super().__init__()
        self.body, self.span = body, labels is None
        self.head = nn.Linear(body.config.hidden_size, labels or 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != PAD
        longest = int(mask.sum(1).max())  # a batch of short texts needn't pay for the longest of all
        ids, mask = ids[:, :longest], mask[:, :longest]
        kinds = self._second(ids) if self.span else None
        h = self.body(input_ids=ids, attention_mask=mask.long(), token_type_ids=kinds).last_hidden_state
        if self.span:
            return self.head(h).masked_fill(~mask[..., None], -torch.inf)
        weights = mask.unsqueeze(-1).to(h.dtype)
        return self.head((h * weights).sum(1) / weights.sum(1))

    @staticmethod
    def _second(ids: Tensor) -> Tensor:
        """BERT's token types: 1 behind the first [SEP]."""
        ends = (ids == SEP).long().cumsum(1)
        return ((ends - (ids == SEP).long()) >= 1).long()


# ---- text -----------------------------------------------------------------------------------------------------------


def prepare(folder: str | os.PathLike, work: str | os.PathLike, recipe: Recipe, say=print) -> Corpus:
    """Split, learn a WordPiece of `recipe.vocab` lower-case tokens on every fourth training document, encode; [SEP] ends a document.

    As corpus.prepare, which does it for GPT-2: kept in `work`, made again when text or settings differ. Raises ValueError for text that can't
    be read or is too little.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    work = Path(work)
    digest = hashlib.sha256(json.dumps(["wordpiece", recipe.vocab, recipe.hold_out, recipe.megabytes]).encode())
    for path in _text_files(folder):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    fingerprint, card = digest.hexdigest()[:16], work / "corpus.json"
    if card.is_file() and json.loads(card.read_text(encoding="utf-8"))["fingerprint"] == fingerprint:
        return load_corpus(work)

    documents = list(read_documents(folder, recipe.megabytes))
    held_out = [d for i, d in enumerate(documents) if i % recipe.hold_out == recipe.hold_out // 2]
    training = [d for i, d in enumerate(documents) if i % recipe.hold_out != recipe.hold_out // 2]
    if not held_out or not training:
        raise ValueError(f"{folder}: {len(documents)} document(s) can't be split with hold_out={recipe.hold_out}: give more, or lower hold_out")
    need_disk(work, sum(len(text.encode()) for _, text in documents))
    say(f"{len(training)} documents to train on, {len(held_out)} held out; learning {recipe.vocab} tokens ...")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=recipe.vocab, special_tokens=list(SPECIAL), limit_alphabet=150, show_progress=False)
    tokenizer.train_from_iterator((line for _, text in training[::4] for line in text.split("\n")), trainer)
    if tokenizer.get_vocab_size() < recipe.vocab:
        raise ValueError(f"{folder} has too little text for {recipe.vocab} tokens: found {tokenizer.get_vocab_size()}. Set vocab to that or less")
    streams = []
    for name, part in (("train", training), ("held", held_out)):
        parts = []
        for _, text in part:
            lines = tokenizer.encode_batch_fast(text.split("\n"), add_special_tokens=False)
            parts.append(np.array([i for line in lines for i in line.ids] + [SEP], dtype=np.uint16))
        stream = np.concatenate(parts)
        if len(stream) < 4 * recipe.context:
            raise ValueError(f"{folder}: too little text: {len(stream)} {name} tokens, and a context of {recipe.context} needs {4 * recipe.context}")
        streams.append(stream)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    known = {"documents": [n for n, _ in training], "held_documents": [n for n, _ in held_out], "fingerprint": fingerprint}
    with atomic_write(work / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    for name, stream in zip(("train", "held"), streams, strict=True):
        with atomic_write(work / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, stream)
    with atomic_write(card) as temporary:
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return Corpus(tokenizer, *streams, **known)


def hide(windows: np.ndarray, vocab: int, rng: np.random.Generator, share: float = HIDDEN) -> tuple[Tensor, Tensor]:
    """(x, y) from token ids (B, T): `share` of the tokens in each row are to be guessed; y is the token there and -100 elsewhere.

    Of these, 8 in 10 become [MASK], 1 in 10 any token, 1 in 10 stay (Devlin et al. 2019, 3.1): else the model would never have to give
    a vector for a word that it can see. [CLS] and [SEP] are never asked for.
    """
    x, y = windows.copy(), np.full_like(windows, -100)
    chosen = (rng.random(x.shape) < share) & (windows > MASK)
    y[chosen] = windows[chosen]
    luck = rng.random(x.shape)
    x[chosen & (luck < 0.8)] = MASK
    other = chosen & (luck >= 0.9)
    x[other] = rng.integers(MASK + 1, vocab, int(other.sum()))
    return torch.from_numpy(x), torch.from_numpy(y)


class Windows:
    """Batch number `step`, from nothing but the seed and that number: (x, y), each (rows, context), every row beginning with [CLS]."""

    def __init__(self, stream: np.ndarray, recipe: Recipe) -> None:
        self.stream, self.recipe, self._epoch = stream, recipe, -1
        self.windows = len(stream) // (recipe.context - 1)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = np.stack([self._window(i) for i in range(step * self.recipe.rows, (step + 1) * self.recipe.rows)])
        return hide(rows, self.recipe.vocab, np.random.default_rng([self.recipe.seed, 2, step]))

    def _window(self, number: int) -> np.ndarray:
        epoch, i = divmod(number, self.windows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.recipe.seed, epoch]).permutation(self.windows)
        start = self._order[i] * (self.recipe.context - 1)
        return np.concatenate([[CLS], self.stream[start : start + self.recipe.context - 1]]).astype(np.int64)


# ---- model ----------------------------------------------------------------------------------------------------------


def build_encoder(recipe: Recipe, attention: str = "eager") -> nn.Module:
    """transformers' BertForMaskedLM with fresh weights from the recipe's seed, its output matrix tied to the embedding."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=recipe.vocab, hidden_size=recipe.width, num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.width, max_position_embeddings=recipe.context, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=PAD, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    model = BertForMaskedLM(config)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.copy_(waves(recipe.context, recipe.width, height=0.06))
        model.bert.embeddings.token_type_embeddings.weight.zero_()
    return model


def meanings(stream: np.ndarray, vocab: int, width: int, near: int = 5, tokens: int = 6_000_000, rms: float = 0.08, seed: int = 0) -> Tensor:
    """(vocab, width): where the embedding of words starts. Words that keep the same company get like vectors, before any training.

        M[a, b] = max(0, log(p(b | a) / q(b))), q(b) ~ p(b)^0.75       positive pointwise mutual information, nats
        M ~ U S V^T, embedding = U sqrt(S)                              the best M of rank `width` (truncated SVD)

    p(b | a) is how often b stands at most `near` tokens from a in the first `tokens` of the stream; the power 3/4 keeps rare words
    from looking special (Levy, Goldberg and Dagan 2015). Scaled to a root mean square of `rms`.
    """
    stream = np.asarray(stream[:tokens]).astype(np.int64)
    counts = np.zeros(vocab * vocab, dtype=np.float32)
    for apart in range(1, near + 1):
        pairs = stream[:-apart] * vocab + stream[apart:]
        counts += np.bincount(pairs, minlength=vocab * vocab)
    counts = counts.reshape(vocab, vocab)
    counts += counts.T.copy()
    row = counts.sum(1)
    context = row**0.75 / (row**0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        counts /= row[:, None] * context[None, :]
        np.log(counts, out=counts)
    counts[~np.isfinite(counts)] = 0.0
    np.maximum(counts, 0.0, out=counts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(torch.from_numpy(counts), q=min(width + 16, vocab), niter=2)
    vectors = u[:, :width] * s[:width].sqrt()
    return vectors * (rms / vectors.square().mean().sqrt())


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest, as in pretrain.build_optimizers."""
    hidden = [p for p in model.bert.encoder.parameters() if p.dim() == 2]
    positions = model.bert.embeddings.position_embeddings.weight
    chosen = {id(p) for p in (*hidden, positions)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = [{"params": rest, "peak": recipe.embedding_lr}, {"params": [positions], "peak": recipe.position_lr}]
    return [
        torch.optim.Muon(
            [{"params": hidden, "peak": recipe.lr}], lr=recipe.lr, momentum=0.95, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(adam, lr=recipe.embedding_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def guesses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(logits (n, vocab), targets (n,)) at the n hidden places; the head, which is half of the work, is asked nowhere else."""
    device = next(model.parameters()).device
    x, y = x.to(device), y.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_in_bf16(device)):
        asked = y >= 0
        logits = model.cls(model.bert(input_ids=x).last_hidden_state[asked])
    return logits.float(), y[asked]


@torch.no_grad()
def masked_score(model: nn.Module, windows: Windows, batches: int, share: float = HIDDEN) -> dict[str, float]:
    """Bits per hidden token and accuracy (share of hidden tokens guessed first), over `batches` batches whose holes are always the same."""
    bits = right = n = 0.0
    for step in range(batches):
        logits, y = guesses(model, *windows(step))
        bits += float(F.cross_entropy(logits, y, reduction="sum")) / math.log(2)
        right += int((logits.argmax(1) == y).sum())
        n += len(y)
    return {"bits": bits / n, "accuracy": right / n, "asked": int(n)}


def unigram_score(train: np.ndarray, windows: Windows, batches: int) -> dict[str, float]:
    """The floor: whoever knows how often each token comes, and nothing of what stands around the hole. Same holes as `masked_score`."""
    counts = np.bincount(train, minlength=windows.recipe.vocab).astype(float)
    counts[: MASK + 1] = 0  # are never asked for
    p = (counts + 1) / (counts + 1).sum()
    y = torch.cat([windows(step)[1].flatten() for step in range(batches)]).numpy()
    y = y[y >= 0]
    return {"bits": float(-np.log2(p[y]).mean()), "accuracy": float((y == counts.argmax()).mean())}


# ---- training -------------------------------------------------------------------------------------------------------


def pretrain_encoder(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    recipe: Recipe = POCKET,
    *,
    work: str | os.PathLike | None = None,
    tokens: float | None = None,
    minutes: float | None = None,
    every: int = 250,
    train: bool = True,
    say=print,
) -> dict:
    """Train a small BERT on the text in `folder` and leave it, with its model card, in the folder `out`. Returns the card's figures.

    tokens or minutes is the budget (once through the text without either); `work` keeps tokens, log and checkpoints, and the same call goes on
    from there, also after a kill. train=False exports the last checkpoint as it is. `recipe.drills` must be 0: there is nothing to copy.
    Raises ValueError for text, settings or checkpoints that don't fit, OSError when the disk is too small, RuntimeError when the loss stops
    being a number.
    """
    out = Path(out)
    work = Path(work) if work is not None else out.with_name(out.name + "-work")
    if recipe.drills:
        raise ValueError(f"an encoder has no drills in copying: set drills=0; found {recipe.drills}")
    if tokens is not None and minutes is not None:
        raise ValueError("give a budget in tokens or in minutes, not both")
    for name, value in (("tokens", tokens), ("minutes", minutes), ("every", every)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a number above 0; found {value}")
    if out.exists() and not (out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))):
        raise ValueError(f"{out} exists and is no model folder: nothing is written over it. Name another one")
    with alone_in(work) if train else _unlocked():
        corpus = prepare(folder, work, recipe, say)
        if tokens is None and minutes is None:
            tokens = float(len(corpus.train))
        model = build_encoder(recipe)
        if train:
            _train(model, corpus, work, recipe, tokens, minutes, every, say)
        elif not (work / "checkpoint.safetensors").is_file():
            raise ValueError(f"there is no {work / 'checkpoint.safetensors'} to export: train first")
        progress = load_checkpoint(work / "checkpoint.safetensors", model, build_optimizers(model, recipe), recipe, corpus.fingerprint)
        say("measuring on held-out text ...")
        figures = measure(model.eval(), corpus, recipe, progress)
        export(model, corpus, recipe, figures, out)
        say(f"{out}: {figures['accuracy']:.1%} of hidden tokens guessed, {figures['bits']:.2f} bits each, {figures['megabytes']:.1f} MB")
        return figures


def _unlocked():
    """Exporting reads one finished checkpoint, which is replaced in one step: a look at a run must not wait for its end."""
    from contextlib import nullcontext

    return nullcontext()


def _train(model, corpus: Corpus, work: Path, recipe: Recipe, tokens: float | None, minutes: float | None, every: int, say) -> None:
    from tqdm.auto import tqdm

    _keep_memory()
    need_disk(work, 4 * 12 * sum(p.numel() for p in model.parameters()))
    total = math.ceil(tokens / recipe.step_tokens) if tokens is not None else None
    optimizers = build_optimizers(model, recipe)
    progress, begun = Progress(total=total), _starting_point(work, recipe, total, minutes)
    if begun is not None:
        progress = load_checkpoint(begun, model, optimizers, recipe, corpus.fingerprint)
        if tokens is not None:
            progress.total = total
        elif begun.name == "stable.safetensors":
            progress.total = None
    else:
        say("counting which words stand near which ...")
        with torch.no_grad():
            vectors = meanings(corpus.train, recipe.vocab, recipe.width, seed=recipe.seed)
            model.bert.embeddings.word_embeddings.weight.copy_(vectors)
    batches, held = Windows(corpus.train, recipe), Windows(corpus.held, recipe)
    parameters = list(model.parameters())
    _cut_log(work / "log.jsonl", progress.step)
    began, before, recent = time.monotonic(), progress.seconds, []
    bar = tqdm(total=progress.total, initial=progress.step, unit="step", disable=None, smoothing=0.02)

    def save(name: str) -> None:
        save_checkpoint(work / name, model, optimizers, progress, recipe, corpus.fingerprint)

    while progress.total is None or progress.step < progress.total:
        factor = lr_factor(progress.step, recipe, progress.total)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        loss = F.cross_entropy(*guesses(model.train(), *batches(progress.step)))
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            raise RuntimeError(f"step {progress.step + 1}: the loss is {loss.item()}, the gradient's norm {norm}. Begin again with a lower lr")
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        progress.step += 1
        progress.seconds = before + time.monotonic() - began
        recent = [*recent[-99:], loss.item()]
        bar.update()
        planned = minutes is not None and progress.total is None and progress.seconds >= 60 * minutes * (1 - recipe.decay)
        if planned:
            progress.total = bar.total = progress.step + max(1, round(progress.step * recipe.decay / (1 - recipe.decay)))
        if planned or (progress.total and progress.step == progress.total - decay_steps(recipe, progress.total)):
            save("stable.safetensors")
        if progress.step % every == 0 or progress.step == progress.total:
            save("checkpoint.safetensors")
            score = masked_score(model.eval(), held, min(8, held.windows // recipe.rows or 1))
            line = {"step": progress.step, "tokens": progress.step * recipe.step_tokens, "seconds": round(progress.seconds),
                    "loss": round(sum(recent) / len(recent), 4), **{k: round(v, 4) for k, v in score.items()}}  # fmt: skip
            with open(work / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            bar.write(f"step {progress.step}: {score['accuracy']:.1%} of hidden tokens guessed, {score['bits']:.2f} bits each")
    bar.close()


# ---- what it leaves -------------------------------------------------------------------------------------------------


def measure(model: nn.Module, corpus: Corpus, recipe: Recipe, progress: Progress) -> dict:
    """The figures of the model card: on up to 64 batches of held-out windows, the model and the unigram floor at the same holes."""
    held = Windows(corpus.held, recipe)
    batches = min(64, held.windows // recipe.rows or 1)
    return {
        **masked_score(model, held, batches),
        "unigram": unigram_score(corpus.train, held, batches),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": progress.step, "tokens": progress.step * recipe.step_tokens, "hours": progress.seconds / 3600,
        "passes": progress.step * recipe.step_tokens / len(corpus.train), "finished": progress.total == progress.step,
        "text_tokens": len(corpus.train), "documents": len(corpus.documents), "held_out": len(corpus.held_documents),
        "torch": torch.__version__,
    }  # fmt: skip


SENTENCES = (
    "The old man opened the [MASK] and went in.",
    "She was very [MASK] when she heard the bad news.",
    "It was a cold winter [MASK].",
    "Return the [MASK] of the graph.",
)


@torch.no_grad()
def fill(model: nn.Module, tokenizer, text: str, k: int = 5) -> list[tuple[str, float]]:
    """The k likeliest tokens for the first [MASK] in `text`, each with its probability. Raises ValueError if there is no [MASK]."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    places = (ids[0] == tokenizer.mask_token_id).nonzero().flatten()
    if not len(places):
        raise ValueError(f"{text!r} has no {tokenizer.mask_token} to fill")
    best = model(input_ids=ids).logits[0, places[0]].softmax(-1).topk(k)
    return [(tokenizer.convert_ids_to_tokens(int(i)), float(p)) for p, i in zip(best.values, best.indices, strict=True)]


def export(model: nn.Module, corpus: Corpus, recipe: Recipe, figures: dict, out: Path) -> None:
    """Write the model folder `out`: fp16 weights, config, tokenizer, card; it is opened again and measured before it gets its name.

    Raises RuntimeError if rounding to fp16 changes the held-out loss by 0.01 bits or more.
    """
    from copy import deepcopy

    from transformers import BertTokenizerFast

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        with no_bars():
            deepcopy(model).half().save_pretrained(temporary)
        BertTokenizerFast(
            tokenizer_object=corpus.tokenizer, do_lower_case=True, model_max_length=recipe.context,
            **{f"{n.strip('[]').lower()}_token": n for n in SPECIAL},
        ).save_pretrained(temporary)  # fmt: skip
        rounded, tokenizer = load_encoder(temporary, head=True)
        held = Windows(corpus.held, recipe)
        some = min(4, held.windows // recipe.rows or 1)
        figures["fp16_bits"] = masked_score(rounded, held, some)["bits"] - masked_score(model, held, some)["bits"]
        if not abs(figures["fp16_bits"]) < 0.01:
            raise RuntimeError(f"rounding to fp16 changes the loss by {figures['fp16_bits']:.4f} bits a token: are the weights too large for it?")
        figures["filled"] = [(text, fill(rounded, tokenizer, text)) for text in SENTENCES]
        figures["megabytes"] = sum(p.stat().st_size for p in temporary.iterdir()) / 1e6
        (temporary / "README.md").write_text(card(out.name, recipe, figures), encoding="utf-8")
        put_in_place(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def card(name: str, recipe: Recipe, figures: dict) -> str:
    """The model card, in Markdown; all its figures come from `measure` and `export`."""
    f, r = figures, recipe
    state = "" if f["finished"] else "\n**Unfinished**: exported in the middle of a run, before the learning rate came down.\n"
    return "\n".join([
        f"# Model card: {name}",
        state,
        f"BERT's architecture with {f['parameters']:,} parameters: {r.layers} layers x {r.width}, {r.heads} heads, context {r.context}, "
        f"a lower-case WordPiece of {r.vocab:,} tokens of its own. Weights in fp16; load them as float32 on a CPU:",
        "",
        "    model, tokenizer = load_encoder()                       head=True: with its head for hidden words",
        "    AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)",
        "",
        f"- **Trained on** {f['documents']:,} documents of {f['text_tokens']:,} tokens, gone through {f['passes']:.2f} times in windows of {r.context} "
        f"drawn in random order; {f['held_out']} more documents were held out.",
        f"- **Task**: {HIDDEN:.0%} of the tokens hidden, to be guessed from both sides; no second task (no next-sentence prediction).",
        f"- **Steps**: {f['steps']:,} of {r.rows} x {r.context} tokens, {f['tokens']:,} tokens in all; {f['hours']:.2f} hours.",
        f"- **Recipe**: seed {r.seed}; embeddings begin as the best rank-{r.width} form of which words stand near which (`encoder.meanings`); Muon lr "
        f"{r.lr:g}, weight decay {r.weight_decay:g} for the layers' matrices, AdamW lr {r.embedding_lr:g} for the rest, {r.position_lr:g} for positions; "
        f"{r.warmup} steps of warm-up, the last {r.decay:.0%} down to 0; no dropout. torch {f['torch']}.",
        f"- **Size**: {f['megabytes']:.1f} MB. Rounding to fp16 changed the held-out loss by {f['fp16_bits']:+.5f} bits a token.",
        "",
        f"## Hidden tokens of held-out text ({f['asked']:,} of them)",
        "",
        "| guesser | bits per hidden token | guessed right |",
        "|---|---:|---:|",
        f"| unigram: how often each token comes | {f['unigram']['bits']:.2f} | {f['unigram']['accuracy']:.1%} |",
        f"| **this model** | **{f['bits']:.2f}** | **{f['accuracy']:.1%}** |",
        "",
        "## What it puts into a hole (not chosen)",
        "",
        *(f"- {text} {', '.join(f'{word} {p:.0%}' for word, p in words)}" for text, words in f["filled"]),
        "",
        "## Limits",
        "",
        "It has read little and knows no facts. A word that never stood in its books is a heap of pieces to it. It repeats its books' views of "
        "people, which may be of another century. It is there to be adapted and taken apart.",
        "",
    ])  # fmt: skip
