"""Tables back to neurons: what a table lists is what it was made from."""

import pandas as pd
import pytest
from conftest import TOKENS, bridge_of

from tl_neuron_attr import AttnNeuron, FFNNeuron, InputError, attribute, neurons_of


@pytest.fixture(scope="module")
def result():
    return attribute(bridge_of("llama"), TOKENS, target=9, top=20)


def test_a_table_of_neurons_is_read_back_in_its_order(result, tmp_path):
    ranked = [*result.ffn_neurons.neurons(), *result.attn_neurons.neurons()]
    assert neurons_of(result.neurons()) == ranked
    assert neurons_of(result.neurons(tokens=2)[::-1]) == ranked[::-1]
    result.neurons().to_parquet(tmp_path / "neurons.parquet")
    assert neurons_of(pd.read_parquet(tmp_path / "neurons.parquet")) == ranked


def test_attention_neurons_over_all_sources_have_no_source(result):
    table = result.neurons("attn", by_source=False)
    wanted = result.attn_neurons_over_sources.neurons()
    assert neurons_of(table) == neurons_of(table.drop(columns="source_pos")) == wanted
    assert all(neuron.source_pos is None for neuron in wanted)


def test_query_neurons_of_both_kinds_are_read_back(result):
    table = result.query_neurons(5, kind=None, of="both")
    kinds = [type(neuron) for neuron in neurons_of(table)]
    assert kinds == [FFNNeuron if kind == "ffn" else AttnNeuron for kind in table["kind"]]
    assert set(kinds) == {FFNNeuron, AttnNeuron}


def test_what_is_no_table_of_neurons_is_refused(result):
    with pytest.raises(InputError, match="this one lacks head, index"):
        neurons_of(result.layers())
    table = result.neurons("attn", top=3)
    for wrong in (table.assign(kind="mlp"), table.assign(head=pd.NA)):
        with pytest.raises(InputError, match="row 0 has the kind '(mlp|attn)'"):
            neurons_of(wrong)
