"""What training costs, predicted from shapes before anything is trained: bytes, moment by moment, and FLOPs.

    model = apply_lora(preset("gpt2-medium").build(), r=4, target_modules=["c_attn:q,v"])
    memory = training_memory(model, batch=8, context=512)
    print(memory)                 weights, gradients, optimizer, activations; the peak and when it is reached
    largest("batch", model, gpu="T4", context=512)

The peak is not the sum of the four: gradients grow while activations go. `training_memory` writes the model's step on a `Tape` and plays it.

Checked on the CPU: kept tensors against torch's saved_tensors_hooks to the byte, the peak against what the operating system counts
(tests/test_ledger.py, bench/ledger.py). On GPUs the same arithmetic holds for tensors; the CUDA context, the libraries' work space and
the allocator's rounding come on top, and are covered by a flat `reserve` that has not been measured for each GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .adapt import TrainedCopy
from .counting import optimizer_bytes, stored_bytes
from .layers import LoRAEmbedding, LoRAFusedLinear, LoRALayer, is_conv1d
from .presets import Architecture, from_dict, gpu_bytes
from .tape import Moment, Tape, Value

RESERVE = 2**30  # bytes a CUDA context and its libraries take; half a GiB to one is usual


@dataclass(frozen=True)
class Memory:
    """A training step's memory in bytes.

    weights      of base and adapter, as stored          optimizer    its state
    gradients    of all parameters that train            activations  kept at the end of the forward pass
    peak         the most that is in memory at once, and `moment`, when that is
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    moment: str
    moments: tuple[Moment, ...] = ()

    def __str__(self) -> str:
        lines = [f"{name:<12}{readable(getattr(self, name)):>12}" for name in ("weights", "gradients", "optimizer", "activations")]
        return "\n".join([*lines, f"{'peak':<12}{readable(self.peak):>12}   {self.moment}"])


def readable(size: float) -> str:
    """Bytes for people, in powers of 1000 as file sizes and GPUs are printed.

    >>> readable(1_572_864), readable(350e9)
    ('1.57 MB', '350 GB')
    """
    if abs(size) < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if abs(size) < 999.5 or unit == "TB":
            return f"{size:.3g} {unit}" if abs(size) < 999.5 else f"{size:.0f} {unit}"
    raise AssertionError


def architecture_of(model: nn.Module) -> Architecture:
    """The numbers of a model: of one from `Architecture.build`, or of a transformers model by its configuration. Raises ValueError."""
    if isinstance(getattr(model, "architecture", None), Architecture):
        return model.architecture
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"a {type(model).__name__} says nothing about its architecture: build it from a preset, or give a transformers model with its config"
        )
    found = config.to_dict()
    found.setdefault("architectures", None)
    if not found["architectures"]:
        found["architectures"] = [type(model).__name__]
    return from_dict(found, name=type(model).__name__)


def training_memory(
    model: nn.Module,
    batch: int,
    context: int | None = None,
    *,
    optimizer: str = "adam",
    attention: str = "flash",
    checkpointing: bool = False,
    quantize: str | None = None,
    dropout: float | None = None,
    device: str = "cpu",
) -> Memory:
    """Predict the memory of a training step after the first (the optimizer has its state from then on).

    model          of a known family (`presets.FAMILIES`), plain or with LoRA, on any device, also meta. What `requires_grad` says trains;
                   numbers have the dtypes of its parameters, activations that of the embeddings
    batch, context sequences a step and tokens a sequence (None: as long as the model allows; an image has its patches)
    optimizer      "sgd", "momentum", "adam" (also AdamW), "adam8bit"
    attention      "flash": scores are never stored (torch's scaled_dot_product_attention on current GPUs, and on the CPU without
                   dropout); "math": they are
    checkpointing  a block keeps its input and computes the rest again (`gradient_checkpointing_enable`)
    quantize       "int8", "nf4" or "nf4-double": frozen linear layers of the blocks are stored so and spelled out while they are used
    dropout        probability in training, None: the architecture's. On the CPU attention with dropout takes the "math" way, whatever is asked
    device         "cpu" or "cuda": what a dropout mask costs, and Adam's scratch space

    Not counted: padding masks, the batch itself, autocast's copies of weights, what the allocator loses. Raises ValueError, TypeError.
    """
    tape, weights = write(
        model, batch, context, attention=attention, checkpointing=checkpointing, quantize=quantize, dropout=dropout, device=device
    )
    played = tape.run(checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("nothing trains: no parameter of this model requires a gradient; call apply_lora(model, ...) first")
    state = sum(optimizer_bytes(p.numel(), optimizer, p.element_size()) for p in trained)
    gradients = sum(_size(p) for p in trained)
    moments = [*played.moments, Moment("optimizer", "its step", 0, _scratch(trained, optimizer, device), gradients)]
    highest = max(moments, key=lambda m: m.total)
    return Memory(
        weights=weights, gradients=gradients, optimizer=state, activations=played.kept, peak=weights + state + highest.total,
        moment=f"{highest.phase}, at {highest.label}", moments=tuple(moments),
    )  # fmt: skip


def training_flops(model: nn.Module, batch: int, context: int | None = None, *, attention: str = "flash", checkpointing: bool = False) -> tuple[int, int]:
    """FLOPs of the matrix products of one step: (forward, backward), two for a multiplication with its addition.

    For one matrix of N x N and a token, N² multiplications forward and, for full fine-tuning, 2 N² backward; with LoRA and a frozen W
    N² + 2 N r forward and N² + 4 N r backward: (2 N² + 6 N r) / 3 N² of the work (Schulman et al. 2025, "LoRA Without Regret").
    The true share is a little lower: nothing flows back beyond the first adapter. Checkpointing adds the blocks' forward pass once more.
    """
    tape, _ = write(model, batch, context, attention=attention, checkpointing=checkpointing)
    forward, backward = tape.flops
    if checkpointing:
        learning = {op.block for op in tape.operations if op.grad and op.block is not None}
        backward += sum(op.flops[0] for op in tape.operations if op.block in learning)
    return forward, backward


def largest(
    what: str, model: nn.Module | Callable[[int], nn.Module], *, gpu: str | int, batch: int = 1, context: int | None = None,
    reserve: int = RESERVE, **options,
) -> int:  # fmt: skip
    """The largest batch, context or r whose predicted peak, with `reserve`, fits into a GPU's memory; 0 if not even 1 does.

    what    "batch", "context", or "r": then `model` is a function r -> model
    gpu     a name from assets/presets.toml, or bytes
    Other arguments as in `training_memory`, for a GPU. Raises ValueError.

    The peak grows with each of the three, so that a search finds the last that fits.
    """
    room = (gpu_bytes(gpu) if isinstance(gpu, str) else gpu) - reserve
    options = {"device": "cuda", **options}
    if what == "r":
        if isinstance(model, nn.Module):
            raise ValueError("to find the largest r give a function r -> model, as in: lambda r: apply_lora(preset('gpt2').build(), r)")
        most = max(1, max(min(row.shape) for row in architecture_of(model(1)).rows() if len(row.shape) == 2))
        peak = lambda n: training_memory(model(n), batch, context, **options).peak  # noqa: E731
    elif what == "batch":
        most = 2**20
        peak = lambda n: training_memory(model, n, context, **options).peak  # noqa: E731
    elif what == "context":
        most = architecture_of(model).context
        peak = lambda n: training_memory(model, batch, n, **options).peak  # noqa: E731
    else:
        raise ValueError(f"{what!r} is not one of 'batch', 'context', 'r'")
    found: dict[int, int] = {}

    def fit(n: int) -> bool:
        found[n] = peak(n)
        return found[n] <= room

    if not fit(1):
        return 0
    fits, fails = 1, most + 1
    if most > 1 and fit(2):
        fits = 2
    elif most > 1:
        return 1
    while fails - fits > 1:
        # The peak is nearly a straight line, so look where it would meet the room, then right beside, then halve.
        known = sorted(found)
        low, high = (known[-2], known[-1]) if fails == most + 1 else (fits, fails)
        slope = max(1.0, (found[high] - found[low]) / (high - low))
        guess = min(max(fits + int((room - found[fits]) / slope), fits + 1), fails - 1)
        for n in (guess, guess + 1, (fits + fails) // 2):
            if fits < n < fails:
                fits, fails = (n, fails) if fit(n) else (fits, n)
    return fits


def write(
    model: nn.Module, batch: int, context: int | None = None, *, attention: str = "flash", checkpointing: bool = False,
    quantize: str | None = None, dropout: float | None = None, device: str = "cpu",
) -> tuple[Tape, int]:  # fmt: skip
    """(the tape of one forward pass with its loss, the bytes of all weights as stored). Arguments as in `training_memory`."""
    a = architecture_of(model)
    context = a.context if context is None else context
    for name, value, most in (("batch", batch, None), ("context", context, a.context)):
        if value < 1 or (most and value > most):
            raise ValueError(f"{name} must be at least 1" + (f" and at most {most}, the model's longest" if most else "") + f"; found {value}")
    if a.family == "vit" and context != a.context:
        raise ValueError(f"an image gives {a.context} tokens, neither more nor less; found context={context}")
    if attention not in ("flash", "math"):
        raise ValueError(f"attention {attention!r} is not one of 'flash', 'math'")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not one of 'cpu', 'cuda'")
    p = a.dropout if dropout is None else dropout
    if p and device == "cpu":
        attention = "math"
    writer = _Writer(model, a, batch, context, attention, checkpointing, quantize, p, device)
    WRITERS[a.family](writer)
    return writer.tape, writer.weights()


def _size(p: torch.Tensor) -> int:
    return p.numel() * p.element_size()


def _scratch(trained: list[nn.Parameter], optimizer: str, device: str) -> int:
    """Tensors that live during the step alone. On the CPU torch updates one parameter after another, on a GPU all at once."""
    if optimizer != "adam":
        return 0
    return 2 * max(map(_size, trained)) if device == "cpu" else sum(map(_size, trained))


class _Writer:
    """A model's forward pass, layer by layer, with what trains in it."""

    def __init__(self, model, a, batch, context, attention, checkpointing, quantize, dropout, device):
        self.model, self.a, self.batch, self.context = model, a, batch, context
        self.tokens = batch * context
        self.kernel, self.checkpointing, self.quantize, self.p = attention, checkpointing, quantize, dropout
        self.element = next(m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.Conv2d)).element_size()
        self.tape = Tape(self.element, cuda=device == "cuda")
        self.quantized: dict[int, int] = {}  # id of a weight -> its bytes

    def weights(self) -> int:
        return sum(self.quantized.get(id(p), _size(p)) for p in self.model.parameters())

    @property
    def hidden(self) -> int:
        """Bytes of one (tokens, d_model) tensor."""
        return self.tokens * self.a.d_model * self.element

    def module(self, name: str) -> nn.Module:
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"a {self.a.family} model should have a layer {name!r}; this {type(self.model).__name__} has none. "
                "(Adapters of peft can be counted, but their step is not written down here: use apply_lora)"
            ) from None
        if hasattr(module, "base_layer") and not isinstance(module, LoRALayer | TrainedCopy):
            raise TypeError(f"{name!r} is a {type(module).__name__} of {type(module).__module__}; this ledger knows lora_lab's own adapters")
        return module.trained if isinstance(module, TrainedCopy) else module

    def linear(self, x: Value, name: str, tokens: int | None = None, in_block: bool = True) -> Value:
        tokens = self.tokens if tokens is None else tokens
        layer, tape = self.module(name), self.tape
        base = layer.base_layer if isinstance(layer, LoRALayer) else layer
        inputs, out = base.weight.shape if is_conv1d(base) else reversed(base.weight.shape)
        spelled = 0
        if self.quantize and in_block and not base.weight.requires_grad:
            self.quantized[id(base.weight)] = stored_bytes(out, inputs, self.quantize)
            spelled = _size(base.weight)
        y = tape.linear(x, tokens, inputs, out, _trains(base.weight), _trains(base.bias), name, spelled)
        if isinstance(layer, LoRALayer) and not layer.merged:
            y = self.lora(y, x, layer, tokens, inputs, out, name)
        return y

    def lora(self, y: Value, x: Value, layer: LoRALayer, tokens: int, inputs: int, out: int, name: str) -> Value:
        """y + scaling * B A dropout(x), as LoRALinear.add_update computes it."""
        tape, width = self.tape, layer.lora_A.element_size()
        A, B, rank = _trains(layer.lora_A), _trains(layer.lora_B), layer.lora_A.shape[0]
        x = tape.dropout(x, getattr(layer.lora_dropout, "p", 0.0), name)
        x = tape.cast(x, width)
        flops = 2 * tokens * inputs * rank, 2 * tokens * out * rank
        h = tape.call(name, [x], tokens * rank * width, keeps=[x] if A else [], trains=A, flops=(flops[0], flops[0] * (x.grad + bool(A))))
        # B of slices is spread into one (out, n r) matrix, which is kept for the gradient of h
        spread = out * rank * width if isinstance(layer, LoRAFusedLinear) and h.grad else 0
        back = flops[1] * (h.grad + bool(B))
        if width == self.element:
            # the sum's gradient is handed on to y; that of h is the only new tensor
            update = tape.call(name, [h], 0, keeps=[h] if B else [], extra=spread, trains=B, flops=(flops[1], back))
            return tape.call(name, [y, update], y.bytes, passes=True)
        update = tape.call(name, [h], tokens * out * width, keeps=[h] if B else [], extra=spread, trains=B, flops=(flops[1], back))
        scaled = tape.scale(update, name)
        return tape.add(y, tape.call(name, [scaled], y.bytes), name)

    def embedding(self, name: str, rows: int | None = None, entry: bool = False) -> Value:
        """A look-up of `rows` rows (None: one for each token); the gradient of its weight is as large as the weight, however few rows were used.

        entry: the tokens' own embedding, where checkpointing in transformers begins: it lets the output of a frozen one require a gradient,
        which stays, like that of a parameter.
        """
        layer, tape = self.module(name), self.tape
        rows = self.tokens if rows is None else rows
        base = layer.base_layer if isinstance(layer, LoRAEmbedding) else layer
        size = rows * base.weight.shape[1] * self.element
        trains = _trains(base.weight)
        if entry and self.checkpointing and not trains:
            y = tape.call(name, [], size, keeps_output=True, trains=[(name, size)])
        else:
            y = tape.call(name, [], size, trains=trains)
        if isinstance(layer, LoRALayer) and not layer.merged:
            width, r = layer.lora_A.element_size(), layer.r
            A, B = _trains(layer.lora_A), _trains(layer.lora_B)
            flops = 2 * rows * r * base.weight.shape[1]
            h = tape.call(name, [], rows * r * width, trains=A)
            update = tape.call(name, [h], rows * base.weight.shape[1] * width, keeps=[h] if B else [], trains=B,
                               flops=(flops, flops * (h.grad + bool(B))))  # fmt: skip
            y = tape.add(y, tape.scale(update, name), name)
        return y

    def norm(self, x: Value, name: str) -> Value:
        layer = self.module(name)
        if self.a.family != "llama":
            return self.tape.layer_norm(x, self.tokens, _trains(layer.weight) + _trains(layer.bias), name)
        tape, number = self.tape, self.tokens * 4
        x = tape.cast(x, 4)  # RMSNorm computes in float32
        square = tape.call(name, [x], x.bytes, keeps=[x])
        mean = tape.call(name, [tape.call(name, [square], number)], number)  # the mean, plus epsilon
        root = tape.call(name, [mean], number, keeps_output=True)
        normed = tape.multiply(x, root, name)
        if self.element != 4:
            normed = tape.call(name, [normed], self.hidden)
        weight = _trains(layer.weight)
        return tape.call(name, [normed], self.hidden, keeps=[normed] if weight else [], trains=weight)

    def attend(self, q: Value, k: Value, v: Value) -> Value:
        return self.tape.attention(q, k, v, self.batch, self.a.heads, self.context, self.kernel, self.p)

    def activation(self, x: Value, name: str) -> Value:
        return self.tape.gelu_new(x, name) if self.a.activation == "gelu_new" else self.tape.keep_input(x, name)

    def dropout(self, x: Value, label: str) -> Value:
        return self.tape.dropout(x, self.p, label)

    def rotate(self, x: Value, table: list[Value]) -> Value:
        """Rotary positions: x cos + turned(x) sin."""
        tape = self.tape
        turned = tape.call("rotary", [tape.scale(x, "rotary")], x.bytes)
        turned = tape.multiply(turned, table[1], "rotary")
        return tape.add(tape.multiply(x, table[0], "rotary"), turned, "rotary")

    def first_token(self, x: Value) -> Value:
        return self.tape.view(x, self.batch * self.a.d_model * self.element)[0]

    def head(self, x: Value, name: str) -> Value:
        return self.linear(x, name, self.batch, in_block=False)

    def language_loss(self, x: Value) -> None:
        # transformers computes the loss of a language model in float32, whatever the model's own precision
        self.tape.cross_entropy(self.tape.cast(self.linear(x, "lm_head", in_block=False), 4), 4)


def _trains(parameter: nn.Parameter | None) -> list[tuple[int, int]]:
    return [(id(parameter), _size(parameter))] if parameter is not None and parameter.requires_grad else []


def _write_gpt2(w: _Writer) -> None:
    tape, a = w.tape, w.a
    x = tape.add(w.embedding("transformer.wte", entry=True), w.embedding("transformer.wpe", w.context), "transformer.wpe")
    x = w.dropout(x, "transformer.drop")
    for i in range(a.layers):
        h = f"transformer.h.{i}"
        with tape.block(i):
            y = w.linear(w.norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")
            y = w.attend(*tape.view(y, w.hidden, w.hidden, w.hidden))
            x = tape.add(w.dropout(w.linear(tape.reuse(y), f"{h}.attn.c_proj"), h), x, h)
            y = w.activation(w.linear(w.norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), f"{h}.mlp.act")
            x = tape.add(x, w.dropout(w.linear(y, f"{h}.mlp.c_proj"), h), h)
    w.language_loss(w.norm(x, "transformer.ln_f"))


def _write_llama(w: _Writer) -> None:
    tape, a = w.tape, w.a
    x = w.embedding("model.embed_tokens", entry=True)
    table = [tape.call("rotary", [], w.context * a.head_dim * w.element) for _ in range(2)]  # cos and sin, for all blocks
    for i in range(a.layers):
        h = f"model.layers.{i}"
        with tape.block(i):
            y = w.norm(x, f"{h}.input_layernorm")
            q, k, v = (w.linear(y, f"{h}.self_attn.{part}_proj") for part in "qkv")
            y = w.attend(w.rotate(q, table), w.rotate(k, table), v)
            x = tape.add(x, w.linear(tape.reuse(y), f"{h}.self_attn.o_proj"), h)
            y = w.norm(x, f"{h}.post_attention_layernorm")
            gate = w.activation(w.linear(y, f"{h}.mlp.gate_proj"), f"{h}.mlp.act")
            y = tape.multiply(gate, w.linear(y, f"{h}.mlp.up_proj"), f"{h}.mlp.act")
            x = tape.add(x, w.linear(y, f"{h}.mlp.down_proj"), h)
    w.language_loss(w.norm(x, "model.norm"))


def _write_bert(w: _Writer) -> None:
    tape, a = w.tape, w.a
    if not a.labels:
        raise ValueError(f"{a.name or 'this encoder'} has no head and so no loss to train on; give it one: architecture.changed(labels=2)")
    body = f"{a.family}."
    x = w.embedding(f"{body}embeddings.word_embeddings", entry=True)
    x = tape.add(x, w.embedding(f"{body}embeddings.token_type_embeddings"), "embeddings")
    positions = w.tokens if a.family == "roberta" else w.context  # RoBERTa looks them up for each sequence: padding shifts them
    x = tape.add(x, w.embedding(f"{body}embeddings.position_embeddings", positions), "embeddings")
    x = w.dropout(w.norm(x, f"{body}embeddings.LayerNorm"), "embeddings")
    for i in range(a.layers):
        h = f"{body}encoder.layer.{i}"
        with tape.block(i):
            q, k, v = (w.linear(x, f"{h}.attention.self.{part}") for part in ("query", "key", "value"))
            y = w.dropout(w.linear(tape.reuse(w.attend(q, k, v)), f"{h}.attention.output.dense"), h)
            x = w.norm(tape.add(y, x, h), f"{h}.attention.output.LayerNorm")
            y = w.activation(w.linear(x, f"{h}.intermediate.dense"), f"{h}.intermediate.act")
            y = w.dropout(w.linear(y, f"{h}.output.dense"), h)
            x = w.norm(tape.add(y, x, h), f"{h}.output.LayerNorm")
    x = w.first_token(x)
    if a.family == "roberta":
        x = tape.keep_output(w.head(w.dropout(x, "classifier"), "classifier.dense"), "classifier")
        tape.cross_entropy(w.head(w.dropout(x, "classifier"), "classifier.out_proj"), w.element)
    else:
        x = tape.keep_output(w.head(x, f"{body}pooler.dense"), "pooler")
        tape.cross_entropy(w.head(w.dropout(x, "classifier"), "classifier"), w.element)


def _write_vit(w: _Writer) -> None:
    tape, a = w.tape, w.a
    if not a.labels:
        raise ValueError(f"{a.name or 'this encoder'} has no head and so no loss to train on; give it one: architecture.changed(labels=2)")
    images = tape.input(w.batch * 3 * a.image**2 * w.element)
    layer, patches = w.module("vit.embeddings.patch_embeddings.projection"), w.batch * (a.context - 1)
    if isinstance(layer, LoRALayer):
        raise TypeError("an adapter on the patch embedding can be counted, but its step is not written down here")
    weight = _trains(layer.weight)
    size = patches * a.d_model * w.element
    trains = weight + _trains(layer.bias) or [("patches", size)] * w.checkpointing
    x = tape.call(
        "patches", [images], size, keeps=[images] if weight else [], trains=trains,
        flops=(2 * patches * layer.weight.numel(), 2 * patches * layer.weight.numel() * bool(weight)),
    )  # fmt: skip
    embeddings = w.module("vit.embeddings")
    x = tape.call("embeddings", [x], w.hidden, trains=_trains(embeddings.cls_token))
    x = w.dropout(tape.call("embeddings", [x], w.hidden, trains=_trains(embeddings.position_embeddings), passes=True), "embeddings")
    for i in range(a.layers):
        h = f"vit.layers.{i}"
        with tape.block(i):
            y = w.norm(x, f"{h}.layernorm_before")
            q, k, v = (w.linear(y, f"{h}.attention.{part}_proj") for part in "qkv")
            y = w.linear(tape.reuse(w.attend(q, k, v)), f"{h}.attention.o_proj")
            x = tape.add(w.dropout(y, h), x, h)
            y = w.activation(w.linear(w.norm(x, f"{h}.layernorm_after"), f"{h}.mlp.fc1"), f"{h}.mlp.act")
            x = tape.add(w.dropout(w.linear(y, f"{h}.mlp.fc2"), h), x, h)
    tape.cross_entropy(w.head(w.first_token(w.norm(x, "vit.layernorm")), "classifier"), w.element)


WRITERS = {"gpt2": _write_gpt2, "llama": _write_llama, "bert": _write_bert, "roberta": _write_bert, "vit": _write_vit}
