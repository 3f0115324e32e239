"""Lab 07's figures show every token and every score they are given, name kinds, and refuse what they cannot draw."""

import pytest

pytest.importorskip("matplotlib")

from lora_lab.view import plot_scores, plot_tokens

ROWS = [
    ("row 0", [("name", "meaning", 0), (" Gull", "meaning", 1), ("END", "end", 2), (" It", "reference", 3), (" is", "reference", 4), ("END", "end", 5)]),
    ("row 1", [("END", "pad"), ("END", "pad"), ("red", "meaning", 0), ("END", "end", 1)]),
]


def words(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def boxes(figure):
    from matplotlib.patches import FancyBboxPatch

    return figure.findobj(FancyBboxPatch)


def test_every_token_has_its_box_its_note_and_its_kind():
    figure = plot_tokens(ROWS, title="What the model reads")
    shown = words(figure)
    assert shown.count("END") == 5 and "␣Gull" in shown and "␣It" in shown, "a blank is seen"
    assert {"row 0", "row 1", "What the model reads", "meaning", "reference", "end of text", "padding"} <= set(shown)
    assert sorted(word for word in shown if word.isdigit()) == sorted("012345" + "01")
    assert len(boxes(figure)) == 10 + 4, "a box for each token, and one for each kind in the key"
    looks = {(box.get_edgecolor(), box.get_linewidth(), str(box.get_linestyle())) for box in boxes(figure)}
    assert len(looks) == 4 and len({look[1:] for look in looks}) >= 3, "kinds differ without colour, too"


def test_a_long_row_is_broken_and_nothing_leaves_the_page_or_overlaps():
    figure = plot_tokens([("a long row", [(f" word{i}", "reference") for i in range(60)])], width=6.0)
    tokens = [box.get_bbox() for box in boxes(figure)[:60]]
    assert max(box.x1 for box in tokens) <= 6.0 and len({round(box.y0, 3) for box in tokens}) > 3
    assert not any(a.overlaps(b) for i, a in enumerate(tokens) for b in tokens[i + 1 :])


def test_bars_are_as_long_as_their_scores_and_mine_stands_out():
    scores = {"frozen": {"bleu": 2.5, "errors": 90.0}, "template": {"bleu": 50.0, "errors": 0.0}, "LoRA": {"bleu": 61.25, "errors": 7.5}}
    figure = plot_scores(scores, columns={"bleu": "BLEU", "errors": "slot errors"}, highlight=["LoRA"])
    for axes, score in zip(figure.axes, ("bleu", "errors"), strict=True):
        assert [bar.get_width() for bar in axes.patches] == [found[score] for found in scores.values()]
        colours = [bar.get_facecolor() for bar in axes.patches]
        assert colours[0] == colours[1] != colours[2]
        assert axes.get_xlim()[1] > max(found[score] for found in scores.values())
        assert [f"{found[score]:.1f}" for found in scores.values()] == [text.get_text() for text in axes.texts]
    assert {"BLEU", "slot errors", "template"} <= set(words(figure))


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: plot_tokens([]), "at least one token"),
        (lambda: plot_tokens([("row", [])]), "at least one token"),
        (lambda: plot_tokens([("row", [("a", "noun")])]), "meaning, reference, end, pad; found noun"),
        (lambda: plot_scores({}, columns={"bleu": "BLEU"}), "needs the scores bleu"),
        (lambda: plot_scores({"one": {"rouge": 1.0}}, columns={"bleu": "BLEU"}), "needs the scores bleu"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, says):
    with pytest.raises(ValueError, match=says):
        draw()
