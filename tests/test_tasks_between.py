"""The tasks of lab 08d: what their data are, what their bases know, what must fail; Reptile, the shelf, and what subtraction leaves behind."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lora_lab.adapt import apply_lora, lora_layers, merge
from lora_lab.comparing import FROZEN, LORA, PROBE, finetune_and_compare
from lora_lab.data import digits
from lora_lab.tasks import meta, pairs, switching, transfer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- pairs


def test_every_caption_says_its_digit():
    """By arithmetic on the words, not by the grammar that made them."""
    value = {name: k for k, name in enumerate(pairs.NUMBERS)}
    for text, digit in pairs.plain_captions():
        assert value[text.split()[-1]] == digit
    for text, digit in pairs.neighbour_captions():
        one, direction, than, number = text.split()
        assert (one, than) == ("one", "than") and value[number] + {"more": 1, "less": -1}[direction] == digit
    assert len(pairs.plain_captions()) == 40 and len(pairs.neighbour_captions()) == 18
    assert {digit for _, digit in pairs.neighbour_captions()} == set(range(10))


def test_encode_refuses_what_the_model_has_no_vector_for():
    assert pairs.encode(["a three"]).shape == (1, pairs.LONGEST)
    assert pairs.encode(["three not five"]).ne(pairs.encode(["five not three"])).any()
    for caption, named in (("a tree", "tree"), ("", "0 words"), ("a a a a a a", "6 words")):
        with pytest.raises(ValueError, match=named):
            pairs.encode([caption])


def test_pair_loss_is_minus_log_of_the_right_ones():
    """Two pictures of one digit, one of another: both captions of the pair are right. Softmax written out by hand."""
    torch.manual_seed(0)
    u, v, y = F.normalize(torch.randn(3, 4, dtype=torch.float64)), F.normalize(torch.randn(3, 4, dtype=torch.float64)), torch.tensor([5, 5, 2])
    e = torch.exp(u @ v.T / pairs.TEMPERATURE)
    right = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    by_picture = -torch.log((e * right).sum(1) / e.sum(1)).mean()
    by_caption = -torch.log((e * right).sum(0) / e.sum(0)).mean()
    found = pairs.pair_loss(lambda x, t: u @ v.T, (None, None, y))
    torch.testing.assert_close(found, (by_picture + by_caption) / 2, rtol=1e-12, atol=0)


def test_pair_batches_repeat_and_match_unless_shuffled():
    x, y = digits().train
    captions = pairs.neighbour_captions()
    words = pairs.encode([text for text, _ in captions])
    says = {tuple(row.tolist()): digit for row, (_, digit) in zip(words, captions, strict=True)}
    picture = {tuple(row.tolist()): int(digit) for row, digit in zip(x, y, strict=True)}
    for shuffled in (False, True):
        batches = pairs.PairBatches(x, y, captions, seed=3, shuffled=shuffled)
        first, again = next(iter(batches)), next(iter(batches))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        agree = [says[tuple(t.tolist())] == picture[tuple(p.tolist())] for p, t in zip(first[0], first[1], strict=True)]
        # by chance a tenth agree; 64 draws give more than half with a probability below 1e-15
        assert all(agree) if not shuffled else sum(agree) < 32


def test_the_text_tower_has_no_word_order():
    torch.manual_seed(0)
    model = pairs.PairModel()
    one, other = model.caption_vectors(pairs.encode(["three not five"])), model.caption_vectors(pairs.encode(["five not three"]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # the sum of three float32 vectors in another order
    assert not torch.allclose(one, model.caption_vectors(pairs.encode(["three not six"])), atol=1e-3)


def test_the_pair_task_has_a_gap_and_its_control_fails():
    found = finetune_and_compare(pairs.pair_task(steps=80), (FROZEN, LORA), (0,))
    control = finetune_and_compare(pairs.pair_task(shuffled=True, steps=80), (LORA,), (0,))
    known = finetune_and_compare(pairs.pair_task(0, "plain", steps=1), (FROZEN,), (0,))
    assert known.mean("frozen base") > 0.9 and found.mean("frozen base") < 0.3
    assert found.mean("LoRA") > 0.6 > 0.3 > control.mean("LoRA")


def test_an_unknown_kind_of_caption_is_refused():
    with pytest.raises(ValueError, match="'plain' or 'neighbours'"):
        pairs.pair_task(captions="French")


# ---- transfer


@pytest.mark.parametrize("name", [name for name in transfer.SOURCES if name != "nothing"])
def test_sources_are_what_they_say(name):
    x, y = transfer.source(name, 0)
    plain, labels = digits(seed=0).train
    image, before = x.view(-1, 8, 8), plain.view(-1, 8, 8)
    assert x.shape == plain.shape
    assert torch.equal(y, labels) == (name != "noise")
    expected = {
        "turned 90": lambda: torch.rot90(before, 1, (1, 2)),
        "turned 180": lambda: torch.rot90(before, 2, (1, 2)),
        "mirrored": lambda: torch.stack([b[:, torch.arange(7, -1, -1)] for b in before]),
        "negative": lambda: before * -1 + 1,
    }
    if name in expected:
        assert torch.equal(image, expected[name]())
    if name == "shuffled pixels":
        assert not torch.equal(x, plain) and torch.equal(x.sort(1).values, plain.sort(1).values)
        other = transfer.source("shuffled pixels 1", 0)[0]
        assert not torch.equal(other, x) and torch.equal(other.sort(1).values, plain.sort(1).values)


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="mirrored"):
        transfer.source("upside down", 0)


def test_few_takes_so_many_of_each_and_nests():
    x, y = digits().train
    small, large = transfer.few(x, y, 3, seed=1), transfer.few(x, y, 10, seed=1)
    assert torch.bincount(small[1]).tolist() == [3] * 10 and torch.bincount(large[1]).tolist() == [10] * 10
    rows = {tuple(row.tolist()) for row in large[0]}
    assert all(tuple(row.tolist()) in rows for row in small[0])
    assert len(transfer.few(x, y, 10**6)[0]) == len(x)


def test_a_far_base_is_worse_than_none():
    """Three seeds, the claim of the lab: training all weights from nothing beats LoRA on a base that knows digits turned by 90 degrees."""
    from lora_lab.comparing import FULL

    seeds = (0, 1, 2)
    far = finetune_and_compare(transfer.transfer_task("turned 90"), (LORA,), seeds).values("LoRA")
    scratch = finetune_and_compare(transfer.transfer_task("nothing"), (FULL,), seeds).values("full fine-tuning")
    assert all(a < b for a, b in zip(far, scratch, strict=True))


# ---- a learned start


def test_towards_is_the_formula():
    start, ends = {"a": torch.tensor([1.0, 2.0])}, [{"a": torch.tensor([3.0, 0.0])}, {"a": torch.tensor([5.0, 2.0])}]
    assert meta.towards(start, ends, 0.25)["a"].tolist() == [1.75, 1.75]


def test_put_and_factors_are_inverse_and_refuse_strangers():
    torch.manual_seed(0)
    model = apply_lora(transfer.network(0), r=4, alpha=8, target_modules=meta.TARGETS)
    kept = meta.factors(model)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.normal_()
    assert any(not torch.equal(kept[k], t) for k, t in meta.factors(model).items())
    meta.put(model, kept)
    assert all(torch.equal(kept[k], t) for k, t in meta.factors(model).items())
    with pytest.raises(ValueError, match="another adapter"):
        meta.put(model, {k: t for k, t in kept.items() if "lora_A" in k})


def test_reptile_without_a_family_is_refused_and_leaves_the_base():
    base = transfer.network(0)
    with pytest.raises(ValueError, match="family"):
        meta.reptile(base, [])
    before = copy.deepcopy(base.state_dict())
    tasks = [[digits(rotation=90).train]]
    calls = []
    start = meta.reptile(base, tasks, rounds=2, steps=1, update=lambda s, ends, e: calls.append(len(ends)) or meta.towards(s, ends, e))
    assert calls == [1, 1] and all(torch.equal(before[k], t) for k, t in base.state_dict().items())
    assert any(t.any() for name, t in start.items() if name.endswith("lora_B"))


def test_a_learned_start_knows_its_family_and_an_unrelated_one_does_not():
    task = meta.turned_task(90)
    score = {}
    for name, way in {"zero": LORA, "family": meta.begins_at(meta.FAMILY, "f", 30), "unrelated": meta.begins_at(meta.UNRELATED, "u", 30)}.items():
        model = way.prepare(copy.deepcopy(meta.upright_base(0)), task, 0).eval()
        score[name] = task.metric(model, 0)["accuracy"]
    assert score["family"] > 0.6 and max(score["zero"], score["unrelated"]) < 0.3


# ---- switching


def test_tasks_are_what_they_say():
    upright = digits(seed=0)
    for name in switching.TASKS:
        (x, y), (test_x, test_y) = switching.task_data(name, 0)
        assert x.shape == upright.train[0].shape and test_y.shape == upright.test[1].shape
    labels = upright.test[1].tolist()
    said = {name: switching.task_data(name, 0)[1][1].tolist() for name in switching.TASKS}
    assert said["even or odd"] == [k % 2 for k in labels]
    assert said["the next digit"] == [0 if k == 9 else k + 1 for k in labels]
    assert said["nine minus it"] == [9 - k for k in labels]
    assert said["negative"] == labels
    with pytest.raises(ValueError, match="mirrored"):
        switching.task_data("upside down", 0)


def test_a_shelf_switches_values_and_alpha_in_place():
    torch.manual_seed(0)
    model = apply_lora(transfer.network(0), r=4, alpha=8, target_modules=meta.TARGETS)
    layers, x = lora_layers(model), torch.randn(5, 64)
    shelf, outputs = switching.Shelf(model), {}
    for name, alpha in (("a", 8.0), ("b", 3.0)):
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_B.normal_()
                layer.alpha = alpha
        shelf.keep(name)
        outputs[name] = model(x)
    places = [p.data_ptr() for p in model.parameters()]
    base = [layer.base_layer.weight.clone() for layer in layers.values()]
    for name in "abba":
        assert torch.equal(shelf.take(name)(x), outputs[name])
    assert places == [p.data_ptr() for p in model.parameters()]
    assert all(torch.equal(b, layer.base_layer.weight) for b, layer in zip(base, layers.values(), strict=True))
    assert list(shelf) == ["a", "b"] and shelf.bytes == 2 * 4 * sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers.values())
    with pytest.raises(KeyError, match="a, b"):
        shelf.take("c")
    merge(model)
    with pytest.raises(RuntimeError):
        shelf.take("a")


def test_the_right_adapter_reads_and_the_wrong_one_does_not():
    names = ("turned 90", "mirrored", "nine minus it")
    shelf = switching.trained_shelf(names, 0, 80)
    table = switching.who_reads_what(shelf, names)
    right = table.diagonal()
    wrong = table[~torch.eye(3, dtype=bool)]
    assert right.min() > 0.5 > wrong.max()


def test_subtracting_drifts_and_how_far():
    torch.manual_seed(0)
    W0 = torch.randn(64, 64)
    updates = [0.01 * torch.randn(64, 4) @ torch.randn(4, 64)]
    single, half = switching.sums_in_place(W0, updates, 100), switching.sums_in_place(W0.bfloat16(), [u.bfloat16() for u in updates], 100)
    W = W0.clone()
    W = (W + updates[0]) - updates[0]
    torch.testing.assert_close(single[0], ((W - W0).norm() / W0.norm()), rtol=1e-4, atol=0)  # float32 norms
    assert 0 < single[-1] < 1e-5 < 1e-4 < half[-1] < 1e-2


ALL = [pairs.pair_task(), transfer.transfer_task("mirrored"), meta.turned_task(), switching.switch_task("mirrored")]


@pytest.mark.parametrize("task", ALL, ids=lambda t: t.name)
def test_every_task_gives_the_same_numbers_again(task):
    from dataclasses import replace

    short = replace(task, steps=3, validate=None, lr={"linear probe": 1e-2, "LoRA": 1e-2})
    one, two = (finetune_and_compare(short, (PROBE, LORA), (0,)) for _ in range(2))
    for way in ("linear probe", "LoRA"):
        assert one.values(way) == two.values(way)
        a, b = (run.models[way, 0].state_dict() for run in (one, two))
        assert all(torch.equal(a[k], b[k]) for k in a)
