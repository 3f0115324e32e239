"""GPT-2 through one door: where its files come from, what happens when they are not right, and the text it makes."""

import errno
import hashlib
import http.server
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lora_lab import FetchError, apply_lora, gpt2_files, lora_layers, train
from lora_lab.data import Batches, sherlock_holmes
from lora_lab.gpt2 import (
    fill_models_folder,
    generate,
    gpt2_folder,
    load_gpt2,
    next_token_loss,
    show_stream,
    stream,
    text_loss,
    token_blocks,
)

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "the old man opened the door and the cat went out into the rain "
LOCAL_DATA = os.environ.get("LORA_LAB_DATA")


def make_tokenizer(folder, size=400):
    """A byte-level BPE like GPT-2's, learned from one sentence; <|endoftext|> is token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def make_model(folder, seed=0, **changes):
    """A tiny GPT-2 of random weights, written by transformers itself; weights large enough that no two tokens are nearly as likely."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    config = GPT2Config(vocab_size=make_tokenizer(folder), bos_token_id=0, eos_token_id=0, **settings | changes)
    torch.manual_seed(seed)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pair(tiny):
    return load_gpt2(tiny)


@pytest.fixture
def copy(tiny, tmp_path):
    """The tiny model in a folder that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def theirs(folder, **options):
    """transformers' own way to load a folder: the oracle."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, local_files_only=True, **options).eval()


def change_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))


# ---- a folder -------------------------------------------------------------------------------------------------------


def test_a_folder_gives_transformers_model(tiny, pair):
    model, tokenizer = pair
    ids = torch.tensor([tokenizer(SENTENCE)["input_ids"]])
    assert torch.equal(model(ids).logits, theirs(tiny)(ids).logits)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight  # tied, so counted once and trained together


def test_a_head_of_its_own_is_read(tmp_path):
    folder = make_model(tmp_path / "untied", tie_word_embeddings=False)
    model, ids = load_gpt2(folder)[0], torch.arange(1, 30)[None]
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert torch.equal(model(ids).logits, theirs(folder)(ids).logits)


def test_a_model_saved_without_its_cache_generates_with_it(copy):
    change_config(copy, use_cache=False)
    assert load_gpt2(copy)[0](torch.ones(1, 5, dtype=torch.int64)).past_key_values is not None


def test_openais_names_are_read_too(tiny, copy, pair):
    """The hub's files have the body's names without "transformer.", and the causal mask as a buffer."""
    from safetensors.torch import load_file, save_file

    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tiny / "model.safetensors").items()}
    assert "wte.weight" in tensors
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    save_file(tensors | masks, copy / "model.safetensors")
    ids = torch.arange(1, 30)[None]
    assert torch.equal(load_gpt2(copy)[0](ids).logits, pair[0](ids).logits)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_have_the_dtype_asked_for(tiny, copy, stored):
    theirs(tiny).to(stored).save_pretrained(copy)
    model = load_gpt2(copy)[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, p in theirs(tiny).named_parameters():
        assert torch.equal(model.get_parameter(name), p.to(stored).float())  # rounded once, when it was stored
    half = load_gpt2(copy, dtype=torch.bfloat16)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_training_leaves_the_file_alone(copy):
    before = (copy / "model.safetensors").read_bytes()
    model, tokenizer = load_gpt2(copy)
    rows = token_blocks(tokenizer, SENTENCE * 20, 16)
    first = next_token_loss(model, (rows, rows)).item()
    for _ in train(model, Batches(rows, rows, 8), steps=20, lr=1e-2, loss=next_token_loss, device="cpu"):
        pass
    assert next_token_loss(model, (rows, rows)).item() < first / 2  # it did train
    assert (copy / "model.safetensors").read_bytes() == before


def test_padding_adds_no_token(pair):
    model, tokenizer = pair
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    batch = tokenizer(["the cat", "the old man opened the door"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()  # pads stand on the left


def test_the_tokenizer_is_transformers_own(tiny, pair):
    from transformers import AutoTokenizer

    text = "the cat é€😀\n\n  went<|endoftext|>out\x00"
    assert pair[1](text)["input_ids"] == AutoTokenizer.from_pretrained(tiny, local_files_only=True)(text)["input_ids"]
    assert pair[1].decode(pair[1](text)["input_ids"]) == text


def spoil_shape(folder):
    change_config(folder, n_embd=64)


def spoil_depth(folder):
    change_config(folder, n_layer=3)


def spoil_depth_less(folder):
    change_config(folder, n_layer=1)


def spoil_weights_cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_weights_header(folder):
    (folder / "model.safetensors").write_bytes(b"<html>please log in</html>")


def spoil_config_cut(folder):
    path = folder / "config.json"
    path.write_text(path.read_text()[:-20])


def spoil_config_list(folder):
    (folder / "config.json").write_text("[]")


def spoil_kind(folder):
    change_config(folder, model_type="llama")


def spoil_tokenizer_cut(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:-20])


def spoil_tokenizer_other(folder):
    make_tokenizer(folder, size=265)
    change_config(folder, eos_token_id=300)


def spoil_missing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_shape, ["another size", "transformer.wte.weight is (", "more"]),
        (spoil_depth, ["transformer.h.2", "is missing"]),
        (spoil_depth_less, ["transformer.h.1", "is too many"]),
        (spoil_weights_cut, ["model.safetensors", "copied in part"]),
        (spoil_weights_header, ["model.safetensors", "not a whole safetensors file"]),
        (spoil_config_cut, ["config.json", "copied in part"]),
        (spoil_config_list, ["config.json", "not a model's config"]),
        (spoil_kind, ["'llama'", "AutoModel"]),
        (spoil_tokenizer_cut, ["tokenizer.json", "copied in part"]),
        (spoil_tokenizer_other, ["tokenizer.json", "another model"]),
        (spoil_missing, ["lacks tokenizer.json, model.safetensors"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoiled_folder_is_named(copy, spoil, words):
    spoil(copy)
    with pytest.raises(ValueError) as caught:
        load_gpt2(copy)
    for word in [str(copy), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "near"),
    [("gpt-2", "'gpt2'"), ("GPT2-medium", "'gpt2-medium'"), ("pockt", "'pocket'"), ("gpt2xl", "'gpt2-xl'"), ("./nowhere", "a folder")],
)
def test_an_unknown_name_suggests_near_ones(asked, near):
    with pytest.raises(ValueError) as caught:
        load_gpt2(asked)
    assert repr(asked) in str(caught.value) and near in str(caught.value)


def test_a_path_is_a_folder_whatever_it_is_called(tiny, tmp_path, monkeypatch, pair):
    shutil.copytree(tiny, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    for name in (Path("gpt2"), "./gpt2", str(tmp_path / "gpt2")):
        assert same_as(pair, load_gpt2(name)[0])


def test_without_transformers_the_message_says_what_to_install(tiny, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(ImportError, match=r'transformers.*pip install "lora-lab\[lab\]"'):
        load_gpt2(tiny)


def test_importing_it_imports_nothing_heavy():
    code = "import sys, lora_lab.gpt2; print({'transformers', 'tokenizers', 'huggingface_hub', 'requests'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the hub, played by a server of our own -------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """Speaks the hub's part of the conversation for one repository: /owner/name/resolve/revision/file, sizes, ETags, commits.

    trouble: file -> list of answers to give first, each a status, "cut", "login", or bytes to send instead of the file's.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder, self.trouble, self.asked, self.headers = folder, {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub = self.server
        *_, revision, file = self.path.split("/")
        hub.asked.append((self.command, self.path))
        content = (hub.folder / file).read_bytes() if (hub.folder / file).exists() else None
        trouble = hub.trouble.get(file, [])
        # A trouble that concerns the content comes with GET, one that concerns the door with the first question.
        now = trouble[0] if trouble and (body or isinstance(trouble[0], int) or trouble[0] == "login") else None
        if now is not None and len(trouble) > 1:
            trouble.pop(0)
        if now is None and content is None:
            now = 404
        if isinstance(now, int) and now != 200:
            self.send_response(now)
            for name, value in hub.headers.items():
                self.send_header(name, value)
            if now == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        sent = b"<html>please log in</html>" if now == "login" else now if isinstance(now, bytes) else content
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(sent) - 1}/{len(sent)}")
        if now != "login":
            self.send_header("X-Repo-Commit", revision)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(sent) - start))
        self.end_headers()
        if body and now == "cut":
            self.wfile.write(sent[start : start + (len(sent) - start) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(sent[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    """Our server instead of the hub, the tiny model instead of GPT-2, a cache of the test's own, no pauses."""
    pytest.importorskip("huggingface_hub")
    server = Hub(shutil.copytree(tiny, tmp_path / "hub"))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    sums = {file: hashlib.sha256((tiny / file).read_bytes()).hexdigest() for file in gpt2_files.FILES}
    release = gpt2_files.Release("openai-community/gpt2", gpt2_files.HUB["gpt2"].revision, 1e5, sums)
    monkeypatch.setitem(gpt2_files.HUB, "gpt2", release)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORA_LAB_MODELS", raising=False)
    server.pauses = []
    monkeypatch.setattr(time, "sleep", server.pauses.append)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_network(monkeypatch):
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        yield


def files_below(folder):
    """Every real file, without the client's locks and notes."""
    return sorted(p.name for p in Path(folder).rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size and ".locks" not in p.parts
                  and p.name != "CACHEDIR.TAG")  # fmt: skip


def same_as(pair, model):
    ids = torch.arange(1, 30)[None]
    return torch.equal(pair[0](ids).logits, model(ids).logits)


def test_the_hub_is_asked_once_at_the_pinned_revision(hub, pair):
    assert same_as(pair, load_gpt2("gpt2")[0])
    assert {path for _, path in hub.asked} == {
        f"/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/{file}" for file in gpt2_files.FILES
    }
    count = len(hub.asked)
    assert same_as(pair, load_gpt2("openai-community/gpt2")[0])  # the name on the hub works too
    assert len(hub.asked) == count


def test_the_cache_serves_without_a_network(hub, pair, tmp_path, monkeypatch):
    load_gpt2("gpt2")
    hub.shutdown()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert same_as(pair, load_gpt2("gpt2")[0])


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("trouble", [[429, 429, 200], [503, 500, 200], ["cut", "cut", 200]])
def test_passing_trouble_is_retried_with_pauses(hub, pair, file, trouble):
    hub.trouble[file] = list(trouble)
    assert same_as(pair, load_gpt2("gpt2")[0])
    assert hub.trouble[file] == [200] and hub.pauses  # all of it was met


def test_the_pause_that_a_rate_limit_asks_for_is_kept(hub):
    hub.trouble["config.json"] = [429, 429, 200]
    hub.headers = {"Retry-After": "37"}
    load_gpt2("gpt2")
    assert max(hub.pauses) >= 37


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (429, ["429", "too many downloads from this address", "share", "LORA_LAB_MODELS"]),
        (503, ["503", "Try again later", "LORA_LAB_MODELS"]),
        (404, ["404", "HF_ENDPOINT", "LORA_LAB_MODELS"]),
        ("login", ["login page", "LORA_LAB_MODELS"]),
    ],
)
def test_lasting_trouble_is_said_as_what_it_is(hub, tmp_path, trouble, words):
    hub.trouble["model.safetensors"] = [trouble]
    with pytest.raises(FetchError) as caught:
        load_gpt2("gpt2")
    for word in ["gpt2", *words]:
        assert word in str(caught.value)
    assert ("network" in str(caught.value).split("use a copy")[0]) == (trouble == "login")  # nobody is sent to check a cable
    assert not [name for name in files_below(tmp_path / "cache") if "incomplete" in name]


def test_without_a_network_the_message_says_how_to_get_it(hub, no_network, tmp_path):
    with pytest.raises(FetchError) as caught:
        load_gpt2("gpt2")
    for word in ("could not reach the hub", "fill_models_folder('models', ['gpt2'])", "LORA_LAB_MODELS", "load_gpt2('pocket')"):
        assert word in str(caught.value)
    assert files_below(tmp_path / "cache") == []


def test_offline_mode_is_named(hub, tmp_path):
    """HF_HUB_OFFLINE is read when the client is imported, so this runs in a process of its own."""
    code = "from lora_lab.gpt2 import load_gpt2; load_gpt2('gpt2')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode and "HF_HUB_OFFLINE forbids" in done.stderr.splitlines()[-1]


def wrong(folder, file="model.safetensors"):
    """As long as the right one, other inside: only a hash can tell."""
    content = bytearray((folder / file).read_bytes())
    content[-200:] = bytes(200)
    return bytes(content)


def test_a_download_with_other_bytes_is_fetched_again(hub, pair):
    hub.trouble["model.safetensors"] = [wrong(hub.folder), 200]
    assert same_as(pair, load_gpt2("gpt2")[0])


@pytest.mark.parametrize("pinned", [True, False])
def test_bytes_that_stay_wrong_are_refused_and_thrown_away(hub, tmp_path, monkeypatch, pinned):
    if not pinned:  # then the hub's own word counts: what it calls the file
        monkeypatch.setitem(gpt2_files.HUB, "gpt2", gpt2_files.Release("openai-community/gpt2", gpt2_files.HUB["gpt2"].revision, 1e5, {}))
    hub.trouble["model.safetensors"] = [wrong(hub.folder)]
    with pytest.raises(FetchError, match=r"expected sha256, twice.*fill_models_folder\('models', \['gpt2'\]\)"):
        load_gpt2("gpt2")
    size = (hub.folder / "model.safetensors").stat().st_size
    assert not any(p.stat().st_size == size for p in (tmp_path / "cache").rglob("*") if p.is_file())
    hub.trouble.clear()
    load_gpt2("gpt2")  # nothing of it stands in the way


def test_a_damaged_cache_is_fetched_again(hub, pair):
    path = gpt2_folder("gpt2") / "model.safetensors"
    path.write_bytes(wrong(hub.folder))
    assert same_as(pair, load_gpt2("gpt2")[0])
    path.write_bytes(path.read_bytes()[:1000])
    assert same_as(pair, load_gpt2("gpt2")[0])


def test_a_full_disk_is_noticed_before_the_download(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1e12, used=1e12, free=12_345))
    with pytest.raises(FetchError, match=r"needs 0\.00 GB in .*cache.*LORA_LAB_CACHE"):
        load_gpt2("gpt2")
    assert hub.asked == [] and files_below(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot write in"), (errno.EACCES, "cannot write in")]
)
def test_a_disk_that_fails_half_way_leaves_nothing(hub, tmp_path, monkeypatch, number, words):
    from huggingface_hub import file_download

    def fail(url, temp_file, **options):
        temp_file.write(b"half a file")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_download, "http_get", fail)
    with pytest.raises(FetchError, match=f"{words}.*LORA_LAB_CACHE"):
        load_gpt2("gpt2")
    assert files_below(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_made_is_named(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match="cannot write in .*file/cache.*LORA_LAB_CACHE"):
        load_gpt2("gpt2")


def test_the_pins_are_whole():
    assert set(gpt2_files.HUB) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
    for name, release in gpt2_files.HUB.items():
        assert release.repository == f"openai-community/{name}"
        assert len(release.revision) == 40 and int(release.revision, 16)
        for file, digest in release.sha256.items():
            assert file in gpt2_files.FILES and len(digest) == 64 and int(digest, 16)


# ---- a room's folder ------------------------------------------------------------------------------------------------


@pytest.fixture
def room(hub, tmp_path, monkeypatch):
    """A folder that an instructor filled; the hub is gone afterwards."""
    (made,) = fill_models_folder(tmp_path / "room", ["gpt2"])
    assert made == tmp_path / "room" / "gpt2"
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "student"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("LORA_LAB_MODELS", str(tmp_path / "room"))
    hub.asked.clear()
    return tmp_path / "room"


def test_a_room_needs_no_hub(room, hub, pair):
    assert same_as(pair, load_gpt2("gpt2")[0])
    assert hub.asked == []
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=room / "gpt2", capture_output=True) if shutil.which("sha256sum") else None
    assert done is None or done.returncode == 0  # the usual tool reads it
    assert sorted(p.name for p in (room / "gpt2").iterdir()) == sorted([*gpt2_files.FILES, "SHA256SUMS"])


def test_a_room_is_filled_once_and_mended(room, hub, pair, monkeypatch, tmp_path):
    """Filled by an instructor whose own LORA_LAB_MODELS is set: it must not be asked for what it lacks."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    fill_models_folder(room, "gpt2")
    assert hub.asked == []
    path = room / "gpt2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="copied in part"):
        load_gpt2("gpt2")
    fill_models_folder(room, "gpt2")
    assert same_as(pair, load_gpt2("gpt2")[0])
    assert [p.name for p in room.iterdir()] == ["gpt2"]


def test_a_model_that_the_room_lacks_is_named(room):
    with pytest.raises(ValueError) as caught:
        load_gpt2("gpt2-xl")
    for word in ("'gpt2-xl'", "holds gpt2", "fill_models_folder"):
        assert word in str(caught.value)
    with pytest.raises(ValueError, match="'gpt3'.*'gpt2'"):
        fill_models_folder(room, ["gpt3"])


def test_filling_that_fails_leaves_nothing(hub, tmp_path, monkeypatch):
    def fail(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(FetchError, match="no space left"):
        fill_models_folder(tmp_path / "room", ["gpt2"])
    assert list((tmp_path / "room").iterdir()) == []


def test_a_room_behind_http(room, pair, tmp_path, monkeypatch):
    pytest.importorskip("pooch")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(room))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("LORA_LAB_MODELS", f"http://127.0.0.1:{server.server_port}/")
    try:
        assert same_as(pair, load_gpt2("gpt2")[0])
        assert "/gpt2/model.safetensors" in asked
        asked.clear()
        assert same_as(pair, load_gpt2("gpt2")[0])
        assert asked == ["/gpt2/SHA256SUMS"]  # the rest is in this machine's cache
        with pytest.raises(FetchError, match="gpt2-xl/SHA256SUMS"):
            load_gpt2("gpt2-xl")
    finally:
        server.shutdown()
        server.server_close()


# ---- the real one's size, without its weights -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not LOCAL_DATA, reason="LORA_LAB_DATA names no folder with GPT-2's tokenizer files (gpt2_vocab)")
def test_gpt2s_true_size_and_tokenizer(tmp_path):
    """124 M random weights under OpenAI's names, OpenAI's own tokenizer file; what transformers loads from the same folder is the oracle."""
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary = Path(LOCAL_DATA) / "gpt2_vocab" / "tokenizer.json"
    assert hashlib.sha256(vocabulary.read_bytes()).hexdigest() == gpt2_files.HUB["gpt2"].sha256["tokenizer.json"]
    medium = Path(LOCAL_DATA) / "gpt2_vocab" / "config.json"  # of the middle size, as its shape says
    assert hashlib.sha256(medium.read_bytes()).hexdigest() == gpt2_files.HUB["gpt2-medium"].sha256["config.json"]
    shutil.copy(vocabulary, tmp_path)
    torch.manual_seed(0)
    config = GPT2Config(initializer_range=0.08)  # the defaults are GPT-2's; wider weights, so that greedy has no near ties
    config.save_pretrained(tmp_path)
    made = GPT2LMHeadModel(config)
    body = {name: p.contiguous() for name, p in made.transformer.state_dict().items()}
    save_file(body | {"h.0.attn.bias": torch.ones(1, 1, 1024, 1024).tril()}, tmp_path / "model.safetensors")
    model, tokenizer = load_gpt2(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert tokenizer("Hello world<|endoftext|> The quick brown")["input_ids"] == [15496, 995, 50256, 383, 2068, 7586]
    for (name, p), (other, q) in zip(model.named_parameters(), made.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q)
    del made
    prompts = ["Hello", "The quick brown fox jumps over the lazy dog and", "In 1984,", "naïve café 🙂 " * 12]
    for strategy in ("greedy", "beam"):
        assert generate(model, tokenizer, prompts, 6, strategy) == [generate(model, tokenizer, p, 6, strategy) for p in prompts]
    model = apply_lora(model, r=4, alpha=32, target_modules=["c_attn:q,v"])
    assert len(lora_layers(model)) == 12
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 147_456  # 12 layers x 2 slices x 2 x 768 x 4


# ---- generation -----------------------------------------------------------------------------------------------------

PROMPTS = [
    "the", "the old man", "door " * 9, "cat", "into the rain and the", "é€😀", " ", "\n\n", "the old man opened the door and the cat went out",
    "x", "rain", "<|endoftext|>", "man man man", "0123456789" * 3, "open", "The OLD man",
]  # fmt: skip


def greedy_by_hand(model, tokenizer, prompt, count, pick=lambda scores: scores.argmax().item()):
    """The definition: one whole forward pass for each token, no batch, no padding, no cache."""
    ids = tokenizer(prompt)["input_ids"]
    new = []
    for _ in range(count):
        with torch.no_grad():
            token = pick(model(torch.tensor([ids + new])).logits[0, -1])
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(new)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_in_a_batch_is_greedy_by_hand(pair, batch_size):
    expected = [greedy_by_hand(*pair, prompt, 12) for prompt in PROMPTS]
    assert generate(*pair, PROMPTS, 12, batch_size=batch_size) == expected
    assert len(set(expected)) > len(PROMPTS) // 2  # and they are not all one text


@pytest.fixture
def ending(copy):
    """The tiny model with a louder <|endoftext|>, so that texts end at different lengths."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors["transformer.wte.weight"][0] *= 2
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_beams_in_a_batch_are_beams_alone(ending):
    """transformers' own search, one prompt at a time without a mask, on its own copy of the model."""
    oracle, (model, tokenizer) = theirs(ending), load_gpt2(ending)
    found = {}
    for penalty in (0.0, 1.0, 3.0):
        expected = []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            out = oracle.generate(
                ids, attention_mask=torch.ones_like(ids), num_beams=3, do_sample=False, max_new_tokens=10, pad_token_id=0,
                eos_token_id=0, length_penalty=penalty,
            )  # fmt: skip
            expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        found[penalty] = generate(model, tokenizer, PROMPTS, 10, "beam", num_beams=3, length_penalty=penalty)
        assert found[penalty] == expected
    assert found[0.0] != found[3.0]  # texts of several lengths were in the race
    assert found[1.0] != generate(model, tokenizer, PROMPTS, 10)  # a search, not greedy under another name


def test_a_text_ends_where_the_model_ends_it(ending):
    model, tokenizer = load_gpt2(ending)
    texts = generate(model, tokenizer, PROMPTS, 30)
    assert texts == [greedy_by_hand(model, tokenizer, prompt, 30) for prompt in PROMPTS]
    lengths = {len(tokenizer(text)["input_ids"]) for text in texts}
    assert len(lengths) > 3 and not any("<|endoftext|>" in text for text in texts)
    assert ["".join(stream(model, tokenizer, prompt, 30)) for prompt in PROMPTS] == texts


def test_sampling_does_not_depend_on_the_batch(pair):
    together = generate(*pair, PROMPTS, 12, "sampling", seed=5)
    assert together == generate(*pair, PROMPTS, 12, "sampling", seed=5, batch_size=3)
    assert together == [generate(*pair, prompt, 12, "sampling", seed=5 + i) for i, prompt in enumerate(PROMPTS)]
    seeds = [7, 7, 1]
    assert generate(*pair, ["the", "the", "the"], 12, "sampling", seed=seeds) == [
        generate(*pair, "the", 12, "sampling", seed=s) for s in seeds
    ]


def test_sampling_leaves_torchs_random_numbers_alone(pair):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generate(*pair, PROMPTS[:3], 5, "sampling")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 2.0, "top_k": 8, "top_p": 0.8}])
def test_samples_have_the_probabilities_they_should(copy, options):
    """One token, 3,000 seeds, against softmax by numpy: a chi-square test at one in ten thousand."""
    from scipy.stats import chi2

    torch.manual_seed(1)
    model = make_model(copy, seed=1, initializer_range=0.05)
    model, tokenizer = load_gpt2(model)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("the cat")["input_ids"]])).logits[0, -1].double().numpy() * 6  # far from uniform
    model.lm_head = nn.Linear(32, model.config.vocab_size, bias=False)  # untied, so that it can be made louder alone
    model.lm_head.weight = nn.Parameter(6 * model.transformer.wte.weight.detach())
    n = 3000
    found = generate(model, tokenizer, ["the cat"] * n, 1, "sampling", batch_size=500, **options)
    p = np.exp((logits - logits.max()) / options.get("temperature", 1.0))
    p /= p.sum()
    order = np.argsort(-p)
    if options.get("top_k"):
        p[order[options["top_k"] :]] = 0
        p /= p.sum()
    keep = np.cumsum(p[order]) - p[order] < options.get("top_p", 1.0)
    p[order[~keep]] = 0
    p /= p.sum()
    texts = [tokenizer.decode([i]) if i else "" for i in range(len(p))]
    expected = {}
    for text, q in zip(texts, p, strict=True):  # several tokens are bytes that decode to the same sign
        expected[text] = expected.get(text, 0) + n * q
    counted = {text: found.count(text) for text in set(found)}
    assert all(expected[text] > 0 for text in counted)
    rare = sum(e for e in expected.values() if e < 5)
    terms = [(counted.get(t, 0) - e) ** 2 / e for t, e in expected.items() if e >= 5]
    if rare:
        terms.append((sum(counted.get(t, 0) for t, e in expected.items() if e < 5) - rare) ** 2 / rare)
    assert len(terms) > 2
    assert sum(terms) < chi2.isf(1e-4, len(terms) - 1)


def test_one_text_gives_one_text_a_list_a_list(pair):
    assert isinstance(generate(*pair, "the", 3), str)
    assert generate(*pair, ["the"], 3) == [generate(*pair, "the", 3)]
    assert generate(*pair, (p for p in ["the"]), 3) == [generate(*pair, "the", 3)]
    assert generate(*pair, [], 3) == []


class Scripted(nn.Module):
    """A model that says the given tokens, whatever it reads."""

    def __init__(self, tokens, vocabulary, context=64):
        super().__init__()
        self.tokens, self.vocabulary, self.said = tokens, vocabulary, 0
        self.config, self.device = SimpleNamespace(n_positions=context), torch.device("cpu")

    def forward(self, input_ids, past_key_values, use_cache):
        logits = torch.zeros(1, input_ids.shape[1], self.vocabulary)
        logits[:, -1, self.tokens[self.said]] = 1.0
        self.said += 1
        return SimpleNamespace(logits=logits, past_key_values=None)


@pytest.mark.parametrize("text", ["the é€😀 cat", "日本語 went out", "👩‍👩‍👧 the", "a true \ufffd sign", "ends so \ufffd", "é"])
def test_streaming_never_splits_a_character(pair, text):
    tokenizer = pair[1]
    tokens = tokenizer(text)["input_ids"]
    pieces = list(stream(Scripted([*tokens, 0], 400), tokenizer, "the", 60))
    assert "".join(pieces) == text
    assert all(pieces)
    whole = set(text)
    assert all(set(piece) <= whole for piece in pieces)  # no half character, which would be shown as another sign
    assert len(pieces) > 1 or len(text) == 1


def test_a_character_that_never_ends_is_shown_at_the_end(pair):
    tokenizer = pair[1]
    half = tokenizer("😀")["input_ids"][:-1]
    assert len(half) >= 2
    pieces = list(stream(Scripted([*tokenizer("the")["input_ids"], *half, 0], 400), tokenizer, "the", 60))
    assert "".join(pieces) == tokenizer.decode([*tokenizer("the")["input_ids"], *half]) and pieces[0][0] == "t"


@pytest.mark.parametrize("settings", [{}, {"strategy": "sampling", "seed": 4, "temperature": 0.8, "top_k": 20, "top_p": 0.9}])
def test_streaming_says_what_generate_says(pair, settings):
    for prompt in PROMPTS:
        assert "".join(stream(*pair, prompt, 15, **settings)) == generate(*pair, prompt, 15, **settings)


def test_streaming_leaves_gradients_and_modes_to_the_caller(pair):
    model, tokenizer = pair
    model.train()
    try:
        for _ in stream(model, tokenizer, "the", 3):
            assert torch.is_grad_enabled() and model.training and model.transformer.drop.training
    finally:
        model.eval()
    with pytest.raises(TypeError):  # when it is called, not when somebody asks for the first piece
        stream(model, tokenizer, None, 3)


def test_generating_is_free_of_dropout_and_puts_modes_back(pair):
    model, tokenizer = pair
    expected = generate(model, tokenizer, PROMPTS, 8)
    assert not any(module.training for module in model.modules())
    assert model.config.resid_pdrop > 0  # there is something that could disturb
    model.transformer.h[0].train()
    before = [m.training for m in model.modules()]
    try:
        assert generate(model, tokenizer, PROMPTS, 8) == expected
        assert [m.training for m in model.modules()] == before
        with pytest.raises(TypeError):
            generate(model, tokenizer, ["the", 3])
        assert [m.training for m in model.modules()] == before
    finally:
        model.eval()
    assert torch.is_grad_enabled()


def test_an_adapted_model_generates(copy):
    model, tokenizer = load_gpt2(copy)
    plain = generate(model, tokenizer, PROMPTS, 8)
    apply_lora(model, r=3, alpha=30, target_modules=["c_attn:q,v"])
    assert generate(model, tokenizer, PROMPTS, 8) == plain  # B is zero
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.5)
    changed = generate(model, tokenizer, PROMPTS, 8)
    assert changed != plain
    assert changed == [greedy_by_hand(model, tokenizer, p, 8) for p in PROMPTS]


def test_what_does_not_fit_is_cut_at_the_left_and_said(pair):
    model, tokenizer = pair
    long = SENTENCE * 8
    tokens = tokenizer(long)["input_ids"]
    assert len(tokens) > 54
    with pytest.warns(UserWarning, match=rf"1 of 2 prompts do not fit.*{len(tokens)} tokens.*leave room for 54"):
        found = generate(model, tokenizer, [long, "the"], 10)
    last = tokenizer.decode(tokens[-54:])
    assert tokenizer(last)["input_ids"] == tokens[-54:]
    assert found == [greedy_by_hand(model, tokenizer, last, 10), greedy_by_hand(model, tokenizer, "the", 10)]
    with pytest.warns(UserWarning, match="do not fit"):
        assert "".join(stream(model, tokenizer, long, 10)) == found[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, tokenizer, last, 10)  # fits exactly


@pytest.mark.parametrize(
    ("prompts", "kind", "words"),
    [
        ("", ValueError, ["empty", "'<|endoftext|>'"]),
        (["the", ""], ValueError, ["prompt 2 of 2 is empty"]),
        ("the \ud83d cat", ValueError, ["half a character", "place 4", "UTF-8"]),
        (["the", None], TypeError, ["prompt 2 of 2", "NoneType"]),
        ([b"the"], TypeError, ["bytes"]),
        (b"the", TypeError, ["bytes"]),
        (3, TypeError, ["int"]),
        (None, TypeError, ["NoneType"]),
        ({"the": 1}, TypeError, ["dict"]),
    ],
)
def test_prompts_that_are_none(pair, prompts, kind, words):
    with pytest.raises(kind) as caught:
        generate(*pair, prompts, 3)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "sample"}, "did you mean 'sampling'"),
        ({"strategy": "beams"}, "did you mean 'beam'"),
        ({"max_new_tokens": 0}, "from 1 to 63; found 0"),
        ({"max_new_tokens": 64}, "context of this model is 64 tokens"),
        ({"temperature": 0}, "strategy='greedy'"),
        ({"temperature": float("nan")}, "above 0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"num_beams": 0, "strategy": "beam"}, "num_beams must be at least 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": [1, 2]}, "found 2 for 1 prompts"),
    ],
)
def test_settings_that_make_no_sense(pair, options, words):
    with pytest.raises(ValueError, match=words):
        generate(*pair, "the", **options)


def test_beams_cannot_be_streamed(pair):
    with pytest.raises(ValueError, match="beam"):
        stream(*pair, "the", strategy="beam")


def test_show_stream_outside_a_notebook(capsys):
    assert show_stream(iter(["the ", "cat"]), "And ") == "the cat"
    assert capsys.readouterr().out == "And the cat\n"


def test_show_stream_in_a_notebook(monkeypatch):
    """Escaped, updated in place, the last state whole, also when it is stopped."""
    import IPython
    import IPython.display

    shown = []

    def display(data, raw, display_id):
        shown.append(data)
        return SimpleNamespace(update=lambda data, raw: shown.append(data))

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=True))
    monkeypatch.setattr(IPython.display, "display", display)
    assert show_stream(iter(["<b>", "&", "\n", "x"]), "a<") == "<b>&\nx"
    assert shown[-1]["text/plain"] == "a<<b>&\nx"
    assert "&lt;b&gt;&amp;\nx" in shown[-1]["text/html"] and "<b>&" not in shown[-1]["text/html"]

    def stopped():
        yield "half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show_stream(stopped())
    assert shown[-1]["text/plain"] == "half"


# ---- text as data ---------------------------------------------------------------------------------------------------


def test_blocks_are_the_text(pair):
    tokenizer = pair[1]
    text = SENTENCE * 20
    rows = token_blocks(tokenizer, text, 16)
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert rows.shape == (len(ids) // 16, 16) and rows.dtype == torch.int64
    assert rows.flatten().tolist() == ids[: rows.numel()]
    with pytest.raises(ValueError, match="found 1 tokens"):
        token_blocks(tokenizer, "x", 16)
    with pytest.raises(ValueError, match="half a character"):
        token_blocks(tokenizer, "\udc80" * 100, 16)


def test_next_token_loss_is_transformers_own(pair):
    model, tokenizer = pair
    rows = token_blocks(tokenizer, SENTENCE * 20, 16)
    # Sums in another order; float32 keeps about 7 digits.
    torch.testing.assert_close(next_token_loss(model, (rows, rows)), model(input_ids=rows, labels=rows).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("context", [None, 10])
def test_text_loss_counts_every_token_once(pair, context):
    """Window by window, token by token, with numpy's logarithms."""
    model, tokenizer = pair
    text = SENTENCE * 9 + "é"
    ids = [0, *tokenizer(text, verbose=False)["input_ids"]]
    width = context or 64
    nats = 0.0
    for start in range(0, len(ids) - 1, width):
        window = ids[start : start + width + 1]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]])).logits[0].double().numpy()
        for scores, token in zip(logits, window[1:], strict=True):
            nats += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[token]
    found = text_loss(model, tokenizer, text, context=context, batch_size=3)
    assert (found.tokens, found.bytes) == (len(ids) - 1, len(text.encode()))
    # float32 logits, summed in another order
    assert math.isclose(found.nats_per_token, nats / (len(ids) - 1), rel_tol=1e-5)
    assert math.isclose(found.bits_per_byte, nats / math.log(2) / len(text.encode()), rel_tol=1e-5)
    with pytest.raises(ValueError, match="empty"):
        text_loss(model, tokenizer, "")


# ---- the pocket model, and what ships -------------------------------------------------------------------------------


def pocket_is_there():
    return (gpt2_files.shipped("pocket-gpt2") / "model.safetensors").exists()


def test_a_missing_pocket_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpt2_files, "shipped", lambda name: tmp_path)
    with pytest.raises(ValueError, match="this copy of the lab is incomplete"):
        load_gpt2()


@pytest.mark.skipif(not pocket_is_there(), reason="the pocket model has not been made yet")
def test_the_pocket_model_speaks():
    model, tokenizer = load_gpt2()
    prompts = ["The old man opened the door and", "Once upon a time there was", "\"Where are you going?\" asked", "She"]
    texts = generate(model, tokenizer, prompts, 30)
    assert texts == [generate(model, tokenizer, prompt, 30) for prompt in prompts]
    assert texts == [greedy_by_hand(model, tokenizer, prompt, 30) for prompt in prompts]
    assert all(sum(c.isalpha() or c.isspace() for c in text) > 0.8 * len(text) > 0 for text in texts)
    assert sum(path.stat().st_size for path in gpt2_files.shipped("pocket-gpt2").iterdir()) <= 16e6


def test_the_stories_are_whole_and_apart():
    """As their data card says: sizes and sums."""
    stories = sherlock_holmes()
    card = (ROOT / "data" / "sherlock-holmes" / "README.md").read_text(encoding="utf-8")
    for name in ("train", "test", "ordinary"):
        content = getattr(stories, name).encode("utf-8")
        (row,) = [row for row in card.splitlines() if row.startswith(f"| `{name}.txt`")]
        assert f"{len(content):,}" in row and hashlib.sha256(content).hexdigest() in row
    assert stories.train.count("<|endoftext|>") == 2 and "Sherlock Holmes" in stories.test and "Holmes" not in stories.ordinary
    paragraphs = [set(text.splitlines()) for text in (stories.train, stories.test, stories.ordinary)]
    assert not {p for p in paragraphs[0] & (paragraphs[1] | paragraphs[2]) if len(p) > 60}


@pytest.mark.slow
def test_a_wheel_has_what_ships(tmp_path):
    """Built from a copy with the data folder as it is; a file in data/ that is meant to ship must be found by `shipped`."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "LICENSE-prose"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "lora_lab", source / "lora_lab", ignore=skip)
    shutil.copytree(ROOT / "data", source / "data", ignore=skip)
    pocket = source / "data" / "pocket-gpt2"
    pocket.mkdir(exist_ok=True)
    (pocket / "config.json").write_text("{}")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = {p for p in (source / "lora_lab").rglob("*") if p.is_file()}  # modules, and the assets of painter, presets and playground
    assert {str(p.relative_to(source)).replace(os.sep, "/") for p in files} <= inside
    for path in (source / "data").glob("*/*.*"):  # recipes stay at home
        assert (f"lora_lab/shipped/{path.parent.name}/{path.name}" in inside) == (path.suffix != ".py"), path
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from lora_lab.files import shipped; print(shipped('pocket-gpt2') / 'config.json')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "site" / "lora_lab" / "shipped" / "pocket-gpt2" / "config.json"
