"""A run of an earlier schema -> a copy of this one, to go on with; nothing is overwritten."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.parts import Parts, open_parts, start_run
from tl_neuron_attr.runs.planned import prompts_hash
from tl_neuron_attr.runs.saved import Run, finish
from tl_neuron_attr.runs.schema import (
    FORMAT,
    SCHEMAS,
    WRITTEN_AS,
    check_format,
    with_metadata,
)
from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.runs.shard import read_prompts, shard_name, unlike_planned


def upgrade_run(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    announce: Callable[[str], object] | None = None,
) -> Run:
    """A copy of a run in the schema of this release, in a new directory.

    The same rows under a new plan: what the earlier schema did not know of, the run was made
    without. With the same model, prompts, settings and versions ``run_prompts`` then goes on in
    ``out``. Shards that are not as they were recorded are left out, which ``announce`` is told;
    going on makes them again. Interrupted, the same call goes on.

    Raises:
        InputError: If there is no run, it is of this schema already or of a later one, its prompts
            were changed, or ``out`` holds anything else.
        OutputError: If writing fails.

    Cost: reads and writes every file once. Memory: one shard, and the prompts.
    """
    path = Path(directory)
    old = open_parts(path)
    check_format(old.identity, repr(str(path)))
    if old.identity["format"] == FORMAT:
        raise InputError(f"{str(path)!r} is of schema version {FORMAT} already: go on with it")
    prompts = read_prompts(old)
    if prompts_hash(prompts) != old.identity["prompts"]["sha256"]:
        raise unlike_planned(old)
    identity = _upgraded(old.identity)
    new = start_run(
        check_writable(out),
        identity,
        old.about,
        {"prompts": with_metadata(prompts, "prompts", identity)},
    )
    new.remove_stale(SCHEMAS)
    for shard in range(identity["shards"]):
        name = shard_name(shard)
        if new.state(name) == "whole" or old.state(name) == "absent":
            continue
        tables = _tables(old, name)
        if tables is not None:
            found = {table: with_metadata(rows, table, identity) for table, rows in tables.items()}
            new.write(name, found, **WRITTEN_AS)
        elif announce is not None:
            announce(f"shard {shard} is not as it was recorded, and is left out")
    return finish(new)


def _upgraded(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 knew neither methods nor interventions; else the two are the same."""
    settings = RunSettings.from_plain(identity["settings"]).plain()
    return {**identity, "format": FORMAT, "settings": settings}


def _tables(parts: Parts, name: str) -> dict[str, pa.Table] | None:
    """All of one shard, ``None`` if it is damaged."""
    record = parts.record(name)
    if record is None or parts.state(name) != "whole":
        return None
    if unknown := sorted(record.files.keys() - SCHEMAS.keys()):
        raise InputError(
            f"the record of {name} in {str(parts.directory)!r} is of a table {unknown[0]!r}, which "
            "no run has; remove that record, and the upgrade leaves the shard out"
        )
    return {table: pq.read_table(parts.path(name, table)) for table in record.files}
