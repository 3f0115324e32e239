"""The memory that the ledger predicts for a training step beside what the operating system counts, each case in a process of its own.

`predicted` comes from shapes alone (lora_lab/ledger.py). `measured` is the highest resident memory of the process (VmHWM in /proc; Linux only)
minus what was resident after the imports and a step of a tiny model, over three steps with AdamW in float32. `ratio` is predicted over
measured. What the prediction leaves out is the allocator's: freed blocks that are too small or too scattered to go back to the system, and
the matrix library's work space.
"""

import json
import subprocess
import sys

from _report import machine, options, save, show

# shape, batch, context, targets; None: full fine-tuning
POCKET = [(b, t, targets) for b, t in ((4, 128), (8, 256), (16, 256)) for targets in (None, ["c_attn:q,v"], "all-linear")]
GPT2 = [(b, t, targets) for b, t in ((1, 128), (2, 256)) for targets in (None, ["c_attn:q,v"], "all-linear")]


def step_memory(name, batch, context, targets, steps=3, dropout=0.0, checkpointing=False):
    """In this process: bytes above the baseline at the highest point of `steps` training steps."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    from lora_lab import apply_lora
    from lora_lab.presets import preset

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = {"n_layer": "layers", "n_embd": "d_model", "n_head": "heads", "vocab_size": "vocab", "n_positions": "context"}

    def train(a, batch, context, targets, steps):
        numbers = {theirs: getattr(a, ours) for theirs, ours in names.items()}
        activation = "gelu_new" if a.activation == "gelu_new" else "gelu_pytorch_tanh"
        model = GPT2LMHeadModel(
            GPT2Config(**numbers, activation_function=activation, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False,
                       bos_token_id=0, eos_token_id=0)
        ).train()  # fmt: skip
        if targets:
            apply_lora(model, 8, 16, targets)
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for _ in range(steps):
            ids = torch.randint(0, a.vocab, (batch, context))
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    tiny = preset("pocket").changed(layers=1, d_model=16, heads=2, vocab=64, context=context, dropout=dropout)
    train(tiny, 1, context, targets, 1)  # lazy imports, thread stacks, the matrix library's first buffers
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark begins anew
    train(preset(name), batch, context, targets, steps)
    return _status("VmHWM") - before


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measured(name, batch, context, targets, **more):
    """The same in a fresh process."""
    asked = json.dumps({"name": name, "batch": batch, "context": context, "targets": targets, **more})
    done = subprocess.run([sys.executable, __file__, "--child", asked], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.split()[-1])


def predicted(name, batch, context, targets, dropout=0.0, checkpointing=False):
    from lora_lab import apply_lora
    from lora_lab.ledger import training_memory
    from lora_lab.presets import preset

    model = preset(name).changed(dropout=dropout).build()
    if targets:
        apply_lora(model, 8, 16, targets)
    return training_memory(model, batch, context, checkpointing=checkpointing)


def main():
    asked = options(__doc__, steps=("training steps", 3))
    cases = [("pocket", *case) for case in POCKET] + [("gpt2", *case) for case in GPT2]
    rows = []
    for name, batch, context, targets in cases[:2] if asked.quick else cases:
        guess, found = predicted(name, batch, context, targets), measured(name, batch, context, targets, steps=asked.steps)
        rows.append({
            "model": name, "batch": batch, "context": context, "trains": "all" if targets is None else "".join(targets),
            "predicted_MB": guess.peak / 1e6, "measured_MB": found / 1e6, "ratio": guess.peak / found, "when": guess.moment,
        })  # fmt: skip
    here = machine("torch", "transformers")
    show(rows, here)
    save(asked.out, "ledger", rows, here)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(step_memory(**json.loads(sys.argv[2])))
    else:
        main()
