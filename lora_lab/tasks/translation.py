"""Dates and numbers written out, from English into German, French or Chinese, for a transformer of 0.1 M parameters that reads words and writes letters.

Data card. Dates of 1900 to 2099 as the Unicode CLDR writes them in full (through babel; Unicode licence v3, babel BSD-3-Clause), numbers
below 1,000 in words by the rules of each language, written out here. 60 % dates, 40 % numbers, drawn with seed 0; nothing of the test part is
in the training part. The base is pretrained on German alone, in seconds, on this machine; French and Chinese are new to it.
Not for: anything that is neither a date nor a number.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence

import torch
from torch import nn

from ..comparing import Task
from ..data_to_text import Encoded, TextBatches
from ..train import linear_schedule, token_loss, train

LANGUAGES = {"de": "German", "fr": "French", "zh": "Chinese"}

# ---- numbers in words -------------------------------------------------------------------------------------------------------------------

_EN = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_EN_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_DE = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn".split()
_DE_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
_FR = "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit dix-neuf".split()
_FR_TENS = "vingt trente quarante cinquante soixante".split()
_ZH = "零一二三四五六七八九"


def _english(n: int) -> str:
    if n >= 100:
        return f"{_EN[n // 100]} hundred" + (f" {_english(n % 100)}" if n % 100 else "")
    return _EN[n] if n < 20 else _EN_TENS[n // 10 - 2] + (f"-{_EN[n % 10]}" if n % 10 else "")


def _german(n: int) -> str:
    if n >= 100:
        return ("ein" if n < 200 else _DE[n // 100]) + "hundert" + (_german(n % 100) if n % 100 else "")
    if n < 20:
        return _DE[n]
    return (("ein" if n % 10 == 1 else _DE[n % 10]) + "und" if n % 10 else "") + _DE_TENS[n // 10 - 2]


def _french(n: int) -> str:
    if n >= 100:
        hundreds = "cent" if n < 200 else f"{_FR[n // 100]} cent" + ("" if n % 100 else "s")
        return hundreds + (f" {_french(n % 100)}" if n % 100 else "")
    if n < 20:
        return _FR[n]
    if n >= 80:  # four twenties, and up to nineteen more
        return "quatre-vingts" if n == 80 else f"quatre-vingt-{_FR[n - 80]}"
    ten = min(n // 10, 6)  # seventy is sixty and ten
    rest = n - 10 * ten
    joined = " et " if rest in (1, 11) else "-"
    return _FR_TENS[ten - 2] + (joined + _FR[rest] if rest else "")


def _chinese(n: int) -> str:
    if n < 10:
        return _ZH[n]
    if n < 20:
        return "十" + (_ZH[n % 10] if n % 10 else "")
    if n < 100:
        return _ZH[n // 10] + _chinese(10 + n % 10)
    rest = n % 100
    return _ZH[n // 100] + "百" + ("" if not rest else "零" + _ZH[rest] if rest < 10 else "一" * (rest < 20) + _chinese(rest))


_WORDS = {"en": _english, "de": _german, "fr": _french, "zh": _chinese}


def in_words(n: int, language: str) -> str:
    """A number from 0 to 999 in "en", "de", "fr" or "zh". Raises ValueError for others.

    >>> in_words(77, "en"), in_words(77, "de"), in_words(77, "fr"), in_words(77, "zh")
    ('seventy-seven', 'siebenundsiebzig', 'soixante-dix-sept', '七十七')
    """
    if not 0 <= n < 1000 or language not in _WORDS:
        raise ValueError(f"a number from 0 to 999 and one of {', '.join(_WORDS)}; found {n} and {language!r}")
    return _WORDS[language](n)


# ---- pairs ------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def pairs(language: str, n: int = 3_000, seed: int = 0) -> tuple[tuple[str, str], ...]:
    """n different (English, translation), dates and numbers mixed; the same English for every language. Raises ValueError for a language."""
    from datetime import date, timedelta

    from babel.dates import format_date

    if language not in LANGUAGES:
        raise ValueError(f"language is one of {', '.join(LANGUAGES)}; found {language!r}")
    rng = random.Random(seed)
    numbers = rng.sample(range(1000), min(1000, n * 2 // 5))
    days = [date(1900, 1, 1) + timedelta(days=k) for k in rng.sample(range(73_048), n - len(numbers))]
    found = [(in_words(k, "en"), in_words(k, language)) for k in numbers]
    found += [(format_date(day, "full", "en"), format_date(day, "full", language)) for day in days]
    rng.shuffle(found)
    return tuple(found)


_PIECES = re.compile(r"[a-z]{2,}|.", re.IGNORECASE)  # of English: words, digits, signs


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """English words and signs, then the letters of the translations; 0 ends a text, 1 stands between English and translation."""
    words = {piece for source, _ in pairs("de") for piece in _PIECES.findall(source)}
    signs = {c for language in LANGUAGES for _, target in pairs(language) for c in target}
    return ("", "→", *sorted(words - signs), *sorted(signs))


@functools.cache
def _numbers() -> dict[str, int]:
    return {piece: i for i, piece in enumerate(vocabulary())}


def prompt_ids(source: str) -> list[int]:
    return [*(_numbers()[piece] for piece in _PIECES.findall(source)), 1]


def _examples(found: Sequence[tuple[str, str]]) -> list[Encoded]:
    made = []
    for source, target in found:
        start = prompt_ids(source)
        made.append(Encoded([*start, *(_numbers()[c] for c in target), 0], len(start)))
    return made


# ---- the model --------------------------------------------------------------------------------------------------------------------------


def small_gpt2(seed: int = 0) -> nn.Module:
    """A GPT-2 of two layers and 64 dimensions over `vocabulary()`, not trained."""
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(vocabulary()), n_positions=64, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )).eval()  # fmt: skip


@functools.cache
def german_base(steps: int = 800) -> nn.Module:
    """The base: small_gpt2 trained on English to German; one copy a process."""
    with torch.random.fork_rng([]):
        model = small_gpt2()
        known = TextBatches(_examples(pairs("de")[:-200]), 32, seed=0)
        for _ in train(model, known, steps, linear_schedule(4e-3, steps, steps // 20), loss=token_loss(), device="cpu", clip=1.0):
            pass
    return model.eval()


@torch.no_grad()
def translate(model: nn.Module, sources: Sequence[str], longest: int = 48) -> list[str]:
    """The likeliest letter each time, up to the end; all sources at once, padded on the left under a mask."""
    rows = [prompt_ids(source) for source in sources]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    place = (mask.cumsum(1) - 1).clamp(min=0)
    out, kept, open_ = [], None, torch.ones(len(rows), dtype=torch.bool)
    for _ in range(min(longest, model.config.n_positions - width)):
        result = model(input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=kept, use_cache=True)
        kept, ids = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True) * open_[:, None]
        out.append(ids[:, 0])
        open_ = open_ & (ids[:, 0] != 0)
        mask, place = torch.cat([mask, mask.new_ones(len(rows), 1)], 1), place[:, -1:] + 1
        if not open_.any():
            break
    known = vocabulary()
    return ["".join(known[i] for i in row) for row in torch.stack(out, 1).tolist()]


def translation_scores(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """{"exact": share of texts that are right to the letter, "chrF": sacrebleu's, 0 to 100}."""
    import sacrebleu

    right = sum(text == reference for text, reference in zip(texts, references, strict=True)) / len(texts)
    return {"exact": right, "chrF": sacrebleu.corpus_chrf(list(texts), [list(references)]).score}


def held_out(language: str, n: int = 100) -> tuple[list[str], list[str]]:
    """(sources, references) that no training saw."""
    sources, references = zip(*pairs(language)[-200:][:n], strict=True)
    return list(sources), list(references)


def translation_task(language: str, steps: int = 300, base_steps: int = 800, test: int = 100) -> Task:
    """The German base learns another language. Scores of `test` held-out pairs: "exact", "chrF".

    The head is trained by every way: French and Chinese letters are outputs that the base never used.
    """
    known = _examples(pairs(language)[:-200])
    sources, references = held_out(language, test)
    return Task(
        f"English to {LANGUAGES[language]}", lambda seed: german_base(base_steps), lambda seed: TextBatches(known, 32, seed=seed),
        lambda model: translation_scores(translate(model, sources), references),
        targets="all-linear", head=("lm_head",), loss=token_loss(), steps=steps, warmup=steps // 20, r=8, alpha=16, settings={"clip": 1.0},
        lr={"linear probe": 1e-2, "LoRA": 1e-2, "full fine-tuning": 3e-3},
    )  # fmt: skip
