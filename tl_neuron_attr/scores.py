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
from tl_neuron_attr.readout import Baseline, ReadOut

Progress = Callable[[int], object]
"""Called with the number of vectors scored since the last call."""


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """Rise in log p(target), in nats, from each layer's attention and FFN output."""

    attn: Float[Tensor, " layer"]
    ffn: Float[Tensor, " layer"]


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What is predicted from the residual stream that each layer's attention and FFN add to."""

    attn: Baseline
    ffn: Baseline


def baselines(captured: Capture, out: ReadOut, token: int) -> Baselines:
    """The predictions all scores of a run start from, of all layers in one pass."""
    # parallel blocks have no resid_mid: attention and FFN both add to resid_pre
    resid_mid = captured.resid_pre if captured.resid_mid is None else captured.resid_mid
    both = out.baseline(torch.cat([captured.resid_pre, resid_mid]), token)
    n_layers = captured.resid_pre.shape[0]
    return Baselines(attn=both[:n_layers], ffn=both[n_layers:])


def layer_scores(captured: Capture, out: ReadOut, before: Baselines) -> LayerScores:
    """The score of every attention and FFN layer, biases included.

    In sequential blocks they telescope: their sum is log p(final) - log p(embedding), exactly. In
    parallel blocks both add to the same residual stream, and the sum says nothing.
    """
    layers = torch.arange(captured.resid_pre.shape[0], device=captured.resid_pre.device)
    return LayerScores(
        attn=out.increase(before.attn, layers, captured.attn_out),
        ffn=out.increase(before.ffn, layers, captured.mlp_out),
    )


def head_scores(
    attns: Sequence[AttnDecomposition], out: ReadOut, before: Baseline
) -> Float[Tensor, "layer head"]:
    """The score of every head (what it brings from all source positions together).

    ``before`` has one base a layer, in the order of ``attns``.
    """
    vectors = torch.stack([attn.head_vectors() for attn in attns])
    n_layers, n_heads, _ = vectors.shape
    which = torch.arange(n_layers, device=vectors.device).repeat_interleave(n_heads)
    return out.increase(before, which, vectors.flatten(0, 1)).reshape(n_layers, n_heads)


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
        before = out.baseline(attn.base[None], token)
        n_heads, n_pos, _ = attn.shape
        start, stop, _ = heads.indices(n_heads)
        step = max(1, out.rows_per_block // n_pos)
        parts = []
        for first in range(start, stop, step):
            vectors = attn.position_vectors(slice(first, min(first + step, stop)))
            rows = vectors.flatten(0, 1)
            which = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
            scores = out.increase(before, which, rows)
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
    before = out.baseline(decomposition.base[None], token)
    n_neurons, device = decomposition.n_neurons, decomposition.base.device
    scores = torch.zeros(n_neurons, dtype=out.dtype, device=device)
    for first in range(0, n_neurons, out.rows_per_block):
        numbers = torch.arange(first, min(first + out.rows_per_block, n_neurons), device=device)
        active = numbers[decomposition.coefficients_of(numbers) != 0]
        which = torch.zeros_like(active)
        scores[active] = out.increase(before, which, decomposition.vectors(active))
        if progress is not None:
            progress(len(numbers))
    return scores
