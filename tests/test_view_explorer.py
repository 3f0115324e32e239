"""The rank explorer against numpy's dense SVD at every stop of its slider, and pictures side by side."""

import base64
import io
import math
import re

import numpy as np
import pytest

pytest.importorskip("ipywidgets")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from lora_lab.view import plot_photographs, rank_explorer, save_png
from lora_lab.view.style import to_svg

M, N = 24, 37


@pytest.fixture(autouse=True)
def live(monkeypatch):
    monkeypatch.delenv("LORA_LAB_HEADLESS", raising=False)


@pytest.fixture
def image():
    """Soft shapes and some grain: a spectrum that falls, as a photograph's does."""
    rng = np.random.default_rng(0)
    y, x = np.linspace(0, 1, M)[:, None], np.linspace(0, 1, N)
    return np.clip(0.5 + 0.3 * np.sin(5 * x * y) + 0.2 * (y > 0.4) * (x < 0.6) + 0.05 * rng.normal(size=(M, N)), 0, 1)


def dense(image, r):
    """The best picture of rank r, term by term."""
    U, S, Vh = np.linalg.svd(image)
    return sum(S[i] * np.outer(U[:, i], Vh[i]) for i in range(r))


def pixels(page):
    from PIL import Image

    data = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page)[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=float)


def test_every_stop_shows_the_best_picture_of_its_rank_and_its_figures(image):
    explorer = rank_explorer(image, r=1)
    for r in range(1, M + 1):
        best = dense(image, r)
        # float32 factors, then rounding to whole bytes: half a byte and a little
        assert np.abs(explorer.frame(r) - 255 * np.clip(best, 0, 1)).max() < 0.51
        error = np.linalg.norm(image - best) / np.linalg.norm(image)
        numbers, size, share, shown, energy = explorer.row(r)
        assert numbers == f"{r * (M + N):,}" and size == f"{r * (M + N) * 4 / 1000:,.1f} kB" and share == f"{r * (M + N) / (M * N):.1%}"
        assert abs(float(shown.rstrip("%")) - 100 * error) <= 0.0051, "two decimals are printed"
        assert abs(float(energy.rstrip("%")) - 100 * (1 - error**2)) <= 0.0051
        assert ("more than the picture itself" in explorer.says(r)) == (r * (M + N) > M * N)


def test_the_page_carries_that_picture(image):
    explorer = rank_explorer(image)
    for r in (1, 7, M):
        found = pixels(explorer.page(r))
        assert found.shape == (M, N)
        # JPEG at quality 92 leaves a few grey levels of 255; another rank would be off by ten and more
        assert np.abs(found - explorer.frame(r)).mean() < 3


def test_the_cut_stands_after_the_rth_value_and_what_is_kept_is_filled(image):
    explorer, before = rank_explorer(image), 0.0
    for r in range(1, M + 1):
        chart = explorer.chart(r)
        lines = re.findall(r'<polyline points="([^"]+)"', chart)  # all values, then those that are kept
        line, kept = (np.array([list(map(float, point.split(","))) for point in points.split()]) for points in lines)
        assert len(kept) == r and len(line) == M and np.array_equal(kept, line[:r])
        cut = float(re.search(r'<path d="M([\d.]+) 28V', chart)[1])
        assert kept[-1, 0] < cut and (r == M or cut < line[r, 0]) and cut > before, "between the last kept and the first left out"
        assert (np.diff(line[:, 1]) >= 0).all(), "the spectrum falls: downwards is larger in SVG"
        assert f"r = {r}<" in chart
        before = cut


def test_the_chart_is_logarithmic():
    image = np.zeros((4, 6))
    image[range(4), range(4)] = [1, 0.1, 0.01, 0.001]  # its singular values
    heights = [float(p.split(",")[1]) for p in re.findall(r'<polyline points="([^"]+)"', rank_explorer(image, r=1).chart(1))[0].split()]
    steps = np.diff(heights)
    assert np.allclose(steps, steps[0], atol=0.11) and steps[0] > 20  # points are written with one decimal


def test_ranks_that_hold_nothing_and_a_black_picture_are_no_trouble():
    flat = np.full((5, 9), 0.5)
    explorer = rank_explorer(flat, r=1)
    assert explorer.row(1)[3] == "0.00%" and (explorer.frame(5) == 128).all()
    assert "nan" not in explorer.page(5) and "inf" not in explorer.page(5)
    black = rank_explorer(np.zeros((5, 9)), r=1)
    assert black.row(1)[3:] == ("0.00%", "100.00%") and "nan" not in black.page(3) + black.still()
    assert rank_explorer(np.array([[0.25]]), r=1).page(1).count("<svg") == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda image: np.stack([image] * 3, axis=2), r"grey picture.*\(24, 37, 3\).*mean\(2\)"),
        (lambda image: image[0], r"\(37,\)"),
        (lambda image: image[:0], r"\(0, 37\)"),
        (lambda image: 255 * image, r"0 to 255|image / 255"),
        (lambda image: image - 0.5, "0 .black. to 1"),
        (lambda image: np.where(image > 0.9, math.nan, image), "NaN"),
    ],
)
def test_other_pictures_are_refused_with_what_to_do(image, wrong, says):
    with pytest.raises(ValueError, match=says):
        rank_explorer(wrong(image))


@pytest.mark.parametrize("r", [0, -1, M + 1])
def test_a_rank_out_of_range_is_refused(image, r):
    with pytest.raises(ValueError, match=f"1 to {M}.*found {r}"):
        rank_explorer(image, r=r)


def test_tensors_are_welcome(image):
    torch = pytest.importorskip("torch")
    assert rank_explorer(torch.from_numpy(image)).page(3) == rank_explorer(image).page(3)


def test_the_slider_moves_the_picture_and_says_what_it_is(image):
    explorer = rank_explorer(image, r=3, name="the <test> & picture")
    box = explorer.widget()
    slider = explorer.slider
    assert (slider.min, slider.max, slider.step, slider.value) == (1, M, 1, 3) and not slider.disabled and slider.continuous_update
    assert "singular values" in slider.tooltip and "arrow" in slider.tooltip
    for r in (1, 20, M):
        before = explorer.picture.value, explorer.words.value
        slider.value = r
        assert explorer.r == r and explorer.error is None
        assert explorer.picture.value == explorer.page(r) != before[0]
        assert f"Rank {r} of {M}" in explorer.words.value != before[1] and 'role="status"' in explorer.words.value
        assert f'alt="the &lt;test&gt; &amp; picture at rank {r}"' in explorer.picture.value
    assert explorer.widget().children[:-1] == box.children[:-1], "two displays are one explorer"


def test_an_error_in_a_callback_shows_and_is_kept_and_goes_again(image, monkeypatch):
    explorer = rank_explorer(image)
    explorer.widget()
    with monkeypatch.context() as patch:
        patch.setattr(explorer, "page", lambda r: 1 / 0)
        explorer.slider.value = 5
        assert "ZeroDivisionError" in explorer.error and 'role="alert"' in explorer.trouble.value
    explorer.slider.value = 6
    assert explorer.error is None and explorer.trouble.value == ""


def display_of(explorer, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw=False: shown.append(data))
    explorer._ipython_display_()
    return shown


def test_the_still_twin_is_always_there_and_headless_it_is_alone(image, monkeypatch):
    box, still = display_of(rank_explorer(image), monkeypatch)
    assert len(box.children) == 5 and still["text/html"].startswith("<details>")
    assert f"Rank {M} of {M}" in still["text/plain"]
    monkeypatch.setenv("LORA_LAB_HEADLESS", "1")
    (still,) = display_of(rank_explorer(image), monkeypatch)
    page = still["text/html"]
    assert "<details" not in page and page.count("<img alt=") == 5 and page.count("<tr>") == 1 + 6  # ranks 1 2 5 10 20 24
    assert page.count('role="img"') == 1 and 'scope="' in page.replace("'", '"')


# ---------------------------------------------------------------- pictures side by side


def test_panels_have_one_size_and_one_height_whatever_stands_above_and_below(image):
    colour = np.stack([image, image**2, 1 - image], axis=2)
    figure = plot_photographs([("a", image, "one"), ("b", colour, "two\nlines"), ("c", image, "")], title="Three")
    places = [axes.get_position() for axes in figure.axes]
    assert len({(round(p.y0, 9), round(p.width, 9), round(p.height, 9)) for p in places}) == 1
    gaps = np.diff([p.x0 for p in places]) - places[0].width
    assert np.allclose(gaps, gaps[0]) and places[0].x0 > 0 and places[-1].x1 < 1
    wide, high = figure.get_size_inches()
    assert abs(places[0].width * wide / (places[0].height * high) - N / M) < 1e-9, "pixels are square"


def test_a_picture_is_clipped_not_stretched(image):
    figure = plot_photographs([("low", 0.5 * image, ""), ("high", 3 * image - 1, "")])
    low, high = (axes.images[0] for axes in figure.axes)
    assert low.get_clim() == high.get_clim() == (0, 1), "one scale for all: half the light looks half as bright"
    assert np.array_equal(high.get_array(), np.clip(3 * image - 1, 0, 1))


def test_texts_stay_inside_the_figure(image, tmp_path):
    panels = [("original + B A", image, "relative error 1e-15, rounding\n4,694 numbers, beside the original")] * 3
    figure = plot_photographs(panels, title="Two photographs, rank 2: factorise the weight, or factorise its change")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer, box = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    assert len(texts) == 7
    for text in texts:
        extent = text.get_window_extent(renderer)
        assert box.x0 <= extent.x0 and extent.x1 <= box.x1 and box.y0 <= extent.y0 and extent.y1 <= box.y1, text.get_text()
    assert 'aria-label="three"' in to_svg(figure, "three")
    assert save_png(figure, tmp_path / "three.png", "dark").stat().st_size > 1000


def test_pictures_of_unlike_size_are_refused(image):
    for panels in ([("a", image, ""), ("b", image[1:], "")], [], [("a", image[0], "")], [("a", np.zeros((3, 4, 2)), "")]):
        with pytest.raises(ValueError, match="of one size"):
            plot_photographs(panels)
