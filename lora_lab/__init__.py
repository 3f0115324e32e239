"""LoRA Lab: low-rank adaptation, small and exact.

    from lora_lab import LoRALinear, apply_lora, merge, unmerge

Importing this package needs torch and nothing heavier; what needs more imports it when it is called.
"""

import importlib

from .adapt import (
    Coverage,
    apply_lora,
    coverage,
    find_targets,
    lora_disabled,
    lora_layers,
    merge,
    merge_and_unload,
    remove_lora,
    unmerge,
)
from .counting import ParameterCount, breakeven_rank, count_parameters, lora_parameters, lora_shape
from .data import Batches, Split, digits
from .files import FetchError, atomic_write, fetch
from .layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRAFusedLinear, LoRALayer, LoRALinear
from .sweep import sweep
from .train import Step, TrainingDiverged, evaluate, train

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "Batches",
    "Coverage",
    "FetchError",
    "LoRAConv1D",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRAFusedLinear",
    "LoRALayer",
    "LoRALinear",
    "ParameterCount",
    "Split",
    "Step",
    "TrainingDiverged",
    "adapter_coverage",
    "amplification",
    "amplifications",
    "apply_lora",
    "atomic_write",
    "best_rank_r",
    "breakeven_rank",
    "combine",
    "compare_subspaces",
    "compress",
    "count_parameters",
    "coverage",
    "diagnose",
    "digits",
    "effective_rank",
    "energy",
    "evaluate",
    "factored_svd",
    "factored_svdvals",
    "fetch",
    "find_targets",
    "finetune_and_compare",
    "gradient_report",
    "intruder_dimensions",
    "leading_svd",
    "load_adapter",
    "lora_disabled",
    "lora_layers",
    "lora_parameters",
    "lora_shape",
    "lora_state_dict",
    "merge",
    "merge_and_unload",
    "random_update",
    "reload_parity",
    "remove_lora",
    "report",
    "save_adapter",
    "step0_identity",
    "stable_rank",
    "subspace_similarity",
    "sweep",
    "train",
    "unmerge",
]

# Half of what `import lora_lab` would cost are these modules, and most notebooks save, measure and combine nothing.
_LATER = {
    "combining": ("combine", "compress"),
    "comparing": ("finetune_and_compare",),
    "diagnosis": ("adapter_coverage", "diagnose", "gradient_report", "reload_parity", "step0_identity"),
    "reports": ("amplifications", "compare_subspaces", "report"),
    "spectra": (
        "amplification",
        "best_rank_r",
        "effective_rank",
        "energy",
        "factored_svd",
        "factored_svdvals",
        "intruder_dimensions",
        "leading_svd",
        "random_update",
        "stable_rank",
        "subspace_similarity",
    ),
    "state": ("AdapterError", "load_adapter", "lora_state_dict", "save_adapter"),
}


def __getattr__(name: str):
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module 'lora_lab' has no attribute {name!r}")
