"""On a GPU: the same numbers as on the CPU. Needs one; test_devices.py pretends to have several."""

import pytest
import torch
from conftest import SUPPORTED, TOKENS, bridge_of, own_bridge_of

from tl_neuron_attr import attribute, attribute_all, check_model, run_prompts

GPU = "cuda"
TARGET = 11
PROMPTS = [TOKENS, TOKENS[:4], (9, 2, 30, 4, 5, 41, 7)]

pytestmark = pytest.mark.skipif(
    GPU == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
)


def on_gpu(family, dtype=torch.float32):
    model = own_bridge_of(family, dtype=dtype)
    model.to(GPU)
    model.cfg.device = GPU
    return model


def scores(result):
    """Of layers, heads and the best neurons of each kind, best first; names may swap in ties."""
    tables = [result.layers(), result.neurons("ffn"), result.neurons("attn")]
    listed = [score for table in tables for score in table["score"]]
    return torch.tensor([*listed, *result.head_scores.flatten().tolist()])


@pytest.mark.parametrize("family", SUPPORTED)
def test_scores_are_those_of_the_cpu_and_the_best_are_proven(family):
    here = attribute(bridge_of(family), TOKENS, target=TARGET, top=10)
    there = attribute(on_gpu(family), TOKENS, target=TARGET, top=10)
    assert there.host.device.type == GPU
    assert all(each.certificate.holds for each in (there.ffn_neurons, there.attn_neurons))
    torch.testing.assert_close(scores(there), scores(here), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_narrow_weights_are_scored_in_float32(family, dtype):
    there = attribute(on_gpu(family, dtype), TOKENS, target=TARGET, top=10)
    assert there.out.dtype == torch.float32
    here = attribute(bridge_of(family, dtype=dtype), TOKENS, target=TARGET, top=10)
    # the model's own run is in the narrow type, and rounds otherwise on each device
    torch.testing.assert_close(scores(there), scores(here), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral"])
def test_every_identity_holds(family):
    assert check_model(on_gpu(family)).holds


def test_batches_and_runs_give_what_one_prompt_gives(tmp_path):
    model = on_gpu("llama")
    alone = [attribute(model, each, target=TARGET, top=10) for each in PROMPTS]
    for one, batched in zip(
        alone, attribute_all(model, PROMPTS, target=TARGET, top=10), strict=True
    ):
        torch.testing.assert_close(scores(batched), scores(one), rtol=1e-4, atol=1e-5)
    asked = [{"tokens": each, "target": TARGET} for each in PROMPTS]
    run = run_prompts(model, asked, tmp_path / "run", top=10)
    found = run.table("neurons")
    for row, one in enumerate(alone):
        ours = torch.tensor(found.loc[found["row"] == row, "score"].tolist())
        wanted = torch.tensor(one.neurons()["score"].tolist())
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
