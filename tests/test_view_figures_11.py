"""Lab 11's figure shows every number, its line, the side on which the claim would hold, and refuses what it cannot draw."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from lora_lab.view import plot_trial

OURS, OTHER = {"merged": [0.5, 0.75, 0.6], "apart": [0.9]}, {"merged": [1.5, 1.25]}


def words(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def drawn(axes):
    """The numbers of each row, by the row's height."""
    rows = {}
    for line in axes.lines:
        y = np.unique(line.get_ydata())
        if len(y) == 1 and line.get_marker() not in ("None", ""):
            rows[float(y[0])] = sorted(line.get_xdata())
    return rows


def test_every_number_stands_in_its_row_and_the_mean_is_written():
    (axes,) = plot_trial(OURS, OTHER, line=1.0, holds="above", xlabel="share", title="Claim").axes
    assert drawn(axes) == {0.0: [0.5, 0.6, 0.75], 1.0: [0.9], 2.0: [1.25, 1.5]}
    shown = words(axes.figure)
    assert {"merged", "apart", "other world", "share", "Claim", "the claim would hold", "0.617", "0.9", "1.38"} <= set(shown)


@pytest.mark.parametrize("holds", ["above", "below"])
def test_the_shaded_side_is_the_claims(holds):
    (axes,) = plot_trial(OURS, OTHER, line=1.0, holds=holds).axes
    low, high = axes.get_xlim()
    (band,) = [patch for patch in axes.patches if patch.get_alpha()]
    x = band.get_window_extent().transformed(axes.transData.inverted())
    left, right = (1.0, high) if holds == "above" else (low, 1.0)
    assert (x.x0, x.x1) == pytest.approx((left, right))


@pytest.mark.parametrize("numbers", [[1e-16, 0.0], [5.0, 1e5], [-3.0, 4.0], [0.0]])
def test_whatever_the_range_all_numbers_are_inside(numbers):
    (axes,) = plot_trial({"a": numbers}, {"b": [n + 1 for n in numbers]}, line=0.01, holds="below").axes
    low, high = axes.get_xlim()
    assert low < high and all(low <= n <= high and low <= n + 1 <= high for n in numbers) and low <= 0.01 <= high


def test_shapes_tell_the_worlds_apart_without_colour():
    (axes,) = plot_trial(OURS, OTHER, line=1.0, holds="above").axes
    markers = [line.get_marker() for line in axes.lines if line.get_marker() not in ("None", "")]
    assert markers == ["o", "o", "D"]


@pytest.mark.parametrize(
    ("call", "says"),
    [((OURS, OTHER, 1.0, "over"), '"above" or "below"'), (({}, OTHER, 1.0, "above"), "at least one number"), (({"a": []}, None, 1.0, "above"), "at least one")],
)
def test_what_cannot_be_drawn_is_refused(call, says):
    ours, other, line, holds = call
    with pytest.raises(ValueError, match=says):
        plot_trial(ours, other, line=line, holds=holds)
