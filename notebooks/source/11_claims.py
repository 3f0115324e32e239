# %% [markdown]
# # 11 · Claims on trial
# <!-- lab:badges -->
#
# Two dozen sentences that articles, forums and papers write about LoRA. You vote, then an experiment decides, and
# you make four of the court's tools yourself.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: without the longest trial, for a quick check of the notebook
seed = 0
device = "auto"

# %%
import textwrap

import torch
from torch import nn

from lora_lab import LoRALinear
from lora_lab.claims import find, load
from lora_lab.claims import trial as hear
from lora_lab.course import calibration, check, hint, predict, progress, use
from lora_lab.view import plot_losses, plot_matrices, plot_trial, show

torch.set_num_threads(1)  # small matrices: threads would only wait for each other
print(f"{len(load())} claims on the list; 24 are called here. All of them: lora-lab claims --run")

# %% [markdown]
# ## The rule
#
# Before anybody looks, the court fixes a *number* to measure and a *line*: the claim holds above it. Then:
#
# - **true**: every number, of every condition and seed, lies above
# - **false**: none does
# - **depends**: conditions disagree, each of one mind
# - **unsettled**: the seeds of any one condition disagree

# %% exercise="11.1"
def verdict(measured: dict, line: float) -> str:
    """ "true", "false", "depends" or "unsettled".

    measured: condition -> list of numbers, one per seed; the claim holds where a number is > line
    """
    ### BEGIN SOLUTION
    votes = [{number > line for number in numbers} for numbers in measured.values()]
    if any(len(vote) == 2 for vote in votes):
        return "unsettled"
    together = set().union(*votes)
    return "depends" if len(together) == 2 else "true" if together == {True} else "false"
    ### END SOLUTION

# %% check="11.1"
check("11.1", verdict)

# %%
verdict = use("11.1", verdict)
LETTERS = {"true": "a", "false": "b", "depends": "c", "unsettled": "d"}
WORDS = {"true": "true", "false": "false", "depends": "it depends", "unsettled": "the seeds disagree"}
called = {}


def trial(id, vote):
    """Call a claim: the experiment in our world and in another one, your rule, your vote."""
    claim, (ours, other) = find(id), hear(id)
    called[id] = ours
    sign = 1 if ours.holds == "above" else -1  # the rule knows "above" only
    said = [
        verdict({name: [sign * x for x in xs] for name, xs in found.measured.items()}, sign * ours.line)
        for found in (ours, other)
    ]
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in ours.means.items())
    show(
        plot_trial(
            ours.measured, other.measured, line=ours.line, holds=ours.holds,
            xlabel=ours.what, title=textwrap.fill(f"“{claim.says}”", 72),
        ),
        alt=f"{ours.what}: {numbers}. The claim would hold {ours.holds} {ours.line:g}.",
        caption=f"Other world: {claim.otherwise}. There the rule says {WORDS[said[1]]}.",
    )
    vote.reveal(LETTERS[said[0]], " ".join([claim.corrected(ours.means), ours.note]).strip())
    return ours

# %% [markdown]
# ## What LoRA is
#
# Each trial runs twice: in our world, and in **another one**, changed so that the verdict must change. An
# experiment that can't lose proves nothing. Vote with a letter, and say how sure: `predict("11.A", "b", sure=0.8)`.

# %%
vote_A = predict("11.A", ...)
vote_B = predict("11.B", ...)
vote_C = predict("11.C", ...)

# %%
trial("factorises", vote_A)
trial("replace", vote_B);

# %% [markdown]
# Claim C speaks of weights *made from the input*. How would one see that from outside? With weights that stay,
# $x \mapsto BAx$ is linear. Measure how far from linear a function is, relative to its outputs, so that both a
# ReLU and a tanh are found out.

# %% exercise="11.2"
def nonlinearity(update, x, y) -> float:
    """How far `update` is from linear: 0 for x -> B A x up to rounding, clearly more for B relu(A x).

    update: a function of a vector (in,) that returns (out,); x, y: two vectors (in,)
    """
    ### BEGIN SOLUTION
    together, apart = update(x + y), update(x) + update(y)
    return ((together - apart).norm() / apart.norm()).item()
    ### END SOLUTION

# %% check="11.2"
check("11.2", nonlinearity)

# %%
nonlinearity = use("11.2", nonlinearity)
torch.manual_seed(seed)
layer = LoRALinear(nn.Linear(64, 32), r=4, alpha=8).requires_grad_(False)
nn.init.normal_(layer.lora_B)
x, y = torch.randn(2, 64)
update = lambda v: layer(v) - layer.base_layer(v)
made = lambda v: update(v) * torch.sigmoid(v.mean())  # as if its weights were made from v
print(f"LoRA {nonlinearity(update, x, y):.1e}    weights made from the input {nonlinearity(made, x, y):.2f}")
trial("from-input", vote_C);

# %% [markdown]
# ## What it costs
#
# Nothing is timed here: clocks on shared machines lie. Operations, parameters and bytes are counted.

# %%
vote_D = predict("11.D", ...)
vote_E = predict("11.E", ...)
vote_F = predict("11.F", ...)
vote_G = predict("11.G", ...)
vote_H = predict("11.H", ...)

# %%
trial("faster", vote_D)
trial("free", vote_E)
trial("smaller", vote_F)
trial("memory", vote_G)
trial("file", vote_H);

# %% [markdown]
# ## Where it starts
#
# Step 0, and the steps right after it.

# %%
vote_I = predict("11.I", ...)
vote_J = predict("11.J", ...)
vote_K = predict("11.K", ...)

# %%
trial("both-random", vote_I)
trial("other-way", vote_J)
gradients = trial("vanish", vote_K).curves
show(
    plot_losses(gradients, title="A waits one step for B, then both learn", ylabel="norm of the gradient"),
    alt="Norms of the two gradients over twelve steps: that of A starts at exactly 0 and rises, that of B starts high.",
)

# %% [markdown]
# ## Training
#
# The digits again: a classifier of upright ones learns turned ones, or labels drawn by lot, or to see through
# noise.

# %%
vote_L = predict("11.L", ...)
vote_M = predict("11.M", ...)
vote_N = predict("11.N", ...)
vote_O = predict("11.O", ...)
vote_P = predict("11.P", ...)

# %%
trial("overfit", vote_L)
trial("rank-law", vote_M)
trial("forget", vote_N)
trial("adam", vote_O);

# %% [markdown]
# *More robust*: than what? A control is part of the claim. LoRA and full fine-tuning see the same noisy images,
# seed by seed. Five pairs: is a mean difference an effect, or luck? Compare it with its **standard error**, the
# spread of the differences (over $n - 1$) divided by $\sqrt n$.

# %% exercise="11.3"
def paired_effect(mine, rival):
    """-> (mean of mine - rival, its standard error).

    mine, rival (n,): one score per seed, the same seeds in the same order
    """
    ### BEGIN SOLUTION
    d = mine - rival
    return float(d.mean()), float(d.std() / len(d) ** 0.5)
    ### END SOLUTION

# %% check="11.3"
check("11.3", paired_effect)

# %%
from lora_lab.claims.training import scores_under_noise

paired_effect = use("11.3", paired_effect)
mine, rival = scores_under_noise()
for name, scores in [("LoRA, r = 8", mine), ("full fine-tuning", rival)]:
    print(f"{name:17s}" + "".join(f"{score:7.1f}" for score in scores) + "   % right under noise")
effect, error = paired_effect(mine, rival)
unpaired = float((mine.var() / 5 + rival.var() / 5) ** 0.5)
print(f"difference {effect:+.1f} ± {error:.1f} points; with the pairs torn apart ± {unpaired:.1f}")
trial("robust", vote_P);

# %% [markdown]
# ## Merging
#
# Sums that should be exact, and an average that should be one.

# %%
vote_Q = predict("11.Q", ...)
vote_R = predict("11.R", ...)
vote_S = predict("11.S", ...)

# %%
trial("subtract", vote_Q)
trial("bf16", vote_R)
trial("average", vote_S);

# %% [markdown]
# Average the factors, and cross terms come in:
#
# $$\tfrac14 (B + B')(A + A') \quad\text{beside}\quad \tfrac12 (BA + B'A')$$
#
# Could it come out otherwise? Build an adapter with another update for which averaging *works*, and one for which
# it is at least 40 % off.

# %% exercise="11.4"
def worlds(B, A):
    """-> ((B', A') for which the claim is true, (B', A') for which it is false), shapes as given.

    B (out, r), A (r, in); in the true world B'A' must not be B A again
    """
    ### BEGIN SOLUTION
    return (torch.randn_like(B), A), (-B, -A)
    ### END SOLUTION

# %% check="11.4"
check("11.4", worlds)

# %%
worlds = use("11.4", worlds)
torch.manual_seed(seed)
B1, A1 = torch.randn(16, 2), torch.randn(2, 20)
for name, (B2, A2) in zip(["true", "false"], worlds(B1, A1)):
    wanted, got = (B1 @ A1 + B2 @ A2) / 2, (B1 + B2) @ (A1 + A2) / 4
    off = float((got - wanted).norm() / wanted.norm())
    show(
        plot_matrices(
            [("average of updates", wanted), "and", ("product of averages", got)],
            title=f"The {name} world: {off:.0%} apart", limit=3.0,
        ),
        alt=f"Two heat maps side by side, the average update and the product of averaged factors, {off:.0%} apart.",
    )

# %% [markdown]
# ## Code, privacy, and the paper itself
#
# The last five. Two are about code as printed, one about a secret in the training text, two about the paper.

# %%
vote_T = predict("11.T", ...)
vote_U = predict("11.U", ...)
vote_V = predict("11.V", ...)
vote_W = predict("11.W", ...)
vote_X = predict("11.X", ...)

# %%
trial("cube", vote_T)
trial("leak", vote_U)
print("And these lines don't run at all:")
for id in ["twice", "pool", "vocabulary", "identity", "news", "unimported", "iterator"]:
    print(f"\n  {find(id).says}\n    {find(id).experiment().note}")

# %%
if not fast:
    trial("privacy", vote_V)  # the pocket GPT-2 reads a story with a number in it, twice
trial("speedup", vote_W)
trial("hundredth", vote_X)
calibration()

# %% tags=["hidden"]
# Whoever's rule it was, it must have said of every claim what is on record.
for id, ours in called.items():
    sign = 1 if ours.holds == "above" else -1
    assert verdict({k: [sign * v for v in vs] for k, vs in ours.measured.items()}, sign * ours.line) == find(id).verdict
    assert find(id).complaints(ours) == []

# %% [markdown]
# ## What you can now say
#
# - A sentence becomes a claim when it has a number, a line and a control.
# - An experiment counts if it could have come out otherwise.
# - *False*, *it depends*, *the seeds disagree*: three things.
#
# **In practice**: model cards and papers make claims. Ask which world would refute them.
#
# **Next**: a claim of your own, in `data/claims.yaml`.

# %%
progress()
