"""Edits of weights: as if the intervention were on, and undone to the last bit."""

import copy

import pytest
import torch
from conftest import FAMILIES, TOKENS, hooked_of, needs_hooked_transformer, own_bridge_of

from tl_neuron_attr import (
    FFNNeuron,
    InputError,
    MeanCoefficients,
    UnsupportedModelError,
    attribute,
    capture,
    clamp,
    edit_weights,
    intervened,
    mean_coefficients,
    open_host,
    projection_index,
    replace_mean,
    scale,
    tokenize,
    zero,
)
from tl_neuron_attr.host import output_bias, weights_hash
from tl_neuron_attr.identities import identities
from tl_neuron_attr.interventions import edits
from tl_neuron_attr.prompts import Prompt

# done and undone counts as two edits; the bytes must be the same
pytestmark = pytest.mark.changes("the weights")

PARTS = "L0.N3,L1.N7,L1.N8,L1.H2,L2.H0.D4,L0.H1.D5"
FFN = "L0.N3,L1.N7,L1.N8"
ATTN = "L1.H2,L2.H0.D4,L0.H1.D5"


@pytest.fixture(scope="module", params=list(FAMILIES))
def own_model(request):
    """One model of each family that only this file edits, and undoes."""
    return own_bridge_of(request.param)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([TOKENS]))[0]


def under(model, interventions):
    with intervened(model, interventions):
        return logits(model)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


# --- what an edit does ------------------------------------------------------------------------


def test_a_zeroed_row_is_a_zeroed_neuron_exactly(own_model):
    before, plain = weights_hash(open_host(own_model)), logits(own_model)
    by_hand = copy.deepcopy(own_model)
    with torch.no_grad():
        for part in zero(PARTS).parts:
            block = by_hand.blocks[part.layer]
            if isinstance(part, FFNNeuron):
                block.mlp.W_out[part.index] = 0
            else:
                block.attn.W_O[part.head, getattr(part, "index", slice(None))] = 0
    for parts in (FFN, ATTN, PARTS):
        with edit_weights(own_model, zero(parts)):
            edited = logits(own_model)
        assert torch.equal(edited, under(own_model, zero(parts)))
        with edit_weights(own_model, scale(parts, 0.0)):
            assert torch.equal(edited, logits(own_model))
        assert (edited - plain).abs().max() > 1e-4
    assert torch.equal(edited, logits(by_hand))
    assert torch.equal(logits(own_model), plain)
    assert weights_hash(open_host(own_model)) == before


def test_a_scaled_row_is_a_scaled_neuron(own_model):
    before = weights_hash(open_host(own_model))
    with edit_weights(own_model, scale(PARTS, -1.75)):
        edited = logits(own_model)
    close(edited, under(own_model, scale(PARTS, -1.75)))
    assert (edited - logits(own_model)).abs().max() > 1e-3
    assert weights_hash(open_host(own_model)) == before


@pytest.mark.parametrize("parts", [FFN, ATTN])
def test_a_mean_goes_into_the_bias_or_is_refused_where_there_is_none(own_model, parts):
    host = open_host(own_model)
    before = weights_hash(host)
    held = replace_mean(parts, mean_coefficients(own_model, [TOKENS, (9, 2, 30)]))
    kind = "ffn" if parts == FFN else "attn"
    if output_bias(host, kind, 1) is None:
        with pytest.raises(InputError, match="no output bias .* use intervened"):
            edit_weights(own_model, held)
    else:
        with edit_weights(own_model, held):
            assert open_host(own_model) == host
            edited = logits(own_model)
        close(edited, under(own_model, held))
        assert (edited - logits(own_model)).abs().max() > 1e-4
    assert weights_hash(host) == before


def test_several_edits_in_one_are_the_interventions_one_after_the_other():
    model = own_bridge_of("gpt2")
    means = mean_coefficients(model, [TOKENS, (9, 2, 30)])
    several = [
        scale(PARTS, 2.0),
        replace_mean("L0.N3,L1.H2.D3", means),
        scale("L1.H2", -0.5),
        zero("L1.N8"),
        scale("L1.N8", 3.0),
        replace_mean("L2.H0", means),
        replace_mean("L1.N7", means),
        zero("L1.N7"),
    ]
    wanted = under(model, several)
    with edit_weights(model, several) as edit:
        close(logits(model), wanted)
    assert edit.undone
    # as edits of one edit they would be of what the rows are then
    with edit_weights(model, scale("L0.N3", 2.0)), edit_weights(model, scale("L0.N3", 0.5)):
        assert torch.equal(logits(model), under(model, ()))


def test_nothing_writes_nothing():
    model = own_bridge_of("llama")
    versions = [parameter._version for parameter in model.parameters()]
    for nothing in ((), zero([]), scale(PARTS, 1.0)):
        with edit_weights(model, nothing) as edit:
            assert edit.changes == () and edit.undone
        edit.undo()
    assert [parameter._version for parameter in model.parameters()] == versions


@pytest.mark.changes("the bytes of the weights")  # it is not undone
def test_an_edit_keeps_copies_of_the_touched_rows_only():
    edit = edit_weights(own_bridge_of("gpt2"), zero("L0.N3,L0.N5,L1.H2.D4"))
    assert [(str(each), *each.before.shape) for each in edit.changes] == [
        ("W_O of layer 1", 1, 24),
        ("W_out of layer 0", 2, 24),
    ]


# --- what is read from an edited model --------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "neox-parallel"])
def test_an_edited_model_is_attributed_as_it_is_now(family, tmp_path):
    model = own_bridge_of(family)
    first = attribute(model, TOKENS, target=9, top=10**6)
    index = projection_index(model, tmp_path)
    means = mean_coefficients(model, [TOKENS, (9, 2, 30)])
    host = open_host(model)
    changes = [scale("L2.N1,L2.H1", 3.0), zero(PARTS)]
    if output_bias(host, "ffn", 2) is not None:
        changes.append(replace_mean("L2.N2", means))
    with edit_weights(model, changes):
        assert open_host(model) == host  # what it is, and what was folded, is no other
        result = attribute(model, TOKENS, target=9, top=10**6)
        assert all(each.holds for each in identities(host, capture(host, prompt_of(host))))
        score_of = dict(
            zip(result.ffn_neurons.neurons(), result.ffn_neurons.score.tolist(), strict=True)
        )
        for zeroed in (FFNNeuron(1, 7), FFNNeuron(0, 3)):
            assert abs(score_of[zeroed]) < 1e-6  # nothing, to rounding
        own = logits(model)[-1].log_softmax(-1)[9]
        close(torch.tensor(result.log_prob), own)
        with pytest.raises(InputError, match="of other weights"):
            attribute(model, TOKENS, target=9, index=index)
        with pytest.raises(InputError, match="no longer gives"):
            first.query_neurons(top=3)
    again = attribute(model, TOKENS, target=9, top=10**6)
    assert torch.equal(again.ffn_neurons.score, first.ffn_neurons.score)
    assert torch.equal(again.attn_neurons.score, first.attn_neurons.score)
    attribute(model, TOKENS, target=9, index=index)


def prompt_of(host):
    return tokenize(host, Prompt(tokens=TOKENS))


def test_rows_of_zero_do_not_hide_that_weights_were_centred():
    model = own_bridge_of("gpt2", processed=True)
    before = open_host(model).processing
    assert "writing weights centred" in before
    with edit_weights(model, zero([FFNNeuron(0, index) for index in range(8)])):
        assert open_host(model).processing == before


# --- undone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_undo_gives_back_every_bit_also_after_an_exception(dtype):
    model = own_bridge_of("gpt2", dtype=dtype)
    host = open_host(model)
    with torch.no_grad():  # numbers whose bits arithmetic would not bring back
        model.blocks[1].mlp.W_out[7, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
        model.blocks[1].mlp.W_out[8, :2] = torch.tensor([1e-40, -1e30])
    before = weights_hash(host)
    with pytest.raises(RuntimeError, match="on purpose"):
        with edit_weights(model, [zero("L1.N7"), scale(PARTS, 1e-30)]):
            assert not host.W_out(1)[7].any()  # not NaN, which 0 times infinity is
            assert weights_hash(host) != before
            raise RuntimeError("on purpose")
    assert weights_hash(host) == before
    edit = edit_weights(model, scale(PARTS, 1 / 3))
    assert not edit.undone
    edit.undo()
    assert edit.undone and weights_hash(host) == before


def test_an_edit_is_undone_once():
    model = own_bridge_of("gpt2")
    edit = edit_weights(model, zero("L0.N3"))
    edit.undo()
    with pytest.raises(InputError, match="was undone already"):
        edit.undo()
    with edit_weights(model, zero("L0.N3")) as edit:
        edit.undo()  # the end of the block then has nothing to do


def test_edits_of_the_same_rows_are_undone_last_first():
    model = own_bridge_of("gpt2")
    host = open_host(model)
    before = weights_hash(host)
    means = mean_coefficients(model, [TOKENS])
    for first, second in (
        (zero("L0.N3,L1.H2"), scale("L0.N4,L1.H2,L1.H1", 2.0)),  # 0 times 2: no row in common
        (scale("L1.H2", 2.0), zero("L1.H2.D4")),
        (replace_mean("L0.N3", means), replace_mean("L0.N5", means)),  # the bias in common
    ):
        one, two = edit_weights(model, first), edit_weights(model, second)
        between = weights_hash(host)
        if first.parts[0] == FFNNeuron(0, 3) and len(first) == 2:
            one.undo()
            two.undo()
        else:
            with pytest.raises(InputError, match="no longer as this edit left it, .* undo later"):
                one.undo()
            assert weights_hash(host) == between  # nothing is half undone
            two.undo()
            one.undo()
        assert weights_hash(host) == before


def test_edits_of_other_rows_are_undone_in_any_order():
    model = own_bridge_of("llama")
    before = weights_hash(open_host(model))
    one, two = edit_weights(model, zero("L0.N3,L1.H2")), edit_weights(model, zero("L0.N4,L1.H1"))
    one.undo()
    two.undo()
    assert weights_hash(open_host(model)) == before


def test_weights_that_were_changed_since_are_not_overwritten():
    model = own_bridge_of("gpt2")
    edit = edit_weights(model, scale("L0.N3,L1.H2", 2.0))
    with torch.no_grad():
        model.blocks[1].attn.W_O[2, 4, 0] += 1e-3
    between = weights_hash(open_host(model))
    with pytest.raises(InputError, match="W_O of layer 1 is no longer as this edit left it"):
        edit.undo()
    assert weights_hash(open_host(model)) == between
    model.to(torch.bfloat16)
    with pytest.raises(InputError, match="no longer as this edit left it"):
        edit.undo()


def test_an_edit_that_fails_on_the_way_is_taken_back(monkeypatch):
    model = own_bridge_of("gpt2")
    before = weights_hash(open_host(model))
    written = []

    def failing(host, change, values, real=edits._write):
        written.append(change)
        if len(written) == 3:
            raise KeyboardInterrupt
        real(host, change, values)

    monkeypatch.setattr(edits, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        edit_weights(model, scale(PARTS, 2.0))
    assert len(written) == 3 and weights_hash(open_host(model)) == before


def test_an_undo_that_was_broken_off_can_be_finished(monkeypatch):
    model = own_bridge_of("gpt2")
    before = weights_hash(open_host(model))
    edit = edit_weights(model, scale(PARTS, 2.0))
    written = []

    def failing(host, change, values, real=edits._write):
        written.append(change)
        if len(written) == 3:
            raise KeyboardInterrupt
        real(host, change, values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(edits, "_write", failing)
        edit.undo()
    assert not edit.undone
    edit.undo()
    assert weights_hash(open_host(model)) == before


def test_weights_that_cannot_be_written_to_are_told(monkeypatch):
    model = own_bridge_of("gpt2")
    before = weights_hash(open_host(model))
    real = edits.output_weights
    monkeypatch.setattr(edits, "output_weights", lambda *which: real(*which).clone())
    with pytest.raises(UnsupportedModelError, match="W_out of layer 0 cannot be written to"):
        edit_weights(model, zero("L0.N3"))
    assert weights_hash(open_host(model)) == before


# --- both classes, and what is refused --------------------------------------------------------


@needs_hooked_transformer
@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "neox-parallel", "gptj"])
def test_edits_of_a_hooked_transformer_are_those_of_a_bridge(family, processed):
    models = [own_bridge_of(family, processed=processed), hooked_of(family, processed=processed)]
    found = []
    for model in models:
        host = open_host(model)
        before = weights_hash(host)
        with edit_weights(model, zero(PARTS)):
            edited = logits(model)
            assert open_host(model) == host
        assert torch.equal(edited, under(model, zero(PARTS)))
        with edit_weights(model, [scale(PARTS, 2.5), zero("L1.H1")]):
            found.append(logits(model).log_softmax(-1))
        held = replace_mean("L1.H2.D3,L2.N1", mean_coefficients(model, [TOKENS]))
        without = [kind for kind in ("attn", "ffn") if output_bias(host, kind, 1) is None]
        if without:  # both classes say so, though the one shows zeros
            with pytest.raises(InputError, match="no output bias"):
                edit_weights(model, held)
        else:
            with edit_weights(model, held):
                edited = logits(model)
                assert open_host(model) == host
            close(edited, under(model, held))
        assert weights_hash(host) == before
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        (clamp("L1.H2", low=0), "Clamped cannot be an edit of weights: what it does depends on"),
        (zero("L1.H2", position=3), "Zeroed cannot be an edit of weights: it is at position 3"),
        (scale("L1.H2.D1@3", 2.0, position=5), "it is of one source position; use intervened"),
        (zero("L1.H2.D1@3"), "it is of one source position"),
        ([zero("L0.N3"), scale("L3.H0", 2.0)], "there is no head L3.H0"),
        (zero("L0.N96"), "there is no neuron L0.N96"),
        ("L1.H2", "an intervention was expected, got 'L1.H2'"),
        (
            replace_mean(
                "L1.N2",
                MeanCoefficients(ffn=torch.zeros(3, 4), z=torch.zeros(3, 3, 8), n_positions=1),
            ),
            "the means are of another model",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_an_edit_is_refused_before_anything_is_written(
    tiny_gpt2, interventions, message
):
    with pytest.raises(InputError, match=message):
        edit_weights(tiny_gpt2, interventions)
