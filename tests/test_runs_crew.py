"""Handing out shards: whoever dies, fails or stops, each shard is done once, or said not to be."""

import io
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from dataclasses import asdict, replace

import pytest
import torch
from conftest import bundled_model

import tl_neuron_attr.runs.run as run_module
import tl_neuron_attr.runs.shard as shard_module
import tl_neuron_attr.runs.where as where_module
import tl_neuron_attr.runs.worker as worker_module
import tl_neuron_attr.runs.workers as workers_module
from tl_neuron_attr import (
    DeviceMemoryError,
    InputError,
    OutputError,
    Share,
    TooManyFailuresError,
    WorkerError,
    load_model,
    load_prompts,
    load_run,
    run_prompts,
    share_of_environment,
)
from tl_neuron_attr.runs.crew import Crew, Errand, hand_out
from tl_neuron_attr.runs.memory import is_out_of_memory, within_memory
from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.runs.stopping import Stop
from tl_neuron_attr.runs.workers import Processes

SHARD = 4


class Scripted:
    """A crew without processes: a shard is told in two batches, unless ``fates`` says other."""

    def __init__(self, fates=None, loads=None):
        self.fates = {shard: deque(ends) for shard, ends in (fates or {}).items()}
        self.loads = deque(loads or ())
        self.said = deque()
        self.at = {}
        self.started = []
        self.silences = 0
        self.handed = []

    def start(self, place):
        assert place not in self.at, "its predecessor is still there"
        self.at[place] = None
        self.started.append(place)
        self.said.append((place, self.loads.popleft() if self.loads else {"ready": True}))

    def hand(self, place, shard):
        assert self.at[place] is None, "it has a shard already"
        self.at[place] = shard
        self.handed.append(shard)
        self.said.append((place, {"did": [2, 1]}))
        ends = self.fates.get(shard)
        if ends:
            self.said.append((place, ends.popleft()))
        else:
            self.said.append((place, {"did": [SHARD - 2, 0]}))
            self.said.append((place, {"whole": shard}))

    def dismiss(self, place):
        del self.at[place]
        self.said = deque(each for each in self.said if each[0] != place)

    def hear(self, seconds):
        if not self.said:
            self.silences += 1
            assert self.silences < 100, "someone is waited for who will say nothing"
            return None
        place, message = self.said.popleft()
        if "gone" in message:
            del self.at[place]
        elif {"whole", "left"} & message.keys():
            self.at[place] = None
        return place, message


def handed_out(crew, shards, count=2, stop=None, on_whole=None, say=lambda line: None):
    """What the caller was told: prompts counted, failures, shards whole, shards given up."""
    counted, whole, left = [0, 0], [], {}

    def did(done, failed):
        counted[0] += done
        counted[1] += failed

    def is_whole(shard):
        whole.append(shard)
        if on_whole is not None:
            on_whole()

    assert isinstance(crew, Crew)
    hand_out(
        crew,
        shards,
        count,
        did=did,
        whole=is_whole,
        given_up=left.__setitem__,
        say=say,
        stop=Stop() if stop is None else stop,
    )
    assert not crew.at, "someone was left"
    return tuple(counted), sorted(whole), left


GONE = {"gone": "exit code -9"}


def test_every_shard_is_handed_out_once():
    crew = Scripted()
    assert handed_out(crew, range(5)) == ((5 * SHARD, 5), [0, 1, 2, 3, 4], {})
    assert sorted(crew.handed) == [0, 1, 2, 3, 4] and crew.started == [0, 1]
    alone = Scripted()
    handed_out(alone, [7], count=3)
    assert alone.started == [0], "more workers than shards"


def test_a_dead_workers_shard_is_done_by_its_successor_and_counted_once():
    crew, said = Scripted({1: [GONE]}), []
    assert handed_out(crew, range(4), say=said.append) == ((4 * SHARD, 4), [0, 1, 2, 3], {})
    assert crew.handed.count(1) == 2
    assert said == ["a worker ended over shard 1 (exit code -9); it is done again"]
    # the second place lost its worker, and it is that place which gets another: its GPU is free
    assert crew.started == [0, 1, 1]


def test_a_shard_over_which_two_die_is_given_up_and_the_others_are_done():
    counted, whole, left = handed_out(Scripted({1: [GONE, GONE]}), range(4))
    assert (counted, whole) == ((3 * SHARD, 3), [0, 2, 3])
    assert isinstance(left[1], WorkerError) and "exit code -9" in str(left[1])


def test_a_shard_that_does_not_fit_is_given_up_and_its_worker_goes_on():
    crew = Scripted({0: [{"left": {"kind": "DeviceMemoryError", "message": "too large"}}]})
    counted, whole, left = handed_out(crew, range(3), count=1)
    assert (counted, whole, crew.started) == ((2 * SHARD, 2), [1, 2], [0])
    assert isinstance(left[0], DeviceMemoryError) and str(left[0]) == "too large"


def test_workers_that_die_while_they_load_are_replaced_a_few_times():
    assert handed_out(Scripted(loads=[GONE, GONE, GONE]), range(3))[1] == [0, 1, 2]
    crew = Scripted(loads=[GONE] * 9)
    with pytest.raises(WorkerError, match="4 workers ended while they loaded .*exit code -9"):
        handed_out(crew, range(3))
    assert not crew.at


def test_what_a_worker_tells_of_itself_is_raised_as_that():
    told = {"kind": "OutputError", "message": "cannot write"}
    with pytest.raises(OutputError, match="^cannot write$"):
        handed_out(Scripted({1: [{"error": told}]}), range(3))
    other = {"kind": "KeyError", "message": "'x'"}
    with pytest.raises(WorkerError, match="a worker failed over shard 1: KeyError: 'x'"):
        handed_out(Scripted({1: [{"error": other}]}), range(3))
    with pytest.raises(WorkerError, match="a worker failed over loading the model: KeyError"):
        handed_out(Scripted(loads=[{"error": other}]), range(3))
    with pytest.raises(WorkerError, match="cannot be understood: {'hello': 1}"):
        handed_out(Scripted({0: [{"hello": 1}]}), range(3))


def test_after_a_stop_shards_in_hand_are_finished_and_no_model_is_waited_for():
    stop = Stop()
    crew = Scripted(loads=[{"ready": True}, {"did": [0, 0]}])  # the second is never ready

    def ask_to_stop():
        stop.signal = 2

    assert handed_out(crew, range(9), stop=stop, on_whole=ask_to_stop)[1] == [0]


# --- processes --------------------------------------------------------------------------------


def errand(**given):
    facts = {"directory": "/none", "plan": "", "name": "tiny-facts", "device": None}
    return Errand(**{**facts, "dtype": "float32", "host": "here", **given})


@pytest.mark.parametrize(
    ("prints", "words"),
    [
        ("print('{\"did\": [1', end='')", "exit code 0"),  # killed while it wrote
        ("print('no JSON', flush=True); time.sleep(60)", "exit code -9"),
        ("print('[1]', flush=True); time.sleep(60)", "exit code -9"),
        ("print('last words', file=sys.stderr); sys.exit(3)", "exit code 3: last words"),
    ],
)
def test_a_worker_that_says_what_is_no_message_is_gone(monkeypatch, prints, words):
    real, program = subprocess.Popen, f"import sys, time; sys.stdin.readline(); {prints}"

    def other_program(arguments, **options):
        return real([sys.executable, "-c", program], **options)

    monkeypatch.setattr(workers_module.subprocess, "Popen", other_program)
    crew = Processes(errand=errand(), device_of=lambda place: None)
    crew.start(0)
    assert crew.hear(30.0) == (0, {"gone": words})
    assert not crew.working and crew.hear(0.0) is None
    crew.dismiss(0)  # it is gone already


def test_a_process_that_has_died_can_be_written_to_and_closed():
    """What it was still to be told is lost, as it is with whoever dies after it was told."""
    ended = subprocess.Popen(["true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ended.wait()
    listener = threading.Thread(target=lambda: None)
    listener.start()
    said = tempfile.TemporaryFile()
    said.write(b"why\n")
    died = workers_module._Process(process=ended, said=said, listener=listener)
    died.send({"shard": 1})
    died.send({"shard": 2})
    assert died.last_words() == "exit code 0: why"
    died.close()
    assert ended.stdout.closed and said.closed and not listener.is_alive()


# --- what a worker checks, wherever it is -----------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture(scope="module")
def prompts():
    return load_prompts("capital")[:6]


def run(model, prompts, directory, **given):
    return run_prompts(model, prompts, directory, **{"top": 3, "shard_size": 2, **given})


@pytest.fixture(scope="module")
def whole(model, prompts, tmp_path_factory):
    return run(model, prompts, tmp_path_factory.mktemp("runs") / "whole")


def bytes_of(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def answers(asked, shards=()):
    said = []
    worker_module.work(asked, shards, lambda **message: said.append(message))
    return said


@pytest.fixture
def loaded(model, monkeypatch):
    monkeypatch.setattr(worker_module, "load_model", lambda *given, **options: model)


def test_a_worker_says_each_step(loaded, whole):
    asked = errand(directory=str(whole.directory), plan=whole.parts.plan)
    assert answers(asked, [1, 0]) == [
        {"ready": True},
        *[{"did": [0, 0]}, {"did": [2, 0]}, {"whole": 1}],
        *[{"did": [0, 0]}, {"did": [2, 0]}, {"whole": 0}],
    ]
    assert Errand(**json.loads(json.dumps(asdict(asked)))) == asked


def test_a_worker_elsewhere_that_sees_something_else_says_so(loaded, whole, tmp_path, monkeypatch):
    there = errand(directory=str(whole.directory), plan=whole.parts.plan)

    def refused(asked, words):
        (message,) = answers(asked)
        assert message["error"]["kind"] == "InputError" and words in message["error"]["message"]
        assert "\n" not in message["error"]["message"]

    refused(replace(there, directory=str(tmp_path)), "give a directory on a shared file system")
    (message,) = answers(replace(there, directory=str(tmp_path), host=socket.gethostname()))
    assert message["error"]["message"].startswith("there is no run in"), "nothing is shared here"
    refused(replace(there, plan="another"), "finds another run in")
    versions = {**whole.facts["versions"], "torch": "2.0.0"}
    monkeypatch.setattr(worker_module, "versions", lambda: versions)
    refused(there, "another versions.torch than the run was planned with: '2.0.0', not '2")
    monkeypatch.undo()
    other = load_model("tiny-facts")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    monkeypatch.setattr(worker_module, "load_model", lambda *given, **options: other)
    refused(there, "another model.sha256 than the run was planned with")


def test_a_process_reads_its_errand_and_its_shards_as_lines(loaded, whole, monkeypatch):
    asked = errand(directory=str(whole.directory), plan=whole.parts.plan)
    lines = io.StringIO("".join(json.dumps({"shard": shard}) + "\n" for shard in (2, 0)))
    assert list(worker_module._shards(lines)) == [2, 0]
    said = answers(asked, worker_module._shards(io.StringIO('{"shard": 2}\n')))
    assert said[-1] == {"whole": 2}


def test_a_worker_tells_what_it_could_not_do_and_goes_on_only_where_memory_ran_out(
    loaded, whole, monkeypatch
):
    asked = errand(directory=str(whole.directory), plan=whole.parts.plan)
    raised = {0: DeviceMemoryError("too large"), 1: KeyError("x")}
    real = worker_module.Worker.do

    def do(worker, shard, did):
        if shard in raised:
            raise raised[shard]
        real(worker, shard, did)

    monkeypatch.setattr(worker_module.Worker, "do", do)
    said = answers(asked, [0, 2])
    assert said[1] == {"left": {"kind": "DeviceMemoryError", "message": "too large"}}
    assert said[-1] == {"whole": 2}
    told = []
    with pytest.raises(KeyError, match="x"):  # for its standard error
        worker_module.work(asked, [1, 2], lambda **message: told.append(message))
    assert told == [{"ready": True}, {"error": {"kind": "KeyError", "message": "'x'"}}]


def test_a_worker_whose_caller_is_gone_does_no_further_shard(loaded, whole):
    asked = errand(directory=str(whole.directory), plan=whole.parts.plan)
    left = iter([0, 1])

    def to_nobody(**message):
        if "whole" in message:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        worker_module.work(asked, left, to_nobody)
    assert list(left) == [1]


# --- memory -----------------------------------------------------------------------------------

OUT = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of "
    "which 1.20 GiB is free. Process 7 has 22 GiB memory in use."
)


def test_memory_that_ran_out_is_known_on_every_device():
    assert all(
        is_out_of_memory(error)
        for error in (
            OUT,
            MemoryError(),
            RuntimeError("alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
            RuntimeError("MPS backend out of memory"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        )
    )
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(InputError("out of memory"))


def test_a_batch_that_does_not_fit_is_tried_once_more_and_then_said_with_numbers():
    settings = RunSettings(budget=1000)
    tries = []

    def fits_at_last():
        tries.append(1)
        if len(tries) == 1:
            raise OUT
        return "found"

    assert within_memory(fits_at_last, [5, 7], settings) == "found" and len(tries) == 2

    def never():
        tries.append(1)
        raise OUT

    del tries[:]
    with pytest.raises(DeviceMemoryError) as raised:
        within_memory(never, [5, 1007], settings)
    assert str(raised.value) == (
        "a batch of 2 prompts of up to 1,007 tokens does not fit into the device's memory (tried "
        "to allocate 2.00 GiB, total capacity of 23.65 GiB, 1.20 GiB is free); free some, or start "
        "another run with --batch-size 1, or with --budget 500 (now 1000), in another directory, "
        "for batches decide the last bits of scores"
    )
    assert len(tries) == 2 and raised.value.__context__ is None, "the frames hold tensors"
    with pytest.raises(DeviceMemoryError, match="one prompt of 9 tokens .* leave such prompts out"):
        within_memory(never, [9], settings)
    with pytest.raises(ValueError, match="shapes"):
        within_memory(lambda: int("shapes"), [9], settings)


def test_what_a_second_try_raises_for_another_reason_is_raised_as_that():
    errors = iter([OUT, KeyError("other")])

    def fails():
        raise next(errors)

    with pytest.raises(KeyError, match="other"):
        within_memory(fails, [5], RunSettings(budget=1000))


def test_between_the_tries_what_a_gpu_kept_for_itself_is_given_back(monkeypatch):
    kept = [OUT]

    def fits_into_what_is_free():
        if kept:
            raise kept[0]
        return "found"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    assert within_memory(fits_into_what_is_free, [5], RunSettings(budget=1000)) == "found"


def out_of_memory_for(victims, monkeypatch):
    real = shard_module.attribute_all

    def failing(model, some, **options):
        if victims & {each.prompt_id for each in some}:
            raise OUT
        return real(model, some, **options)

    monkeypatch.setattr(shard_module, "attribute_all", failing)


def test_a_shard_that_does_not_fit_is_left_out_and_done_by_the_next_call(
    model, prompts, whole, tmp_path, monkeypatch
):
    """No prompt of it becomes an error, and its batch is not divided: the bytes are the plan's."""
    out_of_memory_for({prompts[2].prompt_id}, monkeypatch)
    said, shown = [], []
    with pytest.raises(DeviceMemoryError, match=r"1 of 3 .* not be done \(shard 1: a batch"):
        run(model, prompts, tmp_path / "run", announce=said.append, progress=shown.append)
    assert said[0].startswith("shard 1 is left out for now: a batch of 2 prompts")
    assert (shown[-1].done, shown[-1].shards_done, shown[-1].failures) == (4, 2, 0)
    part = load_run(tmp_path / "run")
    assert part.shards == (0, 2) and part.table("errors").empty
    monkeypatch.undo()
    assert run(model, prompts, tmp_path / "run").complete
    assert bytes_of(tmp_path / "run") == bytes_of(whole.directory)


def test_shards_that_do_not_fit_one_after_another_stop_the_run(
    model, prompts, tmp_path, monkeypatch
):
    out_of_memory_for({each.prompt_id for each in prompts}, monkeypatch)
    with pytest.raises(DeviceMemoryError, match="3 shards in a row could not be done"):
        run(model, prompts + load_prompts("number")[:4], tmp_path / "run")
    assert load_run(tmp_path / "run").shards == ()


def test_failures_of_a_damaged_shard_count_once(model, prompts, tmp_path):
    asked = ["", *prompts[:3]]
    run(model, asked, tmp_path / "run", max_failures=1)
    (tmp_path / "run" / "neurons" / "shard-00000.parquet").write_bytes(b"")
    assert run(model, asked, tmp_path / "run", max_failures=1).complete
    with pytest.raises(TooManyFailuresError):
        run(model, asked, tmp_path / "run", max_failures=0)


def test_failures_of_a_rank_at_work_beside_this_one_count_once_a_shard_is_done(
    model, prompts, tmp_path
):
    asked = [*prompts[:3], "", *prompts[3:5], "", prompts[5]]  # shards 1 and 3 have a failure each
    begun = []

    def other_rank(progress):
        if not begun:
            begun.append(True)
            run(model, asked, tmp_path / "run", share=Share(rank=1, of=2))

    with pytest.raises(TooManyFailuresError, match="2 prompts failed, more than the 1 allowed"):
        run(
            model,
            asked,
            tmp_path / "run",
            share=Share(rank=0, of=2),
            max_failures=1,
            progress=other_rank,
        )
    assert load_run(tmp_path / "run").shards == (0, 1, 3)


# --- shares and devices -----------------------------------------------------------------------


def test_a_share_can_be_given_by_hand():
    assert Share.parse("all") == Share() and Share.parse("2/4") == Share(rank=2, of=4, local=2)
    for wrong, message in (
        ("half", "looks like 0/4, .* or is all; got 'half'"),
        ("-1/4", "looks like"),
        ("4/4", "rank 4 is out of range"),
        ("0/0", "out of range"),
    ):
        with pytest.raises(InputError, match=message):
            Share.parse(wrong)


def test_a_launcher_says_which_of_a_machines_processes_this_is():
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert share_of_environment(torchrun) == Share(rank=5, of=8, local=1)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_LOCALID": "0"}
    assert share_of_environment(slurm) == Share(rank=3, of=4, local=0)
    with pytest.raises(InputError, match="LOCAL_RANK must be a number"):
        share_of_environment({**torchrun, "LOCAL_RANK": "one"})


def where(**given):
    facts = {"model": "tiny-facts", "device": None, "dtype": "float32", "workers": None}
    return where_module.Where(**{**facts, "ray": None, "share": Share(), **given})


def test_each_rank_and_each_worker_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    local = [Share(rank=4 + rank, of=8, local=rank) for rank in range(4)]
    here = [where(share=share).device_here for share in local]
    assert here == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert where().device_here is None, "alone it takes what TransformerLens takes"
    assert where(share=local[2], device="cpu").device_here == "cpu"
    assert where(share=local[2], device="cuda:1").device_here == "cuda:1"
    assert where(share=local[2], device="cuda").device_here == "cuda:2"
    by_hand = [where(share=Share.parse(f"{rank}/6")).device_here for rank in range(6)]
    assert by_hand == [*here, "cuda:0", "cuda:1"]


def test_a_model_that_takes_all_gpus_leaves_none_to_a_second_worker(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="spreads one model over all GPUs, .*CUDA_VISIBLE_DEVICES"):
        where(device="auto", workers=2)
    assert where(device="auto", workers=1).device_here == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert where(device="auto", workers=2).workers == 2


def test_workers_of_several_ranks_share_out_the_gpus(model, whole, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    host, settings = run_module.open_host(model), RunSettings()
    taken = []
    for rank in range(2):
        two = where(workers=2, share=Share(rank=rank, of=2, local=rank))
        crew, count = two.crew(host, whole.parts, settings, 3, lambda line: None)
        taken += [crew.device_of(place) for place in range(count)]
    assert taken == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert crew.device_of(0) is None
    for few, shards in ((1, 3), (2, 1), (2, 0)):
        assert where(workers=few).crew(host, whole.parts, settings, shards, print) is None
