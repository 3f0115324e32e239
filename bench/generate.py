"""From nothing to the first sentence of GPT-2, each in a fresh process; then tokens a second, one by one and in batches.

The model is the pocket model, or --model NAME (as load_gpt2 takes it). The peer is transformers' own way: from_pretrained on the same
folder and `generate` on one prompt. Wall time and the process's peak memory count everything, `import torch` included; `import torch`
alone is the line to compare with. Medians of --rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from _report import machine, options, save, show

CHILD = """
import json, sys, time
began = time.perf_counter()
{body}
try:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
except ImportError:  # Windows
    peak = float("nan")
print(json.dumps([time.perf_counter() - began, time.process_time(), peak]))
"""
PROMPT = "The old man opened the door and"
LINES = {
    "import torch": "import torch",
    "load_gpt2, 40 tokens": """
from lora_lab.gpt2 import generate, load_gpt2
model, tokenizer = load_gpt2({name!r})
generate(model, tokenizer, {prompt!r}, 40)""",
    "transformers, 40 tokens": """
from lora_lab.gpt2_files import gpt2_folder
from transformers import AutoTokenizer, GPT2LMHeadModel
folder = gpt2_folder({name!r})
model, tokenizer = GPT2LMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer({prompt!r}, return_tensors="pt")
tokenizer.decode(model.generate(**ids, max_new_tokens=40, do_sample=False)[0])""",
}


def first_sentence(line, name):
    code = CHILD.format(body=LINES[line].format(name=name, prompt=PROMPT))
    child = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(f"{line!r} failed: {child.stderr.strip().splitlines()[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def speed(name, batch_size, strategy, prompts):
    from lora_lab.gpt2 import generate, load_gpt2, token_ids

    model, tokenizer = load_gpt2(name)
    began = time.perf_counter()
    texts = generate(model, tokenizer, prompts, 40, strategy, batch_size=batch_size)
    seconds = time.perf_counter() - began
    return sum(len(token_ids(tokenizer, text)) for text in texts) / seconds


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default="pocket")
    name = parser.parse_known_args()[0].model
    asked = options(__doc__, rounds=("rounds", 3))
    found = machine("torch", "transformers", "tokenizers") | {"model": name}
    rows = []
    for line in LINES:
        wall, processor, peak = zip(*(first_sentence(line, name) for _ in range(1 if asked.quick else asked.rounds)), strict=True)
        rows.append({
            "fresh process": line, "wall_s": statistics.median(wall), "processor_s": statistics.median(processor),
            "peak_MB": statistics.median(peak),
        })
    show(rows, found)
    save(asked.out, "generate", rows, found)
    words = "the cat sat on a mat and looked at the moon while the rain fell over the old house by the river".split()
    prompts = [" ".join(words[: 2 + i % len(words)]) for i in range(4 if asked.quick else 32)]
    speeds = [
        {"prompts": len(prompts), "strategy": strategy, "batch": size, "tokens_per_s": speed(name, size, strategy, prompts)}
        for strategy in ("greedy", "beam")
        for size in (1, 16)
    ]
    show(speeds, found)
    save(asked.out, "generate_speed", speeds, found)


if __name__ == "__main__":
    main()
