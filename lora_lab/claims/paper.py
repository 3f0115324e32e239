"""Figures that the paper prints (Hu et al. 2021, arXiv 2106.09685v2), beside what its own formulas give."""

from __future__ import annotations

import torch

from ..counting import lora_parameters
from ..presets import preset
from .bench import SEEDS
from .court import Finding


def _lora(name: str, r: int, matrices: int = 2) -> int:
    a = preset(name)
    return a.layers * matrices * lora_parameters(a.d_model, a.d_model, r)


def phi(otherwise: bool) -> Finding:
    """Appendix G's expression for the similarity of two subspaces of p dimensions, less the definition's. Otherwise: p = 1."""
    p = 1 if otherwise else 4
    apart = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        U, V = (torch.linalg.qr(torch.randn(32, p, dtype=torch.float64)).Q for _ in range(2))
        cosines = torch.linalg.svdvals(U.T @ V)
        similarity = cosines.square().sum() / p
        distance = p - cosines.square().sum()  # d², of the projection metric
        apart.append(abs(float((1 - distance) / p - similarity)))
    return Finding({f"p = {p}": apart}, 1e-9, "below", "distance of the printed formula from the definition")


def table3(otherwise: bool) -> Finding:
    """How far LoRA's parameter counts in table 3 are from its own formula. Otherwise: those of the top two blocks, in the same table."""
    if otherwise:
        blocks = 2 * (12 * 1024**2 + 13 * 1024)
        return Finding({"top two blocks, 25.19M": [abs(25.19e6 / blocks - 1)]}, 0.01, "below", "distance from the formula, relative")
    measured = {"medium, 0.35M": [abs(0.35e6 / _lora("gpt2-medium", 4) - 1)], "large, 0.77M": [abs(0.77e6 / _lora("gpt2-large", 4) - 1)]}
    return Finding(measured, 0.01, "below", "distance from the formula, relative")


def appendix_d(otherwise: bool) -> Finding:
    """37.7M against the formula with r = 2 on four matrices, as appendix D.4 has it. Otherwise: r = 4, as table 15 has it."""
    r = 4 if otherwise else 2
    return Finding({f"r = {r} on q, k, v, o": [abs(_lora("gpt3-175b", r, 4) / 37.7e6 - 1)]}, 0.01, "below", "distance from 37.7M, relative")


def ten_thousand(otherwise: bool) -> Finding:
    """How many times fewer numbers train, relative to 10,000. Otherwise: only r = 4 on q and v is meant."""
    total = 175_255.8e6  # as the paper prints it
    measured = {"18.9M (r = 4)": [total / _lora("gpt3-175b", 4) / 1e4], "4.7M (r = 1)": [total / _lora("gpt3-175b", 1) / 1e4]}
    if otherwise:
        measured.pop("4.7M (r = 1)")
    return Finding(measured, 1.1, "below", "times fewer, relative to 10,000")


def speedup(otherwise: bool) -> Finding:
    """What 32.5 → 43.1 tokens a second and GPU is, in per cent, and how far that is from 25. Otherwise: only time is meant."""
    measured = {"more tokens a second": [abs(100 * (43.1 / 32.5 - 1) - 25)], "less time for a token": [abs(100 * (1 - 32.5 / 43.1) - 25)]}
    if otherwise:
        measured.pop("more tokens a second")
    return Finding(measured, 1.0, "below", "distance from 25 %, points")


def hundredth(otherwise: bool) -> Finding:
    """The share of GPT-3 that trains at r = 4 on q and v, in per cent. Otherwise: at r = 64."""
    r = 64 if otherwise else 4
    return Finding({f"r = {r} on q and v": [100 * _lora("gpt3-175b", r) / 175_255.8e6]}, 0.015, "below", "share of GPT-3 that trains, %")
