"""The runs of a capstone: floors, one knob at a time with a rate of its own, the control, and one look at the test part."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..adapt import apply_lora
from ..corpus import END, yardsticks
from ..data import Batches
from ..files import atomic_write
from ..gpt2 import load_gpt2, next_token_loss, token_blocks, token_ids
from ..sweep import sweep
from ..train import TrainingDiverged, linear_schedule, modes_restored, train
from .evidence import CONTROL, FROZEN, FULL, LORA, Evidence, audit
from .texts import QUESTIONS, Parts, TextError, open_questions

TARGETS = {
    "W_q and W_v": ("c_attn:q,v",),
    "attention": ("c_attn", "attn.c_proj"),
    "MLP": ("c_fc", "mlp.c_proj"),
    "all": "all-linear",
}


def one_at_a_time(choice: Mapping, **values: Sequence) -> list[dict]:
    """The choice, and for each value of each knob the choice with that value: settings for `Study.tune`. With r, alpha / r stays as it is.

    >>> one_at_a_time({"r": 4, "alpha": 8, "targets": "all"}, r=[1, 4], alpha=[32])
    [{'r': 4, 'alpha': 8, 'targets': 'all'}, {'r': 1, 'alpha': 2.0, 'targets': 'all'}, {'r': 4, 'alpha': 32, 'targets': 'all'}]
    """
    found = [dict(choice)]
    for knob, tried in values.items():
        if knob not in choice:
            raise ValueError(f"{knob!r} is no knob of the choice, which has {', '.join(choice)}")
        for value in tried:
            setting = {**choice, knob: value}
            if knob == "r" and value != choice["r"]:
                setting["alpha"] = choice["alpha"] * value / choice["r"]
            if setting not in found:
                found.append(setting)
    return found


# ---- one run ----------------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _base(model: str) -> tuple[nn.Module, object]:
    return load_gpt2(model)


@lru_cache(maxsize=2)
def _texts(folder: str, digests: str) -> dict[str, str]:
    return json.loads(Path(folder, "texts.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=4)
def _rows(folder: str, digests: str, model: str, context: int, shuffled: bool):
    """(n, context) token rows of the training text; shuffled: the same tokens, in each row in another order."""
    rows = token_blocks(_base(model)[1], _texts(folder, digests)["train"], context)
    if shuffled:
        generator = torch.Generator().manual_seed(0)
        rows = torch.stack([row[torch.randperm(context, generator=generator)] for row in rows])
    return rows


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokenizer, text: str, batch: int = 8) -> float:
    """Bits that the documents of `text` cost per byte, each token given those before it in its window of the model's context.

    <|endoftext|> between documents is read and not predicted: where a text ends says nothing of its language, and in a file of single sentences it
    would be most of what is learned.
    """
    end, ids = tokenizer.eos_token_id, token_ids(tokenizer, text)
    context = model.config.n_positions
    rest = -len(ids) % context
    x = torch.tensor([end, *ids[:-1]] + [end] * rest).view(-1, context)
    y = torch.tensor([-100 if i == end else i for i in ids] + [-100] * rest).view(-1, context)
    nats = 0.0
    with modes_restored(model):
        model.eval()
        for xs, ys in zip(x.split(batch), y.split(batch), strict=True):
            logits = model(input_ids=xs.to(model.device)).logits.float()
            nats += F.cross_entropy(logits.flatten(0, 1), ys.flatten().to(model.device), reduction="sum").item()
    return nats / math.log(2) / len(text.replace(END, "").encode("utf-8"))


def adapted(folder, digests, model, way, r, alpha, targets, lr, steps, batch, context, device, seed) -> tuple[nn.Module, object]:
    """The base, trained in one way on the training text; a rate that falls in a line to 0 after a tenth of warm-up. Raises TrainingDiverged."""
    base, tokenizer = _base(model)
    tuned = copy.deepcopy(base)
    torch.manual_seed(seed)  # A
    if way in (LORA, CONTROL):
        apply_lora(tuned, r=r, alpha=alpha, target_modules=TARGETS.get(targets, targets))
    elif way == FROZEN:
        return tuned.requires_grad_(False), tokenizer
    rows = _rows(folder, digests, model, context, way == CONTROL)
    rate = linear_schedule(lr, steps, min(steps // 10, steps - 1))
    for _ in train(tuned, Batches(rows, rows, batch, seed), steps, rate, loss=next_token_loss, clip=1.0, device=device, seed=seed):
        pass
    return tuned, tokenizer


def trial(folder, digests, model, way, r, alpha, targets, lr, steps, batch, context, device, part, seed) -> dict[str, float]:
    """{"score": bits per byte of a part}: what `sweep` calls. nan if the run diverged."""
    try:
        tuned, tokenizer = adapted(folder, digests, model, way, r, alpha, targets, lr, steps, batch, context, device, seed)
    except TrainingDiverged:
        return {"score": math.nan}
    return {"score": bits_per_byte(tuned, tokenizer, _texts(folder, digests)[part])}


# ---- all of them ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What a study will take, before it starts: (what, runs, seconds) per row. Measured here: seconds a step, and of one scoring."""

    rows: tuple[tuple[str, int, float], ...]
    step: float
    scoring: float

    @property
    def seconds(self) -> float:
        return sum(row[2] for row in self.rows)

    @property
    def runs(self) -> int:
        return sum(row[1] for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{name:44s} {runs:4d} runs {_clock(seconds):>8s}" for name, runs, seconds in (*self.rows, ("all", self.runs, self.seconds))]
        more = "measured here; a rate at the edge of its grid takes a run more"
        return "\n".join([*lines, f"{self.step:.3f} s a step, {self.scoring:.2f} s a scoring, {more}"])


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Study:
    """Runs on one data set with one base, all collected in `evidence`, all kept in `folder`: a study that is stopped goes on where it was.

    parts    from `split`; answers: to `QUESTIONS`, before anything trains
    model    what `load_gpt2` takes: "pocket", "gpt2", a folder
    steps, batch, context   updates, rows a batch, tokens a row: the same for every run, so that only the knobs differ
    scored   bytes of the validation part that a run is scored on (the beginnings of its documents); the test part is scored whole
    n_jobs   processes for `sweep`; each holds a model

    Raises ValueError for questions without an answer, TextError for a training part that does not fill a batch.
    """

    def __init__(
        self, parts: Parts, answers: Mapping[str, str], *, model: str | os.PathLike = "pocket", folder: str | os.PathLike = "capstone", steps: int = 100,
        batch: int = 4, context: int = 64, seeds: Iterable[int] = (0, 1, 2), scored: int = 8_000, device: str = "cpu", n_jobs: int = 1,
    ):  # fmt: skip
        if left := open_questions(answers):
            asked = "\n".join(f"  {key}: {QUESTIONS[key]}" for key in left)
            raise ValueError(f"before training, answer in a sentence each (answers={{...}}):\n{asked}")
        self.parts, self.model, self.folder, self.seeds, self.n_jobs = parts, str(model), Path(folder), tuple(seeds), n_jobs
        if not self.seeds:
            raise ValueError("a study needs a seed; three make a spread")
        self.same = {"steps": steps, "batch": batch, "context": context, "device": device}
        texts = {"train": parts.text("train"), "validation": _beginnings(parts, scored), "test": parts.text("test")}
        card = parts.card()
        self.digests = "-".join([card["parts"]["train"]["digest"], card["parts"]["validation"]["digest"], card["parts"]["test"]["digest"], str(scored)])
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / "texts.json") as path:
            path.write_text(json.dumps(texts), encoding="utf-8")
        rows = _rows(str(self.folder), self.digests, self.model, context, False)
        if len(rows) < batch:
            raise TextError(f"the training part fills {len(rows)} rows of {context} tokens, fewer than a batch of {batch}: more text, or shorter rows")
        looks = self.folder / "looks.json"
        self.looks = json.loads(looks.read_text(encoding="utf-8")) if looks.exists() else []  # at every test part that this folder has seen
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, device {device}; torch {torch.__version__}"
        scored_bytes = {part: len(texts[part].replace(END, "").encode("utf-8")) for part in ("validation", "test")}
        data = {**card, "answers": dict(answers), "model": self.model, "scored": scored_bytes, "machine": machine}
        # Whatever else was changed since, training text or `scored`: who looked at this test part has seen it.
        self.evidence = Evidence(data=data, looks=[look for look in self.looks if look["digests"].split("-")[2] == card["parts"]["test"]["digest"]])

    def advice(self) -> str:
        """Sizes, in the units that matter: tokens, passes through the text, documents in the test."""
        train, tokenizer = self.parts.text("train"), _base(self.model)[1]
        tokens = len(token_ids(tokenizer, train))
        seen = self.same["steps"] * self.same["batch"] * self.same["context"]
        lines = [f"{tokens:,} training tokens ({self.parts.size('train') / tokens:.2f} bytes each); {seen:,} are seen in a run: {seen / tokens:.2f} passes"]
        if seen > 4 * tokens:
            lines.append("More than four passes: it will learn the text by heart. Fewer steps, or more text; watch validation, not the training loss")
        if seen < tokens / 20:
            lines.append("Less than a twentieth of the text is seen: more steps will pay before any knob does")
        for part in ("validation", "test"):
            if len(self.parts.of(part)) < 5:
                lines.append(f"{part}: {len(self.parts.of(part))} document(s). Seeds show luck in training, not in which documents stand there: say so")
        return "\n".join(lines)

    # ---- before it starts ----

    @staticmethod
    def elsewhere(name: str = "gpt2", r: int = 8, batch: int = 8, context: int = 256, teraflops: float = 8.1, share: float = 0.3, gpu: str = "T4") -> str:
        """Would a larger base fit, and how long would a step take? Counted from shapes, for a GPU: no weights, no network.

        teraflops, share   the GPU's own figure for the precision that is used (8.1: a T4 in float32), and which part of it one hopes to get
        """
        from ..ledger import readable, training_flops, training_memory
        from ..presets import gpu_bytes, preset

        big = apply_lora(preset(name).build(), r=r, alpha=2 * r, target_modules="all-linear")
        memory, work = training_memory(big, batch, context, dropout=0.0, device="cuda"), sum(training_flops(big, batch, context))
        return (
            f"{name}, LoRA r={r} on all linear layers, {batch} rows of {context} tokens: {readable(memory.peak)} at its peak of the {gpu}'s "
            f"{readable(gpu_bytes(gpu))}; {work / 1e12:.2f} TFLOP a step, {work / (teraflops * 1e12 * share):.2f} s if {share:.0%} of "
            f"{teraflops:g} TFLOP/s are got. Predicted: measure with plan() there"
        )

    def plan(self, settings: Sequence[Mapping], rates: Sequence[float], full_rates: Sequence[float] = ()) -> Budget:
        """How long the study will take here. Two steps of LoRA and of full fine-tuning are run and thrown away, and one scoring."""
        cost, trained = {}, {**self._plain(LORA, settings[0], rates[0]), "steps": 2}
        for way in (LORA, FULL) if full_rates else (LORA,):
            adapted(**trained | {"way": way, "steps": 1}, seed=0)  # the first step of a process is no step
            began = time.perf_counter()
            tuned, tokenizer = adapted(**trained | {"way": way}, seed=0)
            cost[way] = (time.perf_counter() - began) / 2
        began = time.perf_counter()
        bits_per_byte(tuned, tokenizer, self._text("validation"))
        scoring = time.perf_counter() - began
        tests = scoring * len(self._text("test")) / len(self._text("validation"))
        steps, more = self.same["steps"], len(self.seeds) - 1

        def row(name: str, runs: int, way: str = LORA, extra: float = 0.0):
            return name, runs, runs * (steps * cost.get(way, 0.0) + scoring) + extra

        rows = [row("frozen base", 1, FROZEN)]
        if full_rates:
            rows.append(row(f"full fine-tuning: {len(full_rates)} rates, {len(self.seeds)} seeds", len(full_rates) + more, FULL))
        rows.append(row(f"{len(settings)} settings x ({len(rates)} rates, {len(self.seeds)} seeds)", len(settings) * (len(rates) + more)))
        rows.append(row("control: shuffled text", len(self.seeds), CONTROL if CONTROL in cost else LORA))
        finals = len(self.seeds) * (1 + bool(full_rates)) + 1
        rows.append(("one look at the test part", finals, finals * tests + len(self.seeds) * steps * sum(cost.values())))
        return Budget(tuple(rows), cost[LORA], scoring)

    # ---- runs ----

    def floors(self, full_rates: Sequence[float] = ()) -> None:
        """The frozen base; unigram and bigram of the training tokens; full fine-tuning with its own rate, if rates are given."""
        self._run([self._plain(FROZEN)], self.seeds[:1])
        for name, score in self._predictors("validation").items():
            self.evidence.add(name, score, part="validation", digest=self._digest("validation"))
        if full_rates:
            self._tune({"way": FULL}, full_rates)

    def tune(self, settings: Sequence[Mapping], rates: Sequence[float]) -> None:
        """Every setting with every rate on the first seed, and with its best rate on the others. A best rate at the edge of its grid gets a
        neighbour beyond it, twice at most: what is still at the edge then, the audit will say."""
        for setting in settings:
            self._tune(dict(setting), rates)

    def _tune(self, side: dict, rates: Sequence[float]) -> None:
        way = side.get("way", LORA)
        tried = sorted(rates)
        self._run([self._plain(way, side, rate) for rate in tried], self.seeds[:1])
        for _ in range(2):
            best = self.evidence.tuned(side)
            if best not in (tried[0], tried[-1]) or len(tried) < 2:
                break
            beyond = tried[0] ** 2 / tried[1] if best == tried[0] else tried[-1] ** 2 / tried[-2]
            beyond = float(f"{beyond:.3g}")
            tried = sorted([*tried, beyond])
            self._run([self._plain(way, side, beyond)], self.seeds[:1])
        self._run([self._plain(way, side, self.evidence.tuned(side))], self.seeds[1:])

    def control(self, choice: Mapping) -> None:
        """The choice, at its rate, trained on the same tokens in another order: it must not improve on the frozen base."""
        self._run([self._plain(CONTROL, choice, self.evidence.tuned(choice))], self.seeds)

    def choose(self, choice: Mapping) -> None:
        self.evidence.choice = dict(choice)

    def look(self, choice: Mapping | None = None) -> dict[str, list[float]]:
        """The test part, once: the choice with all seeds, the floors beside it; {way: scores}. Every look is kept in looks.json and in the evidence.

        The same call again, with nothing changed, is the same look. Another choice, rate, number of steps, training text or `scored` is another one.
        """
        choice = dict(choice or self.evidence.choice)
        rate = self.evidence.tuned(choice)
        if rate is None:
            raise ValueError(f"{choice} has not been run on validation: tune it before you look")
        recipe = {key: value for key, value in self.same.items() if key != "device"}
        what = {"settings": {**choice, "lr": rate, **recipe}, "model": self.model, "digests": self.digests}
        made = [{key: known.get(key) for key in what} for known in self.evidence.looks]
        # Before the scores are made: a look that was interrupted was a look. The same call again, after a stop, is the same look.
        if what not in made:
            look = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **what}
            made.append(what)
            self.evidence.looks.append(look)
            self.looks.append(look)
            with atomic_write(self.folder / "looks.json") as path:
                path.write_text(json.dumps(self.looks, indent=1) + "\n", encoding="utf-8")
        number = 1 + made.index(what)
        self._run([self._plain(FROZEN, part="test")], self.seeds[:1], number)
        self._run([self._plain(LORA, choice, rate, part="test")], self.seeds, number)
        if (full := self.evidence.tuned({"way": FULL})) is not None:
            self._run([self._plain(FULL, {}, full, part="test")], self.seeds, number)
        for name, score in self._predictors("test").items():
            self.evidence.add(name, score, part="test", digest=self._digest("test"), look=number)
        found: dict[str, list[float]] = {}
        for run in self.evidence.runs:
            if run.part == "test" and run.look == number:
                found.setdefault(run.way, []).append(run.score)
        return found

    def final(self, choice: Mapping | None = None, seed: int | None = None) -> tuple[nn.Module, object]:
        """The adapted model of one seed (the first), trained again, and its tokenizer: to write with, and to save."""
        choice = dict(choice or self.evidence.choice)
        rate = self.evidence.tuned(choice)
        if rate is None:
            raise ValueError(f"{choice} has not been run: tune it first")
        model, tokenizer = adapted(**self._plain(LORA, choice, rate), seed=self.seeds[0] if seed is None else seed)
        return model.to("cpu").eval(), tokenizer

    def recheck(self, evidence: Evidence, number: int = 0) -> tuple[float, float]:
        """(recorded, found again): one validation run of somebody's evidence is run again on these parts. For the one who marks."""
        runs = [run for run in evidence.runs if run.part == "validation" and run.way in (LORA, FULL, CONTROL, FROZEN)]
        if not runs:
            raise ValueError("the evidence holds no run that could be repeated")
        run = runs[number % len(runs)]
        plain = {**self._plain(run.way, run.settings, run.lr), **{k: v for k, v in run.settings.items() if k in self.same}}
        return run.score, trial(**plain, part="validation", seed=run.seed or 0)["score"]

    def audit(self):
        return audit(self.evidence)

    # ---- inside ----

    def _text(self, part: str) -> str:
        return _texts(str(self.folder), self.digests)[part]

    def _digest(self, part: str) -> str:
        return self.evidence.data["parts"][part]["digest"]

    def _plain(self, way: str, setting: Mapping | None = None, lr: float | None = None, **more) -> dict:
        """A cell of the sweep. What a way does not have is None, so that its name on disk does not hang on it."""
        setting = setting if setting and way in (LORA, CONTROL) else {}
        cell = {"folder": str(self.folder), "digests": self.digests, "model": self.model, "way": way}
        cell |= {knob: setting.get(knob) for knob in ("r", "alpha", "targets")}
        same = dict(self.same) if way != FROZEN else dict.fromkeys(self.same)
        return cell | {"lr": lr} | same | more

    def _run(self, cells: Sequence[dict], seeds: Sequence[int], look: int = 0) -> None:
        if not cells or not seeds:
            return
        cells = [{"part": "validation", **cell} for cell in cells]
        # The device decides where, not what: it is no part of the settings that claims compare.
        table = sweep(trial, cells, seeds, self.n_jobs, folder=self.folder / "cells", progress=False)
        for row in table.to_dict("records"):
            if row["status"] != "done":
                raise RuntimeError(f"a run failed: {str(row.get('error')).strip().splitlines()[-1]}")
            way = row["way"]
            names = ("r", "alpha", "targets") * (way in (LORA, CONTROL)) + ("steps", "batch", "context") * (way != FROZEN)
            settings = {name: _python(row[name]) for name in names}
            self.evidence.add(
                way, row["score"], part=row["part"], digest=self._digest(row["part"]), seed=None if way == FROZEN else int(row["seed"]),
                lr=None if way == FROZEN else float(row["lr"]), look=look, seconds=float(row["seconds"]), **settings,
            )  # fmt: skip

    def _predictors(self, part: str) -> dict[str, float]:
        """Bits per byte of unigram and bigram, counted on the training tokens of the model's own tokenizer."""
        tokenizer, end = _base(self.model)[1], _base(self.model)[1].eos_token_id
        lengths = np.array([0 if i == end else len(tokenizer.convert_ids_to_tokens(i)) for i in range(len(tokenizer))])

        def ids(text: str) -> np.ndarray:
            return np.array([end, *token_ids(tokenizer, text)], dtype=np.uint16)

        found = yardsticks(ids(self._text("train")), [ids(piece) for piece in self._text(part).split(END)], lengths, self._text(part).encode())
        return {name: found[name] for name in ("unigram", "bigram")}


def _python(value):
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _beginnings(parts: Parts, most: int) -> str:
    """About `most` bytes of the validation part: of each document its beginning, the same share of all, to the end of a line where one is near."""
    share = min(1.0, most / max(parts.size("validation"), 1))
    pieces = []
    for document in parts.validation:
        text = document.text[: max(int(len(document.text) * share), 1)]
        line = text.rfind("\n")
        pieces.append(text[:line] if share < 1 and line > 0.8 * len(text) else text)
    return END.join(pieces)
