"""The best neurons: where they lie, and what they hold."""

from collections import Counter

import pandas as pd
import plotly.graph_objects as go

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tables import NEURON_COLUMNS
from tl_neuron_attr.views.checks import checked, kinds_of, one_role
from tl_neuron_attr.views.style import (
    KIND_COLOURS,
    KIND_NAMES,
    finish,
    layer_axis,
    tick_step,
    zero_line,
)


def neuron_histogram(
    neurons: pd.DataFrame,
    top: int | None = None,
    *,
    n_layers: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """How many of the best neurons of each kind lie in each layer.

    Drawn from ``Attribution.neurons()``, or from such tables of several prompts put together; then
    the neurons of all prompts are counted.

    Args:
        neurons: Neurons of one role (value or query).
        top: How many of each kind and prompt to count, by rank; by default all in the table.
        n_layers: The model's number of layers; by default the axis ends at the last layer that
            has a neuron in the table.

    Raises:
        InputError: If ``neurons`` is empty, lacks columns, mixes roles, ranks fewer than ``top``
            of a kind, or has a layer beyond ``n_layers``.
    """
    neurons = checked(neurons, "neurons", NEURON_COLUMNS, key=None, value=None)
    role = one_role(neurons)
    last_layer = max(neurons["layer"].tolist())
    if n_layers is not None:
        if last_layer >= n_layers:
            raise InputError(
                f"the neurons table has layer {last_layer}, but n_layers is {n_layers}"
            )
        last_layer = n_layers - 1
    kinds = kinds_of(neurons)
    if top is not None:
        neurons = _best(neurons, top)
    n_prompts = len(set(neurons["prompt_id"].tolist()))
    most = 0
    figure = go.Figure()
    for kind in kinds:
        found = Counter(neurons["layer"][neurons["kind"] == kind].tolist())
        most = max(most, *found.values())
        figure.add_bar(
            x=list(range(last_layer + 1)),
            y=[found[layer] for layer in range(last_layer + 1)],
            name=KIND_NAMES[kind],
            showlegend=True,  # plotly would leave a kind that is alone without its name
            marker_color=KIND_COLOURS[kind],
            hovertemplate=f"layer %{{x}}, {KIND_NAMES[kind]}: %{{y}} neurons<extra></extra>",
        )
    which = "ranked" if top is None else f"top {top}"
    of_prompts = f" of {n_prompts} prompts" if n_prompts > 1 else ""
    default = f"Layers of the {which} {role} neurons of each kind{of_prompts}"
    finish(figure, title, default, height=380)
    figure.update_yaxes(
        title_text="number of neurons", tick0=0, dtick=tick_step(most, 8), **zero_line()
    )
    layer_axis(figure, range(last_layer + 1))
    return figure


def _best(neurons: pd.DataFrame, top: int) -> pd.DataFrame:
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    ranked: dict[tuple[str, str], int] = {}
    for prompt_id, kind, rank in zip(
        neurons["prompt_id"], neurons["kind"], neurons["rank"], strict=True
    ):
        ranked[prompt_id, kind] = max(rank, ranked.get((prompt_id, kind), 0))
    for (prompt_id, kind), count in ranked.items():
        if count < top:
            raise InputError(
                f"only {count} {kind} neurons of prompt {prompt_id!r} are ranked in the table, "
                f"fewer than top={top}; rank more with attribute(..., top={top}), or leave top out "
                "to count every row"
            )
    return neurons.loc[neurons["rank"] <= top]
