"""Train the digit painter and its two adapters, and measure them: python data/digit_painter/make.py

Writes lora_lab/assets/digit_painter/, the table of README.md beside this file, and docs/img/volume_strip*.png.
One seed, one thread, under a minute.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates, zoom
from sklearn.datasets import load_digits

from lora_lab.digit_painter import ASSETS, DigitPainter, ink_share, load_digit_painter, paint, slant
from lora_lab.layers import LoRALinear

HERE = Path(__file__).parent
SEED = 0
EXAMPLES = [682, 466, 310, 1074, 1387, 1333, 802, 793, 370, 1230]  # upright, whole when thinner, open when thicker
PIXEL = 0.2  # the side of one of the 8 x 8 pixels, in the painter's units
FINER = 8  # how many times finer the contour is drawn than the pixels
BORDER = 10  # pixels of empty paper around each image, so that every place asked for has a distance
REACH = 0.3  # distances beyond it are clipped: far from the stroke there is nothing to learn
SLOPE = 0.3  # of the italic, 17 degrees
SWELL = 0.04  # of the bold: the stroke grows by this on each side


def distances() -> np.ndarray:
    """Signed distance to the edge of the stroke, > 0 inside: (10, side, side), rows downwards."""
    fields = []
    for image in load_digits().images[EXAMPLES] / 16:
        ink = zoom(np.pad(image, BORDER), FINER, order=3, mode="nearest", grid_mode=True) > 0.5
        signed = (distance_transform_edt(ink) - distance_transform_edt(~ink)) * PIXEL / FINER
        fields.append(gaussian_filter(signed, 2.5))  # rounds off the staircase of the pixels
    return np.stack(fields)


def heights_at(fields: np.ndarray, points: np.ndarray, digits: list[int], slope=0.0, swell=0.0) -> np.ndarray:
    """What the painter should answer at points (N, 2): (D, N); the digit leaning by `slope`, thicker by `swell`."""
    side = fields.shape[1]
    half = side * PIXEL / FINER / 2
    x, y = points[:, 0] - slope * points[:, 1], points[:, 1]
    where = np.stack([(half - y) / (2 * half) * side - 0.5, (x + half) / (2 * half) * side - 0.5])
    found = np.stack([map_coordinates(fields[digit], where, order=1, mode="nearest") for digit in digits])
    return np.clip(found + swell, -REACH, REACH)


def fit(model, fields, steps, lr, digits, rng, **style):
    """Adam on the mean squared error, 256 fresh points a step, learning rate falling to 0 along a half cosine."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for _ in range(steps):
        points = np.stack([rng.uniform(-2.2, 2.2, 256), rng.uniform(-1.2, 1.2, 256)], axis=1)
        points[:192, 0] /= 2  # three quarters of the points where the digit is
        target = torch.tensor(heights_at(fields, points, digits, **style), dtype=torch.float32)
        loss = (model(torch.tensor(points, dtype=torch.float32), torch.tensor(digits)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return math.sqrt(loss.item())


def fit_adapter(name, model, fields, targets, r, steps, lr, digits, rng, **style):
    """Train LoRA on the named layers of the frozen painter, save it in peft's format, take it off again."""
    originals = {target: getattr(model, target) for target in targets}
    for target, layer in originals.items():
        setattr(model, target, LoRALinear(layer, r=r, alpha=r))
    error = fit(model, fields, steps, lr, digits, rng, **style)
    tensors = {}
    for target, layer in originals.items():
        adapted = getattr(model, target)
        for factor in ("lora_A", "lora_B"):
            tensors[f"base_model.model.{target}.{factor}.weight"] = getattr(adapted, factor).detach().contiguous()
        setattr(model, target, layer)
    folder = ASSETS / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": list(targets), "lora_dropout": 0.0}
    config |= {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "task_type": None}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return error


def make() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    fields, everything = distances(), list(range(10))

    model = DigitPainter()
    with torch.no_grad():  # sines want large first weights (Sitzmann et al. 2020, section 3.2), spread over the phases
        model.where.weight.normal_(0, 4)
        model.where.bias.uniform_(-math.pi, math.pi)
        for layer in (model.shape, model.mix):
            bound = math.sqrt(6 / layer.in_features)
            layer.weight.uniform_(-bound, bound)
    errors = {"base": fit(model, fields, 4000, 5e-3, everything, rng)}
    ASSETS.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), ASSETS / "model.safetensors", metadata={"format": "pt"})

    model.requires_grad_(False)
    # The italic sees only 0 to 4 leaning: that 5 to 9 lean as well is what it learned, not what it was shown.
    errors["italic"] = fit_adapter("italic", model, fields, ["where"], 1, 600, 2e-2, [0, 1, 2, 3, 4], rng, slope=SLOPE)
    errors["bold"] = fit_adapter("bold", model, fields, ["shape", "mix"], 4, 1500, 1e-2, everything, rng, swell=SWELL)
    print({name: f"{error:.4f}" for name, error in errors.items()})


def measure() -> str:
    """The table of the data card, from the files that ship."""
    model, volumes = load_digit_painter("italic", "bold"), (-1, -0.5, 0, 0.5, 1, 1.5, 2)
    base = paint(model, {"italic": 0, "bold": 0})
    lines = ["| volume | slant, digits 0-4 | slant, digits 5-9 | ink of bold / ink of base |", "|---:|---:|---:|---:|"]
    for volume in volumes:
        lean = slant(paint(model, {"italic": volume, "bold": 0})) - slant(base)
        ink = ink_share(paint(model, {"italic": 0, "bold": volume})) / ink_share(base)
        lines.append(f"| {volume:g} | {lean[:5].mean():+.2f} | {lean[5:].mean():+.2f} | {ink.mean():.2f} |")
    layer = model.where
    a, b, w_x = layer.lora_A[0], layer.lora_B[:, 0], layer.base_layer.weight[:, 0]
    cosine = torch.cosine_similarity(b, w_x, dim=0).item()
    lines += ["", f"The italic's A is ({a[0]:.2f}, {a[1]:.2f}): it reads y and leaves x alone. "
              f"The cosine between its B and the column of `where` that reads x is {cosine:+.4f}."]
    sizes = {path: path.stat().st_size for path in sorted(ASSETS.rglob("*.safetensors"))}
    lines += ["", "| file | bytes | numbers |", "|---|---:|---:|"]
    for path, size in sizes.items():
        count = sum(tensor.numel() for tensor in load_file(path).values())
        lines.append(f"| {path.relative_to(ASSETS).as_posix()} | {size:,} | {count:,} |")
    return "\n".join(lines)


def write_card() -> None:
    card = HERE / "README.md"
    text = card.read_text(encoding="utf-8")
    block = f"<!-- measured -->\n{measure()}\n<!-- end -->"
    card.write_text(re.sub(r"<!-- measured -->.*<!-- end -->", lambda _: block, text, flags=re.S), encoding="utf-8")


def draw_pictures() -> None:
    """The pictures of the README."""
    from lora_lab.view import save_png, volume_strip

    pictures = HERE.parents[1] / "docs" / "img"
    pictures.mkdir(parents=True, exist_ok=True)
    title = "One adapter of 66 numbers, its volume turned from −1 to 2"
    for name, theme in (("volume_strip", "light"), ("volume_strip_dark", "dark")):
        save_png(volume_strip("italic", volumes=(-1, 0, 1, 2), title=title), pictures / f"{name}.png", theme)


if __name__ == "__main__":
    make()
    write_card()
    draw_pictures()
