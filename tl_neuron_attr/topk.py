"""The best, proven: the top neurons of a kind, exactly, without scoring every neuron.

With a frozen norm the logits are affine in the residual vector, so log p(w | x) is concave in x,
and the first-order score ``u . g`` (g the gradient of log p at the base) is never below the exact
score of u. One matrix-vector product per layer bounds every neuron's score; the exact scores are
then computed in order of the bound, until the k-th best is no smaller than every bound left.

Rounding: both numbers are computed in finite precision, so each bound is raised by a slack. A dot
product of d terms rounds by about ``sqrt(d) eps`` of the product of the norms (the probabilistic
analysis of Higham & Mary, 2019; the deterministic bound has d in place of sqrt(d) and is not met
in practice), taken four times over for the bound and again for the exact score, with the norms of
the target's direction and of those the model considers likely; a logsumexp of probabilities rounds
by a few eps. The certificate is a proof up to that model of rounding; in float64 the slack is 10^9
times smaller.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.decompose import AttnDecomposition, Decomposition
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.readout import Baseline, ReadOut
from tl_neuron_attr.scores import Progress, neuron_scores

Kind = Literal["ffn", "attn"]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Why the neurons listed are the best: no neuron left out can score above the last of them."""

    applies: bool
    """False where no bound holds (a recomputed norm): every neuron was scored instead."""
    evaluated: int
    """Neurons scored exactly (those whose coefficient is 0 score 0, and are not counted)."""
    total: int
    """Neurons there are."""
    kth_score: float
    """Exact score of the last neuron listed, in nats."""
    next_bound: float | None
    """Largest bound, slack included, of an active neuron not scored; ``None`` if there is none."""
    slack: float
    """Largest allowance for rounding in any bound, in nats."""

    @property
    def holds(self) -> bool:
        """Whether the list is proven complete."""
        return self.next_bound is None or self.next_bound <= self.kth_score


@dataclass(frozen=True, kw_only=True)
class RankedNeurons:
    """Neurons of one kind, best score first; ties by layer, then number within the layer."""

    kind: Kind
    layer: Int[Tensor, " neuron"]
    number: Int[Tensor, " neuron"]
    """What the layer's decomposition calls the neuron."""
    head: Int[Tensor, " neuron"] | None
    """``None`` for FFN neurons."""
    source_pos: Int[Tensor, " neuron"] | None
    """``None`` for FFN neurons and for attention neurons summed over source positions."""
    index: Int[Tensor, " neuron"]
    """Place in ``d_mlp``, or in ``d_head``."""
    coefficient: Float[Tensor, " neuron"]
    score: Float[Tensor, " neuron"]
    """Rise in log p(target), in nats."""
    certificate: Certificate

    def __len__(self) -> int:
        return self.score.shape[0]

    def first(self, top: int) -> "RankedNeurons":
        """The ``top`` best of them."""
        columns = {
            name: getattr(self, name)[:top]
            for name in ("layer", "number", "head", "source_pos", "index", "coefficient", "score")
            if getattr(self, name) is not None
        }
        return replace(self, **columns)

    def neurons(self) -> list[FFNNeuron] | list[AttnNeuron]:
        """The same neurons as values, in order."""
        layers, indices = self.layer.tolist(), self.index.tolist()
        if self.head is None:
            return [FFNNeuron(*place) for place in zip(layers, indices, strict=True)]
        heads = self.head.tolist()
        sources = [None] * len(self) if self.source_pos is None else self.source_pos.tolist()
        return [AttnNeuron(*place) for place in zip(layers, heads, indices, sources, strict=True)]


def top_neurons(
    decompositions: Sequence[Decomposition],
    out: ReadOut,
    token: int,
    top: int,
    *,
    before: Baseline | None = None,
    progress: Progress | None = None,
) -> RankedNeurons:
    """The ``top`` best neurons among blocks of one kind (all of them, if there are fewer).

    Exactly those a dense evaluation of every neuron would list first, with a certificate. Where
    no bound holds (``out.affine`` is false) every neuron is scored. ``before``, if it is at hand,
    has one base a block, in the order of ``decompositions``.

    Cost: a gradient and a matrix-vector product per layer, then about one read-out per neuron
    listed; dense, one read-out per neuron there is.
    """
    total = sum(block.n_neurons for block in decompositions)
    if not out.affine or 2 * top >= total:
        scores = torch.cat(
            [neuron_scores(block, out, token, progress=progress) for block in decompositions]
        )
        # topk would leave ties in no order
        order = scores.sort(descending=True, stable=True).indices[:top]
        certificate = Certificate(
            applies=out.affine,
            evaluated=total,
            total=total,
            kth_score=float(scores[order[-1]]),
            next_bound=None,
            slack=0.0,
        )
        return _ranked(decompositions, order, scores[order], certificate)
    if before is None:
        before = out.baseline(torch.stack([block.base for block in decompositions]), token)
    return _search(decompositions, out, before, top, progress)


def score_bounds(
    decompositions: Sequence[Decomposition], out: ReadOut, before: Baseline
) -> tuple[Float[Tensor, " neuron"], float]:
    """An upper bound of every neuron's score over all blocks, slack included; the largest slack.

    Exactly 0, without slack, for a neuron whose coefficient is 0: its score is 0.
    Source: log p is concave in the residual vector, so its tangent lies above it.

    Raises:
        InputError: If the norm is recomputed, for then no bound holds.
    """
    tangent = before.tangent
    if tangent is None:
        raise InputError("a recomputed norm has no bounds; use exact or published")
    eps = torch.finfo(out.dtype).eps
    relative = 4 * math.sqrt(tangent.gradient.shape[1]) * eps
    bounds, largest = [], 0.0
    for block, gradient, reach in zip(decompositions, tangent.gradient, tangent.reach, strict=True):
        slopes, norms = block.slopes(gradient)
        slack = (2 * relative * reach * block.per_neuron(norms).abs() + 32 * eps) * block.active()
        bounds.append(block.per_neuron(slopes) + slack)
        largest = max(largest, float(slack.max()))
    return torch.cat(bounds), largest


def _search(
    decompositions: Sequence[Decomposition],
    out: ReadOut,
    before: Baseline,
    top: int,
    progress: Progress | None,
) -> RankedNeurons:
    """Exact scores in order of the bound, until the ``top``-th best reaches every bound left."""
    bounds, slack = score_bounds(decompositions, out, before)
    active = torch.cat([block.active() for block in decompositions])
    # neurons that are off score 0: known without a read-out, and the first of them are enough
    flat = (~active).nonzero()[:top, 0]
    scores = torch.zeros(len(flat), dtype=out.dtype, device=bounds.device)
    left = bounds.where(active, -torch.inf)
    some = left.topk(min(top, int(active.sum()))).indices
    evaluated, batch = 0, max(32, top // 8)
    while len(some):
        flat = torch.cat([flat, some])
        scores = torch.cat([scores, exact_scores(decompositions, out, before, some)])
        evaluated += len(some)
        if progress is not None:
            progress(len(some))
        left[some] = -torch.inf
        kth = scores.topk(top).values[-1]
        some = ((left >= kth) & left.isfinite()).nonzero()[:, 0]
        some = some[left[some].topk(min(batch, len(some))).indices]
        batch *= 2  # where bounds are loose, few rounds over all of them
    # by number first, so that the stable sort leaves ties by layer, then number
    flat, order = flat.sort()
    scores = scores[order]
    best = scores.sort(descending=True, stable=True).indices[:top]
    certificate = Certificate(
        applies=True,
        evaluated=evaluated,
        total=len(bounds),
        kth_score=float(scores[best[-1]]),
        next_bound=float(left.max()) if evaluated < int(active.sum()) else None,
        slack=slack,
    )
    return _ranked(decompositions, flat[best], scores[best], certificate)


def exact_scores(
    decompositions: Sequence[Decomposition],
    out: ReadOut,
    before: Baseline,
    flat: Int[Tensor, " neuron"],
) -> Float[Tensor, " neuron"]:
    """Exact scores of neurons of any layer, given by their number across all blocks, together."""
    per_block = decompositions[0].n_neurons
    place, number = flat // per_block, flat % per_block
    parts = []
    for places, numbers in zip(
        place.split(out.rows_per_block), number.split(out.rows_per_block), strict=True
    ):
        vectors = decompositions[0].base.new_empty(len(places), before.resid.shape[1])
        for here, block in _by_block(places, decompositions):
            vectors[here] = block.vectors(numbers[here])
        parts.append(out.increase(before, places, vectors))
    return torch.cat(parts)


def _ranked(
    decompositions: Sequence[Decomposition],
    flat: Int[Tensor, " neuron"],
    score: Float[Tensor, " neuron"],
    certificate: Certificate,
) -> RankedNeurons:
    """Neurons given by their number across all ``decompositions``, in the order given."""
    first = decompositions[0]
    per_block = first.n_neurons
    place, number = flat // per_block, flat % per_block
    coefficient = torch.empty_like(score)
    for here, block in _by_block(place, decompositions):
        coefficient[here] = block.coefficients_of(number[here])
    layer = torch.tensor([block.layer for block in decompositions], device=flat.device)[place]
    head = source_pos = None
    index = number
    if isinstance(first, AttnDecomposition):
        head, source_pos, index = first.place(number)
        source_pos = None if first.summed else source_pos
    return RankedNeurons(
        kind="ffn" if head is None else "attn",
        layer=layer,
        number=number,
        head=head,
        source_pos=source_pos,
        index=index,
        coefficient=coefficient,
        score=score,
        certificate=certificate,
    )


def subvalues_of(
    decompositions: Sequence[Decomposition], neurons: RankedNeurons
) -> Float[Tensor, "neuron d_model"]:
    """The subvalue of each of these neurons, in their order."""
    layers = torch.tensor([block.layer for block in decompositions], device=neurons.layer.device)
    place = torch.searchsorted(layers, neurons.layer)
    rows = decompositions[0].base.new_empty(len(neurons), decompositions[0].base.shape[0])
    for here, block in _by_block(place, decompositions):
        rows[here] = block.subvalues(neurons.number[here])
    return rows


def _by_block(
    place: Int[Tensor, " neuron"], decompositions: Sequence[Decomposition]
) -> Iterator[tuple[Bool[Tensor, " neuron"], Decomposition]]:
    """Each block with the mask of the neurons that are its own."""
    for number, block in enumerate(decompositions):
        yield place == number, block
