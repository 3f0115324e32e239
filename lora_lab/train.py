"""One visible training loop, used by every lab.

`train` is a generator: it yields a `Step` after each update, so the same loop serves a `for` statement, a live chart and a plain script:

    for step in train(model, Batches(x, y), steps=300, lr=1e-2):
        losses.append(step.loss)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import atomic_write
from .updates import (  # noqa: F401  (named here, too: `train` is where people look for them)
    OPTIMIZERS,
    Step,
    TrainingDiverged,
    Updates,
    bf16_is_fast,
    choose_device,
    choose_precision,
)


def batch_loss(model: nn.Module, batch) -> Tensor:
    """Cross-entropy (nats) of a classifier on a pair (x, y), or the model's own `.loss` for a dict of inputs."""
    if isinstance(batch, dict):
        return model(**batch).loss
    x, y = batch
    return F.cross_entropy(model(x), y)


def token_loss(label_smoothing: float = 0.0) -> Callable[[nn.Module, dict], Tensor]:
    """A loss for causal language models on {"input_ids", "labels"}, both (B, T): the mean of -log p(next token) in nats, labels -100 left out.

    With label smoothing e the target is (1 - e) on the true token and e spread evenly over the whole vocabulary.
    Of transformers' GPT-2 on a CPU the output head is asked only where there is a label, which saves 15-20 % of a step in fp32 if half of the
    tokens are a prompt; a GPU would have to wait until it is known how many that are.
    Raises ValueError unless 0 <= e < 1.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is a share, 0 <= e < 1; found {label_smoothing}")

    def loss(model: nn.Module, batch: dict) -> Tensor:
        inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"][:, 1:]  # position t predicts token t + 1
        if hasattr(model, "generation_config"):
            # transformers' models that write: keys and values for a next token that never comes would stay until the backward pass, a tenth
            # of the activations
            inputs.setdefault("use_cache", False)
        if type(model).__name__ == "GPT2LMHeadModel" and labels.device.type == "cpu":
            asked = labels != -100
            logits, labels = model.lm_head(model.transformer(**inputs)[0][:, :-1][asked]), labels[asked]
        else:
            logits, labels = model(**inputs).logits[:, :-1].flatten(0, 1), labels.flatten()
        # softmax over tens of thousands of words needs more than bf16's 3 digits
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    return loss


def linear_schedule(lr: float, steps: int, warmup: int = 0) -> Callable[[int], float]:
    """lr(step) for `train`, step from 0: up in a line over `warmup` steps, then down in a line, to 0 just after the last of `steps`.

        lr * (step + 1) / (warmup + 1)            while step < warmup
        lr * (steps - step) / (steps - warmup)    from then on

    Raises ValueError unless 0 <= warmup < steps.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warm-up must end before the run does: 0 <= warmup < steps; found warmup={warmup}, steps={steps}")

    def rate(step: int) -> float:
        return lr * (step + 1) / (warmup + 1) if step < warmup else lr * max(steps - step, 0) / (steps - warmup)

    return rate


def train(
    model: nn.Module,
    batches: Iterable,
    steps: int,
    lr: float | Callable[[int], float],
    *,
    optimizer: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] = "adamw",
    weight_decay: float = 0.0,
    clip: float | None = None,
    loss: Callable[[nn.Module, object], Tensor] = batch_loss,
    device: str | torch.device = "auto",
    precision: str = "auto",
    accumulate: int = 1,
    compile: bool = False,
    seed: int | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
) -> Iterator[Step]:
    """Train the parameters that require a gradient; yield a `Step` after each of `steps` updates.

    batches     pairs (x, y) or dicts; gone through again when they end
    lr          a number, or a function of the step (counted from 0) that is asked before every update, so a slider can move it
    optimizer   "adamw" or "sgd"; or a function of the list of trained parameters that returns a torch optimizer. It may make parameter
                groups: a group's lr is `lr` times its "lr_scale" (1 if it has none), so that A and B can have their own
    clip        largest gradient norm allowed; None leaves gradients alone
    device      "auto": cuda, else mps, else cpu. The model and each batch are moved there
    precision   in which forward and backward are calculated, by torch's autocast; parameters keep their own. "fp32": theirs. "bf16".
                "fp16": with a loss scale that grows and shrinks. "auto": see `choose_precision`
    accumulate  batches per update, for a large batch in small memory; the gradient is the mean of theirs, the loss too
    compile     let torch.compile translate the model first: a minute's wait, then faster steps on a GPU
    seed        seeds torch once at the start (dropout); None leaves the random state alone
    checkpoint  a file. If it is there the run continues from it, bit for bit on the CPU; it is rewritten every `checkpoint_every` steps and
                at the end, atomically

    However the loop ends (last step, `break`, Ctrl-C, an error), every module's training mode is put back.
    Raises ValueError for arguments that make no sense and for a model with nothing to train, TrainingDiverged at a NaN or infinity. On CUDA
    that comes up to 15 steps late; from the bad step on updates are skipped on the device, so the weights are those from before it all the same
    (an optimizer of your own must be made with fused=True for that, else each step is looked at).
    """
    if not callable(optimizer) and optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZERS)}, nor a function that makes one")
    if callable(optimizer) and weight_decay:
        raise ValueError(f"weight_decay={weight_decay:g} has no effect on an optimizer that a function makes; set it there")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; found {steps}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1; found {accumulate}")
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
    make = optimizer if callable(optimizer) else None
    settings = {"optimizer": getattr(make, "__name__", "a function") if make else optimizer, "weight_decay": weight_decay}
    if accumulate > 1:
        settings["accumulate"] = accumulate
    if any(p.dtype != torch.float32 for p in parameters) and precision == "auto":
        precision = "fp32"  # autocast is for models in float32; others are calculated as they are
    precision = choose_precision(precision, device)
    return _run(
        model, batches, steps, lr, make, settings, clip, loss, device, precision, accumulate, compile, seed, progress, checkpoint, checkpoint_every
    )


def _run(
    model, batches, steps, lr, make, settings, clip, loss, device, precision, accumulate, compile, seed, progress, checkpoint, checkpoint_every
):
    model.to(device)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())
    lr_at = lr if callable(lr) else lambda step: lr
    updates = Updates(list(named.values()), make or settings["optimizer"], lr_at(0), settings["weight_decay"], device, precision)
    if seed is not None:
        torch.manual_seed(seed)
    start = 0
    if checkpoint is not None and os.path.exists(checkpoint):
        start = _load_checkpoint(checkpoint, named, updates, settings, buffers)
    stream = _batches_from(batches, start * accumulate)
    net = torch.compile(model) if compile else model
    bar = None
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(total=steps, initial=start, unit="step")
    last_saved = start
    with modes_restored(model):
        model.train()
        try:
            for step in range(start, steps):
                rate = float(lr_at(step))
                if not (math.isfinite(rate) and rate >= 0):
                    raise ValueError(f"step {step + 1}: lr must be a finite number, 0 or more; the function gave {rate}")
                updates.begin(rate)
                for _ in range(accumulate):
                    batch = to_device(next(stream), device)
                    with updates.autocast():
                        value = loss(net, batch)
                    updates.backward(value / accumulate if accumulate > 1 else value, _samples(batch))
                saving = checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps)
                # The first step, too: what is wrong from the beginning is said at the beginning.
                done = updates.step(step + 1, clip, look=saving or step in (start, steps - 1))
                if saving:
                    _save_checkpoint(checkpoint, named, updates, step + 1, settings, buffers)
                    last_saved = step + 1
                if bar is not None:
                    if (step + 1) % updates.every == 0:
                        bar.set_postfix(loss=f"{done.loss:.4g}", refresh=False)
                    bar.update()
                yield done
        finally:
            updates.end()
            if bar is not None:
                if checkpoint is not None and last_saved < steps:
                    bar.write(f"stopped; {checkpoint} holds step {last_saved}, the same call continues from there")
                bar.close()


def evaluate(model: nn.Module, batches: Iterable, device: str | torch.device = "auto") -> float:
    """Accuracy between 0 and 1 of a classifier on pairs (x, y), in eval mode, without gradients; modes are put back.

    Pass `[(x, y)]` for one tensor pair. Raises ValueError if there is no sample.
    """
    device = choose_device(device)
    model.to(device)
    right = total = 0
    with modes_restored(model), torch.no_grad():
        model.eval()
        # Batches goes round for ever; one epoch is every sample once.
        for x, y in islice(batches, getattr(batches, "per_epoch", None)):
            right += (model(x.to(device)).argmax(-1) == y.to(device)).sum().item()
            total += y.numel()
    if total == 0:
        raise ValueError("evaluate needs at least one sample; the batches were empty")
    return right / total


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
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


def to_device(batch, device):
    """The batch with its tensors on `device`."""
    if isinstance(batch, dict):
        return {k: _moved(v, device) for k, v in batch.items()}
    return tuple(_moved(v, device) for v in batch)


def _moved(value, device):
    if not isinstance(value, Tensor):
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        # From pageable memory the copy would wait until the GPU has done all that it was given.
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def _samples(batch) -> int:
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch[0])


def _save_checkpoint(path, named, updates, step, settings, buffers) -> None:
    """Trained tensors, optimizer state and random state in one safetensors file; numbers go into its header as JSON."""
    from safetensors.torch import save_file

    tensors, numbers = {"rng/cpu": torch.get_rng_state()}, {}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    tensors |= {f"buffer/{n}": b for n, b in buffers.items()}  # running statistics of norms
    for name, parameter in named.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in updates.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"state/{name}/{key}"] = value
            else:
                numbers[f"state/{name}/{key}"] = value
    header = {
        "format": "lora-lab-training-1", "step": str(step), "settings": json.dumps(settings), "numbers": json.dumps(numbers),
        "scaler": json.dumps(updates.scaler.state_dict()),
    }
    with atomic_write(path) as temporary:
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, temporary, metadata=header)


def _load_checkpoint(path, named, updates, settings, buffers) -> int:
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
    if updates.scaler.is_enabled() and json.loads(header.get("scaler", "{}")):
        updates.scaler.load_state_dict(json.loads(header["scaler"]))
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(tensors[f"buffer/{name}"])
        for name, parameter in named.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            state = {k.rpartition("/")[2]: v for k, v in chain(tensors.items(), numbers.items()) if k.startswith(f"state/{name}/")}
            if state:
                # Adam's moments are where the parameter is; its step counter is on the CPU, unless the update is fused.
                updates.optimizer.state[parameter] = {
                    k: v.to(parameter.device) if isinstance(v, Tensor) and (v.dim() or updates.fused) else v for k, v in state.items()
                }
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return step
