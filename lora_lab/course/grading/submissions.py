"""Find what was handed in: nbgrader's tree, flat files with a name pattern, or a zip of either. Only bytes are read here.

A submission's student and lab come from its path, never from what the file says about itself. Links are not followed, names cannot
lead out of the folder, sizes are bounded before anything is unpacked.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..exercise import Lab

LARGEST = 64 << 20  # bytes of one notebook
LARGEST_ZIP = 4 << 30  # bytes of all notebooks in a zip, unpacked
ENTRIES = 200_000
PATTERN = "{student}_{lab}.ipynb"


@dataclass(frozen=True)
class Submission:
    """One student's notebook for one lab. `path`: where it was found, for people; `load()` gives its bytes (a ValueError says why not)."""

    student: str
    lab: str
    path: str
    load: Callable[[], bytes] = field(repr=False, compare=False)


class BadSubmissions(ValueError):
    """The folder or zip as a whole cannot be read; the message says what was asked, what was found, what to try."""


def find(where: str | os.PathLike, labs: dict[str, Lab], pattern: str | None = None) -> tuple[list[Submission], list[str]]:
    """(submissions in order of student and lab, what was left out and why).

    `<student>/<lab>/<any>.ipynb` (nbgrader) or files at one level named by `pattern`: {student} and {lab} stand for themselves, * for
    anything. A lab is known by its name (02_lora_layer), label (02) or number (2)."""
    where = Path(where)
    if where.is_dir():
        files = _walk(where)
    elif where.is_file() and zipfile.is_zipfile(where):
        files = _unzip(where)
    else:
        raise BadSubmissions(f"{where} is neither a folder nor a zip: give nbgrader's submitted/ folder, a folder of notebooks, or a zip of either")
    named = _pattern(pattern or PATTERN, labs)
    found: dict[tuple[str, str], list[Submission]] = {}
    left_out, others = [], 0
    for path, load in files:
        if isinstance(load, str):
            left_out.append(f"{path}: {load}")
            continue
        if path.suffix != ".ipynb" or any(part.startswith((".", "__MACOSX")) or part.endswith("-checkpoint.ipynb") for part in path.parts):
            others += 1
            continue
        who = _who(path, named, labs)
        if who is None:
            left_out.append(f"{path}: no student and lab can be read from this name")
        elif _bad_name(who[0]):
            left_out.append(f"{path}: {_bad_name(who[0])}")
        else:
            found.setdefault(who, []).append(Submission(*who, str(path), load))
    chosen = []
    for (_, lab), candidates in sorted(found.items()):
        # Of two notebooks for one lab the one under the lab's own name counts, else the last name in order.
        exact = [s for s in candidates if PurePosixPath(s.path).stem == labs[lab].name]
        chosen.append((exact or sorted(candidates, key=lambda s: s.path))[-1])
        left_out += [f"{s.path}: {chosen[-1].path} counts instead" for s in candidates if s is not chosen[-1]]
    if not chosen:
        example = " or ".join(f"ada/{lab.name}/{lab.name}.ipynb" for lab in list(labs.values())[:1])
        raise BadSubmissions(
            f"no notebook in {where} can be given to a student and a lab. Expected {example}, or names like {pattern or PATTERN} (--pattern); "
            + (f"found {left_out[0]}" if left_out else f"found {others} other files")
        )
    return chosen, left_out


def _who(path: PurePosixPath, named: list[re.Pattern], labs: dict[str, Lab]) -> tuple[str, str] | None:
    by_name = _names(labs)
    parts = path.parts
    if len(parts) >= 3:  # …/student/lab/notebook.ipynb; one folder above all students is common in zips
        lab = by_name.get(path.stem.lower()) or by_name.get(parts[-2].lower())
        if lab and parts[-2].lower() in by_name or lab and path.stem.lower() in by_name:
            return parts[-3], lab
    match = next((match for pattern in named if (match := pattern.fullmatch(path.name))), None)
    return (match["student"].strip(), by_name[match["lab"].lower()]) if match else None


def _names(labs: dict[str, Lab]) -> dict[str, str]:
    names = {}
    for number, lab in labs.items():
        names |= {lab.name.lower(): number, lab.label.lower(): number, number.lower(): number}
    return names


def _pattern(text: str, labs: dict[str, Lab]) -> list[re.Pattern]:
    """Full names before labels before numbers: in ada_1_2_02_lora_layer.ipynb the lab is none of 1 and 2."""
    if text.count("{student}") != 1 or text.count("{lab}") != 1:
        raise BadSubmissions(f"--pattern needs {{student}} and {{lab}} once each, as in {PATTERN!r}; found {text!r}")
    found = []
    for names in ([lab.name for lab in labs.values()], [lab.label for lab in labs.values()], list(labs)):
        which = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        pieces = {"{student}": "(?P<student>.+?)", "{lab}": f"(?<![^\\W_])(?P<lab>{which})(?![^\\W_])", "*": ".*?"}
        parts = [pieces.get(part, re.escape(part)) for part in re.split(r"(\{student\}|\{lab\}|\*)", text)]
        found.append(re.compile("".join(parts), re.IGNORECASE))
    return found


def _bad_name(student: str) -> str | None:
    if not student or len(student) > 100 or not student.isprintable() or student.startswith(".") or set(student) & set("/\\"):
        return f"{student[:40]!r} is no name for a student here"
    return None


# ---------------------------------------------------------------- where the bytes come from


def _walk(root: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes] | str]]:
    for folder, folders, names in os.walk(root, followlinks=False):
        for name in sorted(folders):
            if os.path.islink(os.path.join(folder, name)):
                yield PurePosixPath(Path(folder, name).relative_to(root)), "a link is not followed"
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            relative = PurePosixPath(path.relative_to(root))
            if name.endswith(".ipynb") and path.is_symlink():
                yield relative, "a link is not followed"
            else:
                yield relative, lambda path=path: _load(path)


def _load(path: Path) -> bytes:
    try:
        # Not blocked by a pipe that somebody left here, not led away by a link that was put in place a moment ago.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is not a plain file")
            if found.st_size > LARGEST:
                raise ValueError(f"it has {found.st_size >> 20} MB; {LARGEST >> 20} MB can be read")
            return file.read(LARGEST + 1)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None


def _unzip(archive: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes] | str]]:
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = opened.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BadSubmissions(f"{archive} is not a whole zip ({error})") from None
    if len(entries) > ENTRIES:
        raise BadSubmissions(f"{archive} has {len(entries)} entries; {ENTRIES} can be read")
    total = 0
    for entry in sorted(entries, key=lambda e: e.filename):
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if entry.is_dir() or path.suffix != ".ipynb":
            continue
        total += entry.file_size
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            yield PurePosixPath(path.name), f"its path in the zip leads elsewhere ({entry.filename[:80]!r})"
        elif stat.S_ISLNK(entry.external_attr >> 16):
            yield path, "a link is not followed"
        elif entry.file_size > LARGEST or total > LARGEST_ZIP:
            yield path, f"unpacked it would have {entry.file_size >> 20} MB, or all together too much"
        elif entry.flag_bits & 1:
            yield path, "it is encrypted"
        else:
            yield path, lambda entry=entry: _load_entry(archive, entry)


def _load_entry(archive: Path, entry: zipfile.ZipInfo) -> bytes:
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(entry) as file:
            data = file.read(LARGEST + 1)  # what the directory says about sizes may be a lie
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        raise ValueError(f"it cannot be unpacked ({error})") from None
    if len(data) > LARGEST:
        raise ValueError(f"unpacked it has more than {LARGEST >> 20} MB")
    return data
