"""Figures, live views and the plotting style. matplotlib and ipywidgets are imported when the first of them is drawn, not here."""

from lora_lab.view.diff import plot_variants, show_diff
from lora_lab.view.explorer import plot_photographs, rank_explorer
from lora_lab.view.figures import (
    plot_confusion,
    plot_images,
    plot_losses,
    plot_maps,
    plot_matrices,
    plot_panels,
    plot_report,
    plot_spread,
    plot_staircase,
)
from lora_lab.view.figures_08c import plot_spectrograms, show_clips
from lora_lab.view.figures_08d import plot_shares
from lora_lab.view.figures_09 import plot_latency, plot_sites, plot_tradeoffs
from lora_lab.view.figures_10 import plot_ward
from lora_lab.view.figures_11 import plot_trial
from lora_lab.view.figures_12 import plot_budgets, plot_race, plot_rank_choice, plot_rate_curves
from lora_lab.view.figures_counting import plot_ledger, plot_steps
from lora_lab.view.figures_finetune import plot_scores, plot_tokens
from lora_lab.view.figures_gpt2 import plot_attention, plot_coverage, plot_fused, plot_heads
from lora_lab.view.figures_spectra import plot_similarities, plot_subspaces
from lora_lab.view.flight import flight_explorer
from lora_lab.view.ledger_explorer import ledger_explorer
from lora_lab.view.live_training import live_training
from lora_lab.view.style import save_png, show, style
from lora_lab.view.text_knob import text_knob
from lora_lab.view.widgets import volume_knob, volume_strip

__all__ = [
    "flight_explorer",
    "ledger_explorer",
    "live_training",
    "plot_attention",
    "plot_budgets",
    "plot_confusion",
    "plot_coverage",
    "plot_fused",
    "plot_heads",
    "plot_images",
    "plot_latency",
    "plot_ledger",
    "plot_losses",
    "plot_maps",
    "plot_matrices",
    "plot_panels",
    "plot_photographs",
    "plot_race",
    "plot_rank_choice",
    "plot_rate_curves",
    "plot_report",
    "plot_scores",
    "plot_shares",
    "plot_similarities",
    "plot_sites",
    "plot_spectrograms",
    "plot_spread",
    "plot_staircase",
    "plot_steps",
    "plot_subspaces",
    "plot_tokens",
    "plot_trial",
    "plot_ward",
    "plot_tradeoffs",
    "plot_variants",
    "rank_explorer",
    "save_png",
    "show",
    "show_clips",
    "show_diff",
    "style",
    "text_knob",
    "volume_knob",
    "volume_strip",
]
