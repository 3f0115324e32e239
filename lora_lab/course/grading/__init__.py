"""Grading: notebooks in, marks out, with students' code behind walls. docs/grading.md says how to use it, docs/design.md why it is so.

    submissions    find what was handed in (trusted; reads bytes only)
    client         start the warm server, hand it jobs, check what comes back
    inside/        what runs in the jail: the walls, the server, reading of notebooks, slices
    walls          which walls stand here, found by trying
    marks          one submission to its marks; many, and again
    feedback       pages for students and for the class
    exports        CSV, JSON, Canvas, nbgrader; written answers
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..labs import labs as all_labs
from . import client, exports, feedback, marks, walls
from .submissions import BadSubmissions, find

__all__ = ["BadSubmissions", "grade"]


def grade(
    submissions: str | Path, out: str | Path, *, pattern: str | None = None, labs: list[str] | None = None, seed: str | None = None,
    require: list[str] | None = None, n_jobs: int = 1, force: bool = False, nbgrader: Path | None = None, limits: client.Limits | None = None,
    way: str = "best", say: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """Grade everything in `submissions` and write grades, pages and exports into `out`. Call it again to go on after a kill.

    labs: numbers, to grade only these; seed: the secret of earlier results, for an appeal; require: walls that must stand ("all");
    nbgrader: a gradebook.db to fill as well. Returns what grades.json holds. Raises BadSubmissions, walls.TooWeak, ValueError.
    """
    out, limits = Path(out), limits or client.Limits()
    chosen = all_labs() if labs is None else {number: lab for number, lab in all_labs().items() if number in labs or lab.label in labs or lab.name in labs}
    if not chosen:
        raise ValueError(f"there is no lab {', '.join(labs or ())}; there are: {', '.join(all_labs())}")
    found, left_out = find(submissions, all_labs(), pattern)
    found = [s for s in found if s.lab in chosen]
    secret = marks.secret_seed(out, seed)
    with client.base_folder() as base:
        standing = walls.look(client.warm_server(limits, way, base), [Path(submissions), out])
        for wall in standing:
            say(str(wall))
        walls.demand(standing, require or [])
        if left_out:
            say(f"left out: {len(left_out)} (class.html lists them), the first: {left_out[0]}")

        done = 0

        def tell(m: dict) -> None:
            nonlocal done
            done += 1
            points = "?" if m["points"] is None else m["points"]
            say(f"[{done}/{len(found)}] {m['student']}, lab {all_labs()[m['lab']].label}: {points} of {m['max']}"
                + (" (as before)" if m.get("kept") else "") + (f": {m['problem']}" if m["problem"] else ""))  # fmt: skip

        graded = marks.grade_all(found, out, secret, limits, n_jobs, way, force, base, tell)
    return report(graded, out, chosen, [str(wall) for wall in standing], left_out, nbgrader)


def report(graded: list[dict], out: Path, labs: dict, standing: list[str], left_out: list[str], nbgrader: Path | None = None) -> dict:
    """All files of a folder of results, from the marks alone."""
    written = exports.Written(out / "written")
    left_out = [*left_out, *written.collect(graded, labs)]
    exports.write(out / "grades.csv", exports.grades_csv(graded, labs, written))
    exports.write(out / "canvas.csv", exports.canvas_csv(graded, labs, written))
    extra = {"walls": standing, "left_out": left_out, "mistakes": feedback.stuck(graded)}
    exports.write(out / "grades.json", exports.grades_json(graded, labs, extra))
    exports.write(out / "class.html", feedback.class_page(graded, labs, standing, left_out))
    for student, theirs in exports.by_student(graded).items():
        page = feedback.student_page(student, [theirs[number] for number in labs if number in theirs], labs, written.comments())
        exports.write(out / "feedback" / f"{marks.safe(student)}.html", page)
    if nbgrader is None or not exports.nbgrader_gradebook(nbgrader, graded, labs):
        exports.write(out / "nbgrader.csv", exports.nbgrader_csv(graded, labs))
    return {"marks": graded, **extra}
