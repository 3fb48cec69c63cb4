"""Where the neurons lie that several methods choose."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.views.checks import checked
from tl_neuron_attr.views.effects import WHICH, one_of
from tl_neuron_attr.views.style import finish, layer_axis, method_colour, zero_line

RANKING_COLUMNS = ("prompt_id", "method", "kind", "rank", "layer")
_MOST = "neurons a prompt"


def method_histogram(
    rankings: pd.DataFrame,
    top: int | None = None,
    *,
    kind: str | None = None,
    n_layers: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """A row of bars a method: in which layers its best neurons lie, as a mean number a prompt.

    All rows have the same scale; the bars of one add up to ``top``.

    Drawn from ``Evaluation.rankings``.

    Args:
        rankings: The best neurons of each method and prompt.
        top: How many of each, by rank; by default all in the table.
        kind: ``"ffn"`` or ``"attn"``, where the table has both.
        n_layers: The model's number of layers; by default the axis ends at the last layer that
            has a neuron in the table.

    Raises:
        InputError: If ``rankings`` is empty, lacks columns, has several kinds and none is chosen,
            ranks fewer than ``top``, or has a layer beyond ``n_layers``.
    """
    source = "Evaluation.rankings"
    table = checked(rankings, "rankings", RANKING_COLUMNS, key=None, value="layer", source=source)
    table = one_of(table, "rankings", "kind", kind)
    ranked = max(table["rank"].tolist())
    if top is not None and not 1 <= top <= ranked:
        raise InputError(f"the rankings table has the best {ranked} of each method; got top={top}")
    top = ranked if top is None else top
    last_layer = max(table["layer"].tolist())
    if n_layers is not None and last_layer >= n_layers:
        raise InputError(f"the rankings table has layer {last_layer}, but n_layers is {n_layers}")
    table = table.loc[table["rank"] <= top]
    prompts = table.groupby("method")["prompt_id"].nunique()
    counts = table.groupby(["method", "layer"]).size()
    methods = list(dict.fromkeys(table["method"].tolist()))
    means = pd.DataFrame(
        [
            (method, layer, counts.get((method, layer), 0) / prompts[method])
            for method in methods
            for layer in range(last_layer + 1 if n_layers is None else n_layers)
        ],
        columns=["method", "layer", "neurons"],
    )
    which = WHICH[str(table["kind"].iloc[0])]
    return layers_of_methods(means, methods, title, f"Layers of the top {top} {which}, by method")


def layers_of_methods(
    table: pd.DataFrame, methods: Sequence[str], title: str | None, default: str = ""
) -> go.Figure:
    """The same, from ``method, layer, neurons``: mean numbers a prompt, counted already."""
    found = checked(
        table, "chosen layers", ["method", "layer", "neurons"], key=None, value="neurons"
    )
    layers = found["layer"].tolist()
    figure = make_subplots(
        rows=len(methods),
        shared_xaxes=True,
        vertical_spacing=min(0.08, 0.3 / len(methods)),
        subplot_titles=[method.replace("_", " ") for method in methods],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=12)
    highest = max(found["neurons"].tolist()) or 1.0
    for row, method in enumerate(methods, start=1):
        bars = found.loc[found["method"] == method].sort_values("layer", kind="stable")
        figure.add_bar(
            x=bars["layer"].tolist(),
            y=bars["neurons"].tolist(),
            name=method,
            showlegend=False,
            marker_color=method_colour(method, methods),
            hovertemplate=f"layer %{{x}}, {method}: %{{y:.3g}} {_MOST}<extra></extra>",
            row=row,
            col=1,
        )
    finish(figure, title, default, height=130 + 85 * len(methods))
    layer_axis(figure, layers)
    figure.update_xaxes(title_text=None, zeroline=False)
    figure.update_xaxes(title_text="layer", row=len(methods), col=1)
    figure.update_yaxes(range=[0, 1.05 * highest], nticks=4, **zero_line())
    figure.update_yaxes(title_text=_MOST, row=(len(methods) + 1) // 2, col=1)
    return figure
