"""Figures of an evaluation: every number drawn is one of the table's."""

import numpy as np
import pandas as pd
import pytest
from test_evaluate import made

from tl_neuron_attr import InputError, views


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)
    after = {name: rng.random((6, 2)) for name in ("one", "two", "random", "norm_matched")}
    return made(after, types=["x"] * 3 + ["y"] * 3, tops=(10, 30))


def test_bars_are_the_means_with_their_intervals(found):
    summary = found.summary()
    figure = views.effect_bars(summary, "prob", top=30)
    rows = summary.query("knowledge_type == 'all' and metric == 'prob' and top == 30")
    assert [bar.x[0] for bar in figure.data] == rows["method"].tolist()
    assert [bar.y[0] for bar in figure.data] == rows["after"].tolist()
    ends = [(bar.y[0] - bar.error_y.arrayminus[0]) for bar in figure.data]
    assert ends == pytest.approx(rows["after_low"].tolist())
    ends = [(bar.y[0] + bar.error_y.array[0]) for bar in figure.data]
    assert ends == pytest.approx(rows["after_high"].tolist())
    assert figure.layout.shapes[0].y0 == pytest.approx(0.9)
    assert figure.layout.yaxis.title.text == "mean probability of the answer"
    assert len({bar.marker.color for bar in figure.data[:2]}) == 1
    assert figure.data[2].marker.color != figure.data[0].marker.color


def test_curves_are_drawn_at_the_logarithm_with_their_bands(found):
    curves = found.curves()
    figure = views.effect_curves(curves, "log_prob", knowledge_type="y")
    lines = [trace for trace in figure.data if trace.showlegend is not False]
    assert [line.name for line in lines] == ["one", "two", "random", "norm_matched"]
    rows = curves.query("knowledge_type == 'y' and metric == 'log_prob' and method == 'two'")
    assert list(lines[1].y) == rows["mean"].tolist()
    assert list(lines[1].x) == pytest.approx(np.log([1, 11, 31]).tolist())
    assert figure.layout.xaxis.ticktext == ("0", "10", "30")
    band = figure.data[2]
    assert list(band.y) == [*rows["high"].tolist(), *reversed(rows["low"].tolist())]
    assert "nats" in figure.layout.yaxis.title.text
    assert lines[2].line.dash == "dash" and lines[0].line.dash == "solid"


def test_the_heat_map_has_a_cell_for_every_type_and_method(found):
    summary = found.summary()
    (cells,) = views.effect_heatmap(summary, top=10).data
    assert list(cells.x) == ["all", "x", "y"]
    assert list(cells.y) == ["as it is", "one", "two", "random", "norm_matched"]
    row = summary.query("knowledge_type == 'x' and metric == 'prob' and top == 10").set_index(
        "method"
    )
    assert cells.z[2][1] == row["after"]["two"] and cells.z[0][1] == pytest.approx(0.9)


def test_predicted_changes_stand_against_measured_ones():
    table = pd.DataFrame(
        {
            "prompt_id": ["<b>p", "q"],
            "knowledge_type": "x",
            "method": "one",
            "kind": "ffn",
            "top": 10,
            "predicted": [-1.0, -2.0],
            "measured": [-0.5, -3.0],
        }
    )
    line, points = views.predicted_scatter(table).data
    assert list(points.x) == [-1, -2] and list(points.y) == [-0.5, -3]
    assert list(line.x) == list(line.y) == [-3, 0]
    assert points.customdata[0] == "&lt;b&gt;p"


def test_what_cannot_be_drawn_is_refused(found):
    summary = found.summary()
    for call, message in (
        (lambda: views.effect_bars(summary), "several values of top: 10, 30; say which"),
        (lambda: views.effect_bars(summary, "mrr", top=10), "no metric 'mrr'"),
        (lambda: views.effect_bars(summary, top=11), "no top 11"),
        (lambda: views.effect_heatmap(summary.drop(columns="kind")), "lacks kind"),
        (lambda: views.effect_curves(found.curves(), knowledge_type="z"), "no knowledge_type 'z'"),
        (lambda: views.effect_curves(found.curves().head(0)), "no rows"),
    ):
        with pytest.raises(InputError, match=message):
            call()
