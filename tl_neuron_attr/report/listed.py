"""Neurons, heads and layers as rows that a reader understands: labels in place of indices."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from tl_neuron_attr.markup import Shown
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head
from tl_neuron_attr.prompts import visible
from tl_neuron_attr.tables import records

KINDS = {"ffn": "FFN", "attn": "attention"}


def neuron_list(caption: str, table: pd.DataFrame, columns: Mapping[str, str]) -> Shown:
    """Rows of neurons, ``label`` first; ``columns`` are those after it."""
    return Shown(
        caption=caption,
        table=table.assign(label=neuron_labels(table), **_sources(table)),
        columns={"rank": "#", "label": "neuron", **columns},
    )


def head_list(caption: str, table: pd.DataFrame, columns: Mapping[str, str]) -> Shown:
    """Rows of heads, ``label`` first."""
    return Shown(
        caption=caption,
        table=table.assign(label=head_labels(table)),
        columns={"label": "head", **columns},
    )


def neuron_labels(table: pd.DataFrame) -> list[str]:
    """What each row's neuron is called."""
    return [
        str(
            FFNNeuron(row["layer"], row["index"])
            if row["kind"] == "ffn"
            else AttnNeuron(row["layer"], row["head"], row["index"], row["source_pos"])
        )
        for row in records(table)
    ]


def head_labels(table: pd.DataFrame) -> list[str]:
    """What each row's head is called."""
    return [
        str(Head(layer, head))
        for layer, head in zip(table["layer"].tolist(), table["head"].tolist(), strict=True)
    ]


def placed(positions: Iterable[Any], texts: Sequence[str]) -> list[str]:
    """Positions of the prompt, each with its token."""
    return [f"{pos}:{visible(texts[int(pos)])}" for pos in positions]


def called(values: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """Names for people in place of those in tables."""
    return [names[value] for value in values]


def _sources(table: pd.DataFrame) -> dict[str, list[str | None]]:
    """Source tokens so that spaces are seen."""
    return {
        name: [None if pd.isna(text) else visible(str(text)) for text in table[name]]
        for name in ("source_token", "other_source_token")
        if name in table
    }
