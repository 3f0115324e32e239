"""Figures of lab 08d: shares in a table, such as every adapter on every task."""

from collections.abc import Sequence

import numpy as np

from lora_lab.view.figures import _square, _styled
from lora_lab.view.style import COLOURS, GRID, INK, new_figure


@_styled
def plot_shares(
    table, rows: Sequence[str], columns: Sequence[str], *, title: str = "", xlabel: str = "", ylabel: str = "",
    cell: tuple[float, float] = (0.62, 0.38),
):  # fmt: skip
    """A table of shares (rows, columns), 0 to 1, as percentages; the higher, the bluer; the best of each column is bold.

    rows, columns  their names; long ones stand at an angle above
    cell           width and height in inches
    """
    table = np.asarray(table, dtype=float)
    if table.shape != (len(rows), len(columns)) or table.size == 0:
        raise ValueError(f"plot_shares needs a table of {len(rows)} rows and {len(columns)} columns, at least one of each; found shape {table.shape}")
    if not ((table >= 0) & (table <= 1)).all():
        raise ValueError(f"plot_shares needs shares, 0 to 1; found {table.min():.3g} to {table.max():.3g}")
    longest = max(map(len, columns))
    figure = new_figure(len(columns) * cell[0] + 0.3 + 0.09 * max(map(len, rows)), len(rows) * cell[1] + 0.75 + min(0.055 * longest, 1.0))
    axes = figure.subplots()
    for r in range(len(rows)):
        for c in range(len(columns)):
            best = table[r, c] == table[:, c].max() and len(rows) > 1
            axes.add_patch(_square(c, r, COLOURS[0], 0.6 * float(table[r, c])))
            axes.text(c, r, f"{100 * table[r, c]:.0f}", ha="center", va="center", color=INK, fontweight="bold" if best else "normal")
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel=xlabel, ylabel=ylabel)
    figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    wide = cell[0] > 0.085 * longest  # inches that the longest name needs
    axes.set_xticks(range(len(columns)), list(columns), rotation=0 if wide else 30, ha="center" if wide else "left", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("bottom")
    axes.tick_params(length=0, labelcolor=INK)
    axes.grid(False)
    axes.spines[:].set(visible=True, color=GRID)
    return figure
