"""Two worker processes beside one, on cells that train a LoRA layer for a second or more each, one torch thread per process.

In each round both sizes do the same cells, in random order; workers are started and warmed by a sweep of their own that is not
counted. `speedup` is the time of one worker divided by that of two, formed within the round, with its quartiles; `again` is the
control: one worker against itself. `ceiling` is what the machine gave in the same round to two plain processes that do the same
arithmetic without any of our code: on a shared machine, or with cores that are two threads of one, it is less than 2.
`busy` needs no quiet machine: the share of the two workers' time that was spent inside cells. What is missing to 1 is the sweep's own
doing (sending, writing, waiting for the last cell); two workers that do not hinder each other are 2 x busy times as fast as one.
"""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _report import machine, options, save, show

from lora_lab import Batches, apply_lora, train
from lora_lab.sweep import sweep

PLAIN = """
import sys, time, torch
torch.set_num_threads(1)
def work(steps, seed):
    torch.manual_seed(seed)
    W, A, B = torch.randn(256, 256), torch.randn(8, 256), torch.zeros(256, 8)
    x = torch.randn(64, 256)
    for _ in range(steps):
        A, B = [factor.detach().requires_grad_() for factor in (A, B)]
        ((x @ W.T + x @ A.T @ B.T) ** 2).mean().backward()
        A, B = A - 0.01 * A.grad, B - 0.01 * B.grad
work(100, 0)
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    work(int(line), 1)
    print(time.perf_counter() - began, flush=True)
"""


def cell(steps, r, seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10))
    apply_lora(model, r=r, alpha=16)
    x, y = torch.randn(512, 256), torch.randint(10, (512,))
    return [step.loss for step in train(model, Batches(x, y, batch_size=64, seed=seed), steps=steps, lr=1e-3)][-1]


def timed(jobs, steps, cells, folder):
    began = time.perf_counter()
    table = sweep(cell, {"steps": [steps], "r": [8]}, range(cells), n_jobs=jobs, folder=folder, progress=False)
    seconds = time.perf_counter() - began
    return seconds, statistics.median(table.seconds), table.seconds.sum() / jobs / seconds


class Plain:
    """Two bare processes that wait for work."""

    def __init__(self):
        self.both = [
            subprocess.Popen([sys.executable, "-c", PLAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            for _ in range(2)
        ]
        for process in self.both:
            process.stdout.readline()

    def seconds(self, steps, which):
        began = time.perf_counter()
        for process in which:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        for process in which:
            process.stdout.readline()
        return time.perf_counter() - began

    def ceiling(self, steps):
        return 2 * self.seconds(steps, self.both[:1]) / self.seconds(steps, self.both)

    def close(self):
        for process in self.both:
            process.stdin.close()
            process.wait()


def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return middle, low, high


def main():
    asked = options(__doc__, rounds=("rounds", 5), cells=("cells per sweep", 8), steps=("training steps per cell", 800))
    if asked.quick:
        asked.rounds, asked.cells, asked.steps = 1, 4, 50
    random.seed(0)
    found = machine("torch", "joblib") | {"rounds": asked.rounds, "cells": asked.cells, "steps": asked.steps}
    plain = Plain()
    took = {name: [] for name in ("one", "two", "again", "cell", "cell_of_two", "busy", "ceiling")}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, asked.rounds):
            for name in random.sample(["one", "two", "again"], 3):
                jobs, steps = (2 if name == "two" else 1), (asked.steps if number >= 0 else 20)
                seconds, inside, busy = timed(jobs, steps, asked.cells, Path(folder, f"{number}-{name}"))
                if number >= 0:  # the round before the first starts the workers
                    took[name].append(seconds)
                    if name != "again":
                        took["cell" if name == "one" else "cell_of_two"].append(inside)
                    if name == "two":
                        took["busy"].append(busy)
            if number >= 0:
                took["ceiling"].append(plain.ceiling(2 * asked.steps))
    plain.close()
    speedup, low, high = quartiles([one / two for one, two in zip(took["one"], took["two"], strict=True)])
    _, again_low, again_high = quartiles([one / two for one, two in zip(took["one"], took["again"], strict=True)])
    row = {
        "cells": asked.cells, "cell_s": statistics.median(took["cell"]), "cell_s_of_two": statistics.median(took["cell_of_two"]),
        "one_s": statistics.median(took["one"]), "two_s": statistics.median(took["two"]), "speedup": speedup, "speedup_q1": low,
        "speedup_q3": high, "again_q1": again_low, "again_q3": again_high, "ceiling": statistics.median(took["ceiling"]),
        "busy": statistics.median(took["busy"]),
    }
    show([row], found)
    save(asked.out, "sweep", [row], found)


if __name__ == "__main__":
    main()
