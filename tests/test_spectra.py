"""Spectra against dense numpy in float64, closed forms, random subspaces, and numbers printed in the paper."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.spectra import (
    BASE_CACHE,
    BaseCache,
    amplification,
    best_rank_r,
    effective_rank,
    energy,
    factored_svd,
    factored_svdvals,
    intruder_dimensions,
    leading_svd,
    random_update,
    stable_rank,
    subspace_similarity,
)

# Both decompositions are backward stable: each singular value is off by a modest multiple of eps = 2.2e-16 times the
# largest. 1e-12 leaves a factor of 4,500 for sizes up to 100.
REL = 1e-12


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def orthonormal(rows, columns, rng):
    """Uniformly random: Q of a Gaussian matrix, with R's diagonal made positive."""
    Q, R = np.linalg.qr(rng.standard_normal((rows, columns)))
    return Q * np.sign(np.diag(R))


def with_spectrum(out, inn, S, seed=0):
    """A matrix whose singular values are S, and its singular vectors, without any SVD."""
    rng = np.random.default_rng(seed)
    U, V = orthonormal(out, len(S), rng), orthonormal(inn, len(S), rng)
    return U @ np.diag(S) @ V.T, U, V


def check_svd(U, S, Vh, dense, r):
    """(U, S, Vh) decompose `dense` (numpy), and have the shapes and properties that the docstring states."""
    k = min(r, *dense.shape)
    assert (U.shape, S.shape, Vh.shape) == ((dense.shape[0], k), (k,), (k, dense.shape[1]))
    U, S, Vh = U.numpy(), S.numpy(), Vh.numpy()
    wanted = np.linalg.svd(dense, compute_uv=False)
    scale = wanted[0] or 1.0
    np.testing.assert_allclose(S, wanted[:k], rtol=0, atol=REL * scale)
    np.testing.assert_allclose(U @ np.diag(S) @ Vh, dense, rtol=0, atol=REL * scale)
    np.testing.assert_allclose(U.T @ U, np.eye(k), rtol=0, atol=REL)
    np.testing.assert_allclose(Vh @ Vh.T, np.eye(k), rtol=0, atol=REL)
    assert (S >= 0).all() and (np.diff(S) <= 0).all()
    assert (U[np.abs(U).argmax(0), np.arange(k)] > 0).all()


@settings(deadline=None, max_examples=60)
@given(out=st.integers(1, 24), inn=st.integers(1, 24), r=st.integers(1, 30), seed=st.integers(0, 10**6),
       scaling=st.sampled_from([1.0, 5 / 3, -2.0, 1e-8, 1e8]))
def test_factored_svd_is_the_svd_of_the_product(out, inn, r, seed, scaling):
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((out, r)), rng.standard_normal((r, inn))
    check_svd(*factored_svd(torch.from_numpy(B), torch.from_numpy(A), scaling), scaling * (B @ A), r)


@pytest.mark.parametrize("r", [1, 2, 8, 63, 64, 65, 90])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_ranks_up_to_the_smaller_side_and_above(shape, r):
    B, A = normal(shape[0], r), normal(r, shape[1], seed=1)
    check_svd(*factored_svd(torch.from_numpy(B), torch.from_numpy(A), 16 / r), 16 / r * (B @ A), r)


def test_repeated_directions_and_zeros_in_the_factors():
    B, A = normal(20, 5), normal(5, 13, seed=1)
    B[:, 3], A[4] = B[:, 1], 0.0  # rank 4 in B, 4 in A
    check_svd(*factored_svd(torch.from_numpy(B), torch.from_numpy(A)), B @ A, 5)
    for b, a in ((np.zeros((6, 3)), A[:3]), (B[:, :3], np.zeros((3, 9))), (np.zeros((6, 3)), np.zeros((3, 9)))):
        U, S, Vh = factored_svd(torch.from_numpy(b), torch.from_numpy(a))
        assert (S == 0).all()  # exactly: an update at the start of training is exactly 0
        check_svd(U, S, Vh, b @ a, 3)


def test_negative_scaling_turns_directions_not_values():
    B, A = torch.from_numpy(normal(9, 3)), torch.from_numpy(normal(3, 7, seed=1))
    (U, S, Vh), (U_, S_, Vh_) = factored_svd(B, A, 0.5), factored_svd(B, A, -0.5)
    for mine, other in ((S_, S), (U_, U), (Vh_, -Vh)):
        # singular vectors turn by about eps / (relative gap); this sample's gaps are above 0.1
        torch.testing.assert_close(mine, other, rtol=0, atol=REL)


def test_a_stack_of_updates_is_the_updates_one_by_one():
    B, A = normal(2, 3, 11, 4), normal(2, 3, 4, 7, seed=1)
    U, S, Vh = factored_svd(torch.from_numpy(B), torch.from_numpy(A), 2.0)
    assert (U.shape, S.shape, Vh.shape) == ((2, 3, 11, 4), (2, 3, 4), (2, 3, 4, 7))
    W = torch.from_numpy(normal(2, 3, 11, 7, seed=2))
    best, error = best_rank_r((torch.from_numpy(B), torch.from_numpy(A)), 2)
    phi = subspace_similarity(W, (torch.from_numpy(B), torch.from_numpy(A)), 3, 4)
    gain = amplification(W, (torch.from_numpy(B), torch.from_numpy(A)), 2)
    assert (best[0] @ best[1]).shape == W.shape and phi.shape == (2, 3, 3, 4)
    assert error.shape == gain.shape == stable_rank(S).shape == effective_rank(S).shape == (2, 3)
    for i in np.ndindex(2, 3):
        check_svd(U[i], S[i], Vh[i], 2.0 * B[i] @ A[i], 4)
        dense = B[i] @ A[i]
        u, s, vh = np.linalg.svd(dense)
        np.testing.assert_allclose((best[0] @ best[1])[i], (u[:, :2] * s[:2]) @ vh[:2], rtol=0, atol=REL * s[0])
        np.testing.assert_allclose(error[i], np.linalg.norm(s[2:4]), rtol=REL)
        w = W[i].numpy()
        wanted = np.linalg.norm(np.linalg.svd(w)[2][:3] @ vh[:4].T) ** 2 / 3
        np.testing.assert_allclose(phi[i][2, 3], wanted, rtol=0, atol=1e-10)  # eps over gaps of 0.01 and more
        met = np.linalg.norm(u[:, :2].T @ w @ vh[:2].T)
        np.testing.assert_allclose(gain[i], np.linalg.norm(dense) / met, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    B, A = torch.from_numpy(normal(40, 4)).to(dtype), torch.from_numpy(normal(4, 30, seed=1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        U, S, Vh = factored_svd(B, A, 0.5)
        update, error = best_rank_r((B, A), 2)
        overlap = subspace_similarity(A, A, 4, 4)
    assert U.dtype == S.dtype == Vh.dtype == update[0].dtype == overlap.dtype == torch.float32
    dense = B.double().numpy() @ A.double().numpy()
    # float32's eps is 1.2e-7, bfloat16's 8e-3: computing in half would miss by a thousand times this tolerance
    np.testing.assert_allclose((U * S) @ Vh, 0.5 * dense, rtol=0, atol=1e-5 * np.abs(dense).max())
    u, s, vh = np.linalg.svd(dense)
    np.testing.assert_allclose(update[0] @ update[1], (u[:, :2] * s[:2]) @ vh[:2], rtol=0, atol=1e-5 * s[0])
    np.testing.assert_allclose(error, np.linalg.norm(s[2:4]), rtol=1e-5)
    np.testing.assert_allclose(overlap[-1, -1], 1, rtol=1e-5)


def test_mixed_dtypes_numpy_and_parameters():
    B, A = torch.nn.Parameter(torch.from_numpy(normal(9, 2)).float()), normal(2, 7, seed=1)
    U, S, Vh = factored_svd(B, A)
    assert S.dtype == torch.float64 and not S.requires_grad
    check_svd(U, S, Vh, B.detach().double().numpy() @ A, 2)
    assert B.grad is None and B.requires_grad
    photo = np.arange(12, dtype=np.uint8).reshape(3, 4)
    best, error = best_rank_r(photo, 3)
    np.testing.assert_allclose(best, photo, rtol=0, atol=1e-5)  # float32, entries up to 11


# -- best rank-r

@settings(deadline=None, max_examples=40)
@given(out=st.integers(1, 12), inn=st.integers(1, 12), r=st.integers(1, 14), seed=st.integers(0, 10**6))
def test_best_rank_r_error_and_rank(out, inn, r, seed):
    M = normal(out, inn, seed=seed)
    best, error = best_rank_r(torch.from_numpy(M), r)
    tail = np.linalg.svd(M, compute_uv=False)[r:]
    norm = np.linalg.norm(M)
    np.testing.assert_allclose(error, np.sqrt((tail**2).sum()), rtol=0, atol=REL * norm)
    np.testing.assert_allclose(np.linalg.norm(M - best.numpy()), error, rtol=0, atol=REL * norm)
    assert np.linalg.matrix_rank(best.numpy(), tol=1e-10 * norm) == min(r, out, inn)


def test_nothing_of_that_rank_is_nearer():
    """Alternating least squares from random starts is another way to the optimum; it never passes below the error."""
    M = normal(12, 9)
    for r in (1, 3, 5):
        error = best_rank_r(torch.from_numpy(M), r)[1].item()
        for seed in range(4):
            A = normal(r, 9, seed=seed)
            for _ in range(1000):
                B = M @ np.linalg.pinv(A)
                A = np.linalg.pinv(B) @ M
            reached = np.linalg.norm(M - B @ A)
            assert reached >= error * (1 - 1e-12)  # rounding of two sums of 108 squares
            assert reached <= error * 1.01  # ALS has nearly converged after 1,000 rounds, so the bound is tight


def test_factors_come_back_as_factors():
    B, A = normal(30, 6), normal(6, 20, seed=1)
    (B_r, A_r), error = best_rank_r((torch.from_numpy(B), torch.from_numpy(A), -0.5), 2)
    assert B_r.shape == (30, 2) and A_r.shape == (2, 20)
    u, s, vh = np.linalg.svd(-0.5 * B @ A)
    np.testing.assert_allclose(B_r @ A_r, (u[:, :2] * s[:2]) @ vh[:2], rtol=0, atol=REL * s[0])
    np.testing.assert_allclose(error, np.linalg.norm(s[2:6]), rtol=REL)
    for factor, axis in ((B_r, 0), (A_r, 1)):  # each carries sqrt(S)
        np.testing.assert_allclose(np.linalg.norm(factor, axis=axis), np.sqrt(s[:2]), rtol=REL)
    whole, error = best_rank_r((torch.from_numpy(B), torch.from_numpy(A)), 99)
    assert error == 0 and whole[0].shape == (30, 6)


# -- what a spectrum says

def test_energy_by_hand_and_against_the_error():
    assert energy(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)).tolist() == [4 / 6, 5 / 6, 1.0]
    M = normal(15, 10)
    shares = energy(torch.linalg.svdvals(torch.from_numpy(M))).numpy()
    for r in range(1, 10):
        left = (best_rank_r(torch.from_numpy(M), r)[1].item() / np.linalg.norm(M)) ** 2
        np.testing.assert_allclose(1 - shares[r - 1], left, rtol=0, atol=REL)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_closed_forms_at_any_scale(scale):
    """float32, where squares of 1e-30 and 1e30 would be 0 and infinite."""
    flat = torch.full((6,), scale)
    one = torch.tensor([scale, 0.0, 0.0])
    half = torch.tensor([3 * scale, scale])  # p = 3/4, 1/4
    eps = 1e-6  # float32's 1.2e-7, some operations
    assert effective_rank(flat).item() == pytest.approx(6, rel=eps)
    assert effective_rank(one) == stable_rank(one) == 1
    assert stable_rank(flat) == 6
    assert energy(flat).numpy() == pytest.approx(np.arange(1, 7) / 6, rel=eps)
    assert effective_rank(half).item() == pytest.approx(4 / 3**0.75, rel=eps)  # exp(H) = 4 / 3^(3/4)
    assert stable_rank(half).item() == pytest.approx(10 / 9, rel=eps)
    assert stable_rank(flat[[0, 0]] * torch.tensor([1 / 3, 1.0])).item() == pytest.approx(10 / 9, rel=eps)  # any order
    assert energy(half).numpy() == pytest.approx([0.9, 1], rel=eps)


@settings(deadline=None, max_examples=60)
@given(S=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_ranks_by_their_definitions(S):
    """Both lie between 1 and the number of values, and ignore scale and zeros; values by numpy."""
    S = torch.tensor(sorted(S, reverse=True), dtype=torch.float64)
    for rank in (effective_rank, stable_rank):
        value = rank(S).item()
        assert 1 - REL <= value <= len(S) * (1 + REL)
        assert rank(7 * S).item() == pytest.approx(value, rel=REL)
        assert rank(torch.cat([S, torch.zeros(3, dtype=S.dtype)])).item() == pytest.approx(value, rel=REL)
    p = S.numpy() / S.numpy().sum()
    assert effective_rank(S).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=REL)
    assert stable_rank(S).item() == pytest.approx((S.numpy() ** 2).sum() / S.numpy()[0] ** 2, rel=REL)


def test_a_zero_update_has_rank_zero_and_nothing_left_out():
    S = torch.zeros(2, 3)
    assert energy(S).eq(1).all() and effective_rank(S).eq(0).all() and stable_rank(S).eq(0).all()


def test_noise_has_the_ranks_that_the_docstrings_state():
    """Quarter-circle law for square Gaussian matrices; its integral for the entropy, computed by quadrature."""
    s = np.linspace(1e-9, 2, 200_001)
    density = np.sqrt(4 - s**2) / np.pi
    p = s / (8 / (3 * np.pi))  # over the mean singular value
    law = math.exp(-np.trapezoid(density * p * np.log(p), s))
    assert round(law, 3) == 0.805
    S = torch.linalg.svdvals(torch.from_numpy(normal(400, 400)))
    # Spread over seeds at d = 400 is 0.0005 (effective) and 0.004 (stable, the largest value's fluctuation): 5 of them,
    # and finite-size shifts of the order of 1/d and d^(-2/3) = 2 %.
    assert effective_rank(S).item() / 400 == pytest.approx(law, abs=0.005)
    assert stable_rank(S).item() / 400 == pytest.approx(0.25, rel=0.04)


# -- subspaces

def test_similarity_is_the_papers_formula_at_every_entry():
    A, B = normal(8, 40), normal(16, 40, seed=1)
    phi = subspace_similarity(torch.from_numpy(A), torch.from_numpy(B), 8, 16).numpy()
    V_A, V_B = np.linalg.svd(A)[2].T, np.linalg.svd(B)[2].T  # the paper's U: right-singular vectors as columns
    assert phi.shape == (8, 16)
    for i in range(1, 9):
        for j in range(1, 17):
            wanted = np.linalg.norm(V_A[:, :i].T @ V_B[:, :j], "fro") ** 2 / min(i, j)
            # vectors turn by eps over the relative gap between neighbouring values, here 0.005 and more
            assert phi[i - 1, j - 1] == pytest.approx(wanted, abs=1e-10)


def test_similarity_of_known_subspaces():
    M, U, V = with_spectrum(30, 50, [5.0, 4.0, 3.0, 2.0], seed=3)
    N = orthonormal(9, 4, np.random.default_rng(4)) @ np.diag([4.0, 3.0, 2.0, 1.0]) @ V[:, [1, 0, 2, 3]].T
    phi = subspace_similarity(torch.from_numpy(M), torch.from_numpy(N), 4, 4).numpy()
    wanted = [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]  # N reads M's second direction first
    np.testing.assert_allclose(phi, wanted, rtol=0, atol=1e-12)  # gaps are 1 of 5: a few eps
    left = subspace_similarity(torch.from_numpy(M).mT, torch.from_numpy(U[:, :2] * [2.0, 1.0]).mT, 2, 2).numpy()
    np.testing.assert_allclose(left, [[1, 1], [1, 1]], rtol=0, atol=1e-12)  # left vectors by transposing
    unread = np.linalg.svd(V.T)[2][4:7] * [[3.0], [2.0], [1.0]]  # three directions that M does not read
    none = subspace_similarity(torch.from_numpy(M), torch.from_numpy(unread), 4, 3)
    np.testing.assert_allclose(none, 0, atol=1e-24)  # squares of some eps


def test_similarity_reads_the_update_through_its_factors():
    B, A = normal(30, 4), normal(4, 20, seed=1)
    other = normal(25, 20, seed=2)
    dense = subspace_similarity(torch.from_numpy(B @ A), torch.from_numpy(other), 4, 6)
    factored = subspace_similarity((torch.from_numpy(B), torch.from_numpy(A), -3.0), torch.from_numpy(other), 4, 6)
    np.testing.assert_allclose(factored, dense, rtol=0, atol=1e-10)
    # all four directions span the rows of A, whatever B is
    same = subspace_similarity((torch.from_numpy(B), torch.from_numpy(A)), torch.from_numpy(A), 4, 4)
    assert same[-1, -1].item() == pytest.approx(1, abs=1e-12)
    assert same[0, 0].item() < 0.99  # but their order is B's doing


@pytest.mark.parametrize(("i", "j", "d"), [(8, 64, 512), (1, 1, 32), (5, 3, 48)])
def test_random_subspaces_overlap_by_max_over_d(i, j, d):
    seeds = 80 if d > 100 else 400
    values = []
    for seed in range(seeds):
        A, B = torch.from_numpy(normal(i, d, seed=seed)), torch.from_numpy(normal(j, d, seed=10_000 + seed))
        values.append(subspace_similarity(A, B, i, j)[-1, -1].item())
    error = np.std(values, ddof=1) / math.sqrt(seeds)
    assert np.mean(values) == pytest.approx(max(i, j) / d, abs=4 * error)  # 4 standard errors; the seeds are fixed
    if d == 512:
        assert error < 0.001  # the test can tell 0.125 from 0.13


def test_weak_directions_are_told_from_rounding():
    """In float32 at d = 4096 a direction 1e-4 as strong is real; a repeated row of lora_A is none, either way."""
    rng = np.random.default_rng(0)
    U, V = orthonormal(4096, 2, rng), orthonormal(4096, 2, rng)
    weak = torch.from_numpy(U * [1.0, 1e-4]).float(), torch.from_numpy(V.T).float()
    phi = subspace_similarity(weak, torch.from_numpy(V[:, 1:].T), 2, 1).numpy()
    np.testing.assert_allclose(phi, [[0], [1]], rtol=0, atol=1e-5)  # the angle's error is eps / 1e-4 = 1e-3, squared
    for seed in range(40):
        r = 2 + seed % 7
        B, A = normal(64, r, seed=seed), normal(r, 96, seed=100 + seed)
        A[0] = A[1]
        B, A = torch.from_numpy(B).float(), torch.from_numpy(A).float()
        for update in ((B, A), B @ A):
            with pytest.raises(ValueError, match=f"numerical rank is {r - 1}:"):
                subspace_similarity(update, torch.eye(96), r, 1)


def test_seeds_shared_between_ranks_overlap_before_training():
    A64 = torch.from_numpy(normal(64, 128))
    assert subspace_similarity(A64[:8], A64, 8, 64)[-1, -1].item() == pytest.approx(1, abs=1e-12)


def test_the_appendix_means_one_minus_d_squared_over_p():
    A, B = normal(5, 30), normal(9, 30, seed=1)
    V_A, V_B = np.linalg.svd(A)[2][:5].T, np.linalg.svd(B)[2][:9].T
    sigma = np.linalg.svd(V_A.T @ V_B, compute_uv=False)
    p, squared = 5, 5 - (sigma**2).sum()
    phi = subspace_similarity(torch.from_numpy(A), torch.from_numpy(B), 5, 9)[-1, -1].item()
    assert phi == pytest.approx(1 - squared / p, abs=1e-12)
    assert (1 - squared) / p < 0  # the printed formula leaves [0, 1]


# -- amplification

def test_amplification_against_dense_numpy():
    W, B, A = normal(30, 20), normal(30, 5, seed=1), normal(5, 20, seed=2)
    for r in (1, 3, 5):
        dense = -2.0 * B @ A
        u, s, vh = np.linalg.svd(dense)
        wanted = np.linalg.norm(dense) / np.linalg.norm(u[:, :r].T @ W @ vh[:r].T)
        for update in (torch.from_numpy(dense), (torch.from_numpy(B), torch.from_numpy(A), -2.0)):
            assert amplification(torch.from_numpy(W), update, r).item() == pytest.approx(wanted, rel=1e-10)


def test_amplification_of_what_is_there_and_of_what_is_not():
    W, U, V = with_spectrum(40, 30, [8.0, 4.0, 2.0, 1.0])
    louder = torch.from_numpy(3 * U[:, 2:] @ np.diag([2.0, 1.0]) @ V[:, 2:].T)  # the two weak directions, three times
    assert amplification(torch.from_numpy(W), louder, 2).item() == pytest.approx(3, rel=1e-12)
    # its own rows, but columns that W never writes to: nothing to amplify but rounding
    elsewhere = np.linalg.svd(U.T)[2][4:5]
    assert amplification(torch.from_numpy(W), (torch.from_numpy(elsewhere.T), torch.from_numpy(V[:, :1].T)), 1) > 1e13
    assert amplification(torch.zeros(2, 2), torch.eye(2), 1) == math.inf


@pytest.mark.parametrize(("r", "norm", "control", "printed"), [(4, 6.91, 0.0202, "0.02"), (64, 3.57, 0.3227, "0.33")])
def test_the_papers_random_column(r, norm, control, printed):
    """Table 7: ||W_q||_F = 61.95, d = 12288. A W that is equally large everywhere has exactly the root mean square
    overlap with the directions e_1 ... e_r; with entries of 61.95 / 12288 it is the paper's, whatever the size of W."""
    W = torch.full((100, 80), 61.95 / 12288, dtype=torch.float64)
    spectrum = torch.linspace(2, 1, r, dtype=torch.float64)
    update = torch.zeros(100, 80, dtype=torch.float64)
    update[range(r), range(r)] = norm * spectrum / spectrum.norm()
    amplified = amplification(W, update, r).item()
    assert norm / amplified == pytest.approx(r * 61.95 / 12288, rel=1e-12)
    assert norm / amplified == pytest.approx(control, abs=5e-5)  # four digits given
    assert norm / amplified == pytest.approx(float(printed), abs=0.01)  # two printed, the second one not always rounded
    # the docstring's formula
    assert r * W.norm().item() / math.sqrt(100 * 80) == pytest.approx(norm / amplified, rel=1e-12)


def test_random_updates_meet_the_control():
    """Root mean square over random subspaces, r ||W|| / sqrt(out in), for a W far from flat."""
    W, _, _ = with_spectrum(24, 36, [9.0, 3.0, 1.0])
    r, squares = 4, []
    for seed in range(1500):
        B, A = torch.from_numpy(normal(24, r, seed=seed)), torch.from_numpy(normal(r, 36, seed=50_000 + seed))
        squares.append((torch.linalg.norm(B @ A) / amplification(torch.from_numpy(W), (B, A), r)).item() ** 2)
    wanted = (r * np.linalg.norm(W)) ** 2 / (24 * 36)
    error = np.std(squares, ddof=1) / math.sqrt(len(squares))
    assert np.mean(squares) == pytest.approx(wanted, abs=4 * error)  # 4 standard errors; the seeds are fixed
    assert error < 0.05 * wanted


# -- singular values alone

@pytest.mark.parametrize(("out", "inn", "r"), [(20, 13, 4), (13, 20, 1), (6, 9, 8), (5, 5, 5)])
def test_singular_values_of_stacks(out, inn, r):
    B, A = normal(3, out, r), normal(3, r, inn, seed=1)
    S = factored_svdvals(torch.from_numpy(B), torch.from_numpy(A), -0.5)
    assert S.shape == (3, min(r, out, inn))
    for i in range(3):
        wanted = np.linalg.svd(0.5 * B[i] @ A[i], compute_uv=False)
        np.testing.assert_allclose(S[i], wanted[: S.shape[1]], rtol=0, atol=REL * wanted[0])
    assert (factored_svdvals(torch.zeros(3, out, r), torch.ones(3, r, inn)) == 0).all()


# -- intruders

def decaying(out, inn, seed=0):
    """Singular values 0.9^i: far enough apart for their vectors to mean something."""
    return with_spectrum(out, inn, 0.9 ** np.arange(min(out, inn)), seed)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(40, 40), (60, 30), (30, 60)])
def test_intruders_by_their_definition(side, shape):
    W0, B, A = decaying(*shape)[0], normal(shape[0], 3, seed=1), normal(3, shape[1], seed=2)
    found = intruder_dimensions(torch.from_numpy(W0), (torch.from_numpy(B), torch.from_numpy(A), 0.03), k=8, epsilon=0.7, side=side)
    X, Y = (np.linalg.svd(W, full_matrices=False) for W in (W0, W0 + 0.03 * B @ A))
    wanted = [max(abs(y @ x) for x in (X[0].T if side == "left" else X[2])) for y in (Y[0].T if side == "left" else Y[2])[:8]]
    np.testing.assert_allclose(found.similarity, wanted, rtol=0, atol=1e-10)  # vectors turn by eps over gaps of 0.01
    np.testing.assert_allclose(found.S, Y[1][:8], rtol=0, atol=REL)
    assert found.places == tuple(i for i, s in enumerate(wanted) if s < 0.7) and found.count == len(found.places) > 0
    assert f"{found.count} of the top 8 {side} singular vectors" in str(found)
    dense = intruder_dimensions(W0, 0.03 * B @ A, k=8, epsilon=0.7, side=side)
    np.testing.assert_allclose(dense.similarity, found.similarity, rtol=0, atol=1e-10)


def test_a_direction_of_its_own_intrudes_and_one_within_does_not():
    """W0 lies in 20 of 50 dimensions; u, v lie outside and are known exactly."""
    W0, U, V = with_spectrum(50, 50, 0.9 ** np.arange(20))
    u, v = np.linalg.svd(U.T)[2][25:26], np.linalg.svd(V.T)[2][25:26]
    for strength, places in ((0.95, (1,)), (5.0, (0,)), (1e-3, ())):  # between S_1 = 1 and S_2 = 0.9, above all, below the top 10
        found = intruder_dimensions(W0, (torch.from_numpy(strength * u.T), torch.from_numpy(v)))
        assert found.places == places, "W0 keeps its other vectors, exactly"
        assert found.similarity[[i for i in range(10) if i not in places]].min() > 1 - 1e-9
    within = U[:, :1] * 3 @ V[:, :1].T
    assert intruder_dimensions(W0, within).count == 0
    assert intruder_dimensions(W0, np.zeros_like(W0)).similarity.min() == pytest.approx(1, abs=1e-9)
    # it is about W0 + update, not about the update's own directions
    tiny = intruder_dimensions(W0, (torch.from_numpy(1e-6 * u.T), torch.from_numpy(v)))
    assert tiny.count == 0


def test_the_rank_of_a_random_update_matters_and_not_only_its_norm():
    """At norm 2 S_1 a rank-1 update makes an intruder and a dense one none, over 20 seeds, if singular values are 0.9^i."""
    counts = {"rotated": [], "dense": []}
    for seed in range(20):
        W0 = decaying(128, 128, seed)[0]
        one = torch.from_numpy(normal(128, 1, seed=seed + 100)), torch.from_numpy(normal(1, 128, seed=seed + 200))
        one = one[0] * 2 / np.linalg.norm(one[0] @ one[1]), one[1]
        for kind in counts:
            counts[kind].append(intruder_dimensions(W0, random_update(one, kind, seed)).count)
    assert counts["rotated"] == [1] * 20 and counts["dense"] == [0] * 20


def test_singular_vectors_of_a_base_are_computed_once(monkeypatch):
    calls = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda M, **k: calls.append(M.clone()) or svd(M, **k))
    BASE_CACHE.clear()
    W0 = torch.from_numpy(decaying(30, 20)[0])
    update = torch.from_numpy(normal(30, 1)), torch.from_numpy(normal(1, 20, seed=1))
    of_base = lambda: sum(torch.equal(M, W0) for M in calls)  # noqa: E731
    first = intruder_dimensions(W0, update)
    again = intruder_dimensions(W0.clone(), update)  # a copy is the same weight
    assert of_base() == 1 and torch.equal(first.similarity, again.similarity)
    intruder_dimensions(W0, update, side="right")
    assert of_base() == 2
    W0.data[0, 0] += 1e-9  # edits through .data escape torch's own count
    intruder_dimensions(W0, update)
    assert of_base() == 1, "the edited weight is another one"
    BASE_CACHE.clear()
    assert BASE_CACHE.nbytes == 0


def test_the_cache_is_bounded_and_forgets_the_oldest():
    weights = [torch.from_numpy(normal(10, 10, seed=i)) for i in range(3)]
    cache = BaseCache(limit=2 * 800)  # 10 x 10 float64
    vectors = [cache.vectors(W, "left") for W in weights[:2]]
    assert cache.vectors(weights[0], "left") is vectors[0]
    cache.vectors(weights[2], "left")
    assert cache.nbytes == 1600 and cache.vectors(weights[0], "left") is vectors[0]
    assert cache.vectors(weights[1], "left") is not vectors[1]
    kept = cache.vectors(weights[0], "left")
    cache.vectors(torch.from_numpy(normal(20, 20)), "left")  # 3,200 bytes
    assert cache.nbytes == 1600 and cache.vectors(weights[0], "left") is kept, "one that is too large pushes nothing out"


# -- random updates

@pytest.mark.parametrize("factors", [True, False])
def test_random_updates_have_the_same_norm(factors):
    B, A = normal(30, 3), normal(3, 20, seed=1)
    update = (torch.from_numpy(B), torch.from_numpy(A), -2.0) if factors else torch.from_numpy(-2.0 * B @ A)
    S = np.linalg.svd(2 * B @ A, compute_uv=False)
    lora_B, lora_A = random_update(update, seed=4)
    np.testing.assert_allclose(np.linalg.svd((lora_B @ lora_A).numpy(), compute_uv=False), S, rtol=0, atol=REL * S[0])
    dense = random_update(update, "dense", seed=4)
    assert dense.shape == (30, 20) and dense.norm().item() == pytest.approx(np.linalg.norm(S), rel=REL)
    assert np.linalg.svd(dense.numpy(), compute_uv=False)[-1] > 0.01 * S[0], "full rank"
    state = torch.get_rng_state()
    assert torch.equal(dense, random_update(update, "dense", seed=4)) and not torch.equal(dense, random_update(update, "dense", seed=5))
    assert torch.equal(state, torch.get_rng_state())
    assert (random_update(torch.zeros(4, 3), "dense") == 0).all() and (random_update(torch.zeros(4, 3))[0] == 0).all()


def test_rotated_updates_point_anywhere():
    """Mean of |<u, e_1>|^2 over seeds is 1/d for each direction: uniform."""
    update = torch.from_numpy(normal(12, 2)), torch.from_numpy(normal(2, 9, seed=1))
    S = factored_svdvals(*update)
    squares = np.array([((random_update(update, seed=s)[0] / S.sqrt()).numpy() ** 2) for s in range(600)])  # (600, 12, 2)
    error = squares.std(0, ddof=1) / math.sqrt(600)
    assert (np.abs(squares.mean(0) - 1 / 12) < 4.5 * error).all()  # 24 of them, the seeds are fixed


# -- leading directions of a dense matrix

SPECTRA = {
    "fast": 0.5 ** np.arange(60), "slow": 0.97 ** np.arange(60), "flat": np.ones(60), "steps": np.repeat([4.0, 2.0, 1.0], 20),
    "low rank": np.array([3.0, 2.0, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_leading_svd_knows_its_errors(name, shape):
    """The measured error is the error, and the bound holds and is not slack, whatever the spectrum."""
    M, _, _ = with_spectrum(*shape, SPECTRA[name])
    true = np.linalg.svd(M, compute_uv=False)
    found = leading_svd(torch.from_numpy(M), 8, oversample=0)  # so that what is returned is all that was found
    U, S, Vh = (t.numpy() for t in found)
    assert U.shape == (shape[0], 8) and Vh.shape == (8, shape[1])
    left = M - (U * S) @ Vh
    rounding = 1e-13 * true[0]  # norms of a residual of some eps
    assert found.error == pytest.approx(np.linalg.norm(left), abs=rounding)
    spectral = np.linalg.norm(left, 2)
    # (10 sqrt(2 / pi) max |w|)^(1/13) is at most 1.8 for a Gaussian of 90 dimensions: the largest of 10 lengths near sqrt(90)
    assert spectral - rounding <= found.bound <= 1.8 * spectral + rounding
    for i in range(8):
        assert S[i] <= true[i] + rounding and true[i] <= math.hypot(S[i], found.bound) + rounding
    np.testing.assert_allclose(U.T @ U, np.eye(8), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.energy, np.cumsum(S**2) / (true**2).sum(), rtol=1e-12)
    assert found.risk == 1e-10


def test_leading_svd_finds_what_a_whole_svd_finds():
    M, U, V = with_spectrum(200, 150, 0.8 ** np.arange(100))
    found = leading_svd(torch.from_numpy(M), 12)
    # the error of direction i falls with (S_23 / S_i)^(2 * 4 + 1); here 0.8^(11 * 9) = 3e-10, times the subspace's luck
    np.testing.assert_allclose(found.S, 0.8 ** np.arange(12), rtol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(found.U.numpy() * U[:, :12], 0)), 1, rtol=1e-8)
    np.testing.assert_allclose(np.abs(np.sum(found.Vh.numpy().T * V[:, :12], 0)), 1, rtol=1e-8)
    assert found.error == pytest.approx(math.sqrt((0.8 ** (2 * np.arange(12, 100))).sum()), rel=1e-6)


def test_leading_svd_repeats_itself_and_leaves_torchs_seed_alone():
    M = torch.from_numpy(normal(70, 50))
    state = torch.get_rng_state()
    a, b, c = leading_svd(M, 5), leading_svd(M, 5), leading_svd(M, 5, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.S, b.S) and a.bound == b.bound and not torch.equal(a.S, c.S)
    zero = leading_svd(torch.zeros(6, 4), 2)
    assert (zero.S == 0).all() and zero.error == zero.bound == 0 and (zero.energy == 1).all()
    plain = leading_svd(M.float(), 5)
    for scale in (2.0**-100, 2.0**100):  # squares would not fit into float32
        scaled = leading_svd(M.float() * scale, 5)
        np.testing.assert_allclose(scaled.S.numpy() / scale, plain.S, rtol=1e-6)  # powers of two: not even rounding differs, hardly
        assert scaled.bound / scale == pytest.approx(plain.bound, rel=1e-6) and scaled.error / scale == pytest.approx(plain.error, rel=1e-6)


# -- refusals

B, A = torch.ones(11, 3), torch.ones(3, 7)
NAN = torch.ones(11, 3).index_fill(0, torch.tensor([4]), math.nan)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: factored_svd(torch.ones(3), A), r"lora_B must be a matrix.*\(3,\)"),
    (lambda: factored_svd(torch.ones(11, 0), torch.ones(0, 7)), r"each at least 1; found shape \(11, 0\)"),
    (lambda: factored_svd(A, B), r"\(3, 7\) and \(11, 3\)\. They look swapped"),
    (lambda: factored_svd(B, torch.ones(4, 7)), r"must share r; found \(11, 3\) and \(4, 7\)"),
    (lambda: factored_svd(torch.ones(2, 11, 3), A), r"must share r; found \(2, 11, 3\)"),
    (lambda: factored_svd(NAN, A), "lora_B has 3 of 33 entries that are NaN"),
    (lambda: factored_svd(B, A * math.inf), "lora_A has 21 of 21"),
    (lambda: factored_svd(B, A, math.nan), "scaling must be a finite number"),
    (lambda: factored_svd(B * 1e30, A * 1e30), "overflows torch.float32"),
    (lambda: factored_svd(B + 1j, A), "lora_B is complex"),
    (lambda: best_rank_r(B, 0), "r must be a whole number, at least 1; found 0"),
    (lambda: best_rank_r(B, 1.5), "found 1.5"),
    (lambda: best_rank_r(B, True), "found True"),
    (lambda: best_rank_r((B,), 1), "found 1 items"),
    (lambda: best_rank_r(NAN, 1), "update has 3 of 33"),
    (lambda: energy(torch.tensor([1.0, 2.0])), "largest first"),
    (lambda: energy(torch.tensor(1.0)), r"found shape \(\)"),
    (lambda: effective_rank(torch.tensor([1.0, -2.0])), "not negative"),
    (lambda: stable_rank(torch.tensor([math.nan])), "finite"),
    (lambda: subspace_similarity(torch.eye(3), torch.eye(4), 1, 1), "d = 3 and 4"),
    (lambda: subspace_similarity(torch.eye(3), torch.eye(3), 0, 1), "i must be"),
    (lambda: subspace_similarity(torch.eye(3), torch.eye(3), 1, 4), "top 4 directions of B, whose numerical rank is 3"),
    (lambda: subspace_similarity((B, A), torch.eye(7), 2, 1), "numerical rank is 1.*ask for 1 or fewer"),
    (lambda: subspace_similarity((B * 0, A), torch.eye(7), 1, 1), "rank is 0.*start of training"),
    (lambda: amplification(torch.ones(7, 11), (B, A), 1), r"\(7, 11\) and \(11, 7\).*Conv1D"),
    (lambda: amplification(torch.ones(11, 7), (B, A), 2), "numerical rank is 1"),
    (lambda: amplification(torch.ones(2, 3, 3), torch.eye(3) * torch.tensor([[[1.0]], [[0.0]]]), 1), "rank is 0"),
    (lambda: factored_svdvals(A, B), "They look swapped"),
    (lambda: intruder_dimensions(torch.ones(7, 11), (B, A)), r"\(7, 11\) and \(11, 7\).*Conv1D"),
    (lambda: intruder_dimensions(torch.ones(11, 7), (B, A)), "top 10 directions; a 11 x 7 matrix has 7"),
    (lambda: intruder_dimensions(torch.ones(11, 7), (B, A), k=3, side="top"), "found 'top'"),
    (lambda: intruder_dimensions(torch.ones(11, 7), (B, A), k=3, epsilon=50), "0 to 1; found 50"),
    (lambda: intruder_dimensions(torch.ones(11, 7), (NAN, A), k=3), "lora_B has 3 of 33"),
    (lambda: intruder_dimensions(torch.ones(11, 7), (B,), k=3), "found 1 items"),
    (lambda: random_update((B, A), "equal"), "found 'equal'"),
    (lambda: random_update(torch.ones(2, 3, 3)), "not a stack"),
    (lambda: leading_svd(torch.ones(3, 4), 4), r"found shape \(3, 4\) and r = 4"),
    (lambda: leading_svd(torch.ones(2, 3, 4), 1), "one matrix"),
    (lambda: leading_svd(NAN, 1), "M has 3 of 33"),
    (lambda: leading_svd(torch.eye(3), 1, iterations=-1), "must not be negative; found 10 and -1"),
])
def test_refusals_say_what_was_found(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
