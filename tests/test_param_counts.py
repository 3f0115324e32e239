"""Arithmetic on shapes against other libraries' counts of the same adapters: tests/data/param_counts.json.

To count again with another peft: build each model of the file on the meta device, `peft.get_peft_model(model,
LoraConfig(r, target_modules, ...)).get_nb_trainable_parameters()` gives (trainable, total).
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_lab import apply_lora, count_parameters, find_targets, lora_layers, lora_parameters, remove_lora
from lora_lab.counting import lora_shape

COUNTS = json.loads((Path(__file__).parent / "data" / "param_counts.json").read_text(encoding="utf-8"))
ADAPTERS, FUSED = COUNTS["adapters"], COUNTS["fused"]


@cache
def model_of(name):
    """On the meta device: shapes without numbers, so 8 billion parameters take no memory. Shared: leave it as it was"""
    transformers = pytest.importorskip("transformers")
    entry = COUNTS["models"][name]
    kind = getattr(transformers, entry["class"])
    with torch.device("meta"):
        return kind(kind.config_class(**entry["config"])).eval()


def described(row):
    targets = row.get("target_modules", row.get("target"))
    return f"{row['model']}-r{row['r']}-{targets if isinstance(targets, str) else '+'.join(targets)}"


def targets_of(model, row):
    targets = find_targets(model, row["target_modules"])
    layers = row.get("layers_to_transform")
    if layers is None:
        return targets
    return {n: m for n, m in targets.items() if int(n.split(".h.")[1].split(".")[0]) in layers}


def rank_of(name, row):
    return next((r for end, r in row.get("rank_pattern", {}).items() if name.endswith(end)), row["r"])


@pytest.mark.parametrize("name", COUNTS["models"])
def test_whole_models(name):
    assert count_parameters(model_of(name)).total == COUNTS["models"][name]["parameters"]


@pytest.mark.parametrize("row", ADAPTERS, ids=described)
def test_arithmetic_agrees_with_peft(row):
    model = model_of(row["model"])
    targets = targets_of(model, row)
    assert len(targets) == row["adapted"]
    added = sum(lora_parameters(*lora_shape(module), rank_of(name, row)) for name, module in targets.items())
    copied = sum(count_parameters(model.get_submodule(name)).total for name in row.get("modules_to_save", ()))
    biases = sum(module.bias.numel() for module in targets.values()) if row.get("bias") == "lora_only" else 0
    assert added + copied + biases == row["trainable"]
    assert count_parameters(model).total + added + copied == row["total"]


@pytest.mark.parametrize("row", [r for r in ADAPTERS if "layers_to_transform" not in r], ids=described)
def test_an_adapted_model_has_what_was_counted(row):
    model = model_of(row["model"])
    before = count_parameters(model)
    options = {k: row[k] for k in ("rank_pattern", "modules_to_save", "bias") if k in row}
    apply_lora(model, row["r"], 16, row["target_modules"], allow_tied=True, **options)
    try:
        counted, layers = count_parameters(model), len(lora_layers(model))
    finally:
        remove_lora(model)
    assert (layers, counted.trainable, counted.total) == (row["adapted"], row["trainable"], row["total"])
    assert count_parameters(model) == before


@pytest.mark.parametrize("row", FUSED, ids=described)
def test_slices_of_a_fused_layer_agree_with_loralib(row):
    """q, k and v of `c_attn` are d x d each, with factors of their own."""
    model = model_of(row["model"])
    attention = find_targets(model, ["c_attn"])
    slices = row["target"].partition(":")[2].split(",")
    d = {lora_shape(module)[0] for module in attention.values()}.pop()
    assert {lora_shape(module) for module in attention.values()} == {(d, 3 * d)}
    assert len(attention) == row["adapted"]
    assert len(attention) * len(slices) * lora_parameters(d, d, row["r"]) == row["trainable"]
    apply_lora(model, row["r"], 16, [row["target"]])
    try:
        counted = count_parameters(model)
    finally:
        remove_lora(model)
    assert (counted.trainable, counted.total) == (row["trainable"], row["total"])


@pytest.mark.parametrize("row", COUNTS["layers"], ids=lambda row: row["layer"])
def test_single_layers(row):
    kind, sizes = row["layer"].rstrip(")").split("(")
    layer = getattr(nn, kind)(*map(int, sizes.split(",")))
    assert lora_parameters(*lora_shape(layer), row["r"]) == row["trainable"]


@pytest.mark.parametrize("row", COUNTS["matrices"], ids=lambda row: f"{row['what']}, r={row['r']}")
def test_the_papers_largest_model(row):
    assert row["matrices"] * lora_parameters(row["d"], row["d"], row["r"]) == row["trainable"]


@pytest.mark.parametrize(("layer", "found"), [
    (nn.LayerNorm(4), "LayerNorm"), (nn.Conv2d(4, 4, 3, groups=2), "Conv2d with groups=2"), (nn.ReLU(), "ReLU"),
    (nn.Conv1d(4, 4, 3), "Conv1d"),
])
def test_layers_without_a_lora_matrix_are_refused(layer, found):
    with pytest.raises(TypeError, match=f"found {found}"):
        lora_shape(layer)


def test_a_kernel_that_is_not_square():
    layer = nn.Conv2d(3, 5, kernel_size=(2, 7), stride=2, padding=1)
    assert lora_shape(layer) == (3 * 2 * 7, 5)
