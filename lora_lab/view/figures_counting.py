"""Figures of the memory ledger: what training holds, account by account, and how it rises and falls over a step."""

from collections.abc import Mapping, Sequence

import numpy as np

from lora_lab.ledger import Memory, readable
from lora_lab.view.figures import _styled
from lora_lab.view.style import COLOURS, GRID, INK, MUTED, PAPER, new_figure

# What lies in memory during a step, from the bottom up: what stays below, what comes and goes on top.
PARTS = ("weights", "optimizer", "gradients", "activations")
NAMES = {"weights": "weights", "optimizer": "optimizer's state", "gradients": "gradients", "activations": "activations and what passes"}
PART_COLOURS = dict(zip(PARTS, (COLOURS[4], COLOURS[3], COLOURS[1], COLOURS[2]), strict=True))


def times_less(full: float, lora: float) -> str:
    """How much smaller the second is, in words: "the same", "1.4 times less", "2,355 times less", "1.02 times more".

    >>> times_less(10, 10), times_less(14, 10), times_less(23_551, 10), times_less(100, 104)
    ('the same', '1.4 times less', '2,355 times less', '1.04 times more')
    """
    if lora <= 0:
        return "nothing left" if full else "the same"
    ratio = full / lora
    if ratio < 0.995:
        return f"{1 / ratio:.3g} times more"
    if ratio < 1.005:
        return "the same"
    return f"{ratio:,.0f} times less" if ratio >= 9.95 else f"{ratio:.2g} times less" if ratio >= 1.095 else f"{ratio:.3g} times less"


@_styled
def plot_ledger(
    accounts: Mapping[str, tuple[float, float]], *, title: str = "", names: tuple[str, str] = ("full fine-tuning", "LoRA"),
    apart: Sequence[str] = (), width: float = 8.2,
):  # fmt: skip
    """Bytes of two ways to train, one account a row, on one scale; what is too small for a bar is a hairline.

    accounts  name -> (bytes of the first, bytes of the second)
    apart     accounts that stand below a line: what is not part of the sum (a peak, a file)
    Raises ValueError for no account and for negative or infinite bytes.
    """
    if not accounts or not all(np.isfinite(pair).all() and min(pair) >= 0 for pair in accounts.values()):
        raise ValueError(f"plot_ledger needs accounts, name -> (bytes, bytes), finite and not negative; found {dict(accounts)}")
    figure = new_figure(width, 1.05 + 0.62 * len(accounts) + 0.2 * bool(apart))
    axes = figure.subplots()
    most = max(max(pair) for pair in accounts.values()) or 1.0
    places, at = [], 0.0
    for k, name in enumerate(accounts):
        at += 0.45 if name in apart and (k == 0 or list(accounts)[k - 1] not in apart) else 0.0
        places.append(at)
        at += 1.0
    for place, pair in zip(places, accounts.values(), strict=True):
        for k, (size, colour) in enumerate(zip(pair, (COLOURS[1], COLOURS[0]), strict=True)):
            y = place - 0.19 + 0.38 * k
            axes.barh(y, size, height=0.34, color=colour, linewidth=0, zorder=3)
            if size < most / 300:  # a bar of nothing would not be seen at all
                axes.plot([0, 0], [y - 0.17, y + 0.17], color=colour, linestyle="-", linewidth=1.2, solid_capstyle="butt", zorder=4)
            said = readable(size) + (f"   {names[k]}" if place == places[0] else "")
            axes.annotate(said, (size, y), (5, 0), textcoords="offset points", va="center", color=INK if k else MUTED, fontsize="small",
                          fontweight="bold" if k else "normal", annotation_clip=False)  # fmt: skip
        axes.annotate(times_less(*pair), (1, place), (0, 0), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="center",
                      color=INK, fontsize="small")  # fmt: skip
    if apart:
        first = next(place for place, name in zip(places, accounts, strict=True) if name in apart)
        axes.axhline(first - 0.72, color=GRID, linewidth=0.8)
    axes.set_yticks(places, list(accounts))
    axes.tick_params(axis="y", labelcolor=INK, pad=8)
    axes.set_ylim(places[-1] + 0.55, -0.6)
    axes.set_xlim(0, 1.42 * most)  # room for the figures at the bars, and for the comparison at the right
    axes.grid(False)
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(title)
    return figure


def film(memory: Memory, columns: int = 240) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """A step as columns: bytes (columns, 4) in the order of `PARTS`, and where each phase begins, (name, column).

    Of moments that share a column the highest is shown, so that the peak is never lost. Phases: "forward", "backward" (with recomputed
    blocks), "optimizer", which has the last twentieth to itself: it is one moment, and would not be seen.
    """
    last = max(1, columns // 20)
    moments = [m for m in memory.moments if m.phase != "optimizer"]
    step = [m for m in memory.moments if m.phase == "optimizer"]
    places = [k * (columns - last) // max(1, len(moments)) for k in range(len(moments))] + [columns - last] * len(step)
    high: dict[int, object] = {}
    for place, moment in zip(places, moments + step, strict=True):
        if place not in high or moment.total > high[place].total:
            high[place] = moment
    rows, now = [], None
    for column in range(columns):  # fewer moments than columns: a moment lasts until the next
        now = high.get(column, now)
        rows.append((memory.weights, memory.optimizer, now.gradients, now.activations + now.passing))
    first_back = next((k for k, m in enumerate(moments) if m.phase != "forward"), len(moments))
    back = places[first_back] if first_back < len(moments) else columns - last
    return np.array(rows, dtype=float), [("forward", 0), ("backward", back), ("step", columns - last)]


@_styled
def plot_steps(
    memories: Mapping[str, Memory], *, title: str = "", lines: Mapping[str, float] | None = None, width: float = 8.6, height: float = 3.6,
):  # fmt: skip
    """A training step as time goes on, one panel each on one scale: weights and state below, gradients and activations as they come and go.

    memories  name -> `ledger.training_memory(...)`
    lines     name -> bytes: how much a device has
    Raises ValueError for nothing to draw.
    """
    if not memories:
        raise ValueError("plot_steps needs at least one prediction, name -> Memory; found none")
    figure = new_figure(width, height)
    panels = figure.subplots(1, len(memories), sharey=True, squeeze=False)[0]
    top = max(m.peak for m in memories.values())
    for axes, (name, memory) in zip(panels, memories.items(), strict=True):
        rows, phases = film(memory)
        axes.stackplot(range(len(rows)), *rows.T / 1e9, colors=[PART_COLOURS[p] for p in PARTS], linewidth=0, alpha=0.9, zorder=2)
        peak = int(rows.sum(1).argmax())
        axes.plot(peak, memory.peak / 1e9, "v", color=INK, markersize=6, zorder=4)
        axes.annotate(f"{readable(memory.peak)}", (peak, memory.peak / 1e9), (0, 7), textcoords="offset points", ha="center", fontweight="bold",
                      color=INK)  # fmt: skip
        for device, size in (lines or {}).items():
            if size <= 1.3 * top:
                axes.axhline(size / 1e9, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
                if axes is panels[-1]:
                    axes.annotate(device, (len(rows), size / 1e9), (0, 3), textcoords="offset points", ha="right", fontsize="small", color=INK)
        for _, column in phases[1:]:
            axes.plot([column] * 2, [0, rows[column].sum() / 1e9], "-", color=PAPER, linewidth=1, zorder=3)
        ends = [column for _, column in phases[1:]] + [len(rows)]
        axes.set_xticks([(a + b) / 2 for (_, a), b in zip(phases, ends, strict=True)], [phase for phase, _ in phases])
        axes.set_xlim(0, len(rows))
        axes.set_title(name, loc="left", fontweight="normal", fontsize="medium")
    panels[0].set_ylim(0, 1.22 * top / 1e9)
    panels[0].set_ylabel("GB")
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", color=INK)
    from matplotlib.patches import Patch

    keys = [Patch(facecolor=PART_COLOURS[p], label=NAMES[p]) for p in PARTS]
    figure.legend(handles=keys, loc="outside lower left", ncols=4, fontsize="small", handlelength=1.1, columnspacing=1.4)
    return figure
