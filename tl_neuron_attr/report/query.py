"""The page of ``query``: what set the value neurons off."""

import pandas as pd

from tl_neuron_attr.markup import Shown
from tl_neuron_attr.report.asked import (
    POSITIONS,
    SIGNS,
    Facts,
    asked,
    how_to_read,
    joined,
    named,
    origin,
    proof,
    quantity,
    signed,
    warned,
)
from tl_neuron_attr.report.listed import KINDS, called, neuron_labels, neuron_list, placed
from tl_neuron_attr.report.page import Section, page
from tl_neuron_attr.tables import Saved
from tl_neuron_attr.views import head_heatmap, layer_bars

HOW = (
    "Value neurons are those that write the answer. What sets one off is its pre-activation, a sum "
    "over everything written before: the embedding, each head, each FFN, biases. Each part gets "
    "that share of the neuron's own score, in nats, and the scores of all value neurons are added "
    "up. So a score here says: so many nats of the answer went through what this part fed.",
    "A query neuron is a neuron of an earlier layer with a large share. It need not say anything "
    "about the answer itself: it says it by the value neurons it sets off.",
    "A negative score is of a part that held value neurons back. Parts of a neuron add up to its "
    "whole score, so a large positive and a large negative one may stand side by side. A value "
    "neuron whose parts nearly cancel is ill-conditioned: its shares say nothing, and it is left "
    "out (in the published convention it is kept, as there).",
    SIGNS,
    POSITIONS,
)


def query_page(saved: Saved) -> str:
    """The whole page. Tables: ``query_layers, query_heads, query_neurons, query_values``."""
    tables, facts = saved.tables, saved.facts
    layers, neurons = tables["query_layers"], tables["query_neurons"]
    of = _value_neurons(facts["query"])
    return page(
        f"What set off the neurons behind {named(facts['target'])}",
        _findings(layers, neurons, tables["query_values"], facts),
        [
            *warned(facts["warnings"]),
            asked(facts, [f"Traced back: {of}."]),
            _layers(layers, tables["query_heads"], of),
            _neurons(neurons, facts),
            _values(tables["query_values"], of),
            *_proof(facts),
            how_to_read(*HOW),
            origin(facts, facts.get("again")),
        ],
    )


def _proof(facts: Facts) -> list[Section]:
    """Of the value neurons, where the best were asked for."""
    asked_for = facts["query"].get("for")
    kept = {
        kind: each for kind, each in facts["certificates"].items() if asked_for in (kind, "both")
    }
    return [proof(kept)] if kept else []


def _value_neurons(query: Facts) -> str:
    """Which value neurons were traced back."""
    if "of" in query:
        return f"the value neurons {joined(query['of'])}"
    kinds = {**KINDS, "both": "FFN and attention"}
    each = " of each kind" if query["for"] == "both" else ""
    return f"the {query['value_top']} best {kinds[query['for']]} value neurons{each}"


def _findings(
    layers: pd.DataFrame, neurons: pd.DataFrame, values: pd.DataFrame, facts: Facts
) -> list[str]:
    total = sum(layers["score"].tolist())
    of_kind = {str(kind): sum(rows["score"].tolist()) for kind, rows in layers.groupby("kind")}
    names = {"attn": "attention", "ffn": "FFNs", "embed": "the embedding", "bias": "biases"}
    parts = [
        f"{names[kind]} {signed(score)}"
        for kind, score in sorted(of_kind.items(), key=lambda each: -abs(each[1]))
        if score
    ]
    found = [
        f"The value neurons traced back bring {signed(total)} nats of {quantity(facts['target'])}"
        + (f"; of these come from {joined(parts)}." if parts else ".")
    ]
    inner = layers.loc[layers["kind"].isin(["attn", "ffn"])]
    if len(inner) and max(inner["score"]) > 0:
        best = inner.loc[inner["score"].idxmax()]
        found.append(
            f"The layer that feeds them most is {KINDS[best['kind']]} of layer {best['layer']} "
            f"({signed(best['score'])} nats)."
        )
    if len(neurons):
        best = neurons.sort_values("score", ascending=False, kind="stable").head(1)
        found[-1] += (
            f" The best query neuron is {neuron_labels(best)[0]} "
            f"({signed(best['score'].iloc[0])} nats)."
        )
    out = facts["query"]["left_out"]
    if out:
        found.append(
            f"{out} of {facts['query']['value_neurons']} value neurons are ill-conditioned and in "
            "none of these numbers."
        )
    return found


def _layers(layers: pd.DataFrame, heads: pd.DataFrame, of: str) -> Section:
    inner = layers.loc[layers["kind"].isin(["attn", "ffn"])]
    drawn = [
        layer_bars(inner.astype({"layer": int}), title=f"What feeds {of}, nats, by layer"),
        head_heatmap(heads, title=f"What feeds {of}, nats, by head"),
    ]
    shown = layers.assign(
        kind=called(layers["kind"], {**KINDS, "embed": "embedding", "bias": "biases"})
    )
    return Section(
        title="Layers and heads that feed them",
        items=[
            *drawn,
            Shown(
                caption="Every part, in the order they act; they add up to all that is traced back",
                table=shown,
                columns={"layer": "layer", "kind": "part", "score": "feeds them by, nats"},
            ),
        ],
    )


def _neurons(neurons: pd.DataFrame, facts: Facts) -> Section:
    kinds = [kind for kind in KINDS if kind in set(neurons["kind"])]
    if not kinds:
        return Section(
            title="Query neurons", text=["No neuron of the kind asked for comes before them."]
        )
    texts = facts["token_texts"]
    at = {} if "position" not in neurons else {"at": placed(neurons["position"], texts)}
    table = neurons.assign(**at)
    return Section(
        title="Query neurons",
        items=[
            neuron_list(
                f"The best {sum(table['kind'] == kind)} {KINDS[kind]} neurons that feed the value "
                "neurons",
                table.loc[table["kind"] == kind],
                {
                    **({"source_token": "reads from"} if kind == "attn" else {}),
                    "at": "where it feeds them most",
                    "score": "feeds them by, nats",
                    "coefficient": "coefficient",
                    "raises": "raises",
                    "lowers": "lowers",
                },
            )
            for kind in kinds
        ],
    )


def _values(values: pd.DataFrame, of: str) -> Section:
    return Section(
        title="The value neurons",
        text=[f"Traced back are {of}: one row for each pre-activation."],
        items=[
            neuron_list(
                "Value neurons and their pre-activations",
                values,
                {
                    "score": "its own rise, nats",
                    "input": "pre-activation",
                    "total": "value of it",
                    "absolute": "sum of its parts without signs",
                    "ill_conditioned": "ill-conditioned",
                    "left_out": "left out",
                },
            )
        ],
    )
