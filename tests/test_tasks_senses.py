"""Images, clips and sounds of lab 08c: the data are what their cards say, the nets what their docstrings say, the figures what their calls say."""

import base64
import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lora_lab.comparing import FROZEN, FULL, LORA, PROBE, finetune_and_compare
from lora_lab.data import digits
from lora_lab.tasks import images, sounds, videos
from lora_lab.view import plot_spectrograms, show_clips


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# ---- images ------------------------------------------------------------------------------------------------------------------------------


def test_patches_are_squares_row_by_row_and_paste_puts_them_back():
    x = torch.randn(3, 64)
    found, picture = images.cut(x).numpy(), x.view(3, 8, 8).numpy()
    for k in range(16):
        row, column = 2 * (k // 4), 2 * (k % 4)
        np.testing.assert_array_equal(found[:, k], picture[:, row : row + 2, column : column + 2].reshape(3, 4))
    assert torch.equal(images.paste(images.cut(x)), x)


def test_attention_is_that_of_torch():
    block, x = images.Attention(32).double(), torch.randn(2, 16, 32, dtype=torch.float64)
    oracle = nn.MultiheadAttention(32, 4, batch_first=True).double()
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat([block.q.weight, block.k.weight, block.v.weight]))
        oracle.in_proj_bias.copy_(torch.cat([block.q.bias, block.k.bias, block.v.bias]))
        oracle.out_proj.weight.copy_(block.out.weight)
        oracle.out_proj.bias.copy_(block.out.bias)
        h = block.norm1(x)
        mixed, weights = oracle(h, h, h)
        after = x + mixed
        after = after + block.down(torch.nn.functional.gelu(block.up(block.norm2(after))))
        # float64: sums of 32 products, rounding about 1e-15
        torch.testing.assert_close(block.weights(x).mean(1), weights, rtol=0, atol=1e-12)
        torch.testing.assert_close(block(x), after, rtol=0, atol=1e-12)


def test_the_transformer_knows_places_from_its_table_alone():
    net, x = images.VisionTransformer(10).double(), torch.randn(4, 64, dtype=torch.float64)
    moved = images.paste(images.cut(x)[:, torch.randperm(16)])
    with torch.no_grad():
        assert (net(moved) - net(x)).abs().max() > 1e-4
        net.position.zero_()
        torch.testing.assert_close(net(moved), net(x), rtol=0, atol=1e-12)  # rounding alone


def _rows(patches):
    """Each image's patches, sorted: what stays when they are laid out anew."""
    return [sorted(map(tuple, image)) for image in patches.tolist()]


def test_a_jigsaw_has_one_order_and_dealing_anew_has_many():
    plain, one, many = digits(seed=1).test[0], images.changed("jigsaw", 1).test[0], images.changed("dealt anew", 1).test[0]
    before, jigsaw, dealt = (images.cut(x) for x in (plain, one, many))
    assert _rows(jigsaw) == _rows(before) == _rows(dealt)
    order = [int((jigsaw[:, k] == before[:, j]).all(1).all()) * 100 + j for k in range(16) for j in range(16) if (jigsaw[:, k] == before[:, j]).all()]
    assert sorted(o - 100 for o in order) == list(range(16))
    fitting = (dealt[:, :, None] == before[:, None]).all(3)  # image, place, patch
    assert not fitting.all(0).any(), "no patch has the same place in every image"
    assert not torch.equal(jigsaw, before)


def test_changes_are_what_their_names_say():
    upright, turned = digits(seed=2).test, images.changed("quarter turn", 2).test
    np.testing.assert_array_equal(turned[0][5].view(8, 8).numpy(), np.rot90(upright[0][5].view(8, 8).numpy()))
    noise = images.changed("noise", 2).train[0] - digits(seed=2).train[0]
    assert abs(float(noise.std()) - 0.4) < 0.01  # 69,000 draws: the standard error is 0.001
    new = images.changed("new digits", 2)
    assert set(new.train[1].tolist()) == set(range(5))
    assert len(new.test[1]) == sum(int((upright[1] == d).sum()) for d in range(5, 10))
    with pytest.raises(ValueError, match="a change is one of"):
        images.changed("upside down", 0)
    with pytest.raises(ValueError, match="a net is one of"):
        images.images_base("perceptron")


# ---- clips -------------------------------------------------------------------------------------------------------------------------------


def test_a_clip_moves_round_the_field_by_its_speed():
    shown = videos.clips(digits(seed=0).test, 40, seed=3, speeds=(2,))
    steps = {0: (0, 2), 1: (0, -2), 2: (2, 0), 3: (-2, 0)}
    assert list(videos.WAYS) == ["right", "left", "down", "up"]
    for frames, way in zip(shown.frames.numpy(), shown.way.tolist(), strict=True):
        for now, later in zip(frames, frames[1:], strict=False):
            np.testing.assert_array_equal(later, np.roll(now, steps[way], axis=(0, 1)))
    assert len(set(shown.way.tolist())) == 4


def test_eleven_forward_is_one_backward():
    part = digits(seed=0).test
    slow, fast = (videos.clips(part, 30, seed=4, speeds=(s,)).frames.numpy() for s in (1, 11))
    way = videos.clips(part, 30, seed=4, speeds=(1,)).way.tolist()
    back = {0: (0, -1), 1: (0, 1), 2: (-1, 0), 3: (1, 0)}
    for a, b, w in zip(slow, fast, way, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(b[1], np.roll(a[0], back[w], axis=(0, 1)))


def test_parts_of_clips_share_no_digit_and_answers_fit_the_question():
    way, which = videos.videos_data("which way", 0), videos.videos_data("which digit", 0, "train")
    assert way[0].shape == (400, 5, 12, 12) and set(way[1].tolist()) == set(range(4))
    assert set(which[1].tolist()) == set(range(5))

    def inks(frames):
        return {tuple(sorted(frame[frame > 0].tolist())) for frame in frames[:, 0]}

    assert not inks(videos.videos_data("which digit", 0)[0]) & inks(which[0])
    with pytest.raises(ValueError, match="a question is one of"):
        videos.videos_base("how fast")


def test_the_clip_net_does_not_know_where_a_digit_is():
    net, x = videos.ClipNet(4).double(), torch.rand(3, 5, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        # Its stride is 2, so it is exact for even shifts; the sums run in another order, so not to the bit.
        torch.testing.assert_close(net(x.roll((4, 2), (2, 3))), net(x), rtol=0, atol=1e-12)
        assert (net(x.flip(1)) - net(x)).abs().max() > 1e-5


# ---- sounds ------------------------------------------------------------------------------------------------------------------------------


def test_the_pitch_is_that_of_the_voice():
    rng = np.random.default_rng(0)
    wave = sounds._vowel("a", 125.0, 1.0, 2240, rng)
    middle = wave[900:1700]
    lags = np.arange(40, 120)
    heights = [np.dot(middle[:-lag], middle[lag:]) / (len(middle) - lag) for lag in lags]
    pitch = sounds.RATE / lags[int(np.argmax(heights))]
    assert 125 * 0.88 < pitch < 125 * 1.1  # the melody falls from 1.08 to 0.9, with a tremor of 1.5 %


@pytest.mark.parametrize("tract", [1.0, 1.3])
def test_the_first_resonance_of_i_lies_where_the_table_says(tract):
    spectra = [np.abs(np.fft.rfft(sounds._vowel("i", 110.0, tract, 2240, np.random.default_rng(k)))) ** 2 for k in range(6)]
    hertz = np.fft.rfftfreq(2240, 1 / sounds.RATE)
    low = hertz < 1000
    centre = (np.mean(spectra, 0) * hertz)[low].sum() / np.mean(spectra, 0)[low].sum()
    assert abs(centre / (270 * tract) - 1) < 0.25  # harmonics are 110 Hz apart, so the peak may lie half of that beside the resonance


def test_hiss_is_high_and_hum_is_low():
    rng = np.random.default_rng(1)
    hertz = np.fft.rfftfreq(800, 1 / sounds.RATE)
    centre = {}
    for consonant in "ms":
        power = np.abs(np.fft.rfft(sounds._consonant(consonant, 120.0, 1.0, 800, rng))) ** 2
        centre[consonant] = (power * hertz).sum() / power.sum()
    assert centre["m"] < 800 < 2500 < centre["s"]


def test_log_mel_is_what_its_docstring_says():
    wave = np.random.default_rng(2).normal(size=(1, 1000)).astype(np.float32)
    found = sounds.log_mel(wave)[0].double().numpy()
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    frames = np.stack([np.abs(np.fft.rfft(wave[0, k * 128 : k * 128 + 256] * hann)) ** 2 for k in range(1 + (1000 - 256) // 128)])
    corners = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 4000 / 700), 26) / 2595) - 1) / (8000 / 256)
    bands = np.stack([np.interp(np.arange(129), corners[b : b + 3], [0, 1, 0]) for b in range(24)])
    # float32: a transform of 256 numbers keeps about 1e-6 of the energy
    np.testing.assert_allclose(found, 0.25 * np.log(frames @ bands.T + 1e-4), rtol=0, atol=1e-4)


def test_recordings_repeat_and_parts_differ():
    one, labels = sounds.recordings("a child", 2, 5)
    again, _ = sounds.recordings("a child", 2, 5)
    np.testing.assert_array_equal(one, again)
    assert one.shape == (18, 4400) and labels.tolist() == [k // 2 for k in range(18)]
    assert np.isfinite(one).all() and np.abs(one).max() < 1.5
    train, test = sounds.sounds_data("a giant", 0, "train")[0], sounds.sounds_data("a giant", 0)[0]
    assert train.shape == (90, 33, 24) and test.shape == (270, 33, 24)
    assert not {clip.numpy().tobytes() for clip in train} & {clip.numpy().tobytes() for clip in test}
    with pytest.raises(ValueError, match="a voice is one of"):
        sounds.recordings("a parrot", 1, 0)


def test_a_clip_has_room_for_the_slowest_syllable():
    slow = sounds.Voice((100, 100), (1, 1), pace=(0.8, 0.8))
    assert sounds.say("mu", slow, np.random.default_rng(0)).shape == (sounds.LENGTH,)


# ---- as tasks ----------------------------------------------------------------------------------------------------------------------------

TASKS = {
    "transformer": (images.images_task("transformer", "quarter turn", True), lambda: images.VisionTransformer(10), [(32, 32)] * 4, (10, 32)),
    "convolutions": (images.images_task("convolutions", "noise", True), lambda: images.ConvNet(10), [(16, 9), (32, 144), (32, 288)], (10, 128)),
    "clips": (videos.videos_task("which way", True), lambda: videos.ClipNet(4), [(16, 18), (16, 144), (32, 144)], (4, 32)),
    "sounds": (sounds.sounds_task("a child", True), sounds.KeywordNet, [(12, 9), (24, 108), (24, 216), (48, 144)], (9, 48)),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_in_four_ways_and_trains_what_it_says(name):
    task, net, shapes, head = TASKS[name]
    # An untrained net instead of the base: this is about what trains, and a base takes seconds
    found = finetune_and_compare(replace(task, base=lambda seed: net(), steps=2), seeds=(0,))
    trained = {row.way: row.trainable for row in found.rows}
    heads = head[0] * (head[1] + 1)
    assert trained[FROZEN.name] == 0
    assert trained[PROBE.name] == heads
    assert trained[LORA.name] == sum(4 * (out + inputs) for out, inputs in shapes) + heads
    assert trained[FULL.name] == sum(p.numel() for p in net().parameters())
    assert all(0 <= row.scores["accuracy"] <= 1 and not row.problem for row in found.rows)


def test_a_base_is_a_copy_and_the_same_each_time(monkeypatch):
    monkeypatch.setattr(sounds, "_pretrained", lambda seed, steps, made={}: made.setdefault(seed, sounds.KeywordNet()))  # noqa: B006
    first, second = sounds.sounds_base(0), sounds.sounds_base(0)
    with torch.no_grad():
        first.head.weight.zero_()
    assert second.head.weight.abs().sum() > 0 and sounds.sounds_base(0).head.weight.abs().sum() > 0


# ---- figures -----------------------------------------------------------------------------------------------------------------------------


def test_spectrograms_are_in_decibels_below_the_loudest_of_all():
    quiet, loud = np.full((5, 4), 0.1), np.full((5, 4), 10.0)
    figure = plot_spectrograms({"quiet": (torch.tensor(quiet), 0.5, 4000), "loud": (loud, 0.5, 4000)})
    drawn = [axes.images[0] for axes in figure.axes if axes.images]
    assert [round(float(image.get_array().max())) for image in drawn] == [-40, 0]
    assert drawn[0].get_extent() == [0, 0.5, 0, 4]
    with pytest.raises(ValueError, match="frames, frequencies"):
        plot_spectrograms({"wave": (np.zeros(7), 1, 1)})
    with pytest.raises(ValueError, match="single panel"):
        plot_spectrograms({"a": (loud, 1, 1), "b": (loud, 1, 1)}, said=[(0, "ma", True)])


def test_what_was_heard_stands_at_its_second():
    figure = plot_spectrograms({"": (np.ones((5, 4)), 2.0, 4000)}, said=[(0.5, "ma", True), (1.5, "ti", False)])
    texts = {text.get_text(): text.xy[0] for text in figure.axes[0].texts}
    assert texts == {"ma": 0.5, "ti ×": 1.5}


def test_clips_move_for_less_than_five_seconds(monkeypatch):
    from PIL import Image

    pages = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: pages.append(data["text/html"]))
    clips = np.zeros((2, 3, 4, 4))
    clips[0, 1, 3, 3] = clips[1, 2, 0, 0] = 1.0
    show_clips(clips, 'two "clips"', scale=5, gap=2)
    assert 'alt="two &quot;clips&quot;"' in pages[0]
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", pages[0])[1])))
    assert picture.size == ((2 * 4 + 2) * 5, 4 * 5) and picture.n_frames == 3
    assert (picture.info["loop"] + 1) * 3 * picture.info["duration"] / 1000 < 5
    picture.seek(2)
    last = np.asarray(picture.convert("L"))
    assert last[2, (4 + 2) * 5 + 2] == 255 and last[2, 2] == 0 and 100 < last[2, 4 * 5 + 2] < 156
    show_clips(clips, "once", repeats=1)
    once = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", pages[1])[1])))
    assert "loop" not in once.info  # loop=0 would be for ever
    for wrong in (np.zeros((3, 4, 4)), np.zeros((0, 3, 4, 4))):
        with pytest.raises(ValueError, match="show_clips needs clips"):
            show_clips(wrong, "x")
    with pytest.raises(ValueError, match="alt"):
        show_clips(clips, " ")
