"""Who wrote what: one vector per neuron, made only when asked for.

A block writes ``mlp_out = sum_k m_k * W_out[k] + b_out`` and
``attn_out = sum_{h,p,k} pattern[h,p] * v[p,h,k] * W_O[h,k] + b_O``. The numbers are the neurons'
*coefficients*, the rows of the weight their *subvalues*; the biases belong to no neuron.
Source: Yu & Ananiadou (2024), section 3.

Where a norm stands between a sub-layer and the residual stream (Gemma 2 and 3, OLMo 2), it is
frozen at the scale it has in the run, which makes it linear: both sides of these sums go through
it, subvalues are the rows as they come out of it, and what all neurons and the bias write is still
the sub-layer's output, exactly. The same for a multiplier (Granite).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_neuron_attr.captured import Capture, Sources
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.experts import experts_on
from tl_neuron_attr.host import Host
from tl_neuron_attr.neurons import Kind
from tl_neuron_attr.norms import row_norms
from tl_neuron_attr.pieces import Matrix, Pieces, blocks_of, times
from tl_neuron_attr.precision import full_precision

_WIDENED_ROWS = 1024  # a block that stays in cache between its two uses


@dataclass(frozen=True, kw_only=True)
class Outlet:
    """What a sub-layer's output goes through on its way into the residual stream.

    An RMSNorm frozen at its scale, a multiplier, or (nearly everywhere) nothing. Entry by entry,
    so that it is its own transpose: a gradient in the residual stream goes back through it too.
    """

    gain: Float[Tensor, " d_model"] | None = None
    """The norm's gain."""
    divisor: Float[Tensor, "*#batch 1"] | None = None
    """The norm's scale, over the multiplier."""

    __repr__ = brief

    def __call__(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*_ d_model"]:
        """Vectors of the sub-layer's output as they are in the residual stream."""
        return self.scaled(self.weighted(vectors))

    def weighted(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The part that is one for all runs: the gain."""
        return vectors if self.gain is None else vectors * self.gain.to(vectors)

    def scaled(self, values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*_ n"]:
        """The part that is this run's: the scale, of vectors or of their coefficients."""
        return values if self.divisor is None else values / self.divisor.to(values)

    def as_in(self, other: "Outlet") -> bool:
        """Whether it is the same in another run of the model, to the last bit."""
        if self.divisor is None or other.divisor is None:
            return self.divisor is other.divisor
        return torch.equal(self.divisor, other.divisor)

    def of_norms(self, norms: Float[Tensor, " subvalue"]) -> Float[Tensor, " subvalue"]:
        """Norms of rows, each entry weighted by the gain already, as they are behind it."""
        return norms if self.divisor is None else norms / self.divisor.to(norms.dtype)


def outlet(
    host: Host,
    run: Capture | Sources,
    kind: Kind,
    layer: int,
    places: Int[Tensor, " place"] | None = None,
) -> Outlet:
    """The way from one sub-layer into the residual stream, its norm as it was in the run.

    At the read position of a capture; of ``Sources`` at all of its positions, or at those with
    these places among them: it then takes one vector for each.
    """
    (through,) = _outlets(host, [run], kind, layer)
    if through.divisor is None or places is None or len(through.divisor) == 1:
        return through
    return replace(through, divisor=through.divisor[places])


def _outlets(host: Host, runs: Sequence[Capture | Sources], kind: Kind, layer: int) -> list[Outlet]:
    """Those of one sub-layer, of each run: its norm is looked up once."""
    norm = host.post_norm(layer, kind)
    gain = None if norm is None else norm.gain
    outlets = []
    for run in runs:
        scales = run.ffn_post_scale if kind == "ffn" else run.attn_post_scale
        divisor = None if scales is None else scales[layer]
        if host.residual_scale != 1:
            one = host.W_U.new_ones(1, dtype=torch.float64) if divisor is None else divisor
            divisor = one / host.residual_scale
        outlets.append(Outlet(gain=gain, divisor=divisor))
    return outlets


@dataclass(frozen=True, kw_only=True)
class FFNDecomposition:
    """The FFN of one layer at the read position, as a sum over its neurons.

    ``W_out`` is the model's own matrix, not a copy; vectors come out in the dtype of ``base``. Of a
    mixture of experts it is in pieces, and products pass over the experts that are off.
    """

    layer: int
    base: Float[Tensor, " d_model"]
    """What the residual stream holds before the FFN writes: ``resid_mid``."""
    coefficients: Float[Tensor, " d_mlp"]
    W_out: Float[Matrix, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"] | None
    """The bias, as it comes out of ``outlet``."""
    outlet: Outlet = Outlet()

    __repr__ = brief

    @property
    def n_neurons(self) -> int:
        """d_mlp."""
        return self.coefficients.shape[0]

    def coefficients_of(self, number: Int[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
        """The coefficients of these neurons."""
        return self.coefficients[number]

    def subvalues(self, number: Int[Tensor, " neuron"]) -> Float[Tensor, "neuron d_model"]:
        """What each of these neurons writes per unit of coefficient: its row of ``W_out``."""
        return self.outlet(rows_at(self.W_out, number).to(self.base))

    def vectors(self, number: Int[Tensor, " neuron"]) -> Float[Tensor, "neuron d_model"]:
        """What each of these neurons adds to the residual stream."""
        return self.coefficients_of(number)[:, None] * self.subvalues(number)

    def rows(self) -> Float[Matrix, "subvalue d_model"]:
        """Every subvalue once, as the weights hold them: before ``outlet``."""
        return self.W_out

    def row_of(self, number: Int[Tensor, " neuron"]) -> Int[Tensor, " neuron"]:
        """Which of ``rows`` is each of these neurons' subvalue."""
        return number

    def norms(self) -> Float[Tensor, " subvalue"]:
        """The norm of every subvalue, in the order of ``rows``."""
        norms = row_norms(self.rows(), self.outlet.gain).to(self.base.device)
        return self.outlet.of_norms(norms)

    def all_coefficients(self) -> Float[Tensor, " neuron"]:
        """The coefficient of every neuron, in the order neurons are numbered."""
        return self.coefficients

    def of_each(
        self, per_subvalue: Shaped[Tensor, "*run subvalue"]
    ) -> Shaped[Tensor, "*run neuron"]:
        """For every neuron, what its subvalue has; ``per_subvalue`` is in the order of ``rows``."""
        return per_subvalue

    def sum(self) -> Float[Tensor, " d_model"]:
        """What all neurons add together: ``mlp_out`` less the bias."""
        return self.outlet(times(self.coefficients, self.W_out))


@dataclass(frozen=True, kw_only=True)
class AttnDecomposition:
    """The attention of one layer at the read position: a sum over heads, sources and dimensions.

    Where one number stands for a neuron, it counts (head, source_pos, index) in row-major order.
    ``W_O`` is the model's own matrix, not a copy; vectors come out in the dtype of ``base``.
    """

    layer: int
    base: Float[Tensor, " d_model"]
    """What the residual stream holds before the attention writes: ``resid_pre``."""
    pattern: Float[Tensor, "head pos"]
    v: Float[Tensor, "pos key_value_head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"] | None
    """The bias, as it comes out of ``outlet``."""
    outlet: Outlet = Outlet()
    summed: bool = False
    """Whether source positions were summed into one (see ``over_sources``)."""

    __repr__ = brief

    @property
    def shape(self) -> tuple[int, int, int]:
        """(head, pos, d_head): how many attention neurons there are, and how they are numbered."""
        head, pos = self.pattern.shape
        return head, pos, self.v.shape[-1]

    @property
    def n_neurons(self) -> int:
        """head x pos x d_head."""
        head, pos, d_head = self.shape
        return head * pos * d_head

    def place(
        self, number: Int[Tensor, " neuron"]
    ) -> tuple[Int[Tensor, " neuron"], Int[Tensor, " neuron"], Int[Tensor, " neuron"]]:
        """(head, source_pos, index) of the neurons with these numbers."""
        _, pos, d_head = self.shape
        return number // (pos * d_head), number // d_head % pos, number % d_head

    def coefficients(self, heads: slice = slice(None)) -> Float[Tensor, "head pos d_head"]:
        """``pattern * v`` of every attention neuron of these heads."""
        v = rearrange(self.v, "pos head d_head -> head pos d_head")
        if self._group > 1:
            v = v.repeat_interleave(self._group, 0)
        v = v[heads]
        return self.pattern[heads, :, None] * v

    def coefficients_of(self, number: Int[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
        """The coefficients of these neurons."""
        head, source_pos, index = self.place(number)
        return self.pattern[head, source_pos] * self.v[source_pos, head // self._group, index]

    def subvalues(self, number: Int[Tensor, " neuron"]) -> Float[Tensor, "neuron d_model"]:
        """What each of these neurons writes per unit of coefficient: its row of ``W_O``."""
        head, _, index = self.place(number)
        return self.outlet(rows_at(self.W_O, head, index).to(self.base))

    def vectors(self, number: Int[Tensor, " neuron"]) -> Float[Tensor, "neuron d_model"]:
        """What each of these neurons adds to the residual stream."""
        return self.coefficients_of(number)[:, None] * self.subvalues(number)

    def rows(self) -> Float[Tensor, "subvalue d_model"]:
        """Every subvalue once, as the weights hold them, by head and index: before ``outlet``."""
        return self.W_O.flatten(0, 1)

    def row_of(self, number: Int[Tensor, " neuron"]) -> Int[Tensor, " neuron"]:
        """Which of ``rows`` is each of these neurons' subvalue."""
        head, _, index = self.place(number)
        return head * self.shape[2] + index

    def norms(self) -> Float[Tensor, " subvalue"]:
        """The norm of every subvalue, in the order of ``rows``."""
        norms = row_norms(self.rows(), self.outlet.gain).to(self.base.device)
        return self.outlet.of_norms(norms)

    def all_coefficients(self) -> Float[Tensor, " neuron"]:
        """The coefficient of every neuron, in the order neurons are numbered."""
        return self.coefficients().flatten()

    def of_each(
        self, per_subvalue: Shaped[Tensor, "*run subvalue"]
    ) -> Shaped[Tensor, "*run neuron"]:
        """For every neuron, what its subvalue has; ``per_subvalue`` is in the order of ``rows``."""
        head, pos, d_head = self.shape
        each = per_subvalue.unflatten(-1, (head, 1, d_head))
        return each.expand(*each.shape[:-2], pos, d_head).flatten(-3)

    def position_vectors(self, heads: slice = slice(None)) -> Float[Tensor, "head pos d_model"]:
        """What these heads bring from each source position."""
        return self.outlet(times(self.coefficients(heads), self.W_O[heads]))

    def head_vectors(self) -> Float[Tensor, "head d_model"]:
        """What each head adds to the residual stream."""
        return head_vectors_of_runs([self])[0]

    def sum(self) -> Float[Tensor, " d_model"]:
        """What all neurons add together: ``attn_out`` less the bias."""
        return self.head_vectors().sum(0)

    @full_precision()
    def over_sources(self) -> "AttnDecomposition":
        """The same attention with source positions summed: its neurons are the position-free ones.

        It has one source position, attended to with weight 1, which holds every head's ``z``.
        """
        ones = torch.ones_like(self.pattern[:, :1])
        return replace(self, pattern=ones, v=self.z()[None], summed=True)

    def z(self) -> Float[Tensor, "head d_head"]:
        """Of each head, the sum of its values over source positions, each by its attention."""
        groups = self.pattern.unflatten(0, (-1, self._group))
        return (groups @ self.v.transpose(0, 1)).flatten(0, 1)

    @property
    def _group(self) -> int:
        """How many heads share one value vector (1 unless key-value heads are grouped)."""
        return self.pattern.shape[0] // self.v.shape[1]


Decomposition = FFNDecomposition | AttnDecomposition
"""Either kind: ``base``, ``n_neurons``, and ``vectors`` of neurons chosen by number."""


def ffn_decomposition(host: Host, captured: Capture, layer: int) -> FFNDecomposition:
    """The FFN neurons of one layer, from a capture and the model's weights.

    Raises:
        InputError: If the model has no such layer.
    """
    _check_layer(host, layer)
    return _ffns_of_layer(host, [captured], layer)[0]


def attn_decomposition(host: Host, captured: Capture, layer: int) -> AttnDecomposition:
    """The attention neurons of one layer, from a capture and the model's weights.

    Raises:
        InputError: If the model has no such layer.
    """
    _check_layer(host, layer)
    return _attns_of_layer(host, [captured], layer)[0]


def ffn_decompositions(
    host: Host, captures: Sequence[Capture]
) -> list[tuple[FFNDecomposition, ...]]:
    """Those of every layer, of each run: the weights are looked up once for all runs."""
    layers = [_ffns_of_layer(host, captures, layer) for layer in range(host.n_layers)]
    return list(zip(*layers, strict=True))


def attn_decompositions(
    host: Host, captures: Sequence[Capture]
) -> list[tuple[AttnDecomposition, ...]]:
    """Those of every layer, of each run: the weights are looked up once for all runs."""
    layers = [_attns_of_layer(host, captures, layer) for layer in range(host.n_layers)]
    return list(zip(*layers, strict=True))


@full_precision()
def head_vectors_of_runs(
    blocks: Sequence[AttnDecomposition],
) -> Float[Tensor, "run head d_model"]:
    """What each head of one layer adds to the residual stream, in each of several runs."""
    z = torch.stack([block.z() for block in blocks], dim=1)
    written = times(z, blocks[0].W_O).transpose(0, 1)
    return torch.stack([block.outlet(each) for block, each in zip(blocks, written, strict=True)])


def _ffns_of_layer(host: Host, captures: Sequence[Capture], layer: int) -> list[FFNDecomposition]:
    b_out = host.b_out(layer)
    W_out = rows_in_use(host, layer, torch.stack([run.mlp_post[layer] for run in captures]))
    return [
        FFNDecomposition(
            layer=layer,
            # parallel blocks have no resid_mid: attention and FFN both add to resid_pre
            base=(run.resid_pre if run.resid_mid is None else run.resid_mid)[layer],
            coefficients=run.mlp_post[layer],
            W_out=W_out,
            b_out=None if b_out is None else through(b_out.to(run.v)),
            outlet=through,
        )
        for run, through in zip(captures, _outlets(host, captures, "ffn", layer), strict=True)
    ]


def _attns_of_layer(host: Host, captures: Sequence[Capture], layer: int) -> list[AttnDecomposition]:
    W_O, b_O = host.W_O(layer), host.b_O(layer)
    return [
        AttnDecomposition(
            layer=layer,
            base=run.resid_pre[layer],
            pattern=run.pattern[layer],
            v=run.v[layer],
            W_O=W_O,
            b_O=None if b_O is None else through(b_O.to(run.v)),
            outlet=through,
        )
        for run, through in zip(captures, _outlets(host, captures, "attn", layer), strict=True)
    ]


def _check_layer(host: Host, layer: int) -> None:
    if not 0 <= layer < host.n_layers:
        raise InputError(f"layer {layer} is out of range: the model has {host.n_layers} layers")


def rows_in_use(
    host: Host, layer: int, coefficients: Float[Tensor, "place d_mlp"]
) -> Float[Matrix, "d_mlp d_model"]:
    """``W_out``, of which products read only experts that are on at some of these places."""
    W_out, mixture = host.W_out(layer), host.mixture(layer)
    if mixture is None or not isinstance(W_out, Pieces):
        return W_out
    return W_out.using(experts_on(mixture, coefficients))


def slopes(
    rows: Float[Matrix, "subvalue d_model"], gradients: Float[Tensor, "base d_model"]
) -> Float[Tensor, "base subvalue"]:
    """``subvalue . gradient`` of every row and gradient; 0 of rows in pieces that are of no use.

    In the dtype of the gradients; narrow weights are widened in blocks, never copied whole. It is
    computed where the rows are, and brought to where the gradients are.
    """
    there = gradients.to(rows.device)
    products = there.new_zeros(len(there), len(rows))
    for here, block in blocks_of(rows, _WIDENED_ROWS):
        products[:, here] = there @ block.to(there.dtype).T
    return products.to(gradients.device)


def rows_at(
    weights: Float[Matrix, "row ..."], *places: Int[Tensor, " some"]
) -> Float[Tensor, "some ..."]:
    """Rows of a weight, or of what is stacked in it, by number; brought to where the numbers are.

    As ``weights[places]``, which wants both on one device.
    """
    rows = weights[tuple(each.to(weights.device) for each in places)]
    return rows.to(places[0].device)
