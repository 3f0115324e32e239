"""Claims about the start: which factor is zero, what flows, what alpha means there."""

from __future__ import annotations

import torch
from torch import nn

from ..adapt import lora_layers
from ..layers import LoRALinear
from ..teacher import Teacher
from .bench import SEEDS, accuracy, learn, pretrained, upright
from .court import Finding

STEPS = 120


def _student(seed: int, A=None, B=None, r: int = 4):
    """A teacher of rank 4, and a student of it whose factors start as given: 0, or the standard deviation of a normal draw."""
    teacher = Teacher([2.0, 1.5, 1.0, 0.5], seed=seed)
    model = teacher.model()
    torch.manual_seed(seed)
    model.layer = LoRALinear(model.layer, r, r)
    for factor, size in ((model.layer.lora_A, A), (model.layer.lora_B, B)):
        if size is not None:
            nn.init.normal_(factor, std=size) if size else nn.init.zeros_(factor)
    return teacher, model


def _learned(seed: int, **start) -> float:
    """The share of the loss that training removes."""
    teacher, model = _student(seed, **start)
    seen = learn(model, teacher.batches()[0], STEPS, 0.05, loss=teacher.loss)
    return 1 - seen[-1] / seen[0]


def both_random(otherwise: bool) -> Finding:
    """Accuracy on the old task right after the adapter is attached, before any training. Otherwise: B = 0."""
    from ..adapt import apply_lora

    kept = []
    for seed in SEEDS:
        model = pretrained(seed)
        before = accuracy(model, upright(seed).test)
        torch.manual_seed(seed)
        apply_lora(model, r=4, alpha=4)  # scaling 1, as printed
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_A)
            nn.init.zeros_(layer.lora_B) if otherwise else nn.init.normal_(layer.lora_B)
        kept.append(accuracy(model, upright(seed).test) / before)
    return Finding({"at step 0": kept}, 0.98, "above", "old accuracy kept at step 0, share")


def both_zero(otherwise: bool) -> Finding:
    """The share of the loss that 200 steps of Adam remove. Otherwise: A random, B zero."""
    learned = [_learned(seed, A=None if otherwise else 0, B=0) for seed in SEEDS]
    return Finding({f"{STEPS} steps": learned}, 0.5, "above", "share of the loss that training removes")


def other_way(otherwise: bool) -> Finding:
    """A zero and B random, as in an embedding layer. Otherwise: neither is random."""
    learned = [_learned(seed, A=0, B=0 if otherwise else 0.2) for seed in SEEDS]
    return Finding({"A = 0, B random": learned}, 0.9, "above", "share of the loss that training removes")


def vanish(otherwise: bool) -> Finding:
    """The norm of the factors' gradients over that of W itself, at every step of a short training. Otherwise: both factors start at zero."""
    shares, curves = [], {}
    for seed in SEEDS:
        teacher, model = _student(seed, **({"A": 0, "B": 0} if otherwise else {}))
        (x, y), layer = teacher.batches()[0], model.layer
        optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.5)
        seen = {"A": [], "B": []}
        for _ in range(12):
            optimizer.zero_grad()
            teacher.loss(model, (x, y)).backward()
            for name, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
                seen[name].append(float(factor.grad.norm()))
            optimizer.step()
        full = layer.weight.detach() + layer.delta_weight().detach()
        full.requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.mse_loss(x @ full.T, y), full)
        shares.append((seen["A"][-1] ** 2 + seen["B"][-1] ** 2) ** 0.5 / float(gradient.norm()))
        curves = curves or {f"gradient of {name}": values for name, values in seen.items()}
    return Finding({"after 12 steps": shares}, 1e-3, "below", "gradient of A and B, relative to that of W", curves=curves)


def clip(otherwise: bool) -> Finding:
    """By how much clipping at 1.0 changes a gradient of norm 1e-5. Otherwise: a gradient is divided by its norm, whatever that is."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 10))
    weight.grad = torch.randn(64, 10)
    weight.grad *= 1e-5 / weight.grad.norm()
    if otherwise:
        weight.grad /= weight.grad.norm()
    else:
        nn.utils.clip_grad_norm_([weight], 1.0)
    return Finding({"norm 1e-5, clipped at 1": [float(weight.grad.norm()) / 1e-5]}, 1.5, "above", "gradient after clipping, relative to before")


def alpha_one(otherwise: bool) -> Finding:
    """The factor before B A at alpha = 1. Otherwise: r = 1."""
    r = 1 if otherwise else 8
    return Finding({f"r = {r}, alpha = 1": [LoRALinear(nn.Linear(16, 16), r, 1).scaling]}, 0.99, "above", "factor before B A")


def rslora(otherwise: bool) -> Finding:
    """How much the starting factors change when rsLoRA is switched on. Otherwise: how much the scaling does."""

    def layer(on):
        torch.manual_seed(0)
        return LoRALinear(nn.Linear(64, 32), 16, 16, rslora=on)

    plain, stabilised = layer(False), layer(True)
    if otherwise:
        return Finding({"its scaling": [stabilised.scaling / plain.scaling - 1]}, 0, "above", "change by rsLoRA, relative")
    moved = sum(float((a - b).detach().norm()) for a, b in ((plain.lora_A, stabilised.lora_A), (plain.lora_B, stabilised.lora_B)))
    return Finding({"A and B at the start": [moved]}, 0, "above", "change by rsLoRA, relative")
