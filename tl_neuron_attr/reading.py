"""What they read: value neurons -> the pre-activations they form, as sums over earlier sources.

The equation is in ``query.py``: a pre-activation is ``x . K + b``, formed where the neuron is set
off. Here are K (the subkey through the norm in front), x, and the part each earlier source has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.captured import Capture, Sources
from tl_neuron_attr.decompose import rows_at
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, Norm
from tl_neuron_attr.topk import RankedNeurons

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

    __repr__ = brief

    @property
    def shares(self) -> Float[Tensor, "row source"]:
        """Each source's share of each pre-activation; with the bias's they sum to 1 (``exact``)."""
        return self.parts / self.total[:, None]


@dataclass(frozen=True, kw_only=True)
class QueryNeurons:
    """The best query neurons, and where they fire."""

    neurons: RankedNeurons
    """Scored as query neurons, in nats; coefficients are those at ``position``."""
    position: Int[Tensor, " neuron"]
    """Where the neuron feeds the value neurons; if positions were summed, where it does most."""

    __repr__ = brief

    @property
    def set_off(self) -> Int[Tensor, " neuron"]:
        """Where its own pre-activation is formed: an attention neuron's at its source position."""
        return self.position if self.neurons.source_pos is None else self.neurons.source_pos


@dataclass(frozen=True, kw_only=True)
class Readings:
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

    __repr__ = brief


def where_set_off(
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


def readings(
    host: Host,
    sources: Sources,
    values: Sequence[QueryNeurons],
    convention: QueryConvention,
    through: str | None,
) -> Readings:
    """The value neurons' pre-activations, layer by layer."""
    found: list[Readings] = []
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
                    Readings(
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
    return Readings(input=tuple(name for rows in found for name in rows.input), **stacked)


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
        subkey = rows_at(W_V.transpose(1, 2), group, index)
        yield "v", subkey, None if b_V is None else rows_at(b_V, group, index)
        return
    if convention == "published" and host.gated:
        yield "subvalue", rows_at(host.W_out(layer), index), None
        return
    for name, (rows, bias) in host.ffn_inputs(layer).items():
        yield name, rows_at(rows, index), None if bias is None else rows_at(bias, index)


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
    if norm.kind == "none":
        return vectors.expand(torch.broadcast_shapes(vectors.shape, x.shape))
    if norm.kind == "layer_norm":
        x, vectors = (each - each.mean(-1, keepdim=True) for each in (x, vectors))
    read = vectors / (x.square().mean(-1, keepdim=True) + host.eps).sqrt()
    return read if norm.gain is None else read * norm.gain.to(read)


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
    key = subkey if norm.gain is None else subkey * norm.gain.to(x)
    if convention == "published" or norm.kind == "none":
        return key, torch.zeros_like(x[:, 0])
    if norm.kind == "layer_norm":
        key = key - key.mean(-1, keepdim=True)
        x = x - x.mean(-1, keepdim=True)
    key = key / (x.square().mean(-1, keepdim=True) + host.eps).sqrt()
    bias = torch.zeros_like(x[:, 0]) if norm.bias is None else subkey @ norm.bias.to(x)
    return key, bias


def pre_activations(
    sources: Sources,
    rows: Readings,
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


def positions_needed(
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
    for name in ("attn_post_scale", "ffn_post_scale"):
        if getattr(captured, name) is not None:
            reads[name] = getattr(captured, name)[:, None]
    before = [place for place, position in enumerate(given) if position in needed - {read_pos}]
    positions = [*(given[place] for place in before), read_pos]
    tensors = {
        name: value
        if sources is None or not before
        else torch.cat([getattr(sources, name)[..., before, :], value], -2)
        for name, value in reads.items()
    }
    return Sources(positions=torch.tensor(positions, device=captured.v.device), **tensors)


def values_by_head(host: Host, captured: Capture, layer: int) -> Float[Tensor, "head pos d_head"]:
    """The value vectors each head attends to."""
    v = captured.v[layer]
    group = torch.arange(host.n_heads, device=v.device) // (host.n_heads // v.shape[1])
    return rearrange(v[:, group], "pos head d_head -> head pos d_head")
