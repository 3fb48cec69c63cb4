"""How long it is: norms of what the weights write and say, taken once per model.

They serve the allowance for rounding in every bound, and nothing else: what is bounded changes
with each prompt, these only with the weights.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.host import Host, weights_state

_BLOCK = 1024  # rows or columns at a time: narrow weights are widened in blocks, never whole


@dataclass(frozen=True, kw_only=True)
class WeightNorms:
    """Euclidean norms, in the dtype of the weights or float32, whichever is wider."""

    tokens: Float[Tensor, " d_vocab"]
    """Of each column of the unembedding, weighted by the final norm's gain."""
    ffn: tuple[Float[Tensor, " d_mlp"], ...]
    """Of each row of ``W_out``, by layer."""
    attn: tuple[Float[Tensor, " subvalue"], ...]
    """Of each row of ``W_O``, by layer."""


# Weak: it keeps no model alive; weights edited in place, or replaced, are measured again.
_measured: WeakKeyDictionary[torch.nn.Module, tuple[int, WeightNorms]] = WeakKeyDictionary()


def weight_norms(host: Host) -> WeightNorms:
    """The norms of a model's subvalues and of its unembedding.

    Cost: one pass over ``W_out``, ``W_O`` and the unembedding, once per model and state of its
    weights; they are kept as long as the model is.
    """
    state = weights_state(host)
    known = _measured.get(host.model)
    if known is not None and known[0] == state:
        return known[1]
    with torch.no_grad():
        layers = range(host.n_layers)
        norms = WeightNorms(
            tokens=column_norms(host.W_U, host.final_gain),
            ffn=tuple(row_norms(host.W_out(layer)) for layer in layers),
            attn=tuple(row_norms(host.W_O(layer).flatten(0, 1)) for layer in layers),
        )
    _measured[host.model] = (state, norms)
    return norms


def row_norms(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
    """The norm of each row, float32 or wider."""
    return _joined(torch.linalg.vector_norm(_wide(rows), dim=1) for rows in rows.split(_BLOCK))


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


def _wide(weights: Tensor) -> Tensor:
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts))
