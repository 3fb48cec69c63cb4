"""What the run layer costs, and whether it holds: the figures of the docs page "Many prompts".

    python tests/benchmarks/bench_runs.py kills 50       # kill -9 at random moments, then the bytes
    python tests/benchmarks/bench_runs.py ray-kills 20   # the same on Ray, of callers and actors
    python tests/benchmarks/bench_runs.py memory 10000   # resident memory over so many prompts
    python tests/benchmarks/bench_runs.py workers 2000   # prompts a second, 1 and 2 workers
    python tests/benchmarks/bench_runs.py layer 1000     # the run layer beside the engine alone
    python tests/benchmarks/bench_runs.py layer-gpt2 256 # the same at GPT-2 small's shape
    python tests/benchmarks/bench_runs.py batches 512    # prompts a second by batch size
    python tests/benchmarks/bench_runs.py tables 128     # what each table adds, in time and bytes
    python tests/benchmarks/bench_runs.py plan 512       # planning, and the summary at the end

All but the one on the bundled model, one thread a process. Linux.
"""

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from statistics import mean, median

import pyarrow.parquet as pq
import torch
from bench_engine import MODELS

from tl_neuron_attr import Prompt, attribute, load_model, load_prompts, open_host, run_prompts
from tl_neuron_attr.attribute import attribute_all
from tl_neuron_attr.runs import planned
from tl_neuron_attr.runs import shard as shard_module
from tl_neuron_attr.runs.asked import source_of
from tl_neuron_attr.runs.saved import finish

SHARD = 64


def some_prompts(count):
    """So many prompts with an answer of one token, from all types; ids differ."""
    known = load_prompts("paper")
    return [Prompt(text=known[n % len(known)].text, prompt_id=str(n)) for n in range(count)]


def write_prompts(path, count):
    rows = [{"text": each.text, "prompt_id": each.prompt_id} for each in some_prompts(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(prompts, out, *options):
    program = [sys.executable, "-W", "ignore", "-m", "tl_neuron_attr.cli", "run", str(prompts)]
    return [*program, "--out", str(out), "--top", "20", *options]


def bytes_of(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def descendants(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def actors_below(pid):
    """Ray's workers among the descendants of a process, at whatever depth."""
    found, below = [], [pid]
    while below:
        below = [child for each in below for child in descendants(each)]
        for child in below:
            try:
                if Path(f"/proc/{child}/cmdline").read_text().startswith("ray::_Actor"):
                    found.append(child)
            except OSError:
                continue
    return found


def records(directory):
    return len(list((directory / "records").glob("shard-*.json")))


def kills(count):
    """Killed over and over (its caller or one worker, in turn), to the very end."""
    killed_over_and_over(count, ("--workers", "2"), descendants)


def ray_kills(count):
    """The same with the actors of a local Ray cluster, which has to end with its caller."""
    killed_over_and_over(count, ("--workers", "2", "--ray", "local"), actors_below)


def killed_over_and_over(count, where, workers_of):
    random.seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        prompts = write_prompts(place / "prompts.jsonl", 1500)
        options = ("--shard-size", "12", "--quiet")
        subprocess.run(command(prompts, place / "undisturbed", *options), check=True)
        done, landed, runs = 0, {"caller": 0, "worker": 0}, 0
        while done < count:
            out = place / f"killed-{runs}"
            runs += 1
            while done < count:
                process = subprocess.Popen(
                    command(prompts, out, *options, *where), stderr=subprocess.DEVNULL
                )
                # most of the time goes into loading: most kills wait until shards come
                before, waits = records(out), random.random() < 0.8
                while waits and process.poll() is None and records(out) == before:
                    time.sleep(0.002)
                deadline = time.monotonic() + random.uniform(0, 2 if waits else 10)
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
                if process.poll() is not None:
                    break
                workers = workers_of(process.pid)
                if workers and done % 2:
                    os.kill(random.choice(workers), signal.SIGKILL)
                    landed["worker"] += 1
                    time.sleep(random.uniform(0, 2))
                else:
                    landed["caller"] += 1
                process.kill()
                process.wait()
                done += 1
                for worker in workers:
                    ended_with_its_caller(worker)
            subprocess.run(command(prompts, out, *options), check=True)
            assert bytes_of(out) == bytes_of(place / "undisturbed"), out
            assert not list(out.rglob("*.tmp"))
        print(f"{done} kills ({landed}), {runs} runs brought to their end: the same bytes")


def ended_with_its_caller(pid):
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"worker {pid} outlived its caller"
        time.sleep(0.05)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def memory(count):
    seen = {}

    def note(progress):
        if progress.done not in seen:
            seen[progress.done] = resident()

    model = load_model("tiny-facts")
    with tempfile.TemporaryDirectory() as scratch:
        run_prompts(
            model, some_prompts(count), Path(scratch) / "run", progress=note, what="neurons"
        )
        size = sum(path.stat().st_size for path in Path(scratch).rglob("*") if path.is_file())
    thousands: dict[int, list[float]] = {}
    for done, value in seen.items():
        thousands.setdefault((done - 1) // 1000, []).append(value)
    thousands = {number: found for number, found in thousands.items() if number >= 0}
    for number, found in thousands.items():
        print(f"thousand {number + 1}: {mean(found):.1f} MiB on average, {max(found):.1f} at most")
    first, *_, last = thousands.values()
    highest = max(max(found) for number, found in thousands.items() if number)
    print(
        f"{count} prompts: the last thousand beside the first {mean(last) / mean(first) - 1:+.1%} "
        f"on average, {max(last) / max(first) - 1:+.1%} at most; the highest after the first "
        f"thousand beside the highest of it {highest / max(first) - 1:+.1%}"
    )
    print(f"{size / count:.0f} bytes a prompt")


def workers(count):
    """Prompts a second of one and of two workers in turn, a thread each, while both are at work."""
    rates = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        for turn, number in itertools.product(range(5), rates):
            marks = []

            def note(progress, marks=marks):
                marks.append((time.perf_counter(), progress.done))

            out = Path(scratch) / f"run-{number}-{turn}"
            # by name also for one, so that both load the model in the same way
            run_prompts("tiny-facts", some_prompts(count), out, workers=number, progress=note)
            # without models being loaded, and without the end, when one of two has no more to do
            within = [mark for mark in marks if 0.2 * count <= mark[1] <= 0.9 * count]
            (began, first), (ended, last) = within[0], within[-1]
            rates[number].append((last - first) / (ended - began))
            print(f"{number} workers: {rates[number][-1]:.1f} prompts/s")
    times = [both / one for one, both in zip(rates[1], rates[2], strict=True)]
    print(f"turn by turn {min(times):.2f} to {max(times):.2f}, median {median(times):.2f} x")


def layer(count):
    cost_of_the_layer(load_model("tiny-facts"), some_prompts(count))


def layer_gpt2(count):
    model = MODELS["gpt2-small-shape"]()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50_000, (count, 16), generator=generator).tolist()
    cost_of_the_layer(model, [Prompt(tokens=tuple(each)) for each in ids])


def cost_of_the_layer(model, prompts):
    """Time inside the engine, and around it, of one run.

    The calls of libraries are the tokenizer's, and Parquet's writing and reading: what no layer
    around them could do without.
    """
    calls = {
        "Parquet, writing": (pq.ParquetWriter, "write_table"),
        "Parquet, reading": (pq.ParquetFile, "read"),
    }
    if model.tokenizer is not None:
        calls["tokenizer"] = (type(model.tokenizer), "__call__")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        run_prompts(model, prompts[:16], Path(scratch) / "warm")  # imports, the model's self-check
        engine = stack.enter_context(timed(shard_module, "_attributed"))
        marks = []
        started = time.process_time()
        run_prompts(
            model,
            prompts,
            Path(scratch) / "run",
            progress=lambda progress: marks.append(time.process_time()),
        )
        ended = time.process_time()
    parts = {
        "engine": sum(engine),
        "planning": marks[0] - started,
        "shards": marks[-1] - marks[0] - sum(engine),
        "summary": ended - marks[-1],
    }
    # in a run of its own: the clock that is read at each call would count as the layer's
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        engine = stack.enter_context(timed(shard_module, "_attributed"))
        spent = {name: stack.enter_context(timed(*call)) for name, call in calls.items()}
        run_prompts(model, prompts, Path(scratch) / "run")
    for name, seconds in parts.items():
        print(f"{name}: {1e3 * seconds / len(prompts):.3f} ms of CPU time a prompt")
    print(f"the run layer adds {(ended - started) / parts['engine'] - 1:.2%}; of it in")
    for name, each in spent.items():
        print(f"    {name}: {1e3 * sum(each) / len(prompts):.3f} ms, {sum(each) / sum(engine):.2%}")


@contextmanager
def timed(owner, name):
    """A list that the CPU times of its calls are put down in."""
    real, spent = getattr(owner, name), []

    @wraps(real)
    def call(*arguments, **named):
        started = time.process_time()
        try:
            return real(*arguments, **named)
        finally:
            spent.append(time.process_time() - started)

    setattr(owner, name, call)
    try:
        yield spent
    finally:
        setattr(owner, name, real)


def batches(count):
    model = load_model("tiny-facts")
    prompts = some_prompts(count)
    torch.set_num_threads(1)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for prompt in prompts[:64]:
            attribute(model, prompt)
        single = 64 / (time.process_time() - started)
        print(f"attribute, one by one: {single:.1f} prompts/s of CPU time")
        for size in (1, 4, 16, 32, 64, 128):
            started = time.process_time()
            for first in range(0, count, size):
                attribute_all(model, prompts[first : first + size], batch_size=size)
            rate = count / (time.process_time() - started)
            print(f"batch {size}: {rate:.1f} prompts/s of CPU time, {rate / single:.2f} x")


def tables(count):
    """CPU time a prompt of each table beyond the answers', and its bytes."""
    static = "log_prob_increase,log_prob,prob_increase,norm,coefficient,coefficient_norm"
    asked = {
        "layers": {"what": "layers"},
        "neurons": {"what": "neurons"},
        "query_neurons": {"what": "query_neurons"},
        "methods a to e, and g": {"what": "methods", "methods": static},
        "methods f": {"what": "methods", "methods": "f"},
        "interventions, 10": {"what": "interventions"},
        "interventions, 10 and 30": {"what": "interventions", "zero": (10, 30)},
    }
    model, prompts = load_model("tiny-facts"), some_prompts(count)
    with tempfile.TemporaryDirectory() as scratch:
        run_prompts(model, prompts[:16], Path(scratch) / "warm", what="layers,interventions")
        for turn in range(2):
            for number, (name, given) in enumerate(asked.items()):
                out = Path(scratch) / f"{turn}-{number}"
                started = time.process_time()
                run_prompts(model, prompts, out, **given)
                spent = time.process_time() - started
                size = sum(path.stat().st_size for path in (out / given["what"]).iterdir())
                print(f"{name}: {1e3 * spent / count:.1f} ms, {size / count:.0f} bytes a prompt")


def plan(count):
    """CPU time of what is done once: planning, then summary and manifest."""
    model, prompts = load_model("tiny-facts"), some_prompts(count)
    host = open_host(model)
    with tempfile.TemporaryDirectory() as scratch:
        found = run_prompts(model, prompts, Path(scratch) / "run")
        for _ in range(3):
            started = time.process_time()
            planned.plan_run(host, source_of(prompts)(), found.settings)
            planning = time.process_time() - started
            (found.directory / "manifest.json").unlink()
            started = time.process_time()
            finish(found.parts)
            print(f"planning {planning:.3f} s, summary {time.process_time() - started:.3f} s")


if __name__ == "__main__":
    {
        "kills": kills,
        "ray-kills": ray_kills,
        "memory": memory,
        "workers": workers,
        "layer": layer,
        "layer-gpt2": layer_gpt2,
        "batches": batches,
        "tables": tables,
        "plan": plan,
    }[sys.argv[1]](int(sys.argv[2]))
