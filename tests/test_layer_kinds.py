"""LoRAConv1D, LoRAFusedLinear, LoRAEmbedding and LoRAConv2d, property by property, as tests/test_layers.py does for LoRALinear.

The oracle is `torch.func.functional_call` on a fresh base layer in float64 with the weight W + ΔW, where ΔW is put together
here: s·B·A for each slice, laid out by hand. `assert_within` takes error bounds, not guesses: about n·eps times the same sum
over absolute values, n being the additions in the longest chain. Second opinions: peft and loralib.
"""

import copy
import io
import math
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from test_layers import ALPHA, DTYPES, HALVES, RANKS, assert_within, bits, same_bits
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_lab.adapt import lora_disabled, make_layer, merge_and_unload, remove_lora
from lora_lab.layers import LoRAConv1D, LoRAConv2d, LoRAEmbedding, LoRAFusedLinear, LoRALinear

D_IN, D_OUT = 11, 12  # 12: three slices of 4
TOKENS, DIM = 13, 7
SUBSETS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


@dataclass(frozen=True)
class Kind:
    """A base layer, the LoRA layer around it, an input: what the properties below are crossed over."""

    name: str
    family: str  # conv1d, fused, embedding, conv2d
    options: dict = field(default_factory=dict)  # of the base layer
    slices: tuple = ()
    shape: tuple = (2, 3)  # of the input, without its last dimension (linear) or altogether

    def base(self, bias=True, dtype=torch.float64):
        if self.family == "embedding":
            return nn.Embedding(TOKENS, DIM, dtype=dtype, **self.options)
        if self.family == "conv2d":
            return nn.Conv2d(4, 6, bias=bias, dtype=dtype, **self.options)
        if self.transposed:
            layer = Conv1D(D_OUT, D_IN).to(dtype)
            nn.init.normal_(layer.weight)  # its own std of 0.02 would hide W behind ΔW
            nn.init.normal_(layer.bias)
            return layer
        return nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype)

    @property
    def transposed(self):
        return self.family == "conv1d" or "conv1d" in self.name

    def make(self, r=3, bias=True, dtype=torch.float64, trained=True, seed=1, **options):
        """The layer after some training (neither factor is zero), in eval mode."""
        torch.manual_seed(seed)
        base = self.base(bias, dtype)
        wrap = {"conv1d": LoRAConv1D, "fused": LoRAFusedLinear, "embedding": LoRAEmbedding, "conv2d": LoRAConv2d}[self.family]
        extra = {"slices": self.slices} if self.family == "fused" else {}
        layer = wrap(base, r, ALPHA, **extra, **options)
        if trained:
            with torch.no_grad():
                layer.lora_A.normal_()
                layer.lora_B.normal_()
                if self.padding is not None:
                    layer.lora_A[:, self.padding] = 0  # what training leaves there: it starts at 0 and gets no gradient
        return layer.eval()

    @property
    def padding(self):
        return self.options.get("padding_idx")

    def data(self, dtype=torch.float64, seed=2):
        torch.manual_seed(seed)
        if self.family == "embedding":
            return torch.randint(0, TOKENS, self.shape)
        return torch.randn(self.shape if self.family == "conv2d" else (*self.shape, D_IN), dtype=dtype)


def conv(name, shape=(2, 4, 7, 8), **options):
    return Kind(f"conv2d {name}", "conv2d", {"kernel_size": 3} | options, shape=shape)


CONV1D = Kind("conv1d", "conv1d")
FUSED = Kind("fused linear q,v", "fused", slices=(0, 2))
FUSED_CONV1D = Kind("fused conv1d q,v", "fused", slices=(0, 2))
EMBEDDING = Kind("embedding", "embedding")
CONV2D = conv("3x2, stride 2, padding 1", kernel_size=(3, 2), stride=2, padding=1)
MAIN = [CONV1D, FUSED, FUSED_CONV1D, EMBEDDING, CONV2D]

GEOMETRIES = [
    *(Kind(f"conv1d, input of rank {len(s) + 1}", "conv1d", shape=s) for s in [(), (4,), (2, 1, 3), (0,)]),
    *(Kind(f"fused {base} {s}", "fused", slices=s) for base in ("linear", "conv1d") for s in SUBSETS),
    *(Kind(f"embedding, input of rank {len(s)}", "embedding", shape=s) for s in [(), (5,), (2, 2, 3), (0,)]),
    Kind("embedding with padding_idx", "embedding", {"padding_idx": 4}, shape=(6, 9)),
    Kind("embedding with padding_idx=0", "embedding", {"padding_idx": 0}, shape=(6, 9)),
    conv("1x1", kernel_size=1), conv("1x3", kernel_size=(1, 3)), conv("5x2", kernel_size=(5, 2)),
    conv("stride (2, 3)", stride=(2, 3)), conv("padding (2, 1)", padding=(2, 1)), conv("dilation (1, 2)", dilation=(1, 2)),
    conv("same", padding="same"), conv("same, even kernel, dilated", kernel_size=(4, 2), padding="same", dilation=(1, 3)),
    conv("valid", padding="valid", stride=2), conv("unbatched", shape=(4, 7, 8), padding=1), conv("empty batch", shape=(0, 4, 7, 8)),
    *(conv(f"{mode}, padding {p}", padding_mode=mode, padding=p) for mode in ("reflect", "circular", "replicate") for p in ((2, 1), "same")),
]


def by_name(kinds):
    return pytest.mark.parametrize("kind", kinds, ids=lambda k: k.name)


# ---- the oracle -----------------------------------------------------------------------------------------------------


def assembled(kind, a, b, r):
    """B A in the base weight's layout, put together block by block."""
    if kind.family == "fused":
        n, width = len(kind.slices), D_OUT // 3
        rows = [torch.zeros(width, D_IN, dtype=a.dtype)] * 3
        for k, place in enumerate(kind.slices):
            rows[place] = b[k * width : (k + 1) * width] @ a[k * r : (k + 1) * r]
        assert n * width == len(b) and n * r == len(a)
        product = torch.cat(rows)
    else:
        product = b @ a
    if kind.family == "conv2d":
        size = kind.options["kernel_size"]
        return product.reshape(6, 4, *(size if isinstance(size, tuple) else (size, size)))
    return product.T if kind.transposed or kind.family == "embedding" else product


def oracle(kind, layer, x, scale, a, b, absolute=False):
    """The base layer with W + scale·BA, in float64; for the error bound with absolute values all through."""
    take = torch.abs if absolute else lambda t: t
    bias = getattr(layer.base_layer, "bias", None)
    plain = kind.base(bias=bias is not None, dtype=torch.float64)
    state = {"weight": take(layer.base_layer.weight.detach().double()) + (abs(scale) if absolute else scale) * assembled(kind, a, b, layer.r)}
    if bias is not None:
        state["bias"] = take(bias.detach().double())
    return functional_call(plain, state, (x,))


def expected(kind, layer, x, grad=None, scale=None, eps=None):
    """[(value, bound)] for the output and, given its gradient, for x (where x is real), A and B."""
    scale = layer.alpha / layer.r if scale is None else scale
    dtype = layer.base_layer.weight.dtype
    eps, tiny = eps or torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # the longest chain: over a row of W, over r, over the outputs, over all positions; 8 for roundings in between
    terms = layer.base_layer.weight.numel() + layer.r * 3 + x.numel() + 8
    results = []
    for absolute in (False, True):
        take = torch.abs if absolute else torch.clone
        a, b = (take(p.detach().double()).requires_grad_() for p in (layer.lora_A, layer.lora_B))
        x64 = take(x.detach().double()).requires_grad_() if x.is_floating_point() else x
        out = oracle(kind, layer, x64, scale, a, b, absolute)
        wrt = [p for p in (x64, a, b) if p.is_floating_point()]
        grads = () if grad is None else torch.autograd.grad(out, wrt, take(grad.double()))
        results.append((out.detach(), *grads))
    return [(value, terms * (eps * size + tiny)) for value, size in zip(*results, strict=True)]


def output_and_grads(layer, x, grad):
    x = x.clone().requires_grad_(x.is_floating_point())
    out = layer(x)
    return out, *torch.autograd.grad(out, [p for p in (x, layer.lora_A, layer.lora_B) if p.requires_grad], grad)


def gradient_for(kind, layer, x, dtype=None):
    torch.manual_seed(3)
    with torch.no_grad():
        out = layer.base_layer(x)
    return torch.randn(out.shape, dtype=dtype or out.dtype)


def assert_agrees(kind, layer, x, scale=None):
    grad = gradient_for(kind, layer, x)
    wanted = expected(kind, layer, x, grad, scale)
    names = ("output", *(("dx",) if x.is_floating_point() else ()), "dA", "dB")
    for name, actual, value in zip(names, output_and_grads(layer, x, grad), wanted, strict=True):
        assert_within(actual, value, f"{kind.name}, {name}")


# ---- shapes and the start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", RANKS)
@by_name(MAIN)
def test_exactly_the_base_at_init(kind, r, bias, dtype):
    layer = kind.make(r=r, bias=bias, dtype=dtype, trained=False, dropout=0.3)
    base, x = layer.base_layer, kind.data(dtype)
    for mode in (True, False):
        out = layer.train(mode)(x)
        assert same_bits(out + 0.0, base(x) + 0.0)  # + 0.0: -0.0 + 0 is 0.0
    assert not layer.delta_weight().any()
    n = len(kind.slices) or 1
    rows, columns = {"embedding": (DIM, TOKENS), "conv2d": (6, 4 * 3 * 2)}.get(kind.family, (D_OUT, D_IN))
    assert tuple(layer.delta_weight().shape) == (rows, columns)
    assert tuple(layer.lora_A.shape) == (n * r, columns)
    assert tuple(layer.lora_B.shape) == (rows * n // 3 if kind.slices else rows, r)
    assert layer.lora_A.dtype == layer.lora_B.dtype == dtype
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert layer.weight is base.weight and layer.bias is getattr(base, "bias", None)


def test_init_is_the_peers():
    """A uniform in ±1/sqrt(fan in) and B zero; the embedding A zero and B standard normal (loralib's and peft's rule)."""
    torch.manual_seed(0)
    for layer, fan_in in [
        (LoRAConv1D(Conv1D(6, 400), 64, 1), 400),
        (LoRAFusedLinear(nn.Linear(400, 6), 32, 1), 400),
        (LoRAConv2d(nn.Conv2d(44, 6, 3), 64, 1), 44 * 9),
    ]:
        a = layer.lora_A.detach()
        assert not layer.lora_B.any() and float(a.abs().max()) <= fan_in**-0.5
        # over 25,000 draws: the sample's standard deviation is within 0.4 % (one sigma); 2 % is 5 sigma
        assert float(a.std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)
    layer = LoRAEmbedding(nn.Embedding(5, 400), 64, 1)
    assert not layer.lora_A.any()
    assert float(layer.lora_B.detach().std()) == pytest.approx(1, rel=0.02)


@by_name(MAIN)
def test_the_first_gradient_reaches_one_factor_only(kind):
    """The factor that starts at zero moves first: B, for the embedding A."""
    layer = kind.make(trained=False)
    x = kind.data()
    *_, da, db = output_and_grads(layer, x, gradient_for(kind, layer, x))
    first, second = (da, db) if kind.family == "embedding" else (db, da)
    assert first.any() and not second.any()


# ---- the function and its gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", RANKS)
@by_name(MAIN)
def test_output_and_gradients_equal_the_base_with_the_summed_weight(kind, r, bias, dtype):
    layer = kind.make(r=r, bias=bias, dtype=dtype).train()
    assert_agrees(kind, layer, kind.data(dtype))
    layer = kind.make(r=r, bias=bias, dtype=dtype, rslora=True).train()
    assert_agrees(kind, layer, kind.data(dtype), ALPHA / math.sqrt(r))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@by_name(GEOMETRIES)
def test_in_every_geometry(kind, dtype):
    """Function, gradients, merging: strides, padding modes, subsets of slices, ranks of the input."""
    layer = kind.make(dtype=dtype, dropout=0.4)
    x = kind.data(dtype)
    assert_agrees(kind, layer, x)
    weight, before, wanted = bits(layer.base_layer.weight), layer(x), expected(kind, layer, x)[0]
    layer.merge()
    assert_within(layer(x), wanted, "merged")
    with lora_disabled(layer):
        plain = layer(x)
    layer.unmerge()
    assert same_bits(plain, layer.base_layer(x))
    assert torch.equal(bits(layer.base_layer.weight), weight) and same_bits(layer(x), before)


@by_name(MAIN + GEOMETRIES)
def test_delta_weight_and_its_layout(kind):
    layer = kind.make(r=5)
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    wanted, size = (ALPHA / 5 * assembled(kind, p, q, 5) for p, q in ((a, b), (a.abs(), b.abs())))
    delta = layer.delta_weight()
    assert delta.shape[0] == {"embedding": DIM, "conv2d": 6}.get(kind.family, D_OUT)
    # 3 r roundings: the fused product also adds the zeros of other slices' blocks
    assert_within(layer.to_base_layout(delta), (wanted, 20 * torch.finfo(a.dtype).eps * size), "delta_weight")
    g = torch.randn_like(delta)
    assert all(grad.any() for grad in torch.autograd.grad(delta, (layer.lora_A, layer.lora_B), g))


@pytest.mark.parametrize("tokens", [torch.int64, torch.int32])
def test_embedding_takes_both_kinds_of_integers(tokens):
    assert_agrees(EMBEDDING, EMBEDDING.make(), EMBEDDING.data().to(tokens))


def test_the_row_of_the_padding_token_stays_what_it_is():
    """A's column of the padding token starts at 0 and gets no gradient, weight decay or not."""
    kind = Kind("padded", "embedding", {"padding_idx": 4}, shape=(40,))
    layer = kind.make(trained=False).train()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        x = kind.data(seed=seed)
        assert (x == 4).any()
        layer(x).square().sum().backward()
        optimizer.step()
    assert not layer.lora_A[:, 4].any() and layer.lora_A[:, 3].any()
    x = torch.tensor([4])
    assert torch.equal(layer(x), layer.base_layer(x))


def test_scale_grad_by_freq_means_what_it_means_in_the_peers():
    """A's gradient is divided by how often a token occurs, as the base's own would be. B's, shared by all tokens, is not, in
    loralib and peft alike: there functional_call on the sum, which divides it too, is no oracle."""
    loralib = pytest.importorskip("loralib")
    kind = Kind("by frequency", "embedding", {"scale_grad_by_freq": True}, shape=(5, 8))
    layer, x = kind.make(), kind.data()
    assert x.unique().numel() < x.numel()
    grad = gradient_for(kind, layer, x)
    out, da, db = output_and_grads(layer, x, grad)
    wanted_out, wanted_da, _ = expected(kind, layer, x, grad)
    assert_within(out, wanted_out, "output")
    assert_within(da, wanted_da, "dA")
    theirs = loralib.Embedding(TOKENS, DIM, r=3, lora_alpha=ALPHA, scale_grad_by_freq=True, merge_weights=False, dtype=torch.float64)
    theirs.load_state_dict({"weight": layer.base_layer.weight, "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    wanted = torch.autograd.grad(theirs(x), (theirs.lora_A, theirs.lora_B), grad)
    # sums of 40 products of size 1 and their scaling, rounded on both sides
    torch.testing.assert_close((da, db), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@by_name([CONV1D, FUSED, FUSED_CONV1D, CONV2D, conv("same", padding="same")])
def test_dropout_in_training_with_a_shared_mask(kind, dtype):
    """Dropout acts on the input of the LoRA branch alone."""
    layer, x = kind.make(dtype=dtype, dropout=0.4).train(), kind.data(dtype)
    grad = gradient_for(kind, layer, x)
    torch.manual_seed(11)
    actual = output_and_grads(layer, x, grad)
    torch.manual_seed(11)
    mask = F.dropout(torch.ones_like(x), 0.4, training=True).double()
    assert 0 < int((mask == 0).sum()) < mask.numel()
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x64 = x.double().requires_grad_()
    full = oracle(kind, layer, x64 * mask, ALPHA / 3, a, b) - oracle(kind, layer, x64 * mask, 0.0, a, b)
    out = oracle(kind, layer, x64, 0.0, a, b) + full
    wanted = (out, *torch.autograd.grad(out, (x64, a, b), grad.double()))
    # the mask is at most 1/(1-p); twice, for the difference of two oracles (which matters in float64 only)
    for got, value, (_, bound) in zip(actual, wanted, expected(kind, layer, x, grad), strict=True):
        assert_within(got, (value.detach(), 2 * bound / (1 - 0.4)), kind.name)
    layer.eval()
    assert_within(layer(x), expected(kind, layer, x)[0], "eval")


@by_name([CONV1D, FUSED, FUSED_CONV1D, EMBEDDING, conv("3x3, one position", shape=(1, 4, 3, 3))])
def test_forward_and_backward_never_build_a_matrix_of_the_weights_size(kind):
    from torch.utils._python_dispatch import TorchDispatchMode

    layer = kind.make(r=1)
    weight, big = layer.base_layer.weight, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple | list) else [result]:
                if isinstance(t, torch.Tensor) and t.numel() >= weight.numel() and t.data_ptr() != weight.data_ptr():
                    big.append((str(func), tuple(t.shape)))
            return result

    x = kind.data()[:1]
    x = x[:, :1] if kind.family != "conv2d" else x
    with Watch():
        layer(x).sum().backward()
    assert big == []
    with Watch():
        layer.delta_weight()
    assert big, "the watch itself sees ΔW"


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@by_name(MAIN)
def test_fp32_factors_over_a_half_precision_base(kind, dtype):
    layer, x = kind.make(dtype=dtype, adapter_dtype=torch.float32), kind.data(dtype)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    weight, grad = bits(layer.base_layer.weight), gradient_for(kind, layer, x)
    wanted = expected(kind, layer, x, grad)
    actual = output_and_grads(layer, x, grad)
    assert actual[0].dtype == dtype and actual[-1].dtype == actual[-2].dtype == torch.float32
    for name, got, value in zip(("dB", "dA", "dx or output"), actual[::-1], wanted[::-1], strict=False):
        assert_within(got, value, name)
    # h and the update stay in float32: the factors' gradients are far better than half precision's
    for got, (value, bound) in zip(actual[-2:], expected(kind, layer, x, grad, eps=torch.finfo(torch.float32).eps)[-2:], strict=True):
        assert_within(got, (value, bound), "in float32")
    layer.merge()
    assert layer.base_layer.weight.dtype == dtype
    assert_within(layer(x), wanted[0], "merged")
    layer.unmerge()
    assert torch.equal(bits(layer.base_layer.weight), weight)


@pytest.mark.parametrize("factors", [None, torch.float32])
@pytest.mark.parametrize("arrives_as", [torch.float32, torch.bfloat16])  # the second from an earlier layer under autocast
@by_name(MAIN)
def test_autocast(kind, arrives_as, factors):
    layer = kind.make(dtype=torch.float32, adapter_dtype=factors)
    x = kind.data(torch.float32)
    x = x.to(arrives_as).float() if x.is_floating_point() else x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = x.to(arrives_as) if x.is_floating_point() else x
        out, plain = layer(given), layer.base_layer(given)
    assert out.dtype == plain.dtype  # bfloat16 but for the look-up, which autocast leaves alone
    torch.manual_seed(3)
    grad = torch.randn(out.shape, dtype=out.dtype)
    grads = torch.autograd.grad(out, (layer.lora_A, layer.lora_B), grad)
    # every operand is rounded to bfloat16 first, so its eps counts
    value, *_, da, db = expected(kind, layer, x, grad, eps=torch.finfo(torch.bfloat16).eps)
    for name, got, wanted in zip(("output", "dA", "dB"), (out, *grads), (value, da, db), strict=True):
        assert_within(got, wanted, name)
    assert all(g.dtype == torch.float32 for g in grads)


@by_name(MAIN)
def test_float32_autocast_leaves_the_bits_alone(kind):
    layer, x = kind.make(dtype=torch.float32), kind.data(torch.float32)
    with torch.autocast("cpu", enabled=False):
        out = layer(x)
    assert same_bits(out, layer(x))


# ---- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", RANKS)
@by_name(MAIN)
def test_merge_keeps_the_function_and_unmerge_restores_every_bit(kind, r, bias, dtype):
    layer, x = kind.make(r=r, bias=bias, dtype=dtype, dropout=0.3), kind.data(dtype)
    weight, before, plain = bits(layer.base_layer.weight), layer(x), layer.base_layer(x)
    wanted = expected(kind, layer, x)[0]
    lost = layer.merge()
    assert layer.merged and 0 <= lost < 1
    assert_within(layer(x), wanted, "merged")
    assert same_bits(layer(x), layer.base_layer(x))
    once = bits(layer.base_layer.weight)
    assert layer.merge() == lost and torch.equal(bits(layer.base_layer.weight), once)  # merging twice changes nothing
    with lora_disabled(layer):
        assert same_bits(layer(x), plain)
    assert torch.equal(bits(layer.base_layer.weight), once)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged and torch.equal(bits(layer.base_layer.weight), weight)
    assert same_bits(layer(x), before)


@pytest.mark.parametrize("dtype", DTYPES)
@by_name(MAIN)
def test_merged_weight_is_the_sum_rounded_once(kind, dtype):
    layer = kind.make(r=8, dtype=dtype)
    w, a, b = (p.detach().double() for p in (layer.base_layer.weight, layer.lora_A, layer.lora_B))
    exact, size = w + ALPHA / 8 * assembled(kind, a, b, 8), w.abs() + ALPHA / 8 * assembled(kind, a.abs(), b.abs(), 8)
    layer.merge()
    # in float32 or better: r terms (the fused product adds n r, most of them zeros) and their scaling; then one rounding
    info, own = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    bound = 30 * own.eps * size + info.eps / 2 * exact.abs() + info.tiny * info.eps
    assert_within(layer.base_layer.weight, (exact, bound), "merged weight")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@by_name(MAIN)
def test_a_hundred_merges_leave_no_trace(kind, dtype):
    layer = kind.make(dtype=dtype)
    with torch.no_grad():
        layer.base_layer.weight.view(-1)[:2] = torch.tensor([-0.0, 3e-7])  # a sign that + 0 loses, a number that + 1 - 1 loses
    before = {k: bits(v) for k, v in layer.state_dict().items()}
    for _ in range(100):
        layer.merge()
        layer.unmerge()
    after = layer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(bits(after[k]), before[k]) for k in before)


@by_name(MAIN)
def test_a_merged_layer_does_not_train_and_says_so(kind):
    layer = kind.make()
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.train()(kind.data())
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.alpha = 3.0
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.reset_lora()
    with torch.no_grad():
        layer.lora_B.mul_(2)
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.eval()(kind.data())


def test_a_channels_last_convolution_merges_and_keeps_its_layout():
    layer, x = CONV2D.make(), CONV2D.data()
    wanted, weight = expected(CONV2D, layer, x)[0], layer.base_layer.weight.detach().clone()
    layer.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert_within(layer(x), wanted, "channels last")
    layer.merge()
    assert layer.base_layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert_within(layer(x), wanted, "merged")
    layer.unmerge()
    assert same_bits(layer.base_layer.weight, weight)


# ---- frozen, saved, copied ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@by_name(MAIN)
def test_frozen_weights_keep_their_bits_in_training(kind, optimizer):
    layer = kind.make(dtype=torch.float32).train()
    start = {k: v.detach().clone() for k, v in layer.named_parameters()}
    step = optimizer(layer.parameters(), lr=0.01, weight_decay=0.1)
    for seed in range(3):
        step.zero_grad()
        layer(kind.data(torch.float32, seed)).square().mean().backward()
        step.step()
    for name, p in layer.named_parameters():
        assert same_bits(p, start[name]) != name.startswith("lora_"), name


@pytest.mark.parametrize("merged", [False, True])
@by_name(MAIN)
def test_train_eval_and_forward_change_no_weight(kind, merged):
    layer = kind.make(dropout=0.5)
    if merged:
        layer.merge()
    before = {k: bits(v) for k, v in layer.named_parameters()}
    for mode in (True, False, True):
        layer.train(mode)
        with torch.no_grad():
            layer(kind.data())
        assert layer.merged is merged
        assert all(torch.equal(bits(v), before[k]) for k, v in layer.named_parameters())


@pytest.mark.parametrize("target_merged", [False, True])
@pytest.mark.parametrize("source_merged", [False, True])
@by_name(MAIN)
def test_a_state_dict_never_counts_delta_w_twice(kind, source_merged, target_merged):
    source, target, x = nn.Sequential(kind.make(seed=1)), nn.Sequential(kind.make(seed=9)), kind.data()
    wanted = expected(kind, source[0], x)[0]
    if source_merged:
        source[0].merge()
    if target_merged:
        target[0].merge()
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert_within(target(x), wanted, "as loaded")
    target[0].merge()
    assert_within(target(x), wanted, "merged afresh")
    assert_within(source(x), wanted, "the source")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
@by_name(MAIN)
def test_copies_are_equal_and_independent(kind, how, merged):
    layer, x = kind.make(rslora=True, dropout=0.2), kind.data()
    weight = bits(layer.base_layer.weight)
    if merged:
        layer.merge()
    before = layer(x)
    twin = how(layer)
    assert type(twin) is type(layer) and twin.merged is merged and same_bits(twin(x), before)
    assert (twin.r, twin.alpha, twin.scaling) == (layer.r, layer.alpha, layer.scaling)
    twin.unmerge()
    assert torch.equal(bits(twin.base_layer.weight), weight)
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(1.0)
    twin.alpha = 99.0
    assert same_bits(layer(x), before)
    layer.unmerge()
    assert torch.equal(bits(layer.base_layer.weight), weight)


@pytest.mark.parametrize("merged", [False, True])
@by_name(MAIN)
def test_removed_and_unloaded(kind, merged):
    x = kind.data()
    for unload in (False, True):
        m = nn.Sequential(kind.make()).eval()
        base, plain, wanted = m[0].base_layer, m[0].base_layer(x), expected(kind, m[0], x)[0]
        if merged:
            m[0].merge()
        (merge_and_unload if unload else remove_lora)(m)
        assert m[0] is base
        if unload:
            assert_within(m(x), wanted, "unloaded")
        else:
            assert same_bits(m(x), plain)


@pytest.mark.parametrize("reentrant", [False, True])
@by_name(MAIN)
def test_gradient_checkpointing_gives_the_same_bits(kind, reentrant):
    layer, x = kind.make(dropout=0.5).train(), kind.data()
    grad = gradient_for(kind, layer, x)
    if reentrant and not x.is_floating_point():
        pytest.skip("the reentrant kind needs an input that requires a gradient; token numbers can't")
    x = x.requires_grad_(x.is_floating_point())
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        torch.manual_seed(13)
        run(x).backward(grad)
        results.append([p.grad.clone() for p in (layer.lora_A, layer.lora_B)])
    assert all(g.any() for g in results[0])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@by_name(MAIN)
def test_compiled_and_moving_alpha_does_not_recompile(kind):
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    layer, x = kind.make(), kind.data()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for alpha in (5.0, 6.0, 7.5, 16.0, -3.0):
        layer.alpha = alpha
        assert_within(compiled(x), expected(kind, layer, x)[0], f"alpha={alpha}")
    assert 1 <= dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    dynamo.reset()


# ---- fused slices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 2, 8])
@pytest.mark.parametrize("slices", SUBSETS)
@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_only_the_chosen_slices_move(base, slices, r):
    kind = Kind(f"fused {base}", "fused", slices=slices)
    layer = kind.make(r=r)
    delta = layer.delta_weight().detach()
    for place, rows in enumerate(delta.view(3, D_OUT // 3, D_IN)):
        # `== 0`, so -0.0 passes; adding either to W changes no bit of a number that is not itself a zero
        assert bool((rows == 0).all()) is (place not in slices)
        if place in slices:
            assert torch.linalg.matrix_rank(rows) == min(r, D_OUT // 3)
    assert torch.linalg.matrix_rank(delta) == min(len(slices) * r, len(slices) * D_OUT // 3, D_IN)
    x = kind.data()
    moved = (layer(x) - layer.base_layer(x)).detach().view(*x.shape[:-1], 3, D_OUT // 3)
    for place in set(range(3)) - set(slices):
        assert not moved[..., place, :].any()
    layer.merge()
    merged = layer.base_layer.weight.T if kind.transposed else layer.base_layer.weight
    original = kind.make(r=r).base_layer.weight
    original = original.T if kind.transposed else original
    for place in set(range(3)) - set(slices):
        assert same_bits(merged.view(3, -1, D_IN)[place] if not kind.transposed else merged.reshape(3, -1, D_IN)[place],
                         original.reshape(3, -1, D_IN)[place])


def test_the_blocks_of_q_and_v_are_independent():
    """A gradient at v's outputs reaches v's factors alone; an edit of q's factors moves q's outputs alone."""
    layer, x = FUSED.make(), FUSED.data()
    grad = torch.zeros(2, 3, D_OUT, dtype=torch.float64)
    grad[..., 8:] = 1
    _, _, da, db = output_and_grads(layer, x, grad)
    assert not da[:3].any() and da[3:].any() and not db[:4].any() and db[4:].any()
    before = layer(x)
    with torch.no_grad():
        layer.lora_A[:3].mul_(2)
        layer.lora_B[:4].add_(1)
    now = layer(x)
    # exact: v's sums are the same numbers in the same order, and a zero added at the most
    assert torch.equal(now[..., 4:], before[..., 4:]) and not torch.equal(now[..., :4], before[..., :4])


def test_as_many_parameters_as_one_adapter_for_the_whole():
    d, r = 12, 4
    for base in (nn.Linear(d, 3 * d), Conv1D(3 * d, d)):
        fused = LoRAFusedLinear(copy.deepcopy(base), r, 8, slices=(0, 2))
        whole = make_layer(base, r, 8)
        counts = [layer.lora_A.numel() + layer.lora_B.numel() for layer in (fused, whole)]
        assert counts == [4 * r * d, 4 * r * d]


@pytest.mark.parametrize(("arguments", "words"), [
    ({"slices": (0, 3)}, ["3", "0 to 2"]), ({"slices": ()}, ["slices"]), ({"slices": (-1,)}, ["-1"]),
    ({"of": 5}, ["5", "12"]), ({"r": 0}, ["r", "0"]), ({"alpha": math.nan}, ["alpha", "nan"]),
])
def test_fused_refusals(arguments, words):
    base = nn.Linear(D_IN, D_OUT)
    with pytest.raises((ValueError, TypeError)) as caught:
        LoRAFusedLinear(base, **({"r": 2, "alpha": 4} | arguments))
    assert all(word in str(caught.value) for word in words), caught.value
    assert base.weight.requires_grad


def test_slices_are_a_set():
    layer = LoRAFusedLinear(nn.Linear(D_IN, D_OUT), 2, 4, slices=[2, 0, 2])
    assert layer.slices == (0, 2) and tuple(layer.lora_A.shape) == (4, D_IN)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrap", "base", "word"), [
    (LoRAConv2d, nn.Conv2d(4, 4, 3, groups=2), "groups=2"), (LoRAConv2d, nn.Conv1d(4, 4, 3), "Conv1d"),
    (LoRAConv2d, nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"), (LoRAConv2d, nn.Linear(4, 4), "Linear"),
    (LoRAEmbedding, nn.Linear(4, 4), "Linear"), (LoRAEmbedding, nn.EmbeddingBag(4, 4), "EmbeddingBag"),
    (LoRAEmbedding, nn.Embedding(4, 4, max_norm=1.0), "max_norm"), (LoRAConv1D, nn.Linear(4, 4), "Linear"),
    (LoRAConv1D, nn.Conv1d(4, 4, 1), "Conv1d"), (LoRALinear, Conv1D(4, 4), "Conv1D"), (LoRAFusedLinear, nn.Embedding(6, 6), "Embedding"),
])
def test_a_base_of_another_kind_is_refused_by_name(wrap, base, word):
    with pytest.raises((ValueError, TypeError), match=word):
        wrap(base, 2, 4)
    assert base.weight.requires_grad


@by_name(MAIN)
def test_a_lora_layer_is_not_wrapped_again(kind):
    with pytest.raises(TypeError, match="already"):
        type(kind.make())(kind.make(), 2, 4)


# ---- other people's implementations ---------------------------------------------------------------------------------


def assert_same_function(layer, theirs, parameters, kind, x, merged_weight):
    """Output, gradients and merged weight; both sides round, hence twice the bound."""
    grad = gradient_for(kind, layer, x)
    wrt = [x.clone().requires_grad_()] if x.is_floating_point() else []
    out = theirs(*wrt) if wrt else theirs(x)
    wanted = (out, *torch.autograd.grad(out, (*wrt, *parameters), grad))
    bounds = [bound for _, bound in expected(kind, layer, x, grad, layer.scaling)]
    for got, value, bound in zip(output_and_grads(layer, x, grad), wanted, bounds, strict=True):
        assert_within(got, (value.detach().reshape(got.shape), 2 * bound.reshape(got.shape)), kind.name)
    weight = merged_weight()
    layer.merge()
    # float64, sums of at most 51 products of size 1, scaling up to 5
    torch.testing.assert_close(layer.base_layer.weight.detach(), weight.detach(), rtol=1e-13, atol=1e-13)


def merged_by(loralibs):
    loralibs.eval()  # merges; returns None, not the module
    return loralibs


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", RANKS)
@by_name([CONV1D, EMBEDDING, CONV2D, Kind("padded", "embedding", {"padding_idx": 4}, shape=(6, 9)),
          conv("same", padding="same")])
def test_equal_to_peft(kind, r, rslora):
    """Neither dilated nor padded but with zeros: peft's A knows of neither, so that merging in peft changes the function there."""
    peft = pytest.importorskip("peft")
    layer = kind.make(r=r, rslora=rslora)
    config = peft.LoraConfig(r=r, lora_alpha=ALPHA, target_modules=["0"], use_rslora=rslora, fan_in_fan_out=kind.transposed)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.base_layer)), config, autocast_adapter_dtype=False)
    module = theirs.base_model.model[0]
    if kind.family == "embedding":
        parameters = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
    else:
        parameters = module.lora_A["default"].weight, module.lora_B["default"].weight
    with torch.no_grad():
        for theirs_p, ours in zip(parameters, (layer.lora_A, layer.lora_B), strict=True):
            theirs_p.copy_(ours.view(theirs_p.shape))
    assert_same_function(layer, theirs, parameters, kind, kind.data(), lambda: theirs.merge_and_unload()[0].weight)


@by_name([FUSED, FUSED_CONV1D, Kind("fused linear, all three", "fused", slices=(0, 1, 2)), Kind("fused conv1d k", "fused", slices=(1,))])
def test_fused_slices_equal_pefts_block_form(kind):
    """peft knows no slices: one adapter of rank n r whose B is block by block, with alpha n times as large."""
    peft = pytest.importorskip("peft")
    r, n, width = 2, len(kind.slices), D_OUT // 3
    layer = kind.make(r=r)
    config = peft.LoraConfig(r=n * r, lora_alpha=n * ALPHA, target_modules=["0"], fan_in_fan_out=kind.transposed)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.base_layer)), config, autocast_adapter_dtype=False)
    module = theirs.base_model.model[0]
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(layer.lora_A)
        b.zero_()
        for k, place in enumerate(kind.slices):
            b[place * width : (place + 1) * width, k * r : (k + 1) * r] = layer.lora_B[k * width : (k + 1) * width]
    x = kind.data()
    out, _, bound = theirs(x), None, expected(kind, layer, x)[0][1]
    assert_within(layer(x), (out.detach(), 2 * bound), "peft's block form")


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("slices", SUBSETS)
@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_fused_slices_equal_loralibs_merged_linear(base, slices, r):
    loralib = pytest.importorskip("loralib")
    kind = Kind(f"fused {base}", "fused", slices=slices)
    layer = kind.make(r=r)
    theirs = loralib.MergedLinear(D_IN, D_OUT, r=r, lora_alpha=ALPHA, enable_lora=[k in slices for k in range(3)],
                                  fan_in_fan_out=kind.transposed, dtype=torch.float64)
    theirs.load_state_dict({"weight": layer.base_layer.weight, "bias": layer.base_layer.bias,
                            "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    theirs.train()
    assert_same_function(layer, theirs, (theirs.lora_A, theirs.lora_B), kind, kind.data(), lambda: merged_by(theirs).weight)


@pytest.mark.parametrize("r", RANKS)
@by_name([EMBEDDING, Kind("padded", "embedding", {"padding_idx": 4}, shape=(6, 9))])
def test_embedding_equals_loralibs(kind, r):
    loralib = pytest.importorskip("loralib")
    layer = kind.make(r=r)
    theirs = loralib.Embedding(TOKENS, DIM, r=r, lora_alpha=ALPHA, dtype=torch.float64, **kind.options)
    theirs.load_state_dict({"weight": layer.base_layer.weight, "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    theirs.train()
    assert_same_function(layer, theirs, (theirs.lora_A, theirs.lora_B), kind, kind.data(), lambda: merged_by(theirs).weight)


@pytest.mark.parametrize("r", RANKS)
@by_name([conv("1x1", kernel_size=1), conv("1x1, stride, reflect", kernel_size=1, stride=2, padding=1, padding_mode="reflect")])
def test_convolution_equals_loralibs(kind, r):
    """Of kernel 1 only: loralib cuts a k x k kernel into (k out, k in), a matrix of rank r k, where the paper's W is (out, in k k)."""
    loralib = pytest.importorskip("loralib")
    layer = kind.make(r=r)
    theirs = loralib.Conv2d(4, 6, r=r, lora_alpha=ALPHA, **kind.options).double()
    theirs.load_state_dict({"conv.weight": layer.base_layer.weight, "conv.bias": layer.base_layer.bias,
                            "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    theirs.train()
    assert_same_function(layer, theirs, (theirs.lora_A, theirs.lora_B), kind, kind.data(), lambda: merged_by(theirs).conv.weight)
