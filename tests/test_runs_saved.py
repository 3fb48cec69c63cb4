"""Read back: datasets, summaries and differences are those of the tables, whatever is missing."""

import json
import shutil
import signal

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import bridge_of, bundled_model
from typer.testing import CliRunner

import tl_neuron_attr.cli.runs as runs_command
import tl_neuron_attr.runs.run as run_module
from tl_neuron_attr import (
    InputError,
    Prompt,
    Stopped,
    cli,
    diff_runs,
    load_prompts,
    load_run,
    open_host,
    run_prompts,
    tokenize,
)
from tl_neuron_attr.runs.schema import KEY

TOP = 6
WHAT = ("neurons", "query_neurons", "layers")


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture(scope="module")
def prompts():
    return [*load_prompts("capital")[:10:2], "", *load_prompts("number")[:8:2]]


@pytest.fixture(scope="module")
def whole(model, prompts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    return run_prompts(model, prompts, directory, what=WHAT, top=TOP, shard_size=4)


@pytest.fixture(scope="module")
def other(model, prompts, tmp_path_factory):
    """Other neurons, other prompts: the published convention, and two prompts fewer."""
    directory = tmp_path_factory.mktemp("runs") / "other"
    return run_prompts(
        model, prompts[2:], directory, top=TOP + 2, shard_size=5, convention="published"
    )


def with_all(table):
    return pd.concat([table, table.assign(knowledge_type="all")], ignore_index=True)


def test_the_summary_is_what_the_tables_add_up_to(whole):
    """By pandas, all shards at once, from the definitions."""
    summary = whole.summary()
    answers = with_all(whole.table("answers"))
    of_type = answers.groupby("knowledge_type")["row"].count()
    neurons = pd.concat([whole.table("neurons"), whole.table("query_neurons")])
    key = ["knowledge_type", "role", "kind", "layer", "head", "index"]
    table = with_all(neurons)
    table["head"] = table["head"].fillna(-1)
    by_prompt = table.groupby([*key, "row"])["score"].sum().reset_index()
    wanted = by_prompt.groupby(key)["score"].agg(["count", "mean"])
    found = summary.neurons.assign(head=summary.neurons["head"].fillna(-1)).set_index(key)
    assert len(found) == len(wanted) and found.index.is_unique
    wanted = wanted.loc[found.index]
    assert found["prompts"].tolist() == wanted["count"].tolist()
    assert np.allclose(found["mean_score"], wanted["mean"], atol=1e-7)
    shares = wanted["count"].to_numpy() / of_type.loc[found.index.get_level_values(0)].to_numpy()
    assert np.allclose(found["share"], shares)
    layers = with_all(whole.table("layers"))
    wanted = layers.groupby(["knowledge_type", "layer", "kind"])["score"].mean()
    found = summary.layers.set_index(["knowledge_type", "layer", "kind"])["mean_score"]
    assert np.allclose(found, wanted.loc[found.index], atol=1e-7) and len(found) == len(wanted)
    counts = summary.prompts.set_index("knowledge_type")
    assert counts["failed"].to_dict() == {"capital": 0, "number": 0, "untyped": 1, "all": 1}
    assert counts["prompts"].to_dict() == {"capital": 5, "number": 4, "untyped": 0, "all": 9}
    means = answers.groupby("knowledge_type")["log_prob"].mean()
    wanted = means.loc[["capital", "number", "all"]]
    assert np.allclose(counts["mean_log_prob"].drop("untyped"), wanted)


def test_shared_neurons_are_those_of_more_than_half_of_a_types_prompts(whole):
    summary = whole.summary()
    assert (summary.shared["share"] > 0.5).all()
    assert len(summary.shared) == (summary.neurons["share"] > 0.5).sum() > 0
    for row in summary.facts["shared"]:
        here = summary.shared
        for name in ("knowledge_type", "role", "kind"):
            here = here[here[name] == row[name]]
        assert row["neurons"] == len(here) and row["of_top"] == len(here) / TOP


def test_what_is_kept_at_the_end_is_the_summary(whole):
    saved = pd.read_parquet(whole.directory / "summary.parquet")
    assert saved.equals(whole.summary().neurons)
    facts = json.loads((whole.directory / "summary.json").read_text())
    assert facts == json.loads(json.dumps(whole.summary().facts))


def test_tables_are_read_lazily_and_in_part(whole):
    dataset = whole.dataset("neurons")
    assert dataset.count_rows() == len(whole.table("neurons")) == 9 * 2 * TOP
    some = whole.table("neurons", columns=["prompt_id", "score"], knowledge_type="number")
    assert list(some.columns) == ["prompt_id", "score"] and len(some) == 4 * 2 * TOP
    one = whole.prompts()["prompt_id"][0]
    assert set(whole.table("layers", prompt_id=one)["prompt_id"]) == {one}
    with duckdb.connect() as database:
        rows = database.sql(
            f"select count(*) from read_parquet('{whole.directory}/neurons/*.parquet') "
            "where rank = 1 and kind = 'attn'"
        ).fetchall()
    assert rows == [(9,)]
    with pytest.raises(InputError, match="there is no table 'heads'.*it has answers, neurons"):
        whole.dataset("heads")
    with pytest.raises(InputError, match="has no column 'token'; it has row"):
        whole.table("neurons", columns=["token"])


def test_a_part_of_a_run_can_be_read(whole, tmp_path):
    shutil.copytree(whole.directory, tmp_path / "run")
    for number in (0, 2):
        (tmp_path / "run" / "records" / f"shard-0000{number}.json").unlink()
    part = load_run(tmp_path / "run")
    assert part.shards == (1,) and not part.complete
    assert set(part.table("answers")["row"]) == {4, 6, 7}
    assert part.summary().facts["prompts"][-1]["prompts"] == 3
    (tmp_path / "run" / "records" / "shard-00001.json").unlink()
    nothing = load_run(tmp_path / "run")
    assert len(nothing.table("neurons")) == 0 and nothing.summary().neurons.empty
    path = tmp_path / "run" / "neurons" / "shard-00001.parquet"
    shutil.copy(whole.directory / "records" / "shard-00001.json", tmp_path / "run" / "records")
    path.write_bytes(path.read_bytes()[:-50])
    for read in (lambda: load_run(tmp_path / "run").table("neurons"), part.summary):
        with pytest.raises(InputError, match="is damaged .*makes the damaged part again"):
            read()


def same_size(path, content):
    """Written over a file whose size is all that is looked at when a run is opened."""
    size = path.stat().st_size
    assert len(content) <= size
    path.write_bytes(content.ljust(size, b"\0"))


def test_what_changes_in_a_runs_files_after_it_was_opened_is_noticed_when_it_is_read(
    whole, tmp_path
):
    directory = tmp_path / "run"
    shutil.copytree(whole.directory, directory)
    found, path = load_run(directory), directory / "neurons" / "shard-00000.parquet"
    content, rows = path.read_bytes(), pq.read_table(path)

    def refused(message, *reads):
        for read in reads:
            with pytest.raises(InputError, match=message) as raised:
                read()
            assert "\n" not in str(raised.value)

    pq.write_table(rows.replace_schema_metadata(None), path)
    refused("is no file of a run: it does not say what it is of", lambda: found.table("neurons"))
    pq.write_table(rows.drop_columns(["score"]), path)
    refused("is of another run; remove it", lambda: found.table("neurons"))
    refused("is damaged .*not the file recorded", found.summary)
    facts = {KEY: rows.schema.metadata[KEY].replace(found.parts.plan.encode(), b"another")}
    pq.write_table(rows.replace_schema_metadata(facts), path)
    refused("is of another run; remove it", lambda: found.table("neurons"))
    same_size(path, b"")
    refused(
        "is damaged .*makes the damaged part again",
        lambda: load_run(directory).dataset("neurons"),
        found.summary,
    )
    # its head and its foot are whole, and say where the rows are
    path.write_bytes(content[:4] + bytes(len(content) // 2) + content[len(content) // 2 + 4 :])
    refused("is damaged", lambda: found.table("neurons"), found.summary)
    path.write_bytes(content)
    assert found.table("neurons").equals(whole.table("neurons"))


def test_a_file_of_other_prompts_is_noticed_when_all_is_read(whole, tmp_path):
    shutil.copytree(whole.directory, tmp_path / "run")
    path = tmp_path / "run" / "prompts.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(InputError, match="it no longer holds the prompts of this run"):
        load_run(tmp_path / "run", verify=True)


def test_a_prompt_is_never_said_to_be_absent_from_a_shard_it_was_moved_to(whole, tmp_path):
    shutil.copytree(whole.directory, tmp_path / "run")
    path = tmp_path / "run" / "prompts.parquet"
    prompts = pq.read_table(path)
    first = prompts["prompt_id"][0].as_py()
    for moved in ({"shard": 1}, {"shard": 1, "row": 5}):
        rows = prompts.to_pylist()
        rows[0] |= moved
        pq.write_table(pa.Table.from_pylist(rows, schema=prompts.schema), path)
        with pytest.raises(InputError, match="no longer holds the prompts of this run; the comm"):
            load_run(tmp_path / "run").table("neurons", prompt_id=first)
    pq.write_table(prompts.drop_columns(["shard", "against"]), path)
    found = load_run(tmp_path / "run")
    for read in (lambda: found.table("neurons", prompt_id=first), found.prompts, found.summary):
        with pytest.raises(
            InputError, match="prompts.parquet' .*; the command that made the run w"
        ):
            read()
    assert len(whole.table("neurons", prompt_id="5")) == 0  # it failed


def test_the_expert_of_a_neuron_can_be_asked_for_like_any_column(whole, tmp_path):
    found = run_prompts(bridge_of("mixtral"), [[1, 2, 3]], tmp_path / "run", top=4)
    table = found.table("neurons")
    assert "expert" not in found.dataset("neurons").schema.names
    for columns in (
        ["expert", "score"],
        ["rank", "index", "expert", "kind"],
        ["score"],
        ["expert"],
    ):
        pd.testing.assert_frame_equal(found.table("neurons", columns=columns), table[columns])
    with pytest.raises(InputError, match="layers has no column 'expert'"):
        found.table("layers", columns=["expert"])
    with pytest.raises(InputError, match="neurons has no column 'expert'"):
        whole.table("neurons", columns=["expert"])


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(InputError, match="there is no run in"):
        load_run(tmp_path)


def test_a_run_does_not_differ_from_itself(whole):
    found = diff_runs(whole, whole.directory)
    assert found.plans.empty and (found.only_first, found.only_second) == (0, 0)
    assert (found.prompts["overlap"] == 1).all() and (found.prompts["score_difference"] == 0).all()
    assert found.answers["same_target"].all() and len(found.answers) == 9


def test_runs_in_which_every_prompt_failed_have_nothing_to_compare(model, tmp_path):
    failed = run_prompts(model, [{"text": "The", "target": " not one token"}], tmp_path / "run")
    with pytest.raises(InputError, match="no prompt in common that was answered in both; .*errors"):
        diff_runs(failed, failed)


def test_a_mean_log_probability_is_of_tokens_alone(model, tmp_path):
    """A contrast has a difference of two in its place, which counts as an answer, not as one."""
    text = "The capital of France is"
    plain = {"text": text, "target": " Paris", "prompt_id": "plain"}
    contrast = {**plain, "against": " Rome", "prompt_id": "contrast"}
    found = run_prompts(model, [plain, contrast], tmp_path / "both", top=2)
    answers = found.table("answers").set_index("prompt_id")["log_prob"]
    counts = found.summary().prompts.set_index("knowledge_type").loc["all"]
    assert counts["prompts"] == 2 and counts["mean_log_prob"] == answers["plain"]
    assert answers["contrast"] > 0
    alone = run_prompts(model, [contrast], tmp_path / "alone", top=2)
    counts = alone.summary().prompts.set_index("knowledge_type").loc["all"]
    assert counts["prompts"] == 1 and np.isnan(counts["mean_log_prob"])


def test_prompts_of_thousands_of_types_are_refused_before_anything_is_made(model, tmp_path):
    some = [{"text": "The", "prompt_id": str(n), "knowledge_type": f"t{n}"} for n in range(8192)]
    with pytest.raises(InputError, match="more than 8,191 knowledge types"):
        run_prompts(model, some, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_runs_differ_as_their_tables_do(whole, other):
    found = diff_runs(whole, other)
    plans = found.plans.set_index("name")
    assert plans.loc["settings.convention"].tolist() == ["exact", "published"]
    assert plans.loc["settings.top"].tolist() == [str(TOP), str(TOP + 2)]
    assert (found.only_first, found.only_second) == (2, 0)
    one, two = whole.table("neurons"), other.table("neurons")
    for row in found.prompts.itertuples():
        sets = []
        for table in (one, two):
            here = table[(table["prompt_id"] == row.prompt_id) & (table["kind"] == row.kind)]
            places = here[["layer", "head", "index", "source_pos"]].fillna(-1)
            sets.append(dict(zip(map(tuple, places.to_numpy()), here["score"], strict=True)))
        common = sets[0].keys() & sets[1].keys()
        assert row.neurons == len(sets[0].keys() | sets[1].keys())
        assert row.common == len(common) and row.overlap == row.common / row.neurons
        apart = max((abs(sets[0][each] - sets[1][each]) for each in common), default=None)
        assert apart is None or row.score_difference == pytest.approx(apart, abs=1e-7)
    assert len(found.prompts) == 7 * 2


def test_a_prompt_of_another_type_in_the_other_run_is_still_the_same_prompt(model, tmp_path):
    asked = [{"text": "The capital of France is", "knowledge_type": "one", "prompt_id": "a"}]
    runs = []
    for name in ("one", "two"):
        asked[0]["knowledge_type"] = name
        runs.append(run_prompts(model, asked, tmp_path / name, top=3))
    found = diff_runs(*runs)
    assert found.prompts["overlap"].tolist() == [1, 1]
    assert found.prompts["knowledge_type"].tolist() == ["one", "one"]


def test_other_prompts_of_the_same_id_are_counted_and_compared_in_no_table(model, tmp_path):
    text, other = "The capital of France is", "The capital of Spain is"
    same = [
        {"text": text, "prompt_id": "text"},
        {"text": text, "target": " Paris", "prompt_id": "t"},
    ]
    tokens = [int(each) for each in tokenize(open_host(model), Prompt(text=text)).tokens]
    firsts = [*same, {"text": text, "prompt_id": "words"}]
    firsts += [
        {"text": text, "target": " Paris", "prompt_id": "target"},
        {"text": text, "target": " Paris", "against": " Rome", "prompt_id": "against"},
        {"text": text, "prompt_id": "position"},
    ]
    seconds = [
        {"tokens": tokens, "prompt_id": "text"},
        same[1],
        {"text": other, "prompt_id": "words"},
    ]
    seconds += [
        {"text": text, "target": " Rome", "prompt_id": "target"},
        {"text": text, "target": " Paris", "against": " Berlin", "prompt_id": "against"},
        {"text": text, "position": 2, "prompt_id": "position"},
    ]
    given = {
        "what": ("neurons", "methods", "interventions"),
        "methods": "norm",
        "top": 3,
        "zero": 2,
    }
    runs = [
        run_prompts(model, asked, tmp_path / name, **given)
        for name, asked in (("one", firsts), ("two", seconds))
    ]
    found = diff_runs(*runs)
    assert (found.unlike, found.only_first, found.only_second) == (4, 0, 0)
    for table in (found.prompts, found.answers, found.methods, found.interventions):
        assert set(table["prompt_id"]) == {"text", "t"}
    assert found.prompts["overlap"].tolist() == [1.0] * 4
    shown = call("diff", tmp_path / "one", tmp_path / "two")
    assert "2 prompts in both, 2 with the same target" in shown.stdout
    assert "4 more share an id but not text, position or target" in shown.stdout
    alone = run_prompts(model, firsts[2:3], tmp_path / "alone", top=3)
    with pytest.raises(InputError, match="no prompt of the run in .* text, position or target"):
        diff_runs(alone, runs[1])


def test_prompts_of_one_text_are_compared_with_and_without_a_bos(model, prompts, tmp_path):
    runs = [
        run_prompts(model, prompts[:3], tmp_path / str(bos), top=3, prepend_bos=bos)
        for bos in (True, False)
    ]
    found = diff_runs(*runs)
    assert found.unlike == 0 and len(found.answers) == 3
    assert (found.answers["log_prob_difference"] != 0).any()


def test_a_file_without_a_record_counts_for_nothing(model, prompts, tmp_path):
    found = run_prompts(model, [*prompts[:3], ""], tmp_path / "run", top=2, shard_size=2)
    (errors,) = (found.directory / "errors").iterdir()
    shutil.copy(errors, errors.with_name("shard-00000.parquet"))
    again = load_run(found.directory)
    assert len(again.table("errors")) == 1
    assert again.summary().prompts.set_index("knowledge_type").loc["all", "failed"] == 1


def test_runs_without_a_prompt_in_common_are_refused(model, whole, tmp_path):
    alone = run_prompts(model, [[1, 2, 3]], tmp_path / "run", top=2)
    with pytest.raises(InputError, match="no prompt in common"):
        diff_runs(whole, alone)


# --- on the command line ----------------------------------------------------------------------


def call(*arguments, **environment):
    environment = {"COLUMNS": "100", "RANK": None, "WORLD_SIZE": None, **environment}
    return CliRunner().invoke(cli.app, [str(each) for each in arguments], env=environment)


@pytest.fixture
def asked(tmp_path, model, monkeypatch):
    monkeypatch.setattr(run_module, "load_model", lambda *given, **options: model)
    path = tmp_path / "asked.jsonl"
    texts = ["The capital of France is", "The color of snow is", "The capital of Spain is", ""]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_signal_is_a_sentence_and_the_exit_code_that_shells_give_it(asked, tmp_path, monkeypatch):
    for error, code, words in (
        (
            Stopped("stopped by SIGTERM; what is done is kept", signal.SIGTERM),
            143,
            "by SIGTERM; wh",
        ),
        (KeyboardInterrupt(), 130, "Stopped at once; shards that are whole are kept"),
    ):

        def stopping(*given, error=error, **options):
            raise error

        monkeypatch.setattr(runs_command, "run_prompts", stopping)
        shown = call("run", asked, "--out", tmp_path / "run")
        assert shown.exit_code == code and shown.stdout == "" and words in shown.stderr
        assert "Traceback" not in shown.stderr


def test_the_command_runs_summarises_and_compares(asked, tmp_path):
    out = tmp_path / "out"
    given = ("run", asked, "--out", out, "--top", 4, "--shard-size", 2)
    for rank in ("0", "1"):
        shown = call(*given, RANK=rank, WORLD_SIZE="2")
        assert shown.exit_code == 0, shown.output
        assert f"share {rank} of 2" in shown.stderr and shown.stdout == ""
        assert ("the other shares are missing" in shown.stderr) == (rank == "0")
    again = call(*given)
    assert "2 of 2 shards are done already" in again.stderr
    assert "3 prompts answered, 1 failed" in again.stderr
    assert call(*given, "--quiet").output == ""
    summary = call("summary", out)
    assert summary.exit_code == 0 and "Most frequent value FFN neurons" in summary.stdout
    assert max(map(len, summary.stdout.splitlines())) <= 100
    facts = json.loads(call("summary", out, "--json").stdout)
    assert facts["shards"] == 2 and facts["summary_prompts"][-1]["failed"] == 1
    assert facts["prompts"][-1]["mean_log_prob"] < 0
    call("run", asked, "--out", tmp_path / "more", "--top", 5, "--quiet")
    diff = call("diff", out, tmp_path / "more")
    assert diff.exit_code == 0 and "settings.top" in diff.stdout
    assert "3 prompts in both" in diff.stdout
    assert json.loads(call("diff", out, out, "--json").stdout)["plans"] == []


def test_the_command_measures_methods_and_zeroing(asked, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    given = ("--what", "methods,interventions", "--methods", "a,norm", "--top", 3, "--quiet")
    assert call("run", asked, "--out", out, *given, "--zero", "2,5").output == ""
    assert call("run", asked, "--out", other, *given, "--zero", "5", "--seed", 1).output == ""
    shown = call("summary", out, "--verify", COLUMNS="80")
    assert shown.exit_code == 0 and max(map(len, shown.stdout.splitlines())) <= 80
    for text in ("What each method lists", "What methods list alike", "5 value both", "MRR"):
        assert text in shown.stdout
    facts = json.loads(call("summary", out, "--json").stdout)
    assert len(facts["summary_interventions"]) == 2 * 3 * 2 * 2
    assert {row["method"] for row in facts["summary_methods"]} == {"log_prob_increase", "norm"}
    diff = call("diff", out, other)
    assert "By method" in diff.stdout and "5 random, beside value ffn" in diff.stdout
    tables = json.loads(call("diff", out, other, "--json").stdout)
    assert {row["overlap"] for row in tables["methods"]} == {1.0}
    assert {row["count"] for row in tables["interventions"]} == {5}


def test_a_summary_of_contrasts_shows_their_change_and_no_probability(model, asked, tmp_path):
    contrast = {"text": "The capital of France is", "target": " Paris", "against": " Rome"}
    given = {"what": "interventions", "zero": 2, "top": 3}
    run_prompts(model, [contrast], tmp_path / "out", **given)
    shown = call("summary", tmp_path / "out")
    assert shown.exit_code == 0 and "2 value both" in shown.stdout and "%" not in shown.stdout


def test_a_run_beside_itself_is_said_to_be_of_the_same_plan(whole):
    shown = call("diff", whole.directory, whole.directory)
    assert shown.exit_code == 0 and shown.stdout.startswith("The plans are the same.")
    assert "9 prompts in both, 9 with the same target; 0 in the first alone" in shown.stdout


def test_a_share_given_by_hand_is_taken_whatever_the_environment_says(asked, tmp_path):
    given = ("run", asked, "--out", tmp_path / "out", "--top", 2, "--shard-size", 2)
    environment = {"RANK": "0", "WORLD_SIZE": "2"}
    shown = call(*given, "--share", "1/2", **environment)
    assert "share 1 of 2 (from 0): one shard in 2\n" in shown.stderr
    assert load_run(tmp_path / "out").shards == (1,)
    assert call(*given, "--quiet", **environment).output == ""
    assert load_run(tmp_path / "out").complete
    shown = call(*given, "--share", "all", **environment)
    assert shown.exit_code == 0 and "share 0" not in shown.stderr
    assert "2 of 2 shards are done already" in shown.stderr
    assert "a share looks like 0/4" in call(*given, "--share", "2").stderr


def test_the_command_says_what_is_wrong_in_a_sentence(asked, tmp_path):
    for arguments, message in (
        (("run", asked, "--out", tmp_path), "is not empty and holds no run"),
        (("run", tmp_path / "no.jsonl", "--out", tmp_path / "out"), "there is no such file"),
        (("run", asked, "--out", tmp_path / "out", "--what", "all"), "what must be some of"),
        (
            ("run", asked, "--out", tmp_path / "out", "--what", "methods"),
            "the table methods needs methods",
        ),
        (
            ("run", asked, "--out", tmp_path / "out", "--zero", "3"),
            "zero is given, but what does not ask for the table interventions",
        ),
        (("run", asked, "--out", tmp_path / "out", "--max-failures", 0), "1 prompts failed, more"),
        (("summary", tmp_path), "there is no run in"),
    ):
        shown = call(*arguments)
        assert shown.exit_code == 2 and shown.stdout == ""
        assert message in shown.stderr.replace("\n", " ")
