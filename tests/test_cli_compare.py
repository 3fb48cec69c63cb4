"""The commands compare and heads: what a reader sees, what a program reads, what is refused."""

import json

import pandas as pd
import pytest
from conftest import bundled_model
from typer.testing import CliRunner

from tl_neuron_attr import (
    Head,
    Zeroed,
    attribute,
    cli,
    compare,
    head_scan,
)
from tl_neuron_attr.tables import COMPARED_NEURON_COLUMNS

PROMPT = "The capital of France is"
ADDED = ["source_token", "other_source_token", "raises", "lowers"]


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "100"})

    return invoke


def test_a_comparison_prints_everything_a_reader_needs(run):
    shown = run("compare", PROMPT, "--zero", "L0.H2,L1.N3", "--top", "4", "--lowest")
    assert shown.exit_code == 0, shown.output
    for words in (
        "Tokens  0:<|endoftext|>  1:The  2:·capital",
        "Target  ·Paris (id ",
        "Compared  with the same prompt without L0.H2, L1.N3",
        "at the original's norm scale",
        "layer  attention",
        "Heads, the largest 4",
        "FFN neurons that score more here than there, the first 4",
        "Attention neurons that score more here than there",
        "FFN neurons that score less here than there",
        "bounds exclude the others",
    ):
        assert words in " ".join(shown.output.split("\n")), words
    assert max(len(line) for line in shown.output.splitlines()) <= 100
    for line in shown.output.splitlines():
        if line.startswith("neuron") and "diff." in line:
            assert "raises" in line and "lowers" in line and line.count("other") == 2


def test_json_has_the_tables_of_the_comparison(run):
    shown = run(
        "compare", PROMPT, "--other-prompt", "The capital of Spain is", "--top", "5", "--json"
    )
    assert shown.exit_code == 0 and shown.stderr == ""
    found = json.loads(shown.stdout)
    result = attribute(bundled_model(), PROMPT, top=1)
    comparison = compare(result, "The capital of Spain is", top=5)
    for kind in ("ffn", "attn"):
        rows = [row for row in found["neurons"] if row["kind"] == kind]
        assert [*rows[0]] == [*COMPARED_NEURON_COLUMNS, *ADDED]
        table = comparison.neurons(kind)
        assert [row["difference"] for row in rows] == pytest.approx(table["difference"].tolist())
        assert found["certificates"][kind] == comparison.certificates()[kind]
    assert found["other"]["tokens"][4] == " Spain" and "lowest" not in found
    assert found["other"]["own_log_prob"] == pytest.approx(comparison.own_log_prob, abs=1e-5)
    assert len(found["layers"]) == 12 and len(found["heads"]) == 24


def test_a_contrast_on_another_checkpoint_with_an_index_is_written_to_files(run, tmp_path):
    arguments = ("compare", PROMPT, "--target", " Paris", "--against", " Rome")
    shown = run(
        *arguments,
        *("--other-model", "tiny-facts", "--other-prompt", "The capital of Italy is"),
        *("--index", str(tmp_path / "index"), "--out", str(tmp_path / "out"), "--kind", "attn"),
    )
    assert shown.exit_code == 0, shown.output
    assert "difference of log p = " in shown.output
    assert "a contrast is linear" in shown.output
    assert "FFN neurons" not in shown.output
    table = pd.read_parquet(tmp_path / "out" / "neurons.parquet")
    assert [*table.columns] == [*COMPARED_NEURON_COLUMNS, *ADDED] and len(table) == 600
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["other"]["what"].endswith("on the prompt 'The capital of Italy is'")
    assert facts["certificates"]["attn"]["linear"]


def test_recomputed_scores_are_said_to_be_all_scored(run):
    shown = run("compare", PROMPT, "--zero", "L5.N3", "--convention", "recomputed", "--top", "2")
    assert shown.exit_code == 0, shown.output
    assert "(all 3,072 scored in both runs)" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what to compare with: --zero L3.H2, --other-prompt TEXT or --other-model NAME"),
        (("--zero", "L0.H1", "--other-prompt", "a"), "give --zero alone"),
        (("--zero", "L0.H1", "--other-model", "a"), "give --zero alone"),
        (("--zero", "L0"), "label must look like 'L9.H3', 'L9.N1234'"),
        (("--zero", "L6.H0"), "there is no head L6.H0: the model has 6 layers of 4 heads"),
        (("--zero", "L0.H4"), "there is no head L0.H4: the model has 6 layers of 4 heads"),
        (("--other-prompt", "The capital"), "the original is 6 tokens, the other 3"),
        (("--zero", "L0.H1", "--kind", "mlp"), "--kind must be ffn or attn, got 'mlp'"),
        (("--zero", "L0.H1", "--top", "0"), "--top must be at least 1"),
        (
            ("--zero", "L0.H1", "--convention", "recomputed", "--index", "i"),
            "an index is of no use",
        ),
    ],
)
def test_a_wrong_request_is_one_sentence(run, arguments, message):
    shown = run("compare", PROMPT, *arguments)
    assert shown.exit_code == 2 and shown.stdout == ""
    assert message in shown.stderr and len(shown.stderr.strip().splitlines()) == 1


def test_markup_in_the_other_prompt_is_shown_not_obeyed(run):
    shown = run("compare", "[bold]a", "--other-prompt", "[red]b\x1b", "--top", "1")
    if shown.exit_code == 0:
        assert "[red]b" in shown.output
    else:
        assert "different length" in shown.stderr
    assert "\x1b[31m" not in shown.output


def test_the_head_scan_is_printed_and_written(run, tmp_path):
    shown = run("heads", PROMPT, "--top", "3", "--out", str(tmp_path))
    assert shown.exit_code == 0, shown.output
    assert "the lowest 3 of 24" in " ".join(shown.output.split())
    assert max(len(line) for line in shown.output.splitlines()) <= 100
    result = attribute(bundled_model(), PROMPT, top=1)
    changes = head_scan(result.host, result.captured, result.target)
    table = pd.read_parquet(tmp_path / "heads.parquet")
    assert [*table.columns] == ["layer", "head", "change", "score"]
    assert table["change"].tolist() == pytest.approx(changes.flatten().tolist(), abs=1e-5)
    assert table["score"].tolist() == pytest.approx(result.head_scores.flatten().tolist())
    worst = divmod(int(changes.argmin()), 4)
    lines = shown.output.splitlines()
    first = next(line for number, line in enumerate(lines) if lines[number - 1].startswith("head "))
    assert first.startswith(str(Head(*worst)))
    found = json.loads(run("heads", PROMPT, "--json").stdout)
    assert [row["change"] for row in found["heads"]] == pytest.approx(
        table["change"].tolist(), abs=1e-5
    )
    assert json.loads((tmp_path / "run.json").read_text())["prompt"] == PROMPT


def test_the_head_scan_agrees_with_comparing_without_the_head():
    result = attribute(bundled_model(), PROMPT, top=1)
    changes = head_scan(result.host, result.captured, result.target)
    comparison = compare(result, Zeroed((Head(0, 2),)), top=1)
    assert comparison.own_log_prob - result.log_prob == pytest.approx(
        float(changes[0, 2]), abs=1e-5
    )


def test_a_wrong_scan_is_one_sentence(run):
    for arguments, message in (
        (("heads",), "give a prompt"),
        (("heads", PROMPT, "--top", "0"), "--top must be at least 1"),
        (("heads", PROMPT, "--target", "Paris"), "target 'Paris' is"),
    ):
        shown = run(*arguments)
        assert shown.exit_code == 2 and shown.stdout == "" and message in shown.stderr
