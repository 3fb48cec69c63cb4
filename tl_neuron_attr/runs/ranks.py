"""Which share of a run is this process's, when a launcher has started several: the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from tl_neuron_attr.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Share:
    """Every ``of``-th shard, from number ``rank`` on."""

    rank: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.of:
            raise InputError(f"rank {self.rank} is out of range: there are {self.of} (from 0)")

    def has(self, shard: int) -> bool:
        """Whether the shard is this process's to do."""
        return shard % self.of == self.rank


def share_of_environment(environment: Mapping[str, str] | None = None) -> Share:
    """``RANK`` of ``WORLD_SIZE`` (torchrun, indexed jobs), or a Slurm array's task; else all.

    Raises:
        InputError: If one of a pair is missing, or is no number.
    """
    given = os.environ if environment is None else environment
    if "RANK" in given or "WORLD_SIZE" in given:
        return Share(rank=_number(given, "RANK"), of=_number(given, "WORLD_SIZE"))
    if "SLURM_ARRAY_TASK_ID" in given:
        step = _number(given, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in given else 1
        first = _number(given, "SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in given else 0
        place, rest = divmod(_number(given, "SLURM_ARRAY_TASK_ID") - first, max(1, step))
        if rest:
            raise InputError("SLURM_ARRAY_TASK_ID is none of the array's, going by its step")
        return Share(rank=place, of=_number(given, "SLURM_ARRAY_TASK_COUNT"))
    return Share()


def _number(given: Mapping[str, str], name: str) -> int:
    try:
        return int(given[name])
    except KeyError:
        raise InputError(
            f"{name} is not set, though others of its kind are; set it, or none of RANK, "
            "WORLD_SIZE and SLURM_ARRAY_TASK_ID"
        ) from None
    except ValueError:
        raise InputError(f"{name} must be a number, got {given[name]!r}") from None
