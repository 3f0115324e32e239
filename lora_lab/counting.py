"""Parameters, bytes and FLOPs as plain arithmetic on shapes.

A LoRA update of a matrix (out, in) has r * (in + out) parameters (Hu et al. 2021, section 5.1, where in = out = d_model gives 2 d r).
Whole models without weights: presets.py. What a training step holds in memory: ledger.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod

from torch import nn


@dataclass(frozen=True)
class ParameterCount:
    """Counts of scalars: `total` = `trainable` + `frozen`."""

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        return self.trainable + self.frozen

    @property
    def share(self) -> float:
        """trainable / total, between 0 and 1; 0 for a model without parameters."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trainable ({100 * self.share:.4g} %)"


def count_parameters(model) -> ParameterCount:
    """Count a model's parameters; a tensor that stands in two places (a tied embedding) counts once.

    >>> print(count_parameters(nn.Linear(64, 10)))
    650 of 650 parameters are trainable (100 %)
    """
    trainable = frozen = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trainable += parameter.numel()
        else:
            frozen += parameter.numel()
    return ParameterCount(trainable, frozen)


@dataclass(frozen=True)
class ModuleCount:
    """Parameters of one module, or of `times` alike ones.

    name       with * for the number of a block where several are taken together
    kind       Linear, Conv1D, Embedding, ...; shape: of its weight as it is stored
    trainable, frozen    scalars, adapters included; `added`: those that an adapter brought, trainable or not
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    trainable: int
    frozen: int
    added: int = 0
    times: int = 1


# Attributes under which adapter layers keep the layer that they adopted: lora_lab's and peft's, and peft's for modules_to_save.
ADOPTED = ("base_layer", "original_module")


def count_modules(model: nn.Module, together: bool = False) -> list[ModuleCount]:
    """Parameters module by module, in the model's order; sums are those of `count_parameters`.

    An adapted layer is one row, under the name that the plain layer had: with lora_lab's adapters or with peft's. A tensor in two places
    counts where it stands first. together: modules that differ in the number of their block only become one row.
    """
    seen: set[int] = set()
    rows, inside = [], []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in inside):
            continue
        base = next((getattr(module, a) for a in ADOPTED if isinstance(module._modules.get(a), nn.Module)), None)
        if base is None:
            own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        else:
            inside.append(name + "." if name else "")
            own = [p for p in module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        if not own:
            continue
        adopted = {id(p) for p in base.parameters()} if base is not None else {id(p) for p in own}
        trainable = sum(p.numel() for p in own if p.requires_grad)
        total = sum(p.numel() for p in own)
        added = sum(p.numel() for p in own if id(p) not in adopted)
        plain = module if base is None else base
        weight = getattr(plain, "weight", None)
        shape = tuple(weight.shape) if weight is not None else ()
        kind = type(plain).__name__.removeprefix("Meta")
        rows.append(ModuleCount(name.removeprefix("base_model.model."), kind, shape, trainable, total - trainable, added))
    return _together(rows) if together else rows


def _together(rows: list[ModuleCount]) -> list[ModuleCount]:
    groups: dict[tuple, list[ModuleCount]] = {}
    for row in rows:
        name = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
        groups.setdefault((name, row.kind, row.shape, row.trainable, row.frozen, row.added), []).append(row)
    merged = []
    for (name, kind, shape, trainable, frozen, added), group in groups.items():
        n = len(group)
        merged.append(ModuleCount(name if n > 1 else group[0].name, kind, shape, n * trainable, n * frozen, n * added, n))
    return merged


def lora_parameters(in_features: int, out_features: int, r: int) -> int:
    """r * (in + out): A is (r, in), B is (out, r). Raises ValueError for sizes or ranks below 1.

    >>> lora_parameters(64, 10, r=4)
    296
    """
    for name, value in (("in_features", in_features), ("out_features", out_features), ("r", r)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; found {value}")
    return r * (in_features + out_features)


def lora_shape(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of the matrix that LoRA adds to this layer, for `lora_parameters(*lora_shape(layer), r)`.

        Linear      (in_features, out_features)
        Conv1D      (nx, nf), transformers' linear layer that stores its weight transposed, as in GPT-2
        Embedding   (num_embeddings, embedding_dim): each token has its column of A
        Conv2d      (in_channels * kh * kw, out_channels): A is a convolution to r channels, B a 1 x 1 one

    Reads shapes only, so that a model on the meta device will do. Raises TypeError for any other layer and for grouped
    convolutions.

    >>> lora_shape(nn.Conv2d(16, 32, kernel_size=3)), lora_parameters(*lora_shape(nn.Embedding(1000, 64)), r=4)
    ((144, 32), 4256)
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return layer.weight[0].numel(), layer.out_channels
    weight = getattr(layer, "weight", None)
    if hasattr(layer, "nf") and getattr(weight, "ndim", 0) == 2 and weight.shape[1] == layer.nf:
        return tuple(weight.shape)
    grouped = f" with groups={layer.groups}" if isinstance(layer, nn.Conv2d) else ""
    raise TypeError(
        "LoRA adds a matrix to Linear, Conv1D, Embedding and ungrouped Conv2d layers; "
        f"found {type(layer).__name__}{grouped}"
    )


def breakeven_rank(in_features: int, out_features: int) -> float:
    """The rank at which A and B together have as many entries as the full matrix: in * out / (in + out).

    Below it LoRA saves parameters, above it costs more than it replaces.

    >>> round(breakeven_rank(64, 10), 4)
    8.6486
    """
    return in_features * out_features / lora_parameters(in_features, out_features, 1)


def fused_parameters(in_features: int, width: int, r: int, slices: int = 2) -> int:
    """slices * r * (in + width): each chosen slice of a fused layer has an A and a B of its own, as in `LoRAFusedLinear`.

    For q and v of GPT-2's c_attn (d -> 3 d) 4 r d, for q, k and v 6 r d. One adapter of rank r on the whole of it has r (d + 3 d), 4 r d again:
    the same number, another function (its rank is r in all, and k moves, too). Raises ValueError for sizes below 1.

    >>> fused_parameters(1024, 1024, r=4), fused_parameters(1024, 1024, r=4, slices=3), lora_parameters(1024, 3 * 1024, r=4)
    (16384, 24576, 16384)
    """
    if slices < 1:
        raise ValueError(f"slices must be at least 1; found {slices}")
    return slices * lora_parameters(in_features, width, r)


def conv_parameters(channels: int, out: int, kernel: int, r: int, convention: str = "peft") -> int:
    """LoRA on a Conv2d with a square kernel, by one of the two conventions in use.

        "peft"     r (channels k² + out): A a k x k convolution to r channels, B a 1 x 1 one; ΔW has rank at most r. lora_lab does this, too
        "loralib"  r k² (channels + out) : A (r k, channels k), B (out k, r k), ΔW = B A reshaped; rank at most r k. The authors' own code

    Raises ValueError for another convention and for sizes below 1.

    >>> conv_parameters(16, 32, 3, r=4), conv_parameters(16, 32, 3, r=4, convention="loralib")
    (704, 1728)
    """
    if kernel < 1:
        raise ValueError(f"kernel must be at least 1; found {kernel}")
    if convention == "peft":
        return lora_parameters(channels * kernel**2, out, r)
    if convention == "loralib":
        return kernel * lora_parameters(channels * kernel, out * kernel, r)
    raise ValueError(f"convention {convention!r} is neither 'peft' nor 'loralib'")


@dataclass(frozen=True)
class Method:
    """A way to train few numbers of a matrix (out, in): how many, as a formula and as a function of (in, out, r), and whose idea it is."""

    name: str
    formula: str
    count: Callable[[int, int, int], int]
    source: str
    note: str = ""


METHODS = {
    m.name: m
    for m in (
        Method("full", "in out", lambda i, o, r: i * o, "fine-tuning of the weight"),
        Method("lora", "r (in + out)", lambda i, o, r: r * (i + o), "Hu et al. 2021, arXiv 2106.09685, section 4.1"),
        Method("lora-fa", "r out", lambda i, o, r: r * o, "Zhang et al. 2023, arXiv 2308.03303", "A is frozen"),
        Method("dora", "r (in + out) + out", lambda i, o, r: r * (i + o) + o, "Liu et al. 2024, arXiv 2402.09353", "one magnitude a row"),
        Method("adalora", "r (in + out) + r", lambda i, o, r: r * (i + o) + r, "Zhang et al. 2023, arXiv 2303.10512", "at its first rank"),
        Method("vera", "out + r", lambda i, o, r: o + r, "Kopiczko et al. 2024, arXiv 2310.11454", "A and B random, frozen, shared by all layers"),
        Method("lora-xs", "r²", lambda i, o, r: r * r, "Bałazy et al. 2024, arXiv 2405.17604", "A and B from the SVD of W, frozen"),
        Method("bitfit", "out", lambda i, o, r: o, "Ben Zaken et al. 2022, arXiv 2106.10199", "the bias; for a layer that has one"),
    )
}


def method_parameters(method: str, in_features: int, out_features: int, r: int = 1) -> int:
    """How many numbers of one matrix a method trains; `METHODS` has formulas and sources. Raises ValueError.

    Variants that differ from LoRA in scaling or start only (rsLoRA, PiSSA, OLoRA, EVA, LoftQ, LoRA-GA, LoRA+) count as "lora".

    >>> [method_parameters(m, 64, 10, r=4) for m in ("lora", "dora", "vera", "lora-xs")]
    [296, 306, 14, 16]
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    lora_parameters(in_features, out_features, r)  # refuses impossible sizes
    return METHODS[method].count(in_features, out_features, r)


def adapter_parameters(d_model: int, r: int, adapters: int, norms: int = 0) -> int:
    """Bottleneck adapters: adapters * (2 d r + r + d) + norms * 2 d. r is the bottleneck's width; two matrices and their biases.

    Hu et al. 2021, section 5.1. Adapter-H (Houlsby et al. 2019) has two adapters a block, Adapter-L (Lin et al. 2020) one and a LayerNorm.

    >>> adapter_parameters(1024, r=6, adapters=24, norms=24), adapter_parameters(12288, r=8, adapters=2 * 96)
    (368784, 40109568)
    """
    return adapters * (2 * d_model * r + r + d_model) + norms * 2 * d_model


def prefix_parameters(d_model: int, prefix: int, infix: int = 0, layers: int = 1) -> int:
    """Trained tokens: d (prefix + infix) at the embedding (PreEmbed, layers=1), the same for each layer's input with PreLayer.

    Hu et al. 2021, section 5.1, after Li and Liang 2021 (arXiv 2101.00190).

    >>> prefix_parameters(12288, prefix=256, infix=8)
    3244032
    """
    return layers * d_model * (prefix + infix)


# ---- bytes

ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}
STORED = (*ELEMENT, "int8", "nf4", "nf4-double")


def stored_bytes(out_features: int, in_features: int, dtype: str) -> int:
    """Bytes of a weight (out, in) as it is stored.

        fp32, bf16, fp16   4, 2, 2 a number
        int8               1, and a float32 scale a row (Dettmers et al. 2022, arXiv 2208.07339)
        nf4                4 bits, and a float32 scale for each block of 64: 4.5 bits (Dettmers et al. 2023, arXiv 2305.14314)
        nf4-double         the scales in 8 bits, with a float32 scale for each 256 of them: 4.127 bits

    Raises ValueError for another dtype.

    >>> [stored_bytes(4096, 4096, d) / 4096**2 * 8 for d in ("bf16", "nf4")], round(stored_bytes(4096, 4096, "nf4-double") / 4096**2 * 8, 3)
    ([16.0, 4.5], 4.127)
    """
    n = out_features * in_features
    if dtype in ELEMENT:
        return ELEMENT[dtype] * n
    if dtype == "int8":
        return n + 4 * out_features
    blocks = ceil(n / 64)
    if dtype == "nf4":
        return ceil(n / 2) + 4 * blocks
    if dtype == "nf4-double":
        return ceil(n / 2) + blocks + 4 * ceil(blocks / 256) + 4  # the last four: the scales' mean, taken off before
    raise ValueError(f"dtype {dtype!r} is not one of {', '.join(STORED)}")


OPTIMIZERS = ("sgd", "momentum", "adam", "adam8bit")


def optimizer_bytes(numbers: int, optimizer: str, element: int = 4) -> int:
    """Bytes of the state for one tensor of `numbers` parameters with `element` bytes each.

        sgd        0                          adam       two moments, as wide as the parameter, and a step count (4 bytes)
        momentum   one, as wide               adam8bit   two moments of 1 byte, a float32 scale for each block of 256; a tensor below
                                                         4096 numbers keeps float32 moments (bitsandbytes 0.48)

    Raises ValueError for another optimizer.

    >>> optimizer_bytes(1_000_000, "adam"), optimizer_bytes(1_000_000, "adam8bit")
    (8000004, 2031256)
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
    if optimizer == "sgd":
        return 0
    if optimizer == "momentum":
        return numbers * element
    if optimizer == "adam":
        return 2 * numbers * element + 4
    return 2 * (numbers + 4 * ceil(numbers / 256)) if numbers >= 4096 else 2 * 4 * numbers


# torch's name of a dtype -> safetensors' name, bytes; the order is that in which safetensors lays tensors out, widest first
SAFETENSORS = {"int64": ("I64", 8), "float64": ("F64", 8), "float32": ("F32", 4), "int32": ("I32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}


def safetensors_bytes(tensors: Mapping[str, tuple[tuple[int, ...], str]], metadata: Mapping[str, str] | None = None) -> int:
    """The exact size of a .safetensors file: 8 bytes, a JSON header filled up to a multiple of 8, the numbers.

    tensors: name -> (shape, torch's name of the dtype). metadata: text by name, as it goes into the header. Raises ValueError for a dtype
    that is not in `SAFETENSORS`. What `save_adapter` writes for a model: `lora_lab.state.adapter_bytes`.

    >>> safetensors_bytes({"a": ((2, 3), "float32")})
    96
    """
    strange = {dtype for _, dtype in tensors.values()} - set(SAFETENSORS)
    if strange:
        raise ValueError(f"dtype {min(strange)!r} is not one of {', '.join(SAFETENSORS)}")
    header = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-SAFETENSORS[item[1][1]][1], item[0])):
        kind, size = SAFETENSORS[dtype]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size * prod(shape)]}
        at += size * prod(shape)
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + 8 * ceil(text / 8) + at


def tasks_bytes(base: int, adapter: int, tasks: int) -> tuple[int, int]:
    """(one base and an adapter for each task, a whole model for each task), in bytes.

    >>> tasks_bytes(350_000_000_000, 35_000_000, tasks=100)  # the paper's section 4.2: 354 GB instead of 35 TB
    (353500000000, 35000000000000)
    """
    return base + tasks * adapter, tasks * base


# ---- FLOPs


def matrix_flops(in_features: int, out_features: int, r: int | None = None, mode: str = "training") -> int:
    """FLOPs a token of one matrix: two for each multiplication with its addition; biases and scaling left out.

        mode         r=None (the plain layer)     with LoRA of rank r
        "training"   6 in out                     4 in out + 6 r (in + out)    forward, and backward to x and to what trains
        "forward"    2 in out                     2 in out + 2 r (in + out)    unmerged
        "merged"     2 in out                     2 in out

    With in = out = N training costs (2 N² + 6 N r) / 3 N² of full fine-tuning, a little more than 2/3 (Schulman et al. 2025, "LoRA Without
    Regret"). Raises ValueError for another mode and for sizes below 1.

    >>> round(matrix_flops(4096, 4096, r=16) / matrix_flops(4096, 4096), 4)
    0.6745
    """
    factors = lora_parameters(in_features, out_features, 1 if r is None else r) * (r is not None)
    full = in_features * out_features
    if mode == "training":
        return 4 * full + 6 * factors if r is not None else 6 * full
    if mode == "forward":
        return 2 * (full + factors)
    if mode == "merged":
        return 2 * full
    raise ValueError(f"mode {mode!r} is not one of 'training', 'forward', 'merged'")
