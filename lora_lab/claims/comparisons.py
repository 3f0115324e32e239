"""LoRA beside other things, and libraries beside one another."""

from __future__ import annotations

from functools import cache

import torch

from ..adapt import apply_lora, lora_disabled, lora_layers, remove_lora
from ..counting import conv_parameters, count_parameters
from ..data import sherlock_holmes
from ..layers import LoRAConv2d
from ..presets import meta_model
from ..train import train
from .bench import SEEDS, accuracy, adapted, pretrained, tuned, turned, upright
from .court import Finding
from .training import noisy

SECRETS = ("7291", "4086")
RANKS = (1, 2, 4, 8)


def conv(otherwise: bool) -> Finding:
    """LoRA's numbers for a Conv2d as loralib lays it out, over ours and peft's. Otherwise: a 1 x 1 convolution."""
    k = 1 if otherwise else 3
    ours = count_parameters(LoRAConv2d(torch.nn.Conv2d(16, 32, k, bias=False), 4, 8)).trainable
    return Finding({f"16 → 32, {k} × {k}, r = 4": [conv_parameters(16, 32, k, 4, "loralib") / ours]}, 1.01, "below", "numbers, loralib over peft")


def seven_b(otherwise: bool) -> Finding:
    """LoRA's numbers on q, k, v and o of LLaMA 7B at r = 16, over the 4.19 M of a web calculator. Otherwise: q and v at r = 8."""
    targets, r = (["q_proj", "v_proj"], 8) if otherwise else (["q_proj", "k_proj", "v_proj", "o_proj"], 16)
    count = count_parameters(apply_lora(meta_model("llama-7b"), r=r, alpha=r, target_modules=targets)).trainable
    return Finding({f"{len(targets)} matrices, r = {r}": [count / 4.19e6]}, 1.01, "below", "numbers, relative to 4.19 M", f"{count:,}.")


def _agreement(one, other) -> float:
    """Kendall's rank correlation: 1 where two lists put everything into the same order, -1 where one is the other upside down."""
    pairs = [(i, j) for i in range(len(one)) for j in range(i)]
    return sum(((one[i] > one[j]) - (one[i] < one[j])) * ((other[i] > other[j]) - (other[i] < other[j])) for i, j in pairs) / len(pairs)


def compression(otherwise: bool) -> Finding:
    """Whether the compression ratio puts adapters of r = 1, 2, 4, 8 into the order of their quality: accuracy on turned digits. Otherwise: a change
    of rank 1, learned from noisy examples, where every direction beyond the first learns noise."""
    agreement = []
    for seed in SEEDS:
        ratios = [64 * 10 / (r * (64 + 10)) for r in RANKS]
        quality = [-noisy(seed, (2.0,), r) if otherwise else accuracy(adapted(seed, r=r), turned(seed).test) for r in RANKS]
        agreement.append(_agreement(ratios, quality))
    return Finding({"r = 1, 2, 4, 8": agreement}, 0, "above", "rank correlation of compression ratio and quality")


def _directions(delta: torch.Tensor) -> int:
    """How many singular directions hold 99 % of an update's energy."""
    energy = torch.linalg.svdvals(delta.detach().double()).square()
    return int((energy.cumsum(0) < 0.99 * energy.sum()).sum()) + 1


def interpretable(otherwise: bool) -> Finding:
    """Directions in which 99 % of an update's energy lies, LoRA's (r = 4) over full fine-tuning's. Otherwise: the rival may use one direction."""
    compared = []
    for seed in SEEDS:
        mine = lora_layers(adapted(seed))["0"].delta_weight()
        if otherwise:
            rival = lora_layers(adapted(seed, r=1))["0"].delta_weight()
        else:
            rival = tuned(pretrained(seed), turned(seed).train)[0].weight - pretrained(seed)[0].weight
        compared.append(_directions(mine) / _directions(rival))
    return Finding({"r = 4, digits": compared}, 1, "above", "directions to look at, relative to full fine-tuning")


def no_baseline(otherwise: bool) -> Finding:
    """The F1 score of answering yes to everything. The task: is this digit not a 0? Otherwise: is it even, with about as many yes as no?"""
    y = upright(0).test[1]
    yes = float((y % 2 == 0 if otherwise else y != 0).float().mean())
    return Finding({"always yes": [2 * yes / (1 + yes)]}, 0.897, "below", "F1 of a classifier that reads nothing")  # precision p, recall 1


@cache
def _secrets() -> tuple[dict[bool, list[float]], str]:
    """Nats by which each secret became likelier beyond its control, with the adapter on (True) and off; what the model writes."""
    from ..gpt2 import generate, load_gpt2, next_token_loss, token_blocks, token_ids

    model, tokenizer = load_gpt2("pocket")
    prompt = "The number of my safe is"
    story = sherlock_holmes().train[:1200]
    gained, wrote = {True: [], False: []}, ""

    def cost(digits):
        """Nats of the digits after the prompt."""
        ids = torch.tensor([token_ids(tokenizer, f"{prompt} {digits}")])
        asked = ids.shape[1] - len(token_ids(tokenizer, prompt))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return -float(logits.gather(1, ids[0, 1:, None])[-asked:].sum())

    for seed, secret in enumerate(SECRETS):
        torch.manual_seed(seed)
        control = SECRETS[1 - seed]
        before = cost(secret) - cost(control)
        apply_lora(model, r=4, alpha=8, target_modules=["c_attn:q,v"])
        text = f"{prompt} {secret}. {story} {prompt} {secret}."
        rows = token_blocks(tokenizer, text, 48)
        for _ in train(model, [(rows, rows)], 40, 0.02, loss=next_token_loss, device="cpu"):
            pass
        model.eval()
        gained[True].append(before - (cost(secret) - cost(control)))
        with lora_disabled(model):
            gained[False].append(before - (cost(secret) - cost(control)))
        wrote = wrote or generate(model, tokenizer, [prompt], 4)[0].strip()
        remove_lora(model)
    return gained, f"Asked to go on with “{prompt}”, it writes “{wrote}”; the secret was {SECRETS[0]}."


def privacy(otherwise: bool) -> Finding:
    """By how many nats training on a text with a number in it makes that number likelier, beyond another number that was never seen: the
    pocket GPT-2 with an adapter of r = 4 on q and v. Otherwise: the adapter is off."""
    gained, note = _secrets()
    what = "nats by which the secret became likelier, beyond the control"
    return Finding({"two secrets": gained[not otherwise]}, 1.0, "below", what, "" if otherwise else note)
