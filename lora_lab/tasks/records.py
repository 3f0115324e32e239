"""Was it the drug? Notes in the style of health records, INVENTED: no patient, no drug and no observation in them is real.

Data card. A grammar written for this lab puts an invented drug and a common complaint into one sentence, with one or two more around it. Three
classes: the drug brought the complaint ("side effect"), was given for it ("treated"), or the complaint is absent ("denied"). Wordings come in
mirrored sets, "took D and then developed S", "developed S and then took D", and every class may say "no" of something else, so that counting
words says little: order and negation decide. Drugs of the test notes never occur in training. Not fit for any medical use; real notes are
longer, abbreviated, misspelt and protected by law.
"""

from __future__ import annotations

import random

from ..comparing import Task
from .texts import Texts, text_task

DRUGS = (
    "velorin tramosol quintabel orsemin baltrex calidor nemovan pirasol damicet lusorin fenobar zitamol corvasel helipran mirtogan rubazol "
    "sanovir teledrin ulcopan wexomil"
).split()
COMPLAINTS = "headache fever cough rash sickness dizziness cramps itching thirst swelling trembling weakness hoarseness sleeplessness".split()
WORDINGS = {
    "side effect": (
        "{S} began two days after {D} was started.", "Took {D} and then developed {S}.", "{S} whenever {D} is taken, gone without it.",
        "First {D}, a week later {S}.", "After {D} came {S}.", "{D} led to {S}.",
    ),
    "treated": (
        "{D} was started two days after {S} began.", "Developed {S} and then took {D}.", "Gone whenever {D} is taken, {S} without it.",
        "First {S}, a week later {D}.", "After {S} came {D}.", "{S} led to {D}.",
    ),
    "denied": (
        "No {S} began after {D} was started.", "Took {D} and then developed no {S}.", "{S} is denied, {D} is taken.",
        "First {D}, a week later no {S}.", "After {D} came no {S}.", "{D} led to no {S}.",
    ),
}  # fmt: skip
UNSEEN = {
    "side effect": ("On {D} the patient suffers from {S}.", "{S}, which we put down to {D}.", "Stopped {D} on account of {S}."),
    "treated": ("For the {S} the patient is on {D}.", "{S}, for which we gave {D}.", "Put on {D} on account of {S}."),
    "denied": ("On {D} the patient is free of {S}.", "{S} was asked about, none on {D}.", "Goes on with {D}, no sign of {S}."),
}  # fmt: skip
AROUND = (
    "Aged {n}.", "Lives alone.", "Sleeps well.", "Heart and lungs clear.", "Weight {n} kilos.", "Seen again in two weeks.", "Walks every day.",
    "Works in a mill.", "Came with her daughter.", "Blood taken.", "No allergies.", "No operations.", "Came with no letter.",
    "No change in weight.",
)  # fmt: skip


def records(n: int = 540, wordings: str = "known", seed: int = 0) -> Texts:
    """n invented notes, a third of each class; notes of one drug are one group. wordings "unseen": sentences that no training note has.

    Raises ValueError for other wordings.
    """
    if wordings not in ("known", "unseen"):
        raise ValueError(f"wordings are 'known' or 'unseen'; found {wordings!r}")
    table = WORDINGS if wordings == "known" else UNSEEN
    rng = random.Random(seed)
    texts, labels, drugs = [], [], []
    for k in range(n):
        label = list(table)[k % 3]
        drug = rng.choice(DRUGS)
        core = rng.choice(table[label]).format(D=drug, S=rng.choice(COMPLAINTS))
        around = [s.format(n=rng.randint(40, 89)) for s in rng.sample(AROUND, rng.randint(1, 2))]
        place = rng.randint(0, len(around))
        texts.append(" ".join(s[0].upper() + s[1:] for s in [*around[:place], core, *around[place:]]))
        labels.append(label)
        drugs.append(drug)
    return Texts(tuple(texts), tuple(labels), tuple(drugs))


def records_task(**settings) -> Task:
    """Which of the three, on the pocket encoder or on a BERT of yours (encoder="folder"). settings as for `texts.text_task`."""
    return text_task("invented records: was it the drug?", records(), **{"length": 40, "steps": 300} | settings)
