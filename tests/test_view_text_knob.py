"""The volume knob for texts: every stop shows its own text, the table has them all, and markup in a text stays text."""

import pytest

pytest.importorskip("ipywidgets")

from lora_lab.view import text_knob

TEXTS = {1.0: "Gull Rock is a <b>white</b> lighthouse.", -1.0: "I, I, I", 0.0: "“I am,” he said.", 2.0: "light light"}
LOSSES = {-1.0: 8.0, 0.0: 4.0, 1.0: 2.0, 2.0: 5.0}


@pytest.fixture(autouse=True)
def live(monkeypatch):
    monkeypatch.delenv("LORA_LAB_HEADLESS", raising=False)


def test_every_stop_of_the_slider_shows_its_text_and_its_loss():
    knob = text_knob(TEXTS, LOSSES, prompt="name : Gull Rock")
    box = knob.widget()
    assert knob.slider in box.children and knob.slider.value == 1.0
    assert [label for label, _ in knob.slider.options] == ["−1", "0", "1", "2"], "from quiet to loud, with a true minus"
    for volume in TEXTS:
        knob.slider.value = volume
        assert knob.volume == volume and knob.picture.value == knob.page()
        assert f"{LOSSES[volume]:.2f} nats" in knob.page() and f"width: {240 * LOSSES[volume] / 8:.0f}px" in knob.page()
    assert "&lt;b&gt;white&lt;/b&gt;" in text_knob(TEXTS).page() and "nats" not in text_knob(TEXTS).page()


def test_set_moves_the_slider_and_refuses_what_is_not_there():
    knob = text_knob(TEXTS)
    knob.widget()
    knob.set(-1.0)
    assert knob.slider.value == -1.0 and "I, I, I" in knob.picture.value
    with pytest.raises(ValueError, match=r"no text at volume 0.3; there are -1, 0, 1, 2"):
        knob.set(0.3)
    assert knob.volume == -1.0
    for wrong, says in ((({},), "at least one text"), ((TEXTS, {3.0: 1.0}), "no text for the volumes 3")):
        with pytest.raises(ValueError, match=says):
            text_knob(*wrong)
    assert text_knob({0.0: "a", 0.5: "b"}).volume == 0.5, "the nearest to 1"


def test_the_table_has_all_texts_and_headless_it_is_all_there_is(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda what, **more: shown.append(what))
    knob = text_knob(TEXTS, LOSSES, prompt="name : Gull Rock")
    knob._ipython_display_()
    assert len(shown) == 2 and "<details>" in shown[1]["text/html"]
    monkeypatch.setenv("LORA_LAB_HEADLESS", "1")
    shown.clear()
    knob._ipython_display_()
    [only] = shown
    page = only["text/html"]
    assert "<details>" not in page and "<script>" not in page and page.count("<tr>") == 1 + len(TEXTS)
    assert page.index("I, I, I") < page.index("he said") < page.index("&lt;b&gt;white") < page.index("light light")
    assert "8.00" in page and "light light" in only["text/plain"]
