"""``tl-neuron-attr query``, and query neurons in the output of ``attribute``."""

import json
import re
import warnings

import pandas as pd
import pytest
import torch
from conftest import (
    FAMILIES,
    SHARED,
    TOKENS,
    bridge_of,
    count_forward_passes,
    leaving_the_random_state,
    own_bridge_of,
)
from test_golden import assert_same_ranking
from typer.testing import CliRunner

from tl_neuron_attr import attribute, cli, load_model, reading
from tl_neuron_attr.cli import options
from tl_neuron_attr.tables import NEURON_COLUMNS

SAVED_COLUMNS = [*NEURON_COLUMNS, "position", "source_token", "raises", "lowers"]
PROMPT = "The capital of France is"
GOLDEN = sorted((SHARED / "golden").glob("*-*.json"))
FILES = ["query_heads", "query_layers", "query_neurons", "query_values"]
IDS = ["layer", "head", "index", "source_pos"]

pytestmark = pytest.mark.usefixtures("pages_undrawn")

loaded = {}


@leaving_the_random_state
def load(name, **options):
    """Each model once: a bundled one, one of the shared ones, or a random one of a family."""
    if name not in loaded:
        loaded[name] = bridge_of(name) if name in FAMILIES else load_model(name)
    return loaded[name]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(options, "load_model", load)

    def invoke(*arguments, columns=100):
        given = [str(argument) for argument in arguments]
        return CliRunner().invoke(cli.app, given, env={"COLUMNS": str(columns)})

    return invoke


@pytest.fixture
def written(run, tmp_path):
    """What a command writes: its tables by name, and run.json as ``run``."""

    def invoke(*arguments):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        shown = run(*arguments, "--out", out)
        assert shown.exit_code == 0, shown.output
        found = {path.stem: pd.read_parquet(path) for path in out.glob("*.parquet")}
        found["run"] = json.loads((out / "run.json").read_text())
        return found

    return invoke


def asked(family="gpt2"):
    return "--model", family, "--tokens", ",".join(map(str, TOKENS)), "--target-id", 7


# --- as published -----------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN, reason=f"no published outputs: {SHARED / 'golden'} is absent")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_lists_are_what_the_command_writes(path, written):
    golden = json.loads(path.read_text())
    request = (
        *("query", "--model", SHARED / "models" / golden["model"]),
        *("--tokens", ",".join(map(str, golden["token_ids"]))),
        *("--target-id", golden["target_id"], "--convention", "published"),
    )
    for kind in ("ffn", "attn"):
        wanted = golden[f"query_layers_for_{kind}"]
        found = written(*request, "--for", kind, "--value-top", wanted["top_value_neurons"])
        layers = found["query_layers"]
        tolerance = 1e-4 * max(map(abs, wanted["scores"]))
        assert layers["score"].tolist() == pytest.approx([*wanted["scores"], 0.0], abs=tolerance)
        n_layers = len(layers) // 2 - 1
        kinds = [(layer, kind) for layer in range(n_layers) for kind in ("attn", "ffn")]
        rows = [(row.layer, row.kind) for row in layers.itertuples()]
        assert rows[1:-1] == kinds
        assert [kind for _, kind in (rows[0], rows[-1])] == ["embed", "bias"]
        assert rows[0][0] is rows[-1][0] is pd.NA
    found = written(*request)["query_neurons"]  # of the best 30 attention neurons, unasked
    wanted = golden["query_ffn_neurons_top"]
    assert len(found) >= len(wanted)
    assert_same_ranking(found[["layer", "index", "score"]].values.tolist(), wanted)


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["exact", "published", "recomputed"])
@pytest.mark.parametrize("values", ["ffn", "attn", "both"])
def test_files_are_what_python_finds(written, values, convention):
    found = written(
        *("query", *asked("llama"), "--for", values, "--value-top", 12, "--kind", "both"),
        *("--convention", convention, "--top", 40),
    )
    result = attribute(load("llama"), TOKENS, target=7, top=12, convention=convention)
    asked_of = {"of": values, "top_values": 12}
    assert sorted(found.keys() - {"run"}) == FILES
    pd.testing.assert_frame_equal(found["query_layers"], result.query_layers(**asked_of))
    pd.testing.assert_frame_equal(found["query_heads"], result.query_heads(**asked_of))
    pd.testing.assert_frame_equal(found["query_values"], result.query_values(**asked_of))
    wanted = [result.query_neurons(40, kind, **asked_of) for kind in ("ffn", "attn")]
    wanted = pd.concat(wanted, ignore_index=True)
    saved = found["query_neurons"]
    pd.testing.assert_frame_equal(pd.DataFrame(saved, columns=wanted.columns), wanted)
    assert [*saved.columns[-4:]] == ["position", "source_token", "raises", "lowers"]
    assert all(len(tokens) == 10 for tokens in saved["raises"])
    # without a norm in between the best attention neurons are those of layer 0
    assert len(wanted) == (0 if (values, convention) == ("attn", "recomputed") else 80)
    facts = found["run"]
    scores = result.query_scores(**asked_of)
    assert facts["query"] == {
        "for": values,
        "value_top": 12,
        "kind": "both",
        "convention": "published" if convention == "published" else "exact",
        "value_neurons": 24 if values == "both" else 12,
        "ill_conditioned": int(scores.ill_conditioned.sum()),
        "left_out": int(scores.left_out.sum()),
    }
    assert (facts["convention"], facts["tokens"]) == (convention, list(TOKENS))


def test_query_neurons_have_the_columns_of_neurons(written):
    ours = written("query", PROMPT, "--kind", "both", "--top", 3)["query_neurons"]
    theirs = written("attribute", PROMPT, "--top", 3)["neurons"]
    assert [*ours.columns] == [*theirs.columns] == SAVED_COLUMNS
    assert (ours.dtypes == theirs.dtypes).all()
    assert ours["role"].tolist() == ["query"] * 6
    assert ours["rank"].tolist() == [1, 2, 3] * 2


def test_files_hold_300_query_neurons_unless_asked_otherwise(written):
    found = written("query", PROMPT)
    assert found["query_neurons"]["kind"].tolist() == ["ffn"] * 300
    assert found["run"]["query"]["value_top"] == 30


def test_chosen_value_neurons_take_the_place_of_the_best(written):
    found = written("query", *asked(), "--of", "L2.N5, L1.H1.D2@3,L2.N5")
    result = attribute(load("gpt2"), TOKENS, target=7, top=1)
    of = ["L2.N5", "L1.H1.D2@3"]
    pd.testing.assert_frame_equal(found["query_layers"], result.query_layers(of))
    pd.testing.assert_frame_equal(found["query_neurons"], result.query_neurons(of=of, tokens=10))
    assert found["run"]["query"]["of"] == ["L2.N5", "L1.H1.D2@3", "L2.N5"]
    assert found["run"]["query"]["value_neurons"] == 2
    assert "for" not in found["run"]["query"]


@pytest.mark.parametrize("neuron", ["L0.H1.D2@3", "L0.N3"])
def test_before_layer_0_is_the_embedding_and_no_ffn(run, written, neuron):
    found = written("query", *asked(), "--of", neuron)
    full = written("query", *asked(), "--of", "L2.N3")
    empty = found["query_neurons"]
    assert empty.empty
    assert [*empty.columns] == SAVED_COLUMNS
    assert (empty.dtypes == full["query_neurons"].dtypes).all()
    layers = found["query_layers"].set_index(["kind"])["score"]
    assert layers["embed"] != 0
    assert (layers["ffn"] == 0).all()
    attention = found["query_layers"].query("kind == 'attn'")["score"].tolist()
    assert (attention[0] != 0) == (".N" in neuron)  # an FFN neuron reads its own layer's attention
    assert attention[1:] == [0.0, 0.0]
    shown = run("query", *asked(), "--of", neuron)
    assert shown.exit_code == 0
    assert "FFN query neurons: none comes before the value neurons" in shown.stdout
    assert ("Heads, the best 3" in shown.stdout) == (".N" in neuron)
    assert "L1.H0" not in shown.stdout
    assert (
        json.loads(run("query", *asked(), "--of", neuron, "--json").stdout)["query_neurons"] == []
    )


# --- screen and JSON --------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 100])
def test_the_screen_has_everything_a_reader_needs(run, columns):
    shown = run("query", PROMPT, "--for", "both", "--kind", "both", columns=columns)
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    for words in (
        "Target ·Paris (id ",
        "the best 30 FFN neurons and the best 30 attention neurons, together +",
        "What feeds them, nats, from each layer",
        "embedding +",
        "layer attention FFN",
        "biases ",
        "sum +",
        "Heads, the best 10",
        "FFN query neurons, the best 10",
        "Attention query neurons, the best 10",
        "4:·France",
        "raises",
        "peak memory",
    ):
        assert words in text, words
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= columns
    for header in (line for line in lines if line.startswith("neuron")):
        assert all(name in header for name in (" at ", "score", "coef.", "lowers")), header
    (layer_0,) = (line for line in lines if re.match(r" +0 +[+-]", line))
    assert "█" in layer_0 and "…" not in layer_0


def test_the_screen_adds_up(run):
    shown = run("query", *asked(), "--for", "both")
    numbers = {
        name: [float(number) for number in re.findall(r"[+-]\d+\.\d{3}", line)]
        for name, line in re.findall(r"^ *(embedding|\d|biases|sum)( .*)$", shown.stdout, re.M)
    }
    (total,) = numbers.pop("sum")
    assert sum(map(sum, numbers.values())) == pytest.approx(total, abs=0.006)
    result = attribute(load("gpt2"), TOKENS, target=7, top=30)
    scores = result.query_scores("both")
    kept = torch.cat([ranked.score for ranked in scores.values])[~scores.left_out].sum()
    assert total == pytest.approx(float(kept), abs=0.001)


def test_json_is_one_object_and_nothing_else(run):
    shown = run("query", PROMPT, "--json", "--top", 4, "--value-top", 5)
    assert (shown.exit_code, shown.stderr) == (0, "")
    found = json.loads(shown.stdout)
    assert found["target"]["text"] == " Paris"
    assert found["query"] == {
        **{"for": "attn", "value_top": 5, "kind": "ffn", "convention": "exact"},
        **{"value_neurons": 5, "ill_conditioned": 0, "left_out": 0},
    }
    assert len(found["query_values"]) == 5
    assert found["query_layers"][0]["layer"] is None
    total = sum(row["score"] for row in found["query_layers"])
    assert total == pytest.approx(sum(row["score"] for row in found["query_values"]), abs=1e-4)
    assert len(found["query_neurons"]) == 4
    assert {"position", "raises", "lowers"} < found["query_neurons"][0].keys()
    assert found["seconds"] > 0


def test_target_position_and_contrast_reach_the_scores(run):
    def scores(*more):
        shown = run("query", PROMPT, "--json", "--top", 1, "--value-top", 3, *more)
        assert shown.exit_code == 0, shown.output
        return json.loads(shown.stdout)["query_layers"]

    plain = scores()
    for more in (("--target", " Rome"), ("--position", 3), ("--no-bos",)):
        assert scores(*more) != plain, more
    assert (
        scores("--target", " Paris") == plain != scores("--target", " Paris", "--against", " Rome")
    )
    assert scores("--position", -1) == plain


def test_ill_conditioned_value_neurons_are_named(run, monkeypatch):
    monkeypatch.setattr(reading, "ILL_CONDITIONED", 0.3)
    shown = run("query", *asked(), "--for", "ffn", "--value-top", 60)
    (count,) = re.findall(r"^(\d+) ill-conditioned, left out: L", shown.stdout, re.M)
    facts = json.loads(run("query", *asked(), "--for", "ffn", "--value-top", 60, "--json").stdout)
    assert facts["query"]["left_out"] == facts["query"]["ill_conditioned"] == int(count) > 0
    shown = run("query", *asked(), "--for", "ffn", "--value-top", 60, "--convention", "published")
    assert re.search(r"^\d+ ill-conditioned, kept, as published: L", shown.stdout, re.M)


def test_where_all_are_ill_conditioned_it_says_so(run, written, monkeypatch):
    monkeypatch.setattr(reading, "ILL_CONDITIONED", 2.0)
    shown = run("query", *asked())
    words = "every value neuron asked about is ill-conditioned"
    assert f"Warning: {words}" in shown.stdout
    (warning,) = written("query", *asked())["run"]["warnings"]
    assert warning.startswith(words)
    assert words in json.loads(run("query", *asked(), "--json").stdout)["warnings"][0]


# --- what cannot be asked ---------------------------------------------------------------------

BAD_REQUESTS = {
    "unknown kind of value neurons": (["--for", "heads"], "--for must be ffn, attn or both"),
    "unknown kind of query neurons": (["--kind", "x"], "--kind must be ffn, attn or both"),
    "no value neuron": (["--value-top", "0"], "--value-top must be at least 1, got 0"),
    "no query neuron": (["--top", "0"], "--top must be at least 1, got 0"),
    "chosen and best": (["--of", "L1.N1", "--for", "ffn"], "either by --of or by --for"),
    "chosen and how many": (["--of", "L1.N1", "--value-top", "3"], "either by --of or by --for"),
    "no label": (["--of", "7"], "--of takes labels of neurons separated by commas.*'L9.N1234'"),
    "empty label": (["--of", ""], "--of takes labels"),
    "unknown convention": (["--convention", "x"], "must be one of exact"),
    "no such layer": (["--of", "L9.N1"], "there is no neuron L9.N1: the model has 6 layers"),
    "no such FFN neuron": (["--of", "L1.N512"], "no neuron L1.N512.* of 512 FFN neurons"),
    "no such head": (["--of", "L1.H4.D0@1"], "no neuron L1.H4.D0@1.* of 4 heads"),
    "no such position": (["--of", "L1.H0.D0@6"], "source positions are 0 to 5"),
    "after the read position": (
        ["--of", "L1.H0.D0@5", "--position", "3"],
        "source positions are 0 to 3",
    ),
    "no source position": (["--of", "L1.H0.D0"], "has no source position.* as in L1.H0.D0@5"),
    "target of several tokens": (["--target", " Paris Texas"], r"is \d tokens"),
    "two targets": (["--target", "a", "--target-id", "1"], "either as --target"),
}


@pytest.mark.parametrize("case", list(BAD_REQUESTS))
def test_bad_input_is_one_sentence_before_the_forward_pass(run, case, tmp_path, monkeypatch):
    arguments, words = BAD_REQUESTS[case]
    passes = count_forward_passes(load("tiny-facts"), monkeypatch)
    shown = run("query", PROMPT, *arguments, "--out", tmp_path / "out")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.startswith("Error: ")
    assert len(shown.stderr.strip().splitlines()) == 1
    assert re.search(words, shown.stderr), shown.stderr
    assert not passes
    assert not (tmp_path / "out").exists()


def test_what_needs_no_model_is_refused_before_it_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        options, "load_model", lambda name, **options: pytest.fail("the model was loaded")
    )
    (tmp_path / "file").write_text("")
    for arguments in (
        ["--for", "x"],
        ["--of", "x"],
        ["--value-top", "0"],
        ["--out", tmp_path / "file"],
    ):
        assert run("query", PROMPT, *arguments).exit_code == 2
    assert "give a prompt" in run("query").stderr


# --- in the output of attribute ---------------------------------------------------------------


def test_query_neurons_come_after_the_value_neurons(written, run):
    table = written("attribute", *asked(), "--top", 20)["neurons"]
    result = attribute(load("gpt2"), TOKENS, target=7, top=20)
    values = table[table["role"] == "value"]
    assert values["position"].isna().all()
    wanted = result.neurons(tokens=10)
    pd.testing.assert_frame_equal(values[wanted.columns], wanted)  # first, and as they were
    wanted = attribute(load("gpt2"), TOKENS, target=7, top=30).query_neurons(20, tokens=10)
    rest = table[table["role"] == "query"].reset_index(drop=True)
    pd.testing.assert_frame_equal(rest, wanted)
    assert len(table) == 60
    assert rest["rank"].tolist() == list(range(1, 21))
    found = json.loads(run("attribute", *asked(), "--json", "--top", 20).stdout)
    assert {row["role"] for row in found["neurons"]} == {"value"}
    scores = [row["score"] for row in found["query_neurons"]]
    assert scores == pytest.approx(wanted["score"].tolist(), abs=1e-6)
    shown = run("attribute", *asked(), "--top", 4)
    assert "FFN query neurons, which set off the 30 best attention value neurons" in shown.stdout
    assert f"L{wanted['layer'][3]}.N{wanted['index'][3]} " in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_of_which_value_neurons_does_not_depend_on_how_many_are_listed(written):
    few, many = (written("attribute", *asked(), "--top", top) for top in (3, 200))
    first, second = (
        found["neurons"].query("role == 'query'").reset_index(drop=True) for found in (few, many)
    )
    ids = ["layer", "index", "score"]
    pd.testing.assert_frame_equal(first[ids], second[ids].head(3), atol=1e-6)
    for found in (few, many):
        query = found["run"]["query"]
        assert (query["for"], query["value_top"], query["value_neurons"]) == ("attn", 30, 30)


def test_what_is_saved_does_not_fail_where_the_run_cannot_be_repeated(tmp_path):
    model = own_bridge_of("gpt2")
    result = attribute(model, TOKENS, target=7, top=5)
    with torch.no_grad():
        model.blocks[1].mlp.W_out.mul_(1.1)
    result.save(tmp_path)
    table = pd.read_parquet(tmp_path / "neurons.parquet")
    wanted = result.neurons()
    pd.testing.assert_frame_equal(table[list(wanted)], wanted)
    facts = json.loads((tmp_path / "run.json").read_text())
    warning, no_log_probs = facts["warnings"]
    assert no_log_probs.startswith("no log p by layer and position: ")
    assert warning.startswith("no query neurons: ") and "attribute the prompt again" in warning
    assert "query" not in facts
    _, (said,) = result.query_neurons_or_why_not(tokens=2)
    assert said == warning


def test_a_cache_and_a_capture_have_query_neurons_too(tmp_path):
    model = load("llama")
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    wanted = attribute(model, TOKENS, target=7, top=30)
    for given in (
        attribute(model, TOKENS, target=7, top=5, cache=cache),
        attribute(model, wanted.captured, target=7, top=5),
    ):
        given.save(tmp_path)
        table = pd.read_parquet(tmp_path / "neurons.parquet").query("role == 'query'")
        best = wanted.query_neurons(5)
        found = table.reset_index(drop=True)[list(best)]
        pd.testing.assert_frame_equal(found, best, atol=1e-5)
        assert json.loads((tmp_path / "run.json").read_text())["warnings"] == []


def test_edited_runs_are_saved_without_query_neurons(tmp_path):
    model = own_bridge_of("gpt2")
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_v", lambda value, hook: value / 2)]):
        edited = attribute(model, TOKENS, target=7, top=5)
        edited.save(tmp_path / "in-force")
    edited = attribute(model, TOKENS, target=7, top=5)
    edited.save(tmp_path / "plain")
    counts = {
        name: pd.read_parquet(tmp_path / name / "neurons.parquet").groupby("role").size().to_dict()
        for name in ("in-force", "plain")
    }
    assert counts == {"in-force": {"value": 10}, "plain": {"value": 10, "query": 5}}


def test_ill_conditioned_values_alone_are_not_ranked(tmp_path, run, monkeypatch):
    monkeypatch.setattr(reading, "ILL_CONDITIONED", 2.0)
    result = attribute(load("gpt2"), TOKENS, target=7, top=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.save(tmp_path)
    assert set(pd.read_parquet(tmp_path / "neurons.parquet")["role"]) == {"value"}
    (warning,) = json.loads((tmp_path / "run.json").read_text())["warnings"]
    assert "no query neurons: every value neuron asked about is ill-conditioned" in warning
    shown = run("attribute", *asked(), "--top", 2)
    assert "Warning: no query neurons: every value neuron" in shown.stdout
    assert "FFN query neurons" not in shown.stdout
    found = json.loads(run("attribute", *asked(), "--top", 2, "--json").stdout)
    assert found["query_neurons"] == [] and "no query neurons" in found["warnings"][0]


def test_the_prompt_is_run_once_more_for_files_json_and_screen_together(monkeypatch, tmp_path):
    model = own_bridge_of("gpt2")
    result = attribute(model, TOKENS, target=7, top=5)
    result.query_layers("ffn")  # which checks the model's subkeys
    passes = count_forward_passes(model, monkeypatch)
    result.query_neurons_or_why_not(3, tokens=2)
    assert len(passes) == 1
    result.save(tmp_path)
    assert len(passes) == 2  # and once for log p at every position
