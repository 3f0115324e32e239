"""For the one who teaches: a copy of the lab for students, and one archive for a room behind one address.

    release("../lora-lab-students")                   the lab without sources, answers and wrong answers
    bundle("lora-lab-room.zip", wheels=True, ...)     the same as one file, with packages, models and data: no network needed
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .builder import answer_lines, notebook_text, sources

# What a student needs, and nothing that was written for those who teach. Folders are copied whole but for SKIPPED.
RELEASED = (
    "start.py", "pyproject.toml", "setup.py", "constraints.txt", "environment.yml", "binder", "LICENSE", "LICENSE-prose", "CITATION.cff",
    "README.md", "docs/img", "docs/results.md", "docs/capstone.md", "data", "lora_lab",
)  # fmt: skip
WITHOUT = ("lora_lab/course/grading",)  # how marks are made; `lora-lab grade` belongs to the instructor's copy
SKIPPED = ("__pycache__", ".ipynb_checkpoints", ".DS_Store", "*.egg-info", ".lora-lab", "*.pyc")
INSTRUCTORS_SECTIONS = ("## For instructors and contributors",)
STUDENTS_GITIGNORE = ".venv/\n.lora-lab/\n__pycache__/\n.ipynb_checkpoints/\n*.egg-info/\nbuild/\n.DS_Store\n"


class ClassroomError(ValueError):
    """What was asked for can't be made; the message says why and what to do. Nothing half-made is left."""


def release(root: str | os.PathLike, out: str | os.PathLike) -> list[str]:
    """Write the students' copy of the repository `root` to the folder `out`; returns the notebooks in it.

    The notebooks are built from their sources, not copied. What is left out: notebooks/source, build, tests (with their wrong and right answers),
    bench, the notes for developers and the grader. What stays, because the notebooks run on it: the package with the checks, and in them
    the lab's own versions that `use` goes on with. `out` appears in one step, and must not exist or be empty.

    Raises ClassroomError if `out` holds something, if a source does not build, or if a line of an answer is found in a notebook.
    """
    from .builder import BuildError, build_lab

    root, out = Path(root).resolve(), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ClassroomError(f"asked to write a students' copy to {out}, which is there and not empty; name a new folder")
    if out.is_relative_to(root) and not out.is_relative_to(root / "build"):
        raise ClassroomError(f"{out} lies inside the repository, and the next release would copy it; name a folder outside of {root}")
    found = sources(root)
    if not found:
        raise ClassroomError(f"there are no sources in {root / 'notebooks' / 'source'}: call this in the instructor's repository")
    missing = [name for name in RELEASED if not (root / name).exists()]
    if missing:
        raise ClassroomError(f"{root} lacks {', '.join(missing)}: is this a whole clone of the repository?")

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        copy = Path(temporary) / "copy"
        (copy / "notebooks").mkdir(parents=True)
        for source in found:
            try:
                notebook = build_lab(source).student
            except BuildError as error:
                raise ClassroomError(f"{source.name} does not build: {error}") from error
            # Whole lines: an answer's `import re` is no part of `from dataclasses import replace`.
            given_away = sorted(answer_lines(source) & {line.strip() for cell in notebook.cells for line in cell.source.splitlines()})
            if given_away:
                raise ClassroomError(f"the notebook of {source.name} holds a line of an answer: {given_away[0]!r}")
            (copy / "notebooks" / f"{source.stem}.ipynb").write_bytes(notebook_text(notebook).encode())
        for name in RELEASED:
            _copy(root / name, copy / name, root)
        (copy / "README.md").write_text(students_readme((root / "README.md").read_text(encoding="utf-8")), encoding="utf-8")
        (copy / ".gitignore").write_text(STUDENTS_GITIGNORE, encoding="utf-8")
        if out.exists():
            out.rmdir()  # empty, as was seen above
        os.replace(copy, out)
    return [f"{source.stem}.ipynb" for source in found]


def students_readme(text: str) -> str:
    """The README without the sections for those who teach or develop, and without what a students' copy can't do."""
    kept, keep = [], True
    for line in text.splitlines(keepends=True):
        if line.startswith("## "):
            keep = line.strip() not in INSTRUCTORS_SECTIONS
        if keep and "start.py test" not in line:
            kept.append(line)
    return "".join(kept)


def _copy(source: Path, target: Path, root: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copy2(source, target)
        return
    usual = shutil.ignore_patterns(*SKIPPED)

    def left_out(folder, names):
        here = Path(folder).relative_to(root).as_posix()
        return usual(folder, names) | {name for name in names if f"{here}/{name}" in WITHOUT}

    shutil.copytree(source, target, ignore=left_out)


def bundle(
    root: str | os.PathLike,
    out: str | os.PathLike,
    *,
    models: Iterable[str] = (),
    data: bool = False,
    wheels: bool = False,
    platforms: Iterable[str] = (),
    python: str | None = None,
    torch_index: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """One zip archive: the students' copy and, if asked for, what it would fetch. start.py finds wheels/, models/ and datasets/ beside itself.

    models      of the hub, such as "gpt2"; the pocket model is in any case
    data        E2E, from LORA_LAB_DATA or the network
    wheels      all packages that start.py installs, for this system, or for each of `platforms` in pip's words ("win_amd64",
                "macosx_11_0_arm64", "manylinux_2_28_x86_64") and the Python version `python` ("3.12")
    torch_index a package index to take PyTorch's build from

    Raises ClassroomError; `out` is whole or not there.
    """
    from ..data_to_text import E2E_SHA256, DataError, e2e_file
    from ..files import FetchError, atomic_write
    from ..gpt2_files import copy_model, gpt2_folder

    out = Path(out).resolve()
    if out.suffix != ".zip":
        raise ClassroomError(f"the bundle is one zip archive; found the name {out.name}, try {out.stem}.zip")
    with tempfile.TemporaryDirectory(prefix="lora-lab-bundle-") as temporary:
        copy = Path(temporary) / "lora-lab"
        release(root, copy)
        models = [name for name in models if name != "pocket"]
        if models:
            say(f"models: {', '.join(models)}")
            try:
                for name in models:  # from LORA_LAB_MODELS or the cache, if it is there
                    copy_model(gpt2_folder(name), copy / "models" / name)
            except (OSError, ValueError, RuntimeError) as error:
                raise ClassroomError(f"the models can't be put in: {error}") from error
        if data:
            say("data: E2E")
            (copy / "datasets" / "e2e").mkdir(parents=True)
            try:
                for name in E2E_SHA256:
                    shutil.copy2(e2e_file(name), copy / "datasets" / "e2e" / name)
            except (FetchError, DataError, OSError) as error:
                raise ClassroomError(f"the data can't be put in: {error}") from error
        if wheels:
            _download_wheels(copy, platforms, python, torch_index, say)
        say("packing")
        with atomic_write(out) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for path in _files(copy):
                packed = path.suffix in (".whl", ".safetensors", ".png")  # they don't get smaller
                archive.write(path, path.relative_to(copy.parent), zipfile.ZIP_STORED if packed else None)
    return out


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _download_wheels(copy: Path, platforms: Iterable[str], python: str | None, torch_index: str | None, say) -> None:
    """pip's own download of everything that start.py would install, in the pinned versions, into copy/wheels."""
    import tomllib

    project = tomllib.loads((copy / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    wanted = ["pip>=24.1", *project["build-system"]["requires"], *project["project"]["dependencies"], *extras["lab"], *extras["gpt2"], *extras["lecture"]]
    for platform in list(platforms) or [None]:
        say(f"packages for {platform or 'this system'}")
        command = [sys.executable, "-m", "pip", "download", "-q", "-d", copy / "wheels", "-c", copy / "constraints.txt", "--only-binary=:all:", *wanted]
        if platform:
            command += ["--platform", platform, *(["--python-version", python] if python else [])]
        if torch_index:
            command += ["--extra-index-url", torch_index]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["no message"]
            raise ClassroomError(f"pip could not download the packages for {platform or 'this system'}: {lines[-1]}")
