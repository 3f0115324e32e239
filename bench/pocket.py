"""How good is a small GPT-2 once it is adapted? LoRA on data to text for --minutes, then the test meanings, greedily, and BLEU.

The model is the pocket model, or --model FOLDER. The task is E2E where it can be had (LORA_LAB_DATA), else the lab's lighthouses. Beside it
stand the floors that no model is needed for (a hand template; the nearest training example with its names swapped) and, with --full 1, full
fine-tuning of the same model for the same minutes. The number of steps follows from the speed of the first ones, because the learning rate
falls in a line to the last step. Then, of every author in --authors FOLDER (name.txt or name/*.txt: text that the model has never
seen), the base model's bits per byte.
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from _report import machine, options, save, show

from lora_lab.corpus import encode
from lora_lab.data_to_text import from_template, load_task, nearest_neighbour
from lora_lab.fine_tune import POCKET, fine_tune, write
from lora_lab.gpt2 import load_gpt2
from lora_lab.pretrain import bits_per_byte
from lora_lab.train import bf16_is_fast

CALIBRATION = 30  # steps, of which the first are slow
PRECISION = "bf16" if bf16_is_fast() else "fp32"


def full_fine_tuning(model, tokenizer, task, steps):
    """The same batches, schedule and loss; every weight trained, at the lr that is usual for it."""
    from lora_lab.data_to_text import TextBatches
    from lora_lab.data_to_text import encode as examples
    from lora_lab.train import linear_schedule, token_loss, train

    batches = TextBatches(examples(task.train, tokenizer, model.config.n_positions), POCKET.batch_size, pad=tokenizer.eos_token_id)
    return train(model, batches, steps, linear_schedule(1e-3, steps, min(POCKET.warmup, steps // 10)), loss=token_loss(0.0), seed=0, device="cpu",
                 precision=PRECISION)


def lora(model, tokenizer, task, steps):
    return fine_tune(model, tokenizer, task, POCKET, steps=steps, device="cpu", precision=PRECISION)


def steps_for(seconds, begin, name, task):
    """How many steps fit, judged by a few steps of a model that is thrown away."""
    model, tokenizer = load_gpt2(name)
    took, last = [], time.perf_counter()
    for _ in islice(begin(model, tokenizer, task, CALIBRATION), CALIBRATION):
        took.append(time.perf_counter() - last)
        last = time.perf_counter()
    return max(CALIBRATION, round(seconds / float(np.mean(took[3:]))))


def adapt(who, begin, name, task, meanings, seconds):
    steps = steps_for(seconds, begin, name, task)
    model, tokenizer = load_gpt2(name)
    began, losses = time.perf_counter(), []
    for step in begin(model, tokenizer, task, steps):
        losses.append(step.loss)
        if step.step % 200 == 0:
            print(f"{who}: step {step.step} of {steps}, loss {sum(losses[-100:]) / len(losses[-100:]):.3f}", flush=True)
    trained = time.perf_counter() - began
    found = {"who": who, "steps": steps, "minutes": trained / 60, "loss": sum(losses[-100:]) / len(losses[-100:])}
    return found | figures(task, meanings, write(model, tokenizer, meanings, POCKET)), model, tokenizer


def figures(task, meanings, texts):
    return {key: value for key, value in task.score(meanings, texts).items() if isinstance(value, (int, float))}


def unseen(folder, model, tokenizer, most):
    """(author, bits per byte) over the first `most` tokens of each."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    size = np.array([len(plain.id_to_token(i)) for i in range(plain.get_vocab_size())])
    size[tokenizer.eos_token_id] = 0
    for path in sorted(folder.iterdir()):
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.suffix == ".txt" else []
        if files:
            stream = encode(plain, [file.read_text(encoding="utf-8") for file in files])[:most]
            bits, bytes_ = bits_per_byte(model, [stream], size, model.config.n_positions)[0]
            yield path.stem, float(bits / bytes_)


def main():
    asked = options(__doc__, minutes=("minutes of training", 10), meanings=("test meanings; 0: all", 0), full=("1: also full fine-tuning", 0),
                    threads=("threads of torch", 2))
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--authors", type=Path)
    own, _ = parser.parse_known_args()
    torch.set_num_threads(asked.threads)
    task = load_task("lighthouses" if asked.quick else "auto")
    meanings = list(dict.fromkeys(example.meaning for example in task.test))
    meanings = meanings[: 4 if asked.quick else asked.meanings or None]
    seconds = 0 if asked.quick else 60 * asked.minutes
    rows = [{"who": "template", "steps": 0, "minutes": 0.0, "loss": None} | figures(task, meanings, from_template(task, meanings))]
    if not asked.quick:
        rows.append({"who": "nearest", "steps": 0, "minutes": 0.0, "loss": None}
                    | figures(task, meanings, nearest_neighbour(task, meanings)))
    row, model, tokenizer = adapt("LoRA", lora, own.model, task, meanings, seconds)
    rows.append(row)
    for meaning, text in list(zip(meanings, write(model, tokenizer, meanings[:3], POCKET), strict=False)):
        print(f"{meaning}\n    {text}")
    if asked.full:
        rows.append(adapt("full", full_fine_tuning, own.model, task, meanings, seconds)[0])
    found = machine("torch", "transformers", "sacrebleu") | {"task": task.name, "meanings": len(meanings), "model": str(own.model), "precision": PRECISION}
    if own.authors:
        model, tokenizer = load_gpt2(own.model)
        found["unseen_authors"] = {name: round(bits, 3) for name, bits in unseen(own.authors, model, tokenizer, 500 if asked.quick else 20_000)}
    show(rows, found)
    save(asked.out, "pocket", rows, found)


if __name__ == "__main__":
    main()
