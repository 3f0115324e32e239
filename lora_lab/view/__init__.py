"""Figures, live views and the plotting style. matplotlib and ipywidgets are imported when the first of them is drawn, not here."""

from lora_lab.view.explorer import plot_photographs, rank_explorer
from lora_lab.view.figures import (
    plot_confusion,
    plot_images,
    plot_losses,
    plot_maps,
    plot_matrices,
    plot_panels,
    plot_spread,
    plot_staircase,
)
from lora_lab.view.figures_finetune import plot_scores, plot_tokens
from lora_lab.view.flight import flight_explorer
from lora_lab.view.live_training import live_training
from lora_lab.view.style import save_png, show, style
from lora_lab.view.widgets import volume_knob, volume_strip

__all__ = [
    "flight_explorer",
    "live_training",
    "plot_confusion",
    "plot_images",
    "plot_losses",
    "plot_maps",
    "plot_matrices",
    "plot_panels",
    "plot_photographs",
    "plot_scores",
    "plot_spread",
    "plot_staircase",
    "plot_tokens",
    "rank_explorer",
    "save_png",
    "show",
    "style",
    "volume_knob",
    "volume_strip",
]
