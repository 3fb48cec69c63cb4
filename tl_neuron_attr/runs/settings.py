"""How a run is done: what is kept of each prompt, and how prompts are divided."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.prompts import at_least_one
from tl_neuron_attr.readout import CONVENTIONS, DEFAULT_BUDGET, Convention

WHAT = ("neurons", "query_neurons", "layers", "heads")
"""Tables that can be asked for; ``answers`` is always there."""

DEFAULT_WHAT = ("neurons", "layers")

LARGEST_BATCH = 64
"""Prompts in a batch where memory would allow more: beyond, nothing is gained on two cores."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All that decides what the files of a run hold, beside model and prompts."""

    what: tuple[str, ...] = DEFAULT_WHAT
    """Which of ``WHAT``, in that order."""
    top: int = 300
    """Neurons of each kind listed for a prompt."""
    convention: Convention = "exact"
    prepend_bos: bool | None = None
    budget: int = DEFAULT_BUDGET
    """Bytes a batch may take beyond the model, by ``plan``; of each worker."""
    batch_size: int | None = None
    """Prompts in a batch; ``None``: as many as the budget allows, 64 at most."""
    shard_size: int = 256
    """Prompts in a shard: what is lost at most when a process is killed."""
    threads: int = 1
    """CPU threads of each worker. Another number gives scores that differ by rounding, and so
    other bytes."""

    @classmethod
    def of(cls, *, what: str | Iterable[str], batch_size: Any, **given: Any) -> "RunSettings":
        """Checked settings.

        Raises:
            InputError: If a table is unknown, a number below 1, or there is no such convention.
        """
        names = what.split(",") if isinstance(what, str) else list(what)
        asked = {name.strip() for name in names}
        unknown = sorted(asked - set(WHAT))
        if unknown or not asked:
            raise InputError(
                f"what must be some of {', '.join(WHAT)}; got {unknown[0] if unknown else what!r}"
            )
        for name in ("top", "budget", "shard_size", "threads"):
            given[name] = at_least_one(given[name], name)
        if given["convention"] not in CONVENTIONS:
            raise InputError(
                f"convention must be one of {', '.join(CONVENTIONS)}; got {given['convention']!r}"
            )
        return cls(
            what=tuple(name for name in WHAT if name in asked),
            batch_size=None if batch_size is None else at_least_one(batch_size, "batch_size"),
            **given,
        )

    @classmethod
    def from_plain(cls, facts: dict[str, Any]) -> "RunSettings":
        """Back from what ``plain`` gave."""
        return cls(**{**facts, "what": tuple(facts["what"])})

    def plain(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "what": list(self.what)}
