# %% [markdown]
# # 00b · A voice in a hundred steps
# <!-- lab:badges -->
#
# The **pocket GPT-2** that comes with this lab has read a shelf of old books for the young, and nothing by Arthur Conan
# Doyle. It will not stay that way.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: fewer texts and steps, for a quick check of the notebook
seed = 0
device = "auto"

# %%
import math

import torch

from lora_lab import Batches, apply_lora, count_parameters, lora_layers, train
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.data import sherlock_holmes
from lora_lab.gpt2 import (
    generate,
    load_gpt2,
    next_token_loss,
    show_stream,
    stream,
    text_loss,
    token_blocks,
)
from lora_lab.view import plot_losses, show

torch.set_num_threads(1)  # a small model: on a shared machine threads wait for each other
device = "cpu" if device == "auto" else device
model, tokenizer = load_gpt2("pocket")
LUCK = {"strategy": "sampling", "temperature": 0.7, "top_p": 0.9}
opening = "It was a cold morning when"
story = show_stream(stream(model, tokenizer, opening, 60, seed=seed, **LUCK), opening)
print(count_parameters(model))

# %% [markdown]
# It is small: expect grammar, not sense. Here are three beginnings that Doyle might have written.

# %%
BEGINNINGS = ['"My dear fellow," said', "I sat down by the fire and", "The door opened, and"]
TRIES = 4 if fast else 20  # of each beginning


def continuations(tries=TRIES):
    """Each beginning so many times with what the model adds; the same dice at every call."""
    prompts = BEGINNINGS * tries
    added = generate(model, tokenizer, prompts, 40, seed=seed, batch_size=32, **LUCK)
    return [prompt + text for prompt, text in zip(prompts, added, strict=True)]


def says(texts, count=3):
    """Print the first ones, and how many of all speak of Holmes."""
    print("\n\n".join(texts[:count]))
    named = sum("Holmes" in text for text in texts)
    print(f"\n{named} of {len(texts)} texts mention Holmes")
    return named


named_before = says(continuations())

# %% [markdown]
# ## How well does it predict?
#
# A model's loss is the mean cost of a token, $-\ln p$, in nats. Tokens differ from model to model, bytes do not. So
# language models are compared in **bits per byte**: 8 is knowing nothing, fewer is better. A bit is $\ln 2$ nats.

# %% exercise="0b.1"
def bits_per_byte(loss: float, tokens: int, text: str) -> float:
    """The bits that `text` costs, per byte of it.

    loss: mean over its tokens, in nats; tokens: how many; bytes: those of the text in UTF-8
    """
    ### BEGIN SOLUTION
    return loss * tokens / math.log(2) / len(text.encode("utf-8"))
    ### END SOLUTION

# %% check="0b.1"
check("0b.1", bits_per_byte)

# %%
bits_per_byte = use("0b.1", bits_per_byte)
stories = sherlock_holmes()
TEXTS = {"Doyle": stories.test, "an ordinary book": stories.ordinary}  # it has read neither


def bits():
    found, size = {}, 3_000 if fast else 12_000  # characters
    for name, text in TEXTS.items():
        cost = text_loss(model, tokenizer, text[:size])
        found[name] = bits_per_byte(cost.nats_per_token, cost.tokens, text[:size])
    return found


before = bits()
for name, value in before.items():
    print(f"{name:16s} {value:.3f} bits per byte")

# %% [markdown]
# ## A hundred steps
#
# Now LoRA, on three of Doyle's stories. The paper adapted $W_q$ and $W_v$ alone; here every linear layer gets its pair
# of thin matrices. Try the paper's choice afterwards.

# %%
ordinary = predict("0b.A", ...)

# %%
TARGETS, RATE = "all-linear", 5e-3  # the paper's: ["c_attn:q,v"], and here a rate of 1e-2
torch.manual_seed(seed)
apply_lora(model, r=8, alpha=16, target_modules=TARGETS)
print(count_parameters(model))
rows = token_blocks(tokenizer, stories.train, 128)
batches = Batches(rows, rows, batch_size=4, seed=seed)
steps = 10 if fast else 100
slower = lambda step: RATE * (1 - step / steps)  # down to 0: the last steps tidy up
run = train(model, batches, steps, lr=slower, loss=next_token_loss, device=device, seed=seed)
curve = [step.loss for step in run]
model.to("cpu")
named_after = says(continuations())

# %%
after = bits()
for name in TEXTS:
    change = f"{after[name] - before[name]:+.3f}".replace("-", "−")
    print(f"{name:16s} {before[name]:.3f} → {after[name]:.3f} bits per byte ({change})")
change = after["an ordinary book"] - before["an ordinary book"]
ordinary.reveal(
    "a" if change < -0.005 else "b" if change <= 0.005 else "c",
    f"{change:+.3f} bits per byte.".replace("-", "−"),
)

# %% [markdown]
# The same beginnings and the same dice as above. One more, while it is being written:

# %%
story = show_stream(stream(model, tokenizer, opening, 80, seed=seed, **LUCK), opening)

# %% [markdown]
# ## The volume of a voice
#
# The adapter's volume is its alpha. At 0 the base speaks, at 1 the adapter as it was trained. What lies beyond 1, and on
# the other side of 0?

# %%
best = predict("0b.B", ...)

# %%
VOLUMES = [-1, 0, 1, 2] if fast else [-1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2]


def set_volume(volume):
    for layer in lora_layers(model).values():
        layer.alpha = volume * 16


curves = {name: [] for name in TEXTS}
for volume in VOLUMES:
    set_volume(volume)
    for name, value in bits().items():
        curves[name].append(value)
show(
    plot_losses(
        {name: (VOLUMES, values) for name, values in curves.items()},
        title="Turning the voice up and down", xlabel="volume", ylabel="bits per byte",
    ),
    alt="Bits per byte by the adapter's volume. " + "; ".join(
        f"{name}: " + ", ".join(f"{y:.2f} at {x:g}" for x, y in zip(VOLUMES, values, strict=True))
        for name, values in curves.items()
    ),
)
top = min(zip(curves["Doyle"], VOLUMES, strict=True))[1]
best.reveal("a" if top < 1 else "b" if top == 1 else "c", f"Of these, {top:g} is best for Doyle.")

# %%
for volume in (-1, 0, 1, 2):
    set_volume(volume)
    text = continuations(1)[0].replace("\n", " ")
    print(f"volume {volume:2d}  ".replace("-", "−") + text + "\n")
set_volume(1)

# %% [markdown]
# ## What you have seen
#
# - Names and turns of speech come first, sense not at all: a small model can borrow a voice, not a mind.
# - What it costs on other texts is called forgetting. At volume 0 it is undone.
#
# **In practice**: one base, and a drawer of voices, each a file of some hundred kilobytes.

# %%
progress()
