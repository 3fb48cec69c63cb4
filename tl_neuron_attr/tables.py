"""What we report: tensors -> tidy DataFrames, and to disk.

One row is one layer, head, head at one source position, or neuron. The columns are the same
everywhere, so frames of several prompts concatenate. Scores are in nats.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.files import write_files
from tl_neuron_attr.readout import TokenEnds
from tl_neuron_attr.scores import LayerScores
from tl_neuron_attr.topk import RankedNeurons

LAYER_COLUMNS = ("layer", "kind", "score")
HEAD_COLUMNS = ("layer", "head", "score")
POSITION_COLUMNS = ("layer", "head", "source_pos", "token", "attention", "score")
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


SHARE_COLUMNS = ("kind", "top", "rise_lower", "rise_upper", "share_lower", "share_upper")


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
            "raises": [[text_of[token] for token in row] for row in ends.top_ids.tolist()],
            "lowers": [[text_of[token] for token in row] for row in ends.bottom_ids.tolist()],
        }
    )


def share_table(rows: Sequence[tuple[str, int, float, float, float, float]]) -> pd.DataFrame:
    """One row a kind: what all its raising neurons add (nats), and the share of the best."""
    return pd.DataFrame(rows, columns=list(SHARE_COLUMNS))


def write_tables(
    directory: Path, tables: Mapping[str, pd.DataFrame], texts: Mapping[str, str]
) -> None:
    """Write each table as ``<name>.parquet`` and each text under its name: all of them, or none."""
    parquet = {f"{name}.parquet": _parquet_writer(table) for name, table in tables.items()}
    plain = {name: _text_writer(text) for name, text in texts.items()}
    write_files(directory, {**parquet, **plain})


def _parquet_writer(table: pd.DataFrame):
    return lambda path: table.to_parquet(path, index=False)


def _text_writer(text: str):
    return lambda path: path.write_text(text, encoding="utf-8")


def _floats(values: Tensor):
    """float64 columns whatever the scores were computed in: one schema for all files."""
    return values.detach().cpu().to(torch.float64).numpy()


def _nullable(values: Tensor | None, length: int):
    return pd.array([None] * length if values is None else values.tolist(), dtype="Int64")
