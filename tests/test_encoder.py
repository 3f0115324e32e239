"""The pocket encoder and its recipe: what ships is what transformers opens; holes, first embeddings, a killed run, clear refusals."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lora_lab import count_parameters, encoder
from lora_lab.encoder import Reader, Windows, encode, fill, hide, load_encoder, meanings, pretrain_encoder
from lora_lab.files import shipped
from lora_lab.pretrain import Recipe

TINY = Recipe(vocab=300, layers=1, width=16, heads=2, context=64, rows=2, drills=0, warmup=2, hold_out=3)


@pytest.fixture(scope="module")
def pocket():
    return load_encoder()


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A tiny random BERT as transformers saves it, with the pocket encoder's tokenizer: "one the user has"."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(3)
    config = BertConfig(vocab_size=6000, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=40)
    BertForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(shipped("pocket-encoder")).save_pretrained(folder)
    return folder


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ["old", "man", "door", "house", "river", "went", "saw", "the", "and", "into", "winter", "morning", "girl", "horse", "red", "stone"]
    words += ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 6)) for _ in range(60)]
    for k in range(6):
        (folder / f"{k}.txt").write_text("\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(60)), encoding="utf-8")
    return folder


def test_what_ships_is_what_transformers_opens(pocket):
    from transformers import AutoModelForMaskedLM

    folder = shipped("pocket-encoder")
    theirs = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, tokenizer = load_encoder(head=True)
    ids = encode(tokenizer, ["The old man opened the [MASK] and went in.", "A dog."], 32)
    mask = (ids != 0).long()
    with torch.no_grad():
        a, b = ours(input_ids=ids, attention_mask=mask).logits, theirs(input_ids=ids, attention_mask=mask).logits
        body = pocket[0](input_ids=ids, attention_mask=mask).last_hidden_state
        c = theirs.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(a, b) and torch.equal(body, c)
    # An embedding of 6,000 tokens, 128 positions and 2 kinds; per layer 12 d^2 + 13 d; one norm.
    assert sum(p.numel() for p in pocket[0].parameters()) == (6000 + 128 + 2) * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128
    assert (folder / "model.safetensors").stat().st_size < 5e6
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float16}


def test_the_pocket_encoder_beats_counting():
    text = (shipped("sherlock-holmes") / "ordinary.txt").read_text(encoding="utf-8")
    model, tokenizer = load_encoder(head=True)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    recipe = Recipe(vocab=6000, layers=4, width=128, heads=4, context=128, rows=16, drills=0)
    windows = Windows(ids, recipe)
    score = encoder.masked_score(model, windows, 1)
    # The floor's best case: the counts are those of this very text.
    floor = encoder.unigram_score(ids, windows, 1)
    assert score["accuracy"] > 2 * floor["accuracy"] and score["bits"] < floor["bits"] - 1


def test_the_card_states_what_its_folder_holds():
    text = (shipped("pocket-encoder") / "README.md").read_text(encoding="utf-8")
    model, _ = load_encoder(head=True)
    parameters = int(re.search(r"architecture with ([\d,]+) parameters", text)[1].replace(",", ""))
    assert parameters == sum(p.numel() for p in model.parameters()) and "**Unfinished**" not in text
    for word in ("unigram", "**Text**", "Licence", "Limits"):
        assert word in text


def test_filling_a_hole(pocket):
    model, tokenizer = load_encoder(head=True)
    best = fill(model, tokenizer, "The old man opened the [MASK] and went in.", k=3)
    assert len(best) == 3 and best[0][1] >= best[1][1] >= best[2][1] > 0 and sum(p for _, p in best) < 1
    assert all(isinstance(word, str) for word, _ in best)
    with pytest.raises(ValueError, match=r"no \[MASK\]"):
        fill(model, tokenizer, "No hole here.")


def test_holes():
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 6000, size=(80, 128))
    windows[:, 0], windows[:, 5] = encoder.CLS, encoder.SEP
    x, y = hide(windows, 6000, np.random.default_rng(1))
    x, y = x.numpy(), y.numpy()
    asked = y >= 0
    assert (x[~asked] == windows[~asked]).all() and (y[asked] == windows[asked]).all()
    assert not asked[windows <= encoder.MASK].any()
    # 10,000 draws: a share of p has a standard deviation below 0.005; 4 of them.
    assert abs(asked.mean() - 0.2) < 0.02
    n = asked.sum()
    masked, same = (x[asked] == encoder.MASK).sum() / n, (x[asked] == windows[asked]).sum() / n
    assert abs(masked - 0.8) < 0.04 and abs(same - 0.1) < 0.03
    assert torch.equal(hide(windows, 6000, np.random.default_rng(1))[0], torch.from_numpy(x))


def test_windows_follow_from_their_number_and_miss_nothing():
    stream = np.arange(10, 10 + 63 * 6)
    recipe = Recipe(vocab=600, layers=1, width=16, heads=2, context=64, rows=2, drills=0)
    a, b = Windows(stream, recipe), Windows(stream, recipe)
    a(2), a(0)
    assert all(torch.equal(p, q) for p, q in zip(a(1), b(1), strict=True))
    originals = np.concatenate([[w[1] for w in (a._window(i) for i in range(6))]])
    assert sorted(originals) == list(stream[::63])
    assert all(a._window(i)[0] == encoder.CLS for i in range(6))


def test_first_embeddings_are_the_svd_of_who_stands_near_whom():
    rng = np.random.default_rng(0)
    stream = rng.integers(0, 20, size=400)
    counts = np.zeros((20, 20))
    for i in range(len(stream)):
        for j in range(max(0, i - 5), min(len(stream), i + 6)):
            if i != j:
                counts[stream[i], stream[j]] += 1
    q = counts.sum(0) ** 0.75 / (counts.sum(0) ** 0.75).sum()
    with np.errstate(divide="ignore"):
        M = np.maximum(np.log(counts / counts.sum(1, keepdims=True) / q), 0)
    u, s, _ = np.linalg.svd(M)
    wanted = u[:, :4] * np.sqrt(s[:4])
    wanted *= 0.08 / np.sqrt((wanted**2).mean())
    found = meanings(stream, 20, 4).double().numpy()
    # Singular vectors have no sign: products between words have. float32, and two iterations of a subspace of full size.
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-4)


def test_words_that_keep_the_same_company_begin_alike():
    # "5 1 9 ..." and "5 2 9 ...": 1 and 2 are used in the same places, 3 in others.
    rng = np.random.default_rng(0)
    stream = np.concatenate([[5, w, 9, 10] if w != 3 else [14, 3, 15, 16] for w in rng.choice([1, 2, 3], 600)])
    vectors = torch.nn.functional.normalize(meanings(stream, 20, 6, near=1), dim=1)
    assert vectors[1] @ vectors[2] > 0.9 > vectors[1] @ vectors[3] + 0.5


def test_a_killed_run_goes_on_as_if_it_had_not_been(books, tmp_path, monkeypatch):
    quiet = {"tokens": 8 * TINY.step_tokens, "every": 4, "say": lambda text: None}
    figures = pretrain_encoder(books, tmp_path / "whole", TINY, **quiet)
    assert figures["finished"] and figures["steps"] == 8 and (tmp_path / "whole" / "README.md").is_file()

    # The same tokens for both: of pairs that are equally frequent, the tokenizer's trainer takes one by chance.
    shutil.copytree(tmp_path / "whole-work", tmp_path / "killed-work", ignore=shutil.ignore_patterns("*.safetensors", "log.jsonl"))
    original, held = encoder.Windows.__call__, len(np.load(tmp_path / "whole-work" / "held.npy"))

    def dies(self, step):
        if step == 6 and len(self.stream) > held:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(encoder.Windows, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain_encoder(books, tmp_path / "killed", TINY, **quiet)
    monkeypatch.undo()
    assert not (tmp_path / "killed").exists()
    pretrain_encoder(books, tmp_path / "killed", TINY, **quiet)
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    log = [json.loads(line)["step"] for line in (tmp_path / "killed-work" / "log.jsonl").read_text().splitlines()]
    assert log == [4, 8]
    model, tokenizer = load_encoder(tmp_path / "whole", head=True)
    assert len(tokenizer) == 300 and math.isfinite(fill(model, tokenizer, "the old [MASK] went")[0][1])


def test_what_the_recipe_refuses(books, tmp_path):
    for more, words in (({"tokens": 1, "minutes": 1}, "not both"), ({"minutes": -1}, "above 0")):
        with pytest.raises(ValueError, match=words):
            pretrain_encoder(books, tmp_path / "out", TINY, **more)
    with pytest.raises(ValueError, match="drills"):
        pretrain_encoder(books, tmp_path / "out", Recipe())
    with pytest.raises(ValueError, match="no model folder"):
        pretrain_encoder(books, books, TINY)
    with pytest.raises(ValueError, match="train first"):
        pretrain_encoder(books, tmp_path / "out", TINY, train=False, say=lambda text: None)
    from lora_lab.__main__ import app

    result = CliRunner().invoke(app, ["pretrain-encoder", str(tmp_path / "nothing"), str(tmp_path / "out")])
    assert result.exit_code == 1 and "not a folder" in result.output


def test_a_bert_of_the_users_own(bert_folder):
    from transformers import BertModel

    model, tokenizer = load_encoder(bert_folder)
    theirs = BertModel.from_pretrained(bert_folder, add_pooling_layer=False).eval()
    ids = encode(tokenizer, ["A bell rang twice."], 20)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)


def test_folders_that_are_none(bert_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_encoder(tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bert_folder / name).read_bytes())
    weights = load_file(bert_folder / "model.safetensors")
    first = "bert.encoder.layer.1.attention.self.value.weight"
    for change, words in (({first: None}, "has no encoder.layer.1.attention.self.value.weight"), ({first: torch.zeros(2, 2)}, "has shape")):
        changed = {k: v.contiguous() for k, v in (weights | change).items() if v is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=words):
            load_encoder(tmp_path)
    body = {k: v for k, v in weights.items() if not k.startswith("cls")}
    save_file(body, tmp_path / "model.safetensors")
    load_encoder(tmp_path)
    with pytest.raises(ValueError, match="no head for hidden words"):
        load_encoder(tmp_path, head=True)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2'"):
        load_encoder(tmp_path)


def test_the_reader_reads_tokens_and_no_padding(pocket):
    body, tokenizer = pocket
    torch.manual_seed(0)
    ids = encode(tokenizer, ["A bell rang twice in the old house.", "Snow."], 20)
    wide = torch.nn.functional.pad(ids, (0, 7))
    classes, span = Reader(body, 3), Reader(body)
    for model in (classes, span):
        torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        # Summing in blocks of another size rounds differently: 1e-5 of numbers up to about 10.
        torch.testing.assert_close(classes(ids), classes(wide), rtol=0, atol=1e-4)
        for row in range(2):
            n = int((ids[row] != 0).sum())
            h = body(input_ids=ids[row : row + 1, :n]).last_hidden_state[0]
            torch.testing.assert_close(classes(ids)[row], h.mean(0) @ classes.head.weight.T + classes.head.bias, rtol=0, atol=1e-4)
        scores = span(ids)
    assert scores.shape == (*ids.shape, 2)
    assert torch.equal(scores[..., 0].isinf(), ids == 0)
    assert count_parameters(Reader(body, 3).head.requires_grad_(True)).trainable == 3 * 128 + 3


def test_a_pair_has_two_kinds_of_tokens(pocket):
    body, tokenizer = pocket
    batch = tokenizer(["who rang?"], ["anna rang a bell."], return_tensors="pt")
    assert torch.equal(Reader._second(batch["input_ids"]), batch["token_type_ids"])
