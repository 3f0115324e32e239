# %% [markdown]
# # 08 · One method, many tasks: writing
# <!-- lab:badges -->
#
# Sentences, translations, first lines, dialogues: four tasks, one call. Each section stands alone; take those you like
# after the set-up cell.
#
# <!-- lab:opening -->

# %% tags=["parameters"]
fast = False  # True: few steps and one seed, for a quick check of the notebook
seed = 0
device = "cpu"

# %%
import torch
from IPython.display import display

from lora_lab import finetune_and_compare, lora_disabled
from lora_lab.comparing import FROZEN, LORA, PROBE
from lora_lab.course import check, hint, predict, progress, use
from lora_lab.view import plot_scores, plot_spread, plot_tokens, show

torch.set_num_threads(min(2, torch.get_num_threads()))  # small models: more threads only wait for each other
seeds = (seed,) if fast else (seed, seed + 1, seed + 2)


def spread(comparison, score, title, **more):
    """Every seed a dot."""
    groups = comparison.groups(score)
    means = "; ".join(f"{way}: {sum(v) / len(v):.2f}" for way, v in groups.items())
    show(plot_spread(groups, title=title, xlabel=score, highlight="LoRA", **more), alt=f"{score} by way. Means: {means}.")


# %% [markdown]
# ## 1 · Sentences that a grammar accepts
#
# "Coherence 85.3": by whose judgement? Here a small grammar made the sentences, so it can say no as well. The trap is
# agreement: *the **dog** near two trees **sleeps***. LoRA sits in every linear layer of the pocket GPT-2.

# %%
from lora_lab.tasks.sentences import judge, sentence_task, sentences, shuffled
from lora_lab.tasks.sentences import write as write_sentences

for text in sentences()[1][:4]:
    print(text)
for text in ["The dog near two trees sleep.", "A old king sings.", "Every dogs wait."]:
    print(f"{text:32s} {judge(text).problem}")

# %% [markdown]
# How varied is what a model writes? *distinct-n*: the different n-grams of all texts, over all their n-grams.

# %% exercise="8.1"
def distinct_n(texts: list, n: int) -> float:
    """Different n-grams of words over all n-grams, in all texts together; 0 if there is none.

    words are what stands between blanks; an n-gram is n neighbours within one text
    """
    ### BEGIN SOLUTION
    grams = []
    for text in texts:
        words = text.split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)
    ### END SOLUTION

# %% check="8.1"
check("8.1", distinct_n)

# %%
distinct_n = use("8.1", distinct_n)
task = sentence_task(steps=3 if fast else 100, samples=8 if fast else 64)
written = finetune_and_compare(task, seeds=seeds, device=device, keep=(seed,))
display(written)
spread(written, "accepted", "Sentences that the grammar accepts", percent=True, limits=(-0.02, 1.02))
n = 16 if fast else 300
texts = {way: write_sentences(written.models[way, seed], n, seed=7) for way in ["frozen base", "LoRA"]}
for way, found in texts.items():
    print(way)
    for text in found[:5]:
        print(f"   {text[:70]:72s}{judge(text).problem or 'right'}")
salad = predict("8.A", ...)

# %% [markdown]
# **A control that must fail**: the same words, the same steps, each training sentence in a random order.

# %%
control = finetune_and_compare(
    sentence_task(steps=3 if fast else 100, samples=8 if fast else 64, control=True), ways=[LORA],
    seeds=seeds[:1], device=device,
)
texts["shuffled words"] = write_sentences(control.models["LoRA", seed], n, seed=7)
texts["the data"] = sentences()[1][:n]
judged = {
    way: {"distinct-2": 100 * distinct_n(found, 2),
          "accepted": 100 * sum(judge(text).problem == "" for text in found) / len(found)}
    for way, found in texts.items()
}
show(
    plot_scores(judged, columns={"distinct-2": "distinct-2, %", "accepted": "accepted by the grammar, %"},
                highlight=["LoRA"], title="Varied is not the same as right"),
    alt="Bars. " + "; ".join(f"{way}: distinct-2 {s['distinct-2']:.0f} %, accepted {s['accepted']:.0f} %"
                             for way, s in judged.items()),
)
print("shuffled:", *texts["shuffled words"][:3], sep="\n   ")
more = (judged["shuffled words"]["distinct-2"] - judged["LoRA"]["distinct-2"]) / 100
salad.reveal("a" if more < -0.05 else "b" if more <= 0.05 else "c",
             f"{more:+.2f}, and the grammar accepts {judged['shuffled words']['accepted']:.0f} %.".replace("-", "−"))

# %% [markdown]
# **An error that LoRA still makes.** Of its sentences whose only possible fault is the verb: how often is it wrong, with
# and without a noun of the other number in between?

# %%
for between in [False, True]:
    verdicts = [judge(text) for text in texts["LoRA"]]
    asked = [v for v in verdicts if v.between is between and v.problem in ("", "agreement")]
    wrong = sum(v.problem == "agreement" for v in asked)
    print(f"{'another number in between' if between else 'nothing in between':26s} {wrong} of {len(asked)} wrong")
problems = [judge(text).problem or "right" for text in texts["LoRA"]]
print({kind: problems.count(kind) for kind in dict.fromkeys(problems)})

# %% tags=["hidden"]
if not fast:
    assert max(written.values("frozen base", "accepted")) < 0.05 < written.mean("LoRA", "accepted") - 0.2
    assert written.mean("linear probe", "accepted") < written.mean("LoRA", "accepted")
    assert judged["shuffled words"]["accepted"] < 5 and more > 0.05, judged

# %% [markdown]
# ## 2 · Dates and numbers, into German, French, Chinese
#
# A transformer of 0.1 M parameters reads English words and writes letters. It is pretrained here, on German alone, in
# seconds. LoRA then sits in all its linear layers; the head is new for every way. Dates are CLDR's.

# %%
from lora_lab.tasks.translation import german_base, held_out, translate, translation_scores
from lora_lab.tasks.translation import translation_task

small = dict(base_steps=8 if fast else 800, steps=8 if fast else 300, test=20 if fast else 100)
base = german_base(small["base_steps"])
for language in ["de", "fr", "zh"]:
    source, reference = (part[1] for part in held_out(language))
    print(f"{source}  →  {reference:30s} the base writes: {translate(base, [source])[0]}")

# %%
french = finetune_and_compare(translation_task("fr", **small), seeds=seeds, device=device, keep=(seed,))
display(french)
chinese = finetune_and_compare(translation_task("zh", **small), ways=[FROZEN, PROBE, LORA], seeds=seeds,
                               device=device, keep=(seed,))
display(chinese)
sources, references = held_out("fr", small["test"])
by_lora = translate(french.models["LoRA", seed], sources)
by_probe = translate(french.models["linear probe", seed], sources)
for k in range(4):
    print(f"{sources[k]}\n   asked  {references[k]}\n   LoRA   {by_lora[k]}\n   probe  {by_probe[k]}")
spread(french, "exact", "English to French, right to the letter", percent=True, limits=(-0.02, 1.02))
print("LoRA − probe, exact: {:+.2f} ± {:.2f}".format(*french.gap("LoRA", "linear probe", "exact")))
letters_in_common = predict("8.B", ...)

# %% [markdown]
# **A control that must fail**: every reference meets the translation of *another* source. It must be another one for
# certain, or luck scores.

# %% exercise="8.2"
def swapped(sources: list) -> list:
    """The same texts in an order in which no place has the text that stood there.

    A text may stand there several times, but never at more than half of the places
    """
    ### BEGIN SOLUTION
    order = sorted(range(len(sources)), key=lambda i: sources[i])  # equal texts side by side
    most = max(sources.count(text) for text in sources)
    out = list(sources)
    for place, taken in zip(order, order[most:] + order[:most]):
        out[place] = sources[taken]
    return out
    ### END SOLUTION

# %% check="8.2"
check("8.2", swapped)

# %%
swapped = use("8.2", swapped)
model = french.models["LoRA", seed]
right, wrong = (translation_scores(translate(model, s), references) for s in (sources, swapped(sources)))
print(f"its own source   exact {right['exact']:.0%}, chrF {right['chrF']:.1f}")
print(f"another source   exact {wrong['exact']:.0%}, chrF {wrong['chrF']:.1f}")
letters_in_common.reveal("a" if wrong["chrF"] < 20 else "b" if wrong["chrF"] <= 60 else "c",
                         f"{wrong['chrF']:.1f}: dates look alike. Read a score beside its control.")

# %% [markdown]
# **An error that LoRA still makes.** German says seven-and-twenty, French twenty-seven, and 70 is sixty-ten. Which kind
# is learned last?

# %%
kinds = {
    "dates": [any(c.isdigit() for c in source) for source in sources],
    "numbers": [not any(c.isdigit() for c in source) for source in sources],
    "numbers with 70 to 99": [any(tens in source for tens in ["seventy", "eighty", "ninety"]) for source in sources],
}
for way in ["LoRA", "full fine-tuning"]:
    texts = translate(french.models[way, seed], sources)
    hits = [text == reference for text, reference in zip(texts, references, strict=True)]
    print(way, *(f"{kind}: {sum(h for h, k in zip(hits, chosen) if k)} of {sum(chosen)}"
                 for kind, chosen in kinds.items()), sep="   ")
faults = [row for row in zip(sources, by_lora, references) if row[1] != row[2]]
for source, text, reference in faults[:8]:
    print(f"   {source:28s} {text:32s} asked: {reference}")

# %% tags=["hidden"]
if not fast:
    assert max(french.values("frozen base", "exact")) == 0 and french.mean("LoRA", "exact") > 0.3
    assert wrong["exact"] < 0.05 < right["exact"] and 20 < wrong["chrF"] < right["chrF"] - 10

# %% [markdown]
# ## 3 · The first line of a docstring
#
# Programmers write a text and one line above it. Both are on this machine: the docstrings of installed packages. LoRA
# sits in all linear layers of GPT-2. The floor is *lead-1*, the first sentence as it stands.

# %%
from lora_lab.tasks.summaries import docstrings, lead_1, scitldr, split, summarise
from lora_lab.tasks.summaries import summary_scores, summary_task

papers = False  # True: abstracts of papers, where LORA_LAB_DATA has SciTLDR
documents, size = (papers and scitldr()) or docstrings(), 12 if fast else 64
_, held = split(documents, size)
bodies, first_lines = [d.body for d in held], [d.summary for d in held]
print(f"{len(documents):,} texts. One of them:\n{held[0].body}\n→ {held[0].summary}\n")
floor = summary_scores([lead_1(body) for body in bodies], first_lines)
print("lead-1:", {name: round(value, 1) for name, value in floor.items()})
beats = predict("8.C", ...)

# %%
task = summary_task(steps=3 if fast else 50, test=size, documents=documents)
summed = finetune_and_compare(task, seeds=seeds, device=device, keep=(seed,))
display(summed)
rouge = {way: {"ROUGE-L": summed.mean(way, "ROUGE-L"), "ROUGE-2": summed.mean(way, "ROUGE-2")} for way in summed.ways}
rouge["lead-1"] = floor
show(
    plot_scores(rouge, columns={"ROUGE-L": "ROUGE-L", "ROUGE-2": "ROUGE-2"}, highlight=["LoRA"],
                title="First lines, beside the first sentence"),
    alt="Bars. " + "; ".join(f"{way}: ROUGE-L {s['ROUGE-L']:.1f}, ROUGE-2 {s['ROUGE-2']:.1f}" for way, s in rouge.items()),
)
behind = rouge["LoRA"]["ROUGE-L"] - floor["ROUGE-L"]
beats.reveal("a" if behind < -2 else "b" if behind <= 2 else "c", f"{behind:+.1f} points.".replace("-", "−"))

# %% [markdown]
# **The control that must fail**: bodies exchanged. Which ROUGE survives that, and why? **The error**: words that the body
# does not have. People need some, too; count both.

# %% exercise="8.3"
def invented(summary: str, body: str) -> float:
    r"""The share of the summary's words that do not stand in the body; 0 for a summary without a word.

    words: runs of letters and digits (re: \w+), in lower case; one that comes twice counts twice
    """
    ### BEGIN SOLUTION
    import re

    known = set(re.findall(r"\w+", body.lower()))
    words = re.findall(r"\w+", summary.lower())
    return sum(word not in known for word in words) / max(len(words), 1)
    ### END SOLUTION

# %% check="8.3"
check("8.3", invented)

# %%
invented = use("8.3", invented)
model = summed.models["LoRA", seed]
by_lora = summarise(model, bodies)
elsewhere = summarise(model, bodies[1:] + bodies[:1])  # each from the next body
for name, lines in {"LoRA": by_lora, "LoRA, another body": elsewhere, "people": first_lines}.items():
    new = sum(map(invented, lines, bodies)) / size
    score = summary_scores(lines, first_lines)
    print(f"{name:20s} ROUGE-L {score['ROUGE-L']:5.1f}   ROUGE-2 {score['ROUGE-2']:5.1f}   words from nowhere {new:.0%}")
for k in range(3):
    print(f"\n{bodies[k][:150]} ...\n   people  {first_lines[k]}\n   LoRA    {by_lora[k]}")

# %% tags=["hidden"]
if not fast:
    assert summed.mean("LoRA", "ROUGE-L") > summed.mean("frozen base", "ROUGE-L") + 5
    own, other = (summary_scores(lines, first_lines) for lines in (by_lora, elsewhere))
    assert other["ROUGE-L"] < own["ROUGE-L"] and other["ROUGE-2"] < 0.6 * own["ROUGE-2"], (own, other)

# %% [markdown]
# ## 4 · A keeper who should not make things up
#
# Facts, then turns. The second question is short: "And the shop?" Some ask for what nobody told the keeper.

# %%
from lora_lab.tasks.dialogue import UNKNOWN, dialogue_task, dialogues, replies, reply_scores

known, held = dialogues(test=24 if fast else 100)
print(*(text for _, text in held[0].turns()), sep="")

# %% [markdown]
# The model reads all; the loss counts at the keeper's tokens alone, in all of the keeper's turns.

# %% exercise="8.4"
def keeper_labels(turns: list) -> tuple:
    """-> (ids, labels), two lists of one length: every token, and the token again where it is to be learned.

    turns: (role, tokens) in order, role "facts", "visitor" or "keeper". The loss itself compares position t
    with token t + 1, and leaves out labels of -100
    """
    ### BEGIN SOLUTION
    ids, labels = [], []
    for role, tokens in turns:
        ids += tokens
        labels += tokens if role == "keeper" else [-100] * len(tokens)
    return ids, labels
    ### END SOLUTION

# %% check="8.4"
check("8.4", keeper_labels)

# %%
keeper_labels = use("8.4", keeper_labels)
from lora_lab.tasks.writing import pocket

tokenizer = pocket()[1]
turns = [(role, tokenizer(text)["input_ids"]) for role, text in held[0].turns()]
ids, labels = keeper_labels(turns)
row = [(tokenizer.decode([t]), "meaning" if label == -100 else "reference") for t, label in zip(ids, labels)]
show(
    plot_tokens([("", row)], title="Read: all of it. Learned: the keeper's words, as a reference"),
    alt="The tokens of a dialogue in boxes; those of the keeper's two replies are marked as to be learned.",
)
invents = predict("8.D", ...)

# %%
task = dialogue_task(steps=3 if fast else 60, test=len(held))
talk = finetune_and_compare(task, seeds=seeds, device=device, keep=(seed,))
display(talk)
spread(talk, "right", "Replies that the facts support", percent=True, limits=(-0.02, 1.02))
model = talk.models["LoRA", seed]
said = replies(model, held)
no_fact = [(d, text) for d, text in zip(held, said) if d.asked[1] not in d.facts]
made_up = [(d, text) for d, text in no_fact if text != UNKNOWN]
for d, text in made_up[:2] or no_fact[:2]:
    print(d.prompt(1) + " " + text + "\n")
share = len(made_up) / len(no_fact)
invents.reveal("a" if share < 0.1 else "b" if share <= 0.5 else "c", f"{len(made_up)} of {len(no_fact)}.")

# %% [markdown]
# **A control that must fail**: the keeper gets another dialogue's facts, and is judged by the true ones. **And errors
# that LoRA still makes**: above, and among the questions that the facts do answer.

# %%
from dataclasses import replace

others = [replace(d, facts=o.facts) for d, o in zip(held, held[1:] + held[:1])]
for name, texts in {"its facts": said, "others' facts": replies(model, others)}.items():
    print(f"{name:14s}", {k: f"{v:.0%}" for k, v in reply_scores(held, texts).items()})
with lora_disabled(model):
    print("adapter off   ", replies(model, held[:1])[0])
for d, text in [(d, t) for d, t in zip(held, said) if d.asked[1] in d.facts and t != d.reply(1)][:3]:
    print(f"   {d.opening.strip()}  And the {d.asked[1]}?  {text}")

# %% tags=["hidden"]
if not fast:
    assert max(talk.values("frozen base", "right")) < 0.1 and talk.mean("LoRA", "right") > 0.5
    assert reply_scores(held, replies(model, others))["right"] < 0.3 < reply_scores(held, said)["right"]

# %% [markdown]
# ## What you have seen
#
# - One call, four tasks, small files.
# - A score needs its floor and its control: variety likes word salad, chrF any date.
# - LoRA learns a form quickly. Facts, agreement at a distance and number words come last.
#
# **In practice**: report writers and help desks keep one base and an adapter for each house style.

# %%
progress()
