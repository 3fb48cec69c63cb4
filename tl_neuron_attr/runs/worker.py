"""``python -m tl_neuron_attr.runs.worker``: a process that does the shards it is handed.

On standard input: a line with the run's directory and the model's name, then a line a shard. On
standard output, JSON a line: ``{"ready": true}``, ``{"did": [prompts, failed]}`` after each batch,
``{"whole": shard}``, or ``{"error": ...}``, after which it ends.
"""

import json
import os
import signal
import sys
import warnings
from typing import IO, Any

from tl_neuron_attr.errors import NeuronAttrError
from tl_neuron_attr.host import open_host
from tl_neuron_attr.models import load_model
from tl_neuron_attr.parts import open_parts
from tl_neuron_attr.runs.shard import Worker, read_prompts


def main() -> None:
    """Until standard input ends."""
    # the caller's to decide on: a scheduler sends these to every process of a job
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # libraries may print; what is said to the caller stays apart
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        _work(sys.stdin, answers)
    except NeuronAttrError as error:
        _say(answers, error={"kind": type(error).__name__, "message": str(error)})
        sys.exit(1)
    except BrokenPipeError:  # the caller is gone; what was begun is whole
        os._exit(0)
    except Exception as error:
        _say(answers, error={"kind": type(error).__name__, "message": str(error)})
        raise


def _work(asked: IO[str], answers: IO[str]) -> None:
    given = json.loads(asked.readline() or "null")
    if given is None:
        return
    source = given["source"]
    parts = open_parts(given["directory"])
    prompts = read_prompts(parts)  # the model, which takes longer, after what may be wrong with it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(source["name"], device=source["device"], dtype=source["dtype"])
    worker = Worker.of(open_host(model), parts, prompts)
    _say(answers, ready=True)
    for line in asked:
        shard = json.loads(line)["shard"]
        worker.do(shard, lambda done, failed: _say(answers, did=[done, failed]))
        _say(answers, whole=shard)


def _say(answers: IO[str], **message: Any) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
