"""Figures of the inside of a GPT-2: attention maps, heads by a score, which part of a fused matrix an update touches, what is adapted."""

from collections.abc import Mapping, Sequence

import numpy as np

from lora_lab.view.figures import _sequential, _styled
from lora_lab.view.style import COLOURS, GRID, INK, MUTED, new_figure

PLACES = {"c_attn": ("q", "k", "v"), "attn.c_proj": ("attn.c_proj",), "mlp.c_fc": ("mlp.c_fc",), "mlp.c_proj": ("mlp.c_proj",)}


@_styled
def plot_attention(
    maps: Mapping[str, Sequence], rows: Sequence[str], columns: Sequence[str], *, title: str = "", xlabel: str = "looks at", ylabel: str = "token",
    top: float = 1.0, cell: float = 0.17,
):  # fmt: skip
    """Attention maps on one scale: each row says where one token looks, from 0 (white) to `top` (dark). Side by side, wide ones one below the other.

    maps     title -> weights between 0 and 1, (rows, columns)
    rows     the tokens that look; columns: the tokens looked at. Spaces are shown as they are, line ends as ⏎
    """
    tables = {name: np.asarray(values, dtype=float) for name, values in maps.items()}
    if not tables or any(table.shape != (len(rows), len(columns)) for table in tables.values()):
        found = {name: table.shape for name, table in tables.items()}
        raise ValueError(f"plot_attention needs maps of {len(rows)} rows and {len(columns)} columns, as many as tokens; found {found or 'none'}")
    across = 1 if cell * len(columns) > 3.2 else len(tables)  # a page is about 8 inches wide
    down = -(-len(tables) // across)
    figure = new_figure(2.0 + across * (cell * len(columns) + 0.25), down * (cell * len(rows) + 0.45) + 1.1)
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    heat = None
    for axes, (name, table) in zip(grid, tables.items(), strict=True):
        heat = axes.imshow(table, cmap=_sequential(), vmin=0, vmax=top, interpolation="nearest")
        axes.set_title(name, fontsize="medium")
        axes.set_xticks(range(len(columns)), [_token(t) for t in columns], rotation=90, fontsize=6.5)
        axes.set_yticks(range(len(rows)), [_token(t) for t in rows], fontsize=6.5)
        axes.set_ylabel(ylabel if axes in grid[::across] else "")
        _plain(axes)
    for axes in grid[-across:]:
        axes.set_xlabel(xlabel)
    _scale(figure, heat, grid, top, "attention")
    return figure


def _token(text: str) -> str:
    return text.replace("\n", "⏎").replace("$", r"\$").replace("<|endoftext|>", "⟨end⟩").strip(" ") or "␣"


@_styled
def plot_heads(
    maps: Mapping[str, Sequence], *, title: str = "", scale: str = "", top: float = 1.0, frame: tuple[int, int] | None = None, cell: float = 0.52,
):  # fmt: skip
    """One number for each head, block by block, as maps side by side: where in a model are the heads that do something?

    maps   title -> numbers between 0 and `top`, (blocks, heads)
    frame  (block, head) of the head that the text is about, framed in each map
    """
    tables = {name: np.asarray(values, dtype=float) for name, values in maps.items()}
    if not tables or len({table.shape for table in tables.values()}) != 1 or next(iter(tables.values())).ndim != 2:
        found = {name: table.shape for name, table in tables.items()}
        raise ValueError(f"plot_heads needs maps of the same blocks and heads, of shape (blocks, heads); found {found or 'none'}")
    blocks, heads = next(iter(tables.values())).shape
    figure = new_figure(1.6 + len(tables) * (cell * heads + 0.3), 0.62 * cell * blocks + 1.35)
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    grid = figure.subplots(1, len(tables), sharey=True, squeeze=False).ravel()
    heat = None
    for axes, (name, table) in zip(grid, tables.items(), strict=True):
        heat = axes.imshow(table, cmap=_sequential(), vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        for block, head in np.ndindex(blocks, heads):
            # Numbers in the map's own ends: black on the light half, white on the dark one, in both themes.
            ink = "#101014" if table[block, head] < 0.5 * top else "#f7f7f7"
            axes.text(head, block, f"{table[block, head]:.2f}".lstrip("0") or "0", ha="center", va="center", fontsize="small", color=ink)
        axes.set_title(name, fontsize="medium")
        axes.set_xticks(range(heads))
        axes.set_yticks(range(blocks))
        axes.set_xlabel("head")
        _plain(axes)
        if frame is not None:
            axes.add_patch(_frame(frame[1] - 0.5, frame[0] - 0.5, 1, 1))
    grid[0].set_ylabel("block")
    _scale(figure, heat, grid, top, scale)
    return figure


@_styled
def plot_fused(
    updates: Mapping[str, Sequence], *, heads: int = 1, title: str = "", scale: str = "|ΔW|", top: float | None = None,
    width: float = 8.2, height: float = 1.75,
):  # fmt: skip
    """Matrices of a fused q|k|v layer, one below the other, in the layout in which a Conv1D stores them: dark where nothing is.

    updates  title -> ΔW (3 d, d), as `delta_weight` gives it; drawn is its absolute value
    heads    more than 1: a thin line between heads, numbered at the bottom
    top      the value drawn brightest; None: the 99.5th percentile of what is drawn. A point is a mean over d / 64 entries a side
    """
    tables = {name: np.abs(np.asarray(values, dtype=float)).T for name, values in updates.items()}
    if not tables or any(table.ndim != 2 or table.shape[1] != 3 * table.shape[0] for table in tables.values()):
        found = {name: table.T.shape for name, table in tables.items()}
        raise ValueError(f"plot_fused needs updates of shape (3 d, d); found {found or 'none'}")
    points = {name: _pooled(table, max(1, len(table) // 64)) for name, table in tables.items()}
    top = top or float(np.percentile(np.concatenate([table.ravel() for table in points.values()]), 99.5)) or 1.0
    figure = new_figure(width, height * len(tables) + (0.75 if title else 0.35))
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    grid = figure.subplots(len(tables), 1, sharex=True, squeeze=False).ravel()
    heat = None
    for axes, (name, table) in zip(grid, tables.items(), strict=True):
        d = len(table)
        heat = axes.imshow(points[name], cmap=_glow(), vmin=0, vmax=top, aspect="auto", interpolation="nearest", extent=(0, 3 * d, d, 0))
        for cut in (d, 2 * d):
            axes.axvline(cut, color="#f7f7f7", linewidth=1.2)
        axes.set_title(name, fontsize="medium")
        wide = d / heads
        for cut in range(1, 3 * heads):
            axes.axvline(cut * wide, color="#f7f7f7", linewidth=0.5, linestyle=(0, (1, 2)))
        axes.set_xticks([d / 2, 3 * d / 2, 5 * d / 2], ["q", "k", "v"], fontweight="bold", color=INK)
        axes.tick_params(axis="x", pad=12 if heads > 1 else 3)
        if heads > 1:
            axes.set_xticks([(k + 0.5) * wide for k in range(3 * heads)], [str(k % heads) for k in range(3 * heads)], minor=True, fontsize=7)
            axes.tick_params(axis="x", which="minor", length=0, pad=2, labelcolor=MUTED)
        axes.set_yticks([0, d])
        axes.set_ylabel("in")
        _plain(axes)
    grid[-1].set_xlabel("out")
    _scale(figure, heat, grid, top, scale)
    return figure


def _pooled(table, size: int):
    """Means over squares of `size` entries a side: a picture of a few thousand points instead of hundreds of thousands."""
    rows, columns = (n // size * size for n in table.shape)
    return table[:rows, :columns].reshape(rows // size, size, columns // size, size).mean((1, 3))


def _glow():
    from matplotlib.colors import LinearSegmentedColormap

    # Lightness rises all the way, so that it reads in grey, too.
    return LinearSegmentedColormap.from_list("lora_lab_glow", ["#0b0b1e", "#2430c4", COLOURS[0], "#9db8ff", "#fff6e0"])


@_styled
def plot_coverage(choices: Mapping[str, Sequence[str]], blocks: int, *, title: str = "", columns: int = 3, width: float = 8.2):
    """What a choice of target_modules adapts: the matrices of a block from left to right, the blocks from bottom to top.

    choices  title -> names of adapted layers, "transformer.h.3.attn.c_proj"; slices of c_attn as "transformer.h.3.attn.c_attn:q,v"
    blocks   how many there are
    """
    if not choices or blocks < 1:
        raise ValueError(f"plot_coverage needs at least one choice, {{title: names}}, and one block; found {len(choices)} and {blocks}")
    places = [place for parts in PLACES.values() for place in parts]
    columns = min(columns, len(choices))
    rows = -(-len(choices) // columns)
    figure = new_figure(width, rows * (0.24 * blocks + 1.25) + (0.35 if title else 0.0))
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[len(choices) :]:
        axes.set_visible(False)
    for axes, (name, layers) in zip(grid, choices.items(), strict=False):
        on = {cell for layer in layers for cell in _cells(layer, blocks)}
        for block in range(blocks):
            for x, place in enumerate(places):
                axes.add_patch(_tile(x, block, (place, block) in on))
        axes.set(xlim=(-0.6, len(places) - 0.4), ylim=(-0.6, blocks - 0.4))
        axes.set_title(f"{name}\n{len(on)} matrices", fontsize="medium")
        axes.set_xticks(range(len(places)), places, rotation=90)
        axes.set_yticks(range(blocks))
        _plain(axes)
        axes.spines[:].set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("block")
    return figure


def _cells(layer: str, blocks: int) -> list[tuple[str, int]]:
    name, _, slices = layer.partition(":")
    pieces = name.split(".")
    place = next((place for place in PLACES if name.endswith("." + place)), None)
    block = next((int(piece) for piece in pieces if piece.isdigit()), None)
    if place is None or block is None or block >= blocks:
        raise ValueError(f"plot_coverage knows {', '.join(PLACES)} of blocks 0 to {blocks - 1}; found {layer!r}")
    parts = PLACES[place]
    return [(part, block) for part in parts if not slices or part in slices.split(",")]


def _tile(x: float, y: float, on: bool):
    from matplotlib.patches import Rectangle

    look = {"facecolor": COLOURS[0], "edgecolor": COLOURS[0]} if on else {"facecolor": "none", "edgecolor": GRID}
    return Rectangle((x - 0.36, y - 0.36), 0.72, 0.72, linewidth=1.0, **look)


def _frame(x, y, width, height):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor="none", edgecolor=COLOURS[1], linewidth=2.5, zorder=5, clip_on=False)


def _plain(axes) -> None:
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set(visible=True, color=MUTED, linewidth=0.8)


def _scale(figure, heat, grid, top: float, text: str) -> None:
    bar = figure.colorbar(heat, ax=list(grid), ticks=[0, top], format="%.2g", fraction=0.03, pad=0.02)
    bar.outline.set(edgecolor=MUTED, linewidth=0.8)
    bar.set_label(text, color=INK)
    bar.ax.grid(False)
