"""Walls between student code and everything else, by what the system offers. Linux system calls through ctypes, no privileges needed
where user namespaces are allowed; each wall is tried, and what was refused is reported, never passed over.

Two moments. `enter` is called once by the server before it imports anything large: private mounts with an own root that holds Python
and the stripped lab, read-only; no network; another identity. `close_child` is called in each forked child before any student code:
own folder of limited size, other user, limits, no new privileges, Landlock, a filter of system calls. In between, `fork` puts
a child into a process namespace of its own, so that its end is the end of everything that it started.

Where namespaces are refused (many containers), Landlock keeps files away and the filter refuses sockets and signals to others. On a
system that offers neither, limits remain, and the report says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
import tempfile
import time

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 24, 22, 38, 36
LINUX = sys.platform.startswith("linux")
_libc = ctypes.CDLL(None, use_errno=True)
OWN = "/student"  # a child's own folder, where it has mounts of its own

# Numbers of system calls, x86-64 and AArch64. What students' code has no business with: other programs, other processes, sockets,
# mounts and namespaces, kernel interfaces with a history, memory files (which no limit counts).
_CALLS = {
    "socket": (41, 198), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "memfd_create": (319, 279), "memfd_secret": (447, 447), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "tkill": (200, 130), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273), "acct": (163, 89),
    "swapon": (167, 224), "reboot": (169, 142), "sethostname": (170, 161), "open_by_handle_at": (304, 265), "quotactl": (179, 60),
}  # fmt: skip
_SIGNALS = {"kill": (62, 129), "tgkill": (234, 131)}  # allowed to oneself alone
_CLONE, _CLONE3, _PIVOT_ROOT, _CAPSET = (56, 220), (435, 435), (155, 41), (126, 91)
_MACHINE = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(platform.machine()) if LINUX else None


class Refused(OSError):
    """The system did not allow a wall; the message says which."""


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise Refused(code, f"{what}: {os.strerror(code)}")
    return result


def _number(pair: tuple[int, int]) -> int:
    return pair[_MACHINE[0]]


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def _prctl(option: int, value: int, third: int = 0) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(third), 0, 0), f"prctl {option}")


# ---------------------------------------------------------------- once: the server


class Jail:
    """The walls that stand, as far as one can know before looking: {"files": "namespace", ...}. See `grading.walls` for the proof.

    config: {"show": [outside, inside] folders and files to see, "hide": folders in them to cover, "landlock": [path, "files" or "names"],
    "root": an empty folder, "path": sys.path, "uid": for children, "others_can_read": whether that user can read Python's folders,
    "way": "best", "root", "user", "landlock" or "limits" (tests ask for the weaker ones), "limits": see client.Limits}
    """

    def __init__(self, config: dict):
        self.config, self.limits = config, config["limits"]
        self.way = "limits"
        self.said: list[str] = []
        self.pid_namespace = self.statm = None
        self.landlock = 0
        self.seccomp = False

    def enter(self) -> None:
        """Put up what the server itself lives behind, the strongest that the system allows and `way` asks for."""
        self._enter()
        folder = OWN if self.pid_namespace is not None else self.config["root"]
        os.environ.update(HOME=folder, TMPDIR=folder)

    def _enter(self) -> None:
        wanted = self.config["way"]
        if LINUX and _MACHINE:
            self.seccomp = wanted != "limits"
            self.landlock = max(0, _libc.syscall(444, None, 0, 1)) if wanted not in ("limits",) else 0
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            for way in ("root", "user"):
                if wanted not in ("best", way) or (way == "root" and os.geteuid() != 0):
                    continue
                # Tried in a child first: a namespace that comes half into being cannot be left again.
                trouble = self._try(way)
                if trouble is None:
                    self._enter_namespaces(way)
                    self.way = way
                    return
                self.said.append(f"namespaces as {'root' if way == 'root' else 'a plain user'} are refused here ({trouble})")
            if self.landlock and wanted in ("best", "landlock"):
                self.way = "landlock"
        if LINUX:
            self.statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def _try(self, way: str) -> str | None:
        """None, or why this way is closed."""
        there, back = os.pipe()
        pid = os.fork()
        if pid == 0:
            trouble = b""
            try:
                self._enter_namespaces(way)
                inner = self.fork()
                if inner == 0:
                    self._child_mounts()
                    os._exit(0)
                if os.waitpid(inner, 0)[1] != 0:
                    trouble = b"mounting in a child failed"
            except BaseException as error:
                trouble = f"{error}".encode()[:200] or b"failed"
            finally:
                os.write(back, trouble)
                os._exit(0)
        os.close(back)
        trouble = os.read(there, 300).decode(errors="replace")
        os.close(there)
        _, status = os.waitpid(pid, 0)
        return trouble or (None if status == 0 else f"ended with status {status}")

    def _enter_namespaces(self, way: str) -> None:
        if way == "user":
            uid, gid = os.geteuid(), os.getegid()
            _unshare(NEWUSER | NEWPID)
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            # The server itself must live in a process namespace that belongs to the user namespace, or `fork` could not come back to it.
            pid = os.fork()
            if pid:
                os.closerange(0, 256)
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # While there is a /proc: inside there is none.
        self.statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        # Looked up before the old root is gone: `fork` must come back to this process namespace.
        self.pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        _unshare(NEWNS | NEWNET | NEWIPC | NEWUTS)
        _mount("none", "/", None, MS_REC | MS_PRIVATE)
        root = self.config["root"]
        _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=4m,mode=755")
        for outside, inside in self.config["show"]:
            _show(outside, root + inside)
        for path in self.config["hide"]:
            if os.path.isdir(root + path):
                _mount("tmpfs", root + path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=755")
        for folder in (OWN, "/etc", "/dev"):
            os.makedirs(root + folder, exist_ok=True)
        with open(root + "/etc/passwd", "w") as file:
            file.write(f"student:x:{self.config['uid']}:{self.config['uid']}::{OWN}:/\n")
        # The server's own; each child covers it with another. torch asks for a temporary folder when it is imported.
        _mount("tmpfs", root + OWN, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=1m,mode=1777")
        if not os.path.lexists(root + "/dev/shm"):
            os.symlink(OWN, root + "/dev/shm")
        os.chdir(root)
        _check(_libc.syscall(_number(_PIVOT_ROOT), b".", b"."), "pivot_root")
        _check(_libc.umount2(b".", MNT_DETACH), "umount2")
        os.chdir("/")
        _mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)

    # ------------------------------------------------------------ once per exercise

    def fork(self) -> int:
        """os.fork(); with namespaces, the child is the first process of a new process namespace."""
        if self.pid_namespace is None:
            return os.fork()
        _unshare(NEWPID)  # for the children to come
        pid = os.fork()
        if pid:
            _check(_libc.setns(self.pid_namespace, NEWPID), "setns")
        return pid

    def close_child(self, keep: int, folder: str | None) -> None:
        """All walls that a child puts up for itself; after this, student code may run. keep: the one file descriptor that stays open;
        folder: the child's own, where it has no mounts of its own."""
        limits = self.limits
        if LINUX:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if self.pid_namespace is not None:
            self._child_mounts()
            folder = OWN
        else:
            os.setpgid(0, 0)
        os.chdir(folder)
        os.environ.update(HOME=folder, TMPDIR=folder)
        tempfile.tempdir = None  # the server's, remembered
        os.umask(0o077)
        self._set_limits(limits)
        self.close_files(keep)
        self._other_user()
        if LINUX and _MACHINE:
            _prctl(PR_SET_NO_NEW_PRIVS, 1)
            if self.landlock:
                _landlock(self.landlock, self.config["landlock"] if self.way == "landlock" else [["/", "files"]], folder or OWN)
            if self.seccomp:
                _filter_calls()

    def close_files(self, keep: int) -> None:
        """Everything that was open in the server, but for `keep` and the three standard streams, which lead nowhere."""
        null = os.open("/dev/null", os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        top = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        top = min(top, 65536) if top != resource.RLIM_INFINITY else 65536
        os.closerange(3, keep)
        os.closerange(keep + 1, top)

    def _child_mounts(self) -> None:
        _unshare(NEWNS | NEWIPC)
        size = self.limits["disk"]
        _mount("tmpfs", OWN, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={size},nr_inodes=4096,mode=1777")

    def _other_user(self) -> None:
        root = os.geteuid() == 0
        if root and (self.way == "user" or (self.way != "root" and not self.config["others_can_read"])):
            # Root of a namespace that holds nothing else, or Python is installed where no other user can read it:
            # what makes it root is taken away instead.
            for capability in range(64):
                if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
                    break
            if _MACHINE:
                header = struct.pack("<Ii", 0x20080522, 0)
                _check(_libc.syscall(_number(_CAPSET), header, bytes(24)), "capset")
        elif root:
            uid = self.config["uid"]
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)

    def _set_limits(self, limits: dict) -> None:
        def limit(name: str, soft: int, hard: int | None = None):
            which = getattr(resource, "RLIMIT_" + name, None)
            if which is not None:
                try:
                    resource.setrlimit(which, (soft, hard or soft))
                except (ValueError, OSError):  # above a hard limit that stands already, or (macOS) not to be set
                    pass

        limit("CORE", 0)
        limit("FSIZE", limits["disk"])
        limit("NOFILE", limits["open_files"])
        limit("MEMLOCK", 0)
        limit("CPU", limits["cpu"], limits["cpu"] + 2)
        limit("NICE", 0)
        if self.pid_namespace is not None or (os.geteuid() == 0 and self.config["others_can_read"]):
            limit("NPROC", limits["processes"])  # counted per user: as oneself, one's other programs would count too
        size = self.size()
        if size:
            limit("AS", size + limits["memory"])

    def size(self) -> int:
        """Bytes of address space that the server has now; 0 where the system does not say."""
        if self.statm is None:
            return 0
        return int(os.pread(self.statm, 100, 0).split()[0]) * resource.getpagesize()


def _show(outside: str, inside: str) -> None:
    """Bind a folder or file read-only, or repeat a symbolic link (/lib -> usr/lib)."""
    if os.path.islink(outside):
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if not os.path.lexists(inside):
            os.symlink(os.readlink(outside), inside)
        return
    if not os.path.exists(outside):
        return
    device = not os.path.isdir(outside)
    if device:
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if not os.path.exists(inside):
            open(inside, "w").close()
    else:
        os.makedirs(inside, exist_ok=True)
    _mount(outside, inside, None, MS_BIND | (0 if device else MS_REC))
    # Flags of the mount below are locked in a user namespace: a remount must repeat them.
    kept = os.statvfs(inside).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | 1024 | 2048 | 4096 * 512)
    nodev = 0 if outside.startswith("/dev/") else MS_NODEV
    _mount("none", inside, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | nodev | (kept & 15) | (kept & (1024 | 2048)))


# ---------------------------------------------------------------- Landlock, seccomp


def _landlock(version: int, readable: list[list[str]], own: str) -> None:
    """Only `readable` ([path, "files"] or [path, "names"], each with all below) can be read, only `own` written; TCP refused (ABI 4),
    signals and abstract sockets kept inside (ABI 6)."""
    access = (1 << 13) - 1 | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
    read = 1 << 2 | 1 << 3
    readable = [(path, read if what == "files" else 1 << 3) for path, what in readable]
    attributes = struct.pack("<QQQ", access, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    attributes = attributes[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = _check(_libc.syscall(444, attributes, len(attributes), 0), "landlock_create_ruleset")
    devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
    for path, allowed in [*readable, *((path, read) for path in devices), (own, access & ~1), ("/dev/null", read | 2)]:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            allowed &= 1 << 1 | 1 << 2 | (1 << 14 if version >= 3 else 0)
        _check(_libc.syscall(445, rules, 1, struct.pack("<Qi", allowed, handle), 0), f"landlock_add_rule {path}")
        os.close(handle)
    _check(_libc.syscall(446, rules, 0), "landlock_restrict_self")
    os.close(rules)


def _filter_calls() -> None:
    """A seccomp filter (BPF) that refuses _CALLS with EPERM, signals to anybody else, new namespaces; clone3 does not exist, so that
    libc takes clone, whose flags a filter can see."""
    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000
    low = 16  # offset of the low half of the first argument (little endian)
    program = [(load, 0, 0, 4), (equal, 1, 0, _MACHINE[1]), (give, 0, 0, kill), (load, 0, 0, 0)]
    if _MACHINE[0] == 0:
        program += [(0x35, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # x32: other numbers for the same calls
    for pair in _CALLS.values():
        program += [(equal, 0, 1, _number(pair)), (give, 0, 0, refuse)]
    for pair in _SIGNALS.values():
        program += [(equal, 0, 4, _number(pair)), (load, 0, 0, low), (equal, 1, 0, os.getpid()), (give, 0, 0, refuse), (give, 0, 0, allow)]
    program += [(equal, 0, 1, _number(_CLONE3)), (give, 0, 0, absent)]
    program += [(equal, 0, 4, _number(_CLONE)), (load, 0, 0, low), (bits, 0, 1, 0x7E020000), (give, 0, 0, refuse), (give, 0, 0, allow)]
    program += [(give, 0, 0, allow)]
    code = b"".join(struct.pack("<HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    _check(_libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), header, 0, 0), "seccomp")


# ---------------------------------------------------------------- ends


def sweep(limit: float = 5.0) -> bool:
    """Without process namespaces: kill and reap every process that came from this one. True when none is left."""
    end = time.monotonic() + limit
    me = os.getpid()
    while time.monotonic() < end:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        for pid in _children(me):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.002)
    return False


def _children(parent: int) -> list[int]:
    """Processes below `parent`, all generations; empty where there is no /proc."""
    parents = {}
    try:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    for name in names:
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found = [parent]
    for one in found:
        found += [pid for pid, above in parents.items() if above == one]
    return found[1:]
