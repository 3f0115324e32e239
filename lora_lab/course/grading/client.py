"""The grader's side of the jail: starts the warm server, hands it jobs, reads replies under a cap and a deadline, checks their form."""

from __future__ import annotations

import atexit
import json
import math
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ... import files
from ..runner import Answers, Error, Where
from ..script import Script
from .submissions import LARGEST

PACKAGE = Path(__file__).resolve().parents[2]
PLAIN = 2 << 20  # bytes of JSON in a reply; arrays travel beside it. A megabyte of "[]" unfolds to forty
START_SECONDS = 300  # importing torch on a busy machine
BOOT = "import sys; sys.path.insert(0, sys.argv[1]); import inside.server as s; sys.path.remove(sys.argv[1]); s.main(int(sys.argv[2]))"
STUB = '''"""The student's calls, as far as grading needs them: nothing is shown, recorded or lent here."""


def check(id, student=None, *more, **named):
    return None


hint = progress = calibration = export_progress = check


def use(id, student=None, *more, **named):
    return student


class _Guess:
    value = sure = None

    def reveal(self, *outcome, **named):
        return None


def predict(id, *value, **named):
    return _Guess()
'''


@dataclass(frozen=True)
class Limits:
    """What one exercise of one student may use. Sizes in bytes, times in seconds.

    `case` is for one run of the student's object, twice what the notebook allows; `exercise` for all of them together, by the clock,
    and `cpu` of processor time; `memory` beyond what Python and torch already take, for all its processes together; `reply`: of one answer."""

    case: float = 10.0
    exercise: float = 40.0
    cpu: int = 40
    memory: int = 1 << 30
    disk: int = 32 << 20
    reply: int = 32 << 20
    processes: int = 32
    open_files: int = 128
    notebook: int = LARGEST


class JobFailed(Exception):
    """The child broke a rule or died. kind: "time", "died", "memory", "reply"; the message is for the student."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class StartFailed(RuntimeError):
    """The server does not start; the message holds what it said."""


class Server:
    """One warm server. Not for several threads at once; each worker process has its own (`warm_server`)."""

    def __init__(self, limits: Limits | None = None, way: str = "best", base: str | None = None):
        self.limits, self.way = limits or Limits(), way
        # A user that nobody is, another one for each server: limits on processes are counted per user.
        self.uid = 2_000_000_000 + os.getpid() % 90_000_000
        # A worker process may be ended without ceremony: inside the caller's own folder nothing of it is left behind.
        self.folder = Path(tempfile.mkdtemp(prefix="lora-lab-grading-", dir=base if base and os.path.isdir(base) else None))
        self.process: subprocess.Popen | None = None
        self.start()

    # -------------------------------------------------------- life

    def start(self) -> None:
        if not hasattr(os, "fork") or not hasattr(socket, "send_fds"):
            raise StartFailed("grading needs Linux or macOS (on Windows: WSL), because students' code runs in forked processes")
        os.chmod(self.folder, 0o755)
        lab = self.folder / "lab"
        if not lab.exists():
            stripped_lab(lab)
            (self.folder / "root").mkdir()
            os.chmod(self.folder / "root", 0o711)
        ours, theirs = socket.socketpair()
        errors = open(self.folder / "server.log", "w+b")
        environment = {
            "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "2", "PYTHONHASHSEED": "0", "USER": "student", "MPLBACKEND": "agg", "LORA_LAB_HEADLESS": "1",
            "IPYTHONDIR": "/nonexistent", "HOME": "/nonexistent",
        }  # fmt: skip
        with theirs, errors:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", BOOT, str(Path(__file__).parent), str(theirs.fileno())],
                env=environment, cwd="/", pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=errors, start_new_session=True,
            )  # fmt: skip
        self.control = ours
        try:
            config = self._config(lab)
            self.shown = {Path(outside) for outside, _ in config["show"]}  # what of this system the jail holds
            _send(ours, json.dumps(config).encode(), time.monotonic() + START_SECONDS)
            self.report = json.loads(_receive(ours, 1 << 20, time.monotonic() + START_SECONDS))
        except (JobFailed, OSError, ValueError) as error:
            said = (self.folder / "server.log").read_text(errors="replace")[-2000:]
            self.close()
            raise StartFailed(f"the grading server did not start ({error}). It said:\n{said}") from None

    def close(self) -> None:
        if self.process is not None:
            self.control.close()  # it ends by itself, and its children with it
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _restart(self) -> None:
        self.control.close()
        self.process.kill()
        self.process.wait()
        self.start()

    def _config(self, lab: Path) -> dict:
        python = [sysconfig.get_path("stdlib"), *(p for p in sys.path if p.endswith("lib-dynload"))]
        sites = [p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))]
        sites += [sysconfig.get_path(name) for name in ("purelib", "platlib")]
        python = _unique(python)
        sites = _unique(sites)
        libraries = [os.path.join(sys.base_prefix, "lib"), "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib"]
        system = [*libraries, "/etc/ld.so.cache", "/etc/alternatives", "/usr/share/zoneinfo",
                  "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"]  # fmt: skip  (torch chooses its kernels by these)
        devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
        seen = [p for p in dict.fromkeys([*python, *sites, *system, *devices]) if os.path.lexists(p)]
        seen = sorted(p for p in seen if not any(p != other and p.startswith(other + "/") for other in seen))
        hide = [os.path.join(site, "lora_lab") for site in sites if os.path.isdir(os.path.join(site, "lora_lab"))]
        data = files.shipped("")
        inside = lab / "lora_lab" / "shipped" if data.parent == PACKAGE else lab / "data"
        if not inside.exists():
            inside.symlink_to(data) if self.way in ("landlock", "limits") else inside.mkdir()
        landlock = [[p, "files"] for p in [*python, *system, str(lab), str(data)]]
        for site in sites:
            if os.path.join(site, "lora_lab") in hide:
                landlock += [[site, "names"], *([entry.path, "files"] for entry in os.scandir(site) if entry.name != "lora_lab")]
            else:
                landlock.append([site, "files"])
        return {
            "show": [*([p, p] for p in seen), [str(lab), str(lab)], [str(data), str(inside)]], "hide": hide, "landlock": landlock,
            "root": str(self.folder / "root"), "path": [str(lab), *python, *sites], "uid": self.uid,
            "others_can_read": all(map(_others_can_read, [*python, *sites, str(lab)])),
            "way": self.way, "limits": asdict(self.limits),
        }  # fmt: skip

    # -------------------------------------------------------- jobs

    def job(self, kind: str, patience: float = 1.0, **content) -> Job:
        return Job(self, {"kind": kind, **content}, patience)

    def read(self, data: bytes, exercises: dict[str, str]) -> dict:
        """See inside.reading.read; {"unreadable": why} where it cannot be read. Never raises because of the notebook."""
        skip: list[int] = []
        if len(data) > self.limits.notebook:
            return {"unreadable": f"the file has {len(data) >> 20} MB; {self.limits.notebook >> 20} MB can be read"}
        for attempt in range(6):
            last = None
            try:
                with self.job("read", exercises=exercises, skip=skip, careful=attempt > 0) as job:
                    job.send(data)
                    while True:
                        found = json.loads(job.receive())
                        if isinstance(found, dict):
                            return found
                        last = found
            except JobFailed:
                # Python's parser went down with it: find the cell, leave it out
                if attempt > 0 and last is None:
                    break
                skip += [] if last is None else [last]
        return {"unreadable": "the file takes too much time or memory to read, or Python's parser fails on it"}


class Job:
    """One child. `with server.job("exercise", ...) as job: job.send(...); job.receive()`; leaving the block ends the child and all it started."""

    def __init__(self, server: Server, content: dict, patience: float = 1.0):
        self.server, self.limits = server, server.limits
        # Runs only while the grader waits for the child: what probes and judges take is not the student's time.
        self.left = self.limits.exercise * patience
        self.ended: dict | None = None
        if server.process.poll() is not None:  # something from outside ended it, a lack of memory perhaps
            server._restart()
        self.channel, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(server.control, [b"job "], [theirs.fileno()])
        trouble = self.receive()
        if trouble:
            self.end()
            raise StartFailed(f"a child could not be walled in: {trouble.decode(errors='replace')}")
        self.send(json.dumps(content).encode())

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error) -> None:
        self.end()

    def send(self, data: bytes) -> None:
        self._guarded(lambda deadline: _send(self.channel, data, deadline, self._watch))

    def receive(self, cap: int | None = None) -> bytes:
        return self._guarded(lambda deadline: _receive(self.channel, cap or self.limits.reply, deadline, self._watch))

    def _guarded(self, action):
        began = time.monotonic()
        try:
            return action(began + self.left)
        except JobFailed as failure:
            self.end(grace=2.0 if failure.kind == "died" else 0.0)
            if failure.kind == "died" and self.ended and not self.ended["killed"]:
                if self.ended["cpu"] >= self.limits.cpu:
                    raise JobFailed("time", f"your code used more than {self.limits.cpu} seconds of processor time") from None
                raise JobFailed("died", f"the process that ran your code ended ({_how(self.ended['status'])})") from None
            raise
        finally:
            self.left -= time.monotonic() - began

    def _watch(self) -> None:
        """Called while waiting: the memory of all its processes together, which no single limit counts."""
        used = _memory_below(self.server.process.pid)
        if used > self.limits.memory:
            raise JobFailed("memory", f"your code used more than {self.limits.memory >> 20} MB of memory")

    @property
    def starved(self) -> bool:
        """Whether it got less than half of a core while it ran: the machine was busy, or the code slept. Known after its end."""
        return self.ended is not None and self.ended["cpu"] < 0.5 * self.ended["seconds"]

    def end(self, grace: float = 0.0) -> dict:
        """Wait `grace` seconds for an end of its own, so that the report can say which; kill what is left and wait until it is gone.
        -> {"status", "killed", "clean", "seconds", "cpu", "memory"}"""
        if self.ended is None:
            self.channel.close()
            try:
                if not (grace and select.select([self.server.control], [], [], grace)[0]):
                    self.server.control.send(b"kill")
                self.ended = json.loads(_receive(self.server.control, 1 << 16, time.monotonic() + 20))
                if not self.ended["clean"]:
                    raise ValueError("processes are left")
            except (JobFailed, OSError, ValueError):
                self.ended = {"status": -1, "killed": True, "clean": False, "seconds": 0.0, "cpu": 0.0, "memory": 0}
                self.server._restart()
        return self.ended


# ---------------------------------------------------------------- frames, under a cap and a deadline


def _send(channel: socket.socket, data: bytes, deadline: float, watch=lambda: None) -> None:
    rest = memoryview(struct.pack("<Q", len(data)) + data)
    while rest:
        _wait(channel, deadline, watch, write=True)
        try:
            rest = rest[channel.send(rest, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            continue
        except OSError:
            raise JobFailed("died", "the process that ran your code ended") from None


def _receive(channel: socket.socket, cap: int, deadline: float, watch=lambda: None) -> bytes:
    (size,) = struct.unpack("<Q", _exactly(channel, 8, deadline, watch))
    if size > cap:
        raise JobFailed("reply", f"the answers of your code are larger than {cap >> 20} MB")
    return _exactly(channel, size, deadline, watch)


def _exactly(channel: socket.socket, size: int, deadline: float, watch) -> bytes:
    parts, missing = [], size
    while missing:
        _wait(channel, deadline, watch, write=False)
        try:
            part = channel.recv(min(missing, 1 << 20), socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        except OSError:
            part = b""
        if not part:
            raise JobFailed("died", "the process that ran your code ended")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _wait(channel: socket.socket, deadline: float, watch, write: bool) -> None:
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise JobFailed("time", "your code was still running when its time was up")
        ready = select.select([] if write else [channel], [channel] if write else [], [], min(left, 0.2))
        if ready[0] or ready[1]:
            return
        watch()


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"signal {signal.Signals(number).name}" if number in signal.Signals._value2member_map_ else f"signal {number}"
    return "it left Python by itself"


def _memory_below(pid: int) -> int:
    """Bytes in use by the processes below `pid`, pages that they share counted once; 0 where the system does not say."""
    total = 0
    try:
        todo = [pid]
        while todo:
            one = todo.pop()
            for thread in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{thread}/children") as file:
                    below = [int(number) for number in file.read().split()]
                todo += below
            if one != pid:
                total += _private(one)
    except OSError:
        pass
    return total


def _private(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("Private_Dirty:", "Swap:")))
    except (OSError, ValueError, IndexError):
        return 0


def _others_can_read(path: str) -> bool:
    return all(os.stat(folder).st_mode & 0o1 for folder in [path, *map(str, Path(path).parents)])


def _unique(paths) -> list[str]:
    return list(dict.fromkeys(os.path.realpath(p) for p in paths if p and os.path.isdir(p)))


def stripped_lab(folder: Path) -> None:
    """A copy of the lab's module for the jail: what students import, with the driver, without labs, judges, hints and grading."""
    def left_out(where, names):
        inside = Path(where) == PACKAGE
        return [name for name in names if name == "__pycache__" or (inside and name in ("course", "shipped", "__main__.py"))]

    shutil.copytree(PACKAGE, folder / "lora_lab", ignore=left_out)
    course = folder / "lora_lab" / "course"
    course.mkdir()
    for name in ("exercise.py", "script.py", "runner.py"):
        shutil.copy(PACKAGE / "course" / name, course / name)
    (course / "__init__.py").write_text(STUB, encoding="utf-8")
    for path in [folder, *folder.rglob("*")]:  # readable for another user, whatever the umask is here
        os.chmod(path, 0o755 if path.is_dir() else 0o644)


# ---------------------------------------------------------------- what came back


def answers_from(data: bytes, script: Script) -> Answers:
    """The answers in a reply, after a check of their form. Raises JobFailed("reply"): student code can write anything into this channel."""
    try:
        if int.from_bytes(data[:8], "little") > PLAIN:
            raise ValueError("too much text")
        answers = Answers.from_bytes(data)
        asked = _asked(script.operations)
        if not set(answers) <= asked:
            raise ValueError("answers to what was not asked")
        for value in answers.values():
            _plain(value, 0)
        return Answers(
            dict(answers), {str(k): str(v)[:20] for k, v in answers.dtypes.items() if isinstance(v, str)}, _error(answers.error),
            [name for name in answers.changed_inputs if name in script.inputs], answers.returned_none is True, _seconds(answers.seconds),
        )  # fmt: skip
    except Exception as error:
        raise JobFailed("reply", f"what came back are not answers ({type(error).__name__})") from None


def _asked(operations) -> set[str]:
    names = set()
    for operation in operations:
        if operation["op"] == "send":
            names.add(operation["name"])
        elif operation["op"] == "attempt":
            names |= {operation["name"], operation["name"] + ".message"} | _asked(operation["operations"])
    return names


def _plain(value, depth: int) -> None:
    if depth > 8:
        raise ValueError("nested too deeply")
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise ValueError("no numbers")
    elif isinstance(value, str):
        if len(value) > 100_000:
            raise ValueError("a text too long")
    elif isinstance(value, (list, dict)):
        if len(value) > 10_000:
            raise ValueError("too many")
        for item in value.values() if isinstance(value, dict) else value:
            _plain(item, depth + 1)
    elif value is not None and type(value) not in (bool, int, float):
        raise ValueError("not plain")


def _error(error: Error | None) -> Error | None:
    if error is None:
        return None
    if error.kind not in ("not started", "time", "exception", "answer"):
        raise ValueError("no such error")
    where = error.where
    if where is not None:
        where = Where(str(where.function)[:100], int(where.line), str(where.text)[:300], str(where.file)[:100])
    return Error(error.kind, str(error.type)[:100], str(error.message)[:700], where)


def _seconds(value) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0 else 0.0


# ---------------------------------------------------------------- one per process

_servers: dict[tuple, Server] = {}


def warm_server(limits: Limits, way: str = "best", base: str | None = None) -> Server:
    """This process's server, started at the first call; a fork of this process starts its own. base: a folder for what it needs on disk."""
    key = (os.getpid(), limits, way, base)
    if key not in _servers:
        if not _servers:
            atexit.register(_close_all)
        _servers[key] = Server(limits, way, base)
    return _servers[key]


def _close_all() -> None:
    for (pid, *_), server in list(_servers.items()):
        if pid == os.getpid():
            server.close()
    _servers.clear()


@contextmanager
def base_folder():
    """A folder for the servers of one grading, removed with the servers of this process at the end."""
    with tempfile.TemporaryDirectory(prefix="lora-lab-grading-", ignore_cleanup_errors=True) as base:
        os.chmod(base, 0o711)
        try:
            yield base
        finally:
            for key in [key for key in _servers if key[-1] == base]:
                _servers.pop(key).close()
