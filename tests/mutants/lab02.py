"""Wrong and right answers for lab 02: slips from real threads (which factor is zero, alpha / r, transposes, what is frozen, merging)."""

from . import Mutant


def _forward(expression: str) -> str:
    return f"def lora_forward(x, W, b, A, B, alpha, r):\n    bias = 0 if b is None else b\n    return {expression}\n"


_GRADIENTS = "def factor_gradients(x, g, A, B, alpha, r):\n    s = alpha / r\n    "

_LAYER = '''
class MyLoRALinear(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base_layer = {base}
        {freeze}
        self.scaling = {scaling}
        self.lora_A = {A}
        self.lora_B = {B}
        {after}

    def forward(self, x):
        return {forward}
'''


def _layer(**changes: str) -> str:
    parts = dict(
        base="base",
        freeze="base.requires_grad_(False)",
        scaling="alpha / r",
        A="nn.Parameter(torch.randn(r, base.in_features) / base.in_features ** 0.5)",
        B="nn.Parameter(torch.zeros(base.out_features, r))",
        after="pass",
        forward="self.base_layer(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)",
    )
    return _LAYER.format(**{**parts, **changes})


_MERGE = _layer().replace("MyLoRALinear", "Plain") + '''
class MergeableLoRA(Plain):
    {shared}def __init__(self, base, r, alpha):
        super().__init__(base, r, alpha)
        {own}

    @torch.no_grad()
    def merge(self):
        {merge}

    @torch.no_grad()
    def unmerge(self):
        {unmerge}

    def forward(self, x):
        {forward}
'''


def _merge(**changes: str) -> str:
    parts = dict(
        merge="if self.original is None:\n"
        "            self.original = self.base_layer.weight.clone()\n"
        "            self.base_layer.weight += self.scaling * self.lora_B @ self.lora_A",
        unmerge="if self.original is not None:\n"
        "            self.base_layer.weight.copy_(self.original)\n"
        "            self.original = None",
        forward="return super().forward(x) if self.original is None else self.base_layer(x)",
        own="self.original = None",
        shared="",
    )
    return _MERGE.format(**{**parts, **changes})


def _swallowed(expression: str) -> str:
    return (
        "def swallowed(W, delta, dtype):\n    rounded = (W + delta).to(dtype).float()\n    "
        f"norm = torch.linalg.vector_norm\n    return float({expression})\n"
    )


MUTANTS = {
    "2.1": [
        Mutant("no scaling", _forward("x @ W.T + bias + x @ A.T @ B.T"), "scaling_missing"),
        Mutant("alpha without 1/r", _forward("x @ W.T + bias + alpha * (x @ A.T @ B.T)"), "division_by_r_missing"),
        Mutant("r / alpha", _forward("x @ W.T + bias + r / alpha * (x @ A.T @ B.T)"), "scaling_inverted"),
        Mutant("alpha / sqrt(r)", _forward("x @ W.T + bias + alpha / r ** 0.5 * (x @ A.T @ B.T)"), "scaling_sqrt"),
        Mutant("W := BA", _forward("alpha / r * (x @ A.T @ B.T) + bias"), "base_missing"),
        Mutant("base twice", _forward("2 * x @ W.T + bias + alpha / r * (x @ A.T @ B.T)"), "base_changed"),
        Mutant("scaling on everything", _forward("alpha / r * (x @ W.T + x @ A.T @ B.T) + bias"), "base_scaled"),
        Mutant("bias lost", _forward("x @ W.T + alpha / r * (x @ A.T @ B.T)"), "bias_missing"),
        Mutant("bias in both paths", _forward("x @ W.T + bias + alpha / r * (x @ A.T @ B.T) + bias"), "bias_scaled"),
        Mutant("b is never None", _forward("x @ W.T + b + alpha / r * (x @ A.T @ B.T)"), "bias_none"),
        Mutant("only the base", _forward("x @ W.T + bias"), "update_missing"),
        Mutant("adds a one for the bias", _forward("x @ W.T + 1 + alpha / r * (x @ A.T @ B.T)"), "other_formula"),
        Mutant("minus", _forward("x @ W.T + bias - alpha / r * (x @ A.T @ B.T)"), "subtracted"),
        Mutant("a ReLU between A and B", _forward("x @ W.T + bias + alpha / r * (torch.relu(x @ A.T) @ B.T)"), "nonlinearity"),
        Mutant("detached", _forward("x @ W.T + bias + alpha / r * (x @ A.data.T @ B.data.T)"), "detached"),
        Mutant("only two dimensions", _forward("(W @ x.T + alpha / r * (B @ A @ x.T)).T + bias"), "two_dims_only"),
    ],
    "2.2": [
        Mutant("both zero", "def init_factors(i, o, r):\n    return torch.zeros(r, i), torch.zeros(o, r)\n", "both_zero"),
        Mutant("both random", "def init_factors(i, o, r):\n    return torch.randn(r, i) / i**0.5, torch.randn(o, r)\n", "both_random"),
        Mutant("A zero", "def init_factors(i, o, r):\n    return torch.zeros(r, i), torch.randn(o, r)\n", "zero_A"),
        Mutant("plain randn", "def init_factors(i, o, r):\n    return torch.randn(r, i), torch.zeros(o, r)\n", "too_large"),
        Mutant("divided by d_in", "def init_factors(i, o, r):\n    return torch.randn(r, i) / i, torch.zeros(o, r)\n", "too_small"),
        Mutant("columns for rows", "def init_factors(i, o, r):\n    return torch.randn(i, r) / i**0.5, torch.zeros(r, o)\n", "transposed"),
        Mutant("in and out swapped", "def init_factors(i, o, r):\n    return torch.randn(r, o) / o**0.5, torch.zeros(i, r)\n", "swapped_sizes"),
        Mutant("A of ones", "def init_factors(i, o, r):\n    return torch.ones(r, i) / i**0.5, torch.zeros(o, r)\n", "constant_A"),
        Mutant("torch.rand, never negative", "def init_factors(i, o, r):\n    return torch.rand(r, i) / i**0.5, torch.zeros(o, r)\n", "off_centre"),
        Mutant("0.02 whatever the width", "def init_factors(i, o, r):\n    return torch.randn(r, i) * 0.02, torch.zeros(o, r)\n", "fixed_size"),
        Mutant("B, A", "def init_factors(i, o, r):\n    return torch.zeros(o, r), torch.randn(r, i) / i**0.5\n", "wrong_order"),
        Mutant(
            "seeds itself",
            "def init_factors(i, o, r):\n    torch.manual_seed(0)\n    return torch.randn(r, i) / i**0.5, torch.zeros(o, r)\n",
            "seed_inside",
        ),
    ],
    "2.3": [
        Mutant("no scaling", _GRADIENTS + "return B.T @ g.T @ x, g.T @ (x @ A.T)\n", "scaling_missing"),
        Mutant("alpha alone", _GRADIENTS + "return alpha * B.T @ g.T @ x, alpha * g.T @ (x @ A.T)\n", "scaling_wrong"),
        Mutant("the other order", _GRADIENTS + "return s * g.T @ (x @ A.T), s * B.T @ g.T @ x\n", "swapped"),
        Mutant("transposed", _GRADIENTS + "return (s * B.T @ g.T @ x).T, (s * g.T @ (x @ A.T)).T\n", "transposed"),
        Mutant("mean over samples", _GRADIENTS + "n = len(x)\n    return s * B.T @ g.T @ x / n, s * g.T @ (x @ A.T) / n\n", "averaged"),
        Mutant("minus", _GRADIENTS + "return -s * B.T @ g.T @ x, -s * g.T @ (x @ A.T)\n", "sign"),
        Mutant("scaling twice", _GRADIENTS + "return s * s * B.T @ g.T @ x, s * s * g.T @ (x @ A.T)\n", "scaling_twice"),
        Mutant("first sample only", _GRADIENTS + "x, g = x[:1], g[:1]\n    return s * B.T @ g.T @ x, s * g.T @ (x @ A.T)\n", "one_sample"),
        Mutant(
            "loop that overwrites",
            _GRADIENTS + "for xi, gi in zip(x, g):\n        out = s * torch.outer(B.T @ gi, xi), s * torch.outer(gi, A @ xi)\n    return out\n",
            "one_sample",
        ),
        Mutant(
            "one per sample",
            _GRADIENTS + "return s * torch.einsum('or,no,ni->nri', B, g, x), s * torch.einsum('no,ni,ri->nor', g, x, A)\n",
            "not_summed",
        ),
        Mutant("returns updated factors", _GRADIENTS + "return A - 0.1 * s * B.T @ g.T @ x, B - 0.1 * s * g.T @ (x @ A.T)\n", "updated_factor"),
        Mutant("sums first", _GRADIENTS + "return s * B.T @ g.T @ x, s * torch.outer(g.sum(0), (x @ A.T).sum(0))\n", "sums_first"),
    ],
    "2.4": [
        Mutant("bias left trainable", _layer(freeze="base.weight.requires_grad = False"), "bias_trainable"),
        Mutant("nothing frozen", _layer(freeze="pass"), "base_trainable"),
        Mutant("freezes bias only", _layer(freeze="[p.requires_grad_(p.ndim == 2) for p in base.parameters()]"), "weight_trainable"),
        Mutant("freezes itself last", _layer(after="self.requires_grad_(False)"), "factors_frozen"),
        Mutant(
            "plain tensors",
            _layer(
                A="torch.randn(r, base.in_features) / base.in_features ** 0.5",
                B="torch.zeros(base.out_features, r)",
                after="self.lora_A.requires_grad_(); self.lora_B.requires_grad_()",
            ),
            "not_registered",
        ),
        Mutant("a fresh base", _layer(base="nn.Linear(base.in_features, base.out_features).requires_grad_(False)"), "new_base"),
        Mutant("both random", _layer(B="nn.Parameter(torch.randn(base.out_features, r))"), "both_random"),
        Mutant("both zero", _layer(A="nn.Parameter(torch.zeros(r, base.in_features))"), "both_zero"),
        Mutant("no scaling", _layer(scaling="1"), "scaling_missing"),
        Mutant("alpha alone", _layer(scaling="alpha"), "division_by_r_missing"),
        Mutant(
            "nn.Linear factors, as in peft",
            _layer(
                A="nn.Linear(base.in_features, r, bias=False)",
                B="nn.Linear(r, base.out_features, bias=False)",
                after="nn.init.zeros_(self.lora_B.weight)",
                forward="self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x))",
            ),
            "factors_are_modules",
        ),
        Mutant(
            "B transposed",
            _layer(B="nn.Parameter(torch.zeros(r, base.out_features))", forward="self.base_layer(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B)"),
            "transposed",
        ),
        Mutant("a bias of its own", _layer(after="self.lora_bias = nn.Parameter(torch.zeros(base.out_features))"), "extra_parameters"),
        Mutant("only while training", _layer(forward="self.base_layer(x) + self.training * self.scaling * (x @ self.lora_A.T @ self.lora_B.T)"),
               "training_only"),
        Mutant("base under detach", _layer(forward="self.base_layer(x).detach() + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)"), "x_cut_off"),
        Mutant(
            "writes into the weight",
            _layer(forward="self.base_layer(x) + 0 * self.base_layer.weight.data.add_(self.scaling * self.lora_B.data @ self.lora_A.data).sum()"),
            "forward_writes",
        ),
        Mutant(
            "A zero, B random",
            _layer(A="nn.Parameter(torch.zeros(r, base.in_features))", B="nn.Parameter(torch.randn(base.out_features, r))"),
            "zero_A",
        ),
        Mutant("update computed once", _layer(after="self.update = self.scaling * (self.lora_B @ self.lora_A).detach()",
                                              forward="self.base_layer(x) + x @ self.update.T"), "update_missing"),
        Mutant("forgets the base", _layer(forward="self.scaling * (x @ self.lora_A.T @ self.lora_B.T)"), "base_missing"),
        Mutant("detached", _layer(forward="self.base_layer(x) + self.scaling * (x @ self.lora_A.detach().T @ self.lora_B.detach().T)"), "detached"),
    ],
    "2.5": [
        Mutant(
            "merges twice",
            _merge(
                merge="self.original = self.base_layer.weight.clone() if self.original is None else self.original\n"
                "        self.base_layer.weight += self.scaling * self.lora_B @ self.lora_A"
            ),
            "twice",
        ),
        Mutant("still adds in forward", _merge(forward="return super().forward(x)"), "counted_twice"),
        Mutant(
            "no scaling",
            _merge(
                merge="if self.original is None:\n            self.original = self.base_layer.weight.clone()\n"
                "            self.base_layer.weight += self.lora_B @ self.lora_A"
            ),
            "scaling",
        ),
        Mutant(
            "unmerges by subtraction",
            _merge(
                unmerge="if self.original is not None:\n"
                "            self.base_layer.weight -= self.scaling * self.lora_B @ self.lora_A\n            self.original = None"
            ),
            "subtraction",
        ),
        Mutant(
            "replaces W0",
            _merge(
                merge="if self.original is None:\n            self.original = self.base_layer.weight.clone()\n"
                "            self.base_layer.weight.copy_(self.scaling * self.lora_B @ self.lora_A)"
            ),
            "replaced",
        ),
        Mutant(
            "keeps no copy",
            _merge(
                merge="if self.original is None:\n            self.original = self.base_layer.weight.detach()\n"
                "            self.base_layer.weight += self.scaling * self.lora_B @ self.lora_A"
            ),
            "no_unmerge",
        ),
        Mutant(
            "keeps the parameter itself",
            _merge(
                merge="if self.original is None:\n            self.original = self.base_layer.weight\n"
                "            self.base_layer.weight += self.scaling * self.lora_B @ self.lora_A"
            ),
            "no_unmerge",
        ),
        Mutant(
            "kept on the class",
            _merge(
                shared="original = None\n    ",
                own="pass",
                merge="if MergeableLoRA.original is None:\n            MergeableLoRA.original = self.base_layer.weight.clone()\n"
                "            self.base_layer.weight += self.scaling * self.lora_B @ self.lora_A",
                unmerge="if MergeableLoRA.original is not None:\n            self.base_layer.weight.copy_(MergeableLoRA.original)\n"
                "            MergeableLoRA.original = None",
            ),
            "shared_state",
        ),
        Mutant(
            "a new Parameter",
            _merge(
                merge="if self.original is None:\n            self.original = self.base_layer.weight.data\n"
                "            self.base_layer.weight = nn.Parameter(self.original + self.scaling * self.lora_B @ self.lora_A)",
                unmerge="if self.original is not None:\n            self.base_layer.weight = nn.Parameter(self.original)\n"
                "            self.original = None",
            ),
            "thawed",
        ),
        Mutant("forward merges", _merge(forward="self.merge()\n        return self.base_layer(x)"), "forward_merges"),
        Mutant("forward is always the base", _merge(forward="return self.base_layer(x)"), "update_missing"),
        Mutant(
            "a switch",
            _merge(
                merge="if self.original is not None:\n            return self.unmerge()\n        self.original = self.base_layer.weight.clone()\n"
                "        self.base_layer.weight += self.scaling * self.lora_B @ self.lora_A"
            ),
            "toggles",
        ),
        Mutant(
            "zeroes B",
            _merge(
                merge="if self.original is None:\n            self.original = self.base_layer.weight.clone()\n"
                "            self.base_layer.weight += self.scaling * self.lora_B @ self.lora_A\n            self.lora_B.zero_()",
                forward="return super().forward(x)",
            ),
            "factor_lost",
        ),
        Mutant("merge does nothing", _merge(merge="self.original = self.base_layer.weight.clone()"), "no_merge"),
        Mutant(
            "forgets that it was unmerged",
            _merge(
                merge="if self.original is None:\n            self.original = self.base_layer.weight.clone()\n            self.merged = True\n"
                "            self.base_layer.weight += self.scaling * self.lora_B @ self.lora_A",
                forward="return self.base_layer(x) if getattr(self, 'merged', False) else super().forward(x)",
            ),
            "stays_off",
        ),
    ],
    "2.6": [
        Mutant("kept, not lost", _swallowed("1 - norm(rounded - W - delta) / norm(delta)"), "kept"),
        Mutant("size of what arrived", _swallowed("norm(rounded - W) / norm(delta)"), "arrived"),
        Mutant("relative to W", _swallowed("norm(rounded - W - delta) / norm(W)"), "relative_to_W"),
        Mutant("rounds delta alone", _swallowed("norm(delta.to(dtype).float() - delta) / norm(delta)"), "rounded_delta"),
        Mutant("percent", _swallowed("100 * norm(rounded - W - delta) / norm(delta)"), "percent"),
        Mutant("not divided", _swallowed("norm(rounded - W - delta)"), "not_divided"),
        Mutant("squared", _swallowed("((rounded - W - delta) ** 2).sum() / (delta ** 2).sum()"), "squared"),
        Mutant("compares lengths", _swallowed("1 - norm(rounded - W) / norm(delta)"), "norm_ratio"),
        Mutant("upside down", _swallowed("norm(delta) / norm(rounded - W - delta)"), "upside_down"),
        Mutant("absolute values", _swallowed("(rounded - W - delta).abs().sum() / delta.abs().sum()"), "sum_of_absolutes"),
        Mutant("rounds delta before adding", _swallowed("norm((W.to(dtype) + delta.to(dtype)).float() - W - delta) / norm(delta)"), "rounded_first"),
        Mutant(
            "subtracts in the coarse dtype",
            _swallowed("norm(((W + delta).to(dtype) - W.to(dtype)).float() - delta) / norm(delta)"),
            "subtracted_rounded",
        ),
        Mutant("never rounds", _swallowed("norm((W + delta) - W - delta) / norm(delta)"), "nothing_lost"),
    ],
}

ALTERNATIVES = {
    "2.1": [
        "def lora_forward(x, W, b, A, B, alpha, r):\n    return F.linear(x, W, b) + F.linear(F.linear(x, A), B) * (alpha / r)\n",
        "def lora_forward(x, W, b, A, B, alpha, r):\n    return F.linear(x, W + alpha / r * (B @ A), b)\n",
        "def lora_forward(x, W, b, A, B, alpha, r):\n    y = torch.einsum('...i,oi->...o', x, W) + "
        "torch.einsum('...i,ri,or->...o', x, A, B) * alpha / r\n    return y if b is None else y + b\n",
    ],
    "2.2": [
        "def init_factors(d_in, d_out, r):\n    A = torch.empty(r, d_in)\n    nn.init.kaiming_uniform_(A, a=math.sqrt(5))\n"
        "    return A, torch.zeros(d_out, r)\n",
        "def init_factors(d_in, d_out, r):\n    return nn.Parameter(torch.randn(r, d_in) * d_in**-0.5), nn.Parameter(torch.zeros((d_out, r)))\n",
        "def init_factors(d_in, d_out, r):\n    return [nn.Linear(d_in, r).weight.data, torch.zeros(d_out, r, dtype=torch.float64)]\n",
    ],
    "2.3": [
        "def factor_gradients(x, g, A, B, alpha, r):\n    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()\n"
        "    ((x @ A.T @ B.T) * g).sum().mul(alpha / r).backward()\n    return A.grad, B.grad\n",
        "def factor_gradients(x, g, A, B, alpha, r):\n    dW = alpha / r * torch.einsum('no,ni->oi', g, x)\n    return B.T @ dW, dW @ A.T\n",
        "def factor_gradients(x, g, A, B, alpha, r):\n    gA, gB = torch.zeros_like(A), torch.zeros_like(B)\n    for xi, gi in zip(x, g):\n"
        "        gA += torch.outer(B.T @ gi, xi)\n        gB += torch.outer(gi, A @ xi)\n    return gA * alpha / r, gB * alpha / r\n",
    ],
    "2.4": [
        _layer(),
        '''
class MyLoRALinear(nn.Module):
    def __init__(self, base, r, alpha):
        super().__init__()
        self.base_layer, self.r, self.alpha = base, r, alpha
        for p in self.base_layer.parameters():
            p.requires_grad = False
        self.register_parameter("lora_A", nn.Parameter(torch.empty(r, base.weight.shape[1])))
        self.register_parameter("lora_B", nn.Parameter(torch.zeros(base.weight.shape[0], r)))
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)

    def forward(self, x):
        return F.linear(x, self.base_layer.weight + self.alpha / self.r * self.lora_B @ self.lora_A, self.base_layer.bias)
''',
        '''
class MyLoRALinear(nn.Linear):
    def __init__(self, base, r, alpha):
        super().__init__(base.in_features, base.out_features, bias=False)
        del self.weight
        self.base_layer = base.requires_grad_(False)
        self.s = alpha / r
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features) / 4)
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, r))

    def forward(self, x):
        return torch.add(self.base_layer(x), x @ self.lora_A.t() @ self.lora_B.t(), alpha=self.s)
''',
    ],
    "2.5": [
        _merge(),
        _layer().replace("MyLoRALinear", "Plain")
        + '''
class MergeableLoRA(Plain):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.merged, self.saved = False, None

    def merge(self):
        if self.merged:
            return
        with torch.no_grad():
            self.saved = self.base_layer.weight.data
            self.base_layer.weight.data = self.saved + self.scaling * (self.lora_B @ self.lora_A)
        self.merged = True

    def unmerge(self):
        if self.merged:
            self.base_layer.weight.data = self.saved
            self.merged = False

    def forward(self, x):
        y = self.base_layer(x)
        if not self.merged:
            y = y + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)
        return y
''',
    ],
    "2.6": [
        _swallowed("norm(rounded - (W + delta)) / norm(delta)"),
        _swallowed("torch.dist(rounded.double(), W.double() + delta) / delta.norm()"),
        "def swallowed(W, delta, dtype):\n    lost = (W.numpy() + delta.numpy()) - torch.tensor(W.numpy() + delta.numpy()).to(dtype).float().numpy()\n"
        "    return np.linalg.norm(lost) / np.linalg.norm(delta.numpy())\n",
    ],
}
