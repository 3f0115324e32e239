"""Pages: one per student (what failed, which mistake, what to read), one for the class. Plain HTML, no script, readable on any paper.

A student's page holds no number of a hidden input: sentences of judges and messages of errors lose their numbers, except shapes, which
stand in the lab's own text. Everything from a notebook is escaped.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from datetime import datetime
from html import escape

from ..exercise import Lab
from ..history import standing

STATUS = {
    "passed": "✓ passed", "failed": "✗ not yet", "time": "✗ ran too long", "not started": "○ not written", "missing": "○ not found",
    "unreadable": "○ not readable",
}  # fmt: skip
STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 25%, transparent); --wash: color-mix(in srgb, currentColor 6%, transparent) }
body { font: 1rem/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.2rem } h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem }
table { border-collapse: collapse; width: 100% } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
section.task { border-left: 3px solid var(--line); padding: .1rem 0 .1rem 1rem; margin: 1.2rem 0 }
.mistake { background: var(--wash); padding: .5rem .8rem; border-radius: .3rem } code { background: var(--wash); padding: 0 .2rem }
.bar { display: inline-block; height: .7em; background: currentColor; opacity: .55; vertical-align: baseline } .quiet { opacity: .75 }
@media print { body { margin: 0 } }
"""


def page(title: str, body: list[str]) -> str:
    return "\n".join([
        '<!doctype html>', '<html lang="en">', "<head>", '<meta charset="utf-8">', '<meta name="viewport" content="width=device-width">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", "</head>", "<body>", "<main>", f"<h1>{escape(title)}</h1>", *body,
        "</main>", "</body>", "</html>", "",
    ])  # fmt: skip


def table(caption: str, head: list[str], rows: list[list], numbers: tuple[int, ...] = ()) -> str:
    """Cells are escaped, except those of type Html."""
    def cell(n, value, tag="td"):
        text = value if isinstance(value, Html) else escape(str(value))
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{' class=n' if n in numbers else ''}>{text}</{tag}>"

    lines = [f"<table><caption>{escape(caption)}</caption>", "<thead><tr>" + "".join(cell(n, h, "th") for n, h in enumerate(head)) + "</tr></thead>", "<tbody>"]
    lines += ["<tr>" + "".join(cell(n, value) for n, value in enumerate(row)) + "</tr>" for row in rows]
    return "\n".join([*lines, "</tbody></table>"])


class Html(str):
    """Text that is HTML already."""


# ---------------------------------------------------------------- what a student may read

_SHAPE = re.compile(r"shape \((?:\d+(?:, ?\d*)*)?\)(?: \(a single number\))?")
_NUMBER = re.compile(r"(?<![A-Za-z_])[-+−]?(?:\d+(?:[,_]\d{3})*\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)


def without_numbers(text: str) -> str:
    """The sentence with … for its numbers; what stands as "shape (3, 7)" stays, for shapes are the same for everybody."""
    parts, at = [], 0
    for shape in _SHAPE.finditer(text):
        parts += [_NUMBER.sub("…", text[at : shape.start()]), shape[0]]
        at = shape.end()
    parts.append(_NUMBER.sub("…", text[at:]))
    return re.sub(r"…(?:[,;\s]*…)+", "…", "".join(parts))


def what_happened(entry: dict) -> list[str]:
    """Lines of HTML on one exercise that did not pass."""
    status, error, lines = entry["status"], entry["error"], []
    if status in ("missing", "unreadable") and entry["why"]:
        lines.append(f"<p>{escape(without_numbers(entry['why']))}</p>")
    if status == "not started":
        lines.append("<p>The cell is as it was handed out.</p>")
    failing = [title for title, passed in entry["cases"] if not passed]
    if failing:
        lines.append(f"<p>Property that does not hold: <strong>{escape(failing[0])}</strong></p>")
    if entry["cases"]:
        right = sum(passed for _, passed in entry["cases"])
        lines.append(f"<p class=quiet>{right} of {entry['total']} properties hold.</p>")
    if error is not None and error["kind"] == "exception" and not entry["broke"]:
        where = error["where"]
        place = f" at <code>{escape(without_numbers(where['text']))}</code> in <code>{escape(where['function'])}</code>" if where else ""
        message = f": {escape(without_numbers(error['message']))}" if error["message"] else ""
        lines.append(f"<p>Your code raised <code>{escape(error['type'])}</code>{message}{place}</p>")
    elif error is not None:
        message = error["message"] if entry["broke"] else without_numbers(error["message"])
        lines.append(f"<p>{escape(message[:1].upper() + message[1:])}.</p>")
    elif entry["failure"]:
        lines.append(f"<p>{escape(without_numbers(entry['failure']))}</p>")
    if entry["diagnosis"]:
        lines.append(f"<p class=mistake><strong>Which mistake it is:</strong> {escape(entry['diagnosis']['text'])}</p>")
    if entry.get("lent"):
        names = ", ".join(f"<code>{escape(name)}</code>" for name in entry["lent"])
        lines.append(f"<p class=quiet>Graded with the lab's own {names}, because yours did not pass: it costs nothing here.</p>")
    return lines


def student_page(student: str, marks: list[dict], labs: dict[str, Lab], manual: dict | None = None) -> str:
    body = ["<p>Inputs in grading are new, so the numbers differ from those in your notebook. What counts is which property holds.</p>"]
    rows = [[f"{labs[m['lab']].label} · {labs[m['lab']].title}", "?" if m["points"] is None else m["points"], m["max"]] for m in marks]
    body.append(table("Points", ["lab", "points", "of"], rows, (1, 2)))
    for m in marks:
        lab = labs[m["lab"]]
        body.append(f"<h2>{escape(lab.label)} · {escape(lab.title)}</h2>")
        if m["problem"]:
            body.append(f"<p class=mistake><strong>This notebook could not be graded:</strong> {escape(m['problem'])}</p>")
            continue
        body += [f"<p class=quiet>Note: {escape(note)}</p>" for note in m["notes"]]
        for exercise in lab.exercises:
            entry = m["exercises"].get(exercise.id)
            if entry is None:
                continue
            body.append(f'<section class="task"><h3>{STATUS[entry["status"]]} · {escape(exercise.id)} {escape(exercise.title)} '
                        f"· {entry['points']} of {_points(entry['max'])}</h3>")  # fmt: skip
            if entry["status"] != "passed":
                body += what_happened(entry)
                body.append(f"<p>To read: {escape(exercise.read)}</p>")
            body.append("</section>")
        for id, text in (manual or {}).get((student, lab.number), {}).items():
            body.append(f'<section class="task"><h3>Written answer {escape(id)}</h3><p>{escape(text)}</p></section>')
    return page(f"Feedback for {student}", body)


def _points(count: int) -> str:
    return f"{count} point{'s' * (count != 1)}"


# ---------------------------------------------------------------- the class


def class_page(marks: list[dict], labs: dict[str, Lab], walls: list[str], left_out: list[str]) -> str:
    body = [f"<p>{len({m['student'] for m in marks})} students, {len(marks)} notebooks.</p>"]
    body.append("<h2>Exercises</h2>")
    for number, lab in labs.items():
        group = [m for m in marks if m["lab"] == number]
        if group:
            body += _lab_section(lab, group)
    strange = [[m["student"], labs[m["lab"]].label, id, f"{entry['broke']}: {(entry['error'] or {}).get('message') or entry['why']}"]
               for m in marks for id, entry in m["exercises"].items() if entry.get("broke")]  # fmt: skip
    if strange:
        body += ["<h2>Worth a look</h2>", "<p>Code that ended its process, used up its memory or wrote into the grader's channel. An accident "
                 "looks the same as an attempt.</p>", table("Runs that ended early", ["student", "lab", "exercise", "what"], strange)]  # fmt: skip
    problems = [[m["student"], labs[m["lab"]].label, m["problem"]] for m in marks if m["problem"]]
    if problems:
        body += ["<h2>Not readable</h2>", table("Notebooks without marks", ["student", "lab", "why"], problems)]
    if left_out:
        body += ["<h2>Left out</h2>", "<ul>", *(f"<li>{escape(line)}</li>" for line in left_out), "</ul>"]
    body += ["<h2>How it was graded</h2>", "<ul>", *(f"<li>{escape(line)}</li>" for line in walls), "</ul>"]
    return page("The class", body)


def _lab_section(lab: Lab, group: list[dict]) -> list[str]:
    body = [f"<h3>{escape(lab.label)} · {escape(lab.title)} ({len(group)} notebooks)</h3>"]
    rows, mistakes, own = [], [], []
    for exercise in lab.exercises:
        entries = [m["exercises"][exercise.id] for m in group if exercise.id in m["exercises"]]
        status = Counter(e["status"] for e in entries)
        share = status["passed"] / len(entries) if entries else 0.0
        hints = [m for m in group if _hints(m, exercise.id)]
        rungs = statistics.mean(_hints(m, exercise.id) for m in hints) if hints else 0.0
        bar = Html(f'<span class="bar" style="width:{share * 8:.2f}rem"></span> {share:.0%}')
        rows.append([f"{exercise.id} {exercise.title}", bar, status["failed"], status["time"], status["not started"] + status["missing"],
                     f"{len(hints)} ({rungs:.1f})" if hints else "0", _tries(group, exercise.id)])  # fmt: skip
        named = Counter(e["diagnosis"]["key"] if e["diagnosis"] else "(unknown)" for e in entries if e["status"] in ("failed", "time"))
        texts = {e["diagnosis"]["key"]: e["diagnosis"]["text"] for e in entries if e["diagnosis"]}
        mistakes += [[exercise.id, count, key, without_numbers(texts.get(key, ""))] for key, count in named.most_common()]
        used = Counter(name for e in entries if e["status"] == "passed" for name in e.get("uses", ()))
        own += [[exercise.id, name, count] for name, count in used.most_common()]
    head = ["exercise", "passed", "not yet", "too long", "not written", "asked for hints (rungs)", "checks until passed"]
    body.append(table("How it went", head, rows, (2, 3, 4, 5, 6)))
    if mistakes:
        body.append(table("Mistakes", ["exercise", "how often", "key", "which mistake it is"], mistakes, (1,)))
    if own:
        body.append(table("Right answers that call the lab's own module", ["exercise", "what", "how often"], own, (2,)))
    if lab.predictions:
        rows = []
        for prediction in lab.predictions:
            states = Counter(_state(prediction, m["records"]) for m in group)
            said = Counter(str(r.get("value"))[:20] for m in group for r in _last(m["records"], prediction.id))
            rows.append([prediction.id, prediction.question, states["right"], states["wrong"], states["late"], states["waiting"] + states["open"],
                         ", ".join(f"{value}: {count}" for value, count in said.most_common(6))])  # fmt: skip
        body.append(table("Predictions, from the notebooks' own records", ["", "question", "right", "wrong", "too late", "open", "said"], rows, (2, 3, 4, 5)))
    body += _times(lab, group)
    return body


def _hints(m: dict, exercise: str) -> int:
    """The highest rung that was asked for, 0 to 3."""
    return max((r["rung"] for r in m["records"] if r["kind"] == "hint" and r.get("exercise") == exercise and r.get("rung") in (1, 2, 3)), default=0)


def _tries(group: list[dict], exercise: str) -> str:
    """The median number of checks up to the first that passed, among those whose records have one."""
    found = []
    for m in group:
        checks = sorted((r for r in m["records"] if r["kind"] == "check" and r.get("exercise") == exercise), key=lambda r: r["time"])
        passed = next((n for n, r in enumerate(checks, start=1) if r.get("passed") is True), None)
        if passed:
            found.append(passed)
    return f"{statistics.median(found):g}" if found else "–"


def _state(prediction, records: list[dict]) -> str:
    try:
        return standing(prediction, sorted(records, key=lambda r: r["time"])).state
    except Exception:  # a record that somebody wrote by hand
        return "open"


def _last(records: list[dict], prediction: str) -> list[dict]:
    said = sorted((r for r in records if r["kind"] == "predict" and r.get("prediction") == prediction), key=lambda r: r["time"])
    return said[-1:]


def minutes(records: list[dict], pause: float = 15.0) -> float:
    """Minutes between the records of a notebook, without pauses longer than `pause`. Records are the student's own word."""
    times = []
    for record in records:
        try:
            times.append(datetime.fromisoformat(record["time"]).timestamp())
        except (ValueError, OverflowError, TypeError):
            continue
    times.sort()
    gaps = [(later - earlier) / 60 for earlier, later in zip(times, times[1:], strict=False)]
    return sum(gap for gap in gaps if gap <= pause)


def _times(lab: Lab, group: list[dict]) -> list[str]:
    took = {m["student"]: minutes(m["records"]) for m in group if len(m["records"]) >= 3}
    if not took:
        return []
    middle = statistics.median(took.values())
    spread = statistics.median(abs(t - middle) for t in took.values())
    body = [f"<p>Minutes between records, without pauses of a quarter of an hour and more: median {middle:.0f} (the lab says {lab.minutes}), "
            f"{len(took)} notebooks with records.</p>"]  # fmt: skip
    # 1.4826 turns the median deviation into a standard deviation for a normal distribution; 3.5 of them is Iglewicz and Hoaglin's rule.
    bound = 3.5 * 1.4826 * max(spread, 1.0)
    far = sorted((t, student) for student, t in took.items() if abs(t - middle) > bound)
    if far and len(took) >= 8:
        body.append(table("Far from the others", ["student", "minutes"], [[student, f"{t:.0f}"] for t, student in far], (1,)))
    return body


def stuck(marks: list[dict]) -> dict[str, Counter]:
    """exercise -> how often which mistake; for grades.json."""
    found = defaultdict(Counter)
    for m in marks:
        for id, entry in m["exercises"].items():
            if entry["status"] != "passed":
                found[id][entry["diagnosis"]["key"] if entry["diagnosis"] else entry["status"]] += 1
    return dict(found)
