"""The tasks of lab 08: data that is what it says, scores against oracles, and no training text in a test part. Nothing here trains for long."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from lora_lab.tasks import dialogue, sentences, summaries, translation, writing
from lora_lab.text_scores import rouge_n

# ---- sentences --------------------------------------------------------------------------------------------------------------------------


def test_the_grammar_accepts_what_it_makes_and_parts_are_apart():
    known, held = sentences.sentences(500, 100)
    assert len(set(known) | set(held)) == 600
    assert all(sentences.judge(text).problem == "" for text in known + held)
    assert sentences.sentences(500, 100) == (known, held)
    assert 0.2 < sum(bool(sentences.judge(text).between) for text in known) / 500 < 0.4  # 0.6 have a place, half of them of the other number


@pytest.mark.parametrize(
    ("text", "problem", "between"),
    [
        ("The dogs near an old door sleep.", "", True),
        ("The dogs near an old door sleeps.", "agreement", True),
        ("The dog near the door sleep.", "agreement", False),
        ("A man sees the dogs.", "", False),
        ("A man see the dogs.", "agreement", False),
        ("Every dogs wait.", "number", None),
        ("These dog wait.", "number", None),
        ("A old dog waits.", "a/an", False),
        ("An dog waits.", "a/an", False),
        ("The man sees an happy dog.", "a/an", False),
        ("The cat sleeps.", "word", None),
        ("The dog the door sleeps.", "order", None),
        ("The door sleeps.", "order", None),  # a place is no subject
        ("The dog sees.", "order", None),
        ("The dog sleeps", "order", None),
        ("the dog sleeps.", "order", None),
        ("The dog sleeps. The dog sleeps.", "order", None),
        ("", "order", None),
    ],
)
def test_the_grammar_says_no_and_why(text, problem, between):
    found = sentences.judge(text)
    assert (found.problem, found.between) == (problem, between)


def test_every_sentence_of_a_small_part_of_the_grammar_by_enumeration():
    """The oracle writes the rules out a second time: who agrees with whom, for all combinations of a few words."""
    articles = {"a": {1}, "an": {1}, "this": {1}, "many": {2}, "the": {1, 2}}
    nouns, verbs = {"dog": 1, "dogs": 2}, {"sleeps": 1, "sleep": 2}
    for article, adjective, noun, verb in itertools.product(articles, ("", "old ", "black "), nouns, verbs):
        vowel = (adjective or noun)[0] in "aeiou"
        right = nouns[noun] in articles[article] and nouns[noun] == verbs[verb] and (article not in ("a", "an") or (article == "an") == vowel)
        text = f"{article} {adjective}{noun} {verb}.".capitalize()
        assert (sentences.judge(text).problem == "") == right, text


def test_shuffling_keeps_the_words_and_distinct_counts():
    text = "The old dog near a river sees the birds."
    mixed = sentences.shuffled(text, random.Random(1))
    assert sorted(mixed[:-1].lower().split()) == sorted(text[:-1].lower().split()) and mixed != text
    assert sentences.distinct(["a b a b", "a b"], 2) == 2 / 4 and sentences.distinct(["a"], 2) == 0.0


# ---- translation ------------------------------------------------------------------------------------------------------------------------

# From grammars of the four languages, by hand.
NUMBERS = {
    "en": {0: "zero", 13: "thirteen", 40: "forty", 21: "twenty-one", 100: "one hundred", 999: "nine hundred ninety-nine"},
    "de": {1: "eins", 16: "sechzehn", 17: "siebzehn", 21: "einundzwanzig", 30: "dreißig", 101: "einhunderteins", 666: "sechshundertsechsundsechzig"},
    "fr": {16: "seize", 21: "vingt et un", 61: "soixante et un", 70: "soixante-dix", 71: "soixante et onze", 80: "quatre-vingts", 81: "quatre-vingt-un",
           97: "quatre-vingt-dix-sept", 100: "cent", 200: "deux cents", 201: "deux cent un", 280: "deux cent quatre-vingts"},
    "zh": {0: "零", 10: "十", 11: "十一", 20: "二十", 99: "九十九", 100: "一百", 101: "一百零一", 110: "一百一十", 111: "一百一十一", 250: "二百五十"},
}  # fmt: skip


@pytest.mark.parametrize(("language", "n", "text"), [(language, n, text) for language, known in NUMBERS.items() for n, text in known.items()])
def test_numbers_in_words(language, n, text):
    assert translation.in_words(n, language) == text


@pytest.mark.parametrize("language", NUMBERS)
def test_no_two_numbers_have_one_name(language):
    assert len({translation.in_words(n, language) for n in range(1000)}) == 1000
    for n, wrong in ((1000, language), (-1, language), (5, "xx")):
        with pytest.raises(ValueError, match="0 to 999"):
            translation.in_words(n, wrong)


def test_pairs_are_the_same_english_and_dates_come_from_cldr():
    import datetime

    found = {language: translation.pairs(language) for language in translation.LANGUAGES}
    assert len({tuple(source for source, _ in pairs) for pairs in found.values()}) == 1
    assert len(dict(found["fr"])) == len(found["fr"]) == 3000
    months = "January February March April May June July August September October November December".split()
    for source, target in [pair for pair in found["zh"] if "," in pair[0]][:200]:
        _, day, year = source.split(", ")
        month, day = day.split()
        date = datetime.date(int(year), months.index(month) + 1, int(day))
        assert target == f"{date.year}年{date.month}月{date.day}日星期{'一二三四五六日'[date.weekday()]}"
    with pytest.raises(ValueError, match="de, fr, zh"):
        translation.pairs("it")


def test_training_sees_no_test_pair_and_everything_fits():
    sources, references = translation.held_out("fr")
    task = translation.translation_task("fr", steps=1, base_steps=1)
    rows = {tuple(e.ids[: e.prompt]) for e in task.train(0).examples}
    assert not rows & {tuple(translation.prompt_ids(source)) for source in sources} and len(sources) == len(references) == 100
    assert max(len(e.ids) for language in translation.LANGUAGES for e in translation._examples(translation.pairs(language))) <= 64


def test_translate_is_greedy_search_one_at_a_time():
    """Padding on the left and the cache change nothing: the oracle asks the model anew for each letter, without either."""
    model = translation.small_gpt2(3)
    with torch.no_grad():
        # Of its own: a tied head that was never trained only says its input again.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    sources = ["zero", "Friday, December 31, 1999", "twenty-one"]
    vocabulary = translation.vocabulary()
    expected = []
    for source in sources:
        ids = translation.prompt_ids(source)
        start = len(ids)
        with torch.no_grad():
            for _ in range(12):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 0:
                    break
        expected.append("".join(vocabulary[i] for i in ids[start:]))
    assert translation.translate(model, sources, 12) == expected and len(set(expected)) > 1


def test_translation_scores():
    found = translation.translation_scores(["un", "deux"], ["un", "trois"])
    assert found["exact"] == 0.5 and 0 < found["chrF"] < 100
    assert translation.translation_scores(["un"], ["un"]) == {"exact": 1.0, "chrF": 100.0}


# ---- summaries --------------------------------------------------------------------------------------------------------------------------


def test_rouge_n_by_crossing_out():
    def oracle(text, reference, n):
        a, b = text.split(), reference.split()
        mine, theirs = [a[i : i + n] for i in range(len(a) - n + 1)], [b[i : i + n] for i in range(len(b) - n + 1)]
        common, left = 0, list(theirs)
        for gram in mine:
            if gram in left:
                left.remove(gram)
                common += 1
        return 200 * common / (len(mine) + len(theirs)) if mine or theirs else 0.0

    rng = random.Random(0)
    for n in (1, 2, 3):
        texts = [" ".join(rng.choices("abc", k=rng.randint(1, 8))) for _ in range(30)]
        wanted = [" ".join(rng.choices("abc", k=rng.randint(1, 8))) for _ in range(30)]
        assert rouge_n(texts, [[w] for w in wanted], n) == pytest.approx(sum(map(oracle, texts, wanted, [n] * 30)) / 30, rel=1e-12)
    assert rouge_n(["Return the sum."], [["the product", "return THE sum"]], 2) == 100.0
    with pytest.raises(ValueError, match="at least 1"):
        rouge_n(["a"], [["a"]], 0)


def test_documents_are_prose_and_parts_are_apart():
    documents = summaries.docstrings(("numpy",), 400)
    assert len(documents) > 100 and documents == summaries.docstrings(("numpy",), 400)
    for body, summary in documents:
        assert 4 <= len(summary.split()) <= 14 and 15 <= len(body.split()) <= 70 and summary.endswith(".") and "::" not in body + summary
    known, held = summaries.split(documents, 20, seed=1)
    assert len(known) + len(held) == len(documents) and not set(known) & set(held)
    assert not {d.body for d in known} & {d.body for d in held} and not {d.summary for d in known} & {d.summary for d in held}
    assert summaries.docstrings(("no_such_package_here",)) == ()
    with pytest.raises(ValueError, match="too few"):
        summaries.split(documents[:10], 8)


def test_a_docstring_is_read_as_people_wrote_it(tmp_path, monkeypatch):
    (tmp_path / "toy_package_08").mkdir()
    body = "Each value is weighed by how often it was seen, and those never seen\n    are left out of the sum, so that they can not pull it down."
    (tmp_path / "toy_package_08" / "__init__.py").write_text(
        f'import os\n\ndef mean(values, axis=None):\n    """Return the `mean` of all values.\n\n    {body}\n\n    Parameters\n    ----------\n    """\n'
        '\ndef short(x):\n    """Too short."""\n\ndef code(x):\n    """Return the code of this thing.\n\n    >>> code(1)\n    """\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert summaries.docstrings(("toy_package_08",)) == (summaries.Document(" ".join(body.split()), "Return the mean of all values."),)


def test_lead_1_and_scitldr(tmp_path, monkeypatch):
    assert summaries.lead_1("One thing. Then another! And so on.") == "One thing." and summaries.lead_1("No end") == "No end"
    monkeypatch.delenv("LORA_LAB_DATA", raising=False)
    assert summaries.scitldr() is None
    (tmp_path / "scitldr").mkdir()
    (tmp_path / "scitldr" / "train.jsonl").write_text('{"source": ["We do this.", "It works."], "target": ["It works.", "x"]}\n', encoding="utf-8")
    monkeypatch.setenv("LORA_LAB_DATA", str(tmp_path))
    assert summaries.scitldr() == (summaries.Document("We do this. It works.", "It works."),)


# ---- dialogue ---------------------------------------------------------------------------------------------------------------------------


def test_dialogues_keep_to_their_facts():
    known, held = dialogue.dialogues(400, 80)
    assert not {tuple(d.facts.items()) for d in known} & {tuple(d.facts.items()) for d in held}
    for d in held:
        text = "".join(part for _, part in d.turns())
        for turn, thing in enumerate(d.asked):
            assert d.prompt(turn) + f" {d.reply(turn)}\n" in text and d.prompt(turn).endswith("Keeper:")
            if thing in d.facts:
                assert thing in d.reply(turn) and d.facts[thing] in d.reply(turn) and d.reply(turn) in d.opening
            else:
                assert d.reply(turn) == dialogue.UNKNOWN and thing not in d.opening
        assert [role for role, _ in d.turns()] == ["facts", "visitor", "keeper", "visitor", "keeper"]
    unknown = sum(thing not in d.facts for d in known for thing in d.asked) / 800
    assert 0.2 < unknown < 0.3  # a quarter: 800 draws have a standard deviation of 0.015


def test_reply_scores_tell_the_two_kinds_apart():
    held = [dialogue.Dialogue({"boat": "one"}, ("boat", "boat")), dialogue.Dialogue({"boat": "two"}, ("boat", "shop"))]
    right = ["The boat leaves at one.", "I do not know."]
    assert dialogue.reply_scores(held, right) == {"right": 1.0, "honest": 1.0}
    assert dialogue.reply_scores(held, ["I do not know.", "The shop opens at two."]) == {"right": 0.0, "honest": 0.0}


def test_the_loss_is_on_the_keepers_words_alone():
    """By the string: joined, the learned tokens are the keeper's words, each ended by a new line."""
    tokenizer = writing.pocket()[1]
    known, _ = dialogue.dialogues(6, 2)
    x, y = dialogue.tensors(known)
    for d, ids, labels in zip(known, x, y, strict=True):
        kept = labels != -100
        assert torch.equal(ids[kept], labels[kept])
        assert tokenizer.decode(ids[kept]) == "".join(f" {d.reply(turn)}\n" for turn in (0, 1))
        assert tokenizer.decode(ids).removesuffix(tokenizer.eos_token).startswith("".join(text for _, text in d.turns())[:40])


def test_the_keepers_loss_is_cross_entropy_where_there_is_a_label():
    model = writing.pocket()[0]
    x, y = dialogue.tensors(dialogue.dialogues(3, 1)[0])
    with torch.no_grad():
        expected = F.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
        # float32, 4,096 words, rows in another order
        assert dialogue.keeper_loss(model, (x, y)).item() == pytest.approx(expected.item(), rel=1e-5)


# ---- what they share --------------------------------------------------------------------------------------------------------------------


def test_loss_on_is_the_mean_over_answer_tokens():
    model, tokenizer = writing.pocket()
    examples = writing.encoded(["The old man", "It was"], [" opened the door.", " cold."])
    nats, count = 0.0, 0
    for ids, start in examples:
        with torch.no_grad():
            log_p = F.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        nats -= sum(float(log_p[t - 1, ids[t]]) for t in range(start, len(ids)))
        count += len(ids) - start
    # float32 over 4,096 words, in another order
    assert writing.loss_on(model, examples, batch_size=2) == pytest.approx(nats / count, rel=1e-5)
    assert examples[0].ids[-1] == tokenizer.eos_token_id and tokenizer.decode(examples[0].ids[: examples[0].prompt]) == "The old man"


@pytest.mark.parametrize("make", [
    lambda: sentences.sentence_task(1, samples=4), lambda: sentences.sentence_task(1, samples=4, control=True),
    lambda: translation.translation_task("zh", 1, 1, 6), lambda: dialogue.dialogue_task(1, 12),
    lambda: summaries.summary_task(1, 8, summaries.docstrings(("numpy",), 400)),
], ids=["sentences", "shuffled", "zh", "dialogue", "summaries"])  # fmt: skip
def test_each_task_runs_and_leaves_the_shared_base_alone(make):
    from lora_lab.comparing import LORA, finetune_and_compare

    task = make()
    base = task.base(0)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    row = finetune_and_compare(task, [LORA], seeds=(0,), keep=()).rows[0]
    assert all(map(math.isfinite, row.scores.values())) and not row.problem and set(task.lower) <= set(row.scores)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.base(1).state_dict().items())
    assert Counter(p.requires_grad for p in base.parameters())[True] == len(list(base.parameters()))
