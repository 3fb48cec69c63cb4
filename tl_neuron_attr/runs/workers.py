"""Workers as processes of their own: each loads the model once and does the shards it is handed.

A worker is ``python -m tl_neuron_attr.runs.worker``: it reads a line a shard and answers in lines,
so it needs no importable main module, and ends when its caller does, however that ended. It does
not see the terminal's Ctrl-C: its caller decides what is still begun.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

import tl_neuron_attr.errors as errors
from tl_neuron_attr.errors import NeuronAttrError, WorkerError
from tl_neuron_attr.runs.shard import Did
from tl_neuron_attr.runs.stopping import Stop

_DEATHS = 2
"""Workers that may die over one shard before it is given up: what kills one may be the shard."""

_WAIT = 0.2


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """How a worker comes by the model."""

    name: str
    device: str | None = None
    dtype: str = "float32"


@dataclass(kw_only=True)
class _Process:
    """One worker, and the shard it has in hand."""

    process: "subprocess.Popen[str]"
    said: IO[bytes]
    """Its standard error."""
    listener: threading.Thread = field(init=False)
    shard: int | None = None
    did: list[int] = field(default_factory=lambda: [0, 0])
    """Prompts done and failed in the shard in hand."""

    def send(self, message: dict[str, Any]) -> None:
        pipe = self.process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()
        except OSError:
            pass  # it has died, which its reader reports

    def close(self) -> None:
        """End it, and its pipes, whatever it is at."""
        self.process.kill()
        self.process.wait()
        self.listener.join()  # it holds the pipe until that ends
        for pipe in (self.process.stdin, self.process.stdout, self.said):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was still to be written to it
                pass

    def last_words(self) -> str:
        self.said.seek(0)
        lines = self.said.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


@dataclass(kw_only=True)
class _Crew:
    """The workers of one run, what is left to do, and what they say."""

    source: ModelSource
    directory: Path
    left: deque[int]
    heard: "queue.Queue[tuple[_Process, dict[str, Any] | None]]" = field(
        default_factory=queue.Queue
    )
    working: list[_Process] = field(default_factory=list)
    deaths: dict[int | None, int] = field(default_factory=dict)

    def start(self, number: int) -> None:
        said = tempfile.TemporaryFile()
        process = subprocess.Popen(
            [sys.executable, "-m", "tl_neuron_attr.runs.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_where_to_import_from())},
        )
        worker = _Process(process=process, said=said)
        self.working.append(worker)
        source = asdict(self.source) | {"device": _device(self.source.device, number)}
        worker.send({"directory": str(self.directory), "source": source})
        worker.listener = threading.Thread(target=self._listen, args=(worker,), daemon=True)
        worker.listener.start()

    def _listen(self, worker: _Process) -> None:
        pipe = worker.process.stdout
        assert pipe is not None
        for line in pipe:
            self.heard.put((worker, json.loads(line)))
        self.heard.put((worker, None))

    def hand(self, worker: _Process, stop: Stop) -> None:
        """The next shard, or word that there is none."""
        worker.shard, worker.did = None, [0, 0]
        if self.left and not stop:
            worker.shard = self.left.popleft()
            worker.send({"shard": worker.shard})
        elif worker.process.stdin is not None:
            worker.process.stdin.close()

    def end(self) -> None:
        for worker in self.working:
            worker.close()


def do_in_workers(
    source: ModelSource,
    directory: Path,
    shards: Iterable[int],
    count: int,
    *,
    did: Did,
    whole: Callable[[int], object],
    stop: Stop,
) -> None:
    """Have ``count`` processes do these shards; returns when they have, or have stopped.

    A worker that dies is replaced and its shard done again, by another.

    Raises:
        WorkerError: If two workers died over one shard, or one failed unexpectedly.
        OutputError, IdentityError, ...: What a worker raised.
    """
    crew = _Crew(source=source, directory=directory, left=deque(shards))
    started = min(count, len(crew.left))
    try:
        for number in range(started):
            crew.start(number)
        while crew.working:
            try:
                worker, message = crew.heard.get(timeout=_WAIT)
            except queue.Empty:
                continue
            if message is None:
                if worker.shard is not None:  # nothing of a shard that is not whole
                    did(-worker.did[0], -worker.did[1])
                started += _gone(crew, worker, started, stop)
            elif "did" in message:
                worker.did = [sum(each) for each in zip(worker.did, message["did"], strict=True)]
                did(*message["did"])
            elif "error" in message:
                raise _raised(message["error"], worker)
            else:  # ready, or a shard is whole
                if worker.shard is not None:
                    whole(worker.shard)
                crew.hand(worker, stop)
    finally:
        crew.end()


def _gone(crew: _Crew, worker: _Process, started: int, stop: Stop) -> int:
    """A worker has ended: as it should, or its shard goes to a new one; how many were started."""
    crew.working.remove(worker)
    code, words = worker.process.wait(), worker.last_words()
    worker.close()
    if stop or (worker.shard is None and code == 0):
        return 0
    crew.deaths[worker.shard] = crew.deaths.get(worker.shard, 0) + 1
    if crew.deaths[worker.shard] >= _DEATHS:
        doing = "loading the model" if worker.shard is None else f"shard {worker.shard}"
        raise WorkerError(
            f"{_DEATHS} workers ended over {doing} (exit code {code}{words}); what "
            "is done is kept: with less memory taken (budget, workers) the same command goes on"
        )
    if worker.shard is not None:
        crew.left.appendleft(worker.shard)
    if crew.left:
        crew.start(started)
        return 1
    return 0


def _raised(facts: dict[str, str], worker: _Process) -> NeuronAttrError:
    """What a worker raised, as this process raises it."""
    kind = getattr(errors, facts["kind"], None)
    if isinstance(kind, type) and issubclass(kind, NeuronAttrError):
        return kind(facts["message"])
    return WorkerError(
        f"a worker failed over shard {worker.shard}: {facts['kind']}: {facts['message']}"
    )


def _where_to_import_from() -> list[str]:
    """This very package first, installed or not."""
    here = str(Path(__file__).parents[2])
    return [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _device(device: str | None, number: int) -> str | None:
    """One GPU for each worker, in turn, where there are several and none was chosen."""
    if device in (None, "cuda") and torch.cuda.device_count() > 1:
        return f"cuda:{number % torch.cuda.device_count()}"
    return device
