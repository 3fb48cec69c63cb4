"""What each layer adds."""

import pandas as pd
import plotly.graph_objects as go

from tl_neuron_attr.tables import LAYER_COLUMNS
from tl_neuron_attr.views.checks import checked, kinds_of
from tl_neuron_attr.views.style import (
    KIND_COLOURS,
    KIND_NAMES,
    RISE,
    finish,
    layer_axis,
    zero_line,
)


def layer_bars(layers: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Two bars a layer: the rise in log p(target), in nats, from its attention and its FFN.

    Drawn from ``Attribution.layers()``. Over all layers the bars add up to the rise from the
    embedding to the final residual, except in parallel blocks, where the sum says nothing.

    Raises:
        InputError: If ``layers`` is empty, lacks columns, or has two rows for one bar.
    """
    layers = checked(layers, "layers", LAYER_COLUMNS, key=["layer", "kind"])
    figure = go.Figure()
    for kind in kinds_of(layers):
        rows = layers[layers["kind"] == kind]
        figure.add_bar(
            x=rows["layer"].tolist(),
            y=rows["score"].tolist(),
            name=KIND_NAMES[kind],
            showlegend=True,  # plotly would leave a kind that is alone without its name
            marker_color=KIND_COLOURS[kind],
            hovertemplate=f"layer %{{x}}, {KIND_NAMES[kind]}: %{{y:.3g}} nats<extra></extra>",
        )
    finish(figure, title, "What each layer adds to log p(target)", height=380)
    figure.update_yaxes(title_text=RISE, **zero_line())
    layer_axis(figure, layers["layer"].tolist())
    return figure
