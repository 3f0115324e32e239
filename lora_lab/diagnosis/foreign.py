"""Adapters of any make: this lab's layers, peft's, and the ones that people write themselves.

Ours and peft's are asked what they are. A layer of somebody's own can only be recognised: a module with two trainable matrices of the shapes that
LoRA's factors have, beside the weight that they fit, under one of the names that such factors get (`PAIRS`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapt import Coverage, TrainedCopy, coverage
from ..counting import count_parameters
from ..layers import LoRALayer, is_conv1d

# What people call A and B, in pairs; compared in lower case.
PAIRS = (
    ("lora_a", "lora_b"), ("a", "b"), ("lora_down", "lora_up"), ("down", "up"), ("adapter_a", "adapter_b"), ("w_a", "w_b"),
    ("matrix_a", "matrix_b"), ("lora_a_weight", "lora_b_weight"), ("a_matrix", "b_matrix"),
)  # fmt: skip
APART = (*PAIRS, ("in_proj", "out_proj"))  # ... and where the two have a module to themselves, so that nothing else can be meant
NUMBERS = {"r": ("r", "rank", "lora_r", "lora_rank"), "alpha": ("alpha", "lora_alpha", "_alpha"), "scaling": ("scaling", "scale")}


@dataclass(frozen=True, eq=False)
class Adapter:
    """One pair of factors on one layer.

    A (r, in) and B (out, r) are parameters as they are stored; `delta()` turns them so that B @ A is (out, in).
    base is the module that has the frozen weight; the layer itself where it was made from an nn.Linear. scaling: what the layer says it multiplies
    B A by (alpha / r where it only says these two), None if it says nothing. active: the layer is meant to use it now.
    """

    name: str
    make: str  # "lora_lab", "peft", "own"
    layer: nn.Module
    base: nn.Module
    A: nn.Parameter
    B: nn.Parameter
    r: int
    alpha: float | None
    scaling: float | None
    merged: bool
    active: bool
    plain: bool  # y = W0 x + b + scaling B A x, and not DoRA or another variant
    adapter: str = ""  # peft's name for it
    wraps: bool = True  # nothing else in the layer has parameters (a gate, other projections), so that its output can be tried against the formula
    start_in_base: bool = False  # begins with a part of W0 in B A (PiSSA, OLoRA)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """B @ A without the scaling, (out, in), in float32 or better."""
        if self.make == "lora_lab":
            return self.layer.full_B().double() @ self.layer.lora_A.double()
        A, B = self.A.detach().double().flatten(1), self.B.detach().double().flatten(1)
        if self.base_shape == (B.shape[0], A.shape[1]) and B.shape[1] == A.shape[0]:
            return B @ A
        return (A @ B).T if A.shape[1] == B.shape[0] else B.T @ A.T  # stored as (in, r) and (r, out)

    @property
    def transposed(self) -> bool:
        """Whether the base keeps its weight as (in, out)."""
        return is_conv1d(self.base) or isinstance(self.base, nn.Embedding)

    @property
    def base_shape(self) -> tuple[int, int]:
        """(out, in) of the base layer's matrix."""
        shape = self.base.weight.shape
        rows, columns = shape[0], math.prod(shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)

    def to_base_layout(self, delta: Tensor) -> Tensor:
        """ΔW (out, in) in the shape in which the base stores its weight."""
        return (delta.T if self.transposed else delta).reshape(self.base.weight.shape)


def adapters(model: nn.Module) -> list[Adapter]:
    """Every pair of LoRA factors in the model, in its order; those of peft's inactive adapters too."""
    found = []
    for name, module in model.named_modules():
        found += list(_ours(name, module)) or list(_of_peft(name, module)) or list(_own(name, module))
    return found


def _ours(name: str, module: nn.Module) -> Iterator[Adapter]:
    if isinstance(module, LoRALayer):
        yield Adapter(
            name, "lora_lab", module, module.base_layer, module.lora_A, module.lora_B, module.r, module.alpha, module.scaling,
            module.merged, not module.disabled, set(module._parameters) == {"lora_A", "lora_B"}, start_in_base=getattr(module, "from_weight", False),
        )  # fmt: skip


def _of_peft(name: str, module: nn.Module) -> Iterator[Adapter]:
    """peft's LoRA layers, known by what they keep, so that peft need not be imported."""
    scaling = getattr(module, "scaling", None)
    if not (isinstance(scaling, dict) and hasattr(module, "get_base_layer") and hasattr(module, "active_adapters") and hasattr(module, "lora_A")):
        return  # of peft's other methods some have a scaling, too
    base = module.get_base_layer()
    if not isinstance(getattr(base, "weight", None), Tensor):
        return
    for factors_A, factors_B in ((module.lora_A, module.lora_B), (module.lora_embedding_A, module.lora_embedding_B)):
        for key in factors_A:
            A, B = (f[key] if isinstance(f[key], nn.Parameter) else f[key].weight for f in (factors_A, factors_B))
            active = key in module.active_adapters and not module.disable_adapters
            plain = not hasattr(module, "lora_E") and key not in getattr(module, "lora_variant", {}) and not getattr(module, "use_dora", {}).get(key, False)
            yield Adapter(
                name, "peft", module, base, A, B, module.r[key], module.lora_alpha[key], scaling[key], key in module.merged_adapters, active, plain, key,
            )  # fmt: skip


def _own(name: str, module: nn.Module) -> Iterator[Adapter]:
    matrices = {key.lower(): p for key, p in module._parameters.items() if p is not None and p.ndim == 2}
    inside = [m for m in module.children() if set(map(str.lower, m._parameters)) in map(set, APART) and len(list(m.parameters())) == 2]
    if len(inside) == 1:  # the pair in a module of its own, beside the base: self.linear, self.lora
        matrices |= {key.lower(): p for key, p in inside[0]._parameters.items() if p is not None and p.ndim == 2}
    for key, child in module._modules.items():
        children = list(child.children()) if isinstance(child, (nn.ModuleDict, nn.ModuleList)) and len(child) == 1 else [child]
        weight = children[0]._parameters.get("weight") if children and isinstance(children[0], nn.Linear) else None
        if isinstance(child, nn.ParameterDict) and len(child) == 1:
            weight = next(iter(child.values()))
        if weight is not None and weight.ndim == 2:
            matrices.setdefault(key.lower(), weight)
    bases = [module, *module.children()]
    if "original_module" in module._modules:
        bases = [module.original_module, *bases]
    for first, second in APART if inside else PAIRS:
        if first not in matrices or second not in matrices:
            continue
        A, B = matrices[first], matrices[second]
        for base in bases:
            weight = base._parameters.get("weight")
            if weight is None or weight is A or weight is B or weight.ndim != 2 or not _fit(A, B, weight):
                continue
            r = next(r for r in (*A.shape, 0) if r in B.shape and _fit(A, B, weight, r))
            given = {what: next((n for m in (module, *inside) if (n := _number(m, names)) is not None), None) for what, names in NUMBERS.items()}
            known = {id(p) for p in (A, B, *base._parameters.values())}
            alone = all(id(p) in known for p in module.parameters())
            alpha, scaling = given["alpha"], given["scaling"]
            if scaling is None and alpha is not None:
                scaling = alpha / (given["r"] or r)
            yield Adapter(
                name, "own", module, base, A, B, r, alpha, scaling, bool(getattr(module, "merged", False)), not getattr(module, "disabled", False), True,
                wraps=alone,
            )  # fmt: skip
            return


def _fit(A: Tensor, B: Tensor, weight: Tensor, r: int | None = None) -> bool:
    """Can these two make an update of this weight (with this r)? Their common side is r, the others are the weight's, in either order."""
    sides = sorted(weight.shape)
    ways = ((A.shape[0], B.shape[1], A.shape[1], B.shape[0]), (A.shape[1], B.shape[0], A.shape[0], B.shape[1]))
    return any(r_A == r_B and r in (None, r_A) and sorted((inner, outer)) == sides for r_A, r_B, inner, outer in ways)


def _number(module: nn.Module, names: tuple[str, ...]) -> float | None:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def adapter_coverage(model: nn.Module) -> Coverage:
    """What `coverage` says of a model with this lab's layers, for adapters of any make."""
    found = adapters(model)
    if not found or any(a.make == "lora_lab" for a in found):
        return coverage(model)
    inside = {id(m) for a in found for m in a.layer.modules()} | {id(m) for _, copied in saved_modules(model) for m in copied.modules()}
    names = tuple(dict.fromkeys(a.name for a in found))
    left = [n for n, m in model.named_modules() if (isinstance(m, nn.Linear) or is_conv1d(m)) and id(m) not in inside]
    factors = {id(p) for a in found for p in (a.A, a.B)}
    elsewhere = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in factors]
    count = count_parameters(model)
    return Coverage(names, tuple(left), count.trainable, count.total, tuple(elsewhere))


def saved_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The copies that train in full and are saved with the adapter (`modules_to_save`), ours and peft's."""
    found = [(name, module.trained) for name, module in model.named_modules() if isinstance(module, TrainedCopy)]
    for name, module in model.named_modules():
        copies = module._modules.get("modules_to_save")
        if isinstance(copies, nn.ModuleDict):
            found += [(name, copied) for copied in copies.values()]
    return found


def peft_settings(model: nn.Module) -> dict:
    """peft's config of each adapter by name; {} for any other model."""
    config = getattr(model, "peft_config", None)
    return config if isinstance(config, dict) else {}


def family(name: str) -> str:
    """The name with every number replaced: "h.3.attn.c_attn" and "h.4.attn.c_attn" are one family."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "#", name)
