"""The capstone: adapt a model to text of one's own, and defend r, alpha and targets with evidence that survives an audit.

    texts = read_own_texts("my-letters")            .txt, .md, .csv, .jsonl, or a folder of them
    parts = split(texts)                            by document; what train and test share is counted
    study = Study(parts, answers={...})             refuses to train before the questions about licence and people are answered
    print(study.plan(settings, rates))              how long it will take
    study.floors(rates); study.tune(settings, rates); study.control(choice); study.look(choice)
    for objection in audit(study.evidence): print(objection)

`texts` reads and splits, `study` runs, `evidence` collects and objects, `write_up` writes the report and the adapter's card.
"""

from .evidence import Claim, Evidence, Objection, Run, audit
from .study import TARGETS, Study, one_at_a_time
from .texts import QUESTIONS, Document, Parts, TextError, find_personal, overlap, read_own_texts, split
from .write_up import write_card, write_report

__all__ = [
    "QUESTIONS",
    "TARGETS",
    "Claim",
    "Document",
    "Evidence",
    "Objection",
    "Parts",
    "Run",
    "Study",
    "TextError",
    "audit",
    "find_personal",
    "one_at_a_time",
    "overlap",
    "read_own_texts",
    "split",
    "write_card",
    "write_report",
]
