"""Figures show the numbers they are given, name them without covering one another, and refuse what they cannot draw."""

import itertools
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from lora_lab.view import plot_confusion, plot_images, plot_losses, plot_matrices, plot_spread, volume_strip


def texts(figure):
    from matplotlib.text import Text

    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def overlaps(figure, of):
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure) if of(text.get_text())]
    assert len(boxes) > 1
    return [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.padded(-2).overlaps(y.padded(-2))]


def test_losses_are_drawn_as_given_on_their_steps():
    curve = ([0, 10, 40], [3.0, 2.0, 1.5])
    figure = plot_losses({"a": curve, "b": [1.0, 0.5]}, floors={"a": 1.25})
    drawn = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[0, 3.0], [10, 2.0], [40, 1.5]] in drawn and [[0, 1.0], [1, 0.5]] in drawn
    assert any(set(line.get_ydata()) == {1.25} for line in figure.axes[0].lines)
    assert figure.axes[0].get_legend() is None


def test_names_of_curves_that_end_together_do_not_cover_each_other():
    curves = {f"r={r}": [2, 1 + r / 1000] for r in (1, 2, 4, 8)}
    floors = {name: 0.99 for name in curves}
    assert not overlaps(plot_losses(curves, floors), lambda text: text.startswith("r="))
    assert not overlaps(plot_losses(curves, floors), lambda text: text.startswith("floor"))


def test_losses_on_a_logarithmic_axis():
    figure = plot_losses({"a": [1.0, 0.01]}, log=True)
    assert figure.axes[0].get_yscale() == "log" and figure.axes[0].get_ylim()[0] > 0


def test_spread_shows_every_seed_and_the_mean():
    groups = {"frozen base": [0.5, 0.5, 0.5], "LoRA": [0.91, 0.92, 0.96]}
    figure = plot_spread(groups, percent=True, xlabel="accuracy")
    drawn = [sorted(line.get_xdata()) for line in figure.axes[0].lines]
    for values in groups.values():
        assert sorted(values) in drawn
    said = [text.get_text() for text in texts(figure)]
    assert "93.0%" in said and "50.0%" in said  # the means, by hand: 2.79 / 3 and 0.5
    assert any("3 seeds" in text for text in said)


def test_images_are_drawn_as_given_and_mistakes_are_named():
    images = np.random.default_rng(0).random((3, 8, 8))
    figure = plot_images(images, [5, 1, 2], [5, 7, 2])
    for axes, image in zip(figure.axes, images, strict=True):
        assert np.array_equal(axes.images[0].get_array(), image)
    assert [axes.get_xlabel() for axes in figure.axes] == ["5", "1, said 7", "2"]
    assert [axes.spines["top"].get_visible() for axes in figure.axes] == [False, True, False]


def test_matrices_share_one_scale_around_zero_and_one_size_of_cell():
    rng = np.random.default_rng(0)
    W0, A, B = rng.normal(size=(70, 11)), rng.normal(size=(3, 11)), rng.normal(size=(70, 3))
    figure = plot_matrices([("W0", W0), "+ 5/3 ·", ("B", B), "·", ("A", A)], title="t")
    width, height = figure.get_size_inches()
    maps = [axes for axes in figure.axes if axes.images]
    for axes, matrix in zip(maps, (W0, B, A), strict=True):
        assert np.array_equal(axes.images[0].get_array(), matrix)
        low, high = axes.images[0].get_clim()
        assert low == -high == -max(abs(W0).max(), abs(A).max(), abs(B).max())
    cells = np.array([[axes.get_position().width * width / axes.images[0].get_array().shape[1],
                       axes.get_position().height * height / axes.images[0].get_array().shape[0]] for axes in maps])  # fmt: skip
    assert np.allclose(cells, cells[0, 0])  # up to rounding in the layout
    said = [text.get_text() for text in texts(figure)]
    assert {"70 × 11", "70 × 3", "3 × 11"} <= set(said)


@pytest.mark.parametrize("shape", [(64, 2), (2, 64), (1, 1), (200, 200)])
def test_names_and_shapes_of_matrices_stay_on_the_figure(shape):
    rows, columns = shape
    parts = [("W₀", np.ones(shape)), "+", ("B", np.ones((rows, 1))), "·", ("A", np.ones((1, columns))), "=", ("W", np.ones(shape))]
    figure = plot_matrices(parts, title="A title")
    figure.draw_without_rendering()
    for text in texts(figure):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()
    assert not overlaps(figure, lambda text: "×" in text)


def test_confusion_writes_every_count_but_zero():
    figure = plot_confusion([[5, 0], [2, 7]], ["cat", "dog"])
    said = [text.get_text() for text in texts(figure) if text.get_text().isdigit()]
    assert sorted(said) == ["2", "5", "7"]
    assert len(figure.axes[0].patches) == 1


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plot_losses({}), "at least one curve"),
        (lambda: plot_spread({"LoRA": []}), "none for LoRA"),
        (lambda: plot_images([]), "at least one image"),
        (lambda: plot_images(np.zeros((2, 8, 8)), [1]), "2 images, but 1 labels"),
        (lambda: plot_matrices([("b", np.zeros(3))]), r"\(3,\)"),
        (lambda: plot_confusion(np.zeros((2, 3))), r"\(2, 3\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_was_found(draw, words):
    with pytest.raises(ValueError, match=words):
        draw()


def test_strip_has_one_line_per_volume_and_marks_base_and_adapter():
    figure = volume_strip("italic", volumes=(-1, 0, 1), digits=(0, 7))
    assert len(figure.axes[0].patches) == 6
    said = [text.get_text() for text in texts(figure)]
    assert {"−1", "0\u2002base", "1\u2002as trained"} <= set(said)
    assert re.search("from volume −1 to 1", " ".join(said))
