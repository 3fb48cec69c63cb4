"""Who set them off: earlier components -> how much they feed the value neurons.

A value neuron n forms its coefficient from a pre-activation, ``x . K_n + b_n``: x is the residual
stream where that happens (at the read position for an FFN neuron, at the source position for an
attention neuron), ``K_n`` its subkey seen through the norm in front of it. x is a sum of what
earlier components q wrote, so each of them has a share::

    share(q, n) = q . K_n / (x . K_n + b_n)        score(q) = sum over n of Imp(n) * share(q, n)

Scores are in nats: the value neurons' own scores, handed down to what feeds them. Source: Yu &
Ananiadou (2024), query neurons. The norm in front is frozen at the scale it has in the run.

``exact``: the norm's mean is taken out of ``K_n`` (LayerNorm), and what enters through biases (the
norm's, and that of the pre-activation) is a source of its own, so that shares sum to 1. A neuron
of a gated FFN has two pre-activations, and its score is handed down half through each. A value
neuron with a pre-activation below 5 % of the sum of its absolute parts is *ill-conditioned*: its
shares would be large numbers that cancel. It is left out of all sums, and listed.

``published``: what the notebooks compute, with their quirks: no mean taken out; no biases, so that
shares do not sum to 1; a signed denominator, however small, so that a value neuron whose total is
near 0 dominates; in a gated FFN the *subvalue* in place of the subkey, a mistake. There, query
neurons are FFN neurons of the layers below, of attention value neurons; what is offered beyond
that is the same formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.captured import Capture, Sources
from tl_neuron_attr.decompose import outlet, rows_in_use, slopes
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host
from tl_neuron_attr.precision import full_precision
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
from tl_neuron_attr.topk import Certificate, Kind, RankedNeurons, largest


@dataclass(frozen=True, kw_only=True)
class QueryScores:
    """What earlier components bring to some value neurons, in nats.

    In ``exact``, ``embed``, ``attn``, ``ffn`` and ``bias`` sum to the scores of the value neurons
    that were not left out. The heads of a layer sum to its ``attn`` less what its output bias
    brings, its FFN neurons to its ``ffn`` less what its own brings.
    """

    values: tuple[RankedNeurons, ...]
    """The value neurons, by kind."""
    convention: QueryConvention
    inputs: PreActivations
    """Each value neuron's pre-activations: totals, parts, and whether they are ill-conditioned."""
    embed: Float[Tensor, ""]
    """What entered the first block."""
    bias: Float[Tensor, ""]
    """What entered through the biases in front of the value neurons; 0 in ``published``."""
    attn: Float[Tensor, " layer"]
    ffn: Float[Tensor, " layer"]
    attn_neurons: Float[Tensor, "layer head d_head"]
    """Each attention neuron, over all positions and all sources."""
    ffn_by_position: Float[Tensor, "source layer d_mlp"]
    """Each FFN neuron, for what it writes at each position of ``sources``."""
    attn_slopes: Float[Tensor, "source layer head d_head"]
    """Attention neurons by source, per unit of coefficient: they are too many to keep."""
    ffn_depth: int
    """FFN neurons of layers below this are earlier than some value neuron."""
    attn_depth: int
    """Likewise for attention."""
    sources: Sources
    """What happened wherever value neurons are set off, and at the read position."""

    __repr__ = brief

    @property
    def ffn_neurons(self) -> Float[Tensor, "layer d_mlp"]:
        """Each FFN neuron, over all positions: the published score."""
        return self.ffn_by_position.sum(0)

    @property
    def heads(self) -> Float[Tensor, "layer head"]:
        """Each head, over all positions."""
        return self.attn_neurons.sum(-1)

    @property
    def left_out(self) -> Bool[Tensor, " value"]:
        """Which value neurons are in no sum: in ``exact`` the ill-conditioned ones."""
        return self._any_row(self.inputs.left_out)

    @property
    def ill_conditioned(self) -> Bool[Tensor, " value"]:
        """Which value neurons have an ill-conditioned pre-activation, left out or not."""
        return self._any_row(self.inputs.ill_conditioned)

    def _any_row(self, rows: Bool[Tensor, " row"]) -> Bool[Tensor, " value"]:
        found = torch.zeros_like(torch.cat([ranked.layer for ranked in self.values]))
        return found.index_add(0, self.inputs.value, rows.long()) > 0


@full_precision()
def query_scores(
    host: Host,
    captured: Capture,
    values: Sequence[RankedNeurons | QueryNeurons],
    sources: Sources | None = None,
    convention: QueryConvention = "exact",
    *,
    through: Literal["gate", "up"] | None = None,
) -> QueryScores:
    """How much each earlier component feeds these value neurons, FFN, attention, or both.

    Query neurons may stand in for value neurons, each at its position: what they hand down is
    their score, so that these are the query neurons' own query neurons.

    ``sources`` is what happened where they are set off: at the source positions of attention
    neurons, and where FFN query neurons fire (``capture_sources``); the read position needs none.
    Scores are sums over value neurons: they hand down ``values``' own scores. A neuron of layer 0
    is fed by the embedding (and, an FFN neuron, by attention) alone. ``through`` hands the scores
    of gated FFN neurons down through one of their two pre-activations; by default half through
    each.

    Cost: one product of a layer's ``W_out``, and of its ``W_O``, with one vector for each position
    where value neurons are set off, however many they are. Memory: a float for each FFN neuron and
    position.

    Raises:
        InputError: If there is no value neuron; if ``sources`` lacks a position, or an attention
            neuron has none; if the convention is unknown, or ``through`` not what neurons have.
    """
    if convention not in get_args(QueryConvention):
        raise InputError(f"convention must be 'exact' or 'published' here, got {convention!r}")
    if through is not None and (not host.gated or convention == "published"):
        raise InputError(
            f"through={through!r} is for gated FFNs in exact: no FFN neuron has two inputs here"
        )
    if through not in (None, "gate", "up"):
        raise InputError(f"through must be 'gate', 'up' or None for both, got {through!r}")
    placed = where_set_off(captured, values)
    sources = positions_needed(captured, placed, sources)
    rows = readings(host, sources, placed, convention, through)
    inputs = pre_activations(sources, rows, placed, convention)
    by_source = (inputs.weight[:, None] * inputs.parts).sum(0)
    to_attn, to_ffn = _keys_above(rows, inputs, host.n_layers, len(sources.positions))

    # layers below which some value neuron is fed
    ffn_depth = int(rows.layer.max())
    attn_depth = int((rows.layer + rows.after_attn).max())
    ffn = torch.zeros_like(sources.mlp_post).transpose(0, 1).contiguous()
    attn_slopes = ffn.new_zeros(len(ffn), host.n_layers, host.n_heads, host.d_head)
    attn_neurons = ffn.new_zeros(host.n_layers, host.n_heads, host.d_head)
    for layer in range(ffn_depth):
        live = to_ffn[layer].any(-1).nonzero()[:, 0]  # positions that some value neuron reads later
        written = outlet(host, sources, "ffn", layer, live)
        coefficients = sources.mlp_post[layer, live]
        written_rows = rows_in_use(host, layer, coefficients)
        ffn[live, layer] = slopes(written_rows, written(to_ffn[layer, live])) * coefficients
    for layer in range(attn_depth):
        live = to_attn[layer].any(-1).nonzero()[:, 0]
        written = outlet(host, sources, "attn", layer, live)
        slope = slopes(host.W_O(layer).flatten(0, 1), written(to_attn[layer, live]))
        attn_slopes[live, layer] = slope.unflatten(1, (host.n_heads, host.d_head))
        z = sources.pattern[layer] @ values_by_head(host, captured, layer)
        attn_neurons[layer] = (z * attn_slopes[:, layer].transpose(0, 1)).sum(1)
    return QueryScores(
        values=tuple(each.neurons for each in placed),
        convention=convention,
        inputs=inputs,
        embed=by_source[0],
        bias=(inputs.weight * inputs.bias).sum(),
        attn=by_source[1::2],
        ffn=by_source[2::2],
        attn_neurons=attn_neurons,
        ffn_by_position=ffn,
        attn_slopes=attn_slopes,
        ffn_depth=ffn_depth,
        attn_depth=attn_depth,
        sources=sources,
    )


def _keys_above(
    rows: Readings, inputs: PreActivations, n_layers: int, n_places: int
) -> tuple[Float[Tensor, "layer source d_model"], Float[Tensor, "layer source d_model"]]:
    """One vector a layer and position, for what attention writes there and for what the FFN does.

    The dot product with it is the score, for it is the sum of all keys that read it from there
    on, each by what a unit of it is worth: a score is linear in them.
    """
    shape = (n_layers * n_places, rows.key.shape[1])
    flat = rows.layer * n_places + rows.place
    keys = inputs.weight[:, None] * rows.key
    read_attn = torch.where(rows.after_attn[:, None], keys, 0.0)
    own = keys.new_zeros(shape).index_add(0, flat, keys).view(n_layers, n_places, -1)
    after = keys.new_zeros(shape).index_add(0, flat, read_attn).view(n_layers, n_places, -1)
    from_here_up = own.flip(0).cumsum(0).flip(0)
    above = torch.cat([from_here_up[1:], torch.zeros_like(from_here_up[:1])])
    return above + after, above


# --- the best query neurons -------------------------------------------------------------------


@full_precision()
def top_query_neurons(
    host: Host,
    captured: Capture,
    scores: QueryScores,
    top: int,
    kind: Kind = "ffn",
    *,
    by_position: bool = False,
) -> QueryNeurons:
    """The ``top`` query neurons of a kind with the largest scores (all, if there are fewer).

    Only neurons earlier than some value neuron are candidates: of a value neuron of layer 0 there
    is no FFN neuron to list. Neurons are summed over the positions where they feed value neurons,
    as published, or, with ``by_position``, listed for each position by itself.

    Cost: for attention neurons one product a layer; one layer's are in memory at a time.
    """
    find = _top_ffn if kind == "ffn" else _top_attn
    return find(host, captured, scores, top, by_position)


def _top_ffn(
    host: Host, captured: Capture, scores: QueryScores, top: int, by_position: bool
) -> QueryNeurons:
    each = scores.ffn_by_position[:, : scores.ffn_depth]
    ranked = (each if by_position else each.sum(0, keepdim=True)).flatten()
    best = largest(ranked, top)
    index = best % host.d_mlp
    layer = best // host.d_mlp % max(1, scores.ffn_depth)
    if by_position:
        place = best // (host.d_mlp * max(1, scores.ffn_depth))
    else:
        place = each[:, layer, index].abs().argmax(0)
    score = ranked[best]
    return neurons_at(
        host, captured, scores.sources, "ffn", layer, index, place, score, len(ranked)
    )


def _top_attn(
    host: Host, captured: Capture, scores: QueryScores, top: int, by_position: bool
) -> QueryNeurons:
    n_pos, d_head = captured.v.shape[1], host.d_head
    n_places = len(scores.sources.positions)
    groups = [[place] for place in range(n_places)] if by_position else [[*range(n_places)]]
    nothing = torch.zeros(0, dtype=torch.long, device=captured.v.device)
    score, layer, number, place = captured.v.new_zeros(0), nothing, nothing, nothing
    for below in range(scores.attn_depth):
        v = values_by_head(host, captured, below)
        slope = scores.attn_slopes[:, below].transpose(0, 1)
        for places in groups:
            paid = scores.sources.pattern[below][:, places].transpose(1, 2)
            here = (v * (paid @ slope[:, places])).flatten()
            found = largest(here, top)
            score = torch.cat([score, here[found]])
            layer = torch.cat([layer, torch.full_like(found, below)])
            number = torch.cat([number, found])
            place = torch.cat([place, torch.full_like(found, places[0])])
    best = largest(score, top)
    score, layer, number, place = score[best], layer[best], number[best], place[best]
    head, source_pos, index = number // (n_pos * d_head), number // d_head % n_pos, number % d_head
    if not by_position:
        paid = scores.sources.pattern[layer, head, :, source_pos].T
        place = (paid * scores.attn_slopes[:, layer, head, index]).abs().argmax(0)
    total = scores.attn_depth * host.n_heads * n_pos * d_head * len(groups)
    return neurons_at(host, captured, scores.sources, "attn", layer, number, place, score, total)


def neurons_at(
    host: Host,
    captured: Capture,
    sources: Sources,
    kind: Kind,
    layer: Int[Tensor, " neuron"],
    number: Int[Tensor, " neuron"],
    place: Int[Tensor, " neuron"],
    score: Float[Tensor, " neuron"],
    total: int,
) -> QueryNeurons:
    """Neurons by layer, number and place in ``sources``, with what else is known of them."""
    head = source_pos = None
    index = number
    if kind == "ffn":
        coefficient = sources.mlp_post[layer, place, index]
    else:
        n_pos, d_head = captured.v.shape[1], host.d_head
        head, source_pos, index = (
            number // (n_pos * d_head),
            number // d_head % n_pos,
            number % d_head,
        )
        group = head // (host.n_heads // captured.v.shape[2])
        paid = sources.pattern[layer, head, place, source_pos]
        coefficient = paid * captured.v[layer, source_pos, group, index]
    return QueryNeurons(
        neurons=RankedNeurons(
            kind=kind,
            layer=layer,
            number=number,
            head=head,
            source_pos=source_pos,
            index=index,
            coefficient=coefficient,
            score=score,
            certificate=Certificate.of_all(total, score),
        ),
        position=sources.positions[place],
    )
