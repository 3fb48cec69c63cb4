"""Handing out shards: the loop that all crews of workers share, whatever their workers are.

A crew's workers have places, from 0. What a worker says is plain values, ready for JSON:

    {"ready": true}                             the model is loaded; it waits for a shard
    {"did": [prompts, failed]}                  of the shard in hand, after each batch
    {"whole": shard}                            the shard is on disk; it waits for another
    {"left": {"kind": ..., "message": ...}}     that shard cannot be done; it waits for another
    {"error": {"kind": ..., "message": ...}}    nothing can be done; it ends
    {"gone": why}                               said for it, by its crew: it has died
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import tl_neuron_attr.errors as errors
from tl_neuron_attr.errors import NeuronAttrError, WorkerError
from tl_neuron_attr.runs.shard import Did
from tl_neuron_attr.runs.stopping import Stop

_DEATHS = 2
"""Workers that may die over one shard before it is given up: what kills one may be the shard."""

_WAIT = 0.2

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Errand:
    """What every worker of a run has to know, ready for JSON."""

    directory: str
    plan: str
    """Of the run that it must find there."""
    name: str
    """The model's, or its directory."""
    device: str | None
    dtype: str
    host: str
    """The machine that sends it."""


@runtime_checkable
class Crew(Protocol):
    """Workers of one kind. A place whose worker was dismissed, or is gone, is not heard again."""

    def start(self, place: int) -> None:
        """A worker at a place that has none: it loads the model, and says so."""
        ...

    def hand(self, place: int, shard: int) -> None:
        """Give a worker that waits a shard to do."""
        ...

    def dismiss(self, place: int) -> None:
        """End a worker, whatever it is at."""
        ...

    def hear(self, seconds: float) -> tuple[int, Message] | None:
        """What some worker says next, and its place; ``None`` if none does for so long."""
        ...


@dataclass(kw_only=True)
class _Hand:
    """What one worker has in hand."""

    shard: int | None = None
    done: int = 0
    failed: int = 0


@dataclass(kw_only=True)
class _Handing:
    """What is left to do, and who is at what."""

    crew: Crew
    count: int
    left: deque[int]
    did: Did
    whole: Callable[[int], object]
    given_up: Callable[[int, NeuronAttrError], object]
    say: Callable[[str], object]
    hands: dict[int, _Hand] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)
    stillborn: int = 0
    """Workers that died before they had loaded the model, one after another."""

    def start(self, place: int) -> None:
        self.hands[place] = _Hand()
        self.crew.start(place)

    def hear(self, place: int, message: Message, stop: Stop) -> None:
        """One thing that the worker at ``place`` says.

        Raises:
            NeuronAttrError: If it says that nothing can be done.
        """
        hand = self.hands[place]
        match message:
            case {"did": [done, failed]}:
                hand.done, hand.failed = hand.done + done, hand.failed + failed
                self.did(done, failed)
            case {"ready": _}:
                self.stillborn = 0
                self.next(place, stop)
            case {"whole": shard}:
                self.whole(shard)
                self.next(place, stop)
            case {"left": {"kind": kind, "message": text}}:
                self.lose(hand)
                assert hand.shard is not None
                self.given_up(hand.shard, raised(kind, text, hand.shard))
                self.next(place, stop)
            case {"error": {"kind": kind, "message": text}}:
                raise raised(kind, text, hand.shard)
            case {"gone": why}:
                self.gone(place, why, stop)
            case _:
                raise WorkerError(f"a worker said what cannot be understood: {dict(message)!r}")

    def next(self, place: int, stop: Stop) -> None:
        """The next shard for this worker, or its end."""
        if self.left and not stop:
            self.hands[place] = _Hand(shard=self.left.popleft())
            shard = self.hands[place].shard
            assert shard is not None
            self.crew.hand(place, shard)
        else:
            del self.hands[place]
            self.crew.dismiss(place)

    def lose(self, hand: _Hand) -> None:
        """Of a shard that is not whole nothing counts."""
        if hand.done:
            self.did(-hand.done, -hand.failed)

    def gone(self, place: int, why: str, stop: Stop) -> None:
        """A worker has died: its shard is left to do, by another that takes its place."""
        hand = self.hands.pop(place)
        self.lose(hand)
        if hand.shard is None:
            self.stillborn += 1
            if self.stillborn >= _DEATHS * self.count:
                raise WorkerError(
                    f"{self.stillborn} workers ended while they loaded the model ({why}); where "
                    "memory is short, fewer workers may do"
                )
        else:
            self.deaths[hand.shard] += 1
            if self.deaths[hand.shard] < _DEATHS:
                self.left.appendleft(hand.shard)
                if not stop:
                    self.say(f"a worker ended over shard {hand.shard} ({why}); it is done again")
            else:
                self.given_up(
                    hand.shard,
                    WorkerError(
                        f"{_DEATHS} workers ended over shard {hand.shard} ({why}); where memory "
                        "is short, fewer workers may do"
                    ),
                )
        if self.left and not stop:
            self.start(place)

    def dismiss_idle(self) -> None:
        """Those that have no shard: loading a model is not waited for."""
        for place in [place for place, hand in self.hands.items() if hand.shard is None]:
            del self.hands[place]
            self.crew.dismiss(place)


def hand_out(
    crew: Crew,
    shards: Iterable[int],
    count: int,
    *,
    did: Did,
    whole: Callable[[int], object],
    given_up: Callable[[int, NeuronAttrError], object],
    say: Callable[[str], object],
    stop: Stop,
) -> None:
    """Have ``count`` workers do these shards; returns when they have, or have stopped.

    A worker that dies is replaced and its shard done again, by another; one over which two have
    died, or that a worker finds cannot be done, is given up. ``did`` is told less than nothing of
    prompts that were counted and lost, and ``say``, for people, which shard is done again.

    Raises:
        WorkerError: If workers die before they have loaded the model, or one failed unexpectedly.
        OutputError, IdentityError, ...: What a worker raised.
    """
    left = deque(shards)
    handing = _Handing(
        crew=crew,
        count=min(count, len(left)),
        left=left,
        did=did,
        whole=whole,
        given_up=given_up,
        say=say,
    )
    try:
        for place in range(handing.count):
            handing.start(place)
        while handing.hands:
            if stop or not handing.left:
                handing.dismiss_idle()
            heard = crew.hear(_WAIT) if handing.hands else None
            if heard is not None and heard[0] in handing.hands:
                handing.hear(*heard, stop)
    finally:
        for place in list(handing.hands):
            crew.dismiss(place)


def told(error: Exception) -> dict[str, str]:
    """An error, as a worker tells it."""
    return {"kind": type(error).__name__, "message": str(error)}


def raised(kind: str, message: str, shard: int | None) -> NeuronAttrError:
    """What a worker told, as this process raises it."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, NeuronAttrError):
        return found(message)
    doing = "loading the model" if shard is None else f"shard {shard}"
    return WorkerError(f"a worker failed over {doing}: {kind}: {message}")
