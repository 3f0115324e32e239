"""The probes: run a model with and without its ΔW, backward once, beside what was reloaded; and leave everything as it was."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import lora_disabled
from .foreign import Adapter, adapters


@dataclass(frozen=True)
class Identity:
    """effect: the largest |output with ΔW - output without| over the largest |output without|; spread: the same between two calls with ΔW in eval
    mode, of which only the random numbers differ; fresh: ΔW is exactly 0 in every layer."""

    effect: float
    spread: float
    fresh: bool

    def __str__(self) -> str:
        return f"with and without ΔW the outputs differ by {self.effect:.2g} (relative); two calls by {self.spread:.2g}; ΔW is {'0' if self.fresh else 'not 0'}"


@dataclass(frozen=True)
class Gradients:
    """state: name of a factor -> "frozen", "none" (nothing reached it), "zero" or "moves"; norms: name -> norm of the gradient;
    elsewhere: names of other parameters that require a gradient; connected: whether the loss depends on any parameter that trains."""

    state: dict[str, str]
    norms: dict[str, float]
    elsewhere: tuple[str, ...]
    connected: bool
    checkpointed: bool  # torch said that a checkpoint's inputs need no gradient
    loss: float = 0.0
    idle: tuple[str, ...] = ()  # of elsewhere, those that no gradient reached

    def __str__(self) -> str:
        counts = {state: list(self.state.values()).count(state) for state in ("moves", "zero", "none", "frozen")}
        return "of the factors " + ", ".join(f"{count} {word}" for word, count in zip(("move", "get a zero", "get no gradient", "are frozen"), counts.values(), strict=True) if count)  # fmt: skip  # noqa: E501


@dataclass(frozen=True)
class Parity:
    """difference: the largest |output of one - of the other| over the largest |output|; tensors: names of the parameters that differ, with by how much;
    missing: names that only one of them has."""

    difference: float
    tensors: dict[str, float]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return f"the outputs differ by {self.difference:.2g} (relative), {len(self.tensors)} tensors do"


def step0_identity(model: nn.Module, batch) -> Identity:
    """Compare the outputs with ΔW and without it, in eval mode. A fresh adapter gives exactly 0, a trained one does not.

    batch: a dict of the model's arguments, a pair (x, y) or x. Raises ValueError where there is no adapter to switch off.
    """
    found = adapters(model)
    if not found:
        raise ValueError("this model carries no adapter that could be switched off; put one in first (apply_lora, peft's get_peft_model)")
    with untouched(model), modes(model, False), torch.no_grad():
        seed(0)
        on = output(model, batch)
        seed(1)
        again = output(model, batch)
        with without_delta(model, found):
            seed(0)
            off = output(model, batch)
    fresh = all(not float(a.delta().abs().max()) * (1.0 if a.scaling is None else abs(a.scaling)) for a in found)
    return Identity(relative(on, off), relative(on, again), fresh)


def gradient_report(model: nn.Module, batch, loss: Callable | None = None) -> Gradients:
    """One forward and one backward pass in training mode; the gradients that the parameters hold are kept as they are.

    loss(model, batch) -> a scalar, as in `train`. Without one: the model's own `.loss` if the batch is a dict with labels, cross-entropy or squared
    error of a pair (x, y), else a fixed random sum of the outputs, which reaches the same parameters.
    """
    factors, trained = factors_of(model), {n: p for n, p in model.named_parameters() if p.requires_grad}
    elsewhere = tuple(n for n in trained if n not in factors)
    state, norms, connected, checkpointed = {}, {}, False, False
    with untouched(model), modes(model, True), torch.enable_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seed(0)
        value = loss_value(model, batch, loss)
        connected = value.requires_grad
        if connected:
            for p in trained.values():
                p.grad = None
            backward(value, list(trained.values()))
        checkpointed = any("None of the inputs have requires_grad" in str(w.message) for w in said)
        for name, p in factors.items():
            norms[name] = 0.0 if p.grad is None else float(p.grad.norm())
            state[name] = "frozen" if not p.requires_grad else "none" if not connected or p.grad is None else "moves" if norms[name] else "zero"
        idle = tuple(n for n in elsewhere if trained[n].grad is None)
    return Gradients(state, norms, elsewhere, connected, checkpointed, float(value.detach()), idle)


def reload_parity(model: nn.Module, batch, reload: Callable[[], nn.Module] | nn.Module) -> Parity:
    """Compare a model with what its files give back. reload: the model that was loaded, or a function that loads it, as the user would."""
    other = reload if isinstance(reload, nn.Module) else reload()
    if not isinstance(other, nn.Module):
        raise TypeError(f"reload gives the model as it was loaded; found {type(other).__name__}")
    with untouched(model), untouched(other), modes(model, False), modes(other, False), torch.no_grad():
        seed(0)
        mine = output(model, batch)
        seed(0)
        theirs = output(other, batch)
    ours, others = dict(model.named_parameters()), dict(other.named_parameters())
    shared = [n for n in ours if n in others and ours[n].shape == others[n].shape]
    apart = {n: relative(ours[n].detach(), others[n].detach().to(ours[n].device)) for n in shared}
    return Parity(relative(mine, theirs), {n: d for n, d in apart.items() if d > 0 or d != d}, tuple(sorted(set(ours) ^ set(others))))


def try_steps(model: nn.Module, batch, loss, lr: float, sgd: bool, steps: int = 20) -> float | None:
    """The loss after some steps of Adam (or SGD) from here, on copies of what trains; None if nothing depends on it. lr=0: the loss as it is."""
    trained = [p for p in model.parameters() if p.requires_grad]
    values = [p.detach().clone() for p in trained]
    first, second = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
    with modes(model, False), torch.enable_grad(), swapped(dict(zip(trained, values, strict=True))):
        for step in range(1, steps + 1 if lr else 1):
            for p in trained:
                p.grad = None
            value = loss_value(model, batch, loss)
            if not value.requires_grad:
                return None
            backward(value, trained)
            for p, m, v, own in zip(trained, first, second, values, strict=True):
                if p.grad is None:
                    continue
                g = p.grad
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                move = g if sgd else (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                own.sub_(lr * move)
        with torch.no_grad():
            return float(loss_value(model, batch, loss))


# ---- leaving everything as it was -----------------------------------------------------------------------------------


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Gradients, small buffers (running means), modes and random states are put back, whatever happens inside."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers() if b.numel() < 1_000_000]
    modes = [(m, m.training) for m in model.modules()]
    python, cpu = random.getstate(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    import numpy as np

    numpy = np.random.get_state()
    try:
        yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for b, value in buffers:
                if not torch.equal(b, value):
                    b.copy_(value)
        for m, training in modes:
            m.training = training
        random.setstate(python), torch.set_rng_state(cpu), np.random.set_state(numpy)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def modes(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode, without calling train() or eval(), which some layers use to merge. A model in training mode keeps its mixture."""
    before = [(m, m.training) for m in model.modules()]
    try:
        if not (training and model.training):
            for m, _ in before:
                m.training = training
        yield
    finally:
        for m, mode in before:
            m.training = mode


@contextmanager
def swapped(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Other numbers under the same parameters, for the length of a block; torch's count of edits stays as it was."""
    originals = {p: p.data for p in values}
    try:
        for p, value in values.items():
            p.data = value
        yield
    finally:
        for p, data in originals.items():
            p.data = data


@contextmanager
def without_delta(model: nn.Module, found: list[Adapter]) -> Iterator[None]:
    """The model without ΔW: B is 0; a merged weight is W0; a variant that is not W0 + s B A is asked to stand aside."""
    ours_merged = any(a.make == "lora_lab" and a.merged for a in found)
    values, asides = {}, []
    for a in found:
        if a.make == "lora_lab" and ours_merged:
            continue
        switch = "disabled" if a.make == "lora_lab" else "_disable_adapters"
        if not a.plain and hasattr(a.layer, switch) and not a.merged:
            asides.append((a.layer, switch, getattr(a.layer, switch)))
        elif a.merged and a.plain and a.make == "peft":
            weight = a.base.weight
            delta = a.to_base_layout(a.delta()) * a.scaling
            values[weight] = (values.get(weight, weight.detach()).double() - delta).to(weight.dtype)
        else:
            values[a.B] = torch.zeros_like(a.B)
    try:
        for layer, switch, _ in asides:
            setattr(layer, switch, True)
        with swapped(values):
            if ours_merged:
                with lora_disabled(model):
                    yield
            else:
                yield
    finally:
        for layer, switch, before in asides:
            setattr(layer, switch, before)


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)


def backward(value: Tensor, parameters: list[nn.Parameter]) -> None:
    """Gradients into `parameters`, and into nothing else where that is possible; hooks that step an optimizer stay silent."""
    kept = {p: p._post_accumulate_grad_hooks for p in parameters if getattr(p, "_post_accumulate_grad_hooks", None)}
    try:
        for p in kept:
            p._post_accumulate_grad_hooks = None
        torch.autograd.backward(value, inputs=parameters, retain_graph=True)
        if any(p.grad is None for p in parameters):
            # Reentrant checkpointing hides its parameters from `inputs`: only a plain backward pass finds them.
            for p in parameters:
                p.grad = None
            value.backward()
    finally:
        for p, hooks in kept.items():
            p._post_accumulate_grad_hooks = hooks


# ---- small helpers --------------------------------------------------------------------------------------------------


def output(model: nn.Module, batch) -> Tensor:
    """The model's main output, a tensor of floats."""
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    return floats(out)


def floats(out) -> Tensor:
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "last_hidden_state", "sample"):
        if isinstance(getattr(out, name, None), Tensor):
            return getattr(out, name)
    parts = out.values() if isinstance(out, Mapping) else out if isinstance(out, (tuple, list)) else ()
    found = next((t for t in parts if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 0), None)
    if found is None:
        raise TypeError(f"the model's output is a {type(out).__name__} without a tensor of floats in it")
    return found


def loss_value(model: nn.Module, batch, loss: Callable | None) -> Tensor:
    if loss is not None:
        return loss(model, batch)
    if isinstance(batch, Mapping):
        out = model(**batch)
        own = getattr(out, "loss", None)
        if isinstance(own, Tensor):
            return own
    elif isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        out, y = floats(model(batch[0])), batch[1]
        if not y.is_floating_point() and out.ndim == y.ndim + 1:
            return F.cross_entropy(out.flatten(0, -2), y.flatten())
        if out.shape == y.shape and y.is_floating_point():
            return F.mse_loss(out, y)
    else:
        out = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    out = floats(out)
    # A plain sum is constant behind a softmax or a LayerNorm; random weights are not.
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return (out * weights).sum()


def true_loss(model, batch, loss) -> bool:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    return loss is not None or pair or (isinstance(batch, Mapping) and "labels" in batch)


def relative(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest entry of the second."""
    if one.shape != other.shape:
        return math.inf
    if one.numel() == 0:
        return 0.0
    one, other = one.detach().double(), other.detach().double()
    largest = float(other.abs().max())
    difference = float((one - other).abs().max())
    return difference / largest if largest else (0.0 if not difference else math.inf)


def factors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    ids = {id(p) for a in adapters(model) if a.active for p in (a.A, a.B)}
    return {n: p for n, p in model.named_parameters() if id(p) in ids}


def is_zero(a: Adapter) -> bool:
    return not bool(a.A.any()) or not bool(a.B.any())


def dropouts(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0}
