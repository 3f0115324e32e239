"""Claims about what LoRA is."""

from __future__ import annotations

import torch
from torch import nn

from ..adapt import apply_lora, lora_layers
from ..layers import LoRALinear
from ..spectra import numerical_rank
from ..teacher import Teacher
from .bench import SEEDS, accuracy, adapted, apply, learn, pretrained, tuned, turned
from .court import Finding


def factorises(otherwise: bool) -> Finding:
    """The rank of the weight with which a LoRA layer of r = 2 computes, after training. If it were a factorisation, that would be 2."""
    ranks = []
    for seed in SEEDS:
        teacher = Teacher([2.0, 1.0], seed=seed)  # a change of rank 2, as LoRA bets
        torch.manual_seed(seed)
        model = apply_lora(teacher.model(), r=2, alpha=2)
        learn(model, teacher.batches()[0], 100, 0.05, loss=teacher.loss)
        layer = model.layer
        delta = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        ranks.append(float(numerical_rank(torch.linalg.svdvals(delta if otherwise else layer.weight.double() + delta))))
    return Finding({"r = 2, layer 32 × 24": ranks}, 2.5, "below", "rank of the weight that computes")


def replace(otherwise: bool) -> Finding:
    """Accuracy on turned digits of BA alone, as a share of that of W0 + BA. Otherwise: there never was a W0."""
    shares = []
    for seed in SEEDS:
        if otherwise:
            model = nn.Sequential(nn.Linear(64, 10))
            with torch.no_grad():
                model[0].weight.zero_()
            tuned(apply(model, 4, seed), turned(seed).train)
        else:
            model = adapted(seed)
        whole = accuracy(model, turned(seed).test)
        with torch.no_grad():
            model[0].weight.zero_()
        shares.append(accuracy(model, turned(seed).test) / whole)
    return Finding({"B A alone": shares}, 0.98, "above", "accuracy, as a share of that of W0 + B A")


def local(otherwise: bool) -> Finding:
    """The share of a weight's entries that one training step changes. Otherwise: only one row of B may move."""
    shares = []
    for seed in SEEDS:
        model = tuned(apply(pretrained(seed), 4, seed), turned(seed).train, steps=1)
        delta = lora_layers(model)["0"].delta_weight().detach()
        if otherwise:
            delta = delta * (torch.arange(len(delta)) == 3)[:, None]
        shares.append(float((delta != 0).float().mean()))
    return Finding({"one step": shares}, 0.5, "below", "share of the entries of W that change")


def from_input(otherwise: bool) -> Finding:
    """How far the update's output is from linear in x. Weights that are made from the input would make it something else."""
    apart = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        layer = LoRALinear(nn.Linear(64, 32, dtype=torch.float64), 4, 8)
        nn.init.normal_(layer.lora_B)
        x, y = torch.randn(2, 64, dtype=torch.float64)
        with torch.no_grad():
            update = lambda v: layer(v) - layer.base_layer(v)  # noqa: B023, E731
            made = lambda v: update(v) * torch.sigmoid(v.mean())  # noqa: B023, E731  (weights that depend on the input)
            f = made if otherwise else update
            expected = 2 * f(x) - 3 * f(y)
            apart.append(float((f(2 * x - 3 * y) - expected).norm() / expected.norm()))
    return Finding({"x → B A x": apart}, 1e-3, "above", "distance from linear, relative")


def of_attention(otherwise: bool) -> Finding:
    """The share of its loss that LoRA removes in a network that has no attention. Otherwise: LoRA may adapt attention's matrices alone."""
    removed, note = [], ""
    for seed in SEEDS:
        model = pretrained(seed)
        if otherwise:
            try:
                apply_lora(model, r=4, alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
            except ValueError as nothing_to_adapt:
                removed.append(0.0)
                note = str(nothing_to_adapt).partition(";")[0].partition("\n")[0]
                continue
        seen = learn(apply(model, 4, seed), turned(seed).train, 100, 0.15)
        removed.append(1 - seen[-1] / seen[0])
    return Finding({"a layer 64 → 10, no attention": removed}, 0.5, "below", "share of the loss that LoRA removes", note)


def shared(otherwise: bool) -> Finding:
    """Different A tensors per adapted layer. Otherwise: VeRA's one A for all layers."""
    torch.manual_seed(0)
    model = apply_lora(nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)]), r=4, alpha=8)
    layers = list(lora_layers(model).values())
    if otherwise:
        for layer in layers[1:]:
            layer.lora_A = layers[0].lora_A
    different = len({id(layer.lora_A) for layer in layers})
    return Finding({"six layers": [different / len(layers)]}, 0.99, "below", "different A's for each layer")


def readable(otherwise: bool) -> Finding:
    """How much B can change while the layer computes the same. Otherwise: how much the singular values of ΔW then do."""
    moved = []
    for seed in SEEDS:
        layer = lora_layers(adapted(seed))["0"]
        B, A = layer.lora_B.detach().double(), layer.lora_A.detach().double()
        torch.manual_seed(seed)
        M = torch.eye(4, dtype=B.dtype) + torch.randn(4, 4, dtype=B.dtype)
        B2, A2 = B @ M, torch.linalg.inv(M) @ A
        before, after = (torch.linalg.svdvals(b @ a) for b, a in ((B, A), (B2, A2))) if otherwise else (B, B2)
        assert torch.allclose(B @ A, B2 @ A2, rtol=0, atol=1e-9 * float((B @ A).abs().max()))  # the same function, or nothing is shown
        moved.append(float((after - before).norm() / before.norm()))
    return Finding({"the same ΔW": moved}, 1e-6, "below", "change of what is read, relative")


def svd(otherwise: bool) -> Finding:
    """Matrix decompositions at the start, per layer. Otherwise: a start from the weight's strongest directions (PiSSA)."""
    counted = _Decompositions()
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    with counted:
        apply_lora(model, r=4, alpha=8)
        if otherwise:
            for layer in lora_layers(model).values():
                torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    return Finding({"four layers": [counted.calls / 4]}, 0.5, "above", "matrix decompositions per layer")


class _Decompositions(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what torch decomposes while it is on."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += any(word in str(function) for word in ("svd", "qr", "eig", "cholesky", "lu_factor"))
        return function(*args, **kwargs or {})


def output_adapter(otherwise: bool) -> Finding:
    """How much the hidden layer changes when an adapter is trained on the output layer. Otherwise: on the hidden layer's weight."""
    moved = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        x, y = turned(seed).train
        with torch.no_grad():
            before = model[0](x)
        apply_lora(model, r=4, alpha=4, target_modules=["0" if otherwise else "2"])
        tuned(model, (x, y), steps=10, lr=0.02)
        with torch.no_grad():
            moved.append(float((model[0](x) - before).norm() / before.norm()))
    return Finding({"on the output": moved}, 0.01, "above", "change of the hidden layer, relative")


def attention(otherwise: bool) -> Finding:
    """How far the product of Q, K and V is from what attention computes, relative. Otherwise: with the softmax of Q Kᵀ / √d."""
    apart = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        q, k, v = torch.randn(3, 8, 16)
        scores = q @ k.T
        mixed = ((scores / 16**0.5).softmax(-1) if otherwise else scores) @ v
        right = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        apart.append(float((mixed - right).norm() / right.norm()))
    return Finding({"8 tokens, d = 16": apart}, 1e-3, "below", "distance from attention, relative")
