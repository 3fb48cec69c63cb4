"""Who fed each: one value neuron -> its largest inputs by name, the others in sum.

``query.py`` adds up over value neurons, and gives every earlier neuron one score. Here each value
neuron keeps its own inputs, so that a graph can be drawn of them; shares are the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.captured import Capture, Sources
from tl_neuron_attr.decompose import outlet, rows_in_use, slopes
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.query import neurons_at
from tl_neuron_attr.reading import (
    PreActivations,
    QueryConvention,
    QueryNeurons,
    Readings,
    positions_needed,
    pre_activations,
    readings,
    values_by_head,
    where_set_off,
)
from tl_neuron_attr.readout import DEFAULT_BUDGET
from tl_neuron_attr.topk import Certificate, Kind, RankedNeurons


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Neurons of one kind that feed value neurons: number i feeds value neuron ``value[i]``."""

    neurons: QueryNeurons
    """Largest score first: what each brings to this one value neuron, in nats."""
    value: Int[Tensor, " neuron"]

    __repr__ = brief


@dataclass(frozen=True, kw_only=True)
class QueryInputs:
    """What feeds each of some value neurons: its largest inputs by name, the others in sum.

    One row a value neuron, counted over all kinds in the order given; in nats. In ``exact``,
    ``embed``, ``attn``, ``ffn`` and ``bias`` sum to ``score``. All are 0 if it was left out.
    """

    score: Float[Tensor, " value"]
    """What the value neuron hands down."""
    position: Int[Tensor, " value"]
    """Where it is set off."""
    left_out: Bool[Tensor, " value"]
    """Whether it has no useful shares: in ``exact`` the ill-conditioned ones."""
    embed: Float[Tensor, " value"]
    """What the token brings: the embedding where the neuron is set off."""
    attn: Float[Tensor, " value"]
    """All attention before it, output biases included."""
    ffn: Float[Tensor, " value"]
    bias: Float[Tensor, " value"]
    token: Bool[Tensor, " value"]
    """Whether the token is among the inputs kept."""
    inputs: dict[Kind, Inputs]
    """The neurons among the inputs kept, by kind."""
    reached: Float[Tensor, " value"]
    """What share of all that sets the neuron off the inputs kept hold (0 if nothing does)."""

    __repr__ = brief


@full_precision()
def query_inputs(
    host: Host,
    captured: Capture,
    values: Sequence[RankedNeurons | QueryNeurons],
    sources: Sources | None = None,
    convention: QueryConvention = "exact",
    *,
    kinds: Sequence[Kind] = ("ffn", "attn"),
    share: float = 0.5,
    most: int = 5,
    opposing: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> QueryInputs:
    """The largest inputs of each of these value neurons, each value neuron for itself.

    Candidates are the token where it is set off, and the earlier neurons of ``kinds``. Those of
    positive share set it off. They are kept largest first until they hold ``share`` of the sum of
    all positive shares (no smaller set would), but ``most`` of them at the most. With ``opposing``
    those of negative share, which hold it back, are kept alike: as many again at the most.

    Values, sources and errors are those of ``query_scores``. Cost: a product of each layer's
    ``W_out``, and of its ``W_O``, with a vector for each value neuron. Memory: about ``budget``
    bytes, but at least a few floats for each attention neuron of a layer.
    """
    if convention not in get_args(QueryConvention):
        raise InputError(f"convention must be 'exact' or 'published' here, got {convention!r}")
    placed = where_set_off(captured, values)
    sources = positions_needed(captured, placed, sources)
    rows = readings(host, sources, placed, convention, None)
    score = torch.cat([each.neurons.score for each in placed]).to(rows.key.dtype)
    of_one_nat = [
        replace(each, neurons=replace(each.neurons, score=torch.ones_like(each.neurons.score)))
        for each in placed
    ]
    shares = pre_activations(sources, rows, of_one_nat, convention)
    readers = _readers(rows, shares, len(score))
    signs = (1, -1) if opposing else (1,)
    # no more than there can be: a limit is not an order of memory
    n_blocks = 2 * host.n_layers
    most = min(most, 1 + n_blocks * _stride(host, captured))
    best = [_Largest.of_tokens(readers.parts[:, 0], most, sign) for sign in signs]
    for live, first, found in _candidates(host, captured, sources, readers, kinds, budget):
        for each in best:
            each.offer(live, first, found)
    kept = [each.kept(share) for each in best]
    value, flat, part = (torch.cat(columns) for columns in zip(*kept, strict=True))
    brought = part * score[value]
    block, number = flat // _stride(host, captured), flat % _stride(host, captured)
    inputs: dict[Kind, Inputs] = {}
    for kind in kinds:
        here = ((flat != _TOKEN) & (block % 2 == _BLOCK[kind])).nonzero()[:, 0]
        here = here[brought[here].sort(descending=True, stable=True).indices]
        neurons = neurons_at(
            host,
            captured,
            sources,
            kind,
            layer=block[here] // 2,
            number=number[here],
            place=readers.place[value[here]],
            score=brought[here],
            total=len(here),
        )
        inputs[kind] = Inputs(neurons=neurons, value=value[here])
    return QueryInputs(
        score=score.masked_fill(readers.left_out, 0.0),
        position=sources.positions[readers.place],
        left_out=readers.left_out,
        embed=score * readers.parts[:, 0],
        attn=score * readers.parts[:, 1::2].sum(1),
        ffn=score * readers.parts[:, 2::2].sum(1),
        bias=score * readers.bias,
        token=torch.zeros_like(readers.left_out).index_fill(0, value[flat == _TOKEN], True),
        inputs=inputs,
        reached=best[0].reached(*kept[0]),
    )


def together(found: QueryNeurons) -> QueryNeurons:
    """Each neuron once at each position, its scores added up, best first."""
    neurons = found.neurons
    keys = torch.stack([neurons.layer, neurons.number, found.position], 1)
    distinct, which = keys.unique(dim=0, return_inverse=True)
    score = neurons.score.new_zeros(len(distinct)).index_add(0, which, neurons.score)
    places = torch.arange(len(which), device=which.device)
    place = torch.zeros_like(distinct[:, 0]).index_copy(0, which, places)
    best = score.sort(descending=True, stable=True).indices
    once = replace(neurons.at(place[best]), score=score[best])
    certificate = Certificate.of_all(len(distinct), once.score)
    return QueryNeurons(
        neurons=replace(once, certificate=certificate), position=found.position[place[best]]
    )


@dataclass(frozen=True, kw_only=True)
class _Readers:
    """What value neurons read, one row each: a gated one's two pre-activations are one here."""

    layer: Int[Tensor, " value"]
    place: Int[Tensor, " value"]
    after_attn: Bool[Tensor, " value"]
    key: Float[Tensor, "value d_model"]
    """The dot product with it is a share."""
    parts: Float[Tensor, "value source"]
    """Shares of the embedding and of each layer."""
    bias: Float[Tensor, " value"]
    left_out: Bool[Tensor, " value"]


def _readers(rows: Readings, shares: PreActivations, n_values: int) -> _Readers:
    """``shares`` are of value neurons that each hand down 1."""

    def summed(of_rows: Float[Tensor, "row ..."]) -> Float[Tensor, "value ..."]:
        zeros = of_rows.new_zeros(n_values, *of_rows.shape[1:])
        return zeros.index_add(0, rows.value, of_rows)

    # where it is and what comes before it is the same for both rows of a neuron
    numbers = torch.arange(len(rows.value), device=rows.value.device)
    row = torch.zeros_like(numbers[:n_values]).index_copy(0, rows.value, numbers)
    weight = shares.weight[:, None]
    return _Readers(
        layer=rows.layer[row],
        place=rows.place[row],
        after_attn=rows.after_attn[row],
        key=summed(weight * rows.key),
        parts=summed(weight * shares.parts),
        bias=summed(shares.weight * shares.bias),
        left_out=shares.left_out[row],
    )


_TOKEN = -1
_BLOCK: dict[Kind, int] = {"attn": 0, "ffn": 1}


def _stride(host: Host, captured: Capture) -> int:
    """Candidates are numbered by block (attention and FFN of layer 0, of layer 1, ...): the step
    from one block to the next."""
    return max(host.d_mlp, host.n_heads * captured.v.shape[1] * host.d_head)


def _candidates(
    host: Host,
    captured: Capture,
    sources: Sources,
    readers: _Readers,
    kinds: Sequence[Kind],
    budget: int,
) -> Iterator[tuple[Int[Tensor, " some"], int, Float[Tensor, "some neuron"]]]:
    """Some value neurons, and their shares of every neuron of one earlier block.

    The number of the block's first neuron stands between.
    """
    stride = _stride(host, captured)
    some = max(1, budget // (4 * stride * readers.key.itemsize))
    for layer in range(int((readers.layer + readers.after_attn).max())):
        if "attn" in kinds:
            live = (readers.layer + readers.after_attn > layer).nonzero()[:, 0]
            through = outlet(host, sources, "attn", layer, readers.place[live])
            slope = slopes(host.W_O(layer).flatten(0, 1), through(readers.key[live]))
            v = values_by_head(host, captured, layer)
            for here, worth in zip(live.split(some), slope.split(some), strict=True):
                paid = sources.pattern[layer][:, readers.place[here]]
                paid = rearrange(paid, "head value pos -> value head pos 1")
                worth = rearrange(worth, "value (head d_head) -> value head 1 d_head", head=len(v))
                yield here, (2 * layer + _BLOCK["attn"]) * stride, (paid * worth * v).flatten(1)
        if "ffn" in kinds:
            live = (readers.layer > layer).nonzero()[:, 0]
            for here in live.split(some):
                through = outlet(host, sources, "ffn", layer, readers.place[here])
                coefficients = sources.mlp_post[layer, readers.place[here]]
                rows = rows_in_use(host, layer, coefficients)
                slope = slopes(rows, through(readers.key[here]))
                yield here, (2 * layer + _BLOCK["ffn"]) * stride, slope * coefficients


@dataclass(kw_only=True)
class _Largest:
    """The largest shares of each value neuron so far, and the sum of all positive ones.

    With ``sign`` -1 those furthest below 0, and the sum of all negative ones, signs turned.
    """

    sign: int
    share: Float[Tensor, "value most"]
    flat: Int[Tensor, "value most"]
    total: Float[Tensor, " value"]

    @classmethod
    def of_tokens(cls, share: Float[Tensor, " value"], most: int, sign: int) -> "_Largest":
        """At first there are the tokens."""
        first = sign * share[:, None]
        return cls(
            sign=sign,
            share=torch.nn.functional.pad(first, (0, most - 1)),
            flat=torch.full((len(share), most), _TOKEN, device=share.device),
            total=first[:, 0].clamp(min=0),
        )

    def offer(
        self, live: Int[Tensor, " some"], first: int, shares: Float[Tensor, "some neuron"]
    ) -> None:
        """More candidates of some value neurons, numbered from ``first``."""
        shares = self.sign * shares
        most = self.share.shape[1]
        top = shares.topk(min(most, shares.shape[1]), dim=1)
        merged = torch.cat([self.share[live], top.values], 1)
        flat = torch.cat([self.flat[live], top.indices + first], 1)
        order = merged.sort(dim=1, descending=True, stable=True).indices[:, :most]
        self.share[live], self.flat[live] = merged.gather(1, order), flat.gather(1, order)
        self.total[live] += shares.clamp_(min=0).sum(1)

    def kept(
        self, share: float
    ) -> tuple[Int[Tensor, " input"], Int[Tensor, " input"], Float[Tensor, " input"]]:
        """The fewest that hold ``share`` of the sum: value neuron, number, and own share."""
        before = self.share.cumsum(1) - self.share
        value, place = ((self.share > 0) & (before < share * self.total[:, None])).nonzero().T
        return value, self.flat[value, place], self.sign * self.share[value, place]

    def reached(
        self,
        value: Int[Tensor, " input"],
        flat: Int[Tensor, " input"],
        part: Float[Tensor, " input"],
    ) -> Float[Tensor, " value"]:
        """What part of the sum those kept hold."""
        held = torch.zeros_like(self.total).index_add(0, value, self.sign * part)
        return torch.where(self.total > 0, held / self.total, 0.0)
