"""A run on disk, finished or not, read lazily; and what is written once it is finished."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.parts import Parts, Record, as_text, file_hash, fingerprint, open_parts
from tl_neuron_attr.runs.planned import prompts_hash
from tl_neuron_attr.runs.schema import PROMPTS, SCHEMAS, check_format, facts_of
from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.runs.shard import PROMPTS_FILE, read_prompts, shard_name, unlike_planned
from tl_neuron_attr.runs.summary import Summary, summary_of
from tl_neuron_attr.tables import with_experts, write_tables

MANIFEST = "manifest.json"
_FACTS = "summary.json"


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
        return self._dataset(table, None)

    def _dataset(self, table: str, shards: Sequence[int] | None) -> ds.Dataset:
        """Of some shards, or of all."""
        if table not in self.tables:
            raise InputError(
                f"there is no table {table!r} in {str(self.directory)!r}; it has "
                f"{', '.join(self.tables)}"
            )
        some = self.shards if shards is None else shards
        # a shard without errors has no such file
        paths = [path for each in self._paths(some) for name, path in each.items() if name == table]
        if not paths:
            return ds.InMemoryDataset(SCHEMAS[table].empty_table())
        try:
            found = ds.dataset([str(path) for path in paths], format="parquet")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.directory, error) from error
        facts = facts_of(found.schema, repr(str(paths[0])))
        same = found.schema.remove_metadata().equals(SCHEMAS[table])
        if facts["plan"] != self.parts.plan or not same:
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

        Columns and rows that are not asked for are not kept in memory; of one prompt, no other
        shard is opened. Where the model is a mixture of experts, a table of neurons has besides the
        columns of its files ``expert``.

        Raises:
            InputError: As ``dataset``; if there is no such column, or the prompt is not in the
                shard that it should be in.
        """
        wanted = None
        for name, value in (("knowledge_type", knowledge_type), ("prompt_id", prompt_id)):
            if value is not None:
                same = pc.field(name) == value
                wanted = same if wanted is None else wanted & same
        shards = None if prompt_id is None else self._shards_of(prompt_id)
        found = self._dataset(table, shards)
        inside = found.schema.names
        mixed = "index" in inside and bool(self.parts.identity["model"].get("n_experts"))
        names = [*inside, "expert"] if mixed else inside
        asked = names if columns is None else list(columns)
        unknown = sorted(set(asked) - set(names))
        if unknown:
            raise InputError(f"{table} has no column {unknown[0]!r}; it has {', '.join(names)}")
        with_expert = mixed and "expert" in asked
        # what tells the expert is read with it
        needed = sorted({*asked, "kind", "index"} - {"expert"}) if with_expert else asked
        try:
            read = found.to_table(columns=needed, filter=wanted)
            read.validate(full=True)  # codes of names that there are, and texts that are UTF-8
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.directory, error) from error
        if prompt_id is not None and shards and not len(read):
            self._check_there(prompt_id, shards)
        frame = as_frame(read)
        return pd.DataFrame(self._with_experts(frame)[asked]) if with_expert else frame

    def _with_experts(self, table: pd.DataFrame) -> pd.DataFrame:
        model = self.parts.identity["model"]
        return with_experts(table, model.get("n_experts", 0), model.get("d_expert", 0))

    def _paths(self, shards: Iterable[int]) -> Iterator[dict[str, Path]]:
        """The files of each shard, by table: those that its record vouches for."""
        for shard in shards:
            record = self.parts.record(shard_name(shard))
            files = {} if record is None else record.files
            yield {name: self.parts.path(shard_name(shard), name) for name in files}

    def _shards_of(self, prompt_id: str) -> list[int]:
        """The whole shards that a prompt is in: one, or none."""
        path = self.directory / PROMPTS_FILE
        try:
            found = ds.dataset(str(path), PROMPTS, format="parquet").to_table(
                columns=["row", "shard"], filter=pc.field("prompt_id") == prompt_id
            )
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._no_prompts(error) from error
        rows, shards = (found.column(name).to_pylist() for name in ("row", "shard"))
        size = self.settings.shard_size
        if None in rows or shards != [row // size for row in rows]:
            raise unlike_planned(self.parts)
        return [shard for shard in shards if shard in self.shards]

    def _check_there(self, prompt_id: str, shards: Sequence[int]) -> None:
        """Each of these shards has an answer of the prompt, or says why there is none."""
        same = pc.field("prompt_id") == prompt_id
        for shard in shards:
            rows = [
                self._dataset(name, [shard]).count_rows(filter=same)
                for name in ("answers", "errors")
            ]
            if not any(rows):
                raise unlike_planned(self.parts)

    def _no_prompts(self, error: Exception) -> InputError:
        return unlike_planned(self.parts, f"cannot be read ({str(error).splitlines()[0]})")

    def verify(self) -> "Run":
        """This run, once every file of a whole shard is known to be as it was recorded.

        By the SHA-256 of each; the prompts by that of the plan, the manifest by the records, what
        was written at the end by the manifest.

        Raises:
            InputError: For the first that is not.

        Cost: reads every file once.
        """
        self._check_shards()
        if prompts_hash(read_prompts(self.parts)) != self.parts.identity["prompts"]["sha256"]:
            raise unlike_planned(self.parts)
        damaged = _unlike_the_end(self, check_manifest(self.parts)) if self.complete else None
        if damaged is not None:
            raise InputError(
                f"{str(damaged)!r} is not the file that was written; the command that made the run "
                "writes it again"
            )
        return self

    def _check_shards(self) -> None:
        for shard in self.shards:
            record = self.parts.record(shard_name(shard))
            path = None if record is None else self.parts.unlike(record)
            if path is not None:
                raise _unlike(self.parts, shard, path)

    def prompts(self) -> pd.DataFrame:
        """Every prompt of the plan, with its tokens, shard and batch, or why it cannot be run."""
        return as_frame(read_prompts(self.parts))

    def summary(self) -> Summary:
        """Neurons by frequency, layer totals and shared neurons, of the whole shards.

        Raises:
            InputError: If a shard is not as it was recorded, by the SHA-256 of each of its files: a
                sum does not show what went into it.

        Cost: reads them twice, a shard at a time.
        """
        self._check_shards()
        try:
            asked = pq.read_table(self.directory / PROMPTS_FILE, columns=["row", "against"])
            contrasts = asked.filter(asked["against"].is_valid())["row"].to_numpy()
        except (OSError, ValueError, LookupError, pa.ArrowException) as error:
            raise self._no_prompts(error) from error
        try:
            found = summary_of(self.settings, list(self._paths(self.shards)), contrasts)
        except InputError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(self.directory, error) from error
        methods = None if found.methods is None else self._with_experts(found.methods)
        return replace(found, neurons=self._with_experts(found.neurons), methods=methods)


def load_run(directory: str | os.PathLike[str], *, verify: bool = False) -> Run:
    """The run in ``directory``, finished, stopped or under way: its whole shards.

    Args:
        directory: A run of this version of the schema, or of an earlier one.
        verify: Compare every file with its hash, as ``Run.verify`` does; otherwise sizes alone.

    Raises:
        InputError: If there is none, its plan or a record was changed, a file is not as recorded,
            or it is of a later version of the schema.
    """
    run, records, damaged = _opened(open_parts(Path(directory)))
    if damaged:
        shard, path = next(iter(damaged.items()))
        raise _unlike(run.parts, shard, path)
    _check_manifest(run.parts, records)
    return run.verify() if verify else run


def finish(parts: Parts) -> Run:
    """Write manifest, errors and summary, once every shard is whole; until then nothing.

    Whoever does so writes the same bytes. Gives the whole shards.

    Raises:
        InputError: If a manifest is there that says something else.
        OutputError: If writing fails.
    """
    run, records, _ = _opened(parts)
    if not run.complete:
        return run
    ends = _check_manifest(parts, records)
    if ends and _unlike_the_end(run, ends) is None:
        return run
    summary = run.summary()
    errors = run.table("errors")
    tables = {"errors": errors, **summary.tables}
    write_tables(parts.directory, tables, {_FACTS: as_text(summary.facts)})
    ends = {
        name: file_hash(parts.directory / name)
        for name in (*(f"{table}.parquet" for table in tables), _FACTS)
    }
    # last: where it is, all the others are
    facts = {**_manifest(parts, records), "end": ends}
    facts["checksum"] = fingerprint([facts])
    write_tables(parts.directory, {}, {MANIFEST: as_text(facts)})
    return run


def _opened(parts: Parts) -> tuple[Run, dict[int, Record], dict[int, Path]]:
    """A run, its records, and of the shards that are not as large as recorded a file."""
    check_format(parts.identity, repr(str(parts.directory)))
    try:
        range(parts.identity["shards"])  # a whole number
        RunSettings.from_plain(parts.identity["settings"])
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"the plan of {str(parts.directory)!r} is not that of a run; give another directory"
        ) from None
    records = _records(parts)
    unlike = {shard: parts.unlike(record, hashed=False) for shard, record in records.items()}
    whole = tuple(shard for shard, path in unlike.items() if path is None)
    damaged = {shard: path for shard, path in unlike.items() if path is not None}
    return Run(directory=parts.directory, parts=parts, shards=whole), records, damaged


def _records(parts: Parts) -> dict[int, Record]:
    """Of the shards that have one."""
    found = {shard: parts.record(shard_name(shard)) for shard in range(parts.identity["shards"])}
    return {shard: record for shard, record in found.items() if record is not None}


def check_manifest(parts: Parts) -> dict[str, str]:
    """Stop at a manifest that was changed, or does not say what the records do.

    Gives the hashes of what was written at the end: none where there is no manifest yet, or one of
    version 1. Shards that have lost their record are not compared.

    Raises:
        InputError: If so.

    Cost: where there is a manifest, reads every record.
    """
    return _check_manifest(parts, _records(parts)) if (parts.directory / MANIFEST).exists() else {}


def _check_manifest(parts: Parts, records: Mapping[int, Record]) -> dict[str, str]:
    path = parts.directory / MANIFEST
    if not path.is_file():
        return {}
    lost = {shard_name(shard) for shard in range(parts.identity["shards"]) if shard not in records}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        checksum = found.pop("checksum", None)
        # version 1 wrote none
        unsigned = checksum is None and parts.identity["format"] == 1
        sound = unsigned or checksum == fingerprint([found])
        ends = dict(found.pop("end", {}))
        found["shards"] = {name: said for name, said in found["shards"].items() if name not in lost}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        found, sound, ends = {}, False, {}
    if not sound or found != _manifest(parts, records):
        raise InputError(
            f"{str(path)!r} is not what the run's records say: it, or one of them, was "
            "changed; remove it, and the same command writes it again"
        )
    return ends


def _unlike_the_end(run: Run, hashes: Mapping[str, str]) -> Path | None:
    """The first file written at the end that is missing, or not of the hash recorded."""
    for name, sha256 in hashes.items():
        path = run.directory / Path(name).name
        if not path.is_file() or file_hash(path) != sha256:
            return path
    return None


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


def _manifest(parts: Parts, records: Mapping[int, Record]) -> dict[str, Any]:
    return {
        "plan": parts.plan,
        "shards": {
            record.name: {
                table: {"rows": facts.rows, "bytes": facts.bytes, "sha256": facts.sha256}
                for table, facts in record.files.items()
            }
            for record in records.values()
        },
    }


def _unlike(parts: Parts, shard: int, path: Path) -> InputError:
    return InputError(
        f"{str(path)!r} is damaged (it is not the file recorded); the command that made the run "
        f"makes the damaged part again, or remove {str(parts.record_path(shard_name(shard)))!r}, "
        "and it is left out"
    )


def _damaged(directory: Path, error: Exception) -> InputError:
    return InputError(
        f"a file of the run in {str(directory)!r} is damaged ({str(error).splitlines()[0]}); the "
        "command that made it makes the damaged part again"
    )
