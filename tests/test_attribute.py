"""Several prompts at once give what each gives alone; contrasts are linear."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import TOKENS, bridge_of, count_forward_passes
from hypothesis import given
from hypothesis import strategies as st
from test_topk import random_ffns, random_read_out

from tl_neuron_attr import (
    InputError,
    Prompt,
    Target,
    attribute,
    attribute_all,
    capture,
    neuron_scores,
    open_host,
    projection_index,
    tokenize,
    top_neurons,
)
from tl_neuron_attr.capture import capture_all
from tl_neuron_attr.decompose import ffn_decomposition
from tl_neuron_attr.ids import from_pair, layout_of
from tl_neuron_attr.interventions.means import mean_coefficients
from tl_neuron_attr.readout import ReadOut

PROMPTS = [TOKENS, TOKENS[:3], [5], TOKENS[1:] + TOKENS[:4], TOKENS[::-1][:3]]
TARGETS = [7, 1, 3, 7, 0]


def assert_same_result(found, wanted, tolerance=1e-5):
    assert found.captured.prompt.tokens == wanted.captured.prompt.tokens
    assert found.target == wanted.target
    assert found.log_prob == pytest.approx(wanted.log_prob, abs=tolerance)
    assert found.embedding_log_prob == pytest.approx(wanted.embedding_log_prob, abs=tolerance)
    for name in ("attn", "ffn"):
        ours, theirs = getattr(found.layer_scores, name), getattr(wanted.layer_scores, name)
        assert torch.allclose(ours, theirs, atol=tolerance, rtol=0)
    assert torch.allclose(found.head_scores, wanted.head_scores, atol=tolerance, rtol=0)
    for kind in ("ffn_neurons", "attn_neurons"):
        ours, theirs = getattr(found, kind), getattr(wanted, kind)
        assert torch.allclose(ours.score, theirs.score, atol=tolerance, rtol=0)
        assert ours.certificate.holds
        assert ours.certificate.total == theirs.certificate.total


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox-parallel", "opt", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_prompts_of_different_lengths_score_as_they_do_alone(family, batch_size):
    model = bridge_of(family)
    together = attribute_all(model, PROMPTS, target=TARGETS, top=8, batch_size=batch_size)
    for tokens, target, found in zip(PROMPTS, TARGETS, together, strict=True):
        assert_same_result(found, attribute(model, tokens, target=target, top=8))


@pytest.mark.parametrize("convention", ["exact", "published", "recomputed"])
def test_every_convention_and_kind_of_target_goes_in_one_batch(tiny_gpt2, convention):
    prompts = [
        Prompt(tokens=TOKENS, target=3, against=9),
        Prompt(tokens=TOKENS, target=3, position=2),
        Prompt(tokens=TOKENS[:4], prompt_id="mine"),
        Prompt(tokens=TOKENS[:4], target=9, against=3),
    ]
    together = attribute_all(tiny_gpt2, prompts, top=5, convention=convention)
    for prompt, found in zip(prompts, together, strict=True):
        assert_same_result(found, attribute(tiny_gpt2, prompt, top=5, convention=convention))
    assert [found.captured.prompt.prompt_id for found in together] == ["0", "1", "mine", "3"]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 23), min_size=1, max_size=9), st.integers(0, 23)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 4),
    st.sampled_from([4_000, 50_000, 2**30]),
    st.permutations(range(6)),
)
def test_neither_order_nor_batch_size_nor_budget_changes_a_score(asked, size, budget, order):
    model = bridge_of("gpt2", dtype=torch.float64)
    order = [place for place in order if place < len(asked)]
    one = attribute_all(model, [t for t, _ in asked], target=[w for _, w in asked], top=6)
    other = attribute_all(
        model,
        [asked[place][0] for place in order],
        target=[asked[place][1] for place in order],
        top=6,
        batch_size=size,
        budget=budget,
    )
    for place, found in zip(order, other, strict=True):
        assert_same_result(found, one[place], tolerance=1e-10)


def test_the_number_of_threads_changes_no_score(tiny_gpt2):
    wanted = attribute_all(tiny_gpt2, PROMPTS, target=TARGETS, top=8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = attribute_all(tiny_gpt2, PROMPTS, target=TARGETS, top=8)
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same_result(ours, theirs)


def test_many_targets_of_one_prompt_take_one_forward_pass_and_one_survey(monkeypatch):
    model = bridge_of("gpt2")
    attribute(model, TOKENS, top=2)  # the identities are checked on a first run
    passes = count_forward_passes(model, monkeypatch)
    surveys = []
    real = ReadOut._survey

    def counted(out, normalized, tangent):
        surveys.append(len(normalized))
        return real(out, normalized, tangent)

    monkeypatch.setattr(ReadOut, "_survey", counted)
    found = attribute_all(model, TOKENS, target=list(range(12)), top=5)
    assert len(passes) == 1
    assert surveys == [2 * len(found[0].ffns) + 1]
    assert [result.target.id for result in found] == list(range(12))
    monkeypatch.undo()
    for target in (0, 11):
        assert_same_result(found[target], attribute(model, TOKENS, target=target, top=5))


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_more_targets_than_a_batch_has_prompts_still_take_one_pass(tiny_gpt2, monkeypatch, dtype):
    attribute(tiny_gpt2, TOKENS, top=2)
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    surveys = []
    real = ReadOut._survey
    monkeypatch.setattr(
        ReadOut, "_survey", lambda *given: surveys.append(len(given[1])) or real(*given)
    )
    ids = torch.tensor([TOKENS])
    found = attribute_all(tiny_gpt2, ids, target=list(range(20)), top=1, batch_size=4, dtype=dtype)
    assert len(found) == 20 and len(passes) == 1 and len(surveys) == 1


def test_tensors_and_arrays_in_a_list_are_prompts_of_their_own(tiny_gpt2):
    tensors = attribute_all(tiny_gpt2, [torch.tensor([3]), torch.tensor([5, 4])], top=1)
    assert [found.captured.prompt.tokens for found in tensors] == [(3,), (5, 4)]
    rows = attribute_all(tiny_gpt2, torch.tensor([[3, 17], [5, 4]]).numpy(), top=1)
    assert [found.captured.prompt.tokens for found in rows] == [(3, 17), (5, 4)]
    ids = attribute_all(tiny_gpt2, [torch.tensor(3), 5], top=1)
    assert [found.captured.prompt.tokens for found in ids] == [(3, 5)]


def test_a_prompt_takes_the_targets_it_lacks_and_a_cache_serves_them_all(tiny_gpt2):
    prompt = Prompt(tokens=TOKENS, position=2)
    with torch.no_grad():
        _, cache = tiny_gpt2.run_with_cache(torch.tensor([TOKENS]))
    for options in ({}, {"cache": cache}):
        found = attribute_all(tiny_gpt2, prompt, target=[1, 2], top=3, **options)
        assert [result.captured.prompt.prompt_id for result in found] == ["0", "1"]
        for target, result in zip([1, 2], found, strict=True):
            alone = attribute(tiny_gpt2, TOKENS, target=target, position=2, top=3)
            assert_same_result(result, alone)


def test_under_hooks_every_prompt_of_a_batch_is_verified(tiny_gpt2, monkeypatch):
    verified = []
    monkeypatch.setattr(
        sys.modules["tl_neuron_attr.attribute"],
        "verify",
        lambda host, captured, **how: verified.append(captured.prompt.tokens),
    )
    attribute_all(tiny_gpt2, PROMPTS[:3], top=1)
    assert len(verified) == 1
    with tiny_gpt2.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: value)]):
        attribute_all(tiny_gpt2, PROMPTS[:3], top=1)
    assert sorted(verified[1:]) == sorted(map(tuple, PROMPTS[:3]))


def test_a_small_budget_makes_smaller_batches(tiny_gpt2, monkeypatch):
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    attribute_all(tiny_gpt2, PROMPTS[:4], top=1)
    assert len(passes) == 1
    attribute_all(tiny_gpt2, PROMPTS[:4], top=1, budget=5_000)
    assert len(passes) == 1 + 4


def test_a_callers_autocast_changes_nothing_that_is_asked_of_a_result(tiny_gpt2, tmp_path):
    index = projection_index(tiny_gpt2, tmp_path)

    def asked():
        found = attribute(tiny_gpt2, TOKENS, target=7, top=5, index=index)
        return (
            found.positions()["score"],
            found.suppressing()["score"],
            found.neurons("attn", by_source=False)["score"],
            found.shares(3)["share_upper"],
            neuron_scores(found.ffns[1], found.out, found.target).numpy(),
            top_neurons(found.ffns, found.out, found.target, 4).score.numpy(),
        )

    wanted = asked()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = asked()
    for ours, theirs in zip(found, wanted, strict=True):
        assert (abs(ours - theirs) == 0).all()


def test_captures_of_several_precisions_go_in_one_call(tiny_gpt2):
    host = open_host(tiny_gpt2)
    captured = capture(host, tokenize(host, Prompt(tokens=TOKENS)))
    found = attribute_all(tiny_gpt2, [captured, captured.to(torch.float64), TOKENS], top=2)
    assert [result.out.dtype for result in found] == [torch.float32, torch.float64, torch.float32]


def test_targets_of_a_capture_take_no_forward_pass_at_all(tiny_gpt2, monkeypatch):
    host = open_host(tiny_gpt2)
    captured = capture(host, tokenize(host, Prompt(tokens=TOKENS)))
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    found = attribute_all(tiny_gpt2, captured, target=[1, 2], against=[2, 1], top=4)
    assert not passes
    assert torch.allclose(found[0].layer_scores.ffn, -found[1].layer_scores.ffn, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("cached", [False, True])
def test_padding_on_either_side_changes_no_score(tiny_model, side, cached):
    longest = max(map(len, PROMPTS))
    ids = torch.zeros(len(PROMPTS), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(PROMPTS):
        place = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), None)
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    cache = None
    if cached:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            _, cache = tiny_model.run_with_cache(ids, attention_mask=mask, position_ids=positions)
    found = attribute_all(tiny_model, ids, attention_mask=mask, target=TARGETS, top=6, cache=cache)
    for tokens, target, result in zip(PROMPTS, TARGETS, found, strict=True):
        assert_same_result(result, attribute(tiny_model, tokens, target=target, top=6))


# --- contrasts --------------------------------------------------------------------------------


def test_a_contrast_is_the_difference_of_two_log_probabilities(tiny_model):
    options = {"dtype": torch.float64, "top": 3}
    ours = attribute(tiny_model, TOKENS, target=3, against=9, **options)
    one = attribute(tiny_model, TOKENS, target=3, **options)
    other = attribute(tiny_model, TOKENS, target=9, **options)
    assert ours.target == Target(3, ours.target.text, against=other.target)
    assert ours.log_prob == pytest.approx(one.log_prob - other.log_prob, abs=1e-9)
    for name in ("attn", "ffn"):
        difference = getattr(one.layer_scores, name) - getattr(other.layer_scores, name)
        assert torch.allclose(getattr(ours.layer_scores, name), difference, atol=1e-9)
    assert torch.allclose(ours.head_scores, one.head_scores - other.head_scores, atol=1e-9)
    for block in (*ours.ffns, *ours.attns):
        difference = neuron_scores(block, one.out, one.target) - neuron_scores(
            block, one.out, other.target
        )
        assert torch.allclose(neuron_scores(block, ours.out, ours.target), difference, atol=1e-9)
    positions = one.positions().score - other.positions().score
    assert (ours.positions().score - positions).abs().max() < 1e-9


def test_under_a_frozen_norm_a_contrast_needs_no_exact_stage(tiny_model, monkeypatch):
    model = tiny_model
    read_outs = []
    real = ReadOut.increase

    def counted(out, baseline, which, contributions):
        read_outs.append(len(contributions))
        return real(out, baseline, which, contributions)

    monkeypatch.setattr(ReadOut, "increase", counted)
    found = attribute(model, TOKENS, target=3, against=9, top=10, dtype=torch.float64)
    n_layers, n_heads = found.head_scores.shape
    assert sum(read_outs) == n_layers * (2 + n_heads)  # layers and heads, no neurons
    for ranked, blocks in ((found.ffn_neurons, found.ffns), (found.attn_neurons, found.attns)):
        certificate = ranked.certificate
        assert certificate.linear and certificate.applies and certificate.holds
        dense = torch.cat([neuron_scores(block, found.out, found.target) for block in blocks])
        best = dense.sort(descending=True, stable=True)
        assert torch.allclose(ranked.score, best.values[:10], atol=1e-10)
        assert torch.equal(ranked.layer * blocks[0].n_neurons + ranked.number, best.indices[:10])


def test_equal_scores_of_a_contrast_come_by_layer_and_number():
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 8, 30, scale=1.0, centered=True)
    (block,) = random_ffns(generator, 1, 8, 1, tail=1.0)
    same = replace(block, coefficients=torch.ones(40), W_out=block.W_out.expand(40, 8).clone())
    blocks = [replace(same, layer=layer) for layer in range(2)]
    found = top_neurons(blocks, out, Target(3, against=Target(5)), 50)
    assert found.layer.tolist() == [0] * 40 + [1] * 10
    assert found.number.tolist() == [*range(40), *range(10)]


def test_a_contrasts_neurons_add_up_to_their_layer():
    model = bridge_of("gpt2", dtype=torch.float64)
    found = attribute(model, TOKENS, target=3, against=9, top=1)
    for layer, block in enumerate(found.ffns):
        one = torch.ones(1, dtype=torch.float64)
        bias = replace(block, coefficients=one, W_out=block.b_out[None])
        neurons = neuron_scores(block, found.out, found.target).sum()
        together = neurons + neuron_scores(bias, found.out, found.target).sum()
        assert together.item() == pytest.approx(found.layer_scores.ffn[layer].item(), abs=1e-10)


# --- with a projection index ------------------------------------------------------------------


def test_an_index_tells_what_lowers_the_target_and_what_share_the_best_hold(tiny_model, tmp_path):
    index = projection_index(tiny_model, tmp_path)
    found = attribute(tiny_model, TOKENS, target=7, top=5, index=index)
    for kind, blocks in (("ffn", found.ffns), ("attn", found.attns)):
        dense = torch.cat([neuron_scores(block, found.out, found.target) for block in blocks])
        table = found.suppressing(kind, top=5, tokens=2)
        lowest = dense.sort(stable=True).values[:5]
        assert table["score"].tolist() == pytest.approx(lowest.tolist(), abs=1e-5)
        assert table["rank"].tolist() == [1, 2, 3, 4, 5]
        assert set(found.neurons().columns) < set(table.columns)
        assert found.suppressing_neurons[kind].certificate.holds
        assert found.certificates()[f"suppressing_{kind}"]["lowest"]
        row = found.shares(5).set_index("kind").loc[kind]
        rises = dense.clamp(min=0).sum().item()
        share = dense.topk(5).values.clamp(min=0).sum().item() / rises
        assert row.rise_lower <= rises <= row.rise_upper
        assert row.share_lower <= share <= row.share_upper
        intervals = found.intervals(kind)
        assert (intervals.lower.flatten() <= dense).all()
        assert (intervals.upper.flatten() >= dense).all()


def test_tokens_are_read_from_the_index_without_a_projection(tiny_gpt2, tmp_path, monkeypatch):
    wanted = attribute(tiny_gpt2, TOKENS, target=7, top=20).neurons(tokens=3)
    index = projection_index(tiny_gpt2, tmp_path)
    found = attribute(tiny_gpt2, TOKENS, target=7, top=20, index=index)
    monkeypatch.setattr("tl_neuron_attr.attribution.project", None)
    tokens = found.neurons(tokens=3)
    assert tokens["raises"].tolist() == wanted["raises"].tolist()
    assert tokens["lowers"].tolist() == wanted["lowers"].tolist()


def test_what_takes_an_index_says_so_and_an_index_of_other_weights_is_refused(tiny_gpt2, tmp_path):
    found = attribute(tiny_gpt2, TOKENS, target=7, top=2)
    for ask in (found.suppressing, found.shares, lambda: found.intervals("ffn")):
        with pytest.raises(InputError, match="projection index; make one"):
            ask()
    index = projection_index(bridge_of("gpt2", seed=1), tmp_path)
    with pytest.raises(InputError, match="of other weights"):
        attribute(tiny_gpt2, TOKENS, index=index)


def test_a_contrast_and_a_recomputed_norm_need_no_index_to_suppress(tiny_gpt2):
    contrast = attribute(tiny_gpt2, TOKENS, target=3, against=9, top=4)
    recomputed = attribute(tiny_gpt2, TOKENS, target=3, top=4, convention="recomputed")
    for found in (contrast, recomputed):
        dense = torch.cat([neuron_scores(block, found.out, found.target) for block in found.ffns])
        lowest = dense.sort(stable=True).values[:4]
        assert found.suppressing("ffn", top=4)["score"].tolist() == pytest.approx(
            lowest.tolist(), abs=1e-5
        )


def test_saving_without_an_index_leaves_no_table_of_an_earlier_run(tiny_gpt2, tmp_path):
    index = projection_index(tiny_gpt2, tmp_path / "index")
    out = tmp_path / "out"
    attribute(tiny_gpt2, TOKENS, top=2, index=index).save(out)
    assert (out / "suppressing.parquet").exists() and (out / "shares.parquet").exists()
    attribute(tiny_gpt2, TOKENS[:3], top=2).save(out)
    tables = ("heads", "layers", "log_probs", "neurons", "positions")
    names = [*(f"{name}.parquet" for name in tables), "run.json"]
    assert sorted(path.name for path in out.iterdir()) == names


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts"),
        ([TOKENS, TOKENS], {"target": [1]}, "1 targets for 2 prompts"),
        ([TOKENS], {"target": [1, 2], "against": [3]}, "1 tokens to compare with for 2 questions"),
        ({"input_ids": [TOKENS]}, {}, r"give \['input_ids'\]"),
        (b"ab", {}, "got a bytes"),
        (torch.zeros(2, 3), {}, "token ids must be integers, got torch.float32"),
        ([TOKENS], {"against": 1}, "give target beside against"),
        ([TOKENS], {"target": 1, "against": 1}, "the same token"),
        ([TOKENS], {"attention_mask": torch.ones(1, 3)}, "belongs beside token ids of shape"),
        (
            torch.zeros(2, 3, dtype=torch.long),
            {"attention_mask": torch.ones(2, 4)},
            "must be the same",
        ),
        (
            torch.zeros(1, 3, dtype=torch.long),
            {"attention_mask": torch.tensor([[1, 0, 1]])},
            "padding on one side",
        ),
        (torch.zeros(1, 3, dtype=torch.long), {"attention_mask": torch.zeros(1, 3)}, "empty"),
        ([TOKENS], {"batch_size": 0}, "batch_size must be at least 1"),
        ([TOKENS], {"attention_mask": [[1, 1]]}, "belongs beside token ids of shape"),
        ([TOKENS, Prompt(tokens=TOKENS, target=1)], {"target": 3}, "belong inside the Prompt"),
    ],
)
def test_what_cannot_be_asked_is_said_before_any_forward_pass(
    tiny_gpt2, monkeypatch, prompts, options, message
):
    passes = count_forward_passes(tiny_gpt2, monkeypatch)
    with pytest.raises(InputError, match=message):
        attribute_all(tiny_gpt2, prompts, **options)
    assert not passes


def test_what_cannot_be_asked_of_a_result_or_an_index_is_said(tiny_gpt2, tmp_path):
    index = projection_index(tiny_gpt2, tmp_path)
    found = attribute(tiny_gpt2, TOKENS, target=7, top=2, index=index)
    one = torch.tensor([0])
    for ask, message in (
        (lambda: found.intervals("ffn", tolerance=-1.0), "tolerance must be a number"),
        (lambda: found.intervals("ffn").share(0), "top must be at least 1"),
        (lambda: found.suppressing("ffn", top=3), "only the best 2"),
        (lambda: top_neurons(found.ffns, found.out, found.target, 0), "top must be at least 1"),
        (lambda: top_neurons([], found.out, found.target, 1), "no decompositions"),
        (lambda: attribute(tiny_gpt2, found.captured, position=0), "a Capture carries its own tok"),
        (
            lambda: attribute_all(tiny_gpt2, [found.captured, TOKENS], cache={}),
            "a Capture carries its own tokens: leave the cache out",
        ),
        (lambda: attribute(tiny_gpt2, found.captured, against=3), "a contrast needs both tokens"),
        (
            lambda: attribute(tiny_gpt2, found.captured, target={3, 4}, against=5),
            "a contrast is of one token against another",
        ),
        (lambda: found.positions(head=1), "give the head's layer too"),
        (lambda: found.positions(3), "layer 3 is out of range: the model has 3 layers"),
        (lambda: found.positions(0, 3), "head 3 is out of range: the model has 3 heads"),
        (lambda: found.query_layers(["L1"]), "of must be 'attn', 'ffn', 'both' or neurons: .*L1"),
        (lambda: ffn_decomposition(found.host, found.captured, 3), "layer 3 is out of range"),
        (lambda: index.tokens("ffn", one + 99, one), "a layer is out of range"),
        (lambda: index.tokens("attn", one, one + 999), "a row is out of range"),
    ):
        with pytest.raises(InputError, match=message):
            ask()


def test_a_choice_that_there_is_not_is_answered_with_those_there_are(
    tiny_gpt2, tmp_path, unchecked
):
    """By whatever takes one: without types checked it might else take it for some other."""
    index = projection_index(tiny_gpt2, tmp_path)
    found = attribute(tiny_gpt2, TOKENS, target=7, top=2, index=index)
    host, prompt, one = found.host, found.captured.prompt, torch.tensor([0])
    for ask, message in (
        (lambda: attribute(tiny_gpt2, TOKENS, convention="own"), "convention must be one of exact"),
        (lambda: attribute(tiny_gpt2, TOKENS, index=tmp_path), "index must be a ProjectionIndex, "),
        (lambda: capture_all(host, [prompt], padding_side="top"), "must be 'right' or 'left'; got"),
        (lambda: found.neurons("mlp"), "kind must be 'ffn', 'attn' or None for both, got 'mlp'"),
        (lambda: found.intervals("mlp"), "kind must be 'ffn' or 'attn', got 'mlp'"),
        (lambda: found.query_layers(3), "of must be 'attn', 'ffn', 'both' or neurons; got 3"),
        (lambda: index.tokens("mlp", one, one), "kind must be 'ffn' or 'attn', got 'mlp'"),
        (lambda: from_pair("Elsewhere", 1, 2, layout_of(host)), "tool must be one of .*Elsewhere"),
        (lambda: mean_coefficients(host, [TOKENS], positions="own"), "positions must be 'all' or"),
    ):
        with pytest.raises(InputError, match=message):
            ask()
