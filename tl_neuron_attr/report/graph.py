"""The page of ``graph``: the value neurons behind an answer, and what set them off."""

import pandas as pd

from tl_neuron_attr.markup import Shown, escaped
from tl_neuron_attr.report.asked import (
    POSITIONS,
    SIGNS,
    Facts,
    asked,
    how_to_read,
    named,
    origin,
    proof,
    quantity,
    signed,
    warned,
)
from tl_neuron_attr.report.listed import called
from tl_neuron_attr.report.page import Section, document, figure, page
from tl_neuron_attr.tables import Saved
from tl_neuron_attr.views import sankey

HOW = (
    "Read the picture from the right: the answer, then the value neurons that raise it by what "
    "they write, then tokens and earlier neurons that set those off. A ribbon is as wide as the "
    "nats it brings: green ribbons raise the answer, purple ones lower it.",
    "A value neuron hands its own score down to what it reads, by share of its pre-activation. So "
    "what enters a neuron on the left explains what leaves it on the right; where less enters, the "
    "rest was not drawn, and the table says where it comes from.",
    "Only the largest are drawn. Nodes were taken, largest first, until they held the share that "
    "was asked for, or until there were as many as allowed.",
    "An ill-conditioned neuron is one whose inputs nearly cancel: their shares would say nothing, "
    "and none are drawn.",
    SIGNS,
    POSITIONS,
)
_ROLES = {"value": "value neuron", "query": "query neuron", "both": "value and query neuron"}


def picture(nodes: pd.DataFrame, edges: pd.DataFrame) -> str:
    """A file with the diagram alone. From ``Graph.node_table()`` and ``Graph.edge_table()``."""
    (answer,) = nodes.loc[nodes["role"] == "answer", "label"]
    title = f"From the prompt to {answer}: who set off whom"
    body = f"<h1>{escaped(title)}</h1>\n{figure(sankey(nodes, edges), 'f0')}"
    return document(title, body, scripts=["figures.js"])


def graph_page(saved: Saved) -> str:
    """The whole page. Tables: ``nodes, edges``; ``facts``: ``graph`` of ``graph.json``."""
    tables, facts = saved.tables, saved.facts
    nodes, edges = tables["nodes"], tables["edges"]
    made = facts.get("made_with", {})
    target = {
        **facts["target"],
        "log_prob": facts["log_prob"],
        "embedding_log_prob": facts["embedding_log_prob"],
    }
    of = quantity(target)
    return page(
        f"From the prompt to {named(target)}: who set off whom",
        _findings(nodes, edges, of),
        [
            *warned(made.get("warnings", ())),
            Section(
                title="The graph",
                items=[sankey(nodes, edges, title=f"What flows through neurons to {of}, nats")],
            ),
            asked({**made, **facts, "target": target}, [_pruned(facts)]),
            _nodes(nodes),
            _edges(nodes, edges),
            *([proof(made["certificates"])] if "certificates" in made else []),
            how_to_read(*HOW),
            origin(made, made.get("again")),
        ],
    )


def _pruned(facts: Facts) -> str:
    kinds = {"ffn": "FFN", "attn": "attention", "both": "FFN and attention"}
    of = f"the best {kinds[facts['of']]} neurons" if facts["of"] in kinds else facts["of"]
    steps = "step" if facts["depth"] == 1 else "steps"
    return (
        f"Value neurons: {of}, at most {facts['max_values']} of up to {facts['ranked']:,} ranked "
        f"of a kind. Query neurons: {kinds[facts['kind']]}, {facts['depth']} {steps} back, at most "
        f"{facts['max_inputs']} inputs of each neuron"
        + (" and as many that hold it back" if facts["opposing"] else "")
        + f". Wanted was {facts['share']:.0%} of all there is to explain, as far as these limits "
        "let it."
    )


def _findings(nodes: pd.DataFrame, edges: pd.DataFrame, of: str) -> list[str]:
    answer = nodes.loc[nodes["role"] == "answer"].iloc[0]
    values = nodes.loc[nodes["role"].isin(["value", "both"])]
    inputs = nodes.loc[nodes["role"].isin(["query", "both", "token"])]
    held = "" if pd.isna(answer["reached"]) else f", {answer['reached']:.0%} of what raises it"
    found = [
        f"{len(values)} value neurons are drawn; together they raise {of} by "
        f"{signed(answer['explained'])} nats{held} among all that were ranked."
    ]
    if len(values):
        best = values.loc[values["score"].idxmax()]
        found[0] += f" The largest is {best['label']} ({signed(best['score'])} nats)."
    if len(inputs):
        best = inputs.loc[inputs["score"].idxmax()]
        what = "token" if best["role"] == "token" else "neuron"
        fed = int((edges["source"] == best["id"]).sum())
        found.append(
            f"What sets them off most is the {what} {best['label']}: it feeds {fed} "
            f"{'node' if fed == 1 else 'nodes'} that are drawn, by {signed(best['score'])} nats."
        )
    return found


def _nodes(nodes: pd.DataFrame) -> Section:
    rows = nodes.loc[nodes["role"] != "answer"]
    return Section(
        title="Nodes",
        text=[
            "Brings is what goes from a node to those it feeds; handed down is what its own inputs "
            "were asked to explain, and of it is drawn what the edges into it hold. The rest came "
            "from tokens, attention, FFNs or biases that are not drawn."
        ],
        items=[
            Shown(
                caption="Every node but the answer, in nats",
                table=rows.assign(role=called(rows["role"], {**_ROLES, "token": "token"})),
                columns={
                    "label": "node",
                    "role": "what it is",
                    "step": "steps from the answer",
                    "score": "brings, nats",
                    "handed_down": "handed down",
                    "explained": "of it drawn",
                    "rest_token": "rest: tokens",
                    "rest_attn": "rest: attention",
                    "rest_ffn": "rest: FFNs",
                    "rest_bias": "rest: biases",
                    "coefficient": "coefficient",
                    "left_out": "ill-conditioned",
                    "raises": "raises",
                    "lowers": "lowers",
                },
            )
        ],
    )


def _edges(nodes: pd.DataFrame, edges: pd.DataFrame) -> Section:
    labels = dict(zip(nodes["id"], nodes["label"], strict=True))
    table = edges.assign(
        source=called(edges["source"], labels), target=called(edges["target"], labels)
    )
    return Section(
        title="Edges",
        items=[
            Shown(
                caption="Every ribbon of the picture",
                table=table,
                columns={"source": "from", "target": "to", "weight": "brings, nats"},
            )
        ],
    )
