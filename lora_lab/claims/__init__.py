"""Claims on trial: sentences that people write about LoRA, each with an experiment that decides it.

    from lora_lab.claims import find, trial

    ours, otherwise = trial("forget")      # the experiment in our world, and in one where the claim would hold
    print(ours.verdict, ours.means)

`data/claims.yaml` is the source: an entry there, and a function of the same name in the file of its group, make a claim. A claim without
a world in which the same experiment would decide the other way is refused by the tests: an experiment that can't lose proves nothing.
"""

from .court import GROUPS, VERDICTS, Claim, Finding, decide, elsewhere, find, hold, load, trial
from .pages import markdown, number, plain, table

__all__ = ["GROUPS", "VERDICTS", "Claim", "Finding", "decide", "elsewhere", "find", "hold", "load", "markdown", "number", "plain", "table", "trial"]
