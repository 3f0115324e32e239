"""A grid of runs, each finished cell kept on disk: stop it, kill it, call it again, and it goes on where it was.

    def run(r, lr, seed):
        torch.manual_seed(seed)
        ...
        return {"loss": loss, "accuracy": accuracy}

    table = sweep(run, {"r": [1, 2, 4, 8], "lr": [1e-3, 1e-2]}, seeds=range(3), n_jobs=2)

A cell is one call of the function: its settings and a seed. It is kept under a name made from these and from a fingerprint of the code
(`fingerprint` says what that notices and what not), so that an edited function never gets the results of the old one. The runs go
through joblib: processes here by default, a cluster inside `with joblib.parallel_config(backend="dask")`. Only the process that calls
`sweep` writes files, so workers on other machines need no common disk.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import itertools
import json
import math
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

import numpy as np

from .files import atomic_write

RESERVED = ("seed", "seconds", "status", "error")  # columns of the table that are the sweep's own
MANIFEST = "sweep.json"


def sweep(
    function: Callable,
    grid: Mapping[str, Iterable] | Sequence[Mapping],
    seeds: Iterable[int] = (0,),
    n_jobs: int | None = None,
    *,
    folder: str | os.PathLike | None = None,
    retry_failed: bool = False,
    version: str | None = None,
    progress: bool = True,
):
    """Call `function(**settings, seed=seed)` for every cell of `grid` x `seeds` that has no result on disk yet; give all as a pandas table.

    function      a plain `def`; returns a number, or a dict of numbers. Each call runs with one torch thread.
    grid          name -> values (every combination is a cell), or a list of dicts, each one setting of the arguments. Values are numbers,
                  texts, bools, None or tuples of these. Cells that occur twice are run once
    n_jobs        processes at a time; None: 1, or what `joblib.parallel_config` says; a Dask cluster uses all its cores
    folder        where finished cells are kept: by default .lora-lab/sweeps/<name of the function> in the current folder
    retry_failed  run cells again that raised an exception; otherwise their failure is kept like a result
    version       any text that stands for what `fingerprint` does not notice, such as the data: "digits, cleaned"

    The table has a row per cell, in the grid's order: the settings, `seed`, the results (a bare number is called `result`), `seconds`
    (wall time of the call), `status` ("done" or "failed"), and, when a cell failed, `error` (the traceback as text).

    Raises TypeError for arguments of the wrong kind, a setting that is not plain or not taken by the function; ValueError for an empty grid
    or a folder of another function; OSError when the folder cannot be written; RuntimeError when a worker process died, or holds
    another version of the function. Whatever ends a sweep early, Ctrl-C too, leaves the cells that were finished.
    """
    import torch
    from tqdm.auto import tqdm

    _check_function(function)
    code = fingerprint(function)
    folder = Path(".lora-lab", "sweeps", function.__name__) if folder is None else Path(folder)
    cells = _cells(function, grid, seeds, folder, code, version)
    _check_folder(folder, function)

    records = {cell: record for cell in cells if (record := _read(cell)) is not None}
    if retry_failed:
        records = {cell: record for cell, record in records.items() if record["status"] == "done"}
    missing = [cell for cell in cells if cell not in records]

    threads = torch.get_num_threads()
    bar = tqdm(total=len(cells), initial=len(records), desc=function.__name__, unit="cell", disable=not progress)
    try:
        if missing:
            _prepare_folder(folder, function)
            _mention_older(folder, function, missing)
            with closing(_run_all(function, code, missing, n_jobs)) as finished:
                for cell, record in finished:
                    _write(cell, record)
                    records[cell] = record
                    failed = sum(record["status"] == "failed" for record in records.values())
                    bar.set_postfix({"failed": failed} if failed else {}, refresh=False)
                    bar.update()
            records |= {cell: record for cell in missing if cell not in records and (record := _read(cell)) is not None}
            bar.update(len(records) - bar.n)
    except BaseException as error:
        kept = f"{len(records)} of {len(cells)} cells are finished and kept in {folder}; the same call goes on from there"
        if explained := _explained(error, function.__name__):
            explained.add_note(kept)
            raise explained from error
        error.add_note(kept)
        raise
    finally:
        torch.set_num_threads(threads)  # cells that run in threads of this process may have left it at 1
        bar.close()
    return _table(function, [(cell, records[cell]) for cell in cells])


# ---- what is run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """One call: the settings as (name, value) pairs, the seed, and where its result is kept."""

    settings: tuple[tuple[str, object], ...]
    seed: int
    path: Path

    @property
    def failed(self) -> Path:
        # A file of its own: a failure in one process never overwrites the result of another.
        return self.path.with_suffix(".failed.json")

    def call(self, name: str) -> str:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in (*self.settings, ('seed', self.seed)))})"


def _check_function(function) -> None:
    if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
        raise TypeError(
            f"sweep needs a function made with def, got {function!r}. Its name names the folder and its code keys the results; "
            "values that stay the same go into the grid: {'steps': [300]}"
        )


def _cells(function, grid, seeds, folder: Path, code: str, version: str | None) -> list[_Cell]:
    if isinstance(seeds, (int, str)) or not isinstance(seeds, Iterable):
        raise TypeError(f"seeds is {seeds!r}; write a list, [0], or range(5) for five seeds")
    seeds = [_plain(seed, "seeds") for seed in seeds]
    if wrong := [seed for seed in seeds if type(seed) is not int]:
        raise TypeError(f"seeds are whole numbers; {wrong[0]!r} is not")
    if isinstance(grid, Mapping):
        columns = {name: _values(name, values) for name, values in grid.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in itertools.product(*columns.values())]
    elif isinstance(grid, Sequence) and all(isinstance(row, Mapping) for row in grid):
        rows = [{name: _plain(value, f"grid: {name}") for name, value in row.items()} for row in grid]
    else:
        raise TypeError(f"grid is a dict, name -> list of values, or a list of dicts; got {grid!r}")
    if not rows or not seeds:
        raise ValueError(f"nothing to run: {len(rows)} settings x {len(seeds)} seeds")
    signature = inspect.signature(function)
    for names in {tuple(row): row for row in rows}:
        if taken := [name for name in names if name in RESERVED]:
            raise ValueError(f"a setting cannot be called {taken[0]!r}: the table has a column of that name (seeds go into seeds=...)")
        try:
            signature.bind(**dict.fromkeys(names), seed=0)
        except TypeError as error:
            raise TypeError(
                f"{function.__name__}{signature} cannot be called with {', '.join((*names, 'seed'))}: {error}. "
                "Its arguments are the names of the grid, and seed"
            ) from None
    cells = {}
    for row, seed in itertools.product(rows, seeds):
        key = _digest([sorted(row.items()), seed, version])
        cells.setdefault(key, _Cell(tuple(row.items()), seed, folder / f"{key}-{code}.json"))
    return list(cells.values())


def _values(name, values) -> list:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"grid: {name} is {values!r}; write a list of values, [{values!r}]")
    return [_plain(value, f"grid: {name}") for value in values]


def _plain(value, where: str):
    """The value as Python's own number, text, bool, None or tuple; what has no lasting name cannot key a file."""
    if isinstance(value, np.generic):  # np.logspace and np.arange are how people write grids
        value = value.item()
    if isinstance(value, tuple):
        return tuple(_plain(part, where) for part in value)
    if type(value) is float and math.isnan(value):
        raise TypeError(f"{where} has the value nan, which is not even equal to itself: its result could not be found again")
    if value is None or type(value) in (bool, int, float, str):
        return value
    advice = "write a tuple" if isinstance(value, list) else "name it by a text or a number, and make it inside the function"
    raise TypeError(
        f"{where} has the value {value!r}, a {type(value).__name__}; settings are numbers, texts, bools, None or tuples of these, "
        f"because they name the result on disk: {advice}"
    )


def _run(function, code: str, cell: _Cell) -> tuple[_Cell, dict]:
    """One cell, wherever it runs. What goes wrong inside the function becomes a record, not an exception."""
    import torch

    if fingerprint(function) != code:
        raise RuntimeError(
            f"a worker process holds another version of {function.__name__}, or of lora_lab, than this one. "
            "Restart the kernel (or the cluster's workers) after editing a file; give the workers the same files and the same Python"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        found = _numbers(function(**dict(cell.settings), seed=cell.seed), cell, function.__name__)
        outcome = {"results": found, "status": "done"}
    except (Exception, SystemExit) as error:
        # The first frame is this one; the reader wants their own.
        text = "".join(traceback.format_exception(error.with_traceback(error.__traceback__.tb_next)))
        outcome = {"results": {}, "status": "failed", "error": text}
    finally:
        seconds = time.perf_counter() - began
        torch.set_num_threads(threads)
    return cell, _record(cell, outcome, seconds)


def _record(cell: _Cell, outcome: dict, seconds: float) -> dict:
    return {"settings": dict(cell.settings), "seed": cell.seed, **outcome, "seconds": seconds}


def _run_all(function, code: str, cells: list[_Cell], n_jobs: int | None) -> Iterator[tuple[_Cell, dict]]:
    """Run the cells where joblib says, and give each as soon as it is finished."""
    import joblib

    def tasks():
        for cell in cells:
            if not cell.path.exists():  # another process that runs the same sweep may have been faster
                yield joblib.delayed(_run)(function, code, cell)

    backend, _ = joblib.parallel.get_active_backend()
    if hasattr(backend, "client"):
        yield from _run_on_dask(backend, function, code, cells)
    else:
        # batch_size=1: a cell is on disk as soon as it is finished, not when its neighbours are.
        yield from joblib.Parallel(n_jobs=n_jobs, batch_size=1, return_as="generator_unordered")(tasks())


def _explained(error: BaseException, name: str) -> Exception | None:
    """joblib's own errors, in words that say what to do."""
    reason = (str(error.__cause__ or error).strip('\n "').splitlines() or [""])[-1]  # the cause is a traceback as text
    if isinstance(error, pickle.PicklingError):
        return TypeError(
            f"{name} uses something that cannot be sent to another process: {reason}. Make it inside the function, or run with n_jobs=1"
        )
    if type(error).__name__ == "TerminatedWorkerError":
        return RuntimeError("a worker process died, most often because memory ran out: call sweep again, with fewer n_jobs or smaller cells")
    if type(error).__name__ == "BrokenProcessPool":
        return RuntimeError(f"a worker process could not load {name} or what it uses: {reason}")
    return None


def _run_on_dask(backend, function, code: str, cells: list[_Cell]) -> Iterator[tuple[_Cell, dict]]:
    """The same on the cluster of joblib's Dask backend, through its own client.

    joblib 1.6 waits for ever when Dask itself gives a task up: a worker that lacks a module, a cell that takes worker after worker down.
    """
    from dask.distributed import KilledWorker, as_completed

    # pure=False: a call is its own task, even when another program has run the same one.
    futures = {backend.client.submit(_run, function, code, cell, pure=False, **backend.submit_kwargs): cell for cell in cells}
    try:
        for future in as_completed(list(futures)):
            cell = futures.pop(future)
            try:
                yield future.result()
            except KilledWorker as error:
                text = f"{error}\nKilledWorker: the workers that ran {cell.call(function.__name__)} died, most often because memory ran out"
                yield cell, _record(cell, {"results": {}, "status": "failed", "error": text}, math.nan)
            except Exception as error:  # not the function's: those are records
                raise RuntimeError(
                    f"a worker of the cluster could not run {function.__name__}: {error.__cause__ or error}. Workers need what this process "
                    "has: the same Python and packages, lora_lab, and the files that the function is imported from"
                ) from error
    finally:
        backend.client.cancel(list(futures))


def _numbers(result, cell: _Cell, name: str) -> dict:
    found = {}
    for key, value in result.items() if isinstance(result, Mapping) else [("result", result)]:
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numpy's and torch's scalars
            value = value.item()
        if type(value) not in (bool, int, float):
            what = f"under {key!r} " if isinstance(result, Mapping) else ""
            advice = "did it forget to return?" if value is None else "return a number or a dict of numbers"
            raise TypeError(f"{cell.call(name)} gave {what}{str(value)[:60]!r}, a {type(value).__name__}: {advice}")
        if not isinstance(key, str) or key in RESERVED or key in dict(cell.settings):
            raise TypeError(f"{cell.call(name)} gave a result called {key!r}, which names another column of the table, or is no text")
        found[key] = value
    if not found:
        raise TypeError(f"{cell.call(name)} gave an empty dict: return a number or a dict of numbers")
    return found


# ---- the version of the code ----------------------------------------------------------------------------------------


def fingerprint(function: Callable) -> str:
    """16 hex digits that change when the function's results may: by its compiled code, and lora_lab's version.

    Noticed: an edit to the function, and to functions, classes, numbers, texts, lists and dicts of the same notebook or file that it
    uses, directly or through each other; default arguments; values a closure holds; the version of lora_lab; Python's minor version.
    Not noticed: other files that it imports, other packages' versions, arrays, tensors, models and data on disk: pass `version=` to
    `sweep` for those. Comments, line breaks and the lines above make no difference.

    Compiled code and not source text: after a file was edited and not loaded again, its text is new and what runs is old.

    >>> def run(r, seed): return r
    >>> before = fingerprint(run)
    >>> def run(r, seed): return r + 1
    >>> fingerprint(run) == before
    False
    """
    from . import __version__

    return _digest([__version__, _described(function, function.__module__, set())])


def _described(thing, home: str, seen: set):
    """What a result depends on, as nested lists: code of `home` (a module's name), and plain values; None for all else."""
    if isinstance(thing, (staticmethod, classmethod)):
        thing = thing.__func__
    if isinstance(thing, property):
        return [_described(part, home, seen) for part in (thing.fget, thing.fset, thing.fdel)]
    if isinstance(thing, (FunctionType, type)):
        if thing.__module__ != home or id(thing) in seen:
            return None
        seen.add(id(thing))
        if isinstance(thing, FunctionType):
            cells = [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
            used = [thing.__globals__[name] for name in sorted(_global_names(thing.__code__)) if name in thing.__globals__]
            parts = [thing.__defaults__, thing.__kwdefaults__, *cells, *used]
            return [_code(thing.__code__), [_described(part, home, seen) for part in parts]]
        members = sorted((name, value) for name, value in vars(thing).items() if callable(value) or not name.startswith("__"))
        return [[_described(base, home, seen) for base in thing.__bases__],
                [(name, _described(value, home, seen)) for name, value in members]]
    try:
        return json.dumps(thing, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None


def _filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (a cell that is not filled yet raises)
    except ValueError:
        return False
    return True


def _global_names(code: CodeType) -> set[str]:
    """Names that the code looks up as globals; `co_names` would add every attribute, and `step.loss` is not the global `loss`."""
    names = {found.argval for found in dis.get_instructions(code) if found.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _code(code: CodeType) -> list:
    return [code.co_code.hex(), code.co_exceptiontable.hex(), code.co_names, code.co_varnames, list(map(_constant, code.co_consts))]


def _constant(value):
    if isinstance(value, CodeType):
        return _code(value)
    if isinstance(value, tuple):
        return list(map(_constant, value))
    if isinstance(value, frozenset):  # its order is another one in every process
        return sorted(map(repr, value))
    return repr(value)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# ---- files ----------------------------------------------------------------------------------------------------------


def _check_folder(folder: Path, function) -> None:
    """A folder of another function, or of something else, is not ours to fill."""
    try:
        owner = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["function"]
    except (FileNotFoundError, NotADirectoryError):
        return
    except (ValueError, KeyError, TypeError):
        _notice(f"{folder / MANIFEST} was damaged; it is written anew")
        return
    if owner != function.__qualname__:
        raise ValueError(f"{folder} holds results of {owner}, not of {function.__qualname__}: choose another folder")


def _prepare_folder(folder: Path, function) -> None:
    """Find out before the first cell runs, not after it, that nothing can be kept."""
    try:
        with atomic_write(folder / MANIFEST) as path:
            path.write_text(json.dumps({"function": function.__qualname__}) + "\n", encoding="utf-8")
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> OSError:
    return OSError(error.errno, f"results cannot be kept in {folder} ({error.strerror or error}); pass folder= with a place to write")


def _write(cell: _Cell, record: dict) -> None:
    target = cell.path if record["status"] == "done" else cell.failed
    try:
        with atomic_write(target) as path:
            path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        if record["status"] == "done":
            cell.failed.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(target.parent, error) from error


def _read(cell: _Cell) -> dict | None:
    """The cell's result, else its failure, else None. A damaged file is set aside: the cell is run again."""
    for path, status in ((cell.path, "done"), (cell.failed, "failed")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            expected = json.loads(json.dumps([dict(cell.settings), cell.seed, status]))  # tuples become lists, as in the file
            if [record["settings"], record["seed"], record["status"]] != expected:
                raise ValueError("settings of another cell")
            numbers = [record["seconds"], *record["results"].values()]
            if any(type(number) not in (bool, int, float) for number in numbers) or not (record["results"] or record["error"]):
                raise ValueError("results that are no numbers")
            return record
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            aside = path.with_suffix(".damaged")
            try:
                with suppress(FileNotFoundError):  # another process was faster
                    os.replace(path, aside)
            except OSError as failure:
                raise _cannot_write(path.parent, failure) from failure
            _notice(f"{path} was damaged ({error}); it is kept as {aside.name} and the cell runs again")
    return None


def _mention_older(folder: Path, function, missing: list[_Cell]) -> None:
    older = {path.name.partition("-")[0] for path in folder.glob("*-*.json")}
    again = sum(cell.path.name.partition("-")[0] in older and not cell.failed.exists() for cell in missing)
    if again:
        _notice(
            f"{again} of these cells were run with an earlier version of {function.__name__}, of what it uses, or of lora_lab; they run "
            f"again, and the old results stay in {folder}"
        )


def _notice(text: str) -> None:
    """A warning at the line that called `sweep`: a notebook shows it each time the cell runs, and not only the first time."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_code.co_filename == __file__:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


# ---- the table ------------------------------------------------------------------------------------------------------


def _table(function, rows: list[tuple[_Cell, dict]]):
    import pandas

    failures = [(cell, record) for cell, record in rows if record["status"] == "failed"]
    if failures:
        cell, record = failures[0]
        _notice(
            f"{len(failures)} of {len(rows)} cells failed, the first is {cell.call(function.__name__)}: "
            f"{record['error'].strip().splitlines()[-1]}. The tracebacks are in the column `error`; retry_failed=True runs them again"
        )
    names = _in_order(dict(cell.settings) for cell, _ in rows)
    results = _in_order(record["results"] for _, record in rows)
    columns = [*names, "seed", *results, "seconds", "status"] + ["error"] * bool(failures)
    own = [{"seconds": record["seconds"], "status": record["status"], "error": record.get("error")} for _, record in rows]
    flat = [{**dict(cell.settings), "seed": cell.seed, **record["results"], **more}
            for (cell, record), more in zip(rows, own, strict=True)]
    table = pandas.DataFrame(flat, columns=columns)
    for name in names:
        values = [row.get(name, math.nan) for row in flat]
        if None in values:  # pandas would make it nan, and a setting of None is not a missing one
            table[name] = pandas.Series(values, dtype=object)
    return table


def _in_order(rows: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
