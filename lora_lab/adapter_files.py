"""The two files of an adapter, as bytes: written so that they can't mix, read so that damage is noticed. Knows no model.

Our tensors file also carries, in its header, a copy of the config, the slices of fused layers, and a sha256 of the whole file. So it is
an adapter by itself, a config that does not belong to it is noticed, and so is every changed byte. A file made elsewhere has
no such record: there, a changed number that is still a finite number can't be noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .files import atomic_write

TENSORS, PICKLED, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
ASIDE = f".{CONFIG}.before"  # where the old config stands for the moment in which the tensors file changes
RECORD, DIGEST = "lora_lab", "lora_lab_sha256"
FACTOR = re.compile(r"(.*?)\.?lora_(embedding_)?([AB])(\.weight)?")

# Config fields that don't decide what an adapter computes, once the tensors are there.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
UNSET = (None, False, {}, [], "")


class AdapterError(ValueError):
    """An adapter can't be written, read or put into this model; the message says what was found. Nothing was changed."""


class AdapterNotFound(AdapterError, FileNotFoundError):
    """There is no adapter at this path."""


def file_metadata(config: dict, fused: dict) -> dict[str, str]:
    """What the tensors file's header says beside names and shapes; the sha256 is filled in last."""
    return {"format": "pt", RECORD: json.dumps({"version": 1, "config": config, "fused": fused}), DIGEST: "0" * 64}


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: dict, fused: dict) -> int:
    """Write both files so that a kill at any moment leaves the old pair or the new one; returns the bytes of the tensors file.

    Raises AdapterError if what is read back differs from `tensors`; OSError. Both leave the old pair as it was.
    """
    from safetensors.torch import save

    data = save(tensors, file_metadata(config, fused))
    at = _digest_place(data)
    data = data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + 64 :]

    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    target, beside, aside = folder / TENSORS, folder / CONFIG, folder / ASIDE
    _sweep(folder)
    with atomic_write(beside) as new_config:
        new_config.write_text(text, encoding="utf-8")
        moved = False
        try:
            with atomic_write(target) as new_tensors:
                new_tensors.write_bytes(data)
                back = read_file(new_tensors, tensors_only=True).tensors
                if back.keys() != tensors.keys() or not all(torch.equal(back[k], t) for k, t in tensors.items()):
                    raise AdapterError(f"what was read back from {folder} is not what was written; is the disk in order?")
                with open(new_tensors, "rb+") as file:
                    os.fsync(file.fileno())  # the long part; what follows takes microseconds
                if beside.exists() and (not target.exists() or beside.read_bytes() != text.encode()):
                    os.replace(beside, aside)
                    moved = True
        except OSError:
            if moved:
                os.replace(aside, beside)
            raise
    aside.unlink(missing_ok=True)
    return len(data)


@dataclass
class Content:
    """What stands in an adapter's files."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict | None = None
    fused: dict = field(default_factory=dict)
    ours: bool = False


def read_adapter(path: Path) -> Content:
    if not path.exists():
        raise AdapterNotFound(f"there is no file or folder {path}. Names on a hub are not downloaded here: fetch the adapter first")
    if path.is_dir():
        file = next((path / name for name in (TENSORS, PICKLED) if (path / name).exists()), None)
        if file is None:
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise AdapterNotFound(f"{path} holds no adapter: neither {TENSORS} nor {PICKLED}, but {found}")
    else:
        file = path
    content = read_file(file)
    beside = file.parent / CONFIG
    if path.is_dir() or file.name in (TENSORS, PICKLED):
        if not beside.exists() and not content.ours:
            beside = file.parent / ASIDE  # a save was killed at the very moment of the change; these two belong together
        if beside.exists():
            _pair(content, beside)
    return content


def _pair(content: Content, path: Path) -> None:
    """Take the config beside a tensors file, or compare it with the one inside."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise AdapterError(f"{path} is no JSON text ({short(error)}). " + (_CURE if content.ours else "")) from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} should hold a JSON object; found {type(config).__name__}")
    if not content.ours:
        content.config = config
        return
    here, inside = ({k: v for k, v in c.items() if k not in HARMLESS and v not in UNSET} for c in (config, content.config))
    if here != inside:
        differing = sorted(k for k in here | inside if here.get(k) != inside.get(k))
        lines = "".join(f"\n  {k}: {here.get(k)!r} in {path.name}, {inside.get(k)!r} in the tensors file" for k in differing)
        raise AdapterError(f"{path} does not belong to {content.path.name} beside it; one of them was exchanged or edited:{lines}\n{_CURE}")


_CURE = f"The tensors file has a whole copy of its own config: delete {CONFIG} to use it"


def read_file(path: Path, tensors_only: bool = False) -> Content:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise AdapterError(f"{path} can't be read: {short(error)}") from error
    if size == 0:
        raise AdapterError(f"{path} is empty")
    # safetensors begins with the length of a JSON header, then the header; a .part file is one that is being checked.
    if path.suffix in (".safetensors", ".part") or start[8:9] == b"{":
        return _read_safetensors(path, tensors_only)
    return Content(path, _read_pickled(path))


def _read_safetensors(path: Path, tensors_only: bool) -> Content:
    from safetensors import safe_open
    from safetensors.torch import load

    try:
        with safe_open(path, framework="pt") as file:
            keys, header = list(file.keys()), file.metadata() or {}
    except Exception as error:
        raise AdapterError(f"{path} is no whole safetensors file: {short(error)}. Truncated, or a failed download?") from error
    if not tensors_only:
        refuse_foreign(path, keys)  # before a whole model is read into memory
    try:
        data = path.read_bytes()
        tensors = load(data)
    except Exception as error:
        raise AdapterError(f"{path} can't be read: {short(error)}") from error
    content = Content(path, tensors)
    if RECORD in header or DIGEST in header:
        at = _digest_place(data)
        if hashlib.sha256(data[:at] + b"0" * 64 + data[at + 64 :]).hexdigest().encode() != data[at : at + 64]:
            raise AdapterError(f"{path} was damaged after it was saved: its sha256 does not agree with its content. Use another copy")
        record = json.loads(header[RECORD])
        if record["version"] != 1:
            raise AdapterError(f"{path} was written by a newer lora_lab (record version {record['version']}); update this one")
        content.config, content.fused, content.ours = record["config"], record["fused"], True
    return content


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        # torch.load's advice, to load without weights_only, is the one thing not to do with a stranger's file.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterError(
            f"{path} is neither a whole safetensors file nor a whole file of torch.save with nothing but tensors ({type(error).__name__}); "
            "anything else in a pickle could run code and is not loaded"
        ) from error
    if not isinstance(tensors, Mapping):
        raise AdapterError(f"{path} should hold a dict of tensors; found {type(tensors).__name__}")
    odd = [k for k, t in tensors.items() if not isinstance(k, str) or not isinstance(t, Tensor)]
    if odd:
        raise AdapterError(f"{path} should hold a dict of tensors by name; found {some(map(repr, odd))}. Save the adapter's state dict alone")
    refuse_foreign(path, tensors)
    return dict(tensors)


def refuse_foreign(path: Path, keys: Iterable[str]) -> None:
    keys = list(keys)
    if not any(FACTOR.fullmatch(key) for key in keys):
        raise AdapterError(f"{path} holds no LoRA factor among its {len(keys)} tensors ({some(keys) or 'none at all'}). Is it the adapter?")


def refuse_unusable(tensors: Mapping[str, Tensor], what: str) -> None:
    """Empty, not floating where it must be, NaN: nothing that a model should compute with."""
    empty = [k for k, t in tensors.items() if t.numel() == 0]
    if empty:
        raise AdapterError(f"{what}: empty tensors {some(empty)}. Sharded training leaves such if the shards are not gathered before saving")
    wrong = [f"{k} ({t.dtype})" for k, t in tensors.items() if FACTOR.fullmatch(k) and t.dtype not in FLOATS]
    if wrong:
        raise AdapterError(f"{what}: factors are floating-point numbers; found {some(wrong)}")
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t.to(torch.promote_types(t.dtype, torch.float16))).all()]
    if bad:
        raise AdapterError(f"{what}: NaN or infinite numbers in {some(bad)} ({len(bad)} of {len(tensors)} tensors)")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _digest_place(data: bytes) -> int:
    """Where the 64 digits of the sha256 stand. Inside JSON strings quotes are escaped, so this can't be found in one."""
    mark = f'"{DIGEST}":"'.encode()
    at = data.find(mark)
    if at < 0 or at + len(mark) + 64 > len(data):
        raise AdapterError("the record in the file's header is damaged: its sha256 is missing. Use another copy")
    return at + len(mark)


def _sweep(folder: Path) -> None:
    """Remove what saves that were killed left behind, unless it is so young that another process may be writing it."""
    for name in (TENSORS, CONFIG):
        for left in folder.glob(f".{name}.*.part"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()


def some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
