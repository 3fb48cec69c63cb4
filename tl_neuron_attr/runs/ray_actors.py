"""Workers as actors of a Ray cluster: on whichever machines it has, one directory before all."""

import importlib.util
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host
from tl_neuron_attr.plan import in_bytes
from tl_neuron_attr.runs.crew import Errand, Message
from tl_neuron_attr.runs.worker import work

LOCAL = "local"
"""In place of an address: a cluster on this machine, for this call."""

_CLIENT = "ray://"

_ANSWER = 10.0
"""Seconds in which a cluster has to answer."""

_LIBRARIES = 2**30
"""Bytes that a process takes before it holds a model: torch, transformers, TransformerLens."""

_OBJECTS = 100 * 2**20
"""Bytes for objects that Ray shares: shards are handed by number, so hardly any."""

_PATIENCE = 60.0
"""Seconds without any worker after which it is said what is waited for."""

_HERE = {"here": True}
"""What an actor says first, to its crew alone: there was room for it, and it loads the model."""


def check_ray() -> None:
    """Raises:
    InputError: If Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("Ray is not installed; install it: pip install 'tl_neuron_attr[ray]'")


@contextmanager
def joined(address: str, cpus: int) -> Iterator[None]:
    """Connected to a cluster while the block lasts; one this process had joined stays joined.

    ``address`` is what ``ray.init`` takes (``auto``, ``host:6379``, ``ray://host:10001``), or
    ``local``, which starts a cluster on this machine, of at least ``cpus`` CPUs, and ends it.

    Raises:
        InputError: If there is no such cluster, or this process has joined another.
    """
    import ray

    if ray.is_initialized():
        _check_joined(address)
        yield
        return
    _check_address(address)
    given: dict[str, Any] = {"address": address}
    if address == LOCAL:
        given |= {
            "num_cpus": max(cpus, os.cpu_count() or 1),
            "object_store_memory": _OBJECTS,
            "include_dashboard": False,
        }
    with _silent(), _same_handlers(), _without_statistics():
        try:
            ray.init(**given, log_to_driver=False, configure_logging=False)
        except Exception as error:  # of many kinds, by what is wrong
            raise InputError(
                f"cannot join a Ray cluster at {address!r}: {_first_line(error)}; start one with "
                "'ray start --head', or give local; one that asks for its token is joined with "
                "RAY_AUTH_MODE=token set"
            ) from error
    try:
        with _no_remarks_on_the_dead():
            yield
    finally:
        with _silent():
            ray.shutdown()


@dataclass(frozen=True, kw_only=True)
class Wants:
    """What each worker takes of its machine."""

    cpus: int
    gpus: int
    memory: int
    """Bytes: the model, a batch, and the libraries."""

    @classmethod
    def of(cls, threads: int, host: Host, budget: int) -> "Wants":
        """For so many threads, this model, and batches of so many bytes."""
        model = sum(weight.numel() * weight.element_size() for weight in host.parameters)
        if host.device.type == "cuda":  # weights come through the machine's memory; batches do not
            return cls(cpus=threads, gpus=1, memory=model + _LIBRARIES)
        return cls(cpus=threads, gpus=0, memory=model + budget + _LIBRARIES)

    def room(self, machines: list[Mapping[str, float]]) -> int:
        """How many workers fit into machines of such resources, when nothing else runs there."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return sum(
            min(int(machine.get(name, 0) // each) for name, each in wanted.items() if each)
            for machine in machines
        )

    def __str__(self) -> str:
        cpus = "1 CPU" if self.cpus == 1 else f"{self.cpus} CPUs"
        gpus = ", a GPU" if self.gpus else ""
        return f"{cpus}{gpus} and {in_bytes(self.memory)}"


def room_for(wants: Wants) -> int:
    """How many workers the cluster that was joined has room for."""
    import ray

    return wants.room([node["Resources"] for node in ray.nodes() if node["Alive"]])


@dataclass(kw_only=True)
class Actors:
    """A crew of actors; see ``crew.Crew``."""

    errand: Errand
    wants: Wants
    say: Callable[[str], object]
    working: dict[int, Any] = field(default_factory=dict)
    """The actor of each place."""
    awaited: dict[Any, int] = field(default_factory=dict)
    """What each worker will say next, and its place."""
    patient_until: float | None = None
    made: Any = field(init=False)
    """What makes an actor."""

    def __post_init__(self) -> None:
        import ray

        self.made = ray.remote(_Actor).options(
            num_cpus=self.wants.cpus,
            num_gpus=self.wants.gpus,
            memory=self.wants.memory,
            max_restarts=0,  # another takes its place, and that is counted
        )

    def start(self, place: int) -> None:
        """An actor, once the cluster has room for it."""
        self.working[place] = self.made.remote(asdict(self.errand))
        self._listen(place)
        if self.patient_until is None:
            self.patient_until = time.monotonic() + _PATIENCE

    def hand(self, place: int, shard: int) -> None:
        """By its number; the prompts are in the run's directory."""
        self.working[place].hand.remote(shard)
        self._listen(place)

    def dismiss(self, place: int) -> None:
        """Killed: what it has written is whole, or is not there."""
        import ray

        actor = self.working.pop(place, None)
        if actor is not None:
            ray.kill(actor)
        self.awaited = {said: at for said, at in self.awaited.items() if at != place}

    def hear(self, seconds: float) -> tuple[int, Message] | None:
        """What one of them says next."""
        import ray
        from ray.exceptions import RayError

        said, _ = ray.wait(list(self.awaited), timeout=seconds)
        if not said:
            self._say_what_is_waited_for()
            return None
        place = self.awaited.pop(said[0])
        try:
            message = ray.get(said[0])
        except RayError as error:
            self.dismiss(place)
            return place, _gone(error)
        self.patient_until = float("inf")
        if "did" in message or message == _HERE:  # it goes on; else it waits for a shard
            self._listen(place)
        return None if message == _HERE else (place, message)

    def _listen(self, place: int) -> None:
        self.awaited[self.working[place].hear.remote()] = place

    def _say_what_is_waited_for(self) -> None:
        if self.patient_until is not None and time.monotonic() > self.patient_until:
            self.patient_until = float("inf")
            self.say(
                f"no worker has started yet: each takes {self.wants}, which the cluster may not "
                "have free ('ray status' shows what it has)"
            )


class _Actor:
    """What runs in the cluster: the shards are done in a thread, so that it can be heard."""

    def __init__(self, errand: dict[str, Any]) -> None:
        self._shards: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._said.put(_HERE)
        given = (Errand(**errand), iter(self._shards.get, None), self._say)
        threading.Thread(target=work, args=given, daemon=True).start()

    def hand(self, shard: int) -> None:
        self._shards.put(shard)

    def hear(self) -> Message:
        return self._said.get()

    def _say(self, **message: Any) -> None:
        self._said.put(message)


def _gone(error: Exception) -> Message:
    """Why an actor is not there any more; or, of one that cannot start anywhere, what to do."""
    text = str(error)
    if "No module named 'tl_neuron_attr'" in text:
        message = (
            "a machine of the Ray cluster cannot import tl_neuron_attr; install it, in the same "
            "version, on every machine"
        )
        return {"error": {"kind": InputError.__name__, "message": message}}
    return {"gone": _first_line(error)}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _check_address(address: str) -> None:
    """Whether anything answers there: to an address where nothing does Ray goes on calling."""
    if address in (LOCAL, "auto"):
        return
    host, _, port = address.removeprefix(_CLIENT).rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(
            f"a Ray address is auto, local, or like head:6379 or ray://head:10001; got {address!r}"
        )
    if address.startswith(_CLIENT) and importlib.util.find_spec("grpc") is None:
        raise InputError(f"{_CLIENT} addresses need Ray's client: pip install 'ray[client]'")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except OSError as error:
        raise InputError(
            f"nothing answers at {address!r} ({error}); start a Ray cluster with 'ray start "
            "--head', or give local"
        ) from None


def _check_joined(address: str) -> None:
    import ray

    here = ray.get_runtime_context().gcs_address
    if address not in ("auto", here):
        raise InputError(
            f"this process has joined a Ray cluster already, at {here}: give auto to use it, or "
            "leave it with ray.shutdown()"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Without Ray's remarks on standard error, which errors are not among."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _no_remarks_on_the_dead() -> Iterator[None]:
    """Of an actor that dies Ray prints a paragraph on standard output, past ``log_to_driver``."""
    from ray._private import worker

    # as Ray's own debugger does it; a version that has another name for it is only talkative
    before = getattr(worker, "_worker_logs_enabled", True)
    worker.__dict__["_worker_logs_enabled"] = False
    try:
        yield
    finally:
        worker.__dict__["_worker_logs_enabled"] = before


@contextmanager
def _same_handlers() -> Iterator[None]:
    """``ray.init`` sets a handler of its own for SIGTERM; whoever had one keeps it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:  # one that Python did not set cannot be set by it
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _without_statistics() -> Iterator[None]:
    """A cluster started here reports its use to nobody."""
    name = "RAY_USAGE_STATS_ENABLED"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
