"""What does most in several runs together: neurons by the sum of their scores, proven.

Each run's tangent bounds its scores, and the sum of the bounds the sum of the scores: the search is
that of ``topk``. The runs may differ in their target, read position and base; their neurons are
numbered alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.decompose import AttnDecomposition, Decomposition
from tl_neuron_attr.differences import Side, scores_in
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import at_least_one
from tl_neuron_attr.scores import Progress
from tl_neuron_attr.topk import (
    RankedNeurons,
    TangentBound,
    best_by_bound_of,
    bounds_of_one_run,
    coefficients_at,
    tangent_bounds,
)

_EXCLUDES_NOTHING = 1e30  # a finite bound that no sum reaches


@dataclass(frozen=True, kw_only=True)
class RankedSums:
    """Neurons of one kind by the sum of their scores over several runs, best first."""

    neurons: RankedNeurons
    """Their ``score`` is the sum, in nats; their ``coefficient`` is that of the run where the
    neuron does most, by absolute score. The certificate is of sums: ``evaluated`` counts neurons
    scored in every run."""
    scores: Float[Tensor, "run neuron"]
    coefficients: Float[Tensor, "run neuron"]

    __repr__ = brief

    def __len__(self) -> int:
        return len(self.neurons)

    @property
    def most_in(self) -> Int[Tensor, " neuron"]:
        """The run in which each neuron does most, by absolute score."""
        return self.scores.abs().argmax(0)


@full_precision()
def top_sums(sides: Sequence[Side], top: int, *, progress: Progress | None = None) -> RankedSums:
    """The ``top`` neurons whose scores in all ``sides`` have the largest sums.

    Exactly those that scoring every neuron in every run would list, with a certificate. Where no
    bound holds (a recomputed norm) every neuron is scored.

    Raises:
        InputError: If there is no run, or their neurons are not numbered alike: blocks of one kind
            and size, in order of their layers (``with_positions`` makes attention as wide as that
            of a longer prompt).

    Cost: for each run a pass over its weights for the bounds; then about one read-out per neuron
    listed and run, and more where runs disagree about what is best.
    """
    top = at_least_one(top, "top")
    _check_alike(sides)
    blocks = sides[-1].blocks
    total = sum(block.n_neurons for block in blocks)
    of_sides = [tangent_bounds([side.blocks], side.out, side.before) for side in sides]
    tangents = [of_side[0] for of_side in of_sides if of_side is not None]
    bounded = len(tangents) == len(sides)
    bounds = []
    for place in range(len(blocks)):
        if bounded and 2 * top < total:
            above = partial(_above, [of_side[place] for of_side in tangents])
        else:
            above = partial(_nothing_excluded, [side.blocks[place] for side in sides], sides[0])
        bounds.append(bounds_of_one_run(above))

    def sums(flats: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, " neuron"]:
        (flat,) = flats
        return torch.stack([scores_in(side, flat) for side in sides]).sum(0)

    (ranked,) = best_by_bound_of([blocks], bounds, sums, top, progress=progress)
    layers = torch.tensor([block.layer for block in blocks], device=ranked.layer.device)
    flat = torch.searchsorted(layers, ranked.layer) * blocks[0].n_neurons + ranked.number
    scores = torch.stack([scores_in(side, flat) for side in sides])
    coefficients = torch.stack([coefficients_at(side.blocks, flat) for side in sides])
    most = scores.abs().argmax(0)
    return RankedSums(
        neurons=replace(
            ranked,
            coefficient=coefficients.gather(0, most[None])[0].to(scores),
            certificate=replace(ranked.certificate, applies=bounded),
        ),
        scores=scores,
        coefficients=coefficients.to(scores),
    )


def _check_alike(sides: Sequence[Side]) -> None:
    if not sides:
        raise InputError("there is no run to sum over; give at least one")
    numbered = [[(type(b), b.layer, b.n_neurons) for b in side.blocks] for side in sides]
    layers = [block.layer for block in sides[0].blocks]
    if any(each != numbered[0] for each in numbered) or layers != sorted(set(layers)):
        raise InputError(
            "the runs' neurons are not numbered alike: give blocks of one kind, the same layers in "
            "order, and attention of as many source positions (with_positions adds what lacks)"
        )


def with_positions(block: AttnDecomposition, n_pos: int) -> AttnDecomposition:
    """The same attention, its neurons numbered as if there were more source positions.

    Nothing is attended to there, so that these neurons are off.
    """
    more = n_pos - block.shape[1]
    return replace(
        block,
        pattern=torch.nn.functional.pad(block.pattern, (0, more)),
        v=torch.nn.functional.pad(block.v, (0, 0, 0, 0, 0, more)),
    )


def _above(
    tangents: Sequence[TangentBound],
) -> tuple[Float[Tensor, " neuron"], Float[Tensor, ""]]:
    """What no sum of one block's scores exceeds (-inf where all are off), and the slack in it."""
    each, slacks = zip(*(tangent.above() for tangent in tangents), strict=True)
    bounds = torch.stack(each)
    off = bounds.isneginf()
    return bounds.where(~off, 0.0).sum(0).where(~off.all(0), -torch.inf), torch.stack(slacks).sum()


def _nothing_excluded(
    blocks: Sequence[Decomposition], side: Side
) -> tuple[Float[Tensor, " neuron"], Float[Tensor, ""]]:
    off = torch.stack([block.all_coefficients() == 0 for block in blocks]).all(0)
    nothing = torch.full(off.shape, _EXCLUDES_NOTHING, dtype=side.out.dtype, device=off.device)
    return nothing.where(~off, -torch.inf), nothing.new_zeros(())
