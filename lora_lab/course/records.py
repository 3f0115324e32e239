"""The record of what was checked, hinted and predicted: one JSON object per line, appended, never rewritten.

    {"version": 1, "id": "9f…", "time": "2026-01-31T12:00:00Z", "kind": "check", "exercise": "2.1", "passed": false, …}

It holds no code, no name and no path. The same object goes into the cell's output in the notebook, so that progress
also comes with the notebook file; `read_notebook` takes it from there, and `merge` drops what is there twice.

Where: the file LORA_LAB_RECORDS names; else .lora-lab/records.jsonl in the notebook's folder; if that cannot be
written, in the user's home, then in a temporary folder, then in memory alone. A damaged file is set aside.
Nothing in this file raises because of a disk: a lab goes on without its record.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..files import atomic_write

VERSION = 1
MIME = "application/vnd.lora-lab.record+json"
_START = Path.cwd()       # a notebook's kernel starts in the notebook's folder; a student may change directory later


class Records:
    """An append-only list of records. `notice(text)` is called, once per cause, when something is wrong with the file."""

    def __init__(self, paths: Iterable[Path] | None = None, notice=print):
        self.paths = list(default_paths() if paths is None else paths)
        self._said: set[str] = set()
        self._tell = notice
        self.kept: list[dict] = []         # this session's, in case no file takes them
        self.path = self.paths[0] if self.paths else None
        self._found_writable = False

    def add(self, kind: str, **fields) -> dict:
        """Append a record and return it."""
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        record = {"version": VERSION, "id": uuid.uuid4().hex[:16], "time": stamp, "kind": kind, **fields}
        self.kept.append(record)
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        while self.path is not None and not self._append(line):
            failed, rest = self.path, self.paths[self.paths.index(self.path) + 1 :]
            self.path = rest[0] if rest else None
            if self._found_writable or not rest:
                self.notice(f"Your progress cannot be written to {failed} (is the disk full or the folder read-only?). "
                            + (f"From here on it goes to {self.path}." if self.path else
                               "It stays in this notebook: save the notebook."))
            elif failed == self.paths[0]:
                self.notice(f"Your progress cannot be written to {failed}. It goes to {self.path} instead.")
        return record

    def read(self) -> list[dict]:
        """All records of the file and of this session, oldest first."""
        found = [] if self.path is None else self._read_file(self.path)
        return merge(found, self.kept)

    def notice(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._tell(text)

    def _append(self, line: bytes) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write of one line with O_APPEND: two notebooks that write at once do not tear each other's lines.
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                if os.lseek(handle, 0, os.SEEK_END) > 0:
                    os.lseek(handle, -1, os.SEEK_END)
                    if os.read(handle, 1) != b"\n":            # a line broken off earlier must not swallow this one
                        line = b"\n" + line
                written = os.write(handle, line)
            finally:
                os.close(handle)
        except OSError:
            return False
        self._found_writable = self._found_writable or written == len(line)
        return written == len(line)

    def _read_file(self, path: Path) -> list[dict]:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            self.notice(f"The record of your progress, {path}, cannot be read ({error.strerror}).")
            return []
        good, damaged = parse_lines(content.splitlines(keepends=True))
        if damaged:
            self._set_aside(path, good, damaged)
        return good

    def _set_aside(self, path: Path, good: list[dict], damaged: int) -> None:
        aside = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}")
        try:
            os.replace(path, aside)
            with atomic_write(path) as temporary:
                temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in good), encoding="utf-8")
        except OSError:
            aside = None
        self.notice(f"The record of your progress was damaged: {damaged} line{'s' if damaged > 1 else ''} could not be "
                    f"read, {len(good)} could and count as before."
                    + (f" The damaged file was set aside as {aside.name}." if aside else ""))


def default_paths() -> list[Path]:
    """Places to try, best first; LORA_LAB_RECORDS (a file, or a folder that exists) goes before the others."""
    rest = [Path(tempfile.gettempdir()) / ".lora-lab" / "records.jsonl"]
    try:
        rest.insert(0, Path.home() / ".lora-lab" / "records.jsonl")
    except RuntimeError:                   # no home folder
        pass
    override = os.environ.get("LORA_LAB_RECORDS")
    if override:
        path = Path(override).expanduser()
        return [path / "records.jsonl" if path.is_dir() else path, *rest]
    notebook = open_notebook()
    folder = notebook.parent if notebook else _START
    return [folder / ".lora-lab" / "records.jsonl", *rest]


def open_notebook() -> Path | None:
    """The file of the notebook that this kernel belongs to, where the server says so."""
    name = os.environ.get("JPY_SESSION_NAME", "")
    path = Path(name.removeprefix("RTC:"))
    try:
        return path if path.suffix == ".ipynb" and path.is_file() else None
    except OSError:
        return None


def read_notebook(path: Path | str) -> list[dict]:
    """The records in the outputs of a notebook file. Raises ValueError if it is no notebook, OSError if unreadable."""
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        data = [output.get("data", {}).get(MIME) for output in outputs]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a notebook (.ipynb), found {path}, which is not one: {error}") from error
    return [record for record in data if _is_record(record)]


def parse_lines(lines: Iterable[bytes]) -> tuple[list[dict], int]:
    """(the records of a file, how many of its lines are none); empty lines are neither."""
    good, damaged = [], 0
    for line in lines:
        record = _parse(line)
        if record is not None:
            good.append(record)
        elif line.strip():
            damaged += 1
    return good, damaged


def merge(*groups: Iterable[dict]) -> list[dict]:
    """One list without duplicates, oldest first."""
    by_id = {record["id"]: record for group in groups for record in group}
    return sorted(by_id.values(), key=lambda record: record["time"])


@dataclass(frozen=True)
class Calibration:
    """How sure somebody was, and how often it came true. answers: (sure, right) pairs; sure from 0 to 1."""

    answers: tuple[tuple[float, bool], ...]

    @property
    def count(self) -> int:
        return len(self.answers)

    @property
    def right(self) -> int:
        return sum(right for _, right in self.answers)

    @property
    def mean_sure(self) -> float:
        """What share one should expect to come true; NaN without answers."""
        return sum(sure for sure, _ in self.answers) / self.count if self.answers else math.nan

    @property
    def brier(self) -> float:
        """Mean of (sure - 1 or 0)²: 0 is perfect, 0.25 is what saying 50 % every time gives, 1 is certain and always wrong."""
        return sum((sure - right) ** 2 for sure, right in self.answers) / self.count if self.answers else math.nan

    def chance_of(self, fewest: int, most: int) -> float:
        """How probable `fewest` to `most` right answers are if every stated confidence is true (answers taken as independent)."""
        chances = [1.0]  # chances[k]: k right so far
        for sure, _ in self.answers:
            chances = [a * (1 - sure) + b * sure for a, b in zip([*chances, 0.0], [0.0, *chances], strict=True)]
        return math.fsum(chances[fewest : most + 1])

    @property
    def verdict(self) -> str:
        """"over" or "under" confident where the confidences, taken at their word, make so few or so many right answers less probable
        than 5 %; else "unclear": a handful of answers seldom tells."""
        if self.answers and self.chance_of(0, self.right) < 0.05:
            return "over"
        if self.answers and self.chance_of(self.right, self.count) < 0.05:
            return "under"
        return "unclear"

    def parts(self) -> list[tuple[str, Calibration]]:
        """(what was said, the answers that said it), without empty ones."""
        bounds = (("under 60 %", 0.0, 0.6), ("60 to 79 %", 0.6, 0.8), ("80 to 94 %", 0.8, 0.95), ("95 % and more", 0.95, math.inf))
        found = [(name, Calibration(tuple(answer for answer in self.answers if low <= answer[0] < high))) for name, low, high in bounds]
        return [(name, part) for name, part in found if part.count]

    def groups(self) -> list[tuple[str, int, int]]:
        """(what was said, how many answers, how many of them right), without empty groups."""
        return [(name, part.count, part.right) for name, part in self.parts()]

    def ordinary(self) -> tuple[int, int]:
        """The fewest and the most right answers that are ordinary if every confidence is true: outside lie at most 5 % on each side."""
        fewest = next(k for k in range(self.count + 1) if self.chance_of(0, k) > 0.05)
        most = next(k for k in range(self.count, -1, -1) if self.chance_of(k, self.count) > 0.05)
        return fewest, most


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if line.endswith(b"\n") and _is_record(record) else None


def _is_record(record) -> bool:
    """Fields of a later version are kept, whatever they are; kinds that are not known are ignored by who counts."""
    return isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("id", "time", "kind"))
