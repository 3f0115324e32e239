"""apply_lora and its companions. Oracles: plain torch on copies made beforehand, and peft for what a target means."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lora_lab import (
    LoRALinear,
    apply_lora,
    coverage,
    find_targets,
    lora_disabled,
    lora_layers,
    merge,
    merge_and_unload,
    remove_lora,
    unmerge,
)

D = 6
# float64 sums of at most a few dozen terms of size 1 through three layers: 1e-12 is some 1e4 roundings
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.xq_proj = nn.Linear(D, D)  # ends in "q_proj", but not after a dot

    def forward(self, x):
        return torch.tanh(self.q_proj(x)) * self.v_proj(x) + self.xq_proj(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.norm = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x):
        return x + self.mlp(self.norm(self.attention(x)))


class Model(nn.Module):
    """Layers 1 and 10 (a name that begins with the other's), an embedding, and a head that may be tied to it."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(12, D)
        self.layers = nn.ModuleList(Block() for _ in range(11))
        self.head = nn.Linear(D, 12, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in (self.layers[1], self.layers[10]):
            x = layer(x)
        return self.head(x)


TOKENS = torch.tensor([[1, 5, 7], [0, 11, 3]])
LINEAR = [n for n, m in Model().named_modules() if type(m) is nn.Linear]


def model(tied=False, seed=1):
    torch.manual_seed(seed)
    return Model(tied).double().eval()


def adapted(seed=1, targets=("q_proj", "v_proj"), **kwargs):
    """With random B, as after training."""
    m = apply_lora(model(seed=seed), r=2, alpha=3, target_modules=list(targets), **kwargs)
    with torch.no_grad():
        for layer in lora_layers(m).values():
            layer.lora_B.normal_()
    return m


def snapshot(m):
    """Everything a refusal has to leave as it was."""
    return {
        "modules": [(n, id(x), x.training) for n, x in m.named_modules(remove_duplicate=False)],
        "parameters": [(n, id(p), p.requires_grad) for n, p in m.named_parameters(remove_duplicate=False)],
        "state": {k: v.clone() for k, v in m.state_dict().items()},
        "attributes": {n: sorted(x.__dict__) for n, x in m.named_modules()},
    }


def assert_same(before, after):
    assert before["modules"] == after["modules"]
    assert before["parameters"] == after["parameters"]
    assert before["attributes"] == after["attributes"]
    assert list(before["state"]) == list(after["state"])
    assert all(torch.equal(v, after["state"][k]) for k, v in before["state"].items())


# ---- applying -------------------------------------------------------------------------------------------------------


def test_apply_replaces_in_place_freezes_and_changes_no_output():
    m = model()
    before = m(TOKENS)
    weights = {k: v.clone() for k, v in m.state_dict().items()}
    q = m.layers[1].attention.q_proj
    assert apply_lora(m, r=2, alpha=3, target_modules=["q_proj"], dropout=0.25, rslora=True) is m
    layers = lora_layers(m)
    assert list(layers) == [f"layers.{i}.attention.q_proj" for i in range(11)]
    assert layers["layers.1.attention.q_proj"] is m.layers[1].attention.q_proj
    assert m.layers[1].attention.q_proj.base_layer is q
    for layer in layers.values():
        assert (type(layer), layer.r, layer.alpha, layer.scaling) == (LoRALinear, 2, 3, 3 / math.sqrt(2))
        assert layer.lora_A.dtype == torch.float64 and not layer.training
    assert {n for n, p in m.named_parameters() if p.requires_grad} == {
        f"{n}.{x}" for n in layers for x in ("lora_A", "lora_B")}
    assert torch.equal(m(TOKENS), before)
    for k, v in m.state_dict().items():
        if "lora_" not in k:
            assert torch.equal(v, weights[k.replace(".base_layer", "")])
    m.train()
    probability = [x.p for x in m.layers[1].attention.q_proj.modules() if isinstance(x, nn.Dropout)]
    assert probability == [0.25]


def test_each_layer_has_its_own_factors():
    first, second, *_ = lora_layers(apply_lora(model(), target_modules=["q_proj"])).values()
    assert first.lora_A is not second.lora_A
    assert not torch.equal(first.lora_A, second.lora_A)


def test_only_the_factors_move_in_training():
    m = apply_lora(model().train(), r=2, alpha=3, target_modules=["q_proj", "v_proj"])
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(m(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
    for n, p in m.named_parameters():
        used = n.startswith(("layers.1.", "layers.10.")) and "lora_" in n
        assert torch.equal(p, before[n]) != used, n


# ---- what a target means: peft decides ------------------------------------------------------------------------------


def peft_targets(m, target_modules):
    peft = pytest.importorskip("peft")
    try:
        theirs = peft.get_peft_model(copy.deepcopy(m), peft.LoraConfig(r=1, target_modules=target_modules))
    except ValueError:
        return None
    return [n.removeprefix("base_model.model.") for n, x in theirs.named_modules()
            if isinstance(x, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("target", [
    ["q_proj"], ["q_proj", "v_proj"], ["attention.q_proj"], ["layers.1.attention.q_proj"], ["mlp.0", "head"],
    "all-linear", r".*\.q_proj", r".*q_proj", r"layers\.1\..*_proj", r"layers\.(1|10)\.mlp\.[02]", "head",
])
def test_targets_mean_what_they_mean_in_peft(target):
    m = model()
    wanted = peft_targets(m, target)
    assert wanted and list(find_targets(m, target)) == wanted
    assert all(isinstance(x, nn.Linear) and x is m.get_submodule(n) for n, x in find_targets(m, target).items())


PIECES = st.sampled_from(["q_proj", "v_proj", "attention.v_proj", "1.attention.q_proj", "mlp.2", "head", "roj", "layers.0.mlp.0",
                          "_proj", "proj", "1.mlp.0", ".q_proj", "ead"])
SMALL = Model()
del SMALL.layers[3:10]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PIECES, min_size=1, max_size=3, unique=True))
def test_lists_agree_with_peft_whenever_every_entry_matches(target):
    each = [peft_targets(SMALL, [t]) for t in target]
    if all(each):
        assert sorted(find_targets(SMALL, target)) == sorted({n for names in each for n in names})
    else:  # peft drops the silent ones without a word; here they are named
        with pytest.raises(ValueError) as caught:
            find_targets(SMALL, target)
        assert all(repr(t) in str(caught.value) for t, names in zip(target, each, strict=True) if not names)


def test_all_linear_leaves_the_output_head_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                                      num_key_value_heads=2, vocab_size=16)
    m = transformers.LlamaForCausalLM(config)
    wanted = peft_targets(m, "all-linear")
    assert len(wanted) == 7 and "lm_head" not in wanted
    assert list(find_targets(m, "all-linear")) == wanted
    assert list(lora_layers(apply_lora(m, target_modules="all-linear"))) == wanted


def test_the_names_of_conv1d_layers_are_offered():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    m = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="Did you mean 'c_attn'"):
        apply_lora(m, target_modules=["attn_c"])
    del m.lm_head  # GPT-2's only nn.Linear
    with pytest.raises(ValueError, match="linear layers are transformer.h.0.attn.c_attn, "):
        apply_lora(m, target_modules=["zzzzzzzz"])


def test_model_equals_pefts():
    peft = pytest.importorskip("peft")
    m = adapted(seed=1)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(model(seed=1), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, layer in lora_layers(m).items():
            module = theirs.base_model.model.get_submodule(name)
            module.lora_A["default"].weight.copy_(layer.lora_A)
            module.lora_B["default"].weight.copy_(layer.lora_B)
    torch.testing.assert_close(m(TOKENS), theirs(TOKENS), **CLOSE)
    assert not torch.allclose(m(TOKENS), model(seed=1)(TOKENS))
    plain, wanted = merge_and_unload(m), theirs.merge_and_unload()
    assert list(plain.state_dict()) == list(wanted.state_dict())
    for k, v in plain.state_dict().items():
        torch.testing.assert_close(v, wanted.state_dict()[k], **CLOSE)


# ---- refusals -------------------------------------------------------------------------------------------------------


class WithConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.plain = nn.Conv1d(4, 8, 3)
        self.fc = nn.Linear(8, 2)


def tied():
    return model(tied=True)


def convolution():
    return WithConvolution().double()


REFUSALS = {
    "no match": (model, {"target_modules": ["query"]}, ["query", "q_proj"]),
    "no match, regex": (model, {"target_modules": "q_proj"}, ["q_proj", "whole name", "list"]),
    "one of two": (model, {"target_modules": ["q_proj", "v_prj"]}, ["v_prj", "v_proj"]),
    "two of three": (model, {"target_modules": ["k_proj", "q_proj", "haed"]}, ["k_proj", "haed", "head"]),
    "empty list": (model, {"target_modules": []}, ["empty"]),
    "not a regex": (model, {"target_modules": "layers.(0"}, ["layers.(0", "regular expression"]),
    "r is 0": (model, {"r": 0, "target_modules": ["q_proj"]}, ["r ", "0"]),
    "r is negative": (model, {"r": -4, "target_modules": ["q_proj"]}, ["r ", "-4"]),
    "r is a fraction": (model, {"r": 1.5, "target_modules": ["q_proj"]}, ["r ", "1.5"]),
    "alpha is NaN": (model, {"alpha": math.nan, "target_modules": ["q_proj"]}, ["alpha", "nan"]),
    "alpha is infinite": (model, {"alpha": -math.inf, "target_modules": ["q_proj"]}, ["alpha", "-inf"]),
    "dropout is 1": (model, {"dropout": 1.0, "target_modules": ["q_proj"]}, ["dropout", "1.0"]),
    "dropout is negative": (model, {"dropout": -0.5, "target_modules": ["q_proj"]}, ["dropout", "-0.5"]),
    "grouped convolution": (convolution, {"target_modules": ["conv"]}, ["conv", "Conv2d"]),
    "convolution among others": (convolution, {"target_modules": ["fc", "plain"]}, ["plain", "Conv1d"]),
    "slices of an embedding": (model, {"target_modules": ["embedding:q,v"]}, ["embedding", "fused", "Embedding"]),
    "slices that are none": (model, {"target_modules": ["q_proj:q,w"]}, ["q_proj:q,w", "slices"]),
    "sliced twice": (model, {"target_modules": ["q_proj:q", "q_proj:v"]}, ["q_proj", "twice"]),
    "rank pattern for nobody": (model, {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}, ["rank_pattern", "v_proj", "q_proj"]),
    "alpha pattern for nobody": (model, {"target_modules": ["q_proj"], "alpha_pattern": {"k_proj": 3}}, ["alpha_pattern", "k_proj"]),
    "a rank in a pattern": (model, {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}}, ["rank_pattern", "q_proj", "found 0"]),
    "unknown bias": (model, {"target_modules": ["q_proj"], "bias": "some"}, ["bias", "some", "lora_only"]),
    "nothing to save": (model, {"target_modules": ["q_proj"], "modules_to_save": ["haed"]}, ["haed", "head"]),
    "container": (model, {"target_modules": ["mlp"]}, ["mlp", "Sequential"]),
    "tied head": (tied, {"target_modules": ["head"]}, ["head", "embedding", "allow_tied"]),
    "tied head by all-linear": (tied, {"target_modules": "all-linear"}, ["head", "embedding", "allow_tied"]),
    "model is the target": (lambda: nn.Linear(4, 3), {"target_modules": "all-linear"}, ["LoRALinear"]),
    "adapter of integers": (model, {"adapter_dtype": torch.int64, "target_modules": ["q_proj"]}, ["int64"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_why_and_leaves_the_model_untouched(case):
    build, arguments, words = REFUSALS[case]
    m = build()
    before = snapshot(m)
    with pytest.raises((ValueError, TypeError)) as caught:
        apply_lora(m, **arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert_same(before, snapshot(m))


def test_a_second_application_is_refused():
    m = adapted()
    before = snapshot(m)
    for targets in (["q_proj"], ["head"], "all-linear"):
        with pytest.raises(ValueError, match="already"):
            apply_lora(m, target_modules=targets)
    assert_same(before, snapshot(m))
    remove_lora(m)
    assert len(lora_layers(apply_lora(m, target_modules=["head"]))) == 1


def test_every_refusal_has_its_own_message():
    messages = {}
    for case, (build, arguments, _) in REFUSALS.items():
        if case != "tied head by all-linear":  # the same refusal as "tied head"
            with pytest.raises((ValueError, TypeError)) as caught:
                apply_lora(build(), **arguments)
            messages.setdefault(str(caught.value), []).append(case)
    assert all(len(cases) == 1 for cases in messages.values()), messages


@pytest.mark.parametrize("function", [merge, unmerge, merge_and_unload, remove_lora])
def test_a_model_without_lora_is_told_so(function):
    m = model()
    before = snapshot(m)
    with pytest.raises(ValueError, match="LoRA"):
        function(m)
    assert_same(before, snapshot(m))


def test_tied_head_when_asked_for():
    m = apply_lora(model(tied=True), r=2, alpha=3, target_modules=["head"], allow_tied=True)
    assert m.head.base_layer.weight is m.embedding.weight
    m.eval()
    torch.nn.init.normal_(m.head.lora_B)
    table, out = m.embedding.weight.detach().clone(), m(TOKENS)
    merge(m)
    unmerge(m)
    assert m.head.base_layer.weight is m.embedding.weight
    assert torch.equal(m.embedding.weight, table)
    assert torch.equal(m(TOKENS), out)


def test_a_layer_that_stands_in_two_places_stays_one():
    m = nn.ModuleDict({"a": nn.Linear(D, D), "b": nn.Linear(D, D)}).double()
    m["c"] = m["a"]
    apply_lora(m, r=2, alpha=3, target_modules=["a", "b", "c"])
    assert m["a"] is m["c"] and m["a"] is not m["b"]
    remove_lora(m)
    assert type(m["a"]) is nn.Linear and m["a"] is m["c"]


def test_a_layer_that_stands_in_two_places_is_adapted_in_both_or_refused():
    """Half-adapted, merging through one name would change what the other computes."""
    m = nn.ModuleDict({"a": nn.Linear(D, D)}).double().eval()
    m["c"] = m["a"]
    x = torch.randn(3, D, dtype=torch.float64)
    try:
        apply_lora(m, r=2, alpha=3, target_modules=["a"])
    except ValueError as error:
        assert "'a'" in str(error) and "'c'" in str(error)
        return
    torch.nn.init.normal_(m["a"].lora_B)
    before = m["c"](x)
    merge(m)
    torch.testing.assert_close(m["c"](x), before, **CLOSE)


# ---- modules whose forward does not call their Linear layers -----------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_encoder_layer_computes_with_lora_in_eval_mode_too(norm_first):
    """nn.TransformerEncoderLayer has a fast path in eval mode that reads linear1.weight and never calls linear1."""
    m = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    m.eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    plain = m(x)
    try:
        apply_lora(m, r=2, alpha=3, target_modules=["linear1", "linear2"])
    except (ValueError, TypeError) as error:
        assert "linear1" in str(error)
        return
    torch.testing.assert_close(m(x), plain, **CLOSE)
    for layer in lora_layers(m).values():
        torch.nn.init.normal_(layer.lora_B)
    m.train()
    wanted = m(x)
    assert not torch.allclose(wanted, plain)
    m.eval()
    torch.testing.assert_close(m(x), wanted, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(m(x), wanted, **CLOSE)
    with torch.no_grad(), lora_disabled(m):
        torch.testing.assert_close(m(x), plain, **CLOSE)


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"]])
def test_no_target_is_adapted_without_effect(targets):
    """nn.MultiheadAttention reads out_proj.weight and never calls out_proj: an adapter there must work or be refused."""
    m = nn.Sequential()
    m.add_module("fc", nn.Linear(8, 8))
    m.add_module("attention", nn.MultiheadAttention(8, 2, batch_first=True))
    m.double()
    try:
        apply_lora(m, r=2, alpha=3, target_modules=targets)
    except (ValueError, TypeError) as error:
        assert "out_proj" in str(error)
        return
    m.train()
    x = m.fc(torch.randn(2, 5, 8, dtype=torch.float64))
    m.attention(x, x, x)[0].square().sum().backward()
    for name, layer in lora_layers(m).items():
        assert layer.lora_B.grad is not None and layer.lora_B.grad.any(), f"{name} gets no gradient"


# ---- in and out -----------------------------------------------------------------------------------------------------


def test_merge_and_unmerge_the_model():
    m = adapted()
    state = {k: v.clone() for k, v in m.state_dict().items()}
    out = m(TOKENS)
    report = merge(m)
    assert list(report) == list(lora_layers(m))
    assert all(0 <= share < 1e-12 for share in report.values())  # float64: rounding in the sixteenth digit
    assert all(layer.merged for layer in lora_layers(m).values())
    torch.testing.assert_close(m(TOKENS), out, **CLOSE)
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert merge(m) == report
    unmerge(m)
    assert not any(layer.merged for layer in lora_layers(m).values())
    assert torch.equal(m(TOKENS), out)


@pytest.mark.parametrize("merged_first", [False, True])
def test_merge_and_unload_is_a_plain_model_with_the_same_function(merged_first):
    m, plain = adapted(), model()
    out = m(TOKENS)
    wanted = {}
    for name, layer in lora_layers(m).items():
        wanted[f"{name}.weight"] = layer.base_layer.weight.detach() + 3 / 2 * (layer.lora_B @ layer.lora_A).detach()
    if merged_first:
        merge(m)
    assert merge_and_unload(m) is m
    assert lora_layers(m) == {}
    assert [(n, type(x)) for n, x in m.named_modules()] == [(n, type(x)) for n, x in plain.named_modules()]
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(TOKENS), out, **CLOSE)
    for k, v in wanted.items():
        torch.testing.assert_close(m.state_dict()[k], v, **CLOSE)
    untouched = model().state_dict()
    assert all(torch.equal(v, untouched[k]) for k, v in m.state_dict().items() if k not in wanted)


@pytest.mark.parametrize("merged_first", [False, True])
def test_remove_puts_back_what_was_there(merged_first):
    m = model()
    m.embedding.requires_grad_(False)
    m.layers[2].train()
    before, out = snapshot(m), m(TOKENS)
    apply_lora(m, r=2, alpha=3, target_modules=["q_proj", "head"], dropout=0.1)
    with torch.no_grad():
        for layer in lora_layers(m).values():
            layer.lora_B.normal_()
    if merged_first:
        merge(m)
    assert remove_lora(m) is m
    assert_same(before, snapshot(m))  # also which parameters were trainable
    assert torch.equal(m(TOKENS), out)


def test_disabled_model_is_the_base_model():
    m = adapted(dropout=0.3)
    plain, out = model()(TOKENS), m(TOKENS)
    for merged in (False, True):
        if merged:
            merge(m)
        now = m(TOKENS)
        with lora_disabled(m) as inside:
            assert inside is m
            assert torch.equal(m(TOKENS), plain)
        assert torch.equal(m(TOKENS), now)
    unmerge(m)
    with pytest.raises(KeyError), lora_disabled(m):
        raise KeyError
    assert torch.equal(m(TOKENS), out)


def test_nested_disabling_restores_what_it_found():
    m = adapted()
    plain, out = model()(TOKENS), m(TOKENS)
    with lora_disabled(m):
        with lora_disabled(m):
            pass
        assert torch.equal(m(TOKENS), plain)
    assert torch.equal(m(TOKENS), out)


def test_a_copy_of_a_merged_model_is_independent():
    m = adapted()
    out = m(TOKENS)
    merge(m)
    twin = copy.deepcopy(m)
    remove_lora(twin)
    assert torch.equal(twin(TOKENS), model()(TOKENS))
    unmerge(m)
    assert torch.equal(m(TOKENS), out)


def test_a_checkpoint_of_a_merged_model_loads_into_a_fresh_one(tmp_path):
    m = adapted()
    out = m(TOKENS)
    merge(m)
    torch.save(m.state_dict(), tmp_path / "merged.pt")
    fresh = apply_lora(model(seed=5), r=2, alpha=3, target_modules=["q_proj", "v_proj"])
    fresh.load_state_dict(torch.load(tmp_path / "merged.pt", weights_only=True))
    torch.testing.assert_close(fresh(TOKENS), out, **CLOSE)


# ---- coverage -------------------------------------------------------------------------------------------------------


def test_coverage_counts_every_linear_layer_once():
    m = adapted()
    report = coverage(m)
    assert set(report.matched) == set(lora_layers(m))
    assert set(report.matched) | set(report.unmatched) == set(LINEAR)
    assert not set(report.matched) & set(report.unmatched)
    assert report.trainable == 22 * 2 * (D + D)  # 11 layers, q and v, r=2, 6 x 6
    assert report.total == sum(p.numel() for p in model().parameters()) + report.trainable
    assert report.trainable_elsewhere == ()
    text = str(report)
    assert f"22 of {len(LINEAR)}" in text and "528" in text  # 22 layers of 2 (6 + 6)


def test_coverage_names_what_trains_outside_the_adapters():
    m = adapted()
    m.layers[1].norm.requires_grad_(True)
    report = coverage(m)
    assert set(report.trainable_elsewhere) == {"layers.1.norm.weight", "layers.1.norm.bias"}
    assert "layers.1.norm.weight" in str(report)


def test_coverage_of_a_plain_model():
    report = coverage(model())
    assert report.matched == () and set(report.unmatched) == set(LINEAR)
