"""The commands ``card`` and ``in-context``: text, JSON, files, and one sentence for errors."""

import json

import pandas as pd
import pytest
from conftest import own_bridge_of
from typer.testing import CliRunner

from tl_neuron_attr import cli
from tl_neuron_attr.cli import options

PROMPT = "The capital of France is"
SHOTS = "The capital of France is Paris. The capital of Italy is Rome. The capital of France is"
LABELS = ("--labels", " Paris", " Rome")


@pytest.fixture
def run():
    def invoke(*arguments, width=100):
        return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": str(width)})

    return invoke


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        "The capital of Italy is",
        {"text": PROMPT, "prompt_id": "france"},
        {"text": "The color"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("neuron", ["L1.N137", "L3.H2.D5@4", "L3.H2.D5"])
def test_a_card_fits_the_terminal(run, prompts, neuron, width):
    shown = run("card", neuron, PROMPT, "--prompts", str(prompts), "--top", "3", width=width)
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[0].startswith(f"{neuron}   ")
    assert max(map(len, lines)) <= width
    for words in (
        "target    ·Paris   log p ",
        "nats   rank ",
        "subvalue",
        "What it says",
        "top     raised",
        "What set it off",
        "What it sets off",
        "Through later heads",
        "Prompts where its score is largest",
        "The capital of Italy is",
    ):
        assert words in shown.stdout, words
    assert ("Where it comes from" in shown.stdout) == (".H" in neuron)


def test_a_card_as_json_and_in_files(run, prompts, tmp_path):
    out = tmp_path / "card"
    arguments = ("card", "L1.N137", PROMPT, "--prompts", str(prompts), "--head", "L4.H3")
    shown = run(*arguments, "--json", "--out", str(out))
    assert (shown.exit_code, shown.stderr) == (0, "")
    found = json.loads(shown.stdout)
    assert (found["neuron"], found["rank"], found["model"]) == ("L1.N137", 1, "tiny-facts")
    assert [(row["layer"], row["head"]) for row in found["heads"]] == [(4, 3)]
    assert [row["prompt_id"] for row in found["prompts"]][0] == "france"
    assert {row["prompt_id"] for row in found["prompts"]} == {"1", "france", "3"}
    assert found["prompts"][0]["score"] == pytest.approx(found["score"], abs=1e-5)
    assert {"card.json", "card.txt", "downstream.parquet"} <= {path.name for path in out.iterdir()}
    assert len(pd.read_parquet(out / "downstream.parquet")) == 10
    assert json.loads((out / "card.json").read_text())["rank"] == 1


def test_target_position_and_convention_reach_the_card(run):
    def card(*more):
        shown = run("card", "L1.N137", PROMPT, "--json", "--top", "2", *more)
        assert shown.exit_code == 0, shown.output
        return json.loads(shown.stdout)

    plain = card()
    assert card("--target", " Rome")["score"] != plain["score"]
    assert card("--target", " Paris", "--against", " Rome")["target"]["against"]["text"] == " Rome"
    assert card("--convention", "published")["score"] != plain["score"]
    earlier = card("--at", "4")
    assert (earlier["position"], earlier["score"], earlier["read_pos"]) == (4, None, 5)
    assert card("--position", "4")["coefficient"] == pytest.approx(earlier["coefficient"], abs=1e-5)
    ids = ",".join(map(str, (0, 60, 500)))
    by_ids = run("card", "L1.N137", "--tokens", ids, "--json")
    assert by_ids.exit_code == 0 and len(json.loads(by_ids.stdout)["tokens"]) == 3


BAD_CARDS = {
    "no such layer": (["L9.N1", PROMPT], "there is no neuron L9.N1: the model has 6 layers of 512"),
    "no such dimension": (["L1.H1.D32", PROMPT], "there is no neuron L1.H1.D32"),
    "source after the answer": (["L1.H1.D3@6", PROMPT], "source positions are 0 to 5"),
    "no label": (["best", PROMPT], "label must look like 'L9.N1234'"),
    "no such head": (
        ["L1.N1", PROMPT, "--head", "L6.H0"],
        "there is no head L6.H0: the model has 6",
    ),
    "head number": (["L1.N1", PROMPT, "--head", "L2.H4"], "there is no head L2.H4"),
    "head too early": (["L1.N1", PROMPT, "--head", "L1.H0"], "only heads of layers 2 to 5 do"),
    "no head label": (["L1.N1", PROMPT, "--head", "4"], "head label must look like"),
    "at": (["L1.N1", PROMPT, "--at", "6"], "position 6 is out of range: the answer is read at 5"),
    "no prompt": (["L1.N1"], "give a prompt, either as text or as --tokens"),
    "top of 0": (["L1.N1", PROMPT, "--top", "0"], "--top must be at least 1"),
    "convention": (["L1.N1", PROMPT, "--convention", "x"], "must be one of exact"),
    "absent prompts": (
        ["L1.N1", PROMPT, "--prompts", "absent"],
        "cannot read prompts from 'absent'",
    ),
}

BAD_PROMPTS = {
    "no JSON": ("The capital\n", "line 1 of .* must be a JSON string, or an object with a 'text'"),
    "a number": ('"a"\n3\n', "line 2 of .* must be a JSON string"),
    "no text": ('{"prompt": "a"}', "line 1 of .* must be a JSON string"),
    "unknown field": ('{"text": "a", "answer": "b"}', "has an unknown field 'answer'"),
    "empty text": ('""', "line 1 of .*: the prompt is empty"),
    "nothing": ("\n\n", "there are no prompts in"),
    "target of several tokens": ('{"text": "a", "target": " Paris Texas"}', r"is \d tokens"),
}


def one_sentence(shown, words):
    import re

    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert shown.stderr.startswith("Error: ")
    assert len(shown.stderr.strip().splitlines()) == 1
    assert re.search(words, shown.stderr), shown.stderr


@pytest.mark.parametrize("case", list(BAD_CARDS))
def test_a_bad_card_is_one_sentence_and_nothing_written(run, tmp_path, case):
    arguments, words = BAD_CARDS[case]
    one_sentence(run("card", *arguments, "--out", str(tmp_path / "out")), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", list(BAD_PROMPTS))
def test_a_bad_file_of_prompts_is_one_sentence(run, tmp_path, case):
    text, words = BAD_PROMPTS[case]
    (tmp_path / "p.jsonl").write_text(text)
    one_sentence(run("card", "L1.N1", PROMPT, "--prompts", str(tmp_path / "p.jsonl")), words)


@pytest.mark.parametrize("width", [80, 100])
def test_in_context_heads_fit_the_terminal(run, width):
    shown = run("in-context", SHOTS, *LABELS, "--top", "4", width=width)
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.stdout.splitlines())) <= width
    for words in (
        "Label 1  ·Paris at 6",
        "Label 2  ·Rome at 13",
        "Heads, the best 4 by score",
        "zeroed",
        "at the label positions",
        "6:·Paris (key)",
        "13:·Rome (key)",
        "(query)",
        "embed",
    ):
        assert words in shown.stdout, words


def test_in_context_heads_as_json_and_in_files(run, tmp_path):
    arguments = ("in-context", SHOTS, *LABELS, "--top", "3", "--no-scan", "--head", "L5.H1")
    shown = run(*arguments, "--json", "--out", str(tmp_path))
    assert (shown.exit_code, shown.stderr) == (0, "")
    found = json.loads(shown.stdout)
    assert [label["positions"] for label in found["labels"]] == [[6], [13]]
    assert len(found["heads"]) == 3 and len(found["label_positions"]) == 6
    assert [row["zeroed"] for row in found["heads"]] == [None] * 3
    assert found["head"] == "L5.H1" and len(found["inputs"]) == 12
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "heads.parquet",
        "in_context.json",
        "inputs.parquet",
        "label_positions.parquet",
        "report.html",
        "run.json",
    ]
    assert len(pd.read_parquet(tmp_path / "heads.parquet")) == 3
    # a head that is not among those listed has its positions all the same
    assert "L5.H1 at the label positions\nposition" in run(*arguments).stdout


BAD_LABELS = {
    "several tokens": ([SHOTS], r"label ' positive' is \d tokens .*give a single-token label"),
    "absent": (
        [SHOTS, "--labels", " Paris", " London"],
        r"label ' London' \(id \d+\) does not stand in the prompt up to the read position",
    ),
    "the same": ([SHOTS, "--labels", " Paris", " Paris"], "the two labels are the same token"),
    "no such head": ([SHOTS, *LABELS, "--head", "L6.H0"], "there is no head L6.H0"),
    "top of 0": ([SHOTS, *LABELS, "--top", "0"], "--top must be at least 1"),
    "no prompt": ([*LABELS], "give a prompt"),
}


@pytest.mark.parametrize("case", list(BAD_LABELS))
def test_bad_labels_are_one_sentence_and_nothing_written(run, tmp_path, case):
    arguments, words = BAD_LABELS[case]
    one_sentence(run("in-context", *arguments, "--out", str(tmp_path / "out")), words)
    assert not (tmp_path / "out").exists()


def test_nothing_is_run_before_the_request_is_known_to_be_good(run, monkeypatch):
    model = own_bridge_of("gpt2")
    monkeypatch.setattr(options, "load_model", lambda name, **options: model)
    monkeypatch.setattr(model, "run_with_hooks", lambda *a, **o: pytest.fail("the model was run"))
    one_sentence(run("card", "L1.N96", "--tokens", "1,2"), "there is no neuron L1.N96")
    one_sentence(
        run("card", "L2.N1", "--tokens", "1,2", "--head", "L2.H1"), "of which there are none"
    )
    one_sentence(run("card", "L2.N1", "--tokens", "1,2", "--at", "2"), "position 2 is out of range")
    one_sentence(run("in-context", "--tokens", "1,2"), "the model has no tokenizer")
