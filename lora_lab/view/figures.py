"""Figures that stand still. Each takes numbers that were computed elsewhere and returns a matplotlib figure for `show`.

Titles state the finding, so the caller writes them; labels stand at the lines, not in a box; axes carry units.
"""

import functools
import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from lora_lab.view.style import COLOURS, DASHES, GRID, INK, MARKERS, MUTED, PAPER, new_figure, style


def _styled(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with style():
            return function(*args, **kwargs)

    return wrapper


@_styled
def plot_losses(
    curves: Mapping[str, Sequence], floors: Mapping[str, float] | None = None, *,
    title: str = "", xlabel: str = "step", ylabel: str = "loss", log: bool = False, width: float = 7.0, height: float = 3.6,
):  # fmt: skip
    """Loss curves, labelled at their ends, with the floors they can reach at best as thin lines behind them.

    curves  name -> losses, one per step, or (steps, losses)
    floors  name -> loss; drawn in the colour of the curve of that name, in grey for any other name
    log     logarithmic loss axis
    """
    if not curves:
        raise ValueError("plot_losses needs at least one curve, {name: losses}; found none")
    figure = new_figure(width, height)
    axes = figure.subplots()
    starts, ends, colour_of, last = [], [], {}, 0
    drawn = {name: curve if isinstance(curve, tuple) else (range(len(curve)), curve) for name, curve in curves.items()}
    for i, (name, (steps, losses)) in enumerate(drawn.items()):
        colour = colour_of[name] = COLOURS[i % len(COLOURS)]
        axes.plot(steps, losses, color=colour, linestyle=DASHES[i % len(DASHES)], zorder=3)
        if any(np.array_equal(losses, later) for _, later in list(drawn.values())[i + 1 :]):
            # A later curve covers this one exactly: a wide band behind shows that both are there.
            axes.plot(steps, losses, color=colour, alpha=0.4, linewidth=8, solid_capstyle="round", zorder=2.5)
        axes.plot(steps[-1], losses[-1], MARKERS[i % len(MARKERS)], color=colour, zorder=4)
        ends.append((float(losses[-1]), name))
        last = max(last, float(steps[-1]))
    for name, floor in (floors or {}).items():
        colour = colour_of.get(name, MUTED)
        axes.axhline(floor, color=colour, linewidth=1, linestyle=(0, (2, 3)), zorder=2)
        starts.append((float(floor), f"floor, {name}" if len(floors) > 1 else "floor"))
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, *axes.get_ylim()))
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(_few_ticks(integer=True))
    if not log:
        axes.yaxis.set_major_locator(_few_ticks())
    _label_lines(figure, axes, last, ends, gap=10, ha="left", va="center", color=INK, annotation_clip=False)
    # Floors are named at the left, where the curves are still high above them.
    _label_lines(figure, axes, axes.get_xlim()[0], starts, gap=5, ha="left", va="bottom", color=MUTED, fontsize="small")
    return figure


def _few_ticks(integer: bool = False):
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=integer)


def _label_lines(figure, axes, x, lines, gap, **text) -> None:
    """Names beside lines, (height, name), at x; moved apart so that none covers another."""
    import matplotlib

    space = matplotlib.rcParams["font.size"] * 1.3
    below = -math.inf
    for height, name in sorted(lines):
        at = axes.transData.transform((x, height))[1] * 72 / figure.dpi  # points
        below = max(at, below + space)
        axes.annotate(name, (x, height), (gap, below - at), textcoords="offset points", **text)


@_styled
def plot_spread(
    groups: Mapping[str, Sequence[float]], *, title: str = "", xlabel: str = "", percent: bool = False,
    limits: tuple[float, float] | None = None, highlight: str | None = None, width: float = 7.0,
):  # fmt: skip
    """One row per method: every seed a dot, the mean a bar with its value, the line from the lowest seed to the highest.

    groups     method -> one number per seed
    percent    the numbers are shares, 0 to 1; show them as percentages
    highlight  the method that the figure is about, drawn in the first colour; None: all methods take their own colour
    """
    if not groups or any(len(values) == 0 for values in groups.values()):
        empty = [name for name, values in groups.items() if len(values) == 0]
        raise ValueError(f"plot_spread needs at least one value for each method; found none for {', '.join(empty) or 'any'}")
    figure = new_figure(width, 1.1 + 0.55 * len(groups))
    axes = figure.subplots()
    form = "{:.1%}".format if percent else "{:.3g}".format
    for row, (name, values) in enumerate(groups.items()):
        mean = float(np.mean(values))
        if highlight is None:
            colour, marker = COLOURS[row % len(COLOURS)], MARKERS[row % len(MARKERS)]
        else:
            colour, marker = (COLOURS[0], "o") if name == highlight else (MUTED, "o")
        axes.plot([min(values), max(values)], [row, row], "-", color=colour, linewidth=1.2, zorder=2, clip_on=False)
        axes.plot(values, [row] * len(values), marker, color=colour, alpha=0.9 if name == highlight else 0.55,
                  markeredgewidth=0, linestyle="", zorder=3, clip_on=False)  # fmt: skip
        axes.plot([mean, mean], [row - 0.26, row + 0.26], "-", color=colour, linewidth=3.2, solid_capstyle="round", zorder=4, clip_on=False)
        axes.annotate(form(mean), (mean, row - 0.26), (0, 3), textcoords="offset points", ha="center", va="bottom",
                      color=INK, fontweight="bold", fontsize="small")  # fmt: skip
    axes.set_yticks(range(len(groups)), list(groups))
    axes.tick_params(axis="y", labelcolor=INK, pad=8)
    axes.set_ylim(len(groups) - 0.5, -0.75)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    if limits:
        axes.set_xlim(*limits)
    axes.xaxis.set_major_locator(_few_ticks())
    if percent:
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    seeds = {len(values) for values in groups.values()}
    each = "one seed" if seeds == {1} else f"each dot one of {seeds.pop()} seeds; bar: mean" if len(seeds) == 1 else "each dot one seed; bar: mean"
    axes.set(title=title, xlabel=f"{xlabel} ({each})" if xlabel else each)
    return figure


@_styled
def plot_images(
    images: Sequence, labels: Sequence | None = None, predictions: Sequence | None = None, *,
    title: str = "", columns: int = 10, cell: float = 0.66,
):  # fmt: skip
    """A grid of grey images, light ink on dark, each scaled to its own range, with labels below.

    images       N arrays (rows, columns)
    labels       what each shows
    predictions  what a model said; where it differs from the label, the image is framed and says "5, said 3"
    """
    if len(images) == 0:
        raise ValueError("plot_images needs at least one image; found none")
    for name, given in (("labels", labels), ("predictions", predictions)):
        if given is not None and len(given) != len(images):
            raise ValueError(f"plot_images was given {len(images)} images, but {len(given)} {name}")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    above = 0.35 if title else 0.0
    below = 0.0 if labels is None and predictions is None else 0.24
    figure = new_figure(columns * cell, rows * (cell + below) + above)
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", color=INK)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for i, (axes, image) in enumerate(zip(grid, images, strict=False)):
        axes.imshow(np.asarray(image), cmap="gray", interpolation="nearest")
        wrong = labels is not None and predictions is not None and labels[i] != predictions[i]
        if wrong:
            axes.spines[:].set(visible=True, color=COLOURS[1], linewidth=2.5)
        said = [str(given[i]) for given in (labels, predictions) if given is not None]
        text = f"{said[0]}, said {said[1]}" if wrong else (said or [""])[0]
        axes.set_xlabel(text, fontsize="small", labelpad=3, color=INK if wrong else MUTED,
                        fontweight="bold" if wrong else "normal")  # fmt: skip
    return figure


@_styled
def plot_matrices(parts: Sequence, *, title: str = "", limit: float | None = None, width: float = 7.0, tallest: float = 2.6):
    """Matrices as heat maps with one diverging scale, cells of one size, and the signs between them: W0 + 2 x B A = W.

    parts  (name, matrix) pairs and texts, in order: [("W0", W0), "+ 2 ·", ("B", B), "·", ("A", A), "=", ("W", W)]
    limit  the value at full colour; None: the largest absolute value of all
    Below each matrix stands its shape, rows x columns: blue is negative, rust is positive, white is 0.
    """
    matrices = [np.asarray(part[1]) for part in parts if not isinstance(part, str)]
    if not matrices or any(matrix.ndim != 2 for matrix in matrices):
        found = [matrix.shape for matrix in matrices]
        raise ValueError(f"plot_matrices needs matrices of two dimensions, as (name, matrix); found shapes {found}")
    limit = limit or max(float(np.abs(matrix).max()) for matrix in matrices) or 1.0
    figure = new_figure(width, 1.0)
    figure.set_layout_engine("none")
    large = figure.get_figwidth() / width
    gap, above, below, bar, least = (large * inches for inches in (0.09, 0.72, 0.36, 0.75, 0.5))

    # One size of cell for all, so that shapes can be compared by eye; a narrow matrix still has room for its name.
    signs = sum(large * _sign_width(part) for part in parts if isinstance(part, str))
    spare = width * large - bar - signs - gap * (len(parts) + 2)
    cell = min(spare / sum(m.shape[1] for m in matrices), tallest * large / max(m.shape[0] for m in matrices))
    slots = [large * _sign_width(p) if isinstance(p, str) else max(cell * np.shape(p[1])[1], least) for p in parts]
    high = max(cell * max(m.shape[0] for m in matrices), 0.9 * large)
    total_w, total_h = max(sum(slots) + gap * (len(parts) + 2) + bar, 0.1 * large * len(title)), high + above + below
    figure.set_size_inches(total_w, total_h)
    middle = below + high / 2

    figure.text(gap / total_w, 1 - 0.09 * large / total_h, title, va="top", fontweight="bold", fontsize="large", color=INK)
    x, heat = gap, None
    for part, slot in zip(parts, slots, strict=True):
        centre = x + slot / 2
        x += slot + gap
        if isinstance(part, str):
            figure.text(centre / total_w, middle / total_h, part, ha="center", va="center", fontsize="large", color=INK)
            continue
        name, matrix = part[0], np.asarray(part[1])
        tall, wide = cell * matrix.shape[0], cell * matrix.shape[1]
        place = (centre - wide / 2) / total_w, (middle - tall / 2) / total_h, wide / total_w, tall / total_h
        axes = figure.add_axes(place)
        heat = axes.imshow(matrix, cmap=_diverging(), vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set(visible=True, color=MUTED, linewidth=0.8)
        for text, end, shift, va, look in (
            (name, 1, 5, "bottom", {"fontweight": "bold", "color": INK}),
            (f"{matrix.shape[0]} × {matrix.shape[1]}", 0, -5, "top", {"fontsize": "small", "color": MUTED}),
        ):
            axes.annotate(text, (0.5, end), (0, shift), xycoords="axes fraction", textcoords="offset points",
                          ha="center", va=va, **look)  # fmt: skip
    side = figure.add_axes(((x + gap) / total_w, (middle - 0.45 * large) / total_h, 0.09 * large / total_w, 0.9 * large / total_h))
    scale = figure.colorbar(heat, cax=side, ticks=[-limit, 0, limit], format=lambda value, _: f"{value:.2g}".replace("-", "\N{MINUS SIGN}"))
    scale.outline.set(edgecolor=MUTED, linewidth=0.8)
    side.grid(False)
    return figure


def _sign_width(text: str) -> float:
    """Inches that a sign between two matrices takes."""
    return max(0.28, 0.09 * len(text))


def _diverging():
    from matplotlib.colors import LinearSegmentedColormap

    # Dark ends of unlike hue around a light middle: told apart by everyone, and in grey both ends are dark.
    return LinearSegmentedColormap.from_list("lora_lab", ["#062a8c", COLOURS[0], "#9db8ff", "#f7f7f7", "#f0b48c", COLOURS[1], "#6e2c04"])


@_styled
def plot_staircase(
    floors: Mapping[str, float], curves: Mapping[str, Sequence[float]] | None = None, *,
    steps: int | None = None, title: str = "", xlabel: str = "step", ylabel: str = "loss", width: float = 7.6, height: float = 4.2,
):  # fmt: skip
    """Floors that were known beforehand, and loss curves that land on them; logarithmic loss axis, each name at its own stair.

    floors  name -> the least loss, above 0, from the highest stair to the lowest
    curves  name -> losses, one per step; None: the floors alone, with room for `steps` steps
    """
    if not floors or min(floors.values()) <= 0:
        raise ValueError(f"plot_staircase needs floors above 0, {{name: loss}}, for its logarithmic axis; found {dict(floors)}")
    if strangers := [name for name in curves or {} if name not in floors]:
        raise ValueError(f"plot_staircase has no floor for {', '.join(map(str, strangers))}; there are {', '.join(map(str, floors))}")
    if not (curves or steps):
        raise ValueError("plot_staircase without curves needs steps=, the width of the picture")
    figure = new_figure(width, height)
    axes = figure.subplots()
    last = max([steps or 0, *(len(curve) for curve in (curves or {}).values())])
    colours = dict(zip(floors, _ramp(len(floors)), strict=True))
    for floor in floors.values():
        axes.plot([0, last], [floor, floor], color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=2)
    for name, curve in (curves or {}).items():
        axes.plot(range(1, len(curve) + 1), curve, color=colours[name], linestyle="-", linewidth=2.2, zorder=4)
        axes.plot(len(curve), curve[-1], "o", color=colours[name], markersize=7, clip_on=False, zorder=5)
    axes.set_yscale("log")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(0, last))
    axes.set_ylim(min(floors.values()) / 2.5, axes.get_ylim()[1])
    axes.grid(False)
    axes.xaxis.set_major_locator(_few_ticks(integer=True))
    _label_lines(figure, axes, last, [(floor, name) for name, floor in floors.items()], gap=8, ha="left", va="center",
                 color=INK, annotation_clip=False)  # fmt: skip
    return figure


def _ramp(count: int) -> list[str]:
    """Colours in an order, each readable on light and dark paper: from rust over magenta and blue to teal."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("lora_lab_order", [COLOURS[1], COLOURS[3], COLOURS[0], COLOURS[2]])
    return [to_hex(ramp(i / max(count - 1, 1))) for i in range(count)]


@_styled
def plot_panels(
    panels: Mapping[str, Mapping[str, tuple]], *, title: str = "", xlabel: str = "", ylabel: str = "", columns: int = 2,
    logx: bool = False, log: bool = False, percent: bool = False, line_at: tuple[float, str] | None = None,
    xticks: Sequence[float] | None = None, limits: tuple[float, float] | None = None, width: float = 8.2, height: float = 3.1,
):  # fmt: skip
    """Panels side by side on the same axes, each with a few lines that carry their names: what changes from panel to panel is the point.

    panels   title of a panel -> {name: (x, y)}; y: one number per x, or (seeds, x): then the line is the mean over seeds, on a band from
             the lowest to the highest. A name has the same look in every panel. What is not finite is left out
    line_at  (x, text): a vertical line with words beside it, in every panel
    limits   of the y axis, for all panels
    """
    if not panels or not all(panels.values()):
        raise ValueError("plot_panels needs panels with at least one line each, {title: {name: (x, y)}}; found an empty one")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(width, rows * height + (0.4 if title else 0.0))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    every = grid.ravel()
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    ends = {}
    for axes, (panel, lines) in zip(every, panels.items(), strict=False):
        axes.set_title(panel, fontsize="medium")
        ends[axes] = []
        for name, (x, y) in lines.items():
            x, y = np.asarray(x, dtype=float), np.atleast_2d(np.asarray(y, dtype=float))
            if y.shape[1] != len(x):
                raise ValueError(f"plot_panels: {panel}, {name}: {len(x)} values of x, but y of shape {y.shape}")
            there = np.isfinite(y).all(0)
            x, y = x[there], y[:, there]
            if not len(x):
                continue
            i = names.index(name)
            colour, mean = COLOURS[i % len(COLOURS)], y.mean(0)
            if len(y) > 1:
                axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.22, linewidth=0, zorder=2)
            axes.plot(x, mean, color=colour, linestyle=DASHES[i % len(DASHES)], marker=MARKERS[i % len(MARKERS)], markersize=4.5, zorder=3)
            ends[axes].append((x, mean, name))
        if logx:
            axes.set_xscale("log")
        if log:
            axes.set_yscale("log")
        axes.margins(x=0.03)
    if limits:
        every[0].set_ylim(*limits)
    if xticks is not None:
        every[0].set_xticks(list(xticks), [f"{tick:g}" for tick in xticks])
        every[0].minorticks_off()
    if percent:
        every[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    for i, axes in enumerate(every[: len(panels)]):
        axes.set_xlabel(xlabel if i + columns >= len(panels) else "")
        axes.set_ylabel(ylabel if i % columns == 0 else "")
        if line_at is not None:
            axes.axvline(line_at[0], color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
            axes.annotate(line_at[1], (line_at[0], 0.02), (5, 0), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                          ha="left", va="bottom", color=MUTED, fontsize="small")  # fmt: skip
    for axes in ends:
        for x, y, name in ends[axes]:  # only to take part in the layout: the names may need room to the right
            height = min(max(y[-1], axes.get_ylim()[0]), axes.get_ylim()[1])
            axes.annotate(name, (x[-1], height), (17, 0), textcoords="offset points", fontsize="small", annotation_clip=False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, lines in ends.items():
        for text in [text for text in axes.texts if text.get_text() in names]:
            text.remove()
        _name_lines(figure, axes, lines, names)
    return figure


def _name_lines(figure, axes, lines, names) -> None:
    """A name at each line, (x, y, name), where no other line or name is near: at the end if there is room, else further back."""
    import matplotlib

    size = matplotlib.rcParams["font.size"] * 0.833  # "small"; all lengths here are points
    box, points = axes.bbox, 72 / figure.dpi
    left, bottom, right, top = box.x0 * points, box.y0 * points, box.x1 * points, box.y1 * points
    corners = {name: axes.transData.transform(np.column_stack([x, y])) * points for x, y, name in lines}
    inks = {name: _samples(path) for name, path in corners.items()}
    placed = []
    for _, _, name in sorted(lines, key=lambda line: corners[line[2]][-1, 1]):
        if not name:
            continue
        wide, best = size * (0.9 + 0.55 * len(name)), (math.inf,)
        inside = [k for k, (_, up) in enumerate(corners[name]) if bottom - 1 <= up <= top + 1] or [len(corners[name]) - 1]
        for k in inside:
            across, up = corners[name][k][0], min(max(corners[name][k][1], bottom), top)
            for dx, dy, ha in [(7, 0, 0), *((dx, dy, ha) for dy in (1.1, -1.1, 2.2, -2.2) for dx, ha in ((5, 0), (0, 0.5), (-5, 1)))]:
                x0, y0 = across + dx - ha * wide, up + dy * size - 0.6 * size
                x1, y1 = x0 + wide, y0 + 1.2 * size
                hidden = sum(_inside(ink, x0, y0, x1, y1, 0 if other == name else 8) for other, ink in inks.items())
                clash = sum(x0 < b and a < x1 and y0 < d and c < y1 for a, c, b, d in placed)
                out = max(0, bottom + 2 - y0) + max(0, y1 - top - 3 * size) + max(0, left + 2 - x0)
                out += max(0, x1 - right) if k != len(corners[name]) - 1 else 0  # beyond the axes only at a line's end
                cost = hidden + 200 * clash + 20 * out + 1.5 * (inside[-1] - k) + 4 * abs(dy) + (ha == 1)
                best = min(best, (cost, (x0, y0, x1, y1)))
        placed.append(best[1])
        x0, y0, _, y1 = best[1]
        # Where lines lie on one another a place says nothing: the marker does.
        i = names.index(name)
        across, up = axes.transAxes.inverted().transform(((x0 + 0.4 * size) / points, (y0 + y1) / 2 / points))
        axes.plot(across, up, MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], markersize=4.5, transform=axes.transAxes, clip_on=False)
        axes.annotate(name, (across, up), (0.6 * size, 0), xycoords="axes fraction", textcoords="offset points", ha="left", va="center",
                      color=INK, fontsize="small", annotation_clip=False)  # fmt: skip


def _samples(path):
    """Points (N, 2) all along a line of corners, about 2 apart."""
    pieces = [np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / 2)) if np.hypot(*(b - a)) < 1e4 else 5000) for a, b in zip(path, path[1:], strict=False)]
    return np.concatenate([path, *pieces])


def _inside(points, x0, y0, x1, y1, room) -> int:
    x, y = points.T
    return int(((x > x0 - room) & (x < x1 + room) & (y > y0 - room) & (y < y1 + room)).sum())


@_styled
def plot_maps(
    maps: Mapping[str, Sequence], columns: Sequence, rows: Sequence, *, title: str = "", xlabel: str = "", ylabel: str = "",
    scale: str = "", top: float = 100.0, good: float | None = None, width: float = 8.6, height: float = 3.0,
):  # fmt: skip
    """Heat maps side by side with one logarithmic scale from 1 (white, the best there is) to `top` and above (dark).

    maps     title -> numbers of 1 and more, (rows, columns), the first row at the bottom; what is not finite gets a cross
    good     cells up to this value are framed: a region, not only a best cell
    scale    what the colour says
    """
    tables = {name: np.asarray(values, dtype=float) for name, values in maps.items()}
    if not tables or any(table.shape != (len(rows), len(columns)) for table in tables.values()):
        found = {name: table.shape for name, table in tables.items()}
        raise ValueError(f"plot_maps needs tables of {len(rows)} rows and {len(columns)} columns; found {found or 'none'}")
    figure = new_figure(width, height + (0.4 if title else 0.0))
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    grid = figure.subplots(1, len(tables), sharex=True, sharey=True, squeeze=False).ravel()
    heat = None
    for axes, (name, table) in zip(grid, tables.items(), strict=True):
        depth = np.log10(np.clip(np.where(np.isfinite(table), table, top), 1.0, top))
        heat = axes.imshow(depth, cmap=_sequential(), vmin=0, vmax=math.log10(top), origin="lower", aspect="auto", interpolation="nearest")
        for row, column in zip(*np.nonzero(~np.isfinite(table)), strict=True):
            axes.plot(column, row, "x", color="#f7f7f7", markersize=7, markeredgewidth=2)
        if good is not None:
            for row, column in zip(*np.nonzero(table <= good), strict=True):
                axes.add_patch(_square(column, row, "none", 1.0, edge=COLOURS[1]))
        axes.set_title(name, fontsize="medium")
        axes.set_xticks(range(len(columns)), [str(c) for c in columns])
        axes.set_yticks(range(len(rows)), [str(r) for r in rows])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set(visible=True, color=MUTED, linewidth=0.8)
        axes.set_xlabel(xlabel)
    grid[0].set_ylabel(ylabel)
    ticks = [10.0**k for k in range(int(math.log10(top)) + 1)]
    bar = figure.colorbar(heat, ax=list(grid), ticks=np.log10(ticks), fraction=0.035, pad=0.02)
    bar.ax.set_yticklabels([f"{tick:g}" + ("+" if tick == top else "") for tick in ticks])
    bar.outline.set(edgecolor=MUTED, linewidth=0.8)
    bar.set_label(scale, color=INK)
    bar.ax.grid(False)
    return figure


def _sequential():
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("lora_lab_depth", ["#f7f7f7", "#9db8ff", COLOURS[0], "#2430c4", "#1a2490"])  # the end stands out from dark paper


@_styled
def plot_confusion(counts, names: Sequence | None = None, *, title: str = "", cell: float = 0.42):
    """How often each true class (rows) was given each answer (columns), as numbers; mistakes stand out, zeros stay empty.

    counts  (K, K) whole numbers
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"plot_confusion needs a square table of counts; found shape {counts.shape}")
    k = len(counts)
    figure = new_figure(k * cell + 1.2, k * cell + 1.2)
    axes = figure.subplots()
    wrong = counts * (1 - np.eye(k))
    worst = max(wrong.max(), 1)
    for row in range(k):
        for column in range(k):
            count, mistake = counts[row, column], row != column
            if mistake and count:
                axes.add_patch(_square(column, row, COLOURS[1], 0.15 + 0.6 * count / worst))
            if count:
                axes.text(column, row, f"{count}", ha="center", va="center", color=INK if mistake else MUTED,
                          fontweight="bold" if mistake else "normal")  # fmt: skip
    names = list(range(k)) if names is None else list(names)
    title = textwrap.fill(title, max(20, int(8 * (k * cell + 1.2))))  # some 8 bold letters an inch
    axes.set(xlim=(-0.5, k - 0.5), ylim=(k - 0.5, -0.5), aspect="equal", title=title, xlabel="answer", ylabel="true class")
    axes.set_xticks(range(k), names)
    axes.set_yticks(range(k), names)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set(visible=True, color=GRID)
    return figure


@_styled
def plot_report(report, *, title: str = "", width: float = 9.0, height: float = 3.3):
    """What `report` found, in three panels: how large each update is, in how many directions it is spread, its singular values.

    Where the layers repeat through the blocks of a model (h.0.attn.c_attn, h.1.attn.c_attn, ...), kinds of layers are lines over the
    blocks, and spectra are means over them, on a band from the lowest to the highest. Elsewhere each layer has a row, and its spectrum is a
    strip: dark is S_1, white 0. Slices of fused layers stand for themselves. Updates that are 0 have no spectrum.
    """
    rows = _finest(report)
    if not rows:
        raise ValueError("plot_report needs a report with at least one row; found none")
    groups = {}
    for row in rows:
        pattern, block = _block(row.module)
        groups.setdefault(pattern, []).append((block, row))
    if max(map(len, groups.values())) >= 3 and all(block is not None for members in groups.values() for block, _ in members):
        return _report_by_block(groups, title, width, height)
    return _report_by_row(rows, title, width)


def _finest(report) -> list:
    """The rows of slices in place of their fused layer."""
    fused = {row.module.rpartition(":")[0] for row in report if row.part == "slice"}
    return [row for row in report if row.part == "slice" or row.module.rpartition(":")[0] not in fused or ":" not in row.module]


def _block(name: str) -> tuple[str, int | None]:
    """"h.3.attn.c_attn:q" -> ("attn.c_attn:q", 3)."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return (name, None) if at is None or at == len(parts) - 1 else (".".join(parts[at + 1 :]), int(parts[at]))


def _report_by_block(groups: Mapping, title: str, width: float, height: float):
    figure = new_figure(width, height + (0.4 if title else 0.0))
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    size, spread, values = figure.subplots(1, 3)
    ends = []
    for i, (name, members) in enumerate(groups.items()):
        look = {"color": COLOURS[i % 5], "linestyle": DASHES[(i + i // 5) % 5], "marker": MARKERS[(i + i // 5) % 5], "markersize": 4.5}
        blocks = np.array([block for block, _ in members])
        for axes, numbers in ((size, [100 * row.ratio for _, row in members]), (spread, [row.effective_rank for _, row in members])):
            axes.plot(blocks, numbers, zorder=3, **look)
        ends.append((blocks, [100 * row.ratio for _, row in members], name))
        live = [np.array(row.S) / row.S[0] for _, row in members if row.S[0] > 0]
        if live:
            shortest = min(map(len, live))
            table = np.stack([S[:shortest] for S in live])
            at = np.arange(1, shortest + 1)
            values.fill_between(at, table.min(0), table.max(0), color=look["color"], alpha=0.15, linewidth=0, zorder=2)
            values.plot(at, table.mean(0), zorder=3, **look)
    limits = {row.r for members in groups.values() for _, row in members if row.r is not None}
    if len(limits) == 1:
        spread.axhline(limits.pop(), color=MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    size.set_title("‖ΔW‖ / ‖W‖ in %", fontsize="medium")
    spread.set_title("effective rank" + (", dashed: r" if len(spread.lines) > len(groups) else ""), fontsize="medium")
    values.set_title("singular values, $S_i / S_1$", fontsize="medium")
    for axes, label in ((size, "block"), (spread, "block"), (values, "i")):
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.04)
        axes.xaxis.set_major_locator(_few_ticks(integer=True))
    # Colour, dash and marker say the names again in the other panels.
    figure.draw_without_rendering()
    _label_lines(figure, size, max(x[-1] for x, _, _ in ends), [(y[-1], name) for _, y, name in ends], gap=9, ha="left", va="center", color=INK,
                 fontsize="small", annotation_clip=False)  # fmt: skip
    return figure


def _report_by_row(rows: Sequence, title: str, width: float):
    figure = new_figure(width, 1.0 + 0.3 * len(rows) + (0.4 if title else 0.0))
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    size, spread, values = figure.subplots(1, 3, sharey=True)
    longest = max(len(row.S) for row in rows)
    table = np.full((len(rows), longest), np.nan)
    for place, row in enumerate(rows):
        if row.S[0] > 0:
            table[place, : len(row.S)] = np.array(row.S) / row.S[0]
        for axes, number, text in (
            (size, 100 * row.ratio, f"{100 * row.ratio:.3g} %"),
            (spread, row.effective_rank, f"{row.effective_rank:.3g}" + (f" of {row.r}" if row.r is not None else "")),
        ):
            if not math.isfinite(number):  # over a weight that is 0, or only the first singular values are known
                number, text = 0, "∞" if number > 0 else "–"
            axes.plot([0, number], [place, place], "-", color=COLOURS[0], linewidth=2.2, solid_capstyle="round", zorder=3)
            axes.plot(number, place, "o", color=COLOURS[0], zorder=4)
            axes.annotate(text, (number, place), (8, 0), textcoords="offset points", va="center", fontsize="small", color=INK)
    values.imshow(table, cmap=_sequential(), vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=(0.5, longest + 0.5, len(rows) - 0.5, -0.5))
    for place in range(1, len(rows)):
        values.axhline(place - 0.5, color=PAPER, linewidth=3)
    values.set_title("singular values, $S_i / S_1$", fontsize="medium")
    values.set_xlabel("i")
    values.grid(False)
    values.xaxis.set_major_locator(_few_ticks(integer=True))
    size.set_title("‖ΔW‖ / ‖W‖", fontsize="medium")
    spread.set_title("effective rank", fontsize="medium")
    for axes in (size, spread):
        axes.set_xlim(0, axes.get_xlim()[1] * 1.35 or 1)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.grid(False)
    for axes in (size, spread, values):
        axes.tick_params(length=0)
    size.set_yticks(range(len(rows)), [row.module for row in rows])
    size.tick_params(axis="y", labelcolor=INK)
    size.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _square(x, y, colour, strength, edge=PAPER):
    from matplotlib.patches import Rectangle

    inset = 0.0 if edge == PAPER else 0.06  # frames of neighbours stay apart
    return Rectangle((x - 0.5 + inset, y - 0.5 + inset), 1 - 2 * inset, 1 - 2 * inset, facecolor=colour, alpha=strength, edgecolor=edge, linewidth=1.5)
