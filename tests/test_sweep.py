"""Sweeps: what the table says, what is run again and what not, through kills, edits, failures and damaged files.

Executions are counted on disk, by files that the swept functions themselves leave, and not by what the sweep says about itself.
"""

import importlib
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import lora_lab
from lora_lab.sweep import fingerprint, sweep

LIMIT = 120  # seconds that a helper process may take; far more than it needs, because machines are shared
posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def traced(log, k, seed=0, pause=0.0):
    """k * 10 + seed, leaving a file when it begins and one when it ends."""
    stamp = f"{k}_{seed}-{os.getpid()}-{time.time_ns()}"
    Path(log, f"start-{stamp}").touch()
    time.sleep(pause)
    Path(log, f"end-{stamp}").touch()
    return k * 10 + seed


def executions(log, what="start"):
    """(k, seed) -> how often the function has started (or ended) with them."""
    names = [path.name.split("-")[1].split("_") for path in Path(log).glob(f"{what}-*")]
    return Counter((int(k), int(seed)) for k, seed in names)


@pytest.fixture
def log(tmp_path):
    (tmp_path / "log").mkdir()
    return str(tmp_path / "log")


@pytest.fixture
def go(tmp_path):
    """sweep, into a folder of the test, silently."""
    return lambda function, grid, *args, **more: sweep(function, grid, *args, **{"folder": tmp_path / "cells", "progress": False, **more})


def wait_for(condition):
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


# ---- the table ------------------------------------------------------------------------------------------------------


def squares(r, lr, seed):
    return {"loss": r * r + lr, "steps": 10 + seed}


def test_the_table_has_a_row_per_cell_in_the_order_of_the_grid(go):
    table = go(squares, {"r": [3, 1], "lr": [0.5, 0.25]}, seeds=[4, 2])
    assert list(table.columns) == ["r", "lr", "seed", "loss", "steps", "seconds", "status"]
    assert table[["r", "lr", "seed", "loss", "steps"]].values.tolist() == [
        [3, 0.5, 4, 9.5, 14], [3, 0.5, 2, 9.5, 12], [3, 0.25, 4, 9.25, 14], [3, 0.25, 2, 9.25, 12],
        [1, 0.5, 4, 1.5, 14], [1, 0.5, 2, 1.5, 12], [1, 0.25, 4, 1.25, 14], [1, 0.25, 2, 1.25, 12],
    ]
    assert set(table.status) == {"done"}
    assert {str(table[name].dtype) for name in ("r", "seed", "steps")} == {"int64"}


def test_seconds_are_the_wall_time_of_the_call(go, log):
    (seconds,) = go(traced, {"log": [log], "k": [1], "pause": [0.2]}).seconds
    assert 0.2 <= seconds < 5  # the upper end only says: seconds and not milliseconds


def echo(seed, **settings):
    return {"kind_" + name: sum(map(ord, type(value).__name__)) for name, value in settings.items()}


def test_settings_arrive_as_they_were_written_and_stay_so_in_the_table(go):
    rows = [{"a": None, "b": (1, ("x", 2.5))}, {"a": True}, {"a": 3, "c": "text"}, {"a": math.inf}]
    for _ in range(2):  # run, then read back
        assert go(echo, {"r": [None, 8, 2.5]}).r.tolist() == [None, 8, 2.5]
        table = go(echo, rows)
        assert [table.a[0], table.a[1], table.a[2], table.a[3]] == [None, True, 3, math.inf] and table.a[1] is True
        assert table.b[0] == (1, ("x", 2.5)) and table.isna().b.tolist() == [False, True, True, True]
        assert table.kind_a.tolist() == [sum(map(ord, name)) for name in ("NoneType", "bool", "int", "float")]


def test_numpys_numbers_in_the_grid_are_pythons(go, log):
    table = go(echo, {"lr": np.logspace(-2, -1, 2), "r": np.arange(1, 3)}, seeds=np.arange(2))
    assert len(table) == 8 and set(table.kind_lr) == {sum(map(ord, "float"))} and set(table.kind_r) == {sum(map(ord, "int"))}
    assert table.equals(go(echo, {"lr": [0.01, 0.1], "r": range(1, 3)}, seeds=range(2)))


def all_kinds(seed):
    return {"tensor": torch.tensor(1.5), "numpy": np.float32(2.5), "array": np.array(3), "bool": True, "nan": math.nan, "inf": -math.inf}


def test_scalars_of_torch_and_numpy_are_numbers(go):
    for _ in range(2):
        row = go(all_kinds, {}).iloc[0]
        assert [row.tensor, row.numpy, row.array, row["bool"], row.inf] == [1.5, 2.5, 3, True, -math.inf] and math.isnan(row.nan)


def test_a_cell_that_occurs_twice_is_run_once(go, log):
    table = go(traced, {"log": [log], "k": [1, 1, 2]}, seeds=[0, 0])
    assert table.result.tolist() == [10, 20] and set(executions(log).values()) == {1}


# ---- what is run again ----------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_run(go, log):
    go(traced, {"log": [log], "k": [1, 2]}, seeds=[0, 1])
    table = go(traced, {"k": [3, 2, 1], "log": [log]}, seeds=range(3))  # another order, more values
    assert table.result.tolist() == [30, 31, 32, 20, 21, 22, 10, 11, 12]
    go(traced, [{"log": log, "k": 2}], seeds=[1])  # another way to say it
    assert executions(log) == {(k, seed): 1 for k in (1, 2, 3) for seed in range(3)}


def with_a_neighbour(log, k, seed):
    if k == 1:  # while it runs, somebody else's sweep finishes k = 2
        sweep(with_a_neighbour, {"log": [log], "k": [2]}, folder=Path(log).parent / "cells", progress=False)
    return traced(log, k, seed)


def test_what_another_process_has_finished_meanwhile_is_taken_over(go, log):
    assert go(with_a_neighbour, {"log": [log], "k": [1, 2, 3]}).result.tolist() == [10, 20, 30]
    assert executions(log) == {(1, 0): 1, (2, 0): 1, (3, 0): 1}


def same_kind(value, seed):
    return {"int": 1, "float": 2, "bool": 3}[type(value).__name__]


def test_values_that_are_equal_and_not_the_same_are_different_cells(go):
    assert [go(same_kind, {"value": [value]}).result[0] for value in (1, 1.0, True)] == [1, 2, 3]


def test_the_default_folder(tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    sweep(traced, {"log": [log], "k": [1]}, progress=False)
    assert (tmp_path / ".lora-lab/sweeps/traced/sweep.json").exists()
    sweep(traced, {"log": [log], "k": [1]}, progress=False)
    assert executions(log) == {(1, 0): 1}


def test_a_version_of_ones_own_keeps_results_apart(go, log):
    for version in (None, "cleaned", None, "cleaned"):
        go(traced, {"log": [log], "k": [1]}, version=version)
    assert executions(log) == {(1, 0): 2}


def test_a_new_version_of_the_lab_runs_again(go, log, monkeypatch):
    go(traced, {"log": [log], "k": [1]})
    monkeypatch.setattr(lora_lab, "__version__", "999")
    with pytest.warns(UserWarning, match="1 of these cells were run with an earlier version of traced"):
        go(traced, {"log": [log], "k": [1]})
    assert executions(log) == {(1, 0): 2}


BASE = """
import math
LIMIT = 3
UNUSED = 1
TABLE = {"a": [1, 2]}
loss = 0.5
def helper(x, more=1):
    return x in {"p", "q", "r"} or deeper(x)
def deeper(x):
    return sum(y + LIMIT for y in [x])
class Model:
    width = 4
    def forward(self, x):
        return [self.inner(y) for y in x]
    @staticmethod
    def inner(y):
        return y * 2
def make(factor):
    def run(r, step=None, *, seed=0):
        \"\"\"Says what it does.\"\"\"
        try:
            value = helper(r) + math.pi + factor
        except ValueError:
            value = 0
        return value if step is None else step.loss + len(TABLE) + Model().forward([r])[0]
    return run
run = make(2)
"""
NOTICED = {
    "the function": ("math.pi + factor", "math.pi - factor"),
    "a number in it": ("value = 0", "value = 1"),
    "its default": ("step=None", "step=0"),
    "which exception it expects": ("ValueError", "TypeError"),
    "a helper": ("or deeper(x)", "and deeper(x)"),
    "a helper's default": ("more=1", "more=2"),
    "a helper's helper": ("y + LIMIT", "y * LIMIT"),
    "a set in a helper": ('"q", ', ""),
    "a number that a helper uses": ("LIMIT = 3", "LIMIT = 4"),
    "a dict of plain values": ("[1, 2]", "[1, 3]"),
    "a method": ("for y in x", "for y in x[1:]"),
    "a static method": ("y * 2", "y * 3"),
    "a class attribute": ("width = 4", "width = 5"),
    "what a closure holds": ("make(2)", "make(3)"),
}
NOT_NOTICED = {
    "nothing": ("", ""),
    "a comment": ("LIMIT = 3\n", "LIMIT = 3\n# a comment\n\n\n"),
    "the lines that a call is spread over": ("deeper(x)\n", "deeper(\n        x\n    )\n"),
    "a number that it does not use": ("UNUSED = 1", "UNUSED = 2"),
    "a global that only shares its name with an attribute": ("loss = 0.5", "loss = 0.7"),
}


def fingerprint_of(source):
    module = types.ModuleType("some_notebook")
    exec(source, vars(module))
    return fingerprint(module.run)


@pytest.mark.parametrize("edit", [*NOTICED, *NOT_NOTICED])
def test_what_an_edit_does_to_the_fingerprint(edit):
    old, new = (NOTICED | NOT_NOTICED)[edit]
    assert old in BASE and (new != old or not old)
    edited = BASE.replace(old, new, 1) if old else BASE
    assert (fingerprint_of(edited) == fingerprint_of(BASE)) == (edit in NOT_NOTICED)


def test_a_fingerprint_is_the_same_in_every_process():
    code = f"import types\nfrom lora_lab.sweep import fingerprint\nmodule = types.ModuleType('some_notebook')\n" \
           f"exec({BASE!r}, vars(module))\nprint(fingerprint(module.run))"
    others = [  # in which sets of texts have another order
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True)
        for seed in "123"
    ]
    assert {other.communicate(timeout=LIMIT)[0].strip() for other in others} == {fingerprint_of(BASE)}


def test_an_edited_function_never_gets_old_results(go):
    def run(k, seed):
        return k + 1

    assert go(run, {"k": [1]}).result[0] == 2

    def run(k, seed):  # noqa: F811
        return k + 2

    with pytest.warns(UserWarning, match="earlier version of run"):
        assert go(run, {"k": [1]}).result[0] == 3


# ---- failures -------------------------------------------------------------------------------------------------------


def fragile(log, k, seed):
    traced(log, k, seed)
    if k == 2 and not Path(log, "mended").exists():
        raise ArithmeticError(f"no result for {k}")
    if k == 3 and not Path(log, "mended").exists():
        sys.exit("gave up")
    return k


def test_failures_are_kept_beside_results_and_run_again_on_request(go, tmp_path, log):
    with pytest.warns(UserWarning, match=r"2 of 3 cells failed, the first is fragile\(log=.*, k=2, seed=0\): ArithmeticError: no result for 2"):
        table = go(fragile, {"log": [log], "k": [1, 2, 3]})
    assert table.status.tolist() == ["done", "failed", "failed"] and table.result[0] == 1 and table.result.isna().tolist() == [0, 1, 1]
    assert 'raise ArithmeticError(f"no result for {k}")' in table.error[1] and "_run" not in table.error[1]
    assert "SystemExit: gave up" in table.error[2]

    Path(log, "mended").touch()
    with pytest.warns(UserWarning, match="2 of 3 cells failed"):
        assert go(fragile, {"log": [log], "k": [1, 2, 3]}).status.tolist() == ["done", "failed", "failed"]
    assert set(executions(log).values()) == {1}
    table = go(fragile, {"log": [log], "k": [1, 2, 3]}, retry_failed=True)
    assert table.result.tolist() == [1, 2, 3] and "error" not in table
    assert executions(log) == {(1, 0): 1, (2, 0): 2, (3, 0): 2}
    assert go(fragile, {"log": [log], "k": [1, 2, 3]}).status.tolist() == ["done"] * 3
    assert not list((tmp_path / "cells").glob("*.failed.json"))


def gives(what, seed):
    return {
        "none": None, "text": "0.5", "array": np.zeros(3), "empty": {}, "list": {"a": [1]}, "complex": 1j,
        "reserved": {"seconds": 1}, "setting": {"what": 1}, "no name": {1: 2},
    }[what]


@pytest.mark.parametrize(
    "what, says",
    [
        ("none", r"gives\(what='none', seed=0\) gave 'None', a NoneType: did it forget to return\?"),
        ("text", "gave '0.5', a str: return a number or a dict of numbers"),
        ("array", r"gave '\[0. 0. 0.\]', a ndarray"),
        ("empty", "gave an empty dict"),
        ("list", r"gave under 'a' '\[1\]', a list"),
        ("complex", "a complex"),
        ("reserved", "'seconds', which names another column"),
        ("setting", "'what', which names another column"),
        ("no name", "gave a result called 1"),
    ],
)
def test_a_result_that_is_no_number_fails_its_cell(go, what, says):
    with pytest.warns(UserWarning, match=says):
        assert go(gives, {"what": [what]}).status.tolist() == ["failed"]


def interrupted(log, k, seed):
    if k == 2 and not Path(log, "mended").exists():
        raise KeyboardInterrupt
    return traced(log, k, seed)


def test_an_interrupt_leaves_finished_cells_and_the_threads_as_they_were(go, log):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            go(interrupted, {"log": [log], "k": [1, 2, 3]})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "1 of 3 cells are finished and kept" in caught.value.__notes__[0]
    Path(log, "mended").touch()
    assert go(interrupted, {"log": [log], "k": [1, 2, 3]}).result.tolist() == [10, 20, 30]
    assert executions(log) == {(1, 0): 1, (2, 0): 1, (3, 0): 1}


@posix_only
@pytest.mark.slow
def test_an_interrupt_with_two_processes_leaves_finished_cells_and_no_processes(tmp_path, log):
    process = start(tmp_path, log, 2, start_new_session=True)
    wait_for(lambda: len(list((tmp_path / "cells").glob("*-*.json"))) >= 3)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C and a notebook's stop button do: the workers hear it too
    _, said = process.communicate(timeout=LIMIT)
    finished = on_disk(tmp_path)
    assert "KeyboardInterrupt" in said and f"{len(finished)} of 12 cells are finished and kept" in said
    assert 3 <= len(finished) < 12

    def gone():
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True

    wait_for(gone)
    run_to_the_end(tmp_path, log)
    assert all(executions(log)[cell] == 1 for cell in finished)


SCRIPT = """
    import sys
    sys.path.insert(0, {here!r})
    from test_sweep import executions, traced
    from lora_lab.sweep import sweep

    def run(log, k, seed):  # of __main__, as in a notebook: it can only be sent by value
        return traced(log, k, seed, 0.3)

    if __name__ == "__main__":
        log, folder, jobs = sys.argv[1:]
        table = sweep(run, {{"log": [log], "k": [1, 2, 3]}}, range(4), n_jobs=int(jobs), folder=folder)
        print(table.result.tolist())
"""
ALL = [10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]


def start(tmp_path, log, jobs, **more):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(here=str(Path(__file__).parent)), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, script, log, tmp_path / "cells", str(jobs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def run_to_the_end(tmp_path, log):
    process = start(tmp_path, log, 1)
    out, said = process.communicate(timeout=LIMIT)
    assert out.strip() == str(ALL), said
    return said


def on_disk(tmp_path):
    """(k, seed) of the cells whose results are kept, read without the sweep's help."""
    records = [json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*-*.json")]
    assert all(record["results"] == {"result": record["settings"]["k"] * 10 + record["seed"]} for record in records)
    return {(record["settings"]["k"], record["seed"]) for record in records}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path, log):
    process = start(tmp_path, log, 1)
    wait_for(lambda: len(list((tmp_path / "cells").glob("*-*.json"))) >= 4)
    process.kill()
    process.communicate()
    finished = on_disk(tmp_path)
    assert 4 <= len(finished) < 12
    said = run_to_the_end(tmp_path, log)
    assert f"{len(finished)}/12" in said and "12/12" in said  # the bar begins where the first run ended
    assert all(executions(log)[cell] == 1 for cell in finished)
    # Beside the finished ones, at most the cell that was under way has begun twice.
    assert sum(executions(log).values()) <= 13


@pytest.mark.slow
def test_two_processes_with_the_same_sweep_do_no_harm(tmp_path, log):
    both = [start(tmp_path, log, 1) for _ in range(2)]
    for process in both:
        out, said = process.communicate(timeout=LIMIT)
        assert out.strip() == str(ALL), said
    assert len(on_disk(tmp_path)) == 12
    assert not list((tmp_path / "cells").glob("*.damaged")) and not list((tmp_path / "cells").glob(".*"))


# ---- processes ------------------------------------------------------------------------------------------------------


def where(k, seed):
    return {"pid": os.getpid(), "threads": torch.get_num_threads()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_cells_run_with_one_thread_and_leave_the_threads_alone(go, jobs):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        table = go(where, {"k": [1, 2, 3, 4]}, n_jobs=jobs)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(table.threads) == {1}
    assert (os.getpid() in set(table.pid)) == (jobs == 1)


def test_two_processes_find_what_one_finds(go, tmp_path, log):
    one = go(squares, {"r": [1, 2, 3], "lr": [0.1, 0.2]}, range(2), folder=tmp_path / "one")
    two = go(squares, {"r": [1, 2, 3], "lr": [0.1, 0.2]}, range(2), n_jobs=2, folder=tmp_path / "two")
    assert one.drop(columns="seconds").equals(two.drop(columns="seconds"))


def test_what_cannot_be_sent_is_named(go):
    lock = threading.Lock()

    def locked(seed):
        with lock:
            return seed

    with pytest.raises(TypeError, match="locked uses something that cannot be sent to another process: .*lock.*Make it inside"):
        go(locked, {}, range(4), n_jobs=2)
    assert go(locked, {}, range(4)).result.tolist() == [0, 1, 2, 3]


def mortal(log, k, seed):
    while k == 3:  # (no assert in here: pytest rewrites it, so that a worker's copy of this file has other code)
        if len(list(Path(log).parent.glob("cells/*-*.json"))) >= 2:
            os._exit(1)
    return traced(log, k, seed)


def test_a_worker_that_dies_takes_no_results_with_it(go, log):
    with pytest.raises(RuntimeError, match="a worker process died, most often because memory ran out") as caught:
        go(mortal, {"log": [log], "k": [1, 2, 3]}, n_jobs=2)
    assert "2 of 3 cells are finished" in caught.value.__notes__[0]
    go(mortal, {"log": [log], "k": [1, 2]})
    assert executions(log) == {(1, 0): 1, (2, 0): 1}


def test_a_worker_with_an_old_file_is_found_out(go, tmp_path, monkeypatch):
    """Worker processes stay for the next sweep, with the files as they were when they imported them."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "edited_file.py"
    file.write_text("def run(k, seed):\n    return k\n")
    module = importlib.import_module("edited_file")
    assert go(module.run, {"k": [1, 2]}, n_jobs=2).result.tolist() == [1, 2]
    file.write_text("def run(k, seed):\n    return -k - seed\n")  # of another length: Python's cache looks at size and second
    importlib.reload(module)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="another version of run"):
        go(module.run, {"k": [1, 2]}, n_jobs=2)
    with pytest.warns(UserWarning):
        assert go(module.run, {"k": [1, 2]}).result.tolist() == [-1, -2]


@pytest.mark.notebook
def test_a_function_of_a_notebook_cell(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = [
        "from lora_lab.sweep import sweep\nimport torch",
        "scale = 10\nclass Model(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.w = torch.nn.Linear(2, 2)\n"
        "    def forward(self, x):\n        return scale * self.w(x)",
        "def run(r, seed):\n    torch.manual_seed(seed)\n    return {'twice': 2 * r + 0 * Model()(torch.ones(2)).sum(), 'seed_is': seed}",
        "sweep(run, {'r': [1, 2]}, range(2), n_jobs=2).twice.tolist()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [output["data"]["text/plain"] for output in notebook.cells[-1].outputs if output.output_type == "execute_result"]
    assert texts == ["[2.0, 2.0, 4.0, 4.0]"]


# ---- what is refused ------------------------------------------------------------------------------------------------


def takes(r, lr=0.1, *, seed):
    return r


def no_seed(r):
    return r


def scale(values):
    return lambda seed: values


@pytest.mark.parametrize(
    "function, grid, seeds, error, says",
    [
        (takes, {"r": [torch.float32]}, [0], TypeError, "grid: r has the value torch.float32, a dtype.*name it by a text"),
        (takes, {"r": [[1, 2]]}, [0], TypeError, r"grid: r has the value \[1, 2\], a list.*write a tuple"),
        (takes, {"r": [(1, {2})]}, [0], TypeError, r"grid: r has the value \{2\}, a set"),
        (takes, [{"r": print}], [0], TypeError, "builtin_function"),
        (takes, {"r": [math.nan]}, [0], TypeError, "nan, which is not even equal to itself"),
        (takes, {"r": 8}, [0], TypeError, r"grid: r is 8; write a list of values, \[8\]"),
        (takes, {"r": "adam"}, [0], TypeError, r"write a list of values, \['adam'\]"),
        (takes, {"r": []}, [0], ValueError, "nothing to run: 0 settings x 1 seeds"),
        (takes, [], [0], ValueError, "nothing to run"),
        (takes, {"r": [1]}, [], ValueError, "1 settings x 0 seeds"),
        (takes, {"r": [1]}, 5, TypeError, r"seeds is 5; write a list, \[0\], or range\(5\)"),
        (takes, {"r": [1]}, [0.5], TypeError, "seeds are whole numbers; 0.5 is not"),
        (takes, {"r": [1]}, [True], TypeError, "seeds are whole numbers; True is not"),
        (takes, {"rank": [1]}, [0], TypeError, r"takes\(r, lr=0.1, \*, seed\) cannot be called with rank, seed"),
        (takes, [{"r": 1}, {"lr": 1.0}], [0], TypeError, "cannot be called with lr, seed: missing a required argument: 'r'"),
        (no_seed, {"r": [1]}, [0], TypeError, "no_seed.r. cannot be called with r, seed"),
        (takes, {"r": [1], "seed": [1]}, [0], ValueError, "a setting cannot be called 'seed'"),
        (echo, {"seconds": [1]}, [0], ValueError, "a setting cannot be called 'seconds'"),
        (scale(3), {}, [0], TypeError, "a function made with def"),
        (print, {}, [0], TypeError, "a function made with def"),
        (takes, 3, [0], TypeError, "grid is a dict"),
        (takes, "r", [0], TypeError, "grid is a dict"),
        (takes, [1], [0], TypeError, "grid is a dict"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(go, tmp_path, function, grid, seeds, error, says):
    with pytest.raises(error, match=says):
        go(function, grid, seeds)
    assert not (tmp_path / "cells").exists()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_function_is_left_alone(go, tmp_path):
    go(squares, {"r": [1], "lr": [1.0]})
    before = sorted(path.name for path in (tmp_path / "cells").iterdir())
    with pytest.raises(ValueError, match="cells holds results of squares, not of takes: choose another folder"):
        go(takes, {"r": [1]})
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == before


@pytest.mark.parametrize("damage", ["", '{"settings": {"k": 1', "[]", '{"settings": {}, "seed": 0, "status": "done"}', b"\xff\xfe", "wrong", "exchanged"])
def test_damaged_results_are_set_aside_and_run_again(go, tmp_path, log, damage):
    go(traced, {"log": [log], "k": [1, 2]})
    path = next(p for p in (tmp_path / "cells").glob("*-*.json") if json.loads(p.read_text())["settings"]["k"] == 2)
    if damage == "wrong":
        damage = path.read_text().replace("20", '"20"')
    elif damage == "exchanged":
        damage = next(p for p in path.parent.glob("*-*.json") if p != path).read_text()
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.warns(UserWarning, match="was damaged.*the cell runs again"):
        assert go(traced, {"log": [log], "k": [1, 2]}).result.tolist() == [10, 20]
    assert executions(log) == {(1, 0): 1, (2, 0): 2}
    assert len(list((tmp_path / "cells").glob("*.damaged"))) == 1
    assert go(traced, {"log": [log], "k": [1, 2]}).result.tolist() == [10, 20]  # and no warning any more


def test_a_damaged_note_of_whose_folder_it_is(go, tmp_path, log):
    go(traced, {"log": [log], "k": [1]})
    (tmp_path / "cells/sweep.json").write_text("{")
    with pytest.warns(UserWarning, match="sweep.json was damaged"):
        go(traced, {"log": [log], "k": [1, 2]})
    assert executions(log) == {(1, 0): 1, (2, 0): 1}
    with pytest.raises(ValueError, match="holds results of traced"):
        go(takes, {"r": [1]})


@pytest.fixture
def readonly(tmp_path_factory):
    """make(folder) takes away the right to write; root, whom permissions do not stop, becomes nobody for as long as the test runs."""
    if os.name == "nt":
        pytest.skip("POSIX permissions")
    root = os.geteuid() == 0
    changed = []

    def make(folder):
        for above in [folder, *folder.parents]:
            if root and above.owner() == "root" and not above.stat().st_mode & stat.S_IXOTH:
                changed.append((above, above.stat().st_mode))
                above.chmod(above.stat().st_mode | 0o055)  # for the group too: nobody is still in root's
        changed.extend((path, path.stat().st_mode) for path in [folder, *folder.iterdir()])
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)

    yield make
    if root:
        os.seteuid(0)
    for path, mode in reversed(changed):
        path.chmod(mode)


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(go, tmp_path, log, readonly):
    go(traced, {"log": [log], "k": [1]})
    readonly(tmp_path / "cells")
    assert go(traced, {"log": [log], "k": [1]}).result.tolist() == [10]  # reading needs no right to write
    with pytest.raises(PermissionError, match="results cannot be kept in .*cells .*pass folder="):
        go(traced, {"log": [log], "k": [2]})
    assert executions(log) == {(1, 0): 1}


def test_a_folder_below_a_file(go, tmp_path, log):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="results cannot be kept in"):
        go(traced, {"log": [log], "k": [1]}, folder=tmp_path / "file" / "cells")
    assert not executions(log)


def test_importing_it_brings_nothing_heavy():
    code = "import sys, lora_lab.sweep; print(*{'joblib', 'pandas', 'dask'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


# ---- a Dask cluster -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    """Two workers, each a process of its own with one thread; nothing leaves this machine."""
    distributed = pytest.importorskip("dask.distributed", reason="the extra `cluster` is not installed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None) as local:
        with distributed.Client(local):
            yield local


@pytest.fixture
def on_dask(cluster, go):
    import joblib

    def run(*args, **more):
        with joblib.parallel_config(backend="dask"):
            return go(*args, **more)

    return run


def test_a_cluster_finds_what_one_process_finds(on_dask, go, tmp_path):
    grid = {"r": [1, 2, 3], "lr": [0.1, 0.2]}
    there, here = on_dask(squares, grid, range(2)), go(squares, grid, range(2), folder=tmp_path / "here")
    assert there.drop(columns="seconds").equals(here.drop(columns="seconds"))
    assert os.getpid() not in set(on_dask(where, {"k": range(4)}, folder=tmp_path / "where").pid)


def test_a_worker_killed_midway_costs_only_the_cell_it_had(on_dask, cluster, go, tmp_path, log):
    def kill():
        wait_for(lambda: len(on_disk(tmp_path)) >= 4)
        worker = next(iter(cluster.workers.values())).process.pid
        # In the middle of a cell, of 0.5 s, and not at its end, when its result may be on the way.
        wait_for(lambda: any(int(p.name.split("-")[3]) > time.time_ns() - 0.2e9 for p in Path(log).glob(f"start-*-{worker}-*")))
        os.kill(worker, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
        killed.append(on_disk(tmp_path))

    killed = []
    killer = threading.Thread(target=kill)
    killer.start()
    table = on_dask(traced, {"log": [log], "k": [1, 2, 3], "pause": [0.5]}, range(4))
    killer.join()
    assert table.result.tolist() == ALL and set(table.status) == {"done"}
    assert 4 <= len(killed[0]) < 12 and set(executions(log)) == {(k, seed) for k in (1, 2, 3) for seed in range(4)}
    assert set(executions(log, "end").values()) == {1}  # nothing that was finished is run again
    assert sum(executions(log).values()) == 13  # and only the cell that was lost has begun twice
    go(traced, {"log": [log], "k": [1, 2, 3], "pause": [0.5]}, range(4))
    assert sum(executions(log).values()) == 13


def deadly(log, k, seed):
    if k == 2:
        os._exit(1)
    return traced(log, k, seed)


@pytest.mark.slow
def test_a_cell_that_kills_every_worker_is_a_failure_and_the_rest_goes_on(on_dask, cluster, log):
    with pytest.warns(UserWarning, match="1 of 3 cells failed.*KilledWorker: the workers that ran .*k=2"):
        table = on_dask(deadly, {"log": [log], "k": [1, 2, 3]})
    assert table.status.tolist() == ["done", "failed", "done"] and table.result[[0, 2]].tolist() == [10, 30]


class Elsewhere:
    """Travels like an object of a module that the workers do not have."""

    def __reduce__(self):
        return __import__, ("a_module_that_workers_lack",)


def test_workers_that_lack_a_module_are_an_error_and_not_a_wait(on_dask):
    thing = Elsewhere()

    def far(seed):
        return thing and seed

    with pytest.raises(RuntimeError, match="a worker of the cluster could not run far: .*a_module_that_workers_lack"):
        on_dask(far, {}, range(3))


def test_a_failure_on_the_cluster_is_kept_like_any_other(on_dask, log):
    with pytest.warns(UserWarning, match="ArithmeticError: no result for 2"):
        table = on_dask(fragile, {"log": [log], "k": [1, 2]})
    assert table.status.tolist() == ["done", "failed"] and "ArithmeticError" in table.error[1]


@pytest.mark.slow
def test_the_page_on_clusters_tells_the_truth(cluster, tmp_path, monkeypatch):
    """Its two cells, run as a script is: the second finds what the first has finished, and brings what is missing."""
    page = (Path(__file__).parents[1] / "docs/cluster.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(first.replace("range(2)", "range(1)"), names)
    assert names["table"].shape[0] == 4 and names["table"].accuracy.between(0.2, 1).all()  # guessing gives 0.1
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*-*.json")}
    assert "10.0.0.5:8786" in second
    exec(second.replace("tcp://10.0.0.5:8786", cluster.scheduler_address), names)
    names["client"].close()
    assert names["table"].shape[0] == 8 and set(names["table"].status) == {"done"}
    assert all(path.stat().st_mtime_ns == when for path, when in written.items()) and len(written) == 4
