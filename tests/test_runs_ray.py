"""Four ways to run, one outcome: here, in processes, as ranks, and on a Ray cluster."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import bundled_model

import tl_neuron_attr.runs.ray_actors as ray_actors
import tl_neuron_attr.runs.run as run_module
import tl_neuron_attr.runs.worker as worker_module
from tl_neuron_attr import (
    InputError,
    load_prompts,
    load_run,
    run_prompts,
    share_of_environment,
)
from tl_neuron_attr.host import Host
from tl_neuron_attr.runs.crew import Errand
from tl_neuron_attr.runs.ray_actors import Wants, joined

TOP = 6
PACKAGE = Path(run_module.__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture(scope="module")
def prompts():
    return [*load_prompts("capital")[:9:2], "", *load_prompts("number")[:11:2]]


def run(model, prompts, directory, **given):
    return run_prompts(model, prompts, directory, **{"top": TOP, "shard_size": 4, **given})


@pytest.fixture(scope="module")
def here(model, prompts, tmp_path_factory):
    return run(model, prompts, tmp_path_factory.mktemp("runs") / "here")


@pytest.fixture(scope="module")
def cluster():
    """One for all tests, which this process has joined."""
    with joined("local", 2):
        yield


def bytes_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(Path(directory).rglob("*"))
        if path.is_file()
    }


def below(pid):
    """All descendants of a process, with what they are called."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
            parents[int(path.parent.name)] = int(fields[1])
        except OSError:
            continue
    found, level = {}, {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        for child in level:
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_text()
            except OSError:
                continue
    return found


def workers_of(pid):
    names = ("ray::_Actor", "tl_neuron_attr.runs.worker")
    return [child for child, name in below(pid).items() if any(each in name for each in names)]


def no_worker_is_left():
    """Ray ends an actor in its own time."""
    ends = time.monotonic() + 30
    while workers_of(os.getpid()) and time.monotonic() < ends:
        time.sleep(0.02)
    return not workers_of(os.getpid())


def with_one_killed(prompts, directory, **given):
    """The run, a worker of which dies over its first shard; what its progress was at the end."""
    killed, shown = [], []

    def kill_one(progress):
        shown.append(progress)
        if not killed and 0 < progress.done:
            killed.append(min(workers_of(os.getpid())))
            os.kill(killed[0], signal.SIGKILL)

    found = run("tiny-facts", prompts, directory, progress=kill_one, **given)
    assert killed and found.complete and no_worker_is_left()
    return shown[-1]


@pytest.fixture(scope="module")
def by_processes(prompts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "processes"
    return with_one_killed(prompts, directory, workers=2), directory


@pytest.fixture(scope="module")
def on_ray(prompts, tmp_path_factory, cluster):
    directory = tmp_path_factory.mktemp("runs") / "ray"
    return with_one_killed(prompts, directory, workers=1, ray="auto"), directory


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_nothing_counted_twice(here, by_processes):
    last, directory = by_processes
    assert (last.done, last.shards_done, last.failures) == (12, 3, 1)
    assert bytes_of(directory) == bytes_of(here.directory)


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_nothing_counted_twice(here, on_ray):
    last, directory = on_ray
    assert (last.done, last.shards_done, last.failures) == (12, 3, 1)
    assert bytes_of(directory) == bytes_of(here.directory)


@pytest.mark.slow
def test_all_four_ways_give_the_same_bytes(model, prompts, here, by_processes, on_ray, tmp_path):
    for rank in ("1", "0"):
        share = share_of_environment({"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank})
        found = run(model, prompts, tmp_path / "ranks", share=share)
        assert found.complete == (rank == "0")
    ways = (here.directory, by_processes[1], on_ray[1], tmp_path / "ranks")
    first, *others = (bytes_of(way) for way in ways)
    assert len(first) > 12 and all(each == first for each in others)


@pytest.mark.slow
def test_what_an_actor_raises_is_raised_here_and_the_cluster_stays(
    model, prompts, tmp_path, cluster, monkeypatch, capfd
):
    """Here: the plan's prompts are exchanged behind the caller's back."""
    import ray

    monkeypatch.setattr(run_module, "load_model", lambda *given, **options: model)
    said = []

    def exchange(line):
        said.append(line)
        (tmp_path / "run" / "prompts.parquet").write_bytes(b"PAR1")

    with pytest.raises(InputError, match="cannot be read .*writes it again"):
        run("tiny-facts", prompts, tmp_path / "run", ray="auto", workers=2, announce=exchange)
    assert said[0] == "2 workers on Ray, each with 1 CPU and 2.01 GiB"
    # where workers take long to start, that too is said, and nothing else
    assert all(line.startswith("no worker has started yet") for line in said[1:])
    assert capfd.readouterr() == ("", ""), "Ray has something to say"
    assert ray.is_initialized() and no_worker_is_left()


@pytest.mark.slow
def test_a_cluster_that_is_not_the_one_joined_is_refused(prompts, tmp_path, cluster):
    for address in ("local", "elsewhere:6379"):
        with pytest.raises(InputError, match="has joined a Ray cluster already, at .*: give auto"):
            run("tiny-facts", prompts, tmp_path / "run", ray=address)
    assert not (tmp_path / "run").exists()


def test_what_cannot_run_on_ray_is_said_before_anything_is_loaded(
    model, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_module, "load_model", None)
    with pytest.raises(InputError, match="give its name or directory in place of a model"):
        run(model, prompts, tmp_path / "run", ray="auto")
    monkeypatch.setattr(ray_actors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install it: pip install 'tl_neuron_attr\[ray\]'"):
        run("tiny-facts", prompts, tmp_path / "run", ray="auto")
    assert not (tmp_path / "run").exists()


def test_an_address_where_nothing_answers_is_refused_at_once():
    for address, message in (
        ("127.0.0.1:1", "nothing answers at '127.0.0.1:1' .*ray start --head"),
        ("somewhere", "a Ray address is auto, local, or like head:6379 .*; got 'somewhere'"),
        ("head:port", "a Ray address is"),
    ):
        with pytest.raises(InputError, match=message):
            ray_actors._check_address(address)
    with pytest.raises(InputError, match="nothing answers|Ray's client: pip install"):
        ray_actors._check_address("ray://127.0.0.1:1")


def test_a_worker_takes_what_its_model_and_batch_take(model, monkeypatch):
    host = run_module.open_host(model)
    weights = sum(each.numel() * each.element_size() for each in host.parameters)
    wants = Wants.of(3, host, budget=1000)
    assert (wants.cpus, wants.gpus) == (3, 0) and wants.memory == weights + 1000 + 2**30
    two = Wants(cpus=2, gpus=0, memory=10)
    machines = [{"CPU": 5.0, "memory": 100.0}, {"CPU": 64.0, "memory": 35.0}, {"GPU": 8.0}]
    assert two.room(machines) == 2 + 3
    on_gpu = Wants(cpus=1, gpus=1, memory=10)
    cpus = {"CPU": 64.0, "memory": 1000.0}
    assert on_gpu.room([{**cpus, "GPU": 8.0}, cpus]) == 8
    monkeypatch.setattr(Host, "device", torch.device("cuda", 0))
    there = Wants.of(3, host, budget=1000)
    assert (there.cpus, there.gpus) == (3, 1) and there.memory == weights + 2**30
    assert str(on_gpu) == "1 CPU, a GPU and 10 B" and str(two) == "2 CPUs and 10 B"


def errand(run, **given):
    facts = {"directory": str(run.directory), "plan": run.parts.plan, "name": "tiny-facts"}
    return Errand(**{**facts, "device": None, "dtype": "float32", "host": "another", **given})


def test_an_actor_is_heard_while_it_works(here):
    """Without a cluster: its methods are what Ray calls."""
    actor = ray_actors._Actor(vars(errand(here, directory=str(here.directory / "no"))))
    assert actor.hear() == {"here": True}
    said = actor.hear()
    assert said["error"]["kind"] == "InputError"
    assert "give a directory on a shared file system" in said["error"]["message"]


def test_an_actor_does_the_shards_it_is_handed(model, here, monkeypatch):
    monkeypatch.setattr(worker_module, "load_model", lambda *given, **options: model)
    actor = ray_actors._Actor(vars(errand(here)))
    assert [actor.hear(), actor.hear()] == [{"here": True}, {"ready": True}]
    before = bytes_of(here.directory)
    actor.hand(2)
    said = [actor.hear()]
    while "did" in said[-1]:
        said.append(actor.hear())
    assert said[-1] == {"whole": 2} and said[-2]["did"][0] == 4
    assert bytes_of(here.directory) == before


def test_whoever_waits_long_for_a_first_worker_is_told_once_what_each_takes(here):
    said = []
    wants = Wants(cpus=2, gpus=1, memory=2**30)
    crew = ray_actors.Actors(errand=errand(here), wants=wants, say=said.append)
    crew._say_what_is_waited_for()
    assert not said, "nobody was asked for"
    crew.patient_until = time.monotonic() + 60
    crew._say_what_is_waited_for()
    assert not said
    crew.patient_until = time.monotonic() - 1
    crew._say_what_is_waited_for()
    crew._say_what_is_waited_for()
    (line,) = said
    assert line.startswith("no worker has started yet: each takes 2 CPUs, a GPU and 1 GiB")
    crew.dismiss(3)  # one that never came


@pytest.mark.parametrize("statistics", [None, "1"])
def test_joining_a_cluster_changes_nothing_of_the_process_whether_it_succeeds_or_not(
    monkeypatch, statistics
):
    """Off the main thread too, where no handler of signals can be set."""
    import ray

    if statistics is None:
        monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    else:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", statistics)
    before, seen = signal.getsignal(signal.SIGTERM), []

    def init(**given):
        seen.append((given["address"], os.environ["RAY_USAGE_STATS_ENABLED"]))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if len(seen) == 2:
            raise ConnectionError("Could not find any running Ray instance.\nStart one.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: seen.append("left"))

    def join():
        with joined("auto", 1):
            seen.append("in")

    join()
    assert seen == [("auto", "0"), "in", "left"]
    del seen[1:]
    with pytest.raises(InputError, match="cannot join a Ray cluster at 'auto': Could not find any"):
        join()
    assert signal.getsignal(signal.SIGTERM) is before
    del seen[:]
    thread = threading.Thread(target=join)
    thread.start()
    thread.join()
    assert seen == [("auto", "0"), "in", "left"]
    assert os.environ.get("RAY_USAGE_STATS_ENABLED") == statistics


def test_why_an_actor_is_gone_is_one_line():
    import ray

    text = "The actor died because of this.\n\tclass_name: _Actor\n"
    assert ray_actors._gone(ray.exceptions.RayError(text)) == {
        "gone": "The actor died because of this"
    }
    text = "The actor with name A failed\nModuleNotFoundError: No module named 'tl_neuron_attr'"
    told = ray_actors._gone(ray.exceptions.RayError(text))["error"]
    assert told["kind"] == "InputError" and "install it, in the same version" in told["message"]


@pytest.mark.slow
def test_a_caller_on_ray_that_is_killed_takes_its_cluster_along(model, prompts, here, tmp_path):
    """And the same command then goes on to the same bytes, saying only what it should."""
    program = f"""
import sys
from tl_neuron_attr import run_prompts
from test_runs_ray import TOP, load_prompts
prompts = [*load_prompts("capital")[:9:2], "", *load_prompts("number")[:11:2]]
run_prompts("tiny-facts", prompts, {str(tmp_path / "run")!r}, top=TOP, shard_size=4, workers=2,
            ray="local", announce=print)
"""
    paths = os.pathsep.join((str(PACKAGE), str(Path(__file__).parent)))
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = {**os.environ, "PYTHONPATH": paths}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    records = tmp_path / "run" / "records"
    ends = time.monotonic() + 120
    while not (records.is_dir() and list(records.glob("*.json"))):
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.005)
    cluster = below(process.pid)
    assert any("raylet" in name for name in cluster.values())
    process.kill()
    process.wait()
    while any(Path(f"/proc/{each}").exists() for each in cluster):
        assert time.monotonic() < ends, "a part of the cluster outlived its caller"
        time.sleep(0.05)
    left = load_run(tmp_path / "run")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    said = again.stdout.splitlines()
    assert again.returncode == 0 and again.stderr == ""
    if not left.complete:
        assert len(said) == 2 and "are done already; going on with" in said[0]
        assert "on Ray, each with 1 CPU" in said[1]
    assert load_run(tmp_path / "run").complete
    assert bytes_of(tmp_path / "run") == bytes_of(here.directory)
