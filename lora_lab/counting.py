"""Parameters as plain arithmetic on shapes.

A LoRA update of a matrix (out, in) has r * (in + out) parameters (Hu et al. 2021, section 5.1, where in = out = d_model gives 2 d r).
"""

from __future__ import annotations

from dataclasses import dataclass


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

    >>> from torch import nn
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


def breakeven_rank(in_features: int, out_features: int) -> float:
    """The rank at which A and B together have as many entries as the full matrix: in * out / (in + out).

    Below it LoRA saves parameters, above it costs more than it replaces.

    >>> round(breakeven_rank(64, 10), 4)
    8.6486
    """
    return in_features * out_features / lora_parameters(in_features, out_features, 1)
