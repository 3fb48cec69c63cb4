"""A run on disk, finished or not, read lazily; and what is written once it is finished."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.parts import Parts, as_text, open_parts
from tl_neuron_attr.runs.schema import SCHEMAS, check_format, facts_of
from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.runs.shard import read_prompts, shard_name
from tl_neuron_attr.runs.summary import Summary, summary_of
from tl_neuron_attr.tables import write_tables

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """The shards of a run that are whole; those that are missing are left out of everything."""

    directory: Path
    parts: Parts = field(repr=False)
    shards: tuple[int, ...]
    """Numbers of the whole ones."""

    @property
    def n_shards(self) -> int:
        """How many there will be."""
        return self.parts.identity["shards"]

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return len(self.shards) == self.n_shards

    @property
    def facts(self) -> dict[str, Any]:
        """What it is of: model, prompts, settings, versions, neuron basis."""
        return {**self.parts.identity, "model_name": self.parts.about.get("model", "")}

    @property
    def settings(self) -> RunSettings:
        """How it was, or is, done."""
        return RunSettings.from_plain(self.parts.identity["settings"])

    @property
    def tables(self) -> tuple[str, ...]:
        """Those that can be read."""
        return ("answers", *self.settings.what, "errors")

    def dataset(self, table: str) -> ds.Dataset:
        """A table of all whole shards, not yet read: to filter, scan, or hand to DuckDB or polars.

        Raises:
            InputError: If there is no such table, or a file is damaged.
        """
        if table not in self.tables:
            raise InputError(
                f"there is no table {table!r} in {str(self.directory)!r}; it has "
                f"{', '.join(self.tables)}"
            )
        names = [shard_name(shard) for shard in self.shards]
        paths = [self.parts.path(name, table) for name in names]
        if table == "errors":  # a shard without any has no such file
            paths = [path for path in paths if path.exists()]
        if not paths:
            return ds.InMemoryDataset(SCHEMAS[table].empty_table())
        try:
            found = ds.dataset([str(path) for path in paths], format="parquet")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.directory, error) from error
        facts = facts_of(found.schema, repr(str(paths[0])))
        if facts["plan"] != self.parts.plan:
            raise InputError(
                f"{str(paths[0])!r} is of another run; remove it, and the same command makes that "
                "part again"
            )
        return found

    def table(
        self,
        table: str,
        *,
        columns: Sequence[str] | None = None,
        knowledge_type: str | None = None,
        prompt_id: str | None = None,
    ) -> pd.DataFrame:
        """The same as a DataFrame, of all prompts, those of one type, or one.

        Raises:
            InputError: As ``dataset``; if there is no such column.
        """
        wanted = None
        for name, value in (("knowledge_type", knowledge_type), ("prompt_id", prompt_id)):
            if value is not None:
                same = pc.field(name) == value
                wanted = same if wanted is None else wanted & same
        found = self.dataset(table)
        unknown = sorted(set(columns or ()) - set(found.schema.names))
        if unknown:
            raise InputError(
                f"{table} has no column {unknown[0]!r}; it has {', '.join(found.schema.names)}"
            )
        try:
            read = found.to_table(columns=None if columns is None else list(columns), filter=wanted)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.directory, error) from error
        return as_frame(read)

    def prompts(self) -> pd.DataFrame:
        """Every prompt of the plan, with its tokens, shard and batch, or why it cannot be run."""
        return as_frame(read_prompts(self.parts))

    def summary(self) -> Summary:
        """Neurons by frequency, layer totals and shared neurons, of the whole shards.

        Cost: reads them once, a shard at a time.
        """
        try:
            return summary_of(
                self.settings,
                [
                    {name: self.parts.path(shard_name(shard), name) for name in self.tables}
                    for shard in self.shards
                ],
            )
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.directory, error) from error


def load_run(directory: str | os.PathLike[str]) -> Run:
    """The run in ``directory``, finished, stopped or under way: its whole shards.

    Raises:
        InputError: If there is none, its plan or a record was changed, or it is of another version
            of the schema.
    """
    path = Path(directory)
    parts = open_parts(path)
    check_format(parts.identity.get("format"), repr(str(path)))
    count = parts.identity["shards"]
    whole = [shard for shard in range(count) if parts.record(shard_name(shard)) is not None]
    return Run(directory=path, parts=parts, shards=tuple(whole))


def finish(parts: Parts) -> None:
    """Write manifest, errors and summary, once every shard is whole; until then nothing.

    Whoever does so writes the same bytes.

    Raises:
        InputError: If a manifest is there that says something else.
        OutputError: If writing fails.
    """
    run = load_run(parts.directory)
    if not run.complete:
        return
    text = as_text(_manifest(run))
    path = parts.directory / MANIFEST
    if path.is_file():
        if path.read_bytes() != text.encode():
            raise InputError(
                f"{str(path)!r} is not what the run's records say: it, or one of them, was "
                "changed; remove it, and the same command writes it again"
            )
        return
    summary = run.summary()
    errors = as_frame(run.dataset("errors").to_table())
    texts = {"summary.json": as_text(summary.facts), MANIFEST: text}
    write_tables(parts.directory, {"errors": errors, **summary.tables}, texts)


def as_frame(table: pa.Table) -> pd.DataFrame:
    """As the tables of this package are: plain texts, nullable integers."""
    for number, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            plain = table.column(number).cast(pa.string())
            table = table.set_column(number, column.name, plain)
    nullable = {pa.int16(): pd.Int16Dtype(), pa.int32(): pd.Int32Dtype()}
    empty = {name for name in ("head", "source_pos", "batch", "target", "against")}
    return (
        table.replace_schema_metadata(None)
        .to_pandas(types_mapper=lambda kind: pd.StringDtype() if pa.types.is_string(kind) else None)
        .astype(
            {
                column.name: nullable[column.type]
                for column in table.schema
                if column.name in empty and column.type in nullable
            }
        )
    )


def _manifest(run: Run) -> dict[str, Any]:
    records = [run.parts.record(shard_name(shard)) for shard in run.shards]
    return {
        "plan": run.parts.plan,
        "shards": {
            record.name: {
                table: {"rows": facts.rows, "bytes": facts.bytes, "sha256": facts.sha256}
                for table, facts in record.files.items()
            }
            for record in records
            if record is not None
        },
    }


def _damaged(directory: Path, error: Exception) -> InputError:
    return InputError(
        f"a file of the run in {str(directory)!r} is damaged ({str(error).splitlines()[0]}); the "
        "command that made it makes the damaged part again"
    )
