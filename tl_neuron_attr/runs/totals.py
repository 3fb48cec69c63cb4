"""Adding up rows of shards by what they are about: packed into one integer, by one sort a shard.

In the order of the shards and in float64: the same shards give the same sums.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tl_neuron_attr.errors import InputError

ALL_TYPES = "all"
"""The knowledge type of rows over all prompts: no prompt's own."""

KINDS = {"ffn": 0, "attn": 1}

NEURON_FIELDS = ("row", "knowledge_type", "kind", "layer", "head", "index", "score")
"""What has to be read of a table of neurons."""

# What a row is about: type, role, kind, layer, head (0 for none) and index, the last in the lowest
# bits.
_BITS = {"type": 13, "role": 1, "kind": 1, "layer": 12, "head": 12, "index": 24}


@dataclass(frozen=True, kw_only=True)
class Totals:
    """By what it is about (ascending): the number of prompts, and the sum of scores."""

    keys: np.ndarray
    prompts: np.ndarray
    score: np.ndarray

    def __add__(self, other: "Totals") -> "Totals":
        keys, place = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        prompts = np.concatenate([self.prompts, other.prompts])
        score = np.concatenate([self.score, other.score])
        return Totals(
            keys=keys,
            prompts=np.bincount(place, weights=prompts, minlength=len(keys)),
            score=np.bincount(place, weights=score, minlength=len(keys)),
        )


NOTHING = Totals(keys=np.zeros(0, dtype=np.int64), prompts=np.zeros(0), score=np.zeros(0))


def added_up(parts: Iterable[Totals]) -> Totals:
    """The sum, in their order."""
    return reduce(Totals.__add__, parts, NOTHING)


def totals(keys: np.ndarray, rows: np.ndarray, score: np.ndarray) -> Totals:
    """Of rows that say what they are about, and of which prompt; a prompt counts once for each."""
    if not len(keys):
        return NOTHING
    found, place = np.unique(keys, return_inverse=True)
    rows = rows - rows.min()
    width = int(rows.max()) + 1
    pairs = np.sort(place * width + rows)  # numpy.unique hashes, which takes many times as long
    once = np.concatenate([[True], pairs[1:] != pairs[:-1]])
    return Totals(
        keys=found,
        prompts=np.bincount(pairs[once] // width, minlength=len(found)).astype(float),
        score=np.bincount(place, weights=score.astype(np.float64), minlength=len(found)),
    )


def of_all_types(each: Totals) -> Totals:
    """The same whatever the type."""
    below = np.int64(2 ** (sum(_BITS.values()) - _BITS["type"]) - 1)
    return NOTHING + Totals(keys=each.keys & below, prompts=each.prompts, score=each.score)


def packed(**fields: np.ndarray) -> np.ndarray:
    """What rows are about, as one integer each; what is not given is 0."""
    key = np.array(0, dtype=np.int64)
    for name, bits in _BITS.items():
        key = (key << bits) | (fields[name].astype(np.int64) if name in fields else 0)
    return key


def unpacked(keys: np.ndarray) -> dict[str, np.ndarray]:
    """Back from ``packed``."""
    fields = {}
    for name, bits in reversed(_BITS.items()):
        fields[name] = keys & (2**bits - 1)
        keys = keys >> bits
    return fields


# --- columns of one file ----------------------------------------------------------------------


def read(path: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of one file, which is known to be as it was written."""
    with pq.ParquetFile(path) as file:  # a single file: nothing of a data set need be found out
        return file.read(columns=list(columns))


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers; where it is empty -1, if they are whole."""
    column = table.column(name)
    if column.null_count:
        column = column.fill_null(-1)
    return column.to_numpy()


def codes(table: pa.Table, name: str, known: dict[str, int]) -> np.ndarray:
    """A column of names as numbers, those met for the first time put down in ``known``."""
    column = table.column(name).unify_dictionaries()
    found = [np.zeros(0, dtype=np.int64)]
    for chunk in column.chunks:
        names = chunk.dictionary.to_pylist()
        for each in names:
            known.setdefault(each, len(known))
        ours = np.array([known[each] for each in names], dtype=np.int64)
        found.append(ours[chunk.indices.to_numpy()])
    return np.concatenate(found)


def type_codes(table: pa.Table, known: dict[str, int]) -> np.ndarray:
    """The knowledge types as numbers.

    Raises:
        InputError: As ``check_types``.
    """
    found = codes(table, "knowledge_type", known)
    check_types(len(known))
    return found


def check_types(count: int) -> None:
    """Stop where there are more knowledge types than fit into their bits.

    Raises:
        InputError: If so.
    """
    most = 2 ** _BITS["type"] - 1
    if count > most:
        raise InputError(
            f"there are more than {most:,} knowledge types, too many to sum up by; give prompts "
            "fewer"
        )


def neuron_keys(table: pa.Table, types: dict[str, int], role: int = 0) -> np.ndarray:
    """What rows of neurons are about."""
    return packed(
        type=type_codes(table, types),
        role=np.array(role),
        kind=codes(table, "kind", dict(KINDS)),
        layer=numbers(table, "layer"),
        head=numbers(table, "head").astype(np.int64) + 1,
        index=numbers(table, "index"),
    )
