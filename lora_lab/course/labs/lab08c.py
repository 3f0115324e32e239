"""Lab 08c, One method, many tasks: seeing and hearing. Patches, a convolution with an adapter, a control that destroys order, sound as frames, storage.

The expectations are numpy's, written as loops: a convolution is a sum over its window, a spectrum a sum of cosines and sines.
"""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np

from ..exercise import Case, Diagnosis, Exercise, Lab, Prediction, compare
from ..script import Script, layer
from .formulas import first_match

EXACT = 1e-6  # numbers that only move: an answer in float32 is as right as one in float64
RTOL = 1e-9  # float64, sums of a few hundred products: rounding about 1e-14, the smallest mistake far above

# ---------------------------------------------------------------------------------------------------------------------
# 8c.1  patches(images, size)
#
# Images are not square, and the patch's side, the number of patches and the number of images all differ.

IMAGES = (dict(n=3, high=8, wide=12, size=2), dict(n=2, high=6, wide=15, size=3))


def _patches_probe(kind):
    def probe(rng):
        s = Script()
        images = s.input("images", rng.normal(size=(kind["n"], kind["high"], kind["wide"])))
        s.send("patches", s.call(images, kind["size"]))
        return s

    return probe


def cut_patches(images: np.ndarray, size: int, by_column: bool = False, pixels_by_column: bool = False, step: int | None = None) -> np.ndarray:
    """The oracle: patch after patch, pixel after pixel. The flags make the mistakes."""
    _, high, wide = images.shape
    tops, lefts = range(0, high - size + 1, step or size), range(0, wide - size + 1, step or size)
    corners = [(i, j) for j in lefts for i in tops] if by_column else [(i, j) for i in tops for j in lefts]
    pixels = [(i, j) for j in range(size) for i in range(size)] if pixels_by_column else list(product(range(size), repeat=2))
    return np.stack([np.stack([images[:, i + a, j + b] for a, b in pixels], 1) for i, j in corners], 1)


def _patches_judge(kind):
    return lambda inputs, answers: compare(answers["patches"], cut_patches(inputs["images"], kind["size"]), "patches(images, size)", rtol=EXACT)


def _patches_wrong(images: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """What the usual mistakes give."""
    n, high, wide = images.shape
    right = cut_patches(images, size)
    strided = np.stack([images[:, i::size, j::size].reshape(n, -1) for i in range(size) for j in range(size)], 1)  # (n, size², tokens)
    swapped = images.reshape(n, wide // size, size, high // size, size)
    return {
        "no_permute": images.reshape(n, -1, size * size),
        "columns_first": cut_patches(images, size, by_column=True),
        "pixels_by_column": cut_patches(images, size, pixels_by_column=True),
        "both_by_column": cut_patches(images, size, True, True),
        "pixel_first": strided,
        "strided": strided.reshape(n, -1, size * size),
        "not_flat": right.reshape(n, -1, size, size),
        "grid_kept": right.reshape(n, high // size, wide // size, size * size),
        "grid_of_squares": right.reshape(n, high // size, wide // size, size, size),
        "overlapping": cut_patches(images, size, step=1),
        "height_and_width": swapped.transpose(0, 1, 3, 2, 4).reshape(n, -1, size * size),
        "batch_lost": right.reshape(-1, size * size),
        "one_image": right[0],
        "everything_flat": right.reshape(n, -1),
    }


_PATCHES_TEXT = {
    "no_permute": "you cut the pixels of each image into stretches of size², along its rows: a stretch is no square. Name the axes (rows of "
    "patches, rows in a patch, columns of patches, columns in a patch) and bring the two that count patches to the front before you flatten",
    "columns_first": "the right patches, but down the columns; asked is row by row",
    "pixels_by_column": "the right patches, but inside a patch the pixels run down the columns; asked is row by row",
    "both_by_column": "everything runs down the columns, patches and the pixels in them; asked is row by row",
    "pixel_first": "this is (n, size², patches): the last two axes are the wrong way round",
    "strided": "each of your rows takes every size-th pixel of the whole image: the axes inside a patch and those that count patches are swapped",
    "not_flat": "right, but each patch is still a square; flatten it: (n, patches, size²)",
    "grid_kept": "right, but the patches still lie in a grid; one axis for all of them: (n, patches, size²)",
    "grid_of_squares": "right, but the patches still lie in a grid, each a square: one axis for the patches, one for the pixels of a patch",
    "overlapping": "your patches overlap: the next one begins `size` pixels further, not 1",
    "height_and_width": "height and width are mixed up: there are H / size rows of patches and W / size columns",
    "batch_lost": "right, but the images are no longer apart: keep the axis n in front",
    "one_image": "that is the first image only; keep the axis n",
    "everything_flat": "right order, but one row an image; asked is (n, patches, size²)",
}


def _diagnose_patches(evidence):
    found = [e.answers.get("patches") for e in evidence]
    wrong = [_patches_wrong(e.inputs["images"], kind["size"]) for e, kind in zip(evidence, IMAGES, strict=True)]
    key = first_match(found, {name: [w[name] for w in wrong] for name in wrong[0]}, rtol=EXACT)
    if key:
        return Diagnosis(key, _PATCHES_TEXT[key])
    if all(isinstance(f, list) for f in found):
        return Diagnosis("a_list", "a list comes back; one tensor is asked for: torch.stack puts them together")
    if evidence[0].failure is None and evidence[1].failure is not None:
        return Diagnosis("fixed_size", "right for one size of patch, wrong for another: is a 2 or a 4 written where `size` belongs?")
    return None


def _lab_patches(images, size):
    n, high, wide = images.shape
    grid = images.reshape(n, high // size, size, wide // size, size)
    return grid.transpose(2, 3).reshape(n, -1, size * size)


PATCHES = Exercise(
    id="8c.1",
    title="An image as a sentence",
    difficulty=2,
    minutes=6,
    points=3,
    name="patches",
    cases=tuple(
        Case(f"{kind['n']} images of {kind['high']} x {kind['wide']}, patches of {kind['size']} x {kind['size']}", _patches_probe(kind), _patches_judge(kind))
        for kind in IMAGES
    ),
    diagnose=_diagnose_patches,
    hints=(
        "`reshape` alone never moves a pixel. Which two axes have to change places before the last reshape?",
        "Split both axes: images.reshape(n, H // size, size, W // size, size). Axes 1 and 3 count patches, 2 and 4 pixels inside a patch.",
        "grid = images.reshape(n, H // size, size, W // size, size)\nreturn grid.transpose(2, 3).reshape(n, -1, size * size)",
    ),
    read="Dosovitskiy et al. 2020 (arXiv 2010.11929), section 3.1",
    fallback=lambda: _lab_patches,
)


# ---------------------------------------------------------------------------------------------------------------------
# 8c.2  lora_conv(x, conv, A, B, scaling)
#
# Window, stride and padding differ between the cases and along the two axes; r, channels and filters all differ.

CONVS = (
    dict(n=2, channels=4, out=5, window=(3, 3), stride=(1, 1), padding=(1, 1), size=(7, 8), r=3, scaling=1.75),
    dict(n=2, channels=2, out=7, window=(3, 5), stride=(2, 3), padding=(1, 2), size=(9, 11), r=4, scaling=0.6),
)


def _conv_probe(kind, zero_B=False):
    def probe(rng):
        s = Script()
        x = s.input("x", rng.normal(size=(kind["n"], kind["channels"], *kind["size"])))
        weight = rng.normal(size=(kind["out"], kind["channels"], *kind["window"]))
        s.input("W", weight), s.input("b", bias := rng.normal(size=kind["out"]))
        conv = s.module(layer("Conv2d", weight=weight, bias=bias, stride=kind["stride"], padding=kind["padding"]))
        A = s.input("A", rng.normal(size=(kind["r"], kind["channels"] * math.prod(kind["window"]))))
        B = s.input("B", np.zeros((kind["out"], kind["r"])) if zero_B else rng.normal(size=(kind["out"], kind["r"])))
        s.send("y", s.call(x, conv, A, B, kind["scaling"]))
        s.send("W after", s.get(conv, "weight"))
        return s

    return probe


def convolve(x: np.ndarray, W: np.ndarray, stride, padding) -> np.ndarray:
    """The oracle: y[n, o, i, j] = sum over the window of W[o] * x at (i, j)."""
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, W.shape[2:], axis=(2, 3))[:, :, :: stride[0], :: stride[1]]
    return np.einsum("ncijab,ocab->noij", windows, W)


def _conv_expected(inputs, kind, scaling=None):
    W = inputs["W"] + (kind["scaling"] if scaling is None else scaling) * (inputs["B"] @ inputs["A"]).reshape(inputs["W"].shape)
    return convolve(inputs["x"], W, kind["stride"], kind["padding"]) + inputs["b"][:, None, None]


def _conv_judge(kind):
    return lambda inputs, answers: compare(answers["y"], _conv_expected(inputs, kind), "lora_conv(…)", rtol=RTOL)


def _conv_kept(inputs, answers):
    if compare(answers["W after"], inputs["W"], "conv.weight", rtol=0.0):
        return "afterwards the weight of conv is another one; only the output should have the update in it"
    return None


def _conv_wrong(inputs, kind) -> dict[str, np.ndarray]:
    x, W, A, B, b = (inputs[name] for name in ("x", "W", "A", "B", "b"))
    s, how = kind["scaling"], (kind["stride"], kind["padding"])
    out, channels, kh, kw = W.shape
    base, update = convolve(x, W, *how) + b[:, None, None], convolve(x, (B @ A).reshape(W.shape), *how)

    def other(delta):
        return base + s * convolve(x, delta, *how)

    return {
        "scaling_missing": base + update,
        "scaling_squared": base + s * s * update,
        "divided_by_scaling": base + update / s,
        "divided_by_r": base + s / kind["r"] * update,
        "base_missing": s * update,
        "bias_twice": base + s * update + b[:, None, None],
        "bias_scaled": base + s * (update + b[:, None, None]),
        "bias_missing": base + s * update - b[:, None, None],
        "all_scaled": s * (base + update),
        "base_alone": base,
        "base_twice": 2 * base + s * update,
        "update_subtracted": base - s * update,
        "channels_last": other((B @ A).reshape(out, kh, kw, channels).transpose(0, 3, 1, 2)),
        "delta_transposed": other((A.T @ B.T).reshape(W.shape)),
        "window_flipped": other((B @ A).reshape(W.shape)[:, :, ::-1, ::-1]),
    }


_CONV_TEXT = {
    "scaling_missing": "the scaling is missing: what you compute is conv(x) + B A x",
    "scaling_squared": "the scaling is in it twice",
    "divided_by_scaling": "you divide by the scaling; multiply",
    "divided_by_r": "you divide by r once more; `scaling` is alpha / r already",
    "base_missing": "that is the update alone; add what the frozen convolution gives",
    "bias_twice": "the bias is in it twice: the update has none of its own",
    "bias_scaled": "the bias went into the update, too, scaled: the update has no bias of its own",
    "bias_missing": "the bias of conv is lost",
    "all_scaled": "you scale the whole output; the frozen convolution stays as it is, only the update is scaled",
    "base_alone": "that is the frozen convolution alone; the update is not in it",
    "base_twice": "the frozen convolution is in it twice",
    "update_subtracted": "you subtract the update; add it",
    "channels_last": "A's rows are read as (height, width, channels); a filter lies in memory as (channels, height, width), as in conv.weight",
    "delta_transposed": "A and B are multiplied the wrong way round: B A is (out, channels · kh · kw), a row for each filter",
    "window_flipped": "the filters of A are upside down: nn.Conv2d does not flip its window",
}


def _conv_sizes(error, kind) -> str | None:
    """Which forgotten setting makes the very sizes that torch complains about, when it adds two tensors?"""
    if error is None or "size of tensor" not in (error.message or ""):
        return None
    numbers = [int(word.strip("().,")) for word in error.message.split() if word.strip("().,").isdigit()]
    if len(numbers) < 3:
        return None
    found, axis = set(numbers[:2]), numbers[2] - 2
    if axis not in (0, 1):
        return None
    size, window, stride, padding = (kind[name][axis] for name in ("size", "window", "stride", "padding"))

    def after(stride_, padding_, size_=size, window_=window):
        return (size_ + 2 * padding_ - window_) // stride_ + 1

    right = after(stride, padding)
    guesses = {
        "geometry_missing": after(1, 0),
        "stride_missing": after(1, padding),
        "padding_missing": after(stride, 0),
        "padding_in_B": after(1, padding, right, 1),
        "stride_in_B": after(stride, 0, right, 1),
        "geometry_in_B": after(stride, padding, right, 1),
    }
    fits = {key for key, other in guesses.items() if other != right and found == {right, other}}
    return fits.pop() if len(fits) == 1 else ("|".join(sorted(fits)) or None)


_SIZES_TEXT = {
    "geometry_missing": "the update has other sizes than conv(x): A is a convolution with conv's own stride and padding",
    "stride_missing": "the update has other sizes than conv(x): A needs conv's stride",
    "padding_missing": "the update has other sizes than conv(x): A needs conv's padding",
    "padding_in_B": "B is a convolution of 1 x 1: it mixes channels at each place and needs no padding",
    "stride_in_B": "the stride is applied twice: A has made the step already, B is 1 x 1 with stride 1",
    "geometry_in_B": "stride and padding are applied twice: A has done it already, B is 1 x 1 without either",
}


def _diagnose_conv(evidence):
    if all(e.failure is None for e in evidence[:2]):
        return Diagnosis(
            "base_changed", "you write the update into conv.weight: a frozen weight changes in `merge` and nowhere else, and a second call adds it again"
        )
    found = [e.answers.get("y") for e in evidence[:2]]
    wrong = [_conv_wrong(e.inputs, kind) for e, kind in zip(evidence, CONVS, strict=False)]
    key = first_match(found, {name: [w[name] for w in wrong] for name in wrong[0]}, rtol=RTOL)
    if key:
        return Diagnosis(key, _CONV_TEXT[key])
    fits = [set((_conv_sizes(e.error, kind) or "").split("|")) - {""} for e, kind in zip(evidence, CONVS, strict=False)]
    # What fits where something fits at all: the first case has stride 1, so that only the second sees a forgotten stride.
    failed = [f for f, e in zip(fits, evidence, strict=False) if e.failure is not None]
    if failed and all(failed):
        common = set.intersection(*failed)
        if evidence[0].failure is None:
            common &= {"stride_missing", "stride_in_B"}
        if len(common) == 1:
            key = common.pop()
            return Diagnosis(key, _SIZES_TEXT[key])
    return None


def _lab_conv(x, conv, A, B, scaling):
    from torch.nn import functional as F

    h = F.conv2d(x, A.view(len(A), *conv.weight.shape[1:]), stride=conv.stride, padding=conv.padding)
    return conv(x) + scaling * F.conv2d(h, B[:, :, None, None])


CONV = Exercise(
    id="8c.2",
    title="An adapter of filters",
    difficulty=2,
    minutes=7,
    points=4,
    name="lora_conv",
    cases=(
        Case("a window of 3 x 3 with padding", _conv_probe(CONVS[0]), _conv_judge(CONVS[0])),
        Case("a window of 3 x 5 with stride and padding", _conv_probe(CONVS[1]), _conv_judge(CONVS[1])),
        Case("with B = 0 it is the frozen convolution", _conv_probe(CONVS[1], zero_B=True), _conv_judge(CONVS[1])),
        Case("the weight of the frozen convolution stays", _conv_probe(CONVS[0]), _conv_kept),
    ),
    diagnose=_diagnose_conv,
    hints=(
        "A's r rows are r small filters over all input channels. What does a convolution with r filters give, and what has to happen to its r channels?",
        "A.view(r, *conv.weight.shape[1:]) is a stack of filters, used with conv's own stride and padding; B[:, :, None, None] is a convolution of 1 x 1.",
        "h = F.conv2d(x, A.view(len(A), *conv.weight.shape[1:]), stride=conv.stride, padding=conv.padding)\n"
        "return conv(x) + scaling * F.conv2d(h, B[:, :, None, None])",
    ),
    read="`LoRAConv2d` in lora_lab/layers.py, once you have tried",
    fallback=lambda: _lab_conv,
)


# ---------------------------------------------------------------------------------------------------------------------
# 8c.3  shuffle_frames(clips)
#
# Random answers: what is judged are counts. Frames are all different, so that each can be found again.

MANY, FRAMES = 240, 5


def _shuffle_probe(frames=FRAMES):
    def probe(rng):
        s = Script(seed=int(rng.integers(1 << 30)))
        s.send("shuffled", s.call(s.input("clips", rng.normal(size=(MANY, frames, 3, 2)))))
        return s

    return probe


def _orders(inputs, answers) -> np.ndarray | None:
    """(n, frames): which frame of its own clip stands at each place, -1 for a frame that is none of them; None for another shape."""
    clips, found = inputs["clips"], answers.get("shuffled")
    if not isinstance(found, np.ndarray) or found.shape != clips.shape:
        return None
    same = (found[:, :, None] == clips[:, None]).all((3, 4))  # clip, place, frame
    return np.where(same.any(2), same.argmax(2), -1)


def _judge_whole(inputs, answers):
    orders = _orders(inputs, answers)
    if orders is None:
        return compare(answers["shuffled"], inputs["clips"], "shuffle_frames(clips)")
    bad = int((np.sort(orders, 1) != np.arange(orders.shape[1])).any(1).sum())
    return f"in {bad} of {len(orders)} clips a frame is missing, stands twice, or is none of that clip's" if bad else None


def _judge_own(inputs, answers):
    orders = _orders(inputs, answers)
    if orders is None:
        return compare(answers["shuffled"], inputs["clips"], "shuffle_frames(clips)")
    # 240 draws from 120 orders leave about 16 unseen; 5 frames rolled have 5 orders, one order for all has 1.
    different = len({tuple(order) for order in orders})
    if different >= 70:
        return None
    return f"{len(orders)} clips come in {different} different order{'s' * (different != 1)}; of the 120 there are, about 104 should turn up"


def _judge_even(inputs, answers):
    orders = _orders(inputs, answers)
    if orders is None:
        return compare(answers["shuffled"], inputs["clips"], "shuffle_frames(clips)")
    n, frames = orders.shape
    counts = np.stack([(orders == frame).sum(0) for frame in range(frames)])  # frame, place
    # Binomial; 6 standard deviations: by chance less than once in 10 million checks.
    room = 6 * math.sqrt(n / frames * (1 - 1 / frames))
    worst = np.unravel_index(np.abs(counts - n / frames).argmax(), counts.shape)
    if abs(counts[worst] - n / frames) > room:
        found = f"frame {worst[0]} stands at place {worst[1]} in {counts[worst]} of {n} clips"
        return f"{found}; about {n // frames} are expected when every order is as likely as any other"
    return None


def _diagnose_shuffle(evidence):
    first = evidence[0]
    clips, found = first.inputs.get("clips"), first.answers.get("shuffled")
    if clips is None or not isinstance(found, np.ndarray) or first.answers.changed_inputs:
        return None
    orders = _orders(first.inputs, first.answers)
    if orders is None:
        if found.shape == (FRAMES, MANY, 3, 2):
            return Diagnosis("axes_swapped", "clips and frames have changed places: the answer has the shape of the clips")
        return None
    if np.array_equal(found, clips):
        return Diagnosis("unchanged", "the clips come back as they were")
    owners = _owners(clips, found)
    if owners is not None and (owners == owners[:, :1]).all() and (owners[:, 0] != np.arange(MANY)).any():
        return Diagnosis("clips_shuffled", "you shuffle the clips among each other (axis 0); each stays where it is, only its frames move (axis 1)")
    if (orders == -1).any():
        if owners is not None:
            return Diagnosis("frames_across_clips", "frames wander from one clip to another; each clip keeps its own frames")
        if np.array_equal(np.sort(found.reshape(MANY, -1), 1), np.sort(clips.reshape(MANY, -1), 1)):
            return Diagnosis("pixels_shuffled", "pixels leave their frame: a frame must stay as it is, only its place in the clip changes")
        return None
    if (np.sort(orders, 1) != np.arange(FRAMES)).any():
        return Diagnosis(
            "with_replacement",
            "frames are drawn with replacement: some stand twice, others are lost. "
            "An order is a permutation: `argsort` of random numbers, or `randperm`",
        )
    different = {tuple(order) for order in orders}
    if different <= {(4, 3, 2, 1, 0), (0, 1, 2, 3, 4)}:
        return Diagnosis("reversed", "you play clips backwards; that is another order, and a net can learn it. Every order has to be as likely")
    if len(different) == 1:
        return Diagnosis(
            "one_order",
            "every clip gets the same order. A net can learn that order as well as the old one, so it is no control: draw one for each clip",
        )
    if different <= {tuple(np.roll(np.arange(FRAMES), k)) for k in range(FRAMES)}:
        return Diagnosis("rolled", "you roll the frames round: nearly all neighbours stay neighbours, so the motion is still to be seen")
    if different <= {order for order in permutations(range(FRAMES)) if sum(a != b for a, b in enumerate(order)) <= 2}:
        return Diagnosis("one_swap", "you swap two frames; the rest keeps its order, and the motion is still to be seen")
    ends = [(orders[:, place] == place).all() for place in range(FRAMES)]
    if any(ends):
        return Diagnosis("a_frame_stays", f"the frame at place {ends.index(True)} never moves")
    if not (orders == np.arange(FRAMES)).any():
        return Diagnosis(
            "always_moved",
            "every clip changes, none keeps its order: that still tells something. A control knows nothing, so every order has to be as likely",
        )
    return None


def _owners(clips: np.ndarray, found: np.ndarray) -> np.ndarray | None:
    """(n, frames): the clip that each frame came from; None if one of them is no frame of any clip."""
    known = {frame.tobytes(): i for i, clip in enumerate(np.ascontiguousarray(clips)) for frame in clip}
    owners = [[known.get(frame.tobytes(), -1) for frame in clip] for clip in np.ascontiguousarray(found.astype(clips.dtype))]
    return None if np.min(owners) < 0 else np.array(owners)


def _lab_shuffle(clips):
    import torch

    order = torch.rand(clips.shape[:2]).argsort(1)
    return clips[torch.arange(len(clips))[:, None], order]


SHUFFLE = Exercise(
    id="8c.3",
    title="A control that knows no order",
    difficulty=2,
    minutes=6,
    points=3,
    name="shuffle_frames",
    cases=(
        Case("each clip keeps its own frames, all of them, each once", _shuffle_probe(), _judge_whole),
        Case("each clip has an order of its own", _shuffle_probe(), _judge_own),
        Case("every frame is as likely at every place", _shuffle_probe(), _judge_even),
        Case("of two frames, half of the clips swap", _shuffle_probe(2), _judge_even),
    ),
    diagnose=_diagnose_shuffle,
    hints=(
        "You need one permutation for each clip, not one for all. What does `argsort` make of a row of random numbers?",
        "order = torch.rand(clips.shape[:2]).argsort(1) is (n, frames). Indexing with [clip number (n, 1), order (n, frames)] picks frames clip by clip.",
        "order = torch.rand(clips.shape[:2]).argsort(1)\nreturn clips[torch.arange(len(clips))[:, None], order]",
    ),
    read="the question above the exercise: what may the control destroy, what must it keep?",
    fallback=lambda: _lab_shuffle,
)


# ---------------------------------------------------------------------------------------------------------------------
# 8c.4  spectrogram(wave, window, hop)
#
# The last frame ends exactly at the last sample, so that a loop that stops one too early is seen.

SINGLE = 1e-5  # float32: a sum of 20 products keeps about 1e-7; the smallest mistake, another Hann window, changes some per cent
SOUNDS = (dict(samples=16 + 14 * 6, window=16, hop=6), dict(samples=20 + 5 * 12 + 7, window=20, hop=12))


def _sound_probe(kind):
    def probe(rng):
        s = Script()
        s.send("frames", s.call(s.input("wave", rng.normal(size=kind["samples"]).astype(np.float32)), kind["window"], kind["hop"]))
        return s

    return probe


def frames_of(wave: np.ndarray, window: int, hop: int, hann: str | None = "periodic") -> np.ndarray:
    """The oracle: complex amplitudes (frames, window // 2 + 1), sums of cosines and sines. Other windows make the mistakes."""
    k, wave = np.arange(window), wave.astype(np.float64)
    height = 0.54 if hann == "hamming" else 0.5
    shape = 1.0 if hann is None else height - (1 - height) * np.cos(2 * np.pi * k / (window - 1 if hann == "symmetric" else window))
    starts = range(0, len(wave) - window + 1, hop)
    wheel = np.exp(-2j * np.pi * np.outer(np.arange(window // 2 + 1), k) / window)
    return np.stack([wheel @ (wave[start : start + window] * shape) for start in starts])


def _sound_judge(kind):
    return lambda inputs, answers: compare(
        answers["frames"], np.abs(frames_of(inputs["wave"], kind["window"], kind["hop"])), "spectrogram(wave, window, hop)", rtol=SINGLE
    )


def _sound_wrong(wave, kind) -> dict[str, np.ndarray]:
    window, hop = kind["window"], kind["hop"]
    plain = frames_of(wave, window, hop)
    right = np.abs(plain)
    around = np.pad(wave, window // 2, mode="reflect")
    both = np.concatenate([right, right[:, 1 : (window + 1) // 2][:, ::-1]], 1)
    return {
        "no_window": np.abs(frames_of(wave, window, hop, None)),
        "symmetric_window": np.abs(frames_of(wave, window, hop, "symmetric")),
        "power": right**2,
        "logarithm": np.log(right),
        "real_part": plain.real,
        "transposed": right.T,
        "both_sides": both,
        "last_frame_lost": right[:-1],
        "centred": np.abs(frames_of(around, window, hop)),
        "centred_transposed": np.abs(frames_of(around, window, hop)).T,
        "no_overlap": np.abs(frames_of(wave, window, window)),
        "every_sample": np.abs(frames_of(wave, window, 1)),
        "divided_by_window": right / window,
        "divided_by_root": right / math.sqrt(window),
        "divided_by_maximum": right / right.max(),
        "hamming": np.abs(frames_of(wave, window, hop, "hamming")),
        "window_and_hop": np.abs(frames_of(wave, hop, window)),
        "zero_dropped": right[:, 1:],
    }


_SOUND_TEXT = {
    "no_window": "the Hann window is missing: a frame that is cut off hard hisses in all bands",
    "symmetric_window": "your Hann window ends with a 0 of its own (np.hanning, or periodic=False); torch.hann_window(window) is the one that repeats",
    "power": "those are squares of amplitudes, energies; the amplitude is asked for",
    "logarithm": "right, but the logarithm comes later; the amplitude is asked for",
    "real_part": "that is the real part, which changes sign with the moment a frame begins; take abs",
    "transposed": "right, but frequencies are the rows; asked is a row for each frame",
    "both_sides": "of a real sound the upper half of the spectrum mirrors the lower one: rfft leaves it out",
    "last_frame_lost": "the last frame is missing: it may end exactly where the sound ends",
    "centred": "you pad the sound, so that frames are centred (torch.stft does, unless center=False); the first frame begins at sample 0",
    "centred_transposed": "frequencies are the rows, and the sound is padded (torch.stft does, unless center=False)",
    "no_overlap": "the next frame begins `hop` samples later, not after a whole window",
    "every_sample": "the next frame begins `hop` samples later, not 1",
    "divided_by_window": "you divide by the length of the window; the plain sum is asked for",
    "divided_by_root": "you divide by the root of the window's length (norm=\"ortho\"); the plain sum is asked for",
    "divided_by_maximum": "you divide by the largest amplitude: then a whisper looks like a shout; the plain sum is asked for",
    "hamming": "that is a Hamming window; a Hann window goes down to 0",
    "window_and_hop": "window and hop have changed places: a frame is `window` long, and the next one begins `hop` later",
    "zero_dropped": "the first band, frequency 0, is missing",
}


def _diagnose_sound(evidence):
    found = [e.answers.get("frames") for e in evidence]
    wrong = [_sound_wrong(e.inputs["wave"], kind) for e, kind in zip(evidence, SOUNDS, strict=True) if "wave" in e.inputs]
    if len(wrong) < len(found):
        return None
    key = first_match(found, {name: [w[name] for w in wrong] for name in wrong[0]}, rtol=SINGLE)
    if key:
        return Diagnosis(key, _SOUND_TEXT[key])
    if evidence[0].failure is not None and evidence[1].failure is None:
        # The second sound has samples left over, so that a loop one too short does no harm there.
        if compare(found[0], wrong[0]["last_frame_lost"], rtol=SINGLE) is None:
            return Diagnosis("last_frame_lost", _SOUND_TEXT["last_frame_lost"])
    if isinstance(found[1], np.ndarray) and found[1].shape[0] == np.shape(wrong[1]["transposed"])[1] + 1 and evidence[0].failure is None:
        return Diagnosis("padded_frame", "one frame too many: what is left at the end is no whole window, and is dropped")
    return None


def _lab_spectrogram(wave, window, hop):
    import torch

    return torch.fft.rfft(wave.unfold(0, window, hop) * torch.hann_window(window, dtype=wave.dtype)).abs()


SPECTROGRAM = Exercise(
    id="8c.4",
    title="Sound as an image",
    difficulty=2,
    minutes=7,
    points=3,
    name="spectrogram",
    cases=tuple(
        Case(f"{kind['samples']} samples, window {kind['window']}, hop {kind['hop']}", _sound_probe(kind), _sound_judge(kind)) for kind in SOUNDS
    ),
    diagnose=_diagnose_sound,
    hints=(
        "Three steps: cut the wave into overlapping frames, weigh each with the window, take the Fourier transform's amplitude.",
        "wave.unfold(0, window, hop) gives the frames (frames, window); torch.fft.rfft transforms the last axis.",
        "frames = wave.unfold(0, window, hop)\nreturn torch.fft.rfft(frames * torch.hann_window(window, dtype=wave.dtype)).abs()",
    ),
    read="the docs of torch.Tensor.unfold and torch.fft.rfft",
    fallback=lambda: _lab_spectrogram,
)


# ---------------------------------------------------------------------------------------------------------------------
# 8c.5  stored(tasks, total, layers, head, r)

STORES = (dict(tasks=7, total=9001, layers=((11, 13), (5, 23)), head=47, r=3), dict(tasks=2, total=5003, layers=((17, 3),), head=29, r=5))


def _stored_probe(kind):
    def probe(rng):
        s = Script()
        s.send("bytes", s.call(kind["tasks"], kind["total"], [list(shape) for shape in kind["layers"]], kind["head"], kind["r"]))
        return s

    return probe


def _stored(tasks, total, layers, head, r):
    adapter = sum(r * (out + inputs) for out, inputs in layers)
    return 4 * (total + tasks * (adapter + head)), 4 * tasks * total


def _two(found):
    """Two plain numbers, or None."""
    if isinstance(found, np.ndarray):
        found = found.tolist()
    if not isinstance(found, list) or len(found) != 2:
        return None
    numbers = [f.item() if isinstance(f, np.ndarray) and f.ndim == 0 else f for f in found]
    return numbers if all(isinstance(f, (int, float)) and not isinstance(f, bool) for f in numbers) else None


def _stored_judge(kind, which):
    def judge(inputs, answers):
        found = _two(answers["bytes"])
        if found is None:
            return "expected two numbers, (bytes with adapters, bytes with whole copies)"
        return compare(found[which], _stored(**kind)[which], ("with adapters", "with whole copies")[which], rtol=1e-12)  # whole numbers below 2^53

    return judge


_STORED_TEXT = {
    "swapped": "the two numbers are the wrong way round: adapters first",
    "parameters": "those are parameters; a float32 takes 4 bytes",
    "bits": "those are bits; a byte has 8",
    "base_forgotten": "with adapters the base has to be there, too, once: an adapter alone computes nothing",
    "base_every_time": "you store the base anew for each task; all adapters share one",
    "head_forgotten": "each task has a trained head of its own, and it is missing",
    "head_once": "the head is counted once; each task trains its own",
    "head_added_to_copies": "a whole copy has its head in it already: total is with the head",
    "one_adapter": "that is one adapter; there is one for each task",
    "only_A": "an adapter is A and B: r · in and r · out numbers a layer",
    "product": "r · out · in: that is r whole matrices. A is (r, in) and B is (out, r): r · (out + in)",
    "whole_delta": "you store ΔW = B A, multiplied out; the file holds the two factors",
    "base_in_copies": "a whole copy is a model by itself: no base beside the copies",
    "base_without_head": "the base is stored whole, with the head that it came with",
    "last_layer": "that is the adapter of the last layer alone; add up over all layers",
    "base_only_in_bytes": "the base is in bytes, the adapters still in parameters: 4 bytes for each of them, too",
    "half": "that is 2 bytes a number, float16; a float32 takes 4",
    "double": "that is 8 bytes a number, float64; a float32 takes 4",
    "one_copy": "one whole copy; each task has one of its own",
    "r_missing": "r is missing: each layer has r · (out + in) numbers",
}


def _stored_wrong(tasks, total, layers, head, r):
    a = sum(r * (o + i) for o, i in layers)
    right, copies = _stored(tasks, total, layers, head, r)
    adapters = {
        "base_forgotten": tasks * (a + head),
        "base_every_time": tasks * (total + a + head),
        "head_forgotten": total + tasks * a,
        "head_once": total + tasks * a + head,
        "one_adapter": total + a + head,
        "only_A": total + tasks * (sum(r * i for _, i in layers) + head),
        "product": total + tasks * (sum(r * o * i for o, i in layers) + head),
        "whole_delta": total + tasks * (sum(o * i for o, i in layers) + head),
        "r_missing": total + tasks * (sum(o + i for o, i in layers) + head),
    }
    wrong = {key: (4 * value, copies) for key, value in adapters.items()}
    last = layers[-1]
    wrong["base_without_head"] = (right - 4 * head, copies)
    wrong["last_layer"] = (4 * (total + tasks * (r * sum(last) + head)), copies) if len(layers) > 1 else (right, copies)
    wrong["base_only_in_bytes"] = (4 * total + tasks * (a + head), copies)
    wrong["half"], wrong["double"] = (right / 2, copies / 2), (2 * right, 2 * copies)
    wrong["one_copy"] = (right, 4 * total)
    wrong["swapped"] = (copies, right)
    wrong["parameters"] = (right / 4, copies / 4)
    wrong["bits"] = (8 * right, 8 * copies)
    wrong["head_added_to_copies"] = (right, copies + 4 * tasks * head)
    wrong["base_in_copies"] = (right, copies + 4 * total)
    return wrong


def _diagnose_stored(evidence):
    found = [_two(e.answers.get("bytes")) for e in evidence]
    if any(f is None for f in found):
        value = evidence[0].answers.get("bytes")
        if isinstance(value, (int, float)) or (isinstance(value, np.ndarray) and value.ndim == 0):
            return Diagnosis("one_number", "one number comes back; two are asked for: with adapters, and with whole copies")
        return None
    # Each case stands twice, once for each number: the first two suffice.
    wrong = [_stored_wrong(**kind) for kind in STORES for _ in range(2)]
    key = first_match(found, {name: [w[name] for w in wrong] for name in wrong[0]}, rtol=1e-12)
    return Diagnosis(key, _STORED_TEXT[key]) if key else None


STORED = Exercise(
    id="8c.5",
    title="Many tasks in one pocket",
    difficulty=1,
    minutes=4,
    points=2,
    name="stored",
    cases=tuple(
        Case(f"{kind['tasks']} tasks, r = {kind['r']}: {what}", _stored_probe(kind), _stored_judge(kind, which))
        for kind in STORES
        for which, what in enumerate(("with adapters", "with whole copies"))
    ),
    diagnose=_diagnose_stored,
    hints=(
        "What is there once, and what is there for each task?",
        "An adapter of one layer has A (r, in) and B (out, r). Each task also has its own head. A float32 takes 4 bytes.",
        "adapter = sum(r * (out + inputs) for out, inputs in layers)\nreturn 4 * (total + tasks * (adapter + head)), 4 * tasks * total",
    ),
    read="lab 02b, section 8: what is saved",
    fallback=lambda: _stored,
)


LAB = Lab(
    number="8c",
    name="08c_seeing_and_hearing",
    title="One method, many tasks: seeing and hearing",
    minutes=75,
    core=False,
    objectives=(
        "put LoRA into attention and into convolutions, and say what A and B are there",
        "compare it with a frozen base, a probe and full fine-tuning on images, clips and sounds",
        "build a control that destroys one thing and keeps the rest, and read what it says",
        "name an error that no adapter mends, and say why",
        "say what ten tasks cost on a small device: bytes, seconds, and what happens while it listens",
    ),
    needs=("lab 02", "what a convolution is", "lab 02b helps"),
    exercises=(PATCHES, CONV, SHUFFLE, SPECTROGRAM, STORED),
    predictions=(
        Prediction(
            "8c.A",
            "Every image is cut into its 16 patches, and they are laid out in one other order, the same for all images: a jigsaw. Both nets get LoRA. "
            "Which one ends with the better accuracy?",
            {"a": "the transformer, by more than 5 points", "b": "the net of convolutions, by more than 5 points", "c": "about the same, within 5 points"},
        ),
        Prediction(
            "8c.B",
            "LoRA has learned to say which way a digit moves. Now the test clips are played backwards. How many does it get right?",
            {"a": "as many as before", "b": "about a quarter: it guesses", "c": "hardly any"},
        ),
        Prediction(
            "8c.C",
            "Two adapters on one base, one for which way, one for which digit. The frames of each test clip are shuffled. "
            "Which accuracy falls by more than 10 points?",
            {"a": "both", "b": "only which way", "c": "only which digit", "d": "neither"},
        ),
        Prediction(
            "8c.D",
            "An adapter has learned a child's voice. It is left on, and a giant speaks. Compared with the frozen base it hears ...",
            {
                "a": "better, by more than 5 points: it has learned to listen to strange voices",
                "b": "about the same, within 5 points",
                "c": "worse, by more than 5 points",
            },
        ),
    ),
)
