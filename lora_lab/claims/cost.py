"""Claims about what LoRA costs and saves: counted, by torch's own counter of operations or on shapes, never timed."""

from __future__ import annotations

import torch
from torch import nn

from ..adapt import apply_lora
from ..counting import count_parameters, lora_parameters
from ..layers import LoRALinear
from ..ledger import training_memory
from ..presets import meta_model, preset
from .court import Finding

N = 768


def _operations(run) -> int:
    """FLOPs of the matrix products in run(), as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _forward(layer: nn.Module) -> int:
    x = torch.empty(16, N, device="meta")
    return _operations(lambda: layer(x))


def _layer(r: int = 8) -> LoRALinear:
    return LoRALinear(nn.Linear(N, N, device="meta"), r, 2 * r)


def faster(otherwise: bool) -> Finding:
    """Operations of a forward pass, relative to the plain layer. Otherwise: W0 is thrown away and B A left."""
    plain = _forward(nn.Linear(N, N, device="meta"))
    if otherwise:
        factors = nn.Sequential(nn.Linear(N, 8, bias=False, device="meta"), nn.Linear(8, N, device="meta"))
        return Finding({"B A in place of W0": [_forward(factors) / plain]}, 0.999, "below", "operations of a forward pass, relative to the base")
    layer = _layer()
    apart = _forward(layer) / plain
    merged = _forward(layer.base_layer) / plain  # a merged layer calls its base and nothing else (lab 02)
    return Finding({"adapter apart": [apart], "merged": [merged]}, 0.999, "below", "operations of a forward pass, relative to the base")


def free(otherwise: bool) -> Finding:
    """Operations that the adapter adds to a forward pass. Otherwise: everybody merges."""
    ours = faster(False).means
    extra = {name: [100 * (value - 1)] for name, value in ours.items()}
    return Finding({"merged": extra["merged"]} if otherwise else extra, 1e-9, "below", "operations added to a forward pass, %")


def smaller(otherwise: bool) -> Finding:
    """Parameters of the GPT-2 that is deployed, relative to the base. Otherwise: a distilled student of six blocks."""
    base = count_parameters(meta_model("gpt2")).total
    if otherwise:
        student = count_parameters(preset("gpt2").changed(layers=6).build()).total
        return Finding({"six of twelve blocks": [student / base]}, 0.999, "below", "parameters to deploy, relative to the base")
    adapter = sum(p.numel() for p in _gpt2("c_attn").parameters() if p.requires_grad)
    return Finding({"adapter apart": [(base + adapter) / base], "merged": [1.0]}, 0.999, "below", "parameters to deploy, relative to the base")


def _gpt2(target: str) -> nn.Module:
    return apply_lora(meta_model("gpt2"), r=8, alpha=16, target_modules=[target])


def training_compute(otherwise: bool) -> Finding:
    """Operations of a training step of one inner layer, LoRA over full fine-tuning. Otherwise: W0 x lies on disk, and only B A is computed."""
    n, r = 2048, 16

    def step(layer, x):
        return _operations(lambda: layer(x).sum().backward())

    x = torch.empty(16, n, device="meta", requires_grad=True)  # the layers below want their gradient, too
    full = step(nn.Linear(n, n, bias=False, device="meta"), x)
    layer = LoRALinear(nn.Linear(n, n, bias=False, device="meta"), r, 2 * r)
    lora = step(layer, x)
    share = lora_parameters(n, n, r) / n**2
    if otherwise:
        factors = nn.Sequential(nn.Linear(n, r, bias=False, device="meta"), nn.Linear(r, n, bias=False, device="meta"))
        return Finding({"B A alone": [step(factors, x) / full]}, 2 * share, "below", "operations of a training step, relative to full fine-tuning")
    return Finding({"2048 × 2048, r = 16": [lora / full]}, 2 * share, "below", "operations of a training step, relative to full fine-tuning")


def memory(otherwise: bool) -> Finding:
    """Peak memory of a training step of GPT-2, LoRA over full fine-tuning. Otherwise: only gradients and Adam's state are counted."""
    full = training_memory(meta_model("gpt2"), 8, 512)
    lora = training_memory(_gpt2("c_attn"), 8, 512)
    if otherwise:
        share = (lora.gradients + lora.optimizer) / (full.gradients + full.optimizer)
        return Finding({"gradients and Adam's state": [share]}, 0.05, "below", "memory of a training step, relative to full fine-tuning")
    return Finding({"GPT-2, 8 × 512 tokens": [lora.peak / full.peak]}, 0.05, "below", "memory of a training step, relative to full fine-tuning")


def file(otherwise: bool) -> Finding:
    """Bytes of GPT-3's adapter in 16 bit, over the 35 MB of the paper's section 4.2. Otherwise: at r = 64."""
    r = 64 if otherwise else 4
    gpt3 = preset("gpt3-175b")
    size = 2 * gpt3.layers * 2 * lora_parameters(gpt3.d_model, gpt3.d_model, r)
    return Finding({f"r = {r} on q and v": [size / 1e6]}, 40, "below", "size of the adapter's file, MB")


def small_layer(otherwise: bool) -> Finding:
    """Trainable over frozen numbers of a layer at r = 4. Otherwise: in a layer of a size that LoRA was made for."""
    sizes = (768, 768) if otherwise else (64, 10)
    share = 100 * lora_parameters(*sizes, 4) / (sizes[0] * sizes[1])
    return Finding({f"{sizes[0]} → {sizes[1]}, r = 4": [share]}, 10, "below", "numbers in A and B, % of those in W0")


def same_cost(otherwise: bool) -> Finding:
    """Numbers in A and B over those in W, at r = the layer's width. Otherwise: at half of it."""
    r = N // 2 if otherwise else N
    return Finding({f"{N} × {N}, r = {r}": [lora_parameters(N, N, r) / N**2]}, 1.01, "below", "numbers that train, relative to full fine-tuning")


def exponential(otherwise: bool) -> Finding:
    """How the factor per doubling of the text itself grows: 1 for any power of the length. Otherwise: a cost of 2^n."""

    def cost(n):
        q = torch.empty(n, 64, device="meta")
        return 2.0**n if otherwise else _operations(lambda: q @ q.T)

    n = 8 if otherwise else 256
    first, second = cost(2 * n) / cost(n), cost(4 * n) / cost(2 * n)
    return Finding({"q kᵀ": [second / first]}, 1.5, "above", "growth of the growth, per doubling", f"Twice the text, {first:.3g} times the products.")
