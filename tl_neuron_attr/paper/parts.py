"""What is done so far: a run's directory, its identity, and its parts, whole or absent.

``manifest.json`` says what the run is of: model weights, prompts, settings, versions. It is
written first; a later call with another identity is refused, one with the same goes on. A part is
a folder of Parquet tables whose ``part.json`` is written last: without it the part counts as
absent, and is made again. Nothing in a directory depends on when or how often a run was stopped.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.tables import write_tables

_MANIFEST = "manifest.json"
_PART = "part.json"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one run."""

    directory: Path

    def has(self, name: str) -> bool:
        """Whether the part is there, and whole."""
        return (self._folder(name) / _PART).is_file()

    def write(self, name: str, tables: Mapping[str, pd.DataFrame]) -> None:
        """Keep a part: all of its tables, or none.

        Raises:
            OutputError: If writing fails.
        """
        facts = {table: len(rows) for table, rows in tables.items()}
        write_tables(self._folder(name), tables, {_PART: _text(facts)})

    def read(self, names: Iterable[str], table: str) -> pd.DataFrame:
        """One table of these parts, put together in their order.

        Raises:
            InputError: If a file is missing or damaged: which to remove.
        """
        found = []
        for name in names:
            path = self._folder(name) / f"{table}.parquet"
            try:
                found.append(pd.read_parquet(path))
            except (OSError, ValueError) as error:  # pyarrow raises both
                raise InputError(
                    f"{str(path)!r} cannot be read; remove the folder {str(path.parent)!r}, and "
                    "the next call makes it again"
                ) from error
        return pd.concat(found, ignore_index=True)

    def _folder(self, name: str) -> Path:
        return self.directory / "parts" / name


def check_run(directory: str | Path, identity: Mapping[str, Any]) -> Path:
    """``directory`` as a path, once it is known to be new, or of this very run; writes nothing.

    Raises:
        InputError: If the directory holds another run (saying in what it differs) or anything
            else, or cannot be written to.
    """
    path = check_writable(directory)
    manifest = path / _MANIFEST
    if manifest.is_file():
        _check_same(path, manifest, json.loads(_text(identity)))
    elif path.is_dir() and any(not each.name.startswith(".") for each in path.iterdir()):
        raise InputError(
            f"{str(path)!r} is not empty and holds no run of the paper's tables; give another "
            "directory"
        )
    return path


def open_run(directory: str | Path, identity: Mapping[str, Any]) -> Parts:
    """The parts in ``directory``; in a new one a manifest is written.

    Raises:
        InputError: As ``check_run``.
        OutputError: If the manifest cannot be written.
    """
    path = check_run(directory, identity)
    if not (path / _MANIFEST).is_file():
        write_tables(path, {}, {_MANIFEST: _text(identity)})
    return Parts(directory=path)


def fingerprint(values: Iterable[Any]) -> str:
    """SHA-256 of plain values, in their order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _check_same(path: Path, manifest: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(manifest)!r} cannot be read: {error}; give another directory"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{str(manifest)!r} is no manifest; give another directory")
    for name in sorted({*found, *wanted}):
        ours, theirs = wanted.get(name), found.get(name)
        if ours != theirs:
            raise InputError(
                f"{str(path)!r} holds another run: its {name} is {theirs!r}, this one's {ours!r}; "
                "give another directory, or the same model, prompts and settings"
            )


def _text(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
