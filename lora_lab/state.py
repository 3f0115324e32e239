"""Adapters on disk, in peft's format: adapter_model.safetensors (the factors) beside adapter_config.json (alpha, targets, ...).

    base_model.model.<name>.lora_A.weight     (r, in)   or (r, channels, kh, kw)   A
    base_model.model.<name>.lora_B.weight     (out, r)  or (out, r, 1, 1)          B
    base_model.model.<name>.lora_embedding_A  (r, tokens),  ..._B (dim, r)         of an embedding
    base_model.model.<name>.weight, .bias     whole modules that train (modules_to_save), trained biases

How the two files are written and read, and what damage is noticed: adapter_files.py. Nothing writes a pickle; a foreign .bin or .pt
is read with weights_only=True.
"""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapt import BIAS, QKV, TrainedCopy, check_targets, install, lora_layers, make_layer, trained_biases
from .adapter_files import (
    CONFIG,
    FACTOR,
    FLOATS,
    HARMLESS,
    TENSORS,
    UNSET,
    AdapterError,
    Content,
    file_metadata,
    read_adapter,
    refuse_foreign,
    refuse_unusable,
    some,
    write_adapter,
)
from .counting import safetensors_bytes
from .layers import LoRAFusedLinear, LoRALayer, is_conv1d, layer_class

PREFIX = "base_model.model."
# Config fields that decide what the adapter computes; adapter_files.HARMLESS has those that don't, once the tensors are there. All others
# ask for more than plain LoRA, unless they are null or false.
DECIDING = {
    "alpha_pattern", "bias", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
# Ways to begin that leave the base weights as they are. PiSSA, OLoRA, LoftQ and others change them.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class SavedAdapter:
    """What `save_adapter` wrote. `stored` and `trained` count scalars; they differ where a fused layer is saved in block form."""

    folder: Path
    tensors: int
    stored: int
    trained: int
    bytes: int  # of the tensors file
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.folder}: {self.tensors} tensors, {self.stored:,} numbers, {self.bytes:,} bytes"
        return "\n".join([text, *self.notes])


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names, in peft's shapes (see the top of this file), detached, on the model's device.

    Factors, modules trained in full, trained biases; the frozen base is not among them. Merged or not makes no difference.
    The slices of a `LoRAFusedLinear` come as one block form: A (n r, in) and B (out, n r) with zero rows for the other slices.
    Variants whose update is a product of two factors (VeRA, LoRA-XS, AdaLoRA) come as the LoRA that computes the same.
    Raises AdapterError if the model carries no LoRA layer, or one that A and B do not say all of (DoRA, PiSSA, OLoRA).
    """
    model = _uncompiled(model)
    state = {}
    for name, layer in _adapted(model).items():
        if 0 in (layer.lora_A.numel(), layer.lora_B.numel()):
            raise AdapterError(f"the factors of {name!r} are empty. Sharded training leaves them so; gather the shards before saving")
        if layer.beyond_lora:
            raise AdapterError(
                f"{name!r} is a {type(layer).__name__}, which computes with {layer.beyond_lora}; a file of A and B would lose that without a word. "
                "Save the whole model after merge_and_unload(model), or its state_dict()"
            )
        shape_A, shape_B = _shapes(layer.base_layer, layer.lora_A.shape[0])
        key_A, key_B = _keys(name, layer.base_layer)
        state[key_A] = layer.lora_A.detach().reshape(shape_A)
        state[key_B] = layer.full_B().detach().reshape(shape_B)
    for name, copied in _trained_copies(model).items():
        state |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in copied.trained.state_dict().items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return state | {PREFIX + name: parameters[name].detach() for name in _trains(model)["biases"] if name in parameters}


def save_adapter(model: nn.Module, folder: str | os.PathLike, base_model_name: str | None = None) -> SavedAdapter:
    """Write the adapter into `folder` (made if it is missing) as peft would, and say what was written.

    base_model_name: for the config; by default what the model's own config says.

    Both files are written beside the old ones, read back, compared, and only then renamed. A kill at any moment leaves the old adapter
    or the new one, whole. Never an old config beside new tensors: for the instant in which the tensors change there is no config,
    so that peft refuses the folder, and `load_adapter` uses the copy in the tensors file.

    Slices of fused layers (`LoRAFusedLinear`) have no form in peft. They are saved as one adapter of rank n r, with zero rows for the
    other slices and alpha times n (times sqrt(n) with rslora), which computes the same; a warning says so, because training that
    on in peft would move the other slices, too. `load_adapter` gets the slices back exactly.

    Raises AdapterError, leaving the old files alone: no LoRA layer, an empty factor, a number that is NaN or infinite, a path that is
    a file, a copy on disk that differs from the model. OSError: a full disk, a folder without write access.
    """
    folder, model = Path(folder), _uncompiled(model)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file; an adapter is a folder with {TENSORS} and {CONFIG}. Give another path")
    tensors = {k: t.cpu().contiguous().clone() for k, t in lora_state_dict(model).items()}
    refuse_unusable(tensors, "this adapter can't be saved, and what was saved before is left as it is")
    config, notes = _config(model, base_model_name)
    size = write_adapter(folder, tensors, config, _fused(model))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    trained = sum(p.numel() for p in _trains(model)["parameters"])
    return SavedAdapter(folder, len(tensors), sum(t.numel() for t in tensors.values()), trained, size, tuple(notes))


def adapter_bytes(model: nn.Module, base_model_name: str | None = None) -> int:
    """The exact size of the tensors file that `save_adapter` would write for this adapter, in bytes; also on the meta device.

    Header and numbers; the config beside it is a copy of what the header holds. Raises AdapterError if the model carries no LoRA layer.
    """
    model = _uncompiled(model)
    tensors = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in lora_state_dict(model).items()}
    return safetensors_bytes(tensors, file_metadata(_config(model, base_model_name)[0], _fused(model)))


def _fused(model: nn.Module) -> dict[str, dict]:
    return {
        name: {"slices": layer.slices, "of": layer.of, "r": layer.r, "alpha": layer.alpha}
        for name, layer in _adapted(model).items()
        if isinstance(layer, LoRAFusedLinear)
    }


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    alpha: float | None = None,
    *,
    slices: str | Iterable[int] | None = None,
    trainable: bool = False,
) -> nn.Module:
    """Put the adapter at `path` into `model` and return the model.

    path       a folder as `save_adapter` or peft writes it, or one file: .safetensors, or .bin / .pt with nothing but tensors,
               in peft's names or in those of loralib ("...query.lora_A")
    alpha      for files that carry none (loralib's); where the file says one, another is refused: set `layer.alpha` afterwards
    slices     for loralib's MergedLinear, which does not say which slices of the fused layer it adapts: "q,v" or (0, 2)
    trainable  whether the adapter trains. False freezes a new adapter and leaves one that is already there as it is

    A plain model gets LoRA layers where the file has tensors: nothing else is asked, so that every valid peft file loads. A model that
    carries LoRA already must carry the same adapter (layers, ranks, slices, trained modules, biases) and takes over its values.

    All is checked before anything changes, and after an error the model is as it was, bit for bit. Raises AdapterNotFound, or
    AdapterError with every missing, unexpected and misshapen key; for a file that is damaged, holds a NaN or is none; for tensors
    and config that don't belong together; for a method beyond plain LoRA (use_dora, ...).
    """
    inner = _uncompiled(model)
    merged = [name for name, layer in lora_layers(inner).items() if layer.merged]
    if merged:
        raise AdapterError(f"{merged[0]!r} and {len(merged) - 1} other layer(s) are merged; call unmerge(model) before loading an adapter")
    plan = _plan(read_adapter(Path(path)), inner, alpha, slices)
    if lora_layers(inner):
        _take_over(inner, plan, trainable)
    else:
        _put_in(inner, plan, trainable)
    return model


# ---- from the file to the model


@dataclass(frozen=True)
class _Settings:
    """The config's fields that decide, checked."""

    r: int | None
    alpha: float
    rslora: bool
    dropout: float
    bias: str | None  # None: the file does not say
    rank_pattern: dict
    alpha_pattern: dict
    modules_to_save: tuple[str, ...]
    targets: object
    base_model: str | None


@dataclass
class _Factors:
    """One layer of the file in our own shapes: A (r, in) and B (out, r), stacked for slices."""

    A: Tensor
    B: Tensor
    r: int
    alpha: float
    slices: tuple[int, ...] | None = None
    of: int = 1


@dataclass
class _Misfits:
    """Everything that keeps a file from fitting a model, as lines for the reader."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    def fits(self, key: str, there: Tensor, here: Tensor) -> bool:
        """Whether the file's tensor can go where the model's is."""
        if there.shape != here.shape:
            self.misshapen.append(f"{key}: {tuple(there.shape)} in the file, {tuple(here.shape)} here")
        elif there.dtype != here.dtype and not (there.dtype in FLOATS and here.is_floating_point()):
            self.other.append(f"{key} is {there.dtype} in the file and {here.dtype} here")
        else:
            return True
        return False

    def refuse(self, content: Content, model: nn.Module, base_model: str | None) -> None:
        """Raise AdapterError with all of it, if there is anything."""
        sections = {
            "missing from the file": self.missing,
            "in the file, without a place in the model": [f"{k} {tuple(content.tensors[k].shape)}" for k in self.unexpected],
            "of another shape than the model asks for": self.misshapen,
            "further": self.other,
        }
        if any(sections.values()):
            text = f"{content.path} does not fit this {type(model).__name__}; nothing was changed."
            text += "".join(f"\n{title} ({len(lines)}):\n  " + "\n  ".join(lines) for title, lines in sections.items() if lines)
            if base_model:
                text += f"\nThe adapter was made for {base_model!r}; is this that model, with as many layers and labels?"
            raise AdapterError(text)


@dataclass
class _Plan:
    """All that loading will do, checked against the model."""

    settings: _Settings
    path: Path
    layers: dict[str, _Factors]
    trained: dict[str, dict[str, Tensor]]  # module -> its state
    biases: dict[str, Tensor]
    bias: str


def _settings(content: Content, alpha: float | None) -> _Settings:
    config = content.config or {}
    where = f"the config of {content.path}"

    def fail(name, wanted):
        raise AdapterError(f"{where}: {name} should be {wanted}; found {config[name]!r}")

    def number(value):
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

    def rank(value):
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    if content.config is not None and config.get("peft_type") != "LORA":
        raise AdapterError(f"{where}: peft_type is {config.get('peft_type')!r}; only 'LORA' is plain LoRA")
    beyond = [f"{k}={v!r}" for k, v in config.items() if k not in HARMLESS | DECIDING and v not in UNSET]
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        beyond.append(f"init_lora_weights={start!r} (it changes the base weights; peft can convert such an adapter when it saves)")
    if beyond:
        raise AdapterError(f"{where} asks for more than plain LoRA, which would be lost without a word: {', '.join(beyond)}")
    if not rank(config.get("r", 8)):
        fail("r", "an int >= 1")
    said = config.get("lora_alpha")
    if said is not None and not number(said):
        fail("lora_alpha", "a finite number")
    if alpha is not None and not number(alpha):
        raise AdapterError(f"alpha must be a finite number; found {alpha!r}")
    if said is None and alpha is None:
        raise AdapterError(
            f"{content.path} does not say which alpha it was trained with, and without it the update could be any multiple of itself. "
            "Pass the one of the training run: load_adapter(model, path, alpha=16)"
        )
    if said is not None and alpha is not None and said != alpha:
        raise AdapterError(f"{where} says lora_alpha={said!r}; asked for alpha={alpha!r}. Load it as it is, then set the alpha of its layers")
    for name, fits, wanted in (("rank_pattern", rank, "ints >= 1"), ("alpha_pattern", number, "finite numbers")):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(fits(v) for v in pattern.values()):
            fail(name, f"an object of {wanted}")
        try:
            _lookup(pattern, "", None)  # compiles them all
        except re.error:
            fail(name, "an object whose keys are regular expressions")
    if config.get("bias", "none") not in BIAS:
        fail("bias", f"one of {', '.join(BIAS)}")
    if not isinstance(config.get("use_rslora", False), bool):
        fail("use_rslora", "true or false")
    dropout = config.get("lora_dropout") or 0.0
    if not number(dropout) or not 0 <= dropout < 1:
        fail("lora_dropout", "a probability below 1")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(s, str) for s in saved):
        fail("modules_to_save", "a list of names")
    targets = config.get("target_modules")
    if targets is not None and not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        fail("target_modules", "a list of names or a regular expression")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error:
            fail("target_modules", "a regular expression")
    if any(config.get(k) is not None for k in ("exclude_modules", "layers_to_transform", "layers_pattern")) or targets == "all-linear":
        targets = None  # more rules than one; the tensors say it all
    return _Settings(
        r=config.get("r", 8) if content.config is not None else None,
        alpha=said if said is not None else alpha,
        rslora=config.get("use_rslora", False),
        dropout=dropout,
        bias=config.get("bias", "none") if content.config is not None else None,
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        modules_to_save=tuple(saved),
        targets=targets,
        base_model=config.get("base_model_name_or_path"),
    )


def _plan(content: Content, model: nn.Module, alpha: float | None, slices) -> _Plan:
    """Compare every tensor of the file with the model; raise with everything that does not fit, or return what to do."""
    if hasattr(model, "peft_config"):
        raise AdapterError(f"this {type(model).__name__} carries a peft adapter already; give the plain base model")
    settings = _settings(content, alpha)
    refuse_unusable(content.tensors, f"{content.path} can't be used")
    plain = {n: m.base_layer if isinstance(m, LoRALayer | TrainedCopy) else m for n, m in _tree(model).items()}
    wrong = _Misfits()

    factors: dict[str, dict[str, str]] = {}  # name -> "A", "B" -> key in the file
    rest: dict[str, str] = {}  # parameter of the plain model -> key
    for key in sorted(content.tensors, key=_natural):
        name = key.removeprefix(PREFIX)
        found = FACTOR.fullmatch(name)
        if found:
            factors.setdefault(found[1], {})[found[3]] = key
        elif ".original_module." not in name:  # peft stores the untrained original, too, where all biases train
            name = name.replace(".modules_to_save.", ".")
            if name not in rest or key == PREFIX + name:
                rest[name] = key

    layers: dict[str, _Factors] = {}
    for name, keys in factors.items():
        base = plain.get(name) if name else None
        kind = None if base is None else layer_class(base)
        if kind is None:
            wrong.unexpected += keys.values()
            if base is not None:
                wrong.other.append(f"{name} is a {type(base).__name__}; LoRA is available for Linear, Conv1D, Embedding and Conv2d layers")
            continue
        tensors = {which: content.tensors[key] for which, key in keys.items()}
        rank = _rank_of(tensors)
        if len(tensors) < 2:
            wrong.missing += [f"{k} {shape}" for w, k, shape in zip("AB", _keys(name, base), _shapes(base, rank), strict=True) if w not in tensors]
            continue
        layer_alpha = _lookup(settings.alpha_pattern, name, settings.alpha)
        peft_style = [key.endswith((".weight", "lora_embedding_A", "lora_embedding_B")) for key in keys.values()]
        try:
            if name in content.fused:
                layers[name] = _from_blocks(base, tensors["A"], tensors["B"], content.fused[name])
                continue
            if not any(peft_style) and not isinstance(base, nn.Conv2d):
                layers[name] = _from_loralib(base, tensors["A"], tensors["B"], layer_alpha, slices)
                continue
        except AdapterError as error:
            wrong.other.append(f"{name}: {error}")
            continue
        r = rank if settings.r is None else _lookup(settings.rank_pattern, name, settings.r)
        fits = True
        for which, key, shape in zip("AB", _keys(name, base), _shapes(base, r), strict=True):
            if settings.r is not None and keys[which] not in (key, key.removeprefix(PREFIX)):
                wrong.unexpected.append(keys[which])
                wrong.missing.append(f"{key} {shape}")
                fits = False
            elif tuple(tensors[which].shape) != shape:
                wrong.misshapen.append(f"{keys[which]}: {tuple(tensors[which].shape)} in the file, {shape} here")
                fits = False
        if fits:
            layers[name] = _Factors(tensors["A"].flatten(1), tensors["B"].flatten(1), r, layer_alpha)

    if not content.tensors or not factors:
        refuse_foreign(content.path, content.tensors)
    saved = [n for n in plain if n and any(n == s if content.ours else n.endswith(s) for s in settings.modules_to_save)]
    given = {id(plain[n]) for n in factors if n in plain}
    for name in _targeted(settings.targets, plain):
        if id(plain[name]) not in given and not any(name.startswith(n + ".") for n in saved):
            r = _lookup(settings.rank_pattern, name, settings.r)
            wrong.missing += [f"{k} {shape}" for k, shape in zip(_keys(name, plain[name]), _shapes(plain[name], r), strict=True)]

    trained, biases, bias = _rest(content.tensors, settings, plain, rest, set(factors), saved, wrong)
    for name in layers:
        if any(name == n or name.startswith(n + ".") for n in trained):
            wrong.other.append(f"{name} is both adapted and part of a module that is trained in full; there is no such layer here")
    if not lora_layers(model):
        try:
            check_targets(model, {name: (plain[name], None) for name in layers})
        except (TypeError, ValueError) as error:
            wrong.other.append(str(error))
    for name, twin in ((n, t) for n in layers for t in layers if n < t and plain[n] is plain[t]):
        if not all(torch.equal(getattr(layers[name], w), getattr(layers[twin], w)) for w in "AB"):
            wrong.other.append(f"{name} and {twin} are one layer in this model, with two different adapters in the file")

    wrong.refuse(content, model, settings.base_model)
    odd = [name for name in layers if _beyond_peft(plain[name])]
    if odd and not content.ours:
        warnings.warn(f"{some(odd)}: {_ODD_CONVOLUTION}", stacklevel=3)
    return _Plan(settings, content.path, layers, trained, biases, bias)


def _rest(tensors, settings, plain, rest, adapted, saved, wrong):
    """Sort what is no factor into whole trained modules and single biases; add what does not fit to the lists."""
    for name in adapted & plain.keys():  # peft keeps the bias of an adapted layer, and sometimes an embedding's weight, under base_layer
        if key := rest.pop(f"{name}.base_layer.bias", None):
            rest[f"{name}.bias"] = key
        if key := rest.pop(f"{name}.base_layer.weight", None):
            here = plain[name].weight.detach().cpu()
            if wrong.fits(key, tensors[key], here) and not torch.equal(here, tensors[key].to(here.dtype)):
                wrong.other.append(f"{key} holds a base weight that is not this model's: the adapter was trained on another base")

    def whole(name):
        state = _state_of(plain, name)
        return bool(name and state) and all(f"{name}.{key}" in rest for key in state)

    # peft asks only how a name ends: "classifier" in its modules_to_save is "pre_classifier", too. Other files name no modules, and some
    # of peft's have more than they name (a resized embedding): there, the largest module that the file holds completely.
    roots = set(saved)
    for name in rest:
        module = name.rpartition(".")[0]
        if module in plain and whole(module) and not any(f"{module}.".startswith(f"{root}.") for root in roots):
            while whole(module.rpartition(".")[0]):
                module = module.rpartition(".")[0]
            roots.add(module)
    roots = {n for n in roots if not any(n.startswith(m + ".") for m in roots)}

    trained: dict[str, dict[str, Tensor]] = {}
    for root in sorted(roots):
        trained[root] = {}
        for key, here in _state_of(plain, root).items():
            stored = rest.pop(f"{root}.{key}", None)
            if stored is None:
                wrong.missing.append(f"{PREFIX}{root}.{key} {tuple(here.shape)}")
            elif wrong.fits(stored, tensors[stored], here):
                trained[root][key] = tensors[stored]

    parameters = {f"{n}.{k}" if n else k: p for n, m in plain.items() for k, p in m._parameters.items() if p is not None}
    parameters = {n: p for n, p in parameters.items() if not any(n.startswith(root + ".") for root in roots)}
    every = {n for n in parameters if n.rpartition(".")[2] == "bias"}
    of_adapted = {f"{n}.bias" for n in adapted} & every
    bias = settings.bias
    if bias is None:  # a loralib file: its tensors show which of the three it was
        given = every & rest.keys()
        bias = "none" if not given else "lora_only" if given <= of_adapted else "all"
    expected = {"none": set(), "lora_only": of_adapted, "all": every}[bias]
    biases = {}
    for name, key in rest.items():
        # "all" meant every name with "bias" in it to older versions of peft
        if name in parameters and (name in expected or (bias == "all" and "bias" in name)):
            if wrong.fits(key, tensors[key], parameters[name]):
                biases[name] = tensors[key]
        else:
            wrong.unexpected.append(key)
    wrong.missing += [f"{PREFIX}{n} {tuple(parameters[n].shape)}" for n in sorted(expected - rest.keys())]
    return trained, biases, bias


def _state_of(plain: Mapping[str, nn.Module], name: str) -> dict[str, Tensor]:
    """What the plain module's state_dict would hold."""
    state = {}
    for inner, module in plain.items():
        if inner == name or inner.startswith(name + "."):
            own = {**module._parameters, **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}}
            state |= {f"{inner}.{k}".removeprefix(name + "."): t for k, t in own.items() if t is not None}
    return state


def _rank_of(tensors: Mapping[str, Tensor]) -> int:
    shape = tensors["A"].shape[:1] if "A" in tensors else tensors["B"].shape[1:2]
    return shape[0] if shape else 1


def _targeted(targets, plain: Mapping[str, nn.Module]) -> list[str]:
    """The layers that the config's target_modules mean in this model, by peft's rule; none if it does not say."""
    if targets is None:
        return []
    if isinstance(targets, str):
        names = [n for n in plain if re.fullmatch(targets, n)]
    else:
        names = [n for n in plain if any(n == t or n.endswith("." + t) for t in targets)]
    return [n for n in names if n and layer_class(plain[n]) is not None]


def _lookup(pattern: Mapping, name: str, default):
    """peft's rule: the first key that, as a regular expression, matches the end of the name."""
    matching = [v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", name)]
    return matching[0] if matching else default


def _from_blocks(base: nn.Module, A: Tensor, B: Tensor, saved: Mapping) -> _Factors:
    """Our own block form of a fused layer, A (n r, in) and B (out, n r), back to slices."""
    slices, of, r = tuple(saved["slices"]), saved["of"], saved["r"]
    n = len(slices)
    shape_A, shape_B = _shapes(base, n * r)
    if tuple(A.shape) != shape_A or tuple(B.shape) != shape_B or isinstance(base, nn.Embedding):
        raise AdapterError(f"A {tuple(A.shape)} and B {tuple(B.shape)} in the file; {shape_A} and {shape_B} here")
    blocks = B.reshape(of, -1, n, r)
    return _Factors(A, torch.cat([blocks[place, :, k] for k, place in enumerate(slices)]), r, saved["alpha"], slices, of)


def _from_loralib(base: nn.Module, A: Tensor, B: Tensor, alpha: float, slices) -> _Factors:
    """loralib's A (r, in) and B (out, r); or its MergedLinear's A (n r, in) and B (n width, r), which is how we stack slices."""
    (_, inputs), (out, _) = _shapes(base, 1)
    if A.ndim == B.ndim == 2 and A.shape[1] == inputs:
        r = B.shape[1]
        if A.shape[0] == r and B.shape[0] == out:
            return _Factors(A, B, r, alpha)
        n, odd = divmod(A.shape[0], r)
        if not odd and B.shape[0] % n == 0 and out % (B.shape[0] // n) == 0 and not isinstance(base, nn.Embedding):
            of = out // (B.shape[0] // n)
            if n <= of:
                chosen = tuple(range(of)) if n == of else _chosen(slices, n, of)
                return _Factors(A, B, r, alpha, chosen, of)
    raise AdapterError(f"A {tuple(A.shape)} and B {tuple(B.shape)} in the file; (r, {inputs}) and ({out}, r) here")


def _chosen(slices, n: int, of: int) -> tuple[int, ...]:
    if slices is None:
        raise AdapterError(
            f"the file adapts {n} of {of} slices of this fused layer and does not say which. Pass slices=, "
            'as in slices="q,v" or slices=(0, 2) for loralib\'s enable_lora=[True, False, True]'
        )
    if isinstance(slices, str):
        letters = [s.strip() for s in slices.split(",")]
        if of != len(QKV) or not set(letters) <= set(QKV):
            raise AdapterError(f"slices={slices!r}: letters are q, k, v of 3 slices; this layer has {of}. Give their numbers, from 0")
        slices = [QKV[s] for s in letters]
    slices = tuple(sorted(set(slices)))
    if len(slices) != n or not set(slices) <= set(range(of)):
        raise AdapterError(f"slices {slices} asked for; the file has factors for {n} of {of}")
    return slices


def _put_in(model: nn.Module, plan: _Plan, trainable: bool) -> None:
    """Give a plain model the layers of the plan."""
    tree = _tree(model)
    before = [name for name, p in model.named_parameters() if p.requires_grad]
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        layers: dict[int, LoRALayer] = {}
        for name, factors in plan.layers.items():
            base = tree[name]
            if id(base) in layers:
                continue
            # As precise as the file or the base, whichever is more: float32 factors over a bfloat16 base stay float32.
            dtype = torch.promote_types(factors.A.dtype, torch.promote_types(factors.B.dtype, base.weight.dtype))
            options = {"dropout": plan.settings.dropout, "rslora": plan.settings.rslora, "adapter_dtype": dtype}
            if isinstance(base, nn.Embedding):
                options["dropout"] = 0.0
            if factors.slices is not None:
                layer = LoRAFusedLinear(base, factors.r, factors.alpha, slices=factors.slices, of=factors.of, **options)
            else:
                layer = make_layer(base, factors.r, factors.alpha, **options)
            layers[id(base)] = layer
            _copy(layer.lora_A, factors.A)
            _copy(layer.lora_B, factors.B)
        copies = {name: TrainedCopy(tree[name]) for name in plan.trained}
        for name, state in plan.trained.items():
            _copy_state(copies[name].trained, state)
    except BaseException:  # out of memory, Ctrl-C: building a layer has frozen its base, nothing else
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        raise
    biases = {n: tree[n.rpartition(".")[0]]._parameters[n.rpartition(".")[2]] for n in plan.biases}
    install(model, {name: layers[id(tree[name])] for name in plan.layers}, copies, plan.bias, before)
    names = {id(p): n for n, p in model.named_parameters()}
    for name, parameter in biases.items():
        # What an older peft called a bias and we don't trains in place like one, and comes back in remove_lora.
        model._before_lora["biases"].setdefault(names[id(parameter)], parameter.detach().clone())
        parameter.requires_grad_(True)
        _copy(parameter, plan.biases[name])
    if not trainable:
        model.requires_grad_(False)


def _take_over(model: nn.Module, plan: _Plan, trainable: bool) -> None:
    """Copy the values of the plan into the same adapter that the model carries already."""
    layers, copies = _adapted(model), _trained_copies(model)
    here = {f"{n}, {_form(m.r, getattr(m, 'slices', None), m.rslora)}" for n, m in layers.items()}
    there = {f"{n}, {_form(f.r, f.slices, plan.settings.rslora)}" for n, f in plan.layers.items()}
    here |= {f"{n}, trained in full" for n in copies} | {f"{_plain_name(n)}, trained" for n in _trains(model)["biases"]}
    there |= {f"{n}, trained in full" for n in plan.trained} | {f"{n}, trained" for n in plan.biases}
    if here != there:
        lines = [f"\n  only in the model: {n}" for n in sorted(here - there)] + [f"\n  only in the file: {n}" for n in sorted(there - here)]
        raise AdapterError(
            f"this model already carries another adapter than {plan.path} holds; nothing was changed. "
            f"Call remove_lora(model) first, then load.{''.join(lines)}"
        )
    for name, factors in plan.layers.items():
        _copy(layers[name].lora_A, factors.A)
        _copy(layers[name].lora_B, factors.B)
        layers[name].alpha = factors.alpha
    for name, state in plan.trained.items():
        _copy_state(copies[name].trained, state)
    trains = _trains(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in trains["biases"]:
        _copy(parameters[name], plan.biases[_plain_name(name)])
    if trainable:
        for parameter in trains["parameters"]:
            parameter.requires_grad_(True)


def _form(r: int, slices, rslora: bool) -> str:
    return f"r={r}" + (f", slices {tuple(slices)}" if slices is not None else "") + (", rslora" if rslora else "")


@torch.no_grad()
def _copy(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.reshape(parameter.shape))


def _copy_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for key, tensor in module.state_dict().items():
        _copy(tensor, state[key])  # a state dict shares its tensors' memory with the module


# ---- from the model to the file


def _config(model: nn.Module, base_model_name: str | None) -> tuple[dict, list[str]]:
    """adapter_config.json as peft 0.21 reads it, and what its reader should know."""
    layers, copies = _adapted(model), _trained_copies(model)
    schemes = {layer.rslora for layer in layers.values()}
    if len(schemes) > 1:
        raise AdapterError("some layers use rslora and others don't; peft's config has one answer for all. Set one for all layers")
    times = {name: len(layer.slices) if isinstance(layer, LoRAFusedLinear) else 1 for name, layer in layers.items()}
    ranks = {name: layer.r * times[name] for name, layer in layers.items()}
    # alpha' / (n r) = alpha / r and, with rslora, alpha' / sqrt(n r) = alpha / sqrt(r)
    alphas = {n: x.alpha * (math.sqrt(times[n]) if x.rslora else times[n]) for n, x in layers.items()}
    alphas = {n: int(a) if float(a).is_integer() else a for n, a in alphas.items()}
    names = [n for n in _tree(model) if n]
    r, rank_pattern = _pattern(ranks)
    alpha, alpha_pattern = _pattern(alphas)
    dropouts = {layer.lora_dropout.p for layer in layers.values() if isinstance(layer.lora_dropout, nn.Dropout)}
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name or own or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": schemes.pop(),
        "lora_dropout": max(dropouts, default=0.0),
        "target_modules": _peft_targets(layers, names),
        "modules_to_save": sorted(copies) or None,
        "bias": model.__dict__.get("_before_lora", {}).get("bias", "none"),
        "fan_in_fan_out": all(is_conv1d(layer.base_layer) for layer in layers.values()),
        "init_lora_weights": True,
    }
    notes = []
    fused = [n for n in layers if times[n] > 1 or isinstance(layers[n], LoRAFusedLinear)]
    if fused:
        n, layer = times[fused[0]], layers[fused[0]]
        stored = ranks[fused[0]] * (layer.lora_A.shape[1] + layer.full_B().shape[0])
        trained = layer.lora_A.numel() + layer.lora_B.numel()
        notes.append(
            f"{some(fused)}: {n} slices of {layer.of} of a fused layer are saved as one adapter of rank {ranks[fused[0]]}, with zero rows "
            f"for the others: {stored:,} numbers stored a layer, {trained:,} trained. It computes the same in peft, but training on there "
            "would move the other slices, too; load_adapter gets the slices back"
        )
    odd = [n for n, layer in layers.items() if _beyond_peft(layer.base_layer)]
    if odd:
        notes.append(f"{some(odd)}: {_ODD_CONVOLUTION}")
    more = sorted({n for n in names for c in copies if n != c and n.endswith(c) and n not in copies})
    if more:
        notes.append(f"peft asks only how a name ends, and would take {some(more)} for trained in full, too: it can't read this adapter as it is")
    if len({id(m) for m in layers.values()}) < len(layers):
        notes.append("a layer that stands in several places is adapted in all of them; peft adapts only the first")
    return config, notes


_ODD_CONVOLUTION = "peft leaves the layer's dilation and padding mode out of its update, so that the adapter computes something else there, or fails"


def _beyond_peft(base: nn.Module) -> bool:
    return isinstance(base, nn.Conv2d) and (base.padding_mode != "zeros" or set(base.dilation) != {1})


def _pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and the others by name. A name that also ends another target's is anchored."""
    common = Counter(values.values()).most_common(1)[0][0]
    pattern = {}
    for name, value in values.items():
        if value != common:
            ends_another = any(other.endswith("." + name) for other in values)
            pattern[f"^{re.escape(name)}" if ends_another else re.escape(name).replace(r"\_", "_")] = value
    return common, pattern


def _peft_targets(layers: Iterable[str], names: list[str]) -> list[str] | str:
    """target_modules that mean exactly these layers to peft: the short ends of their names if they suffice, else the names, else a regex."""
    wanted = set(layers)
    for entries in ({n.rpartition(".")[2] for n in wanted}, wanted):
        if {n for n in names if any(n == e or n.endswith("." + e) for e in entries)} == wanted:
            return sorted(entries)
    return "|".join(re.escape(n) for n in sorted(wanted))


# ---- the model's tree


def _tree(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under its name in the plain model; a LoRA layer or trained copy stands where its base layer would."""
    found = {}

    def visit(name, module):
        found[name] = module
        inner = module.base_layer if isinstance(module, LoRALayer | TrainedCopy) else module
        for child_name, child in inner._modules.items():
            if child is not None:
                visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found


def _adapted(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers by their names, every place of one that stands in several; AdapterError if there is none."""
    tree = _tree(model)
    idle = tuple(n + "." for n, m in tree.items() if isinstance(m, TrainedCopy))  # inside a frozen original
    layers = {n: m for n, m in tree.items() if isinstance(m, LoRALayer) and not n.startswith(idle)}
    if not layers:
        raise AdapterError("this model carries no LoRA layer, so there is no adapter; call apply_lora(model, ...) and train first")
    if "" in layers:
        raise AdapterError("the model is itself a LoRA layer, without a name to store it under; put it into a module, such as nn.Sequential")
    return layers


def _trained_copies(model: nn.Module) -> dict[str, TrainedCopy]:
    return {n: m for n, m in _tree(model).items() if isinstance(m, TrainedCopy)}


def _trains(model: nn.Module) -> dict:
    """The names of the biases that belong to the adapter, and all its parameters, each once."""
    before = model.__dict__.get("_before_lora", {})
    named = dict(model.named_parameters(remove_duplicate=False))
    biases = list(before.get("biases", ())) or list(trained_biases(model, before.get("bias", "none")))
    own = [p for layer in _adapted(model).values() for p in (layer.lora_A, layer.lora_B)]
    own += [p for copied in _trained_copies(model).values() for p in copied.trained.parameters()]
    own += [named[n] for n in biases if n in named]
    return {"biases": biases, "parameters": list({id(p): p for p in own}.values())}


def _shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """peft's shapes of A and B for this base layer."""
    first, *rest = base.weight.shape
    if isinstance(base, nn.Conv2d):
        return (r, *rest), (first, r, 1, 1)
    if isinstance(base, nn.Embedding) or is_conv1d(base):
        return (r, first), (rest[0], r)
    return (r, rest[0]), (first, r)


def _keys(name: str, base: nn.Module) -> tuple[str, str]:
    """peft's keys of A and B."""
    ending = "lora_embedding_{}" if isinstance(base, nn.Embedding) else "lora_{}.weight"
    return tuple(f"{PREFIX}{name}.{ending.format(which)}" for which in "AB")


def _natural(name: str) -> list:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _plain_name(name: str) -> str:
    """A parameter's name as it would be without LoRA."""
    return name.replace(".base_layer.", ".").removeprefix("base_layer.")


def _uncompiled(model: nn.Module) -> nn.Module:
    """torch.compile wraps a model and puts "_orig_mod." in front of every name."""
    return getattr(model, "_orig_mod", model)
