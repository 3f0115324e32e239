"""One list of dependencies: pyproject.toml. Everything else that names packages is compared with it."""

import os
import re
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LISTED = [Requirement(text) for text in PROJECT["dependencies"] + sum(EXTRAS.values(), [])]
PINS = {}
for row in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
    if row.strip() and not row.startswith("#"):
        pin = Requirement(row)
        PINS[canonicalize_name(pin.name)] = pin


def pip_arguments(lines):
    """What pip is told in requirement lines or commands -> (extras of this project, constraint files, indexes, others)."""
    words = [word.strip("'\"") for line in lines for word in line.split()]
    extras, constraints, indexes, others = set(), set(), set(), set()
    words = iter(words)
    for word in words:
        if word == "-c":
            constraints.add(next(words))
        elif word == "--extra-index-url":
            indexes.add(next(words))
        elif word == "-e":
            match = re.fullmatch(r"\.\[([\w,]+)\]", next(words))
            extras |= set(match[1].split(","))
        elif not word.startswith("--"):
            others.add(word)
    return extras, constraints, indexes, others


def test_every_dependency_is_pinned_within_its_range():
    for requirement in LISTED:
        pinned = PINS.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"constraints.txt does not pin {requirement.name}"
        (number,) = pinned.specifier
        assert requirement.specifier.contains(number.version), f"{pinned} is outside {requirement}"


def test_no_dependency_is_listed_twice():
    names = [canonicalize_name(requirement.name) for requirement in LISTED]
    assert len(names) == len(set(names))


def test_pins_are_exact_and_leave_each_machine_its_own_build():
    for name, pinned in PINS.items():
        assert re.fullmatch(r"==[\w.]+", str(pinned.specifier)), f"{pinned}: an exact version without a local tag (+cpu)"
        assert not re.match(r"nvidia|cuda|cudnn|triton|pytorch-triton|lora-lab", name), name
    assert "torch" in PINS


def test_the_python_it_asks_for():
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11.0")
    assert not SpecifierSet(PROJECT["requires-python"]).contains("3.10.9")
    assert "(3, 11)" in (ROOT / "start.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_every_pin_can_be_installed_on_the_oldest_release(python):
    """Distributions stay on early patch releases: Debian 12 has Python 3.11.2, where a pin that asks for 3.11.5 is fatal."""
    refused = []
    for found in distributions():
        pinned = PINS.get(canonicalize_name(found.metadata["Name"]))
        asked = found.metadata.get("Requires-Python")
        if pinned and asked and pinned.specifier.contains(found.version.partition("+")[0]):
            if not SpecifierSet(asked).contains(python):
                refused.append(f"{pinned} needs Python {asked}")
    assert not refused


def conda():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    packages = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    return packages, pip


def test_conda_names_no_package_of_its_own():
    packages, pip = conda()
    python = next(entry for entry in packages if entry.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.partition("=")[2])
    assert set(packages) == {python, "pip"}
    extras, constraints, _, others = pip_arguments(pip)
    assert extras == {"lab", "gpt2"} <= set(EXTRAS) and constraints == {"constraints.txt"} and others == set()


def post_build():
    return (ROOT / "binder" / "postBuild").read_text(encoding="utf-8")


def test_binder_installs_the_same():
    version = re.fullmatch(r"python-(\d+\.\d+)\n", (ROOT / "binder" / "runtime.txt").read_text())[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    commands = re.findall(r"^pip install (.*)$", post_build(), re.MULTILINE)
    extras, constraints, indexes, others = pip_arguments(commands)
    assert extras == {"lab", "gpt2"} and constraints == {"constraints.txt"}
    assert indexes == {"https://download.pytorch.org/whl/cpu"}
    assert others == {"torch"} and "torch" in commands[0]  # first, so that what follows keeps the CPU build
    assert {path.name for path in (ROOT / "binder").iterdir()} == {"postBuild", "runtime.txt"}


def test_start_and_ci_use_extras_that_exist():
    source = (ROOT / "start.py").read_text(encoding="utf-8")
    named = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"\{(\"lab\"[^}]*)\}", source))))
    assert named == set(EXTRAS)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no executable bit")
@pytest.mark.parametrize("name", [".ci/run", ".ci/keras", "binder/postBuild"])
def test_scripts_can_be_run(name):
    path = ROOT / name
    assert path.stat().st_mode & stat.S_IXUSR
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and re.search(r"^set -\w*e", text, re.MULTILINE)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_workflow():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert "pull_request" in triggers and triggers["schedule"]
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert set(matrix["python"]) == {"3.11", "3.13"}
    for name, job in workflow["jobs"].items():
        assert job["steps"][-1]["run"] == ("bash .ci/keras" if name == "keras" else "python start.py test")
    assert workflow["jobs"]["drift"]["steps"][-1]["env"] == {"LORA_LAB_UNPINNED": "1"}


HEAVY = {"transformers", "peft", "matplotlib", "ipywidgets", "sklearn", "joblib", "pandas", "pooch", "papermill",
         "IPython", "jupyterlab", "nbformat", "psutil"}
COST = """
import sys, time
import torch, numpy  # what the package may need; its own cost is what comes on top
began = time.process_time()
import lora_lab
print((time.process_time() - began) * 1000)
print(" ".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_import_is_light():
    """CPU time, the best of several runs, because a busy machine only ever makes an import slower."""
    milliseconds = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, check=True, cwd=ROOT)
        cost, modules = done.stdout.splitlines()
        assert not HEAVY & set(modules.split()), HEAVY & set(modules.split())
        milliseconds.append(float(cost))
        if milliseconds[-1] < 40:
            return
    raise AssertionError(f"import lora_lab costs {min(milliseconds):.0f} ms beside torch; the budget is 40 ms")
