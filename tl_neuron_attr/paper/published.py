"""What was published: the paper's numbers, and those saved in its notebooks.

The file ``published.json`` beside this module holds figures alone, in a form of this package; no
text or code was copied. Where they come from:

- ``methods``, ``drops``, ``layer_score_sums``, ``shared_percent``: Yu & Ananiadou, arXiv 2312.12141
  (EMNLP 2024). MRR from 0 to 1; probabilities, drops and shares in per cent. Of ``methods`` the
  rows marked ``well_attested`` are sure; the others come from one secondary source. The column of
  log-probabilities is not known, nor which of the two models the random controls belong to.
- ``examples``: what the notebooks printed for "Tim Duncan plays the sport of", rounded as they
  rounded it. ``neurons_by_layer`` alone was never printed: it was read off the saved plots.

The sentences behind the tables were never released: numbers of other sentences can stand beside
these, but no table can be rerun.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

MODELS = ("gpt2-large", "llama-7b")
"""The two models of the paper."""

NEURONS = {
    "gpt2-large": {"ffn": 36 * 5120, "attn": 36 * 20 * 64},
    "llama-7b": {"ffn": 32 * 11008, "attn": 32 * 32 * 128},
}
"""How many neurons they have of each kind (attention neurons: layer, head, dimension)."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Printed scores, in nats, each with what it is of."""

    rows: tuple[tuple[tuple[Any, ...], float], ...]
    """Where, and how much: of heads ``(layer, head)``, of neurons their ids, of layers ``(layer,
    kind)`` (``(None, "embed")`` for the embedding); in the order printed."""
    decimals: int
    """How many decimals were printed."""
    all: bool = False
    """Whether these are all there are, not only the best."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt on one model, as a notebook shows it."""

    prompt: str
    bos: bool
    """Whether a BOS token stood in front."""
    n_tokens: int
    shape: dict[str, int]
    """The model's ``layers, heads, d_head, d_mlp``."""
    target: int
    """The token id explained: the model's own prediction."""
    predictions: tuple[str, ...]
    """The likeliest next tokens, best first, as printed (Llama's without their leading space)."""
    layers: Scores
    layer_sums: dict[str, float]
    """The sum over layers, by kind, of the scores as rounded."""
    heads: Scores
    head_positions: Scores
    """Of one head: ``(layer, head, source position)``."""
    attention: Scores
    """The attention weights beside them, from 0 to 1."""
    ffn_neurons: Scores
    attn_neurons: Scores
    query_layers_of_ffn: Scores
    query_layers_of_attn: Scores
    query_neurons: Scores
    top_values: dict[str, int]
    """Of how many value neurons the query scores are: ``ffn``, ``attn``, and for query neurons
    ``query_neurons``."""
    neurons_by_layer: dict[str, tuple[int, ...]]
    """Of the top 300, read off plots: ``ffn_value, attn_value, query_only, query_and_value``."""


@cache
def _file() -> dict[str, Any]:
    source = files("tl_neuron_attr.paper") / "published.json"
    return json.loads(source.read_text(encoding="utf-8"))


def published_numbers() -> dict[str, Any]:
    """The paper's tables as plain values: ``methods, drops, layer_score_sums, shared_percent``,
    and the number of ``sentences`` behind them, by model. See this module's docstring."""
    names = ("sentences", "methods", "drops", "layer_score_sums", "shared_percent")
    return json.loads(json.dumps({name: _file()[name] for name in names}))


def published_example(model: str) -> Example:
    """What the notebook for ``gpt2-large`` or ``llama-7b`` printed.

    Raises:
        KeyError: If there is no such notebook.
    """
    return _example(_file()["examples"][model])


def _example(given: dict[str, Any]) -> Example:
    both = given["layers"]
    layers = tuple(
        ((layer, kind), both[kind][layer])
        for layer in range(given["shape"]["layers"])
        for kind in ("attn", "ffn")
    )
    head = given["head_positions"]
    where = (head["layer"], head["head"])
    return Example(
        prompt=given["prompt"],
        bos=given["bos"],
        n_tokens=given["n_tokens"],
        shape=given["shape"],
        target=given["target"]["id"],
        predictions=tuple(given["predictions"]),
        layers=Scores(rows=layers, decimals=both["decimals"], all=True),
        layer_sums=given["layer_sums"],
        heads=_ranked(given["heads"]),
        head_positions=Scores(
            rows=tuple(((*where, pos), score) for pos, score, _ in head["rows"]),
            decimals=head["decimals"],
            all=True,
        ),
        attention=Scores(
            rows=tuple(((*where, pos), weight) for pos, _, weight in head["rows"]),
            decimals=head["decimals"],
            all=True,
        ),
        ffn_neurons=_ranked(given["ffn_neurons"]),
        attn_neurons=_ranked(given["attn_neurons"]),
        query_layers_of_ffn=_by_layer(given["query_layers_of_ffn"]),
        query_layers_of_attn=_ranked(given["query_layers_of_attn"]),
        query_neurons=_ranked(given["query_neurons"]),
        top_values={
            "ffn": given["query_layers_of_ffn"]["top_values"],
            "attn": given["query_layers_of_attn"]["top_values"],
            "query_neurons": given["query_neurons"]["top_values"],
        },
        neurons_by_layer={
            name: tuple(counts)
            for name, counts in given["neurons_by_layer"].items()
            if name != "top"
        },
    )


def _ranked(given: dict[str, Any]) -> Scores:
    rows = tuple((tuple(ids), score) for *ids, score in given["rows"])
    return Scores(rows=rows, decimals=given["decimals"])


def _by_layer(given: dict[str, Any]) -> Scores:
    rows = [((None, "embed"), given["embed"])]
    rows += [
        ((layer, kind), score)
        for kind in ("attn", "ffn")
        for layer, score in enumerate(given[kind])
        if score is not None
    ]
    return Scores(rows=tuple(rows), decimals=given["decimals"], all=True)
