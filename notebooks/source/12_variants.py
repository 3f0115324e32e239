# %% [markdown]
# # 12 · Variants
# <!-- lab:badges -->
#
# Eleven methods with names of their own, each 1 to 25 new lines away from LoRA. You write two of them, give all of them
# the same budget, and let them race. Then you find out how hard it is to say who won.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: fewer entrants, rates and seeds, for a quick check of the notebook
seed = 0
device = "auto"

# %%
import math
import textwrap

import torch

from lora_lab.course import check, hint, predict, progress, use
from lora_lab.diffs import LORA, VARIANTS, changed, equation, load
from lora_lab.view import plot_budgets, plot_race, plot_rank_choice, plot_rate_curves, plot_variants, show, show_diff
from lora_lab.zoo.race import BUDGET, DEGREES, ENTRANTS, QUICK, SHAPES, STEPS, TARGETS, TWINS, base, images, race, run
from lora_lab.zoo.ranks import choose_ranks, singular_values, trained

torch.set_num_threads(1)  # these matrices are small: threads would only wait for each other
show(
    plot_variants(title="One LoRA layer, five places to change it"),
    alt="A LoRA layer: x goes through the frozen W0 and through A, B and a scaling, both are added. At the frozen weight "
    "stands QLoRA; at the scaling rsLoRA; at the optimizer LoRA+ and LoRA-FA; at the start PiSSA, OLoRA and EVA; at the "
    "layer DoRA, VeRA, LoRA-XS and AdaLoRA.",
)

# %% [markdown]
# ## The smallest: scaling and training
#
# A variant is shown as the lines by which it differs from LoRA: − goes, + comes. All of them run. Open those that you have heard of;
# the others can wait. These three keep LoRA's formula: rsLoRA multiplies $BA$ by another number, LoRA+ makes other steps with B, LoRA-FA trains only B.

# %%
show_diff(["rslora", "lora_plus", "lora_fa"])
step_0 = predict("12.A", ...)

# %% [markdown]
# ## Another layer
#
# DoRA gives each output a length and a direction, and trains both. The lengths $m$, one number a row, stand in front:
#
# $$W' = m\,\frac{V}{\lVert V\rVert}, \qquad V = W_0 + \text{scaling}\cdot BA$$
#
# $\lVert V\rVert$: the norms of $V$'s rows. For autograd they are constants, which saves memory (the paper's section 4.3).

# %% exercise="12.1"
def dora_weight(W0, A, B, m, scaling: float):
    """W' (out, in): every row of V = W0 + scaling * B A, brought to the length m; its norm passes no gradient.

    W0 (out, in), A (r, in), B (out, r), m (out,)
    """
    ### BEGIN SOLUTION
    V = W0 + scaling * B @ A
    return m[:, None] * V / V.norm(dim=1, keepdim=True).detach()
    ### END SOLUTION

# %% check="12.1"
check("12.1", dora_weight)

# %%
dora_weight = use("12.1", dora_weight)
W0 = base(seed).body[2].weight.detach()  # (64, 64), a layer of the network that will race
inputs = base(seed).body[:2](images(DEGREES).train[0]).detach()  # what it will read
torch.manual_seed(seed)
dora = load("dora")
layer = dora.Layer(W0, r=4, alpha=8)
dora.start(layer, inputs)
torch.nn.init.normal_(layer.B, std=0.1)  # as if it had trained
apart = (layer.merged() - dora_weight(layer.W0, layer.A, layer.B, layer.m, layer.scaling)).abs().max()
print(f"the layer's weight and yours differ by {apart:.0e}")
show_diff(["dora", "vera", "lora_xs", "adalora"])

# %% [markdown]
# VeRA and LoRA-XS freeze both factors and train something tiny between or around them. Whatever a layer computes, if
# its update does not depend on $x$ it can be merged.
#
# ## Another start
#
# PiSSA trains the strongest part of $W_0$, that of its $r$ largest singular values, and freezes the rest. The layer will compute
# (residual + scaling · $BA$) $x$.

# %% exercise="12.2"
def pissa_start(W0, r: int, scaling: float):
    """-> A (r, in), B (out, r), residual (out, in), so that step 0 computes with W0.

    scaling * B A is the part of W0 with its r largest singular values; each row of A is as long as its column of B
    """
    ### BEGIN SOLUTION
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    A, B = root[:, None] * Vh[:r], U[:, :r] * root
    return A, B, W0 - scaling * B @ A
    ### END SOLUTION

# %% check="12.2"
check("12.2", pissa_start)

# %%
pissa_start = use("12.2", pissa_start)
A, B, residual = pissa_start(W0, 4, 2.0)
print(f"‖W0‖² = ‖residual‖² + ‖strongest part‖²: {W0.norm():.2f}² = {residual.norm():.2f}² + {(2 * B @ A).norm():.2f}²")
show_diff(["pissa", "olora", "eva", "qlora"])  # the last has another base: W0 in 4 bits

# %% [markdown]
# ## All twelve, tried
#
# One layer of the network that will race, r = 4: step 0 beside $W_0 x$; then noise is added to all that trains, and
# the merged weight is compared with the layer.

# %%
def tried(variant):
    """(largest difference at step 0, numbers that train, largest difference of the merged weight)."""
    torch.manual_seed(seed)
    module = load(variant.key)
    layer = module.Layer(W0, 4, 8)
    module.start(layer, inputs)
    with torch.no_grad():
        step_0 = (layer(inputs) - inputs @ W0.T).abs().max().item()
        trains = [p for p in layer.parameters() if p.requires_grad]
        for p in trains:
            p += 0.1 * torch.randn_like(p)
        merged = (layer(inputs) - inputs @ layer.merged().T).abs().max().item()
    return step_0, sum(p.numel() for p in trains), merged


tried_all = {variant.name: tried(variant) for variant in (LORA, *VARIANTS)}
print(f"{'':8s}{'lines':>8s}{'step 0 differs by':>20s}{'trained':>9s}   the weight")
for variant in (LORA, *VARIANTS):
    start, trains, _ = tried_all[variant.name]
    lines = "" if variant is LORA else "+{} −{}".format(*changed(variant.key))
    weight = textwrap.shorten(equation(variant.key), 62, placeholder=" …")
    print(f"{variant.name:8s}{lines:>8s}{f'{start:.0e}' if start else 'nothing':>20s}{trains:>9,}   {weight}")
largest = max(merged for *_, merged in tried_all.values())
print(f"\nMerged, each of them computes what its layer computes, up to {largest:.0e}.")
exact = sum(tried_all[variant.name][0] == 0 for variant in VARIANTS)
step_0.reveal(
    "a" if exact == 11 else "b" if exact > 5 else "c",
    f"{exact} of 11. PiSSA and OLoRA compute W0 − BA + BA, which rounds; QLoRA's W0 itself was rounded, to 4 bits.",
)

# %% [markdown]
# ## A budget
#
# LoRA at r = 4 trains 512 numbers in this layer, LoRA-XS 16. Whoever compares them at equal *rank* compares budgets. So: at most
# as many numbers, and each takes the rank it can pay for. Three layers of 64 × 64 and 1,536 numbers: which rank does VeRA get?

# %%
vera_rank = predict("12.B", ...)

# %% exercise="12.3"
def rank_for_budget(method: str, shapes: list, budget: int) -> int:
    """The largest r at which all layers together train at most `budget` numbers; 0 if r = 1 is too much.

    method  "lora", "lora-fa", "dora", "adalora", "vera" (A, B frozen and shared) or "lora-xs"; what each trains: the diffs above
    shapes  [(out, in), ...], one for each adapted layer, not all alike; r is the same in all, and may be larger than in and out
    """
    ### BEGIN SOLUTION
    n, outs, both = len(shapes), sum(o for o, i in shapes), sum(o + i for o, i in shapes)
    if method == "lora-xs":
        return math.isqrt(budget // n)
    fixed = {"dora": outs, "vera": outs}.get(method, 0)
    each = {"lora": both, "lora-fa": outs, "dora": both, "adalora": both + n, "vera": n}[method]
    return max(0, (budget - fixed) // each)
    ### END SOLUTION

# %% check="12.3"
check("12.3", rank_for_budget)

# %%
rank_for_budget = use("12.3", rank_for_budget)
shapes = [(out, inputs) for inputs, out in SHAPES]
ranks = {name: rank_for_budget(entrant.method, shapes, BUDGET) for name, entrant in ENTRANTS.items() if name not in TWINS}
print(f"{BUDGET:,} numbers in {len(shapes)} layers of 64 × 64 buy r =")
print("  " + "   ".join(f"{name} {r}" for name, r in ranks.items()))
r = ranks["VeRA"]
vera_rank.reveal(
    "a" if r < 16 else "b" if r < 100 else "c",
    f"r = {r}: a direction more costs one number a layer; A and B are drawn. B A has rank 64 at most, but {r} "
    f"numbers d choose among more such matrices. The price: {r * 128:,} frozen numbers, and slower steps.",
)

# %% [markdown]
# ## The race
#
# A small network reads upright digits and learns turned ones, with the same data, steps and budget for all. Along run three
# **twins**: LoRA under other names, with A and batches of their own.
#
# First everybody runs at the learning rate that is best *for LoRA*, then everybody at its own. How sure are you?
# `predict("12.C", "a", sure=0.7)`.

# %%
unfair = predict("12.C", ...)
fair = predict("12.D", ...)

# %%
# A minute or two: five rates for each entrant, then the race, twice.
found = race(**QUICK) if fast else race()
show(
    plot_rate_curves(found, title="Everybody looks for a learning rate, on other seeds and other images"),
    alt="Validation accuracy against learning rate, a small panel for each entrant, LoRA's curve in grey behind each. Chosen: "
    + ", ".join(f"{name} {lr:.2g}" for name, lr in found.chosen.items()),
)
print("At the edge of what was tried, so perhaps not at its best:", ", ".join(found.edges) or "nobody")

# %% [markdown]
# Who would lose most at LoRA's rate?
#
# ## Who beats LoRA?
#
# With $d$ = entrant less LoRA, seed by seed:
#
# $$t = \frac{\text{mean}(d)}{\text{std}(d) / \sqrt n}$$
#
# Eleven entrants are eleven tries, so **Holm**: sort by $|t|$. The largest of $k$ must exceed limits[k], which chance does with probability 5 % / $k$; the next,
# limits[k−1]. The first that fails ends the search.

# %% exercise="12.4"
def who_beats_lora(scores: dict, limits) -> dict:
    """-> entrant -> "better", "worse" or "open" (can't be told from luck), LoRA itself left out.

    scores  name -> (n,), one score per seed, the same seeds for all; one of the names is "LoRA"
    limits  limits[k]: the |t| that the largest of k must exceed, k from 1. std with n - 1; LoRA is none of the k
    """
    ### BEGIN SOLUTION
    t = {}
    for name in scores:
        d = scores[name] - scores["LoRA"]
        t[name] = float(d.mean() / (d.std() / len(d) ** 0.5))
    del t["LoRA"]
    words = dict.fromkeys(t, "open")
    for k, name in zip(range(len(t), 0, -1), sorted(t, key=lambda name: -abs(t[name]))):
        if abs(t[name]) <= limits[k]:
            break
        words[name] = "better" if t[name] > 0 else "worse"
    return words
    ### END SOLUTION

# %% check="12.4"
check("12.4", who_beats_lora)

# %%
# Run this one and look at the picture; its code can wait.
from scipy.special import stdtrit  # Student's t

who_beats_lora = use("12.4", who_beats_lora)


def limits(seeds):
    """limits[k], k from 1: two-sided, 5 % / k, with seeds - 1 degrees of freedom."""
    return torch.tensor([math.inf] + [float(stdtrit(seeds - 1, 1 - 0.025 / k)) for k in range(1, 13)])


def words(fair):
    """The word on each variant, at LoRA's rate or at its own."""
    scores = {name: torch.tensor(found.scores(name, fair)).double() for name in ("LoRA", *found.variants)}
    return who_beats_lora(scores, limits(len(scores["LoRA"])))


verdict = {"at LoRA's rate": words(False), "at its own rate": words(True)}
said = [
    f"{where}: " + (", ".join(f"{name} {word}" for name, word in told.items() if word != "open") or "nobody stands out")
    for where, told in verdict.items()
]
show(
    plot_race(found, title="The same race twice"),
    alt="Differences to LoRA for each seed, on the left at LoRA's rate, on the right each at its own. " + ". ".join(said),
)
at_loras, own = ({d.name: 100 * d.mean for d in found.differences(fair)} for fair in (False, True))
moved = max(found.variants, key=lambda name: abs(own[name] - at_loras[name]))
said.append(f"its own rate moves {moved} most: from {at_loras[moved]:+.1f} to {own[moved]:+.1f} points beside LoRA")
print("\n".join(said))
also = [f"{d.name} (p {d.p:.3f}, after Holm {d.adjusted:.2f})" for d in found.differences() if d.adjusted and d.p < 0.05 <= d.adjusted]
print("at their own rates, who would have counted if asked alone:", ", ".join(also) or "nobody else")
worse = [name for name, word in verdict["at LoRA's rate"].items() if word == "worse"]
better = [name for name, word in verdict["at its own rate"].items() if word == "better"]
unfair.reveal("a" if len(worse) < 2 else "b" if len(worse) < 6 else "c", f"Worse: {', '.join(worse) or 'nobody'}.")
fair.reveal("abc"[min(len(better), 2)], f"Better: {', '.join(better) or 'nobody'}.")
found

# %% [markdown]
# ## Luck, or a reason?
#
# A thousand races in which *nobody* is better: twelve LoRAs under twelve names. In how many does somebody stand out, if each faces
# the 5 % limit as though it ran alone?
#
# What passes Holm's limits still wants a reason. So, below: LoRA at DoRA's rank, and VeRA's race with other budgets.

# %%
luck = predict("12.E", ...)

# %%
def false_alarms(limits, seeds=10, races=300 if fast else 1000):
    """The share of races without any difference in which `who_beats_lora` finds one."""
    dice = torch.Generator().manual_seed(seed)
    names = ["LoRA", *(variant.name for variant in VARIANTS)]
    hits = 0
    for _ in range(races):
        scores = 2 * torch.randn(seeds, 1, generator=dice) + torch.randn(seeds, len(names), generator=dice)
        hits += any(word != "open" for word in who_beats_lora(dict(zip(names, scores.T)), limits).values())
    return hits / races


alone, holm = false_alarms(limits(10)[[1] * 12]), false_alarms(limits(10))
print(f"{len(VARIANTS)} entrants, no difference: somebody stands out in {alone:.0%} of races, with Holm's limits in {holm:.0%}")
luck.reveal("a" if alone < 0.12 else "b" if alone < 0.45 else "c",
            f"{alone:.0%}, and {holm:.0%} with your rule. Not 1 − 0.95¹¹ = {1 - 0.95**11:.0%}: all are compared with one and the same LoRA.")


short_run = {"seeds": (0, 1), "tuning_seeds": (100,), "rates": 3, "steps": QUICK["steps"]} if fast else {}
steps = short_run.get("steps", STEPS)
race_seeds = found.fair["seed"].unique().tolist()
scores = [run("LoRA", found.chosen["LoRA"], s, BUDGET * 3 // 4, steps)["test"] for s in race_seeds]
at_r_3 = 100 * (sum(scores) - sum(found.scores("LoRA"))) / len(scores)
print(f"DoRA, r = 3: {own['DoRA']:+.1f} points beside LoRA; LoRA itself at r = 3, at its rate for r = 4: {at_r_3:+.1f}")

# VeRA against LoRA again, tuned anew, with the numbers that LoRA has at other ranks.
settings = short_run or {"seeds": range(6), "tuning_seeds": (100, 101)}
budgets = {r: race(("LoRA", "VeRA"), budget=BUDGET * r // 4, **settings) for r in ([1, 4] if fast else [1, 2, 4, 8])}
leads = {r: again.differences()[0] for r, again in budgets.items()}
show(
    plot_budgets(budgets, title="VeRA beside LoRA, by what may be trained"),
    alt="Test accuracy against the budget. VeRA less LoRA, in points: " + ", ".join(f"{100 * d.mean:+.1f} at r = {r}" for r, d in leads.items()),
)
for r, d in leads.items():
    print(f"VeRA with the numbers of LoRA at r = {r}: {100 * d.mean:+.1f} ± {100 * d.half:.1f} points, tuned anew, {len(budgets[r].scores('LoRA'))} seeds")

# %% [markdown]
# Rank is not DoRA's whole reason. Another suspect, tried in docs/results.md: the `.detach()` of 12.1. Where would you take VeRA?
#
# ## Which rank, and where?
#
# So far every layer had the same rank. A trained update's singular values may tell where rank is needed. Cut all layers *together*: keep the
# fewest directions that hold a share of the sum of all $s^2$.

# %% exercise="12.5"
def ranks_by_energy(spectra: list, share: float) -> list:
    """-> one rank per layer (0 is allowed): as few directions in all as hold `share` of the sum of all s².

    spectra: for each layer the singular values of its update, largest first; not all of one length
    """
    ### BEGIN SOLUTION
    values = torch.cat(list(spectra))
    layer = torch.tensor([k for k, S in enumerate(spectra) for _ in S])
    order = values.argsort(descending=True)
    held = (values[order] ** 2).cumsum(0)
    kept = layer[order[: int((held < share * held[-1]).sum()) + 1]]
    return [int((kept == k).sum()) for k in range(len(spectra))]
    ### END SOLUTION

# %% check="12.5"
check("12.5", ranks_by_energy)

# %%
ranks_by_energy = use("12.5", ranks_by_energy)
generous = trained({name: 16 for name in TARGETS}, seed, steps=60 if fast else STEPS)
spectra = [S.double() for S in singular_values(generous).values()]
for share in [0.5, 0.8, 0.9, 0.99]:
    print(f"{share:.0%} of the energy of three layers with r = 16: ranks {ranks_by_energy(spectra, share)}")

# %% [markdown]
# At most the numbers of r = 4, but placed. **Energy** trains r = 16 and cuts; *afresh* begins again with energy's ranks. **AdaLoRA** starts with r = 5
# and prunes. Controls: energy's ranks *reversed*, and r = 4 everywhere trained twice as long. A **search** asks for the smallest single r.

# %%
placed = predict("12.F", ...)

# %%
choices = choose_ranks(ways=("everywhere", "energy", "afresh"), seeds=(0, 1), steps=60) if fast else choose_ranks()
show(
    plot_rank_choice(choices, title="Who places the ranks, and is it worth it?"),
    alt="Left the rank of each layer, right the accuracy of each seed. " + choices.verdict().replace("\n", ". "),
)
print(choices.verdict())
good = [d.name for d in choices.differences() if d.decided and d.mean > 0 and d.name in ("energy", "afresh", "AdaLoRA")]
placed.reveal("abc"[min(len(good), 2)], f"Better than r = 4 everywhere: {', '.join(good) or 'none'}.")

# %% tags=["hidden"]
# The README's picture. To make it anew: LORA_LAB_IMAGES=docs/img lora-lab run build/12_variants.ipynb
import os
from pathlib import Path

from lora_lab.view import save_png

if "LORA_LAB_IMAGES" in os.environ:
    for theme, ending in [("light", ""), ("dark", "_dark")]:
        path = Path(os.environ["LORA_LAB_IMAGES"]) / f"race{ending}.png"
        save_png(plot_race(found, title="The same race twice"), path, theme, dpi=140)

# The notebook's rules and the module's own say the same of these runs.
from lora_lab.zoo.race import rank_for
from lora_lab.zoo.ranks import ranks_by_energy as by_name

assert all(rank_for(name) == r for name, r in ranks.items())
for is_fair, told in zip((False, True), verdict.values(), strict=True):
    asked = [d for d in found.differences(is_fair) if d.adjusted is not None]
    assert told == {d.name: ("better" if d.mean > 0 else "worse") if d.decided else "open" for d in asked}
for share in [0.5, 0.9]:
    assert ranks_by_energy(spectra, share) == list(by_name(dict(enumerate(spectra)), share).values())
if not fast:  # the last column of the summary's table
    own_rate = {name for name, word in verdict["at its own rate"].items() if word == "worse"}
    assert better == ["VeRA"] and own_rate == {"DoRA", "AdaLoRA"} and leads[1].mean > leads[4].mean > leads[8].mean
assert exact == 8 and largest < 1e-4  # float32 sums of 64 products of numbers near 1

# %% [markdown]
# *Afresh* paid for two trainings: what does plain r = 4 do with as many steps? *Reversed* has the same numbers in the wrong layers: what does it
# tell? AdaLoRA has the accuracy that it had in the race, and perhaps another word beside it: another draw of LoRA.

# %%
progress()

# %% [markdown]
# ## Summary
#
# - A variant is 1 to 25 new lines, mostly at one of five places.
# - A budget, own rates, seeds, twins, a correction: leave one out, and tuning or luck wins.
#
# ## Where this shows up in practice
#
# What the authors promise, and what this one network and task showed:
#
# | if this hurts | | here |
# |---|---|---|
# | the base is too large | QLoRA | open; memory not measured |
# | thousands of adapters | VeRA, LoRA-XS | VeRA ahead, with few numbers; slower |
# | activation memory | LoRA-FA | open; memory not measured |
# | large r | rsLoRA | open at r = 4; large r: lab 03 |
# | slow start | PiSSA, OLoRA, EVA, LoRA+ | open; speed not measured |
# | small r | DoRA | behind |
# | ranks by layer | AdaLoRA | behind |
#
# First: LoRA with a tuned rate.
