"""Which way of adapting a small GPT-2 to data to text is worth what? One table: BLEU and slot errors of each way, over --seeds seeds.

The base is the pocket model, or --model FOLDER; the task E2E where it can be had (LORA_LAB_DATA), else the lab's lighthouses. The ways:
the frozen base; a linear probe (a fresh copy of the output head is trained); LoRA at r = 1, 4, 16, 64 on W_q and W_v, on all linear layers, and with
the embeddings; full fine-tuning; and LoRA on a base with random weights, the control that must fail. Every way trains the same --steps steps of 16
examples with the same seeds, and its learning rate is the best of three (a factor of 3 apart), by the loss on 256 validation examples after a
fifth of the steps with another seed. Finished cells are kept in --cells FOLDER: the same call goes on where it was.

Peak memory is the operating system's (VmHWM of the process, set back before training), so it counts Python and torch themselves, too.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

from _report import machine, options, save, show

WAYS = {  # name -> (r, target modules, learning rate that was found in shorter trials)
    "frozen": (0, None, None),
    "probe": (0, "head", 3e-3),
    "LoRA r=1 q,v": (1, "c_attn:q,v", 1e-2),
    "LoRA r=4 q,v": (4, "c_attn:q,v", 1e-2),
    "LoRA r=16 q,v": (16, "c_attn:q,v", 1e-2),
    "LoRA r=64 q,v": (64, "c_attn:q,v", 1e-2),
    "LoRA r=1 all linear": (1, "all-linear", 3e-3),
    "LoRA r=4 all linear": (4, "all-linear", 3e-3),
    "LoRA r=16 all linear": (16, "all-linear", 3e-3),
    "LoRA r=64 all linear": (64, "all-linear", 3e-3),
    "LoRA r=16 and embeddings": (16, "all and wte", 3e-3),
    "full fine-tuning": (0, "everything", 1e-3),
    "LoRA r=16 on a random base": (16, "all-linear", 3e-3),
}
LINEAR = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
BATCH, WARMUP = 16, 50


def base_for(way, model_name, seed):
    """(model, tokenizer) with that way's parameters, and only these, to be trained."""
    import copy

    import torch

    from lora_lab import apply_lora
    from lora_lab.gpt2 import load_gpt2

    model, tokenizer = load_gpt2(model_name)
    torch.manual_seed(seed)
    if "random base" in way:
        model = type(model)(model.config)
    r, what, _ = WAYS[way]
    if what == "everything":
        model.requires_grad_(True)
    elif what == "head":
        model.requires_grad_(False)
        model.lm_head = copy.deepcopy(model.lm_head)  # no longer the embedding's weight
        model.lm_head.requires_grad_(True)
    elif r:
        targets = {"all and wte": [*LINEAR, "wte"], "c_attn:q,v": ["c_attn:q,v"]}.get(what, what)
        apply_lora(model, r=r, alpha=2 * r, target_modules=targets, allow_tied=what == "all and wte")
    return model, tokenizer


def peak_megabytes() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def trained(way, model_name, task, lr, steps, seed, precision):
    """The model after a whole run; its tokenizer; minutes; peak MB."""
    from lora_lab.data_to_text import TextBatches, encode
    from lora_lab.train import linear_schedule, token_loss, train

    model, tokenizer = base_for(way, model_name, seed)
    batches = TextBatches(encode(task.train, tokenizer, model.config.n_positions), BATCH, seed=seed, pad=tokenizer.eos_token_id)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    began = time.perf_counter()
    rate = linear_schedule(lr, steps, min(WARMUP, steps // 10))
    for _ in train(model, batches, steps, rate, loss=token_loss(), seed=seed, device="cpu", precision=precision):
        pass
    return model, tokenizer, (time.perf_counter() - began) / 60, peak_megabytes()


def validation_loss(model, tokenizer, task, precision, count=256):
    import torch

    from lora_lab.data_to_text import encode, tensors
    from lora_lab.train import token_loss

    examples, loss, sum_, tokens = encode(task.validation[:count], tokenizer, model.config.n_positions), token_loss(), 0.0, 0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for at in range(0, len(examples), 32):
            batch = tensors(examples[at : at + 32], tokenizer.eos_token_id)
            here = int((batch["labels"][:, 1:] != -100).sum())
            sum_, tokens = sum_ + here * float(loss(model, batch)), tokens + here
    return sum_ / tokens


def try_rate(way: str, model: str, lr: float, steps: int, precision: str, seed: int) -> dict:
    from lora_lab.data_to_text import load_task
    from lora_lab.train import TrainingDiverged

    task = load_task()
    try:
        adapted, tokenizer, _, _ = trained(way, model, task, lr, steps, seed, precision)
    except TrainingDiverged:
        return {"loss": math.inf}
    return {"loss": validation_loss(adapted, tokenizer, task, precision)}


def run(way: str, model: str, lr: float, steps: int, meanings: int, precision: str, seed: int) -> dict:
    from lora_lab import count_parameters
    from lora_lab.data_to_text import load_task
    from lora_lab.fine_tune import POCKET, write

    task = load_task()
    if way == "frozen":
        (adapted, tokenizer), minutes, peak = base_for(way, model, seed), 0.0, math.nan
        adapted.requires_grad_(False)
    else:
        adapted, tokenizer, minutes, peak = trained(way, model, task, lr, steps, seed, precision)
    asked = list(dict.fromkeys(example.meaning for example in task.test))[: meanings or None]
    began = time.perf_counter()
    texts = write(adapted, tokenizer, asked, POCKET, batch_size=64)
    return {
        "trainable": count_parameters(adapted).trainable, "minutes": minutes, "peak_mb": peak, "writing": (time.perf_counter() - began) / 60,
        "loss": validation_loss(adapted, tokenizer, task, precision), **task.score(asked, texts), "bytes": saved_bytes(adapted, way),
    }


def saved_bytes(model, way) -> int:
    """What has to be kept for this task beside the base: an adapter's file, or what was trained, in fp32."""
    from lora_lab.state import adapter_bytes

    if WAYS[way][0]:
        return adapter_bytes(model)
    return sum(4 * p.numel() for p in model.parameters() if p.requires_grad)


def main():
    asked = options(__doc__, steps=("training steps", 600), seeds=("seeds", 3), meanings=("test meanings; 0: all", 0), jobs=("processes", 2))
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--cells", type=Path, default=Path(".lora-lab", "bench-data-to-text"))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    own, _ = parser.parse_known_args()
    from lora_lab.data_to_text import load_task
    from lora_lab.sweep import sweep

    if asked.quick:
        asked.steps, asked.seeds, asked.meanings, own.ways = 10, 1, 4, ["frozen", "LoRA r=4 q,v"]
    ways, trying = [w for w in own.ways if w != "frozen"], max(asked.steps // 5, 10)
    grid = [
        {"way": way, "model": own.model, "lr": WAYS[way][2] * factor, "steps": trying, "precision": own.precision}
        for way in ways for factor in ((1,) if asked.quick else (1 / 3, 1, 3))
    ]
    tried = sweep(try_rate, grid, seeds=[100], n_jobs=asked.jobs, folder=own.cells / "rates")
    best = {way: float(rows.loc[rows["loss"].idxmin(), "lr"]) for way, rows in tried.groupby("way")}
    edge = [way for way in ways if not asked.quick and not math.isclose(best[way], WAYS[way][2])]
    grid = [
        {"way": way, "model": own.model, "lr": best.get(way, 0.0), "steps": asked.steps, "meanings": asked.meanings, "precision": own.precision}
        for way in own.ways
    ]
    # seed by seed, so that a run that is stopped has whole rows of the table
    for seed in range(asked.seeds):
        table = sweep(run, grid, seeds=range(seed + 1), n_jobs=asked.jobs, folder=own.cells / "runs")
    rows = []
    for way in own.ways:
        cells = table[(table["way"] == way) & (table["status"] == "done")]
        spread = statistics.stdev(cells["bleu"]) if len(cells) > 1 else math.nan
        rows.append(
            {"way": way, "lr": best.get(way), "trainable": int(cells["trainable"].iloc[0]), "minutes": float(cells["minutes"].mean()),
             "BLEU": float(cells["bleu"].mean()), "+-": spread, "slot errors %": float(cells["slot_error_rate"].mean()),
             "loss": float(cells["loss"].mean()), "peak MB": float(cells["peak_mb"].mean()), "bytes kept": int(cells["bytes"].iloc[0])}
        )
    found = machine("torch", "transformers", "sacrebleu") | {
        "task": load_task().name, "steps": asked.steps, "batch": BATCH, "seeds": asked.seeds, "precision": own.precision, "jobs": asked.jobs,
        "rate_not_in_the_middle": ", ".join(edge) or "none",
    }
    show(rows, found)
    save(asked.out, "data_to_text", rows, found)


if __name__ == "__main__":
    main()
