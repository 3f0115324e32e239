"""A script and its answers cross as bytes, and give the same answers in this process, after a round trip, and in another."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from lora_lab.course.runner import Answers, run_script
from lora_lab.course.script import STUDENT, Script, layer, linear

SOURCE = '''
import torch
from torch import nn

class Student(nn.Module):
    """y = base(x) + gain * x @ extra.T"""
    def __init__(self, base, gain=1.0):
        super().__init__()
        self.base, self.gain = base, gain
        base.requires_grad_(False)
        self.extra = nn.Parameter(torch.zeros_like(base.weight))
        self.noise = torch.randn(3)

    def forward(self, x):
        return self.base(x) + self.gain * (x @ self.extra.T)

    def describe(self, *, verbose):
        if verbose is not True:
            raise TypeError("verbose")
        return {"shapes": [list(p.shape) for p in self.parameters()], "name": "student", "nothing": None, "exact": (1, 2.5)}
'''
NUMBERS = dict(W=np.random.default_rng(0).normal(size=(4, 3)), b=np.random.default_rng(1).normal(size=4),
               E=np.random.default_rng(2).normal(size=(4, 3)), x=np.random.default_rng(3).normal(size=(5, 3)),
               G=np.random.default_rng(4).normal(size=(5, 4)))


def script() -> Script:
    s = Script(seed=7)
    W, x = s.input("W", NUMBERS["W"]), s.input("x", NUMBERS["x"])
    student = s.call(s.linear(W, NUMBERS["b"]), gain=5.0)
    s.send("noise", s.get(student, "noise"))
    s.set(student, "extra", NUMBERS["E"])
    y = s.call(x, target=student)
    s.send("y", y)
    s.backward(y, NUMBERS["G"])
    s.send("grad", s.grad(student, "extra"))
    s.send("base grad", s.grad(student, "base.weight"))
    s.send("parameters", s.parameters(student))
    s.send("description", s.method(student, "describe", verbose=True))
    with s.attempt("refusal"):
        s.method(student, "describe", verbose=False)
    with s.attempt("no refusal"):
        s.method(student, "describe", verbose=True)
    s.send("low", s.input("bf16", torch.tensor([1.0, 1 / 3, 1e30], dtype=torch.bfloat16)))
    s.send("half", s.input("f16", np.float16([0.1, 0.2])))
    s.send("single", s.input("f32", np.float32([[0.1]])))
    s.send("flags", [s.input("flags", np.array([True, False])), s.input("ints", np.int64([3, 2**60])), float("nan"), "text"])
    clone = s.copy(student)
    s.send("losses", s.train(clone, x, NUMBERS["G"], steps=3, lr=0.1))
    s.send("trained", s.get(clone, "extra"))
    s.send("untouched", s.get(student, "extra"))
    return s


def student():
    space = {}
    exec(SOURCE, space)
    return space["Student"]


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            same(left, right)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    else:
        assert one == other or (one != one and other != other)


def test_the_answers_are_those_of_torch():
    a = run_script(script(), student())
    assert a.error is None and a.changed_inputs == []
    W, b, E, x, G = (NUMBERS[k] for k in "WbExG")
    tight = dict(rtol=1e-12, atol=1e-12)      # float64, sums of three products: rounding stays below 1e-15
    np.testing.assert_allclose(a["y"], x @ (W + 5 * E).T + b, **tight)
    np.testing.assert_allclose(a["grad"], 5 * G.T @ x, **tight)
    assert a["base grad"] is None and a["refusal"] == "TypeError" and a["refusal.message"] == "verbose" and a["no refusal"] is None
    assert a["parameters"] == [{"name": "extra", "shape": [4, 3], "requires_grad": True},
                               {"name": "base.weight", "shape": [4, 3], "requires_grad": False},
                               {"name": "base.bias", "shape": [4], "requires_grad": False}]
    assert a["description"] == {"shapes": [[4, 3], [4, 3], [4]], "name": "student", "nothing": None, "exact": [1, 2.5]}
    assert a.dtypes["low"] == "bfloat16" and a["low"].dtype == np.float32 and a["half"].dtype == np.float16
    assert a["low"].tolist() == torch.tensor([1.0, 1 / 3, 1e30]).bfloat16().tolist()
    assert a["flags"][0].tolist() == [True, False] and a["flags"][1].tolist() == [3, 2**60] and a["flags"][3] == "text"
    assert a.dtypes["flags.1"] == "int64"
    np.testing.assert_array_equal(a["untouched"], E)
    torch.manual_seed(7)
    nn.Linear(3, 4)                           # the probe's layer draws its random start first
    np.testing.assert_array_equal(a["noise"], torch.randn(3).numpy())

    # training, by torch's own optimizer on functional_call
    extra = torch.tensor(E, requires_grad=True)
    optimizer, losses = torch.optim.SGD([extra], lr=0.1), []
    for _ in range(3):
        out = functional_call(nn.Linear(3, 4), {"weight": torch.tensor(W) + 5 * extra, "bias": torch.tensor(b)}, torch.tensor(x))
        loss = ((out - torch.tensor(G)) ** 2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(a["losses"], losses, **tight)
    np.testing.assert_allclose(a["trained"], extra.detach().numpy(), **tight)


def test_a_round_trip_changes_nothing():
    first, again = script(), Script.from_bytes(script().to_bytes())
    same(dict(first.inputs), dict(again.inputs))
    assert first.dtypes == again.dtypes and first.seed == again.seed == 7
    assert json.dumps(first.operations) == json.dumps(again.operations)      # as text, for NaN is not equal to itself
    one, other = run_script(first, student()), run_script(again, student())
    same(dict(one), dict(other))
    back = Answers.from_bytes(one.to_bytes())
    same(dict(one), dict(back))
    assert one.dtypes == back.dtypes == other.dtypes and one.seconds == back.seconds
    assert again.input("another", np.zeros(1)).id == first.input("another", np.zeros(1)).id    # ids go on, none twice


def test_another_process_answers_the_same(tmp_path):
    (tmp_path / "script").write_bytes(script().to_bytes())
    (tmp_path / "source").write_text(SOURCE)
    driver = (
        "import sys, pathlib\n"
        "from lora_lab.course.runner import run_script\n"
        "from lora_lab.course.script import Script\n"
        "folder, space = pathlib.Path(sys.argv[1]), {}\n"
        "exec((folder / 'source').read_text(), space)\n"
        "answers = run_script(Script.from_bytes((folder / 'script').read_bytes()), space['Student'])\n"
        "(folder / 'answers').write_bytes(answers.to_bytes())\n"
    )
    subprocess.run([sys.executable, "-c", driver, str(tmp_path)], check=True, timeout=120)
    same(dict(run_script(script(), student())), dict(Answers.from_bytes((tmp_path / "answers").read_bytes())))


def test_errors_cross_too():
    def broken(x):
        return x @ x

    s = Script()
    s.send("y", s.call(s.input("x", np.ones((2, 3)))))
    answers = run_script(s, broken)
    back = Answers.from_bytes(answers.to_bytes())
    assert back.error == answers.error and back.error.where.function == "broken"


def test_modules_from_descriptions():
    rng = np.random.default_rng(0)
    w1, w2, e, x = rng.normal(size=(4, 3)), rng.normal(size=(2, 4)), rng.normal(size=(7, 3)), rng.normal(size=(5, 3))
    s = Script()
    named = s.module({"first": linear(w1), "act": layer("ReLU"), "rest": [linear(w2, np.ones(2)), layer("Dropout", p=0.0)]})
    s.send("named", s.call(s.input("x", x), target=named))
    s.send("inner", s.get(named, "rest.0.weight"))
    s.send("mlp", s.call(x, target=s.mlp([w1, w2])))
    s.send("names", s.parameters(s.sequential([linear(w1), linear(w2, np.ones(2))])))
    s.send("embedded", s.call(np.int64([1, 6]), target=s.module(layer("Embedding", e))))
    kernel = rng.normal(size=(2, 3, 1, 1))
    s.send("convolved", s.call(x.T.reshape(1, 3, 5, 1), target=s.module(layer("Conv2d", kernel))))
    s.send("normed", s.call(x, target=s.module(layer("LayerNorm", np.ones(3), np.zeros(3), eps=0.0))))
    a = run_script(s, None)
    assert a.error is None, a.error
    hidden = np.maximum(x @ w1.T, 0) @ w2.T
    tight = dict(rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(a["named"], hidden + 1, **tight)
    np.testing.assert_allclose(a["mlp"], hidden, **tight)
    np.testing.assert_array_equal(a["inner"], w2)
    np.testing.assert_array_equal(a["embedded"], e[[1, 6]])
    np.testing.assert_allclose(a["convolved"][0, :, :, 0], kernel[:, :, 0, 0] @ x.T, **tight)
    np.testing.assert_allclose(a["normed"], (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True), **tight)
    assert [p["name"] for p in a["names"]] == ["0.weight", "1.weight", "1.bias"]


def test_set_writes_in_place_and_sets_plain_attributes():
    s = Script()
    box = s.call()
    s.set(box, "weight", np.float32([1, 2]))
    s.set(box, "alpha", 7)
    s.send("box", [s.get(box, "weight"), s.get(box, "alias"), s.get(box, "alpha")])

    class Box:
        def __init__(self):
            self.weight = self.alias = nn.Parameter(torch.zeros(2))
            self.alpha = 1

    a = run_script(s, Box)
    assert a.error is None and [np.asarray(v).tolist() for v in a["box"]] == [[1, 2], [1, 2], 7]


@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b"", lambda b: b[:-3], lambda b: b"\x80\x04K\x01."])
def test_damaged_bytes_are_refused(damage):
    with pytest.raises(ValueError, match="expected bytes in the format"):
        Script.from_bytes(damage(script().to_bytes()))


def test_what_a_script_refuses():
    s = Script()
    s.input("x", np.zeros(2))
    with pytest.raises(ValueError, match="two inputs"):
        s.input("x", np.zeros(2))
    with pytest.raises(TypeError, match="not a Linear"):
        s.call(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no layer 'Transformer'"):
        layer("Transformer")
    with pytest.raises(TypeError, match="described by"):
        s.module(3)
    assert STUDENT.id == 0
