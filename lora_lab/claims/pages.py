"""The claims as a table for the terminal and as docs/claims.md, both made from data/claims.yaml."""

from __future__ import annotations

from collections.abc import Iterable

from .court import GROUPS, Claim, Finding, elsewhere, load

WORDS = {"true": "true", "false": "false", "depends": "it depends", "unsettled": "the seeds disagree"}


def number(value: float) -> str:
    """Four digits, without an exponent where none is needed.

    >>> number(2.08333), number(786432.0), number(1.2e-16)
    ('2.083', '786,432', '1.2e-16')
    """
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.2g}"


def table(rows: Iterable[tuple[Claim, Finding | None, Finding | None]]) -> str:
    """One paragraph for each claim, grouped; with what a run found, where there was one."""
    lines, group = [], None
    for claim, ours, other in rows:
        if claim.group != group:
            group = claim.group
            lines += ["", GROUPS[group], "=" * len(GROUPS[group])]
        lines += ["", f"{claim.id}: “{claim.says}” ({claim.source})"]
        if ours is None:
            found = ", ".join(f"{name}: {number(value)}" for name, (_, value, _) in claim.bands.items())
            lines.append(f"  {WORDS[claim.verdict]}   {found}")
        else:
            found = ", ".join(f"{name}: {number(value)}" for name, value in ours.means.items())
            control = ", ".join(f"{number(value)}" for value in other.means.values())
            lines += [f"  {WORDS[ours.verdict]}   {ours.what}: {found}", f"  the other world ({claim.otherwise}): {WORDS[other.verdict]}, {control}"]
            lines += [f"  {ours.note}"] if ours.note else []
            lines += [f"  NOT AS ON RECORD: {complaint}" for complaint in claim.complaints(ours)]
        lines.append(f"  {claim.corrected(ours.means if ours else None)}")
    return "\n".join(lines).strip()


def plain(rows: Iterable[tuple[Claim, Finding | None, Finding | None]]) -> list[dict]:
    """The same as plain numbers and texts, ready for JSON."""
    told = []
    for claim, ours, other in rows:
        entry = {"id": claim.id, "numbers": list(claim.numbers), "group": claim.group, "source": claim.source, "says": claim.says}
        entry |= {"verdict": claim.verdict, "bands": {name: list(band) for name, band in claim.bands.items()}, "otherwise": claim.otherwise}
        entry["correct"] = claim.corrected(ours.means if ours else None)
        if ours is not None:
            found = {"verdict": ours.verdict, "what": ours.what, "measured": {k: list(v) for k, v in ours.measured.items()}, "note": ours.note}
            entry["run"] = found | {"otherwise": other.verdict, "complaints": claim.complaints(ours)}
        told.append(entry)
    return told


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown() -> str:
    """docs/claims.md, whole."""
    claims = load()
    counts = {word: sum(c.verdict == word for c in claims.values()) for word in WORDS}
    told = ", ".join(f"{count} {WORDS[word]}" for word, count in counts.items() if count)
    lines = [
        "# Claims on trial", "",
        "Made from `data/claims.yaml` by `lora-lab claims --write`; edit that file, not this one.", "",
        f"{len(claims)} sentences that people write about LoRA, each decided by an experiment of seconds on a CPU: {told}. They come from five articles, "
        "000 to 004 here (Q: the article's question of that number), from tutorials, forums and documentation, and from the LoRA paper itself. "
        "The number is the mean over the seeds; `lora-lab claims --run` measures it again, and the tests compare verdict and number. "
        "Each experiment also runs in *another world*, in which the claim would come out the other way: an experiment that can't lose proves nothing. "
        "Some verdicts were not what we expected; they stand as they were found.", "",
        "To add a claim: an entry in `data/claims.yaml`, and a function of the same name in the file of its group in `lora_lab/claims/`.", "",
    ]  # fmt: skip
    for group, title in GROUPS.items():
        lines += [f"## {title}", "", "| no. | the claim | verdict | measured | what is true | the other world |", "|---|---|---|---|---|---|"]
        for claim in (c for c in claims.values() if c.group == group):
            found = "; ".join(f"{name}: {number(value)}" for name, (_, value, _) in claim.bands.items())
            numbers = ", ".join(map(str, claim.numbers)) or "–"
            row = [
                numbers, f"{claim.says} ({claim.source}) `{claim.id}`", f"**{WORDS[claim.verdict]}**", found, claim.corrected(), claim.otherwise,
            ]  # fmt: skip
            lines.append("| " + " | ".join(_cell(part) for part in row) + " |")
        lines.append("")
    lines += [
        "## Where the other sentences are decided", "",
        "The articles make 61 claims (nos. 1 to 61). Those that are not above:", "",
        "| no. | the claim | where |", "|---|---|---|",
    ]  # fmt: skip
    for entry in elsewhere():
        place = f"lab {entry['lab']}: {entry['section']}" if "lab" in entry else f"not decided: {entry['open']}"
        lines.append(f"| {entry['number']} | {_cell(entry['says'])} ({entry['source']}) | {_cell(place)} |")
    return "\n".join(lines) + "\n"
