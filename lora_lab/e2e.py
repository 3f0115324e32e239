"""What the restaurants of the E2E challenge need to be scored: how each slot shows in a text, and a template of one's own.

The rules are ours, written against the training set's wording. People paraphrase across neighbouring values ("cheap" for "less than £20"), so
these count as the same meaning; the data's own references are far from clean (`data/data_to_text/README.md` has the measured rates).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .text_scores import Slot

_RATED = r"(?:rat\w*|review\w*|scor\w*|rank\w*|stars?\b|recommend\w*|feedback|satisf\w*)"
_PRICED = r"(?:pric\w*|cost\w*)"
_LINK = r"(?: (?:is|are|was|of|at|as|a|an|it|its|has|have|been|being|considered|very|quite|rather|with|the|by|customers?|range|ranges|ranging|in)){0,5}"
_CHILD = r"(?:famil\w*|child\w*|kids?\b|kid-|youngsters?)"
_NOT = r"(?:\bno\b|\bnot\b|\bnon\b|n't|\bnor\b|\bneither\b|\bnone\b|\bun\w+|\bisnt\b|\bwithout\b|\bavoid\w*|\black\w*|\bdiscourag\w*|\binappropriate)"


def _rating(number: str, digit: str, words: str) -> str:
    return (
        rf"\b(?:{words})\b[ -](?:\w+ |and ){{0,2}}?{_RATED}|{_RATED}{_LINK}[ -](?:{words})\b"
        rf"|\b(?:{digit}|{number})(?:[ -]?stars?)?[ -]?(?:out of|of|/)[ -]?(?:5|five)\b|\b(?:{digit}|{number})[ -]?stars?\b"
    )


E2E_RULES: dict[str, Slot] = {
    # filled with the values that the data has, by data_to_text
    "name": Slot(names=frozenset({"The Eagle"})),
    "near": Slot(names=frozenset({"Burger King"})),
    "Type": Slot({
        "coffee shop": r"\bcoffee[ -]?(?:shop|house|place|bar)\w*|\bcafes?\b",
        "pub": r"\bpubs?\b|(?<!sushi )(?<!noodle )(?<!burger )\bbars?\b|\btavern\b",
        "restaurant": r"\brestaurants?\b|\beater(?:y|ies)\b|\bdiner\b|\bbistro\b|\brestraunt\b|\brestaraunt\b",
    }, generic=frozenset({"restaurant"}), noun=True),
    "food": Slot({
        "Fast food": r"\bfast-?\s?foods?\b|\bburgers?\b|\bfries\b",
        "Japanese": r"\bjapan\w*|\bsushi\b",
        "Italian": r"\bital\w+|\bpasta\b|\bpizza\w*",
        "French": r"\bfrench\b|\bfrance\b",
        "Indian": r"\bindian?\b|\bcurr(?:y|ies)\b",
        "English": r"\benglish\b|\bbritish\b|\bengland\b|\bfish and chips\b",
        "Chinese": r"\bchin(?:a|ese)\b",
    }),
    "price": Slot({
        ("less than £ 20", "cheap"):
            rf"\bcheap\w*|\binexpensive\b|(?:less|lower|under|below|up to|cheaper)(?: than)? ?£?20\b|\blow(?:er)?(?:ly)?[ -](?:\w+ )?{_PRICED}"
            rf"|{_PRICED}{_LINK} (?:low|less)\b|\baffordab\w+|\bbudget\b|\blow-(?:end|cost)\b|\b20 pounds or less",
        ("£ 20 - 25", "moderate"):
            rf"\bmoderat\w*[ -](?:\w+ )?{_PRICED}|{_PRICED}{_LINK}[ -](?:moderat\w*|average|reasonabl\w*|mid\w*)"
            rf"|\b(?:average|mid\w*|medium|fair\w*)[ -](?:\w+ )?{_PRICED}"
            rf"|\breasonabl\w+|\bmoderate(?:ly)?\b(?! (?:custom|rat))|£?\b20(?: pounds)?(?:-| ?to | and |-to-| through )£?25\b",
        ("more than £ 30", "high"):
            rf"\bexpensive\b|\bhigh(?:er|ly|ish)?[ -](?:\w+ )?{_PRICED}|{_PRICED}{_LINK} (?:high\w*|more|over|above|start\w*)\b"
            r"|(?:more|over|above|least|from|upwards of|higher|start at|starting at)(?: than| with)? ?£?30\b"
            r"|£?30(?: pounds)?(?: ?\+| plus| and (?:up|over|above|more)| or more| upwards)"
            r"|\bhigh-?\s?end\b|\bpric(?:e?y|ier)\b|\bcostly\b|\bupscale\b",
    }),
    "customer rating": Slot({
        ("1 out of 5", "low"): _rating("one", "1", r"low\w*|poor\w*|bad\w*|terribl\w+|not (?:very |so |that )?(?:good|well|high\w*)|badly"),
        ("3 out of 5", "average"): _rating("three", "3", r"average\w*|moderate\w*|mediocre|decent\w*|medium|mid\w*|middle"),
        ("5 out of 5", "high"): _rating("five", "5", r"high\w*|excellent\w*|great|top|good|well|best|outstanding|perfect|superb") + r"|\bwell[- ]liked\b",
    }),
    "area": Slot({
        "riverside": r"\briver\w*|\bwaterside\b|\bwaterfront\b|\bbank of the\b",
        "city centre":
            r"\b(?:city|town)(?:'s| 's)?[ -]?(?:cent\w+)|\bcent(?:er|re)\b|\bdowntown\b|\b(?:heart|middle) of (?:the )?(?:city|town)"
            r"|\bcentral\w*|\bin the city\b|\binner city\b",
    }),
    "family friendly": Slot({
        # a denial before the family or after it, within the same stretch of a sentence
        "no": rf"{_NOT}[^.;]{{0,45}}?{_CHILD}(?:[ -]?friendly)?|{_CHILD}[^.,;]{{0,25}}?(?:{_NOT}|-?free\b)(?:[ -]\w+)?|\badults?\b[ -]?(?:\w+)?",
        "yes": rf"{_CHILD}",
    }),
}


def e2e_template(slots: Mapping[str, str]) -> str:
    """One fixed wording for every meaning: the score of filling in a form. slots: slot -> value, `name` among them.

    >>> e2e_template({"name": "The Mill", "Type": "pub", "food": "French", "area": "riverside"})
    'The Mill is a pub that serves French food in the riverside area .'
    """
    says = slots.get
    kind = says("Type", "restaurant")
    cheap = {"cheap": "cheap", "moderate": "moderately priced", "high": "high priced"}.get(says("price"))
    friendly = {"yes": "family friendly", "no": "non family friendly"}.get(says("family friendly"))
    adjectives = " , ".join(a for a in (cheap, friendly) if a)
    article = "an" if re.match("[aeiou]", adjectives or kind) else "a"
    text = f"{slots['name']} is {article} {adjectives} {kind}" if adjectives else f"{slots['name']} is {article} {kind}"
    if says("food"):
        text += f" that serves {says('food')} food" if says("food") != "Fast food" else " that serves fast food"
    if says("area"):
        text += " in the riverside area" if says("area") == "riverside" else " in the city centre"
    if says("near"):
        text += f" near {says('near')}"
    text += " ."
    rating, price = says("customer rating"), says("price") if says("price") and not cheap else None
    facts = []
    if rating:
        facts.append(f"a customer rating of {rating}" if rating[0].isdigit() else f"{'an' if rating == 'average' else 'a'} {rating} customer rating")
    if price:
        facts.append(f"a price range of {price}")
    return text + (f" It has {' and '.join(facts)} ." if facts else "")
