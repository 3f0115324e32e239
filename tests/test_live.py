"""Runs that change while they go, against a training loop written out by hand, and curves that forget no extreme."""

import math
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora_lab import TrainingDiverged, data, evaluate
from lora_lab.live import Curve, LiveRun, Problem, digits_problem, norm, text_problem, toy_problem
from lora_lab.teacher import Teacher

EXACT = Teacher((2.0, 1.0, 0.5, 0.2), 6, 9, seed=1)


@pytest.fixture
def problem():
    """The toy in float64, so that what differs is the formula and not the rounding."""
    return replace(toy_problem(EXACT), model=lambda seed: EXACT.model(torch.float64), batches=lambda seed: EXACT.batches(torch.float64))


class ByHand:
    """W0 + s B A trained by torch's own optimizer on the teacher's data: what a run has to agree with. B can have its own lr."""

    def __init__(self, run, optimizer=torch.optim.AdamW, lr_of_B=1.0):
        [layer] = run.layers.values()
        self.A, self.B = (p.detach().clone().requires_grad_(True) for p in (layer.lora_A, layer.lora_B))
        self.s, self.W0 = layer.scaling, EXACT.W0
        [(self.x, self.y)] = EXACT.batches(torch.float64)
        lr = run.settings["lr"]
        self.optimizer = optimizer([{"params": [self.A], "lr": lr}, {"params": [self.B], "lr": lr * lr_of_B}], weight_decay=0.0)

    @property
    def delta(self):
        return (self.s * self.B @ self.A).detach()

    def loss(self):
        return F.mse_loss(self.x @ (self.W0 + self.s * self.B @ self.A).T, self.y)

    def steps(self, n):
        losses = []
        for _ in range(n):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def advance(run, n):
    return [run.advance().loss for _ in range(n)]


def delta(run):
    [layer] = run.layers.values()
    return layer.delta_weight().detach().clone()


SAME = dict(rel=1e-9)  # float64, other order of the same sums, over tens of steps


@pytest.mark.parametrize(("optimizer", "by_torch"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_a_run_is_the_loop_one_would_write_by_hand(problem, optimizer, by_torch):
    run = LiveRun(problem, r=2, alpha=3, lr=0.02, optimizer=optimizer)
    hand = ByHand(run, by_torch)
    losses = advance(run, 40)
    assert losses == pytest.approx(hand.steps(40), **SAME)
    assert run.step == 40 and run.curve.points() == list(enumerate(losses, start=1))
    assert np.allclose(delta(run), hand.delta, rtol=1e-9, atol=1e-12)


def test_lr_and_volume_act_on_the_very_next_step(problem):
    run = LiveRun(problem, r=2, alpha=4, lr=0.02)
    hand = ByHand(run)
    advance(run, 10), hand.steps(10)
    run.set_lr(0.005)
    for group in hand.optimizer.param_groups:
        group["lr"] = 0.005
    made = run.advance()
    assert made.lr == 0.005 and made.step == 11 and made.loss == pytest.approx(hand.steps(1)[0], **SAME)
    before = delta(run)
    run.set_alpha(8, "volume"), run.set_alpha(16, "volume")  # many events of one slider between two steps are one move
    hand.s *= 4
    assert torch.equal(delta(run), 4 * before), "louder by 16 / 4, at once"
    assert advance(run, 10) == pytest.approx(hand.steps(10), **SAME)
    assert list(run.moves) == [(10, "lr", 0.005), (11, "alpha", 16.0)] and run.settings["alpha"] == 16 and run.settings["lr"] == 0.005


@pytest.mark.parametrize("k", [4.0, 0.5])
def test_step_size_keeps_the_function_to_the_last_bit(problem, k):
    """By powers of two, also in float32, where most training happens."""
    for made in (problem, toy_problem()):
        run = LiveRun(made, r=2, alpha=8, lr=0.02)
        advance(run, 25)
        [(x, _)] = made.batches(0)
        [layer] = run.layers.values()
        output, B, A = run.model(x).detach().clone(), layer.lora_B.detach().clone(), layer.lora_A.detach().clone()
        run.set_alpha(8 * k, "step size")
        assert torch.equal(run.model(x), output) and torch.equal(layer.lora_B, B / k) and torch.equal(layer.lora_A, A)
        assert layer.alpha == 8 * k


@pytest.mark.parametrize(("optimizer", "by_torch", "power"), [("adamw", torch.optim.AdamW, 1), ("sgd", torch.optim.SGD, 2)])
@pytest.mark.parametrize("k", [4.0, 0.25, 3.0])
def test_after_step_size_the_run_is_one_that_always_had_this_alpha(problem, optimizer, by_torch, power, k):
    """A run with alpha k times as large, B 1/k times as large and its lr divided by k (Adam) or k² (SGD) is the same run. So the oracle has
    the new alpha from the beginning, with that lr for B, and the plain lr for B from the change on: what its optimizer remembers is right."""
    run = LiveRun(problem, r=2, alpha=4, lr=0.01, optimizer=optimizer)
    twin = LiveRun(problem, r=2, alpha=4 * k, lr=0.01, optimizer=optimizer)  # the same A, from the same seed
    hand = ByHand(twin, by_torch, lr_of_B=k**-power)
    loose = dict(rel=1e-5)  # Adam's eps = 1e-8 stands beside gradients that are k times as large
    assert advance(run, 30) == pytest.approx(hand.steps(30), **loose)
    run.set_alpha(4 * k, "step size")
    hand.optimizer.param_groups[1]["lr"] = 0.01
    assert advance(run, 30) == pytest.approx(hand.steps(30), **loose)
    assert np.allclose(delta(run), hand.delta, rtol=1e-4, atol=1e-6)


def test_alpha_to_zero_and_back_is_a_matter_of_volume(problem):
    run = LiveRun(problem)
    advance(run, 3)
    with pytest.raises(ValueError, match='use mode "volume"'):
        run.set_alpha(0, "step size")
    before = delta(run)
    run.set_alpha(0)
    assert run.delta_norm() == 0
    with pytest.raises(ValueError, match='use mode "volume"'):
        run.set_alpha(8, "step size")
    run.set_alpha(8)
    assert torch.equal(delta(run), before)
    for value, mode, says in ((math.nan, "volume", "finite number; found nan"), (1.0, "loudness", "'volume', 'step size'; found 'loudness'")):
        with pytest.raises(ValueError, match=says):
            run.set_alpha(value, mode)
    for value in (-0.1, math.inf):
        with pytest.raises(ValueError, match="0 or more"):
            run.set_lr(value)


def test_restart_is_the_same_run_and_keeps_the_old_curve(problem):
    run = LiveRun(problem, r=2, steps=20)
    first = run.finish().curve.points()
    assert run.advance() is None and run.done and run.step == 20
    run.restart()
    assert run.step == 0 and len(run.curve) == 0 and run.finish().curve.points() == first
    run.restart(r=3, optimizer="sgd", lr=0.5)
    assert [e.settings["r"] for e in run.earlier] == [2], "twice the same run is kept once"
    assert run.settings == {"r": 3, "alpha": 8.0, "lr": 0.5, "optimizer": "sgd", "targets": "the layer", "steps": 20, "seed": 0}
    run.restart(r=1)
    assert [e.settings["r"] for e in run.earlier] == [2], "a run without a step leaves nothing"
    advance(run, 1)
    run.restart(r=4, keep=False)
    assert [e.settings["r"] for e in run.earlier] == [2]
    for r in (1, 2, 3, 4, 5, 6):
        run.restart(r=r)
        advance(run, 2)
    assert [e.settings["r"] for e in run.earlier] == [2, 3, 4, 5], "the last few"
    assert len({e.number for e in run.earlier} | {run.number}) == 5
    assert LiveRun(problem, r=2, steps=20, seed=1).finish().curve.points() != first, "another seed is another run"


def test_a_setting_that_is_refused_leaves_the_run_as_it_was(problem):
    run = LiveRun(problem, r=2)
    twin = LiveRun(problem, r=2)
    advance(run, 5), advance(twin, 5)
    for wrong, says in (
        ({"r": 0}, "at least 1"), ({"targets": "the layre"}, "'the layer'; found 'the layre'"), ({"optimizer": "adam"}, "'adamw', 'sgd'; found 'adam'"),
        ({"lr": -1.0}, "0 or more"), ({"alpha": math.inf}, "finite"), ({"steps": 0}, "at least 1; found 0"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=says):
            run.restart(**wrong)
        with pytest.raises((ValueError, TypeError), match=says):
            LiveRun(problem, **wrong)
    with pytest.raises(TypeError, match="rank; there are r, alpha"):
        run.restart(rank=3)
    assert run.settings == twin.settings and not run.earlier and advance(run, 5) == advance(twin, 5)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("the batch is broken")])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(problem, stop):
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 8:
            raise stop
        return EXACT.loss(model, batch)

    whole = LiveRun(problem, steps=20).finish().curve.points()
    run = LiveRun(replace(problem, loss=loss), steps=20)
    advance(run, 7)
    with pytest.raises(type(stop) if isinstance(stop, BaseException) else stop):
        run.advance()
    assert run.step == 7
    assert run.finish().curve.points() == whole, "same batches, same moments of Adam"
    assert run.advance() is None


def test_shuffled_batches_go_on_where_they_were_after_an_interruption():
    x, y = torch.randn(20, 64), torch.randint(0, 5, (20,))
    seen, broken = [], []

    def loss(model, batch):
        if len(seen) == 4 and not broken:
            broken.append(1)
            raise KeyboardInterrupt
        seen.append(batch[1].tolist())
        return F.cross_entropy(model(batch[0]), batch[1])

    problem = replace(digits_like(), batches=lambda seed: data.Batches(x, y, batch_size=8, seed=seed), loss=loss, steps=9)
    run = LiveRun(problem)
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    run.finish()
    expected = data.Batches(x, y, batch_size=8, seed=0).from_step(0)
    assert seen == [next(expected)[1].tolist() for _ in range(9)]


def digits_like():
    return Problem(
        name="one layer", model=lambda seed: torch.nn.Sequential(torch.nn.Linear(64, 5)), batches=lambda seed: [], targets={"it": ["0"]}, largest_r=5
    )


def test_divergence_is_told_and_can_be_mended(problem):
    run = LiveRun(problem, lr=1e4, optimizer="sgd")
    with pytest.raises(TrainingDiverged, match="lr 10000"):
        run.finish()
    step = run.step
    with pytest.raises(TrainingDiverged):
        run.advance()
    assert run.step == step and all(map(math.isfinite, (y for _, y in run.curve.points())))
    run.restart(lr=0.01)
    assert run.finish().curve.last[1] < run.curve.first[1]


def test_the_loss_now_is_the_one_that_the_next_step_reports(problem):
    for made in (problem, digits_problem()):
        run = LiveRun(made)
        for _ in range(3):
            expected, mode = run.loss_now(), run.model.training
            assert run.loss_now() == expected == run.advance().loss
            assert mode in (True, False)
        run.set_alpha(100)
        expected = run.loss_now()
        assert expected == run.advance().loss


def test_longer_than_planned(problem):
    run = LiveRun(problem, steps=10)
    run.finish()
    run.extend(5)
    run.finish()
    assert run.step == 15 and run.curve.points() == LiveRun(problem, steps=15).finish().curve.points()
    with pytest.raises(ValueError, match="1 step or more"):
        run.extend(0)


def test_torchs_random_state_is_left_alone(problem):
    digits_problem().model(0)
    state = torch.get_rng_state()
    run = LiveRun(digits_problem(), seed=4)
    advance(run, 2)
    run.restart(r=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_spectrum_and_norm_are_those_of_the_dense_update():
    run = LiveRun(digits_problem(), r=3, alpha=5)
    advance(run, 30)
    squares = 0.0
    for name, S in run.spectrum().items():
        layer = run.model.get_submodule(name)
        dense = 5 / 3 * layer.lora_B.detach().numpy().astype(float) @ layer.lora_A.detach().numpy().astype(float)
        expected = np.linalg.svd(dense, compute_uv=False)
        assert np.allclose(S, expected[:3], rtol=1e-4, atol=1e-6 * expected[0]) and expected[3] < 1e-6 * expected[0]  # float32 against float64
        squares += (dense**2).sum()
    assert set(run.spectrum()) == {"body.0", "body.2"}
    assert run.delta_norm() == pytest.approx(squares**0.5, rel=1e-5) and norm({}) == 0


def test_the_mean_is_the_loss_itself_or_smooths_it_without_a_bias_at_the_start(problem):
    run = LiveRun(problem, steps=30).finish()
    assert run.mean.points() == run.curve.points()
    run = LiveRun(replace(problem, smooth=5), steps=30)
    losses = advance(run, 30)
    weights = 0.8 ** np.arange(30)
    for step, mean in run.mean.points():
        now = np.array(losses[: int(step)][::-1])
        assert mean == pytest.approx((weights[: len(now)] * now).sum() / weights[: len(now)].sum(), rel=1e-12)


# ---------------------------------------------------------------- the problems


def test_the_toys_floor_is_drawn_beforehand_and_the_run_lands_on_it():
    problem = toy_problem()
    for r in (1, 3):
        run = LiveRun(problem, r=r).finish()
        assert run.floor() == pytest.approx(sum(4.0 ** (1 - i) for i in range(r, 10)) / 32, rel=1e-9), "the geometric tail, by hand"
        # Adam with a fixed learning rate trembles a little above the floor
        assert run.floor() * (1 - 1e-4) < run.curve.last[1] < 1.02 * run.floor()
    assert problem.floor(10) == 0 and problem.largest_r == 12 and problem.log and problem.instant
    learned = problem.samples(run.model)["matrices"]
    assert torch.equal(learned["teacher's ΔW*"], Teacher().delta) and torch.allclose(learned["learned ΔW"].float(), delta(run))
    assert torch.allclose(problem.spectrum["layer"], torch.tensor([2.0 ** (1 - i) for i in range(10)], dtype=torch.float64))


def test_the_digits_are_those_of_lab_02b_and_the_old_ones_are_measured_by_the_old_head():
    problem = digits_problem()
    base = problem.model(0)
    old = data.digits(classes=range(5), seed=0)
    right = (base.old_head(base.body(old.test[0])).argmax(-1) == old.test[1]).float().mean().item()
    assert right > 0.97 and problem.evaluate(base)["still right on 0 to 4"] == pytest.approx(right)
    run = LiveRun(problem, steps=150).finish()
    found = problem.evaluate(run.model)
    new = data.digits(classes=range(5, 10), seed=0)
    assert found["right on 5 to 9"] == evaluate(run.model, [(new.test[0], new.test[1] - 5)], "cpu") > 0.8
    assert found["still right on 0 to 4"] < right, "the body has moved"
    samples = problem.samples(run.model)
    assert samples["labels"] == sorted(samples["labels"]) and set(samples["labels"]) == set("56789") and samples["images"].shape == (10, 8, 8)
    assert samples["predicted"] == [str(5 + int(k)) for k in run.model(samples["images"].flatten(1)).argmax(-1)]
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained == {f"body.{i}.lora_{f}" for i in (0, 2) for f in "AB"} | {"head.trained.weight", "head.trained.bias"}
    only = LiveRun(problem, targets="second hidden layer", steps=1).finish()
    assert set(only.layers) == {"body.2"}


def test_leaning_digits_keep_the_head_and_get_five_labels_each():
    problem = digits_problem("leaning")
    run = LiveRun(problem)
    assert not [name for name, p in run.model.named_parameters() if p.requires_grad and "lora" not in name]
    [x, y] = next(iter(problem.batches(0)))
    assert sorted(y.tolist()) == sorted([*range(10)] * 5) and set(problem.samples(run.model)["labels"]) == set("0123456789")
    before = problem.evaluate(run.model)["right on leaning"]
    assert problem.evaluate(run.finish().model)["right on leaning"] > before
    with pytest.raises(ValueError, match="'5 to 9', 'leaning', 'turned'; found 'upside down'"):
        digits_problem("upside down")


def test_turned_digits_are_those_of_lab_00_and_rank_decides():
    problem = digits_problem("turned")
    base = problem.model(0)
    upright, turned = data.digits(seed=0).test, data.digits(rotation=90, seed=0).test
    assert evaluate(base, [upright], "cpu") > 0.9 and type(base.layer) is torch.nn.Linear and base.layer.weight.shape == (10, 64)
    assert problem.evaluate(base)["right on turned"] == evaluate(base, [turned], "cpu") < 0.25
    ends = [problem.evaluate(LiveRun(problem, r=r).finish().model)["right on turned"] for r in (1, 2, 4)]
    # one number per image can order ten digits, but hardly tell them apart; measured 0.33, 0.65 to 0.71, 0.87 to 0.90 over three seeds
    assert ends[0] < 0.5 < ends[1] < 0.8 < ends[2]
    with torch.no_grad():
        base.layer.weight.zero_()
    assert problem.model(0).layer.weight.any()


def test_a_fresh_model_every_time():
    problem = digits_problem()
    one, two = problem.model(0), problem.model(0)
    with torch.no_grad():
        one.body[0].weight.zero_()
    assert two.body[0].weight.any() and problem.model(0).body[0].weight.any()


@pytest.mark.parametrize(
    "made",
    [toy_problem(), toy_problem(EXACT), digits_problem(), digits_problem("leaning"), digits_problem("turned")],
    ids=["toy", "own teacher", "digits", "leaning", "turned"],
)
def test_the_code_repeats_the_run_to_the_last_bit(made):
    run = LiveRun(made, r=3, alpha=5, lr=0.02, optimizer="sgd", seed=2, steps=25).finish()
    space = {}
    exec(run.code(), space)
    assert space["losses"] == [y for _, y in run.curve.points()]
    assert "moved" not in run.code()
    run.set_lr(0.001)
    run.set_alpha(7.25)
    assert "lr=0.001" in run.code() and "alpha=7.25" in run.code() and "# Settings were moved" in run.code()
    exec(run.code(), space)


def test_the_code_runs_in_a_fresh_process():
    run = LiveRun(toy_problem(), steps=20).finish()
    done = subprocess.run([sys.executable, "-c", run.code()], capture_output=True, text=True, check=True)
    assert f"{run.curve.last[1]:.4g} at step 20" in done.stdout


def test_the_code_of_a_problem_of_ones_own_says_what_it_needs(problem):
    code = LiveRun(replace(problem, source=""), steps=5).code()
    assert "# `problem` is the Problem" in code
    exec(code, {"problem": problem})


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def texts():
    pytest.importorskip("transformers")
    return text_problem(batch_size=4)


def test_a_text_run_begins_with_the_base_models_own_loss(texts):
    """At step 1 B is 0, so the loss is the frozen model's; the oracle is transformers' loss on the same batch. And every run begins afresh."""
    batch = next(iter(texts.batches(3)))
    assert (batch["labels"] == -100).any() and batch["input_ids"].shape[0] == 4
    with torch.no_grad():
        expected = texts.model(3)(**batch).loss.item()
    run = LiveRun(texts, r=2, seed=3, steps=2)
    run.finish()
    assert run.curve.first[1] == pytest.approx(expected, rel=1e-5)  # float32, another order of the same sums
    assert run.curve.last[1] < expected and run.step == 2
    run.restart()
    assert run.loss_now() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("targets", "count"), [("all linear layers", 24), ("W_q and W_v", 6), ("the MLPs", 12)])
def test_targets_of_a_text_run_are_what_they_are_called(texts, targets, count):
    """Six blocks with four linear layers each, two of them in the MLP."""
    run = LiveRun(texts, r=2, targets=targets)
    assert len(run.layers) == count
    width = {name.rpartition(".")[2]: getattr(layer, "slices", None) for name, layer in run.layers.items()}
    assert targets != "W_q and W_v" or width == {"c_attn": (0, 2)}


def test_samples_of_a_text_run_are_what_the_model_writes_and_what_is_wrong_with_it(texts, monkeypatch):
    from lora_lab import live
    from lora_lab.data_to_text import load_task, slots
    from lora_lab.gpt2 import load_gpt2

    task = load_task("lighthouses")
    meaning, model = task.test[0].meaning, texts.model(0)
    _, tokenizer = load_gpt2("pocket")
    ids = torch.tensor([tokenizer(meaning + "<|endoftext|>")["input_ids"]])
    with torch.no_grad():  # greedy, token by token, without a cache
        written = []
        while len(written) < 64 and (not written or written[-1] != tokenizer.eos_token_id):
            written.append(int(model(torch.cat([ids, torch.tensor([written], dtype=torch.long)], dim=1)).logits[0, -1].argmax()))
    text = tokenizer.decode([token for token in written if token != tokenizer.eos_token_id]).strip()
    assert f"{meaning}\n\n→ {text}\n\n" in texts.samples(model)["text"]

    whole = task.template(slots(meaning))
    for written, said in (
        (whole, "all slots, and nothing else"),
        (whole + " You need a boat to get there. A footpath leads to it.", "not asked for: access : "),
        ("It is there.", "missing: name, "),
    ):
        monkeypatch.setattr(live, "generate", lambda *args, written=written, **more: f" {written}")
        assert said in texts.samples(model)["text"], written


def test_the_code_of_a_text_run_repeats_it(texts):
    run = LiveRun(texts, r=2, targets="W_q and W_v", steps=2).finish()
    space = {}
    exec(run.code(), space)
    assert space["losses"] == [y for _, y in run.curve.points()]
    with pytest.raises(IndexError):
        text_problem(show=120)


# ---------------------------------------------------------------- curves


def curve_of(values, most):
    curve = Curve(most)
    for x, y in enumerate(values):
        curve.append(x, y)
    return curve


@pytest.mark.parametrize("most", [8, 9, 10, 30, 31])
def test_a_curve_is_bounded_and_forgets_no_extreme(most):
    rng = random.Random(most)
    for n in (*range(1, 70), 500, 1023, 5000):
        values = [rng.gauss(0, 1) + (50 if rng.random() < 3 / n else 0) for _ in range(n)]
        points = curve_of(values, most).points()
        xs, ys = zip(*points, strict=True)
        assert len(points) <= most and list(xs) == sorted(set(xs))
        assert all(values[int(x)] == y for x, y in points), "points that were there, no averages"
        assert points[0] == (0, values[0]) and points[-1] == (n - 1, values[-1])
        assert min(ys) == min(values) and max(ys) == max(values)
        if n <= most // 2 - 1:
            assert len(points) == n, "few points are all kept"


def test_every_part_of_a_long_curve_keeps_its_extremes():
    """Not only the whole: a spike anywhere stays, as high as it was, beside a valley of the same part."""
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(4096)]
    curve = curve_of(values, 66)  # 32 buckets of 128
    points = dict(curve.points())
    for start in range(0, 4096, 128):
        part = values[start : start + 128]
        kept = [y for x, y in points.items() if start <= x < start + 128]
        assert max(part) in kept and min(part) in kept
    assert curve.lowest == min(values) and curve.highest == max(values) and len(curve) == 4096


def test_appending_is_cheap_on_average(monkeypatch):
    """Merges are counted, not seconds: fewer than three for each point, whatever the length."""
    from lora_lab import live

    calls, merged = [], live._merged
    monkeypatch.setattr(live, "_merged", lambda *pair: calls.append(1) or merged(*pair))
    for n in (1000, 50_000):
        calls.clear()
        curve_of(range(n), 100)
        assert len(calls) < 3 * n


def test_a_curve_takes_growing_finite_numbers():
    curve = curve_of([1.0, 2.0], 8)
    for x, y, says in ((2, math.nan, "finite"), (2, math.inf, "finite"), (math.nan, 1, "finite"), (1, 5, "x must grow: 1 comes after 1")):
        with pytest.raises(ValueError, match=says):
            curve.append(x, y)
    assert curve.points() == [(0, 1.0), (1, 2.0)]
    assert Curve().points() == [] and len(Curve()) == 0
    with pytest.raises(ValueError, match="8 points or more; found max_points=7"):
        Curve(7)
