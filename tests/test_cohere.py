"""Cohere: parallel blocks, LayerNorm without a bias, and logits that are multiplied by a number."""

import pytest
import torch
import transformers
from conftest import (
    SINCE_4,
    TOKENS,
    bridge_from,
    bridge_of,
    hugging_face_model,
    leaving_the_random_state,
    own_bridge_of,
)

from tl_neuron_attr import UnsupportedModelError, attribute, open_host
from tl_neuron_attr.identities import identities, subkey_identities
from tl_neuron_attr.scores import neuron_scores

pytestmark = pytest.mark.skipif(not SINCE_4, reason="TransformerLens 3.9 runs it wrongly")
TARGET = 7


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_answers_log_probability_is_hugging_faces(processed):
    found = attribute(bridge_of("cohere", processed=processed), TOKENS, target=TARGET, top=10_000)
    with torch.no_grad():
        own = own_logits().log_softmax(-1)[TARGET]
    assert found.log_prob == pytest.approx(float(own), abs=2e-6)
    # folding puts the number into the unembedding
    assert found.host.logit_scale == (1.0 if processed else 0.4)
    assert found.host.parallel
    for identity in identities(found.host, found.captured) + subkey_identities(
        found.host, found.captured
    ):
        assert identity.error < 5e-6, identity
    raw = attribute(bridge_of("cohere"), TOKENS, target=TARGET, top=10_000)
    table = found.neurons("ffn").merge(raw.neurons("ffn"), on=["layer", "index"])
    assert len(table) == 120
    assert (table["score_x"] - table["score_y"]).abs().max() < 1e-5


@leaving_the_random_state
def own_logits():
    class_name, config = SINCE_4["cohere"]
    return hugging_face_model(class_name, config())(torch.tensor([TOKENS])).logits[0, -1]


def test_its_successor_predicts_what_hugging_face_does_too():
    name, config = "Cohere2ForCausalLM", SINCE_4["cohere"][1]().to_dict()
    config = transformers.Cohere2Config(**{**config, "model_type": "cohere2"}, sliding_window=8)
    found = attribute(bridge_from(name, config), TOKENS, target=TARGET, top=3)
    with torch.random.fork_rng(), torch.no_grad():
        logits = hugging_face_model(name, config)(torch.tensor([TOKENS])).logits[0, -1]
    assert found.log_prob == pytest.approx(float(logits.log_softmax(-1)[TARGET]), abs=2e-6)


def test_the_best_are_those_of_all():
    found = attribute(bridge_of("cohere"), TOKENS, target=TARGET, top=12)
    for ranked, blocks in ((found.ffn_neurons, found.ffns), (found.attn_neurons, found.attns)):
        dense = torch.cat([neuron_scores(block, found.out, found.target) for block in blocks])
        wanted = dense.sort(descending=True).values[:12]
        torch.testing.assert_close(ranked.score, wanted, rtol=0, atol=1e-6)


def test_a_bridge_that_rotates_otherwise_is_refused():
    model = own_bridge_of("cohere")
    model.cfg.rotary_interleaved_cos_sin = False
    with pytest.raises(UnsupportedModelError, match="rotates its queries and keys otherwise"):
        open_host(model)
