"""The figure of lab 08d."""

import numpy as np
import pytest

from lora_lab.view import plot_shares


def test_shares_are_written_as_percentages_and_the_best_of_a_column_is_bold():
    figure = plot_shares([[0.914, 0.6], [0.1, 0.55]], ["one", "two"], ["left", "right"], title="Finding")
    texts = {t.get_text(): t for t in figure.axes[0].texts}
    assert set(texts) == {"91", "60", "10", "55"}
    assert {name for name, t in texts.items() if t.get_fontweight() == "bold"} == {"91", "60"}
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["left", "right"]
    strength = {tuple(np.round(p.get_center())): p.get_alpha() for p in figure.axes[0].patches}
    assert strength[0, 0] > strength[1, 0] > strength[1, 1] > strength[0, 1]


@pytest.mark.parametrize("table", [[[0.5]], [], [[1.5, 0], [0, 0]], [[float("nan"), 0], [0, 0]]])
def test_a_table_that_makes_no_sense_is_refused(table):
    with pytest.raises(ValueError, match="plot_shares needs"):
        plot_shares(table, ["one", "two"], ["left", "right"])
