"""factored_svd beside the dense SVD of the same update, one after the other in one run, float32.

Per round both get the same fresh factors, in random order; the ratio is formed within the round, the table shows its
median and its quartiles. `same` is the control: factored_svd against itself, by the same procedure; a ratio between the
quartiles of `same` would mean nothing. `off` is the largest difference of singular values over the largest one. The
dense time includes the product lora_B @ lora_A, without which there is nothing to decompose.
"""

import random
import statistics
import time

import torch
from _report import machine, options, save, show

from lora_lab.spectra import factored_svd


def dense_svd(lora_B, lora_A, scaling):
    return torch.linalg.svd(scaling * (lora_B @ lora_A), full_matrices=False)


def seconds(function, arguments, least):
    """Per call: repeated until `least` seconds have gone by, so that the clock's grain does not matter."""
    calls, began = 0, time.perf_counter()
    while True:
        function(*arguments)
        calls += 1
        gone = time.perf_counter() - began
        if gone >= least:
            return gone / calls


def compare(d, r, rounds, least):
    contestants = {"factored": factored_svd, "again": factored_svd, "dense": dense_svd}
    times = {name: [] for name in contestants}
    furthest = 0.0
    for number in range(rounds + 1):
        factors = torch.randn(d, r), torch.randn(r, d), 16 / r
        for name in random.sample(list(contestants), 3):
            times[name].append(seconds(contestants[name], factors, 0 if name == "dense" else least))
        if number == 0:  # the first round warms up, and checks
            S, wanted = factored_svd(*factors)[1], dense_svd(*factors)[1]
            furthest = ((S - wanted[: len(S)]).abs().max() / wanted[0]).item()
            times = {name: [] for name in contestants}
    ratio = [a / b for a, b in zip(times["dense"], times["factored"], strict=True)]
    same = [a / b for a, b in zip(times["again"], times["factored"], strict=True)]
    low, _, high = statistics.quantiles(ratio, n=4) if rounds > 1 else ratio * 3
    same_low, _, same_high = statistics.quantiles(same, n=4) if rounds > 1 else same * 3
    return {
        "d": d, "r": r, "dense_ms": 1e3 * statistics.median(times["dense"]),
        "factored_ms": 1e3 * statistics.median(times["factored"]), "ratio": statistics.median(ratio), "ratio_q1": low,
        "ratio_q3": high, "same_q1": same_low, "same_q3": same_high, "off": furthest,
    }


def main():
    asked = options(__doc__, sizes=("widths d of the square updates", [256, 768, 1024]), ranks=("ranks r", [1, 8, 64]),
                    rounds=("rounds", 7), threads=("threads of torch", 1))
    if asked.quick:
        asked.sizes, asked.rounds = [64], 2
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    random.seed(0)
    found = machine("torch") | {"threads": asked.threads, "rounds": asked.rounds}
    least = 0.002 if asked.quick else 0.02
    rows = [compare(d, r, asked.rounds, least) for d in asked.sizes for r in asked.ranks if r <= d]
    show(rows, found)
    save(asked.out, "spectra", rows, found)


if __name__ == "__main__":
    main()
