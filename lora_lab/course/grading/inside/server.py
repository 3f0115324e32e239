"""The warm server: enters the jail, imports torch once, then forks a child for each job. It holds no secret and runs no student code.

Two channels. On the control channel the grader says "job " (with one end of a new socket) and "kill"; the server says how the child
ended. On the job's socket the grader and the child exchange frames: 8 bytes of length, then the bytes. Only the child
holds the other end, so whatever student code writes into it is taken as the answers of this one exercise and no other.

    read      notebook bytes -> see reading.read                                        nothing of it is executed
    exercise  the exercise's slice -> {"status"}; then a script -> answers, again and again       student code runs here
    probe     -> what a child can reach, tried by our own code with the walls up                  see grading.walls
"""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import types

from . import jail as walls
from . import reading, slices


def main(descriptor: int) -> None:
    control = socket.socket(fileno=descriptor)
    config = json.loads(receive(control))
    sys.dont_write_bytecode = True
    jail = walls.Jail(config)
    jail.enter()
    sys.path[:] = config["path"]
    warm()
    send(control, json.dumps({"way": jail.way, "said": jail.said, "seccomp": jail.seccomp, "landlock": jail.landlock}).encode())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the grader, who ends us by closing the channel
    while True:
        # Four bytes each: in a stream, a "kill" that came too late and the next "job " may arrive together.
        message, descriptors, _, _ = socket.recv_fds(control, 4, 1)
        if not message:
            return
        if message != b"job " or not descriptors:  # a late "kill": that child has ended by itself
            continue
        send(control, json.dumps(_job(control, jail, descriptors[0])).encode())


def warm() -> None:
    """Everything that each exercise would otherwise wait for."""
    import torch
    from IPython.core.inputtransformer2 import TransformerManager

    torch.set_num_threads(1)
    from lora_lab.course import runner, script

    TransformerManager().transform_cell("%matplotlib inline\n!true")
    (torch.zeros(64) + 1).bfloat16().float()  # looks at the processor once
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    torch.optim.Adam([weight], lr=0.0).step()  # the first optimizer imports torch's compiler; a failure there would come back in each child
    nothing = script.Script()
    nothing.send("y", nothing.call(nothing.input("x", [[1.0]])))
    runner.Answers.from_bytes(runner.run_script(script.Script.from_bytes(nothing.to_bytes()), lambda x: x * 2).to_bytes())
    reading.read(b'{"nbformat": 4, "cells": [{"cell_type": "code", "source": "f = 1"}]}', {"0.1": "f"})
    gc.collect()
    gc.freeze()  # children would copy the pages of every object that their first collection touches


def _job(control: socket.socket, jail: walls.Jail, descriptor: int) -> dict:
    folder = None if jail.pid_namespace is not None else _own_folder(jail)
    began = time.monotonic()
    pid = jail.fork()
    if pid == 0:
        channel = socket.socket(fileno=descriptor)
        try:
            try:
                jail.close_child(descriptor, folder)
            except BaseException as error:
                send(channel, f"{type(error).__name__}: {error}".encode()[:500] or b"failed")
                os._exit(1)
            send(channel, b"")  # the walls stand
            _child(channel)
        finally:
            os._exit(0)
    os.close(descriptor)
    killed = False
    ended = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    while True:
        wait = [control] + ([ended] if ended is not None else [])
        ready, _, _ = select.select(wait, [], [], None if ended is not None else 0.01)
        if control in ready:
            # "kill", or the grader is gone; the child's end is the end of its process namespace
            killed = True
            gone = not control.recv(4)
            os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            if gone:
                os._exit(0)
            break
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
    if ended is not None:
        os.close(ended)
    clean = True
    if folder is not None:
        try:
            os.killpg(pid, signal.SIGKILL)
        except OSError:
            pass
        clean = walls.sweep()
        shutil.rmtree(folder, ignore_errors=True)
    return {"status": status, "killed": killed, "clean": clean, "seconds": time.monotonic() - began,
            "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss}  # fmt: skip


def _own_folder(jail: walls.Jail) -> str:
    folder = tempfile.mkdtemp(prefix="exercise-", dir=jail.config["root"])
    if os.geteuid() == 0 and jail.config["others_can_read"]:
        os.chown(folder, jail.config["uid"], jail.config["uid"])
    return folder


# ---------------------------------------------------------------- in the child


def _child(channel: socket.socket) -> None:
    job = json.loads(receive(channel))
    kind = job.pop("kind")
    {"read": _read, "exercise": _exercise, "probe": _probe}[kind](channel, **job)


def _read(channel, exercises, skip, careful) -> None:
    data = receive(channel)
    at = (lambda number: send(channel, b"%d" % number)) if careful else (lambda number: None)
    try:
        found = reading.read(data, exercises, skip, at)
    except reading.Unreadable as error:
        found = {"unreadable": str(error)}
    except (MemoryError, RecursionError):
        found = {"unreadable": "the file unfolds to more than a notebook can be"}
    send(channel, json.dumps(found).encode())


def _exercise(channel, sources, candidates, given, needs_callable, seconds) -> None:
    from lora_lab.course.runner import run_script
    from lora_lab.course.script import Script

    student, status = None, {"status": "missing"}
    for candidate in candidates:
        student, status = _build({int(n): text for n, text in sources.items()}, candidate, given, needs_callable)
        if status["status"] == "ready":
            break
    send(channel, json.dumps(status).encode())
    if status["status"] != "ready":
        return
    while True:
        try:
            script = Script.from_bytes(receive(channel))
        except EOFError:
            return
        send(channel, run_script(script, student, seconds).to_bytes())


def _build(sources: dict[int, str], candidate: dict, given: dict[str, str], needs_callable: bool) -> tuple:
    """The student's object, from the statements of one candidate slice; (None, why not) where there is none."""
    import linecache

    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    space = module.__dict__
    notes: list[str] = []
    for name, source in given.items():
        lent = types.ModuleType("lab")
        try:
            exec(compile(source, "<the lab's own>", "exec"), lent.__dict__)
            space[name] = lent.__dict__[name]
        except Exception as error:
            notes.append(f"the lab's own {name} could not be lent: {type(error).__name__}")
    trees = {}
    for cell in {cell for cell, _ in candidate["take"]}:
        file = f"<cell {cell}>"
        trees[cell] = slices.ast.parse(sources[cell])
        linecache.cache[file] = (len(sources[cell]), None, sources[cell].splitlines(keepends=True), file)
    todo = []
    for cell, index in candidate["take"]:
        node = trees[cell].body[index]
        bound, changed = slices._targets(node)
        if not (bound and bound <= set(given)):
            todo.append((cell, node, bound | changed))
    _execute(todo, space, notes)
    try:
        student = eval(compile(candidate["target"], "<check>", "eval"), space)
    except BaseException as error:
        return None, {"status": "missing", "why": f"{type(error).__name__}: {error}"[:300], "notes": notes[:5]}
    if student is None or student is ... or isinstance(student, str) or (needs_callable and not callable(student)):
        return None, {"status": "missing", "why": f"{candidate['target'][:80]} is a {type(student).__name__}", "notes": notes[:5]}
    return student, {"status": "ready", "notes": notes[:5]}


def _execute(todo: list, space: dict, notes: list[str]) -> None:
    """In document order; what lacks a name waits for another round, unless a later statement has bound its names by then."""
    bound_at: dict[str, int] = {}
    waiting = list(enumerate(todo))
    while waiting:
        later, before = [], len(waiting)
        for position, (cell, node, names) in waiting:
            if names and all(bound_at.get(name, -1) > position for name in names):
                continue
            try:
                exec(compile(slices.ast.Module([node], []), f"<cell {cell}>", "exec"), space)
            except NameError:
                later.append((position, (cell, node, names)))
            except BaseException as error:
                notes.append(f"line {node.lineno} of a cell raised {type(error).__name__}: {str(error)[:200]}")
            else:
                bound_at.update({name: max(position, bound_at.get(name, -1)) for name in names})
        waiting = later
        if len(waiting) == before:
            return


def _probe(channel, paths, folders, port, pids) -> None:
    """Try what student code must not be able to do; the answers are for the report of the walls."""
    found: dict = {"uid": os.geteuid(), "pid": os.getpid(), "files": {}}
    for path in paths:
        try:
            found["files"][path] = bool(os.listdir(path)) if os.path.isdir(path) else bool(open(path, "rb").read(1))
        except OSError:
            found["files"][path] = False

    def works(action) -> bool:
        try:
            action()
        except OSError:
            return False
        return True

    def write(path):
        with open(os.path.join(path, "probe"), "wb") as file:
            file.write(b"x")

    def connect():
        with socket.socket() as tried:
            tried.settimeout(1)
            tried.connect(("127.0.0.1", port))

    found["writes"] = {path: works(lambda path=path: write(path)) for path in folders}
    found["own folder"] = works(lambda: write("."))
    found["socket"] = works(lambda: socket.socket().close())
    found["connect"] = works(connect)
    found["signal"] = {str(pid): works(lambda pid=pid: os.kill(pid, 0)) for pid in (os.getppid(), *pids) if pid > 0}
    found["exec"] = _execs()
    found["limits"] = {name: walls.resource.getrlimit(getattr(walls.resource, "RLIMIT_" + name))[0]
                       for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC")}  # fmt: skip
    try:
        disk = os.statvfs(".")
        found["disk"] = disk.f_blocks * disk.f_frsize
    except OSError:
        found["disk"] = None
    found["environ"] = sorted(os.environ)
    send(channel, json.dumps(found).encode())


def _execs() -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(sys.executable, [sys.executable, "-S", "-c", ""])
        except OSError:
            pass
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# ---------------------------------------------------------------- frames


def send(channel: socket.socket, data: bytes) -> None:
    channel.sendall(struct.pack("<Q", len(data)) + data)


def receive(channel: socket.socket) -> bytes:
    """One whole frame; EOFError when the other side has closed."""
    (size,) = struct.unpack("<Q", _exactly(channel, 8))
    return _exactly(channel, size)


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        part = channel.recv(min(missing, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
