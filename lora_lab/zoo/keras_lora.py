"""LoRA in Keras 3: a layer of our own, Keras's `enable_lora`, and weights carried over from torch so that all of them compute the same.

    y = activation(x W + b + scaling * (x A) B)         Keras keeps samples in rows and weights as (in, out)

    W (in, out)  kernel = W0ᵀ of torch        A (in, r)  lora_kernel_a = lora_Aᵀ of torch        scaling = alpha / r
    b (out,)     bias                         B (r, out) lora_kernel_b = lora_Bᵀ of torch

What `keras.layers.Dense.enable_lora(rank, lora_alpha)` does otherwise than the paper (Keras 3.15; each is a test): the bias goes on training;
alpha is `rank` unless it is given, so that scaling is 1; A starts from "he_uniform", sqrt(6) times as large as torch's; forward builds the
whole (in, out) product; saved weights are merged, so that there is no adapter file; and `Dense(..., lora_rank=4, lora_alpha=8)` forgets its
alpha when it is built.

Keras is imported here, on a backend that is there: see `backend_for`. Raises ImportError, with what to install, where Keras is missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import nn

from ..layers import LoRALinear


def backend_for(environ: Mapping[str, str], config: Path, installed: Callable[[str], bool]) -> str | None:
    """The backend to ask Keras for, or None to leave it alone: somebody has chosen already.

    KERAS_BACKEND decides; then the backend in Keras's own file, if that package is installed (Keras writes "tensorflow" there by itself,
    whether or not it can be imported); else torch, which the lab has anyway.
    """
    if environ.get("KERAS_BACKEND"):
        return None
    try:
        chosen = json.loads(config.read_text(encoding="utf-8")).get("backend")
    except (OSError, ValueError, AttributeError):
        chosen = None
    return None if chosen and installed(chosen) else "torch"


def _choose_backend() -> None:
    if "keras" in sys.modules:  # its backend can't be changed any more
        return
    home = Path(os.environ["KERAS_HOME"]) if os.environ.get("KERAS_HOME") else Path.home() / ".keras"
    backend = backend_for(os.environ, home / "keras.json", lambda name: importlib.util.find_spec(name) is not None)
    if backend:
        os.environ["KERAS_BACKEND"] = backend  # for this process


_choose_backend()
try:
    import keras
    from keras import ops
except ImportError as error:
    raise ImportError(
        f"Keras could not be imported ({error}). This section needs it and nothing else does: pip install 'lora-lab[keras]' or pip install keras, "
        "then start the kernel again. It runs on torch; with KERAS_BACKEND=tensorflow or jax in the environment, on that"
    ) from error


@keras.saving.register_keras_serializable(package="lora_lab")
class LoRADense(keras.layers.Layer):
    """A frozen `Dense` plus scaling * (x A) B, inside the activation; kernel and bias are frozen, A and B train.

    base   a `keras.layers.Dense`, built or not; it is adopted and frozen
    rank   r >= 1;  alpha: a number, None for rank (scaling 1, as Keras has it)

    x (..., in), output (..., out). Raises TypeError for a base that is no Dense, ValueError for r < 1 or a base that carries LoRA already.
    """

    def __init__(self, base: keras.layers.Dense, rank: int, alpha: float | None = None, **options):
        if not isinstance(base, keras.layers.Dense):
            raise TypeError(f"LoRADense adapts a keras.layers.Dense; found {type(base).__name__}")
        if base.lora_enabled or base.lora_rank:
            raise ValueError("this Dense has Keras's own LoRA already; make a plain one")
        if rank < 1:
            raise ValueError(f"rank must be at least 1; found {rank}")
        super().__init__(**options)
        self.base, self.rank, self.alpha = base, int(rank), float(rank if alpha is None else alpha)

    def build(self, input_shape):
        if not self.base.built:
            self.base.build(input_shape)
        self.base.trainable = False  # kernel and bias: an adapter's file holds A and B alone
        inside = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")  # ±1/sqrt(in), as torch's and peft's
        self.lora_A = self.add_weight(name="lora_A", shape=(input_shape[-1], self.rank), initializer=inside)
        self.lora_B = self.add_weight(name="lora_B", shape=(self.rank, self.base.units), initializer="zeros")

    def call(self, x):
        y = ops.matmul(x, self.base.kernel) + self.alpha / self.rank * ops.matmul(ops.matmul(x, self.lora_A), self.lora_B)
        if self.base.use_bias:
            y = y + self.base.bias
        return y if self.base.activation is None else self.base.activation(y)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.base.units)

    def merged(self) -> keras.layers.Dense:
        """A plain `Dense` with W + scaling * A B, for serving."""
        dense = keras.layers.Dense(self.base.units, self.base.activation, self.base.use_bias)
        dense.build((None, self.base.kernel.shape[0]))
        kernel = self.base.kernel + self.alpha / self.rank * ops.matmul(self.lora_A, self.lora_B)
        dense.kernel.assign(kernel)
        if self.base.use_bias:
            dense.bias.assign(self.base.bias)
        return dense

    def get_config(self):
        return {**super().get_config(), "base": keras.saving.serialize_keras_object(self.base), "rank": self.rank, "alpha": self.alpha}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "base": keras.saving.deserialize_keras_object(config["base"])})


def arrays(layer: LoRALinear) -> dict[str, np.ndarray | None]:
    """A torch layer's numbers in Keras's layout: kernel (in, out), bias (out,) or None, A (in, r), B (r, out)."""
    base = layer.base_layer
    found = {"kernel": layer.base_weight.T, "bias": base.bias, "A": layer.lora_A.T, "B": layer.full_B().T}
    return {name: None if tensor is None else tensor.detach().cpu().numpy().copy() for name, tensor in found.items()}


def dense_from_torch(layer: LoRALinear) -> keras.layers.Dense:
    """Keras's own `Dense` with `enable_lora`, holding the numbers of a torch `LoRALinear`. Its bias is frozen as ours is.

    Keras divides lora_alpha by rank; with rslora it is given scaling * r, so that the scaling stays.
    """
    given = arrays(layer)
    dense = _plain(given)
    rank = given["A"].shape[1]
    dense.enable_lora(rank, lora_alpha=layer.scaling * rank)
    dense.lora_kernel_a.assign(given["A"])
    dense.lora_kernel_b.assign(given["B"])
    if given["bias"] is not None:
        dense.bias.trainable = False
    return dense


def layer_from_torch(layer: LoRALinear) -> LoRADense:
    """`LoRADense` with the numbers of a torch `LoRALinear`."""
    given = arrays(layer)
    rank = given["A"].shape[1]
    new = LoRADense(_plain(given), rank, layer.scaling * rank)
    new.build((None, given["kernel"].shape[0]))
    new.lora_A.assign(given["A"])
    new.lora_B.assign(given["B"])
    return new


def model_from_torch(model: nn.Sequential) -> keras.Sequential:
    """A Keras model that computes what a torch nn.Sequential of Linear, LoRALinear and ReLU layers does; a LoRALinear becomes a `LoRADense`.

    Raises TypeError for any other layer.
    """
    layers = []
    for layer in model:
        if isinstance(layer, LoRALinear):
            layers.append(layer_from_torch(layer))
        elif isinstance(layer, nn.Linear):
            layers.append(_plain({"kernel": layer.weight.detach().cpu().numpy().T, "bias": None if layer.bias is None else layer.bias.detach().cpu().numpy()}))
        elif isinstance(layer, nn.ReLU):
            layers.append(keras.layers.ReLU())
        else:
            raise TypeError(f"model_from_torch knows Linear, LoRALinear and ReLU; found {type(layer).__name__}")
    first = next(layer.base_layer if isinstance(layer, LoRALinear) else layer for layer in model if not isinstance(layer, nn.ReLU))
    return keras.Sequential([keras.Input((first.in_features,)), *layers])


def _plain(given: Mapping[str, np.ndarray | None]) -> keras.layers.Dense:
    inputs, out = given["kernel"].shape
    dense = keras.layers.Dense(out, use_bias=given["bias"] is not None)
    dense.build((None, inputs))
    dense.kernel.assign(given["kernel"])
    if given["bias"] is not None:
        dense.bias.assign(given["bias"])
    return dense
