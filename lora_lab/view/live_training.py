"""`live_training`: sliders that act on a training run while it goes, and the loss, ΔW and what the model says beside them.

Callbacks, on whatever thread a front end runs them, only put a wish into a queue. One asyncio task on the kernel's own loop takes the
wishes, makes the steps and draws; between two steps it lets the kernel do its other work. The chart is inline SVG, drawn ten times a second
at most, and at once when something was moved.
"""

import asyncio
import html
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping

import torch

from lora_lab.live import MODES, LiveRun, Problem, digits_problem, norm, toy_problem
from lora_lab.train import OPTIMIZERS, TrainingDiverged
from lora_lab.view.live_chart import Axes, all_runs, code_html, figures_html, label, loss_chart, samples_html, short, spectrum_chart, table_html, together
from lora_lab.view.widgets import NAME_SLIDERS, UNSEEN, headless, live_box, trouble

PROBLEMS = {"toy": toy_problem, "digits": digits_problem}
STOPS_LR = [float(f"{m}e{d}") for d in range(-4, 1) for m in (1, 1.5, 2, 3, 5, 7)] + [10.0]
STOPS_ALPHA = [2.0**d for d in range(-2, 9)]  # octaves: multiplying and dividing by 2 is exact
FRAME = 0.1  # seconds between two drawings
SHARE = 0.05  # of the time at most goes into drawing, and as much into measuring: sending a frame costs about as much again
AT_ONCE = 0.012  # seconds between two drawings that a moved slider asks for
MEASURE = 0.4  # seconds between two looks at accuracy and samples
NAP = 0.01  # seconds that the task sleeps at most, whatever the speed: a moved slider waits no longer
LATE = 0.5  # seconds behind its speed after which a run stops trying to catch up: a long cell was in the way
SLICE = 0.02  # seconds that a run made anew may keep the kernel to itself; a key press waits no longer
SPEEDS = {"30 steps a second": 30.0, "100 steps a second": 100.0, "300 steps a second": 300.0, "as fast as it can": math.inf}

_kept: dict = {}  # key -> the view that was made last under it


def live_training(
    problem: str | Problem = "toy", *, r: int | None = None, alpha: float | None = None, lr: float | None = None, optimizer: str | None = None,
    targets: str | None = None, steps: int | None = None, seed: int = 0, mode: str = "volume", speed: float | None = None,
    key: str | None = None, blocking: bool | None = None,
) -> "LiveTraining":  # fmt: skip
    """A training run with sliders that act on its very next step. Let it be a cell's last expression.

    problem   "toy": a student of a known teacher, with its floor for each rank; "digits": the classifier of lab 02b; or a `lora_lab.live.Problem`
    r, alpha, lr, optimizer, targets, steps    to begin with; None: the problem's own
    mode      what moving alpha does: "volume", ΔW gets louder; "step size", B is rescaled so that ΔW stays and only its future changes
    speed     steps a second; None: 100, so that one can watch. math.inf: as fast as it can
    key       run the cell again and the sliders stand where they stood: this names the view. None: the cell it is made in. Arguments that
              were changed in the call since then win over the sliders
    blocking  train at once, in this cell, and show what stands still; None: LORA_LAB_HEADLESS decides

    r, optimizer and targets begin again from the same seed and keep the old curve; so does reset. A cell that needs the trained model calls
    `view.finish()`, which trains what is left and returns the `LiveRun`.

    Raises ValueError for a problem or a setting that makes no sense.
    """
    if isinstance(problem, str):
        if problem not in PROBLEMS:
            raise ValueError(f"problem is one of {', '.join(map(repr, PROBLEMS))}, or a lora_lab.live.Problem; found {problem!r}")
        problem = PROBLEMS[problem]()
    elif not isinstance(problem, Problem):
        raise ValueError(f"problem is one of {', '.join(map(repr, PROBLEMS))}, or a lora_lab.live.Problem; found {type(problem).__name__}")
    asked = {"r": r, "alpha": alpha, "lr": lr, "optimizer": optimizer, "targets": targets, "steps": steps, "seed": seed, "mode": mode, "speed": speed}
    key = key if key is not None else _cell()
    old, settings = _kept.get(key), dict(asked)
    if old is not None and old.problem.name == problem.name:
        settings |= {name: value for name, value in old.settings().items() if asked[name] == old.asked[name]}
        if settings["targets"] not in problem.targets:
            settings["targets"] = targets
    view = LiveTraining(problem, settings, blocking=headless() if blocking is None else blocking)
    view.asked = asked
    if old is not None:
        old.retire()
    if key is not None:
        _kept[key] = view
    return view


def _cell() -> tuple | None:
    """What tells this call from others, and is the same when its cell is run again; None outside a notebook."""
    try:
        shell = get_ipython()  # noqa: F821  (IPython puts it among the builtins)
        parent = shell.get_parent()
        cell, run = parent["metadata"].get("cellId"), parent["header"]["msg_id"]
    except (NameError, AttributeError, KeyError, TypeError):
        return None
    if cell is None:  # a front end that names no cells: its text does
        cell = hash(shell.user_ns.get("_ih", [""])[-1])
    if _calls.get("run") != run:
        _calls.clear()
        _calls["run"] = run
    _calls[cell] = _calls.get(cell, 0) + 1  # several views in one cell
    return cell, _calls[cell]


_calls: dict = {}  # of the cell that runs now


class LiveTraining:
    """What `live_training` returns: display it, or read and move it in a test.

    run       the `LiveRun`                              sliders   name -> widget: r, alpha, mode, lr, optimizer, targets, speed
    buttons   start, pause, step, reset                  task      the asyncio task that trains, None before the first
    text      what a screen reader is told               error     the traceback of what went wrong last, None if nothing did
    """

    def __init__(self, problem: Problem, settings: Mapping, blocking: bool = False):
        settings = dict(settings)
        self.mode, speed = settings.pop("mode"), settings.pop("speed")
        self.speed = 100.0 if speed is None else float(speed)
        if self.mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(map(repr, MODES))}; found {self.mode!r}")
        if not self.speed > 0:
            raise ValueError(f"speed is in steps a second, more than 0; found {speed}")
        self.problem, self.run = problem, LiveRun(problem, **settings)
        if not self.run.settings["alpha"] > 0 or not self.run.settings["lr"] > 0:
            raise ValueError(f"the sliders for alpha and lr are logarithmic, so both must be more than 0; found {settings['alpha']}, {settings['lr']}")
        self.asked, self.blocking = {}, blocking
        self.error: str | None = None
        self.text = ""
        self.task: asyncio.Task | None = None
        self.sliders, self.buttons, self.box = {}, {}, None
        self.frames = 0  # drawn so far
        self._wishes: deque = deque()
        self._playing = self._anew = self._showing = False
        self._note = self._page = ""
        self._axes, self._seen, self._twin = Axes(problem), Seen(), None
        self._loop = _running_loop()
        if blocking:
            self._guarded(self.run.finish)
        self.text = self.says()

    # ------------------------------------------------------------ what buttons and sliders ask for

    def start(self) -> None:
        """Train, and go on beyond the end if the end was reached."""
        self._wish("start")

    def pause(self) -> None:
        """Stop after the step that is being made."""
        self._wish("pause")

    def step(self) -> None:
        """Make one step and stop."""
        self._wish("step")

    def reset(self) -> None:
        """Begin again at step 0 with the settings in force, and wait. On a run that is at step 0: forget the earlier curves."""
        self._wish("reset")

    def set(self, name: str, value) -> None:
        """Move the setting `name` (a key of `sliders`), as its slider does."""
        if name not in self.settings():
            raise ValueError(f"no setting is called {name!r}; there are {', '.join(self.settings())}")
        self._show_setting(name, value)
        self._wish(name, value)

    def settings(self) -> dict:
        """r, alpha, mode, lr, optimizer, targets, speed, as they are in force."""
        return {**{k: v for k, v in self.run.settings.items() if k not in ("steps", "seed")}, "mode": self.mode, "speed": self.speed}

    def code(self) -> str:
        """These settings as Python that runs as it stands."""
        return self.run.code()

    def finish(self) -> LiveRun:
        """Make all steps that are left, now, and return the run. Raises what the training raises."""
        self._obey()
        self._playing = self._anew = False
        self.run.finish()
        self._rest()
        return self.run

    def retire(self) -> None:
        """Stop for good: another view takes the place of this one. Its widgets are closed."""
        self._playing = self._anew = False
        self._wishes.clear()
        task = self.task
        if task is not None and not task.done():
            self._loop.call_soon_threadsafe(task.cancel)
        if self.box is not None:
            for widget in self._all:
                widget.close()
            self.box = None

    @property
    def playing(self) -> bool:
        """Whether steps are being made."""
        return self._playing or self._anew

    def _wish(self, name: str, value=None) -> None:
        # This may be any thread. A deque takes appends from several, and the loop is the one that the cell ran on.
        self._wishes.append((name, value, self.mode))
        if name == "mode":
            self.mode = value  # for the moves of alpha that come behind it in the queue
        here = _running_loop()
        if self._loop is None and here is not None and threading.current_thread() is threading.main_thread():
            self._loop = here
        if self._loop is None or self._loop.is_closed():
            self._without_loop()
        elif here is self._loop:
            self._awake()
        else:
            self._loop.call_soon_threadsafe(self._awake)

    def _awake(self) -> None:
        if self.task is None or self.task.done():
            self.task = self._loop.create_task(self._live())

    def _without_loop(self) -> None:
        """Plain Python, no notebook: what was asked for is done before the call returns."""
        def work():
            self._obey()
            while self.playing and self._advance():
                pass

        self._guarded(work)
        self._playing = self._anew = False
        self._rest()

    # ------------------------------------------------------------ the task

    async def _live(self) -> None:
        """Take wishes, make steps, draw, until nothing is left to do. Nothing that goes wrong here is lost: it is shown."""
        try:
            drawn = began = time.perf_counter()
            next_frame, made, asked = drawn + FRAME, 0, False
            while True:
                before = self.run.number, self.speed, self.playing
                asked |= self._obey()
                if not self.playing:
                    break
                now = time.perf_counter()
                due = 0.0 if self._anew else began + made / self.speed
                if before != (self.run.number, self.speed, self.playing) or now > due + LATE:
                    began, made, due = now, 0, now
                if now >= due:
                    slice_ends = now + (SLICE if self._anew else 0)
                    while self._advance() and time.perf_counter() < slice_ends:
                        pass
                    made += 1
                    now = time.perf_counter()
                # A run made anew is shown when it is whole; only a slow one is shown on its way.
                if now >= next_frame or (asked and not self._anew and now >= drawn + AT_ONCE):
                    drawn, asked, looked = now, False, self._seen.spent
                    self.draw(moving=True)
                    now = time.perf_counter()
                    # Looking at the model keeps to a share of its own: a slow look must not make the next frames late.
                    next_frame = drawn + max(FRAME, (now - drawn - (self._seen.spent - looked)) / SHARE)
                ahead = 0.0 if self._anew else began + made / self.speed - now
                await asyncio.sleep(min(max(ahead, 0.0), NAP))
        except asyncio.CancelledError:
            self._playing = self._anew = False
            raise
        except (Exception, KeyboardInterrupt) as problem:
            self._failed(problem)
        self._rest()  # a wish that comes from another thread meanwhile has called the loop, which makes a new task after this one

    def _advance(self) -> bool:
        """One step; False when the run is at its end or has stopped."""
        if self.run.advance() is None:
            self._playing = self._anew = False
            return False
        return self.playing

    def _obey(self) -> bool:
        """Do what was wished for, in order. Returns whether there was anything."""
        anything, anew = bool(self._wishes), {}
        while self._wishes:
            name, value, mode = self._wishes.popleft()
            if name in ("r", "optimizer", "targets"):
                if value != {**self.run.settings, **anew}[name]:
                    anew[name] = value  # several in a row are one new run
                continue
            self._restart(anew)
            anew = {}
            self._one(name, value, mode)
        self._restart(anew)
        return anything

    def _one(self, name: str, value, mode: str) -> None:
        run = self.run
        if name == "start":
            self._clear()
            if run.done:
                run.extend(self._steps())
            self._playing = True
        elif name == "pause":
            self._playing = self._anew = False
        elif name == "step":
            self._clear()
            self._playing = self._anew = False
            if run.done:
                run.extend(self._steps())
            self._advance()
        elif name == "reset":
            self._clear()
            self._playing = self._anew = False
            if not run.step:
                run.earlier.clear()
                self._axes = Axes(self.problem)
            run.restart(steps=self._steps())
        elif name == "alpha" and value != run.settings["alpha"]:
            run.set_alpha(value, mode)
        elif name == "lr" and value != run.settings["lr"]:
            run.set_lr(value)
        elif name == "speed":
            self.speed = float(value)

    def _steps(self) -> int:
        return self.asked.get("steps") or self.problem.steps

    def _restart(self, changes: Mapping) -> None:
        if not changes:
            return
        goes_on, halfway = self._playing or self.run.done or self._anew, self._anew
        self._clear()
        self.run.restart(keep=not halfway, **{"steps": self._steps(), **changes})
        self._anew = self.problem.instant
        self._playing = goes_on and not self._anew

    # ------------------------------------------------------------ what went wrong

    def _clear(self) -> None:
        self.error, self._note = None, ""

    def _guarded(self, work) -> None:
        try:
            work()
        except TrainingDiverged as problem:
            self._failed(problem)
        except Exception as problem:
            self._failed(problem)
            if self.blocking:
                raise

    def _failed(self, problem: BaseException) -> None:
        self._playing = self._anew = False
        for name, value in self.settings().items():  # what was refused is not in force
            self._show_setting(name, value)
        self.error = "".join(traceback.format_exception(problem))
        if isinstance(problem, TrainingDiverged):
            self._note = f"<b>The training blew up</b> at {html.escape(str(problem))}. Move lr or alpha down, then Reset or Start."
        elif isinstance(problem, KeyboardInterrupt):
            self._note = f"Interrupted at step {self.run.step}. Start goes on from there."
        else:
            self._note = trouble(problem, self.error).replace("The picture could not be drawn.", "This did not work.")

    # ------------------------------------------------------------ what is shown

    def says(self) -> str:
        """The state of the run in sentences."""
        run, s = self.run, self.run.settings
        state = "training" if self.playing else "at the end" if run.done else "paused" if run.step else "ready"
        words = [
            f"Step {run.step} of {s['steps']}, {state}.",
            f"r = {s['r']}, alpha = {s['alpha']:g}, learning rate {s['lr']:.3g}, {s['optimizer']}"
            + (f", adapting {s['targets']}" if len(self.problem.targets) > 1 else "") + ".",
        ]  # fmt: skip
        floor = run.floor()
        if run.step:
            words.append(f"Loss {short(run.mean.last[1])}, at step 1 it was {short(run.curve.first[1])}.")
        if floor is not None:
            words.append(f"The floor of rank {s['r']} is {short(floor)}.")
        spectrum = run.spectrum()
        shown = together(spectrum)
        largest = "; ".join((f"{name}: " if len(spectrum) > 1 else "") + ", ".join(f"{float(x):.2f}" for x in S[:4]) for name, S in shown.items())
        words.append(f"The norm of ΔW is {norm(spectrum):.3g}, its largest singular values are {largest}.")
        words += [f"{name[0].upper()}{name[1:]}: {value:.1%}." for name, value in self._look().items()]
        if run.earlier:
            ends = [f"{label(e, all_runs(run))}: {short(e.mean.last[1])}".replace("\n", ", ") for e in run.earlier]
            words.append(f"Earlier runs ended at {'; '.join(ends)}.")
        return " ".join(words)

    def _look(self, moving: bool = False) -> dict[str, float]:
        """The model's figures, asked for again if it has changed; while it moves not so often that it would take much of the time."""
        run, seen, began = self.run, self._seen, time.perf_counter()
        at = run.number, run.step, run.settings["alpha"]
        if seen.at != at and (not moving or began - seen.time > max(MEASURE, seen.cost / SHARE)):
            seen.numbers = dict(self.problem.evaluate(run.model) or {})
            seen.samples = samples_html(self.problem.samples(run.model))
            seen.at, seen.time = at, time.perf_counter()
            seen.cost = seen.time - began
            seen.spent += seen.cost
        return seen.numbers

    def page(self, moving: bool = False) -> str:
        """Chart, spectrum and samples as HTML. Hidden from screen readers while it moves; else `text` says what is seen."""
        run, spectrum = self.run, self.run.spectrum()
        self._axes.fit(run, spectrum)
        self._look(moving)
        hidden = ' aria-hidden="true"' if moving else ""
        state = "running" if moving else "done" if run.done else "paused"
        chart = loss_chart(run, self._axes, state, "" if moving else self.text, None if moving else self._loss_now())
        return (
            f'<div{hidden}>{chart}<div style="display: flex; flex-wrap: wrap; gap: 4px 24px; align-items: flex-start">'
            f'<div style="flex: 1 1 225px; max-width: 330px">{spectrum_chart(run, spectrum, self._axes)}</div>'
            f'<div style="flex: 1 1 215px; max-width: 360px">{self._seen.samples}</div></div></div>'
        )

    def _loss_now(self) -> float | None:
        """The loss with the alpha in force, where no step has shown it yet because it was moved since."""
        run = self.run
        if run.moves and run.moves[-1][:2] == (run.step, "alpha"):
            value = run.loss_now()
            return value if math.isfinite(value) else None
        return None

    def draw(self, moving: bool = False) -> None:
        """Draw the state of the run, if anybody looks. An error in drawing is shown; the training goes on."""
        if self.box is None:
            return
        try:
            self.picture.value = self._page = self.page(moving)
            figures = figures_html(self.run, self._seen.numbers, None if moving else self._loss_now())
            self._put(self.figures, f'<div{" aria-hidden=true" if moving else ""}>{figures}</div>')
            self.frames += 1
        except Exception as problem:
            self.error = traceback.format_exc()
            self._note = trouble(problem, self.error)
        self._put(self.trouble, f'<div role="alert" style="line-height: 1.45">{self._note}</div>' if self._note else "")

    def _rest(self) -> None:
        """What is done when nothing moves any more: the last picture, the words for screen readers, the code, the twin."""
        try:
            self.text = self.says()
            self.draw()
            if self.box is not None:
                self._put(self.words, f'<div role="status" style="{UNSEEN}">{html.escape(self.text)}</div>')
                self._put(self.listing, code_html(self.code()) if self.listed.value else "")
            if self._twin is not None:
                self._twin.update(self._bundle(), raw=True)
        except Exception as problem:
            self._failed(problem)
            self.draw()

    @staticmethod
    def _put(widget, value: str) -> None:
        if widget.value != value:
            widget.value = value

    def widget(self):
        """The ipywidgets box. Made once; all displays of it move together."""
        if self.box is None:
            self._make()
            self._rest()
        return self.box

    def _make(self) -> None:
        import ipywidgets as widgets

        s = self.run.settings
        # The first optimizer of a process imports a second's worth of torch: now, and not while somebody waits for the first step.
        OPTIMIZERS[s["optimizer"]]([torch.nn.Parameter(torch.zeros(1))], lr=0.0, weight_decay=0.0)

        def wide(basis="270px"):  # beside the chart one control a line; above it, on a narrow page, two
            return widgets.Layout(width="auto", min_width="0", flex=f"1 1 {basis}")

        look = {"style": {"description_width": "92px"}, "layout": wide()}
        speeds = SPEEDS if self.speed in SPEEDS.values() else {f"{self.speed:g} steps a second": self.speed, **SPEEDS}
        anew = "begins again from the same seed and keeps the old curve"

        self.sliders = {
            "r": widgets.IntSlider(
                s["r"], min=1, max=max(self.problem.largest_r, s["r"]), description="rank r", tooltip=f"columns of B, rows of A; {anew}", **look
            ),
            "alpha": widgets.SelectionSlider(
                options=_stops(STOPS_ALPHA, s["alpha"]), value=s["alpha"], description="alpha",
                tooltip="ΔW = alpha / r · B A; acts on the next step", **look,
            ),
            "mode": widgets.ToggleButtons(
                options=MODES, value=self.mode, style={"button_width": "88px"},
                tooltips=["ΔW gets louder or softer at once", "B is rescaled so that ΔW stays; only the steps to come change"],
            ),
            "lr": widgets.SelectionSlider(
                options=_stops(STOPS_LR, s["lr"]), value=s["lr"], description="learning rate", tooltip="acts on the next step", **look
            ),
            "optimizer": widgets.Dropdown(
                options=[("AdamW" if name == "adamw" else name.upper(), name) for name in OPTIMIZERS], value=s["optimizer"],
                description="optimizer", tooltip=anew, **look,
            ),
            "targets": widgets.Dropdown(options=list(self.problem.targets), value=s["targets"], description="adapt", tooltip=anew, **look),
            "speed": widgets.Dropdown(options=list(speeds.items()), value=self.speed, description="speed", **look),
        }  # fmt: skip
        for name, slider in self.sliders.items():
            slider.observe(lambda change, name=name: self._slid(name, change["new"]), names="value")
        says = {
            "start": ("Start", "play", "train; at the end: go on"), "pause": ("Pause", "pause", "stop after this step"),
            "step": ("Step", "step-forward", "make one step"),
            "reset": ("Reset", "undo", "back to step 0, the old curve stays; pressed again it forgets the old curves"),
        }  # fmt: skip
        for name, (text, icon, tip) in says.items():
            button = widgets.Button(description=text, icon=icon, tooltip=tip, layout=widgets.Layout(width="auto", flex="1 1 66px", padding="0"))
            button.on_click(lambda _, name=name: self._wish(name))
            self.buttons[name] = button
        self.buttons["start"].button_style = "primary"
        # ToggleButtons would put its own description on a line above.
        label = widgets.Label("alpha sets", layout=widgets.Layout(width="92px", justify_content="flex-end", margin="2px 6px 2px 2px"))
        modes = widgets.HBox([label, self.sliders["mode"]], layout=wide())
        shown = [modes if name == "mode" else slider for name, slider in self.sliders.items() if name != "targets" or len(self.problem.targets) > 1]
        self.listed = widgets.ToggleButton(False, description="these settings as code", icon="code", tooltip="Python that runs as it stands", layout=wide())
        self.listed.observe(self._list, names="value")
        self.picture, self.listing = widgets.HTML(), widgets.HTML()
        self.figures, self.trouble, self.words = (widgets.HTML(layout=wide(basis)) for basis in ("270px", "100%", "100%"))
        buttons = widgets.Box(list(self.buttons.values()), layout=wide("100%"))
        controls = widgets.Box(
            [buttons, *shown, self.listed, self.figures, self.trouble, self.words],
            layout=widgets.Layout(flex="1 1 290px", min_width="270px", flex_flow="row wrap", align_content="flex-start", align_items="flex-start"),
        )
        stage = widgets.VBox([self.picture], layout=widgets.Layout(flex="3 1 430px", min_width="0", max_width="860px"))
        both = widgets.Box([controls, stage], layout=widgets.Layout(display="flex", flex_flow="row wrap", grid_gap="4px 24px"))
        self.box = live_box(both, self.listing)
        self._all = [*self.box.children, self.box, controls, stage, buttons, label, modes, *self.sliders.values(), *self.buttons.values(),
                     self.listed, self.picture, self.figures, self.words, self.trouble]  # fmt: skip

    def _show_setting(self, name: str, value) -> None:
        """Let the slider stand at `value` without taking that for a wish. A value between its stops gets a stop of its own."""
        slider = self.sliders.get(name)
        if slider is None:
            return
        self._showing = True
        try:
            if name == "r":
                slider.max = max(slider.max, value)
            elif name in ("alpha", "lr") and value not in [stop for _, stop in slider.options]:
                slider.options = _stops([stop for _, stop in slider.options], value)
            slider.value = value
        finally:
            self._showing = False

    def _slid(self, name: str, value) -> None:
        if not self._showing:
            self._wish(name, value)

    def _list(self, change) -> None:
        self.listing.value = code_html(self.code()) if change["new"] else ""

    def _ipython_display_(self):
        from IPython.display import display

        self._loop = self._loop or _running_loop()
        if self.blocking:
            display(self._bundle(), raw=True)
            return
        display(self.widget())
        self._twin = display(self._bundle(), raw=True, display_id=True)

    def _bundle(self) -> dict:
        still = self._still(self._page) if self.box is not None else self.still()
        return {"text/html": still + ("" if self.blocking else NAME_SLIDERS), "text/plain": f"[live training: {self.problem.name}] {self.text}"}

    def still(self) -> str:
        """The twin that stands still: chart and table as HTML, folded where the view itself is there."""
        self.text = self.says()
        return self._still(self.page())

    def _still(self, page: str) -> str:
        body = f"{page}{figures_html(self.run, self._seen.numbers, self._loss_now())}{table_html(self.run)}"
        if self.blocking:
            return f'<div style="max-width: 720px">{self._note}{body}{code_html(self.code())}</div>'
        body = f'<div style="max-width: 720px">{body}</div>'
        return f"<details><summary>The same as a picture that stands still, with a table</summary>{body}</details>"

    def __repr__(self):
        return f"[live training: {self.problem.name}] {self.says()}"


class Seen:
    """What the model was last asked for: its figures and samples, at which run, step and alpha, when, how many seconds it took, and all took."""

    def __init__(self):
        self.numbers, self.samples, self.at, self.time, self.cost, self.spent = {}, "", None, -math.inf, 0.0, 0.0


def _stops(values, value: float) -> list[tuple[str, float]]:
    """The stops of a slider, among them `value`, wherever it lies."""
    return [(f"{stop:.6g}", stop) for stop in sorted({*values, value})]


def _running_loop():
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
