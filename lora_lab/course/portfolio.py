"""A page of one's progress: what was solved and how, which mistakes were overcome, how sure and how often right, what to do next.

    export_progress()                                in a notebook: my-progress.html, with a link to download it
    export_progress("my-progress.json")              .html, .json, .md or .csv
    export_progress("my-progress.html", "old copy.ipynb", "from-binder.json", name="Ada")
    lora-lab progress notebooks/ -o my-progress.html the same on the command line

Records of several places come together: a notebook carries its own, and so does a .json that was exported elsewhere; what is there twice
counts once. The file holds ids, outcomes, confidences, times and the sentences that named mistakes; no code, no path, and no name unless
one is typed. It proves nothing: records are a student's own file. Marks come from `lora-lab grade`.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from ..files import atomic_write
from . import checks
from . import labs as registry
from .cards import Block, Card, show
from .history import History, Work, read_history, read_time, spoken
from .records import VERSION, default_paths, parse_lines, read_notebook

MARK = "lora-lab progress"  # stands at the top of each export: only a file that has it is ever overwritten
LARGEST = 256 << 20  # bytes of one file of records
LONGEST_LINK = 1_500_000  # characters of a link that carries the page: Chromium takes two million, and the notebook keeps it
MARKS = {"solved": "✓", "tried": "◐", "new": "○"}
NO_PROOF = (
    "It is no proof: these records are a file of the student's own, which can be edited, and the checks in a notebook are for learning. "
    "Marks come from grading, which repeats the checks on new inputs."
)
HOLDS = (
    "It holds which exercises were checked, with what outcome and when, hints, predictions with their confidence, and the sentences that named a "
    "mistake. It holds no code, no file names and no name but one that was typed for it, and nothing was sent anywhere."
)


class PortfolioError(ValueError):
    """What was asked for can't be read or written; the message says why and what to do. Nothing was overwritten."""


@dataclass
class Gathered:
    """Records of several places, as they were found. `notes` name no file, `read` and `troubles` do: these are for the screen."""

    records: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- gathering


def gather(places: Iterable[str | os.PathLike]) -> Gathered:
    """The records of all places: notebooks, records.jsonl files, exports (.json), and folders with any of these inside.

    A file that was named and can't be read raises PortfolioError; one that was found in a folder is a trouble that is told. Nothing is changed.
    """
    found, seen, damaged, jumps, unread = Gathered(), set(), 0, 0, 0
    notebooks: Counter[str] = Counter()  # by name, those with records
    for place in map(Path, places):
        named = not place.is_dir()
        for path in [place] if named else _files(place):
            try:
                key = path.resolve()
                if key in seen:
                    continue
                seen.add(key)
                records, bad = _read(path)
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                text = str(error) if isinstance(error, PortfolioError) else f"{path} cannot be read: {_why(error)}"
                if named:
                    raise PortfolioError(f"{text}. Give a notebook, a records.jsonl, a .json made by export_progress, or a folder with these") from None
                found.troubles.append(text)
                unread += path.suffix != ".json"  # some other .json in a folder is no part of this
                continue
            if bad:
                found.troubles.append(f"{path}: {bad} damaged line{'s' * (bad != 1)} left out")
            if records:
                found.read.append(f"{path}: {len(records)} record{'s' * (len(records) != 1)}")
                notebooks[path.name] += path.suffix == ".ipynb"
            damaged += bad
            jumps += _clock_jumps(records) if path.suffix == ".jsonl" else 0  # a notebook's outputs stand in the order of its cells
            found.records += records
    name, count = notebooks.most_common(1)[0] if notebooks else ("", 0)
    if count > 2:  # nothing in a record says whose it is
        found.troubles.append(f"{name} was found in {count} folders: if they are several people's, this page mixes them")
    if damaged:
        found.notes.append(f"{damaged} damaged line{'s' * (damaged != 1)} of the records could not be read and {'do' if damaged != 1 else 'does'} not count.")
    if unread:
        found.notes.append(f"{unread} file{'s' * (unread != 1)} could not be read.")
    if jumps:
        found.notes.append(f"A clock was set back {jumps} time{'s' * (jumps != 1)} between records: order and times may be wrong there.")
    return found


def own_places() -> list[Path]:
    """This folder, and the records that this machine keeps elsewhere."""
    return [Path(), *(path for path in default_paths() if path.is_file())]


def _files(folder: Path) -> Iterator[Path]:
    """Notebooks, records and exports below a folder, without hidden folders other than .lora-lab."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") or name == ".lora-lab")
        for name in sorted(names):
            path = Path(here) / name
            if path.suffix == ".ipynb" or path.suffix == ".jsonl" and ".lora-lab" in path.parts or path.suffix == ".json" and _is_ours(path):
                yield path


def _read(path: Path) -> tuple[list[dict], int]:
    """(records, number of damaged lines)."""
    if path.stat().st_size > LARGEST:
        raise PortfolioError(f"{path} has {path.stat().st_size / 1e6:.0f} MB; records are never so large")
    if path.suffix == ".ipynb":
        return read_notebook(path), 0
    if path.suffix == ".json":
        if not _is_ours(path):
            raise PortfolioError(f"{path} is no .json that export_progress wrote")
        return parse_lines(json.dumps(record).encode() + b"\n" for record in json.loads(path.read_text(encoding="utf-8"))["records"])
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            return parse_lines(file)
    raise PortfolioError(f"{path} is none of .ipynb, .jsonl, .json")


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(400)
    except OSError:
        return False


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__


def _clock_jumps(records: Sequence[dict]) -> int:
    times = [time for record in records if (time := read_time(record["time"]))]
    return sum((before - after).total_seconds() > 60 for before, after in zip(times, times[1:], strict=False))


# ---------------------------------------------------------------- what a student calls


def export_progress(file="my-progress.html", *places, name: str | None = None) -> None:
    """Write a page of your progress in all labs, and show a link to download it.

        export_progress()                                   my-progress.html, beside this notebook
        export_progress("my-progress.json")                 .html, .json, .md or .csv
        export_progress("my-progress.html", "old copy.ipynb", "from-binder.json", name="Ada")

    file    its ending says what is written
    places  more records: notebooks, folders, records.jsonl, or a .json that was exported on another machine
    name    stands on the page if you give one
    """
    try:
        _target(file)
        own = checks._all_records()
        more = gather(places)
        history = read_history([*own, *more.records], registry.labs())
        content = render(history, file, records=[*own, *more.records], notes=more.notes, name=name)
        write(content, file)
    except (ValueError, OSError, TypeError) as error:
        text = str(error) if isinstance(error, PortfolioError) else f"asked for {file!r}: {_why(error)}"
        show(Card("notice", "The page could not be written", [Block("text", text)]))
        return
    record = checks._records().add("export", format=Path(file).suffix[1:])
    blocks = [Block("text", f"`{file}` lies beside this notebook." if Path(file).parent == Path() else f"It is the file `{file}`.")]
    link = download_link(content, Path(file).name)
    if link:
        blocks.append(Block("link", link, label=Path(file).name))
    else:
        blocks.append(Block("quiet", "It is too large for a link here: in JupyterLab's list of files, choose Download with the right button."))
    blocks += [Block("quiet", text) for text in (*more.troubles, HOLDS, NO_PROOF)]
    show(Card("info", f"Your progress as a page · {_summary(history)}", blocks), record)


def download_link(content: str, name: str) -> str:
    """A data: URI of the file, "" where it would be too long. It needs no server: JupyterLab, VS Code and Colab each lay files elsewhere."""
    kind = {".html": "text/html", ".json": "application/json", ".md": "text/markdown", ".csv": "text/csv"}[Path(name).suffix]
    link = f"data:{kind};charset=utf-8;base64,{base64.b64encode(content.encode()).decode()}"
    return link if len(link) <= LONGEST_LINK else ""


def write(content: str, file: str | os.PathLike) -> Path:
    """Write an export in one step; an older export gives way, any other file does not (PortfolioError)."""
    path = _target(file)
    if path.exists() and not _is_ours(path):
        raise PortfolioError(f"asked to write {file}, and there is a file of that name that is no export of the lab; take another name")
    with atomic_write(path) as part:
        part.write_bytes(content.encode())
    return path


def _target(file) -> Path:
    path = Path(file)
    if path.suffix not in FORMATS:
        raise PortfolioError(f"asked to write {str(file)!r}; the ending says what it becomes: {', '.join(FORMATS)}, as in my-progress.html")
    return path


def _summary(history: History) -> str:
    solved = sum(lab.solved for lab in history.labs.values())
    return f"{solved} exercise{'s' * (solved != 1)} solved"


# ---------------------------------------------------------------- formats


def render(history: History, file, records: Sequence[dict] = (), notes: Sequence[str] = (), name: str | None = None, made: datetime | None = None) -> str:
    """The text of an export, in the format that the ending of `file` says. `records` go into .json, so that it can be read in elsewhere."""
    made = (made or datetime.now(UTC)).astimezone()
    name = clean(name, 80) if name else None
    return FORMATS[_target(file).suffix](history, [*notes, *history.notes], name, made, records)


def _html(history: History, notes, name, made, records) -> str:
    from .portfolio_page import page

    return page(history, notes, name, made)


def plain(history: History, notes: Sequence[str] = (), name: str | None = None, made: datetime | None = None) -> dict:
    """All that the page says, as plain data: times in UTC, durations in whole minutes."""
    found, step = history.calibration, history.next_step
    return {
        "what": MARK,
        "version": VERSION,
        "made": _stamp(made),
        "name": name,
        "note": NO_PROOF,
        "minutes": round(history.seconds / 60),
        "sittings": [{"began": _stamp(s.began), "minutes": round(s.seconds / 60), "records": len(s.events)} for s in history.sittings],
        "next": {"ask": clean(step.ask), "why": clean(step.why)},
        "calibration": {
            "count": found.count, "right": found.right, "mean_sure": found.mean_sure if found.count else None,
            "brier": found.brier if found.count else None, "groups": [{"said": name, "count": n, "right": right} for name, n, right in found.groups()],
        },
        "labs": [
            {
                "lab": lab.lab.number, "title": lab.lab.title, "core": lab.lab.core, "state": lab.state, "points": lab.points, "of": lab.lab.points,
                "minutes": round(lab.seconds / 60), "exercises": [_plain_work(work) for work in lab.works],
                "predictions": [
                    {
                        "id": g.prediction.id, "question": g.prediction.question, "state": g.standing.state, "sure": g.standing.sure,
                        "said": say(g.prediction, g.standing.value), "run": say(g.prediction, g.standing.outcome), "surprise": g.surprising,
                    }
                    for g in lab.guesses
                ],
            }
            for lab in history.labs.values()
        ],
        "elsewhere": [{"exercise": clean(id, 20), "tries": tries, "passed": passed} for id, tries, passed in history.elsewhere],
        "notes": [clean(note) for note in notes],
    }  # fmt: skip


def _plain_work(work: Work) -> dict:
    return {
        "id": work.exercise.id, "title": work.exercise.title, "state": work.state, "points": work.points, "of": work.exercise.points,
        "tries": work.tries, "hints": work.hints, "lent": work.lent, "minutes": round(work.seconds / 60), "solved": _stamp(work.solved),
        "mistakes": [
            {
                "key": clean(m.key, 60), "said": clean(m.text), "count": m.count, "first": _stamp(m.first), "last": _stamp(m.last),
                "overcome": _stamp(m.overcome), "returned": m.returned,
            }
            for m in work.mistakes
        ],
    }  # fmt: skip


def _json(history: History, notes, name, made, records) -> str:
    by_id: dict[str, dict] = {}
    for record in records:
        by_id.setdefault(record["id"], record)
    # Python reads NaN where JSON knows none; escaped, because broken characters of a damaged record could not be written otherwise.
    kept = json.loads(json.dumps(list(by_id.values())), parse_constant=lambda text: None)
    lines = ",\n".join(json.dumps(record) for record in kept)
    return json.dumps(plain(history, notes, name, made), indent=1)[:-2] + f',\n "records": [\n{lines}\n]}}\n'


def _markdown(history: History, notes, name, made, records) -> str:
    data = plain(history, notes, name, made)
    lines = [f"<!-- {MARK} -->", f"# {_md(name) + ' in ' if name else ''}LoRA Lab: progress", "", f"Made {made:%Y-%m-%d}. {NO_PROOF}", ""]
    lines += [f"**Next:** {_md(data['next']['ask'])}. {_md(data['next']['why'])}", "", "| lab | points | solved | at least |", "|---|---:|---:|---:|"]
    for lab, work in zip(data["labs"], history.labs.values(), strict=True):
        kind = "" if lab["core"] else " (elective)"
        numbers = f"{lab['points']} / {lab['of']} | {work.solved} / {len(work.works)} | {lab['minutes']} min"
        lines.append(f"| {work.lab.label} {_md(lab['title'])}{kind} | {numbers} |")
    lines += ["", "## Exercises", "", "| exercise | state | tries | hints | points | at least |", "|---|---|---:|---:|---:|---:|"]
    for work in history.works:
        if work.state != "new" or work.hints or work.lent:
            lines.append(
                f"| {work.exercise.id} {_md(work.exercise.title)} | {MARKS[work.state]} {work.state} | {work.tries} | {work.hints} "
                f"| {work.points} / {work.exercise.points} | {round(work.seconds / 60)} min |"
            )
    if history.mistakes:
        lines += ["", "## Mistakes that were named", "", "| exercise | mistake | named | overcome |", "|---|---|---:|---|"]
        for m in history.mistakes:
            when = f"{m.overcome.astimezone():%Y-%m-%d}" if m.overcome else "not yet"
            lines.append(f"| {m.exercise} | {_md(m.text or spoken(m.key))} | {m.count} | {when} |")
    found = history.calibration
    if found.count:
        told = f"{found.right} of {found.count} came true; mean confidence {found.mean_sure:.0%}; Brier score {found.brier:.2f}"
        lines += ["", "## How sure, and how often right", "", f"{told} (0 is perfect, 0.25 is what saying 50 % every time gives).", ""]
        lines += ["| said | predictions | came true |", "|---|---:|---:|"]
        lines += [f"| {said} | {count} | {right} |" for said, count, right in found.groups()]
    if data["notes"]:
        lines += ["", *(f"- {_md(note)}" for note in data["notes"])]
    return "\n".join(lines) + "\n"


def _csv(history: History, notes, name, made, records) -> str:
    """One row for each exercise, mistake and prediction; the first column says which."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([MARK, "lab", "id", "title", "state", "points", "of", "tries", "hints", "minutes", "sure", "said", "run", "when"])
    for lab in plain(history)["labs"]:
        for e in lab["exercises"]:
            numbers = [e[key] for key in ("points", "of", "tries", "hints", "minutes")]
            writer.writerow(_row("exercise", lab["lab"], e["id"], e["title"], e["state"], *numbers, when=e["solved"]))
            for m in e["mistakes"]:
                state = "overcome" if m["overcome"] else "open"
                writer.writerow(_row("mistake", lab["lab"], e["id"], m["key"], state, tries=m["count"], said=m["said"], when=m["overcome"]))
        for p in lab["predictions"]:
            writer.writerow(_row("prediction", lab["lab"], p["id"], p["question"], p["state"], sure=p["sure"], said=p["said"], run=p["run"]))
    return out.getvalue()


def _row(kind, lab, id, title, state, points="", of="", tries="", hints="", minutes="", sure="", said="", run="", when="") -> list:
    row = [kind, lab, id, title, state, points, of, tries, hints, minutes, sure, said, run, when]
    # A spreadsheet takes text that begins like this for a formula, and runs it.
    return ["" if v is None else "'" + v if isinstance(v, str) and v[:1] in ("=", "+", "-", "@", "\t", "\r") else v for v in row]


FORMATS = {".html": _html, ".json": _json, ".md": _markdown, ".csv": _csv}


# ---------------------------------------------------------------- words


def clean(text, most: int = 500) -> str:
    """Text of a record, fit to be written: no control characters, no broken ones, one line, not endless."""
    text = str(text)[: 4 * most].encode("utf-8", "replace").decode()
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def say(prediction, value) -> str:
    """An answer in words: "b: the sum", "77 numbers"; "" for none."""
    if value is None:
        return ""
    if prediction.options is not None and isinstance(value, str) and value in prediction.options:
        return f"{value}: {prediction.options[value]}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return clean(value, 60)
    small = isinstance(value, int) and abs(value) < 10**15
    try:
        return f"{f'{value:,}' if small else f'{float(value):,.4g}'} {prediction.unit}".strip()
    except OverflowError:
        return "a number too large to write"


def _stamp(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _md(text) -> str:
    """Text that Markdown shows as it is, inside a table, too; what stands between backticks stays code."""
    parts = escape(clean(text), quote=False).replace("|", "\\|").split("`")
    if len(parts) % 2 == 0:  # a backtick without its partner
        parts = ["\\`".join(parts)]
    return "`".join(part if n % 2 else re.sub(r"([\[\]*_#])", r"\\\1", part) for n, part in enumerate(parts))
