"""What gives nothing away: each attack here would pay if it worked, and earns no point; and the next student is graded as ever.

Many attacks are written as: try something forbidden; if it works, give the right answer, else a wrong one. So a wall that falls shows as
full marks, and not only as an exception that somebody swallowed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from grading_tools import HEAD, RIGHT, answer, close_all, code, grade, notebook, only, server_for, strong

from lora_lab.course.grading import client, marks, walls

WRONG = "    return x @ W.T"
PAYS = "    return x @ W.T + (alpha / r) * (x @ A.T) @ B.T + (0 if b is None else b)"
SIGNATURE = "def lora_forward(x, W, b, A, B, alpha, r):\n"


@pytest.fixture(scope="module", autouse=True)
def servers():
    yield
    close_all()


def attack(body: str, *before: str, server=None) -> dict:
    """Marks of an answer whose body is `body`, after the statements `before`; then an honest one must get its points."""
    marks = grade(answer("2.1", *before, SIGNATURE + body), server=server)
    honest = grade(answer("2.1", RIGHT["2.1"]), server=server)
    assert honest["points"] == 2, honest["exercises"]
    return marks


def if_possible(*lines: str) -> str:
    """`lines` set `won`; the answer is right if they did."""
    inner = "\n".join("        " + line for line in lines)
    return f"    won = False\n    try:\n{inner}\n    except BaseException:\n        pass\n    if not won:\n    {WRONG}\n{PAYS}"


def test_the_attacks_would_pay():
    assert attack(if_possible("won = True"))["points"] == 2
    assert attack(if_possible("open('/no/such/file')", "won = True"))["points"] == 0


# ---------------------------------------------------------------- the judge's tools, bent


def test_patched_comparisons_and_builtins():
    before = """
import builtins
torch.allclose = torch.equal = torch.isclose = lambda *a, **k: True
np.allclose = np.array_equal = np.isfinite = lambda *a, **k: True
torch.testing.assert_close = lambda *a, **k: None
builtins.abs = builtins.max = lambda *a, **k: 0
builtins.any = lambda *a: False
builtins.all = builtins.isinstance = lambda *a: True
AssertionError.__init__ = None
""".strip()
    assert attack(WRONG, *before.splitlines())["points"] == 0


def test_the_engine_patched_in_its_own_process():
    before = """
import lora_lab.course.runner
import lora_lab.course.exercise
import sys
sys.modules["lora_lab.course.exercise"].compare = lambda *a, **k: None
sys.modules["lora_lab.course.runner"]._failure = lambda *a, **k: None
sys.modules["lora_lab.course.runner"].examine = lambda *a, **k: True
sys.modules["lora_lab.course.runner"].Examination.passed = True
""".strip()
    assert attack(WRONG, *before.splitlines())["points"] == 0


LIARS = {
    "tensor": """
class Liar(torch.Tensor):
    def __eq__(self, other): return torch.ones_like(self, dtype=torch.bool)
    __ne__ = __lt__ = __gt__ = lambda self, other: torch.zeros_like(self, dtype=torch.bool)
    def __sub__(self, other): return self * 0
    __rsub__ = __sub__
    @classmethod
    def __torch_function__(cls, f, types, args=(), kwargs=None): return True
""",
    "array": """
class Liar(np.ndarray):
    def __array_ufunc__(self, *a, **k): return True
    def __eq__(self, other): return True
""",
    "number": """
class Liar(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    __rsub__ = __abs__ = __sub__
""",
}
MADE = {"tensor": "(x @ W.T).as_subclass(Liar)", "array": "(x @ W.T).detach().numpy().view(Liar)", "number": "Liar(0)"}


@pytest.mark.parametrize("kind", LIARS)
def test_lying_subclasses(kind):
    assert attack(f"    return {MADE[kind]}", LIARS[kind])["points"] == 0


def test_import_and_ast_hooks():
    hook = """
class Hook:
    def find_spec(self, name, path=None, target=None): return None
    def __call__(self, *a, **k): return True
""".strip()
    before = [hook, "import ast", "import sys", "import builtins", "sys.meta_path[:0] = [Hook()]",
              "sys.path_hooks[:0] = [Hook()]", "ast.NodeVisitor.visit = Hook()",
              "builtins.compile = Hook()", "sys.modules['json'] = Hook()"]  # fmt: skip
    assert attack(WRONG, *before)["points"] == 0


# ---------------------------------------------------------------- ends and beginnings


@pytest.mark.parametrize("way", ["sys.exit(0)", "os._exit(0)", "os.abort()", "os.kill(os.getpid(), 9)", "raise SystemExit",
                                 "raise KeyboardInterrupt", "os.close(3)", "os.closerange(0, 99)"])  # fmt: skip
def test_leaving(way):
    assert attack(f"    {way}\n{WRONG}", "import os", "import sys")["points"] == 0


def test_leaving_while_it_is_defined():
    decorated = "@(lambda f: __import__('os')._exit(0))\n" + RIGHT["2.1"]
    found = grade(notebook(HEAD, decorated))
    assert found["points"] == 0 and found["exercises"]["2.1"]["broke"] == "died"


@pytest.mark.parametrize("target", ["os.getppid()", "-1", "0", "1", "HOST"])
def test_signals_to_others(target):
    waiting = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(900)"], start_new_session=True)
    try:
        number = str(waiting.pid) if target == "HOST" else target
        assert attack(if_possible("import os", f"os.kill({number}, 9)", f"won = {number} != 1"))["points"] == 0
        assert waiting.poll() is None
    finally:
        waiting.kill()
        waiting.wait()


def processes_of(server) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.stat(f"/proc/{entry}").st_uid == server.uid:
                found.append(int(entry))
        except OSError:
            pass
    return found


def test_nothing_survives_its_exercise():
    server = strong()
    body = "    import os, threading, time\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(60)\n        os._exit(0)\n"
    body += "    threading.Thread(target=time.sleep, args=(60,), daemon=False).start()\n"
    began = time.monotonic()
    assert attack(body + PAYS, server=server)["points"] == 2  # odd, but right
    assert time.monotonic() - began < 30
    if server.report["way"] == "root":
        assert processes_of(server) == []
    assert client._memory_below(server.process.pid) == 0  # nothing but the server


def test_a_fork_bomb(monkeypatch):
    server = strong()
    monkeypatch.setattr(marks, "PATIENCE", 1.0)
    began = time.monotonic()
    found = attack("    import os\n    while True:\n        try: os.fork()\n        except OSError: pass\n", server=server)
    assert found["points"] == 0 and found["exercises"]["2.1"]["status"] == "time"
    assert time.monotonic() - began < 4 * server.limits.exercise
    assert client._memory_below(server.process.pid) == 0


# ---------------------------------------------------------------- floods


def test_memory_of_one_process():
    found = attack("    import numpy as np\n    hoard = [np.ones(1 << 28) for _ in range(9)]\n" + PAYS)  # 2 GB each
    assert found["points"] == 0 and found["exercises"]["2.1"]["status"] == "failed"


def test_memory_of_many_processes():
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("the system does not say how much memory a process has")
    body = """    import os, time
    for _ in range(12):
        if os.fork() == 0:
            hoard = bytearray(os.urandom(1 << 20)) * 200
            time.sleep(60)
            os._exit(0)
    time.sleep(60)
"""
    found = attack(body, server=strong())
    assert found["points"] == 0 and found["exercises"]["2.1"]["broke"] == "memory", found["exercises"]["2.1"]


def test_disk():
    server = strong()
    body = if_possible(
        "import os", "total = 0", "for n in range(64):", "    with open(f'f{n}', 'wb') as f:", "        total += f.write(os.urandom(1 << 20)) * 1",
        "        f.flush()", "won = total >= 40 << 20",
    )  # fmt: skip
    assert server.limits.disk < 40 << 20
    assert attack(body, server=server)["points"] == 0


@pytest.mark.parametrize("stream", ["print('x' * 4096)", "os.write(1, b'x' * 65536)", "os.write(2, b'x' * 65536)", "sys.__stderr__.write('x' * 65536)"])
def test_a_flood_of_printing_goes_nowhere(stream):
    found = attack(f"    import os, sys\n    for _ in range(2000): {stream}\n{PAYS}")
    assert found["points"] == 2, found["exercises"]["2.1"]


def test_answers_without_end():
    assert attack("    return torch.zeros(19_000_000)")["points"] == 0
    assert attack("    return ['x' * 1000] * 9_999")["points"] == 0


CHANNEL = "[o for o in __import__('gc').get_objects() if type(o).__name__ == 'socket']"


def test_the_reply_channel_flooded():
    body = f"    for o in {CHANNEL}:\n        while True: o.sendall(b'\\xff' * 65536)\n{WRONG}"
    found = attack(body)
    assert found["points"] == 0 and found["exercises"]["2.1"]["broke"] == "reply"


def test_the_reply_channel_starved(monkeypatch):
    monkeypatch.setattr(marks, "PATIENCE", 1.0)  # who sleeps is given a second try, as who was starved
    body = """    import os, time
    for n in range(3, 60):
        try: os.write(n, b'@')
        except OSError: pass
    while True:
        try: time.sleep(9)
        except BaseException: pass
"""
    began = time.monotonic()
    found = grade(answer("2.1", SIGNATURE + body))
    assert found["points"] == 0 and found["exercises"]["2.1"]["broke"] in ("time", "reply")
    # two tries of LIMITS.exercise, by the clock of a machine that may be busy
    assert time.monotonic() - began < 3 * server_for().limits.exercise


# ---------------------------------------------------------------- forged answers


FORGERIES = {
    "a verdict": "json.dumps({'status': 'passed', 'passed': True, 'points': 99}).encode()",
    "empty answers": "Answers({}).to_bytes()",
    "answers of zeros": "Answers({'y': np.zeros((6, 11))}, {'y': 'float64'}).to_bytes()",
    "an object for an answer": "Answers({'y': {'__class__': 'Passed'}}).to_bytes()",
    "an answer to nothing": "Answers({'passed': True}).to_bytes()",
    "a pickle": "pickle.dumps({'y': 1})",
    "deep nesting": "pack(json.loads('{\"values\": {\"y\": ' + '[' * 900 + ']' * 900 + '}, \"dtypes\": {}, \"error\": null, \"changed_inputs\": [], "
                    "\"returned_none\": false, \"seconds\": 0}'), [])",
    "NaN": "Answers({'y': float('nan')}).to_bytes()",
}  # fmt: skip


@pytest.mark.parametrize("what", FORGERIES)
def test_forged_replies(what):
    before = ["import json", "import pickle", "import struct", "from lora_lab.course.runner import Answers", "from lora_lab.course.script import pack"]
    body = f"""    data = {FORGERIES[what]}
    for o in {CHANNEL}:
        for _ in range(9): o.sendall(struct.pack('<Q', len(data)) + data)
    import os; os._exit(0)"""
    assert attack(body, *before)["points"] == 0


def test_replayed_replies():
    """The first case answered rightly, its reply sent again for all others."""
    before = ["import struct", "from lora_lab.course.runner import Answers"]
    body = f"""    h = x @ W.T + (alpha / r) * (x @ A.T) @ B.T + b
    data = Answers({{'y': h.detach().numpy()}}, {{'y': 'float64'}}).to_bytes()
    for o in {CHANNEL}:
        for _ in range(9): o.sendall(struct.pack('<Q', len(data)) + data)
    import os; os._exit(0)"""
    found = attack(body, *before)
    assert found["points"] == 0
    cases = [passed for _, passed in found["exercises"]["2.1"]["cases"]]
    assert cases[0] is True and not any(cases[1:2])  # the forgery itself is well made


def test_the_status_of_the_start_cannot_be_forged_into_points():
    before = ["import json", "import struct"]
    decorator = f"""
def forge(f):
    data = json.dumps({{"status": "passed", "points": 99}}).encode()
    for o in {CHANNEL}:
        o.sendall(struct.pack('<Q', len(data)) + data)
    return f
""".strip()
    assert grade(answer("2.1", *before, decorator, "@forge\n" + SIGNATURE + WRONG))["points"] == 0


# ---------------------------------------------------------------- reading what is not one's own


def secrets_outside(tmp_path) -> list[str]:
    root = Path(client.__file__).resolve().parents[3]
    neighbour = tmp_path / "submitted" / "bob" / "02_lora_layer" / "02_lora_layer.ipynb"
    neighbour.parent.mkdir(parents=True)
    neighbour.write_text("{}")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "seed.json").write_text("{}")
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    return [str(p) for p in (
        neighbour, tmp_path / "results" / "seed.json", root / "lora_lab/course/labs/lab02.py", root / "lora_lab/course/grading/marks.py",
        root / "tests/mutants/lab02.py", root / "notebooks/source/02_lora_layer.py", "/etc/passwd-", "/etc/shadow", "/etc/hostname",
    )]  # fmt: skip


@pytest.mark.parametrize("way", ["best", "user", "landlock"])
def test_other_files(tmp_path, way):
    server = server_for(way)
    paths = [*secrets_outside(tmp_path), f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/cmdline", "/proc/1/cmdline", "/proc/self/environ"]
    assert sum(os.path.exists(path) for path in paths) >= 8
    folders = [str(tmp_path), str(Path(client.__file__).parent), "/", "/home", "/tmp"]
    body = f"""    found = []
    import os
    for path in {paths!r}:
        try: found.append(open(path, 'rb').read(1))
        except OSError: pass
    for folder in {folders!r}:
        try: found.append(open(os.path.join(folder, 'mine'), 'w').close())
        except OSError: pass
    if not found:
    {WRONG}
{PAYS}"""
    assert grade(answer("2.1", SIGNATURE + body), server=server)["points"] == 0
    own = "    open('mine', 'w').write('x')\n    import tempfile\n    tempfile.TemporaryFile().write(b'x')\n"
    assert grade(answer("2.1", SIGNATURE + own + PAYS), server=server)["points"] == 2  # the own folder is there


def test_links_and_odd_ways_to_files(tmp_path):
    path = secrets_outside(tmp_path)[2]
    attack_lines = ["import os", f"os.symlink({path!r}, 'link')", "won = bool(open('link').read())"]
    assert attack(if_possible(*attack_lines))["points"] == 0
    assert attack(if_possible("import os", "won = len(os.listdir('/proc')) > 9"))["points"] == 0


@pytest.mark.parametrize("name", ["lora_lab.course.labs", "lora_lab.course.labs.lab02", "lora_lab.course.grading.marks", "lora_lab.course.checks",
                                  "lora_lab.__main__", "mutants.lab02"])  # fmt: skip
def test_importing_answers_and_grading(name):
    assert attack(if_possible(f"import {name}", "won = True"))["points"] == 0


def test_the_environment(monkeypatch):
    monkeypatch.setenv("LORA_LAB_SECRET_OF_A_TEST", "1")
    assert attack(if_possible("import os", "won = 'LORA_LAB_SECRET_OF_A_TEST' in os.environ"))["points"] == 0
    assert attack(if_possible("import os", "won = any('KEY' in n or 'TOKEN' in n or 'SECRET' in n for n in os.environ)"))["points"] == 0


def test_frames_and_gc():
    """Judges, oracles, seeds and other students' answers are nowhere in the process's memory."""
    by_gc = ["import gc", "from lora_lab.course.exercise import Exercise, Case",
             "found = [o for o in gc.get_objects() if type(o) in (Exercise, Case)]", "names = ('lora_output', '_forward_judge', 'inputs_seed')",
             "won = bool(found) or any(getattr(o, '__name__', '') in names for o in gc.get_objects())"]  # fmt: skip
    assert attack(if_possible(*by_gc))["points"] == 0
    by_frames = ["import sys", "frame, names = sys._getframe(), set()", "while frame:", "    names |= set(frame.f_locals) | set(frame.f_globals)",
                 "    frame = frame.f_back", "won = bool(names & {'judge', 'examine_seed', 'secret', 'expected', 'exercise', 'submission'})"]  # fmt: skip
    assert attack(if_possible(*by_frames))["points"] == 0


def test_no_descriptor_but_the_own_channel():
    lines = ["import os, stat", "kinds = []", "for n in range(256):", "    try: kinds.append((n, os.fstat(n).st_mode))", "    except OSError: pass",
             "won = sum(stat.S_ISSOCK(mode) for _, mode in kinds) != 1 or any(stat.S_ISREG(mode) or stat.S_ISDIR(mode) for _, mode in kinds)"]  # fmt: skip
    assert attack(if_possible(*lines))["points"] == 0


@pytest.mark.parametrize("way", ["best", "user", "landlock"])
def test_sockets(way):
    server = server_for(way)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        lines = ["import socket", "s = socket.socket()", "s.settimeout(2)", f"s.connect(('127.0.0.1', {port}))", "won = True"]
        assert grade(answer("2.1", SIGNATURE + if_possible(*lines)), server=server)["points"] == 0
    assert grade(answer("2.1", SIGNATURE + if_possible("import socket", "socket.socket(socket.AF_UNIX)", "won = True")), server=server)["points"] == 0


@pytest.mark.parametrize("call", ["subprocess.run(['/bin/true'], check=True)", "os.execv('/bin/true', ['true'])", "os.chroot('/')",
                                  "ctypes.CDLL(None).unshare(0x10000000) == 0 or 1/0", "os.mkfifo('/x')", "os.setuid(0) or 1/0 if os.getuid() else 1/0",
                                  "ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0 or 1/0"])  # fmt: skip
def test_kernel_interfaces(call):
    assert attack(if_possible("import os, subprocess, ctypes", call, "won = True"), server=strong())["points"] == 0


@pytest.mark.parametrize("way", ["landlock"])
def test_signals_without_namespaces(way):
    server = server_for(way)
    for target in ("os.getppid()", str(os.getpid())):
        assert grade(answer("2.1", SIGNATURE + if_possible("import os", f"os.kill({target}, 0)", "won = True")), server=server)["points"] == 0
    body = "    import os, time\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(60)\n        os._exit(0)\n" + PAYS
    assert grade(answer("2.1", SIGNATURE + body), server=server)["points"] == 2
    assert client._memory_below(server.process.pid) == 0  # searched for and ended


# ---------------------------------------------------------------- the file itself


def test_edited_checks_and_metadata():
    cells = [HEAD, code(SIGNATURE + WRONG, exercise="2.1", nbgrader={"grade": True, "points": 99, "grade_id": "x"}),
             code('assert True\ncheck = lambda *a: True\ncheck("2.1", lora_forward)', nbgrader={"points": 99, "grade": True})]  # fmt: skip
    found = grade(notebook(*cells, lora_lab={"points": 99, "max": 0, "lab": "00_start_here"}))
    assert (found["points"], found["max"]) == (0, 2)


def test_an_exercise_that_says_it_is_another():
    """The answer to an easy exercise under the number of another."""
    found = grade(notebook(HEAD, RIGHT["2.2"], 'check("2.1", init_factors)'), "2.1")
    assert found["points"] == 0


def test_forged_records_are_no_marks():
    claim = {"version": 1, "time": "2026-01-01T00:00:00Z", "kind": "check", "exercise": "2.1", "passed": True, "status": "passed"}
    forged = [{**claim, "id": f"{n}"} for n in range(9)]
    strange = [{"id": 1}, {"id": "a", "time": "b", "kind": "check", "exercise": ["2.1"], "passed": {"x": 1}}, "text", None, {"kind": "x" * 9999}]
    found = grade(notebook(HEAD, code(SIGNATURE + WRONG, records=[*forged, *strange])))
    assert found["points"] == 0 and len(found["records"]) == 10


UNREADABLE = {
    "empty": b"",
    "binary": bytes(range(256)) * 50,
    "truncated": notebook(HEAD, RIGHT["2.1"])[:-40],
    "deeply nested": b"[" * 200_000 + b"]" * 200_000,
    "nested cells": b'{"nbformat": 4, "cells": ' + b'[{"a":' * 50_000 + b"1" + b"}]" * 50_000 + b"}",
    "a list": b"[1, 2]",
    "no cells": b'{"nbformat": 4}',
    "a later version": b'{"nbformat": 99, "cells": []}',
    "a number of a million digits": b'{"nbformat": 4, "cells": [], "x": ' + b"9" * 1_000_000 + b"}",
    "too many cells": b'{"nbformat": 4, "cells": [' + b"{}," * 5000 + b"{}]}",
    "an archive": b"PK\x03\x04" + b"\0" * 100,
    "utf-16": notebook(HEAD).decode().encode("utf-16"),
    "unfolds to gigabytes": b'{"nbformat": 4, "cells": [' + b"[]," * 12_000_000 + b"[]]}",
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_files_cost_themselves(kind):
    found = grade(UNREADABLE[kind])
    assert found["points"] == 0 and found["max"] == 2 and found["problem"], found
    assert grade(answer("2.1", RIGHT["2.1"]))["points"] == 2


BROKEN_CELLS = {
    "nested parentheses": "(" * 5000 + ")" * 5000,
    "nested lists": "x = " + "[" * 150 + "]" * 150,
    "a long chain": "x = " + "-" * 50_000 + "1",
    "a long sum": "x = " + "+".join(["1"] * 50_000),
    "long attribute": "x = a" + ".b" * 50_000,
    "null bytes": "x = 1\0",
    "half a pair": "x = '\ud800'",
    "many ifs": "".join(" " * n + "if 1:\n" for n in range(99)) + " " * 99 + "pass",
    "a megabyte": "x = 1\n" * 160_000,
    "nested functions": "\n".join(" " * n + f"def f{n}():" for n in range(90)) + "\n" + " " * 90 + "pass",
    "f-strings": "x = f'{" * 100 + "1" + "}'" * 100,
    "huge power": "X = 9**9**9",
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_CELLS)
def test_cells_that_hurt_a_parser_cost_themselves(kind):
    found = grade(notebook(HEAD, BROKEN_CELLS[kind], RIGHT["2.1"]))
    assert found["points"] == 2, found


def test_reached_statements_that_never_end_cost_their_exercise(monkeypatch):
    monkeypatch.setattr(marks, "PATIENCE", 1.0)
    slow = "def slow():\n    while True: pass"
    found = grade(notebook(HEAD, slow, "k = slow()", RIGHT["2.1"].replace("alpha / r", "alpha / r * k"), RIGHT["2.2"]), "2.1", "2.2")
    assert [found["exercises"][id]["points"] for id in ("2.1", "2.2")] == [0, 2]
    assert found["exercises"]["2.1"]["status"] == "time"


# ---------------------------------------------------------------- walls are reported as they are


def test_the_report_of_the_walls(tmp_path):
    standing = {wall.name: wall for wall in walls.look(strong(), [tmp_path])}
    assert set(standing) == set(walls.NAMES)
    assert all(wall.strong for wall in standing.values()), [str(w) for w in standing.values() if not w.strong]
    walls.demand(list(standing.values()), ["all"])


def test_weaker_walls_are_said_and_refused(tmp_path):
    server = client.Server(server_for().limits, "limits")
    try:
        tmp_path.chmod(0o777)
        standing = walls.look(server, [tmp_path])
        weak = {wall.name for wall in standing if not wall.strong}
        assert {"files", "processes", "programs"} <= weak
        with pytest.raises(walls.TooWeak, match="files"):
            walls.demand(standing, ["all"])
        with pytest.raises(ValueError, match="moat"):
            walls.demand(standing, ["moat"])
        assert grade(answer("2.1", RIGHT["2.1"]), server=server)["points"] == 2
    finally:
        server.close()


def test_the_server_comes_back():
    """Killed from outside, by a lack of memory perhaps, it is started again."""
    server = client.Server(server_for().limits)
    try:
        server.process.kill()
        server.process.wait()
        assert grade(answer("2.1", RIGHT["2.1"]), server=server)["points"] == 2
    finally:
        server.close()


def test_no_secret_goes_into_the_jail(monkeypatch):
    sent = []
    original = client._send
    monkeypatch.setattr(client, "_send", lambda channel, data, *more: (sent.append(bytes(data)), original(channel, data, *more))[1])
    assert grade(answer("2.1", RIGHT["2.1"]), student="somebody@example.org")["points"] == 2
    everything = b"".join(sent)
    assert b"somebody" not in everything and marks.inputs_seed(b"s" * 32, "ada", "2.1", "x").to_bytes(8, "little") not in everything
    assert json.dumps(only("2.1").exercises[0].hints[2]).encode() not in everything
