"""JupyterHub for one class on one Linux server, in which students see nothing of each other. docs/hub.md has the steps.

    jupyterhub -f hub/jupyterhub_config.py        as root: it becomes each student for the student's own server

Every student is a Unix account of the group `lora-lab`, so that the kernel (Linux's) keeps them apart: files, processes, memory. What
Jupyter leaves open between accounts of one machine is closed here; tests/test_hub.py tries it with two students.

    LORA_LAB_HUB_URL     where the hub listens, http://127.0.0.1:8000
    LORA_LAB_HUB_LAB     the students' copy (`lora-lab release`), readable by all and written by root alone, /opt/lora-lab
    LORA_LAB_HUB_STATE   the hub's secrets and database, root's alone, /srv/lora-lab-hub
    LORA_LAB_HUB_GROUP   whose members may log in, lora-lab
    LORA_LAB_HUB_MEMORY  bytes of its own that one process may hold, 3e9
"""

import os
import pwd
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from jupyterhub.spawner import LocalProcessSpawner

c = get_config()  # noqa: F821 - jupyterhub gives it to this file

LAB = Path(os.environ.get("LORA_LAB_HUB_LAB", "/opt/lora-lab"))
STATE = Path(os.environ.get("LORA_LAB_HUB_STATE", "/srv/lora-lab-hub"))
MEMORY = int(float(os.environ.get("LORA_LAB_HUB_MEMORY", 3e9)))  # bytes
PROCESSES = 400  # threads count as well: a kernel with torch has about 20 per core
HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
BIN = Path(sys.executable).parent

STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
STATE.chmod(0o700)


def closed_to_students(path):
    """The first folder or file on the way to `path` that other accounts may not enter or read, None if the way is open."""
    path = Path(path).resolve()
    for step in (*reversed(path.parents), path):
        wanted = 0o001 if step != path else 0o005 if path.is_dir() else 0o001
        if step.exists() and step.stat().st_mode & wanted != wanted:
            return step
    return None


for _path in (sys.executable, LAB):  # a Python under /root would only fail when the first student logs in
    if closed_to_students(_path):
        raise SystemExit(f"students can't use {_path}: {closed_to_students(_path)} is closed to other accounts. Put Python and the lab where everybody "
                         "may read, such as /opt, and start the hub from there")  # fmt: skip


# ---- who may come in, and where -------------------------------------------------------------------------------------------------

c.JupyterHub.bind_url = os.environ.get("LORA_LAB_HUB_URL", "http://127.0.0.1:8000")
c.JupyterHub.authenticator_class = "pam"
c.PAMAuthenticator.allowed_groups = {os.environ.get("LORA_LAB_HUB_GROUP", "lora-lab")}
c.PAMAuthenticator.open_sessions = False  # a login session per tab serves nobody here

c.JupyterHub.cookie_secret_file = str(STATE / "cookie_secret")
c.JupyterHub.db_url = f"sqlite:///{STATE / 'jupyterhub.sqlite'}"
c.ConfigurableHTTPProxy.pid_file = str(STATE / "proxy.pid")
_proxy = shutil.which("configurable-http-proxy", path=os.pathsep.join([str(HERE / "node_modules/.bin"), os.environ.get("PATH", "")]))
c.ConfigurableHTTPProxy.command = [_proxy or "configurable-http-proxy"]


# ---- a student's server ---------------------------------------------------------------------------------------------------------

# Run as the student, never as root: a link in a home folder could lead root anywhere. What is there stays; new labs are added.
PREPARE = """
import os, shutil, sys
from pathlib import Path
lab, home = Path(sys.argv[1]), Path.home()
home.chmod(0o700)
target = home / "lora-lab"
target.mkdir(exist_ok=True)
for notebook in sorted((lab / "notebooks").glob("*.ipynb")):
    if not (target / notebook.name).exists():
        shutil.copyfile(notebook, target / notebook.name)
"""


class ClassSpawner(LocalProcessSpawner):
    """A student's server as a process of the student's own account: files for its owner alone, limits on memory and processes."""

    def make_preexec_fn(self, name):
        become = super().make_preexec_fn(name)

        def prepare():
            os.umask(0o077)  # /tmp is everybody's: what a student writes there is not
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            become()

        return prepare


def prepare_home(spawner):
    account = pwd.getpwnam(spawner.user.name)
    subprocess.run(
        [sys.executable, "-I", "-c", PREPARE, str(LAB)], check=True, user=account.pw_uid, group=account.pw_gid, extra_groups=[], umask=0o077,
        cwd="/", env={"HOME": account.pw_dir},
    )  # fmt: skip


c.JupyterHub.spawner_class = ClassSpawner
c.Spawner.pre_spawn_hook = prepare_home
c.Spawner.cmd = [str(BIN / "jupyterhub-singleuser")]
c.Spawner.notebook_dir = "~/lora-lab"
c.Spawner.default_url = "/lab/tree/00_start_here.ipynb"
c.Spawner.args = [
    # Over TCP any account of this machine could listen to a kernel's output; these sockets lie in the student's own folder.
    "--KernelManager.transport=ipc",
    "--MappingKernelManager.cull_idle_timeout=3600",  # seconds; a forgotten kernel holds 0.3 to 1 GB
    "--MappingKernelManager.cull_interval=300",
    "--ServerApp.shutdown_no_activity_timeout=7200",
    "--LabApp.extension_manager=readonly",
    "--LabApp.news_url=None",
]
c.Spawner.start_timeout = c.Spawner.http_timeout = 120  # seconds: thirty servers may start in one minute
c.Spawner.environment = {
    "PATH": os.pathsep.join([str(BIN), "/usr/local/bin", "/usr/bin", "/bin"]),
    "LORA_LAB_STUDENT": lambda spawner: spawner.user.name,  # everybody's own numbers in the checks
    "JUPYTER_PREFER_ENV_PATH": "1",
} | {name: str(LAB / folder) for name, folder in (("LORA_LAB_MODELS", "models"), ("LORA_LAB_DATA", "datasets")) if (LAB / folder).is_dir()}
