"""The digit painter and its adapters: what ships is what the data card says, and other libraries read the same from the files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lora_lab import digit_painter
from lora_lab.digit_painter import ink_share, load_digit_painter, page, paint, painter_adapters, set_volume, slant

CARD = Path(__file__).parents[1] / "data" / "digit_painter" / "README.md"
VOLUMES = [-1, -0.5, 0, 0.5, 1, 1.5, 2]


def by_hand(points, volumes):
    """The painter in numpy, float64, straight from the files: W0 + volume * (lora_alpha / r) * B @ A in each adapted layer."""
    weights = {name: tensor.astype(np.float64) for name, tensor in load_file(digit_painter.ASSETS / "model.safetensors").items()}
    for name, volume in volumes.items():
        folder = painter_adapters()[name]
        config = json.loads((folder / "adapter_config.json").read_text())
        factors = load_file(folder / "adapter_model.safetensors")
        for target in config["target_modules"]:
            A, B = (factors[f"base_model.model.{target}.{factor}.weight"].astype(np.float64) for factor in ("lora_A", "lora_B"))
            weights[f"{target}.weight"] += volume * config["lora_alpha"] / config["r"] * B @ A
    w = weights
    waves = np.sin(points @ w["where.weight"].T + w["where.bias"])
    strokes = np.sin((waves @ w["shape.weight"].T + w["shape.bias"])[None] + w["which.weight"][:, None])
    return (np.sin(strokes @ w["mix.weight"].T + w["mix.bias"]) @ w["height.weight"].T + w["height.bias"])[..., 0]


@pytest.fixture(scope="module")
def model():
    return load_digit_painter("italic", "bold")


def grid():
    return np.stack(np.meshgrid(*page()), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize("italic", [-1, 0, 0.35, 2])
@pytest.mark.parametrize("bold", [-1, 0, 1, 2])
def test_paint_is_the_network_with_volume_times_the_update(model, italic, bold):
    volumes = {"italic": italic, "bold": bold}
    expected = by_hand(grid(), volumes).reshape(10, 33, 43)
    # float32 through sines of arguments up to 20: 20 * 6e-8 in the first, grown about tenfold by each of the two that follow
    assert np.abs(paint(model, volumes) - expected).max() < 2e-4


def test_peft_reads_the_same_adapter_from_the_files():
    peft = pytest.importorskip("peft")
    points = torch.as_tensor(grid()[::7], dtype=torch.float32)
    for name, folder in painter_adapters().items():
        theirs = peft.PeftModel.from_pretrained(load_digit_painter(), str(folder)).eval()
        with torch.no_grad():
            expected, found = theirs(points, torch.arange(10)), load_digit_painter(name)(points, torch.arange(10))
        assert (expected - found).abs().max() < 2e-4  # the same sums in another order, see above


def test_italic_acts_in_proportion_and_on_digits_it_never_saw(model):
    base = slant(paint(model, {"italic": 0, "bold": 0}))
    for volume in VOLUMES:
        lean = slant(paint(model, {"italic": volume, "bold": 0})) - base
        # It was trained on a slope of 0.3 on digits 0-4. 0.02: what the fit and the grid of 33 x 43 places leave, see the card.
        assert np.abs(lean - 0.3 * volume).max() < 0.02, (volume, lean)


def test_bold_gives_more_ink_with_more_volume_and_less_below_zero(model):
    ink = np.array([ink_share(paint(model, {"italic": 0, "bold": volume})) for volume in VOLUMES])
    assert (np.diff(ink, axis=0) > 0).all()


def test_slant_and_ink_of_shapes_known_by_hand():
    x, y = page(81, 105)
    bar = 0.2 - np.abs(x[None, :] - 0.5 * y[:, None])  # an upright bar 0.4 wide, sheared by 0.5, cut by the page: slope 0.5
    bar = np.where(np.abs(y[:, None]) <= 0.8, bar, -1.0)
    found = slant(bar[None])
    assert abs(found[0] - 0.5) < 0.01  # one cell is 0.025 high
    box = np.minimum(0.5 - np.abs(x[None, :]), 0.5 - np.abs(y[:, None]))
    assert abs(ink_share(box[None])[0] - 1 / (2.6 * 2.0)) < 0.01
    assert np.isnan(slant(np.full((1, 9, 9), -1.0))[0])  # no ink


def test_data_card_tells_what_ships(model):
    card = CARD.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (-?[\d.]+) \| ([+-][\d.]+) \| ([+-][\d.]+) \| ([\d.]+) \|$", card, flags=re.M)
    assert [float(row[0]) for row in rows] == VOLUMES
    base = paint(model, {"italic": 0, "bold": 0})
    for volume, seen, unseen, ink in (map(float, row) for row in rows):
        lean = slant(paint(model, {"italic": volume, "bold": 0})) - slant(base)
        more = (ink_share(paint(model, {"italic": 0, "bold": volume})) / ink_share(base)).mean()
        # two digits are printed, and another processor may round the other way
        assert np.allclose([lean[:5].mean(), lean[5:].mean(), more], [seen, unseen, ink], atol=0.0101, rtol=0)
    for path, size, count in re.findall(r"^\| (\S+\.safetensors) \| ([\d,]+) \| ([\d,]+) \|$", card, flags=re.M):
        path = digit_painter.ASSETS / path
        assert path.stat().st_size == int(size.replace(",", ""))
        assert sum(tensor.size for tensor in load_file(path).values()) == int(count.replace(",", ""))
    factors = load_file(painter_adapters()["italic"] / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.where.{factor}.weight"].ravel() for factor in ("lora_A", "lora_B"))
    w_x = load_file(digit_painter.ASSETS / "model.safetensors")["where.weight"][:, 0]
    cosine = B @ w_x / np.linalg.norm(B) / np.linalg.norm(w_x)
    said = re.search(r"italic's A is \((\S+), (\S+)\).* is ([+-][\d.]+)\.$", card, flags=re.M).groups()
    assert np.allclose([*A, cosine], [float(number) for number in said], atol=0.0051, rtol=0)


def test_adapters_are_small_and_the_model_is_frozen(model):
    assert sorted(painter_adapters()) == ["bold", "italic"]
    assert all((path / "adapter_model.safetensors").stat().st_size < 6_000 for path in painter_adapters().values())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_refusals_say_what_was_asked_and_what_there_is():
    with pytest.raises(ValueError, match="asked for the adapter 'cursive'; those that ship are 'bold', 'italic'"):
        load_digit_painter("cursive")
    with pytest.raises(ValueError, match="on where, where an adapter already is"):
        load_digit_painter("italic", "italic")
    with pytest.raises(ValueError, match=r"load_digit_painter\('bold'\)"):
        set_volume(load_digit_painter("italic"), "bold", 1.0)
