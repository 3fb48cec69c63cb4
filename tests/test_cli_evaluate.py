"""``tl-neuron-attr evaluate``: the numbers of the Python call, on screen, as JSON and in files."""

import importlib
import json

import pandas as pd
import pytest
from conftest import bundled_model
from typer.testing import CliRunner

from tl_neuron_attr import METHODS, cli, evaluate
from tl_neuron_attr.cli import options
from tl_neuron_attr.evaluate.evaluation import EFFECT_COLUMNS
from tl_neuron_attr.knowledge import load_prompts, save_prompts

NAMES = "France Italy Spain Germany Poland Austria Greece Norway Portugal Russia".split()


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture
def run(model, monkeypatch, tmp_path):
    monkeypatch.setattr(options, "load_model", lambda name, **options: model)
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments, columns="80"):
        return CliRunner().invoke(cli.app, ["evaluate", *arguments], env={"COLUMNS": columns})

    return invoke


@pytest.fixture
def prompts(tmp_path):
    """A file of prompts of two types, one of which has an answer of several tokens."""
    chosen = [*load_prompts("capital")[:300:60], *load_prompts("color")[:300:60]]
    save_prompts(chosen, tmp_path / "own.jsonl")
    with open(tmp_path / "own.jsonl", "a") as file:
        file.write(json.dumps({"text": "The capital of Atlantis is", "answer": "Poseidonis"}))
    return str(tmp_path / "own.jsonl")


def test_one_number_of_neurons_is_a_table_with_intervals(run, prompts, tmp_path, model):
    shown = run("--prompts", prompts, "--methods", "a,norm", "--out", "out")
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.output.splitlines())) <= 80 and "…" not in shown.output
    found = evaluate(model, prompts, "a,norm")
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "out" / "effects.parquet"), found.effects
    )
    assert [*found.effects.columns] == [*EFFECT_COLUMNS]
    summary = found.summary()
    row = summary[
        (summary["knowledge_type"] == "all")
        & (summary["method"] == "log_prob_increase")
        & (summary["metric"] == "prob")
    ].iloc[0]
    words = " ".join(shown.output.split())
    after = f"{row['after']:.3f} [{row['after_low']:.2f},{row['after_high']:.2f}]"
    assert after.replace("0.", ".") in words
    assert f"{row['prompts']} measured, of {row['prompts']} kept and 1 left out" in words
    assert "Predicted and measured change of log p" in words
    assert "wrote effects.parquet" in words
    again = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert again["after"].tolist() == pytest.approx(summary["after"].tolist())


@pytest.mark.slow
def test_several_numbers_are_curves_and_several_kinds_several_tables(run, prompts):
    shown = run(
        *("--prompts", prompts, "--methods", "a,e", "--top", "3,10", "--neurons", "ffn,both"),
        *("--by", "fact", "--limit", "3", "--seed", "2", "--correlate"),
        columns="100",
    )
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.output.split())
    assert "without the top N FFN neurons N 0 3 10 area q log_prob_increase" in words
    assert "without the top N FFN neurons and as many attention neurons" in words
    assert "95 %, over facts" in words and "3 measured" in words
    assert "Rank correlation with exact ablation" in words


def test_json_is_one_object_with_every_table(run, prompts):
    shown = run("--prompts", prompts, "--methods", "d,attribution_patching", "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert {"model", "facts", "summary", "areas", "comparisons", "calibration"} <= set(found)
    assert found["facts"]["controls"]["beside"] == "norm"
    reasons = [row["reason"] for row in found["skipped"] if row["method"] is None]
    assert len(reasons) == 1 and reasons[0].startswith("not one token")


def test_a_function_of_the_users_own_takes_part(run, prompts, tmp_path):
    (tmp_path / "own_methods.py").write_text(
        "from tl_neuron_attr import METHODS\n\n"
        "def mine(case, kind, top):\n    return -METHODS['norm'](case, kind, top)\n"
    )
    shown = run("--prompts", prompts, "--methods", "own_methods:mine,d", "--top", "2")
    assert shown.exit_code == 0, shown.output
    assert "\nmine " in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "a,z"), "there is no method 'z'"),
        (("--methods", ","), "give at least one method"),
        (("--methods", "absent:f"), "cannot import the method 'absent:f'"),
        (("--methods", "json:__doc__"), "'json:__doc__' is no function"),
        (("--neurons", "heads"), "neurons must be ffn, attn or both"),
        (("--top", "ten"), "--top must be numbers separated by commas"),
        (("--top", "0"), "must be at least 1"),
        (("--top", "99999"), "top is 99999, but the model has 3072 ffn neurons"),
        (("--limit", "0"), "limit must be at least 1"),
        (("--by", "type"), "--by must be prompt or fact"),
        (("--prompts", "absent.jsonl"), "there are no prompts called 'absent.jsonl'"),
        (("--prompts", "broken.jsonl"), "line 2 of 'broken.jsonl' is no JSON"),
        (("--prompts", "none.jsonl"), "no prompt remains: 0 of 1 prompts kept"),
        (("--prompts", "twice.jsonl"), "line 2 of 'twice.jsonl'"),
        (("--out", "broken.jsonl/x"), "is not a directory"),
    ],
)
def test_a_wrong_request_is_one_sentence(run, tmp_path, arguments, message):
    line = json.dumps({"text": "The capital of France is", "answer": "Paris"})
    (tmp_path / "broken.jsonl").write_text(f"{line}\n{{\n")
    (tmp_path / "twice.jsonl").write_text(f"{line}\n{line.replace('Paris', 'Rome')}\n")
    (tmp_path / "none.jsonl").write_text(line.replace("Paris", "Poseidonis"))
    shown = run("--methods", "d", *arguments)
    assert shown.exit_code == 2 and shown.stdout == ""
    assert message in shown.stderr and len(shown.stderr.strip().splitlines()) == 1


def test_what_could_not_be_measured_or_shown_is_said_below_the_tables(run, tmp_path):
    (tmp_path / "refusing.py").write_text(
        "from tl_neuron_attr import METHODS, InputError\n\n"
        "def picky(case, kind, top):\n"
        "    if ''.join(case.result.captured.prompt.token_texts).endswith('Italy is'):\n"
        "        raise InputError('not of Italy')\n"
        "    return METHODS['norm'](case, kind, top)\n"
    )
    known = [
        prompt
        for prompt in load_prompts("capital")
        if prompt.text in [f"The capital of {name} is" for name in NAMES]
    ]
    rows = [
        {"text": prompt.text, "answer": prompt.answer.strip(), "knowledge_type": f"type {number}"}
        for number, prompt in enumerate(known)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, rows[0]])
    (tmp_path / "own.jsonl").write_text(lines)
    arguments = ("--prompts", "own.jsonl", "--methods", "refusing:picky", "--top", "1")
    shown = run(*arguments, columns="100")
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.output.split())
    assert f"picky could not be used on 1 of {len(rows)} prompts; the first: not of Italy" in said
    assert "Warning: in 'own.jsonl', 1 prompts occur again and are taken once" in said
    assert f"and of {len(rows) - 1 - 6} more" in said


def test_all_methods_are_those_there_are():
    assert importlib.import_module("tl_neuron_attr.cli.evaluate")._methods("all") == [*METHODS]
