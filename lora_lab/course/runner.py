"""Run a script on a student's object and hand back plain answers; and examine an exercise with all its cases.

`run_script` is the generic driver: it computes no verdict and never raises because of the student's code (Ctrl-C
excepted). It leaves random states, default dtype, grad mode, numpy's random state and warning filters as it found them.

The time limit: a watchdog thread asks Python to raise in the running thread (PyThreadState_SetAsyncExc); that works in
any thread on every platform, between two bytecodes. A bare `except:` in a loop would swallow it each time, so the
exception, once made or swallowed, also sets a trace function that raises at the next line of the student's code, until
all of it has been left. On POSIX in the main thread an alarm signal helps, which also ends a `time.sleep`. A single long call
into C elsewhere (a sleep in another thread, one giant matrix product) ends only when it returns.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import linecache
import os
import random
import reprlib
import signal
import sys
import sysconfig
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from .exercise import Diagnosis, Evidence, Exercise
from .script import Script, as_numpy, as_tensor, dtype_name, pack, unpack

SECONDS = 5.0
AGAIN = 0.1               # seconds between two firings of the time limit
PRINTED = 4000            # characters that student code may print per run; an endless loop would flood the page
LARGEST = 20_000_000      # numbers in one answer: 160 MB in float64, more than any exercise needs


class TimeLimit(BaseException):
    """Raised inside student code when its time is up. Not an Exception, so that `except Exception` lets it through."""

    # Python makes the object in the thread where it raises it, and lets go of it there when an `except:` has swallowed
    # it: the two moments at which that thread can be told to go on raising.
    def __init__(self):
        super().__init__()
        self.guard = _guards.get(threading.get_ident())
        if self.guard is not None and self.guard.active:
            self.guard.insist(sys._getframe(1))

    def __del__(self):
        if self.guard is not None and self.guard.active and self.guard.thread == threading.get_ident():
            self.guard.insist(sys._getframe(1))


class ProbeError(Exception):
    """What a script asked for is not there, or what came back is not plain: the student's answer, not a crash."""


@dataclass(frozen=True)
class Where:
    """The last frame of the student's own code: function, line number within its cell or file, the line's text."""

    function: str
    line: int
    text: str
    file: str


@dataclass(frozen=True)
class Error:
    """How a run ended early. kind: "not started" (NotImplementedError), "time", "exception" (raised by the student's
    code or by the call of it), "answer" (something asked for is missing or is not plain data)."""

    kind: str
    type: str
    message: str
    where: Where | None = None

    def __str__(self):
        place = "" if self.where is None else f" in {self.where.function}, line {self.where.line}: {self.where.text}"
        return (f"{self.type}: {self.message}" if self.message else self.type) + place


class Answers(dict):
    """name -> numpy array, number, text, bool, None, or a list or dict of these.

    dtypes: name -> torch's name of the dtype, for each array ("y", and "parts.0" inside lists and dicts); error: an
    Error or None; changed_inputs: names of inputs that the student's code changed in place; returned_none: whether a
    call of the student's object gave None; seconds: how long the run took.
    """

    def __init__(self, values: Mapping[str, Any] = (), dtypes=(), error=None, changed_inputs=(), returned_none=False,
                 seconds=0.0):
        super().__init__(values)
        self.dtypes: dict[str, str] = dict(dtypes)
        self.error: Error | None = error
        self.changed_inputs = list(changed_inputs)
        self.returned_none = returned_none
        self.seconds = seconds

    def to_bytes(self) -> bytes:
        tensors = []

        def encode(value, path):
            if isinstance(value, np.ndarray):
                tensor = as_tensor(value)
                tensors.append(tensor.bfloat16() if self.dtypes.get(path) == "bfloat16" else tensor)
                return {"array": len(tensors) - 1}
            if isinstance(value, list):
                return [encode(item, f"{path}.{n}") for n, item in enumerate(value)]
            if isinstance(value, dict):
                return {"dict": {key: encode(item, f"{path}.{key}") for key, item in value.items()}}
            return value

        content = {
            "values": {name: encode(value, name) for name, value in self.items()},
            "dtypes": self.dtypes,
            "error": None if self.error is None else asdict(self.error),
            "changed_inputs": self.changed_inputs,
            "returned_none": self.returned_none,
            "seconds": self.seconds,
        }
        return pack(content, tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> Answers:
        content, tensors = unpack(data)

        def decode(value):
            if isinstance(value, list):
                return [decode(item) for item in value]
            if isinstance(value, dict) and "array" in value:
                return as_numpy(tensors[value["array"]])
            if isinstance(value, dict):
                return {key: decode(item) for key, item in value["dict"].items()}
            return value

        values = {name: decode(value) for name, value in content.pop("values").items()}
        error = content.pop("error")
        if error is not None:
            where = error.pop("where")
            error = Error(**error, where=None if where is None else Where(**where))
        return cls(values, error=error, **content)


def run_script(script: Script, student, seconds: float = SECONDS) -> Answers:
    """The script's operations on the student's object. Never raises because of it, except KeyboardInterrupt."""
    run = _Run(script, student)
    with _one_at_a_time, _leave_as_found(script.seed), _bounded_printing():
        _first_optimizer()
        start = time.monotonic()
        error = _call_with_limit(run.all, seconds)
    run.answers.seconds = time.monotonic() - start
    if isinstance(error, KeyboardInterrupt):
        raise error
    if error is not None:
        run.answers.error = _describe(error, seconds)
        _let_go(error)
    run.answers.changed_inputs = run.changed_inputs()
    return run.answers


@cache
def _first_optimizer() -> None:
    """The first optimizer of a process makes torch import its compiler: 1.2 s of processor time, and many times that on a
    busy machine. Paid here, once, so that it is not counted as the student's time."""
    with contextlib.suppress(Exception):                       # if torch's own import fails, the check still goes on
        nothing = torch.zeros(1, device="cpu", requires_grad=True)
        nothing.grad = torch.zeros_like(nothing)
        torch.optim.Adam([nothing], lr=0.0).step()


# ---------------------------------------------------------------- the operations


class _Run:
    """One run: the values of the Refs so far, and the answers. One method per operation of `Script`."""

    def __init__(self, script: Script, student):
        self.script = script
        self.values = {0: student}
        self.answers = Answers()
        self.watched: dict[str, tuple[torch.Tensor, bytes]] = {}

    def all(self):
        self.block(self.script.operations)

    def block(self, operations):
        for operation in operations:
            fields = {key: value for key, value in operation.items() if key not in ("op", "id")}
            self.values[operation["id"]] = getattr(self, "do_" + operation["op"])(**fields)

    def decode(self, value):
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "ref":
            if content not in self.values:
                raise ProbeError("what this step needs did not come about in the step before")
            return self.values[content]
        if kind == "array":
            return self.script.tensors[content].clone()
        if kind == "dtype":
            return getattr(torch, content)
        if kind == "dict":
            return {key: self.decode(item) for key, item in content.items()}
        return {"list": list, "tuple": tuple}[kind](self.decode(item) for item in content)

    def do_input(self, name, value, requires_grad, may_change):
        tensor = self.decode(value)
        if not may_change:
            self.watched[name] = (tensor, _bits(tensor))
        return tensor.requires_grad_(requires_grad)

    def do_call(self, target, args, kwargs):
        target_object = self.decode(target)
        if not callable(target_object):
            raise ProbeError(f"expected something to call, found {_a(target_object)}")
        result = target_object(*self.decode(args), **self.decode(kwargs))
        if result is None and target == {"ref": 0}:
            self.answers.returned_none = True
        return result

    def do_method(self, target, name, args, kwargs):
        method = _step(self.decode(target), name)
        if not callable(method):
            raise ProbeError(f"{name} is {_a(method)}, expected a method")
        return method(*self.decode(args), **self.decode(kwargs))

    def do_module(self, tree):
        if "parts" in tree:
            # add_module instead of an OrderedDict: nn.Sequential then runs named parts in this order just the same.
            model = nn.Sequential()
            for name, part in tree["parts"]:
                model.add_module(name, self.do_module(part))
            return model
        tensors = {name: self.decode(value).detach().clone() for name, value in tree["tensors"].items()}
        return _build_layer(tree["layer"], tensors, tree["options"])

    def do_get(self, target, path):
        return _walk(self.decode(target), path)

    def do_set(self, target, path, value):
        target, value = self.decode(target), self.decode(value)
        if not isinstance(value, torch.Tensor):
            parent, _, name = path.rpartition(".")
            setattr(_walk(target, parent), name, value)
            return
        tensor = _expect_tensor(_walk(target, path), path or "the value")
        if tensor.shape != value.shape:
            raise ProbeError(f"{path or 'the value'} has shape {tuple(tensor.shape)}, expected {tuple(value.shape)}")
        with torch.no_grad():
            tensor.copy_(value)
        for name, (watched, _) in self.watched.items():
            if watched is tensor:                              # the script itself changed it, not the student
                self.watched[name] = (tensor, _bits(tensor))

    def do_copy(self, target):
        return copy.deepcopy(self.decode(target))

    def do_backward(self, target, weights):
        result, weights = _expect_tensor(self.decode(target), "the result"), self.decode(weights)
        if result.shape != weights.shape:
            raise ProbeError(f"the result has shape {tuple(result.shape)}, expected {tuple(weights.shape)}")
        if not result.requires_grad:
            raise ProbeError("the result is cut off from the parameters: no gradient can flow back "
                             "(a detach(), .data, .item(), numpy or no_grad on the way?)")
        (result * weights).sum().backward()

    def do_grad(self, target, path):
        return _expect_tensor(_walk(self.decode(target), path), path or "the value").grad

    def do_train(self, target, x, y, steps, lr):
        model, x, y = self.decode(target), self.decode(x), self.decode(y)
        if not isinstance(model, nn.Module):
            raise ProbeError(f"expected an nn.Module to train, found {_a(model)}")
        trainable = [p for p in model.parameters() if p.requires_grad]
        losses = []
        for _ in range(steps):
            out = _expect_tensor(model(x), "the output")
            if out.shape != y.shape:
                raise ProbeError(f"the output has shape {tuple(out.shape)}, expected {tuple(y.shape)}")
            loss = nn.functional.mse_loss(out, y)
            losses.append(float(loss.detach()))
            if loss.requires_grad:                             # nothing to train is an answer too: the loss stays
                for p in trainable:
                    p.grad = None
                loss.backward()
                with torch.no_grad():
                    for p in trainable:
                        if p.grad is not None:
                            p -= lr * p.grad
        return losses

    def do_parameters(self, target):
        model = self.decode(target)
        if not isinstance(model, nn.Module):
            raise ProbeError(f"expected an nn.Module, found {_a(model)}")
        return [{"name": name, "shape": list(p.shape), "requires_grad": p.requires_grad}
                for name, p in model.named_parameters()]

    def do_send(self, name, value):
        self.answers[name] = _plain(self.decode(value), name, self.answers.dtypes)

    def do_attempt(self, name, operations):
        raised = None
        try:
            self.block(operations)
        except NotImplementedError:
            raise                                              # the exercise is not started
        except Exception as error:
            raised = error
        self.answers[name] = None if raised is None else type(raised).__name__
        self.answers[name + ".message"] = None if raised is None else _message(raised)

    def changed_inputs(self) -> list[str]:
        def changed(tensor, before):
            try:
                return _bits(tensor) != before
            except Exception:                                  # it is no longer a plain tensor
                return True

        return [name for name, (tensor, before) in self.watched.items() if changed(tensor, before)]


def _build_layer(kind: str, tensors: dict, options: dict) -> nn.Module:
    """An nn layer whose sizes follow from its tensors."""
    weight = tensors.get("weight")
    options = dict(options)
    if kind == "Linear":
        sizes = (weight.shape[1], weight.shape[0])
    elif kind == "Conv2d":
        sizes = (weight.shape[1] * options.get("groups", 1), weight.shape[0])
        options.setdefault("kernel_size", tuple(weight.shape[2:]))
    elif kind in ("Embedding", "LayerNorm"):
        sizes = (tuple(weight.shape),) if kind == "LayerNorm" else tuple(weight.shape)
    else:
        return getattr(nn, kind)(**options)
    if kind != "Embedding":
        options["bias"] = "bias" in tensors
    module = getattr(nn, kind)(*sizes, **options).to(weight.dtype)
    module.load_state_dict(tensors)
    return module


def _walk(target, path: str):
    for part in path.split(".") if path else ():
        target = _step(target, part)
    return target


def _step(target, part: str):
    """target[part] in a mapping, target[int(part)] in a list, else the attribute."""
    if isinstance(target, Mapping) and part in target:
        return target[part]
    if isinstance(target, (list, tuple)) and part.lstrip("-").isdigit() and -len(target) <= int(part) < len(target):
        return target[int(part)]
    try:
        return getattr(target, part)
    except AttributeError:
        pass
    if target is None:
        raise ProbeError("expected a result, found None: is a `return` missing?")
    if part.isdigit() and not isinstance(target, Mapping):
        found = f"{len(target)} values" if isinstance(target, (list, tuple)) else f"{_a(target)}"
        raise ProbeError(f"expected {int(part) + 1} or more values, as in `return A, B`, found {found}")
    if isinstance(target, Mapping):
        there = list(map(str, target))
    elif isinstance(target, nn.Module):
        there = [name for group in (target._parameters, target._buffers, target._modules) for name in group]
        there += [name for name in vars(target) if not name.startswith("_") and name != "training"]
    else:
        there = [name for name in getattr(target, "__dict__", ()) if not name.startswith("_")]
    raise ProbeError(f"{_a(target)} has no {part!r}" + (f"; it has {', '.join(there[:8])}" if there else ""))


def _expect_tensor(value, what: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    raise ProbeError(f"{what} is {_a(value)}, expected a tensor" + (": is a `return` missing?" if value is None else ""))


def _plain(value, path: str, dtypes: dict):
    """A copy made of exact plain types: subclasses with their own __eq__ or __array__ lose them here."""
    if value is None or type(value) in (bool, str):
        return value
    if isinstance(value, torch.Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            if value.layout is not torch.strided or value.is_complex() or value.is_quantized or value.is_meta:
                raise ProbeError(f"{path} is a tensor of a kind that is not expected here "
                                 f"({value.layout}, {value.dtype}, {value.device})")
            if value.numel() > LARGEST:
                raise ProbeError(f"{path} has shape {tuple(value.shape)}: far larger than expected")
            dtypes[path] = dtype_name(value.dtype)
            return as_numpy(value)
    if isinstance(value, np.ndarray):
        array = np.array(value, copy=True, subok=False)
        if array.dtype.kind not in "biuf" or array.size > LARGEST:
            raise ProbeError(f"{path} is an array of {array.dtype} with {array.size} entries, expected numbers")
        dtypes[path] = array.dtype.name
        return array
    if isinstance(value, np.generic):
        return _plain(value.item(), path, dtypes)
    for kind in (bool, int, float, str):                       # bool before int: True is an int
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind.__add__(value, kind(0))
    if isinstance(value, (list, tuple)):
        if len(value) > 10_000:
            raise ProbeError(f"{path} is a list of {len(value)} things: far longer than expected")
        return [_plain(item, f"{path}.{n}", dtypes) for n, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{path}.{key}", dtypes) for key, item in value.items()}
    raise ProbeError(f"{path} is {_a(value)}, expected a tensor, a number, a text or a list of these")


def _bits(tensor: torch.Tensor) -> bytes:
    """Shape, dtype and every bit, so that NaN and -0.0 count too."""
    with torch._C.DisableTorchFunctionSubclass():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return f"{tuple(tensor.shape)}{tensor.dtype}".encode() + flat.numpy().tobytes()


def _a(value) -> str:
    if value is None:
        return "None"
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    return ("the class " if isinstance(value, type) else "an " if name[0] in "aeiouAEIOU" else "a ") + name


# ---------------------------------------------------------------- surroundings: time, state, printing, errors


_one_at_a_time = threading.RLock()     # random states and sys.stdout belong to the whole process


def _call_with_limit(function: Callable[[], None], seconds: float) -> BaseException | None:
    """function(), ended after `seconds`; what it raised, or None."""
    guard = _Guard(seconds)
    caught = None
    try:
        try:
            guard.start()
            function()
        except BaseException as error:
            caught = error
        guard.stop()
    except TimeLimit as error:         # it struck on the way out, between two lines of ours
        caught = caught or error
        guard.stop()
    return caught


_guards: dict[int, _Guard] = {}        # by thread



class _Guard:
    """Raises TimeLimit in the current thread once `seconds` are over, every AGAIN seconds until stopped."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.thread = threading.get_ident()
        self.active = self.fired = False
        self.running = threading.Lock()                        # held while the student's code runs
        self.watchdog = threading.Thread(target=self._watch, daemon=True, name="time limit of a check")
        on_main = threading.current_thread() is threading.main_thread()
        self.alarm = on_main and hasattr(signal, "setitimer")

    def start(self):
        """Struck halfway, it leaves what `stop` needs: everything is noted before anything is started."""
        self.outer, self.old_trace = _guards.get(self.thread), sys.gettrace()
        if self.alarm:
            self.began, self.old_timer = time.monotonic(), (0.0, 0.0)
            self.old_handler = signal.getsignal(signal.SIGALRM) or signal.SIG_DFL
        _guards[self.thread] = self
        self.active = True
        self.running.acquire()
        self.watchdog.start()
        if self.alarm:
            signal.signal(signal.SIGALRM, self._ring)
            self.old_timer = signal.setitimer(signal.ITIMER_REAL, self.seconds, AGAIN)

    def _ring(self, number, frame):
        raise TimeLimit

    def _watch(self):
        # The alarm comes first where there is one; a wait of half a step more keeps the two from striking together.
        wait = self.seconds + (1.5 * AGAIN if self.alarm else 0.0)
        while not self.running.acquire(timeout=wait):
            self._fire()
            wait = AGAIN

    def _fire(self):
        self.fired = True
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(TimeLimit))

    def insist(self, frame):
        """Trace all frames from `frame` down to ours, and those to come."""
        while frame is not None and frame.f_code.co_filename != __file__:
            frame.f_trace = self._again
            frame = frame.f_back
        sys.settrace(self._again)

    def _again(self, frame, event, arg):
        # Libraries are spared: raised in a weakref's callback, say, it would only be printed as "Exception ignored".
        if not self.active or _is_library(frame.f_code.co_filename):
            return None
        if event not in ("line", "call"):
            return self._again
        raise TimeLimit       # Python drops a trace function that raises; this exception, once swallowed, sets it again

    def stop(self):
        """Each step may be struck by a last TimeLimit, so each is tried until it has gone through."""
        self.active = False
        for step in (self._stop_alarm, self._stop_watchdog, self._stop_trace, self._drain, self._restore):
            while True:
                try:
                    step()
                    break
                except TimeLimit:
                    continue

    def _stop_alarm(self):
        if self.alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _stop_watchdog(self):
        with contextlib.suppress(RuntimeError):                # released already, in an earlier try
            self.running.release()
        with contextlib.suppress(RuntimeError):                # not started yet: it will find the lock free, and end
            self.watchdog.join()

    def _stop_trace(self):
        if sys.gettrace() != self.old_trace:
            sys.settrace(self.old_trace)

    def _drain(self):
        """One more may be on its way, set but not yet raised. There is room for one only: set it and wait for it here.
        (Taking it back with NULL leaves CPython 3.11 with a flag that never clears, and the next debugger hangs.)"""
        if not self.fired:
            return
        try:
            self._fire()
            while True:
                pass
        except TimeLimit:
            self.fired = False

    def _restore(self):
        if self.outer is None:
            _guards.pop(self.thread, None)
        else:
            _guards[self.thread] = self.outer
        if self.alarm:
            signal.signal(signal.SIGALRM, self.old_handler)
            left, interval = self.old_timer
            if left:
                passed = time.monotonic() - self.began
                signal.setitimer(signal.ITIMER_REAL, max(left - passed, 0.001), interval)
            self.alarm = False


@contextlib.contextmanager
def _leave_as_found(seed: int):
    """Random states seeded inside; these, default dtype, grad mode and warning filters restored outside."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    with warnings.catch_warnings():
        try:
            torch.default_generator.manual_seed(seed)          # the CPU's only: CUDA, if any, is left alone
            np.random.seed(seed)
            random.seed(seed)
            torch.set_default_dtype(torch.float32)
            torch.set_grad_enabled(True)
            yield
        finally:
            torch.set_rng_state(torch_state)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)


@contextlib.contextmanager
def _bounded_printing():
    stream = _Bounded(sys.stdout)
    with contextlib.redirect_stdout(stream):
        yield


class _Bounded(io.TextIOBase):
    """Passes on the first PRINTED characters and drops the rest."""

    def __init__(self, stream):
        self.stream, self.left = stream, PRINTED

    def write(self, text):
        if self.left > 0:
            self.stream.write(text[: self.left])
            self.left -= len(text)
            if self.left <= 0:
                self.stream.write("\n… (more was printed and is not shown)\n")
        return len(text)

    def flush(self):
        self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _describe(error: BaseException, seconds: float) -> Error:
    where, last_is_student = _last_student_frame(error)
    if isinstance(error, TimeLimit):
        return Error("time", "TimeLimit", f"your code was still running after {seconds:g} seconds", where)
    if isinstance(error, ProbeError):
        return Error("answer", "answer", str(error), where)
    # Only a stub's own raise counts: torch raises NotImplementedError too, for a Module without forward.
    kind = "not started" if isinstance(error, NotImplementedError) and last_is_student else "exception"
    return Error(kind, type(error).__name__, _message(error), where)


def _let_go(error: BaseException | None) -> None:
    """Cut the cycle exception - traceback - frame - exception, so that the student's tensors are freed at once."""
    while error is not None:
        error.__traceback__, error.__context__, error = None, None, error.__context__


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = "(no message)"
    return text if len(text) <= 600 else text[:600] + " …"


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LIBRARIES = tuple(
    os.path.join(os.path.abspath(path), "")
    for path in {_HERE, os.path.dirname(torch.__file__),
                 *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))}
)


def _last_student_frame(error: BaseException) -> tuple[Where | None, bool]:
    """The innermost frame of code that is in no library, and whether it is the very last frame.

    IPython compiles each cell as a file of its own, so that line numbers count within the cell.
    """
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    while frames and frames[-1][0].f_code.co_name == "_ring" and frames[-1][0].f_code.co_filename == __file__:
        frames.pop()                                           # our own alarm
    for position in range(len(frames) - 1, -1, -1):
        frame, line = frames[position]
        file = frame.f_code.co_filename
        if not _is_library(file):
            where = Where(frame.f_code.co_name, line, linecache.getline(file, line).strip(), os.path.basename(file))
            return where, position == len(frames) - 1
    return None, False


@cache
def _is_library(file: str) -> bool:
    if file.startswith(("<frozen", "<__array_function__")) or "site-packages" in file or "dist-packages" in file:
        return True
    return os.path.abspath(file).startswith(_LIBRARIES) and not _is_cell(file)


def _is_cell(file: str) -> bool:
    return file.startswith("<") or "ipykernel_" in file


# ---------------------------------------------------------------- an exercise as a whole


@dataclass(frozen=True)
class Examination:
    """status: "passed", "failed", "not started" or "time"; evidence: one per case that ran, in order; total: how many
    cases there are; diagnosis: which mistake it is, if it was recognised."""

    exercise: Exercise
    status: str
    evidence: list[Evidence]
    total: int
    diagnosis: Diagnosis | None = None

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    @property
    def passed_cases(self) -> int:
        return sum(e.failure is None for e in self.evidence)

    @property
    def first_failure(self) -> Evidence | None:
        return next((e for e in self.evidence if e.failure is not None), None)


def examine(exercise: Exercise, student=None, seed: int = 0, seconds: float = SECONDS,
            run: Callable[[Script], Answers] | None = None, strict: bool = False) -> Examination:
    """All cases of an exercise. `seed` makes the inputs: the same seed, the same inputs, whatever else is there.
    `run` replaces the driver: a grader sends the script to another process. `strict`: an exception in the lab's own
    judge or diagnosis is raised (tests ask for that); a student sees a failed check without a diagnosis instead."""
    run = run or (lambda script: run_script(script, student, seconds))
    evidence = []
    for number, case in enumerate(exercise.cases):
        # crc32, not hash(): the same numbers in every process
        rng = np.random.default_rng([seed, zlib.crc32(exercise.id.encode()), number])
        script = case.probe(rng)
        answers = run(script)
        evidence.append(Evidence(case.title, script.inputs, answers, _failure(exercise, case, script, answers, strict)))
        if answers.error is not None and answers.error.kind in ("not started", "time"):
            return Examination(exercise, answers.error.kind, evidence, len(exercise.cases), _general(exercise, evidence))
    if all(e.failure is None for e in evidence):
        return Examination(exercise, "passed", evidence, len(exercise.cases))
    try:
        diagnosis = exercise.diagnose(evidence)
    except Exception:
        if strict:
            raise
        diagnosis = None
    return Examination(exercise, "failed", evidence, len(exercise.cases), diagnosis or _general(exercise, evidence))


def _failure(exercise: Exercise, case, script: Script, answers: Answers, strict: bool) -> str | None:
    if answers.error is not None:
        if answers.error.kind == "not started":
            return f"{exercise.name} is not written yet"
        return str(answers.error) if answers.error.kind == "exception" else answers.error.message
    try:
        failure = case.judge(script.inputs, answers)
    except Exception as error:         # a judge that stumbles over a strange answer must not let it pass
        if strict:
            raise
        failure = f"the answer cannot be compared ({type(error).__name__}: {_message(error)})"
    if failure is not None and not isinstance(failure, str):
        raise TypeError(f"exercise {exercise.id}, case {case.title!r}: a judge returns None or a sentence, "
                        f"found {reprlib.repr(failure)}")
    if failure is None and answers.changed_inputs:
        names = ", ".join(answers.changed_inputs)
        return f"{exercise.name} changed its input {names} in place; the caller still needs it as it was"
    return failure


def _general(exercise: Exercise, evidence: list[Evidence]) -> Diagnosis | None:
    """Mistakes that can be told without knowing the subject; asked only when the lab's own diagnosis knows nothing."""
    errors = [e.error for e in evidence if e.error is not None]
    if any(error.kind == "time" for error in errors):
        return Diagnosis("endless", "a loop does not end, or does far more work than it needs")
    if any(error.kind == "not started" for error in errors):
        return None
    changed = sorted({name for e in evidence for name in e.answers.changed_inputs})
    if changed:
        return Diagnosis("changes_input", f"your code writes into {', '.join(changed)} (an `x += …`, or a method that "
                         f"ends in an underscore, such as `add_`); make a new tensor instead: `y = x + …`")
    if any(e.failure is not None and e.answers.returned_none for e in evidence):
        return Diagnosis("no_return", f"{exercise.name} computes something but returns None: add a `return`")
    if any(error.type == "RecursionError" for error in errors):
        return Diagnosis("endless_recursion", "a function calls itself without end")
    return None
