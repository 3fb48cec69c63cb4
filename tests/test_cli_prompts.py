"""``tl-neuron-attr prompts``: what there is, what a model knows of it, and files of both."""

import json

import pytest
from conftest import bundled_model
from typer.testing import CliRunner

from tl_neuron_attr import cli, known_prompts, load_prompts
from tl_neuron_attr.knowledge.known import Reason

ROWS = [
    dict(text="The capital of France is", answer="Paris", knowledge_type="capital"),
    dict(text="The capital of Spain is", answer="green", knowledge_type="capital"),
    dict(text="The capital of Italy is", answer="Lutetia", knowledge_type="capital"),
    dict(text="The color of snow is", answer="white", knowledge_type="tint"),
    dict(text="The capital of Norway is", answer="Paris", knowledge_type="capital"),
]


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(cli.app, ["prompts", *arguments], env={"COLUMNS": "100"})

    return invoke


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[0]]))
    return str(path)


def test_without_a_model_it_counts_what_there_is(run):
    shown = run("month")
    assert shown.exit_code == 0
    header, month, together = (line.split() for line in shown.output.splitlines()[2:5])
    assert header == ["type", "relations", "facts", "answers", "prompts"]
    prompts = load_prompts("month")
    facts = {(prompt.fact.relation, prompt.fact.subject) for prompt in prompts}
    assert month == ["month", "8", str(len(facts)), "12", f"{len(prompts):,}"]
    assert together == ["all", *month[1:]]


def test_with_a_model_it_says_what_remains_and_why_others_fell_out(run, mine):
    shown = run(mine, "--model", "tiny-facts")
    assert shown.exit_code == 0, shown.output
    for words in (
        "capital      4          3              2     1",
        "tint         1          1              1     1",
        "2 of 5 prompts kept; 1 not one token, 1 not among the top, 1 another answer",
        "answer ' Lutetia' is 3 tokens (' Lu', 'tet', 'ia')",
        "the answer ' green' has rank",
        "' Oslo', another answer of its type, is no less probable than ' Paris'",
        "1 prompts occur again and are taken once",
        "type 'tint' only one answer is one token",
    ):
        assert words in " ".join(shown.output.replace("\n", " ").split()) or words in shown.output


def test_json_holds_counts_and_every_dropped_prompt(run, mine):
    shown = run(mine, "--model", "tiny-facts", "--json", "--top", "2000")
    found = json.loads(shown.stdout)
    assert [row["knowledge_type"] for row in found["types"]] == ["capital", "tint", "all"]
    assert found["top"] == 2000 and len(found["warnings"]) == 2
    assert {row["reason"] for row in found["dropped"]} < set(Reason.__args__)


def test_out_holds_the_prompts_kept_which_can_be_asked_again(run, mine, tmp_path):
    out = tmp_path / "known.jsonl"
    assert run(mine, "--model", "tiny-facts", "--out", str(out)).exit_code == 0
    kept = load_prompts(out)
    assert [prompt.text for prompt in kept] == [ROWS[0]["text"], ROWS[3]["text"]]
    with pytest.warns(UserWarning, match="tint"):
        again = known_prompts(bundled_model(), kept)
    assert again.dropped == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["colour"], "Error: there are no prompts called 'colour'"),
        (["color", "--out", "a.csv"], "--out must be a .jsonl file, got 'a.csv'"),
        (["color", "--out", "/dev/null/a.jsonl"], "cannot write to '/dev/null'"),
        (["color", "--model", "./absent"], "no such directory: 'absent'"),
        (["color", "--model", "tiny-facts", "--top", "0"], "top must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(run, arguments, words):
    shown = run(*arguments)
    assert shown.exit_code == 2 and shown.stdout == ""
    assert words in shown.stderr.replace("\n", " ")
