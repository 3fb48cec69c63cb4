"""Scores carried back without autograd: shares of the answer handed down, layer by layer.

The answer's gradient at the final residual is handed to what wrote that residual. Whatever reads
the residual stream hands on what it got to what it read, in proportion::

    an FFN neuron      through its chord, coefficient / pre-activation (gated: through each of two)
    attention          through W_V, to each source position what it pays it; patterns stay frozen
    a norm             as it is, its scale answering

``carried_once`` counts what reaches the answer by at most one later sub-layer: each neuron's own
word, and what it has all FFN neurons and heads of the read position say. Value and query scores in
one, with every neuron a value neuron, and nothing is carried on from layer to layer.
``carried_back`` counts all paths. It uses no autograd and keeps no graph, but to carry on what was
carried is to walk the network backwards: a backward pass of the frozen model, written by hand.

Neither sees what a neuron does to attention patterns, which is why gradients come closer.
Both are ``bent`` (see ``curved.py``), which costs no further pass.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.capture import capture_sources
from tl_neuron_attr.captured import Sources
from tl_neuron_attr.decompose import slopes
from tl_neuron_attr.host import Host, Norm
from tl_neuron_attr.methods.case import Case, neuron_shape
from tl_neuron_attr.methods.curved import answer_and_rivals, bent
from tl_neuron_attr.pieces import times
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.reading import through_norm, values_by_head
from tl_neuron_attr.topk import Kind


def carried_once(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """What each neuron says, and what it has every later one say to the answer itself, in nats.

    Without any backward pass, and closer to ``ablation`` than value or query scores: all
    positions, all FFN neurons and heads of the read position as value neurons. It misses paths
    through two or more later sub-layers, and through attention patterns.

    Cost: one forward pass (beyond the one ``attribute`` took), and about one and a half times that
    for the sweep (``docs/closest.py``).

    Raises:
        InputError: If the model no longer gives what was captured.
    """
    return _carried(case, kind, once=True)


def carried_back(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """What each neuron brings to the answer on all paths through frozen attention, in nats.

    No autograd and no graph in memory, but a backward sweep all the same: from the answer down,
    attention patterns frozen, activations by their chords, norms as they are. Without patterns to
    move it is farther from ``ablation`` than gradient x activation is.

    Cost: one forward pass (beyond the one ``attribute`` took), and about one and a half times that
    for the sweep (``docs/closest.py``). Peak memory: every layer's coefficients
    and patterns at all positions.

    Raises:
        InputError: If the model no longer gives what was captured.
    """
    return _carried(case, kind, once=False)


@torch.no_grad()
@full_precision()
def _carried(case: Case, kind: Kind, *, once: bool) -> Float[Tensor, "..."]:
    host, captured = case.result.host, case.result.captured
    shape = neuron_shape(host, kind)
    read_pos = captured.prompt.read_pos
    rivals = answer_and_rivals(case)  # first: it may refuse the target
    sources = capture_sources(host, captured, range(read_pos + 1))
    direct = torch.zeros_like(sources.resid_pre[0])
    direct[read_pos] = rivals.gradient
    worth = direct  # of a unit written to the residual stream, at each position
    layers: list[Tensor] = []
    for layer in reversed(range(host.n_layers)):
        run = _layer_of(case, sources, layer)
        # one after the other; side by side both are read off what comes after the block
        after = worth
        scores = {"ffn": _ffn_scores(run, _before_stream(run, "ffn", worth))}
        worth = worth + _through_ffn(run, _before_stream(run, "ffn", direct if once else after))
        here = after if host.parallel else worth
        scores["attn"] = _attn_scores(run, _before_stream(run, "attn", here))
        worth = worth + _through_attn(run, _before_stream(run, "attn", direct if once else here))
        layers.append(scores[kind])
    return bent(case, kind, torch.stack(layers[::-1]).view(shape), rivals)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """What one layer computed, at all positions up to the read position, and its weights' place."""

    host: Host
    layer: int
    before_attn: Float[Tensor, "pos d_model"]
    before_ffn: Float[Tensor, "pos d_model"]
    coefficients: Float[Tensor, "pos d_mlp"]
    pattern: Float[Tensor, "head pos source"]
    z: Float[Tensor, "head pos d_head"]


def _layer_of(case: Case, sources: Sources, layer: int) -> _Layer:
    host = case.result.host
    before = sources.resid_pre[layer]
    return _Layer(
        host=host,
        layer=layer,
        before_attn=before,
        before_ffn=before if host.parallel else before + sources.attn_out[layer],
        coefficients=sources.mlp_post[layer],
        pattern=sources.pattern[layer],
        z=sources.pattern[layer] @ values_by_head(host, case.result.captured, layer),
    )


def _before_stream(
    run: _Layer, kind: Kind, worth: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "pos d_model"]:
    """What a unit of a sub-layer's output is worth, before any norm or multiplier on it."""
    host, layer = run.host, run.layer
    worth = worth * host.residual_scale
    post = host.post_norm(layer, kind)
    if post is None:
        return worth
    if kind == "ffn":
        out = _plus(times(run.coefficients, host.W_out(layer)), host.b_out(layer))
    else:
        W_O = host.W_O(layer).to(worth)
        out = einsum(run.z, W_O, "head pos d_head, head d_head d_model -> pos d_model")
        out = _plus(out, host.b_O(layer))
    return _back_through_norm(host, post, out, worth)


def _plus(vectors: Tensor, bias: Tensor | None) -> Tensor:
    return vectors if bias is None else vectors + bias.to(vectors)


def _ffn_scores(run: _Layer, worth: Float[Tensor, "pos d_model"]) -> Float[Tensor, " d_mlp"]:
    return (slopes(run.host.W_out(run.layer), worth) * run.coefficients).sum(0)


def _attn_scores(run: _Layer, worth: Float[Tensor, "pos d_model"]) -> Float[Tensor, " neuron"]:
    return (_worth_of_z(run, worth) * run.z).sum(1).flatten()


def _through_ffn(run: _Layer, worth: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
    """What a unit of the FFN's input is worth, each neuron's activation by its chord."""
    host, layer, norm = run.host, run.layer, run.host.ffn_norm(run.layer)
    read = _normalized(host, norm, run.before_ffn)
    paid = slopes(host.W_out(layer), worth) * run.coefficients
    back = torch.zeros_like(worth)
    for subkeys, bias in host.ffn_inputs(layer).values():
        pre = slopes(subkeys, read)
        pre = pre if bias is None else pre + bias.to(read)
        # a neuron that reads nothing has nothing to hand on
        back += times(torch.where(pre == 0, 0.0, paid / pre), subkeys)
    return _back_through_norm(host, norm, run.before_ffn, back)


def _through_attn(run: _Layer, worth: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
    """What a unit of attention's input is worth, its patterns frozen."""
    host = run.host
    W_V = host.W_V(run.layer)
    of_values = einsum(
        run.pattern,
        _worth_of_z(run, worth),
        "head pos source, head pos d_head -> head source d_head",
    )
    grouped = rearrange(
        of_values, "(group share) source d_head -> group share source d_head", group=len(W_V)
    ).sum(1)
    equation = "group source d_head, group d_model d_head -> source d_model"
    back = einsum(grouped.to(W_V.device), W_V.to(grouped.dtype), equation)
    return _back_through_norm(
        host, host.attn_norm(run.layer), run.before_attn, back.to(worth.device)
    )


def _worth_of_z(
    run: _Layer, worth: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "head pos d_head"]:
    W_O = run.host.W_O(run.layer)
    equation = "pos d_model, head d_head d_model -> head pos d_head"
    return einsum(worth.to(W_O.device), W_O.to(worth.dtype), equation).to(worth.device)


def _normalized(
    host: Host, norm: Norm, x: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "pos d_model"]:
    read = through_norm(host, norm, x, x)
    return read if norm.bias is None else read + norm.bias.to(read)


def _back_through_norm(
    host: Host,
    norm: Norm,
    x: Float[Tensor, "pos d_model"],
    back: Float[Tensor, "pos d_model"],
) -> Float[Tensor, "pos d_model"]:
    """The transposed derivative of a norm at ``x``, its scale answering."""
    if norm.kind == "none":
        return back
    back = back if norm.gain is None else back * norm.gain.to(back)
    if norm.kind == "layer_norm":
        x, back = (each - each.mean(-1, keepdim=True) for each in (x, back))
    scale = (x.square().mean(-1, keepdim=True) + host.eps).sqrt()
    unit = x / scale
    return (back - unit * (unit * back).mean(-1, keepdim=True)) / scale
