#!/usr/bin/env python3
"""LoRA Lab in one command. It needs Python 3.11 or newer and nothing else.

    python3 start.py               set up .venv once, then open the lab in JupyterLab
    python3 start.py test          the same set-up, then every test (more arguments go to pytest)
    python3 start.py notebooks     build every notebook and run the instructor copies
    python3 start.py build         build the notebooks from notebooks/source
    python3 start.py playground    the live views on one page, without code, for a lecture
    python3 start.py bench         benchmarks beside peers (more arguments go to them)
    python3 start.py memory        the most memory that each lab takes (04 05: these alone; --full: not the short runs); Linux

The set-up installs the versions pinned in constraints.txt into .venv, in this folder, and writes down what it did;
a second start sees that nothing has changed and takes seconds. After the set-up nothing needs the network.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an older Python reads up to here, so the whole file parses on 3.6
    import shutil

    newer = [name for name in ("python3.13", "python3.12", "python3.11") if shutil.which(name)]
    sys.exit(
        "LoRA Lab needs Python 3.11 or newer, and this is Python %d.%d. %s"  # noqa: UP031
        % (sys.version_info[0], sys.version_info[1],
           "Try: %s start.py" % newer[0] if newer else "Get one from https://www.python.org/downloads/ and run start.py with it.")  # noqa: UP031, E501
    )

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
import tomllib
import urllib.error
import urllib.request
import webbrowser
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FIRST_NOTEBOOK = "notebooks/00_start_here.ipynb"
EXTRAS = {"open": {"lab", "gpt2"}, "build": {"lab", "gpt2"}, "notebooks": {"lab", "gpt2"},
          "playground": {"lab", "lecture"}, "memory": {"lab", "gpt2"},
          "test": {"lab", "gpt2", "cluster", "dev", "lecture", "hub", "keras"}, "bench": {"lab", "gpt2", "dev"}}
PLAYGROUND = "lora_lab/assets/playground.ipynb"
PLAYGROUND_TEMPLATES = "lora_lab/assets/jupyter"
GB = 1e9  # bytes
SMALL_LABS = ("00", "00b", "01", "02", "02b", "03", "04", "05")  # fit a free container of 1 GB; the others take up to 2 GB
# Measured: the environment takes 1.8 GB with PyTorch's CPU build and 7 GB with CUDA; pip unpacks beside it for a while.
NEEDED_CPU, NEEDED_CUDA = 2.5 * GB, 9 * GB  # bytes
# Debian 12's Python brings pip 23.0. When a pin has no build for this Python, it searched for more than five minutes;
# a newer pip names the pin within one.
PIP = "pip>=24.1"
WINDOWS = platform.system() == "Windows"


class Stop(Exception):
    """The start cannot go on; the text is the one sentence that the user reads."""


class BrokenInstallation(Exception):
    """pip is content, but what it installed cannot be imported."""


class Terminated(KeyboardInterrupt):
    """Ended by a signal that our children did not get, unlike Ctrl-C, which the terminal sends to all of us."""


def say(text):
    print(text, flush=True)


# ---- what the user asked ------------------------------------------------------------------------------------------

def parse(argv):
    """Return the options; `rest` holds what pytest or the benchmarks get."""
    parser = argparse.ArgumentParser(prog="start.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="open", choices=list(EXTRAS), metavar="COMMAND",
                        help="open (the default), test, notebooks, build, bench, memory or playground")
    parser.add_argument("--port", type=int, help="port of JupyterLab (default: the first free one from 8888)")
    parser.add_argument("--torch-index", metavar="URL", help="take PyTorch's build from this package index")
    parser.add_argument("--no-browser", action="store_true", help="print the address instead of opening a browser")
    parser.add_argument("--unpinned", action="store_true", default=os.environ.get("LORA_LAB_UNPINNED") == "1",
                        help="ignore constraints.txt and take the newest versions (also LORA_LAB_UNPINNED=1)")
    options, rest = parser.parse_known_args(argv)
    if rest and options.command not in ("test", "bench", "memory"):
        parser.error("unrecognized arguments: " + " ".join(rest))
    if options.port is not None and not 1 <= options.port <= 65535:
        parser.error(f"--port is a number from 1 to 65535, not {options.port}")
    options.rest = rest
    return options


# ---- the environment ----------------------------------------------------------------------------------------------

def venv_python(venv):
    return venv / ("Scripts/python.exe" if WINDOWS else "bin/python")


def child_environment():
    """The environment of every process that we start: the user's, less what would reach into .venv from outside."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH")}
    environment.update(
        PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1",
        JUPYTER_PREFER_ENV_PATH="1",  # a kernel named python3 in the user's home must not win over .venv
        PYTHONUTF8="1",  # the same text files on Windows as elsewhere
    )
    # What `lora-lab bundle` puts beside this file, for a room that shares one address or has no network.
    if (ROOT / "wheels").is_dir():
        environment.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(ROOT / "wheels"))
    for folder, name in (("models", "LORA_LAB_MODELS"), ("datasets", "LORA_LAB_DATA")):
        if (ROOT / folder).is_dir():
            environment.setdefault(name, str(ROOT / folder))
    return environment


def probe_python(python):
    """Return "3.12" for a Python that runs and has pip, "" for one that runs without pip, None for one that does not."""
    code = "import sys, importlib.util as u; print(*sys.version_info[:2], u.find_spec('pip') is not None)"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60,
                              env=child_environment())
        major, minor, has_pip = done.stdout.split()
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if (int(major), int(minor)) < (3, 11):
        return None
    return f"{major}.{minor}" if has_pip == "True" else ""


def remove_venv(venv):
    """Delete a broken environment; a folder that is no environment, or a link, is the user's and stays."""
    parts = {"bin", "lib", "lib64", "include", "share", "etc", "scripts", "pyvenv.cfg"}
    if venv.is_symlink():
        venv.unlink()
        return
    if not venv.is_dir() or not ((venv / "pyvenv.cfg").exists() or {p.name.lower() for p in venv.iterdir()} <= parts):
        raise Stop(f"{venv} is there but is no Python environment: move it away, then run start.py again.")
    try:
        shutil.rmtree(venv)
    except OSError as error:
        raise Stop(f"The broken environment {venv} cannot be deleted ({error.strerror}): close the programs that use "
                   "it (JupyterLab, an editor), delete the folder, and run start.py again.") from None


def make_venv(venv):
    """Create .venv with pip in it, or stop with the reason."""
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        version = "%d.%d" % sys.version_info[:2]  # noqa: UP031
        raise Stop(f"This Python has no {' and no '.join(missing)} module, which makes environments: on Debian and "
                   f"Ubuntu run `sudo apt install python{version}-venv`, elsewhere install Python from "
                   "https://www.python.org/downloads/, then run start.py again.")
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True,
                          env=child_environment())
    if done.returncode:
        raise Stop(explain(done.stdout + done.stderr, done.returncode, "Making the environment"))


def ensure_venv(venv):
    """Make .venv if it is missing, mend it if it has no pip, replace it if its Python does not run.

    Returns the environment's Python version, such as "3.12", and whether it is fresh.
    """
    fresh = False
    if venv.exists() or venv.is_symlink():
        version = probe_python(venv_python(venv))
        if version == "":  # killed before pip was in, or made by a tool that leaves pip out
            subprocess.run([str(venv_python(venv)), "-m", "ensurepip"], capture_output=True, env=child_environment())
            version = probe_python(venv_python(venv))
        if version:
            return version, fresh
        say("The environment in .venv is broken; making a new one.")
        remove_venv(venv)
    make_venv(venv)
    version, fresh = probe_python(venv_python(venv)), True
    if not version:
        raise Stop(f"The new environment {venv} does not run: delete the folder and try another Python "
                   f"(this one is {sys.executable}).")
    return version, fresh


# ---- the stamp: what was installed --------------------------------------------------------------------------------

def fingerprint(root, version, unpinned):
    """A hash of everything that decides what an installation holds, this folder's path included (it is editable)."""
    digest = hashlib.sha256(f"{version} {unpinned} {root}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def read_stamp(venv):
    """What the last complete set-up wrote, or {} if there was none or it cannot be read."""
    try:
        stamp = json.loads((venv / "lora-lab.json").read_text(encoding="utf-8"))
        return stamp if {"key", "extras", "index"} <= stamp.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def write_stamp(venv, stamp):
    temporary = venv / "lora-lab.json.new"
    temporary.write_text(json.dumps(stamp), encoding="utf-8")
    temporary.replace(venv / "lora-lab.json")


def is_current(stamp, key, extras, index):
    """True if nothing needs installing. Fewer extras than recorded are fine; no index asked means: keep the build."""
    return stamp.get("key") == key and extras <= set(stamp["extras"]) and index in (None, stamp["index"])


# ---- pip ----------------------------------------------------------------------------------------------------------

NETWORK = ("The packages cannot be fetched: no package index answers. Check the network (behind a proxy set HTTPS_PROXY, "
           "for a mirror set PIP_INDEX_URL), then run start.py again; it goes on where it stopped.")
PROBLEMS = [  # the first pattern found in pip's output decides: specific causes stand before what they drag along
    (r"No space left on device|not enough space on the disk|Errno 28\b|WinError 112\b|[Qq]uota exceeded|Errno 122\b",
     "The disk is full: free about 3 GB where this folder lies (or set TMPDIR to a folder with space, if it is the "
     "temporary folder that is full), then run start.py again; it goes on where it stopped."),
    (r"Read-only file system|Errno 30\b",
     "This folder is read-only: copy it to a place where you can write, such as your home folder, and run it there."),
    (r"CERTIFICATE_VERIFY_FAILED|certificate verify failed",
     "The package index shows a certificate that this machine does not trust, as in a network that inspects traffic: "
     "ask for its certificate file and set PIP_CERT to it, then run start.py again."),
    (r"407 Proxy|Proxy Authentication Required|ProxyError|Cannot connect to proxy",
     "The proxy refuses or does not answer: check HTTPS_PROXY (http://user:password@host:port), then run start.py again."),
    (r"Long Path support",
     "Windows refuses paths this long: move this folder to a short one such as C:\\lab and run start.py there."),
    (r"NewConnectionError|NameResolutionError|name resolution|Name or service not known|getaddrinfo failed|"
     r"ConnectTimeout|Read timed out|ReadTimeout|Network is unreachable|Connection refused|Connection aborted|"
     r"ConnectionResetError|Max retries exceeded|Could not fetch URL|IncompleteRead|nodename nor servname", NETWORK),
    (r"No matching distribution found for torch\b",
     "There is no build of PyTorch {torch} for {machine}: use a 64-bit Python 3.11 to 3.13, "
     "or work in the browser with the Binder or Colab links in the README."),
    (r"WinError 5\b|WinError 32\b|Access is denied|being used by another process",
     "Another program is using the environment: close JupyterLab and editors that run in this folder, then run "
     "start.py again."),
    (r"Permission denied|Errno 13\b|Operation not permitted",
     "Some file in this folder may not be written: copy the folder to your home folder (or, if root made .venv, delete "
     "it as root), then run start.py again."),
    (r"ensurepip is not available|No module named ensurepip",
     "This Python cannot make environments: on Debian and Ubuntu run `sudo apt install python3-venv`, then start.py "
     "again."),
    (r"ResolutionImpossible|conflicting dependencies",
     "The packages do not fit together on {machine}{pins}: use the newest release of Python 3.12 or 3.13; if that does "
     "not help and you did not say --unpinned, open an issue with this line."),
]


def explain(output, code, doing):
    """Turn the output of a failed pip or venv into one sentence that says what to do."""
    for pattern, sentence in PROBLEMS:
        if re.search(pattern, output):
            pins = sorted(set(re.findall(r"The user requested \(constraint\) (\S+)", output)))
            return sentence.format(
                torch=torch_pin(ROOT), machine=f"{platform.system()} {platform.machine()}, Python "
                f"{platform.python_version()}", pins=f" ({', '.join(pins)} cannot be had)" if pins else "")
    if code in (-9, 137):
        return (f"{doing} was killed by the system, most likely for lack of memory (it needs about 1 GB): close other "
                "programs or use a larger container, then run start.py again.")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines or ["no message"]
    return f"{doing} failed: {errors[-1][:300]}"


def run_pip(venv, arguments, doing):
    """Run pip in the environment: the whole output goes to a log, one changing line to a terminal."""
    log = venv / "install.log"
    command = [str(venv_python(venv)), "-m", "pip", "install", *arguments]
    lines, started = [], time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   encoding="utf-8", errors="replace", cwd=ROOT, env=child_environment(),
                                   **inherited_lock())
        try:
            for line in process.stdout:
                file.write(line)
                lines.append(line)
                if sys.stdout.isatty():
                    width = shutil.get_terminal_size().columns - 1
                    text = f"  {time.monotonic() - started:4.0f} s  {line.strip()}"
                    print("\r" + text[:width].ljust(width), end="", flush=True)
            code = process.wait()
        except BaseException:  # Ctrl-C reaches pip as well: let it clean up, so that nothing runs on behind our back
            process.terminate()
            process.wait()
            raise
    if sys.stdout.isatty():
        print("\r".ljust(shutil.get_terminal_size().columns), end="\r", flush=True)
    if code:
        raise Stop(explain("".join(lines), code, doing) + f" (All of pip's output: {log})")


def torch_pin(root):
    """The version of PyTorch that constraints.txt pins."""
    return re.search(r"^torch==(\S+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]


def torch_requirement(root, unpinned):
    if not unpinned:
        return "torch==" + torch_pin(root)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(line for line in project["dependencies"] if re.match(r"torch\b", line))


def has_nvidia():
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def answers(url, seconds=3.0):
    """True if the package index at `url` answers within `seconds`. Proxies from the environment are used."""
    found = []

    def ask():
        try:
            with urllib.request.urlopen(urllib.request.Request(url + "/torch/", method="HEAD"), timeout=seconds):
                found.append(True)
        except (OSError, ValueError):  # URLError and time-outs are OSErrors
            pass

    thread = threading.Thread(target=ask, daemon=True)  # a thread, because the time-out does not bound name resolution
    thread.start()
    thread.join(seconds + 0.5)
    return bool(found)


def torch_indexes(asked):
    """The extra package indexes to try for PyTorch, in order; None stands for pip's own configuration alone."""
    if asked is not None:
        return [asked]  # no second choice: the user wants this build
    if (ROOT / "wheels").is_dir():
        return [None]  # the bundle's own
    if platform.system() == "Linux" and not has_nvidia():  # the default Linux build brings gigabytes of CUDA
        if answers(CPU_INDEX):
            return [CPU_INDEX, None]
        say("  PyTorch's own CPU index does not answer; taking PyTorch from pip's index, which may be a larger download.")
    return [None]


def install_torch(venv, unpinned, asked):
    """Install PyTorch first, so that what follows keeps this build. Returns the index that had it."""
    requirement = torch_requirement(ROOT, unpinned)
    pins = [] if unpinned else ["-c", "constraints.txt"]
    indexes = torch_indexes(asked)
    for index in indexes:
        # An extra index, not the only one: a build with a local tag (2.13.0+cpu) wins over 2.13.0, and what torch needs
        # still comes from the user's index, in the pinned versions.
        extra = ["--extra-index-url", index, "--timeout", "15", "--retries", "1"] if index else []
        try:
            run_pip(venv, [requirement, *pins, *extra], "Installing PyTorch")
            return index
        except Stop as problem:
            if index == indexes[-1] or "disk is full" in str(problem):
                raise
            say("  PyTorch's CPU index failed; trying pip's own index.")
    return None


def works(venv):
    """Return "" if what we installed can be imported, else the last line of the error."""
    done = subprocess.run([str(venv_python(venv)), "-P", "-c", "import torch, lora_lab, jupyterlab, ipykernel, ipywidgets"],
                          capture_output=True, text=True, env=child_environment())
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


# ---- one set-up at a time -----------------------------------------------------------------------------------------

_lock_descriptor = None  # of the lock file, while we hold it


def inherited_lock():
    """Popen arguments that let a child share the lock: if start.py is killed, pip still keeps others out."""
    return {"pass_fds": (_lock_descriptor,)} if _lock_descriptor is not None and not WINDOWS else {}


def try_lock(descriptor):
    """Take the lock on an open file; False if another process has it. The system drops it when its holders end."""
    try:
        if WINDOWS:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks (some network drives): go on without, as there is no way to wait
    return True


@contextmanager
def locked(root):
    """Hold the folder's lock, waiting for another start that sets it up."""
    global _lock_descriptor
    try:
        (root / ".lora-lab").mkdir(exist_ok=True)
        file = (root / ".lora-lab" / "start.lock").open("a")
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise Stop(PROBLEMS[0][1]) from None
        raise Stop(f"The folder {root} cannot be written ({error.strerror}): copy it to a place where you can write, "
                   "such as your home folder, and run start.py there.") from None
    with file:
        waited = False
        while not try_lock(file.fileno()):
            if not waited:
                say("Another start is setting up this folder; waiting for it to finish (Ctrl-C gives up).")
            waited = True
            time.sleep(0.3)
        _lock_descriptor = file.fileno()
        try:
            yield
        finally:
            _lock_descriptor = None


# ---- set-up -------------------------------------------------------------------------------------------------------

def check_room(root):
    """Stop before the first installation if it cannot fit."""
    needed = NEEDED_CUDA if platform.system() == "Linux" and has_nvidia() else NEEDED_CPU
    free = shutil.disk_usage(root).free
    if free < needed:
        raise Stop(f"The disk is too full: the set-up needs {needed / GB:.1f} GB in {root}, and {free / GB:.1f} GB are "
                   "free. Free some space or move this folder to another disk, then run start.py again.")


def set_up(root, options):
    """Bring .venv to what this command needs. Does nothing, quickly, if it is there already."""
    venv, extras = root / ".venv", EXTRAS[options.command]
    if sys.maxsize < 2**32:
        raise Stop("This is a 32-bit Python, and PyTorch needs a 64-bit one: get it from "
                   "https://www.python.org/downloads/ and run start.py with it.")
    if not (venv.exists() or venv.is_symlink()):
        check_room(root)
    for last_try in (False, True):
        version, fresh = ensure_venv(venv)
        stamp = read_stamp(venv)
        key = fingerprint(root, version, options.unpinned)
        if is_current(stamp, key, extras, options.torch_index):
            return
        try:
            install(root, venv, stamp, key, extras, options)
            return
        except BrokenInstallation as problem:
            if fresh or last_try:  # not the remains of an interrupted set-up
                raise Stop(f"The packages are installed but do not work: {problem}. On Windows install "
                           "https://aka.ms/vs/17/release/vc_redist.x64.exe, elsewhere delete .venv; then run start.py "
                           "again.") from None
            say("An earlier set-up left broken packages; starting over with a new .venv.")
            remove_venv(venv)


def install(root, venv, stamp, key, extras, options):
    """Install PyTorch, then the rest, prove that it imports, and only then write the stamp."""
    say("Setting up LoRA Lab in .venv. This takes a few minutes and happens once.")
    started = time.monotonic()
    extras = extras | set(stamp.get("extras", ()))
    (venv / "lora-lab.json").unlink(missing_ok=True)  # from here on the environment is in between
    if options.torch_index and stamp and options.torch_index != stamp["index"]:  # another build of the same version
        subprocess.run([str(venv_python(venv)), "-m", "pip", "uninstall", "-y", "torch"], capture_output=True,
                       env=child_environment())
    say("1 of 2: PyTorch")
    run_pip(venv, [PIP], "Installing pip")
    index = install_torch(venv, options.unpinned, options.torch_index)
    say("2 of 2: JupyterLab and the other packages")
    pins = [] if options.unpinned else ["-c", "constraints.txt"]
    more = ["--extra-index-url", options.torch_index] if options.torch_index else []
    run_pip(venv, ["-e", f".[{','.join(sorted(extras))}]", *pins, *more], "Installing the packages")
    error = works(venv)
    if error:
        raise BrokenInstallation(error)
    silence_announcements(venv)
    write_stamp(venv, {"key": key, "extras": sorted(extras), "index": options.torch_index or index})
    say(f"Ready after {time.monotonic() - started:.0f} s.")


def silence_announcements(venv):
    """Turn off JupyterLab's news pop-up: it would cover the first notebook and ask the network."""
    config = venv / "etc" / "jupyter" / "labconfig" / "page_config.json"
    if not config.exists():
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))


# ---- what happens in the environment ------------------------------------------------------------------------------

def call(root, *arguments):
    """Run the environment's Python in this folder, showing its output; return its exit code."""
    process = subprocess.Popen([str(venv_python(root / ".venv")), *map(str, arguments)], cwd=root,
                               env=child_environment())
    try:
        return process.wait()
    except KeyboardInterrupt as interruption:
        if not isinstance(interruption, Terminated):
            try:
                process.wait(timeout=10)  # Ctrl-C reached it too: pytest now writes its summary
            except subprocess.TimeoutExpired:
                pass
        process.terminate()  # does nothing to a process that has ended
        process.wait()
        raise


def missing_notebooks(root):
    """Sources without a student notebook. Notebooks that are there may hold a student's work: they are left alone."""
    sources = sorted((root / "notebooks" / "source").glob("*.py"))
    return [source for source in sources if not (root / "notebooks" / f"{source.stem}.ipynb").exists()]


def is_free(port):
    with socket.socket() as server:
        if not WINDOWS:  # as Jupyter's own server does, so that a port just given back counts as free
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def choose_port(asked):
    """The port asked for, or the first free one from 8888."""
    if asked is not None:
        if not is_free(asked):
            raise Stop(f"Port {asked} is taken (or not allowed): close the program that uses it, or run start.py with "
                       f"another one, such as --port {asked + 1 if 1024 <= asked < 65535 else 8890}.")
        return asked
    for port in range(8888, 8938):
        if is_free(port):
            return port
    raise Stop("The ports 8888 to 8937 are all taken: name a free one with --port.")


def has_display():
    """True if a browser window can open here."""
    if WINDOWS or platform.system() == "Darwin":
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def ask_server(port, token, path, method="GET"):
    """Send a request to our own JupyterLab, past any proxy; True if it says yes."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method,
                                     headers={"Authorization": f"token {token}"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=2):
            return True
    except (OSError, ValueError):
        return False


def jupyter_command(root, port):
    command = [str(venv_python(root / ".venv")), "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}", "--log-level=WARN"]
    if getattr(os, "geteuid", lambda: 1)() == 0:
        command.append("--allow-root")
    return command


# The page needs widgets and nothing else: other extensions of JupyterLab would be fetched, started, and fail outside of it.
PLAYGROUND_OPTIONS = ["--VoilaConfiguration.template=lora_lab", "--VoilaConfiguration.extension_allowlist="
                      "['@jupyter-widgets/jupyterlab-manager', '@voila-dashboards/widgets-manager8']",
                      # Each page has a kernel of its own, and Voilà's goodbye to it is refused by the server (it lacks the
                      # token against forged requests): end those without a page, or every reload would keep 0.5 GB.
                      "--MappingKernelManager.cull_idle_timeout=60", "--MappingKernelManager.cull_interval=15"]


def open_lab(root, options, patience=60.0):
    """Start JupyterLab, say where the lab or the playground is, and stay until Ctrl-C. Returns the exit code."""
    port, token = choose_port(options.port), secrets.token_hex(24)
    lecture = options.command == "playground"
    place = f"lab/tree/{FIRST_NOTEBOOK}" if (root / FIRST_NOTEBOOK).exists() else "lab"
    url = f"http://127.0.0.1:{port}/{'voila/render/' + PLAYGROUND if lecture else place}?token={token}"
    command, environment = jupyter_command(root, port), child_environment() | {"JUPYTER_TOKEN": token}
    if lecture:
        command += PLAYGROUND_OPTIONS
        environment["JUPYTER_PATH"] = os.pathsep.join(
            filter(None, [str(root / PLAYGROUND_TEMPLATES), os.environ.get("JUPYTER_PATH")]))
    log = root / ".venv" / "jupyter.log"
    # The token goes through the environment, because a command line can be read by every user of the machine.
    # A session of its own keeps Ctrl-C from JupyterLab, which would ask whether we are sure: we tell it to shut down.
    apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if WINDOWS else {"start_new_session": True}
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                  env=environment, **apart)
    try:
        deadline = time.monotonic() + patience
        while not ask_server(port, token, "/api/status"):
            if server.poll() is not None or time.monotonic() > deadline:
                lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
                raise Stop(f"JupyterLab did not start: {(lines or ['it said nothing'])[-1].strip()[:300]} "
                           f"(All of its output: {log})")
            time.sleep(0.1)
        if lecture:
            say(f"\nThe playground is running. Its address (in a dark hall, with &theme=dark at its end):\n\n    {url}\n\n"
                "The page takes some seconds to come. Keep this window open; Ctrl-C stops the playground.")
        else:
            say(f"\nLoRA Lab is running. Its address:\n\n    {url}\n\nKeep this window open; Ctrl-C stops the lab.")
        if not options.no_browser and has_display() and not webbrowser.open(url):
            say("No browser could be opened: copy the address into one.")
        code = server.wait()
        if code:
            raise Stop(f"JupyterLab ended by itself with exit code {code}. (Its output: {log})")
        return 0  # shut down from its own menu
    except KeyboardInterrupt:
        say("\nStopping the playground." if lecture else "\nStopping the lab. Your notebooks stay as they were last saved.")
        return 0
    finally:
        stop_server(server, port, token)


def stop_server(server, port, token):
    """Shut JupyterLab and its kernels down: politely, then less so."""
    if server.poll() is not None:
        return
    ask_server(port, token, "/api/shutdown", "POST")
    for end in (lambda: None, server.terminate, server.kill):
        end()
        try:
            server.wait(timeout=5)
            return
        except subprocess.TimeoutExpired:
            pass


def run_notebooks(root):
    """Build everything and run the instructor copies, one after the other."""
    code = call(root, "-m", "lora_lab", "build")
    if code:
        return code
    failed = [path.name for path in sorted((root / "build").glob("*.ipynb"))
              if call(root, "-m", "lora_lab", "run", path)]
    if failed:
        raise Stop("These notebooks did not run to their end: " + ", ".join(failed))
    return 0


# ---- how much memory a lab takes ----------------------------------------------------------------------------------

def proc_table():
    """pid -> (parent's pid, age in seconds, command line) of everything that runs; Linux."""
    table, ticks = {}, os.sysconf("SC_CLK_TCK")
    up = float(Path("/proc/uptime").read_text().split()[0])
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                table[int(entry.name)] = int(fields[1]), up - int(fields[19]) / ticks, (entry / "cmdline").read_bytes()
            except (OSError, ValueError, IndexError):  # it has just ended
                continue
    return table


def descendants(pid, table):
    found = [child for child, (parent, _, _) in table.items() if parent == pid]
    return found + [below for child in found for below in descendants(child, table)]


def memory_of(pid):
    """Bytes of a process, by kind: RssAnon, RssFile, RssShmem, and VmHWM, the most that it ever had in all; {} if it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {name: int(value) * 1024 for name, value in re.findall(r"^(RssAnon|RssFile|RssShmem|VmHWM):\s+(\d+) kB", text, re.MULTILINE)}


def watch_memory(process, every=0.1):
    """The most memory, in bytes, that the kernels below `process` took until it ended: (kernel alone, with everything it started).

    Alone it is what the system counted (VmHWM). Together it is looked at every `every` seconds: what each process has of its own, and once
    what they map from files (libraries). Not counted are papermill, which runs notebooks here, and JupyterLab, which does so for people.
    """
    alone = together = 0
    while process.poll() is None:
        table = proc_table()
        for kernel in descendants(process.pid, table):
            if b"ipykernel_launcher" not in table[kernel][2] or table[kernel][1] < 0.1:
                continue
            # A child that is being started shares its parent's memory for some milliseconds, and would count as much again.
            family = [kernel, *(pid for pid in descendants(kernel, table) if table[pid][1] >= 0.1)]
            counts = [found for found in map(memory_of, family) if found]
            if counts:
                own = sum(found.get("RssAnon", 0) + found.get("RssShmem", 0) for found in counts)
                together = max(together, own + max(found.get("RssFile", 0) for found in counts))
            alone = max(alone, memory_of(kernel).get("VmHWM", 0))
        time.sleep(every)
    return alone, max(alone, together)


def run_memory(root, rest):
    """Run labs and print the most memory that each one took, as a table; 1 if one does not fit, or fails."""
    if not Path("/proc/self/status").exists():
        raise Stop("How much memory a lab takes is read from /proc, which only Linux has.")
    full, wanted = "--full" in rest, [word for word in rest if word != "--full"]
    labs = sorted((root / "notebooks" / "source").glob("[0-9]*.py")) or sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    names = {lab.stem.partition("_")[0]: lab for lab in labs}
    unknown = [word for word in wanted if word not in names]
    if unknown:
        raise Stop(f"There is no lab {', '.join(unknown)}; there are: {', '.join(names)}. (--full for the whole runs)")
    say(f"| lab, {'full' if full else 'fast'} | kernel, GB | with what it starts, GB | may take, GB | seconds |\n|---|---:|---:|---:|---:|")
    too_much = []
    for name in wanted or names:
        began, most = time.monotonic(), (1.0 if name in SMALL_LABS else 2.0) * GB
        command = [str(venv_python(root / ".venv")), "-m", "lora_lab", "run", str(names[name]), "-p", f"fast={'false' if full else 'true'}"]
        with subprocess.Popen(command, cwd=root, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            said = []
            reader = threading.Thread(target=lambda lines=said, out=process.stdout: lines.extend(out))  # a full pipe would stop the run
            reader.start()
            alone, together = watch_memory(process)
            reader.join()
        failed = process.returncode != 0
        say(f"| {names[name].stem} | {alone / GB:.2f} | {together / GB:.2f} | {most / GB:g} | {time.monotonic() - began:.0f} |")
        if failed or together > most:
            too_much.append(name + (f" (failed: {''.join(said).strip()[-300:]})" if failed else ""))
    if too_much:
        raise Stop(f"Too much memory, or not run to the end: {', '.join(too_much)}")
    return 0


def run_bench(root, rest):
    scripts = [path for path in sorted((root / "bench").glob("*.py")) if not path.name.startswith("_")]
    if not scripts:
        raise Stop(f"There are no benchmarks in {root / 'bench'}.")
    return max(call(root, path, *rest) for path in scripts)


def main(argv=None):
    """Do what was asked and return the exit code; a problem that we know is one sentence on stderr."""
    options = parse(argv)
    try:
        with locked(ROOT):
            set_up(ROOT, options)
            if options.command == "open" and missing_notebooks(ROOT):
                code = call(ROOT, "-m", "lora_lab", "build")
                if code:
                    raise Stop("The notebooks could not be built; the lines above say why.")
        if options.command == "test":
            if not (ROOT / "tests").is_dir():
                raise Stop("There are no tests in a students' copy; `lora-lab doctor` in .venv says whether this machine is ready.")
            return call(ROOT, "-m", "pytest", "-n", "2", "--dist", "worksteal", *options.rest)
        if options.command == "build":
            return call(ROOT, "-m", "lora_lab", "build")
        if options.command == "notebooks":
            return run_notebooks(ROOT)
        if options.command == "bench":
            return run_bench(ROOT, options.rest)
        if options.command == "memory":
            return run_memory(ROOT, options.rest)
        return open_lab(ROOT, options)
    except Stop as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    except OSError as error:  # our own reading and writing, between the steps
        print(f"\n{explain(str(error), 1, 'The start')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run start.py again: it goes on where it stopped.", file=sys.stderr)
        return 130


def interrupt(signum, frame):
    raise Terminated


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # `docker stop` and a closed terminal end JupyterLab as Ctrl-C does
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console of another code page must not end the start
    sys.exit(main())
