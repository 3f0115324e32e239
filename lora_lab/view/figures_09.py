"""Figures of lab 09: where each rival sits in a block, and what quality costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_lab.view.figures import _styled
from lora_lab.view.style import COLOURS, GRID, INK, MUTED, PAPER, new_figure

# Which of the three questions a method answers -> its colour and the shape of its mark.
SIZES = {"o": 14, "s": 14, "D": 12}  # a diamond of the same size is wider
GROUPS = {"adaptation": (COLOURS[0], "o"), "LoRA": (COLOURS[1], "s"), "compression": (COLOURS[2], "D")}


@_styled
def plot_sites(*, title: str = "One block, and where each rival sits in it", width: float = 8.6):
    """A transformer's block from left to right, its frozen layers as boxes, and what each way trains at its place."""
    from matplotlib.patches import FancyBboxPatch

    high = 3.5
    figure = new_figure(width, high)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 8.6), ylim=(0, high), xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.patch.set_visible(False)
    axes.text(0.15, high - 0.2, title, va="top", fontweight="bold", fontsize="large", color=INK)

    def box(x, y, w, h, text, colour=MUTED, line=1.0, **more):
        axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06", fill=False, edgecolor=colour, linewidth=line, **more))
        axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=INK, fontsize="small")

    def arrow(x0, x1, y=1.75):
        axes.annotate("", (x1, y), (x0, y), arrowprops={"arrowstyle": "-|>", "color": MUTED, "linewidth": 1.0})

    def note(x, y, text, to, colour):
        axes.annotate(text, to, (x, y), ha="center", va="center", fontsize="small", color=INK,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.4, "shrinkA": 2, "shrinkB": 1})  # fmt: skip

    blue, rust = COLOURS[0], COLOURS[1]
    box(0.95, 1.5, 0.85, 0.5, "tokens")
    box(0.15, 1.5, 0.62, 0.5, "prompt", blue, 2.2)
    box(2.2, 1.5, 0.62, 0.5, "prefix", blue, 2.2)
    arrow(1.8, 2.2)
    arrow(2.82, 3.15)
    for k, name in enumerate("vkq"):
        box(3.2, 1.0 + 0.52 * k, 0.5, 0.42, name)
    for k in (0, 2):
        box(3.2 + 0.56, 1.0 + 0.52 * k, 0.5, 0.42, "B A", rust, 2.2)
    arrow(4.3, 4.55)
    box(4.55, 1.5, 0.6, 0.5, "out")
    box(5.23, 1.5, 0.75, 0.5, "adapter", blue, 2.2)
    arrow(5.98, 6.3)
    box(6.3, 1.5, 0.5, 0.5, "up")
    arrow(6.8, 7.0)
    box(7.0, 1.5, 0.6, 0.5, "down")
    box(7.68, 1.5, 0.75, 0.5, "adapter", blue, 2.2)
    axes.plot([2.0, 8.5, 8.5, 2.0, 2.0], [0.85, 0.85, 2.65, 2.65, 0.85], color=GRID, linewidth=1.2, linestyle=(0, (3, 2)), zorder=0)
    axes.text(8.42, 2.57, "one block of many", ha="right", va="top", fontsize="small", color=MUTED)
    note(0.75, 2.75, "trained tokens,\nonce", (0.46, 2.0), blue)
    note(2.5, 2.4, "in every block", (2.5, 2.0), blue)
    note(4.0, 0.45, "LoRA: beside the weight, can be merged", (4.0, 1.0), rust)
    note(6.75, 0.45, "behind the layer, stays in the way", (5.6, 1.5), blue)
    axes.annotate("", (8.0, 1.5), (6.75, 0.55), arrowprops={"arrowstyle": "-", "color": blue, "linewidth": 1.4})
    axes.text(0.15, 0.12, "Grey boxes are frozen. BitFit trains the bias of every grey box; last layers, the last blocks; full fine-tuning, all of it.",
              fontsize="small", color=MUTED)  # fmt: skip
    return figure


@_styled
def plot_tradeoffs(
    points: Mapping[str, Mapping[str, float]], *, quality: tuple[str, str], costs: Mapping[str, str], groups: Mapping[str, str], better: str = "up",
    linear: Sequence[str] = (), title: str = "", width: float = 9.2,
):  # fmt: skip
    """Quality against several costs, a panel for each, every method a numbered mark; the key beside them names the numbers.

    points   method -> its numbers; a method without a cost (missing, or 0 on a logarithmic axis) stands at the panel's left edge, hollow
    quality  key and label of what is upwards           costs  key -> label of an axis, logarithmic unless it is in `linear`
    groups   method -> one of `GROUPS`                  better "up" or "down": which way quality is better; the axis is turned for "down"

    Raises ValueError for a method without quality or with an unknown group.
    """
    key, label = quality
    wrong = [name for name, found in points.items() if key not in found or groups.get(name) not in GROUPS]
    if wrong or not points or better not in ("up", "down"):
        raise ValueError(f"plot_tradeoffs needs {key!r} and a group ({', '.join(GROUPS)}) of each method; missing for {', '.join(wrong) or 'all'}")
    names = sorted(points, key=lambda name: points[name][key], reverse=better == "up")
    figure = new_figure(width, max(3.4, 0.9 + 0.24 * len(names)))
    grid = figure.add_gridspec(1, len(costs) + 1, width_ratios=[*([1.0] * len(costs)), 0.75])
    figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    panels = []
    for k, (cost, words) in enumerate(costs.items()):
        axes = figure.add_subplot(grid[k], sharey=panels[0] if panels else None)
        panels.append(axes)
        known = [float(found[cost]) for found in points.values() if found.get(cost, 0) > 0]
        if cost in linear:
            low, high = min(known), max(known)
            axes.set_xlim(low - 0.12 * (high - low or low), high + 0.12 * (high - low or low))
        else:
            axes.set_xscale("log")
            axes.set_xlim(min(known) / 4, max(known) * 3)
        axes.set_xlabel(words)
        axes.grid(True, axis="both")
        if k:
            axes.tick_params(labelleft=False)
    values = [float(found[key]) for found in points.values()]
    room = 0.09 * ((max(values) - min(values)) or 1.0)
    panels[0].set_ylim(*((min(values) - room, max(values) + room) if better == "up" else (max(values) + room, min(values) - room)))
    panels[0].set_ylabel(label)
    panels[0].tick_params(axis="y", pad=11)  # a way that costs nothing sits on the axis, and its marker would cover the numbers
    figure.draw_without_rendering()
    for axes, cost in zip(panels, costs, strict=True):
        taken: list[tuple[float, float]] = []
        for number, name in enumerate(names, 1):
            colour, marker = GROUPS[groups[name]]
            there = points[name].get(cost, 0) > 0
            x, y = axes.transData.transform((points[name][cost] if there else axes.get_xlim()[0], points[name][key]))
            at = _free(x, y, taken, 15 * figure.dpi / 72)
            taken.append(at)
            left, up = axes.transAxes.inverted().transform(at)
            true = axes.transAxes.inverted().transform((x, y))
            if at != (x, y):
                axes.plot([true[0], left], [true[1], up], color=colour, linewidth=1.0, linestyle="-", transform=axes.transAxes, clip_on=False, zorder=2)
                axes.plot(*true, ".", color=colour, markersize=4, transform=axes.transAxes, clip_on=False, zorder=2)
            axes.plot(left, up, marker, markersize=SIZES[marker], markerfacecolor=PAPER, markeredgecolor=colour, markeredgewidth=1.8 if there else 0.8,
                      transform=axes.transAxes, clip_on=False, zorder=3)  # fmt: skip
            axes.text(left, up, str(number), ha="center", va="center", fontsize=7.5, color=INK, transform=axes.transAxes, zorder=4)
    names_at = figure.add_subplot(grid[len(costs)])
    names_at.set(xlim=(0, 1), ylim=(len(names) - 0.3, -1.0), xticks=[], yticks=[])
    names_at.spines[:].set_visible(False)
    names_at.grid(False)
    for number, name in enumerate(names, 1):
        colour, marker = GROUPS[groups[name]]
        names_at.plot(0.02, number - 1, marker, markersize=12, markerfacecolor=PAPER, markeredgecolor=colour, markeredgewidth=1.8, clip_on=False)
        names_at.text(0.02, number - 1, str(number), ha="center", va="center", fontsize=7.5, color=INK)
        names_at.text(0.14, number - 1, name, va="center", fontsize="small", color=INK)
    return figure


def _free(x: float, y: float, taken: list[tuple[float, float]], gap: float) -> tuple[float, float]:
    """(x, y) in pixels, or the nearest place beside it where a mark has room."""
    ways = ((1, 0), (0.7, 0.8), (0.7, -0.8), (0, 1), (0, -1), (-0.7, 0.8), (-0.7, -0.8), (-1, 0))
    steps = [(0, 0), *((dx * k, dy * k) for k in (1, 2, 3) for dx, dy in ways)]
    for dx, dy in steps:
        place = (x + dx * gap, y + dy * gap)
        if all((place[0] - a) ** 2 + (place[1] - b) ** 2 >= (0.97 * gap) ** 2 for a, b in taken):
            return place
    return x, y


@_styled
def plot_latency(found: Mapping[str, Mapping[str, tuple[float, float, float]]], *, title: str = "", width: float = 9.0):
    """How much longer each method takes than the reference, in per cent: a dot at the median, a line from quartile to quartile, a panel each setting.

    found  setting -> method -> (median, low, high), ratios to the reference. Raises ValueError unless all settings have the same methods.
    """
    if not found or len({tuple(of) for of in found.values()}) != 1:
        raise ValueError("plot_latency needs the same methods in every setting; found " + str({name: list(of) for name, of in found.items()}))
    names = list(next(iter(found.values())))
    figure = new_figure(width, 1.1 + 0.3 * len(names))
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    for axes, (setting, of) in zip(panels, found.items(), strict=True):
        for row, name in enumerate(names):
            middle, low, high = (100 * (value - 1) for value in of[name])
            axes.plot([low, high], [row, row], color=COLOURS[0], linewidth=3.0, linestyle="-", solid_capstyle="round", alpha=0.45)
            axes.plot(middle, row, "o", color=COLOURS[0], markersize=6)
            axes.annotate(f"{middle:+.0f}", (max(middle, high), row), (6, 0), textcoords="offset points", va="center", fontsize="small", color=INK)
        axes.axvline(0, color=MUTED, linewidth=1.0)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.margins(x=0.22)
        axes.set_title(setting, fontsize="medium")
        axes.set_xlabel("% longer")
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
    return figure
