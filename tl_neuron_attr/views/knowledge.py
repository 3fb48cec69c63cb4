"""The layers that prompts of several knowledge types are answered in."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.views.checks import checked, kinds_of
from tl_neuron_attr.views.style import (
    DIVERGING,
    KIND_NAMES,
    RISE,
    cells_of,
    colour_bar,
    escaped,
    finish,
    limit_of,
    name_margin,
)

TYPE_LAYER_COLUMNS = ("knowledge_type", "layer", "kind", "score")
_WRITTEN = 40
"""Up to how many layers there is room for numbers."""


def type_layer_heatmap(by_type: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """One cell a knowledge type and layer: its mean score, in nats; the ten best are numbered.

    Attention layers above, FFN layers below, on one colour scale symmetrical about 0. Tables of
    query layers have a column ``emb``, the embedding, in front of layer 0; biases are not drawn.

    Drawn from ``layers_by_type(...)``; without its columns ``rank`` and ``best`` nothing is
    numbered.

    Raises:
        InputError: If ``by_type`` is empty, lacks columns, or has two rows for one cell.
    """
    table = checked(
        by_type,
        "type and layer",
        TYPE_LAYER_COLUMNS,
        key=None,
        source="layers_by_type(...)",
    )
    twice = table.duplicated(["knowledge_type", "layer", "kind"])
    if twice.any():
        raise InputError(
            "the type and layer table has more than one row for a layer of a type; average prompts "
            "with layers_by_type(...), and give one table of what it tells apart"
        )
    table = _cells(table)
    types = [*dict.fromkeys(table["knowledge_type"].tolist())]
    columns = sorted(set(table["x"].tolist()))
    kinds = kinds_of(table)
    limit = limit_of(table["score"].tolist())
    figure = make_subplots(
        rows=len(kinds),
        shared_xaxes=True,
        vertical_spacing=0.14,
        subplot_titles=[f"{KIND_NAMES[kind]} layers" for kind in kinds],
    )
    for row, kind in enumerate(kinds, start=1):
        here = table.loc[table["kind"] == kind]
        scores, texts = (
            here.pivot(index="knowledge_type", columns="x", values=name).reindex(
                index=types, columns=columns
            )
            for name in ("score", "mark")
        )
        figure.add_heatmap(
            x=["emb" if x < 0 else str(x) for x in columns],
            y=[escaped(str(name)) for name in types],
            z=cells_of(scores),
            text=texts.astype(object).where(texts.notna(), "").to_numpy().tolist(),
            texttemplate="%{text}" if len(columns) <= _WRITTEN else None,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate=f"%{{y}}, {KIND_NAMES[kind]} %{{x}}: %{{z:.3g}} nats<extra></extra>",
            row=row,
            col=1,
        )
    figure.update_layout(
        coloraxis={
            "colorscale": list(DIVERGING),
            "cmin": -limit,
            "cmax": limit,
            "colorbar": colour_bar(f"mean {RISE}"),
        }
    )
    default = "Mean score of each layer by knowledge type; the best ten are numbered"
    if len(columns) > _WRITTEN or not any(table["mark"].tolist()):
        default = default.split(";")[0]
    finish(figure, title, default, height=150 + len(kinds) * (30 + 26 * len(types)))
    figure.update_layout(margin_l=name_margin([str(name) for name in types]))
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_xaxes(
        title_text="layer (emb: embedding)" if -1 in columns else "layer", row=len(kinds), col=1
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, title_text="knowledge type")
    return figure


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    """What stands where: ``kind`` is the panel, ``x`` the column, ``mark`` what is written in."""
    table = table.loc[table["kind"] != "bias"]
    marks = [""] * len(table)
    if {"rank", "best"} <= set(table.columns):
        ranks = zip(table["rank"].tolist(), table["best"].tolist(), strict=True)
        marks = [str(rank) if best else "" for rank, best in ranks]
    return table.assign(
        # the embedding comes before the attention of layer 0, and stands in its row of cells
        kind=table["kind"].where(table["kind"] != "embed", "attn"),
        x=[-1 if pd.isna(layer) else int(layer) for layer in table["layer"]],
        mark=marks,
    )
