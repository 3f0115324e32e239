"""From one submission to its marks: slices run in the jail, judges run here, inputs are fresh and can be drawn again.

The inputs of an exercise come from HMAC-SHA256(secret, student, exercise, sha256 of the file): another student or another file gets other
inputs, the same file gets the same ones, so an appeal can be run again and a page that is handed back gives nothing away for a second try.
Points and their maximum come from the lab; what a notebook says about itself is counted for the class page only.
"""

from __future__ import annotations

import ast
import hashlib
import hmac
import inspect
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

from ...files import atomic_write
from ..exercise import Exercise, Lab
from ..labs import labs as all_labs
from ..runner import Answers, Error, Examination, examine
from . import client
from .inside import slices
from .submissions import Submission

VERSION = 1
PATIENCE = 4.0  # times the usual limits by the clock, for a second try on a busy machine; the limit on processor time stays


# ---------------------------------------------------------------- the secret


def secret_seed(folder: Path, given: str | None = None) -> bytes:
    """The secret of a folder of results, made at the first call; `given`: 64 hexadecimal digits, or a seed.json of other results."""
    path = folder / "seed.json"
    if given is not None:
        text = given
        if Path(given).is_file():
            text = json.loads(Path(given).read_text(encoding="utf-8"))["seed"]
        try:
            key = bytes.fromhex(text)
        except (ValueError, TypeError):
            key = b""
        if len(key) != 32:
            raise ValueError(f"--seed takes 64 hexadecimal digits or a seed.json, found {given!r}")
    elif path.exists():
        return bytes.fromhex(json.loads(path.read_text(encoding="utf-8"))["seed"])
    else:
        key = secrets.token_bytes(32)
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and bytes.fromhex(json.loads(path.read_text(encoding="utf-8"))["seed"]) != key:
        raise ValueError(f"{folder} was graded with another seed: choose another folder for --out, so that both stay")
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        json.dump({"seed": key.hex(), "note": "who has this can draw every student's inputs: keep it, don't publish it"}, file)
    return key


def inputs_seed(secret: bytes, student: str, exercise: str, digest: str) -> int:
    text = "\0".join([student, exercise, digest]).encode("utf-8", "surrogatepass")
    return int.from_bytes(hmac.digest(secret, text, "sha256")[:8], "big")


# ---------------------------------------------------------------- the lab's own, where an earlier exercise failed


@cache
def lab_own(exercise: Exercise) -> str | None:
    """Source that defines the lab's own object under the exercise's name, from the lab's file; None where that cannot be cut out.

    In the notebook `use("2.2", init_factors)` lends it when the student's does not pass; grading lends it to the exercises that build on it,
    never to 2.2 itself, so that a mistake costs its exercise and nothing more."""
    module = inspect.getmodule(exercise.diagnose)
    if module is None:
        return None
    source = inspect.getsource(module)
    tree = ast.parse(source)
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Exercise":
            named = {keyword.arg: keyword.value for keyword in call.keywords}
            if isinstance(named.get("id"), ast.Constant) and named["id"].value == exercise.id and isinstance(named.get("fallback"), ast.Lambda):
                expression = ast.unparse(named["fallback"].body)
                parsed = slices.parse([source], magics=False)
                taken = slices.reach(parsed, expression)
                if any(isinstance(s.node, ast.ImportFrom) and s.node.level for s in taken):
                    return None
                body = [ast.unparse(s.node) for s in taken]
                return "\n".join(["from __future__ import annotations", *body, f"{exercise.name} = {expression}"])
    return None


# ---------------------------------------------------------------- one submission


def grade_one(submission: Submission, lab: Lab, secret: bytes, server: client.Server) -> dict:
    """The marks of one submission as plain data, whatever the file holds."""
    marks = {
        "version": VERSION, "student": submission.student, "lab": lab.number, "file": submission.path, "problem": None, "notes": [],
        "records": [], "free": [], "exercises": {}, "max": lab.points,
    }  # fmt: skip
    try:
        data = submission.load()
    except ValueError as error:
        data, marks["problem"] = b"", str(error)
    digest = hashlib.sha256(data).hexdigest()
    marks["sha256"] = digest
    names = {exercise.id: exercise.name for exercise in lab.exercises}
    found = {}
    if marks["problem"] is None:
        found = server.read(data, names)
        marks["problem"] = found.get("unreadable")
    marks["notes"] = [f"cell {cell} is not valid Python and was left out: {why}" for cell, why in found.get("broken", ())]
    marks["records"], marks["free"] = found.get("records", []), found.get("free", [])
    for exercise in lab.exercises:
        if marks["problem"] is not None:
            marks["exercises"][exercise.id] = _entry(exercise, "unreadable", why=marks["problem"])
            continue
        failed = {id for id, entry in marks["exercises"].items() if entry["status"] != "passed"}
        seed = inputs_seed(secret, submission.student, exercise.id, digest)
        marks["exercises"][exercise.id] = _grade_exercise(exercise, lab, found, failed, seed, server)
    marks["points"] = sum(entry["points"] for entry in marks["exercises"].values())
    return marks


def _grade_exercise(exercise: Exercise, lab: Lab, found: dict, failed: set[str], seed: int, server: client.Server) -> dict:
    candidates = found["plan"][exercise.id]
    needs = sorted({id for candidate in candidates for id in candidate["needs"]} & failed)
    lent = {}
    for other in lab.exercises:
        if other.id in needs and lab_own(other) is not None:
            lent[other.name] = lab_own(other)
    entry = _attempt(exercise, found, candidates, lent, seed, server)
    if entry["status"] == "time" and entry.pop("starved", False):
        entry = _attempt(exercise, found, candidates, lent, seed, server, PATIENCE)  # others used the machine: that is not the student's time
    if lent and entry["status"] != "passed":
        # As in a notebook whose author never called `use`: all of it the student's own. The better of the two counts.
        again = _attempt(exercise, found, candidates, {}, seed, server)
        entry = again if again["status"] == "passed" else entry
    entry.pop("starved", None)
    return entry


def _attempt(exercise: Exercise, found: dict, candidates: list[dict], lent: dict[str, str], seed: int, server: client.Server,
             patience: float = 1.0) -> dict:  # fmt: skip
    needed = {str(cell) for candidate in candidates for cell, _ in candidate["take"]}
    more = {"lent": sorted(lent), "uses": sorted({name for candidate in candidates for name in candidate["lab"]})}
    if not any(candidate["take"] for candidate in candidates):
        return _entry(exercise, "missing", why=f"no {exercise.name} in the notebook, and no check of another object", **more)
    if all(candidate["stub"] for candidate in candidates):
        return _entry(exercise, "not started", **more)
    broke: client.JobFailed | None = None
    job = None
    try:
        with server.job(
            "exercise", patience, sources={cell: text for cell, text in found["sources"].items() if cell in needed}, candidates=candidates,
            given=lent, needs_callable=callable(exercise.fallback()), seconds=server.limits.case * patience,
        ) as job:  # fmt: skip
            status = json.loads(job.receive(cap=1 << 16))
            if not isinstance(status, dict) or status.get("status") != "ready":
                why = status.get("why") if isinstance(status, dict) else None
                missing = "not started" if any(candidate["handed_out"] for candidate in candidates) else "missing"
                return _entry(exercise, missing, why=_text(why), **more)

            def run(script) -> Answers:
                nonlocal broke
                if broke is None:
                    try:
                        job.send(script.to_bytes())
                        return client.answers_from(job.receive(), script)
                    except client.JobFailed as failure:
                        broke = failure
                return Answers(error=_ended(broke))  # it stays broken: cases that passed before still tell which mistake it is

            result = examine(exercise, seed=seed, run=run)
    except client.JobFailed as failure:
        kind = "time" if failure.kind == "time" else "failed"
        return _entry(exercise, kind, error=_ended(failure), broke=failure.kind, starved=job is not None and job.starved, **more)
    except (ValueError, TypeError, RecursionError) as error:  # a status that is not even JSON
        return _entry(exercise, "failed", why=f"what came back are not answers ({type(error).__name__})", broke="reply", **more)
    return _entry(exercise, result.status, result, broke=broke.kind if broke else None, starved=job.starved, **more)


def _ended(failure: client.JobFailed) -> Error:
    return Error("time" if failure.kind == "time" else "exception", failure.kind, str(failure))


def _entry(exercise: Exercise, status: str, result: Examination | None = None, why: str | None = None, error: Error | None = None,
           broke: str | None = None, **more) -> dict:  # fmt: skip
    """What is kept of one exercise. `why`, `failure` and `error` may hold hidden inputs: feedback shows them without numbers."""
    first = result.first_failure if result else None
    error = error or (first.error if first else None)
    return {
        "status": status,
        "points": exercise.points if status == "passed" else 0,
        "max": exercise.points,
        "cases": [[e.title, e.failure is None] for e in result.evidence] if result else [],
        "total": len(exercise.cases),
        "failure": first.failure if first else None,
        "error": asdict(error) if error else None,
        "diagnosis": asdict(result.diagnosis) if result and result.diagnosis else None,
        "seconds": round(sum(e.answers.seconds for e in result.evidence), 3) if result else 0.0,
        "why": why,
        "broke": broke,
        **more,
    }


def _text(value) -> str | None:
    return value[:300] if isinstance(value, str) else None


# ---------------------------------------------------------------- many, and again


def marks_path(results: Path, student: str, lab: Lab) -> Path:
    return results / "marks" / lab.name / f"{safe(student)}.json"


def safe(name: str) -> str:
    """A file name for a student: letters, digits and ._@+- stay, everything else as %XX; never two students for one name."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._@+-") else "".join(f"%{b:02X}" for b in c.encode("utf-8", "surrogatepass")) for c in name)
    # Where capitals and small letters are the same file, two students must not share one.
    return kept if kept == kept.lower() else f"{kept}~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


def fingerprint(lab: Lab, secret: bytes, limits: client.Limits) -> str:
    """Changes when marks could: another seed, other limits, another version of the lab's or the engine's code."""
    sources = [inspect.getsource(inspect.getmodule(e.diagnose)) for e in lab.exercises[:1]]
    sources += [Path(inspect.getfile(module)).read_text(encoding="utf-8") for module in (inspect.getmodule(examine), inspect.getmodule(slices.plan))]
    parts = [hashlib.sha256(secret).hexdigest(), repr(limits), str(VERSION), *sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def grade_and_keep(submission: Submission, results: Path, secret: bytes, limits: client.Limits, way: str = "best", force: bool = False,
                   base: str | None = None) -> dict:  # fmt: skip
    """`grade_one`, kept in a file of its own that appears whole; a file of the same submission, lab and seed is read instead."""
    lab = all_labs()[submission.lab]
    path, print_ = marks_path(results, submission.student, lab), fingerprint(lab, secret, limits)
    if not force and path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            same = kept["fingerprint"] == print_ and kept["sha256"] == hashlib.sha256(_bytes(submission)).hexdigest()
            if same and kept["student"] == submission.student and kept["file"] == submission.path:
                return kept | {"kept": True}
        except (ValueError, KeyError, TypeError):
            pass
    marks = grade_one(submission, lab, secret, client.warm_server(limits, way, base)) | {"fingerprint": print_}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(marks, indent=1), encoding="utf-8")
    return marks


def _bytes(submission: Submission) -> bytes:
    try:
        return submission.load()
    except ValueError:
        return b""


def grade_all(
    submissions: list[Submission], results: Path, secret: bytes, limits: client.Limits | None = None, n_jobs: int = 1, way: str = "best",
    force: bool = False, base: str | None = None, done: Callable[[dict], None] = lambda marks: None,
) -> list[dict]:  # fmt: skip
    """All of them, in order. One that fails on our side is reported as such and never stops the rest.

    n_jobs: processes on this machine; under `joblib.parallel_config("dask")` the same call runs on a cluster that shares the folders."""
    limits = limits or client.Limits()
    found = []
    if n_jobs == 1:
        for submission in submissions:
            found.append(_whatever_happens(submission, results, secret, limits, way, force, base))
            done(found[-1])
        return found
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=n_jobs, return_as="generator", batch_size=1)
    for marks in parallel(delayed(_whatever_happens)(s, results, secret, limits, way, force, base) for s in submissions):
        found.append(marks)
        done(marks)
    return found


def _whatever_happens(submission: Submission, results: Path, secret: bytes, limits: client.Limits, way: str, force: bool, base) -> dict:
    try:
        return grade_and_keep(submission, results, secret, limits, way, force, base)
    except client.StartFailed:
        raise
    except Exception as error:  # ours, not the student's: no marks are better than wrong ones
        lab = all_labs()[submission.lab]
        return {
            "version": VERSION, "student": submission.student, "lab": lab.number, "file": submission.path, "points": None, "max": lab.points,
            "problem": f"the grader failed ({type(error).__name__}: {error}); grade again, and report this", "notes": [], "records": [], "free": [],
            "exercises": {}, "sha256": "", "failed": True,
        }  # fmt: skip
