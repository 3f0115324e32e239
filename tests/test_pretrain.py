"""The recipe of the pocket GPT-2, on models of a few thousand parameters: what a run leaves, and that it is the same after a kill."""

import gzip
import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("transformers")

from lora_lab import corpus as corpus_module  # noqa: E402
from lora_lab import model_card, pretrain  # noqa: E402
from lora_lab.corpus import END, encode, excerpt, load_corpus, prepare, read_documents, yardsticks  # noqa: E402
from lora_lab.drills import Drills  # noqa: E402
from lora_lab.pretrain import Batches, Recipe, bits_per_byte, build_model, build_optimizers, copy_losses, lr_factor, parameter_count  # noqa: E402

TINY = Recipe(vocab=300, layers=1, width=16, heads=2, context=64, rows=2, drills=1, warmup=3, hold_out=4)
STEPS = 12
TOKENS = STEPS * TINY.step_tokens


def story(seed):
    """Sentences with names, numbers and a few bytes beyond ASCII."""
    draw = random.Random(seed)
    people, things, places = ["Anna", "Mr. Brown", "Captain Löwe", "Tom"], ["dog", "red ball", "café", "letter"], ["London", "the Alps", "Kent"]
    lines = []
    for _ in range(60):
        who, what, where = draw.choice(people), draw.choice(things), draw.choice(places)
        lines.append(f"One day {who} quietly carried the {what} to {where}, and {draw.choice(people)} was very {draw.choice(['glad', 'angry'])}.")
        lines.append(f'"Where is {who}?" asked {draw.choice(people)}. “In {where} — since {draw.randint(2, 30)} days!”')
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    (folder / "a.txt").write_text(f"{END}\n".join(story(i) for i in range(6)), encoding="utf-8")
    (folder / "b.txt.xz").write_bytes(lzma.compress(story(6).encode()))
    (folder / "notes.md").write_text("not a book")
    return folder


@pytest.fixture(scope="module")
def corpus(books, tmp_path_factory):
    return prepare(books, tmp_path_factory.mktemp("work"), TINY.vocab, TINY.hold_out, context=TINY.context, say=lambda line: None)


@pytest.fixture(scope="module")
def straight(books, tmp_path_factory):
    """A run of STEPS steps that nobody disturbed: its folders and its figures."""
    folder = tmp_path_factory.mktemp("straight")
    figures = pretrain.pretrain(books, folder / "model", TINY, tokens=TOKENS, every=4, say=lambda line: None)
    return SimpleNamespace(out=folder / "model", work=folder / "model-work", figures=figures)


@pytest.fixture
def model(corpus):
    return build_model(TINY, corpus.end).eval()


def quiet(*arguments, **options):
    return pretrain.pretrain(*arguments, say=lambda line: None, **options)


def same_tensors(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys() and len(one) > 10
    return all(torch.equal(one[key], other[key]) for key in one)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_documents_come_in_order_and_are_separated(books):
    documents = list(read_documents(books))
    assert [name for name, _ in documents] == [f"a.txt#{i}" for i in range(6)] + ["b.txt.xz"]
    assert [text for _, text in documents] == [story(i) for i in range(7)]


def test_a_limit_takes_whole_documents_from_the_beginning(books):
    size = len(story(0).encode()) + len(END) + 1 + len(story(1).encode())
    assert len(list(read_documents(books, size / 1e6))) == 2
    assert len(list(read_documents(books, (size - 1) / 1e6))) == 1


def test_held_out_documents_are_whole_and_not_trained_on(corpus):
    assert corpus.held_documents == ["a.txt#2", "b.txt.xz"]
    assert corpus.tokenizer.decode(corpus.held.tolist()) == story(2) + "\n" + story(6) + "\n"
    train = corpus.tokenizer.decode(corpus.train.tolist())
    assert train == "".join(story(i) + "\n" for i in (0, 1, 3, 4, 5))
    assert (corpus.train == corpus.end).sum() == 5


def test_bytes_of_tokens_add_up_to_the_text(corpus):
    text = "Löwe: 3½ “cafés”…\n\n\U0001f600 " + story(9)
    assert corpus.bytes_of()[encode(corpus.tokenizer, [text])].sum() == len(text.encode()) + 1  # each document ends with an empty line


def test_prepared_text_is_kept_until_something_changes(books, tmp_path):
    said = []
    first = prepare(books, tmp_path, 300, 4, context=64, say=said.append)
    again = prepare(books, tmp_path, 300, 4, context=64, say=said.append)
    assert len(said) == 1 and again.fingerprint == first.fingerprint and np.array_equal(again.train, first.train)
    other = prepare(books, tmp_path, 310, 4, context=64, say=said.append)
    assert len(said) == 2 and other.fingerprint != first.fingerprint and other.tokenizer.get_vocab_size() == 310


def test_a_preparation_that_was_killed_counts_for_nothing(books, tmp_path, monkeypatch):
    class Kill(BaseException):
        pass

    def killed(*arguments, **options):
        raise Kill

    monkeypatch.setattr(corpus_module.np, "save", killed)
    with pytest.raises(Kill):
        prepare(books, tmp_path, 300, 4, context=64, say=lambda line: None)
    assert not (tmp_path / "corpus.json").exists() and not list(tmp_path.glob("*.npy"))


# ---- batches and drills ---------------------------------------------------------------------------------------------


def test_each_window_comes_once_in_each_pass(corpus):
    batches = Batches(corpus, replace(TINY, drills=0))
    passes = []
    for epoch in range(2):
        windows = {i: batches._window(i) for i in range(epoch * batches.windows, (epoch + 1) * batches.windows)}
        assert all(np.array_equal(x[1:], y[:-1]) for x, y in windows.values())
        assert all(windows[i][0][0] == corpus.end for i in windows if i % 8 == 0)
        # Behind <|endoftext|> a window's own tokens are what is to be guessed.
        passes.append([tuple((x if i % 8 else y).tolist()) for i, (x, y) in windows.items()])
    n = batches.windows * TINY.context
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(map(tuple, corpus.train[:n].reshape(-1, TINY.context).tolist()))
    assert passes[0] != passes[1]


def test_a_batch_follows_from_seed_and_step_alone(corpus):
    one, other = Batches(corpus, TINY), Batches(corpus, TINY)
    for step in (5, 0, 300, 7):
        other(step + 1)
        assert all(torch.equal(a, b) for a, b in zip(one(step), other(step), strict=True))
    assert not torch.equal(one(0)[0], Batches(corpus, replace(TINY, seed=1))(0)[0])
    x, y = one(0)
    assert x.shape == y.shape == (3, TINY.context)
    assert len({tuple(one(step)[0][-1].tolist()) for step in range(6)}) == 6  # every step has drills of its own


@pytest.fixture
def drills(corpus):
    return Drills(
        corpus.train, lambda text: corpus.tokenizer.encode(text).ids, lambda ids: corpus.tokenizer.decode(ids), corpus.end, 256
    )


@pytest.mark.parametrize("kind", ["repeat", "facts", "recall"])
def test_rows_have_the_length_of_a_window(drills, kind):
    for seed in range(30):
        tokens, counted = getattr(drills, kind)(np.random.default_rng(seed))
        assert len(tokens) == len(counted) == 257 and set(counted) <= {0, 1} and sum(counted) > 0
        assert tokens[0] != drills.end  # else that token would say "a drill" to the model


def test_a_repeated_passage_stands_there_twice(drills):
    """The longest piece that comes twice without overlapping itself, found by brute force, is as long as the shortest span."""
    for seed in range(20):
        tokens, counted = drills.repeat(np.random.default_rng(seed))
        longest = max(
            n for n in range(1, 60) for i in range(0, len(tokens) - n, 1)
            if any(tokens[i : i + n] == tokens[j : j + n] for j in range(i + n, len(tokens) - n + 1))
        ) if seed < 4 else 6  # fmt: skip
        assert longest >= 6
        if 0 in counted:  # random tokens count only from their second time on
            first = counted.index(1)
            assert tokens[first] in tokens[:first]


def test_facts_are_words_of_the_sentence_that_follows(drills, corpus):
    seen = 0
    for seed in range(20):
        tokens, counted = drills.facts(np.random.default_rng(seed))
        edges = [i for i in range(1, 257) if counted[i] != counted[i - 1]]  # the last sentence may be cut off: left out
        for start, middle, end in zip(edges[1::2], edges[2::2], edges[3::2], strict=False):  # a list, then its sentence
            head, body = (corpus.tokenizer.decode(tokens[a:b]) for a, b in ((start, middle), (middle, end)))
            separators = (" : ", ": ", " = ", " - ")
            colon = next(c for c in separators if c in head)
            for value in head.split(colon)[1:]:
                # A value runs up to the next separator; its first word is enough.
                word = value.strip().split()[0].strip("|;,-\n>")
                assert word in body, (head, body)
                seen += 1
    assert seen > 50


def test_recall_asks_only_for_what_was_listed(drills, corpus):
    for seed in range(20):
        tokens, counted = drills.recall(np.random.default_rng(seed))
        asked = counted.index(1)
        head = corpus.tokenizer.decode(tokens[:asked])
        until = next((i for i in range(asked, 257) if not counted[i]), 257)
        words = corpus.tokenizer.decode(tokens[asked:until]).replace(",", " ").replace("|", " ").replace(";", " ").split()
        assert words and words[0] in head


def test_a_text_without_sentences_still_gives_rows(corpus):
    encode_, decode = (lambda text: corpus.tokenizer.encode(text).ids), (lambda ids: corpus.tokenizer.decode(ids))
    drills = Drills(np.full(900, 70, dtype=np.uint16), encode_, decode, corpus.end, 64)
    for seed in range(12):
        assert len(drills.row(np.random.default_rng(seed))[0]) == 65


# ---- model, optimizers, learning rate -------------------------------------------------------------------------------


def test_parameters_are_counted_without_building_the_model(model):
    assert parameter_count(TINY) == sum(p.numel() for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_every_parameter_has_one_optimizer_and_matrices_have_muon(model):
    muon, adam = build_optimizers(model, TINY)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adam, torch.optim.AdamW)
    groups = [{id(p) for p in group["params"]} for optimizer in (muon, adam) for group in optimizer.param_groups]
    assert sum(map(len, groups)) == len(set().union(*groups)) and set().union(*groups) == {id(p) for p in model.parameters()}
    assert groups[0] == {id(p) for name, p in model.named_parameters() if ".h." in name and name.endswith("weight") and "ln" not in name}
    assert groups[2] == {id(model.transformer.wpe.weight)}
    assert [group["peak"] for optimizer in (muon, adam) for group in optimizer.param_groups] == [TINY.lr, TINY.embedding_lr, TINY.position_lr]


def test_positions_start_where_one_step_is_one_rotation():
    """From any position to the next by the same linear map: "the token before" can be learned for all positions at once."""
    found = pretrain.waves(64, 16).double().numpy()
    step, *_ = np.linalg.lstsq(found[:-1], found[1:], rcond=None)
    assert np.abs(found[:-1] @ step - found[1:]).max() < 1e-5  # float32 angles up to 64
    norms = np.linalg.norm(found, axis=1)
    assert norms == pytest.approx(0.13 * math.sqrt(8), rel=1e-5)  # sin^2 + cos^2 = 1, eight times
    distances = np.linalg.norm(found[:, None] - found[None], axis=-1) + 9 * np.eye(64)
    assert (distances.argmin(1) - np.arange(64)).tolist().count(0) == 0 and np.abs(distances.argmin(1) - np.arange(64)).max() == 1
    assert pretrain.waves(64, 15).shape == (64, 15)


def test_learning_rate_rises_stays_and_falls():
    recipe = replace(TINY, warmup=10, decay=0.25)
    factors = [lr_factor(step, recipe, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10:76] == [1.0] * 66
    assert factors[76:] == pytest.approx([(100 - i) / 25 for i in range(76, 100)])
    assert [lr_factor(step, recipe, None) for step in range(100)] == factors[:76] + [1.0] * 24  # no end known: no decay


# ---- measures -------------------------------------------------------------------------------------------------------


def test_bits_per_byte_against_the_models_own_loss(model, corpus, monkeypatch):
    monkeypatch.setattr(pretrain, "fast_in_bf16", lambda device: False)
    documents = excerpt(corpus.held, corpus.end, 300)
    found = bits_per_byte(model, documents, corpus.bytes_of(), TINY.context, rows=3)
    assert found.shape == (2, 2)
    for document, (bits, size) in zip(documents, found, strict=True):
        nats = 0.0
        for start in range(0, 299, TINY.context):
            window = torch.tensor(document[start : start + TINY.context + 1].astype(int))[None]
            logits = model.double()(input_ids=window[:, :-1]).logits[0].detach().log_softmax(-1)
            nats -= sum(float(logits[i, token]) for i, token in enumerate(window[0, 1:]))
        model.float()
        assert bits == pytest.approx(nats / math.log(2), rel=1e-5)  # float32 sums of 300 terms
        assert size == len(corpus.tokenizer.decode(document.tolist()).encode())


def test_an_excerpt_cuts_every_document(corpus):
    parts = excerpt(corpus.held, corpus.end, 50)
    assert [len(p) for p in parts] == [50, 50] and all(p[0] == corpus.end for p in parts)


class Copier(nn.Module):
    """Knows nothing, but after a token that it has seen before (with the same one in front) expects what followed then."""

    def __init__(self, vocab):
        super().__init__()
        self.config, self.anchor, self.lm_head = SimpleNamespace(vocab_size=vocab), nn.Parameter(torch.zeros(1)), nn.Identity()

    def transformer(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for i in range(2, len(ids)):
                for j in range(i - 1, 1, -1):
                    if ids[j - 1 : j + 1] == ids[i - 1 : i + 1]:
                        logits[row, i, ids[j + 1]] = 30.0
                        break
        return SimpleNamespace(last_hidden_state=logits)


def test_copying_is_seen_by_its_measure(monkeypatch):
    monkeypatch.setattr(pretrain, "fast_in_bf16", lambda device: False)
    tokens = np.random.default_rng(0).integers(1, 5000, 4000).astype(np.uint16)
    for random_tokens in (False, True):
        first, again = copy_losses(Copier(5000), tokens, 64, 0, random_tokens, rows=8)
        # Of a span's 12 tokens, the first two come before there is a pair to recognise.
        assert first == pytest.approx(math.log(5000), abs=0.3) and again == pytest.approx(2 / 12 * math.log(5000), abs=0.3)


def test_an_untrained_model_copies_nothing(model, corpus):
    first, again = copy_losses(model, corpus.held, TINY.context, corpus.end, random=True)
    assert first == pytest.approx(math.log(300), rel=0.05) and again == pytest.approx(first, rel=0.05)  # near-uniform at initialization


def test_yardsticks_against_counting_by_hand():
    rng = np.random.default_rng(3)
    train, held = rng.integers(0, 6, 60).astype(np.uint16), rng.integers(0, 7, 25).astype(np.uint16)  # 6 never occurs in training
    bytes_of = np.array([0, 1, 2, 3, 1, 2, 5])
    text = b"some bytes, some bytes" * 9
    pairs = list(zip(train.tolist()[:-1], train.tolist()[1:], strict=True))

    def unigram(b):
        return (train.tolist().count(b) + 1) / (60 + 7)

    def bigram(a, b):
        after = [y for x, y in pairs if x == a]
        if not after:
            return unigram(b)
        return max(after.count(b) - 0.75, 0) / len(after) + 0.75 * len(set(after)) / len(after) * unigram(b)

    for a in range(7):
        assert sum(bigram(a, b) for b in range(7)) == pytest.approx(1)
    size = sum(bytes_of[held[1:]])
    found = yardsticks(train, [held], bytes_of, text)
    assert found["unigram"] == pytest.approx(-sum(math.log2(unigram(b)) for b in held.tolist()[1:]) / size)
    assert found["bigram"] == pytest.approx(-sum(math.log2(bigram(a, b)) for a, b in zip(held.tolist(), held.tolist()[1:], strict=False)) / size)
    assert found["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert lzma.decompress(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) == text and 0 < found["xz"] < 8


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_says_so(straight):
    log = [json.loads(line) for line in (straight.work / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [4, 8, 12] and [line["tokens"] for line in log] == [4 * 192, 8 * 192, 12 * 192]
    assert log[-1]["loss"] < log[0]["loss"]
    assert straight.figures["steps"] == STEPS and straight.figures["finished"]
    # Below tokens drawn evenly, which is where an untrained model stands.
    assert straight.figures["bits_per_byte"] < math.log2(300) / straight.figures["bytes_per_token"]


def test_one_seed_one_result(straight, books, tmp_path):
    quiet(books, tmp_path / "model", TINY, tokens=TOKENS, every=5)  # checkpoints elsewhere change nothing
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (straight.out / "model.safetensors").read_bytes()
    assert same_tensors(tmp_path / "model-work" / "checkpoint.safetensors", straight.work / "checkpoint.safetensors")


def test_a_killed_run_goes_on_bit_for_bit(straight, books, tmp_path):
    """kill -9 while step after step is being saved; then the same call again."""
    code = f"""
import torch; torch.set_num_threads(1)
from lora_lab import pretrain
from tests_recipe import TINY
pretrain.pretrain({str(books)!r}, {str(tmp_path / "model")!r}, TINY, tokens={TOKENS}, every=1)
"""
    (tmp_path / "tests_recipe.py").write_text(f"from lora_lab.pretrain import Recipe\nTINY = {TINY!r}\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / "model-work" / "log.jsonl"
    until = time.monotonic() + 240
    while not (log.is_file() and log.read_text().count("\n") >= 4) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()
    step = pretrain.read_header(tmp_path / "model-work" / "checkpoint.safetensors")["progress"].step
    assert 3 <= step < STEPS and not (tmp_path / "model").exists()
    quiet(books, tmp_path / "model", TINY, tokens=TOKENS, every=4)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (straight.out / "model.safetensors").read_bytes()
    assert same_tensors(tmp_path / "model-work" / "checkpoint.safetensors", straight.work / "checkpoint.safetensors")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


def test_a_longer_budget_goes_on_from_before_the_decay(straight, books, tmp_path):
    """6 steps, finished, then 12: the same as 12 from the start, because the lr had not begun to fall where the second run takes over."""
    quiet(books, tmp_path / "model", TINY, tokens=TOKENS / 2)
    assert pretrain.read_header(tmp_path / "model-work" / "stable.safetensors")["progress"].step == 4
    quiet(books, tmp_path / "model", TINY, tokens=TOKENS)
    assert same_tensors(tmp_path / "model-work" / "checkpoint.safetensors", straight.work / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="is at step 12 already"):
        quiet(books, tmp_path / "model", TINY, tokens=TOKENS / 2)


def test_minutes_decide_the_end(books, tmp_path):
    figures = quiet(books, tmp_path / "model", TINY, minutes=2 / 60)
    progress = pretrain.read_header(tmp_path / "model-work" / "checkpoint.safetensors")["progress"]
    assert progress.total == progress.step == figures["steps"] > 1 and figures["finished"]
    stable = pretrain.read_header(tmp_path / "model-work" / "stable.safetensors")["progress"]
    # From the moment of the decision on, a quarter of all steps is left: rounded to whole steps.
    assert abs(progress.total - pretrain.decay_steps(TINY, progress.total) - stable.step) <= 1 and stable.seconds >= 1.5


@pytest.mark.slow
def test_workers_share_a_step(straight, books, tmp_path):
    quiet(books, tmp_path / "model", TINY, tokens=TOKENS, workers=2)
    one, two = (load_file(folder / "checkpoint.safetensors") for folder in (straight.work, tmp_path / "model-work"))
    moved = build_model(TINY).state_dict()
    for key in (k for k in one if k.startswith("parameter/")):
        step = (one[key] - moved[key.removeprefix("parameter/")]).norm()
        # bf16 products of other rows, in another order; Adam divides small gradients by themselves. Another seed differs by more than 100 %.
        assert (one[key] - two[key]).norm() < 0.1 * step, key


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_end_with_the_one_that_started_them(books, tmp_path):
    """Else they would go on writing where the next call begins again."""
    # As under nohup, or behind an & in a script: the SIGINT with which torch ends its processes is ignored.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); from lora_lab.__main__ import main; sys.argv[0] = 'lora-lab'; main()"
    sizes = ["--vocab", "300", "--layers", "1", "--width", "16", "--heads", "2", "--context", "64", "--rows", "2", "--drills", "1", "--hold-out", "4"]
    command = [sys.executable, "-c", code, "pretrain", str(books), str(tmp_path / "model"), "--workers", "2", "--tokens", "1e8", "--every", "1", *sizes]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "model-work" / "log.jsonl"
    until = time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("\n") >= 2) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    children = [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if parent_of(stat) == process.pid]
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    process.kill()
    process.wait()
    assert len(workers) == 2
    until = time.monotonic() + 60
    while (alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert alive == []


def parent_of(stat):
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # ended meanwhile
        return None


def test_two_runs_do_not_share_a_work_folder(straight, books, tmp_path):
    """The second one comes while the first trains, from another process, as somebody who took the first for dead would start it."""
    code = f"""
from pathlib import Path
from lora_lab.pretrain import alone_in
with alone_in(Path({str(tmp_path / "work")!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run is at work"):
            pretrain.pretrain(books, tmp_path / "out", TINY, work=tmp_path / "work", tokens=TOKENS, say=lambda text: None)
        assert not (tmp_path / "out").exists()
        other.kill()  # a kill leaves no lock behind
    pretrain.pretrain(books, tmp_path / "out", TINY, work=tmp_path / "work", tokens=TOKENS, say=lambda text: None)
    assert (tmp_path / "out" / "config.json").exists()


def test_an_unfinished_run_can_be_exported_and_says_what_it_is(straight, books, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for path in straight.work.iterdir():
        (work / path.name).write_bytes(path.read_bytes())
    (work / "checkpoint.safetensors").write_bytes((work / "stable.safetensors").read_bytes())
    figures = quiet(books, tmp_path / "model", TINY, work=work, train=False)
    assert not figures["finished"] and figures["steps"] == 9
    assert "**Unfinished**" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "**Unfinished**" not in (straight.out / "README.md").read_text(encoding="utf-8")


# ---- the exported folder --------------------------------------------------------------------------------------------


def test_others_can_open_the_folder(straight):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_lab.gpt2 import load_gpt2

    trained = load_file(straight.work / "checkpoint.safetensors")
    for load in (load_gpt2, lambda f: (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32), AutoTokenizer.from_pretrained(f))):
        model, tokenizer = load(straight.out)
        assert model.config.n_positions == TINY.context and model.config.use_cache
        for name, parameter in model.named_parameters():
            # fp16 keeps 11 bits; below 2^-14 it keeps absolute steps of 2^-24.
            torch.testing.assert_close(parameter, trained[f"parameter/{name}"], rtol=2**-11, atol=2**-25)
        text = "“Anna” was glad — 3½ cafés.\n\n"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert tokenizer.convert_tokens_to_ids(END) == tokenizer.eos_token_id == model.config.eos_token_id
    assert {t.dtype for t in load_file(straight.out / "model.safetensors").values()} == {torch.float16}
    assert "lm_head.weight" not in load_file(straight.out / "model.safetensors")


def test_the_card_states_what_was_measured(straight):
    text, figures = (straight.out / "README.md").read_text(encoding="utf-8"), straight.figures
    for number in (f"{figures['bits_per_byte']:.2f}", f"{figures['yardsticks']['bigram']:.2f}", f"{figures['copy']['random'][1]:.2f}", "a.txt#2", "seed 0"):
        assert number in text
    assert all(prompt in text for prompt, _ in figures["samples"])
    assert abs(figures["fp16_bits"]) < 0.01
    assert figures["megabytes"] * 1e6 == pytest.approx(sum(p.stat().st_size for p in straight.out.iterdir() if p.name != "README.md"))


def test_an_export_that_fails_leaves_what_was_there(straight, books, tmp_path, monkeypatch):
    before = {p.name: p.read_bytes() for p in straight.out.iterdir()}

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(model_card, "card", full)
    with pytest.raises(OSError, match="No space left"):
        quiet(books, straight.out, TINY, tokens=TOKENS)
    assert {p.name: p.read_bytes() for p in straight.out.iterdir()} == before
    assert sorted(p.name for p in straight.out.parent.iterdir()) == ["model", "model-work"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    (tmp_path / "new.part").mkdir()
    replace_, calls = os.replace, []

    def fails_for_the_new_one(source, target):
        calls.append(Path(source).name)
        if Path(source).name == "new.part":
            raise PermissionError("in use")
        replace_(source, target)

    monkeypatch.setattr(model_card.os, "replace", fails_for_the_new_one)
    with pytest.raises(PermissionError):
        model_card.put_in_place(tmp_path / "new.part", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "old" and "new.part" in calls
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "new.part"]


def test_weights_too_large_for_fp16_are_not_exported(model, corpus, tmp_path):
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e5
    with pytest.raises(RuntimeError, match="fp16"):
        model_card.export(model, corpus.tokenizer, TINY, {}, tmp_path / "out", lambda m: m.transformer.h[0].mlp.c_fc.weight.sum().item())
    assert list(tmp_path.iterdir()) == []


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        quiet(tmp_path / "nowhere", tmp_path / "out", TINY)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no .txt and no .txt.xz file: it is empty"):
        quiet(empty, tmp_path / "out", TINY)
    (empty / "song.mp3").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="found song.mp3"):
        quiet(empty, tmp_path / "out", TINY)
    (empty / "latin.txt").write_bytes("Löwe".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt can't be read as UTF-8"):
        quiet(empty, tmp_path / "out", TINY)
    (empty / "latin.txt").write_text(story(0), encoding="utf-8")
    with pytest.raises(ValueError, match="1 document.*can't be split.*lower hold_out"):
        quiet(empty, tmp_path / "out", TINY)
    (empty / "half.txt.xz").write_bytes(lzma.compress(b"text")[:-9])
    with pytest.raises(ValueError, match="half.txt.xz can't be read"):
        quiet(empty, tmp_path / "out", TINY)


def test_too_little_text_is_said(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("A short text.\n")
    with pytest.raises(ValueError, match="too little text for 300 tokens: byte pairs ran out at"):
        quiet(tmp_path, tmp_path / "out", TINY)
    with pytest.raises(ValueError, match="too little text: .* train tokens, and a context of 64 needs 256"):
        quiet(tmp_path, tmp_path / "out", replace(TINY, vocab=258))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"vocab": 100}, "vocab must be at least 258; found 100"), ({"heads": 3}, "multiple of heads"), ({"decay": 1.5}, "decay"),
     ({"vocab": 70000}, "two bytes"), ({"hold_out": 1}, "hold_out must be at least 2")],
)  # fmt: skip
def test_recipes_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tokens": 1e4, "minutes": 1}, "not both"), ({"tokens": 0}, "tokens must be a number above 0"), ({"minutes": math.nan}, "minutes must be"),
     ({"workers": 5}, "nothing to share"), ({"train": False}, "to export: train first")],
)  # fmt: skip
def test_calls_that_make_no_sense(books, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        quiet(books, tmp_path / "out", TINY, **options)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_run_is_refused(straight, books, tmp_path):
    with pytest.raises(ValueError, match="belongs to another run: lr was 0.004, now 0.001; seed was 0, now 3"):
        quiet(books, tmp_path / "out", replace(TINY, lr=1e-3, seed=3), work=straight.work, tokens=TOKENS)
    model = build_model(TINY)
    with pytest.raises(ValueError, match="the text is another one"):
        pretrain.load_checkpoint(straight.work / "checkpoint.safetensors", model, build_optimizers(model, TINY), TINY, "other")


def test_a_damaged_checkpoint_is_refused(straight, books, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes((straight.work / "checkpoint.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole pre-training checkpoint.*Delete it"):
        quiet(books, tmp_path / "out", TINY, work=tmp_path, tokens=TOKENS)


def test_nothing_is_written_over_other_things(books, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(ValueError, match="nothing is written over it"):
        quiet(books, tmp_path / "thesis", TINY)
    with pytest.raises(ValueError, match="can't be both"):
        quiet(books, tmp_path / "model", TINY, work=tmp_path / "model")


def test_a_full_disk_is_noticed_before_the_work(books, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="0 MB free"):
        quiet(books, tmp_path / "out", TINY)


def test_a_loss_that_is_no_number_stops_the_run(books, tmp_path):
    with pytest.raises(RuntimeError, match="lower lr"):
        quiet(books, tmp_path / "out", replace(TINY, lr=1e30, warmup=0), tokens=TOKENS)
    assert not (tmp_path / "out").exists()


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command(books, tmp_path):
    from lora_lab.__main__ import app

    sizes = ["--vocab", "300", "--layers", "1", "--width", "16", "--heads", "2", "--context", "64", "--rows", "2", "--drills", "1", "--hold-out", "4"]
    result = CliRunner().invoke(app, ["pretrain", str(books), str(tmp_path / "model"), "--tokens", "600", *sizes])
    assert result.exit_code == 0, result.output
    assert "bits per byte" in result.output and (tmp_path / "model" / "config.json").is_file()
    failed = CliRunner().invoke(app, ["pretrain", str(tmp_path / "nothing"), str(tmp_path / "model")])
    assert failed.exit_code == 1 and "is not a folder" in failed.output and "Traceback" not in failed.output
    assert "once through the text" in " ".join(CliRunner().invoke(app, ["pretrain", "--help"], env={"COLUMNS": "200"}).output.split())


def test_workers_read_what_prepare_left(corpus, books, tmp_path):
    prepared = prepare(books, tmp_path, TINY.vocab, TINY.hold_out, context=TINY.context, say=lambda line: None)
    read = load_corpus(tmp_path)
    assert np.array_equal(read.train, prepared.train) and read.held_documents == prepared.held_documents and read.end == prepared.end
