"""The training loop. The oracle for the arithmetic is the same loop written out with plain torch."""

import copy
import importlib
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab import Batches, Step, TrainingDiverged, apply_lora, evaluate, lora_layers, train
from lora_lab import updates as updates_module
from lora_lab.train import linear_schedule, token_loss
from lora_lab.updates import bf16_is_fast, choose_precision

train_module = importlib.import_module("lora_lab.train")  # `lora_lab.train` is the function


def model(dropout=0.0, norm=False, dtype=torch.float32):
    torch.manual_seed(3)
    parts = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 3)]
    return apply_lora(nn.Sequential(*parts).to(dtype), r=2, alpha=3, target_modules=["0", "4"], dropout=dropout)


def samples(n=20, dtype=torch.float32):
    torch.manual_seed(4)
    return torch.randn(n, 6, dtype=dtype), torch.arange(n) % 3


def state(m):
    return {k: v.clone() for k, v in m.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]


def numbers(steps):
    """What a step says, less its speed."""
    return [(s.step, s.loss, s.lr, s.grad_norm) for s in steps]


def by_hand(m, batches, steps, lr, optimizer, clip=None, weight_decay=0.0):
    parameters = [p for p in m.parameters() if p.requires_grad]
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    opt = kind(parameters, lr=lr if not callable(lr) else 0.0, weight_decay=weight_decay)
    seen = []
    m.train()
    for i, (x, y) in zip(range(steps), itertools.cycle(batches), strict=False):
        rate = lr(i) if callable(lr) else lr
        for group in opt.param_groups:
            group["lr"] = rate
        opt.zero_grad()
        loss = F.cross_entropy(m(x), y)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
        if clip is not None and norm > clip:
            for p in parameters:
                p.grad *= clip / norm
        opt.step()
        seen.append((i + 1, loss.item(), rate, norm))
    return seen


@pytest.mark.parametrize(("optimizer", "lr", "clip", "weight_decay"), [
    ("adamw", 0.05, None, 0.0), ("sgd", 0.3, None, 0.0), ("adamw", 0.05, None, 0.2),
    ("sgd", lambda step: 0.1 * (step + 1), None, 0.0), ("sgd", 0.3, 0.05, 0.0),
])
def test_equals_the_loop_written_out(optimizer, lr, clip, weight_decay):
    x, y = samples(dtype=torch.float64)
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    m, twin = model(dtype=torch.float64), model(dtype=torch.float64)
    steps = list(train(m, batches, 5, lr, optimizer=optimizer, clip=clip, weight_decay=weight_decay, device="cpu"))
    wanted = by_hand(twin, batches, 5, lr, optimizer, clip, weight_decay)
    assert all(isinstance(s, Step) and s.samples_per_s > 0 for s in steps)
    # clipping divides by norm + 1e-6 in torch and by norm here
    rel = 1e-4 if clip else 1e-10
    for got, want in zip(numbers(steps), wanted, strict=True):
        assert got == pytest.approx(want, rel=rel)
    for k, v in m.state_dict().items():
        torch.testing.assert_close(v, twin.state_dict()[k], rtol=rel, atol=rel)
    if clip:
        assert max(s.grad_norm for s in steps) > clip  # the norm is that before clipping


def test_frozen_weights_keep_their_bits_and_factors_move():
    m = model()
    before = state(m)
    list(train(m, [samples()], 3, 0.1, device="cpu"))
    for k, v in m.state_dict().items():
        assert torch.equal(v, before[k]) != ("lora_" in k), k


def test_the_loop_is_lazy_and_batches_go_round():
    m = model()
    before = state(m)
    run = train(m, [samples()], 4, 0.1, device="cpu")
    assert inspect.isgenerator(run) or iter(run) is run
    assert_same_bits(before, state(m))
    assert [s.step for s in run] == [1, 2, 3, 4]


def test_dict_batches_and_a_loss_of_ones_own():
    x, y = samples()

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model()

        def forward(self, inputs, labels):
            return type("Out", (), {"loss": F.cross_entropy(self.net(inputs), labels)})

    a = list(train(Output(), [{"inputs": x, "labels": y}], 2, 0.1, device="cpu"))
    b = list(train(model(), [(x, y)], 2, 0.1, device="cpu"))
    assert numbers(a) == numbers(b)
    c = list(train(model(), [(x, y)], 2, 0.1, device="cpu", loss=lambda m, batch: 2 * F.cross_entropy(m(batch[0]), batch[1])))
    assert c[0].loss == 2 * b[0].loss  # a factor 2 is exact


def test_a_callable_lr_is_asked_before_each_update():
    knob = {"lr": 0.1}
    m = model()
    run = train(m, [samples()], 3, lambda step: knob["lr"], optimizer="sgd", device="cpu")
    assert next(run).lr == 0.1
    before, knob["lr"] = state(m), 0.0
    assert next(run).lr == 0.0
    assert_same_bits(before, state(m))  # SGD with lr 0 moves nothing
    knob["lr"] = 0.7
    assert next(run).lr == 0.7


def test_seed_makes_dropout_repeatable():
    runs = [numbers(train(model(dropout=0.5), [samples()], 4, 0.1, seed=seed, device="cpu")) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    ({"steps": 0}, ["steps", "0"]), ({"lr": -0.1}, ["lr", "-0.1"]), ({"lr": math.nan}, ["lr", "nan"]),
    ({"lr": math.inf}, ["lr", "inf"]), ({"optimizer": "adam2"}, ["adam2", "adamw", "sgd"]),
])
def test_bad_arguments_are_refused_at_the_call(arguments, words):
    m = model()
    before = state(m)
    with pytest.raises(ValueError) as caught:  # at the call: nobody has iterated yet
        train(m, [samples()], **({"steps": 3, "lr": 0.1} | arguments))
    assert all(word in str(caught.value) for word in words)
    assert_same_bits(before, state(m))


def test_a_model_with_nothing_to_train_is_refused():
    m = model().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(m, [samples()], 3, 0.1)


@pytest.mark.parametrize("batches", [[], iter([samples()])])
def test_batches_that_run_out_say_so(batches):
    m = model().eval()
    with pytest.raises(ValueError, match="ran out|empty"):
        list(train(m, batches, 3, 0.1, device="cpu"))
    assert not any(module.training for module in m.modules())


# ---- when it goes wrong ---------------------------------------------------------------------------------------------


def test_a_nan_in_the_data_stops_with_step_lr_and_advice():
    x, y = samples()
    bad = x.clone()
    bad[3, 2] = math.nan
    m = model().eval()
    run = train(m, [(x, y), (x, y), (bad, y)], 10, 0.25, device="cpu")
    assert [next(run).step, next(run).step] == [1, 2]
    before = state(m)
    with pytest.raises(TrainingDiverged) as caught:
        next(run)
    message = str(caught.value)
    assert "step 3" in message and "0.25" in message and "nan" in message and "try" in message.lower()
    assert_same_bits(before, state(m))  # the model is that of step 2, without a NaN in it
    assert not any(module.training for module in m.modules())


def test_an_explosion_stops():
    m = model()
    with pytest.raises(TrainingDiverged, match="lr 1e"):
        list(train(m, [samples()], 50, 1e30, optimizer="sgd", device="cpu"))
    assert all(torch.isfinite(p).all() for p in m.parameters())


def test_an_infinite_gradient_under_a_finite_loss_stops():
    m = model()
    before = state(m)
    with pytest.raises(TrainingDiverged, match="gradient"):
        list(train(m, [samples()], 2, 0.1, device="cpu", loss=lambda net, batch: net(batch[0]).sum().mul(0).abs().sqrt()))
    assert_same_bits(before, state(m))


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1.0])
def test_an_lr_function_that_breaks_later_ruins_no_weight(rate):
    m = model()
    with pytest.raises((ValueError, TrainingDiverged), match="lr"):
        list(train(m, [samples()], 6, lambda step: 0.1 if step < 2 else rate, optimizer="sgd", device="cpu"))
    assert all(torch.isfinite(p).all() for p in m.parameters())


@pytest.mark.parametrize("how", ["break", "close", "KeyboardInterrupt", "error in loss"])
def test_however_it_ends_the_model_is_usable(how):
    m = model(dropout=0.2)
    m.eval()
    m[0].train()  # a mixed model: one flag for all of it would not do
    modes = [module.training for module in m.modules()]
    calls = []

    def loss(net, batch):
        calls.append(net[4].training)
        if len(calls) == 3 and how == "KeyboardInterrupt":
            raise KeyboardInterrupt
        if len(calls) == 3 and how == "error in loss":
            raise ZeroDivisionError
        return F.cross_entropy(net(batch[0]), batch[1])

    run = train(m, [samples()], 9, 0.1, loss=loss, device="cpu")
    if how in ("break", "close"):
        next(run), next(run)
        run.close()
    else:
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            list(run)
    assert all(calls)  # in training mode during the run
    assert [module.training for module in m.modules()] == modes
    assert all(torch.isfinite(p).all() for p in m.parameters())
    assert [s.step for s in train(m, [samples()], 2, 0.1, device="cpu")] == [1, 2]


# ---- saved and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["list", "Batches"])
@pytest.mark.parametrize("norm", [False, True])
def test_resumed_runs_continue_bit_for_bit(tmp_path, optimizer, kind, norm):
    x, y = samples()
    batches = {"list": [(x[:9], y[:9]), (x[9:], y[9:]), (x, y)], "Batches": Batches(x, y, batch_size=6, seed=5)}[kind]
    settings = {"optimizer": optimizer, "weight_decay": 0.1, "seed": 8, "device": "cpu"}
    whole, halves = model(dropout=0.4, norm=norm), model(dropout=0.4, norm=norm)
    wanted = numbers(train(whole, batches, 11, 0.05, **settings))

    file = tmp_path / "run.safetensors"
    first = list(itertools.islice(train(halves, batches, 11, 0.05, checkpoint=file, checkpoint_every=4, **settings), 6))
    assert file.exists()
    torch.manual_seed(999)  # another process has another random state
    fresh = model(dropout=0.4, norm=norm)
    second = numbers(train(fresh, batches, 11, 0.05, checkpoint=file, checkpoint_every=4, **settings))
    assert [s[0] for s in second] == [5, 6, 7, 8, 9, 10, 11]  # the file held step 4
    assert numbers(first)[:4] + second == wanted
    assert_same_bits(state(whole), state(fresh))
    assert list(train(fresh, batches, 11, 0.05, checkpoint=file, **settings)) == []  # it is done
    longer = numbers(train(fresh, batches, 13, 0.05, checkpoint=file, **settings))
    assert [s[0] for s in longer] == [12, 13]


def test_resuming_with_a_shuffling_dataloader(tmp_path):
    x, y = samples()

    def loader():
        return torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=6, shuffle=True,
                                           generator=torch.Generator().manual_seed(3))

    whole = model()
    wanted = numbers(train(whole, loader(), 9, 0.05, seed=1, device="cpu"))
    file = tmp_path / "run.safetensors"
    list(itertools.islice(train(model(), loader(), 9, 0.05, seed=1, checkpoint=file, checkpoint_every=5, device="cpu"), 5))
    fresh = model()
    assert numbers(train(fresh, loader(), 9, 0.05, seed=1, checkpoint=file, device="cpu")) == wanted[5:]
    assert_same_bits(state(whole), state(fresh))


@pytest.mark.parametrize("case", ["garbage", "empty", "cut", "other shapes", "other names", "other optimizer"])
def test_a_checkpoint_that_does_not_fit_is_refused_untouched(tmp_path, case):
    file = tmp_path / "run.safetensors"
    list(train(model(), [samples()], 2, 0.1, checkpoint=file, device="cpu"))
    m, settings = model(), {}
    if case == "garbage":
        file.write_bytes(b"not a checkpoint" * 10)
    elif case == "empty":
        file.write_bytes(b"")
    elif case == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif case == "other shapes":
        m = apply_lora(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), r=5, target_modules=["0"])
    elif case == "other names":
        m = apply_lora(nn.Sequential(nn.Identity(), nn.Linear(6, 3)), r=2, target_modules=["1"])
    else:
        settings = {"optimizer": "sgd"}
    before, content = state(m), file.read_bytes()
    with pytest.raises(ValueError, match="run.safetensors"):
        list(train(m, [samples()], 4, 0.1, checkpoint=file, device="cpu", **settings))
    assert_same_bits(before, state(m))
    assert file.read_bytes() == content


def test_progress_bar_writes_and_changes_nothing(capsys):
    a = numbers(train(model(), [samples()], 3, 0.1, progress=True, device="cpu"))
    shown = capsys.readouterr()
    assert "3/3" in shown.err + shown.out
    b = numbers(train(model(), [samples()], 3, 0.1, device="cpu"))
    silent = capsys.readouterr()
    assert silent.err + silent.out == ""
    assert a == b


# ---- precision, accumulation, compilation ---------------------------------------------------------------------------


def test_bf16_is_near_fp32_and_leaves_the_weights_in_fp32():
    exact, rough = model(), model()
    x, y = samples(200)
    a = numbers(train(exact, [(x, y)], 6, 0.02, device="cpu"))
    b = numbers(train(rough, [(x, y)], 6, 0.02, device="cpu", precision="bf16"))
    assert all(p.dtype == torch.float32 for p in rough.parameters())
    assert a != b  # it really calculates with 8 bits
    # bf16 rounds to 2^-9; a mean over 200 samples of a few such roundings, and the norm of gradients of which many cancel
    assert b[0][3] == pytest.approx(a[0][3], rel=0.05)
    for (_, loss, _, _), (_, loss2, _, _) in zip(a, b, strict=True):
        assert loss2 == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_that_are_not_in_float32_are_calculated_as_they_are(monkeypatch, dtype):
    monkeypatch.setattr(train_module, "choose_precision", lambda precision, device: {"auto": "fp16"}.get(precision, precision))
    x, y = samples(dtype=dtype)
    a = numbers(train(model(dtype=dtype), [(x, y)], 3, 0.01, optimizer="sgd", device="cpu", precision="fp32"))
    assert a == numbers(train(model(dtype=dtype), [(x, y)], 3, 0.01, optimizer="sgd", device="cpu"))


@pytest.mark.parametrize(("capability", "wanted"), [
    ((6, 1), "fp32"), ((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((12, 0), "bf16"),
])
def test_auto_precision_asks_the_card(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_precision("auto", torch.device("cuda")) == wanted
    assert choose_precision("fp32", torch.device("cuda")) == "fp32"
    assert choose_precision("auto", torch.device("cpu")) == choose_precision("auto", torch.device("mps")) == "fp32"


def test_bf16_is_fast_reads_the_processor(monkeypatch):
    for flags, wanted in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert bf16_is_fast() is wanted
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert bf16_is_fast() is False


def test_fp16_skips_what_overflows_and_finds_its_scale():
    """A gradient of a few thousand overflows at the first scale, 65,536; after some halvings it does not."""
    m, (x, y) = model(), samples()
    before = state(m)

    def steep(net, batch):
        return 3000 * F.cross_entropy(net(batch[0]), batch[1])

    run = train(m, [(x, y)], 14, 1e-4, precision="fp16", device="cpu", loss=steep)
    first = next(run)
    assert math.isinf(first.grad_norm) or math.isnan(first.grad_norm)
    assert_same_bits(before, state(m))  # skipped
    steps = [first, *run]
    assert math.isfinite(steps[-1].grad_norm) and steps[-1].loss < first.loss
    exact = next(train(model(), [(x, y)], 1, 1e-4, device="cpu", loss=steep))
    finite = next(s for s in steps if math.isfinite(s.grad_norm))
    assert finite.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)  # unscaled before it is told: a scale left in would be 2 and more


def test_fp16_gives_up_when_no_scale_helps():
    m = model()
    before = state(m)
    with pytest.raises(TrainingDiverged, match="gradient"):
        list(train(m, [samples()], 60, 0.1, precision="fp16", device="cpu", loss=lambda net, batch: net(batch[0]).sum().mul(0).abs().sqrt()))
    assert_same_bits(before, state(m))


def test_fp16_continues_with_its_scale(tmp_path):
    def run(count=None, **more):
        m = model(dropout=0.3)
        steps = train(m, [samples()], 9, 0.01, precision="fp16", device="cpu", seed=2, loss=lambda n, b: 3000 * F.cross_entropy(n(b[0]), b[1]), **more)
        return [repr(s) for s in numbers(itertools.islice(steps, count))], state(m)

    whole, weights = run()
    file = tmp_path / "run.safetensors"
    run(4, checkpoint=file, checkpoint_every=3)
    rest, again = run(checkpoint=file)
    assert rest == whole[3:]
    assert_same_bits(weights, again)


def test_a_precision_that_is_none_is_refused():
    with pytest.raises(ValueError, match="half.*bf16"):
        train(model(), [samples()], 2, 0.1, precision="half")
    with pytest.raises(ValueError, match="accumulate"):
        train(model(), [samples()], 2, 0.1, accumulate=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_autocast_around_the_run_changes_nothing(precision):
    """It keeps weights that it has converted until it ends, so that a run would go on with those of its first step."""
    a = numbers(train(model(), [samples()], 4, 0.1, device="cpu", precision=precision))
    with torch.autocast("cpu", torch.bfloat16):
        b = numbers(train(model(), [samples()], 4, 0.1, device="cpu", precision=precision))
    assert a == b


@pytest.mark.parametrize("kind", ["list", "Batches"])
def test_accumulated_batches_are_one_large_one(kind, tmp_path):
    x, y = samples(24, torch.float64)
    small = [(x[i : i + 6], y[i : i + 6]) for i in range(0, 24, 6)]
    large = [(x[i : i + 12], y[i : i + 12]) for i in (0, 12)]
    if kind == "Batches":
        stream = Batches(x, y, batch_size=6, seed=3)
        small, taken = stream, list(itertools.islice(iter(stream), 10))
        large = [(torch.cat((a[0], b[0])), torch.cat((a[1], b[1]))) for a, b in zip(taken[::2], taken[1::2], strict=True)]
    m, twin = model(dtype=torch.float64), model(dtype=torch.float64)
    got = numbers(train(m, small, 5, 0.05, device="cpu", accumulate=2))
    wanted = by_hand(twin, large, 5, 0.05, "adamw")
    for a, b in zip(got, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-9)  # the mean of two means of six is that of twelve; float64, other order of sums
    file = tmp_path / "run.safetensors"
    list(itertools.islice(train(model(dtype=torch.float64), small, 5, 0.05, device="cpu", accumulate=2, checkpoint=file, checkpoint_every=2), 3))
    assert numbers(train(model(dtype=torch.float64), small, 5, 0.05, device="cpu", accumulate=2, checkpoint=file)) == got[2:]
    with pytest.raises(ValueError, match="another run"):
        list(train(model(dtype=torch.float64), small, 7, 0.05, device="cpu", checkpoint=file))


@pytest.mark.slow
def test_compiled_is_the_same(c_compiler):
    a = numbers(train(model(), [samples()], 4, 0.1, device="cpu"))
    m = model().eval()
    b = numbers(train(m, [samples()], 4, 0.1, device="cpu", compile=True))
    assert not m.training
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=1e-4)  # float32, fused differently


# ---- as on a GPU: numbers stay on the device ------------------------------------------------------------------------


@pytest.fixture
def lazy(monkeypatch):
    """The CPU treated as a GPU is: torch's fused CPU optimizers can skip a step on the device, too."""
    monkeypatch.setattr(updates_module, "CHECK_EVERY", {"cpu": 4})


@pytest.mark.parametrize(("optimizer", "clip"), [("adamw", None), ("sgd", 0.05), ("adamw", 0.05)])
def test_late_numbers_are_the_same_numbers(lazy, monkeypatch, optimizer, clip):
    steps = list(train(model(), Batches(*samples(), 6), 11, 0.05, optimizer=optimizer, clip=clip, device="cpu"))
    monkeypatch.setattr(updates_module, "CHECK_EVERY", {})
    wanted = numbers(train(model(), Batches(*samples(), 6), 11, 0.05, optimizer=optimizer, clip=clip, device="cpu"))
    assert all(isinstance(s, Step) for s in steps)
    for a, b in zip(numbers(steps), wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # the fused update rounds differently, float32
    assert all(s.samples_per_s > 0 for s in steps)  # the first step is looked at, so there is a speed from the start


def test_nobody_waits_for_a_number_between_looks(lazy, monkeypatch):
    """Every way in which torch gives a number to Python goes through one of these."""
    waits = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "__index__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, _real=real, _name=name: (waits.append(_name), _real(self, *a))[1])
    batches = [samples()]
    run = train(model(), batches, 20, 0.05, clip=1.0, device="cpu")
    seen, kept = [], []
    for done in run:
        seen.append(len(waits))
        kept.append(done)
        waits.clear()
    assert [i + 1 for i, n in enumerate(seen) if n] == [1, 4, 8, 12, 16, 20]
    assert len(kept) == 20 and not any("_numbers" in s.__dict__ for s in kept)  # nothing of the device is held by old steps
    assert all(math.isfinite(s.loss) for s in kept) and not waits


def test_reading_a_late_loss_early_works(lazy):
    run = train(model(), [samples()], 7, 0.05, device="cpu")
    wanted = [s.loss for s in train(model(), [samples()], 7, 0.05, device="cpu")]
    assert [s.loss for s in run] == wanted


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("bad_step", [1, 4, 6, 7])
def test_divergence_is_found_late_and_does_no_harm(lazy, precision, bad_step):
    x, y = samples()
    bad = x.clone()
    bad[3, 2] = math.nan
    batches = [(x, y)] * (bad_step - 1) + [(bad, y)] + [(x, y)] * 20
    m, seen = model(), []
    with pytest.raises(TrainingDiverged, match=f"step {bad_step}, lr 0.05: the loss is nan"):
        for s in train(m, batches, 20, 0.05, device="cpu", precision=precision):
            seen.append(s.step)
    assert len(seen) < bad_step + 4
    twin = model()
    if bad_step > 1:
        list(train(twin, batches, bad_step - 1, 0.05, device="cpu", precision=precision))
    assert_same_bits(state(m), state(twin))  # the weights from before the bad step, though several more were run


def test_an_infinite_gradient_is_skipped_late_too(lazy):
    m = model()
    before = state(m)
    with pytest.raises(TrainingDiverged, match="step 1.*gradient"):
        list(train(m, [samples()], 9, 0.1, device="cpu", loss=lambda net, batch: net(batch[0]).sum().mul(0).abs().sqrt()))
    assert_same_bits(before, state(m))


def test_stopping_between_looks_leaves_finite_weights(lazy):
    x, y = samples()
    m = model()
    run = train(m, [(x, y), (x, y), (x * math.nan, y), (x, y)], 20, 0.05, device="cpu")
    assert [next(run).step for _ in range(3)] == [1, 2, 3]
    run.close()
    assert all(torch.isfinite(p).all() for p in m.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_of_ones_own_under_late_looks(lazy, fused):
    made = []

    def mine(parameters):
        made.append(torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0, fused=fused))
        return made[0]

    x, y = samples()
    m = model()
    with pytest.raises(TrainingDiverged, match="step 6"):
        list(train(m, [(x, y)] * 5 + [(x * math.nan, y)], 12, 0.05, optimizer=mine, device="cpu"))
    twin = model()
    list(train(twin, [(x, y)], 5, 0.05, device="cpu", optimizer=lambda p: torch.optim.AdamW(p, weight_decay=0.0, fused=fused)))
    assert_same_bits(state(m), state(twin))
    assert "found_inf" not in made[0].__dict__ and "grad_scale" not in made[0].__dict__


def test_fused_runs_continue_bit_for_bit(lazy, tmp_path):
    whole, file = model(dropout=0.4), tmp_path / "run.safetensors"
    settings = {"seed": 8, "device": "cpu", "weight_decay": 0.1}
    wanted = numbers(train(whole, Batches(*samples(), 6), 11, 0.05, **settings))
    list(itertools.islice(train(model(dropout=0.4), Batches(*samples(), 6), 11, 0.05, checkpoint=file, checkpoint_every=3, **settings), 8))
    fresh = model(dropout=0.4)
    assert numbers(train(fresh, Batches(*samples(), 6), 11, 0.05, checkpoint=file, **settings)) == wanted[6:]
    assert_same_bits(state(whole), state(fresh))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_synchronises():
    m = model().cuda()
    run = train(m, [samples()], 60, 0.01, device="cuda", clip=1.0)
    for done in itertools.islice(run, 32):
        torch.cuda.set_sync_debug_mode("error" if (done.step + 1) % 16 else "default")
    torch.cuda.set_sync_debug_mode("default")
    losses = [done.loss for done in run]
    assert losses[-1] < losses[0]


# ---- language models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_loss_is_the_smoothed_cross_entropy_of_the_next_token(smoothing):
    torch.manual_seed(5)
    logits, ids = torch.randn(2, 6, 11), torch.randint(11, (2, 6))
    labels = ids.clone()
    labels[0, :3] = labels[1, 5] = -100
    seen = []

    def net(**inputs):
        seen.append(inputs)
        return type("Out", (), {"logits": logits})

    total, count = 0.0, 0
    logp = logits.double().log_softmax(-1)
    for row, t in itertools.product(range(2), range(1, 6)):
        if labels[row, t] != -100:
            p = torch.full((11,), smoothing / 11, dtype=torch.float64)
            p[labels[row, t]] += 1 - smoothing
            total, count = total - float((p * logp[row, t - 1]).sum()), count + 1
    got = float(token_loss(smoothing)(net, {"input_ids": ids, "labels": labels}))
    assert got == pytest.approx(total / count, rel=1e-5)  # float32 against float64
    assert seen[0].keys() == {"input_ids"}  # no labels: the model would calculate a second loss
    with pytest.raises(ValueError, match="label_smoothing"):
        token_loss(1.0)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (10, 4), (7, 6), (1, 0)])
def test_the_schedule_goes_up_and_down_in_lines(steps, warmup):
    rate = linear_schedule(0.3, steps, warmup)
    wanted = np.interp(range(steps + 2), [-1, warmup, steps] if warmup else [0, steps], [0, 0.3, 0] if warmup else [0.3, 0])
    np.testing.assert_allclose([rate(i) for i in range(steps + 2)], wanted, rtol=1e-12, atol=1e-15)
    assert min(rate(i) for i in range(steps)) > 0  # no step is wasted


@pytest.mark.parametrize(("steps", "warmup"), [(10, 10), (10, -1), (0, 0)])
def test_a_schedule_that_never_comes_down_is_refused(steps, warmup):
    with pytest.raises(ValueError, match="warm"):
        linear_schedule(0.1, steps, warmup)


# ---- evaluate -------------------------------------------------------------------------------------------------------


def test_evaluate_is_accuracy_in_eval_mode():
    m = model(dropout=0.6, norm=True)
    for layer in lora_layers(m).values():
        nn.init.normal_(layer.lora_B)
    x, y = samples(50)
    m.train()
    m[3].eval()
    modes, before = [module.training for module in m.modules()], state(m)
    wanted = copy.deepcopy(m).eval()(x).argmax(-1).eq(y).double().mean().item()
    # correctly rounded quotients of the same two integers
    assert evaluate(m, [(x, y)], device="cpu") == pytest.approx(wanted, rel=1e-15)
    assert evaluate(m, [(x[:13], y[:13]), (x[13:], y[13:])], device="cpu") == pytest.approx(wanted, rel=1e-15)
    assert [module.training for module in m.modules()] == modes
    assert_same_bits(before, state(m))  # running statistics of the norm included
    assert 0 < wanted < 1


def test_evaluate_refuses_no_samples():
    with pytest.raises(ValueError, match="sample"):
        evaluate(model(), [], device="cpu")


def test_evaluate_does_not_go_round_for_ever():
    """Batches never ends; a learner who passes it to evaluate gets a number or a sentence, not a hanging cell."""
    class Counted(Batches):
        def from_step(self, step):
            for i, batch in enumerate(super().from_step(step)):
                assert i < 1000, "evaluate went on after a thousand batches"
                yield batch

    m, (x, y) = model(), samples()
    try:
        got = evaluate(m, Counted(x, y, batch_size=6), device="cpu")
    except (ValueError, TypeError) as error:
        assert "Batches" in str(error)
        return
    assert got == pytest.approx(evaluate(m, [(x, y)], device="cpu"), rel=1e-15)
