"""The builder: what it makes, what it refuses, what it never lets out. It is tried on a sample lab of its own."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbgrader.nbgraderformat.v3 import MetadataValidatorV3

from lora_lab.course import builder
from lora_lab.course.builder import (
    BuildError,
    answer_lines,
    build_all,
    build_lab,
    notebook_text,
    run_notebook,
    worked_in,
)
from lora_lab.course.exercise import UNANSWERED, Question

SAMPLE = Path(__file__).parent / "sample_lab" / "01_sample.py"
TEXT = SAMPLE.read_text(encoding="utf-8")
ADDRESS = "https://github.com/someone/some-lab"
ANSWER = """\
    ### BEGIN SOLUTION
    secret_sum = x + x
    return secret_sum
    ### END SOLUTION
"""


def exercise(id, **changes):
    given = dict(id=id, title="Double it", difficulty=2, minutes=6, points=3, name="double")
    return SimpleNamespace(**given | changes)


def lab(**changes):
    given = dict(
        number="1",
        name="01_sample",
        title="A sample",
        minutes=30,
        core=True,
        objectives=("double a number", "fill two gaps"),
        needs=("addition", "patience"),
        exercises=(exercise("1.1"), exercise("1.2", title="Scale it", name="Scale", difficulty=1, minutes=1, points=1)),
        questions=(),
    )
    return SimpleNamespace(**given | changes)


def write(folder, text=TEXT, name="01_sample"):
    path = folder / f"{name}.py"
    path.write_bytes(text.encode("utf-8"))
    return path


def make(folder, text=TEXT, solved=(), **changes):
    return build_lab(write(folder, text), solved, lab=lab(**changes), repository=ADDRESS)


def edit(old, new):
    assert TEXT.count(old) == 1, f"{old!r} stands {TEXT.count(old)} times in the sample"
    return TEXT.replace(old, new)


def without_lab_markers():
    return TEXT.replace("# <!-- lab:badges -->\n", "").replace("# <!-- lab:opening -->\n", "")


def line_of(text, part):
    """Line number (from 1) of the only line with `part`."""
    (found,) = [number for number, line in enumerate(text.splitlines(), 1) if part in line]
    return found


def cell(notebook, name):
    (found,) = [cell for cell in notebook.cells if cell.id == name]
    return found


def refusals(folder, text=TEXT, **changes):
    with pytest.raises(BuildError) as error:
        make(folder, text, **changes)
    return error.value.problems


def refused(folder, text, line, *parts, **changes):
    """The source is refused for one reason only, at this line, in these words."""
    problems = refusals(folder, text, **changes)
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"01_sample.py, line {line}: "), problems
    for part in parts:
        assert part in problems[0]


# -- what it makes


def test_student_copy_has_stubs_and_the_instructor_copy_has_answers(tmp_path):
    student, instructor = make(tmp_path)
    assert cell(student, "ex-1-1").source == (
        "def double(x: float) -> float:\n"
        '    """Twice x."""\n'
        '    raise NotImplementedError("exercise 1.1: write double")'
    )
    scale = cell(student, "ex-1-2").source
    assert "    def __init__(self, factor):\n        raise NotImplementedError(" in scale
    assert (
        '        if x is None:\n            raise NotImplementedError("exercise 1.2: write Scale")\n        return x'
        in scale
    )
    assert "secret_sum = x + x" in cell(instructor, "ex-1-1").source
    assert "not for students" not in notebook_text(student)
    assert "not for students" in notebook_text(instructor)


def test_solved_keeps_these_answers_and_no_others(tmp_path):
    student = make(tmp_path, solved={"1.2"}).student
    assert "self.hidden_factor = factor" in cell(student, "ex-1-2").source
    assert "SOLUTION" not in notebook_text(student)
    assert "secret_sum" not in notebook_text(student)
    with pytest.raises(BuildError, match=r"\['9.9'\] are no exercises"):
        make(tmp_path, solved={"9.9"})


def test_opening_headers_and_badges_come_from_the_lab_and_the_address(tmp_path):
    student = make(tmp_path).student
    assert "<!-- lab:" not in notebook_text(student)
    heading, opening = student.cells[:2]
    assert heading.source.startswith("# 01 · A sample\n")
    assert "github/someone/some-lab/blob/main/notebooks/01_sample.ipynb" in heading.source
    assert "mybinder.org/v2/gh/someone/some-lab/HEAD?urlpath=lab/tree/notebooks/01_sample.ipynb" in heading.source
    assert opening.id == "opening"
    for part in ("30 minutes · 2 exercises · 4 points", "- double a number\n- fill two gaps", "addition; patience"):
        assert part in opening.source
    names = [cell.id for cell in student.cells]
    for number in ("1-1", "1-2"):
        assert names[names.index(f"ex-{number}") - 1] == f"head-{number}"
        assert names[names.index(f"ex-{number}") + 1] == f"check-{number}"
    assert cell(student, "head-1-1").source == "### Exercise 1.1 · Double it\n\n●●○ medium · 6 minutes · 3 points"
    assert cell(student, "head-1-2").source == "### Exercise 1.2 · Scale it\n\n●○○ easy · 1 minute · 1 point"
    assert "elective" not in opening.source and "elective" in cell(make(tmp_path, core=False).student, "opening").source


def test_the_address_stands_once(tmp_path):
    (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{ADDRESS}.git"\n')
    folder = tmp_path / "notebooks" / "source"
    folder.mkdir(parents=True)
    assert "someone/some-lab/blob" in build_lab(write(folder), lab=lab()).student.cells[0].source
    elsewhere = build_lab(write(folder), lab=lab(), repository="https://git.example.org/someone/some-lab")
    assert "Binder" not in elsewhere.student.cells[0].source  # Binder and Colab know GitHub's addresses only
    assert "git+https://git.example.org/someone/some-lab" in cell(elsewhere.student, "colab").source


def test_without_markers_no_opening_and_no_badges(tmp_path):
    student = make(tmp_path, without_lab_markers()).student
    assert "opening" not in [cell.id for cell in student.cells]
    assert "Binder" not in notebook_text(student)


def run_colab_cell(code, modules):
    """What the cell asks for, in order; nothing is installed and lora_lab is not imported."""
    from IPython.core.inputtransformer2 import TransformerManager

    calls = []
    shell = SimpleNamespace(run_line_magic=lambda *magic: calls.append(magic))
    program = TransformerManager().transform_cell(code)
    found = {"sys": SimpleNamespace(modules=modules), "lora_lab.doctor": SimpleNamespace(add_missing=lambda: calls.append("add_missing"))}
    exec(program, {"get_ipython": lambda: shell, "__builtins__": {"__import__": lambda name, *_: found[name]}})
    return calls


def test_the_colab_cell_comes_first_installs_there_and_does_nothing_elsewhere(tmp_path):
    student = make(tmp_path).student
    first = next(cell for cell in student.cells if cell.cell_type == "code")
    assert first.id == "colab" and first.metadata.tags == ["colab"]
    assert len(first.source.splitlines()) == 3
    assert run_colab_cell(first.source, {"sys": None}) == []
    (magic, arguments), last = run_colab_cell(first.source, {"google.colab": None})
    assert magic == "pip" and f'--no-deps "lora-lab @ git+{ADDRESS}"' in arguments and last == "add_missing"
    assert not re.search(r"upgrade|-U|force|torch", arguments)


def test_links_and_the_colab_cell_name_one_release(tmp_path):
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "3.1.4"\n[project.urls]\nRepository = "{ADDRESS}"\n')
    student = build_lab(write(tmp_path), lab=lab()).student
    assert f"git+{ADDRESS}@v3.1.4" in cell(student, "colab").source
    for link in ("/blob/v3.1.4/notebooks/01_sample.ipynb", "/v2/gh/someone/some-lab/v3.1.4?urlpath="):
        assert link in student.cells[0].source
    assert "HEAD" not in notebook_text(student) and "/main/" not in notebook_text(student)


# -- questions that are answered in words

QUESTION = Question("1.F1", "Why twice?", 5, "Why is twice a number *not* its square?", ((2, "says when both agree"), (1, "gives an example")))
FREE = '\n# %% [markdown] free="1.F1"\n# They agree at zero and at two, which decides nothing.\n'


def test_a_question_gets_its_header_and_an_empty_cell_for_students(tmp_path):
    student, instructor = make(tmp_path, TEXT + FREE, questions=(QUESTION,))
    for notebook in (student, instructor):
        head = cell(notebook, "head-1-F1").source
        assert head.startswith("### In your own words 1.F1 · Why twice?\n\n5 minutes") and QUESTION.ask in head
        assert "- says when both agree (2 points)\n- gives an example (1 point)" in head
        answer = cell(notebook, "free-1-F1")
        assert answer.cell_type == "markdown" and answer.metadata.tags == ["free:1.F1"] and "free" not in answer.metadata
        marked = answer.metadata.nbgrader
        assert (marked.grade, marked.solution, marked.points, marked.cell_type, marked.locked) == (True, True, 3, "markdown", False)
        MetadataValidatorV3().validate_nb(notebook)
    assert cell(student, "free-1-F1").source == UNANSWERED
    assert "decides nothing" in cell(instructor, "free-1-F1").source and "decides nothing" not in notebook_text(student)
    assert "and 3 points for what you write" in cell(student, "opening").source
    assert "They agree at zero and at two, which decides nothing." in answer_lines(tmp_path / "01_sample.py")


def test_what_the_grader_reads_is_what_the_builder_wrote(tmp_path):
    from lora_lab.course.grading.exports import said
    from lora_lab.course.grading.inside.reading import read

    student = make(tmp_path, TEXT + FREE, questions=(QUESTION,)).student
    for typed, kept in ((UNANSWERED, ""), ("Because.", "Because."), (f"{UNANSWERED}\n\nBecause.", "Because.")):
        cell(student, "free-1-F1").source = typed
        ((name, text),) = read(notebook_text(student).encode(), {})["free"]
        assert (name, said(text)) == ("1.F1", kept)


@pytest.mark.parametrize(("text", "questions", "said"), [
    (FREE, (), "'1.F1' is not in the lab's file, which has none"),
    ("", (QUESTION,), "has question 1.F1 and this source lacks it"),
    (FREE + FREE, (QUESTION,), "stands in line"),
    (FREE.replace(" [markdown]", "").replace("# They agree at zero and at two, which", "x = 1  #"), (QUESTION,), "make it a markdown cell"),
    (FREE.replace("# They agree at zero and at two, which decides nothing.", "#"), (QUESTION,), "has no answer for those who teach"),
    (FREE, (replace(QUESTION, ask="why " * 61),), "61 words, at most 60"),
])
def test_questions_that_are_refused(tmp_path, text, questions, said):
    problems = refusals(tmp_path, TEXT + text, questions=questions)
    assert len(problems) == 1 and said in problems[0], problems


def test_the_file_is_plain_deterministic_json(tmp_path):
    text = notebook_text(make(tmp_path).student)
    assert text.endswith("}\n") and not text.endswith("\n\n") and "\r" not in text
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    for one in notebook["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", one["id"])
        assert one["cell_type"] == "markdown" or (one["outputs"] == [] and one["execution_count"] is None)
        assert not {"lines_to_next_cell", "cell_marker"} & set(one["metadata"])
    nbformat.validate(nbformat.reads(text, as_version=4))


def test_the_same_bytes_under_another_hash_seed(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_builder import *; b = make(Path(sys.argv[2]));"
        "sys.stdout.buffer.write((notebook_text(b.student) + notebook_text(b.instructor)).encode())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "1"},  # this process has another, drawn at random
        capture_output=True,
        check=True,
    ).stdout
    here, again = make(tmp_path), make(tmp_path)
    assert notebook_text(here.student) == notebook_text(again.student)
    assert elsewhere == (notebook_text(here.student) + notebook_text(here.instructor)).encode()


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_windows_sources_build_the_same_bytes(tmp_path, prefix):
    expected = notebook_text(make(tmp_path).student)
    path = tmp_path / "01_sample.py"
    path.write_bytes(prefix + TEXT.replace("\n", "\r\n").encode())
    assert notebook_text(build_lab(path, lab=lab(), repository=ADDRESS).student) == expected


def test_cell_ids_stand_still_when_other_cells_change(tmp_path):
    before = [cell.id for cell in make(tmp_path).student.cells]
    assert len(set(before)) == len(before)
    edited = edit("# Twice a number is", "# Two times a number is")
    edited = edited.replace("# %% [markdown]\n# ## A class", "# %%\n1 + 1\n\n# %% [markdown]\n# ## A class")
    after = [cell.id for cell in make(tmp_path, edited).student.cells]
    assert len(set(before) - set(after)) == 1  # the edited one
    assert len(set(after) - set(before)) == 2  # the edited one and the new one
    kept = [name for name in before if name in after]
    assert kept == [name for name in after if name in before]


def test_equal_cells_get_different_ids(tmp_path):
    student = make(tmp_path, TEXT + "\n# %%\n1 + 1\n\n# %%\n1 + 1\n\n# %%\n1 + 1\n").student
    first, second, third = [cell.id for cell in student.cells][-3:]
    assert (second, third) == (f"{first}-2", f"{first}-3")


def test_magics_reach_the_notebook_and_disturb_nothing(tmp_path):
    text = edit("# %matplotlib inline\n", "# %matplotlib inline\n# !echo hello\n")
    text += "\n# %%\n# %%time\ntotal = sum(range(10))\n"
    text += '\n# %% language="html"\n# <b>not Python</b>\n'
    text += "\n# %%\nasync def later(): ...\nawaited = await later()\n"
    sources = [cell.source for cell in make(tmp_path, text).student.cells]
    assert any(source.startswith("%matplotlib inline\n!echo hello\n") for source in sources)
    assert "%%time\ntotal = sum(range(10))" in sources
    assert "%%html\n<b>not Python</b>" in sources


def test_cell_marks_inside_strings_are_text(tmp_path):
    text = TEXT + '\n# %%\nsource = """\n# %% [markdown]\n"""\n\n# %%\nshow(1)\n'
    refused(tmp_path, text, line_of(text, "show(1)"), "alt")


def test_nbgrader_accepts_the_metadata(tmp_path):
    text = edit('# %% check="1.2"', '# %% check="1.2" nbgrader={"points": 9, "grade_id": "own-name"}')
    for notebook in make(tmp_path, text):
        MetadataValidatorV3().validate_nb(notebook)
        stub, check = (cell(notebook, name).metadata.nbgrader for name in ("ex-1-1", "check-1-1"))
        assert (stub.schema_version, stub.solution, stub.grade) == (3, True, False)
        assert (check.grade, check.locked, check.solution, check.points) == (True, True, False, 3)
        own = cell(notebook, "check-1-2").metadata.nbgrader
        assert (own.points, own.grade_id, own.grade) == (9, "own-name", True)  # what the source says itself stays


def test_nbgrader_finds_the_answers_by_itself(tmp_path):
    """nbgrader's own tools clear the same regions of the instructor's copy."""
    from nbgrader.preprocessors import ClearSolutions

    cleared, _ = ClearSolutions().preprocess(make(tmp_path).instructor, {})
    source = cell(cleared, "ex-1-1").source
    assert "secret_sum" not in source and "SOLUTION" not in source


def test_no_line_of_an_answer_is_in_the_student_copy(tmp_path):
    lines = answer_lines(SAMPLE)
    assert lines == {
        "secret_sum = x + x",
        "return secret_sum",
        "self.hidden_factor = factor",
        "return self.hidden_factor",
    }
    student, instructor = make(tmp_path)
    for line in lines:
        assert not any(line in cell.source for cell in student.cells)
        assert any(line in cell.source for cell in instructor.cells)


def test_what_the_stub_shows_is_no_answer_line(tmp_path):
    shown = "            print('visible here')\n"
    text = edit("            return self.hidden_factor\n", "            return self.hidden_factor\n" + shown)
    assert "print('visible here')" in answer_lines(write(tmp_path, text))
    text = text.replace("        return x\n", shown + "        return x\n")
    path = write(tmp_path, text)
    assert "print('visible here')" not in answer_lines(path)


@pytest.mark.notebook
def test_running_leaves_the_notebook_and_the_environment_alone(tmp_path):
    student = make(tmp_path).student
    before, environment = notebook_text(student), dict(os.environ)
    run = run_notebook(student, cwd=tmp_path)
    assert notebook_text(student) == before and dict(os.environ) == environment
    assert json.loads((tmp_path / "where.json").read_text()) == {"fast": False, "seed": 0}  # the notebook's own values
    assert all(cell.execution_count for cell in run.notebook.cells if cell.cell_type == "code")


# -- what it refuses


def test_all_problems_are_listed_at_once(tmp_path):
    text = (
        edit('    ### END SOLUTION\n\n\n# %% check="1.1"', '\n\n# %% check="1.1"')
        + "\n# %%\nshow(figure)\n\n# %%\nx = (\n"
    )
    problems = refusals(tmp_path, text, objectives=())
    assert len(problems) == 4, problems
    assert all(problem.startswith("01_sample.py, line ") for problem in problems)


def test_refuses_an_unclosed_answer(tmp_path):
    text = edit("    return secret_sum\n    ### END SOLUTION\n", "    return secret_sum\n")
    line = next(n for n, line in enumerate(text.splitlines(), 1) if "BEGIN SOLUTION" in line)
    refused(tmp_path, text, line, "never closed", "### END SOLUTION")


def test_refuses_a_nested_answer(tmp_path):
    text = edit("    secret_sum = x + x\n", "    secret_sum = x + x\n    ### BEGIN SOLUTION\n")
    refused(
        tmp_path,
        text,
        line_of(text, "secret_sum = x + x") + 1,
        "nested",
        f"line {line_of(text, 'secret_sum = x + x') - 1}",
    )


def test_refuses_a_stray_end(tmp_path):
    end = "            return self.hidden_factor\n            ### END SOLUTION\n"
    text = edit(end, end + "            ### END SOLUTION\n")
    refused(tmp_path, text, line_of(text, "return self.hidden_factor") + 2, "without a ### BEGIN SOLUTION")


@pytest.mark.parametrize(
    "marker",
    ["## BEGIN SOLUTION", "### BEGIN SOLUTION:", "### Begin Solution", "###BEGIN SOLUTION", "# begin-solution"],
)
def test_refuses_what_is_nearly_a_marker(tmp_path, marker):
    text = TEXT + f"\n# %%\nx = 1\n{marker}\n"
    refused(tmp_path, text, len(text.splitlines()), "not quite", "### BEGIN SOLUTION")


def test_refuses_answers_outside_exercises(tmp_path):
    text = TEXT + "\n# %%  \n### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n"
    refused(tmp_path, text, len(text.splitlines()) - 3, "outside an exercise")
    text = TEXT + "\n# %% [markdown]\n# ### BEGIN SOLUTION\n# Because.\n# ### END SOLUTION\n"
    refused(tmp_path, text, len(text.splitlines()) - 3, "outside an exercise")


def test_refuses_an_exercise_whose_answer_is_in_the_open(tmp_path):
    text = edit(ANSWER, "    return x + x\n")
    refused(tmp_path, text, line_of(text, 'exercise="1.1"'), "exercise 1.1", "no answer region")


def test_refuses_an_answer_that_would_stop_the_unsolved_notebook(tmp_path):
    text = edit(ANSWER, "    return x\n\n\n### BEGIN SOLUTION\ndouble(2)\n### END SOLUTION\n")
    refused(tmp_path, text, line_of(text, 'exercise="1.1"'), "raises as soon as its cell runs", "function")


def test_refuses_a_region_that_leaves_half_a_statement(tmp_path):
    halves = "    if x:\n        y = x + x\n    ### END SOLUTION\n    else:\n        y = 0\n    ### BEGIN SOLUTION\n"
    text = edit("    secret_sum = x + x\n", halves)
    refused(tmp_path, text, line_of(text, 'exercise="1.1"'), "without its answer", "whole statements")


def prose(words):
    return " ".join(f"word{number}" for number in range(words))


def test_refuses_more_than_60_words_between_code_cells(tmp_path):
    ending = f"\n# %% [markdown]\n# {prose(40)}\n\n# %% [markdown]\n# - {prose(10)}\n# - {prose(10)}\n"
    make(tmp_path, TEXT + ending)
    text = TEXT + ending + "# - more\n"
    refused(tmp_path, text, line_of(text, prose(40)) - 1, "61 words", "at most 60")
    # Code between them makes room; a cell that students don't see makes none.
    make(tmp_path, (TEXT + ending + "# - more\n").replace(f"# {prose(40)}\n\n", f"# {prose(40)}\n\n# %%\n1\n\n"))
    hidden = text.replace(f"# {prose(40)}\n\n", f'# {prose(40)}\n\n# %% tags=["hidden"]\n1\n\n')
    refused(tmp_path, hidden, line_of(hidden, prose(40)) - 1, "61 words")


WORDS = [
    ("a plain sentence, with-hyphen.", 4),
    ("half**bold** and `two words`", 4),
    ("| a | table |\n|---|---|\n| with | words |", 0),
    ("```python\nx = code(1)\n```", 0),
    ("~~~\nfenced too\n~~~", 0),
    ("$W_0 + B A$ and $$\\Delta W = \\frac{a}{r}$$", 1),
    ("$$\n\\text{many words in here}\n$$", 0),
    ("![a long alt text](x.png) after", 1),
    ("[linked words](https://example.org/not/these)", 2),
    ("<details><summary>Open me</summary>\n\nhidden words count\n\n</details>", 5),
    ("<!-- a comment for editors -->", 0),
    ("## A heading counts\ntext", 4),
    ("# The title does not\ntext", 1),
    ("- one\n- two\n  1. three", 3),
    ("a – b", 2),
]


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_counts_the_words_that_people_read(text, words):
    assert builder._read_markdown(text) == (words, [])


def test_refuses_more_than_40_cells(tmp_path):
    there = TEXT.count("# %%") - 1  # one of them is hidden
    more = lambda count: TEXT + "".join(f"\n# %%\n{number}\n" for number in range(count))  # noqa: E731
    make(tmp_path, more(40 - there))
    refused(tmp_path, more(41 - there), 1, "41 cells", "at most 40")


@pytest.mark.parametrize(
    "call",
    ["show(figure)", 'show(figure, alt="")', 'show(figure, alt="  ")', "show(figure, alt=None)", "view.show(figure)"],
)
def test_refuses_a_figure_without_alt_text(tmp_path, call):
    text = TEXT + f"\n# %%\n\n# %config x = 1\nif True:\n    {call}\n"
    refused(tmp_path, text, len(text.splitlines()), "alt", "should see")


@pytest.mark.parametrize(
    "call",
    [
        'show(figure, alt="A line falls.")',
        'show(figure, alt=f"Falls to {loss}.")',
        "show(figure, alt=summary)",
        "plan.show()",
    ],
)
def test_accepts_a_figure_with_alt_text(tmp_path, call):
    make(tmp_path, TEXT + f"\n# %%\n{call}\n")


def test_refuses_plt_show_even_in_a_timed_cell_or_an_answer(tmp_path):
    text = TEXT + "\n# %%\n# %%time\nplt.show()\n"
    refused(tmp_path, text, len(text.splitlines()), "plt.show()", 'show(figure, alt="...")')
    text = edit("    secret_sum = x + x\n", "    secret_sum = x + x\n    plt.show()\n")
    refused(tmp_path, text, line_of(text, "plt.show()"), "plt.show()")


@pytest.mark.parametrize(
    "image",
    [
        "![](x.png)",
        "![ ](x.png)",
        '<img src="x.png">',
        'text <img src="x.png" alt=""> text',
        "![][ref]\n#\n# [ref]: x.png",
    ],
)
def test_refuses_an_image_without_alt_text(tmp_path, image):
    text = TEXT + f"\n# %% [markdown]\n# words\n#\n# {image}\n"
    refused(tmp_path, text, text[: text.index("# words")].count("\n") + 3, "image without alt text")


def test_accepts_an_image_with_alt_text(tmp_path):
    make(tmp_path, TEXT + '\n# %% [markdown]\n# ![a cat](x.png) <img src="y.png" alt="a dog">\n')


def test_refuses_a_lab_without_objectives(tmp_path):
    refused(tmp_path, TEXT, 1, "01_sample has no objectives", "lab's file", objectives=())


def test_refuses_exercises_over_60_percent_of_the_time(tmp_path):
    both = lambda minutes: (exercise("1.1", minutes=minutes), exercise("1.2", minutes=8))  # noqa: E731
    make(tmp_path, exercises=both(10))  # 18 of 30 minutes: 60 % exactly
    refused(tmp_path, TEXT, 1, "19 of 30 minutes", "60%", exercises=both(11))


def test_refuses_exercises_that_lab_and_source_do_not_share(tmp_path):
    text = TEXT.replace('"1.2"', '"1.3"')
    problems = refusals(tmp_path, text)
    assert [re.sub(r".*?: ", "", problem, count=1)[:38] for problem in problems] == [
        "exercise 1.3 is not in the lab's file,",
        "the lab's file has exercise 1.2 and th",
        "check 1.3 is not in the lab's file, wh",
    ]
    line = line_of(text, 'exercise="1.3"')
    assert f"line {line}:" in problems[0] and "1.1, 1.2" in problems[0]


def test_refuses_an_exercise_that_stands_twice(tmp_path):
    start, end = TEXT.index('# %% exercise="1.1"'), TEXT.index('# %% check="1.1"')
    text = TEXT[:end] + TEXT[start:end] + TEXT[end:]
    assert any("exercise 1.1 stands in line" in problem for problem in refusals(tmp_path, text))


def test_refuses_a_check_away_from_its_exercise(tmp_path):
    text = edit('# %% check="1.1"', '# %%\n1\n\n# %% check="1.1"')
    refused(tmp_path, text, line_of(text, 'check="1.1"'), "check 1.1", "right below its exercise")


def test_refuses_an_exercise_without_check(tmp_path):
    text = edit('# %% check="1.1"', "# %%")
    refused(tmp_path, text, line_of(text, 'exercise="1.1"'), "exercise 1.1 has no check")


def test_refuses_ids_that_are_numbers(tmp_path):
    problems = refusals(tmp_path, TEXT.replace('"1.2"', "1.20"))
    assert any("exercise=1.2 is not text" in problem for problem in problems)


def test_refuses_another_heading(tmp_path):
    refused(tmp_path, edit("# # 01 · A sample", "# # 01 · An example"), 1, "'# 01 · A sample'")
    refused(tmp_path, "# %%\n1\n\n" + without_lab_markers(), 1, "markdown cell")


def test_refuses_markers_far_from_the_heading(tmp_path):
    text = TEXT.replace("# <!-- lab:opening -->\n", "") + "\n# %% [markdown]\n# <!-- lab:opening -->\n"
    refused(tmp_path, text, len(text.splitlines()) - 1, "belongs under the heading")


def test_refuses_a_source_without_parameters(tmp_path):
    refused(tmp_path, edit('# %% tags=["parameters"]', "# %%"), 1, '0 cells tagged "parameters"')
    text = TEXT + '\n# %% tags=["parameters"]\ndevice = "auto"\n'
    refused(tmp_path, text, len(text.splitlines()) - 1, "2 cells tagged")


def test_refuses_code_that_is_not_python(tmp_path):
    text = TEXT + "\n# %%\n\n\nx = 1\ny = = 2\n"
    refused(tmp_path, text, len(text.splitlines()), "not valid Python")


def test_refuses_text_before_the_first_cell(tmp_path):
    with pytest.raises(BuildError, match="start every cell with '# %%'"):
        make(tmp_path, "import torch\n\n" + TEXT)


def test_refuses_a_source_that_no_lab_describes(tmp_path):
    with pytest.raises(BuildError, match="no lab is called '77_unknown'"):
        build_lab(write(tmp_path, name="77_unknown"))


# -- a whole repository


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "x"\n[project.urls]\nRepository = "{ADDRESS}"\n')
    folder = tmp_path / "notebooks" / "source"
    folder.mkdir(parents=True)
    write(folder)
    write(folder, TEXT.replace("# # 01 ·", "# # 02 ·"), "02_sample")
    return tmp_path


LABS = {name: lab(name=name) for name in ("01_sample", "02_sample")}


def everything(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_build_all_writes_and_check_compares(root):
    assert build_all(root, check=True, labs=LABS) == {"01_sample.ipynb": "missing", "02_sample.ipynb": "missing"}
    assert not (root / "build").exists()
    assert set(build_all(root, labs=LABS).values()) == {"written"}
    assert build_all(root, check=True, labs=LABS) == {}
    assert sorted(path.name for path in (root / "build").iterdir()) == ["01_sample.ipynb", "02_sample.ipynb"]
    before = everything(root)
    assert set(build_all(root, labs=LABS).values()) == {"unchanged"}
    assert everything(root) == before

    one = root / "notebooks" / "01_sample.ipynb"
    one.write_bytes(one.read_bytes().replace(b"\n", b"\r\n"))  # what git does on Windows
    assert build_all(root, check=True, labs=LABS) == {}
    one.write_bytes(one.read_bytes().replace(b"Twice a number", b"Thrice a number"))
    (root / "notebooks" / "99_old.ipynb").write_text("{}")
    assert build_all(root, check=True, labs=LABS) == {"01_sample.ipynb": "different", "99_old.ipynb": "stale"}


def test_an_edited_source_is_built_again(root):
    build_all(root, labs=LABS)
    source = root / "notebooks" / "source" / "02_sample.py"
    source.write_text(
        source.read_text(encoding="utf-8").replace("Twice a number", "Two times a number"), encoding="utf-8"
    )
    assert build_all(root, labs=LABS) == {"01_sample.ipynb": "unchanged", "02_sample.ipynb": "written"}


def test_one_bad_lab_and_nothing_is_written(root):
    build_all(root, labs=LABS)
    source = root / "notebooks" / "source" / "02_sample.py"
    source.write_text(source.read_text(encoding="utf-8") + "\n# %%\nplt.show()\n", encoding="utf-8")
    first = root / "notebooks" / "source" / "01_sample.py"
    first.write_text(first.read_text(encoding="utf-8").replace("Twice a", "Two times a"), encoding="utf-8")
    before = everything(root)
    with pytest.raises(BuildError, match="02_sample.py.*plt.show"):
        build_all(root, labs=LABS)
    assert everything(root) == before


def test_labs_and_sources_must_match(root):
    with pytest.raises(BuildError, match="lab 03_more has no notebooks/source/03_more.py"):
        build_all(root, labs={**LABS, "03_more": lab(name="03_more")})
    with pytest.raises(BuildError, match="no lab is called '02_sample'"):
        build_all(root, labs={"01_sample": LABS["01_sample"]})
    with pytest.raises(BuildError, match="no sources in"):
        build_all(root / "build", labs={})


def test_a_failed_write_leaves_the_old_notebook_and_no_litter(root, monkeypatch):
    build_all(root, labs=LABS)
    source = root / "notebooks" / "source" / "01_sample.py"
    source.write_text(source.read_text(encoding="utf-8").replace("Twice a", "Two times a"), encoding="utf-8")
    before = everything(root)

    def full_disk(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build_all(root, labs=LABS)
    monkeypatch.undo()
    assert everything(root) == before


def work(path, change):
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def type_an_answer(notebook):
    cell(notebook, "ex-1-1").source = "def double(x):\n    return 2 * x"


def run_a_cell(notebook):
    cell(notebook, "check-1-1").execution_count = 1


def add_a_cell(notebook):
    notebook.cells.append(nbformat.v4.new_markdown_cell("a note"))


@pytest.mark.parametrize("change", [type_an_answer, run_a_cell, add_a_cell])
def test_a_build_never_overwrites_what_somebody_worked_in(root, change):
    build_all(root, labs=LABS)
    path = root / "notebooks" / "01_sample.ipynb"
    assert not worked_in(path)
    work(path, lambda notebook: notebook.metadata.update(widgets={}))  # opened and saved, no more: not work
    assert not worked_in(path)
    work(path, change)
    mine = path.read_bytes()
    assert build_all(root, labs=LABS)["01_sample.ipynb"] == "kept"
    assert path.read_bytes() == mine
    assert build_all(root, check=True, labs=LABS) == {"01_sample.ipynb": "different"}
    assert build_all(root, force=True, labs=LABS)["01_sample.ipynb"] == "written"
    assert build_all(root, check=True, labs=LABS) == {}


def test_a_file_that_is_no_notebook_of_ours_is_kept(root):
    path = root / "notebooks" / "01_sample.ipynb"
    for text in ("<<<<<<< ours", "[]", json.dumps({"cells": [], "metadata": {}})):
        path.write_text(text)
        assert build_all(root, labs=LABS)["01_sample.ipynb"] == "kept"
        assert path.read_text() == text
