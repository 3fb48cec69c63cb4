"""What was found about prompts -> Arrow tables, without a DataFrame on the way: it takes time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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

Lists = tuple[Columns, np.ndarray]
"""Rows of several prompts, and how many are of each: a prompt's after those of the one before."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is kept of one prompt: plain numbers, no tensor, no model."""

    answer: Mapping[str, Any]
    tables: Mapping[str, Lists] = field(repr=False)
    """Of its whole batch, which shares them."""
    number: int
    """Its place in the batch."""


def found_of_batch(results: Sequence[Attribution], settings: RunSettings) -> list[Found]:
    """What ``settings`` asks of the results of one batch.

    Raises:
        InputError: If a method cannot be used on a prompt.

    Cost: with query neurons a forward pass for each; with methods and interventions as
    ``measured.py`` says.
    """
    wanted = "query_neurons" in settings.what
    queries = [_query_scores(result) if wanted else None for result in results]
    makers: Mapping[str, Callable[[], Lists]] = {
        "neurons": lambda: _neurons([[each.ffn_neurons, each.attn_neurons] for each in results]),
        "query_neurons": lambda: _neurons(
            [
                [_best_query(result, scores, settings.top)]
                for result, scores in zip(results, queries, strict=True)
                if scores is not None
            ]
        ),
        "layers": lambda: _layers(results),
        "heads": lambda: _heads(results),
        "methods": lambda: _stacked([method_columns(result, settings) for result in results]),
        "interventions": lambda: _stacked(intervention_columns(results, queries, settings)),
    }
    tables = {name: makers[name]() for name in settings.what}
    return [
        Found(answer=_answer(result), tables=tables, number=number)
        for number, result in enumerate(results)
    ]


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
        lists = _in_order(found, places, name)
        tables[name] = _table(name, prompts, places, lists, _names_in(name, settings))
    if errors:
        tables["errors"] = _error_table(prompts, errors)
    return {name: with_metadata(table, name, identity) for name, table in tables.items()}


def _neurons(lists: Sequence[Sequence[RankedNeurons]]) -> Lists:
    """Of each prompt its lists, each ranked for itself; -1 where a place is empty.

    All at once: what is done for each prompt by itself soon takes as long as attributing it.
    """
    each = [ranked for of_prompt in lists for ranked in of_prompt]
    lengths = np.array([len(ranked) for ranked in each], dtype=np.int64)
    starts = np.repeat(lengths.cumsum() - lengths, lengths)
    columns = {
        "kind": np.repeat([KINDS.index(ranked.kind) for ranked in each], lengths),
        "rank": np.arange(1, int(lengths.sum()) + 1) - starts,
        **{
            name: _joined([_filled(getattr(ranked, name), ranked) for ranked in each])
            for name in ("layer", "head", "index", "source_pos", "coefficient", "score")
        },
    }
    return columns, np.array([sum(map(len, of_prompt)) for of_prompt in lists])


def _filled(values: Tensor | None, ranked: RankedNeurons) -> Tensor:
    return ranked.layer.new_full(ranked.layer.shape, -1) if values is None else values


def _joined(values: Sequence[Tensor]) -> np.ndarray:
    device = values[0].device
    with torch.no_grad():  # and no call for each of the hundreds that are where they should be
        here = [each if each.device == device else each.to(device) for each in values]
        return torch.cat(here).detach().cpu().numpy()


def _query_scores(result: Attribution) -> QueryScores:
    return result.query_scores("attn", top_values=TOP_VALUES)


def _best_query(result: Attribution, scores: QueryScores, top: int) -> RankedNeurons:
    """FFN neurons that feed the best attention neurons; none where every one is left out."""
    with torch.no_grad():
        best = top_query_neurons(result.host, result.captured, scores, top, "ffn").neurons
    return best.first(0) if bool(scores.left_out.all()) else best


def _layers(results: Sequence[Attribution]) -> Lists:
    n_layers = results[0].host.n_layers
    both = [t for each in results for t in (each.layer_scores.attn, each.layer_scores.ffn)]
    score = _joined(both).reshape(len(results), 2, n_layers).transpose(0, 2, 1)
    columns = {
        "layer": np.tile(np.repeat(np.arange(n_layers), 2), len(results)),
        "kind": np.tile([KINDS.index("attn"), KINDS.index("ffn")], n_layers * len(results)),
        "score": score.flatten(),
    }
    return columns, np.full(len(results), 2 * n_layers)


def _heads(results: Sequence[Attribution]) -> Lists:
    n_layers, n_heads = results[0].head_scores.shape
    columns = {
        "layer": np.tile(np.repeat(np.arange(n_layers), n_heads), len(results)),
        "head": np.tile(np.arange(n_heads), n_layers * len(results)),
        "score": _joined([each.head_scores.flatten() for each in results]),
    }
    return columns, np.full(len(results), n_layers * n_heads)


def _stacked(pieces: Sequence[Columns]) -> Lists:
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    return columns, np.array([len(next(iter(piece.values()))) for piece in pieces])


# --- as Arrow ---------------------------------------------------------------------------------


def _names_in(table: str, settings: RunSettings) -> dict[str, tuple[str, ...]]:
    """What the numbers stand for in columns of names."""
    if table == "interventions":
        return {"role": ROLES, "set": SETS, "kind": ZEROED_KINDS}
    role = QUERY if table == "query_neurons" else VALUE
    return {"role": (role,), "kind": KINDS, "method": settings.methods}


def _in_order(found: Mapping[int, Found], places: Sequence[int], name: str) -> Lists:
    """A table of all batches, prompts in the order of their places."""
    batches = {id(found[place].tables): found[place].tables[name] for place in places}
    firsts, length = {}, 0
    for batch, (_, counts) in batches.items():
        firsts[batch] = length + np.cumsum(counts) - counts
        length += int(counts.sum())
    first, counts = np.zeros(len(places), dtype=np.int64), np.zeros(len(places), dtype=np.int64)
    for number, place in enumerate(places):
        of_batch, batch = found[place].number, id(found[place].tables)
        first[number] = firsts[batch][of_batch]
        counts[number] = batches[batch][1][of_batch]
    order = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    columns = [columns for columns, _ in batches.values()]
    names = columns[0] if columns else ()
    whole = {each: np.concatenate([some[each] for some in columns])[order] for each in names}
    return whole, counts


def _table(
    name: str,
    prompts: Sequence[Mapping[str, Any]],
    places: Sequence[int],
    lists: Lists,
    names: Mapping[str, Sequence[str]],
) -> pa.Table:
    schema = SCHEMAS[name]
    whole, counts = lists
    repeated = np.repeat(np.arange(len(places)), counts)
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
