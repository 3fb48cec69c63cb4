"""Who raised it: contribution -> rise in log p(target), for layers, heads, positions, neurons.

One score throughout: ``Imp(u) = log p(w | base + u) - log p(w | base)``, in nats, where ``u`` is
added *alone* to the residual stream its block read (Yu & Ananiadou 2024, section 3), so that
nothing is credited for what earlier layers wrote. How vectors are read out is the ``ReadOut``'s
affair (``ReadOut.increase`` computes ``Imp``). Neuron scores do not sum to their layer's score,
for the softmax is not linear.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.capture import Capture
from tl_neuron_attr.decompose import AttnDecomposition, Decomposition
from tl_neuron_attr.readout import ReadOut

Progress = Callable[[int], object]
"""Called with the number of vectors scored since the last call."""


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """Rise in log p(target), in nats, from each layer's attention and FFN output."""

    attn: Float[Tensor, " layer"]
    ffn: Float[Tensor, " layer"]


def layer_scores(captured: Capture, out: ReadOut, token: int) -> LayerScores:
    """The score of every attention and FFN layer, biases included.

    In sequential blocks they telescope: their sum is log p(final) - log p(embedding), exactly. In
    parallel blocks both add to the same residual stream, and the sum says nothing.
    """
    resid_mid = captured.resid_pre if captured.resid_mid is None else captured.resid_mid
    attn = log_prob_increase(captured.resid_pre, captured.attn_out[:, None], out, token)
    ffn = log_prob_increase(resid_mid, captured.mlp_out[:, None], out, token)
    return LayerScores(attn=attn[:, 0], ffn=ffn[:, 0])


def head_scores(
    attns: Sequence[AttnDecomposition], out: ReadOut, token: int
) -> Float[Tensor, "layer head"]:
    """The score of every head (what it brings from all source positions together)."""
    bases = torch.stack([attn.base for attn in attns])
    vectors = torch.stack([attn.head_vectors() for attn in attns])
    return log_prob_increase(bases, vectors, out, token)


def position_scores(
    attns: Sequence[AttnDecomposition],
    out: ReadOut,
    token: int,
    *,
    heads: slice = slice(None),
    progress: Progress | None = None,
) -> Float[Tensor, "layer head pos"]:
    """The score of what each of these heads brings from each source position.

    Peak memory: the vectors of one head, or of as many as one block of the read-out takes.
    """
    layers = []
    for attn in attns:
        n_heads, n_pos, _ = attn.shape
        start, stop, _ = heads.indices(n_heads)
        step = max(1, out.rows_per_block // n_pos)
        parts = []
        for first in range(start, stop, step):
            vectors = attn.position_vectors(slice(first, min(first + step, stop)))
            rows = vectors.flatten(0, 1)[None]
            scores = log_prob_increase(attn.base[None], rows, out, token)
            parts.append(scores.reshape(vectors.shape[:2]))
            if progress is not None:
                progress(scores.numel())
        layers.append(torch.cat(parts))
    return torch.stack(layers)


def neuron_scores(
    decomposition: Decomposition, out: ReadOut, token: int, *, progress: Progress | None = None
) -> Float[Tensor, " neuron"]:
    """The score of every neuron of one block, in the order the decomposition numbers them.

    Cost: one read-out per neuron whose coefficient is not 0 (else its score is 0). Peak memory:
    the read-out's budget, and the result. ``topk.top_neurons`` finds the best without scoring all.
    """
    baseline = out.baseline(decomposition.base[None])
    numbers = torch.arange(decomposition.n_neurons, device=decomposition.base.device)
    active = numbers[decomposition.coefficients_of(numbers) != 0]
    scores = torch.zeros(len(numbers), dtype=out.dtype, device=numbers.device)
    for block in active.split(out.rows_per_block):
        which = torch.zeros_like(block)
        scores[block] = out.increase(baseline, which, decomposition.vectors(block), token)
        if progress is not None:
            progress(len(block))
    return scores


def log_prob_increase(
    bases: Float[Tensor, "base d_model"],
    contributions: Float[Tensor, "base row d_model"],
    out: ReadOut,
    token: int,
) -> Float[Tensor, "base row"]:
    """Gain in log p(token), in nats, from adding each contribution alone to its base."""
    n_bases, n_rows, _ = contributions.shape
    which = torch.arange(n_bases, device=bases.device).repeat_interleave(n_rows)
    increase = out.increase(out.baseline(bases), which, contributions.flatten(0, 1), token)
    return increase.reshape(n_bases, n_rows)
