"""The hub for a class: its settings, and, with two real accounts, that students see nothing of each other.

The real hub runs only where LORA_LAB_HUB_TEST=1 says so, because it makes two Unix accounts for its time: as root, with
configurable-http-proxy (`npm install --prefix hub`), with a Python that other accounts may run. It takes about half a minute of processor time.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

pytest.importorskip("jupyterhub", reason="the extra `hub` is not installed")
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "hub" / "jupyterhub_config.py"
PROXY = shutil.which("configurable-http-proxy", path=os.pathsep.join([str(ROOT / "hub/node_modules/.bin"), os.environ.get("PATH", "")]))


def settings(monkeypatch, tmp_path, open_to_all=True, **environment):
    """The recipe as the hub would read it, and the names it defines. Our own Python and pytest's folders may be closed to others."""
    if open_to_all:
        stat = Path.stat
        monkeypatch.setattr(Path, "stat", lambda self, **more: os.stat_result((stat(self, **more).st_mode | 0o005, *stat(self, **more)[1:])))
    for name, value in {"LORA_LAB_HUB_STATE": str(tmp_path / "state"), **environment}.items():
        monkeypatch.setenv(name, value)
    config = Config()
    names = {"get_config": lambda: config, "__file__": str(CONFIG)}
    exec(compile(CONFIG.read_text(encoding="utf-8"), str(CONFIG), "exec"), names)
    return config, names


@pytest.mark.skipif(os.name == "nt", reason="the recipe is for Linux")
def test_it_listens_on_loopback_and_keeps_its_secrets(monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_LAB_HUB_URL", raising=False)
    config, _ = settings(monkeypatch, tmp_path)
    assert config.JupyterHub.bind_url == "http://127.0.0.1:8000"
    state = tmp_path / "state"
    assert os.stat(state).st_mode & 0o777 == 0o700
    kept = [config.JupyterHub.cookie_secret_file, config.JupyterHub.db_url.removeprefix("sqlite:///"), config.ConfigurableHTTPProxy.pid_file]
    assert all(Path(path).parent == state for path in kept)
    assert config.PAMAuthenticator.allowed_groups == {"lora-lab"} and "allow_all" not in config.Authenticator


@pytest.mark.skipif(os.name == "nt", reason="the recipe is for Linux")
def test_every_student_has_numbers_of_their_own_and_what_the_room_has(monkeypatch, tmp_path):
    (tmp_path / "lab" / "models").mkdir(parents=True)
    config, _ = settings(monkeypatch, tmp_path, LORA_LAB_HUB_LAB=str(tmp_path / "lab"))
    given = config.Spawner.environment

    class ada:
        name = "ada"

    class spawner:
        user = ada

    assert given["LORA_LAB_STUDENT"](spawner) == "ada"
    assert given["LORA_LAB_MODELS"] == str(tmp_path / "lab" / "models") and "LORA_LAB_DATA" not in given


@pytest.mark.skipif(os.name == "nt", reason="the recipe is for Linux")
def test_a_home_is_prepared_without_touching_what_is_there(monkeypatch, tmp_path):
    _, names = settings(monkeypatch, tmp_path)
    lab, home = tmp_path / "lab", tmp_path / "home"
    (lab / "notebooks").mkdir(parents=True)
    (home / "lora-lab").mkdir(parents=True)
    for name in ("00_a.ipynb", "01_b.ipynb"):
        (lab / "notebooks" / name).write_text("new")
    (home / "lora-lab" / "00_a.ipynb").write_text("worked in")
    home.chmod(0o755)
    subprocess.run([sys.executable, "-I", "-c", names["PREPARE"], str(lab)], check=True, env={"HOME": str(home)})
    assert os.stat(home).st_mode & 0o777 == 0o700
    assert [(home / "lora-lab" / name).read_text() for name in ("00_a.ipynb", "01_b.ipynb")] == ["worked in", "new"]


@pytest.mark.skipif(os.name == "nt", reason="the recipe is for Linux")
def test_a_lab_that_students_cannot_read_is_named_before_the_first_logs_in(monkeypatch, tmp_path):
    _, names = settings(monkeypatch, tmp_path)
    monkeypatch.undo()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:  # pytest's own folders are closed to others
        top, lab = Path(temporary), Path(temporary, "opt", "lab")
        lab.mkdir(parents=True)
        for modes, closed in (((0o755, 0o755, 0o755), None), ((0o755, 0o750, 0o755), lab.parent), ((0o711, 0o711, 0o751), lab), ((0o711, 0o711, 0o755), None)):
            for path, mode in zip((top, lab.parent, lab), modes, strict=True):
                path.chmod(mode)
            assert names["closed_to_students"](lab) == (closed and closed.resolve()), modes
    (tmp_path / "private").mkdir(mode=0o700)
    with pytest.raises(SystemExit, match="closed to other accounts"):
        settings(monkeypatch, tmp_path, open_to_all=False, LORA_LAB_HUB_LAB=str(tmp_path / "private"))


# ---- a real hub with two students -----------------------------------------------------------------------------------------------

WHY_NOT = (
    "set LORA_LAB_HUB_TEST=1 to run it: it makes two Unix accounts" if os.environ.get("LORA_LAB_HUB_TEST") != "1"
    else "only root can be several users" if getattr(os, "geteuid", lambda: 1)() != 0
    else "no configurable-http-proxy: npm install --prefix hub" if PROXY is None
    else "no useradd here" if shutil.which("useradd") is None
    else ""
)  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Student:
    """A browser's part, with requests and a websocket: log in, start the server, run code in a kernel."""

    def __init__(self, base, name, password):
        import requests

        self.base, self.name, self.password, self.web = base, name, password, requests.Session()

    def url(self, path, name=None):
        return f"{self.base}/user/{name or self.name}{path}"

    def log_in(self):
        page = self.web.get(f"{self.base}/hub/login", timeout=30)
        form = {"username": self.name, "password": self.password, "_xsrf": self.web.cookies.get("_xsrf", path="/hub/")}
        answer = self.web.post(f"{self.base}/hub/login", data=form, headers={"Referer": page.url}, timeout=120)
        return answer

    def start(self, patience=300):
        """Logging in began it; wait until the server answers for itself. Patience is for a machine that others use, too."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            self.web.get(self.url("/lab"), timeout=60)  # through the hub's OAuth, as a browser goes
            answer = self.web.get(self.url("/api/status"), timeout=60)
            if answer.ok and "kernels" in answer.json():
                return
            time.sleep(1)
        raise AssertionError(f"the server of {self.name} did not start: {answer.status_code} {answer.text[:200]}")

    def send(self, method, path, name=None, **more):
        xsrf = self.web.cookies.get("_xsrf", path=f"/user/{self.name}/")
        return self.web.request(method, self.url(path, name), headers={"X-XSRFToken": xsrf or ""}, timeout=60, **more)

    def kernel(self):
        import websocket

        made = self.send("POST", "/api/kernels", json={"name": "python3", "path": "00_start_here.ipynb"})
        assert made.status_code == 201, made.text
        self.kernel_id = made.json()["id"]
        address = self.url(f"/api/kernels/{self.kernel_id}/channels").replace("http", "ws", 1)
        cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in self.web.cookies if cookie.path in ("/", f"/user/{self.name}/"))
        self.socket = websocket.create_connection(address, cookie=cookies, timeout=120, origin=self.base)

    def run(self, code):
        """What `code` prints, as JSON."""
        id = uuid.uuid4().hex
        header = {"msg_id": id, "msg_type": "execute_request", "session": "s", "username": self.name, "version": "5.3", "date": ""}
        content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False, "stop_on_error": True}
        self.socket.send(json.dumps({"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell", "buffers": []}))
        printed = ""
        while True:
            message = json.loads(self.socket.recv())
            if message["parent_header"].get("msg_id") != id:
                continue
            if message["msg_type"] == "stream":
                printed += message["content"]["text"]
            elif message["msg_type"] == "error":
                raise AssertionError("\n".join(message["content"]["traceback"]))
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return json.loads(printed)


@pytest.fixture(scope="module")
def class_of_two(tmp_path_factory):
    """A hub by the recipe, with two accounts that are gone afterwards."""
    place = Path("/var/tmp") / f"lora-lab-hub-{secrets.token_hex(4)}"  # pytest's own folders are root's alone
    (place / "lab" / "notebooks").mkdir(parents=True)
    shutil.copyfile(ROOT / "notebooks" / "00_start_here.ipynb", place / "lab" / "notebooks" / "00_start_here.ipynb")
    group, names, password = f"ll{secrets.token_hex(3)}", [f"ll{secrets.token_hex(3)}" for _ in range(2)], secrets.token_hex(12)
    port, hub_port, api_port = (free_port() for _ in range(3))
    (place / "config.py").write_text(
        f"c = get_config()\nload_subconfig({str(CONFIG)!r})\nc.JupyterHub.hub_port = {hub_port}\n"
        f"c.ConfigurableHTTPProxy.api_url = 'http://127.0.0.1:{api_port}'\nc.ConfigurableHTTPProxy.command = [{PROXY!r}]\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "PYTEST", "LORA_LAB"))} | {
        "LORA_LAB_HUB_URL": f"http://127.0.0.1:{port}", "LORA_LAB_HUB_LAB": str(place / "lab"), "LORA_LAB_HUB_STATE": str(place / "state"),
        "LORA_LAB_HUB_GROUP": group, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log, hub = place / "hub.log", None
    subprocess.run(["groupadd", group], check=True)
    try:
        for name in names:
            subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", "-G", group, name], check=True)
            subprocess.run(["chpasswd"], input=f"{name}:{password}", text=True, check=True)
        with log.open("w") as file:
            command = [sys.executable, "-m", "jupyterhub", "-f", str(place / "config.py")]
            hub = subprocess.Popen(command, cwd=place, env=environment, stdout=file, stderr=file, start_new_session=True)
        base, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        import requests

        while True:
            try:
                if requests.get(f"{base}/hub/api", timeout=5).ok:
                    break
            except requests.RequestException:
                pass
            assert hub.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
        students = [Student(base, name, password) for name in names]
        for student in students:
            answer = student.log_in()
            assert answer.ok and "/hub/login" not in answer.url, (answer.url, log.read_text()[-3000:])
            student.start()
            student.kernel()
        yield students, place
    finally:
        if hub is not None:
            hub.send_signal(signal.SIGTERM)  # the hub ends proxy and servers, the servers their kernels
            try:
                hub.wait(timeout=30)
            except subprocess.TimeoutExpired:
                hub.kill()
        for name in names:
            subprocess.run(["pkill", "-KILL", "-u", name], check=False)  # this account was made for this test
            for _ in range(20):
                if subprocess.run(["userdel", "--remove", name], capture_output=True).returncode in (0, 6):
                    break
                time.sleep(0.2)
        subprocess.run(["groupdel", group], check=False)
        if os.environ.get("LORA_LAB_HUB_LOG"):
            shutil.copyfile(log, os.environ["LORA_LAB_HUB_LOG"])
        shutil.rmtree(place, ignore_errors=True)


OWN = """
import getpass, glob, json, os, resource, tempfile
from pathlib import Path
Path.home().joinpath("lora-lab", "mine.txt").write_text("my answer")
shared = Path(tempfile.gettempdir()) / f"of-{getpass.getuser()}.txt"
shared.write_text("my notes")
tcp = []
inodes = {os.readlink(p)[8:-1] for p in glob.glob("/proc/self/fd/*") if os.path.lexists(p) and os.readlink(p).startswith("socket:")}
for line in open("/proc/self/net/tcp").readlines()[1:]:
    parts = line.split()
    if parts[3] == "0A" and parts[9] in inodes:
        tcp.append(int(parts[1].split(":")[1], 16))
from ipykernel.kernelapp import IPKernelApp
print(json.dumps({"pid": os.getpid(), "parent": os.getppid(), "home": str(Path.home()), "shared": str(shared), "tcp": tcp,
                  "connection": IPKernelApp.instance().abs_connection_file, "ip": IPKernelApp.instance().ip,
                  "student": os.environ["LORA_LAB_STUDENT"], "token": os.environ.get("JUPYTERHUB_API_TOKEN", ""), "uid": os.getuid(),
                  "pipe": IPKernelApp.instance().iopub_thread._pipe_port,
                  "memory": resource.getrlimit(resource.RLIMIT_DATA)[1], "here": sorted(os.listdir(".")),
                  "tty": sorted(glob.glob("/dev/pts/[0-9]*"))}))
"""

# Runs in one student's kernel; `other` is what the other one's kernel said of itself, `state` the hub's own folder.
LOOK = """
import ctypes, json, os, signal, socket
other, state = json.loads({other!r}), {state!r}
home, pid = other["home"], other["pid"]
got = []
def attempt(name, what):
    try:
        found = what()
    except (OSError, PermissionError):
        return
    got.append((name, repr(found)[:200]))
for path in (home, home + "/lora-lab", os.path.dirname(other["connection"]), state):
    attempt("list " + path, lambda: os.listdir(path))
for path in (home + "/lora-lab/mine.txt", home + "/.local/share/jupyter/notebook_secret", other["connection"], other["shared"], state + "/cookie_secret",
             state + "/jupyterhub.sqlite", *other["tty"]):
    attempt("read " + path, lambda: open(path, "rb", 0).read(100) if not path.startswith("/dev") else os.close(os.open(path, os.O_RDWR | os.O_NOCTTY)))
for name in ("environ", "cwd", "root", "mem", "maps", "fd"):
    for number in (pid, other["parent"]):
        path = f"/proc/{{number}}/{{name}}"
        attempt("look at " + path, lambda: os.listdir(path) if name == "fd" else os.readlink(path) if name in ("cwd", "root") else open(path, "rb").read(10))
attempt("write into the other's folder", lambda: open(home + "/lora-lab/from-me.txt", "w").write("x"))
attempt("replace the shared file", lambda: os.replace(__file__ if "__file__" in globals() else os.devnull, other["shared"]))
attempt("signal", lambda: os.kill(pid, 0))
attempt("end", lambda: os.kill(pid, signal.SIGTERM))
def trace():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, pid, None, None) != 0:
        raise OSError(ctypes.get_errno())
    os.waitpid(pid, 0x40000000)
    libc.ptrace(17, pid, None, None)  # let it go on
    return "attached"
attempt("trace", trace)
def connect():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(other["ip"] + "-2")
    return "connected"
attempt("listen to the kernel's output", connect)
print(json.dumps(got))
"""


@pytest.fixture(scope="module")
def said(class_of_two):
    """What each kernel says of itself."""
    return [student.run(OWN) for student in class_of_two[0]]


@pytest.mark.slow
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
class TestTwoStudents:
    def test_each_works_as_an_account_of_its_own(self, class_of_two, said):
        students, _ = class_of_two
        assert said[0]["uid"] != said[1]["uid"] and 0 not in {s["uid"] for s in said}
        for student, own in zip(students, said, strict=True):
            assert own["student"] == student.name and "00_start_here.ipynb" in own["here"] and own["memory"] == 3_000_000_000
            # No port to listen to. The one that is open takes what forked children of the kernel print, if it begins with a random name
            # that only they know, and says nothing.
            assert set(own["tcp"]) <= {own["pipe"]}
        # The same code finds what it looks for where it may: the walls below are not empty words.
        assert Path(said[0]["home"], "lora-lab/mine.txt").read_text() == "my answer"
        own = said[0] | {"pid": said[0]["parent"]}  # not itself: a signal would end it
        found = students[0].run(LOOK.format(other=json.dumps(own), state="/nowhere").replace('attempt("end"', 'attempt if 0 else (lambda *a: 0)("end"'))
        assert {"read " + own["connection"], "listen to the kernel's output", "signal"} <= {name for name, _ in found}

    def test_neither_reaches_the_other(self, class_of_two, said):
        students, place = class_of_two
        for me, other in ((0, 1), (1, 0)):
            assert students[me].run(LOOK.format(other=json.dumps(said[other]), state=str(place / "state"))) == []
        for student, own in zip(students, said, strict=True):
            assert student.run("import os, json; print(json.dumps(os.getpid()))") == own["pid"]  # both kernels live on

    def test_a_login_opens_the_own_server_alone(self, class_of_two, said):
        students, _ = class_of_two
        for me, other in ((students[0], students[1]), (students[1], students[0])):
            for path in ("/api/contents", "/api/kernels", "/api/terminals", "/lab", f"/api/kernels/{other.kernel_id}"):
                answer = me.web.get(other.url(path), timeout=60)
                assert answer.status_code in (403, 404) or "mine.txt" not in answer.text and other.kernel_id not in answer.text, (path, answer.status_code)
                assert answer.status_code == 403, (path, answer.status_code, answer.url)
            assert me.send("POST", "/api/terminals", name=other.name).status_code == 403
            assert me.send("GET", "/api/contents").ok  # the same request to the own server is answered

    def test_a_servers_own_token_opens_nothing_of_the_others(self, class_of_two, said):
        import requests

        students, _ = class_of_two
        token = {"Authorization": f"token {said[0]['token']}"}
        assert said[0]["token"] and requests.get(students[0].url("/api/contents"), headers=token, timeout=60).status_code in (200, 403)
        assert requests.get(students[1].url("/api/contents"), headers=token, timeout=60).status_code == 403
        for path in (f"/hub/api/users/{students[1].name}", "/hub/api/users", "/hub/api/proxy"):
            assert requests.get(f"{students[0].base}{path}", headers=token, timeout=60).status_code in (403, 404), path
        stop = requests.delete(f"{students[0].base}/hub/api/users/{students[1].name}/server", headers=token, timeout=60)
        assert stop.status_code in (403, 404)

    def test_command_lines_hold_no_secret(self, class_of_two, said):
        students, _ = class_of_two
        shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert "jupyterhub-singleuser" in shown and not any(secret in shown for secret in (said[0]["token"], said[1]["token"], students[0].password))

    def test_nobody_else_comes_in(self, class_of_two):
        students, _ = class_of_two
        for name, password in ((students[0].name, "wrong"), ("root", students[0].password), ("nobody", "")):
            answer = Student(students[0].base, name, password).log_in()
            assert answer.status_code in (403, 200) and "/hub/login" in answer.url, (name, answer.status_code, answer.url)

    def test_too_much_memory_costs_the_cell_and_not_the_machine(self, class_of_two):
        students, _ = class_of_two
        code = "import json\ntry:\n    x = bytearray(4_000_000_000)\n    print(json.dumps('had it'))\nexcept MemoryError:\n    print(json.dumps('MemoryError'))"
        assert students[0].run(code) == "MemoryError"
