"""What we report: tensors -> tidy DataFrames, and to disk.

One row is one layer, head, head at one source position, or neuron. The columns are the same
everywhere, so frames of several prompts concatenate. Scores are in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.differences import RankedDifferences
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import write_files
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.projection import TokenEnds
from tl_neuron_attr.query import QueryScores
from tl_neuron_attr.reading import QueryNeurons
from tl_neuron_attr.scores import LayerScores
from tl_neuron_attr.topk import RankedNeurons

LAYER_COLUMNS = ("layer", "kind", "score")
HEAD_COLUMNS = ("layer", "head", "score")
POSITION_COLUMNS = ("layer", "head", "source_pos", "token", "attention", "score")
LOG_PROB_COLUMNS = ("layer", "position", "token", "log_prob")
QUERY_VALUE_COLUMNS = (
    "kind",
    "layer",
    "head",
    "index",
    "source_pos",
    "score",
    "input",
    "total",
    "absolute",
    "ill_conditioned",
    "left_out",
)
NEURON_COLUMNS = (
    "prompt_id",
    "role",
    "kind",
    "layer",
    "head",
    "index",
    "source_pos",
    "coefficient",
    "score",
    "rank",
)


COMPARED_LAYER_COLUMNS = (*LAYER_COLUMNS, "other_score", "difference")
COMPARED_HEAD_COLUMNS = (*HEAD_COLUMNS, "other_score", "difference")
COMPARED_NEURON_COLUMNS = (
    "prompt_id",
    "kind",
    "layer",
    "head",
    "index",
    "source_pos",
    "coefficient",
    "other_coefficient",
    "score",
    "other_score",
    "difference",
    "rank",
)
HEAD_SCAN_COLUMNS = ("layer", "head", "change")
CURVE_COLUMNS = (
    "prompt_id",
    "kind",
    "keep",
    "top",
    "zeroed",
    "log_prob",
    "prob",
    "target_rank",
    "correct",
)
RUN_TABLES = (
    "layers",
    "heads",
    "positions",
    "log_probs",
    "neurons",
    "suppressing",
    "shares",
    "query_layers",
    "query_heads",
    "query_neurons",
    "query_values",
    "lowest",
    "label_positions",
    "inputs",
    "answer_tokens",
    "neurons_by_token",
)
"""Tables that a ``run.json`` beside them is about, whichever command wrote it."""
SHARE_COLUMNS = ("kind", "top", "rise_lower", "rise_upper", "share_lower", "share_upper")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One run as it is on disk: tables by name, and the facts of ``run.json`` as plain values."""

    tables: Mapping[str, pd.DataFrame]
    facts: Mapping[str, Any]


def layer_table(scores: LayerScores) -> pd.DataFrame:
    """Two rows a layer (kind ``attn``, then ``ffn``), in layer order."""
    n_layers = scores.attn.shape[0]
    return pd.DataFrame(
        {
            "layer": [layer for layer in range(n_layers) for _ in range(2)],
            "kind": ["attn", "ffn"] * n_layers,
            "score": _floats(torch.stack([scores.attn, scores.ffn], 1).flatten()),
        }
    )


def head_table(scores: Float[Tensor, "layer head"]) -> pd.DataFrame:
    """One row a head, in order of layer and head."""
    n_layers, n_heads = scores.shape
    return pd.DataFrame(
        {
            "layer": [layer for layer in range(n_layers) for _ in range(n_heads)],
            "head": list(range(n_heads)) * n_layers,
            "score": _floats(scores.flatten()),
        }
    )


def position_table(
    layer: int,
    heads: Sequence[int],
    tokens: Sequence[str],
    attention: Float[Tensor, "head pos"],
    scores: Float[Tensor, "head pos"],
) -> pd.DataFrame:
    """One row a source position of each of these heads of one layer.

    ``attention`` is the weight (0 to 1) that the read position gives the source position.
    """
    n_pos = scores.shape[1]
    return pd.DataFrame(
        {
            "layer": layer,
            "head": [head for head in heads for _ in range(n_pos)],
            "source_pos": list(range(n_pos)) * len(heads),
            "token": list(tokens[:n_pos]) * len(heads),
            "attention": _floats(attention.flatten()),
            "score": _floats(scores.flatten()),
        },
        columns=list(POSITION_COLUMNS),
    )


def log_prob_table(
    log_probs: Float[Tensor, "station position"], tokens: Sequence[str]
) -> pd.DataFrame:
    """One row a layer and position: log p(target), in nats, of the residual stream after the layer.

    ``layer`` is a nullable integer, empty for what enters the first.
    """
    n_stations, n_pos = log_probs.shape
    layers = [None, *range(n_stations - 1)]
    return pd.DataFrame(
        {
            "layer": pd.array([layer for layer in layers for _ in range(n_pos)], dtype="Int64"),
            "position": list(range(n_pos)) * n_stations,
            "token": pd.array(list(tokens[:n_pos]) * n_stations, dtype="string"),
            "log_prob": _floats(log_probs.flatten()),
        },
        columns=list(LOG_PROB_COLUMNS),
    )


def neuron_table(neurons: RankedNeurons, prompt_id: str, role: str = "value") -> pd.DataFrame:
    """One row a neuron, best first; ``rank`` counts from 1.

    ``head`` and ``source_pos`` are nullable integers, empty for FFN neurons (``source_pos`` also
    for attention neurons summed over source positions).
    """
    return pd.DataFrame(
        {
            "prompt_id": pd.array([prompt_id] * len(neurons), dtype="string"),
            "role": pd.array([role] * len(neurons), dtype="string"),
            "kind": pd.array([neurons.kind] * len(neurons), dtype="string"),
            "layer": neurons.layer.cpu().numpy(),
            "head": _nullable(neurons.head, len(neurons)),
            "index": neurons.index.cpu().numpy(),
            "source_pos": _nullable(neurons.source_pos, len(neurons)),
            "coefficient": _floats(neurons.coefficient),
            "score": _floats(neurons.score),
            "rank": range(1, len(neurons) + 1),
        },
        columns=list(NEURON_COLUMNS),
    )


def with_experts(table: pd.DataFrame, n_experts: int, d_expert: int) -> pd.DataFrame:
    """Of a mixture of experts with the column ``expert``, empty for attention neurons.

    FFN neurons are numbered through a layer, expert after expert, ``d_expert`` of each; a shared
    one is the one after the last. Of other models (no experts) the table as it is.
    """
    if not n_experts:
        return table
    expert = (table["index"] // d_expert).clip(upper=n_experts)
    return table.assign(expert=expert.where(table["kind"] == "ffn").astype("Int64"))


def neurons_of(table: pd.DataFrame) -> list[FFNNeuron | AttnNeuron]:
    """The neurons a table lists, in its order, for ``zero`` and whatever else takes neurons.

    Any table with the columns ``kind, layer, head, index``, fresh or read back from a file, such as
    ``result.neurons("ffn", top=10)`` or ``result.query_neurons(30)``; without ``source_pos`` (or
    where it is empty) attention neurons are those summed over source positions.

    Raises:
        InputError: If a column is missing, or a cell names no neuron.
    """
    missing = [name for name in ("kind", "layer", "head", "index") if name not in table.columns]
    if missing:
        raise InputError(
            f"a table of neurons has the columns kind, layer, head and index; this one lacks "
            f"{', '.join(missing)}"
        )
    found: list[FFNNeuron | AttnNeuron] = []
    for row in records(table):
        kind, head, source = row["kind"], row["head"], row.get("source_pos")
        if kind == "ffn":
            found.append(FFNNeuron(int(row["layer"]), int(row["index"])))
        elif kind == "attn" and head is not None:
            place = None if source is None else int(source)
            found.append(AttnNeuron(int(row["layer"]), int(head), int(row["index"]), place))
        else:
            raise InputError(
                f"a neuron is of kind ffn, or of kind attn with a head; row {len(found)} has the "
                f"kind {kind!r} and the head {head!r}"
            )
    return found


def query_layer_table(scores: QueryScores) -> pd.DataFrame:
    """The embedding, attention and FFN of each layer in their order, and the bias.

    ``layer`` is a nullable integer, empty for ``embed`` and ``bias``.
    """
    n_layers = scores.attn.shape[0]
    layers = [None, *(layer for layer in range(n_layers) for _ in range(2)), None]
    each = torch.stack([scores.attn, scores.ffn], 1).flatten()
    return pd.DataFrame(
        {
            "layer": pd.array(layers, dtype="Int64"),
            "kind": ["embed", *["attn", "ffn"] * n_layers, "bias"],
            "score": _floats(torch.cat([scores.embed[None], each, scores.bias[None]])),
        }
    )


def query_neuron_table(
    found: QueryNeurons, prompt_id: str, *, position: bool = False
) -> pd.DataFrame:
    """``neuron_table`` of query neurons; with ``position`` where each of them fires, too."""
    table = neuron_table(found.neurons, prompt_id, role="query")
    if not position:
        return table
    # nullable: beside value neurons, which have none, it is the same column
    return table.assign(position=pd.array(found.position.tolist(), dtype="Int64"))


def query_value_table(scores: QueryScores) -> pd.DataFrame:
    """One row a pre-activation of the value neurons: what shares are taken of, and which are not.

    A gated FFN neuron has two rows, ``input`` ``gate`` and ``up``. ``total`` is the pre-activation
    and ``absolute`` the sum of its absolute parts.
    """
    neurons = [neuron for ranked in scores.values for neuron in ranked.neurons()]
    score = torch.cat([ranked.score for ranked in scores.values])
    rows = scores.inputs
    places = rows.value.tolist()
    of = [neurons[place] for place in places]
    table = pd.DataFrame(
        {
            "kind": ["ffn" if isinstance(neuron, FFNNeuron) else "attn" for neuron in of],
            "layer": [neuron.layer for neuron in of],
            "head": pd.array([getattr(neuron, "head", None) for neuron in of], dtype="Int64"),
            "index": [neuron.index for neuron in of],
            "source_pos": pd.array(
                [getattr(neuron, "source_pos", None) for neuron in of], dtype="Int64"
            ),
            "score": _floats(score[rows.value]),
            "input": list(rows.input),
            "total": _floats(rows.total),
            "absolute": _floats(rows.absolute),
            "ill_conditioned": rows.ill_conditioned.cpu().numpy(),
            "left_out": rows.left_out.cpu().numpy(),
        },
        columns=list(QUERY_VALUE_COLUMNS),
    )
    order = pd.Series(places).sort_values(kind="stable").index
    return table.loc[order].reset_index(drop=True)


def token_columns(
    neurons: RankedNeurons,
    ends: TokenEnds,
    token_texts: Sequence[str],
    text_of: Mapping[int, str],
) -> pd.DataFrame:
    """What each neuron says, as columns to put beside ``neuron_table``.

    ``source_token`` is the token at the source position (empty for FFN neurons); ``raises`` and
    ``lowers`` list the tokens whose logits the neuron's signed contribution moves most.
    """
    sources = [None] * len(neurons) if neurons.source_pos is None else neurons.source_pos.tolist()
    return pd.DataFrame(
        {
            "source_token": pd.array(
                [None if pos is None else token_texts[pos] for pos in sources], dtype="string"
            ),
            # of no neuron it would be a column of numbers
            "raises": pd.Series(_texts(ends.top_ids, text_of), dtype=object),
            "lowers": pd.Series(_texts(ends.bottom_ids, text_of), dtype=object),
        }
    )


def _texts(ids: Int[Tensor, "neuron k"], text_of: Mapping[int, str]) -> list[list[str]]:
    return [[text_of[token] for token in row] for row in ids.tolist()]


def compared_layer_table(scores: LayerScores, others: LayerScores) -> pd.DataFrame:
    """``layer_table`` of one run, with the scores of another and by how much they fall short."""
    table = layer_table(scores)
    return _compared(table, torch.stack([others.attn, others.ffn], 1).flatten())


def compared_head_table(
    scores: Float[Tensor, "layer head"], others: Float[Tensor, "layer head"]
) -> pd.DataFrame:
    """The same for heads."""
    return _compared(head_table(scores), others.flatten())


def _compared(table: pd.DataFrame, others: Float[Tensor, " row"]) -> pd.DataFrame:
    table = table.assign(other_score=_floats(others))
    return table.assign(difference=table["score"] - table["other_score"])


def compared_neuron_table(found: RankedDifferences, prompt_id: str) -> pd.DataFrame:
    """One row a neuron, by difference: both scores, both coefficients, the score less the other."""
    table = neuron_table(found.neurons, prompt_id).assign(
        other_coefficient=_floats(found.second_coefficient),
        score=_floats(found.first_score),
        other_score=_floats(found.second_score),
        difference=_floats(found.neurons.score),
    )
    return pd.DataFrame(table, columns=list(COMPARED_NEURON_COLUMNS))


def head_scan_table(changes: Float[Tensor, "layer head"]) -> pd.DataFrame:
    """One row a head: ``change`` of log p(target), in nats, when it alone is zeroed."""
    return head_table(changes).rename(columns={"score": "change"})


def share_table(rows: Sequence[tuple[str, int, float, float, float, float]]) -> pd.DataFrame:
    """One row a kind: what all its raising neurons add (nats), and the share of the best."""
    return pd.DataFrame(rows, columns=list(SHARE_COLUMNS))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values, ``None`` where a cell is empty."""
    columns = {name: table[name].tolist() for name in table.columns}
    return [
        {name: _cell(values[row]) for name, values in columns.items()} for row in range(len(table))
    ]


def _cell(value: Any) -> Any:
    return None if value is pd.NA or (isinstance(value, float) and value != value) else value


def write_tables(
    directory: Path,
    tables: Mapping[str, pd.DataFrame],
    texts: Mapping[str, str],
    stale: Sequence[str] = (),
    stale_texts: Sequence[str] = (),
) -> None:
    """Write each table as ``<name>.parquet`` and each text under its name: all of them, or none.

    ``stale`` names tables of an earlier run that this one does not have, and ``stale_texts``
    files; they are removed.
    """
    parquet = {f"{name}.parquet": _parquet_writer(table) for name, table in tables.items()}
    plain = {name: _text_writer(text) for name, text in texts.items()}
    old = [*(f"{name}.parquet" for name in stale), *stale_texts]
    write_files(directory, {**parquet, **plain}, old)


def write_run(
    directory: Path, tables: Mapping[str, pd.DataFrame], texts: Mapping[str, str]
) -> None:
    """``write_tables`` of what has a ``run.json``: what an earlier one was about is removed.

    Its tables beside a ``run.json`` of another prompt would be taken for that prompt's.
    """
    stale = [name for name in RUN_TABLES if name not in tables]
    of_runs = ("cards.json", "in_context.json", "report.html")
    write_tables(directory, tables, texts, stale, [name for name in of_runs if name not in texts])


def _parquet_writer(table: pd.DataFrame):
    return lambda path: table.to_parquet(path, index=False)


def _text_writer(text: str):
    return lambda path: path.write_text(text, encoding="utf-8")


def _floats(values: Tensor):
    """float64 columns whatever the scores were computed in: one schema for all files."""
    return values.detach().cpu().to(torch.float64).numpy()


def _nullable(values: Tensor | None, length: int):
    return pd.array([None] * length if values is None else values.tolist(), dtype="Int64")
