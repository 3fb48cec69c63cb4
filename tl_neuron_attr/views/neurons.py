"""The best neurons: in which layers they lie, how many, how strong, and what they say."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tables import NEURON_COLUMNS
from tl_neuron_attr.views.checks import checked, kinds_of, one_role
from tl_neuron_attr.views.style import (
    KIND_COLOURS,
    KIND_NAMES,
    SIGNS,
    escaped,
    finish,
    layer_axis,
    limit_of,
    neuron_labels,
    shown_token,
    signed,
    tick_step,
    zero_line,
)

_LARGEST = 34
"""Pixels across the largest neuron of a scatter."""
_SPREAD = 0.7
"""How far neurons of a layer are spread, of the distance to the next."""
_HOVERED_TOKENS = 6


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
    last_layer = _last_layer(neurons, n_layers)
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


def neuron_scatter(
    neurons: pd.DataFrame, *, n_layers: int | None = None, title: str | None = None
) -> go.Figure:
    """One mark a neuron above its layer: its score, in nats, and on hovering what it says.

    Attention above, FFN below. A mark's area is the absolute score, on one scale for both; green
    raises log p(target), purple lowers it. Within a layer marks are spread sideways, which says
    nothing. Hovering names the neuron, its coefficient and, where the table has them
    (``neurons(tokens=10)``, a saved table), its source token and the tokens that its signed
    contribution raises and lowers.

    Drawn from ``Attribution.neurons()``, ``suppressing()``, or both put together.

    Args:
        neurons: Neurons of one role (value or query).
        n_layers: The model's number of layers; by default the axis ends at the last layer that
            has a neuron in the table.

    Raises:
        InputError: If ``neurons`` is empty, lacks columns, mixes roles, or has a layer beyond
            ``n_layers``.
    """
    neurons = checked(neurons, "neurons", NEURON_COLUMNS, key=None)
    role = one_role(neurons)
    last_layer = _last_layer(neurons, n_layers)
    kinds = kinds_of(neurons)
    largest = limit_of(neurons["score"].tolist())
    figure = make_subplots(
        rows=len(kinds),
        shared_xaxes=True,
        vertical_spacing=0.1,
        subplot_titles=[f"{KIND_NAMES[kind]} neurons" for kind in kinds],
    )
    for row, kind in enumerate(kinds, start=1):
        marks = _largest_first(neurons.loc[neurons["kind"] == kind])
        scores = marks["score"].tolist()
        figure.add_scatter(
            x=_spread(marks["layer"].tolist()),
            y=scores,
            mode="markers",
            name=KIND_NAMES[kind],
            showlegend=False,
            marker={
                "color": scores,
                "colorscale": SIGNS,
                "cmid": 0,
                "cmin": -largest,
                "cmax": largest,
                "size": np.abs(scores).tolist(),
                "sizemode": "area",
                "sizeref": 2 * largest / _LARGEST**2,
                "sizemin": 2.5,
                "opacity": 0.65,
                "line": {"width": 0.5, "color": "white"},
            },
            customdata=_hovers(marks),
            hovertemplate="%{customdata}<extra></extra>",
            row=row,
            col=1,
        )
    default = f"The best {role} neurons: how strong, and in which layer; area: absolute score"
    finish(figure, title, default, height=110 + 240 * len(kinds))
    layer_axis(figure, range(last_layer + 1))
    figure.update_xaxes(title_text=None, zeroline=False, showgrid=False)
    figure.update_xaxes(title_text="layer", row=len(kinds), col=1)
    figure.update_yaxes(title_text="score, nats", **zero_line())
    return figure


def _largest_first(neurons: pd.DataFrame) -> pd.DataFrame:
    """So that small marks are drawn upon large ones, and hovering finds them."""
    size = -neurons["score"].abs()
    order = ["size", "layer", "head", "index", "source_pos", "prompt_id"]
    return neurons.assign(size=size).sort_values(order, kind="stable")


def _spread(layers: Iterable[int]) -> list[float]:
    """Each layer's marks side by side: steps of the golden section never meet."""
    seen: Counter[int] = Counter()
    places = []
    for layer in layers:
        seen[layer] += 1
        aside = (seen[layer] * 0.6180339887) % 1 - 0.5
        places.append(round(layer + _SPREAD * aside, 4))
    return places


def _hovers(neurons: pd.DataFrame) -> list[str]:
    """What hovering over each neuron shows."""
    several = len(set(neurons["prompt_id"].tolist())) > 1
    rows = zip(neuron_labels(neurons), neurons.to_dict("records"), strict=True)
    return [_hover(label, row, several) for label, row in rows]


def _hover(label: str, row: Mapping[Hashable, Any], several: bool) -> str:
    lines = [f"<b>{escaped(label)}</b>, rank {row['rank']}"]
    if several:
        lines.append(f"prompt {escaped(str(row['prompt_id']))}")
    lines.append(f"{signed(row['score'])} nats, coefficient {signed(row['coefficient'])}")
    source = row.get("source_token")
    if isinstance(source, str):
        lines.append(f"from {row['source_pos']}: {shown_token(source)}")
    for name in ("raises", "lowers"):
        tokens = row.get(name)
        # a list, or from a file an array; nothing where another table had none
        if isinstance(tokens, (list, tuple, np.ndarray)) and len(tokens):
            shown = " ".join(shown_token(token) for token in tokens[:_HOVERED_TOKENS])
            lines.append(f"{name} {shown}")
    return "<br>".join(lines)


def _last_layer(neurons: pd.DataFrame, n_layers: int | None) -> int:
    """The model's, or the table's."""
    last_layer = max(neurons["layer"].tolist())
    if n_layers is None:
        return last_layer
    if last_layer >= n_layers:
        raise InputError(f"the neurons table has layer {last_layer}, but n_layers is {n_layers}")
    return n_layers - 1
