"""Nine spoken syllables, several voices, and a small network that hears which syllable it was.

    task = sounds_task("a child")        for `lora_lab.comparing.finetune_and_compare`

Data card. Nothing is recorded: each clip is computed, by the source-filter model of speech. A vowel is a train of pulses at the pitch of the
voice through three resonators, whose frequencies are a man's averages for the vowel (rounded from Peterson and Barney, 1952) times a
factor for the length of the vocal tract; m is a hum, s hiss, t a click after silence. Pitch, vocal tract, pace, loudness, place in
the clip and noise vary from clip to clip. 8,000 samples a second, 4,400 a clip (0.55 s). It sounds like a machine, and it is cleaner than any real speech:
accuracies here say nothing about a real recogniser. The base has heard men in quiet, and nobody else.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..comparing import Task
from ..data import Batches
from ..train import evaluate, linear_schedule, train

RATE, LENGTH = 8000, 4400  # samples a second, samples a clip
WINDOW, HOP, BANDS = 256, 128, 24
SYLLABLES = tuple(consonant + vowel for consonant in "mst" for vowel in "aiu")
FORMANTS = {"a": (730, 1090, 2440), "i": (270, 2290, 3010), "u": (300, 870, 2240)}  # Hz
TOP = 3700  # Hz: a resonance above could not be heard at 8,000 samples a second


@dataclass(frozen=True)
class Voice:
    """Ranges from which each clip draws: pitch in Hz, the vocal tract's factor on all formants, pace (2: twice as fast); noise: its amplitude."""

    pitch: tuple[float, float]
    tract: tuple[float, float]
    pace: tuple[float, float] = (0.9, 1.1)
    noise: float = 0.01


VOICES = {
    "men": Voice((90, 150), (0.92, 1.05)),
    "a child": Voice((280, 320), (1.42, 1.48)),
    "a giant": Voice((55, 65), (0.72, 0.76)),
    "in a hurry": Voice((90, 150), (0.92, 1.05), pace=(2.2, 2.6)),
    "a noisy street": Voice((90, 150), (0.92, 1.05), noise=0.1),
}


def say(syllable: str, voice: Voice, rng: np.random.Generator) -> np.ndarray:
    """One clip, (4400,) between about -1 and 1: the syllable somewhere in it, and noise."""
    pitch, tract, pace = (rng.uniform(*span) for span in (voice.pitch, voice.tract, voice.pace))
    consonant, vowel = syllable
    sound = np.concatenate([_consonant(consonant, pitch, tract, int(0.1 * RATE / pace), rng), _vowel(vowel, pitch, tract, int(0.28 * RATE / pace), rng)])
    clip = voice.noise * rng.normal(size=LENGTH)
    at = rng.integers(0, LENGTH - len(sound) + 1)
    clip[at : at + len(sound)] += rng.uniform(0.5, 1.0) * sound
    return clip.astype(np.float32)


def _pulses(pitch: np.ndarray) -> np.ndarray:
    """One pulse each time the phase of the vocal folds comes round."""
    return np.diff(np.floor(np.cumsum(pitch / RATE)), prepend=0.0)


def _resonate(x: np.ndarray, frequency: float, width: float) -> np.ndarray:
    """A two-pole resonator; frequency and width in Hz."""
    from scipy.signal import lfilter  # comes with scikit-learn

    radius, angle = math.exp(-math.pi * width / RATE), 2 * math.pi * frequency / RATE
    return lfilter([1.0], [1.0, -2 * radius * math.cos(angle), radius**2], x)


def _loud(x: np.ndarray, level: float) -> np.ndarray:
    return level * x / (np.abs(x).max() + 1e-9)


def _vowel(vowel: str, pitch: float, tract: float, n: int, rng) -> np.ndarray:
    time = np.arange(n)
    melody = pitch * np.linspace(1.08, 0.9, n) * (1 + 0.015 * np.sin(2 * np.pi * 5 * time / RATE + rng.uniform(0, 6)))
    x = _pulses(melody) + 0.01 * rng.normal(size=n)  # some breath
    x = x * np.minimum(1, np.minimum(time / (0.02 * RATE), (n - time) / (0.06 * RATE)))
    for formant, width in zip(FORMANTS[vowel], (80, 110, 160), strict=True):
        x = _resonate(x, min(formant * tract * math.exp(0.03 * rng.normal()), TOP), width)
    return _loud(x, 1.0)


def _consonant(consonant: str, pitch: float, tract: float, n: int, rng) -> np.ndarray:
    if consonant == "m":
        return _loud(_resonate(_resonate(_pulses(np.full(n, pitch)), 270 * tract, 60), min(2200 * tract, TOP), 200), 0.35)
    if consonant == "s":
        return _loud(_resonate(rng.normal(size=n), min(3300 * tract, TOP), 500) * np.hanning(n) ** 0.5, 0.35)
    click = np.zeros(n)
    burst = int(0.015 * RATE)
    click[-burst:] = rng.normal(size=burst) * np.exp(-np.arange(burst) / (burst / 3))
    return _loud(_resonate(click, min(2600 * tract, TOP), 900), 0.5)


def recordings(voice: str, each: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`each` clips of every syllable: waves (9 each, 4400) and which syllable, numbers into SYLLABLES. Raises ValueError for another voice."""
    if voice not in VOICES:
        raise ValueError(f"a voice is one of {', '.join(VOICES)}; found {voice!r}")
    rng = np.random.default_rng((seed, list(VOICES).index(voice), each))
    labels = np.repeat(np.arange(len(SYLLABLES)), each)
    return np.stack([say(SYLLABLES[k], VOICES[voice], rng) for k in labels]), labels


@cache
def _filters() -> Tensor:
    """(24, 129): triangles, evenly spaced on the mel scale, m = 2595 log10(1 + f / 700), as an ear would have them."""
    corners = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + RATE / 2 / 700), BANDS + 2) / 2595) - 1) * WINDOW / RATE
    bins = np.arange(WINDOW // 2 + 1)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    return torch.tensor(np.maximum(0, np.minimum(rising, falling)), dtype=torch.float32)


def log_mel(waves) -> Tensor:
    """What the network is shown: waves (n, samples) -> (n, frames, 24), a quarter of the natural logarithm of the energy in each band.

    A frame is 256 samples under a Hann window, 32 ms; the next one begins 128 samples later: 1 + (samples - 256) // 128 frames.
    """
    waves = torch.as_tensor(waves, dtype=torch.float32)
    spectrum = torch.stft(waves, WINDOW, HOP, window=torch.hann_window(WINDOW), center=False, return_complex=True)
    return 0.25 * (_filters() @ spectrum.abs() ** 2 + 1e-4).log().transpose(-1, -2)


class KeywordNet(nn.Module):
    """Three convolutions over time and frequency, the loudest moment of each feature, one hidden layer, a head. x (n, frames, 24)"""

    def __init__(self, classes: int = len(SYLLABLES), width: int = 12):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, stride=(2, 1), padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.body = nn.Linear(2 * width * BANDS // 4, 48)
        self.head = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, None]
        for conv in (self.conv1, self.conv2, self.conv3):
            h = F.relu(conv(h))
        return self.head(F.relu(self.body(h.amax(2).flatten(1))))


@cache
def sounds_data(voice: str, seed: int, part: str = "test") -> tuple[Tensor, Tensor]:
    """(log-mel spectrograms, syllables) of "train" (10 clips of each syllable), "validation" (5) or "test" (30); parts share no clip."""
    each, offset = {"train": (10, 0), "validation": (5, 1), "test": (30, 2)}[part]
    waves, labels = recordings(voice, each, 3 * seed + offset)
    return log_mel(waves), torch.from_numpy(labels)


@cache
def _pretrained(seed: int, steps: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KeywordNet()
        waves, labels = recordings("men", 60, 3_000_000 + seed)  # far from every seed of sounds_data
        batches = Batches(log_mel(waves), torch.from_numpy(labels), batch_size=64, seed=seed)
        for _ in train(model, batches, steps, linear_schedule(6e-3, steps, warmup=20), device="cpu"):
            pass
    return model


def sounds_base(seed: int = 0, quick: bool = False) -> nn.Module:
    """A copy of the network that has heard men in quiet."""
    return copy.deepcopy(_pretrained(seed, 100 if quick else 200))


def sounds_task(voice: str = "a child", quick: bool = False, targets=("conv1", "conv2", "conv3", "body")) -> Task:
    """A voice as a task: 90 clips to learn from. quick: shorter runs and one learning rate."""
    rates = {"linear probe": (0.03, 0.01), "LoRA": (0.01, 0.03), "full fine-tuning": (0.003, 0.001)}
    return Task(
        name=f"nine syllables: {voice}",
        base=lambda seed: sounds_base(seed, quick),
        train=lambda seed: Batches(*sounds_data(voice, seed, "train"), batch_size=32, seed=seed),
        metric=lambda model, seed: {"accuracy": evaluate(model, [sounds_data(voice, seed)], "cpu")},
        validate=None if quick else lambda model, seed: evaluate(model, [sounds_data(voice, seed, "validation")], "cpu"),
        targets=targets,
        head=("head",),
        lr={way: rate[0] if quick else rate for way, rate in rates.items()},
        steps=60 if quick else 100,
    )
