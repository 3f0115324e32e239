"""What is wrong with an adapter: four probes, and `diagnose`, which runs them on a model of any make. See examination.py."""

from .examination import CAUSES, Diagnosis, Finding, diagnose
from .foreign import Adapter, adapter_coverage, adapters
from .probes import Gradients, Identity, Parity, gradient_report, reload_parity, step0_identity

__all__ = [
    "CAUSES",
    "Adapter",
    "Diagnosis",
    "Finding",
    "Gradients",
    "Identity",
    "Parity",
    "adapter_coverage",
    "adapters",
    "diagnose",
    "gradient_report",
    "reload_parity",
    "step0_identity",
]
