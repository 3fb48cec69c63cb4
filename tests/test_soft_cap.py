"""Logits under a soft cap: scores as defined, and a bound that lies above all of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_topk import build, cases

from tl_neuron_attr import InputError, Target, neuron_scores, score_intervals
from tl_neuron_attr.baselines import Tangent
from tl_neuron_attr.decompose import Outlet
from tl_neuron_attr.topk import score_bounds, top_neurons

CAPS = st.sampled_from([0.3, 2.0, 30.0])


def capped(case, cap, contrast, dtype):
    """A read-out under a cap, and blocks that write through a norm of their own."""
    out, blocks, target = build(case, dtype)
    out = replace(out, soft_cap=cap)
    if contrast:
        other = Target((target.id + 1) % case["d_vocab"])
        target = replace(target, against=other)
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    gain = 1 + 0.5 * torch.randn(case["d_model"], generator=generator).to(dtype)
    divisors = torch.rand(3, 1, generator=generator).to(dtype) + 0.5
    blocks = [
        replace(block, outlet=Outlet(gain=gain, divisor=divisors[layer]))
        for layer, block in enumerate(blocks)
    ]
    return out, blocks, target


def by_definition(blocks, out, target):
    """Every score in float64: what is written, read out with it and without."""
    wide = {
        name: getattr(out, name).double() for name in ("W_U", "b_U", "gain", "bias", "norm_scale")
    }

    def says(x):
        x = x - x.mean(-1, keepdim=True) if out.centered else x
        logits = (x / wide["norm_scale"] * wide["gain"] + wide["bias"]) @ wide["W_U"]
        logits = out.soft_cap * torch.tanh((logits + wide["b_U"]) / out.soft_cap)
        if target.against is not None:
            return logits[..., target.id] - logits[..., target.against.id]
        return logits.log_softmax(-1)[..., target.id]

    scores = []
    for block in blocks:
        number = torch.arange(block.n_neurons)
        rows = replace(block, outlet=Outlet()).subvalues(number).double()
        written = rows * block.outlet.gain.double() / block.outlet.divisor.double()
        base = block.base.double()
        added = block.coefficients_of(number).double()[:, None] * written
        scores.append(says(base + added) - says(base))
    return torch.cat(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(cases, CAPS, st.booleans(), st.integers(1, 17))
def test_bounds_are_above_scores_by_definition_and_the_certified_list_is_the_dense_one(
    dtype, case, cap, contrast, top
):
    out, blocks, target = capped(case, cap, contrast, dtype)
    exact = torch.cat([neuron_scores(block, out, target) for block in blocks])
    before = out.baseline(torch.stack([block.base for block in blocks]), target)
    bounds, slack = score_bounds(blocks, out, before)
    wanted = by_definition(blocks, out, target)
    # base logits of hundreds, near the cap's bend, round before anything is added
    rounding = (slack + 1e-4 * cap) * (1.0 if dtype == torch.float32 else 1e-4)
    assert (exact.double() - wanted).abs().max() <= rounding
    assert (bounds >= exact).all()
    assert (bounds.double() >= wanted - rounding).all()
    found = top_neurons(blocks, out, target, top)
    assert found.certificate.holds and found.certificate.applies
    assert not found.certificate.linear
    best = exact.sort(descending=True).values[: len(found)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.score, best, rtol=tolerance, atol=tolerance)


def plain_case():
    case = dict(seed=3, kind="ffn", d_model=16, d_vocab=40, tail=1.0, scale=0.3, centered=False)
    return case


def test_few_are_scored_under_a_cap_as_wide_as_gemmas():
    out, blocks, target = capped({**plain_case(), "tail": 3.0}, 30.0, False, torch.float32)
    blocks = [replace(block, W_out=0.1 * block.W_out) for block in blocks]
    found = top_neurons(blocks, out, target, 5)
    assert found.certificate.evaluated <= 10 < found.certificate.total == 36


def test_without_the_allowance_for_the_cap_the_tangent_is_no_bound():
    """The curvature is real: log p under a cap lies above its tangent somewhere."""
    out, blocks, target = capped(plain_case(), 0.3, False, torch.float64)
    before = out.baseline(torch.stack([block.base for block in blocks]), target)
    exact = by_definition(blocks, out, target)
    assert (score_bounds(blocks, out, before)[0] >= exact).all()
    flat = replace(before.tangent, bend=torch.zeros_like(before.tangent.bend))
    assert isinstance(flat, Tangent)
    bounds, _ = score_bounds(blocks, out, replace(before, tangent=flat))
    assert (bounds < exact).any()


def test_what_a_small_contribution_does_to_a_contrast_rounds_in_proportion_to_it():
    out, blocks, target = capped(plain_case(), 2.0, True, torch.float32)
    tiny = [replace(block, coefficients=1e-6 * block.coefficients) for block in blocks]
    exact = torch.cat([neuron_scores(block, out, target) for block in tiny]).double()
    wanted = by_definition(tiny, out, target)
    assert wanted.abs().max() < 1e-4
    torch.testing.assert_close(exact, wanted, rtol=1e-3, atol=1e-9)


def test_a_cap_far_beyond_all_logits_changes_nothing():
    for contrast in (False, True):
        out, blocks, target = capped(plain_case(), 1e6, contrast, torch.float64)
        plain = replace(out, soft_cap=None)
        for block in blocks:
            torch.testing.assert_close(
                neuron_scores(block, out, target),
                neuron_scores(block, plain, target),
                rtol=0,
                atol=1e-9,
            )


def test_logits_themselves_are_capped():
    out, blocks, _ = capped(plain_case(), 2.0, False, torch.float64)
    plain = replace(out, soft_cap=None).logits(blocks[0].base)
    torch.testing.assert_close(out.logits(blocks[0].base), 2 * torch.tanh(plain / 2))
    assert not out.affine and out.bounded


def test_a_cap_has_no_intervals_and_says_that_the_norm_is_not_why():
    out, blocks, target = capped(plain_case(), 2.0, False, torch.float64)
    with pytest.raises(InputError, match="no intervals where logits pass through a soft cap"):
        score_intervals(blocks, out, target, None)
    with pytest.raises(InputError, match="a recomputed norm has no intervals"):
        score_intervals(blocks, replace(out, norm_scale=None), target, None)
