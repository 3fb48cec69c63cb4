"""START HERE: a model + thousands of prompts -> a directory of Parquet shards.

source  = source_of(prompts)                  what is asked             (asked.py)
plan    = plan_run(host, source(), settings)  shards and batches        (planned.py)
parts   = start_run(directory, plan)          what is done so far       (../parts.py)
for each shard that is not whole:
    Worker.do(shard)                          attribute, keep           (shard.py, rows.py)
                                              here, or in processes     (workers.py, worker.py)
finish(directory)                             manifest, errors, summary (saved.py, summary.py)
"""

import gc
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import torch

from tl_neuron_attr.errors import InputError, TooManyFailuresError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.models import load_model
from tl_neuron_attr.parts import PLAN, Parts, open_parts, start_run
from tl_neuron_attr.prompts import at_least_one, at_least_zero
from tl_neuron_attr.readout import DEFAULT_BUDGET, Convention, check_read_out
from tl_neuron_attr.runs.asked import source_of
from tl_neuron_attr.runs.planned import RunPlan, plan_run
from tl_neuron_attr.runs.progress import Progress, Report, bar_report
from tl_neuron_attr.runs.ranks import Share
from tl_neuron_attr.runs.saved import Run, finish
from tl_neuron_attr.runs.schema import SCHEMAS, check_current
from tl_neuron_attr.runs.settings import DEFAULT_WHAT, RunSettings
from tl_neuron_attr.runs.shard import Worker, read_prompts, shard_name
from tl_neuron_attr.runs.stopping import Stop, Stopped, finishing_first
from tl_neuron_attr.runs.workers import ModelSource, do_in_workers


def run_prompts(
    model: Any,
    prompts: Any,
    directory: str | os.PathLike[str],
    *,
    what: str | Iterable[str] = DEFAULT_WHAT,
    top: SupportsIndex = 300,
    convention: Convention = "exact",
    prepend_bos: bool | None = None,
    budget: SupportsIndex = DEFAULT_BUDGET,
    batch_size: SupportsIndex | None = None,
    shard_size: SupportsIndex = 256,
    threads: SupportsIndex = 1,
    methods: str | Iterable[str] = (),
    zero: str | SupportsIndex | Iterable[SupportsIndex] | None = None,
    seed: SupportsIndex = 0,
    workers: SupportsIndex = 1,
    share: Share | None = None,
    max_failures: SupportsIndex | None = None,
    device: str | None = None,
    dtype: str = "float32",
    progress: bool | Report = False,
    announce: Callable[[str], object] | None = None,
) -> Run:
    """Attribute thousands of prompts, shard by shard, and keep what was found as Parquet files.

    Killed at any moment, it goes on where it was when called again with the same model, prompts
    and settings; the files are then the same, byte for byte, as without. So they are with any
    number of workers and shares. A prompt that cannot be attributed (too long, an answer of several
    tokens, activations that are not finite) becomes a row of ``errors``, and the run goes on.

    Args:
        model: A loaded model, left as it was; or what ``load_model`` takes, which workers need.
        prompts: A file (``.jsonl``, ``.csv``, ``.parquet``: see ``runs/asked.py``), what
            ``load_prompts`` takes, or prompts in any form that ``attribute`` takes.
        directory: New, empty, or of this very run, which then goes on.
        what: Tables to write: ``neurons`` (value neurons), ``query_neurons``, ``layers``,
            ``heads``, ``methods``, ``interventions``. Each adds its own cost; ``answers`` is
            always written.
        top: Neurons of each kind listed for a prompt.
        convention: As in ``attribute``.
        prepend_bos: For texts that do not say; as in ``attribute``.
        budget: Bytes that a batch may take beyond the model; of each worker.
        batch_size: Prompts in a batch; by default as many as ``plan`` says fit into the budget,
            64 at most. It changes speed, and scores by no more than rounding.
        shard_size: Prompts in a shard: what is lost at most when a process is killed.
        threads: CPU threads of each worker. Another number changes the last bits of scores.
        methods: Whose best neurons the table ``methods`` lists: names of ``METHODS``, or the
            paper's letters (also in one text, ``"a,c,norm"``).
        zero: How many of the best neurons of a kind ``interventions`` zeroes together; several for
            a curve. 10 by default.
        seed: Of the random neurons that are zeroed beside them; a prompt's depend on this and its
            ``prompt_id`` alone.
        workers: Processes, each with its own copy of the model; with several GPUs, one on each.
        share: Which shards are this process's; see ``share_of_environment``.
        max_failures: Stop once more prompts than this have failed.
        device: Where a model given by name is loaded; ``"auto"``, with one worker, spreads it over
            all GPUs.
        dtype: What its weights are held in.
        progress: True for a bar, or a function that takes a ``Progress`` after every batch.
        announce: Called with lines for people: what is done already, what is made again.

    Raises:
        InputError: For anything wrong with the request; if the directory holds another run
            (saying in what it differs), one of an earlier schema (see ``upgrade_run``) or anything
            else; if a method cannot be used on the model. Before the first forward pass.
        TooManyFailuresError: Beyond ``max_failures``; what is done is kept.
        Stopped: On Ctrl-C or SIGTERM, after the shards in hand. (A ``KeyboardInterrupt``.)
        OutputError: If the disk is full; the shards before are whole.
        WorkerError: If workers keep ending over one shard.

    Cost: that of ``attribute_all``; with query neurons a forward pass more for each prompt; with
    methods each one's own; with interventions a row of a forward pass for each set, number and
    control, and a search for attention neurons summed over source positions. Memory:
    the model and ``budget`` for each worker, one shard's rows, and the prompts.
    """
    settings = RunSettings.of(
        what=what,
        top=top,
        convention=convention,
        prepend_bos=prepend_bos,
        budget=budget,
        batch_size=batch_size,
        shard_size=shard_size,
        threads=threads,
        methods=methods,
        zero=zero,
        seed=seed,
    )
    count = at_least_one(workers, "workers")
    allowed = None if max_failures is None else at_least_zero(max_failures, "max_failures")
    source = ModelSource(name=model, device=device, dtype=dtype) if isinstance(model, str) else None
    if source is None and count > 1:
        raise InputError(
            "several workers each load the model: give its name or directory in place of a model"
        )
    if count > 1 and device == "auto" and torch.cuda.device_count() > 1:
        raise InputError(
            "device='auto' spreads one model over all GPUs, which leaves none to a second worker: "
            "use one worker, or several processes, each with its own CUDA_VISIBLE_DEVICES and share"
        )
    path = check_writable(directory)
    if (path / PLAN).is_file():
        check_current(open_parts(path).identity, str(path))
    asked = source_of(prompts)
    for _ in asked():  # what is wrong with a file comes before the model is loaded
        pass
    say = announce or (lambda line: None)
    host = _opened(model, source, settings)
    plan = plan_run(host, asked(), settings)
    parts = _started(path, plan)
    todo = _missing(parts, share or Share(), say)
    run = _Doing(
        parts=parts,
        plan=plan,
        todo=todo,
        allowed=allowed,
        report=bar_report() if progress is True else progress or None,
    )
    run.check_failures()
    with finishing_first() as stop:
        if count > 1 and len(todo) > 1 and source is not None:
            del host
            gc.collect()  # each worker loads its own
            run.in_processes(source, count, stop)
        elif todo:
            run.here(host, stop)
    if stop.signal is not None and run.shards_done < len(todo):
        raise _stopped(stop.signal, path)
    return finish(parts)


@dataclass(kw_only=True)
class _Doing:
    """The shards of one call, and how far it is."""

    parts: Parts
    plan: RunPlan
    todo: list[int]
    allowed: int | None
    report: Report | None
    done: int = 0
    failures: int = 0
    shards_done: int = 0

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        size = self.plan.identity["settings"]["shard_size"]
        total = self.plan.prompts.num_rows
        self.prompts = sum(min(size, total - shard * size) for shard in self.todo)
        self.before = _failed_before(self.parts) if self.allowed is not None else 0

    def here(self, host: Host, stop: Stop) -> None:
        worker = Worker(host=host, parts=self.parts, prompts=self.plan.prompts)
        for shard in self.todo:
            if stop:
                return
            worker.do(shard, self.did)
            self.whole(shard)

    def in_processes(self, source: ModelSource, count: int, stop: Stop) -> None:
        do_in_workers(
            source,
            self.parts.directory,
            self.todo,
            count,
            did=self.did,
            whole=self.whole,
            stop=stop,
        )

    def did(self, done: int, failed: int) -> None:
        self.done += done
        self.failures += failed
        self._tell()

    def whole(self, shard: int) -> None:
        self.shards_done += 1
        self._tell()
        self.check_failures()

    def check_failures(self) -> None:
        """Stop once there are too many, those of earlier calls included.

        Raises:
            TooManyFailuresError: If there are.
        """
        if self.allowed is not None and self.before + self.failures > self.allowed:
            raise TooManyFailuresError(
                f"{self.before + self.failures} prompts failed, more than the {self.allowed} "
                f"allowed; the reasons are in {str(self.parts.directory / 'errors')!r}, and with a "
                "higher limit (max_failures) the same command goes on"
            )

    def _tell(self) -> None:
        if self.report is not None:
            self.report(
                Progress(
                    prompts=self.prompts,
                    done=self.done,
                    failures=self.failures,
                    shards=len(self.todo),
                    shards_done=self.shards_done,
                    seconds=time.perf_counter() - self.started,
                )
            )


def _opened(model: Any, source: ModelSource | None, settings: RunSettings) -> Host:
    if source is not None:
        model = load_model(source.name, device=source.device, dtype=source.dtype)
    host = open_host(model)
    check_read_out(host, settings.convention, settings.budget)
    return host


def _started(path: Path, plan: RunPlan) -> Parts:
    """The run's directory, new or the one of this very plan."""
    parts = start_run(path, plan.identity, plan.about, {"prompts": plan.prompts})
    if not read_prompts(parts).equals(plan.prompts):
        raise InputError(
            f"{str(path / 'prompts.parquet')!r} was changed after it was written: it no longer "
            "holds the prompts of this run; give another directory"
        )
    parts.remove_stale(SCHEMAS)
    return parts


def _missing(parts: Parts, share: Share, say: Callable[[str], object]) -> list[int]:
    """The shards of this share that are not whole."""
    mine = [shard for shard in range(parts.identity["shards"]) if share.has(shard)]
    states = {shard: parts.state(shard_name(shard)) for shard in mine}
    damaged = [shard for shard, state in states.items() if state == "damaged"]
    whole = sum(state == "whole" for state in states.values())
    if whole:
        left = len(mine) - whole
        say(
            f"{whole:,} of {len(mine):,} shards are done already"
            + (f"; going on with {left:,}" if left else "")
        )
    for shard in damaged:
        say(f"shard {shard} is not as it was recorded, and is made again")
    return [shard for shard, state in states.items() if state != "whole"]


def _failed_before(parts: Parts) -> int:
    """Failures of the shards that were there, whoever did them."""
    records = (parts.record(shard_name(shard)) for shard in range(parts.identity["shards"]))
    return sum(record.rows("errors") for record in records if record is not None)


def _stopped(number: int, path: Path) -> Stopped:
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return Stopped(
        f"stopped by {name}; what is done is kept in {str(path)!r}, and the same command goes on "
        "from there",
        number,
    )
