# %% [markdown]
# # 01 · Rank
# <!-- lab:badges -->
#
# LoRA's R is rank. You take photographs apart, predict what a cut costs, and end with two pictures
# that show what LoRA factorises, and what it leaves whole.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: shorter runs, for a quick check of the notebook
seed = 0
device = "auto"

# %%
import math

import torch
from IPython.display import display
from sklearn.datasets import load_sample_images

from lora_lab.course import check, hint, predict, progress, use
from lora_lab.view import plot_losses, plot_photographs, rank_explorer, show

torch.set_num_threads(1)  # these matrices are small: threads would only wait for each other
china, flower = [torch.tensor(image) / 255 for image in load_sample_images().images]
pagoda = china.double().mean(2)  # grey: a matrix, 0 is black, 1 is white
show(
    plot_photographs(
        [("pagoda", pagoda, "a matrix, 427 × 640"), ("dahlia", flower, "three: red, green, blue")],
        width=8.6,
    ),
    alt="Left a pagoda above a lake, in grey; right an orange dahlia on a dark green ground.",
    caption="Photographs: danielbuechele, vultilion, CC BY 2.0, shipped with scikit-learn.",
)

# %% [markdown]
# Every matrix is a sum of rank-1 terms, a column times a row, the weightiest first:
#
# $$W = \sum_{i=1}^{\min(m, n)} S_i\, u_i v_i^\top$$
#
# That is the SVD. Cut after $r$ terms: the rank is $r$. First commit yourself; then click
# the slider and use the arrow keys. From which rank on would you recognise the place?

# %%
terms = predict("1.A", ...)

# %%
display(rank_explorer(pagoda, r=5, name="the pagoda"))

U, S, Vh = torch.linalg.svd(pagoda, full_matrices=False)
held = (S**2).cumsum(0) / (S**2).sum()
needed = [int((held < share).sum()) + 1 for share in [0.9, 0.99, 0.999]]
terms.reveal(
    "a" if needed[0] == 1 else "b" if needed[0] < 25 else "c" if needed[0] < 100 else "d",
    f"The first term alone holds {held[0]:.1%}: light above, dark below. 99 % needs "
    f"{needed[1]} terms, 99.9 % {needed[2]}. Energy says little about likeness.",
)

# %% [markdown]
# ## Cut
#
# `torch.linalg.svd` returns `U` (m, k), its columns $u_i$; `S` (k,), largest first; `Vh` (k, n),
# its **rows** $v_i^\top$; with $k = \min(m, n)$.

# %% exercise="1.1"
def truncate(U, S, Vh, r: int):
    """The sum of the first r terms S_i u_i v_i^T, of shape (m, n).

    U (m, k), S (k,), Vh (k, n), r from 1 to k
    """
    ### BEGIN SOLUTION
    return (U[:, :r] * S[:r]) @ Vh[:r]
    ### END SOLUTION

# %% check="1.1"
check("1.1", truncate)

# %% [markdown]
# ## What a cut costs
#
# The terms are orthogonal, so squares add up, as with Pythagoras:
#
# $$\|W\|^2 = \sum_i S_i^2 \qquad \|W - W_r\|^2 = \sum_{i > r} S_i^2$$
#
# The error is known before any picture is made.

# %% exercise="1.2"
def relative_error(S, r: int) -> float:
    """‖W - W_r‖ / ‖W‖ in Frobenius norms, from the spectrum alone: a number from 0 to 1.

    S (k,), the singular values of W, largest first; W_r is the sum of the first r terms
    """
    ### BEGIN SOLUTION
    return float((S[r:] ** 2).sum() / (S**2).sum()) ** 0.5
    ### END SOLUTION

# %% check="1.2"
check("1.2", relative_error)

# %% [markdown]
# Now another photograph: your two functions predict and measure at four ranks. Then move the slider
# there. The dahlia's spectrum falls faster than the pagoda's: a soft background needs few terms.

# %%
truncate, relative_error = use("1.1", truncate), use("1.2", relative_error)
dahlia = flower.double().mean(2)
U2, S2, Vh2 = torch.linalg.svd(dahlia, full_matrices=False)
print("dahlia    predicted    measured")
for k in [1, 5, 20, 100]:
    gap = (dahlia - truncate(U2, S2, Vh2, k)).norm() / dahlia.norm()
    print(f"r = {k:3d}   {relative_error(S2, k):9.4%}   {gap:9.4%}")
rank_explorer(dahlia, r=20, name="the dahlia")

# %% [markdown]
# ## Nothing comes nearer
#
# Eckart and Young proved in 1936: no matrix of rank $r$ is nearer to $W$ than $W_r$. LoRA's factors
# are found by gradient descent. Let it try.

# %%
descent = predict("1.B", ...)

# %%
def descend(W, r, steps):
    """Train B (m, r) from zero and A (r, n) from random. -> relative error before each step"""
    torch.manual_seed(seed)
    B, A = W.new_zeros(len(W), r), torch.randn(r, W.shape[1], dtype=W.dtype) / W.shape[1] ** 0.5
    lr, errors = 0.9 / torch.linalg.matrix_norm(W, 2), []
    for _ in range(steps):
        gap = B @ A - W
        errors.append((gap.norm() / W.norm()).item())
        B, A = B - lr * gap @ A.T, A - lr * B.T @ gap  # the gradients of ‖BA - W‖² / 2
    return errors


r = 10
errors = descend(pagoda, r, steps=250 if fast else 600)
best = relative_error(S, r)
show(
    plot_losses(
        {"gradient descent": errors}, floors={"SVD": best}, ylabel="relative error",
        title="Gradient descent beside the SVD, at rank 10",
    ),
    alt="Relative error of gradient descent at each step, with the error of the SVD as a "
    "level line below.",
)
ratio = errors[-1] / best
descent.reveal(
    "a" if ratio < 1 - 1e-9 else "b" if ratio < 2 else "c",
    f"{errors[-1]:.3%} after {len(errors)} steps; the SVD has {best:.3%}, at once.",
)

# %%
# Two cheaper ways to a rank-10 picture: choose A (10, n) first, then fit the best B (m, 10) to it.
torch.manual_seed(seed)
choices = {
    "ten random rows": torch.randn(r, 640, dtype=pagoda.dtype),
    "ten rows of the picture": pagoda[torch.randperm(427)[:r]],
}
panels = [("SVD", truncate(U, S, Vh, r), f"relative error {best:.1%}")]
for name, A in choices.items():
    B = torch.linalg.lstsq(A.T, pagoda.T).solution.T
    missed = (B @ A - pagoda).norm() / pagoda.norm()
    panels.append((f"A: {name}", B @ A, f"relative error {missed:.1%}"))
show(
    plot_photographs(panels, title="Three pictures of rank 10"),
    alt="The pagoda at rank 10 three times, from the SVD, from ten random rows, and from ten "
    "rows of the picture, with their relative errors.",
)

# %% [markdown]
# A may be anything, but only a good A helps: random rows span nothing that the picture has. Write
# the best pair. Many pairs are right, since $BA = (BM)(M^{-1}A)$.

# %% exercise="1.3"
def best_factors(W, r: int):
    """-> B (m, r), A (r, n) with B @ A the nearest matrix of rank r to W (m, n)."""
    ### BEGIN SOLUTION
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r] * S[:r], Vh[:r]
    ### END SOLUTION

# %% check="1.3"
check("1.3", best_factors)

# %% [markdown]
# ## Rank under noise
#
# Weights are learned from noisy data. What is their rank? Five true directions, then a little noise
# on each entry:

# %%
counted = predict("1.C", ...)

# %%
torch.manual_seed(seed)
signal = torch.randn(200, 5, dtype=torch.double) @ torch.randn(5, 300, dtype=torch.double)
noise = torch.randn_like(signal)
size = signal.square().mean().sqrt()
spectra = {
    f"noise of {share:.0%}": torch.linalg.svdvals(signal + share * size * noise).tolist()[:40]
    for share in [0.5, 0.1, 0.01]
}
show(
    plot_losses(
        {name: (list(range(1, 41)), values) for name, values in spectra.items()}, log=True,
        title="Forty singular values of rank 5 plus noise", xlabel="number",
        ylabel="singular value",
    ),
    alt="Three spectra on a logarithmic axis: five large values each, then a step down to a "
    "plateau, the lower the smaller the noise.",
)
found = int(torch.linalg.matrix_rank(signal + 0.01 * size * noise))
counted.reveal(
    "a" if found == 5 else "c" if found == 200 else "b",
    f"{found}. It counts what is larger than rounding, and noise is.",
)

# %% [markdown]
# A matrix of independent noise of size $\sigma$ has singular values up to about
#
# $$\sigma\,(\sqrt{m} + \sqrt{n})$$
#
# What rises above this edge is signal. What lies below may be either: nobody can tell.

# %% exercise="1.4"
def numerical_rank(W, noise: float) -> int:
    """How many singular values of W (m, n) exceed noise * (√m + √n).

    noise: the standard deviation of the noise in each entry, above 0
    """
    ### BEGIN SOLUTION
    m, n = W.shape
    return int((torch.linalg.svdvals(W) > noise * (m**0.5 + n**0.5)).sum())
    ### END SOLUTION

# %% check="1.4"
check("1.4", numerical_rank)

# %%
numerical_rank = use("1.4", numerical_rank)
for share in [0.01, 0.5, 3, 4, 5, 6, 8]:
    sigma = float(share * size)
    rank = numerical_rank(signal + sigma * noise, sigma)
    print(f"noise {share:4.0%} of the signal: rank {rank}")

# %% [markdown]
# ## What factors cost
#
# $B$ and $A$ hold $r(m + n)$ numbers, $W$ holds $mn$. Low rank pays only while $r$ is low.

# %% exercise="1.5"
def largest_saving_rank(m: int, n: int) -> int:
    """The largest r at which B (m, r) and A (r, n) together have fewer numbers than W (m, n).

    0 if no rank saves anything.
    """
    ### BEGIN SOLUTION
    return (m * n - 1) // (m + n)
    ### END SOLUTION

# %% check="1.5"
check("1.5", largest_saving_rank)

# %%
largest_saving_rank = use("1.5", largest_saving_rank)
for what, m, n in [("pagoda", 427, 640), ("digits layer", 10, 64), ("GPT-2's c_attn", 2304, 768)]:
    largest, share = largest_saving_rank(m, n), 8 * (m + n) / (m * n)
    print(f"{what:15s} {m:4d} x {n:3d}   saves up to r = {largest:3d}   r = 8 stores {share:.1%}")

# %% [markdown]
# ## Two photographs
#
# Somebody *tuned* the dahlia: a light leak at the right, a bar at the left. In colour we lay red,
# green and blue side by side, one matrix of 427 × 1920.

# %%
best_factors = use("1.3", best_factors)
to_matrix = lambda photo: photo.transpose(1, 2).reshape(427, 3 * 640)
to_photo = lambda matrix: matrix.reshape(427, 3, 640).transpose(1, 2)

y, x = torch.linspace(0, 1, 427).double(), torch.linspace(0, 1, 640).double()
glow = torch.exp(-(((y - 0.3) / 0.42) ** 2)), torch.exp((x - 1) / 0.17)  # column, row
bar = torch.ones_like(y), ((x > 0.095) & (x < 0.125)).double()
leak = glow[0][:, None] * torch.cat([colour * glow[1] for colour in (1.0, 0.38, 0.10)])
stripe = bar[0][:, None] * torch.cat([colour * bar[1] for colour in (0.42, 0.42, 0.52)])

original = to_matrix(flower.double())
tuned = original + leak + stripe
show(
    plot_photographs(
        [
            ("original", to_photo(original), f"rank {torch.linalg.matrix_rank(original)}"),
            ("+ the change", to_photo(tuned - original), "a column times a row, twice"),
            ("= tuned", to_photo(tuned), f"rank {torch.linalg.matrix_rank(tuned)}"),
        ]
    ),
    alt="The dahlia, plus a glow at the right and a pale bar at the left on black, equals the "
    "dahlia with glow and bar.",
)

# %% [markdown]
# You may store one pair of factors of rank 2, and you still have the original. Which matrix do you
# factorise?

# %% exercise="1.6"
def update_factors(original, tuned, r: int):
    """-> B (m, r), A (r, n) such that original + B @ A is as near to tuned as rank r allows.

    original, tuned (m, n); best_factors of exercise 1.3 may help
    """
    ### BEGIN SOLUTION
    return best_factors(tuned - original, r)
    ### END SOLUTION

# %% check="1.6"
check("1.6", update_factors)

# %%
update_factors = use("1.6", update_factors)
B, A = best_factors(tuned, 2)  # the photograph itself, at rank 2
dB, dA = update_factors(original, tuned, 2)  # its change, at rank 2
alone, added = B @ A, original + dB @ dA
error = lambda matrix: float((matrix - tuned).norm() / tuned.norm())
stored = f"{2 * (427 + 1920):,} numbers"
title = "Two photographs, rank 2: factorise the weight, or factorise its change"
panels = [
    ("tuned", to_photo(tuned), f"the goal\n{tuned.numel():,} numbers"),
    ("tuned ≈ B A", to_photo(alone), f"relative error {error(alone):.0%}\n{stored}"),
    (
        "original + B A", to_photo(added),
        f"relative error {error(added):.0e}, rounding\n{stored}, beside the original",
    ),
]
show(
    plot_photographs(panels, title=title),
    alt="Three dahlias: the tuned one; its best rank-2 factorisation, a blur of crossed stripes; "
    "the original plus a rank-2 change, equal to the goal.",
)

# %% tags=["hidden"]
# The README's picture. To make it anew: LORA_LAB_IMAGES=docs/img lora-lab run build/01_rank.ipynb
import os
from pathlib import Path

from lora_lab.view import save_png

if "LORA_LAB_IMAGES" in os.environ:
    for theme, ending in [("light", ""), ("dark", "_dark")]:
        path = Path(os.environ["LORA_LAB_IMAGES"]) / f"two_photographs{ending}.png"
        save_png(plot_photographs(panels, title=title), path, theme, dpi=140)

# %% [markdown]
# ## What LoRA is, and what it is not
#
# - It does **not** factorise $W_0$, which stays, whole and frozen. Nothing is compressed.
# - It bets that the *change* has low rank: $W_0 + \frac{\alpha}{r} B A$. To replace $W_0$ by $BA$ is
#   the middle picture.
# - Nobody has the tuned weight beforehand: $B$ and $A$ are learned, as above.
#
# Does the bet pay for a real model? Experiments say. **Next**: lab 02.

# %%
progress()
