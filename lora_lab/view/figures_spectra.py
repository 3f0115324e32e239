"""Figures of what updates look like: which directions two of them share, and how near each direction lies to an old one."""

from collections.abc import Mapping, Sequence

import numpy as np

from lora_lab.view.figures import _sequential, _styled
from lora_lab.view.style import COLOURS, INK, MUTED, new_figure


@_styled
def plot_subspaces(
    maps: Mapping[str, Sequence], d: int | None = None, *, title: str = "", xlabel: str = "j", ylabel: str = "i", columns: int = 2,
    width: float = 8.2, cell: float = 0.15,
):  # fmt: skip
    """phi(i, j) as heat maps on one scale from 0 (white) to 1 (dark), the last of them what chance alone would show.

    maps  title -> phi, (i, j), with phi(1, 1) in the corner above at the left; all of one shape
    d     the dimension of the space: adds a panel of max(i, j) / d, the mean over independent random subspaces. None: no such panel
    """
    tables = {name: np.asarray(values, dtype=float) for name, values in maps.items()}
    shapes = {table.shape for table in tables.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        found = {name: table.shape for name, table in tables.items()}
        raise ValueError(f"plot_subspaces needs tables of phi of one shape (i, j); found {found or 'none'}")
    rows, wide = next(iter(shapes))
    if d is not None:
        if d < max(rows, wide):
            raise ValueError(f"plot_subspaces: subspaces of up to {max(rows, wide)} directions do not fit into d = {d}")
        i, j = np.ogrid[1 : rows + 1, 1 : wide + 1]
        tables[f"by chance: max(i, j) / {d}"] = np.maximum(i, j) / d
    columns = min(columns, len(tables))
    down = -(-len(tables) // columns)
    figure = new_figure(width, down * (cell * rows + 0.62) + 0.95)
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    grid = figure.subplots(down, columns, sharex=True, sharey=True, squeeze=False).ravel()
    heat = None
    for axes, (name, table) in zip(grid, tables.items(), strict=False):
        extent = (0.5, wide + 0.5, rows + 0.5, 0.5)
        heat = axes.imshow(table, cmap=_sequential(), vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
        axes.set_title(name, fontsize="medium")
        axes.set_xticks(sorted({1, *range(wide // 4, wide + 1, max(wide // 4, 1))}))
        axes.set_yticks(sorted({1, rows}))
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set(visible=True, color=MUTED, linewidth=0.8)
    for axes in grid[len(tables) :]:
        axes.set_visible(False)
    for place, axes in enumerate(grid[: len(tables)]):
        axes.set_xlabel(xlabel if place + columns >= len(tables) else "")
        axes.set_ylabel(ylabel if place % columns == 0 else "", rotation=0, labelpad=8, va="center")
    scale = figure.colorbar(heat, ax=grid.tolist(), shrink=0.8, aspect=18, pad=0.02, ticks=[0, 0.5, 1], label="φ")
    scale.outline.set(edgecolor=MUTED, linewidth=0.8)
    scale.ax.grid(False)
    return figure


@_styled
def plot_similarities(
    groups: Mapping[str, Sequence[float]], threshold: float, *, title: str = "", xlabel: str = "largest |cos| with a direction of W0",
    below: str = "intruders", width: float = 7.4,
):  # fmt: skip
    """One row per group, a dot for each number from 0 to 1; how many lie below the threshold is counted at the right.

    groups     name -> numbers between 0 and 1, one for each direction looked at
    threshold  drawn as a line; dots to the left of it have another colour and shape
    """
    if not groups or any(len(values) == 0 for values in groups.values()):
        empty = [name for name, values in groups.items() if len(values) == 0]
        raise ValueError(f"plot_similarities needs at least one number in each group; found none in {', '.join(empty) or 'any'}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"plot_similarities: the threshold is a |cos|, 0 to 1; found {threshold}")
    figure = new_figure(width, 1.25 + 0.36 * len(groups))
    axes = figure.subplots()
    axes.axvline(threshold, color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    for row, values in enumerate(groups.values()):
        values = np.asarray(values, dtype=float)
        # Spread over the height of the row in a fixed order, so that equal numbers can be told apart.
        height = row + 0.44 * ((np.arange(len(values)) * 0.618034) % 1 - 0.5)
        for side, colour, marker in ((values >= threshold, COLOURS[0], "o"), (values < threshold, COLOURS[1], "D")):
            axes.plot(values[side], height[side], marker, color=colour, markersize=4, alpha=0.65, markeredgewidth=0, linestyle="", zorder=3)
        count = int((values < threshold).sum())
        axes.annotate(f"{count} of {len(values)}", (1, row), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", color=INK, fontweight="bold" if count else "normal")  # fmt: skip
    axes.annotate(below, (1, 1), (8, 4), xycoords="axes fraction", textcoords="offset points", va="bottom", color=MUTED, fontsize="small")
    axes.annotate(f"ε = {threshold:g}", (threshold, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center",
                  va="bottom", color=MUTED, fontsize="small")  # fmt: skip
    axes.set_yticks(range(len(groups)), list(groups))
    axes.tick_params(axis="y", labelcolor=INK, pad=8)
    axes.set(xlim=(0, 1.02), ylim=(len(groups) - 0.5, -0.5), xlabel=xlabel)
    axes.set_title(title, pad=20)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    return figure
