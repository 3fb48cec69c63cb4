"""How sure a figure is: percentile intervals over prompts drawn again, with replacement."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95

Statistic = Callable[[Float[Tensor, "draw row"]], Float[Tensor, " draw"]]
"""``statistic(weights)``: a figure for each draw, where row i counts ``weights[draw, i]`` times."""


class Interval(NamedTuple):
    """A figure over all rows, and the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def interval(
    n_rows: int, statistic: Statistic, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """``statistic`` of all rows, each counted once, and its interval over ``resamples`` draws."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_rows, (resamples, n_rows), generator=generator)
    ones = torch.ones(1, dtype=torch.float64)
    weights = torch.zeros(resamples, n_rows, dtype=torch.float64)
    weights.scatter_add_(1, drawn, ones.expand(resamples, n_rows))
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(statistic(weights), ends).tolist()
    return Interval(statistic(ones.expand(1, n_rows)).item(), low, high)


def mean(values: Float[Tensor, " row"], *, seed: int = 0) -> Interval:
    """The rows' mean."""
    rows = values.double()
    return interval(len(rows), lambda weights: weights @ rows / weights.sum(1), seed=seed)


def ratio(above: Float[Tensor, " row"], below: Float[Tensor, " row"], *, seed: int = 0) -> Interval:
    """The sum of ``above`` by the sum of ``below``: steadier than a mean of ratios near 0 / 0."""
    a, b = above.double(), below.double()
    return interval(len(a), lambda weights: (weights @ a) / (weights @ b), seed=seed)
