"""The best: from the scores of all neurons to the ranked few, with ties in a fixed order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.decompose import AttnDecomposition, Decomposition
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.readout import LogProb
from tl_neuron_attr.scores import Progress, neuron_scores

Kind = Literal["ffn", "attn"]


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
        return [
            AttnNeuron(*place) for place in zip(layers, heads, indices, sources, strict=True)
        ]


def top_neurons(
    decompositions: Sequence[Decomposition],
    log_prob: LogProb,
    top: int,
    *,
    progress: Progress | None = None,
) -> RankedNeurons:
    """The ``top`` best neurons among blocks of one kind (all of them, if there are fewer).

    Every neuron is scored: the cost is one read-out per neuron.
    """
    scores = torch.cat(
        [neuron_scores(block, log_prob, progress=progress) for block in decompositions]
    )
    # topk would leave ties in no order
    order = scores.sort(descending=True, stable=True).indices[:top]
    return ranked(decompositions, order, scores[order])


def ranked(
    decompositions: Sequence[Decomposition],
    flat: Int[Tensor, " neuron"],
    score: Float[Tensor, " neuron"],
) -> RankedNeurons:
    """Neurons given by their number across all ``decompositions``, in the order given."""
    first = decompositions[0]
    per_block = first.n_neurons
    place, number = flat // per_block, flat % per_block
    coefficient = torch.empty_like(score)
    for here, block in _by_block(place, decompositions):
        coefficient[here] = block.coefficients_of(number[here])
    layer = torch.tensor([block.layer for block in decompositions], device=flat.device)[place]
    if isinstance(first, AttnDecomposition):
        head, source_pos, index = first.place(number)
        return RankedNeurons(
            kind="attn",
            layer=layer,
            number=number,
            head=head,
            source_pos=None if first.summed else source_pos,
            index=index,
            coefficient=coefficient,
            score=score,
        )
    return RankedNeurons(
        kind="ffn",
        layer=layer,
        number=number,
        head=None,
        source_pos=None,
        index=number,
        coefficient=coefficient,
        score=score,
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
