"""What the benchmarks share: their options, the machine they ran on, a table, a file."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def options(doc: str, **more) -> argparse.Namespace:
    """--quick and --out, as every benchmark has them; `more`: name -> (help, default), for whole numbers."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="takes seconds: does it run, not how fast is it")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also save the table there, as JSON")
    for name, (text, default) in more.items():
        many = {"nargs": "+"} if isinstance(default, list) else {}
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})", **many)
    known, _ = parser.parse_known_args()  # `start.py bench` hands the same options to every script
    return known


def machine(*packages: str) -> dict:
    """Where the figures come from; figures without it say nothing."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "system": platform.platform(), "processor": _processor(), "cores": os.cpu_count(), "load_at_start": load,
        "python": platform.python_version(), **versions,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def show(rows: list[dict], found: dict) -> None:
    """Print the machine and the rows, floats with three digits."""
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    cells = [list(rows[0])] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def save(folder: Path | None, name: str, rows: list[dict], found: dict) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"machine": found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"saved as {path}")
