"""The flight recorder against states kept by hand, numpy's dense SVD, and torch.func.functional_call."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from lora_lab import apply_lora, lora_layers, merge, remove_lora, train, unmerge
from lora_lab import recorder as recorder_module
from lora_lab.layers import LoRAFusedLinear
from lora_lab.recorder import LOSSES, MOMENTS, FlightRecorder
from lora_lab.teacher import Teacher


class Conv1D(nn.Module):
    """As in transformers: y = x W + b, with W (in, out)."""

    def __init__(self, out, inputs):
        super().__init__()
        self.nf = out
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, out) / inputs**0.5), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Zoo(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.fused = Conv1D(18, 6)
        self.plain = nn.Linear(18, 12)
        self.image = nn.Conv2d(3, 5, (2, 2))
        self.head = nn.Linear(5, 4)

    def forward(self, tokens):
        x = torch.tanh(self.plain(torch.tanh(self.fused(self.words(tokens)))))
        return self.head(self.image(x.view(-1, 3, 2, 2)).flatten(1))


TARGETS = ["words", "fused:q,v", "plain", "image"]
TOKENS = torch.arange(10)
GOAL = torch.linspace(-1, 1, 40).view(10, 4)


def batches():
    return [(TOKENS, GOAL)]


def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def zoo(r=3, alpha=5.0, **options):
    torch.manual_seed(0)
    return apply_lora(Zoo(), r=r, alpha=alpha, target_modules=TARGETS, **options)


def fly(model, steps=20, recorder=None, **options):
    """Train with a recorder; returns it and, by number of updates, what the model was: its own copy of every tensor."""
    recorder = recorder or FlightRecorder(every=1)
    recorder.watch(model)
    kept = {0: copy.deepcopy(model.state_dict())}
    for step in train(model, batches(), steps=steps, lr=0.03, loss=loss, device="cpu", **options):
        recorder.record(step.step, loss=step.loss)
        kept[step.step] = copy.deepcopy(model.state_dict())
    return recorder, kept


def cut(matrix, rank):
    """Eckart and Young, densely, in numpy."""
    U, S, Vh = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def expected_output(model, state, rank, volume, x=TOKENS):
    """The base with W0 + volume * (ΔW cut to rank), built densely and run by functional_call on a plain model."""
    plain, weights = Zoo(), {}
    for name, value in state.items():
        weights[name.replace("base_layer.", "")] = value
    for name, layer in lora_layers(model).items():
        A, B = state[f"{name}.lora_A"].double(), state[f"{name}.lora_B"].double()
        W0 = state[f"{name}.base_layer.weight"].double()
        scaling = volume * layer.alpha / layer.r
        if isinstance(layer, LoRAFusedLinear):
            delta = torch.zeros(18, 6, dtype=torch.float64)
            for k, place in enumerate(layer.slices):
                part = B[6 * k : 6 * k + 6] @ A[layer.r * k : layer.r * k + layer.r]
                delta[6 * place : 6 * place + 6] = torch.from_numpy(cut(part, rank))
        else:
            delta = torch.from_numpy(cut(B @ A, rank))
        delta = scaling * delta
        weights[f"{name}.weight"] = (W0 + (delta.T if name in ("words", "fused") else delta.view(W0.shape))).float()
    weights = {name: value for name, value in weights.items() if "lora_" not in name}
    return functional_call(plain, weights, (x,)).detach()


def test_every_moment_is_what_was_there_to_the_last_bit():
    model = zoo()
    recorder, kept = fly(model)
    assert recorder.times == list(range(21))
    for i, time in enumerate(recorder.times):
        state = recorder.state(i)
        assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(torch.equal(value, kept[time][name]) for name, value in state.items())
        played = recorder.replay(i)
        assert all(torch.equal(value, kept[time][name]) for name, value in played.state_dict().items())


@pytest.mark.parametrize("volume", [1.0, 0.0, -0.7, 2.5])
def test_played_back_at_a_rank_every_layer_is_the_nearest_of_that_rank(volume):
    model = zoo()
    recorder, kept = fly(model)
    for time in (0, 3, 20):
        for rank in (0, 1, 2, 3, None):
            found = recorder.replay(recorder.nearest(time), rank, volume)(TOKENS)
            expected = expected_output(model, kept[time], 3 if rank is None else rank, volume)
            assert torch.allclose(found, expected, atol=2e-5)  # float32 factors, outputs of size 1: 170 eps


def test_the_factors_and_spectra_are_those_of_delta_w():
    model = zoo()
    recorder, kept = fly(model)
    factors, spectra = recorder.factors(-1), recorder.spectra(-1, volume=-2.0)
    for name, layer in lora_layers(model).items():
        B, A, scaling = factors[name]
        assert scaling == 5.0 / 3
        dense = layer.delta_weight().detach().double().numpy()
        S = np.linalg.svd(dense, compute_uv=False)
        if isinstance(layer, LoRAFusedLinear):
            assert B.shape == (2, 6, 3) and A.shape == (2, 3, 6)
            S = np.sort(np.concatenate([np.linalg.svd(dense[rows], compute_uv=False)[:3] for rows in (slice(0, 6), slice(12, 18))]))[::-1]
        else:
            assert np.allclose(scaling * (B @ A).numpy(), dense, atol=1e-6)  # float32
        assert np.allclose(spectra[name].numpy(), 2 * S[: len(spectra[name])], atol=1e-5)  # float32, S of size 1
        assert len(spectra[name]) == (6 if name == "fused" else 3)


def test_rslora_and_an_alpha_moved_in_flight_are_remembered():
    model = zoo(rslora=True)
    recorder = FlightRecorder(every=1).watch(model)
    for step in train(model, batches(), steps=6, lr=0.03, loss=loss, device="cpu"):
        if step.step == 3:
            for layer in lora_layers(model).values():
                layer.alpha = 11.0
        recorder.record(step.step)
    assert [set(recorder.alphas(i).values()) for i in (2, 3, 6)] == [{5.0}, {11.0}, {11.0}]
    assert recorder.factors(2)["plain"][2] == 5 / math.sqrt(3) and recorder.factors(3)["plain"][2] == 11 / math.sqrt(3)
    played = recorder.replay(2, volume=2.0)
    assert {layer.alpha for layer in lora_layers(played).values()} == {10.0}


def test_what_trains_beside_the_adapters_is_played_back_too():
    model = zoo(modules_to_save=["head"], bias="lora_only")
    recorder, kept = fly(model)
    for time in (0, 9):
        x = model(TOKENS)  # the watched model keeps its own state
        played = recorder.replay(recorder.nearest(time))
        assert all(torch.equal(value, kept[time][name]) for name, value in played.state_dict().items())
        assert torch.equal(model(TOKENS), x)
    assert any("head" in name for name in recorder.state(0)) and any(name.endswith("bias") for name in recorder.state(0))


def test_the_loss_played_back_is_the_loss_of_the_run_to_the_last_bit():
    """A teacher's batch is the whole data, so step k's loss was computed with the weights after k - 1 updates on that very batch."""
    teacher = Teacher()
    model = apply_lora(teacher.model(), r=3, alpha=8, target_modules=["layer"])
    recorder = FlightRecorder(every=1).watch(model)
    for step in train(model, teacher.batches(), steps=40, lr=0.03, loss=teacher.loss, device="cpu"):
        recorder.record(step.step, step.loss)
    steps, losses = recorder.curve
    assert steps.tolist() == list(range(1, 41))
    for i in range(40):
        assert teacher.loss(recorder.replay(i), teacher.batches()[0]).item() == losses[i]


def test_recording_and_playing_back_change_nothing():
    alone, watched = zoo(), zoo()
    for _ in train(alone, batches(), steps=15, lr=0.03, loss=loss, device="cpu"):
        pass
    recorder = FlightRecorder(every=2).watch(watched)
    for step in train(watched, batches(), steps=15, lr=0.03, loss=loss, device="cpu"):
        recorder.record(step.step, step.loss)
        recorder.replay(0, rank=1, volume=3.0)  # in the middle of training
        assert watched.training
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), watched.state_dict().values(), strict=True))
    played = recorder.replay(0)
    assert not played.training
    frozen = {p.data_ptr() for p in watched.parameters() if not p.requires_grad}
    assert frozen <= {p.data_ptr() for p in played.parameters()}, "frozen weights are shared, not copied"
    trained = {p.data_ptr() for p in watched.parameters() if p.requires_grad}
    assert not trained & {p.data_ptr() for p in played.parameters()}


# ---------------------------------------------------------------- bounds


def tiny(r=2):
    torch.manual_seed(0)
    return apply_lora(nn.Sequential(nn.Linear(7, 11)), r=r, alpha=5, target_modules=["0"])


def pretend(recorder, model, steps, first=1):
    """`steps` updates of which each writes its number into lora_B."""
    B = lora_layers(model)["0"].lora_B
    for step in range(first, first + steps):
        with torch.no_grad():
            B.fill_(step)
        recorder.record(step, loss=float(step))


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("steps", [1, 7, 255, 256, 257, 512, 3000, 20_000])
def test_thinned_moments_are_even_and_true_and_the_first_and_last_are_there(steps, every):
    model = tiny()
    recorder = FlightRecorder(every=every).watch(model)
    pretend(recorder, model, steps)
    times = recorder.times
    assert times[0] == 0 and times[-1] == steps and len(times) <= MOMENTS
    gaps = set(np.diff(times[:-1]).tolist())
    assert len(gaps) <= 1, "all gaps are the same, but for the last one"
    assert steps < 2 * every or len(times) >= min(steps // every, MOMENTS // 2)
    for i, time in enumerate(times):
        assert (recorder.state(i)["0.lora_B"] == time).all()


def test_the_last_moment_is_read_again_and_again_and_then_training_goes_on():
    model = tiny()
    recorder = FlightRecorder(every=8).watch(model)
    pretend(recorder, model, 5)
    assert recorder.times == [0, 5] and recorder.times == [0, 5]
    pretend(recorder, model, 5, first=6)
    assert recorder.times == [0, 8, 10]
    assert [float(recorder.state(i)["0.lora_B"][0, 0]) for i in range(3)] == [0, 8, 10]


def test_updates_that_were_not_recorded_are_not_passed_off_as_the_last_moment():
    model = tiny()
    recorder = FlightRecorder(every=4).watch(model)
    pretend(recorder, model, 6)
    with torch.no_grad():
        lora_layers(model)["0"].lora_B.fill_(99)
    assert recorder.times == [0, 4]


def test_it_stays_within_its_bytes():
    model, room = tiny(), 16 * LOSSES + 10 * 36 * 4 + 50  # 36 numbers a moment: ten of them and a bit
    recorder = FlightRecorder(max_bytes=room, every=1).watch(model)
    pretend(recorder, model, 5000)
    assert len(recorder.times) <= 10 and recorder.times[0] == 0 and recorder.times[-1] == 5000
    own = recorder._rows.nbytes + recorder._steps.buffer_info()[1] * 8 + recorder._losses.buffer_info()[1] * 8
    assert own <= recorder.nbytes <= room
    half = FlightRecorder(max_bytes=room, every=1, dtype=torch.float16).watch(tiny())
    assert len(half._rows) == 20


def test_half_precision_rounds_by_half_a_step_at_most():
    model = zoo()
    recorder, kept = fly(model, recorder=FlightRecorder(every=1, dtype=torch.float16))
    for name, value in recorder.state(-1).items():
        true = kept[20][name]
        # 11 bits of mantissa; below 6e-5 float16 has fewer, and steps of 6e-8
        assert value.dtype == true.dtype and ((value - true).abs() <= true.abs() * 2**-11 + 3e-8).all()


def test_bfloat16_parameters_come_back_as_they_were():
    torch.manual_seed(0)
    model = apply_lora(nn.Sequential(nn.Linear(7, 11)).bfloat16(), r=2, alpha=5, target_modules=["0"])
    recorder = FlightRecorder(every=1).watch(model)
    states = [copy.deepcopy(recorder.state(0))]
    for step in range(1, 4):
        with torch.no_grad():
            for p in lora_layers(model)["0"].lora_A, lora_layers(model)["0"].lora_B:
                p.add_(torch.randn_like(p))
        recorder.record(step)
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    for i, state in enumerate(states):
        assert all(torch.equal(value, state[name]) and value.dtype == torch.bfloat16 for name, value in recorder.state(i).items())
    assert recorder._rows.dtype == torch.bfloat16


def test_parameters_that_moved_in_memory_are_still_followed():
    """As after model.to(...): the parameter is the same, its storage another."""
    model = tiny()
    recorder = FlightRecorder(every=1).watch(model)
    pretend(recorder, model, 3)
    for p in model.parameters():
        p.data = p.data.clone()
    pretend(recorder, model, 3, first=4)
    assert [float(recorder.state(i)["0.lora_B"][0, 0]) for i in range(1, 7)] == [1, 2, 3, 4, 5, 6]


def test_the_loss_curve_is_bounded_and_keeps_its_extremes():
    model = tiny()
    recorder = FlightRecorder(every=1000).watch(model)
    rng = np.random.default_rng(0)
    values = rng.normal(size=200_000)
    values[77_777], values[123_456] = -50, 60
    for step, value in enumerate(values, 1):
        recorder.record(step, loss=value)
    steps, losses = recorder.curve
    assert len(steps) <= LOSSES and recorder._losses.itemsize == 8
    assert steps[0] == 1 and steps[-1] == 200_000 and (np.diff(steps) > 0).all()
    assert losses.min() == -50 and losses.max() == 60
    assert np.array_equal(losses, values[steps - 1]), "thinned, not averaged"


def test_svds_are_taken_once_and_kept_in_bounded_memory(monkeypatch):
    model = zoo()
    recorder, _ = fly(model)
    calls = []
    real = recorder_module.factored_svd
    monkeypatch.setattr(recorder_module, "factored_svd", lambda B, A: calls.append(1) or real(B, A))
    for rank in (0, 1, 2, 1):
        recorder.replay(4, rank)
    assert len(calls) == 4, "four layers, one moment"
    monkeypatch.setattr(recorder_module, "DECOMPOSED", 1)
    for i in range(21):
        recorder.replay(i, 1)
    assert len(recorder._svds) == 1


# ---------------------------------------------------------------- what is refused


def test_a_model_without_adapters_or_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no LoRA layers.*apply_lora"):
        FlightRecorder().watch(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="nothing in this model requires a gradient"):
        FlightRecorder().watch(tiny().requires_grad_(False))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="every=0"):
        FlightRecorder(every=0)
    with pytest.raises(TypeError, match="int8"):
        FlightRecorder(dtype=torch.int8)
    with pytest.raises(ValueError, match=r"144 bytes \(36 numbers\).*max_bytes=524,300.*float16"):
        FlightRecorder(max_bytes=524_300).watch(tiny())


def test_one_recorder_one_flight():
    recorder = FlightRecorder().watch(tiny())
    with pytest.raises(ValueError, match="holds a flight already"):
        recorder.watch(tiny())
    pretend(recorder, recorder.model, 3)
    with pytest.raises(ValueError, match="found 3 after 3"):
        recorder.record(3)


def test_an_empty_recorder_says_what_to_do():
    recorder = FlightRecorder()
    for read in (lambda: recorder.r, lambda: recorder.replay(0), lambda: recorder.state(0), lambda: recorder.nearest(3), lambda: recorder.save("x")):
        with pytest.raises(ValueError, match="empty.*watch"):
            read()
    assert recorder.times == []
    with pytest.raises(RuntimeError, match="nothing is watched"):
        recorder.record(1)


def test_replaced_adapters_are_noticed():
    model = tiny()
    recorder = FlightRecorder(every=1).watch(model)
    pretend(recorder, model, 2)
    apply_lora(remove_lora(model), r=5, alpha=5, target_modules=["0"])
    with pytest.raises(ValueError, match="layer '0' was replaced.*another FlightRecorder"):
        for step in range(3, 60):
            recorder.record(step)
    with pytest.raises(ValueError, match="replaced"):
        recorder.replay(0)
    model = tiny()
    recorder = FlightRecorder(every=1).watch(model)
    lora_layers(model)["0"].lora_A = nn.Parameter(torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"parameter 'lora_A', now \(4, 7\), was replaced"):
        for step in range(1, 60):
            recorder.record(step)


def test_a_merged_model_is_not_played_back_and_an_unmerged_one_is():
    model = zoo()
    recorder, kept = fly(model)
    merge(model)
    with pytest.raises(RuntimeError, match="merged.*unmerge"):
        recorder.replay(3)
    unmerge(model)
    assert torch.equal(recorder.replay(20)(TOKENS), model.eval()(TOKENS))


def test_places_that_do_not_exist_are_refused():
    recorder, _ = fly(zoo(), steps=3)
    with pytest.raises(IndexError, match="4 moments, 0 to 3; found 4"):
        recorder.replay(4)
    with pytest.raises(ValueError, match="rank is 0 or more; found -1"):
        recorder.replay(0, rank=-1)
    with pytest.raises(ValueError, match="volume.*nan"):
        recorder.replay(0, volume=math.nan)


# ---------------------------------------------------------------- on disk


def test_a_flight_from_a_file_is_the_same_flight(tmp_path):
    model = zoo(modules_to_save=["head"])
    recorder, _ = fly(model)
    recorder.save(tmp_path / "flight.safetensors")
    landed = FlightRecorder.load(tmp_path / "flight.safetensors", zoo(modules_to_save=["head"]))
    assert landed.times == recorder.times and all(np.array_equal(a, b) for a, b in zip(landed.curve, recorder.curve, strict=True))
    for i in (0, 7, 20):
        for rank in (1, None):
            assert torch.equal(landed.replay(i, rank, 1.5)(TOKENS), recorder.replay(i, rank, 1.5)(TOKENS))
        assert landed.alphas(i) == recorder.alphas(i)
    with pytest.raises(RuntimeError, match="has landed"):
        landed.record(100)
    assert [path.name for path in tmp_path.iterdir()] == ["flight.safetensors"]


def test_a_flight_of_another_model_is_refused(tmp_path):
    recorder, _ = fly(zoo())
    path = tmp_path / "flight.safetensors"
    recorder.save(path)
    with pytest.raises(ValueError, match="recorded with.*this model has"):
        FlightRecorder.load(path, zoo(r=2))
    with pytest.raises(ValueError, match="recorded with.*this model has None"):
        FlightRecorder.load(path, apply_lora(Zoo(), r=3, alpha=5, target_modules=["plain"]))
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="frozen weight of 'words' is not the one"):
        FlightRecorder.load(path, apply_lora(Zoo(), r=3, alpha=5, target_modules=TARGETS))
    (tmp_path / "text.txt").write_text("no flight")
    with pytest.raises(ValueError, match="cannot be read"):
        FlightRecorder.load(tmp_path / "text.txt", zoo())
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no flight"):
        FlightRecorder.load(tmp_path / "other.safetensors", zoo())
