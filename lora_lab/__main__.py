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
def pretrain(
    folder: Annotated[Path, typer.Argument(help="A folder of .txt or .txt.xz files; lines of <|endoftext|> separate documents in a file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the model; it appears when it is whole.")],
    tokens: Annotated[float | None, typer.Option(help="Budget in tokens, e.g. 30e6. Default: once through the text.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes of training, instead.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for tokens, log and checkpoints. Default: OUT-work.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that share each step; better than threads where others use the same cores.")] = 1,
    megabytes: Annotated[float, typer.Option(help="Use the first so many megabytes (10^6 bytes) of text; 0: all.")] = 0.0,
    hold_out: Annotated[int, typer.Option(help="Keep one document in so many for measuring.")] = 20,
    vocab: Annotated[int, typer.Option(help="Tokens of the byte-level BPE.")] = 4096,
    layers: Annotated[int, typer.Option()] = 6,
    width: Annotated[int, typer.Option()] = 256,
    heads: Annotated[int, typer.Option()] = 4,
    context: Annotated[int, typer.Option(help="Tokens that the model can see.")] = 256,
    rows: Annotated[int, typer.Option(help="Windows of running text in a step.")] = 9,
    drills: Annotated[int, typer.Option(help="Rows of drills in copying in a step.")] = 3,
    lr: Annotated[float, typer.Option(help="Muon's learning rate.")] = 4e-3,
    seed: Annotated[int, typer.Option()] = 0,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    export_only: Annotated[bool, typer.Option("--export-only", help="Don't train: export the last checkpoint as it is.")] = False,
) -> None:
    """Train a small GPT-2 on a folder of text, as the pocket model was; the same call goes on where a killed one stopped."""
    from lora_lab.pretrain import Recipe
    from lora_lab.pretrain import pretrain as train

    try:
        recipe = Recipe(
            vocab=vocab, layers=layers, width=width, heads=heads, context=context, rows=rows, drills=drills, lr=lr, hold_out=hold_out,
            megabytes=megabytes, seed=seed,
        )  # fmt: skip
        budget = {"tokens": tokens, "minutes": minutes}
        train(folder, out, recipe, work=work, workers=workers, every=every, train=not export_only, say=typer.echo, **budget)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        raise _fail("stopped; the same command goes on from the last checkpoint") from None


@app.command("pretrain-encoder")
def pretrain_encoder(
    folder: Annotated[Path, typer.Argument(help="A folder of .txt or .txt.xz files; lines of <|endoftext|> separate documents in a file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the model; it appears when it is whole.")],
    tokens: Annotated[float | None, typer.Option(help="Budget in tokens, e.g. 20e6. Default: once through the text.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes of training, instead.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for tokens, log and checkpoints. Default: OUT-work.")] = None,
    vocab: Annotated[int, typer.Option(help="Tokens of the lower-case WordPiece.")] = 6000,
    layers: Annotated[int, typer.Option()] = 4,
    width: Annotated[int, typer.Option()] = 128,
    heads: Annotated[int, typer.Option()] = 4,
    context: Annotated[int, typer.Option(help="Tokens that the model can see.")] = 128,
    rows: Annotated[int, typer.Option(help="Windows in a step.")] = 24,
    hold_out: Annotated[int, typer.Option(help="Keep one document in so many for measuring.")] = 20,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    seed: Annotated[int, typer.Option()] = 0,
    train: Annotated[bool, typer.Option("--train/--no-train", help="--no-train: export the last checkpoint as it is.")] = True,
) -> None:
    """Train a small BERT from a folder of text; the same command goes on where a killed one stopped."""
    from dataclasses import replace

    from lora_lab.encoder import POCKET
    from lora_lab.encoder import pretrain_encoder as run_recipe

    try:
        changes = {"vocab": vocab, "layers": layers, "width": width, "heads": heads, "context": context, "rows": rows, "hold_out": hold_out, "seed": seed}
        run_recipe(folder, out, replace(POCKET, **changes), work=work, tokens=tokens, minutes=minutes, every=every, train=train, say=typer.echo)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        raise _fail("stopped; the same command goes on from the last checkpoint") from None


@app.command()
def count(
    what: Annotated[str, typer.Argument(help="A preset (gpt2-medium, llama-7b, ...) or a folder with config.json.")],
    r: Annotated[int, typer.Option("--r", help="Rank of the adapters.")] = 8,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="Module name or its end, c_attn:q,v for slices; again for more. Default: all-linear.")
    ] = None,
    save: Annotated[list[str] | None, typer.Option("--save", help="Module that trains in full, a head; again for more.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="name=value, e.g. layers=4, labels=2; again for more.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16: of weights and activations.")] = "fp32",
    quantize: Annotated[str | None, typer.Option(help="int8, nf4 or nf4-double for the frozen linear layers.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    context: Annotated[int | None, typer.Option(help="Tokens a sequence; default: 512, or what the model can.")] = None,
    optimizer: Annotated[str, typer.Option(help="sgd, momentum, adam or adam8bit.")] = "adam",
    attention: Annotated[str, typer.Option(help="flash or math: whether scores are stored.")] = "flash",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Blocks are computed again in the backward pass.")] = False,
    gpu: Annotated[str | None, typer.Option(help="T4, L4, A10, L40S, A100-40, A100-80, H100, H200: what fits.")] = None,
    tasks: Annotated[int, typer.Option(help="Tasks to keep on disk.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Count a model and its adapters: parameters, files, memory of a training step, FLOPs. Offline, from shapes alone."""
    import json

    from lora_lab.count_table import count as counted
    from lora_lab.count_table import render

    pairs = [text.partition("=") for text in change or []]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise _fail(f"--set {wrong[0]}: write name=value")
    try:
        table = counted(
            what, r, target or "all-linear", modules_to_save=save or (), numbers={name: _value(text) for name, _, text in pairs},
            dtype=dtype, quantize=quantize, batch=batch, context=context, optimizer=optimizer, attention=attention,
            checkpointing=checkpointing, gpu=gpu, tasks=tasks,
        )  # fmt: skip
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise _fail(str(error)) from None
    typer.echo(json.dumps(table, indent=1) if as_json else render(table))


@app.command()
def claims(
    run: Annotated[bool, typer.Option("--run", help="Run the experiments, in our world and in the other one, and compare with what is on record.")] = False,
    group: Annotated[str | None, typer.Option(help="what, cost, start, training, merging, code, comparisons or paper.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write docs/claims.md from data/claims.yaml.")] = False,
) -> None:
    """Claims about LoRA on trial: what people say, what an experiment says, what is true."""
    import json

    from lora_lab import claims as court

    if group is not None and group not in court.GROUPS:
        raise _fail(f"there is no group {group!r}; there are {', '.join(court.GROUPS)}")
    if write:
        path = _root() / "docs" / "claims.md"
        path.write_text(court.markdown(), encoding="utf-8")
        typer.echo(f"{path}: {len(court.load())} claims")
        return
    chosen = [claim for claim in court.load().values() if group in (None, claim.group)]
    rows = [(claim, None, None) for claim in chosen]
    if run:
        import torch

        torch.set_num_threads(1)  # small matrices: threads would only wait for each other
        rows = [found[:3] for found in court.hold([claim.id for claim in chosen])]
    if as_json:
        typer.echo(json.dumps(court.plain(rows), indent=1, ensure_ascii=False))
    else:
        typer.echo(court.table(rows))
    strange = [claim.id for claim, ours, _ in rows if ours is not None and claim.complaints(ours)]
    if strange:
        raise _fail(f"not as on record: {', '.join(strange)}")


@app.command()
def release(out: Annotated[Path, typer.Argument(help="A new folder, outside of the repository.")]) -> None:
    """Write the students' copy of this repository: no sources, no answers, no tests, no grader."""
    from lora_lab.course.classroom import ClassroomError
    from lora_lab.course.classroom import release as write

    try:
        notebooks = write(_root(), out)
    except (ClassroomError, OSError) as error:
        raise _fail(str(error)) from None
    typer.echo(f"{out}: {len(notebooks)} notebooks. In it stays what `use` goes on with (lora_lab/course/labs): marks rest on fresh inputs")


@app.command()
def bundle(
    out: Annotated[Path, typer.Argument(help="The archive, a .zip.")] = Path("lora-lab-room.zip"),
    model: Annotated[list[str] | None, typer.Option("--model", help="gpt2, gpt2-medium, ...; again for more. The pocket model is in it anyway.")] = None,
    data: Annotated[bool, typer.Option("--data", help="Put E2E in (LORA_LAB_DATA, else the network).")] = False,
    wheels: Annotated[bool, typer.Option("--wheels", help="Put all packages in, for start.py without a network.")] = False,
    platform: Annotated[list[str] | None, typer.Option("--platform", help="win_amd64, macosx_11_0_arm64, ...: packages for it; again for more.")] = None,
    python: Annotated[str | None, typer.Option("--python", help="Python version of these platforms, e.g. 3.12.")] = None,
    torch_index: Annotated[str | None, typer.Option("--torch-index", help="Package index to take PyTorch's build from.")] = None,
) -> None:
    """One archive for a room of machines behind one address: unpack it anywhere, then python3 start.py."""
    from lora_lab.course.classroom import ClassroomError
    from lora_lab.course.classroom import bundle as pack

    options = {"models": model or (), "data": data, "wheels": wheels, "platforms": platform or (), "python": python, "torch_index": torch_index}
    try:
        path = pack(_root(), out, say=typer.echo, **options)
    except (ClassroomError, OSError) as error:
        raise _fail(str(error)) from None
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


@app.command()
def site(
    out: Annotated[Path, typer.Argument(help="Folder for the pages; an older site there is replaced.")],
    executed: Annotated[Path | None, typer.Option(help="Folder with notebooks that were run already; others are run.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Run with fewer steps, for a look at the layout.")] = False,
    lab: Annotated[list[str] | None, typer.Option("--lab", help="Only this lab, e.g. 02; again for more.")] = None,
) -> None:
    """Run the student notebooks and write them as static pages: an index, the labs, a sheet of paper for each."""
    from lora_lab.course.site import SiteError, build_site

    try:
        pages = build_site(_root(), out, executed=executed, fast=fast, labs=lab, say=typer.echo)
    except (SiteError, OSError) as error:
        raise _fail(str(error)) from None
    typer.echo(f"{pages[0]}: {len(pages) // 2} labs")


@app.command()
def grade(
    submissions: Annotated[Path, typer.Argument(help="nbgrader's submitted/ tree, a folder of notebooks named by --pattern, or a zip of either.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results; the same call goes on where a killed one stopped.")],
    pattern: Annotated[str | None, typer.Option(help="Names of flat files, e.g. '{student}_*_{lab}.ipynb'. Default: '{student}_{lab}.ipynb'.")] = None,
    lab: Annotated[list[str] | None, typer.Option("--lab", help="Grade only this lab, 02 or 2b; again for more.")] = None,
    jobs: Annotated[int, typer.Option("-j", "--jobs", help="Processes; 0: one per core.")] = 1,
    seed: Annotated[str | None, typer.Option(help="The secret of earlier results (a seed.json or its digits): the same marks, for an appeal.")] = None,
    require: Annotated[
        list[str] | None, typer.Option(help="Refuse to grade unless this wall stands: all, files, network, processes, user, programs, memory, disk.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Grade again what has marks already.")] = False,
    nbgrader: Annotated[Path | None, typer.Option(help="Also write the marks into this gradebook.db of nbgrader.")] = None,
) -> None:
    """Grade notebooks: students' code runs behind walls, on inputs that nobody has seen."""
    import os

    from lora_lab.course.grading import BadSubmissions
    from lora_lab.course.grading import grade as grade_all
    from lora_lab.course.grading.client import StartFailed
    from lora_lab.course.grading.walls import TooWeak

    try:
        found = grade_all(
            submissions, out, pattern=pattern, labs=lab, seed=seed, require=require, n_jobs=jobs or os.cpu_count() or 1, force=force,
            nbgrader=nbgrader, say=typer.echo,
        )  # fmt: skip
    except (BadSubmissions, TooWeak, StartFailed, ValueError, OSError, ImportError) as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        raise _fail("stopped; the same command goes on where this one was") from None
    typer.echo(f"{out / 'grades.csv'}, class.html, feedback/ and more are written")
    failed = sum(m["points"] is None for m in found["marks"])
    if failed:
        raise _fail(f"{failed} notebooks could not be graded because of a fault of the grader: grades.csv has ? there")


@app.command()
def progress(
    places: Annotated[
        list[Path] | None,
        typer.Argument(help="Notebooks, records.jsonl, exported .json, or folders with these. Default: this folder, and the record of this machine."),
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option("-o", "--out", help="my-progress.html (the default), .json, .md or .csv; again for more than one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Stands on the page; else no name does.")] = None,
) -> None:
    """A page of a learner's progress, from notebooks and records: what was solved, mistakes overcome, predictions, what to do next."""
    from lora_lab.course.history import read_history
    from lora_lab.course.labs import labs
    from lora_lab.course.portfolio import PortfolioError, gather, own_places, render, write

    try:
        found = gather(places or own_places())
        history = read_history(found.records, labs())
        for path in out or [Path("my-progress.html")]:
            write(render(history, path, records=found.records, notes=found.notes, name=name), path)
            typer.echo(f"{path}: {history.count} records, {sum(lab.solved for lab in history.labs.values())} exercises solved")
    except (PortfolioError, OSError) as error:
        raise _fail(str(error)) from None
    for line in (*found.read, *found.troubles):
        typer.echo(f"  {line}", err=True)


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
