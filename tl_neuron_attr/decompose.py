"""Who wrote what: one vector per neuron, made only when asked for.

A block writes ``mlp_out = sum_k m_k * W_out[k] + b_out`` and
``attn_out = sum_{h,p,k} pattern[h,p] * v[p,h,k] * W_O[h,k] + b_O``. The numbers are the neurons'
*coefficients*, the rows of the weight their *subvalues*; the biases belong to no neuron.
Source: Yu & Ananiadou (2024), section 3.
"""

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_neuron_attr.capture import Capture
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host
from tl_neuron_attr.norms import row_norms
from tl_neuron_attr.readout import full_precision

_WIDENED_ROWS = 1024  # a block that stays in cache between its two uses


@dataclass(frozen=True, kw_only=True)
class FFNDecomposition:
    """The FFN of one layer at the read position, as a sum over its neurons.

    ``W_out`` is the model's own matrix, not a copy; vectors come out in the dtype of ``base``.
    """

    layer: int
    base: Float[Tensor, " d_model"]
    """What the residual stream holds before the FFN writes: ``resid_mid``."""
    coefficients: Float[Tensor, " d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"] | None

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
        return rows_at(self.W_out, number).to(self.base)

    def vectors(self, number: Int[Tensor, " neuron"]) -> Float[Tensor, "neuron d_model"]:
        """What each of these neurons adds to the residual stream."""
        return self.coefficients_of(number)[:, None] * self.subvalues(number)

    def rows(self) -> Float[Tensor, "subvalue d_model"]:
        """Every subvalue once, as the weights hold them."""
        return self.W_out

    def norms(self) -> Float[Tensor, " subvalue"]:
        """The norm of every subvalue, in the order of ``rows``."""
        return row_norms(self.rows()).to(self.base.device)

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
        return times(self.coefficients, self.W_out)


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
        key_value_head = torch.arange(self.shape[0], device=self.v.device)[heads] // self._group
        v = rearrange(self.v[:, key_value_head], "pos head d_head -> head pos d_head")
        return self.pattern[heads, :, None] * v

    def coefficients_of(self, number: Int[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
        """The coefficients of these neurons."""
        head, source_pos, index = self.place(number)
        return self.pattern[head, source_pos] * self.v[source_pos, head // self._group, index]

    def subvalues(self, number: Int[Tensor, " neuron"]) -> Float[Tensor, "neuron d_model"]:
        """What each of these neurons writes per unit of coefficient: its row of ``W_O``."""
        head, _, index = self.place(number)
        return rows_at(self.W_O, head, index).to(self.base)

    def vectors(self, number: Int[Tensor, " neuron"]) -> Float[Tensor, "neuron d_model"]:
        """What each of these neurons adds to the residual stream."""
        return self.coefficients_of(number)[:, None] * self.subvalues(number)

    def rows(self) -> Float[Tensor, "subvalue d_model"]:
        """Every subvalue once, as the weights hold them, by head and index."""
        return self.W_O.flatten(0, 1)

    def norms(self) -> Float[Tensor, " subvalue"]:
        """The norm of every subvalue, in the order of ``rows``."""
        return row_norms(self.rows()).to(self.base.device)

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
        return times(self.coefficients(heads), self.W_O[heads])

    @full_precision()
    def head_vectors(self) -> Float[Tensor, "head d_model"]:
        """What each head adds to the residual stream."""
        return times(self._z()[:, None], self.W_O)[:, 0]

    def sum(self) -> Float[Tensor, " d_model"]:
        """What all neurons add together: ``attn_out`` less the bias."""
        return self.head_vectors().sum(0)

    @full_precision()
    def over_sources(self) -> "AttnDecomposition":
        """The same attention with source positions summed: its neurons are the position-free ones.

        It has one source position, attended to with weight 1, which holds every head's ``z``.
        """
        ones = torch.ones_like(self.pattern[:, :1])
        return replace(self, pattern=ones, v=self._z()[None], summed=True)

    def _z(self) -> Float[Tensor, "head d_head"]:
        """Of each head, the sum of its values over source positions, each by its attention."""
        groups = self.pattern.unflatten(0, (-1, self._group))
        z = torch.einsum("kgp,pkd->kgd", groups, self.v)
        return z.flatten(0, 1)

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
    # parallel blocks have no resid_mid: attention and FFN both add to resid_pre
    before = captured.resid_pre if captured.resid_mid is None else captured.resid_mid
    return FFNDecomposition(
        layer=layer,
        base=before[layer],
        coefficients=captured.mlp_post[layer],
        W_out=host.W_out(layer),
        b_out=host.b_out(layer),
    )


def attn_decomposition(host: Host, captured: Capture, layer: int) -> AttnDecomposition:
    """The attention neurons of one layer, from a capture and the model's weights.

    Raises:
        InputError: If the model has no such layer.
    """
    _check_layer(host, layer)
    return AttnDecomposition(
        layer=layer,
        base=captured.resid_pre[layer],
        pattern=captured.pattern[layer],
        v=captured.v[layer],
        W_O=host.W_O(layer),
        b_O=host.b_O(layer),
    )


def _check_layer(host: Host, layer: int) -> None:
    if not 0 <= layer < host.n_layers:
        raise InputError(f"layer {layer} is out of range: the model has {host.n_layers} layers")


def slopes(
    rows: Float[Tensor, "subvalue d_model"], gradients: Float[Tensor, "base d_model"]
) -> Float[Tensor, "base subvalue"]:
    """``subvalue . gradient`` of every row and gradient.

    In the dtype of the gradients; narrow weights are widened in blocks, never copied whole. It is
    computed where the rows are, and brought to where the gradients are.
    """
    there = gradients.to(rows.device)
    blocks = rows.split(_WIDENED_ROWS)
    products = torch.cat([there @ block.to(there.dtype).T for block in blocks], dim=1)
    return products.to(gradients.device)


def times(
    vectors: Float[Tensor, "*batch row"], weights: Float[Tensor, "*_ row column"]
) -> Float[Tensor, "*batch column"]:
    """``vectors @ weights`` in the dtype of the vectors, computed where the weights are.

    A layer's weights may be on another device than what was captured; they never move.
    """
    there = vectors.to(weights.device)
    return (there @ weights.to(there.dtype)).to(vectors.device)


def rows_at(
    weights: Float[Tensor, "row ..."], *places: Int[Tensor, " some"]
) -> Float[Tensor, "some ..."]:
    """Rows of a weight, or of what is stacked in it, by number; brought to where the numbers are.

    As ``weights[places]``, which wants both on one device.
    """
    rows = weights[tuple(each.to(weights.device) for each in places)]
    return rows.to(places[0].device)
