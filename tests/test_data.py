"""The digits, compared with scikit-learn's own copy."""

import numpy as np
import pytest
import torch

from lora_lab import Batches, digits


@pytest.fixture(scope="module")
def bunch():
    return pytest.importorskip("sklearn.datasets").load_digits()


def rows(x):
    return [tuple(row) for row in x.numpy().tolist()]


PARTS = ("train", "validation", "test")


def test_shapes_types_and_range(bunch):
    split = digits()
    sizes = {}
    for name in PARTS:
        x, y = getattr(split, name)
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.shape == (len(y), 64)
        assert x.is_contiguous()
        assert float(x.min()) == 0.0 and float(x.max()) == 1.0
        sizes[name] = len(y)
    assert sum(sizes.values()) == len(bunch.target) == 1797
    # 25 % test, 20 % of the rest validation; rounding moves one sample
    assert abs(sizes["test"] - 449.25) <= 1 and abs(sizes["validation"] - 269.55) <= 1


@pytest.mark.parametrize("seed", [0, 7])
def test_the_parts_are_disjoint_and_together_the_whole_set(bunch, seed):
    original = {tuple(row): int(label) for row, label in zip((bunch.data / 16).tolist(), bunch.target, strict=True)}
    assert len(original) == 1797  # no two images are equal, so an image is its own name
    split, seen = digits(seed=seed), []
    for name in PARTS:
        x, y = getattr(split, name)
        seen += rows(x)
        assert all(original[row] == label for row, label in zip(rows(x), y.tolist(), strict=True))
    assert len(seen) == 1797 and set(seen) == set(original)


def test_every_digit_has_the_same_share_of_every_part(bunch):
    split, whole = digits(), np.bincount(bunch.target)
    for name, share in zip(PARTS, (0.6, 0.15, 0.25), strict=True):
        counts = np.bincount(getattr(split, name)[1].numpy(), minlength=10)
        assert np.all(np.abs(counts - share * whole) <= 2)  # two nested splits round to whole images, one each


def test_a_seed_decides_the_split_and_nothing_else_does():
    torch.manual_seed(1)
    np.random.seed(1)
    first = digits(seed=3)
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state()
    again, other = digits(seed=3), digits(seed=4)
    assert torch.equal(before, torch.get_rng_state())  # it draws from no global generator
    for name in PARTS:
        assert torch.equal(getattr(first, name)[0], getattr(again, name)[0])
        assert torch.equal(getattr(first, name)[1], getattr(again, name)[1])
    assert set(rows(first.test[0])) != set(rows(other.test[0]))


def test_an_image_stays_in_its_part_whatever_is_asked():
    """Pretrained on 0-4, adapted to 5-9 or to rotations: no test image of one task is a training image of another."""
    whole, turned = digits(), digits(rotation=90)
    low, high = digits(classes=[4, 0, 1, 2, 3]), digits(classes=range(5, 10))
    for name in PARTS:
        x, y = getattr(whole, name)
        for part, wanted in ((low, y < 5), (high, y >= 5)):
            assert torch.equal(getattr(part, name)[0], x[wanted])
            assert torch.equal(getattr(part, name)[1], y[wanted])  # labels stay the digits themselves
        assert torch.equal(getattr(turned, name)[1], y)
        assert torch.equal(getattr(turned, name)[0].view(-1, 8, 8), torch.rot90(x.view(-1, 8, 8), 1, (1, 2)))


@pytest.mark.parametrize(("rotation", "quarters"), [(0, 0), (90, 1), (180, 2), (270, 3), (360, 0), (-90, 3), (450.0, 1)])
def test_quarter_turns_are_exact_and_counter_clockwise(rotation, quarters):
    x, turned = digits().test[0].view(-1, 8, 8), digits(rotation=rotation).test[0].view(-1, 8, 8)
    assert torch.equal(turned, torch.rot90(x, quarters, (1, 2)))
    if quarters == 1:  # what is at the right ends at the top
        assert torch.equal(turned[:, 0, :], x[:, :, 7])


def test_other_angles_turn_the_same_way():
    near, exact = digits(rotation=89.9).test[0], digits(rotation=90).test[0]
    # 0.1 degrees move the corner, 5 pixels from the centre, by 0.009 pixels, across which grey changes by at most 1 a pixel in either
    # direction: 0.02. The border is no exception: what leaves the frame is paper, what stays keeps its ink
    assert float((near - exact).abs().max()) < 0.02
    tilted = digits(rotation=30).test[0]
    assert tilted.shape == exact.shape and 0 <= float(tilted.min()) and float(tilted.max()) <= 1
    assert not torch.equal(tilted, digits().test[0])
    # turning by 30 is nearer to upright than turning by 90 is
    upright = digits().test[0]
    assert float((tilted - upright).abs().mean()) < float((exact - upright).abs().mean())


@pytest.mark.parametrize("classes", [[], [10], [-1, 2], ["3"], [1.5]])
def test_classes_that_are_no_digits_are_refused(classes):
    with pytest.raises(ValueError, match="digits 0 to 9"):
        digits(classes=classes)


@pytest.mark.parametrize("rotation", [float("nan"), float("inf")])
def test_an_angle_that_is_no_number_is_refused(rotation):
    with pytest.raises(ValueError, match="rotation"):
        digits(rotation=rotation)


# ---- Batches --------------------------------------------------------------------------------------------------------


def taken(batches, n, start=0):
    stream = batches.from_step(start)
    return [next(stream) for _ in range(n)]


def test_an_epoch_has_every_sample_once():
    x = torch.arange(23.0).view(23, 1)
    batches = Batches(x, torch.arange(23), batch_size=5, seed=2)
    assert batches.per_epoch == 5
    orders = []
    for epoch in range(3):
        part = taken(batches, 5, start=5 * epoch)
        assert [len(y) for _, y in part] == [5, 5, 5, 5, 3]
        assert all(torch.equal(a.view(-1).long(), b) for a, b in part)  # x and y stay together
        order = torch.cat([y for _, y in part]).tolist()
        assert sorted(order) == list(range(23))
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] != sorted(orders[2])


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 12])
def test_from_step_is_a_shortcut_not_another_order(start):
    x = torch.arange(23.0).view(23, 1)
    batches = Batches(x, torch.arange(23), batch_size=5, seed=2)
    long = taken(batches, start + 7)[start:]
    for (a, _), (b, _) in zip(long, taken(batches, 7, start), strict=True):
        assert torch.equal(a, b)


def test_batches_leave_the_global_generator_alone_and_repeat():
    x, y = torch.randn(9, 2), torch.arange(9)
    before = torch.get_rng_state()
    first = next(iter(Batches(x, y, 4, seed=1)))
    torch.manual_seed(77)
    again = next(iter(Batches(x, y, 4, seed=1)))
    torch.set_rng_state(before)
    assert torch.equal(first[1], again[1])
    taken(Batches(x, y, 4, seed=1), 9)
    assert torch.equal(before, torch.get_rng_state())
    from_a_table = next(iter(Batches(x, y, 4, seed=np.int64(2**40))))  # times a million it is no int64 any more
    torch.testing.assert_close(from_a_table, next(iter(Batches(x, y, 4, seed=2**40))), rtol=0, atol=0)
    orders = {tuple(torch.cat([b for _, b in taken(Batches(x, y, 9, seed=s), 1)]).tolist()) for s in range(5)}
    assert len(orders) == 5


def test_a_batch_size_above_the_set_takes_all():
    (x, y), = taken(Batches(torch.randn(4, 2), torch.arange(4), batch_size=64), 1)
    assert x.shape == (4, 2) and sorted(y.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("n", "m", "size"), [(3, 4, 2), (0, 0, 2), (4, 4, 0)])
def test_batches_refuse_what_makes_no_sense(n, m, size):
    with pytest.raises(ValueError, match="found"):
        Batches(torch.randn(n, 2), torch.arange(m), batch_size=size)
