"""The training loop. The oracle for the arithmetic is the same loop written out with plain torch."""

import copy
import inspect
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lab import Batches, Step, TrainingDiverged, apply_lora, evaluate, lora_layers, train


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
