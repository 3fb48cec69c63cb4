"""What prompts have in common: tables of many prompts -> tables of types and of pairs.

The tables are those of one prompt each, put together, with a column ``knowledge_type`` or
``prompt_id`` to tell them apart.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.prompts import at_least_one
from tl_neuron_attr.tables import NEURON_COLUMNS

BEST_LAYERS = 10
"""How many layers of a type are marked as its best, as published."""

OVERLAP_COLUMNS = ("by", "kind", "first", "second", "pairs", "shared", "jaccard")


def layers_by_type(layers: pd.DataFrame, by: Iterable[str] = ()) -> pd.DataFrame:
    """Mean score of each layer by knowledge type, its place among all, and whether it is a top ten.

    Of ``layers`` tables (or ``query_layers``) of many prompts with a column ``knowledge_type``:
    ``knowledge_type, layer, kind, score, rank, best``, the score in nats. Biases, which are no
    layer, have no place. ``by`` names columns that tell further tables apart.

    Source: Yu & Ananiadou (2024), the top ten value layers of six knowledge types.

    Raises:
        InputError: If a column is missing.
    """
    keys = ["knowledge_type", *by]
    _need(layers, "layers", [*keys, "layer", "kind", "score"])
    table = pd.DataFrame(
        layers.groupby([*keys, "layer", "kind"], sort=False, dropna=False, as_index=False).agg(
            {"score": "mean"}
        )
    )
    ranked = table["score"].where(table["kind"] != "bias")
    table["rank"] = ranked.groupby([table[key] for key in keys], sort=False).rank(
        ascending=False, method="first"
    )
    table["rank"] = table["rank"].astype("Int64")
    table["best"] = (table["rank"] <= BEST_LAYERS).fillna(False).astype(bool)
    return table


def overlap_table(
    neurons: pd.DataFrame,
    top: int | None = None,
    *,
    by: Literal["prompt_id", "knowledge_type"] = "prompt_id",
) -> pd.DataFrame:
    """How many of their best neurons prompts share: one row a kind and pair of prompts or types.

    ``by, kind, first, second, pairs, shared, jaccard``: ``shared`` counts the neurons that both
    have among their best, ``jaccard`` divides it by the number that either has (0 to 1). Of two
    knowledge types both are means over all pairs of a prompt of the one and a prompt of the other,
    of one type with itself over all pairs of different prompts (``pairs`` of them; without any, a
    type of one prompt, NaN). A matrix whose diagonal stands out has neurons of each type's own.

    An attention neuron is a head and dimension, whatever its source position: positions of
    different prompts are not the same place. Prompts stand in the order in which types, then they
    themselves, come.

    Args:
        neurons: ``neurons`` tables of one role of many prompts, put together; ``by`` type with a
            column ``knowledge_type``.
        top: How many of each kind and prompt, by rank; by default all in the table.
        by: What is compared.

    Raises:
        InputError: If a column is missing, or the roles are mixed, or there are no neurons.

    Cost: two square matrices of the number of prompts, and one of prompts x different neurons.
    """
    if by not in ("prompt_id", "knowledge_type"):
        raise InputError(f"by must be 'prompt_id' or 'knowledge_type', got {by!r}")
    typed = "knowledge_type" in neurons.columns
    _need(neurons, "neurons", [*NEURON_COLUMNS, *(["knowledge_type"] if by != "prompt_id" else [])])
    roles = sorted(set(neurons["role"].tolist()))
    if len(roles) != 1:
        raise InputError(
            f"overlap is of the neurons of one role, got {', '.join(roles) or 'no neurons'}; "
            "choose them first, for example neurons[neurons['role'] == 'value']"
        )
    if top is not None:
        neurons = neurons.loc[neurons["rank"] <= at_least_one(top, "top")]
    type_of = dict(
        zip(neurons["prompt_id"], neurons["knowledge_type" if typed else "prompt_id"], strict=True)
    )
    places = {name: place for place, name in enumerate(dict.fromkeys(type_of.values()))}
    prompts = sorted(type_of, key=lambda prompt_id: places[type_of[prompt_id]])
    names = prompts if by == "prompt_id" else [*places]
    groups = (
        np.arange(len(prompts))
        if by == "prompt_id"
        else np.array([places[type_of[prompt_id]] for prompt_id in prompts])
    )
    tables = []
    for kind in dict.fromkeys(neurons["kind"].tolist()):
        has = _incidence(neurons.loc[neurons["kind"] == kind], prompts)
        tables.append(_pairs(has, groups, names, by, kind))
    return pd.concat(tables, ignore_index=True)


def _incidence(
    neurons: pd.DataFrame, prompts: Sequence[Hashable]
) -> Float[np.ndarray, "prompt neuron"]:
    """1 where a prompt has a neuron, for all neurons that any has."""
    labels = pd.MultiIndex.from_arrays(
        [neurons[name].fillna(-1) for name in ("layer", "head", "index")]
    )
    column, different = labels.factorize()
    has = np.zeros((len(prompts), len(different)), dtype=np.float32)
    has[pd.Index(prompts).get_indexer(pd.Index(neurons["prompt_id"])), column] = 1
    return has


def _pairs(
    has: Float[np.ndarray, "prompt neuron"],
    groups: Int[np.ndarray, " prompt"],
    names: Sequence[Hashable],
    by: str,
    kind: str,
) -> pd.DataFrame:
    """Means over the pairs of each two groups of prompts."""
    shared = (has @ has.T).astype(float)
    sizes = has.sum(1)
    either = sizes[:, None] + sizes[None, :] - shared
    # two prompts without a neuron of the kind have nothing in common
    jaccard = np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)
    member = groups[None, :] == np.arange(len(names))[:, None]
    counted = np.ones_like(shared, dtype=bool)
    if by == "knowledge_type":
        np.fill_diagonal(counted, False)  # a prompt beside itself says nothing of its type
    pairs = _over_pairs(np.ones_like(shared), member, counted)
    with np.errstate(invalid="ignore"):
        means = {
            "shared": _over_pairs(shared, member, counted) / pairs,
            "jaccard": _over_pairs(jaccard, member, counted) / pairs,
        }
    n = len(names)
    # within a type each pair was counted from both sides
    once = pairs / (1 + np.eye(n)) if by == "knowledge_type" else pairs
    return pd.DataFrame(
        {
            "by": pd.array([by] * n * n, dtype="string"),
            "kind": pd.array([kind] * n * n, dtype="string"),
            "first": pd.array([str(name) for name in names for _ in range(n)], dtype="string"),
            "second": pd.array([str(name) for name in names] * n, dtype="string"),
            "pairs": once.ravel().astype("int64"),
            **{name: values.ravel() for name, values in means.items()},
        },
        columns=list(OVERLAP_COLUMNS),
    )


def _over_pairs(
    values: Float[np.ndarray, "prompt prompt"],
    member: Bool[np.ndarray, "group prompt"],
    counted: Bool[np.ndarray, "prompt prompt"],
) -> Float[np.ndarray, "group group"]:
    return member.astype(float) @ (values * counted) @ member.T.astype(float)


def _need(table: pd.DataFrame, name: str, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(
            f"this takes {name} tables of many prompts with the columns {', '.join(columns)}; "
            f"this one lacks {', '.join(missing)}"
        )
