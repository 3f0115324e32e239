"""LoRALinear, property by property.

The oracle is never the layer: it is `torch.func.functional_call` on the bare base layer with the weight
W + s·B·A put together here, in float64, where s is written out as alpha / r. Tolerances are error bounds: the sum of n
rounded products differs from the exact one by at most about n·eps times the same sum over absolute values (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1). `bound` computes that sum, so no tolerance is a guess.
"""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_lab.adapt import lora_disabled
from lora_lab.layers import LoRALinear

D_IN, D_OUT = 11, 13  # different from each other, from every r below, and from alpha
RANKS = [1, 3, 8, 17]  # 17 > min(D_IN, D_OUT)
ALPHA = 5.0
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(4,), (2, 3), (2, 1, 3)]  # leading dimensions: input rank 2, 3, 4


def make(r=3, alpha=ALPHA, bias=True, dtype=torch.float64, random_b=True, d_in=D_IN, d_out=D_OUT, seed=1, **kwargs):
    """A layer as it is after some training, in eval mode (where a merged layer may be called with gradients on): B is not zero."""
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(d_in, d_out, bias=bias, dtype=dtype), r, alpha, **kwargs)
    if random_b:
        with torch.no_grad():
            layer.lora_B.normal_()
    return layer.eval()


def data(*lead, d_in=D_IN, dtype=torch.float64, seed=2):
    torch.manual_seed(seed)
    return torch.randn(*lead, d_in, dtype=dtype)


def bits(tensor):
    """The raw bytes: unlike ==, they tell -0.0 from 0.0 and one NaN from another."""
    return tensor.detach().contiguous().cpu().view(torch.uint8).clone()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def parts(layer):
    """W, b, A, B as fresh float64 leaves, copied out of the layer."""
    base = layer.base_layer
    bias = None if base.bias is None else base.bias.detach().double().clone()
    return (base.weight.detach().double().clone(), bias, *(
        p.detach().double().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B)))


def oracle(weight, bias, a, b, x, scale):
    """The base layer called with W + scale·B·A, in float64."""
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
    state = {"weight": weight + scale * (b @ a)}
    if bias is not None:
        state["bias"] = bias
    return functional_call(plain, state, (x,))


def expected(layer, x, grad=None, scale=None):
    """Output and, given the gradient of the output, gradients of (x, A, B); each with its error bound.

    Everything is multilinear, so the bound's "same sum over absolute values" is the oracle on absolute values.
    """
    scale = layer.alpha / layer.r if scale is None else scale
    eps = torch.finfo(x.dtype).eps
    # additions in the longest chain: over d_in, r, d_out or the batch; 8 for the roundings between the products
    terms = layer.base_layer.in_features + layer.r + layer.base_layer.out_features + x[..., 0].numel() + 8
    results = []
    for absolute in (False, True):
        w, bias, a, b = parts(layer)
        x64 = x.detach().double()
        g = None if grad is None else grad.double()
        if absolute:
            w, x64, g = w.abs(), x64.abs(), None if g is None else g.abs()
            bias = None if bias is None else bias.abs()
            a, b = (p.detach().abs().requires_grad_() for p in (a, b))
        x64 = x64.requires_grad_()
        out = oracle(w, bias, a, b, x64, abs(scale) if absolute else scale)
        grads = () if grad is None else torch.autograd.grad(out, (x64, a, b), g)
        results.append((out.detach(), *grads))
    # a product below the smallest normal number loses its relative accuracy, hence the second summand
    tiny = terms * torch.finfo(x.dtype).tiny
    return [(value, terms * eps * size + tiny) for value, size in zip(*results, strict=True)]


def assert_within(actual, value_and_bound, what):
    value, bound = value_and_bound
    assert actual.shape == value.shape, f"{what}: {tuple(actual.shape)}, not {tuple(value.shape)}"
    excess = (actual.detach().double() - value).abs() - bound
    assert bool((excess <= 0).all()), f"{what}: off by {float(excess.max()):.3g} more than rounding explains"


def output_and_grads(layer, x, grad):
    x = x.clone().requires_grad_()
    out = layer(x)
    return (out, *torch.autograd.grad(out, (x, layer.lora_A, layer.lora_B), grad))


# ---- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", RANKS)
def test_shapes_and_names(r, bias, dtype):
    base = nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype)
    layer = LoRALinear(base, r, ALPHA)
    assert layer.base_layer is base  # adopted, not copied
    assert (layer.r, layer.alpha, layer.scaling) == (r, ALPHA, ALPHA / r)
    assert tuple(layer.lora_A.shape) == (r, D_IN)
    assert tuple(layer.lora_B.shape) == (D_OUT, r)
    assert tuple(layer.delta_weight().shape) == (D_OUT, D_IN)
    assert layer.merged is False
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}  # the bias of the base is frozen too
    assert isinstance(layer.lora_A, nn.Parameter) and isinstance(layer.lora_B, nn.Parameter)
    assert layer.lora_A.device == base.weight.device


def test_init_is_the_papers():
    """A uniform in ±1/sqrt(in), which is what Kaiming-uniform with a=sqrt(5) comes to; B zero."""
    layer = make(r=64, d_in=400, d_out=5, random_b=False, dtype=torch.float32)
    limit = 1 / math.sqrt(400)
    assert not layer.lora_B.any()
    assert float(layer.lora_A.detach().abs().max()) <= limit
    # 25,600 uniform draws: the sample's standard deviation is within 0.4 % (one sigma) of limit/sqrt(3); 2 % is 5 sigma
    assert float(layer.lora_A.detach().std()) == pytest.approx(limit / math.sqrt(3), rel=0.02)
    other = make(r=64, d_in=400, d_out=5, random_b=False, dtype=torch.float32, seed=7)
    assert not torch.equal(layer.lora_A, other.lora_A)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("lead", SHAPES)
def test_exactly_the_base_at_init(lead, r, bias, dtype):
    layer = make(r=r, bias=bias, dtype=dtype, random_b=False, dropout=0.3)
    x = data(*lead, dtype=dtype)
    plain = nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype)
    plain.load_state_dict(layer.base_layer.state_dict())
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x), plain(x))
    assert not layer.delta_weight().any()


def test_scaling_follows_alpha_and_the_rule():
    assert make(r=8, alpha=5.0).scaling == 5.0 / 8
    assert make(r=8, alpha=5.0, rslora=True).scaling == pytest.approx(5.0 / math.sqrt(8), rel=1e-15)  # one rounding
    layer = make(r=8)
    layer.alpha = 24.0
    assert layer.scaling == 3.0
    for alpha in (0.0, -16.0):  # a volume knob goes through zero
        layer.alpha = alpha
        assert layer.scaling == alpha / 8
        x = data(4)
        assert_within(layer(x), expected(layer, x)[0], f"alpha={alpha}")


@pytest.mark.parametrize(("kwargs", "words"), [
    ({"r": 0}, ["r", "0"]), ({"r": -3}, ["r", "-3"]), ({"r": 2.5}, ["r", "2.5"]),
    ({"alpha": math.nan}, ["alpha", "nan"]), ({"alpha": math.inf}, ["alpha", "inf"]),
    ({"dropout": 1.0}, ["dropout", "1.0"]), ({"dropout": -0.1}, ["dropout", "-0.1"]),
    ({"dropout": math.nan}, ["dropout", "nan"]),
])
def test_bad_values_are_refused_with_the_value(kwargs, words):
    base = nn.Linear(D_IN, D_OUT)
    with pytest.raises((ValueError, TypeError)) as caught:
        LoRALinear(base, **({"r": 3, "alpha": ALPHA} | kwargs))
    assert all(word in str(caught.value) for word in words)
    assert base.weight.requires_grad  # refused means untouched


@pytest.mark.parametrize("base", [nn.Conv2d(4, 4, 3), nn.Embedding(5, 3), nn.Parameter(torch.ones(3, 3)), None])
def test_only_a_linear_layer_can_be_wrapped(base):
    with pytest.raises((TypeError, ValueError)) as caught:
        LoRALinear(base, 3, ALPHA)
    assert type(base).__name__ in str(caught.value)


def test_a_lora_layer_is_not_wrapped_again():
    with pytest.raises((TypeError, ValueError), match="already"):
        LoRALinear(make(), 3, ALPHA)


def test_alpha_that_is_not_finite_is_refused_later_too():
    layer = make()
    x = data(4)
    before = layer(x)
    with pytest.raises(ValueError, match="alpha"):
        layer.alpha = math.nan
    assert layer.alpha == ALPHA
    assert torch.equal(layer(x), before)


# ---- the function and its gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("lead", SHAPES)
@pytest.mark.parametrize("rslora", [False, True])
def test_output_and_gradients_equal_the_base_with_the_summed_weight(lead, r, bias, dtype, rslora):
    layer = make(r=r, bias=bias, dtype=dtype, rslora=rslora).train()
    x, grad = data(*lead, dtype=dtype), data(*lead, d_in=D_OUT, dtype=dtype, seed=3)
    scale = ALPHA / math.sqrt(r) if rslora else ALPHA / r
    wanted = expected(layer, x, grad, scale)
    for name, actual, value in zip(("output", "dx", "dA", "dB"), output_and_grads(layer, x, grad), wanted, strict=True):
        assert actual.dtype == dtype
        assert_within(actual, value, name)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_weight_is_scaling_times_b_times_a(r, dtype):
    layer = make(r=r, dtype=dtype)
    _, _, a, b = parts(layer)
    bound = (r + 4) * torch.finfo(dtype).eps * abs(ALPHA / r) * (b.abs() @ a.abs())
    assert_within(layer.delta_weight(), ((ALPHA / r * b @ a).detach(), bound.detach()), "delta_weight")
    if dtype == torch.float64:  # what is written in terms of ΔW can be trained: it carries gradients to both factors
        g = data(D_OUT, seed=5)
        da, db = torch.autograd.grad(layer.delta_weight(), (layer.lora_A, layer.lora_B), g)
        # 1e-12: some 1e4 roundings, for sums of at most 17 terms of size 1
        torch.testing.assert_close(da, ALPHA / r * b.detach().T @ g, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(db, ALPHA / r * g @ a.detach().T, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    d_in=st.integers(1, 9), d_out=st.integers(1, 9), r=st.integers(1, 12), alpha=st.floats(-64, 64),
    lead=st.lists(st.integers(0, 3), max_size=3), bias=st.booleans(), rslora=st.booleans(), seed=st.integers(0, 99),
)
def test_any_shape(d_in, d_out, r, alpha, lead, bias, rslora, seed):
    """Also without a batch dimension, and with an empty batch."""
    layer = make(r=r, alpha=alpha, bias=bias, d_in=d_in, d_out=d_out, seed=seed, rslora=rslora)
    x, grad = data(*lead, d_in=d_in, seed=seed + 1), data(*lead, d_in=d_out, seed=seed + 2)
    scale = alpha / math.sqrt(r) if rslora else alpha / r
    wanted = expected(layer, x, grad, scale)
    for name, actual, value in zip(("output", "dx", "dA", "dB"), output_and_grads(layer, x, grad), wanted, strict=True):
        assert_within(actual, value, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("r", [1, 3, 17])
def test_dropout_in_training_with_a_shared_mask(r, dtype):
    """Dropout acts on the input of the LoRA branch alone, as in loralib and peft."""
    layer = make(r=r, dtype=dtype, dropout=0.4).train()
    x, grad = data(3, 4, dtype=dtype), data(3, 4, d_in=D_OUT, dtype=dtype, seed=3)
    torch.manual_seed(11)
    actual = output_and_grads(layer, x, grad)
    torch.manual_seed(11)
    mask = F.dropout(torch.ones_like(x), 0.4, training=True).double()
    assert 0 < int((mask == 0).sum()) < mask.numel()

    w, bias, a, b = parts(layer)
    x64 = x.double().requires_grad_()
    zero = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    out = oracle(w, bias, a.detach() * 0, b.detach(), x64, 1.0) + oracle(zero, None, a, b, x64 * mask, ALPHA / r)
    wanted = (out, *torch.autograd.grad(out, (x64, a, b), grad.double()))
    # the mask is 0 or 1/(1-p), so the bound is the one without dropout, at most 1/(1-p) as large
    bounds = [bound / (1 - 0.4) for _, bound in expected(layer, x, grad)]
    for name, got, value, bound in zip(("output", "dx", "dA", "dB"), actual, wanted, bounds, strict=True):
        assert_within(got, (value.detach(), bound), name)


def test_dropout_rests_in_eval_mode():
    layer = make(dropout=0.9).eval()
    x = data(5)
    assert_within(layer(x), expected(layer, x)[0], "eval")
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_gradient_of_a_is_zero_at_step_0_and_not_of_b():
    layer = make(random_b=False)
    _, _, da, db = output_and_grads(layer, data(4), data(4, d_in=D_OUT))
    assert not da.any()
    assert db.any()


def test_forward_and_backward_never_build_an_out_by_in_matrix():
    from torch.utils._python_dispatch import TorchDispatchMode

    big = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else [result]:
                own = isinstance(t, torch.Tensor) and t.data_ptr() != layer.base_layer.weight.data_ptr()
                if own and t.numel() >= D_IN * D_OUT:
                    big.append((str(func), tuple(t.shape)))
            return result

    layer, x = make(dropout=0.1).train(), data(2).requires_grad_()
    with Watch():
        layer(x).sum().backward()
    assert big == []
    with Watch():
        layer.delta_weight()
    assert big, "the watch itself sees an (out, in) product"


@pytest.mark.parametrize("dtype", HALVES)
def test_fp32_adapter_over_a_half_precision_base(dtype):
    layer = make(dtype=dtype, adapter_dtype=torch.float32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = data(4, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert_within(out, expected(layer, x)[0], "output")
    out.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32 and layer.lora_B.grad.any()
    weight = bits(layer.base_layer.weight)
    wanted = expected(layer, x)[0]
    layer.merge()
    assert layer.base_layer.weight.dtype == dtype
    assert_within(layer(x), wanted, "merged")
    layer.unmerge()
    assert torch.equal(bits(layer.base_layer.weight), weight)


# ---- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", RANKS)
def test_merge_keeps_the_function_and_unmerge_restores_every_bit(r, bias, dtype):
    layer = make(r=r, bias=bias, dtype=dtype, dropout=0.3).eval()
    x = data(2, 3, dtype=dtype)
    weight, before, wanted = bits(layer.base_layer.weight), layer(x), expected(layer, x)[0]

    layer.merge()
    assert layer.merged is True
    # one rounding more than `expected` allows for, that of the stored sum: covered by its 8 spare roundings
    assert_within(layer(x), wanted, "merged")
    if dtype == torch.float64:  # the merged weight is a plain weight now: the base alone computes the same
        assert torch.equal(layer(x), layer.base_layer(x))
    once = bits(layer.base_layer.weight)
    layer.merge()
    assert torch.equal(bits(layer.base_layer.weight), once)  # merging twice changes nothing

    layer.unmerge()
    assert layer.merged is False
    assert torch.equal(bits(layer.base_layer.weight), weight)
    assert torch.equal(layer(x), before)
    layer.unmerge()
    assert torch.equal(bits(layer.base_layer.weight), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weight_is_the_sum(dtype):
    layer = make(r=8, dtype=dtype)
    w, _, a, b = parts(layer)
    exact = (w + ALPHA / 8 * b @ a).detach()
    layer.merge()
    # Half precision is added in float32 and rounded once, to the nearest: half an eps, and float32's own noise beside it. Where
    # the arithmetic is the weight's own, ΔW is summed over r terms and rounded, then the sum rounded.
    info, own = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    bound = own.eps * (w.abs() + (8 + 4) * ALPHA / 8 * (b.abs() @ a.abs()).detach())
    if dtype in HALVES:
        bound += info.eps / 2 * exact.abs() + info.tiny * info.eps  # the second: spacing of float16's subnormal numbers
    assert layer.base_layer.weight.dtype == dtype
    assert_within(layer.base_layer.weight, (exact, bound), "merged weight")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_hundred_merges_leave_no_trace(dtype):
    layer = make(dtype=dtype)
    with torch.no_grad():
        layer.base_layer.weight[0, :2] = torch.tensor([-0.0, 3e-7])  # a sign that + 0 loses, a number that + 1 - 1 loses
    before = {k: bits(v) for k, v in layer.state_dict().items()}
    for _ in range(100):
        layer.merge()
        layer.unmerge()
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(bits(after[k]), before[k]) for k in before)
    assert isinstance(layer.base_layer.weight, nn.Parameter)
    assert not layer.base_layer.weight.requires_grad


def test_merging_forgets_nothing_learnt_between_two_merges():
    layer = make()
    layer.merge()
    layer.unmerge()
    with torch.no_grad():
        layer.lora_B.mul_(-2)
    x = data(4)
    wanted = expected(layer, x)[0]
    layer.merge()
    assert_within(layer(x), wanted, "second merge")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_merge_reports_what_rounding_swallowed(dtype):
    """Against the same share computed in float64, for an update of 0.5 % of the weight's norm."""
    layer = make(r=8, d_in=128, d_out=96, dtype=dtype)
    with torch.no_grad():
        layer.lora_B.mul_(0.005 * layer.base_layer.weight.float().norm() / layer.delta_weight().float().norm())
    w, _, a, b = parts(layer)
    delta = (layer.alpha / layer.r * b @ a).detach()
    lost = float(torch.linalg.norm((w + delta).to(dtype).double() - w - delta) / torch.linalg.norm(delta))
    reported = layer.merge()
    # half precision: entries that fall on the other side of a rounding boundary are rare. float32: the report's own
    # arithmetic is float32, so only its size is right
    assert reported == pytest.approx(lost, rel=0.02 if dtype in HALVES else 1.0)
    assert (0.2 < reported < 0.4) == (dtype == torch.bfloat16)  # design: 31 %
    assert layer.merge() == reported
    assert make(random_b=False).merge() == 0.0  # no update, nothing to lose


def test_trained_while_frozen_base_keeps_its_bits():
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        layer = make(dtype=torch.float32)
        frozen = {k: bits(v) for k, v in layer.named_parameters() if not k.startswith("lora_")}
        start = {k: v.detach().clone() for k, v in layer.named_parameters() if k.startswith("lora_")}
        step = optimizer(layer.parameters(), lr=0.1, weight_decay=0.1)  # all of them: frozen ones must not decay either
        for seed in range(5):
            step.zero_grad()
            layer(data(4, dtype=torch.float32, seed=seed)).square().sum().backward()
            step.step()
        now = dict(layer.named_parameters())
        assert set(frozen) == {"base_layer.weight", "base_layer.bias"}
        assert all(torch.equal(bits(now[k]), v) for k, v in frozen.items())
        assert all(not torch.equal(now[k], v) for k, v in start.items())


@pytest.mark.parametrize("merged", [False, True])
def test_train_eval_and_forward_change_no_weight(merged):
    layer = make(dropout=0.5)
    if merged:
        layer.merge()
    before = {k: bits(v) for k, v in layer.named_parameters()}
    for mode in (True, False, True, False):
        layer.train(mode)
        with torch.no_grad():
            layer(data(4))
        assert layer.merged is merged
        assert all(torch.equal(bits(v), before[k]) for k, v in layer.named_parameters())


# ---- state_dict, copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("target_merged", [False, True])
@pytest.mark.parametrize("source_merged", [False, True])
def test_a_state_dict_never_counts_delta_w_twice(source_merged, target_merged, wrapped):
    """Saved merged or not, loaded into a layer that is merged or not: always the same function."""
    source, target = make(seed=1), make(seed=9)
    x = data(4)
    wanted = expected(source, x)[0]
    if source_merged:
        source.merge()
    if target_merged:
        target.merge()
    outer = (lambda m: nn.Sequential(m)) if wrapped else (lambda m: m)
    buffer = io.BytesIO()
    torch.save(outer(source).state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    assert {k.removeprefix("0.") for k in state} == {"base_layer.weight", "base_layer.bias", "lora_A", "lora_B"}
    result = outer(target).load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert_within(target(x), wanted, "as loaded")
    target.unmerge()
    assert_within(target(x), wanted, "unmerged")
    target.merge()
    assert_within(target(x), wanted, "merged afresh")
    assert_within(source(x), wanted, "the source, which saving must leave alone")
    source.unmerge()
    assert_within(source(x), wanted, "the source, unmerged")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(how, merged):
    layer = make(rslora=True, dropout=0.2).eval()
    weight = bits(layer.base_layer.weight)
    x = data(4)
    if merged:
        layer.merge()
    before = layer(x)
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert (twin.merged, twin.r, twin.alpha, twin.scaling) == (merged, layer.r, layer.alpha, layer.scaling)
    assert torch.equal(twin(x), before)
    twin.unmerge()
    assert torch.equal(bits(twin.base_layer.weight), weight)
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(1.0)
    twin.alpha = 99.0
    assert torch.equal(layer(x), before)
    layer.unmerge()
    assert torch.equal(bits(layer.base_layer.weight), weight)


# ---- nothing is lost silently while merged --------------------------------------------------------------------------


def train_a_step(layer):
    out = layer.train()(data(4, seed=21))
    out.backward(torch.ones_like(out))
    with torch.no_grad():
        for p in (layer.lora_A, layer.lora_B):
            p -= 0.1 * p.grad


def set_alpha(layer):
    layer.alpha = 40.0


def scale_in_place(name, raw=False):
    def edit(layer):
        tensor = layer.get_parameter(name)
        with torch.no_grad():
            (tensor.data if raw else tensor).mul_(3.0)
    return edit


def replace(name):
    def edit(layer):
        owner, _, leaf = name.rpartition(".")
        old = layer.get_parameter(name)
        torch.manual_seed(5)
        new = nn.Parameter(torch.randn_like(old), requires_grad=old.requires_grad)
        with torch.no_grad():
            for _ in range(old._version - new._version):  # counting in-place edits alone must not be what tells them apart
                new.mul_(1)
        setattr(layer.get_submodule(owner), leaf, new)
    return edit


EDITS = {
    "train": train_a_step,
    "alpha": set_alpha,
    "A in place": scale_in_place("lora_A"),
    "B in place": scale_in_place("lora_B"),
    "base weight in place": scale_in_place("base_layer.weight"),
    "A through .data": scale_in_place("lora_A", raw=True),
    "B through .data": scale_in_place("lora_B", raw=True),
    "A replaced": replace("lora_A"),
    "B replaced": replace("lora_B"),
    "base weight replaced": replace("base_layer.weight"),
}


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("what", EDITS)
def test_an_edit_while_merged_raises_or_takes_effect(what, look):
    """Whoever edits either reads an error that speaks of merging, or gets what they asked for, merged and unmerged.

    With `look` the merged layer computes once before it is unmerged; without, that chance to notice is missed.
    torch does not count edits through `.data`, so those of A and B need to show only once the layer is unmerged.
    """
    x = data(4)
    control = make()
    EDITS[what](control)
    wanted = expected(control, x)[0]

    layer = make()
    original = bits(layer.base_layer.weight)
    layer.merge()
    try:
        EDITS[what](layer)
        seen = [("merged", layer(x))] if look else []
        layer.unmerge()
        seen.append(("unmerged", layer(x)))
    except (RuntimeError, ValueError, AttributeError) as error:
        assert "merge" in str(error).lower()
        return
    if "base weight" in what:
        # An edit of the *sum* by 3 cannot become an edit of W; it must have raised, or stay visible after unmerge.
        assert not torch.equal(bits(layer.base_layer.weight), original)
        return
    for when, out in seen:
        if when == "unmerged" or ".data" not in what:
            assert_within(out, wanted, f"{what}, {when}")


def test_what_raised_can_be_put_right():
    """After the error the way out that a reader would try works: unmerge, edit, merge."""
    layer = make()
    layer.merge()
    try:
        layer.alpha = 40.0
    except (RuntimeError, ValueError):
        layer.unmerge()
        layer.alpha = 40.0
        layer.merge()
    x = data(4)
    w, bias, a, b = parts(make())
    out = oracle(w, bias, a, b, x, 40.0 / 3).detach()
    size = oracle(w.abs(), bias.abs(), a.abs(), b.abs(), x.abs(), 40.0 / 3).detach()
    assert_within(layer(x), (out, 50 * torch.finfo(x.dtype).eps * size), "merged with the new alpha")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_to_another_dtype_while_merged(dtype):
    layer = make()
    layer.merge()
    wanted = bits(layer.base_layer.weight.to(dtype))
    layer.to(dtype)
    assert torch.equal(bits(layer.base_layer.weight), wanted)
    layer.unmerge()
    assert same_bits(layer.base_layer.weight, make().base_layer.weight.to(dtype))
    assert layer(data(4, dtype=dtype)).dtype == dtype


# ---- disabling ------------------------------------------------------------------------------------------------------


def test_disabled_is_the_base_and_back():
    layer = make(dropout=0.5)
    x = data(4)
    plain = functional_call(nn.Linear(D_IN, D_OUT, dtype=x.dtype), dict(layer.base_layer.named_parameters()), (x,))
    layer.eval()
    before = layer(x)
    with lora_disabled(layer):
        assert torch.equal(layer(x), plain)
        with lora_disabled(layer):
            assert torch.equal(layer(x), plain)
        assert torch.equal(layer(x), plain)  # the inner one restores what it found
    assert torch.equal(layer(x), before)
    with pytest.raises(ZeroDivisionError), lora_disabled(layer):
        1 / 0  # noqa: B018
    assert torch.equal(layer(x), before)


def test_disabled_while_merged_is_the_base_or_an_error():
    layer = make()
    x = data(4)
    plain = layer.base_layer(x)
    layer.merge()
    merged = layer(x)
    try:
        with lora_disabled(layer):
            assert torch.equal(layer(x), plain)
    except RuntimeError as error:
        assert "merge" in str(error)
    assert layer.merged is True
    assert torch.equal(layer(x), merged)


# ---- the machinery around a layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arrives_as", [torch.float32, torch.bfloat16])  # the second from an earlier layer under autocast
def test_autocast(arrives_as):
    layer = make(dtype=torch.float32)
    x, grad = data(4, dtype=arrives_as).float(), data(4, d_in=D_OUT, dtype=torch.float32, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.to(arrives_as))
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, (layer.lora_A, layer.lora_B), grad.bfloat16())
    assert all(g.dtype == torch.float32 for g in grads)
    # every operand is rounded to bfloat16 first, so its eps counts, on the float32 run's magnitudes
    wider = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    (value, bound), _, (da, da_bound), (db, db_bound) = expected(layer, x, grad)
    assert_within(out, (value, bound * wider), "output")
    assert_within(grads[0], (da, da_bound * wider), "dA")
    assert_within(grads[1], (db, db_bound * wider), "dB")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_gives_the_same_bits(dropout, reentrant):
    layer, grad = make(dropout=dropout).train(), data(4, d_in=D_OUT, seed=3)
    x = data(4).requires_grad_()
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        torch.manual_seed(13)
        run(x).backward(grad)
        results.append((layer.lora_A.grad.clone(), layer.lora_B.grad.clone()))
    assert results[0][0].any() and results[0][1].any()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_moving_alpha_does_not_recompile():
    """Dynamo may specialise once and generalise once; a graph per value would freeze a live slider."""
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    layer, x = make(), data(4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for alpha in (5.0, 6.0, 7.5, 16.0, 0.25, 64.0, -3.0):
        layer.alpha = alpha
        assert_within(compiled(x), expected(layer, x)[0], f"alpha={alpha}")
    assert 1 <= dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    dynamo.reset()


@pytest.mark.slow
def test_compiled_by_inductor(c_compiler):
    import torch._dynamo as dynamo

    dynamo.reset()
    layer, x, grad = make(), data(4), data(4, d_in=D_OUT, seed=3)
    compiled = torch.compile(layer)
    for alpha in (5.0, 16.0):
        layer.alpha = alpha
        wanted = expected(layer, x, grad)
        x_leaf = x.clone().requires_grad_()
        out = compiled(x_leaf)
        grads = torch.autograd.grad(out, (x_leaf, layer.lora_A, layer.lora_B), grad)
        for name, actual, value in zip(("output", "dx", "dA", "dB"), (out, *grads), wanted, strict=True):
            assert_within(actual, value, f"{name} at alpha={alpha}")
    dynamo.reset()


# ---- other people's implementations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("rslora", [False, True])
def test_equal_to_peft(r, rslora):
    peft = pytest.importorskip("peft")
    layer = make(r=r, rslora=rslora)
    model = nn.Sequential(copy.deepcopy(layer.base_layer))
    config = peft.LoraConfig(r=r, lora_alpha=ALPHA, target_modules=["0"], use_rslora=rslora)
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    module = theirs.base_model.model[0]
    assert module.scaling["default"] == pytest.approx(layer.scaling, rel=1e-15)  # one rounding
    with torch.no_grad():
        module.lora_A["default"].weight.copy_(layer.lora_A)
        module.lora_B["default"].weight.copy_(layer.lora_B)
    x, grad = data(2, 3), data(2, 3, d_in=D_OUT, seed=3)
    bounds = [bound for _, bound in expected(layer, x, grad, layer.scaling)]
    x_leaf = x.clone().requires_grad_()
    out = theirs(x_leaf)
    wanted = torch.autograd.grad(
        out, (x_leaf, module.lora_A["default"].weight, module.lora_B["default"].weight), grad)
    for actual, value, bound in zip(output_and_grads(layer, x, grad), (out, *wanted), bounds, strict=True):
        assert_within(actual, (value.detach(), 2 * bound), "peft")  # both sides round
    _, _, a, b = parts(layer)
    size = (r + 4) * torch.finfo(torch.float64).eps * layer.scaling * (b.abs() @ a.abs()).detach()
    assert_within(layer.delta_weight(), (module.get_delta_weight("default").detach(), 2 * size), "delta_weight")
    layer.merge()
    merged = theirs.merge_and_unload()[0].weight.detach()
    assert_within(layer.base_layer.weight, (merged, 2 * size + 1e-15 * merged.abs()), "merged weight")


@pytest.mark.parametrize("r", RANKS)
def test_equal_to_loralib(r):
    loralib = pytest.importorskip("loralib")
    layer = make(r=r)
    theirs = loralib.Linear(D_IN, D_OUT, r=r, lora_alpha=ALPHA, merge_weights=False, dtype=torch.float64)
    with torch.no_grad():
        theirs.weight.copy_(layer.base_layer.weight)
        theirs.bias.copy_(layer.base_layer.bias)
        theirs.lora_A.copy_(layer.lora_A)
        theirs.lora_B.copy_(layer.lora_B)
    x, grad = data(2, 3), data(2, 3, d_in=D_OUT, seed=3)
    bounds = [bound for _, bound in expected(layer, x, grad)]
    x_leaf = x.clone().requires_grad_()
    out = theirs(x_leaf)
    wanted = torch.autograd.grad(out, (x_leaf, theirs.lora_A, theirs.lora_B), grad)
    for actual, value, bound in zip(output_and_grads(layer, x, grad), (out, *wanted), bounds, strict=True):
        assert_within(actual, (value.detach(), 2 * bound), "loralib")  # both sides round
