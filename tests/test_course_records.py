"""The record: appended whole, from several processes; damage and full disks are survived with a notice."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab.course import records
from lora_lab.course.records import MIME, Calibration, Records, default_paths, merge, open_notebook, read_notebook


@pytest.fixture
def said():
    return []


@pytest.fixture
def make(tmp_path, said):
    return lambda *names: Records([tmp_path / name for name in names or ("a/records.jsonl",)], notice=said.append)


def test_what_is_added_is_read_back_by_the_next_session(make, said):
    one = make().add("check", exercise="0.1", passed=True, note="α · ✓")
    make().add("hint", exercise="0.1", rung=1)
    found = make().read()
    assert found[0] == one and [r["kind"] for r in found] == ["check", "hint"] and said == []
    assert one["version"] == 1 and one["time"].endswith("Z") and len({r["id"] for r in found}) == 2


def test_a_record_holds_nothing_about_the_person_or_the_machine(make):
    text = json.dumps(make().add("check", exercise="0.1"))
    secrets = [os.path.expanduser("~"), os.uname().nodename if hasattr(os, "uname") else "", os.environ.get("USER", "")]
    assert set(json.loads(text)) == {"version", "id", "time", "kind", "exercise"}
    assert not any(secret and len(secret) > 3 and secret in text for secret in secrets)


def test_several_processes_write_whole_lines(tmp_path):
    code = ("import sys\nfrom pathlib import Path\nfrom lora_lab.course.records import Records\n"
            "r = Records([Path(sys.argv[1])])\n"
            "for n in range(200): r.add('check', exercise=sys.argv[2], filler='x' * 300)\n")
    path = tmp_path / "records.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    said = []
    assert len(Records([path], notice=said.append).read()) == 400 and said == []


@pytest.mark.parametrize("damage", [
    b"{broken\n", b"\xff\xfe\n", b"[1, 2]\n", b'{"id": 3}\n', b'{"version": 1, "id": "x", "time": "t", "ki',
])
def test_a_damaged_file_is_set_aside(make, said, tmp_path, damage):
    for _ in range(2):
        make().add("check", exercise="0.1")
    path = tmp_path / "a/records.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + (second if damage.endswith(b"\n") else b""))
    good = 2 if damage.endswith(b"\n") else 1
    store = make()
    store.add("hint", exercise="0.1")                       # a broken-off line does not swallow the next one
    assert len(store.read()) == good + 1
    assert len(said) == 1 and "1 line could not be read" in said[0]
    aside = list(path.parent.glob("*.damaged-*"))
    assert len(aside) == 1 and damage in aside[0].read_bytes() and aside[0].name in said[0]
    assert len(make().read()) == good + 1 and len(said) == 1      # mended: no second notice


def test_records_of_a_later_version_are_kept(make, tmp_path, said):
    path = tmp_path / "a/records.jsonl"
    path.parent.mkdir()
    later = {"version": 9, "id": "z", "time": "2099", "kind": "dream", "new": [1]}
    path.write_text(json.dumps(later) + "\n")
    assert make().read() == [later] and said == []


def test_a_folder_that_cannot_be_written(make, said, tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    store = make("file/records.jsonl", "b/records.jsonl")
    for _ in range(2):
        store.add("check", exercise="0.1")
    assert len(store.read()) == 2 and len(said) == 1 and "b" in said[0]
    assert len((tmp_path / "b/records.jsonl").read_text().splitlines()) == 2


def test_nowhere_to_write_is_no_exception(make, said, tmp_path):
    (tmp_path / "file").write_text("")
    store = make("file/records.jsonl", "file/other.jsonl")
    for _ in range(3):
        store.add("check", exercise="0.1")
    assert len(store.read()) == 3 and any("save the notebook" in text for text in said) and len(said) == len(set(said))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk at hand")
def test_a_full_disk(said, tmp_path):
    store = Records([Path("/dev/full"), tmp_path / "records.jsonl"], notice=said.append)
    store.add("check", exercise="0.1")
    assert len(store.read()) == 1 and len(said) == 1


def test_a_write_that_stops_halfway(make, said, monkeypatch):
    store, write = make("a/records.jsonl", "b/records.jsonl"), os.write

    def half(handle, line):
        return write(handle, line[:9] if store.path.parent.name == "a" else line)

    monkeypatch.setattr(records.os, "write", half)
    store.add("check", exercise="0.1")
    assert store.path.parent.name == "b" and len(store.read()) == 1 and len(said) == 1


def test_a_notice_is_said_once(make, said):
    store = make()
    store.notice("full"), store.notice("full"), store.notice("other")
    assert said == ["full", "other"]


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LORA_LAB_RECORDS", raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert default_paths()[0] == records._START / ".lora-lab/records.jsonl"
    assert default_paths()[1] == Path.home() / ".lora-lab/records.jsonl"
    notebook = tmp_path / "course" / "02_lab.ipynb"
    notebook.parent.mkdir()
    notebook.write_text("{}")
    monkeypatch.setenv("JPY_SESSION_NAME", str(notebook))
    assert open_notebook() == notebook and default_paths()[0] == notebook.parent / ".lora-lab/records.jsonl"
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "console-1"))
    assert open_notebook() is None
    monkeypatch.setenv("LORA_LAB_RECORDS", str(tmp_path))
    assert default_paths()[0] == tmp_path / "records.jsonl"
    monkeypatch.setenv("LORA_LAB_RECORDS", str(tmp_path / "mine.jsonl"))
    assert default_paths()[0] == tmp_path / "mine.jsonl"


def test_records_in_a_notebook_file(make, tmp_path):
    one, two = make().add("check", exercise="0.1"), make().add("hint", exercise="0.1")
    cells = [{"cell_type": "markdown", "source": ""},
             {"cell_type": "code", "outputs": [{"output_type": "stream", "text": "x"},
                                               {"output_type": "display_data", "data": {MIME: two, "text/html": ""}},
                                               {"output_type": "display_data", "data": {MIME: "nonsense"}}]}]
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert read_notebook(path) == [two]
    assert merge([two], [one], [two]) == [one, two]
    for content in ("", "{}", "[]", '{"cells": 3}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="expected a notebook"):
            read_notebook(path)


# ------------------------------------------------------------ calibration


def by_enumeration(sures, fewest, most):
    """The chance of `fewest` to `most` right answers: all outcomes, one by one."""
    chance = 0.0
    for outcome in itertools.product((0, 1), repeat=len(sures)):
        if fewest <= sum(outcome) <= most:
            chance += math.prod(p if right else 1 - p for p, right in zip(sures, outcome, strict=True))
    return chance


def test_the_chance_of_so_many_right_answers():
    sures = (0.5, 0.9, 0.65, 1.0, 0.0, 0.8)
    found = Calibration(tuple((p, True) for p in sures))
    for fewest, most in ((0, 6), (0, 2), (3, 4), (5, 6), (6, 6)):
        assert found.chance_of(fewest, most) == pytest.approx(by_enumeration(sures, fewest, most), abs=1e-12)  # sums of six products


def test_brier_and_means_by_hand():
    found = Calibration(((0.8, True), (0.6, False), (1.0, True)))
    assert found.brier == pytest.approx((0.04 + 0.36 + 0.0) / 3) and found.mean_sure == pytest.approx(0.8)
    assert found.right == 2 and found.groups() == [("60 to 79 %", 1, 0), ("80 to 94 %", 1, 1), ("95 % and more", 1, 1)]
    assert math.isnan(Calibration(()).brier) and Calibration(()).verdict == "unclear" and Calibration(()).groups() == []


@pytest.mark.parametrize(("answers", "verdict"), [
    (((0.9, False),) * 2, "over"),            # 1 % if true
    (((0.9, False),) * 1 + ((0.9, True),) * 5, "unclear"),
    (((0.8, False),) * 1, "unclear"),         # 20 %
    (((0.5, True),) * 5, "under"),            # 3 %
    (((0.5, True),) * 4, "unclear"),          # 6 %
])
def test_a_verdict_only_where_the_answers_tell(answers, verdict):
    assert Calibration(answers).verdict == verdict
