"""Put LoRA into a model, take it out again."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .counting import count_parameters
from .layers import LoRAFusedLinear, LoRALayer, check_settings, is_conv1d, layer_class

BIAS = ("none", "lora_only", "all")
QKV = {"q": 0, "k": 1, "v": 2}


class TrainedCopy(nn.Module):
    """A module trained in full beside its frozen original: a fresh head, say, which is saved with the adapter (`modules_to_save`)."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.trained = copy.deepcopy(base_layer).requires_grad_(True)
        self.disabled = False

    def forward(self, *args, **kwargs):
        return (self.base_layer if self.disabled else self.trained)(*args, **kwargs)

    def __getattr__(self, name: str):
        # Models read `lm_head.weight` or `classifier.out_features`; they get those of the copy that computes.
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "trained" not in modules:  # still being made, or being unpickled
                raise
            return getattr(modules["base_layer" if self.disabled else "trained"], name)


def apply_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    target_modules: str | Iterable[str] = "all-linear",
    *,
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Iterable[str] = (),
    bias: str = "none",
    adapter_dtype: torch.dtype | None = None,
    allow_tied: bool = False,
) -> nn.Module:
    """Freeze `model`, replace the target layers by LoRA layers in place, and return the model.

    target_modules  a list: each entry is a whole module name or its end after a dot ("q" matches "layers.0.q", not "layers.0.pq"), and
                    "c_attn:q,v" adapts slices of a fused q|k|v layer; a string: a regular expression that must match the whole name;
                    "all-linear": every linear layer but the output head of a transformers model. The rules are peft's, slices are ours
    rank_pattern, alpha_pattern   name or regular expression for the end of a name -> r or alpha of the layers it matches
    modules_to_save names (as in a list of targets) of modules to train in full, on a copy: a classification head
    bias            "none"; "lora_only": the biases of adapted layers train, too; "all": every bias of the model does
    allow_tied      adapt a layer although its weight is shared with another module (merging then changes both)

    Everything is checked before anything is changed. Raises ValueError or TypeError: no match, a listed target or pattern that matched
    nothing, a model that already carries LoRA, r < 1, a layer type LoRA is not written for here, a tied weight.

    >>> model = apply_lora(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), r=4, alpha=8, target_modules=["0"])
    >>> print(coverage(model))
    adapted 1 of 2 linear layers: 0
    left as they are: 2
    trainable: 384 of 2,794 parameters (13.7 %)
    """
    check_settings(r, alpha, dropout, adapter_dtype)
    if bias not in BIAS:
        raise ValueError(f"bias is one of {', '.join(map(repr, BIAS))}; found {bias!r}")
    present = lora_layers(model)
    if present:
        raise ValueError(
            f"this model already carries LoRA on {_listing(present)}. Applying it twice would adapt the adapters: "
            "train the one that is there, or call remove_lora(model) or merge_and_unload(model) first"
        )
    modules_to_save = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save or ())
    saved = _match_list(model, modules_to_save) if modules_to_save else {}
    nested = next(((inner, outer) for inner in saved for outer in saved if inner != outer and _within(inner, outer)), None)
    if nested:
        raise ValueError(f"modules_to_save: {nested[0]!r} lies in {nested[1]!r}, which is trained as a whole; name only one of them")
    targets = _match(model, target_modules, leave_out=saved)
    ranks = _by_pattern(rank_pattern, targets, r, "rank_pattern")
    alphas = _by_pattern(alpha_pattern, targets, alpha, "alpha_pattern")
    for name in targets:
        try:
            check_settings(ranks[name], alphas[name])
        except (TypeError, ValueError) as error:
            raise type(error)(f"rank_pattern or alpha_pattern, for {name!r}: {error}") from None
    modules = {name: module for name, (module, _) in targets.items()}
    check_targets(model, targets)
    if not allow_tied:  # check_targets has refused both ends of one tie already
        _refuse_tied(model, modules, allowed=False)
    options = {"dropout": dropout, "rslora": rslora, "adapter_dtype": adapter_dtype}
    # All layers are built before the tree is touched; a layer that stands in several places stays one layer.
    built: dict[int, nn.Module] = {}
    before = [name for name, p in model.named_parameters() if p.requires_grad]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for name, (module, slices) in targets.items():
            if id(module) not in built:
                built[id(module)] = make_layer(module, ranks[name], alphas[name], slices, **options)
        copies = {id(module): TrainedCopy(module) for module in saved.values()}
    except BaseException:  # no memory left, a head that can't be copied: the layers built so far have frozen their bases
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    layers = {name: built[id(module)] for name, module in modules.items()}
    install(model, layers, {name: copies[id(module)] for name, module in saved.items()}, bias, before)
    return model


def install(model: nn.Module, layers: Mapping[str, LoRALayer], copies: Mapping[str, TrainedCopy], bias: str, before: list[str]) -> None:
    """Put ready-made layers and trained copies into their places; only they, and the biases that `bias` names, train.

    before: the names of the parameters that were trainable, for `remove_lora`. Nothing here can fail half-way: whoever calls has checked.
    """
    model.requires_grad_(False)
    if _save_unmerged not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(_save_unmerged)
    model._before_lora = {"trainable": before, "bias": bias, "biases": {}}
    for name, new in (*layers.items(), *copies.items()):
        _replace(model, name, new.train(new.base_layer.training))
    for layer in layers.values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    for copied in copies.values():
        copied.trained.requires_grad_(True)
    for name, parameter in trained_biases(model, bias).items():
        parameter.requires_grad_(True)
        model._before_lora["biases"][name] = parameter.detach().clone()


def make_layer(module: nn.Module, r: int, alpha: float, slices: tuple[int, ...] | None = None, **options) -> LoRALayer:
    """The LoRA layer for this module: `LoRAFusedLinear` where slices of it are named, else the one for its kind."""
    if slices is not None:
        return LoRAFusedLinear(module, r, alpha, slices=slices, of=len(QKV), **options)
    return layer_class(module)(module, r, alpha, **options)


def trained_biases(model: nn.Module, bias: str) -> dict[str, nn.Parameter]:
    """The biases of the base model that train under `bias`, by name."""
    if bias == "none":
        return {}
    adapted = {id(layer.base_layer.bias) for layer in lora_layers(model).values() if getattr(layer.base_layer, "bias", None) is not None}
    copied = {id(p) for m in model.modules() if isinstance(m, TrainedCopy) for p in m.parameters()}
    return {
        name: p
        for name, p in model.named_parameters()
        if (id(p) in adapted) or (bias == "all" and name.rpartition(".")[2] == "bias" and id(p) not in copied)
    }


def find_targets(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """The modules that `target_modules` names (rules in `apply_lora`), by name, in the model's order.

    Raises ValueError if nothing matches or if any entry of a list matches nothing; the message suggests names that exist.
    """
    return {name: module for name, (module, _) in _match(model, target_modules).items()}


def _match(model: nn.Module, target_modules, leave_out=()) -> dict[str, tuple[nn.Module, tuple[int, ...] | None]]:
    """name -> (module, slices of it or None). Modules in `leave_out`, and what is in them, are no targets (peft's rule)."""
    if not isinstance(target_modules, str):
        entries = list(target_modules)
        if not entries:
            raise ValueError("target_modules is empty; name at least one module, or use 'all-linear'")
        whole = [e for e in entries if ":" not in e]
        found = dict.fromkeys(_match_list(model, [e.partition(":")[0] for e in entries], leave_out))
        for entry in entries:
            slices = _slices(entry)
            for name in _match_list(model, [entry.partition(":")[0]], leave_out) if slices is not None else ():
                if found[name] not in (None, slices) or name in (_match_list(model, whole, leave_out) if whole else ()):
                    raise ValueError(f"{name!r} is named twice, with other slices each time; name it once, as in 'c_attn:q,v'")
                found[name] = slices
        return {name: (model.get_submodule(name), slices) for name, slices in found.items()}
    modules = _candidates(model, leave_out)
    if target_modules == "all-linear":
        heads = {id(h) for h in _heads(model)}
        found = {
            name: (module, None)
            for name, module in modules.items()
            if (isinstance(module, nn.Linear) or is_conv1d(module))
            and id(module) not in heads
            and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
        }
    else:
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is not a regular expression: {error}") from None
        found = {name: (module, None) for name, module in modules.items() if pattern.fullmatch(name)}
    if not found:
        raise ValueError(
            f"target_modules={target_modules!r} matched none of the model's modules. A string is a regular expression for "
            f"the whole name; for the end of a name use a list, [{target_modules!r}]. {_suggest(target_modules, modules)}"
        )
    return found


def _match_list(model: nn.Module, wanted: list[str], leave_out=()) -> dict[str, nn.Module]:
    """Whole names or their ends; every entry must match something."""
    modules = _candidates(model, leave_out)
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


def _candidates(model: nn.Module, leave_out=()) -> dict[str, nn.Module]:
    # With duplicates: a module that stands in two places must be replaced in both.
    return {
        n: m
        for n, m in model.named_modules(remove_duplicate=False)
        if not _inside_lora(model, n) and not any(_within(n, outer) for outer in leave_out)
    }


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _heads(model: nn.Module) -> list[nn.Module]:
    """The output head, which "all-linear" leaves out: it is often tied to the embedding, or fresh and to be trained in full."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        return [head]
    if hasattr(model, "config") and type(model).__name__.endswith("ForSequenceClassification"):
        heads = [getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)]
        return [m for head in heads for m in head.modules()]
    return []


def _slices(entry: str) -> tuple[int, ...] | None:
    """ "c_attn:q,v" -> (0, 2); None without a colon."""
    name, colon, letters = entry.partition(":")
    if not colon:
        return None
    parts = [part.strip() for part in letters.split(",")]
    if not all(part in QKV for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(
            f"target {entry!r}: after the colon stand slices of a fused layer, as in '{name}:q,v'; found {letters!r}"
        )
    return tuple(sorted(QKV[part] for part in parts))


def _by_pattern(pattern: Mapping | None, targets: Iterable[str], default, what: str) -> dict:
    """The value for each target: that of the first key that matches the end of its name (peft's rule), else the default."""
    pattern = dict(pattern or {})
    try:
        first = {name: next((k for k in pattern if re.fullmatch(rf"(.*\.)?({k})", name)), None) for name in targets}
    except re.error as error:
        raise ValueError(f"a key of {what} is not a regular expression: {error}") from None
    silent = [k for k in pattern if k not in first.values()]
    if silent:
        raise ValueError(f"{what}: {_listing(map(repr, silent))} decided for none of the targets, which are {_listing(targets)}")
    return {name: default if key is None else pattern[key] for name, key in first.items()}


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
                layer.base_layer.weight.copy_(layer.merged_weight()[0])
    return _unwrap(model, trained=True)


def remove_lora(model: nn.Module) -> nn.Module:
    """Drop the adapters and put the plain layers back with W0, the old heads and the old biases, bit for bit. Returns the model.

    Parameters that were trainable before `apply_lora` are trainable again.
    """
    unmerge(model)
    with torch.no_grad():
        for parameter, original in _bias_pairs(model):
            parameter.copy_(original)
    return _unwrap(model, trained=False)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model computes as if it had no adapters, merged or not, with its own head and biases again.

    No weight is touched; biases that train (`bias=` of `apply_lora`) are swapped for the block and come back bit for bit.
    """
    layers = [*_layers_or_raise(model).values(), *(m for m in model.modules() if isinstance(m, TrainedCopy))]
    shared = _merged_and_tied(model)
    if shared:
        raise RuntimeError(f"the weight of {_listing(shared)} is tied and merged, so other modules compute with W0 + ΔW; unmerge(model) first")
    before = [layer.disabled for layer in layers]
    swapped = _bias_pairs(model)
    trained = [parameter.detach().clone() for parameter, _ in swapped]  # in a nested block: what the outer one put there
    try:
        for layer in layers:
            layer.disabled = True
        with torch.no_grad():
            for parameter, original in swapped:
                parameter.copy_(original)
        yield model
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer.disabled = disabled
        with torch.no_grad():
            for (parameter, _), value in zip(swapped, trained, strict=True):
                parameter.copy_(value)


def _merged_and_tied(model: nn.Module) -> dict[str, LoRALayer]:
    """The merged layers whose base weight is another module's, too."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {name: layer for name, layer in lora_layers(model).items() if layer.merged and owners[id(layer.base_layer.weight)] > 1}


def _save_unmerged(model: nn.Module, state: dict, prefix: str, local_metadata: dict) -> None:
    """A hook of state_dict: what is tied to a merged weight is saved as W0, too, or loading it would count ΔW twice."""
    for layer in _merged_and_tied(model).values():
        place = layer.base_layer.weight.data_ptr()
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.data_ptr() == place and value.shape == layer.base_layer.weight.shape:
                state[key] = layer.base_weight


def _bias_pairs(model: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """(bias as it is, bias before training) for the biases that train."""
    kept = model.__dict__.get("_before_lora", {}).get("biases", {})
    named = dict(model.named_parameters())
    return [(named[name], original.to(named[name])) for name, original in kept.items() if name in named]


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
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    bases |= {id(m) for copied in model.modules() if isinstance(copied, TrainedCopy) for m in copied.modules()}  # trained in full
    unmatched = [n for n, m in linear if id(m) not in bases and not isinstance(m, LoRALayer)]
    factors = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)}
    elsewhere = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
    count = count_parameters(model)
    return Coverage(tuple(layers), tuple(unmatched), count.trainable, count.total, tuple(elsewhere))


def _layers_or_raise(model: nn.Module) -> dict[str, LoRALayer]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("this model carries no LoRA layer; call apply_lora(model, ...) first")
    return layers


def _unwrap(model: nn.Module, trained: bool) -> nn.Module:
    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALayer | TrainedCopy)]
    if any(name == "" for name, _ in places):
        return places[0][1].base_layer
    for name, layer in places:
        plain = layer.trained if trained and isinstance(layer, TrainedCopy) else layer.base_layer
        _replace(model, name, plain.train(layer.training))
    for key in [key for key, hook in model._state_dict_hooks.items() if hook is _save_unmerged]:
        del model._state_dict_hooks[key]
    before = set(model.__dict__.pop("_before_lora", {}).get("trainable", ()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before)
    return model


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = new


def _inside_lora(model: nn.Module, name: str) -> bool:
    """True for the modules that a LoRA layer owns (its base layer, its dropout): they are no targets."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:k])), LoRALayer | TrainedCopy) for k in range(len(parts)))


def check_targets(model: nn.Module, targets: dict[str, tuple[nn.Module, tuple[int, ...] | None]]) -> None:
    """Raise TypeError or ValueError unless each of the modules can carry LoRA where it stands. targets: name -> (module, slices)."""
    modules = {name: module for name, (module, _) in targets.items()}
    _refuse_unfit(model, targets)
    _refuse_bypassed(model, modules)
    _refuse_half(model, modules)
    _refuse_tied(model, modules, allowed=True)  # one end of a tie can be adapted, both can't


def _refuse_unfit(model: nn.Module, targets: dict) -> None:
    if "" in targets:
        raise ValueError("the model is itself the target, so there is no parent to put the new layer into; use LoRALinear(model, ...)")
    for name, (module, slices) in targets.items():
        if layer_class(module) is None:
            raise TypeError(
                f"target {name!r} is a {type(module).__name__}; LoRA is available for Linear, Conv1D, Embedding and Conv2d layers. "
                "Name the layers inside it, or use target_modules='all-linear'"
            )
        weight = module._parameters.get("weight")
        if weight is None or nn.parameter.is_lazy(weight):
            raise TypeError(
                f"target {name!r} has no weight of its own that could be frozen and merged into: it is computed at each call (weight_norm, "
                "parametrizations) or waits for a first input (Lazy modules). Make it a plain parameter first"
            )
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise ValueError(f"target {name!r} is a grouped Conv2d (groups={module.groups}), which can't be adapted")
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise ValueError(f"target {name!r} is an Embedding with max_norm, which rescales its own weight and so can't be frozen")
        if slices is not None:
            out = module.weight.shape[1 if is_conv1d(module) else 0]
            if not (isinstance(module, nn.Linear) or is_conv1d(module)) or out % len(QKV):
                raise TypeError(
                    f"target {name!r} is no fused q|k|v layer: {type(module).__name__} with {out} outputs, not 3 equal slices"
                )


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


def _refuse_tied(model: nn.Module, targets: dict[str, nn.Module], allowed: bool) -> None:
    both = {id(module) for module in targets.values()}
    owners: dict[int, list] = {}  # looked up once: large models have thousands of modules
    for other_name, other in model.named_modules():
        owners.setdefault(id(getattr(other, "weight", None)), []).append((other_name, other))
    for name, module in targets.items():
        for other_name, other in owners.get(id(module.weight), ()):
            if other is module:
                continue
            if id(other) in both:
                raise ValueError(
                    f"targets {name!r} and {other_name!r} share one weight, and two updates can't be merged into it and taken out again. "
                    "Adapt one of them (allow_tied=True)"
                )
            if not allowed:
                raise ValueError(
                    f"the weight of target {name!r} is tied to {other_name!r} ({type(other).__name__}): merging an adapter of "
                    "one would change the other. Leave it out of target_modules, or pass allow_tied=True if that is what you want"
                )


def _suggest(wanted: str, modules: dict[str, nn.Module]) -> str:
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear) or is_conv1d(m)]
    ends = {end for n in linear for end in (n, n.rpartition(".")[2])}
    close = difflib.get_close_matches(wanted, sorted(ends), n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(map(repr, close)) + "?"
    return f"The model's linear layers are {_listing(linear)}" if linear else "The model has no linear layer"


def _listing(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
