# %% [markdown]
# # 10 · The broken-adapter clinic
#
# <!-- lab:badges -->
#
# Most questions about LoRA are one: why doesn't mine work? Thirteen adapters are waiting, each broken the way people break them: ten small
# digit classifiers, and K, L, M, which are GPT-2. Each has a **healthy twin**: same base, data and seed, done right. You examine them with
# four probes, name causes, and repair.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: a few steps for the GPT-2 patients instead of 25
seed = 0
device = "auto"

# %%
import copy
import textwrap
import warnings

import torch
import transformers
from torch import nn

from lora_lab import apply_lora, diagnose
from lora_lab.clinic import BEDS, adapted, admit, base_model, fit, healthy, triage_case
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.diagnosis import adapters, gradient_report, step0_identity
from lora_lab.view import plot_spread, plot_ward, show

torch.set_num_threads(1)  # small models: on a shared machine threads wait for each other
warnings.simplefilter("ignore")  # peft and torch do warn about some of these; nobody reads it
transformers.logging.set_verbosity_error()
well = healthy(seed)
beds = {bed: admit(bed, seed, steps=4 if fast else 25) for bed in BEDS}
for bed, visit in beds.items():
    print(f'{bed}  "{visit.complaint}"')
curves = predict("10.A", ...)  # write "a", "b" or "c" instead of ...

# %%
show(
    plot_ward(
        {bed: (visit.losses, visit.twin) for bed, visit in beds.items()},
        title="Thirteen broken adapters, and what they could have been",
    ),
    alt="Thirteen small charts, one for each bed: the loss of the broken adapter over the steps in colour, "
    "that of its healthy twin in grey. Some curves stay flat, several lie on the twin's.",
)
last = {bed: [sum(c[-3:]) / 3 for c in (visit.losses, visit.twin)] for bed, visit in beds.items()}
above = [bed for bed, (own, twin) in last.items() if not own <= 1.5 * twin]
curves.reveal(
    "a" if len(above) > 10 else "b" if len(above) > 4 else "c",
    f"{len(above)} of 13: {', '.join(above)}. The others look well: what was saved, merged or loaded is in no curve.",
)

# %% [markdown]
# ## Probe 1 · The same as the base?
#
# A fresh adapter computes exactly what its base does; a trained one does not. So: how far apart are two models?
#
# $$\max_i |y_i - z_i| \;/\; \max_i |z_i|$$

# %% exercise="10.1"
def apart(model: nn.Module, base: nn.Module, x: torch.Tensor) -> float:
    """Largest |model(x) - base(x)| over largest |base(x)|.

    Both in eval mode, without gradients. Afterwards each is in the mode in which it came.
    """
    ### BEGIN SOLUTION
    before = [(m, m.training) for m in (model, base)]
    with torch.no_grad():
        y, z = model.eval()(x), base.eval()(x)
    for m, training in before:
        m.train(training)
    return float((y - z).abs().max() / z.abs().max())
    ### END SOLUTION

# %% check="10.1"
check("10.1", apart)

# %%
apart = use("10.1", apart)
x, y = well.batch
fresh = adapted(base_model(seed), seed=seed)
print(f"a fresh adapter                     {apart(fresh, base_model(seed), x):.3g}")
print(f"the healthy twin, trained           {apart(well.model, base_model(seed), x):.3g}\n")
print("bed   with and without ΔW   the same call twice")
for bed in "BEHI":
    probe = step0_identity(beds[bed].model, beds[bed].batch)
    print(f" {bed}        {probe.effect:10.3g}     {probe.spread:16.3g}")
gradient = predict("10.B", ...)

# %% [markdown]
# Two findings already. **I** was trained, saved, loaded, and its $\Delta W$ is 0: it did not arrive. **H** answers differently each time,
# in eval mode: its dropout never sleeps. B and E pass this probe. No probe sees everything.
#
# ## Probe 2 · Who learns?

# %%
report = gradient_report(fresh, well.batch)
norms = {name: norm for name, norm in report.norms.items()}
for name, norm in norms.items():
    print(f"{name:12s} {report.state[name]:6s} {norm:.3g}")
of_A = [norm for name, norm in norms.items() if name.endswith("A")]
gradient.reveal(
    "b" if not any(of_A) else "c",
    "It is proportional to B, which is 0. After one step B is not, and A begins to learn.",
)

# %% [markdown]
# **None** and **0** are two findings. None: nothing arrived. 0: it arrived, and is zero. Write the probe that tells them apart, and leaves
# no traces.

# %% exercise="10.2"
def who_learns(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, str]:
    """For each name in model.named_parameters(): "frozen", "none", "zero" or "moves".

    frozen: requires no gradient. none: no gradient arrives. zero: it is 0 everywhere. moves: it is not.
    The loss is the mean of (model(x) - y) squared. Gradients that parameters hold already stay as they are,
    and don't count; afterwards the same ones are there, and no others. No step is taken.
    """
    ### BEGIN SOLUTION
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    loss = ((model(x) - y) ** 2).mean()
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    arrived = dict(zip(trained, grads))

    def state(name):
        if name not in trained:
            return "frozen"
        if arrived[name] is None:
            return "none"
        return "moves" if arrived[name].any() else "zero"

    return {name: state(name) for name in named}
    ### END SOLUTION

# %% check="10.2"
check("10.2", who_learns)

# %%
who_learns = use("10.2", who_learns)
for bed in "ADF":
    report = gradient_report(beds[bed].model, beds[bed].batch)
    print(f"bed {bed}: {report}")
print(f"\nthe healthy twin at step 0: {who_learns(fresh, x, nn.functional.one_hot(y, 10).float())}")

# %% [markdown]
# **D**: $A = B = 0$. Each gradient is proportional to the other factor, so both stay 0. **F**: none arrive, gradient checkpointing
# has cut them off; only its head learns. **A** has gradients, and B never moves. Who takes the steps?
#
# ## The commonest complaint
#
# "My loss stays flat." One chart per patient, taken around a single step:

# %%
rows = {kind: triage_case(kind, seed=7) for kind in ("fresh", "targets", "both_zero", "no_gradient", "optimizer")}
print(f"{'':12s}" + "".join(f"{name:>9s}" for name in next(iter(rows.values()))))
for kind, chart in rows.items():
    cells = ("None" if v is None else str(v) if isinstance(v, int) else f"{v:.2g}" for v in chart.values())
    print(f"{kind:12s}" + "".join(f"{cell:>9s}" for cell in cells))

# %% exercise="10.3"
def why_flat(chart: dict) -> str:
    """One of "targets", "no gradient", "both zero", "optimizer", "healthy".

    chart: wanted, adapted (layers that should carry an adapter, that do); A, B (largest norm of a factor);
    grad_A, grad_B (largest norm of its gradient, None where none arrived); B_moved (by how much, in one step)
    "healthy" also for a patient who has been training for a while.
    """
    ### BEGIN SOLUTION
    if chart["adapted"] < chart["wanted"]:
        return "targets"
    if chart["grad_A"] is None and chart["grad_B"] is None:
        return "no gradient"
    if chart["A"] == 0 and chart["B"] == 0:
        return "both zero"
    return "optimizer" if chart["B_moved"] == 0 else "healthy"
    ### END SOLUTION

# %% check="10.3"
check("10.3", why_flat)

# %%
why_flat = use("10.3", why_flat)
print({kind: why_flat(chart) for kind, chart in rows.items()})
held = {id(p) for group in beds["A"].known["optimizer"].param_groups for p in group["params"]}
mine = [p for a in adapters(beds["A"].model) for p in (a.A, a.B)]
print(f"bed A: its optimizer holds {len(held)} tensors, and {sum(id(p) in held for p in mine)} of the {len(mine)} factors")

# %% [markdown]
# **A** made its optimizer before the adapters were in.
#
# ## Probe 3 · How often is ΔW in there?
#
# Merging adds $\Delta W$ to the weight; the layer must then stop adding it. The output should hold it exactly once. Rounding touches every
# entry, so count by least squares:
#
# $$k = \arg\min_k \| W - W_0 - k\,\Delta W \|^2$$

# %% exercise="10.4"
def times_counted(W, W0, A, B, scaling: float) -> float:
    """The k for which W0 + k · ΔW comes closest to W, over all entries. ΔW = scaling · B A.

    W, W0 (out, in), A (r, in), B (out, r). Not rounded; negative where ΔW was subtracted.
    """
    ### BEGIN SOLUTION
    delta = scaling * B @ A
    return float(((W - W0) * delta).sum() / (delta * delta).sum())
    ### END SOLUTION

# %% check="10.4"
check("10.4", times_counted)

# %%
times_counted = use("10.4", times_counted)
for name, visit in {"the healthy twin": well, "bed B": beds["B"]}.items():
    for a in adapters(visit.model):
        W0 = getattr(base_model(seed), a.name).weight
        k = times_counted(a.base.weight.detach(), W0, a.A.detach(), a.B.detach(), a.scaling)
        print(f"{name:17s} {a.name}: {k:.2f} times in the weight, and once beside it")
print({name: round(score, 3) for name, score in beds["B"].scores.items()})
best_curve = predict("10.C", ...)
new_head = predict("10.D", ...)

# %% [markdown]
# **B** counts it twice.
#
# ## Probe 4 · The next day
#
# Does what was saved, loaded somewhere else, compute the same? Two owners swear that it should.

# %%
for bed in "GC":
    print(f"bed {bed}:", {name: round(score, 3) for name, score in beds[bed].scores.items()})
    print(f"       {diagnose(beds[bed].model, beds[bed].batch, **beds[bed].known).problems[0]}\n")
at_G = diagnose(beds["G"].model, beds["G"].batch, **beds["G"].known).causes
best_curve.reveal(
    "b" if at_G == ("base_trains",) else "a",
    "A and B belong to a base that nobody has any more: it moved with them, and only they were saved.",
)
day_before, day_after = beds["C"].scores.values()
new_head.reveal(
    "c" if day_after < 0.25 else "a" if day_after > 0.9 * day_before else "b",
    f"{day_before:.0%} before, {day_after:.0%} after: the head was made fresh, and another one stands there now.",
)
explodes = predict("10.E", ...)

# %% [markdown]
# ## alpha grows, and so does the step
#
# Adam's first step moves each entry of B by the learning rate, whatever the gradient. So $\Delta W$ moves by about $\text{lr} \cdot
# \text{scaling} \cdot r \cdot |A|$: with alpha $= 2r$ the scaling stays, and the step grows with $r$.

# %%
settings = {"r = 8, alpha = 16": (8, 16, 0.05), "r = 64, alpha = 128": (64, 128, 0.05)}
settings |= {"r = 64, alpha = 16": (64, 16, 0.05), "r = 64, alpha = 128, lr / 10": (64, 128, 0.005)}
ends = {}
for name, (r, alpha, lr) in settings.items():
    runs = [fit(adapted(base_model(s), r=r, alpha=alpha, seed=s), s, lr=lr) for s in range(seed, seed + 3)]
    ends[name] = [sum(losses[-20:]) / 20 for losses in runs]
show(
    plot_spread(ends, title="Learning rate 0.05, and a tenth of it", xlabel="mean loss of the last 20 steps"),
    alt="Last loss of three seeds each: " + "; ".join(f"{k}: " + ", ".join(f"{v:.2f}" for v in vs) for k, vs in ends.items()),
)
dead, rescued = (max(ends["r = 64, alpha = 128"]), max(ends["r = 64, alpha = 16"]))
explodes.reveal(
    "b" if rescued < 0.8 * min(ends["r = 64, alpha = 128"]) else "a",
    "Ten classes guessed evenly cost ln 10 = 2.30: there the dead ones end. A tenth of the learning rate revives them, too.",
)

# %% [markdown]
# ## All of it, on any model
#
# `lora_lab.diagnose` runs these probes on a model of any make, ours, peft's or your own, and changes nothing in it. Here are all
# thirteen and the healthy twin:

# %%
found = {bed: diagnose(visit.model, visit.batch, **visit.known) for bed, visit in beds.items()}
for bed, result in found.items():
    what = result.problems[0]
    print(textwrap.fill(f"{bed}  {what.cause:14s}  {what.seen}", 110, subsequent_indent=" " * 19))
print(f"-  the healthy twin: {diagnose(well.model, well.batch, **well.known).causes or 'no problem found'}\n")
for bed in "KLM":
    print(f"{bed}  nats a token:", {name: round(score, 2) for name, score in beds[bed].scores.items()})

# Your own patient: put a model of yours here. What you hand over besides makes it see more: base, optimizer, lr, trained, reload.
mine = apply_lora(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), r=4, alpha=8, target_modules=["0"])
optimizer = torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], lr=1e-2)
print("\nYours:", diagnose(mine, (x, y), optimizer=optimizer, trained=False), sep="\n")

# %% tags=["hidden"]
# What the prose says about single beds, and the thirteen causes, compared with the run.
assert {bed: result.causes for bed, result in found.items()} == {bed: (cause,) for bed, cause in BEDS.items()}
assert diagnose(well.model, well.batch, **well.known).healthy
assert step0_identity(beds["I"].model, beds["I"].batch).effect == 0
assert step0_identity(beds["H"].model, beds["H"].batch).spread > 1e-3
assert beds["G"].losses[-1] < beds["G"].twin[-1]
assert min(ends["r = 64, alpha = 128"]) > 2.2 and rescued < 2.2
assert max(ends["r = 64, alpha = 128, lr / 10"]) < 1

# %% [markdown]
# **L**'s list had two typos; peft said nothing, because another entry matched. **K** merged into a matrix that the head reads, too.
# **M** added $BA$ to a stored $W^\top$; square matrices don't complain.
#
# ## Operate
#
# A run as somebody sent it, with four faults. It raises no error.

# %%
def as_it_came(model, targets, x, y, steps, lr):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    apply_lora(model, r=3, alpha=6, target_modules=targets)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    saved = {name: p for name, p in model.named_parameters() if "lora_" in name}
    return saved, model(x).detach()


def dropping(head_seed):
    model = base_model(seed)
    torch.manual_seed(head_seed)
    model.act1 = nn.Sequential(nn.ReLU(), nn.Dropout(0.2))
    model.head = nn.Linear(32, 10)  # fresh: these labels are new
    return model


def two_days(run):
    """Accuracy on the day of the run, and of its file on the next day, with another fresh head."""
    model = dropping(1)
    saved, predictions = run(model, ["fc1", "fc2"], x, y, 100, 0.01)
    other = apply_lora(dropping(2), r=3, alpha=6, target_modules=["fc1", "fc2"]).eval()
    other.load_state_dict(saved, strict=False)
    return [float((p.argmax(-1) == y).float().mean()) for p in (predictions, other(x))]


print("today {:.0%}, tomorrow {:.0%}".format(*two_days(as_it_came)))

# %% exercise="10.5"
def fine_tune(model, targets, x, y, steps, lr):
    """-> saved, predictions. r=3, alpha=6, Adam, as above, without its four faults.

    model has a fresh layer called model.head. Afterwards the adapters and the head have learned, the base
    has not changed; saved: name -> a copy of everything that trained, and nothing else;
    predictions: what a machine that loads `saved` would compute for x, and every time the same
    """
    ### BEGIN SOLUTION
    apply_lora(model, r=3, alpha=6, target_modules=targets)
    model.head.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    saved = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        return saved, model.eval()(x)
    ### END SOLUTION

# %% check="10.5"
check("10.5", fine_tune)

# %%
fine_tune = use("10.5", fine_tune)
print("today {:.0%}, tomorrow {:.0%}".format(*two_days(fine_tune)))

# %% [markdown]
# ## The sealed ward
#
# No curve, no complaint: an exported weight, the base $W_0$, and the file with $A$ and $B$. It should be $W_0 + \Delta W$. Name the cause,
# and return the weight as it should be. Rounding leaves a few per cent of $\Delta W$ unexplained; another base, or a transpose, as much as
# $\Delta W$ itself.

# %% exercise="10.6"
def discharge(W, W0, A, B, scaling):
    """-> cause, repaired weight.

    cause: "healthy", "no effect", "merged twice", "scaling" (B A went in without it), "transposed", or
    "other base" (something else than these was added). Square: a transpose raises no error.

    W, W0 (n, n), A (r, n), B (n, r)
    """
    ### BEGIN SOLUTION
    delta = scaling * B @ A
    k = times_counted(W, W0, A, B, scaling)
    if (W - W0 - k * delta).norm() < 0.3 * delta.norm():
        multiples = {"no effect": 0, "healthy": 1, "merged twice": 2, "scaling": 1 / scaling}
        cause = min(multiples, key=lambda word: abs(multiples[word] - k))
    elif (W - W0 - delta.T).norm() < 0.3 * delta.norm():
        cause = "transposed"
    else:
        cause = "other base"
    return cause, W0 + delta
    ### END SOLUTION

# %% check="10.6"
check("10.6", discharge)

# %%
# Six of today's patients, by the weight with which they compute, whatever their layers say they are.
discharge = use("10.6", discharge)


def computes(layer):
    """The weight (out, in) of whatever a linear layer does, its own B A included."""
    with torch.no_grad():
        eye = torch.eye(layer.base.weight.shape[1])
        return (layer(eye) - layer(torch.zeros(1, len(eye)))).T


merged_M = copy.deepcopy(beds["M"].model.transformer.h[0].attn.c_proj.eval())
merged_M.merge()
W0, file = base_model(seed).fc2.weight.detach(), well.model.fc2  # B and I had the healthy twin's A and B
sealed = {bed: (beds[bed].model.fc2, W0, file if bed in "BI" else beds[bed].model.fc2) for bed in "BEGI"}
sealed |= {"M": (merged_M, beds["M"].model.transformer.h[0].attn.c_proj.base.weight.T, merged_M), "-": (file, W0, file)}
named = {}
for bed, (layer, base, saved) in sealed.items():
    factors = (saved.lora_A.detach(), saved.lora_B.detach(), saved.alpha / saved.r)
    W = computes(layer)
    named[bed], repaired = discharge(W, base, *factors)
    k, chart = times_counted(W, base, *factors), BEDS.get(bed, "healthy")
    print(f"{bed}  you say {named[bed]:13s} the chart said {chart:13s} k = {k:5.2f}, 1 / scaling = {1 / factors[2]:.2f}")

# %% tags=["hidden"]
# The six words are those of six patients that were made by doing it wrong.
expected = {"B": "merged twice", "E": "scaling", "G": "other base", "I": "no effect", "M": "transposed", "-": "healthy"}
assert named == expected, named

# %% [markdown]
# ## Summary
#
# - Does it differ from its base? Who learns? What is covered? Does it come back the same?
# - None is not 0; B = 0 is healthy, A = B = 0 is not.
# - A good curve proves nothing about saving, merging, loading; nor does "no problem found".
#
# **Where this shows up in practice**: all thirteen come from public issue trackers.

# %%
progress()
