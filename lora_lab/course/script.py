"""A script: plain operations on the student's object, written down by a probe and run elsewhere by `runner.run_script`.

A script is JSON plus tensors, so that the same one runs in the notebook's kernel and, sent as bytes, in another
process. Nothing is pickled. Each operation returns a `Ref`, which later operations take as an argument; wherever an
array is expected, a Ref, a numpy array or a torch tensor will do. Only what is *sent* comes back.

    s = Script()
    W = s.input("W", rng.normal(size=(11, 7)))          # named: the judge sees inputs["W"]
    x = s.input("x", rng.normal(size=(5, 7)))
    base = s.linear(W, rng.normal(size=11))             # an nn.Linear, built in the student's process from copies
    layer = s.call(base, r=3, alpha=5.0)                # call the student's object (a function, or a class to construct)
    s.set(layer, "lora_B", rng.normal(size=(11, 3)))    # copy numbers into a tensor of it, in place
    y = s.call(x, target=layer)                         # call something else than the student's object
    s.send("y", y)                                      # a snapshot, taken now
    s.backward(y, rng.normal(size=(5, 11)))             # d/d. of (y * weights).sum()
    s.send("grad_A", s.grad(layer, "lora_A"))           # None where there is no gradient
    s.method(layer, "merge")
    s.send("W after", s.get(layer, "base_layer.weight"))
    with s.attempt("refusal"):                          # sends "ValueError" (and "refusal.message"), or None
        s.call(base, r=0, alpha=1.0)

How numbers cross: every torch dtype of safetensors keeps its bits on the way. The judge gets numpy arrays of the same
dtype; bfloat16, which numpy lacks, arrives as float32 (exact) and `answers.dtypes["y"]` still says "bfloat16".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

FORMAT = "lora-lab-1"
# Layers a probe may ask for. Each is an nn class of the same name; its tensors come from the description.
LAYERS = ("Linear", "Embedding", "LayerNorm", "Conv2d", "ReLU", "GELU", "Tanh", "Identity", "Flatten", "Dropout")


@dataclass(frozen=True)
class Ref:
    """The result of operation number `id` of a script."""

    id: int


STUDENT = Ref(0)


class Script:
    """See the top of this file. `seed` fixes torch's and numpy's random numbers during the run."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.operations: list[dict] = []
        self.tensors: list[torch.Tensor] = []
        self.inputs: dict[str, np.ndarray] = {}
        self.dtypes: dict[str, str] = {}
        self._block = self.operations
        self._count = 0

    def input(self, name: str, array, requires_grad: bool = False, may_change: bool = False) -> Ref:
        """A named tensor. If the student's code changes it in place, the run says so, unless `may_change`."""
        if name in self.inputs:
            raise ValueError(f"two inputs are called {name!r}")
        tensor = as_tensor(array)
        self.inputs[name], self.dtypes[name] = as_numpy(tensor), dtype_name(tensor.dtype)
        return self._add("input", name=name, value=self._encode(tensor), requires_grad=requires_grad,
                         may_change=may_change)

    def call(self, *args, target: Ref = STUDENT, **kwargs) -> Ref:
        """target(*args, **kwargs); the student's object unless another target is given."""
        return self._add("call", target=self._encode(target), args=self._encode(list(args)),
                         kwargs=self._encode(kwargs))

    def method(self, ref: Ref, name: str, *args, **kwargs) -> Ref:
        """ref.name(*args, **kwargs)"""
        return self._add("method", target=self._encode(ref), name=name, args=self._encode(list(args)),
                         kwargs=self._encode(kwargs))

    def linear(self, weight, bias=None) -> Ref:
        """nn.Linear. weight: (out, in), bias: (out,) or None; copies, trainable, in the weight's dtype."""
        return self.module(linear(weight, bias))

    def sequential(self, parts) -> Ref:
        """nn.Sequential of descriptions: a list, or a dict name -> description (then the parts have these names)."""
        return self.module(dict(parts) if isinstance(parts, Mapping) else list(parts))

    def mlp(self, weights, biases=None) -> Ref:
        """Linear, ReLU, Linear, ... without a ReLU at the end. weights: list of (out, in)."""
        biases = biases or [None] * len(weights)
        parts = []
        for weight, bias in zip(weights, biases, strict=True):
            parts += [linear(weight, bias), layer("ReLU")]
        return self.module(parts[:-1])

    def module(self, tree) -> Ref:
        """A small model from a plain description: `linear(...)` or `layer(...)` of this file for a leaf, a list for an
        nn.Sequential, a dict for an nn.Sequential with named parts; nested as you like."""
        return self._add("module", tree=self._encode_tree(tree))

    def get(self, ref: Ref, path: str) -> Ref:
        """ref.a.b: each part of "a.b" is an attribute, a key or an index. Live, not a copy; `send` copies."""
        return self._add("get", target=self._encode(ref), path=path)

    def set(self, ref: Ref, path: str, value) -> Ref:
        """An array is copied into the tensor at `path` ("" for ref itself), in place and without gradient;
        a number or text is assigned to the attribute."""
        return self._add("set", target=self._encode(ref), path=path, value=self._encode(value))

    def copy(self, ref: Ref) -> Ref:
        """copy.deepcopy(ref)"""
        return self._add("copy", target=self._encode(ref))

    def backward(self, ref: Ref, weights) -> Ref:
        """(ref * weights).sum().backward(); weights: the shape of ref. Different weights keep mistakes apart."""
        return self._add("backward", target=self._encode(ref), weights=self._encode(weights))

    def grad(self, ref: Ref, path: str = "") -> Ref:
        """The gradient of a tensor, or of the tensor at `path` of an object; None if there is none."""
        return self._add("grad", target=self._encode(ref), path=path)

    def train(self, ref: Ref, x, y, steps: int, lr: float) -> Ref:
        """`steps` steps of plain SGD on the mean squared error of ref(x) and y, over the parameters of ref that
        require a gradient. Result: the loss before each step, `steps` numbers."""
        return self._add("train", target=self._encode(ref), x=self._encode(x), y=self._encode(y),
                         steps=int(steps), lr=float(lr))

    def parameters(self, ref: Ref) -> Ref:
        """named_parameters() as plain data: a list of {"name", "shape", "requires_grad"}."""
        return self._add("parameters", target=self._encode(ref))

    def send(self, name: str, ref) -> None:
        """The answer `name` is a copy of ref as it is now: tensors, numbers, texts, None, lists and dicts of these."""
        self._add("send", name=name, value=self._encode(ref))

    @contextmanager
    def attempt(self, name: str):
        """What stands in the block may raise: the answer `name` is the type's name, or None if nothing was raised;
        `name + ".message"` is the message. What comes after the block runs on."""
        outer, inner = self._block, []
        self._block = inner
        try:
            yield
        finally:
            self._block = outer
        self._add("attempt", name=name, operations=inner)

    def to_bytes(self) -> bytes:
        return pack({"seed": self.seed, "operations": self.operations}, self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> Script:
        content, tensors = unpack(data)
        script = cls(content["seed"])
        script.operations, script.tensors = content["operations"], tensors
        script._note(script.operations)
        return script

    def _note(self, operations) -> None:
        """Find again what operations that came as bytes say about ids and inputs."""
        for operation in operations:
            self._count = max(self._count, operation["id"])
            if operation["op"] == "attempt":
                self._note(operation["operations"])
            elif operation["op"] == "input":
                tensor = self.tensors[operation["value"]["array"]]
                self.inputs[operation["name"]] = as_numpy(tensor)
                self.dtypes[operation["name"]] = dtype_name(tensor.dtype)

    def _add(self, op: str, **fields) -> Ref:
        self._count += 1
        self._block.append({"op": op, "id": self._count, **fields})
        return Ref(self._count)

    def _encode(self, value):
        """Refs, arrays and containers in a form that JSON keeps; `decode` in the runner is its inverse."""
        if isinstance(value, Ref):
            return {"ref": value.id}
        if isinstance(value, torch.dtype):
            return {"dtype": dtype_name(value)}
        if isinstance(value, (np.ndarray, torch.Tensor)):
            self.tensors.append(as_tensor(value))
            return {"array": len(self.tensors) - 1}
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [self._encode(item) for item in value]}
        if isinstance(value, Mapping):
            return {"dict": {str(key): self._encode(item) for key, item in value.items()}}
        raise TypeError(f"a script takes Refs, arrays, numbers, texts and containers of these, "
                        f"not a {type(value).__name__}: build it in the student's process (s.linear, s.module, s.call)")

    def _encode_tree(self, tree):
        if isinstance(tree, (list, tuple)):
            return {"parts": [[str(n), self._encode_tree(part)] for n, part in enumerate(tree)]}
        if isinstance(tree, Mapping) and "layer" in tree:
            return {"layer": tree["layer"], "options": tree["options"],
                    "tensors": {name: self._encode(value) for name, value in tree["tensors"].items()}}
        if isinstance(tree, Mapping):
            return {"parts": [[str(name), self._encode_tree(part)] for name, part in tree.items()]}
        raise TypeError(f"a module is described by linear(...), layer(...), a list or a dict, not {type(tree).__name__}")


def linear(weight, bias=None) -> dict:
    """The description of an nn.Linear. weight: (out, in), bias: (out,) or None."""
    return layer("Linear", weight=weight, **({} if bias is None else {"bias": bias}))


def layer(kind: str, weight=None, bias=None, **options) -> dict:
    """The description of one layer of LAYERS; sizes follow from the weight. Options go to its constructor."""
    if kind not in LAYERS:
        raise ValueError(f"no layer {kind!r}; there are {', '.join(LAYERS)}")
    tensors = {name: value for name, value in (("weight", weight), ("bias", bias)) if value is not None}
    return {"layer": kind, "options": options, "tensors": tensors}


def as_tensor(array) -> torch.Tensor:
    """A contiguous copy on the CPU, with the same dtype."""
    if isinstance(array, torch.Tensor):
        return array.detach().cpu().clone().contiguous()
    array = np.asarray(array)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A numpy copy with the same dtype; bfloat16 as float32, which holds every bfloat16 number exactly."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.numpy().copy()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pack(content, tensors) -> bytes:
    """JSON and tensors as one safetensors file in memory."""
    named = {str(n): tensor.contiguous() for n, tensor in enumerate(tensors)}
    return save_tensors(named, metadata={"format": FORMAT, "json": json.dumps(content)})


def unpack(data: bytes) -> tuple:
    """(content, tensors). Raises ValueError on anything that is not a whole file of ours."""
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']!r}")
        named = load_tensors(data)
        return json.loads(metadata["json"]), [named[str(n)] for n in range(len(named))]
    except Exception as error:
        raise ValueError(f"expected bytes in the format {FORMAT!r}, found {len(data)} bytes that are not: {error}") from error
