"""One task, several ways to adapt a model to it, several seeds: what each way scores, trains, costs and leaves behind.

    comparison = finetune_and_compare(task)        frozen base, linear probe, LoRA, full fine-tuning; seeds 0, 1, 2
    comparison                                     in a notebook: a table
    comparison.gap("LoRA", "full fine-tuning")     paired by seed: mean difference and the half-width of its 95 % interval

A `Task` says what the model is, what it reads and how it is scored; a `Way` says what trains. Neither knows the other, so any way can be
tried on any task.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, stdev

import torch
from torch import nn

from .adapt import apply_lora
from .counting import count_parameters, safetensors_bytes
from .state import adapter_bytes
from .tables import html_table, text_table
from .train import batch_loss, choose_device, linear_schedule, modes_restored, train
from .updates import TrainingDiverged


@dataclass(frozen=True)
class Task:
    """What is to be learned, apart from how.

    name      in a title: "moving digits: which way"
    base      base(seed) -> the pretrained model as it meets the task, a fresh head in place where the task needs one. Called once a seed and
              copied for each way
    train     train(seed) -> batches for `lora_lab.train.train`, which can be gone through more than once
    metric    metric(model) -> {score: number} on the test set; the first is the headline. The model is in eval mode, without gradients
    targets   what LoRA adapts: `apply_lora`'s target_modules
    head      names of modules that every way but the frozen base trains: a fresh head
    probe     names of modules that the linear probe trains; empty: the head. For a language model: ("lm_head",)
    lower     scores of which less is better
    validate  validate(model) -> a number, higher is better, on data that is not the test set: chooses among several rates. None: one rate
    loss      as for `train`
    lr        way's name -> learning rate, or several to choose from. The rate falls in a line to 0
    steps, warmup    updates in a run, and how many of them the rate rises
    r, alpha  of LoRA
    settings  more for `train`: clip, weight_decay, ...

    `metric` and `validate` may also take (model, seed), where the seed decides the split.
    """

    name: str
    base: Callable[[int], nn.Module]
    train: Callable[[int], Iterable]
    metric: Callable[..., Mapping[str, float]]
    targets: str | Sequence[str]
    head: Sequence[str] = ()
    probe: Sequence[str] = ()
    lower: Sequence[str] = ()
    validate: Callable[..., float] | None = None
    loss: Callable = batch_loss
    lr: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    steps: int = 300
    warmup: int = 0
    r: int = 4
    alpha: float = 8
    settings: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """One way to adapt a model.

    prepare  prepare(model, task, seed) -> a model of which exactly that requires a gradient which this way trains. It may change the model
             it gets and may wrap it; a model with nothing to train is scored as it is
    stored   stored(model) -> bytes of the file that this way leaves behind for the task. None: the trained parameters
    lr       where the task has no rate under this name: a rate, several, or the name of the way whose rates are taken
    """

    name: str
    prepare: Callable[[nn.Module, Task, int], nn.Module]
    stored: Callable[[nn.Module], int] | None = None
    lr: float | Sequence[float] | str | None = None


# ---- the four ways that come with it ----------------------------------------------------------------------------------------------------


def _frozen(model, task, seed):
    return model.requires_grad_(False)


def _probe(model, task, seed):
    model.requires_grad_(False)
    names = tuple(task.probe or task.head)
    if not names:
        raise ValueError(f"task {task.name!r}: a linear probe trains the head, and the task names none. Give head= or probe=, or leave PROBE out")
    for name in names:
        _own(model, name).requires_grad_(True)
    return model


def _own(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, with parameters of its own: a tied head must not take the embedding along."""
    module = model.get_submodule(name)
    for inner in module.modules():
        for key, parameter in inner.named_parameters(recurse=False):
            setattr(inner, key, nn.Parameter(parameter.detach().clone()))
    return module


def _full(model, task, seed):
    return model.requires_grad_(True)


def lora(r: int | None = None, alpha: float | None = None, name: str | None = None, **settings) -> Way:
    """LoRA as a way; r and alpha None: the task's. settings: more for `apply_lora`. Without a name it is called by its rank."""

    def prepare(model, task, seed):
        torch.manual_seed(seed)  # A
        own = {"r": task.r if r is None else r, "alpha": task.alpha if alpha is None else alpha, "target_modules": task.targets, "modules_to_save": task.head}
        return apply_lora(model, **own | settings)

    return Way(name or ("LoRA" if r is None else f"LoRA r={r}"), prepare, adapter_bytes, lr="LoRA")


FROZEN = Way("frozen base", _frozen)
PROBE = Way("linear probe", _probe)
LORA = lora()
FULL = Way("full fine-tuning", _full)


def trained_bytes(model: nn.Module) -> int:
    """The exact size of a .safetensors file with all parameters that train, in bytes; 0 if none does. A tied one is stored once."""
    tensors = {name: (tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in model.named_parameters() if p.requires_grad}
    return safetensors_bytes(tensors) if tensors else 0


# ---- results ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One run.

    scores     of the test set; nan in each if the run diverged, and then `problem` says how
    trainable, total    parameters, the adapter's among them, a tied one once; weights that are stored as codes (a module's `coded`) count in total
    lr         the rate that was taken; None where nothing trains
    seconds    of training, wall clock, without choosing a rate and without scoring
    bytes      of the file that is left behind
    """

    way: str
    seed: int
    lr: float | None
    scores: Mapping[str, float]
    trainable: int
    total: int
    seconds: float
    bytes: int
    problem: str = ""


@dataclass(frozen=True, repr=False)
class Comparison:
    """All runs. `rows` in the order of ways, then seeds; `models[way, seed]` the adapted models, in eval mode, on the CPU."""

    task: Task
    rows: tuple[Row, ...]
    models: Mapping[tuple[str, int], nn.Module]

    @property
    def ways(self) -> list[str]:
        return list(dict.fromkeys(row.way for row in self.rows))

    @property
    def scores(self) -> list[str]:
        """The names of the scores, the headline first."""
        return list(self.rows[0].scores)

    def of(self, way: str) -> list[Row]:
        """The runs of one way, a row for each seed. Raises KeyError for a way that was not run."""
        found = [row for row in self.rows if row.way == way]
        if not found:
            raise KeyError(f"no way {way!r} in this comparison; there are {', '.join(self.ways)}")
        return found

    def values(self, way: str, score: str | None = None) -> list[float]:
        """One number for each seed: the headline, or another score. Raises KeyError for a way or a score that is not there."""
        score = score or self.scores[0]
        if score not in self.scores:
            raise KeyError(f"no score {score!r} in this comparison; there are {', '.join(self.scores)}")
        return [row.scores[score] for row in self.of(way)]

    def mean(self, way: str, score: str | None = None) -> float:
        return mean(self.values(way, score))

    def groups(self, score: str | None = None) -> dict[str, list[float]]:
        """way -> its values, for `lora_lab.view.plot_spread`; ways of which no run has a score are left out, as is a run that diverged."""
        found = {way: [v for v in self.values(way, score) if math.isfinite(v)] for way in self.ways}
        return {way: values for way, values in found.items() if values}

    def gap(self, a: str, b: str, score: str | None = None) -> tuple[float, float]:
        """(mean of a - b within each seed, half-width of its 95 % interval by Student's t); the half-width of a single seed is nan."""
        return interval([x - y for x, y in zip(self.values(a, score), self.values(b, score), strict=True)])

    def table(self) -> str:
        return "\n".join([self._title(), text_table([self._head(), *self._cells()]), *self._problems()])

    __str__ = __repr__ = table

    def _repr_html_(self) -> str:
        return html_table([self._head(), *self._cells()], self._title(), self._problems())

    def _title(self) -> str:
        n, task = len({row.seed for row in self.rows}), self.task
        seeds = f"mean ± standard deviation over {n} seeds" if n > 1 else f"seed {self.rows[0].seed} alone"
        targets = task.targets if isinstance(task.targets, str) else ", ".join(task.targets)
        return f"{task.name}: {seeds}; {task.steps} steps; LoRA r={task.r}, alpha={task.alpha:g} on {targets}"

    def _head(self) -> list[str]:
        arrows = [f"{score} {'↓' if score in self.task.lower else '↑'}" for score in self.scores]
        return ["", *arrows, "trained", "share", "seconds", "file, bytes"]

    def _cells(self) -> list[list[str]]:
        cells, largest = [], {score: max((abs(v) for row in self.rows if math.isfinite(v := row.scores[score])), default=0.0) for score in self.scores}
        for way in self.ways:
            runs = self.of(way)
            row = [way, *(_spread(self.values(way, score), 1 if largest[score] >= 10 else 3) for score in self.scores)]
            row += [f"{runs[0].trainable:,}", f"{runs[0].trainable / runs[0].total:.1%}", f"{mean(r.seconds for r in runs):.1f}", f"{runs[0].bytes:,}"]
            cells.append(row)
        return cells

    def _problems(self) -> list[str]:
        return [f"{row.way}, seed {row.seed}: {row.problem}" for row in self.rows if row.problem]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of its 95 % interval by Student's t, n - 1 degrees of freedom): nan where a value is not finite or there is only one.

    >>> interval([1.0, 2.0, 3.0])[0]
    2.0
    """
    if not values:
        return math.nan, math.nan
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values), math.nan
    if len(values) == 1:
        return values[0], math.nan
    from scipy.special import stdtrit  # comes with scikit-learn

    return mean(values), float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))


def _sd(values: Sequence[float]) -> float:
    # statistics.stdev looks for a fraction's numerator, and nan has none
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def _spread(values: Sequence[float], digits: int) -> str:
    """mean ± sd, of the runs that came to an end, with how many did not."""
    known = [v for v in values if math.isfinite(v)]
    if not known:
        return "diverged"
    text = f"{mean(known):.{digits}f}" + (f" ± {stdev(known):.{digits}f}" if len(known) > 1 else "")
    return text + (f" ({len(values) - len(known)} diverged)" if len(known) < len(values) else "")


# ---- the runs ---------------------------------------------------------------------------------------------------------------------------


def finetune_and_compare(
    task: Task,
    ways: Sequence[Way] = (FROZEN, PROBE, LORA, FULL),
    seeds: Iterable[int] = (0, 1, 2),
    device: str | torch.device = "cpu",
    keep: Iterable[int] | None = None,
) -> Comparison:
    """Adapt the task's base in each way with each seed, and score what comes out on the test set.

    seeds  decide the fresh head, A, the order of the batches, and the split where the task lets them: within a seed the ways meet the same, so
           that differences can be taken seed by seed. The same seed gives the same numbers. torch's random state is put back
    keep   seeds whose models are kept; None: all

    Where a way has several learning rates, the first seed chooses by `task.validate`, never by the test set, and the others take that rate.
    A run that diverges has nan for its scores, and its row says so. Raises ValueError for a task or a way that makes no sense: no way, no seed,
    two ways of one name, a way without a rate, several rates without `validate`, scores without a headline.
    """
    ways, seeds = list(ways), list(seeds)
    if not ways or not seeds:
        raise ValueError(f"a comparison needs a way and a seed at least; found {len(ways)} ways and {len(seeds)} seeds")
    names = [way.name for way in ways]
    for what, listed in (("ways", names), ("seeds", seeds)):
        if twice := sorted({str(n) for n in listed if listed.count(n) > 1}):
            raise ValueError(f"{what} must be different; found twice: {', '.join(twice)}")
    device = choose_device(device)
    keep = set(seeds if keep is None else keep)
    chosen: dict[str, float] = {}
    found: dict[str, list[Row]] = {name: [] for name in names}
    models = {}
    with torch.random.fork_rng(None if device.type == "cuda" else []):
        for seed in seeds:
            torch.manual_seed(seed)
            base, batches = task.base(seed), task.train(seed)
            for way in ways:
                row, model = _run(way, task, base, batches, seed, device, chosen)
                found[way.name].append(row)
                if seed in keep:
                    models[way.name, seed] = model.to("cpu")
    rows = [row for name in names for row in found[name]]
    scores = next((list(row.scores) for row in rows if row.scores), None)
    if scores is None:
        raise TrainingDiverged(f"task {task.name!r}: every run diverged; {rows[0].problem}")
    # nan only now: how the scores are called is known from a run that came to its end
    rows = [replace(row, scores=dict.fromkeys(scores, math.nan)) if row.problem else row for row in rows]
    return Comparison(task, tuple(rows), models)


def _run(way: Way, task: Task, base: nn.Module, batches, seed: int, device, chosen: dict[str, float]) -> tuple[Row, nn.Module]:
    """One way with one seed. `chosen` remembers the way's rate from its first seed."""
    torch.manual_seed(seed)
    model = way.prepare(copy.deepcopy(base), task, seed)
    counted = count_parameters(model)
    total = counted.total + sum(getattr(m, "coded", 0) for m in model.modules())
    stored = (way.stored or trained_bytes)(model)
    if counted.trainable == 0:
        scores = _scores(task, model.to(device), seed)
        return Row(way.name, seed, None, scores, 0, total, 0.0, stored), model
    rates = [chosen[way.name]] if way.name in chosen else _rates(way, task)
    best = None
    for rate in rates:
        # The way again from its seed for each rate: a wrapped model may not stand a copy.
        if best is not None:
            torch.manual_seed(seed)
            model = way.prepare(copy.deepcopy(base), task, seed)
        problem, began = "", time.perf_counter()
        try:
            for _ in train(model, batches, task.steps, linear_schedule(rate, task.steps, task.warmup), loss=task.loss, device=device, seed=seed,
                           **task.settings):  # fmt: skip
                pass
        except TrainingDiverged as error:
            problem = str(error)
        seconds = time.perf_counter() - began
        value = -math.inf if problem or len(rates) == 1 else _judged(task.validate, model, seed)
        if best is None or value > best[0]:
            best = (value if value == value else -math.inf, rate, seconds, problem, model)
    _, rate, seconds, problem, model = best
    if not problem:
        chosen[way.name] = rate
    scores = {} if problem else _scores(task, model, seed)
    return Row(way.name, seed, rate, scores, counted.trainable, total, seconds, stored, problem), model.eval()


def _rates(way: Way, task: Task) -> list[float]:
    rates = task.lr.get(way.name, way.lr)
    if isinstance(rates, str):
        rates = task.lr.get(rates)
    if rates is None:
        known = ", ".join(task.lr) or "nothing"
        raise ValueError(f"task {task.name!r} has no learning rate for {way.name!r}; give lr={{{way.name!r}: ...}}. It has some for {known}")
    rates = list(rates) if isinstance(rates, Iterable) else [rates]
    if not rates:
        raise ValueError(f"task {task.name!r}: the learning rates for {way.name!r} are an empty list")
    if len(rates) > 1 and task.validate is None:
        raise ValueError(f"task {task.name!r} has {len(rates)} learning rates for {way.name!r} and no validate= to choose one with; the test set must not")
    return rates


def _judged(judge: Callable, model: nn.Module, seed: int):
    """What `metric` or `validate` says of a model: in eval mode, without gradients, modes put back."""
    torch.manual_seed(seed)  # it may draw, when texts are sampled
    wants = [p for p in inspect.signature(judge).parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    with modes_restored(model), torch.no_grad():
        model.eval()
        return judge(model, seed) if len(wants) == 2 else judge(model)


def _scores(task: Task, model: nn.Module, seed: int) -> dict[str, float]:
    scores = {name: float(value) for name, value in _judged(task.metric, model, seed).items()}
    if not scores:
        raise ValueError(f"task {task.name!r}: metric(model) gave no score; it returns {{name: number}}, the headline first")
    model.eval()
    return scores
