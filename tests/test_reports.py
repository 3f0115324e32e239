"""Reports against dense numpy SVDs of the ΔW that the layers' own answers show, for every kind of layer."""

import copy
import gc
import math
import re
import weakref

import numpy as np
import pytest
import torch
from adapted import Conv1D, Model, adapted, dense_weight, shown_delta
from torch import nn

from lora_lab import amplifications, apply_lora, compare_subspaces, lora_disabled, lora_layers, merge, report, unmerge
from lora_lab import reports as module

# Float64; singular values are off by a few eps = 2.2e-16 of the largest, and ΔW as it is shown is a difference of answers of about 10.
REL = 1e-11


def slices_of(name, layer):
    """Row names -> the rows of ΔW that they stand for."""
    if not hasattr(layer, "slices"):
        return {name: slice(None)}
    width = layer.base_layer.nf // layer.of
    parts = {f"{name}:{'qkv'[p]}": slice(p * width, (p + 1) * width) for p in layer.slices}
    together = f"{name}:" + ",".join("qkv"[p] for p in layer.slices)
    return {together: slice(None), **parts} if len(parts) > 1 else parts


def check_against_numpy(model, found, rel=REL):
    expected = {}
    for name, layer in lora_layers(model).items():
        for row, places in slices_of(name, layer).items():
            expected[row] = shown_delta(layer)[places], dense_weight(layer)[places], layer
    assert [row.module for row in found] == list(expected)
    for row in found:
        delta, W0, layer = expected[row.module]
        S = np.linalg.svd(delta, compute_uv=False)
        k = len(row.S)
        assert (row.out, row.inputs) == delta.shape and row.scaling == layer.scaling and row.alpha == layer.alpha
        assert k == min(row.r, *delta.shape)
        np.testing.assert_allclose(row.S, S[:k], rtol=0, atol=rel * S[0])
        assert np.all(S[k:] < rel * S[0]), "r is what the factors allow"
        p = S[:k] / S[:k].sum()
        p = p[p > 0]
        assert row.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=rel * 100)  # entropy adds up k terms
        assert row.stable_rank == pytest.approx((S**2).sum() / S[0] ** 2, rel=rel * 10)
        assert row.energy_first == pytest.approx(S[0] ** 2 / (S**2).sum(), rel=rel * 10)
        assert row.norm_update == pytest.approx(np.linalg.norm(delta), rel=rel)
        assert row.norm_weight == pytest.approx(np.linalg.norm(W0), rel=rel)
        assert row.ratio == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(W0), rel=rel)
        assert row.part == ("slice" if re.search(r":[qkv]$", row.module) and len(layer.slices) > 1 else "whole")


@pytest.mark.parametrize("options", [{}, {"rslora": True, "alpha": -2.0}, {"r": 1}, {"targets": ["c_attn:k"]}, {"r": 40, "targets": ["head", "fc"]},
                                     {"rank_pattern": {"h.0.fc": 5}, "alpha_pattern": {"h.1.c_proj": 9.0}}])  # fmt: skip
def test_every_kind_of_layer_against_numpy(options):
    model = adapted(**{"r": 3, "alpha": 5.0, **options})
    check_against_numpy(model, report(model))


def test_merged_or_switched_off_makes_no_difference():
    model = adapted()
    plain = report(model)
    merge(model)
    merged = report(model)
    assert all(row.merged for row in merged) and not any(row.merged for row in plain)
    for a, b in zip(plain, merged, strict=True):
        assert (a.S, a.norm_weight, a.effective_rank) == (b.S, b.norm_weight, b.effective_rank)
    unmerge(model)
    with lora_disabled(model):
        assert report(model).rows == plain.rows


def test_nothing_is_changed_and_nothing_drawn():
    model = adapted()
    before, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report(model, intruders=True, k=3)
    assert torch.equal(seed, torch.get_rng_state())
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_is_measured_in_float32():
    model = adapted(dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()  # the same stored numbers
    for a, b in zip(report(model), report(exact), strict=True):
        np.testing.assert_allclose(a.S, b.S, rtol=0, atol=1e-6 * b.S[0])  # float32's 1.2e-7, some operations
        assert a.norm_weight == pytest.approx(b.norm_weight, rel=1e-6)


def test_zero_updates_have_rank_zero_and_say_so():
    model = apply_lora(Model().double(), 3, 5.0, ["fc", "head"])
    found = report(model)
    for row in found:
        assert row.S == (0, 0, 0) and row.ratio == row.effective_rank == row.stable_rank == row.norm_update == 0
        assert math.isnan(row.energy_first)
    assert "all of them exactly 0 (not trained yet?)" in found.summary()
    lora_layers(model)["head"].lora_B.data.normal_()
    assert "3 updates, 2 of them exactly 0" in report(model).summary()
    assert report(model)["head"].ratio > 0


def test_a_weight_of_zero():
    model = adapted(targets=["head"])
    lora_layers(model)["head"].base_layer.weight.data.zero_()
    assert report(model)["head"].ratio == math.inf
    assert "∞" in str(report(model))


def test_norms_of_weights_are_measured_again_when_a_weight_changes():
    model = adapted(targets=["head", "c_attn:q,v"])
    before = report(model)
    weight = lora_layers(model)["h.0.c_attn"].base_layer.weight
    with torch.no_grad():
        weight[:, :12] *= 2  # q alone
    after = report(model)
    assert after["h.0.c_attn:q"].norm_weight == pytest.approx(2 * before["h.0.c_attn:q"].norm_weight, rel=REL)
    assert after["h.0.c_attn:v"].norm_weight == before["h.0.c_attn:v"].norm_weight
    assert after["h.0.c_attn:q,v"].norm_weight == pytest.approx(weight.norm().item(), rel=REL)
    merge(model)
    unmerge(model)
    assert report(model).rows == after.rows


def test_kept_norms_do_not_keep_weights_alive():
    model = adapted()
    report(model)
    gone = weakref.ref(lora_layers(model)["head"].base_layer.weight)
    kept = len(module._NORMS)
    del model
    gc.collect()
    assert gone() is None and len(module._NORMS) < kept


# -- full fine-tuning

def tuned(model, seed=3):
    after = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in after.parameters():
            p += 0.01 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return after


def test_full_fine_tuning_against_numpy():
    base = Model().double()
    after = tuned(base)
    for found in (report(after, base=base), report(after, base=base.state_dict())):
        assert [row.module for row in found] == ["wte", "h.0.c_attn", "h.0.c_proj", "h.0.fc", "h.1.c_attn", "h.1.c_proj", "h.1.fc", "conv", "head"]
        for row in found:
            W0, W1 = (m.get_submodule(row.module).weight.detach().numpy() for m in (base, after))
            delta = (W1 - W0).reshape(len(W0), -1)
            S = np.linalg.svd(delta, compute_uv=False)
            np.testing.assert_allclose(row.S, S, rtol=0, atol=REL * S[0])
            turned = isinstance(base.get_submodule(row.module), (Conv1D, nn.Embedding))
            assert (row.out, row.inputs) == (delta.T.shape if turned else delta.shape)
            assert row.ratio == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(W0), rel=REL)
            p = S / S.sum()
            assert row.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=REL * 100)
            assert row.r is row.alpha is row.scaling is None and row.error_bound == 0


def test_large_dense_updates_know_their_first_values_and_a_bound(monkeypatch):
    monkeypatch.setattr(module, "EXACT_UP_TO", 10)
    monkeypatch.setattr(module, "LEADING", 4)
    base = Model(d=48).double()
    after = tuned(base)
    row = report(after, base=base)["h.0.fc"]
    delta = (after.h[0].fc.weight - base.h[0].fc.weight).detach().numpy()
    S = np.linalg.svd(delta, compute_uv=False)
    assert len(row.S) == 4 and math.isnan(row.effective_rank) and 0 < row.error_bound < S[0]
    for found, true in zip(row.S, S, strict=False):
        assert found <= true * (1 + REL) and true <= math.hypot(found, row.error_bound) * (1 + REL)
    assert row.norm_update == pytest.approx(np.linalg.norm(delta), rel=REL)
    assert row.stable_rank == pytest.approx(row.norm_update**2 / row.S[0] ** 2, rel=REL)


def test_tied_weights_are_reported_once_and_fresh_heads_not_at_all():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.lm_head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.lm_head.weight = self.wte.weight

    base = Tied()
    after = tuned(base)
    assert [row.module for row in report(after, base=base)] == ["wte"]
    after.fresh = nn.Linear(4, 2)
    assert [row.module for row in report(after, base=base)] == ["wte"]


# -- intruders

@pytest.mark.parametrize("side", ["left", "right"])
def test_intruders_by_their_definition(side):
    model = adapted(alpha=60.0)
    found = report(model, intruders=True, k=5, epsilon=0.6, side=side)
    for name, layer in lora_layers(model).items():
        for row_name, places in slices_of(name, layer).items():
            row = found[row_name]
            if row.kind == "Embedding":
                assert row.intruders is None
                continue
            W0, delta = dense_weight(layer)[places], shown_delta(layer)[places]
            X, Y = (np.linalg.svd(W, full_matrices=False) for W in (W0, W0 + delta))
            cosines = np.abs(Y[0].T @ X[0]) if side == "left" else np.abs(Y[2] @ X[2].T)
            similarity = cosines.max(1)[: min(5, *W0.shape)]
            assert row.intruders == (similarity < 0.6).sum()
            assert row.lowest_similarity == pytest.approx(similarity.min(), abs=1e-8)  # vectors turn by eps over the gaps of S
            assert 0 <= row.intruders_random <= 5
    assert sum(row.intruders or 0 for row in found) > 0, "the test is about models that have some"
    assert found.rows[0].intruders_random == report(model, intruders=True, k=5, epsilon=0.6, side=side).rows[0].intruders_random
    assert "intruders: of the top 5" in found.summary() and side in found.summary()


def test_the_control_is_drawn_with_the_seed_and_k_is_cut_to_what_a_layer_has(monkeypatch):
    seeds = []
    draw = module.random_update
    monkeypatch.setattr(module, "random_update", lambda update, kind, seed=0: seeds.append(seed) or draw(update, kind, seed))
    model = adapted(targets=["head", "c_proj"], alpha=500.0)  # far above W0: every direction of the update is an intruder or none is W0's
    found = report(model, intruders=True, k=50, epsilon=1.0, seed=7)
    assert seeds == [7, 7, 7]
    assert {row.module: row.intruders for row in found} == {"h.0.c_proj": 12, "h.1.c_proj": 12, "head": 5}, "all there are, at epsilon 1"


# -- shown

def test_tables_are_tidy():
    pandas = pytest.importorskip("pandas")
    model = adapted(r=3)
    found = report(model)
    table = found.table(top=2)
    assert list(table.module) == [row.module for row in found] and len(table) == len(found)
    assert {"r", "alpha", "scaling", "effective_rank", "stable_rank", "norm_update", "norm_weight", "ratio", "energy_first", "S_1", "S_2"} <= set(table)
    assert "intruders" not in table and "S_3" not in table
    assert table.S_1.tolist() == [row.S[0] for row in found] and table.ratio.tolist() == [row.ratio for row in found]
    shown = report(model, intruders=True, k=2).table()
    assert isinstance(shown.intruders.dtype, pandas.Int64Dtype) and shown.intruders.isna().sum() == 1  # the embedding
    long = found.spectra()
    head = long[long.module == "head"]
    assert head.i.tolist() == [1, 2, 3] and head.S.tolist() == list(found["head"].S)
    assert head.energy.tolist() == pytest.approx(list(np.cumsum(np.square(found["head"].S)) / np.sum(np.square(found["head"].S))), rel=REL)
    # rows of part "whole" add up to the update
    whole = math.hypot(*table[table.part == "whole"].norm_update)
    dense = math.hypot(*(np.linalg.norm(shown_delta(layer)) for layer in lora_layers(model).values()))
    assert whole == pytest.approx(dense, rel=REL)


def test_html_takes_its_colours_from_the_page_and_folds_long_tables():
    names = nn.ModuleDict({f"<b>{i}": nn.Linear(4, 4) for i in range(20)})
    model = apply_lora(names, 2, 4)
    page = report(model)._repr_html_()
    assert "<b>" not in page and "&lt;b&gt;3" in page
    assert page.count("<tr>") == 20 + 2 and "<summary>8 more</summary>" in page
    assert not re.search(r"#[0-9a-f]{3,6}\b|rgb\(|background", page), "fixed colours would not follow the theme"
    short = report(adapted())._repr_html_()
    assert "<details>" not in short and 'scope="row"' in short and short.count('aria-hidden="true"') == 13
    text = str(report(adapted()))
    assert len(text.splitlines()) == 15 and "  h.0.c_attn:v" in text


def test_rows_are_found_by_name():
    found = report(adapted())
    assert found["h.1.c_attn:v"].part == "slice" and len(found) == 13 and len(found.whole) == 9
    with pytest.raises(KeyError, match="no row 'h.1.c_attn'; there are wte, h.0.c_attn:q,v"):
        found["h.1.c_attn"]


# -- comparisons

def factors_of(model, name):
    """B and A of a layer, or of the v of a fused one, which is its last slice: of the block at the end of each stack."""
    layer = lora_layers(model)[name.partition(":")[0]]
    B, A = layer.lora_B.detach().numpy(), layer.lora_A.detach().numpy()
    return (B[-12:], A[-layer.r :]) if name.endswith(":v") else (B, A)


@pytest.mark.parametrize(("through", "vectors"), [
    ("BA", lambda B, A: np.linalg.svd(B @ A)[2]), ("BA left", lambda B, A: np.linalg.svd(B @ A)[0].T),
    ("A", lambda B, A: np.linalg.svd(A)[2]), ("B", lambda B, A: np.linalg.svd(B)[0].T),
])  # fmt: skip
def test_subspaces_of_two_models_by_the_papers_formula(through, vectors):
    first, second = adapted(r=2), adapted(r=4, seed=7, targets=["fc", "c_attn:v", "head"])
    found = compare_subspaces(first, second, i=2, j=8, through=through)
    assert list(found) == ["h.0.c_attn:v", "h.0.fc", "h.1.c_attn:v", "h.1.fc", "head"]
    for name, phi in found.items():
        assert phi.shape == (2, 4)  # j is cut to the rank
        V = [vectors(*factors_of(m, name)) for m in (first, second)]
        for i in (1, 2):
            for j in range(1, 5):
                wanted = np.linalg.norm(V[0][:i] @ V[1][:j].T) ** 2 / min(i, j)
                assert phi[i - 1, j - 1].item() == pytest.approx(wanted, abs=1e-8)  # vectors turn by eps over the gaps of S


def test_slices_are_compared_by_themselves():
    found = compare_subspaces(adapted(), adapted(seed=8), 3, 3)
    assert "h.0.c_attn:q" in found and "h.0.c_attn:q,v" not in found


def test_adapters_of_one_seed_share_rows_of_A_before_any_training():
    models = []
    for r in (2, 4):
        torch.manual_seed(0)
        models.append(apply_lora(nn.Sequential(nn.Linear(12, 12)), r, 4, ["0"]))
    models[1].get_submodule("0").lora_A.data[:2] = models[0].get_submodule("0").lora_A.data
    phi = compare_subspaces(*models, 2, 4, through="A")["0"]
    assert phi[-1, -1].item() == pytest.approx(1, abs=1e-6)  # float32
    with pytest.raises(ValueError, match="BA of 0 is 0, as at the start of training"):
        compare_subspaces(*models, 2, 4)


def test_amplification_and_its_control_against_numpy():
    model = adapted(r=3)
    found = {row.module: row for row in amplifications(model, r=2, own=True)}
    assert "h.0.c_attn:q" in found and "h.0.c_attn:q,v" not in found
    for name, layer in lora_layers(model).items():
        for row_name, places in slices_of(name, layer).items():
            if row_name not in found:
                continue
            row, W0, delta = found[row_name], dense_weight(layer)[places], shown_delta(layer)[places]
            U, _, Vh = np.linalg.svd(delta)
            assert row.overlap == pytest.approx(np.linalg.norm(U[:, :2].T @ W0 @ Vh[:2].T), rel=1e-8)  # vectors turn by eps over the gaps of S
            assert row.amplification == pytest.approx(np.linalg.norm(delta) / row.overlap, rel=REL)
            assert row.overlap_own == pytest.approx(np.linalg.norm(np.linalg.svd(W0, compute_uv=False)[:2]), rel=REL)
            assert row.overlap_random == pytest.approx(2 * np.linalg.norm(W0) / math.sqrt(W0.size), rel=REL)
            assert row.above_random == pytest.approx(row.amplification_random / row.amplification, rel=REL)
    assert {row.r for row in amplifications(model)} == {3}
    assert all(math.isnan(row.overlap_own) for row in amplifications(model))


def test_random_updates_are_no_more_than_random():
    """Root mean square of `above_random` over 400 random adapters; the values are from the same distribution as the control."""
    values = []
    for seed in range(100):
        model = adapted(seed=seed, targets=["fc", "c_proj"])
        values += [row.above_random**2 for row in amplifications(model)]
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert np.mean(values) == pytest.approx(1, abs=4 * error) and error < 0.05  # 4 standard errors; the seeds are fixed


# -- refusals

def with_nan():
    model = adapted()
    lora_layers(model)["h.1.fc"].lora_B.data[3, 1] = math.nan
    lora_layers(model)["head"].lora_A.data[:] = math.inf
    return model


def other_shape():
    state = Model().double().state_dict()
    return state | {"head.weight": torch.zeros(4, 12)}


@pytest.mark.parametrize(("call", "message"), [
    (lambda: report(Model()), r"report: this model carries no LoRA layer.*report\(model, base=before\)"),
    (lambda: report(with_nan()), r"h\.1\.fc \(1 of 72 entries of lora_B\), head \(36 of 36 entries of lora_A\)"),
    (lambda: report(adapted(), base=Model()), "one of these models carries LoRA"),
    (lambda: report(Model().double(), base=other_shape()), r"head\.weight \(4, 12\) before, \(5, 12\) now"),
    (lambda: report(Model(), base={}), "no weight matrix of the model is found in its base"),
    (lambda: report(adapted(), intruders=True, side="top"), 'side is "left"'),
    (lambda: compare_subspaces(adapted(), adapted(), 2, 2, through="AB"), "through is one of 'BA'.*found 'AB'"),
    (lambda: compare_subspaces(adapted(targets=["fc"]), adapted(targets=["head"])), "adapt no layer in common"),
    (lambda: compare_subspaces(Model(), adapted()), "compare_subspaces: this model carries no LoRA"),
    (lambda: compare_subspaces(with_nan(), adapted()), r"h\.1\.fc \(1 of 72"),
    (lambda: amplifications(adapted(), r=4), "asked for 4 directions; the update of wte has 3"),
    (lambda: amplifications(apply_lora(Model(), 2, 2, ["fc"])), r"the update of h\.0\.fc is 0, as at the start of training"),
])  # fmt: skip
def test_refusals_say_what_was_found(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_nan_in_a_dense_update_is_named():
    after = tuned(Model().double())
    after.head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="updates with NaN or infinite entries: head"):
        report(after, base=Model().double())
