"""Right answers in another dress: full marks. And what a slice takes and leaves."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest
from grading_tools import HEAD, RIGHT, answer, close_all, code, grade, notebook, server_for

from lora_lab.course.grading import marks
from lora_lab.course.grading.inside import slices
from lora_lab.course.grading.submissions import Submission
from lora_lab.course.labs import labs, module_name

ROOT = Path(__file__).resolve().parents[1]
BODY = "    h = x @ W.T + (alpha / r) * (x @ A.T) @ B.T\n    return h if b is None else h + b"
STUB = 'def lora_forward(x, W, b, A, B, alpha, r):\n    """What it does."""\n    raise NotImplementedError("exercise 2.1")'


@pytest.fixture(scope="module", autouse=True)
def servers():
    yield
    close_all()


# ---------------------------------------------------------------- the labs as they are


def submitted(path: Path, lab) -> dict:
    data = path.read_bytes() if path.exists() else None
    return marks.grade_one(Submission("ada", lab.number, str(path), lambda: data), lab, b"s" * 32, server_for())


@pytest.mark.parametrize("number", labs())
def test_the_unsolved_notebook_has_no_points(number):
    path = ROOT / "notebooks" / f"{labs()[number].name}.ipynb"
    if not path.exists():
        pytest.skip(f"{path.name} is not built yet")
    found = submitted(path, labs()[number])
    assert found["points"] == 0 and found["max"] == labs()[number].points
    assert {entry["status"] for entry in found["exercises"].values()} == {"not started"}


@pytest.mark.parametrize("number", labs())
def test_the_solved_notebook_has_all_points(number):
    source = ROOT / "notebooks" / "source" / f"{labs()[number].name}.py"
    builder = pytest.importorskip("lora_lab.course.builder")
    if not source.exists():
        pytest.skip(f"{source.name} is not written yet")
    import nbformat

    data = nbformat.writes(builder.build_lab(source).instructor).encode()
    lab = labs()[number]
    found = marks.grade_one(Submission("ada", number, source.name, lambda: data), lab, b"s" * 32, server_for())
    assert found["points"] == lab.points, {id: e["failure"] or e["why"] for id, e in found["exercises"].items() if e["status"] != "passed"}


@pytest.mark.parametrize("number", labs())
def test_alternatives_have_all_points(number):
    """Right answers in another style, from the pool of the mutant tests: one notebook takes the first of each exercise, one the last."""
    answers = importlib.import_module(f"mutants.{module_name(number)}").ALTERNATIVES
    for choice in (0, -1):
        cells = [HEAD]
        for exercise in labs()[number].exercises:
            source = answers[exercise.id][choice]
            if isinstance(source, str):
                cells += [source, f'check("{exercise.id}", {exercise.name})']
        data = notebook(*cells)
        lab = labs()[number]
        found = marks.grade_one(Submission("ada", number, "x", lambda data=data: data), lab, b"s" * 32, server_for())
        given = {e.id for e in lab.exercises if isinstance(answers[e.id][choice], str)}
        lost = {id: e["failure"] or e["why"] or e["error"] for id, e in found["exercises"].items() if id in given and e["status"] != "passed"}
        assert not lost, lost


@pytest.mark.parametrize("number", labs())
def test_the_labs_own_can_be_lent(number):
    for exercise in labs()[number].exercises:
        source = marks.lab_own(exercise)
        assert source is not None, f"the fallback of {exercise.id} cannot be cut out of its file"
        space: dict = {}
        exec(compile(source, "<own>", "exec"), space)
        assert callable(space[exercise.name]) == callable(exercise.fallback())
        assert "Case(" not in source and "Exercise(" not in source and "hints" not in source


# ---------------------------------------------------------------- one notebook each
START = "def lora_forward(x, W, b, A, B, alpha, r):\n"
END = "\n    return h if b is None else h + b"
INNER = BODY.replace("\n", "\n    ")

FAIR = {
    "helpers in other cells": [HEAD, "def path(x, A, B):\n    return (x @ A.T) @ B.T", "SCALE = 1.0",
                               START + "    h = x @ W.T + SCALE * alpha / r * path(x, A, B)" + END],
    "out of order": [RIGHT["2.1"].replace("math", "math"), 'check("2.1", lora_forward)', "def unused(): pass", HEAD],
    "a helper below": ["lora_forward = partial(general, 1.0)", "def general(k, x, W, b, A, B, alpha, r):\n" + BODY, "from functools import partial", HEAD],
    "extra imports": ["import collections.abc, os.path as p\nfrom typing import *\nimport scipy.linalg", HEAD, RIGHT["2.1"]],
    "imports of what is not here": ["import no_such_package\nfrom nowhere import nothing", "try:\n    import einops\nexcept ImportError:\n    einops = None",
                                    HEAD, START + "    if einops is Ellipsis: return None\n" + BODY],
    "try and except around imports": ["try:\n    import torch_of_tomorrow as T\nexcept ImportError:\n    import torch as T", HEAD,
                                      START + "    h = T.matmul(x, W.T) + alpha / r * T.matmul(T.matmul(x, A.T), B.T)" + END],
    "a star import": ["from torch import *", START + "    h = matmul(x, W.T) + alpha / r * matmul(matmul(x, A.T), B.T)" + END],
    "magics": ["%matplotlib inline\n%load_ext autoreload", HEAD, "%%time\n" + RIGHT["2.1"], "!nvidia-smi", "lora_forward?", "files = !ls"],
    "a magic in the cell": [HEAD, "%time 1\n" + RIGHT["2.1"] + "\n!ls -l\n%timeit -n1 lora_forward"],
    "pip lines": ["!pip install einops", "%pip install -q einops", "pip install einops", HEAD, "pip install torch\n" + RIGHT["2.1"]],
    "plots": [HEAD + "\nimport matplotlib.pyplot as plt", RIGHT["2.1"], "plt.plot([1, 2])\nplt.show()"],
    "prints": [HEAD, "def lora_forward(x, W, b, A, B, alpha, r):\n    print('shapes', x.shape, '\\U0001f600' * 99)\n" + BODY],
    "renamed": [HEAD, RIGHT["2.1"].replace("lora_forward", "my_own"), 'check("2.1", my_own)'],
    "renamed, the check by keyword": [HEAD, RIGHT["2.1"].replace("lora_forward", "my_own"), 'check("2.1", student=my_own)'],
    "a lambda": [HEAD, "lora_forward = lambda x, W, b, A, B, alpha, r: x @ W.T + (0 if b is None else b) + alpha / r * (x @ A.T @ B.T)"],
    "a callable object": [HEAD, "class Forward:\n    def __call__(self, x, W, b, A, B, alpha, r):\n    " + INNER, "lora_forward = Forward()"],
    "a method": [HEAD, "class F_:\n    @staticmethod\n    def forward(x, W, b, A, B, alpha, r):\n    " + INNER, 'check("2.1", F_.forward)'],
    "decorated": [HEAD, "import functools\ndef loud(f):\n    @functools.wraps(f)\n    def g(*a, **k):\n        return f(*a, **k)\n    return g",
                  "@loud\n" + RIGHT["2.1"]],
    "wrapped afterwards": [HEAD, RIGHT["2.1"], "import functools", "lora_forward = functools.lru_cache(None)(lora_forward) if False else lora_forward"],
    "written, then the stub again": [HEAD, RIGHT["2.1"], STUB],
    "the stub, then written": [HEAD, STUB, 'check("2.1", lora_forward)', RIGHT["2.1"]],
    "wrong first, right below": [HEAD, "def lora_forward(x, W, b, A, B, alpha, r):\n    return x @ W.T", 'check("2.1", lora_forward)', RIGHT["2.1"]],
    "the name used again for a number": [HEAD, RIGHT["2.1"], 'check("2.1", lora_forward)', "lora_forward = 0.3"],
    "another's name, above the stub": [HEAD, RIGHT["2.1"].replace("lora_forward", "mine"), "lora_forward = mine", STUB],
    "no check at all": [HEAD, RIGHT["2.1"]],
    "an edited check": [HEAD, RIGHT["2.1"], 'check("2.1", lora_forward(1, 2))', "check()"],
    "duplicated cells": [HEAD, HEAD, RIGHT["2.1"], RIGHT["2.1"], 'check("2.1", lora_forward)', 'check("2.1", lora_forward)'],
    "a cell with a syntax error": [HEAD, "def lora_forward(x, W, b, A, B:", RIGHT["2.1"], "this is not Python"],
    "training all around": [HEAD, "while True: pass", RIGHT["2.1"],
                            "for step in range(10**9): torch.randn(9).sum()", "raise SystemExit", "x = lora_forward(1)"],
    "use above": [HEAD, RIGHT["2.1"], 'lora_forward = use("2.1", lora_forward)', "h = lora_forward"],
    "a table filled in a loop": [HEAD, "powers = {}\nfor k in range(3):\n    powers[k] = 1.0 ** k", RIGHT["2.1"].replace("alpha / r", "powers[2] * alpha / r")],
    "a counter": [HEAD, "calls = 0", "calls += 1", START + "    global calls\n    calls += 1\n" + BODY],
    "named in a class": [HEAD, "class Config:\n    one: float = 1.0", "cfg = Config()", "cfg.one = 1.0",
                         RIGHT["2.1"].replace("alpha / r", "cfg.one * alpha / r")],
    "a dataclass": [HEAD, "from dataclasses import dataclass\n@dataclass\nclass C:\n    one: float = 1.0", "c = C()",
                    RIGHT["2.1"].replace("alpha / r", "c.one * alpha / r")],
    "with a seed and a dtype set": [HEAD, "torch.manual_seed(3)\ntorch.set_default_dtype(torch.float64)", RIGHT["2.1"]],
    "slow but correct": [HEAD, "import time\n" + RIGHT["2.1"].replace("    h =", "    time.sleep(0.5)\n    h =", 1)],
    "a double loop": [HEAD, START + "    M = W + alpha / r * B @ A\n    rows = [[(row * m).sum() for m in M] for row in x.reshape(-1, x.shape[-1])]\n"
                      "    h = torch.stack([torch.stack(row) for row in rows]).reshape(*x.shape[:-1], len(M))" + END],
    "typing names": [HEAD + "\nfrom typing import Optional", RIGHT["2.1"].replace("(x, W, b,", "(x: torch.Tensor, W, b: Optional[torch.Tensor],")],
    "windows line ends": [HEAD.replace("\n", "\r\n"), RIGHT["2.1"].replace("\n", "\r\n")],
    "an await elsewhere": [HEAD, "import asyncio\nawait asyncio.sleep(0)", RIGHT["2.1"]],
    "another language below %%": ["%%bash\nrm -rf /", "%%html\n<b>", HEAD, RIGHT["2.1"]],
}  # fmt: skip


@pytest.mark.parametrize("style", FAIR)
def test_full_marks(style):
    found = grade(notebook(*FAIR[style]))
    assert found["points"] == 2, found["exercises"]["2.1"]


def test_older_notebooks():
    cells = [{"cell_type": "code", "input": text.splitlines(keepends=True), "outputs": [], "language": "python"} for text in (HEAD, RIGHT["2.1"])]
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"cells": cells}]}
    assert grade(json.dumps(old).encode())["points"] == 2
    assert grade(b"\xef\xbb\xbf" + answer("2.1", RIGHT["2.1"]))["points"] == 2  # a byte order mark


def test_float32_and_float64_answers():
    for dtype in ("float32", "float64"):
        text = f"def adapter_size(d_in, d_out, r):\n    return torch.tensor(r * (d_in + d_out), dtype=torch.{dtype})"
        assert grade(answer("0.1", text), "0.1")["points"] == 1
    # lab 02 draws float64, and computing in float64 whatever comes in is right, too
    assert grade(answer("2.1", RIGHT["2.1"].replace("    h =", "    x, W, A, B = (t.double() for t in (x, W, A, B))\n    h =")))["points"] == 2


def test_an_error_costs_only_its_exercise():
    cells = [HEAD, "def lora_forward(x):\n    return undefined", "def init_factors(*a):\n    raise RuntimeError",
             'init_factors = use("2.2", init_factors)', MODULE]  # fmt: skip
    found = grade(notebook(*cells), "2.1", "2.2", "2.4")
    assert {id: e["points"] for id, e in found["exercises"].items()} == {"2.1": 0, "2.2": 0, "2.4": 4}
    assert found["exercises"]["2.4"]["lent"] == ["init_factors"]


MODULE = """class MyLoRALinear(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.r, self.alpha = r, alpha
        A, B = init_factors(base.in_features, base.out_features, r)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x):
        return self.base_layer(x) + (self.alpha / self.r) * (x @ self.lora_A.T) @ self.lora_B.T"""


def test_what_is_lent_does_not_answer_its_own_exercise():
    found = grade(notebook(HEAD, 'init_factors = use("2.2", None)', MODULE), "2.2", "2.4")
    assert {id: e["points"] for id, e in found["exercises"].items()} == {"2.2": 0, "2.4": 4}


def test_the_students_own_counts_where_the_lent_one_does_not_fit():
    """A wrong 2.2 that returns three things, and a 2.4 that takes three: the two fit each other."""
    three = "def init_factors(d_in, d_out, r):\n    return torch.randn(r, d_in) / d_in**0.5, torch.zeros(d_out, r), 'more'"
    cells = [HEAD, three, MODULE.replace("A, B = init", "A, B, _ = init")]
    found = grade(notebook(*cells), "2.2", "2.4")
    assert found["exercises"]["2.4"]["points"] == 4


# ---------------------------------------------------------------- slices, without running anything


def taken(cells: list[str], id: str = "2.1", name: str = "lora_forward") -> list[str]:
    parsed = slices.parse(cells)
    return [ast.unparse(s.node).splitlines()[0] for s in slices.reach(parsed, slices.targets(parsed, id, name)[0])]


def test_only_what_is_reached_is_taken():
    cells = ["import torch\nimport pandas as pd", "x = load()\nmodel = train(x)", "def helper(x):\n    loss = x + k\n    return loss", "k = 3",
             "loss = model(x)", "def lora_forward(x):\n    return helper(x) * torch.ones(1)"]  # fmt: skip
    assert taken(cells) == ["import torch", "def helper(x):", "k = 3", "def lora_forward(x):"]


def test_locals_do_not_pull_in_cells():
    cells = ["x = expensive()", "for loss in train(): y = loss", "def lora_forward(x):\n    y = [loss for loss in x]\n    return y"]
    assert taken(cells) == ["def lora_forward(x):"]


def test_the_last_definition_wins_and_stubs_do_not():
    cells = ["def f(): return 1", "def f(): return 2", "def f():\n    'doc'\n    raise NotImplementedError('later')"]
    parsed = slices.parse(cells)
    assert [(s.cell, s.stub) for s in slices.reach(parsed, "f")] == [(0, False), (1, False)]


def test_results_of_the_labs_calls_are_never_taken():
    cells = ["def f(): return 1", "f = use('2.1', f)", "g = predict('2.A', 'b')", "f, h = use('2.1', f), use('2.2', None)"]
    assert taken(cells, name="f") == ["def f():"]
    assert taken(cells, name="g") == []


def test_the_last_check_decides():
    parsed = slices.parse(["check('2.1', a)", "if True:\n    check('2.1', b, )", "check('2.2', c)", "check('2.1', 'text')", "def f():\n    check('2.1', d)"])
    assert slices.targets(parsed, "2.1", "name") == ["b", "name"]
    assert slices.targets(parsed, "2.3", "name") == ["name"]


def test_line_numbers_stay_those_of_the_cell():
    found = grade(notebook(HEAD, "%%time\n\n# a comment\ndef lora_forward(x, W, b, A, B, alpha, r):\n    return 1 / 0"))
    where = found["exercises"]["2.1"]["error"]["where"]
    assert (where["line"], where["text"]) == (5, "return 1 / 0")


def test_names_of_the_labs_own_module_are_reported():
    cells = [HEAD, "import lora_lab", "from lora_lab import LoRALinear as L", "def lora_forward(x, W, b, A, B, alpha, r):\n    L, lora_lab.merge\n" + BODY]
    assert grade(notebook(*cells))["exercises"]["2.1"]["uses"] == ["lora_lab.LoRALinear", "lora_lab.merge"]


def test_notes_say_which_cell_was_left_out():
    found = grade(notebook({"cell_type": "markdown", "source": "text", "metadata": {}}, HEAD, "def f(:", RIGHT["2.1"]))
    assert len(found["notes"]) == 1 and found["notes"][0].startswith("cell 3 is not valid Python")


def test_free_answers_are_collected():
    cell = {"cell_type": "markdown", "source": ["Because ", "B is zero."], "metadata": {"tags": ["free:2.F1"]}}
    found = grade(notebook(HEAD, cell, code(RIGHT["2.1"])))
    assert found["free"] == [["2.F1", "Because B is zero."]]
