"""Cards: what check, hint, use, predict and progress show. HTML in a notebook, the same as plain text elsewhere.

A card never relies on colour alone: each has an icon and a word. Colours come from the page (text is inherited,
backgrounds are see-through), so that it reads in light and dark themes, in JupyterLab, VS Code, Colab and exported pages.
Styles stand inline, because an exported or sanitised page keeps these and drops style sheets.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from .records import MIME

# kind -> (icon, accent). White on each accent has a contrast of at least 4.5; no pair differs by red and green alone.
KINDS = {
    "passed": ("✓", "#00705a"),
    "failed": ("✗", "#a8480a"),
    "todo": ("○", "#5b6570"),
    "hint": ("?", "#0a5fa5"),
    "predict": ("◆", "#7b3f9c"),
    "info": ("i", "#5b6570"),
    "notice": ("!", "#8a5a00"),
}
_FONT = "var(--jp-content-font-family, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif)"
_CODE = "var(--jp-code-font-family, ui-monospace, Menlo, Consolas, monospace)"
_TEXT = "var(--jp-content-font-color1, var(--vscode-foreground, inherit))"
WIDTH = 88


@dataclass(frozen=True)
class Block:
    """One part of a card. kind: "text", "strong", "quiet", "code", "mark" (the one thing to read, with a label),
    "rows" (label, text), "table" (rows of cells, the first is the head), "picture" (an <svg> of ours, `label` says it in words) or
    "link" (`content`: an address whose file is downloaded under the name `label`; on a page alone)."""

    kind: str
    content: str | Sequence
    label: str = ""


@dataclass(frozen=True)
class Card:
    kind: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)

    def html(self) -> str:
        icon, accent = KINDS[self.kind]
        body = "".join(_html_block(block, accent) for block in self.blocks)
        return (
            f'<div role="status" style="font-family:{_FONT};color:{_TEXT};font-size:14px;line-height:1.5;'
            f'max-width:52em;margin:6px 0;padding:10px 14px;border-left:4px solid {accent};'
            f'border-radius:3px;background:rgba(128,138,150,.10)">'
            f'<div style="display:flex;align-items:center;gap:9px">'
            f'<span aria-hidden="true" style="flex:none;width:20px;height:20px;border-radius:50%;'
            f'background:{accent};color:#fff;font-size:13px;font-weight:700;line-height:20px;text-align:center">'
            f'{icon}</span><span style="font-weight:600">{_inline(self.title)}</span></div>{body}</div>'
        )

    def text(self) -> str:
        icon, _ = KINDS[self.kind]
        parts = [_wrap(f"{icon} {self.title}", "  ", ""), *(_text_block(block) for block in self.blocks)]
        return "\n".join(part for part in parts if part)


def show(card: Card, record: dict | None = None) -> None:
    """Into the cell's output with its record, or printed where there is no notebook."""
    if in_notebook():
        from IPython.display import display

        data = {"text/html": card.html(), "text/plain": card.text()}
        if record is not None:
            data[MIME] = record
        display(data, raw=True)
    else:
        print(card.text())


def in_notebook() -> bool:
    """Whether a kernel runs this code. Does not import IPython where nobody has."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


def _html_block(block: Block, accent: str) -> str:
    if block.kind == "rows":
        width = 0.6 * max((len(label) for label, _ in block.content), default=0) + 0.5
        rows = "".join(
            f'<div style="display:flex;gap:10px"><span style="flex:none;width:{width}em;opacity:.75">{escape(label)}</span>'
            f'<span style="min-width:0;overflow-wrap:anywhere">{_inline(text)}</span></div>'
            for label, text in block.content
        )
        return f'<div style="margin-top:7px">{rows}</div>'
    if block.kind == "table":
        return _html_table(block.content)
    if block.kind == "picture":
        return f'<div style="margin-top:9px">{block.content}</div>'
    if block.kind == "link":
        # `download`: JupyterLab would otherwise take the click and open the address itself.
        return (f'<div style="margin-top:9px"><a download="{escape(block.label)}" href="{escape(str(block.content))}" style="display:inline-block;'
                f'padding:5px 14px;border-radius:3px;background:{accent};color:#fff;font-weight:600;text-decoration:none">'
                f'Download {escape(block.label)}</a></div>')
    if block.kind == "code":
        return (f'<pre style="font-family:{_CODE};font-size:13px;line-height:1.45;margin:7px 0 0;padding:6px 10px;'
                f'background:rgba(128,138,150,.14);color:inherit;border-radius:3px;white-space:pre-wrap;'
                f'overflow-wrap:anywhere">{escape(str(block.content))}</pre>')
    style = {
        "text": "margin-top:7px",
        "strong": "margin-top:7px;font-weight:600",
        "quiet": "margin-top:7px;font-size:13px;opacity:.8",
        "mark": f"margin-top:9px;padding:7px 11px;border:1px solid {accent};border-radius:3px;"
                f"background:rgba(128,138,150,.12)",
    }[block.kind]
    # pre-wrap: a hint may hold lines of code, whose indentation counts
    label = f'<div style="font-weight:600;margin-bottom:1px">{escape(block.label)}</div>' if block.label else ""
    return f'<div style="{style};white-space:pre-wrap;overflow-wrap:anywhere">{label}{_inline(block.content)}</div>'


def strip_of_answers(answers: Sequence[tuple[float, bool]], alt: str) -> str:
    """One dot for each (sure, right), above the axis if it came true, below if not; a line at the mean confidence, one at the share of
    true ones. Few answers are shown as what they are: no curve is drawn through them."""
    # Not the card's accent, which carries white text and is too dark for a dot on a dark page: this one has 3.4:1 on both papers.
    accent, left, width, size = "#a648bf", 96, 360, 11
    places, tallest, seen = [], {True: 1, False: 1}, {}
    for sure, right in sorted(answers):
        column = round(sure * width / size), right
        seen[column] = seen.get(column, 0) + 1
        tallest[right] = max(tallest[right], seen[column])
        places.append((left + sure * width, right, seen[column]))
    axis = 22 + tallest[True] * size
    bottom = axis + 6 + tallest[False] * size
    mean, share = (sum(value[n] for value in answers) / len(answers) for n in (0, 1))
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{axis - n * size + 2 if right else axis + n * size - 2}" r="4.2" '
        + (f'fill="{accent}" stroke="{accent}"/>' if right else f'fill="none" stroke="{accent}" stroke-width="2"/>')
        for x, right, n in places
    )
    ticks = "".join(
        f'<text x="{left + value / 100 * width}" y="{bottom + 16}" text-anchor="middle" opacity=".75">{value} %</text>' for value in (0, 25, 50, 75, 100)
    )
    # The two words stand on the outer sides of their lines, so that they never cover each other.
    marks = "".join(
        f'<line x1="{left + at * width:.1f}" x2="{left + at * width:.1f}" y1="16" y2="{bottom}" stroke="currentColor" stroke-width="1.5"{dash}/>'
        f'<text x="{left + at * width + (4 if after else -4):.1f}" y="12" text-anchor="{"start" if after else "end"}">{word}</text>'
        for at, word, dash, after in ((mean, "said", ' stroke-dasharray="4 3"', mean >= share), (share, "true", "", mean < share))
    )
    return (
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {left + width + 40} {bottom + 22}" style="width:{left + width + 40}px;max-width:100%;'
        f'height:auto;font-size:12px" fill="currentColor" font-family="system-ui, sans-serif">'
        f'<line x1="{left}" x2="{left + width}" y1="{axis + 1}" y2="{axis + 1}" stroke="currentColor" opacity=".45"/>'
        f'<text x="{left - 10}" y="{axis - 3}" text-anchor="end">came true</text>'
        f'<text x="{left - 10}" y="{axis + 13}" text-anchor="end">did not</text>{marks}{dots}{ticks}</svg>'
    )


def _html_table(rows) -> str:
    head, *body = rows
    cell = "padding:3px 12px 3px 0;text-align:left;vertical-align:top;border:0;background:none;white-space:normal"
    top = "".join(f'<th scope="col" style="{cell};font-weight:600;opacity:.75">{escape(str(h))}</th>' for h in head)
    lines = "".join(
        '<tr style="background:none;border-top:1px solid rgba(128,138,150,.35)">'
        + "".join(f'<td style="{cell}">{_inline(str(value))}</td>' for value in row) + "</tr>" for row in body
    )
    return (f'<table style="margin:8px 0 2px;border-collapse:collapse;border:0;font-size:13px;color:inherit">'
            f'<thead><tr style="background:none">{top}</tr></thead><tbody>{lines}</tbody></table>')


def _inline(text) -> str:
    """Escaped, with `code` in backticks set as code."""
    parts = str(text).split("`")
    if len(parts) % 2 == 0:                # an odd number of backticks: leave them alone
        return escape(str(text))
    code = f'<code style="font-family:{_CODE};font-size:.93em;background:rgba(128,138,150,.18);color:inherit;' \
           f'padding:1px 4px;border-radius:3px">'
    return "".join(f"{code}{escape(part)}</code>" if n % 2 else escape(part) for n, part in enumerate(parts))


def _text_block(block: Block) -> str:
    if block.kind == "rows":
        width = max((len(label) for label, _ in block.content), default=0) + 1
        return "\n".join(_wrap(f"{label + ':':<{width}} {text}", " " * (width + 3)) for label, text in block.content)
    if block.kind == "table":
        widths = [max(len(str(row[n])) for row in block.content) for n in range(len(block.content[0]))]
        lines = ["  " + "  ".join(f"{value!s:<{width}}" for value, width in zip(row, widths, strict=True)).rstrip()
                 for row in block.content]
        return "\n".join([lines[0], "  " + "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])
    if block.kind == "picture":
        return _wrap(block.label, "  ")
    if block.kind == "link":
        return ""
    if block.kind == "code":
        return textwrap.indent(str(block.content), "    ")
    if block.kind == "mark":
        return _wrap(f"{block.label}: {block.content}" if block.label else str(block.content), "     ", "  -> ")
    return _wrap(str(block.content), "  ")


def _wrap(text: str, indent: str, first: str = "  ") -> str:
    lines = []
    for n, line in enumerate(text.split("\n")):
        lines.append(textwrap.fill(line, WIDTH, initial_indent=first if n == 0 else indent, subsequent_indent=indent,
                                   break_long_words=False, break_on_hyphens=False))
    return "\n".join(lines)
