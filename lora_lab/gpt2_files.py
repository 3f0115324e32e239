"""Where GPT-2's files come from: the pocket model that ships, the Hugging Face hub at pinned revisions, or a room's own folder.

Every file of the hub is compared with its sha256. A class behind one address shares one rate limit there, so a room can share one
folder instead: whoever prepares it calls, once,

    from lora_lab.gpt2 import fill_models_folder
    fill_models_folder("/srv/models", ["gpt2", "gpt2-medium"])

and every machine sets LORA_LAB_MODELS=/srv/models (a shared or copied folder), or LORA_LAB_MODELS=http://teacher:8000 after
`python -m http.server 8000` in that folder. It holds one folder a model, /srv/models/gpt2 and so on, each with config.json,
tokenizer.json, model.safetensors and SHA256SUMS.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .files import FetchError, cache_folder, fetch, shipped

FILES = ("config.json", "tokenizer.json", "model.safetensors")
SUMS = "SHA256SUMS"
NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # the second is a quota, which Windows has not
NO_WRITING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
# The tokenizer is one file, the same for all sizes.
_TOKENIZER = "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6"


@dataclass(frozen=True)
class Release:
    """A model on the hub: repository, commit, about how many bytes, and the sha256 of its files where it is known beforehand.

    A large file without one is compared with the sha256 that the hub itself states.
    """

    repository: str
    revision: str
    size: float
    sha256: dict[str, str]


def _release(name: str, revision: str, size: float, config: str | None, weights: str | None) -> Release:
    sums = {"config.json": config, "tokenizer.json": _TOKENIZER, "model.safetensors": weights}
    return Release(f"openai-community/{name}", revision, size, {file: known for file, known in sums.items() if known})


HUB = {
    "gpt2": _release(
        "gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", 0.55e9,
        "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": _release(
        "gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", 1.52e9,
        "ef1a44d889ad1a0acc7731c78134f1b87d2d222f110e97dd10fd4117331caf22",
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    ),
    "gpt2-large": _release("gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", 3.25e9, None, None),
    "gpt2-xl": _release(
        "gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2", 6.43e9,
        "be48115d52314bc27327e160bf10197760db02ea689d10adb24db4102edf7a8a",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}  # fmt: skip


def gpt2_folder(name: str | os.PathLike) -> Path:
    """The folder with the files of a model (names as in `load_gpt2`), downloaded and checked if need be."""
    text = os.fspath(name)
    short = text.removeprefix("openai-community/") if isinstance(name, str) else ""  # a Path is a folder, whatever it is called
    if short == "pocket":
        folder = shipped("pocket-gpt2")
        if not (folder / "config.json").exists():
            raise ValueError(f"the pocket model is not in {folder}: this copy of the lab is incomplete; install it again")
    elif short in HUB:
        room = os.environ.get("LORA_LAB_MODELS")
        folder = _from_room(short, room) if room else _from_hub(short)
    else:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            names = ["pocket", *HUB]
            near = difflib.get_close_matches(text.lower(), names, n=2, cutoff=0.4)
            raise ValueError(
                f"no model and no folder is called {text!r}. "
                + (f"Did you mean {' or '.join(map(repr, near))}? " if near else "")
                + f"There are {', '.join(map(repr, names))}, or the path of a folder with {', '.join(FILES)}"
            )
    _check_files(folder)
    return folder


def fill_models_folder(folder: str | os.PathLike, names: Iterable[str] = ("gpt2",)) -> list[Path]:
    """Put models of the hub into one folder that a room can share (how: the top of this module). Returns the models' folders.

    A model that is there and whole is left alone. Raises ValueError for a name that is not on the hub, FetchError.
    """
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in HUB]
    if unknown:
        raise ValueError(f"asked for {', '.join(map(repr, unknown))}; those on the hub are {', '.join(map(repr, HUB))}")
    made = []
    for name in names:
        target = Path(folder).expanduser() / name
        if not _whole(target):
            source = _from_hub(name)
            _check_files(source)
            copy_model(source, target)
        made.append(target)
    return made


def copy_model(source: Path, target: Path) -> None:
    """A copy of a model's folder, with the list of its checksums. It is written beside its place and moved there in one step. Raises FetchError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            new = Path(temporary) / target.name
            new.mkdir()
            for file in FILES:
                shutil.copyfile(source / file, new / file)
            (new / SUMS).write_text("".join(f"{_sha256(new / file)}  {file}\n" for file in FILES), encoding="ascii")
            if target.exists():  # something broken
                target.rename(Path(temporary) / "old")
            new.rename(target)
    except OSError as error:
        raise FetchError(_disk_trouble(error, target.parent)) from error


def _whole(folder: Path) -> bool:
    try:
        _check_files(folder)
    except ValueError:
        return False
    return (folder / SUMS).exists()


def _from_room(name: str, room: str) -> Path:
    if room.startswith(("http://", "https://")):
        return _from_address(name, room.rstrip("/"))
    folder = Path(room).expanduser() / name
    if not folder.is_dir():
        there = sorted(p.parent.name for p in Path(room).expanduser().glob("*/config.json"))
        raise ValueError(
            f"asked for {name!r}, but LORA_LAB_MODELS={room} holds {', '.join(there) or 'no model'}. "
            f"Whoever keeps that folder can add it: fill_models_folder({room!r}, [{name!r}]); without LORA_LAB_MODELS the hub is asked"
        )
    return folder


def _from_address(name: str, address: str) -> Path:
    """A room's folder behind http: its sums are asked for each time (they are small), a file only if the copy here is another."""
    import requests

    url = f"{address}/{name}/{SUMS}"
    try:
        answer = requests.get(url, timeout=30)
        answer.raise_for_status()
        sums = _parse_sums(answer.text, url)
    except requests.RequestException as error:
        raise FetchError(
            f"could not read {url} ({type(error).__name__}). LORA_LAB_MODELS={address} should be a folder that "
            "fill_models_folder made, served over http; without LORA_LAB_MODELS the hub is asked"
        ) from error
    folder = cache_folder() / "room" / re.sub(r"\W+", "-", address) / name
    for file in FILES:
        fetch(f"{address}/{name}/{file}", sums[file], folder)
    return folder


def _from_hub(name: str) -> Path:
    """The files in the hub's own cache, each with the right sha256; downloaded where they are not."""
    need("huggingface_hub")
    release = HUB[name]
    cache = str(cache_folder() / "huggingface") if os.environ.get("LORA_LAB_CACHE") else None
    path = None
    for file in FILES:
        path = _hub_file(release, file, cache)
        if not _right(path, release.sha256.get(file)):
            path = _hub_file(release, file, cache, again=True)
            if not _right(path, release.sha256.get(file)):
                for copy in {path.resolve(), path}:
                    copy.unlink(missing_ok=True)
                raise FetchError(
                    f"{file} of {release.repository} does not have the expected sha256, twice, and was thrown away: a broken download, "
                    "or something between here and the hub that changes files. Try another network, or copy the model: " + _by_hand(name)
                )
    return path.parent


def _right(path: Path, known: str | None) -> bool:
    # Where the cache is made of links, a large file's name is the sha256 that the hub states.
    stated = path.resolve().name
    known = known or (stated if re.fullmatch(r"[0-9a-f]{64}", stated) else None)
    return known is None or _sha256(path) == known


def _hub_file(release: Release, file: str, cache: str | None, again: bool = False) -> Path:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    name = release.repository.rpartition("/")[2]
    where = Path(cache or constants.HF_HUB_CACHE)
    options = {"revision": release.revision, "cache_dir": cache}
    if again or not isinstance(try_to_load_from_cache(release.repository, file, **options), str):
        free = _free_bytes(where)
        needed = release.size if file == "model.safetensors" else 2e6
        if free is not None and free < needed:
            raise FetchError(
                f"{release.repository} needs {needed / 1e9:.2f} GB in {where}, where {free / 1e9:.2f} GB are free. "
                "Free some space, or set LORA_LAB_CACHE to a folder on a larger disk"
            )
    try:
        # Retries with growing pauses, and the pauses that a 429 asks for, are the client's own.
        found = hf_hub_download(
            release.repository, file, **options, endpoint=os.environ.get("HF_ENDPOINT"), force_download=again
        )
        return Path(found)
    except Exception as error:  # the client raises a dozen kinds, some of them for the same cause
        raise FetchError(_explain(error, name, where)) from error


def _explain(error: BaseException, name: str, where: Path) -> str:
    """What went wrong at the hub, in words that say what to do: the cause is often two exceptions deep."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), None)
    kinds = {type(e).__name__ for e in chain}
    # A firewall refuses a connection with the same number as a folder refuses a file.
    disk = next((e for e in chain if isinstance(e, OSError) and e.errno in NO_SPACE | NO_WRITING and "ConnectError" not in kinds), None)
    if status == 429:
        return (
            f"the hub answered 429 for {name}: too many downloads from this address. It is no fault of this machine or its connection: "
            f"a class behind one address shares one limit. Wait some minutes, or use a copy: {_by_hand(name)}"
        )
    if status in (401, 403, 404):
        return (
            f"the hub answered {status} for {name}, at the revision this lab pins. If HF_ENDPOINT is set, that mirror may lack it. "
            f"Otherwise use a copy: {_by_hand(name)}"
        )
    if status is not None and status >= 500:
        return f"the hub answered {status} for {name}: trouble on its side. Try again later, or use a copy: {_by_hand(name)}"
    if disk is not None:
        return _disk_trouble(disk, where)
    if "FileMetadataError" in kinds:
        return (
            f"what answered for {name} is not the hub: a network's login page, a proxy, or a wrong HF_ENDPOINT. "
            f"Open a web page to log in, or use a copy: {_by_hand(name)}"
        )
    if "OfflineModeIsEnabled" in kinds:
        return f"{name} is not in the cache {where}, and HF_HUB_OFFLINE forbids to download it. Unset that, or use a copy: {_by_hand(name)}"
    return f"could not reach the hub for {name} ({type(chain[-1]).__name__}: {chain[-1]}). Without a network: {_by_hand(name)}"


def _by_hand(name: str) -> str:
    return (
        f"on a machine that has it or has a network, fill_models_folder('models', ['{name}']) from lora_lab.gpt2; bring that folder here "
        "and set LORA_LAB_MODELS to it. load_gpt2('pocket') needs no network"
    )


def _disk_trouble(error: OSError, where: Path) -> str:
    reason = error.strerror or str(error)
    if error.errno in NO_SPACE:
        return f"no space left in {where} ({reason}). Free some, or set LORA_LAB_CACHE to a folder on a larger disk"
    return f"cannot write in {where} ({reason}). Set LORA_LAB_CACHE to a folder that can be written"


def _free_bytes(folder: Path) -> int | None:
    for place in (folder, *folder.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def _check_files(folder: Path) -> None:
    """All files are there and, where the folder has sums, have them."""
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}; a model's folder holds {', '.join(FILES)}, as save_pretrained writes them "
            "for the model and its tokenizer"
        )
    if (folder / SUMS).exists():
        sums = _parse_sums((folder / SUMS).read_text(encoding="utf-8", errors="replace"), folder / SUMS)
        for file in FILES:
            if _sha256(folder / file) != sums[file]:
                raise ValueError(
                    f"{folder / file} does not have the sha256 in {SUMS}: it was copied in part, or changed. "
                    "Copy it again, or have fill_models_folder make the folder anew"
                )


def _parse_sums(text: str, where) -> dict[str, str]:
    sums = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})[ *]+(\S+)$", text, re.MULTILINE)}
    if not set(FILES) <= set(sums):
        raise ValueError(f"{where} does not list {', '.join(FILES)} with their sha256; have fill_models_folder make the folder anew")
    return sums


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ImportError(f'GPT-2 needs {package}, which is not installed: pip install "lora-lab[lab]", or `python start.py`')
