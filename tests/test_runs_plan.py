"""What a run will do: same inputs, same shards; and what is wrong with prompts, in a sentence."""

import dataclasses
import json
import math

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import bridge_of, bundled_model

from tl_neuron_attr import (
    InputError,
    Prompt,
    Share,
    known_prompts,
    load_prompts,
    open_host,
    plan,
    share_of_environment,
)
from tl_neuron_attr.parts import differences
from tl_neuron_attr.runs.asked import source_of
from tl_neuron_attr.runs.planned import batch_sizes, plan_run, prompts_hash
from tl_neuron_attr.runs.settings import LARGEST_BATCH, RunSettings

KNOWN = {"top": 300, "convention": "exact", "prepend_bos": None, "budget": 2**30, "threads": 1}


def settings_of(*, what="neurons", batch_size=None, shard_size=256, **given):
    return RunSettings.of(
        what=what, batch_size=batch_size, **{**KNOWN, "shard_size": shard_size, **given}
    )


@pytest.fixture(scope="module")
def host():
    return open_host(bundled_model())


@pytest.fixture(scope="module")
def prompts():
    return [*load_prompts("capital")[:9], *load_prompts("number")[:8]]


def planned(host, prompts, **given):
    return plan_run(host, source_of(prompts)(), settings_of(**given))


def test_the_same_inputs_give_the_same_plan(host, prompts):
    one, other = (planned(host, prompts, shard_size=5) for _ in range(2))
    assert one.identity == other.identity and one.prompts.equals(other.prompts)
    changed = planned(host, prompts, shard_size=5, top=10).identity
    assert differences(one.identity, changed) == [("settings.top", 300, 10)]
    fewer = planned(host, prompts[1:], shard_size=5).identity
    assert [name for name, *_ in differences(one.identity, fewer)] == [
        "prompts.count",
        "prompts.sha256",
    ]
    json.dumps(one.identity)


def test_shards_are_prompts_in_a_row_and_batches_those_of_about_one_length(host, prompts):
    table = planned(host, prompts, shard_size=5, batch_size=2).prompts.to_pandas()
    assert table["row"].tolist() == list(range(17))
    assert table["shard"].tolist() == [row // 5 for row in range(17)]
    for _, shard in table[table["error"].isna()].groupby("shard"):
        batches = shard.sort_values(["batch", "n_tokens"])
        assert batches.groupby("batch").size().max() <= 2
        # the shortest of a batch is no shorter than the longest of the next
        ends = batches.groupby("batch")["n_tokens"].agg(["min", "max"])
        assert (ends["min"].to_numpy()[:-1] >= ends["max"].to_numpy()[1:]).all()
        assert sorted(batches["batch"].unique()) == list(range(int(batches["batch"].max()) + 1))


def test_a_batch_is_as_large_as_the_budget_allows_and_no_larger():
    host = open_host(bridge_of("gpt2"))
    for budget in (2**16, 2**17, 2**18, 2**20):
        settings = settings_of(budget=budget, top=5)
        for n_tokens in (3, 20):
            size = batch_sizes(host, settings)(n_tokens)

            def peak(count, n_tokens=n_tokens, budget=budget):
                found = plan(
                    host.model,
                    n_tokens=n_tokens,
                    top=5,
                    n_prompts=count,
                    batch_size=count,
                    budget=budget,
                    operations_per_second=1e9,
                )
                return found.certified.peak_bytes if found.batch_size == count else budget + 1

            assert size == 1 or peak(size) <= budget
            assert size == LARGEST_BATCH or peak(size + 1) > budget
    sizes = [batch_sizes(host, settings_of(budget=2**17, top=5))(n) for n in (3, 10, 30)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_every_kind_of_file_gives_the_same_prompts(host, tmp_path):
    rows = [
        {"text": "The capital of France is", "answer": "Paris", "knowledge_type": "capital"},
        {"text": 'Quotes ", and commas', "target": " of", "prompt_id": "mine"},
        {"tokens": [5, 6, 7], "position": 1},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["text", "answer", "knowledge_type", "target", "prompt_id", "tokens", "position"]
    whole_rows = [{name: row.get(name) for name in columns} for row in rows]
    pq.write_table(pa.Table.from_pylist(whole_rows), tmp_path / "p.parquet")
    table = pd.DataFrame(rows, columns=columns, dtype=object)
    table["tokens"] = [None, None, "5 6 7"]
    table.to_csv(tmp_path / "p.csv", index=False)
    found = {}
    for name in ("p.jsonl", "p.parquet", "p.csv"):
        asked = [*source_of(tmp_path / name)()]
        assert asked == [*source_of(str(tmp_path / name))()]  # walked through again, the same
        assert [each.error for each in asked] == [None] * 3
        assert [each.prompt_id for each in asked] == ["p/1", "mine", "p/3"]
        found[name] = [(each.prompt.text, each.prompt.tokens, each.prompt.target) for each in asked]
        assert asked[0].knowledge_type == "capital" and asked[1].prompt_id == "mine"
        assert asked[2].prompt.position == 1 and asked[0].prompt.target == " Paris"
    assert found["p.jsonl"] == found["p.parquet"] == found["p.csv"]
    table = plan_run(host, source_of(tmp_path / "p.jsonl")(), settings_of()).prompts
    assert table["read_pos"].to_pylist()[2] == 1


def test_prompts_in_any_form_can_be_mixed(host, prompts):
    known = known_prompts(host, prompts[:2], top=None, above_type=False).kept
    mixed = ["Hello", [3, 4], Prompt(text="Hi", prompt_id="named"), prompts[3], *known[:1]]
    mixed.append({"text": "The capital of France is", "answer": "Paris"})
    mixed.append({"prompt": "The capital of France is", "answer": "Paris"})
    table = planned(host, mixed).prompts.to_pylist()
    assert table[-1]["tokens"] == table[-2]["tokens"] and table[-1]["target_text"] == " Paris"
    assert [row["error"] for row in table] == [None] * len(mixed)
    assert [row["prompt_id"] for row in table][:3] == ["0", "1", "named"]
    assert table[3]["knowledge_type"] == "capital" and table[3]["target_text"] == prompts[3].answer
    assert table[4]["tokens"] == list(known[0].tokenized.tokens)
    assert table[4]["target"] == known[0].tokenized.target.id


WRONG_FILES = {
    "no JSON": ("p.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 of .* is no JSON"),
    "no object": ("p.jsonl", b"[1]\n", "line 1 of .* must be an object or a text"),
    "type of all": (
        "p.jsonl",
        b'{"text": "a", "knowledge_type": "all"}\n',
        "'all' stands for all of them",
    ),
    "unknown field": ("p.jsonl", b'{"txt": "a"}\n', "unknown field 'txt'; known are text"),
    "both": ("p.jsonl", b'{"text": "a", "tokens": [1]}\n', "both text and tokens"),
    "two answers": ("p.jsonl", b'{"text": "a", "answer": "b", "target": "c"}\n', "both answer and"),
    "no text": ("p.jsonl", b'{"text": 3}\n', "line 1 of .*: text must be text, got 3"),
    "too deep": ("p.jsonl", b"[" * 10**5, "line 1 of .* is nested too deeply"),
    "not UTF-8": ("p.jsonl", b'"a"\n"\xff"\n', "line 2 of .* is not UTF-8 .*0xff.* save the file"),
    "CSV not UTF-8": ("p.csv", b"text\n\xe9\n", "line 2 of .* is not UTF-8"),
    "empty": ("p.jsonl", b"\n", "there are no prompts in"),
    "cells": ("p.csv", b"text,answer\na,b,c\n", "has 3 cells and the header 2"),
    "column twice": ("p.csv", b"text,text\na,b\n", "a column's name occurs twice"),
    "wrong column": ("p.csv", b"sentence\na\n", "line 1 of .* unknown column 'sentence'"),
    "wrong empty column": ("p.csv", b"text,txt\na,\n", "line 1 of .* unknown column 'txt'"),
    "no column of texts": ("p.csv", b"answer\na\n", "line 1 of .* lacks a column text .*it has a"),
    "cell without a name": ("p.csv", b"text,\na,b\n", "line 2 of .* unknown field ''"),
    "no number": ("p.csv", b"text,position\na,last\n", "must be whole numbers"),
    "truncated": ("p.parquet", b"PAR1half of it", "no whole Parquet file"),
    "absent": ("q.jsonl", None, "there is no such file"),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, wrong):
    name, content, message = WRONG_FILES[wrong]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        list(source_of(tmp_path / name)())
    assert "\n" not in str(raised.value)


def test_a_file_that_the_system_does_not_read_is_said_with_its_reason(tmp_path):
    (tmp_path / "p.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match="cannot read prompts from .*p.jsonl': Input/output error"):
        list(source_of(tmp_path / "p.jsonl")())


def test_parquet_files_with_other_columns_are_refused(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"sentence": ["a"]}), path)
    with pytest.raises(InputError, match="unknown column 'sentence'"):
        list(source_of(path)())
    pq.write_table(pa.table({"answer": ["a"]}), path)
    with pytest.raises(InputError, match="lacks a column text"):
        list(source_of(path)())
    sound = pa.table({"text": ["a"] * 5000})
    pq.write_table(sound, path, compression="none")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="no whole Parquet file"):
        list(source_of(path)())


def test_a_csv_file_is_read_as_a_stream_whatever_ends_its_lines(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b"text\na\n\xe9\n")
    rows = source_of(path)()
    assert next(rows).text == "a"
    with pytest.raises(InputError, match="line 3 of .* is not UTF-8"):
        next(rows)
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(
            end.join(["text,answer", '"a ""b""",c', '"two\u2028', 'lines",d', ""]).encode()
        )
        found = [(each.text, each.prompt.target) for each in source_of(path)()]
        assert found == [('a "b"', " c"), (f"two\u2028{end}lines", " d")]


def test_whole_numbers_that_pandas_keeps_as_floats_are_taken_as_such(tmp_path):
    path = tmp_path / "p.parquet"
    numbers = {"target": [5.0, None, math.nan], "against": [6.0, None, None]}
    pq.write_table(pa.table({"text": ["a"] * 3, **numbers, "position": [None, 1.0, 0.5]}), path)
    one, two, three = source_of(path)()
    assert (one.prompt.target, one.prompt.against, one.prompt.position) == (5, 6, -1)
    assert type(one.prompt.target) is int and two.prompt.position == 1
    assert two.prompt.target is None and "position" in three.error


def test_a_knowledge_type_all_is_refused_in_whatever_form_the_prompt_comes(host, prompts):
    fact = dataclasses.replace(prompts[0].fact, knowledge_type="all")
    named = dataclasses.replace(prompts[0], fact=fact)
    (asked,) = known_prompts(host, [named], top=None, above_type=False).kept
    for each in (named, asked):
        with pytest.raises(
            InputError, match="prompt .capital.*: the knowledge type 'all' stands for all"
        ):
            list(source_of([each])())


def test_what_is_wrong_with_a_prompt_is_a_row(host):
    wrong = {
        "": "the prompt is empty",
        "half \ud800 of": "not valid Unicode",
        "word " * 300: "longer than the model's context",
    }
    asked = [*wrong, "fine", {"text": "x", "target": " not one token"}, [99999], {"answer": "b"}]
    asked.append(Prompt(text="The capital of France is", target={" Paris", " Rome"}))
    table = planned(host, asked).prompts.to_pylist()
    reasons = [*wrong.values(), None, "tokens", "outside the model's vocabulary", "text or tokens"]
    reasons.append("a run's tables hold one token as target")
    for row, reason in zip(table, reasons, strict=True):
        assert (row["error"] is None) == (reason is None)
        assert reason is None or reason in row["error"], row
        assert (row["batch"] is None) == (reason is not None)


def test_ids_must_be_unique_and_prompts_must_be_there(host):
    same = [Prompt(text="a", prompt_id="x"), Prompt(text="b", prompt_id="x")]
    with pytest.raises(InputError, match="prompt_id 'x' occurs twice"):
        planned(host, same, shard_size=1)
    with pytest.raises(InputError, match="there are no prompts"):
        plan_run(host, iter(()), settings_of())
    for nothing in ([], 3, b"text", {"text": "a"}):
        with pytest.raises(InputError, match="prompts"):
            source_of(nothing)


def test_whether_texts_begin_with_a_bos_is_the_runs_unless_the_prompt_says(host):
    own = host.model.tokenizer.bos_token_id
    asked = ["The", Prompt(text="The", prepend_bos=True), Prompt(text="The", prepend_bos=False)]

    def begins(prepend_bos):
        table = planned(host, [*asked, [5, 6]], prepend_bos=prepend_bos).prompts.to_pylist()
        assert table[3]["tokens"] == [5, 6], "token ids are used as they are"
        return [row["tokens"][0] == own for row in table[:3]]

    assert begins(True) == [True, True, False] and begins(False) == [False, True, False]


def test_the_plans_hash_is_that_of_its_table(host, prompts):
    found = planned(host, [*prompts, ""], shard_size=4)
    assert prompts_hash(found.prompts) == found.identity["prompts"]["sha256"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"what": "neurons,words"}, "what must be some of neurons, .*; got 'words'"),
        ({"what": []}, "what must be some of"),
        ({"top": 0}, "top must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"shard_size": 1.5}, "shard_size must be an integer"),
        ({"convention": "own"}, "convention must be one of"),
    ],
)
def test_settings_are_checked(wrong, message):
    with pytest.raises(InputError, match=message):
        settings_of(**wrong)


def test_a_launcher_says_which_share_is_whose():
    assert share_of_environment({}) == Share(rank=0, of=1)
    assert share_of_environment({"RANK": "2", "WORLD_SIZE": "4"}) == Share(rank=2, of=4)
    slurm = {"SLURM_ARRAY_TASK_ID": "15", "SLURM_ARRAY_TASK_COUNT": "3"}
    slurm |= {"SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_STEP": "5"}
    assert share_of_environment(slurm) == Share(rank=2, of=3)
    shares = [Share(rank=rank, of=3) for rank in range(3)]
    assert [sum(share.has(shard) for share in shares) for shard in range(10)] == [1] * 10
    for wrong, message in (
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a number"),
        ({"RANK": "3", "WORLD_SIZE": "3"}, "rank 3 is out of range"),
        ({**slurm, "SLURM_ARRAY_TASK_ID": "16"}, "none of the array's"),
    ):
        with pytest.raises(InputError, match=message):
            share_of_environment(wrong)
