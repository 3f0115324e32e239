# %% [markdown]
# # 02 · A LoRA layer from scratch
# <!-- lab:badges -->
#
# In fifty minutes you write the layer that everybody imports: forward, start, freeze, merge. Then you put it beside the library's and
# compare bits.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: shorter runs, for a quick check of the notebook
seed = 0
device = "auto"

# %%
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import lora_lab
from lora_lab import Batches, count_parameters, digits, evaluate, train
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.view import plot_images, plot_losses, plot_matrices, show

upright, turned = digits(seed=seed), digits(rotation=90, seed=seed)
torch.manual_seed(seed)
pretrained = nn.Linear(64, 10)
for step in train(pretrained, Batches(*upright.train, seed=seed), steps=600, lr=1e-2, device="cpu"):
    pass
show(
    plot_images(list(pretrained.weight.detach().view(10, 8, 8)), labels=list(range(10)), title="A pretrained layer: the ten rows of W0, as 8 x 8 images"),
    alt="The ten rows of the pretrained weight drawn as 8 by 8 images; some look like ghosts of the digit that they detect.",
)

torch.manual_seed(seed)
W0, B, A = torch.randn(11, 7), torch.randn(11, 3), torch.randn(3, 7)
show(
    plot_matrices([("W0", W0), "+ 5/3 ·", ("B", B), "·", ("A", A), "=", ("W", W0 + 5 / 3 * B @ A)], title="The update is as large as W0, but made of two thin factors"),
    alt="Heat maps: W0 with 11 rows and 7 columns, plus 5/3 times B with 11 rows and 3 columns times A with 3 rows and 7 columns, equals W, 11 by 7.",
)

# %% [markdown]
# Above, our pretrained layer: each row of $W_0$ is a stencil for upright digits. We will teach it turned
# digits **without touching these stencils**. Below, the idea on a small matrix.
#
# ## Forward
#
# $$h = W_0 x + b + \frac{\alpha}{r} B A x$$
#
# (Hu et al. 2021, section 4.1.) $B(Ax)$ passes through $r$ numbers and never builds the large $BA$.
# PyTorch keeps samples in rows, so a matrix acts as `x @ M.T`.

# %% exercise="2.1"
def lora_forward(x, W, b, A, B, alpha: float, r: int):
    """x (..., d_in), W (d_out, d_in), b (d_out,) or None, A (r, d_in), B (d_out, r)  ->  W x + b + (alpha / r) B A x, of shape (..., d_out)."""
    ### BEGIN SOLUTION
    h = x @ W.T + (alpha / r) * (x @ A.T) @ B.T
    return h if b is None else h + b
    ### END SOLUTION

# %% check="2.1"
check("2.1", lora_forward)

# %% [markdown]
# ## Where to start
#
# $A$ and $B$ need first values. Four ways come to mind: one of them random, or none, or both. Commit yourself before you run them.

# %%
both_zero = predict("2.A", ...)

# %%
lora_forward = use("2.1", lora_forward)


def start(name: str, r: int = 4):
    A, B = torch.zeros(r, 64), torch.zeros(10, r)
    if "A" in name:
        A = torch.randn(r, 64) / math.sqrt(64)
    if "B" in name:
        B = torch.randn(10, r)
    return A, B


starts = {"A random, B zero": "A", "A zero, B random": "B", "both zero": "", "both random": "AB"}
curves, old_task = {}, {}
for label, name in starts.items():
    torch.manual_seed(seed)
    A, B = (factor.requires_grad_() for factor in start(name))
    optimizer = torch.optim.AdamW([A, B], lr=1e-2, weight_decay=0)
    W, b = pretrained.weight.detach(), pretrained.bias.detach()
    x, y = upright.test
    old_task[label] = (lora_forward(x, W, b, A, B, 8, 4).argmax(1) == y).float().mean().item()
    curves[label] = []
    for _, (x, y) in zip(range(100 if fast else 400), Batches(*turned.train, seed=seed)):
        loss = F.cross_entropy(lora_forward(x, W, b, A, B, 8, 4), y)
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        curves[label].append(loss.item())
show(
    plot_losses(curves, title="Learning turned digits from four starts", ylabel="loss (nats)", log=True),
    alt="Training loss on a logarithmic axis for four starts. With both factors zero the curve stays flat near ten; the other three fall below one.",
)
for label, share in old_task.items():
    print(f"{label:18s} reads {share:.1%} of the upright digits before its first step")
fell = curves["both zero"][-1] < 0.5 * curves["both zero"][0]
both_zero.reveal("a" if fell else "b", f"The loss with both zero: {curves['both zero'][0]:.2f} at the first step, {curves['both zero'][-1]:.2f} at the last.")

# %% [markdown]
# Three starts learn. But "both random" threw away what the layer knew, before training began. The paper's choice keeps it: $B = 0$ makes
# $\Delta W$ exactly zero, and a random $A$ lets $B$ learn. How large should $A$ be? About $1/\sqrt{d_\text{in}}$, so that $Ax$ has the size of $x$'s entries.

# %% exercise="2.2"
def init_factors(d_in: int, d_out: int, r: int):
    """-> A (r, d_in), random with entries of about 1/sqrt(d_in), uniform or Gaussian; B (d_out, r), zero."""
    ### BEGIN SOLUTION
    A = (2 * torch.rand(r, d_in) - 1) / math.sqrt(d_in)
    return A, torch.zeros(d_out, r)
    ### END SOLUTION

# %% check="2.2"
check("2.2", init_factors)

# %% [markdown]
# ## Who learns first?
#
# With $g = \partial L / \partial h$, one row per sample, the chain rule through $h = \dots + s\,B A x$ gives both gradients. Find them, without autograd,
# and you will see why two zeros never learn.

# %% exercise="2.3"
def factor_gradients(x, g, A, B, alpha: float, r: int):
    """x (n, d_in), g (n, d_out) = dL/dh, A (r, d_in), B (d_out, r)  ->  dL/dA (r, d_in), dL/dB (d_out, r), summed over the samples."""
    ### BEGIN SOLUTION
    s = alpha / r
    return s * B.T @ g.T @ x, s * g.T @ (x @ A.T)
    ### END SOLUTION

# %% check="2.3"
check("2.3", factor_gradients)

# %%
factor_gradients, init_factors = use("2.3", factor_gradients), use("2.2", init_factors)
torch.manual_seed(seed)
A, B = init_factors(64, 10, 4)
W, b = pretrained.weight.detach(), pretrained.bias.detach()
norms = {"gradient of A": [], "gradient of B": []}
x, y = turned.train
target = F.one_hot(y, 10).float()
for _ in range(12):
    g = (F.softmax(lora_forward(x, W, b, A, B, 8, 4), dim=1) - target) / len(x)  # the gradient of cross-entropy
    grad_A, grad_B = factor_gradients(x, g, A, B, 8, 4)
    norms["gradient of A"].append(grad_A.norm().item())
    norms["gradient of B"].append(grad_B.norm().item())
    A, B = A - 0.02 * grad_A, B - 0.02 * grad_B
show(
    plot_losses(norms, title="A waits for B: its gradient is zero at step 0", xlabel="update", ylabel="norm of the gradient"),
    alt="Norms of both gradients over the first twelve updates. That of A starts at exactly zero and rises once B has moved; that of B is large from the start.",
)
print(f"before the first update: gradient of A {norms['gradient of A'][0]:.3g}, of B {norms['gradient of B'][0]:.3g}; before the second: {norms['gradient of A'][1]:.3g}, {norms['gradient of B'][1]:.3g}")

# %% [markdown]
# ## What is frozen
#
# Now a real module. One prediction first: our layer has 650 numbers, the adapter $r(d_\text{in} + d_\text{out})$. People write
# `base.weight.requires_grad = False` and go on. Replace the dots by a number.

# %%
count = predict("2.B", ...)

# %% exercise="2.4"
class MyLoRALinear(nn.Module):
    """y = base(x) + (alpha / r) B A x. Attributes: base_layer (frozen), lora_A (r, d_in), lora_B (d_out, r), zero at the start."""

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        ### BEGIN SOLUTION
        self.base_layer = base.requires_grad_(False)
        self.r, self.alpha = r, alpha
        A, B = init_factors(base.in_features, base.out_features, r)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        return self.base_layer(x) + (self.alpha / self.r) * (x @ self.lora_A.T) @ self.lora_B.T
        ### END SOLUTION

# %% check="2.4"
check("2.4", MyLoRALinear)

# %%
MyLoRALinear = use("2.4", MyLoRALinear)
layer = MyLoRALinear(copy.deepcopy(pretrained), 4, 8)
print("as it should be:        ", count_parameters(layer))
layer.base_layer.bias.requires_grad_(True)
slip = count_parameters(layer)
print("with the bias forgotten:", slip)
count.reveal(slip.trainable, "The bias of the base adds ten. It is small, it trains, and it is not in the adapter's file: reloaded, the model differs.")

# %%
# The same factors in three implementations: yours, lora_lab's, and Hugging Face's peft.
import peft

torch.manual_seed(seed)
A, B = torch.randn(4, 64) / 8, torch.randn(10, 4)
mine, ours = MyLoRALinear(copy.deepcopy(pretrained), 4, 8), lora_lab.LoRALinear(copy.deepcopy(pretrained), 4, 8)
theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(pretrained)), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
theirs_layer = theirs.base_model.model[0]
with torch.no_grad():
    for one, two in [(mine.lora_A, mine.lora_B), (ours.lora_A, ours.lora_B), (theirs_layer.lora_A["default"].weight, theirs_layer.lora_B["default"].weight)]:
        one.copy_(A)
        two.copy_(B)
    x = turned.test[0]
    print(f"largest difference, yours to lora_lab: {(mine(x) - ours(x)).abs().max():.1e}, yours to peft: {(mine(x) - theirs(x)).abs().max():.1e}, "
          f"at outputs up to {ours(x).abs().max():.0f}")

# %% [markdown]
# The three add the same numbers in another order, and float32 rounds each sum. Equal means equal *up to rounding*.
#
# ## Merge
#
# For serving, $W_0 + \frac{\alpha}{r}BA$ is written into the weight: no detour, no extra time. To take it out again, what must you keep?

# %% exercise="2.5"
class MergeableLoRA(MyLoRALinear):
    """merge() writes the update into base_layer.weight, unmerge() brings W0 back bit for bit; doing either twice changes nothing more,
    and the function (forward) stays the same throughout."""

    original = None  # W0, while merged

    @torch.no_grad()
    def merge(self):
        ### BEGIN SOLUTION
        if self.original is None:
            self.original = self.base_layer.weight.clone()
            self.base_layer.weight += (self.alpha / self.r) * self.lora_B @ self.lora_A
        ### END SOLUTION

    @torch.no_grad()
    def unmerge(self):
        ### BEGIN SOLUTION
        if self.original is not None:
            self.base_layer.weight.copy_(self.original)
            self.original = None
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        return super().forward(x) if self.original is None else self.base_layer(x)
        ### END SOLUTION

# %% check="2.5"
check("2.5", MergeableLoRA)

# %% [markdown]
# ## What merging swallows
#
# Large models are kept in bfloat16, which has about three digits. A small $\Delta W$ added to a large $W_0$ may fall between two numbers.

# %%
lost = predict("2.C", ...)

# %% exercise="2.6"
def swallowed(W, delta, dtype: torch.dtype) -> float:
    """Share of delta that is lost when W + delta is rounded to dtype: ‖(rounded - W) - delta‖ / ‖delta‖. W and delta are float32,
    and W's numbers exist in dtype already."""
    ### BEGIN SOLUTION
    arrived = (W + delta).to(dtype).float() - W
    return ((arrived - delta).norm() / delta.norm()).item()
    ### END SOLUTION

# %% check="2.6"
check("2.6", swallowed)

# %%
swallowed = use("2.6", swallowed)
subtracted = (pretrained.weight + ours.delta_weight()) - ours.delta_weight()
changed = (subtracted != pretrained.weight).sum().item()
print(f"merging by adding and unmerging by subtracting changes {changed} of {pretrained.weight.numel()} entries of W0 in float32")
torch.manual_seed(seed)
sizes = [10 ** (k / 4) for k in range(-14, 1)]
shares = {"bfloat16": [], "float16": [], "float32": []}
W = torch.randn(768, 768)
delta = torch.randn(768, 4) @ torch.randn(4, 768)
delta *= W.norm() / delta.norm()
for name, values in shares.items():
    dtype = getattr(torch, name)
    values.extend(swallowed(W.to(dtype).float(), size * delta, dtype) for size in sizes)
show(
    plot_losses({name: ([math.log10(s) for s in sizes], values) for name, values in shares.items()}, title="The smaller the update, the more of it merging loses",
                xlabel="log10 of the update's norm relative to the weight's", ylabel="share lost", log=True),
    alt="Share of the update lost in merging against its relative size, on logarithmic axes, for three number formats: bfloat16 loses most, then float16, float32 almost nothing.",
)
W = W.bfloat16().float()
share = swallowed(W, 0.005 * delta, torch.bfloat16)
lost.reveal("a" if share < 0.02 else "b" if share < 0.15 else "c" if share < 0.6 else "d", f"{share:.0%} of an update of 0.5 % is lost in bfloat16.")

# %% [markdown]
# ## What you have built
#
# - $h = W_0x + b + \frac{\alpha}{r}BAx$; $B = 0$ keeps the pretrained function, a random $A$ lets $B$ move first.
# - Freeze everything of the base, bias included; then count.
# - Merging costs nothing at inference and something in precision. Keep adapters separate while you can.
#
# **In practice**: this is what `peft` puts into every layer of a language model. Part 02b adapts a classifier with it.

# %%
progress()
