"""The worked example: one prompt from layers down to neurons and what set them off.

The order is that of the published notebooks. Where they print a list, their ids and scores stand
beside ours place by place: of GPT2-large and Llama-7B, on their own prompt.
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.cards import neuron_card
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head
from tl_neuron_attr.paper.published import MODELS, Example, Scores, published_example

SHOWN = 10
TOKENS = 8


def worked_example(result: Attribution) -> dict[str, pd.DataFrame]:
    """Tables of one attributed prompt: predictions, layers, heads, positions, neurons, queries.

    Cost: as of ``query_neurons`` and one neuron card, and a read-out for each source position of
    the best head.
    """
    best = result.heads(1).iloc[0]
    heads = result.heads(SHOWN)
    ffn = result.neurons("ffn", SHOWN, tokens=TOKENS)
    attn = result.neurons("attn", SHOWN, tokens=TOKENS)
    queries = result.query_neurons(SHOWN, tokens=TOKENS)
    return {
        "example_predictions": result.predictions(SHOWN),
        "example_layers": result.layers(),
        "example_all_heads": result.heads(),
        "example_heads": _beside(
            [str(Head(*each)) for each in heads[["layer", "head"]].to_numpy().tolist()],
            heads,
            "heads",
        ),
        "example_positions": result.positions(int(best["layer"]), int(best["head"])),
        "example_ffn_neurons": _beside(_labels(ffn), ffn, "ffn_neurons"),
        "example_attn_neurons": _beside(_labels(attn), attn, "attn_neurons"),
        "example_query_layers": pd.concat(
            [result.query_layers(of).assign(of=of) for of in ("ffn", "attn")], ignore_index=True
        ),
        "example_query_neurons": _beside(_labels(queries), queries, "query_neurons"),
        "example_through_heads": _through_heads(result, queries),
    }


def _through_heads(result: Attribution, queries: pd.DataFrame) -> pd.DataFrame:
    """The shallowest of the best query neurons as each later head carries it on."""
    if queries.empty:
        return pd.DataFrame(columns=["neuron", "layer", "head", "readability", "raises", "lowers"])
    one = queries.sort_values(["layer", "rank"]).iloc[0]
    neuron = FFNNeuron(int(one["layer"]), int(one["index"]))
    card = neuron_card(result, neuron, position=int(one["position"]), tokens=TOKENS, top=SHOWN)
    columns = ["neuron", "layer", "head", "readability", "raises", "lowers"]
    return pd.DataFrame(card.heads.assign(neuron=str(neuron)), columns=columns)


def _labels(table: pd.DataFrame) -> list[str]:
    columns: Iterable[list[Any]] = (
        table[name].tolist() for name in ("kind", "layer", "head", "index", "source_pos")
    )
    return [
        str(
            FFNNeuron(layer, index)
            if kind == "ffn"
            else AttnNeuron(layer, head, index, None if pd.isna(source) else int(source))
        )
        for kind, layer, head, index, source in zip(*columns, strict=True)
    ]


def _beside(labels: list[str], table: pd.DataFrame, what: str) -> pd.DataFrame:
    """Labels and scores, what the neurons say, and the published list place by place."""
    found = pd.DataFrame({"place": range(1, len(labels) + 1), "label": labels})
    for name in ("score", "coefficient", "source_token", "raises", "lowers"):
        if name in table:
            found[name] = table[name].to_numpy()
    if what != "attn_neurons":
        found = found.drop(columns="source_token", errors="ignore")
    for model in MODELS:
        printed: Scores = getattr(published_example(model), what)
        column = model.replace("-", "_")
        rows = [*printed.rows[: len(labels)], *[((), float("nan"))] * len(labels)]
        found[f"{column}_label"] = [_label(ids, what) for ids, _ in rows[: len(labels)]]
        found[f"{column}_score"] = [score for _, score in rows[: len(labels)]]
    return found


def _label(ids: tuple[Any, ...], what: str) -> str | None:
    """A published id, the way ours are written."""
    if not ids:
        return None
    if what == "heads":
        return str(Head(*ids))
    return str(FFNNeuron(*ids) if len(ids) == 2 else AttnNeuron(*ids))


def example_prompt(model_name: str, given: str | None) -> str:
    """The prompt of the worked example: that of the notebooks, unless the model is the bundled one.

    Raises:
        InputError: If the one given is empty.
    """
    if given is not None:
        if not given.strip():
            raise InputError("the example's prompt is empty; give some text, or leave it out")
        return given
    example: Example = published_example(MODELS[0])
    return "The capital of France is" if model_name == "tiny-facts" else example.prompt
