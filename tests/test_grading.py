"""From a folder of submissions to marks, pages and exports; seeds, going on after a kill, one bad file among good ones."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import html.parser
import importlib
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from grading_tools import HEAD, LIMITS, RIGHT, SECRET, answer, close_all, code, grade, notebook, server_for
from mutants import load

from lora_lab.course.exercise import UNANSWERED
from lora_lab.course.grading import client, exports, feedback, marks, submissions
from lora_lab.course.grading import grade as grade_folder
from lora_lab.course.grading.submissions import BadSubmissions, Submission, find
from lora_lab.course.labs import find_exercise, labs, module_name
from lora_lab.course.runner import Answers, examine
from lora_lab.course.script import Script

NAME = "00_start_here"
BASE_FOLDER = client.base_folder


@pytest.fixture(scope="module", autouse=True)
def servers(tmp_path_factory):
    """One warm server for all calls of `grade` in this process: a real call starts and ends its own, which takes seconds."""
    base = str(tmp_path_factory.mktemp("servers"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "base_folder", lambda: contextlib.nullcontext(base))
        yield
    client._close_all()
    close_all()


def tree(root: Path, **students: bytes) -> Path:
    for student, data in students.items():
        path = root / student / NAME / f"{NAME}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    return root


GOOD, BAD = answer("0.1", RIGHT["0.1"]), answer("0.1", "def adapter_size(d_in, d_out, r):\n    return r * d_in * d_out")


def run(where, out, **more) -> tuple[dict, list[str]]:
    said: list[str] = []
    found = grade_folder(where, out, limits=LIMITS, say=said.append, **more)
    return found, said


def table(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open(encoding="utf-8", newline="")))


# ---------------------------------------------------------------- the whole way


def test_from_a_tree_to_everything(tmp_path):
    server_for()
    where = tree(tmp_path / "submitted", ada=GOOD, bob=BAD, eve=b"\xff\xfe\0")
    found, said = run(where, tmp_path / "out")
    assert [row[:2] for row in table(tmp_path / "out" / "grades.csv")] == [["student", "0.1"], ["(maximum)", "1"], ["ada", "1"], ["bob", "0"], ["eve", "0"]]
    assert any("files" in line for line in said) and any("eve" in line and "not text" in line for line in said)
    kept = json.loads((tmp_path / "out" / "grades.json").read_text())
    assert kept["mistakes"]["0.1"] == {"product": 1, "unreadable": 1}
    page = (tmp_path / "out" / "feedback" / "bob.html").read_text()
    assert "r * (d_in * d_out)" in page and labs()["0"].exercises[0].read in page
    assert (tmp_path / "out" / "class.html").exists() and (tmp_path / "out" / "canvas.csv").exists()
    assert stat.S_IMODE((tmp_path / "out" / "seed.json").stat().st_mode) == 0o600


def test_the_command(tmp_path):
    server_for()
    where = tree(tmp_path / "submitted", ada=GOOD)
    command = [sys.executable, "-m", "lora_lab", "grade", str(where), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "ada, lab 00: 1 of 1" in done.stdout, done.stderr
    done = subprocess.run([*command[:4], str(tmp_path / "nothing"), "-o", str(tmp_path / "x")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "neither a folder nor a zip" in done.stderr


def test_the_same_marks_twice_and_fresh_inputs_otherwise(tmp_path):
    where = tree(tmp_path / "submitted", ada=GOOD, bob=BAD)
    first, _ = run(where, tmp_path / "one")
    second, _ = run(where, tmp_path / "two", seed=str(tmp_path / "one" / "seed.json"))
    strip = lambda all: [{k: v for k, v in m.items() if k != "exercises"} | {"e": {i: {**e, "seconds": 0} for i, e in m["exercises"].items()}} for m in all]  # noqa: E731
    assert strip(first["marks"]) == strip(second["marks"])
    third, _ = run(where, tmp_path / "three")
    failures = [all["marks"][1]["exercises"]["0.1"]["cases"] for all in (first, third)]
    assert failures[0] == failures[1]  # the same verdict
    assert json.loads((tmp_path / "one" / "seed.json").read_text())["seed"] != json.loads((tmp_path / "three" / "seed.json").read_text())["seed"]
    with pytest.raises(ValueError, match="another seed"):
        run(where, tmp_path / "three", seed=str(tmp_path / "one" / "seed.json"))
    with pytest.raises(ValueError, match="64 hexadecimal"):
        marks.secret_seed(tmp_path / "four", "not hex")


def test_inputs_differ_by_student_exercise_and_file():
    seeds = {marks.inputs_seed(SECRET, *key) for key in [("ada", "2.1", "x"), ("bob", "2.1", "x"), ("ada", "2.2", "x"), ("ada", "2.1", "y")]}
    assert len(seeds) == 4 and marks.inputs_seed(b"t" * 32, "ada", "2.1", "x") not in seeds
    assert marks.inputs_seed(SECRET, "ada", "2.1", "x") in seeds


def test_numbers_learnt_from_the_notebooks_inputs_are_worth_nothing():
    """The notebook's own inputs (seed 0), answered from a table."""
    exercise, expected = find_exercise("2.1"), []
    examine(exercise, run=lambda script: expected.append(np.asarray(_right(script))) or Answers({"y": expected[-1]}))
    table_ = "answers = iter([" + ", ".join(f"torch.tensor({e.tolist()}, dtype=torch.float64)" for e in expected) + "])"
    found = grade(answer("2.1", table_, "def lora_forward(*a):\n    return next(answers)"))
    assert found["points"] == 0


def _right(script: Script):
    call = next(o for o in script.operations if o["op"] == "call")
    alpha, r = call["args"]["list"][-2:]
    i = script.inputs
    return i["x"] @ (i["W"] + alpha / r * i["B"] @ i["A"]).T + i.get("b", 0.0)


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    where = tree(tmp_path / "submitted", ada=GOOD, bob=BAD, cem=GOOD)
    calls = []
    original = marks.grade_one

    def dies(submission, *more):
        calls.append(submission.student)
        if submission.student == "bob" and len(calls) == 2:
            raise KeyboardInterrupt  # a kill in the middle
        return original(submission, *more)

    monkeypatch.setattr(marks, "grade_one", dies)
    with pytest.raises(KeyboardInterrupt):
        run(where, tmp_path / "out")
    found, said = run(where, tmp_path / "out")
    assert calls == ["ada", "bob", "bob", "cem"] and [m["points"] for m in found["marks"]] == [1, 0, 1]
    assert sum("(as before)" in line for line in said) == 1
    path = where / "bob" / NAME / f"{NAME}.ipynb"
    path.write_bytes(GOOD)  # handed in again
    found, _ = run(where, tmp_path / "out")
    assert calls[-1] == "bob" and len(calls) == 5 and found["marks"][1]["points"] == 1
    run(where, tmp_path / "out", force=True)
    assert len(calls) == 8


def test_a_fault_of_ours_is_no_zero_and_stops_nobody(tmp_path, monkeypatch):
    where = tree(tmp_path / "submitted", ada=GOOD, bob=GOOD)
    original = marks.grade_one
    monkeypatch.setattr(marks, "grade_one", lambda s, *more: original(s, *more) if s.student == "bob" else 1 / 0)
    found, _ = run(where, tmp_path / "out")
    assert [m["points"] for m in found["marks"]] == [None, 1]
    assert [row[1] for row in table(tmp_path / "out" / "grades.csv")] == ["0.1", "1", "?", "1"]
    assert not (tmp_path / "out" / "marks" / NAME / "ada.json").exists()  # graded again next time


def test_several_processes(tmp_path, monkeypatch):
    pytest.importorskip("joblib")
    server_for()
    where = tree(tmp_path / "submitted", **{f"s{n}": GOOD if n % 2 else BAD for n in range(4)})
    monkeypatch.setattr(client, "base_folder", BASE_FOLDER)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    found, _ = run(where, tmp_path / "out", n_jobs=2)
    assert not list((tmp_path / "temporary").glob("lora-lab-grading-*"))  # nothing is left behind
    assert [m["points"] for m in found["marks"]] == [0, 1, 0, 1]


# ---------------------------------------------------------------- finding submissions


def test_three_forms_of_the_same(tmp_path):
    one = tree(tmp_path / "tree", ada=GOOD, bob=BAD)
    flat = tmp_path / "flat"
    flat.mkdir()
    for student, lab in (("ada", NAME), ("bob", "00")):
        (flat / f"{student}_{lab}.ipynb").write_bytes(GOOD)
    packed = tmp_path / "all.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for student in ("ada", "bob"):
            archive.writestr(f"submitted/{student}/{NAME}/{NAME}.ipynb", GOOD)
        archive.writestr("__MACOSX/submitted/ada/._x.ipynb", b"")
    for where in (one, flat, packed):
        found, left_out = find(where, labs())
        assert [(s.student, s.lab) for s in found] == [("ada", "0"), ("bob", "0")] and not left_out
        assert found[0].load() == GOOD


def test_patterns(tmp_path):
    for name in ("lovelaceada_12345_2_02b_adapt_digits-1.ipynb", "cruz_1_2_00.ipynb", "unknown.ipynb"):
        (tmp_path / name).write_bytes(GOOD)
    found, left_out = find(tmp_path, labs(), "{student}_*_*_{lab}*.ipynb")
    assert {(s.student, s.lab) for s in found} == {("lovelaceada", "2b"), ("cruz", "0")}
    assert len(left_out) == 1 and "unknown.ipynb" in left_out[0]
    with pytest.raises(BadSubmissions, match="{student}"):
        find(tmp_path, labs(), "{lab}.ipynb")
    with pytest.raises(BadSubmissions, match="no notebook"):
        (tmp_path / "empty").mkdir()
        find(tmp_path / "empty", labs())


def test_links_lead_nowhere(tmp_path):
    secret = tmp_path / "secret.ipynb"
    secret.write_bytes(GOOD)
    where = tree(tmp_path / "submitted", ada=GOOD)
    (where / "bob" / NAME).mkdir(parents=True)
    (where / "bob" / NAME / f"{NAME}.ipynb").symlink_to(secret)
    (where / "eve").symlink_to(where / "ada")
    os.mkfifo(where / "ada" / NAME / "pipe.ipynb")
    found, left_out = find(where, labs())
    assert [s.student for s in found] == ["ada"]
    assert sum("link" in line for line in left_out) == 2


def test_a_swapped_link_and_a_pipe_cannot_be_loaded(tmp_path):
    (tmp_path / "link.ipynb").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "pipe.ipynb")
    for name in ("link.ipynb", "pipe.ipynb", "missing.ipynb"):
        with pytest.raises(ValueError):
            submissions._load(tmp_path / name)


def test_zips_that_mean_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(submissions, "LARGEST", 1 << 20)
    packed = tmp_path / "all.zip"
    link = zipfile.ZipInfo(f"bob/{NAME}/{NAME}.ipynb")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"ada/{NAME}/{NAME}.ipynb", GOOD)
        archive.writestr(link, "/etc/passwd")
        archive.writestr(f"../../evil/{NAME}/{NAME}.ipynb", GOOD)
        archive.writestr(f"/root/{NAME}/{NAME}.ipynb", GOOD)
        archive.writestr(f"bomb/{NAME}/{NAME}.ipynb", b"0" * (8 << 20))
    before = set(tmp_path.rglob("*"))
    found, left_out = find(packed, labs())
    assert [s.student for s in found] == ["ada"] and len(left_out) == 4
    assert set(tmp_path.rglob("*")) == before
    data = packed.read_bytes().replace((8 << 20).to_bytes(4, "little"), (9).to_bytes(4, "little"))  # a lie about the size
    packed.write_bytes(data)
    lying = [s for s in find(packed, labs())[0] if s.student == "bomb"]
    for submission in lying:
        with pytest.raises(ValueError):
            submission.load()


@pytest.mark.parametrize("name", ["..", "a\nb", "x" * 200, ".hidden"])
def test_names_that_are_none(name):
    assert submissions._bad_name(name)


def test_file_names_of_students_never_meet():
    names = ["ada", "Ada", "ADA", "a/b", "a%2Fb", "ümit", "../x", "ada.", "con"]
    made = [marks.safe(name).lower() for name in names]
    assert len(set(made)) == len(names) and all("/" not in name and name not in ("..", ".") for name in made)


# ---------------------------------------------------------------- pages


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def all_numbers(inputs, answers) -> set[str]:
    """What would give an input or an expected number away, as pages write numbers."""
    found = set()
    for value in [*inputs.values(), *answers.values()]:
        array = np.asarray(value) if isinstance(value, (np.ndarray, float)) else np.zeros(0)
        for number in array.ravel()[:200]:
            if array.dtype.kind == "f" and number != round(float(number)):
                found |= {f"{number:.4g}", f"{number:.3g}", f"{number:.6g}"}
            elif array.dtype.kind == "i":
                found.add(str(number))
    return {text for text in found if len(text.replace(".", "").lstrip("-0")) >= 3}  # "2.2" may be the number of an exercise


@pytest.mark.parametrize("number", labs())
def test_no_page_shows_hidden_numbers(number):
    """Every mutant's page against every number that went in or came back."""
    lab = labs()[number]
    mutants = importlib.import_module(f"mutants.{module_name(number)}").MUTANTS
    for exercise in lab.exercises:
        for mutant in mutants[exercise.id]:
            result = examine(exercise, load(mutant.answer, exercise.name), 12345, seconds=10)
            entry = marks._entry(exercise, result.status, result)
            shown = re.sub(r"<[^>]*>", " ", " ".join(feedback.what_happened(entry)))
            words = set(re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", shown))
            given_away = set()
            for e in result.evidence:
                given_away |= words & all_numbers(e.inputs, {})
            assert not given_away, f"{exercise.id} {mutant.name}: {given_away} in {shown!r}"


def test_sentences_without_numbers():
    cut = feedback.without_numbers
    assert cut("y has shape (6, 11), expected (6, 7)") == "y has shape (6, 11), expected (…)"
    assert cut("it begins [0.12, -1.3, 1e-05, …], expected [2, …]") == "it begins […], expected […]"
    assert cut("adapter_size(437, 122, r=9) is 3") == "adapter_size(…, r=…) is …"
    assert "lora_A" in cut("lora_A2 stays") and "2" in cut("lora_A2 stays")


def test_pages_escape_and_are_accessible(tmp_path):
    text = "def adapter_size(*a):\n    raise ValueError('<script>alert(1)</script>')  # <img src=x onerror=y>"
    found = grade(answer("0.1", text), "0.1", student="<b>eve</b>")
    record = {"id": "<i>", "time": "2026-01-01T00:00:00Z", "kind": "predict", "prediction": "0.A", "value": "<u>"}
    found["records"] = [record]
    for page in (feedback.student_page("<b>eve</b>", [found], labs()), feedback.class_page([found], labs(), ["<s>"], ["<em>"])):
        parsed = Page(page)
        assert not {"script", "img", "b", "i", "u", "s", "em"} & set(parsed.tags)
        assert dict(parsed.attributes)["lang"] == "en" and "main" in parsed.tags and parsed.tags.count("h1") == 1
        assert parsed.tags.count("caption") == parsed.tags.count("table") > 0
        assert all(dict([pair])["scope"] == "col" for pair in parsed.attributes if pair[0] == "scope")
        assert "color-scheme: light dark" in page and "default-src 'none'" in page


def class_of(count: int) -> list[dict]:
    lab, made = labs()["0"], []
    for n in range(count):
        records = []
        for k in range(4):
            minute = k * (14 if n == 0 else 2)
            records.append({"id": f"{n}-{k}", "time": f"2026-01-01T10:{minute:02d}:00.0Z", "kind": "check", "exercise": "0.1", "passed": k == 3})
        records.append({"id": f"h{n}", "time": "2026-01-01T10:00:30Z", "kind": "hint", "exercise": "0.1", "rung": 1 + n % 3})
        records.append({"id": f"p{n}", "time": "2026-01-01T10:00:40Z", "kind": "predict", "prediction": "0.A", "value": "abc"[n % 3]})
        records.append({"id": f"r{n}", "time": "2026-01-01T10:00:50Z", "kind": "reveal", "prediction": "0.A", "outcome": "c"})
        status = "passed" if n % 2 else "failed"
        entry = marks._entry(lab.exercises[0], status) | {"lent": [], "uses": []}
        if status == "failed":
            entry["diagnosis"] = {"key": "product", "text": "what you compute is r * (d_in * d_out)"}
        made.append({"student": f"s{n:02d}", "lab": "0", "points": entry["points"], "max": 1, "problem": None, "notes": [], "records": records,
                     "free": [], "exercises": {"0.1": entry}})  # fmt: skip
    return made


def test_the_class_page_counts():
    page = feedback.class_page(class_of(12), labs(), [], [])
    text = " ".join(Page(page).text)
    assert "50%" in text and "product" in text
    assert re.search(r"12 \(2\.0\)", text)  # twelve asked for hints, two rungs on average: 1, 2, 3, 1, 2, 3 …
    assert "a: 4, b: 4, c: 4" in text
    row = re.search(r"<tr><td>0\.A</td>.*?</tr>", page)[0]
    assert re.findall(r"<td class=n>(\d+)</td>", row) == ["4", "8", "0", "0"]
    assert "s00" in text and "s05" not in text  # the one who took 42 minutes where others took 6
    assert "median 6" in text


def test_minutes_leave_out_pauses():
    at = lambda *minutes: [{"time": f"2026-01-01T{10 + m // 60:02d}:{m % 60:02d}:00Z"} for m in minutes]  # noqa: E731
    assert feedback.minutes(at(0, 5, 9)) == 9
    assert feedback.minutes(at(0, 5, 65, 70)) == 10
    assert feedback.minutes([{"time": "yesterday"}, {"time": "2026"}]) == 0


# ---------------------------------------------------------------- exports, written answers


def test_canvas_and_formulas(tmp_path):
    found = class_of(2)
    found[0]["student"] = "=HYPERLINK(1)"
    written = exports.Written(tmp_path)
    rows = list(csv.reader(exports.canvas_csv(found, labs(), written).splitlines()))
    assert rows[0][:5] == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"] and rows[1][0].strip() == "Points Possible"
    assert rows[1][5] == "1" and rows[2][0] == "'=HYPERLINK(1)" and rows[2][5] == "0"
    assert "'=HYPERLINK(1)" in exports.grades_csv(found, labs(), written)


def test_nbgraders_gradebook(tmp_path):
    api = pytest.importorskip("nbgrader.api")
    found = class_of(4)
    for _ in range(2):  # a second time changes nothing
        assert exports.nbgrader_gradebook(tmp_path / "gradebook.db", found, labs())
    with api.Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as book:
        assert [s.id for s in book.students] == ["s00", "s01", "s02", "s03"]
        assert book.find_submission(NAME, "s01").score == 1 and book.find_submission(NAME, "s02").score == 0
        assert book.find_assignment(NAME).max_score == 1
    rows = list(csv.DictReader(exports.nbgrader_csv(found, labs()).splitlines()))
    assert rows[1]["assignment"] == NAME and (rows[1]["student_id"], rows[1]["score"], rows[1]["max_score"]) == ("s01", "1", "1")


def test_written_answers_are_marked_by_a_person(tmp_path):
    free = {"cell_type": "markdown", "source": "Because B is zero, \"A\" waits.\nReally.", "metadata": {"tags": ["free:0.F1"]}}
    where = tree(tmp_path / "submitted", ada=notebook(HEAD, RIGHT["0.1"], free), bob=notebook(HEAD, free))
    run(where, tmp_path / "out")
    folder = tmp_path / "out" / "written" / NAME
    assert "0.F1" in (folder / "rubric.md").read_text()
    rows = table(folder / "answers.csv")
    assert rows[1] == ["ada", "0.F1", free["source"], "", ""]
    rows[1][3:], rows[2][3:] = ["1.5", "well said"], ["99", ""]
    with (folder / "answers.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    (folder / "rubric.md").write_text("## 0.F1 · Who waits (3 points)\n\n- names B = 0\n")
    run(where, tmp_path / "out")
    grades = table(tmp_path / "out" / "grades.csv")
    assert grades[0] == ["student", "0.1", "free 0.F1", "lab 00", "total"] and grades[1] == ["(maximum)", "1", "3", "4", "4"]
    assert grades[2] == ["ada", "1", "1.5", "2.5", "2.5"] and grades[3] == ["bob", "0", "3", "3", "3"]  # not above the rubric's maximum
    assert "well said" in (tmp_path / "out" / "feedback" / "ada.html").read_text()


def test_a_labs_own_questions_make_the_rubric_and_what_nobody_wrote_is_no_answer(tmp_path):
    """From the student's notebook as it is built: one answers, one leaves the cell as it was, one splits it in two."""
    lab = labs()["3"]
    (question,) = lab.questions
    rubric = exports.rubric_text(lab, {"3.F1", "3.F9"})
    (tmp_path / "rubric.md").write_text(rubric, encoding="utf-8")
    read = {q.id: q for q in exports.read_rubric(tmp_path / "rubric.md")}
    assert set(read) == {"3.F1", "3.F9"} and (read["3.F1"].points, read["3.F1"].title) == (question.points, question.title)
    assert all(what in read["3.F1"].text for _, what in question.rubric) and question.ask in read["3.F1"].text

    def marks_of(student, *texts):
        return {"student": student, "lab": "3", "free": [["3.F1", text] for text in texts]}

    given = [marks_of("ada", f"{UNANSWERED}\nThe step."), marks_of("bob", UNANSWERED), marks_of("eve", "One.", "Two.")]
    written = exports.Written(tmp_path / "written")
    assert written.collect(given, labs()) == []
    rows = table(tmp_path / "written" / lab.name / "answers.csv")
    assert [row[:3] for row in rows[1:]] == [["ada", "3.F1", "The step."], ["eve", "3.F1", "One.\n\nTwo."]]
    assert [q.points for q in written.questions(lab)] == [question.points]  # of those who wrote nothing, too
    nobody = exports.Written(tmp_path / "nobody")
    nobody.collect([marks_of("bob")], labs())
    assert [q.id for q in nobody.questions(lab)] == ["3.F1"]


def test_the_maximum_comes_from_the_lab(tmp_path):
    data = notebook(HEAD, code(RIGHT["0.1"], nbgrader={"points": 1000, "grade": True}), lora_lab={"max": 1000})
    found = grade(data, "0.1")
    assert (found["points"], found["max"]) == (1, 1)


def test_the_digest_is_that_of_the_file():
    assert grade(GOOD, "0.1")["sha256"] == hashlib.sha256(GOOD).hexdigest()


def test_a_file_that_cannot_be_loaded():
    def load():
        raise ValueError("it cannot be read (No such device)")

    found = marks.grade_one(Submission("ada", "0", "x", load), labs()["0"], SECRET, server_for())
    assert found["points"] == 0 and "No such device" in found["problem"]


def test_the_stripped_copy_holds_no_answers(tmp_path):
    client.stripped_lab(tmp_path)
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.py")}
    assert {n for n in names if "course" in n} == {f"lora_lab/course/{n}.py" for n in ("__init__", "exercise", "runner", "script")}
    assert "lora_lab/layers.py" in names
    everything = "".join(p.read_text(encoding="utf-8") for p in tmp_path.rglob("*.py"))
    for exercise in (e for lab in labs().values() for e in lab.exercises):
        assert exercise.hints[2] not in everything
