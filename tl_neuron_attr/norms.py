"""How long it is: norms of what the weights write and say.

They are properties of the weights alone. What rounding is allowed for in every bound takes them as
they were measured once per model; where a score or an interval rests on them they are taken anew.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.host import Host, weights_state
from tl_neuron_attr.neurons import Kind
from tl_neuron_attr.pieces import Matrix, Pieces

_BLOCK = 1024  # rows or columns at a time: narrow weights are widened in blocks, never whole
_SAMPLES = 8  # rows and columns of each matrix that are looked at for edits

Place = tuple[int, torch.Size]
"""Where a matrix lies in memory, and its shape."""


@dataclass(frozen=True, kw_only=True)
class WeightNorms:
    """Euclidean norms, in the dtype of the weights or float32, whichever is wider.

    Known by where their matrix lies in memory: a matrix that is not the model's has none here.
    """

    columns: Mapping[Place, Float[Tensor, " d_vocab"]]
    """Of each column of the unembedding, weighted by the final norm's gain."""
    rows: Mapping[Place, Float[Tensor, " subvalue"]]
    """Of each row of ``W_out``, or of ``W_O`` by head and index, weighted by the gain of the norm
    on the sub-layer's output where there is one."""

    def of_columns(self, W_U: Float[Tensor, "d_model d_vocab"]) -> Float[Tensor, " d_vocab"] | None:
        """Those of the unembedding, if it is this model's."""
        return self.columns.get(_place(W_U))

    def of_rows(self, rows: Float[Matrix, "subvalue d_model"]) -> Float[Tensor, " subvalue"] | None:
        """Those of one block's subvalues, if they are this model's."""
        return self.rows.get(_place(rows))


# Weak: it keeps no model alive, and a place in memory means something only as long as it lives.
_measured: WeakKeyDictionary[torch.nn.Module, tuple[int, WeightNorms]] = WeakKeyDictionary()


def weight_norms(host: Host) -> WeightNorms:
    """The norms of a model's subvalues and of its unembedding, measured once.

    Measured anew when weights were edited in place or replaced; a write that goes behind torch's
    back (``weight.data[row] = ...``) is seen if it touches one of a few entries of its matrix.

    Cost: one pass over ``W_out``, ``W_O`` and the unembedding, once per model and state of its
    weights; they are kept as long as the model is.
    """
    layers = range(host.n_layers)
    blocks: list[Matrix] = [host.W_out(layer) for layer in layers]
    blocks += [host.W_O(layer).flatten(0, 1) for layer in layers]
    kinds: tuple[Kind, ...] = ("ffn", "attn")
    posts = [host.post_norm(layer, kind) for kind in kinds for layer in layers]
    gains = [None if post is None else post.gain for post in posts]
    looked_at = [gain[None] for gain in (host.final_gain, *gains) if gain is not None]
    state = hash((weights_state(host), _sampled([host.W_U, *looked_at, *blocks])))
    known = _measured.get(host.model)
    if known is not None and known[0] == state:
        return known[1]
    # a copy made for us has a place that will be another's
    stored = {weight.untyped_storage().data_ptr() for weight in host.parameters}
    with torch.no_grad():
        norms = WeightNorms(
            columns={
                _place(W_U): column_norms(W_U, host.final_gain)
                for W_U in [host.W_U]
                if W_U.untyped_storage().data_ptr() in stored
            },
            rows={
                _place(rows): row_norms(rows, gain).to(host.device)
                for rows, gain in zip(blocks, gains, strict=True)
                if isinstance(rows, Pieces) or rows.untyped_storage().data_ptr() in stored
            },
        )
    _measured[host.model] = (state, norms)
    return norms


def row_norms(
    rows: Float[Matrix, "row d_model"], gain: Float[Tensor, " d_model"] | None = None
) -> Float[Tensor, " row"]:
    """The norm of each row, its entries weighted by ``gain`` if there is one; float32 or wider."""

    def norms() -> Iterator[Tensor]:
        for some in rows.split(_BLOCK):
            wide = _wide(some)
            weighted = wide if gain is None else wide * gain.to(wide.dtype)
            yield torch.linalg.vector_norm(weighted, dim=1)

    return _joined(norms())


def column_norms(
    columns: Float[Tensor, "d_model column"], gain: Float[Tensor, " d_model"] | None
) -> Float[Tensor, " column"]:
    """The norm of each column, its entries weighted by ``gain``; float32 or wider."""

    def norms() -> Iterator[Tensor]:
        for some in columns.split(_BLOCK, dim=1):
            wide = _wide(some)
            if gain is None:
                yield torch.linalg.vector_norm(wide, dim=0)
            else:
                yield (gain.to(wide.dtype).square() @ wide.square()).sqrt()

    return _joined(norms())


def _place(matrix: Matrix) -> Place:
    return matrix.data_ptr(), matrix.shape


def _sampled(matrices: Iterable[Float[Matrix, "_ _"]]) -> bytes:
    """A few entries of each, spread over its rows and columns."""
    few = [
        stack[:, :: max(1, stack.shape[1] // _SAMPLES), :: max(1, stack.shape[2] // _SAMPLES)]
        for matrix in matrices
        for stack in (matrix.stacks if isinstance(matrix, Pieces) else (matrix[None],))
    ]
    return torch.cat([each.flatten().float().cpu() for each in few]).numpy().tobytes()


def _wide(weights: Tensor) -> Tensor:
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts))
