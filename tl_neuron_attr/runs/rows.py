"""What was found about prompts -> Arrow tables, without a DataFrame on the way: it takes time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tl_neuron_attr.attribution import TOP_VALUES, Attribution
from tl_neuron_attr.query import QueryScores, top_query_neurons
from tl_neuron_attr.runs.measured import (
    KINDS,
    QUERY,
    ROLES,
    SETS,
    VALUE,
    ZEROED_KINDS,
    Columns,
    intervention_columns,
    method_columns,
)
from tl_neuron_attr.runs.schema import SCHEMAS, with_metadata
from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.topk import RankedNeurons


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is kept of one prompt: plain numbers, no tensor, no model."""

    answer: Mapping[str, Any]
    tables: Mapping[str, Columns] = field(repr=False)


def found_of_batch(results: Sequence[Attribution], settings: RunSettings) -> list[Found]:
    """What ``settings`` asks of the results of one batch.

    Raises:
        InputError: If a method cannot be used on a prompt.

    Cost: with query neurons a forward pass for each; with methods and interventions as
    ``measured.py`` says.
    """
    wanted = "query_neurons" in settings.what
    queries = [_query_scores(result) if wanted else None for result in results]
    zeroed: Sequence[Columns | None] = [None] * len(results)
    if "interventions" in settings.what:
        zeroed = intervention_columns(results, queries, settings)
    return [
        Found(answer=_answer(result), tables=_tables(result, scores, columns, settings))
        for result, scores, columns in zip(results, queries, zeroed, strict=True)
    ]


def _tables(
    result: Attribution,
    queries: QueryScores | None,
    zeroed: Columns | None,
    settings: RunSettings,
) -> dict[str, Columns]:
    makers = {
        "neurons": lambda: _neurons([result.ffn_neurons, result.attn_neurons]),
        "query_neurons": lambda: _query_neurons(result, queries, settings.top),
        "layers": lambda: _layers(result),
        "heads": lambda: _heads(result),
        "methods": lambda: method_columns(result, settings),
        "interventions": lambda: zeroed,
    }
    return {name: makers[name]() for name in settings.what}


def _answer(result: Attribution) -> dict[str, Any]:
    certificates = (result.ffn_neurons.certificate, result.attn_neurons.certificate)
    prompt = result.captured.prompt
    return {
        "n_tokens": len(prompt.tokens),
        "read_pos": prompt.read_pos,
        "target": result.target.id,
        "target_text": result.target.text,
        "log_prob": result.log_prob,
        "embedding_log_prob": result.embedding_log_prob,
        "ffn_scored": certificates[0].evaluated,
        "attn_scored": certificates[1].evaluated,
        "proven": all(each.holds for each in certificates),
    }


def tables_of(
    prompts: Sequence[Mapping[str, Any]],
    found: Mapping[int, Found],
    errors: Mapping[int, tuple[str, str]],
    settings: RunSettings,
    identity: Mapping[str, Any],
) -> dict[str, pa.Table]:
    """The tables of one shard, in the order of its prompts.

    ``found`` and ``errors`` (stage, reason) are by place in ``prompts``; without an error there is
    no table of them.
    """
    places = sorted(found)
    tables = {"answers": _answer_table(prompts, found, places)}
    for name in settings.what:
        pieces = [found[place].tables[name] for place in places]
        tables[name] = _table(name, prompts, places, pieces, _names_in(name, settings))
    if errors:
        tables["errors"] = _error_table(prompts, errors)
    return {name: with_metadata(table, name, identity) for name, table in tables.items()}


def _neurons(lists: Sequence[RankedNeurons]) -> Columns:
    """FFN neurons and attention neurons, each ranked for itself; -1 where a place is empty."""
    return {
        "kind": np.repeat(
            [KINDS.index(each.kind) for each in lists], [len(each) for each in lists]
        ),
        "rank": np.concatenate([np.arange(1, len(each) + 1) for each in lists]),
        **{
            name: np.concatenate([_numbers(getattr(each, name), len(each)) for each in lists])
            for name in ("layer", "head", "index", "source_pos", "coefficient", "score")
        },
    }


def _query_scores(result: Attribution) -> QueryScores:
    return result.query_scores("attn", top_values=TOP_VALUES)


def _query_neurons(result: Attribution, scores: QueryScores | None, top: int) -> Columns:
    """FFN neurons that feed the best attention neurons; none where every one is left out."""
    assert scores is not None
    with torch.no_grad():
        best = top_query_neurons(result.host, result.captured, scores, top, "ffn").neurons
    return _neurons([best.first(0) if bool(scores.left_out.all()) else best])


def _layers(result: Attribution) -> Columns:
    attn, ffn = result.layer_scores.attn, result.layer_scores.ffn
    return {
        "layer": np.repeat(np.arange(len(attn)), 2),
        "kind": np.tile([KINDS.index("attn"), KINDS.index("ffn")], len(attn)),
        "score": _numbers(torch.stack([attn, ffn], 1).flatten(), 2 * len(attn)),
    }


def _heads(result: Attribution) -> Columns:
    n_layers, n_heads = result.head_scores.shape
    return {
        "layer": np.repeat(np.arange(n_layers), n_heads),
        "head": np.tile(np.arange(n_heads), n_layers),
        "score": _numbers(result.head_scores.flatten(), n_layers * n_heads),
    }


def _numbers(values: Tensor | None, length: int) -> np.ndarray:
    return np.full(length, -1) if values is None else values.detach().cpu().numpy()


# --- as Arrow ---------------------------------------------------------------------------------


def _names_in(table: str, settings: RunSettings) -> dict[str, tuple[str, ...]]:
    """What the numbers stand for in columns of names."""
    if table == "interventions":
        return {"role": ROLES, "set": SETS, "kind": ZEROED_KINDS}
    role = QUERY if table == "query_neurons" else VALUE
    return {"role": (role,), "kind": KINDS, "method": settings.methods}


def _table(
    name: str,
    prompts: Sequence[Mapping[str, Any]],
    places: Sequence[int],
    pieces: Sequence[Columns],
    names: Mapping[str, Sequence[str]],
) -> pa.Table:
    schema = SCHEMAS[name]
    counts = [len(next(iter(piece.values()))) for piece in pieces]
    repeated = np.repeat(np.arange(len(places)), counts)
    whole = {
        column: np.concatenate([piece[column] for piece in pieces])
        for column in (pieces[0] if pieces else ())
    }
    named = dict(_of_prompts(prompts, places, repeated))
    arrays = []
    for column in schema:
        if column.name in named:
            array = named[column.name]
        elif column.name in names:
            # one role, which goes without saying, in tables of neurons
            numbers = whole.get(column.name, np.zeros(len(repeated)))
            array = _named(names[column.name], numbers)
        else:
            array = _array(whole.get(column.name, np.zeros(0)), column)
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=schema)


def _of_prompts(
    prompts: Sequence[Mapping[str, Any]], places: Sequence[int], repeated: np.ndarray
) -> Iterator[tuple[str, pa.Array]]:
    """The columns that say which prompt a row is of."""
    of_place = [prompts[place] for place in places]
    rows = np.array([each["row"] for each in of_place], dtype=np.int32)
    yield "row", pa.array(rows[repeated] if len(rows) else rows)
    yield "prompt_id", _named([each["prompt_id"] for each in of_place], repeated)
    types = list(dict.fromkeys(each["knowledge_type"] for each in of_place))
    number = np.array([types.index(each["knowledge_type"]) for each in of_place], dtype=np.int32)
    yield "knowledge_type", _named(types, number[repeated] if len(number) else repeated)


def _named(names: Sequence[str], numbers: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(
        pa.array(numbers.astype(np.int32)), pa.array(list(names), pa.string())
    )


def _array(values: np.ndarray, column: pa.Field) -> pa.Array:
    if pa.types.is_floating(column.type):
        return pa.array(values.astype(column.type.to_pandas_dtype()))
    empty = values < 0 if column.name in ("head", "source_pos") else None
    return pa.array(values.astype(column.type.to_pandas_dtype()), mask=empty)


def _answer_table(
    prompts: Sequence[Mapping[str, Any]], found: Mapping[int, Found], places: Sequence[int]
) -> pa.Table:
    schema = SCHEMAS["answers"]
    named = dict(_of_prompts(prompts, places, np.arange(len(places))))
    arrays = [
        named[column.name]
        if column.name in named
        else pa.array([found[place].answer[column.name] for place in places], column.type)
        for column in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _error_table(
    prompts: Sequence[Mapping[str, Any]], errors: Mapping[int, tuple[str, str]]
) -> pa.Table:
    names = ("row", "prompt_id", "knowledge_type", "text")
    rows = [
        {name: prompts[place][name] for name in names}
        | {"stage": errors[place][0], "reason": errors[place][1]}
        for place in sorted(errors)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMAS["errors"])
