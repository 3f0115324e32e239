"""The live views on one page, for a lecture: `python3 start.py playground` shows them through Voilà, without any code.

The page is lora_lab/assets/playground.ipynb, whose one cell calls `playground()`. In a notebook the same call works as well.
"""

import html
import importlib
import threading
import traceback

from lora_lab.live import LiveRun, Problem, digits_problem, toy_problem
from lora_lab.recorder import FlightRecorder
from lora_lab.view.explorer import rank_explorer
from lora_lab.view.flight import FlightExplorer, flight_explorer
from lora_lab.view.live_training import live_training
from lora_lab.view.style import INK, MUTED, THEMES
from lora_lab.view.widgets import NAME_SLIDERS, headless, trouble, volume_knob

AUTO = THEMES["auto"]
# The page is read from the last row of a lecture hall: it fills the screen, on a large one enlarged as a whole.
LOOK = """<style>
.lora-playground { max-width: 1280px; margin: 0 auto; font-size: 15px; }
@media (min-width: 1600px) { .lora-playground { zoom: 1.3; } }
@media (min-width: 2400px) { .lora-playground { zoom: 1.8; } }
.lora-playground h1 { font-size: 1.5em; font-weight: 650; margin: 0; line-height: 1.3; }
.lora-playground .lora-about { margin: 0; line-height: 1.4; }
.lora-playground .widget-html-content { font-size: 15px; line-height: 1.45; }
.lora-playground .widget-tab > .lm-TabBar .lm-TabBar-tab { font-size: 15px; line-height: 30px; height: 33px; min-width: 130px; }
.lora-playground .widget-tab > .lm-TabBar .lm-TabBar-tab.lm-mod-current { transform: none; min-height: 33px; }
.lora-playground .widget-tab > .widget-tab-contents, .lora-playground .jupyter-widget-TabPanel-contents { padding: 8px 14px !important; }
</style>"""
FLIGHT_STEPS = 300


def playground() -> None:
    """Show all live views under tabs. Each tab is put together when it is first opened, so that the page is there at once.

    A view that cannot be made says so in its own tab; the others work.
    """
    from IPython.display import display

    if headless():
        for name, _, make in TABS:
            print(name)
            display(make())
        return
    display(_page())
    display({"text/html": LOOK + NAME_SLIDERS, "text/plain": ""}, raw=True)
    # The first step of any optimizer imports torch._dynamo, which takes seconds. Better while the page is being read than when
    # somebody presses Start; in a thread, because the kernel has the page to serve.
    threading.Thread(target=importlib.import_module, args=("torch._dynamo",), daemon=True).start()


def _page():
    import ipywidgets as widgets

    rooms = [widgets.VBox([widgets.HTML(f'<p class="lora-about" style="color: {AUTO[MUTED]}">{html.escape(text)}</p>')]) for _, text, _ in TABS]
    tab = widgets.Tab(rooms, titles=[name for name, _, _ in TABS])
    opened = set()

    def open_room(number):
        if number is None or number in opened:
            return
        opened.add(number)
        try:
            view = TABS[number][2]().widget()
        except Exception as problem:  # a callback's exception would vanish into a log that nobody reads
            view = widgets.HTML(trouble(problem, traceback.format_exc()))
            opened.discard(number)  # it may go well the next time
        rooms[number].children = (rooms[number].children[0], view)

    tab.observe(lambda change: open_room(change["new"]), names="selected_index")
    open_room(0)
    tab.selected_index = 0
    title = widgets.HTML(f'<h1 style="color: {AUTO[INK]}">LoRA, live</h1>')
    box = widgets.VBox([title, tab])
    box.add_class("lora-playground")
    return box


def recorded(problem: Problem, **settings) -> FlightExplorer:
    """Train `problem` now, under a flight recorder, and return the explorer of that flight. settings: those of `LiveRun`."""
    run = LiveRun(problem, **settings)
    recorder = FlightRecorder(every=4).watch(run.model)
    while step := run.advance():
        recorder.record(step.step, loss=step.loss)
    return flight_explorer(recorder, problem)


def _photograph():
    from sklearn.datasets import load_sample_images

    return rank_explorer(load_sample_images().images[0].mean(2) / 255, name="the pagoda")


TABS = (
    (
        "Train, live",
        "A student of a known teacher. Each rank has a floor, drawn before any training; rank, alpha and learning rate act while it trains.",
        lambda: live_training("toy", key="playground"),
    ),
    (
        "Digits, live",
        "A small network that learned the digits 0 to 4 is adapted to 5 to 9: what it gains, and what it forgets.",
        lambda: live_training("digits", key="playground"),
    ),
    (
        "Flight: teacher",
        "A recorded run, played back at any moment, rank and alpha. Nothing is trained while you scrub.",
        lambda: recorded(toy_problem(), r=8, steps=FLIGHT_STEPS),
    ),
    (
        "Flight: digits",
        "The digit classifier's run, recorded: at which rank does it still read, and at which alpha does it forget 0 to 4?",
        lambda: recorded(digits_problem(), r=8, alpha=16, steps=FLIGHT_STEPS),
    ),
    ("Rank", "A photograph as a sum of rank-1 terms.", _photograph),
    ("Volume", "One network that draws digits, and the volume of its adapters: W = W₀ + volume · ΔW.", volume_knob),
)
