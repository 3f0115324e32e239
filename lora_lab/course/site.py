"""The labs as pages that anybody can look at before anything is installed, and one page of paper for each lab.

    build_site(root, "public")        runs every student notebook (unsolved: `use` goes on with the lab's own versions), writes
        public/index.html             the five pictures, and each lab with its first figure
        public/02_lora_layer.html     the executed notebook
        public/handouts/02_lora_layer.html   what the lab is about on one sheet, made from the notebook's own cells

Pages are static: no kernel, no widgets (their still twins stand there), formulas by MathJax.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from .builder import BuildError, build_lab, environment, run_notebook, sources

# The pictures that people should want to share, as the labs draw them: file in docs/img, alt text, one line below it, the lab it comes from.
PICTURES = (
    ("two_photographs", "Two photographs: factorising a tuned photograph at rank 2 leaves mush; the original plus the rank-2 change is exact.",
     "What LoRA is, and what it is not: the tuned photograph has no low rank, its difference from the original does.", "01"),
    ("staircase", "Eight loss curves, for ranks 1 to 8, fall together, part one by one and end on eight level lines.",
     "How far a rank can get is known before training.", "03"),
    ("twins", "Two training runs with different alpha and learning rates give one and the same curve.",
     "alpha times four, the learning rate of B divided by four under Adam: the same run, bit for bit.", "03"),
    ("ledger", "Bars of memory for full fine-tuning and for LoRA: gradients and optimizer state shrink, activations stay, the adapter file is a hairline.",
     "What LoRA saves and what it does not.", "04"),
    ("volume_strip", "Ten handwritten digits at four volumes of one adapter, from leaning left over upright to falling over.",
     "One adapter of 66 numbers and its volume, from -1 to 2.", "00"),
    ("race", "Accuracy beside LoRA's, a row for each of eleven variants, once at LoRA's learning rate and once each at its own: most end in the band of luck.",
     "Eleven variants, one budget: who is best depends on who chose the learning rate.", "12"),
)  # fmt: skip
LARGEST_THUMBNAIL = 400_000  # characters of SVG; a heat map with images inside would make the first page heavy
MOST_QUESTIONS = 10  # on the sheet of paper; a lab that is a series of votes has two dozen
_COLOURS = """
:root { color-scheme: light dark; --ink: #1d2329; --quiet: #59636e; --line: #d0d5da; --paper: #fff; --accent: #0a5fa5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --quiet: #a2abb4; --line: #3d444c; --paper: #15191d; --accent: #6db3f2; } }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: var(--paper); }
a { color: var(--accent); }
"""
_INDEX_STYLE = _COLOURS + """
body { max-width: 68rem; margin: 0 auto; padding: 1rem 1.2rem 4rem; }
h1 { margin-bottom: .2rem; } .lead { font-size: 1.15rem; color: var(--quiet); max-width: 44rem; }
.pictures, .labs { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); padding: 0; list-style: none; }
.pictures > :first-child { grid-column: 1 / -1; }
figure { margin: 0; } figure img { max-width: 100%; height: auto; } figcaption { color: var(--quiet); font-size: .92rem; }
.lab { border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; display: flex; flex-direction: column; }
.lab h3 { margin: 0 0 .2rem; } .lab p { margin: .2rem 0 .6rem; color: var(--quiet); font-size: .92rem; }
.lab ul { margin: .2rem 0 .8rem; padding-left: 1.1rem; font-size: .92rem; }
.thumbnail { height: 11rem; overflow: hidden; margin: 0 0 .7rem; --jp-ui-font-color0: var(--ink); --jp-ui-font-color2: var(--quiet);
  --jp-border-color2: var(--line); --jp-layout-color0: var(--paper); }
.thumbnail svg { width: 100% !important; height: 100% !important; max-width: none !important; }
.more { margin-top: auto; font-size: .92rem; }
"""
_HANDOUT_STYLE = _COLOURS + """
@page { size: A4; margin: 13mm 14mm; }
body { max-width: 182mm; margin: 0 auto; padding: 1rem; font-size: 9.6pt; line-height: 1.36; --jp-ui-font-color0: var(--ink);
  --jp-ui-font-color2: var(--quiet); --jp-border-color2: var(--line); --jp-layout-color0: var(--paper); }
h1 { font-size: 16pt; margin: 0 0 1mm; } h2 { font-size: 10.5pt; margin: 3mm 0 1mm; color: var(--accent); } h3 { font-size: 9.6pt; margin: 2mm 0 .5mm; }
p, ul { margin: 1mm 0; } ul { padding-left: 4.5mm; } .quiet { color: var(--quiet); }
.two { columns: 2; column-gap: 7mm; } .two > * { break-inside: avoid; }
pre { font: 7.6pt/1.3 ui-monospace, Menlo, Consolas, monospace; margin: .5mm 0 1.5mm; white-space: pre-wrap; }
.figure { display: flex; gap: 6mm; justify-content: center; } .figure svg { flex: 1 1 0; min-width: 0; max-height: 48mm; max-width: 120mm !important; }
@media print { :root { --ink: #000; --quiet: #444; --line: #bbb; --paper: #fff; --accent: #003e73; } body { padding: 0; } a { color: inherit; text-decoration: none; } }
"""  # noqa: E501
_MATHJAX = """<script>MathJax = {tex: {inlineMath: [["$", "$"]]}, chtml: {scale: 0.92}};</script>
<script async src="https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml.js"></script>"""


class SiteError(ValueError):
    """The pages can't be made; the message says why and what to do. What was at the place before is still there."""


def build_site(
    root: str | os.PathLike,
    out: str | os.PathLike,
    *,
    executed: str | os.PathLike | None = None,
    fast: bool = False,
    labs: list[str] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write the site to the folder `out`, which appears in one step; returns the pages, the index first.

    executed  a folder with notebooks that were run already (NN_name.ipynb): these are shown as they are; others are run
    fast      run with `fast` on: fewer steps, for a look at the layout
    labs      only these, by number: "02", "2b"; None: all

    Raises SiteError, also for a notebook that does not run to its end. An older site at `out` is replaced, anything else is not.
    """
    from papermill import PapermillExecutionError

    from .builder import _labs

    root, out = Path(root).resolve(), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / "index.html").is_file()):
        raise SiteError(f"asked to write pages to {out}, which holds something else; name a new folder")
    wanted = [lab for source in sources(root) if (lab := _labs().get(source.stem)) and _asked(lab, labs)]
    if not wanted:
        raise SiteError(f"no lab to show: asked for {', '.join(labs or ['all'])}, found {', '.join(s.stem for s in sources(root)) or 'no sources'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        site = Path(temporary) / "site"
        (site / "handouts").mkdir(parents=True)
        (site / "img").mkdir()
        shown = []
        for lab in wanted:
            ready = Path(executed) / f"{lab.name}.ipynb" if executed is not None else None
            try:
                notebook = _read(ready) if ready is not None and ready.is_file() else _run(root, lab, fast, Path(temporary), say)
            except PapermillExecutionError as error:
                raise SiteError(f"{lab.name} did not run to its end: {error.ename}: {error.evalue}") from error
            except BuildError as error:
                raise SiteError(f"{lab.name} does not build: {error}") from error
            shown.append((lab, notebook))
        for number, (lab, notebook) in enumerate(shown):
            before = shown[number - 1][0] if number else None
            after = shown[number + 1][0] if number + 1 < len(shown) else None
            (site / f"{lab.name}.html").write_text(lab_page(lab, notebook, before, after), encoding="utf-8")
            (site / "handouts" / f"{lab.name}.html").write_text(handout(lab, notebook), encoding="utf-8")
        for name, *_ in PICTURES:
            for picture in (root / "docs" / "img").glob(f"{name}*.png"):
                shutil.copy2(picture, site / "img" / picture.name)
        (site / "index.html").write_text(index_page(shown, {path.name for path in (site / "img").iterdir()}), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(site, out)
    return [out / "index.html", *(out / f"{lab.name}.html" for lab, _ in shown), *(out / "handouts" / f"{lab.name}.html" for lab, _ in shown)]


def _asked(lab, labs: list[str] | None) -> bool:
    return labs is None or lab.number in labs or lab.label in labs or lab.name in labs


def _read(path: Path):
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises a dozen kinds
        raise SiteError(f"{path} is not a notebook: {error}") from error


def _run(root: Path, lab, fast: bool, folder: Path, say):
    """The student's notebook, unsolved, run from top to bottom."""
    say(f"running {lab.name}")
    notebook = build_lab(root / "notebooks" / "source" / f"{lab.name}.py").student
    where = folder / f"run-{lab.name}"
    where.mkdir()
    with environment(LORA_LAB_RECORDS=str(where / "records.jsonl")):
        return run_notebook(notebook, {"fast": True} if fast else {}, cwd=where).notebook


# ---- one lab -----------------------------------------------------------------------------------------------------------------


def lab_page(lab, notebook, before=None, after=None) -> str:
    """The executed notebook as a page, with ways to its neighbours. Cells for Colab and the parameters are left out."""
    import copy

    from nbconvert import HTMLExporter

    notebook = copy.deepcopy(notebook)
    hidden = {"colab", "parameters", "injected-parameters", "hidden"}
    notebook.cells = [cell for cell in notebook.cells if not hidden & set(cell.metadata.get("tags", ()))]
    exporter = HTMLExporter(template_name="lab", embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True)
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": f"{lab.label} · {lab.title}"}})
    ways = ['<a href="index.html">All labs</a>']
    ways += [f'<a href="{before.name}.html" rel="prev">← {before.label} {escape(before.title)}</a>'] if before else []
    ways += [f'<a href="{after.name}.html" rel="next">{after.label} {escape(after.title)} →</a>'] if after else []
    ways += [f'<a href="handouts/{lab.name}.html">on one sheet</a>']
    bar = f'<nav aria-label="labs" style="max-width:60em;margin:1em auto;padding:0 1em;font:15px system-ui,sans-serif">{" · ".join(ways)}</nav>'
    page = page.replace("<html>", '<html lang="en">', 1)
    return re.sub(r"(<body[^>]*>)", lambda match: match[1] + bar, page, count=1).replace("</body>", bar + "</body>", 1)


def figures(notebook) -> list[str]:
    """The figures of an executed notebook, as <svg> elements, in order."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            page = output.get("data", {}).get("text/html", "")
            page = "".join(page) if isinstance(page, list) else page
            found += re.findall(r"<svg\b[^>]*role=\"img\".*?</svg>", page, flags=re.S)
    return found


def handout(lab, notebook) -> str:
    """One sheet of paper: what the lab is for, its formulas, its first two figures, its exercises with their signatures, its summary."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    code = {cell.metadata.get("exercise"): cell.source for cell in notebook.cells if cell.cell_type == "code" and cell.metadata.get("exercise")}
    parts = ["<h2>What you can do afterwards</h2>" + _markdown("\n".join(f"- {goal}" for goal in lab.objectives))]
    shown = _formulas(texts)
    if shown:
        parts.append("<h2>Formulas</h2>" + "".join(f"<h3>{escape(heading)}</h3><p>$${formula}$$</p>" for heading, formula in shown))
    rows = []
    for exercise in lab.exercises:
        rows.append(f"<h3>{exercise.id} {escape(exercise.title)} <span class=quiet>({exercise.points} points, {exercise.minutes} min)</span></h3>")
        rows.append(f"<pre>{escape(_signature(code.get(exercise.id, ''), exercise.name))}</pre>")
    parts.append("<h2>Exercises</h2>" + "".join(rows))
    if lab.predictions:
        asked = lab.predictions[:MOST_QUESTIONS]
        questions = "".join(f"<li>{_inline(prediction.question)}</li>" for prediction in asked)
        if len(asked) < len(lab.predictions):
            questions += f"<li>and {len(lab.predictions) - len(asked)} more in the notebook</li>"
        parts.append(f"<h2>Think before you run</h2><ul>{questions}</ul>")
    summary = _summary(texts)
    if summary:
        parts.append("<h2>To take away</h2>" + _markdown(summary))
    pictures = [svg for svg in figures(notebook) if len(svg) < LARGEST_THUMBNAIL][:2]
    figure = f'<div class="figure">{"".join(pictures)}</div>' if pictures else ""
    title = f"{lab.label} · {lab.title}"
    head = f'<h1>{escape(title)}</h1><p class="quiet">{lab.minutes} minutes · {lab.points} points · needs {escape("; ".join(lab.needs)) or "nothing"}</p>'
    return _page(title, _HANDOUT_STYLE, head + figure + f'<div class="two">{"".join(f"<section>{part}</section>" for part in parts)}</div>', _MATHJAX)


def _formulas(texts: list[str]) -> list[tuple[str, str]]:
    """(heading above it, formula) of all displayed formulas of a notebook, each once."""
    found, heading = {}, ""
    for text in texts:
        for match in re.finditer(r"^#+ +(?P<heading>[^\n]+)$|\$\$(?P<formula>.+?)\$\$", text, flags=re.M | re.S):
            if match["heading"]:
                heading = re.sub(r"^(Exercise )?[\d.a-z]+ · ", "", match["heading"]).strip()
            else:
                found.setdefault(match["formula"].strip(), heading)
    return [(heading, formula) for formula, heading in found.items()]


def _signature(stub: str, name: str) -> str:
    """The line a student begins with: `def name(...)` or `class Name`, with its annotations."""
    match = re.search(rf"^(?:def|class) {re.escape(name)}\b.*?:\n", stub, flags=re.M | re.S)
    return match[0].strip().removesuffix(":") if match else name


def _summary(texts: list[str]) -> str:
    """The section called Summary, or the last text cell, without its heading."""
    for text in reversed(texts):
        match = re.search(r"^## +Summary\s*\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
        if match:
            return match[1].strip()
    return re.sub(r"^#+ .*\n", "", texts[-1]).strip() if texts else ""


# ---- the first page ----------------------------------------------------------------------------------------------------------


def index_page(shown: list[tuple[Any, Any]], images: set[str]) -> str:
    """shown: (lab, executed notebook); images: names of the files in img/."""
    pictures = []
    for name, alt, caption, label in PICTURES:
        if f"{name}.png" not in images:
            continue
        dark = f'<source srcset="img/{name}_dark.png" media="(prefers-color-scheme: dark)">' if f"{name}_dark.png" in images else ""
        pictures.append(
            f'<figure><picture>{dark}<img src="img/{name}.png" alt="{escape(alt)}"></picture>'
            f"<figcaption>{escape(caption)} (Lab {label})</figcaption></figure>"
        )
    cards = []
    for lab, notebook in shown:
        picture = next((svg for svg in figures(notebook) if len(svg) < LARGEST_THUMBNAIL), "")
        # The figure is said in words on the lab's own page; here it is an ornament beside a heading that says what the lab is.
        picture = picture and f'<div class="thumbnail" aria-hidden="true">{picture}</div>'
        goals = "".join(f"<li>{_inline(goal)}</li>" for goal in lab.objectives[:3])
        kind = "" if lab.core else " · elective"
        cards.append(
            f'<li class="lab">{picture}<h3><a href="{lab.name}.html">{lab.label} {escape(lab.title)}</a></h3>'
            f"<p>{lab.minutes} minutes · {len(lab.exercises)} exercises{kind}</p><ul>{goals}</ul>"
            f'<div class="more"><a href="handouts/{lab.name}.html">on one sheet of paper</a></div></li>'
        )
    body = (
        "<h1>LoRA Lab</h1><p class=lead>Low-rank adaptation, built, broken and measured: graded Jupyter notebooks on real data, for any laptop, without a "
        "GPU and without a network. These pages are the labs as they ran, without answers.</p>"
        f'<div class="pictures">{"".join(pictures)}</div><h2>The labs</h2><ul class="labs">{"".join(cards)}</ul>'
    )
    return _page("LoRA Lab", _INDEX_STYLE, body, _MATHJAX)


def _page(title: str, style: str, body: str, head: str = "") -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style>{head}</head><body>{body}</body></html>\n"
    )


def _markdown(text: str) -> str:
    from nbconvert.filters import markdown2html

    return str(markdown2html(text))


def _inline(text: str) -> str:
    """Markdown of one line, without its paragraph."""
    return re.sub(r"^<p>|</p>$", "", _markdown(text).strip())
