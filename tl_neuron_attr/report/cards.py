"""The cards a report shows: of the best neurons whole ones, as plain values."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.cards import neuron_card
from tl_neuron_attr.errors import NeuronAttrError
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.tables import Saved, records

CARDS = 5
"""Of how many of the best neurons of a kind there is a whole card. One takes 0.05 s on the bundled
model and 0.5 s at the shape of GPT-2 small (12 tokens, one core): each reads out every later head.
"""

_SOURCES = 8
_OF_THE_RUN = ("model_name", "prompt_id", "tokens", "read_pos", "target", "log_prob", "convention")


def label_of(row: Mapping[str, Any]) -> str:
    """The name of a row's neuron."""
    if row["kind"] == "ffn":
        return str(FFNNeuron(row["layer"], row["index"]))
    return str(AttnNeuron(row["layer"], row["head"], row["index"], row["source_pos"]))


def best_cards(result: Attribution, saved: Saved, count: int = CARDS) -> list[dict[str, Any]]:
    """Cards of the ``count`` best value neurons of each kind and of as many query neurons.

    A query neuron is looked at where it does most. What all cards of a run share is left out.
    Where the model no longer gives the activations it was attributed by, there are none.
    """
    cards = []
    for row in _best(saved.tables["neurons"], count):
        try:
            card = neuron_card(result, label_of(row), position=row["position"]).to_dict()
        except NeuronAttrError:
            continue  # the page shows its tokens and scores, and the command for the whole card
        for name in _OF_THE_RUN:
            del card[name]
        cards.append({**card, "role": row["role"]})
    return cards


def _best(neurons: pd.DataFrame, count: int) -> Iterator[dict[str, Any]]:
    for _, some in neurons.groupby(["role", "kind"], sort=False):
        yield from records(some.head(count))


def card_tables(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a card tabulates, as ``report.js`` draws it: title, columns with their kinds, rows."""
    found = [
        (
            "Where it comes from",
            "Attention times v is the coefficient at a source position; the largest first.",
            ("source:from", "number:attention", "number:v", "number:coefficient", "number:nats"),
            [
                [row["source_pos"], row["attention"], row["v"], row["coefficient"], row["score"]]
                for row in sorted(card["sources"], key=lambda row: -abs(row["coefficient"]))
            ][:_SOURCES],
        ),
        (
            "What set it off: layers",
            "Shares of its pre-activation; the largest first.",
            ("text:part", "number:share", "number:nats"),
            [
                [_part(row), row["share"], row["score"]]
                for row in sorted(card["query_layers"], key=lambda row: -abs(row["share"]))
                if row["share"]
            ][:8],
        ),
        (
            "What set it off: neurons",
            "",
            (
                *("neuron:neuron", "source:at", "number:share", "number:coefficient"),
                *("tokens:raises", "tokens:lowers"),
            ),
            [
                [
                    *(label_of(row), row["position"], row["share"], row["coefficient"]),
                    *(row["raises"], row["lowers"]),
                ]
                for row in card["query_neurons"]
            ],
        ),
        (
            "What it sets off",
            "Later neurons whose pre-activation it changes most.",
            (
                *("neuron:neuron", "text:input", "number:effect", "number:pre-activation"),
                "number:coefficient",
            ),
            [
                [
                    *(label_of(row), row["input"], row["effect"], row["pre_activation"]),
                    row["coefficient"],
                ]
                for row in card["downstream"]
            ],
        ),
        (
            "Through later heads",
            "What a head would carry on to the answer, the most readable first (sd: how far the "
            "strongest token stands out).",
            ("text:head", "number:sd", "number:attention", "tokens:raises", "tokens:lowers"),
            [
                [
                    *(f"L{row['layer']}.H{row['head']}", row["readability"], row["attention"]),
                    *(row["raises"], row["lowers"]),
                ]
                for row in card["heads"]
            ],
        ),
    ]
    return [
        {"title": title, "text": text, "columns": columns, "rows": rows}
        for title, text, columns, rows in found
        if rows
    ]


def ends_of(card: Mapping[str, Any], raised: bool) -> Sequence[Mapping[str, Any]]:
    """The tokens at the end of its subvalue that the neuron raises in this run, or lowers."""
    return [row for row in card["ends"] if row["raised"] == raised]


def _part(row: Mapping[str, Any]) -> str:
    names = {"attn": "attention", "ffn": "FFN", "embed": "embedding", "bias": "biases"}
    return names[row["kind"]] + ("" if row["layer"] is None else f", layer {row['layer']}")
