"""Models that carry LoRA of every kind, and ΔW as their layers' own answers show it: what the tests of reports and combining share."""

import torch
from torch import nn

from lora_lab import LoRAConv2d, LoRAEmbedding, apply_lora, lora_layers


class Conv1D(nn.Module):
    """As in transformers' GPT-2: weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Block(nn.Module):
    def __init__(self, d=12):
        super().__init__()
        self.c_attn, self.c_proj, self.fc = Conv1D(3 * d, d), Conv1D(d, d), nn.Linear(d, 2 * d)

    def forward(self, x):
        q, k, v = self.c_attn(x).chunk(3, -1)
        return x + self.c_proj(torch.sigmoid(q * k) * v) + self.fc(x).chunk(2, -1)[0]


class Model(nn.Module):
    """An embedding, two blocks with a fused layer, a convolution, a head."""

    def __init__(self, seed=0, d=12):
        super().__init__()
        torch.manual_seed(seed)
        self.wte = nn.Embedding(29, d)
        self.h = nn.ModuleList([Block(d), Block(d)])
        self.conv = nn.Conv2d(2, 6, 3)
        self.head = nn.Linear(d, 5)

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return self.head(x) + self.conv(x[:, None, :3, :3].expand(-1, 2, -1, -1)).mean((1, 2, 3))[:, None, None]


TARGETS = ["wte", "c_attn:q,v", "c_proj", "fc", "conv", "head"]


def adapted(r=3, alpha=5.0, targets=TARGETS, seed=1, dtype=torch.float64, base_seed=0, **options):
    """A model whose adapters hold random factors, as after a training."""
    model = apply_lora(Model(base_seed).to(dtype), r, alpha, targets, **options)
    fill(model, seed)
    return model


def fill(model, seed):
    draw = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data.copy_(torch.randn(factor.shape, generator=draw, dtype=torch.float64) * 0.1)


@torch.no_grad()
def shown_delta(layer):
    """ΔW (out, in) from what the layer and its base answer to unit vectors; it never reads A, B or full_B."""
    assert not layer.merged and not layer.disabled
    base = layer.base_layer
    if isinstance(layer, LoRAEmbedding):
        x = torch.arange(base.num_embeddings)
        return (layer(x) - base(x)).T.numpy()
    if isinstance(layer, LoRAConv2d):
        shape = base.weight.shape[1:]
        x = torch.eye(shape.numel(), dtype=base.weight.dtype).view(-1, *shape)
        return (layer(x) - base(x))[:, :, 0, 0].T.numpy()
    inputs = base.weight.shape[0] if hasattr(base, "nf") else base.weight.shape[1]
    x = torch.eye(inputs, dtype=base.weight.dtype)
    return (layer(x) - base(x)).T.numpy()


def dense_weight(layer):
    """W0 (out, in)."""
    weight = layer.base_layer.weight.detach()
    return (weight.T if hasattr(layer.base_layer, "nf") or weight.shape[0] == 29 else weight.reshape(len(weight), -1)).numpy()
