"""What is handed in: a report whose tables are made from the runs, and the adapter as a folder with a card."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from torch import nn

from ..files import atomic_write
from ..state import save_adapter
from .evidence import CONTROL, FROZEN, FULL, LORA, Evidence, audit
from .texts import QUESTIONS

DEFENCE = {
    "question": "What should the adapter do that the base does not?",
    "expected": "What did you expect before the runs, and what surprised you?",
    "limits": "What does this evidence not show, and which result would change your choice?",
}


SPREAD = "± after a score: the standard deviation over its seeds."
INTERVAL = "± after a difference: the half-width of its 95 % interval over seeds (Student's t, seed by seed)."


def write_report(evidence: Evidence, path: str | os.PathLike = "report.md", *, title: str = "Capstone", words: Mapping[str, str] | None = None) -> Path:
    """report.md: data, floors, one table per knob, claims with their intervals, the look at the test part, the audit. Nothing in it is typed twice.

    words  your text for the keys of `DEFENCE`; what is missing stands there as an open question

    Raises ValueError for words under another key: they would not be printed.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(report(evidence, title, words), encoding="utf-8")
    return Path(path)


def report(evidence: Evidence, title: str = "Capstone", words: Mapping[str, str] | None = None) -> str:
    """The text of `write_report`."""
    words, e = dict(words or {}), evidence
    if unknown := [key for key in words if key not in DEFENCE]:
        raise ValueError(f"words are for {', '.join(DEFENCE)}; found {', '.join(map(str, unknown))}, which would stand nowhere. Put it into one of these")
    said = {key: words.get(key) or f"*Open: {question}*" for key, question in DEFENCE.items()}
    answers = e.data.get("answers") or {}
    lines = [f"# {title}", "", said["question"], "", "## Data", "", "| part | documents | bytes | of these scored | digest |", "|---|---:|---:|---:|---|"]
    scored = {part: f"{count:,}" for part, count in (e.data.get("scored") or {}).items()}
    lines += [
        f"| {part} | {card['documents']} | {card['bytes']:,} | {scored.get(part, '')} | `{card['digest']}` |" for part, card in e.data.get("parts", {}).items()
    ]
    lines += ["", "A digest names the texts without showing them: the same texts, the same digest."]
    shared = e.data.get("overlap") or {}
    if shared:
        lines += ["", f"Runs of {shared['n']} words that training has, too: validation {shared['validation']:.2%}, test {shared['test']:.2%}."]
    if note := e.data.get("note"):
        lines += ["", note]
    lines += [""] + [f"- {question} {answers.get(key, '*open*')}" for key, question in QUESTIONS.items()]
    lines += ["", "## How it was run", "", *_recipe(e)]
    lines += ["", "## Floors, and the control (validation, bits per byte, fewer is better)", "", SPREAD]
    lines += ["", "| | score | rate | seeds |", "|---|---:|---:|---:|"]
    for way in dict.fromkeys(run.way for run in e.runs if run.part == "validation" and run.way != LORA):
        lines.append(_row(e, way, {"way": way}))
    if e.choice:
        lines.append(_row(e, "**LoRA, the choice**", e.choice))
    lines += ["", "## r, alpha, targets (validation)", "", "| r | alpha | targets | score | rate | seeds |", "|---:|---:|---|---:|---:|---:|"]
    for side in e.settings():
        score = _row(e, "", side).split("|", 2)[2]
        lines.append(f"| {side['r']} | {side['alpha']:g} | {side['targets']} |{score}")
    if no_full := e.data.get("no full fine-tuning"):
        lines += ["", f"No full fine-tuning: {no_full}"]
    lines += ["", "## The defence", "", said["expected"], "", INTERVAL, ""]
    for claim in e.claims:
        difference, half = e.difference(claim.this, claim.that, claim.part)
        margin = f" by {claim.margin:g}" if claim.margin is not None else ""
        lines += [
            f"- **{claim.about}**: {_side(claim.this, claim.about)} against {_side(claim.that, claim.about)}: *{claim.says}{margin}*. "
            f"{difference:+.4f} ± {half:.4f} on {claim.part}. {claim.because}"
        ]
    lines += ["", "## Test", "", f"Looked at {len(e.looks)} time(s)" + "".join(f", {look['time']}" for look in e.looks) + ".", ""]
    lines += ["Bits per byte. " + SPREAD, ""]
    for way in dict.fromkeys(run.way for run in e.runs if run.part == "test"):
        lines.append(f"- {way}: {_spread([run.score for run in e.runs if run.part == 'test' and run.way == way])}")
    lines += ["", "## Limits", "", said["limits"], "", "## What the audit says", ""]
    lines += [f"- {objection}" for objection in audit(e)] or ["Nothing to object to."]
    return "\n".join(lines) + "\n"


def write_card(
    model: nn.Module, evidence: Evidence, folder: str | os.PathLike, *, name: str, base: str | None = None, licence: str = "",
    samples: Sequence[tuple[str, str]] = (),
) -> Path:  # fmt: skip
    """Save the adapter of `model` (two files, as peft has them) with a README.md: what it is for and what not, what it was made of, what was measured.

    base     as the card names it; None: what the evidence was made with
    licence  a short name such as "cc0-1.0"; without one the card names none, and so permits nothing
    samples  (prompt, what the model wrote): they stand in the card for all to read
    """
    saved = save_adapter(model, folder)
    e, answers = evidence, evidence.data.get("answers") or {}
    model_name = str(e.data.get("model", "pocket"))
    base = base or {"pocket": "pocket-gpt2"}.get(model_name, model_name)
    test = [run for run in e.runs if run.part == "test"]
    choice = ", ".join(f"{key} = {value}" for key, value in e.choice.items())
    rate = e.tuned(e.choice) if e.choice else None
    lines = ["---", f"base_model: {base}", "library_name: peft", *([f"license: {licence}"] if licence else []), "tags: [lora]", "---", ""]
    lines += [f"# {name}", "", f"A LoRA adapter for {base}: {choice}" + (f", learning rate {rate:g}" if rate else "") + f"; {saved.bytes:,} bytes.", ""]
    lines += [f"- **{key}**: {answers.get(key, 'not answered')}" for key in QUESTIONS]
    lines += ["", "| test part, bits per byte | |", "|---|---:|"]
    lines += [f"| {way} | {_spread([run.score for run in test if run.way == way])} |" for way in dict.fromkeys(run.way for run in test)]
    lines += ["", SPREAD, "", *_recipe(e)]
    if samples:
        lines += ["", "## Samples, not chosen", ""] + [f"    {line}" for prompt, text in samples for line in (prompt + text).split("\n") + [""]]
    path = Path(folder) / "README.md"
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def _recipe(e: Evidence) -> list[str]:
    """Steps, rows and tokens of the trainings, how many they were, how long they took, and where."""
    names = ("steps", "batch", "context")
    trained = [run for run in e.runs if run.lr is not None]
    kinds = dict.fromkeys(tuple(run.settings.get(name) for name in names) for run in trained)
    told = "; ".join(f"{steps} steps of {batch} rows of {context} tokens" for steps, batch, context in kinds)
    lines = [f"{len(trained)} trainings of {told}, each with a rate that rises for a tenth of them and falls to 0."] if trained else []
    timed = [run.seconds for run in e.runs if run.seconds is not None]
    if timed:
        lines.append(f"{len(timed)} runs, training and scoring, took {sum(timed):.0f} s of the clock in all.")
    return lines + ([f"{e.data['machine']}."] if e.data.get("machine") else [])


def _row(e: Evidence, name: str, side: Mapping) -> str:
    values = list(e.values(side).values())
    rate = e.tuned(side)
    return f"| {name} | {_spread(values)} | {'' if rate is None else f'{rate:g}'} | {len(values)} |"


def _spread(values: Sequence[float]) -> str:
    if not values or not all(map(math.isfinite, values)):
        return "diverged" if values else ""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _side(side: Mapping, about: str) -> str:
    if about == "way":
        return side.get("way", LORA)
    return f"{side.get(about):g}" if isinstance(side.get(about), float) else str(side.get(about))


__all__ = ["CONTROL", "DEFENCE", "FROZEN", "FULL", "report", "write_card", "write_report"]
