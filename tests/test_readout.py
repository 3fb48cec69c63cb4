"""The read-out's other answers by their definitions, and what its budget allows."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import bridge_of
from test_topk import random_read_out

from tl_neuron_attr import InputError, Target, open_host, read_out
from tl_neuron_attr.baselines import Deviations
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.projection import project
from tl_neuron_attr.prompts import Distribution
from tl_neuron_attr.readout import ReadOut, baseline_of_runs, check_read_out

D_MODEL, D_VOCAB = 6, 31


def some_read_out(*, centered=True, **changes):
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(
        generator, D_MODEL, D_VOCAB, scale=1.0, centered=centered, dtype=torch.float64
    )
    resid = torch.randn(3, D_MODEL, generator=generator, dtype=torch.float64)
    return replace(out, **changes), resid


def logits_by_definition(out, resid, scale=None):
    resid = resid - resid.mean(-1, keepdim=True) if out.centered else resid
    if scale is None:
        scale = (resid.square().mean(-1, keepdim=True) + out.eps).sqrt()
    logits = (resid / scale * out.gain + out.bias) @ out.W_U + out.b_U
    return logits if out.soft_cap is None else out.soft_cap * torch.tanh(logits / out.soft_cap)


def directions_by_definition(out, scale):
    """Rows whose dot product with a contribution is its change of each token's logit."""
    rows = (out.gain[:, None] * out.W_U / scale).T
    return rows - rows.mean(-1, keepdim=True) if out.centered else rows


# --- how far tokens lie apart ---


@pytest.mark.parametrize("centered", [False, True])
def test_deviations_are_distances_from_the_expected_direction(centered, monkeypatch):
    monkeypatch.setattr("tl_neuron_attr.readout._SURVEY_COLUMNS", 7)
    out, resid = some_read_out(centered=centered)
    outs = [replace(out, norm_scale=out.norm_scale * (1 + run)) for run in range(3)]
    before = baseline_of_runs(outs, list(resid[:, None]), [2, 0, 1], [Target(5)] * 3)
    found = out.deviations(before)
    assert isinstance(found, Deviations)
    for base, run in enumerate([2, 0, 1]):
        scale = outs[run].norm_scale
        p = logits_by_definition(out, resid[run], scale).softmax(-1)
        directions = directions_by_definition(out, scale)
        apart = (directions - p @ directions).square().sum(1)
        assert float(found.largest[base]) == pytest.approx(float(apart.max().sqrt()), rel=1e-9)
        assert float(found.mean_square[base]) == pytest.approx(float(p @ apart), rel=1e-9)
        assert found.largest[base] >= apart.max().sqrt() and found.mean_square[base] >= p @ apart
    assert found.widest == pytest.approx(float(out.W_U.norm(dim=0).max()), rel=1e-12)


def test_deviations_allow_for_what_rounds_where_squares_cancel():
    """Nearly one direction for all tokens, far longer than what tells them apart."""
    generator = torch.Generator().manual_seed(0)
    out, resid = some_read_out(centered=False)
    common = 1e4 * torch.randn(D_MODEL, 1, generator=generator, dtype=torch.float64)
    narrow = {name: getattr(out, name).float() for name in ("b_U", "gain", "bias", "norm_scale")}
    W_U = (common + 0.01 * out.W_U).float()
    out = replace(out, W_U=W_U, dtype=torch.float32, **narrow)
    before = out.baseline(resid.float(), Target(5))
    found = out.deviations(before)
    directions = directions_by_definition(
        replace(out, W_U=W_U.double(), gain=out.gain.double()), out.norm_scale.double()
    )
    p = before.log_probs.double().exp()
    apart = (directions - (p @ directions)[:, None]).square().sum(-1)
    assert (found.largest.double().square() >= apart.amax(-1)).all()
    assert (found.mean_square.double() >= (p * apart).sum(-1)).all()
    longest = float((out.gain[:, None] * W_U).norm(dim=0).max() / out.norm_scale) ** 2
    allowed = 32 * D_MODEL**0.5 * torch.finfo(torch.float32).eps * longest
    assert (found.mean_square < 1.2 * allowed).all() and (found.mean_square > 0.8 * allowed).all()


def test_a_contrast_and_a_recomputed_norm_have_no_deviations():
    out, resid = some_read_out()
    contrast = Target(5, against=Target(9))
    asked = [
        out.baseline(resid, contrast),
        replace(out, norm_scale=None).baseline(resid, Target(5)),
        out.baseline(resid, Target(5), tangent=False),
    ]
    for before in asked:
        with pytest.raises(InputError, match="has deviations"):
            out.deviations(before)


# --- places among all tokens ---


@pytest.mark.parametrize("centered", [False, True])
def test_a_rank_counts_the_tokens_that_are_raised_at_least_as_much(centered, monkeypatch):
    monkeypatch.setattr("tl_neuron_attr.readout._COLUMNS", 7)
    out, vectors = some_read_out(centered=centered)
    for target in (0, 6, 7, 30):
        raised = vectors @ directions_by_definition(out, 1.0).T
        wanted = (raised >= raised[:, target, None]).sum(1)
        assert out.ranks(vectors, Target(target)).tolist() == wanted.tolist()
    assert out.ranks(torch.zeros_like(vectors), Target(4)).tolist() == [D_VOCAB] * 3
    assert out.ranks(vectors[:0], Target(4)).shape == (0,)
    with pytest.raises(InputError, match="no rank"):
        out.ranks(vectors, Target(4, against=Target(5)))
    with pytest.raises(InputError, match="only one token"):
        out.ranks(vectors, Target(4, also=(Target(5),)))


@pytest.mark.parametrize("whole_rows", [1, 2, 300])
def test_answers_have_the_probability_of_all_and_the_rank_of_the_likeliest(whole_rows, monkeypatch):
    monkeypatch.setattr(ReadOut, "whole_rows", property(lambda out: whole_rows))
    out, resid = some_read_out()
    targets = [
        Target(4),
        Target(7, also=(Target(2), Target(9))),
        Target(3, against=Target(5)),
    ]
    found = out.answers(resid, targets)
    log_probs = logits_by_definition(out, resid, out.norm_scale).log_softmax(-1)
    for row, ids in enumerate([[4], [7, 2, 9], [3]]):
        each = log_probs[row, ids]
        assert float(found.log_prob[row]) == pytest.approx(float(each.logsumexp(0)), abs=1e-12)
        assert int(found.rank[row]) == 1 + int((log_probs[row] > each.max()).sum())


def test_targets_of_several_forms_share_nothing_and_a_distribution_is_no_answer():
    out, resid = some_read_out()
    forms = [Target(4), Target(4, against=Target(5)), Target(4, also=(Target(5),))]
    for other in forms[1:]:
        with pytest.raises(InputError, match="cannot share a baseline"):
            out.log_prob_of_each(resid[:2], [forms[0], other])
    flat = Distribution(torch.full((D_VOCAB,), 1 / D_VOCAB, dtype=torch.float64))
    whole = Target(4, distribution=flat)
    with pytest.raises(InputError, match="a whole distribution has no rank"):
        out.answers(resid[:2], [Target(4), whole])
    # -KL(q || p)
    log_p = logits_by_definition(out, resid, out.norm_scale).log_softmax(-1)
    wanted = log_p.mean(-1) + math.log(D_VOCAB)
    torch.testing.assert_close(out.log_prob(resid, whole), wanted)
    assert out.log_prob(resid[None], whole).shape == (1, 3)


@pytest.mark.parametrize("convention", ["exact", "recomputed"])
def test_both_ends_of_a_projection_are_its_largest_and_smallest_logits(convention, monkeypatch):
    monkeypatch.setattr(ReadOut, "whole_rows", property(lambda out: 4))
    out, vectors = some_read_out()
    if convention == "recomputed":
        out = replace(out, norm_scale=None)
    vectors = torch.stack([vectors, -2 * vectors])
    raised = vectors @ directions_by_definition(out, out.norm_scale or 1.0).T
    for k in (3, 100):
        found = project(out, vectors, k)
        order = raised.sort(-1, descending=True)
        torch.testing.assert_close(found.top_logits, order.values[..., :k])
        assert torch.equal(found.top_ids, order.indices[..., :k])
        torch.testing.assert_close(found.bottom_logits, order.values.flip(-1)[..., :k])
        assert torch.equal(found.bottom_ids, order.indices.flip(-1)[..., :k])
        torch.testing.assert_close(found.mean, raised.mean(-1))
        torch.testing.assert_close(found.spread, raised.std(-1, correction=0))
        away = torch.maximum(raised.amax(-1) - found.mean, found.mean - raised.amin(-1))
        torch.testing.assert_close(found.readability, away / found.spread)
    assert project(out, vectors).top_ids.shape == (2, 3, 10)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_logits_and_log_probs_are_those_of_the_whole_vocabulary_block_by_block(
    soft_cap, monkeypatch
):
    monkeypatch.setattr("tl_neuron_attr.readout._COLUMNS", 7)
    monkeypatch.setattr(ReadOut, "rows_per_block", property(lambda out: 4))
    out, resid = some_read_out(soft_cap=soft_cap)
    resid = torch.stack([resid, 2 * resid])
    for here in (out, replace(out, norm_scale=None)):
        logits = logits_by_definition(out, resid, here.norm_scale)
        torch.testing.assert_close(here.logits(resid), logits)
        log_p = logits.log_softmax(-1)
        asked = {
            Target(5): log_p[..., 5],
            Target(5, against=Target(9)): log_p[..., 5] - log_p[..., 9],
            Target(5, also=(Target(9),)): log_p[..., [5, 9]].logsumexp(-1),
        }
        for target, wanted in asked.items():
            torch.testing.assert_close(here.log_prob(resid, target), wanted)
            rows = here.log_prob_of_each(resid.flatten(0, 1), [target] * 6)
            torch.testing.assert_close(rows.view(2, 3), wanted)


# --- positions and rivals ---


@pytest.mark.parametrize("centered", [False, True])
def test_at_several_positions_each_has_the_scale_of_its_own_end(centered):
    out, final = some_read_out(centered=centered)
    generator = torch.Generator().manual_seed(1)
    resid = torch.randn(2, 3, D_MODEL, generator=generator, dtype=torch.float64)
    ends = final - final.mean(-1, keepdim=True) if centered else final
    scale = (ends.square().mean(-1, keepdim=True) + out.eps).sqrt()
    for frozen in (True, False):
        here = out if frozen else replace(out, norm_scale=None)
        wanted = logits_by_definition(out, resid, scale if frozen else None).log_softmax(-1)
        found = here.log_prob_towards(resid, final, Target(5))
        torch.testing.assert_close(found, wanted[..., 5], rtol=0, atol=1e-12)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("centered", [False, True])
def test_rivals_are_the_likeliest_tokens_and_the_others_on_average(centered, soft_cap, monkeypatch):
    monkeypatch.setattr("tl_neuron_attr.readout._COLUMNS", 7)
    out, resid = some_read_out(centered=centered, soft_cap=soft_cap)
    out, resid = out.frozen_at(resid[0]), resid[0]
    logits = logits_by_definition(out, resid, out.norm_scale)
    p = logits.softmax(-1)
    slopes = 1.0 if soft_cap is None else 1 - (logits / soft_cap).square()
    directions = (directions_by_definition(out, 1.0).T * slopes).T
    order = [each for each in p.argsort(descending=True).tolist() if each != 5]
    for count in (1, 4, 100):
        found = out.rivals(resid, Target(5), count)
        likely, others = order[:count], order[count:]
        torch.testing.assert_close(found.prob[:-1], p[[5, *likely]])
        assert float(found.prob[-1]) == pytest.approx(float(p[others].sum()), abs=1e-12)
        torch.testing.assert_close(found.directions[:-1], directions[[5, *likely]])
        if others:
            mean = p[others] @ directions[others] / p[others].sum()
            torch.testing.assert_close(found.directions[-1], mean)
        assert float(found.norm_scale) == pytest.approx(float(out.norm_scale))
        assert (found.centered, found.eps) == (centered, out.eps)
    contrast = out.rivals(resid, Target(5, against=Target(9)), 3)
    assert contrast.prob.tolist() == [0.0, 1.0]
    torch.testing.assert_close(contrast.directions, directions[[5, 9]])
    # the gradient is the model's own, the norm's scale included
    asked = resid.clone().requires_grad_()
    logits_by_definition(out, asked).log_softmax(-1)[5].backward()
    torch.testing.assert_close(out.rivals(resid, Target(5), 100).gradient, asked.grad)
    with pytest.raises(InputError, match="has rivals"):
        out.rivals(resid, Target(5, also=(Target(9),)), 3)


@pytest.mark.parametrize("centered", [False, True])
def test_what_is_lost_without_a_neuron_that_does_no_more_is_what_the_definition_says(
    centered, monkeypatch
):
    monkeypatch.setattr("tl_neuron_attr.rivals._ROWS", 4)
    out, resid = some_read_out(centered=centered)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(9, D_MODEL, generator=generator, dtype=torch.float64)
    coefficients = torch.randn(9, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(D_MODEL, generator=generator, dtype=torch.float64)
    written = coefficients[:, None] * rows * weights
    # every token by itself
    rivals = out.frozen_at(resid[0]).rivals(resid[0], Target(5), 100)
    found = rivals.loss(rows, coefficients, written @ rivals.gradient, weights)
    before = logits_by_definition(out, resid[0]).log_softmax(-1)[5]
    after = logits_by_definition(out, resid[0] - written).log_softmax(-1)[:, 5]
    torch.testing.assert_close(found, before - after, rtol=0, atol=1e-10)


# --- first-order pictures ---


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("asked", ["token", "contrast", "answers"])
def test_a_tangent_is_its_definition(asked, soft_cap):
    out, resid = some_read_out(soft_cap=soft_cap)
    outs = [replace(out, norm_scale=out.norm_scale * (1 + run)) for run in range(3)]
    target = {
        "token": Target(5),
        "contrast": Target(5, against=Target(9)),
        "answers": Target(5, also=(Target(9),)),
    }[asked]
    before = baseline_of_runs(outs, list(resid[:, None]), range(3), [target] * 3)
    weighted = (out.gain[:, None] * out.W_U).norm(dim=0)
    for base in range(3):
        scale = outs[base].norm_scale
        x = resid[base].clone().requires_grad_()
        logits = logits_by_definition(out, x, scale)
        p = logits.softmax(-1).detach()
        log_p = logits.log_softmax(-1)
        said = {
            "token": log_p[5],
            "contrast": log_p[5] - log_p[9],
            "answers": log_p[[5, 9]].logsumexp(0),
        }[asked]
        said.backward()
        tangent = before.tangent[base : base + 1]
        torch.testing.assert_close(before.log_prob[base], said.detach())
        torch.testing.assert_close(tangent.gradient[0], x.grad)
        slopes = 1.0 if soft_cap is None else 1 - (logits.detach() / soft_cap).square()
        directions = (directions_by_definition(out, scale).T * slopes).T
        others = directions[9] if asked == "contrast" else p @ directions
        torch.testing.assert_close(tangent.expected[0], others)
        norm = weighted[9] if asked == "contrast" else p @ weighted
        square = weighted[9] ** 2 if asked == "contrast" else p @ weighted.square()
        of_answers = [5, 9] if asked == "answers" else [5]
        reach = max(float((weighted[each] + norm) / scale) for each in of_answers)
        assert float(tangent.reach) == pytest.approx(reach, rel=1e-12)
        if soft_cap is None:
            assert tangent.bend is None
        else:
            bend = max(float((weighted[each] ** 2 + square) / scale**2) for each in of_answers) * (
                2 / (3 * math.sqrt(3) * soft_cap)
            )
            assert float(tangent.bend) == pytest.approx(bend, rel=1e-12)


def test_bases_that_need_no_tangent_get_none_and_the_same_prediction():
    out, resid = some_read_out()
    whole = baseline_of_runs([out, out], [resid, resid[:2]], [0, 1], [Target(5)] * 2)
    some = baseline_of_runs([out, out], [resid, resid[:2]], [0, 1], [Target(5)] * 2, plain=[1])
    torch.testing.assert_close(some.log_probs, whole.log_probs)
    for base, kept in enumerate([True, False, True, True, False]):
        same = torch.allclose(some.tangent.gradient[base], whole.tangent.gradient[base])
        assert same is kept


def test_no_contributions_raise_nothing_in_the_read_outs_dtype():
    out, resid = some_read_out()
    before = out.baseline(resid, Target(5))
    none = torch.zeros(0, dtype=torch.long)
    found = out.increase(before, none, resid[:0].float())
    assert (found.shape, found.dtype) == ((0,), torch.float64)
    found = out.increase_of_multiples(before, none, resid[:0, 0], resid, none)
    assert (found.shape, found.dtype) == ((0,), torch.float64)


# --- what fits ---


def test_rows_at_a_time_are_what_the_budget_holds():
    out, _ = some_read_out()
    per_row = 8 * (3 * D_VOCAB + 4 * D_MODEL)
    capped = 8 * (10 * D_VOCAB + 4 * D_MODEL)
    assert replace(out, budget=5 * per_row).rows_per_block == 5
    assert replace(out, budget=5 * per_row - 1).rows_per_block == 4
    assert replace(out, budget=5 * capped, soft_cap=2.0).rows_per_block == 5
    assert replace(out, budget=5 * capped - 1, soft_cap=2.0).rows_per_block == 4
    assert out.rows_per_block == out.whole_rows == 512
    narrow = replace(out, W_U=out.W_U.float())  # a widened block of it besides
    once = 8 * D_VOCAB * D_MODEL
    assert replace(narrow, budget=once + 5 * per_row).rows_per_block == 5
    assert replace(narrow, budget=once + 5 * per_row - 1).rows_per_block == 4
    with pytest.raises(InputError, match=f"give at least {once + per_row}$"):
        _ = replace(narrow, budget=once + per_row - 1).rows_per_block
    assert replace(narrow, budget=once + per_row).rows_per_block == 1


def test_rows_of_a_wide_vocabulary_are_fewer_where_they_must_be_whole():
    W_U = torch.zeros(2, 3 * 4096)
    out = ReadOut(
        W_U=W_U,
        b_U=None,
        gain=None,
        bias=None,
        norm_scale=torch.tensor(1.0),
        centered=False,
        eps=1e-5,
        dtype=torch.float32,
    )
    assert (out.rows_per_block, out.whole_rows) == (512, 170)
    one = replace(out, budget=4 * (3 * 4096 + 4 * 2))
    assert (one.rows_per_block, one.whole_rows) == (1, 1)


def test_what_cannot_be_read_out_is_said_before_the_model_runs():
    host = open_host(bridge_of("llama"))
    resid = torch.randn(24, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="float32 or torch.float64"):
        read_out(host, resid, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="convention must be one of exact, published, recomputed"):
        check_read_out(host, "frozen", 2**30)
    recomputed = read_out(host, resid, "recomputed")
    assert recomputed.frozen_at(2 * resid) is recomputed
    with pytest.raises(InputError, match="no linear part"):
        recomputed.linear(resid)
    own = read_out(host, resid)
    assert own.eps == host.eps
    scale = float((resid.square().mean() + host.eps).sqrt())
    assert float(own.norm_scale) == pytest.approx(scale, rel=1e-6)
    assert float(own.frozen_at(2 * resid).norm_scale) == pytest.approx(2 * scale, rel=1e-4)
    published = read_out(host, resid, "published")
    assert (published.eps, published.b_U, published.bias) == (1e-6, None, None)
    gpt2 = open_host(bridge_of("gpt2"))
    assert read_out(gpt2, resid, "published").eps == gpt2.eps


# --- whatever the caller chose ---


@pytest.mark.parametrize("chosen", ["highest", "medium"])
def test_products_are_of_full_precision_and_the_callers_choice_is_back_even_after_an_error(chosen):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(chosen)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(RuntimeError, match="on purpose"), full_precision():
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.is_autocast_enabled("cpu")
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
                raise RuntimeError("on purpose")
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)
