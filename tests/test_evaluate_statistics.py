"""Intervals, tests and areas: each against scipy, or a slow loop over the definition."""

from importlib import import_module

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tl_neuron_attr.evaluate.statistics import (
    area_weights,
    average_ranks,
    false_discovery_q,
    means,
    pearson,
    sign_flip_p,
    spearman,
)

statistics = import_module(means.__module__)  # by attribute it is the function of that name


def each_alone(values):
    return np.arange(len(values))


@pytest.fixture
def values():
    return np.random.default_rng(7).gamma(2.0, size=(80, 3)) * [1.0, 5.0, 0.1]


def test_intervals_are_those_of_scipy(values):
    found = means(values, each_alone(values), 0, resamples=20_000)
    assert found.mean == pytest.approx(values.mean(0))
    for column in range(3):
        theirs = scipy.stats.bootstrap(
            (values[:, column],),
            np.mean,
            method="percentile",
            n_resamples=20_000,
            rng=np.random.default_rng(1),
        ).confidence_interval
        width = theirs.high - theirs.low
        assert found.low[column] == pytest.approx(theirs.low, abs=0.03 * width)
        assert found.high[column] == pytest.approx(theirs.high, abs=0.03 * width)


def test_an_interval_is_that_of_a_loop_over_the_same_draws(values):
    n, resamples = len(values), 400
    drawn = np.random.default_rng(3).integers(0, n, (resamples, n))
    wanted = np.array([values[rows].mean(0) for rows in drawn])
    found = means(values, each_alone(values), 3, resamples=resamples)
    low, high = np.quantile(wanted, [0.025, 0.975], axis=0)
    assert found.low == pytest.approx(low) and found.high == pytest.approx(high)


def test_draws_in_small_blocks_are_the_draws_at_once(values, monkeypatch):
    whole = means(values, each_alone(values), 3), sign_flip_p(values - 2, each_alone(values), 3)
    monkeypatch.setattr(statistics, "_CELLS_AT_A_TIME", 7 * len(values))
    blocks = means(values, each_alone(values), 3), sign_flip_p(values - 2, each_alone(values), 3)
    for some, others in zip((*whole[0], whole[1]), (*blocks[0], blocks[1]), strict=True):
        assert some == pytest.approx(others)


def test_groups_are_drawn_as_one():
    """Copies of a prompt add nothing: the interval is that of the prompts without them."""
    values = np.random.default_rng(0).normal(size=(40, 2))
    copied, groups = values.repeat(5, axis=0), np.arange(40).repeat(5)
    alone = means(values, each_alone(values), 0)
    together = means(copied, groups, 0)
    naive = means(copied, each_alone(copied), 0)
    assert together.low == pytest.approx(alone.low) and together.high == pytest.approx(alone.high)
    assert ((naive.high - naive.low) < 0.6 * (alone.high - alone.low)).all()
    assert sign_flip_p(copied + 0.3, groups, 0) == pytest.approx(
        sign_flip_p(values + 0.3, each_alone(values), 0)
    )


def test_a_missing_measurement_is_left_out_of_its_column_alone(values):
    holes = values.copy()
    holes[::3, 1] = np.nan
    holes[:, 2] = np.nan
    full, some = means(values, each_alone(values), 0), means(holes, each_alone(values), 0)
    assert some.low[0] == full.low[0] and some.high[0] == full.high[0]
    assert some.mean[1] == pytest.approx(np.nanmean(holes[:, 1]))
    assert some.low[1] < some.mean[1] < some.high[1]
    assert np.isnan([each[2] for each in some]).all()
    p = sign_flip_p(holes - 2, each_alone(values), 0)
    alone = sign_flip_p(holes[~np.isnan(holes[:, 1]), 1:2] - 2, np.arange(53), 0)
    assert p[1] == pytest.approx(alone[0], abs=0.02) and p[2] == 1


def test_a_few_rows_have_an_interval_too():
    found = means(np.array([[1.0], [np.nan], [np.nan]]), np.arange(3), 0)
    assert found.mean[0] == found.low[0] == found.high[0] == 1


def test_sign_flips_give_the_p_of_every_sign_pattern():
    differences = np.random.default_rng(5).normal(0.4, 1, size=(10, 4))
    patterns = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1).T
    exact = (np.abs(patterns @ differences) >= np.abs(differences.sum(0)) - 1e-9).mean(0)
    found = sign_flip_p(differences, each_alone(differences), 0, flips=20_000)
    assert found == pytest.approx(exact, abs=0.012)


def test_sign_flips_agree_with_scipys_permutation_test():
    differences = np.random.default_rng(2).normal(0.2, 1, size=60)
    theirs = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", rng=np.random.default_rng(0)
    ).pvalue
    assert sign_flip_p(differences[:, None], np.arange(60), 1)[0] == pytest.approx(theirs, abs=0.02)


def test_no_difference_has_p_1_and_a_large_one_the_least_there_is():
    differences = np.stack([np.zeros(50), np.full(50, 1e-12), np.full(50, 3.0)], axis=1)
    found = sign_flip_p(differences, np.arange(50), 0, flips=999)
    assert found.tolist() == [1, 0.001, 0.001]


def test_under_no_difference_p_is_uniform():
    differences = np.random.default_rng(0).standard_t(3, size=(40, 2000))
    p = sign_flip_p(differences, np.arange(40), 0, flips=999)
    assert scipy.stats.kstest(p, "uniform").statistic < 0.04


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_false_discovery_rates_are_those_of_scipy(p):
    found = false_discovery_q(np.array(p))
    assert found == pytest.approx(scipy.stats.false_discovery_control(p))


@given(
    arrays.arrays(
        float, st.integers(2, 30), elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0])
    )
)
def test_ranks_are_those_of_scipy_ties_and_minus_infinity_too(values):
    assert average_ranks(values).tolist() == scipy.stats.rankdata(values).tolist()


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 50)).round(1)
    second += 0.4 * first
    assert spearman(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic)
    assert pearson(first, second) == pytest.approx(scipy.stats.pearsonr(first, second).statistic)
    assert np.isnan(spearman(first, np.ones(50)))


@pytest.mark.parametrize("log", [False, True])
def test_an_area_is_that_of_the_trapezoid_rule_over_the_width(log):
    tops = np.array([0, 10, 30, 100])
    curve = np.array([0.99, 0.9, 0.5, 0.1])
    places = np.log1p(tops) if log else tops
    wanted = np.trapezoid(curve, places) / places[-1]
    assert curve @ area_weights(tops, log=log) == pytest.approx(wanted)
    assert np.ones(4) @ area_weights(tops, log=log) == pytest.approx(1)
