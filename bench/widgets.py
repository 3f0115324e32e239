"""Live views in a real JupyterLab and a real Chromium: from the key to changed pixels, and what drawing costs a training.

All views stand in notebooks of one server, with the settings that JupyterLab comes with; `peer` is the least that a widget can do, an
ipywidgets slider whose callback writes its value into an HTML widget. Contestants take turns in random order, a few key presses each;
`ms` counts from the key event's own time stamp to the first frame after the answer was on the page. `frames` checks that stopwatch:
it is the time of the first frame of the browser's compositor in which pixels of the view differ, minus what the stopwatch said.

`alpha while toy trains`, and digits, count until a chart shows the new alpha; both train as fast as they can. `r to the whole curve` moves r
on the toy problem, and what counts is the finished curve of all 300 steps; `300 steps alone` is what these cost the same kernel without
a view. Both also in processor time of the kernel, which other work on the machine disturbs less. `changes that act` counts, of 12 presses
while a training runs, those whose value a step was really made with.
`speed without / with chart`, in steps per second of the kernel's processor time, is formed within rounds, in random order; its control is
the speed without the chart over itself.
`2 million steps`: that many losses are put into the curves of a view on the page, which is drawn every 200,000: how much memory the kernel
took for them, and the largest message that the page was sent meanwhile, beside one after 2,000 steps. 1 MB is 10^6 bytes.
Needs a Chromium (LORA_LAB_CHROMIUM may name it) and Playwright.
"""

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _report import machine, options, save, show

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from browser_tools import STILL_CELLS, SWITCHES, Server, Student, find_chromium, frame_of_change, key_to_pixels, notebook, screencast

STILL = notebook("still", **STILL_CELLS)
LIVE = notebook(
    "live",
    toy="""
import math, time
import psutil
from lora_lab.live import LiveRun, toy_problem
from lora_lab.view import live_training
toy = live_training("toy", steps=10_000_000, speed=math.inf)
toy""",
    digits="""
digits = live_training("digits", steps=10_000_000, speed=math.inf)
digits""",
    whole="""
whole = live_training("toy")
whole""",
    tools="""
seen = {"toy": [], "digits": []}
def spy(view, log, advance):
    def spied():
        made = advance()
        if made:
            scaling = next(iter(view.run.layers.values())).scaling
            if not log or log[-1] != scaling:
                log.append(scaling)
        return made
    view.run.advance = spied
spy(toy, seen["toy"], toy.run.advance)
spy(digits, seen["digits"], digits.run.advance)
def put(widget, value):
    widget.value = value
def chart(view, shown):
    if shown:
        vars(view).pop("draw", None)
    else:
        view.draw = lambda moving=False: None
def now(view):
    return time.process_time(), view.run.step
def seconds_of_300_steps():
    run, began, worked = LiveRun(toy_problem(), r=5), time.perf_counter(), time.process_time()
    run.finish()
    return time.perf_counter() - began, time.process_time() - worked
def synthetic(view, steps):
    # The losses of a run that falls and is noisy, without the training.
    run, before = view.run, psutil.Process().memory_info().rss
    for step in range(run.step + 1, run.step + steps + 1):
        loss = 1 / (1 + step / 100) * (1 + 0.3 * math.sin(step * step))
        run.step = step
        run.curve.append(step, loss)
        run.mean.append(step, loss)
    view.draw(moving=True)
    return (psutil.Process().memory_info().rss - before) / 1e6""",
)
SHOWN_ALPHA = "const chart = area.querySelector('svg[data-state]'); return chart && Number(chart.dataset.alpha)"
SHOWN_WHEN_DONE = """const chart = area.querySelector('svg[data-state]');
return chart && chart.dataset.state === 'done' ? Number(chart.dataset.r) : null"""
# name -> (cell, label of its slider, what counts as changed, where that is on the page)
CONTESTANTS = {
    "peer": ("peer", "peer", "return area.querySelector('.answer').textContent", ".answer"),
    "rank_explorer": ("explorer", "rank r", "return area.querySelector('img').src", "img"),
    "volume_knob": ("knob", "italic", "return area.querySelector('svg[role=img]').innerHTML", "svg[role=img]"),
    "toy": ("toy", "alpha", SHOWN_ALPHA, "svg[data-state]"),
    "digits": ("digits", "alpha", SHOWN_ALPHA, "svg[data-state]"),
    "whole": ("whole", "rank r", SHOWN_WHEN_DONE, "svg[data-state]"),
}
STILL_VIEWS = ("peer", "rank_explorer", "volume_knob")


def handle(student, cell, label):
    """The slider of that name in a cell. ipywidgets itself gives sliders no name; the lab's views do."""
    area = student.output(cell)
    slider = area.locator(".widget-slider").filter(has_text=label).locator("[role=slider]").first
    slider.wait_for()
    return slider


def press(student, name, times, keys):
    cell, label, shows, _ = CONTESTANTS[name]
    handle(student, cell, label).focus()
    took = []
    for _ in range(times):
        took.append(key_to_pixels(student, student.output(cell), next(keys), shows)["milliseconds"])
        time.sleep(random.uniform(0.05, 0.25))  # no rhythm with the frames
    return took


def to_and_fro(length=8):
    """Arrow keys that never meet an end: as many to the right as to the left."""
    while True:
        yield from ["ArrowRight"] * length
        yield from ["ArrowLeft"] * length


def check_stopwatch(student, name, times, keys):
    cell, label, shows, place = CONTESTANTS[name]
    slider, area, off = handle(student, cell, label), student.output(cell), []
    for _ in range(times):
        slider.focus()
        area.locator(place).first.scroll_into_view_if_needed()
        box = area.locator(place).first.bounding_box()
        with screencast(student.page) as frames:
            student.page.wait_for_timeout(200)
            found = key_to_pixels(student, area, next(keys), shows)
            student.page.wait_for_timeout(300)
        at = frame_of_change(frames, box, student.page.viewport_size["width"], found["pressed"])
        off.append(at - found["milliseconds"])
    return off


def row(what, values, unit):
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"what": what, "n": len(values), "median": statistics.median(values), "p95": p95, "unit": unit}


def main():
    asked = options(__doc__, rounds=("rounds", 12), presses=("key presses per round and view", 5))
    if not find_chromium():
        raise SystemExit("bench/widgets.py needs a Chromium; LORA_LAB_CHROMIUM may name one")
    from playwright.sync_api import sync_playwright

    if asked.quick:
        asked.rounds, asked.presses = 1, 3
    random.seed(0)
    found = machine("torch", "jupyterlab", "ipywidgets", "ipykernel", "playwright") | {"rounds": asked.rounds}
    rows = []
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder)) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=SWITCHES)
        found["chromium"] = browser.version
        with Student(browser, server, STILL, Path(folder)) as student:
            rows += still_views(student, asked)
        rows += live_views(Student(browser, server, LIVE, Path(folder)), asked)
        browser.close()
    show(rows, found)
    save(asked.out, "widgets", rows, found)


def still_views(student, asked):
    for cell in student.ids:
        student.run(cell)
    keys = {name: to_and_fro() for name in STILL_VIEWS}
    took = {name: [] for name in STILL_VIEWS}
    for name in STILL_VIEWS:
        press(student, name, 3, keys[name])  # the first answers are slower: fonts, caches, a subshell that starts
    for _ in range(asked.rounds):
        for name in random.sample(STILL_VIEWS, len(STILL_VIEWS)):
            took[name] += press(student, name, asked.presses, keys[name])
    off = [ms for name in STILL_VIEWS for ms in check_stopwatch(student, name, asked.rounds, keys[name])]
    return [row(f"key to pixels: {name}", took[name], "ms") for name in STILL_VIEWS] + [row("frames minus stopwatch", off, "ms")]


def live_views(student, asked):
    sizes = []
    student.page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: sizes.append(len(frame))))
    with student:
        for cell in student.ids:
            student.run(cell)
        rows = []
        for view in ("toy", "digits"):
            rows += while_it_trains(student, view, asked)
        rows += whole_curves(student, asked)
        rows += cost_of_drawing(student, asked)
        return rows + long_run(student, sizes, 20_000 if asked.quick else 200_000)


def while_it_trains(student, view, asked):
    button(student, view, "Start").click()
    student.page.wait_for_timeout(1000)
    keys, took, acted = to_and_fro(2), [], []
    press(student, view, 4, keys)
    for _ in range(asked.rounds):
        student.asks(f"seen[{view!r}].clear()")
        student.page.wait_for_timeout(100)
        took += press(student, view, 12, keys)
        student.page.wait_for_timeout(300)
        acted.append(len(student.asks(f"seen[{view!r}]")) - 1)  # the first is where the slider stood
    button(student, view, "Pause").click()
    return [row(f"key to pixels: alpha while {view} trains", took, "ms"), row(f"changes that act, {view}", acted, "of 12")]


def whole_curves(student, asked):
    student.asks("put(whole.sliders['r'], 1)")
    student.page.wait_for_timeout(1500)
    keys, took, worked, alone = to_and_fro(6), [], [], []
    press(student, "whole", 2, keys)
    for _ in range(asked.rounds):
        began, _ = student.asks("now(whole)")
        took += press(student, "whole", asked.presses, keys)
        ended, _ = student.asks("now(whole)")
        worked.append(1000 * (ended - began) / asked.presses)
        alone.append([1000 * seconds for seconds in student.asks("seconds_of_300_steps()")])
    clock, processor = zip(*alone, strict=True)
    return [
        row("r to the whole curve", took, "ms"), row("300 steps alone", clock, "ms"),
        row("r to the whole curve, kernel's processor", worked, "ms"), row("300 steps alone, processor", processor, "ms"),
    ]  # fmt: skip


def cost_of_drawing(student, asked):
    def speed(shown, seconds=0.5 if asked.quick else 2.0):
        student.asks(f"chart(toy, {shown})")
        student.page.wait_for_timeout(200)
        began, before = student.asks("now(toy)")
        student.page.wait_for_timeout(1000 * seconds)
        ended, after = student.asks("now(toy)")
        return (after - before) / (ended - began)

    button(student, "toy", "Reset").click()
    student.page.wait_for_timeout(500)
    button(student, "toy", "Start").click()
    speed(True)
    ratios, control, plain = [], [], []
    for _ in range(asked.rounds):
        kinds = random.sample(["without", "with", "again"], 3)
        found = {kind: speed(kind == "with") for kind in kinds}
        ratios.append(found["without"] / found["with"])
        control.append(found["without"] / found["again"])
        plain.append(found["without"])
    student.asks("chart(toy, True)")
    button(student, "toy", "Pause").click()
    return [
        row("speed without / with chart", ratios, "ratio"), row("speed without / without chart", control, "ratio"),
        row("speed without chart", plain, "steps/s of processor"),
    ]  # fmt: skip


def long_run(student, sizes, each):
    button(student, "toy", "Reset").click()
    student.page.wait_for_timeout(500)
    student.asks("synthetic(toy, 2_000)")
    sizes.clear()
    student.asks("toy.draw(moving=True)")
    student.page.wait_for_timeout(500)
    early, grown = max(sizes), []
    sizes.clear()
    for _ in range(10):
        grown.append(student.asks(f"synthetic(toy, {each})"))
        student.page.wait_for_timeout(200)
    at = f"{10 * each / 1e6:g} million steps"
    return [
        row("largest message, 2,000 steps", [early / 1000], "kB"), row(f"largest message, {at}", [max(sizes) / 1000], "kB"),
        row(f"memory for {at}", [sum(grown)], "MB"),
    ]  # fmt: skip


def button(student, cell, name):
    return student.output(cell).locator("button.widget-button", has_text=name)


if __name__ == "__main__":
    main()
