"""A training step with LoRA: ours beside peft and loralib, interleaved in one run, float32.

A step is forward, backward (to the input, too) and fused AdamW on the factors. Cases: one nn.Linear(d, d), and whole GPT-2s
with random weights, of 4 layers x 256 (8 x 128 tokens, 4,096 words) and 12 x 768 (2 x 64 tokens, 50,257 words), adapted on
c_attn, on all four linear layers, or on q and v of c_attn alone (loralib's MergedLinear; peft has nothing like it).

`ratio` is a contestant's time over ours, formed within a round; the table shows its median and quartiles q1, q3. `again` is
the control, ours once more: a ratio between its quartiles means nothing. `frozen` is the model without LoRA, gradients still
flowing through it to the input, no optimizer; `over_frozen` is the time over that, in percent. `kept_MB` is what the graph
holds for the backward pass besides parameters; `peak_MB` the most that tensors took during a step, beyond what was there
before it. 1 MB is 10^6 bytes. With one thread, `ms` is processor time, which other work on the machine disturbs less than it
does the clock on the wall; with more threads it is the latter.
"""

import copy
import os
import random
import statistics
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks on stderr; read when torch is imported

import loralib
import peft
import torch
from _report import machine, options, save, show
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from lora_lab import apply_lora

MODELS = {"4x256": (4, 256, 4, 4096, (8, 128)), "12x768": (12, 768, 12, 50257, (2, 64))}  # layers, width, heads, words, tokens
LINEAR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
TARGETS = {"c_attn": ["c_attn"], "all linear": LINEAR, "c_attn:q,v": ["c_attn:q,v"]}
ALPHA = 16


class Contestant:
    """A model, the function that calls it, and its optimizer: everything a step needs."""

    def __init__(self, model, forward):
        self.model, self.forward = model.train(), forward
        factors = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(factors, lr=1e-4, fused=True) if factors else None

    def step(self):
        self.forward(self.model)
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def kept(self):
        """Bytes that the forward pass holds for the backward pass, parameters aside, each storage once."""
        own, held = {p.untyped_storage().data_ptr() for p in self.model.parameters()}, {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            self.step()
        return sum(held.values())

    def peak(self):
        """The highest sum of torch's allocations minus releases during one step, in bytes."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        # The events by time; the public table sums them up per operation, where a peak can't be seen.
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        level = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return peak


def twin(model):
    """A copy with the same, frozen, parameters: five GPT-2s in the memory of one."""
    return copy.deepcopy(model.requires_grad_(False), {id(p): p for p in model.parameters()})


def in_loralib(model, targets, r):
    """loralib has no function for this: its layers are put in by hand, on the same weights."""
    for name, module in list(model.named_modules()):
        target = next((t for t in targets if name.endswith(t.partition(":")[0])), None)
        if target is None:
            continue
        transposed = not isinstance(module, nn.Linear)
        inputs, out = module.weight.shape if transposed else reversed(module.weight.shape)
        shared = {"r": r, "lora_alpha": ALPHA, "fan_in_fan_out": transposed, "merge_weights": False}
        layer = loralib.MergedLinear(inputs, out, enable_lora=[True, False, True], **shared) if ":" in target else loralib.Linear(
            inputs, out, **shared)
        layer.weight, layer.bias = module.weight, module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def contestants(model, targets, r, forward):
    # peft warns that Conv1D stores its weight transposed, unless told so beforehand
    transposed = any(hasattr(module, "nf") for module in model.modules())
    found = {
        "ours": apply_lora(twin(model), r=r, alpha=ALPHA, target_modules=targets),
        "again": apply_lora(twin(model), r=r, alpha=ALPHA, target_modules=targets),
        "loralib": in_loralib(twin(model), targets, r),
        "frozen": twin(model),
    }
    if not any(":" in t for t in targets):
        config = peft.LoraConfig(r=r, lora_alpha=ALPHA, target_modules=targets, fan_in_fan_out=transposed)
        found["peft"] = peft.get_peft_model(twin(model), config)
    return {name: Contestant(m, forward) for name, m in found.items()}


def one_layer(d, r, tokens):
    x, grad = torch.randn(1, tokens, d, requires_grad=True), torch.randn(1, tokens, d)

    def forward(model):
        model(x).backward(grad)
        x.grad = None

    return contestants(nn.Sequential(nn.Linear(d, d)), ["0"], r, forward)


def whole_model(name, targets, r=8):
    layers, width, heads, words, tokens = MODELS[name]
    # without dropout, which would cost everybody the same and blur the difference
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=words, n_positions=128, resid_pdrop=0.0,
                                       embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    ids = torch.randint(words, tokens)
    x = model.transformer.wte(ids).detach().requires_grad_()

    def forward(model):
        model(inputs_embeds=x, labels=ids).loss.backward()
        x.grad = None

    return contestants(model, targets, r, forward)


def seconds(step, least, clock):
    """Per call: repeated until `least` seconds have gone by, so that the clock's grain does not matter."""
    calls, began = 0, clock()
    while True:
        step()
        calls += 1
        gone = clock() - began
        if gone >= least:
            return gone / calls


def compare(case, entered, rounds, least):
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    size = {name: (c.kept(), c.peak()) for name, c in entered.items()}  # warms up, too
    times = {name: [] for name in entered}
    for _ in range(rounds):
        for name in random.sample(list(entered), len(entered)):
            times[name].append(seconds(entered[name].step, least, clock))
    rows = []
    for name in sorted(entered, key=["ours", "again", "peft", "loralib", "frozen"].index):
        ratio = [a / b for a, b in zip(times[name], times["ours"], strict=True)]
        over = [100 * (a / b - 1) for a, b in zip(times[name], times["frozen"], strict=True)]
        low, _, high = statistics.quantiles(ratio, n=4, method="inclusive")
        rows.append({
            "case": case, "who": name, "ms": 1e3 * statistics.median(times[name]), "ratio": statistics.median(ratio), "q1": low, "q3": high,
            "over_frozen": statistics.median(over), "kept_MB": size[name][0] / 1e6, "peak_MB": size[name][1] / 1e6,
        })
    return rows


def summary(rows):
    """One sentence a peer: its median ratio over all cases, and the cases in which it was faster than the control's spread."""
    fastest = {row["case"]: row["q1"] for row in rows if row["who"] == "again"}
    for peer in ("peft", "loralib"):
        theirs = [row for row in rows if row["who"] == peer]
        ahead = [row["case"] for row in theirs if row["ratio"] < min(fastest[row["case"]], 1)]
        print(f"{peer} takes {statistics.median(row['ratio'] for row in theirs):.3g} of our time at the median of {len(theirs)} cases; "
              f"it was ahead of us beyond the control's spread in {len(ahead)}" + (": " + ", ".join(ahead) if ahead else ""))


def main():
    asked = options(__doc__, widths=("widths d of one layer", [256, 768, 1600]), ranks=("ranks r of one layer", [1, 8, 64]),
                    tokens=("tokens given to one layer", [64, 1024]), rounds=("rounds; whole models get half as many", 15), threads=("threads of torch", 1))
    settings = [(name, where) for name in MODELS for where in TARGETS]
    if asked.quick:
        asked.widths, asked.ranks, asked.tokens, asked.rounds, settings = [64], [8], [64], 2, [("4x256", "c_attn:q,v")]
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    random.seed(0)
    logging.set_verbosity_error()  # it remarks on a configuration without a loss
    found = machine("torch", "transformers", "peft", "loralib") | {"threads": asked.threads, "rounds": asked.rounds}
    rows = []
    for d in asked.widths:
        for r in asked.ranks:
            for tokens in asked.tokens:
                rows += compare(f"d={d} r={r} tokens={tokens}", one_layer(d, r, tokens), asked.rounds, 0.002 if asked.quick else 0.02)
    for name, where in settings:
        rows += compare(f"GPT-2 {name} {where}", whole_model(name, TARGETS[where]), max(2, asked.rounds // 2), 0)
    show(rows, found)
    summary(rows)
    save(asked.out, "layers", rows, found)


if __name__ == "__main__":
    main()
