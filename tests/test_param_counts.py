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
from lora_lab.counting import adapter_parameters, conv_parameters, count_modules, lora_shape, method_parameters, prefix_parameters
from lora_lab.presets import Architecture, Row, build, from_config, gpu_bytes, gpus, meta_model, preset, presets
from lora_lab.printed import printed_figures

COUNTS = json.loads((Path(__file__).parent / "data" / "param_counts.json").read_text(encoding="utf-8"))
FORMULAS = json.loads((Path(__file__).parent / "data" / "formula_counts.json").read_text(encoding="utf-8"))
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


# ---- presets: numbers in a file against models of transformers


CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertModel", "roberta": "RobertaModel", "vit": "ViTForImageClassification"}


def transformers_config(a):
    """An architecture in transformers' words. Written out here, so that presets.py is not asked what it should be compared with."""
    if a.family == "gpt2":
        return {"n_layer": a.layers, "n_embd": a.d_model, "n_head": a.heads, "vocab_size": a.vocab, "n_positions": a.context}
    found = {"hidden_size": a.d_model, "num_hidden_layers": a.layers, "num_attention_heads": a.heads, "intermediate_size": a.d_ff}
    if a.family == "vit":
        return found | {"image_size": a.image, "patch_size": a.patch, "num_labels": a.labels}
    found |= {"vocab_size": a.vocab, "max_position_embeddings": a.context}
    if a.family == "llama":
        return found | {"num_key_value_heads": a.kv_heads, "tie_word_embeddings": False}
    if a.family == "roberta":
        found |= {"max_position_embeddings": a.context + 2, "type_vocab_size": 1}
    return found | ({"num_labels": a.labels} if a.labels else {})


def transformers_model(a, **more):
    transformers = pytest.importorskip("transformers")
    name = CLASSES[a.family]
    if a.labels and a.family != "vit":
        name = name.replace("Model", "ForSequenceClassification")
    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(kind.config_class(**transformers_config(a), **more))


@cache
def preset_in_transformers(name):
    return transformers_model(preset(name))


@pytest.mark.parametrize("name", presets())
def test_a_preset_has_every_shape_of_the_real_model(name):
    wanted = {n: tuple(p.shape) for n, p in preset_in_transformers(name).named_parameters()}
    assert {n: tuple(p.shape) for n, p in preset(name).build().named_parameters()} == wanted


@pytest.mark.parametrize(("name", "labels"), [("bert-base", 2), ("roberta-base", 3), ("roberta-large", 5), ("vit-b16", 101)])
def test_heads_of_classifiers(name, labels):
    a = preset(name).changed(labels=labels)
    wanted = {n: tuple(p.shape) for n, p in transformers_model(a).named_parameters()}
    assert {n: tuple(p.shape) for n, p in a.build().named_parameters()} == wanted


THREE = {
    "gpt2": [["c_attn"], ["c_attn", "attn.c_proj"], "all-linear"],
    "llama": [["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"], "all-linear"],
    "bert": [["query", "value"], ["query", "key", "value", "dense"], "all-linear"],
    "roberta": [["query", "value"], ["query", "key", "value", "dense"], "all-linear"],
    "vit": [["q_proj", "v_proj"], ["fc1", "fc2"], "all-linear"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", presets())
@pytest.mark.parametrize("number", range(3))
def test_every_preset_counts_as_peft_does(name, number):
    peft = pytest.importorskip("peft")
    targets, real = THREE[preset(name).family][number], preset_in_transformers(name)
    blueprint = preset(name).build()
    for r in (1, 4, 16, 64):
        theirs = peft.get_peft_model(real, peft.LoraConfig(r=r, target_modules=targets))
        wanted, rows = theirs.get_nb_trainable_parameters(), count_modules(theirs)
        assert sum(row.added for row in rows) == wanted[0]
        theirs.unload()
        ours = count_parameters(apply_lora(blueprint, r, 16, targets))
        mine = count_modules(blueprint)
        remove_lora(blueprint)
        assert (ours.trainable, ours.total) == wanted
        assert {row.name: row.added for row in mine if row.added} == {row.name: row.added for row in rows if row.added}


def test_a_head_trained_in_full_counts_as_in_peft():
    peft = pytest.importorskip("peft")
    a = preset("roberta-base").changed(labels=3)
    theirs = peft.get_peft_model(transformers_model(a), peft.LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"]))
    ours = count_parameters(apply_lora(a.build(), 8, 16, ["query", "value"], modules_to_save=["classifier"]))
    assert (ours.trainable, ours.total) == theirs.get_nb_trainable_parameters() == (887_811, 125_535_750)


# ---- from a folder, from a table


@pytest.mark.parametrize("a", [
    preset("pocket"), preset("gpt2-medium").changed(layers=2), preset("llama-3.1-8b").changed(layers=1), preset("mistral-7b").changed(layers=1),
    preset("bert-base").changed(labels=3), preset("roberta-base"), preset("vit-b16").changed(labels=7),
], ids=lambda a: a.name)  # fmt: skip
def test_a_folder_with_a_configuration(tmp_path, a):
    model = transformers_model(a)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    found = from_config(tmp_path)
    assert (found.family, found.layers, found.d_model, found.heads, found.kv_heads, found.labels, found.context) == (
        a.family, a.layers, a.d_model, a.heads, a.kv_heads, a.labels, a.context)  # fmt: skip
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {n: tuple(p.shape) for n, p in meta_model(tmp_path).named_parameters()} == wanted


def test_a_family_that_only_transformers_knows(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, vocab_size=99, word_embed_proj_dim=32)
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'opt'; known here are bert"):
        from_config(tmp_path)
    with torch.device("meta"):
        wanted = count_parameters(transformers.OPTForCausalLM(config)).total
    assert count_parameters(meta_model(tmp_path)).total == wanted


def test_a_table_of_shapes():
    model = build([Row("enc.q", "Linear", (8, 8)), Row("enc.emb", "Embedding", (20, 8)), Row("head", "Linear", (20, 8), tied="enc.emb"),
                   Row("conv", "Conv2d", (32, 16, 3, 3), True), Row("fused", "Conv1D", (8, 24), True)])  # fmt: skip
    assert count_parameters(model).total == 64 + 160 + (32 * 16 * 9 + 32) + (8 * 24 + 24)
    apply_lora(model, 4, 8, ["q", "conv", "fused:q,v"])
    assert {row.name: row.added for row in count_modules(model) if row.added} == {"enc.q": 64, "conv": 704, "fused": 4 * 4 * 8}
    with pytest.raises(RuntimeError, match="shapes and no numbers"):
        model(torch.ones(1))


@pytest.mark.parametrize(("call", "said"), [
    (lambda p: preset("gpt2_medium"), "did you mean 'gpt2-medium'"),
    (lambda p: meta_model("lama-7b"), "did you mean 'llama-7b'.*A model on disk is a folder"),
    (lambda p: gpu_bytes("A100"), "did you mean 'A100-40' or 'A100-80'"),
    (lambda p: Architecture("gtp2", 1, 8, 2), "family 'gtp2' is not one of gpt2.*did you mean 'gpt2'"),
    (lambda p: Architecture("gpt2", 1, 9, 2, vocab=5, context=4), "d_model must be a multiple of heads"),
    (lambda p: Architecture("gpt2", 0, 8, 2, context=4), "layers=0, vocab=0"),
    (lambda p: Architecture("vit", 1, 8, 2, image=30, patch=16), "image must be a multiple of patch"),
    (lambda p: preset("gpt2").changed(layer=3), "no layer.*did you mean 'layers'"),
    (lambda p: from_config(p), "no .*config.json; it holds notes.txt"),
    (lambda p: from_config(p / "notes.txt"), "is no JSON text"),
])  # fmt: skip
def test_what_is_not_there_is_said(tmp_path, call, said):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        call(tmp_path)


def test_changed_numbers_keep_their_proportions():
    a = preset("gpt2").changed(d_model=512, heads=8)
    assert (a.d_ff, a.kv_heads) == (2048, 8)
    assert preset("llama-7b").changed(d_model=2048).d_ff == 11008  # it was not 4 d before
    assert preset("pocket").dropout == 0.0 and preset("gpt2").dropout == 0.1


def test_gpus_are_near_what_is_printed_on_the_box():
    for name, gpu in gpus().items():
        # "16 GB" is between 16 * 10^9 and 16 * 2^30 bytes, less a few percent for error correction
        printed = float(gpu["printed"].split()[0])
        assert 0.93 * printed * 2**30 < gpu_bytes(name) <= printed * 2**30 * 1.0001, name


# ---- formulas


@pytest.mark.parametrize("row", FORMULAS["gpt3_baselines"], ids=lambda row: f"{row['method']} {row['value']}")
def test_baselines_of_gpt3(row):
    d, blocks, method = 12288, 96, row["method"]
    found = {
        "AdapterH": lambda: adapter_parameters(d, row["r"], 2 * blocks),
        "PreEmbed": lambda: prefix_parameters(d, row["lp"], row["li"]),
        "PreLayer": lambda: prefix_parameters(d, row["lp"], row["li"], blocks),
        "LoRA+PE": lambda: 2 * blocks * lora_parameters(d, d, row["r"]) + prefix_parameters(d, row["lp"], row["li"]),
    }[method]()
    assert found == row["value"]


def test_baselines_of_gpt2():
    values = [row["value"] for row in FORMULAS["gpt2_baselines"]]
    block = count_parameters(model_of("gpt2-medium").transformer.h[0])
    assert values == [
        2 * block.total, adapter_parameters(1024, 6, 24, 24), adapter_parameters(1024, 224, 24, 24), adapter_parameters(1280, 8, 36, 36),
        adapter_parameters(1280, 248, 36, 36), adapter_parameters(1024, 112, 48),
    ]  # fmt: skip


def test_published_checkpoints():
    """fp32 numbers of LoRA (r=8, or 16 for DeBERTa) and the head that was saved with it."""
    def classifier(name, labels, r):
        a = preset(name).changed(labels=labels)
        return count_parameters(apply_lora(a.build(), r, 16, ["query", "value"], modules_to_save=["classifier"])).trainable

    gpt2 = lambda name: count_parameters(apply_lora(preset(name).build(), 4, 32, ["c_attn:q,v"])).trainable  # noqa: E731
    found = {"GPT-2 M E2E": gpt2("gpt2-medium"), "GPT-2 L E2E": gpt2("gpt2-large"), "RoBERTa-base MNLI": classifier("roberta-base", 3, 8),
             "RoBERTa-large MNLI": classifier("roberta-large", 3, 8), "GPT-3 r_q=r_v=4 fp16": 192 * lora_parameters(12288, 12288, 4),
             # with the pooler and the classifier of three labels
             "DeBERTa-XXL MNLI": 96 * lora_parameters(1536, 1536, 16) + (1536**2 + 1536) + (3 * 1536 + 3)}  # fmt: skip
    assert {row["model"]: row["params"] for row in FORMULAS["checkpoints"]} == found


def test_llama_with_and_without_its_head():
    targets = {"mlp": ["gate_proj", "up_proj", "down_proj"], "attn": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    targets["all"] = targets["mlp"] + targets["attn"]
    for row in FORMULAS["with_head"]:
        which, r = row["cfg"].split(" r=")
        for key, more in (("without_head", []), ("with_lm_head", ["lm_head"])):
            model = apply_lora(preset("llama-3.1-8b").build(), int(r), 16, targets[which] + more)
            assert count_parameters(model).trainable == row[key]


def test_single_layers_of_every_kind():
    by_name = {row["layer"]: row for row in FORMULAS["layers"]}
    assert by_name["Linear(64,10)+DoRA"]["peft"] == method_parameters("dora", 64, 10, 4)
    conv = by_name["Conv2d(16,32,k=3)"]
    assert (conv["peft"], conv["loralib"]) == (conv_parameters(16, 32, 3, 4), conv_parameters(16, 32, 3, 4, "loralib"))
    model = apply_lora(nn.Sequential(nn.Linear(64, 10)), 4, 8, ["0"], bias="lora_only")
    assert by_name["Linear(64,10)+bias=lora_only"]["peft"] == count_parameters(model).trainable


def test_slips_that_people_make():
    forgot_bias, cubed, dense, _ = FORMULAS["slips"]
    layer = apply_lora(nn.Sequential(nn.Linear(64, 10)), 4, 8, ["0"])
    assert count_parameters(layer).trainable == forgot_bias["claimed_trainable"]
    layer[0].base_layer.bias.requires_grad_(True)
    assert count_parameters(layer).trainable == forgot_bias["actual_trainable"]
    assert lora_parameters(768, 768, 32) == cubed["true_lora"] and 32 * 768**2 == cubed["params"]
    whole = nn.Sequential(nn.Embedding(10000, 128), nn.Linear(128, 64, bias=False), nn.Linear(64, 10000, bias=False))
    assert count_parameters(whole).trainable == dense["trainable"] == dense["total"]


def test_what_the_paper_prints():
    """`computed` against sums written out here or counted elsewhere; `verdict` against what the printed text says."""
    figures = {(f.where, f.what): f for f in printed_figures()}
    exact = {row["what"]: row.get("exact") for row in FORMULAS["paper_vs_exact"]}
    assert figures["table 3", "GPT-2 medium, LoRA on W_q, W_v, r=4"].computed == exact["GPT-2 M LoRA r=4 q,v"] == 393_216
    assert figures["table 3", "GPT-2 large, LoRA on W_q, W_v, r=4"].computed == exact["GPT-2 L LoRA r=4 q,v"]
    assert figures["table 3", "GPT-2 medium, all parameters"].computed == exact["GPT-2 M base"]
    assert figures["table 15", "GPT-3, LoRA on all four, r=64"].computed == exact["GPT-3 all4 r=64"]
    assert figures["table 4", "GPT-3, all parameters"].computed == 174_604_259_328
    assert figures["abstract", "fewer trainable parameters, GPT-3"].computed == pytest.approx(175_255.8 / 18.874368, rel=1e-12)  # one division
    assert figures["section 4.2", "faster training"].computed == pytest.approx(24.6, abs=0.05)  # given to a tenth
    for figure in figures.values():
        if figure.unit == "parameters":
            digits = figure.printed.removesuffix("M").replace(",", "")
            decimals = len(digits.partition(".")[2])
            same = f"{figure.computed / 1e6:.{decimals}f}" == digits
            assert same == (figure.verdict == "equal"), figure
        assert figure.where in str(figure) and figure.formula in str(figure)
