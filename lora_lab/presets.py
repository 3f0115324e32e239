"""Models as tables of shapes: what a count needs, without weights, downloads or memory.

    a = preset("gpt2-medium")                  numbers from assets/presets.toml, with their source
    a = Architecture("gpt2", layers=4, d_model=256, heads=4, vocab=4096, context=256)          plain numbers
    a = from_config("folder/with/config.json") a model on disk
    for row in a.rows(): print(row.name, row.kind, row.shape)

    model = a.build()                          the same as an nn.Module on the meta device: names and shapes, no numbers

`build` gives a tree of modules under transformers' names, so that `apply_lora`, with its rules for targets, ranks and slices, works on it as on
the real model. It can't compute: it has no forward.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

PRESETS = Path(__file__).parent / "assets" / "presets.toml"


@dataclass(frozen=True)
class Row:
    """One module with parameters of its own.

    kind   Linear, Conv1D, Embedding, Conv2d, LayerNorm, RMSNorm, or Parameter (a bare tensor of its parent)
    shape  of the weight as the module stores it: Linear (out, in), Conv1D (in, out), Embedding (tokens, dim), Conv2d (out, in, kh, kw)
    bias   whether it has one; tied: the name of the module whose weight this one uses
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bias: bool = False
    tied: str | None = None


@dataclass(frozen=True)
class Architecture:
    """A model's numbers; the names are explained in assets/presets.toml.

    kv_heads, d_ff    0 stands for `heads` and for 4 d_model
    labels            classes of a classification head; 0 gives a bare encoder, and a language model its own head
    tied              whether the output head of a language model is its token embedding (None: as the family has it)
    dropout           of the residual stream and of attention (None: as the family's default configuration has it)
    activation        of the MLP: "gelu_new" (GPT-2's formula, written out in Python), "gelu" (one fused operation), "silu"

    Raises ValueError for an unknown family and for numbers that can't be a model.
    """

    family: str
    layers: int
    d_model: int
    heads: int
    kv_heads: int = 0
    d_ff: int = 0
    vocab: int = 0
    context: int = 0
    image: int = 0
    patch: int = 0
    labels: int = 0
    tied: bool | None = None
    dropout: float | None = None
    activation: str = ""
    name: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is not one of {', '.join(FAMILIES)}{near(self.family, FAMILIES)}")
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731 - a frozen dataclass fills its own blanks
        put("kv_heads", self.kv_heads or self.heads)
        put("d_ff", self.d_ff or 4 * self.d_model)
        for name, value in FAMILIES[self.family].defaults.items():
            if getattr(self, name) is None or getattr(self, name) == "":  # 0.0 and False are answers
                put(name, value)
        needed = ("layers", "d_model", "heads", "kv_heads", "d_ff", "context")
        bad = [f"{name}={getattr(self, name)}" for name in needed if getattr(self, name) < 1]
        if self.family == "vit":
            bad = [b for b in bad if not b.startswith("context")] + [f"{n}={getattr(self, n)}" for n in ("image", "patch") if getattr(self, n) < 1]
        elif self.vocab < 1:
            bad.append(f"vocab={self.vocab}")
        if bad:
            raise ValueError(f"a {self.family} model needs positive numbers; found {', '.join(bad)}")
        for whole, part in ((self.d_model, self.heads), (self.heads, self.kv_heads)):
            if whole % part:
                raise ValueError(f"d_model must be a multiple of heads, and heads of kv_heads; found {self.d_model}, {self.heads}, {self.kv_heads}")
        if self.family == "vit":
            if self.image % self.patch:
                raise ValueError(f"image must be a multiple of patch; found {self.image} and {self.patch}")
            put("context", (self.image // self.patch) ** 2 + 1)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    def changed(self, **numbers) -> Architecture:
        """The same with other numbers; d_ff and kv_heads follow d_model and heads where they did before."""
        unknown = set(numbers) - {f.name for f in fields(self)}
        if unknown:
            raise ValueError(f"an architecture has no {', '.join(sorted(unknown))}{near(min(unknown), [f.name for f in fields(self)])}")
        if "d_model" in numbers and self.d_ff == 4 * self.d_model:
            numbers.setdefault("d_ff", 0)
        if "heads" in numbers and self.kv_heads == self.heads:
            numbers.setdefault("kv_heads", 0)
        return replace(self, **numbers)

    def rows(self) -> list[Row]:
        """The modules with parameters, in the model's order."""
        return list(FAMILIES[self.family].rows(self))

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A tree of modules on the meta device, one for each row, all trainable; `model.architecture` is this."""
        classifies = self.labels and self.family in ("bert", "roberta")
        return build(self.rows(), dtype, MetaForSequenceClassification() if classifies else MetaModel(), self)


# ---- from a name, a folder, a table


def presets() -> dict[str, Architecture]:
    """All presets by name."""
    return {name: preset(name) for name in _data()["models"]}


def preset(name: str) -> Architecture:
    """The architecture of this name. Raises ValueError with names that are near."""
    models = _data()["models"]
    if name not in models:
        raise ValueError(f"there is no preset {name!r}{near(name, models)} The presets are {', '.join(models)}")
    return Architecture(name=name, **models[name])


def gpus() -> dict[str, dict]:
    """GPUs by name: MiB of memory as the driver reports it, the printed size, whether they compute in bf16."""
    return _data()["gpus"]


def gpu_bytes(name: str) -> int:
    """A GPU's memory in bytes. Raises ValueError for an unknown name."""
    found = {known.lower(): known for known in gpus()}.get(name.lower())
    if found is None:
        raise ValueError(f"there is no GPU {name!r}{near(name, gpus())} Known are {', '.join(gpus())}; or give bytes")
    return gpus()[found]["MiB"] * 2**20


@cache
def _data() -> dict:
    return tomllib.loads(PRESETS.read_text(encoding="utf-8"))


def near(wrong: str, known) -> str:
    """The end of a sentence about a name that is not known: names that are near, in brackets, if there are any; a full stop."""
    lower = {k.lower(): k for k in known}
    begun = [k for k in lower if k.startswith(wrong.lower())]  # "A100" stands for both of its sizes
    close = begun or difflib.get_close_matches(wrong.lower(), lower, n=3, cutoff=0.6) or [k for k in lower if wrong.lower() in k][:3]
    return f" (did you mean {' or '.join(repr(lower[k]) for k in close)}?)." if close else "."


def meta_model(what: str | os.PathLike | Architecture | Iterable[Row], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Names and shapes of a model, on the meta device: of a preset's name, an architecture, a table of rows, or a folder with config.json.

    A folder of a family that is not known here is built by transformers, which has to be installed. Raises ValueError with names that are
    near, FileNotFoundError.
    """
    if isinstance(what, Architecture):
        return what.build(dtype)
    if not isinstance(what, str | os.PathLike):
        return build(what, dtype)
    if isinstance(what, str) and what in _data()["models"]:
        return preset(what).build(dtype)
    if not Path(what).exists():
        try:
            preset(str(what))
        except ValueError as error:
            raise ValueError(f"{error}. A model on disk is a folder with config.json; there is no {what}") from None
    try:
        return from_config(what).build(dtype)
    except ValueError as error:
        known = f"{error}"
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(what)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        with torch.device("meta"):
            model = kind(config) if config.architectures else transformers.AutoModel.from_config(config)
    except (ValueError, OSError, AttributeError) as error:
        raise ValueError(f"{known}; transformers can't build it either: {error}") from None
    return model.to(dtype)


# What a config.json of transformers calls our numbers; the first name that is there counts.
CONFIG_NAMES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "d_model": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "d_ff": ("intermediate_size", "n_inner"),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions"),
    "image": ("image_size",),
    "patch": ("patch_size",),
    "dropout": ("hidden_dropout_prob", "resid_pdrop", "attention_dropout"),
}
ACTIVATIONS = {"gelu_new": "gelu_new", "gelu": "gelu", "gelu_pytorch_tanh": "gelu", "silu": "silu", "swish": "silu"}


def from_config(path: str | os.PathLike) -> Architecture:
    """The architecture of a model on disk: a folder with transformers' config.json, or the file itself.

    Raises FileNotFoundError, or ValueError for a file that is no configuration and for a family that is not known here
    (`FAMILIES`); `meta_model` asks transformers for those.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        inside = f"; it holds {', '.join(sorted(p.name for p in path.iterdir())[:6]) or 'nothing'}" if path.is_dir() else ""
        raise FileNotFoundError(f"there is no {file}{inside}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON text: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} should hold a JSON object; found {type(config).__name__}")
    return from_dict(config, name=str(path))


def from_dict(config: dict, name: str = "") -> Architecture:
    """The same from a configuration's dict (`model.config.to_dict()`). Raises ValueError."""
    kind = config.get("model_type")
    family = next((f for f, known in FAMILIES.items() if kind in known.model_types), None)
    if family is None:
        known = sorted(t for f in FAMILIES.values() for t in f.model_types)
        raise ValueError(f"{name or 'this configuration'} is a model of type {kind!r}; known here are {', '.join(known)}")
    odd = [key for key in ("head_dim", "mlp_bias", "attention_bias", "add_cross_attention") if config.get(key)]
    odd = [key for key in odd if key != "head_dim" or config[key] * config.get("num_attention_heads", 0) != config.get("hidden_size")]
    if odd:
        raise ValueError(f"{name or 'this configuration'} sets {', '.join(odd)}, which these families don't have")
    numbers = {ours: next((config[k] for k in names if config.get(k) is not None), None) for ours, names in CONFIG_NAMES.items()}
    numbers = {ours: value for ours, value in numbers.items() if value is not None}
    if family == "roberta" and "context" in numbers:
        numbers["context"] -= 2  # two rows of its position embedding stand for padding and are never reached
    if family == "vit":
        numbers["context"] = 0
    heads = " ".join(config.get("architectures") or ())
    classifies = "Classification" in heads
    if classifies:
        numbers["labels"] = len(config.get("id2label") or {}) or config.get("num_labels") or 2
    activation = config.get("hidden_act", config.get("activation_function"))
    if activation is not None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"{name or 'this configuration'}: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        numbers["activation"] = ACTIVATIONS[activation]
    if "tie_word_embeddings" in config:
        numbers["tied"] = bool(config["tie_word_embeddings"])
    return Architecture(family, **numbers, name=name)


# ---- the families, as transformers builds them


def _gpt2(a: Architecture) -> Iterator[Row]:
    d = a.d_model
    yield Row("transformer.wte", "Embedding", (a.vocab, d))
    yield Row("transformer.wpe", "Embedding", (a.context, d))
    for i in range(a.layers):
        h = f"transformer.h.{i}"
        yield Row(f"{h}.ln_1", "LayerNorm", (d,), True)
        yield Row(f"{h}.attn.c_attn", "Conv1D", (d, 3 * d), True)  # q, k and v, side by side
        yield Row(f"{h}.attn.c_proj", "Conv1D", (d, d), True)
        yield Row(f"{h}.ln_2", "LayerNorm", (d,), True)
        yield Row(f"{h}.mlp.c_fc", "Conv1D", (d, a.d_ff), True)
        yield Row(f"{h}.mlp.c_proj", "Conv1D", (a.d_ff, d), True)
    yield Row("transformer.ln_f", "LayerNorm", (d,), True)
    yield Row("lm_head", "Linear", (a.vocab, d), tied="transformer.wte" if a.tied else None)


def _llama(a: Architecture) -> Iterator[Row]:
    d, kv = a.d_model, a.kv_heads * a.head_dim
    yield Row("model.embed_tokens", "Embedding", (a.vocab, d))
    for i in range(a.layers):
        h = f"model.layers.{i}"
        yield Row(f"{h}.self_attn.q_proj", "Linear", (d, d))
        yield Row(f"{h}.self_attn.k_proj", "Linear", (kv, d))  # fewer heads for k and v: grouped-query attention
        yield Row(f"{h}.self_attn.v_proj", "Linear", (kv, d))
        yield Row(f"{h}.self_attn.o_proj", "Linear", (d, d))
        yield Row(f"{h}.mlp.gate_proj", "Linear", (a.d_ff, d))
        yield Row(f"{h}.mlp.up_proj", "Linear", (a.d_ff, d))
        yield Row(f"{h}.mlp.down_proj", "Linear", (d, a.d_ff))
        yield Row(f"{h}.input_layernorm", "RMSNorm", (d,))
        yield Row(f"{h}.post_attention_layernorm", "RMSNorm", (d,))
    yield Row("model.norm", "RMSNorm", (d,))
    yield Row("lm_head", "Linear", (a.vocab, d), tied="model.embed_tokens" if a.tied else None)


def _bert(a: Architecture) -> Iterator[Row]:
    d, roberta = a.d_model, a.family == "roberta"
    body = f"{a.family}." if a.labels else ""
    yield Row(f"{body}embeddings.word_embeddings", "Embedding", (a.vocab, d))
    yield Row(f"{body}embeddings.position_embeddings", "Embedding", (a.context + 2 * roberta, d))
    yield Row(f"{body}embeddings.token_type_embeddings", "Embedding", (1 if roberta else 2, d))
    yield Row(f"{body}embeddings.LayerNorm", "LayerNorm", (d,), True)
    for i in range(a.layers):
        h = f"{body}encoder.layer.{i}"
        for part in ("query", "key", "value"):
            yield Row(f"{h}.attention.self.{part}", "Linear", (d, d), True)
        yield Row(f"{h}.attention.output.dense", "Linear", (d, d), True)
        yield Row(f"{h}.attention.output.LayerNorm", "LayerNorm", (d,), True)
        yield Row(f"{h}.intermediate.dense", "Linear", (a.d_ff, d), True)
        yield Row(f"{h}.output.dense", "Linear", (d, a.d_ff), True)
        yield Row(f"{h}.output.LayerNorm", "LayerNorm", (d,), True)
    if not (roberta and a.labels):  # RoBERTa's classifier brings its own dense layer
        yield Row(f"{body}pooler.dense", "Linear", (d, d), True)
    if roberta and a.labels:
        yield Row("classifier.dense", "Linear", (d, d), True)
        yield Row("classifier.out_proj", "Linear", (a.labels, d), True)
    elif a.labels:
        yield Row("classifier", "Linear", (a.labels, d), True)


def _vit(a: Architecture) -> Iterator[Row]:
    d = a.d_model
    yield Row("vit.embeddings.cls_token", "Parameter", (1, 1, d))
    yield Row("vit.embeddings.position_embeddings", "Parameter", (1, a.context, d))
    yield Row("vit.embeddings.patch_embeddings.projection", "Conv2d", (d, 3, a.patch, a.patch), True)
    for i in range(a.layers):
        h = f"vit.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield Row(f"{h}.attention.{part}", "Linear", (d, d), True)
        yield Row(f"{h}.layernorm_before", "LayerNorm", (d,), True)
        yield Row(f"{h}.layernorm_after", "LayerNorm", (d,), True)
        yield Row(f"{h}.mlp.fc1", "Linear", (a.d_ff, d), True)
        yield Row(f"{h}.mlp.fc2", "Linear", (d, a.d_ff), True)
    yield Row("vit.layernorm", "LayerNorm", (d,), True)
    if a.labels:
        yield Row("classifier", "Linear", (a.labels, d), True)


@dataclass(frozen=True)
class Family:
    """How a kind of model is built: its rows, transformers' `model_type`s, what its default configuration sets."""

    rows: Callable[[Architecture], Iterator[Row]]
    model_types: tuple[str, ...]
    defaults: dict


FAMILIES = {
    "gpt2": Family(_gpt2, ("gpt2",), {"tied": True, "dropout": 0.1, "activation": "gelu_new"}),
    "llama": Family(_llama, ("llama", "mistral"), {"tied": False, "dropout": 0.0, "activation": "silu"}),
    "bert": Family(_bert, ("bert",), {"tied": True, "dropout": 0.1, "activation": "gelu"}),
    "roberta": Family(_bert, ("roberta",), {"tied": True, "dropout": 0.1, "activation": "gelu"}),
    "vit": Family(_vit, ("vit",), {"tied": False, "dropout": 0.0, "activation": "gelu"}),
}


# ---- the same as modules on the meta device


class MetaModel(nn.Module):
    """A model's names and shapes. `get_output_embeddings` is there because "all-linear" asks for the head to leave out."""

    architecture: Architecture | None = None

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "lm_head", None)

    def forward(self, *inputs):
        raise RuntimeError("this model has shapes and no numbers; it can be counted and can't compute")


class MetaForSequenceClassification(MetaModel):
    """The ending of the name is what "all-linear" looks at, here as in peft: the head of a sequence classifier is no target."""

    config = None


class MetaConv1D(nn.Module):
    """transformers' Conv1D, known by its `nf` and its weight (in, out), without importing transformers."""

    def __init__(self, inputs: int, out: int, dtype: torch.dtype):
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.empty(inputs, out, device="meta", dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out, device="meta", dtype=dtype))


def _module(row: Row, dtype: torch.dtype) -> nn.Module | nn.Parameter:
    where = {"device": "meta", "dtype": dtype}
    match row.kind:
        case "Linear":
            return nn.Linear(row.shape[1], row.shape[0], bias=row.bias, **where)
        case "Conv1D":
            return MetaConv1D(*row.shape, dtype)
        case "Embedding":
            # Not nn.Embedding(...): its normal_ on the meta device imports torch._dynamo, 64 MB and a second for numbers that nobody sees.
            return nn.Embedding.from_pretrained(torch.empty(row.shape, **where), freeze=False)
        case "Conv2d":
            out, channels, *kernel = row.shape
            return nn.Conv2d(channels, out, kernel, stride=kernel, bias=row.bias, **where)
        case "LayerNorm":
            return nn.LayerNorm(row.shape, **where)
        case "RMSNorm":
            return nn.RMSNorm(row.shape, **where)
        case "Parameter":
            return nn.Parameter(torch.empty(row.shape, **where))
    raise ValueError(f"{row.name}: unknown kind {row.kind!r}")


def build(
    rows: Iterable[Row], dtype: torch.dtype = torch.float32, model: nn.Module | None = None, architecture: Architecture | None = None
) -> nn.Module:
    """A table of shapes as modules on the meta device.

    >>> model = build([Row("encoder.q", "Linear", (64, 64)), Row("encoder.v", "Linear", (16, 64), bias=True)])
    >>> [name for name, _ in model.named_parameters()]
    ['encoder.q.weight', 'encoder.v.weight', 'encoder.v.bias']
    """
    model = MetaModel() if model is None else model
    model.architecture = architecture
    for row in rows:
        *path, last = row.name.split(".")
        parent = model
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        setattr(parent, last, _module(row, dtype))
        if row.tied:
            parent._modules[last].weight = model.get_submodule(row.tied).weight
    return model
