"""The live view without a browser: wishes from any thread, one task on the cell's loop, and pictures that say what the run says."""

import asyncio
import builtins
import math
import re
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("ipywidgets")
pytest.importorskip("PIL")

from lora_lab.live import LiveRun, toy_problem
from lora_lab.teacher import Teacher
from lora_lab.view import live_chart
from lora_lab.view import live_training as make_view  # the function; the module of the same name is sys.modules'
from lora_lab.view.live_chart import BASE, LEFT, PLOT_W, TOP, Axes, loss_chart, samples_html, spectrum_chart, together

SMALL = Teacher((2.0, 1.0, 0.5, 0.2), 6, 9, seed=1)


@pytest.fixture(autouse=True)
def live(monkeypatch):
    monkeypatch.delenv("LORA_LAB_HEADLESS", raising=False)


@pytest.fixture
def problem():
    """A toy whose steps are short, and that is not made anew at once when r is moved."""
    return replace(toy_problem(SMALL), instant=False)


def on_a_loop(scenario):
    """Run it as a cell is run: on a loop, with later cells and callbacks in between. What the loop complains of fails the test."""
    complaints = []

    async def cell():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        await scenario()

    asyncio.run(asyncio.wait_for(cell(), 60))
    assert not complaints


async def until(condition, patience=30):
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.001)


def watched(view):
    """Every step with the settings that were in force when it was made, and the thread that made it."""
    steps, advance = [], view.run.advance

    def advancing():
        made = advance()
        if made:
            steps.append((made.step, dict(view.run.settings), threading.current_thread()))
        return made

    view.run.advance = advancing
    return steps


# ---------------------------------------------------------------- the task


def test_start_pause_step_reset(problem):
    async def scenario():
        view = make_view(problem, steps=100_000, speed=math.inf)
        view.widget()
        assert view.task is None and view.run.step == 0, "nothing trains that nobody started"
        view.buttons["start"].click()
        await until(lambda: view.run.step > 5)
        assert view.playing and not view.task.done()
        view.buttons["pause"].click()
        await view.task
        at = view.run.step
        await asyncio.sleep(0.02)
        assert view.run.step == at and not view.playing and f"Step {at:,} of".replace(",", "") in view.text.replace(",", "")
        view.buttons["step"].click()
        await view.task
        assert view.run.step == at + 1
        view.buttons["reset"].click()
        await view.task
        assert view.run.step == 0 and len(view.run.earlier) == 1 and not view.playing
        view.buttons["reset"].click()
        await view.task
        assert not view.run.earlier, "a second reset forgets the old curves"
        assert view.error is None

    on_a_loop(scenario)


def test_it_stops_at_the_end_and_start_goes_on_from_there(problem):
    async def scenario():
        view = make_view(problem, steps=30, speed=math.inf)
        view.widget()
        view.start()
        await view.task
        assert view.run.step == 30 and view.task.done() and "at the end" in view.text
        view.start()
        await view.task
        assert view.run.step == 60 and view.run.curve.points()[:30] == LiveRun(problem, steps=30).finish().curve.points()

    on_a_loop(scenario)


def test_every_move_of_a_slider_acts_on_the_very_next_step(problem):
    async def scenario():
        view = make_view(problem, steps=10**6, speed=math.inf)
        view.widget()
        steps = watched(view)
        view.start()
        await until(lambda: steps)
        for name, values in {"alpha": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), "lr": (0.01, 0.02, 0.03, 0.05, 0.002, 0.001)}.items():
            for value in values:
                before = steps[-1][0]
                view.sliders[name].value = value
                await until(lambda before=before: steps[-1][0] > before + 1)
                first = next(settings for step, settings, _ in steps if step == before + 1)
                assert first[name] == value
        assert [entry[1:] for entry in view.run.moves][-6:] == [("lr", v) for v in (0.01, 0.02, 0.03, 0.05, 0.002, 0.001)]
        view.pause()
        await view.task

    on_a_loop(scenario)


@pytest.mark.parametrize("own_loop", [False, True], ids=["plain thread", "thread with a loop of its own, as a kernel's subshell"])
def test_callbacks_on_other_threads_only_wish(problem, own_loop):
    async def scenario():
        view = make_view(problem, steps=10**6, speed=math.inf)
        view.widget()
        steps, main = watched(view), threading.current_thread()

        def elsewhere(action):
            async def there():
                action()

            thread = threading.Thread(target=(lambda: asyncio.run(there())) if own_loop else action)
            thread.start()
            return thread

        elsewhere(view.buttons["start"].click)
        await until(lambda: len(steps) > 3)
        assert view.task.get_loop() is asyncio.get_running_loop()
        for value in (16.0, 32.0):
            thread = elsewhere(lambda value=value: setattr(view.sliders["alpha"], "value", value))
            await until(lambda value=value: steps[-1][1]["alpha"] == value)
            thread.join()
        thread = elsewhere(lambda: setattr(view.sliders["r"], "value", 3))
        await until(lambda: view.run.settings["r"] == 3 and view.run.step > 0)
        thread.join()
        elsewhere(view.pause)
        await view.task
        assert {thread for _, _, thread in steps} == {main}
        assert view.error is None

    on_a_loop(scenario)


def test_alpha_in_both_modes(problem):
    async def scenario():
        view = make_view(problem, alpha=8)
        view.widget()
        for _ in range(20):
            view.step()
        await view.task
        norm = view.run.delta_norm()
        view.sliders["alpha"].value = 16.0
        await view.task
        assert view.run.delta_norm() == pytest.approx(2 * norm, rel=1e-5)
        view.sliders["mode"].value = "step size"
        view.sliders["alpha"].value = 64.0
        await view.task
        assert view.run.delta_norm() == pytest.approx(2 * norm, rel=1e-5) and view.run.settings["alpha"] == 64
        # The order of the queue counts: these two are wished for before the task sees either.
        view.sliders["mode"].value = "volume"
        view.sliders["alpha"].value = 32.0
        view.sliders["mode"].value = "step size"
        view.sliders["alpha"].value = 8.0
        await view.task
        assert view.run.delta_norm() == pytest.approx(norm, rel=1e-5)

    on_a_loop(scenario)


def test_moving_alpha_after_the_end_shows_the_loss_it_makes(problem):
    async def scenario():
        view = make_view(problem, steps=20, speed=math.inf)
        view.widget()
        view.start()
        await view.task
        assert "loss now" not in view.figures.value
        view.sliders["alpha"].value = 64.0
        await view.task
        assert "loss now" in view.figures.value and live_chart.short(view.run.loss_now()) in view.figures.value

    on_a_loop(scenario)


def test_r_begins_again_and_goes_on_if_it_was_going_on(problem):
    async def scenario():
        view = make_view(problem, r=2, steps=10**6, speed=math.inf)
        view.widget()
        view.sliders["r"].value = 3
        await view.task
        assert (view.run.settings["r"], view.run.step, view.playing) == (3, 0, False), "nobody has started"
        view.start()
        await until(lambda: view.run.step > 20)
        view.sliders["r"].value = 1
        await until(lambda: view.run.settings["r"] == 1 and view.run.step > 3)
        assert [e.settings["r"] for e in view.run.earlier] == [3] and view.playing
        view.sliders["optimizer"].value = "sgd"
        await until(lambda: view.run.settings["optimizer"] == "sgd" and view.run.step > 3)
        assert view.playing and len(view.run.earlier) == 2
        view.pause()
        await view.task

    on_a_loop(scenario)


def test_on_a_short_problem_r_makes_the_whole_run_anew_and_the_next_press_does_not_wait():
    async def scenario():
        view = make_view("toy", r=2)
        view.widget()
        frames = view.frames
        view.sliders["r"].value = 3
        await view.task
        assert view.run.done and view.run.step == 300 and not view.playing
        assert view.frames > frames and 'data-step="300"' in view.picture.value and 'data-r="3"' in view.picture.value
        view.sliders["r"].value = 4
        await until(lambda: 0 < view.run.step < 300)
        view.sliders["r"].value = 5
        await view.task
        assert view.run.settings["r"] == 5 and view.run.step == 300
        assert [e.settings["r"] for e in view.run.earlier] == [3], "a run that was made anew and left halfway is no curve to compare with"

    on_a_loop(scenario)


def test_the_kernel_gets_its_turn_while_a_run_is_made_anew():
    async def scenario():
        view = make_view("toy")
        view.widget()
        view.set("r", 5)
        gaps, last = [], time.perf_counter()
        while not view.task.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
        assert len(gaps) >= 3, "the work is cut into slices"

    on_a_loop(scenario)


def test_the_speed_is_kept(problem, monkeypatch):
    """On a clock of the test's own, which sleeping moves: real seconds say little on a busy machine."""
    async def scenario():
        clock, module = [0.0], sys.modules["lora_lab.view.live_training"]

        async def sleep(seconds):
            clock[0] += max(seconds, 0.0001)
            await asyncio.sleep(0)

        monkeypatch.setattr(module, "time", type("Clock", (), {"perf_counter": staticmethod(lambda: clock[0])}))
        monkeypatch.setattr(module, "asyncio", type("Asyncio", (), {**vars(asyncio), "sleep": staticmethod(sleep)}))
        view = make_view(problem, steps=10**6, speed=20.0)
        view.widget()
        view.start()
        for name, speed in (("slow", 20.0), ("fast", 300.0), ("as fast as it can", math.inf)):
            view.set("speed", speed)
            await until(lambda speed=speed: view.speed == speed)
            began, at = clock[0], view.run.step
            await until(lambda end=began + (2 if speed < math.inf else 0.1): clock[0] > end)
            rate = (view.run.step - at) / (clock[0] - began)
            assert rate == pytest.approx(speed, rel=0.1) if speed < math.inf else rate > 2000, name
        # A cell that blocks for a minute is no reason to hurry afterwards.
        view.set("speed", 20.0)
        await until(lambda: view.speed == 20.0)
        clock[0] += 60
        began, at = clock[0], view.run.step
        await until(lambda: clock[0] > began + 1)
        assert view.run.step - at <= 22
        view.pause()
        await view.task

    on_a_loop(scenario)


def test_ten_frames_a_second_and_no_more(problem, monkeypatch):
    """On a clock of the test's own: 1000 ticks of 10 ms are 10 s."""
    async def scenario():
        view = make_view(problem, steps=1000, speed=math.inf)
        view.widget()
        clock, frames = [0.0], []
        advance = view.run.advance

        def ticking():
            clock[0] += 0.01
            return advance()

        view.run.advance = ticking
        monkeypatch.setattr(sys.modules["lora_lab.view.live_training"], "time", type("Clock", (), {"perf_counter": staticmethod(lambda: clock[0])}))
        draw = view.draw
        view.draw = lambda moving=False: (frames.append((clock[0], moving)), draw(moving))
        view.start()
        await view.task
        moving = [at for at, moving in frames if moving]
        assert 90 <= len(moving) <= 101 and min(np.diff(moving)) >= 0.0999

    on_a_loop(scenario)


def test_a_slow_measurement_is_made_seldom_while_it_moves_and_always_at_rest(problem, monkeypatch):
    """The test's own clock: a step takes 10 ms, measuring 1 s. At most a tenth of the time may go into it."""
    async def scenario():
        clock, measured = [0.0], []

        def evaluate(model):
            clock[0] += 1.0
            measured.append(clock[0])
            return {"share": 0.5}

        monkeypatch.setattr(sys.modules["lora_lab.view.live_training"], "time", type("Clock", (), {"perf_counter": staticmethod(lambda: clock[0])}))
        view = make_view(replace(problem, evaluate=evaluate), steps=3000, speed=math.inf)
        view.widget()
        advance = view.run.advance
        view.run.advance = lambda: (clock.__setitem__(0, clock[0] + 0.01), advance())[1]
        view.start()
        await view.task
        assert 3 <= len(measured) <= 6, "about 33 s: once before, every ten seconds, once at the end"
        assert view.frames > 200, "ten frames a second all the same"
        assert view._seen.at == (0, 3000, 8.0)

    on_a_loop(scenario)


def test_nobody_looks_nothing_is_drawn(problem):
    async def scenario():
        view = make_view(problem, steps=50, speed=math.inf)
        view.start()
        await view.task
        assert view.run.done and view.frames == 0

    on_a_loop(scenario)


# ---------------------------------------------------------------- what goes wrong


def test_a_run_that_blows_up_says_so_and_every_button_lives(problem):
    async def scenario():
        view = make_view(problem, optimizer="sgd", lr=10.0, alpha=256, speed=math.inf)
        view.widget()
        view.start()
        await view.task
        assert "TrainingDiverged" in view.error and "blew up" in view.trouble.value and 'role="alert"' in view.trouble.value
        assert "nan" not in view.picture.value and "above the axis" in view.picture.value
        view.reset()
        await view.task
        assert view.error is None and view.trouble.value == "" and view.run.step == 0
        view.sliders["lr"].value = 0.01
        view.sliders["alpha"].value = 1.0
        view.start()
        await view.task
        assert view.run.done and view.error is None

    on_a_loop(scenario)


def test_an_error_in_the_loss_or_in_a_restart_shows_and_the_sliders_stay_true(problem):
    def loss(model, batch):
        if broken:
            raise RuntimeError("no <loss> today")
        return SMALL.loss(model, batch)

    async def scenario():
        view = make_view(replace(problem, loss=loss, targets={"it": ["layer"], "typo": ["layre"]}), steps=50, speed=math.inf)
        view.widget()
        view.step()
        await view.task
        broken.append(1)
        view.start()
        await view.task
        assert "no <loss> today" in view.error and "no &lt;loss&gt; today" in view.trouble.value and view.run.step == 1
        broken.clear()
        view.sliders["targets"].value = "typo"
        await view.task
        assert "layre" in view.error and view.sliders["targets"].value == "it" and view.run.settings["targets"] == "it" and view.run.step == 1
        view.start()
        await view.task
        assert view.run.done and view.error is None

    broken = []
    on_a_loop(scenario)


def test_an_error_in_drawing_shows_and_training_goes_on(problem, monkeypatch):
    async def scenario():
        view = make_view(problem, steps=50, speed=math.inf)
        view.widget()
        with monkeypatch.context() as patch:
            patch.setattr(view, "page", lambda moving=False: 1 / 0)
            view.start()
            await view.task
            assert "ZeroDivisionError" in view.error and "ZeroDivisionError" in view.trouble.value and view.run.done
        view.reset()
        await view.task
        assert view.error is None and view.trouble.value == ""

    on_a_loop(scenario)


def test_an_interrupt_pauses_and_says_so(problem):
    def loss(model, batch):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return SMALL.loss(model, batch)

    async def scenario():
        view = make_view(replace(problem, loss=loss), steps=30, speed=math.inf)
        view.widget()
        view.start()
        await view.task
        assert view.run.step == 6 and "Interrupted at step 6" in view.trouble.value and "KeyboardInterrupt" in view.error and not view.playing
        view.start()
        await view.task
        assert view.run.done and view.error is None
        assert view.run.curve.points() == LiveRun(problem, steps=30).finish().curve.points()

    calls = []
    on_a_loop(scenario)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"problem": "toys"}, "'toy', 'digits'.*found 'toys'"),
        ({"problem": 3}, "found int"),
        ({"mode": "loud"}, "'volume', 'step size'; found 'loud'"),
        ({"speed": 0}, "more than 0; found 0"),
        ({"alpha": 0.0}, "both must be more than 0; found 0"),
        ({"lr": 0.0}, "both must be more than 0"),
        ({"r": 0}, "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_is_asked_for(wrong, says):
    with pytest.raises(ValueError, match=says):
        make_view(**{"problem": "toy", **wrong})


def test_set_names_the_settings_and_moves_the_slider(problem):
    view = make_view(problem)
    with pytest.raises(ValueError, match="'rank'; there are r, alpha"):
        view.set("rank", 2)
    view.widget()
    for name, value in {"r": 60, "alpha": 24.0, "lr": 0.0123, "mode": "step size", "optimizer": "sgd", "speed": math.inf}.items():
        view.set(name, value)
        assert view.sliders[name].value == value == view.settings()[name], "also where the slider had no such stop"
    assert view.sliders["alpha"].options == tuple(sorted(view.sliders["alpha"].options, key=lambda stop: stop[1]))


# ---------------------------------------------------------------- cells


class Shell:
    """As much of IPython as a view asks."""

    def __init__(self, cell="one", run=1, identified=True):
        self.cell, self.run, self.identified, self.user_ns = cell, run, identified, {"_ih": ["", f"text of {cell}"]}

    def get_parent(self):
        return {"metadata": {"cellId": self.cell} if self.identified else {}, "header": {"msg_id": self.run}}


@pytest.fixture
def in_cell(monkeypatch):
    from lora_lab.view.live_training import _kept

    def enter(*place, **options):
        shell = Shell(*place, **options)
        monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)

    yield enter
    _kept.clear()


@pytest.mark.parametrize("identified", [True, False], ids=["the front end names its cells", "it doesn't"])
def test_settings_survive_when_the_cell_runs_again_and_the_old_task_ends(problem, in_cell, identified):
    async def scenario():
        in_cell("one", 1, identified=identified)
        old = make_view(problem, r=2, lr=0.02, speed=math.inf, steps=10**6)
        box = old.widget()
        old.start()
        for name, value in {"r": 3, "alpha": 32.0, "lr": 0.01, "mode": "step size"}.items():
            old.set(name, value)
        await until(lambda: old.run.step > 3)
        in_cell("one", 2, identified=identified)
        new = make_view(problem, r=2, lr=0.05, speed=math.inf, steps=10**6)
        assert new.settings() | {"targets": 0} == {
            "r": 3, "alpha": 32.0, "lr": 0.05, "optimizer": "adamw", "targets": 0, "mode": "step size", "speed": math.inf
        }, "the slider's r, alpha and mode; the lr of the call, which was changed"  # fmt: skip
        await asyncio.wait([old.task])
        at = old.run.step
        await asyncio.sleep(0.02)
        assert old.run.step == at and not old.playing and box.comm is None, "no orphan goes on training, no dead widget stays"
        in_cell("another", 3, identified=identified)
        assert make_view(problem, r=2).settings()["r"] == 2, "another cell is another view"

    on_a_loop(scenario)


def test_two_views_in_one_cell_and_a_key_of_ones_own(problem, in_cell):
    in_cell("one", 1)
    first, second = make_view(problem), make_view(problem)
    first.set("r", 3), second.set("r", 4)
    in_cell("one", 2)
    assert [make_view(problem).settings()["r"], make_view(problem).settings()["r"]] == [3, 4]
    one = make_view(problem, key="mine")
    one.set("r", 1)
    in_cell("elsewhere", 3)
    assert make_view(problem, key="mine").settings()["r"] == 1
    assert make_view(replace(problem, name="another"), key="mine").settings()["r"] == 2, "another problem takes no settings over"


def test_a_call_that_is_refused_leaves_the_view_that_is_there(problem, in_cell):
    in_cell("one", 1)
    view = make_view(problem)
    view.widget()
    in_cell("one", 2)
    with pytest.raises(ValueError, match="at least 1"):
        make_view(problem, r=0)
    assert view.box is not None and view.box.comm is not None


def test_outside_a_notebook_wishes_are_fulfilled_before_the_call_returns(problem):
    view = make_view(problem, steps=25)
    view.start()
    assert view.run.step == 25 and view.task is None and not view.playing
    view.set("r", 1)
    assert view.run.settings["r"] == 1 and view.run.done, "after the end a new setting is seen to the end"


def test_finish_is_for_the_cells_below(problem):
    async def scenario():
        view = make_view(problem, steps=400, speed=100.0)
        view.widget()
        view.start()
        await until(lambda: view.run.step > 2)
        view.set("alpha", 16.0)
        run = view.finish()
        assert run is view.run and run.step == 400 and run.settings["alpha"] == 16
        await view.task
        assert not view.playing and run.step == 400 and 'data-state="done"' in view.picture.value

    on_a_loop(scenario)


def displayed(view, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **how: shown.append((data, how)))
    view._ipython_display_()
    return shown


def test_headless_it_trains_at_once_and_leaves_a_figure_and_a_table(problem, monkeypatch):
    monkeypatch.setenv("LORA_LAB_HEADLESS", "1")
    view = make_view(problem, r=2, steps=40)
    assert view.run.step == 40 and view.task is None and view.box is None, "finished before the next line, without any task"
    [(bundle, _)] = displayed(view, monkeypatch)
    page = bundle["text/html"]
    assert "<details" not in page and "<script" not in page and page.count('role="img"') == 1 and "<table>" in page and "apply_lora" in page
    assert f"Loss {live_chart.short(view.run.curve.last[1])}" in bundle["text/plain"]
    rows = re.findall(r"<tr><th scope='row'>(\d+)</th><td>([^<]*)</td></tr>", page)
    losses = dict(view.run.curve.points())
    assert [int(step) for step, _ in rows] == [1, 4, 10, 20, 30, 40]
    assert all(value == live_chart.short(losses[int(step)]) for step, value in rows)


def test_headless_a_divergence_is_a_result_and_an_error_is_an_error(problem, monkeypatch):
    view = make_view(problem, optimizer="sgd", lr=10.0, alpha=256, blocking=True)
    assert "TrainingDiverged" in view.error and "blew up" in view.still()
    with pytest.raises(ZeroDivisionError):
        make_view(replace(problem, loss=lambda model, batch: 1 / 0), blocking=True)


def test_live_there_are_widgets_and_a_folded_twin_that_follows(problem, monkeypatch):
    async def scenario():
        view = make_view(problem, steps=20, speed=math.inf)
        (box, _), (bundle, how) = displayed(view, monkeypatch)
        assert box is view.box and bundle["text/html"].startswith("<details>") and how["display_id"]
        updates = []
        view._twin = type("Twin", (), {"update": lambda self, bundle, raw: updates.append(bundle)})()
        view.start()
        await view.task
        assert 'data-step="20"' in updates[-1]["text/html"] and "Step 20 of 20" in updates[-1]["text/plain"]

    on_a_loop(scenario)


# ---------------------------------------------------------------- for eyes, ears and fingers


def test_silent_while_it_moves_and_in_words_when_it_rests(problem):
    async def scenario():
        view = make_view(problem, r=3, alpha=4, lr=0.02, steps=10**6, speed=math.inf)
        view.widget()
        view.start()
        await until(lambda: 'data-state="running"' in view.picture.value)
        words = view.words.value
        assert view.picture.value.startswith('<div aria-hidden="true">') and 'role="img"' not in view.picture.value
        await until(lambda: view.run.step > 50)
        assert view.words.value == words, "nothing is read out while it moves"
        view.pause()
        await view.task
        assert 'role="status"' in view.words.value and view.text in view.words.value.replace("&#x27;", "'")
        assert "aria-hidden" not in view.picture.value[:20] and 'role="img"' in view.picture.value
        run = view.run
        for part in (
            f"Step {run.step} of", "paused", "r = 3, alpha = 4, learning rate 0.02, adamw", f"Loss {live_chart.short(run.curve.last[1])}",
            f"floor of rank 3 is {live_chart.short(SMALL.floor(3))}", f"norm of ΔW is {run.delta_norm():.3g}",
        ):  # fmt: skip
            assert part in view.text

    on_a_loop(scenario)


def test_every_control_has_a_name_and_says_what_it_does(problem):
    view = make_view(replace(problem, targets={"it": ["layer"], "that": ["layer"]}))
    view.widget()
    for name, slider in view.sliders.items():
        assert name == "mode" or slider.description, name
        assert name in ("mode", "speed") or slider.tooltip, name
    assert {name: button.description for name, button in view.buttons.items()} == {
        "start": "Start", "pause": "Pause", "step": "Step", "reset": "Reset"
    }  # fmt: skip
    assert all(button.tooltip for button in view.buttons.values()) and len(view.sliders["mode"].tooltips) == 2
    (stops, values) = zip(*view.sliders["lr"].options, strict=True)
    ratios = np.array(values[1:]) / values[:-1]
    assert 1.3 < ratios.min() and ratios.max() < 1.7, "even steps on a logarithmic scale"
    assert (np.diff(np.log2([v for _, v in view.sliders["alpha"].options])) == 1).all()


def test_the_code_of_the_settings_in_force_can_be_opened(problem):
    async def scenario():
        view = make_view("toy", r=3)
        view.widget()
        assert view.listing.value == ""
        view.listed.value = True
        assert "r=3" in view.listing.value and "user-select: all" in view.listing.value
        view.set("r", 4)
        await view.task
        assert "r=4" in view.listing.value and "r=4" in view.code()
        space = {}
        exec(view.code(), space)
        assert space["losses"][-1] == view.run.curve.last[1]
        view.listed.value = False
        assert view.listing.value == ""

    on_a_loop(scenario)


def ended(run, r, **more):
    run.restart(r=r, **more)
    return run.finish()


def places(chart):
    """Polylines of a chart as arrays (n, 2)."""
    return [np.array([list(map(float, p.split(","))) for p in line.split()]) for line in re.findall(r'<polyline points="([^"]+)"', chart)]


def test_the_line_and_the_floor_stand_where_their_numbers_are():
    problem = toy_problem()
    run, axes = LiveRun(problem, r=2, steps=200).finish(), Axes(problem)
    axes.fit(run, run.spectrum())
    chart = loss_chart(run, axes)
    [line] = places(chart)
    losses = np.array([y for _, y in run.curve.points()])
    grid = {d: TOP + (BASE - TOP) * (axes.high - d) / (axes.high - axes.low) for d in range(axes.low, axes.high + 1)}
    expected = grid[0] + (grid[0] - grid[-1]) * np.log10(losses)  # one decade is one line of the grid
    assert np.abs(line[:, 1] - expected).max() <= 0.06, "one decimal is written"
    assert np.abs(line[:, 0] - (LEFT + PLOT_W * np.arange(1, 201) / 200)).max() <= 0.06
    floor = float(re.search(r'<path d="M\d+ ([\d.]+)H\d+" stroke="[^"]*" stroke-width="1.4"', chart)[1])
    assert abs(floor - (grid[0] + (grid[0] - grid[-1]) * math.log10(Teacher().floor(2)))) <= 0.06
    assert "floor of rank 2: 0.0104" in chart and (line[:, 1] <= floor + 0.06).all(), "downwards is larger in SVG"


def test_lines_are_told_apart_without_colour_and_named_at_their_ends():
    problem = toy_problem()
    run, axes = LiveRun(problem, r=1, steps=50).finish(), Axes(problem)
    for r in (2, 3, 4, 5, 6, 7):
        ended(run, r)
        axes.fit(run, run.spectrum())
        chart = loss_chart(run, axes)
        lines = re.findall(r"<polyline [^>]*>", chart)
        looks = [(re.search(r'stroke-width="([^"]+)"', line)[1], re.findall(r'dasharray="([^"]+)"', line)) for line in lines]
        assert len({str(dash) for _, dash in looks}) == len(lines) == min(r, 5), "each line has dashes of its own"
        assert looks[-1] == ("3", []), "the run that goes on is the thick, solid one"
        names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>(r \d)</text>', chart)
        assert [name for _, _, name in sorted(names, key=lambda n: n[2])] == [f"r {k}" for k in range(max(1, r - 4), r + 1)]
        heights = sorted(float(y) for _, y, _ in names)
        assert min(np.diff(heights)) >= 14, "no name covers another"
        assert heights[-1] <= live_chart.HIGH - 8 and heights[0] >= TOP - 10


def test_an_earlier_line_keeps_its_look_as_long_as_it_is_shown():
    problem = toy_problem()
    run, axes, looks = LiveRun(problem, r=1, steps=20).finish(), Axes(problem), {}
    for r in range(2, 9):
        ended(run, r)
        axes.fit(run, run.spectrum())
        for entry, line in zip(run.earlier, re.findall(r"<polyline [^>]*>", loss_chart(run, axes)), strict=False):
            look = re.search(r'stroke="(#\w+)"', line)[1]
            assert looks.setdefault(entry.number, look) == look


def test_earlier_lines_move_with_the_axes():
    problem = toy_problem()
    run, axes = LiveRun(problem, r=1, steps=50).finish(), Axes(problem)
    ended(run, 2)
    axes.fit(run, run.spectrum())
    before = places(loss_chart(run, axes))[0]
    run.extend(50)
    axes.fit(run, run.spectrum())
    after = places(loss_chart(run, axes))[0]
    # twice as many steps on the axis: half as far to the right; one decimal is written
    assert np.allclose(after[:, 0] - LEFT, (before[:, 0] - LEFT) / 2, atol=0.11) and np.array_equal(after[:, 1], before[:, 1])


@pytest.mark.parametrize(
    ("moves", "says"),
    [
        ([{"r": 1}, {"r": 2}], ["r 1", "r 2"]),
        ([{"r": 1, "lr": 0.02}, {"r": 2, "lr": 0.5}], ["r 1, lr 0.02", "r 2, lr 0.5"]),
        ([{"optimizer": "sgd"}, {"optimizer": "adamw"}], ["sgd", "adamw"]),
        ([{"r": 11, "alpha": 256, "lr": 0.015}, {"r": 2, "alpha": 8, "lr": 0.5, "optimizer": "sgd"}], ["r 11, alpha 256", "lr 0.015, adamw"]),
    ],
)
def test_a_label_says_what_differs(moves, says):
    run = LiveRun(toy_problem(), steps=3)
    for settings in moves:
        run.restart(**settings)
        run.finish()
    runs = live_chart.all_runs(run)
    if len(says) == 2 and len(moves[0]) < 3:
        assert [live_chart.label(entry, runs) for entry in runs] == says
    else:
        lines = live_chart.label(runs[0], runs).split("\n")
        assert lines[0] == says[0][:14] or ", ".join(lines).startswith("r 11, ") and all(len(line) <= 14 for line in lines)


def test_axes_grow_in_whole_steps_and_never_shrink():
    problem = toy_problem()
    run, axes = LiveRun(problem, r=2, steps=300), Axes(problem)
    seen = [(axes.low, axes.high, 300, axes.top)]
    while run.advance():
        if run.step == 150:
            run.set_alpha(2000.0)  # far beyond what was expected
        axes.fit(run, run.spectrum())
        seen.append((axes.low, axes.high, axes.right, axes.top))
    lows, highs, rights, tops = map(np.array, zip(*seen, strict=True))
    assert (np.diff(lows) <= 0).all() and (np.diff(highs) >= 0).all() and set(rights) == {300} and (np.diff(tops) >= 0).all()
    assert lows.dtype.kind == highs.dtype.kind == "i", "whole decades"
    assert len(set(seen)) <= 12, "a few jumps, at the accident; not one a frame"
    assert len(set(seen[:150])) == 1, "no jump in a run as expected"
    assert highs[-1] <= math.log10(30 * problem.expect[1]) + 1, "one spike does not press the rest flat"
    assert (places(loss_chart(run, axes))[0][:, 1] >= TOP - 0.05).all()


@pytest.mark.parametrize("name", ["toy", "digits"])
@pytest.mark.parametrize("alpha", [0.25, 256.0])
@pytest.mark.parametrize("lr", [1e-4, 10.0])
def test_at_the_ends_of_all_sliders_there_is_a_picture(name, alpha, lr):
    view = make_view(name, alpha=alpha, lr=lr, steps=40)
    for r in (1, view.problem.largest_r):
        for optimizer in ("sgd", "adamw"):
            view.set("r", r), view.set("optimizer", optimizer), view.set("alpha", alpha), view.set("lr", lr)
            view.start()
            for page in (view.page(), view.page(moving=True), view.still()):
                assert "<svg" in page and not re.search(r"\b(nan|inf)\b", page.replace("user-select", "")), (r, optimizer)
            for line in places(view.page()):
                assert ((line >= 0) & (line <= [live_chart.WIDE, live_chart.HIGH])).all()


def test_bars_and_rings_stand_for_the_singular_values():
    problem = toy_problem()
    run, axes = LiveRun(problem, r=4, steps=300).finish(), Axes(problem)
    spectrum = run.spectrum()
    axes.fit(run, spectrum)
    chart = spectrum_chart(run, spectrum, axes)
    bars = np.array([float(h) for h in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', chart)][:4])
    rings = np.array([float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)" r="4.5"', chart)][:10])
    assert np.allclose(np.diff(rings), np.diff(rings)[0], atol=0.11), "halves are even steps on a logarithmic axis"
    step = (rings[9] - rings[0]) / 9
    S = np.linalg.svd(run.layers["layer"].delta_weight().detach().numpy(), compute_uv=False)[:4]
    assert np.allclose(bars[:-1] - bars[1:], step * np.log2(S[:-1] / S[1:]), atol=0.11)  # two numbers with one decimal each
    assert np.allclose(152 - bars, rings[:4], atol=3), "after the training the bars reach the rings"


def test_many_layers_are_shown_as_one_and_say_so():
    spectra = {f"layer {i}": torch.tensor([float(i), i / 2]) for i in range(7)} | {"small": torch.tensor([0.25])}
    assert together(spectra) == {"the largest of 8 layers": [6.0, 3.0]}
    few = {"one": torch.ones(3), "two": torch.ones(2)}
    assert together(few) is few
    run = LiveRun(toy_problem(SMALL))
    axes = Axes(run.problem)
    axes.fit(run, spectra)
    chart = spectrum_chart(run, spectra, axes)
    assert chart.count("the largest of 8 layers") == 1 and "layer 3" not in chart and chart.count("<rect") == 2 + 1  # bars, and the key


def test_samples_of_every_kind():
    images = np.zeros((2, 8, 8))
    html = samples_html({"images": images, "labels": ["5", "6"], "predicted": ["5", "9"]})
    assert html.count("<img") == 2 and "2 samples, 1 read right; a 6 is read as 9" in html and "✗ 9" in html
    html = samples_html({"matrices": {"a <b>": torch.eye(3), "c": np.ones((3, 3))}})
    assert html.count("<img") == 2 and "a &lt;b&gt;" in html
    assert "1 &lt; 2" in samples_html({"text": "1 < 2"})
    assert samples_html(None) == "" == samples_html({})
    with pytest.raises(ValueError, match="found sounds"):
        samples_html({"sounds": []})


def test_a_long_run_makes_no_larger_message():
    problem = replace(toy_problem(SMALL), smooth=5)
    run, axes, sizes = LiveRun(problem, steps=10**6), Axes(problem), {}
    rng = np.random.default_rng(0)
    for step, y in enumerate(np.exp(rng.normal(-3, 1, 40_000)), start=1):
        run.step = step
        run.curve.append(step, y)
        run.mean.append(step, y)
        if step in (2000, 20_000, 40_000):
            axes.fit(run, run.spectrum())
            sizes[step] = len(loss_chart(run, axes))
    assert max(sizes.values()) < 25_000 and sizes[40_000] < 1.6 * sizes[2000]
