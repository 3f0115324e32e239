"""The pages and the sheets of paper that are made from the labs."""

import html.parser
import os
import re
from pathlib import Path

import nbformat
import pytest
from browser_tools import find_chromium

from lora_lab.course.builder import answer_lines, build_lab, sources
from lora_lab.course.labs import labs
from lora_lab.course.site import SiteError, build_site, figures, handout

ROOT = Path(__file__).resolve().parents[1]
NAMES = [source.stem for source in sources(ROOT)]
SQUARE = '<svg role="img" aria-label="a square" viewBox="0 0 600 300" style="max-width: 100%; width: 600px"><rect width="600" height="300"/></svg>'
FIGURE = f"<figure>{SQUARE}</figure>"


def executed(name):
    """The student's notebook as if it had run: two figures below its first code cells. No lab is run here; test_notebooks does."""
    notebook = build_lab(ROOT / "notebooks" / "source" / f"{name}.py").student
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells[2:4]:
        cell.outputs = [nbformat.v4.new_output("display_data", {"text/html": FIGURE, "text/plain": "<Figure>"})]
    return notebook


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    for name in NAMES:
        nbformat.write(executed(name), folder / f"{name}.ipynb")
    pages = build_site(ROOT, folder / "public", executed=folder)
    assert len(pages) == 1 + 2 * len(NAMES)
    return folder / "public"


class Links(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.pictures = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "a":
            self.found.append(attributes.get("href", ""))
        if tag in ("img", "source"):
            self.pictures.append((attributes.get("src") or attributes.get("srcset"), attributes.get("alt")))


def test_every_way_leads_somewhere(site):
    for page in site.rglob("*.html"):
        links = Links(page.read_text(encoding="utf-8"))
        local = [link.partition("#")[0] for link in links.found if "://" not in link and not link.startswith("#")]
        assert not [link for link in local if link and not (page.parent / link).exists()], page.name
        if page.name == "index.html":
            assert all((site / source).exists() for source, _ in links.pictures) and len(links.pictures) >= 4
            assert {f"{name}.html" for name in NAMES} <= set(local)
            assert all(alt for source, alt in links.pictures if not source.endswith("_dark.png"))


def test_neighbours_are_linked_in_the_order_of_the_labs(site):
    text = (site / f"{NAMES[1]}.html").read_text(encoding="utf-8")
    assert f'href="{NAMES[0]}.html" rel="prev"' in text and f'href="{NAMES[2]}.html" rel="next"' in text
    assert 'rel="prev"' not in (site / f"{NAMES[0]}.html").read_text(encoding="utf-8")


def test_pages_hold_the_lab_and_no_answer(site):
    for source in sources(ROOT):
        page = re.sub(r"<[^>]+>", "", (site / f"{source.stem}.html").read_text(encoding="utf-8"))
        lines = {line.strip() for line in html.unescape(page).splitlines()}
        assert not lines & answer_lines(source), source.stem
        assert "google.colab" not in page  # the cell for Colab teaches nobody
    lab = labs()["2"]
    page = (site / "02_lora_layer.html").read_text(encoding="utf-8")
    assert all(exercise.title in page for exercise in lab.exercises) and 'aria-label="a square"' in page


@pytest.mark.parametrize("name", NAMES)
def test_a_sheet_says_what_the_lab_is_about(name):
    lab, notebook = next(lab for lab in labs().values() if lab.name == name), executed(name)
    sheet = handout(lab, notebook)
    text = html.unescape(re.sub(r"<[^>]+>", "", sheet))
    assert all(exercise.name in text and exercise.title in text for exercise in lab.exercises)
    formulas = re.findall(r"\$\$(.+?)\$\$", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"), flags=re.S)
    assert all(formula.strip() in html.unescape(sheet) for formula in formulas)
    assert "To take away" in text and sheet.count("<svg") == min(2, len(figures(notebook)))


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine; LORA_LAB_CHROMIUM may name one")
def test_each_sheet_is_one_sheet(site, browser):
    pages = {}
    for name in NAMES:
        page = browser.new_page()
        page.route(re.compile("^https:"), lambda route: route.abort())  # formulas then stand as TeX, which takes no less room
        page.goto((site / "handouts" / f"{name}.html").as_uri(), wait_until="domcontentloaded")
        printed = page.pdf(prefer_css_page_size=True)
        pages[name] = len(re.findall(rb"/Type\s*/Page\b(?!s)", printed))
        page.close()
    assert set(pages.values()) == {1}, pages


def test_a_page_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(SiteError, match="something else"):
        build_site(ROOT, tmp_path)
    assert os.listdir(tmp_path) == ["thesis.docx"]


def test_a_lab_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SiteError, match="asked for 99"):
        build_site(ROOT, tmp_path / "public", labs=["99"])
    assert not list(tmp_path.iterdir())


def test_a_notebook_that_fails_leaves_the_old_site(tmp_path, monkeypatch, site):
    from papermill import PapermillExecutionError

    import lora_lab.course.site as module

    build_site(ROOT, tmp_path / "public", executed=site.parent, labs=["2"])
    old = (tmp_path / "public" / "index.html").read_bytes()

    def fails(*_, **__):
        raise PapermillExecutionError(1, 1, "1/0", "ZeroDivisionError", "division by zero", [])

    monkeypatch.setattr(module, "run_notebook", fails)
    with pytest.raises(SiteError, match="01_rank did not run to its end: ZeroDivisionError"):
        build_site(ROOT, tmp_path / "public", labs=["1"])
    assert (tmp_path / "public" / "index.html").read_bytes() == old and os.listdir(tmp_path) == ["public"]
