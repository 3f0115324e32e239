"""LoRA's variants, each as the small change that it is: to the layer, to where it starts, or to the optimizer.

    h = W0 x + b + scaling * B A x          LoRA: A (r, in) uniform, B (out, r) zero, both trained with one rate

    changes the layer       DoRA, VeRA, LoRA-XS, AdaLoRA                 `add_variant(model, DoRALinear, targets, r=8, alpha=16)`
    changes the start       PiSSA, OLoRA, EVA                            the first two in the same way; EVA: `eva(model, batches, targets, r, alpha)`
    changes the training    LoRA+, LoRA-FA                               an optimizer for `lora_lab.train`; a hook on the gradient of B
    changes the scaling     rsLoRA                                       `apply_lora(..., rslora=True)`: alpha / sqrt(r), in layers.py already
    changes the base        QLoRA                                        `zoo.quantised`: 4 bits below, LoRA above

What they share: `full_B` says what B is in ΔW = scaling * B @ A, and merging, switching off and spectra follow from it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import apply_lora, check_targets, find_targets, install, lora_layers
from ..layers import LoRALayer, LoRALinear, check_base, is_conv1d


class Variant(LoRALinear):
    """A LoRA layer over nn.Linear or transformers' Conv1D whose trained parameters have other names than lora_A and lora_B.

    trained  names of the parameters that train
    Raises as LoRALinear does, and ValueError where r directions of W0 are asked for and it has fewer.
    """

    trained: tuple[str, ...] = ("lora_A", "lora_B")
    from_weight = False  # whether it starts from r directions of W0 itself

    def __init__(self, base_layer: nn.Module, r: int, alpha: float, **options):
        if self.from_weight and r > min(base_layer.weight.shape):
            raise ValueError(f"asked for r={r} directions of a weight {tuple(base_layer.weight.shape)}, which has {min(base_layer.weight.shape)}")
        check_base(self, base_layer, isinstance(base_layer, nn.Linear) or is_conv1d(base_layer), "an nn.Linear or Conv1D")
        self.stored_transposed = is_conv1d(base_layer)
        inputs, out = base_layer.weight.shape if self.stored_transposed else reversed(base_layer.weight.shape)
        LoRALayer.__init__(self, base_layer, (r, inputs), (out, r), r, alpha, **options)
        self.freeze()

    def freeze(self) -> None:
        """Of this layer exactly what `trained` names requires a gradient."""
        for name, parameter in self.named_parameters(recurse=False):
            parameter.requires_grad_(name in self.trained)

    def W0(self) -> Tensor:
        """The base weight as (out, in)."""
        return self.base_weight.T if self.stored_transposed else self.base_weight

    def _versions(self):
        return (*super()._versions(), *((id(p), p._version) for p in self.parameters(recurse=False)))  # merged: edits of these count, too


def add_variant(model: nn.Module, layer: Callable[..., Variant], target_modules: str | Iterable[str], **options) -> nn.Module:
    """Put `layer(base, **options)` in place of each target; everything else is frozen. As `apply_lora`, with a layer of your choice.

    Raises ValueError, before anything is changed, for targets that match nothing, and what the layer raises for its options.
    """
    targets = find_targets(model, target_modules)
    check_targets(model, {name: (module, None) for name, module in targets.items()})
    before = [name for name, p in model.named_parameters() if p.requires_grad]
    try:
        for module in targets.values():
            layer(copy.deepcopy(module), **options)  # a start may change the base: whoever fails must do so on a copy
        layers = {name: layer(module, **options) for name, module in targets.items()}
    except BaseException:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in before)  # the layers built so far have frozen their bases
        raise
    install(model, layers, {}, "none", before)
    for variant in layers.values():
        variant.freeze()
    return model


# ---- another layer -------------------------------------------------------------------------------------------------------------------------


class DoRALinear(Variant):
    """Magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353, equation 5).

        W' = m * V / ||V||,   V = W0 + scaling * B A,   ||V|| (out,): the norms of V's rows, m (out,) trained, ||W0|| at the start

    r (in + out) + out parameters. As in the paper's section 4.3 the norm passes no gradient. It needs V, so a step costs in * out a layer.
    Dropout is refused: the norm would be another one than that of the weight that x meets.
    """

    trained = ("lora_A", "lora_B", "magnitude")
    beyond_lora = "magnitudes of its own"

    def __init__(self, base_layer, r, alpha, dropout=0.0, **options):
        if dropout:
            raise ValueError(f"DoRA normalises W0 + ΔW as a whole, which dropout on the way to A would change; found dropout={dropout}")
        super().__init__(base_layer, r, alpha, **options)
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(self.W0().detach(), dim=1).to(self.lora_A.dtype))

    def ratio(self, dtype: torch.dtype | None = None) -> Tensor:
        """m / ||V||, (out,)."""
        V = self.W0().to(dtype=dtype) + super().delta_weight(dtype)
        return self.magnitude.to(dtype=dtype) / torch.linalg.vector_norm(V, dim=1).detach()

    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        W0 = self.W0().to(dtype=dtype)
        return self.ratio(dtype)[:, None] * (W0 + super().delta_weight(dtype)) - W0

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        b = 0 if self.bias is None else self.bias
        low_rank = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return self.ratio() * (y - b + self.scaling * low_rank) + b


class VeRALinear(Variant):
    """One random A and B for all layers, two vectors trained in each (Kopiczko et al. 2024, arXiv 2310.11454, equation 2).

        ΔW = diag(b) B diag(d) A,   b (out,) zero at the start, d (r,) at `d_initial`;   out + r parameters, no scaling

    shared  (A, B) of `vera_matrices`, large enough for every layer; a layer takes the corner that it needs, as peft does
    """

    trained = ("vector_d", "vector_b")

    def __init__(self, base_layer, shared: tuple[Tensor, Tensor], d_initial: float = 0.1, **options):
        A, B = shared
        super().__init__(base_layer, r=len(A), alpha=len(A), **options)
        (r, inputs), (out, _) = self.lora_A.shape, self.lora_B.shape
        if A.shape[1] < inputs or B.shape[0] < out or B.shape[1] != r:
            raise ValueError(f"a layer of {inputs} inputs and {out} outputs needs A ({r}, {inputs}) and B ({out}, {r}) or larger; found "
                             f"{tuple(A.shape)} and {tuple(B.shape)}: vera_matrices(model, targets, r) makes them large enough")  # fmt: skip
        # Slices of one tensor: the memory of A and B is there once.
        self.lora_A, self.lora_B = (nn.Parameter(t, requires_grad=False) for t in (A[:, :inputs], B[:out]))
        self.vector_d = nn.Parameter(torch.full((r,), float(d_initial), dtype=A.dtype))
        self.vector_b = nn.Parameter(torch.zeros(out, dtype=A.dtype))

    def full_B(self) -> Tensor:
        return self.vector_b[:, None] * self.lora_B * self.vector_d


def vera_matrices(model: nn.Module, target_modules, r: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Kaiming-uniform A (r, widest in) and B (widest out, r) for all targets, from a seed: a file needs the seed alone."""
    shapes = [reversed(m.weight.shape) if is_conv1d(m) else m.weight.shape for m in find_targets(model, target_modules).values()]
    outs, inputs = zip(*(tuple(shape) for shape in shapes), strict=True)
    draw = torch.Generator().manual_seed(seed)
    bound = [math.sqrt(6 / fan) for fan in (max(inputs), r)]
    return tuple(torch.empty(shape).uniform_(-b, b, generator=draw) for shape, b in zip([(r, max(inputs)), (max(outs), r)], bound, strict=True))


class LoRAXSLinear(Variant):
    """Between W0's own strongest directions, one small matrix trained (Bałazy et al. 2024, arXiv 2405.17604, equation 2).

        ΔW = scaling * U_r S_r R V_r^T,   W0 = U S V^T,   R (r, r);   r² parameters, whatever the layer's size

    R starts at zero, where the paper draws it with a standard deviation of 1e-5: both outer factors are there, so zero has a gradient.
    """

    trained = ("core",)
    from_weight = True

    def __init__(self, base_layer, r, alpha, **options):
        super().__init__(base_layer, r, alpha, **options)
        U, S, Vh = torch.linalg.svd(self.W0().detach(), full_matrices=False)
        self.lora_A.data, self.lora_B.data = Vh[:r].contiguous(), U[:, :r] * S[:r]
        self.core = nn.Parameter(torch.zeros(r, r, dtype=self.lora_A.dtype))

    def full_B(self) -> Tensor:
        return self.lora_B @ self.core


class AdaLoRALinear(Variant):
    """An update in the form of an SVD, so that single directions can be pruned (Zhang et al. 2023, arXiv 2303.10512, equation 3).

        ΔW = scaling * P diag(λ) Q,   P = lora_B (out, r) and Q = lora_A (r, in) normal with deviation 0.02, λ (r,) zero;   r (in + out) + r parameters

    `orthogonality` keeps P and Q near orthonormal, `Budget` prunes λ over all layers together.
    """

    trained = ("lora_A", "lora_B", "values")

    def __init__(self, base_layer, r, alpha, **options):
        super().__init__(base_layer, r, alpha, **options)
        self.values = nn.Parameter(torch.zeros(r, dtype=self.lora_A.dtype))

    def reset_lora(self) -> None:
        self.refuse_while_merged("reset_lora")
        nn.init.normal_(self.lora_A, std=0.02), nn.init.normal_(self.lora_B, std=0.02)
        if hasattr(self, "values"):
            nn.init.zeros_(self.values)

    def full_B(self) -> Tensor:
        return self.lora_B * self.values

    def orthogonality(self) -> Tensor:
        """||P^T P - I|| + ||Q Q^T - I||, Frobenius norms: to be added to the loss, times 0.1 to 0.5 (equation 4)."""
        eye = torch.eye(self.r, dtype=self.lora_A.dtype)
        return torch.linalg.matrix_norm(self.lora_B.T @ self.lora_B - eye) + torch.linalg.matrix_norm(self.lora_A @ self.lora_A.T - eye)


class Budget:
    """AdaLoRA's rule: how many directions all layers may keep together, and which (sections 3.2 and 3.3).

        sensitivity  I = |w * dL/dw|,   smoothed: Ī = β1 Ī + (1-β1) I,   uncertainty Ū = β2 Ū + (1-β2) |I - Ī|
        score of direction i: s(λ_i) + mean s(P_*i) + mean s(Q_i*),   s = Ī Ū;   the lowest are set to λ = 0

    model  with AdaLoRALinear layers    target  directions a layer at the end, on average    steps  of the whole run
    warm, last  steps at the start with all directions, and at the end with the final ones;  every  steps between two prunings
    Call `step(k)` after the backward pass and the optimizer's update, before gradients are cleared, k counted from 1.
    """

    def __init__(self, model, target: int, steps: int, warm: int, last: int, every: int = 1, beta1: float = 0.85, beta2: float = 0.85):
        self.layers = [m for m in model.modules() if isinstance(m, AdaLoRALinear)]
        self.total, self.target = sum(m.r for m in self.layers), target * len(self.layers)
        if not self.layers or not 0 < self.target < self.total or warm + last >= steps:
            raise ValueError(f"asked for {target} directions a layer, {warm} + {last} of {steps} steps; found {len(self.layers)} AdaLoRALinear layers with "
                             f"{self.total} directions: there must be some to prune, and steps to do it in")  # fmt: skip
        self.steps, self.warm, self.last, self.every, self.betas, self.means = steps, warm, last, every, (beta1, beta2), {}

    def allowed(self, k: int) -> int:
        """Directions that may stay after step k: all, then down by a cubic curve, then the target (equation 12)."""
        if k <= self.warm:
            return self.total
        left = max(0.0, 1 - (k - self.warm) / (self.steps - self.last - self.warm))
        return int((self.total - self.target) * left**3 + self.target)

    @torch.no_grad()
    def step(self, k: int) -> int:
        """Update the scores, prune if it is time; returns how many directions are left."""
        scores = torch.cat([self._scores(layer) for layer in self.layers])
        allowed = self.allowed(k)
        if self.warm < k and (k % self.every == 0 or k > self.steps - self.last) and allowed < self.total:
            kept = scores > scores.kthvalue(self.total - allowed).values
            for layer, mask in zip(self.layers, kept.split([m.r for m in self.layers]), strict=True):
                layer.values.mul_(mask)
        return sum(int((layer.values != 0).sum()) for layer in self.layers)

    def _scores(self, layer: AdaLoRALinear) -> Tensor:
        s = {}
        for name in layer.trained:
            w = getattr(layer, name)
            now = torch.zeros_like(w) if w.grad is None else (w * w.grad).abs()
            mean, unsure = self.means.get((layer, name), (torch.zeros_like(w), torch.zeros_like(w)))
            mean = self.betas[0] * mean + (1 - self.betas[0]) * now
            unsure = self.betas[1] * unsure + (1 - self.betas[1]) * (now - mean).abs()
            self.means[layer, name] = mean, unsure
            s[name] = mean * unsure
        return s["values"] + s["lora_B"].mean(0) + s["lora_A"].mean(1)


# ---- another start -------------------------------------------------------------------------------------------------------------------------


class PiSSALinear(Variant):
    """Train W0's strongest directions, freeze the rest (Meng et al. 2024, arXiv 2404.02948, equations 2 to 4).

        B = U_r sqrt(S_r / scaling),   A = sqrt(S_r / scaling) V_r^T,   W0 <- W0 - scaling * B A

    The layer computes what it did, up to rounding, but the frozen weight is another one: an adapter saved by itself fits only this residual.
    `change` is the update against the original weight, of rank at most 2 r.
    """

    from_weight = True
    beyond_lora = "a frozen weight that is no longer the base's (`change()` is the update against that one)"

    def __init__(self, base_layer, r, alpha, **options):
        super().__init__(base_layer, r, alpha, **options)
        with torch.no_grad():
            self.lora_B.data, self.lora_A.data = self.start(self.W0())
            self.register_buffer("B_start", self.lora_B.detach().clone(), persistent=False)
            self.register_buffer("A_start", self.lora_A.detach().clone(), persistent=False)
            base_layer.weight.sub_(self.to_base_layout(self.delta_weight()))

    def start(self, W0: Tensor) -> tuple[Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
        root = (S[: self.r] / self.scaling).sqrt()
        return U[:, : self.r] * root, root[:, None] * Vh[: self.r]

    def change(self) -> tuple[Tensor, Tensor, float]:
        """(B, A, scaling) of what training added to the original weight: [B, -B_start] (out, 2r), [A; A_start] (2r, in)."""
        return torch.cat([self.lora_B, -self.B_start], 1), torch.cat([self.lora_A, self.A_start]), self.scaling


class OLoRALinear(PiSSALinear):
    """As PiSSA, from a QR decomposition (Büyükakyüz 2024, arXiv 2406.01775): W0 = Q R, B = Q's first r columns, A = R's first r rows."""

    def start(self, W0: Tensor) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(W0)
        return Q[:, : self.r].contiguous(), R[: self.r].contiguous()


def eva(model: nn.Module, batches: Iterable, target_modules: str | Sequence[str], r: int, alpha: float, rho: float = 1.0) -> nn.Module:
    """LoRA whose A starts at the directions in which the layer's inputs vary most (Paischer et al. 2024, arXiv 2410.07170, section 3).

        X (tokens, in) = U S V^T, inputs that the layer gets on `batches`;   A = V_r^T, B = 0

    rho  1: every layer has rank r. Above 1: ranks from 1 to rho r, the same sum, given to the directions that explain most of their layer's inputs
    batches  dicts or tensors for model(batch); a few are enough. Scaling stays alpha / r in every layer, whatever its rank.
    Raises ValueError for rho < 1 and where a layer has seen fewer independent inputs than directions are asked of it.
    """
    if rho < 1:
        raise ValueError(f"rho is the largest rank in units of r, at least 1; found {rho}")
    targets = find_targets(model, target_modules)
    squares = {name: 0.0 for name in targets}  # X^T X: its eigenvectors are V, and batches add up

    def watch(name):
        def look(module, inputs):
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            squares[name] = squares[name] + x.T @ x

        return look

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in targets.items()]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            for batch in batches:
                if isinstance(batch, dict):
                    model(**{k: v for k, v in batch.items() if k != "labels"})
                else:
                    model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    most = int(rho * r)
    explained, directions = {}, {}
    for name, square in squares.items():
        values, vectors = torch.linalg.eigh(square) if isinstance(square, Tensor) else (torch.zeros(0), None)
        if (values > values.amax() * 1e-10).sum() < most if len(values) else True:
            raise ValueError(f"{name} has seen too few different inputs for {most} directions; give more batches, or a smaller r or rho")
        explained[name], directions[name] = (values.flip(0) / values.sum())[:most], vectors.T.flip(0)[:most]
    ranks = dict.fromkeys(targets, r)
    if most > r:  # one direction each, the others by what they explain
        rest = sorted(((float(share), name) for name, shares in explained.items() for share in shares[1:]), reverse=True)[: (r - 1) * len(targets)]
        ranks = {name: 1 + sum(owner == name for _, owner in rest) for name in targets}
    apply_lora(model, r=r, alpha=alpha, target_modules=list(targets), rank_pattern=ranks, alpha_pattern={n: alpha * k / r for n, k in ranks.items()})
    for name, layer in lora_layers(model).items():
        layer.lora_A.data.copy_(directions[name][: layer.r])
    return model


# ---- another way to train ------------------------------------------------------------------------------------------------------------------


def lora_plus(model: nn.Module, ratio: float = 16.0, **settings) -> Callable[[list], torch.optim.Optimizer]:
    """An optimizer for `lora_lab.train` in which B learns `ratio` times as fast as A (Hayou et al. 2024, arXiv 2402.12354): optimizer=lora_plus(model)."""
    if not ratio > 0:
        raise ValueError(f"ratio is lr of B over lr of A, above 0; found {ratio}")
    fast = {id(layer.lora_B) for layer in lora_layers(model).values()}

    def make(parameters):
        groups = [[p for p in parameters if (id(p) in fast) == which] for which in (False, True)]
        scaled = [{"params": group, "lr_scale": scale} for group, scale in zip(groups, (1.0, ratio), strict=True) if group]
        return torch.optim.AdamW(scaled, **{"weight_decay": 0.0} | settings)

    return make


def lora_fa(model: nn.Module, correct: bool = False) -> nn.Module:
    """Freeze A (Zhang et al. 2023, arXiv 2308.03303): r out numbers train, and the backward pass needs no more than A x, (tokens, r), of a layer.

    correct  give B the gradient g (A A^T)^-1 / scaling² instead of g, as peft's optimizer of that name does: the step on B that moves ΔW most like
             full fine-tuning's
    """
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(False)
        if correct:
            square = layer.scaling**2 * (layer.lora_A @ layer.lora_A.T).detach()
            layer.lora_B.register_hook(lambda g, square=square: torch.linalg.solve(square.to(g.dtype), g.T).T)
    return model
