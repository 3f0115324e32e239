"""Claims on trial: the file is whole, the court's rule is right, every experiment says what is on record and can also say otherwise."""

import inspect
import json
import math
import random
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lora_lab import claims as court
from lora_lab.__main__ import app
from lora_lab.claims import GROUPS, VERDICTS, Finding, decide, elsewhere, find, load, markdown, table

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = list(load().values())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: two threads would wait for each other
    yield
    torch.set_num_threads(before)


# ---- every claim


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_claim_comes_out_as_on_record_and_otherwise_in_the_other_world(claim):
    ours, other = court.trial(claim.id)
    assert claim.complaints(ours) == []
    assert other.verdict in ("true", "false"), f"the other world of {claim.id} says {other.verdict}: {dict(other.measured)}"
    assert other.verdict != ours.verdict, f"{claim.id} says {ours.verdict} in both worlds: it decides nothing"
    assert other.line == ours.line and other.holds == ours.holds and other.what == ours.what, "both worlds stand before one rule"
    assert ours.what and "nan" not in claim.corrected(ours.means)


def test_there_are_enough_of_them_in_every_group():
    assert len(CLAIMS) >= 24
    assert {claim.group for claim in CLAIMS} == set(GROUPS)
    counts = {word: sum(claim.verdict == word for claim in CLAIMS) for word in VERDICTS}
    assert counts["true"] >= 3 and counts["depends"] >= 5, "who always says false must not look clever"


def test_every_experiment_belongs_to_a_claim():
    named = {(claim.group, claim.id.replace("-", "_")) for claim in CLAIMS}
    for group in GROUPS:
        module = import_module(f"lora_lab.claims.{group}")
        written = {
            name for name, f in vars(module).items()
            if inspect.isfunction(f) and f.__module__ == module.__name__ and list(inspect.signature(f).parameters) == ["otherwise"]
            and not name.startswith("_")
        }  # fmt: skip
        assert written == {name for g, name in named if g == group}


def test_every_sentence_of_the_articles_has_its_place():
    tried = [number for claim in CLAIMS for number in claim.numbers]
    placed = [entry["number"] for entry in elsewhere()]
    assert len(set(tried + placed)) == len(tried + placed), "a sentence is decided twice"
    assert set(range(1, 62)) <= set(tried + placed)
    for entry in elsewhere():
        assert ("lab" in entry) != ("open" in entry) and entry["says"] and entry["source"]
        if "lab" in entry:
            (source,) = (ROOT / "notebooks" / "source").glob(f"{entry['lab']}_*.py")
            assert f"# ## {entry['section']}\n" in source.read_text(encoding="utf-8"), entry


def test_no_number_in_a_true_sentence_is_typed_where_it_is_measured():
    """Placeholders name conditions that exist, and what is formatted from the record can be read."""
    for claim in CLAIMS:
        used = {int(n) for n in re.findall(r"\{(\d)", claim.correct)}
        assert used <= set(range(len(claim.bands))), claim.id
        assert "{" not in claim.corrected()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_the_record_itself_gives_the_verdict_on_record(claim):
    """What is written as found lies on the side of the line that the verdict says: a typing slip in the file would show."""
    ours = claim.experiment() if claim.group in ("cost", "paper", "code") else None
    if ours is not None and ours.verdict != "unsettled":
        assert decide({name: [found] for name, (_, found, _) in claim.bands.items()}, ours.line, ours.holds) == claim.verdict


# ---- the rule


def by_hand(measured, line, holds):
    """The rule in other words: look at each number, then at each condition, then at all."""
    speaks = [[(x - line) * (1 if holds == "above" else -1) > 0 for x in numbers] for numbers in measured.values()]
    if not all(len(set(votes)) == 1 for votes in speaks):
        return "unsettled"
    heads = [votes[0] for votes in speaks]
    return {(True, True): "true", (False, False): "false"}.get((all(heads), any(heads)), "depends")


def test_the_rule_agrees_with_the_rule_by_hand():
    dice = random.Random(0)
    seen = set()
    for _ in range(500):
        measured = {f"c{i}": [dice.choice([0.0, 1.0, 2.0]) for _ in range(dice.randint(1, 3))] for i in range(dice.randint(1, 3))}
        holds = dice.choice(["above", "below"])
        verdict = decide(measured, 1.0, holds)
        assert verdict == by_hand(measured, 1.0, holds)
        seen.add(verdict)
    assert seen == set(VERDICTS)


@pytest.mark.parametrize("measured", [{}, {"one": []}, {"one": [math.nan]}, {"one": [1.0, math.inf]}])
def test_what_decides_nothing_is_refused(measured):
    with pytest.raises(ValueError, match="decides nothing|at least one number"):
        decide(measured, 1.0, "above")
    with pytest.raises(ValueError, match="above"):
        decide({"one": [1.0]}, 1.0, "over")


def test_a_run_that_differs_is_told():
    claim = find("alpha-one")
    good = claim.experiment()
    assert claim.complaints(good) == []
    other = Finding({name: [1.5] for name in good.measured}, good.line, good.holds, good.what)
    told = " ".join(claim.complaints(other))
    assert "verdict is 'true', on record is 'false'" in told and "1.5 lies outside" in told
    assert "measured were" in claim.complaints(Finding({"something": [0.1]}, 1.0, "below", ""))[0] or claim.complaints(
        Finding({"something": [0.1]}, 1.0, "below", "")
    )[-1].startswith("measured were")


def test_an_experiment_leaves_the_dice_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    find("average").experiment()
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_claim_is_named():
    with pytest.raises(KeyError, match="no claim 'merge-speed'; there are factorises"):
        find("merge-speed")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"group": "gossip"}, "group 'gossip'"), ({"verdict": "maybe"}, "verdict 'maybe'"), ({"bands": {"x": [2, 1, 3]}}, "a band is"), ({"colour": 1}, "colour")],
)
def test_an_entry_that_is_not_whole_is_refused(change, says, monkeypatch):
    from lora_lab.claims import court as inside

    entry = dict(id="x", group="what", source="s", says="c", verdict="false", bands={"a": [0, 1, 2]}, otherwise="o", correct="t")
    monkeypatch.setattr(inside, "_data", lambda: {"claims": [entry | change]})
    with pytest.raises(ValueError, match=f"claim 'x'.*{says}"):
        inside.load.__wrapped__()


# ---- code as printed


def test_printed_code_runs_or_stops_where_a_fresh_interpreter_would():
    """The oracle: the same lines in a namespace of their own, on the CPU where their sizes allow it."""
    from lora_lab.claims.code import PRINTED, source

    for name in PRINTED:
        for mended in (False, True):
            text = source(name, mended).replace(".to_empty(device='cpu')", "")
            if name == "pool":
                text = text.replace("3, 224, 224", "3, 32, 32").replace("224", "32")
            space = {"torch": torch, "nn": torch.nn}
            if mended:
                exec(text, space)
            else:
                with pytest.raises((RuntimeError, IndexError, AttributeError, NameError)):
                    exec(text, space)


def test_the_package_is_asked_again_where_it_is_installed():
    package = pytest.importorskip("lora_pytorch")
    from importlib.metadata import version

    from lora_lab.claims.code import LORA_PYTORCH

    if version("lora-pytorch") != LORA_PYTORCH["version"]:
        pytest.skip("another version than the one on record")
    classes = {name for name, value in vars(package).items() if inspect.isclass(value)}
    asked = {*inspect.signature(package.LoRA.__init__).parameters, *inspect.signature(package.LoRA.from_module).parameters} - {"self"}
    own = {name for name in vars(package.LoRA) if not name.startswith("_")}
    assert classes == set(LORA_PYTORCH["exports"]) and asked == set(LORA_PYTORCH["arguments"]) and own == set(LORA_PYTORCH["attributes"])


def test_the_score_without_a_baseline_is_sklearns():
    from sklearn.metrics import f1_score

    from lora_lab.claims.bench import upright

    y = upright(0).test[1]
    ours, other = court.trial("no-baseline")
    assert ours.means["always yes"] == pytest.approx(f1_score(y != 0, torch.ones_like(y)))
    assert other.means["always yes"] == pytest.approx(f1_score(y % 2 == 0, torch.ones_like(y)))


def test_the_rank_correlation_is_kendalls():
    from scipy.stats import kendalltau

    from lora_lab.claims.comparisons import _agreement

    dice = random.Random(0)
    for _ in range(20):
        one, other = (dice.sample(range(50), 5) for _ in range(2))
        assert _agreement(one, other) == pytest.approx(kendalltau(one, other).statistic)


# ---- pages and the command


def test_the_page_is_made_from_the_file():
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == markdown(), "run `lora-lab claims --write`"
    page = markdown()
    for claim in CLAIMS:
        assert page.count(f"`{claim.id}`") == 1
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {4, 7}


def test_the_table_says_it_all():
    text = table((claim, None, None) for claim in CLAIMS)
    for claim in CLAIMS:
        assert claim.says in text and claim.corrected() in text
    assert all(title in text for title in GROUPS.values())


def call(*arguments):
    return CliRunner().invoke(app, ["claims", *arguments])


def test_the_command_prints_runs_and_writes(tmp_path, monkeypatch):
    plain = call("--group", "paper")
    assert plain.exit_code == 0 and "The paper's own figures" in plain.output and "What it costs" not in plain.output
    ran = call("--group", "paper", "--run")
    assert ran.exit_code == 0 and "the other world (p = 1): true" in ran.output
    told = json.loads(call("--group", "paper", "--run", "--json").output)
    assert [entry["id"] for entry in told] == [claim.id for claim in CLAIMS if claim.group == "paper"]
    assert all(entry["run"]["complaints"] == [] and entry["run"]["verdict"] == entry["verdict"] for entry in told)
    wrong = call("--group", "gossip")
    assert wrong.exit_code == 1 and "there is no group 'gossip'" in wrong.output
    (tmp_path / "notebooks" / "source").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert call("--write").exit_code == 0
    assert (tmp_path / "docs" / "claims.md").read_text(encoding="utf-8") == markdown()


def test_the_command_fails_when_a_run_is_not_as_on_record(monkeypatch):
    from lora_lab.claims import paper

    monkeypatch.setattr(paper, "hundredth", lambda otherwise: Finding({"r = 4 on q and v": [0.5]}, 0.015, "below", "share"))
    ran = call("--group", "paper", "--run")
    assert ran.exit_code == 1 and "NOT AS ON RECORD" in ran.output and "not as on record: hundredth" in ran.output
