"""Figures of lab 07: what a model reads and what it is asked for, token by token, and scores beside their floors."""

from collections.abc import Mapping, Sequence

from lora_lab.view.figures import _few_ticks, _styled
from lora_lab.view.style import COLOURS, GRID, INK, MUTED, new_figure

# A kind of token -> (colour of its frame, width, dash): told apart without colour, too.
KINDS = {"meaning": (MUTED, 1.0, "-"), "reference": (COLOURS[0], 2.2, "-"), "end": (COLOURS[1], 2.2, "-"), "pad": (GRID, 1.0, (0, (2, 2)))}


@_styled
def plot_tokens(rows: Sequence[tuple[str, Sequence]], *, title: str = "", width: float = 8.6):
    """Rows of tokens as boxes, each with its kind and, if there is one, a note below it; a row that is too long for a line is broken.

    rows  (name, tokens); a token is (text, kind) or (text, kind, note), kind one of meaning, reference, end, pad
    """
    if not rows or any(not tokens for _, tokens in rows):
        raise ValueError("plot_tokens needs rows with at least one token each, [(name, tokens)]; found an empty one")
    kinds = list(dict.fromkeys(token[1] for _, tokens in rows for token in tokens))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"a token's kind is one of {', '.join(KINDS)}; found {', '.join(map(str, unknown))}")
    figure = new_figure(width, 1.0)
    figure.set_layout_engine("none")
    large = figure.get_figwidth() / width  # the style of a projector makes figures larger
    letter, pad, gap = 0.082, 0.09, 0.045  # inches
    left = 0.15 + max((0.085 * len(name) for name, _ in rows), default=0)
    lines = []  # (name, [(x, wide, text, kind, note)])
    for name, tokens in rows:
        x, line = left, []
        lines.append((name, line))
        for text, kind, *note in tokens:
            shown = text.replace(" ", "␣") or "∅"
            wide = max(letter * max(len(shown), *(len(str(n)) for n in note), 1) + pad, 0.24)
            if x + wide > width - 0.1 and line:
                x, line = left, []
                lines.append(("", line))
            line.append((x, wide, shown, kind, str(note[0]) if note else ""))
            x += wide + gap
    noted = any(note for _, line in lines for *_, note in line)
    step, box, above, below = 0.40 + 0.2 * noted, 0.27, 0.42 if title else 0.1, 0.34
    height = above + step * len(lines) + below
    figure.set_size_inches(width * large, height * large)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.patch.set_visible(False)
    axes.text(0.1, 0.08, title, va="top", fontweight="bold", fontsize="large", color=INK)
    for k, (name, line) in enumerate(lines):
        top = above + step * k
        axes.text(0.1, top + box / 2, name, va="center", color=INK, fontsize="small")
        for x, wide, text, kind, note in line:
            _box(axes, x, top, wide, box, kind)
            axes.text(x + wide / 2, top + box / 2, text, ha="center", va="center", family="monospace", fontsize=7.6 * large,
                      color=MUTED if kind == "pad" else INK)  # fmt: skip
            axes.text(x + wide / 2, top + box + 0.02, note, ha="center", va="top", fontsize=7.2 * large, color=MUTED)
    x = left
    for kind in kinds:
        _box(axes, x, height - 0.26, 0.22, 0.16, kind)
        axes.text(x + 0.29, height - 0.18, {"end": "end of text", "pad": "padding"}.get(kind, kind), va="center", fontsize="small", color=MUTED)
        x += 1.15
    return figure


def _box(axes, x, y, wide, high, kind) -> None:
    from matplotlib.patches import FancyBboxPatch

    colour, line, dash = KINDS[kind]
    axes.add_patch(FancyBboxPatch((x, y), wide, high, boxstyle="round,pad=0,rounding_size=0.04", fill=False, edgecolor=colour, linewidth=line, linestyle=dash))


@_styled
def plot_scores(
    scores: Mapping[str, Mapping[str, float]], *, columns: Mapping[str, str], highlight: Sequence[str] = (), title: str = "", width: float = 8.2,
):  # fmt: skip
    """One bar for each method and score, the value at its end; methods from top to bottom, a panel for each score.

    scores     method -> {score: number}                columns    score -> the panel's title, which says where good is
    highlight  methods in the first colour; the others are grey
    """
    if not scores or any(set(columns) - set(found) for found in scores.values()):
        raise ValueError(f"plot_scores needs the scores {', '.join(columns)} of each method; found {dict(scores)}")
    figure = new_figure(width, 0.9 + 0.36 * len(scores))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    for axes, (score, words) in zip(panels, columns.items(), strict=True):
        values = [float(found[score]) for found in scores.values()]
        axes.barh(range(len(values)), values, height=0.62, color=[COLOURS[0] if name in highlight else MUTED for name in scores])
        for row, value in enumerate(values):
            axes.annotate(f"{value:.1f}", (value, row), (4, 0), textcoords="offset points", va="center", color=INK, fontsize="small", fontweight="bold")
        axes.set_yticks(range(len(values)), list(scores))
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_xlim(0, max(*values, 1.0) * 1.16)
        axes.set_title(words, fontsize="medium")
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(_few_ticks())
    return figure
