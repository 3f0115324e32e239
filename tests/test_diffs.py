"""The variants' files compute what zoo.variants, zoo.quantised and apply_lora compute (which are compared with peft elsewhere); their diffs are
whole and short; the cards say the same in HTML, in text and in a picture."""

import ast
import html
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lora_lab
from lora_lab import apply_lora
from lora_lab.counting import method_parameters
from lora_lab.diffs import FILES, LORA, PARTS, VARIANTS, changed, diff, equation, load, source, variant
from lora_lab.zoo.quantised import quantise_below_lora
from lora_lab.zoo.variants import (
    AdaLoRALinear,
    Budget,
    DoRALinear,
    LoRAXSLinear,
    OLoRALinear,
    PiSSALinear,
    VeRALinear,
    add_variant,
    eva,
    lora_fa,
    lora_plus,
    vera_matrices,
)

R, ALPHA, IN, OUT = 3, 5, 11, 7
ALL = [v.key for v in (LORA, *VARIANTS)]
# float64: some hundred products and a norm or an SVD, each good to a few times 1e-16
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
# The file writes NF4's levels with 7 digits: half a unit of the last one, twice (they were rounded to float32 before)
LEVELS = {"rtol": 0, "atol": 1e-7}
every_file = pytest.mark.parametrize("key", ALL)
# what the file calls it -> what the lab calls it
NAMES = {"A": "lora_A", "B": "lora_B", "m": "magnitude", "d": "vector_d", "b": "vector_b", "R": "core", "E": "values"}
TRAINED = {
    **dict.fromkeys(ALL, "AB"), "lora_fa": "B", "dora": "ABm", "vera": "db", "lora_xs": "R", "adalora": "ABE",
}  # fmt: skip
COUNTS = {"dora": "dora", "vera": "vera", "lora_xs": "lora-xs"}


def weight(seed=0):
    return torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(rows=13):
    # Far from round in every direction, so that EVA's singular vectors are clearly apart
    draw = torch.Generator().manual_seed(1)
    return torch.randn(rows, IN, dtype=torch.float64, generator=draw) * torch.linspace(3, 0.3, IN, dtype=torch.float64)


def started(key, W0=None):
    """The file's layer as it stands before the first step."""
    torch.manual_seed(2)
    file, W0 = load(key), weight() if W0 is None else W0
    layer = file.Layer(W0, R, ALPHA).double()
    file.start(layer, inputs())
    return layer


def labs(key, W0=None):
    """The lab's own layer of this kind over a linear layer with this weight, in its model."""
    base = nn.Linear(IN, OUT, bias=False, dtype=torch.float64)
    base.weight.data = (weight() if W0 is None else W0).clone()
    model = nn.Sequential(base)
    kinds = {"dora": DoRALinear, "lora_xs": LoRAXSLinear, "adalora": AdaLoRALinear, "pissa": PiSSALinear, "olora": OLoRALinear}
    if key in kinds:
        return add_variant(model, kinds[key], ["0"], r=R, alpha=ALPHA)
    if key == "vera":
        A, B = vera_matrices(model, ["0"], R)
        return add_variant(model, VeRALinear, ["0"], shared=(A.double(), B.double()))
    if key == "eva":
        return eva(model, [inputs()], ["0"], r=R, alpha=ALPHA)
    apply_lora(model, r=R, alpha=ALPHA, target_modules=["0"], rslora=key == "rslora")
    return quantise_below_lora(model, "nf4") if key == "qlora" else lora_fa(model) if key == "lora_fa" else model


def numbers(layer):
    return {name: p for name, p in layer.named_parameters() if name != "W0"}


def pair(key):
    """The file's layer and the lab's, trained a little: the same numbers in both."""
    layer, model = started(key), labs(key)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in numbers(layer).items():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=draw)
            getattr(model[0], NAMES[name]).copy_(p)
        if key in ("pissa", "olora"):  # their starts are compared by themselves
            model[0].base_layer.weight.copy_(layer.W0)
    return layer, model


# ---- the files -----------------------------------------------------------------------------------------------------------------------------


@every_file
def test_forward_is_the_labs(key):
    layer, model = pair(key)
    torch.testing.assert_close(layer(inputs()), model(inputs()), **(LEVELS | {"atol": 1e-5} if key == "qlora" else CLOSE))  # sums of 11 weights times inputs


@every_file
def test_merged_is_the_labs_and_computes_what_forward_computes(key):
    layer, model = pair(key)
    wanted = model[0].base_layer.weight + model[0].delta_weight()
    torch.testing.assert_close(layer.merged(), wanted, **(LEVELS | {"atol": 1e-6} if key == "qlora" else CLOSE))  # a level times a scale below 4
    torch.testing.assert_close(nn.functional.linear(inputs(), layer.merged()), layer(inputs()), **CLOSE)


@every_file
def test_gradients_are_the_labs_and_only_what_trains_has_one(key):
    layer, model = pair(key)
    upstream = torch.randn(13, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    layer(inputs()).backward(upstream), model(inputs()).backward(upstream)
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == set(TRAINED[key])
    for name in TRAINED[key]:
        torch.testing.assert_close(getattr(layer, name).grad, getattr(model[0], NAMES[name]).grad, **CLOSE)
    assert {name for name, p in model[0].named_parameters() if p.grad is not None} == {NAMES[name] for name in TRAINED[key]}


@every_file
def test_it_trains_as_many_numbers_as_the_lab_and_the_formula_say(key):
    layer, model = started(key), labs(key)
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    formula = {"lora_fa": R * OUT, "adalora": R * (IN + OUT) + R}.get(key) or method_parameters(COUNTS.get(key, "lora"), IN, OUT, R)
    assert trained == formula


@every_file
def test_before_the_first_step_it_computes_what_the_base_computes(key):
    layer, x = started(key), inputs()
    base = x @ weight().T
    if key in ("pissa", "olora"):  # W0 - scaling B A + scaling B A: to rounding
        torch.testing.assert_close(layer(x), base, **CLOSE)
        assert not torch.equal(layer.W0, weight())
    elif key == "qlora":  # not W0 but what 4 bits leave of it
        assert torch.equal(layer(x), x @ layer.W0.T)
        assert 0.01 < (layer.W0 - weight()).norm() / weight().norm() < 0.2
    else:
        assert torch.equal(layer(x), base) and torch.equal(layer.W0, weight())


@every_file
def test_the_first_two_steps_move_the_function(key):
    """Two: where B is zero the first step moves B alone."""
    layer, x = started(key), inputs()
    optimizer, before, frozen = load(key).optimizer(layer, 0.01), layer(x).detach(), layer.W0.clone()
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert (layer(x) - before).abs().max() > 1e-4
    assert torch.equal(layer.W0, frozen)


@every_file
def test_the_optimizer_holds_what_trains_at_its_rate(key):
    layer, model = started(key), labs(key)
    optimizer = load(key).optimizer(layer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: rates.pop(id(p)) for name, p in layer.named_parameters() if id(p) in rates}
    assert not rates and set(names) == set(TRAINED[key])
    if key == "lora_plus":
        groups = lora_plus(model)([p for p in model.parameters() if p.requires_grad]).param_groups
        wanted = {id(p): 1e-3 * group.get("lr_scale", 1) for group in groups for p in group["params"]}
        assert names == {name: wanted[id(getattr(model[0], NAMES[name]))] for name in "AB"} and names["B"] > names["A"]
    else:
        assert set(names.values()) == {1e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("key", ["lora", "rslora", "lora_plus", "lora_fa", "dora", "qlora"])
def test_the_usual_start_is_the_labs(key):
    """The same seed draws the same A."""
    layer = started(key)
    torch.manual_seed(2)
    model = labs(key)
    torch.manual_seed(2)
    model[0].reset_lora()
    assert torch.equal(layer.A, model[0].lora_A) and layer.A.any() and not layer.B.any()


@pytest.mark.parametrize("key", ["pissa", "olora", "eva", "lora_xs"])
def test_other_starts_are_the_labs(key):
    layer, lab = started(key), labs(key)[0]
    torch.testing.assert_close(layer.W0, lab.base_layer.weight, **CLOSE)
    if key == "eva":  # signs of singular vectors are free; the lab decomposes X^T X, which squares the condition of 30
        torch.testing.assert_close(layer.A.T @ layer.A, lab.lora_A.T @ lab.lora_A, rtol=0, atol=1e-8)
        assert not layer.B.any()
    else:
        torch.testing.assert_close(layer.B @ layer.A, lab.lora_B @ lab.lora_A, **CLOSE)
        torch.testing.assert_close(layer.B.abs(), lab.lora_B.abs(), **CLOSE)
    if key == "lora_xs":
        assert not layer.R.any()


def test_adalora_starts_with_small_factors_and_no_size():
    layer = load("adalora").Layer(torch.zeros(400, 500), 8, 8)
    load("adalora").start(layer, None)
    for factor in (layer.A, layer.B):  # 3200 draws and more: their deviation is off by 1.3 % or less
        assert factor.std().item() == pytest.approx(0.02, rel=0.06)
    assert not layer.E.any()


def test_vera_starts_at_a_tenth_and_zero_and_its_matrices_are_the_labs():
    layer, lab = started("vera"), labs("vera")[0]
    torch.testing.assert_close(layer.A.float(), lab.lora_A.float())  # the same draws, bounds computed another way in float32
    torch.testing.assert_close(layer.B.float(), lab.lora_B.float())
    assert torch.equal(layer.d, lab.vector_d) and not layer.b.any()


def test_veras_layers_share_one_a_and_one_b():
    vera = load("vera")
    shared = vera.matrices(R, d_in=11, d_out=7)
    first, last = (vera.Layer(torch.zeros(shape), R, ALPHA, shared) for shape in ((7, 11), (5, 7)))
    for name in "AB":
        mine, other = getattr(first, name), getattr(last, name)
        assert mine.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and not mine.requires_grad
    assert torch.equal(last.A, shared[0][:, :7]) and torch.equal(last.B, shared[1][:5])
    before = [t.clone() for t in shared]
    vera.start(first, None), vera.start(last, None)  # neither start draws them anew
    assert all(torch.equal(t, old) for t, old in zip(shared, before, strict=True))
    first.b.data += 1
    assert not last.b.any()


def test_no_gradient_flows_through_doras_norm():
    layer = pair("dora")[0]
    layer.ratio().sum().backward()
    assert layer.m.grad is not None and layer.A.grad is None and layer.B.grad is None


def test_lora_fa_keeps_no_inputs():
    """A's gradient needs the inputs, B's only A x."""
    kept = {}
    for key in ("lora", "lora_fa"):
        layer, x = started(key), inputs().requires_grad_()
        shapes = kept[key] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, shapes=shapes: (shapes.append(tuple(t.shape)), t)[1], lambda t: t):
            layer(x)
    assert (13, IN) in kept["lora"] and (13, IN) not in kept["lora_fa"] and (13, R) in kept["lora_fa"]


@pytest.mark.parametrize("shape", [(7, 11), (8, 64), (3, 5)])
def test_qlora_keeps_the_labs_codes_in_half_a_byte_each(shape):
    W0 = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    layer = load("qlora").Layer(W0, 1, 1)
    model = apply_lora(nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)), r=1, alpha=1, target_modules=["0"])
    model[0].base_layer.weight.data = W0.clone()
    base = quantise_below_lora(model, "nf4")[0].base_layer
    assert torch.equal(layer.codes.flatten(), base.codes) and torch.equal(layer.scales.flatten(), base.scales)
    assert layer.codes.dtype == torch.uint8 and layer.codes.numel() == -(-W0.numel() // 64) * 32
    assert "W0" not in dict(layer.named_parameters()) and layer.W0.shape == shape
    assert not [name for name, t in layer.state_dict().items() if t.shape == shape]  # nowhere in full


def test_qlora_of_zeros_and_of_a_parameter():
    layer = load("qlora").Layer(nn.Parameter(torch.zeros(4, 32)), 1, 1)
    assert not layer.W0.any() and not layer.W0.requires_grad


def test_adaloras_pruning_is_the_labs():
    file, steps, warm, last = load("adalora"), 40, 3, 5
    layers = [file.Layer(weight(seed), R, ALPHA) for seed in (0, 1)]
    model = nn.Sequential(*(labs("adalora", weight(seed))[0] for seed in (0, 1)))
    budget, means, x, left = Budget(model, target=1, steps=steps, warm=warm, last=last), {}, inputs(), []
    torch.manual_seed(6)
    for n, layer in enumerate(layers):
        file.start(layer, x)
        layer.E.data += 0.3 + 0.1 * n
    for k in range(1, steps + 1):
        for n, layer in enumerate(layers):
            layer.zero_grad()
            y = torch.randn(13, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(2 * k + n))
            ((layer(x) - y).square().mean() + 0.1 * file.orthogonality(layer)).backward()
            for name in "ABE":  # the same numbers and gradients for both rules
                mine, theirs = getattr(layer, name), getattr(model[n], NAMES[name])
                theirs.data, theirs.grad = mine.data.clone(), mine.grad.clone()
        keep = file.allowed(min(1, max(0, (k - warm) / (steps - last - warm))), 2 * R, 2)
        assert keep == budget.allowed(k)
        file.prune(layers, keep, means)
        left.append(budget.step(k))
        for layer, lab in zip(layers, model, strict=True):
            assert torch.equal(layer.E, lab.values)
            torch.testing.assert_close(file.orthogonality(layer), lab.orthogonality(), **CLOSE)
        with torch.no_grad():  # pruned directions may come back
            for layer in layers:
                for name in "ABE":
                    getattr(layer, name).sub_(0.002 * getattr(layer, name).grad)
    assert left[2] == 2 * R and left[-1] == 2 and len(set(left)) > 2


def test_adaloras_score_is_a_mean_times_the_mean_of_its_changes():
    """Equations 8 to 10 of the paper, in numpy: what hangs steadily on a number counts less than what comes and goes."""
    draw = np.random.default_rng(0)
    w, means, smooth, unsure = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)), {}, np.zeros(3), np.zeros(3)
    for _ in range(5):
        w.grad = torch.from_numpy(draw.normal(size=3))
        now = np.abs(w.detach().numpy() * w.grad.numpy())
        smooth = 0.85 * smooth + 0.15 * now
        unsure = 0.85 * unsure + 0.15 * np.abs(now - smooth)
        np.testing.assert_allclose(load("adalora").score(w, means).detach().numpy(), smooth * unsure, rtol=1e-12)


@every_file
def test_each_file_stands_alone(key):
    tree = ast.parse(source(key))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    named = [node.module if isinstance(node, ast.ImportFrom) else alias.name for node in imports for alias in node.names]
    assert {name.partition(".")[0] for name in named} == {"torch"}
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {"Layer", "start", "optimizer"} <= names
    assert re.match(rf'"""{re.escape(variant(key).name)}, arXiv {re.escape(variant(key).arxiv)}:  .+"""$', source(key).splitlines()[0])


@every_file
def test_the_callers_weight_stays_as_it_is(key):
    W0 = weight()
    started(key, W0)
    assert torch.equal(W0, weight())


# ---- the diffs -----------------------------------------------------------------------------------------------------------------------------


def code(key):
    """A file without its first line, the docstring."""
    return source(key).splitlines()[1:]


@every_file
def test_the_diff_turns_one_file_into_the_other(key):
    lines = diff(key, whole=True)
    assert [line for sign, line in lines if sign != "+"] == code("lora")
    assert [line for sign, line in lines if sign != "-"] == code(key)


@every_file
def test_what_is_shown_is_every_change_in_whole_functions(key):
    every = [line for line in diff(key, whole=True) if line[0] != " " and line[1]]
    shown = diff(key)
    assert [line for line in shown if line[0] != " "] == every
    paragraphs = [{sign for sign, _ in group} for blank, group in groupby(shown, lambda line: not line[1]) if not blank]
    assert all(signs != {" "} for signs in paragraphs)
    assert not shown or (shown[0][1] and shown[-1][1])


@pytest.mark.parametrize("key", [v.key for v in VARIANTS])
def test_each_variant_is_a_small_change(key):
    added, removed = changed(key)
    old, new = ({line for line in code(which) if line.strip()} for which in ("lora", key))
    assert 0 < added + removed < 30
    # counted another way: lines that only one of the two files has (all of these are different lines)
    assert added >= len(new - old) and removed >= len(old - new) and added + removed <= len(new ^ old) + 1


def test_lora_itself_is_short_and_no_change():
    assert diff("lora") == [] and changed("lora") == (0, 0)
    assert 25 <= len(source("lora").splitlines()) <= 40


def test_where_a_variant_changes_something_is_where_it_says():
    """By the functions that differ: the start in start, the training in optimizer (and in what is frozen), the scaling in the scaling's line alone."""
    def touched(key):
        name, found = None, set()
        for sign, line in diff(key, whole=True):
            defined = re.match(r" *def (\w+)", line)
            name = defined[1] if defined else name
            if sign != " " and line:
                found.add(name)
        return found

    rules = {
        "scaling": lambda names: names == {"__init__"},
        "training": lambda names: "optimizer" in names <= {"__init__", "optimizer"},
        "start": lambda names: names == {"start"},
        "layer": lambda names: {"forward", "merged"} <= names,
        "base": lambda names: names == {None, "__init__", "W0"},  # None: the levels above the class
    }
    assert [v.key for v in VARIANTS if not rules[v.where](touched(v.key))] == []


def test_the_table_lists_every_file_once_in_the_order_of_the_parts():
    assert sorted(ALL) == sorted(path.stem for path in FILES.glob("*.py")) and len(VARIANTS) == 11
    assert [where for where, _ in groupby(v.where for v in VARIANTS)] == list(PARTS)
    # The papers' numbers as the lab's own modules name them
    package = Path(lora_lab.__file__).parent
    named = "".join((package / name).read_text(encoding="utf-8") for name in ("layers.py", "zoo/variants.py", "zoo/quantised.py"))
    assert all(v.arxiv in named for v in (LORA, *VARIANTS)) and len({v.arxiv for v in (LORA, *VARIANTS)}) == 12
    assert all(equation(key) for key in ALL)


def test_another_name_is_refused_with_those_there_are():
    with pytest.raises(KeyError, match="no variant 'dorra'.*adalora"):
        diff("dorra")


# ---- the cards -----------------------------------------------------------------------------------------------------------------------------

pytest.importorskip("IPython")
pytest.importorskip("matplotlib")

from lora_lab.view.diff import COMES, GOES, HIDDEN, Diffs, plot_variants, show_diff, without  # noqa: E402
from lora_lab.view.style import COLOURS  # noqa: E402


def rows(page):
    """What a reader sees of each line: (tag, text)."""
    found = re.findall(r'<(ins|del|div) style="display:block[^>]*>(.*?)</\1>', page)
    return [(tag, html.unescape(re.sub(r"<[^>]+>", "", inside)).rstrip()) for tag, inside in found]


@pytest.mark.parametrize("key", [v.key for v in VARIANTS])
def test_a_card_shows_every_line_with_its_sign(key):
    page = Diffs({key: diff(key)})._repr_html_()
    signs = {"+": ("ins", "+"), "-": ("del", "−"), " ": ("div", "")}
    assert rows(page) == [(signs[sign][0], signs[sign][1] + line) for sign, line in diff(key)]
    added, removed = changed(key)
    assert f">+{added}<" in page and f">−{removed}<" in page and html.escape(variant(key).idea) in page and variant(key).arxiv in page
    # With the sign, which can't be selected, left out, what is copied is the code.
    assert page.count("user-select:none") == len(diff(key))


def test_changed_words_are_underlined_in_both_lines():
    page = Diffs({"rslora": diff("rslora")})._repr_html_()
    assert re.findall(r"border-bottom:2px[^>]*>(.*?)</span>", page) == ["**0.5"]
    page = Diffs({"vera": diff("vera")})._repr_html_()
    marked = re.findall(r"<(ins|del)[^>]*>[^\n]*?border-bottom:2px[^>]*>(.*?)</span>", page.replace("</ins>", "\n").replace("</del>", "\n"))
    assert ("del", "alpha / r") in marked and ("ins", "1.0") in marked  # a comment is never marked


def test_code_is_escaped_marked_or_not():
    lines = [(" ", "if a < b & c:"), ("-", "    a = b"), ("+", "    a = b < c & d  # <e>")]
    page = Diffs({"dora": lines})._repr_html_()
    assert rows(page) == [("div", "if a < b & c:"), ("del", "−    a = b"), ("ins", "+    a = b < c & d  # <e>")]
    assert "if a &lt; b &amp; c:" in page and " &lt; c &amp; d</span>" in page and "&lt;e&gt;" in page and "<e>" not in page


def test_a_line_that_sets_the_same_name_is_its_partner():
    page = Diffs({"lora_xs": diff("lora_xs")})._repr_html_()
    assert [re.sub(r"<[^>]+>", "", w) for w in re.findall(r"border-bottom:2px[^>]*>(.*?)</span>", page)][:2] == [", requires_grad=False"] * 2


def test_one_card_is_open_and_of_several_the_first():
    assert "<details" not in Diffs({"dora": diff("dora")})._repr_html_()
    page = Diffs({key: diff(key) for key in ("rslora", "lora_plus", "lora_fa")})._repr_html_()
    assert re.findall(r"<details [^>]*?( open)?>", page) == [" open", "", ""] and page.count("<summary") == 3
    assert page.count('tabindex="0"') == page.count("overflow-x:auto") == page.count('role="region"') == 3  # scrolled by keyboard, too


def test_outside_a_notebook_it_is_printed(capsys):
    show_diff(["lora_plus", "qlora"])
    said = capsys.readouterr().out
    assert "LoRA+ changes how A and B are trained: +1 −1 lines (arXiv 2402.12354)" in said and "<" not in said.replace("<=", "")
    for key in ("lora_plus", "qlora"):
        assert all(f"  {sign} {line}".rstrip() in said for sign, line in diff(key))
        assert variant(key).idea in said and equation(key) in said


def test_what_a_reader_is_to_write_is_left_out():
    lines, whole = without(diff("dora"), ["merged", "ratio"]), diff("dora")
    gone = [line for _, line in whole if "self.W0 + self.scaling * (self.B" in line or "detach()" in line]
    assert [line for _, line in lines if line.strip() == HIDDEN] == ["        " + HIDDEN] * 2
    assert [line for line in lines if HIDDEN not in line[1]] == [line for line in whole if line[1] not in gone] and len(gone) == 4


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda: show_diff("dorra"), KeyError, "no variant"), (lambda: show_diff([]), ValueError, "needs a variant.*dora"),
    (lambda: show_diff("rslora", hide="merged"), ValueError, "leave out merged"),
])  # fmt: skip
def test_what_cannot_be_shown_is_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


def contrast(text, paper):
    def light(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(text), light(paper)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def over(colour, share, paper):
    return tuple(share * c + (1 - share) * p for c, p in zip(colour, paper, strict=True))


@pytest.mark.parametrize(("paper", "text"), [((255, 255, 255), (33, 33, 33)), ((17, 17, 17), (255, 255, 255))], ids=["light", "dark"])
@pytest.mark.parametrize("colour", [COMES, GOES], ids=["comes", "goes"])
def test_text_on_the_tints_is_legible_in_both_themes(paper, text, colour):
    """WCAG's 4.5:1, on JupyterLab's papers, through the card's own grey; comments are set with an opacity of 0.75."""
    card = over((128, 138, 150), 0.10, paper)
    line = over(colour, 0.14, card)
    word = over(colour, 0.3, line)
    assert contrast(text, word) > 4.5 and contrast(over(text, 0.75, line), line) > 4.5


def test_signs_colours_are_those_of_figures():
    assert ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in (COMES, GOES)] == [COLOURS[2], COLOURS[1]]


def texts(figure):
    from matplotlib.text import Text

    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and type(text) is Text]


def test_the_picture_names_every_variant_and_no_word_covers_another():
    figure = plot_variants(title="What a variant changes")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    words = texts(figure)
    said = [word.get_text() for word in words]
    assert all(said.count(v.name) == 1 for v in VARIANTS) and {"frozen", "optimizer", "start", "What a variant changes"} <= set(said)
    boxes = [word.get_window_extent() for word in words]
    assert not [(a, b) for n, a in enumerate(said) for m, b in enumerate(said[:n]) if boxes[n].overlaps(boxes[m])]
    page = figure.bbox
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1 for box in boxes)
