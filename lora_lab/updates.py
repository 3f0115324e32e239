"""One update of the weights, on any device, in any precision: what `train` does with a loss.

On a CPU there is nothing to it. A GPU wants not to be asked: a program that waits for the loss after every step leaves it idle while Python
prepares the next one. So there losses stay on the device and are looked at every 16 steps, and the device itself leaves an update out, and
all that follow, once something is not a number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

OPTIMIZERS = {
    "adamw": lambda parameters, lr, weight_decay, fused=None: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused),
    "sgd": lambda parameters, lr, weight_decay, fused=None: torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, fused=fused),
}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECK_EVERY = {"cuda": 16}  # steps between looks at the losses, by kind of device; 1 elsewhere


@dataclass(frozen=True)
class Step:
    """What one update did: its number from 1, the batch's loss before it, the lr used, the gradient's norm before clipping, samples/s.

    On CUDA reading `loss` or `grad_norm` waits for the device, so read them now and then and not at every step; samples/s is there the mean
    since the losses were last looked at (every 16 steps), nan before. In fp16 a norm that is infinite means a step that was skipped.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples_per_s: float


class _DeviceStep(Step):
    """A step whose loss and norm are still on the device, as `_numbers`, a tensor (2,)."""

    def __init__(self, step: int, numbers: Tensor, lr: float):
        self.__dict__.update(step=step, lr=lr, samples_per_s=math.nan, _numbers=numbers)

    @cached_property
    def _fetched(self) -> list[float]:
        return self._numbers.tolist()

    @property
    def loss(self) -> float:
        return self._fetched[0]

    @property
    def grad_norm(self) -> float:
        return self._fetched[1]


class TrainingDiverged(RuntimeError):
    """The loss or a gradient stopped being a number. The model holds the weights from before that step."""


class Updates:
    """The optimizer of a run, and all that is between a loss and the `Step` that tells of it.

    optimizer  a name in OPTIMIZERS, or a function of the parameters that makes one
    precision  "fp32", "bf16", "fp16": that of forward and backward
    """

    def __init__(self, parameters: list[nn.Parameter], optimizer: str | Callable, lr: float, weight_decay: float, device: torch.device, precision: str):
        self.parameters, self.device, self.precision = parameters, device, precision
        self.every = CHECK_EVERY.get(device.type, 1)
        if callable(optimizer):
            self.optimizer = optimizer(parameters)
        else:
            self.optimizer = OPTIMIZERS[optimizer](parameters, lr, weight_decay, fused=self.every > 1 or None)
        if not self.fused:
            self.every = 1  # only a fused optimizer can be told, on the device, to leave an update out
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._waiting: list[_DeviceStep] = []  # not looked at yet
        self._wrong = torch.zeros((), dtype=torch.bool, device=device) if self.every > 1 else None  # has anything gone wrong so far?
        self._samples, self._busy, self._speed = 0, 0.0, math.nan

    @property
    def fused(self) -> bool:
        return all(group.get("fused") for group in self.optimizer.param_groups)

    def begin(self, lr: float) -> None:
        self._began, self._loss = time.perf_counter(), 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._lr = lr
        self.optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> torch.autocast:
        # Without autocast's cache of converted weights: if there is another autocast around the whole run, it would outlive an update.
        return torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32", cache_enabled=False)

    def backward(self, loss: Tensor, samples: int) -> None:
        if self._wrong is not None:
            self._wrong = self._wrong | ~loss.detach().isfinite()
            if self.precision == "fp16":  # the scaler skips what is not finite; so let it not be, from now on
                loss = loss * torch.where(self._wrong, math.nan, 1.0)
        with torch.autocast(self.device.type, enabled=False):
            self.scaler.scale(loss).backward()
        self._loss = self._loss + loss.detach()
        self._samples += samples

    def step(self, number: int, clip: float | None, look: bool) -> Step:
        """Update the weights, number `number`. look: find out now whether all went well. Raises TrainingDiverged if it did not."""
        self.scaler.unscale_(self.optimizer)
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self._wrong is None:
            done = Step(number, self._loss.item(), self._lr, float(norm), math.nan)
            self._stop_if_diverged(done)
        else:
            if self.precision != "fp16":
                self._wrong = self._wrong | ~norm.isfinite()
                # What GradScaler sets, too: fused optimizers change nothing where found_inf is 1.
                self.optimizer.found_inf, self.optimizer.grad_scale = self._wrong.float(), None
            done = _DeviceStep(number, torch.stack((self._loss.float(), norm.float())), self._lr)
            self._waiting.append(done)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        looking = look or number % self.every == 0
        if looking and self._waiting:
            self._look()
        self._busy += time.perf_counter() - self._began
        if looking:
            self._speed, self._samples, self._busy = self._samples / self._busy, 0, 0.0
        done.__dict__["samples_per_s"] = self._speed
        return done

    def end(self) -> None:
        """Leave the optimizer as others expect it."""
        for name in ("found_inf", "grad_scale"):
            self.optimizer.__dict__.pop(name, None)

    def _look(self) -> None:
        """Fetch the numbers of several steps at once; the steps keep them as plain floats and let go of the device."""
        waiting, self._waiting = self._waiting, []
        for step, numbers in zip(waiting, torch.stack([step._numbers for step in waiting]).tolist(), strict=True):
            step.__dict__["_fetched"] = numbers
            del step.__dict__["_numbers"]
        for step in waiting:
            self._stop_if_diverged(step)

    def _stop_if_diverged(self, step: Step) -> None:
        if math.isfinite(step.loss) and math.isfinite(step.grad_norm):
            return
        # In fp16 an infinite gradient is how the scaler finds its scale; below 1 there is none left that would help.
        if self.scaler.is_enabled() and math.isfinite(step.loss) and self.scaler.get_scale() >= 1:
            return
        raise TrainingDiverged(_explain(step.step, step.loss, step.grad_norm, step.lr))


def _explain(step: int, loss: float, norm: float, lr: float) -> str:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    return (
        f"step {step}, lr {lr:g}: {what}. The model keeps its weights from before this step. Most often the lr is too high for alpha / r: "
        f"try lr={lr / 10:g}, a smaller alpha, or clip=1.0. If it happens at step 1, look for NaN or infinity in the data"
    )


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """"auto": cuda, else mps, else cpu."""
    if str(device) != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(precision: str, device: torch.device) -> str:
    """"auto": on CUDA bf16 from compute capability 8.0 (Ampere), fp16 from 7.0 (V100, T4), else fp32; on any other device fp32.

    A processor with bf16 instructions (`bf16_is_fast()`) can be more than twice as fast with precision="bf16"; "auto" does not take it, so that
    every student's numbers agree. Raises ValueError for a name that is none.
    """
    if precision != "auto":
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is not one of auto, {', '.join(PRECISIONS)}")
        return precision
    if device.type != "cuda":
        return "fp32"
    major, _ = torch.cuda.get_device_capability(device)
    return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"


def bf16_is_fast() -> bool:
    """Has this processor instructions for bf16 (AVX512-BF16, AMX)? Without them bf16 is slower than fp32."""
    # torch.cpu.get_capabilities is younger than the oldest torch that the lab takes
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
