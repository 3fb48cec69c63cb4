"""What a run's prompts have in common: neurons by frequency, layer totals, shared neurons.

Read a shard at a time, added up in the order of the shards in float64: the same shards give the
same bytes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.tables import records

ALL_TYPES = "all"
"""The knowledge type of rows over all prompts."""

ROLES, KINDS = ("value", "query"), ("ffn", "attn")

# What a row is about, packed into one integer so that a shard is added up by one sort: type, role,
# kind, layer, head (0 for none) and index, the last in the lowest bits.
_BITS = {"type": 13, "role": 1, "kind": 1, "layer": 12, "head": 12, "index": 24}
SHARED = 0.5
"""A neuron is shared if it is listed for more than this share of a type's prompts."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What many prompts have in common, for each knowledge type and for all."""

    prompts: pd.DataFrame
    """``knowledge_type, prompts, failed, mean_log_prob``: of the answers, nats."""
    neurons: pd.DataFrame
    """``knowledge_type, role, kind, layer, head, index, prompts, share, mean_score``: for how many
    prompts it is listed, what share of those answered that is, and its mean score over those it is
    listed for (an attention neuron's over its source positions summed). Most frequent first."""
    layers: pd.DataFrame
    """``knowledge_type, layer, kind, mean_score``; empty if the run has no layers."""
    facts: Mapping[str, Any] = field(repr=False)
    """For JSON: numbers of prompts, and of shared neurons of each type, role and kind."""

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """By the name of their files."""
        return {
            "summary": self.neurons,
            "summary_prompts": self.prompts,
            "summary_layers": self.layers,
        }

    @property
    def shared(self) -> pd.DataFrame:
        """Neurons listed for more than half of the prompts of their type."""
        return self.neurons.loc[self.neurons["share"] > SHARED].reset_index(drop=True)


def summary_of(settings: RunSettings, shards: Sequence[Mapping[str, Path]]) -> Summary:
    """The summary of these shards, given by the paths of their tables.

    Cost: reads each once. Memory: one shard, and a few numbers for each neuron that is listed.

    Raises:
        InputError: If there are thousands of knowledge types.
    """
    types: dict[str, int] = {}
    answered = _added_up(_answers(each["answers"], types) for each in shards)
    failed: Counter[str] = Counter()
    for each in shards:
        if each["errors"].exists():
            failed.update(_column(each["errors"], "knowledge_type"))
    listed = [name for name in ("neurons", "query_neurons") if name in settings.what]
    neurons = _added_up(_neurons(each[name], name, types) for each in shards for name in listed)
    layers = _added_up(
        _layers(each["layers"], types) for each in shards if "layers" in settings.what
    )
    counts = _prompt_table(answered, failed, list(types))
    of_type = dict(zip(counts["knowledge_type"], counts["prompts"], strict=True))
    table = _neuron_table(neurons, list(types), of_type)
    return Summary(
        prompts=counts,
        neurons=table,
        layers=_layer_table(layers, list(types), of_type),
        facts=_facts(counts, table, settings),
    )


@dataclass(frozen=True, kw_only=True)
class _Totals:
    """By what it is about (ascending): the number of prompts, and the sum of scores."""

    keys: np.ndarray
    prompts: np.ndarray
    score: np.ndarray

    def __add__(self, other: "_Totals") -> "_Totals":
        keys, place = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        prompts = np.concatenate([self.prompts, other.prompts])
        score = np.concatenate([self.score, other.score])
        return _Totals(
            keys=keys,
            prompts=np.bincount(place, weights=prompts, minlength=len(keys)),
            score=np.bincount(place, weights=score, minlength=len(keys)),
        )


_NOTHING = _Totals(keys=np.zeros(0, dtype=np.int64), prompts=np.zeros(0), score=np.zeros(0))


def _added_up(parts: Iterable[_Totals]) -> _Totals:
    return reduce(_Totals.__add__, parts, _NOTHING)


def _totals(keys: np.ndarray, rows: np.ndarray, score: np.ndarray) -> _Totals:
    """Of rows that say what they are about, and of which prompt; a prompt counts once for each."""
    if not len(keys):
        return _NOTHING
    found, place = np.unique(keys, return_inverse=True)
    rows = rows - rows.min()
    width = int(rows.max()) + 1
    pairs = np.unique(place * width + rows) // width
    return _Totals(
        keys=found,
        prompts=np.bincount(pairs, minlength=len(found)).astype(float),
        score=np.bincount(place, weights=score.astype(np.float64), minlength=len(found)),
    )


def _answers(path: Path, types: dict[str, int]) -> _Totals:
    columns = _columns(path, ["row", "log_prob"])
    key = _packed(type=_types(path, types))
    return _totals(key, columns["row"], columns["log_prob"])


def _neurons(path: Path, name: str, types: dict[str, int]) -> _Totals:
    columns = _columns(path, ["row", "layer", "head", "index", "score"])
    key = _packed(
        type=_types(path, types),
        role=np.array(int(name == "query_neurons")),
        kind=_codes(path, "kind", {each: number for number, each in enumerate(KINDS)}),
        layer=columns["layer"],
        head=np.nan_to_num(columns["head"].astype(float), nan=-1).astype(np.int64) + 1,
        index=columns["index"],
    )
    return _totals(key, columns["row"], columns["score"])


def _layers(path: Path, types: dict[str, int]) -> _Totals:
    columns = _columns(path, ["row", "layer", "score"])
    key = _packed(
        type=_types(path, types),
        kind=_codes(path, "kind", {each: number for number, each in enumerate(KINDS)}),
        layer=columns["layer"],
    )
    return _totals(key, columns["row"], columns["score"])


def _columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    table = pq.read_table(path, columns=list(names))
    return {name: table.column(name).to_numpy() for name in names}


def _column(path: Path, name: str) -> list[str]:
    return pq.read_table(path, columns=[name]).column(name).to_pylist()


def _types(path: Path, types: dict[str, int]) -> np.ndarray:
    """Numbers of the knowledge types, those met for the first time put down in ``types``."""
    codes = _codes(path, "knowledge_type", types)
    if len(types) >= 2 ** _BITS["type"]:
        raise InputError(
            f"there are more than {2 ** _BITS['type'] - 1:,} knowledge types, too many to sum up "
            "by; give prompts fewer"
        )
    return codes


def _codes(path: Path, name: str, codes: dict[str, int]) -> np.ndarray:
    column = pq.read_table(path, columns=[name]).column(name).unify_dictionaries()
    found = [np.zeros(0, dtype=np.int64)]
    for chunk in column.chunks:
        for each in chunk.dictionary.to_pylist():
            codes.setdefault(each, len(codes))
        ours = np.array([codes[each] for each in chunk.dictionary.to_pylist()], dtype=np.int64)
        found.append(ours[chunk.indices.to_numpy()])
    return np.concatenate(found)


def _packed(**fields: np.ndarray) -> np.ndarray:
    key = np.array(0, dtype=np.int64)
    for name, bits in _BITS.items():
        key = (key << bits) | (fields[name].astype(np.int64) if name in fields else 0)
    return key


def _unpacked(keys: np.ndarray) -> dict[str, np.ndarray]:
    fields = {}
    for name, bits in reversed(_BITS.items()):
        fields[name] = keys & (2**bits - 1)
        keys = keys >> bits
    return fields


def _of_all(totals: _Totals) -> _Totals:
    """The same whatever the type."""
    below = np.int64(2 ** (sum(_BITS.values()) - _BITS["type"]) - 1)
    return _NOTHING + (
        _Totals(keys=totals.keys & below, prompts=totals.prompts, score=totals.score)
    )


def _frame(totals: _Totals, types: Sequence[str], of_type: Mapping[str, int]) -> pd.DataFrame:
    """A row for each type and what it is about, then those of all types."""
    tables = []
    for part, everywhere in ((totals, False), (_of_all(totals), True)):
        fields = _unpacked(part.keys)
        names = [ALL_TYPES if everywhere else types[int(code)] for code in fields["type"].tolist()]
        tables.append(
            pd.DataFrame(
                {
                    "knowledge_type": pd.array(names, dtype="string"),
                    "role": pd.array([ROLES[code] for code in fields["role"].tolist()], "string"),
                    "kind": pd.array([KINDS[code] for code in fields["kind"].tolist()], "string"),
                    "layer": fields["layer"],
                    "head": pd.array(
                        [code - 1 if code else None for code in fields["head"].tolist()], "Int64"
                    ),
                    "index": fields["index"],
                    "prompts": part.prompts.astype(np.int64),
                    "answered": np.array([of_type[name] for name in names], dtype=np.int64),
                    "score": part.score,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _prompt_table(
    answered: _Totals, failed: Mapping[str, int], types: Sequence[str]
) -> pd.DataFrame:
    columns = ["knowledge_type", "prompts", "failed", "mean_log_prob"]
    names = [types[int(code)] for code in _unpacked(answered.keys)["type"].tolist()]
    ok = dict(zip(names, zip(answered.prompts, answered.score, strict=True), strict=True))
    ok[ALL_TYPES] = (answered.prompts.sum(), answered.score.sum())
    lost = {**failed, ALL_TYPES: sum(failed.values())}
    rows = []
    for name in [*sorted({*ok, *lost} - {ALL_TYPES}), ALL_TYPES]:
        count, total = ok.get(name, (0, 0.0))
        mean = float(total / count) if count else float("nan")
        rows.append((name, int(count), lost.get(name, 0), mean))
    return pd.DataFrame(rows, columns=columns).astype({"knowledge_type": "string"})


def _neuron_table(
    neurons: _Totals, types: Sequence[str], of_type: Mapping[str, int]
) -> pd.DataFrame:
    table = _frame(neurons, types, of_type)
    table = table.assign(
        share=table["prompts"] / table["answered"], mean_score=table["score"] / table["prompts"]
    )
    table = table.sort_values(
        ["knowledge_type", "role", "kind", "prompts", "mean_score", "layer", "head", "index"],
        ascending=[True, False, False, False, False, True, True, True],
        kind="stable",
        ignore_index=True,
    )
    return pd.DataFrame(table.drop(columns=["answered", "score"]))


def _layer_table(layers: _Totals, types: Sequence[str], of_type: Mapping[str, int]) -> pd.DataFrame:
    table = _frame(layers, types, of_type)
    table = table.assign(mean_score=table["score"] / table["answered"])
    table = table.sort_values(["knowledge_type", "layer", "kind"], kind="stable", ignore_index=True)
    return pd.DataFrame(table[["knowledge_type", "layer", "kind", "mean_score"]])


def _facts(counts: pd.DataFrame, neurons: pd.DataFrame, settings: RunSettings) -> dict[str, Any]:
    often = Counter(
        (row["knowledge_type"], row["role"], row["kind"])
        for row in records(neurons.loc[neurons["share"] > SHARED])
    )
    shared = [
        {
            "knowledge_type": knowledge_type,
            "role": role,
            "kind": kind,
            "neurons": number,
            "of_top": number / settings.top,
        }
        for (knowledge_type, role, kind), number in sorted(often.items())
    ]
    return {"prompts": records(counts), "shared_by_more_than": SHARED, "shared": shared}
