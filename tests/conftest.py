"""What the unit tests share: one thread (so that the order of sums is the same on every machine) and a fixed seed."""

import shutil

import pytest
import torch
from mutants.conftest import pytest_terminal_summary  # noqa: F401  (prints the table of mutants, also under xdist)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def c_compiler():
    """torch.compile's default backend needs a C++ compiler; a laptop without one skips those tests."""
    if not (shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")):
        pytest.skip("no C++ compiler for torch.compile's inductor backend")
