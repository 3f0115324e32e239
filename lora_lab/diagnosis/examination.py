"""What is wrong with an adapter? Four probes and the conclusions that can be drawn from them.

    step0_identity    with and without ΔW: do the outputs differ, and by how much? Twice the same call: the same answer?
    gradient_report   which factors get a gradient, which get none, which a zero; what else trains
    adapter_coverage  which layers carry an adapter (`coverage`, for adapters of any make)
    reload_parity     does what was saved and loaded compute the same?

`diagnose` runs them on a model of any make (this lab's, peft's, somebody's own layers), tries single layers on random factors, and says what it
found. Nothing is changed: parameters, gradients, buffers, modes, hooks and random states are those from before. A problem is something that is
wrong whatever was meant; what may be meant is a note. Silence proves nothing: only what is listed in `CAUSES` is looked for.
"""

from __future__ import annotations

import html
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from ..adapt import TrainedCopy, lora_layers
from ..layers import LoRALayer
from ..state import lora_state_dict
from .foreign import Adapter, adapter_coverage, adapters, family, peft_settings, saved_modules
from .probes import (
    Gradients,
    Identity,
    dropouts,
    factors_of,
    gradient_report,
    is_zero,
    modes,
    output,
    relative,
    reload_parity,
    seed,
    step0_identity,
    true_loss,
    try_steps,
    untouched,
    without_delta,
)
from .trials import Trial, try_layer

# cause -> what it is, in one line. The clinic in lab 10 has a patient for the first thirteen.
CAUSES = {
    "no_effect": "the adapter is there and changes nothing",
    "merged_twice": "ΔW is counted more than once",
    "scaling": "the update is not multiplied by alpha / r",
    "transposed": "the update goes in the wrong way round",
    "target_missed": "a name in target_modules matched no layer",
    "both_zero": "A and B are both zero, so neither gets a gradient",
    "base_trains": "weights of the base train beside the adapter",
    "not_saved": "something that trains, or was fresh, is not in what was saved",
    "dropout": "dropout is at work in evaluation",
    "tied": "an adapted weight is shared with another module",
    "optimizer": "the optimizer does not hold the adapter's parameters",
    "checkpointing": "gradient checkpointing cuts the gradient off",
    "step_too_large": "the learning rate is too large for this rank and scaling",
    "starts_elsewhere": "a fresh adapter does not begin at ΔW = 0",
    "half_frozen": "one of the two factors does not train",
    "no_gradient": "factors that should train get no gradient",
    "nothing_trains": "no parameter of the adapter requires a gradient",
    "never_called": "an adapted layer is never called",
    "inactive": "the adapter that was trained is not the active one",
    "nested": "an adapter stands on an adapter",
    "other_base": "the base weights are not those of the base that was given",
    "formula": "an adapted layer does not compute W0 x + b + scaling · B A x",
    "float16": "factors that train are in float16",
    "not_finite": "NaN or infinity",
}
LARGEST = 50_000_000  # entries of a weight that a copy in float64 is made of


@dataclass(frozen=True)
class Finding:
    """One thing that was found. cause: a key of CAUSES; problem: False for a note; seen: what was measured; advice: what to try."""

    cause: str
    problem: bool
    seen: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{'✗' if self.problem else 'i'} {self.cause}: {self.seen}" + (f"\n  -> {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found: problems first, then notes. `lines`: what the probes measured; `skipped`: what could not be examined, and why."""

    findings: tuple[Finding, ...]
    lines: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.problem)

    @property
    def notes(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if not f.problem)

    @property
    def causes(self) -> tuple[str, ...]:
        """The causes of the problems, each once."""
        return tuple(dict.fromkeys(f.cause for f in self.problems))

    @property
    def healthy(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        verdict = "no problem found" if self.healthy else f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)} found"
        verdict += ", but not everything could be examined" if self.healthy and self.skipped else ""
        parts = [*self.lines, "", *map(str, self.findings), *(f"? not examined: {s}" for s in self.skipped), verdict]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<li style="margin:4px 0"><b>{"✗" if f.problem else "i"} {html.escape(f.cause)}</b> {html.escape(f.seen)}'
            f'{f"<br>{html.escape(f.advice)}" if f.advice else ""}</li>'
            for f in self.findings
        )
        measured = "<br>".join(html.escape(line) for line in (*self.lines, *(f"not examined: {s}" for s in self.skipped)))
        verdict = "No problem found." if self.healthy else f"{len(self.problems)} found."
        return (
            f'<div style="max-width:52em;padding:8px 14px;border-left:4px solid {"#00705a" if self.healthy else "#a8480a"};'
            f'background:rgba(128,138,150,.10)"><b>{verdict}</b><ul style="margin:4px 0;padding-left:18px;list-style:none">{rows}</ul>'
            f'<small>{measured}</small></div>'
        )


def diagnose(
    model: nn.Module,
    batch=None,
    *,
    loss: Callable | None = None,
    trained: bool | None = None,
    base: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | None = None,
    reload: Callable | nn.Module | Mapping | None = None,
) -> Diagnosis:
    """Look for what usually goes wrong with LoRA, in a model of any make, and change nothing.

    batch      a dict of the model's arguments, a pair (x, y) or x; None: only what can be seen without running the model
    loss       loss(model, batch) -> a scalar; see `gradient_report` for what stands in for it. `lr` needs a true one
    trained    True: the adapter was trained or loaded, so it must have an effect. False: it is fresh, so it must have none. None: unknown
    base       the model before LoRA, as it was loaded; then W0 is known, and how often ΔW is in the weight
    optimizer  the one that trains, to see what it holds; its lr is tried where `lr` is not given
    lr         20 steps with it are tried on this batch, on copies, beside 20 with a tenth of it
    reload     the model as it was loaded from what was saved, or a function that loads it; or what was saved, a dict of tensors

    The cost: some forward passes and a backward pass, a copy of one layer of each kind; with lr 40 more passes of both.

    >>> from lora_lab import apply_lora
    >>> model = apply_lora(nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), r=2, alpha=4)
    >>> diagnose(model, torch.ones(4, 8)).causes
    ()
    """
    return _Examination(model, batch, loss, trained, base, optimizer, lr, reload).run()


class _Examination:
    """One call of `diagnose`: each method looks for some causes and notes what it finds."""

    def __init__(self, model, batch, loss, trained, base, optimizer, lr, reload):
        self.model, self.batch, self.loss, self.trained, self.base = model, batch, loss, trained, base
        self.optimizer, self.lr, self.reload = optimizer, lr, reload
        self.findings: list[Finding] = []
        self.lines: list[str] = []
        self.skipped: list[str] = []
        self.found = adapters(model)
        self.used = [a for a in self.found if a.active]
        self.identity: Identity | None = None
        self.gradients: Gradients | None = None
        self.inputs: dict[int, tuple] = {}
        self.order: list[int] = []  # ids of adapted layers and their bases, as they were called
        self.factor: dict[int, float] = {}  # of the update, as a layer computes it; by id of the layer

    def run(self) -> Diagnosis:
        if not self.found:
            other = {str(getattr(config, "peft_type", "")).rpartition(".")[2] for config in peft_settings(self.model).values()} - {"LORA", ""}
            if other:
                self.note("no_effect", f"peft calls this adapter {_some(sorted(other))}; only LoRA is examined here")
                return self.done()
            self.note("no_effect", "no adapter was found in this model: it computes as any model without LoRA does",
                      "If you expected one, it was never put in, was merged and unloaded, or is of a make that is not recognised here")  # fmt: skip
            return self.done()
        looks = [self.places, self.finite, self.settings]
        if self.batch is not None:
            looks += [self.calls, self.layers, self.outputs, self.backward]
        looks += [self.training, self.weights, self.holds, self.files]
        if self.batch is not None:
            looks += [self.first_steps, self.reloaded]
        for look in looks:
            try:
                with untouched(self.model):
                    look()
            except Exception as error:  # one probe that cannot run must not keep the others from speaking
                self.skipped.append(f"{look.__name__} ({type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''})")
        return self.done()

    def done(self) -> Diagnosis:
        unique = list(dict.fromkeys(self.findings))
        return Diagnosis(tuple(sorted(unique, key=lambda f: not f.problem)), tuple(self.lines), tuple(self.skipped))

    def problem(self, cause, seen, advice=""):
        self.findings.append(Finding(cause, True, seen, advice))

    def note(self, cause, seen, advice=""):
        self.findings.append(Finding(cause, False, seen, advice))

    def has(self, *causes):
        return any(f.problem and f.cause in causes for f in self.findings)

    # -- what can be seen without running anything

    def places(self):
        """Which layers carry an adapter, and which of the same family do not."""
        names = list(dict.fromkeys(a.name for a in self.found))
        cover = adapter_coverage(self.model)
        self.lines.append(str(cover).splitlines()[0])
        self.lines.append(next(line for line in str(cover).splitlines() if line.startswith("trainable")))
        nested = sorted({n for n in names for m in names if n.startswith(m + ".")} | _wrapped_twice(self.found))
        inner = getattr(getattr(self.model, "base_model", None), "model", None)
        if nested or (type(self.model).__name__.startswith("Peft") and type(inner).__name__.startswith("Peft")):
            self.problem("nested", f"an adapter stands on an adapter ({_some(nested or names)})",
                         "Load into the plain base model, and put adapters in once")  # fmt: skip
        settings = peft_settings(self.model)
        for key, config in settings.items():
            wanted = config.target_modules
            hit = [a.name for a in self.found if a.adapter == key]
            copied = [name for name, _ in saved_modules(self.model)]
            if wanted is not None and not isinstance(wanted, str):
                silent = [t for t in sorted(wanted) if not any(n == t or n.endswith("." + t) for n in hit + copied)]
                every = len(cover.matched) + len(cover.unmatched)
                if silent and hit:
                    self.problem("target_missed", f"target_modules names {_some(map(repr, silent))}, which matched no layer; "
                                 f"{len(set(hit))} of {every} linear layers carry an adapter",
                                 "Compare with the names that model.named_modules() gives; peft says nothing as long as another entry matches")  # fmt: skip
            for pattern in ("rank_pattern", "alpha_pattern"):
                idle = [k for k in getattr(config, pattern, None) or () if hit and not any(re.match(rf"(.*\.)?({k})$", n) for n in hit)]
                if idle:
                    self.problem("target_missed", f"{pattern} names {_some(map(repr, idle))}, which matched no adapted layer: there r and alpha are "
                                 "those of all others", "A key is the end of a layer's whole name, after a dot, or a regular expression for it")  # fmt: skip
        chosen = any(getattr(c, "layers_to_transform", None) is not None for c in settings.values())
        bases = {id(a.layer) for a in self.found} | {id(m) for a in self.found for m in a.layer.modules()}
        for kind in dict.fromkeys(map(family, names)):
            if "#" not in kind or kind.endswith("#") or chosen:  # "0", "2" in an nn.Sequential are no family
                continue
            like = [n for n, m in self.model.named_modules() if family(n) == kind and isinstance(getattr(m, "weight", None), Tensor)]
            bare = [n for n in like if id(self.model.get_submodule(n)) not in bases]
            if bare and len(like) > 1:
                self.note("target_missed", f"{kind}: adapted in {len(like) - len(bare)} of {len(like)} places, not in {_some(bare)}",
                          "Fine if you meant so")  # fmt: skip

    def finite(self):
        bad = [n for n, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            self.problem("not_finite", f"NaN or infinity in {_some(bad)}", "Go back to an earlier state; then a smaller lr, or clip=1.0")

    def settings(self):
        """Which adapters are on, what state they are in."""
        inactive = [a for a in self.found if not a.active]
        if inactive and not self.used:
            self.problem("inactive", "every adapter is switched off", "peft: model.enable_adapter_layers(); here: leave lora_disabled(model)")
        elif inactive:
            dead = all(is_zero(a) for a in self.used)
            alive = [a for a in inactive if not is_zero(a)]
            if dead and alive:
                other = _some(sorted({a.adapter or a.name for a in alive}))
                self.problem("inactive", f"the active adapter's ΔW is 0, and {other}, which is not active, has one", "peft: model.set_adapter(name)")
        twins = [a.name for a, b in combinations(self.used, 2)
                 if a.layer is b.layer and a.A.shape == b.A.shape and not is_zero(a) and torch.equal(a.A, b.A) and torch.equal(a.B, b.B)]  # fmt: skip
        if twins:
            names = " and ".join(repr(key) for key in dict.fromkeys(a.adapter for a in self.used if a.name == twins[0]))
            self.problem("merged_twice", f"two active adapters ({names}) have the same A and B in {_some(twins)}: their ΔW is added twice",
                         "One file was loaded under two names: set_adapter() with one of them")  # fmt: skip
        zero = [a for a in self.used if not bool(a.A.any()) and not bool(a.B.any())]
        if zero:
            self.problem("both_zero", f"A and B are both 0 in {_some(a.name for a in zero)}: each one's gradient is proportional to the other, so both stay 0",
                         "Initialise A at random (Kaiming) and leave B at 0; or, after loading, the file held nothing for these layers")  # fmt: skip
        silent = [a for a in self.used if a.scaling == 0 and not is_zero(a)]
        if silent:
            self.problem("no_effect", f"the scaling is 0 in {_some(a.name for a in silent)}", "Set alpha, or the adapter's weight, to what it was")
        half = [a for a in self.used if a.A.requires_grad != a.B.requires_grad]
        if half and not any(_declares_frozen(self.model)):
            which = sorted({"A" if a.B.requires_grad else "B" for a in half})
            one = "B" if which == ["B"] else "A"
            text = f"{' and '.join(which)} of {_some(a.name for a in half)} {'is' if len(which) == 1 else 'are'} frozen"
            # LoRA-FA trains B alone, with A random: a choice. With B frozen at 0 nothing is learned.
            stuck = one == "B" and all(not bool(a.B.any()) for a in half)
            (self.problem if stuck else self.note)("half_frozen", text, "" if not stuck else "B stays 0, and with it ΔW: let both train")
        half_precision = [a for a in self.used if a.A.dtype == torch.float16 and a.A.requires_grad]
        if half_precision:
            self.problem("float16", f"the factors that train are float16 ({_some(a.name for a in half_precision)}): Adam's steps vanish or overflow, "
                         "and GradScaler refuses them", "Keep factors in float32 (adapter_dtype=torch.float32; peft: autocast_adapter_dtype=True)")  # fmt: skip
        owners: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=True):
            for p in module._parameters.values():
                if p is not None:
                    owners.setdefault(id(p), []).append(name)
        for a in self.used:
            others = [n for n in owners.get(id(a.base.weight), ()) if self.model.get_submodule(n) is not a.base]
            if others:
                text = f"the weight of {a.name} is tied to {_some(others)}"
                if a.merged:
                    self.problem("tied", f"{text}, and ΔW is merged into it: they compute with W0 + ΔW, too",
                                 "Unmerge; adapt another layer, or untie the two before merging")  # fmt: skip
                else:
                    self.note("tied", f"{text}: right as it is, but merging would change that as well", "Do not merge, or untie them first")

    # -- what the forward pass shows

    def calls(self):
        """Run once in eval mode, note each adapted layer's input, and see which were never called."""
        layers = {id(a.layer): a for a in self.used}
        order = self.order
        bases = {id(a.base) for a in self.used}

        def listen(module, args, kwargs=None):
            if id(module) in layers and id(module) not in self.inputs and args and isinstance(args[0], Tensor):
                self.inputs[id(module)] = (args[0].detach(), *args[1:])
            if id(module) in layers or id(module) in bases:
                order.append(id(module))

        # A hook on every module of the process for the length of one call: the model's own hooks stay as they are.
        handle = torch.nn.modules.module.register_module_forward_pre_hook(listen)
        try:
            with modes(self.model, False), torch.no_grad():
                seed(0)
                out = output(self.model, self.batch)
        finally:
            handle.remove()
        if not bool(torch.isfinite(out).all()):
            self.problem("not_finite", "the model's output holds NaN or infinity", "Look at the data first, then at the weights")
        idle = [a for a in self.used if id(a.layer) not in self.inputs and id(a.layer) not in order]
        if idle:
            bypassed = [a for a in idle if isinstance(_parent(self.model, a.name), nn.MultiheadAttention | nn.TransformerEncoderLayer)]
            if bypassed or len(idle) == len(self.used):
                self.problem("never_called", f"{_some(a.name for a in bypassed or idle)}: never called in this forward pass, so the adapter has no effect",
                             "nn.MultiheadAttention and the fast path of nn.TransformerEncoderLayer read weights and call no layer" if bypassed else
                             "Something else computes in its place: is the layer that was replaced still referred to elsewhere?")  # fmt: skip
            else:
                self.note("never_called", f"not called for this batch: {_some(a.name for a in idle)}")

    def layers(self):
        """Try one layer of each kind, on a copy with random factors: which formula does it compute, and does merging agree with it?"""
        if self.has("not_finite"):
            return
        kinds: dict[tuple, list[Adapter]] = {}
        for a in self.used:
            if a.plain and a.wraps and id(a.layer) in self.inputs and sum(b.layer is a.layer for b in self.used) == 1 and a.base.weight.is_floating_point():
                key = (type(a.layer), type(a.base), a.base_shape, a.A.shape, a.scaling, a.alpha, a.merged, a.base.weight.dtype)
                kinds.setdefault(key, []).append(a)
        for same in kinds.values():
            a = same[0]
            if a.merged and a.make != "own":
                continue
            if a.base is not a.layer and a.base.weight.numel() > LARGEST:
                self.skipped.append(f"the formula of {a.name} (its weight is too large for a copy)")
                continue
            self._formula(a, same)

    def _formula(self, a: Adapter, same: list[Adapter]):
        trial = try_layer(a, self.inputs[id(a.layer)])
        where = _some(x.name for x in same)
        if trial is None:
            self.skipped.append(f"the formula of {where}")
            return
        factor, rest, turned, random_output = trial.factor, trial.rest, trial.turned, trial.random
        for x in same:
            self.factor[id(x.layer)] = factor if rest < 0.05 else math.nan
        if a.make == "own" and trial.base_apart > (1e-3 if trial.exact else 0.1):
            self.problem("formula", f"{where}: with B = 0 the layer differs from its base by {trial.base_apart:.2g} (relative)",
                         "W0 x and b belong into the sum once each: without B A x the layer is its base")  # fmt: skip
            return
        if random_output:
            self.problem("dropout", f"{where}: in eval mode the same input gives other outputs each time",
                         "F.dropout(x, p) drops in eval mode, too: nn.Dropout, or F.dropout(x, p, training=self.training)")  # fmt: skip
            return
        if turned is not None:
            self.problem("transposed", f"{where}: the layer multiplies by (B A) the wrong way round",
                         "ΔW is (out, in); the update of a weight that is stored (in, out) is its transpose")  # fmt: skip
            return
        if abs(factor) < 1e-6 and rest < 1e-3 or trial.silent:
            if not a.merged and a.scaling != 0:
                self.problem("no_effect", f"{where}: whatever A and B are, the layer computes the same",
                             "The forward pass does not use them: another switch, a merged flag, or a forward that calls the base alone")  # fmt: skip
            return
        if rest > 0.05:
            self.problem("formula", f"{where}: what the layer adds to W0 x is not a multiple of B A x (part unexplained: {rest:.0%})",
                         "There is no activation and no bias between A and B; look at the order and at the shapes")  # fmt: skip
            return
        first = next((k for k, i in enumerate(self.order) if i == id(a.layer)), 0)
        before = {id(x.layer) for x in self.used} & set(self.order[:first]) - {id(a.layer)}
        moved, said = trial.slopes
        if abs(moved - said) > 1e-6 * max(abs(moved), abs(said)) and (before or len(same) > 1):
            self.problem("no_gradient", f"{where}: the gradient that comes back to the layer's input is not that of its output ({said:.3g} along a "
                         f"direction in which the output moves by {moved:.3g}), so that adapters in front of it learn something else",
                         "Frozen means requires_grad=False; no_grad() or detach() around W0 x cuts the way back")  # fmt: skip
        self._scaling(a, factor, where)
        if trial.merged is not None:
            self._merging(a, trial, where)

    def _scaling(self, a: Adapter, factor: float, where: str):
        given = a.scaling
        accepted = [given] if given is not None else []
        names = {}
        if a.make == "own" and a.alpha is not None:
            accepted = [a.alpha / a.r, a.alpha / math.sqrt(a.r)]
            names = {"alpha": a.alpha, "1 / r": 1 / a.r, "r / alpha": a.r / a.alpha if a.alpha else math.nan, "alpha · r": a.alpha * a.r}
        if not accepted or any(math.isclose(factor, s, rel_tol=0.01, abs_tol=1e-9) for s in accepted):
            return
        is_called = next((f", which is {n}" for n, v in names.items() if math.isclose(factor, v, rel_tol=0.01)), "")
        self.problem("scaling", f"{where}: the update is multiplied by {factor:.3g}{is_called}; r={a.r}, alpha={a.alpha:g} give {accepted[0]:.3g}",
                     "scaling = alpha / r, once: not left out, not without the division, not twice")  # fmt: skip

    def _merging(self, a: Adapter, trial: Trial, where: str):
        if trial.merged_turned:
            self.problem("transposed", f"{where}: merge() adds (B A) the wrong way round to the stored weight",
                         "A Conv1D or an embedding stores (in, out): add ΔW.T")  # fmt: skip
        elif abs(trial.merged - 1) > 0.02:
            self.problem("scaling" if trial.merged_rest < 0.05 else "formula", f"{where}: merge() puts {trial.merged:.3g} times the update into the weight",
                         "merge adds scaling · B A once, and the forward pass then leaves it out")  # fmt: skip
        elif trial.twice is not None and abs(trial.twice - 1) > 0.02:
            self.note("merged_twice", f"{where}: merge() called again would add ΔW again", "Keep a flag, and let merge() return when it is set")
        elif trial.merged_output is not None and trial.merged_output > 0.02:
            self.problem("merged_twice" if trial.counted_twice else "formula", f"{where}: after merge() the layer computes something else "
                         f"(by {trial.merged_output:.2g} of the update)", "A merged layer is its base layer alone: don't add the update again")  # fmt: skip

    def outputs(self):
        """With and without ΔW; twice the same call; the modes as they were found."""
        if not self.used:
            return
        identity = self.identity = step0_identity(self.model, self.batch)
        self.lines.append(str(identity))
        rates = dropouts(self.model)
        awake = [n for n, m in rates.items() if m.training]
        if identity.spread > 1e-6 and not self.has("dropout") and self._random_without():
            self.note("dropout", f"in eval mode two calls differ by {identity.spread:.2g} (relative), without ΔW as well: the base itself is random")
        elif identity.spread > 1e-6 and not self.has("dropout"):
            self.problem("dropout", f"all modules in eval mode, and two calls differ by {identity.spread:.2g} (relative)",
                         "A dropout that does not look at self.training, or another source of chance in the forward pass")  # fmt: skip
        elif awake and not self.model.training:
            self.problem("dropout", f"the model is in eval mode, but these dropouts are in training mode: {_some(awake)}",
                         "Call model.eval() on the whole model after the adapters are in; a module in a plain list or dict is not reached by it")  # fmt: skip
        elif awake:
            self.note("dropout", f"training mode: outputs are random until model.eval() ({_some(awake)})")
        bare = not identity.effect
        if bare and identity.fresh and not self.has("both_zero", "inactive"):
            trains = any(p.requires_grad for a in self.used for p in (a.A, a.B))
            if self.trained or (not trains and not self.model.training and self.trained is None):
                self.problem("no_effect", "ΔW is exactly 0 in every layer: what was trained did not arrive here",
                             "Compare the names in the file with the model's: load_state_dict(strict=False) says nothing when no name fits")  # fmt: skip
            elif self.trained is None:
                self.note("no_effect", "ΔW is exactly 0 everywhere, as at step 0. After training or loading that would be a problem (say trained=True)")
        if bare and not identity.fresh and all(a.plain for a in self.used) and not self.has("no_effect", "never_called", "inactive", "both_zero"):
            self.problem("no_effect", "ΔW is not 0, and the output is the same with and without it",
                         "Is the model that you run the one that carries the adapter?")  # fmt: skip
        if self.trained is False and self.base is not None and not self.has("formula", "dropout") and not any(a.merged for a in self.used):
            self._beside_the_base(identity)
        elif self.trained is False and not identity.fresh and not self._starts_in_the_base():
            self.problem("starts_elsewhere", f"this adapter is fresh, and changes the output by {identity.effect:.2g} (relative) before the first step",
                         "One of the factors must begin at 0: B of a linear layer, A of an embedding")  # fmt: skip

    def _random_without(self) -> bool:
        """Whether the model is random in eval mode with ΔW switched off, too."""
        with modes(self.model, False), torch.no_grad(), without_delta(self.model, self.found):
            seed(0)
            one = output(self.model, self.batch)
            seed(1)
            return relative(one, output(self.model, self.batch)) > 1e-6

    def _starts_in_the_base(self) -> bool:
        """PiSSA and its like put the strongest part of W0 into B A and take it out of the weight: ΔW is not 0, and the sum is W0."""
        kinds = {str(getattr(config, "init_lora_weights", True)).lower() for config in peft_settings(self.model).values()}
        return any(a.start_in_base for a in self.used) or bool(kinds - {"true", "false", "gaussian", "orthogonal"})

    def _beside_the_base(self, identity: Identity):
        """A fresh adapter, and its base is here: both compute the same, wherever A and B begin."""
        with untouched(self.base), modes(self.model, False), modes(self.base, False), torch.no_grad():
            seed(0)
            mine = output(self.model, self.batch)
            seed(0)
            apart = relative(mine, output(self.base, self.batch))
        low = any(a.base.weight.dtype in (torch.bfloat16, torch.float16) for a in self.found)
        if apart > (0.05 if low else 1e-3) and identity.spread <= 1e-6:
            self.problem("starts_elsewhere", f"this adapter is fresh, and the output differs from the base's by {apart:.2g} (relative) before the first step",
                         "One of the factors must begin at 0: B of a linear layer, A of an embedding" if not identity.fresh else
                         "ΔW is 0, so it is the base: other weights, or a part of it that computes something else")  # fmt: skip

    def backward(self):
        """What gets a gradient."""
        merged = [a for a in self.used if a.merged]
        if not any(p.requires_grad for a in self.used for p in (a.A, a.B)):
            return
        if merged:
            if self.model.training and all(a.merged for a in self.used):
                say = self.problem if self.optimizer is not None else self.note
                say("no_gradient", "training mode while ΔW is merged: the forward pass reads the weight alone, and A and B get no gradient",
                    "Unmerge to train on; eval() to use it")  # fmt: skip
            return
        called: set[int] = set()
        handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: called.add(id(module)))
        try:
            report = self.gradients = gradient_report(self.model, self.batch, self.loss)
        finally:
            handle.remove()
        self.lines.append(str(report))
        if not math.isfinite(report.loss) and not self.has("not_finite"):
            self.problem("not_finite", f"the outputs are finite, and the loss is {report.loss}",
                         "Look at the labels: are all of them masked (-100) in this batch, or is one out of range?")  # fmt: skip
            return
        state = report.state
        names = {id(p): n for n, p in self.model.named_parameters(remove_duplicate=False)}
        # What one pass skips (an expert that nobody asked for, a block that layer drop left out) gets no gradient in that pass.
        lost = [a for a in self.used if id(a.layer) in called and "none" in (state.get(names.get(id(a.A))), state.get(names.get(id(a.B))))]
        if lost and report.checkpointed:
            self.problem("checkpointing", f"gradient checkpointing is on and its inputs need no gradient: {len(lost)} adapters get none "
                         f"({_some(a.name for a in lost)})",
                         "model.enable_input_require_grads() before training, or use_reentrant=False")  # fmt: skip
        elif lost and (len(lost) == len(self.used) or not report.connected) and not self.has("never_called", "no_effect"):
            cut = "" if report.connected else ": the loss is cut off from everything that trains"
            self.problem("no_gradient", f"no gradient reaches {_some(a.name for a in lost)}{cut}",
                         "Look for detach(), .data, .item(), no_grad or numpy between the factors and the loss")  # fmt: skip
        elif lost and not self.has("never_called", "no_effect"):
            idle = [a for a in lost if id(a.layer) in self.inputs]
            if idle:
                self.problem("no_gradient", f"{_some(a.name for a in idle)}: called, but no gradient comes back",
                             "Look for detach(), .data or no_grad in this layer or behind it")  # fmt: skip
        still = [a for a in self.used if a.plain and {state.get(names.get(id(a.A))), state.get(names.get(id(a.B)))} == {"zero"}]
        if still and not self.has("both_zero", "no_effect", "no_gradient", "formula"):
            text = f"A and B get a gradient of exactly 0 in {_some(a.name for a in still)}"
            if len(still) == len(self.used):
                self.problem("no_gradient", text, "A scaling of 0, a dead ReLU behind it, or a loss that does not depend on these layers")
            else:
                self.note("no_gradient", text, "Fine if this batch does not need them")

    def training(self):
        """What trains besides the factors, and whether the factors do."""
        own = {id(p) for a in self.used for p in (a.A, a.B)} | _of_variants(self.used)
        if self.used and not any(p.requires_grad for p in self.model.parameters() if id(p) in own):
            if self.model.training:
                self.problem("nothing_trains", "training mode, and no factor requires a gradient",
                             "Freeze the base before the adapters go in, not after; peft: from_pretrained(..., is_trainable=True)")  # fmt: skip
            else:
                self.note("nothing_trains", "no factor requires a gradient: ready for use; to train on, is_trainable=True (peft) or requires_grad_(True)")
            return
        base_weights = {id(a.base.weight): a.name for a in self.used}
        factors = {id(p) for a in self.found for p in (a.A, a.B)}
        meant = {id(p) for _, m in saved_modules(self.model) for p in m.parameters()} | _declared_biases(self.model) | _of_variants(self.used)
        idle = self.gradients.idle if self.gradients is not None else ()
        elsewhere = {n: p for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in factors | meant and n not in idle}
        open_bases = [base_weights[id(p)] for p in elsewhere.values() if id(p) in base_weights]
        rest = sum(p.numel() for _, p in self.model.named_parameters() if id(p) not in factors | meant)
        share = sum(p.numel() for p in elsewhere.values()) / max(rest, 1)
        if open_bases or share > 0.5:
            count = sum(p.numel() for p in elsewhere.values())
            self.problem("base_trains", f"{count:,} numbers outside the adapters train ({share:.0%} of the base)"
                         + (f", among them the frozen weight W0 of {_some(open_bases)}" if open_bases else f": {_some(elsewhere)}"),
                         "model.requires_grad_(False) before the adapters go in")  # fmt: skip
        elif elsewhere:
            self.note("base_trains", f"besides the adapters these train: {_some(elsewhere)}", "If you mean it, save them, too (modules_to_save)")

    def weights(self):
        """How often is ΔW in the output: in the weight, and beside it? It should be once."""
        plain = [a for a in self.used if a.plain and not is_zero(a) and a.scaling != 0 and a.base.weight.is_floating_point()]
        if not plain:
            return
        if self._starts_in_the_base():
            return  # the weight has given a part of itself to B A, and what ΔW is against W0 can't be read off the two
        originals = _weights_of(self.base) if self.base is not None else None
        counts, errors = [], []
        for a in plain:
            scaling = a.scaling if a.scaling is not None else self.factor.get(id(a.layer), 1.0)
            delta = a.to_base_layout(a.delta()) * scaling
            weight = (a.layer.base_weight if isinstance(a.layer, LoRALayer) and not a.merged else a.base.weight).detach().double()
            norm = float(delta.norm())
            if not norm or not math.isfinite(norm):
                continue
            if originals is not None:
                W0 = originals.get(_plain_name(a.name))
                if W0 is None or W0.shape != weight.shape:
                    continue
                weight = weight - W0.detach().to(weight)
                rest = float((weight - (weight * delta).sum() / norm**2 * delta).norm())
                errors.append(rest / norm)
            else:
                errors.append(float(weight.norm()) / math.sqrt(weight.numel()) / norm)
            counts.append(float((weight * delta).sum()) / norm**2)
        if not counts:
            return
        middle, spread = sorted(counts)[len(counts) // 2], max(counts) - min(counts)
        times = round(middle)
        beside = 0 if all(a.merged for a in plain) and not self._adds_while_merged(plain) else 1
        if originals is not None:
            if max(errors) > 0.05 and max(errors) > 0.05 * abs(middle):
                moved = [_plain_name(a.name) for a in plain]
                self.problem("other_base", f"the base weights differ from those of `base`, and not by ΔW ({_some(moved)})",
                             "Another base, or a base that was trained on: load the adapter onto the weights it was trained on")  # fmt: skip
                return
            sure = spread < 0.1 + 0.05 * abs(middle)
        else:
            # Without W0: a weight that holds ΔW holds it once or twice in every layer. Any other weight's share of it is a number of chance,
            # whose standard deviation for a matrix without structure is `error`.
            sure = times >= 1 and abs(middle - times) < 0.1 and spread < 0.2 and max(errors) < (0.1 if len(counts) > 1 else 0.03)
        if not sure:
            return
        total = times + beside
        self.lines.append(f"ΔW is in the weights {times} time{'s' * (times != 1)} and beside them {beside}")
        if total >= 2:
            self.problem("merged_twice", f"ΔW counts {total} times: {times} in the weight{' and once beside it' if beside else ''} (measured: {middle:.2f})",
                         "Save W0, not W0 + ΔW; load onto the base as it was; merge once")  # fmt: skip
        elif total <= 0 and not self.has("no_effect"):
            self.problem("no_effect", f"the layers say they are merged, and the weights hold ΔW {times} times (measured: {middle:.2f})", "Merge again, from W0")

    def _adds_while_merged(self, plain) -> bool:
        """Own layers that carry a merged flag and add the update all the same."""
        factors = [self.factor.get(id(a.layer)) for a in plain]
        return any(f is not None and abs(f) > 1e-6 for f in factors)

    def holds(self):
        """What the optimizer holds."""
        if self.optimizer is None:
            return
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        factors = {n: p for n, p in factors_of(self.model).items() if p.requires_grad}
        missing = [n for n, p in factors.items() if id(p) not in held]
        others = {n: p for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in held and n not in factors}
        mine = {id(p) for p in self.model.parameters()}
        if missing:
            strangers = len([i for i in held if i not in mine])
            self.problem("optimizer", f"the optimizer holds {len(factors) - len(missing)} of {len(factors)} factors; missing: {_some(missing)}"
                         + (f"; {strangers} of its tensors belong to no parameter of this model" if strangers else ""),
                         "Make the optimizer after the adapters are in, from [p for p in model.parameters() if p.requires_grad]")  # fmt: skip
        elif others:
            self.problem("optimizer", f"the optimizer does not hold {_some(others)}, which should train")
        else:
            still = {id(p): group for group in self.optimizer.param_groups if float(group["lr"]) == 0 for p in group["params"]}
            stuck = [n for n, p in factors.items() if id(p) in still]
            if stuck:
                scheduled = all("initial_lr" in still[id(factors[n])] for n in stuck)  # what a scheduler leaves in the groups that it steers
                (self.note if scheduled else self.problem)(
                    "optimizer", f"the learning rate of {len(stuck)} of {len(factors)} factors is 0: {_some(stuck)}",
                    "A warm-up begins so, and a schedule ends so" if scheduled else "Give their group an lr")  # fmt: skip

    def files(self):
        """What would a file hold? Only peft's and ours are known; of a dict that was saved the names are compared."""
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if isinstance(self.reload, Mapping):
            names = {_bare(n) for n in self.reload}
            lost = [n for n in trained if _bare(n) not in names]
            if lost:
                self.problem("not_saved", f"these train and are not in what was saved: {_some(lost)}", "Save everything that requires a gradient")
            return
        settings = peft_settings(self.model)
        if settings and trained:
            from peft import get_peft_model_state_dict

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kept = {t.data_ptr() for key in settings for t in
                        get_peft_model_state_dict(self.model, adapter_name=key, save_embedding_layers=False).values()}  # fmt: skip
            lost = [n for n, p in trained.items() if p.data_ptr() not in kept]
        elif any(a.make == "lora_lab" for a in self.found) and trained:
            beyond = {n: layer.beyond_lora for n, layer in lora_layers(self.model).items() if layer.beyond_lora}
            if beyond:
                self.note("not_saved", f"save_adapter refuses {_some(list(beyond))}: there is {next(iter(beyond.values()))} beside A and B",
                          "Keep the model's state_dict(), or merge_and_unload(model) and keep that")  # fmt: skip
                return self._fresh_head(trained)
            saved = set(map(_bare, lora_state_dict(self.model)))
            copies = {id(p) for _, m in saved_modules(self.model) for p in m.parameters()} | _declared_biases(self.model)
            factors = {id(p) for a in self.found if a.make == "lora_lab" for p in (a.A, a.B)}
            known = copies | factors | _of_variants(self.found)  # of a variant the product of what trains is saved
            lost = [n for n, p in trained.items() if id(p) not in known and _bare(n) not in saved]
        else:
            return
        if lost and not self.has("base_trains"):
            self.problem("not_saved", f"these train, and saving the adapter would leave them out: {_some(lost)}",
                         "Name them in modules_to_save when the adapter is put in")  # fmt: skip
        self._fresh_head(trained)

    def _fresh_head(self, trained):
        """A classification head that was made fresh and does not train: after loading there will be another one."""
        for attribute in ("score", "classifier"):
            head = getattr(getattr(getattr(self.model, "base_model", self.model), "model", self.model), attribute, None)
            last = [m for m in head.modules() if isinstance(m, nn.Linear)] if isinstance(head, nn.Module) else []
            if last and not any(p.requires_grad for p in head.parameters()) and last[-1].bias is not None and not bool(last[-1].bias.any()):
                self.note("not_saved", f"{attribute!r} looks as if it had never been trained (its bias is 0), is frozen and would not be saved",
                          f"modules_to_save=[{attribute!r}], unless it came with the base")  # fmt: skip

    # -- what needs more than a look

    def first_steps(self):
        """Twenty steps on this batch with the learning rate, on copies of what trains, beside twenty with a tenth of it."""
        rate = self.lr
        if rate is None and self.optimizer is not None and self.optimizer.param_groups:
            rate = float(self.optimizer.param_groups[0]["lr"])
        if rate is None or any(a.merged for a in self.used) or self.has("not_finite", "both_zero", "optimizer", "no_gradient", "checkpointing"):
            return
        if not true_loss(self.model, self.batch, self.loss):
            self.skipped.append("the learning rate (it needs a loss: give loss=, labels, or a pair (x, y))")
            return
        sgd = isinstance(self.optimizer, torch.optim.SGD)
        start, full, tenth = (try_steps(self.model, self.batch, self.loss, r, sgd) for r in (0.0, rate, rate / 10))
        if start is None or full is None or tenth is None:
            return
        self.lines.append(f"loss {start:.3g}; after 20 steps on this batch with lr {rate:g}: {full:.3g}, with {rate / 10:g}: {tenth:.3g}")
        # On one batch, gone over twenty times, a rate that suits the model is ahead of a tenth of it.
        if (tenth < start and not full <= 1.2 * tenth + 0.1) or not max(full, tenth) <= 10 * start + 1:
            a = max(self.used, key=lambda a: a.r)
            scale = "" if a.scaling is None else f" (r={a.r}, scaling={a.scaling:.3g}: a step moves ΔW by about lr · scaling · r · |A|)"
            self.problem("step_too_large", f"20 steps with lr {rate:g} move the loss from {start:.3g} to {full:.3g}, "
                         f"with {rate / 10:g} to {tenth:.3g}{scale}",
                         "A smaller lr; and keep alpha as it is when r grows, instead of letting it grow with r")  # fmt: skip

    def reloaded(self):
        if self.reload is None or isinstance(self.reload, Mapping):
            return
        other = self.reload if isinstance(self.reload, nn.Module) else self.reload()
        parity = reload_parity(self.model, self.batch, other)
        self.lines.append(f"reloaded: {parity}")
        # float32 sums in another order differ by 1e-6 of the largest; a merged twin of a bf16 model by some 1e-2
        low = any(a.base.weight.dtype in (torch.bfloat16, torch.float16) for a in self.found)
        if parity.difference <= (0.05 if low else 1e-4):
            return
        theirs = {a.name: a for a in adapters(other)}
        mine = {a.name: a for a in self.found}
        seen = f"the reloaded model's outputs differ by {parity.difference:.2g} (relative)"
        shared = [n for n in mine if n in theirs]
        if shared and all(is_zero(theirs[n]) for n in shared) and not all(is_zero(mine[n]) for n in shared):
            self.problem("no_effect", f"{seen}: its ΔW is 0, so the file's tensors did not arrive",
                         "Names that do not fit are skipped by load_state_dict(strict=False): look at what it returns")  # fmt: skip
            return
        twice = []
        for n in shared:
            a, b = mine[n], theirs[n]
            if a.base.weight.shape == b.base.weight.shape and not a.merged and not is_zero(a):
                delta = a.to_base_layout(a.delta()) * (1.0 if a.scaling is None else a.scaling)
                moved = b.base.weight.detach().double() - a.base.weight.detach().double()
                twice.append(float((moved * delta).sum() / delta.norm() ** 2))
        if twice and min(twice) > 0.5 and all(not is_zero(theirs[n]) for n in shared):
            self.problem("merged_twice", f"{seen}: its base weights hold ΔW already ({sum(twice) / len(twice):.2f} times), and A and B come on top",
                         "Save W0, or unmerge before saving; load the adapter onto the original base")  # fmt: skip
            return
        inside = {id(p) for a in self.found for p in (a.A, a.B, a.base.weight)}
        names = dict(self.model.named_parameters())
        other_tensors = [n for n in parity.tensors if id(names[n]) not in inside]
        factors = [n for n in parity.tensors if n in factors_of(self.model)]
        bases = [n for n in parity.tensors if id(names[n]) in {id(a.base.weight) for a in self.found}]
        elsewhere = [n for n in bases if not names[n].requires_grad]
        if elsewhere and (not factors or len(factors) < len(factors_of(self.model))):
            self.problem("other_base", f"{seen}; frozen weights of the base are others: {_some(elsewhere)}", "Load the adapter onto the base it was trained on")
        elif factors:
            self.problem("no_effect", f"{seen}; other factors: {_some(factors)}", "The file is another run's, or was written before the last step")
        elif other_tensors:
            self.problem("not_saved", f"{seen}; the factors arrived, but these are others: {_some(other_tensors)}",
                         "They were not saved: a fresh head or a trained norm belongs into modules_to_save")  # fmt: skip
        elif bases:
            self.problem("not_saved", f"{seen}; base weights that trained are others: {_some(bases)}", "Freeze the base, or save all of it")
        else:
            scalings = [n for n in shared if mine[n].scaling != theirs[n].scaling]
            self.problem("scaling" if scalings else "not_saved", f"{seen}, and the tensors that both have are equal"
                         + (f"; the scaling of {_some(scalings)} is not" if scalings else ""),
                         "alpha and r are not in the tensors: save them beside" if scalings else "Compare the two models' configurations")  # fmt: skip


def _declared_biases(model: nn.Module) -> set[int]:
    """ids of biases that train because bias= said so, ours and peft's."""
    kept = model.__dict__.get("_before_lora", {}).get("biases", {})
    named = dict(model.named_parameters())
    meant = {id(named[n]) for n in kept if n in named}
    kinds = {getattr(c, "bias", "none") for c in peft_settings(model).values()}
    if "all" in kinds:
        meant |= {id(p) for n, p in named.items() if n.rpartition(".")[2] == "bias"}
    if "lora_only" in kinds:
        meant |= {id(a.base.bias) for a in adapters(model) if getattr(a.base, "bias", None) is not None}
    return meant


def _of_variants(found: list[Adapter]) -> set[int]:
    """ids of what else an adapter layer of peft or of this lab trains: DoRA's magnitudes, VeRA's vectors, a bias of B."""
    return {id(p) for a in found if a.make != "own" for n, p in a.layer.named_parameters() if "base_layer" not in n}


def _declares_frozen(model: nn.Module) -> Iterator[bool]:
    """Whether peft's config says that a factor stays as it is."""
    for config in peft_settings(model).values():
        yield str(getattr(config, "init_lora_weights", "")).lower().startswith("lora_fa")


def _wrapped_twice(found: list[Adapter]) -> set[str]:
    """Names of layers whose base is itself a layer with an adapter."""
    layers = {id(a.layer) for a in found}
    twice = {a.name for a in found if a.base is not a.layer and id(a.base) in layers}
    for a in found:
        inner = a.layer._modules.get("base_layer")
        if a.make == "peft" and inner is not None and inner is not a.base:
            twice.add(a.name)
    return twice


def _weights_of(base: nn.Module) -> dict[str, Tensor]:
    """Plain module name -> weight."""
    return {_plain_name(n): m.weight for n, m in base.named_modules() if isinstance(getattr(m, "weight", None), Tensor) and not isinstance(m, TrainedCopy)}


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".base_layer").removesuffix(".original_module")


def _bare(name: str) -> str:
    """A tensor's name without what wrappers add to it."""
    for part in ("base_model.model.", ".default", ".modules_to_save", ".trained", "base_layer."):
        name = name.replace(part, "")
    return name


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _some(names, most: int = 3) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
