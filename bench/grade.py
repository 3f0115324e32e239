"""Seconds per submission of lab 02, from bytes to marks, in one process with one warm server.

Four kinds of notebooks in turn: the solved one, the unsolved one, one with mistakes in every exercise, and one with answers in another style.
The start of the server is paid once and shown apart. `reading` is the share for parsing and slicing, `exercises` the rest;
`empty` is a child that does nothing: the price of the walls and the fork, seven times in each submission.
Peers on the same two cores, each on its own form of a notebook with six exercises: nbgrader 0.9.6 2.8 to 4.1 s, otter-grader 7.0.0 10 to 14 s.
"""

import json
import statistics
import time
from pathlib import Path

from _report import machine, options, save, show

from lora_lab.course.grading import client, marks
from lora_lab.course.grading.submissions import Submission
from lora_lab.course.labs import labs

ROOT = Path(__file__).resolve().parents[1]
STYLE = """
def path(x, A, B):
    return (B @ (A @ x.mT)).mT

lora_forward = lambda x, W, b, A, B, alpha, r: x @ W.T + (0 if b is None else b) + alpha / r * path(x, A, B)
"""


def notebooks(lab) -> dict[str, bytes]:
    """name -> bytes of a .ipynb"""
    import nbformat

    from lora_lab.course.builder import build_lab

    built = build_lab(ROOT / "notebooks" / "source" / f"{lab.name}.py")
    solved = nbformat.writes(built.instructor)
    wrong = json.loads(solved)
    for cell in wrong["cells"]:
        if cell["metadata"].get("exercise"):  # each of these slips is one that people make
            text = "".join(cell["source"])
            cell["source"] = text.replace("alpha / r", "alpha").replace("self.alpha / self.r", "self.alpha").replace("math.sqrt(d_in)", "1.0")
    other = json.loads(solved)
    for cell in other["cells"]:
        if cell["metadata"].get("exercise") == "2.1":
            cell["source"] = STYLE
    texts = {"solved": solved, "unsolved": nbformat.writes(built.student), "wrong": json.dumps(wrong), "other": json.dumps(other)}
    return {name: text.encode() for name, text in texts.items()}


def main():
    asked = options(__doc__, submissions=("submissions", 200))
    if asked.quick:
        asked.submissions = 8
    lab = labs()["2"]
    found = machine("torch", "IPython") | {"submissions": asked.submissions}
    pool = notebooks(lab)
    began = time.perf_counter()
    server = client.Server()
    found["server_s"], found["walls"] = time.perf_counter() - began, server.report["way"]
    took, points = {name: [] for name in pool}, {}
    empty, reading = [], []
    for number in range(asked.submissions):
        name = list(pool)[number % len(pool)]
        began = time.perf_counter()
        submission = Submission(f"s{number}", lab.number, name, lambda name=name: pool[name])
        result = marks.grade_one(submission, lab, b"b" * 32, server)
        took[name].append(time.perf_counter() - began)
        points[name] = f"{result['points']}/{result['max']}"
        began = time.perf_counter()
        server.read(pool[name], {e.id: e.name for e in lab.exercises})
        reading.append(time.perf_counter() - began)
        began = time.perf_counter()
        with server.job("read", exercises={}, skip=[], careful=False) as job:
            job.end()
        empty.append(time.perf_counter() - began)
    server.close()
    everything = sorted(t for times in took.values() for t in times)
    rows = [
        {"notebook": name, "points": points.get(name, ""), "n": len(times), "median_s": statistics.median(times), "max_s": max(times)}
        for name, times in {**took, "all": everything, "reading": reading, "empty": empty}.items()
    ]
    show(rows, found)
    save(asked.out, "grade", rows, found)


if __name__ == "__main__":
    main()
