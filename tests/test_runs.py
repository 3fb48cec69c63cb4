"""Many prompts: what one call a prompt gives, whatever the batches; killed, the same bytes."""

import ctypes
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import bundled_model
from tqdm import tqdm

import tl_neuron_attr.runs.progress as progress_module
import tl_neuron_attr.runs.run as run_module
import tl_neuron_attr.runs.shard as shard_module
from tl_neuron_attr import (
    IdentityError,
    InputError,
    NonFiniteError,
    OutputError,
    Prompt,
    Share,
    Stopped,
    TooManyFailuresError,
    attribute,
    load_model,
    load_prompts,
    load_run,
    run_prompts,
)
from tl_neuron_attr.files import write_files
from tl_neuron_attr.parts import as_text, fingerprint
from tl_neuron_attr.runs import Progress, line_report
from tl_neuron_attr.runs.schema import KEY, SCHEMAS
from tl_neuron_attr.runs.shard import Worker
from tl_neuron_attr.runs.stopping import finishing_first

TOP = 6
WHAT = ("neurons", "query_neurons", "layers", "heads")


@pytest.fixture(scope="module")
def model():
    return bundled_model()


def two_types():
    """Prompts of several lengths, and two that cannot be run."""
    some = [*load_prompts("capital")[:9:2], *load_prompts("number")[:9:2]]
    return [*some[:3], "", *some[3:], Prompt(text="one", target=" not one token", prompt_id="bad")]


@pytest.fixture(scope="module")
def prompts():
    return two_types()


def run(model, prompts, directory, **given):
    return run_prompts(model, prompts, directory, **{"top": TOP, "shard_size": 4, **given})


@pytest.fixture(scope="module")
def whole(model, prompts, tmp_path_factory):
    return run(model, prompts, tmp_path_factory.mktemp("runs") / "whole", what=WHAT)


@pytest.fixture(scope="module")
def plain(model, prompts, tmp_path_factory):
    """The same with fewer tables: what most tests stop, damage and go on with."""
    return run(model, prompts, tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture
def copied(plain, tmp_path):
    shutil.copytree(plain.directory, tmp_path / "run")
    return tmp_path / "run"


def bytes_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


def answered(found):
    return found.table("answers").set_index("prompt_id")


# --- what is in it ----------------------------------------------------------------------------


def test_every_table_is_what_one_call_a_prompt_gives(model, prompts, whole):
    assert whole.complete and whole.n_shards == 3
    for prompt in prompts:
        if isinstance(prompt, (str, Prompt)):
            continue
        result = attribute(model, prompt.text, target=prompt.answer, top=TOP)
        here = {name: whole.table(name, prompt_id=prompt.prompt_id) for name in WHAT}
        columns = ["layer", "head", "index", "source_pos", "rank"]
        for name, table in (
            ("neurons", result.neurons()),
            ("query_neurons", result.query_neurons(TOP)),
        ):
            saved = here[name]
            for column in ("role", "kind"):
                assert saved[column].tolist() == table[column].tolist()
            for column in columns:
                assert saved[column].fillna(-1).tolist() == table[column].fillna(-1).tolist()
            for column in ("score", "coefficient"):
                assert np.abs(saved[column] - table[column]).max() < 1e-6
        for name, table in (("layers", result.layers()), ("heads", result.heads())):
            assert here[name]["layer"].tolist() == table["layer"].tolist()
            other = "kind" if name == "layers" else "head"
            assert here[name][other].tolist() == table[other].tolist()
            assert np.abs(here[name]["score"] - table["score"]).max() < 1e-6
        answer = answered(whole).loc[prompt.prompt_id]
        assert answer["log_prob"] == pytest.approx(result.log_prob, abs=1e-6)
        assert answer["target_text"] == prompt.answer and answer["proven"]
        assert answer["ffn_scored"] >= TOP


def test_batches_shards_and_threads_change_no_result(model, prompts, plain, tmp_path):
    columns = ["prompt_id", "kind", "layer", "head", "index", "source_pos", "rank"]
    first = plain.table("neurons")
    for given in ({"batch_size": 1, "shard_size": 64}, {"batch_size": 3, "shard_size": 5}):
        other = run(model, prompts, tmp_path / str(given["batch_size"]), **given).table("neurons")
        assert other[columns].equals(first[columns])
        assert np.abs(other["score"] - first["score"]).max() < 1e-6
        assert np.abs(other["coefficient"] - first["coefficient"]).max() < 1e-6
    before = torch.get_num_threads()
    more = run(model, prompts[:4], tmp_path / "threads", threads=2).table("neurons")
    assert torch.get_num_threads() == before
    assert np.abs(more["score"] - first["score"][: len(more)]).max() < 1e-6


def test_prompts_that_cannot_be_run_are_rows_with_the_reason(whole):
    errors = whole.table("errors")
    assert errors["prompt_id"].tolist() == ["3", "bad"] and errors["row"].tolist() == [3, 11]
    assert errors["stage"].tolist() == ["planning"] * 2
    assert "empty" in errors["reason"][0] and "tokens" in errors["reason"][1]
    assert not set(errors["prompt_id"]) & set(answered(whole).index)
    assert len(answered(whole)) + len(errors) == len(whole.prompts())
    assert (whole.directory / "errors.parquet").exists()


def test_files_have_the_documented_columns_and_say_what_they_are_of(whole):
    for name in ("answers", *WHAT, "errors"):
        for path in (whole.directory / name).iterdir():
            schema = pq.read_schema(path)
            assert schema.remove_metadata().equals(SCHEMAS[name]), name
            facts = json.loads(schema.metadata[KEY])
            assert facts["plan"] == whole.parts.plan and facts["table"] == name
            assert facts["format"] == 2 and facts["score_unit"] == "nats"
            assert facts["model"]["sha256"] == whole.facts["model"]["sha256"]
            assert "act(pre)" in facts["neuron_basis"]["ffn"]
            assert facts["versions"]["torch"] == torch.__version__
    manifest = json.loads((whole.directory / "manifest.json").read_text())
    shard = manifest["shards"]["shard-00001"]["neurons"]
    assert shard["rows"] == pq.read_metadata(whole.parts.path("shard-00001", "neurons")).num_rows


def test_a_prompt_that_fails_on_the_way_leaves_its_neighbours_as_they_are(
    model, prompts, plain, tmp_path, monkeypatch
):
    real, victim = shard_module.attribute_all, prompts[1].prompt_id

    def failing(model, some, **options):
        if victim in [each.prompt_id for each in some]:
            raise NonFiniteError("activations are not finite")
        return real(model, some, **options)

    monkeypatch.setattr(shard_module, "attribute_all", failing)
    found = run(model, prompts, tmp_path / "run")
    errors = found.table("errors").set_index("prompt_id")
    assert errors.loc[victim, ["stage", "reason"]].tolist() == [
        "running",
        "activations are not finite",
    ]
    others, first = found.table("neurons"), plain.table("neurons")
    first = first[first["prompt_id"] != victim].reset_index(drop=True)
    assert others["index"].tolist() == first["index"].tolist()
    assert np.abs(others["score"] - first["score"]).max() < 1e-6


def test_a_model_that_contradicts_the_package_stops_the_run(model, prompts, tmp_path, monkeypatch):
    def contradicted(*arguments, **options):
        raise IdentityError("not so")

    monkeypatch.setattr(shard_module, "attribute_all", contradicted)
    with pytest.raises(IdentityError):
        run(model, prompts, tmp_path / "run")
    assert not load_run(tmp_path / "run").shards


def test_too_many_failures_stop_the_run_and_a_higher_limit_goes_on(model, prompts, plain, tmp_path):
    given = {"directory": tmp_path / "run"}
    with pytest.raises(TooManyFailuresError, match="1 prompts failed, more than the 0 allowed"):
        run(model, prompts, max_failures=0, **given)
    assert load_run(tmp_path / "run").shards == (0,)
    with pytest.raises(TooManyFailuresError):  # those of before count
        run(model, prompts, max_failures=0, **given)
    assert run(model, prompts, max_failures=2, **given).complete
    assert bytes_of(tmp_path / "run") == bytes_of(plain.directory)


# --- stopped, killed, damaged -----------------------------------------------------------------


def test_what_is_whole_is_not_done_again(model, prompts, copied, plain, monkeypatch):
    monkeypatch.setattr(Worker, "do", None)
    said = []
    assert run(model, prompts, copied, announce=said.append).complete
    assert said == ["3 of 3 shards are done already"]
    assert bytes_of(copied) == bytes_of(plain.directory)


def test_what_is_not_whole_is_made_again_with_the_same_bytes(model, prompts, copied, plain):
    (copied / "records" / "shard-00000.json").unlink()
    path = copied / "neurons" / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    (copied / "layers" / "shard-00002.parquet").unlink()
    said = []
    run(model, prompts, copied, announce=said.append)
    assert said == [
        "shard 1 is not as it was recorded, and is made again",
        "shard 2 is not as it was recorded, and is made again",
    ]
    assert bytes_of(copied) == bytes_of(plain.directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_shard_in_hand_be_finished(model, prompts, plain, tmp_path, number):
    before = signal.getsignal(number)

    def interrupt(progress):
        if progress.shards_done == 0 and progress.done >= 4:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match="the same command goes on") as raised:
        run(model, prompts, tmp_path / "run", progress=interrupt)
    assert raised.value.number == number and signal.getsignal(number) is before
    half = load_run(tmp_path / "run")
    assert half.shards == (0,) and not half.complete
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert len(half.table("answers")) == 3 and half.summary().facts["prompts"][-1]["prompts"] == 3
    said = []
    assert run(model, prompts, tmp_path / "run", announce=said.append).complete
    assert said == ["1 of 3 shards are done already; going on with 2"]
    assert bytes_of(tmp_path / "run") == bytes_of(plain.directory)


def test_a_second_signal_stops_at_once(model, prompts, tmp_path):
    # a shell that starts the tests in the background has them ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(progress):
        os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            run(model, prompts, tmp_path / "run", progress=interrupt, batch_size=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(raised.value, Stopped) and not load_run(tmp_path / "run").shards


def test_off_the_main_thread_signals_are_left_to_others():
    """There Python has no handlers to set."""
    before, seen = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)], []

    def within():
        with finishing_first(seen.append) as stop:
            seen.append(bool(stop))
            seen.extend(signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM))

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()
    assert seen == [False, *before]


def test_shares_done_apart_are_the_run_done_at_once(model, prompts, plain, tmp_path):
    for rank in (1, 0):
        found = run(model, prompts, tmp_path / "run", share=Share(rank=rank, of=2))
        assert found.complete == (rank == 0)
    assert bytes_of(tmp_path / "run") == bytes_of(plain.directory)


@pytest.mark.parametrize("moment", ["first file", "second file", "record", "finish"])
def test_a_process_killed_while_it_writes_leaves_nothing_behind(
    prompts, model, plain, tmp_path, moment
):
    """``kill -9`` between any two steps of writing, in a process of its own (by fork)."""
    child = os.fork()
    if child == 0:
        real, done = os.fsync, []
        steps = {"first file": 4, "second file": 6, "record": 12, "finish": 35}

        def fatal(handle):
            done.append(1)
            if len(done) == steps[moment]:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        os.fsync = fatal
        try:
            run(model, prompts, tmp_path / "run")
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert any(path.suffix == ".tmp" for path in (tmp_path / "run").rglob("*"))
    run(model, prompts, tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(plain.directory)


def test_a_temporary_file_that_is_being_written_stays(model, prompts, copied, plain):
    """Another process of the run may be at it: its lock tells."""
    seen = []

    def write(path):
        path.write_bytes(b"half")
        run(model, prompts, copied)
        seen.append(path.exists())
        (copied / "neurons" / ".shard-00009.parquet.left.tmp").write_bytes(b"of a dead process")
        run(model, prompts, copied)
        seen.append(path.exists())

    write_files(copied / "neurons", {"shard-00009.parquet": write})
    (copied / "neurons" / "shard-00009.parquet").unlink()
    assert seen == [True, True] and bytes_of(copied) == bytes_of(plain.directory)


def test_a_full_disk_is_said_and_what_was_before_is_whole(model, prompts, plain, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress):
        if progress.shards_done == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))

    try:
        with pytest.raises(OutputError, match="cannot write shard-00001.parquet"):
            run(model, prompts, tmp_path / "run", progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert load_run(tmp_path / "run").shards == (0,)
    assert not [path for path in (tmp_path / "run").rglob("*.tmp")]
    run(model, prompts, tmp_path / "run")
    assert bytes_of(tmp_path / "run") == bytes_of(plain.directory)


def small_file_system(place, size):
    """Mounted for this process alone, which is single-threaded; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, namespace = os.getuid(), 0x00020000  # CLONE_NEWNS
    if user and libc.unshare(namespace | 0x10000000) == 0:  # CLONE_NEWUSER
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    elif user or libc.unshare(namespace):
        return False
    libc.mount(None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE: seen nowhere else
    return libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, f"size={size}".encode()) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="takes a file system of its own")
def test_a_disk_that_is_full_in_mid_shard_is_said_and_the_run_goes_on_once_there_is_room(
    prompts, model, plain, tmp_path
):
    """A real file system of 60 KiB, in a process of its own (by fork)."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            place = tmp_path / "disk"
            place.mkdir()
            if not small_file_system(place, 60 * 1024):
                os._exit(77)
            with pytest.raises(OutputError, match="No space left on device") as raised:
                run(model, prompts, place / "run")
            assert "\n" not in str(raised.value)
            whole = load_run(place / "run", verify=True)
            assert whole.shards and not whole.complete
            assert not [path for path in (place / "run").rglob("*.tmp")]
            shutil.copytree(place / "run", tmp_path / "roomy")
            assert run(model, prompts, tmp_path / "roomy").complete
            assert bytes_of(tmp_path / "roomy") == bytes_of(plain.directory)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 77:
        pytest.skip("no file system may be mounted here")
    assert code == 0


def edit(path, change):
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(as_text(facts))


def older(facts):
    facts["identity"]["format"] = 0
    facts["checksum"] = fingerprint([facts["identity"]])


EDITED = {
    "the plan": (
        "plan.json",
        lambda f: f["identity"]["settings"].update(top=7),
        "was changed after",
    ),
    "no plan": ("plan.json", lambda f: f.pop("identity"), "cannot be read as a plan"),
    "an older version": ("plan.json", older, "is of schema version 0, which no release wrote"),
    "a record": (
        "records/shard-00001.json",
        lambda f: f["files"]["neurons"].update(rows=1),
        "is not as it was written; remove it",
    ),
    "the manifest": (
        "manifest.json",
        lambda f: f["shards"].pop("shard-00001"),
        "is not what the run's records say",
    ),
}


@pytest.mark.parametrize("edited", EDITED)
def test_what_was_edited_by_hand_is_refused_and_nothing_overwritten(model, prompts, copied, edited):
    name, change, message = EDITED[edited]
    edit(copied / name, change)
    before = bytes_of(copied)
    with pytest.raises(InputError, match=message) as raised:
        run(model, prompts, copied)
    assert "\n" not in str(raised.value) and bytes_of(copied) == before


EXCHANGED = {
    "others": lambda path: pq.write_table(pq.read_table(path).slice(1), path),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "lost": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", EXCHANGED)
def test_prompts_that_were_lost_or_exchanged_are_written_again(model, prompts, copied, plain, how):
    EXCHANGED[how](copied / "prompts.parquet")
    with pytest.raises(InputError, match="the command that made the run writes it again"):
        load_run(copied, verify=True)
    said = []
    assert run(model, prompts, copied, announce=said.append).complete
    assert said[0] == "prompts.parquet is lost or not as it was written, and is written again"
    assert bytes_of(copied) == bytes_of(plain.directory)


def test_a_manifest_of_something_else_is_refused_before_a_lost_shard_is_made(
    model, prompts, copied, monkeypatch
):
    (copied / "records" / "shard-00002.json").unlink()
    (copied / "manifest.json").write_text("{}")
    monkeypatch.setattr(Worker, "do", None)
    for read in (lambda: run(model, prompts, copied), lambda: load_run(copied)):
        with pytest.raises(InputError, match="is not what the run's records say"):
            read()


def test_another_run_is_refused_saying_how_it_differs(model, prompts, copied, tmp_path):
    before = bytes_of(copied)
    with pytest.raises(InputError, match="its settings.top is 6, this one's 7; give another"):
        run(model, prompts, copied, top=7)
    with pytest.raises(InputError, match="its prompts.count is 12, this one's 11; its prompts.sha"):
        run(model, prompts[1:], copied)
    other = load_model("tiny-facts", dtype="float64")
    with pytest.raises(InputError, match="its model.dtype is 'float32', this one's 'float64'"):
        run(other, prompts, copied)
    assert bytes_of(copied) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run(model, prompts, tmp_path)


def test_several_workers_need_the_models_name(model, prompts, tmp_path):
    with pytest.raises(InputError, match="give its name or directory"):
        run(model, prompts, tmp_path / "run", workers=2)
    assert not (tmp_path / "run").exists()


# --- workers ----------------------------------------------------------------------------------


def children_of(parent):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_a_run_killed_with_its_workers_goes_on_to_the_same_bytes(model, prompts, plain, tmp_path):
    """The caller is killed once a shard is there; its workers end by themselves."""
    program = f"""
import sys
from tl_neuron_attr import run_prompts
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_runs import TOP, two_types
run_prompts("tiny-facts", two_types(), {str(tmp_path / "run")!r}, top=TOP, shard_size=4,
            workers=2)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(run_module.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    records = tmp_path / "run" / "records"
    ends = time.monotonic() + 120
    while not (records.is_dir() and list(records.glob("*.json"))):
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.005)
    workers = children_of(process.pid)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{each}").exists() for each in workers):
        assert time.monotonic() < ends, "a worker outlived its caller"
        time.sleep(0.05)
    assert run(model, prompts, tmp_path / "run").complete
    assert bytes_of(tmp_path / "run") == bytes_of(plain.directory)


@pytest.mark.slow
def test_what_a_worker_raises_is_raised_here(prompts, tmp_path):
    """Here: the plan's prompts are exchanged behind the caller's back."""
    said = []

    def exchange(line):
        said.append(line)
        (tmp_path / "run" / "prompts.parquet").write_bytes(b"PAR1")

    run("tiny-facts", prompts, tmp_path / "run", share=Share(rank=0, of=3))
    with pytest.raises(InputError, match="cannot be read .*writes it again"):
        run("tiny-facts", prompts, tmp_path / "run", workers=2, announce=exchange)
    assert said and not children_of(os.getpid())


# --- progress ---------------------------------------------------------------------------------


def test_progress_says_rate_time_left_and_failures():
    half = Progress(prompts=2000, done=500, failures=3, shards=8, shards_done=2, seconds=10.0)
    assert str(half) == (
        "500 of 2,000 prompts, 2 of 8 shards, 50 prompts/s, about 30 s left, 3 failed"
    )
    nothing = Progress(prompts=5, done=0, failures=0, shards=1, shards_done=0, seconds=0.0)
    assert nothing.seconds_left is None and "left" not in str(nothing)


def test_a_bar_is_as_far_as_the_run_says_its_failures_and_is_closed_whatever_happens(
    model, prompts, tmp_path, monkeypatch
):
    bars = []

    def bar_for(total, unit, show):
        bars.append(tqdm(total=total, unit=unit, file=io.StringIO(), mininterval=0, leave=True))
        return bars[-1]

    monkeypatch.setattr(progress_module, "progress_bar", bar_for)
    run(model, prompts, tmp_path / "run", progress=True)
    (bar,) = bars
    assert (bar.n, bar.total, bar.disable) == (len(prompts), len(prompts), True)
    shown = bar.fp.getvalue()
    assert f"{len(prompts)}/{len(prompts)}" in shown and "2 failed" in shown
    with pytest.raises(TooManyFailuresError):
        run(model, prompts, tmp_path / "few", progress=True, max_failures=0)
    assert bars[-1].disable, "a closed bar draws no more"


def test_lines_come_now_and_then_and_at_the_end(model, prompts, tmp_path):
    lines = []
    run(model, prompts, tmp_path / "run", progress=line_report(lines.append, seconds=3600.0))
    assert len(lines) == 1 and lines[0].startswith("12 of 12 prompts, 3 of 3 shards")


def test_a_start_killed_before_its_plan_was_written_can_be_made_again(model, prompts, tmp_path):
    whole = run_prompts(model, prompts, tmp_path / "whole", top=TOP, shard_size=4)
    assert whole.complete
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(tmp_path / "whole" / "prompts.parquet", begun)  # written before the plan
    assert run_prompts(model, prompts, begun, top=TOP, shard_size=4).complete
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.parquet").write_bytes(b"mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run_prompts(model, prompts, tmp_path / "other", top=TOP, shard_size=4)
