"""What the unit tests share: one thread (so that the order of sums is the same on every machine) and a fixed seed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from browser_tools import SWITCHES, Server, find_chromium
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


# ---- a real browser: tests that ask for it say themselves when to skip --------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("jupyter")) as server:
        yield server


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """Where pictures of pages go: LORA_LAB_SHOTS, to look at them, else a folder that is thrown away."""
    folder = Path(os.environ.get("LORA_LAB_SHOTS", tmp_path_factory.mktemp("shots")))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
