"""`diagnose`: every patient of the clinic and other broken models are recognised, healthy ones of every make raise no alarm, and none is changed."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab import apply_lora, clinic, diagnose, gradient_report, lora_disabled, merge, reload_parity, step0_identity
from lora_lab.diagnosis import CAUSES, adapter_coverage, adapters

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    yield
    torch.set_num_threads(before)


# ---- models ---------------------------------------------------------------------------------------------------------

IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "labels": IDS}
LABELLED = {"input_ids": IDS, "labels": torch.tensor([0, 2])}
PAIR = (torch.randn(20, 12, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 5)
IMAGES = (torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(6) % 5)
SEQUENCE = (torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(4)), torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(5)))


def mlp():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))


def gpt2(layers=2, **more):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0, **more))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    return BertForSequenceClassification(
        BertConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, max_position_embeddings=16, num_labels=3)
    )


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.norm, self.c2, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(F.relu(self.c2(F.relu(self.norm(self.c1(x))))).mean((2, 3)))


def encoder():
    return nn.Sequential(nn.Linear(12, 16), nn.TransformerEncoderLayer(16, 2, 20, batch_first=True), nn.Linear(16, 5))


def trained(model, batch, steps=3, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss if isinstance(batch, dict) else F.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def ours(model=None, targets=("0", "3"), **more):
    return apply_lora(mlp() if model is None else model, 3, 5, list(targets), **more)


def by_peft(model, **more):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": ["c_attn"]} | more)))


def merged(model):
    (model.merge_adapter if hasattr(model, "merge_adapter") else lambda: merge(model))()
    return model.eval()


def checkpointed(adapt, reentrant):
    model = gpt2(use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return trained(adapt(model), TEXT)


def loaded(tmp_path):
    from peft import PeftModel

    trained(by_peft(gpt2()), TEXT).save_pretrained(tmp_path)
    return PeftModel.from_pretrained(gpt2(), tmp_path)


def second_adapter(tmp_path):
    from peft import LoraConfig

    model = trained(by_peft(gpt2()), TEXT)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["c_attn"]))
    return model


class LoralibLike(nn.Linear):
    """A layer that is its own base, as in loralib."""

    def __init__(self, inputs, out, r=4, alpha=6):
        super().__init__(inputs, out)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r, inputs) / 4), nn.Parameter(torch.zeros(out, r))
        self.r, self.lora_alpha = r, alpha
        self.weight.requires_grad_(False), self.bias.requires_grad_(False)

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T * self.lora_alpha / self.r


class TwoLinears(nn.Module):
    """Factors that are bias-free nn.Linears, as in kohya's scripts."""

    def __init__(self, base, r=3, alpha=5):
        super().__init__()
        self.linear, self.scale = base, alpha / r
        self.lora_down, self.lora_up = nn.Linear(base.in_features, r, bias=False), nn.Linear(r, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x):
        return self.linear(x) + self.scale * self.lora_up(self.lora_down(x))


class Columns(nn.Module):
    """Factors stored the other way: A (in, r), B (r, out). kind: which fault it has, if any."""

    def __init__(self, base, kind=""):
        super().__init__()
        self.original, self.kind, self.rank, self.alpha = base, kind, 3, 10
        self.down, self.up = nn.Parameter(torch.randn(base.in_features, 3) / 4), nn.Parameter(torch.zeros(3, base.out_features))
        if kind == "B is not zero":
            nn.init.normal_(self.up)

    def forward(self, x):
        y, scale = self.original(x), self.alpha if self.kind == "not divided" else self.alpha / self.rank
        if self.kind == "bypassed":
            return y
        if self.kind == "drops":
            x = F.dropout(x, 0.2)
        h = x @ self.down
        if self.kind == "activation":
            h = F.gelu(h)
        update = scale * h @ self.up
        if self.kind == "doubled":
            update = 2 * update
        return y + (update.detach() if self.kind == "detached" else update)


def own(layer, steps=0, freeze=True, **more):
    model = mlp().requires_grad_(not freeze)
    for k in (0, 3):
        model[k] = layer(model[k], **more)
    return trained(model, PAIR, steps) if steps else model


HEALTHY = {
    "ours, fresh": lambda tmp: (ours(), PAIR),
    "ours, trained": lambda tmp: (trained(ours(), PAIR), PAIR),
    "ours, fresh and in eval": lambda tmp: (ours().eval(), PAIR),
    "ours, merged": lambda tmp: (merged(trained(ours(), PAIR)), PAIR),
    "ours, slices of a fused layer": lambda tmp: (trained(ours(gpt2(), ["c_attn:q,v"]), TEXT), TEXT),
    "ours, Conv1D with dropout": lambda tmp: (trained(ours(gpt2(), ["c_attn", "c_proj"], dropout=0.1), TEXT), TEXT),
    "ours, tied embedding": lambda tmp: (trained(ours(gpt2(), ["wte"], allow_tied=True), TEXT), TEXT),
    "ours, conv2d and batch norm": lambda tmp: (trained(ours(Convolutions(), ["c1", "c2"]), IMAGES), IMAGES),
    "ours, rslora": lambda tmp: (trained(ours(rslora=True), PAIR), PAIR),
    "ours, bf16 base": lambda tmp: (trained(ours(gpt2().bfloat16(), ["c_attn"], adapter_dtype=torch.float32), TEXT), TEXT),
    "ours, float64": lambda tmp: (ours(mlp().double()), (PAIR[0].double(), PAIR[1])),
    "ours, a head that is saved": lambda tmp: (trained(ours(modules_to_save=["5"]), PAIR), PAIR),
    "ours, all biases": lambda tmp: (trained(ours(bias="all"), PAIR), PAIR),
    "ours, inside an encoder layer": lambda tmp: (apply_lora(encoder(), 3, 5), SEQUENCE),
    "ours, reentrant checkpointing": lambda tmp: (checkpointed(lambda m: ours(m, ["c_attn"]), True), TEXT),
    "peft, fresh": lambda tmp: (by_peft(gpt2()), TEXT),
    "peft, trained": lambda tmp: (trained(by_peft(gpt2()), TEXT), TEXT),
    "peft, merged": lambda tmp: (merged(trained(by_peft(gpt2()), TEXT)), TEXT),
    "peft, loaded for use": lambda tmp: (loaded(tmp), TEXT),
    "peft, rslora": lambda tmp: (trained(by_peft(gpt2(), use_rslora=True), TEXT), TEXT),
    "peft, DoRA": lambda tmp: (trained(by_peft(gpt2(), use_dora=True), TEXT), TEXT),
    "peft, DoRA, fresh": lambda tmp: (by_peft(gpt2(), use_dora=True), TEXT),
    "peft, bias lora_only": lambda tmp: (trained(by_peft(gpt2(), bias="lora_only"), TEXT), TEXT),
    "peft, a bias in B": lambda tmp: (trained(by_peft(gpt2(), lora_bias=True), TEXT), TEXT),
    "peft, some blocks": lambda tmp: (trained(by_peft(gpt2(4), layers_to_transform=[1, 2]), TEXT), TEXT),
    "peft, ranks by pattern": lambda tmp: (trained(by_peft(gpt2(3), rank_pattern={"h.0.attn.c_attn": 5}), TEXT), TEXT),
    "peft, classifier": lambda tmp: (trained(by_peft(bert(), target_modules=["query", "value"], task_type="SEQ_CLS"), LABELLED), LABELLED),
    "peft, modules_to_save": lambda tmp: (
        trained(by_peft(bert(), target_modules=["query"], modules_to_save=["classifier"]), LABELLED), LABELLED),
    "peft, checkpointing": lambda tmp: (checkpointed(by_peft, False), TEXT),
    "peft, embedding of places": lambda tmp: (trained(by_peft(gpt2(), target_modules=["wpe", "c_attn"]), TEXT), TEXT),
    "peft, conv2d": lambda tmp: (trained(by_peft(Convolutions(), target_modules=["c1", "c2"]), IMAGES), IMAGES),
    "peft, all linear": lambda tmp: (trained(by_peft(gpt2(), target_modules="all-linear"), TEXT), TEXT),
    "peft, PiSSA": lambda tmp: (by_peft(gpt2(), init_lora_weights="pissa"), TEXT),
    "peft, bf16": lambda tmp: (trained(by_peft(gpt2().bfloat16()), TEXT), TEXT),
    "peft, two adapters": lambda tmp: (second_adapter(tmp), TEXT),
    "own, loralib's kind": lambda tmp: (trained(nn.Sequential(LoralibLike(12, 16), nn.ReLU(), LoralibLike(16, 5)), PAIR), PAIR),
    "own, two linears": lambda tmp: (own(TwoLinears, steps=20), PAIR),
    "own, columns": lambda tmp: (own(Columns, steps=20), PAIR),
}  # fmt: skip


class Gate(Columns):
    """The scaling is learned."""

    def __init__(self, base):
        super().__init__(base)
        self.gate = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.original(x) + self.gate * (x @ self.down @ self.up)


class Pair(nn.Module):
    """A and B in a module of their own beside the base, as a well-known book has them."""

    def __init__(self, base, undivided=False):
        super().__init__()
        self.linear, self.lora, self.undivided = base, nn.Module(), undivided
        self.lora.A, self.lora.B = nn.Parameter(torch.randn(base.in_features, 3) / 4), nn.Parameter(torch.zeros(3, base.out_features))
        self.lora.r, self.lora.alpha = 3, 10

    def forward(self, x):
        return self.linear(x) + (10 if self.undivided else 10 / 3) * (x @ self.lora.A @ self.lora.B)


class Attention(nn.Module):
    """The factors lie among the four projections, and the module is no wrapper around one of them."""

    def __init__(self, d=12, r=3):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(r, d) / 4), nn.Parameter(torch.zeros(d, r))

    def forward(self, x):
        q = self.q(x) + x @ self.lora_A.T @ self.lora_B.T
        return self.out(F.scaled_dot_product_attention(q, self.k(x), self.v(x)))


class Experts(nn.Module):
    """One of the experts is never asked; in training a block is skipped by chance (layer drop)."""

    def __init__(self):
        super().__init__()
        self.experts, self.out = nn.ModuleList(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.where(x[:, :1] > 0, self.experts[0](x), self.experts[1](x))
        return self.out(x if self.training and torch.rand(()) < 2 else F.relu(self.experts[2](x)))


class Sampling(nn.Module):
    """Random in eval mode by itself, as a variational autoencoder is."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x + 0.01 * torch.randn_like(x))


def variant(name):
    from lora_lab.zoo import variants

    return variants.add_variant(mlp(), getattr(variants, name), ["0", "3"], r=3, alpha=5)


def with_lr(rate, scheduled=False):
    model = ours()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 10)
    return model, PAIR, {"optimizer": optimizer}


def peft_other(kind, base, **settings):
    import peft

    model = peft.get_peft_model(base, getattr(peft, kind)(**settings))
    return model


UNUSUAL = {
    "a scaling that is learned": lambda: (own(Gate, steps=20), PAIR, {"trained": True}),
    "A and B in a module of their own": lambda: (own(Pair, steps=20), PAIR, {"trained": True, "base": mlp()}),
    "factors among four projections": lambda: (trained(nn.Sequential(Attention(), nn.Linear(12, 5).requires_grad_(False)), PAIR), PAIR, {}),
    "an expert that is not asked, a block that is skipped": lambda: (apply_lora(Experts(), 3, 5, r"experts\.\d"), PAIR, {}),
    "a base that is random": lambda: (trained(ours(Sampling(), ["net.0", "net.3"]), PAIR).eval(), PAIR, {"trained": True}),
    "warm-up at its first step": lambda: with_lr(0.1, scheduled=True),
    "merged, and not yet in eval mode": lambda: (merged(trained(by_peft(gpt2()), TEXT)).train(), TEXT, {}),
    "peft, PiSSA at its start": lambda: (by_peft(gpt2(), init_lora_weights="pissa"), TEXT, {"trained": False}),
    "peft, OLoRA at its start, base known": lambda: (
        by_peft(mlp(), init_lora_weights="olora", target_modules=["0", "3"]), PAIR, {"trained": False, "base": mlp()}),
    "ours, PiSSA at its start": lambda: (variant("PiSSALinear"), PAIR, {"trained": False}),
    "ours, PiSSA trained, base known": lambda: (trained(variant("PiSSALinear"), PAIR, 20), PAIR, {"trained": True, "base": mlp()}),
    "peft, AdaLoRA": lambda: (peft_other("AdaLoraConfig", gpt2(), init_r=4, target_r=2, total_step=9, tinit=1, tfinal=1, target_modules=["c_attn"]), TEXT, {}),
    "peft, LoHa": lambda: (peft_other("LoHaConfig", mlp(), r=2, target_modules=["0"]), PAIR, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_and_healthy_raises_no_alarm(name):
    model, batch, known = UNUSUAL[name]()
    found = diagnose(model, batch, **known)
    assert found.causes == () and found.skipped == (), str(found)


@pytest.mark.parametrize("name", ["DoRALinear", "LoRAXSLinear", "AdaLoRALinear"])
def test_of_a_variant_it_says_only_that_a_file_would_be_refused(name):
    found = diagnose(variant(name), PAIR, trained=False)
    assert found.causes == () and found.skipped == (), str(found)
    said = [note for note in found.notes if note.cause == "not_saved"]
    assert len(said) == (name == "DoRALinear") and all("save_adapter refuses" in note.seen and "state_dict" in note.advice for note in said), str(found)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_raises_no_alarm(name, tmp_path):
    model, batch = HEALTHY[name](tmp_path)
    found = diagnose(model, batch)
    assert found.causes == () and found.skipped == (), str(found)
    assert adapters(model), "the adapter was not even recognised"
    assert str(found) and found._repr_html_()


# ---- what is broken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("cause", clinic.DIGITS)
def test_the_patients_are_recognised(cause, seed):
    visit = clinic.admit(cause, seed)
    assert diagnose(visit.model, visit.batch, **visit.known).causes == (cause,)


@pytest.mark.parametrize("cause", clinic.GPT2)
def test_the_gpt2_patients_are_recognised(cause):
    visit = clinic.admit(cause, 0, steps=2)
    assert diagnose(visit.model, visit.batch, **visit.known).causes == (cause,)


def test_the_twin_is_healthy_whatever_its_owner_hands_over():
    visit = clinic.healthy(1)
    optimizer = torch.optim.AdamW([p for p in visit.model.parameters() if p.requires_grad], lr=1e-2)
    found = diagnose(visit.model, visit.batch, optimizer=optimizer, reload=copy.deepcopy(visit.model), **visit.known)
    assert found.healthy and not found.skipped, str(found)


def wrong_optimizer():
    model, other = own(Columns), own(Columns)
    return model, PAIR, {"optimizer": torch.optim.Adam([p for p in other.parameters() if p.requires_grad], 1e-3)}


def head_thawed():
    model = by_peft(bert(), target_modules=["query", "value"])
    model.base_model.model.classifier.requires_grad_(True)
    return trained(model, LABELLED), LABELLED, {}


def head_lost():
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model, batch, _ = head_thawed()
    state = get_peft_model_state_dict(model)

    def reload():
        other = by_peft(bert(), target_modules=["query", "value"])
        nn.init.normal_(other.base_model.model.classifier.weight)
        set_peft_model_state_dict(other, state)
        return other

    model.base_model.model.classifier.requires_grad_(False)  # so that only the reload can tell
    return model, batch, {"reload": reload}


def baked(model, times):
    """ΔW into the base weights, `times` times, while the layers go on adding it."""
    with torch.no_grad():
        for a in adapters(model):
            a.base.weight += times * a.to_base_layout(a.delta() * a.scaling).float()
    return model


def other_active():
    model = second_adapter(None)
    model.set_adapter("other")
    return model, TEXT, {}


def switched_off():
    model = trained(by_peft(gpt2()), TEXT)
    model.base_model.disable_adapter_layers()
    return model, TEXT, {}


def no_input_gradients():
    model = by_peft(gpt2(use_cache=False))
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for module in model.modules():
        module._forward_hooks.clear()  # what newer versions of transformers do by themselves
    return model.train(), TEXT, {}


def referred_to_elsewhere():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(12, 16), nn.Linear(16, 5)
            self.path = [self.fc]

        def forward(self, x):
            return self.out(F.relu(self.path[0](x)))

    return apply_lora(Remembers(), 3, 5, ["fc"]), PAIR, {}


def tied_and_merged():
    model = by_peft(gpt2(), target_modules=["lm_head"])
    return merged(trained(model, TEXT)), TEXT, {}


def frozen_B():
    model = own(Columns)
    for k in (0, 3):
        model[k].up.requires_grad_(False)
    return model, PAIR, {}


def everything_frozen():
    return ours().requires_grad_(False), PAIR, {}


def thawed():
    model = by_peft(gpt2())
    model.requires_grad_(True)
    return model, TEXT, {}


def with_nan():
    model = trained(ours(), PAIR)
    model[0].lora_B.data[0, 0] = torch.nan
    return model, PAIR, {}


def one_eval_missed():
    model = trained(ours(dropout=0.3), PAIR).eval()
    model[0].train()
    return model, PAIR, {}


def wrapped_again():
    from peft import LoraConfig, PeftModel

    return PeftModel(trained(by_peft(gpt2()), TEXT), LoraConfig(r=2, target_modules=["c_attn"])), TEXT, {}


def half():
    return ours(mlp().half()), (PAIR[0].half(), PAIR[1]), {}


class Cut(Columns):
    """W0 x under no_grad, so that the layers in front learn through B A alone."""

    def forward(self, x):
        with torch.no_grad():
            y = self.original(x)
        return y + 10 / 3 * (x @ self.down @ self.up)


class Baseless(Columns):
    def forward(self, x):
        return 10 / 3 * (x @ self.down @ self.up)


class BiasTwice(Columns):
    def forward(self, x):
        return super().forward(x) + self.original.bias


class Random(Columns):
    def forward(self, x):
        return super().forward(x) + 0.01 * torch.randn(self.original.out_features)


def one_file_twice():
    model = trained(by_peft(gpt2()), TEXT)
    model.add_adapter("copy", model.peft_config["default"])
    values = model.state_dict()
    model.load_state_dict({name: values[name.replace(".copy.", ".default.")] for name in values})
    model.base_model.set_adapter(["default", "copy"])
    return model.eval(), TEXT, {}


def training_while_merged():
    model = trained(by_peft(gpt2()), TEXT)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    return merged(model).train(), TEXT, {"optimizer": optimizer}


def another_base_the_next_day():
    model, torch_seed = own(Columns, steps=20), torch.get_rng_state()
    other = _reset(own(Columns))
    for k in (0, 3):
        other[k].original.reset_parameters()
    other.load_state_dict({n: p for n, p in model.state_dict().items() if "down" in n or "up" in n}, strict=False)
    torch.set_rng_state(torch_seed)
    return model.eval(), PAIR, {"reload": other.eval()}


BROKEN = {
    "W0 x under no_grad": ("no_gradient", lambda: (own(Cut), PAIR, {})),
    "the base forgotten": ("formula", lambda: (own(Baseless), PAIR, {"trained": False})),
    "the bias twice": ("formula", lambda: (own(BiasTwice), PAIR, {})),
    "a layer that adds noise": ("dropout", lambda: (own(Random), PAIR, {})),
    "alpha alone, in a module of its own": ("scaling", lambda: (own(Pair, undivided=True), PAIR, {})),
    "one file under two names": ("merged_twice", one_file_twice),
    "a typo in a rank pattern": ("target_missed", lambda: (by_peft(gpt2(), rank_pattern={"c_atn": 8}), TEXT, {})),
    "all labels masked": ("not_finite", lambda: (by_peft(gpt2()), TEXT | {"labels": torch.full_like(IDS, -100)}, {})),
    "a learning rate of 0": ("optimizer", lambda: with_lr(0.0)),
    "a learning rate a hundred times too large": ("step_too_large", lambda: (ours(), PAIR, {"lr": 5.0})),
    "training while merged": ("no_gradient", training_while_merged),
    "frozen weights of another base": ("other_base", another_base_the_next_day),
    "A and B on a fresh base, base known": ("starts_elsewhere", lambda: (apply_lora(_louder(mlp()), 3, 5, ["0"]), PAIR, {"trained": False, "base": mlp()})),
    "not divided by r": ("scaling", lambda: (own(Columns, kind="not divided"), PAIR, {})),
    "twice in forward": ("scaling", lambda: (own(Columns, kind="doubled"), PAIR, {})),
    "functional dropout": ("dropout", lambda: (own(Columns, kind="drops"), PAIR, {})),
    "one layer in training mode": ("dropout", one_eval_missed),
    "an activation between": ("formula", lambda: (own(Columns, kind="activation"), PAIR, {})),
    "detached": ("no_gradient", lambda: (own(Columns, kind="detached"), PAIR, {})),
    "never used": ("no_effect", lambda: (own(Columns, kind="bypassed"), PAIR, {})),
    "trained, and still zero": ("no_effect", lambda: (own(Columns), PAIR, {"trained": True})),
    "fresh, and not zero": ("starts_elsewhere", lambda: (own(Columns, kind="B is not zero"), PAIR, {"trained": False})),
    "the base trains": ("base_trains", lambda: (own(Columns, freeze=False), PAIR, {})),
    "everything thawed in peft": ("base_trains", thawed),
    "the optimizer of a copy": ("optimizer", wrong_optimizer),
    "a head thawed behind peft's back": ("not_saved", head_thawed),
    "a head that the file lacks": ("not_saved", head_lost),
    "baked in and beside, base known": ("merged_twice", lambda: (baked(trained(ours(), PAIR, 20), 1), PAIR, {"base": mlp()})),
    "baked in and beside, base unknown": ("merged_twice", lambda: (baked(trained(by_peft(gpt2()), TEXT, 40), 1), TEXT, {})),
    "loaded onto a merged base": ("merged_twice", lambda: (m := trained(ours(), PAIR, 20), PAIR, {"reload": baked(copy.deepcopy(m), 1)})),
    "loaded onto another base": ("other_base", lambda: (trained(ours(), PAIR), PAIR, {"base": nn.Sequential(*[copy.deepcopy(m) for m in _reset(mlp())])})),
    "a typo in the targets": ("target_missed", lambda: (by_peft(gpt2(), target_modules=["c_attn", "c_porj"]), TEXT, {})),
    "another adapter is active": ("inactive", other_active),
    "all adapters switched off": ("inactive", switched_off),
    "checkpointing without input gradients": ("checkpointing", no_input_gradients),
    "the old layer is still used": ("never_called", referred_to_elsewhere),
    "peft under the fast path": ("never_called", lambda: (by_peft(encoder(), target_modules=["linear1", "linear2"]), SEQUENCE, {})),
    "a tied head, merged": ("tied", tied_and_merged),
    "B frozen at zero": ("half_frozen", frozen_B),
    "everything frozen": ("nothing_trains", everything_frozen),
    "NaN": ("not_finite", with_nan),
    "peft on peft": ("nested", wrapped_again),
    "factors in float16": ("float16", half),
}


def _louder(model):
    """Another head than the one in `base`, which no adapter stands on."""
    with torch.no_grad():
        model[5].weight *= 2
    return model


def _reset(model):
    for module in model:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


@pytest.mark.parametrize("name", BROKEN)
def test_other_broken_models_are_recognised(name):
    cause, make = BROKEN[name]
    model, batch, known = make()
    found = diagnose(model, batch, **known)
    assert found.causes == (cause,), str(found)
    assert all(f.advice for f in found.problems), "a problem comes with something to try"


def test_every_cause_has_a_case():
    seen = {cause for cause, _ in BROKEN.values()} | set(clinic.DIGITS) | set(clinic.GPT2)
    assert seen == set(CAUSES)
    assert sorted(clinic.BEDS.values()) == sorted((*clinic.DIGITS, *clinic.GPT2)) and len(clinic.BEDS) == 13


def test_a_model_without_an_adapter_is_told_so():
    found = diagnose(mlp(), PAIR)
    assert found.healthy and [note.cause for note in found.notes] == ["no_effect"]
    with pytest.raises(ValueError, match="no adapter"):
        step0_identity(mlp(), PAIR)
    with pytest.raises(ValueError, match="A to M"):
        clinic.admit("Z")


def test_a_batch_that_does_not_fit_is_no_verdict():
    found = diagnose(ours(), torch.ones(2, 99))
    assert found.skipped and "not everything could be examined" in str(found)


# ---- nothing is changed ---------------------------------------------------------------------------------------------


def snapshot(model):
    return {
        "values": {n: t.detach().clone() for n, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())},
        "places": {n: (id(p), p.data_ptr(), p._version) for n, p in model.named_parameters()},
        "grads": {n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: [list(getattr(m, h)) for h in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")] for n, m in model.named_modules()},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "random": (torch.get_rng_state(), np.random.get_state()[1], random.getstate()),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) or (one.shape == other.shape and torch.equal(one.isnan(), other.isnan()))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("name", ["ours, trained", "ours, merged", "ours, conv2d and batch norm", "peft, trained", "peft, merged", "peft, DoRA",
                                  "peft, modules_to_save", "ours, reentrant checkpointing", "own, loralib's kind"])  # fmt: skip
def test_nothing_is_changed(name, tmp_path):
    model, batch = HEALTHY[name](tmp_path)
    before = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    diagnose(model, batch, optimizer=optimizer, reload=copy.deepcopy(model))
    after = snapshot(model)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert not optimizer.state
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_nothing_is_changed_when_a_probe_fails():
    class Breaks(Columns):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("out of order")
            return super().forward(x)

    model = own(Breaks)
    before = snapshot(model)
    found = diagnose(model, PAIR)
    assert any("out of order" in text for text in found.skipped)
    assert [key for key in before if not same(before[key], snapshot(model)[key])] == []


# ---- the probes, beside an oracle -----------------------------------------------------------------------------------


def test_the_effect_is_that_of_switching_off():
    model, x = trained(ours(), PAIR).eval(), PAIR[0]
    with torch.no_grad():
        on = model(x)
        with lora_disabled(model):
            off = model(x)
    probe = step0_identity(model, PAIR)
    assert probe.effect == pytest.approx(float((on - off).abs().max() / off.abs().max()), rel=1e-5)
    assert probe.spread == 0 and not probe.fresh
    assert step0_identity(ours(), x).effect == 0


def test_gradients_are_autograds():
    model = trained(ours(), PAIR).eval()
    model[2].p = 0.0  # both passes without chance
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(F.cross_entropy(model(PAIR[0]), PAIR[1]), list(named.values()))
    report = gradient_report(model, PAIR)
    for name, grad in zip(named, expected, strict=True):
        assert report.norms[name] == pytest.approx(float(grad.norm()), rel=1e-4)
        assert report.state[name] == "moves"


def test_coverage_counts_what_peft_adapted():
    cover = adapter_coverage(by_peft(gpt2()))
    assert [name.rpartition("transformer.")[2] for name in cover.matched] == ["h.0.attn.c_attn", "h.1.attn.c_attn"]
    assert len(cover.unmatched) == 7  # of each block c_proj twice and c_fc, and the head
    assert cover.trainable == 2 * 3 * (24 + 72)


def test_parity_names_what_differs():
    model = trained(ours(), PAIR)
    twin = copy.deepcopy(model)
    assert reload_parity(model, PAIR, twin).difference == 0
    with torch.no_grad():
        twin[5].bias += 1
    parity = reload_parity(model, PAIR, lambda: twin)
    assert set(parity.tensors) == {"5.bias"} and parity.difference > 0
    with pytest.raises(TypeError, match="reload"):
        reload_parity(model, PAIR, lambda: {})


def test_the_picture_of_the_ward():
    from lora_lab.view import plot_ward

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_ward({"A": ([3.0, 2.0, float("nan")], [3.0, 1.0, 0.5]), "B": ([2.0], [2.0, 1.0])}, title="two beds")
        figure.canvas.draw()
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in drawn] == ["A", "B"]
    twin, own = drawn[0].get_lines()[:2]
    assert twin.get_ydata() == pytest.approx([3.0, 2.0, 1.5])  # means of the steps so far
    assert len(own.get_xdata()) == 2  # the step that is no number is left out
    with pytest.raises(ValueError, match="at least one"):
        plot_ward({})
