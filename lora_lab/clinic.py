"""The broken-adapter clinic: thirteen models with an adapter that somebody got wrong, and what the owner says about each.

Every case is one that people bring to public trackers. Ten are small digit classifiers with home-made LoRA layers (whatever this lab's
`apply_lora` refuses, a layer of one's own does not), three are GPT-2 with peft or a home-made Conv1D layer. Each patient has a healthy twin: the
same base, data, seed and settings, done right; where the training itself was right, the twin's curve is the patient's own.

    visit = admit("both_zero", seed=0)
    visit.losses, visit.twin          the training curve, and the twin's
    visit.model, visit.batch          what to examine
    visit.known                       what the owner can hand over: keyword arguments for `lora_lab.diagnose`
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapt import apply_lora
from .data import Batches, digits
from .layers import LoRALinear
from .train import evaluate, train

STEPS = 150
R, ALPHA = 4, 16
TARGETS = ("fc1", "fc2")


@dataclass(frozen=True, eq=False)
class Visit:
    """One patient at the clinic. complaint: the owner's words; losses, twin: loss per step, its own and the healthy twin's; scores: what else the owner
    saw, name -> number; known: further arguments for `diagnose`."""

    complaint: str
    model: nn.Module
    batch: object
    losses: list[float]
    twin: list[float]
    scores: dict[str, float] = field(default_factory=dict)
    known: dict = field(default_factory=dict)


# ---- the digit patients ---------------------------------------------------------------------------------------------


class HomeMade(nn.Module):
    """A LoRA layer as many people write it: y = W0 x + b + alpha / r · B A x. The faults are its subclasses."""

    def __init__(self, base: nn.Linear, r: int = R, alpha: float = ALPHA):
        super().__init__()
        self.base, self.r, self.alpha = base, r, alpha
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def factor(self) -> float:
        return self.alpha / self.r

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.factor() * (x @ self.lora_A.T @ self.lora_B.T)


class BothZero(HomeMade):
    def __init__(self, base, r=R, alpha=ALPHA):
        super().__init__(base, r, alpha)
        nn.init.zeros_(self.lora_A)


class Unscaled(HomeMade):
    def factor(self):
        return 1.0


class AlwaysDropping(HomeMade):
    def forward(self, x):
        return self.base(x) + self.factor() * (F.dropout(x, 0.3) @ self.lora_A.T @ self.lora_B.T)


class Checkpointed(nn.Module):
    """Recomputes its part in the backward pass, the reentrant way: what goes in must require a gradient, and pixels don't."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.part, x, use_reentrant=True) if self.training else self.part(x)


def network(classes: int = 10) -> nn.Sequential:
    """64 pixels -> 32 -> 32 -> classes."""
    return nn.Sequential(
        OrderedDict(fc1=nn.Linear(64, 32), act1=nn.ReLU(), fc2=nn.Linear(32, 32), act2=nn.ReLU(), head=nn.Linear(32, classes))
    )


@cache
def _pretrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    for _ in train(model, Batches(*digits(seed=seed).train, 64, seed=seed), steps=400, lr=3e-3, device="cpu"):
        pass
    return model.requires_grad_(False)


def base_model(seed: int = 0) -> nn.Module:
    """The network of the digit patients, trained on upright digits. A new object each time."""
    return copy.deepcopy(_pretrained(seed))


@cache
def turned(seed: int = 0):
    """What they are adapted to: digits lying on their side."""
    return digits(rotation=90, seed=seed)


def adapted(model: nn.Module, layer: type[nn.Module] = HomeMade, r: int = R, alpha: float = ALPHA, seed: int = 0) -> nn.Module:
    """The model with home-made layers in the places of its two hidden ones."""
    torch.manual_seed(seed)
    for name in TARGETS:
        setattr(model, name, layer(getattr(model, name), r, alpha))
    return model


def fit(model: nn.Module, seed: int = 0, lr: float = 1e-2, optimizer: torch.optim.Optimizer | None = None, steps: int = STEPS) -> list[float]:
    """The loss of each step. The optimizer is AdamW on what requires a gradient, unless another is brought along."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    stream, losses = iter(Batches(*turned(seed).train, 64, seed=seed)), []
    model.train()
    torch.manual_seed(seed)
    for _ in range(steps):
        x, y = next(stream)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            losses += [losses[-1]] * (steps - len(losses))
            break
    return losses


def accuracy(model: nn.Module, seed: int = 0) -> float:
    """On the test images that lie on their side, in eval mode."""
    return evaluate(model, [turned(seed).test], "cpu")


@cache
def _healthy(seed: int, r: int = R, alpha: float = ALPHA) -> tuple[nn.Module, tuple[float, ...]]:
    model = adapted(base_model(seed), r=r, alpha=alpha, seed=seed)
    losses = fit(model, seed)
    return model.eval(), tuple(losses)


def healthy(seed: int = 0) -> Visit:
    """The twin: nothing is wrong with it."""
    model, losses = _healthy(seed)
    model = copy.deepcopy(model)
    scores = {"frozen base": accuracy(base_model(seed), seed), "after training": accuracy(model, seed)}
    return Visit("It works. I only want to be sure.", model, _batch(seed), list(losses), list(losses), scores, {"base": base_model(seed), "trained": True})


def _batch(seed: int):
    x, y = turned(seed).train
    return x[:64], y[:64]


def _visit(complaint, model, losses, seed, twin=None, scores=None, **known) -> Visit:
    return Visit(complaint, model, _batch(seed), losses, list(twin or _healthy(seed)[1]), scores or {}, known)


def _no_effect(seed):
    model, losses = _healthy(seed)
    # As a wrapper for several GPUs leaves them: every name has a prefix that the plain model does not know.
    file = {f"module.{name}": tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    loaded = adapted(base_model(seed), seed=seed + 1)
    loaded.load_state_dict(file, strict=False)
    loaded.eval()
    scores = {"after training": accuracy(model, seed), "loaded the next day": accuracy(loaded, seed)}
    return _visit("Trained all day. Loaded again, it is the old model.", loaded, list(losses), seed, scores=scores, trained=True)


def _merged_twice(seed):
    model, losses = _healthy(seed)
    exported = copy.deepcopy(model)
    with torch.no_grad():
        for name in TARGETS:  # into the weight ... and the layer goes on adding B A x
            layer = getattr(exported, name)
            layer.base.weight += layer.factor() * layer.lora_B @ layer.lora_A
    scores = {"after training": accuracy(model, seed), "after merging": accuracy(exported, seed)}
    return _visit("I merged it to make it faster. Now it is worse.", exported, list(losses), seed, scores=scores, base=base_model(seed), trained=True)


def _scaling(seed):
    model = adapted(base_model(seed), Unscaled, alpha=4 * ALPHA, seed=seed)
    losses = fit(model, seed)
    same = fit(adapted(base_model(seed), Unscaled, alpha=ALPHA, seed=seed), seed)
    scores = {"last loss, alpha = 64": losses[-1], "last loss, alpha = 16": same[-1]}
    return _visit("Whatever alpha I try, nothing changes.", model.eval(), losses, seed, _healthy(seed, alpha=4 * ALPHA)[1], scores, trained=True)


def _both_zero(seed):
    model = adapted(base_model(seed), BothZero, seed=seed)
    return _visit("The loss does not move at all.", model, fit(model, seed), seed)


def _base_trains(seed):
    model = adapted(base_model(seed).requires_grad_(True), seed=seed)
    losses = fit(model, seed)
    alone = adapted(base_model(seed), seed=seed)
    alone.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    scores = {"after training": accuracy(model, seed), "its A and B on the original base": accuracy(alone, seed)}
    return _visit("The best curve of all. My colleague loads the adapter and gets rubbish.", model.eval(), losses, seed, scores=scores, trained=True)


def _not_saved(seed):
    def fresh(number):
        model = base_model(seed)
        torch.manual_seed(number)
        model.head = nn.Linear(32, 10)
        return adapted(model, seed=seed)

    model = fresh(seed)
    losses = fit(model, seed)
    file = {n: p.clone() for n, p in model.state_dict().items() if "lora_" in n}
    loaded = fresh(seed + 1)
    loaded.load_state_dict(file, strict=False)
    scores = {"after training": accuracy(model, seed), "loaded the next day": accuracy(loaded, seed)}
    return _visit("New head, trained well, saved without an error.", model.eval(), losses, seed, losses, scores, reload=loaded.eval(), trained=True)


def _dropout(seed):
    model = adapted(base_model(seed), AlwaysDropping, seed=seed)
    losses = fit(model, seed)
    scores = {f"test accuracy, {k} time": accuracy(model, seed) for k in ("first", "second", "third")}
    return _visit("I evaluate it three times and get three numbers.", model.eval(), losses, seed, scores=scores, trained=True)


def _optimizer(seed):
    model = base_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # before the adapters are in
    adapted(model, seed=seed)
    return _visit("Gradients are there, I printed them. The loss stays.", model, fit(model, seed, optimizer=optimizer), seed, optimizer=optimizer)


def _checkpointing(seed):
    model = adapted(base_model(seed), seed=seed)
    body = nn.Sequential(OrderedDict((name, part) for name, part in model.named_children() if name != "head"))
    model = nn.Sequential(OrderedDict(body=Checkpointed(body), head=model.head.requires_grad_(True)))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch does say it, once, above ten thousand lines of log
        losses = fit(model, seed)
    return _visit("It learns a little, and with gradient checkpointing off it learns more.", model, losses, seed)


def _step_too_large(seed):
    small, large = (adapted(base_model(seed), r=r, alpha=2 * r, seed=seed) for r in (8, 64))
    start = copy.deepcopy(large)
    twin, losses = fit(small, seed, lr=0.05), fit(large, seed, lr=0.05)
    scores = {"last loss, r = 8": twin[-1], "last loss, r = 64": losses[-1]}
    return _visit("alpha = 2 r, as everybody says. Fine at r = 8, dead at r = 64.", start, losses, seed, twin, scores, lr=0.05)


# ---- the GPT-2 patients: the small model that ships, on sentences about lighthouses -----------------------------------


class HomeMadeConv1D(nn.Module):
    """A home-made layer for GPT-2's Conv1D, which stores its weight as (in, out). Its forward pass is right, its merge is not."""

    def __init__(self, base: nn.Module, r: int = R, alpha: float = ALPHA):
        super().__init__()
        self.base, self.r, self.alpha, self.merged = base, r, alpha, False
        inputs, out = base.weight.shape
        self.lora_A = nn.Parameter(torch.empty(r, inputs))
        self.lora_B = nn.Parameter(torch.zeros(out, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.merged else y + self.alpha / self.r * (x @ self.lora_A.T @ self.lora_B.T)

    @torch.no_grad()
    def merge(self) -> None:
        if not self.merged:
            self.base.weight += self.alpha / self.r * (self.lora_B @ self.lora_A)  # square: no error
            self.merged = True


@cache
def _lighthouses():
    from .data_to_text import TextBatches, encode, load_task, tensors
    from .gpt2 import load_gpt2

    model, tokenizer = load_gpt2("pocket")
    task = load_task("lighthouses")
    short = {part: [e for e in encode(getattr(task, part), tokenizer, 256) if len(e.ids) <= 64] for part in ("train", "test")}
    return model, (lambda seed: TextBatches(short["train"], 4, seed)), tensors(short["train"][:4]), tensors(short["test"][:12])


def _write(model, seed: int, steps: int, lr: float = 1e-2) -> list[float]:
    from .train import token_loss

    torch.manual_seed(seed)
    return [step.loss for step in train(model, _lighthouses()[1](seed), steps, lr, loss=token_loss(), device="cpu")]


def _test_loss(model) -> float:
    """Nats a token, on test sentences, in eval mode."""
    from .train import token_loss

    model.eval()
    with torch.no_grad():
        return float(token_loss()(model, _lighthouses()[3]))


@cache
def _written(seed: int, steps: int) -> list[float]:
    torch.manual_seed(seed)
    return _write(apply_lora(copy.deepcopy(_lighthouses()[0]), R, ALPHA, ["attn.c_proj", "mlp.c_fc"]), seed, steps)


def _gpt2_visit(complaint, model, losses, twin, scores) -> Visit:
    return Visit(complaint, model, _lighthouses()[2], losses, list(twin), scores, {"trained": True})


def _transposed(seed, steps):
    model = copy.deepcopy(_lighthouses()[0]).requires_grad_(False)
    torch.manual_seed(seed)
    for block in model.transformer.h:
        block.attn.c_proj = HomeMadeConv1D(block.attn.c_proj)
    losses = _write(model, seed, steps)
    scores = {"frozen base": _test_loss(_lighthouses()[0]), "after training": _test_loss(model)}
    merged = copy.deepcopy(model)
    for block in merged.transformer.h:
        block.attn.c_proj.merge()
    scores["after merging"] = _test_loss(merged)
    return _gpt2_visit("No error anywhere. After merge() it is no better than before.", model, losses, losses, scores)


def _peft(targets: list[str], seed: int):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(copy.deepcopy(_lighthouses()[0]), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, fan_in_fan_out=True))


def _target_missed(seed, steps):
    model = _peft(["h.0.attn.c_proj", "attn.c_porj", "mlp.c_fcc"], seed)
    losses = _write(model, seed, steps)
    scores = {"frozen base": _test_loss(_lighthouses()[0]), "after training": _test_loss(model)}
    return _gpt2_visit("peft took my list of targets. It learns slowly.", model, losses, _written(seed, steps), scores)


def _tied(seed, steps):
    model = _peft(["wte"], seed)
    losses = _write(model, seed, steps)
    scores = {"frozen base": _test_loss(_lighthouses()[0]), "after training": _test_loss(model)}
    model.merge_adapter()
    scores["after merging"] = _test_loss(model)
    return _gpt2_visit("I adapted the embedding. It is fine, until I merge.", model, losses, losses, scores)


# cause, as `diagnose` calls it -> who makes the patient
DIGITS: dict[str, Callable] = {
    "no_effect": _no_effect,
    "merged_twice": _merged_twice,
    "scaling": _scaling,
    "both_zero": _both_zero,
    "base_trains": _base_trains,
    "not_saved": _not_saved,
    "dropout": _dropout,
    "optimizer": _optimizer,
    "checkpointing": _checkpointing,
    "step_too_large": _step_too_large,
}
GPT2: dict[str, Callable] = {"transposed": _transposed, "target_missed": _target_missed, "tied": _tied}
# Letters that say nothing about the cause: what hangs at the foot of the bed.
BEDS = dict(
    zip(
        "ABCDEFGHIJKLM",
        ("optimizer", "merged_twice", "not_saved", "both_zero", "scaling", "checkpointing", "base_trains", "dropout", "no_effect", "step_too_large",
         "tied", "target_missed", "transposed"),
        strict=True,
    )
)  # fmt: skip


def admit(cause: str, seed: int = 0, steps: int = 12) -> Visit:
    """The patient with this cause, or in this bed (A to M). steps: of training, for the three GPT-2 patients.

    Raises ValueError for a name that is neither.
    """
    cause = BEDS.get(cause, cause)
    if cause in DIGITS:
        return DIGITS[cause](seed)
    if cause in GPT2:
        return GPT2[cause](seed, steps)
    raise ValueError(f"patients have one of {', '.join((*DIGITS, *GPT2))}, or lie in beds A to M; found {cause!r}")


# ---- what the triage of lab 10 is asked about: the same five outcomes on networks of any size --------------------------


def triage_case(kind: str, seed: int) -> dict:
    """Readings of a model before and after one step: what a probe would write on the chart. kind: see TRIAGE.

    wanted, adapted   layers that were to carry an adapter, and that do
    A, B              the largest norm of each factor over the layers, before the step
    grad_A, grad_B    the largest norm of its gradient, None where none arrived
    B_moved           how far B went in the step (the largest norm of the difference)
    """
    import warnings

    random = torch.Generator().manual_seed(seed)
    width, depth = int(torch.randint(9, 14, (), generator=random)), int(torch.randint(4, 8, (), generator=random))
    torch.manual_seed(seed)
    model = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh()))).requires_grad_(False)
    names = [str(2 * k) for k in range(depth)]
    hit = names if kind != "targets" else names[: depth - 1 - seed % 2]
    before = torch.optim.SGD([nn.Parameter(p.detach()) for p in model.parameters()], lr=0.1)
    for name in hit:
        layer = LoRALinear(model.get_submodule(name), 3, 5.0)
        if kind == "both_zero":
            nn.init.zeros_(layer.lora_A)
        setattr(model, name, layer)
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    x = torch.randn(20, width)
    target = torch.randn(20, width)

    def loss():
        inner = Checkpointed(model[:-2]).train() if kind == "no_gradient" else model[:-2]
        head = nn.Linear(width, width)
        return F.mse_loss(head(inner(x)), target)

    def step(optimizer):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss().backward()

    factors = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    optimizer = before if kind == "optimizer" else torch.optim.SGD(factors, lr=0.1)
    if kind == "half_way":  # healthy, and no longer at step 0
        for _ in range(3):
            step(optimizer)
            optimizer.step()
    for p in factors:
        p.grad = None
    step(torch.optim.SGD(factors, lr=0.1))
    old = [layer.lora_B.detach().clone() for layer in layers]
    grads = {w: [getattr(layer, f"lora_{w}").grad for layer in layers] for w in "AB"}
    norms = {w: [float(g.norm()) for g in grads[w] if g is not None] for w in "AB"}
    readings = {"wanted": depth, "adapted": len(layers)}
    readings |= {w: max(float(getattr(layer, f"lora_{w}").detach().norm()) for layer in layers) for w in "AB"}
    optimizer.step()
    moved = max(float((layer.lora_B.detach() - b).norm()) for layer, b in zip(layers, old, strict=True))
    return readings | {f"grad_{w}": max(norms[w]) if norms[w] else None for w in "AB"} | {"B_moved": moved}


# kind -> what the triage should answer
TRIAGE = {
    "fresh": "healthy",
    "half_way": "healthy",
    "targets": "targets",
    "both_zero": "both zero",
    "no_gradient": "no gradient",
    "optimizer": "optimizer",
}
