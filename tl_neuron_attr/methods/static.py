"""What one forward pass tells: the paper's eight static methods, and direct logit attribution.

All look at the read position alone. ``u`` is a neuron's signed contribution there, coefficient
times subvalue; ``base`` is the residual stream its block adds to; ``w`` is the answer. The letters
are those of Yu & Ananiadou (2024), table 1; where the paper leaves something open, the docstring
says what was decided.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.baselines import Baseline
from tl_neuron_attr.decompose import Decomposition, slopes
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.methods.case import Case, blocks_of, how_many, in_layers, of_ranked
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.readout import ReadOut, read_out
from tl_neuron_attr.scores import neuron_scores_from
from tl_neuron_attr.topk import (
    Bounds,
    Kind,
    TangentBound,
    best_by_bound_of,
    bounds_of_one_run,
    exact_scores,
    tangent_bounds,
    top_neurons,
    top_neurons_of_runs,
)

OfIncrease = Callable[[Int[Tensor, " neuron"], Float[Tensor, " neuron"]], Float[Tensor, " neuron"]]
"""Neurons, by their number across layers, and their increases -> scores that rise with them."""


# --- by what is said with the neuron and without it -------------------------------------------


@torch.no_grad()
@full_precision()
def log_prob_increase(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """a. log p(w | base + u) - log p(w | base), in nats: the paper's method.

    Cost: with ``top`` about one read-out for each neuron asked for (none for those that
    ``attribute`` ranked), certified; else one for each neuron.
    """
    result = case.result
    blocks = blocks_of(case, kind)
    top = how_many(top, case, kind)
    if top is None:
        return in_layers(case, kind, increases(case, kind))
    known = result.ffn_neurons if kind == "ffn" else result.attn_neurons
    if top <= len(known):
        ranked = known if kind == "ffn" else result.attn_neurons_over_sources
    else:
        ranked = top_neurons(blocks, result.out, result.target, top)
    return of_ranked(case, ranked.first(top))


@torch.no_grad()
@full_precision()
def log_prob(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """b. log p(w | u), in nats: the contribution read out on its own, norm and biases as they are.

    It is what ``u`` adds to a residual stream of zeros, so the best are found, and certified, as
    the paper's method finds its own. Cost as there, nothing being known beforehand.
    """
    result, blocks = case.result, blocks_of(case, kind)
    nothing = torch.zeros_like(result.captured.resid_final)[None]
    before = result.out.baseline(nothing, result.target)
    alone = before.log_prob[0]
    of_blocks = before[torch.zeros(len(blocks), dtype=torch.long, device=nothing.device)]
    top = how_many(top, case, kind)
    if top is None:
        scores = [neuron_scores_from(block, result.out, before) for block in blocks]
        return in_layers(case, kind, torch.cat(scores)) + alone
    (ranked,) = top_neurons_of_runs([blocks], result.out, of_blocks, top)
    return of_ranked(case, ranked) + alone


@torch.no_grad()
@full_precision()
def prob_increase(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """c. p(w | base + u) - p(w | base), a probability. Cost as of ``log_prob``.

    Raises:
        InputError: Of a contrast or a distribution, which has no probability.
    """
    blocks = blocks_of(case, kind)
    if case.result.target.against is not None:
        raise InputError(
            "a contrast has no probability to increase; attribute the prompt without against"
        )
    if not case.result.target.has_prob:
        raise InputError(
            f"{case.result.target.words} has no probability to increase; attribute the prompt with "
            "a token, or a set of them, as target"
        )
    before = _before(case, blocks)
    chance = before.log_prob.exp()
    per_block = blocks[0].n_neurons

    def of_increase(
        flat: Int[Tensor, " neuron"], increase: Float[Tensor, " neuron"]
    ) -> Float[Tensor, " neuron"]:
        return chance[flat // per_block] * increase.expm1()

    return scores_by(case, kind, of_increase, top, before=before)


def scores_by(
    case: Case,
    kind: Kind,
    of_increase: OfIncrease,
    top: int | None,
    *,
    before: Baseline | None = None,
) -> Float[Tensor, "..."]:
    """Scores that rise with the log-probability increase: the ``top`` best, certified, or all."""
    result, blocks = case.result, blocks_of(case, kind)
    out = result.out
    before = _before(case, blocks) if before is None else before
    n = blocks[0].n_neurons
    tangents = tangent_bounds([blocks], out, before)
    top = how_many(top, case, kind)
    if top is None or tangents is None:
        flat = torch.arange(n * len(blocks), device=before.resid.device)
        return in_layers(case, kind, of_increase(flat, increases(case, kind, before)))

    def bounds_of(place: int, tangent: TangentBound) -> tuple[Tensor, Tensor]:
        above, slack = tangent.above()
        flat = torch.arange(place * n, (place + 1) * n, device=above.device)
        # a neuron that is off has an increase of 0, which need not make a score of 0
        return of_increase(flat, above.where(~above.isneginf(), 0.0)), slack

    def scores_of(flats: Sequence[Int[Tensor, " _"]]) -> Float[Tensor, " neuron"]:
        (flat,) = flats
        return of_increase(flat, exact_scores(blocks, out, before, flat))

    bounds: list[Bounds] = [
        bounds_of_one_run(partial(bounds_of, place, tangent))
        for place, tangent in enumerate(tangents[0])
    ]
    (ranked,) = best_by_bound_of([blocks], bounds, scores_of, top)
    return of_ranked(case, ranked)


def increases(case: Case, kind: Kind, before: Baseline | None = None) -> Float[Tensor, " neuron"]:
    """The log-probability increase of every neuron, in the order numbered across layers."""
    blocks = blocks_of(case, kind)
    before = _before(case, blocks) if before is None else before
    return torch.cat(
        [
            neuron_scores_from(block, case.result.out, before[place : place + 1])
            for place, block in enumerate(blocks)
        ]
    )


def _before(case: Case, blocks: Sequence[Decomposition]) -> Baseline:
    bases = torch.stack([block.base for block in blocks])
    return case.result.out.baseline(bases, case.result.target)


# --- by coefficient, norm and rank ------------------------------------------------------------


@torch.no_grad()
def norm(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """d. The Euclidean norm of the subvalue, a property of the weights alone.

    Of the subvalue as it is written: where a norm is on the sub-layer's output, behind that norm,
    frozen at its scale in the run.
    """
    norms = torch.cat([block.norms() for block in blocks_of(case, kind)])
    return in_layers(case, kind, norms.to(case.result.out.dtype))


@torch.no_grad()
def coefficient(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """e. The absolute coefficient at the read position; of an attention neuron, of its ``z``."""
    coefficients = [block.all_coefficients() for block in blocks_of(case, kind)]
    return in_layers(case, kind, torch.cat(coefficients).to(case.result.out.dtype)).abs()


@torch.no_grad()
def rank(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """f. 1 / the place of w among all tokens, by how much u raises their logits.

    Of the signed contribution: with a negative coefficient the subvalue's last token comes first.
    Ties count against w, so that a neuron which is off puts it last. Cost: one read-out for each
    neuron.

    Raises:
        InputError: Of anything but one token, which alone has a rank.
    """
    if kind in case.known_ranks:
        return case.known_ranks[kind].clone()  # what is returned is the caller's
    out = case.result.out
    places = []
    for block in blocks_of(case, kind):
        signs = block.all_coefficients().sign().to(out.dtype)
        first = 0
        for rows in block.rows().split(out.rows_per_block):
            some = slice(first, first + len(rows))
            signed = signs[some, None] * block.outlet(rows.to(signs))
            places.append(out.ranks(signed, case.result.target))
            first += len(rows)
    found = in_layers(case, kind, torch.cat(places).to(out.dtype).reciprocal())
    case.known_ranks[kind] = found
    return found.clone()


@torch.no_grad()
def coefficient_norm(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """g. The norm of the contribution: ``coefficient`` times ``norm``."""
    return coefficient(case, kind) * norm(case, kind)


@torch.no_grad()
def coefficient_rank(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """h. ``coefficient`` times ``rank``. Cost and errors as there; ranks are taken once a case."""
    return coefficient(case, kind) * rank(case, kind)


# --- by the logit -----------------------------------------------------------------------------


@torch.no_grad()
@full_precision()
def direct_logit(case: Case, kind: Kind, top: int | None = None) -> Float[Tensor, "..."]:
    """What u adds to the logit of w, the final norm frozen: direct logit attribution.

    To the logit before a soft cap, where there is one.
    Of a contrast, to the difference of the two logits. Where the result is read out by
    ``recomputed``, which has no frozen norm, the norm is that of the final residual. Cost: one
    matrix-vector product a layer.

    Raises:
        InputError: Of several accepted answers, or a distribution.
    """
    target = case.result.target
    if not target.is_token and target.against is None:
        raise InputError(
            f"only a token or a contrast has a logit, not {target.words}; attribute the prompt "
            "with one token as target"
        )
    out = frozen(case)
    assert out.norm_scale is not None
    tokens = [target.id, *([] if target.against is None else [target.against.id])]
    directions = out.directions(torch.tensor(tokens, device=_device(case)), out.norm_scale)
    direction = directions[0] - directions[1] if len(tokens) > 1 else directions[0]
    scores = [
        block.all_coefficients() * slopes(block.rows(), block.outlet(direction)[None])[0]
        for block in blocks_of(case, kind)
    ]
    return in_layers(case, kind, torch.cat(scores))


def frozen(case: Case) -> ReadOut:
    """The read-out with the final norm at the run's own scale, whatever the result's convention."""
    result = case.result
    if result.out.affine:
        return result.out
    out = result.out
    return read_out(result.host, result.captured.resid_final, budget=out.budget, dtype=out.dtype)


def _device(case: Case) -> torch.device:
    return case.result.captured.mlp_post.device
