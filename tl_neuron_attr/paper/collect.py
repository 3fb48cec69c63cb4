"""What each sentence shows: attributions of a batch of prompts -> rows, from which all is made.

Everything here is about the forward pass alone; what happens without some neurons is
``zeroing.py``. All prompts of a batch are of one knowledge type. What would be long (which neurons
are among the best) is counted at once.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.index import ProjectionIndex
from tl_neuron_attr.intervals import score_intervals
from tl_neuron_attr.paper.settings import (
    SEGMENT_STEPS,
    SHARE_TOPS,
    TOP,
    TOP_VALUES,
    sizes,
)
from tl_neuron_attr.query import QueryScores
from tl_neuron_attr.topk import RankedNeurons, largest


def queries_of(results: Sequence[Attribution]) -> list[tuple[QueryScores, QueryScores]]:
    """What set off each prompt's best FFN value neurons, and its best attention neurons.

    Cost: one forward pass a prompt. Where all value neurons are ill-conditioned, all scores are 0.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that says they are 0
        return [
            (
                result.query_scores("ffn", top_values=TOP_VALUES),
                result.query_scores("attn", top_values=TOP_VALUES),
            )
            for result in results
        ]


@torch.no_grad()
def collect(
    results: Sequence[Attribution],
    queries: Sequence[tuple[QueryScores, QueryScores]],
    knowledge_type: str,
) -> dict[str, pd.DataFrame]:
    """Tables of the prompts' layers, heads, neurons, query side and segment.

    ``layers``: ``prompt_id, layer, kind, score``. ``query_layers``: the same, with ``of``
    (``ffn`` or ``attn``: whose query layers). ``heads``: ``layer, head``, the sum of the prompts'
    scores and their number. ``neurons``: in how many prompts each is among the ``top``, by ``role``
    and ``kind``, and scores above 0. ``query_split``: of each prompt's query FFN neurons, how many
    by layer are value neurons too. ``segment``: log p(answer) by step. All with
    ``knowledge_type``; scores in nats.

    Cost: the best attention neurons summed over source positions, and a few read-outs a prompt.
    """
    of_attn = [query for _, query in queries]
    tables = {
        "layers": _layers(results),
        "query_layers": _query_layers(results, queries),
        "heads": _heads(results),
        "neurons": _neurons(results, of_attn),
        "query_split": _query_split(results, of_attn),
        "segment": _segment(results),
    }
    return {name: _of_type(table, knowledge_type) for name, table in tables.items()}


def collect_shares(
    results: Sequence[Attribution], index: ProjectionIndex, knowledge_type: str
) -> pd.DataFrame:
    """How much of the sum of all positive scores the best neurons of each prompt hold.

    ``prompt_id, kind, top, share_lower, share_upper``, from 0 to 1, between proven ends.
    Cost: as ``Attribution.shares``, for each prompt.
    """
    rows = []
    with torch.no_grad():
        for result in results:
            for kind, blocks in (("ffn", result.ffns), ("attn", result.attns)):
                found = score_intervals(blocks, result.out, result.target, index)
                total = found.lower.numel()
                tops = [*(top for top in SHARE_TOPS if top < total), total]
                rows += [
                    (result.captured.prompt.prompt_id, kind, top, *found.share(top)) for top in tops
                ]
    columns = ["prompt_id", "kind", "top", "share_lower", "share_upper"]
    return _of_type(pd.DataFrame(rows, columns=columns), knowledge_type)


def _of_type(table: pd.DataFrame, knowledge_type: str) -> pd.DataFrame:
    table.insert(0, "knowledge_type", pd.array([knowledge_type] * len(table), dtype="string"))
    return table


def _ids(results: Sequence[Attribution]) -> list[str]:
    return [result.captured.prompt.prompt_id for result in results]


def _layers(results: Sequence[Attribution]) -> pd.DataFrame:
    scores = torch.stack(
        [
            torch.stack([result.layer_scores.attn, result.layer_scores.ffn], 1).flatten()
            for result in results
        ]
    )
    n_layers = results[0].host.n_layers
    return _long(
        results,
        {"layer": np.repeat(np.arange(n_layers), 2), "kind": ["attn", "ffn"] * n_layers},
        scores,
    )


def _query_layers(
    results: Sequence[Attribution], queries: Sequence[tuple[QueryScores, QueryScores]]
) -> pd.DataFrame:
    n_layers = results[0].host.n_layers
    # one frame for both: the embedding is before layer 0, the biases belong to none
    layer = pd.array([None, *np.repeat(np.arange(n_layers), 2), None], dtype="Int64")
    kind = ["embed", *["attn", "ffn"] * n_layers, "bias"]
    tables = []
    for place, of in enumerate(("ffn", "attn")):
        scores = torch.stack([_in_order(query[place]) for query in queries])
        table = _long(results, {"layer": layer, "kind": kind}, scores)
        table.insert(1, "of", of)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _in_order(scores: QueryScores) -> Float[Tensor, " source"]:
    each = torch.stack([scores.attn, scores.ffn], 1).flatten()
    return torch.cat([scores.embed[None], each, scores.bias[None]])


def _long(
    results: Sequence[Attribution], columns: dict, scores: Float[Tensor, "prompt row"]
) -> pd.DataFrame:
    """One row a prompt and entry of ``columns``."""
    n_prompts, n_rows = scores.shape
    repeated = {
        name: pd.Series(values).take(np.tile(np.arange(n_rows), n_prompts)).array
        for name, values in columns.items()
    }
    return pd.DataFrame(
        {
            "prompt_id": np.repeat(_ids(results), n_rows),
            **repeated,
            "score": scores.flatten().double().cpu().numpy(),
        }
    )


def _heads(results: Sequence[Attribution]) -> pd.DataFrame:
    total = torch.stack([result.head_scores.double() for result in results]).sum(0)
    n_layers, n_heads = total.shape
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(n_layers), n_heads),
            "head": np.tile(np.arange(n_heads), n_layers),
            "score_sum": total.flatten().cpu().numpy(),
            "prompts": len(results),
        }
    )


def _neurons(results: Sequence[Attribution], queries: Sequence[QueryScores]) -> pd.DataFrame:
    """In how many prompts each neuron is among the best, attention neurons without positions."""
    host = results[0].host
    top = sizes(host).top
    tables = []
    for kind, count in top.items():
        shape = (host.n_layers, host.d_mlp)
        if kind == "attn":
            shape = (host.n_layers, host.n_heads, host.d_head)
        ranked = [
            result.ffn_neurons if kind == "ffn" else result.attn_neurons_over_sources
            for result in results
        ]
        for size in sorted({count, TOP}):
            masks = [_mask_of(each.first(size), shape) for each in ranked]
            tables.append(_counted("value", kind, size, masks))
    for size in sorted({top["ffn"], TOP}):
        masks = [top_query_mask(scores, size) for scores in queries]
        tables.append(_counted("query", "ffn", size, masks))
    return pd.concat(tables, ignore_index=True)


def _mask_of(ranked: RankedNeurons, shape: tuple[int, ...]) -> Bool[Tensor, "layer ..."]:
    """Which neurons are ranked and raise the answer: those that are off tie at 0 in any number."""
    ranked = ranked.at((ranked.score > 0).nonzero()[:, 0])
    mask = torch.zeros(shape, dtype=torch.bool, device=ranked.layer.device)
    if ranked.head is None:
        mask[ranked.layer, ranked.index] = True
    else:
        mask[ranked.layer, ranked.head, ranked.index] = True
    return mask


def top_query_mask(
    scores: QueryScores, top: int, *, below: int | None = None
) -> Bool[Tensor, "layer d_mlp"]:
    """Which FFN neurons are the ``top`` query neurons (of layers ``below``, if given).

    Only layers before some value neuron have any; none score 0 or less.
    """
    each = scores.ffn_neurons
    depth = scores.ffn_depth if below is None else min(below, scores.ffn_depth)
    mask = torch.zeros_like(each, dtype=torch.bool)
    flat = each[:depth].flatten()
    best = largest(flat, top)
    mask.view(-1)[best[flat[best] > 0]] = True
    return mask


def _counted(
    role: str, kind: str, top: int, masks: Sequence[Bool[Tensor, "layer ..."]]
) -> pd.DataFrame:
    counts = torch.stack(list(masks)).sum(0)
    places = counts.nonzero()
    columns = ["layer", "index"] if kind == "ffn" else ["layer", "head", "index"]
    found = dict(zip(columns, places.cpu().numpy().T, strict=True))
    head = found.get("head", [None] * len(places))
    return pd.DataFrame(
        {
            "role": role,
            "kind": kind,
            "top": top,
            "layer": found["layer"],
            "head": pd.array(head, dtype="Int64"),
            "index": found["index"],
            "prompts": counts[tuple(places.T)].cpu().numpy(),
        }
    )


def _query_split(results: Sequence[Attribution], queries: Sequence[QueryScores]) -> pd.DataFrame:
    """By layer: query FFN neurons that are not among the value neurons, and those that are."""
    host = results[0].host
    top = sizes(host).top["ffn"]
    tables = []
    for size in sorted({top, TOP}):
        only, both = [], []
        for result, scores in zip(results, queries, strict=True):
            query = top_query_mask(scores, size)
            value = _mask_of(result.ffn_neurons.first(size), tuple(query.shape))
            only.append((query & ~value).sum(1))
            both.append((query & value).sum(1))
        layers = {"layer": np.arange(host.n_layers)}
        table = _long(results, layers, torch.stack(only).double())
        table = table.rename(columns={"score": "query_only"}).astype({"query_only": "int64"})
        table["query_and_value"] = torch.stack(both).flatten().cpu().numpy()
        table.insert(1, "top", size)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _segment(results: Sequence[Attribution]) -> pd.DataFrame:
    """log p(answer), the norm frozen, on the way from the input to the final hidden state."""
    parts = torch.arange(SEGMENT_STEPS + 1) / SEGMENT_STEPS
    scores = []
    for result in results:
        start, end = result.captured.resid_pre[0], result.captured.resid_final
        step = parts.to(start)[:, None]
        points = start + step * (end - start)
        scores.append(result.out.log_prob(points, result.target))
    table = _long(results, {"part": parts.double().numpy()}, torch.stack(scores))
    return table.rename(columns={"score": "log_prob"})
