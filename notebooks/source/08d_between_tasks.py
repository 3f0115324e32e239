# %% [markdown]
# # 08d · One method, many tasks: between tasks
# <!-- lab:badges -->
#
# Pictures with captions, bases from elsewhere, a start that was learned, eight tasks on one model, and
# Keras. Each section stands alone: run the set-up, then choose.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: one seed and fewer steps, for a quick check of the notebook
seed = 0
device = "auto"

# %%
# Set-up: every section needs this cell, and then nothing but itself.
import copy
import time

import torch
import torch.nn.functional as F
from IPython.display import display

from lora_lab import apply_lora, digits
from lora_lab.comparing import FROZEN, FULL, LORA, PROBE, finetune_and_compare, lora
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.view import plot_images, plot_losses, plot_panels, plot_shares, plot_spread, show

torch.set_num_threads(1)  # these models are small: threads would only wait for each other
seeds = [seed] if fast else [seed, seed + 1, seed + 2]
FOUR = (FROZEN, PROBE, LORA, FULL)

# %% [markdown]
# ## 1 · Pictures and captions
#
# Two towers, one for pictures and one for captions, meet at the very end, in a cosine. They were
# trained together on upright digits and plain captions. Now **both** sides change. An adapter can sit
# in each layer of each tower.

# %%
from lora_lab.tasks.pairs import (
    IMAGE_TOWER, NUMBERS, TEXT_TOWER, encode, neighbour_captions, pair_base, pair_task, plain_captions,
    read_captions,
)

said = {"known": plain_captions(), "new": neighbour_captions()}
upright, turned = digits(seed=seed).test, digits(rotation=90, seed=seed).test
worlds = {"known": upright, "new": turned}
examples = [upright[0][k].view(8, 8) for k in range(4)] + [turned[0][k].view(8, 8) for k in range(4, 8)]
words = [f"a {NUMBERS[y]}" for y in upright[1][:4]]
words += [f"one {'more' if y else 'less'} than\n{NUMBERS[y - 1 if y else 1]}" for y in turned[1][4:8]]
show(
    plot_images(examples, labels=words, columns=4, cell=1.25, title="Above what the base knows, below the task"),
    alt="Eight handwritten digits with captions. Above upright, 'a ' and the number; below turned by 90 "
    "degrees, with captions such as 'one more than two'.",
)
for p, (x, y) in worlds.items():
    for c, captions in said.items():
        right = (read_captions(pair_base(seed), x, captions) == y).float().mean()
        print(f"the base, {p + ' pictures,':15s} {c + ' captions:':14s} {right:6.1%} find a right caption")

# %% exercise="8d.1"
def caption_probabilities(pictures, captions, temperature: float):
    """How well each caption fits each picture: softmax over the captions of cosine / temperature.

    pictures (n, d), captions (m, d): what the two towers give, of any length; returns (n, m)
    """
    ### BEGIN SOLUTION
    cosines = F.normalize(pictures, dim=1) @ F.normalize(captions, dim=1).T
    return (cosines / temperature).softmax(dim=1)
    ### END SOLUTION

# %% check="8d.1"
check("8d.1", caption_probabilities)

# %%
towers = predict("8d.A", ...)

# %%
caption_probabilities = use("8d.1", caption_probabilities)
steps = 100 if fast else 300
pairs = finetune_and_compare(pair_task(steps=steps), FOUR, seeds)
display(pairs)
shuffled = finetune_and_compare(pair_task(shuffled=True, steps=steps), (LORA,), seeds[:1])
print(f"control, captions of other pictures in training: {shuffled.mean('LoRA'):.1%} (chance: about 10 %)")

new = {"pictures": (90, "plain"), "captions": (0, "neighbours"), "both": (90, "neighbours")}
adapted = {"image tower": IMAGE_TOWER, "text tower": TEXT_TOWER, "both towers": IMAGE_TOWER + TEXT_TOWER}
ways = [lora(4, 8, name=name, target_modules=list(modules)) for name, modules in adapted.items()]
runs = [finetune_and_compare(pair_task(*world, steps=steps), ways, seeds[:1]) for world in new.values()]
table = torch.tensor([[run.mean(name) for run in runs] for name in adapted])
show(
    plot_shares(
        table, list(adapted), [f"new {name}" if name != "both" else "both new" for name in new], cell=(1.3, 0.42),
        title="The side that changes is the side that must adapt", xlabel="the world", ylabel="adapted",
    ),
    alt="Accuracy of three adapters in three worlds, in per cent. New pictures ask for the image tower, new "
    "captions for the text tower, and where both are new an adapter in both is best.",
)
image, text, both = table[:, 2].tolist()
outcome = "c" if both > max(image, text) + 0.03 else "a" if image > text + 0.03 else "b" if text > image + 0.03 else "d"
towers.reveal(outcome, f"image tower {image:.0%}, text tower {text:.0%}, both {both:.0%}.")

# %%
# The error that stays: what the text tower cannot tell apart.
model, captions = pairs.models["LoRA", seed], ["three not five", "five not three"]
with torch.no_grad():
    x, t = turned[0][turned[1] == 3][:1], encode(captions)
    p = caption_probabilities(model.image_vectors(x), model.caption_vectors(t), 0.1)[0]
    both_ways = encode([f"{a} not {b}" for a in NUMBERS for b in NUMBERS if a != b])
    back = encode([f"{b} not {a}" for a in NUMBERS for b in NUMBERS if a != b])
    for way in ["LoRA", "full fine-tuning"]:
        vectors = pairs.models[way, seed].caption_vectors
        apart = (vectors(both_ways) - vectors(back)).abs().max() / vectors(back).abs().max()
        print(f"{way}: 'a not b' and 'b not a', all 90 pairs: at most {apart:.0e} apart")
print("\na picture of a three:  " + "   ".join(f"{c!r} {float(q):.1%}" for c, q in zip(captions, p)))

# %% tags=["hidden"]
assert apart < 1e-5 and shuffled.mean("LoRA") < 0.25 and both > 0.75

# %% [markdown]
# The tower takes the **mean** of its words, and a mean has no order: no adapter of any rank can tell
# the two apart. LoRA moves what a model has.
#
# ## 2 · A base from elsewhere
#
# Upright digits, three labels of each. Adapters sit in both hidden layers, the head is fresh. Bases
# offer themselves.

# %%
from lora_lab.tasks.transfer import source, transfer_task

sources = ["turned 15", "turned 30", "turned 90", "mirrored", "negative", "shuffled pixels", "noise"]
seen = {name: source(name, seed)[0][3].view(8, 8) for name in sources}
show(
    plot_images(list(seen.values()), labels=list(seen), columns=7, cell=1.15, title="One training image of seven sources"),
    alt="The same handwritten digit turned by 15, 30 and 90 degrees, mirrored, as a negative, with its "
    "pixels shuffled; and noise.",
)

# %% exercise="8d.2"
def gain(with_base: list, without: list, t: float):
    """-> mean of (with - without) over the seeds, half-width of its 95 % interval: t · s / √n.

    Accuracies, seed by seed; the same seed has the same split in both. t: Student's, given;
    s: the standard deviation, estimated with n - 1
    """
    ### BEGIN SOLUTION
    d = torch.tensor(with_base, dtype=torch.float64) - torch.tensor(without, dtype=torch.float64)
    return d.mean().item(), (t * d.std() / len(d) ** 0.5).item()
    ### END SOLUTION

# %% check="8d.2"
check("8d.2", gain)

# %%
turned_base = predict("8d.B", ...)

# %%
gain = use("8d.2", gain)
five = [seed] if fast else [seed + k for k in range(5)]
display(finetune_and_compare(transfer_task("turned 90"), FOUR, five))
nothing = finetune_and_compare(transfer_task("nothing"), (LORA, FULL), five)
scratch, random_base = nothing.values("full fine-tuning"), nothing.values("LoRA")
tried = ["turned 15", "turned 90", "noise"] if fast else sources
found = {name: finetune_and_compare(transfer_task(name), (LORA,), five).values("LoRA") for name in tried}
groups = {"no base, all weights train": scratch, "no base, LoRA": random_base} | found
show(
    plot_spread(dict(sorted(groups.items(), key=lambda g: -sum(g[1]))), percent=True, xlabel="accuracy on upright digits",
                highlight="no base, all weights train", title="Most bases are worse than none"),
    alt="Accuracy with each base, a dot for each seed, sorted, among them the same network trained from nothing.",
)
for name in [] if fast else sources:
    (a, da), (b, db) = gain(found[name], scratch, 2.776), gain(found[name], random_base, 2.776)
    print(f"{name:16s} against no base, all weights: {a:+6.1%} ± {da:5.1%}   against no base, LoRA: {b:+6.1%} ± {db:5.1%}")
mean = lambda values: sum(values) / len(values)
difference = mean(found["turned 90"]) - mean(scratch)
turned_base.reveal(
    "a" if difference > 0.02 else "b" if difference > -0.02 else "c",
    f"{mean(found['turned 90']):.0%} with LoRA on that base, {mean(scratch):.0%} from nothing.",
)

# %% tags=["hidden"]
assert difference < -0.02 and mean(found["noise"]) < mean(scratch) - 0.02 and mean(found["turned 15"]) > mean(scratch) - 0.03

# %% [markdown]
# **Negative transfer**: a base that knows something else leads LoRA astray, and the control, a base
# that has seen nothing but noise, "helps" too where LoRA on a random network is the rival. Choose the
# rival first. Do more labels heal it?

# %%
counts = [3, 30] if fast else [1, 3, 10, 30, 100]
rivals = {"turned 15": "LoRA", "turned 90": "LoRA", "nothing": "full fine-tuning"}
lines = {name: [[] for _ in seeds] for name in rivals}
for shots in counts:
    for name, way in rivals.items():
        run = finetune_and_compare(transfer_task(name, shots), (LORA if way == "LoRA" else FULL,), seeds)
        for line, value in zip(lines[name], run.values(way)):
            line.append(value)
named = {"turned 15": "base turned by 15°", "turned 90": "base turned by 90°", "nothing": "no base, all weights"}
show(
    plot_panels(
        {"": {named[name]: (counts, torch.tensor(rows)) for name, rows in lines.items()}}, logx=True, percent=True,
        columns=1, xticks=counts, width=7, xlabel="labelled images of each digit", ylabel="accuracy",
        title="The far base stays behind",
    ),
    alt="Accuracy against labelled images per digit, for LoRA on a near base and on a far base and for the "
    "network trained from nothing. The far base is the lowest of the three.",
)

# %% [markdown]
# ## 3 · A start that was learned
#
# Adapters start at zero. **Reptile** learns a better start from a family of tasks: digits turned by
# 60, 70, 80, 100, 110, 120 degrees. From start $\theta$ adapt to a task, end at $\phi$, and move:
# $\theta \leftarrow \theta + \epsilon\,(\bar\phi - \theta)$, for A and B of each layer.

# %% exercise="8d.3"
def reptile_step(start: dict, ends: list, epsilon: float) -> dict:
    """The new start: epsilon of the way from start to the mean of the ends, tensor by tensor.

    start: name -> tensor; ends: one such dict for each task, all reached from this start
    """
    ### BEGIN SOLUTION
    mean = {name: sum(end[name] for end in ends) / len(ends) for name in start}
    return {name: theta + epsilon * (mean[name] - theta) for name, theta in start.items()}
    ### END SOLUTION

# %% check="8d.3"
check("8d.3", reptile_step)

# %%
first_steps = predict("8d.C", ...)

# %%
from lora_lab.tasks.meta import FAMILY, UNRELATED, begins_at, turned_task, upright_base

reptile_step = use("8d.3", reptile_step)
rounds = 30 if fast else 60
family = begins_at(FAMILY, "LoRA, learned start", rounds, reptile_step)
unrelated = begins_at(UNRELATED, "LoRA, unrelated start", rounds, reptile_step)  # the control: pixels shuffled
starts = {"from zero": LORA, "learned": family, "unrelated": unrelated}
met = {f"{angle}°": digits(rotation=angle, seed=seed).train[0][3].view(8, 8) for angle in [60, 70, 80, 90, 100, 110, 120]}
show(
    plot_images(list(met.values()), labels=list(met), columns=7, title="Six angles teach the start; 90° is new"),
    alt="The same handwritten digit turned by 60 to 120 degrees in steps of ten.",
)

display(finetune_and_compare(turned_task(90, shots=2, steps=20), (*FOUR, family, unrelated), seeds))
task = turned_task(90)
zero_steps = {}
for name, way in starts.items():
    model = way.prepare(copy.deepcopy(upright_base(seed)), task, seed).eval()
    zero_steps[name] = task.metric(model, seed)["accuracy"]
    print(f"before the first step, {name:10s} {zero_steps[name]:6.1%}")
known = zero_steps["learned"]
first_steps.reveal(
    "a" if known < 0.2 else "b" if known < 0.6 else "c", f"{known:.0%} at 90 degrees, without having met that angle.",
)

# %% tags=["hidden"]
assert zero_steps["from zero"] < 0.2 and zero_steps["unrelated"] < 0.3 and known > 0.6

# %% [markdown]
# So most of what the start has learned is the *task*, not how to learn. The control knows nothing of
# it; whether it leads the zero start after 20 steps hangs on the seed. What does a start cost outside
# of its family?

# %%
angles = [0, 90, 180] if fast else [0, 30, 60, 75, 90, 105, 120, 150, 180]
lines = {name: [[] for _ in seeds[:2]] for name in starts}
for angle in angles:
    run = finetune_and_compare(turned_task(angle, shots=2, steps=20), tuple(starts.values()), seeds[:2])
    for name, way in starts.items():
        for line, value in zip(lines[name], run.values(way.name)):
            line.append(value)
show(
    plot_panels(
        {"": {name: (angles, torch.tensor(rows)) for name, rows in lines.items()}}, percent=True, columns=1, width=7,
        xticks=[0, 60, 120, 180], xlabel="digits turned by (degrees)", ylabel="accuracy after 20 steps",
        title="A start for 60 to 120 degrees, and its price elsewhere",
    ),
    alt="Accuracy after 20 steps on two images of each digit against the angle. The learned start is far "
    "above the others from 60 to 120 degrees and below the zero start at 0.",
)

# %% [markdown]
# ## 4 · Eight tasks, one model
#
# One base that reads upright digits, eight adapters of rank 4 in all of its layers. Before you look: on
# which tasks will an adapter serve that was made for another?

# %%
from lora_lab.tasks.switching import (
    TASKS, Shelf, sums_in_place, switch_task, task_data, trained_shelf, who_reads_what,
)

asked = [(task_data(name, seed)[0][0][3].view(8, 8), task_data(name, seed)[0][1][3]) for name in TASKS]
show(
    plot_images([image for image, _ in asked], labels=[f"{n}\n→ {int(y)}" for n, (_, y) in zip(TASKS, asked)],
                columns=8, cell=1.05, title="One digit, eight tasks, and the answer that each wants"),
    alt="The same handwritten digit as the eight tasks show it, each with the answer that the task asks for.",
)
shelf = trained_shelf(TASKS, seed, steps=80 if fast else 300)
accuracy = who_reads_what(shelf, TASKS, seed)
show(
    plot_shares(accuracy, TASKS, TASKS, cell=(0.75, 0.38), title="The right adapter reads, the wrong one guesses",
                xlabel="task", ylabel="adapter"),
    alt="Accuracy of eight adapters on eight tasks. The diagonal is high but for the last task, the "
    "negatives; off the diagonal most numbers are low.",
)
weights = sum(p.numel() * 4 for p in upright_base(seed).parameters())
print(f"on the shelf: {len(TASKS)} adapters, {shelf.bytes:,} bytes; {len(TASKS)} whole models: {len(TASKS) * weights:,} bytes")
display(finetune_and_compare(switch_task("turned 90", 100 if fast else 300), FOUR, seeds))
wide = finetune_and_compare(switch_task("negative", 100 if fast else 300), (LORA, lora(16, 32), lora(64, 128), FULL), seeds[:1])
print("negatives: " + ", ".join(f"{way} {wide.mean(way):.0%}" for way in wide.ways))

# %% [markdown]
# Off the diagonal is the control: a wrong adapter answers all the same, and nothing warns you. The
# error that stays: a negative asks the first layer for $-W_0$, and more rank alone does not get there.
#
# The paper (section 4.2) switches *merged* weights: subtract $BA$, add the next.

# %% exercise="8d.4"
class Switchboard:
    """A weight that adapters take turns at. self.weight (d_out, d_in) is what the layer computes with.

    switch(A, B, scaling): weight = W0 + scaling · B A, whichever adapter was on before;
    off(): weight = W0, bit for bit, after any number of switches. The caller's W0 is left alone.
    """

    def __init__(self, W0):
        ### BEGIN SOLUTION
        self.W0, self.weight = W0.clone(), W0.clone()
        ### END SOLUTION

    def switch(self, A, B, scaling: float):
        ### BEGIN SOLUTION
        self.weight = self.W0 + scaling * B @ A
        ### END SOLUTION

    def off(self):
        ### BEGIN SOLUTION
        self.weight = self.W0.clone()
        ### END SOLUTION

# %% check="8d.4"
check("8d.4", Switchboard)

# %%
faster = predict("8d.D", ...)

# %%
import tempfile
import warnings

from lora_lab import load_adapter, save_adapter
from lora_lab.gpt2 import load_gpt2

drift = {}
for dtype in [torch.float32, torch.bfloat16]:
    torch.manual_seed(seed)
    W0 = torch.randn(256, 256).to(dtype)
    updates = [(0.005 * torch.randn(256, 4) @ torch.randn(4, 256)).to(dtype) for _ in range(8)]
    drift[str(dtype).removeprefix("torch.")] = sums_in_place(W0, updates, 300).clamp(min=1e-12)
show(
    plot_losses(drift, log=True, title="Subtracting leaves a trace", xlabel="switch", ylabel="‖W - W0‖ / ‖W0‖"),
    alt="Relative distance of the weight from W0 after each switch by subtraction: tiny and slowly growing in "
    "float32, thousands of times as large in bfloat16.",
)
share = float(drift["bfloat16"][-1] * W0.float().norm() / updates[0].float().norm())
print(f"in bfloat16 W0 is off by {share:.0%} of the length of one update")

model, _ = load_gpt2("pocket")
size = sum(p.numel() for p in model.parameters())
apply_lora(model, r=4, alpha=8, target_modules=["c_attn:q,v"])
board = Shelf(model)
board.keep("one"), board.keep("two")


def seconds(function, times):
    began = time.perf_counter()
    for k in range(times):
        function(k)
    return (time.perf_counter() - began) / times


with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # saving slices of q|k|v says how peft will see them: lab 05
    file = save_adapter(model, folder)
    took = {
        "adapter in memory": seconds(lambda k: board.take(["one", "two"][k % 2]), 40),
        "adapter from its file": seconds(lambda k: load_adapter(model, folder), 5),
        "the whole model": seconds(lambda k: load_gpt2("pocket"), 2),
    }
print(f"a GPT-2 of {size:,} parameters; an adapter's file has {file.bytes:,} bytes")
for name, t in took.items():
    print(f"{name:22s} {1000 * t:8.2f} ms")
times = took["the whole model"] / took["adapter in memory"]
faster.reveal("a" if times < 10 else "b" if times <= 100 else "c", f"{times:.0f} times, on this machine, now.")

# %% [markdown]
# ## 5 · The same layer in Keras
#
# Keras 3 has LoRA built in, `dense.enable_lora(rank)`. Its kernel is (in, out), its factors multiply
# from the right, and it adds no scaling unless you give `lora_alpha`: $y = x\,(K + a\,b) + \text{bias}$.

# %% exercise="8d.5"
def to_keras(W, b, A, B, scaling: float) -> dict:
    """torch's x Wᵀ + b + scaling (x Aᵀ) Bᵀ as arrays for Keras's x (kernel + a b) + bias.

    W (out, in), b (out,), A (r, in), B (out, r) ->
    "kernel" (in, out), "bias" (out,), "lora_kernel_a" (in, r), "lora_kernel_b" (r, out)
    """
    ### BEGIN SOLUTION
    return {"kernel": W.T, "bias": b, "lora_kernel_a": A.T, "lora_kernel_b": scaling * B.T}
    ### END SOLUTION

# %% check="8d.5"
check("8d.5", to_keras)

# %%
trains = predict("8d.E", ...)

# %%
from lora_lab import LoRALinear

to_keras = use("8d.5", to_keras)
try:  # Keras on torch, unless you have chosen a backend of your own
    from lora_lab.zoo import keras_lora
except ImportError as missing:
    keras_lora = None
    print(missing)
else:
    import keras

    torch.manual_seed(seed)
    layer = LoRALinear(torch.nn.Linear(64, 10), r=4, alpha=8).requires_grad_(False)
    torch.nn.init.normal_(layer.lora_B)
    x = digits(seed=seed).test[0]
    given = to_keras(layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
    yours = keras.layers.Dense(10)
    yours.build((None, 64))
    yours.enable_lora(rank=4)
    for name, array in given.items():
        getattr(yours, "_kernel" if name == "kernel" else name).assign(torch.as_tensor(array).numpy())
    numbers = sum(keras.ops.convert_to_numpy(w).size for w in yours.trainable_weights)
    print(f"Keras {keras.__version__} on {keras.backend.backend()}; what trains: {[w.name for w in yours.trainable_weights]}")
    others = {"your arrays in Keras's Dense": yours, "our own Keras layer": keras_lora.layer_from_torch(layer)}
    for name, other in others.items():
        apart = abs(keras.ops.convert_to_numpy(other(x.numpy())) - layer(x).numpy()).max()
        print(f"{name:30s} largest difference {apart:.0e}, outputs up to {layer(x).abs().max():.0f}")
    model = keras.Sequential([keras.Input((768,)), keras_lora.LoRADense(keras.layers.Dense(768), 32, 64), keras.layers.Dense(1)])
    print("Dense(768) with LoRA, Dense(1), on a batch of 4:", tuple(model(keras.ops.ones((4, 768))).shape))
    square = LoRALinear(torch.nn.Linear(64, 64), 4, 8).requires_grad_(False)  # the control
    wrong = keras.layers.Dense(64)
    wrong.build((None, 64))
    wrong.set_weights([square.weight.numpy(), square.bias.numpy()])
    apart = abs(keras.ops.convert_to_numpy(wrong(x.numpy())) - square(x).numpy()).max()
    print(f"control, a square weight copied without its transpose: no error, {apart:.1f} apart")
    trains.reveal(numbers, "4 (64 + 10) = 296, and the 10 biases, which enable_lora leaves trainable.")

# %%
if keras_lora:
    rows = {}
    for s in seeds:
        (x, y), (test_x, test_y) = digits(rotation=90, seed=s).train, digits(rotation=90, seed=s).test
        for name in ["frozen", "last layer", "enable_lora", "our layer", "all weights"]:
            keras.utils.set_random_seed(s)
            from lora_lab.tasks.meta import upright_base

            base = copy.deepcopy(upright_base(s))
            if name == "our layer":
                apply_lora(base, r=4, alpha=8, target_modules="all-linear")
            net = keras_lora.model_from_torch(base)
            dense = [part for part in net.layers if isinstance(part, keras.layers.Dense)]
            for part in dense:
                part.trainable = name in ("enable_lora", "all weights") or (name == "last layer" and part is dense[-1])
                if name == "enable_lora":  # its A starts √6 times as large as ours: longer strides at one rate
                    part.enable_lora(4, lora_alpha=8)
            net.compile(keras.optimizers.Adam(3e-3 if name == "all weights" else 1e-2),
                        keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
            began = time.perf_counter()
            if name != "frozen":
                net.fit(x.numpy(), y.numpy(), batch_size=64, epochs=2 if fast else 12, verbose=0)
            took = time.perf_counter() - began
            score = net.evaluate(test_x.numpy(), test_y.numpy(), verbose=0)[1]
            count = sum(int(torch.tensor(w.shape).prod()) for w in net.trainable_weights)
            rows.setdefault(name, []).append((score, count, took))
    print(f"{'digits turned by 90 degrees':30s} accuracy            trained   seconds   file, bytes")
    for name, runs in rows.items():
        scores = torch.tensor([r[0] for r in runs])
        spread = f" ± {scores.std():.3f}" if len(runs) > 1 else ""
        print(f"{name:30s} {scores.mean():.3f}{spread:10s} {runs[0][1]:12,} {runs[0][2]:9.1f} {4 * runs[0][1]:10,}")

# %% [markdown]
# `enable_lora` trains biases, too, and `model.save` writes merged kernels: no adapter file.
#
# ## What you have seen
#
# - The side that changes must adapt.
# - A base can hurt; name the rival.
# - A learned start pays elsewhere.
# - Switching copies two small matrices; subtracting drifts.
#
# **In practice**: one model, an adapter per customer; picture search.

# %%
progress()
