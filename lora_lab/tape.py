"""One training step on shapes: which tensors autograd keeps for the backward pass, when memory is highest, how many FLOPs.

Memory for activations is not a matter of the layers' sizes alone. An operation keeps what its derivative needs, and only if a gradient will
pass through it:

    y = x W        keeps x if W trains (dW = xᵀ dy), W in any case (dx = dy Wᵀ; a parameter, no new memory)
    y = x + z      keeps nothing          y = x * z   keeps both          softmax, tanh   keep their output
    LayerNorm      keeps x and two numbers a token, whether or not its weight trains
    B A x          keeps x (for A) and A x (for B): LoRA keeps the input of a frozen layer, which the frozen layer alone would not

So LoRA saves little activation memory, and none where every layer has an adapter. `Tape` writes down a model's operations in the order in
which it calls them; `run` plays the step, forward and backward, and reports what is in memory at each moment. Rules for dtype-keeping
operations as torch 2.13 has them; a test compares what is kept with torch's own saved_tensors_hooks, to the byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Value:
    """A tensor: its bytes, whether a gradient flows to it, and whose memory it shows if it is a view."""

    bytes: int
    grad: bool = False
    base: Value | None = None

    @property
    def root(self) -> Value:
        return self if self.base is None else self.base


@dataclass(eq=False)
class Operation:
    """What one call reads, makes, keeps; the parameters it gives gradients to: (key, bytes).

    passes: its gradient is handed on as it is (sums, views), without a new tensor. matmuls: FLOPs of one of its products, and how many
    products the forward and the backward pass have. scratch: bytes that live only while it runs.
    """

    label: str
    inputs: list[Value]
    outputs: list[Value]
    keeps: list[Value]
    trains: list[tuple[object, int]]
    passes: bool
    grad: bool
    block: int | None
    flops: tuple[int, int] = (0, 0)
    scratch: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Moment:
    """What is in memory at one point of the step, in bytes, beside the weights and the optimizer's state.

    phase        "forward", "recomputed" (a checkpointed block, again), "backward", "optimizer"
    label        the operation that runs
    activations  tensors of the forward pass
    passing      gradients on their way back, and scratch space
    gradients    of parameters, finished
    """

    phase: str
    label: str
    activations: int
    passing: int
    gradients: int

    @property
    def total(self) -> int:
        return self.activations + self.passing + self.gradients


@dataclass(frozen=True)
class Played:
    """kept: bytes of activations at the end of the forward pass; moments: forward, then backward; gradients: of all parameters at the end."""

    kept: int
    moments: list[Moment]
    gradients: int

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda m: m.total)


@dataclass
class Tape:
    """Operations in the order of their calls. element: bytes of an activation's number (4 for float32, 2 for bfloat16).

    Each method makes one operation and returns its output; where the rule is not that of the module's docstring, it is said here.
    """

    element: int = 4
    cuda: bool = False  # a dropout mask is kept as booleans there, as floats on the CPU; a LayerNorm's mean and deviation always in float32
    operations: list[Operation] = field(default_factory=list)
    _block: int | None = None

    @contextmanager
    def block(self, number: int):
        """Operations inside belong to one block: the unit of checkpointing."""
        self._block = number
        yield
        self._block = None

    def call(
        self,
        label: str,
        inputs: Iterable[Value],
        *sizes: int,
        keeps: Iterable[Value] = (),
        keeps_output: bool = False,
        extra: int = 0,
        trains: Iterable[tuple[object, int]] = (),
        passes: bool = False,
        flops: tuple[int, int] = (0, 0),
        scratch: tuple[int, int] = (0, 0),
    ) -> Value:
        """Record one operation with outputs of these bytes; returns the first. extra: bytes it keeps that nobody else sees."""
        inputs, keeps, trains = list(inputs), list(keeps), list(trains)
        grad = any(v.grad for v in inputs) or bool(trains)
        outputs = [Value(size, grad) for size in sizes]
        if keeps_output:
            keeps.append(outputs[0])
        if extra and grad:
            hidden = Value(extra)
            outputs.append(hidden)
            keeps.append(hidden)
        self.operations.append(
            Operation(label, inputs, outputs, keeps if grad else [], trains, passes, grad, self._block, flops, scratch)
        )
        return outputs[0]

    def input(self, size: int) -> Value:
        """A tensor that is there before the step and stays: part of the batch."""
        return Value(size)

    def view(self, x: Value, *sizes: int) -> list[Value]:
        """Views of parts of x (q, k and v of a fused output); their gradients are collected into one tensor of x's size."""
        views = [Value(size, x.grad, x.root) for size in sizes]
        self.operations.append(Operation("view", [x], views, [], [], False, x.grad, self._block))
        return views

    def reuse(self, x: Value) -> Value:
        """x in another shape: the same memory, and so is its gradient."""
        view = Value(x.bytes, x.grad, x.root)
        self.operations.append(Operation("view", [x], [view], [], [], True, x.grad, self._block))
        return view

    def add(self, x: Value, z: Value, label: str = "sum") -> Value:
        return self.call(label, [x, z], max(x.bytes, z.bytes), passes=True)

    def scale(self, x: Value, label: str) -> Value:
        """x times or plus a plain number; keeps nothing."""
        return self.call(label, [x], x.bytes)

    def multiply(self, x: Value, z: Value, label: str) -> Value:
        keeps = [x] * z.grad + [z] * x.grad
        return self.call(label, [x, z], max(x.bytes, z.bytes), keeps=keeps)

    def keep_input(self, x: Value, label: str) -> Value:
        """GELU, SiLU, pow: the derivative needs x."""
        return self.call(label, [x], x.bytes, keeps=[x])

    def keep_output(self, x: Value, label: str) -> Value:
        """tanh, softmax: the derivative needs the result."""
        return self.call(label, [x], x.bytes, keeps_output=True)

    def cast(self, x: Value, element: int) -> Value:
        """x with numbers of `element` bytes; no operation if it has them already."""
        if element == self.element:
            return x
        return self.call("cast", [x], x.bytes * element // self.element)

    def dropout(self, x: Value, p: float, label: str = "dropout") -> Value:
        if not p:
            return x
        return self.call(label, [x], x.bytes, extra=x.bytes // self.element if self.cuda else x.bytes)

    def layer_norm(self, x: Value, tokens: int, trains: list, label: str) -> Value:
        return self.call(label, [x], x.bytes, keeps=[x], extra=2 * tokens * (4 if self.cuda else self.element), trains=trains)

    def matmul(self, x: Value, z: Value, size: int, flops: int, label: str) -> Value:
        """x z, both activations: each is kept for the gradient of the other."""
        return self.call(label, [x, z], size, keeps=[x] * z.grad + [z] * x.grad, flops=(flops, flops * (x.grad + z.grad)))

    def gelu_new(self, x: Value, label: str) -> Value:
        """0.5 x (1 + tanh(c (x + 0.044715 x³))), written out as transformers' GPT-2 does: eight operations, four tensors kept."""
        half = self.scale(x, label)
        cube = self.scale(self.keep_input(x, label), label)
        inner = self.scale(self.add(x, cube, label), label)
        return self.multiply(half, self.scale(self.keep_output(inner, label), label), label)

    def linear(
        self, x: Value, tokens: int, inputs: int, out: int, trains_weight: list, trains_bias: list, label: str, dequantize: int = 0
    ) -> Value:
        """x W + b. trains_weight, trains_bias: [(key, bytes)] or []. dequantize: bytes of a frozen quantised W spelled out while it is used."""
        return self.call(
            label, [x], tokens * out * self.element, keeps=[x] if trains_weight else [], trains=[*trains_weight, *trains_bias],
            flops=(2 * tokens * inputs * out, 2 * tokens * inputs * out * (x.grad + bool(trains_weight))),
            scratch=(dequantize, dequantize * x.grad),
        )  # fmt: skip

    def attention(self, q: Value, k: Value, v: Value, batch: int, heads: int, context: int, kernel: str, dropout: float) -> Value:
        """softmax(q kᵀ) v. kernel "flash": scores are never stored, keeps q, k, v, the output and one number a row; "math": keeps the scores.

        FLOPs count the whole square of scores, although a causal kernel can skip half of it.
        """
        scores, repeats = batch * heads * context * context, q.bytes // k.bytes
        product = 2 * scores * (q.bytes // (self.element * batch * heads * context))
        if kernel == "flash":
            statistics = batch * heads * context * 4
            # backward: the scores once more, and four products
            return self.call(
                "attention", [q, k, v], q.bytes, keeps=[q, k, v], keeps_output=True, extra=statistics, flops=(2 * product, 5 * product)
            )
        # Half-precision inputs are spelled out in float32 first. Then: scaled copies of q and k, v in the order in which it is multiplied, heads of
        # k and v repeated where queries share them.
        wide = 4 // self.element
        q, k, v = (self.cast(x, 4) for x in (q, k, v))
        q = self.scale(q, "attention")
        k = self.call("attention", [k], k.bytes * repeats)
        if batch > 1 or repeats > 1 or wide > 1:  # one sequence's v can be multiplied where it lies, and a fused q, k, v stays whole
            v = self.call("attention", [v], v.bytes * repeats)
        scores = self.scale(self.matmul(q, k, scores * 4, product, "attention"), "attention")  # the mask is added
        weights = self.keep_output(scores, "attention")
        if dropout:
            weights = self.call("attention", [weights], weights.bytes, extra=weights.bytes // 4 if self.cuda else weights.bytes)
        out = self.matmul(weights, v, q.bytes, product, "attention")
        return out if wide == 1 else self.call("attention", [out], out.bytes // wide)

    def cross_entropy(self, logits: Value, element: int) -> Value:
        """The mean negative log-likelihood of logits with `element` bytes a number: keeps log-softmax, as large as they are, and one number."""
        logp = self.keep_output(logits, "loss")
        return self.call("loss", [logp], element, keeps=[logp], extra=element)

    # ---- play it

    @property
    def flops(self) -> tuple[int, int]:
        """Of all matrix products: (forward, backward), two for each multiplication with its addition."""
        forward = sum(op.flops[0] for op in self.operations)
        return forward, sum(op.flops[1] for op in self.operations if op.grad)

    def run(self, checkpointing: bool = False) -> Played:
        """Play forward and backward. checkpointing: a block keeps only its input and is computed again when its turn comes."""
        return _Run(self.operations, checkpointing).play()


class _Gradient:
    """A gradient's memory, which several values may share."""

    def __init__(self, size: int):
        self.bytes, self.users = size, 0


class _Run:
    def __init__(self, operations: list[Operation], checkpointing: bool):
        self.operations, self.checkpointing = operations, checkpointing
        self.blocks: dict[int | None, list[int]] = {}
        for i, op in enumerate(operations):
            self.blocks.setdefault(op.block, []).append(i)
        self.learning = {op.block for op in operations if op.grad}
        self.last = {}  # root -> the last operation that reads it
        for i, op in enumerate(operations):
            for v in (*op.inputs, *op.outputs):
                self.last[v.root] = i
        self.waits = Counter()  # root -> how many operations keep it for their backward pass
        self.held: dict[Value, int] = {}  # activations in memory
        self.passing: dict[Value, _Gradient] = {}
        self.finished: dict[object, int] = {}  # gradients of parameters
        self.now = Counter()
        self.moments: list[Moment] = []

    def play(self) -> Played:
        self.forward(range(len(self.operations)), again=False)
        kept = self.now["activations"]
        self.backward()
        return Played(kept, self.moments, self.now["gradients"])

    def note(self, phase: str, label: str, scratch: int = 0) -> None:
        self.moments.append(Moment(phase, label, self.now["activations"], self.now["passing"] + scratch, self.now["gradients"]))

    def forgets(self, op: Operation) -> bool:
        return self.checkpointing and op.block is not None

    def forward(self, places: Iterable[int], again: bool) -> None:
        """Calls in order; a tensor goes when nobody reads it any more and nobody keeps it. again: a block, computed a second time."""
        inside = set()
        for i in places:
            op = self.operations[i]
            entering = self.forgets(op) and (i == 0 or self.operations[i - 1].block != op.block)
            if entering and not again and op.block in self.learning:
                self.waits[op.inputs[0].root] += 1  # the one tensor that the block is computed again from
            for v in op.outputs:
                if v.base is None:
                    self.hold(v)
                    inside.add(v)
            if again or not self.forgets(op):
                for v in op.keeps:
                    self.waits[v.root] += 1
            self.note("recomputed" if again else "forward", op.label, op.scratch[0])
            for v in {v.root for v in (*op.inputs, *op.outputs)}:
                # a second time, what the block hands on has been read already; nothing from outside goes
                if self.last[v] <= i or (again and v in inside and self.leaves(v, i)):
                    self.let_go(v)

    def leaves(self, v: Value, i: int) -> bool:
        return self.operations[self.last[v]].block != self.operations[i].block

    def hold(self, v: Value) -> None:
        if v not in self.held:
            self.held[v] = v.bytes
            self.now["activations"] += v.bytes

    def let_go(self, v: Value) -> None:
        if v in self.held and not self.waits[v]:
            self.now["activations"] -= self.held.pop(v)

    def backward(self) -> None:
        loss = self.operations[-1].outputs[0]
        self.give(loss, _Gradient(loss.bytes))
        done = set()
        for i in reversed(range(len(self.operations))):
            op = self.operations[i]
            if not op.grad:
                continue
            if self.forgets(op) and op.block not in done:
                done.add(op.block)
                block = self.blocks[op.block]
                self.forward(block, again=True)
                start = self.operations[block[0]].inputs[0].root
                self.waits[start] -= 1
            arrived = [self.passing.pop(v) for v in op.outputs if v in self.passing]
            new = []
            for x in op.inputs:
                if x.grad:
                    if op.passes and arrived and x.bytes == arrived[0].bytes:
                        self.give(x, arrived[0])
                    else:
                        new.append((x, _Gradient(x.bytes)))
                        self.now["passing"] += x.bytes
            fresh = 0
            for key, size in op.trains:
                if key in self.finished:
                    fresh += size  # added to what is there, then gone
                else:
                    self.finished[key] = size
                    self.now["gradients"] += size
            self.note("backward", op.label, op.scratch[1] + fresh)
            for x, gradient in new:
                self.now["passing"] -= x.bytes  # `give` counts it again, or adds it to the one that is there
                self.give(x, gradient)
            for gradient in arrived:
                self.drop(gradient)
            for v in op.keeps:
                self.waits[v.root] -= 1
            for v in {v.root for v in (*op.keeps, *op.outputs, *op.inputs)}:
                if not self.waits[v]:
                    self.let_go(v)

    def give(self, x: Value, gradient: _Gradient) -> None:
        """A gradient arrives at x: the first one stays, a further one is added to it."""
        if x in self.passing:
            return
        self.passing[x] = gradient
        if not gradient.users:
            self.now["passing"] += gradient.bytes
        gradient.users += 1

    def drop(self, gradient: _Gradient) -> None:
        gradient.users -= 1
        if not gradient.users:
            self.now["passing"] -= gradient.bytes
