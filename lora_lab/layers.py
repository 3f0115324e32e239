"""LoRA layers: a frozen layer plus a trainable low-rank update.

    h = W0 x + b + scaling * B A x        Hu et al. 2021 (arXiv 2106.09685), section 4.1, equation 3

    W0  (out, in)   frozen weight of the base layer         A  lora_A (r, in)    trained
    b   (out,)      frozen bias, may be absent              B  lora_B (out, r)   trained, zero at the start
    x   (..., in)   input                                   scaling = alpha / r

The update is ΔW = scaling * B @ A, of shape (out, in) and rank at most r. `forward` never builds it: it multiplies by A,
then by B, which costs r (in + out) multiplications a token instead of in * out. Weights change in `merge`, `unmerge` and
optimizer steps, nowhere else.
"""

from __future__ import annotations

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALayer(nn.Module):
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

    def __init__(self, base_layer, in_features, out_features, r, alpha, dropout=0.0, rslora=False, adapter_dtype=None):
        if isinstance(base_layer, LoRALayer):
            raise TypeError(
                "this layer already carries a LoRA adapter; remove it first (remove_lora), or train the one it has"
            )
        check_settings(r, alpha, dropout, adapter_dtype)
        super().__init__()
        weight = base_layer.weight
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = in_features, out_features
        self.r, self.rslora = int(r), bool(rslora)
        self._alpha = float(alpha)
        self.disabled = False
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        factory = {"device": weight.device, "dtype": adapter_dtype or weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(self.r, in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(out_features, self.r, **factory))
        # A buffer, so that .to(device) moves it; not persistent, so that files never see it.
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self.swallowed = 0.0
        # nn.TransformerEncoderLayer's fast path in eval mode reads .weight and never calls this layer; a hook on any
        # layer inside it turns that path off.
        self.register_forward_pre_hook(_be_called)
        self.reset_lora()

    def reset_lora(self) -> None:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, so that ΔW is exactly 0 at step 0.

        The paper says Gaussian for A; its code, and peft's, draw Kaiming-uniform with a=sqrt(5), which is this interval.
        With both zero no gradient would ever flow: that of A is proportional to B, that of B to A.
        """
        self._refuse_while_merged("reset_lora")
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._refuse_while_merged("changing alpha")
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

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    def delta_weight(self) -> Tensor:
        """ΔW = scaling * lora_B @ lora_A, shape (out, in)."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def to_base_layout(self, delta: Tensor) -> Tensor:
        """ΔW (out, in) as the base layer stores its weight; layers that store a transpose override this."""
        return delta

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """y + scaling * B A dropout(x), without building ΔW."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self._forward_merged(x)
        y = self.base_layer(x)
        return y if self.disabled else self.add_update(y, x)

    def _forward_merged(self, x: Tensor) -> Tensor:
        if self.disabled:  # the base's own function, without touching a weight
            return torch.func.functional_call(self.base_layer, {"weight": self._unmerged_weight}, (x,))
        if self.training and torch.is_grad_enabled() and (self.lora_A.requires_grad or self.lora_B.requires_grad):
            raise RuntimeError(
                "training a merged layer: A and B would get no gradient, because their product already lies in the "
                "weight. Call unmerge() first (or eval() if you only want to evaluate)"
            )
        if self._versions() != self._merged_versions:
            raise RuntimeError(
                "lora_A, lora_B or the weight was edited while merged, so the merged weight no longer says W0 + ΔW. "
                "Call unmerge() before editing, merge() afterwards"
            )
        return self.base_layer(x)

    @torch.no_grad()
    def merge(self) -> float:
        """Write W0 + ΔW into the base weight, keep W0 aside (one copy in memory), and say what rounding cost.

        Returns the share of ΔW that the weight's dtype swallowed, ‖(W_merged - W0) - ΔW‖ / ‖ΔW‖ in Frobenius norms:
        about 1e-5 in float32, easily 0.3 in bfloat16, when ‖ΔW‖ is 0.5 % of ‖W0‖. Merging a merged layer changes
        nothing and returns the same number.
        """
        if not self.merged:
            weight = self.base_layer.weight
            merged, self.swallowed = self._merged_weight()
            self._unmerged_weight = weight.detach().clone()
            weight.copy_(merged)
            self._merged_versions = self._versions()
        return self.swallowed

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W0 back, bit for bit. Does nothing on a layer that is not merged.

        Raises RuntimeError if the weight was edited meanwhile: putting W0 back would lose that edit without a word.
        """
        if not self.merged:
            return
        if self._versions()[2] != self._merged_versions[2]:
            raise RuntimeError(
                "the weight was edited while merged; unmerge() would throw that edit away. "
                "merge_and_unload(model) keeps it and drops the adapter"
            )
        self.base_layer.weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None

    def _merged_weight(self) -> tuple[Tensor, float]:
        """W0 + ΔW in the weight's dtype, added in float32 or better, and the share of ΔW that rounding swallowed."""
        weight = self.base_layer.weight
        exact = torch.promote_types(torch.promote_types(weight.dtype, self.lora_A.dtype), torch.float32)
        delta = self.to_base_layout(self.scaling * (self.lora_B.to(exact) @ self.lora_A.to(exact)))
        merged = (weight.to(exact) + delta).to(weight.dtype)
        norm = torch.linalg.vector_norm(delta).item()
        lost = torch.linalg.vector_norm(merged.to(exact) - weight.to(exact) - delta).item()
        return merged, lost / norm if norm > 0 else 0.0

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """torch counts in-place edits of a tensor; equal counts mean that nobody wrote to it."""
        # With the tensor's identity: a parameter that was replaced may have the same count.
        return tuple((id(t), t._version) for t in (self.lora_A, self.lora_B, self.base_layer.weight))

    def _refuse_while_merged(self, what: str) -> None:
        if getattr(self, "_unmerged_weight", None) is not None:
            raise RuntimeError(f"{what} while merged would have no effect on the merged weight; call unmerge() first")

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """As for any module, but a merged layer saves W0: loading W0 + ΔW next to A and B would count ΔW twice."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.merged:
            # torch calls this with destination and prefix, by position or by name, for a layer inside a model.
            prefix = args[1] if len(args) > 1 else prefix
            state[prefix + "base_layer.weight"] = self._unmerged_weight
        return state

    def _load_from_state_dict(self, *args, **kwargs):
        self.unmerge()  # files hold W0, A and B; a layer that is being loaded takes them as they are
        super()._load_from_state_dict(*args, **kwargs)

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.merged:  # a copy's tensors count their edits afresh
            self._merged_versions = self._versions()

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

    def __init__(self, base_layer: nn.Linear, r: int, alpha: float, dropout=0.0, rslora=False, adapter_dtype=None):
        if not isinstance(base_layer, nn.Linear) and not isinstance(base_layer, LoRALayer):
            raise TypeError(f"LoRALinear adapts an nn.Linear; found {type(base_layer).__name__}")
        super().__init__(
            base_layer, base_layer.in_features, base_layer.out_features, r, alpha, dropout, rslora, adapter_dtype
        )

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        x, A, B = self.lora_dropout(x), self.lora_A, self.lora_B
        if A.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            # Factors in another precision than the base: compute the update in theirs, round once at the end.
            return y + (self.scaling * F.linear(F.linear(x.to(A.dtype), A), B)).to(y.dtype)
        h = F.linear(x, A)  # (..., r)
        # One call that scales, multiplies and adds: one (tokens, out) tensor is made instead of three.
        update = h.reshape(-1, self.r), B.t()
        return torch.addmm(y.reshape(-1, self.out_features), *update, alpha=self.scaling).view(y.shape)


def _be_called(module, inputs):
    """A hook that does nothing."""


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
