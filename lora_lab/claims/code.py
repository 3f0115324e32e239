"""Code as articles print it, cut down to the lines that matter, beside the mended line: run it, and see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..adapt import apply_lora
from ..counting import count_parameters
from ..layers import LoRALinear
from .bench import SEEDS, learn, pretrained, turned
from .court import Finding

_LORA = """
class LoRa(nn.Module):
    def __init__(self, layer, r):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, layer.in_features)); self.B = nn.Parameter(torch.zeros(layer.out_features, r))
    def forward(self, x):
        return self.layer(x) + x @ self.A.T @ self.B.T
"""
# name -> (the lines as printed, the line to change, its mended form). They run on torch's meta device: shapes alone, no numbers.
PRINTED = {
    "twice": (
        _LORA + "fc = nn.Linear(256, 10)\nlora = LoRa(fc, r=4)\nx = torch.randn(32, 256)\ny = fc(lora(x))",
        "fc(lora(x))", "lora(x)",
    ),
    "pool": (
        "conv, pool = nn.Conv2d(3, 128, 3, padding=1), nn.MaxPool2d(2)\nfc = nn.Linear(128 * (224 // 8) ** 2, 10)\n"
        "x = pool(torch.relu(conv(torch.randn(2, 3, 224, 224))))\ny = fc(x.flatten(1))",
        "224 // 8", "224 // 2",
    ),
    "vocabulary": (
        "embedding_dim, hidden_dim, vocabulary = 128, 256, 10000\nembedding = nn.Embedding(embedding_dim, hidden_dim)\n"
        "words = torch.tensor([[17, 128, 9999]], device='cpu')\ny = embedding.to_empty(device='cpu')(words)",
        "nn.Embedding(embedding_dim, hidden_dim)", "nn.Embedding(vocabulary, hidden_dim)",
    ),
    "identity": (
        "class ResNet(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(512, 1000)\n"
        "net = ResNet()\nwidth = net.fc.in_features\nnet.fc = nn.Identity()\nhead = nn.Linear(net.fc.in_features, 10)",
        "nn.Linear(net.fc.in_features, 10)", "nn.Linear(width, 10)",
    ),
    "news": (
        "embedding, linear, out = nn.Embedding(10000, 128), nn.Linear(128, 64, bias=False), nn.Linear(64, 10000)\n"
        "texts, topics = torch.zeros(32, 50, dtype=torch.long), torch.zeros(32, dtype=torch.long)\n"
        "scores = out(linear(embedding(texts)))\nloss = nn.CrossEntropyLoss()(scores, topics)",
        "scores, topics", "scores.mean(1), topics",
    ),
    "unimported": (
        "layer = nn.Linear(64, 10)\noptimizer = optim.Adam(layer.parameters(), lr=0.01)",
        "optim.Adam", "torch.optim.Adam",
    ),
    "iterator": (
        "texts = ['a', 'b']\nbatches = list(BatchIterator(texts, 2))",
        "list(BatchIterator(texts, 2))", "[texts[i : i + 2] for i in range(0, len(texts), 2)]",
    ),
}  # fmt: skip


def source(name: str, otherwise: bool = False) -> str:
    """The printed lines, or the mended ones."""
    printed, line, mended = PRINTED[name]
    assert printed.count(line) == 1, f"{name}: the line to mend must stand there once"
    return printed.replace(line, mended) if otherwise else printed


def _runs(name: str, otherwise: bool) -> Finding:
    """1 if the lines run to their end, else 0, with the error's own words."""
    error, space = "", {"torch": torch, "nn": nn, "F": F}
    try:
        with torch.device("meta"):
            exec(compile(source(name, otherwise), f"<{name}>", "exec"), space)
    except Exception as problem:
        words = " ".join(str(problem).split())
        error = f"{type(problem).__name__}: {words[:110]}{'…' * (len(words) > 110)}"
    return Finding({"mended" if otherwise else "as printed": [float(not error)]}, 0.5, "above", "runs to its end: 1, stops: 0", error)


def twice(otherwise: bool) -> Finding:
    return _runs("twice", otherwise)


def pool(otherwise: bool) -> Finding:
    return _runs("pool", otherwise)


def vocabulary(otherwise: bool) -> Finding:
    return _runs("vocabulary", otherwise)


def identity(otherwise: bool) -> Finding:
    return _runs("identity", otherwise)


def news(otherwise: bool) -> Finding:
    return _runs("news", otherwise)


def unimported(otherwise: bool) -> Finding:
    return _runs("unimported", otherwise)


def iterator(otherwise: bool) -> Finding:
    return _runs("iterator", otherwise)


# What the package lora-pytorch offers, as version 0.2.0 was asked (the newest on PyPI; its wheel has this sha256). It is no dependency of this
# lab: a test asks the package again wherever it is installed.
LORA_PYTORCH = {
    "version": "0.2.0",
    "sha256": "cb0395d7413510a36b2e85bcf448e52f9eabd4af8da01ab7fb2c84c5d08a77e7",
    "exports": ("LoRA",),
    "arguments": ("module", "lora_module", "enabled", "rank", "is_root"),
    "attributes": ("bias", "disable_lora", "enable_lora", "forward", "from_module", "merge_lora", "parameters", "remove_lora", "weight"),
}
IN_PRINT = {"exports": ("LoRa",), "arguments": ("r", "alpha", "lora_alpha", "bias"), "attributes": ("low_rank_weights", "update_weights")}
IN_FACT = {"exports": ("LoRA",), "arguments": ("module", "rank"), "attributes": ("from_module", "merge_lora", "remove_lora")}


def package(otherwise: bool) -> Finding:
    """The share of the names that articles use of the package lora_pytorch that the package has. Otherwise: the names that its readme uses."""
    used = [(kind, name) for kind, names in (IN_FACT if otherwise else IN_PRINT).items() for name in names]
    there = [name in LORA_PYTORCH[kind] for kind, name in used]
    return Finding({"names that are there": [sum(there) / len(there)]}, 0.99, "above", "share of the names that the package has")


def squeeze(otherwise: bool) -> Finding:
    """Axes of a product (4, 3) (3, 1) after .squeeze(-1), as numpy and torch understand it. Otherwise: without the squeeze."""
    product = torch.ones(4, 3) @ torch.ones(3, 1)
    axes = (product if otherwise else product.squeeze(-1)).ndim
    return Finding({"(4, 3) times (3, 1)": [float(axes)]}, 1.5, "above", "axes of the result", "" if otherwise else
                   "In TensorFlow itself the line stops: a tf.Tensor has no attribute squeeze.")  # fmt: skip


def cube(otherwise: bool) -> Finding:
    """Numbers in a "LoRA weight" of shape (rank, dim, dim), relative to the dense layer. Otherwise: A (r, in) and B (out, r)."""
    dim, rank = 768, 32
    numbers = rank * 2 * dim if otherwise else rank * dim * dim
    return Finding({"dim 768, rank 32": [numbers / dim**2]}, 1, "below", "numbers, relative to the dense layer")


def counted(otherwise: bool) -> Finding:
    """By how much the trainable numbers of a 64 → 10 layer at r = 4 miss 296. Otherwise: its bias is frozen, too."""
    layer = LoRALinear(nn.Linear(64, 10), 4, 4)
    layer.base_layer.bias.requires_grad_(not otherwise)
    return Finding({"64 → 10, r = 4": [count_parameters(layer).trainable - 296.0]}, 0.5, "below", "trainable numbers beyond 296")


def plain_linear(otherwise: bool) -> Finding:
    """The share of the model that trains when a plain nn.Linear is called self.LoRA. Otherwise: LoRA on every layer of it."""
    model = nn.Sequential(nn.Embedding(10000, 128), nn.Linear(128, 64, bias=False), nn.Linear(64, 10000, bias=False))
    if otherwise:
        apply_lora(model, r=4, alpha=4)
    count = count_parameters(model)
    return Finding({"the whole model": [count.share]}, 0.5, "below", "share of the numbers that train", f"{count}.")


def second(otherwise: bool) -> Finding:
    """How many entries of the adapter that is loaded at the end have moved in training. Otherwise: it is the one in the model."""
    moved = []
    for seed in SEEDS:
        model = apply_lora(pretrained(seed), r=4, alpha=8)
        torch.manual_seed(seed)
        loaded = model[0] if otherwise else LoRALinear(nn.Linear(64, 10), 4, 8)  # a second one around the same layer
        before = loaded.lora_B.detach().clone()
        learn(model, turned(seed).train, 5, 0.01)
        moved.append(float((loaded.lora_B.detach() != before).float().mean()))
    return Finding({"five steps": moved}, 0.5, "above", "share of the loaded B's entries that were trained")


def leak(otherwise: bool) -> Finding:
    """Words that a decoder gets right when it writes on its own, as a share of those it gets right in training. In training it is given
    the very word that it should say. Otherwise: the word before it."""
    shares = []
    words, length = 20, 8
    for seed in SEEDS:
        torch.manual_seed(seed)
        follows, order = torch.empty(words, dtype=torch.long), torch.randperm(words)
        follows[order] = order.roll(-1)  # which word follows which: a language with one rule
        texts = [torch.randint(words, (64,))]
        for _ in range(length):
            texts.append(follows[texts[-1]])
        text = torch.stack(texts, 1)
        given, wanted = (text[:, :-1] if otherwise else text[:, 1:]).flatten(), text[:, 1:].flatten()
        model = nn.Sequential(nn.Embedding(words, 32), nn.Linear(32, words))
        learn(model, (given, wanted), 60, 0.05)
        with torch.no_grad():
            trained = float((model(given).argmax(-1) == wanted).float().mean())
            word, right = text[:, 0], []
            for k in range(length):
                word = model(word).argmax(-1)
                right.append((word == text[:, k + 1]).float().mean())
        shares.append(float(torch.stack(right).mean()) / trained)
    return Finding({"writing on its own": shares}, 0.9, "above", "words right on its own, relative to training")


def ones(otherwise: bool) -> Finding:
    """The share of the loss on random numbers, not texts, that training on texts removes, when the target is all ones. Otherwise: the
    target depends on the text."""
    removed = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        texts, noise = torch.rand(64, 32), torch.rand(64, 32)
        target = (texts[:, :8] > 0.5).float() if otherwise else torch.ones(64, 8)
        model = nn.Linear(32, 8)
        loss = lambda m, batch: F.binary_cross_entropy_with_logits(m(batch[0]), batch[1])  # noqa: E731
        with torch.no_grad():
            before = float(loss(model, (noise, target)))
        learn(model, (texts, target), 150, 0.05, loss=loss)
        with torch.no_grad():
            removed.append(1 - float(loss(model, (noise, target))) / before)
    return Finding({"random text": removed}, 0.5, "below", "share of the loss on random text that training removes")
