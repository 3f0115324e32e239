"""Atomic writes under kills and errors; downloads from a server that misbehaves on request."""

import hashlib
import http.server
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

import lora_lab.files
from lora_lab import FetchError, atomic_write, fetch

# ---- atomic_write ---------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_written_whole_and_alone(tmp_path):
    target = tmp_path / "new" / "deeper" / "a.txt"
    with atomic_write(target) as temporary:
        assert temporary != target and temporary.parent == target.parent  # a rename is atomic within one file system only
        temporary.write_bytes(b"first")
        assert not target.exists()
    assert target.read_bytes() == b"first"
    with atomic_write(str(target)) as temporary:
        temporary.write_bytes(b"second")
        assert target.read_bytes() == b"first"
    assert target.read_bytes() == b"second"
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [b"old", None])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, old, error):
    target = tmp_path / "a.txt"
    if old is not None:
        target.write_bytes(old)
    with pytest.raises(error), atomic_write(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert names(tmp_path) == ([] if old is None else ["a.txt"])
    assert old is None or target.read_bytes() == old


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_are_the_usual_ones(tmp_path):
    target = tmp_path / "a.txt"
    before = os.umask(0o027)
    try:
        with atomic_write(target) as temporary:
            temporary.write_bytes(b"x")
        assert os.umask(0o027) == 0o027  # reading the umask has not changed it
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640  # as open() would have made it
    target.chmod(0o604)
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"y")
    assert stat.S_IMODE(target.stat().st_mode) == 0o604


KILLED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[2])  # without torch, which takes seconds to import
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
size = 1 << 20
for turn in range(10**9):
    with files.atomic_write(sys.argv[1]) as temporary:
        with open(temporary, "wb") as file:
            for _ in range(16):
                file.write(bytes([turn % 251]) * (size // 16))
    if turn == 0:
        print("written", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_while_writing_one_whole_version_is_there(tmp_path):
    """Killed at eight moments of a loop that rewrites one megabyte: each time the file is one turn's, entirely."""
    seen = set()
    for pause in (0.0, 0.003, 0.007, 0.013, 0.019, 0.031, 0.041, 0.053):
        target = tmp_path / f"a{pause}.bin"
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(target), lora_lab.files.__file__], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout.readline() == "written\n"
            time.sleep(pause)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        content = target.read_bytes()
        assert len(content) == 1 << 20 and len(set(content)) == 1
        seen.add(content[0])
        with atomic_write(target) as temporary:  # what the killed one left does not stand in the way
            temporary.write_bytes(b"next")
        assert target.read_bytes() == b"next"
    assert seen


def test_two_writers_do_not_mix(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_write(target) as one, atomic_write(target) as two:
        assert one != two
        one.write_bytes(b"1" * 1000)
        two.write_bytes(b"2" * 10)
    assert target.read_bytes() in (b"1" * 1000, b"2" * 10)
    assert names(tmp_path) == ["a.txt"]


# ---- fetch ----------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 300
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers each path from a list of scripted answers; the last one repeats."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = {}, []

    def url(self, name, *answers):
        self.answers[f"/{name}"] = list(answers)
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        answers = self.server.answers[self.path]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer == "cut":  # promises everything, sends a third, hangs up
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: len(CONTENT) // 3])
            self.close_connection = True
            return
        body = answer if isinstance(answer, bytes) else b"no"
        self.send_response(200 if isinstance(answer, bytes) else answer)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("pooch")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as s:
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        yield s
        s.shutdown()


@pytest.fixture
def pauses(monkeypatch):
    """No test waits between attempts; the pauses asked for are written down."""
    seen = []
    monkeypatch.setattr(time, "sleep", seen.append)
    return seen


def test_the_right_file_is_fetched_once(server, tmp_path):
    url = server.url("data.bin", CONTENT)
    path = fetch(url, SHA256, tmp_path / "cache")
    assert path.read_bytes() == CONTENT and path.parent == tmp_path / "cache"
    assert fetch(url, SHA256.upper(), tmp_path / "cache") == path
    assert server.asked == ["/data.bin"]  # the second time from the disk
    assert len(names(tmp_path / "cache")) == 1


def test_a_copy_put_there_by_hand_is_used_without_a_network(tmp_path):
    pytest.importorskip("pooch")
    (tmp_path / "data.bin").write_bytes(CONTENT)
    assert fetch("http://host.invalid/data.bin", SHA256, tmp_path).read_bytes() == CONTENT


def test_a_damaged_copy_is_fetched_again(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(CONTENT[:-1])
    assert fetch(server.url("data.bin", CONTENT), SHA256, tmp_path).read_bytes() == CONTENT
    assert server.asked == ["/data.bin"]


def test_a_wrong_checksum_leaves_nothing(server, tmp_path, pauses):
    url = server.url("data.bin", b"<html>please log in</html>")
    with pytest.raises(FetchError) as caught:
        fetch(url, SHA256, tmp_path, retries=1)
    assert url in str(caught.value) and SHA256[:12] in str(caught.value)
    assert names(tmp_path) == []


def test_a_wrong_download_does_not_replace_a_file_that_was_there(server, tmp_path, pauses):
    (tmp_path / "data.bin").write_bytes(b"an older release")
    with pytest.raises(FetchError):
        fetch(server.url("data.bin", b"nonsense"), SHA256, tmp_path, retries=0)
    assert (tmp_path / "data.bin").read_bytes() == b"an older release"


@pytest.mark.parametrize("trouble", [503, 429, 500, "cut", b"wrong"])
def test_passing_trouble_is_retried_with_growing_pauses(server, tmp_path, pauses, trouble):
    url = server.url("data.bin", trouble, trouble, CONTENT)
    assert fetch(url, SHA256, tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 3
    waits = [p for p in pauses if p > 0.05]
    assert len(waits) == 2 and 0 < waits[0] < waits[1]
    assert names(tmp_path) == ["data.bin"]


@pytest.mark.parametrize(("status", "words"), [(429, ["429", "limits", "wait"]), (503, ["503", "later"]), (404, ["404"])])
def test_lasting_trouble_is_explained(server, tmp_path, pauses, status, words):
    url = server.url("data.bin", status)
    with pytest.raises(FetchError) as caught:
        fetch(url, SHA256, tmp_path, retries=2)
    for word in [url, str(tmp_path / "data.bin"), *words]:
        assert word in str(caught.value)
    assert names(tmp_path) == []
    if status != 404:
        assert len(server.asked) == 3


def test_what_will_not_change_is_not_asked_for_again(server, tmp_path, pauses):
    """404 is an answer: a class that waits through its retries learns nothing."""
    with pytest.raises(FetchError):
        fetch(server.url("gone.bin", 404), SHA256, tmp_path, retries=3)
    assert len(server.asked) == 1


def test_without_a_network_the_message_says_where_to_put_the_file(tmp_path, pauses):
    pytest.importorskip("pooch")
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/data.bin"
        with pytest.raises(FetchError) as caught:
            fetch(url, SHA256, tmp_path, retries=1)
    assert url in str(caught.value) and str(tmp_path / "data.bin") in str(caught.value) and "network" in str(caught.value)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_explained(server, tmp_path, pauses):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FetchError, match="LORA_LAB_CACHE"):
        fetch(server.url("data.bin", CONTENT), SHA256, tmp_path / "file" / "cache", retries=0)


def test_the_cache_folder_can_be_moved(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "elsewhere"))
    assert fetch(server.url("data.bin", CONTENT), SHA256).parent == tmp_path / "elsewhere"


def test_a_query_stays_out_of_the_file_name(server, tmp_path):
    path = fetch(server.url("data.bin?raw=1", CONTENT), SHA256, tmp_path)
    assert path.name == "data.bin"  # "?" cannot stand in a file name on Windows
