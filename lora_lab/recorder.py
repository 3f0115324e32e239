"""A flight recorder: what trains is written down while it trains, to be played back without training.

    recorder = FlightRecorder().watch(model)
    for step in train(model, batches, steps=300, lr=1e-2):
        recorder.record(step.step, loss=step.loss)
    model_then = recorder.replay(recorder.nearest(50), rank=2, volume=0.5)

Kept are the parameters that require a gradient, in their own precision: what is played back is what was there, to the last bit.
Memory is bounded: when the recorder is full, every second moment is dropped, and from then on half as many are kept.
"""

from __future__ import annotations

import copy
import json
import math
import operator
import os
from array import array
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapt import lora_layers
from .files import atomic_write
from .spectra import factored_svd

MOST_BYTES = 20_000_000
EVERY = 8  # so that recording stays below 1 % of a step of 0.3 ms
MOMENTS = 256  # at most, and even: a slider with more stops would not tell them apart
LOSSES = 1 << 15  # points of the loss curve at most, of 16 bytes each; they are part of max_bytes
DECOMPOSED = 4_000_000  # bytes of SVDs that are remembered, and those of one moment in any case: scrubbing the rank takes them once
CHECKED = 16  # moments: so often it is asked whether the model still has the adapters that are watched
SAMPLED = 16  # entries of each adapted weight that a file carries, by which another base is noticed


class FlightRecorder:
    """Moments of a training run, thinned so that they never take more than `max_bytes`.

    max_bytes  of snapshots and loss curve together
    every      updates from one moment to the next, to begin with. Where a step takes long, 1 costs nothing; where it takes 0.3 ms, a copy
               takes about 4 % of that
    dtype      None keeps every parameter in its own precision. torch.float16 fits twice as many moments of float32 factors into
               max_bytes; each number is then rounded, by 0.05 % at most

    A moment is a number of updates made (`times`), the trained parameters and every layer's alpha. The first moment, before any
    training, and the last one are always kept. Only parameters are: the running statistics of a BatchNorm are played back as they
    are when `replay` is first called.
    """

    def __init__(self, max_bytes: int = MOST_BYTES, every: int = EVERY, dtype: torch.dtype | None = None):
        if operator.index(every) < 1:
            raise ValueError(f"a moment is kept after every 1, 2, ... updates; found every={every}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"factors are kept as floating-point numbers; found dtype={dtype}")
        self.max_bytes, self.every, self.dtype = int(max_bytes), int(every), dtype
        self.model: nn.Module | None = None
        self._last = math.inf
        self._steps, self._losses = array("q"), array("d")
        self._svds: OrderedDict = OrderedDict()

    def watch(self, model: nn.Module, step: int = 0) -> FlightRecorder:
        """Begin: remember the model and write down its state now, after `step` updates. Returns the recorder.

        Raises ValueError for a model without adapters or with nothing that trains, for more numbers than max_bytes can hold four
        times, and for a second model: one recorder holds one flight.
        """
        if self.model is not None:
            raise ValueError("this recorder holds a flight already; another run, another rank or another model needs another FlightRecorder()")
        layers = lora_layers(model)
        if not layers:
            raise ValueError("this model has no LoRA layers to record; call apply_lora(model, r=..., ...) first")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("nothing in this model requires a gradient, so every moment would be the same")
        kind = self.dtype
        for p in trained.values():
            kind = kind if self.dtype else p.dtype if kind is None else torch.promote_types(kind, p.dtype)
        numbers = sum(p.numel() for p in trained.values())
        row, curve = numbers * kind.itemsize, 16 * LOSSES
        capacity = min(MOMENTS, (self.max_bytes - curve) // row) // 2 * 2
        if capacity < 4:
            raise ValueError(
                f"a moment of this model takes {row:,} bytes ({numbers:,} numbers), so max_bytes={self.max_bytes:,} is too little for "
                f"four of them and the loss curve; ask for {4 * row + curve:,} or more, a smaller r, or dtype=torch.float16"
            )
        self._places, start = {}, 0
        for name, p in trained.items():
            self._places[name] = (slice(start, start + p.numel()), p.shape)
            start += p.numel()
        self.model, self.layers, self._trained = model, layers, trained
        self._layers, self._parameters = list(layers.values()), list(trained.values())
        # Where each layer and each parameter hangs, so that it costs no walk to ask whether it still does.
        self._hangs = [(model.get_submodule(n.rpartition(".")[0])._modules, n.rpartition(".")[2], layer) for n, layer in layers.items()]
        self._hangs += [(model.get_submodule(n.rpartition(".")[0])._parameters, n.rpartition(".")[2], p) for n, p in trained.items()]
        self._rows = torch.full((capacity, numbers), math.nan, dtype=kind)  # written to now, so that no step waits for fresh memory pages
        self._times: list[int] = []
        self._alphas: list[list[float]] = []
        # Rows that stay; records so far; the numbers of the next one that stays, of the next that needs attention, and from one to another.
        self._kept, self._count, self._next, self._due, self._stride = 0, 0, 1, 1, self.every
        # torch counts the edits of a tensor. While this one's count is that of the last record, the model is still in that state.
        self._probe, self._version = next(reversed(trained.values())), -1
        self._pointers = self._sources = self._stage = None
        self._last = -math.inf
        self.record(step)
        return self

    def record(self, step: int, loss: float | None = None) -> None:
        """Tell the recorder that update number `step` was made. loss: what it reported, the batch's loss before that update.

        Meant to be called after every update: most calls only note the loss; every few, the factors are copied. Raises RuntimeError
        before `watch`; ValueError for a step that is not later than the last, and, when it comes to copying, for replaced adapters.
        """
        if not step > self._last:
            self._refuse(step)
        self._last, self._version = step, self._probe._version
        if loss is not None:
            self._steps.append(step)
            self._losses.append(loss)
        self._count += 1
        if self._count == self._due:
            self._attend()

    def _refuse(self, step: int) -> None:
        if self.model is None:
            raise RuntimeError("nothing is watched yet: call recorder.watch(model) before the training, then record(step, loss=...)")
        if self._last == math.inf:
            raise RuntimeError("this flight came from a file and has landed; a new run needs another FlightRecorder()")
        raise ValueError(f"steps go up; found {step} after {self._last}. A run that starts again needs another FlightRecorder()")

    def _attend(self) -> None:
        """What is to do in this call: a moment that stays, a loss curve that is full, or both."""
        if self._count == self._next:
            self._write()
            self._kept += 1
            self._next += self._stride
            if self._kept == len(self._rows):
                self._thin()
        if len(self._steps) >= LOSSES:
            self._thin_losses()
        self._due = min(self._next, self._count + LOSSES - len(self._steps))

    def _write(self) -> None:
        """Copy the model's state into the row behind those that stay."""
        at = self._kept
        if at % CHECKED == 0:
            self._check_hangs()
        pointers = [p.data_ptr() for p in self._parameters]
        if pointers != self._pointers:  # the first time, and after model.to(...)
            self._bind()
            self._pointers = pointers
        if self._sources is not None:
            row = self._array[at]
            for place, values in self._sources:
                row[place] = values
        else:
            self._rows[at].copy_(torch.cat([p.detach().flatten() for p in self._parameters]))
        self._times[at:] = (self._last,)
        self._alphas[at:] = ([layer._alpha for layer in self._layers],)

    def _bind(self) -> None:
        """Find out how to copy: numpy moves a small matrix in a tenth of torch's time, and knows neither bfloat16 nor a GPU."""
        plain = (torch.float16, torch.float32, torch.float64)
        self._sources = None
        if self._rows.dtype in plain and all(p.dtype in plain and p.device.type == "cpu" and p.is_contiguous() for p in self._trained.values()):
            self._array = self._rows.numpy()
            self._sources = [(self._places[name][0], p.detach().numpy().reshape(-1)) for name, p in self._trained.items()]

    def _check_hangs(self) -> None:
        for there, name, thing in self._hangs:
            found = there.get(name)
            if found is not thing:
                what = "layer" if isinstance(thing, nn.Module) else "parameter"
                now = f", now {tuple(found.shape)}," if isinstance(found, nn.Parameter) else ""
                raise ValueError(
                    f"the {what} {name!r}{now} was replaced since recorder.watch(model). Other adapters, another rank or another shape "
                    "are another flight: make another FlightRecorder()"
                )

    def _thin(self) -> None:
        half = len(self._rows) // 2
        self._rows[:half] = self._rows[::2].clone()
        self._times, self._alphas = self._times[::2], self._alphas[::2]
        # The newest was an odd one: it is dropped here, and `times` writes the model's state down again when it is asked. The next one
        # that stays comes after the old stride, and from there on after the new one.
        self._kept, self._stride = half, 2 * self._stride

    def _thin_losses(self) -> None:
        """Keep the lowest and the highest of every four points, and the first and last."""
        steps, losses = np.array(self._steps), np.array(self._losses)
        groups, first = losses.reshape(-1, 4), 4 * np.arange(len(losses) // 4)
        keep = np.unique(np.concatenate([first + groups.argmin(1), first + groups.argmax(1), [0, len(losses) - 1]]))
        self._steps, self._losses = array("q", steps[keep].tolist()), array("d", losses[keep].tolist())

    # ---- reading

    @property
    def times(self) -> list[int]:
        """The moments that are there, as numbers of updates, rising. The last is the last recorded, unless the model was changed since."""
        if self.model is not None and self._times[-1] < self._last < math.inf and self._probe._version == self._version:
            self._write()
        return self._times if self.model is not None else []

    @property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps, losses) as recorded, at most 32,768 points. The loss of step k was computed with the weights after k - 1 updates."""
        return np.array(self._steps), np.array(self._losses)

    @property
    def nbytes(self) -> int:
        """Bytes in use: the snapshots, at their full number, and the loss curve, at its longest."""
        return (self._rows.nbytes if self.model is not None else 0) + 16 * LOSSES

    @property
    def r(self) -> int:
        """The largest rank of any adapted layer (of one slice, in a fused layer)."""
        self._check_not_empty()
        return max(layer.r for layer in self.layers.values())

    def nearest(self, step: int) -> int:
        """The moment nearest to `step` updates, as an index into `times`."""
        self._check_not_empty()
        return int(np.abs(np.array(self.times) - step).argmin())

    def alphas(self, i: int) -> dict[str, float]:
        """Each adapted layer's alpha at moment i."""
        i = self._moment(i)
        return dict(zip(self.layers, self._alphas[i], strict=True))

    def state(self, i: int) -> dict[str, Tensor]:
        """Every trained parameter at moment i, by name: copies on the CPU."""
        i = self._moment(i)
        row = self._rows[i]
        return {name: row[place].clone().view(shape).to(self._trained[name].dtype) for name, (place, shape) in self._places.items()}

    def factors(self, i: int) -> dict[str, tuple[Tensor, Tensor, float]]:
        """name -> (lora_B, lora_A, scaling) at moment i, as they are stored: ΔW = scaling * lora_B @ lora_A in a plain layer.

        A fused layer of n slices gives them as a stack, (n, out, r) and (n, r, in): one ΔW per slice.
        """
        i = self._moment(i)
        kept = self.state(i)
        found = {}
        for (name, layer), alpha in zip(self.layers.items(), self._alphas[i], strict=True):
            # A factor that doesn't train is not recorded: it is what it always was.
            prefix = f"{name}." if name else ""
            B, A = (kept.get(prefix + x, getattr(layer, x).detach().cpu()) for x in ("lora_B", "lora_A"))
            scaling = alpha / (math.sqrt(layer.r) if layer.rslora else layer.r)
            slices = getattr(layer, "slices", None)
            if slices is not None:
                B, A = B.view(len(slices), -1, layer.r), A.view(len(slices), layer.r, -1)
            found[name] = B, A, scaling
        return found

    def svds(self, i: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """name -> U, S, Vh of ΔW at moment i without its scaling, from the factors; stacked for a fused layer, one per slice."""
        i = self._moment(i)
        key = self.times[i]
        if key not in self._svds:
            self._svds[key] = {name: factored_svd(B, A) for name, (B, A, _) in self.factors(i).items()}
            bytes_each = sum(part.nbytes for parts in self._svds[key].values() for part in parts)
            while len(self._svds) > max(1, DECOMPOSED // bytes_each):
                self._svds.popitem(last=False)
        self._svds.move_to_end(key)
        return self._svds[key]

    def spectra(self, i: int, volume: float = 1.0) -> dict[str, Tensor]:
        """name -> singular values of volume * ΔW at moment i, largest first; of all slices of a fused layer together (n r of them)."""
        scalings = {name: abs(volume * scaling) for name, (_, _, scaling) in self.factors(i).items()}
        return {name: (scalings[name] * S).flatten().sort(descending=True).values for name, (_, S, _) in self.svds(i).items()}

    @torch.no_grad()
    def replay(self, i: int, rank: int | None = None, volume: float = 1.0) -> nn.Module:
        """The model at moment i, with every ΔW cut to its best approximation of `rank` and multiplied by `volume`.

        rank    None, or r and above: nothing is cut. 0: no adapter. A fused layer is cut slice by slice
        volume  alpha is volume times what it was at that moment

        Always the same model, in eval mode, overwritten by each call: a copy of the watched one that shares its frozen weights, so it
        costs little memory and the watched model can go on training. Raises ValueError for a rank below 0, a volume that is not
        finite, and factors that are not; RuntimeError when the frozen weights were edited, as by merge.
        """
        i = self._moment(i)
        if rank is not None and operator.index(rank) < 0:
            raise ValueError(f"a rank is 0 or more; found {rank}")
        if not math.isfinite(volume):
            raise ValueError(f"volume multiplies alpha, so it is a finite number; found {volume}")
        stage = self._own_model()
        parameters = dict(stage.named_parameters())
        for name, value in self.state(i).items():
            parameters[name].copy_(value)
        for (name, layer), alpha in zip(lora_layers(stage).items(), self._alphas[i], strict=True):
            layer.alpha = volume * alpha
            if rank is not None and rank < layer.r:
                U, S, Vh = self.svds(i)[name]
                root = S[..., :rank].sqrt()
                left = layer.r - root.shape[-1]  # columns of B and rows of A that stay, and are zero
                B, A = F.pad(U[..., :rank] * root[..., None, :], (0, left)), F.pad(root[..., None] * Vh[..., :rank, :], (0, 0, 0, left))
                layer.lora_B.copy_(B.reshape(layer.lora_B.shape))
                layer.lora_A.copy_(A.reshape(layer.lora_A.shape))
        return stage

    def _own_model(self) -> nn.Module:
        self._check_hangs()
        merged = [name for name, layer in self.layers.items() if layer.merged]
        if merged:
            raise RuntimeError(f"{merged[0]!r} is merged, so its frozen weight holds ΔW already: unmerge(model), then play back")
        if self._stage is None:
            shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
            self._stage = copy.deepcopy(self.model, shared).eval().requires_grad_(False)
        return self._stage

    # ---- on disk

    def save(self, path: str | os.PathLike) -> None:
        """Write the flight to one safetensors file, whole or not at all. The frozen weights are not in it."""
        self._check_not_empty()
        steps, losses = self.curve
        tensors = {f"moments.{name}": self._rows[: len(self.times), place].contiguous() for name, (place, _) in self._places.items()}
        tensors |= {f"base.{name}": sample for name, sample in self._samples().items()}
        tensors |= {"times": torch.tensor(self.times), "alphas": torch.tensor(self._alphas, dtype=torch.float64)}
        tensors |= {"steps": torch.from_numpy(steps), "losses": torch.from_numpy(losses)}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"lora_lab": json.dumps({"flight": 1, "shapes": self._shapes()})})

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module) -> FlightRecorder:
        """A flight from a file, to be played back on `model`: the same base with the same adapters, as `apply_lora` makes them.

        Raises ValueError for a file that is no flight, other adapters or trained parameters, and for other frozen weights.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("lora_lab", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()} if about.get("flight") == 1 else None
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from None
        if tensors is None:
            raise ValueError(f"{path} holds no flight that this version reads; FlightRecorder.save writes them")
        flight = cls(max(MOST_BYTES, 8 * os.path.getsize(path))).watch(model)
        if flight._shapes() != about["shapes"]:
            differ = [n for n in {**flight._shapes(), **about["shapes"]} if flight._shapes().get(n) != about["shapes"].get(n)]
            n = differ[0]
            raise ValueError(f"the flight was recorded with {n}: {about['shapes'].get(n)}, this model has {flight._shapes().get(n)}; same r, targets and base?")
        for name, here in flight._samples().items():
            there = tensors[f"base.{name}"]
            # Not to the last bit: a base trained on another machine differs a little, another seed differs everywhere.
            if not (here - there).abs().max() <= 0.05 * there.abs().max():
                raise ValueError(f"the frozen weight of {name!r} is not the one that the flight was recorded on; same base, same seed?")
        flight._rows = torch.cat([tensors[f"moments.{name}"] for name in flight._places], 1)
        flight._times, flight._alphas = tensors["times"].tolist(), tensors["alphas"].tolist()
        flight._steps, flight._losses = array("q", tensors["steps"].tolist()), array("d", tensors["losses"].tolist())
        flight._last = math.inf  # it has landed
        return flight

    def _shapes(self) -> dict[str, list]:
        kinds = {f"layer {n or '(whole)'}": [type(m).__name__, m.r, m.rslora, *getattr(m, "slices", ())] for n, m in self.layers.items()}
        return kinds | {name: list(shape) for name, (_, shape) in self._places.items()}

    def _samples(self) -> dict[str, Tensor]:
        """A few entries of each adapted layer's frozen weight."""
        weights = {name: layer.base_layer.weight.detach().flatten() for name, layer in self.layers.items()}
        return {name: w[torch.linspace(0, len(w) - 1, SAMPLED).long()].float().cpu() for name, w in weights.items()}

    def _moment(self, i: int) -> int:
        self._check_not_empty()
        if not -len(self.times) <= operator.index(i) < len(self.times):
            raise IndexError(f"there are {len(self.times)} moments, 0 to {len(self.times) - 1}; found {i}")
        return i % len(self.times)

    def _check_not_empty(self) -> None:
        if not self.times:
            raise ValueError("the recorder is empty: call recorder.watch(model), train, and record(step, loss=...) after each step")
