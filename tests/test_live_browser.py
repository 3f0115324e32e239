"""Live views in a real JupyterLab and a real browser: sliders that move while a training runs, and everything that may happen to a notebook meanwhile.

Times are asserted at three times what is aimed for, or not at all: `bench/widgets.py` measures them.
"""

import io
import itertools
import re
import statistics

import pytest
from browser_tools import (
    PATIENCE,
    STILL_CELLS,
    Student,
    contrasts,
    find_chromium,
    focused_name,
    frame_of_change,
    key_to_pixels,
    notebook,
    screencast,
    wait_for,
)

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra dev has it)")
pytest.importorskip("jupyterlab")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine; LORA_LAB_CHROMIUM may name one"),
]
expect = sync_api.expect
expect.set_options(timeout=1000 * PATIENCE)

AIM = 80  # milliseconds from the key to changed pixels
COMMS = "@jupyterlab/apputils-extension:kernels-settings"  # where JupyterLab decides which thread runs a widget's callbacks


CELLS = notebook(
    "live_views",
    **STILL_CELLS,
    toy="""
import asyncio, math, threading, time
from lora_lab.view import live_training
toy = live_training("toy", steps=1_000_000, speed=math.inf)
toy""",
    digits="""
digits = live_training("digits", steps=1_000_000, speed=math.inf)
digits""",
    whole="""
whole = live_training("toy")
whole""",
    spy="""
def on_main_thread():
    return threading.current_thread() is threading.main_thread()
class Spy:
    # What each step was really made with: the scaling of the layers themselves, the lr that the optimizer was given.
    def __init__(self, view):
        self.steps, self.callbacks, self.view, self.advance = [], [], view, view.run.advance
        view.run.advance = self
        view.sliders["alpha"].observe(lambda change: self.callbacks.append((change["new"], on_main_thread())), "value")
    def __call__(self):
        made = self.advance()
        if made:
            self.steps.append((next(iter(self.view.run.layers.values())).scaling, made.lr, on_main_thread()))
        return made
    def scalings(self):
        return [a for a, before in zip([s[0] for s in self.steps], [None] + [s[0] for s in self.steps]) if a != before]
spies = {"toy": Spy(toy), "digits": Spy(digits)}
def live_tasks():
    return sum("LiveTraining" in repr(task) for task in asyncio.all_tasks(toy._loop))
def seconds_of_300_steps():
    from lora_lab.live import LiveRun, toy_problem
    run, began = LiveRun(toy_problem(), r=5), time.perf_counter()
    run.finish()
    return time.perf_counter() - began
def no_cell_remembers(view):
    # A name for the view in the kernel, beside the cell's own, which running the cell again replaces.
    globals()["old"] = view""",
    blocks="time.sleep(60)",
)
PICTURES = {  # cell, slider, what counts as changed, where
    "rank_explorer": ("explorer", "rank r", "return area.querySelector('img').src", "img"),
    "volume_knob": ("knob", "italic", "return area.querySelector('svg[role=img]').innerHTML", "svg[role=img]"),
}
# What a chart shows stands on it, too: a frame of the training that goes on is not taken for an answer to a key.
SHOWN_ALPHA = "const chart = area.querySelector('svg[data-state]'); return chart && Number(chart.dataset.alpha)"
SHOWN_WHEN_DONE = """const chart = area.querySelector('svg[data-state]');
return chart && chart.dataset.state === 'done' ? Number(chart.dataset.r) : null"""
UP, DOWN = "ArrowRight", "ArrowLeft"
TWELVE = [UP] * 2 + [DOWN] * 4 + [UP] * 4 + [DOWN] * 2  # alpha 8, 16, 32, 16, 8, 4, 2, 4, 8, 16, 32, 16, 8
LOST = re.compile(r"Traceback|never retrieved|was destroyed|Exception in callback", re.I)  # how a log tells of errors that nobody handled


@pytest.fixture(scope="module")
def lab(browser, server, shots):
    """All live views in one notebook, its cells run. Tests leave them paused and bring them where they need them."""
    with Student(browser, server, CELLS, shots) as student:
        for cell in student.ids[:-1]:
            student.run(cell)
        yield student


@pytest.fixture(autouse=True)
def nothing_is_swallowed(request):
    """After each test: no error in a view, in the browser's console, or in what server and kernel wrote."""
    yield
    if "lab" not in request.fixturenames:
        return
    lab = request.getfixturevalue("lab")
    for view in ("toy", "digits", "whole"):
        if lab.asks(f"{view!r} in globals()"):
            assert lab.asks(f"{view}.error") is None
            lab.asks(f"{view}.pause()")
    assert not lab.complaints, "the browser's console shows errors"
    assert not LOST.search(lab.kernel_log())


@pytest.fixture(scope="module")
def in_time(lab):
    """in_time(milliseconds): three times what is aimed for, or on a busy machine six times what the least of all widgets takes there."""
    lab.output("peer").locator("[role=slider]").focus()
    keys, shows = itertools.cycle([UP, DOWN]), "return area.querySelector('.answer').textContent"

    def judge(took):
        lab.output("peer").locator("[role=slider]").focus()
        least = [key_to_pixels(lab, lab.output("peer"), next(keys), shows)["milliseconds"] for _ in range(5)]
        return statistics.median(took) < max(3 * AIM, 6 * statistics.median(least))

    return judge


def button(lab, cell, name):
    return lab.output(cell).locator("button.widget-button", has_text=name)


def slider(lab, cell, name):
    return lab.output(cell).get_by_role("slider", name=name)


def steps_made(lab, view):
    return lab.asks(f"{view}.run.step")


def trains(lab, *views):
    """Whether all views make steps."""
    before = [steps_made(lab, view) for view in views]
    wait_for(lambda: all(steps_made(lab, view) > n for view, n in zip(views, before, strict=True)), f"{views} to train", patience=20)
    return True


def shown_step(lab, cell):
    return int(lab.output(cell).locator("svg[data-state]").first.get_attribute("data-step"))


@pytest.mark.parametrize("view", PICTURES)
def test_each_key_changes_the_picture_in_time_and_the_stopwatch_tells_the_truth(lab, in_time, view):
    cell, label, shows, place = PICTURES[view]
    area, keys = lab.output(cell), itertools.cycle([UP, DOWN])
    slider(lab, cell, label).focus()
    took = [key_to_pixels(lab, area, next(keys), shows)["milliseconds"] for _ in range(9)]
    assert in_time(took)

    slider(lab, cell, label).focus()
    area.locator(place).first.scroll_into_view_if_needed()
    box = area.locator(place).first.bounding_box()
    with screencast(lab.page) as frames:
        lab.page.wait_for_timeout(200)
        found = key_to_pixels(lab, area, next(keys), shows)
        lab.page.wait_for_timeout(400)
    at = frame_of_change(frames, box, lab.page.viewport_size["width"], found["pressed"])
    assert at is not None, "the stopwatch stopped and no pixel changed"
    # The compositor's frame stands within a few of its 17 ms on a quiet machine; a busy one holds up either of the two. A fifth of a second
    # would be another frame than the one timed.
    assert abs(at - found["milliseconds"]) < 200


def twelve_of_twelve(lab, in_time, cell, main_thread):
    lab.asks(f"setattr({cell}.sliders['alpha'], 'value', 8.0)")
    button(lab, cell, "Start").click()
    trains(lab, cell)
    lab.asks(f"(spies[{cell!r}].steps.clear(), spies[{cell!r}].callbacks.clear())")
    trains(lab, cell)
    slider(lab, cell, "alpha").focus()
    took = [key_to_pixels(lab, lab.output(cell), key, SHOWN_ALPHA)["milliseconds"] for key in TWELVE]
    r, lr = lab.asks(f"({cell}.run.settings['r'], {cell}.run.settings['lr'])")
    alphas = [8.0 * 2 ** (TWELVE[:n].count(UP) - TWELVE[:n].count(DOWN)) for n in range(len(TWELVE) + 1)]
    wait_for(lambda: lab.asks(f"spies[{cell!r}].scalings()[-1]") == alphas[-1] / r, "a step with the last alpha", patience=20)
    assert lab.asks(f"spies[{cell!r}].scalings()") == [alpha / r for alpha in alphas]
    moved, on_main = zip(*lab.asks(f"spies[{cell!r}].callbacks"), strict=True)
    assert list(moved) == alphas[1:]
    # With subshells JupyterLab still sends a widget's first change to the main thread: both happen within one page.
    assert set(on_main[1:]) == {main_thread}
    assert lab.asks(f"all(on_main for _, _, on_main in spies[{cell!r}].steps)"), "steps are made on the kernel's own loop"
    assert in_time(took)

    before = lab.asks(f"len(spies[{cell!r}].steps)")
    slider(lab, cell, "learning rate").focus()
    lab.page.keyboard.press(DOWN)
    wait_for(lambda: lab.asks(f"spies[{cell!r}].steps[-1][1]") < lr, "a step with the new learning rate", patience=20)
    assert lab.asks(f"len({{lr for _, lr, _ in spies[{cell!r}].steps[{before}:]}})") == 2
    lab.page.keyboard.press(UP)


@pytest.mark.parametrize("cell", ["toy", "digits"])
def test_twelve_of_twelve_changes_act_and_show_while_it_trains_with_callbacks_on_a_subshell(lab, in_time, cell):
    twelve_of_twelve(lab, in_time, cell, main_thread=False)  # what JupyterLab does unless told otherwise


def test_moving_r_draws_the_whole_curve_again_and_keeps_the_old_one(lab):
    button(lab, "whole", "Reset").click()
    lab.asks("setattr(whole.sliders['r'], 'value', 1)")
    wait_for(lambda: shown_step(lab, "whole") == 300, "the first whole curve")
    handle = slider(lab, "whole", "rank r")
    handle.scroll_into_view_if_needed()
    handle.focus()
    floors, took = [], []
    for r in range(2, 6):
        took.append(key_to_pixels(lab, lab.output("whole"), UP, SHOWN_WHEN_DONE)["milliseconds"])
        assert lab.asks("whole.run.settings['r']") == r and lab.asks("whole.run.step") == 300
        floors.append(lab.asks("whole.run.floor()"))
        expect(lab.output("whole").locator("svg").first).to_contain_text("floor of rank")
    # Aimed for: 250 ms at the median, of which 300 bare steps take about 80 on a quiet machine. On a busy one, what it can do just now.
    assert statistics.median(took) < max(3 * 250, 10_000 * lab.asks("seconds_of_300_steps()"))
    assert floors == sorted(floors, reverse=True)
    assert lab.asks("[e.settings['r'] for e in whole.run.earlier]")[-4:] == [1, 2, 3, 4]
    lab.shot("staircase")


def test_two_views_train_side_by_side(lab):
    for cell in ("toy", "digits"):
        button(lab, cell, "Start").click()
    assert trains(lab, "toy", "digits")
    assert lab.asks("live_tasks()") == 2
    button(lab, "digits", "Pause").click()
    wait_for(lambda: not lab.asks("digits.playing"), "the pause")
    at = steps_made(lab, "digits")
    assert trains(lab, "toy") and steps_made(lab, "digits") == at
    wait_for(lambda: lab.asks("live_tasks()") == 1, "the paused view's task to end")
    wait_for(lambda: shown_step(lab, "digits") == at, "the page to show the step at which it stopped")
    button(lab, "digits", "Step").click()
    wait_for(lambda: steps_made(lab, "digits") == at + 1, "one step")


# Where charts, sliders and buttons stand, all asked in one go: between two questions the chart may be another element.
PLACES = """area => [...area.querySelectorAll("svg, .widget-slider, .widget-dropdown, .widget-button")]
  .filter(element => element.checkVisibility()).map(element => element.getBoundingClientRect())
  .map(box => [box.x, box.y, box.width, box.height].map(value => Math.round(10 * value) / 10))"""


def test_nothing_jumps_or_goes_blank_while_it_trains(lab):
    import numpy as np
    from PIL import Image

    lab.asks("(setattr(whole.sliders['speed'], 'value', 100.0), setattr(whole.sliders['r'], 'value', 2), whole.reset())")
    wait_for(lambda: shown_step(lab, "whole") == 0, "step 0")
    lab.output("whole").locator("svg").first.scroll_into_view_if_needed()
    button(lab, "whole", "Start").click()
    places, ink, steps = [], [], []
    for _ in range(12):
        places.append(lab.output("whole").evaluate(PLACES))
        [x, y, width, height] = places[-1][0]
        picture = lab.page.screenshot(clip={"x": x, "y": y, "width": width, "height": height}, animations="allow")
        ink.append(float(np.asarray(Image.open(io.BytesIO(picture)).convert("L"), dtype=float).std()))
        steps.append(shown_step(lab, "whole"))
        lab.page.wait_for_timeout(150)
    assert len(set(steps)) > 3, f"the chart moves: {steps}"
    assert all(place == places[0] for place in places), "layout boxes of chart and controls stand still"
    assert min(ink) > 0.7 * statistics.median(ink), "a frame is blank"


def test_running_the_cell_again_while_it_trains_keeps_settings_and_leaves_no_task(lab):
    lab.asks("no_cell_remembers(whole)")
    slider(lab, "whole", "alpha").focus()
    before = lab.asks("whole.settings()['alpha']")
    lab.asks("(setattr(whole.sliders['speed'], 'value', 30.0), whole.reset())")
    wait_for(lambda: steps_made(lab, "whole") == 0, "step 0")
    lab.asks("(whole.run.extend(1_000_000), whole.start())")  # its task shall not end by itself while this test looks
    lab.page.keyboard.press(UP)
    trains(lab, "whole")
    wait_for(lambda: lab.asks("whole.settings()['alpha']") == 2 * before, "alpha moved")
    lab.run("whole")
    assert not lab.asks("old is whole") and lab.asks("whole.settings()['alpha']") == 2 * before
    wait_for(lambda: lab.asks("live_tasks()") == 0, "the old task to end")
    at = lab.asks("old.run.step")
    button(lab, "whole", "Start").click()
    assert trains(lab, "whole") and lab.asks("old.run.step") == at
    expect(lab.output("whole").locator(".lora-live, .widget-slider").first).to_be_visible()


def tab_through(lab, cell) -> dict[str, str]:
    """Press Tab from the cell's first control to the end of the cell; returns name -> role of what had the focus."""
    lab.output(cell).locator("button.widget-button").first.focus()
    met = {}
    for _ in range(60):
        role, name = focused_name(lab.page)
        met[re.sub("[\ue000-\uf8ff]", "", name).strip()] = role  # without the glyphs of icons
        lab.page.keyboard.press("Tab")
        if not lab.page.evaluate("cell => cell.contains(document.activeElement)", lab.output(cell).element_handle()):
            return met
    raise AssertionError(f"Tab never leaves the view; it met {met}")


def test_with_the_keyboard_alone_every_control_is_reached_and_named(lab):
    button(lab, "toy", "Reset").focus()
    lab.page.keyboard.press("Enter")
    wait_for(lambda: shown_step(lab, "toy") == 0, "step 0")
    met = tab_through(lab, "toy")
    assert "" not in met, f"something has the focus and no name: {met}"
    buttons = {"Start", "Pause", "Step", "Reset"}
    assert buttons <= {name for name, role in met.items() if role == "button"}
    assert {"rank r", "alpha", "learning rate"} <= {name for name, role in met.items() if role == "slider"}
    assert {"optimizer", "speed"} <= {name for name, role in met.items() if role in ("combobox", "listbox", "MenuListPopup", "ComboBoxMenuButton")}
    assert {"volume", "step size"} & met.keys()
    button(lab, "toy", "Start").focus()
    lab.page.keyboard.press("Enter")
    assert trains(lab, "toy")
    button(lab, "toy", "Pause").focus()
    lab.page.keyboard.press("Space")
    wait_for(lambda: not lab.asks("toy.playing"), "the pause")
    expect(lab.output("toy").get_by_role("status").first).to_contain_text("paused")


def test_in_the_dark_theme_everything_can_be_read(lab):
    lab.menu("Settings", "Theme", "JupyterLab Dark")
    try:
        wait_for(lambda: lab.page.evaluate("document.body.dataset.jpThemeLight") == "false", "the dark theme")
        lab.page.wait_for_timeout(500)
        for cell in ("whole", "digits", "explorer", "knob"):
            lab.output(cell).scroll_into_view_if_needed()
            seen = contrasts(lab.output(cell))
            assert len(seen) > 8
            # WCAG asks 4.5:1 of small text. JupyterLab's own greys of secondary text come close to it, and they are not ours to choose.
            assert not [(text, round(ratio, 2)) for text, ratio in seen if ratio < 4]
        lab.output("whole").locator("svg").first.scroll_into_view_if_needed()
        lab.shot("dark")
    finally:
        lab.menu("Settings", "Theme", "JupyterLab Light")


@pytest.mark.parametrize(("name", "width", "height"), [("projector", 1024, 768), ("zoomed to 200 %", 640, 450)])
def test_on_a_small_page_the_view_wraps_without_overlap(lab, name, width, height):
    lab.page.set_viewport_size({"width": width, "height": height})
    try:
        if width < 800:
            lab.page.keyboard.press("Control+b")  # the file browser would take half of it
        lab.page.wait_for_timeout(800)
        for cell in ("whole", "digits"):
            area = lab.output(cell)
            area.locator("svg").first.scroll_into_view_if_needed()
            lab.shot(f"{width}_{cell}")
            places = area.evaluate(PLACES)
            right = area.bounding_box()["x"] + area.bounding_box()["width"]
            assert all(x + w <= right + 1 for x, _, w, _ in places), "something is cut at the right edge"
            for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(places, 2):
                apart = ax + aw <= bx + 1 or bx + bw <= ax + 1 or ay + ah <= by + 1 or by + bh <= ay + 1
                assert apart, "two parts of the view cover each other"
    finally:
        if width < 800:
            lab.page.keyboard.press("Control+b")
        lab.page.set_viewport_size({"width": 1280, "height": 900})


def test_an_interrupt_stops_a_cell_and_no_training(lab):
    button(lab, "toy", "Start").click()
    trains(lab, "toy")
    lab.interrupt()
    assert trains(lab, "toy")
    lab.cell("blocks").locator(".jp-InputPrompt").click()
    lab.page.keyboard.press("Control+Enter")
    expect(lab.cell("blocks").locator(".jp-InputPrompt")).to_have_text("[*]:")
    slider(lab, "toy", "alpha").focus()
    lab.page.keyboard.press(DOWN)  # while the kernel is blocked
    lab.page.wait_for_timeout(300)
    lab.interrupt()
    expect(lab.output("blocks")).to_contain_text("KeyboardInterrupt")
    assert trains(lab, "toy")
    wait_for(lambda: lab.asks("spies['toy'].scalings()[-1] == toy.sliders['alpha'].value / 2"), "the change to act")


def test_after_a_reload_the_view_is_there_and_subshells_are_not_needed(lab, in_time, server):
    button(lab, "toy", "Start").click()
    trains(lab, "toy")
    lab.saved_outputs()
    server.setting(COMMS, commsOverSubshells="disabled")
    lab.page.goto("about:blank")
    at = steps_made(lab, "toy")
    wait_for(lambda: steps_made(lab, "toy") > at, "the training to go on without a page")
    lab.page.goto(lab.address)
    lab.output("toy").locator("svg[data-state=running]").first.wait_for()
    assert shown_step(lab, "toy") > at
    button(lab, "toy", "Pause").click()
    wait_for(lambda: not lab.asks("toy.playing"), "the pause")
    lab.output("peer").locator(".answer").wait_for()
    slider(lab, "toy", "alpha").wait_for()
    twelve_of_twelve(lab, in_time, "toy", main_thread=True)


def test_after_a_restart_the_old_views_say_so_and_their_cells_work_again(lab):
    for cell in ("explorer", "knob", "toy"):
        lab.run(cell)
    button(lab, "toy", "Start").click()
    trains(lab, "toy")
    gone = {cell: lab.output(cell).get_by_text("Run this cell again") for cell in ("explorer", "knob", "toy")}
    for note in gone.values():
        expect(note).to_be_hidden()
    lab.menu("Kernel", "Restart Kernel…")
    lab.page.locator("dialog.jp-Dialog button.jp-mod-accept").click()
    for note in gone.values():
        expect(note).to_be_visible()
    assert button(lab, "toy", "Start").evaluate("button => getComputedStyle(button).pointerEvents") == "none"
    lab.wait_until_idle()
    lab.run("explorer")
    lab.run("toy")
    expect(gone["toy"]).to_be_hidden()
    expect(gone["knob"]).to_be_visible()
    button(lab, "toy", "Start").click()
    assert trains(lab, "toy")
