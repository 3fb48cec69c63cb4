"""The look all figures share: colours, text that is only text, axes with units, the layout.

Colours are Paul Tol's schemes, told apart in every kind of colour blindness.
"""

import html
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.prompts import visible

RISE = "rise in log p(target), nats"
CHANGE = "change of log p(target), nats"
KIND_NAMES = {"attn": "attention", "ffn": "FFN"}

# the high-contrast pair: told apart in grey too
KIND_COLOURS = {"attn": "#004488", "ffn": "#DDAA33"}
PALE = {"attn": "#99BBDD", "ffn": "#F2E0B5"}
GREY = "#777777"
GAP = "#C8C8C8"
"""What is not in the table: no colour of a scale, so that it does not look like a zero."""
# PRGn; plotly's own ends so dark that both signs look black
DIVERGING = (
    "#762A83",
    "#9970AB",
    "#C2A5CF",
    "#E7D4E8",
    "#F7F7F7",
    "#D9F0D3",
    "#ACD39E",
    "#5AAE61",
    "#1B7837",
)
SEQUENTIAL = "Cividis"
"""For what has one end only."""
# length or area already says how much: marks only need the sign, and pale ones cannot be read
SIGNS = [[0, DIVERGING[0]], [0.5, DIVERGING[0]], [0.5, DIVERGING[-1]], [1, DIVERGING[-1]]]
# the muted scheme, for up to nine methods
METHOD_COLOURS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#DDCC77",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
)
CONTROLS = ("random", "norm_matched")
_CONTROL_DASHES = {"random": "dash", "norm_matched": "dashdot"}
_TOKEN_CHARS = 18
_NAME_CHARS = 24
_TITLE_CHARS = 80


# --- colours ----------------------------------------------------------------------------------


def limit_of(scores: Sequence[float]) -> float:
    """The end of a colour scale from ``-limit`` to ``limit``; 1 where all scores are 0."""
    return max(map(abs, scores), default=0.0) or 1.0


def method_colour(method: str, methods: Sequence[str]) -> str:
    """A colour for each of ``methods``; controls are grey."""
    if method in CONTROLS:
        return GREY
    return METHOD_COLOURS[methods.index(method) % len(METHOD_COLOURS)]


def method_dash(method: str, methods: Sequence[str]) -> str:
    """Controls are dashed. Colours come round; the second time lines are dotted."""
    again = methods.index(method) >= len(METHOD_COLOURS)
    return _CONTROL_DASHES.get(method, "dot" if again else "solid")


# --- text -------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Text that plotly shows as it is: no tags, no entities, and no formula between dollars."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def shown_token(token: str) -> str:
    """A token as figures show it: spaces and newlines visible, not too long, only text."""
    return escaped(shortened(visible(token) or "(empty)"))


def shortened(text: str, length: int = _TOKEN_CHARS) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def signed(nats: float) -> str:
    return f"{nats:+.3g}".replace("-", "−")


def ending(name: str) -> str:
    """A name that is not too long: names of prompts differ at the end."""
    return name if len(name) <= _NAME_CHARS else f"…{name[1 - _NAME_CHARS :]}"


def name_margin(names: Sequence[str]) -> int:
    """Pixels beside the plot that such names of its rows take."""
    return 50 + 7 * min(_NAME_CHARS, max(map(len, names)))


def neuron_labels(neurons: pd.DataFrame) -> list[str]:
    """What each row's neuron is called."""
    sources = [None if pd.isna(source) else int(source) for source in neurons["source_pos"]]
    columns = (neurons[name].tolist() for name in ("kind", "layer", "head", "index"))
    return [
        str(FFNNeuron(layer, index) if kind == "ffn" else AttnNeuron(layer, head, index, source))
        for kind, layer, head, index, source in zip(*columns, sources, strict=True)
    ]


# --- axes -------------------------------------------------------------------------------------


def cells_of(grid: pd.DataFrame) -> list[list[float | None]]:
    """Numbers as JSON has them: an empty cell is null."""
    values = grid.to_numpy(dtype=float)
    return [[None if math.isnan(cell) else float(cell) for cell in row] for row in values]


def tick_step(n_values: int, at_most: int) -> int:
    """How many values lie between two ticks, so that no more than ``at_most`` ticks are drawn."""
    step = 1
    for factor in (2, 2.5, 2) * 8:
        if n_values <= step * at_most:
            break
        step = int(step * factor)
    return step


def zero_line() -> dict[str, Any]:
    return {"zeroline": True, "zerolinecolor": GREY, "zerolinewidth": 1}


def layer_axis(figure: go.Figure, layers: Sequence[int]) -> None:
    """Layers from left to right, as many of them named as fit."""
    first, last = min(layers), max(layers)
    figure.update_xaxes(
        title_text="layer",
        range=[first - 0.5, last + 0.5],
        tick0=0,
        dtick=tick_step(last - first + 1, 24),
    )


def colour_bar(quantity: str) -> dict[str, Any]:
    return {"title": {"text": quantity, "side": "right"}, "thickness": 14}


def band(
    x: Sequence[float | int], low: Sequence[float], high: Sequence[float], colour: str
) -> go.Scatter:
    """The area between two lines, behind what is drawn next."""
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        mode="lines",
        line={"width": 0, "color": colour},
        fillcolor=colour,
        opacity=0.18,
        showlegend=False,
        hoverinfo="skip",
    )


# --- layout -----------------------------------------------------------------------------------


def finish(figure: go.Figure, title: str | None, default: str, height: int) -> None:
    """The layout of all figures; ``height`` is the figure's without its title, in pixels."""
    lines = textwrap.wrap(default if title is None else title, width=_TITLE_CHARS)
    title_height = 22 * len(lines)
    figure.update_layout(
        template="plotly_white",
        height=height + title_height,
        margin={"l": 70, "r": 20, "t": 55 + title_height, "b": 55},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
        barmode="group",
    )
    # without the theme's white outline, which rubs out the zero line where bars are tiny
    figure.update_traces(marker_line_width=0, selector={"type": "bar"})
    # unseen ticks, which keep the labels off the plot
    figure.update_xaxes(ticks="outside", ticklen=4, tickcolor="white")
    figure.update_yaxes(ticks="outside", ticklen=4, tickcolor="white")
    if lines:
        figure.update_layout(
            title={
                "text": "<br>".join(escaped(line) for line in lines),
                "font": {"size": 16},
                "x": 0.01,
                "xanchor": "left",
                "y": 1,
                "yanchor": "top",
                # below plotly's row of buttons; a second line would push the first one up
                "pad": {"t": 19 + 11 * len(lines)},
            }
        )
