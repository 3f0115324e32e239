"""Adapters on disk. Oracles: peft 0.21 in both directions, loralib's own layers, numpy; damage and kills from outside."""

import copy
import functools
import json
import math
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from lora_lab import AdapterError, apply_lora, load_adapter, lora_layers, lora_state_dict, merge, remove_lora, save_adapter
from lora_lab.adapt import TrainedCopy
from lora_lab.adapter_files import ASIDE, CONFIG, TENSORS

DATA = Path(os.environ.get("LORA_LAB_DATA", "no such folder"))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning", "ignore::DeprecationWarning")


# ---- small models, random weights

TOKENS = torch.tensor([[1, 5, 7, 2], [0, 11, 3, 9]])
SIZES = {"vocab_size": 24, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
SPREAD = {"initializer_range": 0.3}  # of the weights; the usual 0.02 would leave so small a model with logits of 1e-3


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=8, n_embd=12, n_layer=2, n_head=2, **special, **SPREAD))
    return model, lambda m: m(TOKENS).logits


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SIZES, **SPREAD, num_labels=3)), lambda m: m(TOKENS).logits


def roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(**SIZES, **SPREAD, num_labels=3, max_position_embeddings=16)
    return RobertaForSequenceClassification(config), lambda m: m(TOKENS).logits


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, **SPREAD, num_key_value_heads=1, bos_token_id=0, eos_token_id=0)
    return LlamaForCausalLM(config), lambda m: m(TOKENS).logits


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=24, d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), lambda m: m(TOKENS, decoder_input_ids=TOKENS).logits


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    model = ViTForImageClassification(ViTConfig(**sizes, **SPREAD, image_size=8, patch_size=4, num_labels=3))
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return model, lambda m: m(images).logits


class Toy(nn.Module):
    """An embedding, an odd convolution, a norm with running statistics, linear layers of which one name ends another."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(24, 5, padding_idx=0)
        self.convolution = nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.dense = nn.Linear(6, 7)
        self.block = nn.ModuleDict({"dense": nn.Linear(7, 7, bias=False)})
        self.head = nn.Linear(7, 3)

    def forward(self, tokens):
        x = self.tokens(tokens)[:, None]  # (B, 1, T, 5)
        x = torch.tanh(self.dense(self.norm(self.convolution(x)).mean((2, 3))))
        return self.head(self.block["dense"](x))


def toy():
    return Toy(), lambda m: m(TOKENS)


def make(build, seed=1):
    torch.manual_seed(seed)
    model, run = build()
    return model.eval(), run


def randomise(model, scale=0.3):
    """All that trains gets a value that no initialisation gives; returns the model."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def out(run, model):
    return run(model)


def snapshot(model):
    """Everything about a model that an error must leave alone, bit for bit."""
    modules = [(n, type(m).__name__, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)]
    tensors = {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    settings = [(layer.alpha, layer.rslora, layer.disabled) for layer in lora_layers(model).values()]
    return modules, tensors, flags, settings, "_before_lora" in model.__dict__


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[0] == before[0] and after[2:] == before[2:]
    assert all(torch.equal(after[1][k], v) for k, v in before[1].items())


def assert_same(a, b):
    """Logits of size 1 equal to 1e-6: float32 (6e-8 a rounding) through two blocks, the same products in another order of sums."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1.0, b.abs().max().item()))


# ---- kills, before anything imports transformers: a small process forks faster


def adapters(tmp_path):
    """Two adapters that differ in everything: values, ranks, alpha, targets."""
    base, _ = make(toy)
    a = with_ours(base, {"r": 3, "target_modules": ["dense", "tokens"]}, alpha=5)
    b = with_ours(base, {"r": 2, "target_modules": ["head"]}, alpha=16)
    return base, {"a": a, "b": b}


def which(base, folder, models):
    """The name of the adapter that the folder holds; fails if it is neither, or if peft would see a mixed pair."""
    loaded = load_adapter(copy.deepcopy(base), folder)
    found = [n for n, m in models.items() if lora_layers(m).keys() == lora_layers(loaded).keys()]
    assert len(found) == 1
    wanted, got = lora_state_dict(models[found[0]]), lora_state_dict(loaded)
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[k], got[k]) for k in got)
    assert {x.scaling for x in lora_layers(loaded).values()} == {x.scaling for x in lora_layers(models[found[0]]).values()}
    if (folder / CONFIG).exists():  # what peft reads, beside what it reads
        config = json.loads((folder / CONFIG).read_text())
        assert (config["r"], config["lora_alpha"]) == {"a": (3, 5), "b": (2, 16)}[found[0]]
    return found[0]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a fork after torch was imported, which macOS and Windows don't have")
def test_killed_200_times_the_old_or_the_new_adapter_is_there(tmp_path):
    base, models = adapters(tmp_path)
    folder = tmp_path / "adapter"
    save_adapter(models["a"], folder)
    start = time.perf_counter()
    for name in "baba":
        save_adapter(models[name], folder)
    span = (time.perf_counter() - start) / 4  # about one save; follows the machine's speed below
    rng, seen, old = random.Random(3), {"old": 0, "new": 0}, "a"
    for _ in range(200):
        new = {"a": "b", "b": "a"}[old]
        ready, say = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(say, b".")
                save_adapter(models[new], folder)
                time.sleep(10)
            finally:
                os._exit(1)
        os.read(ready, 1)
        time.sleep(rng.uniform(0, 1.5 * span))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        os.close(ready), os.close(say)
        found = which(base, folder, models)
        seen["new" if found == new else "old"] += 1
        span *= 0.95 if found == new else 1.05
        old = found
    assert any(folder.glob(".*.part"))  # and into the middle of saves
    assert min(seen.values()) > 10  # the kills fell before and after the change
    save_adapter(models["a"], folder)
    assert which(base, folder, models) == "a"


class Killed(BaseException):
    """What no handler of ours catches."""


@pytest.mark.parametrize("from_peft", [False, True])
def test_stopped_at_each_step_in_turn(tmp_path, monkeypatch, from_peft):
    base, models = adapters(tmp_path)
    real = {name: getattr(os, name) for name in ("replace", "fsync")}
    seen = []
    for stop in range(24):  # before the first step, after it, before the second, ...
        folder = tmp_path / f"{stop}"
        if from_peft:  # an old adapter without our record
            with_peft(base, {"r": 3, "target_modules": ["dense", "tokens"]}).save_pretrained(folder)
            models["a"] = load_adapter(copy.deepcopy(base), folder)
        else:
            save_adapter(models["a"], folder)
        moments = iter(range(1000))

        def step(action, *args, stop=stop, moments=moments, **kwargs):
            if next(moments) == stop:
                raise Killed
            action(*args, **kwargs)
            if next(moments) == stop:
                raise Killed

        with monkeypatch.context() as patch:
            for name, action in real.items():
                patch.setattr(os, name, functools.partial(step, action))
            try:
                save_adapter(models["b"], folder)
                break
            except Killed:
                seen.append(which(base, folder, models))
        save_adapter(models["a"], folder)  # what the killed one left is no obstacle
        assert which(base, folder, models) == "a" and not (folder / ASIDE).exists()
    assert next(moments) > 8 and set(seen) == {"a", "b"} and seen == sorted(seen)


def test_a_disk_error_puts_the_old_config_back(tmp_path, monkeypatch):
    base, models = adapters(tmp_path)
    save_adapter(models["a"], tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = os.replace

    def locked(source, target):
        if Path(target).name == TENSORS:
            raise PermissionError(13, "another process has the file open", str(target))
        return real(source, target)

    monkeypatch.setattr(os, "replace", locked)
    with pytest.raises(PermissionError):
        save_adapter(models["b"], tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_old_leftovers_are_swept_and_young_ones_kept(tmp_path):
    base, models = adapters(tmp_path)
    old, young = tmp_path / f".{TENSORS}.old.part", tmp_path / f".{TENSORS}.young.part"
    for left in (old, young):
        left.write_bytes(b"x")
    os.utime(old, (0, time.time() - 7200))
    save_adapter(models["a"], tmp_path)
    assert not old.exists() and young.exists()


# ---- both directions with peft

CASES = {
    "gpt2": (gpt2, {"r": 3, "target_modules": ["c_attn", "c_proj"]}),
    "gpt2 all biases": (gpt2, {"r": 3, "target_modules": ["attn.c_attn"], "bias": "all"}),
    "gpt2 embedding": (gpt2, {"r": 3, "target_modules": ["wpe", "c_fc"]}),
    "bert head": (bert, {"r": 3, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "bert biases of lora": (bert, {"r": 4, "target_modules": ["query", "key"], "bias": "lora_only"}),
    "roberta head": (roberta, {"r": 3, "target_modules": ["query", "attention.output.dense"], "modules_to_save": ["classifier"]}),
    "llama rslora": (llama, {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "rslora": True}),
    "llama patterns": (
        llama,
        {
            "r": 2, "target_modules": ["q_proj", "k_proj", "gate_proj"],
            "rank_pattern": {"k_proj": 5, "layers.1.mlp.gate_proj": 1}, "alpha_pattern": {"q_proj": 2.5, "k_proj": 11},
        },
    ),
    "t5": (t5, {"r": 3, "target_modules": ["q", "v", "wo"]}),
    "vit": (vit, {"r": 3, "target_modules": ["query", "value"], "bias": "lora_only"}),
    "toy convolution and embedding": (toy, {"r": 3, "target_modules": ["tokens", "convolution", "dense"]}),
    "toy names that end others": (
        toy,
        {
            "r": 3, "target_modules": ["dense", "tokens"], "rank_pattern": {"^dense": 2}, "alpha_pattern": {"^dense": 7},
            "modules_to_save": ["norm", "head"],
        },
    ),
    "toy all biases, rslora": (toy, {"r": 3, "target_modules": ["convolution", "head"], "bias": "all", "rslora": True}),
}  # fmt: skip


def vit_targets(model, settings):
    """transformers renamed ViT's layers more than once."""
    ends = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if "query" in settings["target_modules"] and not {"query", "value"} <= ends:
        settings = settings | {"target_modules": ["q_proj", "v_proj"]}
    return settings


@pytest.fixture(params=CASES, ids=[c.replace(" ", "-") for c in CASES])
def case(request):
    build, settings = CASES[request.param]
    base, run = make(build)
    return base, run, vit_targets(base, settings)


def with_peft(base, settings, alpha=5):
    from peft import LoraConfig, get_peft_model

    settings = dict(settings)
    config = LoraConfig(lora_alpha=alpha, use_rslora=settings.pop("rslora", False), **settings)
    return randomise(get_peft_model(copy.deepcopy(base), config))


def with_ours(base, settings, alpha=5):
    return randomise(apply_lora(copy.deepcopy(base), alpha=alpha, **settings))


def test_peft_reads_what_we_write(case, tmp_path):
    from peft import PeftModel

    base, run, settings = case
    ours = with_ours(base, settings)
    report = save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_same(out(run, theirs), out(run, ours))
    assert (out(run, base) - out(run, ours)).abs().max() > 1e-2 * out(run, base).abs().max()  # it does something
    if settings.get("bias", "none") == "none":  # peft takes a second adapter only then
        theirs.load_adapter(tmp_path, adapter_name="again")
        theirs.set_adapter("again")
        assert_same(out(run, theirs.eval()), out(run, ours))
    assert report.trained == sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert report.stored == report.trained + buffers(ours)
    back = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(out(run, back), out(run, ours))
    assert {p.name for p in tmp_path.iterdir()} == {TENSORS, CONFIG}


def buffers(model):
    return sum(b.numel() for m in model.modules() if isinstance(m, TrainedCopy) for b in m.trained.buffers())


def test_we_read_what_peft_writes_and_write_the_same(case, tmp_path):
    base, run, settings = case
    theirs = with_peft(base, settings)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    assert_same(out(run, ours), out(run, theirs))
    written = load_file(tmp_path / TENSORS)
    written = {k: v for k, v in written.items() if ".original_module." not in k and ".modules_to_save." not in k}
    mine = lora_state_dict(ours)
    assert mine.keys() == written.keys()
    assert all(torch.equal(mine[k], v) for k, v in written.items())
    plain = remove_lora(ours)
    assert torch.equal(out(run, plain), out(run, base))  # nothing of the base was overwritten


def test_one_adapter_from_peft_and_back_in_half_precision(tmp_path):
    base, run = make(llama)
    base = base.to(torch.bfloat16)
    theirs = with_peft(base, {"r": 3, "target_modules": ["q_proj"]})  # peft keeps float32 factors over a bfloat16 base
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    layer = next(iter(lora_layers(ours).values()))
    assert layer.lora_A.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    written = load_file(tmp_path / TENSORS)
    assert all(torch.equal(v, written[k]) for k, v in lora_state_dict(ours).items())


class Swinlike(nn.Module):
    """A bias that is a table of its own, and two heads of which peft takes one for the other."""

    def __init__(self):
        super().__init__()
        self.position_bias = nn.Parameter(torch.randn(6))
        self.q, self.pre_head, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.pre_head(self.q(x) + self.position_bias)))


def swinlike():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    return Swinlike(), lambda m: m(x)


@pytest.mark.parametrize("build, name", [(swinlike, "position_bias"), (t5, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")])
def test_an_older_peft_counted_every_name_with_bias_in_it(tmp_path, build, name):
    base, run = make(build)
    theirs = with_peft(base, {"r": 2, "target_modules": ["q"], "bias": "all"})
    theirs.save_pretrained(tmp_path)
    parameter = theirs.base_model.model.get_parameter(name)
    with torch.no_grad():
        parameter += 0.5
    # as such a version wrote it: its test was `"bias" in name`
    save_file(load_file(tmp_path / TENSORS) | {f"base_model.model.{name}": parameter.detach()}, tmp_path / TENSORS)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    assert_same(out(run, ours), out(run, theirs))
    save_adapter(ours, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / TENSORS).keys() == load_file(tmp_path / TENSORS).keys()
    assert torch.equal(out(run, load_adapter(copy.deepcopy(base), tmp_path / "ours")), out(run, ours))
    assert torch.equal(out(run, remove_lora(ours)), out(run, base))


def test_modules_to_save_end_like_others(tmp_path):
    from peft import PeftModel

    base, run = make(swinlike)
    theirs = with_peft(base, {"r": 2, "target_modules": ["q"], "modules_to_save": ["head"]})
    theirs.save_pretrained(tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / TENSORS)
    assert any("pre_head" in k for k in tensors)
    assert_same(out(run, load_adapter(copy.deepcopy(base), tmp_path / "peft")), out(run, theirs))
    save_file({k: v for k, v in tensors.items() if "pre_head" not in k}, tmp_path / "peft" / TENSORS)
    with pytest.raises(AdapterError, match=r"(?s)missing from the file \(2\).*pre_head.weight \(6, 6\)"):
        load_adapter(copy.deepcopy(base), tmp_path / "peft")
    ours = with_ours(base, {"r": 2, "target_modules": ["q"], "modules_to_save": ["head"]})
    with pytest.warns(UserWarning, match="pre_head"):
        save_adapter(ours, tmp_path / "ours")
    assert torch.equal(out(run, load_adapter(copy.deepcopy(base), tmp_path / "ours")), out(run, ours))
    with pytest.raises(KeyError):  # what the warning is about; if peft reads it one day, the warning can go
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")


def test_embedding_weights_that_peft_stores_are_compared(tmp_path):
    base, run = make(llama)
    theirs = with_peft(base, {"r": 3, "target_modules": ["embed_tokens", "q_proj"]})
    theirs.save_pretrained(tmp_path)
    assert any(k.endswith("embed_tokens.base_layer.weight") for k in load_file(tmp_path / TENSORS))
    assert_same(out(run, load_adapter(copy.deepcopy(base), tmp_path)), out(run, theirs))
    other, _ = make(llama, seed=2)
    with pytest.raises(AdapterError, match="trained on another base"):
        load_adapter(other, tmp_path)


def test_convolutions_that_peft_computes_otherwise_are_named(tmp_path):
    from peft import PeftModel

    torch.manual_seed(1)
    base = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten())
    ours = with_ours(base, {"r": 2, "target_modules": ["0"]})
    with pytest.warns(UserWarning, match="^0: peft leaves"):
        save_adapter(ours, tmp_path / "ours")
    x = torch.randn(2, 2, 5, 5)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert (theirs(x) - ours(x)).abs().max() > 1e-2  # if this fails one day, peft has caught up and the warning can go
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path / "ours")(x), ours(x))
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.warns(UserWarning, match="^0: peft leaves"):
        load_adapter(copy.deepcopy(base), tmp_path / "peft")


def test_a_pickle_of_peft_and_single_files(tmp_path):
    base, run = make(gpt2)
    theirs = with_peft(base, {"r": 3, "target_modules": ["c_attn"]})
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    if not (tmp_path / "adapter_model.bin").exists():  # newer versions may write safetensors whatever one asks
        torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
        (tmp_path / TENSORS).unlink()
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        assert_same(out(run, load_adapter(copy.deepcopy(base), path)), out(run, theirs))
    alone = tmp_path / "elsewhere.pt"
    (tmp_path / "adapter_model.bin").rename(alone)
    with pytest.raises(AdapterError, match="alpha"):
        load_adapter(copy.deepcopy(base), alone)
    assert_same(out(run, load_adapter(copy.deepcopy(base), alone, alpha=5)), out(run, theirs))


# ---- fused slices


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("slices, n", [("q,v", 2), ("k", 1), ("q,k,v", 3)])
def test_slices_reach_peft_in_block_form_and_come_back_exactly(tmp_path, rslora, slices, n):
    from peft import PeftModel

    base, run = make(gpt2)
    r, d = 3, 12
    ours = randomise(apply_lora(copy.deepcopy(base), r=r, alpha=5, rslora=rslora, target_modules=[f"c_attn:{slices}"]))
    with pytest.warns(UserWarning, match="would move the other slices"):
        report = save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == n * r
    assert math.isclose(config["lora_alpha"], 5 * (math.sqrt(n) if rslora else n), rel_tol=1e-15)  # one rounding of a double
    # A layer: A (n r, d) and B (3 d, n r) stored, n r d + n d r trained; for q and v 8 r d and 4 r d.
    assert (report.stored, report.trained) == (2 * n * r * (d + 3 * d), 2 * 2 * n * r * d)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_same(out(run, theirs), out(run, ours))
    update = theirs.base_model.model.transformer.h[1].attn.c_attn.get_delta_weight("default").T  # (3 d, d)
    for place, letter in enumerate("qkv"):
        assert (update[place * d : (place + 1) * d].abs().max() == 0) == (letter not in slices)
    back = load_adapter(copy.deepcopy(base), tmp_path, trainable=True)
    for name, layer in lora_layers(ours).items():
        again = lora_layers(back)[name]
        assert torch.equal(layer.lora_A, again.lora_A) and torch.equal(layer.lora_B, again.lora_B)
        assert (layer.slices, layer.of, layer.r, layer.alpha, layer.scaling) == (again.slices, again.of, again.r, again.alpha, again.scaling)
    assert torch.equal(out(run, back), out(run, ours))
    load_adapter(ours, tmp_path)  # the model that carries it takes its own adapter back


# ---- loralib


def test_the_real_roberta_adapter_leaves_nothing_over():
    path = DATA / "adapters" / "roberta_base_lora_mnli.bin"
    if not path.exists():
        pytest.skip("LORA_LAB_DATA names no folder with adapters/roberta_base_lora_mnli.bin")
    import numpy
    from transformers import RobertaConfig, RobertaForSequenceClassification

    # RoBERTa-base but for its vocabulary, which no adapter touches and which is a third of its memory
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=50, max_position_embeddings=40, num_labels=3)).eval()
    with pytest.raises(AdapterError, match="alpha"):
        load_adapter(model, path)
    query = "roberta.encoder.layer.0.attention.self.query"
    W0 = model.get_submodule(query).weight.detach().numpy().copy()
    load_adapter(model, path, alpha=16)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    state_dict = lora_state_dict(model)
    assert len(stored) == len(state_dict) == 52
    assert sum(t.numel() for t in state_dict.values()) == 887_811
    for key, tensor in state_dict.items():
        assert torch.equal(stored[key.removeprefix("base_model.model.").replace("_A.weight", "_A").replace("_B.weight", "_B")], tensor)
    assert len(lora_layers(model)) == 24
    BA = stored[query + ".lora_B"].numpy() @ stored[query + ".lora_A"].numpy()
    x = numpy.random.default_rng(0).normal(size=(2, 768)).astype("float32")
    layer = model.get_submodule(query)
    expected = x @ (W0 + 16 / 8 * BA).T + layer.bias.detach().numpy()
    # float32 sums of 768 products of size 1e-1: about 1e-5
    numpy.testing.assert_allclose(layer(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-4)
    singular = numpy.linalg.svd(BA.astype(float), compute_uv=False)
    numpy.testing.assert_allclose(singular[:8], [3.81, 2.25, 1.37, 0.80, 0.73, 0.60, 0.36, 0.15], atol=0.006)  # as published
    assert (singular > 1e-5).sum() == 8
    assert torch.equal(model.classifier(torch.ones(1, 1, 768)), stored_head(stored, torch.ones(1, 768)))


def stored_head(stored, x):
    hidden = torch.tanh(nn.functional.linear(x, stored["classifier.dense.weight"], stored["classifier.dense.bias"]))
    return nn.functional.linear(hidden, stored["classifier.out_proj.weight"], stored["classifier.out_proj.bias"])


class Fused(nn.Module):
    def __init__(self, attention, output, tokens):
        super().__init__()
        self.tokens, self.attention, self.output = tokens, attention, output

    def forward(self, x):
        return self.output(torch.tanh(self.attention(self.tokens(x))))


@pytest.mark.parametrize("enable, slices", [([True, False, True], "q,v"), ([False, True, False], (1,)), ([True] * 3, None), ([False, True], [1])])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_loralib_state_dicts(tmp_path, enable, slices, bias):
    import loralib

    width = 4 * len(enable)
    theirs = Fused(
        loralib.MergedLinear(6, width, r=3, lora_alpha=5, enable_lora=enable),
        loralib.Linear(width, 2, r=3, lora_alpha=5),
        loralib.Embedding(24, 6, r=3, lora_alpha=5),
    )
    plain = Fused(nn.Linear(6, width), nn.Linear(width, 2), nn.Embedding(24, 6))
    loralib.mark_only_lora_as_trainable(theirs, bias=bias)
    base = {k: v.clone() for k, v in theirs.state_dict().items() if "lora_" not in k}
    plain.load_state_dict(base)
    randomise(theirs.train())
    path = tmp_path / "loralib.pt"
    torch.save(loralib.lora_state_dict(theirs, bias=bias), path)
    expected = theirs.train()(TOKENS)  # loralib merges in eval mode
    if slices is not None:
        before = snapshot(plain)
        with pytest.raises(AdapterError, match="does not say which"):
            load_adapter(plain, path, alpha=5)
        assert_untouched(plain, before)
    load_adapter(plain, path, alpha=5, slices=slices)
    assert_same(plain(TOKENS), expected)
    assert lora_layers(plain)["attention"].slices == tuple(i for i, on in enumerate(enable) if on)


# ---- a model that carries an adapter, and what trains


def test_the_same_adapter_is_taken_over_and_another_refused(tmp_path):
    base, run = make(toy)
    settings = {"r": 3, "target_modules": ["dense", "tokens"], "modules_to_save": ["head"], "bias": "lora_only", "rank_pattern": {"^dense": 2}}
    first = with_ours(base, settings)
    save_adapter(first, tmp_path)
    fresh = apply_lora(copy.deepcopy(base), alpha=11, **settings)
    parameters = [p for p in fresh.parameters() if p.requires_grad]
    load_adapter(fresh, tmp_path)
    assert torch.equal(out(run, fresh.eval()), out(run, first))
    assert [p for p in fresh.parameters() if p.requires_grad] and all(p.requires_grad for p in parameters)  # an optimizer's hold stays
    for change in ({"r": 4}, {"rslora": True}, {"modules_to_save": []}, {"target_modules": ["dense"]}, {"bias": "none"}):
        other = apply_lora(copy.deepcopy(base), alpha=5, **(settings | change))
        before = snapshot(other)
        with pytest.raises(AdapterError, match="already carries another adapter"):
            load_adapter(other, tmp_path)
        assert_untouched(other, before)
    merge(fresh)
    with pytest.raises(AdapterError, match="unmerge"):
        load_adapter(fresh, tmp_path)


def test_trainable_says_what_trains(tmp_path):
    base, _ = make(toy)
    settings = {"r": 3, "target_modules": ["dense"], "modules_to_save": ["head"], "bias": "lora_only"}
    saved = apply_lora(copy.deepcopy(base), **settings)
    save_adapter(saved, tmp_path)
    wanted = {n for n, p in saved.named_parameters() if p.requires_grad}
    for trainable in (False, True):
        model = load_adapter(copy.deepcopy(base), tmp_path, trainable=trainable)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == (wanted if trainable else set())
    model = load_adapter(load_adapter(copy.deepcopy(base), tmp_path), tmp_path, trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
    plain = remove_lora(model)
    assert all(p.requires_grad for p in plain.parameters())


def test_merged_compiled_and_shared(tmp_path):
    base, run = make(toy)
    ours = with_ours(base, {"r": 3, "target_modules": ["dense", "convolution"]})
    before = lora_state_dict(ours)
    merge(ours)
    assert all(torch.equal(v, before[k]) for k, v in lora_state_dict(ours).items())
    save_adapter(torch.compile(ours), tmp_path)
    assert load_file(tmp_path / TENSORS).keys() == before.keys()

    layer = nn.Linear(4, 4)
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    plain = copy.deepcopy(twice)
    randomise(apply_lora(twice, r=2, target_modules=["0", "2"]))
    with pytest.warns(UserWarning, match="several places"):
        save_adapter(twice, tmp_path)
    x = torch.randn(3, 4)
    back = load_adapter(plain, tmp_path)
    assert back[0] is back[2] and torch.equal(back(x), twice(x))


# ---- refusals


def test_saving_refuses_what_is_no_adapter(tmp_path):
    base, _ = make(toy)
    with pytest.raises(AdapterError, match="no LoRA layer"):
        save_adapter(base, tmp_path / "a")
    ours = with_ours(base, {"r": 3, "target_modules": ["dense"]})
    save_adapter(ours, tmp_path / "good")
    good = (tmp_path / "good" / TENSORS).read_bytes()
    layer = lora_layers(ours)["dense"]
    for value in (float("nan"), float("inf")):
        whole = layer.lora_B.detach().clone()
        with torch.no_grad():
            layer.lora_B[1, 1] = value
        with pytest.raises(AdapterError, match="NaN or infinite numbers in .*dense.lora_B"):
            save_adapter(ours, tmp_path / "good")
        with torch.no_grad():
            layer.lora_B.copy_(whole)
    kept = layer.lora_A
    layer.lora_A = nn.Parameter(torch.empty(0, 6))
    with pytest.raises(AdapterError, match="empty"):
        save_adapter(ours, tmp_path / "good")
    layer.lora_A = kept
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="is a file"):
        save_adapter(ours, tmp_path / "file")
    assert (tmp_path / "good" / TENSORS).read_bytes() == good
    assert not (tmp_path / "a").exists()
    with pytest.raises(AdapterError, match="itself"):
        save_adapter(lora_layers(ours)["dense"], tmp_path / "b")


def test_a_disk_that_lies_is_noticed(tmp_path, monkeypatch):
    ours = with_ours(make(toy)[0], {"r": 3, "target_modules": ["dense"]})
    save_adapter(ours, tmp_path)
    good = (tmp_path / TENSORS).read_bytes()
    randomise(ours)
    original = Path.write_bytes

    def lossy(self, data):
        return original(self, data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(Path, "write_bytes", lossy)
    with pytest.raises(AdapterError, match="damaged"):
        save_adapter(ours, tmp_path)
    monkeypatch.setattr(Path, "write_bytes", original)
    monkeypatch.setattr("safetensors.torch.save", lambda tensors, header: save({k: t + 1 for k, t in tensors.items()}, header))
    with pytest.raises(AdapterError, match="read back"):
        save_adapter(ours, tmp_path)
    assert (tmp_path / TENSORS).read_bytes() == good and {p.name for p in tmp_path.iterdir()} == {TENSORS, CONFIG}


def test_another_model_is_told_every_key_with_its_shape(tmp_path):
    save_adapter(with_ours(make(roberta)[0], {"r": 3, "target_modules": ["query"], "modules_to_save": ["classifier"]}), tmp_path)
    stored = load_file(tmp_path / TENSORS)
    other, _ = make(gpt2)
    before = snapshot(other)
    with pytest.raises(AdapterError) as caught:
        load_adapter(other, tmp_path)
    assert all(f"{key} {tuple(tensor.shape)}" in str(caught.value) for key, tensor in stored.items())
    assert_untouched(other, before)

    wider = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    narrow = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    save_adapter(with_ours(narrow, {"r": 2, "target_modules": ["0", "1"]}), tmp_path / "b", base_model_name="some/narrow-model")
    with pytest.raises(AdapterError) as caught:
        load_adapter(wider, tmp_path / "b")
    for line in ("0.lora_B.weight: (6, 2) in the file, (8, 2) here", "1.lora_A.weight: (2, 6) in the file, (2, 8) here", "some/narrow-model"):
        assert line in str(caught.value)

    longer, _ = make(gpt2)
    from transformers import GPT2Config, GPT2LMHeadModel

    save_adapter(with_ours(longer, {"r": 2, "target_modules": ["c_attn"]}), tmp_path / "c")
    longer = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=8, n_embd=12, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0))
    with pytest.raises(AdapterError, match=r"(?s)missing from the file \(4\).*h.3.attn.c_attn.lora_B.weight \(36, 2\)"):
        load_adapter(longer, tmp_path / "c")


FIELDS = {
    "use_dora": True, "lora_bias": True, "layer_replication": [[0, 4]], "trainable_token_indices": [1], "target_parameters": ["x"],
    "use_qalora": True, "megatron_config": {"a": 1}, "arrow_config": {"top_k": 2}, "a_field_of_2028": "on", "peft_type": "ADALORA",
    "init_lora_weights": "pissa", "r": 0, "lora_alpha": "16", "bias": "some", "use_rslora": "yes", "rank_pattern": {"dense": 0},
    "alpha_pattern": {"x|(?i)y": 2}, "target_modules": "(", "lora_dropout": 1.0, "modules_to_save": "head",
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_config_fields_that_change_the_function_are_named(tmp_path, name):
    base, run = make(toy)
    with_peft(base, {"r": 3, "target_modules": ["dense"]}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"a_field_of_2028": None, "another": False, "more": {}}))
    load_adapter(copy.deepcopy(base), tmp_path)  # null, false and empty say nothing
    (tmp_path / CONFIG).write_text(json.dumps(config | {name: FIELDS[name]}))
    before = snapshot(base)
    with pytest.raises(AdapterError, match=name):
        load_adapter(base, tmp_path)
    assert_untouched(base, before)


def test_alpha_that_contradicts_the_file_is_refused(tmp_path):
    base, _ = make(toy)
    save_adapter(with_ours(base, {"r": 3, "target_modules": ["dense"]}), tmp_path)
    load_adapter(copy.deepcopy(base), tmp_path, alpha=5)
    with pytest.raises(AdapterError, match=r"lora_alpha=5; asked for alpha=6"):
        load_adapter(base, tmp_path, alpha=6)


def test_a_config_from_another_adapter_is_noticed(tmp_path):
    base, run = make(toy)
    ours = with_ours(base, {"r": 3, "target_modules": ["dense"]})
    save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "a note", "task_type": "SEQ_CLS"}))
    load_adapter(copy.deepcopy(base), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 16}))
    with pytest.raises(AdapterError, match="lora_alpha: 16 in adapter_config.json, 5 in the tensors file"):
        load_adapter(base, tmp_path)
    (tmp_path / CONFIG).unlink()
    assert torch.equal(out(run, load_adapter(base, tmp_path)), out(run, ours))  # the tensors file is an adapter by itself


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"q.lora_A": Bomb()}, tmp_path / "adapter.bin")
    with pytest.raises(AdapterError, match="could run code"):
        load_adapter(make(toy)[0], tmp_path / "adapter.bin", alpha=1)
    assert not (tmp_path / "exploded").exists()


def test_what_is_not_there():
    for path in ("nowhere", "roberta-base", Path("nowhere") / "adapter.safetensors"):
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            load_adapter(make(toy)[0], path)


def test_a_folder_without_an_adapter_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="notes.txt"):
        load_adapter(make(toy)[0], tmp_path)


# ---- 200 damaged files


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def flip(data, rng, start=0, stop=None):
    at = rng.randrange(start, stop or len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def harmless(damaged, data):
    """Whether a foreign file still says exactly the same about its tensors: such damage is none."""
    try:
        a, b = header_of(damaged)[0], header_of(data)[0]
    except (ValueError, struct.error):
        return False
    return {k: v for k, v in a.items() if k != "__metadata__"} == {k: v for k, v in b.items() if k != "__metadata__"}


def damage(folder, kind, rng, ours):
    """Break the adapter in `folder` in the named way."""
    path = folder / TENSORS
    data = path.read_bytes()
    tensors = load_file(path)
    key = rng.choice(sorted(tensors))
    meta = {"format": "pt"}
    if kind == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flipped":
        # In a foreign file the numbers themselves carry no checksum, so only the header can be checked.
        damaged = data
        while damaged == data or (not ours and harmless(damaged, data)):
            damaged = flip(data, rng, stop=None if ours else header_of(data)[1])
        path.write_bytes(damaged)
    elif kind == "huge header":
        path.write_bytes(struct.pack("<Q", rng.choice([2**63, 2**40, 10**9, len(data), 0])) + data[8:])
    elif kind == "dtype":
        tensors[key] = tensors[key].to(rng.choice([torch.int32, torch.bool, torch.uint8, torch.int16]))
        save_file(tensors, path, meta)
    elif kind == "shape":
        t = tensors[key]
        wrong = [t[None], t.new_ones(5, 5, 5), t.new_ones(())] + ([t[:-1], t.flatten(), torch.cat([t, t]), t[:0]] if t.ndim else [])
        tensors[key] = rng.choice([w for w in wrong if w.shape != t.shape]).clone()
        save_file(tensors, path, meta)
    elif kind == "missing":
        del tensors[key]
        save_file(tensors, path, meta)
    elif kind == "missing pair":
        stem = key.rpartition("lora_")[0] or key
        save_file({k: v for k, v in tensors.items() if not k.startswith(stem)}, path, meta)
    elif kind == "other model":
        save_file({k.replace("dense", "fc").replace("tokens", "words"): v for k, v in tensors.items()}, path, meta)
    elif kind == "no file":
        path.write_bytes(rng.choice([b"", b"{}", b"<html>429 Too Many Requests</html>", bytes(rng.randrange(256) for _ in range(500)), b"\0" * 443]))
    elif kind == "nan":
        key = rng.choice([k for k, t in tensors.items() if t.is_floating_point()])
        tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice([float("nan"), float("inf")])
        save_file(tensors, path, meta)
    elif kind == "pickle":
        torch.save(tensors, folder / "adapter_model.bin")
        whole = (folder / "adapter_model.bin").read_bytes()
        (folder / "adapter_model.bin").write_bytes(whole[: rng.randrange(len(whole) - 100)])
        path.unlink()
    elif kind == "config":
        text = (folder / CONFIG).read_text()
        (folder / CONFIG).write_text(rng.choice([text[: rng.randrange(len(text) - 2)], "[]", "null", "", "[" * 5000, text.replace('"LORA"', '"IA3"')]))
    elif kind == "exchanged config":
        config = json.loads((folder / CONFIG).read_text())
        config |= rng.choice([{"r": 4}, {"modules_to_save": None, "bias": "all"}, {"target_modules": ["head", "dense", "tokens"]}])
        (folder / CONFIG).write_text(json.dumps(config))


KINDS = [
    "truncated", "flipped", "flipped", "huge header", "dtype", "shape", "missing", "missing pair", "other model", "no file", "nan", "pickle",
    "config", "exchanged config",
]  # fmt: skip


def test_200_damaged_files_are_refused_and_change_nothing(tmp_path):
    base, _ = make(toy)
    settings = {"r": 3, "target_modules": ["dense", "tokens", "convolution"], "modules_to_save": ["norm"]}
    whole = {True: tmp_path / "ours", False: tmp_path / "peft"}
    save_adapter(with_ours(base, settings), whole[True])
    with_peft(base, settings).save_pretrained(whole[False])
    plain, carrying = copy.deepcopy(base), with_ours(base, settings)
    before = {id(m): snapshot(m) for m in (plain, carrying)}
    rng = random.Random(5)
    refused = 0
    for round in range(200):
        ours, kind = bool(round % 2), KINDS[round // 2 % len(KINDS)]
        folder = tmp_path / f"{round}"
        folder.mkdir()
        for name in (TENSORS, CONFIG):
            (folder / name).write_bytes((whole[ours] / name).read_bytes())
        damage(folder, kind, rng, ours)
        model = carrying if round % 3 == 0 else plain
        try:
            load_adapter(model, folder)
        except AdapterError as error:
            assert len(str(error)) > 40, (kind, error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{kind}, ours={ours}: {type(error).__name__}: {error}") from error
        else:
            raise AssertionError(f"round {round}: {kind} passed, ours={ours}")
        assert_untouched(model, before[id(model)])
    assert refused == 200


def test_every_byte_of_our_file_counts(tmp_path):
    base, _ = make(toy)
    save_adapter(with_ours(base, {"r": 1, "target_modules": ["head"]}), tmp_path)
    path = tmp_path / TENSORS
    data = path.read_bytes()
    for at in range(0, len(data), 3):  # each third byte, to save time
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(AdapterError):
            load_adapter(base, path)


def test_layers_that_can_carry_no_adapter_are_refused(tmp_path):
    """What apply_lora refuses is refused from a file, too: a layer that is never called, one of two places, a grouped convolution."""
    shared = nn.Linear(4, 4)
    cases = {
        "never calls": (nn.Sequential(nn.MultiheadAttention(4, 2)), "0.out_proj", (2, 4), (4, 2)),
        "same layer as": (nn.Sequential(shared, nn.Tanh(), shared), "0", (2, 4), (4, 2)),
        "grouped": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0", (2, 2, 3, 3), (4, 2, 1, 1)),
        "is a LayerNorm": (nn.Sequential(nn.LayerNorm(4)), "0", (2, 4), (4, 2)),
    }
    for message, (model, name, A, B) in cases.items():
        tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(A), f"base_model.model.{name}.lora_B.weight": torch.ones(B)}
        save_file(tensors, tmp_path / "one.safetensors")
        before = snapshot(model)
        with pytest.raises(AdapterError, match=message):
            load_adapter(model, tmp_path / "one.safetensors", alpha=4)
        assert_untouched(model, before)
