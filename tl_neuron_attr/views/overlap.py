"""The neurons that prompts, or knowledge types, have in common."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_neuron_attr.across import OVERLAP_COLUMNS
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.views.checks import checked, kinds_of
from tl_neuron_attr.views.style import (
    GAP,
    KIND_NAMES,
    SEQUENTIAL,
    cells_of,
    colour_bar,
    ending,
    escaped,
    finish,
    name_margin,
)

_MEASURES = {"jaccard": ("shared / either's (0 to 1)", ".2f"), "shared": ("neurons shared", ".3g")}
_WRITTEN = 12
"""Up to how many rows a matrix has its numbers written in it, and its columns named."""
_NAMED = 30
"""How many rows of a matrix are named."""


def neuron_overlap(
    overlap: pd.DataFrame, measure: str = "jaccard", *, title: str | None = None
) -> go.Figure:
    """A matrix a kind: how many of their best neurons two prompts, or two knowledge types, share.

    As a part of all neurons that either has (Jaccard, 0 to 1), or with ``measure="shared"`` as
    their number; of types the mean over pairs of prompts. Of types that have neurons of their own
    the diagonal stands out; of prompts, which share all with themselves, it is left grey. Rows are
    in the order of the table, columns in that of rows.

    Drawn from ``overlap_table(...)``.

    Raises:
        InputError: If ``overlap`` is empty, lacks columns, or has two rows for one cell; if
            ``measure`` is unknown.
    """
    if measure not in _MEASURES:
        raise InputError(f"measure must be one of {', '.join(_MEASURES)}, got {measure!r}")
    table = checked(
        overlap,
        "overlap",
        OVERLAP_COLUMNS,
        key=["kind", "first", "second"],
        value=None,
        source="overlap_table(...)",
    )
    names = [str(name) for name in dict.fromkeys(overlap["first"].tolist())]
    kinds = kinds_of(table)
    of_types = str(table["by"].iloc[0]) == "knowledge_type"
    figure = make_subplots(
        cols=len(kinds),
        shared_yaxes=True,
        horizontal_spacing=0.06,
        subplot_titles=[f"{KIND_NAMES[kind]} neurons" for kind in kinds],
    )
    for column, kind in enumerate(kinds, start=1):
        cells = table.loc[table["kind"] == kind]
        if not of_types:
            cells = cells.loc[cells["first"] != cells["second"]]
        figure.add_trace(_matrix(cells, names, measure), row=1, col=column)
    quantity, _ = _MEASURES[measure]
    figure.update_layout(
        coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "colorbar": colour_bar(quantity)},
        plot_bgcolor=GAP,
    )
    axis, default = "prompt", "Neurons that prompts share among their best"
    if of_types:
        axis = "knowledge type"
        default = "Neurons that knowledge types share among their best: means over pairs of prompts"
    margin = name_margin(names)
    below = margin if len(names) <= _WRITTEN else 50
    finish(figure, title, default, height=110 + below + min(420, max(150, 26 * len(names))))
    figure.update_layout(margin={"l": margin, "b": below})
    _name_axes(figure, names, axis)
    return figure


def _matrix(cells: pd.DataFrame, names: list[str], measure: str) -> go.Heatmap:
    """One kind's."""
    grid = cells.pivot(index="first", columns="second", values=measure)
    places = list(range(len(names)))
    labels = [escaped(ending(name)) for name in names]
    _, form = _MEASURES[measure]
    return go.Heatmap(
        x=places,
        y=places,
        z=cells_of(grid.reindex(index=names, columns=names)),
        customdata=[[f"{first}, {second}" for second in labels] for first in labels],
        texttemplate=f"%{{z:{form}}}" if len(names) <= _WRITTEN else None,
        coloraxis="coloraxis",
        xgap=1 if len(names) <= 60 else 0,
        ygap=1 if len(names) <= 60 else 0,
        hoverongaps=False,
        hovertemplate="%{customdata}: %{z:.3g}<extra></extra>",
    )


def _name_axes(figure: go.Figure, names: list[str], axis: str) -> None:
    """Columns stand in the order of rows: many of them need no names of their own."""
    step = -(-len(names) // _NAMED)
    named = {
        "tickmode": "array",
        "tickvals": list(range(len(names)))[::step],
        "ticktext": [escaped(ending(name)) for name in names][::step],
        "showgrid": False,
        "zeroline": False,
    }
    few = len(names) <= _WRITTEN
    figure.update_xaxes(title_text=axis, tickangle=-45, showticklabels=few, **named)
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], **named)
    figure.update_yaxes(title_text=axis, row=1, col=1)
