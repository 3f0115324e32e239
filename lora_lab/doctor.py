"""Is this machine ready for the lab? One line per question, and for each that fails, what to do.

Used by `lora-lab doctor` and by lab 00. It imports nothing but the standard library until it looks, and an examination
that breaks becomes a line too, because the machines it is for are those where something is broken.
`python lora_lab/doctor.py` works even where `import lora_lab` does not.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

GB = 1e9  # bytes
MEMORY = 1.0 * GB  # bytes: the most that labs 00-05 use at their peak
DISK = 0.5 * GB  # bytes: saved adapters, notebooks, records, with room to spare
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
# What a rented notebook (Colab) has of its own, built for its driver and its page, and what only runs notebooks elsewhere.
HOSTS_OWN = ("torch", "ipywidgets", "ipykernel", "jupyterlab", "jupytext", "papermill")


@dataclass(frozen=True)
class Line:
    """One question and its answer. ok: True, False (mend it before you start), None (good to know, nothing fails)."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def check_python() -> Line:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Line("Python", sys.version_info >= (3, 11), found, "Install Python 3.11 or newer and run start.py with it.")


def check_torch() -> Line:
    try:
        import torch
    except Exception as error:  # a missing DLL is an OSError, half an installation an AttributeError or anything else
        advice = "Run `python3 start.py`: it repairs the environment."
        if platform.system() == "Windows" and isinstance(error, OSError):
            advice = "Install https://aka.ms/vs/17/release/vc_redist.x64.exe, then restart the kernel."
        return Line("PyTorch", False, f"import torch: {_reason(error)}", advice)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"
    works = (torch.ones(2, 3) @ torch.ones(3, 2)).tolist() == [[3.0, 3.0], [3.0, 3.0]]
    found = f"{torch.__version__} ({build} build)" + ("" if works else ", but it multiplies wrongly")
    return Line("PyTorch", works, found, "Delete the folder .venv and run `python3 start.py`.")


def check_device() -> Line:
    try:
        import torch
    except Exception:
        return Line("Device", None, "unknown while PyTorch does not work")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / GB
        # torch.cuda.is_bf16_supported() is also true where bf16 is emulated, slowly: hardware has it from 8.0 on
        precision = "bf16" if (major, minor) >= (8, 0) else "no bf16 in hardware, float32 is used"
        return Line("Device", True, f"cuda: {torch.cuda.get_device_name()}, {memory:.0f} GB, {precision}")
    if torch.backends.mps.is_available():
        return Line("Device", True, "mps: Apple GPU")
    if shutil.which("nvidia-smi"):
        return Line("Device", None, "cpu, although an NVIDIA driver is here",
                    "Every lab runs on the CPU. For the GPU take the index URL from https://pytorch.org/get-started and "
                    "run `python3 start.py --torch-index URL`.")
    return Line("Device", True, "cpu: every lab gives its true result on it")


def check_cores(root: Path = Path("/")) -> Line:
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    quota = cpu_quota(root)
    if quota is not None and quota < cores:
        found = f"{quota:g} of {cores} (this container's share)"
        return Line("CPU cores", True if quota >= 1 else None, found, "Runs take longer than the labs say.")
    return Line("CPU cores", True, str(cores))


def check_memory(root: Path = Path("/")) -> Line:
    """What this process may come to use: its own memory and what is free, inside the container's limit."""
    try:
        import psutil
    except ImportError:
        return Line("Memory", None, "unknown without psutil", "Run `python3 start.py`: it installs what is missing.")
    system = psutil.virtual_memory()
    total, free, where = system.total, system.available, ""
    limit = memory_limit(root)
    if limit is not None and limit[0] < total:
        total, free, where = limit[0], min(free, max(0, limit[0] - limit[1])), " (this container's limit)"
    reach = free + psutil.Process().memory_info().rss
    found = f"{free / GB:.1f} GB free of {total / GB:.1f} GB{where}"
    advice = (f"The labs need up to {MEMORY / GB:.0f} GB: shut down other kernels (Kernel > Shut Down All Kernels), close "
              "other programs, or ask for a container with 2 GB.")
    return Line("Memory", reach >= MEMORY, found, advice)


def check_disk(folder: Path) -> Line:
    free = shutil.disk_usage(folder).free
    return Line("Disk", free >= DISK, f"{free / GB:.1f} GB free here",
                f"Free at least {DISK / GB:.1f} GB: notebooks and adapters are saved here.")


def check_widgets() -> Line:
    advice = "Run `python3 start.py`, or `pip install 'lora-lab[lab]'`; then restart JupyterLab and reload the page."
    try:
        import ipywidgets
    except Exception as error:
        return Line("Sliders", False, f"import ipywidgets: {_reason(error)}", advice)
    found = f"ipywidgets {ipywidgets.__version__}"
    try:
        found += f", jupyterlab_widgets {version('jupyterlab_widgets')}"
    except PackageNotFoundError:
        return Line("Sliders", False, found + ", but no jupyterlab_widgets: JupyterLab cannot draw them", advice)
    wrong = _unmet("ipywidgets", "jupyterlab_widgets")
    old = int(ipywidgets.__version__.split(".")[0]) < 8
    if old and "google.colab" in sys.modules:
        return Line("Sliders", True, f"{found}: Colab's own, which belongs to its page")
    if wrong or old:
        return Line("Sliders", False, found + (f", which needs {wrong}" if wrong else ", which is too old"), advice)
    return Line("Sliders", True, found)


def check_write(folder: Path) -> Line:
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".lora-lab-"):
            pass
    except OSError as error:
        return Line("Saving", False, f"{folder.resolve()} cannot be written: {error.strerror or error}",
                    "Copy the folder to a place where you may write, such as your home folder, and work there.")
    return Line("Saving", True, f"{folder.resolve()} can be written")


def check_network() -> Line:
    return Line("Network", None, "not needed: data and models are here, and nothing leaves this machine")


def check_versions(constraints: Path = CONSTRAINTS) -> Line:
    """Compare the installed versions with the pinned ones; packages that are not installed do not count."""
    try:
        pins = re.findall(r"^([\w.-]+)==(\S+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return Line("Versions", None, "no constraints.txt beside the package to compare with")
    other = []
    for name, pinned in pins:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if installed.split("+")[0] != pinned:  # torch 2.13.0+cpu and 2.13.0 are one version in two builds
            other.append(f"{name} {installed} (pinned: {pinned})")
    if not other:
        return Line("Versions", True, "as pinned in constraints.txt")
    shown = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
    return Line("Versions", None, shown, "Fine on Colab; figures may differ a little from the ones in the text. "
                "`python3 start.py` gives the pinned versions.")


def diagnose_machine(folder: str | os.PathLike = ".") -> list[Line]:
    """Examine this machine; `folder` is where notebooks and adapters are saved. Raises nothing."""
    place = Path(folder)
    examinations: list[tuple[str, Callable[[], Line]]] = [
        ("Python", check_python), ("PyTorch", check_torch), ("Device", check_device), ("CPU cores", check_cores),
        ("Memory", check_memory), ("Disk", lambda: check_disk(place)), ("Sliders", check_widgets),
        ("Saving", lambda: check_write(place)), ("Versions", check_versions), ("Network", check_network),
    ]
    lines = []
    for name, examine in examinations:
        try:
            lines.append(examine())
        except Exception as error:
            lines.append(Line(name, None, f"could not be examined: {_reason(error)}",
                              "If a lab fails, add this line to your report."))
    return lines


# ---- Colab --------------------------------------------------------------------------------------------------------

def missing_packages(lines: list[str] | None = None, extras: tuple[str, ...] = ("lab", "gpt2")) -> list[str]:
    """What a notebook needs and this Python lacks, or has too old, as pip is told it: ["peft>=0.21", "sacrebleu"].

    lines: requirements as in a package's metadata, by default those of the installed lora-lab. HOSTS_OWN never counts as missing.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = []
    for line in requires("lora-lab") if lines is None else lines:
        needed = Requirement(line)
        if canonicalize_name(needed.name) in HOSTS_OWN:
            continue
        if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        try:
            if needed.specifier.contains(version(needed.name), prereleases=True):
                continue
        except PackageNotFoundError:
            pass
        found.append(f"{needed.name}{needed.specifier}")
    return found


def add_missing() -> None:
    """Install into a rented notebook what it lacks, and nothing in place of what it has: PyTorch, ipywidgets and their like are pinned.

    Raises RuntimeError with pip's last line where it cannot be had. A second call finds nothing to do.
    """
    wanted = missing_packages()
    if not wanted:
        return
    pins = []
    for name in HOSTS_OWN:
        try:
            pins.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "host.txt"
        constraints.write_text("\n".join(pins), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints), *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"the lab lacks {', '.join(wanted)}, and pip could not add them: {said[-1]}. Runtime > Restart, then run this cell again")
    print(f"added: {', '.join(wanted)}")


# ---- containers ---------------------------------------------------------------------------------------------------

def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The folders that limit this process, its own and those above it: cgroup v2 first, then v1."""
    try:
        rows = [row.split(":", 2) for row in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    folders = []
    for number, controllers, path in rows:
        if number == "0" and not controllers:
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        own = base / path.lstrip("/")  # inside a container this path may be the host's; then only `base` exists
        folders += [folder for folder in (own, *own.parents) if folder == base or base in folder.parents]
    return folders


def memory_limit(root: Path = Path("/")) -> tuple[int, int] | None:
    """The tightest container limit as (limit, used) in bytes, None without one. File cache does not count as used."""
    found = []
    for folder in _cgroup_folders(root, "memory"):
        for limit_file, used_file, cache in (("memory.max", "memory.current", "inactive_file"),
                                             ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")):
            try:
                limit, used = int((folder / limit_file).read_text()), int((folder / used_file).read_text())
                statistics = (folder / "memory.stat").read_text()
            except (OSError, ValueError):  # not there, or "max"
                continue
            match = re.search(rf"^{cache} (\d+)$", statistics, re.MULTILINE)
            if limit < 2**60:  # v1 writes a number near 2^63 for "no limit"
                found.append((limit, max(0, used - int(match[1] if match else 0))))
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many cores' worth of time the container may use, None without a limit."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            try:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text()
            except OSError:
                continue
        if quota not in ("max", "-1"):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


# ---- words --------------------------------------------------------------------------------------------------------

def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _unmet(package: str, needed: str) -> str:
    """What `package` says it needs of `needed`, if the installed version is not that; "" if it is, or if unknown."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ""
    for text in requires(package) or []:
        requirement = Requirement(text)
        if requirement.name.replace("-", "_") == needed and not requirement.specifier.contains(version(needed)):
            return str(requirement)
    return ""


# State -> icon, word, accent. Word and icon carry the meaning; white on each accent has a contrast of at least 4.5.
STATES = {True: ("✓", "ok", "#00705a"), False: ("✗", "mend", "#a8480a"), None: ("i", "note", "#5b6570")}


def verdict(lines: list[Line]) -> str:
    """One sentence over all lines."""
    bad = [line.name for line in lines if line.ok is False]
    return f"To mend before you start: {', '.join(bad)}" if bad else "This machine is ready"


def render(lines: list[Line]) -> str:
    """Plain text: one line per question, and below each one that is not ok what to do."""
    width = max((len(line.name) for line in lines), default=0)
    rows = []
    for line in lines:
        icon, word, _ = STATES[line.ok]
        rows.append(f"{icon} {word:<4}  {line.name:<{width}}  {line.found}")
        if line.ok is not True and line.advice:
            rows.append(f"{'':<{width + 10}}-> {line.advice}")
    return "\n".join([*rows, "", verdict(lines) + "."])


def render_html(lines: list[Line]) -> str:
    """The same for a notebook: a table with inline styles, in the page's own colours, light or dark."""
    ready = all(line.ok is not False for line in lines)
    font = "var(--jp-content-font-family, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif)"
    ink = "var(--jp-content-font-color1, var(--vscode-foreground, inherit))"
    cell = "padding:3px 10px 3px 0;border:0;text-align:left;vertical-align:top;background:transparent"
    rows = []
    for line in lines:
        icon, word, accent = STATES[line.ok]
        weight = 600 if line.ok is False else 400
        advice = ""
        if line.ok is not True and line.advice:
            advice = f'<div style="font-weight:{weight}">{_code(line.advice)}</div>'
        rows.append(
            f'<tr style="background:transparent"><td style="{cell};white-space:nowrap">{_badge(icon, accent)} {word}</td>'
            f'<th scope="row" style="{cell};font-weight:600;white-space:nowrap">{escape(line.name)}</th>'
            f'<td style="{cell};overflow-wrap:anywhere">{escape(line.found)}{advice}</td></tr>'
        )
    icon, _, accent = STATES[True if ready else False]
    return (
        f'<div style="font-family:{font};color:{ink};font-size:14px;line-height:1.5;max-width:52em;margin:6px 0;'
        f'padding:10px 14px;border-left:4px solid {accent};border-radius:3px;background:rgba(128,138,150,.10)">'
        f'<div style="font-weight:600;margin-bottom:4px">{_badge(icon, accent)} {escape(verdict(lines))}</div>'
        f'<table style="border-collapse:collapse;border:0;margin:0;font-size:inherit;color:inherit">'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _badge(icon: str, accent: str) -> str:
    return (f'<span aria-hidden="true" style="display:inline-block;width:18px;height:18px;border-radius:50%;'
            f'background:{accent};color:#fff;font-size:12px;font-weight:700;line-height:18px;text-align:center;'
            f'margin-right:4px">{icon}</span>')


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    print(render(diagnose_machine()))
