"""Own data in: read it, split it by document, count what the parts share, and ask about licence and people before anything trains."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..corpus import END

KINDS = (".txt", ".md", ".csv", ".jsonl")
LEAST_BYTES = 10_000  # a tenth of it must still hold a test that is more than a few sentences
LONGEST_LINE = 50_000  # characters. The longest paragraph of the shipped novels has a few thousand; a page without line ends is a page that was squashed
NGRAM = 5  # words. Stories of one author share 0.07 to 0.31 % of their 5-grams (data/sherlock-holmes), so a per cent is no accident
TWINS = 0.3  # of the smaller document's n-grams: two such documents stay on one side

QUESTIONS = {
    "source": "Where does the text come from, and who wrote it?",
    "licence": "Which licence or permission lets you train on it, and lets you hand on the adapter?",
    "people": "Whose names, words or secrets are in it, and do they know? What did you take out?",
    "use": "Who will use the adapter, and for what? What is it not for, and what could it be misused for?",
}


class TextError(ValueError):
    """Text that can't be used as it is; the message says where, what was found, what to do."""


@dataclass(frozen=True)
class Document:
    """A text that stays whole in a split. Documents of one `group` (an author, a conversation, a patient) stay on one side."""

    name: str
    text: str
    group: str | None = None

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode("utf-8"))


# ---- reading ----------------------------------------------------------------------------------------------------------------------------


def read_own_texts(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    column: str = "text",
    group: str | None = None,
    encoding: str = "utf-8",
    duplicates: str = "refuse",
    longest_line: int | None = LONGEST_LINE,
    least_bytes: int = LEAST_BYTES,
) -> list[Document]:
    """Documents from a .txt, .md, .csv or .jsonl file, from a folder of such files (its folders, too), or from a list of paths.

    .txt, .md   one document; several where lines of <|endoftext|> stand between them
    .csv        a document per row, from `column`; `group` names a column whose equal values stay together
    .jsonl      a document per line: a JSON text, or an object with `column` (and `group`)
    duplicates  "refuse" raises, "drop" keeps the first of equal texts (blanks and capitals apart)

    Raises FileNotFoundError, and TextError: no such file kind, another encoding, damaged characters, a file that is no text, a missing column, an
    empty text, a line over `longest_line` characters, equal documents, fewer than `least_bytes` bytes in all.
    """
    if duplicates not in ("refuse", "drop"):
        raise ValueError(f'duplicates is "refuse" or "drop"; found {duplicates!r}')
    paths = [Path(path)] if isinstance(path, (str, os.PathLike)) else [Path(p) for p in path]
    documents = []
    for file in _files(paths):
        text = _decoded(file, encoding)
        _refuse_odd(file, text, longest_line)
        if file.suffix.lower() == ".csv":
            documents += _from_csv(file, text, column, group)
        elif file.suffix.lower() == ".jsonl":
            documents += _from_jsonl(file, text, column, group)
        else:
            pieces = [piece.strip() for piece in text.split(END) if piece.strip()]
            if not pieces:
                raise TextError(f"{file} is empty: take it out, or give it a text")
            documents += [Document(file.name if len(pieces) == 1 else f"{file.name}#{k}", piece) for k, piece in enumerate(pieces)]
    documents = _without_twins(documents, duplicates)
    size = sum(document.size for document in documents)
    if size < least_bytes:
        raise TextError(
            f"{len(documents)} document(s) of {size:,} bytes in all; {least_bytes:,} is the least with which a test part is more than a few "
            "sentences. Add text, or practise on what ships: lora_lab.files.shipped('sherlock-holmes')"
        )
    return documents


def _files(paths: Sequence[Path]) -> list[Path]:
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
            fitting = [p for p in inside if p.suffix.lower() in KINDS]
            if not fitting:
                others = ", ".join(p.name for p in inside[:5]) or "nothing"
                raise TextError(f"{path} holds no {', '.join(KINDS)} file; found {others}. Save your text as one of these")
            found += fitting
        elif not path.is_file():
            raise FileNotFoundError(f"there is no file or folder {path.resolve()}")
        elif path.suffix.lower() not in KINDS:
            raise TextError(f"{path} is a {path.suffix or 'file without an ending'}; asked is {', '.join(KINDS)}. Export it as plain text first")
        else:
            found.append(path)
    if not found:
        raise TextError("no path was given: name a file or a folder")
    return found


def _decoded(file: Path, encoding: str) -> str:
    raw = file.read_bytes()
    for start, what in ((b"PK\x03\x04", "a zip (a .docx or .odt is one)"), (b"%PDF", "a PDF"), (b"\x1f\x8b", "a gzip"), (b"{\\rtf", "a rich text (.rtf)")):
        if raw.startswith(start):
            raise TextError(f"{file} is {what} under another name: export its text as UTF-8 first")
    if encoding == "utf-8" and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TextError(f"{file} is in UTF-16: pass encoding='utf-16', or save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig" if encoding == "utf-8" else encoding)  # a byte order mark is no letter
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        guess = raw[max(error.start - 12, 0) : error.start + 12].decode("cp1252", errors="replace")
        raise TextError(
            f"{file} is not in {encoding} (byte {error.start}, line {line}). Read as Windows-1252 the place is {guess!r}: if that looks right, pass "
            "encoding='cp1252'; else find out how it was saved"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refuse_odd(file: Path, text: str, longest_line: int | None) -> None:
    if "\0" in text:
        raise TextError(f"{file} holds zero bytes: it is no text")
    if (damaged := text.count("\ufffd")) > 0:
        raise TextError(f"{file} holds {damaged} damaged characters (�): somebody decoded it wrongly before. Go back to the original")
    # "é" in UTF-8, read as Windows-1252, is "Ã©". No language writes many of these pairs.
    if (pairs := len(re.findall("[ÃÂ][\u0080-\u00bf]|â€", text))) > max(3, len(text) // 5_000):
        raise TextError(f"{file} has {pairs} places such as 'Ã©': UTF-8 that was read as something else and saved again. Go back to the original")
    if longest_line is not None:
        number, line = max(enumerate(text.split("\n"), 1), key=lambda pair: len(pair[1]))
        if len(line) > longest_line:
            raise TextError(
                f"{file}, line {number} has {len(line):,} characters and begins {line[:40]!r}. A line so long is most often data, or a text that "
                "lost its line ends. If it is meant so, pass longest_line=None"
            )


def _from_csv(file: Path, text: str, column: str, group: str | None) -> list[Document]:
    csv.field_size_limit(2**31 - 1)  # a chapter in a cell is fine; the length of a line is checked above
    rows = csv.DictReader(text.splitlines(keepends=True))
    names = [(name or "").strip() for name in rows.fieldnames or []]
    for wanted in (column, group):
        if wanted is not None and wanted not in names:
            hint = "; its columns seem to be separated by ';', use ','" if len(names) == 1 and ";" in names[0] else ""
            raise TextError(f"{file} has no column {wanted!r}; found {', '.join(names) or 'nothing'}{hint}. Pass column= with the name of yours")
    rows.fieldnames = names
    return [_document(f"{file.name}:{number}", row, column, group, f"{file}, row {number}") for number, row in enumerate(rows, 1)]


def _from_jsonl(file: Path, text: str, column: str, group: str | None) -> list[Document]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise TextError(f"{file}, line {number} is no JSON ({error}): a .jsonl file has one value a line") from None
        row = {column: value} if isinstance(value, str) else value
        if not isinstance(row, dict) or column not in row:
            there = ", ".join(map(str, row)) if isinstance(row, dict) else type(value).__name__
            raise TextError(f"{file}, line {number} has no {column!r}; found {there}. Pass column= with the name of yours")
        found.append(_document(f"{file.name}:{number}", row, column, group, f"{file}, line {number}"))
    return found


def _document(name: str, row: Mapping, column: str, group: str | None, where: str) -> Document:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise TextError(f"{where}: the text is {'empty' if not text else f'a {type(text).__name__}' if not isinstance(text, str) else 'blank'}; take it out")
    if group is not None and row.get(group) in (None, ""):
        raise TextError(f"{where} has no {group!r}, which says what belongs together; fill it in")
    return Document(name, text.strip(), None if group is None else str(row[group]))


def _without_twins(documents: list[Document], duplicates: str) -> list[Document]:
    seen: dict[str, Document] = {}
    twins = []
    for document in documents:
        key = " ".join(document.text.lower().split())
        if key in seen:
            twins.append((seen[key].name, document.name))
        seen.setdefault(key, document)
    if twins and duplicates == "refuse":
        told = "; ".join(f"{a} = {b}" for a, b in twins[:3])
        raise TextError(
            f"{len(twins)} of {len(documents)} documents repeat another one ({told}): in train and test they would be a leak. Take them out, or "
            'pass duplicates="drop" and say in your report how many they were'
        )
    return list(seen.values())


# ---- what texts share -------------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def ngrams(text: str, n: int = NGRAM) -> set[tuple[str, ...]]:
    """Its different runs of n words; a text of fewer words is one run."""
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(max(len(found) - n + 1, 1))} if found else set()


@dataclass(frozen=True)
class Overlap:
    """`share` of the held-out n-grams that the training part has, too; worst: (document, share) from the highest; an example or ""."""

    share: float
    n: int
    worst: tuple[tuple[str, float], ...]
    example: str = ""

    def __str__(self) -> str:
        told = ", ".join(f"{name} {share:.1%}" for name, share in self.worst[:3])
        return f"{self.share:.2%} of its {self.n}-grams are in the training part; most in {told}" + (f" ({self.example!r})" if self.example else "")


def overlap(train: Iterable[Document], held: Iterable[Document], n: int = NGRAM) -> Overlap:
    """How much of `held` the training part has seen, word for word, by runs of n words."""
    known = set().union(*(ngrams(document.text, n) for document in train))
    shares, every = [], set()
    for document in held:
        mine = ngrams(document.text, n)
        every |= mine
        shares.append((document.name, len(mine & known) / max(len(mine), 1)))
    both = every & known
    shares.sort(key=lambda pair: -pair[1])
    return Overlap(len(both) / max(len(every), 1), n, tuple(shares), " ".join(min(both)) if both else "")


def _relatives(documents: Sequence[Document]) -> list[int]:
    """A number for each document; those that must stay together, by group or because one repeats much of the other, have the same."""
    parent = list(range(len(documents)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, document in enumerate(documents):
        if document.group is not None:
            parent[root(i)] = root(first.setdefault(document.group, i))
    grams = [ngrams(document.text) for document in documents]
    where = defaultdict(list)
    for i, mine in enumerate(grams):
        for gram in mine:
            where[gram].append(i)
    shared: Counter = Counter()
    for places in where.values():
        # What stands in very many documents is a form or a greeting: pairs of neighbours join all of them, if they share enough of it.
        pairs = zip(places, places[1:], strict=False) if len(places) > 30 else ((a, b) for k, a in enumerate(places) for b in places[k + 1 :])
        shared.update(pairs)
    for (i, j), count in shared.items():
        if count >= TWINS * min(len(grams[i]), len(grams[j])):
            parent[root(i)] = root(j)
    return [root(i) for i in range(len(documents))]


# ---- parts ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Training, validation and test documents, and what the last two share with the first. `note` says what a reader must know of the split."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    note: str = ""

    def of(self, part: str) -> tuple[Document, ...]:
        if part not in ("train", "validation", "test"):
            raise ValueError(f"a part is train, validation or test; found {part!r}")
        return getattr(self, part)

    def text(self, part: str) -> str:
        return END.join(document.text for document in self.of(part))

    def size(self, part: str) -> int:
        return sum(document.size for document in self.of(part))

    def digest(self, part: str) -> str:
        """16 hex digits that name the part's texts."""
        return hashlib.sha256(json.dumps([document.text for document in self.of(part)]).encode()).hexdigest()[:16]

    def card(self) -> dict:
        """What the evidence says of the data: sizes, digests, overlap. Plain, for JSON."""
        parts = {p: {"documents": len(self.of(p)), "bytes": self.size(p), "digest": self.digest(p)} for p in ("train", "validation", "test")}
        shared = {p: overlap(self.train, self.of(p)).share for p in ("validation", "test")}
        return {"parts": parts, "overlap": {"n": NGRAM, **shared}, "note": self.note}

    def told(self, quote: bool = True) -> str:
        """Sizes, and what the parts share. quote: with a run of words that they share; without it no word of the text is shown."""
        lines = [f"{p:10s} {len(self.of(p)):4d} document(s) {self.size(p):>10,} bytes" for p in ("train", "validation", "test")]
        shared = {p: overlap(self.train, self.of(p)) for p in ("validation", "test")}
        lines += [f"{p}: {found if quote else replace(found, example='')}" for p, found in shared.items()]
        return "\n".join(lines + ([self.note] if self.note else []))

    def __str__(self) -> str:
        return self.told()


def split(documents: Sequence[Document], seed: int = 0, shares: tuple[float, float, float] = (0.7, 0.15, 0.15), sections: int | None = None) -> Parts:
    """Train, validation and test by document: whole documents, and whole families of relatives, go to one side.

    Relatives are documents of one `group`, or of which one has 30 % of the other's 5-grams. Families are dealt in an order that `seed` decides,
    each to the part that lacks most bytes of its share; every part gets one at least.
    sections  cut the text, taken as one long document, into so many stretches (6 or more) and split them in order, the test last: for a
              single book. Then names and plot are known from training, and the note says so

    Raises TextError for fewer than three families.
    """
    if len(shares) != 3 or min(shares) <= 0:
        raise ValueError(f"shares are three numbers above 0, for train, validation and test; found {shares}")
    if sections is not None:
        return _in_sections(documents, shares, sections)
    families = defaultdict(list)
    for document, family in zip(documents, _relatives(documents), strict=True):
        families[family].append(document)
    dealt = sorted(families.values(), key=lambda family: family[0].name)
    if len(dealt) < 3:
        raise TextError(
            f"{len(documents)} document(s) make {len(dealt)} families of relatives; three parts need three. Give more documents, or, for one long text, "
            "pass sections=12: it is cut into stretches, and the report has to say so"
        )
    random.Random(seed).shuffle(dealt)
    parts: list[list[Document]] = [[], [], []]
    sizes, total = [0, 0, 0], sum(shares)
    for k, family in enumerate(dealt):
        empty = [p for p in range(3) if not parts[p]]
        # As many families left as parts without one: these come first.
        choice = empty if len(dealt) - k <= len(empty) else range(3)
        p = min(choice, key=lambda p: sizes[p] / (shares[p] / total))
        parts[p] += family
        sizes[p] += sum(document.size for document in family)
    together = len(documents) - len(dealt)
    note = f"Relatives stay on one side: {len(documents)} documents make {len(dealt)} families." if together else ""
    return Parts(*map(tuple, parts), note=note)


def _in_sections(documents, shares, sections: int) -> Parts:
    if sections < 6:
        raise ValueError(f"sections is 6 or more, so that each part is more than one place in the text; found {sections}")
    lines = [line for document in documents for line in document.text.split("\n") if line.strip()]
    size = sum(map(len, lines))
    stretches: list[list[str]] = [[] for _ in range(sections)]
    done = 0
    for line in lines:
        stretches[min(done * sections // size, sections - 1)].append(line)
        done += len(line)
    if not all(stretches):
        raise TextError(f"{len(lines)} lines can't be cut into {sections} stretches; the text has too few, or too long, lines")
    found = [Document(f"stretch {k + 1} of {sections}", "\n".join(stretch)) for k, stretch in enumerate(stretches)]
    total = sum(shares)
    test = max(1, round(sections * shares[2] / total))
    validation = max(1, round(sections * shares[1] / total))
    first = sections - test - validation
    return Parts(
        tuple(found[:first]), tuple(found[first : first + validation]), tuple(found[first + validation :]),
        note="Stretches of one text stand on all sides: the scores say how well this text is continued, nothing of another.",
    )  # fmt: skip


# ---- people -----------------------------------------------------------------------------------------------------------------------------

_PERSONAL = {
    "e-mail address": r"[\w.+-]+@[\w-]+\.[\w.]{2,}",
    "telephone number": r"(?<![\w.])(?:\+\d{1,3}[ /-]?)?(?:\(?0?\d{2,5}\)?[ /-]){1,3}\d{3,}(?![\w.])",
    "account number": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b|\b(?:\d{4}[ -]?){3}\d{4}\b",
    "address of a machine": r"\b(?:\d{1,3}\.){3}\d{1,3}\b",
    "date of birth": r"(?i)\bborn(?: on)?:? \d{1,2}[./ ]\w+[./ ]\d{4}\b",
}


def find_personal(documents: Iterable[Document]) -> dict[str, dict[str, int]]:
    """kind -> {document: how many}: what looks like an address, a number or a date that belongs to a person. The findings are not shown.

    It finds forms, not names, and not everything: nothing found is no permission.
    """
    found: dict[str, dict[str, int]] = {}
    for document in documents:
        for kind, form in _PERSONAL.items():
            if count := len(re.findall(form, document.text)):
                found.setdefault(kind, {})[document.name] = count
    return found


def open_questions(answers: Mapping[str, str] | None) -> list[str]:
    """The keys of `QUESTIONS` that have no answer of at least three words."""
    return [key for key in QUESTIONS if len(str((answers or {}).get(key, "")).split()) < 3]
