"""Where a run's shards are done: in this process, in several, or on a Ray cluster."""

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host
from tl_neuron_attr.parts import Parts
from tl_neuron_attr.prompts import at_least_one
from tl_neuron_attr.runs.crew import Crew, Errand
from tl_neuron_attr.runs.ranks import Share
from tl_neuron_attr.runs.ray_actors import Actors, Wants, check_ray, joined, room_for
from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.runs.workers import Processes


@dataclass(frozen=True, kw_only=True)
class Where:
    """As it was asked; checked."""

    model: Any = field(repr=False)
    """A loaded one, or what it is called: only by its name can others load it."""
    device: str | None
    dtype: str
    workers: Any
    ray: str | None
    share: Share

    def __post_init__(self) -> None:
        if self.workers is not None:
            object.__setattr__(self, "workers", at_least_one(self.workers, "workers"))
        several = self.ray is not None or (self.workers or 1) > 1
        if several and self.device == "auto" and torch.cuda.device_count() > 1:
            raise InputError(
                "device='auto' spreads one model over all GPUs, which leaves none to a second "
                "worker: use one worker, or several processes, each with its own "
                "CUDA_VISIBLE_DEVICES and share"
            )
        if several and not isinstance(self.model, str):
            raise InputError(
                "several workers each load the model: give its name or directory in place of a "
                "model"
            )
        if self.ray is not None:
            check_ray()

    @property
    def device_here(self) -> str | None:
        """Where this process loads a model given by name."""
        return _gpu(self.device, self.share.local)

    def joined(self, settings: RunSettings) -> AbstractContextManager[None]:
        """Connected to the Ray cluster, if there is to be one, while the block lasts."""
        if self.ray is None:
            return nullcontext()
        return joined(self.ray, (self.workers or 1) * settings.threads)

    def crew(
        self,
        host: Host,
        parts: Parts,
        settings: RunSettings,
        shards: int,
        say: Callable[[str], object],
    ) -> tuple[Crew, int] | None:
        """Those who do so many shards of the run, and their number; ``None``: this process does."""
        if shards == 0 or (self.ray is None and ((self.workers or 1) == 1 or shards == 1)):
            return None
        errand = Errand(
            directory=str(parts.directory.resolve()),
            plan=parts.plan,
            name=_anywhere(self.model),
            device=self.device if self.ray is None else host.device.type,
            dtype=self.dtype,
            host=socket.gethostname(),
        )
        if self.ray is not None:
            wants = Wants.of(settings.threads, host, settings.budget)
            room = room_for(wants)
            count = min(shards, self.workers or max(1, room))
            fit = "" if room >= count else f"; there is room for {room} of them now"
            say(f"{_workers(count)} on Ray, each with {wants}{fit}")
            return Actors(errand=errand, wants=wants, say=say), count
        count = min(shards, self.workers)
        first = (self.share.local or 0) * count  # ranks on one machine take turns with its GPUs
        say(f"{_workers(count)}, each with a copy of the model")
        return Processes(
            errand=errand, device_of=lambda place: _gpu(self.device, first + place)
        ), count


def _gpu(device: str | None, place: int | None) -> str | None:
    """The GPU of a place, in turn, where there are several and none was chosen."""
    count = torch.cuda.device_count()
    if place is None or device not in (None, "cuda") or count < 2:
        return device
    return f"cuda:{place % count}"


def _anywhere(name: str) -> str:
    """A model's directory in full, for workers may stand elsewhere; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
