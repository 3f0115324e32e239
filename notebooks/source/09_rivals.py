# %% [markdown]
# # 09 · LoRA and its rivals
# <!-- lab:badges -->
#
# A dozen ways to make a model fit a task, or fit a machine, measured beside each other. You build the parts that decide, and find out
# which question each rival answers.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: one seed and a few steps, for a quick check of the notebook
seed = 0
device = "auto"
text_seeds = 1  # seeds of the task with text; each takes about two minutes of one core

# %%
import copy
from dataclasses import replace
from functools import partial
from statistics import mean

import torch
from torch import nn

from lora_lab import apply_lora, count_parameters, digits, evaluate, lora_disabled, merge_and_unload
from lora_lab.comparing import FROZEN, FULL, LORA, PROBE, finetune_and_compare
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.presets import preset
from lora_lab.tasks.facts import facts
from lora_lab.tasks.turned import WIDTH, turned
from lora_lab.view import plot_images, plot_latency, plot_scores, plot_sites, plot_spread
from lora_lab.view import plot_tradeoffs, show
from lora_lab.zoo import ways
from lora_lab.zoo.costs import compare_latency, step_memory
from lora_lab.zoo.quantised import quantise
from lora_lab.zoo.rivals import TrainedContext, add_adapters, mix, rows
from lora_lab.zoo.smaller import fewer_blocks, prune

torch.set_num_threads(1)  # latency is measured on one thread; the digits' matrices are tiny anyway
seeds = [seed] if fast else [seed, seed + 1, seed + 2]
show(
    plot_sites(),
    alt="A transformer block from left to right. In front of the tokens: a prompt, once. In front of the block: a "
    "prefix, in every block. Beside q and v: B A, LoRA, which can be merged. Behind the attention's output and behind "
    "the MLP: an adapter each, which stays in the way.",
)

# %% [markdown]
# Grey is frozen, colour trains. Three questions hide in this crowd:
#
# 1. **Adaptation**: how does a model learn a task with few numbers?
# 2. **Compression**: how does a model become smaller?
# 3. **Serving**: what does a request cost, when many tasks share one machine?
#
# First: how many numbers? Blocks like GPT-2's, of width $d$.

# %% exercise="9.2"
def trained_numbers(method: str, d: int, blocks: int, size: int = 0) -> int:
    """How many numbers train in a GPT-2 with blocks of width d.

    "lora"      rank size, on q and on v, each (d, d)
    "adapters"  two a block, each Linear(d, size) and Linear(size, d), with biases
    "prompt"    size vectors of d numbers in front of the embeddings
    "prefix"    size vectors of d numbers in front of every block
    "bitfit"    all biases. In a block: 3 d, d, 4 d, d, and two norms; behind the last: one norm
    """
    ### BEGIN SOLUTION
    adapter = 2 * size * d + size + d
    return {
        "lora": blocks * 2 * 2 * size * d, "adapters": blocks * 2 * adapter, "prompt": size * d,
        "prefix": blocks * size * d, "bitfit": blocks * 11 * d + d,
    }[method]
    ### END SOLUTION

# %% check="9.2"
check("9.2", trained_numbers)

# %%
trained_numbers = use("9.2", trained_numbers)
sizes = {"lora": 8, "adapters": 8, "prompt": 8, "prefix": 8, "bitfit": 0}
print(f"{'':10s}{'pocket, 6 x 256':>18s}{'GPT-2, 12 x 768':>18s}{'GPT-3, 96 x 12288':>20s}")
for method, size in sizes.items():
    counts = [trained_numbers(method, d, blocks, size) for d, blocks in [(256, 6), (768, 12), (12288, 96)]]
    print(f"{method:10s}{counts[0]:>18,}{counts[1]:>18,}{counts[2]:>20,}")
totals = [count_parameters(preset(name).build()).total for name in ["gpt2", "gpt3-175b"]]
print(f"{'all':10s}{'':18s}{totals[0]:>18,}{totals[1]:>20,}")

# %% [markdown]
# ## The oldest rival
#
# A bottleneck adapter squeezes the layer's output $h$ through a few neurons and adds the result to it:
#
# $$h + U\,\mathrm{relu}(D h + b_D) + b_U$$
#
# How does this differ from $BA$? One symbol, and with it a whole trick of serving is gone. Which?

# %% exercise="9.1"
def adapter_forward(h, down, b_down, up, b_up):
    """h + up relu(down h + b_down) + b_up, of h's shape (..., d).

    h (..., d), samples in rows; down (width, d), b_down (width,), up (d, width), b_up (d,)
    """
    ### BEGIN SOLUTION
    z = torch.relu(h @ down.T + b_down)
    return h + z @ up.T + b_up
    ### END SOLUTION

# %% check="9.1"
check("9.1", adapter_forward)

# %% [markdown]
# Because of the ReLU, an adapter is no matrix: it can't be added to a weight. It starts with $U = 0$, as LoRA with $B = 0$.
#
# ## Adaptation: one task, nine ways
#
# A small vision transformer has read upright digits. Now the paper is turned. Its head stays frozen, except where a way says otherwise.

# %%
adapter_forward = use("9.1", adapter_forward)
picture = digits(rotation=90).test
show(
    plot_images(list(picture[0][:8].view(-1, 8, 8)), labels=picture[1][:8].tolist(),
                title="Digits, a quarter turn later"),
    alt="Eight handwritten digits of 8 by 8 pixels, lying on their side, with what they are.",
)
task = turned(steps=24 if fast else 200, quick=fast)
layer = ways.adapters(13, ["out", "down"])
checked = layer.prepare(task.base(seed), task, seed).blocks[0].down
checked.adapter.activation = nn.ReLU()  # the lab's uses GELU, GPT-2's own; for a moment as in your formula
with torch.no_grad():
    torch.nn.init.normal_(checked.adapter.up.weight)
    h = torch.randn(5, 2 * WIDTH)
    factors = [p for part in (checked.adapter.down, checked.adapter.up) for p in (part.weight, part.bias)]
    difference = (checked(h) - adapter_forward(checked.base_layer(h), *factors)).abs().max()
print(f"the lab's adapter and yours differ by {difference:.1e}")

adapting = finetune_and_compare(task, [
    FROZEN, PROBE, FULL, ways.last(["blocks.1", "norm", "head"]), ways.BITFIT, layer,
    ways.prompts(8, "blocks", WIDTH), ways.prefixes(8, "blocks", WIDTH),
    LORA, ways.lora_on("int8"), ways.lora_on("nf4"),
], seeds=seeds)
show(
    plot_spread(adapting.groups(), title="Turned digits: who has learned to read them?", xlabel="accuracy", percent=True,
                highlight="LoRA"),
    alt="Accuracy on turned digits, a row for each way: "
    + "; ".join(f"{way} {adapting.mean(way):.1%}" for way in adapting.ways),
)
adapting

# %% [markdown]
# The table's second score is what the adapted model makes of *upright* digits: everybody forgets. But LoRA, adapters and prompts can be
# taken out again. Which ways are near each other in accuracy, and how far apart are their files?

# %%
forgot = {way: {"upright": 100 * adapting.mean(way, "upright")} for way in adapting.ways}
with_lora = adapting.models["LoRA", seed]
with lora_disabled(with_lora):
    taken_out = evaluate(with_lora, [digits().test], "cpu")
print(f"upright digits, seed {seed}: with LoRA {evaluate(with_lora, [digits().test], 'cpu'):.1%}, "
      f"LoRA taken out {taken_out:.1%}, the base {adapting.mean('frozen base', 'upright'):.1%}")
show(
    plot_scores(forgot, columns={"upright": "upright digits, % right"}, highlight=["LoRA"],
                title="What is left of the old skill"),
    alt="; ".join(f"{way}: {found['upright']:.0f} % of upright digits" for way, found in forgot.items()),
)

# %% [markdown]
# ## Compression
#
# Now another question: the fine-tuned model should be smaller. Four bits have 16 codes. Cut the weights into blocks of neighbours; in each, the
# largest absolute value gets code 7:
#
# $$s = \frac{\max|w|}{7}, \quad q = \mathrm{round}\!\left(\frac{w}{s}\right), \quad w \approx q\,s$$

# %% exercise="9.3"
def to_4_bits(w, block: int):
    """-> codes (n,), whole numbers from -7 to 7; scales (n / block,); restored (n,) = code * scale

    w (n,): block k is w[k * block : (k + 1) * block]. A block may hold zeros only.
    """
    ### BEGIN SOLUTION
    table = w.view(-1, block)
    scales = table.abs().amax(1, keepdim=True) / 7
    codes = (table / scales.clamp(min=1e-30)).round()
    return codes.flatten(), scales.flatten(), (codes * scales).flatten()
    ### END SOLUTION

# %% check="9.3"
check("9.3", to_4_bits)

# %%
to_4_bits = use("9.3", to_4_bits)
full = {s: adapting.models["full fine-tuning", s] for s in seeds}
weights = torch.cat([full[seed].get_submodule(f"blocks.{k}.up").weight.detach().flatten() for k in (0, 1)])
outlier = weights.clone()
outlier[0] = 20 * weights.abs().max()  # one large weight, as big models have them
for block in [16, 64, 256, len(weights)]:
    errors = [((to_4_bits(w, block)[2] - w)[1:].norm() / w[1:].norm()).item() for w in (weights, outlier)]
    print(f"blocks of {block:5d}: {4 + 32 / block:5.2f} bits a weight, error {errors[0]:6.1%}; "
          f"with one outlier {errors[1]:6.1%}")
smaller = predict("9.A", ...)

# %% [markdown]
# Small blocks cost bits and keep an outlier's damage to itself. The other way to a small model is a small model: **distillation**. The student learns all of the
# teacher's probabilities $p$, softened by a temperature $T$:
#
# $$L = T^2 \sum_c p_c \log\frac{p_c}{q_c}, \quad p = \mathrm{softmax}\!\left(\frac{\text{teacher}}{T}\right), \; q = \mathrm{softmax}\!\left(\frac{\text{student}}{T}\right)$$

# %% exercise="9.4"
def distillation_loss(student, teacher, T: float):
    """T² KL(p ‖ q) in nats, the mean over rows. student, teacher (..., classes): logits"""
    ### BEGIN SOLUTION
    p, q = torch.log_softmax(teacher / T, -1), torch.log_softmax(student / T, -1)
    return T**2 * (p.exp() * (p - q)).sum(-1).mean()
    ### END SOLUTION

# %% check="9.4"
check("9.4", distillation_loss)

# %%
distillation_loss = use("9.4", distillation_loss)
image = picture[0][6:7]
said = full[seed](image).detach()
for T in [1.0, 4.0]:
    shares = torch.softmax(said / T, -1)[0]
    best = shares.topk(3)
    told = ", ".join(f"{digit} {share:.1%}" for share, digit in zip(best.values.tolist(), best.indices.tolist()))
    print(f"the teacher about one {picture[1][6]}, T = {T:g}: {told}")



def with_a_teacher(model, batch):
    with torch.no_grad():
        said = model.teacher[0](batch[0])
    return 0.5 * task.loss(model, batch) + 0.5 * distillation_loss(model(batch[0]), said, 2.0)


compressing = finetune_and_compare(replace(task, loss=with_a_teacher), [
    ways.rounded(full, "int8"), ways.rounded(full, "int4"), ways.rounded(full, "nf4"),
    ways.pruned(full, 0.3), ways.pruned(full, 0.7), ways.student(full, "blocks", 1),
], seeds=seeds)
show(
    plot_spread({"full fine-tuning": adapting.values("full fine-tuning")} | compressing.groups(),
                title="The fine-tuned model, made smaller", xlabel="accuracy", percent=True,
                highlight="full fine-tuning"),
    alt="Accuracy of the fine-tuned model and of its compressed forms: "
    + "; ".join(f"{way} {compressing.mean(way):.1%}" for way in compressing.ways),
)
smaller_ways = ["rounded to int8", "rounded to int4", "pruned, 70% zeros", "distilled, 1 block"]
before = adapting.mean("full fine-tuning")
lost = {letter: before - compressing.mean(way) for letter, way in zip("abcd", smaller_ways)}
smaller.reveal(max(lost, key=lost.get), "; ".join(f"{letter}: {100 * loss:.1f} points" for letter, loss in lost.items()))
compressing

# %% [markdown]
# Here a file is the *whole* model, and the student was trained for as many steps again. LoRA's table asked for less: what to add for one task. So they are no rivals:
# LoRA on an `int8` or `nf4` base, above, uses both answers. Did it cost accuracy, beside the seeds' spread?

# %%
for way in ["LoRA on int8", "LoRA on nf4"]:
    gap, half = adapting.gap(way, "LoRA")
    print(f"{way} minus LoRA: {100 * gap:+.1f} points" + (f", 95 % interval ± {100 * half:.1f}" if half == half else ""))
for name, bits in [("float16", 16), ("int8", 8), ("nf4", 4.5)]:
    print(f"GPT-3's {totals[1]:,} parameters in {name}, {bits:g} bits: {totals[1] * bits / 8e9:,.0f} GB")

# %% [markdown]
# ## Serving
#
# The paper's table 1: on a GPU, adapters made a forward pass of GPT-2 medium up to 30 % slower at batch 1; merged LoRA cost nothing. Here, the pocket GPT-2 on one
# thread. All take turns in every round, and the base is there twice, as the control.

# %%
adapters_cost = predict("9.B", ...)

# %%
zeros_cost = predict("9.C", ...)

# %%
text = facts(steps=2, meanings=0, held_out=8, prose=1) if fast else facts(steps=24)
pocket = text.base(seed)
behind = ["attn.c_proj", "mlp.c_proj"]
fresh = lambda: copy.deepcopy(pocket)
merged = merge_and_unload(apply_lora(fresh(), r=8, alpha=16))
served = {
    "full, BitFit, last layers": fresh(), "the same again: control": fresh(), "LoRA, merged": merged,
    "LoRA, beside the weights": apply_lora(fresh(), r=8, alpha=16), "adapters, width 16": add_adapters(fresh(), 16, behind),
    "prompt, 8 tokens": TrainedContext(fresh(), 8, deep=False), "prefix, 8 tokens": TrainedContext(fresh(), 8, deep=True),
    "int8": quantise(fresh(), "int8"), "nf4": quantise(fresh(), "nf4"), "70 % zeros": prune(fresh(), 0.7),
    "3 of 6 blocks": fewer_blocks(pocket, "transformer.h", 3),
}
settings = [(1, 12, 20), (1, 96, 12), (32, 12, 6), (32, 48, 4)]  # texts, tokens, rounds
if fast:
    settings = [(1, 12, 3), (4, 24, 2)]
latency = {}
for texts, tokens, rounds in settings:
    ids = torch.randint(4096, (texts, tokens), generator=torch.Generator().manual_seed(seed))
    calls = {name: partial(model.eval(), input_ids=ids) for name, model in served.items()}
    found = compare_latency(calls, "full, BitFit, last layers", rounds=rounds)
    latency[f"{texts} × {tokens} tokens"] = found
    print(f"{texts:2d} × {tokens:2d} tokens: the base takes {1000 * found['full, BitFit, last layers'].seconds:.0f} ms")
show(
    plot_latency(
        {setting: {name: (of.ratio, of.low, of.high) for name, of in found.items()} for setting, found in latency.items()},
        title="How much longer than the plain model",
    ),
    alt="Latency relative to the plain model, in per cent. " + " ".join(
        f"{setting}: " + ", ".join(f"{name} {100 * (of.ratio - 1):+.0f}" for name, of in found.items()) + "."
        for setting, found in latency.items()
    ),
)
short = next(iter(latency.values()))
slower = short["adapters, width 16"].ratio - 1
adapters_cost.reveal("a" if slower < 0.05 else "b" if slower < 0.4 else "c" if slower < 1 else "d",
                     f"{slower:+.0%} at {next(iter(latency))}.")
pruned = mean(found["70 % zeros"].ratio for found in latency.values())
del served, calls
zeros_cost.reveal("a" if pruned < 0.5 else "b" if pruned < 0.9 else "c" if pruned < 1.1 else "d",
                  f"{pruned - 1:+.0%}: a zero is multiplied like any number.")

# %% [markdown]
# The codes of `int8` and `nf4` are turned back into floats here, at every call: small, and slow. Kernels that compute with codes exist, for GPUs above all. Fewer
# blocks really are faster. And merging? It makes *one* task free. For a batch of several, LoRA stays beside the weights:

# %% exercise="9.5"
def mixed_lora(x, W, A, B, tasks, scaling: float):
    """W x_i + scaling * B_t A_t x_i with t = tasks[i], for row i of the batch: (n, T, d_out).

    x (n, T, d_in), W (d_out, d_in); all adapters: A (k, r, d_in), B (k, d_out, r);
    tasks (n,): which of the k adapters each row takes
    """
    ### BEGIN SOLUTION
    return x @ W.T + scaling * (x @ A[tasks].mT) @ B[tasks].mT
    ### END SOLUTION

# %% check="9.5"
check("9.5", mixed_lora)

# %%
mixed_lora = use("9.5", mixed_lora)
angles = [90, 180, 270]
tuned = [adapting.models["LoRA", seed]]
for angle in angles[1:]:
    other = finetune_and_compare(turned(angle, steps=task.steps, quick=fast), [LORA], seeds=[seed])
    tuned.append(other.models["LoRA", seed])
together = mix(task.base(seed), tuned)
tests = [digits(rotation=angle).test for angle in angles]
n = len(tests[0][1])
which = torch.randperm(3 * n, generator=torch.Generator().manual_seed(seed)) % 3  # a task for each row, in no order
x = torch.stack([tests[t][0][i % n] for i, t in enumerate(which.tolist())])
y = torch.stack([tests[t][1][i % n] for i, t in enumerate(which.tolist())])
with torch.no_grad():
    with rows(together, which):
        own = together(x).argmax(1) == y
    with rows(together, (which + 1) % 3):
        wrong = together(x).argmax(1) == y
    alone = together(x).argmax(1) == y
    layer = together.blocks[0].q
    h = torch.randn(6, 16, WIDTH)
    with rows(together, which[:6]):
        same = (layer(h) - mixed_lora(h, layer.base_layer.weight, layer.A, layer.B, which[:6], layer.scaling[0].item())
                - layer.base_layer.bias).abs().max()
print(f"one batch of {len(x)} digits, turned by 90, 180 or 270 degrees, each row with its own adapter: {own.float().mean():.1%} right")
print(f"control, every row with another row's adapter: {wrong.float().mean():.1%}; without adapters: {alone.float().mean():.1%}")
print(f"the lab's layer and yours differ by {same:.1e}")

# %% [markdown]
# ## The same with words
#
# Lab 07's task in a small dose: a list of facts becomes a sentence. Few steps, so this asks who learns *fast*. The last score is the loss on ordinary prose by an author the model
# never read: what did it forget?

# %%
tried = [
    FULL, FROZEN, ways.last(["h.5", "ln_f"]), ways.BITFIT, ways.adapters(16, behind), ways.prompts(8), LORA,
    ways.prefixes(8), ways.lora_on("nf4"),
]
writing = finetune_and_compare(text, tried[::2] if fast else tried, seeds=range(seed, seed + text_seeds))
writing

# %%
done = {s: writing.models["full fine-tuning", s] for s in range(seed, seed + text_seeds)}
shrinking = finetune_and_compare(ways.with_teachers(text), [
    ways.rounded(done, "int8"), ways.rounded(done, "nf4"), ways.pruned(done, 0.5), ways.student(done, "transformer.h", 3),
], seeds=range(seed, seed + text_seeds))
shrinking

# %%
batch = next(iter(text.train(seed)))
print(f"{'training, 8 texts':22s}{'weights':>12s}{'grad + Adam':>13s}{'kept':>12s}{'all, MB':>10s}"
      f"   context left of {pocket.config.n_positions}")
for way in [way for way in writing.ways if way != "frozen base"]:
    model = copy.deepcopy(writing.models[way, seed])
    used = step_memory(model, text.loss, batch)
    context = pocket.config.n_positions - getattr(model, "n", 0)
    print(f"{way:22s}{used.weights:>12,}{used.gradients + used.optimizer:>13,}{used.activations:>12,}"
          f"{used.total / 1e6:>10.1f}   {context}")

# %% [markdown]
# Which column did LoRA shrink, and which not? $A$ needs every layer's input for its gradient, so these are kept, as in full fine-tuning. A bias needs none of them; with
# *last layers*, the backward pass ends early.
#
# ## One picture

# %%
runs = {row.way: row for found in (writing, shrinking) for row in found.rows if row.seed == seed}
group = {way: "LoRA" if way.startswith("LoRA") else "compression" if way in shrinking.ways else "adaptation" for way in runs}
speed = {
    "adapters": "adapters, width 16", "prompt tuning": "prompt, 8 tokens", "prefix tuning": "prefix, 8 tokens",
    "LoRA": "LoRA, merged", "LoRA on nf4": "nf4", "rounded to int8": "int8", "rounded to nf4": "nf4",
    "pruned, 50% zeros": "70 % zeros", "distilled, 3 blocks": "3 of 6 blocks",
}  # what was timed above for each
points = {
    way: {"loss": row.scores["loss"], "trained": row.trainable, "bytes": row.bytes,
          "latency": short[speed.get(way, "full, BitFit, last layers")].ratio}
    for way, row in runs.items()
}
show(
    plot_tradeoffs(
        points, quality=("loss", "held-out loss, nats a token"), groups=group, better="down", linear=["latency"],
        costs={"trained": "numbers trained", "bytes": "bytes of the file", "latency": "latency, plain model = 1"},
        title="Facts into sentences: quality against three costs",
    ),
    alt="Loss against trained numbers, file size and latency of a short text. " + "; ".join(
        f"{way}: loss {p['loss']:.2f}, {p['trained']:,} trained, {p['bytes']:,} bytes, latency {p['latency']:.2f}"
        for way, p in points.items()
    ),
)

# %% [markdown]
# ## What you have measured
#
# - **Adaptation, compression, serving** are three questions. LoRA answers the first and combines with the others: a quantised base below, merged for
#   one task, beside the weights for many.
# - Zeros and codes alone are not faster; fewer layers are.
#
# **In practice**: QLoRA trains over 4 bits; one server holds hundreds of adapters.

# %%
progress()
