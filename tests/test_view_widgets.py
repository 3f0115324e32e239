"""The volume knob: the pure function over the whole grid of the sliders, callbacks that do not hide errors, and its still twin."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("ipywidgets")
pytest.importorskip("contourpy")

from lora_lab import digit_painter
from lora_lab.view import volume_knob, volume_strip
from lora_lab.view.widgets import HIGH, LOW, STEP, digits_svg, outlines, volume_view

GRID = [LOW + STEP * i for i in range(round((HIGH - LOW) / STEP) + 1)]


@pytest.fixture(scope="module")
def model():
    return digit_painter.load_digit_painter("italic", "bold")


@pytest.fixture(autouse=True)
def live(monkeypatch):
    monkeypatch.delenv("LORA_LAB_HEADLESS", raising=False)


def area(ring):
    """Signed area by the shoelace formula."""
    x, y = ring.T
    return (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2


@pytest.mark.parametrize("name", ["italic", "bold"])
def test_every_stop_of_each_slider_draws_ten_digits(model, name):
    other = {"italic": "bold", "bold": "italic"}[name]
    for volume in GRID:
        svg, text = volume_view(model, {name: volume, other: 0.0})
        paths = re.findall(r'<path d="([^"]+)"/>', svg)
        assert len(paths) == 10 and all(path.startswith("M") and path.endswith("Z") for path in paths), volume
        numbers = np.array([float(number) for number in re.findall(r"-?\d+", " ".join(paths))])
        assert np.isfinite(numbers).all() and len(text) > 20


@pytest.mark.parametrize("volumes", list(itertools.product((LOW, 0.0, HIGH), repeat=2)))
def test_the_corners_of_the_sliders_stay_on_the_page(model, volumes):
    svg, _ = volume_view(model, dict(zip(("italic", "bold"), volumes, strict=True)))
    left, top, width, height = map(float, re.search(r'viewBox="([^"]+)"', svg)[1].split())
    for path in re.findall(r'<path d="([^"]+)"/>', svg):
        points = np.array([float(number) for number in re.findall(r"-?\d+", path)]).reshape(-1, 2)
        over = 0.15 * height  # a quarter of a digit's width: `overflow: visible` and the cell's padding show it
        assert points[:, 0].min() > left - over and points[:, 0].max() < left + width + over
        assert points[:, 1].min() >= top and points[:, 1].max() <= top + height


def test_the_words_tell_what_is_seen(model):
    assert "stand as in the base model, with 1.00 times the ink" in volume_view(model, {"italic": 0.0, "bold": 0.0})[1]
    # arctan of the slope it was trained on, 0.3, and of twice that: 16.7° and 31.0°
    assert "lean 17° to the right" in volume_view(model, {"italic": 1.0, "bold": 0.0})[1]
    assert "lean 17° to the left" in volume_view(model, {"italic": -1.0, "bold": 0.0})[1]
    assert "lean 31° to the right" in volume_view(model, {"italic": 2.0, "bold": 0.0})[1]


def test_outlines_of_a_ring_known_by_hand():
    x, y = digit_painter.page(81, 105)
    radius = np.hypot(x[None, :], y[:, None])
    rings = outlines(np.minimum(0.8 - radius, radius - 0.3))
    outer, inner = sorted((abs(area(ring)) for ring in rings), reverse=True)
    assert len(rings) == 2
    # a polygon on cells of 0.025 lies inside its circle by about a thousandth of its area
    assert abs(outer - np.pi * 0.64) < 0.01 and abs(inner - np.pi * 0.09) < 0.01
    assert digits_svg(np.full((1, 5, 5), -1.0), "x").count('d=""') == 1  # no ink, no path, no error


def test_up_is_up():
    _, y = digit_painter.page(21, 27)
    dot = np.minimum(0.2 - np.abs(y - 0.6), 0.2)[:, None] - np.zeros(27) - 0.05 * np.abs(np.linspace(-9, 9, 27))  # at y = 0.6
    points = np.array(re.findall(r"-?\d+", re.search(r'd="([^"]+)"', digits_svg(dot[None], "x"))[1]), dtype=int).reshape(-1, 2)
    assert (points[:, 1] < 0).all()  # SVG counts y downwards
    assert volume_strip_tops() == sorted(volume_strip_tops(), reverse=True)


def volume_strip_tops():
    """The upper edge of the digit 7 in each line of the strip, which is read from the top: volume -1 first."""
    figure = volume_strip("italic", volumes=(-1, 0, 1), digits=[7])
    return [patch.get_path().vertices[:, 1].max() for patch in figure.axes[0].patches]


def test_callbacks_set_the_volume_and_change_the_picture():
    knob = volume_knob()
    knob.widget()
    assert knob.volumes == {"italic": 1.0, "bold": 0.0} and knob.error is None
    for name, volume in (("italic", -1.0), ("bold", 2.0), ("italic", 0.0)):
        before, words = knob.picture.value, knob.words.value
        knob.sliders[name].value = volume
        assert knob.volumes[name] == volume and knob.error is None
        assert knob.picture.value != before and knob.words.value != words
        assert knob.picture.value == volume_view(knob.model, knob.volumes)[0]


def test_an_error_in_a_callback_shows_and_is_kept_and_goes_again(monkeypatch):
    knob = volume_knob("italic")
    knob.widget()

    def broken(*_, **__):
        raise RuntimeError("lora_A is <gone>")

    with monkeypatch.context() as patch:
        patch.setattr(digit_painter, "paint", broken)
        knob.sliders["italic"].value = 0.5
        assert "lora_A is <gone>" in knob.error
        assert 'role="alert"' in knob.trouble.value and "RuntimeError: lora_A is &lt;gone&gt;" in knob.trouble.value
    knob.sliders["italic"].value = 0.6
    assert knob.error is None and knob.trouble.value == ""


def test_sliders_can_be_driven_by_keys_and_say_what_they_are():
    knob = volume_knob()
    knob.widget()
    for name, slider in knob.sliders.items():
        assert (slider.min, slider.max, slider.step, slider.description) == (LOW, HIGH, STEP, name)
        assert "volume" in slider.tooltip and not slider.disabled and slider.continuous_update


def display_of(knob, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw=False: shown.append(data))
    knob._ipython_display_()
    return shown


def test_the_still_twin_is_always_there(monkeypatch):
    box, still = display_of(volume_knob(), monkeypatch)
    assert len(box.children) == 6 and "Run this cell again" in box.children[-1].value and "lora-live" in box._dom_classes
    assert still["text/html"].startswith("<details>") and still["text/html"].count("<svg") == 2
    assert "at −1 the digits lean 17° to the left" in still["text/plain"]


def test_headless_shows_the_twin_alone(monkeypatch):
    monkeypatch.setenv("LORA_LAB_HEADLESS", "1")
    (still,) = display_of(volume_knob("italic"), monkeypatch)
    assert "<details" not in still["text/html"] and still["text/html"].count('role="img"') == 1


def test_view_is_imported_without_matplotlib_and_ipywidgets():
    heavy = "{'matplotlib', 'ipywidgets', 'IPython', 'contourpy', 'sklearn', 'scipy'} & set(sys.modules)"
    code = f"import sys, lora_lab.view; print(sorted({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
