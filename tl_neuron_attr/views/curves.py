"""What is left of the answer, by how many neurons are zeroed."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_neuron_attr.evaluate.statistics import means
from tl_neuron_attr.tables import CURVE_COLUMNS
from tl_neuron_attr.views.checks import checked, kinds_of
from tl_neuron_attr.views.effects import METRIC_AXES, WHICH, effect_rows, of_type
from tl_neuron_attr.views.style import (
    KIND_COLOURS,
    KIND_NAMES,
    band,
    finish,
    method_colour,
    method_dash,
    zero_line,
)

_BANDS_FROM = 3
"""Intervals of fewer prompts would say nothing."""
_LINES_TO = 20
"""Lines of more prompts would be a blot."""


def mask_curves(points: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """log p(target), in nats, by the number of neurons zeroed or kept: the mean of all prompts.

    Drawn from ``mask_curve(...)``, or from several such tables put together: one line for each kind
    and for masking and keeping. With several prompts each one's own line is drawn pale behind
    (of up to 20), and from three on a band: the mean's 95 % bootstrap interval over prompts. The
    numbers of neurons stand side by side, whatever lies between them.

    Raises:
        InputError: If ``points`` is empty, lacks columns, or has two rows for one point.
    """
    points = checked(
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
    for kind in kinds_of(points):
        for keep in sorted(set(points["keep"].tolist())):
            rows = points.loc[(points["kind"] == kind) & (points["keep"] == keep)]
            if rows.empty:
                continue
            line = {"color": KIND_COLOURS[kind], "dash": "dash" if keep else "solid"}
            x, prompts, values = _by_prompt(rows, place)
            if len(prompts) >= _BANDS_FROM:
                ends = means(values, np.arange(len(prompts)), seed=0)
                low, high = ends.low.tolist(), ends.high.tolist()
                figure.add_trace(band(x, low, high, KIND_COLOURS[kind]))
            for of_prompt in values if 1 < len(prompts) <= _LINES_TO else []:
                figure.add_scatter(
                    x=x,
                    y=of_prompt.tolist(),
                    mode="lines",
                    line={**line, "width": 1},
                    opacity=0.4,
                    showlegend=False,
                    hoverinfo="skip",
                )
            name = f"{KIND_NAMES[kind]}, {'only the top kept' if keep else 'the top zeroed'}"
            figure.add_scatter(
                x=x,
                y=np.nanmean(values, axis=0).tolist(),
                mode="lines+markers",
                line={**line, "width": 3},
                marker={"size": 8},
                name=name,
                showlegend=True,
                customdata=[tops[number] for number in x],
                hovertemplate=f"{name} %{{customdata}}: %{{y:.3g}} nats<extra></extra>",
            )
    count = len(set(points["prompt_id"].tolist()))
    of_prompts = f", mean of {count} prompts" if count > 1 else ""
    default = f"log p(target) with only some neurons zeroed, or kept{of_prompts}"
    finish(figure, title, default, height=420)
    figure.update_xaxes(
        title_text="number of neurons, the top of their ranking",
        tickmode="array",
        tickvals=[*place.values()],
        ticktext=[str(top) for top in tops],
        range=[-0.3, len(tops) - 0.7],
        zeroline=False,
    )
    figure.update_yaxes(title_text="log p(target), nats", **zero_line())
    return figure


def _by_prompt(
    rows: pd.DataFrame, place: dict[int, int]
) -> tuple[list[int], list[str], np.ndarray]:
    """Where on the axis there are points, the prompts, and a row of values each; NaN for none."""
    grid = rows.pivot(index="prompt_id", columns="top", values="log_prob")
    return [place[top] for top in grid.columns], list(grid.index), grid.to_numpy(dtype=float)


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
    rows = effect_rows(
        curves,
        "curves",
        ("mean", "low", "high"),
        {"metric": metric, "kind": kind, "knowledge_type": knowledge_type},
    )
    figure = go.Figure()
    methods = list(dict.fromkeys(rows["method"].tolist()))
    for method in methods:
        line = rows.loc[rows["method"] == method].sort_values("top", kind="stable")
        tops = line["top"].tolist()
        x = np.log1p(tops).tolist()
        colour = method_colour(method, methods)
        figure.add_trace(band(x, line["low"].tolist(), line["high"].tolist(), colour))
        figure.add_scatter(
            x=x,
            y=line["mean"].tolist(),
            mode="lines+markers",
            name=method,
            line={
                "color": colour,
                "width": 2.5,
                "dash": method_dash(method, methods),
            },
            marker={"size": 7},
            customdata=tops,
            hovertemplate=f"{method}, top %{{customdata}}: %{{y:.3g}}<extra></extra>",
        )
    tops = sorted(set(rows["top"].tolist()))
    kinds = WHICH[str(rows["kind"].iloc[0])]
    default = f"Without the top N {kinds}{of_type(knowledge_type)}, with 95 % intervals"
    finish(figure, title, default, height=480)
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1})
    figure.update_layout(legend_yanchor="top")
    figure.update_xaxes(
        title_text=f"number of {kinds} zeroed, N",
        tickmode="array",
        tickvals=np.log1p(tops).tolist(),
        ticktext=[str(top) for top in tops],
        zeroline=False,
    )
    figure.update_yaxes(title_text=METRIC_AXES[metric], **zero_line())
    return figure
