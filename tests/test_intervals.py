"""An interval contains the exact score, whatever the stage; what is lowest is what dense lists."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import TOKENS, bridge_of
from hypothesis import given
from hypothesis import strategies as st
from test_topk import random_attns, random_ffns

import tl_neuron_attr.intervals as intervals_module
from tl_neuron_attr import (
    InputError,
    Target,
    attn_decomposition,
    capture,
    ffn_decomposition,
    neuron_scores,
    open_host,
    projection_index,
    read_out,
    tokenize,
)
from tl_neuron_attr.index import ProjectionIndex, Projections, _projected, _Survey
from tl_neuron_attr.intervals import Intervals, score_intervals, suppressing_neurons
from tl_neuron_attr.prompts import Prompt
from tl_neuron_attr.readout import ReadOut
from tl_neuron_attr.topk import tangent_bounds

# --- the definition, in more digits than either dtype -----------------------------------------


def wide(tensor):
    return tensor.double().numpy().astype(np.longdouble)


def true_scores(blocks, out, target):
    """log p(target | base + u) - log p(target | base) of every neuron, in 80-bit arithmetic."""

    def centred(vectors):
        return vectors - vectors.mean(-1, keepdims=True) if out.centered else vectors

    gain, scale, W_U = wide(out.gain), np.longdouble(out.norm_scale.item()), wide(out.W_U)
    layers = []
    for block in blocks:
        z = (centred(wide(block.base)) / scale * gain + wide(out.bias)) @ W_U + wide(out.b_U)
        z -= z.max()
        log_p = z - np.log(np.exp(z).sum())
        projections = (centred(wide(block.rows())) / scale * gain) @ W_U
        row = block.of_each(torch.arange(len(projections))).numpy()
        coefficients = wide(block.all_coefficients())
        delta = coefficients[:, None] * projections[row]
        after = log_p + delta
        largest = after.max(1)
        log_total = largest + np.log(np.exp(after - largest[:, None]).sum(1))
        scores = delta[:, target.id] - log_total
        layers.append(np.where(coefficients == 0, np.longdouble(0), scores))
    return np.stack(layers)


def index_of(blocks, out):
    """The projection index of these blocks' weights, whichever kind they are."""
    dtype = torch.promote_types(out.W_U.dtype, torch.float32)
    ones = torch.ones((), dtype=dtype)
    W_U = out.W_U.to(dtype)
    survey = _Survey(
        out=replace(out, b_U=None, bias=None, norm_scale=ones, dtype=dtype, budget=2**30),
        mean_column=W_U.mean(1),
        widest=float(W_U.norm(dim=0).max()),
    )
    parts = [_projected(survey, block.rows(), 1) for block in blocks]
    stacked = Projections(
        **{name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    )
    return ProjectionIndex(
        weights_sha256="",
        d_vocab=W_U.shape[1],
        widest=survey.widest,
        ffn=stacked,
        attn=stacked,
    )


# --- random and adversarial cases -------------------------------------------------------------

cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "kind": st.sampled_from(["ffn", "attn"]),
        "shape": st.sampled_from(["plain", "common", "rare", "two", "sizes", "rivals"]),
        "d_model": st.sampled_from([2, 3, 8, 20, 64]),
        "d_vocab": st.sampled_from([2, 3, 7, 40, 300]),
        "tail": st.sampled_from([1.0, 3.0, 6.0]),  # 6: coefficients of thousands
        "scale": st.sampled_from([0.1, 1.0, 8.0]),  # 8: predictions near one-hot
        "bias": st.sampled_from([0.0, 1.0, 5.0]),
        "norm_scale": st.sampled_from([0.01, 0.7, 40.0]),
        "rows": st.sampled_from([1.0, 0.05, 0.005]),
        "base": st.sampled_from([0.0, 1.0, 10.0]),
        "mean": st.sampled_from([0.0, 100.0, 1e4]),  # of the base: centring takes it away
        "centered": st.booleans(),
    }
)


PLAIN = {
    "seed": 1,
    "kind": "ffn",
    "shape": "plain",
    "d_model": 20,
    "d_vocab": 300,
    "tail": 1.0,
    "scale": 1.0,
    "bias": 0.0,
    "norm_scale": 1.0,
    "rows": 0.05,
    "base": 0.0,
    "mean": 0.0,
    "centered": True,
}


def build(case, dtype):
    generator = torch.Generator().manual_seed(case["seed"])
    d_model, d_vocab, shape = case["d_model"], case["d_vocab"], case["shape"]

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    W_U = case["scale"] * randn(d_vocab, d_model)
    b_U = case["bias"] * randn(d_vocab)
    if shape == "common":  # what all tokens share is far larger than what tells them apart
        W_U += 30 * randn(1, d_model)
    if shape == "rare":  # a hopeless token that some neurons make the likeliest of all
        W_U[-1] *= 10
        b_U[-1] -= 20
    if shape == "two":  # projections have two values: the range is all there is to know
        W_U = W_U[torch.randint(0, 2, (d_vocab,), generator=generator)]
    if shape == "rivals":  # likely tokens cancel out of the gradient
        half = d_vocab // 2
        W_U[half : 2 * half] = -W_U[:half]
        b_U[-1] = -20
    out = ReadOut(
        W_U=W_U.to(dtype).T,
        b_U=b_U.to(dtype),
        gain=(1 + 0.3 * randn(d_model)).to(dtype),
        bias=(0.3 * randn(d_model)).to(dtype),
        norm_scale=torch.tensor(case["norm_scale"], dtype=dtype),
        centered=case["centered"],
        eps=1e-5,
        dtype=dtype,
    )
    make = random_ffns if case["kind"] == "ffn" else random_attns
    size = 24 if case["kind"] == "ffn" else 4
    blocks = []
    for block in make(generator, 2, d_model, size, tail=case["tail"], dtype=dtype):
        rows = case["rows"] * block.rows().double()
        if shape == "rare":
            rows[::3] = 0.3 * W_U[-1]
        if shape == "rivals":
            rows[::2] = 0.5 * W_U[0]
        if shape == "sizes":
            rows *= 10.0 ** torch.randint(-12, 5, (len(rows), 1), generator=generator)
            rows[0] = 0
        block = replace(block, base=case["base"] * block.base + case["mean"] * case["centered"])
        if case["kind"] == "attn":
            blocks.append(replace(block, W_O=rows.view(4, 3, d_model).to(dtype)))
            continue
        coefficients = block.coefficients
        if shape == "sizes":
            powers = torch.randint(-10, 8, coefficients.shape, generator=generator)
            coefficients = coefficients * (10.0**powers).to(dtype)
        blocks.append(replace(block, W_out=rows.to(dtype), coefficients=coefficients))
    return out, blocks, Target(case["seed"] % d_vocab)


def assert_contains(found, exact):
    lower, upper = wide(found.lower), wide(found.upper)
    assert np.isfinite(lower).all() and np.isfinite(upper).all()
    assert (lower <= exact).all(), float((exact - lower).min())
    assert (exact <= upper).all(), float((upper - exact).min())


STAGES = {
    "1": {"tolerance": math.inf},
    "2": {"tolerance": 0.0, "evaluate": False},
    "3": {"tolerance": 0.0},
    "all": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stage", STAGES)
@given(cases, st.sampled_from([None, 1, 5, 30]))
def test_an_interval_contains_the_exact_score(dtype, stage, case, likely):
    out, blocks, target = build(case, dtype)
    found = score_intervals(
        blocks, out, target, index_of(blocks, out), likely=likely, **STAGES[stage]
    )
    assert_contains(found, true_scores(blocks, out, target))
    n_active = sum(int((block.all_coefficients() != 0).sum()) for block in blocks)
    off = torch.stack([block.all_coefficients() for block in blocks]) == 0
    assert (found.width[off] == 0).all() and (found.lower[off] == 0).all()
    assert found.exact[off].all()
    assert found.evaluated + int(off.sum()) == int(found.exact.sum())
    counts = found.refined, found.evaluated
    assert {
        "1": counts == (0, 0),
        "2": counts == (n_active, 0),
        "3": counts == (n_active, n_active),
        "all": counts <= (n_active, n_active),
    }[stage]
    if stage == "all":
        assert (found.exact | (found.width <= found.tolerance)).all()


@given(cases, st.sampled_from([1_000, 20_000]))
def test_a_small_budget_gives_other_stages_and_no_wrong_interval(case, budget):
    out, blocks, target = build(case, torch.float32)
    index = index_of(blocks, out)
    out = replace(out, budget=budget + 16 * case["d_vocab"] + 32 * case["d_model"])
    assert_contains(score_intervals(blocks, out, target, index), true_scores(blocks, out, target))


@pytest.mark.parametrize("seed", range(16))
def test_each_look_at_more_tokens_tells_more_of_moderate_neurons(seed):
    """In float64, where next to nothing is slack: the mathematics alone."""
    case = {
        **PLAIN,
        "seed": seed,
        "kind": ("ffn", "attn")[seed % 2],
        "d_vocab": 3000,
        "rows": (0.05, 0.005)[seed // 2 % 2],
        "base": (0.0, 1.0)[seed // 4 % 2],
        "bias": (0.0, 2.0)[seed // 8 % 2],
    }
    out, blocks, target = build(case, torch.float64)
    index, exact = index_of(blocks, out), true_scores(blocks, out, target)
    widths = []
    for likely in (0, 10, 100, 1000):
        found = score_intervals(
            blocks, out, target, index, tolerance=0.0, evaluate=False, likely=likely
        )
        assert_contains(found, exact)
        widths.append(float(found.width.mean()))
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.2 * widths[0]


def two_valued_case(dtype=torch.float64):
    """Tokens of two directions only: projections have two values."""
    return build({**PLAIN, "shape": "two", "d_vocab": 40, "rows": 0.1, "base": 1.0}, dtype)


def test_the_range_alone_is_tight_for_projections_of_two_values():
    out, blocks, target = two_valued_case()
    found = score_intervals(blocks, out, target, index_of(blocks, out), tolerance=math.inf)
    assert np.abs(wide(found.lower) - true_scores(blocks, out, target)).max() < 1e-4


def flat_case(dtype=torch.float64):
    """Every token as likely as every other, and neurons that stage 1 says little of."""
    out, blocks, target = build(PLAIN, dtype)
    return replace(out, bias=torch.zeros_like(out.bias)), blocks, target


def halved_range(monkeypatch, index):
    half = {"low": 0.5 * index.ffn.low, "high": 0.5 * index.ffn.high}
    return replace(index, ffn=replace(index.ffn, **half)), {"tolerance": math.inf}


def tenth_of_the_fourth_moment(monkeypatch, index):
    fourth = 0.1**0.25 * index.ffn.spread4
    second = 10 * index.ffn.spread  # so that the fourth is what decides
    return replace(index, ffn=replace(index.ffn, spread4=fourth, spread=second)), {"likely": 1}


def tenth_of_the_second_moment(monkeypatch, index):
    return replace(index, ffn=replace(index.ffn, spread=0.1**0.5 * index.ffn.spread)), {"likely": 1}


def other_mean(monkeypatch, index):
    return replace(index, ffn=replace(index.ffn, mean=index.ffn.mean + 1)), {"likely": 1}


def no_rest(monkeypatch, index):
    real = intervals_module._likely

    def broken(*arguments):
        found = real(*arguments)
        return replace(found, rest_second=torch.zeros_like(found.rest_second))

    monkeypatch.setattr(intervals_module, "_likely", broken)
    return index, {"likely": 30}


def flatter_curve(monkeypatch, index):
    real = intervals_module._curve
    monkeypatch.setattr(intervals_module, "_curve", lambda y: 0.5 * real(y))
    return index, {"tolerance": math.inf}


def no_series(monkeypatch, index):
    real = intervals_module._likely

    def broken(*arguments):
        found = real(*arguments)
        return replace(found, second=0.5 * found.second)

    monkeypatch.setattr(intervals_module, "_likely", broken)
    return index, {"likely": 290}


@pytest.mark.parametrize(
    ("case", "break_it"),
    [
        (two_valued_case, halved_range),
        (flat_case, tenth_of_the_fourth_moment),
        (flat_case, tenth_of_the_second_moment),
        (flat_case, other_mean),
        (flat_case, no_rest),
        (two_valued_case, flatter_curve),
        (flat_case, no_series),
    ],
)
def test_a_broken_bound_is_noticed(case, break_it, monkeypatch):
    """The tests above can fail: with a bound that is none, scores fall out of their intervals."""
    out, blocks, target = case()
    exact, index = true_scores(blocks, out, target), index_of(blocks, out)
    broken, asked = break_it(monkeypatch, index)
    asked = {"tolerance": 0.0, "evaluate": False, **asked}
    with pytest.raises(AssertionError):
        assert_contains(score_intervals(blocks, out, target, broken, **asked), exact)
    monkeypatch.undo()
    assert_contains(score_intervals(blocks, out, target, index, **asked), exact)


def test_what_rounds_shrinks_with_the_precision():
    widths = {}
    for dtype in (torch.float32, torch.float64):
        out, blocks, target = flat_case(dtype)
        found = score_intervals(blocks, out, target, index_of(blocks, out), tolerance=0.0)
        widths[dtype] = float(found.width.max())
    assert 0 < widths[torch.float64] < 1e-7 * widths[torch.float32] < 1e-11


def test_no_more_is_scored_than_is_wide():
    out, blocks, target = flat_case(torch.float32)
    index = index_of(blocks, out)
    told = []
    found = score_intervals(blocks, out, target, index, progress=told.append, likely=100)
    n_neurons = found.lower.numel()
    assert 0 < found.evaluated < found.refined < n_neurons
    assert sum(told) == found.evaluated
    loose = score_intervals(blocks, out, target, index, tolerance=0.1, likely=100)
    assert loose.evaluated < found.evaluated
    assert (loose.width.max() > found.width.max()).item()
    unasked = score_intervals(blocks, out, target, index, evaluate=False, likely=100)
    assert unasked.evaluated == 0 and unasked.refined == found.refined
    settled = ~found.exact
    assert torch.equal(unasked.lower[settled], found.lower[settled])


# --- the pieces, by their definitions ---------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_the_curve_is_what_is_left_of_the_exponential_behind_its_tangent(dtype, tolerance):
    y = torch.cat([torch.linspace(-30, 30, 601), torch.linspace(-0.3, 0.3, 601)]).to(dtype)
    y = y[y.abs() > 1e-3]
    exact = (np.expm1(wide(y)) - wide(y)) / wide(y) ** 2
    assert np.allclose(wide(intervals_module._curve(y)), exact, rtol=tolerance, atol=0)
    assert intervals_module._curve(torch.zeros(1, dtype=dtype)).item() == 0.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_gap_of_a_range_is_that_of_two_values_at_its_ends(dtype, tolerance):
    ends = torch.tensor([0.01, 0.3, 2.0, 29.9, 30.0, 30.1, 80.0, 900.0], dtype=dtype)
    below, above = torch.cartesian_prod(ends, ends).unbind(1)
    a, b = wide(below), wide(above)
    exact = np.log((b * np.exp(-a) + a * np.exp(b)) / (a + b))
    found = wide(intervals_module._range_gap(below, above))
    steep = b >= 30
    assert np.allclose(found[~steep], exact[~steep], rtol=tolerance, atol=0)
    # what cancels there is allowed for
    allowed = torch.finfo(dtype).eps * (a + b)[steep]
    assert (found[steep] - exact[steep] >= 2 * allowed).all()
    assert (found[steep] - exact[steep] <= 14 * allowed).all()
    nothing = torch.zeros(3, dtype=dtype), torch.tensor([0.0, 1.0, 50.0], dtype=dtype)
    assert intervals_module._range_gap(*nothing)[:2].tolist() == [0.0, 0.0]


def test_powers_about_another_mean_come_from_those_about_the_first():
    generator = torch.Generator().manual_seed(0)
    Y = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    shift = torch.randn(7, generator=generator, dtype=torch.float64)
    sums = torch.stack([Y.pow(power).sum(1) for power in (1, 2, 3, 4)])
    for power in (2, 4):
        apart = Y - shift[:, None]
        total, cancelled = intervals_module._powers(sums, shift, 5, power)
        assert torch.allclose(total, apart.pow(power).sum(1), rtol=1e-12)
        size = Y.norm(p=power, dim=1) + shift.abs() * 5 ** (1 / power)
        assert torch.allclose(cancelled, size.pow(power), rtol=1e-12)
        off = torch.full_like(shift, 0.01)
        # the norm falls by no more than that of the errors, and by what rounds
        wanted = (apart.norm(p=power, dim=1) - 5 ** (1 / power) * off).pow(power)
        least = intervals_module._at_least((total, cancelled), 5, power, off, 0.0)
        assert torch.allclose(least, wanted, rtol=1e-12)
        least = intervals_module._at_least((total, cancelled), 5, power, off, 1e-6)
        norm = (total - 64e-6 * cancelled).pow(1 / power)
        assert torch.allclose(least, (norm - 5 ** (1 / power) * off).pow(power), rtol=1e-12)
        gone = intervals_module._at_least((total, cancelled), 5, power, 100 * off + 10, 1e-6)
        assert (gone == 0).all()


@dataclass
class Stage2:
    """A look at the likeliest tokens, and what it should have seen: in 80-bit arithmetic."""

    case: dict
    likely: int

    def __post_init__(self):
        self.out, self.blocks, target = build(self.case, torch.float64)
        self.before = self.out.baseline(torch.stack([b.base for b in self.blocks]), target)
        index = index_of(self.blocks, self.out)
        self.spread = intervals_module._spreads(self.blocks, self.out, self.before, index)[1]
        self.subvalue = torch.arange(len(self.spread.slope))
        self.found = intervals_module._likely(
            self.spread, self.out, self.before, self.subvalue, self.likely
        )
        self.p = wide(self.before.log_probs[1].exp())
        linear = self.out.linear(self.spread.block.rows())
        self.delta = wide(linear) @ wide(self.out.W_U)
        self.Y = self.delta - (self.delta @ self.p)[:, None]
        chosen = np.argsort(-self.p, kind="stable")[: self.likely]
        self.chosen = np.isin(np.arange(len(self.p)), chosen)


STAGE_2 = [
    Stage2({**PLAIN, "base": base, "kind": kind, "norm_scale": scale}, likely)
    for base, kind, scale, likely in [
        (0.0, "ffn", 1.0, 30),
        (1.0, "attn", 0.7, 60),
        (1.0, "ffn", 2.0, 120),
    ]
]


@pytest.mark.parametrize("off", [0.0, 3e-3])
@pytest.mark.parametrize("look", STAGE_2)
def test_likely_tokens_are_summed_and_the_others_bounded_by_what_the_index_knows(look, off):
    """``off``: by how much the expected change may be off, in units of the largest change."""
    spread, Y, likely = look.spread, look.Y, look.likely
    assert np.allclose(wide(spread.below), -Y.min(1), rtol=1e-4)
    assert np.allclose(wide(spread.above), Y.max(1), rtol=1e-4)
    size = np.maximum(wide(spread.below), wide(spread.above))
    if off:
        spread = replace(spread, slack=off * torch.tensor(size.astype(float)))
    found = intervals_module._likely(spread, look.out, look.before, look.subvalue, likely)
    assert np.allclose(wide(found.size), size, rtol=1e-12)
    Y, p, some = Y / size[:, None], look.p, look.chosen
    for power, ours in ((2, found.second), (3, found.third), (4, found.fourth)):
        assert np.allclose(wide(ours), Y[:, some] ** power @ p[some], rtol=1e-9, atol=1e-12)
    rest = p[~some]
    assert np.allclose(wide(found.rest_first), Y[:, ~some] @ rest, rtol=1e-6, atol=1e-10)
    assert float(found.rest_mass) == pytest.approx(float(rest.sum()), rel=1e-12)
    # Cauchy-Schwarz about the mean of all tokens, and that a variance is below that of the ends
    mean = look.delta.mean(1) / size
    shift = mean - look.delta @ p / size
    apart = Y - shift[:, None]

    def energy(power):
        norm = (apart[:, some] ** power).sum(1) ** (1 / power) - likely ** (1 / power) * off
        return (apart**power).sum(1) - np.maximum(norm, 0) ** power

    each = np.minimum(rest.max() * energy(2), np.sqrt((rest**2).sum()) * np.sqrt(energy(4)))
    rest_first = Y[:, ~some] @ rest
    moved = each + 2 * shift * rest_first - shift**2 * rest.sum()
    moved += 2 * off * (2 * np.abs(shift) + np.abs(rest_first) + 2 * off)
    below, above = wide(spread.below) / size, wide(spread.above) / size
    inside = rest.sum() * below * above + (above - below) * rest_first
    inside += np.abs(above - below) * off
    assert np.allclose(wide(found.rest_second), np.minimum(moved, inside), rtol=2e-4, atol=1e-9)
    assert (wide(found.rest_second) >= Y[:, ~some] ** 2 @ rest).all()


@pytest.mark.parametrize("look", STAGE_2)
@pytest.mark.parametrize("times", [0.1, -0.1, 1.0, -1.0, 6.0])
def test_the_gap_lies_between_its_ends_and_these_close_in_on_it(look, times):
    """The ends are the docstring's formulas, up to what is allowed for rounding."""
    found, size = look.found, wide(look.found.size)
    coefficient = (times / look.found.size).clone()
    y = wide(coefficient)[:, None] * look.Y
    gap = np.log(np.exp(y) @ look.p)
    below, above = -y.min(1), y.max(1)
    slack = torch.zeros_like(coefficient)
    ends = intervals_module._likely_gaps(
        found,
        look.subvalue,
        coefficient,
        torch.tensor(below.astype(float)),
        torch.tensor(above.astype(float)),
        slack,
    )
    least, most = map(wide, ends)
    assert (least <= gap).all() and (gap <= most).all()
    series = sum(
        wide(moment) * times**power / math.factorial(power)
        for power, moment in ((2, found.second), (3, found.third), (4, found.fourth))
    )
    rest_mass, first = wide(found.rest_mass), times * wide(found.rest_first)
    mean = np.clip(first / rest_mass, -below, above)

    def curve(y):
        return (np.expm1(y) - y) / y**2

    fourth = times**4 * wide(found.fourth)
    lower = np.maximum(series - np.minimum(below, 5) * fourth / 120, 0)
    lower = np.log1p(lower + rest_mass * mean**2 * curve(mean))
    upper = series + above * np.exp(above) * fourth / 120
    upper = np.log1p(upper + times**2 * wide(found.rest_second) * curve(above))
    assert np.allclose(least, lower, rtol=1e-9)
    assert np.allclose(most, upper, rtol=1e-9)
    assert size.min() > 0


def test_neurons_too_steep_for_the_series_are_left_to_the_next_stage():
    look = STAGE_2[0]
    coefficient = torch.full_like(look.found.size, 30.0) / look.found.size * 1.0001
    least, most = intervals_module._likely_gaps(
        look.found,
        look.subvalue,
        coefficient,
        coefficient * look.spread.below,
        coefficient * look.spread.above,
        torch.zeros_like(coefficient),
    )
    assert (least == 0).all() and most.isposinf().all()


def test_a_slack_is_what_the_page_says_may_round():
    look = STAGE_2[0]
    eps = torch.finfo(torch.float64).eps
    spread = replace(
        look.spread,
        slack=torch.full_like(look.spread.slack, 0.01),
        rounding=torch.full_like(look.spread.slack, 0.02),
        base_rounding=0.03,
        constant=0.04,
    )
    coefficient = torch.tensor([-2.0, 2.0, 0.5], dtype=torch.float64)
    gap = torch.tensor([0.08, 100.0, 0.0], dtype=torch.float64)
    found = intervals_module._slack(spread, coefficient, torch.tensor([0, 1, 2]), gap)
    wanted = []
    for size, each in zip((2.0, 2.0, 0.5), gap.tolist(), strict=True):
        e, h = 0.02 * size, 0.03
        moved = min(1, math.sqrt(each / 2)) * math.expm1(2 * (e + h)) + e**2 / 2
        moved = min(moved, 2 * (e + h))
        wanted.append(0.01 * size + 0.04 + e + moved + 64 * eps * each)
    assert found.tolist() == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_exact_scores_are_off_by_no_more_than_their_gap_allows(sign):
    look = STAGE_2[0]
    spread = replace(
        look.spread,
        slack=torch.full_like(look.spread.slack, 0.01),
        rounding=torch.full_like(look.spread.slack, 0.02),
        base_rounding=0.03,
        constant=0.04,
    )
    coefficients = sign * look.blocks[1].coefficients.abs().clamp(min=0.1)
    spread = replace(spread, block=replace(look.blocks[1], coefficients=coefficients))
    score = coefficients * spread.slope - torch.linspace(-0.5, 0.5, len(coefficients)).double()
    found = intervals_module._rounding_of(spread, look.subvalue, score)
    gap = coefficients * spread.slope - score + 0.01 * coefficients.abs() + 0.04
    wanted = intervals_module._slack(spread, coefficients, look.subvalue, gap.clamp(min=0))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_ends_of_the_second_stage_are_the_tangent_less_its_gaps():
    look = STAGE_2[2]
    coefficients = 3 * look.blocks[1].coefficients
    spread = replace(look.spread, block=replace(look.blocks[1], coefficients=coefficients))
    numbers = torch.arange(len(coefficients))[coefficients != 0]
    coefficient, size = coefficients[numbers], coefficients[numbers].abs()
    up = coefficient > 0
    below = size * torch.where(up, spread.below[numbers], spread.above[numbers])
    above = size * torch.where(up, spread.above[numbers], spread.below[numbers])
    least, most = intervals_module._likely_gaps(
        look.found, numbers, coefficient, below, above, size * spread.slack[numbers]
    )
    most = torch.minimum(most, intervals_module._range_gap(below, above))
    slack = intervals_module._slack(spread, coefficient, numbers, most)
    tangent = coefficient * spread.slope[numbers]
    ends = intervals_module._second_stage(spread, look.out, look.before, numbers, look.likely)
    torch.testing.assert_close(ends.lower, tangent - most - slack, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ends.upper, tangent - least + slack, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ends.slack, slack, rtol=1e-12, atol=0)
    block = intervals_module.BlockEnds(
        spread=spread, out=look.out, before=look.before, likely=look.likely
    )
    for some in (numbers, numbers[:1], numbers[:0]):
        assert torch.equal(block.of(some).lower, ends.lower[: len(some)])
    first = block.all()
    assert (first.lower[numbers] <= ends.lower).all()
    assert torch.equal(replace(block, likely=0).of(numbers).lower, first.lower[numbers])
    one = replace(block, likely=1).of(numbers)
    assert (one.lower >= first.lower[numbers]).all() and (one.lower > first.lower[numbers]).any()
    assert (least > 0).any() and (slack < 1e-3 * (most - least).amax()).all()
    # what the likely tokens' mean may be off by takes from the least that the others add
    loose, _ = intervals_module._likely_gaps(
        look.found, numbers, coefficient, below, above, torch.full_like(size, 1e9)
    )
    assert (loose <= least).all() and (loose < least).any()


@pytest.mark.parametrize("gain", [None, -3.0])
def test_the_allowance_for_a_base_counts_its_mean_the_largest_gain_and_the_largest_bias(gain):
    out, blocks, target = build({**PLAIN, "base": 1.0, "mean": -3.0, "bias": 5.0}, torch.float64)
    gains = (
        torch.ones(20).double() if gain is None else out.gain.index_fill(0, torch.tensor(7), gain)
    )
    out = replace(out, gain=None if gain is None else gains)
    before = out.baseline(blocks[0].base[None], target)
    (found,) = intervals_module._base_rounding(out, before, 2.0)
    centred = blocks[0].base - blocks[0].base.mean()
    taken = math.sqrt(20) * float(blocks[0].base.mean()) * (1.0 if gain is None else 3.0)
    size = math.hypot((centred * gains + out.bias).norm(), taken)
    unit = (math.sqrt(20) + 8) * torch.finfo(torch.float64).eps
    assert found / unit == pytest.approx(2.0 * size + float(out.b_U.abs().max()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranges_are_widened_by_what_may_round_in_the_index_and_in_the_slope(dtype):
    out, blocks, target = build({**PLAIN, "base": 1.0, "mean": 3.0, "norm_scale": 0.7}, dtype)
    before = out.baseline(torch.stack([block.base for block in blocks]), target)
    index = index_of(blocks, out)
    spreads = intervals_module._spreads(blocks, out, before, index)
    for layer, spread in enumerate(spreads):
        rounding = wide(index.ffn.rounding[layer]) / np.longdouble(out.norm_scale.item())
        low, high = (
            wide(getattr(index.ffn, name)[layer]) / np.longdouble(out.norm_scale.item())
            for name in ("low", "high")
        )
        allowed = rounding + wide(spread.slack)
        below = wide(spread.below) - (wide(spread.expected) - low)
        above = wide(spread.above) - (high - wide(spread.expected))
        for found in (below, above):
            assert np.allclose(found, allowed, rtol=0.2)
        coarser = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        assert np.allclose(wide(spread.rounding), rounding / coarser, rtol=1e-6)
        scale = np.longdouble(out.norm_scale.item())
        for name in ("spread", "spread4"):
            known = wide(getattr(index.ffn, name)[layer]) / scale
            room = wide(getattr(spread, name)) - known
            wanted = 64 * torch.finfo(torch.float32).eps * known + rounding
            assert np.allclose(room, wanted, rtol=0.1)
        # a logit of the base, centred before, is a product and a bias
        unit = (math.sqrt(20) + 8) * torch.finfo(dtype).eps
        mean = float(blocks[layer].base.mean() * out.gain.abs().max() / out.norm_scale)
        size = math.hypot(out.normalize(blocks[layer].base).norm(), math.sqrt(20) * mean)
        bias = float(out.b_U.abs().max())
        wanted = unit * (size * index.widest + bias)
        assert spread.base_rounding == pytest.approx(wanted, rel=1e-5)
        assert spread.constant == 32 * torch.finfo(dtype).eps
    tangent = tangent_bounds(
        [blocks],
        out,
        out.baseline(blocks[0].base[None].expand(2, -1), Target(3, also=(Target(5),))),
    )[0][0]
    assert tangent.answers is not None
    assert intervals_module._constant(tangent, 0.5) == tangent.constant + 1.0


def test_how_many_tokens_are_looked_at():
    out, _, _ = build({**PLAIN, "d_vocab": 300, "d_model": 20}, torch.float64)
    how_many = intervals_module._how_many
    assert how_many(out, None) == 256
    assert how_many(out, 7) == 7
    assert how_many(out, 301) == 300
    assert how_many(replace(out, budget=8 * 48 * 5 + 1), None) == 5
    assert how_many(replace(out, budget=1), None) == 1
    wide_out, _, _ = build({**PLAIN, "d_vocab": 24_000, "d_model": 2}, torch.float64)
    assert how_many(wide_out, None) == 1000


# --- sums -------------------------------------------------------------------------------------


@given(cases, st.integers(1, 60), st.sampled_from([1e-6, 1e-3, 1.0, math.inf]))
def test_sums_and_shares_contain_the_true_ones(case, top, tolerance):
    out, blocks, target = build(case, torch.float64)
    found = score_intervals(blocks, out, target, index_of(blocks, out), tolerance=tolerance)
    exact = true_scores(blocks, out, target).flatten()
    positive = np.sort(exact.clip(min=0))[::-1]
    room = 1e-12 * max(1.0, float(np.abs(wide(found.lower)).sum()))
    for (lower, upper), true in (
        (found.total(), exact.sum()),
        (found.positive_total(), positive.sum()),
    ):
        assert lower - room <= true <= upper + room
    lower, upper = found.share(top)
    assert 0 <= lower <= upper + 1e-12 <= 1 + 1e-12
    if positive.sum() > 0:
        share = positive[:top].sum() / positive.sum()
        assert lower - 1e-12 <= share <= upper + 1e-12


def test_a_share_is_close_where_intervals_are_narrow():
    out, blocks, target = flat_case()
    found = score_intervals(blocks, out, target, index_of(blocks, out))
    lower, upper = found.share(10)
    assert 0.2 < lower < upper < lower + 0.02
    ends = []
    for scores, others in ((found.lower, found.upper), (found.upper, found.lower)):
        best = scores.flatten().clamp(min=0).sort(descending=True).values[:10].sum()
        rest = others.flatten().clamp(min=0).sort(descending=True).values[10:].sum()
        ends.append(float(best / (best + rest)))
    assert (lower, upper) == pytest.approx(ends, rel=1e-9)
    assert found.share(10_000) == (1.0, 1.0)
    nothing = replace(found, lower=found.lower - 100, upper=found.upper - 100)
    assert nothing.share(3) == (0.0, 0.0) and nothing.positive_total() == (0.0, 0.0)
    with pytest.raises(InputError, match="at least 1"):
        found.share(0)


def test_sums_of_narrow_ends_are_taken_in_float64():
    ends = torch.tensor([[2.0**24, 1.0, 1.0], [1.0, -5.0, 1.0]])
    found = Intervals(
        kind="ffn",
        layers=(0, 1),
        lower=ends,
        upper=ends + torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        exact=torch.ones(2, 3, dtype=torch.bool),
        tolerance=1.0,
        refined=0,
        evaluated=6,
    )
    assert found.total() == (2.0**24 - 1, 2.0**24 + 1)
    assert found.positive_total() == (2.0**24 + 4, 2.0**24 + 6)
    assert found.share(2) == ((2.0**24 + 1) / (2.0**24 + 4), (2.0**24 + 3) / (2.0**24 + 6))
    assert found.share(6) == (1.0, 1.0)
    assert found.width.tolist() == [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


# --- suppressing neurons ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(cases, st.integers(1, 17), st.sampled_from([None, 0, 3]))
def test_the_most_suppressing_neurons_are_those_a_dense_evaluation_lists_last(
    dtype, case, top, likely
):
    out, blocks, target = build(case, dtype)
    index = index_of(blocks, out)
    found = suppressing_neurons(blocks, out, target, index, top, likely=likely)
    dense = torch.cat([neuron_scores(block, out, target) for block in blocks])
    order = dense.sort(stable=True).indices[:top]
    exactly = score_intervals(blocks, out, target, index, tolerance=0.0)
    # as far as rounding can tell them apart
    rounding = float(exactly.width.max())
    assert len(found) == min(top, len(dense))
    assert torch.allclose(found.score, dense[order], atol=rounding, rtol=0)
    flat = found.layer * blocks[0].n_neurons + found.number
    assert torch.allclose(dense[flat], dense[order], atol=rounding, rtol=0)
    certificate = found.certificate
    assert certificate.applies and certificate.lowest and certificate.holds
    assert certificate.kth_score == float(found.score[-1])
    assert certificate.evaluated <= certificate.total == len(dense)
    if certificate.next_bound is not None:
        left = torch.ones(len(dense), dtype=torch.bool)
        left[flat] = False
        assert certificate.next_bound >= certificate.kth_score


def test_few_are_scored_beyond_the_suppressing_neurons_asked_for():
    generator = torch.Generator().manual_seed(0)
    case = {**PLAIN, "d_model": 16, "scale": 0.3, "rows": 1.0, "base": 1.0}
    out, _, target = build(case, torch.float32)
    blocks = random_ffns(generator, 4, 16, 500, tail=1.0)
    blocks = [replace(block, W_out=0.1 * block.W_out) for block in blocks]
    index = index_of(blocks, out)
    scored = {
        likely: suppressing_neurons(blocks, out, target, index, 100, likely=likely)
        for likely in (0, 100)
    }
    assert scored[100].certificate.evaluated <= 130 < scored[0].certificate.evaluated < 1600
    assert torch.equal(scored[0].number, scored[100].number)
    dense = torch.cat([neuron_scores(block, out, target) for block in blocks])
    order = dense.sort(stable=True).indices[:100]
    assert torch.equal(scored[100].layer * 500 + scored[100].number, order)


@pytest.mark.parametrize("likely", [0, None])
def test_more_suppressing_neurons_can_be_asked_for_than_a_layer_has(likely):
    generator = torch.Generator().manual_seed(0)
    out, _, target = build({**PLAIN, "d_model": 16}, torch.float64)
    blocks = random_ffns(generator, 4, 16, 30, tail=1.0, dtype=torch.float64)
    told = []
    found = suppressing_neurons(
        blocks, out, target, index_of(blocks, out), 45, likely=likely, progress=told.append
    )
    dense = torch.cat([neuron_scores(block, out, target) for block in blocks])
    order = dense.sort(stable=True).indices[:45]
    assert torch.equal(found.layer * 30 + found.number, order)
    assert sum(told) == found.certificate.evaluated
    assert 0 < found.certificate.slack < 1e-6


def test_a_broken_lower_end_loses_suppressing_neurons(monkeypatch):
    out, blocks, target = flat_case()
    index = index_of(blocks, out)
    blocks = [replace(block, coefficients=20 * block.coefficients) for block in blocks]
    dense = torch.cat([neuron_scores(block, out, target) for block in blocks])
    monkeypatch.setattr(intervals_module, "_range_gap", lambda below, above: 0 * below)
    found = suppressing_neurons(blocks, out, target, index, 10, likely=0)
    assert found.score.sum() > dense.sort().values[:10].sum() + 0.1


def test_neurons_that_are_off_stand_between_the_signs():
    out, blocks, target = flat_case(torch.float32)
    for block in blocks:
        block.coefficients[4:] = 0.0
    found = suppressing_neurons(blocks, out, target, index_of(blocks, out), 20)
    dense = torch.cat([neuron_scores(block, out, target) for block in blocks])
    order = dense.sort(stable=True).indices[:20]
    assert torch.equal(found.layer * 24 + found.number, order)
    assert found.certificate.evaluated <= 8 and found.certificate.holds
    assert (found.score == 0).any()


# --- other targets and conventions ------------------------------------------------------------


@given(cases)
def test_scores_of_a_contrast_are_known_at_once(case):
    out, blocks, target = build(case, torch.float64)
    other = Target((target.id + 1) % case["d_vocab"])
    contrast = replace(target, against=other)
    exact = true_scores(blocks, out, target) - true_scores(blocks, out, other)
    found = score_intervals(blocks, out, contrast, None)
    room = 1e-15 * np.abs(true_scores(blocks, out, target)).max()
    assert (wide(found.lower) - room <= exact).all() and (exact <= wide(found.upper) + room).all()
    assert found.exact.all() and (found.refined, found.evaluated) == (0, 0)
    lowest = suppressing_neurons(blocks, out, contrast, None, 5)
    rounding = float(found.width.max()) + float(room)
    assert np.allclose(wide(lowest.score), np.sort(exact.flatten())[:5], atol=rounding, rtol=0)
    assert lowest.certificate.linear and lowest.certificate.lowest and lowest.certificate.holds
    assert lowest.certificate.kth_score == float(lowest.score[-1])
    assert (lowest.score.diff() >= 0).all()


def test_a_recomputed_norm_has_no_intervals_and_every_neuron_is_scored():
    out, blocks, target = flat_case()
    out = replace(out, norm_scale=None)
    with pytest.raises(InputError, match="recomputed norm has no intervals"):
        score_intervals(blocks, out, target, None)
    found = suppressing_neurons(blocks, out, target, None, 7)
    dense = torch.cat([neuron_scores(block, out, target) for block in blocks])
    order = dense.sort(stable=True).indices[:7]
    assert torch.equal(found.layer * 24 + found.number, order)
    assert torch.allclose(found.score, dense[order])
    certificate = found.certificate
    assert certificate.lowest and not certificate.applies and certificate.next_bound is None
    assert certificate.evaluated == sum(int((b.coefficients != 0).sum()) for b in blocks)


def test_a_missing_or_foreign_index_is_refused():
    out, blocks, target = flat_case()
    index = index_of(blocks, out)
    with pytest.raises(InputError, match="projection_index"):
        score_intervals(blocks, out, target, None)
    with pytest.raises(InputError, match="projection_index"):
        suppressing_neurons(blocks, out, target, None, 3)
    other_rows = index_of(random_ffns(torch.Generator().manual_seed(0), 2, 20, 25, tail=1.0), out)
    fewer_layers = index_of(blocks[:1], out)
    for other in (replace(index, d_vocab=301), other_rows, fewer_layers):
        with pytest.raises(InputError, match="of another model"):
            score_intervals(blocks, out, target, other)
    for tolerance in (-1.0, math.nan):
        with pytest.raises(InputError, match="tolerance"):
            score_intervals(blocks, out, target, index, tolerance=tolerance)


# --- whole models -----------------------------------------------------------------------------


def of_model(model, directory, convention="exact", dtype=None):
    host = open_host(model)
    index = projection_index(host, directory)
    with torch.no_grad():
        captured = capture(host, tokenize(host, Prompt(tokens=TOKENS)))
        captured = captured if dtype is None else captured.to(dtype)
        out = read_out(host, captured.resid_final, convention)
        layers = range(host.n_layers)
        ffns = [ffn_decomposition(host, captured, layer) for layer in layers]
        attns = [attn_decomposition(host, captured, layer) for layer in layers]
    return index, out, {"ffn": ffns, "attn": attns}


@pytest.mark.parametrize("kind", ["ffn", "attn"])
def test_intervals_of_a_whole_model_contain_its_dense_scores(any_model, kind, tmp_path):
    index, out, blocks = of_model(any_model, tmp_path)
    target = Target(7)
    dense = torch.stack([neuron_scores(block, out, target) for block in blocks[kind]])
    for asked in STAGES.values():
        for likely in (None, 10):
            found = score_intervals(blocks[kind], out, target, index, likely=likely, **asked)
            assert_contains(found, wide(dense))
            assert found.kind == kind and found.layers == (0, 1, 2)
    lowest = suppressing_neurons(blocks[kind], out, target, index, 12)
    order = dense.flatten().sort(stable=True)
    assert lowest.score.numpy() == pytest.approx(order.values[:12].numpy(), abs=1e-6)
    assert lowest.kind == kind and lowest.certificate.evaluated < dense.numel() // 2


@pytest.mark.parametrize("convention", ["exact", "published"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_one_index_serves_both_conventions_and_dtypes(tiny_model, convention, dtype, tmp_path):
    index, out, blocks = of_model(tiny_model, tmp_path, convention, dtype)
    assert out.dtype == (dtype or torch.float32)
    for kind in ("ffn", "attn"):
        found = score_intervals(blocks[kind], out, Target(7), index)
        dense = torch.stack([neuron_scores(block, out, Target(7)) for block in blocks[kind]])
        assert_contains(found, wide(dense))
        assert (found.exact | (found.width <= 1e-3)).all()


def test_attention_summed_over_sources_and_single_layers_have_intervals_too(tiny_model, tmp_path):
    index, out, blocks = of_model(tiny_model, tmp_path)
    summed = [block.over_sources() for block in blocks["attn"]][1:]
    found = score_intervals(summed, out, Target(7), index)
    dense = torch.stack([neuron_scores(block, out, Target(7)) for block in summed])
    assert_contains(found, wide(dense))
    assert found.layers == (1, 2)


def test_bfloat16_weights_have_intervals_in_float32(tmp_path):
    index, out, blocks = of_model(
        bridge_of("llama", dtype=torch.bfloat16), tmp_path, dtype=torch.float32
    )
    for kind in ("ffn", "attn"):
        found = score_intervals(blocks[kind], out, Target(7), index, likely=20)
        dense = torch.stack([neuron_scores(block, out, Target(7)) for block in blocks[kind]])
        assert_contains(found, wide(dense))
