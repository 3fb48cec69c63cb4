"""Two runs side by side."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_neuron_attr.tables import (
    COMPARED_HEAD_COLUMNS,
    COMPARED_LAYER_COLUMNS,
    COMPARED_NEURON_COLUMNS,
)
from tl_neuron_attr.views.checks import checked, kinds_of
from tl_neuron_attr.views.heads import head_grid
from tl_neuron_attr.views.style import (
    GREY,
    KIND_COLOURS,
    KIND_NAMES,
    PALE,
    finish,
    layer_axis,
    neuron_labels,
    zero_line,
)


def compared_layer_bars(layers: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Attention above, FFN below: each layer's score in both runs, and the difference as a mark.

    Drawn from ``Comparison.layers()``. The original's bars are dark, the other run's pale.

    Raises:
        InputError: If ``layers`` is empty, lacks columns, or has two rows for one bar.
    """
    layers = checked(
        layers,
        "layers",
        COMPARED_LAYER_COLUMNS,
        key=["layer", "kind"],
        value="difference",
        source="Comparison.layers()",
    )
    kinds = kinds_of(layers)
    figure = make_subplots(rows=len(kinds), shared_xaxes=True, vertical_spacing=0.08)
    for row, kind in enumerate(kinds, start=1):
        rows = layers[layers["kind"] == kind]
        name = KIND_NAMES[kind]
        for column, run, colour in (
            ("score", "original", KIND_COLOURS[kind]),
            ("other_score", "other", PALE[kind]),
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
    finish(figure, title, "What each layer adds to log p(target), in two runs", height=520)
    # at a notebook's width the legend takes two lines
    figure.update_layout(height=545, margin_t=figure.to_dict()["layout"]["margin"]["t"] + 25)
    layer_axis(figure, layers["layer"].tolist())
    figure.update_xaxes(title_text=None)
    figure.update_xaxes(title_text="layer", row=len(kinds), col=1)
    for row, kind in enumerate(kinds, start=1):
        figure.update_yaxes(
            title_text=f"{KIND_NAMES[kind]}: rise, nats", row=row, col=1, **zero_line()
        )
    return figure


def compared_head_heatmap(heads: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """One cell a head: its score in the original less that in the other run, in nats.

    Drawn from ``Comparison.heads()``. Green heads bring more in the original. Heads that are not
    in the table are left grey.

    Raises:
        InputError: If ``heads`` is empty, lacks columns, or has two rows for one head.
    """
    heads = checked(
        heads,
        "heads",
        COMPARED_HEAD_COLUMNS,
        key=["layer", "head"],
        value="difference",
        source="Comparison.heads()",
    )
    quantity = "score less that in the other run, nats"
    return head_grid(heads, "difference", quantity, title, "Heads: the original less the other run")


def compared_neuron_scatter(neurons: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """One point a neuron: its score in the original above its score in the other run, in nats.

    Drawn from ``Comparison.neurons()``, or from several of them put together (with ``lowest``, of
    several prompts). On the line nothing changed; above it the original's score is higher.

    Raises:
        InputError: If ``neurons`` is empty or lacks columns.
    """
    neurons = checked(
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
        line={"color": GREY, "width": 1, "dash": "dot"},
        name="no difference",
        hoverinfo="skip",
    )
    for kind in kinds_of(neurons):
        rows = neurons.loc[neurons["kind"] == kind]
        figure.add_scatter(
            x=rows["other_score"].tolist(),
            y=rows["score"].tolist(),
            mode="markers",
            name=KIND_NAMES[kind],
            marker={
                "color": KIND_COLOURS[kind],
                "size": 8,
                "symbol": "circle" if kind == "attn" else "square",
                "opacity": 0.75,
            },
            customdata=neuron_labels(rows),
            hovertemplate="%{customdata}<br>original %{y:.3g}, other %{x:.3g} nats<extra></extra>",
        )
    finish(figure, title, "Scores of neurons in two runs", height=480)
    figure.update_xaxes(title_text="score in the other run, nats", **zero_line())
    figure.update_yaxes(title_text="score in the original, nats", **zero_line())
    return figure
