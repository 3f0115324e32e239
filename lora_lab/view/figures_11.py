"""Lab 11's figure: what an experiment measured, on which side of its line, with the other world beside it."""

from collections.abc import Mapping, Sequence

import numpy as np

from lora_lab.view.figures import _few_ticks, _styled
from lora_lab.view.style import COLOURS, GRID, INK, MUTED, new_figure


@_styled
def plot_trial(
    measured: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]] | None = None, *,
    line: float, holds: str, xlabel: str = "", title: str = "", width: float = 7.6,
):  # fmt: skip
    """One row for each condition, a dot for each seed, the mean beside it; the side of the line on which the claim would hold is shaded.

    measured  condition -> one number per seed; other: the same for the world in which the claim comes out the other way (hollow dots)
    holds     "above" or "below" the line

    Where the numbers span more than a hundred times the axis is logarithmic, with zero on it if there is a zero.
    """
    if holds not in ("above", "below"):
        raise ValueError(f'a claim holds "above" or "below" its line; found {holds!r}')
    rows = [(name, list(numbers), True) for name, numbers in measured.items()]
    rows += [(f"other world: {name}" if name not in measured else "other world", list(numbers), False) for name, numbers in (other or {}).items()]
    if not measured or any(not numbers for _, numbers, _ in rows):
        raise ValueError(f"plot_trial needs at least one number for each condition; found {dict(measured)}")
    figure = new_figure(width, 0.95 + 0.36 * len(rows) + 0.22 * title.count("\n"))
    axes = figure.subplots()
    values = np.array([value for _, numbers, _ in rows for value in numbers] + [line], dtype=float)
    sizes = np.abs(values[values != 0])
    if values.min() > 0 and values.max() > 100 * values.min():
        axes.set_xscale("log")
        axes.set_xlim(values.min() / 3, values.max() * 6)
    elif len(sizes) and (sizes.max() > 100 * sizes.min() and sizes.max() > 100 * np.median(sizes)):
        # What is smaller than a millionth of the largest is as good as zero here.
        least = max(float(np.abs(line)) or float(sizes.min()), float(sizes.max()) * 1e-6)
        axes.set_xscale("symlog", linthresh=least)
        axes.set_xlim(min(values.min() * 2, -least / 2 if values.min() <= least else 0), values.max() * 4)
    else:
        room = 0.16 * (values.max() - values.min() or abs(line) or 1.0)
        axes.set_xlim(values.min() - room, values.max() + 1.6 * room)
        axes.xaxis.set_major_locator(_few_ticks())
    low, high = axes.get_xlim()
    side = (line, high) if holds == "above" else (low, line)
    axes.axvspan(*side, color=MUTED, alpha=0.16, linewidth=0, zorder=0)
    axes.axvline(line, color=MUTED, linewidth=1.2, zorder=1)
    for row, (_, numbers, ours) in enumerate(rows):
        look = dict(color=COLOURS[0], markersize=7) if ours else dict(markerfacecolor="none", markeredgecolor=MUTED, markeredgewidth=1.6, markersize=7)
        axes.plot(numbers, [row] * len(numbers), "o" if ours else "D", linestyle="", zorder=3, clip_on=False, **look)
        mean = float(np.mean(numbers))
        axes.annotate(_short(mean), (max(numbers), row), (9, 0), textcoords="offset points", va="center", color=INK, fontsize="small",
                      fontweight="bold" if ours else "normal", zorder=4)  # fmt: skip
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.set_ylim(len(rows) - 0.45, -0.85)
    middle = side[0] if holds == "above" else side[1]
    axes.annotate("the claim would hold", (middle, -0.62), (4 if holds == "above" else -4, 0), textcoords="offset points",
                  ha="left" if holds == "above" else "right", va="center", color=MUTED, fontsize="small")  # fmt: skip
    axes.grid(True, axis="x", color=GRID)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set(xlabel=xlabel)
    if title:  # above the names of the rows, too: a claim is longer than the axis
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    return figure


def _short(value: float) -> str:
    if value == 0 or abs(value) < 1e-12:
        return f"{value:.0e}" if value else "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
