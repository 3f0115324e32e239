# %% [markdown]
# # 02 · A LoRA layer from scratch
# <!-- lab:badges -->
#
# You write the layer that everybody imports: forward, start, freeze, merge. Then you put it beside
# the libraries' and compare digits.
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

torch.set_num_threads(1)  # these matrices are tiny: threads would only wait for each other

# %% [markdown]
# Our pretrained layer reads handwritten digits: 64 pixels in, 10 scores out, and each row of $W_0$
# is a stencil. We will teach it digits turned by 90 degrees **without touching these stencils**.

# %%
upright, turned = digits(seed=seed), digits(rotation=90, seed=seed)
pretrained = nn.Linear(64, 10)
nn.init.zeros_(pretrained.weight)
batches = Batches(*upright.train, seed=seed)
for step in train(pretrained, batches, steps=600, lr=1e-2, device="cpu"):
    pass
show(
    plot_images(
        list(pretrained.weight.detach().view(10, 8, 8)), labels=list(range(10)),
        title="A pretrained layer: the ten rows of W0",
    ),
    alt="The ten rows of the pretrained weight as images of 8 by 8 pixels: light where ink "
    "speaks for the digit, dark where it speaks against it.",
)

# %% [markdown]
# How can a frozen matrix learn? Something is added to it. That something is as large as $W_0$, but
# made of two thin matrices:

# %%
torch.manual_seed(seed)
W0, B, A = torch.randn(11, 7), 0.6 * torch.randn(11, 3), 0.6 * torch.randn(3, 7)
show(
    plot_matrices(
        [("W0", W0), "+ 5/3 ·", ("B", B), "·", ("A", A), "=", ("W", W0 + 5 / 3 * B @ A)],
        title="W = W0 + (alpha / r) B A, with r = 3 and alpha = 5", limit=3,
    ),
    alt="Heat maps: W0 with 11 rows and 7 columns, plus 5/3 times B, 11 by 3, times A, "
    "3 by 7, equals W, 11 by 7.",
)

# %% [markdown]
# ## Forward
#
# $$h = W_0 x + b + \frac{\alpha}{r} B A x$$
#
# (Hu et al. 2021, section 4.1.) $B(Ax)$ passes through $r$ numbers and never builds the large $BA$.
# PyTorch keeps samples in rows, so a matrix acts as `x @ M.T`.

# %% exercise="2.1"
def lora_forward(x, W, b, A, B, alpha: float, r: int):
    """W x + b + (alpha / r) B A x, of shape (..., d_out).

    x (..., d_in), W (d_out, d_in), b (d_out,) or None, A (r, d_in), B (d_out, r)
    """
    ### BEGIN SOLUTION
    h = x @ W.T + (alpha / r) * (x @ A.T) @ B.T
    return h if b is None else h + b
    ### END SOLUTION

# %% check="2.1"
check("2.1", lora_forward)

# %%
lora_forward = use("2.1", lora_forward)

# %% [markdown]
# If yours is not ready, `use` goes on with the lab's own. `hint("2.1")` helps with the first step.
#
# ## Where to start
#
# $A$ and $B$ need first values: A random, or B, or both, or neither. Commit yourself before you run
# all four.

# %%
both_zero = predict("2.A", ...)

# %%
def means_of_ten(losses):
    steps = range(9, len(losses), 10)
    return list(steps), [sum(losses[k - 9 : k + 1]) / 10 for k in steps]


def run(A, B, steps):
    """Train A and B on turned digits. -> share of upright ones read before step 1, losses"""
    W, b = pretrained.weight.detach(), pretrained.bias.detach()
    x, y = upright.test
    kept = (lora_forward(x, W, b, A, B, 8, 4).argmax(1) == y).float().mean().item()
    optimizer = torch.optim.AdamW([A.requires_grad_(), B.requires_grad_()], lr=1e-2)
    losses = []
    for _, (x, y) in zip(range(steps), Batches(*turned.train, seed=seed)):
        loss = F.cross_entropy(lora_forward(x, W, b, A, B, 8, 4), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return kept, losses


torch.manual_seed(seed)
starts = {
    "A random, B zero": (torch.randn(4, 64) / 8, torch.zeros(10, 4)),
    "A zero, B random": (torch.zeros(4, 64), torch.randn(10, 4)),
    "both zero": (torch.zeros(4, 64), torch.zeros(10, 4)),
    "both random": (torch.randn(4, 64), torch.randn(10, 4)),
}
curves = {}
for name, (A, B) in starts.items():
    kept, curves[name] = run(A, B, steps=100 if fast else 400)
    print(f"{name:18s} reads {kept:.1%} of the upright digits before its first step")
show(
    plot_losses(
        {name: means_of_ten(losses) for name, losses in curves.items()},
        title="Learning turned digits from four starts", ylabel="loss (nats)", log=True,
    ),
    alt="Training loss on a logarithmic axis, four curves: A random and B zero, the reverse, "
    "both zero, both random.",
)
first, last = curves["both zero"][0], curves["both zero"][-1]
both_zero.reveal(
    "a" if last < 0.5 * first else "b",
    f"{first:.2f} at the first step, {last:.2f} at the last; batches differ a little.",
)

# %% [markdown]
# Three starts learn, but "both random" damages what the layer knew before training begins. One zero
# factor makes $\Delta W$ exactly zero; which one hardly matters here. The paper takes $B = 0$, and
# so do we. Entries of about $1/\sqrt{d_\text{in}}$ in $A$ make $Ax$ as large as $x$.

# %% exercise="2.2"
def init_factors(d_in: int, d_out: int, r: int):
    """-> A (r, d_in), random, entries of about 1/sqrt(d_in), uniform or Gaussian; B (d_out, r)"""
    ### BEGIN SOLUTION
    A = (2 * torch.rand(r, d_in) - 1) / math.sqrt(d_in)
    return A, torch.zeros(d_out, r)
    ### END SOLUTION

# %% check="2.2"
check("2.2", init_factors)

# %% [markdown]
# ## Who learns first?
#
# With $g = \partial L / \partial h$, one row per sample, the chain rule through
# $h = \dots + \frac{\alpha}{r} B A x$ gives both gradients. Write them down without autograd, and
# see why two zeros never learn. (Try $z = Ax$, $h = \frac{\alpha}{r}Bz$; a gradient has its tensor's shape.)

# %% exercise="2.3"
def factor_gradients(x, g, A, B, alpha: float, r: int):
    """-> dL/dA (r, d_in), dL/dB (d_out, r), summed over the samples.

    x (n, d_in), g (n, d_out) = dL/dh, A (r, d_in), B (d_out, r)
    """
    ### BEGIN SOLUTION
    s = alpha / r
    return s * B.T @ g.T @ x, s * g.T @ (x @ A.T)
    ### END SOLUTION

# %% check="2.3"
check("2.3", factor_gradients)

# %%
init_factors, factor_gradients = use("2.2", init_factors), use("2.3", factor_gradients)
torch.manual_seed(seed)
A, B = init_factors(64, 10, 4)
W, b = pretrained.weight.detach(), pretrained.bias.detach()
norms = {"gradient of A": [], "gradient of B": []}
x, y = turned.train
target = F.one_hot(y, 10).float()
for _ in range(12):
    h = lora_forward(x, W, b, A, B, 8, 4)
    g = (F.softmax(h, dim=1) - target) / len(x)  # the gradient of cross-entropy
    grad_A, grad_B = factor_gradients(x, g, A, B, 8, 4)
    norms["gradient of A"].append(grad_A.norm().item())
    norms["gradient of B"].append(grad_B.norm().item())
    A, B = A - 0.02 * grad_A, B - 0.02 * grad_B
show(
    plot_losses(
        norms, title="A waits for B: its gradient is zero at step 0", xlabel="update",
        ylabel="norm of the gradient",
    ),
    alt="Norms of both gradients over twelve updates. That of A starts at exactly zero and "
    "rises as B moves away from zero; that of B is large from the start.",
)
for k, when in enumerate(["first", "second"]):
    a, b = norms["gradient of A"][k], norms["gradient of B"][k]
    print(f"before the {when + ' update:':15s} gradient of A {a:.3g}, of B {b:.3g}")

# %% [markdown]
# ## What is frozen
#
# Now a real module. One prediction first: the layer has 650 numbers, the adapter
# $r(d_\text{in} + d_\text{out})$ with $r = 4$. Many people write `base.weight.requires_grad = False`
# and go on. What trains then? Replace the dots by a number.

# %%
count = predict("2.B", ...)

# %% exercise="2.4"
class MyLoRALinear(nn.Module):
    """y = base(x) + (alpha / r) B A x

    base_layer: the layer given, frozen; lora_A (r, d_in), random, lora_B (d_out, r), zero,
    both nn.Parameter; self.r and self.alpha, which exercise 2.5 will need
    """

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
own = slip.trainable - layer.base_layer.bias.numel()
count.reveal(
    slip.trainable, f"{slip.trainable - own} more than the adapter's own {own}. An adapter's file "
    "holds A and B alone: loaded elsewhere, the model would differ from the one you trained.",
)

# %%
# The same factors in three implementations: yours, lora_lab's, and Hugging Face's peft.
import peft

base = lambda: copy.deepcopy(pretrained)
config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"])
mine, ours = MyLoRALinear(base(), 3, 5), lora_lab.LoRALinear(base(), 3, 5)
theirs = peft.get_peft_model(nn.Sequential(base()), config)
theirs_layer = theirs.base_model.model[0]
torch.manual_seed(seed)
A, B = torch.randn(3, 64) / 8, torch.randn(10, 3)
with torch.no_grad():
    for factor in [mine.lora_A, ours.lora_A, theirs_layer.lora_A["default"].weight]:
        factor.copy_(A)
    for factor in [mine.lora_B, ours.lora_B, theirs_layer.lora_B["default"].weight]:
        factor.copy_(B)
    x = turned.test[0]
    print(f"outputs up to                      {mine(x).abs().max():.0f}")
    print(f"largest difference from lora_lab   {(mine(x) - ours(x)).abs().max():.1e}")
    print(f"largest difference from peft       {(mine(x) - theirs(x)).abs().max():.1e}")

# %% [markdown]
# Equal, or equal *up to rounding*: each may multiply and add in its own order, and float32 keeps
# about seven digits.
#
# ## Merge
#
# For serving, $W_0 + \frac{\alpha}{r}BA$ is written into the weight: no detour, no extra time.
# To take it out again, what must you keep? (`super().forward(x)` is the forward of 2.4.)

# %% exercise="2.5"
class MergeableLoRA(MyLoRALinear):
    """merge() writes the update into base_layer.weight; unmerge() brings W0 back, bit for bit.

    Doing either twice changes nothing more, and forward gives the same output throughout.
    """

    def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        self.original: torch.Tensor | None = None  # W0, while merged

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
# Large models are kept in bfloat16, which has two to three digits. A small $\Delta W$ added to a
# larger $W_0$ may fall between two numbers.

# %%
lost = predict("2.C", ...)

# %% exercise="2.6"
def swallowed(W, delta, dtype: torch.dtype) -> float:
    """Share of delta lost when W + delta is rounded: ‖(rounded - W) - delta‖ / ‖delta‖

    W and delta are float32 tensors; every number in W exists in dtype already.
    """
    ### BEGIN SOLUTION
    arrived = (W + delta).to(dtype).float() - W
    return ((arrived - delta).norm() / delta.norm()).item()
    ### END SOLUTION

# %% check="2.6"
check("2.6", swallowed)

# %%
swallowed = use("2.6", swallowed)
with torch.no_grad():
    dW = ours.delta_weight()
    changed = (((pretrained.weight + dW) - dW) != pretrained.weight).sum().item()
print(f"W0 + ΔW - ΔW differs from W0 in {changed} of {dW.numel()} entries, in float32 already")

torch.manual_seed(seed)
W, dW = torch.randn(768, 768), torch.randn(768, 4) @ torch.randn(4, 768)
dW *= W.norm() / dW.norm()
sizes = [10 ** (k / 4) for k in range(-14, 1)]
shares = {}
for name in ["bfloat16", "float16", "float32"]:
    dtype = getattr(torch, name)
    values = [swallowed(W.to(dtype).float(), size * dW, dtype) for size in sizes]
    shares[name] = [math.log10(size) for size in sizes], values
show(
    plot_losses(
        shares, title="The smaller the update, the more of it merging loses", log=True,
        xlabel="log10 of ‖ΔW‖ / ‖W0‖", ylabel="share of ΔW lost",
    ),
    alt="Share of the update lost in merging against its relative size, both on logarithmic "
    "scales: bfloat16 loses most, then float16; float32 loses almost nothing.",
)
share = swallowed(W.bfloat16().float(), 0.005 * dW, torch.bfloat16)
outcome = "a" if share < 0.02 else "b" if share < 0.15 else "c" if share < 0.6 else "d"
lost.reveal(outcome, f"{share:.0%} of an update of 0.5 % is lost in bfloat16.")

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
