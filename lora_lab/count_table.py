"""What `lora-lab count` says: parameters, files, memory and FLOPs of a model, with full fine-tuning beside LoRA.

    table = count("gpt2-medium", r=4, target_modules=["c_attn:q,v"])      plain numbers, ready for JSON
    print(render(table))
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import nn

from .adapt import apply_lora, lora_layers
from .counting import ELEMENT, METHODS, count_modules, count_parameters, stored_bytes, tasks_bytes
from .layers import is_conv1d
from .ledger import RESERVE, largest, readable, training_flops, training_memory
from .presets import Architecture, from_config, gpu_bytes, gpus, meta_model, near, preset, presets
from .state import adapter_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def count(
    what: str | os.PathLike | Architecture,
    r: int = 8,
    target_modules: str | Iterable[str] = "all-linear",
    *,
    modules_to_save: Iterable[str] = (),
    numbers: dict | None = None,
    dtype: str = "fp32",
    quantize: str | None = None,
    batch: int = 8,
    context: int | None = None,
    optimizer: str = "adam",
    attention: str = "flash",
    checkpointing: bool = False,
    gpu: str | None = None,
    tasks: int = 100,
) -> dict:
    """Count a preset, an architecture or a folder with config.json.

    numbers: changes to the architecture (`Architecture.changed`). Other arguments as in `apply_lora` and `ledger.training_memory`, which
    is asked for a GPU. alpha plays no part: it changes no count. Raises ValueError, TypeError, FileNotFoundError.

    >>> table = count("gpt2-medium", r=4, target_modules=["c_attn:q,v"])
    >>> table["parameters"], table["lora"]["trainable"], table["methods"]["dora"]
    (354823168, 393216, 442368)
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}{near(dtype, DTYPES)}")
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1; found {tasks}")
    a, blueprint = _architecture(what, numbers)
    adapt = lambda model: apply_lora(model, r, 2 * r, target_modules, modules_to_save=modules_to_save, allow_tied=True)  # noqa: E731
    model = blueprint(DTYPES[dtype])
    plain = count_parameters(model)
    weight_bytes = sum(p.numel() for p in model.parameters()) * ELEMENT[dtype]
    adapt(model)
    lora = count_parameters(model)
    file = adapter_bytes(model)
    shared, separate = tasks_bytes(weight_bytes, file, tasks)
    table = {
        "model": str(what) if not isinstance(what, Architecture) else what.name or what.family,
        "source": a.source if a else "",
        "parameters": plain.total,
        "r": r,
        "target_modules": target_modules if isinstance(target_modules, str) else list(target_modules),
        "modules_to_save": list(modules_to_save),
        "dtype": dtype,
        "modules": [vars(row) | {"shape": list(row.shape)} for row in count_modules(model, together=True)],
        "lora": {
            "trainable": lora.trainable, "frozen": lora.frozen, "total": lora.total, "percent": 100 * lora.share,
            "layers": len(lora_layers(model)), "file_bytes": file,
        },
        "methods": _methods(model, r),
        "files": {"model_bytes": weight_bytes, "tasks": tasks, "adapters_bytes": shared, "models_bytes": separate},
    }  # fmt: skip
    if a is not None:
        table["training"] = _training(a, adapt, dtype, quantize, batch, context, optimizer, attention, checkpointing, gpu)
    return table


def _architecture(what, numbers):
    """(the architecture, or None where only transformers can build the model; a function dtype -> model without weights)."""
    if isinstance(what, Architecture):
        a = what
    elif str(what) in presets():
        a = preset(str(what))
    else:
        try:
            a = from_config(what)
        except (ValueError, FileNotFoundError):
            if numbers:
                raise
            meta_model(what)  # says what is wrong, if anything is
            return None, lambda dtype: meta_model(what, dtype)
    if numbers:
        a = a.changed(**numbers)
    return a, a.build


def _methods(model: nn.Module, r: int) -> dict[str, int]:
    """What other methods would train on the same matrices. Bias of layers without one: nothing."""
    counts = dict.fromkeys(METHODS, 0)
    for layer in lora_layers(model).values():
        inputs, out = _in_out(layer)
        parts = [(inputs, out)] if not hasattr(layer, "slices") else [(inputs, out // layer.of)] * len(layer.slices)
        for name, method in METHODS.items():
            if name != "bitfit" or layer.bias is not None:
                counts[name] += sum(method.count(i, o, layer.r) for i, o in parts)
    return counts


def _in_out(layer) -> tuple[int, int]:
    weight = layer.base_layer.weight
    out, inputs = weight.shape[0], weight[0].numel()
    return (out, inputs) if layer.stored_transposed or is_conv1d(layer.base_layer) else (inputs, out)


def _training(a, adapt, dtype, quantize, batch, context, optimizer, attention, checkpointing, gpu) -> dict:
    headless = a.family in ("bert", "roberta", "vit") and not a.labels
    if headless:
        a = a.changed(labels=2)
    if context is None:
        context = a.context if a.family == "vit" else min(512, a.context)
    if quantize is not None:
        stored_bytes(1, 1, quantize)  # refuses an unknown one
    how = {"optimizer": optimizer, "attention": attention, "checkpointing": checkpointing, "device": "cuda"}
    room = None if gpu is None else gpu_bytes(gpu)
    gpu = next((known for known in gpus() if gpu and known.lower() == gpu.lower()), None)
    rows = {}
    for name in ("full", "lora"):
        options = how | ({"quantize": quantize} if name == "lora" else {})
        model = a.build(DTYPES[dtype])
        if name == "lora":
            adapt(model)
        memory = training_memory(model, batch, context, **options)
        forward, backward = training_flops(model, batch, context, attention=attention, checkpointing=checkpointing)
        rows[name] = {key: getattr(memory, key) for key in ("weights", "gradients", "optimizer", "activations", "peak", "moment")}
        rows[name] |= {"flops_forward": forward, "flops_backward": backward}
        if gpu is not None:
            rows[name]["fits"] = {
                "reserve": RESERVE,
                "batch": largest("batch", model, gpu=room, context=context, **options),
                "context": context if a.family == "vit" else largest("context", model, gpu=room, batch=batch, **options),
            }
            if name == "lora":
                rows[name]["fits"]["r"] = largest("r", _at_rank(model), gpu=room, batch=batch, context=context, **options)
    return {"batch": batch, "context": context, **how, "quantize": quantize, "gpu": gpu, "given_a_head": headless, **rows}


def _at_rank(model: nn.Module):
    """r -> the model with factors of that rank; made anew each time, they would ask all rules for targets again."""

    def at(r: int) -> nn.Module:
        for layer in lora_layers(model).values():
            A, B = layer.lora_A, layer.lora_B
            layer.lora_A = nn.Parameter(A.new_empty(A.shape[0] // layer.r * r, A.shape[1]))
            layer.lora_B = nn.Parameter(B.new_empty(B.shape[0], r))
            layer.r = r
        return model

    return at


# ---- as text


def render(table: dict) -> str:
    """The table for people; bytes in powers of 1000."""
    lora, files = table["lora"], table["files"]
    targets = table["target_modules"] if isinstance(table["target_modules"], str) else " ".join(table["target_modules"])
    out = [f"{table['model']}: {table['parameters']:,} parameters" + (f"   ({table['source']})" if table["source"] else "")]
    out += [f"LoRA with r={table['r']} on {targets}: {lora['trainable']:,} of {lora['total']:,} train ({lora['percent']:.4g} %)", ""]
    rows = [
        [r["name"], r["kind"], "x".join(map(str, r["shape"])), f"{r['times']} x", f"{r['frozen']:,}", f"{r['trainable']:,}" if r["trainable"] else ""]
        for r in table["modules"]
    ]
    rows.append(["in all", "", "", "", f"{lora['frozen']:,}", f"{lora['trainable']:,}"])
    out += _columns(["module", "kind", "weight", "", "frozen", "trainable"], rows, left=2)
    out += ["", "the same matrices with another method"]
    out += _columns(["", "trainable", "a matrix", "source"], [
        [name, f"{n:,}", METHODS[name].formula, METHODS[name].source] for name, n in table["methods"].items()
    ], left=1, last_left=2)  # fmt: skip
    fused = any(":" in t for t in table["target_modules"]) if not isinstance(table["target_modules"], str) else False
    out += ["", f"files: model {readable(files['model_bytes'])} ({table['dtype']}), adapter {readable(lora['file_bytes'])} ({lora['file_bytes']:,} bytes)"]
    if fused:
        out += ["(slices are saved as one block with zero rows for the others, so that peft can read them)"]
    out += [
        f"{files['tasks']} tasks: one model and {files['tasks']} adapters {readable(files['adapters_bytes'])}, "
        f"{files['tasks']} models {readable(files['models_bytes'])}"
    ]
    if "training" in table:
        out += ["", *_training_lines(table["training"], table["dtype"])]
    else:
        out += ["", "memory and FLOPs of a step: this kind of model is not written down; known are those of lora_lab/presets.py"]
    return "\n".join(out)


def _training_lines(t: dict, dtype: str) -> list[str]:
    how = f"batch {t['batch']} x {t['context']} tokens, {t['optimizer']}, {dtype}, {t['attention']} attention"
    how += ", checkpointing" * t["checkpointing"] + (f", frozen layers in {t['quantize']} for LoRA" if t["quantize"] else "")
    names = ("weights", "gradients", "optimizer", "activations", "peak")
    rows = [[name, *(readable(t[kind][name]) for kind in ("full", "lora")), ""] for name in names]
    rows[-1][-1] = f"{t['full']['moment']}; {t['lora']['moment']}"
    step = [t[kind]["flops_forward"] + t[kind]["flops_backward"] for kind in ("full", "lora")]
    rows.append(["FLOPs", *(f"{n:.3g}" for n in step), f"LoRA {100 * step[1] / step[0]:.1f} %"])
    if t["gpu"]:
        for name, text in (("batch", f"largest batch on {t['gpu']}"), ("context", f"largest context on {t['gpu']}"), ("r", f"largest r on {t['gpu']}")):
            rows.append([text, *(f"{t[kind]['fits'].get(name, '')}" for kind in ("full", "lora")), ""])
    lines = ["a training step on a GPU, predicted: " + how, *_columns(["", "full", "LoRA", ""], rows, left=1, last_left=1)]
    if t["given_a_head"]:
        lines.append("(with a classification head of two labels, which this encoder needs for a loss)")
    if t["gpu"] and dtype == "bf16" and not gpus()[t["gpu"]]["bf16"]:
        lines.append(f"(a {t['gpu']} does not compute in bf16: use fp16, with a scaled loss, or fp32)")
    if t["gpu"]:
        lines.append(f"({readable(RESERVE)} set aside for the CUDA context and libraries; not measured on each GPU. 0: not even one fits)")
    return lines


def _columns(head: list[str], rows: list[list[str]], left: int, last_left: int = 0) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    aligned = [str.ljust if k < left or k >= len(head) - last_left else str.rjust for k in range(len(head))]
    return ["  ".join(align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)).rstrip() for row in (head, *rows)]
