"""The page itself: one HTML file, no script, nothing from a network; light and dark, for 400 pixels, for A4 and for a screen reader.

    page(history, notes, name, made) -> str

Whatever comes from a record goes through `_e` (cleaned and escaped): a record is somebody's file. State is always a shape and a word, never
a colour alone. Contrast of all text is at least 4.5:1 in both themes (a browser test measures it).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from html import escape
from math import sqrt

from .history import PAUSE, SURE, Event, History, LabWork, Mistake, Sitting, Work, spoken
from .portfolio import HOLDS, MARK, NO_PROOF, clean, say
from .records import Calibration

MOST_SITTINGS, MOST_MARKS, MOST_MISTAKES, MOST_SURPRISES, MOST_ELSEWHERE = 30, 60, 60, 8, 20
MOST_TOGETHER = 12  # rows of a table that paper keeps on one page with its heading

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --quiet: #55606b; --line: #d3d8dd; --paper: #fff; --wash: #f3f5f7;
  --good: #00705a; --good-wash: #e2f2ed; --bad: #a8480a; --bad-wash: #fbeee4; --guess: #7b3f9c; --hint: #0a5fa5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --quiet: #a7b0b9; --line: #3c434b; --paper: #14181c; --wash: #1d2329;
  --good: #57c9a8; --good-wash: #173029; --bad: #f2a065; --bad-wash: #33241a; --guess: #cda2ea; --hint: #79baf5; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.15; letter-spacing: -.015em; margin: 0; }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 3rem 0 .3rem; } h3 { font-size: 1.05rem; margin: 2rem 0 .3rem; }
p { margin: .4rem 0; max-width: 46rem; } a { color: inherit; } code { font: .9em ui-monospace, Menlo, Consolas, monospace; background: var(--wash);
  padding: .08em .3em; border-radius: 3px; overflow-wrap: anywhere; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.quiet { color: var(--quiet); } .small { font-size: .9rem; }
header { display: flex; gap: 1.1rem; align-items: center; } header svg { flex: none; width: 3.6rem; height: 3.6rem; }
.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1.2rem; margin: 1.8rem 0 0; padding: 0; }
.stats > div { border-top: 2px solid var(--ink); padding-top: .5rem; } .stats dt { color: var(--quiet); font-size: .9rem; }
.stats dd { margin: 0; } .stats b { font-size: 1.9rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.2; font-variant-numeric: tabular-nums; }
.bar { display: block; width: 100%; height: 6px; margin: .35rem 0 .1rem; }
.next { margin: 2rem 0 0; padding: 1rem 1.2rem; background: var(--good-wash); border-left: 5px solid var(--good); border-radius: 4px; }
.next h2 { margin: 0; font-size: .95rem; color: var(--good); letter-spacing: 0; } .next .ask { font-size: 1.15rem; font-weight: 600; margin: .1rem 0; }
.map { list-style: none; padding: 0; margin: 1rem 0 .8rem; display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(10.6rem, 1fr)); }
.tile { border: 1.5px solid var(--line); border-radius: 8px; padding: .6rem .75rem .65rem; display: flex; flex-direction: column; min-height: 7.4rem; }
.tile.elective { border-style: dashed; } .tile.begun { border-color: var(--ink); } .tile.done { border-color: var(--good); background: var(--good-wash); }
.tile .top { display: flex; justify-content: space-between; align-items: baseline; gap: .4rem; color: var(--quiet); font-size: .82rem; }
.tile .state { margin-right: auto; white-space: nowrap; }
.tile .number { font-size: 1.05rem; font-weight: 700; color: var(--ink); font-variant-numeric: tabular-nums; } .tile.done .number, .tile.done .state { color: var(--good); }
.tile .title { line-height: 1.3; font-size: .95rem; margin: .1rem 0 .5rem; overflow-wrap: anywhere; } .tile.new .title { color: var(--quiet); }
.tile a { text-decoration-thickness: 1px; text-underline-offset: 3px; }
.tile .points { font-size: .82rem; color: var(--quiet); white-space: nowrap; font-variant-numeric: tabular-nums; }
.cell { width: 15px; height: 15px; } .cells { margin-top: auto; display: flex; flex-wrap: wrap; gap: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; padding: 0; margin: .5rem 0; list-style: none; font-size: .9rem; color: var(--quiet); }
.legend li { display: flex; align-items: center; gap: .4rem; }
.mark { width: 14px; height: 14px; vertical-align: -2px; } .g { color: var(--good); } .b { color: var(--bad); } .p { color: var(--guess); } .h { color: var(--hint); }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-size: .95rem; } caption { text-align: left; color: var(--quiet); padding: 0 0 .3rem; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .9rem .45rem 0; border-top: 1px solid var(--line); } thead th { border: 0; color: var(--quiet); font-weight: 500;
  font-size: .85rem; padding-bottom: .15rem; } tbody th { font-weight: 500; } th:last-child, td:last-child { padding-right: 0; }
.story th:first-child { width: 36%; } .story .n { width: 5rem; } .diary th:first-child { width: 7.2rem; } .diary .n { width: 6.6rem; padding-right: 1.4rem; }
.story { table-layout: fixed; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; } .day { white-space: nowrap; font-variant-numeric: tabular-nums; }
.strip { display: flex; flex-wrap: wrap; gap: 2px 3px; align-items: center; } .strip span { font-size: .82rem; color: var(--quiet); margin: 0 .25rem 0 .55rem; } .strip span:first-child { margin-left: 0; }
.mistakes { list-style: none; padding: 0; margin: .8rem 0; columns: 2 22rem; column-gap: .7rem; }
.mistakes li { break-inside: avoid; margin: 0 0 .7rem; background: var(--wash); border-left: 4px solid var(--good); border-radius: 4px; padding: .65rem .9rem; overflow-wrap: anywhere; } .mistakes li.open { border-color: var(--bad); background: var(--bad-wash); }
.mistakes q { quotes: "“" "”"; } .mistakes p { margin: .3rem 0 0; }
.two { display: grid; grid-template-columns: minmax(0, 23rem) minmax(0, 1fr); gap: 1.5rem 2.4rem; align-items: start; }
.chart { width: 100%; height: auto; display: block; font-family: inherit; }
.chart text { fill: var(--quiet); font-size: 13px; } .chart .strong { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--wash); stroke-width: 3px; }
.surprises { padding-left: 1.2rem; margin: .5rem 0; } .surprises li { margin: .45rem 0; overflow-wrap: anywhere; }
footer { margin-top: 3.5rem; border-top: 1px solid var(--line); padding-top: .8rem; color: var(--quiet); font-size: .9rem; } footer h2 { font-size: 1rem; margin: 0 0 .2rem; color: var(--ink); }
@media (max-width: 40rem) { body { padding-top: 1.3rem; } h1 { font-size: 1.6rem; } header svg { width: 2.7rem; height: 2.7rem; } .two { grid-template-columns: minmax(0, 1fr); }
  .map { grid-template-columns: repeat(2, minmax(0, 1fr)); } .stats { grid-template-columns: repeat(2, minmax(0, 1fr)); } .stats b { font-size: 1.55rem; } th, td { padding-right: .6rem; }
  .story .n { width: 3.4rem; } .story, .diary { font-size: .9rem; } .diary th:first-child { width: 5.4rem; } .diary .n { width: 5rem; padding-right: .8rem; } }
@page { size: A4; margin: 14mm; }
@media print {
  :root { color-scheme: light; --ink: #000; --quiet: #444; --line: #bbb; --paper: #fff; --wash: #f3f5f7; --good: #00604d; --good-wash: #e9f4f0; --bad: #8f3d08; --bad-wash: #faf0e8;
    --guess: #6a3488; --hint: #084f8a; }
  html { font-size: 9.5pt; } body { font-size: 1rem; line-height: 1.4; padding: 0; max-width: none; } h1 { font-size: 19pt; } h2 { font-size: 12.5pt; margin-top: 7mm; } h3 { font-size: 10.5pt; margin-top: 4mm; }
  h2, h3, caption, section > p { break-after: avoid; } .tile, .next, .mistakes li, tr, .two > *, .stats > div, .surprises li, .short { break-inside: avoid; } a { text-decoration: none; }
  .tile, .next, .mistakes li { print-color-adjust: exact; -webkit-print-color-adjust: exact; } .stats { grid-template-columns: repeat(4, 1fr); } .stats b { font-size: 16pt; }
  .map { grid-template-columns: repeat(5, 1fr); gap: 2mm; } .tile { min-height: 22mm; padding: 1.6mm 2mm; } .mistakes { columns: 2; } .mistakes li { margin-bottom: 2mm; }
  .two { grid-template-columns: 78mm 1fr; } table { font-size: .95rem; break-inside: avoid; } th, td { padding-top: 1mm; padding-bottom: 1mm; }
}
"""  # noqa: E501

# Drawn once, used by name. Each differs in shape; colour comes from the place that uses it.
_SHAPES = """<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>
<symbol id="c-first" viewBox="0 0 16 16"><rect x="1" y="1" width="14" height="14" rx="2.5" fill="var(--good)"/>
<path d="M4.2 8.4l2.6 2.7 5-6" fill="none" stroke="var(--paper)" stroke-width="2" stroke-linecap="round" stroke-linejoin="round"/></symbol>
<symbol id="c-later" viewBox="0 0 16 16"><rect x="1" y="1" width="14" height="14" rx="2.5" fill="var(--good)"/></symbol>
<symbol id="c-tried" viewBox="0 0 16 16"><path d="M2 14V3.5A1.5 1.5 0 0 1 3.5 2H14z" fill="var(--bad)"/>
<rect x="1.8" y="1.8" width="12.4" height="12.4" rx="2" fill="none" stroke="var(--bad)" stroke-width="1.6"/></symbol>
<symbol id="c-new" viewBox="0 0 16 16"><rect x="1.8" y="1.8" width="12.4" height="12.4" rx="2" fill="none" stroke="var(--quiet)" stroke-width="1.3"/></symbol>
<symbol id="m-pass" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7" fill="currentColor"/>
<path d="M4.6 8.3l2.4 2.5 4.5-5.4" fill="none" stroke="var(--paper)" stroke-width="1.9" stroke-linecap="round" stroke-linejoin="round"/></symbol>
<symbol id="m-try" viewBox="0 0 16 16"><circle cx="8" cy="8" r="5" fill="none" stroke="currentColor" stroke-width="2"/></symbol>
<symbol id="m-hint" viewBox="0 0 16 16">
<path d="M5 6.2a3 3 0 1 1 4.3 2.7C8.3 9.4 8 9.9 8 10.8M8 13.3v.4" fill="none" stroke="currentColor" stroke-width="2"
stroke-linecap="round"/></symbol>
<symbol id="m-guess" viewBox="0 0 16 16"><path d="M8 1.5l6 6.5-6 6.5-6-6.5z" fill="currentColor"/></symbol></defs></svg>"""

# B times A: the tall and the wide factor, with as much of them filled as is solved.
_LOGO = (
    '<svg viewBox="0 0 64 64" aria-hidden="true"><g fill="none" stroke="var(--ink)" stroke-width="2.5"><rect x="6" y="18" width="11" height="40" rx="2.5"/>'
    '<rect x="24" y="6" width="34" height="11" rx="2.5"/></g>'
    '<rect x="24" y="24" width="34" height="34" rx="2.5" fill="none" stroke="var(--line)" stroke-width="2"/>'
    '<rect x="24" y="{y:.1f}" width="34" height="{height:.1f}" rx="2.5" fill="var(--good)"/></svg>'
)


def page(history: History, notes: Sequence[str], name: str | None, made: datetime) -> str:
    """The whole file. `made`: with its time zone, in which days are told."""
    zone = made.tzinfo
    whose = f"{name}’s way through LoRA Lab" if name else "My way through LoRA Lab"
    begun = [lab for lab in history.labs.values() if lab.begun]
    parts = [_head(history, whose, made), _next(history), _map(history)]
    if begun:
        parts += [_diary(history.sittings, history.labs, zone), _mistakes(history, zone)]
    parts += [_predictions(history, zone), _details(history, begun, zone)] if begun else []
    parts.append(_about(history, notes))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{MARK}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{_e(whose)}</title><style>{_STYLE}</style></head>\n'
        f"<body>{_SHAPES}<main>{''.join(parts)}</main></body></html>\n"
    )


# ---------------------------------------------------------------- the parts, from top to bottom


def _head(history: History, whose: str, made: datetime) -> str:
    works, labs = history.works, history.labs.values()
    solved = [work for work in works if work.state == "solved"]
    share = len(solved) / len(works) if works else 0.0
    when = f"Made on {_day(made)}."
    if history.sittings:
        first, last = (_day(s.began.astimezone(made.tzinfo)) for s in (history.sittings[0], history.sittings[-1]))
        when = f"{f'From {first} to {last}' if first != last else first}. {when}"
    head = f'<header>{_LOGO.format(y=58 - 34 * share, height=34 * share)}<div><h1>{_e(whose)}</h1><p class="quiet">{when}</p></div></header>'
    if not history.sittings:
        return head
    core, electives = ([lab for lab in labs if lab.lab.core is kind] for kind in (True, False))
    points, most = (sum(lab.points for lab in core), sum(lab.lab.points for lab in core))
    more = sum(lab.points for lab in electives)
    first_tries = sum(work.tries == 1 and not work.hints for work in solved)
    found = history.calibration
    brier = f"Brier score {found.brier:.2f}" if found.count else ""
    right = sum(guess.standing.state == "right" for guess in history.guesses)
    decided = sum(guess.standing.state in ("right", "wrong") for guess in history.guesses)
    stats = [
        ("points in core labs", f"{points} <span class='small quiet'>of {most}</span>", _bar(points, most) + (f"and {more} in electives" if more else "")),
        ("exercises solved", str(len(solved)), f"{first_tries} at the first try, without a hint"),
        ("at work, at least", _hours(history.seconds), f"in {_many(len(history.sittings), 'sitting')}"),
        ("predictions came true", f"{right} <span class='small quiet'>of {decided}</span>" if decided else "–", brier),
    ]
    shown = "".join(f'<div><dt>{what}</dt><dd><b>{number}</b><div class="small quiet">{note}</div></dd></div>' for what, number, note in stats)
    return f'{head}<dl class="stats">{shown}</dl>'


def _next(history: History) -> str:
    step = history.next_step
    ask, link = _inline(step.ask), history.labs.get(step.lab)
    if link is not None and link.begun:
        ask = f'<a href="#lab-{link.lab.number}">{ask}</a>'
    hello = "" if history.sittings else "<p>Nothing is recorded yet. This page fills with every check, hint and prediction, whatever comes out of it.</p>"
    why = f'<p class="ask">{ask}.</p><p>{_inline(step.why)}</p>{hello}'
    return f'<section class="next" aria-labelledby="next"><h2 id="next">Next</h2>{why}</section>'


def _map(history: History) -> str:
    tiles = []
    for lab in history.labs.values():
        title = _e(lab.lab.title)
        title = f'<a href="#lab-{lab.lab.number}">{title}</a>' if lab.begun else title
        state = {"done": "✓ done", "begun": "begun", "new": "elective" if not lab.lab.core else ""}[lab.state]
        cells = "".join(f'<svg class="cell" aria-hidden="true"><use href="#{_shape(work)}"/></svg>' for work in lab.works)
        told = f"{lab.solved} of {_many(len(lab.works), 'exercise')} solved"
        told += "".join(f"; {work.exercise.id} {_state(work)}" for work in lab.works if lab.begun)
        told_points = f"{lab.points} of {_many(lab.lab.points, 'point')}"
        kind = f"{lab.state}{'' if lab.lab.core else ' elective'}"
        tiles.append(
            f'<li class="tile {kind}"><div class="top"><span class="number">{lab.lab.label}</span><span class="state">{state}</span>'
            f'<span class="points"><span class="unseen">{told_points}</span><span aria-hidden="true">{lab.points} / {lab.lab.points}</span></span></div>'
            f'<div class="title">{title}</div><div class="cells" role="img" aria-label="{_e(told)}">{cells}</div></li>'
        )
    shapes = (("c-first", "solved at the first try, without a hint"), ("c-later", "solved"), ("c-tried", "tried"), ("c-new", "open"))
    legend = "".join(f'<li><svg class="cell" aria-hidden="true"><use href="#{id}"/></svg>{text}</li>' for id, text in shapes)
    return (
        f'<section aria-labelledby="map"><h2 id="map">The course</h2><p class="quiet">Each square is an exercise, each number the points of a lab. '
        f'A dashed frame is an elective.</p><ol class="map">{"".join(tiles)}</ol><ul class="legend" aria-label="Squares">{legend}</ul></section>'
    )


def _diary(sittings: Sequence[Sitting], labs, zone) -> str:
    rows, passed = [], set()
    for sitting in sittings:
        marks = _marks(sitting.events, passed)
        if not marks:
            continue
        strip, lab_before = [], None
        for lab, kind in marks[:MOST_MARKS]:
            if lab != lab_before:
                label = labs[lab].lab.label if lab in labs else clean(lab, 6) or "?"
                strip.append(f"<span>{_e(label)}</span>")
                lab_before = lab
            strip.append(f'<svg class="mark {kind[0]}"><use href="#{kind[1]}"/></svg>')
        if len(marks) > MOST_MARKS:
            strip.append(f"<span>and {len(marks) - MOST_MARKS} more</span>")
        counts = Counter(kind[2] for _, kind in marks)
        where = ", ".join(labs[lab].lab.label if lab in labs else clean(lab, 6) for lab in dict.fromkeys(lab for lab, _ in marks))
        told = f"Lab {where}: " + ", ".join(f"{what}: {count}" for what, count in counts.items())
        day = sitting.began.astimezone(zone)
        rows.append(
            f'<tr><th scope="row" class="day">{_weekday(day)} {_day(day, year=False)}</th><td class="n">{_hours(sitting.seconds)}</td>'
            f'<td><div class="strip" role="img" aria-label="{_e(told)}">{"".join(strip)}</div></td></tr>'
        )
    if not rows:
        return ""
    earlier = f'<p class="small quiet">{_many(len(rows) - MOST_SITTINGS, "earlier sitting")} not shown.</p>' if len(rows) > MOST_SITTINGS else ""
    kinds = ((_PASS, "solved"), (_TRY, "a try that did not pass"), (_HINT, "hint"), (_GUESS, "prediction"))
    legend = "".join(f'<li><svg class="mark {kind[0]}" aria-hidden="true"><use href="#{kind[1]}"/></svg>{text}</li>' for kind, text in kinds)
    minutes = round(PAUSE.total_seconds() / 60)
    columns = '<th scope="col">day</th><th scope="col" class="n">at least</th><th scope="col">lab, and what happened in it, in order</th>'
    short = ' class="short"' if len(rows) <= MOST_TOGETHER else ""
    return (
        f'<section aria-labelledby="diary"{short}><h2 id="diary">Sitting by sitting</h2><p class="quiet">Time is counted between checks, hints and '
        f"predictions; a pause of more than {minutes} minutes counts as none, so it was at least this.</p>"
        f'<table class="diary"><thead><tr>{columns}</tr></thead><tbody>{"".join(rows[-MOST_SITTINGS:])}</tbody></table>'
        f'<ul class="legend" aria-label="Marks">{legend}</ul>{earlier}</section>'
    )


# (class, symbol, in words)
_PASS, _TRY = ("g", "m-pass", "exercises solved"), ("b", "m-try", "tries that did not pass")
_HINT, _GUESS = ("h", "m-hint", "hints"), ("p", "m-guess", "predictions")


def _marks(events: Sequence[Event], passed: set[str]) -> list[tuple[str, tuple[str, str, str]]]:
    """(lab, mark) of what happened, in order; `passed` grows: an exercise is solved once."""
    found = []
    for event in events:
        kind = {"hint": _HINT, "predict": _GUESS}.get(event.kind)
        if event.kind == "check" and event.record.get("status") != "not started":
            exercise = str(event.record.get("exercise"))
            kind = _TRY
            if event.record.get("passed") is True:
                kind = None if exercise in passed else _PASS
                passed.add(exercise)
        if kind:
            found.append((event.lab, kind))
    return found


def _mistakes(history: History, zone) -> str:
    mistakes = history.mistakes
    head = '<section aria-labelledby="mistakes"><h2 id="mistakes">Mistakes that were named</h2>'
    if not mistakes:
        none = "None so far. When a check recognises which mistake it is, its sentence stands here, also when it is overcome."
        return f'{head}<p class="quiet">{none}</p></section>'
    still = sorted((m for m in mistakes if m.overcome is None), key=lambda m: m.last, reverse=True)
    gone = sorted((m for m in mistakes if m.overcome is not None), key=lambda m: m.overcome, reverse=True)
    told = f"{_many(len(gone), 'mistake')} overcome" + (f", {len(still)} still open" if still else ", none left open")
    titles = {work.exercise.id: work.exercise.title for work in history.works}
    shown = [_mistake(m, titles[m.exercise], zone) for m in (*still, *gone)]
    listed = f'<ul class="mistakes">{"".join(shown[:MOST_MISTAKES])}</ul>'
    if len(shown) > MOST_MISTAKES:
        listed += f'<p class="small quiet">And {len(shown) - MOST_MISTAKES} more: export_progress("my-progress.json") has them all.</p>'
    return f'{head}<p class="quiet">What checks recognised in wrong answers, in their words. {told}.</p>{listed}</section>'


def _mistake(mistake: Mistake, title: str, zone) -> str:
    text = _inline(mistake.text) if clean(mistake.text) else _e(spoken(mistake.key), 60)
    often = {1: "named once", 2: "named twice"}.get(mistake.count, f"named {mistake.count} times")
    if mistake.overcome is None:
        state = f'<strong class="b">◐ still open</strong>, {often}, last on {_day(mistake.last.astimezone(zone), year=False)}'
    else:
        state = f'<strong class="g">✓ overcome</strong> {_later(mistake.first, mistake.overcome, zone)}, {often}'
    again = "; it had been overcome before" if mistake.returned else ""
    return (
        f'<li{" class=open" if mistake.overcome is None else ""}><q>{text}</q><p class="small">{state}{again}.</p>'
        f'<p class="small quiet">{mistake.exercise} {_e(title)}</p></li>'
    )


def _predictions(history: History, zone) -> str:
    states = Counter(guess.standing.state for guess in history.guesses)
    found, surprises = history.calibration, sorted((g for g in history.guesses if g.surprising), key=lambda g: -g.standing.sure)
    head = '<section aria-labelledby="guesses"><h2 id="guesses">How sure, and how often right</h2>'
    decided = states["right"] + states["wrong"]
    counts = [f"{states['right']} of {_many(decided, 'prediction')} came true" if decided else "No prediction was decided by its run yet"]
    counts += [f"{states['waiting']} {'waits for its' if states['waiting'] == 1 else 'wait for their'} run"] if states["waiting"] else []
    late = sum(guess.standing.state == "late" and guess.standing.changed for guess in history.guesses)
    counts += [f"{late} came after the outcome and {'does' if late == 1 else 'do'} not count"] if late else []
    silent = decided - found.count
    counts += [f"{silent} did not say how sure"] if silent else []
    text = f'<p class="quiet">{"; ".join(counts)}.</p>'
    if not found.count:
        how = 'Say how sure you are: <code>predict("3.A", "b", sure=0.7)</code>. Then this page can show whether 70 % means seven of ten for you.'
        return f"{head}{text}<p>{how}</p></section>"
    cells = [(said, (part.count, part.right, _range(*part.ordinary()))) for said, part in found.parts()]
    rows = "".join(f'<tr><th scope="row">{said}</th>{"".join(f"<td class=n>{cell}</td>" for cell in row)}</tr>' for said, row in cells)
    columns = "".join(f'<th scope="col" class="n">{text}</th>' for text in ("predictions", "came true", "ordinary"))
    table = (
        "<table><caption>By confidence. “Ordinary” is what would come true in nine of ten cases or more, were the confidence exactly right.</caption>"
        f'<thead><tr><th scope="col">you said</th>{columns}</tr></thead><tbody>{rows}</tbody></table>'
    )
    brier = (
        f"<p>Brier score <strong>{found.brier:.2f}</strong>: the mean of (sure − outcome)². 0 is perfect, and saying 50 % every time gives 0.25.</p>"
        f"<p>On average you were {_percent(found.mean_sure)} sure, and {_percent(found.right / found.count)} came true. {_verdict(found)}</p>"
    )
    wrong = ""
    if surprises:
        items = "".join(
            f"<li>{_percent(g.standing.sure)} sure of <strong>{_e(say(g.prediction, g.standing.value), 160)}</strong>; the run said <strong>"
            f'{_e(say(g.prediction, g.standing.outcome), 160)}</strong>.<div class="small quiet">{g.prediction.id} {_e(g.prediction.question, 300)}</div></li>'
            for g in surprises[:MOST_SURPRISES]
        )
        when = f'<p class="quiet">Sure ({_percent(SURE)} or more), and wrong: here most is to be learned.</p>'
        wrong = f'<h3>Surprises</h3>{when}<ul class="surprises">{items}</ul>'
    return f'{head}{text}<div class="two"><div>{reliability(found)}</div><div>{brier}{table}</div></div>{wrong}</section>'


def _verdict(found: Calibration) -> str:
    if found.verdict == "over":
        return "So few would be rare if your confidence were right: you seem surer than you should be."
    if found.verdict == "under":
        return "So many would be rare if your confidence were right: you know more than you think."
    return "That fits, as far as this many predictions can tell." if found.count >= 20 else "So few predictions decide nothing yet."


def reliability(found: Calibration) -> str:
    """What was said against what came true: a dot for each group of confidences, the bar behind it what would be ordinary, each answer a tick."""
    left, top, size = 50, 26, 300

    def x(share):
        return left + share * size

    def y(share):
        return top + (1 - share) * size

    parts = [f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="var(--wash)"/>']
    for share in (0.25, 0.5, 0.75):
        parts.append(f'<path d="M{x(share):.1f} {top}v{size}M{left} {y(share):.1f}h{size}" stroke="var(--line)" fill="none"/>')
    parts.append(f'<path d="M{x(0)} {y(0)}L{x(1)} {y(1)}" stroke="var(--quiet)" stroke-width="1.5" stroke-dasharray="5 4" fill="none"/>')
    parts.append(f'<text transform="translate({x(0.2):.1f} {y(0.2) - 7:.1f}) rotate(-45)" text-anchor="middle">exactly as sure as right</text>')
    for sure, right in found.answers:  # a tick at the edge: above what came true, below what did not
        edge = f"{y(1) - 1:.1f}v-9" if right else f"{y(0) + 1:.1f}v9"
        parts.append(f'<path d="M{x(sure):.1f} {edge}" stroke="var(--guess)" stroke-width="2" opacity=".55"/>')
    taken: list[tuple[float, float]] = []
    for _, part in found.parts():
        at, share = part.mean_sure, part.right / part.count
        low, high = (k / part.count for k in part.ordinary())
        radius = min(5 + 1.6 * sqrt(part.count), 13)
        parts.append(
            f'<path d="M{x(at):.1f} {y(low):.1f}V{y(high) - 0.1:.1f}" stroke="var(--guess)" stroke-width="11" stroke-linecap="round" opacity=".25"/>'
            f'<circle cx="{x(at):.1f}" cy="{y(share):.1f}" r="{radius:.1f}" fill="var(--guess)" stroke="var(--paper)" stroke-width="2"/>'
        )
        # Above the dot, below it at the top of the chart, and on from there until no other label is in the way.
        step = -1 if share < 0.9 else 1
        height = y(share) + step * (radius + 5) + (0 if step < 0 else 9)
        while any(abs(height - other) < 14 and abs(x(at) - where) < 28 for where, other in taken):
            height += 14 * step
        taken.append((x(at), height))
        parts.append(f'<text class="strong" x="{x(at):.1f}" y="{height:.1f}" text-anchor="middle">{part.right}/{part.count}</text>')
    for share in (0, 0.5, 1):
        parts.append(
            f'<text x="{x(share):.1f}" y="{y(0) + 27}" text-anchor="middle">{_percent(share)}</text>'
            f'<text x="{left - 7}" y="{y(share) + 4.5:.1f}" text-anchor="end">{_percent(share)}</text>'
        )
    parts.append(f'<text x="{x(0.5)}" y="{y(0) + 46}" text-anchor="middle">how sure you were</text><text x="{left - 44}" y="13">how much came true</text>')
    told = "; ".join(f"{said} sure, on average {_percent(part.mean_sure)}: {part.right} of {part.count} came true" for said, part in found.parts())
    return f'<svg class="chart" role="img" aria-label="Reliability of your confidence. {_e(told)}." viewBox="0 0 370 378">{"".join(parts)}</svg>'


def _details(history: History, begun: Sequence[LabWork], zone) -> str:
    parts = ['<section aria-labelledby="labs"><h2 id="labs">Lab by lab</h2>']
    for lab in begun:
        rows = "".join(
            f'<tr><th scope="row">{work.exercise.id} {_e(work.exercise.title)}</th><td>{_story(work)}</td>'
            f'<td class="n">{work.points} / {work.exercise.points}</td></tr>'
            for work in lab.works
        )
        right = sum(g.standing.state == "right" for g in lab.guesses)
        decided = sum(g.standing.state in ("right", "wrong") for g in lab.guesses)
        said = [f"{lab.points} of {_many(lab.lab.points, 'point')}", f"at least {_hours(lab.seconds)}" if lab.seconds >= 30 else ""]
        said.append(f"{right} of {_many(decided, 'prediction')} came true" if decided else "")
        head = f'<h3 id="lab-{lab.lab.number}">{lab.lab.label} {_e(lab.lab.title)}</h3>'
        caption = f"<caption>{'; '.join(text for text in said if text)}</caption>"
        parts.append(
            f'{head}<table class="story">{caption}<thead><tr><th scope="col">exercise</th><th scope="col">how it went</th>'
            f'<th scope="col" class="n">points</th></tr></thead><tbody>{rows}</tbody></table>'
        )
    new = [lab for lab in history.labs.values() if not lab.begun]
    if new:
        parts.append(f'<h3>Not begun</h3><p class="quiet">{"; ".join(f"{lab.lab.label} {_e(lab.lab.title)}" for lab in new)}.</p>')
    if history.elsewhere:
        shown = history.elsewhere[:MOST_ELSEWHERE]
        listed = ", ".join(f"{_e(id, 20)} ({'passed' if ok else 'not passed'}, {_many(tries, 'try', 'tries')})" for id, tries, ok in shown)
        more = f", and {len(history.elsewhere) - len(shown)} more" if len(history.elsewhere) > len(shown) else ""
        parts.append(
            f'<h3>From another version of the lab</h3><p class="quiet">Exercises that this version does not have, without points: {listed}{more}.</p>'
        )
    return "".join(parts) + "</section>"


def _story(work: Work) -> str:
    """ "✓ solved at the third try, with 1 hint; 12 min; 2 mistakes named" """
    icon, look = {"solved": ("✓", "g"), "tried": ("◐", "b"), "new": ("○", "quiet")}[work.state]
    words = [f'<strong class="{look}" aria-hidden="true">{icon}</strong> {_state(work)}']
    if work.lent and work.state != "solved":
        words.append("went on with the lab’s own version")
    if work.hints and work.state == "new":
        words.append(_many(work.hints, "hint"))
    if work.seconds >= 30:
        words.append(_hours(work.seconds))
    if work.mistakes:
        words.append(f"{_many(len(work.mistakes), 'mistake')} named")
    return "; ".join(words)


def _about(history: History, notes: Sequence[str]) -> str:
    listed = "".join(f"<li>{_e(note)}</li>" for note in notes)
    listed = f"<p>A word about the records:</p><ul>{listed}</ul>" if listed else ""
    made = f"<p>Made by LoRA Lab from {_many(history.count, 'record')}. {HOLDS}</p><p>{NO_PROOF}</p>"
    return f"<footer><h2>What this page is</h2>{made}{listed}</footer>"


# ---------------------------------------------------------------- words and small pieces


def _e(text, most: int = 500) -> str:
    return escape(clean(text, most))


def _inline(text: str) -> str:
    """Escaped, with `code` in backticks set as code."""
    parts = _e(text, 700).split("`")
    if len(parts) % 2 == 0:
        return "`".join(parts)
    return "".join(f"<code>{part}</code>" if n % 2 else part for n, part in enumerate(parts))


def _shape(work: Work) -> str:
    if work.state == "solved":
        return "c-first" if work.tries == 1 and not work.hints else "c-later"
    return "c-tried" if work.state == "tried" else "c-new"


def _state(work: Work) -> str:
    hints = "" if not work.hints else f", with {_many(work.hints, 'hint')}" if work.hints < 3 else ", with all three hints"
    if work.state == "solved":
        return f"solved at the {_nth(work.tries)} try{hints}"
    return f"tried {_times(work.tries)}{hints}, not solved" if work.state == "tried" else "open"


def _nth(count: int) -> str:
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
    if count <= len(words):
        return words[count - 1]
    return f"{count}{'th' if count % 100 in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(count % 10, 'th')}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _many(count: int, what: str, several: str = "") -> str:
    return f"{count:,} {what if count == 1 else several or what + 's'}"


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _hours(seconds: float) -> str:
    """ "45 min", "3 h 05 min" """
    minutes = round(seconds / 60)
    text = f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _later(first: datetime, overcome: datetime, zone) -> str:
    gap = overcome - first
    if gap < timedelta(hours=1):
        minutes = round(gap.total_seconds() / 60)
        return f"{_many(minutes, 'minute')} later" if minutes else "within a minute"
    days = (overcome.astimezone(zone).date() - first.astimezone(zone).date()).days
    return "the same day" if days == 0 else "the next day" if days == 1 else f"{days} days later"


# Names by hand: strftime would take the machine's language.
def _weekday(time: datetime) -> str:
    return ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[time.weekday()]


def _day(time: datetime, year: bool = True) -> str:
    month = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")[time.month - 1]
    return f"{time.day} {month}" + (f" {time.year}" if year else "")


def _bar(part: int, whole: int) -> str:
    width = 100 * part / whole if whole else 0
    return (
        f'<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true"><rect width="100" height="6" fill="var(--line)"/>'
        f'<rect width="{width:.1f}" height="6" fill="var(--good)"/></svg>'
    )
