"""What the published notebooks print on small trained models is found again."""

import json

import pytest
import torch
from conftest import SHARED
from transformer_lens.model_bridge import TransformerBridge

from tl_neuron_attr import attribute

GOLDEN = sorted((SHARED / "golden").glob("*-*.json"))

pytestmark = pytest.mark.skipif(
    not GOLDEN, reason=f"no published outputs: {SHARED / 'golden'} is absent"
)


@pytest.fixture(scope="module")
def bridges():
    loaded = {}

    def load(name):
        if name not in loaded:
            path = SHARED / "models" / name
            loaded[name] = TransformerBridge.boot_transformers(str(path), device="cpu").eval()
        return loaded[name]

    return load


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda path: path.stem)
def golden_and_result(request, bridges):
    golden = json.loads(request.param.read_text())
    result = attribute(
        bridges(golden["model"]),
        golden["token_ids"],
        target=golden["target_id"],
        convention="published",
        top=golden["n_attn_neurons"],
    )
    return golden, result


def assert_same_ranking(found, wanted):
    """Same scores to 1e-4 of the largest; same ids, except among scores closer than that."""
    scores = torch.tensor([row[-1] for row in wanted])
    tolerance = 1e-4 * scores.abs().max().item()
    found_score = {tuple(ids): score for *ids, score in found}
    for *ids, score in wanted:
        assert found_score[tuple(ids)] == pytest.approx(score, abs=tolerance), ids
    for (*found_ids, found_value), (*wanted_ids, wanted_value) in zip(found, wanted, strict=False):
        assert found_value == pytest.approx(wanted_value, abs=tolerance)
        if found_ids != wanted_ids:
            near = abs(found_score[tuple(wanted_ids)] - found_value)
            assert near <= tolerance, f"{found_ids} stands where {wanted_ids} should"


def test_the_target_is_the_models_own_prediction(golden_and_result):
    golden, result = golden_and_result
    ((token, log_prob),) = result.captured.top_predictions(1)
    assert token == golden["target_id"]
    assert torch.tensor(log_prob).exp().item() == pytest.approx(golden["target_prob"], abs=1e-5)


def test_layer_increases_are_the_published_ones(golden_and_result):
    golden, result = golden_and_result
    layers = result.layers()
    wanted = {"attn": golden["attn_layer_increase"], "ffn": golden["ffn_layer_increase"]}
    tolerance = 1e-4 * max(abs(score) for scores in wanted.values() for score in scores)
    for kind, scores in wanted.items():
        found = layers[layers["kind"] == kind]["score"].tolist()
        assert found == pytest.approx(scores, abs=tolerance)


def test_head_increases_are_the_published_ones(golden_and_result):
    golden, result = golden_and_result
    wanted = {(layer, head): score for layer, head, score in golden["head_increase"]}
    found = {(row.layer, row.head): row.score for row in result.heads().itertuples(index=False)}
    assert found.keys() == wanted.keys()
    largest = max(abs(score) for score in wanted.values())
    for head, score in wanted.items():  # the notebooks round head scores to 4 decimals
        assert found[head] == pytest.approx(score, abs=5e-5 + 1e-4 * largest)


@pytest.mark.parametrize("kind", ["ffn", "attn"])
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_neurons_are_the_published_ones(golden_and_result, kind, end):
    golden, result = golden_and_result
    table = result.neurons(kind)
    assert len(table) == golden[f"n_{kind}_neurons"]
    ids = ["layer", "index"] if kind == "ffn" else ["layer", "head", "index", "source_pos"]
    found = table[[*ids, "score"]].values.tolist()
    wanted = golden[f"{kind}_neurons_{end}"]
    if end == "bottom":  # printed best of the worst first
        found, wanted = found[::-1], wanted[::-1]
    assert_same_ranking(found, wanted)
