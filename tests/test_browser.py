"""Labs 02 and 00, and the page of progress, in a real JupyterLab and a real browser, as a student uses them."""

import re
from pathlib import Path

import pytest
from browser_tools import PATIENCE, Student, find_chromium, notebook, wait_for

from lora_lab.course.builder import build_lab

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra dev has it)")
pytest.importorskip("jupyterlab")

SOURCES = Path(__file__).resolve().parents[1] / "notebooks" / "source"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine; LORA_LAB_CHROMIUM may name one"),
]
expect = sync_api.expect
expect.set_options(timeout=1000 * PATIENCE)

BY_ALPHA = "return x @ W.T + (0 if b is None else b) + alpha * (x @ A.T) @ B.T"
BY_ALPHA_OVER_R = BY_ALPHA.replace("alpha", "alpha / r")


@pytest.fixture
def student_of(browser, server, shots):
    """student_of("02_lora_layer") opens a fresh student copy of that lab."""
    return lambda lab: Student(browser, server, build_lab(SOURCES / f"{lab}.py").student, shots)


def set_up_cells(student):
    """The code cells above the first exercise or prediction."""
    first = next(n for n, cell in enumerate(student.built.cells) if cell.id.startswith("head-") or "predict(" in cell.source)
    return [cell.id for cell in student.built.cells[:first] if cell.cell_type == "code"]


def nothing_went_wrong(student):
    outputs = student.saved_outputs()
    assert outputs, "the saved notebook holds no output at all"
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert not student.complaints, "the browser's console shows errors"


def test_a_wrong_answer_is_named_a_right_one_passes_and_progress_survives_a_restart(student_of):
    with student_of("02_lora_layer") as student:
        for name in set_up_cells(student):
            output = student.run(name)
        figures = output.locator("svg[role=img]")
        expect(figures.first).to_be_visible()
        for figure in figures.all():
            assert len(figure.get_attribute("aria-label").split()) > 3, "a figure says what it shows"
            assert figure.bounding_box()["width"] > 200, "a figure is too small to see"
        figures.last.scroll_into_view_if_needed()
        student.shot("1_figure")

        student.retype_last_line("ex-2-1", BY_ALPHA)
        student.run("ex-2-1")
        card = student.run("check-2-1").get_by_role("status")
        expect(card).to_contain_text("Exercise 2.1: not yet")
        expect(card).to_contain_text("alpha is there but not divided by r")
        expect(card).to_be_in_viewport()
        student.shot("2_diagnosis")

        student.retype_last_line("ex-2-1", BY_ALPHA_OVER_R)
        student.run("ex-2-1")
        card = student.run("check-2-1").get_by_role("status")
        expect(card).to_contain_text("Exercise 2.1 passed")
        expect(card).not_to_contain_text("not divided")
        student.shot("3_passed")
        nothing_went_wrong(student)

        # With every output cleared, the record on disk is all that is left.
        student.restart_and_clear()
        for name in set_up_cells(student):
            student.run(name)
        rows = student.run(student.ids[-1]).get_by_role("row")
        expect(rows.filter(has_text="2.1 ·")).to_contain_text("✓ passed")
        expect(rows.filter(has_text="2.1 ·").get_by_role("cell").nth(3)).to_have_text("2")  # attempts
        expect(rows.filter(has_text="2.2 ·")).to_contain_text("not tried")
        student.shot("4_progress")
        nothing_went_wrong(student)


def degrees(sentence):
    """From "The digits lean 17° to the right, with 1.00 times the ink." """
    return int(re.search(r"lean (\d+)°", sentence.inner_text())[1])


def ink_share(sentence):
    return float(re.search(r"with ([\d.]+) times the ink", sentence.inner_text())[1])


def test_the_volume_knob_works_by_keyboard_and_follows_the_theme(student_of):
    with student_of("00_start_here") as student:
        for name in set_up_cells(student)[:3]:
            knob = student.run(name)
        italic = knob.get_by_role("slider", name="italic")
        bold = knob.get_by_role("slider", name="bold")
        picture, sentence = knob.locator("svg[role=img]").first, knob.get_by_role("status")
        expect(picture).to_be_visible()

        def change_by(*keys, until):
            """Press the keys; wait for another picture whose sentence is as it should be, read out and below it."""
            before = picture.inner_html()
            for key in keys:
                student.page.keyboard.press(key)

            def changed():
                text = sentence.inner_text()
                return picture.inner_html() != before and picture.get_attribute("aria-label") == text and until(text)

            wait_for(changed, f"what {keys} should change; the page says {sentence.inner_text()!r}", patience=20)

        def paper_and_ink():
            """Brightness of the page and of the digits, 0 to 765."""
            colours = picture.evaluate("svg => [getComputedStyle(svg.closest('.jp-Notebook')).backgroundColor, getComputedStyle(svg).fill]")
            return [sum(map(int, colour.strip("rgb()").split(","))) for colour in colours]

        for slider in (italic, bold):
            expect(slider, "a slider without a name is only 'slider' to a screen reader").to_be_visible(timeout=20_000)
        expect(sentence).to_contain_text("to the right")
        expect(italic).to_have_attribute("aria-valuenow", "1.0")
        italic.click()
        expect(italic).to_be_focused()
        change_by("Home", until=lambda text: "to the left" in text)
        expect(italic).to_have_attribute("aria-valuenow", "-1.0")
        steepest = degrees(sentence)
        change_by(*["ArrowRight"] * 4, until=lambda text: degrees(sentence) < steepest)
        expect(italic).to_have_attribute("aria-valuenow", "-0.8")  # four steps of 0.05
        student.page.keyboard.press("Tab")  # to the number beside the slider
        student.page.keyboard.press("Tab")
        expect(bold).to_be_focused()
        change_by("End", until=lambda text: ink_share(sentence) > 1.2)
        student.shot("light")

        paper, ink = paper_and_ink()
        assert paper - ink > 380, "dark digits on light paper"
        student.menu("Settings", "Theme", "JupyterLab Dark")
        wait_for(lambda: paper_and_ink()[0] < paper, "the dark theme")
        paper, ink = paper_and_ink()
        assert ink - paper > 380, "light digits on dark paper"
        bold.focus()
        change_by("Home", until=lambda text: ink_share(sentence) < 1)
        student.shot("dark")
        nothing_went_wrong(student)


def test_the_page_of_progress_arrives_as_a_download(browser, server, shots):
    cells = {"begin": "from lora_lab.course import export_progress, hint", "export": "hint('2.1')\nexport_progress()"}
    with Student(browser, server, notebook("portfolio", **cells), shots) as student:
        student.run("begin")
        output = student.run("export")
        with student.page.expect_download() as arriving:
            output.get_by_role("link", name="Download my-progress.html").click()
        assert arriving.value.suggested_filename == "my-progress.html"
        arrived = Path(arriving.value.path()).read_text(encoding="utf-8")
        assert arrived == (server.work / "my-progress.html").read_text(encoding="utf-8") and "1 hint" in arrived
        nothing_went_wrong(student)
