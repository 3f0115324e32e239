"""Live views: ipywidgets around inline SVG, the same in JupyterLab, Colab, VS Code and Binder. Each has a twin that stands still.

LORA_LAB_HEADLESS=1 (papermill, print) shows the twin alone.
"""

import html
import math
import os
import traceback
from collections.abc import Mapping, Sequence

import numpy as np

from lora_lab import digit_painter
from lora_lab.view.figures import _styled
from lora_lab.view.style import INK, MUTED, THEMES, new_figure, to_svg

LOW, HIGH, STEP = -1.0, 2.0, 0.05
FINE = 500  # whole steps of the SVG per unit of the painter: short numbers, and still 7 of them to a pixel
ADVANCE = 1.24  # from one digit to the next on the line, in the painter's units


def headless() -> bool:
    """Whether live views shall show their still twins only: LORA_LAB_HEADLESS is set, and not to 0."""
    return os.environ.get("LORA_LAB_HEADLESS", "0") not in ("", "0")


# ipywidgets writes a label beside a slider and gives the slider itself no name: a screen reader would only say "slider, 1.0".
# Sliders come onto the page after this script, some much later, so one observer per page names each soon after it is there.
NAME_SLIDERS = """<script>
if (!window.loraNames) {
  let waiting = null;
  const name = () => {
    waiting = null;
    for (const slider of document.querySelectorAll(".widget-slider")) {
      const text = slider.querySelector("label")?.textContent;
      const handle = slider.querySelector("[role=slider]:not([aria-label])");
      const number = slider.querySelector(".widget-readout[contenteditable=true]:not([aria-label])");
      handle?.setAttribute("aria-label", text);
      number?.setAttribute("role", "textbox");
      number?.setAttribute("aria-label", text + ", as a number");
    }
  };
  window.loraNames = new MutationObserver(() => { waiting ??= setTimeout(name, 200); });
  window.loraNames.observe(document.body, {childList: true, subtree: true});
  name();
}
</script>"""


# After a restart JupyterLab leaves the old kernel's widgets on the page and gives them this class: say so, and let nobody press dead buttons.
GONE = """<style>
.lora-gone { display: none }
.lora-live.jupyter-widgets-disconnected .lora-gone { display: block; border-left: 4px solid #c25d12; padding: 2px 8px; line-height: 1.5 }
.lora-live.jupyter-widgets-disconnected :is(button, select, input, .widget-slider) { opacity: 0.4; pointer-events: none }
</style>
<div class="lora-gone" role="status">The kernel was restarted, and this view went with the old one. Run this cell again.</div>"""


def live_box(*children):
    """The box around a live view: its widgets from top to bottom, and a line that shows itself when their kernel is gone."""
    import ipywidgets as widgets

    box = widgets.VBox([*children, widgets.HTML(GONE, layout=widgets.Layout(margin="0"))])
    box.add_class("lora-live")
    return box


def volume_knob(*adapters: str) -> "VolumeKnob":
    """A line of handwritten digits, and one slider per adapter: its volume, from -1 to 2. Let it be a cell's last expression.

    adapters  names of shipped adapters of the digit painter; none named: all, italic first
    """
    return VolumeKnob(adapters or ("italic", "bold"))


def volume_strip(
    adapter: str = "italic", volumes: Sequence[float] = (-1, -0.5, 0, 0.5, 1, 1.5, 2), digits: Sequence[int] = range(10),
    title: str = "",
):  # fmt: skip
    """The digits at several volumes of one adapter, one line per volume, as a matplotlib figure: the knob's twin that stands still."""
    model = digit_painter.load_digit_painter(adapter)
    frames = [(volume, digit_painter.paint(model, {adapter: volume})[list(digits)]) for volume in volumes]
    return _draw_strip(frames, title or f"The {adapter} adapter, from volume {volumes[0]:g} to {volumes[-1]:g}".replace("-", "−"))


def volume_view(model, volumes: Mapping[str, float], base: np.ndarray | None = None) -> tuple[str, str]:
    """What the knob shows at these volumes: (inline SVG of the ten digits, a sentence that says how they look).

    base  the heights at volume 0, if the caller has them already; it halves the time
    """
    if base is None:
        base = digit_painter.paint(model, dict.fromkeys(volumes, 0.0))
    heights = digit_painter.paint(model, volumes)
    lean = float(np.nanmean(digit_painter.slant(heights) - digit_painter.slant(base)))
    ink = float(digit_painter.ink_share(heights).mean() / digit_painter.ink_share(base).mean())
    degrees = round(math.degrees(math.atan(lean)))
    leaning = f"lean {abs(degrees)}° to the {'right' if degrees > 0 else 'left'}" if abs(degrees) > 1 else "stand as in the base model"
    text = f"The digits {leaning}, with {ink:.2f} times the ink."
    return digits_svg(heights, text), text


def digits_svg(heights: np.ndarray, alt: str) -> str:
    """Heights (D, rows, columns) -> an inline SVG of one line of digits, ink where a height is positive, in the page's text colour."""
    paths = []
    for place, field in enumerate(heights):
        rings = "".join(_smooth(ring + (place * ADVANCE, 0)) for ring in outlines(field))
        paths.append(f'<path d="{rings}"/>')
    left, right = -0.75 * FINE, ((len(heights) - 1) * ADVANCE + 0.75) * FINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(alt)}" '
        f'viewBox="{left:.0f} {-FINE} {right - left:.0f} {2 * FINE}" '
        f'style="display: block; width: 100%; max-width: 860px; overflow: visible; fill: {THEMES["auto"][INK]}" '
        f'fill-rule="evenodd">{"".join(paths)}</svg>'
    )


def outlines(field: np.ndarray) -> list[np.ndarray]:
    """The closed rings, each (n, 2) of x and y, around the places where a digit's heights (rows, columns) are positive."""
    from contourpy import FillType, contour_generator

    x, y = digit_painter.page(*field.shape)
    generator = contour_generator(x, y, field, fill_type=FillType.OuterOffset)
    points, offsets = generator.filled(0, np.inf)
    # contourpy repeats the first point at the end of each ring
    return [p[start : end - 1] for p, o in zip(points, offsets, strict=True) for start, end in zip(o, o[1:], strict=False)]


def _smooth(ring: np.ndarray) -> str:
    """A ring as SVG path data, y downwards, rounded: a quadratic curve from middle to middle, each corner its control point."""
    corners = ring * (FINE, -FINE)
    middles = (corners + np.roll(corners, -1, axis=0)) / 2
    curves = np.concatenate([corners, middles], axis=1).round().astype(int).tolist()
    return "M{2} {3}".format(*curves[-1]) + "".join(map("Q{0[0]} {0[1]} {0[2]} {0[3]}".format, curves)) + "Z"


def trouble(problem: Exception, where: str) -> str:
    """What a live view shows in place of an error that nobody would see: HTML, with the traceback `where` folded."""
    return (
        '<div role="alert" style="border-left: 4px solid #c25d12; padding: 2px 8px">'
        f"<b>The picture could not be drawn.</b> {html.escape(f'{type(problem).__name__}: {problem}')}"
        f"<details><summary>Where</summary><pre>{html.escape(where)}</pre></details></div>"
    )


UNSEEN = "position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%)"  # read out; the figures show the same


class View:
    """What is displayed twice: the widget that moves, and below it its twin that stands still; headless the twin alone.

    A view of its own gives `widget()`, an ipywidgets box, and `still()`, HTML.
    """

    def _ipython_display_(self):
        from IPython.display import display

        if not headless():
            display(self.widget())
        script = "" if headless() else NAME_SLIDERS
        display({"text/html": self.still() + script, "text/plain": str(self)}, raw=True)


class Redrawn(View):
    """A view whose picture is drawn anew at every change of a setting.

    It gives `drawn()` -> (HTML of the picture, the same in words), and, if the words are to be seen, `said(text)` -> their HTML.
    What goes wrong while drawing is shown below the picture, and kept in `error`: a callback's exception would vanish into a log that nobody reads.
    """

    picture = words = trouble = None  # ipywidgets, once there are any
    error: str | None = None
    text = ""

    def fields(self) -> None:
        """Make the three places that are written to: picture, words, trouble."""
        import ipywidgets as widgets

        self.picture, self.words, self.trouble = (widgets.HTML() for _ in range(3))
        self.picture.layout.margin = "8px 0 4px 0"

    def said(self, text: str) -> str:
        return f'<div role="status" style="{UNSEEN}">{html.escape(text)}</div>'

    def redraw(self) -> None:
        """Draw what is set. Never raises."""
        try:
            page, self.text = self.drawn()
            self.error = None
            if self.picture is not None:
                self.picture.value, self.words.value, self.trouble.value = page, self.said(self.text), ""
        except Exception as problem:
            self.error = traceback.format_exc()
            if self.picture is not None:
                self.trouble.value = trouble(problem, self.error)


class VolumeKnob(Redrawn):
    """Sliders and the digits they change; display it, or read `volumes`, `error` and `text` in a test."""

    def __init__(self, adapters: Sequence[str]):
        self.model = digit_painter.load_digit_painter(*adapters)
        self.base = digit_painter.paint(self.model, dict.fromkeys(adapters, 0.0))
        self.volumes = {name: (1.0 if i == 0 else 0.0) for i, name in enumerate(adapters)}
        self.sliders = {}

    def widget(self):
        """The ipywidgets box. Made once; all displays of it move together."""
        import ipywidgets as widgets

        if self.picture is None:
            self.fields()
            for name, volume in self.volumes.items():
                slider = widgets.FloatSlider(
                    value=volume, min=LOW, max=HIGH, step=STEP, description=name, readout_format=".2f",
                    tooltip=f"volume of the {name} adapter: 0 is the model without it, 1 the adapter as trained",
                    layout=widgets.Layout(width="100%", max_width="520px"), style={"description_width": "5em"},
                )  # fmt: skip
                slider.observe(lambda change, name=name: self.set(name, change["new"]), names="value")
                self.sliders[name] = slider
            self.redraw()
        return live_box(*self.sliders.values(), self.picture, self.words, self.trouble)

    def set(self, name: str, volume: float) -> None:
        """Set one volume and redraw."""
        self.volumes[name] = float(volume)
        self.redraw()

    def drawn(self) -> tuple[str, str]:
        return volume_view(self.model, self.volumes, self.base)

    def said(self, text: str) -> str:
        return _words(self.volumes, text)

    def still(self) -> str:
        """The twin that stands still, as HTML: open where nothing moves, folded below the sliders otherwise."""
        says = {name: self._says(name) for name in self.volumes}
        figures = "".join(to_svg(volume_strip(name), text) for name, text in says.items())
        text = " ".join(says.values())
        if headless():
            return f"<div>{figures}</div>"
        return f"<details><summary>The same as a picture that stands still</summary><p>{html.escape(text)}</p>{figures}</details>"

    def _says(self, name: str) -> str:
        looks = []
        for volume in (LOW, 1.0, HIGH):
            text = volume_view(self.model, dict.fromkeys(self.volumes, 0.0) | {name: volume}, self.base)[1]
            looks.append(f"at {volume:g} {text[0].lower()}{text[1:-1]}".replace("-", "−"))
        return f"The volume of the {name} adapter: {'; '.join(looks)}."

    def __repr__(self):
        return "\n".join(f"[live view: {self._says(name)}]" for name in self.volumes)


def _words(volumes: Mapping[str, float], text: str) -> str:
    terms = "".join(
        f'<span style="white-space: nowrap; margin-right: 2.5em">{html.escape(name)}, on <i>{html.escape(where)}</i>: '
        f'W₀ {"+" if volume >= 0 else "−"} <b>{abs(volume):.2f}</b> · ΔW</span> '
        for name, volume in volumes.items()
        for where in [" and ".join(digit_painter.adapted_layers(name))]
    )
    return (
        f'<div style="line-height: 1.5; color: {THEMES["auto"][INK]}">{terms}</div>'
        f'<div role="status" style="line-height: 1.5; color: {THEMES["auto"][MUTED]}">{html.escape(text)}</div>'
    )


@_styled
def _draw_strip(frames, title):
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    left, right, line = -3.3, (len(frames[0][1]) - 1) * ADVANCE + 1.1, 1.95
    low, high = -(len(frames) - 1) * line - 0.95, 0.95
    unit = 0.44  # inches per unit of the painter, so that a digit is about as high as two lines of text
    figure = new_figure((right - left) * unit, (high - low) * unit + 0.4)
    axes = figure.subplots()
    for row, (volume, heights) in enumerate(frames):
        for place, field in enumerate(heights):
            vertices, codes = [], []
            for ring in outlines(field):
                vertices.append(np.concatenate([ring, ring[:1]]) + (place * ADVANCE, -row * line))
                codes += [Path.MOVETO, *[Path.LINETO] * (len(ring) - 1), Path.CLOSEPOLY]
            if vertices:
                axes.add_patch(PathPatch(Path(np.concatenate(vertices), codes), facecolor=INK, linewidth=0))
        weight = "bold" if volume in (0, 1) else "normal"
        label = f"{volume:g}".replace("-", "−") + {0: "\u2002base", 1: "\u2002as trained"}.get(volume, "")
        axes.text(-1.1, -row * line, label, ha="right", va="center", color=INK if volume in (0, 1) else MUTED, fontweight=weight)
    axes.set(xlim=(left, right), ylim=(low, high), aspect="equal")
    axes.set_title(title, x=0.0)
    axes.axis("off")
    return figure
