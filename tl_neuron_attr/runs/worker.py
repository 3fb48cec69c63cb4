"""What a worker does, wherever it runs; and the process that ``workers.py`` starts for it.

``python -m tl_neuron_attr.runs.worker`` reads its errand from the first line of standard input,
then a line a shard, and answers in lines of JSON: the messages of ``crew.py``.
"""

import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

from tl_neuron_attr.errors import DeviceMemoryError, InputError, NeuronAttrError
from tl_neuron_attr.host import open_host
from tl_neuron_attr.models import load_model
from tl_neuron_attr.parts import PLAN, Parts, open_parts
from tl_neuron_attr.runs.crew import Errand, told
from tl_neuron_attr.runs.planned import model_facts, versions
from tl_neuron_attr.runs.shard import Worker, read_prompts

Say = Callable[..., object]
"""Tells the caller one message, given as keywords."""


def work(errand: Errand, shards: Iterable[int], say: Say) -> None:
    """Load the model once, then do each shard as it comes; errors are told, not raised."""
    try:
        worker = _ready(errand)
        say(ready=True)
        for shard in shards:
            try:
                worker.do(shard, lambda done, failed: say(did=[done, failed]))
            except DeviceMemoryError as error:
                say(left=told(error))
            else:
                say(whole=shard)
    except BrokenPipeError:
        raise
    except NeuronAttrError as error:
        say(error=told(type(error)(f"{error}{_where(errand)}")))
    except Exception as error:
        say(error=told(error))
        raise


def _ready(errand: Errand) -> Worker:
    """A worker with its model, once all is as the plan has it.

    Raises:
        InputError: If the run's directory, a library's version or the model is another here.
    """
    parts = _found_parts(errand)
    _check_same("versions", versions(), parts, "install the same on every machine")
    prompts = read_prompts(parts)  # the model, which takes longer, after what may be wrong with it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(errand.name, device=errand.device, dtype=errand.dtype)
    host = open_host(model)
    advice = "every machine needs the same model files and the same kind of device"
    _check_same("model", model_facts(host), parts, advice)
    return Worker(host=host, parts=parts, prompts=prompts)


def _found_parts(errand: Errand) -> Parts:
    try:
        parts = open_parts(errand.directory)
    except InputError as error:
        if socket.gethostname() == errand.host:
            raise
        raise InputError(
            f"a worker cannot read the run's {PLAN} in {errand.directory!r}, which must lie where "
            f"every machine sees it: give a directory on a shared file system ({error})"
        ) from None
    if parts.plan != errand.plan:
        raise InputError(
            f"a worker finds another run in {errand.directory!r} than its caller: that directory "
            "must be one and the same on every machine; give one on a shared file system"
        )
    return parts


def _check_same(what: str, here: Mapping[str, object], parts: Parts, advice: str) -> None:
    planned = parts.identity[what]
    for name in sorted({*here, *planned}):
        if here.get(name) != planned.get(name):
            raise InputError(
                f"a worker has another {what}.{name} than the run was planned with: "
                f"{here.get(name)!r}, not {planned.get(name)!r}; {advice}"
            )


def _where(errand: Errand) -> str:
    """On which machine it was, if not on the caller's."""
    here = socket.gethostname()
    return "" if here == errand.host else f" (on {here})"


# --- as a process -----------------------------------------------------------------------------


def main() -> None:
    """Until standard input ends."""
    # the caller's to decide on: a scheduler sends these to every process of a job
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # libraries may print; what is said to the caller stays apart
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(**message: object) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    first = sys.stdin.readline()
    if not first:
        return
    try:
        work(Errand(**json.loads(first)), _shards(sys.stdin), say)
    except BrokenPipeError:  # the caller is gone; what was begun is whole
        os._exit(0)


def _shards(asked: Iterable[str]) -> Iterator[int]:
    for line in asked:
        yield json.loads(line)["shard"]


if __name__ == "__main__":
    main()
