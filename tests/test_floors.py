"""The architecture, read from the source: who imports whom, how heavy the front door is, how long layers.py is."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lab

PACKAGE = Path(lora_lab.__file__).parent
# The floors stand once, in the design: 0 `layers counting` · 1 `adapt data` · ...
DESIGN = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8").partition("## Floors")[2].partition("\n## ")[0]
FLOORS = [set(names.split()) for number, names in re.findall(r"(\d) `([\w ]+)`", DESIGN)]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
HEAVY = {"transformers", "peft", "matplotlib", "ipywidgets", "sklearn", "joblib", "pandas", "pooch", "scipy", "requests"}
# Core dependencies, which the flat modules may import where they begin.
CORE = {"torch", "numpy", "safetensors", "typer"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_the_design_names_every_floor_once():
    assert len(FLOORS) == 8
    assert sum(map(len, FLOORS)) == len(FLOOR)
    assert {"layers", "adapt", "train", "course"} <= set(FLOOR)
    assert FLOOR["layers"] < FLOOR["adapt"] < FLOOR["train"] < FLOOR["view"] < FLOOR["course"]


def unit(path):
    """The floor's name that a file belongs to: its top-level module or wing."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path, top_level_only=False):
    """Absolute names of everything that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["lora_lab", *path.relative_to(PACKAGE).parent.parts]
    nodes = ast.walk(tree)
    if top_level_only:
        nodes = [n for stmt in tree.body for n in ([stmt] if not isinstance(stmt, (ast.If, ast.Try)) else ast.walk(stmt))]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                above = package[: len(package) - node.level + 1]
                stem = ".".join(above + ([node.module] if node.module else []))
            else:
                stem = node.module
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def units(path):
    """The lab's own floors that a file imports from."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lora_lab" and len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()):
            yield parts[1]


@pytest.mark.parametrize("path", [p for p in SOURCES if unit(p) != "__init__"], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    mine = unit(path)
    assert mine in FLOOR, f"{mine} stands on no floor: name it in docs/design.md and here"
    for other in set(units(path)) - {mine}:
        assert other in FLOOR, f"{mine} imports {other}, which stands on no floor"
        assert FLOOR[other] < FLOOR[mine], f"{mine} (floor {FLOOR[mine]}) imports {other} (floor {FLOOR[other]})"


def test_the_engine_of_checks_knows_no_lora():
    for path in sorted((PACKAGE / "course").glob("*.py")):
        if path.stem == "classroom":  # packs the lab's models and data for a room; it checks nothing
            continue
        below = {u for u in units(path) if FLOOR[u] < FLOOR["view"]} - {"files"}
        assert not below, f"course/{path.name} imports {below}; what knows LoRA belongs into course/labs"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_star_imports(path):
    stars = [n.lineno for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)]
    assert stars == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_wait_until_they_are_needed(path):
    roots = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    assert not roots & HEAVY
    if path.parent == PACKAGE:
        assert roots - {"lora_lab"} - CORE - set(sys.stdlib_module_names) == set()


def test_the_front_door_names_its_surface():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    later = {name for names in lora_lab._LATER.values() for name in names}  # named, too, but imported when first asked for
    assert set(lora_lab.__all__) - {"__version__"} == (imported - {"annotations"}) | later and not imported & later
    assert len(lora_lab.__all__) == len(set(lora_lab.__all__))
    for name in ("LoRALinear", "apply_lora", "merge", "unmerge", "remove_lora", "lora_disabled", "train", "evaluate", "count_parameters"):
        assert name in lora_lab.__all__
        assert getattr(lora_lab, name).__doc__, f"{name} has no docstring"
    own = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert own == {"__getattr__"}, "__init__ re-exports and does nothing else"


@pytest.mark.parametrize("name", sorted(set(lora_lab.__all__) - {"__version__"}))
def test_what_is_public_is_documented(name):
    assert (getattr(lora_lab, name).__doc__ or "").strip()


def test_import_needs_torch_and_nothing_heavier():
    """In a fresh process; with torch there, the lab adds under 40 ms of processor time (best of three: noise only adds)."""
    code = (
        "import sys, time, torch\n"
        "before = set(sys.modules); began = time.process_time()\n"
        "import lora_lab\n"
        "print(time.process_time() - began, *sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    seconds = []
    for _ in range(3):
        own, *modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert "lora_lab" in modules and not HEAVY & set(modules)
        seconds.append(float(own))
        if min(seconds) < 0.040:
            break
    assert min(seconds) < 0.040


def test_layers_can_be_read_in_one_sitting():
    lines = (PACKAGE / "layers.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300


def test_every_module_says_what_it_is_for():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(PACKAGE)} has no docstring"


@pytest.mark.parametrize("name", [p.stem for p in sorted(PACKAGE.glob("*.py")) if p.stem not in ("__init__", "__main__")])
def test_docstring_examples_are_true(name):
    import doctest

    assert doctest.testmod(importlib.import_module(f"lora_lab.{name}")).failed == 0
