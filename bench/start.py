"""What imports cost, each in a fresh process, after torch: processor time, wall time, memory, number of modules.

In each round every line gets one process, in random order; the table shows medians, and of memory what the peak grew
by. `torch` itself is counted from a bare interpreter. `torch again` is the control: an import of what is already there.
Files are in the system's cache after the first round, which is not counted.
"""

import json
import random
import statistics
import subprocess
import sys

from _report import machine, options, save, show

LINES = {
    "torch": "import torch",
    "torch again": "import torch",
    "lora_lab": "import lora_lab",
    "lora_lab.course": "from lora_lab.course import check, hint, predict, progress, use",
    "peft": "import peft",
    "transformers, GPT-2": "from transformers import GPT2LMHeadModel",
}
CHILD = """
import json, sys, time
try:
    import resource
except ImportError:  # Windows
    resource = None
def peak():
    unit = 1024 if sys.platform != "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6 if resource else float("nan")
{before}
memory, modules, wall, processor = peak(), len(sys.modules), time.perf_counter(), time.process_time()
{line}
processor, wall = time.process_time() - processor, time.perf_counter() - wall
print(json.dumps([1e3 * processor, 1e3 * wall, peak() - memory, len(sys.modules) - modules]))
"""


def cost(name):
    code = CHILD.format(before="" if name == "torch" else "import torch", line=LINES[name])
    child = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(f"{LINES[name]!r} failed: {child.stderr.strip().splitlines()[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def main():
    asked = options(__doc__, rounds=("rounds", 7))
    names = [n for n in LINES if n not in ("peft", "transformers, GPT-2")] if asked.quick else list(LINES)
    rounds, warm_up = (1, 0) if asked.quick else (asked.rounds, 1)
    found = machine("torch", "peft", "transformers") | {"rounds": rounds}
    costs = {name: [] for name in names}
    for number in range(warm_up + rounds):
        for name in random.sample(names, len(names)):
            measured = cost(name)
            if number >= warm_up:
                costs[name].append(measured)
    rows = []
    for name, measured in costs.items():
        processor, wall, memory, modules = zip(*measured, strict=True)
        rows.append({
            "import": name, "processor_ms": statistics.median(processor), "least_ms": min(processor),
            "most_ms": max(processor), "wall_ms": statistics.median(wall), "memory_MB": statistics.median(memory),
            "modules": modules[0],
        })
    show(rows, found)
    save(asked.out, "start", rows, found)


if __name__ == "__main__":
    main()
