"""Wrong and right answers for lab 07: masks off by one, n-grams counted twice, volumes without a sign."""

from . import Mutant


def _loss(lines: str) -> str:
    body = "\n".join("    " + line for line in lines.strip("\n").split("\n"))
    return (
        "def reference_loss(logits, ids, prompt, length):\n    T = ids.shape[1]\n    t = torch.arange(T)\n"
        "    asked = (t >= prompt[:, None]) & (t < length[:, None])\n" + body + "\n"
    )


def _labels(asked: str, shift: str = "F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())") -> str:
    return _loss(f"labels = ids.clone()\nlabels[~({asked})] = -100\nreturn {shift}")


_COSTS = "costs = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction='none').view(len(ids), T - 1)\nm = asked[:, 1:]\n"


_COUNTER = (
    "from collections import Counter\n"
    "def grams(words, n):\n    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]\n"
    "def clipped_precision(text, references, n):\n    said = Counter(grams(text.split(), n))\n    all_ = [Counter(grams(r.split(), n)) for r in references]\n"
)


def _precision(lines: str) -> str:
    return _COUNTER + "\n".join("    " + line for line in lines.strip("\n").split("\n")) + "\n"


_TOTAL = "max(sum(said.values()), 1)"


def _volume(expression: str, update: str = "alpha / r * B @ A") -> str:
    return f"def volume_of(W, W0, A, B, r, alpha):\n    update, change = {update}, W - W0\n    return {expression}\n"


def _verdict(
    clean: str = "[math.inf if math.isnan(x) else x for x in losses]", silent: str = "max(losses) - min(losses) <= 1e-6",
    best: str = "volumes[losses.index(min(losses))]", harmful: str = "best <= 0", loud: str = "best < 0.5",
) -> str:  # fmt: skip
    return (
        f"def verdict(volumes, losses):\n    losses = {clean}\n    if {silent}:\n        return 'silent'\n    best = {best}\n"
        f"    if {harmful}:\n        return 'harmful'\n    return 'too loud' if {loud} else 'healthy'\n"
    )


_WHY = "'Every matrix learns a little here, and in five minutes more steps are worth more than a higher rank.'"


def _plan(targets="'all linear layers'", r="16", lr="3e-3", steps="int(0.9 * seconds / cost[targets] / 2)", seeds="[0, 1]", why=_WHY) -> str:
    return (
        f"def plan(seconds, cost):\n    targets = {targets}\n"
        f"    return {{'targets': targets, 'r': {r}, 'lr': {lr}, 'steps': {steps}, 'seeds': {seeds}, 'why': {why}}}\n"
    )


MUTANTS = {
    "7.1": [
        Mutant("no shift", _labels("asked", "F.cross_entropy(logits.flatten(0, 1), labels.flatten())"), "no_shift"),
        Mutant("shifts the wrong way", _labels("asked", "F.cross_entropy(logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten())"), "wrong_way"),
        Mutant("the prompt counts too", _labels("t < length[:, None]"), "prompt_too"),
        Mutant("padding counts too", _labels("t >= prompt[:, None]"), "pad_counted"),
        Mutant("everything counts", _labels("(t >= 0) | asked"), "everything"),
        Mutant("> for >=", _labels("(t > prompt[:, None]) & (t < length[:, None])"), "first_missing"),
        Mutant("prompt - 1", _labels("(t >= prompt[:, None] - 1) & (t < length[:, None])"), "last_prompt"),
        Mutant("<= length", _labels("(t >= prompt[:, None]) & (t <= length[:, None])"), "one_pad"),
        Mutant("end-of-text taken for padding", _labels("(t >= prompt[:, None]) & (ids != 0)"), "end_missing"),
        Mutant("the mask is not shifted", _loss(_COSTS + "m = asked[:, :-1]\nreturn (costs * m).sum() / m.sum()"), "mask_not_shifted"),
        Mutant("the meaning instead of the reference", _labels("t < prompt[:, None]"), "only_prompt"),
        Mutant("mean over all positions", _loss(_COSTS + "return (costs * m).mean()"), "padded_mean"),
        Mutant("divides by B T", _loss(_COSTS + "return (costs * m).sum() / ids.numel()"), "padded_mean"),
        Mutant("mean of the rows", _loss(_COSTS + "return ((costs * m).sum(1) / m.sum(1)).mean()"), "mean_of_rows"),
        Mutant("the sum", _loss(_COSTS + "return (costs * m).sum()"), "sum"),
        Mutant("per example", _loss(_COSTS + "return (costs * m).sum(1).mean()"), "per_row"),
        Mutant("a number per example", _loss(_COSTS + "return (costs * m).sum(1) / m.sum(1)"), "not_reduced"),
        Mutant("the wrong sign", _loss(_COSTS + "return -(costs * m).sum() / m.sum()"), "sign"),
        Mutant("ignores the index of end-of-text",
               _loss("return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)"), "mask_by_value"),
        Mutant("perplexity", _loss(_COSTS + "return ((costs * m).sum() / m.sum()).exp()"), "perplexity"),
        Mutant("bits", _loss(_COSTS + "return (costs * m).sum() / m.sum() / math.log(2)"), "bits"),
        Mutant("no shift, and the prompt",
               _labels("t < length[:, None]", "F.cross_entropy(logits.flatten(0, 1), labels.flatten())"), "no_shift_and_prompt_too"),
        Mutant("padding, and mean of rows", _loss(_COSTS + "m = (t >= prompt[:, None])[:, 1:]\nreturn ((costs * m).sum(1) / m.sum(1)).mean()"),
               "pad_counted_and_mean_of_rows"),
    ],
    "7.2": [
        Mutant("not clipped", _precision(f"known = set().union(*all_)\nreturn sum(c for g, c in said.items() if g in known) / {_TOTAL}"), "not_clipped"),
        Mutant("clips at the sum", _precision(f"most = sum(all_, Counter())\nreturn sum((said & most).values()) / {_TOTAL}"), "references_added"),
        Mutant("the first reference", _precision(f"return sum((said & all_[0]).values()) / {_TOTAL}"), "first_reference"),
        Mutant("overwrites in the loop", _precision(f"for c in all_:\n    most = c\nreturn sum((said & most).values()) / {_TOTAL}"), "last_reference"),
        Mutant("the smallest count", _precision(f"most = all_[0]\nfor c in all_:\n    most = most & c\n"
               f"return sum((said & most).values()) / {_TOTAL}"), "least"),
        Mutant("the best reference", _precision(f"return max(sum((said & c).values()) for c in all_) / {_TOTAL}"), "best_reference"),
        Mutant("the mean reference", _precision(f"return sum(sum((said & c).values()) for c in all_) / len(all_) / {_TOTAL}"), "mean_reference"),
        Mutant("sets", _precision("known = set().union(*all_)\nreturn len(set(said) & known) / max(len(said), 1)"), "sets"),
        Mutant("sets over all", _precision(f"known = set().union(*all_)\nreturn len(set(said) & known) / {_TOTAL}"), "sets_over_all"),
        Mutant("recall", _precision("most = Counter()\nfor c in all_:\n    most |= c\n"
                                    "return sum((said & most).values()) / max(sum(sum(c.values()) for c in all_), 1)"), "recall"),
        Mutant("a count", _precision("most = Counter()\nfor c in all_:\n    most |= c\nreturn sum((said & most).values())"), "count"),
        Mutant("per cent", _precision(f"most = Counter()\nfor c in all_:\n    most |= c\nreturn 100 * sum((said & most).values()) / {_TOTAL}"), "percent"),
        Mutant("divides by words", _precision("most = Counter()\nfor c in all_:\n    most |= c\n"
               "return sum((said & most).values()) / len(text.split())"), "by_words"),
        Mutant("single words", "from collections import Counter\ndef clipped_precision(text, references, n):\n"
               "    said, most = Counter(text.split()), Counter()\n"
               "    for r in references:\n        most |= Counter(r.split())\n    return sum((said & most).values()) / sum(said.values())\n", "words_only"),
        Mutant("range one short", "from collections import Counter\ndef clipped_precision(text, references, n):\n"
               "    grams = lambda w: Counter(tuple(w[i : i + n]) for i in range(len(w) - n))\n    said, most = grams(text.split()), Counter()\n"
               "    for r in references:\n        most |= grams(r.split())\n    return sum((said & most).values()) / max(sum(said.values()), 1)\n"
               "", "last_gram_lost"),
        Mutant("divides by nothing", _precision("most = Counter()\nfor c in all_:\n    most |= c\n"
               "return sum((said & most).values()) / sum(said.values())"), "too_short"),
    ],
    "7.3": [
        Mutant("forgets alpha / r", _volume("float((change * update).sum() / (update * update).sum())", "B @ A"), "scaling_missing"),
        Mutant("forgets r", _volume("float((change * update).sum() / (update * update).sum())", "alpha * B @ A"), "division_by_r_missing"),
        Mutant("r / alpha", _volume("float((change * update).sum() / (update * update).sum())", "r / alpha * B @ A"), "scaling_inverted"),
        Mutant("rsLoRA's unit", _volume("float((change * update).sum() / (update * update).sum())", "alpha / r**0.5 * B @ A"), "scaling_sqrt"),
        Mutant("norms", _volume("float(change.norm() / update.norm())"), "norms"),
        Mutant("norms, without scaling", _volume("float(change.norm() / update.norm())", "B @ A"), "norms_without_scaling"),
        Mutant("squared norms", _volume("float(change.square().sum() / update.square().sum())"), "squared_norms"),
        Mutant("mean of the ratios", _volume("float((change / update).mean())"), "elementwise"),
        Mutant("all the ratios", _volume("change / (update + 1e-9)"), "elementwise"),
        Mutant("upside down", _volume("float((update * update).sum() / (change * update).sum())"), "inverted"),
        Mutant("divides by the square of the change", _volume("float((change * update).sum() / (change * change).sum())"), "fit_inverted"),
        Mutant("sums", _volume("float(change.sum() / update.sum())"), "sums"),
        Mutant("absolute sums", _volume("float(change.abs().sum() / update.abs().sum())"), "absolute_sums"),
        Mutant("a median", _volume("float(np.median((change / update)[update != 0]))"), "median"),
        Mutant("a mean where there is something", _volume("float((change / update)[update != 0].mean())"), "mean_ratio"),
        Mutant("a product alone", _volume("float((change * update).sum())"), "not_normalised"),
        Mutant("divides by the norm", _volume("float((change * update).sum() / update.norm())"), "norm_not_squared"),
        Mutant("a cosine", _volume("float((change * update).sum() / update.norm() / change.norm())"), "cosine"),
        Mutant("forgets W0", _volume("float((W * update).sum() / (update * update).sum())"), "base_not_removed"),
        Mutant("W0 - W", _volume("-float((change * update).sum() / (update * update).sum())"), "subtracted"),
        Mutant("less the adapter", _volume("float(((change - update) * update).sum() / (update * update).sum())"), "extra"),
    ],
    "7.4": [
        Mutant("argmax", _verdict(best="volumes[losses.index(max(losses))]"), "largest"),
        Mutant("all equal, exactly", _verdict(silent="len(set(losses)) == 1"), "exact_silence"),
        Mutant("silence forgotten", _verdict(silent="False"), "silence_forgotten"),
        Mutant("the index", _verdict(best="losses.index(min(losses))"), "index"),
        Mutant("volume 1 against 0", "def verdict(volumes, losses):\n    if max(losses) - min(losses) <= 1e-6:\n        return 'silent'\n"
               "    return 'healthy' if losses[volumes.index(1)] < losses[volumes.index(0)] else 'harmful'\n", "only_one"),
        Mutant("<= 0.5", _verdict(loud="best <= 0.5"), "edge_inside"),
        Mutant("loud up to a quarter", _verdict(loud="best <= 0.25"), "edge_lower"),
        Mutant("below 1", _verdict(loud="best < 1"), "below_1"),
        Mutant("other than 1", _verdict(loud="best != 1"), "only_1"),
        Mutant("zero is loud", _verdict(harmful="best < 0"), "zero_is_loud"),
        Mutant("harmful at 0 alone", _verdict(harmful="best == 0"), "negative_only_zero"),
        Mutant("numpy's argmin", _verdict(clean="np.array(losses)", silent="np.ptp(losses) <= 1e-6", best="volumes[int(np.argmin(losses))]"), "nan_wins"),
        Mutant("loud beyond 1", _verdict(loud="best > 1"), "loud_beyond"),
        Mutant("in capitals", _verdict().replace("'too loud'", "'Too loud'").replace("'healthy'", "'Healthy'").replace("'harmful'", "'Harmful'")
               .replace("'silent'", "'Silent'"), "spelling"),
    ],
    "7.5": [
        Mutant("three hundred steps", _plan(steps="300"), "ignores_the_machine"),
        Mutant("forgets the second run", _plan(steps="int(0.9 * seconds / cost[targets])"), "seeds_not_counted"),
        Mutant("leaves most of it", _plan(steps="int(0.2 * seconds / cost[targets])"), "budget_unused"),
        Mutant("seconds as steps", _plan(steps="seconds"), "ignores_the_machine"),
        Mutant("a second too many", _plan(steps="int(1.1 * seconds / cost[targets])"), "over_budget"),
        Mutant("a learning rate ten times too high", _plan(lr="3e-2"), "lr_too_high"),
        Mutant("one for full fine-tuning", _plan(lr="2e-5"), "lr_too_low"),
        Mutant("a rank of zero", _plan(r="0"), "rank"),
        Mutant("peft's name of the targets", _plan(targets="'all-linear'", steps="100"), "unknown_targets"),
        Mutant("one seed", _plan(seeds="[0]", steps="int(0.9 * seconds / cost[targets])"), "one_seed"),
        Mutant("twice the same", _plan(seeds="[0, 0]"), "same_seed"),
        Mutant("no reason", _plan(why="'because'"), "no_reason"),
        Mutant("a plan without seeds", "def plan(seconds, cost):\n    return {'targets': 'all linear layers', 'r': 8, 'lr': 1e-3, 'steps': 50}\n"
               "", "incomplete"),
        Mutant("prints it", "def plan(seconds, cost):\n    print('r = 16')\n", "no_dict"),
    ],
}

ALTERNATIVES = {
    "7.1": [
        _loss("lp = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]\nreturn -lp[asked[:, 1:]].mean()"),
        "def reference_loss(logits, ids, prompt, length):\n    total, count = 0.0, 0\n    for b in range(len(ids)):\n"
        "        for t in range(int(prompt[b]), int(length[b])):\n            total -= torch.log_softmax(logits[b, t - 1], -1)[ids[b, t]].item()\n"
        "            count += 1\n"
        "    return total / count\n",
        _loss(_COSTS + "return (costs.float() * m).sum() / m.sum()"),
    ],
    "7.2": [
        _precision(f"return sum(min(c, max(o[g] for o in all_)) for g, c in said.items()) / {_TOTAL}"),
        "def clipped_precision(text, references, n):\n    grams = lambda s: [tuple(s.split()[i:i + n]) for i in range(len(s.split()) - n + 1)]\n"
        "    said = grams(text)\n"
        "    if not said:\n        return 0.0\n    hits = 0\n    for g in set(said):\n"
        "        hits += min(said.count(g), max(grams(r).count(g) for r in references))\n"
        "    return hits / len(said)\n",
    ],
    "7.3": [
        _volume("torch.linalg.lstsq(update.reshape(-1, 1), change.reshape(-1, 1)).solution.item()"),
        "def volume_of(W, W0, A, B, r, alpha):\n    u = (alpha / r * B @ A).flatten()\n    return torch.dot((W - W0).flatten(), u) / torch.dot(u, u)\n",
    ],
    "7.4": [
        "def verdict(volumes, losses):\n    losses = np.nan_to_num(np.array(losses), nan=np.inf, posinf=np.inf)\n"
        "    if np.allclose(losses, losses[0], rtol=0, atol=1e-6):\n"
        "        return 'silent'\n    best = volumes[int(losses.argmin())]\n    return 'harmful' if best <= 0 else 'too loud' if best < 0.5 else 'healthy'\n",
        "def verdict(volumes, losses):\n    pairs = [(l, v) for v, l in zip(volumes, losses) if l == l]\n"
        "    if len(pairs) == len(losses) and max(pairs)[0] - min(pairs)[0] < 1e-6:\n        return 'silent'\n    best = min(pairs)[1]\n"
        "    if best <= 0:\n        return 'harmful'\n    if best < 0.5:\n        return 'too loud'\n    return 'healthy'\n",
    ],
    "7.5": [
        _plan(targets="'W_q and W_v'", r="4", lr="1e-3", seeds="(3, 11)"),
        _plan(r="8", seeds="[1, 2, 3]", steps="int(seconds * 0.8 // (3 * cost[targets]))"),
    ],
}
