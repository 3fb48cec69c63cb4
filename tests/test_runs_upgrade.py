"""Runs of another schema: read, upgraded into a copy, refused; and what is damaged is said.

``data/run-v1`` was made by the release before methods and interventions: four prompts, one of them
a failure, in two shards. Its summary was deleted.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import bundled_model
from typer.testing import CliRunner

import tl_neuron_attr.runs.planned as planned_module
import tl_neuron_attr.runs.run as run_module
from tl_neuron_attr import (
    InputError,
    cli,
    diff_runs,
    load_prompts,
    load_run,
    run_prompts,
    upgrade_run,
)
from tl_neuron_attr.parts import as_text, fingerprint
from tl_neuron_attr.runs.schema import FORMAT, KEY

OLD = Path(__file__).parent / "data" / "run-v1"
SETTINGS = {"what": "neurons,layers", "top": 3, "shard_size": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture(scope="module")
def prompts():
    """What the old run is of."""
    bad = {"text": "The capital of Spain is", "target": " not one token", "prompt_id": "bad"}
    return [*load_prompts("capital")[:4:2], *load_prompts("number")[:1], bad]


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


@pytest.fixture
def same_versions(monkeypatch):
    """As if these were the machine and the release that the old run was made with."""
    versions = json.loads((OLD / "plan.json").read_text())["identity"]["versions"]
    monkeypatch.setattr(planned_module, "version_of", versions.__getitem__)
    (said,) = {each for each in pq.read_table(OLD / "prompts.parquet")["error"].to_pylist() if each}
    real = planned_module.tokenize

    def in_its_words(*arguments):
        try:
            return real(*arguments)
        except InputError:
            raise InputError(said) from None

    monkeypatch.setattr(planned_module, "tokenize", in_its_words)


@pytest.fixture(autouse=True)
def loaded(model, monkeypatch):
    monkeypatch.setattr(run_module, "load_model", lambda *given, **options: model)


def bytes_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


def call(*arguments):
    environment = {"COLUMNS": "100", "RANK": None, "WORLD_SIZE": None}
    return CliRunner().invoke(cli.app, [str(each) for each in arguments], env=environment)


# --- an earlier schema ------------------------------------------------------------------------


def test_a_run_of_version_1_is_read_as_it_is():
    before = bytes_of(OLD)
    run = load_run(OLD, verify=True)
    assert run.facts["format"] == 1 and run.complete
    assert (run.settings.methods, run.settings.zero) == ((), ())
    assert len(run.table("answers")) == 3 and len(run.table("neurons")) == 3 * 2 * 3
    assert run.table("errors")["prompt_id"].tolist() == ["bad"]
    summary = run.summary()
    assert summary.facts["prompts"][-1]["prompts"] == 3 and summary.methods is None
    assert call("summary", OLD).exit_code == 0
    assert diff_runs(OLD, OLD).plans.empty and bytes_of(OLD) == before


def test_a_run_of_version_1_is_not_gone_on_with_but_named_what_upgrades_it(model, prompts, old):
    before = bytes_of(old)
    message = f"tl-neuron-attr upgrade {old} --out NEW, and go on there"
    with pytest.raises(InputError, match=message) as raised:
        run_prompts(model, prompts, old, **SETTINGS)
    assert "\n" not in str(raised.value) and bytes_of(old) == before


def test_an_upgraded_run_holds_the_same_rows_and_is_whole(old, tmp_path):
    before = bytes_of(old)
    new = upgrade_run(old, tmp_path / "new")
    assert bytes_of(old) == before and new.complete and new.facts["format"] == FORMAT
    again = load_run(tmp_path / "new", verify=True)
    for table in again.tables:
        assert again.table(table).equals(load_run(old).table(table)), table
        for path in (tmp_path / "new" / table).iterdir():
            facts = json.loads(pq.read_schema(path).metadata[KEY])
            assert (facts["format"], facts["plan"]) == (FORMAT, new.parts.plan)
    assert pd.read_parquet(tmp_path / "new" / "summary.parquet").equals(new.summary().neurons)
    assert (tmp_path / "new" / "manifest.json").is_file()
    changed = diff_runs(old, new).plans
    assert set(changed["name"]) == {
        "format",
        "settings.methods",
        "settings.zero",
        "settings.seed",
    }
    assert upgrade_run(old, tmp_path / "new").complete  # interrupted, it may be called again


def test_an_upgraded_run_is_gone_on_with(model, prompts, old, tmp_path, same_versions):
    (old / "records" / "shard-00001.json").unlink()
    half = upgrade_run(old, tmp_path / "new")
    assert half.shards == (0,) and not (tmp_path / "new" / "manifest.json").exists()
    first = (tmp_path / "new" / "neurons" / "shard-00000.parquet").read_bytes()
    said = []
    run = run_prompts(model, prompts, tmp_path / "new", announce=said.append, **SETTINGS)
    assert said == ["1 of 2 shards are done already; going on with 1"] and run.complete
    assert (tmp_path / "new" / "neurons" / "shard-00000.parquet").read_bytes() == first
    ours, theirs = run.table("neurons"), load_run(OLD).table("neurons")
    assert ours.drop(columns=["score", "coefficient"]).equals(
        theirs.drop(columns=["score", "coefficient"])
    )
    assert np.allclose(ours["score"], theirs["score"], atol=1e-5)


def test_what_is_damaged_is_left_out_of_the_copy_and_said(old, tmp_path):
    path = old / "neurons" / "shard-00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    shown = call("upgrade", old, "--out", tmp_path / "new")
    assert shown.exit_code == 0 and "shard 0 is not as it was recorded" in shown.stderr
    assert "1 of 2 shards" in shown.stderr and load_run(tmp_path / "new").shards == (1,)
    assert upgrade_run(old, tmp_path / "again").shards == (1,)


def test_a_record_of_a_table_that_no_run_has_is_named(old, tmp_path):
    """Sound in itself: whoever wrote it knew how."""
    path = old / "records" / "shard-00000.json"
    facts = json.loads(path.read_text())
    facts["files"]["words"] = facts["files"].pop("layers")
    shutil.copytree(old / "layers", old / "words")
    signed = {name: value for name, value in facts.items() if name != "checksum"}
    path.write_text(as_text({**signed, "checksum": fingerprint([signed])}))
    with pytest.raises(InputError, match="record of shard-00000 .* a table 'words', which no run"):
        upgrade_run(old, tmp_path / "new")


def test_what_cannot_be_upgraded_is_refused(old, tmp_path):
    with pytest.raises(InputError, match="holds another run: its format is 1, this one's 2"):
        upgrade_run(old, old)
    new = upgrade_run(old, tmp_path / "new").directory
    with pytest.raises(InputError, match="is of schema version 2 already"):
        upgrade_run(new, tmp_path / "newer")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        upgrade_run(old, tmp_path / "full")
    with pytest.raises(InputError, match="there is no run in"):
        upgrade_run(tmp_path / "full", tmp_path / "newer")
    pq.write_table(pq.read_table(old / "prompts.parquet").slice(1), old / "prompts.parquet")
    with pytest.raises(InputError, match="no longer holds the prompts of this run"):
        upgrade_run(old, tmp_path / "newer")
    assert not (tmp_path / "newer").exists()


# --- what is corrupt --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def current(tmp_path_factory):
    return upgrade_run(OLD, tmp_path_factory.mktemp("runs") / "current")


@pytest.fixture
def run(current, tmp_path):
    shutil.copytree(current.directory, tmp_path / "run")
    return tmp_path / "run"


def edited(name, change, *, signed=False):
    def edit(run):
        facts = json.loads((run / name).read_text())
        change(facts["identity"] if name == "plan.json" else facts)
        if signed:
            facts["checksum"] = fingerprint([facts["identity"]])
        (run / name).write_text(as_text(facts))

    return edit


def cut(name):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-20])


def replaced(name, content):
    return lambda run: (run / name).write_bytes(content)


def other_columns(name):
    return lambda run: pq.write_table(pa.table({"sentence": ["a"]}), run / name)


def flipped(name):
    def flip(run):
        content = bytearray((run / name).read_bytes())
        content[len(content) // 3] ^= 1
        (run / name).write_bytes(bytes(content))

    return flip


NEURONS = "neurons/shard-00000.parquet"
NOT_UTF8 = b'{"a": "\xff"}'

CORRUPT = {
    "truncated shard": (cut(NEURONS), "is damaged .*makes the damaged part again", False),
    "other columns": (other_columns(NEURONS), "is damaged .*not the file recorded", False),
    "no shard": (lambda run: (run / NEURONS).unlink(), "is damaged", False),
    "changed shard": (flipped(NEURONS), "is damaged", True),
    "prompts cut": (cut("prompts.parquet"), "prompts.parquet' cannot be read", True),
    "other prompts": (other_columns("prompts.parquet"), "has not the columns of a run's", True),
    "manifest": (
        edited("manifest.json", lambda f: f["shards"].pop("shard-00001")),
        "is not what the run's records say",
        False,
    ),
    "manifest's end": (
        edited("manifest.json", lambda f: f["end"].pop("summary.parquet")),
        "is not what the run's records say",
        False,
    ),
    "summary cut": (cut("summary.parquet"), "is not the file that was written; the comm", True),
    "changed errors": (flipped("errors.parquet"), "is not the file that was written", True),
    "no summary": (lambda run: (run / "summary.json").unlink(), "is not the file that", True),
    "manifest not UTF-8": (replaced("manifest.json", NOT_UTF8), "is not what the run's rec", False),
    "manifest unsigned": (
        edited("manifest.json", lambda f: f.pop("checksum")),
        "is not what the run's records say",
        False,
    ),
    "plan": (edited("plan.json", lambda f: f.update(shards=9)), "was changed after", False),
    "plan not UTF-8": (replaced("plan.json", NOT_UTF8), "cannot be read as a plan", False),
    "plan too deep": (replaced("plan.json", b"[" * 10**5), "cannot be read as a plan", False),
    "plan of something else": (
        edited("plan.json", lambda f: f.pop("shards"), signed=True),
        "is not that of a run",
        False,
    ),
    "plan about nothing": (
        lambda run: (run / "plan.json").write_text(
            as_text({**json.loads((run / "plan.json").read_text()), "about": None})
        ),
        "cannot be read as a plan",
        False,
    ),
    "record": (
        edited("records/shard-00001.json", lambda f: f["files"].pop("layers")),
        "is not as it was written; remove it",
        False,
    ),
    "record not UTF-8": (
        replaced("records/shard-00001.json", NOT_UTF8),
        "is not as it was written; remove it",
        False,
    ),
    "older than any": (
        edited("plan.json", lambda f: f.update(format=0), signed=True),
        "is of schema version 0, which no release wrote",
        False,
    ),
    "newer": (
        edited(
            "plan.json",
            lambda f: (f.update(format=3), f["versions"].update(tl_neuron_attr="7.1")),
            signed=True,
        ),
        "is of schema version 3, .*the release that wrote it, tl_neuron_attr 7.1",
        False,
    ),
    "newer, of no release": (
        edited("plan.json", lambda f: f.update(format=3, versions=["7.1"]), signed=True),
        "is of schema version 3, .*the release that wrote it, tl_neuron_attr a later one",
        False,
    ),
}


def naming_nothing(path):
    """The bytes of a table, one of them changed so that a type's code is of no type."""
    content = path.read_bytes()
    for place in range(len(content)):
        other = content[:place] + bytes([content[place] ^ 0x74]) + content[place + 1 :]
        try:
            pq.read_table(pa.BufferReader(other), columns=["knowledge_type"]).validate(full=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            if "Dictionary indices" in str(error):
                return other
    raise AssertionError("no byte of the file is a code")


@pytest.mark.parametrize("table", ["neurons", "layers"])
def test_a_code_that_names_nothing_is_damage_and_never_another_name(run, table):
    path = run / table / "shard-00000.parquet"
    path.write_bytes(naming_nothing(path))  # of the same length: only hashes would tell
    found = load_run(run)
    with pytest.raises(InputError, match="is damaged .*Dictionary indices"):
        found.table(table)
    with pytest.raises(InputError, match="is damaged .*not the file recorded"):
        found.summary()


def test_a_summary_takes_no_number_that_is_not_the_one_written(run):
    """Of all changes of one byte, every one: most make another number, and no error."""
    path = run / NEURONS
    content = path.read_bytes()
    found = load_run(run)
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match="not the file recorded"):
            found.summary()
    path.write_bytes(content)
    assert len(found.summary().neurons)


@pytest.mark.parametrize("corrupt", CORRUPT)
def test_a_corrupt_run_is_one_sentence_and_nothing_is_overwritten(run, corrupt):
    """Through the library and the command; where only reading everything tells, with verify."""
    damage, message, only_by_hash = CORRUPT[corrupt]
    damage(run)
    before = bytes_of(run)
    with pytest.raises(InputError, match=message) as raised:
        load_run(run, verify=True)
    assert "\n" not in str(raised.value)
    if not only_by_hash:
        with pytest.raises(InputError, match=message):
            load_run(run)
    for options in [("--verify",)] if only_by_hash else [(), ("--verify",)]:
        shown = call("summary", run, *options)
        assert shown.exit_code == 2 and shown.stdout == ""
        assert "Traceback" not in shown.stderr
    assert bytes_of(run) == before


def string_column_not_utf8(path):
    text = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), path)


PROMPT_FILES = {
    "truncated.parquet": lambda path: (
        pq.write_table(pa.table({"text": ["a"] * 99}), path),
        path.write_bytes(path.read_bytes()[:-30]),
    ),
    "columns.parquet": lambda path: pq.write_table(pa.table({"sentence": ["a"]}), path),
    "utf8.parquet": string_column_not_utf8,
    "utf8.jsonl": lambda path: path.write_bytes(b'"a"\n"\xff"\n'),
    "utf8.csv": lambda path: path.write_bytes(b"text\n\xe9\n"),
    "columns.csv": lambda path: path.write_bytes(b"sentence\na\n"),
    "columns.jsonl": lambda path: path.write_bytes(b'{"sentence": "a"}\n'),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_a_corrupt_prompt_file_is_one_sentence_and_nothing_is_made(model, tmp_path, name):
    path = tmp_path / name
    PROMPT_FILES[name](path)
    reason = {
        "truncated": "no whole Parquet file",
        "columns": "unknown (field|column) 'sentence'",
        "utf8": "is not UTF-8",
    }[name.split(".")[0]]
    with pytest.raises(InputError, match=reason) as raised:
        run_prompts(model, path, tmp_path / "out")
    assert "\n" not in str(raised.value)
    shown = call("run", path, "--out", tmp_path / "out")
    assert shown.exit_code == 2 and shown.stdout == "" and "Traceback" not in shown.stderr
    assert not (tmp_path / "out").exists()


# --- a finished run that lost what is written at the end --------------------------------------


@pytest.mark.parametrize(
    "lost",
    [
        "summary.parquet",
        "summary_layers.parquet",
        "summary.json",
        "errors.parquet",
        "manifest.json",
    ],
)
def test_what_a_finished_run_lost_is_written_again(model, prompts, run, same_versions, lost):
    before = bytes_of(run)
    os.remove(run / lost)
    assert load_run(run).complete
    assert run_prompts(model, prompts, run, **SETTINGS).complete
    assert bytes_of(run) == before


@pytest.mark.parametrize("name", ["summary.parquet", "summary.json", "errors.parquet"])
def test_what_is_damaged_of_the_end_of_a_finished_run_is_written_again(
    model, prompts, run, same_versions, name
):
    before = bytes_of(run)
    cut(name)(run)
    assert run_prompts(model, prompts, run, **SETTINGS).complete
    assert bytes_of(run) == before


def test_of_one_prompt_no_other_shard_is_opened(run):
    first, *_, last = load_run(run).prompts()["prompt_id"]
    found = load_run(run)
    (run / NEURONS).unlink()  # of shard 0, unseen by what was loaded before
    third = found.prompts()["prompt_id"][2]
    assert len(found.table("neurons", prompt_id=third, columns=["score"])) == 6
    assert len(found.table("neurons", prompt_id=last)) == 0  # it failed
    assert len(found.table("neurons", prompt_id="nobody")) == 0
    with pytest.raises(InputError, match="is damaged"):
        found.table("neurons", prompt_id=first)
