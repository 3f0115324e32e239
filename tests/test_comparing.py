"""finetune_and_compare: what trains, what is counted, what a seed draws. Oracles: a plain loop in torch, numpy, a printed table, files on disk."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_lab import Batches, save_adapter
from lora_lab.comparing import FROZEN, FULL, LORA, PROBE, Task, Way, finetune_and_compare, lora, trained_bytes
from lora_lab.updates import TrainingDiverged

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()


def base(seed):
    torch.manual_seed(7)  # the pretrained part is the same for every seed
    body = nn.Linear(6, 16)
    torch.manual_seed(seed)
    return nn.Sequential(body, nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2)).eval()


def accuracy(model):
    assert not model.training and not torch.is_grad_enabled()
    return {"accuracy": (model(X[64:]).argmax(-1) == Y[64:]).float().mean(), "loss": F.cross_entropy(model(X[64:]), Y[64:])}


def task(**more):
    settings = dict(
        name="a toy", base=base, train=lambda seed: Batches(X[:64], Y[:64], 16, seed=seed), metric=accuracy, targets=["0"], head=["3"], lower=["loss"],
        lr={"linear probe": 0.05, "LoRA": 0.05, "full fine-tuning": 0.05}, steps=12, r=2, alpha=4,
    )  # fmt: skip
    return Task(**settings | more)


@pytest.fixture(scope="module")
def compared():
    return finetune_and_compare(task(), seeds=(0, 1, 2))


def test_each_way_trains_what_it_says_and_leaves_the_rest(compared):
    for seed in (0, 1, 2):
        start = base(seed).state_dict()
        moved = {name: {k for k, v in model.state_dict().items() if k in start and not torch.equal(v, start[k])}
                 for (name, s), model in compared.models.items() if s == seed}  # fmt: skip
        assert moved["frozen base"] == set()
        assert moved["linear probe"] == {"3.weight", "3.bias"}
        assert moved["full fine-tuning"] == set(start)
        adapted = compared.models["LoRA", seed]
        assert torch.equal(adapted[0].base_layer.weight, start["0.weight"]) and torch.equal(adapted[3].base_layer.weight, start["3.weight"])
        assert adapted[0].lora_B.abs().max() > 0 and not torch.equal(adapted[3].trained.weight, start["3.weight"])


def test_counts_are_those_of_the_formulas(compared):
    body, head = 6 * 16 + 16, 16 * 2 + 2
    wanted = {"frozen base": 0, "linear probe": head, "LoRA": 2 * (6 + 16) + head, "full fine-tuning": body + head}
    assert {row.way: row.trainable for row in compared.rows} == wanted
    # LoRA's head is a copy beside the frozen one
    assert {row.way: row.total for row in compared.rows} == dict.fromkeys(wanted, body + head) | {"LoRA": body + head + wanted["LoRA"]}


def test_bytes_are_those_of_files(compared, tmp_path):
    from safetensors.torch import save_file

    found = {row.way: row.bytes for row in compared.rows if row.seed == 0}
    assert found["frozen base"] == 0
    save_adapter(compared.models["LoRA", 0], tmp_path / "adapter")
    assert found["LoRA"] == (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    for name in ("linear probe", "full fine-tuning"):
        tensors = {k: p.detach().clone() for k, p in compared.models[name, 0].named_parameters() if p.requires_grad}
        save_file(tensors, tmp_path / "trained.safetensors")
        assert found[name] == (tmp_path / "trained.safetensors").stat().st_size


def test_a_run_is_the_plain_loop_written_out(compared):
    """Full fine-tuning and the probe by torch alone: AdamW, the rate on a line to 0, dropout on, the same batches."""
    for way, train_all in (("full fine-tuning", True), ("linear probe", False)):
        torch.manual_seed(1)
        model = base(1)
        if not train_all:
            model[0].requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
        stream = iter(Batches(X[:64], Y[:64], 16, seed=1))
        torch.manual_seed(1)
        model.train()
        for step in range(12):
            optimizer.param_groups[0]["lr"] = 0.05 * (12 - step) / 12
            x, y = next(stream)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        for (name, ours), theirs in zip(compared.models[way, 1].state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
        expected = float((model(X[64:]).argmax(-1) == Y[64:]).float().mean())
        assert compared.values(way)[1] == expected


def test_same_seed_same_numbers_and_the_callers_luck_is_left_alone(compared):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = finetune_and_compare(task(), seeds=(2, 0))
    assert torch.equal(torch.rand(3), expected)
    for way in compared.ways:
        first = {row.seed: row.scores for row in compared.of(way)}
        assert {row.seed: row.scores for row in again.of(way)} == {0: first[0], 2: first[2]}
    # a way's numbers don't hang on who ran before it
    alone = finetune_and_compare(task(), ways=(LORA,), seeds=(1,))
    assert alone.of("LoRA")[0].scores == compared.of("LoRA")[1].scores


def test_seeds_differ_in_head_A_and_order(compared):
    assert not torch.equal(compared.models["frozen base", 0][3].weight, compared.models["frozen base", 1][3].weight)
    first, again, other = (LORA.prepare(base(0), task(), seed)[0].lora_A for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_values_gap_and_groups_by_hand(compared):
    a, b = (np.array(compared.values(way, "loss")) for way in ("LoRA", "linear probe"))
    mean, half = compared.gap("LoRA", "linear probe", "loss")
    assert mean == pytest.approx((a - b).mean(), rel=1e-12)
    # Student's t, 97.5 %, 2 degrees of freedom, from a printed table: 4.303
    assert half == pytest.approx(4.303 * (a - b).std(ddof=1) / np.sqrt(3), rel=1e-4)
    assert compared.mean("LoRA", "loss") == pytest.approx(a.mean(), rel=1e-12)
    assert compared.groups()["LoRA"] == compared.values("LoRA") == compared.values("LoRA", "accuracy")
    alone = finetune_and_compare(task(), ways=(FROZEN, LORA), seeds=(0,))
    assert math.isnan(alone.gap("LoRA", "frozen base")[1]) and "seed 0 alone" in str(alone)


def test_the_table_holds_the_numbers(compared):
    lines = compared.table().splitlines()
    assert all(words in lines[0] for words in ("3 seeds", "12 steps", "r=2, alpha=4 on 0"))
    assert "accuracy ↑" in lines[1] and "loss ↓" in lines[1]
    values = np.array(compared.values("LoRA"))
    row = next(line for line in lines if line.startswith("LoRA"))
    assert f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" in row and f"{compared.of('LoRA')[0].bytes:,}" in row
    assert repr(compared) == str(compared) == compared.table()
    page = compared._repr_html_()
    assert page.count("<tr>") == 5 and page.count("<th ") == page.count("</th>") and page.count("<td ") == page.count("</td>")
    assert "color" not in page.lower()  # the page's own colours: light and dark


def test_rates_are_chosen_on_validation_by_the_first_seed_alone():
    seen = []

    def validate(model, seed):
        seen.append(seed)
        return -float(F.cross_entropy(model(X[:64]), Y[:64]))

    rates = (1e-6, 0.05, 1e-5)
    compared = finetune_and_compare(task(lr={"full fine-tuning": rates}, validate=validate), ways=(FULL,), seeds=(4, 5))
    assert [row.lr for row in compared.rows] == [0.05, 0.05] and seen == [4, 4, 4]
    plain = finetune_and_compare(task(lr={"full fine-tuning": 0.05}), ways=(FULL,), seeds=(4, 5))
    assert [row.scores for row in plain.rows] == [row.scores for row in compared.rows]


def test_a_run_that_diverges_is_said_and_the_table_stands():
    # squared, so that weights of 1e30 give a loss beyond what float32 holds
    squared = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) ** 2  # noqa: E731
    hot = task(lr={"LoRA": 0.05, "full fine-tuning": 1e30}, loss=squared)
    compared = finetune_and_compare(hot, ways=(FULL, LORA), seeds=(0, 1))
    assert all(math.isnan(v) for v in compared.values("full fine-tuning")) and all(map(math.isfinite, compared.values("LoRA")))
    assert "diverged" in str(compared) and "step" in compared.of("full fine-tuning")[0].problem and "diverged" in compared._repr_html_()
    assert math.isnan(compared.gap("LoRA", "full fine-tuning")[0]) and list(compared.groups()) == ["LoRA"]
    # one rate of several diverges: the others are still there
    several = task(lr={"LoRA": (1e30, 0.05)}, loss=squared, validate=lambda model: 1.0)
    assert finetune_and_compare(several, ways=(LORA,), seeds=(0,)).rows[0].lr == 0.05
    with pytest.raises(TrainingDiverged, match="every run"):
        finetune_and_compare(hot, ways=(FULL,), seeds=(0,))


def test_a_tied_head_can_be_probed_without_its_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = Tied()
    before = model.embed.weight.detach().clone()
    words = torch.arange(5)
    tied = Task("next word", lambda seed: copy.deepcopy(model), lambda seed: Batches(words, (words + 1) % 5, 5, seed=seed),
                lambda m: {"right": (m(words).argmax(-1) == (words + 1) % 5).float().mean()}, targets=["head"], probe=["head"],
                lr={"linear probe": 0.1}, steps=30)  # fmt: skip
    probe = finetune_and_compare(tied, ways=(PROBE,), seeds=(0,))
    found = probe.models["linear probe", 0]
    assert torch.equal(found.embed.weight, before) and not torch.equal(found.head.weight, before)
    assert probe.rows[0].trainable == 20 and probe.rows[0].total == 40 and found.head.weight is not found.embed.weight
    assert torch.equal(model.embed.weight, before) and model.head.weight is model.embed.weight  # the caller's own is left alone


def test_other_ways_and_ranks():
    def biases(model, task, seed):
        model.requires_grad_(False)
        model[0].bias.requires_grad_(True)
        return nn.Sequential(*model)  # may wrap

    bitfit = Way("BitFit", biases, lr="LoRA")
    compared = finetune_and_compare(task(), ways=(bitfit, lora(1), lora(4, 8, "wide"), lora()), seeds=(0,), keep=())
    head = 34
    assert {row.way: row.trainable for row in compared.rows} == {"BitFit": 16, "LoRA r=1": 22 + head, "wide": 88 + head, "LoRA": 44 + head}
    assert compared.rows[0].bytes == trained_bytes(biases(base(0), None, 0)) and compared.models == {}


@pytest.mark.parametrize(
    ("more", "call", "words"),
    [
        ({"lr": {}}, {}, "no learning rate for 'linear probe'"),
        ({"lr": {"linear probe": (0.1, 0.2)}}, {}, "no validate="),
        ({"lr": {"linear probe": ()}}, {}, "empty list"),
        ({"head": ()}, {}, "names none"),
        ({"metric": lambda model: {}}, {}, "no score"),
        ({}, {"seeds": (1, 1)}, "found twice: 1"),
        ({}, {"ways": (LORA, lora())}, "found twice: LoRA"),
        ({}, {"ways": ()}, "at least"),
    ],
)
def test_what_makes_no_sense_is_refused_with_words(more, call, words):
    with pytest.raises(ValueError, match=words):
        finetune_and_compare(task(**more), **({"ways": (PROBE,), "seeds": (0,)} | call))


def test_unknown_names_are_refused_with_those_there_are(compared):
    with pytest.raises(KeyError, match="linear probe"):
        compared.values("prefix tuning")
    with pytest.raises(KeyError, match="accuracy, loss"):
        compared.values("LoRA", "BLEU")
