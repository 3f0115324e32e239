"""The ward of the clinic: every patient's loss curve beside that of its healthy twin."""

from collections.abc import Mapping, Sequence

import numpy as np

from lora_lab.view.figures import _styled
from lora_lab.view.style import COLOURS, INK, MUTED, new_figure


@_styled
def plot_ward(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str = "", columns: int = 5, width: float = 8.6, height: float = 1.5):
    """One small chart per bed: the loss of the broken adapter, in the first colour, over that of its healthy twin, dashed and grey.

    curves  bed -> (loss of each step, loss of each step of the twin). A curve that stops being a number ends with a cross
    Each chart has its own axes from 0 to a little above the larger start, since models and tasks differ; only shapes are compared.
    """
    if not curves or any(not len(own) or not len(twin) for own, twin in curves.values()):
        raise ValueError("plot_ward needs at least one bed, {bed: (losses, losses of the twin)}, with at least one step each")
    rows = -(-len(curves) // columns)
    figure = new_figure(width, rows * height + (0.75 if title else 0.4))
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    for axes, (bed, (own, twin)) in zip(grid, curves.items(), strict=False):
        axes.plot(range(1, len(twin) + 1), _smooth(twin), color=MUTED, linestyle=(0, (4, 1.5)), linewidth=1.4, zorder=2, label="healthy twin")
        losses = _smooth(own)
        there = np.isfinite(losses)
        steps = np.arange(1, len(losses) + 1)
        axes.plot(steps[there], losses[there], color=COLOURS[0], linewidth=1.9, zorder=3, label="broken")
        if not there.all() and there.any():
            axes.plot(steps[there][-1], losses[there][-1], "x", color=COLOURS[0], markersize=8, zorder=4)
        finite = [v for v in (*losses[there], *_smooth(twin)) if np.isfinite(v)]
        axes.set(ylim=(0, 1.08 * max(finite)), xlim=(1, max(len(own), len(twin))))
        axes.set_title(bed, fontsize="medium", pad=3)
        axes.set_xticks([1, max(len(own), len(twin))])
        axes.set_yticks([0, float(f"{max(finite):.2g}")])
        axes.tick_params(labelsize=7, length=2)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="lower right", frameon=False, labelcolor=INK)
    figure.supxlabel("step", fontsize="small", color=INK)
    figure.supylabel("loss", fontsize="small", color=INK)
    return figure


def _smooth(losses: Sequence[float], window: int = 5) -> np.ndarray:
    """Mean over the steps up to here, five at most: a batch's own luck would hide the shape."""
    values = np.asarray(losses, dtype=float)
    return np.array([values[max(0, k - window + 1) : k + 1].mean() for k in range(len(values))])
