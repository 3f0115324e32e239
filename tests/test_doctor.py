"""The doctor: what it finds on this machine, and on machines that are broken in the ways that classes meet."""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from lora_lab import doctor
from lora_lab.doctor import Line, diagnose_machine, render, render_html

NAMES = ["Python", "PyTorch", "Device", "CPU cores", "Memory", "Disk", "Sliders", "Saving", "Versions", "Network"]


def test_this_machine(tmp_path):
    lines = diagnose_machine(tmp_path)
    assert [line.name for line in lines] == NAMES
    found = {line.name: line for line in lines}
    assert found["Python"].ok and found["PyTorch"].ok and found["Sliders"].ok and found["Saving"].ok
    assert torch.__version__ in found["PyTorch"].found
    assert importlib.metadata.version("ipywidgets") in found["Sliders"].found
    assert found["Network"].ok is None and "not needed" in found["Network"].found
    assert list(tmp_path.iterdir()) == []  # the write test leaves nothing behind


def test_a_folder_that_is_not_there():
    lines = diagnose_machine("/nowhere/at/all")
    assert [line.name for line in lines] == NAMES
    saving = lines[NAMES.index("Saving")]
    assert saving.ok is False and saving.advice


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    line = doctor.check_python()
    assert line.ok is False and "3.11" in line.advice


def test_broken_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch raises ImportError
    torch_line, device = doctor.check_torch(), doctor.check_device()
    assert torch_line.ok is False and "start.py" in torch_line.advice
    assert device.ok is None  # one failing line for one cause
    monkeypatch.setattr(doctor.platform, "system", lambda: "Windows")

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise OSError("[WinError 126] The specified module could not be found. c10.dll\nmore")

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    line = doctor.check_torch()
    assert line.ok is False and "c10.dll" in line.found and "more" not in line.found and "vc_redist" in line.advice


def test_torch_that_multiplies_wrongly(monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *shape: torch.zeros(*shape))
    line = doctor.check_torch()
    assert line.ok is False and "wrongly" in line.found


@pytest.mark.parametrize(("capability", "words"), [((7, 5), "no bf16"), ((8, 0), ", bf16"), ((9, 0), ", bf16")])
def test_cuda(monkeypatch, capability, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=15.6e9))
    line = doctor.check_device()
    assert line.ok and line.found.startswith("cuda: Tesla T4, 16 GB") and words in line.found


def test_cpu_beside_an_idle_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_device().ok is True
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    line = doctor.check_device()
    assert line.ok is None and "--torch-index" in line.advice


# ---- memory and cores, inside containers and outside --------------------------------------------------------------

def cgroup(root, cgroups, **files):
    """A file system with only what the kernel tells about control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroups)
    for path, text in files.items():
        file = root / "sys/fs/cgroup" / path.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(text))
    return root


def machine(monkeypatch, total, available, rss):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total, available=available))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=rss))


V2 = {"memory_DOT_max": 1_000_000_000, "memory_DOT_current": 700_000_000,
      "memory_DOT_stat": "anon 5\ninactive_file 400000000\nactive_file 7\n"}


def test_cgroup_v2(tmp_path):
    root = cgroup(tmp_path, "0::/\n", **V2)
    assert doctor.memory_limit(root) == (1_000_000_000, 300_000_000)  # 700 MB less 400 MB of file cache


def test_cgroup_v2_limit_above_our_own_group(tmp_path):
    root = cgroup(tmp_path, "0::/user/kernel\n", **{f"user__{k}": v for k, v in V2.items()},
                  **{"user__kernel__memory_DOT_max": "max", "user__kernel__memory_DOT_current": 5})
    assert doctor.memory_limit(root) == (1_000_000_000, 300_000_000)


def test_cgroup_v1(tmp_path):
    values = {"memory_DOT_limit_in_bytes": 2_000_000_000, "memory_DOT_usage_in_bytes": 600_000_000,
              "memory_DOT_stat": "cache 9\ninactive_file 3\ntotal_inactive_file 100000000\n"}
    # The path is the host's: inside the container only the base folder is there.
    root = cgroup(tmp_path, "4:memory:/docker/0ab1\n3:cpuset:/\n", **{f"memory__{k}": v for k, v in values.items()})
    assert doctor.memory_limit(root) == (2_000_000_000, 500_000_000)


@pytest.mark.parametrize("limit", ["max", 9223372036854771712])
def test_no_limit(tmp_path, limit):
    name = "memory_DOT_max" if limit == "max" else "memory__memory_DOT_limit_in_bytes"
    root = cgroup(tmp_path, "4:memory:/\n0::/\n", **{name: limit, "memory_DOT_current": 5, "memory_DOT_stat": "",
                                                      "memory__memory_DOT_usage_in_bytes": 5, "memory__memory_DOT_stat": ""})
    assert doctor.memory_limit(root) is None
    assert doctor.memory_limit(tmp_path / "a Mac") is None


@pytest.mark.parametrize(("total", "available", "rss", "ok"), [
    (8e9, 4e9, 0.3e9, True),
    (8e9, 0.8e9, 0.3e9, True),  # what this kernel holds already is part of the lab's 1 GB
    (8e9, 0.6e9, 0.3e9, False),
])
def test_memory_without_a_container(monkeypatch, tmp_path, total, available, rss, ok):
    machine(monkeypatch, total, available, rss)
    line = doctor.check_memory(tmp_path)
    assert line.ok is ok and f"{available / 1e9:.1f} GB free of 8.0 GB" in line.found
    assert "Shut Down All Kernels" in line.advice


def test_memory_in_a_small_container_on_a_large_host(monkeypatch, tmp_path):
    machine(monkeypatch, 256e9, 200e9, 0.2e9)
    root = cgroup(tmp_path, "0::/\n", **V2)
    line = doctor.check_memory(root)
    assert line.ok is False and line.found == "0.7 GB free of 1.0 GB (this container's limit)"


def test_memory_without_psutil(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert doctor.check_memory().ok is None


@pytest.mark.parametrize(("files", "quota"), [
    ({"cpu_DOT_max": "50000 100000\n"}, 0.5), ({"cpu_DOT_max": "max 100000\n"}, None),
    ({"cpu__cpu_DOT_cfs_quota_us": "150000\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}, 1.5),
    ({"cpu__cpu_DOT_cfs_quota_us": "-1\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}, None),
])
def test_cpu_quota(monkeypatch, tmp_path, files, quota):
    root = cgroup(tmp_path, "0::/\n" if "cpu_DOT_max" in files else "1:cpu,cpuacct:/\n", **files)
    assert doctor.cpu_quota(root) == quota
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    line = doctor.check_cores(root)
    assert line.found == ("4" if quota is None else f"{quota:g} of 4 (this container's share)")
    assert line.ok is (None if quota == 0.5 else True)


# ---- the rest -----------------------------------------------------------------------------------------------------

def test_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=3e8))
    line = doctor.check_disk(tmp_path)
    assert line.ok is False and "0.3 GB free" in line.found and "0.5 GB" in line.advice


def test_widgets(monkeypatch):
    assert doctor.check_widgets().ok is True
    real = importlib.metadata.version

    def versions(name):
        if name == "jupyterlab_widgets" and wanted is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return wanted if name == "jupyterlab_widgets" else real(name)

    monkeypatch.setattr(doctor, "version", versions)
    wanted = None
    line = doctor.check_widgets()
    assert line.ok is False and "no jupyterlab_widgets" in line.found and "restart JupyterLab" in line.advice
    wanted = "1.1.4"  # what ipywidgets 7 brings
    line = doctor.check_widgets()
    assert line.ok is False and "needs jupyterlab_widgets" in line.found
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert doctor.check_widgets().ok is False


def test_old_ipywidgets(monkeypatch):
    import ipywidgets

    monkeypatch.setattr(ipywidgets, "__version__", "7.7.1")
    line = doctor.check_widgets()
    assert line.ok is False and "too old" in line.found


def test_read_only_folder(monkeypatch, tmp_path):
    def refuse(**arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    line = doctor.check_write(tmp_path)
    assert line.ok is False and "Read-only file system" in line.found and "home folder" in line.advice


def test_versions(monkeypatch, tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# pins\ntorch==2.13.0\na==1.0\nb-b==2.0\nc==1\nd==1\ngone==4\n")
    installed = {"torch": "2.13.0+cpu", "a": "1.0", "b-b": "2.1", "c": "1", "d": "1"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor, "version", version)
    line = doctor.check_versions(constraints)
    assert line.ok is None and line.found == "b-b 2.1 (pinned: 2.0)" and "start.py" in line.advice
    installed.update({"torch": "2.9.0", "a": "1.1", "c": "2"})
    assert doctor.check_versions(constraints).found.endswith("and 1 more")
    installed.update({"torch": "2.13.0", "a": "1.0", "b-b": "2.0", "c": "1"})
    assert doctor.check_versions(constraints).ok is True
    assert doctor.check_versions(tmp_path / "absent").ok is None


def test_an_examination_that_breaks_is_a_line(monkeypatch):
    monkeypatch.setattr(doctor, "check_cores", lambda: 1 / 0)
    line = diagnose_machine()[3]
    assert line.name == "CPU cores" and line.ok is None and "ZeroDivisionError" in line.found


def test_it_runs_where_the_package_cannot_be_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('c10.dll')")
    done = subprocess.run([sys.executable, doctor.__file__], capture_output=True, text=True, encoding="utf-8",
                          env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONUTF8": "1"})
    assert done.returncode == 0 and "c10.dll" in done.stdout and "To mend before you start: PyTorch" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


LINES = [Line("Python", True, "3.12.1", "never shown"), Line("Memory", False, "0.4 GB <free>", "Close & `stop`."),
         Line("Network", None, "not needed")]


def test_text():
    assert render(LINES).splitlines() == [
        "✓ ok    Python   3.12.1",
        "✗ mend  Memory   0.4 GB <free>",
        "                 -> Close & `stop`.",
        "i note  Network  not needed",
        "",
        "To mend before you start: Memory.",
    ]
    assert render([LINES[0], LINES[2]]).endswith("This machine is ready.")


class Balance(HTMLParser):
    """Fails on tags that do not nest; collects the text."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html():
    page = render_html(LINES)
    reader = Balance()
    reader.feed(page)
    assert reader.open == []
    text = " ".join("".join(reader.text).split())
    assert "0.4 GB <free>" in text and "Close & stop." in text and "<code>stop</code>" in page
    for word in (" ok", " mend", " note", "To mend before you start: Memory"):  # words, not colours alone
        assert word in text
    assert "never shown" not in page
    assert "<style" not in page and "class=" not in page and "<script" not in page


# ---- Colab --------------------------------------------------------------------------------------------------------


def installed(monkeypatch, **versions):
    """Make `version` know these packages and no others."""
    def version(name):
        try:
            return versions[name.replace("-", "_").lower()]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(doctor, "version", version)


NEEDED = ["torch>=2.6", "numpy", 'ipywidgets>=8; extra == "lab"', 'jupyterlab>=4; extra == "lab"', 'peft>=0.21; extra == "lab"',
          'sacrebleu; extra == "gpt2"', 'voila; extra == "lecture"', 'scikit-learn; extra == "lab"']  # fmt: skip


def test_what_colab_lacks_is_what_is_absent_or_too_old(monkeypatch):
    installed(monkeypatch, torch="2.3.0+cu121", numpy="2.0.2", ipywidgets="7.7.1", peft="0.19.1", scikit_learn="1.6.1")
    assert doctor.missing_packages(NEEDED) == ["peft>=0.21", "sacrebleu"]  # never torch and ipywidgets, however old; never what only a server needs
    installed(monkeypatch, torch="2.11.0+cu128", numpy="2.0.2", peft="0.21.2", sacrebleu="2.6.0", scikit_learn="1.6.1")
    assert doctor.missing_packages(NEEDED) == []


def test_the_projects_own_list_is_read(monkeypatch):
    installed(monkeypatch)
    found = doctor.missing_packages()
    assert {"numpy", "peft>=0.21", "sacrebleu", "matplotlib"} <= set(found)
    assert not {"torch", "ipywidgets", "jupyterlab", "papermill", "voila", "pytest", "jupyterhub"} & {line.split(">")[0].split("[")[0] for line in found}


def test_what_is_added_leaves_torch_and_widgets_where_they_are(monkeypatch, capsys):
    installed(monkeypatch, torch="2.11.0+cu128", ipywidgets="7.7.1")
    monkeypatch.setattr(doctor, "missing_packages", lambda: ["peft>=0.21", "sacrebleu"])
    asked = []

    def pip(command, **_):
        constraints = Path(command[command.index("-c") + 1])
        asked.append((command[1:4], command[-2:], constraints.read_text().split()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(doctor.subprocess, "run", pip)
    doctor.add_missing()
    assert asked == [(["-m", "pip", "install"], ["peft>=0.21", "sacrebleu"], ["torch==2.11.0+cu128", "ipywidgets==7.7.1"])]
    assert "peft" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "missing_packages", lambda: [])
    doctor.add_missing()  # a second time: pip is not even asked
    assert len(asked) == 1 and capsys.readouterr().out == ""


def test_what_pip_could_not_add_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "missing_packages", lambda: ["sacrebleu"])
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "WARNING: x\nERROR: no network\n"))
    with pytest.raises(RuntimeError, match="lacks sacrebleu, .*no network"):
        doctor.add_missing()


def test_colabs_own_widgets_are_fine_on_colab_alone(monkeypatch):
    fake = SimpleNamespace(__version__="7.7.1")
    monkeypatch.setitem(sys.modules, "ipywidgets", fake)
    monkeypatch.setattr(doctor, "_unmet", lambda *a: "")
    assert doctor.check_widgets().ok is False
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    assert doctor.check_widgets().ok is True


def test_badges_can_be_read():
    """White on each accent has a contrast of at least 4.5 : 1 (WCAG 2, level AA)."""
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for _, _, accent in doctor.STATES.values():
        assert 1.05 / (luminance(accent) + 0.05) >= 4.5


def test_it_imports_only_the_standard_library_at_its_head():
    import ast

    for node in ast.parse(Path(doctor.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"__future__"}
