"""Weights in few bits: what is stored are whole numbers and scales, what is computed with is code * scale.

    int8   a row of W (out, in) has one scale, max|w| / 127; codes -127 ... 127         Dettmers et al. 2022, arXiv 2208.07339
    int4   a block of 64 neighbours has one scale, max|w| / 7; codes -7 ... 7, two in a byte
    nf4    a block of 64 has one scale, max|w|; codes name one of 16 levels that lie as     Dettmers et al. 2023, arXiv 2305.14314
           dense as a normal distribution

Rounding moves a weight by at most half the distance of two neighbouring levels, times its scale. `quantise` rounds a finished model (post-training
quantisation), `quantise_below_lora` the base under adapters that stay in full precision (QLoRA's idea).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import find_targets, lora_layers
from ..layers import LoRAConv1D, LoRALinear, is_conv1d

KINDS = ("int8", "int4", "nf4")
BLOCK = 64


def nf4_levels() -> Tensor:
    """The 16 levels of NF4, from -1 to 1: quantiles of a normal distribution, eight above zero, seven below, and zero itself."""
    tail = 0.5 * (1 - 1 / 32 + 1 - 1 / 30)  # 0.9677: how much of the distribution lies below the largest level
    quantile = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)).icdf
    above = quantile(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -quantile(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (levels / levels.max()).float()


def quantise_rows(W: Tensor) -> tuple[Tensor, Tensor]:
    """W (out, in) -> codes int8 (out, in), scales (out, 1) with W ≈ codes * scales. A row of zeros gets scale 0."""
    scales = W.abs().amax(1, keepdim=True) / 127
    return (W / scales.clamp(min=torch.finfo(W.dtype).tiny)).round().to(torch.int8), scales


def quantise_blocks(W: Tensor, kind: str = "int4", block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """W, any shape -> codes uint8, two in a byte (the first in the upper half), scales (blocks,); the last block may be filled up with zeros."""
    flat = F.pad(W.flatten(), (0, -W.numel() % block)).view(-1, block)
    largest = flat.abs().amax(1, keepdim=True)
    share = flat / largest.clamp(min=torch.finfo(W.dtype).tiny)  # -1 ... 1
    if kind == "int4":
        codes, scales = (7 * share).round() + 8, largest / 7  # 1 ... 15
    else:
        levels = nf4_levels().to(W)
        codes, scales = torch.bucketize(share, (levels[1:] + levels[:-1]) / 2), largest  # the nearest level
    codes = codes.to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales[:, 0]


def dequantise_blocks(packed: Tensor, scales: Tensor, shape: tuple[int, ...], kind: str = "int4", block: int = BLOCK) -> Tensor:
    """The weight of `shape` that packed codes and scales stand for."""
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1, block)
    values = codes.to(scales.dtype) - 8 if kind == "int4" else nf4_levels().to(scales)[codes.long()]
    return (values * scales[:, None]).flatten()[: torch.Size(shape).numel()].view(shape)


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ for a weight that is made from its codes each time, in the backward pass again: kept are the codes, never W."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.weight)

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.layer.weight.to(g.dtype), None


class QuantisedLinear(nn.Linear):
    """A frozen linear layer that stores its weight as codes and scales; `weight` (out, in) is made from them when it is asked for.

    base   an nn.Linear, or transformers' Conv1D, whose transposed weight is turned. Raises ValueError for another kind than `KINDS`
    """

    def __init__(self, base: nn.Module, kind: str = "int8", block: int = BLOCK):
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        W = (base.weight.T if is_conv1d(base) else base.weight).detach()
        self.out_features, self.in_features = W.shape
        self.kind, self.block = kind, block
        codes, scales = quantise_rows(W.contiguous()) if kind == "int8" else quantise_blocks(W, kind, block)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        if self.kind == "int8":
            return self.codes * self.scales
        return dequantise_blocks(self.codes, self.scales, (self.out_features, self.in_features), self.kind, self.block)

    @property
    def coded(self) -> int:
        """Numbers of W, which are no parameters any more; `lora_lab.comparing` counts them among the model's."""
        return self.in_features * self.out_features

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales, without the bias."""
        return self.codes.numel() + self.scales.numel() * self.scales.element_size()

    def forward(self, x: Tensor) -> Tensor:
        y = _FrozenLinear.apply(x, self)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


def quantise(model: nn.Module, kind: str = "int8", target_modules="all-linear", block: int = BLOCK) -> nn.Module:
    """Replace the target layers (rules as in `apply_lora`) by `QuantisedLinear`, in place; return the model, frozen.

    Embeddings, norms and biases stay as they are. Raises ValueError for an unknown kind and for targets that match nothing.
    """
    built = {name: QuantisedLinear(module, kind, block) for name, module in find_targets(model, target_modules).items()}
    for name, layer in built.items():
        _put(model, name, layer)
    return model.requires_grad_(False)


class LoRAQuantised(LoRALinear):
    """LoRA over a `QuantisedLinear`: y = Q(W0) x + b + scaling * B A x. There is no weight that ΔW could be added to, so merging is refused."""

    def merge(self) -> float:
        raise RuntimeError(
            "ΔW can't be merged into a quantised weight: rounding to so few levels would swallow most of it. Merge into the base in full precision, "
            "then quantise the sum, and measure what that costs"
        )


def quantise_below_lora(model: nn.Module, kind: str = "nf4", block: int = BLOCK) -> nn.Module:
    """Round the base of every LoRA layer of the model, in place; A and B stay as they are, and what trained still trains.

    Raises ValueError for a model without LoRA and for merged layers, TypeError for layers that are not plain linear ones.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("this model carries no LoRA: call apply_lora first, or round the whole model by quantise(model)")
    for name, layer in layers.items():
        if type(layer) not in (LoRALinear, LoRAConv1D):
            raise TypeError(f"quantise_below_lora is written for plain linear layers; {name!r} is a {type(layer).__name__}")
        if layer.merged:
            raise ValueError(f"{name!r} is merged, so its weight is not the base's; call unmerge(model) first")
    for name, layer in layers.items():
        new = LoRAQuantised(QuantisedLinear(layer.base_layer, kind, block), layer.r, layer.alpha, rslora=layer.rslora)
        new.lora_A, new.lora_B, new.lora_dropout = layer.lora_A, layer.lora_B, layer.lora_dropout
        _put(model, name, new.train(layer.training))
    return model


def _put(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
