"""Live views where nobody moves a slider: papermill and nbclient run them to the end, and what stands still is left behind."""

import re

import nbformat
import pytest
from browser_tools import notebook

pytest.importorskip("ipywidgets")
pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")

pytestmark = [pytest.mark.notebook, pytest.mark.slow]
WIDGET, RECORD = "application/vnd.jupyter.widget-view+json", "application/vnd.lora-lab.record+json"
TASKS = """
import asyncio
print(sum("LiveTraining" in repr(task) for task in asyncio.all_tasks()), "live tasks")"""
RIGHT = """
def lora_forward(x, W, b, A, B, alpha, r):
    return x @ W.T + (0 if b is None else b) + alpha / r * (x @ A.T) @ B.T
"""


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LAB_RECORDS", str(tmp_path / "records.jsonl"))
    monkeypatch.delenv("LORA_LAB_HEADLESS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def cell(book, name):
    return next(cell for cell in book.cells if cell.id == name)


def printed(book, name):
    return "".join(output.get("text", "") for output in cell(book, name).outputs)


def page(book, name):
    return "".join(output.get("data", {}).get("text/html", "") for output in cell(book, name).outputs)


def nothing_went_wrong(book):
    outputs = [output for cell in book.cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


def test_papermill_trains_in_the_cell_and_leaves_a_picture_and_a_table(tmp_path, monkeypatch):
    papermill = pytest.importorskip("papermill")
    monkeypatch.setenv("LORA_LAB_HEADLESS", "1")
    book = notebook(
        "headless",
        parameters="steps = 40",
        toy="""
from lora_lab.view import live_training
toy = live_training("toy", steps=steps)
toy""",
        later="print(toy.run.step, toy.run.curve.last[0], toy.finish().step, toy.task)",
        digits="""
digits = live_training("digits", steps=30)
digits""",
        tasks=TASKS,
    )
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, tmp_path / "in.ipynb")
    done = papermill.execute_notebook(
        str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), parameters={"steps": 60}, progress_bar=False, cwd=str(tmp_path)
    )
    nothing_went_wrong(done)
    assert printed(done, "later").split() == ["60", "60.0", "60", "None"], "the cell that made the view has trained all of it"
    assert printed(done, "tasks").startswith("0 live tasks")
    for name, steps in (("toy", 60), ("digits", 30)):
        assert not [output for output in cell(done, name).outputs if WIDGET in output.get("data", {})], "a widget without a kernel is a blank"
        assert "<svg" in page(done, name) and 'role="img"' in page(done, name)
        rows = re.findall(r"<tr><th scope='row'>(\d+)</th><td>([^<]+)</td>", page(done, name))
        assert int(rows[-1][0]) == steps and all(loss != "–" for _, loss in rows), "a table of the loss down to the last step"


def test_without_the_switch_nbclient_ends_too_and_checks_go_on_beside_a_training(tmp_path):
    book = notebook(
        "attended",
        view="""
from lora_lab.course import check
from lora_lab.view import live_training
view = live_training("toy", steps=10_000_000, speed=float("inf"))
view""",
        start="view.start()",
        meanwhile="import asyncio\nawait asyncio.sleep(0.5)\nbefore = view.run.step\nprint(before > 0)",
        right=f'{RIGHT}\ncheck("2.1", lora_forward)',
        endless='def lora_forward(*arguments):\n    while True:\n        pass\ncheck("2.1", lora_forward)',
        after="await asyncio.sleep(0.5)\nprint(view.run.step > before, view.playing, view.error)",
        other='other = live_training("toy", steps=50)\nother',
        finish="print(other.finish().step, other.playing)",
        tasks=TASKS,
    )
    nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nothing_went_wrong(book)
    assert printed(book, "meanwhile").split() == ["True"]
    verdicts = [output.data[RECORD]["passed"] for name in ("right", "endless") for output in cell(book, name).outputs if RECORD in output.get("data", {})]
    assert verdicts == [True, False]
    assert printed(book, "after").split() == ["True", "True", "None"], "a check ends an endless answer, and no training"
    assert printed(book, "finish").split() == ["50", "False"]
    assert printed(book, "tasks").startswith("1 live task"), "the one that was started and never paused; the kernel's end is its end"
    for name in ("view", "other"):
        assert [output for output in cell(book, name).outputs if WIDGET in output.get("data", {})]
        assert "<svg" in page(book, name), "the twin stands below the view"
