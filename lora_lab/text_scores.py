"""How good is a generated text? BLEU, ROUGE-L, and whether it says what it was asked to say.

BLEU and ROUGE-L compare words with what people wrote; they forgive a wrong price if the rest sounds right. The slot error rate looks at the
facts and forgives any style. A system needs both.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


def bleu(generated: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in percent against all references of each text, by sacrebleu.

    Lower-cased and with mteval's 13a tokens, because that is the E2E challenge's own BLEU (equal to six decimals), so that figures can be
    put beside published ones; cased BLEU is up to 1.5 points lower. Raises ValueError if the two don't belong together.
    """
    _same_length(generated, references)
    import sacrebleu

    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]  # None: this text has fewer references
    # force: E2E's references are tokenised and so should be what is compared with them; sacrebleu warns of it each time.
    return sacrebleu.corpus_bleu(list(generated), streams, lowercase=True, tokenize="13a", force=True).score


def rouge_l(generated: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> float:
    """ROUGE-L in percent, the mean over texts, as COCO's and the E2E challenge's scripts define it.

        P = max over references of LCS / words generated,  R = max of LCS / words of the reference
        F = (1 + beta^2) P R / (R + beta^2 P)

    LCS is the length of the longest common subsequence of words, in lower case and without punctuation. P and R may come from different
    references. Raises ValueError if the two don't belong together.
    """
    _same_length(generated, references)
    total = 0.0
    for text, wanted in zip(generated, references, strict=True):
        words, targets = _words(text), [_words(reference) for reference in wanted]
        common = [_common_subsequence(words, target) for target in targets]
        precision = max(common) / len(words) if words else 0.0
        recall = max(n / len(target) if target else 0.0 for n, target in zip(common, targets, strict=True))
        if precision and recall:
            total += (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return 100 * total / len(generated)


def rouge_n(generated: Sequence[str], references: Sequence[Sequence[str]], n: int) -> float:
    """ROUGE-N in percent, the mean over texts of the best F over the references of each.

        P = n-grams in common / n-grams generated,  R = in common / n-grams of the reference,  F = 2 P R / (P + R)

    An n-gram is in common as often as both have it. Words as in `rouge_l`. Raises ValueError if the two don't belong together, or n < 1.
    """
    _same_length(generated, references)
    if n < 1:
        raise ValueError(f"n is the number of words in an n-gram, at least 1; found {n}")

    def grams(text: str) -> Counter:
        words = _words(text)
        return Counter(zip(*(words[i:] for i in range(n)), strict=False))

    total = 0.0
    for text, wanted in zip(generated, references, strict=True):
        said = grams(text)
        # F is 2 common / (generated + reference); 0 where there is no n-gram at all
        total += max(2 * (said & target).total() / max(said.total() + target.total(), 1) for target in map(grams, wanted))
    return 100 * total / len(generated)


def _same_length(generated, references):
    if len(generated) != len(references) or not generated:
        raise ValueError(f"one list of references per generated text, at least one; found {len(generated)} texts, {len(references)} lists")
    for i, wanted in enumerate(references):
        if isinstance(wanted, str) or not wanted:
            raise ValueError(f"references[{i}] must be a list of at least one text; found {wanted!r}")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


@dataclass(frozen=True)
class Slot:
    """How the values of one slot are found in a text.

    patterns  values that mean the same (a tuple, or one string) -> regular expression on `plain(text)`. Tried in this order; what one has
              matched is gone for the next, so that "not family-friendly" comes before "family-friendly"
    names     for a slot like `name`: every value it may have. Found word for word, with or without "the"
    generic   values that may always be said: "restaurant" in a text about places to eat
    noun      what a text calls its subject by, and may therefore say again: "The pub ..."
    """

    patterns: Mapping[str | tuple[str, ...], str] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    generic: frozenset[str] = frozenset()
    noun: bool = False


@dataclass(frozen=True)
class SlotErrors:
    """Of one text: slots asked for and not said, said and not asked for (wrong values among them), said twice in the same words."""

    slots: int
    missing: tuple[str, ...]
    added: tuple[str, ...]
    repeated: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.missing) + len(self.added) + len(self.repeated)


def plain(text: str) -> str:
    """Lower case, no accents, single blanks, none beside a hyphen or after a pound sign: what the patterns of slots are written for.

    >>> plain("Near  Café Rouge , family - friendly , £ 20")
    'near cafe rouge , family-friendly , £20'
    """
    text = unicodedata.normalize("NFKD", text.lower().replace("’", "'"))
    text = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub(r"(£) ", r"\1", re.sub(r" ?- ?", "-", " ".join(text.split())))


def slot_errors(slots: Mapping[str, str], text: str, rules: Mapping[str, Slot]) -> SlotErrors:
    """Compare what a text says with the slots it was asked to express (`slots`: slot -> value).

    Rules of counting: a slot is missing if no words for its value are found; a value is added if its words are found and the slot has
    another value or none; a slot is repeated if the same words for its value stand there twice (names may be used as often as one likes).
    Names are looked for first and longest first, and are then taken out, so that "Café Rouge" is no café.
    Raises ValueError for a slot without a rule.
    """
    unknown = slots.keys() - rules.keys()
    if unknown:
        raise ValueError(f"no rule for the slots {sorted(unknown)}; there are rules for {sorted(rules)}")
    asked = {_bare(slots[s]): slots[s] for s in slots if rules[s].names}
    pattern = _any_of(frozenset(asked).union(*(map(_bare, rule.names) for rule in rules.values())))
    rest = plain(text)
    found = {match[1] for match in pattern.finditer(rest)}
    rest = pattern.sub("_", rest)
    missing = [s for s in slots if rules[s].names and _bare(slots[s]) not in found]
    added, repeated = sorted(found - asked.keys()), []
    for slot, rule in rules.items():
        if rule.names:
            continue
        left, said = rest, False
        for values, pattern in rule.patterns.items():
            values = (values,) if isinstance(values, str) else values
            matches = [m.group().strip() for m in re.finditer(pattern, left)]
            left = re.sub(pattern, "_", left)
            if slots.get(slot) in values:
                said = bool(matches)
                if len(matches) > len(set(matches)) and not rule.noun:
                    repeated.append(slot)
            elif matches and not rule.generic & set(values):
                added.append(f"{slot} : {values[0]}")
        if slot in slots and not said:
            missing.append(slot)
    return SlotErrors(len(slots), tuple(missing), tuple(added), tuple(repeated))


def _bare(name: str) -> str:
    return plain(name).removeprefix("the ")


@functools.lru_cache(maxsize=64)
def _any_of(names: frozenset[str]) -> re.Pattern:
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name)))
    return re.compile(rf"(?<!\w)(?:the )?({longest_first})(?!\w)")


def slot_error_rate(mrs: Sequence[Mapping[str, str]], texts: Sequence[str], rules: Mapping[str, Slot]) -> float:
    """(missing + added + repeated) / slots over all texts, in percent. 0: every text says what it should and nothing else."""
    found = [slot_errors(slots, text, rules) for slots, text in zip(mrs, texts, strict=True)]
    return 100 * sum(e.count for e in found) / sum(e.slots for e in found)
