"""Workers as processes of their own, on this machine.

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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from tl_neuron_attr.runs.crew import Errand, Message


@dataclass(kw_only=True)
class _Process:
    """One worker."""

    process: "subprocess.Popen[str]"
    said: IO[bytes]
    """Its standard error."""
    listener: threading.Thread

    def send(self, message: dict[str, Any]) -> None:
        pipe = self.process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()
        except OSError:
            pass  # it has died, which its listener reports

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
        return f"exit code {self.process.wait()}" + (f": {lines[-1]}" if lines else "")


@dataclass(kw_only=True)
class Processes:
    """A crew of processes; see ``crew.Crew``."""

    errand: Errand
    device_of: Callable[[int], str | None]
    """Where the worker at a place loads the model."""
    heard: "queue.Queue[tuple[int, Message | None]]" = field(default_factory=queue.Queue)
    working: dict[int, _Process] = field(default_factory=dict)

    def start(self, place: int) -> None:
        """A process, which loads the model."""
        said = tempfile.TemporaryFile()
        process = subprocess.Popen(
            [sys.executable, "-m", "tl_neuron_attr.runs.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_where_to_import_from())},
        )
        listener = threading.Thread(target=self._listen, args=(place, process), daemon=True)
        self.working[place] = _Process(process=process, said=said, listener=listener)
        self.working[place].send(asdict(replace(self.errand, device=self.device_of(place))))
        listener.start()

    def hand(self, place: int, shard: int) -> None:
        """A line to its standard input."""
        self.working[place].send({"shard": shard})

    def dismiss(self, place: int) -> None:
        """Killed: what it has written is whole, or is not there."""
        if place in self.working:
            self.working.pop(place).close()

    def hear(self, seconds: float) -> tuple[int, Message] | None:
        """The next line of any of them."""
        try:
            place, message = self.heard.get(timeout=seconds)
        except queue.Empty:
            return None
        if place not in self.working:  # what it said before it was dismissed
            return None
        if message is not None:
            return place, message
        words = self.working[place].last_words()
        self.dismiss(place)
        return place, {"gone": words}

    def _listen(self, place: int, process: "subprocess.Popen[str]") -> None:
        """Until it ends, or says what is no message: it was killed while it wrote, say."""
        pipe = process.stdout
        assert pipe is not None
        for line in pipe:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                process.kill()
                break
            self.heard.put((place, message))
        self.heard.put((place, None))


def _where_to_import_from() -> list[str]:
    """This very package first, installed or not."""
    here = str(Path(__file__).parents[2])
    return [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
