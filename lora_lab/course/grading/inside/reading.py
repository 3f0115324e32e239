"""A notebook's bytes -> what grading needs of it: code cells, records, free answers. Nothing in it is trusted or executed.

A whole file goes through here inside the jail, because JSON of a few megabytes can unfold to a gigabyte, and because Python's own
parser is not made for sources that mean harm.
"""

from __future__ import annotations

import json
import re

from . import slices

RECORD = "application/vnd.lora-lab.record+json"
CELLS = 2000
CELL_TEXT = 1_000_000  # characters of one cell
RECORDS = 5000
RECORD_TEXT = 2000  # characters of one record
FREE_TEXT = 20_000
KINDS = {"check", "hint", "use", "predict", "reveal", "progress", "calibration"}


class Unreadable(ValueError):
    """This file cannot be graded; the message says why, in words for its author."""


def read(data: bytes, exercises: dict[str, str], skip=(), at=lambda number: None) -> dict:
    """{"cells": n, "sources": {number: Python}, "plan": see slices.plan, "notes": [...], "records": [...], "free": [...]}

    exercises: id -> name of the student's object. Raises Unreadable."""
    cells = _cells(_json(data))
    code = [_text(cell) for cell in cells if cell.get("cell_type") == "code"]
    parsed = slices.parse([text[:CELL_TEXT] for text in code], skip, at=at)
    plan = slices.plan(parsed, exercises)
    needed = {cell for candidates in plan.values() for candidate in candidates for cell, _ in candidate["take"]}
    where = [number for number, cell in enumerate(cells, start=1) if cell.get("cell_type") == "code"]
    return {
        "cells": len(cells),
        "sources": {str(number): parsed.sources[number] for number in sorted(needed)},
        "where": where,
        "plan": plan,
        "broken": [[where[number], why] for number, why in sorted(parsed.broken.items())],
        "records": _records(cells),
        "free": _free(cells),
    }


def _json(data: bytes):
    if not data.strip():
        raise Unreadable("the file is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("the file is not text: perhaps another file under this name, or a broken upload") from None
    try:
        found = json.loads(text)
    except RecursionError:
        raise Unreadable("the file is nested too deeply to be a notebook") from None
    except ValueError as error:
        whole = text.rstrip().endswith("}")
        raise Unreadable(f"the file is not a whole notebook (JSON: {error})" + ("" if whole else ": it ends early")) from None
    if not isinstance(found, dict):
        raise Unreadable("the file is JSON, but not a notebook")
    return found


def _cells(notebook: dict) -> list[dict]:
    version = notebook.get("nbformat", 4)
    if version == 3:
        sheets = notebook.get("worksheets")
        cells = [cell for sheet in sheets if isinstance(sheet, dict) for cell in sheet.get("cells", ())] if isinstance(sheets, list) else None
    elif version == 4:
        cells = notebook.get("cells")
    else:
        raise Unreadable(f"notebook format {version!r} is not known here: save it as version 4 (any JupyterLab does)")
    if not isinstance(cells, list):
        raise Unreadable("the file is JSON, but holds no list of cells")
    if len(cells) > CELLS:
        raise Unreadable(f"the notebook has {len(cells)} cells; {CELLS} can be read")
    return [cell for cell in cells if isinstance(cell, dict)]


def _text(cell: dict) -> str:
    text = cell.get("source", cell.get("input", ""))
    if isinstance(text, list):
        text = "".join(part for part in text if isinstance(part, str))
    return text if isinstance(text, str) else ""


def _records(cells: list[dict]) -> list[dict]:
    found = []
    for cell in cells:
        outputs = cell.get("outputs")
        for output in outputs if isinstance(outputs, list) else ():
            data = output.get("data", output) if isinstance(output, dict) else None
            record = data.get(RECORD) if isinstance(data, dict) else None
            if not isinstance(record, dict) or len(found) >= RECORDS:
                continue
            if all(isinstance(record.get(key), str) for key in ("id", "time", "kind")) and record["kind"] in KINDS:
                if len(json.dumps(record)) <= RECORD_TEXT:
                    found.append(record)
    return found


def _free(cells: list[dict]) -> list[list[str]]:
    """[id, text] of each cell for a written answer: tagged "free:2.F1", or with free="2.F1" in its metadata."""
    found = []
    for cell in cells:
        metadata = cell.get("metadata") if isinstance(cell.get("metadata"), dict) else {}
        tags = metadata.get("tags") if isinstance(metadata.get("tags"), list) else []
        names = [tag.removeprefix("free:") for tag in tags if isinstance(tag, str) and tag.startswith("free:")]
        name = metadata.get("free") if isinstance(metadata.get("free"), str) else names[0] if names else None
        if name and re.fullmatch(r"[\w.-]{1,40}", name):
            found.append([name, _text(cell)[:FREE_TEXT]])
    return found
