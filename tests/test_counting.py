"""Counts against numbers from the paper and from sums written out here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_lab import LoRALinear, apply_lora, breakeven_rank, count_parameters, lora_parameters
from lora_lab.counting import (
    METHODS,
    adapter_parameters,
    conv_parameters,
    count_modules,
    fused_parameters,
    matrix_flops,
    method_parameters,
    optimizer_bytes,
    prefix_parameters,
    safetensors_bytes,
    stored_bytes,
    tasks_bytes,
)


def counts(model):
    c = count_parameters(model)
    return c.trainable, c.frozen, c.total


def test_a_digit_classifier_by_hand():
    assert counts(nn.Linear(64, 10)) == (650, 0, 650)
    layer = LoRALinear(nn.Linear(64, 10), r=4, alpha=8)
    assert counts(layer) == (296, 650, 946)
    assert lora_parameters(64, 10, 4) == 296
    layer.base_layer.bias.requires_grad_(True)  # the usual slip
    assert counts(layer) == (306, 640, 946)
    assert breakeven_rank(64, 10) == pytest.approx(8.6486, abs=5e-5)  # given to four digits
    assert count_parameters(layer).share == pytest.approx(306 / 946, rel=1e-15)


@pytest.mark.parametrize(("layers", "d", "r", "wanted"), [
    (24, 1024, 4, 393_216),  # GPT-2 medium, W_q and W_v: 0.35 M with the paper's rounding of r=4 (table 3)
    (96, 12288, 4, 18_874_368),  # GPT-3 175B, W_q and W_v (table 5: 18 M)
])
def test_the_papers_models(layers, d, r, wanted):
    assert layers * 2 * lora_parameters(d, d, r) == wanted


@given(d_in=st.integers(1, 40), d_out=st.integers(1, 40), r=st.integers(1, 50))
def test_arithmetic_agrees_with_tensors(d_in, d_out, r):
    trained = torch.empty(r, d_in).numel() + torch.empty(d_out, r).numel()
    assert lora_parameters(d_in, d_out, r) == trained
    # below the break-even rank LoRA has fewer entries than the full matrix; the quotient's one rounding, some 1e-14, cannot
    # carry it over an integer that is at least 1/80 away
    assert (trained < d_in * d_out) == (r < breakeven_rank(d_in, d_out))
    layer = LoRALinear(nn.Linear(d_in, d_out), r, 1)
    assert counts(layer) == (trained, d_in * d_out + d_out, trained + d_in * d_out + d_out)


def test_tied_weights_count_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(11, 5), "head": nn.Linear(5, 11, bias=False)})
    assert counts(model) == (110, 0, 110)
    model["head"].weight = model["embedding"].weight
    assert counts(model) == (55, 0, 55)


def test_merging_moves_no_count():
    model = apply_lora(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), r=2, target_modules=["0"])
    before = counts(model)
    model[0].merge()
    assert counts(model) == before == (22, 59, 81)


def test_empty_model():
    assert counts(nn.Identity()) == (0, 0, 0)
    assert count_parameters(nn.Identity()).share == 0


def test_it_prints_as_a_sentence():
    assert str(count_parameters(LoRALinear(nn.Linear(64, 10), 4, 8))).startswith("296 of 946 parameters are trainable (31.29")


@pytest.mark.parametrize("bad", [(0, 4, 1), (4, -1, 1), (4, 4, 0)])
def test_impossible_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="at least 1"):
        lora_parameters(*bad)
    if bad[2] > 0:
        with pytest.raises(ValueError, match="at least 1"):
            breakeven_rank(*bad[:2])


# ---- kinds of layers, other methods


@pytest.mark.parametrize(("slices", "names"), [(2, "q,v"), (3, "q,k,v"), (1, "k")])
def test_slices_against_the_layer(slices, names):
    model = nn.ModuleDict({"c_attn": nn.Linear(64, 96)})
    apply_lora(model, r=3, target_modules=[f"c_attn:{names}"])
    assert counts(model)[0] == fused_parameters(64, 32, r=3, slices=slices)


def test_both_conventions_for_convolutions():
    loralib = pytest.importorskip("loralib")
    authors = loralib.Conv2d(16, 32, kernel_size=3, r=4)
    wanted = authors.lora_A.numel() + authors.lora_B.numel()
    assert conv_parameters(16, 32, 3, r=4, convention="loralib") == wanted == 1728
    ours = apply_lora(nn.Sequential(nn.Conv2d(16, 32, 3)), r=4, target_modules=["0"])
    assert conv_parameters(16, 32, 3, r=4) == counts(ours)[0] == 704
    with pytest.raises(ValueError, match="'tensorflow'"):
        conv_parameters(16, 32, 3, r=4, convention="tensorflow")


def peft_counts(config):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 10)), getattr(peft, config.pop("kind"))(target_modules=["0"], **config))
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(("method", "config"), [
    ("lora", {"kind": "LoraConfig", "r": 4}),
    ("lora", {"kind": "LoraConfig", "r": 4, "use_rslora": True}),
    ("dora", {"kind": "LoraConfig", "r": 4, "use_dora": True}),
    ("vera", {"kind": "VeraConfig", "r": 4}),
    ("adalora", {"kind": "AdaLoraConfig", "init_r": 4, "target_r": 2, "total_step": 10}),
])
def test_other_methods_against_peft(method, config):
    assert method_parameters(method, 64, 10, r=4) == peft_counts(config)


def test_each_method_says_where_it_comes_from():
    for name, method in METHODS.items():
        assert method.name == name and method.source and method.formula
        # the formula is the function: evaluated as Python, at sizes that keep all its terms apart
        formula = method.formula.replace("²", "**2").replace("r (", "r * (").replace("in out", "i * o").replace("r out", "r * o")
        value = eval(formula.replace("in", "i").replace("out", "o"), {"i": 70, "o": 11, "r": 3})
        assert method.count(70, 11, 3) == value, name
    with pytest.raises(ValueError, match="'lorra' is not one of"):
        method_parameters("lorra", 4, 4)


def test_bottleneck_adapters_and_prefixes_against_modules():
    adapter = nn.Sequential(nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 24))
    assert adapter_parameters(24, 5, adapters=7) == 7 * counts(adapter)[0]
    assert adapter_parameters(24, 5, adapters=7, norms=3) == 7 * counts(adapter)[0] + 3 * counts(nn.LayerNorm(24))[0]
    assert prefix_parameters(24, prefix=3, infix=2, layers=4) == 4 * nn.Embedding(5, 24).weight.numel()


# ---- module by module


def sums(rows):
    return sum(r.trainable for r in rows), sum(r.frozen for r in rows)


def small():
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.Linear(5, 4))


@pytest.mark.parametrize("adapt", ["plain", "ours", "peft", "ours with a head", "peft with a head"])
def test_rows_add_up_and_keep_their_names(adapt):
    model, head = small(), ["4"] if "head" in adapt else []
    if adapt.startswith("ours"):
        apply_lora(model, r=2, target_modules=["1", "3"], modules_to_save=head)
    elif adapt.startswith("peft"):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["1", "3"], modules_to_save=head or None))
    rows = count_modules(model)
    assert [r.name for r in rows] == ["0", "1", "2", "3", "4"]
    assert [r.kind for r in rows] == ["Embedding", "Linear", "LayerNorm", "Linear", "Linear"]
    assert sums(rows) == counts(model)[:2]
    extra = [0, 2 * (6 + 5), 0, 2 * (5 + 4), (5 * 4 + 4) * bool(head)]
    assert [r.added for r in rows] == ([0] * 5 if adapt == "plain" else extra)


def test_alike_blocks_become_one_row():
    model = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(3, 2) for _ in range(4)]), "head": nn.Linear(3, 2)})
    apply_lora(model, r=1, target_modules=["h.0", "h.1"])
    rows = count_modules(model, together=True)
    assert [(r.name, r.times, r.added) for r in rows] == [("h.*", 2, 10), ("h.*", 2, 0), ("head", 1, 0)]
    assert sums(rows) == counts(model)[:2]


# ---- bytes


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_against_torch(optimizer, dtype):
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((7, 11), (5,))]
    made = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1), "momentum": lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.AdamW(parameters, lr=0.1),
    }[optimizer]()
    for p in parameters:
        p.grad = torch.ones_like(p)
    made.step()
    tensors = [t for state in made.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    wanted = sum(t.numel() * t.element_size() for t in tensors)
    assert sum(optimizer_bytes(p.numel(), optimizer, p.element_size()) for p in parameters) == wanted


@given(out=st.integers(1, 300), inputs=st.integers(1, 300))
def test_blocks_of_quantised_weights(out, inputs):
    """Counted by cutting the weight into its blocks. bitsandbytes 0.48.2 gave the same numbers."""
    n = out * inputs
    blocks = len(range(0, n, 64))
    packed = len(range(0, n, 2))  # two numbers a byte
    assert stored_bytes(out, inputs, "nf4") == packed + 4 * blocks
    assert stored_bytes(out, inputs, "nf4-double") == packed + blocks + 4 * len(range(0, blocks, 256)) + 4
    assert stored_bytes(out, inputs, "int8") == torch.empty(out, inputs, dtype=torch.int8).nbytes + torch.empty(out).nbytes
    assert stored_bytes(out, inputs, "bf16") == torch.empty(out, inputs, dtype=torch.bfloat16).nbytes


def test_small_tensors_keep_wide_moments_in_8_bit_adam():
    assert optimizer_bytes(4095, "adam8bit") == 2 * 4 * 4095
    assert optimizer_bytes(4096, "adam8bit") == 2 * (4096 + 4 * 16)


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "café": 'a "quoted" \\ text\nof two lines'}])
def test_the_size_of_safetensors_files(tmp_path, metadata):
    from safetensors.torch import save_file

    tensors = {"b": torch.ones(3, 5), "a.é": torch.ones(7, dtype=torch.bfloat16), "c": torch.ones((), dtype=torch.float64), "d": torch.ones(2, 9).half()}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    described = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    assert safetensors_bytes(described, metadata) == (tmp_path / "x.safetensors").stat().st_size
    with pytest.raises(ValueError, match="'quint4' is not one of"):
        safetensors_bytes({"a": ((2,), "quint4")})


def test_unknown_ways_to_store_are_refused():
    for call in (lambda: stored_bytes(2, 2, "fp3"), lambda: optimizer_bytes(2, "lion"), lambda: matrix_flops(2, 2, mode="backward")):
        with pytest.raises(ValueError, match="is not one of"):
            call()


def test_adapters_for_many_tasks():
    assert tasks_bytes(100, 3, 5) == (115, 500)


# ---- FLOPs


@pytest.mark.parametrize("r", [None, 3])
def test_flops_against_torchs_counter(r):
    from torch.utils.flop_counter import FlopCounterMode

    layer = nn.Linear(13, 7)
    layer = layer if r is None else LoRALinear(layer, r, 5)
    x = torch.randn(11, 13, requires_grad=True)  # as inside a network: a gradient goes on to what lies before
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() == 11 * matrix_flops(13, 7, r, "forward")
    assert forward.get_total_flops() + backward.get_total_flops() == 11 * matrix_flops(13, 7, r)
    if r:
        layer.merge()
        with FlopCounterMode(display=False) as merged, torch.no_grad():
            layer(x)
        assert merged.get_total_flops() == 11 * matrix_flops(13, 7, r, "merged")


@given(n=st.integers(1, 5000), r=st.integers(1, 64))
def test_the_share_of_the_work(n, r):
    """(2 N² + 6 N r) / 3 N² as Schulman et al. count it; their formula has 2 N r multiplications three times."""
    # one division each: a few eps of 1e-16 apart
    assert matrix_flops(n, n, r) / matrix_flops(n, n) == pytest.approx((2 * n**2 + 6 * n * r) / (3 * n**2), rel=1e-12)


def test_the_preset_of_the_pocket_model_is_the_model_that_ships():
    from lora_lab.files import shipped
    from lora_lab.presets import from_config, preset

    fields = ("family", "layers", "d_model", "heads", "vocab", "context")
    found, asked = from_config(shipped("pocket-gpt2")), preset("pocket")
    assert {name: getattr(asked, name) for name in fields} == {name: getattr(found, name) for name in fields}
