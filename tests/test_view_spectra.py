"""Heat maps of shared directions and rows of similarities: they show the numbers given, chance beside them, and refuse what they can't draw."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from lora_lab.view import plot_similarities, plot_subspaces


def images(figure):
    return [np.asarray(image.get_array()) for axes in figure.axes for image in axes.images]


def words(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_visible()]


def test_subspaces_are_drawn_as_given_and_chance_is_the_last_map():
    rng = np.random.default_rng(0)
    first, second = rng.uniform(size=(2, 3, 12))
    figure = plot_subspaces({"a": first, "b": second}, d=48)
    shown = images(figure)
    assert np.array_equal(shown[0], first) and np.array_equal(shown[1], second)
    # the mean of squared cosines, counted pair by pair: i j pairs of 1/48 each over min(i, j)
    expected = [[i * j / 48 / min(i, j) for j in range(1, 13)] for i in range(1, 4)]
    assert np.allclose(shown[2], expected, rtol=1e-12)  # one division against two
    assert {"a", "b", "by chance: max(i, j) / 48"} <= set(words(figure))
    assert len(images(plot_subspaces({"a": first}))) == 1
    assert all(image.norm.vmin == 0 and image.norm.vmax == 1 for axes in figure.axes for image in axes.images)


def test_subspaces_refuse_tables_that_cannot_stand_side_by_side():
    with pytest.raises(ValueError, match="one shape"):
        plot_subspaces({"a": np.zeros((2, 3)), "b": np.zeros((3, 2))})
    with pytest.raises(ValueError, match="one shape"):
        plot_subspaces({})
    with pytest.raises(ValueError, match="do not fit into d = 4"):
        plot_subspaces({"a": np.zeros((2, 5))}, d=4)


def test_similarities_are_counted_below_the_threshold():
    groups = {"full": [0.9, 0.95, 0.5], "r = 1": [0.1, 0.49, 0.8, 0.2]}
    figure = plot_similarities(groups, 0.5)
    assert {"0 of 3", "3 of 4", "full", "r = 1"} <= set(words(figure))
    dots = np.concatenate([line.get_xdata() for line in figure.axes[0].lines if line.get_linestyle() == "None"])
    assert sorted(dots) == sorted(sum(groups.values(), []))
    left = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert sorted(np.concatenate([line.get_xdata() for line in left])) == [0.1, 0.2, 0.49]


def test_similarities_refuse_nothing_and_a_threshold_that_is_none():
    with pytest.raises(ValueError, match="found none in b"):
        plot_similarities({"a": [0.1], "b": []}, 0.5)
    with pytest.raises(ValueError, match="found 1.5"):
        plot_similarities({"a": [0.1]}, 1.5)
