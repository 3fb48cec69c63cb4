"""Bounds are never below the exact score, and the certified list is the dense one."""

from dataclasses import replace

import pytest
import torch
from conftest import TOKENS, bridge_of
from hypothesis import example, given
from hypothesis import strategies as st

import tl_neuron_attr.topk as topk
from tl_neuron_attr import (
    AttnNeuron,
    FFNNeuron,
    Head,
    InputError,
    NonFiniteError,
    Target,
    attribute,
    neuron_scores,
    parse_neuron,
)
from tl_neuron_attr.decompose import AttnDecomposition, FFNDecomposition, Outlet
from tl_neuron_attr.readout import ReadOut, baseline_of_runs
from tl_neuron_attr.topk import Certificate, score_bounds, top_neurons

TARGET = 7


def random_read_out(generator, d_model, d_vocab, *, scale, centered, dtype=torch.float32):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return ReadOut(
        W_U=scale * randn(d_vocab, d_model).T,
        b_U=randn(d_vocab),
        gain=1 + 0.3 * randn(d_model),
        bias=0.3 * randn(d_model),
        norm_scale=torch.tensor(0.7, dtype=dtype),
        centered=centered,
        eps=1e-5,
        dtype=dtype,
    )


def random_ffns(generator, n_layers, d_model, d_mlp, *, tail, dtype=torch.float32):
    """Coefficients with tails from normal to very heavy, some exactly 0, as ReLU gives."""
    blocks = []
    for layer in range(n_layers):
        normal = torch.randn(d_mlp, generator=generator, dtype=torch.float64)
        coefficients = normal.sign() * normal.abs() ** tail
        coefficients[torch.rand(d_mlp, generator=generator) < 0.2] = 0.0
        blocks.append(
            FFNDecomposition(
                layer=layer,
                base=torch.randn(d_model, generator=generator).to(dtype),
                coefficients=coefficients.to(dtype),
                W_out=torch.randn(d_mlp, d_model, generator=generator).to(dtype),
                b_out=None,
            )
        )
    return blocks


def random_attns(generator, n_layers, d_model, n_pos, *, tail, dtype=torch.float32):
    blocks = []
    for layer in range(n_layers):
        v = torch.randn(n_pos, 2, 3, generator=generator, dtype=torch.float64)
        blocks.append(
            AttnDecomposition(
                layer=layer,
                base=torch.randn(d_model, generator=generator).to(dtype),
                pattern=torch.rand(4, n_pos, generator=generator).softmax(-1).to(dtype),
                v=(v.sign() * v.abs() ** tail).to(dtype),
                W_O=torch.randn(4, 3, d_model, generator=generator).to(dtype),
                b_O=None,
            )
        )
    return blocks


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "kind": st.sampled_from(["ffn", "attn"]),
        "d_model": st.integers(2, 20),
        "d_vocab": st.integers(2, 40),
        "tail": st.sampled_from([1.0, 3.0, 6.0]),  # 6: coefficients of thousands
        "scale": st.sampled_from([0.1, 1.0, 8.0]),  # 8: predictions near one-hot
        "centered": st.booleans(),
    }
)


def build(case, dtype=torch.float32):
    generator = torch.Generator().manual_seed(case["seed"])
    out = random_read_out(
        generator,
        case["d_model"],
        case["d_vocab"],
        scale=case["scale"],
        centered=case["centered"],
        dtype=dtype,
    )
    make = random_ffns if case["kind"] == "ffn" else random_attns
    blocks = make(generator, 3, case["d_model"], 12, tail=case["tail"], dtype=dtype)
    return out, blocks, Target(case["seed"] % case["d_vocab"])


def dense_scores(blocks, out, target):
    return torch.cat([neuron_scores(block, out, target) for block in blocks])


@given(cases)
def test_a_bound_is_never_below_the_exact_score(case):
    out, blocks, target = build(case)
    before = out.baseline(torch.stack([block.base for block in blocks]), target)
    bounds, _ = score_bounds(blocks, out, before)
    exact = dense_scores(blocks, out, target)
    assert (bounds >= exact).all(), (bounds - exact).min()


@given(cases)
def test_in_float64_the_bound_holds_with_a_slack_that_shrinks_with_the_precision(case):
    out, blocks, target = build(case, torch.float64)
    before = out.baseline(torch.stack([block.base for block in blocks]), target)
    bounds, slack = score_bounds(blocks, out, before)
    assert (bounds >= dense_scores(blocks, out, target)).all()
    narrow_out, narrow_blocks, _ = build(case, torch.float32)
    before = narrow_out.baseline(torch.stack([block.base for block in narrow_blocks]), target)
    _, narrow_slack = score_bounds(narrow_blocks, narrow_out, before)
    assert slack < 1e-7 * narrow_slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(cases, st.integers(1, 17), st.sampled_from([2_000, 20_000, 2**30]))
def test_the_certified_list_is_the_dense_one(dtype, case, top, budget):
    out, blocks, target = build(case, dtype)
    out = replace(out, budget=budget)
    found = top_neurons(blocks, out, target, top)
    scores = dense_scores(blocks, out, target)
    order = scores.sort(descending=True, stable=True).indices[:top]
    # contributions of thousands of logits round in proportion: by no more than the slack allows
    before = out.baseline(torch.stack([block.base for block in blocks]), target)
    rounding = max(score_bounds(blocks, out, before)[1], 1e-12)
    assert dtype == torch.float32 or rounding < 1e-6
    assert torch.allclose(found.score, scores[order], atol=rounding, rtol=0)
    # the same neurons, but for those whose scores rounding cannot tell apart
    flat = found.layer * blocks[0].n_neurons + found.number
    assert torch.allclose(scores[flat], scores[order], atol=rounding, rtol=0)
    certificate = found.certificate
    assert certificate.applies and certificate.holds
    assert certificate.kth_score == pytest.approx(found.score[-1].item())
    assert certificate.evaluated <= certificate.total == len(scores)
    coefficients = torch.stack(
        [
            blocks[layer].coefficients_of(number[None])[0]
            for layer, number in zip(found.layer.tolist(), found.number, strict=True)
        ]
    )
    assert torch.equal(found.coefficient, coefficients)


def test_a_broken_bound_loses_neurons_that_the_dense_list_has(monkeypatch):
    """The tests above can fail: with a bound that is no bound, the best are missed."""
    real = topk.bounds_above

    def broken(tangents):
        above, slack = real(tangents)
        return -above.where(above.isfinite(), torch.inf), slack

    monkeypatch.setattr(topk, "bounds_above", broken)
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 8, 30, scale=1.0, centered=True)
    blocks = random_ffns(generator, 3, 8, 200, tail=2.0)
    found = top_neurons(blocks, out, Target(3), 10)
    best = dense_scores(blocks, out, Target(3)).topk(10).values
    assert found.score.sum() < 0.5 * best.sum()


def test_few_neurons_are_scored_beyond_those_asked_for():
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 16, 50, scale=0.3, centered=True)
    blocks = random_ffns(generator, 4, 16, 500, tail=1.0)
    blocks = [replace(block, W_out=0.05 * block.W_out) for block in blocks]
    certificate = top_neurons(blocks, out, Target(3), 100).certificate
    assert certificate.evaluated <= 150
    assert certificate.total == 2000
    assert certificate.next_bound <= certificate.kth_score


def test_neurons_that_are_off_cost_nothing_and_stand_between_the_signs():
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 16, 50, scale=0.3, centered=True)
    blocks = random_ffns(generator, 4, 16, 500, tail=1.0)
    few = [replace(block, coefficients=block.coefficients.clone()) for block in blocks]
    for block in few:  # a ReLU model: nearly all neurons are off
        block.coefficients[20:] = 0.0
    found = top_neurons(few, out, Target(3), 300)
    n_active = sum(int((block.all_coefficients() != 0).sum()) for block in few)
    assert found.certificate.evaluated <= n_active < 100
    dense = dense_scores(few, out, Target(3))
    order = dense.sort(descending=True, stable=True).indices[:300]
    assert torch.equal(found.layer * 500 + found.number, order)
    assert (found.score[-100:] == 0).all()
    assert found.certificate.holds


def test_a_recomputed_norm_has_no_bounds_and_every_neuron_is_scored(tiny_model):
    result = attribute(tiny_model, TOKENS, target=TARGET, top=5, convention="recomputed")
    for ranked in (result.ffn_neurons, result.attn_neurons):
        assert not ranked.certificate.applies
        assert ranked.certificate.evaluated == ranked.certificate.total
        assert ranked.certificate.next_bound is None


def test_ties_stand_in_order_of_layer_and_number():
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 8, 30, scale=1.0, centered=False)
    block = random_ffns(generator, 1, 8, 1, tail=1.0)[0]
    row = block.W_out.expand(40, 8)
    tied = [
        replace(block, layer=layer, coefficients=torch.full((40,), 0.5), W_out=row)
        for layer in (2, 5)
    ]
    found = top_neurons(tied, out, Target(3), 20)
    assert found.layer.tolist() == [2] * 20
    assert found.number.tolist() == list(range(20))


def test_a_neuron_that_is_off_scores_exactly_nothing():
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 8, 30, scale=1.0, centered=True)
    (block,) = random_ffns(generator, 1, 8, 50, tail=1.0)
    off = block.coefficients == 0
    assert off.any()
    assert (neuron_scores(block, out, Target(3))[off] == 0).all()


def test_certified_and_dense_agree_on_a_whole_model(any_model):
    certified = attribute(any_model, TOKENS, target=TARGET, top=15)
    dense = attribute(any_model, TOKENS, target=TARGET, top=10_000)
    for kind in ("ffn", "attn"):
        assert getattr(certified, f"{kind}_neurons").certificate.evaluated < 200
        found, wanted = certified.neurons(kind), dense.neurons(kind).head(15)
        assert found["score"].to_numpy() == pytest.approx(wanted["score"].to_numpy(), abs=1e-5)
        merged = found.merge(wanted, on=["layer", "head", "index", "source_pos"])
        assert len(merged) == 15


def test_ranked_neurons_are_values_with_labels_that_read_back(tiny_model):
    result = attribute(tiny_model, TOKENS, target=TARGET, top=4)
    ffn, attn = result.ffn_neurons.neurons(), result.attn_neurons.neurons()
    first = result.neurons("attn").iloc[0]
    assert isinstance(ffn[0], FFNNeuron)
    places = ("layer", "head", "index", "source_pos")
    assert attn[0] == AttnNeuron(*(int(first[name]) for name in places))
    for neuron in (*ffn, *attn, AttnNeuron(1, 2, 3)):
        assert parse_neuron(str(neuron)) == neuron
    assert str(AttnNeuron(9, 3, 17, 5)) == "L9.H3.D17@5"
    for label in ("L9", "L9.N", "L1.H2", "9_1234", "L1.H2.D3@", ""):
        with pytest.raises(ValueError, match="must look like"):
            parse_neuron(label)
    assert Head.parse(str(Head(9, 3))) == Head(9, 3)
    assert str(Head(9, 3)) == "L9.H3"
    for label in ("L9", "L9.H3.D1", "L9.H", ""):
        with pytest.raises(ValueError, match="must look like"):
            Head.parse(label)


def test_bfloat16_weights_are_bounded_in_float32():
    result = attribute(bridge_of("llama", dtype=torch.bfloat16), TOKENS, target=TARGET, top=10)
    dense = attribute(bridge_of("llama", dtype=torch.bfloat16), TOKENS, target=TARGET, top=10_000)
    for kind in ("ffn", "attn"):
        found = result.neurons(kind)["score"].to_numpy()
        assert found == pytest.approx(dense.neurons(kind).head(10)["score"].to_numpy(), abs=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e4])
def test_a_bound_holds_where_the_rivals_cancel_out_of_the_gradient(size):
    """Three rivals at 1/3 each, their unembeddings summing to nothing, contributions across them.

    The gradient is then small while the exact score still rounds with the rivals' size.
    """
    generator = torch.Generator().manual_seed(0)
    d_model = 64
    rivals = size * torch.randn(2, d_model, generator=generator)
    target = torch.randn(1, d_model, generator=generator)
    W_U = torch.cat([target, rivals, -rivals.sum(0, keepdim=True)]).T.contiguous()
    across = torch.linalg.qr(W_U[:, 1:3])[0]
    contributions = 8 * torch.randn(2000, d_model, generator=generator) / d_model**0.5
    contributions -= contributions @ across @ across.T
    out = ReadOut(
        W_U=W_U,
        b_U=torch.tensor([-20.0, 0.0, 0.0, 0.0]),
        gain=None,
        bias=None,
        norm_scale=torch.tensor(1.0),
        centered=False,
        eps=1e-5,
        dtype=torch.float32,
    )
    block = FFNDecomposition(
        layer=0,
        base=torch.zeros(d_model),
        coefficients=torch.ones(2000),
        W_out=contributions,
        b_out=None,
    )
    before = out.baseline(block.base[None], Target(0))
    assert before.log_probs[0, 1:].exp() == pytest.approx([1 / 3] * 3, abs=1e-3)
    bounds, _ = score_bounds([block], out, before)
    assert (bounds >= neuron_scores(block, out, Target(0))).all()


@pytest.mark.parametrize(
    ("lowest", "kth", "next_bound", "holds"),
    [
        (False, 0.5, None, True),
        (False, 0.5, 0.5, True),
        (False, 0.5, 0.6, False),
        (True, -0.5, -0.5, True),
        (True, -0.5, -0.6, False),
        (True, -0.5, -0.4, True),
    ],
)
def test_a_certificate_holds_where_no_bound_passes_the_last_score(lowest, kth, next_bound, holds):
    certificate = Certificate(
        applies=True,
        linear=False,
        evaluated=1,
        total=9,
        kth_score=kth,
        next_bound=next_bound,
        slack=0.0,
        lowest=lowest,
    )
    assert certificate.holds is holds


def test_the_certificate_names_the_largest_bound_left_and_the_largest_slack():
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 16, 50, scale=0.3, centered=True)
    blocks = random_ffns(generator, 3, 16, 300, tail=1.0)
    before = out.baseline(torch.stack([block.base for block in blocks]), Target(3))
    bounds, slack = score_bounds(blocks, out, before)
    found = top_neurons(blocks, out, Target(3), 2)
    active = torch.cat([block.all_coefficients() != 0 for block in blocks])
    left = bounds[active].sort(descending=True).values[found.certificate.evaluated :]
    assert found.certificate.next_bound == pytest.approx(left[0].item())
    assert found.certificate.slack == pytest.approx(slack)


def test_a_contribution_that_overflows_is_an_error_not_a_shorter_list():
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 16, 50, scale=0.3, centered=True)
    blocks = random_ffns(generator, 2, 16, 200, tail=1.0)
    blocks[1].coefficients[7] = 3e38
    with pytest.raises(NonFiniteError, match="too large"):
        top_neurons(blocks, out, Target(3), 10)
    with pytest.raises(NonFiniteError, match="too large"):
        neuron_scores(blocks[1], out, Target(3))


def test_reach_and_gradient_do_not_depend_on_the_blocks_of_the_vocabulary(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 16, 50, scale=3.0, centered=True, dtype=torch.float64)
    (block,) = random_ffns(generator, 1, 16, 5, tail=1.0, dtype=torch.float64)
    probs = out.logits(block.base[None]).softmax(-1)[0]
    norms = (out.gain[:, None] * out.W_U).norm(dim=0) / out.norm_scale
    wanted = (norms[3] + probs @ norms).item()
    for columns in (4, 7, 1024):
        monkeypatch.setattr("tl_neuron_attr.readout._SURVEY_COLUMNS", columns)
        tangent = out.baseline(block.base[None], Target(3)).tangent
        assert tangent.reach.item() == pytest.approx(wanted, rel=1e-12)


def test_tokens_that_cannot_come_do_not_spoil_a_survey(monkeypatch):
    monkeypatch.setattr("tl_neuron_attr.readout._SURVEY_COLUMNS", 4)
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 16, 50, scale=1.0, centered=True)
    out.b_U[:6] = -torch.inf
    base = torch.randn(1, 16, generator=generator)
    found = out.baseline(base, Target(9))
    assert found.log_prob.item() == pytest.approx(out.log_prob(base, Target(9)).item(), abs=1e-5)
    assert found.tangent.gradient.isfinite().all()


def test_neurons_that_are_off_cost_no_memory_that_stays():
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 8, 30, scale=1.0, centered=True)
    blocks = [
        replace(block, coefficients=block.coefficients * (torch.arange(200) < 3))
        for block in random_ffns(generator, 3, 8, 200, tail=2.0)
    ]
    kept = []
    real = topk._Race.start

    def start(race, off, slack):
        kept.append(off)
        real(race, off, slack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk._Race, "start", start)
        found = top_neurons(blocks, out, Target(3), 20)
    (off,) = kept
    assert len(off) == 20 and off.untyped_storage().nbytes() == 20 * 8
    dense = dense_scores(blocks, out, Target(3)).topk(20).values
    assert found.score.tolist() == pytest.approx(dense.tolist(), abs=1e-6)


# --- the pieces, by their definitions ---------------------------------------------------------


@given(
    st.lists(st.integers(-3, 3), max_size=40),
    st.integers(1, 45),
)
@example([1] * 30 + [2, 2], 3)
@example([1, 2, 3, 2, 2, 2, 1, 1, 1, 1], 2)
def test_the_largest_are_those_a_stable_sort_lists_first(values, k):
    values = torch.tensor(values, dtype=torch.float32)
    wanted = values.sort(descending=True, stable=True).indices[:k]
    assert topk.largest(values, k).tolist() == wanted.tolist()


def several_runs(kind, seed=0):
    """Two runs of one model: other bases and coefficients, an outlet of their own, one target."""
    runs, outs = [], []
    for run in range(2):
        case = dict(seed=seed, kind=kind, d_model=8, d_vocab=30, tail=2.0, scale=0.5)
        out, blocks, _ = build({**case, "centered": True}, torch.float64)
        generator = torch.Generator().manual_seed(100 + run)
        gain = 1 + 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(5)).double()
        changed = []
        for block in blocks:
            divisor = 0.5 + torch.rand(1, generator=generator, dtype=torch.float64)
            base = torch.randn(8, generator=generator, dtype=torch.float64)
            block = replace(block, base=base, outlet=Outlet(gain=gain, divisor=divisor))
            if kind == "ffn" and run == 1:
                block = replace(block, coefficients=block.coefficients.flip(0))
            if kind == "attn" and run == 1:
                block = replace(block, pattern=block.pattern.flip(1))
            changed.append(block)
        runs.append(changed)
        outs.append(replace(out, norm_scale=out.norm_scale * (1 + run)))
    return runs, outs


def bases_of(runs, outs, target):
    resids = [torch.stack([block.base for block in blocks]) for blocks in runs]
    return baseline_of_runs(outs, resids, range(len(runs)), [target] * len(runs))


@pytest.mark.parametrize("kind", ["ffn", "attn"])
@pytest.mark.parametrize("ids", [(3,), (3, 9, 11), (9, 11, 3), (11, 3, 9)])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_tangents_slope_and_allowances_are_their_definitions(kind, ids, soft_cap):
    runs, outs = several_runs(kind)
    outs = [replace(out, soft_cap=soft_cap) for out in outs]
    also = tuple(Target(each) for each in ids[1:])
    before = bases_of(runs, outs, Target(ids[0], also=also))
    found = topk.tangent_bounds(runs, outs[0], before)
    eps = torch.finfo(torch.float64).eps
    answers = before.tangent.answers if also else (before.tangent,)
    for run, blocks in enumerate(runs):
        for layer, block in enumerate(blocks):
            base, bound = 3 * run + layer, found[run][layer]
            assert bound.block is block
            rows = block.outlet(block.rows())
            norms = rows.norm(dim=1)
            slopes = torch.stack([rows @ each.gradient[base] for each in answers])
            gradient = before.tangent.gradient[base]
            torch.testing.assert_close(bound.slope, rows @ gradient, rtol=1e-9, atol=1e-12)
            reach = max(float(each.reach[base]) for each in answers)
            slack = 8 * 8**0.5 * eps * reach * norms
            torch.testing.assert_close(bound.slack, slack, rtol=1e-9, atol=0)
            assert bound.constant == (2 if also else 1) * 32 * eps
            if soft_cap is None:
                assert bound.bend is None
            else:
                bend = max(float(each.bend[base]) for each in answers) * norms.square()
                torch.testing.assert_close(bound.bend, bend, rtol=1e-9, atol=0)
            coefficients = block.all_coefficients()
            rises = coefficients * block.of_each(slopes)
            rise = rises[0]
            if also:
                rise = (rises + before.log_share[base][:, None]).logsumexp(0)
            torch.testing.assert_close(bound.rise(coefficients), rise, rtol=1e-9, atol=1e-12)
            above, largest_slack = bound.above()
            allowed = block.of_each(slack) * coefficients.abs() + bound.constant
            wanted = rise + allowed
            if soft_cap is not None:
                wanted = wanted + block.of_each(bend) * coefficients.square()
            on = coefficients != 0
            torch.testing.assert_close(above[on], wanted[on], rtol=1e-9, atol=1e-14)
            assert above[~on].isneginf().all()
            assert float(largest_slack) == pytest.approx(float(allowed.max()), rel=1e-9)


@pytest.mark.parametrize("kind", ["ffn", "attn"])
@pytest.mark.parametrize("worth", [0, 10**6])
@pytest.mark.parametrize("rows", [1, 5, 512])
def test_neurons_scored_together_score_as_dense(kind, worth, rows, monkeypatch):
    """By passes over all layers or a pass a layer, of several runs, in any order."""
    runs, outs = several_runs(kind)
    before = bases_of(runs, outs, Target(3))
    wanted = [dense_scores(blocks, out, Target(3)) for blocks, out in zip(runs, outs, strict=True)]
    generator = torch.Generator().manual_seed(0)
    flats = [torch.randperm(len(each), generator=generator)[:50] for each in wanted]
    monkeypatch.setattr(topk, "_WORTH_A_PASS", worth)
    monkeypatch.setattr(ReadOut, "rows_per_block", property(lambda out: rows))
    found = topk._exact(runs, flats, outs[0], before).split(list(map(len, flats)))
    for ours, theirs, flat in zip(found, wanted, flats, strict=True):
        torch.testing.assert_close(ours, theirs[flat], rtol=1e-9, atol=1e-12)
    for run, each in enumerate(topk.top_neurons_of_runs(runs, outs[0], before, 7)):
        order = wanted[run].sort(descending=True, stable=True).indices[:7]
        n_neurons = runs[run][0].n_neurons
        assert torch.equal(each.layer * n_neurons + each.number, order)
        torch.testing.assert_close(each.score, wanted[run][order], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            each.coefficient, topk.coefficients_at(runs[run], order), rtol=0, atol=0
        )
        rows_of = torch.stack(
            [
                runs[run][layer].subvalues(number[None])[0]
                for layer, number in zip(each.layer.tolist(), each.number, strict=True)
            ]
        )
        assert torch.equal(topk.subvalues_of(runs[run], each), rows_of)


def test_a_search_tells_its_progress_and_counts_what_it_scored():
    generator = torch.Generator().manual_seed(0)
    out = random_read_out(generator, 16, 50, scale=0.3, centered=True)
    blocks = random_ffns(generator, 4, 16, 500, tail=3.0)
    for options in ({}, {"against": Target(4)}):
        told = []
        found = top_neurons(blocks, out, Target(3, **options), 20, progress=told.append)
        active = sum(int((block.coefficients != 0).sum()) for block in blocks)
        assert found.certificate.total == 2000 and found.certificate.linear == bool(options)
        assert found.certificate.evaluated == (active if options else sum(told))
        if options:
            assert (found.certificate.slack, found.certificate.next_bound) == (0.0, None)
            dense = dense_scores(blocks, out, Target(3, **options))
            assert found.score.tolist() == pytest.approx(dense.topk(20).values.tolist(), rel=1e-5)
            assert found.certificate.kth_score == float(found.score[-1])
    told = []
    recomputed = replace(out, norm_scale=None)
    found = top_neurons(blocks, recomputed, Target(3), 20, progress=told.append)
    assert sum(told) == 2000 and found.certificate.evaluated == active
    dense = dense_scores(blocks, recomputed, Target(3))
    assert found.certificate.kth_score == float(dense.topk(20).values[-1])


@pytest.mark.parametrize("shuffled", [False, True])
def test_bounds_that_say_nothing_leave_nothing_out(shuffled):
    """All are scored then, round after round, and the best are the best."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 300, generator=generator)
    blocks = random_ffns(generator, 2, 4, 300, tail=1.0)
    asked = []

    def bounds_of(place):
        loose = torch.full((300,), 9.0)
        if shuffled:  # right, but far: the order of bounds is none of scores
            loose = 9.0 + torch.rand(300, generator=torch.Generator().manual_seed(place))
        return topk.bounds_of_one_run(lambda: (loose.clone(), torch.tensor(0.5)))

    def scores_of(flats):
        asked.extend(flats[0].tolist())
        return scores.flatten()[flats[0]]

    (found,) = topk.best_by_bound_of([blocks], [bounds_of(0), bounds_of(1)], scores_of, 3)
    assert sorted(asked) == list(range(600)) and found.certificate.evaluated == 600
    best = scores.flatten().topk(3)
    assert torch.equal(found.layer * 300 + found.number, best.indices)
    assert torch.equal(found.score, best.values)
    assert found.certificate.next_bound is None and found.certificate.slack == 0.5


def test_some_of_a_list_are_a_list_of_their_own(tiny_gpt2):
    result = attribute(tiny_gpt2, TOKENS, target=TARGET, top=6)
    for ranked in (result.ffn_neurons, result.attn_neurons):
        assert ranked.first(2).neurons() == ranked.neurons()[:2]
        assert len(ranked.first(100)) == 6
        some = ranked.at(torch.tensor([4, 1]))
        assert some.neurons() == [ranked.neurons()[4], ranked.neurons()[1]]
        assert torch.equal(some.score, ranked.score[[4, 1]])
    attn = result.attn_neurons
    summed = replace(attn, source_pos=None).neurons()
    assert [each.source_pos for each in summed] == [None] * 6
    assert [each.head for each in summed] == attn.head.tolist()
    with pytest.raises(InputError, match="at least 1"):
        top_neurons(result.ffns, result.out, Target(TARGET), 0)
    with pytest.raises(InputError, match="no decompositions"):
        top_neurons([], result.out, Target(TARGET), 3)
    recomputed = replace(result.out, norm_scale=None)
    before = recomputed.baseline(result.captured.resid_mid, Target(TARGET))
    with pytest.raises(InputError, match="no bounds"):
        score_bounds(result.ffns, recomputed, before)
