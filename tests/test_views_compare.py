"""Figures of comparisons, head scans and curves: their data, their units, and what they refuse."""

import json

import pandas as pd
import pytest

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tables import (
    COMPARED_LAYER_COLUMNS,
    COMPARED_NEURON_COLUMNS,
    CURVE_COLUMNS,
    HEAD_SCAN_COLUMNS,
)
from tl_neuron_attr.views import (
    compared_layer_bars,
    compared_neuron_scatter,
    head_scan_heatmap,
    mask_curves,
)

LAYERS = pd.DataFrame(
    [(0, "attn", 1.0, 0.5, 0.5), (0, "ffn", -2.0, 1.0, -3.0), (1, "attn", 3.0, 3.0, 0.0)]
    + [(1, "ffn", 0.25, 0.5, -0.25)],
    columns=list(COMPARED_LAYER_COLUMNS),
)
NEURONS = pd.DataFrame(
    [
        ("0", "ffn", 1, None, 7, None, 1.0, 0.5, 0.3, 0.1, 0.2, 1),
        ("0", "attn", 0, 2, 5, 4, 1.0, 0.5, -0.3, 0.1, -0.4, 1),
        ("0", "attn", 0, 2, 6, None, 1.0, 0.5, 0.0, 0.0, 0.0, 2),
    ],
    columns=list(COMPARED_NEURON_COLUMNS),
).astype({"head": "Int64", "source_pos": "Int64"})
SCAN = pd.DataFrame(
    [(layer, head, layer - 2.0 * head) for layer in range(3) for head in range(2)],
    columns=list(HEAD_SCAN_COLUMNS),
)


def curve(prompt_id, keep, log_probs, tops=(0, 10, 100), kind="ffn"):
    rows = [
        (prompt_id, kind, keep, top, top, log_prob, 0.1, 2, False)
        for top, log_prob in zip(tops, log_probs, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(CURVE_COLUMNS))


CURVE = curve("0", False, (0.0, -1.0, -4.0))
DRAWN = {
    "layers": (compared_layer_bars, LAYERS),
    "neurons": (compared_neuron_scatter, NEURONS),
    "head scan": (head_scan_heatmap, SCAN),
    "curve": (mask_curves, CURVE),
}


@pytest.fixture(params=DRAWN)
def drawn(request):
    return (request.param, *DRAWN[request.param])


def data_of(figure):
    return json.loads(figure.to_json())["data"]


def test_layers_are_drawn_twice_with_their_difference():
    figure = compared_layer_bars(LAYERS.sample(frac=1, random_state=0))
    found = {(trace["name"], trace["yaxis"]): (trace["x"], trace["y"]) for trace in data_of(figure)}
    assert found["attention, original", "y"] == ([0, 1], [1.0, 3.0])
    assert found["attention, other", "y"] == ([0, 1], [0.5, 3.0])
    assert found["difference", "y"] == ([0, 1], [0.5, 0.0])
    assert found["FFN, original", "y2"] == ([0, 1], [-2.0, 0.25])
    assert found["difference", "y2"] == ([0, 1], [-3.0, -0.25])
    assert sum(trace.name == "difference" and trace.showlegend for trace in figure.data) == 1
    assert figure.layout.yaxis.title.text == "attention: rise, nats"
    assert figure.layout.yaxis2.title.text == "FFN: rise, nats"
    assert figure.layout.xaxis2.title.text == "layer" and figure.layout.xaxis.title.text is None


def test_neurons_lie_at_both_scores_and_keep_their_labels():
    line, attention, ffn = data_of(compared_neuron_scatter(NEURONS))
    assert line["x"] == line["y"] and line["x"][0] < -0.3 and line["x"][1] > 0.3
    assert (attention["x"], attention["y"]) == ([0.1, 0.0], [-0.3, 0.0])
    assert attention["customdata"] == ["L0.H2.D5@4", "L0.H2.D6"]
    assert (ffn["x"], ffn["y"], ffn["customdata"]) == ([0.1], [0.3], ["L1.N7"])


def test_the_scan_puts_each_head_in_its_cell():
    figure = head_scan_heatmap(SCAN.sample(frac=1, random_state=0))
    (trace,) = data_of(figure)
    assert trace["z"] == [[0.0, 1.0, 2.0], [-2.0, -1.0, 0.0]]
    assert (trace["zmin"], trace["zmax"]) == (-2.0, 2.0)
    assert trace["colorbar"]["title"]["text"] == "change of log p(target), nats"


def test_one_prompts_curve_is_its_own_points():
    (trace,) = data_of(mask_curves(CURVE))
    assert (trace["x"], trace["y"]) == ([0, 1, 2], [0.0, -1.0, -4.0])
    assert trace["name"] == "FFN, the top zeroed" and trace["customdata"] == [0, 10, 100]
    figure = mask_curves(CURVE)
    assert figure.layout.xaxis.ticktext == ("0", "10", "100")
    assert figure.layout.yaxis.title.text == "log p(target), nats"


def test_several_prompts_are_averaged_and_masks_told_from_keeps():
    tables = [
        CURVE,
        curve("1", False, (-1.0, -3.0, -6.0)),
        curve("0", True, (-8.0, -2.0), tops=(0, 100)),
        curve("0", False, (0.0, -9.0), tops=(0, 30), kind="attn"),
    ]
    figure = mask_curves(pd.concat(tables, ignore_index=True))
    named = {trace["name"]: trace for trace in data_of(figure) if trace.get("name")}
    assert [*named] == [
        "attention, the top zeroed",
        "FFN, the top zeroed",
        "FFN, only the top kept",
    ]
    assert named["FFN, the top zeroed"]["y"] == [-0.5, -2.0, -5.0]
    assert named["FFN, only the top kept"]["x"] == [0, 3]
    assert named["FFN, only the top kept"]["line"]["dash"] == "dash"
    assert named["attention, the top zeroed"]["x"] == [0, 2]
    assert sum(not trace.get("name") for trace in data_of(figure)) == 2
    assert "mean of 2 prompts" in figure.layout.title.text


def test_titles_have_a_default_and_can_be_set_or_left_out(drawn):
    _, draw, table = drawn
    assert draw(table).layout.title.text
    assert draw(table, title="<b>Mine</b>").layout.title.text == "&lt;b&gt;Mine&lt;/b&gt;"
    assert draw(table, title="").layout.title.text is None


def test_a_table_read_back_from_disk_gives_the_same_figure(drawn, tmp_path):
    _, draw, table = drawn
    table.to_parquet(tmp_path / "table.parquet")
    assert draw(pd.read_parquet(tmp_path / "table.parquet")).to_json() == draw(table).to_json()


def test_what_cannot_be_drawn_is_refused(drawn):
    name, draw, table = drawn
    value = {"head scan": "change", "curve": "log_prob"}.get(name, "difference")
    with pytest.raises(InputError, match="no rows"):
        draw(table.iloc[:0])
    with pytest.raises(InputError, match=f"lacks {value}: give the table of"):
        draw(table.drop(columns=value))
    with pytest.raises(InputError, match=f"1 {value}s of the {name} table are not finite"):
        draw(table.assign(**{value: [float("nan"), *table[value][1:]]}))
    if name != "neurons":
        with pytest.raises(InputError, match="more than one row"):
            draw(pd.concat([table, table]))
