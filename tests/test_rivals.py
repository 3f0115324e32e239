"""LoRA's rivals: identity where it should be, a base that stays as it is, counts by the papers' formulas, numbers by an independent route."""

import copy
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_lab import apply_lora, count_parameters, lora_layers, merge
from lora_lab.comparing import FROZEN, FULL, LORA, Task, finetune_and_compare
from lora_lab.counting import adapter_parameters, prefix_parameters, stored_bytes
from lora_lab.zoo import ways
from lora_lab.zoo.costs import compare_latency, step_memory
from lora_lab.zoo.quantised import (
    LoRAQuantised,
    QuantisedLinear,
    dequantise_blocks,
    nf4_levels,
    quantise,
    quantise_below_lora,
    quantise_blocks,
    quantise_rows,
)
from lora_lab.zoo.rivals import BottleneckAdapter, TrainedContext, add_adapters, add_tokens, bitfit, last_layers, mix, rows
from lora_lab.zoo.smaller import distillation_loss, distils, fewer_blocks, prune, sparse_bytes

transformers = pytest.importorskip("transformers")
D, BLOCKS, VOCABULARY = 16, 3, 50
BEHIND = ["attn.c_proj", "mlp.c_proj"]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=D, n_layer=BLOCKS, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def gpt2(made):
    return copy.deepcopy(made)


@pytest.fixture
def ids():
    return torch.randint(1, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(1))


class Encoder(nn.Module):
    """A small classifier of sequences (B, T, 6) whose tokens all see each other, with a head of its own."""

    def __init__(self, d=8, blocks=2):
        super().__init__()
        self.embed = nn.Linear(6, d)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(d, 2, 16, 0.0, batch_first=True) for _ in range(blocks))
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def shake(model, seed=5):
    """Every trained number moved away from its start, so that a zero does not hide a mistake."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return model


# ---------------------------------------------------------------- what trains, and how much of it


@pytest.mark.parametrize(
    ("prepare", "expected", "hand"),
    [
        # 11 d a block: c_attn 3 d, c_proj d, c_fc 4 d, mlp.c_proj d, two norms; and the last norm
        (bitfit, None, BLOCKS * 11 * D + D),
        (lambda m: add_adapters(m, 5, BEHIND), adapter_parameters(D, 5, 2 * BLOCKS), 2 * BLOCKS * (D * 5 + 5 + 5 * D + D)),
        (lambda m: add_adapters(m, 5, ["mlp.c_proj"]), adapter_parameters(D, 5, BLOCKS), BLOCKS * (D * 5 + 5 + 5 * D + D)),
        (lambda m: TrainedContext(m, 4, deep=False), prefix_parameters(D, 4), 4 * D),
        (lambda m: TrainedContext(m, 4, deep=True), prefix_parameters(D, 4, layers=BLOCKS), BLOCKS * 4 * D),
        # one block: norms 4 d, attention d (3 d) + 3 d + d d + d, MLP 8 d d + 5 d
        (lambda m: last_layers(m, ["h.2"]), None, 12 * D * D + 13 * D),
    ],
    ids=["bitfit", "adapters", "adapters behind the MLP", "prompt", "prefix", "last block"],
)
def test_counts_are_the_papers_and_the_base_stays(gpt2, ids, prepare, expected, hand):
    before = {name: p.detach().clone() for name, p in gpt2.named_parameters()}
    model = prepare(gpt2)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert count_parameters(model).trainable == hand and expected in (None, hand)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        name = name.removeprefix("model.").replace(".base_layer", "")
        if name in before and id(p) not in trained:
            assert torch.equal(p, before[name]), name
    moved = [p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad]
    # D of an adapter waits for U, which starts at zero, as A of LoRA waits for B
    assert sum(moved) == len(moved) - (2 * sum(isinstance(m, BottleneckAdapter) for m in model.modules()))


def test_biases_and_last_layers_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="none"):
        bitfit(nn.Sequential(nn.Linear(3, 3, bias=False)))
    with pytest.raises(ValueError, match="nonsense"):
        last_layers(nn.Sequential(nn.Linear(3, 3)), ["nonsense"])


# ---------------------------------------------------------------- adapters


def test_an_adapter_is_the_identity_first_and_the_formula_then():
    torch.manual_seed(0)
    adapter, h = BottleneckAdapter(6, 3, nn.ReLU()).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(adapter(h), h)
    shake(adapter)
    D_, b, U, c = (p.detach().numpy() for p in (adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias))
    expected = h.numpy() + np.maximum(h.numpy() @ D_.T + b, 0) @ U.T + c
    np.testing.assert_allclose(adapter(h).detach().numpy(), expected, rtol=1e-12)  # float64 sums of 6 products
    with pytest.raises(ValueError, match="width"):
        BottleneckAdapter(6, 0)


def test_adapters_stand_behind_their_layers_and_start_as_nothing(gpt2, made, ids):
    model = add_adapters(gpt2, 4, BEHIND)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, made(ids).logits)
        shake(model)
        assert not torch.allclose(model(ids).logits, made(ids).logits)
        layer, x = model.transformer.h[1].mlp.c_proj, torch.randn(3, 4 * D)
        assert torch.equal(layer(x), layer.adapter(made.transformer.h[1].mlp.c_proj(x)))
    with pytest.raises(TypeError, match="LayerNorm"):
        add_adapters(copy.deepcopy(made), 4, ["ln_1"])


# ---------------------------------------------------------------- trained context


def test_prompts_are_read_like_embedded_tokens(gpt2, made, ids):
    model = shake(TrainedContext(gpt2, 5, deep=False))
    with torch.no_grad():
        embedded = torch.cat([model.P.expand(4, -1, -1), made.transformer.wte(ids)], 1)
        expected = made(inputs_embeds=embedded).logits[:, 5:]
    # float32, two orders of summation: a few units of the seventh digit
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_prefix_stands_in_front_of_every_block(gpt2, made, ids):
    model = shake(TrainedContext(gpt2, 5, deep=True))
    with torch.no_grad():
        hidden = made.transformer.wte(ids) + made.transformer.wpe(torch.arange(5, 12))
        for block, P in zip(made.transformer.h, model.P, strict=True):
            both = torch.cat([P.expand(4, -1, -1), hidden], 1)
            unseen = torch.full((12, 12), -torch.inf).triu(1)
            out = block(both, attention_mask=unseen[None, None])
            hidden = (out[0] if isinstance(out, tuple) else out)[:, 5:]
        expected = made.lm_head(made.transformer.ln_f(hidden))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deep", [False, True])
def test_a_trained_context_writes_what_it_would_say_token_by_token(gpt2, ids, deep):
    model = shake(TrainedContext(gpt2, 3, deep)).eval()
    settings = transformers.GenerationConfig(max_new_tokens=6, eos_token_id=0, pad_token_id=0)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # the first text is two tokens shorter, padded on the left
    written = model.generate(ids, attention_mask=mask, generation_config=settings)[:, 7:]
    for row in range(4):
        text = ids[row : row + 1, int(mask[row].logical_not().sum()) :]
        for token in written[row].tolist():
            with torch.no_grad():
                assert token == model(text).logits[0, -1].argmax()
            text = torch.cat([text, torch.tensor([[token]])], 1)
            if token == 0:
                break
    settings.num_beams = 2
    with pytest.raises(ValueError, match="greedy"):
        model.generate(ids, attention_mask=mask, generation_config=settings)


@pytest.mark.parametrize("deep", [False, True])
def test_what_is_kept_of_a_context_follows_it(gpt2, ids, deep):
    model = TrainedContext(gpt2, 3, deep).eval()
    with torch.no_grad():
        first = model(ids).logits
        pairs = model.keys_and_values()
        assert model.keys_and_values() is pairs and torch.equal(model(ids).logits, first)
        model.P.add_(1.0)
        moved = model(ids).logits
    assert not torch.allclose(moved, first)
    torch.testing.assert_close(model(ids).logits, moved, msg="with gradients it is computed anew")


def test_a_context_must_leave_room(gpt2):
    for n in (0, 32):
        with pytest.raises(ValueError, match="32"):
            TrainedContext(gpt2, n, deep=False)


@pytest.mark.parametrize("deep", [False, True])
def test_tokens_beside_an_encoder(deep):
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(3, 5, 6)
    plain = copy.deepcopy(model)
    add_tokens(model, 4, "blocks", 8, deep)
    shake(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == prefix_parameters(8, 4, layers=2 if deep else 1)
    with torch.no_grad():
        h = plain.embed(x)
        if deep:
            for block, tokens in zip(plain.blocks, trained, strict=True):
                h = block(torch.cat([h, tokens.expand(3, -1, -1)], 1))[:, :5]
        else:
            h = torch.cat([h, trained[0].expand(3, -1, -1)], 1)
            for block in plain.blocks:
                h = block(h)
            h = h[:, :5]
        torch.testing.assert_close(model(x), plain.head(h.mean(1)), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- several tasks in one batch


def test_every_row_goes_through_its_own_adapter(made, ids):
    tuned = []
    for seed, alpha in ((1, 8), (2, 6), (3, 4)):
        torch.manual_seed(seed)
        tuned.append(shake(apply_lora(copy.deepcopy(made), r=2, alpha=alpha, target_modules=["c_attn", "c_fc"]), seed).eval())
    mixed = mix(copy.deepcopy(made), tuned)
    tasks = [2, 0, 1, 2]
    with torch.no_grad(), rows(mixed, tasks):
        found = mixed(ids).logits
    with torch.no_grad():
        for row, task in enumerate(tasks):
            torch.testing.assert_close(found[row], tuned[task](ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(mixed(ids).logits, made(ids).logits), "outside the block all rows are the base's"
        with pytest.raises(ValueError, match="from 0 to 2"), rows(mixed, [0, 3, 1, 1]):
            pass
        with pytest.raises(ValueError, match="2 tasks were given for a batch of 4"), rows(mixed, [0, 1]):
            mixed(ids)
        assert torch.equal(mixed(ids).logits, made(ids).logits), "also after an error"
    with pytest.raises(ValueError, match="same layers"):
        mix(copy.deepcopy(made), [tuned[0], apply_lora(copy.deepcopy(made), r=2, alpha=4, target_modules=["c_fc"])])
    with pytest.raises(TypeError, match="Embedding"):
        mix(copy.deepcopy(made), [apply_lora(copy.deepcopy(made), r=2, alpha=4, target_modules=["wpe"])])
    fused = shake(apply_lora(copy.deepcopy(made), r=2, alpha=4, target_modules=["c_attn:q,v"])).eval()
    with torch.no_grad(), rows(two := mix(copy.deepcopy(made), [fused, fused]), [1, 0, 1, 1]):
        torch.testing.assert_close(two(ids).logits, fused(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="mixes no adapters"), rows(made, [0]):
        pass


# ---------------------------------------------------------------- few bits

# Dettmers et al. 2023, appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_the_levels_are_the_papers():
    np.testing.assert_allclose(nf4_levels().numpy(), NF4, atol=2e-6)  # printed after an approximation of the quantile


def test_rows_in_8_bits_are_off_by_half_a_step_at_most():
    torch.manual_seed(0)
    W = torch.randn(7, 30) * torch.logspace(-3, 2, 7)[:, None]
    W[3] = 0
    codes, scales = quantise_rows(W)
    assert codes.dtype == torch.int8 and codes.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    error = (codes.double() * scales.double() - W.double()).abs()
    assert (error <= 0.5 * scales * (1 + 1e-5)).all()  # 1e-5: W / scale is rounded to float32 itself


@pytest.mark.parametrize(("kind", "levels"), [("int4", np.arange(-7, 8) / 7), ("nf4", np.array(NF4))])
def test_blocks_in_4_bits_take_the_nearest_level(kind, levels):
    torch.manual_seed(0)
    W = torch.randn(5, 33) * 3  # 165 numbers: two blocks of 64 and a part
    W[2] = 0
    packed, scales = quantise_blocks(W, kind, 64)
    assert packed.dtype == torch.uint8 and len(packed) == 3 * 32 and len(scales) == 3
    found = dequantise_blocks(packed, scales, (5, 33), kind, 64).flatten().double().numpy()
    flat = W.flatten().double().numpy()
    for start in range(0, 165, 64):
        block = flat[start : start + 64]
        largest = np.abs(block).max()
        distance = np.abs(block[:, None] - largest * levels).min(1)
        np.testing.assert_allclose(np.abs(found[start : start + 64] - block), distance, atol=1e-5 * largest)


@pytest.mark.parametrize(("kind", "as_counted"), [("int8", "int8"), ("nf4", "nf4"), ("int4", "nf4")])
def test_a_quantised_layer_computes_with_its_codes_and_keeps_no_weight(kind, as_counted):
    torch.manual_seed(0)
    base = nn.Linear(48, 20)
    layer = QuantisedLinear(base, kind)
    assert layer.stored_bytes == stored_bytes(20, 48, as_counted)
    x = torch.randn(3, 4, 48, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert not kept, "autograd keeps neither x nor W: W is frozen, and made again from its codes"
    weight = layer.weight.clone()
    torch.testing.assert_close(y, F.linear(x, weight, base.bias))
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ weight)
    assert 0 < (weight - base.weight).norm() / base.weight.norm() < {"int8": 0.01, "int4": 0.2, "nf4": 0.2}[kind]
    assert not any(p.requires_grad for p in layer.parameters())
    assert torch.equal(QuantisedLinear(copy.deepcopy(layer), "int8").weight.shape and copy.deepcopy(layer)(x), layer(x))
    with pytest.raises(ValueError, match="fp3"):
        QuantisedLinear(base, "fp3")


def test_a_quantised_gpt2_is_near_the_model_and_lora_trains_on_it(gpt2, made, ids):
    with torch.no_grad():
        near = quantise(copy.deepcopy(made), "int8")(ids).logits
        far = quantise(copy.deepcopy(made), "int4")(ids).logits
        exact = made(ids).logits
        assert 0 < (near - exact).norm() < (far - exact).norm() < exact.norm()
    torch.manual_seed(1)
    adapted = apply_lora(gpt2, r=2, alpha=4, target_modules=["c_attn", "c_fc"])
    A = adapted.transformer.h[0].attn.c_attn.lora_A
    model = quantise_below_lora(adapted, "nf4")
    layers = lora_layers(model)
    assert len(layers) == 2 * BLOCKS and all(type(layer) is LoRAQuantised for layer in layers.values())
    assert layers["transformer.h.0.attn.c_attn"].lora_A is A and count_parameters(model).trainable == BLOCKS * 2 * (D + 3 * D + D + 4 * D)
    with torch.no_grad():
        rounded = quantise(copy.deepcopy(made), "nf4", ["c_attn", "c_fc"])(ids).logits
        torch.testing.assert_close(model(ids).logits, rounded)  # B = 0
    codes = {name: b.clone() for name, b in model.named_buffers()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids).logits.square().mean().backward()
        optimizer.step()
    assert all(layer.lora_A.grad.any() and layer.lora_B.grad.any() for layer in layers.values())
    assert all(torch.equal(b, codes[name]) for name, b in model.named_buffers())
    with pytest.raises(RuntimeError, match="quantise the sum"):
        merge(model)
    with pytest.raises(ValueError, match="no LoRA"):
        quantise_below_lora(copy.deepcopy(made))
    with pytest.raises(TypeError, match="Fused"):
        quantise_below_lora(apply_lora(copy.deepcopy(made), r=2, alpha=4, target_modules=["c_attn:q,v"]))


# ---------------------------------------------------------------- smaller models


@pytest.mark.parametrize("T", [0.5, 1.0, 3.0])
def test_distillation_is_the_formula_and_its_gradient(T):
    draw = np.random.default_rng(0)
    s, t = draw.normal(size=(4, 2, 5)), draw.normal(size=(4, 2, 5))

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(t / T), softmax(s / T)
    expected = T**2 * (p * np.log(p / q)).sum(-1).mean()
    student = torch.tensor(s, requires_grad=True)
    loss = distillation_loss(student, torch.tensor(t), T)
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # computed in float32
    loss.backward()
    np.testing.assert_allclose(student.grad.numpy(), T * (q - p) / 8, rtol=1e-4, atol=1e-6)
    assert distillation_loss(student.detach(), student.detach(), T).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="temperature"):
        distillation_loss(student, student, 0)


def test_a_students_loss_weighs_teacher_and_labels(gpt2, made, ids):
    labels = ids.clone()
    labels[:, :3] = -100
    batch = {"input_ids": ids, "labels": labels}
    student = shake(gpt2.requires_grad_(True))
    with torch.no_grad():
        mine, its = (m(ids).logits[:, 2:-1] for m in (student, made))
        hard = F.cross_entropy(mine.flatten(0, 1), ids[:, 3:].flatten())
        soft = distillation_loss(mine, its, 2.0)
        for share in (0.0, 0.3, 1.0):
            found = distils(made, None, 2.0, share)(student, batch)
            assert found.item() == pytest.approx((share * soft + (1 - share) * hard).item(), rel=1e-5)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    one, two = nn.Linear(4, 3), nn.Linear(4, 3)
    found = distils(two, lambda m, b: F.cross_entropy(m(b[0]), b[1]), 2.0, 0.25)(one, (x, y))
    assert found.item() == pytest.approx((0.25 * distillation_loss(one(x), two(x), 2.0) + 0.75 * F.cross_entropy(one(x), y)).item(), rel=1e-5)
    with pytest.raises(ValueError, match="share"):
        distils(two, None, 2.0, 1.5)


def test_fewer_blocks_are_evenly_spread_and_still_write(made, ids):
    student = fewer_blocks(made, "transformer.h", 2)
    assert len(made.transformer.h) == 3 and made.config.n_layer == 3, "the model itself stays"
    assert len(student.transformer.h) == student.config.n_layer == 2
    for mine, its in zip(student.transformer.h, (made.transformer.h[k] for k in (0, 2)), strict=True):
        assert torch.equal(mine.attn.c_attn.weight, its.attn.c_attn.weight)
    with torch.no_grad():
        whole = student(ids).logits
        past = student(ids[:, :4], use_cache=True)
        rest = student(ids[:, 4:], past_key_values=past.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 4:], rtol=1e-4, atol=1e-5)
    assert torch.equal(fewer_blocks(made, "transformer.h", 3)(ids).logits, made(ids).logits)
    last = fewer_blocks(made, "transformer.h", 1).transformer.h
    assert len(last) == 1 and torch.equal(last[0].attn.c_attn.weight, made.transformer.h[2].attn.c_attn.weight)
    with pytest.raises(ValueError, match="keep=4"):
        fewer_blocks(made, "transformer.h", 4)


def test_pruning_takes_the_smallest_and_leaves_the_rest(made):
    model = prune(copy.deepcopy(made), 0.3)
    before = {n: m.weight for n, m in made.named_modules() if "c_" in n.rpartition(".")[2]}
    after = {n: m.weight for n, m in model.named_modules() if "c_" in n.rpartition(".")[2]}
    flat_before, flat_after = (torch.cat([w.detach().flatten() for w in d.values()]) for d in (before, after))
    gone = flat_after == 0
    assert gone.sum() == int(0.3 * len(gone))
    assert torch.equal(flat_after[~gone], flat_before[~gone])
    assert flat_before[gone].abs().max() <= flat_before[~gone].abs().min()
    assert torch.equal(model.transformer.wte.weight, made.transformer.wte.weight)
    tied = nn.Linear(4, 4, bias=False)
    nn.init.constant_(tied.weight, 2.0)
    assert prune(tied_model := nn.Sequential(tied), 0.5)[0].weight.count_nonzero() == 8, "equal values do not all go at once"
    assert sparse_bytes(tied_model[0].weight) == 16 // 8 + 8 * 4
    with pytest.raises(ValueError, match="share"):
        prune(tied_model, 1.0)


# ---------------------------------------------------------------- costs


def test_the_memory_of_a_step_is_what_one_can_count_by_hand():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3))
    model[0].requires_grad_(False)
    x, y = torch.randn(8, 10), torch.randint(3, (8,))
    found = step_memory(model, lambda m, b: m(b[0]).square().sum(), (x, y))
    numbers = 10 * 20 + 20 + 20 * 3 + 3
    assert found.weights == 4 * numbers and found.gradients == 4 * 63 and found.optimizer == 8 * 63
    # the second layer keeps its input, and the square keeps its own; ReLU of what is frozen keeps nothing
    assert found.activations == 4 * (8 * 20 + 8 * 3)
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations


def test_ratios_are_taken_round_by_round():
    now, load = [0.0], [1.0]

    def call(seconds):
        def work():
            now[0] += seconds * load[0]

        return work

    def slower_and_slower():
        load[0] += 0.01
        return now[0]

    calls = {"base": call(1.0), "base again": call(1.0), "half as much again": call(1.5)}
    found = compare_latency(calls, "base", rounds=24, clock=slower_and_slower)
    assert found["base"].ratio == 1.0
    # within a round the machine slows down by a few per cent, in some rounds before and in some behind the reference
    assert found["base again"].ratio == pytest.approx(1.0, abs=0.05) and found["half as much again"].ratio == pytest.approx(1.5, abs=0.07)
    assert found["base"].low <= found["base"].ratio <= found["base"].high
    with pytest.raises(ValueError, match="nothing"):
        compare_latency(calls, "nothing")


# ---------------------------------------------------------------- as ways


@pytest.fixture(scope="module")
def trial(made):
    x = torch.randint(1, VOCABULARY, (16, 9), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": x, "labels": x}

    def loss(model, batch):
        return F.cross_entropy(model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    return Task("tokens", base=lambda seed: made, train=lambda seed: [batch], metric=lambda model: {"loss": float(loss(model, batch))}, lower=("loss",),
                targets="all-linear", loss=loss, steps=4, r=2, alpha=4,
                lr={"LoRA": 1e-2, "full fine-tuning": 1e-2, "BitFit": 1e-2, "adapters": 1e-2, "prompt tuning": 1e-2, "prefix tuning": 1e-2,
                    "last layers": 1e-2, "distilled, 2 blocks": 1e-2})  # fmt: skip


def test_every_rival_is_a_way(trial, made):
    before = [p.detach().clone() for p in made.parameters()]
    first = [FROZEN, FULL, LORA, ways.BITFIT, ways.adapters(3, BEHIND), ways.prompts(2), ways.prefixes(2), ways.last(["h.2", "ln_f"]),
             ways.lora_on("int8"), ways.lora_on("nf4")]  # fmt: skip
    found = finetune_and_compare(trial, first, seeds=(0, 1))
    assert all(torch.equal(p, b) for p, b in zip(made.parameters(), before, strict=True)), "the task's base is nobody's to change"
    start = found.mean("frozen base")
    for way in found.ways:
        assert all(math.isfinite(v) for v in found.values(way))
        assert way == "frozen base" or found.of(way)[0].trainable > 0
    assert found.mean("full fine-tuning") < start and found.mean("LoRA") < start
    assert found.of("prefix tuning")[0].bytes >= 4 * BLOCKS * 2 * D
    assert found.of("LoRA on nf4")[0].bytes == found.of("LoRA")[0].bytes
    assert found.of("LoRA on nf4")[0].total == found.of("LoRA")[0].total  # codes are weights, too
    done = {seed: found.models["full fine-tuning", seed] for seed in (0, 1)}
    second = [ways.rounded(done, "int8"), ways.rounded(done, "int4"), ways.pruned(done, 0.5), ways.student(done, "transformer.h", 2)]
    kept = [p.detach().clone() for p in done[0].parameters()]
    later = finetune_and_compare(ways.with_teachers(trial), second, seeds=(0, 1))
    assert all(torch.equal(p, k) for p, k in zip(done[0].parameters(), kept, strict=True)), "what is compressed is a copy"
    files = {way: later.of(way)[0].bytes for way in later.ways}
    whole = ways.model_bytes(done[0])
    assert files["rounded to int4"] < files["rounded to int8"] < whole and files["pruned, 50% zeros"] < whole and files["distilled, 2 blocks"] < whole
    assert later.of("distilled, 2 blocks")[0].trainable > 0 and later.of("rounded to int8")[0].trainable == 0
    again = finetune_and_compare(trial, [ways.adapters(3, BEHIND), ways.prefixes(2)], seeds=(1,))
    for way in again.ways:
        assert again.values(way) == found.values(way)[1:], "the same seed gives the same numbers, whatever else is compared"
    assert statistics.stdev(found.values("adapters")) > 0


def test_heads_train_with_every_way():
    def base(seed):
        return Encoder()

    x, y = torch.randn(12, 5, 6), torch.arange(12) % 3
    task = Task("rows", base, lambda seed: [(x, y)], lambda model: {"accuracy": float((model(x).argmax(1) == y).float().mean())}, ["linear1"],
                head=("head",), steps=2)  # fmt: skip
    for way in (ways.BITFIT, ways.adapters(2, ["linear2"]), ways.prompts(2, "blocks", 8), ways.prefixes(2, "blocks", 8), ways.last(["blocks.1"])):
        torch.manual_seed(0)
        model = way.prepare(base(0), task, 0)
        assert model.head.weight.requires_grad and model.head.bias.requires_grad and not model.embed.weight.requires_grad, way.name
        model(x).sum().backward()
