"""Which neurons: the best of a method's scores, and the controls drawn beside them.

Neurons of one kind are counted through all layers, in order of layer and of place in the layer:
a neuron's *number* is its place in ``scores.flatten()``.
"""

import hashlib

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.topk import Kind


def best(scores: Float[Tensor, "layer ..."], top: int) -> Int[Tensor, " best"]:
    """Numbers of the ``top`` best, best first; ties by layer, then place.

    Neurons that score -inf are not ranked: there may be fewer.
    """
    flat = scores.detach().flatten()
    top = min(top, len(flat))
    # topk leaves ties in no order, and sorting all is slow
    least = flat.topk(top).values[-1]
    found = ((flat >= least) & (flat > float("-inf"))).nonzero()[:, 0]
    order = flat[found].sort(descending=True, stable=True).indices
    return found[order[:top]]


def check_scores(scores: object, shape: tuple[int, ...], method: str) -> Tensor:
    """What a method gave, once it is known to be a score for every neuron.

    Raises:
        InputError: If it is no tensor of floats of this shape, or holds NaN or +inf.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise InputError(
            f"method {method!r} must give a tensor of floats of shape {list(shape)}, got "
            f"{scores.dtype if isinstance(scores, Tensor) else type(scores).__name__}"
        )
    if tuple(scores.shape) != shape:
        raise InputError(
            f"method {method!r} must give scores of shape {list(shape)}, got {list(scores.shape)}"
        )
    if bool(scores.isnan().any()) or bool((scores == float("inf")).any()):
        raise InputError(f"method {method!r} gives scores that are NaN or +inf")
    return scores


def contribution_norms(result: Attribution, kind: Kind) -> Float[Tensor, "layer place"]:
    """Norm of what each neuron adds to the residual stream at the read position.

    Its absolute coefficient (of an attention neuron summed over source positions) times the norm
    of its subvalue.
    """
    blocks = result.ffns if kind == "ffn" else result.attns_over_sources
    return torch.stack([block.all_coefficients().abs() * block.norms() for block in blocks])


def on_first(
    result: Attribution, kind: Kind, keys: Float[Tensor, "layer place"]
) -> Float[Tensor, "layer place"]:
    """Random keys below 1, raised by 1 for neurons of experts that the position was not given.

    Most neurons of a mixture are those, and drawn as controls they would do nothing.
    """
    if kind == "attn" or not result.host.n_experts:
        return keys
    return keys + (contribution_norms(result, kind).to(keys.device) == 0)


def random_beside(
    chosen: Int[Tensor, " chosen"], keys: Float[Tensor, "layer place"]
) -> Int[Tensor, " drawn"]:
    """Numbers of as many other neurons of each layer as were chosen there: those of lowest key.

    With ``keys`` at random, that is a draw without replacement. Where more than half of a
    layer was chosen, all others of it.
    """
    taken = _mask(chosen, keys)
    wanted = taken.sum(1, keepdim=True)
    order = keys.cpu().masked_fill(taken, torch.inf).argsort(dim=1, stable=True)
    place = torch.arange(keys.shape[1]).expand_as(order)
    first = torch.zeros_like(taken).scatter(1, order, place < wanted)
    return (first & ~taken).flatten().nonzero()[:, 0]


def norm_matched(
    chosen: Int[Tensor, " chosen"], norms: Float[Tensor, "layer place"]
) -> Int[Tensor, " matched"]:
    """Numbers of other neurons of the same layers, each about as large as one that was chosen.

    In each layer the chosen go in order of their norm; each takes the neuron of nearest norm, or
    the next larger one that is left (the larger ones are kept for those to come, if there are no
    more). Where more than half of a layer was chosen, all others of it.
    """
    norms = norms.cpu()
    taken = _mask(chosen, norms)
    found = []
    for layer in taken.any(1).nonzero()[:, 0].tolist():
        others = (~taken[layer]).nonzero()[:, 0]
        others = others[norms[layer, others].sort(stable=True).indices]
        wanted = norms[layer, taken[layer]].sort().values
        places = _places(wanted, norms[layer, others])
        found.append(layer * norms.shape[1] + others[places])
    return torch.cat(found).sort().values if found else chosen.cpu()


def _places(
    wanted: Float[Tensor, " wanted"], others: Float[Tensor, " other"]
) -> Int[Tensor, " place"]:
    """For each that is wanted the place of one of ``others``, each once; both in order."""
    if len(wanted) >= len(others):
        return torch.arange(len(others))
    above = torch.searchsorted(others, wanted).clamp(max=len(others) - 1)
    below = (above - 1).clamp(min=0)
    nearer = (wanted - others[below]) <= (others[above] - wanted)
    nearest = torch.where(nearer, below, above)
    number = torch.arange(len(wanted))
    # no place twice: each at least one after the one before, and room for those to come
    apart = (nearest - number).cummax(0).values + number
    return torch.minimum(apart, len(others) - len(wanted) + number)


def random_keys(shape: tuple[int, int], seed: int, *names: str) -> Float[Tensor, "layer place"]:
    """Random numbers below 1 that depend on the seed and on these names alone."""
    text = "\0".join([str(seed), *names])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
    return torch.rand(shape, generator=torch.Generator().manual_seed(number))


def _mask(
    numbers: Int[Tensor, " chosen"], like: Float[Tensor, "layer place"]
) -> Bool[Tensor, "layer place"]:
    mask = torch.zeros(like.shape, dtype=torch.bool)
    mask.view(-1)[numbers.cpu()] = True
    return mask
