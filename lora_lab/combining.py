"""Make a trained adapter smaller, or one adapter out of several; both say what it costs.

    compress(model, r=4)            the nearest update of rank 4, layer by layer, in place
    compress(model, energy=0.99)    in each layer as many directions as hold 99 % of ||ΔW||^2
    combine([a, b], "concat")       w_1 ΔW_1 + w_2 ΔW_2 exactly, at rank r_1 + r_2
    combine([a, b], "svd", r=8)     the nearest update of rank 8 to that sum
    combine([a, b], "average")      averages A's and B's: cheap, usual, and wrong by cross terms, as the result's errors show

||.|| is the Frobenius norm; relative errors are ||ΔW_new - ΔW_wanted|| / ||ΔW_wanted||, of the factors as they are stored. All of it
is computed on the CPU in float64, from the factors alone: no (out, in) product is built.
"""

from __future__ import annotations

import copy
import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .adapt import TrainedCopy, install, lora_layers, make_layer, remove_lora
from .layers import LoRAFusedLinear, LoRALayer, check_settings
from .spectra import energy as held_energy
from .spectra import factored_svd, factored_svdvals, numerical_rank

METHODS = {
    "concat": "factors side by side: exact, rank r_1 + r_2",
    "svd": "the best of rank r",
    "average": "A = sum w_i A_i, B = sum w_i B_i: cross terms w_i w_j B_i A_j",
    "linear": "the same with sqrt(w_i scaling_i), peft's 'linear': cross terms too",
}


@dataclass(frozen=True)
class LayerCost:
    """What became of one layer. r_before: of each adapter (one, if compressed; 0 where it has none); norm: ||ΔW_wanted||."""

    module: str
    r_before: tuple[int, ...]
    r: int
    norm: float
    error: float  # ||ΔW_new - ΔW_wanted||

    @property
    def relative_error(self) -> float:
        """0 where nothing is wanted and nothing is there, inf where nothing is wanted and something is there."""
        return self.error / self.norm if self.norm else (math.inf if self.error else 0.0)


@dataclass(frozen=True)
class Cost:
    """What `compress` did, or, with `model` and `weights`, `combine`. Parameters and bytes are those of A and B."""

    what: str
    rows: tuple[LayerCost, ...]
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    model: nn.Module | None = field(default=None, repr=False)
    weights: tuple[float, ...] = ()

    def __iter__(self) -> Iterator[LayerCost]:
        return iter(self.rows)

    @property
    def relative_error(self) -> float:
        """Over all layers: sqrt(sum ||error||^2 / sum ||wanted||^2)."""
        error, norm = (math.hypot(*(getattr(row, name) for row in self.rows)) for name in ("error", "norm"))
        return error / norm if norm else (math.inf if error else 0.0)

    def table(self):
        """A pandas DataFrame, one row per layer."""
        import pandas

        return pandas.DataFrame([
            {"module": row.module, "r_before": row.r_before if len(row.r_before) > 1 else row.r_before[0], "r": row.r,
             "norm": row.norm, "error": row.error, "relative_error": row.relative_error}
            for row in self.rows
        ])  # fmt: skip

    def summary(self) -> str:
        ranks = sorted({row.r for row in self.rows})
        rank = f"r = {ranks[0]}" if len(ranks) == 1 else f"r from {ranks[0]} to {ranks[-1]}"
        return (
            f"{self.what}: {rank}, relative error of ΔW {_share(self.relative_error)} over {len(self.rows)} layer{'s' * (len(self.rows) > 1)}, "
            f"{self.parameters_before:,} -> {self.parameters:,} parameters, {self.bytes_before:,} -> {self.bytes:,} bytes"
        )

    def __str__(self) -> str:
        wide = max(len(row.module) for row in self.rows)
        lines = [f"{row.module:{wide}}  r {_ranks(row):>9}   {_share(row.relative_error)}" for row in self.rows]
        return "\n".join([self.summary(), *lines])

    def _repr_html_(self) -> str:
        cell = '<td style="padding: 0.15em 0.7em; text-align: right">'
        rows = "".join(
            f'<tr><th scope="row" style="font-weight: normal; text-align: left; padding: 0.15em 0.7em">{html.escape(row.module)}</th>'
            f"{cell}{_ranks(row)}</td>{cell}{row.norm:.3g}</td>{cell}{_share(row.relative_error)}</td></tr>"
            for row in self.rows
        )
        head = "".join(f'<th scope="col" style="padding: 0.15em 0.7em">{text}</th>' for text in ("module", "r", "‖ΔW‖ wanted", "relative error"))
        table = f'<table style="font-variant-numeric: tabular-nums"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        return f'<div><p style="max-width: 76ch">{html.escape(self.summary())}</p><details><summary>layer by layer</summary>{table}</details></div>'


def _share(error: float) -> str:
    return f"{100 * error:.3g} %" if math.isfinite(error) else "∞"


def _ranks(row: LayerCost) -> str:
    return f"{' + '.join(map(str, row.r_before))} → {row.r}"


# A block is a pair of factors (B (out, r), A (r, in)) in float64 on the CPU. A plain layer has one, under None; a fused layer one per slice.
Block = tuple[Tensor, Tensor]


def _blocks(layer: LoRALayer) -> dict[int | None, Block]:
    A, B = (factor.detach().to("cpu", torch.float64) for factor in (layer.lora_A, layer.lora_B))
    if not isinstance(layer, LoRAFusedLinear):
        return {None: (B, A)}
    n, r = len(layer.slices), layer.r
    return dict(zip(layer.slices, zip(B.view(n, -1, r), A.view(n, r, -1), strict=True), strict=True))


def _stacked(blocks: dict[int | None, Block]) -> tuple[Tensor, Tensor]:
    """(lora_B, lora_A) as the layer stores them."""
    return torch.cat([B for B, _ in blocks.values()]), torch.cat([A for _, A in blocks.values()])


def _norm(B: Tensor, A: Tensor) -> float:
    """||B A||."""
    return torch.linalg.vector_norm(factored_svdvals(B, A)).item()


def _distance(new: Block, wanted: Block) -> float:
    """||B A - B' A'||: of the factors side by side, since the products would have to be built."""
    return _norm(torch.cat([new[0], -wanted[0]], 1), torch.cat([new[1], wanted[1]]))


def _truncated(block: Block, r: int) -> Block:
    """The nearest block of rank r, with r columns and rows; both factors carry sqrt(S)."""
    U, S, Vh = factored_svd(*block)
    r_kept = min(r, int(numerical_rank(S)))
    root = S[:r_kept].sqrt()
    return _padded((U[:, :r_kept] * root, root[:, None] * Vh[:r_kept]), r)


def _padded(block: Block, r: int) -> Block:
    """The same product with r columns and rows. New ones begin as in a fresh layer, B at 0: with A at 0, too, no gradient would ever
    reach them."""
    B, A = block
    more, inputs = r - B.shape[1], A.shape[1]
    fresh = torch.rand(more, inputs, generator=torch.Generator().manual_seed(0), dtype=A.dtype)
    return torch.cat([B, B.new_zeros(len(B), more)], 1), torch.cat([A, (2 * fresh - 1) / math.sqrt(inputs)])


def _check(name: str, layer: LoRALayer) -> None:
    for what, factor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
        bad = int((~factor.isfinite()).sum())
        if bad:
            raise ValueError(f"{name}: {what} has {bad} of {factor.numel()} entries that are NaN or infinite; did the training diverge?")


def _size(layers) -> tuple[int, int]:
    """Parameters and bytes of A and B."""
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    return sum(f.numel() for f in factors), sum(f.nbytes for f in factors)


# ---- compress


@torch.no_grad()
def compress(model: nn.Module, r: int | None = None, energy: float | None = None) -> Cost:
    """Truncate every layer's trained update in place, to rank r or to the share `energy` of its ||ΔW||^2, and say what it cost.

        BA = U diag(S) Vh,   B' = U_r sqrt(S_r),  A' = sqrt(S_r) Vh_r:  no update of rank r is nearer (Eckart and Young)

    r       at least 1; layers that have no more than r stay as they are, bit for bit
    energy  0 < energy <= 1; 1 drops only what is 0. Slices of a fused layer keep one r, the largest that one of them needs

    `scaling` stays: alpha becomes scaling * r (scaling * sqrt(r) with rslora). An update of 0 keeps B = 0, and directions beyond its
    rank are as in a fresh layer, so that all can be trained. In float32 the result is exact to rounding where r is not below the rank.
    lora_A and lora_B become new parameters: **an optimizer made before still holds the old ones**; make a new one. To keep the
    larger adapter, compress a copy (copy.deepcopy) or save it first.

    Everything is checked and computed before anything is changed. Raises ValueError or TypeError: no LoRA layer, not exactly one of r
    and energy, NaN; RuntimeError: a merged layer.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("compress: this model carries no LoRA layer; call apply_lora(model, ...) or load_adapter(model, folder) first")
    if (r is None) == (energy is None):
        raise ValueError(f"compress takes r=... or energy=..., one of them; found r={r}, energy={energy}")
    if r is not None:
        check_settings(r, 1.0)
    elif not 0 < energy <= 1:
        raise ValueError(f"energy is the share of ||ΔW||^2 to keep, 0 < energy <= 1; found {energy!r}")
    for name, layer in layers.items():
        layer.refuse_while_merged(f"compress ({name})")
        _check(name, layer)

    parameters, size = _size(layers.values())
    rows, new = [], {}
    for name, layer in layers.items():
        blocks, scaling = _blocks(layer), abs(layer.scaling)
        norm = scaling * math.hypot(*(_norm(*block) for block in blocks.values()))
        wanted = r if r is not None else max(_needed(block, energy) for block in blocks.values())
        if wanted >= layer.r:
            rows.append(LayerCost(name, (layer.r,), layer.r, norm, 0.0))
            continue
        smaller = {place: _truncated(block, wanted) for place, block in blocks.items()}
        stored = [factor.to(layer.lora_A) for factor in _stacked(smaller)]
        new[name] = wanted, stored
        kept = _split(stored, blocks)
        error = scaling * math.hypot(*(_distance(kept[place], block) for place, block in blocks.items()))
        rows.append(LayerCost(name, (layer.r,), wanted, norm, error))
    for name, (rank, (B, A)) in new.items():
        layer = layers[name]
        scaling = layer.scaling
        layer.r = rank
        layer.alpha = scaling * (math.sqrt(rank) if layer.rslora else rank)
        layer.lora_A = nn.Parameter(A, requires_grad=layer.lora_A.requires_grad)
        layer.lora_B = nn.Parameter(B, requires_grad=layer.lora_B.requires_grad)
    what = f"compressed to r = {r}" if r is not None else f"compressed to {100 * energy:g} % of the energy"
    return Cost(what, tuple(rows), parameters, _size(layers.values())[0], size, _size(layers.values())[1])


def _needed(block: Block, share: float) -> int:
    """How many directions hold this share of ||BA||^2; 1 at least."""
    S = factored_svdvals(*block)
    return max(1, min(int((held_energy(S) < share).sum()) + 1, int(numerical_rank(S))))


def _split(stored: Sequence[Tensor], like: dict[int | None, Block]) -> dict[int | None, Block]:
    """Stacked factors as blocks again, in float64."""
    B, A = (factor.to("cpu", torch.float64) for factor in stored)
    n = len(like)
    return dict(zip(like, zip(B.chunk(n), A.chunk(n), strict=True), strict=True))


# ---- combine


@torch.no_grad()
def combine(models: Sequence[nn.Module], method: str = "svd", weights: Sequence[float] | None = None, r: int | None = None) -> Cost:
    """One adapter out of several of one base: ΔW_wanted = sum_i w_i ΔW_i. Returns a `Cost` whose `.model` is a new model.

    models    each carries LoRA over the same base, bit for bit; they may differ in r, alpha, targets and slices, and are not changed
    weights   w_i, any finite numbers, 1 each if not given; (0.5, 0.5) for the mean, (1, -1) for a difference
    method    "concat"   B = [w_1 scaling_1 B_1, w_2 scaling_2 B_2], A = [A_1; A_2]: exact up to rounding, rank r_1 + r_2
              "svd"      the best of rank r (default: the largest r_i of each layer), from the factors
              "average"  A = sum w_i A_i, B = sum w_i B_i:  what averaging adapter files does. BA has w_i w_j B_i A_j for all i, j, so it is
                         right where all adapters agree, and for two that share nothing w_i^2 instead of w_i
              "linear"   A = sum sqrt|w_i scaling_i| A_i, B likewise, signs in A: peft's combination_type="linear". Right where the
                         cross terms B_i A_j vanish; twice too large for two equal adapters at (0.5, 0.5)

    A layer that only some adapt counts as 0 in the others. A layer of which one adapts slices and another all becomes a plain one.
    The new layers have scaling 1 ("average": the adapters' own), no dropout, the dtype of the first model's; all r equal the stored
    columns. `.rows` has the error of every layer, `.relative_error` that of all.

    Raises ValueError: fewer than two models, one without LoRA, another base (with the names of what differs), unknown method, NaN,
    "average" or "linear" over unequal r or slices; modules_to_save and trained biases, which no A and B holds.
    """
    models, weights = list(models), [1.0] * len(models) if weights is None else [float(w) for w in weights]
    _check_combine(models, method, weights, r)
    adapters = [lora_layers(model) for model in models]
    names = _in_order(models[0], adapters)

    result = remove_lora(copy.deepcopy(models[0]))
    before = [name for name, p in result.named_parameters() if p.requires_grad]
    rows, layers = [], {}
    for name in names:
        parts = [(w, adapter[name]) for w, adapter in zip(weights, adapters, strict=True) if name in adapter]
        first = parts[0][1]
        wanted = _wanted(parts)
        blocks, scaling = _combined(name, parts, wanted, method, r)
        rank = max(B.shape[1] for B, _ in blocks.values())
        blocks = {place: _padded(block, rank) for place, block in blocks.items()}
        slices = None if None in blocks else tuple(blocks)
        options = {"adapter_dtype": first.lora_A.dtype}
        module = result.get_submodule(name)
        layer = LoRAFusedLinear(module, rank, scaling * rank, slices, first.of, **options) if slices else make_layer(module, rank, scaling * rank, **options)
        B, A = _stacked(blocks)
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
        layers[name] = layer
        stored = _blocks(layer)
        error = math.hypot(*(_distance((scaling * B, A), wanted[place]) for place, (B, A) in stored.items()))
        ranks = tuple(adapter[name].r if name in adapter else 0 for adapter in adapters)
        rows.append(LayerCost(name, ranks, rank, math.hypot(*(_norm(*block) for block in wanted.values())), error))
    # A layer that stands in several places stays one layer.
    built = {id(layer.base_layer): layer for layer in layers.values()}
    places = {name: built[id(m)] for name, m in result.named_modules(remove_duplicate=False) if id(m) in built and "base_layer" not in name.split(".")}
    install(result, places, {}, "none", before)
    sizes = [_size(adapter.values()) for adapter in adapters]
    parameters, size = _size(layers.values())
    what = f"combined by {method} with weights {', '.join(f'{w:g}' for w in weights)}"
    return Cost(what, tuple(rows), sum(s[0] for s in sizes), parameters, sum(s[1] for s in sizes), size, result, tuple(weights))


def _wanted(parts: list[tuple[float, LoRALayer]]) -> dict[int | None, Block]:
    """sum_i w_i ΔW_i as factors side by side, for each slice if all are adapted by slices."""
    scaled = [(w * layer.scaling, _common(layer, parts)) for w, layer in parts]
    places = sorted({place for _, blocks in scaled for place in blocks}, key=lambda place: -1 if place is None else place)
    wanted = {}
    for place in places:
        # The square root of |w| on both sides keeps A and B of one size; the sign goes with B.
        sides = [(math.copysign(math.sqrt(abs(c)), c) * blocks[place][0], math.sqrt(abs(c)) * blocks[place][1]) for c, blocks in scaled if place in blocks]
        wanted[place] = torch.cat([B for B, _ in sides], 1), torch.cat([A for _, A in sides])
    return wanted


def _common(layer: LoRALayer, parts) -> dict[int | None, Block]:
    """A layer's blocks in the form that all parts can take: slices if all have them, else the whole layer."""
    if len({getattr(other, "of", None) for _, other in parts}) == 1:
        return _blocks(layer)
    return {None: tuple(f.detach().to("cpu", torch.float64) for f in (layer.full_B(), layer.lora_A))}


def _combined(name: str, parts, wanted: dict[int | None, Block], method: str, r: int | None) -> tuple[dict[int | None, Block], float]:
    """The new blocks, and their scaling."""
    if method == "concat":
        return wanted, 1.0
    if method == "svd":
        most = r or max(B.shape[1] for _, layer in parts for B, _ in _common(layer, parts).values())
        return {place: _truncated(block, min(most, block[0].shape[1])) for place, block in wanted.items()}, 1.0
    kinds = {(layer.r, getattr(layer, "slices", None), getattr(layer, "of", None)) for _, layer in parts}
    if len(kinds) > 1:
        raise ValueError(
            f"{method!r} adds A to A and B to B, so both must have one r and the same slices; {name} has "
            f"{' and '.join(f'r={k[0]}' + (f', slices {k[1]}' if k[1] else '') for k in sorted(kinds, key=str))}. Use 'svd' or 'concat'"
        )
    scalings = {layer.scaling for _, layer in parts}
    if method == "average" and len(scalings) > 1:
        raise ValueError(f"'average' keeps the adapters' scaling, which is {' and '.join(f'{s:g}' for s in sorted(scalings))} in {name}; use 'svd' or 'concat'")
    blocks = {}
    for place in wanted:
        A, B = 0.0, 0.0
        for w, layer in parts:
            B_i, A_i = _blocks(layer)[place]
            c = w * layer.scaling
            a, b = (w, w) if method == "average" else (math.copysign(math.sqrt(abs(c)), c), math.sqrt(abs(c)))
            A, B = A + a * A_i, B + b * B_i
        blocks[place] = B, A
    return blocks, scalings.pop() if method == "average" else 1.0


def _in_order(model: nn.Module, adapters: list[dict[str, LoRALayer]]) -> list[str]:
    """Every adapted name once, in the model's order."""
    adapted = {name for adapter in adapters for name in adapter}
    return [name for name, _ in model.named_modules() if name in adapted]


def _check_combine(models: list, method: str, weights: list[float], r: int | None) -> None:
    if len(models) < 2 or not all(isinstance(model, nn.Module) for model in models):
        found = ", ".join(type(model).__name__ for model in models)
        raise ValueError(f"combine takes a list of two models or more that carry LoRA, combine([a, b], ...); found [{found}]")
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(f'{key!r} ({text})' for key, text in METHODS.items())}; found {method!r}")
    if len(weights) != len(models) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights are finite numbers, one per model; found {weights} for {len(models)} models")
    if r is not None:
        check_settings(r, 1.0)
        if method != "svd":
            raise ValueError(f"r is for method='svd'; {method!r} has the rank that it has. Afterwards compress(result.model, r={r}) makes it smaller")
    for number, model in enumerate(models, 1):
        layers = lora_layers(model)
        if not layers:
            raise ValueError(f"combine: model {number} of {len(models)} carries no LoRA layer; load its adapter first")
        heads = [name for name, module in model.named_modules() if isinstance(module, TrainedCopy)]
        if heads or model.__dict__.get("_before_lora", {}).get("biases"):
            raise ValueError(
                f"combine: model {number} also trains {'the modules ' + ', '.join(heads) if heads else 'biases'} in full, which no A and B holds. "
                "Combine adapters that were trained without modules_to_save and with bias='none'"
            )
        for name, layer in layers.items():
            _check(f"model {number}, {name}", layer)
    bases = [_base_tensors(model) for model in models]
    for number, base in enumerate(bases[1:], 2):
        strange = sorted(set(base) ^ set(bases[0]))
        other = [name for name, p in bases[0].items() if name in base and not (p.shape == base[name].shape and torch.equal(p, base[name].to(p)))]
        if strange or other:
            shown = (strange or other)[:3]
            how = "only one of them has" if strange else "different values in"
            raise ValueError(
                f"combine: model 1 and model {number} are not adapters of one base: {how} {', '.join(shown)}"
                + (f" and {len(strange or other) - 3} more" if len(strange or other) > 3 else "") + ". Load both adapters onto the same pretrained weights"
            )


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the base model under their own names, W0 where something is merged."""
    factors = {f"{name}.{factor}" for name in lora_layers(model) for factor in ("lora_A", "lora_B")}
    found = {name.replace(".base_layer.", "."): p.detach() for name, p in model.named_parameters() if name not in factors}
    for name, layer in lora_layers(model).items():
        if layer.merged:
            found[f"{name}.weight"] = layer.base_weight
    return found
