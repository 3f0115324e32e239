"""A real JupyterLab and a real browser, used as a student uses them: menus, keys, and what the page shows."""

import base64
import contextlib
import io
import json
import math
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


def notebook(name: str, **cells: str):
    """A notebook of code cells, id -> source, ready for `Student`: what tests write that need no lab. Underscores become dashes in ids."""
    from nbformat.v4 import new_code_cell, new_notebook

    metadata = {"lora_lab": {"lab": name}, "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(metadata=metadata, cells=[new_code_cell(source, id=key.replace("_", "-")) for key, source in cells.items()])


STILL_CELLS = {  # views that stand still until a slider is moved, and the smallest thing that answers a slider, beside which they are measured
    "explorer": """
from sklearn.datasets import load_sample_images
from lora_lab.view import rank_explorer, volume_knob
rank_explorer(load_sample_images().images[0].mean(2) / 255, r=20)""",
    "knob": "volume_knob()",
    "peer": """
import ipywidgets
slider, answer = ipywidgets.IntSlider(value=20, max=200, description="peer"), ipywidgets.HTML("<b class='answer'>20</b>")
def callback(change):
    answer.value = f"<b class='answer'>{change['new']}</b>"
slider.observe(callback, "value")
ipywidgets.VBox([slider, answer])""",
}


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

    def setting(self, plugin: str, **values) -> None:
        """Settings of a JupyterLab plugin, for pages that are opened from now on; without values, its defaults."""
        extension, _, name = plugin.partition(":")
        path = self.folder / "settings" / extension / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))

    def ask(self, path: str, method: str = "GET"):
        """What the server's interface answers: parsed, or True where it says nothing."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        request.add_header("Authorization", f"token {TOKEN}")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return json.loads(answer.read() or "true")

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

    def __init__(self, browser, server: Server, built, shots: Path, **page):
        """built: the notebook; shots: folder for pictures of the page; page: other options of it, such as its viewport."""
        self.built, self.server, self.file = built, server, server.work / f"{built.metadata.lora_lab.lab}.ipynb"
        self.file.write_text(notebook_text(built), encoding="utf-8")
        self.ids = [cell.id for cell in built.cells]
        self.shots, self.complaints = shots, []
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}} | page)
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.address = server.address(self.file.name)
        self.log_began = server.log.stat().st_size

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
        for session in self._sessions():  # a kernel whose page is closed would go on training beside the next test
            with contextlib.suppress(OSError):
                self.server.ask(f"/api/sessions/{session['id']}", "DELETE")

    def _sessions(self) -> list[dict]:
        return [session for session in self.server.ask("/api/sessions") if session["path"] == self.file.name]

    def kernel_log(self) -> str:
        """What server and kernels wrote since this notebook was opened: unhandled exceptions of tasks and callbacks end there."""
        return self.server.log.read_bytes()[self.log_began :].decode("utf-8", "replace")

    def interrupt(self) -> None:
        """What the button with the square does."""
        self.server.ask(f"/api/kernels/{self._sessions()[0]['kernel']['id']}/interrupt", "POST")

    def asks(self, expression: str, patience: float = PATIENCE):
        """The value of a Python expression in the notebook's kernel, as plain data: what a cell would see, without the page."""
        from jupyter_client import BlockingKernelClient

        identity = self._sessions()[0]["kernel"]["id"]
        client = BlockingKernelClient(connection_file=str(self.server.folder / "runtime" / f"kernel-{identity}.json"))
        client.load_connection_file()
        client.start_channels()

        def answer():  # None: a cell has just failed, and the kernel sends away what was queued behind it
            sent = client.execute("", user_expressions={"value": expression}, store_history=False, reply=True, timeout=patience)
            return sent["content"] if sent["content"]["status"] != "aborted" else None

        try:
            found = wait_for(answer, "the kernel to take requests again")
        finally:
            client.stop_channels()
        value = found["user_expressions"]["value"]
        if value["status"] == "error":
            raise RuntimeError(f"{expression}: {value['ename']}: {value['evalue']}")
        return eval(value["data"]["text/plain"], {"__builtins__": {}, "inf": math.inf, "nan": math.nan})  # a repr of plain data

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


# From the key to the frame in which something changed. A frame is what requestAnimationFrame announces; a message sent from there is
# handled after it was painted. `shows` says what counts: a script's text that makes a value of the area (null: not yet), so that a frame
# of a running training is not taken for an answer to the key.
WATCH = """
(area, shows) => {
  const value = new Function("area", shows);
  let pressed = null, before = null;
  document.addEventListener("keydown", event => { pressed = event.timeStamp; before = value(area); }, {capture: true, once: true});
  window.keyToPixels = new Promise(resolve => {
    const observer = new MutationObserver(() => {
      const now = value(area);
      if (pressed === null || now === null || now === before) return;
      observer.disconnect();
      requestAnimationFrame(() => {
        const painted = new MessageChannel();
        painted.port1.onmessage = () =>
          resolve({milliseconds: performance.now() - pressed, pressed: (performance.timeOrigin + pressed) / 1000});
        painted.port2.postMessage(0);
      });
    });
    observer.observe(area, {subtree: true, childList: true, characterData: true, attributes: true});
  });
}
"""


def key_to_pixels(student: Student, area, key: str, shows: str, patience: float = 10) -> dict:
    """Press a key; wait until what `shows` says of the area has changed and been painted.

    shows  a JavaScript function's body that returns a value of `area`, such as "return area.querySelector('img').src"
    Returns {"milliseconds": from the key's own time stamp to the painted frame, "pressed": that time stamp in seconds since 1970}.
    Raises TimeoutError.
    """
    area.evaluate(WATCH, shows)
    student.page.keyboard.press(key)
    found = student.page.evaluate(
        "patience => Promise.race([window.keyToPixels, new Promise(resolve => setTimeout(resolve, patience, null))])", 1000 * patience
    )
    if found is None:
        raise TimeoutError(f"{key} changed nothing within {patience:g} s of what `{shows}` looks at")
    return found


@contextlib.contextmanager
def screencast(page):
    """Every frame that the browser's compositor puts out, as (seconds since 1970, PNG bytes): the list that `with` gives is filled meanwhile."""
    frames, session = [], page.context.new_cdp_session(page)

    def keep(frame):
        frames.append((frame["metadata"]["timestamp"], base64.b64decode(frame["data"])))
        session.send("Page.screencastFrameAck", {"sessionId": frame["sessionId"]})

    session.on("Page.screencastFrame", keep)
    session.send("Page.startScreencast", {"format": "png", "everyNthFrame": 1})
    try:
        yield frames
    finally:
        session.send("Page.stopScreencast")
        session.detach()


def frame_of_change(frames: list, box: dict, width: int, pressed: float, least: float = 8.0) -> float | None:
    """Milliseconds from `pressed` to the first frame of a screencast whose pixels in `box` differ from those before; None: no such frame.

    width  of the page in CSS pixels, which `box` (x, y, width, height) is in
    least  grey levels of 255 by which one pixel has to differ
    """
    import numpy as np
    from PIL import Image

    def inside(picture):
        image = Image.open(io.BytesIO(picture)).convert("L")
        corners = [box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]]
        return np.asarray(image.crop([round(at * image.width / width) for at in corners]), dtype=float)

    before = inside([picture for seconds, picture in frames if seconds < pressed][-1])
    for seconds, picture in frames:
        if seconds >= pressed and np.abs(inside(picture) - before).max() >= least:
            return 1000 * (seconds - pressed)


# Every text that can be seen in an area, with its contrast against what lies behind it (WCAG 2: 1 to 21).
CONTRAST = """
area => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = c => { const f = c.slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                       return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  const behind = element => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const found = [], walker = document.createTreeWalker(area, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement, text = node.textContent.trim(), box = element.getBoundingClientRect();
    if (!text || ["STYLE", "SCRIPT"].includes(element.tagName) || box.width < 2 || box.height < 2 || !element.checkVisibility()) continue;
    const look = getComputedStyle(element), paper = behind(element);
    const ink = over(parse(element.namespaceURI.endsWith("svg") ? look.fill : look.color), paper);
    const [high, low] = [light(ink), light(paper)].sort((a, b) => b - a);
    found.push([text, (high + 0.05) / (low + 0.05)]);
  }
  return found;
}
"""


def contrasts(area) -> list[tuple[str, float]]:
    """(text, contrast ratio) of all that can be read in `area`."""
    return [(text, ratio) for text, ratio in area.evaluate(CONTRAST)]


def focused_name(page) -> tuple[str, str]:
    """(role, name) of what has the focus, as the browser tells a screen reader."""
    session = page.context.new_cdp_session(page)
    try:
        found = session.send("Runtime.evaluate", {"expression": "document.activeElement"})
        [node] = session.send("Accessibility.getPartialAXTree", {"objectId": found["result"]["objectId"], "fetchRelatives": False})["nodes"]
    finally:
        session.detach()
    return node.get("role", {}).get("value", ""), node.get("name", {}).get("value", "")
