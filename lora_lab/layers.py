"""LoRA layers: a frozen layer plus a trainable low-rank update.

    h = W0 x + b + scaling * B A x        Hu et al. 2021 (arXiv 2106.09685), section 4.1, equation 3

    W0  (out, in)   frozen weight of the base layer         A  lora_A (r, in)    trained
    b   (out,)      frozen bias, may be absent              B  lora_B (out, r)   trained, zero at the start
    x   (..., in)   input                                   scaling = alpha / r

The update is ΔW = scaling * B @ A, of shape (out, in) and rank at most r. `forward` never builds it: it multiplies by A,
then by B, which costs r (in + out) multiplications a token instead of in * out. Weights change in `merge`, `unmerge` (see
merging.py) and optimizer steps, nowhere else.
"""

from __future__ import annotations

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .merging import MergeableLayer


class LoRALayer(MergeableLayer):
    """What all LoRA layers share: the factors, the scaling, merging, switching off.

    base_layer     the adopted layer; its parameters are frozen here
    r              rank of the update, an int >= 1. Above min(in, out) it adds parameters without adding rank
    alpha          any finite number; the update is multiplied by `scaling`
    dropout        probability that an entry of x is dropped on the way to A, in training mode (0 <= dropout < 1)
    rslora         scaling = alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023, arXiv 2312.03732)
    adapter_dtype  dtype of A and B, by default that of the base weight; float32 factors over a bfloat16 base
                   train more exactly

    Raises TypeError or ValueError, before anything is changed, when an argument is not of this kind.
    """

    stored_transposed = False  # whether the base keeps its weight as (in, out)
    beyond_lora = ""  # what a layer computes with besides W0, A and B, so that a file of A and B would lose it

    def __init__(self, base_layer, shape_A, shape_B, r, alpha, dropout=0.0, rslora=False, adapter_dtype=None):
        check_settings(r, alpha, dropout, adapter_dtype)
        super().__init__()
        weight = base_layer.weight
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.rslora = int(r), bool(rslora)
        self._alpha = float(alpha)
        self.disabled = False
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        factory = {"device": weight.device, "dtype": adapter_dtype or weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(shape_A, **factory))
        self.lora_B = nn.Parameter(torch.empty(shape_B, **factory))
        # nn.TransformerEncoderLayer's fast path in eval mode reads .weight and never calls this layer; a hook on any
        # layer inside it turns that path off.
        self.register_forward_pre_hook(_be_called)
        self.reset_lora()

    def reset_lora(self) -> None:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, so that ΔW is exactly 0 at step 0.

        The paper says Gaussian for A; its code, and peft's, draw Kaiming-uniform with a=sqrt(5), which is this interval.
        With both zero no gradient would ever flow: that of A is proportional to B, that of B to A.
        """
        self.refuse_while_merged("reset_lora")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.refuse_while_merged("changing alpha")
        check_settings(self.r, value)
        self._alpha = float(value)

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora."""
        return self._alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as code around the layer expects to find it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def full_B(self) -> Tensor:
        """B as it stands in ΔW = scaling * B @ A; only `LoRAFusedLinear` stores it otherwise."""
        return self.lora_B

    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW = scaling * B @ A, shape (out, in), whatever the layout of the base weight; computed in `dtype`, else in the factors' own."""
        return self.scaling * (self.full_B().to(dtype=dtype) @ self.lora_A.to(dtype=dtype))

    def to_base_layout(self, delta: Tensor) -> Tensor:
        """ΔW (out, in) in the shape in which the base layer stores its weight."""
        return delta.T if self.stored_transposed else delta.view(self.base_layer.weight.shape)

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """y + scaling * B A dropout(x), without building ΔW."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.forward_merged(x)
        y = self.base_layer(x)
        return y if self.disabled else self.add_update(y, x)

    def extra_repr(self) -> str:
        scale = "alpha / sqrt(r)" if self.rslora else "alpha / r"
        flags = "".join(f", {name}" for name in ("merged", "disabled") if getattr(self, name))
        return f"r={self.r}, alpha={self._alpha:g}, scaling={self.scaling:g} ({scale}){flags}"


class LoRALinear(LoRALayer):
    """A frozen `nn.Linear` plus scaling * B @ A.

        y = x W0ᵀ + b + scaling * (dropout(x) Aᵀ) Bᵀ

    x (..., in), y (..., out), W0 (out, in), A (r, in), B (out, r). Arguments as in `LoRALayer`.

    >>> layer = LoRALinear(nn.Linear(64, 10), r=4, alpha=8)
    >>> layer.lora_A.shape, layer.lora_B.shape, sum(p.numel() for p in layer.parameters() if p.requires_grad)
    (torch.Size([4, 64]), torch.Size([10, 4]), 296)
    """

    def __init__(self, base_layer: nn.Linear, r: int, alpha: float, **options):
        check_base(self, base_layer, isinstance(base_layer, nn.Linear), "an nn.Linear")
        out, inputs = base_layer.weight.shape
        super().__init__(base_layer, (r, inputs), (out, r), r, alpha, **options)

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        x, A, B = self.lora_dropout(x), self.lora_A, self.full_B()
        if A.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            # Factors in another precision than the base: compute the update in theirs, round once at the end.
            return y + (self.scaling * F.linear(F.linear(x.to(A.dtype), A), B)).to(y.dtype)
        h = F.linear(x, A)  # (..., r)
        # One call that scales, multiplies and adds: one (tokens, out) tensor is made instead of three.
        update = h.reshape(-1, h.shape[-1]), B.t()
        return torch.addmm(y.reshape(-1, y.shape[-1]), *update, alpha=self.scaling).view(y.shape)


class LoRAConv1D(LoRALinear):
    """The same for transformers' `Conv1D` (GPT-2), which is a linear layer with its weight stored as (in, out) = W0ᵀ."""

    stored_transposed = True

    def __init__(self, base_layer: nn.Module, r: int, alpha: float, **options):
        check_base(self, base_layer, is_conv1d(base_layer), "transformers' Conv1D")
        inputs, out = base_layer.weight.shape
        LoRALayer.__init__(self, base_layer, (r, inputs), (out, r), r, alpha, **options)


class LoRAFusedLinear(LoRALinear):
    """Chosen slices of a fused layer, each with its own A and B: the paper's "W_q and W_v" where q, k, v are one matrix.

        ΔW = scaling * [B_q A_q; 0; B_v A_v]   for slices=(0, 2) of 3: rows of k stay zero, rank at most 2 r

    base_layer: nn.Linear or Conv1D with `of` equal slices of width out / of along its output.
    lora_A (n r, in) and lora_B (n out / of, r) hold the n slices' factors stacked: r (n in + n out / of) parameters,
    4 r d for q and v of GPT-2's c_attn, as many as one adapter of rank r for the whole of it, but another function.
    """

    def __init__(self, base_layer: nn.Module, r: int, alpha: float, slices=(0, 2), of: int = 3, **options):
        check_base(self, base_layer, is_conv1d(base_layer) or isinstance(base_layer, nn.Linear), "an nn.Linear or Conv1D")
        inputs, out = base_layer.weight.shape if is_conv1d(base_layer) else reversed(base_layer.weight.shape)
        self_slices = tuple(sorted(set(slices)))
        if out % of or not self_slices or not set(self_slices) <= set(range(of)):
            raise ValueError(f"asked for slices {tuple(slices)} of {of}; the layer has {out} outputs, so slices are 0 to {of - 1}")
        n, width = len(self_slices), out // of
        self.slices, self.of = self_slices, of
        LoRALayer.__init__(self, base_layer, (n * r, inputs), (n * width, r), r, alpha, **options)
        self.stored_transposed = is_conv1d(base_layer)

    def full_B(self) -> Tensor:
        """(out, n r): block k of the columns belongs to slice k, all else is zero."""
        n, r = len(self.slices), self.r
        blocks = self.lora_B.view(n, -1, r)
        full = blocks.new_zeros(self.of, blocks.shape[1], n, r)
        for k, place in enumerate(self.slices):
            full[place, :, k] = blocks[k]
        return full.view(-1, n * r)


class LoRAEmbedding(LoRALayer):
    """A frozen `nn.Embedding` (tokens, dim), whose weight is W0ᵀ: y = W0 e_x + scaling * B A e_x, e_x the x-th unit vector.

    A (r, tokens) starts at zero and B (dim, r) normal, as in loralib and peft: A x is a look-up, so B learns from all
    tokens and only the rows of A that occur get a gradient. There is no dropout: x holds numbers of tokens.
    """

    stored_transposed = True

    def __init__(self, base_layer: nn.Embedding, r: int, alpha: float, **options):
        check_base(self, base_layer, isinstance(base_layer, nn.Embedding), "an nn.Embedding")
        if base_layer.max_norm is not None:
            raise ValueError("an Embedding with max_norm rescales its weight in forward; it can't be kept frozen")
        tokens, dim = base_layer.weight.shape
        super().__init__(base_layer, (r, tokens), (dim, r), r, alpha, **options)

    def reset_lora(self) -> None:
        self.refuse_while_merged("reset_lora")
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    @property
    def bias(self) -> None:
        return None

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        h = F.embedding(x, self.lora_A.T, self.base_layer.padding_idx, scale_grad_by_freq=self.base_layer.scale_grad_by_freq)
        return y + (self.scaling * F.linear(h, self.lora_B)).to(y.dtype)


class LoRAConv2d(LoRALayer):
    """A frozen `nn.Conv2d` (out, channels, kh, kw): a convolution with r filters A, then a 1 x 1 convolution B.

    A (r, channels kh kw), B (out, r); ΔW = scaling * B @ A, viewed as (out, channels, kh, kw). Stride, padding, padding
    mode and dilation are the base's. Grouped convolutions are refused: their ΔW would have blocks of zeros that B A has not.
    """

    def __init__(self, base_layer: nn.Conv2d, r: int, alpha: float, **options):
        check_base(self, base_layer, isinstance(base_layer, nn.Conv2d), "an nn.Conv2d")
        if base_layer.groups != 1:
            raise ValueError(f"grouped convolutions can't be adapted; found groups={base_layer.groups}")
        out, *filters = base_layer.weight.shape
        super().__init__(base_layer, (r, math.prod(filters)), (out, r), r, alpha, **options)

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        A = self.lora_A.view(self.r, *self.base_layer.weight.shape[1:])
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)
        h = self.base_layer._conv_forward(self.lora_dropout(x), A, None)  # with the base's stride, padding, dilation
        return y + (self.scaling * F.conv2d(h, self.lora_B[:, :, None, None])).to(y.dtype)


def _be_called(module, inputs):
    """A hook that does nothing."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, known by its (in, out) weight and its `nf`, without importing transformers."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == module.nf


def check_settings(r: int, alpha: float, dropout: float = 0.0, adapter_dtype: torch.dtype | None = None) -> None:
    """Raise TypeError or ValueError unless r is an int >= 1, alpha finite, 0 <= dropout < 1, the dtype a floating one."""
    if isinstance(r, bool) or not isinstance(r, numbers.Integral):
        raise TypeError(f"r counts the columns of B and the rows of A, so it is an int; found {r!r}")
    if r < 1:
        raise ValueError(f"r must be at least 1; found {r}. An update of rank 0 is no update: leave the layer as it is")
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number; found {alpha!r}")
    if not isinstance(dropout, numbers.Real) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is a probability, 0 <= dropout < 1; found {dropout!r}")
    if adapter_dtype is not None and not adapter_dtype.is_floating_point:
        raise TypeError(f"A and B are trained, so adapter_dtype is a floating-point type; found {adapter_dtype}")


def check_base(layer: LoRALayer, base_layer: nn.Module, fits: bool, what: str) -> None:
    """Raise TypeError unless the base is of the kind that this layer adapts, and carries no adapter yet."""
    if isinstance(base_layer, LoRALayer):
        raise TypeError(
            "this layer already carries a LoRA adapter; remove it first (remove_lora), or train the one it has"
        )
    if not fits:
        raise TypeError(f"{type(layer).__name__} adapts {what}; found {type(base_layer).__name__}")


# Which layer adapts which base, asked in this order.
KINDS = (
    (lambda base: isinstance(base, nn.Linear), LoRALinear),
    (is_conv1d, LoRAConv1D),
    (lambda base: isinstance(base, nn.Embedding), LoRAEmbedding),
    (lambda base: isinstance(base, nn.Conv2d), LoRAConv2d),
)


def layer_class(base: nn.Module) -> type[LoRALayer] | None:
    """The LoRA layer for this kind of base layer, or None if there is none."""
    return next((kind for fits, kind in KINDS if fits(base)), None)
