"""Put LoRA into a model, take it out again."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .counting import count_parameters
from .layers import LoRALayer, LoRALinear, check_settings


def apply_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    target_modules: str | Iterable[str] = "all-linear",
    *,
    dropout: float = 0.0,
    rslora: bool = False,
    adapter_dtype: torch.dtype | None = None,
    allow_tied: bool = False,
) -> nn.Module:
    """Freeze `model`, replace the target layers by LoRA layers in place, and return the model.

    target_modules  a list: each entry is a whole module name or its end after a dot ("q" matches "layers.0.q", not "layers.0.pq");
                    a string: a regular expression that must match the whole name; "all-linear": every linear layer but the output head
                    of a transformers model. These are peft's rules.
    allow_tied      adapt a layer although its weight is shared with another module (merging then changes both)

    Everything is checked before anything is changed. Raises ValueError or TypeError: no match, a listed target that matched
    nothing, a model that already carries LoRA, r < 1, a layer type LoRA is not written for here, a tied weight.

    >>> model = apply_lora(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), r=4, alpha=8, target_modules=["0"])
    >>> print(coverage(model))
    adapted 1 of 2 linear layers: 0
    left as they are: 2
    trainable: 384 of 2,794 parameters (13.7 %)
    """
    check_settings(r, alpha, dropout, adapter_dtype)
    present = lora_layers(model)
    if present:
        raise ValueError(
            f"this model already carries LoRA on {_listing(present)}. Applying it twice would adapt the adapters: "
            "train the one that is there, or call remove_lora(model) or merge_and_unload(model) first"
        )
    targets = find_targets(model, target_modules)
    if "" in targets:
        raise ValueError("the model is itself the target, so there is no parent to put the new layer into; use LoRALinear(model, ...)")
    for name, module in targets.items():
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"target {name!r} is a {type(module).__name__}; LoRA is available for Linear layers. "
                "Name the linear layers inside it, or use target_modules='all-linear'"
            )
    _refuse_bypassed(model, targets)
    _refuse_half(model, targets)
    if not allow_tied:
        _refuse_tied(model, targets)
    # The layer is built before the tree is touched; a layer that stands in several places stays one layer.
    adapted = {id(m): LoRALinear(m, r, alpha, dropout, rslora, adapter_dtype) for m in _trainable_noted(model, targets)}
    model.requires_grad_(False)
    for name, module in targets.items():
        layer = adapted[id(module)]
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
        layer.train(module.training)
        _replace(model, name, layer)
    return model


def _trainable_noted(model: nn.Module, targets: dict[str, nn.Module]) -> list[nn.Module]:
    """The distinct target modules; notes on the model which parameters were trainable, so that `remove_lora` can restore that."""
    model._trainable_before_lora = [name for name, p in model.named_parameters() if p.requires_grad]
    return list({id(m): m for m in targets.values()}.values())


def find_targets(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """The modules that `target_modules` names (rules in `apply_lora`), by name, in the model's order.

    Raises ValueError if nothing matches or if any entry of a list matches nothing; the message suggests names that exist.
    """
    # With duplicates: a module that stands in two places must be replaced in both.
    modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if not _inside_lora(model, n)}
    if isinstance(target_modules, str):
        if target_modules == "all-linear":
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            found = {
                n: m for n, m in modules.items()
                if isinstance(m, nn.Linear) and m is not head
                and not isinstance(model.get_submodule(n.rpartition(".")[0]), nn.MultiheadAttention)
            }
        else:
            try:
                pattern = re.compile(target_modules)
            except re.error as error:
                raise ValueError(f"target_modules={target_modules!r} is not a regular expression: {error}") from None
            found = {n: m for n, m in modules.items() if pattern.fullmatch(n)}
        if not found:
            raise ValueError(
                f"target_modules={target_modules!r} matched none of the model's modules. A string is a regular expression for "
                f"the whole name; for the end of a name use a list, [{target_modules!r}]. {_suggest(target_modules, modules)}"
            )
        return found
    wanted = list(target_modules)
    if not wanted:
        raise ValueError("target_modules is empty; name at least one module, or use 'all-linear'")
    matched = {t: [n for n in modules if n == t or n.endswith("." + t)] for t in wanted}
    silent = [t for t, names in matched.items() if not names]
    if silent:
        others = sum(map(len, matched.values()))
        raise ValueError(
            "; ".join(f"target {t!r} matched no module. {_suggest(t, modules)}" for t in silent)
            + (f" (the other entries matched {others} module(s); nothing was changed)" if others else "")
        )
    names = {n for found in matched.values() for n in found}
    return {n: m for n, m in modules.items() if n in names}


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The model's LoRA layers by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def merge(model: nn.Module) -> dict[str, float]:
    """Merge every LoRA layer; returns the share of ΔW that rounding swallowed, per layer (see `LoRALayer.merge`)."""
    return {name: layer.merge() for name, layer in _layers_or_raise(model).items()}


def unmerge(model: nn.Module) -> None:
    """Put every W0 back, bit for bit."""
    for layer in _layers_or_raise(model).values():
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Add every ΔW to its weight and put the plain layers back: a model without LoRA that computes the same. Returns the model."""
    layers = _layers_or_raise(model)
    for layer in layers.values():
        if not layer.merged:
            with torch.no_grad():
                layer.base_layer.weight.copy_(layer._merged_weight()[0])
    return _unwrap(model)


def remove_lora(model: nn.Module) -> nn.Module:
    """Drop the adapters and put the plain layers back with W0, bit for bit. Returns the model.

    Parameters that were trainable before `apply_lora` are trainable again.
    """
    unmerge(model)
    return _unwrap(model)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model computes as if it had no adapters, merged or not; no weight is touched."""
    layers = _layers_or_raise(model).values()
    before = [layer.disabled for layer in layers]
    try:
        for layer in layers:
            layer.disabled = True
        yield model
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.disabled = disabled


@dataclass(frozen=True)
class Coverage:
    """Which linear layers carry LoRA (`matched`), which don't (`unmatched`), and the parameters that train."""

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    trainable: int
    total: int
    trainable_elsewhere: tuple[str, ...]  # parameters outside the adapters that train: often a surprise

    def __str__(self) -> str:
        every = len(self.matched) + len(self.unmatched)
        text = f"adapted {len(self.matched)} of {every} linear layers: {_listing(self.matched) or 'none'}"
        if self.unmatched:
            text += f"\nleft as they are: {_listing(self.unmatched)}"
        text += f"\ntrainable: {self.trainable:,} of {self.total:,} parameters ({100 * self.trainable / max(self.total, 1):.3g} %)"
        if self.trainable_elsewhere:
            text += f"\nof these outside the adapters: {_listing(self.trainable_elsewhere)}"
        return text


def coverage(model: nn.Module) -> Coverage:
    """Report what `apply_lora` did to a model; works on a model without LoRA, too."""
    layers = lora_layers(model)
    bases = {id(layer.base_layer) for layer in layers.values()}
    unmatched = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in bases]
    factors = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    elsewhere = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
    count = count_parameters(model)
    return Coverage(tuple(layers), tuple(unmatched), count.trainable, count.total, tuple(elsewhere))


def _layers_or_raise(model: nn.Module) -> dict[str, LoRALayer]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("this model carries no LoRA layer; call apply_lora(model, ...) first")
    return layers


def _unwrap(model: nn.Module) -> nn.Module:
    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALayer)]
    if any(name == "" for name, _ in places):
        return places[0][1].base_layer
    for name, layer in places:
        _replace(model, name, layer.base_layer.train(layer.training))
    trainable = set(model.__dict__.pop("_trainable_before_lora", ()))
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(True)
    return model


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = new


def _inside_lora(model: nn.Module, name: str) -> bool:
    """True for the modules that a LoRA layer owns (its base layer, its dropout): they are no targets."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:k])), LoRALayer) for k in range(len(parts)))


def _refuse_bypassed(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """nn.MultiheadAttention hands its weights to one function; its out_proj is never called, so an adapter would sit idle."""
    for name in targets:
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                f"target {name!r} belongs to an nn.MultiheadAttention, which reads its weight and never calls the layer: "
                "an adapter there would have no effect. Leave it out of target_modules"
            )


def _refuse_half(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """One layer under two names, of which only one is a target: merging would change what the other name computes."""
    for name, module in model.named_modules(remove_duplicate=False):
        twin = next((n for n, m in targets.items() if m is module), None)
        if twin is not None and name not in targets:
            raise ValueError(f"target {twin!r} is the same layer as {name!r}; name both, or neither")


def _refuse_tied(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    for name, module in targets.items():
        for other_name, other in model.named_modules():
            if other is not module and getattr(other, "weight", None) is module.weight:
                raise ValueError(
                    f"the weight of target {name!r} is tied to {other_name!r} ({type(other).__name__}): merging an adapter of "
                    "one would change the other. Leave it out of target_modules, or pass allow_tied=True if that is what you want"
                )


def _suggest(wanted: str, modules: dict[str, nn.Module]) -> str:
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
    ends = {end for n in linear for end in (n, n.rpartition(".")[2])}
    close = difflib.get_close_matches(wanted, sorted(ends), n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(map(repr, close)) + "?"
    return f"The model's linear layers are {_listing(linear)}" if linear else "The model has no linear layer"


def _listing(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
