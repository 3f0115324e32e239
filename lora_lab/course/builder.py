"""From one percent-format source per lab to a student and an instructor notebook.

The builder knows notebooks and nothing of what a lab teaches: titles, minutes and exercises come from a `Lab`.
It writes the parts of a notebook that people would otherwise keep in step by hand (opening, exercise headers, badges,
the Colab cell, cell ids, nbgrader's metadata), takes the answers out of the student's copy, and refuses a lab that
breaks a rule of the house. It lists everything that is wrong with a lab at once, and then writes nothing.
"""

import ast
import hashlib
import json
import keyword
import os
import re
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jupytext
import nbformat
from jupytext.stringparser import StringParser
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell

from lora_lab.course.exercise import UNANSWERED
from lora_lab.files import atomic_write

MAX_WORDS = 60  # of prose between two code cells
MAX_CELLS = 40  # written for students; headers, opening, the Colab cell and cells to answer in words come on top
MAX_SHARE = 0.6  # of a lab's minutes that go into exercises: the rest is seeing, predicting, reading

OPENING, BADGES = "<!-- lab:opening -->", "<!-- lab:badges -->"
DIFFICULTY = {1: "●○○ easy", 2: "●●○ medium", 3: "●●● hard"}

_MARKER = re.compile(r"^(?P<indent>\s*)### (?P<which>BEGIN|END) SOLUTION\s*$")
# Anything that looks like a marker and is none would publish the answer, so it is looked for generously.
_ALMOST = re.compile(r"\b(begin|end)[ _-]+solution\b", re.IGNORECASE)
_JUPYTEXT_ONLY = {"cell_marker", "lines_to_next_cell", "lines_to_end_of_cell_marker"}
_NEW_CELL = {"code": new_code_cell, "markdown": new_markdown_cell, "raw": new_raw_cell}


class BuildError(ValueError):
    """A source that cannot become a notebook. `problems`: per fault one text with file, line, fault and remedy."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class Built(NamedTuple):
    student: NotebookNode
    instructor: NotebookNode


@dataclass(frozen=True)
class _Cell:
    """One cell of a source. `line` is that of its `# %%`, `first` that of its first line of text (both from 1)."""

    kind: str
    text: str
    metadata: Mapping[str, Any]
    line: int
    first: int

    @property
    def tags(self) -> list[str]:
        return list(self.metadata.get("tags", ()))

    @property
    def hidden(self) -> bool:
        return "hidden" in self.tags

    @property
    def exercise(self) -> str | None:
        return self.metadata.get("exercise")

    @property
    def check(self) -> str | None:
        return self.metadata.get("check")

    @property
    def free(self) -> str | None:
        return self.metadata.get("free")


class _Problems:
    """Collects the faults of one source."""

    def __init__(self, source: Path):
        self.name, self.lines = source.name, []

    def add(self, line: int, message: str) -> None:
        self.lines.append(f"{self.name}, line {line}: {message}")

    def raise_if_any(self) -> None:
        if self.lines:
            raise BuildError(self.lines)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a source


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # some Windows editors write a byte order mark; newlines become \n


def _cell_starts(text: str) -> list[int]:
    """Line numbers (from 0) of the `# %%` lines; those inside a string that spans lines don't count, as in jupytext."""
    strings, starts = StringParser("python"), []
    for number, line in enumerate(text.splitlines()):
        if re.match(r"\s*#\s*%%+(\s|$)", line) and not strings.is_quoted():
            starts.append(number)
        strings.read_line(line)
    return starts


def _read_cells(path: Path) -> list[_Cell]:
    text = _read_text(path)
    lines, starts = text.splitlines(), _cell_starts(text)
    cells = jupytext.reads(text, fmt="py:percent").cells
    if len(cells) != len(starts):
        raise BuildError(
            [
                f"{path.name}, line 1: jupytext finds {len(cells)} cells and {len(starts)} lines begin with '# %%'; "
                f"start every cell with '# %%', the first one too"
            ]
        )
    found = []
    for cell, start, end in zip(cells, starts, [*starts[1:], len(lines)], strict=True):
        # A cell's text usually begins on the next line, but not in the """ form of a markdown cell.
        head = cell.source.split("\n", 1)[0]
        first = next((n for n in range(start + 1, end) if head in lines[n]), start + 1)
        metadata = {key: value for key, value in cell.metadata.items() if key not in _JUPYTEXT_ONLY}
        found.append(_Cell(cell.cell_type, cell.source, metadata, start + 1, first + 1))
    return found


def _project(root: Path | None) -> tuple[str | None, str | None]:
    """(address, tag): `[project.urls] Repository`, the only place where it stands, and the tag of `[project] version`, v0.1.0."""
    if root is None or not (root / "pyproject.toml").exists():
        return None, None
    project = tomllib.loads(_read_text(root / "pyproject.toml")).get("project", {})
    address = project.get("urls", {}).get("Repository", "").rstrip("/").removesuffix(".git") or None
    return address, f"v{project['version']}" if "version" in project else None


def _root_of(source: Path) -> Path | None:
    return next((folder for folder in source.resolve().parents if (folder / "pyproject.toml").exists()), None)


# ---------------------------------------------------------------------------------------------------------------------
# Rules


def _check_markers(cells: list[_Cell], problems: _Problems) -> None:
    for cell in cells:
        opened, regions = None, 0  # line of the open region, number of regions
        for line, text in enumerate(cell.text.split("\n"), cell.first):
            marker = _MARKER.match(text)
            if marker is None:
                if _ALMOST.search(text):
                    problems.add(
                        line,
                        f"{text.strip()!r} is not quite an answer marker and would show the answer; "
                        f"write '### BEGIN SOLUTION' or '### END SOLUTION' alone on the line",
                    )
            elif marker["which"] == "BEGIN":
                if opened is not None:
                    problems.add(
                        line,
                        f"### BEGIN SOLUTION inside the answer opened in line {opened}; "
                        f"regions cannot be nested, close that one first",
                    )
                else:
                    opened, regions = line, regions + 1
            elif opened is None:
                problems.add(line, "### END SOLUTION without a ### BEGIN SOLUTION above it in this cell; add it")
            else:
                opened = None
        if opened is not None:
            problems.add(opened, "### BEGIN SOLUTION is never closed; add ### END SOLUTION before the cell ends")
        if regions and (cell.kind != "code" or cell.exercise is None):
            problems.add(
                cell.line, 'an answer region outside an exercise; give this code cell exercise="..." or take it out'
            )
        if cell.exercise is not None and not regions:
            problems.add(
                cell.line,
                f"exercise {cell.exercise} has no answer region, so students would get its answer; "
                f"put it between ### BEGIN SOLUTION and ### END SOLUTION",
            )


def _check_exercises(cells: list[_Cell], lab: Any, problems: _Problems) -> None:
    known = {exercise.id for exercise in lab.exercises}
    for kind in ("exercise", "check"):
        seen = {}
        for cell in cells:
            name = cell.metadata.get(kind)
            if name is None:
                continue
            if not isinstance(name, str):
                problems.add(cell.line, f'{kind}={name!r} is not text (2.10 would become 2.1); write {kind}="..."')
            elif cell.kind != "code":
                problems.add(cell.line, f"{kind} {name} is a {cell.kind} cell; make it a code cell")
            elif name in seen:
                problems.add(cell.line, f"{kind} {name} stands in line {seen[name]} already; give this one its own id")
            elif name not in known:
                problems.add(
                    cell.line,
                    f"{kind} {name} is not in the lab's file, which has {', '.join(sorted(known)) or 'none'}; "
                    f"describe it there or correct the id",
                )
            seen.setdefault(name, cell.line)
        if kind == "exercise":
            for name in sorted(known - set(seen)):
                problems.add(
                    1,
                    f'the lab\'s file has exercise {name} and this source lacks it; add a cell with exercise="{name}"',
                )
    for above, cell in zip([None, *cells], cells, strict=False):
        if cell.check is not None and (above is None or above.exercise != cell.check):
            problems.add(
                cell.line, f"check {cell.check} does not stand right below its exercise; move it under that cell"
            )
    checked = {cell.check for cell in cells}
    for cell in cells:
        if cell.exercise is not None and cell.exercise not in checked:
            problems.add(cell.line, f'exercise {cell.exercise} has no check; add a cell with check="{cell.exercise}"')


def _check_questions(cells: list[_Cell], lab: Any, problems: _Problems) -> None:
    """Each question of the lab's file has one markdown cell, with an answer in the source that students don't get."""
    known, seen = {question.id: question for question in lab.questions}, {}
    for cell in cells:
        name = cell.free
        if name is None:
            continue
        if name not in known:
            problems.add(
                cell.line,
                f"question {name!r} is not in the lab's file, which has {', '.join(sorted(known)) or 'none'}; describe it there or correct the id",
            )
        elif name in seen:
            problems.add(cell.line, f"question {name} stands in line {seen[name]} already; give this one its own id")
        if cell.kind != "markdown" or cell.hidden:
            problems.add(cell.line, f"question {name} is answered in words; make it a markdown cell that is not hidden")
        if not cell.text.strip():
            problems.add(cell.line, f"question {name} has no answer for those who teach; write one, students get an empty cell")
        seen.setdefault(name, cell.line)
    for name in sorted(set(known) - set(seen)):
        problems.add(1, f'the lab\'s file has question {name} and this source lacks it; add a markdown cell with free="{name}" and an answer')
    for name, question in known.items():
        words, _ = _read_markdown(question.ask)
        if words > MAX_WORDS:
            problems.add(seen.get(name, 1), f"question {name} has {words} words, at most {MAX_WORDS}; cut")


def _check_lab(cells: list[_Cell], lab: Any, problems: _Problems) -> None:
    if not lab.objectives:
        problems.add(1, f"lab {lab.name} has no objectives; say in the lab's file what students will learn")
    needed = sum(exercise.minutes for exercise in lab.exercises)
    if needed > MAX_SHARE * lab.minutes:
        problems.add(
            1,
            f"the exercises take {needed:g} of {lab.minutes:g} minutes, more than {MAX_SHARE:.0%}; "
            f"shorten them, drop one, or give the lab more time",
        )
    length = sum(not cell.hidden and cell.free is None for cell in cells)
    if length > MAX_CELLS:
        problems.add(1, f"{length} cells, at most {MAX_CELLS}; merge some or split the lab")
    heading = f"# {lab.name.partition('_')[0]} · {lab.title}"
    if not cells or cells[0].kind != "markdown" or cells[0].text.split("\n")[0].strip() != heading:
        problems.add(
            cells[0].line if cells else 1, f"a lab begins with a markdown cell whose first line is {heading!r}"
        )
    parameters = [cell for cell in cells if "parameters" in cell.tags]
    if len(parameters) != 1:
        problems.add(
            parameters[1].line if parameters else 1,
            f'{len(parameters)} cells tagged "parameters", where papermill needs one; '
            f'keep one code cell with tags=["parameters"]',
        )
    for marker in (OPENING, BADGES):
        for cell in cells[1:] if marker == BADGES else cells[2:]:
            if marker in cell.text:
                problems.add(cell.line, f"{marker} belongs under the heading; move it to the first cell")


# The parser reads headings, lists, tables, images and HTML as Jupyter does; dollarmath adds $...$ and $$...$$.
_MARKDOWN = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)


class _Html(HTMLParser):
    """The words of a piece of HTML, and whether an image in it has no alt text."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.bare_image, self.skip = [], False, 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.skip += tag in ("style", "script")
        self.bare_image |= tag == "img" and not (dict(attributes).get("alt") or "").strip()

    def handle_endtag(self, tag):
        self.skip -= tag in ("style", "script")

    def handle_data(self, data):
        if not self.skip:
            self.text.append(data)


def _read_markdown(text: str) -> tuple[int, list[int]]:
    """Words of prose in a markdown cell, and the lines (from 0) of its images without alt text.

    Not prose: fenced code, display and inline math, tables, alt texts, the title of the lab, link targets.
    """
    words, bare = 0, []

    def count(piece: str) -> int:
        return sum(any(letter.isalnum() for letter in word) for word in piece.split())

    def read_html(html: str, line: int) -> str:
        parsed = _Html(html)
        if parsed.bare_image:
            bare.append(line)
        return " ".join(parsed.text)

    in_table = in_title = False
    for token in _MARKDOWN.parse(text):
        line = token.map[0] if token.map else 0
        if token.type in ("table_open", "table_close"):
            in_table = token.nesting == 1
        elif token.type in ("heading_open", "heading_close"):
            in_title = token.nesting == 1 and token.tag == "h1"
        elif token.type == "html_block":
            words += count(read_html(token.content, line))
        elif token.type == "inline":
            pieces = []
            for child in token.children:
                if child.type == "image" and not child.content.strip():
                    bare.append(line)
                elif child.type in ("text", "code_inline"):
                    pieces.append(child.content)
                elif child.type == "html_inline":
                    pieces.append(read_html(child.content, line))
                elif child.type in ("softbreak", "hardbreak"):
                    pieces.append("\n")
            # Joined before counting: the two halves of **em**phasis are one word.
            words += 0 if in_table or in_title else count("".join(pieces))
    return words, bare


def _check_prose(cells: list[_Cell], problems: _Problems) -> None:
    words, start = 0, None
    for cell in [*(cell for cell in cells if not cell.hidden), None]:  # a hidden cell parts nothing for a student
        if cell is not None and cell.free is not None:
            continue  # a student sees one line there
        if cell is not None and cell.kind == "markdown":
            more, bare = _read_markdown(cell.text)
            words, start = words + more, start or cell.line
            for line in bare:
                problems.add(
                    cell.first + line,
                    "an image without alt text; say in the brackets (or alt=) what a reader should see in it",
                )
        elif cell is None or cell.kind == "code":
            if words > MAX_WORDS:
                problems.add(
                    start,
                    f"{words} words of prose before the next code cell, at most {MAX_WORDS}; "
                    f"cut, or let a figure, a question or a slider say it",
                )
            words, start = 0, None


def _parse(code: str) -> ast.Module | None:
    """The syntax tree of a code cell with its magics, None if the cell is in another language (`%%html`)."""
    from IPython.core.inputtransformer2 import TransformerManager

    # IPython drops empty lines at the top, and line numbers would shift.
    code = re.sub(r"^(\s*\n)+", lambda blank: "#\n" * blank[0].count("\n"), code)
    foreign = re.match(r"(#\n)*%%", code) is not None
    if foreign:  # %%time and its like hold Python below their first line
        code = re.sub(r"^%%.*", "#", code, count=1, flags=re.MULTILINE)
    try:
        return ast.parse(TransformerManager().transform_cell(code))
    except SyntaxError:
        if foreign:
            return None
        raise


def _parses(code: str) -> bool:
    try:
        return _parse(code) is not None
    except SyntaxError:
        return False


def _check_code(cells: list[_Cell], problems: _Problems) -> None:
    for cell in cells:
        if cell.kind != "code":
            continue
        try:
            tree = _parse(cell.text)
        except SyntaxError as error:
            problems.add(cell.first + (error.lineno or 1) - 1, f"this cell is not valid Python: {error.msg}")
            continue
        for node in ast.walk(tree) if tree else ():
            if not isinstance(node, ast.Call):
                continue
            line, name = cell.first + node.lineno - 1, ast.unparse(node.func)
            if name in ("plt.show", "pyplot.show", "matplotlib.pyplot.show"):
                problems.add(line, f'{name}() gives a picture without alt text; use show(figure, alt="...")')
            elif name == "show" or name.endswith("view.show"):
                alt = next((keyword.value for keyword in node.keywords if keyword.arg == "alt"), None)
                empty = isinstance(alt, ast.Constant) and not (isinstance(alt.value, str) and alt.value.strip())
                if alt is None or empty:
                    problems.add(
                        line, 'show() without alt text; add alt="..." with what a reader should see in the figure'
                    )


def _check_stubs(cells: list[_Cell], problems: _Problems) -> None:
    """What is left when the answer is gone must still be Python, and must raise only when somebody calls it."""
    for cell in cells:
        if cell.exercise is None or not _parses(cell.text):  # that was said already
            continue
        try:
            tree = _parse(_without_answer(cell.text, cell.exercise, "it"))
        except SyntaxError as error:
            problems.add(
                cell.line,
                f"without its answer, exercise {cell.exercise} is not valid Python ({error.msg}); "
                f"let the region hold whole statements",
            )
            continue
        if any(
            isinstance(node, ast.Raise) and f"exercise {cell.exercise}" in ast.unparse(node) for node in _at_once(tree)
        ):
            problems.add(
                cell.line,
                f"without its answer, exercise {cell.exercise} raises as soon as its cell runs, and an unsolved "
                f"notebook stops there; put the answer inside a function",
            )


def _at_once(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the cell does: everything but the insides of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _at_once(child)


# ---------------------------------------------------------------------------------------------------------------------
# Making the notebooks


def _without_answer(code: str, exercise: str, name: str) -> str:
    kept, inside = [], False
    for line in code.split("\n"):
        marker = _MARKER.match(line)
        if marker:
            inside = marker["which"] == "BEGIN"
            if inside:
                message = json.dumps(f"exercise {exercise}: write {name}", ensure_ascii=False)
                kept.append(f"{marker['indent']}raise NotImplementedError({message})")
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def _without_markers(code: str) -> str:
    return "\n".join(line for line in code.split("\n") if not _MARKER.match(line))


def _slug(exercise: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", exercise)


def _cell_ids(cells: list[_Cell]) -> list[str]:
    """The exercise's id where there is one, else a hash of the cell's own text: an edit moves no other cell's id."""
    taken, ids = {}, []
    for cell in cells:
        if cell.exercise is not None:
            name = f"ex-{_slug(cell.exercise)}"
        elif cell.check is not None:
            name = f"check-{_slug(cell.check)}"
        elif cell.free is not None:
            name = f"free-{_slug(cell.free)}"
        else:
            name = "c-" + hashlib.sha256(f"{cell.kind}\n{cell.text}".encode()).hexdigest()[:12]
        taken[name] = taken.get(name, 0) + 1
        ids.append(name if taken[name] == 1 else f"{name}-{taken[name]}")
    return ids


def _plural(count: float, word: str) -> str:
    return f"{count:g} {word}" + ("" if count == 1 else "s")


def _opening(lab: Any) -> str:
    points = sum(exercise.points for exercise in lab.exercises)
    needs = lab.needs if isinstance(lab.needs, str) else "; ".join(lab.needs)
    goals = "\n".join(f"- {objective}" for objective in lab.objectives)
    words = sum(question.points for question in lab.questions)
    more = f" · and {_plural(words, 'point')} for what you write" if words else ""
    return (
        f"**{_plural(lab.minutes, 'minute')} · {_plural(len(lab.exercises), 'exercise')} · {_plural(points, 'point')}{more}"
        f"{'' if lab.core else ' · elective'}**\n\n"
        f"**What you will learn**\n\n{goals}\n\n**What you need**: {needs}"
    )


def _header(exercise: Any) -> str:
    return (
        f"### Exercise {exercise.id} · {exercise.title}\n\n"
        f"{DIFFICULTY[exercise.difficulty]} · {_plural(exercise.minutes, 'minute')}"
        f" · {_plural(exercise.points, 'point')}"
    )


def _question_header(question: Any) -> str:
    rubric = "\n".join(f"- {what} ({_plural(points, 'point')})" for points, what in question.rubric)
    return (
        f"### In your own words {question.id} · {question.title}\n\n"
        f"{_plural(question.minutes, 'minute')}, at home if class is over · {_plural(question.points, 'point')}, given by a person\n\n"
        f"{question.ask}\n\n{rubric}"
    )


def _badges(repository: str | None, tag: str | None, name: str) -> str:
    """Binder and Colab open a notebook by its address on GitHub; from elsewhere there is nothing to link to."""
    address = urlsplit(repository or "")
    if address.hostname != "github.com":
        return ""
    slug, notebook = address.path.strip("/"), f"notebooks/{name}.ipynb"
    # Links and no images: a room without a network would see two broken pictures first. To a release, because Binder builds an
    # image for each commit that is asked for (minutes, and for a class only once), and Colab's cell installs that release.
    binder = f"https://mybinder.org/v2/gh/{slug}/{tag or 'HEAD'}?urlpath=lab/tree/{notebook}"
    colab = f"https://colab.research.google.com/github/{slug}/blob/{tag or 'main'}/{notebook}"
    return f"[Open in Binder]({binder}) · [Open in Colab]({colab})"


def _colab(repository: str, tag: str | None) -> str:
    # --no-deps: Colab's PyTorch is built for its driver, and its ipywidgets belongs to its page. `add_missing` knows the rest.
    return (
        'if "google.colab" in __import__("sys").modules:  # on Colab only: the lab, and what Colab lacks\n'
        f'    %pip install --quiet --no-deps "lora-lab @ git+{repository}{f"@{tag}" if tag else ""}"\n'
        "    from lora_lab.doctor import add_missing; add_missing()"
    )


def _nbgrader(cell: _Cell, points: float) -> dict[str, Any]:
    common = {"schema_version": 3, "task": False, "cell_type": cell.kind}
    if cell.free is not None:  # nbgrader's manually graded answer
        own = {"grade": True, "grade_id": f"free-{_slug(cell.free)}", "locked": False, "solution": True, "points": points}
    elif cell.exercise is not None:
        own = {"grade": False, "grade_id": f"ex-{_slug(cell.exercise)}", "locked": False, "solution": True}
    else:
        own = {"grade": True, "grade_id": f"check-{_slug(cell.check)}", "locked": True, "solution": False}
        own["points"] = points
    return {**common, **own, **cell.metadata.get("nbgrader", {})}  # what the source says itself stands


def _fingerprint(notebook: Mapping[str, Any]) -> str:
    """Hash of what a notebook's cells say: a copy whose cells still match was never worked in."""

    def joined(text: str | list[str]) -> str:
        return text if isinstance(text, str) else "".join(text)

    cells = [[cell["cell_type"], joined(cell["source"])] for cell in notebook["cells"]]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]


def _assemble(
    cells: list[_Cell], lab: Any, repository: str | None, tag: str | None, solved: frozenset[str] | None
) -> NotebookNode:
    """One copy. `solved`: exercises whose answer the student's copy keeps; None makes the instructor's copy."""
    exercises = {exercise.id: exercise for exercise in lab.exercises}
    questions = {question.id: question for question in lab.questions}
    made: list[NotebookNode] = []

    def generate(kind: str, name: str, text: str, **metadata: Any) -> None:
        made.append(_NEW_CELL[kind](text, id=name, metadata=metadata))

    colab_due, badges = repository is not None, _badges(repository, tag, lab.name)
    for cell, name in zip(cells, _cell_ids(cells), strict=True):
        if cell.hidden and solved is not None:
            continue
        text, metadata = cell.text, dict(cell.metadata)
        if cell.kind == "code" and colab_due:
            generate("code", "colab", _colab(repository, tag), tags=["colab"])
            colab_due = False
        if cell.exercise is not None:
            exercise = exercises[cell.exercise]
            generate("markdown", f"head-{_slug(cell.exercise)}", _header(exercise))
            if solved is not None:
                hide = cell.exercise not in solved
                text = _without_answer(text, exercise.id, exercise.name) if hide else _without_markers(text)
        if cell.free is not None:
            question = questions[cell.free]
            generate("markdown", f"head-{_slug(cell.free)}", _question_header(question))
            text = text if solved is None else UNANSWERED
            del metadata["free"]
            metadata |= {"tags": [*cell.tags, f"free:{cell.free}"], "nbgrader": _nbgrader(cell, question.points)}
        if cell.exercise is not None or cell.check is not None:
            metadata["nbgrader"] = _nbgrader(cell, exercises[cell.exercise or cell.check].points)
        opens = OPENING in text
        text = text.replace(BADGES, badges).replace(OPENING, "")
        text = re.sub(r"\n{3,}", "\n\n", text).strip() if text != cell.text and cell.kind == "markdown" else text
        if text or not opens:
            made.append(_NEW_CELL[cell.kind](text, id=name, metadata=metadata))
        if opens:
            generate("markdown", "opening", _opening(lab))
    notebook = new_notebook(
        cells=made,
        metadata={
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata["lora_lab"] = {"lab": lab.name, "built": _fingerprint(notebook)}
    nbformat.validate(notebook)
    return notebook


def build_lab(
    source: str | os.PathLike, solved: Iterable[str] = (), *, lab: Any = None, repository: str | None = None, tag: str | None = None
) -> Built:
    """Student and instructor notebook of one source.

    source: a percent-format file, NN_name.py; `lab` is the lab of that name unless given.
    solved: ids of exercises whose answers the student copy keeps (for half-solved runs).
    repository, tag: address and release for badges and the Colab cell, by default those of the pyproject.toml above the source.
    Raises BuildError, with every fault of the source in `problems`.
    """
    source = Path(source)
    if lab is None:
        lab = _labs().get(source.stem)
        if lab is None:
            raise BuildError(
                [f"{source.name}, line 1: no lab is called {source.stem!r}; there are {', '.join(sorted(_labs()))}"]
            )
    unknown = set(solved) - {exercise.id for exercise in lab.exercises}
    if unknown:
        raise BuildError([f"{source.name}, line 1: solved={sorted(unknown)} are no exercises of lab {lab.name}"])
    if repository is None:
        repository, tag = _project(_root_of(source))
    cells, problems = _read_cells(source), _Problems(source)
    _check_lab(cells, lab, problems)
    _check_markers(cells, problems)
    _check_exercises(cells, lab, problems)
    _check_questions(cells, lab, problems)
    _check_prose(cells, problems)
    _check_code(cells, problems)
    _check_stubs(cells, problems)
    problems.raise_if_any()
    student, instructor = (_assemble(cells, lab, repository, tag, kept) for kept in (frozenset(solved), None))
    return Built(student, instructor)


def _labs() -> Mapping[str, Any]:
    """Name -> Lab."""
    from lora_lab.course.labs import labs

    return {lab.name: lab for lab in labs().values()}


def notebook_text(notebook: NotebookNode) -> str:
    """The file's text: sorted keys, one trailing newline, the same bytes at each build."""
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def worked_in(path: Path) -> bool:
    """Whether somebody has typed into, run or made this notebook: then a build leaves it alone."""
    try:
        notebook = json.loads(_read_text(path))
        ran = any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
        return ran or notebook["metadata"]["lora_lab"]["built"] != _fingerprint(notebook)
    except (ValueError, KeyError, TypeError):
        return True


def sources(root: str | os.PathLike) -> list[Path]:
    """The sources of all labs under `root`, in order."""
    return sorted(Path(root, "notebooks", "source").glob("[0-9]*.py"))


def build_all(
    root: str | os.PathLike, check: bool = False, force: bool = False, labs: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Build every lab under `root`; returns what became of each student notebook, by file name.

    check=False writes notebooks/ and build/: "written", "unchanged", or "kept" for a notebook somebody has worked in,
    which only `force` replaces. check=True writes nothing and returns only the notebooks that a build would not leave
    as they are: "missing", "different", "stale" (no source makes it).
    Raises BuildError with the faults of all labs, before anything is written.
    """
    root, labs = Path(root), _labs() if labs is None else labs
    problems, texts = [], {}
    if not sources(root):
        problems.append(f"no sources in {root / 'notebooks' / 'source'}; is this the repository's root?")
    for name in sorted(set(labs) - {source.stem for source in sources(root)}):
        problems.append(f"lab {name} has no notebooks/source/{name}.py; write it or take the lab out")
    for source in sources(root):
        if source.stem not in labs:
            problems.append(f"{source.name}, line 1: no lab is called {source.stem!r}; add it to the labs")
            continue
        try:
            address, tag = _project(root)
            built = build_lab(source, lab=labs[source.stem], repository=address, tag=tag)
            texts[f"{source.stem}.ipynb"] = notebook_text(built.student), notebook_text(built.instructor)
        except BuildError as error:
            problems += error.problems
    if problems:
        raise BuildError(problems)

    folder, states = root / "notebooks", {}
    for name, (student, instructor) in texts.items():
        there = folder / name
        same = there.exists() and _read_text(there) == student  # read with \n, however git checked it out
        if check:
            if not same:
                states[name] = "different" if there.exists() else "missing"
            continue
        states[name] = "unchanged" if same else _write(there, student, force)
        _write(root / "build" / name, instructor, force)
    if check:
        states |= {path.name: "stale" for path in sorted(folder.glob("*.ipynb")) if path.name not in texts}
    return states


def _write(path: Path, text: str, force: bool) -> str:
    if path.exists() and not force and worked_in(path):
        return "kept"
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))  # bytes: \n on every platform
    return "written"


def answer_lines(source: str | os.PathLike) -> set[str]:
    """Lines of a source's answers that no student copy may contain.

    Stripped; left out are lines that give nothing away (under 8 characters, or without a name: `return {`) and lines that
    the source also shows outside its answers, such as a `return` that the stub keeps.
    """
    inside: dict[bool, set[str]] = {True: set(), False: set()}
    for cell in _read_cells(Path(source)):
        answer = cell.free is not None
        for line in cell.text.split("\n"):
            marker = _MARKER.match(line)
            if marker:
                answer = marker["which"] == "BEGIN"
            elif not cell.hidden or answer:
                inside[answer].add(line.strip())
    return {line for line in inside[True] - inside[False] if len(line) >= 8 and set(re.findall(r"[^\W\d]\w*", line)) - {*keyword.kwlist}}


# ---------------------------------------------------------------------------------------------------------------------
# Running a notebook


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Run(NamedTuple):
    notebook: NotebookNode
    seconds: float


def run_notebook(
    notebook: NotebookNode,
    parameters: Mapping[str, Any] | None = None,
    *,
    cwd: str | os.PathLike,
    out: str | os.PathLike | None = None,
) -> Run:
    """Run every cell with papermill in the folder `cwd`, headless (LORA_LAB_HEADLESS=1); `out` also saves the result.

    Raises papermill.PapermillExecutionError at the first cell that raises (`out` then has what ran so far), and
    ValueError for a parameter that the notebook's cell tagged "parameters" does not set: papermill would add it
    silently, and the run would not be what was asked for.
    """
    import papermill

    known = papermill.inspect_notebook(notebook)
    unknown = sorted(set(parameters or {}) - set(known))
    if unknown:
        raise ValueError(
            f"unknown parameter {', '.join(unknown)}; this notebook has {', '.join(sorted(known)) or 'none'}"
        )
    started = time.perf_counter()
    with environment(LORA_LAB_HEADLESS="1"):
        result = papermill.execute_notebook(
            notebook,
            None if out is None else str(Path(out).resolve()),  # it changes the working directory
            parameters=dict(parameters or {}),
            kernel_name="python3",
            progress_bar=False,
            cwd=str(cwd),
        )
    return Run(result, time.perf_counter() - started)
