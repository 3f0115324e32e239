"""A whole model's updates at one look: size and spectrum of ΔW of every layer, and three comparisons over all layers.

    report(model)                       LoRA: one row per adapted layer, one more for each slice of a fused one
    report(tuned, base=before)          full fine-tuning: the same of ΔW = W1 - W0
    compare_subspaces(a, b, i, j)       which directions do two adapters share?                         paper 7.2
    amplifications(model, r)            how much louder than W0 in its own directions, with the control  paper 7.3

    ΔW = scaling * B @ A (out, in),  S its singular values, ||.|| the Frobenius norm

Singular values come from the factors, layers of one shape at once; no (out, in) product is built unless `intruders` asks.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .adapt import QKV, lora_layers
from .layers import LoRAFusedLinear, LoRALayer, is_conv1d
from .spectra import (
    amplification,
    effective_rank,
    energy,
    factored_svdvals,
    intruder_dimensions,
    leading_svd,
    numerical_rank,
    random_update,
    stable_rank,
    subspace_similarity,
)

EXACT_UP_TO = 1024  # min(out, in) of a dense update whose whole spectrum is computed: a second or so on two cores
LEADING = 32  # singular values of a larger one


@dataclass(frozen=True)
class Row:
    """One update. Numbers without unit but for the norms, which have that of the weight's entries.

    module          name; with "h.0.attn.c_attn:q" one slice, with "h.0.attn.c_attn:q,v" the slices of a fused layer together, whose ΔW
                    is as tall as the layer, with rows of 0 for the others
    kind            what is adapted: Linear, Conv1D, Embedding, Conv2d
    part            "whole", or "slice": a slice of the row above, not to be counted twice
    out, inputs     shape of ΔW
    r               rank that the factors allow, nominally: r of the layer, n r for n slices together; None for a dense ΔW
    alpha, scaling  None for a dense ΔW
    S               singular values of ΔW, largest first; for a very large dense ΔW only the first ones
    effective_rank, stable_rank   as in `spectra`; 0 for ΔW = 0; effective_rank is nan where only the first values are known
    energy_first    S_1^2 / ||ΔW||^2; nan for ΔW = 0
    norm_update, norm_weight, ratio    ||ΔW||, ||W0||, their quotient: 0 for ΔW = 0, inf over a weight that is 0. W0 is the
                    slice's own part in the row of a slice, all of the fused weight in the row of all slices
    merged          whether ΔW lies in the weight at the moment; ||W0|| is then still that of W0
    intruders, intruders_random, lowest_similarity   with intruders=True, else None: how many, how many a random update of the
                    same singular values has, and the lowest max |cos| among the k directions
    error_bound     of S, for a very large dense ΔW (see `spectra.leading_svd`); 0 where the spectrum is whole
    """

    module: str
    kind: str
    part: str
    out: int
    inputs: int
    r: int | None
    alpha: float | None
    scaling: float | None
    S: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    energy_first: float
    norm_update: float
    norm_weight: float
    merged: bool = False
    intruders: int | None = None
    intruders_random: int | None = None
    lowest_similarity: float | None = None
    error_bound: float = 0.0

    @property
    def ratio(self) -> float:
        if self.norm_update == 0:
            return 0.0
        return self.norm_update / self.norm_weight if self.norm_weight else math.inf


@dataclass(frozen=True)
class Report:
    """Rows, in the model's order. `report["h.0.attn.c_attn:q"]` is one of them; `table()` and `spectra()` are DataFrames."""

    rows: tuple[Row, ...]
    settings: str = ""  # of the intruders, in words

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, module: str) -> Row:
        for row in self.rows:
            if row.module == module:
                return row
        raise KeyError(f"no row {module!r}; there are {', '.join(row.module for row in self.rows[:8])}" + (" ..." if len(self) > 8 else ""))

    @property
    def whole(self) -> tuple[Row, ...]:
        """The rows that together are the update: without the slices of fused layers."""
        return tuple(row for row in self.rows if row.part == "whole")

    def table(self, top: int = 3):
        """A pandas DataFrame, one row per update, with the first `top` singular values as S_1, S_2, ... (nan beyond the last)."""
        import pandas

        names = [name for name in Row.__dataclass_fields__ if name != "S"]
        rows = []
        for row in self.rows:
            cells = {name: getattr(row, name) for name in names} | {"ratio": row.ratio}
            rows.append(cells | {f"S_{i + 1}": row.S[i] if i < len(row.S) else math.nan for i in range(top)})
        table = pandas.DataFrame(rows).rename(columns={"inputs": "in"})
        if not self.settings:
            return table.drop(columns=["intruders", "intruders_random", "lowest_similarity"])
        return table.astype({"intruders": "Int64", "intruders_random": "Int64"})

    def spectra(self):
        """A pandas DataFrame of all singular values: module, part, i (from 1), S, energy (share held by the first i)."""
        import pandas

        rows = []
        for row in self.rows:
            total, held = row.norm_update**2, 0.0
            for i, value in enumerate(row.S, 1):
                held += value * value
                rows.append((row.module, row.part, i, value, min(held / total, 1.0) if total else math.nan))
        return pandas.DataFrame(rows, columns=["module", "part", "i", "S", "energy"])

    def summary(self) -> str:
        """One or two sentences: how many, how large, how full."""
        whole = self.whole
        still = [row for row in whole if row.norm_update == 0]
        text = f"{len(whole)} update{'s' * (len(whole) != 1)}"
        if still:
            text += f", {len(still) if len(still) < len(whole) else 'all'} of them exactly 0 (not trained yet?)"
        live = [row for row in whole if row.norm_update > 0]
        if live:
            ratios = sorted(row.ratio for row in live)
            text += f": ‖ΔW‖ / ‖W‖ from {_percent(ratios[0])} to {_percent(ratios[-1])}"
            ranks = sorted(row.effective_rank for row in live if not math.isnan(row.effective_rank))
            if ranks:
                text += f", effective rank from {ranks[0]:.3g} to {ranks[-1]:.3g}"
            limits = sorted({row.r for row in live if row.r is not None})
            if limits:
                text += f" of r = {limits[0]}" + (f" to {limits[-1]}" if len(limits) > 1 else "")
        return text + ("; " + self.settings if self.settings else "")

    def __str__(self) -> str:
        head = self._head()
        cells = [head, *(self._cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) if k < 2 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells]
        return "\n".join([self.summary(), *lines])

    def _repr_html_(self) -> str:
        """A table that takes its colours from the page; beyond 16 rows the rest is folded away."""
        lines = ["<tr>" + "".join(_td(text, k) for k, text in enumerate(self._cells(row))) + _spark(row) + "</tr>" for row in self.rows]
        head = "".join(f'<th scope="col" style="{_align(k)}">{html.escape(text)}</th>' for k, text in enumerate(self._head()))
        head = f'<thead><tr>{head}<th scope="col" style="text-align: left">singular values</th></tr></thead>'
        look = '<table style="font-variant-numeric: tabular-nums; border-collapse: collapse; margin: 0.3em 0">'
        shown, folded = (lines, []) if len(lines) <= 16 else (lines[:12], lines[12:])
        page = f'<p style="max-width: 76ch; margin: 0.3em 0">{html.escape(self.summary())}</p>{look}{head}<tbody>{"".join(shown)}</tbody></table>'
        if folded:
            page += f"<details><summary>{len(folded)} more</summary>{look}{head}<tbody>{''.join(folded)}</tbody></table></details>"
        return f"<div>{page}</div>"

    def _head(self) -> list[str]:
        head = ["module", "kind", "out x in", "r", "effective rank", "stable rank", "‖ΔW‖", "‖ΔW‖ / ‖W‖", "S₁", "energy of S₁"]
        return head + (["intruders", "random"] if self.settings else [])

    def _cells(self, row: Row) -> list[str]:
        name = row.module if row.part == "whole" else "  " + row.module
        cells = [name, row.kind, f"{row.out} x {row.inputs}", "–" if row.r is None else f"{row.r}"]
        cells += [_number(row.effective_rank), _number(row.stable_rank), _number(row.norm_update), _percent(row.ratio)]
        cells += [_number(row.S[0]), _percent(row.energy_first)]
        if self.settings:
            cells += ["–" if n is None else f"{n}" for n in (row.intruders, row.intruders_random)]
        return cells


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else "∞" if math.isinf(share) else f"{100 * share:.3g} %"


def _align(k: int) -> str:
    return f"padding: 0.15em 0.7em; text-align: {'left' if k < 2 else 'right'}; white-space: pre"


def _td(text: str, k: int) -> str:
    tag = f'th scope="row" style="font-weight: normal; {_align(k)}"' if k == 0 else f'td style="{_align(k)}"'
    return f"<{tag}>{html.escape(text)}</{tag[:2]}>"


def _spark(row: Row) -> str:
    """The first 16 singular values over the largest, as bars in the colour of the text: a picture, so hidden from screen readers."""
    tallest = row.S[0] or 1.0
    bars = "".join(
        f'<rect x="{5 * i}" y="{18 - max(16 * s / tallest, 0.5):.1f}" width="4" height="{max(16 * s / tallest, 0.5):.1f}"/>'
        for i, s in enumerate(row.S[:16])
    )
    picture = f'<svg width="80" height="18" aria-hidden="true" fill="currentColor" opacity="0.65">{bars}</svg>'
    return f'<td style="padding: 0.15em 0.7em; text-align: left">{picture}</td>'


# ---- reports


@torch.no_grad()
def report(
    model: nn.Module, base: nn.Module | Mapping[str, Tensor] | None = None, *,
    intruders: bool = False, k: int = 10, epsilon: float = 0.5, side: str = "left", seed: int = 0,
) -> Report:  # fmt: skip
    """Size and spectrum of every layer's update.

    model      carries LoRA; or, with `base`, a model tuned in full
    base       the model before full fine-tuning, or its state_dict: reported is ΔW = W1 - W0 of every weight matrix, in float32
    intruders  also look for intruder dimensions (`spectra.intruder_dimensions` with k, epsilon, side) and for those of a random update
               with the same singular values, drawn with `seed`: two dense SVDs per matrix and, once, one of W0; for GPT-2's c_attn
               each is about 0.25 s of processor time, so for all its layers expect half a minute and more.
               k is cut to what a layer has; embeddings are left out (None): their directions are over tokens, not features

    Merged or not makes no difference, nor does `lora_disabled`. Nothing is changed.
    Raises ValueError: no LoRA layer, entries that are NaN or infinite (with the layers' names), with `base`: a model that still
    carries LoRA, or weights that don't fit.
    """
    if base is not None:
        items = _dense_items(model, base)
        rows = [_dense_row(item) for item in items]
    else:
        items = _lora_items(_layers(model))
        try:
            rows = _lora_rows(items)
        except ValueError:
            _refuse_unfinite(items)  # which looks at each, to say where
            raise
    settings = ""
    if intruders:
        settings = f"intruders: of the top {k} {side} directions of W0 + ΔW, those with |cos| < {epsilon:g}; random: an update with the same singular values"
        rows = [_with_intruders(row, item, k, epsilon, side, seed) for row, item in zip(rows, items, strict=True)]
    return Report(tuple(rows), settings)


@dataclass(frozen=True)
class _Item:
    """An update before it is measured: its factors or its dense matrix, and the weight that it belongs to."""

    module: str
    kind: str
    part: str
    layer: LoRALayer | None
    update: tuple[Tensor, Tensor, float] | Tensor  # ΔW (out, in)
    weight: Tensor  # W0 as it is stored
    stored_transposed: bool
    slices: tuple[int, int] | None = None  # (which, of how many): the rows of W0 (out, in) that a slice adds to

    def W0(self) -> Tensor:
        """(out, in), as ΔW."""
        weight = self.weight.detach()
        weight = weight.T if self.stored_transposed else weight.reshape(weight.shape[0], -1)
        return weight if self.slices is None else weight.chunk(self.slices[1])[self.slices[0]]


def _layers(model: nn.Module, what: str = "report") -> dict[str, LoRALayer]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"{what}: this model carries no LoRA layer. Call apply_lora(model, ...) or load_adapter(model, folder) first"
            + ("; for a model tuned in full give the one it came from, report(model, base=before)" if what == "report" else "")
        )
    return layers


def _kind(base: nn.Module) -> str:
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d)
    return "Conv1D" if is_conv1d(base) else next((kind.__name__ for kind in kinds if isinstance(base, kind)), type(base).__name__)


def _lora_items(layers: Mapping[str, LoRALayer]) -> list[_Item]:
    items = []
    for name, layer in layers.items():
        kind, weight, turned = _kind(layer.base_layer), layer.base_weight, layer.stored_transposed
        A, B = layer.lora_A.detach(), layer.full_B().detach()
        if not isinstance(layer, LoRAFusedLinear):
            items.append(_Item(name, kind, "whole", layer, (B, A, layer.scaling), weight, turned))
            continue
        n, r = len(layer.slices), layer.r
        if n > 1:  # one slice alone is a matrix of its own, the paper's W_v
            items.append(_Item(f"{name}:{_letters(layer, layer.slices)}", kind, "whole", layer, (B, A, layer.scaling), weight, turned))
        for place, A_k, B_k in zip(layer.slices, A.view(n, r, -1), layer.lora_B.detach().view(n, -1, r), strict=True):
            part, slice_name = "slice" if n > 1 else "whole", f"{name}:{_letters(layer, (place,))}"
            items.append(_Item(slice_name, kind, part, layer, (B_k, A_k, layer.scaling), weight, turned, (place, layer.of)))
    return items


def _letters(layer: LoRAFusedLinear, places: tuple[int, ...]) -> str:
    """Slices as `target_modules` names them: "q,v"; numbers where they are not three."""
    return ",".join("qkv"[p] if layer.of == len(QKV) else str(p) for p in places)


def _lora_rows(items: list[_Item]) -> list[Row]:
    groups: dict[tuple, list[int]] = {}
    for at, item in enumerate(items):
        B, A, _ = item.update
        groups.setdefault((B.shape, A.shape, B.dtype, A.dtype, A.device), []).append(at)
    rows: list[Row | None] = [None] * len(items)
    for places in groups.values():
        group = [items[at] for at in places]
        for at, row in zip(places, _group_rows(group), strict=True):
            rows[at] = row
    return rows


def _group_rows(group: list[_Item]) -> list[Row]:
    """Updates of one shape, together: QR and SVD of stacks."""
    scaling = torch.tensor([abs(item.update[2]) for item in group], dtype=torch.float64)
    S = factored_svdvals(torch.stack([item.update[0] for item in group]), torch.stack([item.update[1] for item in group]))
    S = scaling.to(S)[:, None] * S
    columns = [effective_rank(S), stable_rank(S), energy(S)[:, 0], torch.linalg.vector_norm(S, dim=-1)]
    numbers = torch.cat([torch.stack(columns, dim=-1), S], dim=-1).tolist()  # one wait for a GPU, not five
    rows = []
    for item, (effective, stable, first, norm, *values) in zip(group, numbers, strict=True):
        layer, (B, A, _) = item.layer, item.update
        rows.append(Row(
            item.module, item.kind, item.part, B.shape[0], A.shape[1], A.shape[0], layer.alpha, layer.scaling, tuple(values),
            effective, stable, first if norm else math.nan, norm, _norm(item), layer.merged,
        ))  # fmt: skip
    return rows


def _refuse_unfinite(items: list[_Item]) -> None:
    bad = []
    for item in items:
        for name, factor in zip(("lora_B", "lora_A"), item.update, strict=False):
            count = int((~factor.isfinite()).sum())
            if count:
                bad.append(f"{item.module} ({count} of {factor.numel()} entries of {name})")
    if bad:
        raise ValueError(
            f"adapters with NaN or infinite entries: {', '.join(bad[:4])}" + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
            + ". The training diverged, or the file is damaged; load the last good adapter"
        )


# ||W0|| costs more than the spectra of all factors, and W0 is frozen: it is measured once, until torch counts an edit of it.
_NORMS = WeakTensorKeyDictionary()


def _norm(item: _Item) -> float:
    """||W0||, of a slice too. An edit through `.data` is not noticed, as in merging."""
    weight = item.weight
    version = None if weight.is_inference() else weight._version
    kept = _NORMS.get(weight)
    if kept is None or kept[0] != version or version is None:
        kept = (version, {})
        _NORMS[weight] = kept
    if item.slices not in kept[1]:
        W0 = weight.detach() if item.slices is None else item.W0()
        kept[1][item.slices] = torch.linalg.vector_norm(W0, dtype=torch.promote_types(W0.dtype, torch.float32)).item()
    return kept[1][item.slices]


def _dense_items(model: nn.Module, base: nn.Module | Mapping[str, Tensor]) -> list[_Item]:
    if lora_layers(model) or (isinstance(base, nn.Module) and lora_layers(base)):
        raise ValueError(
            "report(model, base=...) is for full fine-tuning, and one of these models carries LoRA: "
            "call report(model) without base, or merge_and_unload first"
        )
    before = base.state_dict() if isinstance(base, nn.Module) else base
    items, seen, wrong = [], set(), []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim < 2 or id(weight) in seen or not isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) and not is_conv1d(module):
            continue
        seen.add(id(weight))  # an embedding tied to the head: once
        key = f"{name}.weight" if name else "weight"
        if key not in before:
            continue  # a fresh head has no before
        W0 = before[key].detach()
        if W0.shape != weight.shape:
            wrong.append(f"{key} {tuple(W0.shape)} before, {tuple(weight.shape)} now")
            continue
        turned = is_conv1d(module) or isinstance(module, nn.Embedding)
        W1 = weight.detach()
        exact = torch.promote_types(torch.promote_types(W0.dtype, W1.dtype), torch.float32)
        delta = W1.to(exact) - W0.to(W1.device, exact)
        delta = delta.T if turned else delta.reshape(len(delta), -1)
        items.append(_Item(name, _kind(module), "whole", None, delta, W0, turned))
    if wrong:
        raise ValueError(f"the model and its base differ in shape: {'; '.join(wrong[:4])}. Are they the same architecture?")
    if not items:
        raise ValueError("no weight matrix of the model is found in its base under the same name; was the right base given?")
    bad = [item.module for item in items if not item.update.isfinite().all()]
    if bad:
        raise ValueError(f"updates with NaN or infinite entries: {', '.join(bad[:6])}; the training diverged")
    return items


def _dense_row(item: _Item) -> Row:
    delta = item.update
    norm, bound, effective = torch.linalg.matrix_norm(delta).item(), 0.0, math.nan
    if min(delta.shape) <= EXACT_UP_TO:
        S = torch.linalg.svdvals(delta)
        effective = effective_rank(S).item()
    else:
        found = leading_svd(delta, LEADING)
        S, bound = found.S, found.bound
    first = (S[0].item() / norm) ** 2 if norm else math.nan
    stable = 1 / first if norm else 0.0
    return Row(
        item.module, item.kind, "whole", *delta.shape, None, None, None, tuple(S.tolist()), effective, stable, first, norm,
        _norm(item), error_bound=bound,
    )  # fmt: skip


def _with_intruders(row: Row, item: _Item, k: int, epsilon: float, side: str, seed: int) -> Row:
    if row.kind == "Embedding":
        return row
    W0 = item.W0()
    k = min(k, *W0.shape)
    found = intruder_dimensions(W0, item.update, k, epsilon, side)
    control = intruder_dimensions(W0, random_update(item.update, "rotated", seed), k, epsilon, side)
    return replace(row, intruders=found.count, intruders_random=control.count, lowest_similarity=found.similarity.min().item())


# ---- comparisons over all layers


def _updates(model: nn.Module, what: str) -> dict[str, _Item]:
    """Every update with a slice of its own, else of the layer: what the paper's sections 7.2 and 7.3 look at."""
    items = _lora_items(_layers(model, what))
    _refuse_unfinite(items)
    fused = {id(item.layer) for item in items if item.part == "slice"}
    return {item.module: item for item in items if item.part == "slice" or id(item.layer) not in fused}


THROUGH = {
    "BA": "right singular vectors of ΔW: what it reads",
    "BA left": "left singular vectors of ΔW: what it writes",
    "A": "right singular vectors of lora_A",
    "B": "left singular vectors of lora_B",
}


@torch.no_grad()
def compare_subspaces(first: nn.Module, second: nn.Module, i: int = 8, j: int = 64, through: str = "BA") -> dict[str, Tensor]:
    """phi(first, second, i, j) of every layer that both adapt (a slice of a fused one by itself): name -> (i, j) table.

    through  "BA": right singular vectors of ΔW; "BA left": left ones; "A": right ones of lora_A; "B": left ones of lora_B.
             The paper's figure 3 goes through A, whose singular values know nothing of B: look at both

    i and j are cut to the numerical rank of each layer's update, the same for all layers, so that tables can be averaged; an update of
    0 has no directions and raises. Entry [a - 1, b - 1] is phi(a, b): 0 orthogonal, 1 contained, max(a, b) / d expected of independent
    random subspaces of R^d (`spectra.subspace_similarity` has the traps: shared seeds, and what holds at init).
    Raises ValueError: no layer in common, shapes that differ, another `through`.
    """
    if through not in THROUGH:
        raise ValueError(f"through is one of {', '.join(f'{key!r} ({text})' for key, text in THROUGH.items())}; found {through!r}")
    a, b = (_updates(model, "compare_subspaces") for model in (first, second))
    common = [name for name in a if name in b]
    if not common:
        raise ValueError(f"the two models adapt no layer in common: {', '.join(list(a)[:3])} ... and {', '.join(list(b)[:3])} ...")
    pairs = {name: (_read(a[name], through), _read(b[name], through)) for name in common}
    i = min([i, *(_rank(x, f"{through} of {name}") for name, (x, _) in pairs.items())])
    j = min([j, *(_rank(y, f"{through} of {name}") for name, (_, y) in pairs.items())])
    return {name: subspace_similarity(x, y, i, j) for name, (x, y) in pairs.items()}


def _read(item: _Item, through: str):
    """What `subspace_similarity` is to compare the right singular vectors of."""
    B, A, scaling = item.update
    return {"BA": (B, A, scaling), "BA left": (A.mT, B.mT, scaling), "A": A, "B": B.mT}[through]


def _rank(update, what: str) -> int:
    S = factored_svdvals(*update) if isinstance(update, tuple) else torch.linalg.svdvals(update.to(torch.promote_types(update.dtype, torch.float32)))
    rank = int(numerical_rank(S))
    if rank == 0:
        raise ValueError(f"{what} is 0, as at the start of training: it has no directions to compare")
    return rank


@dataclass(frozen=True)
class Amplification:
    """One layer of `amplifications`; norms are Frobenius norms.

    norm_update      ||ΔW||
    overlap          ||U^T W0 V||, U and V the top r singular vectors of ΔW
    overlap_random   the same for random U and V, root mean square: r ||W0|| / sqrt(out in), exactly
    overlap_own      the same for W0's own top r: sqrt(S_1^2 + ... + S_r^2) of W0, the most there can be; nan unless asked for
    """

    module: str
    r: int
    norm_update: float
    norm_weight: float
    overlap: float
    overlap_random: float
    overlap_own: float = math.nan

    @property
    def amplification(self) -> float:
        """||ΔW|| / overlap: the paper's factor (table 7)."""
        return self.norm_update / self.overlap if self.overlap else math.inf

    @property
    def amplification_random(self) -> float:
        """||ΔW|| / overlap_random: what a random update of this norm would be credited with."""
        return self.norm_update / self.overlap_random if self.overlap_random else math.inf

    @property
    def above_random(self) -> float:
        """overlap / overlap_random: about 1 for a random update. This, and not the factor, tells a trained one apart."""
        return self.overlap / self.overlap_random if self.overlap_random else math.nan


@torch.no_grad()
def amplifications(model: nn.Module, r: int | None = None, own: bool = False) -> list[Amplification]:
    """Section 7.3 of the paper for every adapted layer (a slice of a fused one by itself), each with its control.

    r    how many of ΔW's directions; None: as many as each layer's update has
    own  also W0's own top r directions: one SVD of W0 per layer

    A random ΔW of the same norm meets *less* of W0 and so "amplifies" more (`spectra.amplification`): the factor alone shows nothing.
    Raises ValueError: no LoRA layer, an update of 0, an update with fewer than r directions.
    """
    rows = []
    for name, item in _updates(model, "amplifications").items():
        rank = _rank(item.update, f"the update of {name}")
        if r is not None and r > rank:
            raise ValueError(f"asked for {r} directions; the update of {name} has {rank}")
        count = r or rank
        W0 = item.W0()
        W0 = W0.to(torch.promote_types(W0.dtype, torch.float32))
        norm = torch.linalg.vector_norm(factored_svdvals(*item.update)).item()
        overlap = norm / amplification(W0, item.update, count).item()
        weight = _norm(item)
        most = torch.linalg.vector_norm(torch.linalg.svdvals(W0)[:count]).item() if own else math.nan
        rows.append(Amplification(name, count, norm, weight, overlap, count * weight / math.sqrt(W0.numel()), most))
    return rows
