"""What values show of themselves: short in a line, a box in a notebook, and never a model run."""

import os
from dataclasses import replace
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from conftest import bridge_of, bundled_model, count_forward_passes
from nbclient import NotebookClient

from tl_neuron_attr import (
    Case,
    attribute,
    compare,
    evaluate,
    in_context_heads,
    known_prompts,
    load_prompts,
    neuron_card,
    plan,
    projection_index,
    styled,
    value_query_graph,
)
from tl_neuron_attr.display import Grid, brief, counted, grid, layer_bars, number, signed
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.styled import grid_of

VOID = {"input", "rect", "line", "br"}


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def tags_of(html):
    reader = Balanced()
    reader.feed(html)
    assert reader.open == []
    return reader.tags


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture(scope="module")
def result(model):
    return attribute(model, "The capital of France is")


@pytest.fixture(scope="module")
def values(model, result, tmp_path_factory):
    """Every value that a notebook's cell may end with."""
    prompts = load_prompts("month")[:3]
    shots = attribute(model, "the color red, number two, the", top=5)
    index = projection_index(model, tmp_path_factory.mktemp("index"))
    indexed = attribute(model, "The capital of France is", top=5, index=index)
    compared = compare(result, ["L3.H1"], top=20)
    return {
        "result": result,
        "contrast": attribute(model, "The capital of France is", target=" Paris", against=" Rome"),
        "recomputed": attribute(model, "The capital of France is", top=5, convention="recomputed"),
        "strip": result.token_strip(),
        "ranked": result.ffn_neurons,
        "certificate": result.ffn_neurons.certificate,
        "styled": styled(result.neurons(tokens=5)),
        "card": neuron_card(result, result.ffn_neurons.neurons()[0]),
        "attention card": neuron_card(result, result.attn_neurons.neurons()[0]),
        "graph": value_query_graph(result, tokens=3),
        "comparison": compared,
        "differences": compared.ffn_neurons,
        "plan": plan("tiny-facts", n_tokens=5, operations_per_second=1e9),
        "case": Case(result=result),
        "known": known_prompts(model, prompts),
        "evaluation": evaluate(model, prompts, ["log_prob_increase"], top=[5], filtered=False),
        "heads": in_context_heads(shots, (" color", " number"), scan=False),
        # those below have no box
        "host": result.host,
        "capture": result.captured,
        "read-out": result.out,
        "decomposition": result.ffns[0],
        "query": result.query_scores(),
        "index": index,
        "intervals": indexed.intervals("ffn"),
    }


PLAIN = {"host", "capture", "read-out", "decomposition", "query", "index", "intervals"}
OF_SEVERAL_LINES = {"strip", "card", "attention card", "plan"}


def test_one_of_a_kind_is_counted_as_one():
    assert [counted(each, "layer") for each in (0, 1, 2, 1200)] == [
        *("0 layers", "1 layer", "2 layers", "1,200 layers")
    ]
    found = attribute(bridge_of("gpt2"), [3, 17], top=1)
    assert repr(replace(found, warnings=("mind the gap",))).endswith(" neurons, 1 warning")


def test_every_value_has_a_short_repr(values):
    for name, value in values.items():
        shown = repr(value)
        assert "tensor(" not in shown and "dtype" not in shown.replace("dtype=torch", ""), name
        if name in OF_SEVERAL_LINES:
            assert max(map(len, shown.splitlines())) <= 100, name
        else:
            assert len(shown) < 800 and "\n" not in shown, (name, shown)


def test_every_box_is_whole_small_without_a_script_and_runs_no_model(values, model, monkeypatch):
    counted = count_forward_passes(model, monkeypatch)
    for name in values.keys() - PLAIN:
        html = values[name]._repr_html_()
        assert html == values[name]._repr_html_(), name
        tags = tags_of(html)
        assert tags[:2] == ["div", "style"] and "script" not in tags, name
        assert "http" not in html and "tensor(" not in html, name
        assert len(html) < 60_000, (name, len(html))
    assert not counted


def test_a_result_shows_what_one_asks_first(result):
    html = result._repr_html_()
    for words in (
        "·Paris",
        "p = 0.955",
        "<bdi>·France</bdi>",
        "rise in log p(target), nats",
        "FFN value neurons, the best 5",
        str(result.ffn_neurons.neurons()[0]),
        "proven of 3,072: ",
        "bounds exclude the others",
        "result.token_strip()",
    ):
        assert words in html, words


def test_warnings_stand_in_the_box():
    model = bridge_of("gpt2", processed=True)
    with pytest.warns(UserWarning):
        found = attribute(model, [1, 2, 3], top=3)
    assert found.warnings and "Warning:" in found._repr_html_()


def test_a_result_whose_weights_are_gone_is_shown_without_tokens(result, monkeypatch):
    def gone(*arguments):
        raise RuntimeError("Tensor on device meta is not on the expected device\nmore")

    monkeypatch.setattr("tl_neuron_attr.attribution.project", gone)
    html = result._repr_html_()
    assert (
        "shown without their tokens: Tensor on device meta is not on the expected device<" in html
    )
    assert str(result.ffn_neurons.neurons()[0]) in html


def test_the_certificate_says_why_in_a_sentence(values):
    assert str(values["certificate"]).startswith("proven of 3,072: ")
    assert "linear" in str(values["contrast"].ffn_neurons.certificate)
    assert "no bound holds" in str(values["recomputed"].ffn_neurons.certificate)


# --- tables -----------------------------------------------------------------------------------


def test_styled_leaves_the_table_alone_and_names_its_neurons(result):
    table = result.neurons(tokens=8)
    before = table.copy()
    shown = styled(table, "neurons", top=4, tokens=3)
    html = shown._repr_html_()
    assert shown.table is table and isinstance(table, pd.DataFrame)
    pd.testing.assert_frame_equal(table, before)
    cells = grid_of(table, top=4, tokens=3)
    assert cells.header == ("neuron", "coefficient", "score, nats", "#", "raises", "lowers")
    assert [row[0] for row in cells.rows] == [str(n) for n in result.ffn_neurons.neurons()[:4]]
    assert all(len(row[-1]) == 3 for row in cells.rows) and cells.more == len(table) - 4
    assert "and 596 more" in html and "<code>·" in html
    attention = grid_of(result.neurons("attn", 2, tokens=2))
    assert attention.header[:2] == ("neuron", "coefficient") and "source" in attention.header


def test_tables_of_other_things_are_shown_too(result):
    assert grid_of(result.heads(3)).header == ("head", "score, nats")
    assert grid_of(result.heads(3)).rows[0][0] == "L3.H2"
    assert grid_of(result.layers()).header == ("layer", "kind", "score, nats")
    assert grid_of(result.query_layers()).rows[0][1] == "embed"
    assert grid_of(pd.DataFrame({"x": []})).rows == ()
    assert "source pos" in grid_of(result.positions(3, 1)).header
    with pytest.raises(InputError, match="top must be at least 1"):
        styled(result.heads(), top=0)


def test_bars_are_as_long_as_scores_are_large_and_say_their_sign():
    html = grid(Grid(header=("", "x"), rows=(("a", 2.0), ("b", -1.0)), bars=frozenset({1})))
    assert "width:100%;background:rgb(60,147,80)" in html
    assert "width:50%;background:rgb(153,112,171)" in html
    assert "+2.00" in html and "−1.00" in html


def test_layer_bars_stand_on_0():
    html = layer_bars([1.0, -1.0], [0.5, 0.0], "nats")
    heights = [float(part.split('"')[0]) for part in html.split('height="')[1:]]
    assert heights == [60.0, 30.0, 60.0, 0.5]
    tags_of(html)


def test_numbers_that_are_none_do_not_stop_a_page():
    assert [number(x) for x in (float("inf"), float("-inf"), 0.0)] == ["inf", "−inf", "0"]
    assert signed(1e-9) == "+1.0e−09"
    assert "nan" not in grid(Grid(header=("x",), rows=((float("nan"),),)))


def test_brief_is_used_where_a_dataclass_would_print_every_number(result):
    assert brief(result.captured) == repr(result.captured)
    assert "float32[6, 6, 128]" in repr(result.captured) or "float32[6" in repr(result.captured)


# --- in a notebook ----------------------------------------------------------------------------

CELLS = (
    "import plotly.io; before = plotly.io.renderers.default",
    "import tl_neuron_attr as t; from tl_neuron_attr import views\n"
    "assert plotly.io.renderers.default == before\n"
    "model = t.load_model('tiny-facts')\n"
    "result = t.attribute(model, 'The capital of France is', top=20)\n"
    "result",
    "figure = views.layer_bars(result.layers())\n"
    "assert plotly.io.renderers.default == before\n"
    "figure",
    "result.token_strip()",
    "t.styled(result.neurons(tokens=5))",
)


@pytest.mark.slow
def test_a_kernel_shows_boxes_strips_and_figures(tmp_path):
    """What Jupyter, VS Code and Colab get, and what a notebook saved as HTML holds."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("PLOTLY_RENDERER", raising=False)
        environment.setenv("HF_HUB_OFFLINE", "1")
        environment.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.getcwd(), *_path()])))
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [
        [output.data for output in cell.outputs if "data" in output] for cell in notebook.cells
    ]
    (result,), (figure,), (strip,), (table,) = shown[1:]
    assert "application/vnd.plotly.v1+json" in figure
    assert result["text/plain"].startswith("Attribution of ·Paris")
    for data in (result, strip, table):
        assert data["text/html"].startswith('<div class="tlna"><style>')
        assert "<script" not in data["text/html"]  # so a saved page shows it as it stands


def _path():
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)
