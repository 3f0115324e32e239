"""Try one layer on a copy: which multiple of B A x does it add, does merging agree, is anything left to chance?"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .foreign import Adapter, adapters

ROWS = 64  # of a layer's input are enough to find a formula


@dataclass
class Trial:
    """What a copy of a layer did with random factors. factor: f in y = W0 x + f B A x; rest: share of the update that no factor explains;
    merged: how many times the update is in the weight after merge(), twice: after two calls of it; exact: it ran in float64; base_apart: how far the
    layer is from its base with B = 0, relative; slopes: by how much its output, weighed, moves along
    a direction of its input: measured, and as autograd says."""

    factor: float
    rest: float
    turned: bool | None = None
    silent: bool = False
    random: bool = False
    merged: float | None = None
    merged_rest: float = 0.0
    merged_turned: bool = False
    twice: float | None = None
    merged_output: float | None = None
    counted_twice: bool = False
    exact: bool = False
    base_apart: float = 0.0
    slopes: tuple[float, float] = (0.0, 0.0)


def try_layer(a: Adapter, inputs: tuple) -> Trial | None:
    """Try a copy of the adapter's layer on random factors and (some rows of) these inputs; None if it can't be copied or run.

    In float64, so that a formula shows to many digits; in the layer's own precision where its code insists on that.
    """
    for dtype in (torch.float64, None):
        try:
            return _try(a, inputs, dtype)
        except Exception:
            continue
    return None


def _try(a: Adapter, inputs: tuple, dtype: torch.dtype | None) -> Trial | None:
    layer = copy.deepcopy(a.layer)
    for module in layer.modules():
        module.training = False
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()
    x, *more = inputs
    if dtype is not None:
        layer.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
    twin = next((t for t in adapters(layer) if t.A.shape == a.A.shape and t.B.shape == a.B.shape and t.adapter == a.adapter), None)
    if twin is None:
        return None
    x = _few(x, a)
    generator = torch.Generator().manual_seed(7)
    if x.is_floating_point() and not bool(x.any()):  # a layer behind one that gives 0 sees nothing
        x = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    with torch.no_grad():
        for p in (twin.A, twin.B):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / math.sqrt(max(p.shape)))

        def run(zero=False):
            if zero:
                kept = twin.B.clone()
                twin.B.zero_()
            try:
                y = layer(x, *more)
            finally:
                if zero:
                    twin.B.copy_(kept)
            return y[0] if isinstance(y, tuple) else y

        if twin.merged:  # an own layer's flag; with other factors what it merged is no longer true
            return Trial(*_explain(run() - run(zero=True), _update(twin, x)))
        y, again = run(), run()
        if not torch.equal(y, again) and float((y - again).abs().max()) > 1e-9 * float(y.abs().max()):
            return Trial(math.nan, math.nan, random=True)
        off, expected = run(zero=True), _update(twin, x)
        difference = y - off
        trial = Trial(*_explain(difference, expected), exact=dtype is not None)
        trial.base_apart = _base_apart(twin, x, off)
        trial.silent = not bool(difference.any())
        if trial.rest > 0.05 and a.base_shape[0] == a.base_shape[1] and not trial.silent:
            _, rest = _explain(difference, _update(twin, x, turned=True))
            trial.turned = True if rest < 0.05 else None
        if trial.exact and x.is_floating_point() and not trial.silent:
            trial.slopes = _slopes(layer, x, more, generator)
        if trial.rest < 0.05 and not trial.silent:
            _try_merge(trial, twin, layer, run, y, off, trial.factor)
    return trial


def _base_apart(a: Adapter, x: Tensor, off: Tensor) -> float:
    """How far the layer's output with B = 0 is from what its base gives alone, relative to the larger of the two."""
    y = F.linear(x, a.base.weight, getattr(a.base, "bias", None)) if a.base is a.layer else a.base(x)
    if y.shape != off.shape:
        return 0.0
    return float((y - off).abs().max()) / max(float(y.abs().max()), float(off.abs().max()), 1e-300)


def _slopes(layer: nn.Module, x: Tensor, more: tuple, generator: torch.Generator) -> tuple[float, float]:
    """(<g, f(x + d) - f(x)>, <gradient of <g, f> at x, d>) for random d and g: equal, since f is affine.

    In training mode, where a no_grad in the forward pass does its harm, and with one random state, so that a dropout drops the same.
    """
    modes = [(m, m.training) for m in layer.modules()]

    def f(x):
        torch.manual_seed(0)
        y = layer(x, *more)
        return y[0] if isinstance(y, tuple) else y

    try:
        for m, _ in modes:
            m.training = True
        with torch.enable_grad():
            at = x.detach().clone().requires_grad_(True)
            y = f(at)
            g, d = (torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (y, x))
            (grad,) = torch.autograd.grad((g * y).sum(), at, allow_unused=True) if y.requires_grad else (None,)
        return float((g * (f(x + d) - y.detach())).sum()), 0.0 if grad is None else float((grad * d).sum())
    finally:
        for m, training in modes:
            m.training = training


def _try_merge(trial: Trial, twin: Adapter, layer: nn.Module, run, y, off, factor: float) -> None:
    """Call the copy's own merge(), if it has one that needs nothing, and look at its weight and its output."""
    merge = getattr(layer, "merge", None)
    try:
        if merge is None:
            return
        inspect.signature(merge).bind()  # TypeError if it needs an argument
        before = twin.base.weight.detach().clone()
        delta = twin.to_base_layout(twin.delta()) * factor
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge()
        moved = twin.base.weight.detach() - before
        trial.merged = float((moved * delta).sum() / delta.norm() ** 2)
        trial.merged_rest = float((moved - trial.merged * delta).norm() / delta.norm())
        if trial.merged_rest > 0.05 and delta.ndim == 2 and delta.shape[0] == delta.shape[1]:
            turned = delta.T
            trial.merged_turned = float((moved - (moved * turned).sum() / turned.norm() ** 2 * turned).norm() / turned.norm()) < 0.05
        after = run()
        step = float((y - off).abs().max())
        trial.merged_output = float((after - y).abs().max()) / step
        trial.counted_twice = float((after - y - (y - off)).abs().max()) < 0.02 * step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge()
        moved = twin.base.weight.detach() - before
        trial.twice = float((moved * delta).sum() / delta.norm() ** 2)
    except Exception:
        if trial.twice is None and trial.merged is not None:
            trial.twice = 1.0  # it refuses a second merge: that is one way to be safe


def _update(a: Adapter, x: Tensor, turned: bool = False) -> Tensor:
    """B A x, computed by the base layer with B A in the place of its weight."""
    delta = a.delta().to(a.base.weight.dtype)
    weight = a.to_base_layout(delta.T if turned else delta)
    if a.base is a.layer:
        return F.linear(x, weight)
    values = {"weight": weight}
    if getattr(a.base, "bias", None) is not None:
        values["bias"] = torch.zeros_like(a.base.bias)
    return torch.func.functional_call(a.base, values, (x,))


def _explain(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(f, share of found that f * expected leaves)."""
    if found.shape != expected.shape:
        return 0.0, 1.0
    square = float((expected * expected).sum())
    factor = float((found * expected).sum()) / square if square else 0.0
    norm = float(found.norm())
    return factor, float((found - factor * expected).norm()) / norm if norm else 0.0


def _few(x: Tensor, a: Adapter) -> Tensor:
    """Some rows of an input are enough; an image stays whole."""
    if x.ndim >= 2 and x.is_floating_point() and x.shape[-1] == a.base_shape[1]:
        return x[:ROWS] if x.ndim == 2 else x[:1, :ROWS] if x.ndim == 3 else x[:2]
    return x[:2]
