"""start.py without a full installation: what it decides, what it says when something is wrong, what it leaves behind."""

import ast
import http.server
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "start.py"
PROJECT = '[project]\ndependencies = ["numpy", "torch>=2.6"]\n'


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A fresh start.py whose folder is an empty one, with no way to run pip or to make an environment."""
    spec = importlib.util.spec_from_file_location("start_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\ntorch==2.13.0\n")
    monkeypatch.delenv("LORA_LAB_UNPINNED", raising=False)
    return module


@pytest.fixture
def fake(start, monkeypatch, tmp_path):
    """Stand-ins for venv, pip and the network; `calls` records what would have been installed."""
    state = SimpleNamespace(calls=[], made=0, version="3.12", import_errors=[], pip=lambda arguments: None)
    venv = tmp_path / ".venv"

    def make(path):
        state.made += 1
        path.mkdir()
        (path / "pyvenv.cfg").touch()

    def run_pip(path, arguments, doing):
        if arguments != [start.PIP]:
            state.calls.append(list(arguments))
        else:
            assert not state.calls or "-e" in state.calls[-1]  # a usable pip comes before what it installs
        state.pip(arguments)

    monkeypatch.setattr(start, "make_venv", make)
    monkeypatch.setattr(start, "probe_python", lambda python: state.version if venv.exists() else None)
    monkeypatch.setattr(start, "run_pip", run_pip)
    monkeypatch.setattr(start, "works", lambda path: state.import_errors.pop(0) if state.import_errors else "")
    monkeypatch.setattr(start, "torch_indexes", lambda asked: [asked])
    monkeypatch.setattr(start, "check_room", lambda root: None)
    state.set_up = lambda *argv: start.set_up(tmp_path, start.parse(list(argv)))
    return state


# ---- what the user types, and with which Python -------------------------------------------------------------------

def test_an_old_python_reads_one_sentence(tmp_path):
    # The file must at least parse there: ast knows the grammar back to 3.7 (it ran by hand on 3.6 and 3.8).
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 7))
    code = f"import sys; sys.version_info = (3, 8, 18); exec(compile(open({str(SCRIPT)!r}).read(), 'start.py', 'exec'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("LoRA Lab needs Python 3.11 or newer, and this is Python 3.8.")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_it_imports_the_standard_library_only():
    for node in ast.walk(ast.parse(SCRIPT.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names, names


def test_arguments(start, capsys, monkeypatch):
    options = start.parse([])
    assert (options.command, options.port, options.torch_index) == ("open", None, None)
    assert not options.no_browser and not options.unpinned
    options = start.parse(["--port", "9000", "--torch-index", "https://x/whl", "--no-browser"])
    assert (options.port, options.torch_index, options.no_browser) == (9000, "https://x/whl", True)
    assert start.parse(["test", "-x", "tests/test_a.py", "-k", "b"]).rest == ["-x", "tests/test_a.py", "-k", "b"]
    assert start.parse(["test", "--tor", "short"]).rest == ["--tor", "short"]  # pytest may have one that begins like ours
    monkeypatch.setenv("LORA_LAB_UNPINNED", "1")
    assert start.parse([]).unpinned
    for wrong in (["--prot", "1"], ["clean"], ["--port", "70000"], ["--port", "x"]):
        with pytest.raises(SystemExit):
            start.parse(wrong)
    assert "Traceback" not in capsys.readouterr().err


# ---- failures: one sentence each ----------------------------------------------------------------------------------

@pytest.mark.parametrize(("output", "part"), [
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
    ("OSError: [Errno 122] Disk quota exceeded: '/home/a/.cache'", "disk is full"),
    ("error: [WinError 112] There is not enough space on the disk", "disk is full"),
    ("OSError: [Errno 30] Read-only file system: '/lab/.venv/lib'", "read-only"),
    ("WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(<pip._vendor.urllib3...>: Failed "
     "to establish a new connection: [Errno -3] Temporary failure in name resolution')'\n"
     "ERROR: No matching distribution found for torch==2.13.0", "no package index answers"),
    ("pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(host='pypi.org'): Read timed out.",
     "no package index answers"),
    ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer'))\n"
     "Max retries exceeded", "PIP_CERT"),
    ("ProxyError('Cannot connect to proxy.', OSError('Tunnel connection failed: 407 Proxy Authentication Required'))",
     "HTTPS_PROXY"),
    ("ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)\n"
     "ERROR: No matching distribution found for torch==2.13.0", "no build of PyTorch 2.13.0"),
    ("ERROR: Could not install packages due to an OSError: [WinError 5] Access is denied: 'lab\\.venv\\a.pyd'",
     "close JupyterLab"),
    ("HINT: This error might have occurred since this system does not have Windows Long Path support enabled.", "short"),
    ("ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x'", "home folder"),
    ("The virtual environment was not created successfully because ensurepip is not available.", "python3-venv"),
    ("    beautifulsoup4 4.15.0 depends on soupsieve>=1.6.1\n    The user requested (constraint) soupsieve==4.1.2\n"
     "ERROR: ResolutionImpossible: for help visit https://pip", "(soupsieve==4.1.2 cannot be had): use the newest"),
    ("Collecting a\nERROR: something quite new\n  its detail", "Installing failed: ERROR: something quite new"),
    ("", "Installing failed: no message"),
])
def test_what_pip_says_becomes_a_sentence(start, output, part):
    sentence = start.explain(output, 1, "Installing")
    assert part in sentence and "\n" not in sentence and "{" not in sentence


def test_a_killed_pip_means_too_little_memory(start):
    assert "memory" in start.explain("Installing collected packages: torch", -9, "Installing PyTorch")


def test_a_failing_pip_stops_with_a_sentence_and_keeps_its_output(start, tmp_path, monkeypatch, capsys):
    (tmp_path / "pip.py").write_text("print('Collecting torch'); print('OSError: [Errno 28] No space left'); exit(2)")
    monkeypatch.setattr(start, "venv_python", lambda venv: sys.executable)
    monkeypatch.setattr(start, "child_environment", lambda: os.environ | {"PYTHONPATH": str(tmp_path)})
    (tmp_path / ".venv").mkdir()
    with pytest.raises(start.Stop, match="disk is full"):
        start.run_pip(tmp_path / ".venv", ["torch"], "Installing PyTorch")
    log = (tmp_path / ".venv" / "install.log").read_text()
    assert "Collecting torch" in log and "-m pip install torch" in log
    assert capsys.readouterr().out == ""  # no terminal, no changing line


def test_missing_venv_module(start, monkeypatch, tmp_path):
    for name in ("venv", "ensurepip"):
        real = importlib.util.find_spec
        with monkeypatch.context() as m:
            m.setattr(importlib.util, "find_spec", lambda n, real=real, name=name: None if n == name else real(n))
            with pytest.raises(start.Stop, match=rf"no {name} module.*apt install python3\.\d+-venv"):
                start.ensure_venv(tmp_path / ".venv")
        assert not (tmp_path / ".venv").exists()


def test_full_disk_is_seen_before_anything_is_made(start, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(start, "has_nvidia", lambda: False)
    monkeypatch.setattr(start.shutil, "disk_usage", lambda path: SimpleNamespace(free=1.2e9))
    assert start.main([]) == 1
    message = capsys.readouterr().err
    assert "1.2 GB are free" in message and "2.5 GB" in message and "Traceback" not in message
    assert not (tmp_path / ".venv").exists()


def test_read_only_folder(start, tmp_path, capsys):
    (tmp_path / ".lora-lab").write_text("a file where a folder should be made")  # root may write anywhere: this it cannot
    assert start.main([]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_an_unforeseen_oserror_is_no_traceback(start, monkeypatch, capsys):
    monkeypatch.setattr(start, "set_up", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert start.main([]) == 1
    assert "disk is full" in capsys.readouterr().err


def test_ctrl_c_during_the_set_up(start, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "set_up", interrupted)
    assert start.main([]) == 130
    assert "goes on where it stopped" in capsys.readouterr().err


# ---- the environment ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_working_environment_is_kept(start, tmp_path):
    venv = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    assert start.probe_python(start.venv_python(venv)) == ""  # runs, but has no pip: killed half-way
    (venv / "mine").touch()
    version, fresh = start.ensure_venv(venv)  # ensurepip mends it
    assert version == f"{sys.version_info[0]}.{sys.version_info[1]}" and not fresh
    assert (venv / "mine").exists()


@pytest.mark.skipif(os.name == "nt", reason="no symbolic links without privileges")
def test_a_dangling_python_is_replaced(start, tmp_path, monkeypatch, capsys):
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/nowhere/python3.11")
    made = []

    def make(path):
        made.append(path.exists())
        path.joinpath("bin").mkdir(parents=True)
        path.joinpath("bin", "python").symlink_to(sys.executable)

    monkeypatch.setattr(start, "make_venv", make)
    assert start.ensure_venv(venv) == (f"{sys.version_info[0]}.{sys.version_info[1]}", True)
    assert made == [False] and "broken" in capsys.readouterr().out


def test_what_is_no_environment_is_left_alone(start, tmp_path):
    venv = tmp_path / ".venv"
    venv.mkdir()
    (venv / "thesis.txt").write_text("three years")
    with pytest.raises(start.Stop, match="no Python environment"):
        start.ensure_venv(venv)
    assert (venv / "thesis.txt").read_text() == "three years"


@pytest.mark.skipif(os.name == "nt", reason="no symbolic links without privileges")
def test_a_link_is_unlinked_not_followed(start, tmp_path, monkeypatch):
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "pyvenv.cfg").touch()
    (tmp_path / ".venv").symlink_to(target)
    start.remove_venv(tmp_path / ".venv")
    assert (target / "pyvenv.cfg").exists() and not (tmp_path / ".venv").exists()


def test_children_get_nothing_that_reaches_into_the_environment(start, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ros")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror")
    environment = start.child_environment()
    assert "PYTHONPATH" not in environment and environment["PIP_USER"] == "0"
    assert environment["PIP_INDEX_URL"] == "https://mirror"


# ---- the stamp ----------------------------------------------------------------------------------------------------

def test_first_start_installs_torch_first_and_pinned(fake):
    fake.set_up()
    assert fake.made == 1
    assert fake.calls == [["torch==2.13.0", "-c", "constraints.txt"], ["-e", ".[gpt2,lab]", "-c", "constraints.txt"]]


def test_second_start_installs_nothing(fake):
    fake.set_up()
    fake.calls.clear()
    fake.set_up()
    fake.set_up("notebooks")
    assert fake.calls == [] and fake.made == 1


def test_the_playground_adds_what_it_needs_to_what_is_there(fake):
    fake.set_up()
    fake.set_up("playground")
    assert fake.calls[-1][1] == ".[gpt2,lab,lecture]"
    fake.calls.clear()
    fake.set_up("playground")
    fake.set_up()
    assert fake.calls == []


def test_more_extras_are_added_and_fewer_keep_them(fake, tmp_path):
    fake.set_up()
    fake.set_up("test")
    assert fake.calls[-1][1] == ".[cluster,dev,gpt2,hub,keras,lab,lecture]"
    fake.calls.clear()
    fake.set_up()
    fake.set_up("test")
    assert fake.calls == []
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("# another version of the lab\n")
    fake.set_up()
    assert fake.calls[-1][1] == ".[cluster,dev,gpt2,hub,keras,lab,lecture]"  # who has tested once will again


@pytest.mark.parametrize("change", ["pyproject.toml", "constraints.txt", "version", "unpinned", "stamp"])
def test_a_change_installs_again(fake, tmp_path, change):
    fake.set_up()
    fake.calls.clear()
    if change == "version":
        fake.version = "3.13"
    elif change == "stamp":
        (tmp_path / ".venv" / "lora-lab.json").write_text("{half a fi")
    elif change != "unpinned":
        with (tmp_path / change).open("a") as file:
            file.write("# more\n")
    fake.set_up(*(["--unpinned"] if change == "unpinned" else []))
    assert len(fake.calls) == 2 and fake.made == 1


def test_unpinned_uses_no_constraints(fake):
    fake.set_up("--unpinned")
    assert fake.calls == [["torch>=2.6"], ["-e", ".[gpt2,lab]"]]


def test_another_torch_index_takes_the_old_build_out(fake, start, monkeypatch):
    removed = []
    fake.set_up()
    monkeypatch.setattr(start.subprocess, "run", lambda command, **more: removed.append(command[3:]))
    fake.set_up("--torch-index", "https://x/cu130")
    assert removed == [["uninstall", "-y", "torch"]]
    assert fake.calls[-2][3:5] == ["--extra-index-url", "https://x/cu130"]
    fake.calls.clear()
    fake.set_up()  # none asked for: the build stays
    fake.set_up("--torch-index", "https://x/cu130")
    assert fake.calls == [] and len(removed) == 1


def test_killed_in_the_middle_resumes(fake, tmp_path):
    def killed(arguments):
        if "-e" in arguments:
            raise KeyboardInterrupt

    fake.pip = killed
    with pytest.raises(KeyboardInterrupt):
        fake.set_up()
    assert not (tmp_path / ".venv" / "lora-lab.json").exists()
    fake.pip = lambda arguments: None
    fake.set_up()
    assert fake.made == 1 and len(fake.calls) == 4


def test_killed_while_adding_to_it_does_not_count_as_complete(fake):
    fake.set_up()
    fake.pip = lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        fake.set_up("test")
    fake.pip = lambda arguments: None
    fake.calls.clear()
    fake.set_up()
    assert len(fake.calls) == 2


def test_what_an_interrupted_set_up_broke_is_replaced_once(fake, start, tmp_path):
    start.ensure_venv(tmp_path / ".venv")  # an environment without a stamp
    fake.import_errors = ["ImportError: half a torch"]
    fake.set_up()
    assert fake.made == 2 and start.read_stamp(tmp_path / ".venv")


def test_a_fresh_environment_that_does_not_import_stops(fake, start, tmp_path):
    fake.import_errors = ["OSError: [WinError 126] c10.dll"] * 3
    with pytest.raises(start.Stop, match=r"c10\.dll.*vc_redist"):
        fake.set_up()
    assert fake.made == 1 and not start.read_stamp(tmp_path / ".venv")


# ---- where PyTorch comes from -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("system", "nvidia", "reachable", "asked", "expected"), [
    ("Linux", False, True, None, ["CPU", None]),
    ("Linux", False, False, None, [None]),
    ("Linux", True, True, None, [None]),
    ("Darwin", False, True, None, [None]),
    ("Windows", False, True, None, [None]),
    ("Linux", False, True, "https://x/cu130", ["https://x/cu130"]),
])
def test_which_index_for_torch(start, monkeypatch, system, nvidia, reachable, asked, expected):
    monkeypatch.setattr(start.platform, "system", lambda: system)
    monkeypatch.setattr(start, "has_nvidia", lambda: nvidia)
    monkeypatch.setattr(start, "answers", lambda url: reachable)
    assert start.torch_indexes(asked) == [start.CPU_INDEX if index == "CPU" else index for index in expected]


def test_a_failing_cpu_index_falls_back(start, fake, monkeypatch, tmp_path):
    monkeypatch.setattr(start, "torch_indexes", lambda asked: [start.CPU_INDEX, None])

    def pip(arguments):
        if start.CPU_INDEX in arguments:
            raise start.Stop("no package index answers")

    fake.pip = pip
    assert start.install_torch(tmp_path / ".venv", False, None) is None
    assert fake.calls[0][3:] == ["--extra-index-url", start.CPU_INDEX, "--timeout", "15", "--retries", "1"]
    assert fake.calls[1] == ["torch==2.13.0", "-c", "constraints.txt"]


def test_no_second_try_on_a_full_disk_or_for_the_index_asked_for(start, fake, monkeypatch, tmp_path):
    def pip(arguments):
        raise start.Stop(start.PROBLEMS[0][1])

    fake.pip = pip
    for indexes in ([start.CPU_INDEX, None], ["https://x"]):
        monkeypatch.setattr(start, "torch_indexes", lambda asked, indexes=indexes: indexes)
        fake.calls.clear()
        with pytest.raises(start.Stop, match="disk is full"):
            start.install_torch(tmp_path / ".venv", False, None)
        assert len(fake.calls) == 1


class Index(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200 if self.path == "/whl/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_asking_an_index(start, monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with http.server.HTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert start.answers(base + "/whl/cpu")
        assert not start.answers(base + "/elsewhere")
        server.shutdown()
    assert not start.answers(base + "/whl/cpu")  # refused
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never says a word
        began = time.monotonic()
        assert not start.answers(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.3)
        assert time.monotonic() - began < 2  # 0.3 s and the 0.5 s of grace, with room for a busy machine
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(30))  # a resolver that hangs
    began = time.monotonic()
    assert not start.answers("http://index.example", seconds=0.1)
    assert time.monotonic() - began < 2


# ---- one set-up at a time -----------------------------------------------------------------------------------------

HOLD = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("start", sys.argv[1])
start = importlib.util.module_from_spec(spec); spec.loader.exec_module(start)
with start.locked(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold(folder, seconds):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(SCRIPT), str(folder), str(seconds)],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_start_waits_for_the_first(start, tmp_path, capsys):
    first = hold(tmp_path, 1.0)
    with start.locked(tmp_path):
        assert first.wait(timeout=10) == 0
    assert "Another start" in capsys.readouterr().out


def test_a_killed_start_leaves_no_lock(start, tmp_path, capsys):
    first = hold(tmp_path, 60)
    first.kill()
    first.wait()
    with start.locked(tmp_path):
        pass
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows passes no descriptors on")
def test_pip_keeps_the_lock_when_start_is_killed(start, tmp_path):
    with start.locked(tmp_path):
        pip = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **start.inherited_lock())
    with (tmp_path / ".lora-lab" / "start.lock").open("a") as file:
        assert not start.try_lock(file.fileno())
        pip.kill()
        pip.wait()
        assert start.try_lock(file.fileno())
    assert start.inherited_lock() == {}


# ---- JupyterLab ---------------------------------------------------------------------------------------------------

def test_ports(start, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(start.Stop, match=f"Port {port} is taken.*--port"):
            start.choose_port(port)
        real = start.is_free
        monkeypatch.setattr(start, "is_free", lambda p: real(p) if p > 8900 else p not in (8888, 8889))
        assert start.choose_port(None) == 8890
    assert start.choose_port(port) == port
    monkeypatch.setattr(start, "is_free", lambda p: False)
    with pytest.raises(start.Stop, match="--port"):
        start.choose_port(None)


@pytest.mark.parametrize(("system", "environment", "expected"), [
    ("Linux", {}, False), ("Linux", {"DISPLAY": ":0"}, True), ("Linux", {"WAYLAND_DISPLAY": "w"}, True),
    ("Darwin", {}, True), ("Darwin", {"SSH_CONNECTION": "1"}, False),
])
def test_display(start, monkeypatch, system, environment, expected):
    monkeypatch.setattr(start.platform, "system", lambda: system)
    monkeypatch.setattr(start, "WINDOWS", False)
    monkeypatch.setattr(os, "environ", environment)
    assert start.has_display() is expected


FAKE_JUPYTER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        right = self.headers["Authorization"] == "token " + os.environ["JUPYTER_TOKEN"]
        self.send_response(200 if right else 403)
        self.end_headers()
    def do_GET(self):
        self.answer()
    def do_POST(self):
        self.answer()
        open(sys.argv[2], "w").write(self.path)
        os._exit(0)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_the_lab_opens_and_stops_cleanly(start, tmp_path, monkeypatch, capsys):
    (tmp_path / ".venv").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / start.FIRST_NOTEBOOK).touch()
    commands, opened, started = [], [], []
    monkeypatch.setattr(start, "jupyter_command", lambda root, port: commands.append(port) or [
        sys.executable, "-c", FAKE_JUPYTER, str(port), str(tmp_path / "said")])
    monkeypatch.setattr(start, "has_display", lambda: True)

    def browser(url):  # the user looks at the page, then presses Ctrl-C
        opened.append(url)
        raise KeyboardInterrupt

    popen = subprocess.Popen
    monkeypatch.setattr(start.webbrowser, "open", browser)
    monkeypatch.setattr(start.subprocess, "Popen", lambda c, **more: started.append(c) or popen(c, **more))
    assert start.open_lab(tmp_path, start.parse([])) == 0
    url = f"http://127.0.0.1:{commands[0]}/lab/tree/notebooks/00_start_here.ipynb?token="
    assert opened[0].startswith(url) and len(opened[0]) == len(url) + 48  # 24 random bytes in hexadecimal
    assert opened[0] in capsys.readouterr().out
    assert opened[0][-48:] not in " ".join(started[0])  # every user of the machine can read command lines
    assert (tmp_path / "said").read_text() == "/api/shutdown"
    assert start.is_free(commands[0])


def test_the_playground_opens_in_the_same_way_with_its_own_page(start, tmp_path, monkeypatch, capsys):
    (tmp_path / ".venv").mkdir()
    opened, started = [], []
    monkeypatch.setattr(start, "jupyter_command", lambda root, port: [
        sys.executable, "-c", FAKE_JUPYTER, str(port), str(tmp_path / "said")])
    monkeypatch.setattr(start, "has_display", lambda: True)
    monkeypatch.setenv("JUPYTER_PATH", "/elsewhere")

    def browser(url):
        opened.append(url)
        raise KeyboardInterrupt

    popen = subprocess.Popen
    monkeypatch.setattr(start.webbrowser, "open", browser)
    monkeypatch.setattr(start.subprocess, "Popen", lambda c, **more: started.append((c, more)) or popen(c, **more))
    assert start.open_lab(tmp_path, start.parse(["playground"])) == 0
    ((command, more),) = started
    port = int(command[3])
    assert opened[0].startswith(f"http://127.0.0.1:{port}/voila/render/{start.PLAYGROUND}?token=")
    output = capsys.readouterr().out
    assert opened[0] in output and "Ctrl-C stops the playground" in output and "Stopping the playground." in output
    assert opened[0][-48:] not in " ".join(command)
    paths = more["env"]["JUPYTER_PATH"].split(os.pathsep)
    assert paths == [str(tmp_path / start.PLAYGROUND_TEMPLATES), "/elsewhere"]
    assert command[-len(start.PLAYGROUND_OPTIONS):] == start.PLAYGROUND_OPTIONS
    assert (tmp_path / "said").read_text() == "/api/shutdown" and start.is_free(port)


def test_the_playground_and_its_template_are_where_start_looks_for_them(start):
    assert (SCRIPT.parent / start.PLAYGROUND).is_file()
    (name,) = [option.partition("=")[2] for option in start.PLAYGROUND_OPTIONS if ".template=" in option]
    assert (SCRIPT.parent / start.PLAYGROUND_TEMPLATES / "voila" / "templates" / name / "index.html.j2").is_file()


def test_a_jupyterlab_that_dies_is_explained(start, tmp_path, monkeypatch):
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(start, "jupyter_command", lambda root, port: [
        sys.executable, "-c", "print('first'); print('OSError: bad configuration'); exit(1)"])
    with pytest.raises(start.Stop, match="OSError: bad configuration"):
        start.open_lab(tmp_path, start.parse(["--no-browser"]))


def test_root_may_run_jupyterlab_and_nobody_else_is_asked_to(start, tmp_path, monkeypatch):
    for uid, allowed in ((0, True), (1000, False)):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid, raising=False)
        assert ("--allow-root" in start.jupyter_command(tmp_path, 1)) is allowed


# ---- subcommands --------------------------------------------------------------------------------------------------

@pytest.fixture
def called(start, monkeypatch):
    """What `main` runs in the environment; it may return a code by the module's name."""
    record, codes = [], {}

    def call(root, *arguments):
        record.append([str(argument) for argument in arguments])
        return codes.get(arguments[-1], 0)

    monkeypatch.setattr(start, "set_up", lambda *arguments: None)
    monkeypatch.setattr(start, "call", call)
    monkeypatch.setattr(start, "open_lab", lambda root, options: record.append(["open"]) or 0)
    return SimpleNamespace(record=record, codes=codes)


def test_test_runs_pytest_and_returns_its_code(start, called, tmp_path, capsys):
    (tmp_path / "tests").mkdir()
    called.codes["-x"] = 5
    assert start.main(["test", "-k", "a", "-x"]) == 5
    assert called.record == [["-m", "pytest", "-n", "2", "--dist", "worksteal", "-k", "a", "-x"]]
    assert capsys.readouterr() == ("", "")  # so that pytest's summary is the last line


def test_open_builds_only_what_is_missing(start, called, tmp_path, capsys):
    sources = tmp_path / "notebooks" / "source"
    sources.mkdir(parents=True)
    (sources / "00_start_here.py").touch()
    assert start.main([]) == 0
    assert called.record == [["-m", "lora_lab", "build"], ["open"]]
    (tmp_path / "notebooks" / "00_start_here.ipynb").touch()  # may hold a student's work
    called.record.clear()
    assert start.main([]) == 0
    assert called.record == [["open"]]
    (sources / "01_rank.py").touch()
    called.codes["build"] = 1
    assert start.main([]) == 1
    assert "could not be built" in capsys.readouterr().err


def test_notebooks_names_those_that_fail(start, called, tmp_path, capsys):
    (tmp_path / "build").mkdir()
    for name in ("00_a", "02_b", "03_c"):
        (tmp_path / "build" / f"{name}.ipynb").touch()
    called.codes[tmp_path / "build" / "02_b.ipynb"] = 1
    assert start.main(["notebooks"]) == 1
    assert [row[2] for row in called.record] == ["build", "run", "run", "run"]
    assert "02_b.ipynb" in capsys.readouterr().err
    called.codes["build"] = 3
    assert start.main(["notebooks"]) == 3


def test_bench_runs_every_script(start, called, tmp_path, capsys):
    (tmp_path / "bench").mkdir()
    assert start.main(["bench"]) == 1 and "no benchmarks" in capsys.readouterr().err
    for name in ("b.py", "a.py", "_shared.py"):
        (tmp_path / "bench" / name).touch()
    assert start.main(["bench", "--fast"]) == 0
    assert called.record == [[str(tmp_path / "bench" / f"{name}.py"), "--fast"] for name in "ab"]


# ---- how much memory a lab takes ----------------------------------------------------------------------------------

KERNEL = """
import subprocess, sys, time
own, child = int(sys.argv[1]), int(sys.argv[2])
held = bytearray(own)
if child:
    code = f"import time; held = bytearray({child}); time.sleep(1)"
    other = subprocess.Popen([sys.executable, "-c", code])
    time.sleep(0.1)
    brief = subprocess.run(["true"])  # for a moment it shares all of this process' memory, and must not count as much again
    other.wait()
time.sleep(0.3)
held = None  # the peak is what counts
time.sleep(0.3)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux has /proc")
def test_memory_of_a_kernel_and_its_children(start, tmp_path):
    """Against sizes that are known: what is measured may differ from them by what Python itself needs, which another run shows."""
    (tmp_path / "ipykernel_launcher.py").write_text(KERNEL)

    def peak(own, child):
        command = f"import subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / 'ipykernel_launcher.py')!r}, '{own}', '{child}'])"
        with subprocess.Popen([sys.executable, "-c", command]) as process:
            return start.watch_memory(process)

    MB = 10**6
    (bare, _), (alone, together), (small, with_child) = peak(0, 1), peak(300 * MB, 1), peak(100 * MB, 200 * MB)
    # A second Python has 5-10 MB of its own, and pages of 4 kB and malloc's first arena move by less than 3 MB.
    assert abs(alone - bare - 300 * MB) < 3 * MB and alone <= together < alone + 20 * MB
    assert abs(small - bare - 100 * MB) < 3 * MB and 200 * MB < with_child - small < 220 * MB


def test_memory_runs_what_is_asked_for_and_names_what_does_not_fit(start, called, tmp_path, capsys, monkeypatch):
    sources = tmp_path / "notebooks" / "source"
    sources.mkdir(parents=True)
    for name in ("02_b", "07_f"):
        (sources / f"{name}.py").touch()
    asked = []

    class Run(SimpleNamespace):
        def __enter__(self):
            return self

        __exit__ = lambda *_: None  # noqa: E731

    def popen(command, **_):
        asked.append(command[-3:])
        return Run(stdout=["it said why\n"], returncode=int("07_f" in command[-3] and "fast=false" in command))

    monkeypatch.setattr(start.subprocess, "Popen", popen)
    monkeypatch.setattr(start, "watch_memory", lambda process: (0.7e9, 1.3e9))
    if not Path("/proc/self/status").exists():
        assert start.main(["memory"]) == 1 and "only Linux" in capsys.readouterr().err
        return
    assert start.main(["memory"]) == 1  # 1.3 GB are too much for lab 02 and not for lab 07
    out, err = capsys.readouterr()
    assert "| 02_b | 0.70 | 1.30 | 1 |" in out and "| 07_f | 0.70 | 1.30 | 2 |" in out and err.strip().endswith(": 02")
    assert [Path(a).stem for a, _, _ in asked] == ["02_b", "07_f"] and {last for *_, last in asked} == {"fast=true"}
    assert start.main(["memory", "07", "--full"]) == 1 and asked[-1][2] == "fast=false"
    assert "07 (failed: it said why)" in capsys.readouterr().err
    assert start.main(["memory", "9"]) == 1 and "there are: 02, 07" in capsys.readouterr().err


def test_playground_builds_no_notebooks_and_opens(start, called, tmp_path):
    sources = tmp_path / "notebooks" / "source"
    sources.mkdir(parents=True)
    (sources / "00_start_here.py").touch()
    assert start.main(["playground"]) == 0
    assert called.record == [["open"]]


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_ctrl_c_lets_pytest_write_its_summary(tmp_path):
    """A child that gets the terminal's Ctrl-C may finish its last words; SIGTERM to start.py alone ends the child too."""
    child = textwrap.dedent("""
        import signal, sys, time
        try:
            print("begun", flush=True)  # inside: the signal may come at once
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.3)
            print("summary", flush=True)
    """)
    parent = textwrap.dedent(f"""
        import importlib.util, pathlib, signal, sys
        spec = importlib.util.spec_from_file_location("start", {str(SCRIPT)!r})
        start = importlib.util.module_from_spec(spec); spec.loader.exec_module(start)
        start.venv_python = lambda venv: sys.executable
        signal.signal(signal.SIGTERM, start.interrupt)
        try:
            start.call(pathlib.Path({str(tmp_path)!r}), "-c", {child!r})
        except KeyboardInterrupt:
            print("parent ends", flush=True)
    """)
    for number, expected in ((signal.SIGINT, ["summary", "parent ends"]), (signal.SIGTERM, ["parent ends"])):
        process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True,
                                   start_new_session=True,
                                   # A shell that starts this in the background has it ignore Ctrl-C, and children inherit that.
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        assert process.stdout.readline() == "begun\n"
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.stdout.read().split("\n")[:-1] == expected  # read to the end: the child is gone as well
        process.wait()


def test_news_popup_is_off(start, tmp_path):
    start.silence_announcements(tmp_path)
    file = tmp_path / "etc" / "jupyter" / "labconfig" / "page_config.json"
    assert json.loads(file.read_text())["disabledExtensions"] == {"@jupyterlab/apputils-extension:announcements": True}
