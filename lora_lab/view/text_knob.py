"""`text_knob`: a text at every volume of an adapter, under a slider. The texts are made beforehand, so that it answers at once."""

import html
from collections.abc import Mapping

from lora_lab.view.style import COLOURS, INK, MUTED, THEMES
from lora_lab.view.widgets import View, headless, live_box

AUTO = THEMES["auto"]


def text_knob(texts: Mapping[float, str], losses: Mapping[float, float] | None = None, prompt: str = "", start: float = 1.0) -> "TextKnob":
    """What a model writes at each volume of its adapter: a slider over the volumes, the text below. Let it be a cell's last expression.

    texts   volume -> text                                losses   volume -> loss in nats a token, shown as a bar; or None
    prompt  what all the texts answer                     start    the volume to begin with; the nearest there is

    Beside the slider stays a table of all texts, for paper and screen readers. Raises ValueError without texts, and for a loss without a text.
    """
    if not texts:
        raise ValueError("text_knob needs at least one text, {volume: text}; found none")
    if strangers := [volume for volume in losses or {} if volume not in texts]:
        raise ValueError(f"no text for the volumes {', '.join(f'{v:g}' for v in strangers)}; there are {', '.join(f'{v:g}' for v in sorted(texts))}")
    return TextKnob(texts, losses or {}, prompt, start)


class TextKnob(View):
    """Display it, or read `volume` and `page()` in a test; `set` does what the slider does."""

    def __init__(self, texts: Mapping[float, str], losses: Mapping[float, float], prompt: str, start: float):
        self.texts, self.losses, self.prompt = dict(sorted(texts.items())), dict(losses), prompt
        self.volume = min(self.texts, key=lambda volume: abs(volume - start))
        self.slider = self.picture = None

    def set(self, volume: float) -> None:
        """Show another volume. Raises ValueError for one without a text."""
        if volume not in self.texts:
            raise ValueError(f"no text at volume {volume}; there are {', '.join(f'{v:g}' for v in self.texts)}")
        self.volume = volume
        if self.picture is not None:
            self.picture.value = self.page()
            self.slider.value = volume

    def page(self) -> str:
        """The text at the volume in force, as HTML."""
        text, bar = self.texts[self.volume], ""
        if self.volume in self.losses:
            loss, most = self.losses[self.volume], max(self.losses.values())
            bar = (
                f'<div style="display: flex; align-items: center; gap: 8px; color: {AUTO[MUTED]}; margin-bottom: 4px">'
                f'<span style="display: inline-block; height: 10px; width: {240 * loss / most if most else 0:.0f}px; background: {COLOURS[0]}"></span>'
                f"{loss:.2f} nats a token</div>"
            )
        return (
            f'<div role="status" style="line-height: 1.55; max-width: 46em; min-height: 7.5em; color: {AUTO[INK]}">{bar}'
            f'<div style="color: {AUTO[MUTED]}">{html.escape(self.prompt)}</div>'
            f'<div style="white-space: pre-wrap; overflow-wrap: anywhere"><b>{_volume(self.volume)}</b>&ensp;{html.escape(text)}</div></div>'
        )

    def widget(self):
        """The ipywidgets box. Made once; all displays of it move together."""
        import ipywidgets as widgets

        if self.picture is None:
            self.picture = widgets.HTML(self.page())
            self.slider = widgets.SelectionSlider(
                options=[(_volume(volume), volume) for volume in self.texts], value=self.volume, description="volume",
                tooltip="volume of the adapter: 0 is the model without it, 1 the adapter as trained",
                layout=widgets.Layout(width="100%", max_width="520px"), style={"description_width": "5em"},
            )  # fmt: skip
            self.slider.observe(lambda change: self.set(change["new"]), names="value")
        return live_box(self.slider, self.picture)

    def still(self) -> str:
        """All volumes as a table: open where nothing moves, folded below the slider otherwise."""
        rows = "".join(
            f'<tr><th scope="row" style="vertical-align: top">{_volume(volume)}</th>'
            + (f'<td style="vertical-align: top">{self.losses[volume]:.2f}</td>' if volume in self.losses else "<td></td>" if self.losses else "")
            + f'<td style="text-align: left; overflow-wrap: anywhere">{html.escape(text)}</td></tr>'
            for volume, text in self.texts.items()
        )
        head = '<th scope="col">volume</th>'
        head += ('<th scope="col">nats a token</th>' if self.losses else "")
        head += '<th scope="col" style="text-align: left">text</th>'
        table = f'<p style="color: {AUTO[MUTED]}">{html.escape(self.prompt)}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        return f"<div>{table}</div>" if headless() else f"<details><summary>All volumes as a table</summary>{table}</details>"

    def __repr__(self):
        return "\n".join([f"[live view: {self.prompt}]", *(f"{_volume(volume):>6}  {text}" for volume, text in self.texts.items())])


def _volume(value: float) -> str:
    return f"{value:g}".replace("-", "−")
