"""compress and combine against dense numpy, peft's own combinations, and the models' answers."""

import copy
import math

import numpy as np
import pytest
import torch
from adapted import TARGETS, Model, adapted, fill, shown_delta
from torch import nn

from lora_lab import apply_lora, combine, compress, load_adapter, lora_layers, merge, report, save_adapter, train, unmerge

# Float64; ΔW as it is shown is a difference of answers of about 10, so a few eps = 2.2e-16 become some 1e-14.
REL = 1e-11
TOKENS = torch.arange(20).reshape(4, 5)


def deltas(model):
    return {name: shown_delta(layer) for name, layer in lora_layers(model).items()}


def truncated(M, r):
    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r], math.sqrt((S[r:] ** 2).sum())


def by_slices(delta, layer):
    """The parts of ΔW that are truncated by themselves."""
    if not hasattr(layer, "slices"):
        return [slice(None)]
    width = len(delta) // layer.of
    return [slice(p * width, (p + 1) * width) for p in layer.slices]


# -- compress

@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("options", [{}, {"rslora": True, "alpha": -2.0}, {"targets": ["c_attn:k"]}])
def test_compressed_layers_are_the_nearest_of_their_rank(r, options):
    model = adapted(**{"r": 3, "alpha": 5.0, **options})
    before, scaling = deltas(model), {name: layer.scaling for name, layer in lora_layers(model).items()}
    cost = compress(model, r=r)
    squares = [0.0, 0.0]
    for row, (name, layer) in zip(cost, lora_layers(model).items(), strict=True):
        wanted, error = np.zeros_like(before[name]), 0.0
        for places in by_slices(before[name], layer):
            wanted[places], e = truncated(before[name][places], r)
            error = math.hypot(error, e)
        norm = np.linalg.norm(before[name])
        np.testing.assert_allclose(shown_delta(layer), wanted, rtol=0, atol=REL * norm)
        assert (row.module, row.r_before, row.r) == (name, (3,), r) and layer.r == r
        assert row.norm == pytest.approx(norm, rel=REL) and row.error == pytest.approx(error, rel=1e-8)  # small beside the norm
        assert row.relative_error == pytest.approx(error / norm, rel=1e-8)
        assert layer.scaling == pytest.approx(scaling[name], rel=1e-15)
        squares = [squares[0] + error**2, squares[1] + norm**2]
        # both factors carry sqrt(S): neither is the large one
        assert layer.lora_A.norm().item() == pytest.approx(layer.lora_B.norm().item(), rel=1e-9)
    assert cost.relative_error == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-8)
    found = sum(f.numel() for layer in lora_layers(model).values() for f in (layer.lora_A, layer.lora_B))
    assert cost.parameters == found and cost.parameters_before == found // r * 3
    assert cost.bytes == 8 * found and cost.bytes_before == 24 * found // r


def test_rank_enough_leaves_every_bit_alone():
    model = adapted(r=3, rank_pattern={"head": 5})
    before = {name: (layer.lora_A, layer.lora_A.clone(), layer.lora_B.clone()) for name, layer in lora_layers(model).items()}
    cost = compress(model, r=5)
    assert cost.relative_error == 0 and all(row.error == 0 for row in cost)
    for name, layer in lora_layers(model).items():
        A, a, b = before[name]
        assert layer.lora_A is A and torch.equal(a, layer.lora_A) and torch.equal(b, layer.lora_B)
    assert {row.module: row.r for row in compress(model, r=3)} == dict.fromkeys(before, 3), "only the head had more"


def test_an_update_of_lower_rank_is_kept_exactly():
    model = adapted(r=4)
    for layer in lora_layers(model).values():
        n = len(getattr(layer, "slices", [0]))
        A = layer.lora_A.data.view(n, 4, -1)
        A[:, 2:] = A[:, :2]  # rank 2
    before, answers = deltas(model), model(TOKENS)
    cost = compress(model, energy=1.0)
    assert {row.r for row in cost} == {2} and cost.relative_error < 1e-14
    for name, layer in lora_layers(model).items():
        np.testing.assert_allclose(shown_delta(layer), before[name], rtol=0, atol=REL * np.linalg.norm(before[name]))
    torch.testing.assert_close(model(TOKENS), answers, rtol=1e-10, atol=1e-12)  # two blocks pass some eps on


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_energy_takes_as_many_directions_as_needed_and_no_more(share):
    model = adapted(r=6)
    before = deltas(model)
    cost = {row.module: row for row in compress(model, energy=share)}
    ranks = set()
    for name, layer in lora_layers(model).items():
        needed = []
        for places in by_slices(before[name], layer):
            S = np.linalg.svd(before[name][places], compute_uv=False)
            needed.append(int(np.argmax(np.cumsum(S**2) / (S**2).sum() >= share)) + 1)
        assert layer.r == max(needed) == cost[name].r
        assert cost[name].relative_error**2 <= 1 - share + 1e-12
        ranks.add(layer.r)
    assert share != 0.9 or len(ranks) > 1, "layers differ in what they need"


def test_what_is_compressed_can_be_saved_loaded_merged_and_trained(tmp_path):
    model = adapted(r=6)
    compress(model, energy=0.9)
    save_adapter(model, tmp_path)
    again = Model().double()
    load_adapter(again, tmp_path)
    assert {n: layer.r for n, layer in lora_layers(again).items()} == {n: layer.r for n, layer in lora_layers(model).items()}
    torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-14)
    plain = model(TOKENS)
    merge(model.eval())
    torch.testing.assert_close(model(TOKENS), plain, rtol=1e-10, atol=1e-12)
    unmerge(model)
    assert all(f.requires_grad for layer in lora_layers(model).values() for f in (layer.lora_A, layer.lora_B))
    before = deltas(model)
    for _ in train(model, [(TOKENS,)], steps=2, lr=1e-2, loss=lambda m, batch: m(batch[0]).square().mean(), device="cpu"):
        pass
    for name, delta in deltas(model).items():
        assert not np.array_equal(delta, before[name])


def test_an_optimizer_from_before_holds_the_old_factors():
    model = adapted(targets=["fc"])
    old = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    compress(model, r=1)
    held = {id(p) for group in old.param_groups for p in group["params"]}
    assert not held & {id(p) for p in model.parameters() if p.requires_grad}


def test_zero_updates_stay_zero_and_can_still_learn():
    model = apply_lora(Model().double(), 4, 8, TARGETS)
    for layer in lora_layers(model).values():
        layer.lora_A.data.normal_()
        layer.lora_B.data.zero_()
    cost = compress(model, r=2)
    assert cost.relative_error == 0 and all(row.relative_error == 0 for row in cost)
    model(TOKENS).square().sum().backward()
    for name, layer in lora_layers(model).items():
        assert (shown_delta(layer) == 0).all() and layer.r == 2
        assert layer.lora_B.grad.abs().amax(0).gt(0).all(), f"{name}: a column of B gets no gradient, so that direction is dead"


def test_rounding_to_the_factors_dtype_is_in_the_error():
    model = adapted(r=3, dtype=torch.bfloat16, targets=["fc"])
    for layer in lora_layers(model).values():
        layer.lora_A.data[2] = layer.lora_A.data[1]  # rank 2, so truncation to 2 costs nothing
    before = {n: (layer.lora_B.double() @ layer.lora_A.double()).detach() for n, layer in lora_layers(model).items()}
    for row in compress(model, r=2):
        layer = lora_layers(model)[row.module]
        assert layer.lora_A.dtype == torch.bfloat16
        error = (layer.lora_B.double() @ layer.lora_A.double() - before[row.module]).norm() / before[row.module].norm()
        assert row.relative_error == pytest.approx(error.item(), rel=1e-6) and 1e-4 < row.relative_error < 1e-2  # eps is 2^-8


def nan():
    model = adapted()
    lora_layers(model)["h.1.fc"].lora_B.data[3, 1] = math.nan
    return model


def merged():
    model = adapted()
    lora_layers(model)["head"].merge()
    return model


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: compress(Model(), r=2), ValueError, "compress: this model carries no LoRA"),
    (lambda: compress(adapted()), ValueError, "r=None, energy=None"),
    (lambda: compress(adapted(), r=2, energy=0.9), ValueError, "one of them; found r=2, energy=0.9"),
    (lambda: compress(adapted(), r=0), ValueError, "r must be at least 1"),
    (lambda: compress(adapted(), r=1.5), TypeError, "found 1.5"),
    (lambda: compress(adapted(), energy=90), ValueError, "0 < energy <= 1; found 90"),
    (lambda: compress(adapted(), energy=math.nan), ValueError, "found nan"),
    (lambda: compress(nan(), r=2), ValueError, r"h\.1\.fc: lora_B has 1 of 72 entries"),
    (lambda: compress(merged(), r=2), RuntimeError, r"compress \(head\) while merged.*unmerge\(\) first"),
])  # fmt: skip
def test_compress_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_refusal_changes_nothing():
    model = nan()
    before = {name: (layer.r, layer.lora_A) for name, layer in lora_layers(model).items()}
    with pytest.raises(ValueError):
        compress(model, r=1)
    assert before == {name: (layer.r, layer.lora_A) for name, layer in lora_layers(model).items()}


# -- combine

def pair():
    return adapted(r=3, alpha=5.0, seed=1), adapted(r=2, alpha=-7.0, seed=2, rslora=True)


@pytest.mark.parametrize("weights", [None, (0.5, 0.5), (1.0, -1.0), (0.0, 2.0)])
def test_concat_is_the_sum_for_every_kind_of_layer(weights):
    a, b = pair()
    states = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    cost = combine([a, b], "concat", weights)
    first, second = deltas(a), deltas(b)
    w = weights or (1.0, 1.0)
    for row, (name, layer) in zip(cost, lora_layers(cost.model).items(), strict=True):
        wanted = w[0] * first[name] + w[1] * second[name]
        scale = abs(w[0]) * np.linalg.norm(first[name]) + abs(w[1]) * np.linalg.norm(second[name])
        np.testing.assert_allclose(shown_delta(layer), wanted, rtol=0, atol=REL * scale)
        assert (row.module, row.r_before, row.r, layer.r) == (name, (3, 2), 5, 5) and row.error <= REL * scale
        assert layer.scaling == 1 and layer.lora_A.requires_grad and layer.lora_A.dtype == torch.float64
        assert row.norm == pytest.approx(np.linalg.norm(wanted), rel=1e-9)
    for model, state in zip((a, b), states, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert cost.weights == w and cost.parameters == cost.parameters_before


def test_the_new_model_stands_alone():
    a, b = pair()
    model = combine([a, b], "concat").model
    answers = a(TOKENS)
    theirs = {p.data_ptr() for m in (a, b) for p in m.parameters()}
    assert not theirs & {p.data_ptr() for p in model.parameters()}
    merge(model)
    assert torch.equal(a(TOKENS), answers)
    base = Model().double()
    unmerge(model)
    with torch.no_grad():  # a weight that the base would have with the sum in it
        for name, delta in deltas(a).items():
            module = base.get_submodule(name)
            total = torch.from_numpy(delta + deltas(b)[name])
            turned = hasattr(module, "nf") or isinstance(module, nn.Embedding)
            module.weight += (total.T if turned else total).reshape(module.weight.shape)
    torch.testing.assert_close(model(TOKENS), base(TOKENS), rtol=1e-10, atol=1e-12)  # two blocks pass some eps on
    frozen = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(n.endswith(("lora_A", "lora_B")) for n in frozen) and len(frozen) == 2 * len(lora_layers(model))


@pytest.mark.parametrize("r", [None, 1, 4, 9])
def test_svd_is_the_best_of_its_rank(r):
    a, b = pair()
    cost = combine([a, b], "svd", (0.7, -0.4), r=r)
    first, second = deltas(a), deltas(b)
    for row, (name, layer) in zip(cost, lora_layers(cost.model).items(), strict=True):
        whole = 0.7 * first[name] - 0.4 * second[name]
        rank = min(r or 3, 5)
        wanted, error = np.zeros_like(whole), 0.0
        for places in by_slices(whole, layer):
            wanted[places], e = truncated(whole[places], rank)
            error = math.hypot(error, e)
        np.testing.assert_allclose(shown_delta(layer), wanted, rtol=0, atol=REL * np.linalg.norm(whole))
        assert row.r == rank and row.error == pytest.approx(error, abs=REL * np.linalg.norm(whole))


def test_adapters_that_cover_different_layers_and_slices():
    a = adapted(r=3, targets=["c_attn:q,v", "fc", "conv"])
    b = adapted(r=2, seed=5, targets=["c_attn", "head", "fc"], rank_pattern={"h.0.fc": 4})
    c = adapted(r=2, seed=6, targets=["c_attn:k", "wte"])
    first, second, third = deltas(a), deltas(b), deltas(c)
    cost = combine([a, b, c], "concat", (1.0, 2.0, 3.0))
    assert [row.module for row in cost] == ["wte", "h.0.c_attn", "h.0.fc", "h.1.c_attn", "h.1.fc", "conv", "head"]
    for row, (name, layer) in zip(cost, lora_layers(cost.model).items(), strict=True):
        parts = [w * d[name] for w, d in ((1, first), (2, second), (3, third)) if name in d]
        np.testing.assert_allclose(shown_delta(layer), sum(parts), rtol=0, atol=REL * np.linalg.norm(sum(parts)))
        assert row.relative_error < 1e-12
    assert {row.module: row.r_before for row in cost}["h.0.fc"] == (3, 4, 0)
    # slices of both, where all have slices
    sliced = combine([a, c], "concat", (1.0, 3.0)).model
    layer = lora_layers(sliced)["h.1.c_attn"]
    assert layer.slices == (0, 1, 2) and layer.r == 3
    np.testing.assert_allclose(shown_delta(layer), first["h.1.c_attn"] + 3 * third["h.1.c_attn"], rtol=0, atol=1e-12)
    model = combine([a, c], "svd", r=2).model
    model(TOKENS).square().sum().backward()
    assert lora_layers(sliced)["h.1.c_attn"].lora_A.view(3, 3, -1)[1, 2].abs().sum() > 0, "padding begins as a fresh layer, or it would be dead"


def test_average_is_wrong_by_its_cross_terms_and_says_how_much():
    a, b = adapted(r=3, seed=1), adapted(r=3, seed=2)
    cost = combine([a, b], "average", (0.3, 0.6))
    total, norm = 0.0, 0.0
    for row, (name, layer) in zip(cost, lora_layers(cost.model).items(), strict=True):
        wanted = 0.3 * shown_delta(lora_layers(a)[name]) + 0.6 * shown_delta(lora_layers(b)[name])
        found = shown_delta(layer)
        for model, w in ((a, 0.3), (b, 0.6)):  # what is left is the cross terms: w_1 w_2 scaling (B_1 A_2 + B_2 A_1)
            found = found - w * w * shown_delta(lora_layers(model)[name])
        one, two = (lora_layers(m)[name] for m in (a, b))
        cross = 0.18 * one.scaling * (one.full_B() @ two.lora_A + two.full_B() @ one.lora_A).detach().numpy()
        np.testing.assert_allclose(found, cross, rtol=0, atol=1e-12)
        assert layer.r == 3 and layer.scaling == pytest.approx(one.scaling, rel=1e-15)
        assert row.error == pytest.approx(np.linalg.norm(shown_delta(layer) - wanted), rel=1e-9)
        total, norm = math.hypot(total, row.error), math.hypot(norm, np.linalg.norm(wanted))
    assert cost.relative_error == pytest.approx(total / norm, rel=1e-9) and cost.relative_error > 0.3
    assert combine([a, b], "svd", (0.3, 0.6), r=3).relative_error < cost.relative_error


def test_of_two_equal_adapters_the_average_is_right_and_peftd_linear_twice_too_large():
    a = adapted(r=3)
    assert combine([a, a], "average", (0.5, 0.5)).relative_error < 1e-12
    assert combine([a, a], "linear", (0.5, 0.5)).relative_error == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(("ours", "theirs", "ranks"), [("concat", "cat", (3, 2)), ("svd", "svd", (3, 2)), ("linear", "linear", (3, 3))])
@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.5, -0.5)])
def test_the_same_as_peft(ours, theirs, ranks, weights):
    """Three methods of add_weighted_adapter, by ΔW and by answers; two adapters with other alphas and targets."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5), nn.Embedding(13, 4)).double()
    layouts = ((5.0, ["0", "2"]), (3.0, ["0", "3"]))
    mine = []
    for number, (alpha, targets) in enumerate(layouts):
        model = apply_lora(copy.deepcopy(base), ranks[number], alpha, targets)
        fill(model, number)
        mine.append(model)
    configs = [peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets) for r, (alpha, targets) in zip(ranks, layouts, strict=True)]
    other = peft.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="one")
    other.add_adapter("two", configs[1])
    for name, model in zip(("one", "two"), mine, strict=True):
        for place, layer in lora_layers(model).items():
            target = other.base_model.model.get_submodule(place)
            if place == "3":
                target.lora_embedding_A[name].data.copy_(layer.lora_A)
                target.lora_embedding_B[name].data.copy_(layer.lora_B)
            else:
                target.lora_A[name].weight.data.copy_(layer.lora_A)
                target.lora_B[name].weight.data.copy_(layer.lora_B)
    other.add_weighted_adapter(["one", "two"], list(weights), "sum", combination_type=theirs)
    found = combine(mine, ours, weights).model
    for place, layer in lora_layers(found).items():
        delta = other.base_model.model.get_submodule(place).get_delta_weight("sum").detach().numpy()
        delta = delta.T if place == "3" else delta
        # peft puts the weights of "svd" and "linear" into a float32 tensor: 1.2e-7 of what is added up
        np.testing.assert_allclose(shown_delta(layer), delta, rtol=0, atol=5e-7 * np.linalg.norm(delta))


def test_merged_models_are_combined_as_if_they_were_not():
    a, b = pair()
    plain = combine([a, b], "svd")
    merge(a)
    again = combine([a, b], "svd")
    assert a.get_submodule("head").merged and not again.model.get_submodule("head").merged
    for name, delta in deltas(again.model).items():
        np.testing.assert_array_equal(delta, shown_delta(lora_layers(plain.model)[name]))


def test_a_layer_that_stands_in_two_places_stays_one_layer():
    def twice(seed):
        torch.manual_seed(0)
        shared = nn.Linear(4, 4).double()
        model = apply_lora(nn.Sequential(shared, nn.Tanh(), shared), 2, 2, ["0", "2"])
        fill(model, seed)
        return model

    a, b = twice(1), twice(2)
    model = combine([a, b], "concat").model
    assert model[0] is model[2] and model[0] is not a[0]
    np.testing.assert_allclose(shown_delta(model[0]), shown_delta(a[0]) + shown_delta(b[0]), rtol=0, atol=1e-12)


def test_a_combination_is_saved_and_loaded(tmp_path):
    model = combine([adapted(r=3, targets=["c_attn:q,v", "fc"]), adapted(r=2, seed=4, targets=["c_attn:q,v", "head"])], "concat").model
    save_adapter(model, tmp_path)
    again = Model().double()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=1e-12, atol=1e-14)


def test_costs_are_shown():
    pandas = pytest.importorskip("pandas")
    cost = combine(pair(), "svd", r=2)
    assert "combined by svd with weights 1, 1: r = 2, relative error of ΔW" in str(cost)
    assert "3 + 2 → 2" in str(cost) and "3 + 2 → 2" in cost._repr_html_()
    table = cost.table()
    assert isinstance(table, pandas.DataFrame) and table.relative_error.tolist() == [row.relative_error for row in cost]
    model = adapted(r=3)
    assert "3 → 1" in str(compress(model, r=1)) and report(model)["head"].r == 1


def with_head():
    return apply_lora(Model().double(), 2, 2, ["fc"], modules_to_save=["head"])


def with_biases():
    return apply_lora(Model().double(), 2, 2, ["fc"], bias="lora_only")


@pytest.mark.parametrize(("call", "message"), [
    (lambda: combine([adapted()], "svd"), "two models or more"),
    (lambda: combine(["a", "b"], "svd"), r"found \[str, str\]"),
    (lambda: combine(pair(), "mean"), "method is one of 'concat'.*found 'mean'"),
    (lambda: combine(pair(), "svd", (1,)), "one per model; found .1.0. for 2 models"),
    (lambda: combine(pair(), "svd", (1, math.inf)), "finite numbers"),
    (lambda: combine(pair(), "concat", r=4), "r is for method='svd'.*compress"),
    (lambda: combine(pair(), "svd", r=0), "r must be at least 1"),
    (lambda: combine([adapted(), Model().double()]), "model 2 of 2 carries no LoRA"),
    (lambda: combine([adapted(), nan()]), r"model 2, h\.1\.fc: lora_B has 1 of 72"),
    (lambda: combine([adapted(), adapted(base_seed=1)]), "model 1 and model 2 are not adapters of one base: different values in wte.weight, h.0.c_.* and"),
    (lambda: combine([adapted(), apply_lora(nn.Sequential(nn.Linear(3, 3)), 2, 2, ["0"])]), "only one of them has"),
    (lambda: combine(pair(), "average"), r"wte has r=2 and r=3\. Use 'svd' or 'concat'"),
    (lambda: combine([adapted(targets=["c_attn:q"]), adapted(targets=["c_attn:v"])], "linear"), r"r=3, slices \(0,\) and r=3, slices \(2,\)"),
    (lambda: combine([adapted(), adapted(alpha=7.0)], "average"), r"scaling, which is 1.66667 and 2.33333 in wte"),
    (lambda: combine([adapted(), with_head()]), "model 2 also trains the modules head in full"),
    (lambda: combine([with_biases(), adapted()]), "model 1 also trains biases in full"),
])  # fmt: skip
def test_combine_refuses(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
