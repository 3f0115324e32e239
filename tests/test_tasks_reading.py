"""The reading tasks: splits that keep groups whole, CSV files and their faults, what gives an answer away, spans, a short run of each."""

import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from test_encoder import bert_folder  # noqa: F401  (a fixture)

from lora_lab import finetune_and_compare
from lora_lab.comparing import FROZEN, FULL, LORA, PROBE
from lora_lab.encoder import load_encoder
from lora_lab.tasks import answers, records, sentiment, texts, topics
from lora_lab.tasks.texts import Texts, read_csv, text_task

TOY = Texts(tuple(f"text number {i}" for i in range(80)), tuple("ab"[i % 2] for i in range(80)), tuple(str(i // 4) for i in range(80)))


@pytest.mark.parametrize("data", [TOY, Texts(TOY.texts, TOY.labels)], ids=["groups of four", "no groups"])
def test_a_split_is_whole_and_tears_nothing_apart(data):
    for seed in range(3):
        parts = data.split(seed)
        assert sorted(i for part in parts for i in part) == list(range(80))
        assert parts == data.split(seed) and parts != data.split(seed + 1)
        assert abs(len(parts[2]) - 20) <= 4 and abs(len(parts[0]) - 48) <= 4
        if data.groups:
            sides = [{data.groups[i] for i in part} for part in parts]
            assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
        assert all({data.labels[i] for i in part} == {"a", "b"} for part in parts)


def test_scores_are_counted():
    truth, guess = [0] * 6 + [1] * 3 + [2], [0] * 5 + [1] + [1, 0, 0] + [0]
    found = texts.scores(truth, guess)
    assert found["accuracy"] == pytest.approx(6 / 10)
    assert found["recall"] == pytest.approx((5 / 6 + 1 / 3 + 0) / 3)
    assert found["F1"] == pytest.approx((2 * 5 / (6 + 8) + 2 * 1 / (3 + 2) + 0) / 3)


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


GOOD = "label,text,more\n" + "".join(f"{'yes' if i % 2 else 'no'},\"text, number {i}\",x\n" for i in range(20))


def test_a_csv_file_of_ones_own(tmp_path):
    data = read_csv(write(tmp_path / "a.csv", "\ufeff" + GOOD))  # as Excel writes it
    assert data.classes == ["no", "yes"] and data.texts[3] == "text, number 3" and data.labels[3] == "yes" and len(data.texts) == 20
    task = topics.topics_task(data, steps=1)
    result = finetune_and_compare(task, ways=(LORA,), seeds=(0,))
    assert task.name == "texts of your own" and set(result.rows[0].scores) == {"accuracy", "recall", "F1"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("label", "class"), "no column label; found class, text, more"),
        (GOOD.replace("label,text,more", "label;text"), "use ','"),
        ("", "no column label and no column text; found nothing"),
        ("text,label\n", "no rows"),
        ("text,label\n" + "a,b\n" * 9, "one label only, 'b'"),
        (GOOD.replace('"text, number 4"', " "), "row 5: the text is empty"),
        (GOOD + ",a text\n", "row 21: the label is empty"),
        (GOOD + "maybe,a text\n", "'maybe' stands beside fewer than 8"),
    ],
)
def test_csv_files_that_will_not_do(tmp_path, text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read_csv(write(tmp_path / "a.csv", text))


def test_csv_files_in_another_encoding_too_long_or_not_there(tmp_path):
    with pytest.raises(ValueError, match="not in UTF-8"):
        read_csv(write(tmp_path / "a.csv", GOOD + "yes,Bücher\n", "latin-1"))
    with pytest.raises(ValueError, match="more than 10 rows"):
        read_csv(write(tmp_path / "b.csv", GOOD), most=10)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_csv(tmp_path / "none.csv")


def test_docstrings_do_not_name_their_library():
    doc = "Compute the `DataFrame` of pandas with read_csv and np.mean, see :func:`x.y`.\nMore words (torch) here follow in a row."
    doc += "\n\nParameters\n----------\nx : int"
    assert topics.prose(doc) == "compute the of with and see more words here follow in a row."
    assert topics.prose("Too short for a class.") == ""
    data = topics.docstrings(each=12, per_file=3)
    # A text that stands in two files is kept once.
    assert set(data.labels) == set(topics.LIBRARIES.values()) and all(10 <= n <= 12 for n in Counter(data.labels).values())
    assert data is topics.docstrings(each=12, per_file=3) and len(set(data.texts)) == len(data.texts)
    for text, group, label in zip(data.texts, data.groups, data.labels, strict=True):
        words = text.replace(".", "").split()
        assert not set(words) & topics.NAMES and not re.search(r"[_`(\d]", text) and 10 <= len(words) <= 40
        assert topics.LIBRARIES[group.split("/")[0]] == label
    assert max(Counter(data.groups).values()) <= 3


def test_sentences_are_those_of_the_card():
    data, kinds = sentiment.sentences()
    assert Counter(data.labels) == {"positive": 143, "negative": 143} and len(set(data.texts)) == 286
    assert Counter(kinds) == {"plain": 180, "negation": 50, "turn": 36, "irony": 20}
    for pair, n in Counter(data.groups).items():
        labels = [label for label, g in zip(data.labels, data.groups, strict=True) if g == pair]
        assert n == (1 if pair.startswith("irony") else 2) and len(set(labels)) == n


def test_twins_torn_apart_mislead_a_counter_of_words():
    data, _ = sentiment.sentences()
    torn = texts.bag_of_words(Texts(data.texts, data.labels), range(4))["accuracy"]
    whole = texts.bag_of_words(data, range(4))["accuracy"]
    assert np.mean(torn) < 0.45 < np.mean(whole)


def test_the_drill_is_balanced_and_holds_no_test_sentence():
    drill = sentiment.drill(200)
    assert Counter(drill.labels) == {"positive": 100, "negative": 100} and drill == sentiment.drill(200)
    assert not set(drill.texts) & set(sentiment.sentences()[0].texts)
    assert not set(sentiment.GOOD) & set(sentiment.BAD)
    # Without a negation or a turn, a sentence's words of judgement are of its own side.
    for text, label in zip(drill.texts, drill.labels, strict=True):
        if not re.search(r"\b(not|never|but|then)\b", text):
            assert not set(re.findall(r"\w+", text)) & set(sentiment.BAD if label == "positive" else sentiment.GOOD)
    task = sentiment.sentiment_task(drilled=200, steps=1)
    train = task.train(0)
    assert len(train.x) == 200 + len(sentiment.sentences()[0].split(0)[0])


def test_records_mirror_each_other():
    def bag(text):
        return Counter(re.findall(r"[a-z]+", text.lower()))

    for a, b in zip(records.WORDINGS["side effect"], records.WORDINGS["treated"], strict=True):
        assert bag(a) == bag(b) and a != b
    data, new = records.records(120), records.records(60, wordings="unseen")
    assert Counter(data.labels) == dict.fromkeys(records.WORDINGS, 40) and data == records.records(120)
    for text, drug in zip(data.texts, data.groups, strict=True):
        assert drug in text.lower() and sum(c in text.lower() for c in records.COMPLAINTS) == 1
    parts = records.records().split(1)
    names = [{records.records().groups[i] for i in part} for part in parts]
    assert not names[0] & names[2] and len(names[2]) >= 3
    known = {text for wordings in records.WORDINGS.values() for text in wordings}
    assert not known & {text for wordings in records.UNSEEN.values() for text in wordings} and new.classes == data.classes
    for label, text in zip(new.labels, new.texts, strict=True):
        forms = [re.escape(w).replace(r"\{D\}", r"\w+").replace(r"\{S\}", r"\w+") for w in records.UNSEEN[label]]
        assert any(re.search(form, text, re.IGNORECASE) for form in forms), text
    with pytest.raises(ValueError, match="'known' or 'unseen'"):
        records.records(3, wordings="new")


def test_an_answer_stands_where_it_is_said_to_stand():
    rows = answers.questions(200)
    assert Counter(q.kind for q in rows) == dict.fromkeys(answers.KINDS, 50)
    for q in rows:
        assert q.passage[q.start : q.start + len(q.answer)] == q.answer and q.passage.count(q.answer) == 1
    _, tokenizer = load_encoder()
    ids, spans = answers.places(tokenizer, rows, 64)
    found = [tokenizer.decode(row[a : b + 1]) for row, (a, b) in zip(ids, spans.tolist(), strict=True)]
    assert found == [q.answer for q in rows]
    with pytest.raises(ValueError, match="cut off at 16"):
        answers.places(tokenizer, rows, 16)


def test_the_best_span_by_trying_all():
    rng = random.Random(0)
    logits = torch.randn(30, 9, 2, generator=torch.Generator().manual_seed(0))
    logits[:, 7:] = -torch.inf  # padding
    for longest in (1, 3, 9):
        for row, (a, b) in zip(logits, answers.best_spans(logits, longest).tolist(), strict=True):
            pairs = [(i, j) for i in range(7) for j in range(i, min(i + longest, 7))]
            rng.shuffle(pairs)
            assert (a, b) == max(pairs, key=lambda p: row[p[0], 0].item() + row[p[1], 1].item())


def test_exact_match_and_f1():
    assert answers.exact_match("The Lamp!", "lamp") == 1 and answers.exact_match("lamps", "lamp") == 0
    assert answers.overlap_f1("in old london", "london") == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert answers.overlap_f1("lamp lamp", "lamp lamp lamp") == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert answers.overlap_f1("york", "rome") == 0 and answers.overlap_f1("a lamp lamp", "lamp") == pytest.approx(2 / 3)


def test_the_controls_keep_passage_and_answer():
    rows = answers.questions(40)
    for change in (answers.swapped(rows), answers.without_question(rows)):
        assert [(q.passage, q.answer, q.start) for q in change] == [(q.passage, q.answer, q.start) for q in rows]
    assert Counter(q.question for q in answers.swapped(rows)) == Counter(q.question for q in rows)
    assert sum(a.question == b.question for a, b in zip(answers.swapped(rows), rows, strict=True)) < 8


def test_a_model_that_marks_the_question_has_no_answer():
    rows = answers.questions(4)
    _, tokenizer = load_encoder()
    model = torch.nn.Module()
    model.forward = lambda ids: torch.nn.functional.one_hot(torch.full((len(ids), 2), 1), ids.shape[1]).float().transpose(1, 2)
    assert answers.answer(model, tokenizer, rows) == [""] * 4


@pytest.mark.parametrize("make", [lambda: records.records_task(steps=2), lambda: answers.answers_task(n=60, steps=2)], ids=["records", "answers"])
def test_a_short_run_of_every_way(make):
    task = make()
    result = finetune_and_compare(task, ways=(FROZEN, PROBE, LORA, FULL), seeds=(0,))
    rows = {row.way: row for row in result.rows}
    r, d, n, k = task.r, 128, 4 * len(task.targets), 2 if task.name.startswith("questions") else 3
    assert rows["frozen base"].trainable == 0
    assert rows["linear probe"].trainable == k * d + k
    assert rows["LoRA"].trainable == n * 2 * r * d + k * d + k
    assert rows["full fine-tuning"].trainable == rows["full fine-tuning"].total
    again = finetune_and_compare(make(), ways=(LORA,), seeds=(0,))
    assert again.rows[0].scores == rows["LoRA"].scores


def test_a_bert_of_the_users_own_goes_the_same_way(bert_folder):  # noqa: F811
    task = text_task("own", TOY, encoder=bert_folder, steps=2, r=3)
    row = finetune_and_compare(task, ways=(LORA,), seeds=(0,)).rows[0]
    assert row.trainable == 2 * 2 * (3 * 24 + 24 * 3) + 2 * 24 + 2
    with pytest.raises(FileNotFoundError):
        text_task("own", TOY, encoder=bert_folder / "nothing")
