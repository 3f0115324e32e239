"""report(model) beside the same looked at layer by layer, and beside dense SVDs; and what it costs a training that samples it.

    report    lora_lab.report, ||W0|| known from an earlier call, as in a training that samples every few steps
    again     the control: report once more
    first     the first call on a model, which reads all of W0 once for its norm
    loop      factored_svdvals, norms and ranks of one layer after the other, ||W0|| known, too
    dense     the same numbers from torch.linalg.svdvals of ΔW (out, in): each shape once per round, times the number of its layers

48 matrices are those of GPT-2 (124 M): 12 blocks with c_attn, attn.c_proj, c_fc, mlp.c_proj; 16 those of 4 blocks of width 256. In a round
all take turns in random order; `ratio` is over report, formed within the round; the table has its median and quartiles. `off` is the
largest difference from the dense singular values over the largest of them. With one thread `ms` is processor time.

The rows "4x256 training" time steps of lora_lab.train on a GPT-2 of 4 blocks of width 256 and 4,096 words, 8 rows of 128 tokens, r=8 on all
linear layers, with a report after every tenth step; `share` is that of the reports in the whole.
"""

import random
import statistics
import time

import torch
from _report import machine, options, save, show
from torch import nn

from lora_lab import apply_lora, effective_rank, factored_svdvals, lora_layers, report, stable_rank
from lora_lab import reports as module

SHAPES = {"124M": (12, 768), "4x256": (4, 256)}


def now():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def matrices(blocks, d, r):
    model = nn.ModuleList(
        nn.ModuleDict({"c_attn": nn.Linear(d, 3 * d), "c_proj": nn.Linear(d, d), "c_fc": nn.Linear(d, 4 * d), "mlp_c_proj": nn.Linear(4 * d, d)})
        for _ in range(blocks)
    )
    apply_lora(model, r, 16)
    trained(model)
    return model


def trained(model):
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.02)


@torch.no_grad()
def loop(model, norms):
    found = []
    for name, layer in lora_layers(model).items():
        S = factored_svdvals(layer.full_B(), layer.lora_A, layer.scaling)
        found.append((name, S.tolist(), effective_rank(S).item(), stable_rank(S).item(), S.norm().item(), norms[name]))
    return found


@torch.no_grad()
def dense(model):
    """Seconds for all layers, and name -> singular values of one layer of each shape."""
    groups, found, seconds = {}, {}, 0.0
    for name, layer in lora_layers(model).items():
        groups.setdefault(layer.base_layer.weight.shape, []).append(name)
    for names in groups.values():
        layer = lora_layers(model)[names[0]]
        began = now()
        S = torch.linalg.svdvals(layer.delta_weight())
        effective_rank(S).item(), stable_rank(S).item(), S.norm().item()
        seconds += (now() - began) * len(names)
        found[names[0]] = S
    return seconds, found


def compare(case, r, rounds, with_dense):
    model = matrices(*SHAPES[case], r)
    norms = {row.module: row.norm_weight for row in report(model)}

    def first():
        module._NORMS.clear()
        report(model)

    contestants = {"report": lambda: report(model), "again": lambda: report(model), "first": first, "loop": lambda: loop(model, norms)}
    times = {name: [] for name in contestants} | ({"dense": []} if with_dense else {})
    off = 0.0
    for number in range(rounds + 1):
        trained(model)
        report(model)  # ||W0|| is known to all but `first`
        for name in random.sample(list(contestants), len(contestants)):
            began = now()
            contestants[name]()
            times[name].append(now() - began)
        if with_dense and number <= max(1, rounds // 4):
            seconds, wanted = dense(model)
            times["dense"].append(seconds)
            for name, S in wanted.items():
                found = torch.tensor(report(model)[name].S)
                off = max(off, ((found - S[: len(found)]).abs().max() / S[0]).item())
        if number == 0:  # warms up
            times = {name: [] if name != "dense" or rounds > 1 else kept for name, kept in times.items()}
    rows = []
    for name, taken in times.items():
        if not taken:
            continue
        ratio = [t / base for t, base in zip(taken, times["report"], strict=False)]
        low, middle, high = statistics.quantiles(ratio, n=4, method="inclusive") if len(ratio) > 1 else ratio * 3
        rows.append({
            "case": f"{case} {len(lora_layers(model))} matrices r={r}", "who": name, "ms": 1e3 * statistics.median(taken),
            "ratio": middle, "q1": low, "q3": high, "off": off, "share": float("nan"),
        })  # fmt: skip
    return rows


def training(steps):
    from transformers import GPT2Config, GPT2LMHeadModel

    from lora_lab.train import token_loss, train

    torch.manual_seed(0)
    blocks, width = SHAPES["4x256"]
    model = GPT2LMHeadModel(GPT2Config(n_layer=blocks, n_embd=width, n_head=4, vocab_size=4096, n_positions=128, bos_token_id=0, eos_token_id=0))
    apply_lora(model, 8, 16, ["c_attn", "c_proj", "c_fc"])
    tokens = torch.randint(4096, (8, 128))
    batch = {"input_ids": tokens, "labels": tokens}
    reports, began = [], None
    for step in train(model, [batch], steps + 2, lr=1e-4, loss=token_loss(), device="cpu", precision="fp32"):
        if step.step == 2:  # two to warm up
            report(model)
            began = now()
        elif step.step > 2 and (step.step - 2) % 10 == 0:
            start = now()
            report(model)
            reports.append(now() - start)
    whole = now() - began
    step_ms = 1e3 * (whole - sum(reports)) / steps
    nan = float("nan")
    return [
        {"case": "4x256 training", "who": "step", "ms": step_ms, "ratio": nan, "q1": nan, "q3": nan, "off": nan, "share": 1 - sum(reports) / whole},
        {"case": "4x256 training", "who": "report every 10", "ms": 1e3 * statistics.median(reports), "ratio": nan, "q1": nan, "q3": nan, "off": nan,
         "share": sum(reports) / whole},
    ]  # fmt: skip


def main():
    asked = options(__doc__, rounds=("rounds", 15), threads=("threads of torch", 2), dense=("also time dense SVDs, 0 or 1", 1),
                    steps=("training steps", 60))  # fmt: skip
    if asked.quick:
        asked.rounds, asked.steps = 1, 10
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    random.seed(0)
    found = machine("torch") | {"threads": asked.threads, "rounds": asked.rounds}
    rows = [] if asked.quick else compare("124M", 8, asked.rounds, asked.dense)
    rows += compare("4x256", 8, asked.rounds, asked.dense) + training(asked.steps)
    show(rows, found)
    save(asked.out, "reports", rows, found)


if __name__ == "__main__":
    main()
