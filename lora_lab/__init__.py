"""LoRA Lab: low-rank adaptation, small and exact.

    from lora_lab import LoRALinear, apply_lora, merge, unmerge

Importing this package needs torch and nothing heavier; what needs more imports it when it is called.
"""

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
from .counting import ParameterCount, breakeven_rank, count_parameters, lora_parameters
from .data import Batches, Split, digits
from .files import FetchError, atomic_write, fetch
from .layers import LoRALayer, LoRALinear
from .state import AdapterError, load_adapter, lora_state_dict, save_adapter
from .train import Step, TrainingDiverged, evaluate, train

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "Batches",
    "Coverage",
    "FetchError",
    "LoRALayer",
    "LoRALinear",
    "ParameterCount",
    "Split",
    "Step",
    "TrainingDiverged",
    "apply_lora",
    "atomic_write",
    "breakeven_rank",
    "count_parameters",
    "coverage",
    "digits",
    "evaluate",
    "fetch",
    "find_targets",
    "load_adapter",
    "lora_disabled",
    "lora_layers",
    "lora_parameters",
    "lora_state_dict",
    "merge",
    "merge_and_unload",
    "remove_lora",
    "save_adapter",
    "train",
    "unmerge",
]
