"""START HERE: a model + thousands of prompts -> a directory of Parquet shards.

source  = source_of(prompts)                  what is asked             (asked.py)
plan    = plan_run(host, source(), settings)  shards and batches        (planned.py)
parts   = start_run(directory, plan)          what is done so far       (../parts.py)
for each shard that is not whole:                                       (doing.py)
    Worker.do(shard)                          attribute, keep           (shard.py, rows.py)
        here, or handed to a crew             who does it               (where.py, crew.py)
        of processes, or actors of Ray                                  (worker.py, workers.py,
                                                                         ray_actors.py)
finish(directory)                             manifest, errors, summary (saved.py, summary.py)
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, SupportsIndex

import pyarrow as pa

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.models import load_model
from tl_neuron_attr.parts import PLAN, Parts, open_parts, start_run, write_again
from tl_neuron_attr.prompts import at_least_zero
from tl_neuron_attr.readout import DEFAULT_BUDGET, Convention, check_read_out
from tl_neuron_attr.runs.asked import source_of
from tl_neuron_attr.runs.doing import Doing
from tl_neuron_attr.runs.memory import give_back
from tl_neuron_attr.runs.planned import RunPlan, plan_run
from tl_neuron_attr.runs.progress import Report, reporting
from tl_neuron_attr.runs.ranks import Share
from tl_neuron_attr.runs.saved import Run, check_manifest, finish
from tl_neuron_attr.runs.schema import SCHEMAS, check_current
from tl_neuron_attr.runs.settings import DEFAULT_WHAT, RunSettings
from tl_neuron_attr.runs.shard import PROMPTS_FILE, read_prompts, shard_name
from tl_neuron_attr.runs.stopping import Stopped, finishing_first, signal_name
from tl_neuron_attr.runs.where import Where


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
            By default one, and on Ray as many as the cluster has room for.
        ray: Have them run on a Ray cluster: its address (``auto``, ``host:6379``,
            ``ray://host:10001``), or ``local`` for one on this machine that ends with the call.
            Every machine must see ``directory``. A cluster that this process has joined is used
            with ``auto``, and left as it is.
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
        DeviceMemoryError, WorkerError: If shards were left out, for want of memory or because
            workers kept ending over them; once all others are done, or three in a row were.

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
    where = Where(
        model=model, device=device, dtype=dtype, workers=workers, ray=ray, share=share or Share()
    )
    allowed = None if max_failures is None else at_least_zero(max_failures, "max_failures")
    path = check_writable(directory)
    if (path / PLAN).is_file():
        check_current(open_parts(path).identity, str(path))
    asked = source_of(prompts)
    for _ in asked():  # what is wrong with a file comes before the model is loaded
        pass
    say = announce or (lambda line: None)
    with where.joined(settings), reporting(progress) as report:
        host = _opened(model, where.device_here, dtype, settings)
        plan = plan_run(host, asked(), settings)
        parts = _started(path, plan, say)
        todo = _missing(parts, where.share, say)
        run = Doing(parts=parts, plan=plan, todo=todo, allowed=allowed, report=report, say=say)
        run.check_failures()
        with finishing_first(say) as stop:
            crew = where.crew(host, parts, settings, len(todo), say)
            if crew is None:
                run.here(host, stop)
            else:
                del host
                give_back()  # each worker loads its own
                run.with_crew(*crew, stop)
    if stop.signal is not None and run.shards_done < len(todo):
        raise _stopped(stop.signal, path)
    parts.remove_stale(SCHEMAS)  # of workers that were killed meanwhile
    run.check_failures()
    found = finish(parts)
    run.check_left_out()
    return found


def _opened(model: Any, device: str | None, dtype: str, settings: RunSettings) -> Host:
    if isinstance(model, str):
        model = load_model(model, device=device, dtype=dtype)
    host = open_host(model)
    check_read_out(host, settings.convention, settings.budget)
    return host


def _started(path: Path, plan: RunPlan, say: Callable[[str], object]) -> Parts:
    """The run's directory, new or the one of this very plan."""
    tables = {"prompts": plan.prompts}
    parts = start_run(path, plan.identity, plan.about, tables)
    check_manifest(parts)
    if not _holds(parts, plan.prompts):
        say(f"{PROMPTS_FILE} is lost or not as it was written, and is written again")
        write_again(parts, tables)
    parts.remove_stale(SCHEMAS)
    return parts


def _holds(parts: Parts, prompts: pa.Table) -> bool:
    try:
        return read_prompts(parts).equals(prompts)
    except InputError:
        return False


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


def _stopped(number: int, path: Path) -> Stopped:
    return Stopped(
        f"stopped by {signal_name(number)}; what is done is kept in {str(path)!r}, and the same "
        "command goes on from there",
        number,
    )
