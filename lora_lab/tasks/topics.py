"""Which library does this docstring describe? Real English from packages that are installed anyway, four classes.

Data card. Source: docstrings of public and private functions and classes of scikit-learn, pandas, matplotlib and torch, as
installed (BSD licences; nothing is copied into this repository), read with `ast`, never imported. A text is a docstring's prose up to its
first section, at most 40 words. Taken out: code and roles between backticks, everything that looks like an identifier (`_`, `.`, digits,
capitals inside a word), names and nicknames of these libraries,
of numpy and of scipy. Texts that stand in two libraries, and those under 10 words, are left out.
The split goes by file: neighbours share phrases. Another version of a package gives other texts, and figures that differ a little.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
from functools import cache
from pathlib import Path

from ..comparing import Task
from .texts import Texts, text_task

LIBRARIES = {"sklearn": "scikit-learn", "pandas": "pandas", "matplotlib": "matplotlib", "torch": "torch"}
NAMES = set("numpy np scipy sp sklearn scikit learn pandas pd matplotlib mpl pyplot plt torch pytorch ndarray".split())
SKIPPED = {"tests", "test", "testing", "externals", "_vendor", "vendored", "_external", "_array_api", "sample_data"}
SECTION = re.compile(r"(Args?|Arguments|Parameters?|Returns?|Shape|Examples?|Inputs?|Attributes|Notes?|Warnings?|Raises)\s*:")


def prose(docstring: str, most: int = 40) -> str:
    """The docstring's first paragraphs as plain lower-case words, without what gives the library away; "" if it is no prose."""
    kept = []
    for line in docstring.strip().splitlines():
        line = line.strip()
        if re.fullmatch(r"[-=~^*]{3,}", line):  # the underline of a section's title, which is the line above
            kept = kept[:-1]
            break
        if SECTION.match(line) or line.startswith((">>>", "..")):
            break
        kept.append(line)
    text = re.sub(r":\w+:`[^`]*`|``[^`]*``|`[^`]*`|https?://\S+|\([^()]*\)", " ", " ".join(kept))
    words = []
    for word in text.split():
        bare = word.strip(",.;:!?\"'()[]{}*")
        if not re.fullmatch(r"[A-Za-z]?[a-z'-]+|[AI]", bare) or bare.lower() in NAMES:
            continue
        words.append(bare.lower() + ("." if word.endswith(".") else ""))
    return " ".join(words[:most]) if len(words) >= 10 else ""


@cache
def docstrings(each: int = 160, per_file: int = 5) -> Texts:
    """Up to `each` texts of every library, at most `per_file` of a file, always the same ones for the same versions of the packages."""
    found: dict[str, list[tuple[str, str]]] = {}
    for module, name in LIBRARIES.items():
        root = Path(importlib.util.find_spec(module).origin).parent
        # Enormous files would cost most of the time and give five texts like any other.
        files = [p for p in sorted(root.rglob("*.py")) if not SKIPPED & set(p.relative_to(root).parts) and 2_000 < p.stat().st_size < 50_000]
        random.Random(0).shuffle(files)
        rows: list[tuple[str, str]] = []
        for path in files:
            rows += [(text, f"{module}/{path.relative_to(root)}") for text in _of_file(path, per_file)]
            if len(rows) >= each:
                break
        found[name] = rows[:each]
    where: dict[str, set[str]] = {}
    for name, rows in found.items():
        for text, _ in rows:
            where.setdefault(text, set()).add(name)
    seen: set[str] = set()
    texts, labels, groups = [], [], []
    for name, rows in found.items():
        for text, path in rows:
            if len(where[text]) == 1 and text not in seen:
                seen.add(text)
                texts.append(text)
                labels.append(name)
                groups.append(path)
    return Texts(tuple(texts), tuple(labels), tuple(groups))


def _of_file(path: Path, most: int) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [prose(doc) for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]
    texts = list(dict.fromkeys(text for text in texts if text))
    random.Random(path.name).shuffle(texts)
    return texts[:most]


def topics_task(data: Texts | None = None, **settings) -> Task:
    """Topics on an encoder: the docstrings, or texts of your own, as `texts.read_csv` gives them. settings as for `texts.text_task`."""
    name = "docstrings: which library?" if data is None or set(data.labels) <= set(LIBRARIES.values()) else "texts of your own"
    settings = {"name": name, "length": 48, "steps": 120} | settings
    return text_task(data=data or docstrings(), **settings)
