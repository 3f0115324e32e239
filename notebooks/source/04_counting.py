# %% [markdown]
# # 04 · Counting
# <!-- lab:badges -->
#
# What LoRA saves, what it does not, and how to know before you rent a GPU. You count parameters, bytes
# and arithmetic by hand, look a training step in the ledger, and referee a famous paper.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: fewer runs, for a quick check of the notebook
seed = 0
device = "auto"

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lora_lab import apply_lora, count_parameters
from lora_lab.counting import matrix_flops, tasks_bytes
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.gpt2_files import gpt2_folder
from lora_lab.ledger import readable, training_flops, training_memory
from lora_lab.presets import from_config, gpu_bytes, preset
from lora_lab.printed import printed_figures
from lora_lab.state import adapter_bytes
from lora_lab.view import ledger_explorer, plot_ledger, plot_steps, show

torch.set_num_threads(1)  # nothing here computes with a large matrix: shapes are enough

# %% [markdown]
# "10,000 times fewer trainable parameters", says the paper's abstract of GPT-3. Before you count:
# what else becomes smaller by that much?

# %%
ten_thousand = predict("4.A", ...)

# %% [markdown]
# ## Count by hand
#
# $A$ is $(r, d_\text{in})$, $B$ is $(d_\text{out}, r)$: together $r\,(d_\text{in} + d_\text{out})$ numbers. GPT-2 keeps $W_q, W_k, W_v$
# in *one* layer with $3d$ outputs. The paper adapts two of these three slices, each with a pair
# $A, B$ of its own.

# %% exercise="4.1"
def added_parameters(d_in: int, d_out: int, r: int, of: int = 1, chosen: int = 1) -> int:
    """How many numbers LoRA adds to a layer with a weight of (d_out, d_in).

    The outputs are `of` equal slices; `chosen` of them get an adapter each. A plain layer: of=1, chosen=1
    """
    ### BEGIN SOLUTION
    return chosen * r * (d_in + d_out // of)
    ### END SOLUTION

# %% check="4.1"
check("4.1", added_parameters)

# %%
added_parameters = use("4.1", added_parameters)
attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
narrow = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)]  # k and v have fewer heads here
cases = [  # preset, adapted layers, r, what one block has: (d_in, d_out, of, chosen)
    ("gpt2-medium", ["c_attn:q,v"], 4, [(1024, 3072, 3, 2)]),
    ("gpt2-medium", ["c_attn"], 4, [(1024, 3072)]),
    ("gpt2-medium", ["c_attn:q,k,v"], 4, [(1024, 3072, 3, 3)]),
    ("llama-7b", attention, 16, [(4096, 4096)] * 4),
    ("llama-3.1-8b", attention, 16, narrow),
    ("gpt3-175b", ["c_attn:q,v"], 4, [(12288, 3 * 12288, 3, 2)]),
]
print(f"{'':14}{'adapted':15}{'r':>3}{'you':>14}{'all tensors':>14}{'2 d r each':>14}")
counted = {}
for name, targets, r, block in cases:
    a = preset(name)  # a table of shapes: no weights, no memory
    yours = a.layers * sum(added_parameters(d_in, d_out, r, *rest) for d_in, d_out, *rest in block)
    true = count_parameters(apply_lora(a.build(), r, 2 * r, targets)).trainable
    square = a.layers * len(block) * 2 * a.d_model * r
    counted[name, len(counted)] = (yours, true)
    what = "q, k, v, o" if targets is attention else targets[0]
    print(f"{name:14}{what:15}{r:3}{yours:14,}{true:14,}{square:14,}")

# %% [markdown]
# Row 2 has one adapter across q, k and v and *the same count* as row 1: a count does not say which
# function it is. Web calculators take every layer for square (last column), and one article prints
# 4.19 million for row 4.
#
# ## What a budget allows
#
# A fresh head trains in full, beside the adapters: $d \cdot \text{classes}$ and a bias.

# %% exercise="4.2"
def largest_rank(shapes, budget: int, head=None) -> int:
    """The largest r at which adapters on all shapes, and the head, train at most `budget` numbers.

    shapes: a list of (d_in, d_out), one rank for all; head: (d, classes) of a new linear layer with
    bias, or None. 0 if not even r = 1 fits
    """
    ### BEGIN SOLUTION
    left = budget - (head[0] * head[1] + head[1] if head else 0)
    return max(0, left // sum(d_in + d_out for d_in, d_out in shapes))
    ### END SOLUTION

# %% check="4.2"
check("4.2", largest_rank)

# %%
largest_rank = use("4.2", largest_rank)
medium = preset("gpt2-medium")
linear = [row.shape for row in medium.rows() if row.kind == "Conv1D"]  # (d_in, d_out) as GPT-2 stores it
places = {"q and v": [(1024, 1024)] * 48, "every linear layer": linear}
total = count_parameters(medium.build()).total
print(f"GPT-2 medium, {total:,} numbers. The largest r for a share of them:")
for name, shapes in places.items():
    shares = "   ".join(f"{s:.1%}: {largest_rank(shapes, int(s * total)):4}" for s in [0.001, 0.01, 0.1])
    print(f"  {name:20}{shares}")
print("\nBreak-even: the largest r at which A and B together are no larger than W")
for d_in, d_out in sorted(set(linear)):
    even = largest_rank([(d_in, d_out)], d_in * d_out)
    print(f"  {d_in} x {d_out}: {even}, of a full rank of {min(d_in, d_out)}")

# %% [markdown]
# ## Bytes
#
# Training holds four accounts: *weights*, *gradients*, the optimizer's *state* (Adam: two running means
# of each gradient, momentum: one), and *activations*, which come later. Where does the frozen model
# appear?

# %% exercise="4.3"
def training_bytes(frozen: int, trained: int, width: int, optimizer: str):
    """-> bytes of (weights, gradients, optimizer's state), for counts of frozen and trained numbers.

    width: bytes a number, the same for all; optimizer: "adam", "momentum" or "sgd", as in torch.optim,
    without Adam's count of steps
    """
    ### BEGIN SOLUTION
    copies = {"adam": 2, "momentum": 1, "sgd": 0}[optimizer]
    return width * (frozen + trained), width * trained, copies * width * trained
    ### END SOLUTION

# %% check="4.3"
check("4.3", training_bytes)

# %%
training_bytes = use("4.3", training_bytes)
gpt3, adapters = 175_255_800_000, 18_874_368  # the paper's count of GPT-3; yours, with r = 4 on q and v
full, lora = training_bytes(0, gpt3, 2, "adam"), training_bytes(gpt3, adapters, 2, "adam")
print("GPT-3, 2 bytes a number    full fine-tuning       LoRA")
for name, *pair in zip(["weights", "gradients", "Adam's state", "in all"], [*full, sum(full)], [*lora, sum(lora)]):
    print(f"  {name:25}{readable(pair[0]):>16}{readable(pair[1]):>11}")
print(f"Numbers that train: {gpt3 / adapters:,.0f} times fewer. The paper prints 1.2 TB and 350 GB.")
less = sum(full) / sum(lora)
ten_thousand.reveal(
    "a" if less > 3000 else "b" if less > 30 else "c" if less > 2 else "d",
    f"{less:.1f} times: gradients and state go, and the frozen weights stay.",
)


def ledgers(architecture, targets, dtype=torch.float32, r=8, **step):
    """(full fine-tuning, LoRA): models of shapes alone, and what a training step would hold."""
    models = [architecture.changed(dropout=0.0).build(dtype) for _ in range(2)]
    apply_lora(models[1], r, 2 * r, targets)
    return models, [training_memory(model, **step) for model in models]


llama = preset("llama-3.1-8b")
models, both = ledgers(llama, "all-linear", torch.bfloat16, r=16, batch=2, context=1024, device="cuda")
accounts = {
    name: tuple(getattr(memory, field) for memory in both)
    for name, field in [
        ("weights", "weights"), ("gradients", "gradients"), ("optimizer's state", "optimizer"),
        ("activations", "activations"), ("peak of the step", "peak"),
    ]
}
accounts["file of one task"] = (both[0].weights, adapter_bytes(models[1]))
draw_ledger = lambda: plot_ledger(
    accounts, title="What LoRA saves, and what it does not", apart=["peak of the step", "file of one task"]
)
show(
    draw_ledger(),
    alt="Bars of bytes, full fine-tuning above LoRA. Weights and activations are as long for both; "
    "LoRA's gradients, optimizer state and file are hairlines; its peak is "
    + f"{readable(both[1].peak)} beside {readable(both[0].peak)}.",
    caption="Llama 3.1 8B, two texts of 1,024 tokens, bfloat16, Adam, r = 16 on every linear layer: predicted from shapes.",
)

# %% tags=["hidden"]
# The README's picture. To make it anew: LORA_LAB_IMAGES=docs/img lora-lab run build/04_counting.ipynb
from lora_lab.view import save_png

if "LORA_LAB_IMAGES" in os.environ:
    for theme, ending in [("light", ""), ("dark", "_dark")]:
        save_png(draw_ledger(), Path(os.environ["LORA_LAB_IMAGES"]) / f"ledger{ending}.png", theme, dpi=140)

# %% [markdown]
# ## Why activations stay
#
# The backward pass needs numbers of the forward pass. Three formulas say which:
#
# $$dW = dy^\top x \qquad dA = (B^\top dy)\, x^\top \qquad dB = dy\,(Ax)^\top$$
#
# while $dx = W^\top dy$ asks for no activation, and GELU's derivative for its input.

# %%
activations = predict("4.B", ...)

# %% exercise="4.4"
def kept_numbers(layers, tokens: int, r: int) -> int:
    """How many numbers of the forward pass are kept, for a chain of linear layers with a GELU between.

    layers: (d_in, d_out, kind), kind "frozen", "full" or "lora" (frozen, with an adapter of rank r).
    The first layer's x counts too, if it is kept. It needs no gradient: nothing passes back below the
    first layer that trains. No GELU after the last layer
    """
    ### BEGIN SOLUTION
    kept, learns = 0, False
    for place, (d_in, d_out, kind) in enumerate(layers):
        learns = learns or kind != "frozen"
        kept += {"full": d_in, "lora": d_in + r, "frozen": 0}[kind]
        if learns and place < len(layers) - 1:
            kept += d_out
    return kept * tokens
    ### END SOLUTION

# %% check="4.4"
check("4.4", kept_numbers)

# %%
kept_numbers = use("4.4", kept_numbers)
print("Six layers 1024 → 1024, 512 tokens, r = 8: numbers kept")
for name, kinds in [
    ("full fine-tuning", ["full"] * 6), ("an adapter on every layer", ["lora"] * 6),
    ("on every second layer", ["lora", "frozen"] * 3), ("on the last layer", ["frozen"] * 5 + ["lora"]),
]:
    print(f"  {name:28}{kept_numbers([(1024, 1024, kind) for kind in kinds], 512, 8):12,}")

some, every = [
    ledgers(medium, targets, batch=4, context=512, device="cuda")[1] for targets in [["c_attn:q,v"], "all-linear"]
]
_, thrifty = ledgers(medium, "all-linear", batch=4, context=512, device="cuda", checkpointing=True)
show(
    plot_steps(
        {"full": every[0], "LoRA, q and v": some[1], "LoRA, every layer": every[1], "and checkpointing": thrifty[1]},
        title="One training step of GPT-2 medium, as time goes on", width=9.2,
    ),
    alt="Memory over a step, four panels. Activations rise through the forward pass and fall through "
    "the backward pass, to nearly one height with and without LoRA; weights lie below all; state and "
    "gradients are wide bands for full fine-tuning alone. With checkpointing the mountain is gone.",
    caption="4 texts of 512 tokens, float32, Adam, r = 8. The mark is the peak.",
)
share = every[1].activations / every[0].activations
activations.reveal(
    "a" if share < 0.1 else "b" if share < 0.8 else "c",
    f"{share:.1%} of it: {readable(every[1].activations)} of {readable(every[0].activations)}. "
    f"On q and v alone {some[1].activations / some[0].activations:.0%}.",
)

# %% [markdown]
# ## Hands on
#
# The mountain is batch times context. Find out:
#
# - Which GPT-2 trains in full on a T4, and which with LoRA?
# - Does a smaller r ever make it fit?
# - What brings an 8-billion Llama onto a T4?

# %%
ledger_explorer(model="gpt2-medium", batch=8, context=512, r=8)

# %% [markdown]
# ## Predict a real run
#
# Now one that happens: the lab's own pocket GPT-2, 4 texts of 128 tokens, AdamW. A process of its own
# runs three steps; the operating system says how much memory it took at most.

# %%
peak = predict("4.C", ...)

# %%
CHILD = '''
import sys, time, torch
from transformers import GPT2Config, GPT2LMHeadModel
from lora_lab import apply_lora, save_adapter
from lora_lab.gpt2 import load_gpt2

def memory(field):  # of this process, in bytes, as Linux counts it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def train(model, batch, context, steps):
    adam, seconds = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4), []
    for _ in range(steps):
        ids = torch.randint(0, model.config.vocab_size, (batch, context))
        start = time.perf_counter()
        adam.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        seconds.append(time.perf_counter() - start)
    return min(seconds)

torch.set_num_threads(1)
tiny = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
train(GPT2LMHeadModel(tiny), 1, 8, 1)  # what Python and torch load once
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
model, _ = load_gpt2("pocket")
model.train()
if sys.argv[1] == "LoRA":
    apply_lora(model, 8, 16, ["c_attn:q,v"])
seconds = train(model, 4, 128, 3)
print(memory("VmHWM") - before, seconds)
if sys.argv[1] == "LoRA":
    save_adapter(model, sys.argv[2])
'''
folder = Path(tempfile.mkdtemp())


def measure(kind, **environment):
    """(bytes at the peak, seconds of the fastest step) of a real run; None where no system says it."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    command = [sys.executable, "-c", CHILD, kind, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    highest, seconds = done.stdout.split()[-2:]
    return int(highest), float(seconds)


pocket = from_config(gpt2_folder("pocket"))  # its config.json: shapes, no weights
pocket_models, predicted = ledgers(pocket, ["c_attn:q,v"], batch=4, context=128)
kinds = ["full", "LoRA"]
usual = {kind: measure(kind) for kind in kinds}
# glibc keeps freed blocks for later unless they are large; this makes it give all above 64 kB back
tidy = {kind: measure(kind, MALLOC_MMAP_THRESHOLD_="65536") for kind in (kinds[1:] if fast else kinds)}
for kind, memory in zip(kinds, predicted):
    print(f"{kind:5} predicted {readable(memory.peak):>7}, {memory.moment}")
    for name, runs in [("as it is", usual), ("large blocks given back", tidy)]:
        if runs.get(kind):
            found = runs[kind][0]
            print(f"      measured  {readable(found):>7}  {found / memory.peak - 1:+.0%}  {name}")
if usual["full"] is None:
    print("(This system does not say what a process took at most; Linux does.)")
left = usual["LoRA"][0] / usual["full"][0] if usual["full"] else predicted[1].peak / predicted[0].peak
peak.reveal(
    "a" if left < 0.1 else "b" if left < 0.5 else "c" if left < 0.9 else "d",
    f"{left:.0%} of it: on a model this small, activations are the largest item of the bill.",
)

# %% [markdown]
# The prediction is of tensors. Beside them lie the tokenizer, the matrix library's work space, and what
# `malloc` keeps: freed blocks in a heap with holes. On a GPU torch's own allocator plays that part.
#
# ## Time
#
# A matrix of $N \times N$ costs $3N^2$ multiplications a token: forward, back to $x$, back to $W$. LoRA
# drops the last:
#
# $$\frac{2N^2 + 6Nr}{3N^2}$$

# %%
work = predict("4.D", ...)

# %%
ratio = matrix_flops(4096, 4096, r=16) / matrix_flops(4096, 4096)
print(f"One matrix, N = 4096, r = 16: {ratio:.4f} of the work of full fine-tuning")
step = []
for model in [medium.build(), apply_lora(medium.build(), 4, 32, ["c_attn:q,v"])]:
    step.append(sum(training_flops(model, batch=8, context=512)))
    print(f"GPT-2 medium: {count_parameters(model).share:8.3%} train, {step[-1]:.3g} FLOPs a step")
if usual["full"]:
    t = {kind: min(runs[kind][1] for runs in [usual, tidy] if runs.get(kind)) for kind in kinds}
    print(f"Pocket GPT-2, measured: {t['full']:.2f} s a step in full, {t['LoRA']:.2f} s with LoRA")
work.reveal(
    "a" if step[1] / step[0] < 0.03 else "b" if step[1] / step[0] < 0.4 else "c" if step[1] / step[0] < 0.9 else "d",
    f"{step[1] / step[0]:.1%}. No step is 10,000 times faster.",
)

# %% [markdown]
# ## Files
#
# Here is the saving that *is* of that size: what one more task costs on disk. Slices are written as one
# block with zeros for k, so that other libraries can read them: twice as large as what trains.

# %%
expected = adapter_bytes(pocket_models[1])
found = folder / "adapter_model.safetensors"
print(f"Adapter of the run above: {expected:,} bytes expected" + (f", {found.stat().st_size:,} on disk" if found.exists() else ""))
apply = lambda name, r: apply_lora(preset(name).build(), r, 2 * r, ["c_attn:q,v"])
rows = [("GPT-2 medium, float32", 4 * total, adapter_bytes(apply("gpt2-medium", 4)))]
rows += [("GPT-3, 2 bytes, as in the paper", 2 * gpt3, 2 * adapters)]
for name, base, adapter in rows:
    shared, apart = tasks_bytes(base, adapter, 100)
    print(f"{name}: 100 tasks are {readable(shared)} with adapters, {readable(apart)} as models")

# %% [markdown]
# ## Referee
#
# For square matrices $|\Theta| = 2\, L\, d\, r$, summed over the adapted matrices of a layer (paper, 5.1).
# Do its printed figures follow? A figure follows if rounding gives it.

# %% exercise="4.5"
def misprints(rows, layers: int, d_model: int) -> list:
    """The names of the rows that do not follow from the formula, rounded as they are printed.

    rows: (name, adapted matrices a layer, r, millions of numbers as printed, decimals printed)
    """
    ### BEGIN SOLUTION
    wrong = []
    for name, matrices, r, printed, decimals in rows:
        count = layers * matrices * r * 2 * d_model
        if round(count / 1e6, decimals) != printed:
            wrong.append(name)
    return wrong
    ### END SOLUTION

# %% check="4.5"
check("4.5", misprints)

# %%
misprints = use("4.5", misprints)
papers = {
    "GPT-2 medium": (24, 1024, [("table 3, q and v, r = 4", 2, 4, 0.35, 2)]),
    "GPT-2 large": (36, 1280, [("table 3, q and v, r = 4", 2, 4, 0.77, 2)]),
    "GPT-3": (96, 12288, [
        ("table 4, q and v, r = 1", 2, 1, 4.7, 1), ("table 4, q and v, r = 8", 2, 8, 37.7, 1),
        ("table 15, all four, r = 2", 4, 2, 18.8, 1), ("table 15, all four, r = 64", 4, 64, 603.8, 1),
        ("appendix D.4, all four, r = 2", 4, 2, 37.7, 1),
    ]),
}
caught = []
for name, (layers, d, rows) in papers.items():
    wrong = misprints(rows, layers, d)
    caught += [(name, row) for row in wrong]
    for row, matrices, r, printed, _ in rows:
        count = layers * matrices * 2 * d * r
        print(f"{name:13}{row:31}printed {printed:6}M  {count:12,}  {'does not follow' if row in wrong else 'follows'}")
print("\nAnd the rest of the paper, what needs a word:")
for figure in printed_figures():
    if figure.verdict != "equal" and figure.note:
        print(f"  {figure.where}, {figure.what}, {figure.printed}: {figure.note}")

# %% tags=["hidden"]
# What the prose of this lab says, held against this run: an instructor's run stops here if it is not so.
assert all(yours == true for yours, true in counted.values()), counted
values = [yours for yours, _ in counted.values()]
assert values[0] == values[1] and values[3] == 16_777_216 != 4_194_304, values
assert 3 < less < 5 and 0.95 < share < 1.05 and 0.5 < left < 0.9, (less, share, left)
assert accounts["weights"][1] / accounts["weights"][0] < 1.01 and accounts["activations"][1] / accounts["activations"][0] > 0.9
assert accounts["gradients"][1] < accounts["gradients"][0] / 100 and 0.66 < step[1] / step[0] < 0.7
assert thrifty[1].activations < every[1].activations / 5
if usual["full"]:
    gaps = [run[kind][0] / memory.peak - 1 for run in (usual, tidy) for kind, memory in zip(kinds, predicted) if kind in run]
    assert all(-0.05 < gap < 0.8 for gap in gaps[:2]) and all(-0.05 < gap < 0.25 for gap in gaps[2:]), gaps
    assert found.stat().st_size == expected
    trained = 4 * count_parameters(pocket_models[1]).trainable
    assert 1.9 < expected / trained < 2.2, (expected, trained)
assert len(caught) == 5 and ("GPT-3", "appendix D.4, all four, r = 2") in caught, caught

# %% [markdown]
# ## What you can now say
#
# - $r\,(d_\text{in} + d_\text{out})$ for each pair, shapes as they are.
# - LoRA saves gradients, optimizer state and files; weights and activations stay, a third of the
#   arithmetic goes.
# - A peak has a moment: ask what is in memory then.
#
# **In practice**: `lora-lab count llama-3.1-8b --r 16 --gpu T4` before you rent; if activations are the
# bill, checkpoint.

# %%
progress()
