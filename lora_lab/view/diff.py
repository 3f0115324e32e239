"""Lab 12's cards: a variant as the lines that differ from LoRA's, and a picture of which part of a LoRA layer each variant changes.

In a card a line's sign stands before it and its changed words are underlined, so that nothing hangs on colour; what is selected and
copied is the code without the signs.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from html import escape

from lora_lab.diffs import PARTS, VARIANTS, changed, diff, equation, variant
from lora_lab.view.figures import _styled
from lora_lab.view.style import COLOURS, GRID, INK, MUTED, new_figure, settings

CHANGES = {"scaling": "the scaling", "training": "how A and B are trained", "start": "where A and B start", "layer": "the layer", "base": "the frozen weight"}
HIDDEN = "# left out here: yours to write"
COMES, GOES = (0, 155, 151), (185, 105, 12)  # teal and rust of the figures: apart for colour-blind readers, too
_FONT = "var(--jp-content-font-family, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif)"
_CODE = "var(--jp-code-font-family, ui-monospace, Menlo, Consolas, monospace)"
_TEXT = "var(--jp-content-font-color1, var(--vscode-foreground, inherit))"


def show_diff(keys: str | Sequence[str], hide: str | Sequence[str] = ()) -> None:
    """Show what a variant changes in LoRA's code: show_diff("dora"), or several, of which the first is open: show_diff(["rslora", "lora_fa"]).

    keys  of `lora_lab.diffs.VARIANTS`
    hide  names of functions whose lines are left out, because a reader is to write them: show_diff("dora", hide="merged")

    Outside a notebook the same is printed as text. Raises KeyError for a variant, ValueError for a function that is not there.
    """
    from IPython.display import display

    keys, hide = ([names] if isinstance(names, str) else list(names) for names in (keys, hide))
    if not keys:
        raise ValueError(f"show_diff needs a variant: {', '.join(v.key for v in VARIANTS)}")
    display(Diffs({key: without(diff(key), hide) for key in keys}))


class Diffs:
    """What `show_diff` shows: HTML in a notebook, text elsewhere."""

    def __init__(self, diffs: dict[str, list[tuple[str, str]]]):
        self.diffs = diffs

    def _repr_html_(self) -> str:
        several = len(self.diffs) > 1
        return "".join(_card(key, lines, folded=several, opened=not n) for n, (key, lines) in enumerate(self.diffs.items()))

    def __repr__(self) -> str:
        return "\n\n".join(
            "\n".join([_headline(key), "  " + variant(key).idea, "  " + equation(key), "", *(f"  {sign} {line}".rstrip() for sign, line in lines)])
            for key, lines in self.diffs.items()
        )


def without(lines: Iterable[tuple[str, str]], names: Iterable[str]) -> list[tuple[str, str]]:
    """The diff with the bodies of these functions left out. Raises ValueError for a function that is not in it."""
    names, kept, found, inside = set(names), [], set(), None
    for sign, line in lines:
        if not line:
            inside = None
        if inside is None:
            kept.append((sign, line))
            defined = re.match(r"( *)def (\w+)\(", line)
            if defined and defined[2] in names:
                inside = defined[2]
                found.add(inside)
                kept.append((" ", f"{defined[1]}    {HIDDEN}"))
    if names - found:
        raise ValueError(f"asked to leave out {', '.join(sorted(names - found))}, which this diff does not show")
    return kept


def _headline(key: str) -> str:
    """DoRA changes the layer: +8 −2 lines (arXiv 2402.09353)"""
    came, went = changed(key)
    about = variant(key)
    return f"{about.name} changes {CHANGES[about.where]}: +{came} −{went} lines (arXiv {about.arxiv})"


def _card(key: str, lines, folded: bool, opened: bool) -> str:
    about, (came, went), size = variant(key), changed(key), 1.4 * settings()["font.size"]
    accent = COLOURS[PARTS.index(about.where)]
    head = (
        f'<span style="font-weight:600">{about.name}</span> changes {CHANGES[about.where]} '
        f'<span style="white-space:nowrap;font-family:{_CODE};font-size:.93em">'
        f'<span style="{_tint(COMES, 0.2)};padding:1px 5px;border-radius:3px">+{came}</span> '
        f'<span style="{_tint(GOES, 0.2)};padding:1px 5px;border-radius:3px">−{went}</span></span> lines'
    )
    body = (
        f'<div style="margin-top:5px">{escape(about.idea)} <span style="opacity:.8;font-size:.93em;white-space:nowrap">arXiv {about.arxiv}</span></div>'
        f'<div style="margin-top:5px;font-family:{_CODE};font-size:.93em;overflow-wrap:anywhere">{escape(equation(key))}</div>'
        # The box can be scrolled with the keyboard, too, for which it must be able to have the focus.
        f'<div role="region" tabindex="0" aria-label="{about.name}: lines of code that differ from LoRA" style="margin-top:9px;overflow-x:auto;'
        f'border:1px solid rgba(128,138,150,.35);border-radius:3px;font-family:{_CODE};font-size:.93em;line-height:1.45">'
        f'<div style="display:inline-block;min-width:100%">{_lines(lines)}</div></div>'
    )
    box = (
        f"font-family:{_FONT};color:{_TEXT};font-size:{size:g}px;line-height:1.5;max-width:60em;margin:6px 0;padding:10px 14px;"
        f"border-left:4px solid {accent};border-radius:3px;background:rgba(128,138,150,.10)"
    )
    if not folded:
        return f'<div style="{box}"><div>{head}</div>{body}</div>'
    return f'<details style="{box}"{" open" if opened else ""}><summary style="cursor:pointer">{head}</summary>{body}</details>'


def _lines(lines: Sequence[tuple[str, str]]) -> str:
    return "".join(_line(sign, line, words) for (sign, line), words in zip(lines, _marked(lines), strict=True))


def _line(sign: str, line: str, words: list[tuple[str, bool]]) -> str:
    tag, colour, edge = {"+": ("ins", COMES, "solid"), "-": ("del", GOES, "dashed"), " ": ("div", None, "solid")}[sign]
    rgb = ",".join(map(str, colour or ()))
    text = "".join(
        f'<span style="{_tint(colour, 0.3)};border-bottom:2px solid rgb({rgb})">{escape(word)}</span>' if differs else escape(word) for word, differs in words
    )
    comment = line.removeprefix(_code(line))
    if comment:
        text += f'<span style="opacity:.75;font-style:italic">{escape(comment)}</span>'
    box = f"{_tint(colour, 0.14)};border-left:4px {edge} rgb({rgb})" if colour else "border-left:4px solid transparent"
    # Signs are no part of what is copied.
    mark = f'<span style="display:inline-block;width:1.7em;text-align:center;font-weight:700;user-select:none">{sign.replace("-", "−").strip()}</span>'
    style = f"display:block;text-decoration:none;color:inherit;white-space:pre;padding-right:12px;min-height:1.45em;{box}"
    return f'<{tag} style="{style}">{mark}{text or " "}</{tag}>'  # a space: an empty line is copied, too


def _tint(colour, share: float) -> str:
    """See-through, so that the page's own paper and text decide on light or dark."""
    return f"background:rgba({','.join(map(str, colour))},{share:g})"


def _marked(lines: Sequence[tuple[str, str]]) -> list[list[tuple[str, bool]]]:
    """Each line's code as (words, whether they differ): of a line that went and the most similar one that came in its place what differs is marked."""
    marked = [[(_code(line), False)] for _, line in lines]
    n = 0
    while n < len(lines):
        went = n
        while n < len(lines) and lines[n][0] == "-":
            n += 1
        came = n
        while n < len(lines) and lines[n][0] == "+":
            n += 1
        first = came  # pairs stand in the same order on both sides
        for old in range(went, came):
            alike = {new: _alike(lines[old][1], lines[new][1]) for new in range(first, n)}
            new = max(alike, key=alike.get, default=None)
            if new is not None and alike[new] > 0.6:  # below it is another line, not the same one changed
                marked[old], marked[new] = _parts(_matcher(lines[old][1], lines[new][1]))
                first = new + 1
        n = max(n, went + 1)
    return marked


def _alike(old: str, new: str) -> float:
    """Above 1 if both set the same name, else from 0 to 1 by the words that they share."""
    names = [text.partition(" = ")[0] for text in (old, new) if " = " in text]
    return _matcher(old, new).ratio() + (len(names) == 2 and names[0] == names[1])


def _matcher(old: str, new: str) -> difflib.SequenceMatcher:
    return difflib.SequenceMatcher(None, *(re.findall(r"[\w.]+|\s+|.", _code(text)) for text in (old, new)), autojunk=False)


def _code(line: str) -> str:
    """The line without its comment."""
    return re.sub(r"( {2,}|^ *)#.*", "", line)


def _parts(matcher: difflib.SequenceMatcher) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    sides = [], []
    for tag, a, b, c, d in matcher.get_opcodes():
        for side, words in zip(sides, (matcher.a[a:b], matcher.b[c:d]), strict=True):
            if words:
                side.append(("".join(words), tag != "equal"))
    return sides


@_styled
def plot_variants(title: str = "", width: float = 6.6, height: float = 5.4):
    """A LoRA layer from x (below) to h (above), with the name of each of the eleven variants at the part that it changes."""
    from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

    figure = new_figure(width, height)
    axes = figure.subplots()
    axes.set(xlim=(2, 66), ylim=(1, 53), aspect="equal")
    axes.axis("off")
    colour = dict(zip(PARTS, COLOURS, strict=True))
    large, drawn = "large", []

    def say(x, y, text, **options):
        axes.text(x, y, text, **{"ha": "center", "va": "center", "color": INK, "fontsize": large} | options)

    def arrow(*points, dashed=False):
        for a, b in zip(points, points[1:], strict=False):
            kind = dict(arrowstyle="-|>" if b == points[-1] else "-", linestyle=(0, (3, 2)) if dashed else "-", linewidth=1.4)
            axes.annotate("", b, a, arrowprops=dict(color=MUTED, shrinkA=0, shrinkB=0, **kind))

    def names(part, x, y, what, ha="left"):
        """The variants that change this part, those named in `what`, below what the part is called."""
        caption, *keys = what
        drawn.extend(keys)
        say(x, y, caption, ha=ha, color=MUTED, fontsize="medium")
        for n, key in enumerate(keys, 1):
            assert variant(key).where == part
            say(x, y - 2.6 * n, variant(key).name, ha=ha, fontweight="bold")

    # The frozen weight on the left, A and B beside it, their sum above: as in the first figure of LoRA's paper.
    axes.add_patch(Rectangle((3, 16), 18, 20, facecolor=GRID, edgecolor=colour["base"], linewidth=2))
    say(12, 31, "$W_0$", fontsize="xx-large")
    for name, low, corners in (("$A$", 16, (30, 46, 41, 35)), ("$B$", 28, (35, 41, 46, 30))):
        heights = (low, low, low + 8, low + 8)
        axes.add_patch(Polygon(list(zip(corners, heights, strict=True)), facecolor="none", edgecolor=colour["start"], linewidth=2))
        say(38, low + 4, name, fontsize="xx-large")
    for x, y, sign, part in ((38, 41, "×", "scaling"), (12, 45, "+", None)):
        axes.add_patch(Circle((x, y), 1.7, facecolor="none", edgecolor=colour.get(part, MUTED), linewidth=2 if part else 1.4))
        say(x, y - 0.1, sign)
    axes.add_patch(FancyBboxPatch((51, 28), 12, 8.4, boxstyle="round,pad=0.4", facecolor="none", edgecolor=colour["training"], linewidth=2))
    for points in (
        [(12, 3), (12, 16)], [(12, 9), (38, 9), (38, 16)], [(38, 24), (38, 28)], [(38, 36), (38, 39.3)], [(38, 42.7), (38, 45), (13.7, 45)],
        [(12, 36), (12, 43.3)], [(12, 46.7), (12, 52)],
    ):  # fmt: skip
        arrow(*points)
    arrow((50.6, 32), (43.8, 32), dashed=True)
    arrow((54, 27.6), (54, 22), (42.6, 22), dashed=True)
    say(9.5, 4.5, "$x$", fontsize="x-large")
    say(9.5, 51, "$h$", fontsize="x-large")
    for x, to, y, part in ((40.4, 43.6, 41, "scaling"), (45, 49, 17.6, "start"), (37.3, 33.6, 26, "layer"), (12.8, 16, 50, "layer")):
        axes.plot([x, to], [y, y], color=colour[part], linewidth=1.8, linestyle="-", marker="o", markevery=[0], markersize=5)
    names("base", 12, 24, ("frozen", "qlora"), ha="center")
    names("scaling", 44.4, 43.6, ("scaling: alpha / r", "rslora"))
    names("training", 57, 34.8, ("optimizer", "lora_plus", "lora_fa"), ha="center")
    names("start", 50, 17.6, ("start", "pissa", "olora", "eva"))
    names("layer", 32.6, 30.2, ("layer", "vera", "lora_xs", "adalora"), ha="right")
    names("layer", 16.8, 52, ("layer", "dora"))
    assert sorted(drawn) == sorted(v.key for v in VARIANTS)
    if title:
        figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize="large", color=INK)
    return figure
