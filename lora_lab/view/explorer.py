"""Photographs as matrices: `rank_explorer`, a slider for the rank, and `plot_photographs`, which puts pictures side by side.

The one computation made here is the rank-r picture, a product of two thin matrices per redraw: the SVD is taken once, when the
explorer is made. Pictures travel as JPEG inside the HTML, about 100 kB a step, so that a step is quick over a network too.
"""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np

from lora_lab.counting import breakeven_rank, lora_parameters
from lora_lab.view.figures import _styled
from lora_lab.view.style import COLOURS, FONT, GRID, INK, MUTED, PAPER, THEMES, new_figure
from lora_lab.view.widgets import Redrawn, headless, live_box

BYTES = 4  # a number stored as float32
WIDE, HIGH = 340, 250  # of the chart, in CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 28, 40  # its margins
STOPS = (1, 2, 5, 10, 20, 50, 100, 200)  # the ranks of the twin that stands still
AUTO = THEMES["auto"]


def rank_explorer(image, r: int = 10, name: str = "the photograph") -> "RankExplorer":
    """A picture at rank r, and a slider for r: error, energy, bytes, and where the cut lies in the spectrum. A cell's last expression.

    image  (m, n), grey, from 0 (black) to 1 (white); an array or a tensor
    r      the rank to begin with, 1 to min(m, n)
    name   what the picture shows, for those who cannot see it

    With U, S, Vh the SVD of the image, rank r shows sum over i <= r of S_i u_i v_i^T. Relative error: ||image - rank r|| / ||image||,
    Frobenius norms. Energy: the share of the sum of squares that is kept, 1 - error^2. Bytes: r (m + n) numbers of 4 bytes.

    Raises ValueError for another shape, values outside 0 to 1 or not finite, and an r out of range.
    """
    return RankExplorer(image, r, name)


class RankExplorer(Redrawn):
    """A slider and the picture it changes; display it, or read `r`, `text` and `error` in a test."""

    def __init__(self, image, r: int = 10, name: str = "the photograph"):
        image = _checked_image(image)
        self.shape, self.name = image.shape, name
        U, S, Vh = np.linalg.svd(image, full_matrices=False)
        if not 1 <= r <= len(S):
            raise ValueError(f"r goes from 1 to {len(S)} for a picture of {image.shape[0]} x {image.shape[1]}; found {r}")
        self.S, self.r = S, int(r)
        self.U, self.SVh = U.astype(np.float32), (S[:, None] * Vh).astype(np.float32)
        tail = np.cumsum((S**2)[::-1])[::-1]  # summed from the small end, so that small errors keep their digits
        self.errors = np.sqrt(np.append(tail, 0.0)[1:] / (tail[0] or 1.0))  # errors[r - 1] belongs to rank r
        self.breakeven = breakeven_rank(*image.shape)
        self.error: str | None = None
        self.text = ""
        self.slider = None

    def frame(self, r: int) -> np.ndarray:
        """The picture at rank r, (m, n) bytes, 0 to 255: what lies outside black and white is clipped, on the screen only."""
        return np.rint(255 * np.clip(self.U[:, :r] @ self.SVh[:r], 0, 1)).astype(np.uint8)

    def row(self, r: int) -> tuple[str, ...]:
        """Rank r in figures, as texts: (numbers, kB, share of the picture's own numbers, relative error, energy)."""
        numbers = lora_parameters(*self.shape, r)
        share, error = numbers / (self.shape[0] * self.shape[1]), float(self.errors[r - 1])
        return f"{numbers:,}", f"{numbers * BYTES / 1000:,.1f} kB", f"{share:.1%}", f"{error:.2%}", f"{1 - error**2:.2%}"

    def says(self, r: int) -> str:
        """One sentence on rank r: what the status line reads out."""
        _, size, share, error, energy = self.row(r)
        cost = f"{size}, {share} of the picture's own"
        more = ", more than the picture itself" if r > self.breakeven else ""
        return f"Rank {r} of {len(self.S)}: relative error {error}, energy {energy}; {cost}{more}."

    def page(self, r: int) -> str:
        """Picture and chart at rank r, as HTML."""
        return (
            '<div style="display: flex; flex-wrap: wrap; gap: 12px 24px; align-items: flex-start">'
            f'<div style="flex: 3 1 320px; max-width: {self.shape[1]}px">'
            f"{_img(self.frame(r), f'{self.name} at rank {r}')}</div>"
            f'<div style="flex: 2 1 260px; max-width: 420px">{self.chart(r)}{self._figures(r)}</div></div>'
        )

    def chart(self, r: int) -> str:
        """The spectrum on a logarithmic axis, the part that is kept filled, the cut marked; inline SVG in the page's colours."""
        k, top = len(self.S), max(float(self.S[0]), 1e-300)
        smallest = float(self.S[-1]) / top
        decades = int(np.ceil(-np.log10(smallest))) if 1e-5 < smallest < 1 else 5
        plot_w, base = WIDE - LEFT - RIGHT, HIGH - BOTTOM

        def across(number):  # both axes are logarithmic: the first ranks matter most
            return LEFT + plot_w * np.log(number) / np.log(k + 1)

        def down(share):
            return TOP + (base - TOP) * np.clip(-np.log10(np.maximum(share, 1e-300)) / decades, 0, 1)

        x, y = across(np.arange(1, k + 1)), down(self.S / top)
        cut, even = across((r * (r + 1)) ** 0.5 if r < k else k + 1), across(min(max(self.breakeven, 1), k))
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        kept = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[:r], y[:r], strict=True))
        grid = "".join(
            f'<path d="M{LEFT} {at:.1f}H{WIDE - RIGHT}" stroke="{AUTO[GRID]}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_power(-d)}</text>'
            for d in range(decades + 1)
            for at in [TOP + d / decades * (base - TOP)]
        )
        ticks = "".join(
            f'<path d="M{across(i):.1f} {base}v4" stroke="{AUTO[MUTED]}"/>'
            f'<text x="{across(i):.1f}" y="{base + 16}" text-anchor="middle">{i}</text>'
            for i in (1, 10, 100, 1000)
            if i <= k and abs(across(i) - even) > 26  # room for the label of the break-even
        )
        alt = f"The spectrum of {self.name}: {k} singular values, falling; the cut stands after the first {r}."
        strong = f"font-weight: 600; fill: {AUTO[INK]}"
        side = ("end", -6) if cut > LEFT + 0.6 * plot_w else ("start", 6)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(alt)}" viewBox="0 0 {WIDE} {HIGH}" '
            f'style="display: block; width: 100%; font: 12px {FONT}; fill: {AUTO[MUTED]}" fill-rule="evenodd">'
            f'<text x="{LEFT - 34}" y="12" style="{strong}">singular values, relative to the largest</text>{grid}{ticks}'
            f'<polygon points="{LEFT},{base} {kept} {cut:.1f},{y[r - 1]:.1f} {cut:.1f},{base}" fill="{COLOURS[0]}" fill-opacity="0.3"/>'
            f'<path d="M{even:.1f} {base - 62}V{base + 4}" stroke="{AUTO[MUTED]}" stroke-dasharray="2 4"/>'
            f'<text x="{even:.1f}" y="{base + 16}" text-anchor="middle">{self.breakeven:.0f}</text>'
            f'<polyline points="{line}" fill="none" stroke="{AUTO[MUTED]}" stroke-width="1.5"/>'
            f'<polyline points="{kept}" fill="none" stroke="{COLOURS[0]}" stroke-width="2.5"/>'
            f'<path d="M{cut:.1f} {TOP}V{base}" stroke="{COLOURS[1]}" stroke-width="2.5"/>'
            f'<text x="{cut + side[1]:.1f}" y="{TOP + 13}" text-anchor="{side[0]}" style="{strong}">r = {r}</text>'
            f'<text x="{LEFT}" y="{HIGH - 4}">number of the singular value</text>'
            f'<text x="{WIDE - 2}" y="{HIGH - 4}" text-anchor="end">break-even</text></svg>'
        )

    def _figures(self, r: int) -> str:
        numbers, size, share, error, energy = self.row(r)
        whole = f"{self.shape[0] * self.shape[1] * BYTES / 1000:,.1f} kB"
        rows = (
            ("relative error", error, ""),
            ("energy kept", energy, ""),
            ("stored", size, f"{share} of {whole}"),
            ("numbers", numbers, f"{r} · ({self.shape[0]} + {self.shape[1]})"),
        )
        cells = "".join(
            f'<span style="color: {AUTO[MUTED]}">{name}</span><b style="text-align: right; font-variant-numeric: tabular-nums">{value}</b>'
            f'<span style="color: {AUTO[MUTED]}">{note}</span>'
            for name, value, note in rows
        )
        return (
            f'<div style="display: grid; grid-template-columns: auto auto 1fr; gap: 2px 12px; line-height: 1.5; margin-top: 6px; '
            f'color: {AUTO[INK]}">{cells}</div>'
        )

    def widget(self):
        """The ipywidgets box. Made once; all displays of it move together."""
        import ipywidgets as widgets

        if self.picture is None:
            self.fields()
            self.slider = widgets.IntSlider(
                value=self.r, min=1, max=len(self.S), description="rank r",
                tooltip=f"how many singular values of {len(self.S)} are kept; arrow keys move it by one, page keys by more",
                layout=widgets.Layout(width="100%", max_width="640px"), style={"description_width": "4em"},
            )  # fmt: skip
            self.slider.observe(lambda change: self.set(change["new"]), names="value")
            self.redraw()
        return live_box(self.slider, self.picture, self.words, self.trouble)

    def set(self, r: int) -> None:
        """Set the rank and redraw."""
        self.r = int(r)
        self.redraw()

    def drawn(self) -> tuple[str, str]:
        return self.page(self.r), self.says(self.r)

    def _stops(self) -> list[int]:
        return [r for r in STOPS if r < len(self.S)] + [len(self.S)]

    def still(self) -> str:
        """The twin that stands still, as HTML: pictures at some ranks, the spectrum, a table; folded below the slider where that works."""
        shown = [r for r in self._stops() if r in (1, 2, 5, 20, 50, len(self.S))]
        pictures = "".join(
            f'<figure style="margin: 0">{_img(self.frame(r), f"{self.name} at rank {r}", quality=80)}'
            f'<figcaption style="color: {AUTO[MUTED]}">rank {r}: relative error {self.row(r)[3]}</figcaption></figure>'
            for r in shown
        )
        cell = "<td style='text-align: right'>{}</td>".format
        table = "".join(f"<tr><th scope='row'>{r}</th>{''.join(map(cell, self.row(r)))}</tr>" for r in self._stops())
        head = "".join(f"<th scope='col'>{name}</th>" for name in ("rank r", "numbers", "stored", "of the picture", "error", "energy"))
        body = (
            '<div style="display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; max-width: 860px">'
            f"{pictures}</div>"
            f'<div style="display: flex; flex-wrap: wrap; gap: 12px 32px; align-items: flex-start; margin-top: 12px">'
            f'<div style="flex: 0 1 420px">{self.chart(self.r)}</div>'
            f"<table><thead><tr>{head}</tr></thead><tbody>{table}</tbody></table></div>"
        )
        if headless():
            return f"<div>{body}</div>"
        return f"<details><summary>The same as pictures that stand still, with a table</summary>{body}</details>"

    def __repr__(self):
        return "\n".join(f"[live view of {self.name}] {self.says(r)}" for r in self._stops())


@_styled
def plot_photographs(panels: Sequence, *, title: str = "", width: float = 10.0):
    """Pictures side by side at one scale, each with a name above and what was measured below, as a matplotlib figure for `show`.

    panels  (name, image, caption), image (m, n) grey or (m, n, 3) RGB, all of one m x n, black 0 to white 1; what lies outside is
            clipped on the screen. A caption may have several lines
    width   of the figure, in inches
    """
    panels = [(name, np.asarray(image, dtype=float), caption) for name, image, caption in panels]
    sizes = {image.shape[:2] for _, image, _ in panels}
    if len(sizes) != 1 or any(image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) for _, image, _ in panels):
        raise ValueError(f"plot_photographs needs pictures (m, n) or (m, n, 3) of one size; found {[p[1].shape for p in panels]}")
    (m, n), gap = sizes.pop(), 0.14  # inches, between the pictures and around them
    each = (width - gap * (len(panels) + 1)) / len(panels)
    above = 0.32 + 0.34 * bool(title)
    below = 0.14 + 0.21 * max(caption.count("\n") + 1 for _, _, caption in panels)
    figure = new_figure(width, high := each * m / n + above + below)
    figure.set_layout_engine("none")
    figure.set_dpi(200)  # dots per inch of the pictures inside an SVG: sharp on a screen with two dots per pixel
    large = figure.get_figwidth() / width  # the projector style enlarges all
    for i, (name, image, caption) in enumerate(panels):
        place = (gap + i * (each + gap)) / width, below / high, each / width, each * m / n / high
        axes = figure.add_axes(place)
        axes.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="lanczos", aspect="auto")
        axes.axis("off")
        look = dict(xycoords="axes fraction", textcoords="offset points", ha="left")
        axes.annotate(name, (0, 1), (0, 6), va="bottom", fontweight="bold", color=INK, **look)
        axes.annotate(caption, (0, 0), (0, -6), va="top", fontsize=large * 9.5, linespacing=1.4, color=INK, **look)
    if title:
        figure.text(gap / width, 1 - 0.08 / high, title, va="top", fontsize="large", fontweight="bold", color=INK)
    return figure


def _img(pixels: np.ndarray, alt: str, quality: int = 92) -> str:
    """Pixels (m, n), bytes -> an <img> that keeps its place while it loads. 92: artefacts too small to be taken for those of the rank."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=quality)
    data, (m, n) = base64.b64encode(buffer.getvalue()).decode("ascii"), pixels.shape
    # decoded before it is painted: without it the old picture flickers away
    return (
        f'<img alt="{html.escape(alt)}" width="{n}" height="{m}" decoding="sync" src="data:image/jpeg;base64,{data}" '
        f'style="display: block; width: 100%; height: auto; border-radius: 2px; background: {AUTO[PAPER]}">'
    )


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f'10<tspan dy="-4" font-size="9">−{-exponent}</tspan>'


def _checked_image(image) -> np.ndarray:
    image = np.asarray(image, dtype=np.float64)
    if image.ndim != 2 or image.size == 0:
        raise ValueError(f"rank_explorer needs a grey picture, (m, n); found shape {image.shape}. A colour picture: image.mean(2)")
    if not np.isfinite(image).all():
        raise ValueError("rank_explorer needs finite values; found NaN or infinity")
    if image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"rank_explorer needs values from 0 (black) to 1 (white); found {image.min():g} to {image.max():g}. From bytes: image / 255"
        )
    return image
