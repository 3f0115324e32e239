"""Rows of text as a table: aligned for a terminal, or as HTML that takes its colours from the page. The first row is the head, the first column names."""

import html
from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, names on the left, all else on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)


def html_table(rows: Sequence[Sequence[str]], caption: str = "", notes: Sequence[str] = ()) -> str:
    """The same for a notebook. caption stands above, notes below, a paragraph each; everything is escaped."""

    def cell(tag, text, k, more=""):
        style = f"padding: 0.15em 0.7em; text-align: {'left' if k == 0 else 'right'}; white-space: nowrap{more}"
        return f'<{tag} style="{style}">{html.escape(text)}</{tag.split()[0]}>'

    head, *body = rows
    lines = "".join(
        "<tr>" + cell('th scope="row"', row[0], 0, "; font-weight: normal") + "".join(cell("td", text, k) for k, text in enumerate(row[1:], 1)) + "</tr>"
        for row in body
    )
    above = f'<caption style="text-align: left; padding: 0.3em 0.7em">{html.escape(caption)}</caption>' if caption else ""
    below = "".join(f'<p style="max-width: 76ch; margin: 0.3em 0">{html.escape(text)}</p>' for text in notes)
    columns = "".join(cell('th scope="col"', text, k) for k, text in enumerate(head))
    return (
        '<div style="overflow-x: auto"><table style="font-variant-numeric: tabular-nums; border-collapse: collapse; margin: 0.3em 0">'
        f"{above}<thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table>{below}</div>"
    )
