# %% [markdown]
# # 13 · Capstone
# <!-- lab:badges -->
#
# Adapt the pocket model, or GPT-2, to text of your own, and defend r, alpha and targets before an
# examiner who believes nothing. Here the whole way is walked once, on three stories and a bit; then you walk it on yours: what
# you change for that stands in two cells.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: a few steps on a few pages, for a quick check of the notebook
seed = 0
device = "auto"
my_text = None  # your file or folder: "letters.txt", "diary/"; .txt, .md, .csv, .jsonl
my_model = "pocket"  # or "gpt2", on a GPU

# %%
import copy
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from lora_lab.capstone import (
    Document,
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
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.files import shipped
from lora_lab.gpt2 import generate
from lora_lab.view import plot_panels, plot_spread, show

torch.set_num_threads(1)  # a small model: on a shared machine threads wait for each other
device = "cpu" if device == "auto" and my_model == "pocket" else device

# %%
# Before the first run. For your own text fill in what stands under "yours", and decide what follows.
if my_text is None:  # the worked example
    title, adapter_name, licence = "Doyle's voice on the pocket model", "Doyle's voice", "cc0-1.0"
    question = "Continue an English text as Doyle's narrator would; measured in bits per byte on a story that it has not read."
    opening = "It was a cold morning when"
    answers = {
        "source": "Three stories by Arthur Conan Doyle and the beginning of a fourth, 1892, Standard Ebooks' edition.",
        "licence": "In the public domain; the editors' own work is CC0. The adapter may be handed on.",
        "people": "Invented people alone. Servants and foreigners are seen with the eyes of 1892.",
        "use": "To play with a voice, in this course. Not for facts, nor for anything that is to be believed. It could be passed off "
        "as Doyle; it is too poor for that.",
    }
else:  # yours; what stays empty is open in the report, and without answers nothing trains
    title, adapter_name, licence, question = "", "my adapter", "", ""
    opening = "The"
    answers = {"source": "", "licence": "", "people": "", "use": ""}
reading = {}  # for read_own_texts: encoding="cp1252", column="body", group="author", duplicates="drop"
sections = None  # 12: one long text, cut into so many stretches
quote = my_text is None  # False: no word of the text, and none of the adapter's, is printed here or stands in the card
choice = {"r": 4, "alpha": 8, "targets": "MLP"}
alternatives = {"r": [1, 4, 16], "alpha": [8, 32], "targets": ["attention", "MLP", "all"]}  # the choice itself is passed over
RATES, FULL_RATES = [2.5e-3, 5e-3, 1e-2], [1.25e-4, 2.5e-4, 5e-4]
no_full = ""  # a reason, counted in bytes or hours, if full fine-tuning is too large for you; then FULL_RATES = []
MARGIN = 0.0025  # bits per byte that you would give away for a smaller file. This one was set after a trial run (13.F2); yours: before
recipe = {"steps": 30, "batch": 4, "context": 64, "scored": 8_000}  # the same for all; scored: bytes of validation
if fast:
    recipe = {"steps": 2, "batch": 2, "context": 32, "scored": 700}
example = my_text is None and my_model == "pocket" and choice == {"r": 4, "alpha": 8, "targets": "MLP"}

# %% [markdown]
# ## Own text in
#
# What is wrong with a text is said before a model sees it. Three files that people really bring:

# %%
desk = Path(tempfile.mkdtemp())
(desk / "old.txt").write_bytes("Müller said: «Nein.»\n".encode("cp1252") * 900)
(desk / "twice.csv").write_text("text\n" + "the same answer\n" * 3 + "another one\n")
(desk / "squashed.md").write_text("one line and no end " * 4000)
for name in ["old.txt", "twice.csv", "squashed.md"]:
    try:
        read_own_texts(desk / name)
    except TextError as problem:
        print(str(problem).replace(str(desk), "."), "\n")

stories = shipped("sherlock-holmes")
shelf = read_own_texts([stories / "train.txt", stories / "test.txt"])
documents = shelf if my_text is None else read_own_texts(my_text, **reading)
if fast:
    shelf, documents = ([replace(d, text=d.text[:4000]) for d in found[:12]] for found in (shelf, documents))
for d in documents[:6]:
    print(f"{d.name:14s} {d.size:>7,} bytes   {repr(d.text[:60]) if quote else ''}")

# %% [markdown]
# ## Which part has seen which
#
# If the test part holds sentences of the training part, the score measures memory. So count runs of $n$ words: which share
# of the held-out runs does training have?
#
# $$\frac{|\,\text{runs of held} \cap \text{runs of train}\,|}{|\,\text{runs of held}\,|}$$

# %% exercise="13.1"
def share_seen(held: list, train: list, n: int) -> float:
    """The share, 0 to 1, of the different runs of n words in `held` that `train` has, too.

    held, train: lists of texts; words are what stands between blanks, without capitals;
    a run lies inside one text. 0 if there is no run
    """
    ### BEGIN SOLUTION
    def runs(texts):
        found = set()
        for text in texts:
            words = text.lower().split()
            found |= {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
        return found

    asked = runs(held)
    return len(asked & runs(train)) / max(len(asked), 1)
    ### END SOLUTION

# %% check="13.1"
check("13.1", share_seen)

# %%
share_seen = use("13.1", share_seen)


def revised(text):
    """A second edition: one word in twenty is another one."""
    dice = random.Random(seed)
    return " ".join(word if dice.random() < 0.95 else "so" for word in text.split(" "))


with_twin = [*shelf, Document("second edition", revised(shelf[-1].text))]
careless = share_seen([with_twin[-1].text], [d.text for d in with_twin[:-1]], 5)
print(f"the second edition in the test, the first in training: {careless:.0%} of its runs of 5 words were seen")
parts = split(with_twin, seed=seed)
print(f"split by family: {overlap(parts.train, parts.test).share:.2%}.  {parts.note}\n")
parts = split(documents, seed=seed, sections=sections)
print(parts.told(quote))

# %% [markdown]
# Whole documents go to one side, and relatives with them: a *family* is what belongs to one group, or repeats much of another.
# Different stories by one author share a fraction of a per cent; the audit below objects from 2 % on.
#
# Then questions that no program answers. Without answers nothing trains.

# %%
print(find_personal(documents) or "no addresses, numbers, dates of birth found: forms only, names it does not know", "\n")
try:
    Study(parts, answers={"source": "the internet"})
except ValueError as problem:
    print(problem)

# %%
folder = "capstone-fast" if fast else "capstone-study" if my_text is None else "capstone-mine"
study = Study(parts, answers, model=my_model, folder=folder, device=device, **recipe)
print(study.advice())
print("Scored, in bytes:", ", ".join(f"{part} {count:,} of {parts.size(part):,}" for part, count in study.evidence.data["scored"].items()))

# %% [markdown]
# ## The bill first
#
# One choice to begin with, one knob turned at a time, three rates for each setting, three seeds. With $r$, $\alpha$ moves too, so
# that $\alpha/r$ stays 2: values of $r$ are compared at equal scale. What will that cost here? And what would it be for GPT-2 on Colab?

# %%
settings = one_at_a_time(choice, **alternatives)
print(study.plan(settings, RATES, FULL_RATES), "\n")
print(Study.elsewhere("gpt2"))

# %%
widest = predict("13.A", ...)

# %% [markdown]
# ## Floors before LoRA
#
# *Floors* are what LoRA is measured against: the frozen base; counts of tokens and of pairs that know no grammar; full fine-tuning,
# at a rate of its own, since a rival that was not tuned proves nothing.

# %%
study.floors(FULL_RATES)
everything = study.evidence
if no_full:
    everything.data["no full fine-tuning"] = no_full
for way in ["unigram", "bigram", "frozen base", "full fine-tuning"]:
    scores = list(everything.values({"way": way}).values())
    print(f"{way:17s} {' '.join(f'{score:.4f}' for score in scores) or 'not run:'} {'bits per byte' if scores else no_full}")

# %% [markdown]
# Now LoRA. The first seed tries each setting's rates; the other seeds run at the best. If that is at the *edge*, the lowest or the
# highest that was tried, a rate beyond it is tried. The control: the same adapter, trained on the same tokens in shuffled order.

# %%
began = time.perf_counter()
study.tune(settings, RATES)
study.choose(choice)
study.control(choice)
print(f"{len(everything.runs)} runs, {time.perf_counter() - began:.0f} s")


def short(setting):
    return f"r={setting['r']}, alpha={setting['alpha']:g}, {setting['targets']}"


curves = {}
for setting in settings:
    curves[short(setting)] = [(rate, scores[study.seeds[0]]) for rate, scores in everything.rates(setting).items()]
panels = {name: {"": ([x for x, _ in points], [y for _, y in points])} for name, points in curves.items()}
show(
    plot_panels(panels, title="First seed: each setting has a rate of its own", columns=3, logx=True, height=2.3,
                xticks=[RATES[0], RATES[-1]], xlabel="learning rate", ylabel="bits per byte"),
    alt="Validation score by learning rate, a panel for each setting. "
    + "; ".join(f"{name}: " + ", ".join(f"{y:.3f} at {x:g}" for x, y in points) for name, points in curves.items()),
)

# %% [markdown]
# Which rate is the best, and may you believe it? Compare on seeds that all rates have run with; a run that diverged (nan)
# is no good run; and a best rate at the edge says: look further.

# %% exercise="13.2"
def best_rate(runs: list) -> tuple:
    """(lr, inside): the rate with the lowest mean of "validation" over the seeds that every rate
    has run with, and True if rates on both sides of it were tried.

    runs: [{"lr": 0.01, "seed": 0, "validation": 1.52, "test": 1.49}, ...] in any order; nan: diverged
    """
    ### BEGIN SOLUTION
    scores = {}
    for run in runs:
        value = run["validation"]
        scores.setdefault(run["lr"], {})[run["seed"]] = value if value == value else float("inf")
    shared = set.intersection(*(set(seeds) for seeds in scores.values()))
    lowest = min(scores, key=lambda lr: sum(scores[lr][seed] for seed in shared))
    return lowest, min(scores) < lowest < max(scores)
    ### END SOLUTION

# %% check="13.2"
check("13.2", best_rate)

# %%
best_rate = use("13.2", best_rate)
for setting in settings:
    rows = [{"lr": run.lr, "seed": run.seed, "validation": run.score, "test": None} for run in everything.of(setting)]
    rate, inside = best_rate(rows)
    assert rate == everything.tuned(setting)
    print(f"{short(setting):28s} {rate:<8g} {'inside its grid' if inside else 'at the edge'}")

groups = {short(s): list(everything.values(s).values()) for s in settings}
for way in ["full fine-tuning", "frozen base"]:
    if scores := list(everything.values({"way": way}).values()):
        groups[way] = scores
control = list(everything.values({"way": "control"}).values())
[frozen] = groups["frozen base"]
gains = {name: [1000 * (frozen - v) for v in values] for name, values in groups.items()}
show(
    plot_spread(gains, title="Each at its own rate: what is gained over the frozen base",
                xlabel="thousandths of a bit per byte", highlight=short(choice)),
    alt="Thousandths of a bit per byte gained over the frozen base on validation, seed by seed. "
    + "; ".join(f"{name}: {', '.join(f'{v:.1f}' for v in values)}" for name, values in gains.items()),
)
print("control, trained on shuffled text:", ", ".join(f"{v:.3f}" for v in control))


def width(knob):
    """How far apart the means of a knob's settings are."""
    means = []
    for s in settings:
        if all(s[k] == choice[k] for k in choice if k != knob and not (knob == "r" and k == "alpha")):
            if knob != "r" or s["alpha"] / s["r"] == choice["alpha"] / choice["r"]:
                means.append(sum(groups[short(s)]) / len(groups[short(s)]))
    return max(means) - min(means)


widths = {knob: width(knob) for knob in choice}
widest.reveal("abc"[list(choice).index(max(widths, key=widths.get))],
              "; ".join(f"{knob}: {value:.4f}" for knob, value in widths.items()) + " bits per byte apart.")

# %% [markdown]
# ## A hasty report
#
# "r = 4 is better than 1 and than 16, alpha = 8 better than 32, the MLP better than attention and than all." Five claims,
# three seeds each.

# %%
carried = predict("13.B", ...)

# %%
hasty = copy.deepcopy(everything)
PAIRS = [(knob, value) for knob, values in alternatives.items() for value in values if value != choice[knob]]
for knob, other in PAIRS:
    hasty.claim(knob, choice[knob], instead_of=other, says="better", because="It scores best in the table above.")
for objection in audit(hasty):
    print(objection, "\n")
found = {(c.about, pair[1]): hasty.difference(c.this, c.that) for c, pair in zip(hasty.claims, PAIRS)}
better = [pair for pair, (difference, half) in found.items() if difference + half < 0]
carried.reveal("a" if len(better) < 2 else "b" if len(better) < 4 else "c",
               f"{len(better)}: " + "; ".join(f"{k} against {o}: {d:+.4f} ± {h:.4f}" for (k, o), (d, h) in found.items()))

# %% [markdown]
# ## What the runs carry
#
# Three sentences are allowed. *Better*. *No worse*: the interval ends below a margin in bits per byte, fixed beforehand; a reason
# where the alternative stores more. *Not shown*: no disgrace, another reason decides.
#
# Is an alternative clearly better? Make it your choice before the look, and run again: runs are kept.

# %%
# After the runs, before the look. A sentence for each pair, what surprised you, what your evidence does not show.
WHY = {
    ("r", 1): "I stay at 4, where I began: r = 1 may be worse by up to 0.0074, three times my margin. More seeds would decide.",
    ("r", 16): "Sixteen has four times the numbers to store and to send. The gain was found on a grid of factor 2; a finer one may move it by as much.",
    ("alpha", 32): "Each alpha has a rate of its own; then it is a second name for the rate, and 8 is what I began with.",
    ("targets", "attention"): "At the same r the MLP trains 5/3 as many numbers: place and size are mixed in this one.",
    ("targets", "all"): "Fewer layers at the same r: a smaller file, a shorter step.",
}
EXPECTED = "I expected r to matter more than the targets. It came the other way round."
LIMITS = (
    "One author, 30 steps; one story to test on, and the first 7,804 bytes of one to validate on. With another validation story, or 300 steps, "
    "I might choose otherwise. The margin of 0.0025 was set after a trial run, so 'no worse' says less than it seems to. The notebook "
    "was run often while it was written: for its writers the test story is no longer unseen."
)
if not example:  # the example's reasons are not yours: write them here, {("r", 1): "a sentence", ...}; without them the audit objects
    WHY, EXPECTED, LIMITS = {}, "", ""
BY_SIZE = ["W_q and W_v", "attention", "MLP", "all"]  # numbers trained at equal r, from few to many


def costlier(knob, other):
    """Does the alternative store more? Then 'no worse' is a reason to do without it."""
    if knob == "targets":
        return BY_SIZE.index(other) > BY_SIZE.index(choice[knob])
    return knob == "r" and other > choice["r"]


for knob, other in PAIRS:
    difference, half = found[knob, other]
    says = "better" if difference + half < 0 else "not shown"
    if says == "not shown" and costlier(knob, other) and difference + half < MARGIN:
        says = "no worse"
    everything.claim(knob, choice[knob], instead_of=other, says=says, because=WHY.get((knob, other), "*Open.*"),
                     margin=MARGIN if says == "no worse" else None)
    print(f"{knob:8s} {choice[knob]} against {other}: {says}, {difference:+.4f} ± {half:.4f}")
    if says == "not shown" and difference - half > 0:
        print(f"         {other} is better: make it your choice before the look, and run again from the top")


def claim_gain(over, part, because):
    """LoRA against another way, in the word that the runs carry."""
    this, that = "LoRA", over
    difference, half = everything.difference({"way": "LoRA", **choice}, {"way": over}, part)
    if difference - half > 0:
        this, that, difference = over, "LoRA", -difference
    says = "better" if difference + half < 0 else "not shown"
    everything.claim("way", this, instead_of=that, says=says, part=part, because=because)


for way in ["frozen base", "bigram"]:
    claim_gain(way, "validation", "Whether there is a gain to defend at all.")

# %% [markdown]
# ## One look
#
# Everything is chosen. Now the test part, once: the choice with all its seeds, the floors beside it. The look is written
# down first; this cell again, with nothing changed, is the same look.
#
# This page has been run often while it was written: for us the test story is no longer unseen.

# %%
tested = study.look()
for way, scores in tested.items():
    print(f"{way:17s} {' '.join(f'{score:.4f}' for score in scores)}")
claim_gain("frozen base", "test", "On the part that this run chose nothing on, with all its seeds.")
print("\nThe audit:", *(audit(everything) or ["nothing to object to"]), sep="\n")

# %% [markdown]
# ## Can it be fooled?
#
# Four ways to make a report look better. Add a fifth.

# %%
def objections(change):
    """Keys of the objections that a change to the evidence adds."""
    forged = copy.deepcopy(everything)
    change(forged)
    return sorted({o.key for o in audit(forged)} - {o.key for o in audit(everything)})


def copy_a_seed(e):
    e.runs = [run for run in e.runs if not (run.way == "LoRA" and run.part == "validation" and run.seed != 0)]
    e.runs += [replace(run, seed=s) for run in e.runs if run.way == "LoRA" and run.part == "validation" for s in (1, 2)]


def forget_bad_rates(e):
    best = e.tuned(choice)
    e.runs = [run for run in e.runs if run not in e.of(choice) or run.lr == best]


def weak_control(e):
    e.runs = [replace(run, lr=run.lr / 100) if run.way == "control" else run for run in e.runs]


def look_again(e):
    e.runs += [replace(run, score=run.score - 0.01, look=2) for run in e.runs if run.part == "test"]


for cheat in [copy_a_seed, forget_bad_rates, weak_control, look_again]:
    print(f"{cheat.__name__:17s} {', '.join(objections(cheat)) or 'not noticed'}")

# %% [markdown]
# Numbers typed by hand are not noticed: so whoever marks runs one of your runs again, `study.recheck(evidence)`, and asks you
# about it.
#
# ## Hand in
#
# Report, evidence, adapter with its card. Never the study's whole folder: `texts.json` in it is your text.

# %%
model, tokenizer = study.final()
[text] = generate(model, tokenizer, [opening], 8 if fast else 50, strategy="sampling", temperature=0.7, top_p=0.9, seed=seed)
print(opening + text if quote else "not printed: quote is False", "\n")
out = study.folder
everything.save(out / "evidence.json")
words = {"question": question, "expected": EXPECTED, "limits": LIMITS}
write_report(everything, out / "report.md", title=title or "Capstone", words=words)
write_card(model, everything, out / "adapter", name=adapter_name, licence=licence, samples=[(opening, text)] if quote else [])
print("\n".join((out / "report.md").read_text(encoding="utf-8").split("\n")[:14]), "\n...")
print(*sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and "cells" not in p.parts), sep="\n")

# %% tags=["hidden"]
got = {way: sum(scores) / len(scores) for way, scores in tested.items()}
assert f"# {adapter_name}\n" in (out / "adapter" / "README.md").read_text(encoding="utf-8")
assert "copied_seeds" in objections(copy_a_seed) and "test_twice" in objections(look_again)
assert "rate_untuned" in objections(forget_bad_rates) and "control_differs" in objections(weak_control)
if not fast and example:
    # What the answers below quote, with room for another machine's additions.
    mean = {name: sum(values) / len(values) for name, values in groups.items()}
    for value, quoted in [
        (mean["frozen base"], 1.517), (mean["full fine-tuning"], 1.496), (mean[short(choice)], 1.496), (got["LoRA"], 1.498),
        (got["frozen base"], 1.512), (got["full fine-tuning"], 1.497), (mean[short(settings[4])], 1.507), (mean[short(settings[5])], 1.500),
    ]:
        assert abs(value - quoted) < 0.006, (value, quoted)
    assert abs(everything.values({"way": "bigram"})[None] - 2.20) < 0.01 and abs(min(control) - 2.6) < 0.05
    assert abs(everything.values({"way": "unigram"})[None] - 2.65) < 0.01
    assert study.evidence.data["scored"] == {"validation": 7_804, "test": 46_089}
    assert 0.001 < overlap(parts.train, parts.test).share < overlap(parts.train, parts.validation).share < 0.003
    assert better == [("targets", "attention"), ("targets", "all")], found
    assert abs(found["r", 16][0] - 0.0011) < 0.001 and abs(found["r", 1][0] + 0.0034) < 0.002
    assert not audit(everything), audit(everything)

# %% [markdown]
# ## Yours
#
# `my_text`, the cell below the imports, run; after the runs `WHY`, `EXPECTED`, `LIMITS`. Brief, rubric, private texts, words:
# docs/capstone.md. Hand in notebook, `report.md`, `evidence.json`, `adapter/`.

# %% [markdown] free="13.F1"
# **Data.** Three stories by Conan Doyle and the beginning of a fourth, in the public domain; nobody alive is in them. Split by story: two to train on, one to
# validate, one to test. Validation is scored on the first 7,804 bytes of its story, the test on all 46,089 of its own. Of the test's runs of 5 words 0.16 %
# stand in training, of validation's 0.23 %: idioms ("from one to the other"), as between any two stories of one author. So the scores measure continuing, not remembering. Both training stories begin "I had called upon my friend": it is one man's voice,
# and nothing here says how the adapter would do on another's.
#
# **Floors and control** (validation, bits per byte). Bigram of the training text 2.20, frozen base 1.517, full fine-tuning at its own rate 1.496, LoRA 1.496. The gain to be
# defended is 0.021, small beside what the base brought along. The control, same adapter and rate on the same tokens in shuffled order, ends at 2.60, near the
# unigram's 2.65: it has unlearned order. Word counts alone do not produce the gain; how much they add once order is kept, it does not say. Nor does it rule out
# that any old book would have helped; for that I would train on another author.

# %% [markdown] free="13.F2"
# All settings: three rates or more on seed 0, the best inside its grid, then seeds 1 and 2; same steps, same batches; ± is the half-width of a 95 % interval of
# differences within seeds. It covers luck in training, not the grid of rates, nor the text.
#
# **Targets**: MLP against all -0.0044 ± 0.0004, against attention -0.0113 ± 0.0038. Shown. At equal r the MLP has 5/3 of attention's numbers, so I claim it for this r, not for
# the place as such.
#
# **r**: with r, alpha / r stays 2; this compares r at equal scale. 16 is better by 0.0011 ± 0.0008, which is shown, too, on this grid of factor 2; one step of it moves either
# side by 0.002 or more, and a finer one may move the difference by as much as it is. It is inside a margin of 0.0025; I take a quarter of the file. The margin is this defence's weak
# spot: I set it after a trial run, so "no worse" says less than it seems to, and by the rubric that alone holds Claims at level 1. MLP and r = 4 are where I began; nothing on record
# shows that they were fixed before that trial run. Against r = 1 I have -0.0034 ± 0.0041: **not shown**. A quarter of the file would speak for 1, too. I stay at 4, since r = 1 may be worse by up to
# 0.0074, three times my margin; more seeds would decide. Nobody should believe from this that four is needed.
#
# **alpha**: 8 against 32, each at its own rate: -0.0002 ± 0.0031. Not shown, as it should be: under Adam alpha and the rate are nearly one knob (lab 03). I keep 8 because I began there.
# The evidence does not support it against anything.

# %% [markdown] free="13.F3"
# One look in this run, three seeds: base 1.512, LoRA 1.498, full fine-tuning 1.497. The page was run often while it was written, so the test story is not unseen by its writers. LoRA's
# gain on the test is 0.014 ± 0.004 (95 %), on validation it is 0.021 ± 0.007. Full fine-tuning, with three rates to choose from, lost as much (0.022 to 0.015), so most of it is probably
# another story; how much choosing added, these runs can't say. Validation is the first 7,804 bytes of one story. The look shows that thirty steps helped on one further story. It does not show how much on Doyle: seeds tell luck in training, and there
# is one document; nor what a reader would say of the text, which nobody asked.
#
# I would choose otherwise if with another validation story "all" came out ahead on all seeds, or if at 300 steps, where the rates and the need for rank may
# change, r = 16 gained more than my margin. `evidence.json` and the folder of cells let anybody run any line again (`study.recheck`).

# %% [markdown]
# ## What you have seen
#
# - One knob at a time, a rate for each setting, one look.
# - "Not shown" is an answer.
#
# **In practice**: model cards and reviews ask for this.

# %%
progress()
