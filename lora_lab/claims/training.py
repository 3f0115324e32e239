"""Claims about training: what moves, what is learned, what is forgotten."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from ..adapt import apply_lora, lora_disabled, lora_layers
from ..spectra import effective_rank, factored_svdvals
from ..teacher import Teacher
from .bench import SEEDS, accuracy, adapted, apply, learn, mean_squared, pretrained, tuned, turned, upright
from .court import Finding

FIVE = (0, 1, 2, 3, 4)


def all_parameters(otherwise: bool) -> Finding:
    """The share of W0's entries that one step moves when the optimizer gets model.parameters(). Otherwise: W0 asks for no gradient."""
    shares = []
    for seed in SEEDS:
        model = apply_lora(pretrained(seed), r=4, alpha=8)
        weight = lora_layers(model)["0"].base_layer.weight
        before = weight.detach().clone()
        weight.requires_grad_(not otherwise)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        x, y = turned(seed).train
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        shares.append(float((weight.detach() != before).float().mean()))
    return Finding({"one step": shares}, 1e-9, "below", "share of the entries of W0 that move")


def overfit(otherwise: bool) -> Finding:
    """Accuracy on the training images when their labels are drawn by lot. Otherwise: too many labels for r = 1 to hold."""
    count, r = (1000, 1) if otherwise else (40, 4)
    learned, tested = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        x, _ = turned(seed).train
        part = x[:count], torch.randint(10, (count,))
        model = tuned(apply(pretrained(seed), r, seed), part, steps=200)
        learned.append(accuracy(model, part))
        tested.append(accuracy(model, turned(seed).test))
    note = f"On new images it is right {sum(tested) / len(tested):.0%} of the time; guessing is 10 %."
    return Finding({f"{count} labels drawn by lot, r = {r}": learned}, 0.5, "below", "accuracy on the labels it was trained on", note)


def noisy(seed: int, spectrum, r: int) -> float:
    """The error of a student of rank r on the true map, after training on 48 noisy examples of it: mean square, relative to the change."""
    teacher = Teacher(spectrum, inputs=48, seed=seed)
    torch.manual_seed(1000 + seed)
    x, y = teacher.batches()[0]
    y = y + 0.3 * torch.randn_like(y)
    model = apply_lora(teacher.model(), r=r, alpha=r)
    learn(model, (x, y), 250, 0.05, loss=mean_squared)
    return teacher.excess(model.layer.delta_weight().detach()) / teacher.floor(0)


def rank_law(otherwise: bool) -> Finding:
    """Error at r = 16 over error at r = 2, on the true map, learned from noisy examples. Otherwise: only changes of high rank are asked for."""
    spectra = {"a change of rank 2": (2.0, 1.5), "a change of rank 16": (1.5,) * 16}
    if otherwise:
        spectra.pop("a change of rank 2")
    measured = {name: [noisy(seed, values, 16) / noisy(seed, values, 2) for seed in SEEDS] for name, values in spectra.items()}
    return Finding(measured, 0.95, "below", "error at r = 16, relative to r = 2")


def forget(otherwise: bool) -> Finding:
    """Accuracy on upright digits after training on turned ones, as a share of that before. Otherwise: the adapter is switched off."""
    kept = []
    for seed in SEEDS:
        before = accuracy(pretrained(seed), upright(seed).test)
        model = adapted(seed)
        if otherwise:
            with lora_disabled(model):
                after = accuracy(model, upright(seed).test)
        else:
            after = accuracy(model, upright(seed).test)
        kept.append(after / before)
    return Finding({"upright digits": kept}, 0.98, "above", "old accuracy kept, share")


def without(otherwise: bool) -> Finding:
    """Accuracy on the new task with the adapter left out, as a share of that with it. Otherwise: the new task is the old one."""
    kept = []
    for seed in SEEDS:
        split = upright(seed) if otherwise else turned(seed)
        model = adapted(seed, task="upright" if otherwise else "turned")
        whole = accuracy(model, split.test)
        with lora_disabled(model):
            kept.append(accuracy(model, split.test) / whole)
    return Finding({"without B A": kept}, 0.95, "above", "new accuracy with the original weights, share")


def adam(otherwise: bool) -> Finding:
    """What Adam learns when all gradients are made small, as a share of what it learns with them as they are. Otherwise: eps = 1e-30."""
    sizes = {"× 1e-4": 1e-4, "× 1e-9": 1e-9}
    measured = {name: [] for name in sizes}
    for seed in SEEDS:
        teacher = Teacher([2.0, 1.0], seed=seed)
        learned = {}
        for name, size in {"": 1.0, **sizes}.items():
            torch.manual_seed(seed)
            model = apply_lora(teacher.model(), r=2, alpha=2)
            scaled = lambda m, batch: size * teacher.loss(m, batch)  # noqa: B023, E731
            make = lambda p: torch.optim.Adam(p, eps=1e-30 if otherwise else 1e-8)  # noqa: E731
            seen = learn(model, teacher.batches()[0], 60, 0.05, loss=scaled, optimizer=make)
            learned[name] = 1 - seen[-1] / seen[0]
        for name in sizes:
            measured[name].append(learned[name] / learned[""])
    return Finding(measured, 0.95, "above", "share learned, relative to gradients as they are")


@cache
def _fully_tuned(seed: int) -> nn.Module:
    return tuned(pretrained(seed), turned(seed).train)


def scores_under_noise(trained_rival: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Accuracy in per cent on noisy turned digits, five seeds: of LoRA (5,), and of full fine-tuning (5,) on the same images."""
    mine, theirs = [], []
    for seed in FIVE:
        x, y = turned(seed).test
        torch.manual_seed(50 + seed)
        test = x + 0.4 * torch.randn_like(x), y
        rival = _fully_tuned(seed) if trained_rival else pretrained(seed)
        mine.append(100 * accuracy(adapted(seed, r=8), test))
        theirs.append(100 * accuracy(rival, test))
    return torch.tensor(mine), torch.tensor(theirs)


def robust(otherwise: bool) -> Finding:
    """Accuracy on noisy images, LoRA less full fine-tuning, five seeds. Otherwise: the rival stays as it was pretrained."""
    mine, rival = scores_under_noise(not otherwise)
    return Finding({"noise 0.4, five seeds": (mine - rival).tolist()}, 0, "above", "accuracy under noise, LoRA less full fine-tuning, points")


def same_rate(otherwise: bool) -> Finding:
    """The best learning rate of LoRA over that of full fine-tuning, after 30 steps of Adam, on a grid of factors of 1.78. Otherwise:
    alpha = r is meant."""
    rates = [10 ** (k / 4) for k in range(-6, 5)]
    measured = {"alpha = r": [], "alpha = r / 64": []}
    if otherwise:
        measured.pop("alpha = r / 64")
    for seed in SEEDS:
        part = turned(seed).train

        def best(make):
            ends = {lr: learn(make(), part, 30, lr)[-1] for lr in rates}  # noqa: B023
            return min(ends, key=ends.get)

        def quiet(model):
            for layer in lora_layers(model).values():
                layer.alpha = layer.r / 64
            return model

        full = best(lambda: pretrained(seed))  # noqa: B023
        measured["alpha = r"].append(best(lambda: apply(pretrained(seed), 4, seed)) / full)  # noqa: B023
        if not otherwise:
            measured["alpha = r / 64"].append(best(lambda: quiet(apply(pretrained(seed), 4, seed))) / full)  # noqa: B023
    return Finding(measured, 3.0, "below", "best learning rate, LoRA over full fine-tuning")


def rank_used(otherwise: bool) -> Finding:
    """The effective rank of a trained ΔW over r. Otherwise: the change to be learned has r equal directions."""
    shares = []
    for seed in SEEDS:
        if otherwise:
            teacher = Teacher((1.0,) * 8, seed=seed)
            torch.manual_seed(seed)
            model = apply_lora(teacher.model(), r=8, alpha=8)
            learn(model, teacher.batches()[0], 200, 0.05, loss=teacher.loss)
            layer = model.layer
        else:
            layer = lora_layers(adapted(seed, r=8))["0"]
        shares.append(float(effective_rank(factored_svdvals(layer.lora_B.detach(), layer.lora_A.detach()))) / 8)
    return Finding({"r = 8, digits" if not otherwise else "eight equal directions": shares}, 0.9, "above", "effective rank of ΔW, relative to r")


def full_rank(otherwise: bool) -> Finding:
    """What is left of the loss at the highest r there is, when the task moves the biases, too. Otherwise: biases train in any case."""
    measured = {"weights alone": [], "weights and biases": []}
    if otherwise:
        measured.pop("weights alone")
    for seed in SEEDS:
        teacher = Teacher([1.0] * 12, d_in=12, d_out=12, inputs=48, seed=seed)
        torch.manual_seed(seed)
        x, y = teacher.batches()[0]
        y = y + torch.randn(12)
        for name, left in measured.items():
            model = nn.Sequential(nn.Linear(12, 12))
            with torch.no_grad():
                model[0].weight.copy_(teacher.W0)
                model[0].bias.zero_()
            torch.manual_seed(seed)
            apply_lora(model, r=12, alpha=12, bias="none" if name == "weights alone" else "lora_only")
            seen = learn(model, (x, y), 300, 0.05, loss=mean_squared)
            left.append(seen[-1] / seen[0])
    return Finding(measured, 0.01, "below", "share of the loss that is left")


def random_y(otherwise: bool) -> Finding:
    """Error on new examples over that of answering 0, after training on answers that have nothing to do with x. Otherwise: they have."""
    left, fell = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        x, new = torch.randn(1000, 64), torch.randn(1000, 64)
        answer = nn.Linear(64, 10)
        answers = (lambda v: 3 * answer(v).detach()) if otherwise else (lambda v: torch.randn(1000, 10))  # noqa: B023
        y, new_y = answers(x), answers(new)
        model = apply_lora(nn.Sequential(nn.Linear(64, 10)), r=4, alpha=4)
        seen = learn(model, (x, y), 150, 0.02, loss=mean_squared)
        fell.append(1 - seen[-1] / seen[0])
        with torch.no_grad():
            left.append(float(F.mse_loss(model(new), new_y) / new_y.square().mean()))
    return Finding({"random answers": left}, 0.95, "below", "error on new examples, relative to answering 0",
                   f"The training loss fell by {sum(fell) / len(fell):.0%}.")  # fmt: skip


def generalises(otherwise: bool) -> Finding:
    """Accuracy on new images, LoRA less full fine-tuning, from few and from many examples. Otherwise: the rival stays as it was pretrained."""
    measured = {"40 examples": [], "1,078 examples": []}
    for seed in FIVE:
        x, y = turned(seed).train
        few = torch.linspace(0, len(x) - 1, 40).long()  # evenly through the part, which is in the order of the data set
        few = x[few], y[few]
        lora = tuned(apply(pretrained(seed), 8, seed), few), adapted(seed, r=8)
        full = (pretrained(seed),) * 2 if otherwise else (tuned(pretrained(seed), few), _fully_tuned(seed))
        for numbers, mine, rival in zip(measured.values(), lora, full, strict=True):
            numbers.append(100 * (accuracy(mine, turned(seed).test) - accuracy(rival, turned(seed).test)))
    return Finding(measured, 0, "above", "accuracy on new images, LoRA less full fine-tuning, points")


def decay(otherwise: bool) -> Finding:
    """The norm of ΔW trained with weight decay 1, over that without. Otherwise: a decay below 0, which no library allows, done by hand."""
    grown = []
    for seed in SEEDS:
        norms = []
        for on in (True, False):
            model = apply_lora(pretrained(seed), r=4, alpha=8)
            torch.manual_seed(seed)
            for layer in lora_layers(model).values():
                layer.reset_lora()
            x, y = turned(seed).train
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=float(on and not otherwise))
            for _ in range(100):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                if on and otherwise:
                    with torch.no_grad():
                        for layer in lora_layers(model).values():
                            layer.lora_B *= 1.01
            norms.append(float(lora_layers(model)["0"].delta_weight().detach().norm()))
        grown.append(norms[0] / norms[1])
    return Finding({"weight decay 1": grown}, 1.0, "above", "norm of ΔW, relative to no weight decay")
