"""The fair race and the automatic ranks of lab 12: who spends what, what chooses, what follows; statistics beside scipy, cuts beside numpy."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from lora_lab import apply_lora, count_parameters, lora_layers
from lora_lab.view import plot_budgets, plot_race, plot_rank_choice, plot_rate_curves
from lora_lab.view.style import to_svg
from lora_lab.zoo import race as racing
from lora_lab.zoo import ranks as ranking
from lora_lab.zoo.race import BUDGET, ENTRANTS, QUICK, SHAPES, TWINS, holm, paired, prepare, race, rank_for, run
from lora_lab.zoo.ranks import Choices, choose_ranks, cut, ranks_by_energy, ranks_within, search_rank, singular_values

torch.set_num_threads(1)


def network(seed=0):
    torch.manual_seed(seed)
    return racing.classifier().eval()


def trained_numbers(entrant, r):
    return count_parameters(prepare(network(), entrant, r)[0]).trainable


# ---- what each may spend ----------------------------------------------------------------------------------------------------------------


def test_lora_itself_spends_the_whole_budget():
    assert rank_for("LoRA") == racing.RANK and trained_numbers("LoRA", racing.RANK) == BUDGET


@pytest.mark.parametrize("entrant", [name for name in ENTRANTS if name != "AdaLoRA"])
def test_everybody_trains_as_many_numbers_as_the_budget_allows_and_no_more(entrant):
    """Counted on the layers themselves."""
    r = rank_for(entrant)
    assert trained_numbers(entrant, r) <= BUDGET
    if not (entrant == "LoRA-XS" and r == 64):
        assert trained_numbers(entrant, r + 1) > BUDGET


def test_adalora_starts_above_the_budget_and_ends_within_it():
    _, found = racing.adapt("AdaLoRA", 0.01, 0, steps=15)
    one = sum(SHAPES[0]) + 1
    assert trained_numbers("AdaLoRA", rank_for("AdaLoRA")) > BUDGET
    assert BUDGET - one < found["trained"] <= BUDGET  # not a whole direction is left unspent


def test_rank_for_takes_layers_of_unequal_shapes():
    shapes = [(100, 60), (60, 7)]
    assert rank_for("LoRA", 160 * 3 + 67 * 3, shapes) == 3 == rank_for("LoRA", 160 * 4 + 67 * 4 - 1, shapes)
    assert rank_for("LoRA-XS", 10**6, shapes) == 7  # no more directions than the smallest side


def test_who_can_not_afford_rank_1_is_told_the_price():
    with pytest.raises(ValueError, match="at r = 1; the budget is 100"):
        rank_for("LoRA", 100)
    with pytest.raises(ValueError, match="no entrant 'Lora'; there are LoRA"):
        rank_for("Lora")


# ---- one run ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entrant", [name for name in ENTRANTS if name not in TWINS])
def test_every_run_starts_as_the_base_but_qloras(entrant):
    model, x = network(), racing.images(racing.DEGREES).validation[0][:20]
    with torch.no_grad():
        before = model(x)
        after = prepare(model, entrant, rank_for(entrant))[0](x)
    difference = float((before - after).abs().max() / before.abs().max())
    if entrant == "QLoRA":
        assert 1e-3 < difference < 0.5  # 16 levels a block
    elif entrant in ("PiSSA", "OLoRA", "DoRA"):
        assert difference < 1e-5  # W0 - B A + B A, and m / ||W0||, in float32
    else:
        assert difference == 0


def test_what_trains_is_the_adapter_and_nothing_else():
    for entrant in ENTRANTS:
        model, _ = prepare(network(), entrant, rank_for(entrant))
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert names and all(name.startswith(racing.TARGETS) and ".base_layer." not in name for name in names), entrant


def test_a_twin_differs_from_lora_by_its_dice_alone(monkeypatch):
    def scores(entrant):
        return {key: value for key, value in run(entrant, 0.04, 0, steps=6).items() if key != "step_seconds"}

    assert scores("LoRA") != scores(TWINS[0])
    monkeypatch.setattr(racing, "dice", lambda entrant, seed: seed)
    assert scores("LoRA") == scores(TWINS[0]) == scores(TWINS[2])


def test_a_run_repeats_itself_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = run("VeRA", 0.2, 0, steps=5)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(6)
    again = run("VeRA", 0.2, 0, steps=5)
    assert {**first, "step_seconds": 0} == {**again, "step_seconds": 0}


def test_the_task_has_a_gap_and_a_run_closes_some_of_it():
    frozen = racing.scores_of(racing.base(0))
    adapted = run("LoRA", 0.04, 0, steps=60)
    assert frozen["test"] < 0.4 and adapted["test"] > frozen["test"] + 0.25
    assert adapted["test_loss"] < frozen["test_loss"]


def test_scores_are_those_of_the_named_images():
    model = racing.base(0)
    x, y = racing.images(racing.DEGREES).test
    with torch.no_grad():
        probabilities = torch.softmax(model(x).double(), -1).numpy()
    found = racing.scores_of(model)
    assert found["test"] == pytest.approx(np.mean(probabilities.argmax(1) == y.numpy()))
    # float32 logits of about 10, mean of hundreds
    assert found["test_loss"] == pytest.approx(-np.log(probabilities[np.arange(len(y)), y.numpy()]).mean(), rel=1e-4)


# ---- statistics -------------------------------------------------------------------------------------------------------------------------


def test_paired_is_the_paired_t_test():
    from scipy.stats import ttest_rel

    draw = np.random.default_rng(0)
    for n in (2, 3, 10):
        a, b = draw.normal(size=n), draw.normal(size=n)
        expected = ttest_rel(a, b)
        found = paired(list(a), list(b))
        low, high = expected.confidence_interval(0.95)
        # two implementations of one formula in float64
        assert [found.mean - found.half, found.mean + found.half, found.p] == pytest.approx([low, high, expected.pvalue], rel=1e-9)


def test_paired_knows_what_it_can_not_know():
    with pytest.raises(ValueError, match="same two seeds"):
        paired([1.0], [0.5])
    with pytest.raises(ValueError, match="found 2 and 3"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1 and paired([1.5, 2.5], [1.0, 2.0]).p == 0


def step_down(ps, level):
    """Holm 1979, as printed: from the smallest p on, reject while p_(k) <= level / (m - k + 1); then stop."""
    rejected = set()
    for k, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        if ps[index] > level / (len(ps) - k):
            break
        rejected.add(index)
    return rejected


def test_holm_rejects_what_the_step_down_procedure_rejects():
    draw = random.Random(0)
    for _ in range(200):
        ps = [draw.random() ** 3 for _ in range(draw.randint(1, 12))]
        adjusted = holm(ps)
        for level in (0.01, 0.05, 0.2):
            assert {k for k, p in enumerate(adjusted) if p <= level} == step_down(ps, level)
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_decided_needs_the_corrected_p():
    assert not racing.Difference("x", 0.1, 0.05, 0.01, 0.06).decided
    assert racing.Difference("x", 0.1, 0.05, 0.01, 0.04).decided
    assert not racing.Difference("twin", 0.1, 0.05, 0.001).decided


# ---- the race ---------------------------------------------------------------------------------------------------------------------------


def pretended(entrant: str, lr: float, seed: int, budget: int = 0, steps: int = 0, clip: float | None = None) -> dict:
    """Runs whose outcome is known: validation is best at the best rate, test images are best elsewhere and must choose nothing."""
    best = {"LoRA": 0.08, "PiSSA": 0.04, "VeRA": 0.8, "DoRA": 0.02, "LoRA+": 0.01}.get(entrant, 0.04)
    off = abs(math.log2(lr / best))
    gain = {"PiSSA": 0.02, "VeRA": -0.05}.get(entrant, 0.0)
    luck = 0.001 * ((hash((len(entrant), seed)) % 7) - 3)
    return {"validation": 0.9 - 0.1 * off, "validation_loss": off, "test": 0.8 + gain + luck - (0.3 if entrant == "LoRA+" and lr > 0.05 else 0),
            "test_loss": 0.5, "trained": 1, "r": 1, "step_seconds": 0.001, "diverged": False}  # fmt: skip


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(racing, "run", pretended)
        return race(seeds=range(6), tuning_seeds=(100,), folder=tmp_path_factory.mktemp("known"))


def test_validation_chooses_and_the_edge_is_called(known):
    assert known.chosen["LoRA"] == pytest.approx(0.08) and known.chosen["PiSSA"] == pytest.approx(0.04)
    assert known.chosen["VeRA"] == pytest.approx(0.8) and known.edges == ("VeRA",)
    assert "edge! the best rate of VeRA" in known.verdict() and "edge" not in known.verdict(fair=False)
    assert known.table().count("edge!") == 1


def test_the_unfair_race_is_run_at_loras_rate(known):
    assert set(known.unfair["lr"]) == {known.chosen["LoRA"]}
    assert {entrant: set(rows["lr"]) for entrant, rows in known.fair.groupby("entrant")} == {name: {lr} for name, lr in known.chosen.items()}
    assert np.mean(known.scores("LoRA+", fair=False)) < np.mean(known.scores("LoRA+")) - 0.25


def test_seeds_that_tune_do_not_race(known):
    assert set(known.fair["seed"]) == set(range(6)) and not set(known.tuning["seed"]) & set(known.fair["seed"])
    assert len(known.tuning) == len(ENTRANTS) * 5 * len(set(known.tuning["seed"]))  # as many rates for each
    with pytest.raises(ValueError, match="must not race.*100"):
        race(seeds=(0, 100))


def test_the_verdict_names_who_is_better_and_who_is_worse(known):
    lines = known.verdict().splitlines()
    assert [line.split(":")[0] for line in lines[1:3]] == ["better than LoRA", "worse than LoRA"]
    assert "PiSSA +2" in lines[1] and "VeRA −5" in lines[2] and "DoRA" not in lines[1] + lines[2]
    assert "LoRA under other names: twin B" in known.verdict()


def test_twins_are_no_question_and_are_not_corrected_for(known):
    found = {d.name: d for d in known.differences()}
    assert all(found[name].adjusted is None for name in TWINS)
    by_hand = holm([found[name].p for name in known.variants])
    assert [found[name].adjusted for name in known.variants] == by_hand and len(by_hand) == 11
    low, high = known.luck()
    assert low == min(found[t].mean - found[t].half for t in TWINS) and high == max(found[t].mean + found[t].half for t in TWINS)


def test_four_loras_can_stand_for_one(known):
    four = ("LoRA", *TWINS)
    columns = np.array([known.scores(name) for name in four]).mean(0)
    found = {d.name: d for d in known.differences(against=four)}
    assert set(found) == set(known.variants)
    assert found["PiSSA"].mean == pytest.approx(np.mean(np.array(known.scores("PiSSA")) - columns))


def test_of_equal_accuracies_the_lower_loss_chooses(monkeypatch, tmp_path):
    def level(entrant: str, lr: float, seed: int, budget: int, steps: int, clip: float | None) -> dict:
        return pretended(entrant, lr, seed) | {"validation": 0.9, "validation_loss": abs(lr - 0.02)}

    monkeypatch.setattr(racing, "run", level)
    assert race(("LoRA",), seeds=(0, 1), tuning_seeds=(100,), folder=tmp_path).chosen["LoRA"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"entrants": ("DoRA",)}, "needs it among the entrants"),
        ({"entrants": ("LoRA", "Dora")}, "no entrant 'Dora'"),
        ({"budget": 400}, "DoRA trains 576 numbers"),
        ({"seeds": (0,)}, "a race needs two seeds"),
        ({"rates": 0}, "one rate at least"),
    ],
)
def test_a_race_that_makes_no_sense_is_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        race(**asked)


def test_a_real_race_is_kept_on_disk(tmp_path):
    settings = {"entrants": ("LoRA", TWINS[0], "VeRA"), "seeds": (0, 1), "tuning_seeds": (100,), "rates": 2, "steps": 4, "folder": tmp_path}
    first = race(**settings)
    assert set(first.fair["trained"]) == {BUDGET} and not first.fair["diverged"].any()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-*.json")}
    assert len(written) >= 3 * 2 + 3 * 2
    assert race(**settings).fair.equals(first.fair)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-*.json")} == written


def broken(entrant: str, lr: float, seed: int, budget: int, steps: int, clip: float | None) -> dict:
    raise ZeroDivisionError("no luck")


@pytest.mark.filterwarnings("ignore:.*cells failed")
def test_a_run_that_failed_stops_the_race(monkeypatch, tmp_path):
    monkeypatch.setattr(racing, "run", broken)
    with pytest.raises(RuntimeError, match="5 of 5 runs failed.*LoRA at 0.01: ZeroDivisionError: no luck"):
        race(("LoRA",), seeds=(0, 1), tuning_seeds=(100,), folder=tmp_path)


def test_a_run_that_diverges_is_scored_as_it_was():
    found = run("LoRA", 1e30, 0, steps=30, clip=None)
    assert found["diverged"] and 0 <= found["test"] <= 1


def test_an_edited_variant_is_run_again(tmp_path):
    other = tmp_path / "x.py"
    other.write_text("a")
    before = racing.version(other)
    other.write_text("b")
    assert racing.version(other) != before == (other.write_text("a") and racing.version(other))


def test_the_quick_race_is_a_race():
    assert set(QUICK["entrants"]) <= set(ENTRANTS) and not set(QUICK["seeds"]) & set(QUICK["tuning_seeds"])


# ---- ranks ------------------------------------------------------------------------------------------------------------------------------

S = {"a": torch.tensor([3.0, 1.0, 0.5]), "b": torch.tensor([2.0, 2.0]), "c": torch.tensor([0.1, 0.0])}


def kept_by_brute_force(S, share):
    """The smallest number of values over all layers whose squares hold the share, largest first."""
    squares = np.sort(np.concatenate([np.square(values.double().numpy()) for values in S.values()]))[::-1]
    return next(k for k in range(1, len(squares) + 1) if squares[:k].sum() >= share * squares.sum() - 1e-12)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.97, 0.999, 1.0])
def test_energy_cuts_all_layers_at_one_threshold(share):
    found = ranks_by_energy(S, share)
    assert sum(found.values()) == kept_by_brute_force(S, share)
    least = min(float(S[name][r - 1]) for name, r in found.items() if r)
    most = max((float(S[name][r]) for name, r in found.items() if r < len(S[name])), default=0.0)
    assert least >= most


def test_a_layer_may_keep_nothing_and_equal_values_go_to_the_first_layer():
    assert ranks_by_energy(S, 0.9) == {"a": 1, "b": 2, "c": 0}
    assert ranks_by_energy({"x": torch.ones(2), "y": torch.ones(2)}, 0.75) == {"x": 2, "y": 1}
    assert ranks_by_energy(S, 1.0) == {"a": 3, "b": 2, "c": 1}  # a singular value of 0 is no direction


def test_energy_refuses_what_is_no_share_and_what_has_learned_nothing():
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="0 < share <= 1"):
            ranks_by_energy(S, share)
    with pytest.raises(ValueError, match="every ΔW is 0"):
        ranks_by_energy({"a": torch.zeros(3)}, 0.9)


def test_within_a_budget_the_largest_are_kept():
    shapes = {"a": (10, 10), "b": (5, 5), "c": (1, 1)}
    assert ranks_within(S, shapes, 40) == {"a": 1, "b": 2, "c": 0}
    assert ranks_within(S, shapes, 39) == {"a": 1, "b": 1, "c": 0}
    assert ranks_within(S, shapes, 10**6) == {"a": 3, "b": 2, "c": 1}
    with pytest.raises(ValueError, match="no room for one direction"):
        ranks_within(S, shapes, 19)


def learned(r=6, seed=1):
    model = apply_lora(network(), r=r, alpha=2.5 * r, target_modules=list(racing.TARGETS))
    draw = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, generator=draw)
    return model


def test_a_cut_is_numpys_truncated_svd_of_each_layer():
    whole, ranks = learned(), {"body.0": 3, "body.2": 0, "body.4": 6}
    before = {name: layer.delta_weight().detach().numpy() for name, layer in lora_layers(whole).items()}
    small = cut(whole, network(), ranks)
    assert {name: layer.r for name, layer in lora_layers(small).items()} == {"body.0": 3, "body.4": 6}
    for name, layer in lora_layers(small).items():
        U, values, Vh = np.linalg.svd(before[name].astype(np.float64))
        expected = (U[:, : ranks[name]] * values[: ranks[name]]) @ Vh[: ranks[name]]
        # float32: products of 64 numbers
        np.testing.assert_allclose(layer.delta_weight().detach().numpy(), expected, atol=1e-4 * values[0])
        assert np.linalg.matrix_rank(layer.delta_weight().detach().numpy(), tol=1e-3) == ranks[name]
        np.testing.assert_allclose(singular_values(whole)[name].numpy(), values[:6], rtol=1e-4)


def test_every_rank_gets_the_same_scaling_and_trains():
    model = ranking.trained({"body.0": 5, "body.2": 0, "body.4": 1}, 0, steps=3)
    layers = lora_layers(model)
    assert {name: (layer.r, layer.scaling) for name, layer in layers.items()} == {"body.0": (5, 2.0), "body.4": (1, 2.0)}
    assert all(layer.lora_B.abs().sum() > 0 for layer in layers.values())


def test_bisection_finds_what_trying_all_would_find():
    candidates = ranking.CANDIDATES
    for last, n in itertools.product((0.8, 0.97), (50, 270)):
        for good in candidates:
            accuracy = {r: last if r >= good else 0.3 for r in candidates}
            found, tried = search_rank(accuracy.get, candidates, n)
            enough = last - math.sqrt(last * (1 - last) / n)
            assert found == min(r for r in candidates if accuracy[r] >= enough) == good
            assert len(tried) <= 1 + math.ceil(math.log2(len(candidates)))


def test_within_one_standard_error_is_good_enough():
    scores = {1: 0.89, 2: 0.91, 4: 0.93}  # p = 0.93 of 100 images: standard error 0.0255
    assert search_rank(scores.get, list(scores), 100)[0] == 2 and search_rank(scores.get, list(scores), 10**6)[0] == 4
    with pytest.raises(ValueError, match="a search needs candidates"):
        search_rank(scores.get, [], 100)


@pytest.mark.parametrize("way", [way for way in ranking.WAYS if way != "search"])
def test_every_way_stays_within_the_numbers_of_rank_everywhere(way):
    found = ranking.rank_run(way, 0, 2, steps=12, generous=5)
    assert 0 < found["trained"] <= 2 * sum(map(sum, SHAPES))
    assert found["paid"] == 12 * (1 + (way in ("afresh", "reversed", "everywhere, longer")))


def test_the_search_pays_for_all_its_runs():
    found = ranking.rank_run("search", 0, 2, steps=5, generous=4)
    assert found["paid"] in (10, 15) and found["body.0"] == found["body.4"] in (1, 2, 3, 4)  # the largest, and one or two of three others


def test_reversed_is_the_control(monkeypatch):
    monkeypatch.setattr(ranking, "ranks_within", lambda S, shapes, budget: dict(zip(S, (3, 2, 1), strict=True)))
    chosen, control = (ranking.rank_run(way, 0, 2, steps=3, generous=5) for way in ("afresh", "reversed"))
    assert [chosen[name] for name in racing.TARGETS] == [3, 2, 1] and [control[name] for name in racing.TARGETS] == [1, 2, 3]


def outcomes():
    import pandas

    rows = []
    for way, seed in itertools.product(("everywhere", "energy", "search"), range(4)):
        rows.append({"way": way, "seed": seed, "body.0": 4, "body.2": 1, "body.4": 1, "trained": 768, "paid": 800 if way == "search" else 200,
                     "validation": 0.9, "test": 0.9 + 0.001 * seed - {"energy": 0.05 + 0.001 * (seed % 2), "search": 0.02}.get(way, 0)})  # fmt: skip
    return Choices(pandas.DataFrame(rows), 2)


def test_choices_are_compared_with_rank_everywhere_within_each_seed():
    found = outcomes()
    (difference,) = found.differences()
    assert difference.name == "energy" and difference.mean == pytest.approx(-0.0505) and difference.decided
    assert "energy minus r = 2 everywhere: −5.0" in found.verdict() or "−5.1" in found.verdict()
    assert "search: r = 4, 4, 4, 4 with the 4 seeds, for 800 steps instead of 200" in found.verdict()
    assert found.table().splitlines()[0].split() == ["body.0", "body.2", "body.4", "trained", "steps", "paid", "accuracy"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"ways": ("everywhere", "magic")}, "found magic"),
        ({"ways": ("energy",)}, 'needs "everywhere"'),
        ({"seeds": (0, 100)}, "did not tune"),
        ({"rank": 16}, "a generous rank is larger"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        choose_ranks(**asked)


# ---- figures ----------------------------------------------------------------------------------------------------------------------------


def words_of(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_the_race_shows_every_entrant_a_dot_for_each_seed_and_what_is_far_away(known):
    figure = plot_race(known, title="a race")
    left, right = figure.axes
    assert [t.get_text() for t in left.get_yticklabels()][:3] == [f"LoRA, {name}" for name in TWINS]
    assert len(left.get_yticklabels()) == len(ENTRANTS) - 1
    assert sum(len(line.get_xdata()) for line in right.lines if line.get_markersize() == 4) == 6 * (len(ENTRANTS) - 1)
    found = {d.name: d for d in known.differences()}
    assert f"{100 * found['PiSSA'].mean:+.1f}" in words_of(figure) and "luck" in words_of(figure)
    low, high = right.get_xlim()
    far = {d.name: d for d in known.differences(fair=False)}["LoRA+"]
    assert any(text.arrow_patch for text in left.texts) and not any(text.arrow_patch for text in right.texts)
    means = [found[t.get_text()].mean for t in left.get_yticklabels() if t.get_text() in known.variants]
    assert len(means) == 11 and means == sorted(means, reverse=True)  # the best stands above
    assert 100 * far.mean < low and f"{100 * far.mean:+.1f}".replace("-", "−") in words_of(figure)


def test_rate_curves_ring_the_chosen_rate(known):
    figure = plot_rate_curves(known, title="rates")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert len(panels) == 12 and "LoRA and its twins" in panels
    (ring,) = [line for line in panels["VeRA"].lines if line.get_markersize() == 10]
    assert list(ring.get_xdata()) == pytest.approx([0.8]) and "lr 0.8 edge!" in words_of(figure)
    curve = next(line for line in panels["VeRA"].lines if line.get_markersize() == 4)
    assert list(curve.get_ydata()) == pytest.approx(list(known.curve("VeRA").values()))


def test_budgets_and_ranks_are_drawn_as_they_are(known):
    figure = plot_budgets({1: known, 4: known}, title="budgets")
    assert {"LoRA", "VeRA"} <= set(words_of(figure)) and not set(TWINS) & set(words_of(figure))
    with pytest.raises(ValueError, match="two races"):
        plot_budgets({1: known})
    figure = plot_rank_choice(outcomes(), title="ranks")
    bars = [patch.get_width() for patch in figure.axes[0].patches]
    assert bars == [4, 1, 1] * 3 and "768 numbers, 800 steps" in words_of(figure)


def test_figures_follow_the_page(known):
    for figure in (plot_race(known), plot_rate_curves(known), plot_budgets({1: known, 2: known}), plot_rank_choice(outcomes())):
        svg = to_svg(figure, "alt")
        assert "var(--jp-ui-font-color0" in svg and not any(sentinel in svg for sentinel in ("#010203", "#010204", "#010205"))


def test_figures_do_with_two_entrants(monkeypatch, tmp_path):
    monkeypatch.setattr(racing, "run", pretended)
    small = race(("LoRA", "DoRA"), seeds=(0, 1), tuning_seeds=(100,), rates=3, folder=tmp_path)
    assert small.luck() is None and small.noise()[0] == small.noise()[1]
    assert len(plot_race(small).axes) == 2 and "LoRA" in words_of(plot_rate_curves(small))
    assert "DoRA" in small._repr_html_() and "twin" not in small.verdict()
