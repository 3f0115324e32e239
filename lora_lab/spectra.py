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
import hashlib
import math
import operator
import threading
from collections import OrderedDict
from dataclasses import dataclass

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
    B, A = _factors(lora_B, lora_A, scaling)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    core = _core(R_B, R_A, scaling)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    U, Vh = _with_signs(Q_B @ U, Vh @ Q_A.mT)
    return U, S, Vh


@_measures
def factored_svdvals(lora_B: Tensor, lora_A: Tensor, scaling: float = 1.0) -> Tensor:
    """The singular values S (..., k) of scaling * lora_B @ lora_A alone, k = min(r, out, in): those of R_B R_A^T.

    Cheaper than `factored_svd` (Q is never built); made for stacks, such as the layers of one shape in a model. Shapes,
    errors and refusals are the same.

    >>> factored_svdvals(torch.tensor([[3.0], [4.0]]), torch.tensor([[8.0, 6.0]]), scaling=-0.5)
    tensor([25.])
    """
    B, A = _factors(lora_B, lora_A, scaling)
    R_B, R_A = torch.linalg.qr(B, mode="r")[1], torch.linalg.qr(A.mT, mode="r")[1]
    return torch.linalg.svdvals(_core(R_B, R_A, scaling))


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


@dataclass(frozen=True, eq=False)
class Intruders:
    """What `intruder_dimensions` found. similarity, S (k,): of the tuned weight's top k directions, strongest first."""

    similarity: Tensor
    S: Tensor
    epsilon: float
    side: str

    @property
    def places(self) -> tuple[int, ...]:
        """Which of the top k directions, counted from 0, are intruders."""
        return tuple(torch.nonzero(self.similarity < self.epsilon).flatten().tolist())

    @property
    def count(self) -> int:
        return len(self.places)

    def __str__(self) -> str:
        return (
            f"{self.count} of the top {len(self.similarity)} {self.side} singular vectors of W0 + ΔW have |cos| < {self.epsilon:g} "
            f"with every one of W0's; the lowest is {self.similarity.min():.3f}"
        )


@_measures
def intruder_dimensions(W0: Tensor, update, k: int = 10, epsilon: float = 0.5, side: str = "left") -> Intruders:
    """Strong directions of the tuned weight that resemble none of the pretrained one's (Shuttleworth et al. 2024,
    arXiv 2410.21228).

        W0 + ΔW = Y diag(S) Z^T,   y_j an intruder if j <= k and max_i |cos(y_j, x_i)| < epsilon,   x_i those of W0

    It is the SVD of W0 + ΔW, not of ΔW, and x_i runs over all min(out, in) singular vectors of W0, weak ones too.

    W0       (out, in), the pretrained weight        update  ΔW (out, in), or factors (lora_B, lora_A[, scaling])
    k        how many of the tuned weight's directions are looked at; 10 in the authors' code
    epsilon  threshold for |cos|, 0 to 1; the count depends on it: state it, or show `similarity` itself
    side     "left": columns of U, in R^out, as in the authors' code; "right": rows of Vh, in R^in

    The control belongs beside it: `random_update(update)` has the same norm. Where singular values of W0 lie close to
    each other, a small dense ΔW already mixes their vectors: a low similarity is then no new direction. On the longer
    side of a matrix W0 has directions of singular value 0, which are none of the x_i.

    W0's vectors are kept for the next call (`BASE_CACHE`), found again by the weight's contents, so that ten models
    tuned from one base pay for it once. The SVD of the sum is dense and exact: seconds for 4096 x 4096, on a CPU minutes.

    >>> W0 = torch.diag(torch.tensor([5.0, 4.0, 3.0, 0.0]))
    >>> update = torch.ones(4, 1), torch.tensor([[0.0, 0.0, 0.0, 8.0]])  # writes everywhere at once
    >>> intruder_dimensions(W0, update, k=1, epsilon=0.6).count
    1
    """
    k = _count(k, "k")
    if side not in ("left", "right"):
        raise ValueError(f'side is "left" (columns of U) or "right" (rows of Vh); found {side!r}')
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is a threshold for |cos|, 0 to 1; found {epsilon!r}")
    W0 = _matrix(W0, "W0")
    delta = _dense(update, "update")
    if W0.ndim != 2 or W0.shape != delta.shape:
        raise ValueError(
            f"W0 and the update must be matrices of one shape (out, in); found {tuple(W0.shape)} and {tuple(delta.shape)}. "
            "A Conv1D stores its weight as (in, out): transpose it"
        )
    if k > min(W0.shape):
        raise ValueError(f"asked for the top {k} directions; a {W0.shape[0]} x {W0.shape[1]} matrix has {min(W0.shape)}")
    before = BASE_CACHE.vectors(W0, side)  # (min(out, in), out or in), as rows
    dtype = torch.promote_types(W0.dtype, delta.dtype)
    U, S, Vh = torch.linalg.svd(W0.to(dtype) + delta.to(dtype), full_matrices=False)
    after = U.mT[:k] if side == "left" else Vh[:k]
    similarity = (after @ before.to(after).mT).abs().amax(-1).clamp_max(1)  # rounding may pass 1 by some eps
    return Intruders(similarity, S[:k], float(epsilon), side)


class BaseCache:
    """Singular vectors of pretrained weights, which never change: the most recently used ones, up to `limit` bytes.

    They are found by a checksum of the weight (a millisecond a megabyte, against seconds for an SVD), not by which
    tensor it is: copies of one base model share them, and an edited weight, through `.data` too, is another weight.
    """

    def __init__(self, limit: int = 256 * 2**20):
        self.limit = limit
        self.kept: OrderedDict[tuple, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(vectors.nbytes for vectors in self.kept.values())

    def vectors(self, W0: Tensor, side: str) -> Tensor:
        """The left or right singular vectors of W0 (out, in), as rows, strongest first."""
        raw = W0.detach().contiguous().cpu().view(torch.uint8).numpy()
        key = (hashlib.sha256(raw).digest(), tuple(W0.shape), W0.dtype, str(W0.device), side)
        with self._lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        U, _, Vh = torch.linalg.svd(W0, full_matrices=False)
        found = U.mT.contiguous() if side == "left" else Vh.contiguous()
        with self._lock:
            if found.nbytes <= self.limit:
                self.kept[key] = found
            while self.nbytes > self.limit:
                self.kept.popitem(last=False)
        return found

    def clear(self) -> None:
        with self._lock:
            self.kept.clear()


BASE_CACHE = BaseCache()


@_measures
def random_update(update, kind: str = "rotated", seed: int = 0):
    """A random ΔW of the same norm ||ΔW||_F: the control for `amplification` and `intruder_dimensions`.

    "rotated"  the same singular values, so the same rank, in random directions (uniform): factors (lora_B, lora_A) with
               lora_B (out, k), lora_A (k, in)
    "dense"    independent Gaussian entries, so full rank: a matrix (out, in)

    update: ΔW (out, in), or factors (lora_B, lora_A[, scaling]). The same seed gives the same numbers on each device.

    >>> lora_B, lora_A = random_update(torch.diag(torch.tensor([4.0, 3.0, 0.0])))
    >>> torch.linalg.svdvals(lora_B @ lora_A).round(decimals=3)
    tensor([4., 3., 0.])
    """
    if isinstance(update, tuple):
        S = factored_svdvals(*_as_factors(update, "update"))
        out, inputs = update[0].shape[-2], update[1].shape[-1]
    else:
        update = _matrix(update, "update")
        S = torch.linalg.svdvals(update)
        out, inputs = update.shape[-2:]
    if S.ndim != 1:
        raise ValueError(f"random_update takes one update, not a stack; found singular values of shape {tuple(S.shape)}")
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=S.dtype).to(S.device)  # noqa: E731
    if kind == "dense":
        noise = normal(out, inputs)
        return noise * (torch.linalg.vector_norm(S) / torch.linalg.matrix_norm(noise))
    if kind != "rotated":
        raise ValueError(f'kind is "rotated" (the same singular values) or "dense" (full rank); found {kind!r}')
    # Q of a Gaussian matrix spans a uniformly random subspace; its columns are uniform up to sign, which S ignores.
    U, V = torch.linalg.qr(normal(out, len(S)))[0], torch.linalg.qr(normal(inputs, len(S)))[0]
    root = S.sqrt()
    return U * root, root[:, None] * V.mT


@dataclass(frozen=True, eq=False)
class LeadingSVD:
    """What `leading_svd` found, with what is known about its errors.

    U (out, r), S (r,), Vh (r, in)
    error   ||M - U diag(S) Vh||_F, measured
    bound   of ||M - M_q||_2, M_q what the whole search found (r + oversample directions); wrong with probability at most
            `risk`. Each true singular value lies between S_i and sqrt(S_i^2 + bound^2)
    energy  (r,) share of ||M||_F^2 in the first i directions
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: float
    bound: float
    risk: float
    energy: Tensor

    def __iter__(self):
        return iter((self.U, self.S, self.Vh))


@_measures
def leading_svd(M: Tensor, r: int, oversample: int = 10, iterations: int = 4, seed: int = 0) -> LeadingSVD:
    """The r strongest directions of a dense matrix without its whole SVD: a full fine-tuning's W1 - W0, say.

        Q  an orthonormal basis of (M M^T)^iterations M G, G Gaussian (in, r + oversample);  SVD of Q^T M
        Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1, here torch's own `svd_lowrank`:
        it needs no further package and computes where M lies, on a GPU too

    M (out, in), r + oversample at most min(out, in) are used. Deterministic for a seed; torch's own seed is left alone.

    The error is measured afterwards, not assumed. With E = M - M_q and s = 10 fresh Gaussian vectors w_i, their lemma 4.1
    applied to (E E^T)^p E, p = 6, says, wrong with probability at most 10^-s:

        ||E||_2 <= (10 sqrt(2 / pi) max_i ||(E E^T)^p E w_i||)^(1 / (2 p + 1))        and always ||E||_2 <= ||E||_F

    In float32 nothing below about 1e-6 of S_1 is seen. For min(out, in) up to a thousand, torch.linalg.svd is as good.
    """
    M = _matrix(M, "M")
    r = _count(r, "r")
    if M.ndim != 2 or r > min(M.shape):
        raise ValueError(f"M must be one matrix (out, in) with r <= min(out, in); found shape {tuple(M.shape)} and r = {r}")
    if oversample < 0 or iterations < 0:
        raise ValueError(f"oversample and iterations must not be negative; found {oversample} and {iterations}")
    size = M.abs().max()
    scale = size if size > 0 else torch.ones_like(size)
    with torch.random.fork_rng(devices=[M.device] if M.device.type == "cuda" else []):  # svd_lowrank draws from torch's own
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(M / scale, q=min(r + oversample, *M.shape), niter=iterations)
    E = M / scale - (U * S) @ V.mT
    residual = torch.linalg.matrix_norm(E)
    draw = torch.Generator().manual_seed(seed + 1)
    probes, powers = 10, 6
    w = torch.randn(M.shape[1], probes, generator=draw, dtype=M.dtype).to(M.device)
    largest = torch.zeros((), dtype=M.dtype, device=M.device)
    if residual > 0:
        unit = E / residual  # powers of a small E would underflow
        w = unit @ w
        for _ in range(powers):
            w = unit @ (unit.mT @ w)
        largest = residual * (10 * math.sqrt(2 / math.pi) * torch.linalg.vector_norm(w, dim=0).max()) ** (1 / (2 * powers + 1))
    error = torch.hypot(residual, torch.linalg.vector_norm(S[r:]))
    U, Vh = _with_signs(U[:, :r], V.mT[:r])
    whole = torch.linalg.matrix_norm(M / scale).square()
    held = S[:r].square().cumsum(0) / whole if whole > 0 else torch.ones_like(S[:r])
    return LeadingSVD(U, S[:r] * size, Vh, (error * size).item(), (torch.minimum(largest, residual) * size).item(), 10.0**-probes, held)


def _as_factors(update: tuple, name: str) -> tuple:
    if len(update) not in (2, 3):
        raise ValueError(f"{name} as factors is (lora_B, lora_A[, scaling]); found {len(update)} items")
    return update


def _dense(update, name: str) -> Tensor:
    """The matrix (out, in) of an update: W0 + ΔW has no factors."""
    if not isinstance(update, tuple):
        return _matrix(update, name)
    lora_B, lora_A, *scaling = _as_factors(update, name)
    B, A = _factors(lora_B, lora_A, *scaling or [1.0])
    return (scaling[0] if scaling else 1.0) * (B @ A)


def _factors(lora_B, lora_A, scaling: float) -> tuple[Tensor, Tensor]:
    """Both factors in one dtype, once they fit each other."""
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
    return B.to(dtype), A.to(dtype)


def _core(R_B: Tensor, R_A: Tensor, scaling: float) -> Tensor:
    """scaling * R_B R_A^T (at most r x r): it has the singular values of the whole product."""
    core = scaling * (R_B @ R_A.mT)
    if not core.isfinite().all():
        raise ValueError(f"scaling * lora_B @ lora_A overflows {core.dtype}; give the factors in float64")
    return core


def _svd(update, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of a matrix or of a tuple of factors, with the module's signs."""
    if isinstance(update, tuple):
        return factored_svd(*_as_factors(update, name))
    U, S, Vh = torch.linalg.svd(_matrix(update, name), full_matrices=False)
    U, Vh = _with_signs(U, Vh)
    return U, S, Vh


def numerical_rank(S: Tensor) -> Tensor:
    """How many singular values (..., k), largest first, are more than rounding.

    Rounding moves singular values by a few eps of the largest, by more in larger problems. Factors are a small one, whatever out
    and in are: numpy's max(out, in) * eps would hide real directions, 5e-4 of the largest at d = 4096.
    """
    return (S > S[..., :1] * (S.shape[-1] + 10) * torch.finfo(S.dtype).eps).sum(-1)


def _top(update, count: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., out, count), the whole S, Vh (..., count, in); refuses directions that only rounding would choose."""
    U, S, Vh = _svd(update, name)
    rank = int(numerical_rank(S).min())
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
