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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.capture import Capture, Sources
from tl_neuron_attr.decompose import attn_decomposition, ffn_decomposition, slopes
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, Norm
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.prompts import Target
from tl_neuron_attr.readout import DEFAULT_BUDGET, ReadOut, full_precision
from tl_neuron_attr.topk import Certificate, Kind, RankedNeurons, exact_scores, largest

QueryConvention = Literal["exact", "published"]

ILL_CONDITIONED = 0.05
"""A pre-activation below this fraction of the sum of its absolute parts has no useful shares."""


@dataclass(frozen=True, kw_only=True)
class PreActivations:
    """What the value neurons compute their coefficients from, as sums over sources.

    One row a pre-activation: one for each neuron, two in a gated FFN. Sources are the embedding,
    then attention and FFN of layer 0, of layer 1, ...; ``parts`` is 0 for those that come later.
    Layers are given with their output biases. In ``published`` nothing is divided by the norm's
    scale, which cancels in shares.
    """

    value: Int[Tensor, " row"]
    """Which value neuron, counted over all kinds in the order given."""
    input: tuple[str, ...]
    """``v``; ``pre``, or ``gate`` and ``up``; ``subvalue`` in the notebooks' mistake."""
    layer: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    """Where it is formed: the source position, or the read position."""
    parts: Float[Tensor, "row source"]
    bias: Float[Tensor, " row"]
    """What enters through the norm's bias and the pre-activation's own."""
    total: Float[Tensor, " row"]
    """The pre-activation itself: ``x . K + b``."""
    absolute: Float[Tensor, " row"]
    """Sum of the absolute parts and bias."""
    ill_conditioned: Bool[Tensor, " row"]
    left_out: Bool[Tensor, " row"]
    """Whether the row is in no sum: in ``exact`` one of its neuron's rows is ill-conditioned."""
    weight: Float[Tensor, " row"]
    """Nats per unit of the parts: ``Imp / total`` (halved with two rows), 0 if left out."""

    @property
    def shares(self) -> Float[Tensor, "row source"]:
        """Each source's share of each pre-activation; with the bias's they sum to 1 (``exact``)."""
        return self.parts / self.total[:, None]


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
    heads: Float[Tensor, "layer head"]
    ffn_by_position: Float[Tensor, "source layer d_mlp"]
    """Each FFN neuron, for what it writes at each position of ``sources``."""
    attn_slopes: Float[Tensor, "source layer head d_head"]
    """The same for attention neurons, per unit of coefficient: they are too many to keep."""
    ffn_depth: int
    """FFN neurons of layers below this are earlier than some value neuron."""
    attn_depth: int
    """Likewise for attention."""
    sources: Sources
    """What happened wherever value neurons are set off, and at the read position."""

    @property
    def ffn_neurons(self) -> Float[Tensor, "layer d_mlp"]:
        """Each FFN neuron, over all positions: the published score."""
        return self.ffn_by_position.sum(0)

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


@dataclass(frozen=True, kw_only=True)
class QueryNeurons:
    """The best query neurons, and where they fire."""

    neurons: RankedNeurons
    """Scored as query neurons, in nats; coefficients are those at ``position``."""
    position: Int[Tensor, " neuron"]
    """Where the neuron feeds the value neurons; if positions were summed, where it does most."""

    @property
    def set_off(self) -> Int[Tensor, " neuron"]:
        """Where its own pre-activation is formed: an attention neuron's at its source position."""
        return self.position if self.neurons.source_pos is None else self.neurons.source_pos


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
    if through is not None and (host.W_gate(0) is None or convention == "published"):
        raise InputError(
            f"through={through!r} is for gated FFNs in exact: no FFN neuron has two inputs here"
        )
    if through not in (None, "gate", "up"):
        raise InputError(f"through must be 'gate', 'up' or None for both, got {through!r}")
    placed = _placed(captured, values)
    sources = _positions_needed(captured, placed, sources)
    rows = _rows(host, sources, placed, convention, through)
    inputs = _pre_activations(sources, rows, placed, convention)
    by_source = (inputs.weight[:, None] * inputs.parts).sum(0)
    to_attn, to_ffn = _keys_above(rows, inputs, host.n_layers, len(sources.positions))

    # layers below which some value neuron is fed
    ffn_depth = int(rows.layer.max())
    attn_depth = int((rows.layer + rows.after_attn).max())
    ffn = torch.zeros_like(sources.mlp_post).transpose(0, 1).contiguous()
    attn_slopes = ffn.new_zeros(len(ffn), host.n_layers, host.n_heads, host.d_head)
    heads = ffn.new_zeros(host.n_layers, host.n_heads)
    for layer in range(ffn_depth):
        live = to_ffn[layer].any(-1).nonzero()[:, 0]  # positions that some value neuron reads later
        slope, _ = slopes(host.W_out(layer), to_ffn[layer, live])
        ffn[live, layer] = slope * sources.mlp_post[layer, live]
    for layer in range(attn_depth):
        live = to_attn[layer].any(-1).nonzero()[:, 0]
        slope, _ = slopes(host.W_O(layer).flatten(0, 1), to_attn[layer, live])
        attn_slopes[live, layer] = slope.unflatten(1, (host.n_heads, host.d_head))
        z = sources.pattern[layer] @ _values_by_head(host, captured, layer)
        heads[layer] = (z * attn_slopes[:, layer].transpose(0, 1)).sum((1, 2))
    return QueryScores(
        values=tuple(each.neurons for each in placed),
        convention=convention,
        inputs=inputs,
        embed=by_source[0],
        bias=(inputs.weight * inputs.bias).sum(),
        attn=by_source[1::2],
        ffn=by_source[2::2],
        heads=heads,
        ffn_by_position=ffn,
        attn_slopes=attn_slopes,
        ffn_depth=ffn_depth,
        attn_depth=attn_depth,
        sources=sources,
    )


# --- what the value neurons read --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """One row a pre-activation, before anything is multiplied with it."""

    value: Int[Tensor, " row"]
    input: tuple[str, ...]
    layer: Int[Tensor, " row"]
    place: Int[Tensor, " row"]
    after_attn: Bool[Tensor, " row"]
    """Whether the attention of its own layer feeds it: an FFN neuron in a sequential block."""
    key: Float[Tensor, "row d_model"]
    """The subkey through the norm in front: mean taken out, gain and scale put in."""
    bias: Float[Tensor, " row"]
    x: Float[Tensor, "row d_model"]
    """The residual stream it is formed from."""


def _placed(
    captured: Capture, values: Sequence[RankedNeurons | QueryNeurons]
) -> list[QueryNeurons]:
    """The value neurons where they are: at the read position, unless it is said where."""
    read_pos = captured.prompt.read_pos
    placed = [
        each
        if isinstance(each, QueryNeurons)
        else QueryNeurons(neurons=each, position=torch.full_like(each.layer, read_pos))
        for each in values
    ]
    if not any(len(each.neurons) for each in placed):
        raise InputError("there is no value neuron to find query neurons of")
    for each in placed:
        if each.neurons.kind == "attn" and each.neurons.source_pos is None:
            raise InputError(
                "attention neurons summed over source positions are set off at each of them; "
                "take attention neurons by source position"
            )
    return placed


def _rows(
    host: Host,
    sources: Sources,
    values: Sequence[QueryNeurons],
    convention: QueryConvention,
    through: str | None,
) -> _Rows:
    """The value neurons' pre-activations, layer by layer."""
    found: list[_Rows] = []
    first = 0
    for each in values:
        ranked = each.neurons
        norm_of = host.ffn_norm if ranked.kind == "ffn" else host.attn_norm
        after_attn = ranked.kind == "ffn" and not host.parallel
        for layer in ranked.layer.unique().tolist():
            here = (ranked.layer == layer).nonzero()[:, 0]
            place = torch.searchsorted(sources.positions, each.set_off[here])
            x = sources.resid_pre[layer, place]
            if after_attn:
                x = x + sources.attn_out[layer, place]
            for name, subkey, bias in subkeys(host, ranked, here, layer, convention):
                if through is not None and name in ("gate", "up") and name != through:
                    continue
                key, added = _through_norm(host, norm_of(layer), x, subkey.to(x.dtype), convention)
                if bias is not None and convention == "exact":
                    added = added + bias.to(x.dtype)
                found.append(
                    _Rows(
                        value=here + first,
                        input=(name,) * len(here),
                        layer=torch.full_like(here, layer),
                        place=place,
                        after_attn=torch.full_like(here, after_attn, dtype=torch.bool),
                        key=key,
                        bias=added,
                        x=x,
                    )
                )
        first += len(ranked)
    names = ("value", "layer", "place", "after_attn", "key", "bias", "x")
    stacked = {name: torch.cat([getattr(rows, name) for rows in found]) for name in names}
    return _Rows(input=tuple(name for rows in found for name in rows.input), **stacked)


def subkeys(
    host: Host,
    ranked: RankedNeurons,
    here: Int[Tensor, " some"],
    layer: int,
    convention: QueryConvention,
) -> Iterator[tuple[str, Float[Tensor, "some d_model"], Float[Tensor, " some"] | None]]:
    """Each input of some neurons of one layer: its name, subkeys, and biases if it has any."""
    index = ranked.index[here]
    if ranked.head is not None:
        W_V, b_V = host.W_V(layer), host.b_V(layer)
        group = ranked.head[here] // (host.n_heads // W_V.shape[0])
        yield "v", W_V[group, :, index], None if b_V is None else b_V[group, index]
        return
    W_gate = host.W_gate(layer)
    if W_gate is not None and convention == "published":
        yield "subvalue", host.W_out(layer)[index], None
        return
    if W_gate is not None:
        b_gate = host.b_gate(layer)
        yield "gate", W_gate[:, index].T, None if b_gate is None else b_gate[index]
    b_in = host.b_in(layer)
    yield (
        "pre" if W_gate is None else "up",
        host.W_in(layer)[:, index].T,
        None if b_in is None else b_in[index],
    )


def through_norm(
    host: Host,
    norm: Norm,
    x: Float[Tensor, "*#batch d_model"],
    vectors: Float[Tensor, "*#batch d_model"],
) -> Float[Tensor, "*batch d_model"]:
    """What each vector adds to what a sub-layer reads, its norm frozen at the scale it has for x.

    The norm's linear part: mean taken out (LayerNorm), scale and gain put in, no bias. What the
    sub-layer reads of ``x`` is this of ``x`` itself, and the norm's bias.
    """
    if host.norm == "layer_norm":
        x, vectors = (each - each.mean(-1, keepdim=True) for each in (x, vectors))
    read = vectors / (x.square().mean(-1, keepdim=True) + host.eps).sqrt()
    return read if norm.gain is None else read * norm.gain.to(read.dtype)


def _through_norm(
    host: Host,
    norm: Norm,
    x: Float[Tensor, "row d_model"],
    subkey: Float[Tensor, "row d_model"],
    convention: QueryConvention,
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"]]:
    """(key, bias) with ``norm(x) . subkey = x . key + bias``; as published, up to scale and mean.

    The norm is frozen at the scale it has for ``x``.
    """
    key = subkey if norm.gain is None else subkey * norm.gain.to(x.dtype)
    if convention == "published":
        return key, torch.zeros_like(x[:, 0])
    if host.norm == "layer_norm":
        key = key - key.mean(-1, keepdim=True)
        x = x - x.mean(-1, keepdim=True)
    key = key / (x.square().mean(-1, keepdim=True) + host.eps).sqrt()
    bias = torch.zeros_like(x[:, 0]) if norm.bias is None else subkey @ norm.bias.to(x.dtype)
    return key, bias


def _pre_activations(
    sources: Sources,
    rows: _Rows,
    values: Sequence[QueryNeurons],
    convention: QueryConvention,
) -> PreActivations:
    """Every row split over the sources before it, with what it hands down of its neuron's score."""
    n_layers = sources.resid_pre.shape[0]
    parts = rows.key.new_zeros(len(rows.key), 1 + 2 * n_layers)
    for place in rows.place.unique().tolist():
        here = rows.place == place
        wrote = torch.stack([sources.attn_out[:, place], sources.mlp_out[:, place]], 1)
        vectors = torch.cat([sources.resid_pre[:1, place], wrote.flatten(0, 1)])
        parts[here] = rows.key[here] @ vectors.T
    n_earlier = 1 + 2 * rows.layer + rows.after_attn
    parts[torch.arange(parts.shape[1], device=parts.device) >= n_earlier[:, None]] = 0.0
    total = (rows.x * rows.key).sum(-1) + rows.bias
    absolute = parts.abs().sum(-1) + rows.bias.abs()
    ill_conditioned = total.abs() < ILL_CONDITIONED * absolute
    out = total == 0  # then no share is defined, in no convention
    if convention == "exact":
        n_bad = torch.zeros_like(rows.value).index_add_(0, rows.value, ill_conditioned.long())
        out = out | (n_bad[rows.value] > 0)
    n_rows = torch.bincount(rows.value)
    score = torch.cat([each.neurons.score for each in values]).to(total.dtype)
    return PreActivations(
        value=rows.value,
        input=rows.input,
        layer=rows.layer,
        position=sources.positions[rows.place],
        parts=parts,
        bias=rows.bias,
        total=total,
        absolute=absolute,
        ill_conditioned=ill_conditioned,
        left_out=out,
        weight=(score[rows.value] / (n_rows[rows.value] * total)).masked_fill(out, 0.0),
    )


def _keys_above(
    rows: _Rows, inputs: PreActivations, n_layers: int, n_places: int
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


def _positions_needed(
    captured: Capture, values: Sequence[QueryNeurons], sources: Sources | None
) -> Sources:
    """What happened at the positions where value neurons are set off; the read position is last."""
    read_pos = captured.prompt.read_pos
    needed = {position for each in values for position in each.set_off.tolist()}
    given = [] if sources is None else sources.positions.tolist()
    missing = sorted(needed - {*given, read_pos})
    if missing:
        raise InputError(
            f"it is not known what happened at source position {missing[0]}: give "
            f"sources=capture_sources(host, captured, {sorted(needed - {read_pos})})"
        )
    reads = {
        "resid_pre": captured.resid_pre[:, None],
        "attn_out": captured.attn_out[:, None],
        "mlp_out": captured.mlp_out[:, None],
        "mlp_post": captured.mlp_post[:, None],
        "pattern": captured.pattern[:, :, None],
    }
    before = [place for place, position in enumerate(given) if position in needed - {read_pos}]
    positions = [*(given[place] for place in before), read_pos]
    tensors = {
        name: value
        if sources is None or not before
        else torch.cat([getattr(sources, name)[..., before, :], value], -2)
        for name, value in reads.items()
    }
    return Sources(positions=torch.tensor(positions, device=captured.v.device), **tensors)


def _values_by_head(host: Host, captured: Capture, layer: int) -> Float[Tensor, "head pos d_head"]:
    """The value vectors each head attends to."""
    v = captured.v[layer]
    group = torch.arange(host.n_heads, device=v.device) // (host.n_heads // v.shape[1])
    return rearrange(v[:, group], "pos head d_head -> head pos d_head")


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
    return _query_neurons(
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
        v = _values_by_head(host, captured, below)
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
    return _query_neurons(
        host, captured, scores.sources, "attn", layer, number, place, score, total
    )


def _query_neurons(
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
            certificate=_by_definition(total, score),
        ),
        position=sources.positions[place],
    )


def _by_definition(total: int, score: Float[Tensor, " best"]) -> Certificate:
    """Nothing was bounded: scores are linear, and every one was computed."""
    return Certificate(
        applies=True,
        linear=True,
        evaluated=total,
        total=total,
        kth_score=float(score[-1]) if len(score) else 0.0,
        next_bound=None,
        slack=0.0,
    )


# --- inputs one by one ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Neurons of one kind that feed value neurons: number i feeds value neuron ``value[i]``."""

    neurons: QueryNeurons
    """Largest score first: what each brings to this one value neuron, in nats."""
    value: Int[Tensor, " neuron"]


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
    placed = _placed(captured, values)
    sources = _positions_needed(captured, placed, sources)
    rows = _rows(host, sources, placed, convention, None)
    score = torch.cat([each.neurons.score for each in placed]).to(rows.key.dtype)
    of_one_nat = [
        replace(each, neurons=replace(each.neurons, score=torch.ones_like(each.neurons.score)))
        for each in placed
    ]
    shares = _pre_activations(sources, rows, of_one_nat, convention)
    readers = _readers(rows, shares, len(score))
    signs = (1, -1) if opposing else (1,)
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
        neurons = _query_neurons(
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
    certificate = _by_definition(len(distinct), once.score)
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


def _readers(rows: _Rows, shares: PreActivations, n_values: int) -> _Readers:
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
            slope, _ = slopes(host.W_O(layer).flatten(0, 1), readers.key[live])
            v = _values_by_head(host, captured, layer)
            for here, worth in zip(live.split(some), slope.split(some), strict=True):
                paid = sources.pattern[layer][:, readers.place[here]]
                paid = rearrange(paid, "head value pos -> value head pos 1")
                worth = rearrange(worth, "value (head d_head) -> value head 1 d_head", head=len(v))
                yield here, (2 * layer + _BLOCK["attn"]) * stride, (paid * worth * v).flatten(1)
        if "ffn" in kinds:
            live = (readers.layer > layer).nonzero()[:, 0]
            for here in live.split(some):
                slope, _ = slopes(host.W_out(layer), readers.key[here])
                coefficients = sources.mlp_post[layer, readers.place[here]]
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


# --- chosen value neurons ---------------------------------------------------------------------


@full_precision()
def value_neurons(
    host: Host,
    captured: Capture,
    out: ReadOut,
    target: Target,
    neurons: Sequence[FFNNeuron | AttnNeuron],
) -> tuple[RankedNeurons, ...]:
    """These neurons with their own scores, by kind, in the order given; repeats are dropped.

    Cost: one read-out for each neuron, and one for each layer and kind among them.

    Raises:
        InputError: If the model has no such neuron, or an attention neuron has no source position.
    """
    for neuron in neurons:
        check_exists(host, neuron, captured.prompt.read_pos)
    distinct = list(dict.fromkeys(neurons))
    ffn = [neuron for neuron in distinct if isinstance(neuron, FFNNeuron)]
    attn = [neuron for neuron in distinct if isinstance(neuron, AttnNeuron)]
    found = []
    if ffn:
        index = [neuron.index for neuron in ffn]
        found.append(_scored(host, captured, out, target, "ffn", ffn, index))
    if attn:
        n_pos, d_head = captured.v.shape[1], host.d_head
        number = [
            (neuron.head * n_pos + (neuron.source_pos or 0)) * d_head + neuron.index
            for neuron in attn
        ]
        found.append(_scored(host, captured, out, target, "attn", attn, number))
    return tuple(found)


def _scored(
    host: Host,
    captured: Capture,
    out: ReadOut,
    target: Target,
    kind: Kind,
    neurons: Sequence[FFNNeuron] | Sequence[AttnNeuron],
    numbers: Sequence[int],
) -> RankedNeurons:
    make = ffn_decomposition if kind == "ffn" else attn_decomposition
    layers = sorted({neuron.layer for neuron in neurons})
    blocks = [make(host, captured, layer) for layer in layers]
    device = captured.v.device
    number = torch.tensor(numbers, device=device)
    layer = torch.tensor([neuron.layer for neuron in neurons], device=device)
    place = torch.searchsorted(torch.tensor(layers, device=device), layer)
    bases = torch.stack([block.base for block in blocks])
    before = out.baseline(bases, target, tangent=False)
    score = exact_scores(blocks, out, before, place * blocks[0].n_neurons + number)
    coefficient = torch.empty_like(score)
    for at, block in enumerate(blocks):
        coefficient[place == at] = block.coefficients_of(number[place == at]).to(score.dtype)
    heads = [neuron.head for neuron in neurons if isinstance(neuron, AttnNeuron)]
    sources = [neuron.source_pos for neuron in neurons if isinstance(neuron, AttnNeuron)]
    return RankedNeurons(
        kind=kind,
        layer=layer,
        number=number,
        head=torch.tensor(heads, device=device) if heads else None,
        source_pos=torch.tensor(sources, device=device) if sources else None,
        index=torch.tensor([neuron.index for neuron in neurons], device=device),
        coefficient=coefficient,
        score=score,
        certificate=_by_definition(len(score), score),
    )


def check_exists(host: Host, neuron: FFNNeuron | AttnNeuron, read_pos: int) -> None:
    """Stop where the model has no such value neuron in a prompt read at ``read_pos``.

    Raises:
        InputError: If it has not, or an attention neuron has no source position.
    """
    if isinstance(neuron, AttnNeuron) and neuron.source_pos is None:
        raise InputError(
            f"{neuron} has no source position, which is where it is set off; "
            f"give one, as in {neuron}@{read_pos}"
        )
    check_neuron(host, neuron, read_pos)


def check_neuron(host: Host, neuron: FFNNeuron | AttnNeuron, read_pos: int) -> None:
    """Stop where the model has no such neuron, or a prompt read there no such source position.

    Raises:
        InputError: Saying what there is.
    """
    if isinstance(neuron, FFNNeuron):
        exists = 0 <= neuron.layer < host.n_layers and 0 <= neuron.index < host.d_mlp
        there_are = f"{host.n_layers} layers of {host.d_mlp} FFN neurons"
    else:
        exists = (
            0 <= neuron.layer < host.n_layers
            and 0 <= neuron.head < host.n_heads
            and 0 <= neuron.index < host.d_head
            and (neuron.source_pos is None or 0 <= neuron.source_pos <= read_pos)
        )
        there_are = (
            f"{host.n_layers} layers of {host.n_heads} heads of {host.d_head} dimensions, and "
            f"source positions are 0 to {read_pos}"
        )
    if not exists:
        raise InputError(f"there is no neuron {neuron}: the model has {there_are}")
