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

from tl_neuron_attr.baselines import Baseline
from tl_neuron_attr.captured import Capture
from tl_neuron_attr.decompose import AttnDecomposition, Decomposition, head_vectors_of_runs
from tl_neuron_attr.display import brief
from tl_neuron_attr.errors import NonFiniteError
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import Target
from tl_neuron_attr.readout import ReadOut, baseline_of_runs

Progress = Callable[[int], object]
"""Called with the number of vectors scored since the last call."""


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """Rise in log p(target), in nats, from each layer's attention and FFN output."""

    attn: Float[Tensor, " layer"]
    ffn: Float[Tensor, " layer"]


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What is predicted from the residual stream that each layer's attention and FFN add to.

    Of one request (a run and a target) or of several; then the bases are in order of request,
    layer.
    """

    attn: Baseline
    ffn: Baseline
    final: Baseline
    """After the last block: one base a request."""

    __repr__ = brief


def baselines(captured: Capture, out: ReadOut, target: Target) -> Baselines:
    """The predictions all scores of a run start from, of all layers in one pass."""
    return baselines_of_runs([captured], [out], [target])


def baselines_of_runs(
    captures: Sequence[Capture], outs: Sequence[ReadOut], targets: Sequence[Target]
) -> Baselines:
    """The same for several requests to one model.

    Captures that share their activations (one prompt, several targets) share predictions too.

    Cost: one pass over the unembedding for all of them; (2 x layers + 1) x d_vocab floats a run.

    Raises:
        InputError: If targets are not of one form.
    """
    runs: dict[tuple[int, int, int], int] = {}
    run_of = [
        runs.setdefault((id(run.resid_pre), id(run.resid_final), id(run.resid_mid)), len(runs))
        for run in captures
    ]
    firsts = [run_of.index(run) for run in range(len(runs))]
    resids = []
    for captured in (captures[first] for first in firsts):
        # parallel blocks have no resid_mid: attention and FFN both add to resid_pre
        mid = captured.resid_pre if captured.resid_mid is None else captured.resid_mid
        resids.append(torch.cat([captured.resid_pre, mid, captured.resid_final[None]]))
    n_layers = captures[0].resid_pre.shape[0]
    final = 2 * n_layers
    all_bases = baseline_of_runs(
        [outs[first] for first in firsts], resids, run_of, targets, plain=[final]
    )
    number = torch.arange(len(all_bases), device=resids[0].device) % (2 * n_layers + 1)
    return Baselines(
        attn=all_bases[number < n_layers],
        ffn=all_bases[(number >= n_layers) & (number < 2 * n_layers)],
        final=all_bases[number == 2 * n_layers],
    )


def layer_scores(captures: Sequence[Capture], out: ReadOut, before: Baselines) -> list[LayerScores]:
    """The score of every attention and FFN layer, biases included, for each request of ``before``.

    In sequential blocks they telescope: their sum is log p(final) - log p(embedding), exactly. In
    parallel blocks both add to the same residual stream, and the sum says nothing.
    """
    which = torch.arange(len(before.attn), device=before.attn.resid.device)
    attn = out.increase(before.attn, which, torch.cat([run.attn_out for run in captures]))
    ffn = out.increase(before.ffn, which, torch.cat([run.mlp_out for run in captures]))
    return [
        LayerScores(attn=attns, ffn=ffns)
        for attns, ffns in zip(attn.chunk(len(captures)), ffn.chunk(len(captures)), strict=True)
    ]


@full_precision()
def head_scores(
    runs: Sequence[Sequence[AttnDecomposition]], out: ReadOut, before: Baseline
) -> list[Float[Tensor, "layer head"]]:
    """The score of every head (what it brings from all source positions together), of each run.

    ``before`` has one base a block: a run's layers in order, run after run.
    """
    n_layers, n_heads = len(runs[0]), runs[0][0].shape[0]
    blocks_at_once = max(1, out.rows_per_block // n_heads)
    layers_at_once = max(1, blocks_at_once // len(runs))
    scores = before.resid.new_empty(len(runs), n_layers, n_heads, dtype=out.dtype)
    number = torch.arange(n_layers * len(runs), device=scores.device).view(len(runs), n_layers)
    for layers in _ranges(n_layers, layers_at_once):
        for some in _ranges(len(runs), blocks_at_once):
            vectors = torch.stack(
                [
                    head_vectors_of_runs([attns[layer] for attns in runs[some]])
                    for layer in range(layers.start, layers.stop)
                ],
                dim=1,
            )
            which = number[some, layers].flatten().repeat_interleave(n_heads)
            found = out.increase(before, which, vectors.flatten(0, 2))
            scores[some, layers] = found.view(vectors.shape[:3])
    return list(scores)


def _ranges(count: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


@full_precision()
def position_scores(
    attns: Sequence[AttnDecomposition],
    out: ReadOut,
    target: Target,
    *,
    heads: slice = slice(None),
    progress: Progress | None = None,
) -> Float[Tensor, "layer head pos"]:
    """The score of what each of these heads brings from each source position.

    Cost: one pass over the unembedding for all layers, and a read-out for each score. Peak
    memory: the vectors of one head, or of as many as one block of the read-out takes.
    """
    before = out.baseline(torch.stack([attn.base for attn in attns]), target, tangent=False)
    layers = []
    for base, attn in enumerate(attns):
        n_heads, n_pos, _ = attn.shape
        start, stop, _ = heads.indices(n_heads)
        step = max(1, out.rows_per_block // n_pos)
        parts = []
        for first in range(start, stop, step):
            vectors = attn.position_vectors(slice(first, min(first + step, stop)))
            rows = vectors.flatten(0, 1)
            which = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
            scores = out.increase(before[base : base + 1], which, rows)
            parts.append(scores.reshape(vectors.shape[:2]))
            if progress is not None:
                progress(scores.numel())
        layers.append(torch.cat(parts))
    return torch.stack(layers)


def neuron_scores(
    decomposition: Decomposition, out: ReadOut, target: Target, *, progress: Progress | None = None
) -> Float[Tensor, " neuron"]:
    """The score of every neuron of one block, in the order the decomposition numbers them.

    Cost: one read-out per neuron whose coefficient is not 0 (else its score is 0). Peak memory:
    the read-out's budget, and the result. ``topk.top_neurons`` finds the best without scoring all.
    """
    before = out.baseline(decomposition.base[None], target, tangent=False)
    return neuron_scores_from(decomposition, out, before, progress=progress)


@full_precision()
def neuron_scores_from(
    decomposition: Decomposition,
    out: ReadOut,
    before: Baseline,
    *,
    progress: Progress | None = None,
) -> Float[Tensor, " neuron"]:
    """The same from a baseline at hand, whose one base is the block's."""
    n_neurons, device = decomposition.n_neurons, decomposition.base.device
    scores = torch.zeros(n_neurons, dtype=out.dtype, device=device)
    for first in range(0, n_neurons, out.rows_per_block):
        numbers = torch.arange(first, min(first + out.rows_per_block, n_neurons), device=device)
        active = numbers[decomposition.coefficients_of(numbers) != 0]
        which = torch.zeros_like(active)
        scores[active] = out.increase(before, which, decomposition.vectors(active))
        if progress is not None:
            progress(len(numbers))
    return finite(scores)


def finite(scores: Float[Tensor, " neuron"]) -> Float[Tensor, " neuron"]:
    """The scores, if all are numbers: NaN has no place in an order.

    Raises:
        NonFiniteError: If a contribution is so large that its logits overflow.
    """
    if not scores.isfinite().all():
        raise NonFiniteError(
            "a neuron's contribution is too large: its logits overflow the scores' dtype; "
            "check the weights, or score in float64 (dtype=torch.float64)"
        )
    return scores
