"""A training run that can be changed while it goes. No widgets here: `lora_lab.view.live_training` shows one.

    run = LiveRun(toy_problem(), r=2)
    while run.advance():
        if run.step == 100:
            run.set_alpha(16, "step size")

The loop is `lora_lab.train.train`; what changes on the way are the numbers it asks for before every update.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat

import torch
from torch import Tensor, nn

from .adapt import apply_lora, lora_layers
from .data import Batches, digits
from .data_to_text import Task, TextBatches, encode, load_task, prompt, slots
from .gpt2 import generate, load_gpt2
from .layers import LoRALayer
from .spectra import factored_svd
from .teacher import Teacher
from .text_scores import slot_errors
from .train import OPTIMIZERS, Step, batch_loss, choose_device, evaluate, to_device, token_loss, train

MODES = ("volume", "step size")
EARLIER = 4  # curves kept for comparison: five lines are told apart by dashes and colours, six are not
POINTS = 500  # of a curve: a chart is about as many pixels wide
MOVES = 64  # places where a setting was moved, kept to mark them in the chart


@dataclass(frozen=True)
class Problem:
    """What is trained. Everything is made from a seed, so that a run can begin again.

    name             one line for people
    model            seed -> a fresh base model, without LoRA
    batches          seed -> batches for `train`, that can be gone through again
    targets          the choices of target modules: what the choice is called -> `target_modules` of `apply_lora`; the first is the default
    largest_r        end of the slider
    loss             (model, batch) -> loss; cross-entropy unless told otherwise
    modules_to_save  trained in full beside the adapter: a fresh head (see `apply_lora`)
    floor            r -> the least loss that rank r can reach, None if nobody knows
    spectrum         layer -> the singular values that ΔW of this layer would have if it were perfect; {} if nobody knows
    samples          model -> what a view draws of it, or None. {"images": (n, rows, columns) from 0 to 1, "labels": n texts,
                     "predicted": n texts}, {"matrices": {name: (out, in)}} or {"text": str}
    evaluate         model -> {name: number}, shares from 0 to 1; or None
    r, alpha, lr, optimizer, steps      to begin with
    loss_name        what the loss is, with its unit, for the axis
    expect           (lowest, highest) loss that a sensible run shows, so that a chart's axis need not jump; None: nobody knows
    log              whether the loss needs a logarithmic axis
    smooth           steps over which a noisy loss is averaged (`LiveRun.mean`); 1: not at all
    instant          whether a whole run is so short that it is made anew whenever r is moved
    device           as in `train`
    source           Python that makes this problem and calls it `problem`; for `LiveRun.code`
    """

    name: str
    model: Callable[[int], nn.Module]
    batches: Callable[[int], Iterable]
    targets: Mapping[str, str | Sequence[str]]
    largest_r: int
    loss: Callable[[nn.Module, object], Tensor] = batch_loss
    modules_to_save: Sequence[str] = ()
    floor: Callable[[int], float | None] = lambda r: None
    spectrum: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Callable[[nn.Module], Mapping | None] = lambda model: None
    evaluate: Callable[[nn.Module], Mapping[str, float] | None] = lambda model: None
    r: int = 4
    alpha: float = 8.0
    lr: float = 0.01
    optimizer: str = "adamw"
    steps: int = 300
    loss_name: str = "loss"
    expect: tuple[float, float] | None = None
    log: bool = False
    smooth: int = 1
    instant: bool = False
    device: str = "cpu"
    source: str = ""


def toy_problem(teacher: Teacher | None = None) -> Problem:
    """A student of `Teacher`: one layer that looks for ΔW*, with its floor for each rank known beforehand."""
    teacher = teacher or Teacher()
    needed = int((teacher.spectrum > 1e-9 * teacher.spectrum[0]).sum())  # a rank that reaches loss 0, but for rounding
    own = torch.linalg.svdvals(teacher.delta)
    call = "" if repr(teacher) == "Teacher()" else repr(teacher)
    imports = "from lora_lab.live import toy_problem\n" + ("from lora_lab.teacher import Teacher\n" if call else "")

    def samples(model):
        layer = next(iter(lora_layers(model).values()), None)
        learned = torch.zeros_like(teacher.delta) if layer is None else layer.delta_weight().detach().double()
        return {"matrices": {"learned ΔW": learned, "teacher's ΔW*": teacher.delta}}

    return Problem(
        name="a student of a known teacher",
        model=lambda seed: teacher.model(),
        batches=lambda seed: teacher.batches(),
        targets={"the layer": ["layer"]},
        largest_r=min(len(own), needed + 2),  # two ranks more than are needed: they change nothing, and that is worth seeing
        loss=teacher.loss,
        floor=lambda r: teacher.floor(r) if r < needed else 0.0,
        spectrum={"layer": own[:needed]},
        samples=samples,
        r=2, alpha=8.0, lr=0.03, steps=300, loss_name="mean squared error", log=True, instant=True,
        expect=(max(teacher.floor(min(8, needed - 1)), 1e-6 * teacher.floor(0)), teacher.floor(0)),
        source=f"{imports}\nproblem = toy_problem({call})",
    )  # fmt: skip


class DigitClassifier(nn.Module):
    """64 pixels -> body (32, 32) -> head. `old_head` keeps the head of the digits that the body was trained on."""

    def __init__(self, classes: int, old_head: nn.Module | None = None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, classes)
        self.old_head = old_head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


DIGIT_TASKS = {
    "5 to 9": "digits 5 to 9, by a network that learned 0 to 4",
    "leaning": "digits that lean by 20 degrees, five labels each, by a network that learned upright ones",
    "turned": "digits turned by 90 degrees, by a single layer that learned upright ones",
}


def digits_problem(task: str = "5 to 9") -> Problem:
    """Adapt a small digit classifier, as in lab 02b.

    task   "5 to 9": new digits. A fresh head is trained in full beside the adapter; `evaluate` also says what is left of 0 to 4
           "leaning": digits turned by 20 degrees, five labelled images each; the head stays frozen
           "turned": lab 00's: one linear layer, 64 pixels to 10 scores, that learned upright digits and has never seen a turned one

    Raises ValueError for another task. Needs scikit-learn. The base is trained when it is first asked for, in about a second.
    """
    if task not in DIGIT_TASKS:
        raise ValueError(f"task is one of {', '.join(map(repr, DIGIT_TASKS))}; found {task!r}")
    if task == "turned":
        return _turned_problem()
    new = task == "5 to 9"

    @functools.cache
    def data(seed):
        if new:
            split = digits(classes=range(5, 10), seed=seed)
            return replace(split, **{name: (x, y - 5) for name, (x, y) in vars(split).items()})  # the new head counts from 0
        split = digits(rotation=-20, seed=seed)
        x, y = split.train
        few = torch.cat([(y == digit).nonzero()[:5, 0] for digit in range(10)])
        return replace(split, train=(x[few], y[few]))

    def model(seed):
        base = copy.deepcopy(_pretrained(5 if new else 10, seed))
        if new:
            base.old_head, base.head = base.head, nn.Linear(32, 5)
        base.seed = seed
        return base

    def measure(model):
        names = {"right on 5 to 9" if new else "right on leaning": evaluate(model, [data(model.seed).test], "cpu")}
        if new:
            x, y = digits_of(range(5), model.seed).test
            with torch.no_grad():
                names["still right on 0 to 4"] = (model.old_head(model.body(x)).argmax(-1) == y).float().mean().item()
        return names

    return Problem(
        name=DIGIT_TASKS[task],
        model=model,
        batches=lambda seed: Batches(*data(seed).train, batch_size=64, seed=seed),
        targets={"both hidden layers": ["body.0", "body.2"], "first hidden layer": ["body.0"], "second hidden layer": ["body.2"]},
        largest_r=32,
        modules_to_save=("head",) if new else (),
        samples=lambda model: _read_digits(model, *data(model.seed).test, first=5 if new else 0),
        evaluate=measure,
        r=4, alpha=8.0, lr=0.01, steps=600, loss_name="cross-entropy, nats", expect=(1e-4, 3.0), log=True, smooth=12,
        source="from lora_lab.live import digits_problem\n\nproblem = digits_problem(" + ("" if new else repr(task)) + ")",
    )  # fmt: skip


def _turned_problem() -> Problem:
    data = functools.cache(lambda seed: digits(rotation=90, seed=seed))

    def model(seed):
        base = copy.deepcopy(_one_layer(seed))
        base.seed = seed
        return base

    return Problem(
        name=DIGIT_TASKS["turned"],
        model=model,
        batches=lambda seed: Batches(*data(seed).train, batch_size=64, seed=seed),
        targets={"the layer": ["layer"]},
        largest_r=10,
        samples=lambda model: _read_digits(model, *data(model.seed).test),
        evaluate=lambda model: {"right on turned": evaluate(model, [data(model.seed).test], "cpu")},
        r=4, alpha=8.0, lr=0.01, steps=400, loss_name="cross-entropy, nats", expect=(0.05, 12.0), log=True, smooth=12,
        source="from lora_lab.live import digits_problem\n\nproblem = digits_problem('turned')",
    )  # fmt: skip


def _read_digits(model: nn.Module, x: Tensor, y: Tensor, first: int = 0) -> dict:
    """Two images of each class and what the model takes them for; class 0 is the digit `first`."""
    few = torch.cat([(y == digit).nonzero()[:2, 0] for digit in range(int(y.max()) + 1)])
    with torch.no_grad():
        predicted = model(x[few]).argmax(-1)
    text = lambda labels: [str(first + int(label)) for label in labels]  # noqa: E731
    return {"images": x[few].view(-1, 8, 8), "labels": text(y[few]), "predicted": text(predicted)}


@functools.cache
def _one_layer(seed: int) -> nn.Sequential:
    """The base of lab 00: one layer, 600 steps on upright digits from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(OrderedDict(layer=nn.Linear(64, 10)))
        nn.init.zeros_(model.layer.weight)
        for _ in train(model, Batches(*digits(seed=seed).train, seed=seed), steps=600, lr=1e-2, device="cpu"):
            pass
    return model


digits_of = functools.cache(lambda classes, seed: digits(classes=classes, seed=seed))


@functools.cache
def _pretrained(classes: int, seed: int) -> DigitClassifier:
    """The base of lab 02b: 600 steps on the digits 0 to `classes` - 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier(classes)
        for _ in train(model, Batches(*digits_of(range(classes), seed).train, seed=seed), steps=600, lr=3e-3, device="cpu"):
            pass
    return model


def text_problem(task: str | Task = "lighthouses", model: str = "pocket", *, batch_size: int = 8, device: str = "cpu", show: int = 0) -> Problem:
    """Fine-tune a GPT-2 to put facts into words, as in lab 07, and read on the way what it makes of one test meaning.

    task   a name for `load_task`, or a Task             model   a name for `load_gpt2`
    show   which of the test meanings the samples are about, counted from 0; below them stands which slots are missing, or too many

    A step takes tenths of a second on two cores, and a text about as long: `live_training` looks at it as often as a twentieth of the time allows.
    Raises what `load_task` and `load_gpt2` raise, IndexError for a meaning that is not there. Needs transformers.
    """
    call = [repr(task)] if isinstance(task, str) else []
    call += [f"{name}={value!r}" for name, value, usual in (("model", model, "pocket"), ("batch_size", batch_size, 8), ("device", device, "cpu"),
                                                              ("show", show, 0)) if value != usual]  # fmt: skip
    source = f"from lora_lab.live import text_problem\n\nproblem = text_problem({', '.join(call)})" if isinstance(task, str) else ""
    if isinstance(task, str):
        task = load_task(task)
    base, tokenizer = load_gpt2(model)
    examples = encode(task.train, tokenizer, base.config.n_positions)
    meanings = list(dict.fromkeys(example.meaning for example in task.test))
    meaning = meanings[show]

    def samples(adapted):
        text = generate(adapted, tokenizer, prompt(meaning, tokenizer), max_new_tokens=64).strip()
        errors = slot_errors(slots(meaning), text, task.rules)
        wrong = [f"{what}: {', '.join(found)}" for what, found in
                 (("missing", errors.missing), ("not asked for", errors.added), ("twice", errors.repeated)) if found]  # fmt: skip
        return {"text": f"{meaning}\n\n→ {text}\n\n{'; '.join(wrong) or 'all slots, and nothing else'}"}

    return Problem(
        name=f"GPT-2 ({model}) on {task.name}, data to text",
        model=lambda seed: copy.deepcopy(base),
        batches=lambda seed: TextBatches(examples, batch_size, seed=seed, pad=tokenizer.eos_token_id),
        targets={"all linear layers": "all-linear", "W_q and W_v": ["c_attn:q,v"], "the MLPs": ["c_fc", "mlp.c_proj"]},
        largest_r=64,
        loss=token_loss(),
        samples=samples,
        r=16, alpha=32.0, lr=3e-3, steps=150, loss_name="cross-entropy, nats a token", expect=(0.5, 5.0), smooth=8, device=device,
        source=source,
    )  # fmt: skip


class Curve:
    """y over a growing x, in a bounded number of points whatever their number was: neighbours share a bucket, and a bucket keeps its
    lowest and its highest point. The first and the last point are always there.

    max_points  most that `points` returns, at least 8. When the buckets are used up each two become one, so `append` costs O(1) on average
    """

    def __init__(self, max_points: int = 800):
        if max_points < 8:
            raise ValueError(f"a curve needs room for 8 points or more; found max_points={max_points}")
        self._most = (max_points - 2) // 4 * 2  # two points each, and an even number of buckets, to be merged in pairs
        self._width, self._filled = 1, 0  # points a bucket takes; points in the last one
        self._buckets: list[tuple] = []  # (x, y) of the lowest and (x, y) of the highest point
        self.first: tuple[float, float] | None = None
        self.last: tuple[float, float] | None = None
        self.count = 0

    def append(self, x: float, y: float) -> None:
        """Add a point. Raises ValueError for a number that is not finite, and for an x that is not larger than the one before."""
        point = float(x), float(y)
        if not (math.isfinite(point[0]) and math.isfinite(point[1])):
            raise ValueError(f"a curve takes finite numbers; found x={x}, y={y}")
        if self.last is None:
            self.first = point
        elif point[0] <= self.last[0]:
            raise ValueError(f"x must grow: {x} comes after {self.last[0]:g}")
        self.last, self.count = point, self.count + 1
        buckets = self._buckets
        if not buckets or self._filled == self._width:
            if len(buckets) == self._most:
                self._width *= 2
                buckets[:] = [_merged(*pair) for pair in zip(buckets[::2], buckets[1::2], strict=True)]
            buckets.append((point, point))
            self._filled = 1
        else:
            buckets[-1] = _merged(buckets[-1], (point, point))
            self._filled += 1

    def points(self) -> list[tuple[float, float]]:
        """(x, y) with x growing: all points while they are few, later the lowest and the highest of each bucket, the first and the last."""
        kept = sorted({point for bucket in self._buckets for point in bucket} | {p for p in (self.first, self.last) if p})
        return kept

    @property
    def lowest(self) -> float:
        """The smallest y there was. Raises ValueError on an empty curve."""
        return min(low[1] for low, _ in self._buckets)

    @property
    def highest(self) -> float:
        """The largest y there was. Raises ValueError on an empty curve."""
        return max(high[1] for _, high in self._buckets)

    def __len__(self) -> int:
        return self.count


def _merged(a, b):
    return (a[0] if a[0][1] <= b[0][1] else b[0]), (a[1] if a[1][1] >= b[1][1] else b[1])


@dataclass(frozen=True)
class Earlier:
    """A run that was left for another: its number, its settings at its end, its curves, and whether settings were moved while it went."""

    number: int  # the first run of a `LiveRun` is 0
    settings: Mapping[str, object]
    curve: Curve
    mean: Curve
    moved: bool


class LiveRun:
    """One training run of a `Problem`, step by step, that listens while it goes.

    r, alpha, lr, optimizer, targets (the name of one of the problem's choices), steps: None takes the problem's own
    seed     decides base, adapter and batches: `restart` begins again from the same numbers

    model      the adapted model             curve    loss over the step, as `train` reports it: before the step's update
    step       updates made so far           mean     the same, averaged over the problem's `smooth` steps
    earlier    the last few runs, see `restart`       moves    the last few (step, setting, value) that were set while it went

    Raises ValueError, before anything is made, for settings that make no sense. torch's global random state is left alone.
    """

    def __init__(
        self, problem: Problem, *, r: int | None = None, alpha: float | None = None, lr: float | None = None, optimizer: str | None = None,
        targets: str | None = None, seed: int = 0, steps: int | None = None,
    ):  # fmt: skip
        asked = {"r": r, "alpha": alpha, "lr": lr, "optimizer": optimizer, "targets": targets, "steps": steps}
        own = {name: getattr(problem, name) for name in asked} | {"targets": next(iter(problem.targets))}
        self.problem, self.earlier, self.number = problem, deque(maxlen=EARLIER), 0
        self._begin({**own, **{name: value for name, value in asked.items() if value is not None}, "seed": seed})

    def _begin(self, settings: dict) -> None:
        problem = self.problem
        if settings["targets"] not in problem.targets:
            raise ValueError(f"targets is one of {', '.join(map(repr, problem.targets))}; found {settings['targets']!r}")
        if settings["optimizer"] not in OPTIMIZERS:
            raise ValueError(f"optimizer is one of {', '.join(map(repr, OPTIMIZERS))}; found {settings['optimizer']!r}")
        if settings["steps"] < 1:
            raise ValueError(f"steps must be at least 1; found {settings['steps']}")
        _checked_lr(settings["lr"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["seed"])
            model = apply_lora(
                problem.model(settings["seed"]), settings["r"], settings["alpha"], problem.targets[settings["targets"]],
                modules_to_save=problem.modules_to_save,
            )  # fmt: skip
        # Nothing of the run before is touched until here, where nothing can go wrong any more.
        self._close()
        self.model, self._settings = model, settings
        self.step, self.curve, self.mean, self.moves = 0, Curve(POINTS), Curve(POINTS), deque(maxlen=MOVES)
        self._averages = 0.0, 0.0
        self._optimizer = None

    @property
    def settings(self) -> dict:
        """r, alpha, lr, optimizer, targets, steps, seed: as they are in force now."""
        return dict(self._settings)

    @property
    def layers(self) -> dict[str, LoRALayer]:
        """The LoRA layers by name."""
        return lora_layers(self.model)

    @property
    def done(self) -> bool:
        return self.step >= self._settings["steps"]

    def advance(self) -> Step | None:
        """One update; None when all `steps` are made. Raises what `train` raises; a later call goes on from the weights there are."""
        if self.done:
            return None
        if self._stream is None:
            self._stream = train(
                self.model, self._batches(), steps=2**60,  # the end is looked up before every step, so that it can be moved
                lr=lambda step: self._settings["lr"], optimizer=self._make_optimizer, loss=self.problem.loss, device=self.problem.device,
            )  # fmt: skip
        try:
            made = next(self._stream)
        except BaseException:
            self._stream = None  # a generator that raised is over
            raise
        self.step += 1
        self.curve.append(self.step, made.loss)
        self.mean.append(self.step, self._averaged(made.loss))
        # Counted here: a loop that was interrupted has begun anew at 1.
        return Step(self.step, made.loss, made.lr, made.grad_norm, made.samples_per_s)

    def loss_now(self) -> float:
        """The loss on the batch that the next step will see: what `advance` would report, without making the step (dropout aside)."""
        batch = next(iter(_From(self.problem.batches(self._settings["seed"]), self.step).from_step(0)))
        device = choose_device(self.problem.device)
        self.model.to(device)
        with torch.no_grad():
            return float(self.problem.loss(self.model, to_device(batch, device)))

    def finish(self) -> LiveRun:
        """Make all steps that are left; returns the run."""
        while self.advance():
            pass
        return self

    def extend(self, steps: int) -> None:
        """Let the run be `steps` longer than it was."""
        if steps < 1:
            raise ValueError(f"a run is extended by 1 step or more; found {steps}")
        self._settings["steps"] += steps

    def set_lr(self, value: float) -> None:
        """The learning rate from the next step on, finite, 0 or more."""
        self._settings["lr"] = _checked_lr(value)
        self._moved("lr", value)

    def set_alpha(self, value: float, mode: str = "volume") -> None:
        """alpha from the next step on. What is already learned depends on the mode:

        volume     ΔW = (alpha / r) B A gets louder by k = new alpha / old alpha: the function changes at once
        step size  B is divided by k, so that ΔW stays and only what comes is changed. By a power of two ΔW stays to the last bit
                   (but for numbers near the end of float's range), else to rounding.

        In mode "step size" B's gradient is k times as large from now on, because scaling is. The optimizer's memory of B is taken
        along, or the first steps would be wrong: Adam's first moment times k, its second times k². Then Adam's next steps of B have the
        size they would have had, which makes them k times as large in ΔW; with plain SGD, which keeps nothing, k² times.
        A's gradient and its moments stay.

        Raises ValueError for another mode, for an alpha that is not finite, and for 0 in mode "step size".
        """
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(map(repr, MODES))}; found {mode!r}")
        if not math.isfinite(value):
            raise ValueError(f"alpha must be a finite number; found {value}")
        old = self._settings["alpha"]
        if mode == "step size" and (value == 0 or old == 0):
            raise ValueError(f'mode "step size" divides B by new alpha / old alpha, {value:g} / {old:g}: use mode "volume" to go to 0 or from 0')
        for layer in self.layers.values():
            layer.alpha = value
            if mode == "step size":
                self._rescale_B(layer, value / old)
        self._settings["alpha"] = float(value)
        self._moved("alpha", value)

    def _rescale_B(self, layer: LoRALayer, k: float) -> None:
        with torch.no_grad():
            layer.lora_B /= k
            state = self._optimizer.state.get(layer.lora_B, {}) if self._optimizer else {}
            for name, power in (("exp_avg", 1), ("exp_avg_sq", 2), ("momentum_buffer", 1)):
                if isinstance(state.get(name), Tensor):
                    state[name] *= k**power

    def restart(self, *, keep: bool = True, **changes) -> None:
        """Begin again at step 0 from the same seed, with other settings if any are named (those of the constructor).

        The curve so far goes to `earlier`, which keeps the last few, unless `keep` is False; a run without a step leaves nothing, and
        one that is the same as an earlier one takes its place. If a setting is refused, the run stays as it was.
        """
        unknown = sorted(set(changes) - set(self._settings))
        if unknown:
            raise TypeError(f"no setting is called {', '.join(unknown)}; there are {', '.join(self._settings)}")
        before = Earlier(self.number, self.settings, self.curve, self.mean, bool(self.moves))
        self._begin({**self._settings, **changes})
        self.number += 1
        if keep and len(before.curve):
            same = [e for e in self.earlier if e.settings == before.settings and not e.moved and not before.moved]
            for entry in same:
                self.earlier.remove(entry)
            self.earlier.append(before)

    def delta_norm(self) -> float:
        """||ΔW||, Frobenius, over all adapted layers together: the root of the sum of their squares, from the factors."""
        return norm(self.spectrum())

    def spectrum(self) -> dict[str, Tensor]:
        """Layer -> the singular values of its ΔW, largest first, at most r of them (fused layers: r for each slice)."""
        return {
            name: factored_svd(layer.full_B().detach(), layer.lora_A.detach(), layer.scaling)[1] for name, layer in self.layers.items()
        }

    def floor(self) -> float | None:
        """The least loss that this run's rank can reach, if it is known."""
        return self.problem.floor(self._settings["r"])

    def code(self) -> str:
        """Python that trains with the settings in force now, from step 0. It needs nothing but this package."""
        s, problem = self._settings, self.problem
        make = problem.source or "# `problem` is the Problem that this view was made with"
        saved = f", modules_to_save={list(problem.modules_to_save)}" if problem.modules_to_save else ""
        targets = problem.targets[s["targets"]]
        targets = targets if isinstance(targets, str) else list(targets)
        moved = "# Settings were moved while the run went; here they hold from the first step on.\n" if self.moves else ""
        return (
            f"import torch\n\nfrom lora_lab import apply_lora, train\n{make}\n{moved}"
            f"torch.manual_seed({s['seed']})\n"
            f"model = apply_lora(problem.model({s['seed']}), r={s['r']}, alpha={s['alpha']:g}, target_modules={targets!r}{saved})\n"
            f"steps = train(\n    model, problem.batches({s['seed']}), steps={s['steps']}, lr={s['lr']!r}, optimizer={s['optimizer']!r},\n"
            f"    loss=problem.loss, device={problem.device!r},\n)\n"
            "losses = [step.loss for step in steps]\n"
            'print(f"loss {losses[0]:.4g} at step 1, {losses[-1]:.4g} at step {len(losses)}")\n'
        )

    def _make_optimizer(self, parameters):
        # Kept, so that a run that was interrupted goes on with the same moments.
        if self._optimizer is None:
            self._optimizer = OPTIMIZERS[self._settings["optimizer"]](parameters, lr=self._settings["lr"], weight_decay=0.0)
        return self._optimizer

    def _averaged(self, loss: float) -> float:
        """The exponential average, started without bias: at step 1 it is the loss itself."""
        keep = 1 - 1 / self.problem.smooth
        total, weight = self._averages
        self._averages = total, weight = keep * total + loss, keep * weight + 1
        return total / weight

    def _moved(self, name: str, value: float) -> None:
        if not self.step:
            return
        if self.moves and self.moves[-1][:2] == (self.step, name):
            self.moves.pop()  # many events of one slider between two steps are one move
        self.moves.append((self.step, name, float(value)))

    def _batches(self):
        batches = self.problem.batches(self._settings["seed"])
        return _From(batches, self.step) if self.step else batches

    _stream = None

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()  # puts the modules' training modes back
        self._stream = None


class _From:
    """Batches from step `start` on, for a run that goes on after an interruption."""

    def __init__(self, batches, start: int):
        self.batches, self.start = batches, start

    def from_step(self, step: int):
        if hasattr(self.batches, "from_step"):
            return self.batches.from_step(self.start + step)
        return islice(chain.from_iterable(repeat(self.batches)), self.start + step, None)


def norm(spectra: Mapping[str, Tensor]) -> float:
    """The Frobenius norm of all layers together: the root of the sum of the squares of all their singular values."""
    return math.sqrt(sum(float(S.double().square().sum()) for S in spectra.values()))


def _checked_lr(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"lr must be a finite number, 0 or more; found {value}")
    return float(value)
