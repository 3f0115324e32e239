"""One plotting style for the whole lab, and `show`, which puts a figure on the page.

Figures are drawn in four neutral colours that nobody would choose by hand: the sentinels INK, MUTED, GRID and PAPER. `show` replaces
them in the SVG by JupyterLab's CSS variables, so that a figure follows the theme of the page by itself, also when it is switched later.
Data colours stay as they are: each has a contrast of at least 3.4:1 on white and on JupyterLab's dark paper (no colour has 4.5:1 on
both, which small text needs: so text is always neutral), and any two stay apart for readers with protanopia, deuteranopia or tritanopia
(tests/test_view_style.py simulates them). Lines differ in dashes and markers too.
"""

import hashlib
import html
import io
import itertools
import os
import re
from pathlib import Path

INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#fdfefc"

# Blue, rust, teal, magenta, ochre, in this order: the first two are the furthest apart.
COLOURS = ("#4b4eff", "#b9690c", "#009b97", "#a648bf", "#8d8559")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6)), (0, (9, 2.5)))
MARKERS = ("o", "s", "^", "D", "v")

# Outside JupyterLab (Colab, VS Code, an exported page) the fallbacks hold: the colour of the text around the figure.
THEMES = {
    "auto": {
        INK: "var(--jp-ui-font-color0, var(--vscode-foreground, currentColor))",
        MUTED: "var(--jp-ui-font-color2, var(--vscode-descriptionForeground, #767676))",
        GRID: "var(--jp-border-color2, rgba(128, 128, 128, 0.35))",
        PAPER: "var(--jp-layout-color0, var(--vscode-editor-background, transparent))",
    },
    "light": {INK: "#1b1b1f", MUTED: "#5f5f66", GRID: "#dcdce0", PAPER: "#ffffff"},
    "dark": {INK: "#ececf0", MUTED: "#a5a5ad", GRID: "#3a3a40", PAPER: "#111111"},
}
MODES = ("auto", "light", "dark", "projector")
FONT = "var(--jp-ui-font-family, system-ui, -apple-system, 'Segoe UI', sans-serif)"

_mode = os.environ.get("LORA_LAB_STYLE", "auto")
_shown = itertools.count()


def settings(mode: str | None = None) -> dict:
    """matplotlib's rcParams for a mode; None: the mode in force."""
    mode = _checked(mode or _mode)
    large = 1.45 if mode == "projector" else 1.0
    size = 10 * large
    return {
        "figure.facecolor": "none",
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.06,
        "axes.facecolor": "none",
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.titlesize": size * 1.15,
        "axes.titleweight": "bold",
        "axes.titlepad": 10 * large,
        "axes.labelsize": size,
        "axes.linewidth": 0.8 * large,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8 * large,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.labelsize": size * 0.92,
        "ytick.labelsize": size * 0.92,
        "xtick.major.size": 3.5 * large,
        "ytick.major.size": 0,
        "xtick.minor.visible": False,
        "text.color": INK,
        "font.size": size,
        "font.family": "sans-serif",
        "lines.linewidth": 2.0 * large,
        "lines.markersize": 6 * large,
        "lines.dash_capstyle": "round",
        "legend.frameon": False,
        "savefig.facecolor": "none",
        "svg.fonttype": "none",  # text stays text: it can be read out, searched and enlarged
        "svg.hashsalt": "lora-lab",  # the same figure gives the same bytes
        "axes.prop_cycle": _cycle(),
    }


class style:
    """Set the plotting style: `style("projector")` for the rest of the notebook, or `with style("dark"):` for a few lines.

    mode  auto: neutral colours follow the page's theme · light, dark: fixed colours, with a paper of their own
          projector: as auto, with type and lines half as large again
    The mode to begin with comes from the environment variable LORA_LAB_STYLE. Raises ValueError for another mode.
    """

    def __init__(self, mode: str | None = None):
        import matplotlib

        global _mode
        mode = _checked(mode or _mode)
        new = settings(mode)
        self._before = _mode, {key: matplotlib.rcParams[key] for key in new}
        matplotlib.rcParams.update(new)
        _mode = mode

    def __enter__(self):
        return self

    def __exit__(self, *error):
        import matplotlib

        global _mode
        _mode, params = self._before
        matplotlib.rcParams.update(params)


def new_figure(width: float = 7.0, height: float = 3.6):
    """An empty figure in the lab's style, in inches; it belongs to nobody, so nothing shows it behind your back."""
    from matplotlib.figure import Figure

    large = 1.25 if _mode == "projector" else 1.0
    return Figure(figsize=(width * large, height * large))


def show(figure, alt: str, caption: str | None = None) -> None:
    """Show a matplotlib figure as inline SVG that follows the theme of the page, and close it.

    alt      what the figure shows, in a sentence or two: screen readers say it, and outside a notebook it is printed
    caption  a line below the figure, if wanted

    Raises ValueError when alt is empty, and TypeError when `figure` is no matplotlib figure.
    """
    from IPython.display import display

    text = _checked_alt(alt)
    figure = _checked_figure(figure)
    page = f'<figure style="margin: 0.4em 0">{to_svg(figure, text)}'
    if caption:
        page += f'<figcaption style="font-size: 0.92em; max-width: 70ch">{html.escape(caption)}</figcaption>'
    _close(figure)
    display({"text/html": page + "</figure>", "text/plain": f"[figure: {text}]"}, raw=True)


def to_svg(figure, alt: str, theme: str | None = None) -> str:
    """The figure as one `<svg>` element for a page: its neutral colours replaced, its ids like no other's, its alt text said.

    theme  auto, light or dark; None: what the mode in force says
    """
    import matplotlib

    theme = theme or (_mode if _mode in THEMES else "auto")
    buffer = io.StringIO()
    with matplotlib.rc_context(settings()):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # matplotlib's `* { stroke-linejoin: round }` would hold for the whole page; as a property of the figure it is inherited.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.S)

    # Two figures on one page must not take each other's clip paths, so every id gets a prefix that is new each time.
    prefix = "f" + hashlib.sha256(f"{next(_shown)} {svg}".encode()).hexdigest()[:10] + "-"
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"font-family: [^;\"]*(?:sans-serif|'DejaVu Sans')", f"font-family: {FONT}", svg)
    for sentinel, colour in THEMES[theme].items():
        svg = svg.replace(sentinel, colour)  # base64 has no '#', so images are left alone
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1]) * 96 / 72
    look = f"width: {width:.0f}px; max-width: 100%; height: auto; stroke-linejoin: round"
    if theme != "auto":
        look += f"; background: {THEMES[theme][PAPER]}; border-radius: 4px"
    svg = re.sub(r'height="[\d.]+pt" ?', "", svg, count=1)
    return re.sub(r'width="[\d.]+pt"', f'role="img" aria-label="{html.escape(alt)}" style="{look}"', svg, count=1)


def save_png(figure, path, theme: str = "light", dpi: int = 160) -> Path:
    """Save a figure drawn in the lab's style as PNG, in the colours of `theme` ("light" or "dark"). Returns the path."""
    from matplotlib.colors import to_hex

    if theme not in ("light", "dark"):
        raise ValueError(f'a PNG cannot follow the page: theme is "light" or "dark"; found {theme!r}')
    figure.draw_without_rendering()  # ticks come into being when they are drawn
    colours = THEMES[theme]
    for artist in figure.findobj():
        for part in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            if not hasattr(artist, f"get_{part}") or not hasattr(artist, f"set_{part}"):
                continue
            found = getattr(artist, f"get_{part}")()
            try:
                single = to_hex(found)
            except (TypeError, ValueError):  # collections keep an array of colours
                continue
            if single in colours:
                getattr(artist, f"set_{part}")(colours[single])
    figure.savefig(path, dpi=dpi, facecolor=colours[PAPER])
    return Path(path)


def _cycle():
    from cycler import cycler

    return cycler(color=COLOURS) + cycler(linestyle=DASHES)


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"the plotting style is one of {', '.join(MODES)}; found {mode!r} (LORA_LAB_STYLE, or style(...))")
    return mode


def _checked_alt(alt: str) -> str:
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(
            f"show(figure, alt=...) needs a sentence that says what the figure shows, for readers who cannot see it; found {alt!r}"
        )
    return " ".join(alt.split())


def _checked_figure(figure):
    from matplotlib.figure import Figure

    if not isinstance(figure, Figure):
        found = type(figure).__name__
        raise TypeError(f"show takes a matplotlib figure; found {found}. With axes in hand, pass ax.figure")
    return figure


def _close(figure) -> None:
    import sys

    pyplot = sys.modules.get("matplotlib.pyplot")  # a figure made without pyplot has nothing to close
    if pyplot is not None:
        pyplot.close(figure)
