"""The tokens of the prompt: what a head brings from each, and how log p grows at each."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tables import LOG_PROB_COLUMNS, POSITION_COLUMNS
from tl_neuron_attr.views.checks import checked, unique
from tl_neuron_attr.views.style import (
    DIVERGING,
    GAP,
    GREY,
    RISE,
    SEQUENTIAL,
    SIGNS,
    cells_of,
    colour_bar,
    finish,
    limit_of,
    shown_token,
    zero_line,
)

LABELLED_ROWS = 80
"""How many tokens of a prompt are named beside a figure."""


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
    positions = checked(positions, "positions", POSITION_COLUMNS, key=None)
    found = positions[["layer", "head"]].drop_duplicates()
    layer, head = (int(value) for value in found.iloc[0])
    if len(found) > 1:
        raise InputError(
            f"the positions table holds {len(found)} heads; draw one at a time, for example "
            f"positions(layer={layer}, head={head})"
        )
    positions = unique(positions, "positions", ["source_pos"])
    places = [int(place) for place in positions["source_pos"]]
    labels = _labels(places, positions["token"].tolist())
    scores = positions["score"].tolist()
    limit = limit_of(scores)
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
            "colorscale": SIGNS,
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
        marker={"color": GREY},
        customdata=labels,
        hovertemplate="%{customdata}<br>attention %{x:.3g}<extra></extra>",
        row=1,
        col=2,
    )
    default = f"What head L{layer}.H{head} brings from each token"
    finish(figure, title, default, height=_height(places))
    figure.update_layout(showlegend=False)
    _token_axis(figure, places, labels)
    figure.update_yaxes(title_text=None, showticklabels=False, col=2)
    figure.update_xaxes(title_text=RISE, nticks=7, col=1, **zero_line())
    figure.update_xaxes(
        title_text="attention weight", rangemode="tozero", nticks=4, col=2, **zero_line()
    )
    return figure


def log_prob_heatmap(
    log_probs: pd.DataFrame, *, quantity: str | None = None, title: str | None = None
) -> go.Figure:
    """One cell a layer and token: log p(target), in nats, if the run were read out there.

    Columns are what enters the first layer (``emb``) and what leaves each; rows are the tokens from
    top to bottom, as in ``position_bars``. The last column is the model's own prediction at each
    position, and its lowest cell what was attributed. Of a contrast, where values lie above 0, the
    colours are those of signs, centred on 0. ``quantity`` is what the numbers are called, where
    they are neither (``target.quantity``).

    Drawn from ``Attribution.log_probs()``.

    Raises:
        InputError: If ``log_probs`` is empty, lacks columns, or has two rows for one cell.
    """
    table = checked(
        log_probs, "log_probs", LOG_PROB_COLUMNS, key=["layer", "position"], value="log_prob"
    )
    # before all layers comes what enters the first
    stations = [-1 if pd.isna(layer) else int(layer) for layer in table["layer"]]
    grid = pd.DataFrame(
        {
            "station": stations,
            "position": table["position"].tolist(),
            "log_prob": table["log_prob"].tolist(),
        }
    ).pivot(index="position", columns="station", values="log_prob")
    token_of = dict(zip(table["position"], table["token"], strict=True))
    places = [int(place) for place in grid.index]
    labels = _labels(places, [token_of[place] for place in places])
    values = table["log_prob"].tolist()
    limit = limit_of(values)
    look, called = {"colorscale": SEQUENTIAL}, "log p(target)"
    if max(values) > 0:  # no log-probability is: these are differences of two
        look = {"colorscale": list(DIVERGING), "zmid": 0, "zmin": -limit, "zmax": limit}
        called = "Difference of log p"
    quantity = quantity or called
    figure = go.Figure(
        go.Heatmap(
            x=["emb" if station < 0 else str(station) for station in grid.columns],
            y=places,
            z=cells_of(grid),
            customdata=[[label] * len(grid.columns) for label in labels],
            **look,
            xgap=1,
            ygap=1 if len(places) <= LABELLED_ROWS else 0,
            hoverongaps=False,
            colorbar=colour_bar(f"{quantity}, nats"),
            hovertemplate="%{customdata}<br>after layer %{x}: %{z:.3g} nats<extra></extra>",
        )
    )
    default = f"{quantity} of the residual stream after each layer, at every token"
    finish(figure, title, default, height=_height(places, 9))
    if grid.isna().any().any():
        figure.update_layout(plot_bgcolor=GAP)
    _token_axis(figure, places, labels)
    figure.update_xaxes(
        title_text="after layer (emb: embedding)", type="category", showgrid=False, nticks=24
    )
    return figure


def _labels(places: Sequence[int], tokens: Sequence[str]) -> list[str]:
    return [f"{place}: {shown_token(token)}" for place, token in zip(places, tokens, strict=True)]


def _height(places: Sequence[int], at_least: int = 6) -> int:
    n_rows = places[-1] - places[0] + 1
    return 130 + 18 * max(at_least, min(n_rows, LABELLED_ROWS))


def _token_axis(figure: go.Figure, places: Sequence[int], labels: Sequence[str]) -> None:
    """Tokens from top to bottom, as many of them named as fit."""
    step = -(-(places[-1] - places[0] + 1) // LABELLED_ROWS)
    figure.update_yaxes(
        title_text="position: token",
        range=[places[-1] + 0.5, places[0] - 0.5],
        showgrid=False,
        zeroline=False,
        tickmode="array",
        tickvals=places[::step],
        ticktext=labels[::step],
    )
