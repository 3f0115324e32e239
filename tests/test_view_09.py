"""Lab 09's figures show every method at its numbers, and refuse what they cannot draw."""

import pytest

pytest.importorskip("matplotlib")

from matplotlib.text import Text

from lora_lab.view import plot_latency, plot_sites, plot_tradeoffs


def words(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


POINTS = {
    "LoRA": {"accuracy": 0.9, "bytes": 2000.0, "ms": 1.0}, "adapters": {"accuracy": 0.9, "bytes": 2000.0, "ms": 1.3},
    "frozen": {"accuracy": 0.1, "bytes": 0.0, "ms": 1.0},
}  # fmt: skip
GROUPS = {"LoRA": "LoRA", "adapters": "adaptation", "frozen": "adaptation"}


def draw(**more):
    return plot_tradeoffs(POINTS, quality=("accuracy", "right"), costs={"bytes": "file", "ms": "time"}, groups=GROUPS, linear=["ms"], **more)


def test_the_site_plan_names_every_rival():
    shown = " ".join(words(plot_sites()))
    for name in ("prompt", "prefix", "adapter", "LoRA", "BitFit", "last layers", "full fine-tuning"):
        assert name in shown


def test_marks_stand_where_their_numbers_are_and_do_not_hide_each_other():
    figure = draw(title="what it costs")
    panels = figure.axes[:2]
    figure.draw_without_rendering()
    assert [axes.get_xlabel() for axes in panels] == ["file", "time"] and panels[0].get_ylabel() == "right"
    for axes, cost in zip(panels, ("bytes", "ms"), strict=True):
        marks = [line for line in axes.lines if line.get_markersize() in (12, 14) and line.axes in panels]
        places = [tuple(axes.transAxes.transform((m.get_xdata()[0], m.get_ydata()[0]))) for m in marks]
        assert len(places) == 3
        gaps = [((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5 for i, a in enumerate(places) for b in places[:i]]
        assert min(gaps) > 12 * figure.dpi / 72, "two methods with the same numbers stand beside each other"
        x, y = axes.transData.inverted().transform(places[0])  # the best stands first, where it belongs
        assert y == pytest.approx(0.9) and x == pytest.approx(POINTS["LoRA"][cost], rel=1e-6)
        assert {m.get_marker() for m in marks} == {"s", "o"}, "groups differ without colour, too"
    for name in POINTS:
        assert name in words(figure)
    low, high = draw(better="down").axes[0].get_ylim()
    assert low > high, "where less is better, less is further up"


def test_latency_in_per_cent():
    found = {"short": {"merged": (1.0, 0.98, 1.02), "adapters": (1.25, 1.2, 1.3)}, "long": {"merged": (1.0, 0.99, 1.01), "adapters": (1.1, 1.0, 1.2)}}
    figure = plot_latency(found, title="latency")
    for axes, of in zip(figure.axes, found.values(), strict=True):
        dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert dots == pytest.approx([100 * (middle - 1) for middle, _, _ in of.values()])
    assert {"short", "long", "merged", "adapters", "+25", "+10", "+0"} <= set(words(figure))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: plot_tradeoffs(POINTS, quality=("f1", "F1"), costs={"bytes": "file"}, groups=GROUPS), "f1"),
        (lambda: plot_tradeoffs(POINTS, quality=("accuracy", ""), costs={"bytes": "file"}, groups={}), "group"),
        (lambda: plot_latency({}), "same methods"),
        (lambda: plot_latency({"a": {"x": (1, 1, 1)}, "b": {"y": (1, 1, 1)}}), "same methods"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
