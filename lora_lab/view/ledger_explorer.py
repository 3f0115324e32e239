"""The live ledger: a training step of a model predicted from shapes, full fine-tuning beside LoRA, and which machine it fits.

All numbers are `lora_lab.ledger`'s; nothing here needs weights, a GPU or a download.
"""

import html
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from lora_lab.adapt import apply_lora
from lora_lab.counting import ELEMENT, count_parameters
from lora_lab.ledger import RESERVE, Memory, readable, training_memory
from lora_lab.presets import gpu_bytes, preset
from lora_lab.view.figures_counting import NAMES, PART_COLOURS, PARTS, film, times_less
from lora_lab.view.style import FONT, GRID, INK, MUTED, PAPER, THEMES
from lora_lab.view.widgets import Redrawn, headless, live_box

AUTO = THEMES["auto"]
MODELS = ("pocket", "gpt2", "gpt2-medium", "gpt2-xl", "mistral-7b", "llama-3.1-8b", "gpt3-175b")
TARGETS = {"q and v": {"gpt2": ["c_attn:q,v"], "llama": ["q_proj", "v_proj"]}, "every linear layer": "all-linear"}
PRECISIONS = {  # name -> torch's dtype, how LoRA stores frozen layers
    "float32": ("fp32", None),
    "bfloat16": ("bf16", None),
    "bfloat16, frozen layers in 4 bits": ("bf16", "nf4"),
}
OPTIMIZERS = {"Adam": "adam", "8-bit Adam": "adam8bit", "SGD with momentum": "momentum", "SGD": "sgd"}
BATCHES, CONTEXTS, RANKS = (1, 2, 4, 8, 16, 32, 64), (128, 256, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16, 32, 64, 128, 256)
SYSTEM = 3 * 2**30  # bytes that a laptop's system and its programs take
# name -> (bytes of the machine, bytes set aside, where it computes)
MACHINES = {
    "laptop, 8 GB": (8 * 2**30, SYSTEM, "cpu"),
    "laptop, 16 GB": (16 * 2**30, SYSTEM, "cpu"),
    "T4, 16 GB": (gpu_bytes("T4"), RESERVE, "cuda"),
    "H200, 141 GB": (gpu_bytes("H200"), RESERVE, "cuda"),
}
WIDE, HIGH, LEFT, TOP, BOTTOM, GAP = 760, 290, 58, 42, 30, 26  # of the chart, in CSS pixels
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What the sliders say. context is cut to what the model can read; the names are the keys of the tables above.

    Raises ValueError for anything else, with what there is.
    """

    model: str = "gpt2-medium"
    batch: int = 4
    context: int = 512
    r: int = 8
    targets: str = "q and v"
    optimizer: str = "Adam"
    precision: str = "float32"
    checkpointing: bool = False

    def __post_init__(self):
        known = {"model": MODELS, "targets": TARGETS, "optimizer": OPTIMIZERS, "precision": PRECISIONS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is one of {', '.join(values)}; found {getattr(self, name)!r}")
        for name in ("batch", "context", "r"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1; found {value!r}")

    @property
    def tokens(self) -> int:
        """Tokens of a sequence that is really read: `context`, or as many as the model can."""
        return min(self.context, preset(self.model).context)


@dataclass(frozen=True)
class Ledger:
    """Full fine-tuning and LoRA under the same settings; sizes in bytes. fits: machine -> (full, LoRA)."""

    settings: Settings
    full: Memory
    lora: Memory
    trained: tuple[int, int]
    files: tuple[int, int]
    fits: dict


@lru_cache(maxsize=32)
def _model(name: str, dtype: str, targets: str | None, r: int):
    a = preset(name)
    model = a.build(DTYPES[dtype])
    if targets is not None:
        which = TARGETS[targets]
        apply_lora(model, r, 2 * r, which if isinstance(which, str) else which[a.family])
    return model


@lru_cache(maxsize=1024)
def _memory(s: Settings, targets: str | None, device: str) -> Memory:
    dtype, quantize = PRECISIONS[s.precision]
    return training_memory(
        _model(s.model, dtype, targets, s.r if targets else 0), s.batch, s.tokens, optimizer=OPTIMIZERS[s.optimizer], dropout=0.0,
        checkpointing=s.checkpointing, quantize=quantize if targets else None, device=device,
    )  # fmt: skip


def ledger(s: Settings) -> Ledger:
    """The prediction for these settings. Tensors as on a GPU; a laptop, which computes on its CPU, is asked for itself."""
    for_full = replace(s, r=1, targets="q and v")  # full fine-tuning knows neither: one prediction serves all ranks
    both = ((for_full, None), (s, s.targets))
    full, lora = (_memory(*which, "cuda") for which in both)
    fits = {}
    for machine, (size, aside, device) in MACHINES.items():
        answers = []
        for which, memory in zip(both, (full, lora), strict=True):
            room, peak = size - aside, memory.peak
            if device == "cpu" and peak > room > memory.weights + memory.optimizer:
                peak = _memory(*which, "cpu").peak  # there the optimizer takes one tensor after another, and needs less room at once
            answers.append(peak <= room)
        fits[machine] = tuple(answers)
    from lora_lab.state import adapter_bytes  # half of what `import lora_lab` would cost, and most views need no files

    dtype, _ = PRECISIONS[s.precision]
    model = _model(s.model, dtype, s.targets, s.r)
    count = count_parameters(model)
    base = count.frozen
    return Ledger(s, full, lora, (base, count.trainable), (base * ELEMENT[dtype], adapter_bytes(model)), fits)


def ledger_explorer(**settings) -> "LedgerExplorer":
    """The ledger with sliders; a cell's last expression. Arguments: what it begins with, as in `Settings`. Raises ValueError."""
    return LedgerExplorer(Settings(**settings))


class LedgerExplorer(Redrawn):
    """Controls and the page that they change; display it, or read `settings`, `text` and `error` in a test."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.error: str | None = None
        self.text = ""
        self.controls: dict = {}

    def says(self, s: Settings) -> str:
        """What the status line reads out: both peaks, and what fits where."""
        found = ledger(s)
        places = {None: [], "both": [], "LoRA": [], "full": []}
        for machine, (full, lora) in found.fits.items():
            places["both" if full and lora else "LoRA" if lora else "full" if full else None].append(machine)
        cut = f" (as long as {s.model} reads)" if s.tokens < s.context else ""
        text = (
            f"{s.model}, {s.batch} x {s.tokens} tokens{cut}: full fine-tuning peaks at {readable(found.full.peak)}, LoRA with r = {s.r} on {s.targets} "
            f"at {readable(found.lora.peak)}, {times_less(found.full.peak, found.lora.peak)}."
        )
        for key, said in (("both", "Both fit"), ("LoRA", "LoRA alone fits"), ("full", "Full fine-tuning alone fits"), (None, "Neither fits")):
            if places[key]:
                text += f" {said}: {'; '.join(places[key])}."
        return text

    def page(self, s: Settings) -> str:
        """Chart and tables for these settings, as HTML."""
        found = ledger(s)
        return (
            f'<div style="max-width: {WIDE + 40}px; color: {AUTO[INK]}">{self.chart(s)}'
            f'<div style="display: flex; flex-wrap: wrap; gap: 8px 40px; align-items: flex-start">{_accounts(found)}{_machines(found)}</div></div>'
        )

    def chart(self, s: Settings) -> str:
        """Two steps side by side on one scale, with the machines as level lines; inline SVG in the page's colours."""
        found = ledger(s)
        top, base = 1.12 * max(found.full.peak, found.lora.peak), HIGH - BOTTOM
        each = (WIDE - LEFT - GAP) / 2

        def down(size):
            return base - (base - TOP) * size / top

        parts, peaks = [], []
        for step in _ticks(top):
            at = down(step)
            parts.append(
                f'<path d="M{LEFT} {at:.1f}H{WIDE}" stroke="{AUTO[GRID]}"/>'
                f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{readable(step) if step else 0}</text>'
            )
        for panel, (name, memory) in enumerate((("full fine-tuning", found.full), (f"LoRA, r = {s.r}", found.lora))):
            rows, phases = film(memory)
            x0, columns = LEFT + panel * (each + GAP), len(rows)
            x = [x0 + each * k / columns for k in range(columns + 1)]
            floor = [0.0] * columns
            for part, heights in zip(PARTS, rows.T, strict=True):
                ceiling = [a + b for a, b in zip(floor, heights, strict=True)]
                upper = _steps(x, [down(v) for v in ceiling])
                lower = _steps(x, [down(v) for v in floor])[::-1]
                parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{PART_COLOURS[part]}"/>')
                floor = ceiling
            at = int(rows.sum(1).argmax())
            place = min(max(x[at], x0 + 34), x0 + each - 34)
            said = f'text-anchor="middle" style="{_STRONG}; {_HALO}">{readable(memory.peak)}</text>'
            peaks.append(f'<text x="{place:.0f}" y="{down(memory.peak) - 6:.1f}" {said}')
            parts.append(f'<text x="{x0:.0f}" y="14" style="{_STRONG}">{html.escape(name)}</text>')
            ends = [column for _, column in phases[1:]] + [columns]
            for (phase, begin), end in zip(phases, ends, strict=True):
                if begin:
                    parts.append(f'<path d="M{x[begin]:.1f} {down(rows[begin].sum()):.1f}V{base}" stroke="{AUTO[PAPER]}" stroke-opacity="0.8"/>')
                anchor = ("end", x[end]) if phase == "step" else ("middle", (x[begin] + x[end]) / 2)
                parts.append(f'<text x="{anchor[1]:.0f}" y="{base + 16}" text-anchor="{anchor[0]}">{phase}</text>')
        taken = []
        for machine, (size, aside, _) in MACHINES.items():
            at = down(size - aside)
            if TOP - 14 < at < base - 2:
                beside = WIDE - 4 - 90 * sum(abs(at - other) < 14 for other in taken)  # two names at one height stand side by side
                taken.append(at)
                name = machine.replace(",", "") if "laptop" in machine else machine.partition(",")[0]
                parts.append(
                    f'<path d="M{LEFT} {at:.1f}H{WIDE}" stroke="{AUTO[INK]}" stroke-dasharray="5 4"/>'
                    f'<text x="{beside}" y="{at - 4:.1f}" text-anchor="end" style="fill: {AUTO[INK]}; {_HALO}">{name}</text>'
                )
        alt = f"Memory over one training step, full fine-tuning and LoRA on one scale. {self.says(s)}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(alt)}" viewBox="0 0 {WIDE + 4} {HIGH}" '
            f'style="display: block; width: 100%; font: 12px {FONT}; fill: {AUTO[MUTED]}">{"".join(parts + peaks)}</svg>{_KEY}'
        )

    def widget(self):
        """The ipywidgets box. Made once; all displays of it move together."""
        import ipywidgets as widgets

        if self.picture is None:
            self.fields()
            look = {"layout": widgets.Layout(width="100%"), "style": {"description_width": "8em"}}
            s = self.settings

            for name, label, stops in (("context", "context", CONTEXTS), ("batch", "batch", BATCHES), ("r", "rank r", RANKS)):
                options = sorted({*stops, getattr(s, name)})
                self.controls[name] = widgets.SelectionSlider(options=options, value=getattr(s, name), description=label, tooltip=_HELP[name], **look)
            for name, label, choices in (
                ("model", "model", MODELS), ("targets", "LoRA on", tuple(TARGETS)), ("precision", "numbers", tuple(PRECISIONS)),
                ("optimizer", "optimizer", tuple(OPTIMIZERS)),
            ):  # fmt: skip
                self.controls[name] = widgets.Dropdown(options=choices, value=getattr(s, name), description=label, tooltip=_HELP[name], **look)
            self.controls["checkpointing"] = widgets.Checkbox(
                value=s.checkpointing, description="checkpointing: compute blocks twice, keep less", indent=False, tooltip=_HELP["checkpointing"],
                layout=widgets.Layout(width="100%"),
            )  # fmt: skip
            for name, control in self.controls.items():
                control.observe(lambda change, name=name: self.set(**{name: change["new"]}), names="value")
            self.redraw()
        grid = widgets.GridBox(
            [self.controls[n] for n in ("model", "context", "precision", "batch", "targets", "r", "optimizer", "checkpointing")],
            layout=widgets.Layout(grid_template_columns="repeat(auto-fit, minmax(300px, 1fr))", grid_gap="2px 24px", max_width="820px"),
        )
        return live_box(grid, self.picture, self.words, self.trouble)

    def set(self, **changes) -> None:
        """Change settings and redraw."""
        self.settings = replace(self.settings, **changes)
        self.redraw()

    def drawn(self) -> tuple[str, str]:
        return self.page(self.settings), self.says(self.settings)

    def said(self, text: str) -> str:
        return f'<div role="status" style="line-height: 1.5; color: {AUTO[MUTED]}">{html.escape(text)}</div>'

    def _stops(self) -> list[Settings]:
        return [replace(self.settings, model=name) for name in MODELS]

    def still(self) -> str:
        """The twin that stands still, as HTML: the page as it begins, and a table of all models under the same settings."""
        rows = ""
        for s in self._stops():
            found = ledger(s)
            where = [m for m, (_, lora) in found.fits.items() if lora], [m for m, (full, _) in found.fits.items() if full]
            cells = (readable(found.full.peak), readable(found.lora.peak), " · ".join(where[1]) or "none", " · ".join(where[0]) or "none")
            rows += f"<tr><th scope='row'>{s.model}</th>" + "".join(f"<td style='text-align: right'>{cell}</td>" for cell in cells) + "</tr>"
        head = "".join(f"<th scope='col'>{h}</th>" for h in ("model", "peak, full", "peak, LoRA", "full fits", "LoRA fits"))
        body = f"{self.page(self.settings)}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        if headless():
            return f"<div>{body}</div>"
        return f"<details><summary>The same as a picture that stands still, with a table of all models</summary>{body}</details>"

    def __repr__(self):
        return "\n".join(f"[live ledger] {self.says(s)}" for s in self._stops())


_STRONG = f"font-weight: 600; fill: {AUTO[INK]}"
_HALO = f"paint-order: stroke; stroke: {AUTO[PAPER]}; stroke-width: 3px"  # letters stay readable where a line passes behind them
_HELP = {
    "model": "a table of shapes; no weights are loaded",
    "context": "tokens of each sequence; cut to what the model can read",
    "batch": "sequences in one step",
    "r": "rank of every adapter; full fine-tuning does not know it",
    "targets": "which layers have an adapter",
    "optimizer": "what is kept for each number that trains",
    "precision": "of weights, gradients and activations; 4 bits: LoRA's frozen layers alone, spelled out while they are used",
    "checkpointing": "a block keeps its input alone and is computed again in the backward pass",
}
_KEY = (
    f'<div style="display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 12px; color: {AUTO[MUTED]}; margin: 2px 0 8px 0">'
    + "".join(
        f'<span><span style="display: inline-block; width: 11px; height: 11px; border-radius: 2px; background: {PART_COLOURS[p]}; margin-right: 5px">'
        f"</span>{NAMES[p]}</span>"
        for p in PARTS
    )
    + "</div>"
)


def _steps(x: list[float], heights: list[float]) -> list[str]:
    """Corners of a staircase; columns of one height in a row share a stair."""
    corners = []
    for k, y in enumerate(heights):
        if k == 0 or y != heights[k - 1]:
            corners.append(f"{x[k]:.1f},{y:.1f}")
        if k == len(heights) - 1 or y != heights[k + 1]:
            corners.append(f"{x[k + 1]:.1f},{y:.1f}")
    return corners


def _ticks(top: float) -> list[float]:
    """Round sizes from 0 to `top`, four to nine of them."""
    unit = 10.0 ** len(str(int(top)))
    while top / unit < 4:
        unit /= 2 if str(unit)[0] in "12" else 2.5
    return [k * unit for k in range(int(top / unit) + 1)]


def _accounts(found: Ledger) -> str:
    rows = [(name, getattr(found.full, name), getattr(found.lora, name)) for name in ("weights", "gradients", "optimizer", "activations", "peak")]
    rows.append(("file to keep", *found.files))
    label = {"optimizer": "optimizer's state", "activations": "activations kept", "peak": "peak"}
    cell = '<td style="text-align: right; padding: 1px 0 1px 14px; font-variant-numeric: tabular-nums{}">{}</td>'
    body = "".join(
        f'<tr><th scope="row" style="text-align: left; font-weight: {600 if name == "peak" else 400}">{label.get(name, name)}</th>'
        + cell.format("", readable(full)) + cell.format("; font-weight: 600", readable(lora)) + cell.format(f"; color: {AUTO[MUTED]}", times_less(full, lora))
        + "</tr>"
        for name, full, lora in rows
    )  # fmt: skip
    head = "".join(f'<th scope="col" style="text-align: right; padding-left: 14px; font-weight: 400">{h}</th>' for h in ("full", "LoRA", ""))
    return f'<table style="margin: 0; line-height: 1.4"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'


def _machines(found: Ledger) -> str:
    def cell(fits):
        mark, word = ("✓", "fits") if fits else ("✗", "does not fit")
        return f'<td style="padding: 1px 0 1px 14px; font-weight: {600 if fits else 400}; color: {AUTO[INK if fits else MUTED]}">{mark} {word}</td>'

    body = "".join(f'<tr><th scope="row" style="text-align: left; font-weight: 400">{m}</th>{cell(a)}{cell(b)}</tr>' for m, (a, b) in found.fits.items())
    head = "".join(f'<th scope="col" style="text-align: left; padding-left: 14px; font-weight: 400">{h}</th>' for h in ("full", "LoRA"))
    note = "Set aside: 3 GiB for a laptop's system, 1 GiB on a GPU. "
    if found.settings.precision != "float32":
        note += "A T4 does not compute in bfloat16: float16 there, as large. "
    if found.settings.tokens < found.settings.context:
        note += f"{found.settings.model} reads {found.settings.tokens:,} tokens at most."
    return (
        f'<div><table style="margin: 0; line-height: 1.4"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'
        f'<div style="max-width: 300px; font-size: 12px; line-height: 1.4; color: {AUTO[MUTED]}; margin-top: 4px">{note}</div></div>'
    )
