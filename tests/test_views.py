"""Figures drawn from tables: their data, their scales and units, and tokens meant to break them."""

import json
import subprocess
import sys

import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest

from tl_neuron_attr import attribute
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.tables import HEAD_COLUMNS, LAYER_COLUMNS, NEURON_COLUMNS, POSITION_COLUMNS
from tl_neuron_attr.views import head_heatmap, layer_bars, neuron_histogram, position_bars

UNIT = "rise in log p(target), nats"
HOSTILE = [
    "<s>",
    "<b>bold</b>",
    " <br>",
    "&lt;",
    "$x$",
    "%{x}",
    "\n",
    "\t",
    " ",
    "",
    "\u202eevil",
    " France",
    " France",
]


def layers_of(n_layers):
    rows = [(i, kind, i - 1.5) for i in range(n_layers) for kind in ("attn", "ffn")]
    return pd.DataFrame(rows, columns=LAYER_COLUMNS)


def heads_of(n_layers, n_heads):
    rows = [(i, j, i - 2.0 * j) for i in range(n_layers) for j in range(n_heads)]
    return pd.DataFrame(rows, columns=HEAD_COLUMNS)


def positions_of(tokens, layer=2, head=5):
    rows = [(layer, head, i, token, 0.1 * i, 0.5 - i) for i, token in enumerate(tokens)]
    return pd.DataFrame(rows, columns=POSITION_COLUMNS)


def neurons_of(layers, kind="ffn", prompt_id="0", role="value"):
    """A neuron table whose neurons lie in ``layers``, best first."""
    table = pd.DataFrame(
        {
            "prompt_id": prompt_id,
            "role": role,
            "kind": kind,
            "layer": layers,
            "head": None,
            "index": range(len(layers)),
            "source_pos": None,
            "coefficient": 1.0,
            "score": [1.0 / (i + 1) for i in range(len(layers))],
            "rank": range(1, len(layers) + 1),
        },
        columns=list(NEURON_COLUMNS),
    )
    words = dict.fromkeys(["prompt_id", "role", "kind"], "string")
    return table.astype({**words, "head": "Int64", "source_pos": "Int64"})


DRAWN = {
    "layers": (layer_bars, layers_of(3)),
    "heads": (head_heatmap, heads_of(3, 2)),
    "positions": (position_bars, positions_of(["<s>", " a", "\n"])),
    "neurons": (
        neuron_histogram,
        pd.concat([neurons_of([2, 0, 2]), neurons_of([1, 1], kind="attn")], ignore_index=True),
    ),
}


@pytest.fixture(params=DRAWN)
def drawn(request):
    """Name, function and table, of each figure in turn."""
    return (request.param, *DRAWN[request.param])


def data_of(figure):
    """The traces as a browser gets them."""
    return json.loads(figure.to_json())["data"]


def ticks_of(axis, low, high):
    return sum(1 for value in range(low, high) if (value - axis.tick0) % axis.dtick == 0)


# -- what is drawn ------------------------------------------------------------------------------


def test_layer_bars_draw_attention_and_ffn_scores_in_layer_order():
    table = pd.DataFrame(
        [(1, "ffn", 4.0), (0, "ffn", 2.0), (1, "attn", -3.0), (0, "attn", 1.0)],
        columns=LAYER_COLUMNS,
    )
    attention, ffn = data_of(layer_bars(table))
    assert (attention["name"], attention["x"], attention["y"]) == ("attention", [0, 1], [1.0, -3.0])
    assert (ffn["name"], ffn["x"], ffn["y"]) == ("FFN", [0, 1], [2.0, 4.0])
    assert attention["marker"]["color"] != ffn["marker"]["color"]


def test_a_kind_that_is_alone_is_still_named():
    layers = layers_of(2)
    alone = layer_bars(layers[layers["kind"] == "ffn"]), neuron_histogram(neurons_of([0]))
    for figure in alone:
        (trace,) = figure.data
        assert (trace.name, trace.showlegend) == ("FFN", True)


def test_the_heat_map_puts_each_head_in_its_cell():
    shuffled = heads_of(3, 2).sample(frac=1, random_state=0)
    (trace,) = data_of(head_heatmap(shuffled))
    assert (trace["x"], trace["y"]) == ([0, 1, 2], [0, 1])
    assert trace["z"] == [[0.0, 1.0, 2.0], [-2.0, -1.0, 0.0]]


def test_heads_missing_from_the_table_are_gaps_and_not_zeros():
    figure = head_heatmap(heads_of(3, 2).nlargest(2, "score"))
    assert data_of(figure)[0]["z"] == [[None, 1.0, 2.0]]
    assert figure.layout.plot_bgcolor is not None
    assert head_heatmap(heads_of(3, 2)).layout.plot_bgcolor is None


def test_position_bars_draw_scores_and_attention_at_the_positions():
    table = positions_of([" a", " b", " c"]).iloc[::-1]
    figure = position_bars(table)
    score, attention = data_of(figure)
    assert score["y"] == attention["y"] == [0, 1, 2]
    assert score["x"] == [0.5, -0.5, -1.5]
    assert attention["x"] == pytest.approx([0.0, 0.1, 0.2])
    assert (score["orientation"], attention["orientation"]) == ("h", "h")
    low, high = figure.layout.yaxis.range
    assert low > high, "tokens must read from top to bottom"


def test_the_histogram_counts_the_top_neurons_of_each_kind():
    table = pd.concat([neurons_of([3, 0, 3, 1]), neurons_of([2, 2, 1], kind="attn")])
    counts = {trace["name"]: trace["y"] for trace in data_of(neuron_histogram(table, top=3))}
    assert counts == {"attention": [0, 1, 2, 0], "FFN": [1, 0, 0, 2]}
    every = {trace["name"]: trace["y"] for trace in data_of(neuron_histogram(table))}
    assert every == {"attention": [0, 1, 2, 0], "FFN": [1, 1, 0, 2]}


def test_the_histogram_ranks_prompts_one_by_one_and_adds_them_up():
    table = pd.concat([neurons_of([0, 0, 1]), neurons_of([1, 0, 0], prompt_id="1")])
    figure = neuron_histogram(table, top=1)
    assert data_of(figure)[0]["y"] == [1, 1]
    assert "2 prompts" in figure.layout.title.text


def test_the_histogram_can_show_layers_without_neurons():
    (trace,) = data_of(neuron_histogram(neurons_of([1]), n_layers=4))
    assert (trace["x"], trace["y"]) == ([0, 1, 2, 3], [0, 1, 0, 0])


# -- scales and units ---------------------------------------------------------------------------


def test_colours_of_signed_scores_are_symmetrical_about_zero():
    heat = head_heatmap(heads_of(5, 2)).data[0]  # scores from -2 to 4
    assert (heat.zmid, heat.zmin, heat.zmax) == (0, -4.0, 4.0)
    bars = position_bars(positions_of([" a", " b", " c"])).data[0].marker
    assert (bars.cmid, bars.cmin, bars.cmax) == (0, -1.5, 1.5)
    assert list(bars.color) == [0.5, -0.5, -1.5]
    for scale in (heat.colorscale, bars.colorscale):
        assert scale[0][1] != scale[-1][1], "both signs look the same"
        places = [place for place, _ in scale]
        assert places == pytest.approx([1 - place for place in reversed(places)])
    assert bars.colorscale[0] == heat.colorscale[0]
    assert bars.colorscale[-1] == heat.colorscale[-1]


def test_scores_that_are_all_zero_still_have_a_colour_scale():
    heat = head_heatmap(heads_of(3, 2).assign(score=0.0)).data[0]
    assert heat.zmin < 0 < heat.zmax


def test_every_axis_and_colour_bar_names_its_unit():
    layers = layer_bars(layers_of(3)).layout
    assert (layers.xaxis.title.text, layers.yaxis.title.text) == ("layer", UNIT)
    heads = head_heatmap(heads_of(3, 2))
    assert (heads.layout.xaxis.title.text, heads.layout.yaxis.title.text) == ("layer", "head")
    assert heads.data[0].colorbar.title.text == UNIT
    positions = position_bars(positions_of([" a"])).layout
    assert positions.xaxis.title.text == UNIT
    assert positions.xaxis2.title.text == "attention weight"
    assert positions.yaxis.title.text == "position: token"
    neurons = neuron_histogram(neurons_of([0])).layout
    assert (neurons.xaxis.title.text, neurons.yaxis.title.text) == ("layer", "number of neurons")


def test_hovering_shows_the_unit_of_a_score():
    for figure in (layer_bars(layers_of(2)), head_heatmap(heads_of(2, 2))):
        assert all("nats" in trace.hovertemplate for trace in figure.data)
    assert "nats" in position_bars(positions_of([" a"])).data[0].hovertemplate


def test_large_models_get_fewer_ticks_or_a_taller_figure():
    for figure in (layer_bars(layers_of(48)), head_heatmap(heads_of(48, 48))):
        assert ticks_of(figure.layout.xaxis, 0, 48) <= 24
    heads = head_heatmap(heads_of(48, 48)).layout
    assert heads.height >= 12 * ticks_of(heads.yaxis, 0, 48) + 100
    assert (
        head_heatmap(heads_of(48, 48)).layout.height > head_heatmap(heads_of(48, 8)).layout.height
    )


def test_small_models_get_a_tick_at_every_layer():
    assert ticks_of(layer_bars(layers_of(12)).layout.xaxis, 0, 12) == 12


@pytest.mark.parametrize(("n_tokens", "n_labels"), [(60, 60), (1000, 77)])
def test_long_prompts_stay_readable(n_tokens, n_labels):
    layout = position_bars(positions_of([" the"] * n_tokens)).layout
    assert len(layout.yaxis.ticktext) == len(layout.yaxis.tickvals) == n_labels
    assert 16 * n_labels < layout.height < 2000


# -- tokens -------------------------------------------------------------------------------------


def test_tokens_show_their_spaces_and_newlines_and_keep_duplicates_apart():
    axis = position_bars(positions_of([" France", " France", "\n", "a\tb"])).layout.yaxis
    assert list(axis.tickvals) == [0, 1, 2, 3]
    assert list(axis.ticktext) == ["0: ·France", "1: ·France", "2: ⏎", "3: a⇥b"]


def test_markup_in_tokens_is_escaped_wherever_it_is_shown():
    figure = position_bars(positions_of(HOSTILE))
    ticks = list(figure.layout.yaxis.ticktext)
    assert ticks[:6] == [
        "0: &lt;s&gt;",
        "1: &lt;b&gt;bold&lt;/b&gt;",
        "2: ·&lt;br&gt;",
        "3: &amp;lt;",
        "4: &#36;x&#36;",
        "5: %{x}",
    ]
    for trace in figure.data:
        assert list(trace.customdata) == ticks
        assert "%{customdata}" in trace.hovertemplate


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("", "(empty)"),
        ("\n\n", "⏎⏎"),
        ("\u202eevil", "\\u202eevil"),
        ("\x00", "\\x00"),
        ("\u00a0", "\\xa0"),
        ("日本", "日本"),
    ],
)
def test_a_token_label_hides_nothing(token, shown):
    assert position_bars(positions_of([token])).layout.yaxis.ticktext == (f"0: {shown}",)


def test_a_long_token_is_shortened_before_it_is_escaped():
    (label,) = position_bars(positions_of(["<" * 500])).layout.yaxis.ticktext
    assert label == "0: " + "&lt;" * 17 + "…"


# -- titles -------------------------------------------------------------------------------------


def test_titles_have_a_default_and_can_be_set_or_left_out(drawn):
    _, draw, table = drawn
    assert draw(table).layout.title.text
    assert draw(table, title="My own").layout.title.text == "My own"
    assert draw(table, title="").layout.title.text is None


def test_titles_are_plain_text_and_wrap(drawn):
    _, draw, table = drawn
    short, long = draw(table, title="<b>$1$</b>"), draw(table, title="word " * 40)
    assert short.layout.title.text == "&lt;b&gt;&#36;1&#36;&lt;/b&gt;"
    lines = long.layout.title.text.split("<br>")
    assert len(lines) == 3 and max(map(len, lines)) <= 80
    assert long.layout.margin.t > short.layout.margin.t
    assert long.layout.height > short.layout.height


def test_the_default_title_of_positions_names_the_head():
    assert "L2.H5" in position_bars(positions_of([" a"])).layout.title.text


# -- tables in, figures out ---------------------------------------------------------------------


def test_a_table_read_back_from_disk_gives_the_same_figure(drawn, tmp_path):
    name, draw, table = drawn
    table.to_parquet(tmp_path / f"{name}.parquet", index=False)
    again = pd.read_parquet(tmp_path / f"{name}.parquet")
    assert draw(again).to_json() == draw(table).to_json()


def test_drawing_leaves_the_table_as_it_was(drawn):
    _, draw, table = drawn
    before = table.copy(deep=True)
    assert isinstance(draw(table), go.Figure)
    pd.testing.assert_frame_equal(table, before)


def test_the_order_of_rows_and_their_index_do_not_matter(drawn):
    _, draw, table = drawn
    shuffled = table.sample(frac=1, random_state=1)
    assert draw(shuffled).to_json() == draw(table).to_json()


def test_the_tables_of_an_attribution_can_be_drawn(tiny_model):
    found = attribute(tiny_model, [3, 17, 5, 40], top=20)
    layers = found.layers()
    drawn = {trace["name"]: trace["y"] for trace in data_of(layer_bars(layers))}
    assert drawn["FFN"] == layers.loc[layers["kind"] == "ffn", "score"].tolist()
    cells = sum(data_of(head_heatmap(found.heads()))[0]["z"], [])
    assert sorted(cells) == sorted(found.heads()["score"].tolist())
    bars = data_of(position_bars(found.positions(1, 2)))[0]["x"]
    assert bars == found.positions(1, 2)["score"].tolist()
    counts = [trace["y"] for trace in data_of(neuron_histogram(found.neurons(), top=20))]
    assert [sum(count) for count in counts] == [20, 20]


@pytest.mark.slow
def test_importing_and_drawing_set_no_global_theme():
    code = (
        "import plotly.io as io; before = io.templates.default, io.renderers.default\n"
        "import pandas as pd\n"
        "from tl_neuron_attr.views import layer_bars\n"
        "table = pd.DataFrame({'layer': [0], 'kind': ['ffn'], 'score': [1.0]})\n"
        "assert layer_bars(table).layout.template.layout.paper_bgcolor == 'white'\n"
        "assert (io.templates.default, io.renderers.default) == before, io.templates.default\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


def test_the_theme_is_the_same_whatever_the_default_is(drawn, monkeypatch):
    _, draw, table = drawn
    expected = draw(table).to_json()
    monkeypatch.setattr(plotly.io.templates, "default", "plotly_dark")
    assert draw(table).to_json() == expected


# -- errors -------------------------------------------------------------------------------------


def test_an_empty_table_is_an_error(drawn):
    name, draw, table = drawn
    with pytest.raises(InputError, match=f"{name} table has no rows"):
        draw(table.iloc[:0])


def test_a_missing_column_is_named(drawn):
    name, draw, table = drawn
    with pytest.raises(InputError, match=rf"lacks layer: give the table of Attribution.{name}\(\)"):
        draw(table.drop(columns="layer"))


def test_positions_of_several_heads_are_an_error_that_says_how_to_choose():
    table = pd.concat([positions_of([" a"]), positions_of([" a"], head=6)])
    with pytest.raises(InputError, match=r"2 heads.*positions\(layer=2, head=5\)"):
        position_bars(table)


@pytest.mark.parametrize("name", ["layers", "heads", "positions"])
def test_tables_of_two_prompts_put_together_are_an_error(name):
    draw, table = DRAWN[name]
    with pytest.raises(InputError, match=f"{name} table has more than one row for"):
        draw(pd.concat([table, table]))


@pytest.mark.parametrize("name", ["layers", "heads", "positions"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_scores_that_are_not_finite_are_an_error(name, bad):
    draw, table = DRAWN[name]
    with pytest.raises(InputError, match="1 scores .* not finite"):
        draw(table.assign(score=[bad, *table["score"].iloc[1:]]))


def test_an_unknown_kind_is_an_error():
    with pytest.raises(InputError, match="attn, ffn, got mlp"):
        layer_bars(layers_of(2).replace({"kind": {"ffn": "mlp"}}))
    with pytest.raises(InputError, match="attn, ffn, got mlp"):
        neuron_histogram(neurons_of([0], kind="mlp"))


def test_value_and_query_neurons_are_not_mixed():
    with pytest.raises(InputError, match="mixes the roles query, value"):
        neuron_histogram(pd.concat([neurons_of([0]), neurons_of([0], role="query")]))


def test_a_top_that_the_table_cannot_give_is_an_error():
    table = pd.concat([neurons_of([0, 1, 2]), neurons_of([0, 1], kind="attn")])
    neuron_histogram(table, top=2)
    with pytest.raises(InputError, match="only 2 attn neurons of prompt '0'.*top=3"):
        neuron_histogram(table, top=3)
    with pytest.raises(InputError, match="top must be at least 1, got 0"):
        neuron_histogram(table, top=0)


def test_a_layer_beyond_the_model_is_an_error():
    with pytest.raises(InputError, match="has layer 2, but n_layers is 2"):
        neuron_histogram(neurons_of([0, 2]), n_layers=2)
