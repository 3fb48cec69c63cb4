"""How sure: means over prompts with bootstrap intervals, paired tests, false discoveries, areas.

Arrays in, arrays out. A row is a prompt and a column whatever is measured of every prompt; NaN
marks a prompt without that measurement, which then is left out of that column. Rows are drawn
together, so differences between columns keep what the prompts have in common. ``groups`` number
what is drawn: each prompt for itself, or all prompts about one fact together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

LEVEL = 0.95
"""How much of the bootstrap distribution an interval holds."""

RESAMPLES = 2000
FLIPS = 9999

_CELLS_AT_A_TIME = 2**22


class Means(NamedTuple):
    """Means over the rows, and the ends of their intervals; NaN for a column without any row."""

    mean: Float[np.ndarray, " column"]
    low: Float[np.ndarray, " column"]
    high: Float[np.ndarray, " column"]


def means(
    values: Float[np.ndarray, "row column"],
    groups: Int[np.ndarray, " row"],
    seed: int,
    *,
    resamples: int = RESAMPLES,
) -> Means:
    """Mean of each column with its percentile bootstrap interval, groups drawn with replacement.

    Every column sees the same draws. Cost: a product of ``resamples`` x row x column.
    """
    present = ~np.isnan(values)
    filled = np.where(present, values, 0.0)
    found = np.empty((resamples, values.shape[1]))
    with np.errstate(invalid="ignore"):
        for rows, weights in _draws(groups, seed, resamples):
            found[rows] = (weights @ filled) / (weights @ present)
        mean = filled.sum(0) / present.sum(0)
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.full((2, values.shape[1]), np.nan)
    some = present.any(0)
    if some.any():  # a resample may have missed all rows of a column that few rows have
        quantile = np.nanquantile if np.isnan(found[:, some]).any() else np.quantile
        low[some], high[some] = quantile(found[:, some], ends, axis=0)
    return Means(mean, low, high)


def sign_flip_p(
    differences: Float[np.ndarray, "row column"],
    groups: Int[np.ndarray, " row"],
    seed: int,
    *,
    flips: int = FLIPS,
) -> Float[np.ndarray, " column"]:
    """Two-sided p of each column's mean difference, by flipping signs at random.

    If neither of the two is better, a group's differences are as likely with the other sign. The p
    is the share of ``flips`` random sign patterns, the observed one counted among them, whose mean
    lies at least as far from 0: never below 1 / (``flips`` + 1). 1 for a column without any row.
    """
    totals = np.zeros((int(groups.max()) + 1, differences.shape[1]))
    np.add.at(totals, groups, np.nan_to_num(differences))
    # equal sums must count as such whatever order they were added in
    least = np.abs(totals.sum(0)) - 1e-9 * np.abs(totals).sum(0)
    rng = np.random.default_rng(seed)
    count = np.zeros(differences.shape[1])
    at_a_time = max(1, _CELLS_AT_A_TIME // max(totals.shape))
    for first in range(0, flips, at_a_time):
        shape = (min(at_a_time, flips - first), len(totals))
        signs = 2.0 * rng.integers(0, 2, shape, dtype=np.int8) - 1.0
        count += (np.abs(signs @ totals) >= least).sum(0)
    return (1 + count) / (1 + flips)


def false_discovery_q(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """The smallest false discovery rate at which each test is a discovery (Benjamini-Hochberg)."""
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1.0)
    return q


def area_weights(tops: Int[np.ndarray, " top"], *, log: bool) -> Float[np.ndarray, " top"]:
    """What to multiply a curve's points by for the area under it, divided by its width.

    The trapezoid rule over N, or with ``log`` over log(1 + N). It is the curve's mean height, in
    its own unit; the points must be in order, the first of them 0.
    """
    places = np.log1p(tops) if log else tops.astype(float)
    widths = np.diff(places) / (places[-1] - places[0])
    return np.concatenate([widths, [0.0]]) / 2 + np.concatenate([[0.0], widths]) / 2


def spearman(first: Float[np.ndarray, " value"], second: Float[np.ndarray, " value"]) -> float:
    """Rank correlation, ties at their mean rank; NaN where either has no two different values."""
    ranks = [average_ranks(values) for values in (first, second)]
    return pearson(*ranks)


def pearson(first: Float[np.ndarray, " value"], second: Float[np.ndarray, " value"]) -> float:
    """Correlation; NaN where either has no two different values."""
    first, second = first - first.mean(), second - second.mean()
    sizes = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / sizes) if sizes > 0 else float("nan")


def average_ranks(values: Float[np.ndarray, " value"]) -> Float[np.ndarray, " value"]:
    """Ranks from 1, equal values at the mean of their ranks; -inf is a value like any other."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def _draws(
    groups: Int[np.ndarray, " row"], seed: int, resamples: int
) -> Iterator[tuple[slice, Float[np.ndarray, "draw row"]]]:
    """How often each row is drawn in each resample, some resamples at a time."""
    n_groups = int(groups.max()) + 1
    rng = np.random.default_rng(seed)
    at_a_time = max(1, _CELLS_AT_A_TIME // len(groups))
    for first in range(0, resamples, at_a_time):
        count = min(at_a_time, resamples - first)
        drawn = rng.integers(0, n_groups, (count, n_groups))
        drawn += n_groups * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * n_groups).reshape(count, n_groups)
        yield slice(first, first + count), times[:, groups].astype(float)
