"""Claims about adding updates to weights, taking them out again, and mixing two of them."""

from __future__ import annotations

import torch

from ..layers import LoRALinear
from .bench import SEEDS, accuracy, adapted, turned, upright
from .court import Finding


def _layer(seed: int, share: float) -> LoRALinear:
    """A layer of 256 x 256 whose ΔW has `share` of W0's norm."""
    torch.manual_seed(seed)
    layer = LoRALinear(torch.nn.Linear(256, 256), 8, 8)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_B *= share * layer.weight.norm() / layer.delta_weight().norm()
    return layer


def subtract(otherwise: bool) -> Finding:
    """The share of W0's entries that are others after adding B A and subtracting it, in float32. Otherwise: W0 was kept, and is put back."""
    measured = {"ΔW of 1 % of W0's norm": [], "ΔW as large as W0": []}
    for name, share in zip(measured, (0.01, 1.0), strict=True):
        for seed in SEEDS:
            layer = _layer(seed, share)
            W0, delta = layer.weight.detach().clone(), layer.delta_weight().detach()
            back = (W0 + delta) - delta
            if otherwise:
                layer.merge()
                layer.unmerge()
                back = layer.weight.detach()
            measured[name].append(float((back != W0).float().mean()))
    return Finding(measured, 1e-9, "below", "share of the entries of W0 that come back as others")


def bf16(otherwise: bool) -> Finding:
    """How much of ΔW survives the sum with a weight in bfloat16. Otherwise: in float32."""
    dtype = torch.float32 if otherwise else torch.bfloat16
    kept = []
    for seed in SEEDS:
        layer = _layer(seed, 0.005)
        W0, delta = layer.weight.detach().to(dtype), layer.delta_weight().detach()
        arrived = (W0.float() + delta).to(dtype).float() - W0.float()
        kept.append(1 - float((arrived - delta).norm() / delta.norm()))
    return Finding({"ΔW of 0.5 % of W0's norm": kept}, 0.99, "above", "share of ΔW's norm that survives")


def average(otherwise: bool) -> Finding:
    """How far (B1 + B2)/2 · (A1 + A2)/2 is from (B1 A1 + B2 A2)/2, relative. Otherwise: both adapters share one frozen A."""
    apart = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        B1, B2, A1, A2 = torch.randn(32, 4), torch.randn(32, 4), torch.randn(4, 32), torch.randn(4, 32)
        A2 = A1 if otherwise else A2
        wanted = (B1 @ A1 + B2 @ A2) / 2
        apart.append(float(((B1 + B2) / 2 @ (A1 + A2) / 2 - wanted).norm() / wanted.norm()))
    return Finding({"two independent adapters, half each": apart}, 0.01, "below", "distance from the average update, relative")


def dropout(otherwise: bool) -> Finding:
    """Accuracy after merging (1 - p) ΔW, less that of merging ΔW, for an adapter trained with dropout p = 0.5: distance from the layer's
    own output in eval mode. Otherwise: ΔW is merged as it is."""
    apart = []
    for seed in SEEDS:
        model = adapted(seed)
        layer, x = model[0], turned(seed).test[0]
        layer.lora_dropout = torch.nn.Dropout(0.5)
        model.eval()
        with torch.no_grad():
            factor = 1.0 if otherwise else 0.5
            merged = x @ (layer.weight + factor * layer.delta_weight()).T + layer.bias
            update = layer(x) - layer.base_layer(x)
            apart.append(float((merged - layer(x)).norm() / update.norm()))
    return Finding({"dropout 0.5": apart}, 1e-3, "below", "distance of the merged layer from the unmerged, relative to the update")


def mixed(otherwise: bool) -> Finding:
    """Right answers in one batch with two tasks, upright and turned digits, as a share of what each adapter gets on its own task.
    Otherwise: the batch holds one task."""
    shares = []
    for seed in SEEDS:
        of = {name: adapted(seed, task=name) for name in ("upright", "turned")}
        alone = (accuracy(of["upright"], upright(seed).test) + accuracy(of["turned"], turned(seed).test)) / 2
        if otherwise:
            shares.append(accuracy(of["turned"], turned(seed).test) / accuracy(of["turned"], turned(seed).test))
            continue
        x = torch.cat([upright(seed).test[0], turned(seed).test[0]])
        y = torch.cat([upright(seed).test[1], turned(seed).test[1]])
        shares.append(accuracy(of["turned"], (x, y)) / alone)  # one weight is merged, so all rows meet the same one
    return Finding({"half of the rows each": shares}, 0.98, "above", "right answers, relative to each task with its adapter")
