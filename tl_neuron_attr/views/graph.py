"""What set the value neurons off: the value-to-query graph as ribbons."""

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.graph import EDGE_COLUMNS, NODE_COLUMNS
from tl_neuron_attr.views.checks import checked, unique
from tl_neuron_attr.views.style import (
    GREY,
    KIND_COLOURS,
    escaped,
    finish,
    shortened,
    shown_token,
    signed,
)

_COLOURS = {**KIND_COLOURS, "token": GREY, "answer": "#222222"}
_NAMES = {"ffn": "FFN neuron", "attn": "attention neuron", "token": "token"}
_ROLES = {"both": "value and query neuron", "value": "value neuron", "query": "query neuron"}
# ribbons lie on each other; the rarer and darker sign is to be seen on top
_RIBBONS = {1: "rgba(27, 120, 55, 0.32)", -1: "rgba(118, 42, 131, 0.5)"}
_WIDTH = 700
# zooming and panning would move axes that are there for the legend's sake alone
_NO_BUTTONS = ("zoom", "pan", "select", "lasso", "zoomin", "zoomout", "autoscale", "resetscale")


def sankey(nodes: pd.DataFrame, edges: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """The value-to-query graph: what flows through tokens and neurons to the answer, in nats.

    From left to right: what sets neurons off, the value neurons, the answer. Ribbons are as wide
    as the nats they bring, green where they raise log p(target), purple where they lower it. A bar
    is as high as the larger of what enters and what leaves it: where less enters, the rest was not
    drawn. Labels are cut to fit 700 pixels; hovering shows them whole, with all numbers.

    Drawn from ``Graph.node_table()`` and ``Graph.edge_table()``.

    Raises:
        InputError: If a table is empty, lacks columns, or has two rows for one node or edge; if an
            edge is of a node that is not there, or edges run in a circle.
    """
    nodes, edges = _checked(nodes, edges)
    columns = _columns_from_answer(edges)
    # beside its bar: in front of it there are labels of value neurons
    answer = shortened(", ".join(nodes.loc[nodes["kind"] == "answer", "label"]), 24)
    beside = 30 + 8 * len(answer)
    fits = int((_WIDTH - 20 - beside) / max(1, max(columns.values())) / 6.5) - 3
    figure = go.Figure(
        go.Sankey(
            arrangement="snap",
            valueformat=".3g",
            textfont={"size": 12, "color": "#222222"},
            node=_bars(nodes, fits),
            link=_ribbons(nodes, edges),
        )
    )
    _legend_entry(figure, "raises", _RIBBONS[1], "square")
    if min(edges["weight"].tolist()) < 0:
        _legend_entry(figure, "lowers", _RIBBONS[-1], "square")
    for kind in [kind for kind in _NAMES if kind in set(nodes["kind"])]:
        _legend_entry(figure, _NAMES[kind], _COLOURS[kind], "line-ns")
    figure.add_annotation(
        x=1,
        xref="paper",
        xanchor="left",
        y=0.5,
        yref="paper",
        text=f"<b>{escaped(answer)}</b>",
        font={"size": 14, "color": "#222222"},
        showarrow=False,
    )
    rows = max(Counter(columns.values()).values())
    default = f"What raises {answer}, and what sets that off, in nats"
    finish(figure, title, default, height=110 + 36 * max(6, rows))
    figure.update_layout(margin={"l": 20, "r": beside, "b": 25}, dragmode=False)
    figure.update_layout(modebar_remove=list(_NO_BUTTONS))
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _checked(nodes: pd.DataFrame, edges: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables, once they are known to be one graph's."""
    nodes = checked(nodes, "nodes", NODE_COLUMNS, key=None, source="Graph.node_table()")
    edges = checked(edges, "edges", EDGE_COLUMNS, key=None, value=None, source="Graph.edge_table()")
    unique(nodes, "nodes", ["id"])
    unique(edges, "edges", ["source", "target"])
    astray = sorted({*edges["source"], *edges["target"]} - set(nodes["id"]))
    if astray:
        raise InputError(
            f"the edges table names {astray[0]!r}, which is not in the nodes table; give both "
            "tables of one graph"
        )
    unknown = sorted(set(nodes["kind"]) - _COLOURS.keys())
    if unknown:
        raise InputError(f"kind must be one of {', '.join(_COLOURS)}, got {unknown[0]}")
    return nodes.reset_index(drop=True), edges


def _bars(nodes: pd.DataFrame, fits: int) -> dict[str, Any]:
    """A bar a node, its label cut to ``fits`` characters."""
    return {
        "align": "right",
        "label": [
            "" if kind == "answer" else escaped(shortened(label, fits))
            for kind, label in zip(nodes["kind"], nodes["label"], strict=True)
        ],
        "color": [_COLOURS[kind] for kind in nodes["kind"]],
        "customdata": [_about(node) for node in nodes.to_dict("records")],
        "hovertemplate": "%{customdata}<extra></extra>",
        "pad": 18,
        "thickness": 12,
        "line": {"width": 0},
    }


def _ribbons(nodes: pd.DataFrame, edges: pd.DataFrame) -> dict[str, Any]:
    """A ribbon an edge."""
    place = {name: number for number, name in enumerate(nodes["id"])}
    labels = dict(zip(nodes["id"], nodes["label"], strict=True))
    weights = [float(weight) for weight in edges["weight"]]
    ends = list(zip(edges["source"], edges["target"], weights, strict=True))
    return {
        "source": [place[name] for name in edges["source"]],
        "target": [place[name] for name in edges["target"]],
        "value": [abs(weight) for weight in weights],
        "color": [_RIBBONS[-1 if weight < 0 else 1] for weight in weights],
        "customdata": [
            f"{escaped(labels[source])} → {escaped(labels[target])}<br>{signed(weight)} nats"
            for source, target, weight in ends
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _columns_from_answer(edges: pd.DataFrame) -> dict[str, int]:
    """How many edges lie, at the most, between each node and the answer.

    Raises:
        InputError: If edges run in a circle: then there is no such number.
    """
    sources: dict[str, list[str]] = {}
    for source, target in zip(edges["source"], edges["target"], strict=True):
        sources.setdefault(target, []).append(source)
    columns: dict[str, int] = {}
    here = set(edges["target"]) - set(edges["source"])
    for column in range(len(edges) + 1):
        columns |= dict.fromkeys(here, column)
        here = {source for target in here for source in sources.get(target, [])}
    if here or not columns:
        raise InputError("the edges table runs in a circle; give the edges of one graph")
    return columns


def _about(node: Mapping[Hashable, Any]) -> str:
    """What hovering over a node shows."""
    lines = [f"<b>{escaped(node['label'])}</b>"]
    if node["kind"] == "answer":
        lines.append(f"value neurons drawn: {signed(node['explained'])} nats")
        lines.append(f"all that were ranked: {signed(node['handed_down'])} nats")
        return "<br>".join(lines)
    lines.append(_ROLES.get(node["role"], "token"))
    lines.append(f"brings {signed(node['score'])} nats")
    if node["left_out"]:
        lines.append("ill-conditioned: its inputs nearly cancel")
    elif node["handed_down"]:
        lines.append(
            f"inputs drawn: {signed(node['explained'])} of {signed(node['handed_down'])} nats"
        )
    for name in ("raises", "lowers"):
        if len(node.get(name, ())):
            tokens = " ".join(shown_token(token) for token in node[name])
            lines.append(f"{name} {tokens}")
    return "<br>".join(lines)


def _legend_entry(figure: go.Figure, name: str, colour: str, symbol: str) -> None:
    """A line of the legend, which a Sankey diagram does not have of itself."""
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        name=name,
        showlegend=True,
        hoverinfo="skip",
        marker={
            "color": colour,
            "symbol": symbol,
            "size": 12,
            "line": {"width": 4 if symbol == "line-ns" else 0, "color": colour},
        },
    )
