"""Lab 05, Inside GPT-2: its exercises.

Sources: Hu et al. 2021 (arXiv 2106.09685), sections 4.2 and 7.1, tables 5 and 6; transformers' GPT-2, whose Conv1D computes x W + b with
W (in, out), and whose c_attn is cut first into q, k, v, then into heads. Oracles: outputs by numpy, never the formula that is asked for;
names by `re` on a list of GPT-2's modules; counts by building the factors.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import torch

from ..exercise import Case, Diagnosis, Evidence, Exercise, Lab, Prediction, Question, compare
from ..script import Script
from .formulas import SCALINGS

RTOL = 1e-6  # float64 all the way leaves 1e-13; a student may pass through float32 in places, a mistake changes the first digits


# ---------------------------------------------------------------------------------------------------------------------
# 5.1  merged_conv1d(weight, A, B, alpha, r)
#
# r, alpha, in and out are pairwise different in the wide layer. In the square one a forgotten transpose raises nothing.

WIDE = dict(d_in=7, d_out=11, r=3, alpha=5.0)
SQUARE = dict(d_in=6, d_out=6, r=2, alpha=7.0)
TALL = dict(d_in=13, d_out=4, r=5, alpha=2.0)


def _merge_probe(z: Mapping):
    def probe(rng):
        s = Script()
        s.input("x", rng.normal(size=(8, z["d_in"])))
        weight = s.input("weight", rng.normal(size=(z["d_in"], z["d_out"])))
        A, B = s.input("A", rng.normal(size=(z["r"], z["d_in"]))), s.input("B", rng.normal(size=(z["d_out"], z["r"])))
        s.send("merged", s.call(weight, A, B, z["alpha"], z["r"]))
        return s

    return probe


def _merge_judge(z: Mapping):
    def judge(inputs, answers):
        x, W, A, B = (inputs[name] for name in ("x", "weight", "A", "B"))
        wrong = compare(answers["merged"], np.ones_like(W), what="the merged weight", rtol=math.inf)  # its kind and shape alone
        if wrong:
            return wrong
        # The layer beside its adapter, in two thin products: ΔW is never built here.
        expected = x @ W + z["alpha"] / z["r"] * np.einsum("or,ri,ni->no", B, A, x)
        return compare(x @ answers["merged"], expected, what="the output of the Conv1D with this weight", rtol=RTOL)

    return judge


def _diagnose_merge(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(e, z) for e, z in zip(evidence, (WIDE, SQUARE, TALL), strict=True)]
    found = [e.answers.get("merged") for e, _ in runs]
    square = found[1]
    if not isinstance(square, np.ndarray):
        return None

    def matches(formula, which) -> bool:
        return all(compare(found[k], formula(runs[k][0].inputs, runs[k][1]), rtol=RTOL) is None for k in which)

    def BA(i):
        return i["B"] @ i["A"]

    scale = SCALINGS["alpha / r"]
    whole = [0, 1, 2]
    if matches(lambda i, z: i["weight"] + scale(z) * BA(i).reshape(i["weight"].shape), whole):
        return Diagnosis(
            "reshaped",
            "you give B A the right shape by reading its numbers in another order (view, reshape); a transpose swaps rows and columns",
        )
    if matches(lambda i, z: i["weight"] + scale(z) * BA(i), [1]):
        if evidence[0].failure is None:
            return Diagnosis(
                "transposed_where_needed",
                "you transpose where the shapes don't fit, and leave it where they do. The square layer fits both ways and needs it just the same: "
                "a shape tells you nothing there",
            )
        return Diagnosis("not_transposed", "B A is (out, in), the Conv1D keeps (in, out). Where in = out that raises no error, it only computes something else")
    if matches(lambda i, z: i["weight"].T + scale(z) * BA(i), whole):
        return Diagnosis("weight_transposed", "this is the merged weight as an nn.Linear keeps it, (out, in); the Conv1D goes on to keep (in, out)")
    if matches(lambda i, z: scale(z) * BA(i).T, whole):
        return Diagnosis("delta_alone", "this is ΔW, rightly turned; the merged weight is weight + ΔW")
    if matches(lambda i, z: i["weight"] - scale(z) * BA(i).T, whole):
        return Diagnosis("subtracted", "the update is added, not subtracted")
    if matches(lambda i, z: i["weight"], whole):
        return Diagnosis("unchanged", "the weight is as it was")
    if matches(lambda i, z: scale(z) * (i["weight"] + BA(i).T), whole):
        return Diagnosis("base_scaled", "the scaling belongs to the update alone, here it multiplies the weight as well")
    names = [n for n, f in SCALINGS.items() if n != "alpha / r" and matches(lambda i, z, f=f: i["weight"] + f(z) * BA(i).T, whole)]
    if len(names) == 1:
        return Diagnosis("scaling", f"rightly turned, but the factor of B A is {names[0]}; it should be alpha / r")
    names = [n for n, f in SCALINGS.items() if n != "alpha / r" and matches(lambda i, z, f=f: i["weight"] + f(z) * BA(i), [1])]
    if len(names) == 1:
        return Diagnosis("not_transposed_and_scaling", f"B A is (out, in), the Conv1D keeps (in, out); and its factor is {names[0]} instead of alpha / r")
    return None


def _lab_merged(weight, A, B, alpha, r):
    return weight + (alpha / r) * (B @ A).T


MERGED = Exercise(
    id="5.1",
    title="Merge into a Conv1D",
    difficulty=1,
    minutes=5,
    points=2,
    name="merged_conv1d",
    cases=(
        Case("a wide layer, as c_attn is", _merge_probe(WIDE), _merge_judge(WIDE)),
        Case("a square layer, as attn.c_proj is", _merge_probe(SQUARE), _merge_judge(SQUARE)),
        Case("a tall layer, as mlp.c_proj is", _merge_probe(TALL), _merge_judge(TALL)),
    ),
    diagnose=_diagnose_merge,
    hints=(
        "Which shape has weight, and which has B A? Then ask again for a layer whose in equals its out.",
        "Conv1D computes x @ weight, where nn.Linear computes x @ weight.T. So what it keeps is Wᵀ, and it needs ΔWᵀ.",
        "return weight + (alpha / r) * (B @ A).T",
    ),
    read="the table above: stored and (out, in)",
    fallback=lambda: _lab_merged,
)


# ---------------------------------------------------------------------------------------------------------------------
# 5.2  head_columns(weight, part, head, n_head)
#
# The width of a head differs from the number of heads, and no head is asked for whose place two layouts agree on.

HEADS = (dict(d=12, n_head=4, part="k", head=2), dict(d=10, n_head=5, part="v", head=1), dict(d=15, n_head=3, part="q", head=2))
PARTS = ("q", "k", "v")


def _head_probe(z: Mapping):
    def probe(rng):
        s = Script()
        s.input("x", rng.normal(size=(6, z["d"])))
        s.send("columns", s.call(s.input("weight", rng.normal(size=(z["d"], 3 * z["d"]))), z["part"], z["head"], z["n_head"]))
        return s

    return probe


def _head_judge(z: Mapping):
    def judge(inputs, answers):
        d, width = z["d"], z["d"] // z["n_head"]
        call = f'head_columns(weight, "{z["part"]}", {z["head"]}, {z["n_head"]})'
        wrong = compare(answers["columns"], np.ones((d, width)), what=call, rtol=math.inf)
        if wrong:
            return wrong
        # The whole layer first, then cut what comes out, as GPT-2 does.
        part = np.split(inputs["x"] @ inputs["weight"], 3, axis=1)[PARTS.index(z["part"])]
        expected = part.reshape(len(part), z["n_head"], width)[:, z["head"]]
        return compare(inputs["x"] @ answers["columns"], expected, what=f"x @ {call}", rtol=RTOL)

    return judge


_HEAD_MISTAKES = {
    "head_by_head": (
        "that is the layout of models which keep q, k, v of one head together (head by head); GPT-2 keeps all of q, then all of k, then all of v",
        lambda W, p, h, n, w: W[:, (3 * h + p) * w : (3 * h + p + 1) * w],
    ),
    "part_ignored": ("you begin at column 0 for every part: q is first, k begins at d, v at 2 d", lambda W, p, h, n, w: W[:, h * w : (h + 1) * w]),
    "head_ignored": ("that is the whole part, all its heads; a head has d / n_head of these columns", lambda W, p, h, n, w: W[:, p * n * w : (p + 1) * n * w]),
    "first_head": ("that is head 0, whichever was asked for", lambda W, p, h, n, w: W[:, p * n * w : p * n * w + w]),
    "strided": (
        "you take every n_head-th column; the columns of a head stand side by side",
        lambda W, p, h, n, w: W[:, p * n * w : (p + 1) * n * w][:, h::n],
    ),
    "width_is_n_head": (
        "these are n_head columns; a head is d / n_head wide",
        lambda W, p, h, n, w: W[:, p * n * w + h * n : p * n * w + (h + 1) * n],
    ),
    "start_counts_n_head": (
        "the start is wrong: head h begins h · d / n_head after its part, not h · n_head",
        lambda W, p, h, n, w: W[:, p * n * w + h * n : p * n * w + h * n + w],
    ),
    "heads_from_1": ("you count heads from 1; the first is head 0", lambda W, p, h, n, w: W[:, p * n * w + (h - 1) * w : p * n * w + h * w]),
    "next_head": ("this is the head after the one asked for", lambda W, p, h, n, w: W[:, p * n * w + (h + 1) * w : p * n * w + (h + 2) * w]),
    "to_the_end": ("the slice has a start and no end: a head is d / n_head columns", lambda W, p, h, n, w: W[:, p * n * w + h * w :]),
    "rows": ("these are rows; in a Conv1D rows belong to inputs, columns to outputs", lambda W, p, h, n, w: W[h * w : (h + 1) * w]),
    "rows_past_the_end": (
        "these are rows, and there are only d of them; in a Conv1D the outputs are the columns",
        lambda W, p, h, n, w: W[p * n * w + h * w : p * n * w + (h + 1) * w],
    ),
    "as_linear": (
        "this is the transpose, as an nn.Linear would keep it; asked are columns of weight, of shape (d, d / n_head)",
        lambda W, p, h, n, w: W[:, p * n * w + h * w : p * n * w + (h + 1) * w].T,
    ),
    "reshaped_rows": (
        "you reshape weight itself to (3, n_head, ..., d), as if it were (3 d, d): that mixes rows and columns. Transpose first, or cut columns",
        lambda W, p, h, n, w: W.reshape(3, n, w, n * w)[p, h],
    ),
    "reshaped_rows_turned": (
        "you reshape weight itself to (3, n_head, ..., d), as if it were (3 d, d): that mixes rows and columns. Transpose first, or cut columns",
        lambda W, p, h, n, w: W.reshape(3, n, w, n * w)[p, h].T,
    ),
    "order_kqv": ("the order is q, k, v", lambda W, p, h, n, w: W[:, (1, 0, 2)[p] * n * w + h * w :][:, :w]),
    "order_vkq": ("the order is q, k, v", lambda W, p, h, n, w: W[:, (2, 1, 0)[p] * n * w + h * w :][:, :w]),
    "d_is_the_width": (
        "d is the number of rows of weight, weight.shape[0]; it has 3 d columns",
        lambda W, p, h, n, w: W[:, p * 3 * n * w + h * 3 * w : p * 3 * n * w + (h + 1) * 3 * w],
    ),
    "one_column_short": (
        "the last column is missing: the end of a slice is not part of it",
        lambda W, p, h, n, w: W[:, p * n * w + h * w : p * n * w + (h + 1) * w - 1],
    ),
    "interleaved": ("here q, k and v alternate column by column; each is one block of d columns", lambda W, p, h, n, w: W[:, p::3][:, h * w : (h + 1) * w]),
    "part_begins_at_a_head": (
        "k begins at column d, after all heads of q; you begin it after one head",
        lambda W, p, h, n, w: W[:, (p + h) * w : (p + h + 1) * w],
    ),
    "rows_of_the_part": (
        "you cut the right part, but its rows into heads: rows belong to inputs, a head is a block of columns",
        lambda W, p, h, n, w: W[h * w : (h + 1) * w, p * n * w : (p + 1) * n * w],
    ),
    "numbers_of_columns": (
        "these are the numbers of the columns; asked are the columns themselves",
        lambda W, p, h, n, w: np.arange(p * n * w + h * w, p * n * w + (h + 1) * w),
    ),
    "width_of_thirds": (
        "you divide the whole width, 3 d, by n_head: a head of one part is d / n_head wide",
        lambda W, p, h, n, w: W[:, p * n * w + 3 * h * w : p * n * w + 3 * (h + 1) * w],
    ),
    "all_three": ("these are q, k and v of the head together", lambda W, p, h, n, w: W[:, 3 * h * w : 3 * (h + 1) * w]),
}
_SAME_MISTAKE = {"reshaped_rows_turned": "reshaped_rows", "rows_past_the_end": "rows", "rows_of_the_part": "rows", "order_kqv": "order", "order_vkq": "order"}


def _diagnose_head(evidence: list[Evidence]) -> Diagnosis | None:
    found = [e.answers.get("columns") for e in evidence]
    if any(not isinstance(value, np.ndarray) for value in found):
        return None
    matching = []
    for key, (_, take) in _HEAD_MISTAKES.items():
        values = [take(e.inputs["weight"], PARTS.index(z["part"]), z["head"], z["n_head"], z["d"] // z["n_head"]) for e, z in zip(evidence, HEADS, strict=True)]
        if all(f.shape == v.shape and np.allclose(f, v, rtol=RTOL, atol=0) for f, v in zip(found, values, strict=True)):
            matching.append(key)
    names = {_SAME_MISTAKE.get(key, key) for key in matching}
    if len(names) != 1:  # none, or two that give the same numbers
        return None
    return Diagnosis(names.pop(), _HEAD_MISTAKES[matching[0]][0])


def _lab_head_columns(weight, part, head, n_head):
    d = weight.shape[0]
    start = "qkv".index(part) * d + head * (d // n_head)
    return weight[:, start : start + d // n_head]


HEAD = Exercise(
    id="5.2",
    title="Find a head",
    difficulty=2,
    minutes=6,
    points=3,
    name="head_columns",
    cases=tuple(Case(f"{z['part']} of head {z['head']}, of {z['n_head']} in {z['d']} channels", _head_probe(z), _head_judge(z)) for z in HEADS),
    diagnose=_diagnose_head,
    hints=(
        "How many columns has weight, how many of them are q, and how many of those belong to one head?",
        "k begins at column d, v at 2 d. In each part head 0 comes first, with d // n_head columns, then head 1 ...",
        'start = "qkv".index(part) * d + head * (d // n_head), with d = weight.shape[0]; return weight[:, start : start + d // n_head]',
    ),
    read="the picture of the fused matrix above",
    fallback=lambda: _lab_head_columns,
)


# ---------------------------------------------------------------------------------------------------------------------
# 5.3  attention_outputs(blocks): target_modules for attn.c_proj of these blocks, and nothing else

BLOCKS = 12  # so that 1 is the beginning of 10 and of 11
_INSIDE = ("", ".ln_1", ".attn", ".attn.c_attn", ".attn.c_proj", ".attn.attn_dropout", ".attn.resid_dropout", ".ln_2", ".mlp", ".mlp.c_fc", ".mlp.c_proj",
           ".mlp.act", ".mlp.dropout")  # fmt: skip
MODULES = tuple(
    ["transformer", "transformer.wte", "transformer.wpe", "transformer.drop", "transformer.h"]
    + [f"transformer.h.{b}{part}" for b in range(BLOCKS) for part in _INSIDE]
    + ["transformer.ln_f", "lm_head"]
)


def _target_probe(draw):
    def probe(rng):
        s, blocks = Script(), draw(rng)
        s.input("blocks", np.array(blocks))
        s.send("targets", s.call(list(blocks)))
        return s

    return probe


_MATCHING = """
import json, re, sys
pattern, names = json.load(sys.stdin)
print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))
"""


def _quick(pattern: str) -> bool:
    return len(re.findall(r"[*+{]", pattern)) <= 4 and not re.search(r"\)[*+{]", pattern)


def _full_matches(pattern: str) -> list[str] | None:
    """The modules that a regular expression matches whole; None where that takes for ever. Raises re.error."""
    compiled = re.compile(pattern)
    if _quick(pattern):
        return [name for name in MODULES if compiled.fullmatch(name)]
    # Some patterns take longer than the age of the universe, and Python can't be interrupted in one: these are asked in another process.
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHING], input=json.dumps([pattern, MODULES]), capture_output=True, text=True, timeout=10, check=True
        )
    except subprocess.SubprocessError:
        return None
    return json.loads(run.stdout)


def targets_hit(value) -> list[str] | str:
    """The oracle, peft's rules: a text is a regular expression for a whole name; entries of a list are names, or their ends after a dot.

    A text that says what is wrong with the value, where something is.
    """
    if isinstance(value, str):
        try:
            hit = _full_matches(value)
        except (re.error, RecursionError, OverflowError) as error:
            return f"{value!r} is not a regular expression: {error}"
        return f"matching {value[:60]!r} takes too long" if hit is None else hit
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return [name for name in MODULES if any(name == entry or name.endswith("." + entry) for entry in value)]
    found = "nothing" if value is None else f"a {type(value).__name__}"
    return f"target_modules is a text, or a list of texts; found {found}"


def _wanted(inputs) -> list[str]:
    return [f"transformer.h.{b}.attn.c_proj" for b in inputs["blocks"].tolist()]


def _target_judge(inputs, answers):
    value, wanted = answers["targets"], _wanted(inputs)
    hit = targets_hit(value)
    if isinstance(hit, str):
        return hit
    blocks = inputs["blocks"].tolist()
    missed, extra = [n for n in wanted if n not in hit], [n for n in hit if n not in wanted]
    if missed and not hit:
        return f"for blocks {blocks}, {_short(value)} matches nothing"
    if missed:
        return f"for blocks {blocks}, {_short(value)} misses {_some(missed)}" + (f", and matches {_some(extra)}" if extra else "")
    return f"for blocks {blocks}, {_short(value)} also matches {_some(extra)}" if extra else None


def _alternatives(pattern: str) -> list[str]:
    """The pieces between those | that stand outside parentheses and brackets."""
    pieces, depth = [""], 0
    for letter in pattern:
        depth += (letter in "([") - (letter in ")]")
        if letter == "|" and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces


def _short(value) -> str:
    return repr(value) if len(repr(value)) <= 70 else repr(value)[:67] + "..."


def _some(names) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _diagnose_targets(evidence: list[Evidence]) -> Diagnosis | None:
    every, one, two = evidence
    values = [e.answers.get("targets") for e in evidence]
    hits = [targets_hit(value) for value in values]
    if any(isinstance(value, str) and re.search(r"\[\d+-\d\d", value) for value in values):
        return Diagnosis("character_class", "[…] is one character out of several, and 0-11 in it means 0 to 1, and 1. Numbers are told apart by (2|11)")
    if any(isinstance(hit, str) for hit in hits):
        return None
    wanted = [_wanted(e.inputs) for e in evidence]
    if not hits[0] and isinstance(values[0], list):
        if any(re.search(r"\[\d+(, \d+)+\]", entry) for entry in values[0]):
            return Diagnosis("list_in_a_name", "the whole list of blocks stands in one name; make an entry for each of them: [... for b in blocks]")
        if any(re.search(r"h\[\d+\]", entry) for entry in values[0]):
            return Diagnosis("brackets_in_a_name", "module names write the number after a dot, h.3, where Python writes h[3]")
        if any(re.match(r"\.\w", entry) for entry in values[0]):
            return Diagnosis("leading_dot", "an entry is what comes after the dot, without it")
        if any(re.search(r"[*\\^$+|(\[]", entry) for entry in values[0]):
            return Diagnosis("pattern_in_a_list", "entries of a list are names, or their ends after a dot; only a single text is a regular expression")
        if any(entry.startswith("lora_") or entry.endswith(".weight") for entry in values[0]):
            return Diagnosis("names_parameters", "target_modules names modules; .weight is a parameter of one")
    if not hits[0] and not hits[2] and all(isinstance(value, str) for value in values) and "," in values[2]:
        return Diagnosis("commas", "in a regular expression a comma is a letter like any other: part alternatives by |, or give a list of names")
    if all(isinstance(value, str) and _quick(value) for value in values):
        # re.search with an end: what the same pattern would match at the end of a name.
        if [[n for n in MODULES if re.search(f"(?:{value})$", n)] for value in values] == wanted:
            return Diagnosis("not_the_whole_name", "a text must match the whole name, from its first letter to its last; yours matches the end of it alone")
        if not any(hits) and all(any(re.search(value, n) for n in MODULES) for value in values) and "|" not in values[0]:
            return Diagnosis("not_the_whole_name", "a text must match the whole name, from its first letter to its last; yours matches a piece of it")
    if isinstance(values[2], str) and any("c_proj" not in piece for piece in _alternatives(values[2])[1:] + _alternatives(values[2])[:-1]):
        return Diagnosis(
            "or_without_parentheses",
            "an | outside parentheses parts the whole pattern: left of it is one alternative, right of it another. Put the numbers into (…|…)",
        )
    # What each case hits, in words: which projections, and of which blocks.
    kinds = [{n.split(".", 3)[3] if n.count(".") > 2 else n for n in hit} for hit in hits]
    numbers = [sorted({int(n.split(".")[2]) for n in hit if n.startswith("transformer.h.") and n.count(".") >= 2}) for hit in hits]
    asked = [e.inputs["blocks"].tolist() for e in evidence]
    problems = []
    mlp = all("mlp.c_proj" in kind for kind in kinds)
    if mlp and all(kind == {"attn.c_proj", "mlp.c_proj"} for kind in kinds):
        problems.append(("mlp_too", "every block has two c_proj, attn.c_proj and mlp.c_proj, and this matches both"))
    elif all(kind == {"mlp.c_proj"} for kind in kinds):
        problems.append(("mlp_instead", "this is the MLP's c_proj; asked is attn.c_proj"))
    elif all("attn.c_attn" in kind and "attn.c_proj" in kind for kind in kinds):
        problems.append(("more_of_attn", "this matches more of the attention than its output, attn.c_proj"))
    elif all(kind == {"attn"} for kind in kinds):
        problems.append(("whole_attention", "attn is the module around four others; asked is its c_proj"))
    elif all(kind == {"attn.c_attn"} for kind in kinds):
        problems.append(("c_attn_instead", "c_attn is q, k, v; the output of attention is attn.c_proj"))
    elif not all(kind == {"attn.c_proj"} for kind in kinds):
        return None
    if all(n == list(range(BLOCKS)) for n in numbers):
        problems.append(("blocks_ignored", "it matches in every block, whichever are asked for"))
    elif all(n == list(range(10)) for n in numbers):
        problems.append(("one_digit", "\\d is one digit, so 10 and 11 are missing; and the numbers that were asked for play no part"))
    elif set(numbers[1]) == {1, 10, 11} and isinstance(values[1], str):
        problems.append(("digits_after", "block 1 is also the beginning of 10 and 11: after the number a dot must follow, \\."))
    elif isinstance(values[2], str) and re.search(r"\[[^\]]*\d\d?[^\]]*\]", values[2]) and set(numbers[2]) != set(asked[2]):
        problems.append(
            ("character_class", f"[…] is one character out of several, so a number of two digits is no member: it matches in blocks {numbers[2]}. Use (2|11)")
        )
    elif all(n == [b - 1 for b in blocks if b > 0] for n, blocks in zip(numbers, asked, strict=True)):
        problems.append(("off_by_one", "the names count blocks from 0, as blocks does"))
    elif all(n == blocks[:1] for n, blocks in zip(numbers, asked, strict=True)):
        problems.append(("first_block_alone", "it matches in the first of the blocks alone"))
    elif all(n == blocks[-1:] for n, blocks in zip(numbers, asked, strict=True)):
        problems.append(("last_block_alone", "it matches in the last of the blocks alone"))
    elif all(n == list(range(min(blocks), max(blocks) + 1)) for n, blocks in zip(numbers, asked, strict=True)) and numbers[2] != asked[2]:
        problems.append(("a_range", "it matches in all blocks between the first and the last; asked are these alone"))
    elif numbers != asked:
        return None
    if not problems:
        return None
    return Diagnosis("_and_".join(key for key, _ in problems), "; and ".join(text for _, text in problems))


def _lab_targets(blocks):
    return rf"transformer\.h\.({'|'.join(map(str, blocks))})\.attn\.c_proj"


TARGETS = Exercise(
    id="5.3",
    title="Hit one c_proj and not the other",
    difficulty=2,
    minutes=6,
    points=3,
    name="attention_outputs",
    cases=(
        Case("all twelve blocks", _target_probe(lambda rng: list(range(BLOCKS))), _target_judge),
        Case("block 1 alone", _target_probe(lambda rng: [1]), _target_judge),
        Case("two blocks", _target_probe(lambda rng: [int(rng.integers(2, 9)), 11]), _target_judge),
    ),
    diagnose=_diagnose_targets,
    hints=(
        "Print the names: what stands before c_proj in the one you want, and what in the other? What stands after the block's number?",
        "A text is a regular expression for the WHOLE name, r'transformer\\.h\\.…'; alternatives go into (…|…). "
        "Or a list, whose entries are ends of names after a dot.",
        'return [f"h.{b}.attn.c_proj" for b in blocks], or the same names as one pattern, with "|".join(map(str, blocks)) in parentheses',
    ),
    read="the rules under target_modules in help(lora_lab.apply_lora)",
    fallback=lambda: _lab_targets,
)


# ---------------------------------------------------------------------------------------------------------------------
# 5.4  as_one_pair(A_q, B_q, A_v, B_v, alpha): the same update as one A, one B and one alpha

PAIRS = (dict(d=7, r=3, alpha=5.0), dict(d=9, r=2, alpha=11.0))


def _pair_probe(z: Mapping):
    def probe(rng):
        s, d, r = Script(), z["d"], z["r"]
        factors = [
            s.input(name, rng.normal(size=shape)) for name, shape in (("A_q", (r, d)), ("B_q", (d, r)), ("A_v", (r, d)), ("B_v", (d, r)))
        ]
        result = s.call(*factors, z["alpha"])
        for k, name in enumerate(("A", "B", "alpha")):
            s.send(name, s.get(result, str(k)))
        return s

    return probe


def stacked_update(inputs, z: Mapping) -> np.ndarray:
    """The oracle: what each third of c_attn gets, (3 d, d), row by row."""
    scale, blank = z["alpha"] / z["r"], np.zeros((z["d"], z["d"]))
    q, v = (scale * np.einsum("or,ri->oi", inputs[f"B_{p}"], inputs[f"A_{p}"]) for p in "qv")
    return np.stack([q, blank, v]).reshape(3 * z["d"], z["d"])


def _pair_shapes(z: Mapping):
    def judge(inputs, answers):
        for name, shape in (("A", (2 * z["r"], z["d"])), ("B", (3 * z["d"], 2 * z["r"])), ("alpha", ())):
            found = answers[name]
            found = found.reshape(()) if name == "alpha" and isinstance(found, np.ndarray) and found.size == 1 else found
            wrong = compare(found, np.ones(shape), what=name, rtol=math.inf)
            if wrong:
                return wrong
        return None

    return judge


def _pair_judge(z: Mapping, *parts: str):
    shapes = _pair_shapes(z)

    def judge(inputs, answers):
        wrong = shapes(inputs, answers)
        if wrong:
            return wrong
        d, expected = z["d"], stacked_update(inputs, z)
        # An adapter of rank 2 r is scaled by its own alpha / its own rank.
        found = float(answers["alpha"]) / (2 * z["r"]) * (answers["B"] @ answers["A"])
        for part in parts:
            rows = slice(PARTS.index(part) * d, (PARTS.index(part) + 1) * d)
            what = f"the rows of {part} in (alpha / {2 * z['r']}) B A"
            wrong = compare(found[rows], expected[rows], what=what, rtol=RTOL, atol=1e-9)  # atol: k's rows are zero
            if wrong:
                return wrong
        return None

    return judge


def _diagnose_pair(evidence: list[Evidence]) -> Diagnosis | None:
    runs = [(e.answers, e.inputs, z) for e, z in ((evidence[0], PAIRS[0]), (evidence[-1], PAIRS[1]))]
    shapes = []
    for answers, _, _ in runs:
        A, B = answers.get("A"), answers.get("B")
        if not isinstance(A, np.ndarray) or not isinstance(B, np.ndarray) or A.ndim != 2 or B.ndim != 2:
            return None
        shapes.append((A.shape, B.shape))

    def all_shapes(a, b):
        return all(s == (a(z["d"], z["r"]), b(z["d"], z["r"])) for s, (_, _, z) in zip(shapes, runs, strict=True))

    if all_shapes(lambda d, r: (3 * d, 2 * r), lambda d, r: (2 * r, d)):
        return Diagnosis("order", "the factors come back as B, A; asked is A, B, alpha")
    if all_shapes(lambda d, r: (r, 2 * d), lambda d, r: (3 * d, 2 * r)) or all_shapes(lambda d, r: (r, 2 * d), lambda d, r: (3 * d, r)):
        return Diagnosis("A_side_by_side", "A_q and A_v read the same x, so they stand one above the other, (2 r, d): side by side they read 2 d inputs")
    if all_shapes(lambda d, r: (d, 2 * r), lambda d, r: (2 * r, 3 * d)):
        return Diagnosis("transposed", "both are transposed: A takes x in, (2 r, d), B gives q, k and v, (3 d, 2 r)")
    if all_shapes(lambda d, r: (2 * r, d), lambda d, r: (d, 3 * r)):
        return Diagnosis("B_side_by_side", "q, k and v are three groups of outputs, so their parts of B stand one above the other, 3 d rows")
    if all_shapes(lambda d, r: (2 * r, d), lambda d, r: (2 * d, 2 * r)):
        return Diagnosis("k_left_out", "c_attn has 3 d outputs: k's d rows of B are there, and zero")
    if all_shapes(lambda d, r: (3 * r, d), lambda d, r: (3 * d, 3 * r)):
        return Diagnosis("rank_of_k", "k needs rows in B, because it has outputs; it needs no rank: 2 r rows in A and 2 r columns in B are enough")
    if all_shapes(lambda d, r: (r, d), lambda d, r: (3 * d, r)):
        return Diagnosis("one_A", "one A of r rows makes q and v see the same r numbers of x: rank r. They have an A each: stack both, (2 r, d)")
    if all_shapes(lambda d, r: (2 * r, d), lambda d, r: (3 * d, r)):
        return Diagnosis("B_not_spread", "B has r columns for the 2 r numbers A x: the first r columns are q's, the next r v's; neither sees the other's")
    if not all_shapes(lambda d, r: (2 * r, d), lambda d, r: (3 * d, 2 * r)):
        return None
    alphas = [answers.get("alpha") for answers, _, _ in runs]
    alphas = [a.item() if isinstance(a, np.ndarray) and a.size == 1 else a for a in alphas]
    if any(isinstance(a, bool) or not isinstance(a, (int, float)) for a in alphas):
        return None

    def thirds(answers, z):  # without any scaling: which products stand where
        return (answers["B"] @ answers["A"]).reshape(3, z["d"], z["d"])

    def product(inputs, b, a):
        return inputs[f"B_{b}"] @ inputs[f"A_{a}"]

    layouts = {
        "": lambda i: (product(i, "q", "q"), 0, product(i, "v", "v")),
        "v_in_k": lambda i: (product(i, "q", "q"), product(i, "v", "v"), 0),
        "k_v_q": lambda i: (0, product(i, "q", "q"), product(i, "v", "v")),
        "swapped": lambda i: (product(i, "v", "v"), 0, product(i, "q", "q")),
        "v_reads_A_q": lambda i: (product(i, "q", "q"), 0, product(i, "v", "q")),
        "all_in_q": lambda i: (product(i, "q", "q") + product(i, "v", "v"), 0, 0),
        "wrong_A": lambda i: (product(i, "q", "v"), 0, product(i, "v", "q")),
        "shared": lambda i: (product(i, "q", "q") + product(i, "v", "v"), 0, product(i, "q", "q") + product(i, "v", "v")),
        "crossed": lambda i: (product(i, "q", "q") + product(i, "q", "v"), 0, product(i, "v", "q") + product(i, "v", "v")),
        "k_as_well": lambda i: (product(i, "q", "q"), product(i, "q", "q"), product(i, "v", "v")),
    }
    factors = {"alpha": 1.0, "twice": 2.0, "half": 0.5, "root": math.sqrt(2), "four": 4.0}
    # The scaling may sit in alpha or in a factor: only what they give together counts.
    found = [float(a) / (2 * z["r"]) * thirds(answers, z) for a, (answers, _, z) in zip(alphas, runs, strict=True)]
    hits = []
    for name, layout in layouts.items():
        for factor, times in {**factors, **dict.fromkeys(("over_r", "again", "again_2", "times_r", "times_2r"))}.items():
            values = []
            for _, inputs, z in runs:
                other = {"over_r": 1 / z["r"], "again": z["alpha"] / z["r"], "times_r": z["r"]}
                other |= {"again_2": 2 * other["again"], "times_2r": 2 * other["times_r"]}
                scale = (other[factor] if times is None else times) * z["alpha"] / (2 * z["r"])
                values.append(np.stack([np.broadcast_to(p, (z["d"], z["d"])) for p in layout(inputs)]) * scale)
            if all(compare(f, v, rtol=RTOL) is None for f, v in zip(found, values, strict=True)):
                hits.append((name, factor))
    if len(hits) != 1:
        return None
    name, factor = hits[0]
    texts = {
        "v_in_k": ("v_in_k", "v's rows stand where k's belong: the order is q, k, v"),
        "k_v_q": ("parts_shifted", "the rows stand one part too late: the order is q, k, v, and k is the one that stays zero"),
        "swapped": ("q_and_v_swapped", "q's update stands in v's rows and v's in q's"),
        "v_reads_A_q": ("v_reads_A_q", "v's r columns of B stand where the numbers of A_q arrive; those of A_v are the last r"),
        "all_in_q": ("all_in_q", "B_v stands beside B_q, in q's rows; v's rows are the last d"),
        "wrong_A": ("wrong_A", "q is given A_v, and v A_q: stack A and the columns of B in the same order"),
        "shared": ("shared", "q and v both get the sum of the two updates"),
        "crossed": ("crossed", "q's rows of B also take what A_v gives, and v's rows what A_q gives: there must be zeros, in B (d, r) each"),
        "k_as_well": ("k_as_well", "k's rows are not zero"),
    }
    scales = {
        "alpha": ("alpha_kept", "an adapter of rank 2 r divides its alpha by 2 r, so with the old alpha the update is half as large"),
        "half": ("alpha_halved", "alpha is divided by 2 r now, instead of r: it must grow, not shrink"),
        "root": ("alpha_root", "√2 is right for rsLoRA, which divides by √r; here alpha is divided by the rank itself"),
        "four": ("alpha_four", "the rank doubles once: alpha, too"),
        "again": ("scaled_twice", "alpha / r is in the factors already, and the new adapter multiplies by its own alpha / 2 r once more"),
        "times_r": ("alpha_times_r", "alpha is divided by 2 r where it was divided by r: twice the alpha makes up for that"),
        "over_r": ("scaling_given", "this is a scaling; asked is an alpha, which is still divided by the rank, 2 r"),
    }
    factor = {"again_2": "again", "times_2r": "times_r"}.get(factor, factor)
    problems = ([texts[name]] if name else []) + ([scales[factor]] if factor != "twice" else [])
    return Diagnosis("_and_".join(key for key, _ in problems), "; and ".join(text for _, text in problems)) if problems else None


def _lab_pair(A_q, B_q, A_v, B_v, alpha):
    d, r = B_q.shape
    B = torch.cat([torch.cat([B_q, B_q.new_zeros(d, r)], 1), B_q.new_zeros(d, 2 * r), torch.cat([B_v.new_zeros(d, r), B_v], 1)])
    return torch.cat([A_q, A_v]), B, 2 * alpha


PAIR = Exercise(
    id="5.4",
    title="Two adapters as one",
    difficulty=3,
    minutes=8,
    points=4,
    name="as_one_pair",
    cases=(
        Case("A is (2r, d), B is (3d, 2r), alpha a number", _pair_probe(PAIRS[0]), _pair_shapes(PAIRS[0])),
        Case("k stays as it is", _pair_probe(PAIRS[0]), _pair_judge(PAIRS[0], "k")),
        Case("q gets the update of q, at its size", _pair_probe(PAIRS[0]), _pair_judge(PAIRS[0], "q")),
        Case("v gets the update of v, at its size", _pair_probe(PAIRS[0]), _pair_judge(PAIRS[0], "v")),
        Case("also for another width, r and alpha", _pair_probe(PAIRS[1]), _pair_judge(PAIRS[1], "q", "k", "v")),
    ),
    diagnose=_diagnose_pair,
    hints=(
        "Draw B A as blocks: A has two blocks above one another, B three rows of blocks (q, k, v) and two columns (A_q's r numbers, A_v's).",
        "B = [[B_q, 0], [0, 0], [0, B_v]]. And the new adapter divides its alpha by its own rank, which is 2 r.",
        "A = torch.cat([A_q, A_v]); B = A.new_zeros(3 * d, 2 * r); B[:d, :r] = B_q; B[2 * d :, r:] = B_v; return A, B, 2 * alpha",
    ),
    read="lora_lab.layers.LoRAFusedLinear, its first lines and full_B",
    fallback=lambda: _lab_pair,
)


# ---------------------------------------------------------------------------------------------------------------------
# 5.5  largest_rank(budget, shapes, blocks)

# The paper's 18 M on GPT-3: W_q alone gets 8, all four 2 (table 5). Then shapes that are not square, and a budget that leaves a rest.
BUDGETS = (
    ("the paper's budget on W_q of GPT-3", dict(budget=18_874_368, shapes=[(12288, 12288)], blocks=96)),
    ("the same on all four matrices", dict(budget=18_874_368, shapes=[(12288, 12288)] * 4, blocks=96)),
    ("an MLP, with a rest left over", dict(budget=2_000_000, shapes=[(192, 768), (768, 192)], blocks=7)),
    ("unequal matrices together, c_attn as one", dict(budget=150_000, shapes=[(192, 576), (192, 192), (192, 768)], blocks=5)),
    ("too little for rank 1", dict(budget=9_000, shapes=[(192, 576), (192, 192)], blocks=9)),
)


def _budget_probe(z: Mapping):
    def probe(rng):
        s = Script()
        s.send("r", s.call(z["budget"], [tuple(shape) for shape in z["shapes"]], z["blocks"]))
        return s

    return probe


def affordable_rank(budget: int, shapes, blocks: int) -> int:
    """The oracle: add one rank after the other, counting the rows of A and columns of B that it takes, until the budget is spent."""
    one = sum(np.empty((1, i)).size + np.empty((o, 1)).size for _ in range(blocks) for i, o in shapes)
    r = 0
    while (r + 1) * one <= budget:
        r += 1
    return r


def _budget_judge(z: Mapping):
    def judge(inputs, answers):
        found, expected = answers["r"], affordable_rank(**z)
        shapes = f"{z['shapes'][:2]}{' ...' if len(z['shapes']) > 2 else ''}"
        what = f"largest_rank({z['budget']:,}, {shapes}, {z['blocks']})"
        if isinstance(found, np.ndarray) and found.size == 1:
            found = found.item()
        if isinstance(found, float) and found == expected:
            return f"{what} is {found}, a float; a rank is a whole number"
        return compare(found, expected, what=what)

    return judge


def _numbers(evidence) -> list | None:
    found = [e.answers.get("r") for e in evidence]
    found = [f.item() if isinstance(f, np.ndarray) and f.size == 1 else f for f in found]
    return None if any(isinstance(f, bool) or not isinstance(f, (int, float)) for f in found) else found


def _diagnose_budget(evidence: list[Evidence]) -> Diagnosis | None:
    found = _numbers(evidence)
    if found is None:
        return None
    sizes = [z for _, z in BUDGETS]
    per_rank = {
        "": lambda s, n: n * sum(i + o for i, o in s),
        "product": lambda s, n: n * sum(i * o for i, o in s),
        "A_alone": lambda s, n: n * sum(i for i, _ in s),
        "B_alone": lambda s, n: n * sum(o for _, o in s),
        "twice_in": lambda s, n: n * sum(2 * i for i, _ in s),
        "twice_out": lambda s, n: n * sum(2 * o for _, o in s),
        "blocks_forgotten": lambda s, n: sum(i + o for i, o in s),
        "first_shape_alone": lambda s, n: n * sum(s[0]),
        "first_for_all": lambda s, n: n * len(s) * sum(s[0]),
        "last_shape_alone": lambda s, n: n * sum(s[-1]),
        "doubled": lambda s, n: 2 * n * sum(i + o for i, o in s),
        "shared_among_blocks_twice": lambda s, n: n * n * sum(i + o for i, o in s),
    }
    texts = {
        "product": "in · out are the numbers of the full matrix; a rank costs one row of A and one column of B, in + out",
        "A_alone": "that counts A alone; each rank also has a column of B, out numbers",
        "B_alone": "that counts B alone; each rank also has a row of A, in numbers",
        "twice_in": "2 · in is right for a square matrix alone; a rank costs in + out",
        "twice_out": "2 · out is right for a square matrix alone; a rank costs in + out",
        "blocks_forgotten": "every block has these matrices: multiply by blocks",
        "first_shape_alone": "only the first matrix is counted; a block has all of shapes",
        "first_for_all": "you take every matrix to be as large as the first",
        "last_shape_alone": "only the last matrix is counted; a block has all of shapes",
        "doubled": "in + out counts A and B already; no 2 is needed",
        "shared_among_blocks_twice": "blocks enters twice",
    }
    roundings = {
        "": (math.floor, ""),
        "up": (math.ceil, "rounded up: that is more than the budget"),
        "nearest": (round, "rounded to the nearest: that may be more than the budget"),
        "at_least_1": (lambda x: max(1, math.floor(x)), "at least 1 is more than the budget holds: where not even rank 1 fits, the answer is 0"),
        "not_rounded": (float, "a rank is a whole number: round down"),
    }
    hits = []
    for key, count in per_rank.items():
        for way, (rounding, _) in roundings.items():
            values = [rounding(z["budget"] / count(z["shapes"], z["blocks"])) for z in sizes]
            if all(abs(f - v) <= 1e-9 * max(1, abs(v)) for f, v in zip(found, values, strict=True)):
                hits.append((key, way))
    right = [affordable_rank(**z) for z in sizes]
    exact = [z["budget"] == r * per_rank[""](z["shapes"], z["blocks"]) for z, r in zip(sizes, right, strict=True)]
    if found == [r + 1 for r in right]:
        return Diagnosis("one_too_many", "this is the first rank that is too dear; asked is the last that is not")
    if found == [r - spent for r, spent in zip(right, exact, strict=True)]:
        return Diagnosis("budget_not_spent", "a budget may be spent to the last parameter: at most means <=")
    alone = [[z["budget"] // (z["blocks"] * (i + o)) for i, o in z["shapes"]] for z in sizes]
    if found in ([min(ranks) for ranks in alone], [max(ranks) for ranks in alone], [sum(ranks) for ranks in alone]):
        return Diagnosis("whole_budget_for_each", "every matrix gets the whole budget; all of them share one")
    each = [math.floor(min(z["budget"] / len(z["shapes"]) / z["blocks"] / (i + o) for i, o in z["shapes"])) for z in sizes]
    if not hits and found == each:
        return Diagnosis("split_first", "you give each matrix the same share of the budget; asked is the same rank, and a small matrix needs less for it")
    # Where the numbers don't say how they were rounded, they were rounded as they should be; two counts that fit alike explain nothing.
    hits = [hit for hit in hits if not hit[0]] or hits
    if len({key for key, _ in hits}) != 1:
        return None
    hits = [hit for hit in hits if not hit[1]] or hits
    if len(hits) != 1:
        return None
    key, way = hits[0]
    if not key and not way:  # the numbers are right, and still it failed: a float
        return Diagnosis("a_float", "the value is right; a rank is a whole number, so give an int: // instead of /, or int(...)")
    parts = [(k, t) for k, t in ((key, texts.get(key, "")), (way, roundings[way][1])) if k]
    return Diagnosis("_and_".join(k for k, _ in parts), "; and ".join(t for _, t in parts))


BUDGET = Exercise(
    id="5.5",
    title="Spend a budget",
    difficulty=1,
    minutes=4,
    points=2,
    name="largest_rank",
    cases=tuple(Case(title, _budget_probe(z), _budget_judge(z)) for title, z in BUDGETS),
    diagnose=_diagnose_budget,
    hints=(
        "What does one more rank cost in one matrix? In one block? In all blocks?",
        "One rank is one row of A (in numbers) and one column of B (out numbers). Round the quotient down.",
        "return budget // (blocks * sum(i + o for i, o in shapes))",
    ),
    read="lab 02, prediction 2.B: r (in + out)",
    fallback=lambda: lambda budget, shapes, blocks: budget // (blocks * sum(i + o for i, o in shapes)),
)


LAB = Lab(
    number="5",
    name="05_inside_gpt2",
    title="Inside GPT-2",
    minutes=50,
    core=True,
    objectives=(
        "put an update into GPT-2's Conv1D the right way round, and know where a wrong one stays silent",
        "find q, k, v and every head in one fused matrix, and say what two adapters for it have in common",
        "name exactly the layers you mean, and prove it",
        "compare places and ranks at equal cost, with the spread of seeds beside",
        "read an attention map before and after",
    ),
    needs=("lab 02", "lab 03 for the choice of learning rates", "what attention computes"),
    exercises=(MERGED, HEAD, TARGETS, PAIR, BUDGET),
    predictions=(
        Prediction(
            "5.A",
            "You add ΔW (out, in) to the stored weight and forget to transpose. For c_attn, stored (256, 768), and attn.c_proj, (256, 256). "
            "PyTorch raises an error ...",
            {"a": "for both", "b": "for c_attn alone", "c": "for neither: it broadcasts"},
        ),
        Prediction(
            "5.B",
            "You put LoRA on wte, train, and merge. In this model the head reads the same matrix. Merging changes the model's output ...",
            {"a": "by rounding at most: that is what merging means", "b": "visibly"},
        ),
        Prediction(
            "5.C",
            "r = 4 on all of c_attn, and r = 4 on its q and v: the same number of parameters. Which ΔW (768, 256) has the larger rank?",
            {"a": "all of c_attn", "b": "neither", "c": "q and v"},
        ),
        Prediction(
            "5.D",
            "Seven places, the same number of parameters in each, each with its own best learning rate. Which ends with the lowest loss?",
            {"a": "one attention matrix, at high rank", "b": "two or four attention matrices", "c": "the MLP's two, at low rank"},
        ),
        Prediction(
            "5.E",
            "W_q and W_v, 64 times the parameters: the test loss at r = 64 against r = 1 is ...",
            {"a": "lower by more than the seeds scatter", "b": "the same within that", "c": "higher by more than that"},
        ),
        Prediction(
            "5.F",
            "You adapt W_v alone. W_q and W_k stay bit for bit. The attention weights change ...",
            {"a": "nowhere", "b": "in every block but the first", "c": "in every block"},
        ),
    ),
    questions=(
        Question(
            "5.F1",
            "Defend your targets",
            minutes=10,
            ask="You may train as many parameters of a GPT-2 as this lab's race allowed, once, on a new task. Which modules, written as you would write them "
            "in `target_modules`, at which rank? Defend it against somebody who would put all of it on W_q.",
            rubric=(
                (1, "names places that can be typed in, a rank, and how both make the same number of parameters"),
                (1, "supports the choice with figures of the race at equal cost, with the spread of the seeds"),
                (1, "says what the race does not show, and what to run before it becomes a rule"),
            ),
        ),
    ),
)
