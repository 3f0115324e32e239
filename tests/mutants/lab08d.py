"""Wrong and right answers for lab 08d: cosines without lengths, unpaired intervals, Reptile's directions, adapters that pile up, transposes."""

from . import Mutant


def _captions(body: str) -> str:
    return f"def caption_probabilities(pictures, captions, temperature):\n    u, v = F.normalize(pictures, dim=1), F.normalize(captions, dim=1)\n    {body}\n"


def _gain(body: str) -> str:
    return (
        "def gain(with_base, without, t):\n    a, b = np.array(with_base), np.array(without)\n    d, n = a - b, len(a)\n"
        f"    {body}\n"
    )


def _reptile(expression: str) -> str:
    return (
        "def reptile_step(start, ends, epsilon):\n    n = len(ends)\n"
        f"    return {{k: {expression} for k, w in start.items()}}\n"
    )


_BOARD = '''
class Switchboard:
    def __init__(self, W0):
        {init}

    def switch(self, A, B, scaling):
        {switch}

    def off(self):
        {off}
'''


def _board(**changes: str) -> str:
    parts = dict(
        init="self.W0 = W0.clone(); self.weight = W0.clone()", switch="self.weight = self.W0 + scaling * B @ A", off="self.weight = self.W0.clone()"
    )
    return _BOARD.format(**{**parts, **changes})


def _keras(kernel="W.T", bias="b", a="A.T", b="scaling * B.T") -> str:
    return (
        "def to_keras(W, b, A, B, scaling):\n"
        f'    return {{"kernel": {kernel}, "bias": {bias}, "lora_kernel_a": {a}, "lora_kernel_b": {b}}}\n'
    )


_SUBTRACTING = _board(
    init="self.weight = W0.clone(); self.on = None",
    switch="self.off(); self.on = scaling * B @ A; self.weight += self.on",
    off="if self.on is not None: self.weight -= self.on\n        self.on = None",
)

MUTANTS = {
    "8d.1": [
        Mutant("dot product", _captions("return (pictures @ captions.T / temperature).softmax(1)"), "not_normalised"),
        Mutant("captions as they are", _captions("return (u @ captions.T / temperature).softmax(1)"), "captions_not_normalised"),
        Mutant("pictures as they are", _captions("return (pictures @ v.T / temperature).softmax(1)"), "pictures_not_normalised"),
        Mutant(
            "normalised down the columns",
            _captions("return (F.normalize(pictures, dim=0) @ F.normalize(captions, dim=0).T / temperature).softmax(1)"),
            "normalised_columns",
        ),
        Mutant("softmax over pictures", _captions("return (u @ v.T / temperature).softmax(0)"), "softmax_over_pictures"),
        Mutant("times the temperature", _captions("return (u @ v.T * temperature).softmax(1)"), "times_temperature"),
        Mutant("no temperature", _captions("return (u @ v.T).softmax(1)"), "no_temperature"),
        Mutant("logits", _captions("return u @ v.T / temperature"), "logits"),
        Mutant("cosines", _captions("return u @ v.T"), "cosines"),
        Mutant("log_softmax", _captions("return (u @ v.T / temperature).log_softmax(1)"), "log_probabilities"),
        Mutant("a sigmoid", _captions("return torch.sigmoid(u @ v.T / temperature)"), "sigmoid"),
        Mutant("captions in rows", _captions("return (v @ u.T / temperature).softmax(1)"), "transposed_softmax"),
        Mutant("transposed at the end", _captions("return (u @ v.T / temperature).softmax(1).T"), "transposed"),
        Mutant("temperature outside", _captions("return (u @ v.T).softmax(1) / temperature"), "softmax_first"),
        Mutant("not divided by the sum", _captions("return torch.exp(u @ v.T / temperature)"), "exponentials"),
        Mutant("divided by the sum", _captions("s = u @ v.T / temperature\n    return s / s.sum(1, keepdim=True)"), "share_of_sum"),
        Mutant("one softmax for all", _captions("s = u @ v.T / temperature\n    return s.flatten().softmax(0).view(s.shape)"), "softmax_over_all"),
        Mutant("distances", _captions("return (-torch.cdist(pictures, captions) / temperature).softmax(1)"), "distances"),
    ],
    "8d.2": [
        Mutant("unpaired", _gain("return d.mean(), t * np.sqrt(a.var(ddof=1) / n + b.var(ddof=1) / n)"), "unpaired"),
        Mutant("np.std", _gain("return d.mean(), t * d.std() / n**0.5"), "population"),
        Mutant("no root", _gain("return d.mean(), t * d.std(ddof=1)"), "no_root_n"),
        Mutant("divided by n", _gain("return d.mean(), t * d.std(ddof=1) / n"), "by_n"),
        Mutant("without t", _gain("return d.mean(), d.std(ddof=1) / n**0.5"), "no_t"),
        Mutant("standard deviation", _gain("return d.mean(), d.std(ddof=1)"), "plain_sd"),
        Mutant("1.96", _gain("return d.mean(), 1.96 * d.std(ddof=1) / n**0.5"), "normal_instead_of_t"),
        Mutant("twice", _gain("return d.mean(), 2 * d.std(ddof=1) / n**0.5"), "two_instead_of_t"),
        Mutant("full width", _gain("return d.mean(), 2 * t * d.std(ddof=1) / n**0.5"), "full_width"),
        Mutant("the other sign", _gain("return -d.mean(), t * d.std(ddof=1) / n**0.5"), "reversed"),
        Mutant("absolute", _gain("return abs(d).mean(), t * d.std(ddof=1) / n**0.5"), "absolute"),
        Mutant("relative", _gain("return d.mean() / b.mean(), t * d.std(ddof=1) / n**0.5"), "relative"),
        Mutant("best seeds", _gain("return a.max() - b.max(), t * d.std(ddof=1) / n**0.5"), "best_seed"),
        Mutant("sum", _gain("return d.sum(), t * d.std(ddof=1) / n**0.5"), "sum"),
        Mutant("variance", _gain("return d.mean(), t * d.var(ddof=1) / n**0.5"), "variance"),
        Mutant("spread of one list", _gain("return d.mean(), t * a.std(ddof=1) / n**0.5"), "sd_of_one"),
        Mutant("difference of spreads", _gain("return d.mean(), t * (a.std(ddof=1) - b.std(ddof=1)) / n**0.5"), "difference_of_sd"),
        Mutant("root of n - 1", _gain("return d.mean(), t * d.std(ddof=1) / (n - 1) ** 0.5"), "root_n_minus_1"),
        Mutant("per cent", _gain("d = 100 * d\n    return d.mean(), t * d.std(ddof=1) / n**0.5"), "percent"),
        Mutant("half-width first", _gain("return t * d.std(ddof=1) / n**0.5, d.mean()"), "wrong_order"),
        Mutant("only the mean", _gain("return d.mean()"), "one_number"),
    ],
    "8d.3": [
        Mutant("plain mean", _reptile("sum(e[k] for e in ends) / n"), "plain_mean"),
        Mutant("sum of pulls", _reptile("w + epsilon * sum(e[k] - w for e in ends)"), "not_averaged"),
        Mutant("ends added up", _reptile("sum(e[k] for e in ends)"), "sum_of_ends"),
        Mutant("sum of ends", _reptile("(1 - epsilon) * w + epsilon * sum(e[k] for e in ends)"), "summed_ends"),
        Mutant("away", _reptile("w + epsilon * (w - sum(e[k] for e in ends) / n)"), "away"),
        Mutant("adds the ends", _reptile("w + epsilon * sum(e[k] for e in ends) / n"), "start_not_subtracted"),
        Mutant("the step alone", _reptile("epsilon * (sum(e[k] for e in ends) / n - w)"), "direction_only"),
        Mutant("weights swapped", _reptile("epsilon * w + (1 - epsilon) * sum(e[k] for e in ends) / n"), "epsilon_swapped"),
        Mutant(
            "loop that overwrites",
            "def reptile_step(start, ends, epsilon):\n    for e in ends:\n        new = {k: w + epsilon * (e[k] - w) for k, w in start.items()}\n"
            "    return new\n",
            "last_task",
        ),
        Mutant("first task", _reptile("w + epsilon * (ends[0][k] - w)"), "first_task"),
        Mutant(
            "one after another",
            "def reptile_step(start, ends, epsilon):\n    new = dict(start)\n    for e in ends:\n"
            "        new = {k: w + epsilon * (e[k] - w) for k, w in new.items()}\n    return new\n",
            "one_after_another",
        ),
        Mutant("no epsilon", _reptile("w + sum(e[k] for e in ends) / n"), "no_epsilon"),
        Mutant("start as one more end", _reptile("(w + sum(e[k] for e in ends)) / (n + 1)"), "mean_with_start"),
        Mutant("divided twice", _reptile("w + epsilon / n * (sum(e[k] for e in ends) / n - w)"), "averaged_twice"),
        Mutant("B alone", _reptile("w + epsilon * (sum(e[k] for e in ends) / n - w) if 'B' in k else w"), "one_factor"),
        Mutant(
            "in place",
            "def reptile_step(start, ends, epsilon):\n    for k, w in start.items():\n"
            "        w += epsilon * (sum(e[k] for e in ends) / len(ends) - w)\n    return start\n",
            "changes_input",
        ),
    ],
    "8d.4": [
        Mutant("piles up", _board(switch="self.weight = self.weight + scaling * B @ A"), "accumulates"),
        Mutant("subtracts", _SUBTRACTING, "drift"),
        Mutant("no scaling", _board(switch="self.weight = self.W0 + B @ A"), "no_scaling"),
        Mutant("scaling divided by r", _board(switch="self.weight = self.W0 + scaling / len(A) * B @ A"), "divided_by_r"),
        Mutant("scaling around all", _board(switch="self.weight = scaling * (self.W0 + B @ A)"), "base_scaled"),
        Mutant("update alone", _board(switch="self.weight = scaling * B @ A"), "replaced"),
        Mutant("minus", _board(switch="self.weight = self.W0 - scaling * B @ A"), "subtracted"),
        Mutant("no copy", _board(init="self.W0 = W0; self.weight = W0", switch="self.weight.copy_(self.W0 + scaling * B @ A)"), "alias"),
        Mutant("off does nothing", _board(off="pass"), "off_does_nothing"),
        Mutant(
            "off hands the copy out",
            _board(switch="self.off(); self.weight += scaling * B @ A", off="self.weight = self.W0"),
            "accumulates",
        ),
        Mutant(
            "off works once",
            _board(off="self.weight = self.W0.clone() if self.fresh else 2 * self.W0; self.fresh = False",
                   init="self.W0 = W0.clone(); self.weight = W0.clone(); self.fresh = True"),
            "off_twice",
        ),
        Mutant("only once", _board(init="self.W0 = W0.clone(); self.weight = W0.clone(); self.on = False",
                                   switch="if not self.on: self.weight = self.W0 + scaling * B @ A\n        self.on = True"), "stuck"),
        Mutant("no off", _board().replace("def off", "def remove"), "no_method"),
    ],
    "8d.5": [
        Mutant("kernel as it is", _keras(kernel="W"), "kernel_not_transposed"),
        Mutant("factors as they are", _keras(a="A", b="scaling * B"), "factors_not_transposed"),
        Mutant("a and b swapped", _keras(a="B.T", b="scaling * A.T"), "factors_swapped"),
        Mutant("B first", _keras(a="B", b="scaling * A"), "wrong_factor"),
        Mutant("reshape", _keras(kernel="W.reshape(W.shape[1], W.shape[0])"), "reshaped"),
        Mutant("minus", _keras(b="-scaling * B.T"), "subtracted"),
        Mutant("divided by r", _keras(b="scaling / len(A) * B.T"), "divided_by_r"),
        Mutant("factor reshaped", _keras(a="A.reshape(A.shape[1], A.shape[0])"), "reshaped"),
        Mutant("scaling lost", _keras(b="B.T"), "scaling_lost"),
        Mutant("scaling twice", _keras(a="scaling * A.T"), "scaling_twice"),
        Mutant("scaling divides", _keras(b="B.T / scaling"), "scaling_inverted"),
        Mutant("kernel scaled", _keras(kernel="scaling * W.T"), "base_scaled"),
        Mutant("bias scaled", _keras(bias="scaling * b"), "bias_scaled"),
        Mutant("no bias", _keras(bias="torch.zeros_like(b)"), "bias_lost"),
        Mutant("merged", _keras(kernel="(W + scaling * B @ A).T", b="torch.zeros_like(B.T)"), "merged"),
        Mutant("merged and kept", _keras(kernel="(W + scaling * B @ A).T"), "counted_twice"),
        Mutant("transposed where the shapes ask for it", _keras(kernel="W.T if W.shape[0] != W.shape[1] else W"), "by_shape"),
    ],
}

ALTERNATIVES = {
    "8d.1": [
        _captions("return torch.exp(F.log_softmax(torch.einsum('nd,md->nm', u, v) / temperature, dim=-1))"),
        "def caption_probabilities(pictures, captions, temperature):\n"
        "    c = F.cosine_similarity(pictures[:, None], captions[None], dim=-1)\n    return F.softmax(c / temperature, dim=1)\n",
        "def caption_probabilities(pictures, captions, temperature):\n"
        "    logits = pictures @ captions.T / pictures.norm(dim=1)[:, None] / captions.norm(dim=1) / temperature\n"
        "    e = logits.exp()\n    return e / e.sum(1, keepdim=True)\n",
    ],
    "8d.2": [
        _gain("return float(d.mean()), float(t * d.std(ddof=1) / np.sqrt(n))"),
        "def gain(with_base, without, t):\n    d = torch.tensor(with_base) - torch.tensor(without)\n"
        "    return d.mean(), t * d.std() / len(d) ** 0.5\n",
        "import statistics\ndef gain(with_base, without, t):\n    d = [x - y for x, y in zip(with_base, without)]\n"
        "    return [sum(d) / len(d), t * statistics.stdev(d) / math.sqrt(len(d))]\n",
    ],
    "8d.3": [
        _reptile("w + epsilon * (torch.stack([e[k] for e in ends]).mean(0) - w)"),
        _reptile("(1 - epsilon) * w + epsilon / n * sum(e[k] for e in ends)"),
        "def reptile_step(start, ends, epsilon):\n    new = {}\n    for k in start:\n        new[k] = start[k].clone()\n        for e in ends:\n"
        "            new[k] += epsilon * (e[k] - start[k]) / len(ends)\n    return new\n",
        _reptile("torch.lerp(w, torch.stack([e[k] for e in ends]).mean(0), epsilon)"),
    ],
    "8d.4": [
        _board(
            switch="with torch.no_grad():\n            self.weight.copy_(self.W0).addmm_(B, A, alpha=scaling)",
            off="with torch.no_grad():\n            self.weight.copy_(self.W0)",
        ),
        _board(init="self.W0 = W0; self.off()", switch="self.weight = torch.addmm(self.W0, B, A, alpha=scaling)", off="self.weight = self.W0.clone()"),
        _board(init="self.weight = self.W0 = W0", off="self.weight = self.W0"),
    ],
    "8d.5": [
        _keras(a="scaling * A.T", b="B.T"),
        _keras(a="math.sqrt(scaling) * A.T", b="math.sqrt(scaling) * B.T", kernel="W.transpose(0, 1).contiguous()"),
        "def to_keras(W, b, A, B, scaling):\n    return dict(kernel=W.T.numpy(), bias=b.numpy(),\n"
        "        lora_kernel_a=A.T.numpy(), lora_kernel_b=(B * scaling).T.numpy())\n",
    ],
}
