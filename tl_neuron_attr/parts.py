"""What is done so far: a run's directory, its identity, and its parts, whole or absent.

``plan.json`` says what the run is of: model weights, prompts, settings, versions. It is written
first; a later call with another identity is refused, one with the same goes on. A part is a row of
Parquet files, one a table, each in its table's folder, and a record in ``records/`` that is
written last: it holds the hash and the number of rows of each file, and without it the part counts
as absent. No two parts share a file, so any number of processes may write at once; should two of
them write the same part, they write the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable, remove_stale, write_files

PLAN = "plan.json"
RECORDS = "records"

_DIFFERENCES_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """One table of one part, as its record has it."""

    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What vouches for a part: the files it consists of, by table."""

    name: str
    plan: str
    files: Mapping[str, PartFile]

    def rows(self, table: str) -> int:
        """How many rows the part has of a table; 0 where it has no such file."""
        return self.files[table].rows if table in self.files else 0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one run."""

    directory: Path
    identity: Mapping[str, Any] = field(repr=False)
    """What the run is of."""
    about: Mapping[str, Any] = field(repr=False, default_factory=dict)
    """What else its first call noted; never compared."""
    folder: str = ""
    """Where in the directory the parts are."""

    @property
    def plan(self) -> str:
        """SHA-256 of the identity: every file of the run carries it."""
        return fingerprint([self.identity])

    def path(self, name: str, table: str) -> Path:
        """Where a part keeps a table."""
        return self.directory / self.folder / table / f"{name}.parquet"

    def record_path(self, name: str) -> Path:
        """Where a part's record is."""
        return self.directory / self.folder / RECORDS / f"{name}.json"

    def record(self, name: str) -> Record | None:
        """The part's record, ``None`` where there is none.

        Raises:
            InputError: If it is not as it was written, or of another plan.
        """
        path = self.record_path(name)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            checksum = found.pop("checksum")
            files = {table: PartFile(**facts) for table, facts in found["files"].items()}
            record = Record(name=found["name"], plan=found["plan"], files=files)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            found, checksum, record = {}, None, None
        if record is None or checksum != fingerprint([found]) or record.name != name:
            raise InputError(
                f"{str(path)!r} is not as it was written; remove it, and the same command makes "
                "that part again"
            )
        if record.plan != self.plan:
            raise InputError(
                f"{str(path)!r} belongs to another plan; remove it, and the same command makes "
                "that part again"
            )
        return record

    def recorded(self) -> set[str]:
        """The names of the parts that have a record. Cost: lists one directory."""
        try:
            names = os.listdir(self.directory / self.folder / RECORDS)
        except FileNotFoundError:
            return set()
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def state(self, name: str, *, hashed: bool = True) -> Literal["whole", "absent", "damaged"]:
        """Whether the part is whole: every file there, as large as recorded and of its hash.

        Without ``hashed`` sizes alone are compared. Cost: reads the part once.

        Raises:
            InputError: If its record is not as it was written.
        """
        record = self.record(name)
        if record is None:
            return "absent"
        return "whole" if self.unlike(record, hashed=hashed) is None else "damaged"

    def unlike(self, record: Record, *, hashed: bool = True) -> Path | None:
        """The first file of a part that is missing, or not as large or of the hash recorded."""
        for table, facts in record.files.items():
            path = self.path(record.name, table)
            try:
                if path.stat().st_size != facts.bytes:
                    return path
                if hashed and file_hash(path) != facts.sha256:
                    return path
            except OSError:
                return path
        return None

    def write(self, name: str, tables: Mapping[str, pa.Table], **options: Any) -> Record:
        """Keep a part: all of its tables, then the record that vouches for them.

        ``options`` are pyarrow's for writing Parquet.

        Raises:
            OutputError: If writing fails; the part then counts as absent, or is as it was.
        """
        files = {}
        for table, rows in tables.items():
            path = self.path(name, table)
            write_files(path.parent, {path.name: _parquet_writer(rows, options)})
            files[table] = PartFile(
                rows=rows.num_rows, bytes=path.stat().st_size, sha256=file_hash(path)
            )
        record = Record(name=name, plan=self.plan, files=files)
        facts = asdict(record)
        facts["checksum"] = fingerprint([facts])
        path = self.record_path(name)
        write_files(path.parent, {path.name: _text_writer(as_text(facts))})
        return record

    def read(self, names: Iterable[str], table: str) -> list[pa.Table]:
        """One table of each of these parts, in their order.

        Raises:
            InputError: If a file is missing or damaged: which to remove.
        """
        found = []
        for name in names:
            path = self.path(name, table)
            try:
                found.append(pq.read_table(path))
            except (OSError, ValueError) as error:  # pyarrow raises both
                raise InputError(
                    f"{str(path)!r} cannot be read; remove {str(self.record_path(name))!r}, and "
                    "the same command makes that part again"
                ) from error
        return found

    def remove_stale(self, tables: Iterable[str]) -> None:
        """Remove the temporary files of processes that were killed."""
        remove_stale(self.directory)
        for folder in (RECORDS, *tables):
            remove_stale(self.directory / self.folder / folder)


def check_run(
    directory: str | Path,
    identity: Mapping[str, Any],
    what: str = "run",
    begun: Collection[str] = (),
) -> Path:
    """``directory`` as a path, once it is known to be new, or of this very run; writes nothing.

    ``begun`` names files that a start which was killed before its plan was written leaves behind.

    Raises:
        InputError: If the directory holds another run (saying in what it differs) or anything
            else, or cannot be written to.
    """
    path = check_writable(directory)
    # listed before the plan is looked for: another process may be writing it
    there = [each.name for each in path.iterdir()] if path.is_dir() else []
    if (path / PLAN).is_file():
        differing = differences(open_parts(path, what).identity, plain(identity))
        if differing:
            raise InputError(
                f"{str(path)!r} holds another {what}: {_shown(differing)}; give another directory, "
                "or the same model, prompts and settings"
            )
    elif any(not name.startswith(".") and name not in begun for name in there):
        raise InputError(f"{str(path)!r} is not empty and holds no {what}; give another directory")
    return path


def start_run(
    directory: str | Path,
    identity: Mapping[str, Any],
    about: Mapping[str, Any],
    tables: Mapping[str, pa.Table] | None = None,
    what: str = "run",
    folder: str = "",
) -> Parts:
    """The parts in ``directory``; in a new one ``plan.json`` is written, and ``tables`` before it.

    Raises:
        InputError: As ``check_run``.
        OutputError: If they cannot be written.
    """
    begun = [f"{name}.parquet" for name in tables or {}]
    path = check_run(directory, identity, what, begun)
    if not (path / PLAN).is_file():
        facts: dict[str, Any] = {"about": plain(about), "identity": plain(identity)}
        facts["checksum"] = fingerprint([facts["identity"]])
        # the plan is renamed last: where it is, the tables are
        write_files(path, {**_table_writers(tables or {}), PLAN: _text_writer(as_text(facts))})
    return replace(open_parts(path, what), folder=folder)


def write_again(parts: Parts, tables: Mapping[str, pa.Table]) -> None:
    """The tables of a plan as ``start_run`` wrote them, where one was lost or damaged.

    Raises:
        OutputError: If they cannot be written.
    """
    write_files(parts.directory, _table_writers(tables))


def open_parts(directory: str | Path, what: str = "run") -> Parts:
    """The parts of the run that is in ``directory``.

    Raises:
        InputError: If there is none, or its plan is not as it was written.
    """
    path = Path(directory) / PLAN
    if not path.is_file():
        raise InputError(f"there is no {what} in {str(directory)!r}: it has no {PLAN}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        identity, about, checksum = found["identity"], found["about"], found["checksum"]
        if not isinstance(about, dict):
            raise TypeError("about is no object")
        sound = isinstance(identity, dict) and checksum == fingerprint([identity])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise InputError(
            f"{str(path)!r} cannot be read as a plan; give another directory"
        ) from None
    if not sound:
        raise InputError(
            f"{str(path)!r} was changed after it was written: it no longer says what the files "
            "beside it are of; put the original back, or give another directory"
        )
    return Parts(directory=Path(directory), identity=identity, about=about)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """In what two identities differ: the name, the first's value and the second's."""
    one, other = _flat(found), _flat(wanted)
    return [
        (name, one.get(name), other.get(name))
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]


def fingerprint(values: Iterable[Any]) -> str:
    """SHA-256 of plain values, in their order."""
    digest = hashlib.sha256()
    for value in values:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def as_text(facts: Mapping[str, Any]) -> str:
    """As a JSON file: keys in order, a newline at the end."""
    return json.dumps(facts, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON: lists for tuples, texts for keys."""
    return json.loads(json.dumps(facts, ensure_ascii=False))


def _shown(differing: Sequence[tuple[str, Any, Any]]) -> str:
    said = [
        f"its {name} is {theirs!r}, this one's {ours!r}"
        for name, theirs, ours in differing[:_DIFFERENCES_SHOWN]
    ]
    more = len(differing) - len(said)
    return "; ".join(said) + (f"; and {more} more" if more else "")


def _flat(facts: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = value
    return flat


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parquet_writer(table: pa.Table, options: Mapping[str, Any] | None = None):
    return lambda path: pq.write_table(table, path, **(options or {}))


def _table_writers(tables: Mapping[str, pa.Table]):
    return {f"{name}.parquet": _parquet_writer(each) for name, each in tables.items()}


def _text_writer(text: str):
    return lambda path: path.write_text(text, encoding="utf-8")
