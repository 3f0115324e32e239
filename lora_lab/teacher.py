"""A problem whose answer is known: a teacher W0 + ΔW*, so that the best loss for each rank can be drawn before any training.

A student that starts from W0 and learns a rank-r update sees the inputs x and the teacher's outputs (W0 + ΔW*) x. How far it can get is
Eckart and Young's theorem, in the norm that the inputs choose.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GEOMETRIC = tuple(2.0 ** (1 - i) for i in range(10))  # each rank more divides the floor by 4: a staircase with even steps on a log axis


class Teacher:
    """A linear layer W0 (d_out, d_in), an update ΔW* with chosen singular values, and inputs with a chosen covariance.

        y = (W0 + ΔW*) x        loss(ΔW) = mean over the inputs and the d_out outputs of (y - (W0 + ΔW) x)²
                                         = ||(ΔW - ΔW*) C^½||_F² / d_out        with C = the mean of x xᵀ over the inputs, exactly
        floor(r) = sum of σ_i² over i > r, divided by d_out                     with σ the singular values of ΔW* C^½

    spectrum   the singular values of ΔW*, largest first; at most min(d_out, d_in) of them, the others are 0
    condition  largest over smallest eigenvalue of C; 1: white inputs, and then σ is the spectrum itself
    inputs     how many; at least d_in, so that C has full rank
    seed       draws W0, the directions of ΔW* and the inputs; one seed, one problem, to the last bit

    Training on all inputs at once (`batches()`) sees exactly this loss: there is no sampling noise, so a run can touch its floor and cannot
    go below. Raises ValueError for a spectrum that is empty, too long, negative or not sorted, and for sizes that make no sense.
    """

    def __init__(
        self, spectrum: Sequence[float] = GEOMETRIC, d_in: int = 24, d_out: int = 32, *, condition: float = 1.0, inputs: int = 64, seed: int = 0
    ):
        values = torch.tensor([float(s) for s in spectrum], dtype=torch.float64)
        most = min(d_in, d_out)
        if not 1 <= len(values) <= most or not bool(values.isfinite().all() & (values >= 0).all() & (values.diff() <= 0).all()):
            raise ValueError(
                f"spectrum needs 1 to {most} numbers, finite, none negative, largest first (a {d_out} x {d_in} matrix has no more singular values); "
                f"found {tuple(spectrum)}"
            )
        if inputs < d_in:
            raise ValueError(f"{inputs} inputs can't have a covariance of full rank in {d_in} dimensions; ask for {d_in} or more")
        if not 1 <= condition < math.inf:
            raise ValueError(f"condition is largest over smallest eigenvalue, finite, 1 or more; found {condition}")
        self._call = tuple(values.tolist()), d_in, d_out, condition, inputs, seed
        draw = torch.Generator().manual_seed(seed)
        noise = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
        self.d_in, self.d_out, self.seed = d_in, d_out, seed
        self.W0 = noise(d_out, d_in) / d_in**0.5
        U, V = _orthonormal(noise(d_out, len(values))), _orthonormal(noise(d_in, len(values)))
        self.delta = (U * values) @ V.T  # ΔW*, (d_out, d_in)
        # Eigenvalues of C from high to low in equal ratios, with mean 1, so that the size of an input doesn't depend on `condition`.
        eigenvalues = torch.logspace(0, -1, d_in, base=condition, dtype=torch.float64) if condition > 1 else torch.ones(d_in, dtype=torch.float64)
        eigenvalues *= d_in / eigenvalues.sum()
        axes = _orthonormal(noise(d_in, d_in))
        self.root = (axes * eigenvalues.sqrt()) @ axes.T  # C^½, symmetric
        white = _orthonormal(noise(inputs, d_in)) * inputs**0.5  # whiteᵀ white = inputs · I, exactly: no sampling noise
        self.x = white @ self.root

    def __repr__(self) -> str:
        """A call that makes the same teacher."""
        spectrum, d_in, d_out, condition, inputs, seed = self._call
        if self._call == (GEOMETRIC, 24, 32, 1.0, 64, 0):
            return "Teacher()"
        return f"Teacher({spectrum!r}, {d_in}, {d_out}, condition={condition!r}, inputs={inputs}, seed={seed})"

    @cached_property
    def spectrum(self) -> Tensor:
        """The singular values of ΔW* C^½, largest first, min(d_out, d_in) of them: what the loss sees of ΔW*."""
        return torch.linalg.svdvals(self.delta @ self.root)

    def floor(self, r: int) -> float:
        """The least loss that any update of rank r can reach: the sum of the σ_i² with i > r, divided by d_out."""
        return float((self.spectrum[_checked_rank(r) :] ** 2).flip(0).sum() / self.d_out)  # from the small end, so that small floors keep their digits

    def best(self, r: int) -> Tensor:
        """The update of rank r that reaches the floor, (d_out, d_in): the truncated SVD of ΔW* C^½, taken back through C^-½."""
        U, S, Vh = torch.linalg.svd(self.delta @ self.root, full_matrices=False)
        r = _checked_rank(r)
        return torch.linalg.solve(self.root, ((U[:, :r] * S[:r]) @ Vh[:r]).T).T

    def excess(self, delta: Tensor) -> float:
        """The loss at the update `delta` (d_out, d_in), from the formula and without any input: ||(delta - ΔW*) C^½||_F² / d_out."""
        return float(((delta.double() - self.delta) @ self.root).square().sum() / self.d_out)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """A fresh student: one layer named "layer", weight W0, no bias. Give it an adapter with target_modules=["layer"]."""
        layer = nn.Linear(self.d_in, self.d_out, bias=False, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(self.W0)
        return nn.Sequential(OrderedDict(layer=layer))

    def batches(self, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
        """All inputs and the teacher's outputs, as the one batch that is a whole epoch: [(x (inputs, d_in), y (inputs, d_out))]."""
        return [(self.x.to(dtype), (self.x @ (self.W0 + self.delta).T).to(dtype))]

    @staticmethod
    def loss(model: nn.Module, batch) -> Tensor:
        """Mean squared error on a pair (x, y), for `train(..., loss=teacher.loss)`."""
        x, y = batch
        return F.mse_loss(model(x), y)


def _checked_rank(r: int) -> int:
    if r < 0:
        raise ValueError(f"a rank is 0 or more; found {r}")
    return r


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns that span the same space."""
    return torch.linalg.qr(columns).Q
