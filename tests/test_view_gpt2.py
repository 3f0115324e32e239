"""Figures of GPT-2's inside show the numbers they are given, in the right place, and refuse what does not fit."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from test_view_figures import overlaps, texts

from lora_lab.view import plot_attention, plot_coverage, plot_fused, plot_heads

WORDS = ["the", " old", " man", "<|endoftext|>", "$5"]


def drawn(figure):
    """The arrays of the maps, the colour bar's left out."""
    return [axes.images[0].get_array() for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]


def test_attention_maps_are_drawn_as_given_on_one_scale():
    before, after = np.tri(5) / 5, np.eye(5)
    figure = plot_attention({"before": before, "after": after}, WORDS, WORDS, title="A head")
    assert [np.array_equal(a, b) for a, b in zip(drawn(figure), (before, after), strict=True)] == [True, True]
    assert {image.get_clim() for axes in figure.axes for image in axes.images if image.get_array().shape == (5, 5)} == {(0, 1)}
    figure.draw_without_rendering()  # "$5" is no formula
    said = [text.get_text() for text in texts(figure)]
    assert "⟨end⟩" in said and r"\$5" in said and "old" in said


def test_wide_attention_maps_stand_one_below_the_other():
    wide = {"before": np.zeros((3, 40)), "after": np.ones((3, 40))}
    figure = plot_attention(wide, WORDS[:3], ["x"] * 40)
    figure.draw_without_rendering()
    first, second = (axes.get_window_extent() for axes in figure.axes[:2])
    assert first.y0 > second.y1 and figure.get_figwidth() < 10


def test_attention_needs_as_many_tokens_as_rows_and_columns():
    with pytest.raises(ValueError, match=r"5 rows and 4 columns.*\(5, 5\)"):
        plot_attention({"a": np.eye(5)}, WORDS, WORDS[:4])


def test_heads_show_their_numbers_and_the_frame_is_around_the_one_named():
    values = np.array([[0.0, 0.25, 1.0], [0.5, 0.06, 0.7]])
    figure = plot_heads({"copying": values}, frame=(1, 2))
    assert np.array_equal(drawn(figure)[0], values)
    numbers = {(text.get_position()): text.get_text() for text in figure.axes[0].texts}
    assert numbers[2, 1] == ".70" and numbers[0, 0] == ".00" and numbers[2, 0] == "1.00"
    frame = figure.axes[0].patches[-1]
    assert (frame.get_x(), frame.get_y()) == (1.5, 0.5)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        plot_heads({"a": values, "b": values.T})


def test_a_fused_update_is_dark_where_nothing_changes():
    d = 128
    update = np.zeros((3 * d, d))
    update[:d] = -2.0  # q; k stays; v below
    update[2 * d :, :64] = 1.0
    figure = plot_fused({"q and v": update})
    points = drawn(figure)[0]
    assert points.shape == (64, 192)  # as stored, (in, out), 2 x 2 entries to a point
    assert (points[:, :64] == 2).all() and (points[:, 64:128] == 0).all()
    assert (points[:32, 128:] == 1).all() and (points[32:, 128:] == 0).all()
    darkest, brightest = (figure.axes[0].images[0].cmap(value)[:3] for value in (0.0, 1.0))
    assert sum(darkest) < 0.4 and sum(brightest) > 2.5
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["q", "k", "v"]
    with pytest.raises(ValueError, match=r"\(128, 384\)"):
        plot_fused({"turned": update.T})


def test_heads_of_a_fused_matrix_are_numbered_in_each_part():
    figure = plot_fused({"W": np.random.default_rng(0).normal(size=(48, 16))}, heads=4)
    minor = [text.get_text() for text in figure.axes[0].get_xticklabels(minor=True)]
    assert minor == ["0", "1", "2", "3"] * 3
    assert not overlaps(figure, lambda text: True)


def test_coverage_fills_the_tiles_that_are_adapted():
    names = ["transformer.h.0.attn.c_attn:q,v", "transformer.h.1.mlp.c_proj", "transformer.h.1.attn.c_attn"]
    figure = plot_coverage({"some": names, "none": []}, blocks=2)
    filled = lambda axes: {  # noqa: E731
        (round(tile.get_x() + 0.36), round(tile.get_y() + 0.36)) for tile in axes.patches if tile.get_facecolor()[3] > 0
    }
    # from left to right: q, k, v, attn.c_proj, mlp.c_fc, mlp.c_proj
    assert filled(figure.axes[0]) == {(0, 0), (2, 0), (5, 1), (0, 1), (1, 1), (2, 1)} and filled(figure.axes[1]) == set()
    assert figure.axes[0].get_title(loc="left") == "some\n6 matrices"
    for wrong in ("transformer.wte", "transformer.h.7.attn.c_proj"):
        with pytest.raises(ValueError, match=wrong):
            plot_coverage({"x": [wrong]}, blocks=2)
