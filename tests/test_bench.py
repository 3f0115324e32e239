"""Benchmarks never pass or fail, but they have to run; `--quick` is for this."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.parametrize(("name", "columns"), [
    ("spectra", {"d", "r", "ratio", "same_q1", "same_q3", "off"}),
    ("reports", {"case", "who", "ms", "ratio", "q1", "q3", "off", "share"}),
    ("layers", {"case", "who", "ratio", "q1", "q3", "over_frozen", "kept_MB"}),
    ("gpt2", {"case", "who", "ratio", "q1", "q3", "utilisation", "peak_MB"}),
    ("ledger", {"model", "predicted_MB", "measured_MB", "ratio"}),
    ("grade", {"notebook", "points", "n", "median_s", "max_s"}),
    ("start", {"import", "processor_ms", "memory_MB", "modules"}),
])
def test_it_runs_prints_a_table_and_saves_it(name, columns, tmp_path):
    """With an option that only another script knows: `start.py bench` hands the same ones to all."""
    command = [sys.executable, BENCH / f"{name}.py", "--quick", "--out", tmp_path / "new", "--tokens", "64"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "new" / f"{name}.json").read_text(encoding="utf-8"))
    assert {"cores", "processor", "torch"} <= saved["machine"].keys()
    assert saved["rows"] and all(columns <= row.keys() for row in saved["rows"])
    for row in saved["rows"]:
        assert str(next(iter(row.values()))) in done.stdout
    if name in ("spectra", "reports"):
        # float32: a few eps of 1.2e-7 times a modest constant; a wrong decomposition is off by the order of 1
        assert max(row["off"] for row in saved["rows"] if row["off"] == row["off"]) < 1e-5


@pytest.mark.browser
@pytest.mark.slow
def test_the_bench_of_live_views_runs_too(tmp_path):
    """Minutes on a busy machine: it starts a server, a browser and two kernels."""
    from browser_tools import find_chromium

    pytest.importorskip("playwright", reason="playwright is not installed (the extra dev has it)")
    if not find_chromium():
        pytest.skip("no Chromium on this machine; LORA_LAB_CHROMIUM may name one")
    command = [sys.executable, BENCH / "widgets.py", "--quick", "--out", tmp_path, "--tokens", "64"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "widgets.json").read_text(encoding="utf-8"))
    assert {"cores", "jupyterlab", "ipywidgets", "chromium"} <= saved["machine"].keys()
    found = {row["what"]: row for row in saved["rows"]}
    for row in saved["rows"]:
        assert {"what", "n", "median", "p95", "unit"} <= row.keys() and row["what"] in done.stdout
    assert found["changes that act, toy"]["median"] == found["changes that act, digits"]["median"] == 12
    # Whatever the number of steps, a chart is some hundred points: a message that grew with the run would be a hundred times as large.
    assert found["largest message, 0.2 million steps"]["median"] < 2 * found["largest message, 2,000 steps"]["median"]
