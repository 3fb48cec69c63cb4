"""The command line: text for people, JSON for programs, files for both, one sentence for errors."""

import json
import shutil

import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import own_bridge_of
from typer.testing import CliRunner

import tl_neuron_attr
from tl_neuron_attr import cli
from tl_neuron_attr.cli import options
from tl_neuron_attr.tiny_facts import tiny_facts_dir

pytestmark = pytest.mark.usefixtures("few_cards")

PROMPT = "The capital of France is"
NEURON_COLUMNS = "prompt_id role kind layer head index source_pos coefficient score rank".split()


@pytest.fixture
def run():
    def invoke(*arguments, env=None):
        return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "100", **(env or {})})

    return invoke


def test_the_main_job_prints_everything_a_reader_needs(run):
    shown = run("attribute", PROMPT)
    assert shown.exit_code == 0, shown.output
    for words in (
        "Tokens  0:<|endoftext|>  1:The  2:·capital",
        "Predicts  ·Paris",
        "Target  ·Paris (id ",
        "log p = ",
        "layer  attention",
        "Heads",
        "FFN value neurons, the best 10",
        "Attention value neurons, the best 10",
        "raises",
        "lowers",
        "peak memory",
        "s attributing",
    ):
        assert words in shown.output, words
    assert max(len(line) for line in shown.output.splitlines()) <= 100
    assert shown.output.count("neuron       ") + shown.output.count("neuron   ") >= 2
    for header in (line for line in shown.output.splitlines() if line.startswith("neuron")):
        assert "score" in header and "coef." in header and "lowers" in header, header


def test_json_is_one_object_and_nothing_else(run):
    shown = run("attribute", PROMPT, "--json", "--top", "7")
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert shown.stderr == ""
    assert [token["text"] for token in found["tokens"]][1:] == [
        "The",
        " capital",
        " of",
        " France",
        " is",
    ]
    assert found["target"]["text"] == " Paris" == found["top_predictions"][0]["text"]
    assert found["target"]["id"] == found["top_predictions"][0]["id"]
    assert found["target"]["log_prob"] == pytest.approx(
        found["top_predictions"][0]["log_prob"], abs=1e-5
    )
    kinds = [row["kind"] for row in found["neurons"]]
    assert kinds == ["ffn"] * 7 + ["attn"] * 7
    assert set(NEURON_COLUMNS) <= found["neurons"][0].keys()
    assert found["neurons"][0]["head"] is None
    n_layers = len(found["layers"]) // 2
    assert {row["layer"] for row in found["heads"]} == set(range(n_layers))


def test_out_writes_tables_with_the_documented_columns(run, tmp_path):
    out = tmp_path / "new" / "france"
    shown = run("attribute", PROMPT, "--out", str(out), "--top", "20")
    assert shown.exit_code == 0, shown.output
    assert sorted(path.name for path in out.iterdir()) == [
        "cards.json",
        "heads.parquet",
        "layers.parquet",
        "log_probs.parquet",
        "neurons.parquet",
        "positions.parquet",
        "report.html",
        "run.json",
    ]
    tables = {
        name: pd.read_parquet(out / f"{name}.parquet")
        for name in ("layers", "heads", "positions", "neurons")
    }
    assert list(tables["layers"]) == ["layer", "kind", "score"]
    assert list(tables["heads"]) == ["layer", "head", "score"]
    assert list(tables["positions"]) == [
        "layer",
        "head",
        "source_pos",
        "token",
        "attention",
        "score",
    ]
    assert list(tables["neurons"]) == [
        *NEURON_COLUMNS,
        "position",
        "source_token",
        "raises",
        "lowers",
    ]
    neurons = tables["neurons"]
    assert neurons["role"].tolist() == ["value"] * 40 + ["query"] * 20
    neurons = neurons[neurons["role"] == "value"]
    assert neurons.groupby("kind").size().to_dict() == {"ffn": 20, "attn": 20}
    assert neurons[neurons["kind"] == "ffn"]["head"].isna().all()
    assert str(neurons["source_pos"].dtype) == "Int64"
    positions = tables["positions"]
    attention = positions.groupby(["layer", "head"])["attention"].sum()
    assert attention.to_numpy() == pytest.approx(1.0, abs=1e-5)
    facts = json.loads((out / "run.json").read_text())
    assert facts["prompt"] == PROMPT
    assert facts["target"]["text"] == " Paris"
    assert facts["convention"] == "exact"
    assert len(facts["model"]["sha256"]) == 64
    assert facts["model"]["class"] == "TransformerBridge"
    assert facts["model"]["processing"] == "raw"
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["seconds"] > 0


def test_token_ids_are_used_as_they_are(run):
    by_text = json.loads(run("attribute", PROMPT, "--json", "--top", "3").stdout)
    ids = ",".join(str(token["id"]) for token in by_text["tokens"])
    by_ids = json.loads(run("attribute", "--tokens", ids, "--json", "--top", "3").stdout)
    assert by_ids["tokens"] == by_text["tokens"]
    assert by_ids["neurons"] == by_text["neurons"]


def test_no_bos_leaves_the_bos_token_out(run):
    found = json.loads(run("attribute", PROMPT, "--no-bos", "--json", "--top", "1").stdout)
    assert [token["text"] for token in found["tokens"]][0] == "The"


def test_convention_position_and_target_reach_the_scores(run):
    def scores(*options):
        shown = run("attribute", PROMPT, "--json", "--top", "1", *options)
        assert shown.exit_code == 0, shown.output
        return json.loads(shown.stdout)

    plain = scores()
    for more in (("--convention", "published"), ("--position", "2"), ("--target", " Rome")):
        assert scores(*more)["layers"] != plain["layers"], more
    assert scores("--position", "-1")["layers"] == plain["layers"]
    rome = scores("--target", " Rome")
    assert rome["target"]["text"] == " Rome"
    assert scores("--target-id", str(rome["target"]["id"]))["layers"] == rome["layers"]


BAD_REQUESTS = {
    "empty prompt": (["attribute", ""], "the prompt is empty"),
    "no prompt": (["attribute"], "give a prompt, either as text or as --tokens"),
    "text and tokens": (["attribute", PROMPT, "--tokens", "1,2"], "either as text or as --tokens"),
    "tokens that are no ids": (["attribute", "--tokens", "1,x"], "ids separated by commas"),
    "token outside the vocabulary": (["attribute", "--tokens", "1,999999"], "outside the model's"),
    "longer than the context": (["attribute", "word " * 500], "longer than the model's context"),
    "target of several tokens": (
        ["attribute", PROMPT, "--target", " Paris Texas"],
        r"is \d tokens \(' Paris', ",
    ),
    "index without bounds": (
        ["attribute", PROMPT, "--convention", "recomputed", "--index", "indices"],
        "an index is of no use with --convention recomputed",
    ),
    "answer of top 0": (
        ["answer", PROMPT, "--answer", " Paris", "--top", "0"],
        "--top must be at least 1, got 0",
    ),
    "token twice": (
        ["attribute", PROMPT, "--target", "a", "--against", "b", "--against-id", "1"],
        "give the token either as --against or as --against-id",
    ),
    "position out of range": (["attribute", PROMPT, "--position", "99"], "position 99 is out of"),
    "unknown convention": (["attribute", PROMPT, "--convention", "x"], "must be one of exact"),
    "top of 0": (["attribute", PROMPT, "--top", "0"], "--top must be at least 1"),
    "unknown model": (["attribute", PROMPT, "--model", "no-such/model"], "cannot load the model"),
    "absent directory": (["attribute", PROMPT, "--model", "./absent"], "no such directory"),
    "text that is no Unicode": (["attribute", "a\udcff"], "not valid Unicode"),
    "two targets": (
        ["attribute", PROMPT, "--target", "a", "--target-id", "1"],
        "either as --target",
    ),
    "target id too large": (
        ["attribute", PROMPT, "--target-id", "99999"],
        "target id 99999 is out",
    ),
    "empty target": (["attribute", PROMPT, "--target", ""], "the target is empty"),
    "empty model": (["attribute", PROMPT, "--model", ""], "model's name is empty"),
    "unknown dtype": (["attribute", PROMPT, "--dtype", "int8"], "dtype must be float32"),
    "bos beside tokens": (["attribute", "--tokens", "1", "--bos"], "leave out --bos"),
}


@pytest.mark.parametrize("case", list(BAD_REQUESTS))
def test_bad_input_is_one_sentence_and_exit_code_2(run, case, tmp_path):
    import re

    arguments, words = BAD_REQUESTS[case]
    out = tmp_path / "out"
    shown = run(*arguments, "--out", str(out))
    assert shown.exit_code == 2
    assert shown.stdout == ""
    assert shown.stderr.startswith("Error: ")
    assert len(shown.stderr.strip().splitlines()) == 1
    assert re.search(words, shown.stderr)
    assert not out.exists() or not list(out.iterdir())


def test_a_directory_without_weights_says_so(run, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    shown = run("attribute", PROMPT, "--model", str(tmp_path))
    assert shown.exit_code == 2
    assert "no weights" in shown.stderr
    (tmp_path / "config.json").unlink()
    assert "no config.json" in run("attribute", PROMPT, "--model", str(tmp_path)).stderr


def test_a_checkpoint_that_lacks_weights_is_refused_naming_one(run, tmp_path):
    shutil.copytree(tiny_facts_dir(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if "h.2.mlp.c_proj" not in name}
    safetensors.torch.save_file(kept, weights, metadata={"format": "pt"})
    shown = run("attribute", PROMPT, "--model", str(tmp_path / "model"))
    assert shown.exit_code == 2
    assert "lacks 2 weights, e.g. 'transformer.h.2.mlp.c_proj.bias'" in shown.stderr
    weights.write_bytes(weights.read_bytes()[:1000])
    shown = run("attribute", PROMPT, "--model", str(tmp_path / "model"))
    assert (shown.exit_code, len(shown.stderr.splitlines())) == (2, 1)
    assert "cannot load the model" in shown.stderr


def test_a_result_cannot_replace_a_directory_and_then_nothing_is_replaced(run, tmp_path):
    (tmp_path / "run.json").mkdir()
    shown = run("attribute", PROMPT, "--out", str(tmp_path), "--top", "1")
    assert shown.exit_code == 2
    assert "run.json" in shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_version_is_told(run):
    assert run("--version").output.strip() == f"tl_neuron_attr {tl_neuron_attr.__version__}"


def test_a_place_that_cannot_be_written_is_found_before_the_model_is_loaded(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        options, "load_model", lambda name, **options: pytest.fail("the model was loaded")
    )
    (tmp_path / "file").write_text("")
    shown = run("attribute", PROMPT, "--out", str(tmp_path / "file"))
    assert shown.exit_code == 2
    assert "cannot write" in shown.stderr


def test_nan_activations_and_training_mode_are_errors_too(run, monkeypatch, tmp_path):
    broken = own_bridge_of("gpt2")
    with torch.no_grad():
        broken.blocks[2].mlp.b_in[0] = float("nan")
    monkeypatch.setattr(options, "load_model", lambda name, **options: broken)
    shown = run("attribute", "--tokens", "3,4", "--out", str(tmp_path))
    assert shown.exit_code == 2
    assert "layer 2" in shown.stderr
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(
        options, "load_model", lambda name, **options: own_bridge_of("gpt2").train()
    )
    shown = run("attribute", "--tokens", "3,4")
    assert (shown.exit_code, "training mode" in shown.stderr) == (2, True)


def test_the_plan_of_a_run_is_told_without_the_model(run, monkeypatch, tmp_path):
    tokens = len(json.loads(run("attribute", PROMPT, "--json", "--top", "1").stdout)["tokens"])
    monkeypatch.setattr(
        options, "load_model", lambda name, **options: pytest.fail("the model was loaded")
    )
    shown = run("attribute", PROMPT, "--plan", "--target", "no one token", "--top", "20")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert f"{tokens} tokens, best 20 neurons of each kind, exact" in shown.stdout
    for name in ("forward", "certified", "dense", "index"):
        assert f"\n{name} " in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100

    # a directory without weights, where only the configuration is read
    (tmp_path / "config.json").write_bytes((tiny_facts_dir() / "config.json").read_bytes())
    shown = run(
        *("attribute", "--tokens", "1,2,3", "--model", str(tmp_path), "--dtype", "bfloat16"),
        *("--convention", "recomputed", "--plan", "--json"),
    )
    assert (shown.exit_code, shown.stderr) == (0, "")
    found = json.loads(shown.stdout)
    assert (found["model"], found["n_tokens"], found["top"]) == (str(tmp_path), 3, 300)
    assert (found["dtype"], found["convention"]) == ("bfloat16", "recomputed")
    assert found["certified"] == found["dense"]
    assert found["shapes"]["d_vocab"] == 2048
    assert set(found["dense"]) == {"operations", "readouts", "blocks", "peak_bytes", "seconds"}

    shown = run("attribute", PROMPT, "--model", str(tmp_path / "absent"), "--plan")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.startswith("Error: no such directory")
    shown = run("attribute", "--tokens", ",".join(["1"] * 500), "--plan")
    assert (shown.exit_code, "longer than the model's context" in shown.stderr) == (2, True)


def test_a_failed_write_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    shown = run("attribute", PROMPT, "--out", str(out), "--top", "1")
    assert shown.exit_code == 2
    assert "No space left" in shown.stderr
    assert list(out.iterdir()) == []


def test_no_argument_shows_what_to_do(run):
    shown = run()
    assert "attribute" in shown.output
    assert "The capital of France is" in shown.output


def test_markup_and_control_characters_in_a_prompt_are_shown_not_obeyed(run):
    shown = run("attribute", "[bold]a[/bold] \x1b[31m \u202e b", "--top", "1")
    assert shown.exit_code == 0
    assert "1:[  2:b" in shown.output
    assert ":\\x1b" in shown.output
    assert "\x1b[31m" not in shown.output
    assert "\u202e" not in shown.output


def test_a_contrast_is_named_in_text_and_json(run):
    arguments = ("attribute", PROMPT, "--target", " Paris", "--against", " Rome", "--top", "2")
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "against ·Rome (id " in shown.output
    assert "Rise in log p(target) - log p(against), nats" in shown.output
    assert "a contrast is linear" in shown.output
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["target"]["against"]["text"] == " Rome"
    assert found["certificates"]["ffn"]["linear"] is True
    both = {
        text: json.loads(run(*arguments[:3], text, "--json").stdout) for text in (" Paris", " Rome")
    }
    difference = [both[text]["target"]["log_prob"] for text in both]
    assert found["target"]["log_prob"] == pytest.approx(difference[0] - difference[1], abs=1e-5)


def test_an_index_is_made_once_and_adds_what_lowers_the_target(run, tmp_path):
    made = run("index", "--out", str(tmp_path / "index"))
    assert made.exit_code == 0, made.output
    assert "6 layers, 3,072 FFN and 768 attention subvalues" in made.output
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.safetensors")}
    assert len(files) == 6
    arguments = ("attribute", PROMPT, "--index", str(tmp_path / "index"), "--top", "3")
    shown = run(*arguments, "--out", str(tmp_path / "out"))
    assert shown.exit_code == 0, shown.output
    assert "FFN neurons that lower the target most" in shown.output
    assert "Share of all that raises the target" in shown.output
    assert max(len(line) for line in shown.output.splitlines()) <= 100
    table = pd.read_parquet(tmp_path / "out" / "suppressing.parquet")
    assert [*table.columns] == [*NEURON_COLUMNS, "source_token", "raises", "lowers"]
    assert (table["score"] < 0).all() and table.groupby("kind").size().tolist() == [3, 3]
    shares = pd.read_parquet(tmp_path / "out" / "shares.parquet")
    assert (shares["share_lower"] <= shares["share_upper"]).all()
    found = json.loads(run(*arguments, "--json").stdout)
    assert [row["score"] for row in found["suppressing"]] == pytest.approx(table["score"].tolist())
    assert {row["kind"] for row in found["shares"]} == {"ffn", "attn"}
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_a_damaged_index_is_refused_in_one_sentence(run, tmp_path):
    run("index", "--out", str(tmp_path))
    file = sorted(tmp_path.rglob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-100])
    shown = run("attribute", PROMPT, "--index", str(tmp_path))
    assert shown.exit_code == 2 and shown.stdout == ""
    assert "layer-002.safetensors" in shown.stderr


def test_tables_of_another_run_do_not_stay_beside_its_facts(run, tmp_path):
    out = tmp_path / "out"
    assert run("attribute", PROMPT, "--top", "3", "--out", str(out)).exit_code == 0
    assert run("heads", "The capital of Italy is", "--out", str(out)).exit_code == 0
    assert {path.name for path in out.iterdir()} == {"heads.parquet", "report.html", "run.json"}


def test_a_directory_of_two_commands_has_no_page_of_its_own(run, tmp_path):
    out = tmp_path / "out"
    assert run("attribute", PROMPT, "--top", "3", "--out", str(out)).exit_code == 0
    assert run("graph", "The capital of Italy is", "--out", str(out)).exit_code == 0
    page = (out / "report.html").read_bytes()
    shown = run("report", str(out))
    assert shown.exit_code == 2 and "run.json, graph.json" in shown.output.replace("\n", " ")
    assert (out / "report.html").read_bytes() == page
