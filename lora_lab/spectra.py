"""What an update looks like: singular values and directions, from the factors where there are factors.

    ΔW = scaling * lora_B @ lora_A = U diag(S) Vh

    lora_B  (out, r)   lora_A  (r, in)   ΔW  (out, in)
    U  (out, k)  left singular vectors, the directions that ΔW writes to: its columns
    S  (k,)      singular values, largest first, never negative
    Vh (k, in)   right singular vectors, the directions that ΔW reads from: its rows (a paper's V is Vh transposed)

`lora_B @ lora_A` has rank at most r, so an r x r problem holds all of it; a dense SVD of the (out, in) product takes a
hundred (r = 64) to two thousand times (r = 1) as long at d = 1024. Functions that look at an update take a matrix
(out, in) or the tuple of its factors, `(lora_B, lora_A)` or `(lora_B, lora_A, scaling)`.

Everything here measures: no gradient flows, and autocast is off inside. Half precision is computed, and returned, in
float32. All arguments may have the same leading dimensions (...), a stack of updates. Numpy arrays are welcome.

Raises ValueError, everywhere: too few dimensions, shapes that don't fit, r < 1, entries that are not finite, and
directions asked for that the matrix does not have.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor


def _measures(function):
    """No gradients; and autocast would otherwise turn the matrix products of float32 spectra into bfloat16."""

    @functools.wraps(function)
    def measured(*args, **kwargs):
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return measured


@_measures
def factored_svd(lora_B: Tensor, lora_A: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of scaling * lora_B @ lora_A, without building that product.

        lora_B = Q_B R_B,  lora_A^T = Q_A R_A  (QR),  scaling * R_B R_A^T = U' diag(S) Vh'  (at most r x r)
        U = Q_B U',  Vh = Vh' Q_A^T

    lora_B (..., out, r), lora_A (..., r, in) -> U (..., out, k), S (..., k), Vh (..., k, in), k = min(r, out, in).
    U has orthonormal columns, Vh orthonormal rows, also where S is 0 (there they are arbitrary).
    Sign: the entry of each column of U that is largest in magnitude is positive; S stays >= 0 when scaling is negative.
    Errors are those of a dense SVD of the product: a few eps times the norms of scaling, lora_B and lora_A.

    >>> U, S, Vh = factored_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[8.0, 6.0]]), scaling=-0.5)
    >>> S, U.T, Vh
    (tensor([25.]), tensor([[0.6000, 0.8000]]), tensor([[-0.8000, -0.6000]]))
    """
    B, A = _matrix(lora_B, "lora_B"), _matrix(lora_A, "lora_A")
    if B.shape[-1] != A.shape[-2] or B.shape[:-2] != A.shape[:-2]:
        swapped = B.shape[-2] == A.shape[-1] and B.shape[:-2] == A.shape[:-2]
        raise ValueError(
            f"lora_B (..., out, r) and lora_A (..., r, in) must share r; found {tuple(B.shape)} and {tuple(A.shape)}. "
            + ("They look swapped: lora_B comes first" if swapped else "Are they from the same layer?")
        )
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be a finite number; found {scaling}")
    dtype = torch.promote_types(B.dtype, A.dtype)
    Q_B, R_B = torch.linalg.qr(B.to(dtype))
    Q_A, R_A = torch.linalg.qr(A.to(dtype).mT)
    core = scaling * (R_B @ R_A.mT)
    if not core.isfinite().all():
        raise ValueError(f"scaling * lora_B @ lora_A overflows {dtype}; give the factors in float64")
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    U, Vh = _with_signs(Q_B @ U, Vh @ Q_A.mT)
    return U, S, Vh


@_measures
def best_rank_r(update, r: int):
    """The matrix of rank at most r that is nearest to `update`, and how far off it is.

        M_r = sum_{i <= r} S_i u_i v_i^T      error = ||M - M_r||_F = sqrt(sum_{i > r} S_i^2)

    No matrix of rank r is nearer, in this norm or in the largest singular value (Eckart and Young 1936, Mirsky 1960).

    update  a matrix (..., out, in), or factors (lora_B, lora_A[, scaling]). What goes in comes out:
            a matrix gives (M_r, error) with M_r (..., out, in);
            factors give ((B_r, A_r), error) with B_r (..., out, k), A_r (..., k, in), k the smallest
            of r, the factors' own r, out and in; B_r @ A_r = M_r. Scaling is folded in; each carries sqrt(S).
    error   (...), in the unit of M's entries. Relative error: sqrt(1 - energy(S)[r-1]), or error / ||M||_F

    >>> best, error = best_rank_r(torch.diag(torch.tensor([3.0, 2.0, 1.0])), r=1)
    >>> best.diagonal(), round(error.item(), 4)  # what is left out: sqrt(2^2 + 1^2)
    (tensor([3., 0., 0.]), 2.2361)
    """
    r = _count(r, "r")
    U, S, Vh = _svd(update, "update")
    error = torch.linalg.vector_norm(S[..., r:], dim=-1)
    U, S, Vh = U[..., :r], S[..., :r], Vh[..., :r, :]
    if isinstance(update, tuple):
        root = S.sqrt()
        return (U * root[..., None, :], root[..., None] * Vh), error
    return (U * S[..., None, :]) @ Vh, error


@_measures
def energy(S: Tensor) -> Tensor:
    """energy(S)[i-1] = sum_{j <= i} S_j^2 / sum_j S_j^2: the share of ||M||_F^2 that the i largest directions hold.

    S (..., k) singular values, largest first -> (..., k), rising to 1. For M = 0 it is 1: nothing is missing.
    For a matrix of independent noise it rises without a knee; there is no universal threshold.

    >>> energy(torch.tensor([3.0, 1.0, 0.0]))
    tensor([0.9000, 1.0000, 1.0000])
    """
    S = _spectrum(S)
    if (S[..., 1:] > S[..., :-1]).any():
        raise ValueError("energy needs the singular values largest first, as svd returns them; found another order")
    held = S.square().cumsum(-1)
    return torch.where(held[..., -1:] > 0, held / held[..., -1:], torch.ones_like(held))


@_measures
def effective_rank(S: Tensor) -> Tensor:
    """exp(-sum_i p_i log p_i) with p_i = S_i / sum_j S_j: in how many directions the singular values are spread.

    Roy and Vetterli 2007 ("The effective rank: a measure of effective dimensionality"). S (..., k), any order -> (...).
    Between 1 (one direction) and the rank (all equal); 0 for M = 0. Not the stable rank: p_i is not squared here, so
    small singular values weigh more. For a square matrix of independent Gaussian noise, d x d: 0.805 d for large d.

    >>> effective_rank(torch.tensor([1.0, 1.0, 1.0, 0.0])).round(decimals=4)
    tensor(3.)
    """
    S = _spectrum(S)
    p = S / S.sum(-1, keepdim=True).clamp_min(1)  # the largest entry is 1 unless all are 0
    return torch.where(S.amax(-1) > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


@_measures
def stable_rank(S: Tensor) -> Tensor:
    """||M||_F^2 / ||M||_2^2 = sum_i S_i^2 / max_i S_i^2. S (..., k), in any order -> (...).

    Between 1 and the rank; 0 for M = 0. A small change of M changes it little, whereas the rank jumps.
    For independent Gaussian noise (out, in): out * in / (sqrt(out) + sqrt(in))^2 for large sizes, d / 4 if square.

    >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))
    tensor(1.5000)
    """
    return _spectrum(S).square().sum(-1)


@_measures
def subspace_similarity(A, B, i: int, j: int) -> Tensor:
    """How much of the top-i subspace of A lies in the top-j subspace of B, for every pair up to (i, j).

        phi(A, B, i, j) = ||V_A[:, :i]^T V_B[:, :j]||_F^2 / min(i, j)      in [0, 1]

    Hu et al. 2021, section 7.2, equation 4 (figures 3 and 4). 1: the smaller subspace lies in the larger. 0: orthogonal

    A, B    matrices (..., m, d) and (..., n, d), or factors (lora_B, lora_A[, scaling]) of such; the last dimension
            agrees. Compared are RIGHT singular vectors, rows of Vh, in R^d: for a lora_A (r, in) or a ΔW (out, in), the
            inputs that it reads. For left ones (the outputs) transpose: A.mT, or (lora_A.mT, lora_B.mT).
    returns (..., i, j); entry [a - 1, b - 1] is phi(A, B, a, b), so the last entry is phi(A, B, i, j)

    Expected for two independent random subspaces: max(i, j) / d, not 0. So d = 512, i = 8, j = 64 gives 0.125 from
    nothing. Two lora_A that one seed drew share rows before any training, and phi = 1: compare independent seeds, show
    phi at init beside it, and prefer the factors of ΔW to lora_A alone, whose singular values say nothing about lora_B.
    Where neighbouring singular values (nearly) agree, which of their vectors comes first is an accident: read phi only
    at cuts between distinct values.

    Appendix G of the paper says "left" and prints phi = (1 - d^2) / p for p = min(i, j) and the projection distance
    d = sqrt(p - sum sigma^2); from these it must be 1 - d^2 / p.

    >>> A, B = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    >>> subspace_similarity(A, B, 2, 2)  # A's second direction is B's first
    tensor([[0.0000, 0.0000],
            [1.0000, 0.5000]])
    """
    i, j = _count(i, "i"), _count(j, "j")
    V_A, V_B = _top(A, i, "A")[2], _top(B, j, "B")[2]  # (..., i, d), (..., j, d)
    if V_A.shape[-1] != V_B.shape[-1] or V_A.shape[:-2] != V_B.shape[:-2]:
        raise ValueError(
            "A and B must agree in all but the last-but-one dimension, since vectors of R^d are compared; found d = "
            f"{V_A.shape[-1]} and {V_B.shape[-1]}, leading {tuple(V_A.shape[:-2])} and {tuple(V_B.shape[:-2])}"
        )
    dtype = torch.promote_types(V_A.dtype, V_B.dtype)
    cosines = V_A.to(dtype) @ V_B.to(dtype).mT  # (..., i, j)
    rows, columns = torch.arange(1, i + 1, device=V_A.device), torch.arange(1, j + 1, device=V_A.device)
    return cosines.square().cumsum(-2).cumsum(-1) / torch.minimum(rows[:, None], columns)


@_measures
def amplification(W: Tensor, update, r: int) -> Tensor:
    """||ΔW||_F / ||U^T W V||_F, with U (out, r) and V (in, r) the top r singular vectors of ΔW.

    How much larger the update is than what W already had in the update's own directions (Hu et al. 2021, section 7.3,
    table 7, with U^T W V^T for a V of shape (r, in)). A ratio >= 0 without unit; inf where W has nothing in these
    directions.

    W       (..., out, in), the pretrained weight
    update  ΔW (..., out, in), or factors (lora_B, lora_A[, scaling])
    returns (...)

    The control belongs beside it: a random ΔW of the same norm meets ||U^T W V||_F = r * ||W||_F / sqrt(out * in) (root
    mean square), so it "amplifies" even more. In table 7 (||W_q||_F = 61.95, d = 12288, r = 4) the trained ΔW meets
    0.32 and amplifies 21.6 times, the random one meets 0.0202 and amplifies 343 times. What tells them apart is the
    overlap ||ΔW||_F / amplification over that control: 16 times for the trained one, about 1 for a random one.

    >>> W = torch.diag(torch.tensor([4.0, 1.0, 0.5]))
    >>> amplification(W, (torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0.0, 0.0, 2.0]])), r=1)  # 2 over 0.5
    tensor(4.)
    """
    r = _count(r, "r")
    W = _matrix(W, "W")
    U, S, Vh = _top(update, r, "update")
    shape = (*U.shape[:-1], Vh.shape[-1])
    if W.shape != shape:
        raise ValueError(
            f"W and the update must have the same shape (..., out, in); found {tuple(W.shape)} and {tuple(shape)}. "
            "A Conv1D stores its weight as (in, out): transpose it"
        )
    dtype = torch.promote_types(W.dtype, U.dtype)
    overlap = U.to(dtype).mT @ W.to(dtype) @ Vh.to(dtype).mT  # (..., r, r)
    return torch.linalg.vector_norm(S, dim=-1).to(dtype) / torch.linalg.matrix_norm(overlap)


def _svd(update, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of a matrix or of a tuple of factors, with the module's signs."""
    if isinstance(update, tuple):
        if len(update) not in (2, 3):
            raise ValueError(f"{name} as factors is (lora_B, lora_A[, scaling]); found {len(update)} items")
        return factored_svd(*update)
    U, S, Vh = torch.linalg.svd(_matrix(update, name), full_matrices=False)
    U, Vh = _with_signs(U, Vh)
    return U, S, Vh


def _top(update, count: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., out, count), the whole S, Vh (..., count, in); refuses directions that only rounding would choose."""
    U, S, Vh = _svd(update, name)
    # Rounding moves singular values by a few eps of the largest, by more in larger problems. Factors are a small one,
    # whatever out and in are: numpy's max(out, in) * eps would hide real directions, 5e-4 of the largest at d = 4096.
    floor = S[..., :1] * (S.shape[-1] + 10) * torch.finfo(S.dtype).eps
    rank = int((S > floor).sum(-1).min())
    if count > rank:
        raise ValueError(
            f"asked for the top {count} directions of {name}, whose numerical rank is {rank}: the others are arbitrary"
            + (f"; ask for {rank} or fewer" if rank else ". An update that is 0, as at the start of training, has none")
        )
    return U[..., :count], S, Vh[..., :count, :]


def _with_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """u_i and v_i may change sign together; this fixes it, so that two machines draw the same picture."""
    largest = U.abs().argmax(-2, keepdim=True)  # (..., 1, k)
    sign = U.gather(-2, largest).sign()
    return U * sign, Vh * sign.mT


def _matrix(M, name: str) -> Tensor:
    """M as a real tensor (..., rows, columns) of float32 or float64 without NaN."""
    M = torch.as_tensor(M)
    if M.ndim < 2 or 0 in M.shape:
        raise ValueError(f"{name} must be a matrix (..., rows, columns), each at least 1; found shape {tuple(M.shape)}")
    M = _real(M, name)
    bad = int((~M.isfinite()).sum())
    if bad:
        raise ValueError(f"{name} has {bad} of {M.numel()} entries that are NaN or infinite; did the training diverge?")
    return M


def _spectrum(S) -> Tensor:
    """Singular values (..., k) divided by the largest of each (squares of very large or small ones would not fit)."""
    S = torch.as_tensor(S)
    if S.ndim < 1 or 0 in S.shape:
        raise ValueError(f"S must be singular values (..., k), k at least 1; found shape {tuple(S.shape)}")
    S = _real(S, "S")
    if not S.isfinite().all() or (S < 0).any():
        raise ValueError("S must hold singular values: finite and not negative. Was a matrix given instead of its S?")
    largest = S.amax(-1, keepdim=True)
    return torch.where(largest > 0, S / largest, 0.0)


def _real(M: Tensor, name: str) -> Tensor:
    if M.is_complex():
        raise ValueError(f"{name} is complex ({M.dtype}); real numbers are expected")
    return M if M.dtype in (torch.float32, torch.float64) else M.float()


def _count(value, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, at least 1; found {value!r}")
    return number
