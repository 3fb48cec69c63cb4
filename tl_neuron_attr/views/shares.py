"""How much of it all the best neurons hold."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tables import NEURON_COLUMNS, SHARE_COLUMNS
from tl_neuron_attr.views.checks import checked, kinds_of, one_role
from tl_neuron_attr.views.style import KIND_COLOURS, KIND_NAMES, band, finish, zero_line


def cumulative_share(
    neurons: pd.DataFrame, shares: pd.DataFrame | None = None, *, title: str | None = None
) -> go.Figure:
    """The sum of the k highest scores of each kind, in nats, by k: how few neurons hold how much.

    With ``shares`` it is the part, in per cent, of what all neurons that raise the target add up
    to: that sum is known between two proven ends, so each curve is a band. Scores do not add up to
    what the neurons do together (the softmax is not linear): this says how concentrated they are.

    Drawn from ``Attribution.neurons()`` and ``Attribution.shares()``, of one prompt.

    Raises:
        InputError: If a table is empty, lacks columns, or has scores that are not finite; if
            ``neurons`` mixes roles, holds several prompts, or lacks some of its best neurons; or if
            ``shares`` lacks a kind, or are not of value neurons.
    """
    neurons = checked(neurons, "neurons", NEURON_COLUMNS, key=None)
    role = one_role(neurons)
    prompts = sorted(set(neurons["prompt_id"].tolist()))
    if len(prompts) > 1:
        raise InputError(
            "the neurons table holds several prompts; draw one at a time, for example "
            f"neurons[neurons['prompt_id'] == {prompts[0]!r}]"
        )
    totals = None if shares is None else _totals(shares, neurons)
    figure = go.Figure()
    for kind in kinds_of(neurons):
        scores = _best_first(neurons.loc[neurons["kind"] == kind], kind)
        places = list(range(1, len(scores) + 1))
        if totals is None:
            lines = [scores.cumsum().tolist()]
        else:
            raising = scores.clip(min=0).cumsum()
            lines = [_percent(raising, total).tolist() for total in totals[kind]]
            figure.add_trace(band(places, lines[1], lines[0], KIND_COLOURS[kind]))
        ends = ("at most", "at least") if len(lines) == 2 else ("",)
        unit = "nats" if totals is None else "%"
        for line, end in zip(lines, ends, strict=True):
            figure.add_scatter(
                x=places,
                y=line,
                mode="lines",
                name=KIND_NAMES[kind],
                legendgroup=kind,
                showlegend=end != "at least",
                line={"color": KIND_COLOURS[kind], "width": 2},
                hovertemplate=(
                    f"best %{{x}} {KIND_NAMES[kind]} neurons: {end} %{{y:.3g}} {unit}"
                    "<extra></extra>"
                ),
            )
    if totals is None:
        default, quantity = f"Sum of the best {role} neurons' scores", "sum of scores, nats"
    else:
        default = f"Part of all that raises the target held by the best {role} neurons"
        quantity = "part of all that raises it, %"
    finish(figure, title, default, height=400)
    figure.update_xaxes(title_text="number of neurons, best first", rangemode="tozero")
    figure.update_yaxes(title_text=quantity, rangemode="tozero", **zero_line())
    return figure


def _best_first(neurons: pd.DataFrame, kind: str) -> np.ndarray:
    ordered = neurons.sort_values("rank", kind="stable")
    if ordered["rank"].tolist() != list(range(1, len(ordered) + 1)):
        raise InputError(
            f"the neurons table does not have the best {kind} neurons one by one: their ranks are "
            "not 1, 2, 3 and so on"
        )
    return ordered["score"].to_numpy(dtype=float)


def _totals(shares: pd.DataFrame, neurons: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Of each kind the lowest and the highest sum of all scores above 0."""
    shares = checked(shares, "shares", SHARE_COLUMNS, key=["kind"], value="rise_upper")
    if one_role(neurons) != "value":
        raise InputError("shares are of value neurons; give neurons of the role 'value'")
    lacking = [kind for kind in kinds_of(neurons) if kind not in set(shares["kind"])]
    if lacking:
        raise InputError(f"the shares table has no row of kind {lacking[0]}; give both kinds'")
    rows = zip(shares["kind"], shares["rise_lower"], shares["rise_upper"], strict=True)
    return {kind: (float(low), float(high)) for kind, low, high in rows}


def _percent(raising: np.ndarray, total: float) -> np.ndarray:
    """Of a total that cannot be less than the part of it that is known."""
    at_least = np.maximum(total, raising[-1])
    return 100 * raising / at_least if at_least > 0 else np.zeros_like(raising)
