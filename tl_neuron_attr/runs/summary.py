"""What a run's prompts have in common: neurons by frequency, layer totals, shared neurons; what
methods agree on, and what zeroing does.

Read a shard at a time, added up in the order of the shards in float64: the same shards give the
same bytes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.runs.summed import Effects, MethodTotals, effect_table, overlap_table
from tl_neuron_attr.runs.totals import (
    ALL_TYPES,
    KINDS,
    NEURON_FIELDS,
    Totals,
    added_up,
    codes,
    neuron_keys,
    numbers,
    of_all_types,
    packed,
    read,
    totals,
    type_codes,
    unpacked,
)
from tl_neuron_attr.tables import records

ROLES = ("value", "query")
_KINDS = tuple(KINDS)

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
    listed for (an attention neuron's over its source positions summed). Most frequent first. Of a
    mixture of experts also ``expert``."""
    layers: pd.DataFrame
    """``knowledge_type, layer, kind, mean_score``; empty if the run has no layers."""
    facts: Mapping[str, Any] = field(repr=False)
    """For JSON: numbers of prompts, and of shared neurons of each type, role and kind."""
    methods: pd.DataFrame | None = None
    """As ``neurons``, with ``method`` for ``role``, and scores in the method's own unit; ``None``,
    as those below, if the run has not computed it."""
    overlap: pd.DataFrame | None = None
    """``knowledge_type, method, other, kind, prompts, overlap``: of the neurons that either method
    lists for a prompt, the share that both list, the mean over prompts."""
    interventions: pd.DataFrame | None = None
    """``knowledge_type, role, set, kind, count, prompts, zeroed, log_prob_before, log_prob, change,
    prob_before, prob, mrr_before, mrr``: means over prompts of what zeroing does to the answer:
    nats, probability (empty if contrasts are among them), and one over its rank."""

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """By the name of their files."""
        found = {
            "summary": self.neurons,
            "summary_prompts": self.prompts,
            "summary_layers": self.layers,
            "summary_methods": self.methods,
            "summary_overlap": self.overlap,
            "summary_interventions": self.interventions,
        }
        return {name: table for name, table in found.items() if table is not None}

    @property
    def shared(self) -> pd.DataFrame:
        """Neurons listed for more than half of the prompts of their type."""
        return self.neurons.loc[self.neurons["share"] > SHARED].reset_index(drop=True)


def summary_of(
    settings: RunSettings, shards: Sequence[Mapping[str, Path]], contrasts: np.ndarray
) -> Summary:
    """The summary of these shards, given by the paths of their tables.

    ``contrasts`` are the rows of the prompts that ask for one.

    Cost: reads each once. Memory: one shard, and a few numbers for each neuron that is listed.

    Raises:
        InputError: If there are thousands of knowledge types.
    """
    types: dict[str, int] = {}
    answered = added_up(_answers(each["answers"], types, contrasts) for each in shards)
    failed: Counter[str] = Counter()
    for each in shards:
        if "errors" in each:
            errors = read(each["errors"], ["knowledge_type"])
            failed.update(errors.column("knowledge_type").to_pylist())
    listed = [name for name in ("neurons", "query_neurons") if name in settings.what]
    neurons = added_up(_neurons(each[name], name, types) for each in shards for name in listed)
    layers = added_up(
        _layers(each["layers"], types) for each in shards if "layers" in settings.what
    )
    methods = MethodTotals(methods=settings.methods)
    effects = Effects(contrasts=contrasts)
    for each in shards:
        if "methods" in settings.what:
            methods.add(each["methods"], types)
        if "interventions" in settings.what:
            effects.add(each["interventions"])
    counts = _prompt_table(answered, failed, list(types))
    of_type = dict(zip(counts["knowledge_type"], counts["prompts"], strict=True))
    table = _neuron_table(neurons, list(types), of_type)
    return Summary(
        prompts=counts,
        neurons=table,
        layers=_layer_table(layers, list(types), of_type),
        facts=_facts(counts, table, settings),
        **_measured(methods, effects, list(types), of_type, settings),
    )


def _measured(
    methods: MethodTotals,
    effects: Effects,
    types: Sequence[str],
    of_type: Mapping[str, int],
    settings: RunSettings,
) -> dict[str, pd.DataFrame]:
    """The tables of what a run was asked to measure besides."""
    tables = {}
    if "methods" in settings.what:
        listed = []
        for name, each in methods.neurons.items():
            table = _neuron_table(each, types, of_type).drop(columns="role")
            table.insert(1, "method", pd.array([name] * len(table), dtype="string"))
            listed.append(table)
        tables["methods"] = pd.concat(listed, ignore_index=True)
        tables["overlap"] = overlap_table(methods, types, ALL_TYPES)
    if "interventions" in settings.what:
        tables["interventions"] = effect_table(effects, ALL_TYPES)
    return tables


def _answers(path: Path, types: dict[str, int], contrasts: np.ndarray) -> Totals:
    """Contrasts apart, in place of a role: theirs is no log-probability but a difference of two."""
    table = read(path, ["row", "knowledge_type", "log_prob"])
    rows = numbers(table, "row")
    key = packed(type=type_codes(table, types), role=np.isin(rows, contrasts))
    return totals(key, rows, numbers(table, "log_prob"))


def _neurons(path: Path, name: str, types: dict[str, int]) -> Totals:
    table = read(path, NEURON_FIELDS)
    key = neuron_keys(table, types, int(name == "query_neurons"))
    return totals(key, numbers(table, "row"), numbers(table, "score"))


def _layers(path: Path, types: dict[str, int]) -> Totals:
    table = read(path, ["row", "knowledge_type", "kind", "layer", "score"])
    key = packed(
        type=type_codes(table, types),
        kind=codes(table, "kind", dict(KINDS)),
        layer=numbers(table, "layer"),
    )
    return totals(key, numbers(table, "row"), numbers(table, "score"))


def _frame(totals: Totals, types: Sequence[str], of_type: Mapping[str, int]) -> pd.DataFrame:
    """A row for each type and what it is about, then those of all types."""
    tables = []
    for part, everywhere in ((totals, False), (of_all_types(totals), True)):
        fields = unpacked(part.keys)
        names = [ALL_TYPES if everywhere else types[int(code)] for code in fields["type"].tolist()]
        tables.append(
            pd.DataFrame(
                {
                    "knowledge_type": pd.array(names, dtype="string"),
                    "role": pd.array([ROLES[code] for code in fields["role"].tolist()], "string"),
                    "kind": pd.array([_KINDS[code] for code in fields["kind"].tolist()], "string"),
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
    answered: Totals, failed: Mapping[str, int], types: Sequence[str]
) -> pd.DataFrame:
    columns = ["knowledge_type", "prompts", "failed", "mean_log_prob"]
    ok: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    log_prob: dict[str, float] = {}
    fields = unpacked(answered.keys)
    for code, contrast, count, total in zip(
        fields["type"].tolist(),
        fields["role"].tolist(),
        answered.prompts.astype(int).tolist(),
        answered.score.tolist(),
        strict=True,
    ):
        for name in (types[int(code)], ALL_TYPES):
            ok[name] += count
            if not contrast:
                plain[name] += count
                log_prob[name] = log_prob.get(name, 0.0) + total
    lost = {**failed, ALL_TYPES: sum(failed.values())}
    rows = []
    for name in [*sorted({*ok, *lost} - {ALL_TYPES}), ALL_TYPES]:
        mean = log_prob[name] / plain[name] if plain[name] else float("nan")
        rows.append((name, ok[name], lost.get(name, 0), mean))
    return pd.DataFrame(rows, columns=columns).astype({"knowledge_type": "string"})


def _neuron_table(
    neurons: Totals, types: Sequence[str], of_type: Mapping[str, int]
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


def _layer_table(layers: Totals, types: Sequence[str], of_type: Mapping[str, int]) -> pd.DataFrame:
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
