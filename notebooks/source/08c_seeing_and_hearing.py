# %% [markdown]
# # 08c · One method, many tasks: seeing and hearing
# <!-- lab:badges -->
#
# Images, moving pictures, sound: a transformer, convolutions, spectrograms, and the same A and B in all of them. Each
# section stands alone; take those you like after the set-up cell.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: short runs, one seed, one learning rate, for a quick check of the notebook
seed = 0
device = "cpu"

# %%
import time

import numpy as np
import torch
from IPython.display import Audio, display
from torch.nn import functional as F

from lora_lab import Batches, apply_lora, coverage, evaluate, finetune_and_compare, train
from lora_lab.comparing import FROZEN, FULL, LORA
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.view import plot_confusion, plot_images, plot_losses, plot_spread, show

torch.set_num_threads(1)  # small nets: threads would only wait for each other
seeds = (seed,) if fast else (seed, seed + 1, seed + 2)


def spread(groups, title):
    """Every seed a dot; groups: name -> accuracies."""
    means = "; ".join(f"{name}: {np.mean(values):.0%}" for name, values in groups.items())
    figure = plot_spread(groups, title=title, xlabel="test accuracy", percent=True, limits=(0, 1.05))
    show(figure, alt=f"{title}: test accuracy. Means: {means}.")


# %% [markdown]
# ## 1 · Images: attention and convolutions
#
# Lab 02b adapted a net that takes an image as 64 loose numbers. Two nets with an opinion about images come now. Both
# learned upright, clean digits, and meet what they were never shown.

# %%
from lora_lab.tasks.images import CHANGES, NETS, changed, cut, images_base, images_task, paste

shown = {change: changed(change, seed).test for change in CHANGES[1:]}
upright = changed("jigsaw", seed).test[1]
tiles, names = [], []
for change, (x, y) in shown.items():
    tiles += [x[(y == digit).nonzero()[0, 0]].view(8, 8) for digit in (3, 4, 7)]
    names += [f"{change}: {digit}" for digit in (3, 4, 7)]
show(
    plot_images(tiles, names, title="Digits as the nets meet them", columns=6, cell=1.15),
    alt="Digits 3, 4 and 7, each turned by a quarter, under noise, cut into patches laid out in one other "
    "order, and with patches dealt anew for each image. The last two are hard to read.",
)

# %% [markdown]
# A **vision transformer** reads an image as a sentence: it is cut into patches, each patch is a word. How do you cut
# many images at once, without a loop?

# %% exercise="8c.1"
def patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """images (n, H, W) -> (n, patches, size * size), H and W multiples of size.

    Patches row by row from the top left; the pixels of a patch row by row, too.
    """
    ### BEGIN SOLUTION
    n, high, wide = images.shape
    grid = images.reshape(n, high // size, size, wide // size, size)
    return grid.transpose(2, 3).reshape(n, -1, size * size)
    ### END SOLUTION

# %% check="8c.1"
check("8c.1", patches)

# %%
patches = use("8c.1", patches)
turn = changed("quarter turn", seed)
words = patches(turn.test[0][:1].view(1, 8, 8), 2)[0].view(4, 4, 2, 2)
apart = torch.full((11, 11), 0.35)  # the patches again, with a gap between them
for row in range(4):
    for column in range(4):
        apart[3 * row : 3 * row + 2, 3 * column : 3 * column + 2] = words[row, column]
show(
    plot_images([turn.test[0][0].view(8, 8), apart], ["a turned digit", "its 16 words"], cell=1.8),
    alt="A turned digit, and the same cut into 16 patches of 2 by 2 pixels: the words of its sentence.",
)

# Ten lines: LoRA in the queries and values of both blocks, a new copy of the head, training.
model = images_base("transformer", "quarter turn", seed, quick=fast)
before = model.attention(turn.test[0][:1])[0].detach()
apply_lora(model, r=4, alpha=8, target_modules=["q", "v"], modules_to_save=["head"])
print(coverage(model))
for step in train(model, Batches(*turn.train, seed=seed), steps=40, lr=0.02, device=device):
    pass
print(f"quarter turn, after {step.step} steps: {evaluate(model, [turn.test], device):.1%} right\n")

after = model.attention(turn.test[0][:1])[0].detach()
maps = {"image": turn.test[0][0].view(8, 8)}
for token in (5, 10):
    maps |= {f"from {token}, base": before[token].view(4, 4), f"from {token}, LoRA": after[token].view(4, 4)}
show(
    plot_images(list(maps.values()), list(maps), title="Where two of the patches look", columns=5, cell=1.35),
    alt="A turned digit and four maps of 4 by 4 patches: the attention of patches 5 and 10 in the first "
    "block, before and after LoRA; bright patches are looked at more. The maps have changed.",
)
transformer = {
    change: finetune_and_compare(images_task("transformer", change, fast), seeds=seeds)
    for change in (["quarter turn"] if fast else ["new digits", "quarter turn", "noise"])
}
display(*transformer.values())

# %% [markdown]
# A **convolution** slides filters over the image. Its weight (out, channels, kh, kw) is a matrix
# $W$ (out, channels · kh · kw), so $\Delta W = \text{scaling} \cdot BA$ fits. Without building it: A's rows are $r$
# filters, and B mixes what they see.

# %% exercise="8c.2"
def lora_conv(x, conv: torch.nn.Conv2d, A, B, scaling: float) -> torch.Tensor:
    """The frozen convolution plus its update, of the shape of conv(x).

    x (n, channels, H, W); A (r, channels * kh * kw); B (out, r)
    conv has a window, a stride, a padding (no dilation, no groups): conv.weight.shape, conv.stride, conv.padding
    """
    ### BEGIN SOLUTION
    filters = A.view(len(A), *conv.weight.shape[1:])
    h = F.conv2d(x, filters, stride=conv.stride, padding=conv.padding)  # (n, r, H', W')
    return conv(x) + scaling * F.conv2d(h, B[:, :, None, None])
    ### END SOLUTION

# %% check="8c.2"
check("8c.2", lora_conv)

# %%
lora_conv = use("8c.2", lora_conv)
changes = ["noise"] if fast else ["new digits", "quarter turn", "noise"]
convolutions = {c: finetune_and_compare(images_task("convolutions", c, fast), seeds=seeds) for c in changes}
display(*convolutions.values())

adapted = convolutions["noise"].models["LoRA", seed]
layer, (x, y) = adapted.conv1, shown["noise"]
with torch.no_grad():
    one = x[:1].view(1, 1, 8, 8)
    mine = lora_conv(one, layer.base_layer, layer.lora_A, layer.lora_B, layer.scaling)
    print(f"your lora_conv and the adapted layer: {float((mine - layer(one)).abs().max()):.0e} apart")
    seen = F.conv2d(one, layer.lora_A.view(-1, 1, 3, 3), padding=1)[0]
filters = layer.lora_A.detach().view(-1, 3, 3)
show(
    plot_images([one[0, 0], *filters, one[0, 0], *seen], ["noisy digit"] + [f"A[{k}]" for k in range(4)]
                + ["noisy digit"] + [f"A[{k}] sees" for k in range(4)],
                title="The r = 4 filters of an adapter, and what they see", columns=5, cell=1.1),
    alt="A noisy digit; the four filters of 3 by 3 that are the rows of A; and the digit after each of them.",
)

# %% [markdown]
# Whoever slides filters trusts that neighbours belong together. A transformer knows a patch's place only from a table
# of positions, which is frozen here. So which one copes with a jigsaw? The **control that must fail**: patches dealt
# anew for each image. No order is left to learn.

# %%
jigsaw_guess = predict("8c.A", ...)

# %%
order = {}
for net in NETS:
    for change in ("jigsaw", "dealt anew"):
        ways = (LORA,) if fast or change == "dealt anew" else (FROZEN, LORA, FULL)
        order[net, change] = finetune_and_compare(images_task(net, change, fast), ways, seeds)
rows = {f"{net}, {change}": c.values("LoRA") for (net, change), c in order.items()}
spread(rows, "LoRA after a jigsaw, and after patches dealt anew")
display(*(c for (_, change), c in order.items() if change == "jigsaw"))
lead = order["transformer", "jigsaw"].mean("LoRA") - order["convolutions", "jigsaw"].mean("LoRA")
left = {net: order[net, "dealt anew"].mean("LoRA") for net in NETS}
jigsaw_guess.reveal(
    "a" if lead > 0.05 else "b" if lead < -0.05 else "c",
    f"Transformer minus convolutions: {100 * lead:+.1f} points. Dealt anew, {left['transformer']:.0%} and "
    f"{left['convolutions']:.0%} are left, where guessing gives 10 %: 16 patches in any order still tell how much ink there is.",
)

# The error that LoRA still makes: a quarter turn, seen by the transformer.
best = transformer["quarter turn"].models["LoRA", seed]
with torch.no_grad():
    said = best(turn.test[0]).argmax(-1)
wrong = (said != turn.test[1]).nonzero()[:, 0]
sample = wrong[:8]
mistaken = plot_images(
    list(turn.test[0][sample].view(-1, 8, 8)), turn.test[1][sample].tolist(), said[sample].tolist(),
    title=f"{len(wrong)} of {len(said)} are wrong, such as", columns=8, cell=1.0,
)
show(mistaken, alt=f"{len(sample)} turned digits that the adapted transformer got wrong, with what it said.")
print("LoRA sits in q and v; the table of positions is no layer, so it stays, although the turn has moved every patch.")

# %% [markdown]
# ## 2 · Clips: one base, two questions
#
# A digit moves over a field whose edges meet. The base tells 0 to 4 apart; it sees each two neighbouring frames as one
# image of two channels. Two adapters on it answer two questions: **which way** does it move, and **which digit**, 5 to
# 9, is it?

# %%
from lora_lab.data import digits
from lora_lab.tasks.videos import WAYS, clips, videos_base, videos_data, videos_task
from lora_lab.view import show_clips

some = clips(digits(seed=seed).test, 200, seed)
four = torch.stack([some.frames[(some.way == way).nonzero()[0, 0]] for way in range(4)])
show_clips(four, alt="Four clips of a digit that moves to the right, to the left, down and up.")
show(
    plot_images(four.flatten(0, 1), [name if k == 0 else "" for name in WAYS for k in range(5)], columns=10, cell=0.8),
    alt="The same clips frame by frame: five frames each, the digit a little further in each.",
)

# Ten lines: LoRA in three convolutions, a head of its own.
model = videos_base("which way", seed, quick=fast)
apply_lora(model, r=4, alpha=8, target_modules=["conv1", "conv2", "conv3"], modules_to_save=["head"])
print(coverage(model))
x, y = videos_data("which way", seed, "train")
for step in train(model, Batches(x, y, batch_size=32, seed=seed), steps=20, lr=0.02, device=device):
    pass
print(f"\nwhich way, after {step.step} steps: {evaluate(model, [videos_data('which way', seed)], device):.1%} right")

asked = {q: finetune_and_compare(videos_task(q, fast), seeds=seeds) for q in ("which way", "which digit")}
display(*asked.values())

# %% [markdown]
# Is it the *motion* that the adapter sees, or something that comes with it? Take the order away and keep all the rest.
# Then say what you expect, also of clips played backwards.

# %% exercise="8c.3"
def shuffle_frames(clips: torch.Tensor) -> torch.Tensor:
    """clips (n, frames, H, W) -> the same clips, the frames of each in a random order of its own.

    Every order is as likely as any other; frames stay whole, and in their clip. `clips` itself stays as it is.
    """
    ### BEGIN SOLUTION
    order = torch.rand(clips.shape[:2]).argsort(1)  # (n, frames)
    return clips[torch.arange(len(clips))[:, None], order]
    ### END SOLUTION

# %% check="8c.3"
check("8c.3", shuffle_frames)

# %%
backwards_guess = predict("8c.B", ...)
shuffled_guess = predict("8c.C", ...)

# %%
shuffle_frames = use("8c.3", shuffle_frames)
torch.manual_seed(seed)
plays = {"as it is": lambda x: x, "shuffled": shuffle_frames, "backwards": lambda x: x.flip(1)}
right = {}
for q, comparison in asked.items():
    for how, play in plays.items():
        right[q, how] = []
        for s in seeds:
            x, y = videos_data(q, s)
            right[q, how].append(evaluate(comparison.models["LoRA", s], [(play(x), y)], device))
spread({f"{q}, {how}": values for (q, how), values in right.items()}, "Two adapters, and clips played in three ways")
mean = {key: float(np.mean(values)) for key, values in right.items()}
back = mean["which way", "backwards"]
backwards_guess.reveal(
    "a" if back > mean["which way", "as it is"] - 0.1 else "c" if back < 0.1 else "b",
    f"{back:.1%}. A clip to the right, played backwards, is a clip to the left, frame by frame.",
)
falls = {q: mean[q, "as it is"] - mean[q, "shuffled"] > 0.1 for q in asked}
shuffled_guess.reveal(
    {(True, True): "a", (True, False): "b", (False, True): "c", (False, False): "d"}[tuple(falls.values())],
    "; ".join(f"{q}: {mean[q, 'as it is']:.0%} as it is, {mean[q, 'shuffled']:.0%} shuffled" for q in asked)
    + ". One control, two readings: it breaks what needs order and spares what does not.",
)

# %% [markdown]
# **The error that stays**: an old film's wheel turns backwards. Our clips moved 1 or 2 pixels a frame; on a field 12
# wide, what do 11 look like?

# %%
speeds = list(range(1, 12))
test = digits(seed=seed).test
faster = {s: clips(test, 150, seed, speeds=[s]) for s in speeds}
lines = {
    way: (speeds, [evaluate(asked["which way"].models[way, seed], [(c.frames, c.way)], device) for c in faster.values()])
    for way in (["LoRA"] if fast else ["LoRA", "full fine-tuning"])
}
show(
    plot_losses(lines | {"guessing": (speeds, [0.25] * 11)}, title="Which way? At 11 pixels a frame it says the opposite", ylabel="accuracy",
                xlabel="pixels a frame (the field is 12 wide; 1 and 2 were trained)"),
    alt="Accuracy by speed: " + ", ".join(f"{s}: {v:.0%}" for s, v in zip(speeds, lines["LoRA"][1], strict=True))
    + ". LoRA begins high, falls to guessing and below it, and to nearly none at 11.",
)
print("11 forward is 1 backward: the same frames. No adapter, and no other method, can mend what is not in the data.")

# %% tags=["hidden"]
curve = dict(zip(speeds, lines["LoRA"][1], strict=True))
assert curve[1] > 0.6 > 0.2 > curve[11], curve  # what the title and the alt text of the figure say
assert mean["which way", "shuffled"] < 0.5, mean

# %% [markdown]
# ## 3 · Sound: a new voice
#
# Nine syllables, computed, not recorded: pulses, resonators, hiss. The base has only heard men. A child's vocal tract is
# shorter: all resonances lie higher. Listen, then build what the net looks at: overlapping frames, each under a Hann
# window, and of each the amplitudes of its frequencies.

# %%
from lora_lab.tasks.sounds import HOP, LENGTH, RATE, SYLLABLES, VOICES, WINDOW, log_mel, recordings
from lora_lab.tasks.sounds import say, sounds_base, sounds_data, sounds_task
from lora_lab.view import plot_spectrograms

heard = {voice: recordings(voice, 1, seed)[0] for voice in VOICES}
for voice in ("men", "a child", "a noisy street"):
    print(f"{voice}: {', '.join(SYLLABLES[:3])}")
    display(Audio(np.concatenate(heard[voice][:3]), rate=RATE))

# %% exercise="8c.4"
def spectrogram(wave: torch.Tensor, window: int, hop: int) -> torch.Tensor:
    """wave (samples,) -> amplitudes (frames, window // 2 + 1).

    Frame k is wave[k * hop : k * hop + window], times torch.hann_window(window); what is left at the end is dropped.
    Amplitudes are absolute values of the Fourier transform (torch.fft.rfft).
    """
    ### BEGIN SOLUTION
    frames = wave.unfold(0, window, hop)
    return torch.fft.rfft(frames * torch.hann_window(window, dtype=wave.dtype)).abs()
    ### END SOLUTION

# %% check="8c.4"
check("8c.4", spectrogram)

# %%
spectrogram = use("8c.4", spectrogram)
pictures = {
    f"{SYLLABLES[k]}, {voice}": (spectrogram(torch.tensor(heard[voice][k]), WINDOW, HOP), LENGTH / RATE, RATE / 2)
    for voice in ("men", "a child") for k in (0, 1, 3)
}
show(
    plot_spectrograms(pictures, title="The same syllables: a child's resonances lie higher"),
    alt="Six spectrograms, syllables " + ", ".join(SYLLABLES[k] for k in (0, 1, 3)) + ", by a man and by a child: "
    "dark bands where the voice resonates, further up for the child, and a hiss before the vowel in sa.",
)

# Ten lines: 90 clips of a child, LoRA in the convolutions and the hidden layer.
model = sounds_base(seed, quick=fast)
apply_lora(model, r=4, alpha=8, target_modules=["conv1", "conv2", "conv3", "body"], modules_to_save=["head"])
print(coverage(model))
x, y = sounds_data("a child", seed, "train")
for step in train(model, Batches(x, y, batch_size=32, seed=seed), steps=60, lr=0.01, device=device):
    pass
print(f"\na child, after {step.step} steps: {evaluate(model, [sounds_data('a child', seed)], device):.1%} right")

new = ["a child", "a giant"] if fast else ["a child", "a giant", "in a hurry", "a noisy street"]
voices = {voice: finetune_and_compare(sounds_task(voice, fast), seeds=seeds) for voice in new}
display(*voices.values())

# %%
# The control that must fail: the right adapter with the wrong voice.
swap_guess = predict("8c.D", ...)

# %%
hearers = {"frozen base": [sounds_base(s, quick=fast) for s in seeds]}
hearers |= {f"LoRA, {voice}": [c.models["LoRA", s] for s in seeds] for voice, c in voices.items()}
print(f"{'tested on':24s}" + "".join(f"{voice:>16s}" for voice in VOICES))
hears = {}
for name, models in hearers.items():
    for voice in VOICES:
        pairs = zip(models, seeds, strict=True)
        hears[name, voice] = np.mean([evaluate(m, [sounds_data(voice, s)], device) for m, s in pairs])
    print(f"{name:24s}" + "".join(f"{hears[name, voice]:16.0%}" for voice in VOICES))
swapped = hears["LoRA, a child", "a giant"] - hears["frozen base", "a giant"]
swap_guess.reveal(
    "a" if swapped > 0.05 else "c" if swapped < -0.05 else "b",
    f"{100 * swapped:+.0f} points: it has learned one voice, not voices. Even men, whom the base heard at "
    f"{hears['frozen base', 'men']:.0%}, are at {hears['LoRA, a child', 'men']:.0%}, until it is switched off.",
)

child = voices["a child"].models["LoRA", seed]
# The errors that LoRA still makes, over all seeds.
counts = np.zeros((9, 9), dtype=int)
for s in seeds:
    x, y = sounds_data("a child", s)
    with torch.no_grad():
        np.add.at(counts, (y.numpy(), voices["a child"].models["LoRA", s](x).argmax(-1).numpy()), 1)
figure = plot_confusion(counts, SYLLABLES, title="What a child says, and what is heard")
off = counts * (1 - np.eye(9, dtype=int))
worst = np.unravel_index(off.argmax(), off.shape)
show(figure, alt=f"Table of syllables said and heard; most often wrong: {SYLLABLES[worst[0]]} heard as {SYLLABLES[worst[1]]}, {off.max()} times.")

# Where does the voice sit? LoRA in one layer alone:
for only in ("conv1", "conv2", "conv3", "body"):
    c = finetune_and_compare(sounds_task("a child", fast, targets=(only,)), (LORA,), seeds)
    print(f"LoRA in {only} alone: {c.mean('LoRA'):.0%}, {c.of('LoRA')[0].trainable:,} trained with the head")

# %% [markdown]
# Can it keep up? A machine that listens looks at the last half second, again and again, here 20 times a second.
# **Real time** means: less than a second of work for each second of sound.

# %%
rng = np.random.default_rng(seed)
asked_for = rng.integers(0, 9, size=6)
stream = np.concatenate([say(SYLLABLES[k], VOICES["a child"], rng) for k in asked_for])
starts = range(0, len(stream) - LENGTH + 1, RATE // 20)
began, heard_now = time.process_time(), []
with torch.no_grad():
    for start in starts:
        heard_now.append(child(log_mel(stream[None, start : start + LENGTH])).softmax(-1)[0])
work, sound = time.process_time() - began, len(stream) / RATE
each = [heard_now[int(np.argmin([abs(start - k * LENGTH) for start in starts]))] for k in range(6)]
said = [((k + 0.5) * LENGTH / RATE, SYLLABLES[p.argmax()], int(p.argmax()) == asked_for[k]) for k, p in enumerate(each)]
from_wave = torch.fft.rfft(torch.tensor(stream).unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW)).abs()
show(
    plot_spectrograms({"": (from_wave, sound, RATE / 2)}, said=said,
                      title="Six syllables in a row, and what is heard: " + " ".join(SYLLABLES[k] for k in asked_for) + " was said"),
    alt="Spectrogram of six syllables, " + ", ".join(SYLLABLES[k] for k in asked_for) + ", with what the net heard above: "
    + ", ".join(text for _, text, _ in said),
)
display(Audio(stream, rate=RATE))
print(f"{sound:.1f} s of sound, {len(starts)} looks: {work:.2f} s of processor time, {1000 * work / sound:.0f} ms for each second")

# %% [markdown]
# ## 4 · Ten tasks in one pocket
#
# A doorbell, a watch, a hearing aid: little memory, a battery. What does each further task cost there?

# %% exercise="8c.5"
def stored(tasks: int, total: int, layers: list, head: int, r: int) -> tuple:
    """-> (bytes with one base and an adapter a task, bytes with a whole model a task), float32.

    total: parameters of a model, its head included, stored whole; layers: (out, in) of each adapted layer;
    each task also trains a head of its own, of `head` parameters, which is stored with its adapter
    """
    ### BEGIN SOLUTION
    adapter = sum(r * (out + inputs) for out, inputs in layers)
    return 4 * (total + tasks * (adapter + head)), 4 * tasks * total
    ### END SOLUTION

# %% check="8c.5"
check("8c.5", stored)

# %%
import copy

from lora_lab import merge
from lora_lab.layers import LoRALayer
from lora_lab.tasks.sounds import KeywordNet

stored = use("8c.5", stored)
torch.manual_seed(seed)
base = KeywordNet()
pocket = apply_lora(copy.deepcopy(base), r=4, alpha=8, target_modules=["conv1", "conv2", "conv3", "body"], modules_to_save=["head"])
shapes = [(m.lora_B.shape[0], m.lora_A.shape[1]) for m in pocket.modules() if isinstance(m, LoRALayer)]
total, head = sum(p.numel() for p in base.parameters()), sum(p.numel() for p in base.head.parameters())
print("            with adapters   whole copies")
for tasks in (1, 2, 10, 100):
    lean, copies = stored(tasks, total, shapes, head, r=4)
    print(f"{tasks:3d} tasks   {lean:11,d} B  {copies:11,d} B")


def cpu_ms(work, times=30):
    """Processor time of one call, in milliseconds: the median, so that one slow call does no harm."""
    seconds = []
    for _ in range(times):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return 1000 * float(np.median(seconds))


x, y = torch.randn(32, 33, 24), torch.randint(9, (32,))
trained = {name: p.detach().clone() for name, p in pocket.named_parameters() if p.requires_grad}
costs = {"swap one adapter for another": cpu_ms(lambda: pocket.load_state_dict(trained, strict=False))}
for name, model in (("full fine-tuning", copy.deepcopy(base)), ("LoRA", pocket)):
    costs[f"one training step, {name}"] = cpu_ms(lambda net=model: F.cross_entropy(net(x), y).backward())
pocket.eval()
with torch.no_grad():
    costs["hear one clip, base"] = cpu_ms(lambda: base(x[:1]))
    costs["hear one clip, LoRA beside it"] = cpu_ms(lambda: pocket(x[:1]))
    merge(pocket)
    costs["hear one clip, LoRA merged"] = cpu_ms(lambda: pocket(x[:1]))
print()
for name, value in costs.items():
    print(f"{name:36s} {value:7.2f} ms of processor time")

# %% [markdown]
# On one chip, processor time stands in for energy. What LoRA saves for sure is *bytes*: stored, sent, swapped.
#
# ## Summary
#
# - A patch, a filter, a frame: W is a matrix, so BA fits.
# - A good control destroys one thing.
# - An adapter fits one world.
#
# **Where this shows up in practice**: one adapter per speaker or camera.

# %%
progress()
