"""Which walls stand, found by trying: our own code in a child does what a student's must not be able to do."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from . import client

NAMES = ("files", "network", "processes", "user", "programs", "memory", "disk")


@dataclass(frozen=True)
class Wall:
    """One protection. `strong`: it held when tried; `text`: what it does here, or what is weaker."""

    name: str
    strong: bool
    text: str

    def __str__(self):
        return f"{'✓' if self.strong else '✗'} {self.name}: {self.text}"


class TooWeak(RuntimeError):
    """A wall that `--require` asks for does not stand here."""


def look(server: client.Server, private: list[Path]) -> list[Wall]:
    """Try every wall. `private`: folders and files that must not be readable: submissions, results, the lab's answers."""
    way, limits = server.report["way"], server.limits
    paths = [*private, client.PACKAGE / "course" / "labs", client.PACKAGE / "course" / "grading", Path.home(), f"/proc/{os.getpid()}/environ"]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with server.job("probe", paths=[str(p) for p in paths if os.path.exists(p) and Path(p) not in server.shown],
                        folders=[str(server.folder), "/tmp", "/var/tmp", *([] if way in ("root", "user") else ["/dev/shm"]),
                                 *(str(p) for p in private if p.is_dir())],
                        port=listening.getsockname()[1], pids=[os.getpid(), server.process.pid]) as job:  # fmt: skip
            found = json.loads(job.receive())
    seen = sorted(path for path, readable in found["files"].items() if readable and not _only_ours(path, server))
    written = sorted(path for path, could in found["writes"].items() if could)
    reached = sorted(pid for pid, could in found["signal"].items() if could and int(pid) in (os.getpid(), server.process.pid))
    by = {"root": "own mounts", "user": "own mounts in a user namespace", "landlock": "Landlock", "limits": "nothing"}[way]
    whole_disk = found["disk"] is not None and found["disk"] <= limits.disk
    megabytes, together = limits.memory >> 20, client._memory_below(os.getpid()) > 0
    namespaces = way in ("root", "user")
    network = ["an empty network namespace"] * namespaces + ["sockets are refused"] * server.report["seccomp"]
    signals = f"student code can send signals to {', '.join(reached)}" if reached else "signals to other processes are refused"
    counted = f"{limits.processes} processes and threads" if found["limits"]["NPROC"] == limits.processes else "processes are not counted"
    reachable = ", ".join([*seen, *written][:4])
    same = "in a user namespace, without any capability" if way == "user" else "with all that you may do"
    return [
        Wall("files", not reachable, f"only Python, libraries and a stripped copy of the lab can be read ({by})" if not reachable else
             f"student code can reach {reachable}: grade on Linux with user namespaces or Landlock, or on a machine that holds nothing else"),
        Wall("network", not found["connect"], " and ".join(network) if not found["connect"] else "student code can open connections"),
        Wall("processes", namespaces and not reached, "a process namespace for each exercise; its end ends everything" if namespaces else
             f"{signals}; what it starts is searched for and ended afterwards"),
        Wall("user", found["uid"] != os.geteuid() or way == "user",
             f"runs as user {found['uid']}" if found["uid"] != os.geteuid() else f"runs as the same user as the grader, {same}"),
        Wall("programs", not found["exec"], "no other program, no new namespace" if not found["exec"] else "other programs can be started"),
        Wall("memory", found["limits"]["AS"] > 0 and together, f"{megabytes} MB beyond torch for each process, "
             + (f"{megabytes} MB for all of an exercise" if together else "no limit for all of an exercise together") + f"; {counted}"),
        Wall("disk", whole_disk, f"{limits.disk >> 20} MB for an exercise, in memory, gone afterwards" if whole_disk else
             f"{limits.disk >> 20} MB for each file, no limit for all of them together"),
    ]  # fmt: skip


def _only_ours(path: str, server: client.Server) -> bool:
    """A folder that is seen only as the way to something that is shown: /root, where Python lives in /root/.pyenv."""
    if server.report["way"] not in ("root", "user"):
        return False
    return any(str(shown).startswith(path.rstrip("/") + "/") for shown in server.shown)


def demand(walls: list[Wall], required: list[str]) -> None:
    """Raise TooWeak unless the required walls ("all", or names) stand."""
    unknown = set(required) - {*NAMES, "all"}
    if unknown:
        raise ValueError(f"--require knows all, {', '.join(NAMES)}; found {', '.join(sorted(unknown))}")
    missing = [wall for wall in walls if not wall.strong and ("all" in required or wall.name in required)]
    if missing:
        raise TooWeak("not graded, because --require asks for more than this system gives:\n" + "\n".join(map(str, missing)))
