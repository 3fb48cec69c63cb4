"""What comes from each token of the prompt."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tables import POSITION_COLUMNS
from tl_neuron_attr.views.checks import checked, unique
from tl_neuron_attr.views.style import (
    GREY,
    RISE,
    SIGNS,
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
    labels = [
        f"{place}: {shown_token(token)}"
        for place, token in zip(places, positions["token"], strict=True)
    ]
    n_rows = places[-1] - places[0] + 1
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
    height = 130 + 18 * max(6, min(n_rows, LABELLED_ROWS))
    finish(figure, title, f"What head L{layer}.H{head} brings from each token", height=height)
    figure.update_layout(showlegend=False)
    step = -(-n_rows // LABELLED_ROWS)
    figure.update_yaxes(range=[places[-1] + 0.5, places[0] - 0.5], showgrid=False, zeroline=False)
    figure.update_yaxes(
        title_text="position: token",
        tickmode="array",
        tickvals=places[::step],
        ticktext=labels[::step],
        col=1,
    )
    figure.update_xaxes(title_text=RISE, nticks=7, col=1, **zero_line())
    figure.update_xaxes(
        title_text="attention weight", rangemode="tozero", nticks=4, col=2, **zero_line()
    )
    return figure
