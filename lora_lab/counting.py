"""Parameters as plain arithmetic on shapes.

A LoRA update of a matrix (out, in) has r * (in + out) parameters (Hu et al. 2021, section 5.1, where in = out = d_model gives 2 d r).
"""

from __future__ import annotations

from dataclasses import dataclass

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
