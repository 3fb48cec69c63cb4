"""What a neuron sets off: later neurons, and what heads carry on."""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.captured import Capture
from tl_neuron_attr.cards.card import CARRIED_COLUMNS, DOWNSTREAM_COLUMNS
from tl_neuron_attr.cards.looked_at import LookedAt, plain, read_by, stream
from tl_neuron_attr.decompose import outlet, slopes
from tl_neuron_attr.experts import experts_on
from tl_neuron_attr.host import Host, Norm
from tl_neuron_attr.neurons import AttnNeuron, Head
from tl_neuron_attr.pieces import Matrix, Pieces
from tl_neuron_attr.projection import project
from tl_neuron_attr.reading import through_norm
from tl_neuron_attr.topk import Kind, largest

# --- what it sets off -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Reach:
    """One input of all neurons of one kind in one layer."""

    kind: Kind
    layer: int
    input: str
    product: Float[Tensor, " neuron"]
    """subvalue . key"""
    total: Float[Tensor, " neuron"]
    """The pre-activation."""


def downstream_table(host: Host, one: LookedAt, top: int) -> pd.DataFrame:
    """The later neurons whose pre-activation it changes most."""
    reaches = list(_reaches(host, one))
    if not reaches:
        return pd.DataFrame(columns=list(DOWNSTREAM_COLUMNS))
    products = torch.cat([reach.product for reach in reaches])
    best = largest(products.abs(), top)
    ends = torch.tensor([len(reach.product) for reach in reaches]).cumsum(0)
    which = torch.bucketize(best.cpu(), ends, right=True).tolist()
    coefficient = float(one.coefficient)
    rows = []
    for flat, number in zip(best.tolist(), which, strict=True):
        reach = reaches[number]
        place = flat - (int(ends[number - 1]) if number else 0)
        product, total = float(reach.product[place]), float(reach.total[place])
        effect = coefficient * product
        share = effect / total if total else float("nan")
        if reach.kind == "ffn":
            label = ("ffn", reach.layer, None, place, None)
            fires = float(one.captured.mlp_post[reach.layer, place])
        else:
            group, index = divmod(place, host.d_head)
            head = group * (host.n_heads * host.d_head // len(reach.product))
            label = ("attn", reach.layer, head, index, one.captured.prompt.read_pos)
            fires = float("nan")
        rows.append((*label, reach.input, product, effect, total, share, fires))
    table = pd.DataFrame(rows, columns=list(DOWNSTREAM_COLUMNS))
    return table.astype({"head": "Int64", "source_pos": "Int64"})


def _reaches(host: Host, one: LookedAt) -> Iterator[_Reach]:
    """Every input that reads the residual stream after the neuron has written: one product each."""
    captured, own = one.captured, one.neuron.layer
    after_own = isinstance(one.neuron, AttnNeuron) and not host.parallel
    for layer in range(own, host.n_layers):
        if layer > own:
            norm, x = host.attn_norm(layer), captured.resid_pre[layer]
            W_V, b_V = host.W_V(layer), host.b_V(layer)
            rows = rearrange(W_V, "group d_model d_head -> (group d_head) d_model")
            bias = None if b_V is None else b_V.flatten()
            yield _reach(host, one, "attn", layer, "v", norm, x, rows, bias)
        if layer > own or after_own:
            norm, x = host.ffn_norm(layer), stream(captured, "ffn")[layer]
            mixture = host.mixture(layer)
            for name, (rows, bias) in host.ffn_inputs(layer).items():
                if mixture is not None and isinstance(rows, Pieces):  # others do not run
                    rows = rows.using(experts_on(mixture, captured.mlp_post[layer][None]))
                yield _reach(host, one, "ffn", layer, name, norm, x, rows, bias)


def _reach(
    host: Host,
    one: LookedAt,
    kind: Kind,
    layer: int,
    name: str,
    norm: Norm,
    x: Float[Tensor, " d_model"],
    rows: Float[Matrix, "neuron d_model"],
    bias: Float[Tensor, " neuron"] | None,
) -> _Reach:
    vectors = torch.stack([through_norm(host, norm, x, one.subvalue), read_by(host, norm, x)])
    product, total = slopes(rows, vectors)
    if bias is not None:
        total = total + bias.to(total)
    return _Reach(kind=kind, layer=layer, input=name, product=product, total=total)


# --- through the heads ------------------------------------------------------------------------


def carried_table(
    result: Attribution, one: LookedAt, chosen: Head | None, tokens: int, top: int
) -> pd.DataFrame:
    """What later heads make of the contribution, the most readable first."""
    host = result.host
    layers = range(one.neuron.layer + 1, host.n_layers) if chosen is None else [chosen.layer]
    if not layers:
        return pd.DataFrame(columns=list(CARRIED_COLUMNS))
    vector = one.contribution if float(one.coefficient) else one.subvalue
    # [layer, head, d_model]
    carried = torch.stack([carried_by_heads(host, one.captured, layer, vector) for layer in layers])
    if chosen is not None:
        carried = carried[:, chosen.head : chosen.head + 1]
    n_heads = carried.shape[1]
    ends = project(result.out, carried.flatten(0, 1), tokens)
    best = largest(ends.readability, top).tolist()
    first = 0 if chosen is None else chosen.head
    heads = [Head(layers[number // n_heads], first + number % n_heads) for number in best]
    position = one.captured.prompt.read_pos
    text_of = result.host.token_text
    return pd.DataFrame(
        {
            "layer": [head.layer for head in heads],
            "head": [head.head for head in heads],
            "readability": plain(ends.readability[best]),
            "attention": [
                float(result.captured.pattern[head.layer, head.head, position]) for head in heads
            ],
            "norm": plain(carried.flatten(0, 1)[best].norm(dim=-1)),
            "raises": [[*map(text_of, row)] for row in ends.top_ids[best].tolist()],
            "raised_by": ends.top_logits[best].tolist(),
            "lowers": [[*map(text_of, row)] for row in ends.bottom_ids[best].tolist()],
            "lowered_by": ends.bottom_logits[best].tolist(),
        },
        columns=list(CARRIED_COLUMNS),
    )


def carried_by_heads(
    host: Host, captured: Capture, layer: int, vector: Float[Tensor, " d_model"]
) -> Float[Tensor, "head d_model"]:
    """What each head of a layer makes of a part of what it reads, per unit of attention."""
    W_V, W_O = host.W_V(layer), host.W_O(layer)
    read = through_norm(host, host.attn_norm(layer), captured.resid_pre[layer], vector)
    v = torch.einsum("m,gmk->gk", read.to(W_V.device), W_V.to(read.dtype))
    v = v.repeat_interleave(host.n_heads // len(W_V), dim=0)
    through = outlet(host, captured, "attn", layer)
    return through(torch.einsum("hk,hkm->hm", v, W_O.to(read.dtype)).to(read.device))
