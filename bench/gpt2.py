"""Fine-tuning a GPT-2 with LoRA: our loop beside peft's layers in it, transformers' Trainer, and full fine-tuning, in one run.

    ours       lora_lab's layers in lora_lab.train
    again      the control, ours once more: a ratio between its quartiles means nothing
    peft       peft's layers in lora_lab.train (not for q and v alone: peft has nothing like it)
    trainer    peft's layers in transformers' Trainer with its default arguments (fp32; its progress bar is off)
    trainer*   the same, told to use the precision that ours chose, where that is not fp32
    full       every weight trained, in lora_lab.train
    frozen     no LoRA and no optimizer, the gradient flowing down to the embedded input: what no adapter can go below

Weights are random, batches are full (no padding), dropout is off, all use AdamW. Without arguments: on a GPU the shape of GPT-2 (124 M), 8 and
32 rows of 512 tokens; on a CPU a small model. Figures from a GPU are still missing in docs/results.md.

`ratio` is a contestant's time over ours, formed within a round; the table shows its median and quartiles. `utilisation` is the share of the
arithmetic that a large matrix product reaches on the same device in the same precision, of the arithmetic a step needs: per token forward
2 N + 4 L T d (N: weights that multiply, the output head among them), as much again back to the input, and 2 N again for the trained weights.
With one thread of a CPU, `ms` is processor time, as in layers.py.
`peak_MB` is the most that tensors took during steps, weights included, each contestant alone; 1 MB is 10^6 bytes.
"""

import gc
import os
import random
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks on stderr; read when torch is imported

import peft
import torch
from _report import machine, options, save, show
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from lora_lab import apply_lora
from lora_lab.train import choose_device, choose_precision, token_loss, train
from lora_lab.updates import PRECISIONS

SHAPES = {"124M": (12, 768, 12, 50257), "4x256": (4, 256, 4, 4096)}  # layers, width, heads, words
LINEAR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
TARGETS = {"q,v": ["c_attn:q,v"], "all linear": LINEAR}
WARM = 2  # steps before the clock starts


def now(device):
    """Seconds, when all that was asked of the device is done. On one thread of a CPU processor time, which other work disturbs less."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


class Setting:
    """One row of the table's `case`: a shape, a batch, a rank, where the adapters are."""

    def __init__(self, shape, rows, tokens, r, where, device, precision):
        self.case = f"{shape} {rows}x{tokens} r={r} {where}"
        self.layers, self.width, self.heads, self.words = SHAPES[shape]
        self.rows, self.tokens, self.r, self.where, self.device, self.precision = rows, tokens, r, where, device, precision
        ids = torch.randint(self.words, (rows, tokens))
        self.batch = {"input_ids": ids, "labels": ids}

    def base(self):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(
            n_layer=self.layers, n_embd=self.width, n_head=self.heads, vocab_size=self.words, n_positions=max(self.tokens, 64), resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
        ))

    def contestants(self):
        yield from ("ours", "again")
        if self.where != "q,v":
            yield "peft"
            yield "trainer"
            if self.precision != "fp32":
                yield "trainer*"
        yield from ("full", "frozen")

    def model(self, who):
        base = self.base()
        if who in ("ours", "again"):
            return apply_lora(base, r=self.r, alpha=2 * self.r, target_modules=TARGETS[self.where])
        if who == "full":
            return base
        if who == "frozen":
            return base.requires_grad_(False)
        # fan_in_fan_out: GPT-2's layers store their weights transposed, of which peft would warn
        return peft.get_peft_model(base, peft.LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules=LINEAR, fan_in_fan_out=True))

    def flops(self, model, who):
        """Of one step, by the formula above."""
        matrices = self.layers * 12 * self.width**2 + self.words * self.width
        per_token = 2 * matrices + 4 * self.layers * self.tokens * self.width
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        there_and_back = 2 * per_token
        if who == "full":
            extra = per_token
        else:
            extra = 6 * trained  # forward, back to the input, back to the factors
        return self.rows * self.tokens * (there_and_back + extra)

    def runner(self, who, model):
        """A function of a number of steps that returns the seconds of one step, the first ones left out."""
        if who == "frozen":
            return lambda steps: self._frozen(model, steps)
        if who.startswith("trainer"):
            # a new model each time: what accelerate puts around one, it puts there only once
            return lambda steps: self._trainer(self.model(who), steps, exact=who == "trainer")
        return lambda steps: self._ours(model, steps)

    def _ours(self, model, steps):
        run = train(model, [self.batch], WARM + steps, 1e-4, loss=token_loss(), device=self.device, precision=self.precision)
        began = None
        for done in run:
            if done.step == WARM:
                began = self._now()
        return (self._now() - began) / steps

    def _frozen(self, model, steps):
        model.to(self.device).train()
        ids = self.batch["input_ids"].to(self.device)
        for step in range(WARM + steps):
            if step == WARM:
                began = self._now()
            x = model.transformer.wte(ids).detach().requires_grad_()
            with torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"):
                logits = model(inputs_embeds=x).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
        return (self._now() - began) / steps

    def _trainer(self, model, steps, exact):
        marks = []
        device = self.device

        class Marks(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step in (WARM, WARM + steps):
                    marks.append(now(device))

        rows = [{key: value[i] for key, value in self.batch.items()} for i in range(self.rows)] * (WARM + steps)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = {} if exact else {"bf16": self.precision == "bf16", "fp16": self.precision == "fp16"}
            arguments = TrainingArguments(
                folder, per_device_train_batch_size=self.rows, max_steps=WARM + steps, report_to="none", disable_tqdm=True, save_strategy="no",
                logging_strategy="no", use_cpu=self.device.type == "cpu", **told,
            )
            trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Marks()])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return (marks[1] - marks[0]) / steps

    def _now(self):
        return now(self.device)


def peak_bytes(run, model, device):
    """The most that tensors took while `run` made two steps, the model's weights included. model: None if `run` makes its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run(2)
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(2)
    level = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak + sum(p.nbytes for p in model.parameters()) if model is not None else peak


def attainable(device, precision, seconds):
    """FLOP/s of a large matrix product on this device."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=PRECISIONS[precision] or torch.float32)
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until or not best:
        began = now(device)
        for _ in range(4):
            a @ a
        best = max(best, 4 * 2 * n**3 / (now(device) - began))
    return best


def compare(setting, rounds, steps, ceiling):
    size, work, runs = {}, {}, {}
    for who in setting.contestants():
        gc.collect()
        model = setting.model(who)
        work[who] = setting.flops(model, who)
        if who.startswith("trainer"):
            model = None
        size[who] = peak_bytes(setting.runner(who, model), model, setting.device)
        if model is not None and setting.device.type == "cuda":
            model = model.cpu()  # out of the way of the next one's memory
        runs[who] = setting.runner(who, model)
    times = {who: [] for who in runs}
    for _ in range(rounds):
        for who in random.sample(list(runs), len(runs)):
            times[who].append(runs[who](steps))
    rows = []
    for who, taken in times.items():
        ratio = [a / b for a, b in zip(taken, times["ours"], strict=True)]
        low, _, high = statistics.quantiles(ratio, n=4, method="inclusive") if len(ratio) > 1 else (ratio[0],) * 3
        seconds = statistics.median(taken)
        # a Trainer left at its defaults calculates in fp32, and is measured against the same ceiling
        rows.append({
            "case": setting.case, "who": who, "ms": 1e3 * seconds, "tokens_per_s": setting.rows * setting.tokens / seconds,
            "ratio": statistics.median(ratio), "q1": low, "q3": high, "utilisation": work[who] / seconds / ceiling, "peak_MB": size[who] / 1e6,
        })
    return rows


def main():
    device = choose_device()
    gpu = device.type == "cuda"
    asked = options(
        __doc__, rows=("rows of a batch", [8, 32] if gpu else [8]), tokens=("tokens of a row", [512] if gpu else [64]),
        ranks=("ranks r", [4, 64]), rounds=("rounds", 7), steps=("steps a round", 20 if gpu else 3), threads=("threads of torch on a CPU", 1),
        bf16=("1: bf16 on a CPU, too", 0),
    )
    shapes, where = ["124M" if gpu else "4x256"], list(TARGETS)
    if asked.quick:
        asked.rows, asked.tokens, asked.ranks, asked.rounds, asked.steps, where = [2], [16], [4], 2, 1, ["all linear"]
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    random.seed(0)
    logging.set_verbosity_error()
    precision = "bf16" if asked.bf16 else choose_precision("auto", device)
    ceiling = attainable(device, precision, 0.1 if asked.quick else 2)
    found = machine("torch", "transformers", "peft", "accelerate") | {
        "device": torch.cuda.get_device_name() if gpu else "cpu", "threads": asked.threads, "precision": precision, "rounds": asked.rounds,
        "attainable_TFLOPs": ceiling / 1e12,
    }
    rows = []
    for shape in shapes:
        for count in asked.rows:
            for tokens in asked.tokens:
                for r in asked.ranks:
                    for target in where:
                        rows += compare(Setting(shape, count, tokens, r, target, device, precision), asked.rounds, asked.steps, ceiling)
    show(rows, found)
    save(asked.out, "gpt2", rows, found)


if __name__ == "__main__":
    main()
