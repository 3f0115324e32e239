"""Figures that prose states are the figures that a run gives."""

import re
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_counts_the_italic_adapter_rightly():
    stated = int(re.search(r"one LoRA adapter of (\d+) numbers", (ROOT / "README.md").read_text(encoding="utf-8")).group(1))
    tensors = load_file(ROOT / "lora_lab/assets/digit_painter/italic/adapter_model.safetensors")
    assert stated == sum(array.size for array in tensors.values())


def test_the_table_of_labs_names_what_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    from lora_lab.course.labs import labs

    for lab in labs().values():
        row = next((line for line in readme.splitlines() if f"notebooks/{lab.name}.ipynb" in line), None)
        assert row is not None, f"README's table of labs lacks {lab.name}"
        assert f"| {lab.minutes} |" in row and lab.title in row, f"README says {row!r}; the lab has {lab.minutes} min, {lab.title!r}"
    assert len(re.findall(r"\(notebooks/\w+\.ipynb\)", readme)) == len(labs())
