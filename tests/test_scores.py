"""Every fast score against the definition in float64, and the identities the method promises."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import TOKENS, bridge_of, own_bridge_of
from hypothesis import given
from hypothesis import strategies as st
from oracle import log_prob as oracle_log_prob
from oracle import norm_scale
from test_topk import random_read_out

from tl_neuron_attr import InputError, Target, attribute, neuron_scores, readout
from tl_neuron_attr.readout import ReadOut, baseline_of_runs
from tl_neuron_attr.scores import (
    baselines,
    baselines_of_runs,
    head_scores,
    layer_scores,
    position_scores,
)

TARGET = 7
ASKED = Target(TARGET)


@pytest.fixture(scope="module", params=["gpt2", "llama", "neox-parallel"])
def oracle(request):
    """A model, its ActivationCache in float64, and its weights as the oracle wants them."""
    model = bridge_of(request.param, dtype=torch.float64)
    with torch.no_grad():
        logits, cache = model.run_with_cache(torch.tensor([TOKENS]))
    rms = request.param == "llama"
    ln_final = model.ln_final
    bias = torch.zeros(24) if rms else ln_final.bias
    weights = (
        ln_final.weight.tolist(),
        bias.tolist(),
        model.W_U.T.tolist(),
        model.b_U.tolist(),
    )

    def increase(base, vector, convention):
        final = cache["blocks.2.hook_resid_post"][0, -1].tolist()
        scale = norm_scale(final, convention=convention, rms=rms, eps=model.cfg.eps)
        options = dict(convention=convention, rms=rms, eps=model.cfg.eps)
        before = oracle_log_prob(weights, base.tolist(), TARGET, scale, **options)
        after = oracle_log_prob(weights, (base + vector).tolist(), TARGET, scale, **options)
        return after - before

    return request.param, model, cache, increase


@pytest.mark.parametrize("convention", ["exact", "published", "recomputed"])
def test_every_score_is_the_definition(oracle, convention):
    family, model, cache, increase = oracle
    result = attribute(
        model, TOKENS, target=TARGET, convention=convention, top=10_000, dtype=torch.float64
    )
    layers = result.layers().set_index(["layer", "kind"])["score"]
    heads = result.heads().set_index(["layer", "head"])["score"]
    positions = result.positions().set_index(["layer", "head", "source_pos"])
    ffn = result.neurons("ffn").set_index(["layer", "index"])
    attn = result.neurons("attn").set_index(["layer", "head", "source_pos", "index"])
    summed = result.neurons("attn", by_source=False).set_index(["layer", "head", "index"])
    generator = torch.Generator().manual_seed(1)

    def some(n, of):
        return torch.randperm(of, generator=generator)[:n].tolist()

    for layer in range(3):
        block = model.blocks[layer]
        pre = cache[f"blocks.{layer}.hook_resid_pre"][0, -1]
        mid = pre if family == "neox-parallel" else cache[f"blocks.{layer}.hook_resid_mid"][0, -1]
        attn_out = cache[f"blocks.{layer}.hook_attn_out"][0, -1]
        mlp_out = cache[f"blocks.{layer}.hook_mlp_out"][0, -1]
        post = cache[f"blocks.{layer}.mlp.hook_post"][0, -1]
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1]
        v = cache[f"blocks.{layer}.attn.hook_v"][0]
        n_heads = pattern.shape[0]
        group = n_heads // v.shape[1]
        assert layers[layer, "attn"] == pytest.approx(increase(pre, attn_out, convention))
        assert layers[layer, "ffn"] == pytest.approx(increase(mid, mlp_out, convention))
        for index in some(5, post.shape[0]):
            vector = post[index] * block.mlp.W_out[index]
            row = ffn.loc[(layer, index)]
            assert row["score"] == pytest.approx(increase(mid, vector, convention), abs=1e-12)
            assert row["coefficient"] == pytest.approx(post[index].item())
        for head in some(2, n_heads):
            W_O = block.attn.W_O[head]
            values = v[:, head // group]
            carried = torch.stack(
                [pattern[head, pos] * (values[pos] @ W_O) for pos in range(len(TOKENS))]
            )
            wanted = increase(pre, carried.sum(0), convention)
            assert heads[layer, head] == pytest.approx(wanted, abs=1e-12)
            for pos in some(2, len(TOKENS)):
                row = positions.loc[(layer, head, pos)]
                wanted = increase(pre, carried[pos], convention)
                assert row["score"] == pytest.approx(wanted, abs=1e-12)
                assert row["attention"] == pytest.approx(pattern[head, pos].item())
                index = some(1, W_O.shape[0])[0]
                coefficient = pattern[head, pos] * values[pos, index]
                row = attn.loc[(layer, head, pos, index)]
                wanted = increase(pre, coefficient * W_O[index], convention)
                assert row["score"] == pytest.approx(wanted, abs=1e-12)
                assert row["coefficient"] == pytest.approx(coefficient.item())
                coefficient = (pattern[head] * values[:, index]).sum()
                row = summed.loc[(layer, head, index)]
                wanted = increase(pre, coefficient * W_O[index], convention)
                assert row["score"] == pytest.approx(wanted, abs=1e-12)
                assert row["coefficient"] == pytest.approx(coefficient.item())


def test_layer_increases_telescope_from_embedding_to_final(tiny_model):
    for convention in ("exact", "published", "recomputed"):
        result = attribute(tiny_model, TOKENS, convention=convention)
        total = result.layers()["score"].sum()
        assert total == pytest.approx(result.log_prob - result.embedding_log_prob, abs=1e-4)
        assert abs(total) > 0.1  # else the check above says nothing


def test_exact_log_prob_of_the_final_residual_is_the_models_own(any_model):
    result = attribute(any_model, TOKENS, target=TARGET, top=1)
    own = any_model(torch.tensor([TOKENS]))[0, -1].log_softmax(-1)[TARGET].item()
    assert result.log_prob == pytest.approx(own, abs=1e-5)


def test_conventions_differ_where_the_model_has_final_biases(tiny_gpt2):
    log_probs = {
        convention: attribute(tiny_gpt2, TOKENS, target=TARGET, top=1, convention=convention)
        for convention in ("exact", "published", "recomputed")
    }
    assert log_probs["exact"].log_prob == pytest.approx(log_probs["recomputed"].log_prob, abs=1e-5)
    assert abs(log_probs["exact"].log_prob - log_probs["published"].log_prob) > 0.01
    exact, recomputed = (
        log_probs[name].layers()["score"].to_numpy() for name in ("exact", "recomputed")
    )
    assert abs(exact - recomputed).max() > 0.01


def test_adding_nothing_raises_nothing(tiny_model):
    result = attribute(tiny_model, TOKENS, top=1)
    before = result.out.baseline(result.captured.resid_pre[1:2], ASKED)
    nothing = torch.zeros(3, before.resid.shape[1])
    which = torch.zeros(3, dtype=torch.long)
    assert result.out.increase(before, which, nothing).abs().max() < 1e-6


def test_a_planted_ffn_neuron_ranks_first():
    model = own_bridge_of("gpt2", seed=3)
    with torch.no_grad():  # neuron 11 of layer 1 is always on and writes the target's direction
        mlp = model.blocks[1].mlp
        mlp.b_in[11] = 5.0
        mlp.W_in[:, 11] = 0.0
        direction = model.W_U[:, TARGET] - model.W_U.mean(1)
        mlp.W_out[11] = 4 * direction * model.ln_final.weight
    result = attribute(model, TOKENS, target=TARGET, top=3)
    best = result.neurons("ffn", 1).iloc[0]
    assert (best["layer"], best["index"]) == (1, 11)
    runner_up = result.neurons("ffn", 2).iloc[1]
    assert best["score"] > 2 * runner_up["score"]


def test_a_planted_attention_neuron_ranks_first_at_its_source():
    model = own_bridge_of("llama", seed=3)
    with torch.no_grad():  # head 2, dimension 4: its value is one input direction, its output ours
        attn = model.blocks[2].attn
        direction = model.W_U[:, TARGET] - model.W_U.mean(1)
        attn.W_O[2, 4] = direction * model.ln_final.weight
        attn.W_V[1, :, 4] *= 8
    result = attribute(model, TOKENS, target=TARGET, top=100)
    table = result.neurons("attn", 100)
    best = table.iloc[table["score"].abs().argmax()]
    assert (best["layer"], best["head"], best["index"]) == (2, 2, 4)
    host = result.host
    coefficients = result.attns[2].coefficients()[2, :, 4]
    assert best["source_pos"] == int((coefficients * (coefficients > 0)).argmax())
    assert host.n_key_value_heads == 2


def test_scores_do_not_depend_on_the_budget(tiny_model):
    result = attribute(tiny_model, TOKENS, target=TARGET, top=1)
    for block in (*result.ffns, *result.attns):
        whole = neuron_scores(block, result.out, ASKED)
        for budget in (2000, 9000, 40_000):
            out = replace(result.out, budget=budget)
            assert out.rows_per_block < result.out.rows_per_block
            scores = neuron_scores(block, out, ASKED)
            assert torch.allclose(scores, whole, atol=2e-6, rtol=0)


def test_a_budget_too_small_for_one_vector_is_an_error_before_the_forward_pass(
    tiny_model, monkeypatch
):
    monkeypatch.setattr(
        type(tiny_model), "run_with_hooks", lambda *a, **k: pytest.fail("the model was run")
    )
    with pytest.raises(InputError, match="budget of 100 bytes is too small.*at least"):
        attribute(tiny_model, TOKENS, budget=100)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_float64_shrinks_the_rounding_error_of_float32(family):
    telescoped = {}
    for dtype in (torch.float32, torch.float64):
        result = attribute(bridge_of(family, dtype=dtype), TOKENS, target=TARGET, top=1)
        assert result.ffn_neurons.score.dtype == dtype
        layers = result.layer_scores
        total = (layers.attn + layers.ffn).sum().item()
        telescoped[dtype] = abs(total - (result.log_prob - result.embedding_log_prob))
    assert telescoped[torch.float64] < 1e-12
    assert telescoped[torch.float32] < 1e-5


def test_the_whole_vocabulary_takes_part_where_it_spans_several_blocks(tiny_gpt2, monkeypatch):
    result = attribute(tiny_gpt2, TOKENS, target=TARGET, top=1, dtype=torch.float64)
    block = result.ffns[0]
    whole = neuron_scores(block, result.out, ASKED)
    gradient = result.out.baseline(block.base[None], ASKED).tangent.gradient
    monkeypatch.setattr("tl_neuron_attr.readout._COLUMNS", 7)
    monkeypatch.setattr("tl_neuron_attr.readout._SURVEY_COLUMNS", 5)
    assert torch.allclose(neuron_scores(block, result.out, ASKED), whole, atol=1e-13, rtol=0)
    again = result.out.baseline(block.base[None], ASKED).tangent.gradient
    assert torch.allclose(again, gradient, atol=1e-13, rtol=0)


def test_the_gradient_is_autograds(tiny_model):
    result = attribute(tiny_model, TOKENS, target=TARGET, top=1, dtype=torch.float64)
    bases = result.captured.resid_pre.clone().requires_grad_()
    result.out.log_prob(bases, ASKED).sum().backward()
    found = result.out.baseline(bases.detach(), ASKED).tangent.gradient
    assert torch.allclose(found, bases.grad, atol=1e-12, rtol=0)


def several_predictions(seed, dtype):
    """A read-out, bases with targets of their own, and rows that several neurons share."""
    generator = torch.Generator().manual_seed(seed)
    out = random_read_out(generator, 6, 31, scale=1.0, centered=bool(seed % 2), dtype=dtype)
    resid = torch.randn(5, 6, generator=generator, dtype=torch.float64).to(dtype)
    targets = [Target(int(token)) for token in torch.randint(0, 31, (5,), generator=generator)]
    outs = [replace(out, norm_scale=out.norm_scale * (1 + run)) for run in range(5)]
    before = baseline_of_runs(outs, list(resid[:, None]), range(5), targets)
    rows = torch.randn(4, 6, generator=generator, dtype=torch.float64).to(dtype)
    return generator, out, before, rows


def increase_by_definition(out, before, which, vectors):
    """From the logits themselves, in float64; no code of the read-out's."""

    def log_prob(resid):
        resid = resid - resid.mean(-1, keepdim=True) if out.centered else resid
        normalized = resid / before.norm_scale[which, None].double() * out.gain.double()
        logits = (normalized + out.bias.double()) @ out.W_U.double() + out.b_U.double()
        return logits.log_softmax(-1).gather(1, before.aims.token[which, None])[:, 0]

    resid = before.resid[which].double()
    return log_prob(resid + vectors) - log_prob(resid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1e-3, 1.0, 30.0, 200.0]),
    n_bases=st.sampled_from([1, 2, 5]),
    in_order=st.booleans(),
    budget=st.sampled_from([2**20, 9000]),
    columns=st.sampled_from([4096, 16]),
)
def test_neurons_that_share_rows_and_predictions_score_as_each_by_itself(
    dtype, seed, size, n_bases, in_order, budget, columns
):
    generator, out, before, rows = several_predictions(seed, dtype)
    out = replace(out, budget=budget)
    readout_columns = mock.patch.object(readout, "_COLUMNS", columns)
    which = torch.randint(0, n_bases, (60,), generator=generator)
    which = which.sort().values if in_order else which
    row_of = torch.randint(0, len(rows), (60,), generator=generator)
    # some move logits by hundreds of nats: sums of exponentials overflow, or lose what is rare
    multiples = size * torch.randn(60, generator=generator, dtype=torch.float64).to(dtype)
    vectors = multiples[:, None] * rows[row_of]
    expected = increase_by_definition(out, before, which, vectors.double())
    with readout_columns:
        together = out.increase_of_multiples(before, which, multiples, rows, row_of)
        alone = out.increase(before, which, vectors)
    tolerance = (1e-5 if dtype == torch.float32 else 1e-13) * (1 + vectors.norm(dim=1).double())
    assert together.dtype == dtype
    assert ((together.double() - expected).abs() <= tolerance).all()
    assert ((alone.double() - expected).abs() <= tolerance).all()


def test_rows_are_unembedded_once_however_many_neurons_share_them(monkeypatch):
    generator, out, before, rows = several_predictions(0, torch.float32)
    unembedded = []
    product = ReadOut._product

    def counted(self, vectors, columns):
        unembedded.append(len(vectors))
        return product(self, vectors, columns)

    monkeypatch.setattr(ReadOut, "_product", counted)
    row_of = torch.arange(60) % len(rows)
    which = torch.arange(60) // 12
    out.increase_of_multiples(before, which, torch.ones(60), rows, row_of)
    assert sum(unembedded) == len(rows)
    unembedded.clear()
    out.increase(before, which, rows[row_of])
    assert sum(unembedded) == 60


@pytest.mark.parametrize("rows", [2, 6, 512])
def test_scores_of_some_heads_at_each_position_are_those_of_all_heads(tiny_model, rows):
    """Whether a read-out takes less than the positions of one head, or all heads' together."""
    result = attribute(tiny_model, TOKENS, target=TARGET, top=1)
    whole = position_scores(result.attns, result.out, ASKED)
    n_heads, n_pos, _ = result.attns[0].shape
    assert whole.shape == (3, n_heads, len(TOKENS)) and 2 < n_pos == len(TOKENS) <= 6
    out = replace(result.out, budget=4 * (3 * 61 + 4 * 24) * rows)
    assert out.rows_per_block == rows
    for heads in (slice(0, 1), slice(1, 3), slice(-1, None)):
        told = []
        some = position_scores(result.attns, out, ASKED, heads=heads, progress=told.append)
        torch.testing.assert_close(some, whole[:, heads], atol=2e-6, rtol=0)
        assert sum(told) == some.numel()
        assert len(told) == (3 if rows == 512 else some[..., 0].numel())


def test_dense_scores_tell_their_progress_as_they_go(tiny_gpt2):
    result = attribute(tiny_gpt2, TOKENS, target=TARGET, top=1)
    out = replace(result.out, budget=4 * (3 * 61 + 4 * 24) * 10)
    told = []
    neuron_scores(result.ffns[0], out, ASKED, progress=told.append)
    assert told == [10] * 9 + [6] and result.ffns[0].n_neurons == 96


def test_scores_have_the_dtype_of_the_read_out_whatever_was_captured(tiny_model):
    result = attribute(tiny_model, TOKENS, target=TARGET, top=1)
    out = replace(result.out, dtype=torch.float64, norms=None)
    before = baselines(result.captured, out, ASKED)
    wide = attribute(tiny_model, TOKENS, target=TARGET, top=1, dtype=torch.float64)
    (heads,) = head_scores([result.attns], out, before.attn)
    (layers,) = layer_scores([result.captured], out, before)
    found = [
        *(heads, layers.attn, layers.ffn),
        neuron_scores(result.ffns[1], out, ASKED),
        position_scores(result.attns, out, ASKED),
    ]
    wanted = [
        *(wide.head_scores, wide.layer_scores.attn, wide.layer_scores.ffn),
        neuron_scores(wide.ffns[1], wide.out, ASKED),
        position_scores(wide.attns, wide.out, ASKED),
    ]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert ours.dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 3, 7, 24])
def test_heads_of_several_runs_score_as_each_run_by_itself(tiny_model, rows, monkeypatch):
    """However many runs and layers one read-out takes."""
    prompts = [TOKENS, TOKENS[:3], TOKENS[1:]]
    results = [attribute(tiny_model, each, target=TARGET, top=1) for each in prompts]
    out = results[0].out
    before = baselines_of_runs(
        [each.captured for each in results], [each.out for each in results], [ASKED] * 3
    )
    monkeypatch.setattr(ReadOut, "rows_per_block", property(lambda out: rows))
    found = head_scores([each.attns for each in results], out, before.attn)
    for ours, result in zip(found, results, strict=True):
        torch.testing.assert_close(ours, result.head_scores, atol=2e-6, rtol=0)
