"""The capstone: own text in, splits without leaks, an audit that can't be fooled by simple means, and runs that say what they measured."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_lab.capstone import (
    QUESTIONS,
    Claim,
    Document,
    Evidence,
    Run,
    Study,
    TextError,
    audit,
    find_personal,
    one_at_a_time,
    overlap,
    read_own_texts,
    split,
    write_card,
    write_report,
)
from lora_lab.capstone.__main__ import main
from lora_lab.capstone.evidence import interval
from lora_lab.capstone.study import TARGETS

WORDS = "ash birch cedar elm fir hazel larch maple oak pine rowan spruce willow yew alder beech".split()


def prose(seed: int, words: int = 400) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choice(WORDS) for _ in range(20)) for _ in range(words // 20))


# ---- reading ----------------------------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_its_texts_in_order(tmp_path):
    texts = [prose(k) for k in range(6)]
    (tmp_path / "a.txt").write_text(f"{texts[0]}\n<|endoftext|>\n{texts[1]}\n", encoding="utf-8")
    (tmp_path / "b.md").write_text(texts[2], encoding="utf-8-sig")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": texts[3], "who": "x"}) + "\n\n" + json.dumps(texts[4]) + "\n")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "d.csv").write_text(f'who,text\r\nada,"{texts[5]}"\r\n', newline="")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "e.txt").write_text("not this")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = read_own_texts(tmp_path)
    assert [d.text for d in found] == texts
    assert [d.name for d in found] == ["a.txt#0", "a.txt#1", "b.md", "c.jsonl:1", "c.jsonl:3", "d.csv:1"]
    assert sum(d.size for d in found) == sum(len(t.encode()) for t in texts)
    grouped = read_own_texts(tmp_path / "inner" / "d.csv", group="who", least_bytes=1)
    assert [d.group for d in grouped] == ["ada"]


BAD = {
    "too little": ("a.txt", b"a few words", "bytes in all"),
    "another encoding": ("a.txt", "é".encode("latin-1") * 9_000, "encoding='cp1252'"),
    "utf-16": ("a.txt", ("word " * 9_000).encode("utf-16"), "encoding='utf-16'"),
    "damaged": ("a.txt", ("wor\ufffd " * 9_000).encode(), "damaged"),
    "read wrongly before": ("a.txt", ("cafÃ© crÃ¨me\n" * 2_000).encode(), "Ã©"),
    "one huge line": ("a.md", b"word " * 20_000, "longest_line=None"),
    "zero bytes": ("a.txt", b"word\0" * 9_000, "no text"),
    "a word file": ("a.txt", b"PK\x03\x04" + b"x" * 20_000, "docx"),
    "a pdf": ("a.txt", b"%PDF-1.7" + b"x" * 20_000, "PDF"),
    "another kind": ("a.docx", b"x" * 20_000, "plain text"),
    "empty": ("a.txt", b"\n\n", "empty"),
    "no column": ("a.csv", b"title,body\nx,y\n", "column="),
    "semicolons": ("a.csv", b"text;label\nx;y\n", "use ','"),
    "an empty row": ("a.csv", b"text,label\n,y\n", "row 1"),
    "no json": ("a.jsonl", b'{"text": "x"}\n{text: y}\n', "line 2"),
    "no key": ("a.jsonl", b'{"body": "x"}\n', "body"),
    "no text": ("a.jsonl", b'{"text": 7}\n', "int"),
    "doubles": ("a.jsonl", b'"The same text"\n"other"\n"the  same TEXT"\n', "a.jsonl:1 = a.jsonl:3"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_text_is_said(name, tmp_path):
    file, raw, told = BAD[name]
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(TextError) as problem:
        read_own_texts(tmp_path / file)
    assert told in str(problem.value)


def test_what_was_told_helps(tmp_path):
    text = prose(0, 4_000).replace("a", "ä")
    (tmp_path / "old.txt").write_bytes(text.encode("cp1252"))
    assert read_own_texts(tmp_path / "old.txt", encoding="cp1252")[0].text == text
    (tmp_path / "line.txt").write_text(text.replace("\n", " ") * 4, encoding="utf-8")
    assert len(read_own_texts(tmp_path / "line.txt", longest_line=None)) == 1
    (tmp_path / "twice.jsonl").write_text("\n".join(json.dumps(t) for t in (text, "b" * 99, text)))
    assert len(read_own_texts(tmp_path / "twice.jsonl", duplicates="drop")) == 2
    with pytest.raises(FileNotFoundError):
        read_own_texts(tmp_path / "nowhere.txt")
    (tmp_path / "none").mkdir()
    with pytest.raises(TextError, match="holds no"):
        read_own_texts(tmp_path / "none")


# ---- splitting --------------------------------------------------------------------------------------------------------------------------


def shared_by_walking(train, held, n):
    """Share of the different runs of n words: quadratic, with strings and no sets of tuples."""
    pad = [" " + " ".join("".join(c if c.isalnum() else " " for c in t.lower()).split()) + " " for t in train]
    runs = []
    for text in held:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        runs += [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    runs = sorted(set(runs))
    return sum(any(f" {run} " in text for text in pad) for run in runs) / len(runs)


@pytest.mark.parametrize("n", [3, 5])
def test_overlap_counts_runs_of_words(n):
    train, held = [prose(1), prose(2)], [prose(3, 100) + "\n" + prose(1)[:300], prose(4, 100)]
    found = overlap([Document("a", t) for t in train], [Document(str(k), t) for k, t in enumerate(held)], n)
    assert found.share == pytest.approx(shared_by_walking(train, held, n), abs=1e-12)
    assert found.worst[0][0] == "0" and found.worst[0][1] > found.worst[1][1]
    assert f" {found.example} " in " " + " ".join(train[0].split()) + " "


@pytest.mark.parametrize("seed", range(6))
def test_a_split_keeps_relatives_together_and_loses_nothing(seed):
    rng = random.Random(seed)
    plain = [Document(f"d{k}", prose(100 + k, rng.choice([60, 200, 400]))) for k in range(14)]
    revised = [Document(f"r{k}", " ".join(w if rng.random() < 0.95 else "so" for w in plain[k].text.split(" "))) for k in range(4)]
    letters = [Document(f"l{k}", prose(200 + k, 100), group="ada") for k in range(3)]
    parts = split([*plain, *revised, *letters], seed=seed)
    side = {d.name: p for p in ("train", "validation", "test") for d in parts.of(p)}
    assert len(side) == 21 and set(side.values()) == {"train", "validation", "test"}
    assert all(side[f"r{k}"] == side[f"d{k}"] for k in range(4)), side
    assert len({side[f"l{k}"] for k in range(3)}) == 1
    total = sum(parts.size(p) for p in ("train", "validation", "test"))
    largest = max(d.size for d in plain) * 2  # a family is dealt whole, so a part may miss its share by one
    assert abs(parts.size("train") - 0.7 * total) < largest and abs(parts.size("test") - 0.15 * total) < largest
    assert parts.card()["overlap"]["test"] == overlap(parts.train, parts.test).share < 0.02
    assert split([*plain, *revised, *letters], seed=seed) == parts


def test_a_split_needs_three_families_and_says_so():
    one = prose(0)
    with pytest.raises(TextError, match="sections="):
        split([Document("a", one), Document("b", one + "\nend"), Document("c", prose(1))])
    parts = split([Document("book", prose(7, 4_000))], sections=12)
    assert [len(parts.of(p)) for p in ("train", "validation", "test")] == [8, 2, 2]
    assert "\n".join(d.text for p in ("train", "validation", "test") for d in parts.of(p)) == prose(7, 4_000)
    assert "Stretches of one text" in str(parts)
    for wrong in (dict(sections=3), dict(shares=(1, 0, 0))):
        with pytest.raises(ValueError):
            split([Document("book", prose(7, 4_000))], **wrong)


def test_personal_forms_are_found_and_prose_is_left_alone():
    said = "Write to ada.l@example.org or call +44 20 7946 0958. Born 10 December 1815. DE89 3704 0044 0532 0130 00, from 192.168.0.17"
    found = find_personal([Document("letter", said), Document("story", "In 1892, at 221B Baker Street, he paid 1,000 pounds in 3 days. It was 10 past 7.")])
    assert set(found) == {"e-mail address", "telephone number", "account number", "address of a machine", "date of birth"}
    assert all(set(where) == {"letter"} for where in found.values())
    assert "ada" not in str(found)


# ---- the audit: evidence from another hand -----------------------------------------------------------------------------------------------

DIGESTS = {"train": "t" * 16, "validation": "v" * 16, "test": "e" * 16}
SAME = {"steps": 100, "batch": 4, "context": 64}
RATES = (1e-3, 3e-3, 1e-2)
CHOICE = {"r": 4, "alpha": 8, "targets": "MLP"}
SETTINGS = {  # true score at the best rate, and how a person would have written the table
    (4, 8, "MLP"): 1.400, (1, 2, "MLP"): 1.440, (16, 32, "MLP"): 1.399, (4, 32, "MLP"): 1.4003, (4, 8, "attention"): 1.460, (4, 8, "all"): 1.405,
}  # fmt: skip
REASON = "a sentence of more than five words stands here"


def good(seed: int = 0) -> Evidence:
    """A report that nobody should object to: all rates in the middle, three seeds, intervals that carry the words."""
    rng = np.random.default_rng(seed)
    luck = {s: rng.normal(0, 0.004) for s in range(3)}  # of the order of batches: the same for all settings of a seed
    e = Evidence(
        data={
            "parts": {p: {"documents": 9, "bytes": 90_000, "digest": d} for p, d in DIGESTS.items()},
            "overlap": {"n": 5, "validation": 0.002, "test": 0.001}, "answers": dict.fromkeys(QUESTIONS, "all of it is mine"),
        },
        choice=dict(CHOICE), looks=[{"time": "2026-01-01T00:00:00Z", "settings": dict(CHOICE)}],
    )  # fmt: skip

    def lora(setting, lr, s, score, part="validation", way="LoRA", look=0):
        r, alpha, targets = setting
        e.runs.append(Run(way, part, score, DIGESTS[part], s, lr, {"r": r, "alpha": alpha, "targets": targets, **SAME}, look))

    wobble = {0: [0.0002, -0.0001, -0.0001], 1: [-0.0001, 0.0002, -0.0001]}
    for k, (setting, score) in enumerate(SETTINGS.items()):
        for s in range(3):
            own = wobble[k % 2][s] * (10 if setting == (4, 32, "MLP") else 1) + 1e-6 * rng.normal()
            for lr in RATES if s == 0 else (3e-3,):
                lora(setting, lr, s, score + luck[s] + own + 0.03 * (lr != 3e-3))
    e.runs.append(Run("frozen base", "validation", 1.500, DIGESTS["validation"]))
    e.runs.append(Run("bigram", "validation", 2.100, DIGESTS["validation"]))
    for s in range(3):
        for lr in (1e-4, 3e-4, 1e-3) if s == 0 else (3e-4,):
            e.runs.append(Run("full fine-tuning", "validation", 1.398 + luck[s] + 0.02 * (lr != 3e-4) + 1e-6 * s, DIGESTS["validation"], s, lr, dict(SAME)))
        lora((4, 8, "MLP"), 3e-3, s, 1.9 + luck[s], way="control")
        lora((4, 8, "MLP"), 3e-3, s, 1.41 + luck[s], part="test", look=1)
    e.runs.append(Run("frozen base", "test", 1.505, DIGESTS["test"], look=1))
    e.runs.append(Run("bigram", "test", 2.12, DIGESTS["test"], look=1))
    e.claim("r", 4, instead_of=1, says="better", because=REASON)
    e.claim("r", 4, instead_of=16, says="no worse", margin=0.005, because=REASON)
    e.claim("alpha", 8, instead_of=32, says="not shown", because=REASON)
    e.claim("targets", "MLP", instead_of="attention", says="better", because=REASON)
    e.claim("targets", "MLP", instead_of="all", says="better", because=REASON)
    e.claim("way", "LoRA", instead_of="frozen base", says="better", because=REASON, part="test")
    return e


def keys(e: Evidence) -> set[str]:
    return {objection.key for objection in audit(e)}


@pytest.mark.parametrize("seed", range(8))
def test_a_good_report_meets_silence(seed, tmp_path):
    e = good(seed)
    assert audit(e) == []
    assert audit(Evidence.load(e.save(tmp_path / "evidence.json"))) == []  # and after a way through a file
    random.Random(seed).shuffle(e.runs)
    assert audit(e) == []  # the order of the runs says nothing


def test_differences_are_students_intervals():
    from scipy import stats

    e = good()
    this, that = [[r.score for r in e.runs if r.way == "LoRA" and r.part == "validation" and r.lr == 3e-3 and r.settings["r"] == r_ and
                   r.settings["targets"] == "MLP" and r.settings["alpha"] == 2 * r_] for r_ in (4, 1)]  # fmt: skip
    low, high = stats.ttest_rel(this, that).confidence_interval(0.95)
    mean, half = e.difference({**CHOICE}, {"r": 1, "alpha": 2, "targets": "MLP"})
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-9)
    low, high = stats.ttest_1samp([x - 1.5 for x in this], 0).confidence_interval(0.95)
    mean, half = e.difference(CHOICE, {"way": "frozen base"})
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-9)
    assert math.isnan(interval([1.0])[1]) and math.isnan(interval([])[0]) and math.isinf(interval([1.0, math.inf])[0])


def test_the_tuned_rate_is_the_best_on_common_seeds():
    e = Evidence()
    for lr, scores in {1e-3: {0: 1.50, 1: 1.20, 2: 1.21}, 3e-3: {0: 1.45, 3: 1.70}, 1e-2: {0: math.nan, 1: 1.10}}.items():
        for seed, score in scores.items():
            e.add("LoRA", score, part="validation", digest="v", seed=seed, lr=lr, r=4)
    assert e.tuned({"r": 4}) == 3e-3  # the others are better only with seeds that it never had
    assert e.values({"r": 4}) == {0: 1.45, 3: 1.70} and e.tuned({"r": 8}) is None


def of(e, **settings):
    """The choice's runs, or those of other settings, on validation."""
    wanted = {**CHOICE, **settings}
    return [r for r in e.runs if r.way == "LoRA" and r.part == "validation" and all(r.settings.get(k) == v for k, v in wanted.items())]


def swap(e, old, new):
    e.runs = [r for r in e.runs if all(r is not o for o in old)] + list(new)


def without(test):
    return lambda e: swap(e, [r for r in e.runs if test(r)], [])


def again(test, **changes):
    return lambda e: swap(e, [], [replace(r, **changes) for r in e.runs if test(r)])


def edit(test, change):
    return lambda e: swap(e, [r for r in e.runs if test(r)], [change(r) for r in e.runs if test(r)])


def chosen(r):
    return r.way == "LoRA" and r.part == "validation" and all(r.settings[k] == v for k, v in CHOICE.items())


def rest(e, **changes):
    e.data = copy.deepcopy({**e.data, **changes})


def say(about, other, says, **more):
    return lambda e: e.claim(about, CHOICE[about], instead_of=other, says=says, because=more.pop("because", REASON), **more)


def alpha_by_hand(e):
    """One rate for each alpha, four times lower for four times the alpha; "better" by luck and by step size."""
    e.runs = [r for r in e.runs if not (r.way == "LoRA" and r.part == "validation" and r.settings["alpha"] == 32 and r.settings["r"] == 4)]
    e.runs += [replace(r, settings={**r.settings, "alpha": 32}, lr=7.5e-4, score=r.score + 0.02 + 1e-5 * r.seed) for r in of(e) if r.lr == 3e-3]
    e.claim("alpha", 8, instead_of=32, says="better", because=REASON)


def copy_seed_zero(e):
    new = [replace(r, score=next(o.score for o in of(e) if o.seed == 0 and o.lr == r.lr)) for r in of(e)]
    swap(e, of(e), new)


def jitter_rates(e):
    """Three 'rates' a thousandth apart: no grid."""
    at = {1e-3: 2.997e-3, 3e-3: 3e-3, 1e-2: 3.003e-3}
    swap(e, of(e), [replace(r, lr=at[r.lr]) for r in of(e)])


def lucky_rate(e):
    """The rate that is best on the tuning seed was not the one that got all seeds."""
    swap(e, [], [replace(r, lr=1e-2, score=r.score + 0.1) for r in of(e) if r.lr == 3e-3 and r.seed])
    swap(e, [r for r in of(e) if r.lr == 3e-3 and r.seed], [])


def tune_on_another_seed(e):
    swap(e, [r for r in of(e) if r.lr != 3e-3], [replace(r, seed=9) for r in of(e) if r.lr != 3e-3])


CHEATS = {
    # one seed, and what is made to look like three
    "one seed": (without(lambda r: chosen(r) and r.seed), "few_seeds"),
    "two seeds": (without(lambda r: chosen(r) and r.seed == 2), "few_seeds"),
    "no interval": (without(lambda r: r.way == "LoRA" and r.settings["r"] == 1 and r.seed), "no_interval"),
    "one seed copied": (copy_seed_zero, "copied_seeds"),
    "one seed of a rival": (without(lambda r: r.way == "LoRA" and r.settings["r"] == 1 and r.seed), "few_seeds"),
    "a bad seed left out": (without(lambda r: r.part == "validation" and r.way == "LoRA" and r.settings["targets"] == "all" and r.seed == 2), "seeds_differ"),
    "repeated until it was good": (again(lambda r: chosen(r) and r.seed == 1, score=1.39), "two_scores"),
    "a run diverged": (edit(lambda r: chosen(r) and r.seed == 1, lambda r: replace(r, score=math.nan)), "diverged"),
    # rates
    "one rate": (without(lambda r: chosen(r) and r.lr != 3e-3), "rate_untuned"),
    "one rate for r = 1": (without(lambda r: r.way == "LoRA" and r.settings["r"] == 1 and r.lr != 3e-3), "rate_untuned"),
    "rates a hair apart": (jitter_rates, "rate_untuned"),
    "no common seed": (tune_on_another_seed, "rate_untuned"),
    "best at the upper edge": (without(lambda r: chosen(r) and r.lr == 1e-2), "rate_untuned"),
    "edge with three": (edit(lambda r: chosen(r) and r.lr == 1e-2, lambda r: replace(r, lr=3e-4)), "rate_at_edge"),
    "seeds at a rate that is not the best": (lucky_rate, "not_the_tuned_rate"),
    "full fine-tuning at one rate": (without(lambda r: r.way == "full fine-tuning" and r.lr != 3e-4), "rate_untuned"),
    # floors and controls
    "full fine-tuning cut short": (
        edit(lambda r: r.way == "full fine-tuning", lambda r: replace(r, settings={**r.settings, "steps": 10})), "floor_differs"),
    "no frozen base": (without(lambda r: r.way == "frozen base"), "no_floor"),
    "no frozen base in the test": (without(lambda r: r.way == "frozen base" and r.part == "test"), "no_floor"),
    "no simple predictor": (without(lambda r: r.way == "bigram"), "no_baseline"),
    "no full fine-tuning": (without(lambda r: r.way == "full fine-tuning"), "no_full"),
    "no control": (without(lambda r: r.way == "control"), "no_control"),
    "a control that improves": (edit(lambda r: r.way == "control", lambda r: replace(r, score=1.46 + 1e-4 * r.seed)), "control_improves"),
    "a control that hardly trained": (edit(lambda r: r.way == "control", lambda r: replace(r, settings={**r.settings, "steps": 2})), "control_differs"),
    "a control at a tiny rate": (edit(lambda r: r.way == "control", lambda r: replace(r, lr=1e-6)), "control_differs"),
    # claims
    "noise called better": (say("alpha", 32, "better"), "within_noise"),
    "worse called better": (lambda e: e.claim("targets", "MLP", {"r": 16, "alpha": 32, "targets": "MLP"}, "better", REASON), "within_noise"),
    "a difference kept quiet": (say("r", 1, "not shown"), "difference_hidden"),
    "no worse without a margin": (say("r", 16, "no worse"), "no_margin"),
    "a margin that lets all through": (say("r", 16, "no worse", margin=0.05), "margin_too_wide"),
    "a margin that was not kept": (say("alpha", 32, "no worse", margin=0.001), "margin_not_shown"),
    "nothing on alpha": (lambda e: setattr(e, "claims", [c for c in e.claims if c.about != "alpha"]), "undefended"),
    "no reason": (say("r", 1, "better", because="it is best"), "no_reason"),
    "alpha and rate together": (alpha_by_hand, "alpha_and_rate"),
    "two knobs at once": (lambda e: e.claim("alpha", 8, {"r": 16, "alpha": 32, "targets": "MLP"}, "better", REASON), "not_alone"),
    "targets called r": (lambda e: e.claim("r", 4, {"r": 4, "alpha": 8, "targets": "attention"}, "better", REASON), "not_alone"),
    "r and alpha, not in step": (
        lambda e: (swap(e, [], [replace(r, settings={**r.settings, "alpha": 9}) for r in of(e, r=16, alpha=32)]),
                   e.claim("r", 4, {"r": 16, "alpha": 9, "targets": "MLP"}, "no worse", REASON, 0.005)), "not_alone"),
    "more steps for the favourite": (
        edit(lambda r: r.way == "LoRA" and r.settings["targets"] == "MLP", lambda r: replace(r, settings={**r.settings, "steps": 300})), "not_alone"),
    "a better one passed over": (lambda e: setattr(e, "claims", [c for c in e.claims if c.that.get("r") != 16]), "not_the_best"),
    "a choice that was never run": (lambda e: setattr(e, "choice", {**CHOICE, "r": 64}), "choice_not_run"),
    "other steps for one seed": (edit(lambda r: chosen(r) and r.seed == 2, lambda r: replace(r, settings={**r.settings, "steps": 300})), "ambiguous"),
    "a rival that was never run": (say("r", 64, "better"), "no_runs"),
    "a claim against itself": (say("r", 4, "better"), "not_alone"),
    # the test part
    "looked twice": (again(lambda r: r.part == "test", look=2), "test_twice"),
    "looked twice, renumbered": (again(lambda r: r.part == "test" and r.way == "LoRA", score=1.39), "test_twice"),
    "looked twice, at other seeds": (
        lambda e: swap(e, [], [replace(r, seed=r.seed + 10, look=2) for r in e.runs if r.part == "test" and r.way == "LoRA"]), "test_twice"),
    "two looks on record": (lambda e: e.looks.append({"time": "later"}), "test_twice"),
    "the record is gone": (lambda e: e.looks.clear(), "look_not_recorded"),
    "chosen on the test": (
        lambda e: swap(e, [], [replace(r, part="test", digest=DIGESTS["test"], look=1) for r in of(e, r=16, alpha=32) if r.lr == 3e-3]), "chosen_on_test"),
    "rates tried on the test": (again(lambda r: r.part == "test" and r.way == "LoRA", lr=1e-2), "chosen_on_test"),
    "a knob claimed on the test": (say("r", 1, "better", part="test"), "chosen_on_test"),
    "the lucky seed in the test": (without(lambda r: r.part == "test" and r.way == "LoRA" and r.seed), "test_seeds"),
    "another adapter in the test": (
        edit(lambda r: r.part == "test" and r.way == "LoRA", lambda r: replace(r, settings={**r.settings, "r": 16, "alpha": 32})), "other_on_test"),
    "no test": (without(lambda r: r.part == "test"), "no_test"),
    "test text renamed validation": (edit(lambda r: r.part == "validation", lambda r: replace(r, digest=DIGESTS["test"])), "same_part"),
    "floors on other text": (edit(lambda r: r.way == "frozen base" and r.part == "validation", lambda r: replace(r, digest="x" * 16)), "other_data"),
    # data
    "test is validation": (
        lambda e: rest(e, parts={**e.data["parts"], "test": e.data["parts"]["validation"]}), "same_part"),
    "overlap": (lambda e: rest(e, overlap={"n": 5, "validation": 0.002, "test": 0.3}), "overlap"),
    "overlap of long runs": (lambda e: rest(e, overlap={"n": 40, "validation": 0.0, "test": 0.0}), "overlap_unmeasured"),
    "overlap not counted": (lambda e: rest(e, overlap={}), "overlap_unmeasured"),
    "overlap nan": (lambda e: rest(e, overlap={"n": 5, "validation": math.nan, "test": math.nan}), "overlap_unmeasured"),
    "no data card": (lambda e: rest(e, parts={}), "no_data_card"),
    "no licence": (lambda e: rest(e, answers={**e.data["answers"], "licence": "yes"}), "questions"),
    "no choice": (lambda e: setattr(e, "choice", {}), "no_choice"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_what_an_examiner_would_object_to_is_named(name):
    change, key = CHEATS[name]
    e = good()
    change(e)
    assert key in keys(e), audit(e)


def test_a_report_of_nothing_is_not_a_good_one():
    assert {"no_data_card", "no_floor", "no_control", "no_choice", "undefended", "no_test", "questions"} <= keys(Evidence())


def test_a_reason_stands_for_full_fine_tuning_that_did_not_fit():
    e = good()
    without(lambda r: r.way == "full fine-tuning")(e)
    rest(e, **{"no full fine-tuning": "124 M parameters and Adam need 2 GB that this room has not"})
    assert audit(e) == []


def test_evidence_refuses_what_makes_no_sense(tmp_path):
    e = Evidence()
    with pytest.raises(ValueError, match="validation or on test"):
        e.add("LoRA", 1.0, part="train", digest="x")
    with pytest.raises(ValueError, match="choice first"):
        e.claim("r", 1, 2, "better")
    e.choice = dict(CHOICE)
    for wrong in (("steps", 1, 2, "better"), ("r", 1, 2, "best")):
        with pytest.raises(ValueError):
            e.claim(*wrong)
    for _ in range(2):  # the same run twice, as after a cell was run again, is one run
        e.add("LoRA", math.nan, part="validation", digest="x", seed=0, lr=0.1, r=4)
    assert len(e.runs) == 1
    e.claim("r", 4, 1, "better", REASON)
    e.claim("r", 4, 1, "not shown", REASON)
    assert [c.says for c in e.claims] == ["not shown"]
    (tmp_path / "x.json").write_text('{"runs": [{"way": 1}], "claims": []}')
    with pytest.raises(ValueError, match="no evidence file"):
        Evidence.load(tmp_path / "x.json")
    assert isinstance(Claim("r", {}, {}, "better"), Claim)


def test_the_command_counts_objections(tmp_path, capsys):
    e = good()
    e.save(tmp_path / "good.json")
    without(lambda r: r.way == "control")(e)
    e.save(tmp_path / "bad.json")
    assert main([str(tmp_path / "good.json")]) == 0
    assert main([str(tmp_path / "good.json"), str(tmp_path / "bad.json"), str(tmp_path / "none.json")]) == 1
    out = capsys.readouterr().out
    assert "good.json: 0 objection(s)" in out and "[no_control]" in out and "none.json: 1" in out


def test_the_report_states_what_the_runs_say(tmp_path):
    e = good()
    text = write_report(e, tmp_path / "report.md", words={"limits": "One town alone."}).read_text(encoding="utf-8")
    mine = np.array([r.score for r in of(e) if r.lr == 3e-3])
    assert f"{mine.mean():.4f} ± {mine.std(ddof=1):.4f}" in text and "One town alone." in text
    assert "Nothing to object to." in text and "*Open:" in text and "| 4 | 32 | MLP |" in text
    assert "of the clock" not in text  # nothing was timed
    e.runs = [replace(r, seconds=2.0) if r.lr else r for r in e.runs]
    rest(e, scored={"validation": 7_804, "test": 90_000}, machine="a machine of two cores")
    text = write_report(e, tmp_path / "report.md").read_text(encoding="utf-8")
    trained = sum(r.lr is not None for r in e.runs)
    assert "| validation | 9 | 90,000 | 7,804 |" in text and "a machine of two cores" in text
    assert f"{trained} trainings of 100 steps of 4 rows of 64 tokens" in text and f"took {2 * trained} s" in text
    assert "standard deviation" in text.split("## Test")[0] and "half-width" in text.split("## The defence")[1].split("- **r**")[0]
    without(lambda r: r.way == "control")(e)
    assert "[no_control]" in write_report(e, tmp_path / "report.md").read_text(encoding="utf-8")


def test_words_that_would_stand_nowhere_are_refused(tmp_path):
    with pytest.raises(ValueError, match="limit, which would stand nowhere"):
        write_report(good(), tmp_path / "report.md", words={"limit": "One town alone."})
    assert not (tmp_path / "report.md").exists()


def test_what_parts_share_can_be_told_without_the_text():
    same = " ".join(WORDS[:6])
    parts = split([Document(f"d{k}", f"{prose(k)}\n{same}") for k in range(4)])
    shown = parts.told()
    assert shown == str(parts) and any(f"{a} {b} " in shown for a in WORDS for b in WORDS)
    assert not any(word in parts.told(quote=False) for word in WORDS)
    assert re.findall(r"[\d.]+%", parts.told(quote=False)) == re.findall(r"[\d.]+%", shown)


# ---- runs -------------------------------------------------------------------------------------------------------------------------------

ANSWERS = dict.fromkeys(QUESTIONS, "written for a test, by nobody")


def test_one_knob_at_a_time():
    found = one_at_a_time(CHOICE, r=[1, 4, 16], alpha=[32], targets=["all", "MLP"])
    assert [tuple(s.values()) for s in found] == [(4, 8, "MLP"), (1, 2.0, "MLP"), (16, 32.0, "MLP"), (4, 32, "MLP"), (4, 8, "all")]
    with pytest.raises(ValueError, match="no knob"):
        one_at_a_time(CHOICE, rank=[1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole study, as small as it can be: everything is run, nothing is learned."""
    documents = [Document(f"d{k}", prose(k, 160)) for k in range(5)]
    parts = split(documents)
    folder = tmp_path_factory.mktemp("study")
    make = lambda: Study(parts, ANSWERS, folder=folder, steps=1, batch=2, context=16, scored=300, seeds=(0, 1, 2))  # noqa: E731
    torch.set_num_threads(1)
    study = make()
    settings = one_at_a_time({"r": 1, "alpha": 2, "targets": "attention"}, r=[2])
    budget = study.plan(settings, [1e-3, 4e-3, 1.6e-2], [1e-4, 4e-4, 1.6e-3])
    study.floors([1e-4, 4e-4, 1.6e-3])
    study.tune(settings, [1e-3, 4e-3, 1.6e-2])
    study.choose(settings[0])
    study.control(settings[0])
    study.look()
    return study, settings, budget, make


def test_a_study_asks_before_it_trains(tmp_path):
    parts = split([Document(f"d{k}", prose(k, 200)) for k in range(3)])
    with pytest.raises(ValueError, match="licence"):
        Study(parts, {**ANSWERS, "licence": "none"}, folder=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(TextError, match="fewer than a batch"):
        Study(parts, ANSWERS, folder=tmp_path / "x", context=256, batch=50)


def test_the_score_is_what_transformers_says_without_the_ends_of_documents():
    from lora_lab.capstone.study import bits_per_byte
    from lora_lab.gpt2 import load_gpt2, text_loss

    model, tokenizer = load_gpt2("pocket")
    pieces, end = ["The lamp was lit at dusk.", "Nobody saw the ship.", "“Naïve,” said he."], tokenizer.eos_token_id
    ids = [end, *tokenizer(pieces[0])["input_ids"], end, *tokenizer(pieces[1])["input_ids"], end, *tokenizer(pieces[2])["input_ids"]]
    labels = [-100 if i == end else i for i in ids]
    with torch.no_grad():  # transformers leaves -100 out, and takes the mean
        nats = float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss) * sum(i != end for i in ids)
    expected = nats / math.log(2) / sum(len(piece.encode()) for piece in pieces)
    assert bits_per_byte(model, tokenizer, "<|endoftext|>".join(pieces)) == pytest.approx(expected, rel=1e-5)  # float32, another order of additions
    long = prose(3, 600)  # of several windows, without an end: then it is the loss of a text
    assert bits_per_byte(model, tokenizer, long) == pytest.approx(text_loss(model, tokenizer, long).bits_per_byte, rel=1e-6)


def test_the_frozen_base_of_a_study_is_scored_on_validation(tiny):
    from lora_lab.capstone.study import bits_per_byte
    from lora_lab.gpt2 import load_gpt2

    study = tiny[0]
    text = "<|endoftext|>".join(d.text for d in study.parts.validation)
    assert len(study._text("validation")) < 400 and text.startswith(study._text("validation")[:100])
    assert study.evidence.values({"way": "frozen base"})[None] == pytest.approx(bits_per_byte(*load_gpt2("pocket"), study._text("validation")), rel=1e-6)


def test_every_setting_got_its_rates_and_its_seeds(tiny):
    study, settings, budget, _ = tiny
    for side in [*settings, {"way": "full fine-tuning"}]:
        rates = study.evidence.rates(side)
        best = study.evidence.tuned(side)
        assert 3 <= len(rates) <= 5 and set(rates[best]) == {0, 1, 2}
        assert all(set(seeds) == {0} for rate, seeds in rates.items() if rate != best)
        inside = best not in (min(rates), max(rates))
        assert inside or len(rates) == 5  # a neighbour beyond the edge, twice at most
    made = [r for r in study.evidence.runs if r.way not in ("unigram", "bigram")]
    more = sum(len(study.evidence.rates(side)) - 3 for side in [*settings, {"way": "full fine-tuning"}])
    assert len(made) == budget.runs + more and budget.seconds > 0 and "a rate at the edge" in str(budget)
    assert {r.way for r in made if r.part == "test"} == {"LoRA", "frozen base", "full fine-tuning"}


def test_the_control_sees_the_same_tokens_in_another_order(tiny):
    from lora_lab.capstone.study import _rows

    study = tiny[0]
    plain, shuffled = (_rows(str(study.folder), study.digests, "pocket", 16, s) for s in (False, True))
    assert torch.equal(plain.sort(1).values, shuffled.sort(1).values) and not torch.equal(plain, shuffled)
    choice = study.evidence.values(study.evidence.choice)  # the same seeds, rate and steps: only the order can make the difference
    [(rate, scores)] = study.evidence.rates({"way": "control"}).items()
    assert rate == study.evidence.tuned(study.evidence.choice) and set(scores) == set(choice)
    assert all(abs(scores[seed] - choice[seed]) > 1e-6 for seed in choice)


def test_a_second_look_is_kept_whoever_asks(tiny):
    study, settings, _, make = tiny
    assert "test_twice" not in {o.key for o in study.audit()}
    before = list(study.evidence.runs)
    study.look()  # the same cell again: the same look, nothing new
    assert study.evidence.runs == before and len(study.evidence.looks) == 1
    later = make()  # another day, another kernel: the looks are on disk
    assert len(later.evidence.looks) == 1
    later.tune(settings, [1e-3, 4e-3, 1.6e-2])  # from disk
    later.choose(settings[1])
    later.look()
    assert len(make().evidence.looks) == 2 and "test_twice" in {o.key for o in later.audit()}


def test_no_look_is_forgotten_when_something_else_is_changed(tiny, tmp_path):
    study, settings, _, _ = tiny
    parts, own = study.parts, tmp_path / "study"
    small = dict(steps=1, batch=2, context=16, scored=300, seeds=(0,))
    other = split([Document(f"e{k}", prose(50 + k, 160)) for k in range(3)])  # another text in the same folder
    for place, changes, seen in ((parts, {}, 1), (parts, {"scored": 200}, 2), (parts, {"steps": 2}, 3), (other, {}, 1), (parts, {}, 3)):
        one = Study(place, ANSWERS, folder=own, **{**small, **changes})
        one.tune(settings[:1], [1e-3])
        one.look(settings[0])
        assert len(one.evidence.looks) == seen, (changes, one.evidence.looks)
    assert len(json.loads((own / "looks.json").read_text())) == 4
    assert one.evidence.data["scored"]["test"] == parts.size("test") > 300 >= one.evidence.data["scored"]["validation"] > 100


def test_recheck_runs_a_claimed_run_again(tiny):
    study = tiny[0]
    runs = [r.way for r in study.evidence.runs if r.part == "validation" and r.way not in ("unigram", "bigram")]
    for way in dict.fromkeys(runs):
        recorded, again = study.recheck(study.evidence, runs.index(way))
        assert recorded == pytest.approx(again, rel=1e-6)  # one machine, one thread
    forged = copy.deepcopy(study.evidence)
    forged.runs = [replace(r, score=r.score - 0.1) for r in forged.runs]
    recorded, again = study.recheck(forged, 3)
    assert recorded < again - 0.05


def test_the_adapter_and_its_card(tiny, tmp_path):
    from lora_lab import load_adapter
    from lora_lab.gpt2 import load_gpt2

    study = tiny[0]
    model, tokenizer = study.final()
    card = write_card(model, study.evidence, tmp_path / "adapter", name="A test", licence="cc0-1.0", samples=[("Once", " upon")]).read_text(encoding="utf-8")
    assert "license: cc0-1.0" in card and "written for a test" in card and "    Once upon" in card
    assert "base_model: pocket-gpt2" in card and "standard deviation" in card and " s of the clock" in card
    from_gpt2 = replace(study.evidence, data={**study.evidence.data, "model": "gpt2"})
    other = write_card(model, from_gpt2, tmp_path / "other", name="Another").read_text(encoding="utf-8")
    assert "base_model: gpt2" in other and "license:" not in other and "Samples" not in other
    fresh = load_adapter(load_gpt2("pocket")[0], tmp_path / "adapter")
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(fresh.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("targets", TARGETS)
def test_the_names_of_targets_mean_what_they_say(targets):
    from lora_lab import apply_lora, lora_layers
    from lora_lab.gpt2 import load_gpt2

    found = {name.split(".", 3)[-1] for name in lora_layers(apply_lora(load_gpt2("pocket")[0], r=1, alpha=1, target_modules=TARGETS[targets]))}
    attention, mlp = {"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}
    assert found == {"W_q and W_v": {"attn.c_attn"}, "attention": attention, "MLP": mlp, "all": attention | mlp}[targets]


DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_what_it_would_be_for_a_larger_base_is_what_the_brief_says():
    text, brief = Study.elsewhere("gpt2"), (DOCS / "capstone.md").read_text(encoding="utf-8")
    peak, work = re.search(r"([\d.]+) GB at its peak", text), re.search(r"([\d.]+) TFLOP a step", text)
    assert f"needs {float(peak[1]):.1f} GB of a T4's 16 GB" in brief and f"{work[1]} TFLOP a step" in brief


def test_the_rubric_says_where_each_objection_belongs():
    known = set(re.findall(r'yield "(\w+)"', (DOCS.parent / "lora_lab/capstone/evidence.py").read_text(encoding="utf-8")))
    table = (DOCS / "capstone.md").read_text(encoding="utf-8").partition("| criterion | objections |")[2].partition("\n\n")[0]
    listed = re.findall(r"`(\w+)`", table)
    assert len(known) > 30 and sorted(listed) == sorted(known)
    assert {key for _, key in CHEATS.values()} <= known
