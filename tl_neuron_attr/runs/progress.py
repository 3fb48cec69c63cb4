"""How far a run is: prompts per second, time left, failures."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tl_neuron_attr.attribution import progress_bar
from tl_neuron_attr.plan import in_time


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What this call has done of what it found to do."""

    prompts: int
    """To do in this call."""
    done: int
    """Of these, those that failed included."""
    failures: int
    shards: int
    shards_done: int
    seconds: float
    """Since the first shard was begun; models are loaded by then."""

    @property
    def per_second(self) -> float:
        """Prompts a second so far."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At this rate; ``None`` before anything is done."""
        return (self.prompts - self.done) / self.per_second if self.per_second else None

    def __str__(self) -> str:
        rate = f", {self.per_second:.3g} prompts/s" if self.done else ""
        left = "" if self.seconds_left is None else f", about {in_time(self.seconds_left)} left"
        return (
            f"{self.done:,} of {self.prompts:,} prompts, {self.shards_done:,} of {self.shards:,} "
            f"shards{rate}{left}, {self.failures:,} failed"
        )


Report = Callable[[Progress], object]
"""Called after every batch."""


@contextmanager
def reporting(progress: bool | Report) -> Iterator[Report | None]:
    """Where to report to: a bar on a terminal, the function that was given, or nowhere.

    A bar shows from the second second on, and is gone after the block, however that ended.
    """
    if progress is not True:
        yield progress or None
        return
    bars: list[Any] = []

    def report(progress: Progress) -> None:
        if not bars:
            bars.append(progress_bar(progress.prompts, "prompt", True))
            # a terminal writes ^C behind it
            bars[0].ncols = max(10, shutil.get_terminal_size().columns - 4)
        (bar,) = bars
        if progress.failures:
            bar.set_postfix_str(f"{progress.failures} failed", refresh=False)
        bar.update(progress.done - bar.n)

    try:
        yield report
    finally:
        for bar in bars:
            bar.close()


def line_report(write: Callable[[str], object], seconds: float = 30.0) -> Report:
    """A line every so many seconds, and one at the end: for logs of jobs without a terminal."""
    last = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds or progress.shards_done == progress.shards:
            last = now
            write(str(progress))

    return report
