"""The options of apply_lora. peft decides what patterns, biases, saved modules and "all-linear" mean; where we differ, it is said."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adapt import CLOSE, TOKENS, assert_same, model, snapshot
from torch import nn
from torch.nn import functional as F

from lora_lab import (
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
from lora_lab.adapt import TrainedCopy, trained_biases
from lora_lab.layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRAFusedLinear, LoRALinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 23}


def gpt2(**options):
    config = transformers.GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=23, n_positions=16, **options)
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, max_position_embeddings=16, num_labels=3))


def roberta():
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=18, num_labels=3, pad_token_id=0)
    return transformers.RobertaForSequenceClassification(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2, vocab_size=23, decoder_start_token_id=0))


def vit():
    config = transformers.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


MODELS = {"gpt2": gpt2, "bert": bert, "roberta": roberta, "llama": llama, "t5": t5, "vit": vit}
SEQUENCE = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS"}  # what peft has to be told, and we read off the class


def build(name, seed=1, **options):
    torch.manual_seed(seed)
    m = MODELS[name](**options).double().eval()
    with torch.no_grad():  # zeros and ones would hide what is swapped or forgotten
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m


def run(name, m):
    torch.manual_seed(5)
    ids = torch.randint(1, 23, (2, 6))
    if name == "vit":
        return m(torch.randn(2, 3, 8, 8, dtype=torch.float64)).logits
    return (m(input_ids=ids, labels=ids) if name == "t5" else m(ids)).logits


def frozen(name):
    """What the bare model computes. torch.matmul takes another path through T5's attention when its inputs need no gradient."""
    return run(name, build(name).requires_grad_(False))


def randomised(m, seed=3):
    """As after training: every trainable number moves."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return m


def in_peft(m, **config):
    config = peft.LoraConfig(**({"r": 2, "lora_alpha": 3} | config))
    return peft.get_peft_model(copy.deepcopy(m), config, autocast_adapter_dtype=False)


def peft_layers(theirs):
    return {n.removeprefix("base_model.model."): x for n, x in theirs.named_modules() if isinstance(x, peft.tuners.lora.LoraLayer)}


def peft_trains(theirs):
    """Our names of the base model's parameters (those of copies included) that peft trains."""
    names = set()
    for n, p in theirs.named_parameters():
        if p.requires_grad and "lora_" not in n:
            n = n.removeprefix("base_model.model.").replace(".modules_to_save.default", ".trained").replace(".original_module", ".base_layer")
            names.add(n)
    return names


def trains(m):
    return {n for n, p in m.named_parameters() if p.requires_grad and "lora_" not in n}


# ---- rank_pattern, alpha_pattern ------------------------------------------------------------------------------------

PATTERNS = [
    {"c_attn": 5}, {"h.1.attn.c_attn": 5}, {"transformer.h.0.attn.c_attn": 1, "c_attn": 5}, {"c_attn": 5, "c_(attn|fc)": 1},
    {r"h\.\d\.attn.c_attn": 5, "mlp.c_proj": 7}, {"c_(attn|fc)": 5}, {r"0\..*": 5, "c_proj": 7}, {"^transformer.h.1.mlp.c_fc": 4},
    {".*": 6}, {"h.[01].attn.*": 4}, {"c_attn|c_fc": 9},
]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_choose_what_peft_chooses(pattern, rslora):
    m = build("gpt2")
    targets = ["c_attn", "c_fc", "mlp.c_proj"]
    alphas = {k: 10 * v for k, v in pattern.items()}
    theirs = peft_layers(in_peft(m, target_modules=targets, rank_pattern=pattern, alpha_pattern=alphas, use_rslora=rslora))
    apply_lora(m, r=2, alpha=3, target_modules=targets, rank_pattern=pattern, alpha_pattern=alphas, rslora=rslora)
    ours = lora_layers(m)
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        other = theirs[name]
        assert (layer.r, layer.alpha) == (other.r["default"], other.lora_alpha["default"]), name
        assert layer.scaling == pytest.approx(other.scaling["default"], rel=1e-15)  # one rounding
        assert layer.lora_A.shape == other.lora_A["default"].weight.shape
        assert layer.lora_B.shape == other.lora_B["default"].weight.shape
    assert len({layer.r for layer in ours.values()}) > 1 or ".*" in pattern


PIECES = st.sampled_from(["c_attn", "attn", "c_", ".*", "h.0", r"h\.0.*", "1.attn.c_attn", "transformer", "mlp.c_fc", "(c_fc|c_attn)", "fc", r".*c_fc"])
TARGETS = [f"transformer.h.{i}.{n}" for i in range(2) for n in ("attn.c_attn", "mlp.c_fc")]


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=4, unique=True))
def test_any_pattern_decides_as_in_peft_or_is_named(keys):
    """A key that decides for nothing is refused; peft passes over it in silence."""
    from peft.utils.other import get_pattern_key

    from lora_lab.adapt import _by_pattern

    pattern = {k: 10 + i for i, k in enumerate(keys)}
    wanted = {n: pattern.get(get_pattern_key(list(pattern), n), 2) for n in TARGETS}
    unused = [k for k in keys if pattern[k] not in wanted.values()]
    if not unused:
        assert _by_pattern(pattern, TARGETS, 2, "rank_pattern") == wanted
    else:
        with pytest.raises(ValueError) as caught:
            _by_pattern(pattern, TARGETS, 2, "rank_pattern")
        assert all(repr(k) in str(caught.value) for k in unused)


def test_patterns_and_slices_meet():
    m = apply_lora(build("gpt2"), r=2, alpha=3, target_modules=["c_attn:q,v", "c_fc"], rank_pattern={"h.1.attn.c_attn": 5}, alpha_pattern={"c_fc": 8})
    found = {n: (type(x), x.r, x.alpha) for n, x in lora_layers(m).items()}
    assert found == {
        "transformer.h.0.attn.c_attn": (LoRAFusedLinear, 2, 3), "transformer.h.0.mlp.c_fc": (LoRAConv1D, 2, 8),
        "transformer.h.1.attn.c_attn": (LoRAFusedLinear, 5, 3), "transformer.h.1.mlp.c_fc": (LoRAConv1D, 2, 8),
    }


# ---- "all-linear" ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in MODELS if n != "roberta"])
def test_all_linear_means_what_it_means_in_peft(name):
    m = build(name)
    plain = frozen(name)
    wanted = peft_layers(in_peft(m, target_modules="all-linear", task_type=SEQUENCE.get(name)))
    assert list(find_targets(m, "all-linear")) == list(wanted)
    apply_lora(m, target_modules="all-linear")
    assert list(lora_layers(m)) == list(wanted)
    assert torch.equal(run(name, m), plain)


def test_all_linear_leaves_a_head_of_several_layers_alone():
    """peft excludes a head by its own name, so RoBERTa's two-layer head stays a target unless modules_to_save keeps it out, which
    its task type does. We leave the layers in it out from the start: they are fresh and want training in full."""
    m = build("roberta")
    wanted = set(peft_layers(in_peft(m, target_modules="all-linear", task_type="SEQ_CLS")))
    assert set(find_targets(m, "all-linear")) == {n for n in wanted if not n.startswith("classifier")}
    assert len(find_targets(m, "all-linear")) == 12  # 2 layers of q, k, v, and three dense ones


def test_all_linear_differs_from_peft_for_attention_that_bypasses_its_layers():
    """nn.MultiheadAttention never calls out_proj; peft wraps the whole module or skips it, an adapter of ours would sit idle."""
    m = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    assert list(find_targets(m, "all-linear")) == ["fc"]


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn", "c_proj"], ["c_attn:q,v"], ["c_attn:k", "wte"], ["wpe", "c_fc:q"], r".*\.attn\.c_\w+"])
def test_a_gpt2_with_lora_is_the_gpt2_then_learns_merges_and_comes_out(targets):
    m = build("gpt2", tie_word_embeddings=False)
    before, plain = snapshot(m), run("gpt2", m)
    apply_lora(m, r=2, alpha=3, target_modules=targets)
    assert torch.equal(run("gpt2", m), plain)
    kinds = {"wte": LoRAEmbedding, "wpe": LoRAEmbedding}
    fused = [t for t in targets if ":" in t] if isinstance(targets, list) else []
    for name, layer in lora_layers(m).items():
        wanted = kinds.get(name.rpartition(".")[2], LoRAFusedLinear if any(name.endswith(t.split(":")[0]) for t in fused) else LoRAConv1D)
        assert type(layer) is wanted, name
    learnt = run("gpt2", randomised(m))
    assert not torch.allclose(learnt, plain)
    merge(m)
    torch.testing.assert_close(run("gpt2", m), learnt, **CLOSE)
    with lora_disabled(m):
        assert torch.equal(run("gpt2", m), plain)
    twin = copy.deepcopy(m)
    torch.testing.assert_close(run("gpt2", merge_and_unload(twin)), learnt, **CLOSE)
    assert [type(x) for x in twin.modules()] == [type(x) for x in build("gpt2", tie_word_embeddings=False).modules()]
    remove_lora(m)
    assert_same(before, snapshot(m))
    assert torch.equal(run("gpt2", m), plain)


def test_a_small_convolutional_network():
    torch.manual_seed(1)
    m = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, (3, 1), stride=2), nn.Flatten(), nn.Linear(30, 2)).double().eval()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    before, plain = snapshot(m), m(x)
    apply_lora(m, r=2, alpha=3, target_modules=["0", "2", "4"])
    assert [type(layer) for layer in lora_layers(m).values()] == [LoRAConv2d, LoRAConv2d, LoRALinear]
    assert torch.equal(m(x), plain)
    learnt = randomised(m)(x)
    merge(m)
    torch.testing.assert_close(m(x), learnt, **CLOSE)
    remove_lora(m)
    assert_same(before, snapshot(m))


# ---- slices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "slices"), [
    ("c_attn:q", (0,)), ("c_attn:v,q", (0, 2)), ("attn.c_attn:q,k,v", (0, 1, 2)), ("c_attn: k , v", (1, 2)),
    ("transformer.h.1.attn.c_attn:k", (1,)),
])
def test_slices_by_name(target, slices):
    m = apply_lora(build("gpt2"), r=2, alpha=3, target_modules=[target])
    layers = lora_layers(m)
    assert len(layers) == (1 if "h.1" in target else 2)
    assert all(layer.slices == slices and layer.of == 3 for layer in layers.values())
    randomised(m)
    for layer in layers.values():
        moved = layer.delta_weight().view(3, 12, 12).flatten(1).any(dim=1)
        assert moved.tolist() == [k in slices for k in range(3)]


def test_slices_of_one_layer_beside_the_whole_of_another():
    m = apply_lora(build("gpt2"), target_modules=["h.0.attn.c_attn:q,v", "h.1.attn.c_attn"])
    assert [type(x) for x in lora_layers(m).values()] == [LoRAFusedLinear, LoRAConv1D]


def test_find_targets_understands_slices():
    assert list(find_targets(build("gpt2"), ["c_attn:q,v"])) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]


# ---- bias -----------------------------------------------------------------------------------------------------------

BIASED = {"gpt2": ["c_attn", "c_fc"], "bert": ["query", "value"], "vit": ["attention.output.dense", "intermediate.dense"], "t5": ["q", "wi"]}


def vit_targets(m):
    """ViT's names changed between versions of transformers; any two of its linear layers will do."""
    ends = [n.rpartition("layers.0.")[2] for n, x in m.named_modules() if isinstance(x, nn.Linear) and "layers.0." in n]
    return ends[:2] if ends else BIASED["vit"]


def biased(name, m):
    return vit_targets(m) if name == "vit" else BIASED[name]


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("name", BIASED)
def test_the_biases_that_train_are_pefts(name, bias, save):
    m = build(name)
    head = {"gpt2": "ln_f", "bert": "classifier", "vit": "classifier", "t5": "final_layer_norm"}[name]
    saved = {"modules_to_save": [head]} if save else {}
    targets = biased(name, m)
    theirs = peft_trains(in_peft(m, target_modules=targets, bias=bias, **saved))
    apply_lora(m, r=2, alpha=3, target_modules=targets, bias=bias, **saved)
    assert trains(m) == theirs
    assert (bias == "none" and not save) or name == "t5" or theirs
    assert set(trained_biases(m, bias)) == {n for n in trains(m) if not n.startswith(tuple(
        n for n, x in m.named_modules() if isinstance(x, TrainedCopy)))}


def train(name, m, steps=3):
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1)
    m.train()
    for _ in range(steps):
        optimizer.zero_grad()
        run(name, m).square().mean().backward()
        optimizer.step()
    return m.eval()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_trained_biases_are_switched_off_and_taken_out_with_the_adapter(name, bias, merged):
    m = build(name)
    before, plain = snapshot(m), run(name, m)
    apply_lora(m, r=2, alpha=3, target_modules=biased(name, m), bias=bias)
    frozen = {n: p.detach().clone() for n, p in m.named_parameters() if not p.requires_grad}
    moving = {n: p.detach().clone() for n, p in m.named_parameters() if p.requires_grad}
    train(name, m)
    now = dict(m.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    assert all(not torch.equal(now[n], p) for n, p in moving.items() if "key" not in n and "c_attn" not in n), "softmax ignores a bias of keys"
    learnt = run(name, m)
    if merged:
        merge(m)
    inside = run(name, m)
    torch.testing.assert_close(inside, learnt, **CLOSE)
    kept = {n: p.detach().clone() for n, p in m.named_parameters()}
    with lora_disabled(m):
        assert torch.equal(run(name, m), plain)
        with lora_disabled(m):
            assert torch.equal(run(name, m), plain)
        assert torch.equal(run(name, m), plain)
    assert torch.equal(run(name, m), inside)
    assert all(torch.equal(p, kept[n]) for n, p in m.named_parameters())
    with pytest.raises(KeyError), lora_disabled(m):
        raise KeyError
    assert torch.equal(run(name, m), inside)
    torch.testing.assert_close(run(name, merge_and_unload(copy.deepcopy(m))), learnt, **CLOSE)
    remove_lora(m)
    assert_same(before, snapshot(m))
    assert torch.equal(run(name, m), plain)


@pytest.mark.parametrize("how", ["one layer is off", "a part is off"])
def test_disabling_reaches_the_biases_whatever_is_off_already(how):
    m = build("gpt2")
    plain = run("gpt2", m)
    randomised(apply_lora(m, r=2, alpha=3, target_modules=["c_attn"], bias="all"))
    learnt = run("gpt2", m)
    if how == "one layer is off":
        layer = m.transformer.h[0].attn.c_attn
        layer.disabled = True
        part = run("gpt2", m)
        with lora_disabled(m):
            assert torch.equal(run("gpt2", m), plain)
        assert layer.disabled and torch.equal(run("gpt2", m), part)
    else:
        with lora_disabled(m.transformer.h[0]):
            with lora_disabled(m):
                assert torch.equal(run("gpt2", m), plain)
        assert torch.equal(run("gpt2", m), learnt)


def test_a_copy_knows_the_biases_of_before():
    m = build("gpt2")
    plain = run("gpt2", m)
    randomised(apply_lora(m, r=2, alpha=3, target_modules=["c_attn"], bias="all"))
    learnt, twin = run("gpt2", m), copy.deepcopy(m)
    with lora_disabled(twin):
        assert torch.equal(run("gpt2", twin), plain)
        assert torch.equal(run("gpt2", m), learnt)
    remove_lora(twin)
    assert torch.equal(run("gpt2", twin), plain) and torch.equal(run("gpt2", m), learnt)


def test_biases_of_before_follow_the_model_to_another_dtype():
    m = apply_lora(build("gpt2"), r=2, alpha=3, target_modules=["c_attn"], bias="all")
    randomised(m).float()
    plain = build("gpt2").float()
    with lora_disabled(m):
        assert torch.equal(run("gpt2", m), run("gpt2", plain))


# ---- modules_to_save ------------------------------------------------------------------------------------------------


def test_a_saved_module_shows_the_attributes_of_the_copy_that_computes():
    m = apply_lora(bert(), r=2, alpha=4, target_modules=["query"], modules_to_save=["classifier"])
    head = m.classifier
    assert head.out_features == 3 and head.weight is head.trained.weight and head.weight.requires_grad
    with lora_disabled(m):
        assert head.weight is head.base_layer.weight
    assert copy.deepcopy(head).weight is not head.weight  # copying asks for attributes before there are any
    with pytest.raises(AttributeError, match="no_such_thing"):
        head.no_such_thing  # noqa: B018
    assert sum("classifier" in name for name, _ in m.named_parameters()) == 4  # base and copy, weight and bias, each once



@pytest.mark.parametrize(("name", "head", "targets"), [
    ("bert", "classifier", ["query"]), ("vit", "classifier", None), ("gpt2", "lm_head", ["c_attn"]), ("gpt2", "ln_f", ["c_attn:q,v"]),
    ("roberta", "classifier", ["query"]), ("llama", "lm_head", "all-linear"), ("t5", "lm_head", ["q"]),
])
@pytest.mark.parametrize("merged", [False, True])
def test_a_saved_module_trains_on_a_copy(name, head, targets, merged):
    m = build(name)
    targets = targets or biased(name, m)
    before, plain = snapshot(m), frozen(name)
    (original_name, original), = ((n, x) for n, x in m.named_modules() if n == head or n.endswith("." + head))
    weights = {n: p.detach().clone() for n, p in original.named_parameters()}
    apply_lora(m, r=2, alpha=3, target_modules=targets, modules_to_save=[head])
    assert torch.equal(run(name, m), plain)
    wrapper = m.get_submodule(original_name)
    assert isinstance(wrapper, TrainedCopy) and wrapper.base_layer is original
    assert trains(m) == {f"{original_name}.trained.{n}" for n in weights}
    train(name, m)
    assert all(torch.equal(p, weights[n]) for n, p in wrapper.base_layer.named_parameters())
    assert all(not torch.equal(p, weights[n]) for n, p in wrapper.trained.named_parameters())
    trained, learnt = wrapper.trained, run(name, m)
    assert not torch.allclose(learnt, plain)
    if merged:
        merge(m)
    with lora_disabled(m):
        assert torch.equal(run(name, m), plain)
    torch.testing.assert_close(run(name, m), learnt, **CLOSE)
    unloaded = merge_and_unload(copy.deepcopy(m))
    torch.testing.assert_close(run(name, unloaded), learnt, **CLOSE)
    assert all(torch.equal(p, q) for p, q in zip(unloaded.get_submodule(original_name).parameters(), trained.parameters(), strict=True))
    assert not [x for x in unloaded.modules() if isinstance(x, TrainedCopy)]
    remove_lora(m)
    assert m.get_submodule(original_name) is original
    assert_same(before, snapshot(m))
    assert torch.equal(run(name, m.requires_grad_(False)), plain)


@pytest.mark.parametrize(("name", "targets", "saved"), [
    ("roberta", ["dense"], ["classifier"]), ("roberta", r".*dense", ["classifier"]), ("bert", ["query", "classifier"], ["classifier"]),
    ("roberta", ["query", "dense"], ["classifier", "pooler"][:1]), ("gpt2", ["c_attn", "c_proj"], ["mlp"]), ("vit", "all-linear", ["classifier"]),
    ("roberta", "all-linear", ["classifier"]),
])
def test_a_saved_module_is_no_target_nor_is_anything_in_it(name, targets, saved):
    """peft's rule. (In a list, peft compares with the end of a name; so do we, after a dot.)"""
    m = build(name)
    plain = run(name, m)
    wanted = peft_layers(in_peft(m, target_modules=targets, modules_to_save=saved))
    try:
        apply_lora(m, r=2, alpha=3, target_modules=targets, modules_to_save=saved)
    except ValueError as error:  # an entry that is left with nothing to do may be refused, by name
        assert saved[0] in str(error) and targets == ["query", "classifier"]
        return
    assert list(lora_layers(m)) == list(wanted)
    learnt = run(name, randomised(m))
    with lora_disabled(m):
        assert torch.equal(run(name, m), plain)
    torch.testing.assert_close(run(name, merge_and_unload(copy.deepcopy(m))), learnt, **CLOSE)
    assert torch.equal(run(name, remove_lora(m)), plain)


def test_one_saved_module_in_another_stays_one_copy():
    m = build("roberta")
    plain = run("roberta", m)
    try:
        apply_lora(m, r=2, alpha=3, target_modules=["query"], modules_to_save=["classifier", "classifier.dense"])
    except ValueError as error:
        assert "classifier.dense" in str(error)
        return
    learnt = run("roberta", randomised(m))
    with lora_disabled(m):
        assert torch.equal(run("roberta", m), plain)
    torch.testing.assert_close(run("roberta", merge_and_unload(copy.deepcopy(m))), learnt, **CLOSE)
    assert torch.equal(run("roberta", remove_lora(m)), plain)


def test_several_modules_of_one_name_are_all_saved():
    m = apply_lora(build("gpt2"), r=2, alpha=3, target_modules=["c_attn"], modules_to_save=["ln_1"])
    assert trains(m) == {f"transformer.h.{i}.ln_1.trained.{n}" for i in range(2) for n in ("weight", "bias")}


def test_saved_modules_in_a_state_dict_and_a_copy(tmp_path):
    m = randomised(apply_lora(build("bert"), r=2, alpha=3, target_modules=["query"], modules_to_save=["classifier"]))
    learnt = run("bert", m)
    torch.save(m.state_dict(), tmp_path / "m.pt")
    fresh = apply_lora(build("bert", seed=9), r=2, alpha=3, target_modules=["query"], modules_to_save=["classifier"])
    fresh.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert torch.equal(run("bert", fresh), learnt)
    twin = copy.deepcopy(m)
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(0.5)
    assert torch.equal(run("bert", m), learnt)


def test_coverage_of_a_model_with_a_saved_head():
    m = apply_lora(build("bert"), r=2, alpha=3, target_modules=["query"], modules_to_save=["classifier"])
    report = coverage(m)
    assert set(report.trainable_elsewhere) == {"classifier.trained.weight", "classifier.trained.bias"}
    assert report.trainable == 2 * 2 * (12 + 12) + 3 * 12 + 3  # two layers' queries, r=2, 12 x 12; the head 12 -> 3
    assert not any("trained" in n for n in report.unmatched), "the head is not left as it is"


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_equal_to_peft_with_everything_at_once(name):
    """Patterns, biases, a saved head, rslora: the same numbers put into both compute the same."""
    m = build(name)
    head = {"gpt2": "ln_f", "bert": "classifier", "vit": "classifier"}[name]
    targets = biased(name, m)
    shared = {"target_modules": targets, "rank_pattern": {targets[0]: 5}, "alpha_pattern": {targets[1]: 7}, "bias": "all",
              "modules_to_save": [head]}
    theirs = in_peft(m, use_rslora=True, **shared).eval()
    randomised(apply_lora(m, r=2, alpha=3, rslora=True, **shared))
    others = peft_layers(theirs)
    with torch.no_grad():
        ours = dict(m.named_parameters())
        for n, layer in lora_layers(m).items():
            others[n].lora_A["default"].weight.copy_(layer.lora_A)
            others[n].lora_B["default"].weight.copy_(layer.lora_B)
        for n, p in theirs.named_parameters():
            n = n.removeprefix("base_model.model.").replace(".modules_to_save.default", ".trained").replace(".original_module", ".base_layer")
            if "lora_" not in n:
                p.copy_(ours[n])
    torch.testing.assert_close(run(name, m), run(name, theirs), **CLOSE)
    torch.testing.assert_close(run(name, merge_and_unload(m)), run(name, theirs.merge_and_unload()), **CLOSE)


# ---- tied embeddings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["wte"], ["lm_head"], ["c_attn", "wte"], r".*(wte|c_fc)"])
def test_tied_embeddings_are_refused_by_name(targets):
    m = build("gpt2")
    before = snapshot(m)
    with pytest.raises(ValueError) as caught:
        apply_lora(m, target_modules=targets)
    assert all(word in str(caught.value) for word in ("wte", "lm_head", "allow_tied"))
    assert_same(before, snapshot(m))
    apply_lora(build("gpt2", tie_word_embeddings=False), target_modules=targets)  # untied, nothing stands in the way


def tied_to(target):
    m = build("gpt2")
    assert m.lm_head.weight is m.transformer.wte.weight
    return randomised(apply_lora(m, r=2, alpha=3, target_modules=[target], allow_tied=True))


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_tied_when_asked_for(target):
    m = tied_to(target)
    assert m.lm_head.weight is m.transformer.wte.weight
    table, learnt = m.lm_head.weight.detach().clone(), run("gpt2", m)
    delta = next(iter(lora_layers(m).values())).delta_weight()
    delta = delta.T if target == "wte" else delta
    merge(m)
    torch.testing.assert_close(m.lm_head.weight, table + delta, **CLOSE)  # both see the sum: that is what tied means
    assert m.lm_head.weight is m.transformer.wte.weight
    unmerge(m)
    assert torch.equal(m.lm_head.weight, table) and torch.equal(run("gpt2", m), learnt)
    remove_lora(m)
    assert m.lm_head.weight is m.transformer.wte.weight and torch.equal(run("gpt2", m), run("gpt2", build("gpt2")))


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_a_checkpoint_of_a_merged_tied_model_does_not_count_the_update_twice(target):
    m = tied_to(target)
    learnt = run("gpt2", m)
    merge(m)
    state = copy.deepcopy(m.state_dict())
    fresh = apply_lora(build("gpt2", seed=9), r=2, alpha=3, target_modules=[target], allow_tied=True)
    fresh.load_state_dict(state)
    torch.testing.assert_close(run("gpt2", fresh), learnt, **CLOSE)


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_disabled_while_merged_and_tied_is_the_base_or_an_error(target):
    """The other end reads the sum, and no weight may be touched: so it is the base, or an error that says what to do."""
    m = tied_to(target)
    merge(m)
    try:
        with lora_disabled(m):
            assert torch.equal(run("gpt2", m), run("gpt2", build("gpt2")))
    except RuntimeError as error:
        assert "unmerge" in str(error) and "tied" in str(error)
        assert not any(layer.disabled for layer in lora_layers(m).values())
    unmerge(m)
    with lora_disabled(m):
        assert torch.equal(run("gpt2", m), run("gpt2", build("gpt2")))


def test_both_ends_of_a_tie_at_once_merge_and_come_apart_or_are_refused():
    m = build("gpt2")
    before, plain = snapshot(m), run("gpt2", m)
    try:
        apply_lora(m, r=2, alpha=3, target_modules=["wte", "lm_head"], allow_tied=True)
    except ValueError as error:
        assert "wte" in str(error) and "lm_head" in str(error)
        assert_same(before, snapshot(m))
        return
    learnt = run("gpt2", randomised(m))
    merge(m)
    unmerge(m)
    assert torch.equal(run("gpt2", m), learnt)
    assert torch.equal(run("gpt2", remove_lora(m)), plain)


# ---- refusals -------------------------------------------------------------------------------------------------------


class Parametrized(nn.Sequential):
    """A weight that is computed afresh at each look: merging would write into a tensor that is thrown away."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4), torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


class OldWeightNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(self[1])


class Lazy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.LazyLinear(4))


REFUSALS = {
    "slices that don't exist": (gpt2, {"target_modules": ["c_attn:q,x"]}, ["c_attn:q,x"]),
    "no slice after the colon": (gpt2, {"target_modules": ["c_attn:"]}, ["c_attn:"]),
    "one slice twice": (gpt2, {"target_modules": ["c_attn:q,q"]}, ["c_attn:q,q"]),
    "slices of what is not fused": (gpt2, {"target_modules": ["wpe:q"]}, ["wpe", "fused"]),
    "slices of nothing": (gpt2, {"target_modules": ["attn_c:q"]}, ["attn_c"]),
    "whole and slices": (gpt2, {"target_modules": ["c_attn", "c_attn:q"]}, ["c_attn", "twice"]),
    "slices, then other slices": (gpt2, {"target_modules": ["c_attn:q", "h.0.attn.c_attn:v"]}, ["h.0.attn.c_attn", "twice"]),
    "slices as a string": (gpt2, {"target_modules": "c_attn:q,v"}, ["c_attn:q,v", "list"]),
    "rank of 0": (gpt2, {"target_modules": ["c_attn"], "rank_pattern": {"h.1.attn.c_attn": 0}}, ["r ", "0"]),
    "rank of 1.5": (gpt2, {"target_modules": ["c_attn"], "rank_pattern": {"h.1.attn.c_attn": 1.5}}, ["1.5"]),
    "alpha of nan": (gpt2, {"target_modules": ["c_attn"], "alpha_pattern": {"c_attn": float("nan")}}, ["alpha", "nan"]),
    "rank for nobody": (gpt2, {"target_modules": ["c_attn"], "rank_pattern": {"c_fc": 3}}, ["rank_pattern", "c_fc"]),
    "pattern that an earlier one shadows": (gpt2, {"target_modules": ["c_attn"], "rank_pattern": {"c_attn": 3, "h.0.attn.c_attn": 4}}, ["h.0.attn"]),
    "pattern is no regex": (gpt2, {"target_modules": ["c_attn"], "alpha_pattern": {"c_attn(": 3}}, ["alpha_pattern", "regular"]),
    "bias of another name": (gpt2, {"target_modules": ["c_attn"], "bias": "lora"}, ["bias", "'lora'", "lora_only"]),
    "bias is True": (gpt2, {"target_modules": ["c_attn"], "bias": True}, ["bias", "True"]),
    "saved module of no name": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["score"]}, ["score"]),
    "max_norm": (lambda: nn.ModuleDict({"e": nn.Embedding(4, 4, max_norm=1.0), "f": nn.Linear(4, 4)}), {"target_modules": ["f", "e"]}, ["'e'", "max_norm"]),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)), {"target_modules": ["0", "1"]}, ["'1'", "groups=4"]),
    "transposed convolution": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)), {"target_modules": ["0", "1"]},
                               ["'1'", "ConvTranspose2d"]),
    "norm": (gpt2, {"target_modules": ["c_attn", "ln_1"]}, ["ln_1", "LayerNorm"]),
    "computed weight": (Parametrized, {"target_modules": "0|1"}, ["'1'", "weight"]),
    "computed weight, old way": (OldWeightNorm, {"target_modules": ["0", "1"]}, ["'1'", "weight"]),
    "no shape yet": (Lazy, {"target_modules": ["0", "1"]}, ["'1'"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_why_and_leaves_the_model_untouched(case):
    create, arguments, words = REFUSALS[case]
    m = create()
    before = snapshot(m) if "no shape" not in case else [(n, id(x), p.requires_grad) for n, x in m.named_modules() for p in x.parameters()]
    with pytest.raises((ValueError, TypeError)) as caught:
        apply_lora(m, **arguments)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    if "no shape" in case:
        assert before == [(n, id(x), p.requires_grad) for n, x in m.named_modules() for p in x.parameters()]
    else:
        assert_same(before, snapshot(m))


def test_what_goes_wrong_while_building_leaves_the_model_untouched(monkeypatch):
    """Memory may run out in the middle of it, a head may not be copyable."""
    def no_memory(*_):
        raise MemoryError

    for arguments in ({}, {"modules_to_save": ["ln_f"]}):
        m = build("gpt2")
        before = snapshot(m)
        with monkeypatch.context() as patch:
            if arguments:
                patch.setattr(nn.LayerNorm, "__deepcopy__", no_memory, raising=False)
            else:
                patch.setattr(nn.init, "normal_", no_memory)  # the embedding's B, after the attention's
            with pytest.raises(MemoryError):
                apply_lora(m, target_modules=["c_attn", "wpe"], **arguments)
        assert_same(before, snapshot(m))


# ---- afterwards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [remove_lora, merge_and_unload])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_model_trains_again_when_lora_is_out(leave, bias):
    m = build("gpt2")
    m.transformer.wpe.requires_grad_(False)
    before = {n: p.requires_grad for n, p in m.named_parameters()}
    apply_lora(m, r=2, alpha=3, target_modules=["c_attn:q,v", "c_fc"], bias=bias, modules_to_save=["ln_f"])
    train("gpt2", m)
    merge(m)
    leave(m)
    assert {n: p.requires_grad for n, p in m.named_parameters()} == before
    start = {n: p.detach().clone() for n, p in m.named_parameters()}
    train("gpt2", m)
    for n, p in m.named_parameters():
        assert torch.equal(p, start[n]) is (not before[n]), n
    apply_lora(m, target_modules=["c_attn"])  # and again
    assert len(lora_layers(m)) == 2


def test_training_while_disabled_moves_nothing_but_what_is_on():
    """Disabled, the factors get no gradient: a loop left inside the block can't train them by mistake."""
    m = randomised(apply_lora(model(), r=2, alpha=3, target_modules=["q_proj"]))
    with lora_disabled(m):
        out = m(TOKENS)
        assert not out.requires_grad
    F.cross_entropy(m(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    assert m.layers[1].attention.q_proj.lora_B.grad.any()
