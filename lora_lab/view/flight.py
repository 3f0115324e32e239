"""Play a recorded run back: `flight_explorer`, three sliders for time, rank and alpha, and what the model was then. Nothing is trained.

The recorder puts the model of that moment together, cut and scaled as the sliders say; the problem's own loss, samples and measurements
are then taken from it. What was looked at is remembered, in a bounded number of places, so that going back is free.
"""

import html
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lora_lab.live import Problem
from lora_lab.recorder import FlightRecorder
from lora_lab.train import to_device
from lora_lab.view.live_chart import samples_html, short
from lora_lab.view.style import COLOURS, FONT, GRID, INK, MARKERS, MUTED, THEMES
from lora_lab.view.widgets import Redrawn, headless, live_box

AUTO = THEMES["auto"]
LOUDEST, QUIETEST, FINEST = 3.0, -1.0, 0.05  # of the alpha slider, in units of the alpha that was recorded
REMEMBERED = 256  # places (time, rank, alpha) whose loss, samples and measurements are kept
TRAIL = 33  # moments at which the loss at another rank and alpha is worked out for the dotted line, at most
PATIENCE = 0.003  # seconds that one of them may take; a model that needs longer goes without the line
CURVE = 400  # points of the loss curve that go into the picture, about
WIDE, HIGH = 620, 320  # of the loss chart, in units of its SVG
SIDE_WIDE, SIDE_HIGH = 340, 250  # of the spectrum


def flight_explorer(
    recorder: FlightRecorder, problem: Problem, *, seed: int = 0, time: int | None = None, rank: int | None = None, volume: float = 1.0
) -> "FlightExplorer":
    """Scrub through a recorded run: time x rank x alpha, without training. Let it be a cell's last expression.

    recorder  what watched the run
    problem   what was trained: its loss on a fixed batch (the first of `problem.batches(seed)`), its samples, its measurements
    time      updates made, to begin with; None: the last moment
    rank      at which every ΔW is cut; None: not at all
    volume    alpha, as a multiple of what it was at each moment; from -1 to 3

    Every ΔW is replaced by its best approximation of the rank (Eckart and Young), from its factors. That is not what a training with that
    rank would have found, and the difference is worth looking at.
    Raises ValueError for an empty recorder, a run of another problem, and settings out of range.
    """
    return FlightExplorer(recorder, problem, seed=seed, time=time, rank=rank, volume=volume)


@dataclass(frozen=True)
class Look:
    """What one place (time, rank, volume) showed: the loss on the fixed batch, what the problem measures, what its samples look like."""

    loss: float
    numbers: Mapping[str, float]
    samples: str


class FlightExplorer(Redrawn):
    """Sliders over a recorded run; display it, or read and set `time`, `rank`, `volume`, `text` and `error` in a test."""

    def __init__(self, recorder: FlightRecorder, problem: Problem, *, seed=0, time=None, rank=None, volume=1.0):
        self.recorder, self.problem = recorder, problem
        self.largest_r = recorder.r  # says so if the recorder is empty
        self.steps = list(recorder.times)
        self.time = self.steps[recorder.nearest(self.steps[-1] if time is None else time)]
        self.rank, self.volume = self._checked_rank(self.largest_r if rank is None else rank), self._checked_volume(volume)
        self._looks: OrderedDict = OrderedDict()
        self._trails: OrderedDict = OrderedDict()
        self.error: str | None = None
        self.text = ""
        self.sliders, self.box = {}, None
        try:
            self.batch = next(iter(problem.batches(seed)))
            self.look(self.steps[-1], self.largest_r, 1.0)
        except (RuntimeError, AttributeError, KeyError, IndexError, TypeError) as misfit:
            layers = ", ".join(itertools.islice(recorder.layers, 4))
            raise ValueError(f"this flight was recorded on a model with adapters on {layers}; {problem.name!r} cannot use it: {misfit}") from misfit
        self._losses = self._line()
        self._bounds, self._quick = self._axis(), self._is_quick()

    # ------------------------------------------------------------ what there is to see at a place

    def look(self, step: int, rank: int, volume: float) -> Look:
        """Loss, measurements and samples at the moment nearest to `step` updates; taken once, then remembered."""
        place = step, rank, volume
        if place not in self._looks:
            model = self._model(step, rank, volume)
            loss = self._loss(model)
            with torch.no_grad():
                samples = samples_html(self.problem.samples(model))
                self._looks[place] = Look(loss, dict(self.problem.evaluate(model) or {}), samples)
            if len(self._looks) > REMEMBERED:
                self._looks.popitem(last=False)
        self._looks.move_to_end(place)
        return self._looks[place]

    def trail(self, rank: int, volume: float) -> list[tuple[int, float]]:
        """(updates, loss on the fixed batch) at this rank and alpha along the whole flight; [] where that would take too long."""
        if not self._quick:
            return []
        if (rank, volume) not in self._trails:
            chosen = sorted({round(i) for i in np.linspace(0, len(self.steps) - 1, min(TRAIL, len(self.steps)))})
            self._trails[rank, volume] = [(self.steps[i], self._loss(self._model(self.steps[i], rank, volume))) for i in chosen]
            if len(self._trails) > REMEMBERED:
                self._trails.popitem(last=False)
        return self._trails[rank, volume]

    def _is_quick(self) -> bool:
        """Whether the loss at one moment is had so soon that a whole line of them is: the best of three, because others use the machine."""
        seconds = []
        for step in (self.steps[-1], *self.steps[:2]):
            began = time.perf_counter()
            self._loss(self._model(step, max(self.largest_r - 1, 0), 1.0))
            seconds.append(time.perf_counter() - began)
        return min(seconds) < PATIENCE

    def _model(self, step, rank, volume):
        return self.recorder.replay(self.recorder.nearest(step), None if rank >= self.largest_r else rank, volume)

    def _loss(self, model) -> float:
        with torch.no_grad():
            return float(self.problem.loss(model, to_device(self.batch, next(model.parameters()).device)))

    def _line(self) -> list[tuple[float, float]]:
        """The recorded loss, where it belongs: that of step k was computed after k - 1 updates. A noisy one is averaged as in the live view."""
        steps, losses = self.recorder.curve
        keep, total, weight, line = 1 - 1 / self.problem.smooth, 0.0, 0.0, []
        for step, loss in zip(steps.tolist(), losses.tolist(), strict=True):
            total, weight = keep * total + loss, keep * weight + 1
            line.append((step - 1, total / weight))
        every = max(1, len(line) // CURVE)
        return [*line[:-1:every], *line[-1:]]

    def _axis(self) -> tuple[float, float]:
        """Lowest and highest loss of the chart. They stay, so that the eye compares heights; what is higher is marked at the upper edge."""
        seen = [loss for _, loss in self._losses] + [self.look(step, self.largest_r, 1.0).loss for step in (self.steps[0], self.steps[-1])]
        seen = [loss for loss in seen if math.isfinite(loss)] or [1.0]
        if self.problem.log:
            floors = [self.problem.floor(r) for r in range(self.largest_r + 1)]
            low = min(loss for loss in [*seen, *filter(None, floors)] if loss > 0) if max(seen) > 0 else 1e-9
            return 10.0 ** math.floor(math.log10(max(low, 1e-9 * max(seen)))), 10.0 ** math.ceil(math.log10(max(*seen, 1e-8)) + 0.5)
        return 0.0, 1.25 * max(seen) or 1.0

    def says(self) -> str:
        """One sentence on the place in view: what the status line reads out."""
        look = self.look(self.time, self.rank, self.volume)
        whole = self.look(self.time, self.largest_r, 1.0)
        cut = f"rank {self.rank} of {self.largest_r}" if self.rank < self.largest_r else f"rank {self.largest_r}, nothing cut"
        beside = "" if look is whole else f" (as recorded {_short(whole.loss)})"
        numbers = "".join(f"; {name} {value:.1%}" for name, value in look.numbers.items())
        return f"After {self.time} of {self.steps[-1]} updates, {cut}, {self._alpha()}: loss {_short(look.loss)}{beside}{numbers}."

    def _alpha(self) -> str:
        alphas = set(self.recorder.alphas(self.recorder.nearest(self.time)).values())
        if len(alphas) > 1:
            return f"every alpha times {self.volume:.2f}".replace("-", "−")
        (alpha,) = alphas
        product = "" if self.volume == 1 else f" = {self.volume:.2f} × {alpha:g}"
        return f"alpha {self.volume * alpha:g}{product}".replace("-", "−")

    # ------------------------------------------------------------ pictures

    def page(self) -> str:
        """Loss, spectrum, figures and samples at the place in view, as HTML."""
        look = self.look(self.time, self.rank, self.volume)
        return (
            '<div style="display: flex; flex-wrap: wrap; gap: 12px 28px; align-items: flex-start">'
            f'<div style="flex: 5 1 380px; max-width: 760px">{self.loss_chart()}{self._figures(look)}</div>'
            f'<div style="flex: 3 1 280px; max-width: 440px">{self.spectrum_chart()}{look.samples}</div></div>'
        )

    def loss_chart(self) -> str:
        """The recorded loss, the moment in view, and the loss that the cut and scaled model has there; inline SVG."""
        left, right, top, base = 56, WIDE - 110, 30, HIGH - 36
        low, high = self._bounds
        last = max(self.steps[-1], 1)
        look, changed = self.look(self.time, self.rank, self.volume), self.rank < self.largest_r or self.volume != 1

        def across(step):
            return left + (right - left) * step / last

        def down(loss):
            if self.problem.log:
                share = math.log(max(loss, low) / low) / math.log(high / low)
            else:
                share = (loss - low) / (high - low)
            return base - (base - top) * min(max(share, 0.0), 1.0)

        def path(points):
            return " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points if math.isfinite(y))

        strong = f"font-weight: 600; fill: {AUTO[INK]}"
        parts = [f'<text x="4" y="14" style="{strong}">loss</text>']
        parts += [
            f'<path d="M{left} {at:.1f}H{right}" stroke="{AUTO[GRID]}"/><text x="{left - 7}" y="{at + 4:.1f}" text-anchor="end">{name}</text>'
            for value, name in _ticks(low, high, self.problem.log)
            for at in [down(value)]
        ]
        parts += [
            f'<text x="{across(step):.1f}" y="{base + 18}" text-anchor="middle">{step:,}</text>'
            for step in _round_steps(last)
        ] + [f'<text x="{right}" y="{base + 33}" text-anchor="end">updates made</text>']
        floor = self.problem.floor(self.rank) if self.volume == 1 and self.rank else None
        if floor is not None and low <= floor <= high:
            at = down(floor)
            parts.append(f'<path d="M{left} {at:.1f}H{right}" stroke="{AUTO[MUTED]}" stroke-dasharray="2 3"/>')
            parts.append(f'<text x="{right - 6}" y="{at + 15:.1f}" text-anchor="end">floor, rank {self.rank}</text>')
        parts.append(f'<polyline points="{path(self._losses)}" fill="none" stroke="{COLOURS[0]}" stroke-width="2.2" stroke-linejoin="round"/>')
        ends = [(down(self._losses[-1][1]), "recorded", COLOURS[0], "")] if self._losses else []
        trails = [(self.rank, self.volume, "cut, scaled", COLOURS[1], "5 3")] if changed else []
        if self.problem.smooth > 1:  # the recorded loss is an average over batches: beside it, all of the run on the batch of the dot
            trails.append((self.largest_r, 1.0, "fixed batch", COLOURS[0], "2 3"))
        for rank, volume, name, colour, dashes in trails:
            trail = self.trail(rank, volume)
            if trail:
                trail = sorted({*trail, (self.time, self.look(self.time, rank, volume).loss)})  # the dot lies on its line
                parts.append(f'<polyline points="{path(trail)}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dashes}"/>')
                if math.isfinite(trail[-1][1]):
                    ends.append((down(trail[-1][1]), name, colour, dashes))
        x, y = across(self.time), down(look.loss) if math.isfinite(look.loss) else top
        parts.append(f'<path d="M{x:.1f} {top}V{base}" stroke="{COLOURS[1]}" stroke-width="1.5"/>')
        above = not math.isfinite(look.loss) or look.loss > high
        mark = f'<path d="M{x - 7:.1f} {top + 9}h14l-7 -11z"' if above else f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"'
        parts.append(f'{mark} fill="{COLOURS[1]}" stroke="{AUTO[INK]}" stroke-width="1"/>')
        side = ("start", 11) if x < left + 0.72 * (right - left) else ("end", -11)
        label = _short(look.loss) + (", off the chart" if above else "")
        parts.append(f'<text x="{x + side[1]:.1f}" y="{max(y - 9, top + 4):.1f}" text-anchor="{side[0]}" style="{strong}; font-size: 15px">{label}</text>')
        parts += _end_labels(right, base, ends)
        alt = f"The loss over {self.steps[-1]} updates as recorded, and at {self.time} updates the loss of the model in view, {_short(look.loss)}."
        return _svg(WIDE, HIGH, alt, "".join(parts))

    def spectrum_chart(self) -> str:
        """Singular values of every ΔW at this moment and alpha: what the rank keeps is filled, what it cuts is hollow; inline SVG."""
        left, right, top, base = 46, SIDE_WIDE - 12, 30, SIDE_HIGH - 36
        log, spectra = self.problem.log, self.recorder.spectra(self.recorder.nearest(self.time), self.volume)
        wanted = {name: np.asarray(S, dtype=float) for name, S in self.problem.spectrum.items()}
        largest = max([float(S.max()) for S in self.recorder.spectra(len(self.steps) - 1).values()] + [S.max() for S in wanted.values()])
        now = max(float(S.max()) for S in spectra.values())
        high = (largest or 1.0) * 1.08
        while now > high:  # in steps, so that the axis stands still while a slider moves a little
            high *= 2
        low = high / 1e4 if log else 0.0
        count = max(len(S) for S in [*spectra.values(), *wanted.values()])

        def across(i):
            return left + (right - left) * (i - 0.5) / count

        def down(value):
            share = math.log(max(value, low) / low) / math.log(high / low) if log else value / high
            return base - (base - top) * min(max(share, 0.0), 1.0)

        strong = f"font-weight: 600; fill: {AUTO[INK]}"
        parts = [f'<text x="4" y="14" style="{strong}">singular values of ΔW</text>']
        parts += [
            f'<path d="M{left} {at:.1f}H{right}" stroke="{AUTO[GRID]}"/><text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{name}</text>'
            for value, name in _ticks(low, high, log)
            for at in [down(value)]
        ]
        for S in wanted.values():
            steps = "".join(f"M{across(i + 1) - 0.4 * (right - left) / count:.1f} {down(s):.1f}h{0.8 * (right - left) / count:.1f}" for i, s in enumerate(S))
            parts.append(f'<path d="{steps}" stroke="{AUTO[INK]}" stroke-width="2"/>')
        if wanted:
            parts.append(f'<text x="{right}" y="14" text-anchor="end">bars: the teacher\'s ΔW*</text>')
        few = len(spectra) <= len(COLOURS)
        for k, (name, S) in enumerate(spectra.items()):
            colour = COLOURS[k % len(COLOURS)] if few else COLOURS[0]
            kept = self.rank * max(1, len(S) // self.recorder.layers[name].r)  # a fused layer has r for each slice
            points = [(across(i + 1), down(float(s))) for i, s in enumerate(S)]
            if few:
                parts.append(f'<polyline points="{_points(points)}" fill="none" stroke="{colour}" stroke-opacity="0.45"/>')
                for i, (a, b) in enumerate(points):
                    parts.append(_marker(MARKERS[k % len(MARKERS)], a, b, colour if i < kept else "none", colour))
            else:
                parts.append(f'<polyline points="{_points(points[:kept])}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
                cut = _points(points[max(kept - 1, 0) :])
                parts.append(f'<polyline points="{cut}" fill="none" stroke="{colour}" stroke-opacity="0.5" stroke-dasharray="2 3"/>')
        if self.rank < self.largest_r:
            one_cut = all(len(S) == self.largest_r for S in spectra.values())  # not so with fused layers, which have r for each slice
            if one_cut:
                x = across(self.rank + 0.5)
                parts.append(f'<path d="M{x:.1f} {top}V{base}" stroke="{COLOURS[1]}" stroke-width="2"/>')
                parts.append(f'<text x="{x + 5:.1f}" y="{top + 12}" style="{strong}">rank {self.rank}</text>')
        every = max(1, -(-count // 12))
        parts += [f'<text x="{across(i):.1f}" y="{base + 16}" text-anchor="middle">{i}</text>' for i in range(1, count + 1, every)]
        parts.append(f'<text x="{right}" y="{base + 33}" text-anchor="end">number</text>')
        if few and len(spectra) > 1:
            shift = left
            for k, name in enumerate(spectra):
                parts.append(_marker(MARKERS[k], shift + 4, base + 29, COLOURS[k], COLOURS[k]))
                parts.append(f'<text x="{shift + 13}" y="{base + 33}">{html.escape(name)}</text>')
                shift += 22 + 7 * len(name)
        elif not few:
            parts.append(f'<text x="{left}" y="{base + 33}">{len(spectra)} layers</text>')
        return _svg(SIDE_WIDE, SIDE_HIGH, f"Singular values of ΔW after {self.time} updates; rank {self.rank} of {self.largest_r} is kept.", "".join(parts))

    def _figures(self, look: Look) -> str:
        whole = self.look(self.time, self.largest_r, 1.0)
        rows = [("loss", _short(look.loss), _short(whole.loss))]
        rows += [(name, f"{value:.1%}", f"{whole.numbers[name]:.1%}") for name, value in look.numbers.items()]
        cells = "".join(
            f'<span style="color: {AUTO[MUTED]}">{html.escape(name)}</span>'
            f'<b style="text-align: right; font-variant-numeric: tabular-nums">{value}</b>'
            f'<span style="color: {AUTO[MUTED]}; font-variant-numeric: tabular-nums">as recorded {other}</span>'
            for name, value, other in rows
        )
        return (
            f'<div style="line-height: 1.5; margin-top: 4px; color: {AUTO[INK]}">update <b>{self.time:,}</b> of {self.steps[-1]:,} · '
            f'rank <b>{self.rank}</b> of {self.largest_r} · {html.escape(self._alpha())}</div>'
            f'<div style="display: grid; grid-template-columns: auto auto 1fr; gap: 2px 14px; line-height: 1.5; color: {AUTO[INK]}">{cells}</div>'
        )

    # ------------------------------------------------------------ the sliders

    def widget(self):
        """The ipywidgets box. Made once; all displays of it move together."""
        import ipywidgets as widgets

        if self.box is None:
            self.fields()
            look = dict(layout=widgets.Layout(width="100%", max_width="640px"), style={"description_width": "6em"})
            self.sliders = {
                "time": widgets.SelectionSlider(
                    options=[(f"{step:,}", step) for step in self.steps], value=self.time, description="updates",
                    tooltip="the moment in view: how many updates were made. Arrow keys go from one recorded moment to the next", **look,
                ),
                "rank": widgets.IntSlider(
                    value=self.rank, min=0, max=self.largest_r, description="rank", **look,
                    tooltip="every ΔW is replaced by its best approximation of this rank; 0 leaves the base alone",
                ),
                "volume": widgets.FloatSlider(
                    value=self.volume, min=QUIETEST, max=LOUDEST, step=FINEST, description="alpha ×", readout_format=".2f", **look,
                    tooltip="alpha, as a multiple of what it was in training",
                ),
            }  # fmt: skip
            for name, slider in self.sliders.items():
                slider.observe(lambda change, name=name: self.set(**{name: change["new"]}), names="value")
            self.box = live_box(*self.sliders.values(), self.picture, self.words, self.trouble)
            self.redraw()
        return self.box

    def set(self, *, time: int | None = None, rank: int | None = None, volume: float | None = None) -> None:
        """Go to the recorded moment nearest to `time` updates, to another rank or another volume, and redraw."""
        if time is not None:
            self.time = min(self.steps, key=lambda step: abs(step - time))
        if rank is not None:
            self.rank = self._checked_rank(rank)
        if volume is not None:
            self.volume = self._checked_volume(volume)
        self.redraw()

    def drawn(self) -> tuple[str, str]:
        return self.page(), self.says()

    def _stops(self) -> tuple[list[int], list[int]]:
        """The moments and the ranks of the table that stands still."""
        moments = [self.steps[round(i)] for i in np.linspace(0, len(self.steps) - 1, min(6, len(self.steps)))]
        ranks = [r for r in (0, 1, 2, 4, 8, 16, 32, 64) if r < self.largest_r]
        return list(dict.fromkeys(moments)), [*ranks, self.largest_r]

    def still(self) -> str:
        """The twin that stands still, as HTML: the place in view, and a table of losses over time and rank; folded below the sliders."""
        moments, ranks = self._stops()
        head = "".join(f"<th scope='col'>rank {r}</th>" for r in ranks)
        rows = "".join(
            f"<tr><th scope='row'>{step:,}</th>"
            + "".join(f"<td style='text-align: right'>{_short(self._loss(self._model(step, r, 1.0)))}</td>" for r in ranks)
            + "</tr>"
            for step in moments
        )
        table = (
            f"<table><caption>Loss on a fixed batch, alpha as recorded, every ΔW cut to the rank</caption><thead><tr><th scope='col'>updates</th>"
            f"{head}</tr></thead><tbody>{rows}</tbody></table>"
        )
        if headless():
            return f"<div>{self.page()}{table}</div>"
        return f"<details><summary>The same as a table</summary>{table}</details>"

    def __repr__(self):
        return f"[live view of a recorded run] {self.says()}"

    def _checked_rank(self, rank: int) -> int:
        if not 0 <= rank <= self.largest_r:
            raise ValueError(f"rank goes from 0 to {self.largest_r}, the adapters' own; found {rank}")
        return int(rank)

    def _checked_volume(self, volume: float) -> float:
        if not QUIETEST <= volume <= LOUDEST:
            raise ValueError(f"volume goes from {QUIETEST:g} to {LOUDEST:g} times alpha; found {volume}")
        return round(float(volume), 4)  # a slider gives 0.15000000000000002


def _svg(wide: int, high: int, alt: str, inside: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(alt)}" viewBox="0 0 {wide} {high}" '
        f'style="display: block; width: 100%; font: 12.5px {FONT}; fill: {AUTO[MUTED]}">{inside}</svg>'
    )


def _short(value: float) -> str:
    return short(value).replace("-", "−") if math.isfinite(value) else {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """(value, label): powers of ten, at most eight, or round values."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        every = max(1, math.ceil((last - first) / 8))
        return [(10.0**e, _power(e)) for e in range(last, first - 1, -every)]
    step = 10.0 ** math.floor(math.log10(high))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if high / s <= 6)
    return [(i * step, f"{i * step:.3g}") for i in range(int(high / step) + 1)]


def _power(exponent: int) -> str:
    if -1 <= exponent <= 2:
        return f"{10.0**exponent:g}"
    return f'10<tspan dy="-5" font-size="10">{str(exponent).replace("-", "−")}</tspan>'


def _round_steps(last: int) -> list[int]:
    step = next(s for e in range(12) for s in (10**e, 2 * 10**e, 5 * 10**e) if last / s <= 6)
    return list(range(0, last + 1, step))


def _points(points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _end_labels(x: float, base: float, ends) -> list[str]:
    """Names behind the ends of lines, (height, name, colour, dashes), moved apart so that none covers another."""
    labels, above = [], -math.inf
    ends = sorted(ends)
    for place, (y, name, colour, dashes) in enumerate(ends):
        above = at = max(min(y, base - 15 * (len(ends) - 1 - place)), above + 15)
        line = f'<path d="M{x + 5} {at:.1f}h14" stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dashes}"/>'
        labels.append(f'{line}<text x="{x + 24}" y="{at + 4:.1f}">{name}</text>')
    return labels


def _marker(kind: str, x: float, y: float, fill: str, stroke: str) -> str:
    look = f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"'
    if kind == "o":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {look}/>'
    shape = {"s": "m-3.7-3.7h7.4v7.4h-7.4z", "^": "m0-4.6l4.4 7.8h-8.8z", "D": "m0-4.8l4.8 4.8l-4.8 4.8l-4.8-4.8z", "v": "m0 4.6l4.4-7.8h-8.8z"}[kind]
    return f'<path d="M{x:.1f} {y:.1f}{shape}" {look}/>'
