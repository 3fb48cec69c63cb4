"""START HERE: a model + thousands of prompts -> a directory of Parquet shards.

source  = source_of(prompts)                  what is asked             (asked.py)
plan    = plan_run(host, source(), settings)  shards and batches        (planned.py)
parts   = start_run(directory, plan)          what is done so far       (../parts.py)
for each shard that is not whole:
    Worker.do(shard)                          attribute, keep           (shard.py, rows.py)
                                              here, or by a crew        (crew.py, worker.py) of
                                              processes or Ray's actors (workers.py, ray_actors.py)
finish(directory)                             manifest, errors, summary (saved.py, summary.py)
"""

import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch

from tl_neuron_attr.errors import (
    DeviceMemoryError,
    InputError,
    NeuronAttrError,
    TooManyFailuresError,
)
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.models import load_model
from tl_neuron_attr.parts import Parts, start_run
from tl_neuron_attr.prompts import at_least_one, at_least_zero
from tl_neuron_attr.readout import DEFAULT_BUDGET, Convention, check_read_out
from tl_neuron_attr.runs.asked import source_of
from tl_neuron_attr.runs.crew import Crew, Errand, errand_path, hand_out
from tl_neuron_attr.runs.memory import give_back
from tl_neuron_attr.runs.planned import RunPlan, plan_run
from tl_neuron_attr.runs.progress import Progress, Report, bar_report
from tl_neuron_attr.runs.ranks import Share
from tl_neuron_attr.runs.ray_actors import Actors, Wants, check_ray, joined, machines
from tl_neuron_attr.runs.saved import Run, finish, load_run
from tl_neuron_attr.runs.schema import SCHEMAS
from tl_neuron_attr.runs.settings import DEFAULT_WHAT, RunSettings
from tl_neuron_attr.runs.shard import Worker, read_prompts, shard_name
from tl_neuron_attr.runs.stopping import Stop, Stopped, finishing_first, signal_name
from tl_neuron_attr.runs.workers import Processes

_GIVEN_UP = 3
"""Shards given up one after another, none whole in between, after which a run stops: what they
lack, the others will lack too."""


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
    workers: SupportsIndex | None = None,
    ray: str | None = None,
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
            ``heads``. Each adds its own cost; ``answers`` is always written.
        top: Neurons of each kind listed for a prompt.
        convention: As in ``attribute``.
        prepend_bos: For texts that do not say; as in ``attribute``.
        budget: Bytes that a batch may take beyond the model; of each worker.
        batch_size: Prompts in a batch; by default as many as ``plan`` says fit into the budget,
            64 at most. It changes speed, and scores by no more than rounding.
        shard_size: Prompts in a shard: what is lost at most when a process is killed.
        threads: CPU threads of each worker. Another number changes the last bits of scores.
        workers: Processes, each with its own copy of the model; with several GPUs, one on each.
            By default one, and on Ray as many as the cluster has room for.
        ray: Have them run on a Ray cluster: its address (``auto``, ``host:6379``,
            ``ray://host:10001``), or ``local`` for one on this machine that ends with the call.
            Every machine must see ``directory``. A cluster that this process has joined is used
            with ``auto``, and left as it is.
        share: Which shards are this process's; see ``share_of_environment``.
        max_failures: Stop once more prompts than this have failed.
        device: Where a model given by name is loaded.
        dtype: What its weights are held in.
        progress: True for a bar, or a function that takes a ``Progress`` after every batch.
        announce: Called with lines for people: what is done already, what is made again.

    Raises:
        InputError: For anything wrong with the request; if the directory holds another run
            (saying in what it differs) or anything else. Before the first forward pass.
        TooManyFailuresError: Beyond ``max_failures``; what is done is kept.
        Stopped: On Ctrl-C or SIGTERM, after the shards in hand. (A ``KeyboardInterrupt``.)
        OutputError: If the disk is full; the shards before are whole.
        DeviceMemoryError, WorkerError: If shards were left out, for want of memory or because
            workers kept ending over them; once all others are done, or three in a row were.

    Cost: that of ``attribute_all``; with query neurons a forward pass more for each prompt. Memory:
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
    )
    count = None if workers is None else at_least_one(workers, "workers")
    allowed = None if max_failures is None else at_least_zero(max_failures, "max_failures")
    if not isinstance(model, str) and (ray is not None or (count or 1) > 1):
        raise InputError(
            "several workers each load the model: give its name or directory in place of a model"
        )
    if ray is not None:
        check_ray()
    path = check_writable(directory)
    asked = source_of(prompts)
    for _ in asked():  # what is wrong with a file comes before the model is loaded
        pass
    say = announce or (lambda line: None)
    mine = share or Share()
    with _cluster(ray, (count or 1) * settings.threads):
        host = _opened(model, _gpu(device, mine.local), dtype, settings)
        plan = plan_run(host, asked(), settings)
        parts = _started(path, plan)
        todo = _missing(parts, mine, say)
        run = _Doing(
            parts=parts,
            plan=plan,
            todo=todo,
            allowed=allowed,
            report=bar_report() if progress is True else progress or None,
            say=say,
        )
        run.check_failures()
        size = sum(weight.numel() * weight.element_size() for weight in host.parameters)
        with finishing_first(say) as stop:
            if todo and (ray is not None or ((count or 1) > 1 and len(todo) > 1)):
                del host
                give_back()  # each worker loads its own
                errand = Errand(
                    directory=str(path.resolve()),
                    plan=parts.plan,
                    name=errand_path(model),
                    device=device,
                    dtype=dtype,
                    host=socket.gethostname(),
                )
                if ray is None:
                    crew, count = _processes(errand, count or 1, mine), count or 1
                else:
                    crew, count = _actors(errand, plan, settings, size, count, say)
                run.with_crew(crew, count, stop)
            elif todo:
                run.here(host, stop)
    if stop.signal is not None and run.shards_done < len(todo):
        raise _stopped(stop.signal, path)
    parts.remove_stale(SCHEMAS)  # of workers that were killed since
    finish(parts)
    run.check_left_out()
    return load_run(path)


@dataclass(kw_only=True)
class _Doing:
    """The shards of one call, and how far it is."""

    parts: Parts
    plan: RunPlan
    todo: list[int]
    allowed: int | None
    report: Report | None
    say: Callable[[str], object]
    done: int = 0
    failures: int = 0
    shards_done: int = 0
    left_out: dict[int, NeuronAttrError] = field(default_factory=dict)
    """Shards that could not be done, and why."""
    in_a_row: int = 0
    """Of these, since the last that was whole."""

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        size = self.plan.identity["settings"]["shard_size"]
        total = self.plan.prompts.num_rows
        self.prompts = sum(min(size, total - shard * size) for shard in self.todo)
        self.before = 0 if self.allowed is None else _failed_before(self.parts, self.todo)

    def here(self, host: Host, stop: Stop) -> None:
        worker = Worker(host=host, parts=self.parts, prompts=self.plan.prompts)
        for shard in self.todo:
            if stop:
                return
            done, failures = self.done, self.failures
            try:
                worker.do(shard, self.did)
            except DeviceMemoryError as error:
                self.did(done - self.done, failures - self.failures)
                self.given_up(shard, error)
            else:
                self.whole(shard)

    def with_crew(self, crew: Crew, count: int, stop: Stop) -> None:
        hand_out(
            crew,
            self.todo,
            count,
            did=self.did,
            whole=self.whole,
            given_up=self.given_up,
            stop=stop,
        )

    def did(self, done: int, failed: int) -> None:
        self.done += done
        self.failures += failed
        self._tell()

    def whole(self, shard: int) -> None:
        self.shards_done += 1
        self.in_a_row = 0
        self._tell()
        self.check_failures()

    def given_up(self, shard: int, error: NeuronAttrError) -> None:
        """A shard is left out: the others need not wait for someone to come.

        Raises:
            DeviceMemoryError, WorkerError: After several in a row.
        """
        self.left_out[shard] = error
        self.in_a_row += 1
        if self.in_a_row >= _GIVEN_UP:
            raise type(error)(
                f"{self.in_a_row} shards in a row could not be done, and what is done is kept; the "
                f"same command goes on from there. Of shard {shard}: {error}"
            )
        self.say(f"shard {shard} is left out for now: {error}")

    def check_left_out(self) -> None:
        """Raises:
        DeviceMemoryError, WorkerError: If shards were left out.
        """
        for shard, error in self.left_out.items():
            raise type(error)(
                f"{len(self.left_out)} of {len(self.todo):,} shards could not be done; the others "
                f"are, and the same command tries these again. Of shard {shard}: {error}"
            )

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


def _cluster(ray: str | None, cpus: int) -> AbstractContextManager[None]:
    return nullcontext() if ray is None else joined(ray, cpus)


def _gpu(device: str | None, place: int | None) -> str | None:
    """The GPU of a place, in turn, where there are several and none was chosen."""
    count = torch.cuda.device_count()
    if place is None or device not in (None, "cuda") or count < 2:
        return device
    return f"cuda:{place % count}"


def _opened(model: Any, device: str | None, dtype: str, settings: RunSettings) -> Host:
    if isinstance(model, str):
        model = load_model(model, device=device, dtype=dtype)
    host = open_host(model)
    check_read_out(host, settings.convention, settings.budget)
    return host


def _processes(errand: Errand, count: int, share: Share) -> Processes:
    """One on each GPU; ranks on one machine take turns with theirs."""
    first = (share.local or 0) * count
    return Processes(errand=errand, device_of=lambda place: _gpu(errand.device, first + place))


def _actors(
    errand: Errand,
    plan: RunPlan,
    settings: RunSettings,
    size: int,
    count: int | None,
    say: Callable[[str], object],
) -> tuple[Actors, int]:
    """As many as there are to be, on devices of the plan's kind; and that number."""
    device = plan.identity["model"]["device"]
    wants = Wants.of(settings.threads, device, size, settings.budget)
    room = wants.room(machines())
    count = count or max(1, room)
    fit = f"; there is room for {room} of them" if room < count else ""
    say(f"{count} workers on Ray, each with {wants}{fit}")
    return Actors(errand=replace(errand, device=device), wants=wants, say=say), count


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


def _failed_before(parts: Parts, todo: Iterable[int]) -> int:
    """Failures of the shards that are whole, whoever did them; those to do are counted then."""
    others = set(range(parts.identity["shards"])) - set(todo)
    records = (parts.record(shard_name(shard)) for shard in sorted(others))
    return sum(record.rows("errors") for record in records if record is not None)


def _stopped(number: int, path: Path) -> Stopped:
    return Stopped(
        f"stopped by {signal_name(number)}; what is done is kept in {str(path)!r}, and the same "
        "command goes on from there",
        number,
    )
