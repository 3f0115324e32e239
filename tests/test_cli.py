"""The lora-lab command, as people type it."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from typer.testing import CliRunner

from lora_lab import __main__ as cli
from lora_lab.course import builder
from lora_lab.course.builder import build_lab

SAMPLE = Path(__file__).parent / "sample_lab" / "01_sample.py"


def exercise(id):
    return SimpleNamespace(id=id, title="Do it", difficulty=1, minutes=5, points=2, name="double")


LAB = SimpleNamespace(
    number="1",
    name="01_sample",
    title="A sample",
    minutes=30,
    core=True,
    objectives=("double a number",),
    needs=("addition",),
    exercises=(exercise("1.1"), exercise("1.2")),
    questions=(),
)


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with the sample lab, which is also the working directory."""
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/someone/some-lab"\n')
    (tmp_path / "notebooks" / "source").mkdir(parents=True)
    shutil.copy(SAMPLE, tmp_path / "notebooks" / "source")
    monkeypatch.setattr(builder, "_labs", lambda: {"01_sample": LAB})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_build_then_check(root):
    missing = call("build", "--check")
    assert missing.exit_code == 1 and "notebooks/01_sample.ipynb: missing" in missing.output
    assert not (root / "notebooks" / "01_sample.ipynb").exists()
    built = call("build")
    assert built.exit_code == 0 and "01_sample.ipynb: written" in built.output
    assert call("build", "--check").exit_code == 0

    source = root / "notebooks" / "source" / "01_sample.py"
    source.write_text(source.read_text(encoding="utf-8").replace("Twice a", "Two times a"), encoding="utf-8")
    (root / "notebooks" / "98_old.ipynb").write_text("{}")
    changed = call("build", "--check")
    assert changed.exit_code == 1
    assert "01_sample.ipynb: different" in changed.output and "98_old.ipynb: stale" in changed.output
    assert "lora-lab build" in changed.output


def test_build_works_from_a_folder_inside(root, monkeypatch):
    monkeypatch.chdir(root / "notebooks" / "source")
    assert call("build").exit_code == 0
    assert (root / "notebooks" / "01_sample.ipynb").exists()


def test_build_names_every_problem_and_writes_nothing(root):
    source = root / "notebooks" / "source" / "01_sample.py"
    source.write_text(source.read_text(encoding="utf-8") + "\n# %%\nplt.show()\nshow(1)\n", encoding="utf-8")
    refused = call("build")
    assert refused.exit_code == 1
    assert refused.output.count("01_sample.py, line") == 2 and "nothing was written" in refused.output
    assert "Traceback" not in refused.output
    assert not (root / "notebooks" / "01_sample.ipynb").exists()


def test_build_keeps_work_and_says_how_to_replace_it(root):
    call("build")
    path = root / "notebooks" / "01_sample.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"][-1]["source"] = ["my own work"]
    path.write_text(json.dumps(notebook), encoding="utf-8")
    kept = call("build")
    assert kept.exit_code == 0 and "01_sample.ipynb: kept" in kept.output and "--force" in kept.output
    assert "my own work" in path.read_text(encoding="utf-8")
    assert call("build", "--force").exit_code == 0
    assert "my own work" not in path.read_text(encoding="utf-8")


@pytest.fixture
def notebooks(root):
    """Student and instructor notebook of the sample, as files."""
    built = build_lab(root / "notebooks" / "source" / "01_sample.py", lab=LAB)
    for name, notebook in zip(("student", "instructor"), built, strict=True):
        nbformat.write(notebook, root / f"{name}.ipynb")
    return root


def passed(path):
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())]
    records = [output.get("data", {}).get("application/vnd.lora-lab.record+json") for output in outputs]
    return [record["passed"] for record in records if record]


@pytest.mark.notebook
def test_run_takes_sources_and_notebooks(notebooks):
    folder = notebooks / "elsewhere"
    folder.mkdir()
    parameters = "-p", "fast=true", "-p", "seed=7"
    source = call("run", "notebooks/source/01_sample.py", *parameters, "-o", "a.ipynb", "--cwd", folder)
    assert source.exit_code == 0, source.output
    assert "minutes" in source.output
    assert passed("a.ipynb") == [True, True]  # of a source, the instructor's copy
    assert json.loads((folder / "where.json").read_text()) == {"fast": True, "seed": 7}

    assert call("run", "student.ipynb", "-o", folder).exit_code == 0
    assert passed(folder / "student.ipynb") == [False, False]
    assert not (notebooks / "where.json").exists()  # by default in a folder that goes away
    assert passed("student.ipynb") == []  # the notebook itself stays as it was


@pytest.mark.notebook
def test_run_is_headless_and_says_which_cell_failed(notebooks):
    notebook = nbformat.read("student.ipynb", as_version=4)
    code = "import os\nraise ValueError(f'headless is {os.environ[\"LORA_LAB_HEADLESS\"]}')"
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    nbformat.write(notebook, "broken.ipynb")
    failed = call("run", "broken.ipynb", "-o", "ran.ipynb")
    assert failed.exit_code == 1
    assert "    import os\n" in failed.output and "ValueError: headless is 1" in failed.output
    assert "Traceback" not in failed.output
    assert passed("ran.ipynb") == [False, False]  # what ran before is saved


def test_run_refuses_what_it_cannot_do(notebooks):
    for arguments, part in [
        (("nowhere.ipynb",), "there is no file nowhere.ipynb"),
        (("pyproject.toml",), "is not a notebook"),
        (("student.ipynb", "-p", "fast"), "write name=value"),
        (("student.ipynb", "-p", "fsat=true"), "unknown parameter fsat; this notebook has fast, seed"),
    ]:
        refused = call("run", *arguments)
        assert refused.exit_code == 1 and part in refused.output, refused.output
        assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("False", False), ("None", None), ("3", 3), ("1e-4", 1e-4), ("auto", "auto"), ("", "")],
)
def test_parameters_are_typed(text, value):
    found = cli._value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (None, 0), (False, 1)])
def test_doctor_fails_when_something_is_to_mend(monkeypatch, ok, code):
    import lora_lab.doctor as examiner

    lines = [examiner.Line("Memory", True, "2.0 GB"), examiner.Line("Disk", ok, "0.1 GB free", "Free some space.")]
    monkeypatch.setattr(examiner, "diagnose_machine", lambda: lines)
    result = call("doctor")
    assert result.exit_code == code
    assert "Disk" in result.output and ("Free some space." in result.output) == (ok is not True)


def test_the_command_starts_without_heavy_imports():
    import subprocess

    heavy = {"torch", "papermill", "jupytext", "nbformat", "IPython", "matplotlib", "transformers"}
    code = f"import sys; import lora_lab.__main__; print(sorted({heavy!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # The package itself imports torch; the command adds nothing.
    assert json.loads(found.replace("'", '"')) in ([], ["torch"])
