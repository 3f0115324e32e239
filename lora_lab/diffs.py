"""LoRA's variants as diffs: what exactly is another line of code?

    assets/variants/lora.py     LoRA whole, about 30 lines: Layer(W0, r, alpha), start(layer, inputs), optimizer(layer, lr)
    assets/variants/dora.py     the same file with DoRA's change, and so on: each runs as it stands and needs torch alone

    diff("dora")                [(" ", "class Layer(nn.Module):"), ..., ("+", "        self.m = ..."), ...]
    changed("dora")             (added, removed), lines that are not blank
    dora = load("dora")         the file as a module: layer = dora.Layer(W0, r=4, alpha=8); dora.start(layer, inputs)

These files are written to be compared and read. To adapt a model take `zoo.variants`, `zoo.quantised` and `apply_lora`, with
which the tests compare them: there is a bias, other kinds of layers, merging that can be undone, EVA's ranks that differ from
layer to layer, a step on a 4-bit weight that keeps no copy of it for the backward pass.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import ModuleType

FILES = Path(__file__).parent / "assets" / "variants"
PARTS = ("scaling", "training", "start", "layer", "base")


@dataclass(frozen=True)
class Variant:
    """where: the part of LoRA that is changed, one of `PARTS`; idea: in one sentence; arxiv: the paper's number."""

    key: str
    name: str
    where: str
    idea: str
    arxiv: str


LORA = Variant("lora", "LoRA", "layer", "The weight stays as it is, and the product of two thin matrices is learned beside it.", "2106.09685")
VARIANTS = (
    Variant("rslora", "rsLoRA", "scaling", "Divide alpha by √r instead of r, so that a large rank does not make the update small.", "2312.03732"),
    Variant("lora_plus", "LoRA+", "training", "B learns 16 times as fast as A.", "2402.12354"),
    Variant("lora_fa", "LoRA-FA", "training", "A stays as it was drawn: only B is trained, and only A x is kept for the backward pass.", "2308.03303"),
    Variant("pissa", "PiSSA", "start", "Train the strongest directions of the weight itself, and freeze what is left of it.", "2404.02948"),
    Variant("olora", "OLoRA", "start", "As PiSSA, with the first rows and columns of a QR decomposition instead of an SVD.", "2406.01775"),
    Variant("eva", "EVA", "start", "Let A start with the directions in which the layer's inputs vary most.", "2410.07170"),
    Variant("dora", "DoRA", "layer", "Learn how long each row of the weight is apart from where it points.", "2402.09353"),
    Variant("vera", "VeRA", "layer", "All layers share one random A and B; each layer learns two vectors that stretch them.", "2310.11454"),
    Variant("lora_xs", "LoRA-XS", "layer", "Freeze A and B at the weight's strongest directions and learn a small r x r matrix between them.", "2405.17604"),
    Variant("adalora", "AdaLoRA", "layer", "A size for each direction, so that the least useful directions of all layers can be switched off.", "2303.10512"),
    Variant("qlora", "QLoRA", "base", "Keep the frozen weight in 4 bits a number; A and B stay as exact as they were.", "2305.14314"),
)
_BY_KEY = {variant.key: variant for variant in (LORA, *VARIANTS)}


def variant(key: str) -> Variant:
    """What is known of a variant, or of "lora". Raises KeyError with the names there are."""
    if key not in _BY_KEY:
        raise KeyError(f"there is no variant {key!r}; there are {', '.join(_BY_KEY)}")
    return _BY_KEY[key]


def source(key: str) -> str:
    """The text of its file."""
    return (FILES / f"{variant(key).key}.py").read_text(encoding="utf-8")


def load(key: str) -> ModuleType:
    """Its file as a module, with Layer(W0, r, alpha), start(layer, inputs) and optimizer(layer, lr).

    W0 (d_out, d_in), inputs (tokens, d_in); VeRA's Layer takes the matrices that layers share as a fourth argument.
    """
    return importlib.import_module(f"lora_lab.assets.variants.{variant(key).key}")


def equation(key: str) -> str:
    """What it computes, as the first line of its file says it."""
    return ast.get_docstring(ast.parse(source(key))).partition(":  ")[2]


def diff(key: str, whole: bool = False) -> list[tuple[str, str]]:
    """What has to be done to lora.py: (sign, line) with " " for what stays, "-" for what goes, "+" for what comes.

    Shown are the functions in which something changes, whole, with an empty line between two; `whole=True` gives the whole file.
    The first line, a file's own docstring, is left out.
    """
    old, new = (_code(which) for which in ("lora", key))
    lines = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            lines += [(" ", line) for line in old[a:b]]
        else:
            lines += [("-", line) for line in old[a:b]] + [("+", line) for line in new[c:d]]
    if whole:
        return lines
    paragraphs = [list(group) for blank, group in groupby(lines, lambda line: not line[1]) if not blank]
    shown = [paragraph for paragraph in paragraphs if any(sign != " " for sign, _ in paragraph)]
    return [line for paragraph in shown for line in [(" ", ""), *paragraph]][1:]


def changed(key: str) -> tuple[int, int]:
    """(added, removed): how many lines of code differ from lora.py, blank ones not counted."""
    signs = [sign for sign, line in diff(key) if line]
    return signs.count("+"), signs.count("-")


def _code(key: str) -> list[str]:
    """Its lines without the docstring."""
    text = source(key)
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]
