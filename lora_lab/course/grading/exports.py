"""What an instructor takes along: grades.csv, grades.json, Canvas's CSV, nbgrader's gradebook; and written answers with their rubric."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ...files import atomic_write
from ..exercise import UNANSWERED, Lab


def write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def _csv(rows: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([[_harmless(value) for value in row] for row in rows])
    return text.getvalue()


def _harmless(value):
    """A spreadsheet runs what begins with = + - or @; a student may choose a name."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def graded_labs(marks: list[dict], labs: dict[str, Lab]) -> list[Lab]:
    there = {m["lab"] for m in marks}
    return [lab for number, lab in labs.items() if number in there]


def by_student(marks: list[dict]) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for m in sorted(marks, key=lambda m: m["student"]):
        found.setdefault(m["student"], {})[m["lab"]] = m
    return found


def grades_csv(marks: list[dict], labs: dict[str, Lab], written: Written) -> str:
    """student x exercise, with written answers and totals; the first row has the maxima. A lab that was not handed in has 0 points."""
    chosen = graded_labs(marks, labs)
    head, most = ["student"], ["(maximum)"]
    for lab in chosen:
        head += [e.id for e in lab.exercises] + [f"free {q.id}" for q in written.questions(lab)] + [f"lab {lab.label}"]
        most += [e.points for e in lab.exercises] + [q.points for q in written.questions(lab)]
        most.append(lab.points + sum(q.points for q in written.questions(lab)))
    rows = [[*head, "total"], [*most, sum(lab.points + sum(q.points for q in written.questions(lab)) for lab in chosen)]]
    for student, theirs in by_student(marks).items():
        row, total = [student], 0
        for lab in chosen:
            m = theirs.get(lab.number)
            if m is not None and m.get("failed"):  # the grader's fault: no number is better than a wrong one
                row += ["?"] * (len(lab.exercises) + len(written.questions(lab)) + 1)
                continue
            points = [m["exercises"][e.id]["points"] if m else 0 for e in lab.exercises]
            manual = [written.points(student, lab, q) for q in written.questions(lab)]
            sum_ = sum(points) + sum(p for p in manual if p is not None)
            row += [*points, *("" if p is None else p for p in manual), sum_]
            total += sum_
        rows.append([*row, total])
    return _csv(rows)


def canvas_csv(marks: list[dict], labs: dict[str, Lab], written: Written) -> str:
    """Canvas's gradebook import: student, ID, SIS login and one column per lab, the second row with "Points Possible"."""
    chosen = graded_labs(marks, labs)
    rows = [["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *(f"Lab {lab.label} {lab.title}" for lab in chosen)],
            ["    Points Possible", "", "", "", "", *(lab.points + sum(q.points for q in written.questions(lab)) for lab in chosen)]]  # fmt: skip
    for student, theirs in by_student(marks).items():
        rows.append([student, "", "", student, "", *(_total(theirs.get(lab.number), student, lab, written) for lab in chosen)])
    return _csv(rows)


def _total(m: dict | None, student: str, lab: Lab, written: Written):
    if m is None or m["points"] is None:
        return ""
    return m["points"] + sum(written.points(student, lab, q) or 0 for q in written.questions(lab))


def grades_json(marks: list[dict], labs: dict[str, Lab], extra: dict) -> str:
    kept = [{k: v for k, v in m.items() if k not in ("records", "fingerprint", "kept")} for m in marks]
    most = {lab.name: {"points": lab.points, "exercises": {e.id: e.points for e in lab.exercises}} for lab in graded_labs(marks, labs)}
    return json.dumps({**extra, "max": most, "marks": kept}, indent=1, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------- nbgrader


def nbgrader_csv(marks: list[dict], labs: dict[str, Lab]) -> str:
    """The columns of `nbgrader export`, for where nbgrader is not installed."""
    rows = [["assignment", "duedate", "timestamp", "student_id", "last_name", "first_name", "email", "raw_score", "late_submission_penalty", "score",
             "max_score"]]  # fmt: skip
    for m in marks:
        rows.append([labs[m["lab"]].name, "", "", m["student"], "", "", "", m["points"], 0.0, m["points"], m["max"]])
    return _csv(rows)


def nbgrader_gradebook(path: Path, marks: list[dict], labs: dict[str, Lab]) -> bool:
    """Write the marks into nbgrader's database through its own API: one grade cell per exercise, named as in the notebooks. False
    where nbgrader is not installed. What stands there from before is replaced for these students and labs, and left alone for others."""
    if find_spec("nbgrader") is None:
        return False
    from nbgrader.api import Gradebook

    path.parent.mkdir(parents=True, exist_ok=True)
    with _alembic_in_path(), Gradebook(f"sqlite:///{path.absolute()}") as book:
        for lab in graded_labs(marks, labs):
            book.update_or_create_assignment(lab.name)
            book.update_or_create_notebook(lab.name, lab.name)
            for exercise in lab.exercises:
                cell = _cell(exercise.id)
                book.update_or_create_grade_cell(cell, lab.name, lab.name, max_score=exercise.points, cell_type="code")
        for m in marks:
            if m["points"] is None:
                continue
            name = labs[m["lab"]].name
            book.update_or_create_student(m["student"])
            book.update_or_create_submission(name, m["student"])
            for id, entry in m["exercises"].items():
                grade = book.find_grade(_cell(id), name, name, m["student"])
                grade.auto_score, grade.manual_score, grade.needs_manual_grade = entry["points"], None, False
        book.db.commit()
    return True


@contextmanager
def _alembic_in_path():
    """A new gradebook asks the command `alembic` for its version; in a virtual environment that is not activated it is not in PATH."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _cell(exercise: str) -> str:
    return "check-" + exercise.replace(".", "-")


# ---------------------------------------------------------------- written answers


class Rubric:
    """What is said of one question in a rubric.md: id, title, points, criteria. The instructor may have changed what the lab's file says."""

    def __init__(self, id: str, title: str, points: int, text: str):
        self.id, self.title, self.points, self.text = id, title, points, text


_HEADING = re.compile(r"^## +(?P<id>[\w.-]+) *(?:· *(?P<title>.*?))? *\((?P<points>\d+) points?\) *$", re.MULTILINE)


def read_rubric(path: Path) -> list[Rubric]:
    """A rubric: markdown with a heading `## 2.F1 · title (3 points)` for each question, criteria below it."""
    text = path.read_text(encoding="utf-8")
    found = list(_HEADING.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [Rubric(m["id"], m["title"] or "", int(m["points"]), text[m.end() : end].strip()) for m, end in zip(found, ends, strict=True)]


def rubric_text(lab: Lab, ids: set[str]) -> str:
    """The first rubric.md of a lab: its questions as its file has them, and of cells that somebody else tagged (`ids`) an empty one."""
    lines = [f"# Written answers of lab {lab.label} · {lab.title}", "", "Points stand in the headings; mark in answers.csv and grade again.", ""]
    for question in lab.questions:
        criteria = [f"- {what} ({points})" for points, what in question.rubric]
        lines += [f"## {question.id} · {question.title} ({question.points} point{'s' * (question.points != 1)})", "", question.ask, "", *criteria, ""]
    for id in sorted(ids - {question.id for question in lab.questions}):
        lines += [f"## {id} (2 points)", "", "- what a full answer names", ""]
    return "\n".join(lines)


def said(text: str) -> str:
    """A written answer without the line that asks for it; "" if nothing was written."""
    return text.replace(UNANSWERED, "").strip()


class Written:
    """Written answers: collected into answers.csv beside a rubric.md per lab, points that a person put there read back.

    <folder>/<lab>/rubric.md       what to look for; made once from the lab's questions and from those that were found, then the instructor's
    <folder>/<lab>/answers.csv     student, question, answer, points, comment; the last two are the instructor's and are kept
    """

    COLUMNS = ["student", "question", "answer", "points", "comment"]

    def __init__(self, folder: Path):
        self.folder = folder
        self._rows: dict[str, dict[tuple[str, str], dict]] = {}
        self._questions: dict[str, list[Rubric]] = {}

    def collect(self, marks: list[dict], labs: dict[str, Lab]) -> list[str]:
        """Read what is there, add what was found, write. -> complaints for the instructor"""
        complaints = []
        for lab in graded_labs(marks, labs):
            answers: dict[tuple[str, str], str] = {}
            for m in marks:
                for id, text in m["free"] if m["lab"] == lab.number else ():
                    if said(text):  # of a cell that was split in two both count
                        answers[m["student"], id] = "\n\n".join(filter(None, [answers.get((m["student"], id)), said(text)]))
            rubric = self.folder / lab.name / "rubric.md"
            if not answers and not lab.questions and not rubric.exists():
                continue
            if not rubric.exists():
                write(rubric, rubric_text(lab, {id for _, id in answers}))
            self._questions[lab.number] = read_rubric(rubric)
            rows = self._read(rubric.with_name("answers.csv"), complaints)
            known = {q.id for q in self._questions[lab.number]}
            for key, text in answers.items():
                if key[1] in known:
                    row = rows.setdefault(key, dict(zip(self.COLUMNS, [*key, "", "", ""], strict=True)))
                    row["answer"] = text
            self._rows[lab.number] = rows
            ordered = [rows[key] for key in sorted(rows, key=lambda k: (k[1], k[0]))]
            write(rubric.with_name("answers.csv"), _csv([self.COLUMNS, *([row[c] for c in self.COLUMNS] for row in ordered)]))
        return complaints

    def _read(self, path: Path, complaints: list[str]) -> dict[tuple[str, str], dict]:
        if not path.exists():
            return {}
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("student") and row.get("question")]
        for row in rows:
            row["student"], row["answer"] = row["student"].removeprefix("'"), (row["answer"] or "").removeprefix("'")
            if row["points"] and _number(row["points"]) is None:
                complaints.append(f"{path}: points of {row['student']}, {row['question']} are {row['points']!r}, which is no number")
        return {(row["student"], row["question"]): {c: row.get(c) or "" for c in self.COLUMNS} for row in rows}

    def questions(self, lab: Lab) -> list[Rubric]:
        return self._questions.get(lab.number, [])

    def points(self, student: str, lab: Lab, question: Rubric) -> float | None:
        """What a person gave, within 0 and the rubric's maximum; None while nobody has."""
        row = self._rows.get(lab.number, {}).get((student, question.id))
        value = _number(row["points"]) if row else None
        if value is None:
            return None
        value = min(max(value, 0.0), float(question.points))
        return int(value) if value.is_integer() else value

    def comments(self) -> dict[tuple[str, str], dict[str, str]]:
        """(student, lab number) -> question -> what to tell the student"""
        found: dict[tuple[str, str], dict[str, str]] = {}
        for number, rows in self._rows.items():
            most = {q.id: q.points for q in self._questions[number]}
            for (student, id), row in rows.items():
                parts = [f"{row['points']} of {most.get(id, '?')} points" if row["points"] else "not marked yet", row["comment"]]
                found.setdefault((student, number), {})[id] = ". ".join(part for part in parts if part)
        return found


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        return None
    return value if value == value and abs(value) < 1e6 else None
