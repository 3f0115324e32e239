"""A small network that draws handwritten digits, and two adapters that change its handwriting.

The painter is a neural field: it takes a place (x, y) on the page and a digit, and says how deep inside the pen stroke
that place lies. Where the answer is positive, there is ink.

    height(x, y, d) = w_h . sin(W_m sin(W_s sin(W_0 (x, y) + b_0) + b_s + e_d) + b_m) + b_h

`where` (W_0, 64 x 2) is the only layer that sees x and y, so geometry lives there: to lean the digits by a slope s is to
replace x by x - s*y, which adds to W_0 the matrix -s * W_0[:, :1] @ [[0, 1]], of rank 1. The italic adapter was not told so;
it was trained on leaning digits and found it. How both were trained, on what, and how well they do: data/digit_painter/.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lab.layers import LoRALinear

ASSETS = Path(__file__).parent / "assets" / "digit_painter"
HALF_WIDTH, HALF_HEIGHT = 1.3, 1.0  # of the page, in the painter's units: a digit is about 1.6 high


class DigitPainter(nn.Module):
    """Heights of the ten digits over the page: > 0 inside the stroke, < 0 outside, in the units of x and y, near the edge.

    where: Linear(2, 64); shape: Linear(64, 64), which: Embedding(10, 64), mix: Linear(64, 64), height: Linear(64, 1).
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.where = nn.Linear(2, width)
        self.shape = nn.Linear(width, width)
        self.which = nn.Embedding(10, width)
        self.mix = nn.Linear(width, width)
        self.height = nn.Linear(width, 1)

    def forward(self, points: Tensor, digits: Tensor) -> Tensor:
        """points (N, 2), digits (D,) of int64 in 0..9 -> heights (D, N)."""
        waves = torch.sin(self.where(points))  # (N, width), the same for every digit
        strokes = torch.sin(self.shape(waves) + self.which(digits)[:, None, :])  # (D, N, width)
        return self.height(torch.sin(self.mix(strokes))).squeeze(-1)


def painter_adapters() -> dict[str, Path]:
    """The adapters that ship: name -> folder with adapter_model.safetensors and adapter_config.json (peft's format)."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/adapter_config.json"))}


def adapted_layers(name: str) -> list[str]:
    """The names of the painter's layers that an adapter is for: italic ["where"], bold ["shape", "mix"]."""
    return list(_config(name)["target_modules"])


def load_digit_painter(*adapters: str) -> DigitPainter:
    """The painter with its trained weights, frozen; each adapter named is put on its layers, at volume 1.

    Adapters that use different layers can be loaded together.

    Raises ValueError for an adapter that does not ship, or that wants a layer which another adapter already has.
    """
    model = DigitPainter()
    model.load_state_dict(load_file(ASSETS / "model.safetensors"))
    model.requires_grad_(False)
    for name in adapters:
        _attach(model, name)
    return model.eval()


def set_volume(model: DigitPainter, name: str, volume: float) -> None:
    """Make an adapter louder or softer: W_0 + volume * scaling * B @ A. 0 is the model without it, 1 the adapter as trained.

    Nothing but alpha changes: alpha = volume * (alpha in the adapter's file).
    """
    config = _config(name)
    for target in config["target_modules"]:
        layer = getattr(model, target)
        if not isinstance(layer, LoRALinear):
            raise ValueError(
                f"asked for the volume of {name!r}, but the layer {target!r} has no adapter on it; "
                f"load the painter with load_digit_painter({name!r})"
            )
        layer.alpha = volume * config["lora_alpha"]


def page(rows: int = 33, columns: int = 43) -> tuple[np.ndarray, np.ndarray]:
    """The grid on which the painter is asked: x (columns,) to the right and y (rows,) upwards, in its own units."""
    return np.linspace(-HALF_WIDTH, HALF_WIDTH, columns), np.linspace(-HALF_HEIGHT, HALF_HEIGHT, rows)


@torch.no_grad()
def paint(model: DigitPainter, volumes: Mapping[str, float] = {}, rows: int = 33, columns: int = 43) -> np.ndarray:
    """Ask the painter for all ten digits, each adapter in `volumes` at its volume.

    Returns the heights, (10, rows, columns), rows upwards: ink is where they are positive.
    """
    for name, volume in volumes.items():
        set_volume(model, name, volume)
    x, y = page(rows, columns)
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    heights = model(torch.as_tensor(points, dtype=model.height.weight.dtype), torch.arange(10))
    return heights.reshape(10, rows, columns).numpy()


def slant(heights: np.ndarray) -> np.ndarray:
    """How much each digit leans: the slope of x on y over its ink, mu_11 / mu_02, in columns of x per unit of y.

    heights (D, rows, columns) on the grid of `page` -> (D,). Leaning by a slope s adds exactly s to it. nan: no ink.
    """
    x, y = page(*heights.shape[1:])
    ink = _coverage(heights)
    with np.errstate(invalid="ignore", divide="ignore"):
        ink = ink / ink.sum(axis=(1, 2), keepdims=True)
        dx = x[None, None, :] - (ink * x[None, None, :]).sum(axis=(1, 2), keepdims=True)
        dy = y[None, :, None] - (ink * y[None, :, None]).sum(axis=(1, 2), keepdims=True)
        return (ink * dx * dy).sum(axis=(1, 2)) / (ink * dy * dy).sum(axis=(1, 2))


def ink_share(heights: np.ndarray) -> np.ndarray:
    """The share of the page that is ink, 0 to 1: heights (D, rows, columns) -> (D,)."""
    return _coverage(heights).mean(axis=(1, 2))


def _coverage(heights: np.ndarray) -> np.ndarray:
    # A cell on the edge is inked in part; heights are distances, so the part is linear in them, over one cell.
    cell = 2 * HALF_HEIGHT / (heights.shape[1] - 1)
    return np.clip(heights / cell + 0.5, 0, 1)


@functools.cache
def _config(name: str) -> dict:
    folders = painter_adapters()
    if name not in folders:
        raise ValueError(f"asked for the adapter {name!r}; those that ship are {', '.join(map(repr, folders))}")
    return json.loads((folders[name] / "adapter_config.json").read_text(encoding="utf-8"))


def _attach(model: DigitPainter, name: str) -> None:
    config = _config(name)
    tensors = load_file(painter_adapters()[name] / "adapter_model.safetensors")
    taken = [target for target in config["target_modules"] if isinstance(getattr(model, target), LoRALinear)]
    if taken:
        raise ValueError(f"asked to put {name!r} on {', '.join(taken)}, where an adapter already is; load one at a time")
    for target in config["target_modules"]:
        layer = LoRALinear(getattr(model, target), r=config["r"], alpha=config["lora_alpha"])
        with torch.no_grad():
            for factor in ("lora_A", "lora_B"):
                getattr(layer, factor).copy_(tensors[f"base_model.model.{target}.{factor}.weight"])
        setattr(model, target, layer.requires_grad_(False))
