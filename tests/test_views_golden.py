"""Every view draws what it drew: from tables written by hand, fresh and read back from disk."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from figure_tables import CASES, GOLDEN, draw, essence

from tl_neuron_attr import views
from tl_neuron_attr.errors import InputError

AXES_WITHOUT_UNIT = {
    "layer",
    "layer (emb: embedding)",
    "after layer (emb: embedding)",
    "head",
    "position: token",
    "method",
    "knowledge type",
    "prompt",
}
UNITS = ("nats", "number of", "neurons", "probability", "reciprocal rank", "%", "weight")


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def assert_alike(found, wanted, place="figure"):
    """The same, but for the last digits of a logarithm."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict) and found.keys() == wanted.keys(), place
        for name in wanted:
            assert_alike(found[name], wanted[name], f"{place}.{name}")
    elif isinstance(wanted, list):
        assert isinstance(found, list) and len(found) == len(wanted), place
        for number, pair in enumerate(zip(found, wanted, strict=True)):
            assert_alike(*pair, f"{place}[{number}]")
    elif isinstance(wanted, float) and isinstance(found, float | int):
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12), place
    else:
        assert found == wanted, place


def test_every_view_has_a_golden_figure_and_every_golden_figure_a_view():
    assert {view for view, _, _ in CASES.values()} == set(views.__all__)
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CASES)


def test_every_view_is_on_the_page_of_figures_and_on_that_of_the_api():
    pages = Path(__file__).parents[1] / "docs" / "pages"
    shown, described = ((pages / name).read_text("utf-8") for name in ("views.md", "api.md"))
    for view in views.__all__:
        assert f"views.{view}(" in shown, view
        assert f"::: tl_neuron_attr.views.{view}\n" in described, view
    images = {path.name for path in (pages / "images").glob("views-*.png")}
    assert images == set(re.findall(r"images/(views-[a-z-]+\.png)", shown))


def test_what_is_drawn_is_what_was_drawn(case):
    wanted = json.loads((GOLDEN / f"{case}.json").read_text(encoding="utf-8"))
    assert_alike(essence(draw(case)), wanted)


def test_tables_written_to_parquet_and_read_back_give_the_same_figure(case, tmp_path):
    _, tables, _ = CASES[case]
    again = []
    for number, table in enumerate(tables):
        table.to_parquet(tmp_path / f"{number}.parquet", index=False)
        again.append(pd.read_parquet(tmp_path / f"{number}.parquet"))
    assert draw(case, again).to_json() == draw(case).to_json()


def test_drawing_leaves_the_tables_as_they_were_and_shows_nothing(case, monkeypatch):
    monkeypatch.setattr(go.Figure, "show", lambda *_, **__: pytest.fail("it was shown"))
    _, tables, _ = CASES[case]
    before = [table.copy(deep=True) for table in tables]
    assert isinstance(draw(case), go.Figure)
    for table, copy in zip(tables, before, strict=True):
        pd.testing.assert_frame_equal(table, copy)


def test_every_axis_and_colour_bar_says_what_it_is_and_in_which_unit(case):
    if case == "sankey":  # it has no axes; its title and what hovering shows name the unit
        return
    figure = draw(case).to_dict()
    layout = figure["layout"]
    titles = [
        axis["title"]["text"]
        for name, axis in layout.items()
        if name[1:5] == "axis" and (axis.get("title") or {}).get("text")
    ]
    assert {title[:5] for title in titles}, case
    for name, axis in layout.items():
        if name in ("xaxis", "yaxis") and not axis.get("matches"):
            assert axis["title"].get("text"), f"{name} has no title"
    bars = [trace["colorbar"]["title"]["text"] for trace in figure["data"] if "colorbar" in trace]
    if "coloraxis" in layout:
        bars.append(layout["coloraxis"]["colorbar"]["title"]["text"])
    assert bars or not any(trace["type"] == "heatmap" for trace in figure["data"])
    for title in [*titles, *bars]:
        fits = any(unit in title for unit in UNITS) or "0 to 1" in title
        assert title in AXES_WITHOUT_UNIT or fits, title


def test_an_empty_table_and_one_without_a_column_are_refused(case):
    _, tables, _ = CASES[case]
    rest = tables[1:]
    with pytest.raises(InputError, match="no rows"):
        draw(case, [tables[0].iloc[:0], *rest])
    with pytest.raises(InputError, match="lacks .*give the table of"):
        draw(case, [tables[0].drop(columns=tables[0].columns[0]), *rest])


EVIL = "</script><b>$x$"
FREE = ("token", "source_token", "prompt_id", "knowledge_type", "first", "second", "label")


def hostile(table):
    """The same with every word that is a model's or a user's."""
    words = {
        name: table[name].astype(object).where(table[name].isna(), table[name].astype(str) + EVIL)
        for name in FREE
        if name in table.columns
    }
    lists = {
        name: [[EVIL] * len(tokens) for tokens in table[name]]
        for name in ("raises", "lowers")
        if name in table.columns
    }
    return table.assign(**words, **lists)


def test_hostile_names_and_tokens_are_text_wherever_they_are_shown(case):
    view, tables, _ = CASES[case]
    if view in ("effect_bars", "effect_curves"):  # their rows are chosen by the type's name
        return
    text = json.dumps(essence(draw(case, [hostile(table) for table in tables])))
    shown = ("token", "source_token", "label", "first")
    if any(name in table.columns for table in tables for name in shown):
        assert "&lt;" in text, "nothing hostile is shown: the test is empty"
    assert "</script>" not in text and "<b>$" not in text and "$x$" not in text


# --- properties -------------------------------------------------------------------------------


def test_signed_colours_are_centred_on_zero(case):
    figure = draw(case).to_dict()
    scales = [figure["layout"].get("coloraxis", {}), *figure["data"]]
    scales += [trace["marker"] for trace in figure["data"] if trace.get("marker")]
    ends = [
        (scale[f"{name}min"], scale.get(f"{name}max"))
        for scale in scales
        for name in "zc"
        if scale.get(f"{name}min") is not None
    ]
    assert all(low in (0, -high) for low, high in ends if high is not None)
    if case in ("log_prob_heatmap_contrast", "head_heatmap", "type_layer_heatmap"):
        assert any(low < 0 for low, _ in ends)


def test_marks_are_as_large_as_scores_and_stay_in_their_layer():
    figure = draw("neuron_scatter")
    rows = CASES["neuron_scatter"][1][0]
    for trace, kind in zip(figure.data, ("attn", "ffn"), strict=True):
        here = rows[rows["kind"] == kind]
        assert sorted(trace.y) == sorted(here["score"])
        assert list(trace.marker.size) == [abs(score) for score in trace.y]
        assert list(trace.marker.size) == sorted(trace.marker.size, reverse=True)
        layers = dict(zip(here["score"].round(6), here["layer"], strict=False))
        if kind == "ffn":
            assert [round(x) for x in trace.x] == [layers[round(y, 6)] for y in trace.y]
        assert max(abs(x - round(x)) for x in trace.x) <= 0.35
    sizes = {trace.marker.sizeref for trace in figure.data}
    assert len(sizes) == 1, "both kinds are on one scale"
    first = figure.data[1].customdata[0]
    assert "L0.N7" in first and "raises ·Paris &lt;b&gt;" in first and "+1 nats" in first
    assert "from 1: ·France" in figure.data[0].customdata[0] + figure.data[0].customdata[1]
    assert "raises" not in draw("neuron_scatter_old").data[0].customdata[0]


def test_neurons_of_one_layer_do_not_lie_on_each_other():
    table = CASES["neuron_scatter"][1][0]
    many = pd.concat([table.iloc[[1]].assign(index=k, rank=k + 1) for k in range(300)])
    places = sorted(views.neuron_scatter(many).data[0].x)
    assert np.diff(places).min() > 0.001


def test_cumulative_sums_are_those_of_the_scores():
    attention, ffn = draw("cumulative_share").data
    assert list(ffn.y) == [1.0, 1.25, 1.125] and list(attention.y) == [0.5, 1.0]
    shares = draw("cumulative_share_bands")
    band, most, least = shares.data[3:]
    # 1.25 nats of what is between 1.5 and 2.5
    assert most.y[-1] == pytest.approx(100 * 1.25 / 1.5) and least.y[-1] == pytest.approx(50)
    assert list(band.y) == [*most.y, *reversed(least.y)]


def test_cumulative_shares_need_the_best_neurons_of_one_prompt():
    table, shares = CASES["cumulative_share_bands"][1]
    two = pd.concat([table, table.assign(prompt_id="1")])
    for wrong, beside, message in (
        (two, None, "several prompts"),
        (table.iloc[1:], None, "not have the best ffn neurons"),
        (table, shares.iloc[:1], "no row of kind attn"),
        (table.assign(role="query"), shares, "shares are of value neurons"),
    ):
        with pytest.raises(InputError, match=message):
            views.cumulative_share(wrong, beside)


def test_bars_of_a_method_add_up_to_what_was_chosen():
    for top, total in ((None, 3), (2, 2)):
        table, _ = CASES["method_histogram"][1][0], None
        for trace in views.method_histogram(table, top).data:
            assert sum(trace.y) == pytest.approx(total)
    table = CASES["method_histogram"][1][0]
    for options, message in (
        ({"top": 4}, "the best 3 of each method; got top=4"),
        ({"n_layers": 2}, "has layer 2, but n_layers is 2"),
        ({"kind": "attn"}, "no kind 'attn'"),
    ):
        with pytest.raises(InputError, match=message):
            views.method_histogram(table, **options)


def test_cells_of_log_probs_lie_where_layer_and_token_are():
    (heat,) = draw("log_prob_heatmap").data
    assert heat.x == ("emb", "0", "1") and heat.y == (0, 1, 2)
    assert list(map(list, heat.z)) == [[-8, -6, -4], [-9, -7, -5], [-10, -8, -6]]
    table = CASES["log_prob_heatmap"][1][0]
    shuffled = table.sample(frac=1, random_state=0)
    assert views.log_prob_heatmap(shuffled).to_json() == draw("log_prob_heatmap").to_json()


def test_bands_are_the_bootstrap_interval_of_the_mean():
    from tl_neuron_attr.evaluate.statistics import means

    figure = draw("mask_curves")
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    values = -np.array([[start + top for top in (0, 1, 3)] for start in range(3)], dtype=float)
    ends = means(values, np.arange(3), seed=0)
    assert len(bands) == 2
    assert list(bands[0].y) == pytest.approx([*ends.high, *reversed(ends.low)])
    two = CASES["mask_curves"][1][0].query("prompt_id != 'c'")
    assert not [trace for trace in views.mask_curves(two).data if trace.fill == "toself"]


def test_the_diagonal_of_prompts_is_empty_and_that_of_types_is_not():
    of_types, of_prompts = (
        draw("neuron_overlap").data[0].z,
        draw("neuron_overlap_prompts").data[0].z,
    )
    assert list(of_types[0]) == [0.5, 0.125] and list(of_prompts[0]) == [None, 2.0]
    with pytest.raises(InputError, match="measure must be one of"):
        views.neuron_overlap(CASES["neuron_overlap"][1][0], "cosine")


def test_types_and_layers_of_many_prompts_are_to_be_averaged_first():
    table = CASES["type_layer_heatmap"][1][0]
    with pytest.raises(InputError, match="average prompts with layers_by_type"):
        views.type_layer_heatmap(pd.concat([table, table]))
    plain = views.type_layer_heatmap(table.drop(columns=["rank", "best"]))
    assert "numbered" not in plain.layout.title.text
    assert {mark for trace in plain.data for row in trace.text for mark in row} == {""}
