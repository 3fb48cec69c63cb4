"""Who raised it: contribution -> rise in log p(target), for layers, heads, positions, neurons.

One score throughout: ``Imp(u) = log p(w | base + u) - log p(w | base)``, in nats, where ``u`` is
added *alone* to the residual stream its block read (Yu & Ananiadou 2024, section 3). How a vector
is read out is the caller's choice of ``LogProb``; the scoring line never changes. Neuron scores do
not sum to their layer's score, for the softmax is not linear.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.capture import Capture
from tl_neuron_attr.decompose import AttnDecomposition, Decomposition
from tl_neuron_attr.readout import LogProb

Progress = Callable[[int], object]
"""Called with the number of vectors scored since the last call."""


def log_prob_increase(
    base: Float[Tensor, "*#batch d_model"],
    contributions: Float[Tensor, "*batch d_model"],
    log_prob: LogProb,
) -> Float[Tensor, "*batch"]:
    """Gain in log p(target), in nats, from adding each contribution alone to ``base``.

    ``base`` is the residual stream just before the block, so that a neuron is never credited for
    what earlier layers already wrote. Source: Yu & Ananiadou (2024), section 3, "importance".
    """
    return log_prob(base + contributions) - log_prob(base)


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """Rise in log p(target), in nats, from each layer's attention and FFN output."""

    attn: Float[Tensor, " layer"]
    ffn: Float[Tensor, " layer"]


def layer_scores(captured: Capture, log_prob: LogProb) -> LayerScores:
    """The score of every attention and FFN layer, biases included.

    In sequential blocks they telescope: their sum is log p(final) - log p(embedding), exactly. In
    parallel blocks both add to the same residual stream, and the sum says nothing.
    """
    resid_mid = captured.resid_pre if captured.resid_mid is None else captured.resid_mid
    bases = torch.stack([captured.resid_pre, resid_mid])
    attn, ffn = log_prob_increase(
        bases, torch.stack([captured.attn_out, captured.mlp_out]), log_prob
    )
    return LayerScores(attn=attn, ffn=ffn)


def head_scores(
    attns: Sequence[AttnDecomposition], log_prob: LogProb, progress: Progress | None = None
) -> Float[Tensor, "layer head"]:
    """The score of every head (what it brings from all source positions together)."""
    vectors = torch.stack([attn.head_vectors() for attn in attns])
    bases = torch.stack([attn.base for attn in attns])[:, None]
    scores = log_prob_increase(bases, vectors, log_prob)
    _report(progress, scores)
    return scores


def position_scores(
    attns: Sequence[AttnDecomposition],
    log_prob: LogProb,
    *,
    heads: slice = slice(None),
    chunk: int = 512,
    progress: Progress | None = None,
) -> Float[Tensor, "layer head pos"]:
    """The score of what each of these heads brings from each source position.

    Peak memory: ``max(chunk, pos) x d_model`` floats, and what ``log_prob`` uses.
    """
    layers = []
    for attn in attns:
        n_heads, n_pos, _ = attn.shape
        start, stop, _ = heads.indices(n_heads)
        step = max(1, chunk // n_pos)
        parts = []
        for first in range(start, stop, step):
            vectors = attn.position_vectors(slice(first, min(first + step, stop)))
            parts.append(log_prob_increase(attn.base, vectors, log_prob))
            _report(progress, parts[-1])
        layers.append(torch.cat(parts))
    return torch.stack(layers)


def neuron_scores(
    decomposition: Decomposition,
    log_prob: LogProb,
    *,
    chunk: int = 512,
    progress: Progress | None = None,
) -> Float[Tensor, " neuron"]:
    """The score of every neuron of one block, in the order the decomposition numbers them.

    Cost: one read-out per neuron. Peak memory: ``chunk x d_model`` floats beyond what
    ``log_prob`` uses, and the result.
    """
    numbers = torch.arange(decomposition.n_neurons, device=decomposition.base.device)
    base_log_prob = log_prob(decomposition.base)
    parts = []
    for block in numbers.split(chunk):
        parts.append(log_prob(decomposition.base + decomposition.vectors(block)) - base_log_prob)
        _report(progress, parts[-1])
    return torch.cat(parts)


def _report(progress: Progress | None, scores: Tensor) -> None:
    if progress is not None:
        progress(scores.numel())
