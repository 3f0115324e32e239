# %% [markdown]
# # 00 · Start here
# <!-- lab:badges -->
#
# Somebody taught a small network to draw digits; somebody else taught it to write them in italics. You hold the second lesson,
# 300 numbers, and a volume knob.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: shorter runs, for a quick check of the notebook
seed = 0
device = "auto"

# %%
import torch
from torch import nn

from lora_lab import Batches, LoRALinear, count_parameters, digits, evaluate, train
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.view import plot_images, plot_losses, show, volume_knob

volume_knob()

# %% [markdown]
# Click a slider and use the arrow keys. At 0 you see the **pretrained** network, $W_0$. At 1 the **adapter** is fully on. Between them, below
# zero and above one, the network is $W_0 + \text{volume} \cdot \Delta W$, and $\Delta W$ was never shown a volume of 2.
#
# Nothing is retrained while you move it, and $W_0$ is never touched.

# %% [markdown]
# ## Is this machine ready?

# %%
from lora_lab.doctor import diagnose_machine, render_html
from IPython.display import HTML

HTML(render_html(diagnose_machine()))

# %% [markdown]
# ## A run of your own, in under a minute
#
# These are real: 1,797 digits that people wrote by hand, scanned at 8 by 8. A single linear layer, 64 pixels in and 10 scores out, learns
# to read them in about two seconds.

# %%
upright = digits(seed=seed)
turned = digits(rotation=90, seed=seed)

torch.manual_seed(seed)
base = nn.Linear(64, 10)
for step in train(base, Batches(*upright.train, seed=seed), steps=600, lr=1e-2, device=device):
    pass
base = base.cpu()

x, y = upright.test
show(
    plot_images([*x[:10].view(-1, 8, 8), *turned.test[0][:10].view(-1, 8, 8)], labels=[*y[:10].tolist()] * 2),
    alt="Ten handwritten digits from the test set, upright in the first row and turned by 90 degrees in the second.",
)
print(f"upright test digits read correctly: {evaluate(base, [upright.test]):.1%}")

# %% [markdown]
# Now turn every image by 90 degrees, as in the second row. **First commit yourself**: replace the three dots by "a", "b" or "c".

# %%
guess = predict("0.A", ...)

# %%
before = evaluate(base, [turned.test])
guess.reveal("c" if before < 0.25 else "b" if before < 0.75 else "a", f"{before:.1%} of the turned test digits are read correctly.")

# %% [markdown]
# ## Adapt it
#
# We freeze the layer and add two thin matrices beside it: $A$ takes 64 pixels to $r = 4$ numbers, $B$ takes those to 10 scores. Only they are
# trained, on turned digits.

# %%
layer = LoRALinear(base, r=4, alpha=8)
print(count_parameters(layer))

losses = [step.loss for step in train(layer, Batches(*turned.train, seed=seed), steps=100 if fast else 400, lr=1e-2, device=device)]
show(
    plot_losses({"r = 4": losses}, title="Reading turned digits: the loss while A and B learn", ylabel="loss (nats)", log=True),
    alt="Training loss on turned digits against the step, on a logarithmic axis. It falls from about ten to well below one.",
)
print(f"turned digits: {before:.1%} before, {evaluate(layer, [turned.test]):.1%} after")

# %% [markdown]
# The picture to keep: a frozen $W_0$, and beside it a detour through $r$ numbers.
#
# | | rows | columns |
# |---|---|---|
# | $W_0$, frozen | $d_\text{out}$ | $d_\text{in}$ |
# | $A$, trained | $r$ | $d_\text{in}$ |
# | $B$, trained | $d_\text{out}$ | $r$ |

# %% exercise="0.1"
def adapter_size(d_in: int, d_out: int, r: int) -> int:
    """How many numbers an adapter of rank r trains beside a layer with d_in inputs and d_out outputs: the entries of A and of B."""
    ### BEGIN SOLUTION
    return r * (d_in + d_out)
    ### END SOLUTION

# %% check="0.1"
check("0.1", adapter_size)

# %% [markdown]
# Stuck? `hint("0.1")` gives a nudge; run it again for a bigger one. Hints are noted, not punished.

# %%
hint("0.1")

# %% [markdown]
# `use` hands you your own function if it passed, and the lab's otherwise, so nothing below ever waits for an exercise.

# %%
adapter_size = use("0.1", adapter_size)
for name, d_in, d_out in [("our layer", 64, 10), ("one 768 x 768 matrix of GPT-2", 768, 768), ("one 12,288 x 12,288 matrix of GPT-3", 12288, 12288)]:
    small, full = adapter_size(d_in, d_out, r=4), d_in * d_out
    print(f"{name}: {small:,} numbers instead of {full:,} ({small / full:.2%})")

# %% [markdown]
# Small matrices save little. Large ones save almost everything, and that is where LoRA is used.

# %%
progress()

# %% [markdown]
# ## What you have seen
#
# - An adapter adds $\Delta W$ to a frozen $W_0$; its volume is a single number.
# - $A$ and $B$ are small when the layer is large.
# - Predict, run, check: that is how every lab here goes.
#
# **In practice**: image styles, company jargon and new languages are passed around as adapters of a few megabytes. Next: lab 02.
