"""The teacher's floors against reduced-rank regression in numpy, and against students that are really trained."""

import numpy as np
import pytest
import torch
from torch.func import functional_call

from lora_lab import apply_lora, train
from lora_lab.teacher import GEOMETRIC, Teacher

UNEQUAL = dict(spectrum=(3.0, 2.0, 2.0, 0.5, 0.0), d_in=7, d_out=11, condition=30.0, inputs=23, seed=5)
TEACHERS = {"white": {}, "wide": dict(spectrum=(1.0, 0.3), d_in=9, d_out=4), "unequal inputs": UNEQUAL}


@pytest.fixture(params=TEACHERS.values(), ids=TEACHERS.keys())
def teacher(request):
    return Teacher(**request.param)


def data(teacher):
    """Inputs (n, d_in) and what is left to learn, y - W0 x (n, d_out), as numpy arrays, from what a student would see."""
    [(x, y)] = teacher.batches(torch.float64)
    W0 = teacher.model(torch.float64).layer.weight.detach()
    return x.numpy(), (y - x @ W0.T).numpy()


def test_the_floor_is_that_of_reduced_rank_regression(teacher):
    x, rest = data(teacher)
    coefficients, *_ = np.linalg.lstsq(x, rest, rcond=None)  # (d_in, d_out): least squares with no limit on the rank
    S = np.linalg.svd(x @ coefficients, compute_uv=False)  # of the fitted values: the tail is what a rank costs (Izenman 1975)
    for r in range(min(teacher.d_in, teacher.d_out) + 2):
        expected = (S[r:] ** 2).sum() / rest.size
        # float64 end to end; 1e-13 of the largest is the rounding of two SVDs
        assert teacher.floor(r) == pytest.approx(expected, rel=1e-9, abs=1e-13 * teacher.floor(0))


def test_the_best_update_has_its_rank_and_reaches_the_floor_with_real_inputs(teacher):
    for r in range(1, 1 + int((teacher.spectrum > 1e-9).sum())):
        best = teacher.best(r)
        assert np.linalg.matrix_rank(best.numpy(), tol=1e-8) <= r
        model = teacher.model(torch.float64)
        [(x, y)] = teacher.batches(torch.float64)
        found = functional_call(model, {"layer.weight": teacher.W0 + best}, (x,))
        assert float(((found - y) ** 2).mean()) == pytest.approx(teacher.floor(r), rel=1e-9, abs=1e-20)


def test_no_step_away_from_the_best_update_is_better(teacher):
    """In the tangent directions of rank r, B A + t (B' A + B A'), the loss is flat or rises: small random changes of the factors."""
    rng, r = np.random.default_rng(0), 1
    x, rest = data(teacher)
    U, S, Vh = np.linalg.svd(teacher.best(r).numpy())
    B, A = U[:, :r] * S[:r], Vh[:r]
    loss = lambda delta: ((x @ delta.T - rest) ** 2).mean()  # noqa: E731
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(50):
            moved = (B + size * rng.normal(size=B.shape)) @ (A + size * rng.normal(size=A.shape))
            assert loss(moved) >= teacher.floor(r) * (1 - 1e-12)


def test_excess_is_the_loss_of_any_update_without_looking_at_an_input(teacher):
    x, rest = data(teacher)
    rng = np.random.default_rng(1)
    for size in (0.0, 0.1, 10.0):
        delta = size * rng.normal(size=(teacher.d_out, teacher.d_in))
        assert teacher.excess(torch.from_numpy(delta)) == pytest.approx(((x @ delta.T - rest) ** 2).mean(), rel=1e-12)


@pytest.mark.parametrize("condition", [1.0, 10.0])
def test_students_land_on_their_floors_and_never_below(condition):
    teacher = Teacher((2.0, 1.0, 0.5), d_in=6, d_out=8, condition=condition)
    for r in (1, 2):
        torch.manual_seed(r)
        model = apply_lora(teacher.model(torch.float64), r=r, alpha=r, target_modules=["layer"])
        lr = lambda step: 0.05 * (1 - step / 1000)  # noqa: E731  falls to 0: Adam with a fixed lr keeps trembling
        losses = [step.loss for step in train(model, teacher.batches(torch.float64), 1000, lr, loss=teacher.loss)]
        assert losses[0] == pytest.approx(teacher.floor(0), rel=1e-12), "at step 1 ΔW is 0"
        assert min(losses) >= teacher.floor(r) * (1 - 1e-12) and losses[-1] == pytest.approx(teacher.floor(r), rel=1e-4)


def test_with_white_inputs_the_spectrum_is_the_one_asked_for_and_floors_divide_by_four():
    teacher = Teacher()
    assert np.allclose(np.linalg.svd(teacher.delta.numpy(), compute_uv=False)[:10], GEOMETRIC, rtol=1e-12)
    assert np.allclose(teacher.spectrum[:10], GEOMETRIC, rtol=1e-9)
    floors = np.array([teacher.floor(r) for r in range(8)])
    # A geometric series cut after 10 terms: the last ratios are a little above 4.
    assert ((floors[:-1] / floors[1:] >= 4) & (floors[:-1] / floors[1:] < 4.3)).all()


def test_the_inputs_have_exactly_the_covariance_that_was_asked_for():
    for condition in (1.0, 30.0):
        x = Teacher(**{**UNEQUAL, "condition": condition}).x.numpy()
        eigenvalues = np.linalg.eigvalsh(x.T @ x / len(x))
        assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(condition, rel=1e-9) and eigenvalues.mean() == pytest.approx(1)
        assert np.allclose(np.diff(np.log(eigenvalues)), np.log(condition) / (len(eigenvalues) - 1), atol=1e-9), "equal ratios"


def test_one_seed_is_one_problem_and_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    one, same, other = Teacher(seed=3), Teacher(seed=3), Teacher(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("W0", "delta", "x"):
        assert torch.equal(getattr(one, name), getattr(same, name)) and not torch.equal(getattr(one, name), getattr(other, name))


def test_its_text_makes_it_again():
    assert repr(Teacher()) == "Teacher()"
    for options in (UNEQUAL, {"seed": 2}, {"spectrum": (1.0,)}):
        made = Teacher(**options)
        again = eval(repr(made), {"Teacher": Teacher})
        assert torch.equal(again.x, made.x) and torch.equal(again.delta, made.delta) and torch.equal(again.W0, made.W0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"spectrum": ()}, "1 to 24 numbers"),
        ({"spectrum": range(30, 0, -1)}, "1 to 24 numbers"),
        ({"spectrum": (1.0, 2.0)}, "largest first"),
        ({"spectrum": (1.0, -1.0)}, "none negative"),
        ({"spectrum": (float("nan"),)}, "finite"),
        ({"inputs": 23}, "23 inputs.*ask for 24"),
        ({"condition": 0.5}, "1 or more; found 0.5"),
        ({"condition": float("nan")}, "1 or more; found nan"),
        ({"condition": float("inf")}, "finite, 1 or more; found inf"),
    ],
)
def test_what_makes_no_sense_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Teacher(**options)


def test_a_negative_rank_is_refused():
    with pytest.raises(ValueError, match="0 or more; found -1"):
        Teacher().floor(-1)
    with pytest.raises(ValueError, match="0 or more; found -1"):
        Teacher().best(-1)
