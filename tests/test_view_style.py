"""The plotting style: colours that everyone can tell apart, figures that follow the page, alt text that cannot be forgotten."""

import base64
import io
import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from lora_lab.view import plot_losses, plot_matrices, save_png, show, style
from lora_lab.view.style import COLOURS, DASHES, GRID, INK, MARKERS, MUTED, PAPER, THEMES, new_figure, to_svg

WHITE, JUPYTERLAB_DARK = "#ffffff", "#111111"
# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency", severity 1.0
VISION = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour):
    """sRGB hex -> linear light (IEC 61966-2-1)."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return linear(colour) @ [0.2126, 0.7152, 0.0722]


def contrast(a, b):
    """WCAG 2.2: (lighter + 0.05) / (darker + 0.05)."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def cielab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb / [0.9505, 1, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("paper", [WHITE, JUPYTERLAB_DARK])
@pytest.mark.parametrize("colour", COLOURS)
def test_data_colours_stand_out_on_both_papers(colour, paper):
    assert contrast(colour, paper) >= 3.4


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_and_the_grid_recedes(theme):
    ink, muted, grid, paper = (THEMES[theme][name] for name in (INK, MUTED, GRID, PAPER))
    assert contrast(ink, paper) >= 7 and contrast(muted, paper) >= 4.5  # WCAG AAA, AA for text
    assert contrast(grid, paper) < 2


@pytest.mark.parametrize("vision", VISION)
def test_any_two_colours_stay_apart(vision):
    seen = [cielab(np.clip(np.array(VISION[vision]) @ linear(colour), 0, 1)) for colour in COLOURS]
    for (i, a), (j, b) in itertools.combinations(enumerate(seen), 2):
        # 2.3 is one just noticeable difference in CIELAB (Mahy et al. 1994); ten of them, so that thin lines work too
        assert np.linalg.norm(a - b) > 23, (COLOURS[i], COLOURS[j], vision)


def test_colours_differ_in_lightness_and_each_has_its_own_dash_and_marker():
    lightness = sorted(cielab(linear(colour))[0] for colour in COLOURS)
    assert np.diff(lightness).min() > 2.3
    assert len(COLOURS) == len(set(map(str, DASHES))) == len(set(MARKERS))


def some_figure():
    return plot_losses({"r=1": [3, 2, 1], "r=2": [2, 1, 0.5]}, floors={"r=1": 0.9}, title="Both <fall> & land", ylabel="loss (nats)")


@pytest.mark.parametrize("theme", ["auto", "light", "dark"])
def test_no_sentinel_is_left_and_the_svg_is_well_formed(theme):
    svg = to_svg(some_figure(), 'a "quoted" & <odd> text', theme)
    assert not [sentinel for sentinel in (INK, MUTED, GRID, PAPER) if sentinel in svg]
    root = ET.fromstring(svg)
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == 'a "quoted" & <odd> text'
    assert ("var(--jp-ui-font-color0" in svg) == (theme == "auto")
    assert "<style" not in svg  # it would hold for the whole page


def test_every_neutral_colour_of_the_figure_follows_the_theme():
    # Black or white anywhere would vanish on one of the two papers.
    svg = to_svg(plot_matrices([("W", np.eye(3)), "=", ("W", np.eye(3))], title="t"), "x")
    for fixed in ("#000000", "#ffffff", "fill: black", "fill: white"):
        assert fixed not in re.sub(r'href="data:[^"]*"', "", svg), fixed


def test_two_copies_on_one_page_share_no_id_and_every_reference_is_met():
    pages = [to_svg(some_figure(), "x") for _ in range(2)]
    ids = [set(re.findall(r'\bid="([^"]+)"', page)) for page in pages]
    assert ids[0] and not ids[0] & ids[1]
    for page, own in zip(pages, ids, strict=True):
        wanted = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
        assert wanted and wanted <= own


def test_images_stay_as_they_are():
    from PIL import Image

    figure = new_figure(2, 2)
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    figure.figimage(pixels, resize=True)
    svg = to_svg(figure, "x")
    data = re.search(r'href="data:image/png;base64,([^"]+)"', svg)[1]
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    assert np.array_equal(found, pixels) or np.array_equal(found[::-1], pixels)


@pytest.fixture
def displayed(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw=False: shown.append(data))
    return shown


def test_show_displays_the_figure_its_words_and_its_caption(displayed):
    show(some_figure(), alt="two curves\n   fall", caption="1 < 2")
    (data,) = displayed
    assert data["text/plain"] == "[figure: two curves fall]"
    assert 'aria-label="two curves fall"' in data["text/html"] and "1 &lt; 2</figcaption>" in data["text/html"]


@pytest.mark.parametrize("alt", ["", "  \n", None, 3])
def test_show_refuses_a_figure_without_words(displayed, alt):
    with pytest.raises(ValueError, match="says what the figure shows"):
        show(some_figure(), alt=alt)
    assert not displayed


def test_show_refuses_what_is_no_figure(displayed):
    with pytest.raises(TypeError, match=r"found Axes.*ax\.figure"):
        show(some_figure().axes[0], alt="x")


def test_show_closes_a_pyplot_figure(displayed):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, _ = plt.subplots()
    show(figure, alt="empty axes")
    assert not plt.fignum_exists(figure.number)


def test_style_restores_what_it_found_and_projector_is_larger():
    import matplotlib

    before = {key: matplotlib.rcParams[key] for key in ("font.size", "lines.linewidth", "text.color", "svg.fonttype")}
    with style("light"):
        size, width = matplotlib.rcParams["font.size"], matplotlib.rcParams["lines.linewidth"]
        with style("projector"):
            assert matplotlib.rcParams["font.size"] >= 1.4 * size and matplotlib.rcParams["lines.linewidth"] >= 1.4 * width
            assert "var(--jp-ui-font-color0" in to_svg(some_figure(), "x")
        assert matplotlib.rcParams["font.size"] == size
        assert "var(--jp-ui-font-color0" not in to_svg(some_figure(), "x")
    assert {key: matplotlib.rcParams[key] for key in before} == before
    with pytest.raises(ValueError, match="auto, light, dark, projector; found 'neon'"):
        style("neon")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_save_png_has_the_colours_of_its_theme(tmp_path, theme):
    from PIL import Image

    image = Image.open(save_png(some_figure(), tmp_path / "a.png", theme)).convert("RGB")
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    ink, paper = ([int(THEMES[theme][name][i : i + 2], 16) for i in (1, 3, 5)] for name in (INK, PAPER))
    assert (pixels == paper).all(axis=1).mean() > 0.7
    assert (pixels == ink).all(axis=1).mean() > 0.001  # the middle of letters; edges are blended
    # The sentinels are nearly black: had one been left, there would be something darker than both ink and paper.
    assert pixels.sum(axis=1).min() >= min(sum(ink), sum(paper)) - 3  # blending may round down by 1 in each channel
    with pytest.raises(ValueError, match="cannot follow the page"):
        save_png(some_figure(), tmp_path / "b.png", "auto")
