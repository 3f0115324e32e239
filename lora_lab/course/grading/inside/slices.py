"""Which statements of a notebook does an exercise need? Backward from the student's object, over all cells; nothing is executed here.

The object is the argument of the last `check("2.1", EXPRESSION)`, else the exercise's own name. From the names in it, every statement at
the top level of a cell that binds one of them is taken, then those that bind the names these use, and so on. What is not reached is not
run: no training, no figures, no downloads. The rules, as docs/grading.md states them:

- Magics are taken out by IPython's own transformer; `%%time`, `%%capture` and `%%prun` leave the Python below them.
- Cells with a syntax error cost themselves and nothing else.
- Of a name with definitions (def, class, import, lambda), only these and assignments that wrap it (`f = compile(f)`) or give it
  another's name (`f = mine`) count: a later `floor = 0.3` does not take the function away. The last definition wins, but a stub never shadows a written answer.
- Results of `use`, `check`, `hint` and `predict` are never taken: they are the lab's own, or nothing.
- Statements that change a needed object (`Layer.forward = forward`, `table["a"] = 1`, `total += 1`) are taken too.
"""

from __future__ import annotations

import ast
import builtins
import re
import symtable
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

LAB_CALLS = {"check", "use", "hint", "predict", "progress", "calibration", "export_progress"}
RUN_BELOW = {"time", "capture", "prun"}  # cell magics whose body runs in the notebook's own namespace
# IPython takes these for magics although they have no %, which its transformer leaves to the running kernel.
_AUTOMAGIC = re.compile(r"^(pip|conda|mamba|ls|cd|pwd|cat|less|more|man)\b(?!\s*[=(.,\[:])")


@dataclass
class Statement:
    """One statement at the top level of a cell. kind: "definition", "assignment", "change" (of an object that is there) or "other"."""

    cell: int
    index: int
    node: ast.stmt
    kind: str
    binds: set[str]
    uses: set[str]
    stub: bool = False
    from_lab: bool = False
    wraps: bool = False
    star: bool = False


@dataclass
class Notebook:
    """All statements in document order; `sources`: cell -> Python without magics; `broken`: cell -> why it is no Python."""

    statements: list[Statement] = field(default_factory=list)
    sources: dict[int, str] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)


def parse(cells: Iterable[str], skip: Iterable[int] = (), magics: bool = True, at=lambda number: None) -> Notebook:
    """Read the code cells. `skip`: numbers of cells to leave out; `at(number)` is called before each cell is touched."""
    found = Notebook()
    for number, text in enumerate(cells):
        at(number)
        if number in skip:
            found.broken[number] = "it cannot be read"
            continue
        try:
            source, tree = _tree(text, magics)
            statements = [_statement(number, index, node) for index, node in enumerate(tree.body)]
        except SyntaxError as error:
            found.broken[number] = f"{error.msg or 'invalid syntax'} (line {error.lineno})"
        except RecursionError:
            found.broken[number] = "it is nested too deeply"
        except Exception as error:  # null bytes, lone surrogates, whatever the parser may think of
            found.broken[number] = f"it cannot be read ({type(error).__name__})"
        except MemoryError:
            found.broken[number] = "it is too large or nested too deeply"
        else:
            found.sources[number] = source
            found.statements += statements
    return found


def _tree(text: str, magics: bool) -> tuple[str, ast.Module]:
    source = _without_magics(text) if magics else text
    try:
        return source, ast.parse(source)
    except SyntaxError:
        lines = text.splitlines()
        kept = ["" if _AUTOMAGIC.match(line) else line for line in lines]
        if kept == lines or not magics:
            raise
        source = _without_magics("\n".join(kept))
        return source, ast.parse(source)


def _without_magics(text: str) -> str:
    text = text.replace("\r\n", "\n")
    for _ in range(5):  # %%time above %%capture
        head = re.match(r"\s*%%(\w+)[^\n]*(\n|$)", text)
        if not head:
            break
        if head[1] not in RUN_BELOW:
            return ""
        text = "\n" * head[0].count("\n") + text[head.end() :]  # line numbers stay those of the cell
    if not re.search(r"[%!?]|^\s*[/,;]|>>>|^\s*In \[", text, re.MULTILINE):
        return text  # nothing that IPython would change; its transformer tokenises several times
    from IPython.core.inputtransformer2 import TransformerManager

    ahead = len(text) - len(text.lstrip("\n"))  # it drops empty lines at the start
    changed = TransformerManager().transform_cell(text)
    return "\n" * (ahead - (len(changed) - len(changed.lstrip("\n")))) + changed


# ---------------------------------------------------------------- what a statement binds and uses


def _statement(cell: int, index: int, node: ast.stmt) -> Statement:
    bound, changed = _targets(node)
    uses = _global_names(node)
    names = {n.id if isinstance(n, ast.Name) else n.attr for call in _calls(node) for n in [call.func] if isinstance(n, (ast.Name, ast.Attribute))}
    kind, stub, wraps = "other", False, False
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        kind, stub = "definition", _is_stub(node)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        kind = "definition"
    elif isinstance(node, (ast.If, ast.Try, ast.With)):
        inner = {type(n) for n in _own_level(node)}
        kind = "definition" if inner & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom} else "assignment"
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        kind = "definition" if isinstance(node.value, ast.Lambda) else "assignment"
        wraps = bool(bound & uses)
    elif isinstance(node, ast.AugAssign):
        kind = "change"
    elif bound or changed:
        kind = "assignment"
    if changed and not bound:
        kind = "change"
    return Statement(
        cell, index, node, kind, bound | changed, uses, stub,
        from_lab=bool(names & LAB_CALLS) and kind != "definition" or "get_ipython" in names and kind == "assignment",
        wraps=wraps,
        star=isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names),
    )  # fmt: skip


_LATER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _own_level(node: ast.AST):
    """The nodes that run when the statement runs: not the bodies of functions, lambdas, classes and comprehensions."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack.extend(getattr(current, "decorator_list", ()) if isinstance(current, _LATER) else ast.iter_child_nodes(current))


def _targets(node: ast.stmt) -> tuple[set[str], set[str]]:
    """(names bound, names whose object is changed) by a statement at the top level."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}, set()
    bound, changed = set(), set()
    for part in _own_level(node):
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(part.name)
        elif isinstance(part, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in part.names}
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            bound.add(part.id)
        elif isinstance(part, ast.ExceptHandler) and part.name:
            bound.add(part.name)
        elif isinstance(part, (ast.Attribute, ast.Subscript)) and isinstance(part.ctx, ast.Store):
            root = part
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            if isinstance(root, ast.Name):
                changed.add(root.id)
    return bound, changed


def _global_names(node: ast.AST) -> set[str]:
    """The global names that a statement reads, now or when its functions are called. symtable knows the scopes exactly: a local x
    must not pull in the cell that trains with a global x."""
    names: set[str] = set()
    tables = [symtable.symtable(ast.unparse(node), "cell", "exec")]
    while tables:
        table = tables.pop()
        top = table.get_type() == "module"
        names |= {s.get_name() for s in table.get_symbols() if (s.is_referenced() or s.is_declared_global()) and (top or s.is_global())}
        tables += table.get_children()
    if isinstance(node, ast.AugAssign):
        names |= _targets(node)[0]
    return names


def _calls(node: ast.AST) -> Iterable[ast.Call]:
    return (part for part in _own_level(node) if isinstance(part, ast.Call))


def _is_stub(node: ast.AST) -> bool:
    """As handed out: a function that does nothing before it raises NotImplementedError, or a class with such a method."""
    if isinstance(node, ast.ClassDef):
        return any(_is_stub(part) for part in node.body)
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    for part in node.body:
        if isinstance(part, ast.Raise):
            raised = part.exc.func if isinstance(part.exc, ast.Call) else part.exc
            return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
        if isinstance(part, (ast.Return, ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)):
            return False
    return False


# ---------------------------------------------------------------- the slice


def last_check(notebook: Notebook, exercise: str) -> str | None:
    """The source of EXPRESSION in the last `check("2.1", EXPRESSION)`."""
    found = None
    for statement in notebook.statements:
        for call in sorted(_calls(statement.node), key=lambda c: (c.lineno, c.col_offset)):
            name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", None)
            first = call.args[0] if call.args else None
            if name != "check" or not isinstance(first, ast.Constant) or str(first.value) != exercise:
                continue
            more = call.args[1:2] or [k.value for k in call.keywords if k.arg == "student"]
            if more and not isinstance(more[0], (ast.Constant, ast.Starred)):
                found = ast.unparse(more[0])
    return found


def targets(notebook: Notebook, exercise: str, name: str) -> list[str]:
    """Expressions to try, best first."""
    asked = last_check(notebook, exercise)
    return [name] if asked in (None, name) else [asked, name]


def reach(notebook: Notebook, expression: str, given: Iterable[str] = ()) -> list[Statement]:
    """The statements that `expression` needs, in document order. `given`: names that come from elsewhere."""
    by_name: dict[str, list[Statement]] = {}
    for statement in notebook.statements:
        if not statement.from_lab:
            for name in statement.binds:
                by_name.setdefault(name, []).append(statement)
    try:
        wanted = _global_names(ast.parse(expression, mode="eval"))
    except Exception:
        return []
    given, seen, taken = set(given), set(), {}
    while wanted:
        name = wanted.pop()
        if name in seen or name in given:
            continue
        seen.add(name)
        binding = _counting(name, by_name.get(name, []))
        if not binding and not hasattr(builtins, name):
            binding = [s for s in notebook.statements if s.star]
        for statement in binding:
            taken[statement.cell, statement.index] = statement
            wanted |= statement.uses
    return [taken[key] for key in sorted(taken)]


def _counting(name: str, binding: list[Statement]) -> list[Statement]:
    """Of all statements that bind a name, those that count; see the top of this file."""
    definitions = [s for s in binding if s.kind == "definition"]
    written = [s for s in definitions if not s.stub]
    if written:
        return [s for s in binding if s in written or s.kind == "change" or s.wraps or _is_alias(s)]
    return [s for s in binding if not s.stub] or binding


def _is_alias(statement: Statement) -> bool:
    return isinstance(statement.node, ast.Assign) and isinstance(statement.node.value, ast.Name)


def lab_names(notebook: Notebook, taken: Iterable[Statement]) -> list[str]:
    """What a slice takes from the lab's own module: ["lora_lab.LoRALinear"]. Said to the instructor, never punished."""
    taken, found, modules = list(taken), set(), {}
    for statement in taken:
        for node in ast.walk(statement.node):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_lab" and "course" not in (node.module or ""):
                used = set().union(*(s.uses for s in taken)) if taken else set()
                found |= {f"{node.module}.{alias.name}" for alias in node.names if (alias.asname or alias.name) in used}
            elif isinstance(node, ast.Import):
                modules |= {(a.asname or "lora_lab"): "lora_lab" for a in node.names if a.name.split(".")[0] == "lora_lab"}
    for statement in taken:
        for node in ast.walk(statement.node):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                found.add(f"lora_lab.{node.attr}")
    return sorted(found)


def plan(notebook: Notebook, exercises: Mapping[str, str]) -> dict[str, list[dict]]:
    """id -> candidates, best first: {"target", "take": [[cell, index], ...], "needs": ids of other exercises whose object is used, "lab"}.
    "stub": whether the exercise's object is, as far as one can see, the one that was handed out; "handed_out": whether that is there at all.

    exercises: id -> name of the student's object."""
    ids = {name: id for id, name in exercises.items()}
    found = {}
    for id, name in exercises.items():
        found[id] = []
        for expression in targets(notebook, id, name):
            taken = reach(notebook, expression)
            uses = set().union(*(s.uses for s in taken)) if taken else set()
            found[id].append({
                "target": expression,
                "take": [[s.cell, s.index] for s in taken],
                "needs": sorted({ids[n] for n in uses if n in ids and ids[n] != id}),
                "lab": lab_names(notebook, taken),
                "stub": any(s.stub and name in s.binds for s in taken),
                "handed_out": any(s.stub and name in s.binds for s in notebook.statements),
            })  # fmt: skip
    return found
