# %% [markdown]
# # 00 · Start here
# <!-- lab:badges -->
#
# A small network has learned to draw digits. A second, much smaller lesson taught it italics.
# You hold that lesson, an *adapter*, and its volume knob.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: shorter runs, for a quick check of the notebook
seed = 0
device = "auto"

# %%
import torch
from IPython.display import HTML
from torch import nn

from lora_lab import Batches, LoRALinear, count_parameters, digits, evaluate, train
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.doctor import diagnose_machine, render_html
from lora_lab.live import digits_problem
from lora_lab.view import live_training, plot_images, plot_losses, show, volume_knob

torch.set_num_threads(1)  # these matrices are tiny: threads would only wait for each other
volume_knob()

# %% [markdown]
# Click a slider and use the arrow keys. At 0 you see the **pretrained** network, $W_0$; at 1 the
# **adapter** is fully on: $W_0 + \text{volume} \cdot \Delta W$. Nothing is retrained while you move
# it. The italic adapter was trained on 0 to 4 alone; look at 5 to 9, and at a volume of 2.

# %% [markdown]
# ## Is this machine ready?

# %%
HTML(render_html(diagnose_machine()))

# %% [markdown]
# ## A run of your own, in under a minute
#
# These digits were written by hand and scanned at 8 by 8 pixels. A single linear layer, 64 pixels
# in and 10 scores out, learns to read them in seconds.

# %%
upright = digits(seed=seed)
turned = digits(rotation=90, seed=seed)

torch.manual_seed(seed)
base = nn.Linear(64, 10)
nn.init.zeros_(base.weight)
batches = Batches(*upright.train, seed=seed)
for step in train(base, batches, steps=600, lr=1e-2, device=device):
    pass
base = base.cpu()

x, y = upright.test
pictures = [*x[:10].view(-1, 8, 8), *turned.test[0][:10].view(-1, 8, 8)]
show(
    plot_images(pictures, labels=y[:10].tolist() * 2),
    alt="Ten handwritten digits of the test set, upright in the first row and turned by "
    "90 degrees in the second.",
)
print(f"upright test digits read correctly: {evaluate(base, [upright.test]):.1%}")

# %% [markdown]
# Now turn every image by 90 degrees, as in the second row. **First commit yourself**: replace the
# three dots by "a", "b" or "c".

# %%
guess = predict("0.A", ...)

# %%
before = evaluate(base, [turned.test])
outcome = "c" if before < 0.25 else "b" if before < 0.75 else "a"
guess.reveal(outcome, f"{before:.1%} of the turned test digits are read correctly.")

# %% [markdown]
# ## Adapt it
#
# We freeze the layer and put two thin matrices beside it: $A$ takes 64 pixels to $r = 4$ numbers,
# $B$ takes those to 10 scores. Only they are trained, on turned digits.

# %%
layer = LoRALinear(base, r=4, alpha=8)
print(count_parameters(layer))

batches = Batches(*turned.train, seed=seed)
steps = 100 if fast else 400
losses = [step.loss for step in train(layer, batches, steps, lr=1e-2, device=device)]
show(
    plot_losses(
        {"r = 4": losses}, title="The loss on turned digits while A and B learn",
        ylabel="loss (nats)", log=True,
    ),
    alt="Training loss on turned digits against the step, on a logarithmic axis: it starts "
    "near ten and falls steeply.",
)
print(f"turned digits: {before:.1%} before, {evaluate(layer, [turned.test]):.1%} after")

# %% [markdown]
# Now by hand. Press **Start**; at the end move $r$ to 1, then 2, 3: every move trains anew from the
# same numbers, and the old curve stays. Which rank is the first to read eight of ten?

# %%
live_training(digits_problem("turned"), r=4, speed=300, seed=seed)

# %% [markdown]
# What did it learn? Each row of $A$ is an image that the layer now looks for, and $B$ says how much
# of each goes into every digit's score. So the ten rows of $\Delta W$ are mixtures of only four
# images: that is what *rank 4* means.

# %%
A, dW = layer.lora_A.detach().cpu().view(4, 8, 8), layer.delta_weight().detach().cpu()
show(
    plot_images(
        list(A), labels=["row 1", "row 2", "row 3", "row 4"],
        title="The four rows of A (light: ink here raises the number)",
    ),
    alt="The four rows of A as images of 8 by 8 pixels, light where ink raises the number.",
)
show(
    plot_images(list(dW.view(10, 8, 8)), labels=list(range(10)), title="ΔW, one row a digit"),
    alt="The ten rows of the update, one for each digit, as images of 8 by 8 pixels.",
)

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
    """The number of entries of A and B together, for a layer of d_in inputs, d_out outputs."""
    ### BEGIN SOLUTION
    return r * (d_in + d_out)
    ### END SOLUTION

# %% check="0.1"
check("0.1", adapter_size)

# %% [markdown]
# Stuck? `hint("0.1")` gives a nudge, and a bigger one when you run it again. Hints are noted, not
# punished. `use` then hands you your own function if it passed and the lab's otherwise, so that
# nothing below ever waits for an exercise.

# %%
# hint("0.1")  # remove the first # and run the cell

# %%
adapter_size = use("0.1", adapter_size)
for name, d_in, d_out in [
    ("our layer", 64, 10),
    ("a square matrix of GPT-2", 768, 768),
    ("a square matrix of GPT-3", 12288, 12288),
]:
    small, full = adapter_size(d_in, d_out, r=4), d_in * d_out
    print(f"{name:25s}{small:>9,} numbers instead of {full:>11,}: {small / full:6.2%}")

# %% [markdown]
# Small matrices save little; large ones save almost everything.
#
# ## What you have seen
#
# - An adapter adds $\Delta W$ to a frozen $W_0$; its volume is one number.
# - $A$ and $B$ are small when the layer is large.
# - Predict, run, check.
#
# **In practice**: drawing styles and tones of voice are passed around as adapters of a few
# megabytes. Next: lab 02.

# %%
progress()
