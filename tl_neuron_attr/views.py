"""How it looks: tables -> plotly figures, drawn from tables alone, never from a model.

Every function takes one table of ``tables.py`` (``sankey`` the two of a ``Graph``), fresh or read
back from disk, and returns a ``plotly.graph_objects.Figure`` that is neither shown nor tied to a
global theme. Layers run from left to right in all of them. Green raises log p(target) and purple
lowers it.

``title`` is plain text, not HTML; by default it says what is drawn, and ``""`` leaves it out.
"""

import html
import textwrap
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.graph import EDGE_COLUMNS, NODE_COLUMNS
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.prompts import visible
from tl_neuron_attr.tables import (
    COMPARED_LAYER_COLUMNS,
    COMPARED_NEURON_COLUMNS,
    CURVE_COLUMNS,
    HEAD_COLUMNS,
    HEAD_SCAN_COLUMNS,
    LAYER_COLUMNS,
    NEURON_COLUMNS,
    POSITION_COLUMNS,
)

RISE = "rise in log p(target), nats"
CHANGE = "change of log p(target), nats"
KIND_NAMES = {"attn": "attention", "ffn": "FFN"}

# Paul Tol's high-contrast pair: told apart in every kind of colour blindness, and in grey
_KIND_COLOURS = {"attn": "#004488", "ffn": "#DDAA33"}
# Paul Tol's PRGn, colour-blind safe; plotly's own PRGn ends so dark that both signs look black
_DIVERGING = (
    "#762A83",
    "#9970AB",
    "#C2A5CF",
    "#E7D4E8",
    "#F7F7F7",
    "#D9F0D3",
    "#ACD39E",
    "#5AAE61",
    "#1B7837",
)
# length already says how much: bars only need the sign, and pale ones cannot be read
_SIGNS = [[0, _DIVERGING[0]], [0.5, _DIVERGING[0]], [0.5, _DIVERGING[-1]], [1, _DIVERGING[-1]]]
_PALE = {"attn": "#99BBDD", "ffn": "#F2E0B5"}
_GREY = "#777777"
_NODE_COLOURS = {**_KIND_COLOURS, "token": _GREY, "answer": "#222222"}
_NODE_NAMES = {"ffn": "FFN neuron", "attn": "attention neuron", "token": "token"}
# ribbons lie on each other; the rarer and darker sign is to be seen on top
_RIBBONS = {1: "rgba(27, 120, 55, 0.32)", -1: "rgba(118, 42, 131, 0.5)"}
_SANKEY_WIDTH = 900
# Paul Tol's muted scheme, for up to nine methods
_METHOD_COLOURS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#DDCC77",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
)
_CONTROLS = ("random", "norm_matched")
_DASHES = {"random": "dash", "norm_matched": "dashdot"}
_WHICH = {
    "ffn": "FFN neurons",
    "attn": "attention neurons",
    "both": "FFN and as many attention neurons",
}
_METRIC_AXES = {
    "reciprocal_rank": "mean reciprocal rank of the answer",
    "prob": "mean probability of the answer",
    "log_prob": "mean log p(answer), nats",
}
_GAP = "#C8C8C8"
_LABELLED_ROWS = 80
_TOKEN_CHARS = 18


def layer_bars(layers: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Two bars a layer: the rise in log p(target), in nats, from its attention and its FFN.

    Drawn from ``Attribution.layers()``. Over all layers the bars add up to the rise from the
    embedding to the final residual, except in parallel blocks, where the sum says nothing.

    Raises:
        InputError: If ``layers`` is empty, lacks columns, or has two rows for one bar.
    """
    layers = _checked(layers, "layers", LAYER_COLUMNS, key=["layer", "kind"])
    figure = go.Figure()
    for kind in _kinds(layers):
        rows = layers[layers["kind"] == kind]
        figure.add_bar(
            x=rows["layer"].tolist(),
            y=rows["score"].tolist(),
            name=KIND_NAMES[kind],
            showlegend=True,  # plotly would leave a kind that is alone without its name
            marker_color=_KIND_COLOURS[kind],
            hovertemplate=f"layer %{{x}}, {KIND_NAMES[kind]}: %{{y:.3g}} nats<extra></extra>",
        )
    _finish(figure, title, "What each layer adds to log p(target)", height=380)
    figure.update_yaxes(title_text=RISE, **_zero_line())
    _layer_axis(figure, layers["layer"].tolist())
    return figure


def head_heatmap(heads: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """One cell a head, layers from left to right: the rise in log p(target) from it, in nats.

    Drawn from ``Attribution.heads()``. The colour scale is symmetrical about 0. Heads that are not
    in the table (after ``heads(top=...)``) are left grey, so that they do not look like zeros.

    Raises:
        InputError: If ``heads`` is empty, lacks columns, or has two rows for one head.
    """
    heads = _checked(heads, "heads", HEAD_COLUMNS, key=["layer", "head"])
    return _head_grid(heads, "score", RISE, title, "What each attention head adds to log p(target)")


def head_scan_heatmap(changes: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """One cell a head: the change of log p(target), in nats, when that head alone is zeroed.

    Drawn from ``tables.head_scan_table(head_scan(...))``. Purple heads helped: without them the
    target is less probable.

    Raises:
        InputError: If ``changes`` is empty, lacks columns, or has two rows for one head.
    """
    changes = _checked(
        changes,
        "head scan",
        HEAD_SCAN_COLUMNS,
        key=["layer", "head"],
        value="change",
        source="tables.head_scan_table(head_scan(...))",
    )
    return _head_grid(changes, "change", CHANGE, title, "log p(target) without each attention head")


def _head_grid(
    heads: pd.DataFrame, column: str, quantity: str, title: str | None, default: str
) -> go.Figure:
    n_layers, n_heads = max(heads["layer"].tolist()) + 1, max(heads["head"].tolist()) + 1
    limit = _limit(heads[column].tolist())
    grid = np.full((n_heads, n_layers), None, dtype=object)
    grid[heads["head"].tolist(), heads["layer"].tolist()] = heads[column].tolist()
    figure = go.Figure(
        go.Heatmap(
            x=list(range(n_layers)),
            y=list(range(n_heads)),
            z=grid.tolist(),
            colorscale=list(_DIVERGING),
            zmid=0,
            zmin=-limit,
            zmax=limit,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            colorbar={"title": {"text": quantity, "side": "right"}, "thickness": 14},
            hovertemplate="layer %{x}, head %{y}: %{z:.3g} nats<extra></extra>",
        )
    )
    height = max(380, 130 + 15 * n_heads)
    _finish(figure, title, default, height=height)
    if len(heads) < grid.size:
        figure.update_layout(plot_bgcolor=_GAP)
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(
        title_text="head",
        showgrid=False,
        zeroline=False,
        range=[-0.5, n_heads - 0.5],
        tick0=0,
        dtick=_tick_step(n_heads, (height - 130) // 15),
    )
    _layer_axis(figure, range(n_layers))
    return figure


def position_bars(positions: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """One row a token of the prompt: what one head brings from there, and how much it attends.

    On the left the rise in log p(target), in nats; on the right the attention weight (0 to 1) that
    the read position gives the token. Tokens read from top to bottom, as ``3: ·France``, with ``·``
    for a space and ``⏎`` for a newline. The figure grows with the prompt up to 80 tokens; beyond
    that only some rows keep their label (hovering names every one).

    Drawn from ``Attribution.positions(layer, head)``.

    Raises:
        InputError: If ``positions`` is empty, lacks columns, holds more than one head, or has two
            rows for one position.
    """
    positions = _checked(positions, "positions", POSITION_COLUMNS, key=None)
    found = positions[["layer", "head"]].drop_duplicates()
    layer, head = (int(value) for value in found.iloc[0])
    if len(found) > 1:
        raise InputError(
            f"the positions table holds {len(found)} heads; draw one at a time, for example "
            f"positions(layer={layer}, head={head})"
        )
    positions = _unique(positions, "positions", ["source_pos"])
    places = [int(place) for place in positions["source_pos"]]
    labels = [
        f"{place}: {_escaped(_shortened(visible(token) or '(empty)'))}"
        for place, token in zip(places, positions["token"], strict=True)
    ]
    n_rows = places[-1] - places[0] + 1
    scores = positions["score"].tolist()
    limit = _limit(scores)
    figure = make_subplots(
        cols=2, shared_yaxes=True, column_widths=[0.68, 0.32], horizontal_spacing=0.04
    )
    figure.add_bar(
        x=scores,
        y=places,
        name="score",
        orientation="h",
        marker={
            "color": scores,
            "colorscale": _SIGNS,
            "cmid": 0,
            "cmin": -limit,
            "cmax": limit,
        },
        customdata=labels,
        hovertemplate="%{customdata}<br>%{x:.3g} nats<extra></extra>",
        row=1,
        col=1,
    )
    figure.add_bar(
        x=positions["attention"].tolist(),
        y=places,
        name="attention",
        orientation="h",
        marker={"color": _GREY},
        customdata=labels,
        hovertemplate="%{customdata}<br>attention %{x:.3g}<extra></extra>",
        row=1,
        col=2,
    )
    height = 130 + 18 * max(6, min(n_rows, _LABELLED_ROWS))
    _finish(figure, title, f"What head L{layer}.H{head} brings from each token", height=height)
    figure.update_layout(showlegend=False)
    step = -(-n_rows // _LABELLED_ROWS)
    figure.update_yaxes(range=[places[-1] + 0.5, places[0] - 0.5], showgrid=False, zeroline=False)
    figure.update_yaxes(
        title_text="position: token",
        tickmode="array",
        tickvals=places[::step],
        ticktext=labels[::step],
        col=1,
    )
    figure.update_xaxes(title_text=RISE, nticks=7, col=1, **_zero_line())
    figure.update_xaxes(
        title_text="attention weight", rangemode="tozero", nticks=4, col=2, **_zero_line()
    )
    return figure


def neuron_histogram(
    neurons: pd.DataFrame,
    top: int | None = None,
    *,
    n_layers: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """How many of the best neurons of each kind lie in each layer.

    Drawn from ``Attribution.neurons()``, or from such tables of several prompts put together; then
    the neurons of all prompts are counted.

    Args:
        neurons: Neurons of one role (value or query).
        top: How many of each kind and prompt to count, by rank; by default all in the table.
        n_layers: The model's number of layers; by default the axis ends at the last layer that
            has a neuron in the table.

    Raises:
        InputError: If ``neurons`` is empty, lacks columns, mixes roles, ranks fewer than ``top``
            of a kind, or has a layer beyond ``n_layers``.
    """
    neurons = _checked(neurons, "neurons", NEURON_COLUMNS, key=None, finite=False)
    roles = sorted(str(role) for role in neurons["role"].unique())
    if len(roles) > 1:
        raise InputError(
            f"the neurons table mixes the roles {', '.join(roles)}; draw one at a time, for "
            f"example neurons[neurons['role'] == {roles[0]!r}]"
        )
    last_layer = max(neurons["layer"].tolist())
    if n_layers is not None:
        if last_layer >= n_layers:
            raise InputError(
                f"the neurons table has layer {last_layer}, but n_layers is {n_layers}"
            )
        last_layer = n_layers - 1
    kinds = _kinds(neurons)
    if top is not None:
        neurons = _best(neurons, top)
    n_prompts = len(set(neurons["prompt_id"].tolist()))
    most = 0
    figure = go.Figure()
    for kind in kinds:
        found = Counter(neurons["layer"][neurons["kind"] == kind].tolist())
        most = max(most, *found.values())
        figure.add_bar(
            x=list(range(last_layer + 1)),
            y=[found[layer] for layer in range(last_layer + 1)],
            name=KIND_NAMES[kind],
            showlegend=True,  # plotly would leave a kind that is alone without its name
            marker_color=_KIND_COLOURS[kind],
            hovertemplate=f"layer %{{x}}, {KIND_NAMES[kind]}: %{{y}} neurons<extra></extra>",
        )
    which = "ranked" if top is None else f"top {top}"
    of_prompts = f" of {n_prompts} prompts" if n_prompts > 1 else ""
    default = f"Layers of the {which} {roles[0]} neurons of each kind{of_prompts}"
    _finish(figure, title, default, height=380)
    figure.update_yaxes(
        title_text="number of neurons", tick0=0, dtick=_tick_step(most, 8), **_zero_line()
    )
    _layer_axis(figure, range(last_layer + 1))
    return figure


def sankey(nodes: pd.DataFrame, edges: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """The value-to-query graph: what flows through tokens and neurons to the answer, in nats.

    From left to right: what sets neurons off, the value neurons, the answer. Ribbons are as wide
    as the nats they bring, green where they raise log p(target), purple where they lower it. A bar
    is as high as the larger of what enters and what leaves it: where less enters, the rest was not
    drawn. Labels are cut to fit 900 pixels; hovering shows them whole, with all numbers.

    Drawn from ``Graph.node_table()`` and ``Graph.edge_table()``.

    Raises:
        InputError: If a table is empty, lacks columns, or has two rows for one node or edge; if an
            edge is of a node that is not there, or edges run in a circle.
    """
    nodes = _checked(
        nodes, "nodes", NODE_COLUMNS, key=None, maker="Graph.node_table()"
    ).reset_index(drop=True)
    edges = _checked(
        edges, "edges", EDGE_COLUMNS, key=None, finite=False, maker="Graph.edge_table()"
    )
    _unique(nodes, "nodes", ["id"])
    _unique(edges, "edges", ["source", "target"])
    place = {name: number for number, name in enumerate(nodes["id"])}
    astray = sorted({*edges["source"], *edges["target"]} - place.keys())
    if astray:
        raise InputError(
            f"the edges table names {astray[0]!r}, which is not in the nodes table; give both "
            "tables of one graph"
        )
    unknown = sorted(set(nodes["kind"]) - _NODE_COLOURS.keys())
    if unknown:
        raise InputError(f"kind must be one of {', '.join(_NODE_COLOURS)}, got {unknown[0]}")
    columns = _columns_from_answer(edges)
    # beside its bar: in front of it there are labels of value neurons
    answer = _shortened(", ".join(nodes.loc[nodes["kind"] == "answer", "label"]), 24)
    beside = 30 + 8 * len(answer)
    fits = int((_SANKEY_WIDTH - 20 - beside) / max(1, max(columns.values())) / 6.5) - 3
    weights = [float(weight) for weight in edges["weight"]]
    labels = dict(zip(nodes["id"], nodes["label"], strict=True))
    rows = max(Counter(columns.values()).values())
    figure = go.Figure(
        go.Sankey(
            arrangement="snap",
            valueformat=".3g",
            textfont={"size": 12, "color": "#222222"},
            node={
                "align": "right",
                "label": [
                    "" if kind == "answer" else _escaped(_shortened(label, fits))
                    for kind, label in zip(nodes["kind"], nodes["label"], strict=True)
                ],
                "color": [_NODE_COLOURS[kind] for kind in nodes["kind"]],
                "customdata": [_about(node) for node in nodes.to_dict("records")],
                "hovertemplate": "%{customdata}<extra></extra>",
                "pad": 18,
                "thickness": 12,
                "line": {"width": 0},
            },
            link={
                "source": [place[name] for name in edges["source"]],
                "target": [place[name] for name in edges["target"]],
                "value": [abs(weight) for weight in weights],
                "color": [_RIBBONS[-1 if weight < 0 else 1] for weight in weights],
                "customdata": [
                    f"{_escaped(labels[source])} → {_escaped(labels[target])}"
                    f"<br>{_signed(weight)} nats"
                    for source, target, weight in zip(
                        edges["source"], edges["target"], weights, strict=True
                    )
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
            },
        )
    )
    kinds = [kind for kind in _NODE_NAMES if kind in set(nodes["kind"])]
    _legend_entry(figure, "raises", _RIBBONS[1], "square")
    if min(weights) < 0:
        _legend_entry(figure, "lowers", _RIBBONS[-1], "square")
    for kind in kinds:
        _legend_entry(figure, _NODE_NAMES[kind], _NODE_COLOURS[kind], "line-ns")
    figure.add_annotation(
        x=1,
        xref="paper",
        xanchor="left",
        y=0.5,
        yref="paper",
        text=f"<b>{_escaped(answer)}</b>",
        font={"size": 14, "color": "#222222"},
        showarrow=False,
    )
    default = f"What raises {answer}, and what sets that off, in nats"
    _finish(figure, title, default, height=110 + 36 * max(6, rows))
    figure.update_layout(margin={"l": 20, "r": beside, "b": 25}, dragmode=False)
    # axes are there for the legend's sake alone
    for_axes = ("zoom", "pan", "select", "lasso", "zoomin", "zoomout", "autoscale", "resetscale")
    figure.update_layout(modebar_remove=list(for_axes))
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


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


def _about(node: dict[Hashable, Any]) -> str:
    """What hovering over a node shows."""
    lines = [f"<b>{_escaped(node['label'])}</b>"]
    if node["kind"] == "answer":
        lines.append(f"value neurons drawn: {_signed(node['explained'])} nats")
        lines.append(f"all that were ranked: {_signed(node['handed_down'])} nats")
        return "<br>".join(lines)
    role = {"both": "value and query neuron", "value": "value neuron", "query": "query neuron"}
    lines.append(role.get(node["role"], "token"))
    lines.append(f"brings {_signed(node['score'])} nats")
    if node["left_out"]:
        lines.append("ill-conditioned: its inputs nearly cancel")
    elif node["handed_down"]:
        lines.append(
            f"inputs drawn: {_signed(node['explained'])} of {_signed(node['handed_down'])} nats"
        )
    for name in ("raises", "lowers"):
        if len(node.get(name, ())):
            tokens = " ".join(_escaped(_shortened(visible(token))) for token in node[name])
            lines.append(f"{name} {tokens}")
    return "<br>".join(lines)


def _signed(nats: float) -> str:
    return f"{nats:+.3g}".replace("-", "−")


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


def _shortened(text: str, length: int = _TOKEN_CHARS) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def compared_layer_bars(layers: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Attention above, FFN below: each layer's score in both runs, and the difference as a mark.

    Drawn from ``Comparison.layers()``. The original's bars are dark, the other run's pale.

    Raises:
        InputError: If ``layers`` is empty, lacks columns, or has two rows for one bar.
    """
    layers = _checked(
        layers,
        "layers",
        COMPARED_LAYER_COLUMNS,
        key=["layer", "kind"],
        value="difference",
        source="Comparison.layers()",
    )
    kinds = _kinds(layers)
    figure = make_subplots(rows=len(kinds), shared_xaxes=True, vertical_spacing=0.08)
    for row, kind in enumerate(kinds, start=1):
        rows = layers[layers["kind"] == kind]
        name = KIND_NAMES[kind]
        for column, run, colour in (
            ("score", "original", _KIND_COLOURS[kind]),
            ("other_score", "other", _PALE[kind]),
        ):
            figure.add_bar(
                x=rows["layer"].tolist(),
                y=rows[column].tolist(),
                name=f"{name}, {run}",
                marker_color=colour,
                hovertemplate=f"layer %{{x}}, {name}, {run}: %{{y:.3g}} nats<extra></extra>",
                row=row,
                col=1,
            )
        figure.add_scatter(
            x=rows["layer"].tolist(),
            y=rows["difference"].tolist(),
            mode="markers",
            name="difference",
            showlegend=row == 1,
            legendrank=2000,  # after the bars of both
            marker={"symbol": "diamond", "size": 8, "color": "black"},
            hovertemplate=f"layer %{{x}}, {name}: difference %{{y:.3g}} nats<extra></extra>",
            row=row,
            col=1,
        )
    _finish(figure, title, "What each layer adds to log p(target), in two runs", height=520)
    _layer_axis(figure, layers["layer"].tolist())
    figure.update_xaxes(title_text=None)
    figure.update_xaxes(title_text="layer", row=len(kinds), col=1)
    for row, kind in enumerate(kinds, start=1):
        figure.update_yaxes(
            title_text=f"{KIND_NAMES[kind]}: rise, nats", row=row, col=1, **_zero_line()
        )
    return figure


def compared_neuron_scatter(neurons: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """One point a neuron: its score in the original above its score in the other run, in nats.

    Drawn from ``Comparison.neurons()``, or from several of them put together (with ``lowest``, of
    several prompts). On the line nothing changed; above it the original's score is higher.

    Raises:
        InputError: If ``neurons`` is empty or lacks columns.
    """
    neurons = _checked(
        neurons,
        "neurons",
        COMPARED_NEURON_COLUMNS,
        key=None,
        value="difference",
        source="Comparison.neurons()",
    )
    ends = [*neurons["score"].tolist(), *neurons["other_score"].tolist(), 0.0]
    low, high = min(ends), max(ends)
    margin = 0.05 * ((high - low) or 1.0)
    figure = go.Figure()
    figure.add_scatter(
        x=[low - margin, high + margin],
        y=[low - margin, high + margin],
        mode="lines",
        line={"color": _GREY, "width": 1, "dash": "dot"},
        name="no difference",
        hoverinfo="skip",
    )
    for kind in _kinds(neurons):
        rows = neurons.loc[neurons["kind"] == kind]
        figure.add_scatter(
            x=rows["other_score"].tolist(),
            y=rows["score"].tolist(),
            mode="markers",
            name=KIND_NAMES[kind],
            marker={
                "color": _KIND_COLOURS[kind],
                "size": 8,
                "symbol": "circle" if kind == "attn" else "square",
                "opacity": 0.75,
            },
            customdata=_labels(rows),
            hovertemplate="%{customdata}<br>original %{y:.3g}, other %{x:.3g} nats<extra></extra>",
        )
    _finish(figure, title, "Scores of neurons in two runs", height=480)
    figure.update_xaxes(title_text="score in the other run, nats", **_zero_line())
    figure.update_yaxes(title_text="score in the original, nats", **_zero_line())
    return figure


def mask_curves(points: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """log p(target), in nats, by the number of neurons zeroed or kept: the mean of all prompts.

    Drawn from ``mask_curve(...)``, or from several such tables put together: one line for each kind
    and for masking and keeping. With several prompts each one's own line is drawn pale behind. The
    numbers of neurons stand side by side, whatever lies between them.

    Raises:
        InputError: If ``points`` is empty, lacks columns, or has two rows for one point.
    """
    points = _checked(
        points,
        "curve",
        CURVE_COLUMNS,
        key=["prompt_id", "kind", "keep", "top"],
        value="log_prob",
        source="mask_curve(...)",
    )
    tops = sorted(set(points["top"].tolist()))
    place = {top: number for number, top in enumerate(tops)}
    figure = go.Figure()
    for kind in _kinds(points):
        for keep in sorted(set(points["keep"].tolist())):
            rows = points[(points["kind"] == kind) & (points["keep"] == keep)]
            if rows.empty:
                continue
            prompts = sorted(set(rows["prompt_id"].tolist()))
            line = {"color": _KIND_COLOURS[kind], "dash": "dash" if keep else "solid"}
            for prompt_id in prompts if len(prompts) > 1 else []:
                of_prompt = rows[rows["prompt_id"] == prompt_id]
                figure.add_scatter(
                    x=[place[top] for top in of_prompt["top"].tolist()],
                    y=of_prompt["log_prob"].tolist(),
                    mode="lines",
                    line={**line, "width": 1},
                    opacity=0.55,
                    showlegend=False,
                    hoverinfo="skip",
                )
            name = f"{KIND_NAMES[kind]}, {'only the top kept' if keep else 'the top zeroed'}"
            mean = pd.DataFrame(rows.groupby("top", as_index=False).agg({"log_prob": "mean"}))
            figure.add_scatter(
                x=[place[top] for top in mean["top"].tolist()],
                y=mean["log_prob"].tolist(),
                mode="lines+markers",
                line={**line, "width": 3},
                marker={"size": 8},
                name=name,
                showlegend=True,
                customdata=mean["top"].tolist(),
                hovertemplate=f"{name} %{{customdata}}: %{{y:.3g}} nats<extra></extra>",
            )
    count = len(set(points["prompt_id"].tolist()))
    of_prompts = f", mean of {count} prompts" if count > 1 else ""
    default = f"log p(target) with only some neurons zeroed, or kept{of_prompts}"
    _finish(figure, title, default, height=420)
    figure.update_xaxes(
        title_text="number of neurons, the top of their ranking",
        tickmode="array",
        tickvals=[*place.values()],
        ticktext=[str(top) for top in tops],
        range=[-0.3, len(tops) - 0.7],
        zeroline=False,
    )
    figure.update_yaxes(title_text="log p(target), nats", **_zero_line())
    return figure


def effect_bars(
    summary: pd.DataFrame,
    metric: str = "prob",
    *,
    top: int | None = None,
    kind: str | None = None,
    knowledge_type: str = "all",
    title: str | None = None,
) -> go.Figure:
    """One bar a method: the answer's mean without its best neurons, with 95 % intervals.

    Drawn from ``Evaluation.summary()``. The dotted line is the mean with nothing zeroed; controls
    are grey. Where the table has several numbers of neurons or kinds, say which.

    Raises:
        InputError: If ``summary`` is empty, lacks columns, or has no such rows.
    """
    rows = _effects(
        summary,
        "summary",
        ("before", "after", "after_low", "after_high"),
        {"metric": metric, "top": top, "kind": kind, "knowledge_type": knowledge_type},
        value="after",
    )
    figure = go.Figure()
    for row in rows.to_dict("records"):
        mean, low, high = row["after"], row["after_low"], row["after_high"]
        figure.add_bar(
            x=[row["method"]],
            y=[mean],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [high - mean],
                "arrayminus": [mean - low],
                "thickness": 1.5,
                "color": "#222222",
            },
            marker_color=_GREY if row["method"] in _CONTROLS else _KIND_COLOURS["attn"],
            showlegend=False,
            hovertemplate=(
                f"%{{x}}: %{{y:.3g}}, 95 %: {low:.3g} to {high:.3g}, "
                f"{row['prompts']} prompts<extra></extra>"
            ),
        )
    before = float(np.mean(rows["before"].to_numpy(dtype=float)))
    figure.add_hline(y=before, line={"color": _GREY, "dash": "dot", "width": 1.5})
    default = (
        f"Without the top {int(rows['top'].iloc[0])} {_WHICH[str(rows['kind'].iloc[0])]}"
        f"{_of_type(knowledge_type)}; dotted: nothing zeroed"
    )
    _finish(figure, title, default, height=400)
    figure.update_yaxes(title_text=_METRIC_AXES[metric], **_zero_line())
    figure.update_xaxes(title_text="method", zeroline=False)
    return figure


def effect_curves(
    curves: pd.DataFrame,
    metric: str = "prob",
    *,
    kind: str | None = None,
    knowledge_type: str = "all",
    title: str | None = None,
) -> go.Figure:
    """One line a method: the answer's mean by the number of neurons zeroed, with 95 % bands.

    Drawn from ``Evaluation.curves()``. The numbers stand at log(1 + N), as areas under the curves
    are taken; controls are grey and dashed.

    Raises:
        InputError: If ``curves`` is empty, lacks columns, or has no such rows.
    """
    rows = _effects(
        curves,
        "curves",
        ("mean", "low", "high"),
        {"metric": metric, "kind": kind, "knowledge_type": knowledge_type},
        value="mean",
    )
    figure = go.Figure()
    methods = list(dict.fromkeys(rows["method"].tolist()))
    for method in methods:
        line = rows.loc[rows["method"] == method].sort_values("top", kind="stable")
        tops = line["top"].tolist()
        x = np.log1p(tops).tolist()
        colour = _method_colour(method, methods)
        figure.add_scatter(
            x=[*x, *reversed(x)],
            y=[*line["high"].tolist(), *reversed(line["low"].tolist())],
            fill="toself",
            mode="lines",
            line={"width": 0, "color": colour},
            fillcolor=colour,
            opacity=0.18,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=x,
            y=line["mean"].tolist(),
            mode="lines+markers",
            name=method,
            line={
                "color": colour,
                "width": 2.5,
                "dash": _DASHES.get(method) or _dash_of(method, methods),
            },
            marker={"size": 7},
            customdata=tops,
            hovertemplate=f"{method}, top %{{customdata}}: %{{y:.3g}}<extra></extra>",
        )
    tops = sorted(set(rows["top"].tolist()))
    kinds = _WHICH[str(rows["kind"].iloc[0])]
    default = f"Without the top N {kinds}{_of_type(knowledge_type)}, with 95 % intervals"
    _finish(figure, title, default, height=480)
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1})
    figure.update_layout(legend_yanchor="top")
    figure.update_xaxes(
        title_text=f"number of {kinds} zeroed, N",
        tickmode="array",
        tickvals=np.log1p(tops).tolist(),
        ticktext=[str(top) for top in tops],
        zeroline=False,
    )
    figure.update_yaxes(title_text=_METRIC_AXES[metric], **_zero_line())
    return figure


def effect_heatmap(
    summary: pd.DataFrame,
    metric: str = "prob",
    *,
    top: int | None = None,
    kind: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """One cell a knowledge type and method: the answer's mean without the method's best neurons.

    Drawn from ``Evaluation.summary()``. The first row is the mean with nothing zeroed. Where the
    table has several numbers of neurons or kinds, say which.

    Raises:
        InputError: If ``summary`` is empty, lacks columns, or has no such rows.
    """
    rows = _effects(
        summary,
        "summary",
        ("before", "after"),
        {"metric": metric, "top": top, "kind": kind},
        value="after",
    )
    types = list(dict.fromkeys(rows["knowledge_type"].tolist()))
    methods = list(dict.fromkeys(rows["method"].tolist()))
    after = rows.pivot(index="method", columns="knowledge_type", values="after")
    before = rows.groupby("knowledge_type")["before"].first()
    grid = [[before[name] for name in types]]
    grid += [[after.loc[method, name] for name in types] for method in methods]
    names = ["as it is", *methods]
    figure = go.Figure(
        go.Heatmap(
            x=types,
            y=names,
            z=grid,
            text=[[f"{value:.2f}" for value in row] for row in grid],
            texttemplate="%{text}",
            colorscale="Viridis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            colorbar={"title": {"text": _METRIC_AXES[metric], "side": "right"}, "thickness": 14},
            hovertemplate="%{y}, %{x}: %{z:.3g}<extra></extra>",
        )
    )
    default = f"Without the top {int(rows['top'].iloc[0])} {_WHICH[str(rows['kind'].iloc[0])]}"
    _finish(figure, title, f"{default}, by knowledge type", height=160 + 24 * len(names))
    figure.update_layout(plot_bgcolor=_GAP, margin_l=150)
    figure.update_xaxes(title_text="knowledge type", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, title_text="method")
    return figure


def predicted_scatter(
    predicted: pd.DataFrame,
    *,
    top: int | None = None,
    kind: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """One point a prompt: the predicted change of log p(answer) against the measured one, in nats.

    Drawn from ``Evaluation.predicted``, for those methods whose scores are nats; choose them
    beforehand. On the dotted line the sum of the scores of what was zeroed is what zeroing did.

    Raises:
        InputError: If ``predicted`` is empty, lacks columns, or has no such rows.
    """
    rows = _effects(
        predicted,
        "predicted",
        ("predicted", "measured"),
        {"top": top, "kind": kind},
        value="measured",
    )
    ends = [*rows["predicted"].tolist(), *rows["measured"].tolist(), 0.0]
    figure = go.Figure()
    figure.add_scatter(
        x=[min(ends), max(ends)],
        y=[min(ends), max(ends)],
        mode="lines",
        line={"color": _GREY, "width": 1, "dash": "dot"},
        name="as predicted",
        hoverinfo="skip",
    )
    methods = list(dict.fromkeys(rows["method"].tolist()))
    for method in methods:
        points = rows.loc[rows["method"] == method]
        figure.add_scatter(
            x=points["predicted"].tolist(),
            y=points["measured"].tolist(),
            mode="markers",
            name=method,
            marker={"color": _method_colour(method, methods), "size": 6, "opacity": 0.7},
            customdata=[_escaped(prompt_id) for prompt_id in points["prompt_id"].tolist()],
            hovertemplate=(
                "%{customdata}<br>predicted %{x:.3g}, measured %{y:.3g} nats<extra></extra>"
            ),
        )
    which = f"the top {int(rows['top'].iloc[0])} {_WHICH[str(rows['kind'].iloc[0])]}"
    _finish(figure, title, f"Change of log p without {which}, prompt by prompt", height=480)
    figure.update_xaxes(title_text="predicted: less the sum of scores, nats", **_zero_line())
    figure.update_yaxes(title_text="measured change of log p(answer), nats", **_zero_line())
    return figure


def _effects(
    table: pd.DataFrame,
    name: str,
    numbers: Sequence[str],
    wanted: dict[str, Any],
    *,
    value: str,
) -> pd.DataFrame:
    """The rows that are wanted, of one number of neurons and one kind, once they can be drawn."""
    keys = {"method", "kind", "top", *wanted}
    source = f"Evaluation.{name}" + ("" if name == "predicted" else "()")
    table = _checked(
        table, name, [*sorted(keys), *numbers], key=None, value=value, finite=False, source=source
    )
    for column, choice in wanted.items():
        found = list(dict.fromkeys(table[column].tolist()))
        if choice is None and len(found) > 1:
            raise InputError(
                f"the {name} table has several values of {column}: {', '.join(map(str, found))}; "
                f"say which is to be drawn, for example {column}={found[0]!r}"
            )
        if choice is not None and choice not in found:
            raise InputError(
                f"the {name} table has no {column} {choice!r}; there is "
                f"{', '.join(map(str, found))}"
            )
        table = table.loc[table[column] == (found[0] if choice is None else choice)]
    return table


def _of_type(knowledge_type: str) -> str:
    return "" if knowledge_type == "all" else f", {knowledge_type}"


def _method_colour(method: str, methods: Sequence[str]) -> str:
    if method in _CONTROLS:
        return _GREY
    return _METHOD_COLOURS[methods.index(method) % len(_METHOD_COLOURS)]


def _dash_of(method: str, methods: Sequence[str]) -> str:
    """Colours come round; the second time lines are dotted."""
    return "solid" if methods.index(method) < len(_METHOD_COLOURS) else "dot"


def _labels(neurons: pd.DataFrame) -> list[str]:
    """What each row's neuron is called."""
    sources = [None if pd.isna(source) else int(source) for source in neurons["source_pos"]]
    columns = (neurons[name].tolist() for name in ("kind", "layer", "head", "index"))
    return [
        str(FFNNeuron(layer, index) if kind == "ffn" else AttnNeuron(layer, head, index, source))
        for kind, layer, head, index, source in zip(*columns, sources, strict=True)
    ]


def _escaped(text: str) -> str:
    """Text that plotly shows as it is: no tags, no entities, and no formula between dollars."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def _checked(
    table: pd.DataFrame,
    name: str,
    columns: Sequence[str],
    *,
    key: list[str] | None,
    finite: bool = True,
    maker: str | None = None,
    value: str = "score",
    source: str | None = None,
) -> pd.DataFrame:
    """``table`` in order of its ``key``, once it is known to be one that can be drawn."""
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(
            f"a {name} table has the columns {', '.join(columns)}; this one lacks "
            f"{', '.join(missing)}: give the table of {maker or f'Attribution.{name}()'}"
            f"{', '.join(missing)}: give the table of {source or f'Attribution.{name}()'}"
        )
    if table.empty:
        raise InputError(f"the {name} table has no rows: there is nothing to draw")
    if finite:
        bad = int((~np.isfinite(table[value].to_numpy(dtype=float))).sum())
        if bad:
            raise InputError(f"{bad} {value}s of the {name} table are not finite; drop those rows")
    return table if key is None else _unique(table, name, key)


def _unique(table: pd.DataFrame, name: str, key: list[str]) -> pd.DataFrame:
    twice = table.loc[table.duplicated(key), key]
    if len(twice):
        where = ", ".join(f"{column} {twice.iloc[0][column]}" for column in key)
        raise InputError(
            f"the {name} table has more than one row for {where}; give the {name} of one prompt, "
            f"or average them first with groupby({key})"
        )
    return table.sort_values(key, kind="stable")


def _kinds(table: pd.DataFrame) -> list[str]:
    """The kinds in ``table``, in the order they act in a block."""
    found = set(table["kind"].tolist())
    unknown = sorted(str(kind) for kind in found - set(KIND_NAMES))
    if unknown:
        raise InputError(f"kind must be one of {', '.join(KIND_NAMES)}, got {', '.join(unknown)}")
    return [kind for kind in KIND_NAMES if kind in found]


def _best(neurons: pd.DataFrame, top: int) -> pd.DataFrame:
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    ranked: dict[tuple[str, str], int] = {}
    for prompt_id, kind, rank in zip(
        neurons["prompt_id"], neurons["kind"], neurons["rank"], strict=True
    ):
        ranked[prompt_id, kind] = max(rank, ranked.get((prompt_id, kind), 0))
    for (prompt_id, kind), count in ranked.items():
        if count < top:
            raise InputError(
                f"only {count} {kind} neurons of prompt {prompt_id!r} are ranked in the table, "
                f"fewer than top={top}; rank more with attribute(..., top={top}), or leave top out "
                "to count every row"
            )
    return neurons.loc[neurons["rank"] <= top]


def _limit(scores: Sequence[float]) -> float:
    """The end of a colour scale from ``-limit`` to ``limit``; 1 where all scores are 0."""
    return max(map(abs, scores)) or 1.0


def _tick_step(n_values: int, at_most: int) -> int:
    """How many values lie between two ticks, so that no more than ``at_most`` ticks are drawn."""
    step = 1
    for factor in (2, 2.5, 2) * 8:
        if n_values <= step * at_most:
            break
        step = int(step * factor)
    return step


def _zero_line() -> dict:
    return {"zeroline": True, "zerolinecolor": _GREY, "zerolinewidth": 1}


def _layer_axis(figure: go.Figure, layers: Sequence[int]) -> None:
    first, last = min(layers), max(layers)
    figure.update_xaxes(
        title_text="layer",
        range=[first - 0.5, last + 0.5],
        tick0=0,
        dtick=_tick_step(last - first + 1, 24),
    )


def _finish(figure: go.Figure, title: str | None, default: str, height: int) -> None:
    lines = textwrap.wrap(default if title is None else title, width=80)
    title_height = 22 * len(lines)
    figure.update_layout(
        template="plotly_white",
        height=height + title_height,
        margin={"l": 70, "r": 20, "t": 55 + title_height, "b": 55},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
        barmode="group",
    )
    # without the theme's white outline, which rubs out the zero line where bars are tiny
    figure.update_traces(marker_line_width=0, selector={"type": "bar"})
    # unseen ticks, which keep the labels off the plot
    figure.update_xaxes(ticks="outside", ticklen=4, tickcolor="white")
    figure.update_yaxes(ticks="outside", ticklen=4, tickcolor="white")
    if lines:
        figure.update_layout(
            title={
                "text": "<br>".join(_escaped(line) for line in lines),
                "font": {"size": 16},
                "x": 0.01,
                "xanchor": "left",
                "y": 1,
                "yanchor": "top",
                # below plotly's row of buttons; a second line would push the first one up
                "pad": {"t": 19 + 11 * len(lines)},
            }
        )
