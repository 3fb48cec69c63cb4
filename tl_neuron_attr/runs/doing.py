"""One call's work: its shards done in turn, or by a crew; what is counted, and when it stops."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tl_neuron_attr.errors import DeviceMemoryError, NeuronAttrError, TooManyFailuresError
from tl_neuron_attr.host import Host
from tl_neuron_attr.parts import Parts
from tl_neuron_attr.runs.crew import Crew, hand_out
from tl_neuron_attr.runs.planned import RunPlan
from tl_neuron_attr.runs.progress import Progress, Report
from tl_neuron_attr.runs.shard import Worker, shard_name
from tl_neuron_attr.runs.stopping import Stop

_GIVEN_UP = 3
"""Shards given up one after another, none whole in between, after which a run stops: what they
lack, the others will lack too."""


@dataclass(kw_only=True)
class Doing:
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

    started: float | None = None
    """When the first worker had its model, and began."""

    elsewhere: dict[str, int] = field(default_factory=dict)
    """Failures of the shards that this call does not do, as far as they were recorded."""

    def __post_init__(self) -> None:
        size = self.plan.identity["settings"]["shard_size"]
        total = self.plan.prompts.num_rows
        self.prompts = sum(min(size, total - shard * size) for shard in self.todo)

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
            say=self.say,
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
                f"{self.in_a_row} shards in a row could not be done (the last, {shard}: {error}); "
                "what is done is kept, and the same command goes on from there"
            )
        self.say(f"shard {shard} is left out for now: {error}")

    def check_left_out(self) -> None:
        """Raises:
        DeviceMemoryError, WorkerError: If shards were left out.
        """
        for shard, error in self.left_out.items():
            raise type(error)(
                f"{len(self.left_out)} of {len(self.todo):,} shards could not be done (shard "
                f"{shard}: {error}); the others are, and the same command tries these again"
            )

    def check_failures(self) -> None:
        """Stop once there are too many, those of earlier calls and of other ranks included.

        Raises:
            TooManyFailuresError: If there are.

        Cost: lists the records, and reads those that are new.
        """
        if self.allowed is None:
            return
        self._count_elsewhere()
        failed = sum(self.elsewhere.values()) + self.failures
        if failed > self.allowed:
            raise TooManyFailuresError(
                f"{failed} prompts failed, more than the {self.allowed} allowed; the reasons are "
                f"in {str(self.parts.directory / 'errors')!r}, and with a higher limit "
                "(max_failures) the same command goes on"
            )

    def _count_elsewhere(self) -> None:
        """Those to do here are counted as they are done; a shard made again fails in the same."""
        others = set(range(self.parts.identity["shards"])) - set(self.todo)
        names = {shard_name(shard) for shard in others} - self.elsewhere.keys()
        for name in sorted(names & self.parts.recorded()):
            record = self.parts.record(name)
            if record is not None:
                self.elsewhere[name] = record.rows("errors")

    def _tell(self) -> None:
        if self.started is None:
            self.started = time.perf_counter()
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
