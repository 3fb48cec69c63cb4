"""What changed most: neurons by the difference of their scores in two runs, proven.

Between the ends of both scores' intervals lies their difference. Where the projection index is at
hand these are those of ``intervals``; where it is not, subvalues' norms give wider ones. The search
is that of ``topk``: both scores of a neuron are computed in order of the bound, until no neuron
left can differ more than the last one listed. The score itself is in ``scores``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.baselines import Baseline
from tl_neuron_attr.decompose import Decomposition
from tl_neuron_attr.display import Grid, box, brief, grid, line
from tl_neuron_attr.index import ProjectionIndex
from tl_neuron_attr.intervals import BlockEnds, ends_of_blocks
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import at_least_one
from tl_neuron_attr.readout import ReadOut
from tl_neuron_attr.scores import Progress
from tl_neuron_attr.topk import (
    Bounds,
    RankedNeurons,
    best_by_bound_of,
    bounds_of_one_run,
    coefficients_at,
    exact_scores,
)

_EXCLUDES_NOTHING = 1e30  # a finite bound that no difference reaches


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the runs looked at together: its neurons of one kind, and how they are scored.

    All sides' neurons are numbered alike. Where both share one ``ReadOut``, they are runs of one
    model.
    """

    blocks: Sequence[Decomposition]
    out: ReadOut
    before: Baseline
    """One base a block."""
    index: ProjectionIndex | None = None
    """Of this run's model; it makes bounds closer."""

    __repr__ = brief


@dataclass(frozen=True, kw_only=True)
class RankedDifferences:
    """Neurons of one kind by how much more they score in the first run than in the second."""

    neurons: RankedNeurons
    """Their ``score`` is the difference, in nats, their ``coefficient`` the first run's; the
    certificate is of differences, ``evaluated`` counts neurons scored in both runs."""
    first_score: Float[Tensor, " neuron"]
    second_score: Float[Tensor, " neuron"]
    second_coefficient: Float[Tensor, " neuron"]

    def __len__(self) -> int:
        return len(self.neurons)

    def __repr__(self) -> str:
        return f"RankedDifferences({self.neurons!r})"

    def _repr_html_(self) -> str:
        shown = self.neurons.first(10)
        scores = (shown.score, self.first_score[:10], self.second_score[:10])
        rows = zip(shown.neurons(), *(each.tolist() for each in scores), strict=True)
        name = "FFN" if shown.kind == "ffn" else "attention"
        return box(
            f"{len(self):,} {name} neurons by the difference of their scores",
            grid(
                Grid(
                    header=("neuron", "difference, nats", "first, nats", "second, nats"),
                    rows=tuple((str(neuron), *numbers) for neuron, *numbers in rows),
                    bars=frozenset({1}),
                    more=len(self) - len(shown),
                )
            ),
            line(f"Certificate: {self.neurons.certificate}"),
        )

    def first(self, top: int) -> "RankedDifferences":
        """The ``top`` first of them."""
        return RankedDifferences(
            neurons=self.neurons.first(top),
            first_score=self.first_score[:top],
            second_score=self.second_score[:top],
            second_coefficient=self.second_coefficient[:top],
        )


@full_precision()
def top_differences(
    first: Side,
    second: Side,
    top: int,
    *,
    lowest: bool = False,
    likely: int | None = None,
    progress: Progress | None = None,
) -> RankedDifferences:
    """The ``top`` neurons whose score in ``first`` exceeds that in ``second`` most.

    With ``lowest`` those for which it falls short most, lowest difference first. Exactly those that
    scoring every neuron in both runs would list, with a certificate. A neuron that is off in both
    runs, or has one coefficient before one base in both runs of a model, differs by exactly 0.
    Where no bound holds (a recomputed norm, a soft cap) every other neuron is scored.

    Cost: the bounds of both runs (without an index one pass over the unembedding each), then about
    two read-outs per neuron listed, and more where bounds are wide.

    Raises:
        InputError: If an index is not of a model of its run's shape.
    """
    top = at_least_one(top, "top")
    total = sum(block.n_neurons for block in first.blocks)
    higher, lower = (second, first) if lowest else (first, second)
    if not first.out.affine or 2 * top >= total:
        places = range(len(first.blocks))
        bounds = [
            bounds_of_one_run(partial(_nothing_excluded, first, second, place)) for place in places
        ]
    else:
        bounds = _bounds(higher, lower, top, likely)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def differences(flats: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, " neuron"]:
        (flat,) = flats
        scores = scores_in(first, flat), scores_in(second, flat)
        seen.append((flat, *scores))
        return scores[0] - scores[1]

    (ranked,) = best_by_bound_of(
        [first.blocks], bounds, differences, top, lowest=lowest, progress=progress
    )
    # a difference of 0 has no sign
    certificate = replace(
        ranked.certificate,
        kth_score=ranked.certificate.kth_score + 0.0,
        applies=first.out.affine,
        linear=first.out.affine and first.before.aims.against is not None,
    )
    layers = torch.tensor([block.layer for block in first.blocks], device=ranked.layer.device)
    place = torch.searchsorted(layers, ranked.layer)
    flat = place * first.blocks[0].n_neurons + ranked.number
    # those whose difference was known to be 0 were not scored
    left = flat[ranked.score == 0]
    seen.append((left, scores_in(first, left), scores_in(second, left)))
    flats, firsts, seconds = (torch.cat(column) for column in zip(*seen, strict=True))
    order = flats.argsort(stable=True)
    found = order[torch.searchsorted(flats[order], flat)]
    return RankedDifferences(
        neurons=replace(ranked, score=ranked.score + 0.0, certificate=certificate),
        first_score=firsts[found],
        second_score=seconds[found],
        second_coefficient=coefficients_at(second.blocks, flat),
    )


def scores_in(side: Side, flat: Int[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
    """Exact scores, of neurons given by their number across all blocks; 0 where they are off."""
    on = coefficients_at(side.blocks, flat) != 0
    scores = torch.zeros(len(flat), dtype=side.out.dtype, device=flat.device)
    if on.any():
        scores[on] = exact_scores(side.blocks, side.out, side.before, flat[on])
    return scores


def _unchanged(first: Side, second: Side, place: int) -> Bool[Tensor, " neuron"]:
    """Neurons of one block whose difference is exactly 0, without a look at any score."""
    one, other = first.blocks[place], second.blocks[place]
    before, after = one.all_coefficients(), other.all_coefficients()
    if (
        first.out is second.out
        and torch.equal(one.base, other.base)
        and one.outlet.as_in(other.outlet)
    ):
        return before == after
    return (before == 0) & (after == 0)


# --- bounds -----------------------------------------------------------------------------------


def _bounds(higher: Side, lower: Side, top: int, likely: int | None) -> list[Bounds]:
    """Bounds of the scores in ``higher`` less those in ``lower``.

    Only a neuron whose upper end reaches the ``top``-th highest lower end can be listed; of those
    the bound is made as close as it can be.
    """
    sides = [
        ends_of_blocks(side.blocks, side.out, side.before, side.index, likely=likely)
        for side in (higher, lower)
    ]
    pairs = list(zip(*sides, strict=True))
    least = torch.zeros(0, dtype=higher.out.dtype, device=higher.blocks[0].base.device)
    for place, (high, low) in enumerate(pairs):
        here = high.all().lower - low.all().upper
        least = torch.cat([least, here.where(~_unchanged(higher, lower, place), 0.0)])
        least = least.topk(min(top, len(least))).values
    bounds = []
    for place, (high, low) in enumerate(pairs):
        unchanged = _unchanged(higher, lower, place)
        above = high.all().upper - low.all().lower
        near = ((above >= least[-1]) & ~unchanged).nonzero()[:, 0]
        closer = torch.minimum(above[near], high.of(near).upper - low.of(near).lower)
        above_all = partial(_above, high, low, unchanged, near, closer)
        bounds.append(bounds_of_one_run(above_all))
    return bounds


def _above(
    high: BlockEnds,
    low: BlockEnds,
    unchanged: Bool[Tensor, " neuron"],
    near: Int[Tensor, " near"],
    closer: Float[Tensor, " near"],
) -> tuple[Float[Tensor, " neuron"], Float[Tensor, ""]]:
    """What no difference of one block exceeds (-inf for those that are 0), and the slack in it."""
    highs, lows = high.all(), low.all()
    above = (highs.upper - lows.lower).index_copy(0, near, closer)
    return above.where(~unchanged, -torch.inf), (highs.slack + lows.slack).max()


def _nothing_excluded(
    first: Side, second: Side, place: int
) -> tuple[Float[Tensor, " neuron"], Float[Tensor, ""]]:
    unchanged = _unchanged(first, second, place)
    nothing = torch.full(unchanged.shape, _EXCLUDES_NOTHING, dtype=first.out.dtype)
    nothing = nothing.to(unchanged.device)
    return nothing.where(~unchanged, -torch.inf), nothing.new_zeros(())
