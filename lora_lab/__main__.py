"""The `lora-lab` command: build the notebooks, run one, examine a machine."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

GIB = 2**30


def main() -> None:
    # A Windows console in an old code page would turn a dot or an arrow into a UnicodeEncodeError.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


def _fail(message: str) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(1)


def _root() -> Path:
    """The repository around the working directory, else the one that this package was installed from."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]):
        if (folder / "notebooks" / "source").is_dir():
            return folder
    raise _fail("no notebooks/source here or above: call this inside a clone of the repository")


@app.command()
def build(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if a build would change notebooks/.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also replace notebooks that somebody has worked in.")] = False,
) -> None:
    """Make notebooks/ (students) and build/ (instructors) from notebooks/source."""
    root = _root()
    from lora_lab.course.builder import BuildError, build_all

    try:
        states = build_all(root, check=check, force=force)
    except BuildError as error:
        raise _fail(f"{error}\nnothing was written") from None
    for name, state in states.items():
        typer.echo(f"notebooks/{name}: {state}")
    if check and states:
        raise _fail(f"{len(states)} not as a build would leave them: run `lora-lab build`, remove stale ones, commit")
    kept = [name for name, state in states.items() if state == "kept"]
    if kept:
        typer.echo(f"kept: somebody has worked in {', '.join(kept)}; copy it elsewhere, then `lora-lab build --force`")


def _value(text: str) -> Any:
    """A parameter as it is typed: true, 3, 1e-4, none or text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _load(path: Path):
    """The notebook to run; of a source the instructor's copy."""
    import nbformat

    from lora_lab.course.builder import BuildError, build_lab

    if not path.is_file():
        raise _fail(f"there is no file {path}")
    try:
        return build_lab(path).instructor if path.suffix == ".py" else nbformat.read(path, as_version=4)
    except BuildError as error:
        raise _fail(str(error)) from None
    except nbformat.reader.NotJSONError:
        raise _fail(f"{path} is not a notebook: give a .ipynb or a source .py") from None


@app.command()
def run(
    notebook: Annotated[Path, typer.Argument(help="A source .py (its instructor's copy is run) or any .ipynb.")],
    parameter: Annotated[list[str] | None, typer.Option("-p", "--parameter", help="name=value, e.g. fast=true")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Save the executed notebook here.")] = None,
    cwd: Annotated[Path | None, typer.Option(help="Folder to run in; by default a temporary one.")] = None,
) -> None:
    """Run a notebook from top to bottom, without a browser; exit 1 and say where if a cell fails."""
    pairs = [text.partition("=") for text in parameter or []]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise _fail(f"-p {wrong[0]}: write name=value")
    source = _load(notebook)

    from papermill import PapermillExecutionError

    from lora_lab.course.builder import run_notebook

    if out is not None and out.is_dir():
        out = out / f"{notebook.stem}.ipynb"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        try:
            result = run_notebook(
                source, {name: _value(text) for name, _, text in pairs}, cwd=cwd or temporary, out=out
            )
        except ValueError as error:
            raise _fail(f"{notebook}: {error}") from None
        except PapermillExecutionError as error:
            lines = [line for line in error.source.splitlines() if line.strip()] or ["(empty)"]
            saved = (
                f"\nwhat ran so far is in {out}" if out is not None else "\nrun with -o FILE to see the whole notebook"
            )
            raise _fail(
                f"{notebook}: cell [{error.exec_count}] failed\n    {lines[0]}\n{error.ename}: {error.evalue}{saved}"
            ) from None
    typer.echo(f"{notebook}: ran in {result.seconds / 60:.1f} minutes" + (f", saved as {out}" if out else ""))


class Finding(NamedTuple):
    """One line of `doctor`. `advice` says what to do if it is not ok."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "Python", sys.version_info >= (3, 11), found, "needs 3.11 or later: install it, then run start.py with it"
    )


def _torch() -> Finding:
    try:
        import torch

        right = (torch.ones(2, 3) @ torch.ones(3, 2)).sum().item() == 12  # 4 entries of 3: exact in float32
    except Exception as error:  # a missing DLL is an OSError, a mixed install an ImportError or worse
        reason = str(error).strip().splitlines()[:1]
        return Finding(
            "torch", False, f"{type(error).__name__}: {''.join(reason)}", "run start.py again, it repairs .venv"
        )
    return Finding("torch", right, torch.__version__, "it multiplies wrongly: reinstall torch")


def _device() -> Finding:
    try:
        import torch
    except Exception:
        return Finding("device", False, "unknown without torch", "mend torch first")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"CPU, {cores} core{'s' if cores != 1 else ''}"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        bf16 = "bf16" if major >= 8 else "no bf16"  # in hardware from 8.0 on; a T4 is 7.5
        return Finding("device", True, f"{torch.cuda.get_device_name()}, {major}.{minor}, {bf16}; {cpu}")
    if torch.backends.mps.is_available():
        return Finding("device", True, f"Apple GPU (mps); {cpu}")
    unused = "; an NVIDIA driver is here but this torch does not use it: the labs run on the CPU"
    return Finding("device", True, cpu + (unused if shutil.which("nvidia-smi") else ""))


def _container_limit() -> int | None:
    """Bytes that the container may use (cgroup v2, then v1), None without a limit."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(file).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
        if limit < 2**60:  # v1 writes nearly 2^63 for "none"
            return limit
    return None


def _memory() -> Finding:
    import psutil

    system = psutil.virtual_memory()
    limit = _container_limit()
    total = min(system.total, limit or system.total)
    found = f"{total / GIB:.1f} GiB" + (" (this container's limit)" if limit == total else "")
    found += f", {system.available / GIB:.1f} GiB free on the machine"
    enough = total >= 0.95 * GIB and system.available >= 0.7 * GIB
    return Finding(
        "memory",
        enough,
        found,
        "labs need about 1 GiB: close other notebooks and programs, or ask for a larger container",
    )


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    return Finding(
        "disk",
        free >= GIB,
        f"{free / GIB:.1f} GiB free here",
        "free at least 1 GiB: adapters and models are saved here",
    )


def _widgets() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package, least in (("ipywidgets", 8), ("jupyterlab_widgets", 3), ("ipykernel", 6)):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            return Finding(
                "widgets", False, f"{package} is missing", "run start.py again, or pip install 'lora-lab[lab]'"
            )
        if int(found[package].split(".")[0]) < least:
            return Finding("widgets", False, f"{package} {found[package]}", f"sliders need {package} {least} or later")
    return Finding("widgets", True, ", ".join(f"{name} {number}" for name, number in found.items()))


def _kernel() -> Finding:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return Finding("kernel", False, "no kernel python3", "run start.py again, or pip install ipykernel")
    # Jupyter runs its own Python for a bare name. Links are not followed: each environment's python links to one file.
    right = not os.path.isabs(program) or Path(program).parent == Path(sys.executable).parent
    advice = f"notebooks would run in another Python: `{sys.executable} -m ipykernel install --sys-prefix`"
    return Finding("kernel", right, program if os.path.isabs(program) else sys.executable, advice)


def _can_write(folder: Path) -> str | None:
    """None, or why not."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lora-lab-"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _write_access() -> Finding:
    why = _can_write(Path.cwd())
    if why is None:
        return Finding("write access", True, str(Path.cwd()))
    if _can_write(Path.home()) is None:
        return Finding(
            "write access", False, f"{Path.cwd()}: {why}", f"copy the notebooks to {Path.home()} and open them there"
        )
    return Finding(
        "write access", False, f"{Path.cwd()}: {why}", "set LORA_LAB_RECORDS to a folder where you may write"
    )


EXAMINATIONS: tuple[Callable[[], Finding], ...] = (
    _python,
    _torch,
    _device,
    _memory,
    _disk,
    _widgets,
    _kernel,
    _write_access,
)


def findings() -> Iterator[Finding]:
    """What `doctor` looks at, one Finding each; an examination that breaks is a finding too."""
    for examine in EXAMINATIONS:
        try:
            yield examine()
        except Exception as error:
            name = examine.__name__.strip("_").replace("_", " ")
            yield Finding(
                name, False, f"{type(error).__name__}: {error}", "run start.py again; if this stays, report the line"
            )


@app.command()
def doctor() -> None:
    """Examine this machine; each failing line says what to do."""
    failed = 0
    for finding in findings():
        failed += not finding.ok
        typer.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name:<13} {finding.found}")
        if not finding.ok:
            typer.echo(f"     {'->':<13} {finding.advice}")
    typer.echo("all is well" if not failed else f"{failed} of {len(EXAMINATIONS)} need attention")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
