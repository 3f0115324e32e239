"""A real JupyterLab and a real browser, used as a student uses them: menus, keys, and what the page shows."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from lora_lab.course.builder import notebook_text

TOKEN = secrets.token_hex(16)
PATIENCE = 60  # seconds for one step: a kernel that imports torch on a busy machine takes 20
CHROMIUM = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Without a sandbox it also runs as root in a container; the rest keeps it from asking the network for anything.
SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-proxy-server",
]  # fmt: skip


def find_chromium() -> str | None:
    """Path of a Chromium: LORA_LAB_CHROMIUM, or where distributions put it. None if there is none."""
    wanted = os.environ.get("LORA_LAB_CHROMIUM")
    return next(filter(None, map(shutil.which, [wanted] if wanted else CHROMIUM)), None)


def wait_for(found, what: str, patience: float = PATIENCE):
    """Call `found` until it returns something true; return that."""
    deadline = time.monotonic() + patience
    while not (value := found()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience:g} s for {what}")
        time.sleep(0.1)
    return value


class Server:
    """JupyterLab in `folder/work`, with settings of nobody else: everything it reads or writes lies under `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.work, self.log = folder, folder / "work", folder / "jupyter.log"
        self.work.mkdir()
        config = folder / "config" / "labconfig" / "page_config.json"
        config.parent.mkdir(parents=True)
        # JupyterLab's question about news would cover the notebook; start.py switches it off in the same way.
        config.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
        self.process = self.port = None

    def __enter__(self):
        own = {
            "HOME": "home", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
            "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython",
        }  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "LORA_LAB_", "MPL", "JPY_"))}
        environment = inherited | {name: str(self.folder / place) for name, place in own.items()}
        environment |= {"JUPYTER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}  # tests and kernels share the cores
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Another process may take that port before the server does: then it tries others, and says which one it got.
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
            "--ServerApp.port_retries=50", f"--ServerApp.root_dir={self.work}",
        ]  # fmt: skip
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, cwd=self.work, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(self._serves, f"JupyterLab to start; its output is in {self.log}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _serves(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended at once: {self.log.read_text(encoding='utf-8')[-2000:]}")
        try:
            self.port = json.loads((self.folder / "runtime" / f"jpserver-{self.process.pid}.json").read_text())["port"]
            return self.ask("/api/status")
        except (OSError, ValueError):  # not written yet, or half
            return False

    def ask(self, path: str, method: str = "GET") -> bool:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        request.add_header("Authorization", f"token {TOKEN}")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5):
            return True

    def __exit__(self, *error):
        if self.port is not None:
            with contextlib.suppress(OSError):
                self.ask("/api/shutdown", "POST")  # the kernels go with it
        for end in (lambda: None, self.process.terminate, self.process.kill):
            end()
            try:
                self.process.wait(timeout=10)
                return
            except subprocess.TimeoutExpired:
                pass

    def address(self, notebook: str) -> str:
        # A workspace of its own: in the common one JupyterLab would open the notebooks of earlier tests again.
        return f"http://127.0.0.1:{self.port}/lab/workspaces/{Path(notebook).stem}/tree/{notebook}?token={TOKEN}"


class Student:
    """Somebody before a notebook in JupyterLab. Cells are named by their ids in the file."""

    def __init__(self, browser, server: Server, built, shots: Path):
        """built: the notebook; shots: folder for pictures of the page."""
        self.built, self.file = built, server.work / f"{built.metadata.lora_lab.lab}.ipynb"
        self.file.write_text(notebook_text(built), encoding="utf-8")
        self.ids = [cell.id for cell in built.cells]
        self.shots, self.complaints = shots, []
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.address = server.address(self.file.name)

    def __enter__(self):
        try:
            self.page.goto(self.address)
            wait_for(lambda: self.page.locator(".jp-Notebook .jp-Cell").count() == len(self.ids), "all cells of the notebook")
            self.wait_until_idle()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            error.add_note(f"The page as it was: {self.shot('failed')}")
        self.page.close()

    def shot(self, name: str) -> Path:
        """Save what the window shows; returns the path."""
        path = self.shots / f"{self.file.stem}_{name}.png"
        with contextlib.suppress(Exception):  # a page that crashed has no picture, and the reason must still be told
            self.page.screenshot(path=path, timeout=10_000)
        return path

    def wait_until_idle(self) -> None:
        self.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()

    def cell(self, name: str):
        return self.page.locator(".jp-Notebook .jp-Cell").nth(self.ids.index(name))

    def output(self, name: str):
        return self.cell(name).locator(".jp-Cell-outputArea")

    def run(self, name: str):
        """Select the cell, press Ctrl+Enter, wait for its number. Returns its output."""
        prompt = self.cell(name).locator(".jp-InputPrompt")
        before = prompt.inner_text()

        def started():
            # Just opened, JupyterLab may still be moving the focus when it says idle, and lose the key: press it again.
            prompt.click()
            self.page.keyboard.press("Control+Enter")
            with contextlib.suppress(TimeoutError):
                return wait_for(lambda: prompt.inner_text() != before, "", patience=5)

        wait_for(started, f"cell {name} to start")
        wait_for(lambda: re.fullmatch(r"\[\d+\]:", prompt.inner_text().strip()), f"cell {name} to run")
        return self.output(name)

    def retype_last_line(self, name: str, text: str) -> None:
        """Replace the last line of a cell, key by key: brackets close themselves, as they do for a student."""
        self.cell(name).locator(".cm-content").click()
        self.page.keyboard.press("Control+End")
        self.page.keyboard.press("Shift+Home")
        self.page.keyboard.type(text)

    def menu(self, *path: str) -> None:
        """Click through JupyterLab's menus."""
        self.page.locator(".lm-MenuBar-itemLabel").get_by_text(path[0], exact=True).click()
        for name in path[1:]:
            self.page.locator(".lm-Menu-itemLabel").get_by_text(name, exact=True).click()

    def restart_and_clear(self) -> None:
        self.menu("Kernel", "Restart Kernel and Clear Outputs of All Cells…")
        dialog = self.page.locator("dialog.jp-Dialog")
        dialog.locator("button.jp-mod-accept").click()
        dialog.wait_for(state="detached")
        wait_for(lambda: not self.page.locator(".jp-OutputArea-output").count(), "the outputs to be cleared")
        self.wait_until_idle()

    def saved_outputs(self) -> list[dict]:
        """Save with Ctrl+S and return all outputs in the file."""
        before = self.file.stat().st_mtime_ns
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("Control+s")
        wait_for(lambda: self.file.stat().st_mtime_ns != before, "the notebook to be saved")

        def outputs():
            with contextlib.suppress(ValueError):  # half written
                return json.loads(self.file.read_text(encoding="utf-8"))["cells"]

        return [output for cell in wait_for(outputs, "the saved notebook") for output in cell.get("outputs", ())]
