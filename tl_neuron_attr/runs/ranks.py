"""Which share of a run is this process's: of a launcher's environment, or given by hand."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tl_neuron_attr.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Share:
    """Every ``of``-th shard, from number ``rank`` on."""

    rank: int = 0
    of: int = 1
    local: int | None = None
    """This process's place among those on its machine: which GPU it takes, where there are
    several and none was chosen. Shares given by hand take turns."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.of:
            raise InputError(f"rank {self.rank} is out of range: there are {self.of} (from 0)")

    def has(self, shard: int) -> bool:
        """Whether the shard is this process's to do."""
        return shard % self.of == self.rank

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Of ``"0/4"``, the first of four shares, or ``"all"``.

        Raises:
            InputError: If it has another form, or is out of range.
        """
        if text == "all":
            return cls()
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise InputError(f"a share looks like 0/4, the first of four, or is all; got {text!r}")
        return cls(rank=int(match[1]), of=int(match[2]), local=int(match[1]))


def share_of_environment(environment: Mapping[str, str] | None = None) -> Share:
    """``RANK`` of ``WORLD_SIZE`` (torchrun, indexed jobs), or a Slurm array's task; else all.

    Of several processes on a machine, ``LOCAL_RANK`` or ``SLURM_LOCALID`` says which this one is.

    Raises:
        InputError: If one of a pair is missing, or is no number.
    """
    given = os.environ if environment is None else environment
    if "RANK" in given or "WORLD_SIZE" in given:
        rank, of = _number(given, "RANK"), _number(given, "WORLD_SIZE")
        return Share(rank=rank, of=of, local=_optional(given, "LOCAL_RANK"))
    if "SLURM_ARRAY_TASK_ID" in given:
        step = _optional(given, "SLURM_ARRAY_TASK_STEP")
        first = _optional(given, "SLURM_ARRAY_TASK_MIN")
        place, rest = divmod(
            _number(given, "SLURM_ARRAY_TASK_ID") - (first or 0), max(1, step or 1)
        )
        if rest:
            raise InputError("SLURM_ARRAY_TASK_ID is none of the array's, going by its step")
        of = _number(given, "SLURM_ARRAY_TASK_COUNT")
        return Share(rank=place, of=of, local=_optional(given, "SLURM_LOCALID"))
    return Share()


def _optional(given: Mapping[str, str], name: str) -> int | None:
    return _number(given, name) if name in given else None


def _number(given: Mapping[str, str], name: str) -> int:
    try:
        return int(given[name])
    except KeyError:
        raise InputError(
            f"{name} is not set, though others of its kind are; set it, or none of RANK, "
            "WORLD_SIZE and SLURM_ARRAY_TASK_ID; or say which share it is (--share 0/4, or all)"
        ) from None
    except ValueError:
        raise InputError(f"{name} must be a number, got {given[name]!r}") from None
