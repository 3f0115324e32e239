"""Counts against numbers from the paper and from sums written out here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_lab import LoRALinear, apply_lora, breakeven_rank, count_parameters, lora_parameters


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
