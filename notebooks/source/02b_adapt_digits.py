# %% [markdown]
# # 02b · Adapt a digit classifier
#
# <!-- lab:badges -->
#
# In lab 02 you built one LoRA layer. Here a whole network gets some, and has to earn them: beside it run a frozen
# base, a linear probe and full fine-tuning, with the same data and five seeds each.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: one learning rate per method instead of the best of three
seed = 0
device = "auto"

# %%
import copy
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from lora_lab.adapt import lora_disabled
from lora_lab.counting import count_parameters, lora_parameters
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.data import Batches, digits
from lora_lab.layers import LoRALinear
from lora_lab.train import evaluate, train
from lora_lab.view import live_training, plot_images, plot_losses, plot_spread, show

if device == "auto":
    device = "cpu"  # for a network this small a GPU only adds waiting
torch.set_num_threads(1)
seeds = [seed + k for k in range(5)]  # a seed decides the split of the data, the base and the adapters
print(f"five runs of everything, with seeds {seeds}")

# %% [markdown]
# ## 1 · A network, and two things it was never shown
#
# It learned upright digits. Handwriting that leans is new to it, and so are digits it was never shown.

# %%
def classifier(classes):
    """64 pixels -> 32 -> 32 -> classes. The two hidden layers are the body, the last one is the head."""
    body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(32, classes)))


def fit(model, x, y, lr, steps, seed):
    for _ in train(model, Batches(x, y, batch_size=64, seed=seed), steps=steps, lr=lr, device=device):
        pass
    return model


def pretrained(split, classes, seed):
    torch.manual_seed(seed)
    return fit(classifier(classes), *split.train, lr=3e-3, steps=600, seed=seed)


angles = list(range(-60, 61, 15))  # negative: clockwise, leaning to the right
upright = pretrained(digits(seed=seed), 10, seed)
turned = [digits(rotation=angle, seed=seed).test for angle in angles]
by_angle = [evaluate(upright, [test], device) for test in turned]
threes = [x[y == 3][0] for x, y in turned]
show(
    plot_images(
        [pixels.reshape(8, 8) for pixels in threes],
        labels=[f"{angle}°".replace("-", "−") for angle in angles],
        title="One handwritten 3, leaning right and left",
        cell=0.75,
    ),
    alt="A handwritten 3, turned in steps of 15 degrees from 60 degrees clockwise "
    "over upright to 60 degrees counter-clockwise.",
)
show(
    plot_losses(
        {"frozen base": (angles, by_angle)},
        title="A network that only saw upright digits",
        xlabel="degrees",
        ylabel="test accuracy",
    ),
    alt="Test accuracy by angle: "
    + ", ".join(f"{angle}° {value:.0%}" for angle, value in zip(angles, by_angle, strict=True)),
)

# %% [markdown]
# First the new digits. The cheapest repair keeps the body and trains a new head: a **linear probe**. Say what you
# expect, then read on.

# %%
guess_probe = predict("2b.A", ...)  # write "a", "b" or "c" instead of ...

# %% [markdown]
# ## 2 · Put LoRA into a model
#
# A head can only weigh what the body computes. LoRA changes the body itself, a little. Write the function that puts it
# there: it gets names like `"body.0"`, as `model.named_modules()` spells them.

# %% exercise="2b.1"
def add_lora(model: nn.Module, names: list[str], r: int, alpha: float) -> nn.Module:
    """Replace each named nn.Linear of `model` by LoRALinear(layer, r, alpha), in place; return the model.

    names: whole names, with dots, at any depth. Afterwards only lora_A and lora_B of these layers train;
    everything else is frozen: other layers, biases, norms, the head.
    """
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        adapted = LoRALinear(model.get_submodule(name), r, alpha)
        setattr(model.get_submodule(parent), child, adapted)
    return model
    ### END SOLUTION


# %% check="2b.1"
check("2b.1", add_lora)

# %% [markdown]
# Stuck? `hint("2b.1")` gives a nudge, called again a bigger one. Next: four ways to adapt, one loop for all. Each method
# picks its learning rate on validation images; test images choose nothing.

# %%
add_lora = use("2b.1", add_lora)
HIDDEN = ["body.0", "body.2"]
LEARNING_RATES = {
    "probe": (0.03,) if fast else (0.01, 0.03, 0.1),
    "LoRA": (0.01,) if fast else (0.003, 0.01, 0.03),
    "full": (0.01,) if fast else (0.001, 0.003, 0.01),
}


def prepare(base, method, r=4, new_classes=None):
    """A copy of the base in which exactly that is trainable which the method trains."""
    model = copy.deepcopy(base).requires_grad_(method == "full")
    if method == "LoRA":
        add_lora(model, HIDDEN, r, alpha=2 * r)
    if new_classes is not None:
        model.head = nn.Linear(32, new_classes)  # it knows nothing, so every method trains it
    elif method == "probe":
        model.head.requires_grad_(True)
    return model


def adapt(base, method, data, seed, r=4, new_classes=None):
    """The best of the method's learning rates, judged on the validation images."""
    models = []
    for lr in LEARNING_RATES[method]:
        torch.manual_seed(seed)
        model = prepare(base, method, r, new_classes)
        models.append(fit(model, *data.train, lr=lr, steps=300, seed=seed))
    return max(models, key=lambda model: evaluate(model, [data.validation], device))


def spread(results, title, what):
    """Each seed a dot; the alt text has the means."""
    means = ", ".join(f"{name} {np.mean(values):.1%}" for name, values in results.items())
    figure = plot_spread(
        results, percent=True, highlight="LoRA r=4", title=title, xlabel="test accuracy"
    )
    show(figure, alt=f"Test accuracy on {what}, five seeds per method. Means: {means}.")


# %% [markdown]
# ## 3 · Digits 5 to 9
#
# A base trained on 0 to 4 gets a fresh head with five outputs. Every method trains that head; they differ in what else
# they train. "Frozen base" trains nothing, so its head guesses.

# %%
def five_to_nine(seed):
    split = digits(classes=range(5, 10), seed=seed)
    for part in (split.train, split.validation, split.test):
        part[1].sub_(5)  # the new head counts its classes from 0
    return split


ways = {"linear probe": ("probe", None)}
ways |= {f"LoRA r={r}": ("LoRA", r) for r in (1, 2, 4, 8)}
ways |= {"full fine-tuning": ("full", None)}
bases, adapted, new = {}, {}, {name: [] for name in ("frozen base", *ways)}
for s in seeds:
    data = five_to_nine(s)
    bases[s] = pretrained(digits(classes=range(5), seed=s), 5, s)
    torch.manual_seed(s)
    guessing = prepare(bases[s], "probe", new_classes=5)
    new["frozen base"].append(evaluate(guessing, [data.test], device))
    for name, (method, r) in ways.items():
        adapted[name, s] = adapt(bases[s], method, data, s, r, new_classes=5)
        new[name].append(evaluate(adapted[name, s], [data.test], device))

print(f"{'method':18s} {'trained':>8s}   5 to 9: mean ± standard deviation over seeds")
for name, values in new.items():
    trained = count_parameters(adapted[name, seed]).trainable if name in ways else 0
    print(f"{name:18s} {trained:8,d}   {np.mean(values):6.1%} ± {np.std(values, ddof=1):.1%}")

# %%
spread(new, "Digits 5 to 9, each seed a dot", "the digits 5 to 9")
probe = float(np.mean(new["linear probe"]))
guess_probe.reveal(
    "a" if probe < 0.45 else "b" if probe <= 0.9 else "c",
    f"The probe reaches {probe:.1%}; with LoRA r=4 in the body it is {np.mean(new['LoRA r=4']):.1%}. "
    "A body trained to tell 0 to 4 apart keeps what that takes, and drops other strokes.",
)

# %% [markdown]
# ## 4 · Better, or luckier?
#
# A lucky split lifts every method, so compare within each seed. For the differences $d = a - b$ of $n$ seeds,
#
# $$\bar d \pm t \cdot \frac{s_d}{\sqrt{n}}, \qquad s_d^2 = \frac{1}{n-1} \sum_i (d_i - \bar d)^2$$
#
# is a 95 % interval ($t = 2.776$ for $n = 5$). If it contains 0, the runs do not decide.

# %% exercise="2b.2"
def paired_interval(a: torch.Tensor, b: torch.Tensor, t: float) -> tuple[float, float]:
    """Mean and half-width of the interval for a - b.

    a, b: (n,), accuracies of two methods; a[i] and b[i] come from the same seed.
    t: the factor of the interval, a number.
    """
    ### BEGIN SOLUTION
    difference = a - b
    return difference.mean().item(), t * difference.std().item() / len(difference) ** 0.5
    ### END SOLUTION


# %% check="2b.2"
check("2b.2", paired_interval)

# %%
paired_interval = use("2b.2", paired_interval)


def versus(results, first, second):
    """Print first minus second, in points, with its 95 % interval and what follows from it."""
    a, b = (torch.tensor(results[name], dtype=torch.float64) for name in (first, second))
    mean, half = paired_interval(a, b, t=2.776)
    verdict = "not decided" if abs(mean) <= half else "decided"
    print(f"{first + ' - ' + second:42s} {100 * mean:+6.1f} ± {100 * half:4.1f} points   {verdict}")
    return mean, half


for other in ("linear probe", "LoRA r=1", "LoRA r=8", "full fine-tuning"):
    versus(new, "LoRA r=4", other)

# %% [markdown]
# "Not decided" is a result. And five seeds share 1,797 images, so even "decided" speaks about these images.
#
# ## 5 · What the adapter forgets
#
# The base is frozen; the function is not.

# %%
guess_forget = predict("2b.B", ...)  # write "a", "b" or "c" instead of ...

# %%
def on_old_digits(model, s):
    """The adapted body under the old head, on the test images of 0 to 4."""
    old = nn.Sequential(OrderedDict(body=model.body, head=bases[s].head))
    return old, [digits(classes=range(5), seed=s).test]


before = [evaluate(*on_old_digits(bases[s], s), device) for s in seeds]
kept, off = {}, []
for name in ("LoRA r=1", "LoRA r=4", "LoRA r=8", "full fine-tuning"):
    kept[name] = [evaluate(*on_old_digits(adapted[name, s], s), device) for s in seeds]
for s in seeds:
    old, test = on_old_digits(adapted["LoRA r=4", s], s)
    with lora_disabled(old):
        off.append(evaluate(old, test, device))
rows = {"base, before": before, **kept, "LoRA r=4, off": off}
spread(rows, "The old digits 0 to 4, afterwards", "the old digits 0 to 4")
versus(kept, "LoRA r=4", "full fine-tuning")
lost = {name: np.mean(before) - np.mean(values) for name, values in kept.items()}
back = "every run is exactly where it was" if off == before else "it should be back, and is not"
guess_forget.reveal(
    "c" if np.mean(kept["LoRA r=4"]) <= 0.25 else "b" if lost["LoRA r=4"] >= 0.03 else "a",
    f"With the adapter on, {100 * lost['LoRA r=4']:.1f} points are gone "
    f"(full fine-tuning: {100 * lost['full fine-tuning']:.1f}). Switched off, {back}.",
)

# %% [markdown]
# LoRA does not promise that nothing is forgotten; it gives forgetting a switch, and a volume. Press **Start**. At the
# end halve alpha, then halve it again: where would you stop? (`alpha sets` says *volume*: nothing is trained anew.)

# %%
live_training("digits", r=4, alpha=8, speed=300, seed=seed)

# %% [markdown]
# ## 6 · Did the base help at all?
#
# A comparison needs a control. Take the pretraining away and see what is left.

# %%
guess_random = predict("2b.C", ...)  # write "a", "b" or "c" instead of ...

# %%
control = {"LoRA r=4": new["LoRA r=4"], "on a random base": [], "shuffled labels": []}
for s in seeds:
    data = five_to_nine(s)
    torch.manual_seed(1000 + s)
    never_trained = classifier(5)
    model = adapt(never_trained, "LoRA", data, s, r=4, new_classes=5)
    control["on a random base"].append(evaluate(model, [data.test], device))
    x, y = data.train
    y.copy_(y[torch.randperm(len(y))])  # same images, labels dealt out anew: nothing to learn
    model = adapt(bases[s], "LoRA", data, s, r=4, new_classes=5)
    control["shuffled labels"].append(evaluate(model, [data.test], device))
spread(control, "Digits 5 to 9, with controls", "the digits 5 to 9 with controls")
mean, half = versus(control, "LoRA r=4", "on a random base")
if mean < 0.05:
    meaning = "LoRA learned these digits by itself; section 3 alone would not have told you."
else:
    meaning = "Here the base matters."
guess_random.reveal(
    "a" if np.mean(control["on a random base"]) < 0.3 else "b" if mean >= 0.05 else "c",
    f"Pretraining is worth {100 * mean:+.1f} ± {100 * half:.1f} points here. {meaning}",
)

# %% [markdown]
# ## 7 · Leaning digits, few labels
#
# Now a task close to the old one: digits leaning by 20 degrees, five labelled images of each. The classes stay, so the
# head may stay frozen, and LoRA trains nothing but A and B. One more control: everything trained from scratch.

# %%
ANGLE, PER_DIGIT = -20, 5


def leaning(seed):
    split = digits(rotation=ANGLE, seed=seed)
    x, y = split.train
    few = torch.cat([(y == digit).nonzero()[:PER_DIGIT, 0] for digit in range(10)])
    return type(split)((x[few], y[few]), split.validation, split.test)


lean = {"frozen base": []}
for s in seeds:
    data, base = leaning(s), pretrained(digits(seed=s), 10, s)
    torch.manual_seed(1000 + s)
    never_trained = classifier(10)
    lean["frozen base"].append(evaluate(base, [data.test], device))
    for name, method, start in (
        ("linear probe", "probe", base),
        ("LoRA r=4", "LoRA", base),
        ("full fine-tuning", "full", base),
        ("LoRA, random base", "LoRA", never_trained),
        ("from scratch", "full", never_trained),
    ):
        model = adapt(start, method, data, s)
        lean.setdefault(name, []).append(evaluate(model, [data.test], device))
title = f"Turned by {ANGLE}°, {10 * PER_DIGIT} labels".replace("-", "−")
spread(lean, title, f"digits turned by {ANGLE} degrees")
for other in ("linear probe", "full fine-tuning", "LoRA, random base", "from scratch"):
    versus(lean, "LoRA r=4", other)

# %% [markdown]
# This angle and this number of labels were picked to show a base at work. Set 90 degrees or 100 labels per digit above:
# how does "from scratch" do? (Choosing learning rates cost validation labels, too.)
#
# ## 8 · Take it with you
#
# The adapter for 5 to 9 should fit in a small file and work on another machine.

# %% exercise="2b.3"
def tensors_to_save(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything that was trained in `model`, and of nothing else.

    Trained is what requires a gradient. Names as in model.named_parameters(), so that
    load_state_dict(saved, strict=False) finds them. Copies: training on must not change what was saved.
    """
    ### BEGIN SOLUTION
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ### END SOLUTION


# %% check="2b.3"
check("2b.3", tensors_to_save)

# %%
tensors_to_save = use("2b.3", tensors_to_save)
trained = adapted["LoRA r=4", seed]
saved = tensors_to_save(trained)
choices = {
    "A and B only": {name: tensor for name, tensor in saved.items() if ".lora_" in name},
    "all that was trained": saved,
    "the whole model": trained.state_dict(),
}
test = [five_to_nine(seed).test]
print(f"before saving {evaluate(trained, test, device):29.1%}\n")
print(f"{'what is saved':22s} {'bytes':>7s}  accuracy after loading")
for name, tensors in choices.items():
    torch.manual_seed(99)  # another machine: its fresh head begins with other numbers
    elsewhere = prepare(bases[seed], "LoRA", r=4, new_classes=5)
    elsewhere.load_state_dict(tensors, strict=False)
    size = sum(4 * tensor.numel() for tensor in tensors.values())
    print(f"{name:22s} {size:7,d}  {evaluate(elsewhere, test, device):22.1%}")

# %% [markdown]
# ## 9 · The ledger
#
# Our network is so small that full fine-tuning costs nothing. LoRA's bargain is about size: gradients and Adam's two
# moments take 12 bytes per trained parameter in float32. (Here without the new head, which trains as well.)

# %%
ours = lora_parameters(64, 32, 4) + lora_parameters(32, 32, 4)
ledger = {
    "this lab, both hidden layers": (ours, count_parameters(upright).total),
    "GPT-2 small, q and v of 12 layers": (12 * 2 * lora_parameters(768, 768, 4), 124_439_808),
    "GPT-3, q and v of 96 layers": (96 * 2 * lora_parameters(12288, 12288, 4), 175_255_800_000),
}


def size(count):
    """Gradient and both moments of this many float32 parameters, 12 bytes each."""
    value, units = 12.0 * count, ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}"


print(f"{'r = 4':34s} {'LoRA trains':>11s} {'of':>15s} {'share':>8s} {'LoRA':>9s} {'full':>9s}")
for name, (trains, total) in ledger.items():
    share = f"{trains / total:.3%}"
    print(f"{name:34s} {trains:11,d} {total:15,d} {share:>8s} {size(trains):>9s} {size(total):>9s}")

# %% [markdown]
# GPT-3's total: Table 4 of the [LoRA paper](https://arxiv.org/abs/2106.09685).
#
# ## Summary
#
# - Freeze, then adapt by name; a fresh head is trained and saved.
# - Compare within seeds; a control can overturn a good-looking table.
# - An adapter can drown out its frozen base; switched off, it leaves no trace.
#
# **Where this shows up in practice**: peft's `modules_to_save`; one base serving many adapters.

# %%
progress()
