"""Wrong and right answers for lab 11: means instead of seeds, tests that a ReLU passes, unpaired spreads, worlds that are one."""

from . import Mutant


def _verdict(body: str) -> str:
    return "def verdict(measured, line):\n" + "".join(f"    {row}\n" for row in body.strip().splitlines())


_ENDS = 'return "depends" if len(set(votes)) == 2 else "true" if votes[0] else "false"'


def _each(vote: str) -> str:
    return _verdict(f"votes = [{vote} for n in measured.values()]\n{_ENDS}")


def _line(expression: str) -> str:
    return f"def nonlinearity(update, x, y):\n    f = update\n    return {expression}\n"


def _effect(mean: str, error: str, first: str = "d = mine - rival") -> str:
    return f"def paired_effect(mine, rival):\n    {first}\n    n = len(mine)\n    return {mean}, {error}\n"


def _worlds(true: str, false: str) -> str:
    return f"def worlds(B, A):\n    torch.manual_seed(0)\n    R, S = torch.randn_like(B), torch.randn_like(A)\n    return {true}, {false}\n"


MUTANTS = {
    "11.1": [
        Mutant("mean over the seeds", _each("sum(n) / len(n) > line"), "mean_of_seeds"),
        Mutant("most seeds", _each("sum(v > line for v in n) > len(n) / 2"), "majority"),
        Mutant("one seed is enough", _each("max(n) > line"), "any_seed"),
        Mutant("all seeds or none", _each("min(n) > line"), "all_seeds"),
        Mutant("one heap", _verdict('votes = [v > line for n in measured.values() for v in n]\n' + _ENDS), "one_heap"),
        Mutant("one heap, unsettled", _verdict('votes = [v > line for n in measured.values() for v in n]\n' + _ENDS.replace("depends", "unsettled")),
               "heap_unsettled"),
        Mutant("words swapped", _verdict('''
votes = [{v > line for v in n} for n in measured.values()]
if any(len(v) == 2 for v in votes): return "depends"
together = set().union(*votes)
return "unsettled" if len(together) == 2 else "true" if together == {True} else "false"
'''), "words_swapped"),
        Mutant("below", _verdict('''
votes = [{v < line for v in n} for n in measured.values()]
if any(len(v) == 2 for v in votes): return "unsettled"
together = set().union(*votes)
return "depends" if len(together) == 2 else "true" if together == {True} else "false"
'''), "upside_down"),
        Mutant("true and false swapped", _verdict('''
votes = [{v > line for v in n} for n in measured.values()]
if any(len(v) == 2 for v in votes): return "unsettled"
together = set().union(*votes)
return "depends" if len(together) == 2 else "false" if together == {True} else "true"
'''), "truth_swapped"),
        Mutant("on the line", _verdict('''
votes = [{v >= line for v in n} for n in measured.values()]
if any(len(v) == 2 for v in votes): return "unsettled"
together = set().union(*votes)
return "depends" if len(together) == 2 else "true" if together == {True} else "false"
'''), "on_the_line"),
        Mutant("depends first", _verdict('''
sure = {all(v > line for v in n) for n in measured.values() if len({v > line for v in n}) == 1}
if len(sure) == 2: return "depends"
if any(len({v > line for v in n}) == 2 for n in measured.values()): return "unsettled"
return "true" if True in sure else "false"
'''), "depends_first"),
        Mutant("returns in the loop", _verdict('''
for n in measured.values():
    votes = {v > line for v in n}
    return "unsettled" if len(votes) == 2 else "true" if votes == {True} else "false"
'''), "first_only"),
        Mutant("overwrites", _verdict('''
for n in measured.values():
    votes = {v > line for v in n}
    said = "unsettled" if len(votes) == 2 else "true" if votes == {True} else "false"
return said
'''), "last_only"),
        Mutant("one mean", _verdict("""
every = [v for n in measured.values() for v in n]
return "true" if sum(every) / len(every) > line else "false"
"""), "mean_of_all"),
        Mutant("two words", _verdict('return "true" if all(v > line for n in measured.values() for v in n) else "false"'), "two_words"),
        Mutant("one condition is enough", _verdict("""
votes = [{v > line for v in n} for n in measured.values()]
if any(len(v) == 2 for v in votes): return "unsettled"
return "true" if {True} in votes else "false"
"""), "any_condition"),
        Mutant("one condition is too much", _verdict("""
votes = [{v > line for v in n} for n in measured.values()]
if any(len(v) == 2 for v in votes): return "unsettled"
return "false" if {False} in votes else "true"
"""), "no_depends"),
        Mutant("the list itself", _verdict('return "true" if all(n > line for n in measured.values()) else "false"'), "list_compared"),
        Mutant("booleans", _verdict("return all(v > line for n in measured.values() for v in n)"), "a_bool"),
        Mutant("capitals", _verdict('''
votes = [{v > line for v in n} for n in measured.values()]
if any(len(v) == 2 for v in votes): return "Unsettled"
together = set().union(*votes)
return "Depends" if len(together) == 2 else "True" if together == {True} else "False"
'''), "other_letters"),
    ],
    "11.2": [
        Mutant("a factor of two", _line("float((f(2 * x) - 2 * f(x)).norm() / f(2 * x).norm())"), "scaling_only"),
        Mutant("a factor of ten, entry by entry", _line("float(((f(10 * x) - 10 * f(x)) / f(10 * x)).abs().max())"), "scaling_only"),
        Mutant("minus x", _line("float((f(-x) + f(x)).norm() / f(x).norm())"), "sign_only"),
        Mutant("not divided", _line("float((f(x + y) - f(x) - f(y)).norm())"), "absolute"),
        Mutant("largest difference, not divided", _line("float((f(x + y) - f(x) - f(y)).abs().max())"), "absolute"),
        Mutant("squares, not divided", _line("float(((f(x + y) - f(x) - f(y)) ** 2).mean())"), "absolute_square"),
        Mutant("sum of differences", _line("float((f(x + y) - f(x) - f(y)).sum() / (f(x) + f(y)).norm())"), "signed"),
        Mutant("one for each output", _line("(f(x + y) - f(x) - f(y)).abs() / (f(x) + f(y)).abs()"), "not_a_number"),
        Mutant("yes or no", _line("torch.allclose(f(x + y), f(x) + f(y))"), "yes_or_no"),
        Mutant("compares two inputs", _line("float((f(x) - f(y)).norm() / f(x).norm())"), "convicts_lora"),
        Mutant("adds the input", _line("float((f(x + y) - f(x) - y.sum()).norm() / f(x).norm())"), "convicts_lora"),
        Mutant("twice the same", _line("float((f(x) - f(x)).norm() / f(x).norm())"), "always_zero"),
        Mutant("divided by the input", _line("float((f(x + y) - f(x) - f(y)).norm() / (x + y).norm())"), "absolute"),
        Mutant("divided twice", _line("float((f(x + y) - f(x) - f(y)).norm() / (f(x) + f(y)).norm() ** 2)"), "over_divided"),
        Mutant("sums with itself", _line("float((f(x + x) - f(x) - f(x)).norm() / f(x).norm())"), "scaling_only"),
    ],
    "11.3": [
        Mutant("the wrong way round", _effect("d.mean()", "d.std() / n**0.5", "d = rival - mine"), "mean_reversed"),
        Mutant("by n", _effect("d.mean()", "d.std() / n"), "by_n"),
        Mutant("spread of one", _effect("d.mean()", "d.std()"), "one_run"),
        Mutant("numpy's std", _effect("d.mean()", "d.std(correction=0) / n**0.5"), "biased"),
        Mutant("numpy's std of one", _effect("d.mean()", "d.std(correction=0)"), "one_run_biased"),
        Mutant("unpaired", _effect("mine.mean() - rival.mean()", "(mine.var() / n + rival.var() / n) ** 0.5"), "unpaired"),
        Mutant("mine alone", _effect("mine.mean()", "mine.std() / n**0.5"), "mean_mine_only_and_mine_only"),
        Mutant("mine's spread", _effect("d.mean()", "mine.std() / n**0.5"), "mine_only"),
        Mutant("variance", _effect("d.mean()", "d.var() / n"), "variance"),
        Mutant("variance, whole", _effect("d.mean()", "d.var()"), "variance_whole"),
        Mutant("spreads subtracted", _effect("d.mean()", "(mine.std() - rival.std()) / n**0.5"), "difference_of_errors"),
        Mutant("root of n - 1", _effect("d.mean()", "d.std() / (n - 1) ** 0.5"), "root_n_minus_1"),
        Mutant("95 per cent", _effect("d.mean()", "1.96 * d.std() / n**0.5"), "interval"),
        Mutant("two errors", _effect("d.mean()", "2 * d.std() / n**0.5"), "interval_two"),
        Mutant("ratio", _effect("mine.mean() / rival.mean()", "d.std() / n**0.5"), "mean_ratio"),
        Mutant("signs dropped", _effect("d.abs().mean()", "d.std() / n**0.5"), "mean_absolute"),
        Mutant("median", _effect("d.quantile(0.5)", "d.std() / n**0.5"), "mean_median"),
        Mutant("best seeds", _effect("mine.max() - rival.max()", "d.std() / n**0.5"), "mean_best"),
        Mutant("sum", _effect("d.sum()", "d.std() / n**0.5"), "mean_summed"),
        Mutant("error first", _effect("d.std() / n**0.5", "d.mean()"), "swapped"),
        Mutant("always five", _effect("d.mean()", "d.std() / 5**0.5"), "always_five"),
        Mutant("pooled", _effect("d.mean()", "((mine.var() + rival.var()) / 2) ** 0.5"), "pooled"),
        Mutant("average of spreads", _effect("d.mean()", "(mine.std() + rival.std()) / 2"), "mean_of_spreads"),
        Mutant("less the rival's spread", _effect("d.mean()", "mine.std() - rival.std()"), "spread_less_spread"),
        Mutant("not centred", _effect("d.mean()", "((d**2).mean() / n) ** 0.5"), "not_centred"),
        Mutant("one number", "def paired_effect(mine, rival):\n    return (mine - rival).mean()\n", "one_number"),
    ],
    "11.4": [
        Mutant("the same adapter", _worlds("(B, A)", "(R, S)"), "same_update"),
        Mutant("signs flipped", _worlds("(-B, -A)", "(R, S)"), "same_update"),
        Mutant("the same product", _worlds("(2 * B, A / 2)", "(R, S)"), "same_update"),
        Mutant("both doubled", _worlds("(2 * B, 2 * A)", "(R, S)"), "both_scaled"),
        Mutant("both random", _worlds("(R, S)", "(-B, -A)"), "nothing_shared"),
        Mutant("zeros", _worlds("(0 * B, 0 * A)", "(R, S)"), "zero_as_true"),
        Mutant("the other way round", _worlds("(R, S)", "(R, A)"), "worlds_swapped"),
        Mutant("true twice", _worlds("(R, A)", "(B, S)"), "both_true"),
        Mutant("a little noise", _worlds("(R, A)", "(B + 0.1 * R, A + 0.1 * S)"), "too_mild"),
        Mutant("A first", _worlds("(A, R)", "(S, R)"), "A_first"),
        Mutant("transposed", _worlds("(A.T, B.T)", "(R, S)"), "transposed"),
        Mutant("a dict", _worlds("(R, A)", "(-B, -A)").replace("return (R, A), (-B, -A)", 'return {"true": (R, A), "false": (-B, -A)}'), "a_dict"),
        Mutant("four matrices", "def worlds(B, A):\n    return torch.ones_like(B), A, -B, -A\n", "flat"),
        Mutant("the products", _worlds("R @ A", "R @ S"), "products"),
        Mutant("one adapter", "def worlds(B, A):\n    return 2 * B, A\n", "one_world"),
    ],
}  # fmt: skip

ALTERNATIVES = {
    "11.1": [
        """
def verdict(measured, line):
    said = []
    for numbers in measured.values():
        above = sum(number > line for number in numbers)
        if 0 < above < len(numbers):
            return "unsettled"
        said.append(above > 0)
    if all(said):
        return "true"
    return "depends" if any(said) else "false"
""",
        """
def verdict(measured, line):
    arrays = [np.array(numbers) > line for numbers in measured.values()]
    if any(a.any() and not a.all() for a in arrays):
        return "unsettled"
    shares = np.mean([a.all() for a in arrays])
    return {0.0: "false", 1.0: "true"}.get(float(shares), "depends")
""",
    ],
    "11.2": [
        _line("(f(x + y) - f(x) - f(y)).norm() / (f(x).norm() + f(y).norm())"),
        _line("float((f(2 * x - 3 * y) - 2 * f(x) + 3 * f(y)).norm() / f(2 * x - 3 * y).norm())"),
        _line("((f(x - y) - (f(x) - f(y))).abs().max() / torch.cat([f(x), f(y)]).abs().max()).item()"),
        _line("max(float((f(x + y) - f(x) - f(y)).norm() / f(x + y).norm()), float((f(-x) + f(x)).norm() / f(x).norm()))"),
    ],
    "11.3": [
        _effect("float(d.mean())", "float(d.std() / math.sqrt(n))"),
        _effect("mine.mean() - rival.mean()", "((d - d.mean()) ** 2).sum().div(n * (n - 1)).sqrt()"),
        "def paired_effect(mine, rival):\n    d = (mine - rival).numpy()\n    return [d.mean(), d.std(ddof=1) / len(d) ** 0.5]\n",
        "def paired_effect(mine, rival):\n    d = mine - rival\n    return torch.stack([d.mean(), d.std() / len(d) ** 0.5])\n",
    ],
    "11.4": [
        _worlds("(R, A)", "(R, S)"),
        _worlds("(B, S)", "(-B, -A)"),
        _worlds("(2 * B, A)", "(R, -A)"),
        _worlds("[B, -A]", "[0 * B, 0 * A]"),
        "def worlds(B, A):\n    return [[B.flip(0), A], [torch.ones_like(B), 3 * torch.eye(*A.shape, dtype=A.dtype)]]\n",
    ],
}
