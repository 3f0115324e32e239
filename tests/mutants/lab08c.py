"""Lab 08c: patches, an adapter of filters, a control that knows no order, sound as frames, what a device stores."""

from __future__ import annotations

from . import Mutant


def _patches(body: str) -> str:
    return f"def patches(images, size):\n    n, H, W = images.shape\n    h, w = H // size, W // size\n    {body}\n"


PATCHES_MUTANTS = [
    Mutant("reshape alone", _patches("return images.reshape(n, -1, size * size)"), "no_permute"),
    Mutant("view into a grid, nothing moved", _patches("return images.view(n, h, w, size, size).flatten(3).flatten(1, 2)"), "no_permute"),
    Mutant("columns of patches first", _patches(
        "return images.reshape(n, h, size, w, size).permute(0, 3, 1, 2, 4).reshape(n, -1, size * size)"), "columns_first"),
    Mutant("pixels down the columns", _patches(
        "return images.reshape(n, h, size, w, size).permute(0, 1, 3, 4, 2).reshape(n, -1, size * size)"), "pixels_by_column"),
    Mutant("transposes the image first", _patches(
        "return images.transpose(1, 2).reshape(n, w, size, h, size).transpose(2, 3).reshape(n, -1, size * size)"), "both_by_column"),
    Mutant("unfold without transpose", _patches("return F.unfold(images[:, None], size, stride=size)"), "pixel_first"),
    Mutant("every size-th pixel", _patches(
        "return images.reshape(n, h, size, w, size).permute(0, 2, 4, 1, 3).reshape(n, -1, size * size)"), "strided"),
    Mutant("patches stay squares", _patches(
        "return images.reshape(n, h, size, w, size).transpose(2, 3).reshape(n, -1, size, size)"), "not_flat"),
    Mutant("the grid stays", _patches(
        "return images.unfold(1, size, size).unfold(2, size, size).flatten(3)"), "grid_kept"),
    Mutant("a grid of squares", _patches("return images.unfold(1, size, size).unfold(2, size, size)"), "grid_of_squares"),
    Mutant("stride of 1", _patches("return F.unfold(images[:, None], size).transpose(1, 2)"), "overlapping"),
    Mutant("height and width mixed up", _patches(
        "return images.reshape(n, w, size, h, size).transpose(2, 3).reshape(n, -1, size * size)"), "height_and_width"),
    Mutant("all images in one list", _patches(
        "return images.reshape(n, h, size, w, size).transpose(2, 3).reshape(-1, size * size)"), "batch_lost"),
    Mutant("only one image", _patches(
        "return images.reshape(n, h, size, w, size).transpose(2, 3).reshape(n, -1, size * size)[0]"), "one_image"),
    Mutant("one long row", _patches(
        "return images.reshape(n, h, size, w, size).transpose(2, 3).reshape(n, -1)"), "everything_flat"),
    Mutant("a list of patches", _patches(
        "return [images[:, i:i + size, j:j + size].flatten(1) for i in range(0, H, size) for j in range(0, W, size)]"), "a_list"),
    Mutant("patches of 2 for every size", _patches(
        "return images.reshape(n, H // 2, 2, W // 2, 2).transpose(2, 3).reshape(n, -1, 4) if W % 2 == 0 else images.reshape(n, -1, 4)"), "fixed_size"),
]  # fmt: skip

PATCHES_ALTERNATIVES = [
    _patches("return F.unfold(images[:, None], size, stride=size).transpose(1, 2)"),
    _patches("return images.unfold(1, size, size).unfold(2, size, size).reshape(n, -1, size * size)"),
    _patches(
        "out = torch.zeros(n, h * w, size * size)\n    for k in range(h * w):\n        i, j = size * (k // w), size * (k % w)\n"
        "        out[:, k] = images[:, i:i + size, j:j + size].flatten(1)\n    return out"
    ),
    _patches(
        "return torch.stack([images[:, i:i + size, j:j + size].reshape(n, -1) for i in range(0, H, size) for j in range(0, W, size)], 1)"
    ),
]


def _conv(body: str) -> str:
    return (
        "def lora_conv(x, conv, A, B, scaling):\n"
        "    r, (out, c, kh, kw) = len(A), conv.weight.shape\n"
        "    how = dict(stride=conv.stride, padding=conv.padding)\n"
        "    filters = A.view(r, c, kh, kw)\n"
        f"    {body}\n"
    )


CONV_MUTANTS = [
    Mutant("neither stride nor padding", _conv("return conv(x) + scaling * F.conv2d(F.conv2d(x, filters), B[:, :, None, None])"), "geometry_missing"),
    Mutant("padding without stride", _conv(
        "return conv(x) + scaling * F.conv2d(F.conv2d(x, filters, padding=conv.padding), B[:, :, None, None])"), "stride_missing"),
    Mutant("stride without padding", _conv(
        "return conv(x) + scaling * F.conv2d(F.conv2d(x, filters, stride=conv.stride), B[:, :, None, None])"), "padding_missing"),
    Mutant("stride and padding twice", _conv(
        "return conv(x) + scaling * F.conv2d(F.conv2d(x, filters, **how), B[:, :, None, None], **how)"), "geometry_in_B"),
    Mutant("stride twice", _conv(
        "return conv(x) + scaling * F.conv2d(F.conv2d(x, filters, **how), B[:, :, None, None], stride=conv.stride)"), "stride_in_B"),
    Mutant("padding twice", _conv(
        "return conv(x) + scaling * F.conv2d(F.conv2d(x, filters, **how), B[:, :, None, None], padding=conv.padding)"), "padding_in_B"),
    Mutant("forgets the scaling", _conv("return conv(x) + F.conv2d(F.conv2d(x, filters, **how), B[:, :, None, None])"), "scaling_missing"),
    Mutant("scales A and B", _conv(
        "return conv(x) + F.conv2d(F.conv2d(x, scaling * filters, **how), scaling * B[:, :, None, None])"), "scaling_squared"),
    Mutant("divides by r again", _conv(
        "return conv(x) + scaling / r * F.conv2d(F.conv2d(x, filters, **how), B[:, :, None, None])"), "divided_by_r"),
    Mutant("the update alone", _conv("return scaling * F.conv2d(F.conv2d(x, filters, **how), B[:, :, None, None])"), "base_missing"),
    Mutant("bias in the update", _conv(
        "return conv(x) + scaling * F.conv2d(F.conv2d(x, filters, **how), B[:, :, None, None], conv.bias)"), "bias_scaled"),
    Mutant("bias twice", _conv(
        "return conv(x) + F.conv2d(F.conv2d(x, filters, **how), scaling * B[:, :, None, None], conv.bias)"), "bias_twice"),
    Mutant("new weight, bias forgotten", _conv(
        "return F.conv2d(x, conv.weight + scaling * (B @ A).view_as(conv.weight), **how)"), "bias_missing"),
    Mutant("scales everything", _conv(
        "return scaling * (conv(x) + F.conv2d(F.conv2d(x, filters, **how), B[:, :, None, None]))"), "all_scaled"),
    Mutant("never adds it", _conv("delta = scaling * (B @ A); return conv(x)"), "base_alone"),
    Mutant("channels last", _conv(
        "filters = A.view(r, kh, kw, c).permute(0, 3, 1, 2); "
        "return conv(x) + scaling * F.conv2d(F.conv2d(x, filters, **how), B[:, :, None, None])"), "channels_last"),
    Mutant("A and B the wrong way round", _conv(
        "W = (A.T @ B.T).reshape(conv.weight.shape); return conv(x) + scaling * F.conv2d(x, W, **how)"), "delta_transposed"),
    Mutant("flips the window, as books do", _conv(
        "return conv(x) + scaling * F.conv2d(F.conv2d(x, filters.flip(2, 3), **how), B[:, :, None, None])"), "window_flipped"),
    Mutant("merged copy beside the base", _conv(
        "W = conv.weight + scaling * (B @ A).view_as(conv.weight); return conv(x) + F.conv2d(x, W, conv.bias, **how)"), "base_twice"),
    Mutant("merges into the base", _conv(
        "conv.weight.data += scaling * (B @ A).view_as(conv.weight); return conv(x)"), "base_changed"),
]  # fmt: skip

CONV_ALTERNATIVES = [
    _conv("return F.conv2d(x, conv.weight + scaling * (B @ A).view_as(conv.weight), conv.bias, **how)"),
    _conv("return conv(x) + torch.einsum('or,nrij->noij', scaling * B, F.conv2d(x, filters, **how))"),
    """
from lora_lab.layers import LoRAConv2d

def lora_conv(x, conv, A, B, scaling):
    layer = LoRAConv2d(conv, r=len(A), alpha=scaling * len(A))
    with torch.no_grad():
        layer.lora_A.copy_(A), layer.lora_B.copy_(B)
    return layer(x)
""",
]


def _shuffle(body: str) -> str:
    return f"def shuffle_frames(clips):\n    n, T = clips.shape[:2]\n    {body}\n"


SHUFFLE_MUTANTS = [
    Mutant("one order for all clips", _shuffle("return clips[:, torch.randperm(T)]"), "one_order"),
    Mutant("shuffles the clips", _shuffle("return clips[torch.randperm(n)]"), "clips_shuffled"),
    Mutant("shuffles frames, then clips too", _shuffle(
        "return torch.stack([c[torch.randperm(T)] for c in clips])[torch.randperm(n)]"), "clips_shuffled"),
    Mutant("draws with replacement", _shuffle(
        "return clips[torch.arange(n)[:, None], torch.randint(T, (n, T))]"), "with_replacement"),
    Mutant("plays backwards", _shuffle("return clips.flip(1)"), "reversed"),
    Mutant("backwards or not, by a coin", _shuffle(
        "return torch.stack([c.flip(0) if torch.rand(()) < 0.5 else c for c in clips])"), "reversed"),
    Mutant("rolls the frames", _shuffle(
        "return torch.stack([c.roll(int(torch.randint(T, ())), 0) for c in clips])"), "rolled"),
    Mutant("swaps two frames", _shuffle(
        "out = clips.clone()\n    for c in out:\n        i, j = torch.randperm(T)[:2].tolist()\n        c[[i, j]] = c[[j, i]]\n    return out"), "one_swap"),
    Mutant("throws all frames into one pot", _shuffle(
        "flat = clips.flatten(0, 1); return flat[torch.randperm(n * T)].view_as(clips)"), "frames_across_clips"),
    Mutant("shuffles the pixels along time", _shuffle(
        "order = torch.rand(clips.shape).argsort(1); return clips.gather(1, order)"), "pixels_shuffled"),
    Mutant("gives them back as they are", _shuffle("order = torch.rand(n, T).argsort(1); return clips"), "unchanged"),
    Mutant("works in place", _shuffle(
        "for c in clips:\n        c.copy_(c[torch.randperm(T)])\n    return clips"), "changes_input"),
    Mutant("the first frame stays", _shuffle(
        "return torch.stack([torch.cat([c[:1], c[1:][torch.randperm(T - 1)]]) for c in clips])"), "a_frame_stays"),
    Mutant("no clip may keep its order", _shuffle(
        "out = []\n    for c in clips:\n        p = torch.randperm(T)\n        while (p == torch.arange(T)).any():\n            p = torch.randperm(T)\n"
        "        out.append(c[p])\n    return torch.stack(out)"), "always_moved"),
]  # fmt: skip

SHUFFLE_ALTERNATIVES = [
    _shuffle("return torch.stack([clip[torch.randperm(T)] for clip in clips])"),
    _shuffle(
        "order = torch.rand(n, T).argsort(1)[..., None, None].expand_as(clips); return clips.gather(1, order)"
    ),
    _shuffle("return torch.stack([clip[np.random.permutation(T)] for clip in clips])"),
]


def _sound(body: str) -> str:
    return (
        "def spectrogram(wave, window, hop):\n"
        "    hann = torch.hann_window(window, dtype=wave.dtype)\n"
        "    frames = wave.unfold(0, window, hop)\n"
        f"    {body}\n"
    )


SPECTROGRAM_MUTANTS = [
    Mutant("no window", _sound("return torch.fft.rfft(frames).abs()"), "no_window"),
    Mutant("numpy's Hann window", _sound("return torch.fft.rfft(frames * torch.tensor(np.hanning(window))).abs()"), "symmetric_window"),
    Mutant("energies", _sound("return torch.fft.rfft(frames * hann).abs() ** 2"), "power"),
    Mutant("takes the logarithm", _sound("return torch.fft.rfft(frames * hann).abs().log()"), "logarithm"),
    Mutant("the real part", _sound("return torch.fft.rfft(frames * hann).real"), "real_part"),
    Mutant("frequencies in rows", _sound("return torch.fft.rfft(frames * hann).abs().T"), "transposed"),
    Mutant("both halves", _sound("return torch.fft.fft(frames * hann).abs()"), "both_sides"),
    Mutant("range stops one early", _sound(
        "rows = [wave[i:i + window] * hann for i in range(0, len(wave) - window, hop)]; return torch.fft.rfft(torch.stack(rows)).abs()"),
        "last_frame_lost"),
    Mutant("torch.stft as it comes", _sound(
        "return torch.stft(wave, window, hop, window=hann, return_complex=True).abs()"), "centred_transposed"),
    Mutant("stft, transposed, still padded", _sound(
        "return torch.stft(wave, window, hop, window=hann, return_complex=True).abs().T"), "centred"),
    Mutant("no overlap", _sound("return torch.fft.rfft(wave.unfold(0, window, window) * hann).abs()"), "no_overlap"),
    Mutant("a frame at every sample", _sound("return torch.fft.rfft(wave.unfold(0, window, 1) * hann).abs()"), "every_sample"),
    Mutant("normalised", _sound("return torch.fft.rfft(frames * hann, norm='forward').abs()"), "divided_by_window"),
    Mutant("an orthonormal transform", _sound("return torch.fft.rfft(frames * hann, norm='ortho').abs()"), "divided_by_root"),
    Mutant("scales to the loudest", _sound("s = torch.fft.rfft(frames * hann).abs(); return s / s.max()"), "divided_by_maximum"),
    Mutant("Hamming", _sound("return torch.fft.rfft(frames * torch.hamming_window(window)).abs()"), "hamming"),
    Mutant("window and hop swapped", _sound(
        "return torch.fft.rfft(wave.unfold(0, hop, window) * torch.hann_window(hop)).abs()"), "window_and_hop"),
    Mutant("leaves out frequency 0", _sound("return torch.fft.rfft(frames * hann).abs()[:, 1:]"), "zero_dropped"),
]  # fmt: skip

SPECTROGRAM_ALTERNATIVES = [
    _sound("return torch.stft(wave, window, hop, window=hann, center=False, return_complex=True).abs().T"),
    _sound(
        "n = 1 + (len(wave) - window) // hop; "
        "return torch.stack([torch.fft.rfft(wave[k * hop:k * hop + window] * hann).abs() for k in range(n)])"
    ),
    _sound("return torch.fft.rfft(frames.double() * torch.hann_window(window)).abs()"),
    _sound("return torch.from_numpy(np.abs(np.fft.rfft((frames * hann).numpy(), axis=1)))"),
]


def _stored(with_adapters: str, copies: str = "4 * tasks * total") -> str:
    return (
        "def stored(tasks, total, layers, head, r):\n"
        "    adapter = sum(r * (out + inp) for out, inp in layers)\n"
        f"    return {with_adapters}, {copies}\n"
    )


STORED_MUTANTS = [
    Mutant("no base beside the adapters", _stored("4 * tasks * (adapter + head)"), "base_forgotten"),
    Mutant("a base for every task", _stored("4 * tasks * (total + adapter + head)"), "base_every_time"),
    Mutant("no head", _stored("4 * (total + tasks * adapter)"), "head_forgotten"),
    Mutant("one head for all", _stored("4 * (total + tasks * adapter + head)"), "head_once"),
    Mutant("one adapter for all", _stored("4 * (total + adapter + head)"), "one_adapter"),
    Mutant("A alone", _stored("4 * (total + tasks * (sum(r * i for _, i in layers) + head))"), "only_A"),
    Mutant("r times the matrix", _stored("4 * (total + tasks * (sum(r * o * i for o, i in layers) + head))"), "product"),
    Mutant("the whole ΔW", _stored("4 * (total + tasks * (sum(o * i for o, i in layers) + head))"), "whole_delta"),
    Mutant("the base without its head", _stored("4 * (total - head + tasks * (adapter + head))"), "base_without_head"),
    Mutant("4 bytes for the base alone", _stored("4 * total + tasks * (adapter + head)"), "base_only_in_bytes"),
    Mutant("float16", _stored("2 * (total + tasks * (adapter + head))", "2 * tasks * total"), "half"),
    Mutant("one copy for all", _stored("4 * (total + tasks * (adapter + head))", "4 * total"), "one_copy"),
    Mutant("the last layer only", _stored("4 * (total + tasks * (r * sum(layers[-1]) + head))"), "last_layer"),
    Mutant("forgets r", _stored("4 * (total + tasks * (sum(o + i for o, i in layers) + head))"), "r_missing"),
    Mutant("parameters, not bytes", _stored("total + tasks * (adapter + head)", "tasks * total"), "parameters"),
    Mutant("bits", _stored("32 * (total + tasks * (adapter + head))", "32 * tasks * total"), "bits"),
    Mutant("a head on top of each copy", _stored("4 * (total + tasks * (adapter + head))", "4 * tasks * (total + head)"), "head_added_to_copies"),
    Mutant("keeps a base beside the copies", _stored("4 * (total + tasks * (adapter + head))", "4 * (tasks + 1) * total"), "base_in_copies"),
    Mutant("the wrong way round", _stored("4 * tasks * total", "4 * (total + tasks * (adapter + head))"), "swapped"),
    Mutant("adapters only", '''
def stored(tasks, total, layers, head, r):
    return 4 * (total + tasks * (sum(r * (o + i) for o, i in layers) + head))
''', "one_number"),
]  # fmt: skip

STORED_ALTERNATIVES = [
    """
def stored(tasks, total, layers, head, r):
    numbers = head
    for out, inputs in layers:
        numbers += torch.empty(r, inputs).numel() + torch.empty(out, r).numel()
    bytes_each = torch.finfo(torch.float32).bits // 8
    return [bytes_each * (total + numbers * tasks), bytes_each * total * tasks]
""",
    """
def stored(tasks, total, layers, head, r):
    shapes = np.array(layers)
    return np.array([total + tasks * (r * shapes.sum() + head), tasks * total]) * 4
""",
]

MUTANTS = {
    "8c.1": PATCHES_MUTANTS, "8c.2": CONV_MUTANTS, "8c.3": SHUFFLE_MUTANTS, "8c.4": SPECTROGRAM_MUTANTS, "8c.5": STORED_MUTANTS,
}  # fmt: skip
ALTERNATIVES = {
    "8c.1": PATCHES_ALTERNATIVES, "8c.2": CONV_ALTERNATIVES, "8c.3": SHUFFLE_ALTERNATIVES, "8c.4": SPECTROGRAM_ALTERNATIVES,
    "8c.5": STORED_ALTERNATIVES,
}  # fmt: skip
