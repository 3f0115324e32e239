"""Merging: write W0 + ΔW into the base weight, and take it out again, without ever losing W0 or an edit in silence.

A layer that can be merged has base_layer, lora_A, lora_B, scaling, disabled, full_B() and to_base_layout(ΔW). Merging happens in
`merge` and `unmerge` and nowhere else: never in train(), eval() or forward(). W0 is kept aside while merged, because
(W0 + ΔW) - ΔW is not W0 in floating point; lab 02 counts the entries that change.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MergeableLayer(nn.Module):
    """The part of `LoRALayer` that knows the merged state."""

    def __init__(self):
        super().__init__()
        # A buffer, so that .to(device) moves it; not persistent, so that files never see it.
        self.register_buffer("_unmerged_weight", None, persistent=False)
        self.swallowed = 0.0

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    @property
    def base_weight(self) -> Tensor:
        """W0 as the base layer stores it, whether ΔW is merged into it or not."""
        return self._unmerged_weight if self.merged else self.base_layer.weight

    def forward_merged(self, x: Tensor) -> Tensor:
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
        nothing and returns the same number. While merged, in-place edits of A, B and the weight are noticed (torch
        counts them), edits through `.data` are not.
        """
        if not self.merged:
            weight = self.base_layer.weight
            merged, self.swallowed = self.merged_weight()
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

    def merged_weight(self) -> tuple[Tensor, float]:
        """W0 + ΔW in the weight's dtype, added in float32 or better, and the share of ΔW that rounding swallowed."""
        weight = self.base_layer.weight
        exact = torch.promote_types(torch.promote_types(weight.dtype, self.lora_A.dtype), torch.float32)
        delta = self.to_base_layout(self.delta_weight(exact))
        merged = (weight.to(exact) + delta).to(weight.dtype)
        norm = torch.linalg.vector_norm(delta).item()
        lost = torch.linalg.vector_norm(merged.to(exact) - weight.to(exact) - delta).item()
        return merged, lost / norm if norm > 0 else 0.0

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """torch counts in-place edits of a tensor; equal counts mean that nobody wrote to it."""
        # With the tensor's identity: a parameter that was replaced may have the same count.
        return tuple((id(t), t._version) for t in (self.lora_A, self.lora_B, self.base_layer.weight))

    def refuse_while_merged(self, what: str) -> None:
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
