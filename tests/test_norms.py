"""Norms of the weights: right, measured once, and measured anew when the weights change."""

import pytest
import torch
from conftest import FAMILIES, TOKENS, bridge_of, needs_hooked_transformer, own_bridge_of

import tl_neuron_attr.norms as norms_module
from tl_neuron_attr import (
    METHODS,
    Case,
    attribute,
    attribute_all,
    capture,
    open_host,
    read_out,
    tokenize,
)
from tl_neuron_attr.norms import weight_norms
from tl_neuron_attr.prompts import Prompt


def assert_right(host):
    """Every norm that is known is that of the weights as they lie there now, in float64."""
    found = weight_norms(host)
    gain = 1.0 if host.final_gain is None else host.final_gain.double()[:, None]
    pairs = [(found.of_columns(host.W_U), (host.W_U.double() * gain).square().sum(0).sqrt())]
    for layer in range(host.n_layers):
        for kind, rows in (("ffn", host.W_out(layer)), ("attn", host.W_O(layer).flatten(0, 1))):
            post = host.post_norm(layer, kind)
            weighted = rows.double() * (1.0 if post is None else post.gain.double())
            pairs.append((found.of_rows(rows), weighted.square().sum(1).sqrt()))
    for ours, theirs in pairs:
        if ours is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    return [ours is not None for ours, _ in pairs]


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_norms_are_those_of_the_weights_as_they_are(family, processed):
    assert_right(open_host(bridge_of(family, processed=processed)))


@needs_hooked_transformer
def test_norms_of_a_folded_hooked_transformer_are_those_of_its_folded_weights():
    from conftest import hooked_of

    assert_right(open_host(hooked_of("gpt2", processed=True)))


def test_narrow_weights_have_norms_of_full_precision():
    host = open_host(bridge_of("gpt2", dtype=torch.bfloat16))
    assert weight_norms(host).of_columns(host.W_U).dtype == torch.float32
    assert all(assert_right(host))


def test_norms_are_measured_once_for_all_runs_of_a_model(monkeypatch):
    model = own_bridge_of("llama")
    measured = []
    real = norms_module.row_norms
    monkeypatch.setattr(
        norms_module, "row_norms", lambda *given: (measured.append(1), real(*given))[1]
    )
    attribute(model, TOKENS, top=5)
    assert len(measured) == 2 * open_host(model).n_layers
    attribute(model, TOKENS[:3], top=5)
    attribute_all(model, [TOKENS, TOKENS[:4]], top=5)
    assert len(measured) == 2 * open_host(model).n_layers


@pytest.mark.changes("the weights", "the bytes of the weights")
@pytest.mark.parametrize("behind_its_back", [False, True])
@pytest.mark.parametrize("edited", ["W_U", "W_out", "W_O", "gain"])
def test_weights_edited_in_place_are_measured_anew(edited, behind_its_back):
    model = own_bridge_of("gpt2")
    host = open_host(model)
    assert all(assert_right(host))
    weight = {
        "W_U": lambda: host.W_U,
        "W_out": lambda: host.W_out(1),
        "W_O": lambda: host.W_O(2),
        "gain": lambda: model.ln_final.weight.detach(),
    }[edited]()
    with torch.no_grad():
        (weight.data if behind_its_back else weight).mul_(3.0)
    assert_right(host)  # the host at hand
    assert_right(open_host(model))  # and one opened now


@pytest.mark.changes("the weights", "the bytes of the weights")
@pytest.mark.parametrize("edited", ["W_U", "W_out", "W_O"])
def test_an_edit_of_the_last_half_of_a_weight_is_seen_behind_its_back_too(edited):
    model = own_bridge_of("gpt2")
    host = open_host(model)
    assert all(assert_right(host))
    weight = {"W_U": host.W_U, "W_out": host.W_out(1), "W_O": host.W_O(2).flatten(0, 1)}[edited]
    rows, columns = weight.shape
    weight.data[rows // 2 :, columns // 2 :] *= 3.0
    assert_right(host)


@pytest.mark.parametrize("n_rows", [1, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_norms_of_many_rows_and_columns_are_taken_block_by_block(n_rows, dtype, monkeypatch):
    taken, wide_of = [], norms_module._wide
    monkeypatch.setattr(
        norms_module, "_wide", lambda some: (taken.append(max(some.shape)), wide_of(some))[1]
    )
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n_rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    gain = torch.randn(6, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.float32 if dtype == torch.bfloat16 else torch.float64
    for each in (None, gain):
        wanted = (rows.double() * (1 if each is None else each.double())).norm(dim=1).to(wide)
        torch.testing.assert_close(norms_module.row_norms(rows, each), wanted)
        torch.testing.assert_close(norms_module.column_norms(rows.T, each), wanted)
    assert max(taken) <= 1024


@pytest.mark.changes("the weights", "the bytes of the weights")
def test_a_weight_replaced_by_another_is_measured_anew():
    model = own_bridge_of("gpt2")
    assert_right(open_host(model))
    linear = model.blocks[0].mlp.out.original_component
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 3)
    assert all(assert_right(open_host(model)))


@pytest.mark.changes("the weights", "the bytes of the weights")
def test_weights_made_under_inference_mode_are_measured_anew_when_edited():
    with torch.inference_mode():
        model = own_bridge_of("gpt2")
        assert all(assert_right(open_host(model)))
        open_host(model).W_out(1).mul_(3.0)
        assert all(assert_right(open_host(model)))


def test_a_matrix_that_is_not_the_models_has_no_known_norms():
    host = open_host(bridge_of("gpt2"))
    norms = weight_norms(host)
    assert norms.of_rows(host.W_out(0).clone()) is None
    assert norms.of_rows(host.W_out(0)[:7]) is None
    assert norms.of_columns(host.W_U.clone()) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_most_weights_are_known_where_they_lie(family):
    known = assert_right(open_host(bridge_of(family)))
    assert sum(known) >= len(known) / 2


def test_an_interval_and_a_score_by_norm_take_them_anew():
    """A row written behind torch's back, which no sample sees: slack may be old, no score is."""
    model = own_bridge_of("gpt2")
    host = open_host(model)
    weight_norms(host)
    host.W_out(1).data[5] *= 100.0
    result = attribute(model, TOKENS, top=5)
    scores = METHODS["norm"](Case(result=result), "ffn", None)
    torch.testing.assert_close(scores[1], host.W_out(1).norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("convention", ["exact", "published"])
def test_the_allowance_for_rounding_is_the_same_from_norms_at_hand_and_taken_anew(convention):
    from dataclasses import replace

    from tl_neuron_attr.decompose import ffn_decomposition
    from tl_neuron_attr.prompts import Target
    from tl_neuron_attr.scores import baselines
    from tl_neuron_attr.topk import tangent_bounds

    host = open_host(bridge_of("gpt2"))
    captured = capture(host, tokenize(host, Prompt(tokens=TOKENS)))
    out = read_out(host, captured.resid_final, convention)
    for target in (Target(5), Target(5, against=Target(9))):
        slacks = []
        for known in (True, False):
            here = out if known else replace(out, norms=None)
            assert (here.norms is not None) is known
            blocks = [ffn_decomposition(host, captured, layer) for layer in range(host.n_layers)]
            before = baselines(captured, here, target).ffn
            bounds = tangent_bounds([blocks], here, before)
            slacks.append(torch.stack([bound.slack for bound in bounds[0]]))
        torch.testing.assert_close(slacks[0], slacks[1], rtol=1e-5, atol=0)
        assert (slacks[0] > 0).all()
