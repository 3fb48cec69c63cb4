"""The paper's figures: tables of ``tables.py`` -> plotly figures, each drawn from its table alone.

Layers run from left to right. Every figure says its unit on an axis, and tells published points,
where there are any, from what was found here. Nothing is shown, and no theme is set.
"""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.views.style import DIVERGING, KIND_COLOURS, KIND_NAMES, cells_of, zero_line

ALL = "all"

# Paul Tol's bright scheme: told apart in every kind of colour blindness
_SERIES = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB")
_GREY = "#888888"
_RISING = ("#F7F7F7", "#FDDBC7", "#F4A582", "#D6604D", "#B2182B")
_PUBLISHED_DASH = {"gpt2-large": "dash", "llama-7b": "dot"}
_NAMES = {"gpt2-large": "GPT2-large", "llama-7b": "Llama-7B"}


def layer_sum_bars(table: pd.DataFrame, title: str) -> go.Figure:
    """Sum of the scores of all attention layers beside that of all FFN layers, by type."""
    _need(table, "knowledge_type", "attn", "ffn")
    types = table["knowledge_type"].tolist()
    figure = go.Figure()
    for kind, colour in KIND_COLOURS.items():
        figure.add_bar(
            x=types,
            y=table[kind].tolist(),
            name=KIND_NAMES[kind],
            marker_color=colour,
            offsetgroup=kind,
            hovertemplate=f"%{{x}}, {KIND_NAMES[kind]}: %{{y:.3g}} nats<extra></extra>",
        )
    for kind, colour in KIND_COLOURS.items():
        column = f"llama_7b_{kind}"
        if column in table:
            known = table[table[column].notna()]
            figure.add_scatter(
                x=known["knowledge_type"].tolist(),
                y=known[column].tolist(),
                mode="markers",
                name=f"{KIND_NAMES[kind]}, published (Llama-7B)",
                marker={
                    "symbol": "diamond-open",
                    "size": 11,
                    "color": colour,
                    "line": {"width": 3},
                },
                hovertemplate="published: %{y:.3g} nats<extra></extra>",
            )
    _finish(figure, title, height=400)
    figure.update_layout(barmode="group")
    figure.update_yaxes(title_text="sum of layer scores, nats", **zero_line())
    return figure


def segment_lines(table: pd.DataFrame, title: str) -> go.Figure:
    """log p and p of the answer, by how far the input has moved to the final hidden state."""
    _need(table, "knowledge_type", "part", "log_prob", "prob")
    figure = make_subplots(
        cols=2, horizontal_spacing=0.12, subplot_titles=["log p, nats", "p, per cent"]
    )
    types = [name for name in dict.fromkeys(table["knowledge_type"]) if name != ALL]
    styles = {ALL: ("#222222", 4)}
    styles |= {name: (colour, 2) for name, colour in zip(types, _cycle(len(types)), strict=True)}
    for name in (*types, ALL):
        rows = table.loc[table["knowledge_type"] == name]
        colour, width = styles[name]
        for column, measure in enumerate(("log_prob", "prob"), start=1):
            figure.add_scatter(
                x=rows["part"].tolist(),
                y=rows[measure].tolist(),
                mode="lines",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"color": colour, "width": width},
                hovertemplate=f"{name} at %{{x:.2f}}: %{{y:.3g}}<extra></extra>",
                row=1,
                col=column,
            )
    _finish(figure, title, height=420)
    figure.update_xaxes(title_text="part of the way")
    return figure


def share_lines(table: pd.DataFrame, title: str) -> go.Figure:
    """Part of all that raises the answer which the top neurons hold, between proven ends."""
    _need(table, "kind", "top", "share_lower", "share_upper")
    figure = go.Figure()
    for kind, colour in KIND_COLOURS.items():
        rows = table.loc[table["kind"] == kind]
        if rows.empty:
            continue
        for end, fill in (("share_lower", None), ("share_upper", "tonexty")):
            figure.add_scatter(
                x=rows["top"].tolist(),
                y=rows[end].tolist(),
                mode="lines+markers",
                name=KIND_NAMES[kind],
                legendgroup=kind,
                showlegend=fill is not None,
                fill=fill,
                line={"color": colour},
                hovertemplate=f"top %{{x}} {KIND_NAMES[kind]}: %{{y:.1f}} %<extra></extra>",
            )
    _finish(figure, title, height=400)
    figure.update_xaxes(title_text="number of neurons", type="log")
    figure.update_yaxes(title_text="share of the total, %", range=[0, 105])
    return figure


def shared_bars(table: pd.DataFrame, top: int, title: str) -> go.Figure:
    """Neurons that more than half of a type's prompts share, in per cent of the top.

    Published values, where there are any for this ``top``, are diamonds at the right.
    """
    _need(table, "knowledge_type", "role", "kind", "top", "percent")
    rows = table.loc[table["top"] == top]
    figure = go.Figure()
    groups = [("value", "ffn"), ("value", "attn"), ("query", "ffn")]
    for (role, kind), colour in zip(groups, _SERIES, strict=False):
        here = rows.loc[(rows["role"] == role) & (rows["kind"] == kind)]
        name = f"{role} neurons, {KIND_NAMES[kind]}"
        figure.add_bar(
            x=here["knowledge_type"].tolist(),
            y=here["percent"].tolist(),
            name=name,
            marker_color=colour,
            hovertemplate=f"%{{x}}, {name}: %{{y:.1f}} %<extra></extra>",
        )
    for role, colour in (("value", _SERIES[0]), ("query", _SERIES[2])):
        of_role = rows.loc[rows["role"] == role]
        for model, label in _NAMES.items():
            column = f"{model.replace('-', '_')}_percent"
            known = of_role[column].dropna().tolist() if column in of_role else []
            if known:
                figure.add_scatter(
                    x=[f"{label}, published"],
                    y=known[:1],
                    mode="markers",
                    name=f"{role} neurons, published",
                    legendgroup=f"published {role}",
                    showlegend=model == "gpt2-large",
                    marker={"symbol": "diamond", "size": 11, "color": colour},
                    hovertemplate=f"{label}, {role}: %{{y:.1f}} %<extra></extra>",
                )
    _finish(figure, title, height=420, legend_above=True)
    figure.update_layout(barmode="group")
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(title_text=f"% of the top {top}", **zero_line())
    return figure


def query_depth_lines(table: pd.DataFrame, title: str) -> go.Figure:
    """Query neurons that are value neurons too, and those that are not, by depth."""
    _need(table, "source", "top", "depth", "layer", "query_only", "query_and_value")
    figure = make_subplots(
        cols=2, horizontal_spacing=0.1, subplot_titles=["query only", "query and value"]
    )
    for source in dict.fromkeys(table["source"]):
        rows = table.loc[table["source"] == source]
        published = source in _NAMES
        name = f"published, {_NAMES[source]}, one prompt" if published else "here, mean"
        for column, measure in enumerate(("query_only", "query_and_value"), start=1):
            # of the whole layer stack: models of more layers have fewer in each
            share = rows[measure] / rows["top"] * len(rows)
            figure.add_scatter(
                x=rows["depth"].tolist(),
                y=share.tolist(),
                mode="lines+markers",
                name=name,
                legendgroup=source,
                showlegend=column == 1,
                line={
                    "color": _GREY if published else _SERIES[0],
                    "dash": _PUBLISHED_DASH.get(source, "solid"),
                    "width": 2 if published else 3,
                },
                marker={"size": 4 if published else 7},
                customdata=rows[["layer", measure]].to_numpy().tolist(),
                hovertemplate=(
                    f"{name}, layer %{{customdata[0]}}: %{{customdata[1]:.3g}} neurons"
                    "<extra></extra>"
                ),
                row=1,
                col=column,
            )
    _finish(figure, title, height=420)
    figure.update_xaxes(title_text="depth (first layer 0, last 1)")
    figure.update_yaxes(title_text="times the mean per layer", row=1, col=1)
    return figure


def drop_matrix(table: pd.DataFrame, title: str) -> go.Figure:
    """Drop of the probability of each type (columns) without the top heads of each (rows)."""
    _need(table, "heads_of", "knowledge_type", "prob_drop")
    types = [*dict.fromkeys(table["knowledge_type"])]
    grid = table.pivot(index="heads_of", columns="knowledge_type", values="prob_drop")
    rows = [name for name in (*types, "random") if name in grid.index]
    grid = grid.reindex(index=rows, columns=types)
    figure = go.Figure(
        go.Heatmap(
            x=types,
            y=[f"heads of {name}" if name != "random" else "random heads" for name in rows],
            z=cells_of(grid),
            texttemplate="%{z:.1f}",
            colorscale=list(DIVERGING)[::-1] if (grid < 0).any().any() else list(_RISING),
            zmid=0 if (grid < 0).any().any() else None,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "drop of p, %", "side": "right"}, "thickness": 12},
            hovertemplate="%{y} zeroed, %{x}: p drops by %{z:.2f} %<extra></extra>",
        )
    )
    _finish(figure, title, height=160 + 34 * len(rows))
    figure.update_xaxes(title_text="knowledge type measured", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def method_bars(table: pd.DataFrame, title: str) -> go.Figure:
    """Probability left after zeroing by each method, in per cent of the original; published too.

    Bars are 95 % intervals of that ratio, both means of the same draws.
    """
    _need(table, "knowledge_type", "method", "prob_left", "prob_left_low", "prob_left_high")
    rows = table.loc[table["knowledge_type"] == ALL].reset_index(drop=True)
    names = [name.replace("_", " ") for name in rows["method"]]
    left, low, high = (rows[name] for name in ("prob_left", "prob_left_low", "prob_left_high"))
    figure = go.Figure()
    figure.add_bar(
        x=names,
        y=left.tolist(),
        name="here",
        marker_color=_SERIES[0],
        error_y={
            "type": "data",
            # the original is what all are divided by: it has no interval
            "array": [None, *(high - left)[1:]],
            "arrayminus": [None, *(left - low)[1:]],
            "thickness": 1,
        },
        hovertemplate="%{x}: %{y:.1f} % of the original p<extra></extra>",
    )
    for (model, label), symbol in zip(_NAMES.items(), ("circle-open", "diamond-open"), strict=True):
        published = rows[f"{model.replace('-', '_')}_prob"]
        known = published.notna()
        figure.add_scatter(
            x=[name for name, here in zip(names, known, strict=True) if here],
            y=(100 * published[known] / published.iloc[0]).tolist(),
            mode="markers",
            name=f"published, {label}",
            marker={"symbol": symbol, "size": 10, "color": _GREY, "line": {"width": 2}},
            hovertemplate=f"{label}, %{{x}}: %{{y:.1f}} %<extra></extra>",
        )
    _finish(figure, title, height=420, legend_above=True)
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(title_text="p left, % of the original", rangemode="tozero")
    return figure


def _need(table: pd.DataFrame, *columns: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing or table.empty:
        raise InputError(
            f"this figure is drawn from a table with the columns {', '.join(columns)}; this one "
            + (f"lacks {', '.join(missing)}" if missing else "has no rows")
        )


def _cycle(count: int) -> list[str]:
    return [_SERIES[place % len(_SERIES)] for place in range(count)]


def _finish(figure: go.Figure, title: str, height: int, *, legend_above: bool = False) -> None:
    """The layout that all share; the legend goes above where labels below are long."""
    place = {"y": 1.02, "yanchor": "bottom"} if legend_above else {"y": -0.2, "yanchor": "top"}
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 60 if title else 40, "b": 50},
        title={"text": title, "font": {"size": 15}} if title else None,
        legend={"orientation": "h", "x": 0, "xanchor": "left", **place},
    )
