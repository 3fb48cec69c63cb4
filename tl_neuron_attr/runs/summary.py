"""What a run's prompts have in common: neurons by frequency, layer totals, shared neurons.

Read a shard at a time, added up in the order of the shards in float64: the same shards give the
same bytes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.tables import records

ALL_TYPES = "all"
"""The knowledge type of rows over all prompts."""

NEURON_KEY = ("role", "kind", "layer", "head", "index")
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

    Cost: reads each once. Memory: one shard, and a row for each neuron that is listed at all.
    """
    answered = _added_up(
        (_by(_read(each["answers"], ["log_prob"]), [], log_prob="sum", prompts="count"))
        for each in shards
    )
    failed = _added_up(
        _by(_read(each["errors"], []), [], prompts="count")
        for each in shards
        if each["errors"].exists()
    )
    neurons = _added_up(
        _neurons(each[name]) for each in shards for name in settings.what if "neurons" in name
    )
    layers = _added_up(
        _by(_read(each["layers"], ["layer", "kind", "score"]), ["layer", "kind"], score="sum")
        for each in shards
        if "layers" in settings.what
    )
    counts = _prompt_table(answered, failed)
    of_type = dict(zip(counts["knowledge_type"], counts["prompts"], strict=True))
    listed = _neuron_table(neurons, of_type)
    return Summary(
        prompts=counts,
        neurons=listed,
        layers=_layer_table(layers, of_type),
        facts=_facts(counts, listed, settings),
    )


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a shard's table, of each prompt twice: as of its type, and of all."""
    table = pq.read_table(path, columns=["row", "knowledge_type", *columns])
    for number, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(number, column.name, table.column(number).cast(pa.string()))
    frame = table.replace_schema_metadata(None).to_pandas()
    return pd.concat([frame, frame.assign(knowledge_type=ALL_TYPES)], ignore_index=True)


def _by(table: pd.DataFrame, keys: Sequence[str], **made: str) -> pd.DataFrame:
    """Sums and counts by knowledge type and ``keys``; what is counted are rows."""
    columns = {name: (name if how == "sum" else "row", how) for name, how in made.items()}
    for name, how in made.items():
        if how == "sum":
            table = table.astype({name: "float64"})
    grouped = table.groupby(["knowledge_type", *keys], sort=True, dropna=False)
    return pd.DataFrame(grouped.agg(**columns).reset_index())


def _neurons(path: Path) -> pd.DataFrame:
    """Each neuron: in how many prompts it is listed, and the sum of its scores."""
    table = _read(path, [*NEURON_KEY, "score"])
    table["head"] = table["head"].fillna(-1).astype("int64")
    scored = _by(table, NEURON_KEY, score="sum")
    once = table.drop_duplicates(["knowledge_type", "row", *NEURON_KEY])
    counted = _by(once, NEURON_KEY, prompts="count")
    return scored.merge(counted, on=["knowledge_type", *NEURON_KEY], validate="one_to_one")


def _added_up(tables: Iterator[pd.DataFrame]) -> pd.DataFrame:
    """Partial sums of several shards as one: never more than two of them at a time."""
    total: pd.DataFrame | None = None
    for table in tables:
        if total is not None:
            keys = [name for name in table.columns if name not in ("score", "prompts", "log_prob")]
            both = pd.concat([total, table], ignore_index=True)
            grouped = both.groupby(keys, sort=True, dropna=False, as_index=False)
            table = pd.DataFrame(grouped.sum())
        total = table
    return pd.DataFrame() if total is None else total


def _prompt_table(answered: pd.DataFrame, failed: pd.DataFrame) -> pd.DataFrame:
    columns = ["knowledge_type", "prompts", "failed", "mean_log_prob"]
    ok = {row["knowledge_type"]: row for row in records(answered)}
    lost = {row["knowledge_type"]: row["prompts"] for row in records(failed)}
    rows = []
    for name in [*sorted({*ok, *lost} - {ALL_TYPES}), ALL_TYPES]:
        count = ok[name]["prompts"] if name in ok else 0
        mean = ok[name]["log_prob"] / count if count else float("nan")
        rows.append((name, count, lost.get(name, 0), mean))
    return pd.DataFrame(rows, columns=columns).astype({"knowledge_type": "string"})


def _neuron_table(neurons: pd.DataFrame, of_type: Mapping[str, int]) -> pd.DataFrame:
    columns = ["knowledge_type", *NEURON_KEY, "prompts", "share", "mean_score"]
    if neurons.empty:
        return pd.DataFrame({name: [] for name in columns})
    table = neurons.assign(
        share=neurons["prompts"] / [of_type[name] for name in neurons["knowledge_type"]],
        mean_score=neurons["score"] / neurons["prompts"],
    )
    table = table.sort_values(
        ["knowledge_type", "role", "kind", "prompts", "mean_score", "layer", "head", "index"],
        ascending=[True, False, False, False, False, True, True, True],
        kind="stable",
        ignore_index=True,
    )
    table["head"] = table["head"].where(table["head"] >= 0).astype("Int64")
    texts = {name: "string" for name in ("knowledge_type", "role", "kind")}
    return pd.DataFrame(table[columns]).astype(texts)


def _layer_table(layers: pd.DataFrame, of_type: Mapping[str, int]) -> pd.DataFrame:
    columns = ["knowledge_type", "layer", "kind", "mean_score"]
    if layers.empty:
        return pd.DataFrame({name: [] for name in columns})
    table = layers.assign(
        mean_score=layers["score"] / [of_type[name] for name in layers["knowledge_type"]]
    )
    return pd.DataFrame(table[columns]).astype({"knowledge_type": "string", "kind": "string"})


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
