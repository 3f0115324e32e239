"""The driver: time limit on every kind of loop and thread, errors with the student's own line, nothing left behind."""

import random
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lora_lab.course.exercise import Case, Diagnosis, Exercise, compare
from lora_lab.course.runner import AGAIN, PRINTED, examine, run_script
from lora_lab.course.script import Script

LIMIT = 0.4


def ask(student, x=None, seconds=5.0, **options):
    s = Script()
    s.send("y", s.call(s.input("x", np.ones((3, 2)) if x is None else x, **options)))
    return run_script(s, student, seconds)


@pytest.fixture(autouse=True, scope="module")
def what_the_first_run_imports_is_there():
    """So that tests that measure time measure the limit alone."""
    ask(lambda x: x)


# ------------------------------------------------------------ time


def test_the_first_optimizer_of_a_process_costs_the_student_no_time():
    """What torch imports for it is there before the clock starts: a fresh process, and the student's own step imports nothing."""
    code = """
import sys
import numpy as np, torch
from lora_lab.course.runner import run_script
from lora_lab.course.script import Script

def student(x):
    before = set(sys.modules)
    B = torch.zeros(2, requires_grad=True)
    for kind in (torch.optim.SGD, torch.optim.Adam):
        optimizer = kind([B], lr=0.1)
        (B * x).sum().backward()
        optimizer.step()
    return len([name for name in set(sys.modules) - before if name.startswith("torch")])

s = Script()
s.send("new", s.call(s.input("x", np.ones(2))))
answers = run_script(s, student, 60.0)
print(answers["new"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stdout + done.stderr


def plain_loop(x):
    while True:
        pass


def stubborn_loop(x):
    while True:
        try:
            while True:
                pass
        except:  # noqa: E722 what beginners write
            pass


def stubborn_finally(x):
    try:
        while True:
            pass
    finally:
        for _ in range(10):
            time.sleep(0.01)


def doubly_stubborn_loop(x):
    while True:
        try:
            stubborn_loop(x)
        except:  # noqa: E722
            pass


def sleeper(x):
    time.sleep(100)


def torch_loop(x):
    while True:
        x = x * 1.0


def generator_loop(x):
    return sum(1 for _ in iter(int, 1))


LOOPS = [plain_loop, stubborn_loop, doubly_stubborn_loop, stubborn_finally, torch_loop, generator_loop]


@pytest.mark.parametrize("loop", [*LOOPS, sleeper])
def test_endless_code_ends_in_the_main_thread(loop):
    if loop is sleeper and not hasattr(signal, "setitimer"):
        pytest.skip("a sleep cannot be interrupted here")
    start = time.monotonic()
    error = ask(loop, seconds=LIMIT).error
    assert error.kind == "time" and error.where.function in (loop.__name__, "stubborn_loop", "<genexpr>")
    assert time.monotonic() - start < LIMIT + 1.5      # the limit, some re-firings every 0.1 s, a noisy machine
    time.sleep(2 * AGAIN)                              # and nothing is fired after the end


@pytest.mark.parametrize("loop", LOOPS)
def test_endless_code_ends_in_another_thread(loop):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(ask(loop, seconds=LIMIT)), daemon=True)
    thread.start()
    thread.join(LIMIT + 3)
    assert not thread.is_alive() and answers[0].error.kind == "time"


def test_nothing_is_fired_after_code_that_ends_just_in_time():
    """Many runs that end close to their limit: a time limit that comes late would strike here, in the test itself."""
    def nearly(x):
        end = time.monotonic() + 0.0495
        while time.monotonic() < end:
            pass
        return x

    kinds = set()
    for _ in range(40):
        error = ask(nearly, seconds=0.05).error
        kinds.add(error.kind if error else None)
        for _ in range(1000):
            pass
    assert kinds <= {None, "time"}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarm on this system")
def test_an_alarm_that_was_running_is_restored():
    rung = []
    old = signal.signal(signal.SIGALRM, lambda *a: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60.0)
        ask(lambda x: x)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.2)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_two_threads_at_once_do_not_disturb_each_other():
    results = {}

    def work(n):
        results[n] = [ask(lambda x: torch.rand(2)).get("y").tolist() for _ in range(10)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = torch.rand(2, generator=torch.Generator().manual_seed(0)).tolist()
    assert all(row == expected for rows in results.values() for row in rows)


# ------------------------------------------------------------ errors


def multiply_wrongly(x):
    hidden = x * 2
    return nn.Linear(7, 1)(hidden)  # the culprit


def test_an_error_names_the_students_own_line():
    error = ask(multiply_wrongly, np.ones((3, 2), dtype=np.float32)).error
    assert error.kind == "exception" and error.type == "RuntimeError" and "cannot be multiplied" in error.message
    assert error.where.function == "multiply_wrongly" and error.where.text.endswith("# the culprit")
    assert error.where.line == multiply_wrongly.__code__.co_firstlineno + 2 and error.where.file == "test_course_runner.py"


def test_an_error_in_a_notebook_cell_counts_lines_in_the_cell():
    import linecache

    source = "def f(x):\n    return x.mistake\n"
    linecache.cache["/tmp/ipykernel_12/34.py"] = (len(source), None, source.splitlines(keepends=True), "/tmp/ipykernel_12/34.py")
    space = {}
    exec(compile(source, "/tmp/ipykernel_12/34.py", "exec"), space)
    where = ask(space["f"]).error.where
    assert (where.function, where.line, where.text) == ("f", 2, "return x.mistake")


def test_not_started():
    def stub(x):
        raise NotImplementedError("exercise 2.1")

    class Forgetful(nn.Module):
        pass

    assert ask(stub).error.kind == "not started"
    s = Script()
    s.call(np.ones(1), target=s.call())
    error = run_script(s, Forgetful).error      # torch raises NotImplementedError for a missing forward
    assert error.kind == "exception" and "forward" in error.message
    s = Script()
    with s.attempt("refusal"):
        s.call()
    assert run_script(s, lambda: stub(1)).error.kind == "not started"


def endless_recursion(x):
    return endless_recursion(x)


def test_all_kinds_of_exceptions_are_caught():
    assert ask(endless_recursion).error.type == "RecursionError"
    assert ask(lambda x: sys.exit(3)).error.type == "SystemExit"
    assert ask(lambda: 0).error.type == "TypeError"
    assert "an int" in ask(3).error.message

    class Mute(Exception):
        def __str__(self):
            raise ValueError

    def raises(x):
        raise Mute

    assert ask(raises).error.type == "Mute"


def test_ctrl_c_goes_through_and_leaves_things_as_found():
    def interrupt(x):
        torch.set_default_dtype(torch.float64)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(interrupt)
    assert torch.get_default_dtype() == torch.float32
    time.sleep(0.01)
    assert ask(lambda x: x).error is None


# ------------------------------------------------------------ what comes back, what stays


def test_answers_are_plain():
    class LyingTensor(torch.Tensor):
        def __eq__(self, other):
            return True

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return True

    class LyingArray(np.ndarray):
        def __eq__(self, other):
            return True

        def __array__(self, *args, **kwargs):
            return np.zeros(2)

    class LyingInt(int):
        def __eq__(self, other):
            return True

        def __int__(self):
            return 5

    class LyingText(str):
        def __eq__(self, other):
            return True

    tensor = ask(lambda x: torch.ones(2).as_subclass(LyingTensor))["y"]
    array = ask(lambda x: np.ones(2).view(LyingArray))["y"]
    assert type(tensor) is np.ndarray and tensor.tolist() == [1, 1]
    assert type(array) is np.ndarray and array.tolist() == [1, 1]
    number, text = ask(lambda x: LyingInt(4))["y"], ask(lambda x: LyingText("b"))["y"]
    assert type(number) is int and number == 4 and number != 5 and type(text) is str and text != "a"
    assert type(ask(lambda x: np.float32(0.5))["y"]) is float and ask(lambda x: (1, [True, None]))["y"] == [1, [True, None]]


def test_an_answer_is_a_snapshot():
    class Counter:
        def __init__(self):
            self.array, self.tensor = np.zeros(2), torch.zeros(2)

        def step(self):
            self.array += 1
            self.tensor += 1

    s = Script()
    counter = s.call()
    s.send("before", [s.get(counter, "array"), s.get(counter, "tensor")])
    s.method(counter, "step")
    assert [a.tolist() for a in run_script(s, Counter)["before"]] == [[0, 0], [0, 0]]


def test_an_exception_kept_from_an_earlier_run_does_not_strike_a_later_one():
    kept, before = [], sys.gettrace()

    def collector(x):
        while True:
            try:
                while True:
                    pass
            except BaseException as error:
                kept.append(error)
                raise

    assert ask(collector, seconds=0.1).error.kind == "time"

    def innocent(x):
        kept.clear()
        for _ in range(100):
            pass
        return x

    assert ask(innocent).error is None and sys.gettrace() is before


@pytest.mark.parametrize(("answer", "named"), [
    (object(), "an object"), ({1, 2}, "a set"), (nn.Linear, "the class Linear"), (1j, "a complex"), (b"x", "a bytes"),
    (np.array(["a"]), "<U1"), (torch.ones(2, dtype=torch.complex64), "complex64"), (torch.ones(2).to_sparse(), "sparse"),
    (torch.ones(1).expand(30_000_000), "far larger"), ([0] * 20_000, "far longer"),
])
def test_what_is_not_plain_is_named(answer, named):
    error = ask(lambda x: answer).error
    assert error.kind == "answer" and named in error.message


def test_a_cyclic_answer_is_an_error():
    cyclic = []
    cyclic.append(cyclic)
    assert ask(lambda x: cyclic).error is not None


def test_missing_parts_say_what_is_there():
    class Box(nn.Module):
        def __init__(self, x):
            super().__init__()
            self.lora_a, self.gain = nn.Parameter(x), 3

        def forward(self, x):
            return x

    def run(use):
        s = Script()
        use(s, s.call(s.input("x", np.ones(2))))
        return run_script(s, Box).error

    error = run(lambda s, box: s.get(box, "lora_A"))
    assert error.kind == "answer" and error.message == "a Box has no 'lora_A'; it has lora_a, gain"
    assert "expected (3,)" in run(lambda s, box: s.set(box, "lora_a", np.ones(3))).message
    assert "expected a method" in run(lambda s, box: s.method(box, "gain")).message
    assert "cut off" in run(lambda s, box: s.backward(s.call(np.ones(2), target=box), np.ones(2))).message
    assert "expected (3,)" in run(lambda s, box: s.backward(s.get(box, "lora_a"), np.ones(3))).message
    assert "expected (4,)" in run(lambda s, box: s.train(box, np.ones(2), np.ones(4), 1, 0.1)).message


def test_a_step_after_a_failed_attempt_says_so():
    s = Script()
    with s.attempt("refusal"):
        made = s.call()
    s.send("y", made)

    def fails():
        raise ValueError("no")

    answers = run_script(s, fails)
    assert answers["refusal"] == "ValueError" and answers.error.kind == "answer" and "step before" in answers.error.message


def test_inputs_changed_in_place_are_named():
    def in_place(x):
        x += 1
        return x

    def resize(x):
        x.resize_(1, 6)
        return x

    def writes_the_same(x):
        x[0] = x[0]
        return x

    assert ask(in_place).changed_inputs == ["x"] and ask(resize).changed_inputs == ["x"]
    assert ask(in_place, may_change=True).changed_inputs == []
    assert ask(lambda x: x + 1).changed_inputs == [] and ask(writes_the_same).changed_inputs == []
    assert ask(lambda x: x.fill_(float("nan")), np.full(2, np.nan)).changed_inputs == []
    s = Script()
    x = s.input("x", np.ones(2))
    s.set(x, "", np.zeros(2))                  # the probe itself may
    assert run_script(s, None).changed_inputs == []


def test_the_surroundings_are_left_as_found():
    def vandal(x):
        torch.manual_seed(99), np.random.seed(99), random.seed(99)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        warnings.simplefilter("error")
        sys.stdout.write("")
        return x

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    filters, out = list(warnings.filters), sys.stdout
    ask(vandal)
    ask(plain_loop, seconds=0.1)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert warnings.filters == filters and sys.stdout is out
    with torch.no_grad():
        assert ask(lambda x: torch.is_grad_enabled())["y"] is True and not torch.is_grad_enabled()
    torch.set_default_dtype(torch.float64)
    try:
        assert ask(lambda x: torch.ones(1)).dtypes["y"] == "float32"
    finally:
        torch.set_default_dtype(torch.float32)


def test_printing_is_kept_but_bounded(capsys):
    def chatty(x):
        print("hello")
        for _ in range(10_000):
            print("again")
        return x

    assert ask(chatty).error is None
    out = capsys.readouterr().out
    assert out.startswith("hello\nagain\n") and PRINTED <= len(out) < PRINTED + 100 and "not shown" in out


# ------------------------------------------------------------ a whole exercise


def probe(rng):
    s = Script()
    s.send("y", s.call(s.input("x", rng.normal(size=(3, 2)))))
    return s


def judge(inputs, answers):
    return compare(answers["y"], 2 * inputs["x"], what="double(x)")


def diagnose(evidence):
    if compare(evidence[0].answers.get("y"), evidence[0].inputs["x"] ** 2) is None:
        return Diagnosis("squares", "you square")


def exercise(**changes):
    fields = dict(id="0.1", title="Double", difficulty=1, minutes=1, points=1, name="double", diagnose=diagnose,
                  cases=(Case("it doubles", probe, judge), Case("it doubles again", probe, judge)),
                  hints=("a", "b", "c"), read="x", fallback=lambda: lambda x: 2 * x)
    return Exercise(**(fields | changes))


def in_place_double(x):
    x *= 2
    return x


def leaky_double(x):
    result = 2 * x
    x.zero_()
    return result


@pytest.mark.parametrize(("student", "status", "key"), [
    (lambda x: 2 * x, "passed", None), (lambda x: x**2, "failed", "squares"), (lambda x: 3 * x, "failed", None),
    (lambda x: None, "failed", "no_return"), (lambda x: x * float("nan"), "failed", None), (leaky_double, "failed", "changes_input"),
    (in_place_double, "failed", "changes_input"), (endless_recursion, "failed", "endless_recursion"), (plain_loop, "time", "endless"),
    (lambda x: {"x": x}, "failed", None), (lambda x: (2 * x).float(), "failed", None), (lambda x: [2 * x], "failed", None),
])
def test_examine(student, status, key):
    result = examine(exercise(), student, seconds=0.3)
    assert result.status == status and (result.diagnosis.key if result.diagnosis else None) == key
    assert result.passed == (status == "passed") and (result.first_failure is None) == result.passed
    assert len(result.evidence) == (1 if status == "time" else 2) and result.total == 2


def test_inputs_follow_from_the_seed_and_the_case():
    def inputs(seed, **changes):
        return [e.inputs["x"].tolist() for e in examine(exercise(**changes), lambda x: x, seed).evidence]

    assert inputs(0) == inputs(0) and inputs(0) != inputs(1) and inputs(0)[0] != inputs(0)[1]
    assert inputs(0) != inputs(0, id="0.2")


def test_a_grader_brings_its_own_driver():
    seen = []

    def elsewhere(script):
        seen.append(script.to_bytes())
        return run_script(Script.from_bytes(seen[-1]), lambda x: 2 * x)

    assert examine(exercise(), run=elsewhere).passed and len(seen) == 2


def test_a_stumbling_lab_never_lets_a_wrong_answer_pass():
    def stumble(*args):
        raise KeyError("y")

    wrong = exercise(cases=(Case("t", probe, stumble),), diagnose=stumble)
    result = examine(wrong, lambda x: 2 * x)
    assert result.status == "failed" and result.diagnosis is None and "cannot be compared" in result.first_failure.failure
    with pytest.raises(KeyError):
        examine(wrong, lambda x: 2 * x, strict=True)
    with pytest.raises(TypeError, match="None or a sentence"):
        examine(exercise(cases=(Case("t", probe, lambda i, a: True),)), lambda x: x)
