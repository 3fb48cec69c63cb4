"""The comparison with the published notebooks can agree, differ and be skipped."""

from dataclasses import replace

import pytest
from conftest import bundled_model

from tl_neuron_attr import InputError, attribute
from tl_neuron_attr.paper.check import check_published, compare_example
from tl_neuron_attr.paper.published import MODELS, Example, Scores, published_example

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model():
    return bundled_model()


@pytest.fixture(scope="module")
def example(model):
    """What a notebook would print about the bundled model, rounded as notebooks round."""
    result = attribute(model, PROMPT, convention="published", prepend_bos=False)

    def scores(table, *columns, decimals=4, value="score", top=None):
        table = table if top is None else table.sort_values(value, ascending=False).head(top)
        where = [[None if cell != cell else cell for cell in table[name]] for name in columns]
        rows = zip(zip(*where, strict=True), table[value].round(decimals), strict=True)
        return Scores(rows=tuple(rows), decimals=decimals, all=top is None)

    def query_layers(kind, top_values):
        table = result.query_layers(kind, top_values=top_values)
        table = table[table["kind"] != "bias"]
        return table.assign(layer=[None if x != x else x for x in table["layer"].astype(float)])

    host = result.host
    layers = scores(result.layers(), "layer", "kind", decimals=3)
    best = result.heads(1).iloc[0]
    positions = result.positions(int(best["layer"]), int(best["head"]))
    where = ("layer", "head", "source_pos")
    return Example(
        prompt=PROMPT,
        bos=False,
        n_tokens=5,
        shape={"layers": 6, "heads": 4, "d_head": host.d_head, "d_mlp": host.d_mlp},
        target=result.target.id,
        predictions=tuple(text.strip() for text in result.predictions(10)["token"]),
        layers=layers,
        layer_sums={
            name: sum(score for (_, kind), score in layers.rows if kind == name)
            for name in ("attn", "ffn")
        },
        heads=scores(result.heads(), "layer", "head", top=20),
        head_positions=scores(positions, *where),
        attention=scores(positions, *where, value="attention"),
        ffn_neurons=scores(result.neurons("ffn"), "layer", "index", top=10),
        attn_neurons=scores(result.neurons("attn"), "layer", "head", "index", "source_pos", top=50),
        query_layers_of_ffn=scores(query_layers("ffn", 100), "layer", "kind"),
        query_layers_of_attn=scores(query_layers("attn", 100), "layer", "kind", top=10),
        query_neurons=scores(result.query_neurons(10), "layer", "index", top=10),
        top_values={"ffn": 100, "attn": 100, "query_neurons": 30},
        neurons_by_layer={},
    )


def test_a_notebook_that_printed_what_is_computed_here_agrees(model, example):
    table = check_published({"tiny": model}, examples={"tiny": example})
    assert table["verdict"].tolist() == ["agrees"] * 12
    assert (table["largest_difference"] <= table["tolerance"]).all()
    assert table["entries"].sum() > 100


def changed(scores, place, *, by=0.0, where=None):
    rows = list(scores.rows)
    old, score = rows[place]
    rows[place] = (where or old, score + by)
    return replace(scores, rows=tuple(rows))


@pytest.mark.parametrize(
    ("what", "broken"),
    [
        ("layers", lambda e: {"layers": changed(e.layers, 7, by=0.02)}),
        ("heads", lambda e: {"heads": changed(e.heads, 0, by=0.05)}),
        ("FFN neurons", lambda e: {"ffn_neurons": changed(e.ffn_neurons, 3, where=(0, 0))}),
        (
            "attention neurons",
            lambda e: {"attn_neurons": replace(e.attn_neurons, rows=e.attn_neurons.rows[:0:-1])},
        ),
        (
            "query layers of FFN neurons",
            lambda e: {"query_layers_of_ffn": changed(e.query_layers_of_ffn, 0, by=-0.5)},
        ),
        ("query neurons", lambda e: {"query_neurons": changed(e.query_neurons, 9, by=0.05)}),
        ("predictions", lambda e: {"predictions": e.predictions[::-1]}),
        ("sums over layers", lambda e: {"layer_sums": {**e.layer_sums, "ffn": 99.0}}),
        ("number of tokens", lambda e: {"n_tokens": 6}),
    ],
)
def test_a_broken_number_differs_and_nothing_else_does(model, example, what, broken):
    table = check_published({"tiny": model}, examples={"tiny": replace(example, **broken(example))})
    assert table["what"][table["verdict"] == "differs"].tolist() == [what]


def test_weights_that_are_not_at_hand_are_skipped_with_a_reason():
    table = check_published()
    assert table["model"].tolist() == [*MODELS]
    assert table["verdict"].tolist() == ["skipped", "skipped"]
    assert table["note"].str.contains("HF_HUB_OFFLINE").all()


def test_a_model_of_another_shape_and_a_lost_directory_are_errors(model):
    with pytest.raises(InputError, match="layers 36, heads 20, d_head 64, d_mlp 5120"):
        compare_example(model, published_example("gpt2-large"))
    with pytest.raises(InputError, match="no such directory"):
        check_published({"gpt2-large": "./nowhere"})


def test_what_ships_with_the_package_is_what_was_saved():
    gpt2, llama = map(published_example, MODELS)
    assert gpt2.heads.rows[0] == ((21, 19), 0.6981)
    assert gpt2.ffn_neurons.rows[0] == ((28, 29), 0.4481)
    assert llama.attn_neurons.rows[0] == ((21, 0, 79, 3), 0.0433)
    assert len(llama.attn_neurons.rows) == 50
    for example in (gpt2, llama):  # rounding, summed
        for kind, total in example.layer_sums.items():
            scores = [score for (_, of), score in example.layers.rows if of == kind]
            assert sum(scores) == pytest.approx(total, abs=1e-9)
        counts = example.neurons_by_layer
        assert sum(counts["ffn_value"]) == sum(counts["attn_value"]) == 300
        assert sum(counts["query_only"]) + sum(counts["query_and_value"]) == 300
