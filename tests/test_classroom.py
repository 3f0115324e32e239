"""The students' copy and the bundle for a room: what must be in it, what must not, and that it works by itself."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from lora_lab.course import classroom
from lora_lab.course.builder import answer_lines, sources
from lora_lab.course.classroom import ClassroomError, bundle, release

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release") / "students"
    release(ROOT, folder)
    return folder


def test_every_lab_is_there_and_nothing_for_those_who_teach(released):
    assert {p.stem for p in (released / "notebooks").glob("*.ipynb")} == {p.stem for p in (ROOT / "notebooks" / "source").glob("[0-9]*.py")}
    inside = [path.relative_to(released).as_posix() for path in released.rglob("*")]
    forbidden = re.compile(r"(^|/)(source|build|tests|bench|mutants|grading|\.git|\.ci|\.github)(/|$)|__pycache__|(^|/)test_|instructor|design\.md")
    assert not [name for name in inside if forbidden.search(name)]


def test_no_line_of_an_answer_is_in_a_notebook(released):
    for source in sources(ROOT):
        notebook = nbformat.read(released / "notebooks" / f"{source.stem}.ipynb", as_version=4)
        lines = {line.strip() for cell in notebook.cells for line in cell.source.splitlines()}
        assert not lines & answer_lines(source), source.stem


def test_the_readme_promises_nothing_that_is_not_there(released):
    text = (released / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and not [link for link in links if not (released / link).exists()]
    assert "start.py test" not in text and "CONTRIBUTING" not in text


def test_the_package_in_it_checks_answers_by_itself(released, tmp_path):
    code = """
import lora_lab, pathlib, sys
from lora_lab.course import check
assert pathlib.Path(lora_lab.__file__).is_relative_to(sys.argv[1]), lora_lab.__file__
right = lambda x, W, b, A, B, alpha, r: x @ W.T + (0 if b is None else b) + alpha / r * (x @ A.T) @ B.T
print("a right one:", bool(check("2.1", right)), " a wrong one:", bool(check("2.1", lambda x, W, b, A, B, alpha, r: x)))
"""
    environment = os.environ | {"PYTHONPATH": str(released), "LORA_LAB_RECORDS": str(tmp_path / "records.jsonl")}
    done = subprocess.run([sys.executable, "-P", "-c", code, released], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "a right one: True  a wrong one: False" in done.stdout, done.stdout + done.stderr


def test_start_py_says_that_there_are_no_tests(released):
    source = (released / "start.py").read_text(encoding="utf-8")
    program = source.partition('if __name__ == "__main__"')[0] + "\nset_up = lambda *a: None\nraise SystemExit(main(['test']))\n"
    done = subprocess.run([sys.executable, "-c", program.replace("Path(__file__)", f"Path({str(released / 'start.py')!r})")],
                          capture_output=True, text=True, cwd=released)  # fmt: skip
    assert done.returncode == 1 and "no tests in a students' copy" in done.stderr


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ClassroomError, match="not empty"):
        release(ROOT, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_inside_the_repository_is_refused():
    with pytest.raises(ClassroomError, match="inside the repository"):
        release(ROOT, ROOT / "students")
    assert not (ROOT / "students").exists()


def test_somewhere_else_is_refused(tmp_path):
    with pytest.raises(ClassroomError, match="no sources"):
        release(tmp_path / "nothing", tmp_path / "out")


def test_when_it_fails_nothing_half_made_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(classroom, "_copy", full)
    with pytest.raises(OSError, match="No space"):
        release(ROOT, tmp_path / "students")
    assert not list(tmp_path.iterdir())


def test_a_leaked_answer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(classroom, "answer_lines", lambda source: {"fast = False  # True: shorter runs, for a quick check of the notebook"})
    with pytest.raises(ClassroomError, match="line of an answer"):
        release(ROOT, tmp_path / "students")
    assert not list(tmp_path.iterdir())


# ---- the bundle ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def room_with_a_model(tmp_path, monkeypatch):
    """LORA_LAB_MODELS with a model called gpt2: the bundle copies files and does not look into the weights."""
    from lora_lab.gpt2_files import copy_model, gpt2_folder

    copy_model(gpt2_folder("pocket"), tmp_path / "room" / "gpt2")
    monkeypatch.setenv("LORA_LAB_MODELS", str(tmp_path / "room"))


def test_a_bundle_brings_models_and_data_that_start_py_finds(tmp_path, monkeypatch, room_with_a_model):
    monkeypatch.setattr("lora_lab.data_to_text.e2e_file", lambda name: Path(__file__))  # any file: its checksum has been compared there
    path = bundle(ROOT, tmp_path / "room.zip", models=["pocket", "gpt2"], data=True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "unpacked")
    lab = tmp_path / "unpacked" / "lora-lab"
    assert {p.name for p in (lab / "models").iterdir()} == {"gpt2"}  # the pocket model ships with the lab
    assert {p.name for p in (lab / "datasets" / "e2e").iterdir()} == {"train.txt", "valid.txt", "test.txt"}
    monkeypatch.delenv("LORA_LAB_MODELS")
    monkeypatch.delenv("LORA_LAB_DATA", raising=False)
    found = environment_by(lab)
    assert found["LORA_LAB_MODELS"] == str(lab / "models") and found["LORA_LAB_DATA"] == str(lab / "datasets")
    assert "PIP_NO_INDEX" not in found  # without wheels in it, pip may ask the network
    from lora_lab.gpt2_files import gpt2_folder

    monkeypatch.setenv("LORA_LAB_MODELS", found["LORA_LAB_MODELS"])
    assert gpt2_folder("gpt2").is_relative_to(lab)  # whole, by its list of checksums


def environment_by(lab: Path) -> dict:
    """What start.py in that folder hands to its children."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("start_of_bundle", lab / "start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.child_environment()


def test_wheels_are_what_start_py_would_install_and_it_asks_no_index(tmp_path, monkeypatch):
    asked = []

    def pip(command, **_):
        asked.append(command)
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir(exist_ok=True)
        (folder / "nothing-1.0-py3-none-any.whl").write_bytes(b"a wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(classroom.subprocess, "run", pip)
    path = bundle(ROOT, tmp_path / "room.zip", wheels=True, platforms=["win_amd64", "macosx_11_0_arm64"], python="3.12")
    assert [c[c.index("--platform") + 1] for c in asked] == ["win_amd64", "macosx_11_0_arm64"]
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for line in [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["lab"], *project["build-system"]["requires"]]:
        assert all(line in command for command in asked), line
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    found = environment_by(tmp_path / "unpacked" / "lora-lab")
    assert found["PIP_NO_INDEX"] == "1" and Path(found["PIP_FIND_LINKS"]).joinpath("nothing-1.0-py3-none-any.whl").exists()


def test_what_pip_could_not_get_is_said_and_no_archive_is_left(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found for torch==2.13.0\n")
    monkeypatch.setattr(classroom.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ClassroomError, match="No matching distribution found for torch"):
        bundle(ROOT, tmp_path / "room.zip", wheels=True)
    assert not list(tmp_path.iterdir())


def test_a_model_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(ClassroomError, match="gpt3"):
        bundle(ROOT, tmp_path / "room.zip", models=["gpt3"])
    assert not list(tmp_path.iterdir())


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ClassroomError, match=r"try room\.zip"):
        bundle(ROOT, tmp_path / "room.tar")
