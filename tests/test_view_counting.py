"""The ledger's figures and its live view: what they show is what the ledger says, at every stop of every control."""

import html
import itertools
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("ipywidgets")
pytest.importorskip("matplotlib")

from lora_lab import apply_lora
from lora_lab.ledger import RESERVE, readable, training_memory
from lora_lab.presets import gpu_bytes, preset
from lora_lab.view import ledger_explorer, plot_ledger, plot_steps, save_png
from lora_lab.view import ledger_explorer as explorer_factory
from lora_lab.view.figures_counting import PART_COLOURS, PARTS, film, times_less
from lora_lab.view.ledger_explorer import (
    BATCHES,
    CONTEXTS,
    MACHINES,
    MODELS,
    OPTIMIZERS,
    PRECISIONS,
    RANKS,
    TARGETS,
    LedgerExplorer,
    Settings,
    _ticks,
    ledger,
)

SMALL = Settings(model="pocket", batch=2, context=128, r=4)


@pytest.fixture(autouse=True)
def live(monkeypatch):
    monkeypatch.delenv("LORA_LAB_HEADLESS", raising=False)


def memories(targets="all-linear", **more):
    model = preset("pocket").build()
    if targets:
        apply_lora(model, 4, 8, targets)
    return training_memory(model, 2, 64, device="cuda", **more)


# ---------------------------------------------------------------- the step as columns


@pytest.mark.parametrize("columns", [40, 240, 5000])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_never_lost_and_nothing_is_invented(columns, checkpointing):
    memory = memories(checkpointing=checkpointing)
    rows, phases = film(memory, columns)
    assert rows.shape == (columns, 4)
    totals = {m.total for m in memory.moments}
    assert rows.sum(1).max() == memory.peak, "one column is the highest moment"
    assert {row.sum() - memory.weights - memory.optimizer for row in rows} <= totals, "every column is a moment that was played"
    assert (rows[:, PARTS.index("weights")] == memory.weights).all() and (rows[:, PARTS.index("optimizer")] == memory.optimizer).all()
    names, at = zip(*phases, strict=True)
    assert names == ("forward", "backward", "step") and list(at) == sorted(at) and at[-1] == columns - columns // 20
    forward, last = rows[: at[1]], rows[at[2] :]
    assert (forward[:, PARTS.index("gradients")] == 0).all(), "no gradient before the backward pass"
    assert (last[:, PARTS.index("gradients")] == memory.gradients).all()


@pytest.mark.parametrize(("pair", "said"), [
    ((10, 10), "the same"), ((1000, 1004), "the same"), ((10, 4), "2.5 times less"), ((191_000, 1000), "191 times less"),
    ((100, 110), "1.1 times more"), ((5, 0), "nothing left"), ((0, 0), "the same"), ((109, 100), "1.09 times less"),
])  # fmt: skip
def test_comparisons_in_words(pair, said):
    assert times_less(*pair) == said


# ---------------------------------------------------------------- figures


def texts_of(figure):
    figure.draw_without_rendering()
    return [t.get_text() for axes in figure.axes for t in (*axes.texts, *axes.get_yticklabels(), axes.title, axes._left_title)]


def test_bars_are_as_long_as_the_bytes_and_small_ones_are_hairlines(tmp_path):
    accounts = {"weights": (16e9, 16e9), "gradients": (16e9, 8e6), "file": (16e9, 8e6)}
    figure = plot_ledger(accounts, title="What stays", apart=["file"])
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [size for pair in accounts.values() for size in pair]
    hairlines = [line for line in axes.lines if list(line.get_xdata()) == [0, 0]]
    assert len(hairlines) == 2
    said = texts_of(figure)
    for words in ("weights", "16 GB   full fine-tuning", "16 GB   LoRA", "8 MB", "2,000 times less", "the same", "What stays"):
        assert words in said, words
    # rows stand apart, and the row that is not part of the sum further
    first, second, third = axes.get_yticks()
    assert second - first == 1 and third - second > 1
    assert save_png(figure, tmp_path / "ledger.png", "dark").stat().st_size > 1000


@pytest.mark.parametrize("wrong", [{}, {"weights": (1.0, -1.0)}, {"weights": (float("nan"), 1.0)}])
def test_bars_of_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="finite and not negative"):
        plot_ledger(wrong)


def test_steps_share_one_scale_and_carry_their_peaks():
    both = {"full": memories(None), "LoRA": memories()}
    figure = plot_steps(both, title="A step", lines={"T4": 0.5 * both["full"].peak, "far away": 1e15})
    panels = figure.axes
    assert len(panels) == 2 and panels[0].get_ylim() == panels[1].get_ylim() and panels[0].get_ylim()[1] * 1e9 > both["full"].peak
    for axes, memory in zip(panels, both.values(), strict=True):
        marks = [line for line in axes.lines if line.get_marker() == "v"]
        assert len(marks) == 1 and marks[0].get_ydata()[0] * 1e9 == pytest.approx(memory.peak)  # GB and back is a division and a product
        assert any(readable(memory.peak) == t.get_text() for t in axes.texts)
    assert [t.get_text() for t in panels[1].texts].count("T4") == 1 and not any("far" in t.get_text() for t in panels[1].texts)
    with pytest.raises(ValueError, match="at least one prediction"):
        plot_steps({})


# ---------------------------------------------------------------- the live view


def grid():
    """Each control over all of its stops, the others at the beginning and at both ends."""
    stops = {
        "batch": BATCHES, "context": CONTEXTS, "r": RANKS, "targets": tuple(TARGETS), "optimizer": tuple(OPTIMIZERS), "precision": tuple(PRECISIONS),
        "checkpointing": (False, True),
    }  # fmt: skip
    seen = set()
    for name, values in stops.items():
        for others in ({}, {k: v[0] for k, v in stops.items() if k != name}, {k: v[-1] for k, v in stops.items() if k != name}):
            for value in values:
                seen.add(Settings(model="pocket", **{**others, name: value}))
    return sorted(seen, key=repr)


def test_the_page_at_every_stop_is_whole():
    for s in grid():
        found, page = ledger(s), LedgerExplorer(s).page(s)
        assert "nan" not in page and "inf" not in page and page.count("<svg") == page.count('role="img"') == 1
        assert f">{readable(found.full.peak)}<" in page and f">{readable(found.lora.peak)}<" in page
        assert page.count("fits<") + page.count("does not fit<") == 2 * len(MACHINES)
        assert found.lora.peak <= found.full.peak or s.r >= 64, "only at a rank near break-even may LoRA hold more"


def test_every_model_can_be_chosen_and_long_contexts_are_cut():
    for name in MODELS:
        s = Settings(model=name, batch=1, context=8192, precision="bfloat16", checkpointing=True)
        found = ledger(s)
        assert s.tokens == min(8192, preset(name).context)
        text = LedgerExplorer(s).says(s)
        assert ("as long as" in text) == (preset(name).context < 8192) and readable(found.lora.peak) in text
    assert ledger(Settings(model="gpt3-175b", precision="bfloat16", batch=1)).fits == dict.fromkeys(MACHINES, (False, False))


@pytest.mark.parametrize("s", [
    SMALL, Settings(model="gpt2", targets="every linear layer", r=32, optimizer="SGD with momentum"),
    Settings(model="llama-3.1-8b", batch=1, context=256, precision="bfloat16, frozen layers in 4 bits", checkpointing=True),
], ids=["pocket", "gpt2", "llama in 4 bits"])  # fmt: skip
def test_it_says_what_the_ledger_says(s):
    """The same asked by hand, step by step."""
    a = preset(s.model).changed(dropout=0.0)
    dtype, quantize = PRECISIONS[s.precision]
    model = a.build({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    which = TARGETS[s.targets]
    apply_lora(model, s.r, 1, which if isinstance(which, str) else which[a.family])
    by_hand = training_memory(model, s.batch, s.context, optimizer=OPTIMIZERS[s.optimizer], quantize=quantize, checkpointing=s.checkpointing, device="cuda")
    found = ledger(s)
    assert found.lora == by_hand
    assert found.trained[1] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for machine, gpu in (("T4, 16 GB", "T4"), ("H200, 141 GB", "H200")):
        assert found.fits[machine][1] == (by_hand.peak <= gpu_bytes(gpu) - RESERVE)


def test_full_fine_tuning_knows_no_rank_and_no_targets():
    pages = {ledger(Settings(model="pocket", r=r, targets=t)).full for r, t in itertools.product((1, 256), TARGETS)}
    assert len(pages) == 1


def test_a_laptop_is_asked_for_itself():
    """On a CPU the optimizer takes one tensor after another: what fits there may be more than the peak of a GPU's step."""
    fits, peaks = [], []
    for batch in range(1, 40):
        s = Settings(model="gpt2", batch=batch, context=1024, optimizer="Adam")
        found = ledger(s)
        fits.append(found.fits["laptop, 16 GB"][0])
        model = preset("gpt2").changed(dropout=0.0).build()
        if batch % 13 == 1:
            peaks.append(training_memory(model, batch, 1024, device="cpu").peak <= 13 * 2**30)
            assert peaks[-1] == fits[-1]
    assert fits[0] and not fits[-1] and fits == sorted(fits, reverse=True), "once too much, always too much"


def heights(page, colour):
    """The polygons of a colour, as arrays of corners."""
    found = re.findall(rf'<polygon points="([^"]+)" fill="{colour}"', page)
    return [np.array([list(map(float, p.split(","))) for p in points.split()]) for points in found]


def test_the_chart_stacks_four_parts_to_the_peak():
    chart = LedgerExplorer(SMALL).chart(SMALL)
    stacks = {part: heights(chart, colour) for part, colour in PART_COLOURS.items()}
    assert all(len(panels) == 2 for panels in stacks.values())
    found, base = ledger(SMALL), max(p[:, 1].max() for p in stacks["weights"])
    top = [min(stack[k][:, 1].min() for stack in stacks.values()) for k in range(2)]
    # one scale for both panels: the ratio of their heights is that of their peaks, up to a tenth of a pixel in 200
    assert (base - top[1]) / (base - top[0]) == pytest.approx(found.lora.peak / found.full.peak, abs=2e-3)


@pytest.mark.parametrize("top", [1, 999, 1e3, 3.3e8, 9.99e9, 1e10, 2.4e12])
def test_round_ticks(top):
    ticks = _ticks(top)
    assert 4 <= len(ticks) - 1 <= 9 and ticks[0] == 0 and ticks[-1] <= top
    assert all(re.fullmatch(r"(0|[\d.]+ \w+)", readable(t).removesuffix(" B") if not t else readable(t)) for t in ticks)


def test_controls_move_the_page_and_say_what_they_are():
    explorer = ledger_explorer(model="pocket", batch=2, context=128, r=4)
    explorer.widget()
    assert set(explorer.controls) == set(Settings.__dataclass_fields__)
    assert all(control.tooltip and control.description for control in explorer.controls.values())
    for name, value in (("r", 64), ("batch", 64), ("context", 8192), ("model", "gpt2"), ("optimizer", "SGD"), ("precision", "bfloat16"),
                        ("targets", "every linear layer"), ("checkpointing", True)):  # fmt: skip
        before = explorer.picture.value, explorer.words.value
        explorer.controls[name].value = value
        assert getattr(explorer.settings, name) == value and explorer.error is None
        assert explorer.picture.value == explorer.page(explorer.settings) != before[0]
        assert html.escape(explorer.text) in explorer.words.value and 'role="status"' in explorer.words.value


def test_a_beginning_between_two_stops_is_a_stop():
    explorer = ledger_explorer(model="pocket", batch=3, context=100, r=5)
    explorer.widget()
    assert [explorer.controls[n].value for n in ("batch", "context", "r")] == [3, 100, 5]


def test_an_error_in_a_callback_shows_and_is_kept_and_goes_again(monkeypatch):
    explorer = LedgerExplorer(SMALL)
    explorer.widget()
    with monkeypatch.context() as patch:
        patch.setattr(explorer, "page", lambda s: 1 / 0)
        explorer.controls["r"].value = 8
        assert "ZeroDivisionError" in explorer.error and 'role="alert"' in explorer.trouble.value
    explorer.controls["r"].value = 16
    assert explorer.error is None and explorer.trouble.value == ""


@pytest.mark.parametrize(("wrong", "said"), [
    ({"model": "gpt5"}, "model is one of pocket"), ({"r": 0}, "r must be a whole number, at least 1; found 0"), ({"batch": 2.5}, "found 2.5"),
    ({"optimizer": "lion"}, "optimizer is one of Adam"), ({"precision": "fp8"}, "precision is one of float32"), ({"context": True}, "found True"),
])  # fmt: skip
def test_settings_that_are_none_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        explorer_factory(**wrong)


def display_of(explorer, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw=False: shown.append(data))
    explorer._ipython_display_()
    return shown


def test_the_still_twin_is_always_there_and_headless_it_is_alone(monkeypatch):
    # the module, whose name is also that of its function
    monkeypatch.setattr(sys.modules["lora_lab.view.ledger_explorer"], "MODELS", ("pocket", "gpt2"))
    explorer = LedgerExplorer(SMALL)
    box, still = display_of(explorer, monkeypatch)
    assert len(box.children) == 5 and still["text/html"].startswith("<details>")
    assert still["text/plain"].count("[live ledger]") == 2
    monkeypatch.setenv("LORA_LAB_HEADLESS", "1")
    (still,) = display_of(LedgerExplorer(SMALL), monkeypatch)
    assert "<details" not in still["text/html"] and still["text/html"].count("<tr><th scope='row'>") == 2
