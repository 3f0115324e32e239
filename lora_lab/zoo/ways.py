"""LoRA's rivals as ways of `lora_lab.comparing`: what trains, and what file is left behind.

    ways = [FROZEN, BITFIT, adapters(16, ["attn.c_proj", "mlp.c_proj"]), prompts(8), prefixes(8), LORA, FULL]
    first = finetune_and_compare(task, ways)

Ways that begin where another one ended take its finished models, {seed: model}:

    done = {seed: first.models["full fine-tuning", seed] for seed in seeds}
    finetune_and_compare(with_teachers(task), [rounded(done, "int8"), pruned(done, 0.5), student(done, "transformer.h", 3)])
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..adapt import find_targets
from ..comparing import LORA, Task, Way
from .quantised import QuantisedLinear, quantise, quantise_below_lora
from .rivals import TrainedContext, add_adapters, add_tokens, bitfit, last_layers
from .smaller import distils, fewer_blocks, prune, sparse_bytes


def _with_head(model: nn.Module, task: Task) -> nn.Module:
    for name in task.head:
        model.get_submodule(name).requires_grad_(True)
    return model


def last(names: Sequence[str], name: str = "last layers") -> Way:
    """Train these modules and the task's head, in full."""
    return Way(name, lambda model, task, seed: last_layers(model, [*names, *task.head]))


BITFIT = Way("BitFit", lambda model, task, seed: _with_head(bitfit(model), task))


def adapters(width: int, behind: str | Sequence[str], name: str = "adapters") -> Way:
    """Bottleneck adapters behind these linear layers."""

    def prepare(model, task, seed):
        # The random state is the seed's: finetune_and_compare sets it before each way.
        return _with_head(add_adapters(model, width, behind), task)

    return Way(name, prepare)


def _context(n: int, deep: bool, name: str, blocks: str | None, d: int | None) -> Way:
    def prepare(model, task, seed):
        if blocks is None:
            return TrainedContext(model, n, deep, seed)
        return _with_head(add_tokens(model, n, blocks, d, deep, seed), task)

    return Way(name, prepare)


def prompts(n: int, blocks: str | None = None, d: int | None = None, name: str = "prompt tuning") -> Way:
    """n trained tokens in front of the input: of a GPT-2, or of an encoder whose blocks and width are given."""
    return _context(n, False, name, blocks, d)


def prefixes(n: int, blocks: str | None = None, d: int | None = None, name: str = "prefix tuning") -> Way:
    """n trained tokens in front of every block's input."""
    return _context(n, True, name, blocks, d)


def lora_on(kind: str, name: str | None = None) -> Way:
    """LoRA, with the base below it rounded to "int8", "int4" or "nf4". The file is LoRA's."""
    return Way(name or f"LoRA on {kind}", lambda model, task, seed: quantise_below_lora(LORA.prepare(model, task, seed), kind), LORA.stored, lr="LoRA")


# ---- what begins where another way ended


def rounded(done: Mapping[int, nn.Module], kind: str, name: str | None = None) -> Way:
    """Post-training quantisation: a finished model with its linear layers in few bits. The file is the whole model."""
    return Way(name or f"rounded to {kind}", lambda model, task, seed: quantise(copy.deepcopy(done[seed]), kind), model_bytes)


def pruned(done: Mapping[int, nn.Module], share: float, name: str | None = None) -> Way:
    """Magnitude pruning of a finished model, nothing trained afterwards. The file is the whole model, zeros stored as bits."""

    def prepare(model, task, seed):
        return prune(copy.deepcopy(done[seed]), share).requires_grad_(False)

    def stored(model):
        saved = sum(m.weight.numel() * m.weight.element_size() - sparse_bytes(m.weight) for m in find_targets(model, "all-linear").values())
        return model_bytes(model) - saved

    return Way(name or f"pruned, {share:.0%} zeros", prepare, stored)


def student(done: Mapping[int, nn.Module], blocks: str, keep: int, name: str | None = None) -> Way:
    """Distillation: a finished model teaches a copy of itself with fewer blocks. The file is the whole student. Its task comes from `with_teachers`."""

    def prepare(model, task, seed):
        small = fewer_blocks(done[seed], blocks, keep).requires_grad_(True)
        small.teacher = (done[seed],)  # in a tuple, or it would become a part of the student
        return small

    return Way(name or f"distilled, {keep} block" + "s" * (keep > 1), prepare, model_bytes)


def with_teachers(task: Task, temperature: float = 2.0, share: float = 0.5) -> Task:
    """The task, with a loss that asks a model's teacher too, if it has one."""

    def loss(model, batch):
        teacher = getattr(model, "teacher", None)
        return task.loss(model, batch) if teacher is None else distils(teacher[0], task.loss, temperature, share)(model, batch)

    return replace(task, loss=loss)


def model_bytes(model: nn.Module) -> int:
    """The size of a .safetensors file with the whole model, codes and scales of quantised layers among it; a tied tensor is stored once."""
    from safetensors.torch import save

    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.named_buffers(recurse=False)}
    return len(save(tensors))
