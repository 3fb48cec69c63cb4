"""What was found about prompts -> Arrow tables, without a DataFrame on the way: it takes time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tl_neuron_attr.attribution import TOP_VALUES, Attribution
from tl_neuron_attr.query import top_query_neurons
from tl_neuron_attr.runs.schema import SCHEMAS, with_metadata
from tl_neuron_attr.runs.settings import RunSettings
from tl_neuron_attr.topk import Kind, RankedNeurons

Columns = Mapping[str, np.ndarray]

_KINDS: tuple[Kind, Kind] = ("ffn", "attn")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is kept of one prompt: plain numbers, no tensor, no model."""

    answer: Mapping[str, Any]
    tables: Mapping[str, Columns] = field(repr=False)


def found_of(result: Attribution, settings: RunSettings) -> Found:
    """What ``settings`` asks of one result.

    Cost: with query neurons, a forward pass.
    """
    makers = {
        "neurons": lambda: _neurons([result.ffn_neurons, result.attn_neurons]),
        "query_neurons": lambda: _query_neurons(result, settings.top),
        "layers": lambda: _layers(result),
        "heads": lambda: _heads(result),
    }
    certificates = (result.ffn_neurons.certificate, result.attn_neurons.certificate)
    prompt = result.captured.prompt
    answer = {
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
    return Found(answer=answer, tables={name: makers[name]() for name in settings.what})


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
        tables[name] = _table(name, prompts, places, pieces)
    if errors:
        tables["errors"] = _error_table(prompts, errors)
    return {name: with_metadata(table, name, identity) for name, table in tables.items()}


def _neurons(lists: Sequence[RankedNeurons]) -> Columns:
    """FFN neurons and attention neurons, each ranked for itself; -1 where a place is empty."""
    return {
        "kind": np.repeat(
            [_KINDS.index(each.kind) for each in lists], [len(each) for each in lists]
        ),
        "rank": np.concatenate([np.arange(1, len(each) + 1) for each in lists]),
        **{
            name: np.concatenate([_numbers(getattr(each, name), len(each)) for each in lists])
            for name in ("layer", "head", "index", "source_pos", "coefficient", "score")
        },
    }


def _query_neurons(result: Attribution, top: int) -> Columns:
    """FFN neurons that feed the best attention neurons; none where every one is left out."""
    scores = result.query_scores("attn", top_values=TOP_VALUES)
    with torch.no_grad():
        best = top_query_neurons(result.host, result.captured, scores, top, "ffn").neurons
    return _neurons([best.first(0) if bool(scores.left_out.all()) else best])


def _layers(result: Attribution) -> Columns:
    attn, ffn = result.layer_scores.attn, result.layer_scores.ffn
    return {
        "layer": np.repeat(np.arange(len(attn)), 2),
        "kind": np.tile([_KINDS.index("attn"), _KINDS.index("ffn")], len(attn)),
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


def _table(
    name: str,
    prompts: Sequence[Mapping[str, Any]],
    places: Sequence[int],
    pieces: Sequence[Columns],
) -> pa.Table:
    schema = SCHEMAS[name]
    counts = [len(piece["score"]) for piece in pieces]
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
        elif column.name == "role":
            role = "query" if name == "query_neurons" else "value"
            array = _named([role], np.zeros(len(repeated)))
        elif column.name == "kind":
            array = _named(_KINDS, whole.get("kind", np.zeros(0)))
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
        return pa.array(values.astype(np.float32))
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
