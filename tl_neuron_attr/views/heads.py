"""What each attention head adds, and what is lost without it."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_neuron_attr.tables import HEAD_COLUMNS, HEAD_SCAN_COLUMNS
from tl_neuron_attr.views.checks import checked
from tl_neuron_attr.views.style import (
    CHANGE,
    DIVERGING,
    GAP,
    RISE,
    colour_bar,
    finish,
    layer_axis,
    limit_of,
    tick_step,
)


def head_heatmap(heads: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """One cell a head, layers from left to right: the rise in log p(target) from it, in nats.

    Drawn from ``Attribution.heads()``. The colour scale is symmetrical about 0. Heads that are not
    in the table (after ``heads(top=...)``) are left grey, so that they do not look like zeros.

    Raises:
        InputError: If ``heads`` is empty, lacks columns, or has two rows for one head.
    """
    heads = checked(heads, "heads", HEAD_COLUMNS, key=["layer", "head"])
    return head_grid(heads, "score", RISE, title, "What each attention head adds to log p(target)")


def head_scan_heatmap(changes: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """One cell a head: the change of log p(target), in nats, when that head alone is zeroed.

    Drawn from ``tables.head_scan_table(head_scan(...))``. Purple heads helped: without them the
    target is less probable.

    Raises:
        InputError: If ``changes`` is empty, lacks columns, or has two rows for one head.
    """
    changes = checked(
        changes,
        "head scan",
        HEAD_SCAN_COLUMNS,
        key=["layer", "head"],
        value="change",
        source="tables.head_scan_table(head_scan(...))",
    )
    return head_grid(changes, "change", CHANGE, title, "log p(target) without each attention head")


def head_grid(
    heads: pd.DataFrame, column: str, quantity: str, title: str | None, default: str
) -> go.Figure:
    """A cell a head, by ``column``, which says ``quantity``; grey where the table has no row."""
    n_layers, n_heads = max(heads["layer"].tolist()) + 1, max(heads["head"].tolist()) + 1
    limit = limit_of(heads[column].tolist())
    grid = np.full((n_heads, n_layers), None, dtype=object)
    grid[heads["head"].tolist(), heads["layer"].tolist()] = heads[column].tolist()
    figure = go.Figure(
        go.Heatmap(
            x=list(range(n_layers)),
            y=list(range(n_heads)),
            z=grid.tolist(),
            colorscale=list(DIVERGING),
            zmid=0,
            zmin=-limit,
            zmax=limit,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            colorbar=colour_bar(quantity),
            hovertemplate="layer %{x}, head %{y}: %{z:.3g} nats<extra></extra>",
        )
    )
    height = max(380, 130 + 15 * n_heads)
    finish(figure, title, default, height=height)
    if len(heads) < grid.size:
        figure.update_layout(plot_bgcolor=GAP)
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(
        title_text="head",
        showgrid=False,
        zeroline=False,
        range=[-0.5, n_heads - 0.5],
        tick0=0,
        dtick=tick_step(n_heads, (height - 130) // 15),
    )
    layer_axis(figure, range(n_layers))
    return figure
