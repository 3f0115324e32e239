"""Figures of lab 12: the race of the variants, how each was tuned, how a larger budget changes it, and ranks that were chosen automatically."""

from collections.abc import Mapping

import numpy as np

from lora_lab.view.figures import _few_ticks, _label_lines, _styled
from lora_lab.view.style import COLOURS, DASHES, INK, MARKERS, MUTED, new_figure

# What was decided -> colour and mark.
BETTER, WORSE, OPEN = (COLOURS[2], "^"), (COLOURS[1], "v"), (MUTED, "o")


@_styled
def plot_race(found, *, title: str = "", width: float = 9.6):
    """Everybody minus LoRA, in points: on the left all at LoRA's learning rate, on the right each at its own.

    found  a `lora_lab.zoo.race.Race`. A dot for each seed, the mean with its 95 % interval and its value; upward and downward triangles where Holm's
           correction leaves a difference. The grey band is as wide as the intervals of the twins, which are LoRA under other names. What is far
           outside stands at the edge, as an arrow with its value
    """
    own = {d.name: d for d in found.differences()}
    names = [*found.twins, *sorted(found.variants, key=lambda name: -own[name].mean)]
    spread = [100 * v for name in names for v in _minus(found, name, True)]
    low, high = min([*spread, -1.0]) - 0.6, max([*spread, 1.0]) + 0.6
    figure = new_figure(width, 1.25 + 0.29 * len(names))
    figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    legend = "dots: seeds · bars: 95 %, each asked alone · grey: the twins' bars · triangles: decided after Holm"
    figure.text(0.992, 0.982, legend, ha="right", va="top", color=MUTED, fontsize="small")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    heads = (f"all at LoRA's rate, {found.chosen['LoRA']:.2g}", "each at its own best rate")
    for axes, fair, head in zip(panels, (False, True), heads, strict=True):
        if found.luck(fair):
            left, right = (100 * v for v in found.luck(fair))
            axes.axvspan(left, right, color=MUTED, alpha=0.16, linewidth=0, zorder=0)
            axes.annotate("luck", (max(left, low), -0.62), (4, 0), textcoords="offset points", va="center", color=MUTED, fontsize="small")
        axes.axvline(0, color=MUTED, linewidth=1.2, zorder=1)
        for d in found.differences(fair):
            row, middle, half = names.index(d.name), 100 * d.mean, 100 * d.half
            colour, marker = OPEN if not d.decided else BETTER if d.mean > 0 else WORSE
            text = f"{middle:+.1f}".replace("-", "−") if abs(middle) >= 0.05 else "0.0"
            if middle < low or middle > high:
                edge, way = (low, -1) if middle < low else (high, 1)
                axes.annotate("", (edge, row), (edge - way * 0.09 * (high - low), row), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2.0})
                axes.annotate(text, (edge - way * 0.09 * (high - low), row), (-4 * way, 0), textcoords="offset points", ha="left" if way < 0 else "right",
                              va="center", color=INK, fontsize="small", fontweight="bold")  # fmt: skip
                continue
            seeds = np.array([100 * v for v in _minus(found, d.name, fair)])
            seen = seeds[(seeds > low) & (seeds < high)]
            axes.plot(seen, [row] * len(seen), "o", color=colour, markersize=4, alpha=0.45, markeredgewidth=0, linestyle="", zorder=2)
            axes.plot([max(low, middle - half), min(high, middle + half)], [row, row], "-", color=colour, linewidth=2.0, zorder=3)
            axes.plot(middle, row, marker, color=colour, markersize=8, zorder=4)
            axes.annotate(text, (1.0, row), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points", ha="left", va="center", color=INK,
                          fontsize="small", fontweight="bold" if d.decided else "normal")  # fmt: skip
        axes.set_title(head, fontsize="medium")
        axes.set_xlim(low, high)
        axes.set_ylim(len(names) - 0.4, -0.95)
        axes.set_xlabel("test accuracy minus LoRA's, points")
        axes.xaxis.set_major_locator(_few_ticks())
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(names)), [f"LoRA, {name}" if name in found.twins else name for name in names])
    panels[0].tick_params(axis="y", labelcolor=INK, length=0)
    return figure


def _minus(found, name: str, fair: bool) -> list[float]:
    return [a - b for a, b in zip(found.scores(name, fair), found.scores("LoRA", fair), strict=True)]


@_styled
def plot_rate_curves(found, *, title: str = "", columns: int = 4, width: float = 9.6):
    """Validation accuracy over the learning rate, a small chart for each entrant; LoRA's curve stands in grey behind each, the chosen rate is ringed.

    found  a `lora_lab.zoo.race.Race`. The twins share LoRA's chart: how far their curves part is what a choice of rate hangs on besides the method.
           A rate at the edge of what was tried is called "edge!"
    """
    names = ["LoRA", *found.variants]
    rows = -(-len(names) // columns)
    figure = new_figure(width, 0.55 + 1.55 * rows)
    figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(names) :]:
        axes.set_visible(False)
    lora = found.curve("LoRA")
    lowest = 1.0
    for axes, name in zip(grid.ravel(), names, strict=False):
        for other in found.twins if name == "LoRA" else ["LoRA"]:
            curve = found.curve(other)
            axes.plot(list(curve), list(curve.values()), color=MUTED, linestyle=DASHES[1], linewidth=1.3, zorder=2)
        curve = found.curve(name)
        axes.plot(list(curve), list(curve.values()), color=COLOURS[0], linestyle="-", marker="o", markersize=4, zorder=3)
        best = found.chosen[name]
        axes.plot(best, curve[best], "o", markersize=10, markerfacecolor="none", markeredgecolor=COLOURS[1], markeredgewidth=2.0, zorder=4)
        axes.set_title(name + (" and its twins" if name == "LoRA" and found.twins else ""), fontsize="medium", pad=4)
        words = f"lr {best:.2g}" + (" edge!" if name in found.edges else "")
        axes.set_title(words, loc="right", fontsize="small", fontweight="normal", pad=4)
        lowest = min(lowest, curve[best])
    best = max(max(found.curve(name).values()) for name in names)
    bottom = min(lowest, *(v for v in lora.values())) if min(lora.values()) > best - 0.2 else min(lowest, best - 0.1) - 0.05
    axes = grid[0, 0]
    axes.set_xscale("log")
    axes.set_ylim(bottom - 0.01, best + 0.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_locator(_few_ticks())
    figure.supxlabel("learning rate", fontsize="medium", color=INK)
    figure.supylabel("validation accuracy", fontsize="medium", color=INK)
    return figure


@_styled
def plot_budgets(races: Mapping[float, object], *, title: str = "", xlabel: str = "LoRA's r at the same budget", width: float = 7.2, height: float = 3.8):
    """How a race changes with its budget, or with its steps: test accuracy of each entrant, mean and standard deviation over seeds.

    races  position on the (logarithmic) axis -> a `lora_lab.zoo.race.Race`; all with the same entrants. Twins are left out
    """
    if len(races) < 2:
        raise ValueError(f"plot_budgets needs two races at least, {{budget: race}}; found {len(races)}")
    first = next(iter(races.values()))
    names = ["LoRA", *first.variants]
    places = sorted(races)
    figure = new_figure(width, height)
    axes = figure.subplots()
    axes.set_xscale("log")
    starts, ends = [], []
    for k, name in enumerate(names):
        scores = [races[place].scores(name) for place in places]
        means, deviations = np.array([np.mean(s) for s in scores]), np.array([np.std(s, ddof=1) for s in scores])
        colour = COLOURS[k % len(COLOURS)]
        shifted = np.array(places) * 1.02 ** (k - len(names) / 2)  # bars at one place would hide each other
        axes.vlines(shifted, means - deviations, means + deviations, color=colour, linewidth=1.4, alpha=0.6)
        axes.plot(shifted, means, color=colour, linestyle=DASHES[k % len(DASHES)], marker=MARKERS[k % len(MARKERS)], zorder=3)
        starts.append((float(means[0]), name))
        ends.append((float(means[-1]), name))
    axes.set(title=title, xlabel=xlabel, ylabel="test accuracy")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.yaxis.set_major_locator(_few_ticks())
    spans = [max(side)[0] - min(side)[0] for side in (starts, ends)]
    if spans[0] > spans[1]:  # names stand where the lines are apart
        axes.set_xlim(places[0] / 1.25 ** (1 + 0.35 * max(map(len, names))), None)
    figure.draw_without_rendering()  # where names have to make room for each other depends on the final height of the axes
    place, lines, gap, side = (places[0], starts, -12, "right") if spans[0] > spans[1] else (places[-1], ends, 12, "left")
    _label_lines(figure, axes, place, lines, gap=gap, ha=side, va="center", color=INK, annotation_clip=False)
    return figure


@_styled
def plot_rank_choice(found, *, title: str = "", width: float = 9.6):
    """Ranks that were chosen automatically: on the left the mean rank of each layer, on the right test accuracy, a dot for each seed.

    found  a `lora_lab.zoo.ranks.Choices`. Beside each way stand its numbers and the training steps that were paid, means over seeds
    """
    layers = list(found.ranks(found.ways[0]))
    figure = new_figure(width, 1.3 + 0.42 * len(found.ways))
    figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    left, right = figure.subplots(1, 2, sharey=True)
    for row, way in enumerate(found.ways):
        start = 0.0
        for k, ranks in enumerate(found.ranks(way).values()):
            rank = float(np.mean(ranks))
            left.barh(row, rank, left=start, height=0.62, color=COLOURS[k % len(COLOURS)], alpha=0.42, linewidth=0)
            if rank >= 0.5:
                left.text(start + rank / 2, row, f"{rank:.2g}", ha="center", va="center", color=INK, fontsize="small")
            if row == 0:
                left.annotate(layers[k], (start + rank / 2, -0.36), (0, 4), textcoords="offset points", ha="center", va="bottom", color=INK, fontsize="small")
            start += rank
        words = f"{np.mean(found.of(way, 'trained')):,.0f} numbers, {np.mean(found.of(way, 'paid')):,.0f} steps"
        left.annotate(words, (start, row), (6, 0), textcoords="offset points", va="center", color=MUTED, fontsize="small")
        scores = [100 * v for v in found.of(way)]
        right.plot(scores, [row] * len(scores), "o", color=COLOURS[0], markersize=5, alpha=0.5, markeredgewidth=0, linestyle="", zorder=3)
        right.plot([np.mean(scores)] * 2, [row - 0.3, row + 0.3], "-", color=COLOURS[0], linewidth=3.0, zorder=4)
        right.annotate(f"{np.mean(scores):.1f}", (1.0, row), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", color=INK,
                       fontsize="small", fontweight="bold")  # fmt: skip
    right.axvline(100 * np.mean(found.of("everywhere")), color=MUTED, linewidth=1.2, linestyle=DASHES[2], zorder=1)
    left.set_yticks(range(len(found.ways)), [f"r = {found.rank} {way}" if way.startswith("everywhere") else way for way in found.ways])
    left.set_ylim(len(found.ways) - 0.5, -0.95)
    left.tick_params(axis="y", labelcolor=INK, length=0)
    left.set_xlim(0, 1.75 * max(sum(np.mean(r) for r in found.ranks(way).values()) for way in found.ways))
    left.set_xlabel("mean rank of each layer, side by side")
    right.set_xlabel("test accuracy, %")
    for axes in (left, right):
        axes.grid(axes is right, axis="x")
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(_few_ticks())
    return figure
