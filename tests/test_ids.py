"""Ids of other tools: the same neuron there and back, the very number they name, or a refusal."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, TOKENS, bridge_of, hugging_face_model
from hypothesis import given
from hypothesis import strategies as st

from tl_neuron_attr import AttnNeuron, FFNNeuron, InputError, Prompt, capture, open_host, tokenize
from tl_neuron_attr.capture import capture_pre_activations
from tl_neuron_attr.ids import (
    _MODULES,
    Layout,
    Unit,
    from_pair,
    hook_id,
    layout_of,
    module_id,
    notebook_id,
    parse_id,
    to_pair,
)

LLAMA = Layout(
    architecture="LlamaForCausalLM", n_layers=4, n_heads=6, d_head=8, d_mlp=40, gated=True
)
GPT2 = Layout(
    architecture="GPT2LMHeadModel", n_layers=4, n_heads=6, d_head=8, d_mlp=40, gated=False
)
PHI3 = Layout(architecture="Phi3ForCausalLM", n_layers=4, n_heads=6, d_head=8, d_mlp=40, gated=True)

layers, heads, dims, indices = (st.integers(0, top - 1) for top in (4, 6, 8, 40))
ffn = st.builds(FFNNeuron, layers, indices)
attn = st.builds(AttnNeuron, layers, heads, dims)


@st.composite
def units(draw):
    layout = draw(st.sampled_from([LLAMA, GPT2, PHI3]))
    if draw(st.booleans()):
        return layout, Unit(draw(attn), "z")
    bases = ("post", "gate", "up") if layout.gated else ("post", "pre")
    return layout, Unit(draw(ffn), draw(st.sampled_from(bases)))


@given(units())
def test_hooks_and_modules_name_the_same_neuron_there_and_back(given_unit):
    layout, unit = given_unit
    for written in (hook_id(unit, layout), module_id(unit, layout)):
        assert parse_id(written, layout) == unit


@given(st.one_of(ffn, st.builds(AttnNeuron, layers, heads, dims, st.integers(0, 99))))
def test_the_notebooks_name_the_same_neuron_there_and_back(neuron):
    unit = Unit(neuron, "post" if isinstance(neuron, FFNNeuron) else "z")
    assert parse_id(notebook_id(unit), LLAMA) == unit
    assert parse_id(str(neuron), LLAMA) == unit  # as ours do


@given(ffn, st.sampled_from(["EasyEdit", "QRNCA", "NEG", "Transluce", "knowledge-neurons"]))
def test_pairs_name_the_same_neuron_there_and_back(neuron, tool):
    layout = GPT2 if tool == "knowledge-neurons" else LLAMA
    unit = from_pair(tool, neuron.layer, neuron.index, layout)
    assert unit.neuron == neuron
    assert to_pair(tool, unit, layout) == (neuron.layer, neuron.index)


@given(st.text(max_size=40))
def test_any_text_is_an_id_or_is_refused_in_a_sentence(text):
    try:
        assert isinstance(parse_id(text, LLAMA), Unit)
    except InputError as error:
        assert "\n" not in str(error) or "\n" in text


@given(
    st.from_regex(
        r"(blocks|model\.layers)\.\d{1,2}\.[a-z_.]{1,20}(\[[\d, ]{0,6}\])?", fullmatch=True
    )
)
def test_what_looks_like_an_id_is_one_or_is_refused(text):
    try:
        assert isinstance(parse_id(text, LLAMA), Unit)
    except InputError:
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_s_entry_is_the_very_number(family):
    """What Hugging Face's own module gets or gives there, against what a capture holds."""
    class_name, config, *_ = FAMILIES[family]
    if class_name not in _MODULES:
        pytest.skip("its module names are not known")
    if family == "phi":
        pytest.skip("Hugging Face cannot rotate half of an odd half head, of which the bridge can")
    host = open_host(bridge_of(family))
    captured = capture(host, tokenize(host, Prompt(tokens=TOKENS)))
    theirs = capture_pre_activations(host, captured)
    with torch.random.fork_rng():
        hf = hugging_face_model(class_name, config())
    layout = layout_of(host)
    layer, index = 1, layout.d_mlp - 3
    neuron, dim = FFNNeuron(layer, index), AttnNeuron(layer, layout.n_heads - 1, 2)
    wanted = {Unit(neuron, "post"): captured.mlp_post[layer, index]}
    wanted[Unit(dim, "z")] = captured.z[layer, dim.head, dim.index]
    wanted |= {Unit(neuron, basis): values[layer][index] for basis, values in theirs.items()}
    for unit, value in wanted.items():
        written = module_id(unit, layout)
        path, side, number = re.fullmatch(r"(.*)\.(input|output)\[(\d+)\]", written).groups()
        seen = {}

        def keep(module, inputs, output, seen=seen):
            seen.update(input=inputs[0], output=output)

        handle = hf.get_submodule(path).register_forward_hook(keep)
        with torch.no_grad():
            hf(torch.tensor([TOKENS]))
        handle.remove()
        last = seen[side].reshape(-1, seen[side].shape[-1])[-1]
        assert float(last[int(number)]) == pytest.approx(float(value), abs=1e-5), written


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("blocks.3.hook_resid_post[7]", "residual stream"),
        ("blocks.3.hook_mlp_out[7]", "residual stream"),
        ("blocks.3.attn.hook_result[1, 7]", "residual stream"),
        ("blocks.3.attn.hook_pattern[1, 2, 3]", "an attention weight"),
        ("blocks.3.attn.hook_q[1, 2]", "a query or a key"),
        ("blocks.3.attn.hook_v[1, 2]", "which several heads may share"),
        ("blocks.3.hook_resid_post.hook_sae_acts_post[99]", "sparse dictionary"),
        ("blocks.3.mlp.hook_post", "a whole activation; name one entry"),
        ("blocks.3.mlp.hook_post[1, 2]", "one number"),
        ("blocks.3.attn.hook_z[7]", "a head and a dimension"),
        ("blocks.9.mlp.hook_post[1]", "there is no layer 9: the model has 4"),
        ("blocks.3.mlp.hook_post[40]", "a layer has 40 FFN neurons"),
        ("model.layers.3.mlp.down_proj.output[7]", "residual stream"),
        ("model.layers.3.mlp.up_proj.input[7]", "residual stream"),
        ("model.layers.3.self_attn.q_proj.output[7]", "a query or a key"),
        ("model.layers.3.self_attn.v_proj.output[7]", "which several heads may share"),
        ("model.layers.3.self_attn.o_proj.input[48]", "there is no L3.H6.D0"),
        ("model.layers.3.mlp.down_proj.input", "name one entry"),
        ("transformer.h.3.mlp.c_proj.input[7]", "no id of a neuron of LlamaForCausalLM"),
        ("lm_head.output[7]", "a token's logit"),
        ("21_19_7", "without a source position"),
        ("1_2_3_4_5", "neither layer_index nor"),
        ("blocks.3.mlp.hook_post[1,]", "its entry must be whole numbers, like [12]"),
        ("model.layers.3.mlp.act_fn.output[7]", "no neuron is known to be an entry of the output"),
        ("L3.N", "must look like"),
        ("", "no id of a neuron"),
    ],
)
def test_what_is_no_neuron_is_refused_with_the_reason(text, reason):
    with pytest.raises(InputError, match=re.escape(reason)):
        parse_id(text, LLAMA)


def test_what_cannot_be_written_is_refused_with_the_reason():
    carried = Unit(AttnNeuron(1, 2, 3, 4), "z")
    for write in (hook_id, module_id):
        with pytest.raises(InputError, match="L1.H2.D3@4 is what comes from one source position"):
            write(carried, LLAMA)
    with pytest.raises(InputError, match="have a source position"):
        notebook_id(Unit(AttnNeuron(1, 2, 3), "z"))
    with pytest.raises(InputError, match="in the basis 'up'"):
        notebook_id(Unit(FFNNeuron(1, 2), "up"))
    with pytest.raises(InputError, match="EasyEdit looks at the basis 'gate'"):
        to_pair("EasyEdit", Unit(FFNNeuron(1, 2), "post"), LLAMA)
    with pytest.raises(InputError, match="has no attention neurons"):
        to_pair("EasyEdit", Unit(AttnNeuron(1, 2, 3), "z"), LLAMA)
    with pytest.raises(InputError, match="not known what EasyEdit looks at in a plain FFN"):
        from_pair("EasyEdit", 1, 2, GPT2)
    with pytest.raises(InputError, match="the basis of an attention neuron is 'z', got 'post'"):
        hook_id(Unit(AttnNeuron(1, 2, 3), "post"), LLAMA)
    with pytest.raises(InputError, match="the FFN of GPT2LMHeadModel is plain, and has no such"):
        parse_id("blocks.1.mlp.hook_pre_linear[2]", GPT2)
    phi3 = replace(LLAMA, architecture="Phi3ForCausalLM")
    name = "model.layers.3.mlp.gate_up_proj.output"
    assert [str(parse_id(f"{name}[{n}]", phi3).basis) for n in (39, 40, 79)] == ["gate", "up", "up"]
    with pytest.raises(InputError, match="mlp.gate_up_proj has 80 outputs"):
        parse_id(f"{name}[80]", phi3)
    with pytest.raises(InputError, match="has the bases post, pre; got 'gate'"):
        hook_id(Unit(FFNNeuron(1, 2), "gate"), GPT2)
    unknown = Layout(
        architecture="OddForCausalLM", n_layers=4, n_heads=6, d_head=8, d_mlp=40, gated=True
    )
    with pytest.raises(InputError, match="module names of OddForCausalLM are not known"):
        module_id(Unit(FFNNeuron(1, 2), "post"), unknown)
    assert hook_id(Unit(FFNNeuron(1, 2), "post"), unknown) == "blocks.1.mlp.hook_post[2]"


@pytest.mark.parametrize(
    ("unit", "reason"),
    [
        (lambda: Unit(FFNNeuron(1, 12), "z"), "in the basis 'z'; give it in 'post'"),
        (lambda: Unit(AttnNeuron(1, 3, 5, 2), "post"), "in the basis 'post'; give it in 'z'"),
        (
            lambda: Unit(FFNNeuron(-1, 2), "post"),
            "the layer of a neuron must be at least 0, got -1",
        ),
        (
            lambda: Unit(AttnNeuron(1, 3, 5, -2), "z"),
            "the source_pos of a neuron must be at least 0",
        ),
        (
            lambda: Unit(FFNNeuron(1, 2.5), "post"),
            "the index of a neuron must be an integer, got 2.5",
        ),
        (lambda: Unit("L1.N2", "post"), "an FFNNeuron or an AttnNeuron, got 'L1.N2'"),
    ],
)
def test_what_would_not_come_back_the_same_is_not_written(unit, reason, unchecked):
    with pytest.raises(InputError, match=re.escape(reason)):
        notebook_id(unit())
    with pytest.raises(InputError):
        hook_id(unit(), LLAMA)


def test_only_text_is_an_id_and_only_whole_numbers_a_pair(unchecked):
    for text in (5, None, b"L3.N12"):
        with pytest.raises(InputError, match="an id is text, like 'L3.N12'; got"):
            parse_id(text, LLAMA)
    for layer in ("1", 1.5, True, None):
        with pytest.raises(InputError, match="the layer of a neuron must be an integer, got"):
            from_pair("EasyEdit", layer, 12, LLAMA)
        with pytest.raises(InputError, match="the index of a neuron must be an integer, got"):
            from_pair("EasyEdit", 1, layer, LLAMA)
    with pytest.raises(InputError, match="the layer of a neuron must be at least 0, got -1"):
        from_pair("EasyEdit", -1, 12, LLAMA)
    of_numpy = from_pair("EasyEdit", np.int64(1), np.int32(12), LLAMA).neuron
    assert repr(of_numpy) == "FFNNeuron(layer=1, index=12)"


def test_a_number_is_the_coefficient_by_the_neuron_s_kind():
    of_ffn, of_head = FFNNeuron(1, 2), AttnNeuron(1, 2, 3)
    assert Unit(of_ffn, "post").is_coefficient and Unit(of_head, "z").is_coefficient
    assert not (Unit(of_ffn, "z").is_coefficient or Unit(of_head, "post").is_coefficient)
