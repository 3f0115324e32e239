"""LoRA's variants beside peft's, beside formulas in numpy, and beside what they promise: the same function at the start, the base untouched."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_lab import apply_lora, load_adapter, lora_layers, merge, remove_lora, save_adapter, unmerge
from lora_lab.counting import method_parameters
from lora_lab.train import train
from lora_lab.zoo.variants import (
    AdaLoRALinear,
    Budget,
    DoRALinear,
    LoRAXSLinear,
    OLoRALinear,
    PiSSALinear,
    VeRALinear,
    add_variant,
    eva,
    lora_fa,
    lora_plus,
    vera_matrices,
)

R, ALPHA = 3, 5
TARGETS = ["first", "last"]
# float64: some hundred products and a norm or an SVD, each good to a few times 1e-16
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
# peft makes VeRA's matrices, and PiSSA's and OLoRA's start, in float32 whatever the weights are
CLOSE32 = {"rtol": 1e-4, "atol": 1e-5}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(11, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def conv1d_net():
    from transformers.pytorch_utils import Conv1D

    model = net()
    for name in TARGETS:
        linear = getattr(model, name)
        turned = Conv1D(linear.out_features, linear.in_features).to(torch.float64)
        turned.weight.data, turned.bias.data = linear.weight.data.T.contiguous(), linear.bias.data.clone()
        setattr(model, name, turned)
    return model


def inputs(dtype=torch.float64, rows=13):
    return torch.randn(rows, 11, dtype=dtype, generator=torch.Generator().manual_seed(1))


def variant(kind, model=None):
    """The model with this variant on both layers."""
    model = net() if model is None else model
    if kind is VeRALinear:
        A, B = vera_matrices(model, TARGETS, R)
        return add_variant(model, kind, TARGETS, shared=(A.double(), B.double()))
    return add_variant(model, kind, TARGETS, r=R, alpha=ALPHA)


def shake(model, seed=2):
    """Other values for everything that trains, as training would leave them."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=draw))
    return model


KINDS = [DoRALinear, VeRALinear, LoRAXSLinear, AdaLoRALinear, PiSSALinear, OLoRALinear]
every_kind = pytest.mark.parametrize("kind", KINDS)
# in the facts: what one layer of (out, in) trains
COUNTS = {
    DoRALinear: lambda i, o: R * (i + o) + o, VeRALinear: lambda i, o: o + R, LoRAXSLinear: lambda i, o: R * R,
    AdaLoRALinear: lambda i, o: R * (i + o) + R, PiSSALinear: lambda i, o: R * (i + o), OLoRALinear: lambda i, o: R * (i + o),
}  # fmt: skip


@every_kind
@pytest.mark.parametrize("make", [net, conv1d_net], ids=["Linear", "Conv1D"])
def test_at_the_start_it_computes_what_the_base_computes(kind, make):
    model, x = make(), inputs()
    before = model(x)
    torch.testing.assert_close(variant(kind, model)(x), before, **CLOSE)


@every_kind
def test_it_trains_as_many_numbers_as_the_formula_says(kind):
    model = variant(kind)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == COUNTS[kind](11, 7) + COUNTS[kind](7, 5)


@pytest.mark.parametrize(("kind", "name"), [(DoRALinear, "dora"), (VeRALinear, "vera"), (LoRAXSLinear, "lora-xs")])
def test_the_calculator_says_the_same(kind, name):
    assert method_parameters(name, 11, 7, r=R) == COUNTS[kind](11, 7)


@every_kind
def test_training_moves_the_function_and_never_the_base(kind):
    model, x = variant(kind), inputs()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = model(x).detach()
    for _ in train(model, [(x, torch.zeros(13, dtype=torch.long))], steps=3, lr=0.1, device="cpu", precision="fp32"):
        pass
    assert (model(x) - before).abs().max() > 1e-3  # three steps of Adam at 0.1 move every number by about 0.3
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    assert frozen


@every_kind
@pytest.mark.parametrize("make", [net, conv1d_net], ids=["Linear", "Conv1D"])
def test_merged_it_computes_the_same_and_unmerged_the_weight_is_back(kind, make):
    model, x = shake(variant(kind, make())), inputs()
    weights = {name: layer.base_layer.weight.detach().clone() for name, layer in lora_layers(model).items()}
    model.eval()
    wanted = model(x)
    merge(model)
    torch.testing.assert_close(model(x), wanted, **CLOSE)
    assert not any(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in lora_layers(model).items())
    unmerge(model)
    assert all(torch.equal(layer.base_layer.weight, weights[name]) for name, layer in lora_layers(model).items())
    torch.testing.assert_close(model(x), wanted, **CLOSE)


@every_kind
def test_what_is_merged_and_then_edited_is_noticed(kind):
    model = variant(kind)
    merge(model)
    layer = model.first
    with torch.no_grad():
        getattr(layer, layer.trained[-1]).add_(1)
    with pytest.raises(RuntimeError, match="edited while merged"):
        model.eval()(inputs())


@pytest.mark.parametrize("kind", [DoRALinear, VeRALinear, LoRAXSLinear, AdaLoRALinear])
def test_taken_out_again_the_model_is_the_old_one(kind):
    x, old = inputs(), net()
    model = remove_lora(shake(variant(kind)))
    assert torch.equal(model(x), old(x))


def pefts(config, model=None):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(net() if model is None else model, config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("kind", [VeRALinear, LoRAXSLinear, AdaLoRALinear])
@pytest.mark.parametrize("make", [net, conv1d_net], ids=["Linear", "Conv1D"])
def test_saved_it_is_the_lora_that_computes_the_same(kind, make, tmp_path):
    model = shake(variant(kind, make()))
    save_adapter(model, tmp_path)
    plain = load_adapter(make(), tmp_path)
    assert {type(layer).__name__ for layer in lora_layers(plain).values()} <= {"LoRALinear", "LoRAConv1D"}
    x = inputs()
    torch.testing.assert_close(plain(x), model(x), **CLOSE)
    assert (plain(x) - make()(x)).abs().max() > 0.01


@pytest.mark.parametrize("kind", [DoRALinear, PiSSALinear, OLoRALinear])
def test_what_a_file_of_a_and_b_would_lose_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=f"'first' is a {kind.__name__}.*merge_and_unload"):
        save_adapter(shake(variant(kind)), tmp_path / "adapter")
    assert not list(tmp_path.rglob("*.*"))


def test_dora_is_pefts_forward_backward_and_merged():
    peft = pytest.importorskip("peft")
    theirs = pefts(peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, use_dora=True))
    ours, x = shake(variant(DoRALinear)), inputs()
    for name, layer in lora_layers(ours).items():
        there = theirs.base_model.model.get_submodule(name)
        there.lora_A.default.weight.data, there.lora_B.default.weight.data = layer.lora_A.data.clone(), layer.lora_B.data.clone()
        there.lora_magnitude_vector.default.weight.data = layer.magnitude.data.clone()
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    ours(x).square().sum().backward(), theirs(x).square().sum().backward()
    for name, layer in lora_layers(ours).items():
        there = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.lora_A.grad, there.lora_A.default.weight.grad, **CLOSE)
        torch.testing.assert_close(layer.magnitude.grad, there.lora_magnitude_vector.default.weight.grad, **CLOSE)
    merge(ours)
    whole = theirs.merge_and_unload()
    torch.testing.assert_close(ours.first.base_layer.weight, whole.first.weight, **CLOSE)


def test_dora_merges_a_bfloat16_weight_with_one_rounding():
    layer = DoRALinear(nn.Linear(24, 16).to(torch.bfloat16), r=3, alpha=5)
    nn.init.normal_(layer.lora_B, std=0.1)
    W0, B, A, m = (t.detach().double().numpy() for t in (layer.base_layer.weight, layer.lora_B, layer.lora_A, layer.magnitude))
    V = W0 + 5 / 3 * B @ A
    expected = m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)
    lost = layer.merge()
    found = layer.base_layer.weight.detach().double().numpy()
    # bfloat16 has 7 bits behind the leading one: rounding once moves a number by at most 2^-8 of itself; float32 adds 1e-6
    assert np.all(np.abs(found - expected) <= 2**-8 * np.abs(expected) + 1e-6)
    np.testing.assert_allclose(lost, np.linalg.norm(found - expected) / np.linalg.norm(expected - W0), rtol=1e-3)  # computed in float32


@pytest.mark.parametrize(("kind", "name"), [(PiSSALinear, "pissa"), (OLoRALinear, "olora")])
def test_starts_from_the_weight_are_pefts(kind, name):
    peft = pytest.importorskip("peft")
    theirs = pefts(peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=name), net().float())
    ours = variant(kind)
    for where, layer in lora_layers(ours).items():
        there = theirs.base_model.model.get_submodule(where)
        torch.testing.assert_close(layer.base_layer.weight, there.base_layer.weight.double(), **CLOSE32)  # does not depend on signs
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, (there.lora_B.default.weight @ there.lora_A.default.weight).double(), **CLOSE32)


@pytest.mark.parametrize("kind", [PiSSALinear, OLoRALinear])
def test_the_change_against_the_original_weight(kind):
    ours, old = shake(variant(kind)), net()
    for name, layer in lora_layers(ours).items():
        B, A, scaling = layer.change()
        torch.testing.assert_close(old.get_submodule(name).weight + scaling * B @ A, layer.base_layer.weight + layer.delta_weight(), **CLOSE)
        assert B.shape[1] == 2 * R


def test_vera_is_pefts():
    peft = pytest.importorskip("peft")
    theirs = pefts(peft.VeraConfig(r=R, target_modules=TARGETS, d_initial=0.1, vera_dropout=0.0))
    A, B = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    ours, x = shake(add_variant(net(), VeRALinear, TARGETS, shared=(A.double(), B.double()))), inputs()
    for name, layer in lora_layers(ours).items():
        there = theirs.base_model.model.get_submodule(name)
        there.vera_lambda_b.default.data, there.vera_lambda_d.default.data = layer.vector_b.data.clone(), layer.vector_d.data.clone()
    for model in (theirs, theirs.base_model):
        model.double()
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE32)
    assert ours.first.lora_A.untyped_storage().data_ptr() == ours.last.lora_A.untyped_storage().data_ptr()  # one A in memory


def test_lora_xs_stays_between_the_weights_own_directions():
    model = shake(variant(LoRAXSLinear))
    W0, delta = net().first.weight.detach().numpy(), model.first.delta_weight().detach().numpy()
    U, S, Vh = np.linalg.svd(W0)
    inner = U[:, :R].T @ delta @ Vh[:R].T
    np.testing.assert_allclose(U[:, :R] @ inner @ Vh[:R], delta, **CLOSE)
    # Signs of singular vectors are free, so the core agrees up to them.
    np.testing.assert_allclose(np.abs(inner), np.abs(ALPHA / R * S[:R, None] * model.first.core.detach().numpy()), **CLOSE)


def adalora_pair():
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=R, target_r=1, lora_alpha=ALPHA, target_modules=TARGETS, total_step=40, tinit=3, tfinal=5, deltaT=2)
    theirs, ours = pefts(config), shake(variant(AdaLoRALinear))
    for name, layer in lora_layers(ours).items():
        there = theirs.base_model.model.get_submodule(name)
        there.lora_A.default.data, there.lora_B.default.data = layer.lora_A.data.clone(), layer.lora_B.data.clone()
        there.lora_E.default.data = layer.values.data.clone()[:, None]
    return ours, theirs


def test_adalora_is_pefts():
    ours, theirs = adalora_pair()
    # peft divides alpha by the number of directions that are left, plus 1e-5 against 0: relative 3e-6
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-5)


def test_the_budget_prunes_what_pefts_allocator_prunes():
    ours, theirs = adalora_pair()
    budget, allocator, x = Budget(ours, target=1, steps=40, warm=3, last=5, every=2), theirs.base_model.rankallocator, inputs()
    left = []
    for k in range(1, 41):
        y = torch.randn(13, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        ours.zero_grad(), (ours(x) - y).square().mean().backward()
        for name, layer in lora_layers(ours).items():
            there = theirs.base_model.model.get_submodule(name)  # the same weights and gradients for both rules
            for mine, other in ((layer.lora_A, there.lora_A.default), (layer.lora_B, there.lora_B.default), (layer.values, there.lora_E.default)):
                other.data, other.grad = mine.data.clone().view(other.shape), mine.grad.clone().view(other.shape)
        allocator.update_ipt(theirs)
        allowed, prune = allocator.budget_schedule(k)
        assert budget.allowed(k) == allowed
        if prune and allowed < 2 * R:
            allocator.mask_to_budget(theirs, allowed)
        left.append(budget.step(k))
        for name, layer in lora_layers(ours).items():
            assert torch.equal(layer.values.data, theirs.base_model.model.get_submodule(name).lora_E.default.data.view(-1))
        with torch.no_grad():  # pruned directions may come back, as in the paper
            for p in ours.parameters():
                if p.requires_grad:
                    p -= 0.05 * p.grad
    assert left[2] == 2 * R and left[-1] == 2


@pytest.mark.parametrize(("from_P", "from_Q"), [(1.0, 0.9), (0.9, 1.0)])
def test_a_factor_counts_by_the_mean_of_its_entries(from_P, from_Q):
    """Direction 0 matters through P's 7 entries, direction 1 through Q's 11; a sum would favour the longer."""
    model = nn.Sequential(AdaLoRALinear(nn.Linear(11, 7), r=2, alpha=2))
    layer = model[0]
    for name in layer.trained:
        w = getattr(layer, name)
        w.data.fill_(1)
        w.grad = torch.zeros_like(w)
    layer.lora_B.grad[:, 0], layer.lora_A.grad[1] = from_P, from_Q
    assert Budget(model, target=1, steps=10, warm=1, last=2).step(9) == 1
    assert layer.values.tolist() == ([1, 0] if from_P > from_Q else [0, 1])


def test_orthogonality_is_zero_for_orthonormal_factors_and_has_a_gradient_elsewhere():
    layer = variant(AdaLoRALinear).first
    with torch.no_grad():
        layer.lora_B.copy_(torch.linalg.qr(torch.randn(7, R, dtype=torch.float64))[0])
        layer.lora_A.copy_(torch.linalg.qr(torch.randn(11, R, dtype=torch.float64))[0].T)
    assert layer.orthogonality().item() < 1e-12  # QR is orthonormal to some eps of 2e-16
    with torch.no_grad():
        layer.lora_A.mul_(2)
    assert layer.orthogonality().item() == pytest.approx(math.sqrt(R) * 3)  # 4 I - I


def test_lora_plus_makes_pefts_groups():
    optimizers = pytest.importorskip("peft.optimizers")
    peft = pytest.importorskip("peft")
    theirs = pefts(peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS))
    reference = optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8.0)
    wanted = sorted((group["lr"], p.shape) for group in reference.param_groups for p in group["params"])
    ours = apply_lora(net(), r=R, alpha=ALPHA, target_modules=TARGETS)
    made = lora_plus(ours, ratio=8.0)([p for p in ours.parameters() if p.requires_grad])
    assert sorted((0.01 * group.get("lr_scale", 1), p.shape) for group in made.param_groups for p in group["params"]) == wanted


def test_lora_plus_moves_b_by_ratio_in_the_first_step():
    # Adam's first step has the size of the rate in every entry that has a gradient.
    model, x = apply_lora(net(torch.float32), r=R, alpha=ALPHA, target_modules=TARGETS), inputs(torch.float32)
    next(iter(train(model, [(x, torch.zeros(13, dtype=torch.long))], steps=1, lr=1e-3, optimizer=lora_plus(model, 16), device="cpu")))
    assert model.last.lora_B.abs().max().item() == pytest.approx(16e-3, rel=1e-3)  # eps of 1e-8 beside gradients of 1e-2


def test_lora_fa_trains_b_alone_and_its_gradient_is_pefts():
    model, x = lora_fa(shake(apply_lora(net(), r=R, alpha=ALPHA, target_modules=TARGETS)), correct=True), inputs()
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}
    plain = copy.deepcopy(model)
    for layer in lora_layers(plain).values():
        layer.lora_B._backward_hooks = None
    model(x).square().sum().backward(), plain(x).square().sum().backward()
    for name, layer in lora_layers(model).items():
        A, s = layer.lora_A.detach().numpy(), ALPHA / R
        g = plain.get_submodule(name).lora_B.grad.numpy()
        np.testing.assert_allclose(layer.lora_B.grad.numpy(), g @ np.linalg.inv(A @ A.T) / s**2, rtol=1e-8)  # condition of A A^T: about 10


def hidden(model, x):
    """What each target reads."""
    return {"first": x, "last": torch.tanh(model.first(x))}


def test_eva_starts_in_the_strongest_directions_of_the_inputs():
    old, x = net(), inputs(rows=40)
    seen = hidden(old, x)
    model = eva(net(), [x[:25], x[25:]], TARGETS, r=R, alpha=ALPHA)
    for name, layer in lora_layers(model).items():
        Vh = np.linalg.svd(seen[name].detach().numpy())[2][:R]
        np.testing.assert_allclose(np.abs(layer.lora_A.detach().numpy() @ Vh.T), np.eye(R), atol=1e-8)  # signs are free; X^T X squares the condition
        assert not layer.lora_B.any()
    assert torch.equal(model(x), old(x))


def test_eva_hands_ranks_to_where_they_explain_most():
    torch.manual_seed(0)
    # One direction and a little noise; behind the tanh it becomes a curve, which takes several.
    x = 3 * torch.randn(60, 1, dtype=torch.float64) @ torch.randn(1, 11, dtype=torch.float64) + 1e-3 * torch.randn(60, 11, dtype=torch.float64)
    model = eva(net(), [x], TARGETS, r=2, alpha=ALPHA, rho=2)
    ranks = {name: layer.r for name, layer in lora_layers(model).items()}
    assert ranks == {"first": 1, "last": 3}
    shares = {}
    for name, values in hidden(net(), x).items():
        S = np.linalg.svd(values.detach().numpy(), compute_uv=False)
        shares[name] = S**2 / (S**2).sum()
    best = sorted(((s, name) for name, all_of in shares.items() for s in all_of[1:4]), reverse=True)[:2]
    assert ranks == {name: 1 + sum(owner == name for _, owner in best) for name in TARGETS}
    assert all(layer.scaling == pytest.approx(ALPHA / 2) for layer in lora_layers(model).values())


def untouched(model):
    old = net()
    return all(torch.equal(p, q) and p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), old.parameters(), strict=True))


@pytest.mark.parametrize(("call", "words"), [
    (lambda m: add_variant(m, PiSSALinear, TARGETS, r=6, alpha=1), "r=6 directions"),  # the first layer has 7, the second 5
    (lambda m: add_variant(m, LoRAXSLinear, TARGETS, r=6, alpha=1), "r=6 directions"),
    (lambda m: add_variant(m, DoRALinear, TARGETS, r=2, alpha=1, dropout=0.1), "dropout"),
    (lambda m: add_variant(m, VeRALinear, TARGETS, shared=(torch.ones(2, 8), torch.ones(9, 2))), "vera_matrices"),
    (lambda m: add_variant(m, DoRALinear, ["frist"], r=2, alpha=1), "matched no module"),
    (lambda m: eva(m, [inputs(rows=2)], TARGETS, r=3, alpha=1), "too few different inputs"),
    (lambda m: eva(m, [], TARGETS, r=3, alpha=1), "too few different inputs"),
    (lambda m: eva(m, [inputs()], TARGETS, r=3, alpha=1, rho=0.5), "at least 1"),
    (lambda m: lora_plus(m, 0), "above 0"),
    (lambda m: Budget(m, 1, 10, 2, 2), "AdaLoRALinear"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_and_nothing_is_changed(call, words):
    model = net()
    with pytest.raises(ValueError, match=words):
        call(model)
    assert untouched(model)
