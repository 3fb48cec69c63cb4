"""What becomes of the answers without each method's best neurons: an evaluation's tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.views.checks import checked
from tl_neuron_attr.views.style import (
    CONTROLS,
    GAP,
    GREY,
    KIND_COLOURS,
    colour_bar,
    escaped,
    finish,
    method_colour,
    zero_line,
)

WHICH = {
    "ffn": "FFN neurons",
    "attn": "attention neurons",
    "both": "FFN and as many attention neurons",
}
METRIC_AXES = {
    "reciprocal_rank": "mean reciprocal rank of the answer",
    "prob": "mean probability of the answer",
    "log_prob": "mean log p(answer), nats",
}


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
    rows = effect_rows(
        summary,
        "summary",
        ("before", "after", "after_low", "after_high"),
        {"metric": metric, "top": top, "kind": kind, "knowledge_type": knowledge_type},
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
            marker_color=GREY if row["method"] in CONTROLS else KIND_COLOURS["attn"],
            showlegend=False,
            hovertemplate=(
                f"%{{x}}: %{{y:.3g}}, 95 %: {low:.3g} to {high:.3g}, "
                f"{row['prompts']} prompts<extra></extra>"
            ),
        )
    before = float(np.mean(rows["before"].to_numpy(dtype=float)))
    figure.add_hline(y=before, line={"color": GREY, "dash": "dot", "width": 1.5})
    default = (
        f"Without the top {int(rows['top'].iloc[0])} {WHICH[str(rows['kind'].iloc[0])]}"
        f"{of_type(knowledge_type)}; dotted: nothing zeroed"
    )
    finish(figure, title, default, height=400)
    figure.update_yaxes(title_text=METRIC_AXES[metric], **zero_line())
    figure.update_xaxes(title_text="method", zeroline=False)
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
    rows = effect_rows(
        summary,
        "summary",
        ("knowledge_type", "before", "after"),
        {"metric": metric, "top": top, "kind": kind},
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
            x=[escaped(str(name)) for name in types],
            y=names,
            z=grid,
            text=[[f"{value:.2f}" for value in row] for row in grid],
            texttemplate="%{text}",
            colorscale="Viridis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            colorbar=colour_bar(METRIC_AXES[metric]),
            hovertemplate="%{y}, %{x}: %{z:.3g}<extra></extra>",
        )
    )
    default = f"Without the top {int(rows['top'].iloc[0])} {WHICH[str(rows['kind'].iloc[0])]}"
    finish(figure, title, f"{default}, by knowledge type", height=max(320, 160 + 24 * len(names)))
    figure.update_layout(plot_bgcolor=GAP, margin_l=150)
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
    rows = effect_rows(
        predicted,
        "predicted",
        ("prompt_id", "predicted", "measured"),
        {"top": top, "kind": kind},
    )
    ends = [*rows["predicted"].tolist(), *rows["measured"].tolist(), 0.0]
    figure = go.Figure()
    figure.add_scatter(
        x=[min(ends), max(ends)],
        y=[min(ends), max(ends)],
        mode="lines",
        line={"color": GREY, "width": 1, "dash": "dot"},
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
            marker={"color": method_colour(method, methods), "size": 6, "opacity": 0.7},
            customdata=[escaped(prompt_id) for prompt_id in points["prompt_id"].tolist()],
            hovertemplate=(
                "%{customdata}<br>predicted %{x:.3g}, measured %{y:.3g} nats<extra></extra>"
            ),
        )
    which = f"the top {int(rows['top'].iloc[0])} {WHICH[str(rows['kind'].iloc[0])]}"
    finish(figure, title, f"Change of log p without {which}, prompt by prompt", height=480)
    figure.update_xaxes(title_text="predicted: less the sum of scores, nats", **zero_line())
    figure.update_yaxes(title_text="measured change of log p(answer), nats", **zero_line())
    return figure


def effect_rows(
    table: pd.DataFrame,
    name: str,
    numbers: Sequence[str],
    wanted: dict[str, Any],
) -> pd.DataFrame:
    """The rows that are wanted, of one number of neurons and one kind, once they can be drawn."""
    keys = {"method", "kind", "top", *wanted}
    source = f"Evaluation.{name}" + ("" if name == "predicted" else "()")
    table = checked(table, name, [*sorted(keys), *numbers], key=None, value=None, source=source)
    for column, choice in wanted.items():
        table = one_of(table, name, column, choice)
    return table


def one_of(table: pd.DataFrame, name: str, column: str, choice: Any) -> pd.DataFrame:
    """The rows whose ``column`` is the choice, or the only value there is.

    Raises:
        InputError: If there are several and none is chosen, or none is what is chosen.
    """
    found = list(dict.fromkeys(table[column].tolist()))
    if choice is None and len(found) > 1:
        raise InputError(
            f"the {name} table has several values of {column}: {', '.join(map(str, found))}; "
            f"say which is to be drawn, for example {column}={found[0]!r}"
        )
    if choice is not None and choice not in found:
        raise InputError(
            f"the {name} table has no {column} {choice!r}; there is {', '.join(map(str, found))}"
        )
    return table.loc[table[column] == (found[0] if choice is None else choice)]


def of_type(knowledge_type: str) -> str:
    return "" if knowledge_type == "all" else f", {knowledge_type}"
