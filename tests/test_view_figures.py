"""Figures show the numbers they are given, name them without covering one another, and refuse what they cannot draw."""

import itertools
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from lora_lab.view import (
    plot_confusion,
    plot_images,
    plot_losses,
    plot_maps,
    plot_matrices,
    plot_panels,
    plot_report,
    plot_spread,
    plot_staircase,
    volume_strip,
)


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


def test_a_curve_that_another_one_covers_is_still_seen():
    wide = lambda curves: [line.get_color() for line in plot_losses(curves).axes[0].lines if line.get_linewidth() > 5]  # noqa: E731
    assert len(wide({"a": [3.0, 2.0, 1.0], "b": [3.0, 2.0, 1.0], "c": [3.0, 2.0, 0.9]})) == 1
    assert wide({"a": [3.0, 2.0], "b": [3.0, 2.0 + 1e-12]}) == []


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


STAIRS = {f"r = {r}": 4.0**-r for r in range(1, 9)}


def drawn_lines(axes):
    return [line.get_xydata().tolist() for line in axes.lines]


def test_a_staircase_shows_floors_and_curves_as_given():
    curves = {"r = 1": [1.0, 0.5, 0.25], "r = 3": [1.0, 0.1, 4.0**-3]}
    axes = plot_staircase(STAIRS, curves).axes[0]
    for name, floor in STAIRS.items():
        assert [[0, floor], [3, floor]] in drawn_lines(axes), name
    for curve in curves.values():
        assert [[n, value] for n, value in enumerate(curve, start=1)] in drawn_lines(axes)  # the loss of step 1 stands at 1
    assert axes.get_yscale() == "log" and axes.get_ylim()[0] < min(STAIRS.values())


def test_floors_alone_leave_room_for_the_steps_to_come():
    figure = plot_staircase(STAIRS, steps=600)
    assert figure.axes[0].get_xlim() == (0, 600) and len(figure.axes[0].lines) == 8
    assert {text.get_text() for text in texts(figure)} >= set(STAIRS)
    assert not overlaps(figure, lambda text: text.startswith("r ="))


def test_stairs_that_are_close_keep_their_names_apart():
    figure = plot_staircase({"r = 1": 1.0, "r = 2": 0.99, "r = 3": 0.98}, steps=10)
    assert not overlaps(figure, lambda text: text.startswith("r ="))


def test_stairs_have_colours_of_their_own_that_are_readable_on_both_papers():
    from test_view_style import JUPYTERLAB_DARK, WHITE, contrast

    axes = plot_staircase(STAIRS, {name: [1.0, floor] for name, floor in STAIRS.items()}).axes[0]
    colours = [line.get_color() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() > 2]
    ends = [line.get_color() for line in axes.lines if len(line.get_xdata()) == 1]
    assert len(set(colours)) == 8 and ends == colours
    # 3:1 is what WCAG 2.2 asks of graphics
    assert min(contrast(colour, paper) for colour in colours for paper in (WHITE, JUPYTERLAB_DARK)) >= 3


def crossed_by_a_line(figure, names):
    """Names whose box is touched by a line of the same axes (the small marker beside a name is none)."""
    figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        for text in (text for text in axes.texts if text.get_text() in names):
            box = text.get_window_extent()
            for line in (line for line in axes.lines if len(line.get_xdata()) > 1):
                path = axes.transData.transform_path(line.get_path())
                found += [text.get_text()] if path.intersects_bbox(box, filled=False) else []
    return found


def test_no_line_strikes_through_a_name_in_panels():
    x = [1, 10, 100, 1000]
    falling = {"r = 8": (x, [1.0, 0.2, 0.03, 9.0]), "r = 32": (x, [1.0, 0.7, 0.08, 0.01]), "r = 128": (x, [1.0, 0.95, 0.6, 0.0])}
    figure = plot_panels({"one": falling, "two": dict(reversed(falling.items()))}, logx=True, limits=(0, 1.3))
    assert crossed_by_a_line(figure, falling) == []
    assert not overlaps(figure.axes[0].figure, lambda text: text == "r = 8")  # one in each panel
    left = {text.get_text(): text for text in figure.axes[0].texts}
    assert set(left) == set(falling)
    for name, text in left.items():  # beside each name stands its line's marker, in its colour, inside the axes from below
        marker = min((line for line in figure.axes[0].lines if len(line.get_xdata()) == 1),
                     key=lambda line, text=text: abs(line.get_ydata()[0] - text.xy[1]) + abs(line.get_xdata()[0] - text.xy[0]))  # fmt: skip
        curve = next(line for line in figure.axes[0].lines if list(line.get_ydata()) == falling[name][1])
        assert (marker.get_color(), marker.get_marker()) == (curve.get_color(), curve.get_marker())
        assert text.get_window_extent().y0 >= figure.axes[0].bbox.y0


def test_panels_share_axes_and_a_name_looks_the_same_in_each():
    seeds = np.array([[1.0, 2.0, 4.0], [3.0, 4.0, 8.0]])
    figure = plot_panels(
        {"left": {"a": ([1, 2, 4], seeds), "b": ([1, 2, 4], [1, 1, 1])}, "right": {"b": ([1, 2, 4], [5.0, np.nan, 7.0])}},
        xlabel="r", line_at=(2, "here"), xticks=[1, 2, 4],
    )  # fmt: skip
    left, right = figure.axes
    assert [[1, 2.0], [2, 3.0], [4, 6.0]] in drawn_lines(left)  # the mean over seeds
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == 1.0 and band.max() == 8.0
    assert [[1, 5.0], [4, 7.0]] in drawn_lines(right)  # what is not finite is left out
    look = lambda axes, y: next((li.get_color(), li.get_marker()) for li in axes.lines if list(li.get_ydata())[0] == y)  # noqa: E731
    assert look(left, 1) == look(right, 5) != look(left, 2)
    assert left.get_ylim() == right.get_ylim() and [axes.get_title(loc="left") for axes in figure.axes] == ["left", "right"]
    said = [text.get_text() for text in texts(figure)]
    assert said.count("here") == 2 and said.count("b") == 2 and said.count("a") == 1


def test_names_of_lines_that_end_together_stay_apart_in_panels():
    lines = {f"line {n}": ([1, 10, 100], [1, 0.5, n / 1e4]) for n in range(4)}
    figure = plot_panels({"one": lines, "two": lines}, logx=True)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("line")]
        assert len(boxes) == 4 and not any(a.padded(-2).overlaps(b.padded(-2)) for a, b in itertools.combinations(boxes, 2))


def test_maps_have_one_scale_frames_for_the_good_and_crosses_for_the_broken():
    table = np.array([[1.0, 1.5, 30.0], [2.5, 1e6, np.inf]])
    figure = plot_maps({"r = 1": table, "r = 2": table * 2}, ["a", "b", "c"], ["low", "high"], good=2.0, top=100.0)
    first, second = figure.axes[:2]
    shown = first.images[0].get_array()
    # by hand: log10 of each, 1 at the light end, `top` and all above it at the dark end
    assert np.allclose(shown, [[0, np.log10(1.5), np.log10(30)], [np.log10(2.5), 2, 2]])
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 2)
    assert len(first.patches) == 2 and len(second.patches) == 1  # 1 and 1.5; 2
    assert [line.get_xydata().tolist() for line in first.lines] == [[[2, 1]]]  # the cross: column c, row high
    worst = first.images[0].get_cmap()(1.0)[:3]
    assert np.abs(np.array(worst) - 0x11 / 255).max() > 0.4  # far from JupyterLab's dark paper, #111111
    assert first.spines["top"].get_visible()  # and the best, nearly white, has an edge on light paper
    assert [t.get_text() for t in first.get_yticklabels()] == ["low", "high"] and first.images[0].origin == "lower"


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plot_staircase({"r = 1": 0.0}, steps=3), "above 0"),
        (lambda: plot_staircase({"r = 1": 1.0}, {"r = 2": [1.0]}), "no floor for r = 2"),
        (lambda: plot_staircase({"r = 1": 1.0}), "steps="),
        (lambda: plot_panels({"empty": {}}), "at least one line"),
        (lambda: plot_panels({"p": {"a": ([1, 2], [1, 2, 3])}}), r"2 values of x, but y of shape \(1, 3\)"),
        (lambda: plot_maps({"m": np.ones((2, 3))}, [1, 2], [1, 2, 3]), "3 rows and 2 columns"),
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


def report_row(module, S, r=4, part="whole", ratio=0.1, effective_rank=2.0):
    from types import SimpleNamespace

    return SimpleNamespace(module=module, S=S, r=r, part=part, ratio=ratio, effective_rank=effective_rank)


def test_a_report_over_blocks_draws_a_line_per_kind_of_layer():
    rows = []
    for block in range(4):
        rows.append(report_row(f"h.{block}.attn:q,v", (9.0, 1.0), part="whole", ratio=9.0))
        for part, size in (("q", 0.1), ("v", 0.2)):
            rows.append(report_row(f"h.{block}.attn:{part}", (2.0, 1.0 + block / 10), part="slice", ratio=size * (1 + block), effective_rank=1.5 + block / 10))
    figure = plot_report(rows, title="ΔW grows with depth")
    size, spread, values = figure.axes
    drawn = [line.get_xydata().tolist() for line in size.lines]
    assert len(drawn) == 2, "slices stand for their fused layer"
    np.testing.assert_allclose(drawn[0], [[0, 10], [1, 20], [2, 30], [3, 40]])
    np.testing.assert_allclose(spread.lines[0].get_ydata(), [1.5, 1.6, 1.7, 1.8])
    assert set(spread.lines[-1].get_ydata()) == {4}  # r
    np.testing.assert_allclose(values.lines[0].get_ydata(), [1, np.mean([0.5, 0.55, 0.6, 0.65])])
    band = values.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 2][:, 1].min() == pytest.approx(0.5) and band[:, 1].max() == pytest.approx(1)
    assert {"attn:q", "attn:v"} <= {text.get_text() for text in texts(figure)}
    assert not overlaps(figure, lambda text: text.startswith("attn"))
    figure.draw_without_rendering()
    names = [text for text in texts(figure) if text.get_text().startswith("attn")]
    assert all(not text.get_window_extent().overlaps(spread.bbox) for text in names), "names stay out of the next panel"


def test_a_report_of_layers_that_do_not_repeat_has_a_row_for_each():
    rows = [report_row("embed", (4.0, 2.0, 1.0)), report_row("head", (3.0,), r=None, ratio=float("inf"), effective_rank=float("nan")),
            report_row("new", (0.0, 0.0), ratio=0.0, effective_rank=0.0)]  # fmt: skip
    figure = plot_report(rows)
    size, spread, values = figure.axes
    assert [label.get_text() for label in size.get_yticklabels()] == ["embed", "head", "new"]
    table = np.asarray(values.images[0].get_array().filled(np.nan))
    np.testing.assert_allclose(table, [[1, 0.5, 0.25], [1, np.nan, np.nan], [np.nan] * 3])
    shown = [text.get_text() for text in texts(figure)]
    assert "10 %" in shown and "2 of 4" in shown and "∞" in shown and "–" in shown and "0 of 4" in shown
    assert not overlaps(figure, lambda text: "of" in text or "%" in text)


def test_a_report_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        plot_report([])


def test_a_real_report_is_drawn():
    torch = pytest.importorskip("torch")
    from lora_lab import apply_lora, report

    blocks = torch.nn.ModuleDict({"h": torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(6, 6), "up": torch.nn.Linear(6, 9)}) for _ in range(3)])})
    found = report(apply_lora(blocks, 2, 4))
    assert len(plot_report(found).axes) == 3
    assert len(plot_report(report(apply_lora(torch.nn.Sequential(torch.nn.Linear(5, 4)), 2, 4, ["0"]))).axes) == 3


def test_ticks_of_percentages_say_where_they_stand():
    """A tick at 2.5 % must not say 2 %."""
    from lora_lab.view import plot_spread

    figure = plot_spread({"one": [0.514], "other": [0.543]}, percent=True)
    figure.canvas.draw()
    axis = figure.axes[0].xaxis
    for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True):
        assert float(label.get_text().rstrip("%")) == pytest.approx(100 * place, abs=0.005)  # four digits
    assert "one seed" in figure.axes[0].get_xlabel()


def test_a_long_title_stays_inside_a_small_table():
    from lora_lab.view import plot_confusion

    figure = plot_confusion([[1, 0], [2, 3]], title="New wordings: 33% right, and the rows are the truth", cell=0.6)
    figure.canvas.draw()
    (title,) = (text for text in figure.axes[0].texts + figure.axes[0].get_children() if "New wordings" in getattr(text, "get_text", str)())
    assert title.get_window_extent().x1 <= figure.bbox.x1
