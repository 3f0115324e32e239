"""Data to text. Oracles: the grammar's own record of what it left out, sums over single unpadded examples, scores written out by hand."""

import hashlib
import http.server
import itertools
import math
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from lora_lab import data_to_text as d2t
from lora_lab.data_to_text import (
    DataError,
    Example,
    Task,
    TextBatches,
    encode,
    from_template,
    grouped,
    load_task,
    nearest_neighbour,
    parse_examples,
    prompt,
    read_examples,
    slots,
    tensors,
)
from lora_lab.e2e import E2E_RULES, e2e_template
from lora_lab.files import FetchError
from lora_lab.lighthouses import LIGHTHOUSE_RULES, NAMES, NEW_NAMES, _Chance, _meaning, lighthouse_template, lighthouses, tell
from lora_lab.text_scores import bleu, rouge_l, slot_error_rate, slot_errors
from lora_lab.train import token_loss, train

E2E = Path(os.environ["LORA_LAB_DATA"]) / "e2e" if os.environ.get("LORA_LAB_DATA") else None
needs_e2e = pytest.mark.skipif(E2E is None or not E2E.is_dir(), reason="LORA_LAB_DATA holds no e2e folder")


# ---- reading ----------------------------------------------------------------------------------------------------------------


def test_lines_become_examples():
    lines = ["name : The Mill | price : £ 20 - 25||The Mill , at £ 20 - 25 . \r\n", "name : A | note : ratio 3 : 2 || Text\n", "", " \n"]
    assert parse_examples(lines) == [
        Example("name : The Mill | price : £ 20 - 25", "The Mill , at £ 20 - 25 ."), Example("name : A | note : ratio 3 : 2", "Text"),
    ]
    assert slots("name : A | note : ratio 3 : 2") == {"name": "A", "note": "ratio 3 : 2"}


@pytest.mark.parametrize(("line", "words"), [
    ("name : A, no bars", ["||", "0"]), ("name : A||one||two", ["||", "2"]), ("name : A||  ", ["reference", "empty"]),
    ("||text", ["slot : value"]), ("name : A | loose||text", ["'loose'"]), ("name : A | name : B||text", ["twice", "'name'"]),
    ("name : ||text", ["slot : value"]), ("", ["||"]),
])
def test_a_broken_line_is_named_by_its_number(tmp_path, line, words):
    path = tmp_path / "mine.txt"
    path.write_text(f"name : A||fine\n{line}\nname : B||fine\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert f"{path}:2:" in str(caught.value) and all(word in str(caught.value) for word in words)


def test_files_that_hold_nothing_readable(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("name : Café||x".encode("latin-1"))
    with pytest.raises(DataError, match="no example"):
        read_examples(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="UTF-8"):
        read_examples(tmp_path / "latin.txt")


def test_references_of_one_meaning_belong_together():
    rows = [Example("b : 1", "x"), Example("a : 1", "y"), Example("b : 1", "z")]
    assert list(grouped(rows).items()) == [("b : 1", ["x", "z"]), ("a : 1", ["y"])]


# ---- where E2E comes from ---------------------------------------------------------------------------------------------------

FILES = {name: f"name : A{i} | area : riverside||A{i} is at the river .\n".encode() for i, name in enumerate(d2t.E2E_SHA256)}


@pytest.fixture
def small_e2e(monkeypatch):
    """Small files take the place of the published ones, by their checksums."""
    monkeypatch.setattr(d2t, "E2E_SHA256", {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()})
    monkeypatch.delenv("LORA_LAB_DATA", raising=False)


@pytest.fixture
def server(monkeypatch, tmp_path):
    served, asked = dict(FILES), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(served[self.path.strip("/")])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setattr(d2t, "E2E_URL", f"http://127.0.0.1:{httpd.server_port}/")
        monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "cache"))
        yield served, asked
        httpd.shutdown()


def test_it_is_downloaded_once(small_e2e, server):
    first = load_task("e2e")
    assert first.name == "e2e" and first.test == [Example("name : A2 | area : riverside", "A2 is at the river .")]
    assert sorted(server[1]) == ["/test.txt", "/train.txt", "/valid.txt"]
    assert load_task("auto").train == first.train and len(server[1]) == 3
    assert first.rules["name"].names == {"A0", "A1", "A2"}  # every name of the data can be noticed in a text


def test_a_download_with_a_wrong_checksum_leaves_nothing(small_e2e, server, tmp_path):
    server[0]["valid.txt"] = b"<html>Sign in to the university's network</html>"
    with pytest.raises(FetchError, match="sha256"):
        load_task("e2e")
    assert not list((tmp_path / "cache").rglob("*valid*")) and not list((tmp_path / "cache").rglob("*.part"))


def test_a_folder_is_used_and_its_files_are_checked(small_e2e, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "e2e"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    monkeypatch.setenv("LORA_LAB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(d2t, "fetch", None)  # nobody asks the network
    assert load_task().train == load_task("e2e", folder).train == [Example("name : A0 | area : riverside", "A0 is at the river .")]
    (folder / "test.txt").write_bytes(FILES["test.txt"] + b"\n")
    for name in ("auto", "e2e"):  # a file that was changed is no reason to take another task instead
        with pytest.raises(DataError, match="test.txt.*sha256"):
            load_task(name)
    (folder / "test.txt").unlink()
    with pytest.raises(DataError, match="test.txt"):
        load_task("e2e")


def test_without_network_there_is_the_labs_own_task_and_it_says_so(small_e2e, monkeypatch):
    def unreachable(url, *_, **__):
        raise FetchError(f"could not reach {url}")

    monkeypatch.setattr(d2t, "fetch", unreachable)
    with pytest.warns(UserWarning, match="lighthouses.*could not reach"):
        assert load_task().name == "lighthouses"
    with pytest.raises(FetchError):
        load_task("e2e")
    with pytest.raises(ValueError, match="webnlg.*lighthouses"):
        load_task("webnlg")


@needs_e2e
def test_the_papers_task(monkeypatch):
    task = load_task("e2e")
    assert [len(task.train), len(task.validation), len(task.test)] == [42061, 4672, 4693]
    meanings = list(grouped(task.test))
    assert len(meanings) == 630 and len(grouped(task.train)) == 4862 and not set(meanings) & grouped(task.train).keys()
    assert task.rules.keys() >= {slot for m in grouped(task.train) for slot in slots(m)}
    form = task.score(meanings, from_template(task, meanings))
    # a form that is filled in says everything; its 62.8 BLEU and 10 % below are what was measured, with room for a rule that is mended
    assert form["slot_error_rate"] == 0 and 61 < form["bleu"] < 64 and 65 < form["rouge_l"] < 69
    part = task.test[::9]
    # people leave out and mix up: the corpus is known for it. Were it far lower or higher, the rules would be blind or wrong
    assert 8 < slot_error_rate([slots(e.meaning) for e in part], [e.reference for e in part], task.rules) < 13


@needs_e2e
def test_the_lookup_floor_on_the_papers_task():
    task = load_task("e2e")
    meanings = list(grouped(task.test))[::6]
    found = task.score(meanings, nearest_neighbour(task, meanings))
    # 44.2 BLEU on all 630 (45.8 for another implementation); on a sixth of them the figure may be off by a few points
    assert 40 < found["bleu"] < 50 and found["slot_error_rate"] > 10


# ---- the lab's own task -------------------------------------------------------------------------------------------------------


def test_lighthouses_are_the_same_everywhere():
    """Bytes, in a process with other hash seeds, against a fixed digest: figures about this set are worth nothing if it changes unnoticed."""
    code = "import hashlib; from lora_lab.lighthouses import lighthouses; print(hashlib.sha256(repr(lighthouses()).encode()).hexdigest())"
    digests = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": s}).stdout.strip()
        for s in ("1", "2")
    }
    assert digests == {"b4dcc22d769ecb5c84f2283b1bfaeae5e1e72b7680c9494abc25398d34be0b9b"}
    assert lighthouses(20, 2, 2, seed=1) != lighthouses(20, 2, 2, seed=2)


def test_lighthouses_have_the_shape_that_is_promised():
    parts = lighthouses()
    meanings = {part: grouped(Example(*row) for row in rows) for part, rows in parts.items()}
    assert {part: len(m) for part, m in meanings.items()} == {"train": 500, "validation": 60, "test": 120}
    assert all(len(texts) == 7 for m in meanings.values() for texts in m.values())
    assert all(not meanings[a].keys() & meanings[b].keys() for a, b in itertools.combinations(meanings, 2))
    for part, found in meanings.items():
        for meaning, texts in found.items():
            assert 4 <= len(slots(meaning)) <= 8 and "name" in slots(meaning)
            assert len(set(texts)) >= 5, "references of one meaning differ"
        names = {slots(m)["name"] for m in found}
        assert names <= set(NAMES) if part == "train" else names & set(NEW_NAMES)
    texts = [text for rows in parts.values() for _, text in rows]
    assert all(re.fullmatch(r"[A-Z][\w ,;'.-]*\.", text) and "  " not in text and " ." not in text for text in texts)


def test_no_meaning_is_drawn_twice():
    """In a set so large that by chance alone several would be: 600 of the meanings with four slots, of about 30,000 that there are."""
    meanings = [meaning for rows in lighthouses(3000, 10, 600, references=1).values() for meaning, _ in rows]
    assert len(meanings) == len(set(meanings)) == 3610


def test_the_rules_find_exactly_what_a_text_leaves_out():
    """The grammar knows what it said; the rules only see the words."""
    chance = _Chance(11)
    for _ in range(1500):
        known = _meaning(chance, new=True)
        text, left_out = tell(known, chance)
        found = slot_errors(known, text, LIGHTHOUSE_RULES)
        assert (set(found.missing), found.added, found.repeated) == (set(left_out), (), ()), text
        other = {slot: value for slot, value in known.items() if slot != "visitors"}
        if "visitors" in known and "visitors" not in left_out:
            assert [a.partition(" : ")[0] for a in slot_errors(other, text, LIGHTHOUSE_RULES).added] == ["visitors"]
        assert slot_errors(known, lighthouse_template(known), LIGHTHOUSE_RULES).count == 0


def test_a_wrong_value_is_missing_and_added():
    known = {"name": "Old Meg", "tower": "red", "keeper": "nobody", "visitors": "no", "near": "Tidewell"}
    found = slot_errors(known, "Old Meg is a white lighthouse near Sandwick. A family looks after it. Visitors are welcome.", LIGHTHOUSE_RULES)
    assert set(found.missing) == {"tower", "keeper", "visitors", "near"}
    assert set(found.added) == {"tower : white", "keeper : family", "visitors : yes", "sandwick"}


def test_own_task_leaves_room_between_its_floors():
    task = load_task("lighthouses")
    meanings = list(grouped(task.test))
    form, lookup = (task.score(meanings, f(task, meanings)) for f in (from_template, nearest_neighbour))
    chance = _Chance(5)
    again = task.score(meanings, [tell(slots(m), chance)[0] for m in meanings])  # who knows the grammar: what can be had
    assert form["slot_error_rate"] == 0 and form["bleu"] < again["bleu"] - 20
    assert lookup["slot_error_rate"] > 5 * again["slot_error_rate"]


# ---- judging ------------------------------------------------------------------------------------------------------------------

MILL = {"name": "The Mill", "Type": "pub", "price": "less than £ 20", "family friendly": "no", "area": "riverside", "near": "Café Rouge"}


@pytest.mark.parametrize(("text", "missing", "added", "repeated"), [
    ("The Mill is a cheap pub by the river near Café Rouge . It is not family - friendly .", [], [], []),
    ("Mill , near Cafe Rouge on the riverside , is a low - priced bar . Children are not welcome .", [], [], []),
    ("The Mill is an adults only pub at the riverside by Café Rouge with prices under £ 20 .", [], [], []),
    ("The Mill is a pub near Café Rouge .", ["price", "family friendly", "area"], [], []),
    ("The Mill is a cheap pub by the river near Café Rouge . It is family - friendly .", ["family friendly"], ["family friendly : yes"], []),
    ("The Mill is a cheap coffee shop by the river near Café Rouge . No kids .", ["Type"], ["Type : coffee shop"], []),
    ("The Mill is a cheap pub by the river near The Bakers . It is n't child friendly .", ["near"], ["bakers"], []),
    ("The Mill is an expensive French pub by the river near Café Rouge , rated 5 out of 5 . Not for kids .", ["price"],
     ["price : more than £ 30", "food : French", "customer rating : 5 out of 5"], []),
    ("The Mill is a cheap pub by the riverside , riverside , near Café Rouge , not for families .", [], [], ["area"]),
    ("The Mill is a pub . The Mill is near Café Rouge , cheap , riverside , not family friendly .", [], [], []),
    ("The Mill is a cheap pub . The pub is near Café Rouge by the river and not family friendly .", [], [], []),
    ("The Mill is a cheap pub and restaurant by the river near Café Rouge . It is not kid friendly .", [], [], []),
    ("", ["name", "near", "Type", "price", "family friendly", "area"], [], []),
])
def test_slots_of_restaurants(text, missing, added, repeated):
    rules = d2t._with_names(E2E_RULES, [[Example("name : The Mill | near : Café Rouge", "x"), Example("name : The Eagle | near : The Bakers", "x")]])
    found = slot_errors(MILL, text, rules)
    assert (sorted(found.missing), sorted(found.added), sorted(found.repeated)) == (sorted(missing), sorted(added), sorted(repeated))
    assert found.slots == 6 and found.count == len(missing) + len(added) + len(repeated)


@pytest.mark.parametrize("value", ["cheap", "moderate", "high", "less than £ 20", "£ 20 - 25", "more than £ 30"])
@pytest.mark.parametrize("rating", ["low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"])
def test_price_and_rating_are_told_apart(value, rating):
    """Both may be "high" or "low"; the template puts them beside each other in every combination."""
    known = {"name": "The Mill", "price": value, "customer rating": rating, "family friendly": "yes"}
    assert slot_errors(known, e2e_template(known), E2E_RULES | {"name": d2t.Slot(names=frozenset({"The Mill"}))}).count == 0


def test_a_name_inside_a_longer_one_is_not_there():
    rules = {"name": d2t.Slot(names=frozenset({"The Mill", "The Mill House", "Old Mill House Inn"}))}
    found = slot_errors({"name": "The Mill House"}, "Come to the Mill House , near a windmill .", rules)
    assert found.count == 0 and slot_errors({"name": "The Mill"}, "the Old Mill House Inn", rules).added == ("old mill house inn",)


def test_error_rates_are_per_slot_and_unknown_slots_are_refused():
    known = {"name": "Old Meg", "tower": "red"}
    assert slot_error_rate([known, known], ["Old Meg is red.", "Old Meg."], LIGHTHOUSE_RULES) == 100 * 1 / 4
    with pytest.raises(ValueError, match="colour.*tower"):
        slot_errors({"name": "Old Meg", "colour": "red"}, "x", LIGHTHOUSE_RULES)


TEXTS = ["the cat sat on the mat near a very big dog", "there is a small red tower by the grey sea today"]
REFERENCES = [["The cat sat on the mat near a big dog", "a cat sat near a very big dog"], ["there is a red tower by the sea", "a tower stands by the grey sea",
              "there was a small red tower by the grey sea"]]


def bleu_by_hand(texts, references, most=4):
    """Papineni et al. 2002, equations 1-3 for a corpus: clipped n-gram matches, the closest reference length."""
    matches, totals, length, wanted = [0] * most, [0] * most, 0, 0
    for text, targets in zip(texts, references, strict=True):
        words, targets = text.lower().split(), [t.lower().split() for t in targets]
        length += len(words)
        wanted += min((abs(len(t) - len(words)), len(t)) for t in targets)[1]
        for n in range(1, most + 1):
            grams = [Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in [words, *targets]]
            allowed = Counter()
            for target in grams[1:]:
                allowed |= target
            matches[n - 1] += sum((grams[0] & allowed).values())
            totals[n - 1] += sum(grams[0].values())
    penalty = min(1.0, math.exp(1 - wanted / length))
    return 100 * penalty * math.exp(sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / most)


def test_bleu_is_the_formula_with_as_many_references_as_there_are():
    assert bleu(TEXTS, REFERENCES) == pytest.approx(bleu_by_hand(TEXTS, REFERENCES), rel=1e-12)  # the same sums of logarithms
    short = [t.rsplit(" ", 3)[0] for t in TEXTS]
    assert bleu(short, REFERENCES) == pytest.approx(bleu_by_hand(short, REFERENCES), rel=1e-12)
    assert bleu([t.upper() for t in TEXTS], REFERENCES) == bleu(TEXTS, REFERENCES)  # lower-cased
    assert bleu(["the mill,near me: a pub"], [["the mill , near me : a pub"]]) == pytest.approx(100)  # 13a splits off punctuation


@cache
def longest(a, b):
    if not a or not b:
        return 0
    return 1 + longest(a[1:], b[1:]) if a[0] == b[0] else max(longest(a[1:], b), longest(a, b[1:]))


def test_rouge_l_is_the_formula():
    wanted = []
    for text, targets in zip(TEXTS, REFERENCES, strict=True):
        words = tuple(text.lower().split())
        pairs = [(longest(words, t) / len(words), longest(words, t) / len(t)) for t in (tuple(t.lower().split()) for t in targets)]
        p, r = max(x for x, _ in pairs), max(x for _, x in pairs)
        wanted.append((1 + 1.2**2) * p * r / (r + 1.2**2 * p))
    assert rouge_l(TEXTS, REFERENCES) == pytest.approx(100 * sum(wanted) / 2, rel=1e-12)
    assert rouge_l(["a b"], [["a b", "c"]]) == pytest.approx(100) and rouge_l(["", "x"], [["a"], ["b"]]) == 0
    assert rouge_l(["A , b ."], [["a b"]]) == pytest.approx(100)


@pytest.mark.parametrize("score", [bleu, rouge_l])
@pytest.mark.parametrize(("texts", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a"], ["a reference"])])
def test_scores_refuse_lists_that_do_not_belong_together(score, texts, references):
    with pytest.raises(ValueError, match="reference"):
        score(texts, references)


def test_a_task_scores_meanings_it_has():
    task = load_task("lighthouses")
    meanings = list(grouped(task.test))[:3]
    found = task.score(meanings, [grouped(task.test)[m][0] for m in meanings])
    assert found["bleu"] == pytest.approx(100) and found["rouge_l"] == pytest.approx(100)
    with pytest.raises(ValueError, match="not in the test part"):
        task.score([task.train[0].meaning], ["x"])
    with pytest.raises(ValueError, match="3 meanings and 1 texts"):
        task.score(meanings, ["x"])


def test_the_nearest_meaning_with_its_names_swapped():
    rows = [Example("name : A Rock | tower : red | near : B Bay", "A Rock is red and near B Bay. B Bay sees A Rock."),
            Example("name : A Rock | tower : white | keeper : nobody", "A Rock is white and has no keeper.")]
    task = Task("small", rows, [], [], LIGHTHOUSE_RULES, lighthouse_template)
    # B Bay is put in for A Rock, and C Cove for B Bay: what was put in is not swapped again
    assert nearest_neighbour(task, ["name : B Bay | tower : red | near : C Cove"]) == ["B Bay is red and near C Cove. C Cove sees B Bay."]
    assert nearest_neighbour(task, ["name : D | tower : stone | keeper : nobody"]) == ["D is stone and has no keeper."]


# ---- tokens and batches -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    return load_task("lighthouses")


@pytest.fixture(scope="module")
def tokenizer(task):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([e.reference for e in task.train[::3]], vocab_size=500, special_tokens=["<|endoftext|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left",
    )


def gpt2(tokenizer, **more):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    end = tokenizer.eos_token_id
    return GPT2LMHeadModel(GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=len(tokenizer), n_positions=256, bos_token_id=end, eos_token_id=end, pad_token_id=end, **more
    ))


def test_tokens_are_meaning_end_reference_end(task, tokenizer):
    examples = task.train[:20]
    for example, (ids, start) in zip(examples, encode(examples, tokenizer), strict=True):
        end = tokenizer.eos_token_id
        assert ids == tokenizer.encode(example.meaning) + [end] + tokenizer.encode(" " + example.reference) + [end]
        assert ids[:start] == tokenizer.encode(prompt(example.meaning, tokenizer)) and ids[start - 1] == end
        assert tokenizer.decode(ids[start:-1]) == " " + example.reference


def test_the_loss_is_on_the_reference_alone_and_padding_changes_nothing(task, tokenizer):
    """Against each example by itself, without padding, log-probabilities added up by hand."""
    encoded = encode(task.train[3:60:9], tokenizer)
    assert len({len(e.ids) for e in encoded}) > 3
    model = gpt2(tokenizer).double().eval()
    total = count = 0
    for ids, start in encoded:
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids)))
        count += len(ids) - start
    batch = tensors(encoded, pad=tokenizer.eos_token_id)
    # sums of the same numbers in another order, in float64 (HF's own loss converts to float32 first)
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(total / count, rel=1e-5)
        assert float(token_loss()(model, batch)) == pytest.approx(total / count, rel=1e-5)
        # any other model than GPT-2 itself gives its logits, all of them
        assert float(token_loss(0.1)(lambda **inputs: model(**inputs), batch)) == pytest.approx(float(token_loss(0.1)(model, batch)), rel=1e-5)
    assert int((batch["labels"] != -100).sum()) == count


def test_an_example_over_the_context_is_named(task, tokenizer):
    examples = task.train[:5] + [Example(task.train[0].meaning, "very " * 300 + "long")]
    with pytest.raises(ValueError, match=r"example 6: \d+ tokens of meaning and \d+ of reference.*256"):
        encode(examples, tokenizer, context=256)
    assert len(encode(examples, tokenizer, context=2000)) == 6
    assert encode([], tokenizer) == []


def rows_of(batches):
    return Counter(tuple(i for i in row if i >= 0) for b in batches for row in b["input_ids"].tolist())


def test_every_example_once_an_epoch_with_little_padding(task, tokenizer):
    encoded = encode(task.train, tokenizer)
    batches = TextBatches(encoded, batch_size=16, seed=3, pad=-1)
    assert batches.per_epoch == math.ceil(len(encoded) / 16)
    epochs = [list(itertools.islice(batches.from_step(k * batches.per_epoch), batches.per_epoch)) for k in (0, 1)]
    for epoch in epochs:
        assert rows_of(epoch) == Counter(tuple(e.ids) for e in encoded)
    padded = sum(int((b["input_ids"] < 0).sum()) for b in epochs[0]) / sum(b["input_ids"].numel() for b in epochs[0])
    assert padded == pytest.approx(batches.padding(), abs=1e-12) and padded < 0.10
    assert TextBatches(encoded, 16, pool=1).padding() > 0.2  # what plain shuffling costs
    assert not torch.equal(epochs[0][0]["input_ids"], epochs[1][0]["input_ids"])
    widths = [b["input_ids"].shape[1] for b in epochs[0]][:40]
    # long and short batches come in any order: half of the time the next one is shorter, were it sorted never (8 is 4 standard deviations)
    assert sum(b < a for a, b in zip(widths, widths[1:], strict=False)) > 8


@pytest.mark.parametrize("start", [0, 3, 12, 13, 30])
def test_from_step_is_a_shortcut_not_another_order(task, tokenizer, start):
    batches = TextBatches(encode(task.train[:100], tokenizer), batch_size=8, seed=2, pool=3)
    before = torch.get_rng_state()
    long = list(itertools.islice(iter(batches), start, start + 15))
    for a, b in zip(long, itertools.islice(batches.from_step(start), 15), strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["labels"], b["labels"])
    assert torch.equal(before, torch.get_rng_state())


def test_batches_refuse_what_makes_no_sense(task, tokenizer):
    encoded = encode(task.train[:3], tokenizer)
    for arguments in ({"examples": []}, {"batch_size": 0}, {"pool": 0}):
        with pytest.raises(ValueError, match="no example|at least 1"):
            TextBatches(**({"examples": encoded} | arguments))


def test_a_run_on_texts_continues_bit_for_bit(task, tokenizer, tmp_path):
    from lora_lab import apply_lora

    encoded = encode(task.train[:60], tokenizer)

    def run(count=None, **more):
        model = apply_lora(gpt2(tokenizer), r=2, alpha=4, dropout=0.2, target_modules=["c_attn:q,v"])
        steps = train(model, TextBatches(encoded, 8, seed=1), 11, 1e-2, loss=token_loss(0.1), seed=5, device="cpu", **more)
        losses = [(s.step, s.loss) for s in itertools.islice(steps, count)]
        return losses, {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}

    whole, weights = run()
    file = tmp_path / "run.safetensors"
    run(7, checkpoint=file, checkpoint_every=5)
    torch.manual_seed(99)
    rest, again = run(checkpoint=file, checkpoint_every=5)
    assert rest == whole[5:] and all(torch.equal(weights[k], again[k]) for k in weights)


# ---- the recipe ---------------------------------------------------------------------------------------------------------------


def test_one_call_trains_writes_and_scores(task, tokenizer):
    from dataclasses import replace

    from lora_lab.fine_tune import PAPER, POCKET, fine_tune, score, write

    model = gpt2(tokenizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = replace(POCKET, batch_size=8, max_new_tokens=12)
    losses = [s.loss for s in fine_tune(model, tokenizer, task, recipe, steps=25, device="cpu")]
    assert sum(losses[-5:]) < sum(losses[:5]) and len(losses) == 25
    for name, value in model.state_dict().items():
        assert "lora_" in name or torch.equal(value, before[name.replace("base_layer.", "")]), name
    meanings = list(grouped(task.test))[:4]
    texts = write(model, tokenizer, meanings, recipe, batch_size=3)
    assert texts == [write(model, tokenizer, [m], recipe)[0] for m in meanings]  # the batch decides nothing
    assert score(model, tokenizer, task, recipe, meanings) == task.score(meanings, texts)
    more = [s.loss for s in fine_tune(model, tokenizer, task, recipe, steps=2, device="cpu")]  # the adapter that is there goes on
    assert more[0] < losses[0]
    assert write(model, tokenizer, meanings[:1], replace(PAPER, max_new_tokens=5, num_beams=2))


def test_the_seed_decides_where_a_begins(task, tokenizer):
    from dataclasses import replace

    from lora_lab.fine_tune import POCKET, fine_tune

    def first(seed, drawn_before):
        model = gpt2(tokenizer)
        torch.manual_seed(drawn_before)
        fine_tune(model, tokenizer, task, replace(POCKET, batch_size=2), steps=1, seed=seed, device="cpu")
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(first(3, 1), first(3, 2))
    assert not torch.equal(first(3, 1), first(4, 1))


def test_training_keeps_no_keys_and_values_for_a_next_token(task, tokenizer):
    """They would stay until the backward pass: what is saved for it is smaller without, and the loss the same."""
    model = gpt2(tokenizer).eval()  # without dropout
    batch = tensors(encode(task.train[:4], tokenizer))
    asked = []
    inner = model.transformer.forward
    model.transformer.forward = lambda *a, **k: asked.append(k.get("use_cache")) or inner(*a, **k)
    loss = token_loss()(model, batch)
    assert asked == [False]
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)  # float32: sums in another order


def test_the_papers_recipe():
    """Hu et al. 2021, table 11, and 5 epochs of 42,061 lines in batches of 8: the repository's last checkpoint is number 26,289."""
    from lora_lab.fine_tune import PAPER

    assert (PAPER.r, PAPER.alpha, PAPER.lr, PAPER.warmup, PAPER.label_smoothing, PAPER.weight_decay, PAPER.batch_size, PAPER.epochs, PAPER.num_beams,
            PAPER.no_repeat_ngram) == (4, 32, 2e-4, 500, 0.1, 0.01, 8, 5, 10, 4)
    steps = PAPER.steps(Task("size", [Example("", "")] * 42061, [], [], {}, str))
    assert abs(steps - 26289) <= 5  # they drop what is left of an epoch or carry it over


def test_a_line_over_the_context_stops_the_recipe_at_the_call(task, tokenizer):
    from lora_lab.fine_tune import POCKET, fine_tune

    model = gpt2(tokenizer)
    model.config.n_positions = 64
    with pytest.raises(ValueError, match="context is 64"):
        fine_tune(model, tokenizer, task, POCKET, steps=2)
    assert not any("lora_" in name for name, _ in model.named_parameters())  # nothing half-done
