"""One visible training loop, used by every lab.

`train` is a generator: it yields a `Step` after each update, so the same loop serves a `for` statement, a live chart and a plain script:

    for step in train(model, Batches(x, y), steps=300, lr=1e-2):
        losses.append(step.loss)
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import atomic_write

OPTIMIZERS = {
    "adamw": lambda parameters, lr, weight_decay: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay),
    "sgd": lambda parameters, lr, weight_decay: torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay),
}


@dataclass(frozen=True)
class Step:
    """What one update did: its number from 1, the batch's loss before it, the lr used, the gradient's norm before clipping, samples/s."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples_per_s: float


class TrainingDiverged(RuntimeError):
    """The loss or a gradient stopped being a number. The model holds the weights from before that step."""


def batch_loss(model: nn.Module, batch) -> Tensor:
    """Cross-entropy (nats) of a classifier on a pair (x, y), or the model's own `.loss` for a dict of inputs."""
    if isinstance(batch, dict):
        return model(**batch).loss
    x, y = batch
    return F.cross_entropy(model(x), y)


def train(
    model: nn.Module,
    batches: Iterable,
    steps: int,
    lr: float | Callable[[int], float],
    *,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    clip: float | None = None,
    loss: Callable[[nn.Module, object], Tensor] = batch_loss,
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
) -> Iterator[Step]:
    """Train the parameters that require a gradient; yield a `Step` after each of `steps` updates.

    batches     pairs (x, y) or dicts; gone through again when they end
    lr          a number, or a function of the step (counted from 0) that is asked before every update, so a slider can move it
    optimizer   "adamw" or "sgd"
    clip        largest gradient norm allowed; None leaves gradients alone
    device      "auto": cuda, else mps, else cpu. The model and each batch are moved there
    seed        seeds torch once at the start (dropout); None leaves the random state alone
    checkpoint  a file. If it is there the run continues from it, bit for bit on the CPU; it is rewritten every `checkpoint_every` steps and
                at the end, atomically

    However the loop ends (last step, `break`, Ctrl-C, an error), every module's training mode is put back.
    Raises ValueError for arguments that make no sense and for a model with nothing to train, TrainingDiverged at a NaN or infinity.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; found {steps}")
    if not callable(lr) and not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be a finite number, 0 or more; found {lr}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "nothing to train: no parameter of this model requires a gradient. "
            "Call apply_lora(model, ...) first; a loaded or merged adapter must be made trainable again"
        )
    device = choose_device(device)
    # Checked when train() is called, not at the first step: a generator would keep a mistake to itself until somebody iterates.
    settings = {"optimizer": optimizer, "weight_decay": weight_decay}
    return _run(model, batches, steps, lr, settings, clip, loss, device, seed, progress, checkpoint, checkpoint_every)


def _run(model, batches, steps, lr, settings, clip, loss, device, seed, progress, checkpoint, checkpoint_every):
    model.to(device)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())
    lr_at = lr if callable(lr) else lambda step: lr
    optimizer = OPTIMIZERS[settings["optimizer"]](list(named.values()), lr_at(0), settings["weight_decay"])
    if seed is not None:
        torch.manual_seed(seed)
    start = 0
    if checkpoint is not None and os.path.exists(checkpoint):
        start = _load_checkpoint(checkpoint, named, optimizer, settings, buffers)
    stream = _batches_from(batches, start)
    bar = None
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(total=steps, initial=start, unit="step")
    last_saved = start
    with _modes_restored(model):
        model.train()
        try:
            for step in range(start, steps):
                began = time.perf_counter()
                rate = float(lr_at(step))
                if not (math.isfinite(rate) and rate >= 0):
                    raise ValueError(f"step {step + 1}: lr must be a finite number, 0 or more; the function gave {rate}")
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch = _to(next(stream), device)
                optimizer.zero_grad(set_to_none=True)
                value = loss(model, batch)
                value.backward()
                norm = float(nn.utils.clip_grad_norm_(named.values(), clip if clip is not None else math.inf))
                number = value.item()
                if not (math.isfinite(number) and math.isfinite(norm)):
                    raise TrainingDiverged(_explain(step + 1, number, norm, rate))
                optimizer.step()
                elapsed = time.perf_counter() - began
                if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                    _save_checkpoint(checkpoint, named, optimizer, step + 1, settings, buffers)
                    last_saved = step + 1
                if bar is not None:
                    bar.set_postfix(loss=f"{number:.4g}", refresh=False)
                    bar.update()
                yield Step(step + 1, number, rate, norm, _samples(batch) / elapsed)
        finally:
            if bar is not None:
                if checkpoint is not None and last_saved < steps:
                    bar.write(f"stopped; {checkpoint} holds step {last_saved}, the same call continues from there")
                bar.close()


def _explain(step: int, loss: float, norm: float, lr: float) -> str:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    return (
        f"step {step}, lr {lr:g}: {what}. The model keeps its weights from before this step. Most often the lr is too high for alpha / r: "
        f"try lr={lr / 10:g}, a smaller alpha, or clip=1.0. If it happens at step 1, look for NaN or infinity in the data"
    )


def evaluate(model: nn.Module, batches: Iterable, device: str | torch.device = "auto") -> float:
    """Accuracy between 0 and 1 of a classifier on pairs (x, y), in eval mode, without gradients; modes are put back.

    Pass `[(x, y)]` for one tensor pair. Raises ValueError if there is no sample.
    """
    device = choose_device(device)
    model.to(device)
    right = total = 0
    with _modes_restored(model), torch.no_grad():
        model.eval()
        # Batches goes round for ever; one epoch is every sample once.
        for x, y in islice(batches, getattr(batches, "per_epoch", None)):
            right += (model(x.to(device)).argmax(-1) == y.to(device)).sum().item()
            total += y.numel()
    if total == 0:
        raise ValueError("evaluate needs at least one sample; the batches were empty")
    return right / total


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """"auto": cuda, else mps, else cpu."""
    if str(device) != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    # Module by module: a model may be in training mode with parts of it in eval mode, and model.train(flag) would forget that.
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _batches_from(batches: Iterable, start: int) -> Iterator:
    """An endless stream that begins at batch `start`, without drawing the ones before where `batches` can jump."""
    if hasattr(batches, "from_step"):
        return batches.from_step(start)

    def again():
        while True:
            empty = True
            for batch in batches:
                empty = False
                yield batch
            if empty:
                raise ValueError(
                    "the batches ran out: an iterator can be gone through only once. Pass a list, a DataLoader or Batches(x, y) instead"
                )

    return islice(chain(again()), start, None)


def _to(batch, device):
    if isinstance(batch, dict):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return tuple(v.to(device) if isinstance(v, Tensor) else v for v in batch)


def _samples(batch) -> int:
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])


def _save_checkpoint(path, named, optimizer, step, settings, buffers) -> None:
    """Trained tensors, optimizer state and random state in one safetensors file; numbers go into its header as JSON."""
    from safetensors.torch import save_file

    tensors, numbers = {"rng/cpu": torch.get_rng_state()}, {}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    tensors |= {f"buffer/{n}": b for n, b in buffers.items()}  # running statistics of norms
    for name, parameter in named.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"state/{name}/{key}"] = value
            else:
                numbers[f"state/{name}/{key}"] = value
    header = {"format": "lora-lab-training-1", "step": str(step), "settings": json.dumps(settings), "numbers": json.dumps(numbers)}
    with atomic_write(path) as temporary:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary, metadata=header)


def _load_checkpoint(path, named, optimizer, settings, buffers) -> int:
    """Put a checkpoint into the model and the optimizer and return its step. Raises ValueError, before any change, if it does not fit."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        step, found, numbers = int(header["step"]), json.loads(header["settings"]), json.loads(header["numbers"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole training checkpoint ({type(error).__name__}: {error}). Delete it to start again from step 0"
        ) from error
    shapes = {k: tuple(t.shape) for k, t in tensors.items() if k.startswith(("parameter/", "buffer/"))}
    wanted = {f"parameter/{n}": tuple(p.shape) for n, p in named.items()} | {f"buffer/{n}": tuple(b.shape) for n, b in buffers.items()}
    if shapes != wanted or found != settings:
        differing = sorted(set(shapes.items()) ^ set(wanted.items()))[:6]
        raise ValueError(
            f"{path} belongs to another run: it was made with {found}, this run has {settings}"
            + (f"; trained tensors that differ: {differing}" if differing else "")
            + ". Give this run its own checkpoint file"
        )
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(tensors[f"buffer/{name}"])
        for name, parameter in named.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            state = {k.rpartition("/")[2]: v for k, v in chain(tensors.items(), numbers.items()) if k.startswith(f"state/{name}/")}
            if state:
                # Adam keeps its step counter on the CPU, its moments where the parameter is.
                optimizer.state[parameter] = {
                    k: v.to(parameter.device) if isinstance(v, Tensor) and v.dim() else v for k, v in state.items()
                }
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return step
