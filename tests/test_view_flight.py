"""The flight explorer against the teacher's formula and numpy's SVD at places all over its sliders; the playground and its page."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ipywidgets")
pytest.importorskip("matplotlib")

from browser_tools import PATIENCE, SWITCHES, find_chromium, wait_for

from lora_lab import apply_lora, train
from lora_lab.live import digits_problem, toy_problem
from lora_lab.recorder import FlightRecorder
from lora_lab.teacher import Teacher
from lora_lab.view import flight, playground
from lora_lab.view.flight import flight_explorer

ROOT = Path(__file__).resolve().parents[1]
R, ALPHA, STEPS = 4, 8.0, 40


@pytest.fixture(autouse=True)
def live(monkeypatch):
    monkeypatch.delenv("LORA_LAB_HEADLESS", raising=False)


def fly(problem, targets, steps=STEPS, r=R, alpha=ALPHA, seed=0):
    """A recorded run, and after each update the product lora_B @ lora_A of the first layer, kept by hand."""
    torch.manual_seed(seed)
    model = apply_lora(problem.model(seed), r, alpha, targets, modules_to_save=problem.modules_to_save)
    recorder = FlightRecorder(every=4).watch(model)
    layer = next(m for m in model.modules() if hasattr(m, "lora_B"))
    products = [(layer.lora_B @ layer.lora_A).detach().double().numpy()]
    for step in train(model, problem.batches(seed), steps=steps, lr=0.03, loss=problem.loss, device="cpu"):
        recorder.record(step.step, step.loss)
        products.append((layer.lora_B @ layer.lora_A).detach().double().numpy())
    return recorder, products


@pytest.fixture(scope="module")
def teacher():
    return Teacher()


@pytest.fixture
def toy(teacher):
    problem = toy_problem(teacher)
    recorder, products = fly(problem, ["layer"])
    return flight_explorer(recorder, problem), products


def test_the_loss_at_every_place_is_the_teachers_formula(toy, teacher):
    explorer, products = toy
    for step in explorer.steps:
        U, S, Vh = np.linalg.svd(products[step], full_matrices=False)
        for rank in range(R + 1):
            for volume in (-1.0, 0.0, 0.35, 1.0, 3.0):
                delta = volume * ALPHA / R * (U[:, :rank] * S[:rank]) @ Vh[:rank]
                expected = teacher.excess(torch.from_numpy(delta))
                # float32 sums of 64 x 32 squares of differences: some eps of the loss, and of the outputs' own size where it is small
                assert explorer.look(step, rank, volume).loss == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_sliders_move_the_picture_and_say_what_they_are(toy):
    explorer, _ = toy
    box = explorer.widget()
    sliders = explorer.sliders
    assert list(sliders) == ["time", "rank", "volume"]
    assert sliders["time"].options == tuple((str(step), step) for step in explorer.steps) and sliders["time"].value == STEPS
    assert (sliders["rank"].min, sliders["rank"].max, sliders["rank"].value) == (0, R, R)
    assert (sliders["volume"].min, sliders["volume"].max, sliders["volume"].value) == (-1, 3, 1)
    for slider in sliders.values():
        assert slider.description and slider.tooltip and not slider.disabled and slider.continuous_update
    for name, value in (("time", 20), ("rank", 2), ("volume", 1.5)):
        before = explorer.picture.value
        sliders[name].value = value
        assert explorer.error is None and explorer.picture.value != before and getattr(explorer, name) == value
        look = explorer.look(explorer.time, explorer.rank, explorer.volume)
        assert f"loss {flight.short(look.loss)} (as recorded" in explorer.text or name == "time"
        assert 'role="status"' in explorer.words.value and explorer.text.split(":")[0] in explorer.words.value
    assert explorer.text.startswith("After 20 of 40 updates, rank 2 of 4, alpha 12 = 1.50 × 8: loss ")
    assert explorer.widget() is box


def marks(explorer):
    """The dot's place in the loss chart, and the chart's left, right, top and base."""
    chart = explorer.loss_chart()
    dot = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="6"', chart)
    return chart, (float(dot[1]), float(dot[2])) if dot else None


def test_the_dot_stands_on_the_recorded_line_as_recorded_and_off_it_when_cut(toy):
    explorer, _ = toy
    line = [tuple(map(float, p.split(","))) for p in re.search(r'<polyline points="([^"]+)"', explorer.loss_chart())[1].split()]
    for step in explorer.steps[:-1]:
        explorer.set(time=step, rank=R, volume=1)
        _, dot = marks(explorer)
        assert dot in line, "a full batch: the loss of the next step is that of this moment"
    assert len(line) == STEPS
    explorer.set(time=20, rank=1)
    chart, dot = marks(explorer)
    assert dot[1] < dict(line)[dot[0]] - 5, "a higher loss stands higher"
    assert "cut, scaled" in chart and "floor, rank 1" in chart
    trail = [tuple(map(float, p.split(","))) for p in re.findall(r'<polyline points="([^"]+)"', chart)[1].split()]
    assert dot in trail and len(trail) == len(explorer.steps)


def test_a_loss_beyond_the_chart_is_marked_and_written(toy):
    explorer, _ = toy
    explorer.problem = replace(explorer.problem, loss=lambda model, batch: torch.tensor(math.inf))
    explorer._looks.clear()
    explorer.set(volume=2.0)
    chart, dot = marks(explorer)
    assert explorer.error is None and dot is None and "∞, off the chart" in chart and "nan" not in chart and "loss ∞ (as" in explorer.text


def test_the_spectrum_is_the_one_of_delta_w_filled_up_to_the_rank(toy):
    explorer, products = toy
    for rank, volume in ((R, 1.0), (2, 1.0), (0, 1.0), (3, -0.5)):
        explorer.set(time=40, rank=rank, volume=volume)
        chart = explorer.spectrum_chart()
        circles = re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)" r="4" fill="([^"]+)"', chart)
        assert [fill != "none" for _, fill in circles] == [True] * rank + [False] * (R - rank)
        heights = [float(y) for y, _ in circles]
        S = np.linalg.svd(products[40], compute_uv=False)[:R] * abs(volume) * ALPHA / R
        slope = np.diff(heights) / np.diff(np.log(S))  # a logarithmic axis: heights are linear in log S
        assert np.allclose(slope, slope[0], rtol=0.02)  # heights are written with one decimal
        assert (f">rank {rank}<" in chart) == (rank < R)


def test_scrubbing_is_quick_and_remembers_within_bounds(toy, monkeypatch):
    explorer, _ = toy
    explorer.widget()
    for rank in range(R + 1):
        seconds = []
        for step in explorer.steps:
            began = time.perf_counter()
            explorer.set(time=step, rank=rank)
            seconds.append(time.perf_counter() - began)
        assert sorted(seconds)[len(seconds) // 4] < 0.1  # the budget; the best quarter, because a busy machine only adds
    monkeypatch.setattr(flight, "REMEMBERED", 5)
    for volume in np.linspace(-1, 3, 30):
        explorer.set(volume=volume)
    assert len(explorer._looks) <= 256 and len(explorer._trails) <= 256
    assert explorer.look(0, 0, 1.0) is explorer.look(0, 0, 1.0)


def test_digits_show_what_the_model_reads_and_forgets():
    problem = digits_problem()
    recorder, _ = fly(problem, ["body.0", "body.2"], steps=60)
    explorer = flight_explorer(recorder, problem, time=0)
    untrained, trained = explorer.look(0, R, 1.0), explorer.look(60, R, 1.0)
    (name, old) = trained.numbers
    x, y = next(iter(problem.batches(0)))
    model = recorder.replay(-1)
    assert torch.nn.functional.cross_entropy(model(x), y).item() == trained.loss
    assert trained.numbers[name] > untrained.numbers[name] and trained.numbers[old] < untrained.numbers[old]
    # without the adapter the body is the base's again, and so is what the old head reads: nothing was forgotten
    assert explorer.look(60, 0, 1.0).numbers[old] == explorer.look(60, R, 0.0).numbers[old] == untrained.numbers[old]
    assert trained.samples.count("<img") == 10 and trained.samples != untrained.samples
    chart = explorer.spectrum_chart()
    assert "body.0" in chart and "body.2" in chart
    assert all(f"{value:.1%}" in explorer.page() for value in untrained.numbers.values())


def test_generated_text_is_made_once_for_each_place(teacher):
    asked = []

    def samples(model):
        asked.append(1)
        return {"text": f"once <upon> a time, {len(asked)}"}

    problem = replace(toy_problem(teacher), samples=samples)
    recorder, _ = fly(problem, ["layer"])
    explorer = flight_explorer(recorder, problem)
    first = explorer.page()
    assert "once &lt;upon&gt; a time" in first
    explorer.set(rank=2)
    explorer.set(rank=R)
    before = len(asked)
    assert explorer.page() == first and len(asked) == before


def test_a_slow_model_goes_without_the_line_along_the_flight(teacher, monkeypatch):
    monkeypatch.setattr(flight, "PATIENCE", 0.0)
    problem = toy_problem(teacher)
    recorder, _ = fly(problem, ["layer"])
    explorer = flight_explorer(recorder, problem, rank=1)
    assert explorer.trail(1, 1.0) == [] and "cut, scaled" not in explorer.page() and explorer.loss_chart().count("<polyline") == 1


def test_an_error_in_a_callback_shows_and_is_kept_and_goes_again(toy, monkeypatch):
    explorer, _ = toy
    explorer.widget()
    with monkeypatch.context() as patch:
        patch.setattr(explorer.recorder, "replay", lambda *a: 1 / 0)
        explorer.sliders["volume"].value = 0.3
        assert "ZeroDivisionError" in explorer.error and 'role="alert"' in explorer.trouble.value
    explorer.sliders["volume"].value = 0.4
    assert explorer.error is None and explorer.trouble.value == ""


def test_what_makes_no_sense_is_refused(toy, teacher):
    explorer, _ = toy
    recorder, problem = explorer.recorder, explorer.problem
    with pytest.raises(ValueError, match="empty.*watch"):
        flight_explorer(FlightRecorder(), problem)
    with pytest.raises(ValueError, match="0 to 4.*found 5"):
        flight_explorer(recorder, problem, rank=5)
    with pytest.raises(ValueError, match="-1 to 3.*found 4"):
        flight_explorer(recorder, problem, volume=4)
    with pytest.raises(ValueError, match="adapters on layer; 'digits 5 to 9.*cannot use it"):
        flight_explorer(recorder, digits_problem())


def test_a_flight_with_only_its_start_is_shown(teacher):
    problem = toy_problem(teacher)
    model = apply_lora(problem.model(0), R, ALPHA, ["layer"])
    explorer = flight_explorer(FlightRecorder().watch(model), problem)
    page = explorer.page() + explorer.still()
    assert explorer.error is None and "nan" not in page and "After 0 of 0 updates" in explorer.says()


def test_the_still_twin_is_a_table_and_headless_it_is_alone(toy, monkeypatch):
    import IPython.display

    explorer, products = toy
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw=False: shown.append(data))
    explorer._ipython_display_()
    box, still = shown
    assert len(box.children) >= 6 and still["text/html"].startswith("<details>") and "After 40 of 40" in still["text/plain"]
    monkeypatch.setenv("LORA_LAB_HEADLESS", "1")
    shown.clear()
    explorer._ipython_display_()
    (still,) = shown
    page = still["text/html"]
    assert "<details" not in page and "<svg" in page
    cells = [re.findall(r"<td[^>]*>([^<]+)</td>", row) for row in page.split("<tr>")[2:]]
    assert [len(row) for row in cells] == [4] * 6, "ranks 0, 1, 2 and 4 at six moments"
    assert cells[0] == [cells[0][0]] * 4, "before training no rank differs: ΔW is 0"
    assert cells[-1][-1] == flight.short(explorer.look(40, R, 1.0).loss)


# ---------------------------------------------------------------- the playground


def test_the_page_is_one_cell_without_outputs():
    notebook = json.loads((ROOT / "lora_lab/assets/playground.ipynb").read_text(encoding="utf-8"))
    (cell,) = notebook["cells"]
    assert cell["cell_type"] == "code" and cell["outputs"] == [] and cell["execution_count"] is None
    assert "playground()" in cell["source"] and notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_tabs_are_made_when_they_are_opened_and_one_that_fails_says_so(monkeypatch):
    import ipywidgets as widgets

    made = []

    class View:
        def __init__(self, name):
            made.append(name)

        def widget(self):
            return widgets.HTML(made[-1])

    broken = [True]

    def breaks():
        if broken[0]:
            raise RuntimeError("no such <thing>")
        return View("mended")

    monkeypatch.setattr(playground, "TABS", (("A", "about a", lambda: View("a")), ("B", "about b", lambda: View("b")), ("C", "about c", breaks)))
    tab = playground._page().children[1]
    assert tab.titles == ("A", "B", "C") and made == ["a"]
    tab.selected_index = 1
    tab.selected_index = 0
    tab.selected_index = 1
    assert made == ["a", "b"], "once each"
    assert tab.children[1].children[1].value == "b"
    tab.selected_index = 2
    assert "no such &lt;thing&gt;" in tab.children[2].children[1].value and 'role="alert"' in tab.children[2].children[1].value
    broken[0], tab.selected_index = False, 0
    tab.selected_index = 2
    assert tab.children[2].children[1].value == "mended"


@pytest.mark.slow
@pytest.mark.notebook
def test_every_tab_can_be_made_and_headless_all_are_shown(monkeypatch):
    import IPython.display

    page = playground._page()
    tab = page.children[1]
    for number, (name, about, _) in enumerate(playground.TABS):
        tab.selected_index = number
        words, view = tab.children[number].children
        assert about.split(":")[0][:20] in words.value and 'role="alert"' not in getattr(view, "value", ""), name
    monkeypatch.setenv("LORA_LAB_HEADLESS", "1")
    monkeypatch.setattr(playground, "TABS", [t for t in playground.TABS if t[0] in ("Flight: teacher", "Volume")])
    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    playground.playground()
    assert len(shown) == 2


SERVE = """
import importlib.util, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("start", sys.argv[1])
start = importlib.util.module_from_spec(spec); spec.loader.exec_module(start)
start.venv_python = lambda venv: sys.executable
signal.signal(signal.SIGTERM, start.interrupt)
sys.exit(start.open_lab(pathlib.Path(sys.argv[2]), start.parse(["playground", "--no-browser"])))
"""


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine; LORA_LAB_CHROMIUM may name one")
@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_a_lecture_scrubs_by_keyboard_in_both_themes_without_a_network_and_stops(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra dev has it)")
    pytest.importorskip("voila", reason="voila is not installed (the extra lecture has it)")
    (tmp_path / ".venv").mkdir()
    (tmp_path / "lora_lab").symlink_to(ROOT / "lora_lab")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "LORA_LAB_", "JPY_"))}
    environment |= {"HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(ROOT / "start.py"), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment)
    said = ""
    try:
        while "Ctrl-C" not in said:
            line = server.stdout.readline()
            assert line, f"it ended: {said} {(tmp_path / '.venv' / 'jupyter.log').read_text()[-2000:]}"
            said += line
        url = re.search(r"http://127\.0\.0\.1:\d+/voila/render/\S+token=\w+", said)[0]
        outside, complaints = [], []
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=find_chromium(), args=SWITCHES)
            for theme, brighter in (("light", "paper"), ("dark", "ink")):
                page = browser.new_page(viewport={"width": 1280, "height": 800})
                page.set_default_timeout(1000 * PATIENCE)
                page.on("pageerror", lambda error: complaints.append(str(error)))
                page.on("request", lambda request: outside.append(request.url) if request.url.startswith("https:") else None)
                page.goto(f"{url}&theme={theme}")
                page.locator(".lora-playground svg").first.wait_for()
                assert page.locator("text=import").count() == 0, "no code is to be seen"
                page.locator(".lora-playground .lm-TabBar-tab").get_by_text("Flight: teacher", exact=True).click()
                rank = page.get_by_role("slider", name="rank", exact=True)
                rank.wait_for()
                text = page.locator("[role=status]").filter(has_text="updates, rank")
                wait_for(lambda text=text: text.count(), "the sentence on the place in view")
                before = text.inner_text()
                rank.focus()
                for _ in range(6):
                    page.keyboard.press("ArrowLeft")
                wait_for(lambda text=text: "rank 2 of 8" in text.inner_text(), f"the rank to move from {before!r}")
                look = "x => [getComputedStyle(document.body).backgroundColor, getComputedStyle(x).color]"
                paper, ink = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in page.locator(".lora-playground h1").evaluate(look))
                assert (paper > ink + 380) == (brighter == "paper") and (ink > paper + 380) == (brighter == "ink")
                if os.environ.get("LORA_LAB_SHOTS"):
                    page.screenshot(path=Path(os.environ["LORA_LAB_SHOTS"]) / f"playground_{theme}.png")
                assert len(kernel_processes(tmp_path)) >= 1
                page.close()
            browser.close()
        wait_for(lambda: not kernel_processes(tmp_path), "kernels without a page to end", patience=150)  # after 60 to 75 idle seconds
        # Voilà's script asks a CDN for MathJax when the page is there; nothing waits for it. Style sheets it would wait for.
        assert {re.sub(r"/ajax/.*", "", url) for url in outside} <= {"https://cdnjs.cloudflare.com"}
        assert complaints == []
    finally:
        server.send_signal(signal.SIGTERM)
        said += server.communicate(timeout=60)[0]
    assert "Stopping the playground." in said and server.returncode == 0
    wait_for(lambda: not kernel_processes(tmp_path), "the kernels to end", patience=20)


def kernel_processes(folder):
    """Kernels whose connection file lies in this folder's runtime."""
    listing = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if str(folder / "runtime") in line and "ipykernel" in line]
