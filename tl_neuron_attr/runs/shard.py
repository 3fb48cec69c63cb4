"""One shard: its prompts, batch by batch, through the engine, and what went wrong beside."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tl_neuron_attr.attribute import attribute_all
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.errors import InputError, NonFiniteError
from tl_neuron_attr.host import Host
from tl_neuron_attr.parts import Parts, Record
from tl_neuron_attr.prompts import Prompt
from tl_neuron_attr.runs.memory import within_memory
from tl_neuron_attr.runs.rows import Found, found_of_batch, tables_of
from tl_neuron_attr.runs.schema import FORMAT, PROMPTS, WRITTEN_AS
from tl_neuron_attr.runs.settings import RunSettings

PROMPTS_FILE = "prompts.parquet"

Did = Callable[[int, int], object]
"""Called after each batch with the numbers of prompts done and failed."""

Row = Mapping[str, Any]


def shard_name(number: int) -> str:
    """What a shard's files are called."""
    return f"shard-{number:05}"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What it takes to do shards of one run: a model, and the run's directory."""

    host: Host
    parts: Parts
    prompts: pa.Table = field(repr=False)

    @property
    def settings(self) -> RunSettings:
        """The run's."""
        return RunSettings.from_plain(self.parts.identity["settings"])

    def do(self, number: int, did: Did) -> Record:
        """Attribute a shard's prompts and keep what was found: all of it, or none.

        Raises:
            OutputError: If writing fails.
            DeviceMemoryError: If a batch does not fit into the device's memory.
            IdentityError: If the model contradicts what this package believes about it.
        """
        settings = self.settings
        size = settings.shard_size
        prompts = self.prompts.slice(number * size, size).to_pylist()
        with threads_of(settings.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the same for every batch
            found, errors = _found(self.host, prompts, settings, did)
        tables = tables_of(prompts, found, errors, settings, self.parts.identity)
        return self.parts.write(shard_name(number), tables, **WRITTEN_AS)


def read_prompts(parts: Parts) -> pa.Table:
    """The prompts of a run, as it was planned.

    Raises:
        InputError: If the file is missing or damaged.
    """
    path = parts.directory / PROMPTS_FILE
    try:
        found = pq.read_table(path)
        found.validate(full=True)
    except (OSError, ValueError) as error:  # pyarrow raises both
        raise unlike_planned(parts, f"cannot be read ({str(error).splitlines()[0]})") from None
    if not found.schema.remove_metadata().equals(PROMPTS):
        raise unlike_planned(
            parts, "was changed after it was written: it has not the columns of a run's prompts"
        )
    return found


def unlike_planned(
    parts: Parts,
    why: str = "was changed after it was written: it no longer holds the prompts of this run",
) -> InputError:
    """What is wrong with a run's prompts, and what helps."""
    current = parts.identity["format"] == FORMAT  # an earlier one is not gone on with
    advice = "the command that made the run writes it again" if current else "put the original back"
    return InputError(f"{str(parts.directory / PROMPTS_FILE)!r} {why}; {advice}")


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Products on the CPU in so many threads, for their number decides how sums round."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _found(
    host: Host, prompts: Sequence[Row], settings: RunSettings, did: Did
) -> tuple[dict[int, Found], dict[int, tuple[str, str]]]:
    """What each prompt gives, or the stage at which it failed and why, by place in the shard."""
    found: dict[int, Found] = {}
    errors = {
        place: ("planning", row["error"])
        for place, row in enumerate(prompts)
        if row["error"] is not None
    }
    did(len(errors), len(errors))
    batches: dict[int, list[int]] = {}
    for place, row in enumerate(prompts):
        if row["batch"] is not None:
            batches.setdefault(row["batch"], []).append(place)
    for number in sorted(batches):
        places = batches[number]
        results = _batch_found(host, [prompts[place] for place in places], settings)
        for place, result in zip(places, results, strict=True):
            if isinstance(result, Found):
                found[place] = result
            else:
                errors[place] = ("running", result)
        did(len(places), sum(not isinstance(result, Found) for result in results))
    return found, errors


def _batch_found(host: Host, rows: Sequence[Row], settings: RunSettings) -> list[Found | str]:
    """Of each prompt what was found, or the reason why nothing was.

    One prompt that fails takes its batch along; then each is run by itself. A batch that does not
    fit into memory is no fault of its prompts, and is never divided: what it is, is the plan's.
    """

    def tried() -> list[Found | str]:
        return [*found_of_batch(_attributed(host, rows, settings), settings)]

    try:
        return within_memory(tried, [row["n_tokens"] for row in rows], settings)
    except (InputError, NonFiniteError) as error:
        if len(rows) == 1:
            return [str(error)]
    return [_batch_found(host, [row], settings)[0] for row in rows]


def _attributed(host: Host, rows: Sequence[Row], settings: RunSettings) -> list[Attribution]:
    """The engine: one result a prompt, all in one batch."""
    prompts = [
        Prompt(
            tokens=row["tokens"],
            target=row["target"],
            against=row["against"],
            position=row["read_pos"],
            prompt_id=row["prompt_id"],
        )
        for row in rows
    ]
    return attribute_all(
        host.model,
        prompts,
        top=settings.top,
        convention=settings.convention,
        budget=settings.budget,
        batch_size=len(prompts),
    )
