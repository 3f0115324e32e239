"""A small GPT-2 from a folder of text: tokenizer, training, held-out bits per byte, and a folder that load_gpt2 opens.

    pretrain("books/", "my-gpt2", tokens=30e6)          the same from a shell:  lora-lab pretrain books/ my-gpt2 --tokens 30e6

What is special about it, because time on a small machine is short: Muon for the hidden matrices, one token in four spent on drills in
copying (drills.py), a learning rate that stays up until the last quarter, so that a run can be cut or lengthened. Everything that a step
does follows from the seed and the step's number; a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .corpus import Corpus, excerpt, load_corpus, need_disk, prepare, yardsticks
from .drills import Drills
from .files import atomic_write
from .model_card import export

FORMAT = "lora-lab-pretraining-1"


@dataclass(frozen=True)
class Recipe:
    """What decides the result, but for the text and the number of steps.

    lr is Muon's, for the matrices of the layers; embedding_lr Adam's for the rest; position_lr for the embedding of positions.
    """

    vocab: int = 4096
    layers: int = 6
    width: int = 256
    heads: int = 4
    context: int = 256
    rows: int = 9  # of running text in a step, each of `context` tokens
    drills: int = 3  # more rows, of drills
    lr: float = 4e-3
    embedding_lr: float = 3e-3
    position_lr: float = 3e-4
    weight_decay: float = 0.1
    warmup: int = 200  # steps
    decay: float = 0.25  # of all steps, at the end: lr goes down to 0 in a straight line
    hold_out: int = 20  # one document in so many is never trained on
    megabytes: float = 0.0  # of text used, from the beginning; 0: all
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"vocab": 258, "layers": 1, "width": 1, "heads": 1, "context": 64, "rows": 1, "drills": 0, "warmup": 0, "hold_out": 2}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}; found {getattr(self, name)}")
        if self.vocab > 65536:
            raise ValueError(f"vocab must be at most 65536, so that a token fits into two bytes; found {self.vocab}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads; found {self.width} and {self.heads}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be between 0 and 1; found {self.decay}")

    @property
    def step_tokens(self) -> int:
        return (self.rows + self.drills) * self.context


# ---- batches --------------------------------------------------------------------------------------------------------


class Batches:
    """Batch number `step`, from nothing but the seed and that number: (x, y), each (rows + drills, context); y is -100 where nothing counts."""

    def __init__(self, corpus: Corpus, recipe: Recipe) -> None:
        self.stream, self.recipe = corpus.train, recipe
        self.windows = (len(self.stream) - 1) // recipe.context
        self.end, self._epoch, self._order = corpus.end, -1, None
        tokenizer = corpus.tokenizer
        self.drills = Drills(
            self.stream,
            encode=lambda text: tokenizer.encode(text).ids,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            end=corpus.end,
            context=recipe.context,
        )

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = [self._window(i) for i in range(step * self.recipe.rows, (step + 1) * self.recipe.rows)]
        for i in range(self.recipe.drills):
            tokens, counted = self.drills.row(np.random.default_rng([self.recipe.seed, 1, step, i]))
            tokens, counted = np.array(tokens, dtype=np.int64), np.array(counted)
            rows.append((tokens[:-1], np.where(counted[1:] > 0, tokens[1:], -100)))
        x, y = zip(*rows, strict=True)
        return torch.from_numpy(np.stack(x)), torch.from_numpy(np.stack(y))

    def _window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Every window once, in an order of its own for each time through the text."""
        epoch, i = divmod(number, self.windows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.recipe.seed, epoch]).permutation(self.windows)
        start = self._order[i] * self.recipe.context
        window = self.stream[start : start + self.recipe.context + 1].astype(np.int64)
        # One in eight stands behind <|endoftext|>, as prompts often do; in the text itself that token is rare.
        if number % 8 == 0:
            window = np.concatenate([[self.end], window[:-1]])
        return window[:-1], window[1:]


# ---- model ----------------------------------------------------------------------------------------------------------


def parameter_count(recipe: Recipe) -> int:
    """Embeddings (the head is tied), and for each layer 12 d^2 weights, 9 d biases, 4 d in its norms; 2 d in the last norm."""
    d = recipe.width
    return (recipe.vocab + recipe.context) * d + recipe.layers * (12 * d * d + 13 * d) + 2 * d


def build_model(recipe: Recipe, end: int = 0, attention: str = "eager") -> nn.Module:
    """transformers' GPT2LMHeadModel with fresh weights from the recipe's seed. Raises ImportError without transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=recipe.vocab, n_positions=recipe.context, n_embd=recipe.width, n_layer=recipe.layers, n_head=recipe.heads,
        # The same function as GPT-2's "gelu_new", in one kernel. No dropout: no text comes often enough to be learned by heart.
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=end, eos_token_id=end, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(waves(recipe.context, recipe.width))
    return model


def waves(context: int, width: int, height: float = 0.13) -> Tensor:
    """(context, width): sines and cosines of the position, of wavelengths from 2 pi to 2 `context`; where the embedding of positions starts.

    It is trained like GPT-2's, but from noise each position has to be learned by itself, and with it "the token before", without which
    nothing is copied: 1,000 steps from noise and 125 more of repeats copied nothing; with waves put in their place (at step 1,500), 125 began to.
    """
    frequencies = torch.logspace(0, math.log10(math.pi / context), (width + 1) // 2)
    angles = torch.arange(context)[:, None] * frequencies
    return height * torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, biases and norms; each group carries its lr at full height as "peak".

    Muon replaces a matrix's momentum M = U S Vh by about U Vh, so that all directions are learned equally fast; "match_rms_adamw"
    scales it so that an lr means about what it means to Adam. On the same 0.8 M tokens it reached 1.99 bits per byte where AdamW reached 2.09.
    """
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    positions = model.transformer.wpe.weight
    chosen = {id(p) for p in (*hidden, positions)}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = [{"params": hidden, "peak": recipe.lr}]
    # At the other embedding's lr, Adam's noise would wash the waves away.
    adam = [{"params": rest, "peak": recipe.embedding_lr}, {"params": [positions], "peak": recipe.position_lr}]
    return [
        torch.optim.Muon(muon, lr=recipe.lr, momentum=0.95, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, lr=recipe.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def lr_factor(step: int, recipe: Recipe, total: int | None) -> float:
    """Warm-up, then constant, then (if the end is known) in a straight line to 0 over the last `decay` of `total` steps."""
    factor = min(1.0, (step + 1) / max(1, recipe.warmup))
    down = decay_steps(recipe, total) if total else 0
    return factor * min(1.0, (total - step) / down) if down else factor


def decay_steps(recipe: Recipe, total: int) -> int:
    return round(recipe.decay * total)


def token_losses(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
    """Cross-entropy in nats of each next token, (B, T) flattened; in bf16 where the machine is faster at it."""
    device = next(model.parameters()).device
    x, y = x.to(device), y.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=fast_in_bf16(device)):
        logits = model.lm_head(model.transformer(input_ids=x).last_hidden_state)
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction=reduction)


def fast_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices; elsewhere bf16 would be imitated, slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(known and known())


# ---- measures -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_byte(model: nn.Module, documents: Sequence[np.ndarray], bytes_of: np.ndarray, context: int, rows: int = 16) -> np.ndarray:
    """(documents, 2): the bits that each document costs, and its bytes; the ratio of the sums is the model's bits per byte.

    Each document is cut into windows of `context` tokens that start cold: the first token of a window is guessed from the last one of the
    window before, and nothing older. So these figures are a little worse than a sliding window's.
    """
    windows, owners = [], []
    for i, document in enumerate(documents):
        for start in range(0, len(document) - 1, context):
            windows.append(document[start : start + context + 1].astype(np.int64))
            owners.append(i)
    nats, size = np.zeros(len(documents)), np.zeros(len(documents))
    for start in range(0, len(windows), rows):
        chosen = windows[start : start + rows]
        x, y = np.zeros((len(chosen), context), dtype=np.int64), np.full((len(chosen), context), -100, dtype=np.int64)
        for row, window in enumerate(chosen):
            x[row, : len(window) - 1], y[row, : len(window) - 1] = window[:-1], window[1:]
        losses = token_losses(model, torch.from_numpy(x), torch.from_numpy(y)).view(len(chosen), context).sum(1).double().cpu()
        for owner, loss, window in zip(owners[start : start + rows], losses.tolist(), chosen, strict=True):
            nats[owner] += loss
            size[owner] += bytes_of[window[1:]].sum()
    return np.stack([nats / math.log(2), size], axis=1)


@torch.no_grad()
def copy_losses(model: nn.Module, tokens: np.ndarray, context: int, end: int, random: bool = False, rows: int = 64) -> tuple[float, float]:
    """Mean loss (nats per token, every token counts) of a span when it comes first and when it comes again, after other text.

    A row is <|endoftext|>, `context`/4 tokens of text, a span of 3/16 `context`, another `context`/4, the span again; of the held-out
    text, or (random) of tokens drawn evenly, where nothing but copying helps.
    """
    rng = np.random.default_rng(7)
    gap, span = context // 4, 3 * context // 16
    x = np.zeros((rows, 2 * (gap + span) + 1), dtype=np.int64)
    for row in x:
        start = int(rng.integers(0, len(tokens) - 2 * gap - span))
        words = tokens[start : start + 2 * gap + span].astype(np.int64)
        if random:
            words = (end + rng.integers(1, model.config.vocab_size, len(words))) % model.config.vocab_size
        row[:] = np.concatenate([[end], words, words[gap : gap + span]])
    x = torch.from_numpy(x)
    losses = token_losses(model, x[:, :-1], x[:, 1:]).view(rows, -1)
    return float(losses[:, gap : gap + span].mean()), float(losses[:, 2 * gap + span :].mean())


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands. `total` is None until the end is known: a run on the clock decides it when the decay begins."""

    step: int = 0
    total: int | None = None
    seconds: float = 0.0


def save_checkpoint(path: Path, model: nn.Module, optimizers, progress: Progress, recipe: Recipe, fingerprint: str) -> None:
    """Parameters and both optimizers' states in one safetensors file; everything else goes into its header."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"parameter/{name}"] = parameter.detach()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"state/{name}/{key}"] = value
    header = {"format": FORMAT, "progress": asdict(progress), "recipe": asdict(recipe), "fingerprint": fingerprint}
    with atomic_write(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={k: json.dumps(v) for k, v in header.items()})


def read_header(path: Path) -> dict:
    """What a checkpoint says of itself. Raises ValueError if it is none, or not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
        if header["format"] != FORMAT:
            raise KeyError(f"format {header['format']}")
        return header | {"progress": Progress(**header["progress"]), "recipe": Recipe(**header["recipe"])}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a whole pre-training checkpoint ({type(error).__name__}: {error}). Delete it to begin again") from error


def load_checkpoint(path: Path, model: nn.Module, optimizers, recipe: Recipe, fingerprint: str) -> Progress:
    """Put a checkpoint into model and optimizers. Raises ValueError, before any change, if it is of another run."""
    from safetensors.torch import load_file

    header = read_header(path)
    mine, theirs = asdict(recipe), asdict(header["recipe"])
    other = [f"{key} was {theirs[key]}, now {mine[key]}" for key in mine if mine[key] != theirs[key]]
    if header["fingerprint"] != fingerprint:
        other.append("the text is another one")
    if other:
        raise ValueError(f"{path} belongs to another run: {'; '.join(other)}. Give this run a --work folder of its own")
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"parameter/{name}"])
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = f"state/{names[parameter]}/"
                state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if state:
                    optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in state.items()}
    return header["progress"]


def _starting_point(work: Path, recipe: Recipe, total: int | None, minutes: float | None) -> Path | None:
    """The checkpoint to go on from: the last one; but if its lr is already coming down towards a nearer end, the one before that began."""
    last, stable = work / "checkpoint.safetensors", work / "stable.safetensors"
    if not last.is_file():
        return None
    progress = read_header(last)["progress"]
    if progress.total is None or progress.step < progress.total - decay_steps(recipe, progress.total):
        return last
    if total is not None and total < progress.step:
        raise ValueError(f"{last} is at step {progress.step} already; fewer tokens ({total} steps) can't be trained. Give a --work folder of its own")
    if total is not None and total == progress.total:
        return last
    if minutes is not None and (progress.step < progress.total or 60 * minutes < 1.05 * progress.seconds):
        return last
    if not stable.is_file():
        raise ValueError(f"{last} is past its plateau and {stable.name} is gone: to train longer, begin again in another --work folder")
    return stable


def _run(rank: int, workers: int, work: Path, recipe: Recipe, fingerprint: str, tokens: float | None, minutes: float | None, every: int) -> None:
    """One of `workers` equal processes: each takes its share of every batch, and the sum of the gradients makes the step."""
    _keep_memory()
    if workers > 1:
        import datetime

        torch.distributed.init_process_group(
            "gloo", init_method=(work / "rendezvous").resolve().as_uri(), rank=rank, world_size=workers, timeout=datetime.timedelta(hours=6)
        )
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    device = torch.device("cuda" if torch.cuda.is_available() and workers == 1 else "cpu")
    corpus = load_corpus(work)
    batches, bytes_of = Batches(corpus, recipe), corpus.bytes_of()
    # On a CPU, torch's fused attention is slower in its backward pass than the plain formula.
    model = build_model(recipe, corpus.end, "sdpa" if device.type == "cuda" else "eager").to(device)
    optimizers = build_optimizers(model, recipe)
    parameters = list(model.parameters())
    total = math.ceil(tokens / recipe.step_tokens) if tokens is not None else None

    progress, begun = Progress(total=total), _starting_point(work, recipe, total, minutes)
    if begun is not None:
        progress = load_checkpoint(begun, model, optimizers, recipe, fingerprint)
        if tokens is not None:
            progress.total = total
        elif begun.name == "stable.safetensors":
            progress.total = None
    sample = [np.concatenate(excerpt(corpus.held, corpus.end, 2 * recipe.context))]
    lead = rank == 0
    if lead:
        from tqdm.auto import tqdm

        _cut_log(work / "log.jsonl", progress.step)
        bar = tqdm(total=progress.total, initial=progress.step, unit="step", disable=None, smoothing=0.02)
    began, before = time.monotonic(), progress.seconds
    recent: list[float] = []

    def save(name: str) -> None:
        save_checkpoint(work / name, model, optimizers, progress, recipe, fingerprint)

    parent = torch.multiprocessing.parent_process() if workers > 1 else None
    while progress.total is None or progress.step < progress.total:
        if parent is not None and not parent.is_alive():
            raise SystemExit(1)  # killed; its workers must not go on writing where the next call begins again
        factor = lr_factor(progress.step, recipe, progress.total)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        x, y = batches(progress.step)
        counted = int((y >= 0).sum())
        loss = token_losses(model, x[rank::workers], y[rank::workers], "sum") / counted
        loss.backward()
        # The lead's clock decides for all when the lr begins to come down.
        plan = 0
        if lead and minutes is not None and progress.total is None and progress.seconds >= 60 * minutes * (1 - recipe.decay):
            plan = progress.step + 1 + max(1, round((progress.step + 1) * recipe.decay / (1 - recipe.decay)))
        number, plan = _sum_gradients(parameters, loss, plan, workers)
        norm = float(nn.utils.clip_grad_norm_(parameters, 1.0))
        if not (math.isfinite(number) and math.isfinite(norm)):
            raise RuntimeError(f"step {progress.step + 1}: the loss is {number}, the gradient's norm {norm}. Begin again with a lower lr")
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        progress.step += 1
        if not lead:
            progress.total = plan or progress.total
            continue
        progress.seconds = before + time.monotonic() - began
        recent = [*recent[-99:], number]
        bar.set_postfix(loss=f"{number:.3f}", refresh=False)
        bar.update()
        if plan:
            progress.total = bar.total = plan
        if plan or (progress.total and progress.step == progress.total - decay_steps(recipe, progress.total)):
            save("stable.safetensors")
        if progress.step % every == 0 or progress.step == progress.total:
            save("checkpoint.safetensors")
            bits, size = bits_per_byte(model, sample, bytes_of, recipe.context)[0]
            copies = [copy_losses(model, corpus.held, recipe.context, corpus.end, random) for random in (False, True)]
            line = {
                "step": progress.step, "tokens": progress.step * recipe.step_tokens, "seconds": round(progress.seconds),
                "loss": round(sum(recent) / len(recent), 4), "bits_per_byte": round(bits / size, 4),
                "text_first_again": [round(v, 3) for v in copies[0]], "random_first_again": [round(v, 3) for v in copies[1]],
            }  # fmt: skip
            with open(work / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            bar.write(f"step {progress.step}: {bits / size:.3f} bits per byte, copying {copies[0][0]:.2f} -> {copies[0][1]:.2f} nats")
    if lead:
        bar.close()


def _sum_gradients(parameters: list[nn.Parameter], loss: Tensor, plan: int, workers: int) -> tuple[float, int]:
    """Add up gradients, the loss and the lead's plan over all workers."""
    if workers == 1:
        return loss.item(), plan
    flat = torch.cat([p.grad.flatten() for p in parameters] + [torch.tensor([loss.item(), float(plan)])])
    torch.distributed.all_reduce(flat)
    for p, summed in zip(parameters, flat.split([p.numel() for p in parameters] + [2])[:-1], strict=True):
        p.grad.copy_(summed.view_as(p))
    return float(flat[-2]), int(flat[-1])


def _cut_log(path: Path, step: int) -> None:
    """Lines from after the checkpoint that a killed run goes on from come once more."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _keep_memory() -> None:
    """Ask glibc not to hand big blocks back after each step: fetching them again cost 13,000-30,000 page faults, 7 % of the time."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ---- the front door, and what it leaves ---------------------------------------------------------------------------------


def pretrain(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    recipe: Recipe | None = None,
    *,
    work: str | os.PathLike | None = None,
    tokens: float | None = None,
    minutes: float | None = None,
    workers: int = 1,
    every: int = 250,
    train: bool = True,
    say=print,
) -> dict:
    """Train a small GPT-2 on the text in `folder` and leave it, with its model card, in the folder `out`. Returns the card's figures.

    tokens    the budget (rounded up to whole steps), or
    minutes   of training; without either, once through the text
    work      tokenizer, encoded text, log and checkpoints (by default `out` + "-work"). The same call goes on from there, bit for bit on one
              CPU, also after a kill; a larger budget goes on from before the lr came down
    workers   processes that share each batch. Their sums differ in the last bits from one process's; where other programs run on the same
              cores they are faster than threads, which wait for each other hundreds of times in a step
    every     steps between checkpoints
    train     False: leave out the training and export the last checkpoint as it is

    Raises ValueError for text, settings or checkpoints that don't fit, OSError when the disk is too small, RuntimeError when the loss stops
    being a number. `out` appears when it is whole, not before.
    """
    recipe, out = recipe or Recipe(), Path(out)
    work = Path(work) if work is not None else out.with_name(out.name + "-work")
    if tokens is not None and minutes is not None:
        raise ValueError("give a budget in tokens or in minutes, not both")
    for name, value in (("tokens", tokens), ("minutes", minutes), ("workers", workers), ("every", every)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a number above 0; found {value}")
    if minutes is not None and recipe.decay == 1:
        raise ValueError("with a budget in minutes decay must be below 1: when the lr comes down is decided by the speed until then")
    if workers > recipe.rows + recipe.drills:
        raise ValueError(f"{workers} workers have nothing to share in batches of {recipe.rows + recipe.drills} rows")
    if out.exists() and not (out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))):
        raise ValueError(f"{out} exists and is no model folder: nothing is written over it. Name another one")
    if work.resolve() == out.resolve():
        raise ValueError(f"{work} can't be both the model's folder and the work folder: the model replaces its folder")
    with alone_in(work):
        corpus = prepare(folder, work, recipe.vocab, recipe.hold_out, recipe.megabytes, recipe.context, say)
        need_disk(work, 4 * 12 * parameter_count(recipe))  # two checkpoints, one being written, the model; three numbers of 4 bytes a parameter
        if tokens is None and minutes is None:
            tokens = (len(corpus.train) - 1) // recipe.context / recipe.rows * recipe.step_tokens
        checkpoint = work / "checkpoint.safetensors"
        if train:
            say(f"{len(corpus.train):,} tokens of text; a model of {parameter_count(recipe):,} parameters; checkpoints in {work}")
            (work / "rendezvous").unlink(missing_ok=True)
            arguments = (workers, work, recipe, corpus.fingerprint, tokens, minutes, every)
            if workers == 1:
                _run(0, *arguments)
            else:
                torch.multiprocessing.spawn(_run, arguments, nprocs=workers)
        elif not checkpoint.is_file():
            raise ValueError(f"there is no {checkpoint} to export: train first")
        model = build_model(recipe, corpus.end)
        progress = load_checkpoint(checkpoint, model, build_optimizers(model, recipe), recipe, corpus.fingerprint)
        say("measuring on held-out text ...")
        figures = measure(model, corpus, recipe, progress)
        sample = excerpt(corpus.held, corpus.end, 4 * recipe.context)

        def bits(model: nn.Module) -> float:
            return float(np.divide(*bits_per_byte(model, sample, corpus.bytes_of(), recipe.context).sum(0)))

        export(model, corpus.tokenizer, recipe, figures, out, bits)
        say(f"{out}: {figures['bits_per_byte']:.3f} bits per byte, {figures['megabytes']:.1f} MB")
        return figures


@contextmanager
def alone_in(work: Path):
    """Keep a second run out of the work folder: each would take the other's checkpoints for its own. Ends with the process, however it ends.

    Raises ValueError while another process is at work there.
    """
    from filelock import FileLock, Timeout

    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another run is at work in {work}: wait for it, end it, or name another --work folder") from None
    try:
        yield
    finally:
        lock.release()


def measure(model: nn.Module, corpus: Corpus, recipe: Recipe, progress: Progress) -> dict:
    """The figures of the model card, on the first 20,000 tokens of each held-out document."""
    bytes_of, documents = corpus.bytes_of(), excerpt(corpus.held, corpus.end)
    text = corpus.tokenizer.decode(np.concatenate(documents).tolist(), skip_special_tokens=True).encode()
    model.eval()
    bits = bits_per_byte(model, documents, bytes_of, recipe.context)
    copies = {kind: copy_losses(model, corpus.held, recipe.context, corpus.end, kind == "random") for kind in ("text", "random")}
    return {
        "bits_per_byte": float(bits[:, 0].sum() / bits[:, 1].sum()),
        "per_document": {n: round(float(b / size), 3) for n, (b, size) in zip(corpus.held_documents, bits, strict=True)},
        "held_out_bytes": int(bits[:, 1].sum()),
        "bytes_per_token": float(bits[:, 1].sum() / sum(len(d) - 1 for d in documents)),
        "yardsticks": yardsticks(corpus.train, documents, bytes_of, text),
        "copy": copies,
        "parameters": parameter_count(recipe),
        "steps": progress.step,
        "tokens": progress.step * recipe.step_tokens,
        "hours": progress.seconds / 3600,
        "passes": progress.step * recipe.rows * recipe.context / len(corpus.train),
        "finished": progress.total == progress.step,
        "text_tokens": len(corpus.train),
        "documents": len(corpus.documents),
        "held_out": len(corpus.held_documents),
        "torch": torch.__version__,
    }
