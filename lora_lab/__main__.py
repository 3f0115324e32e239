"""The `lora-lab` command: build the notebooks, run one, examine a machine."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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


@app.command()
def doctor() -> None:
    """Examine this machine; each failing line says what to do."""
    from lora_lab.doctor import diagnose_machine, render

    lines = diagnose_machine()
    typer.echo(render(lines))
    if any(line.ok is False for line in lines):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
