"""The pictures of a training run, as strings: charts of loss and spectrum as inline SVG, figures, samples and table as HTML.

Everything here is a function of a `LiveRun` and of `Axes`, which remember what ranges were shown, so that nothing jumps. A frame is made in
about two milliseconds, ten times a second.
"""

import base64
import html
import io
import math
from collections.abc import Mapping
from itertools import zip_longest
from types import SimpleNamespace

import numpy as np

from lora_lab.live import LiveRun, Problem, norm
from lora_lab.view.style import COLOURS, DASHES, FONT, GRID, INK, MUTED, PAPER, THEMES

AUTO = THEMES["auto"]
WIDE, HIGH = 580, 330  # of the loss chart, in units of its SVG
LEFT, RIGHT, TOP, BOTTOM = 50, 128, 40, 38  # its margins
PLOT_W, BASE = WIDE - LEFT - RIGHT, HIGH - BOTTOM
BEYOND = 30.0  # the axis follows a loss up to so many times what was expected; what is higher is cut, and marked
DEEPEST = 1e-9  # of what was expected: below that a loss is rounding


class Axes:
    """The ranges of the charts: they only grow, in whole steps, so that nothing jumps while one looks."""

    def __init__(self, problem: Problem):
        self.log = problem.log
        low, high = problem.expect or (0.01, 1.0)
        self.expected = low, high
        self.low, self.high = (math.floor(math.log10(low)), math.ceil(math.log10(high))) if self.log else (0.0, _nice(high))
        self.right = 0
        known = [float(s) for S in problem.spectrum.values() for s in S if s > 0]
        self.top, self.bottom = (2 * max(known), min(known) / 2) if known else (1.0, 0.0)
        self._number, self._top = 0, self.top
        self.kept: dict = {}  # polylines of earlier runs, as long as the axes stay

    def fit(self, run: LiveRun, spectrum: Mapping) -> None:
        before = self.low, self.high, self.right
        curves = [c for c in (run.mean, *(e.mean for e in run.earlier)) if len(c)]
        self.right = max([run.settings["steps"], *(e.curve.last[0] for e in run.earlier)])
        floors = [f for f in (run.problem.floor(s["r"]) for s in (run.settings, *(e.settings for e in run.earlier))) if f]
        low, high = self.expected
        lows, highs = [c.lowest for c in curves] + floors, [c.highest for c in curves]
        high = min(max(highs, default=0.0), BEYOND * max(high, *(c.first[1] for c in curves), 0.0))
        if self.log:
            low = max(min(lows, default=low), DEEPEST * self.expected[1])
            self.low = min(self.low, math.floor(math.log10(low)))
            if high > 0:
                self.high = max(self.high, math.ceil(math.log10(high)))
        elif high > self.high:
            self.high = _nice(high)
        if run.number != self._number:  # ΔW begins at 0 again
            self._number, self.top = run.number, self._top
        largest = max((float(S[0]) for S in spectrum.values() if len(S)), default=0.0)
        while largest > self.top and math.isfinite(largest):
            self.top *= 2
        if before != (self.low, self.high, self.right):
            self.kept.clear()

    @property
    def ceiling(self) -> float:
        """The loss at the upper end of the axis."""
        return 10.0**self.high if self.log else self.high

    def across(self, step: float) -> float:
        return LEFT + PLOT_W * step / self.right

    def down(self, loss: float) -> float:
        if self.log:
            share = (self.high - math.log10(loss)) / (self.high - self.low) if loss > 0 else 1.0
        else:
            share = 1 - loss / self.high
        return TOP + (BASE - TOP) * min(max(share, 0.0), 1.0)

    def line(self, curve) -> str:
        down, left, scale = self.down, LEFT, PLOT_W / self.right
        return " ".join([f"{left + scale * x:.1f},{down(y):.1f}" for x, y in curve.points()])


# ---------------------------------------------------------------- pictures, as pure functions of a run


def loss_chart(run: LiveRun, axes: Axes, state: str = "paused", alt: str = "", loss_now: float | None = None) -> str:
    """The loss of this run and of the earlier ones, their floors, and where settings were moved; inline SVG in the page's colours.

    state     running, paused or done; it stands on the SVG as data-state, beside data-step, data-r, data-alpha and data-lr
    alt       what a screen reader says; none: the picture is no picture to it
    loss_now  the loss with an alpha that was moved after the last step: a ring beside the line's end
    """
    runs = all_runs(run)
    current, strong, parts, ends = runs[-1], f"font-weight: 600; fill: {AUTO[INK]}", [], []
    for entry in runs:
        if not len(entry.curve):
            continue
        now, colour = entry is current, COLOURS[slot := _slot(entry, current)]
        if now:
            line = axes.line(entry.mean)
            if run.problem.smooth > 1:
                parts.append(f'<polyline points="{axes.line(entry.curve)}" fill="none" stroke="{colour}" stroke-opacity="0.35"/>')
        elif (line := axes.kept.get(entry.number)) is None:
            line = axes.kept[entry.number] = axes.line(entry.mean)
        width = 3 if now else 1.8
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"{_dash(slot, width)}/>')
        x, y = axes.across(entry.mean.last[0]), axes.down(entry.mean.last[1])
        if now:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}" stroke="{AUTO[PAPER]}" stroke-width="1.5"/>')
            if loss_now is not None:
                at = axes.down(loss_now)
                parts.append(
                    f'<path d="M{x:.1f} {y:.1f}V{at:.1f}" stroke="{colour}" stroke-width="1.5" stroke-dasharray="2 3"/>'
                    f'<circle cx="{x:.1f}" cy="{at:.1f}" r="6" fill="{AUTO[PAPER]}" stroke="{colour}" stroke-width="2.5"/>'
                )
            if max(entry.mean.last[1], loss_now or 0.0) > axes.ceiling:
                value = short(max(entry.mean.last[1], loss_now or 0.0))
                parts.append(f'<text x="{x:.1f}" y="{TOP + 18}" text-anchor="{_side(x)}" style="{strong}">▲ {value}, above the axis</text>')
        ends.append((y, x, label(entry, runs) if len(runs) > 1 else f"r {entry.settings['r']}", slot, now))
    parts += _end_labels(ends)
    if any(entry.moved for entry in run.earlier):
        parts.append(f'<text x="{WIDE - 4}" y="{HIGH - 4}" text-anchor="end" font-size="11">* moved on its way</text>')
    s = run.settings
    data = f'data-state="{state}" data-step="{run.step}" data-r="{s["r"]}" data-alpha="{s["alpha"]:g}" data-lr="{s["lr"]:g}"'
    role = f'role="img" aria-label="{html.escape(alt)}"' if alt else 'aria-hidden="true"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {role} {data} viewBox="0 0 {WIDE} {HIGH}" '
        f'style="display: block; width: 100%; font: 13px {FONT}; fill: {AUTO[MUTED]}; font-variant-numeric: tabular-nums">'
        f'<text x="{LEFT - 44}" y="14" style="{strong}">loss, {html.escape(run.problem.loss_name)}</text>'
        f'{_grid(axes)}{"".join(_floor_lines(run, axes))}{"".join(_moves(run, axes))}{"".join(parts)}'
        f'<text x="{LEFT + PLOT_W / 2:.0f}" y="{HIGH - 4}" text-anchor="middle">step</text></svg>'
    )


def all_runs(run: LiveRun) -> list:
    """The earlier runs and, last, the one that is going on."""
    return [*run.earlier, SimpleNamespace(settings=run.settings, number=run.number, moved=bool(run.moves), curve=run.curve, mean=run.mean)]


def _slot(entry, current) -> int:
    """Which colour and dash: the first for the run that is going on; an earlier one keeps its own as long as it is shown."""
    return 0 if entry is current else 1 + entry.number % (len(COLOURS) - 1)


def _side(x: float) -> str:
    """Where a text at x begins or ends, so that it stays inside the plot."""
    return "start" if x < LEFT + 0.2 * PLOT_W else "end" if x > LEFT + 0.8 * PLOT_W else "middle"


def _grid(axes: Axes) -> str:
    out = []
    if axes.log:
        decades = range(axes.low, axes.high + 1)
        every = 1 + (len(decades) - 1) // 8
        for d in decades:
            at = TOP + (BASE - TOP) * (axes.high - d) / (axes.high - axes.low)
            out.append(f'<path d="M{LEFT} {at:.1f}H{LEFT + PLOT_W}" stroke="{AUTO[GRID]}"/>')
            if (d - axes.low) % every == 0:
                out.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_power(d)}</text>')
    else:
        for i in range(5):  # a quarter of 1, 2, 2.5, 5 is a short number
            at, value = BASE - (BASE - TOP) * i / 4, axes.high * i / 4
            out.append(f'<path d="M{LEFT} {at:.1f}H{LEFT + PLOT_W}" stroke="{AUTO[GRID]}"/>')
            out.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    step = _nice(axes.right / 6)
    for i in range(int(axes.right / step + 1e-9) + 1):
        x = axes.across(i * step)
        out.append(f'<path d="M{x:.1f} {BASE}v5" stroke="{AUTO[MUTED]}"/><text x="{x:.1f}" y="{BASE + 19}" text-anchor="middle">{i * step:,.0f}</text>')
    out.append(f'<path d="M{LEFT} {BASE}H{LEFT + PLOT_W}" stroke="{AUTO[MUTED]}"/>')
    return "".join(out)


def _floor_lines(run: LiveRun, axes: Axes):
    """The floor of this run's rank with its name; those of the earlier ranks as hairlines."""
    problem, r = run.problem, run.settings["r"]
    for rank in sorted({e.settings["r"] for e in run.earlier} - {r}):
        floor = problem.floor(rank)
        if floor:
            y = axes.down(floor)
            yield f'<path d="M{LEFT} {y:.1f}H{LEFT + PLOT_W}" stroke="{AUTO[MUTED]}" stroke-width="1" stroke-dasharray="1 5"/>'
    floor = run.floor()
    if floor is None:
        return
    words = f"floor of rank {r}: {short(floor)}"
    if floor <= 0 or (axes.log and math.log10(floor) < axes.low):
        yield f'<text x="{LEFT + 8}" y="{BASE - 7}">{words}, below the axis</text>'
        return
    y = axes.down(floor)
    yield (
        f'<path d="M{LEFT} {y:.1f}H{LEFT + PLOT_W}" stroke="{AUTO[INK]}" stroke-width="1.4" stroke-dasharray="7 4"/>'
        # Below the line, where no curve of this rank can come.
        f'<text x="{LEFT + 8}" y="{y + 15 if y < BASE - 20 else y - 6:.1f}" style="fill: {AUTO[INK]}">{words}</text>'
    )


def _moves(run: LiveRun, axes: Axes):
    """Where alpha or lr was moved: a tick on the axis of steps, the last few with what was set."""
    shown, edge = list(run.moves), math.inf
    for step, _, _ in shown:
        yield f'<path d="M{axes.across(step):.1f} {TOP - 4}V{BASE}" stroke="{AUTO[GRID]}"/>'
    for step, name, value in reversed(shown):
        x = axes.across(step)
        if x <= edge - 76:  # from the right, as long as they don't cover each other
            yield f'<text x="{x:.1f}" y="{TOP - 9}" text-anchor="middle" style="fill: {AUTO[INK]}">{name} {value:.3g} ▾</text>'
            edge = x


def _end_labels(ends):
    """Names right of the plot, moved apart so that none covers another, each with a thread to the end of its line."""
    x0, below, placed = LEFT + PLOT_W, -math.inf, []
    for y, x, name, slot, now in sorted(ends):
        lines = name.split("\n")
        at = max(y, below + 16)
        below = at + 14 * (len(lines) - 1)
        placed.append((at, y, x, lines, slot, now))
    over = max(0.0, below - BASE - 6) if placed else 0.0
    for at, y, x, lines, slot, now in placed:
        at -= over
        width, strong = (3, f' style="font-weight: 600; fill: {AUTO[INK]}"') if now else (1.8, "")
        begin = f"M{x + 7:.1f} {y:.1f}H{x0 + 3}" if now else f"M{x0 + 2} {y:.1f}"
        words = "".join(f'<text x="{x0 + 42}" y="{at + 4 + 14 * i:.1f}"{strong}>{html.escape(line)}</text>' for i, line in enumerate(lines))
        yield (
            f'<path d="{begin}L{x0 + 11} {at:.1f}" fill="none" stroke="{AUTO[GRID]}"/>'
            f'<path d="M{x0 + 13} {at:.1f}h24" stroke="{COLOURS[slot]}" stroke-width="{width}"{_dash(slot, width)}/>{words}'
        )


def label(entry, runs) -> str:
    """What tells this run from the others that are runs, in one or two lines."""
    words = {"r": "r {}", "alpha": "alpha {:g}", "lr": "lr {:.2g}", "optimizer": "{}", "targets": "{}"}
    differ = {name for name in words if len({str(e.settings[name]) for e in runs}) > 1}
    parts = [words[name].format(entry.settings[name]) for name in words if name in differ] or [f"run {entry.number + 1}"]
    parts = [part if len(part) <= 14 else f"{part[:13]}…" for part in parts]
    first, rest = parts[:1], parts[1:]
    while rest and len(", ".join([*first, rest[0]])) <= 14:
        first.append(rest.pop(0))
    star = "*" if entry.moved else ""
    second = ", ".join(rest)
    return ", ".join(first) + (f"\n{second if len(second) <= 14 else second[:13] + '…'}" if rest else "") + star


def together(spectrum: Mapping) -> Mapping:
    """The spectra of a few layers as they are; of many, which nobody could tell apart, the largest i-th singular value of any layer."""
    if len(spectrum) <= len(COLOURS):
        return spectrum
    every = [[float(s) for s in S] for S in spectrum.values()]
    return {f"the largest of {len(every)} layers": [max(column) for column in zip_longest(*every, fillvalue=0.0)]}


def spectrum_chart(run: LiveRun, spectrum: Mapping, axes: Axes) -> str:
    """The singular values of ΔW as bars, beside those that it should have as rings, if they are known."""
    many, spectrum = len(spectrum) > len(COLOURS), together(spectrum)
    wide, high, left, base, top = 270, 190, 40, 152, 26
    known = run.problem.spectrum
    count = max([8, *(len(S) for S in spectrum.values()), *(len(S) for S in known.values())])
    log = bool(known)
    names = list(spectrum)

    def down(value):
        if not log:
            return base - (base - top) * min(value / axes.top, 1.0)
        if value <= axes.bottom:
            return float(base)
        return base - (base - top) * math.log(value / axes.bottom) / math.log(axes.top / axes.bottom)

    each = (wide - left - 8) / count
    bar = 0.72 * each / max(len(names), 1)
    out = []
    ticks = [10.0**d for d in range(math.ceil(math.log10(axes.bottom)), math.floor(math.log10(axes.top)) + 1)] if log else [0, axes.top / 2, axes.top]
    for value in ticks:
        y = down(value) if value else base
        out.append(f'<path d="M{left} {y:.1f}H{wide - 8}" stroke="{AUTO[GRID]}"/><text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for k, name in enumerate(names):
        slot = k % len(COLOURS)
        fill = f'fill="{COLOURS[slot]}"' if k == 0 else f'fill="{COLOURS[slot]}" fill-opacity="0.25" stroke="{COLOURS[slot]}"'
        for i, value in enumerate(map(float, spectrum[name])):
            y, x = down(value), left + each * i + 0.14 * each + k * bar
            out.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(bar - 1, 1):.1f}" height="{base - y:.1f}" {fill}/>')
    for S in known.values():
        out += [
            f'<circle cx="{left + each * (i + 0.5):.1f}" cy="{down(float(s)):.1f}" r="4.5" fill="none" stroke="{AUTO[INK]}" stroke-width="1.6"/>'
            for i, s in enumerate(S)
        ]
    every = 1 if count <= 12 else 4
    out += [
        f'<text x="{left + each * (i - 0.5):.1f}" y="{base + 16}" text-anchor="middle">{i}</text>'
        for i in range(1, count + 1) if i == 1 or i % every == 0
    ]  # fmt: skip
    key, x = [], left
    entries = [(name, k) for k, name in enumerate(names)] if len(names) > 1 or many else [("learned", 0)] if known else []
    for name, k in entries:
        fill = f'fill="{COLOURS[k % 5]}"' if k == 0 else f'fill="{COLOURS[k % 5]}" fill-opacity="0.25" stroke="{COLOURS[k % 5]}"'
        key.append(f'<rect x="{x}" y="{high - 12}" width="10" height="10" {fill}/><text x="{x + 15}" y="{high - 3}">{html.escape(name)}</text>')
        x += 28 + 7 * len(name)
    if known:
        key.append(
            f'<circle cx="{x + 5}" cy="{high - 7}" r="4.5" fill="none" stroke="{AUTO[INK]}" stroke-width="1.6"/>'
            f'<text x="{x + 15}" y="{high - 3}">the teacher\'s</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" aria-hidden="true" viewBox="0 0 {wide} {high}" '
        f'style="display: block; width: 100%; font: 12px {FONT}; fill: {AUTO[MUTED]}; font-variant-numeric: tabular-nums">'
        f'<text x="{left - 36}" y="14" style="font-weight: 600; fill: {AUTO[INK]}">singular values of ΔW</text>{"".join(out)}{"".join(key)}</svg>'
    )


def figures_html(run: LiveRun, numbers: Mapping[str, float], loss_now: float | None = None) -> str:
    """Step, loss, scaling, norm and what the problem measures, as a small table of name, value, note."""
    s, own, floor = run.settings, run.problem.spectrum, run.floor()
    loss = run.mean.last[1] if run.step else None
    rows = [
        ("step", f"{run.step:,}", f"of {s['steps']:,}"),
        ("loss", "–" if loss is None else short(loss), f"floor {short(floor)}" if floor is not None else ""),
        *([("loss now", short(loss_now), f"with alpha {s['alpha']:g}")] if loss_now is not None else []),
        ("alpha / r", f"{s['alpha'] / s['r']:.4g}", f"= {s['alpha']:g} / {s['r']}"),
        ("‖ΔW‖", f"{run.delta_norm():.3f}", f"‖ΔW*‖ {norm(own):.3f}" if own else ""),
        *((name, f"{value:.1%}", "") for name, value in numbers.items()),
    ]
    cells = "".join(
        f'<span style="color: {AUTO[MUTED]}; white-space: nowrap">{html.escape(name)}</span>'
        f'<b style="text-align: right; font-variant-numeric: tabular-nums; min-width: 4.4em">{value}</b>'
        f'<span style="color: {AUTO[MUTED]}; white-space: nowrap">{note}</span>'
        for name, value, note in rows
    )
    return (
        '<div style="display: grid; grid-template-columns: auto auto 1fr; gap: 1px 12px; line-height: 1.5; margin: 6px 4px; '
        f'color: {AUTO[INK]}">{cells}</div>'
    )


def samples_html(samples: Mapping | None) -> str:
    """What the model makes of a few samples: digits with what it reads, matrices as pictures, a text."""
    if not samples:
        return ""
    if "images" in samples:
        cells, wrong = [], []
        for image, truth, said in zip(samples["images"], samples["labels"], samples["predicted"], strict=True):
            right = said == truth
            if not right:
                wrong.append(f"a {truth} is read as {said}")
            cells.append(
                f'<span style="text-align: center"><img alt="" width="32" height="32" src="{_ink(np.asarray(image), 4)}" style="display: block">'
                f'<span style="font-weight: {600 if right else 400}; color: {AUTO[INK if right else MUTED]}">'
                f"{html.escape(said if right else f'✗ {said}')}</span></span>"
            )
        alt = f"{len(cells)} samples, {len(cells) - len(wrong)} read right" + (f"; {', '.join(wrong)}" if wrong else "")
        return (
            f'<div role="img" aria-label="{html.escape(alt)}" style="display: grid; grid-template-columns: repeat(5, minmax(34px, 44px)); '
            f'justify-items: center; gap: 4px; margin-top: 6px; line-height: 1.35">{"".join(cells)}</div>'
        )
    if "matrices" in samples:
        arrays = {name: np.asarray(matrix) for name, matrix in samples["matrices"].items()}
        most = max(float(np.abs(a).max()) for a in list(arrays.values())[-1:]) or 1.0  # the last one, which stands still, sets the scale
        cells = "".join(
            f'<span style="flex: 1 1 0; max-width: 150px"><img alt="map: {html.escape(name)}" src="{_signed(a / most)}" style="display: block; width: 100%; '
            f'image-rendering: pixelated; border: 1px solid {AUTO[GRID]}"><span style="color: {AUTO[MUTED]}; white-space: nowrap">'
            f"{html.escape(name)}</span></span>"
            for name, a in arrays.items()
        )
        return f'<div style="display: flex; gap: 12px; margin-top: 6px; line-height: 1.5">{cells}</div>'
    if "text" in samples:
        return f'<p style="line-height: 1.5; color: {AUTO[INK]}; white-space: pre-wrap; margin: 8px 0 0">{html.escape(samples["text"])}</p>'
    raise ValueError(f'samples are {{"images": ...}}, {{"matrices": ...}} or {{"text": ...}}; found {", ".join(samples)}')


def table_html(run: LiveRun) -> str:
    """The loss of all curves at a few steps."""
    runs = [entry for entry in all_runs(run) if len(entry.curve)]
    if not runs:
        return ""
    steps = sorted({max(1, round(run.settings["steps"] * share)) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)})
    head = "".join(f"<th scope='col'>{html.escape(label(entry, runs).replace(chr(10), ', ') if len(runs) > 1 else 'loss')}</th>" for entry in runs)
    rows = []
    for step in steps:
        cells = []
        for entry in runs:
            upto = [y for x, y in entry.mean.points() if x <= step]
            cells.append(f"<td>{short(upto[-1])}</td>" if upto and entry.mean.last[0] >= step else "<td>–</td>")
        rows.append(f"<tr><th scope='row'>{step}</th>{''.join(cells)}</tr>")
    return f"<table><thead><tr><th scope='col'>step</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def code_html(code: str) -> str:
    return (
        '<pre style="user-select: all; overflow-x: auto; line-height: 1.4; padding: 8px 12px; margin: 8px 0; '
        f'border: 1px solid {AUTO[GRID]}; color: {AUTO[INK]}; background: none">{html.escape(code)}</pre>'
    )


def _dash(slot: int, width: float) -> str:
    dash = DASHES[slot % len(DASHES)]
    return "" if dash == "-" else f' stroke-dasharray="{" ".join(f"{width * part:g}" for part in dash[1])}"'


def _power(exponent: int) -> str:
    if exponent in (-1, 0, 1, 2):
        return f"{10.0**exponent:g}"
    return f'10<tspan dy="-5" font-size="10">{str(exponent).replace("-", "−")}</tspan>'


def short(value: float) -> str:
    """Three digits, without an exponent where that reads well."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten that is not smaller."""
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= value * (1 - 1e-9))


def _ink(image: np.ndarray, scale: int) -> str:
    """A grey picture, 0 paper to 1 ink, as a data address: ink in the first colour, paper transparent, so that it fits any theme."""
    alpha = np.kron(np.clip(image, 0, 1), np.ones((scale, scale)))
    return _png(np.full(alpha.shape, 1.0), alpha)


def _signed(matrix: np.ndarray) -> str:
    """A matrix from -1 to 1: positive in the first colour, negative in the second, 0 transparent."""
    return _png(matrix, np.clip(np.abs(matrix), 0, 1))


def _png(sign: np.ndarray, alpha: np.ndarray) -> str:
    from PIL import Image

    blue, rust = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS[:2])
    pixels = np.empty((*sign.shape, 4), np.uint8)
    pixels[..., :3] = np.where(sign[..., None] >= 0, blue, rust)
    pixels[..., 3] = np.rint(255 * alpha)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
