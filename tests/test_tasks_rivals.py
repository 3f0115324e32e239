"""The two tasks of lab 09: what is scored is what one finds by hand."""

import numpy as np
import pytest
import torch

from lora_lab import digits
from lora_lab.tasks.turned import LINEAR, turned


def test_turned_digits_are_the_upright_ones_turned():
    task = turned(90, quick=True)
    known = {np.ascontiguousarray(np.rot90(image)).tobytes() for image in digits().train[0].view(-1, 8, 8).numpy()}
    x, y = next(iter(task.train(0)))
    assert all(image.tobytes() in known for image in x.view(-1, 8, 8).numpy()) and set(y.tolist()) <= set(range(10))
    assert torch.equal(next(iter(task.train(0)))[0], x) and not torch.equal(next(iter(task.train(1)))[0], x)


def test_the_base_reads_upright_digits_and_not_turned_ones():
    task = turned(90, quick=True)
    base = task.base(0)
    found = task.metric(base)
    for angle, score in ((90, "accuracy"), (0, "upright")):
        x, y = digits(rotation=angle).test
        assert found[score] == pytest.approx((base(x).argmax(1) == y).float().mean().item())
    assert found["accuracy"] < 0.3 < 0.7 < found["upright"], "there is something to learn, and something to forget"
    assert task.base(0) is not base, "each way gets its own"
    names = [name for name, _ in base.blocks[0].named_children()]
    assert set(LINEAR) <= set(names)


def test_facts_are_scored_token_by_token():
    pytest.importorskip("transformers")
    pytest.importorskip("sacrebleu")
    from lora_lab.data import sherlock_holmes
    from lora_lab.data_to_text import encode, load_task
    from lora_lab.gpt2 import load_gpt2, token_ids
    from lora_lab.tasks.facts import facts

    task = facts(steps=2, meanings=0, held_out=10, prose=1)
    model = task.base(0)
    with torch.no_grad():
        found = task.metric(model)
    assert set(found) == {"loss", "prose"} and set(found) <= set(task.lower)
    _, tokenizer = load_gpt2("pocket")
    data = load_task("lighthouses")
    short = [e for e in encode(data.test, tokenizer, 256) if len(e.ids) <= 128]
    held = short[:: len(short) // 10][:10]
    total, count = 0.0, 0
    for example in held:  # one by one, no padding
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([example.ids])).logits[0], -1)
        for place in range(example.prompt, len(example.ids)):
            total, count = total - logs[place - 1, example.ids[place]].item(), count + 1
    assert found["loss"] == pytest.approx(total / count, rel=1e-4)  # float32, in batches or one by one
    ids = token_ids(tokenizer, sherlock_holmes().ordinary)[:128]
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    assert found["prose"] == pytest.approx(-np.mean([logs[k, ids[k + 1]].item() for k in range(127)]), rel=1e-4)
    trained = {tuple(row) for batch, _ in zip(task.train(0), range(3), strict=False) for row in batch["input_ids"].tolist()}
    assert not trained & {tuple(example.ids) for example in held}
    with_texts = facts(steps=2, meanings=2, held_out=2, prose=1)
    with torch.no_grad():
        scores = with_texts.metric(model)
    assert list(scores) == ["loss", "BLEU", "slot errors", "prose"] and 0 <= scores["BLEU"] < 50 and scores["slot errors"] > 0
